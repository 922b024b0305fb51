"""Commands that change a store, and those that write something of it elsewhere."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from randes.checkpoints.lazy_tensors import Progress, size
from randes.checkpoints.safetensors import write_file
from randes.cli.terminal import NamedModel, Store, bits_of, errors, name_and_path, packed, print_sizes, progress, say
from randes.superposition.lora_factors import merge_adapter as merged
from randes.superposition.store.write import check_new
from randes.superposition.superposition import Superposition


def add(
    store: Store,
    model: NamedModel,
    group: Annotated[int | None, typer.Option(help="The group it joins; by default the first with room.")] = None,
    alpha: Annotated[float, typer.Option(help="What its deltas are scaled by.")] = 1.0,
) -> None:
    """Add a fine-tune to a store."""
    _change(
        store, model, lambda held, name, path, begin: held.add(name, path, group=group, alpha=alpha, progress=begin)
    )


def remove(store: Store, model: NamedModel) -> None:
    """Take a fine-tune out of a store, exactly; its checkpoint is needed for that."""
    _change(store, model, lambda held, name, path, begin: held.remove(name, path, progress=begin))


def _change(store: Path, model: str, change: Callable[[Superposition, str, Path, Progress], None]) -> None:
    with errors(), progress() as begin:
        name, path = name_and_path(model)
        superposition = Superposition.load(store, check=False)
        change(superposition, name, path, begin)
        superposition.save(store, progress=begin)
    print_sizes(superposition)


def pack(
    store: Store,
    out: Annotated[Path, typer.Option(metavar="DIR2", help="Where the packed store goes; must not hold one yet.")],
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
) -> None:
    """Write a store in few bits, for serving: models are added to and removed from the one it is made of."""
    with errors(), progress() as begin:
        check_new(out)
        superposition = Superposition.load(store, progress=begin)
        how = {"bits": bits, "group": group, "coordinates": coordinates, "embeddings": embeddings}
        superposition = packed(superposition, begin, **how)
        superposition.save(out, progress=begin)
    print_sizes(superposition)


def retrieve(
    store: Store,
    name: Annotated[str, typer.Argument(metavar="NAME", help="The model.")],
    out: Annotated[Path, typer.Option(metavar="PATH", help="The safetensors file to write.")],
) -> None:
    """Write one model as a plain checkpoint again."""
    with errors(), progress() as begin:
        tensors = Superposition.load(store, check=False).retrieved(name, as_files=True, progress=begin)
        write_file(out, tensors, step=begin("retrieving", size(tensors)))
    say(f"{out}: {len(tensors)} tensors of {name}")


def merge_adapter(
    store: Store,
    name: Annotated[str, typer.Argument(metavar="NAME", help="The adapter.")],
    base: Annotated[Path, typer.Option(help="The model that the adapters were trained on.")],
    out: Annotated[Path, typer.Option(metavar="PATH", help="The safetensors file to write.")],
    scaling: Annotated[float, typer.Option(help="What the update is scaled by.")] = 1.0,
) -> None:
    """Write the base with one adapter's retrieved update, from a store of superpose-adapters."""
    with errors(), progress() as begin:
        tensors = merged(Superposition.load(store), name, base, scaling=scaling)
        write_file(out, tensors, step=begin("merging", size(tensors)))
    say(f"{out}: {len(tensors)} tensors of {name}")
