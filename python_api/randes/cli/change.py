"""Commands that change a store, and those that write something of it elsewhere."""

from collections.abc import Callable
from typing import Annotated

import typer

from randes.checkpoints.huggingface import model_files
from randes.checkpoints.lazy_tensors import Progress, size
from randes.checkpoints.paths.written import write_checkpoint
from randes.checkpoints.remote.locations import Location, location
from randes.cli.terminal import (
    Json,
    NamedModel,
    ShardSize,
    Store,
    bits_of,
    errors,
    name_and_path,
    note,
    packed,
    print_json,
    print_sizes,
    progress,
    say,
    shard_bytes,
)
from randes.superposition.lora_factors import merge_adapter as merged
from randes.superposition.members import BASE_NAME
from randes.superposition.store.write import alone, check_new
from randes.superposition.superposition import Superposition


def add(
    store: Store,
    model: NamedModel,
    group: Annotated[int | None, typer.Option(help="The group it joins; by default the first with room.")] = None,
    alpha: Annotated[float, typer.Option(help="What its deltas are scaled by.")] = 1.0,
    as_json: Json = False,
) -> None:
    """Add a fine-tune to a store."""
    _change(
        store,
        model,
        as_json,
        lambda held, name, path, begin: held.add(name, path, group=group, alpha=alpha, progress=begin),
    )


def remove(store: Store, model: NamedModel, as_json: Json = False) -> None:
    """Take a fine-tune out of a store, exactly; its checkpoint is needed for that."""
    _change(store, model, as_json, lambda held, name, path, begin: held.remove(name, path, progress=begin))


def _change(store: str, model: str, as_json: bool, change: Callable[[Superposition, str, str, Progress], None]) -> None:
    with errors(), progress(model.partition("=")[0]) as begin:
        name, path = name_and_path(model)
        # From before it is read: what waited for another command works on what that has left.
        with alone(location(store), waiting=lambda: note(f"waiting for another command that changes {store}")):
            superposition = Superposition.load(store, check=False)
            change(superposition, name, path, begin)
            superposition.save(store, progress=begin)
    print_sizes(superposition, as_json, store=str(store))


def pack(
    store: Store,
    out: Annotated[str, typer.Option(metavar="DIR2", help="Where the packed store goes; must not hold one yet.")],
    bits: Annotated[
        float, typer.Option(parser=bits_of, help="Of an element of the superpositions: 8, 4, 2, 1 or 0.5.")
    ] = 2,
    group: Annotated[
        int | None, typer.Option(help="Columns that share a step, 0 for whole rows. By default 64 at 4 bits, else 0.")
    ] = None,
    coordinates: Annotated[
        int | None,
        typer.Option(help="Bits of each model's own part in bases: 16, 8 or 4. By default as D, 4 at least."),
    ] = None,
    embeddings: Annotated[
        float | None,
        typer.Option(
            parser=bits_of,
            help="Bits of embedding tables beside their loudest directions: 8, 4, 2, 1, 0.5, or 0 for these alone. By"
            " default 0.5, and 2 with D in more than 2.",
        ),
    ] = None,
    shard_size: ShardSize = None,
    as_json: Json = False,
) -> None:
    """Write a store in few bits, for serving: models are added to and removed from the one it is made of."""
    with errors(), progress() as begin:
        check_new(location(out))
        limit = shard_bytes(shard_size)
        superposition = Superposition.load(store, progress=begin)
        how = {"bits": bits, "group": group, "coordinates": coordinates, "embeddings": embeddings}
        superposition = packed(superposition, begin, **how)
        superposition.save(out, shard_size=limit, progress=begin)
    print_sizes(superposition, as_json, store=str(out))


def retrieve(
    store: Store,
    name: Annotated[str, typer.Argument(metavar="NAME", help="The model.")],
    out: Annotated[
        str,
        typer.Option(
            metavar="PATH", help="The folder to write, or one safetensors file where it ends in .safetensors."
        ),
    ],
    as_json: Json = False,
) -> None:
    """Write one model as a plain checkpoint again, in a folder with the base's configuration and tokenizer."""
    with errors(), progress(name) as begin:
        superposition = Superposition.load(store, check=False)
        tensors = superposition.retrieved(name, as_files=True, progress=begin)
        base = superposition.retrieved(BASE_NAME, as_files=True) if superposition.has_base else None
        beside, step = superposition.model_files, begin("retrieving", size(tensors))
        file = write_checkpoint(location(out), tensors, beside, base=base, step=step)
    _print_written(file, name, len(tensors), as_json)


def _print_written(file: Location, name: str, tensors: int, as_json: bool) -> None:
    if as_json:
        print_json({"file": str(file), "model": name, "tensors": tensors})
        return
    say(f"{file}: {tensors} tensors of {name}")


def merge_adapter(
    store: Store,
    name: Annotated[str, typer.Argument(metavar="NAME", help="The adapter.")],
    base: Annotated[str, typer.Option(help="The model that the adapters were trained on.")],
    out: Annotated[
        str,
        typer.Option(
            metavar="PATH", help="The folder to write, or one safetensors file where it ends in .safetensors."
        ),
    ],
    scaling: Annotated[float, typer.Option(help="What the update is scaled by.")] = 1.0,
    as_json: Json = False,
) -> None:
    """Write the base with one adapter's retrieved update, from a store of superpose-adapters."""
    with errors(), progress(name) as begin:
        tensors = merged(Superposition.load(store), name, base, scaling=scaling)
        file = write_checkpoint(location(out), tensors, model_files(base), step=begin("merging", size(tensors)))
    _print_written(file, name, len(tensors), as_json)
