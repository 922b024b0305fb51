"""Commands that look at a store."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from randes.cli.terminal import (
    Json,
    NamedModel,
    Store,
    console,
    errors,
    name_and_path,
    named,
    print_json,
    print_sizes,
    progress,
    say,
    sized,
    table,
)
from randes.inspect.report import write as write_report
from randes.superposition.packed_tensors import in_words
from randes.superposition.summary import ranks, summary
from randes.superposition.summary import verify as verify_model
from randes.superposition.superposition import Superposition

_WORDS = {"rotation": "a rotation", "diagonal": "a diagonal of normal numbers", "dense": "a dense matrix"}


def info(store: Store, as_json: Annotated[bool, typer.Option("--json", help="Everything, as JSON.")] = False) -> None:
    """Show models, transform, sizes and coverage of a store, after checking every byte of it."""
    with errors(), progress() as begin:
        superposition = Superposition.load(store, progress=begin)
    found = summary(superposition)
    if as_json:
        print_json(found)
        return
    rows = table(
        "model", "group", "α", "tuned α", "superposed tensors", "kept tensors", "kept bytes", title=escape(store)
    )
    for name, model in found["models"].items():
        rows.add_row(escape(name), *map(str, model.values()))
    console.print(rows)
    config = superposition.config
    console.print(
        f"signs {config.signs}, permute {config.permute}, shuffle_layers {config.shuffle_layers},"
        f" groups of {config.group_size}, seed {config.seed}, others {config.others}"
        f"{', deltas centred on their mean' if config.centre else ''}"
        f"{f', shared bases of {ranks(superposition)}' if config.rank else ''}"
        f"{f', columns turned by {_WORDS[config.matrix]}' if config.matrix != 'signs' else ''}"
        f"{', one gain for all models' if config.gains == 'shared' else ''}"
        f"{', weights measured from zero' if config.origin == 'zero' else ''}"
        f"{'' if config.per_layer else ', one transform for all tensors'}"
    )
    if (packing := superposition.packing) is not None:
        say(f"packed for serving in {in_words(packing.bits)}, of the store with checksum {packing.master}")
    if superposition.shard_size:
        say(f"in files of {sized(superposition.shard_size)}")
    for coverage, tensors in found["coverage"].items():
        console.print(f"[bold]{coverage.replace('_', ' ')}[/] ({len(tensors)})")
        for tensor, described in tensors.items():
            say(f"  {tensor}  {described}")
    print_sizes(superposition)


def verify(
    store: Store, model: NamedModel, as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False
) -> None:
    """Compare a model, as retrieved, with the checkpoint that was added: weight error, not accuracy."""
    with errors(), progress(model.partition("=")[0]) as begin:
        name, path = name_and_path(model)
        found = verify_model(Superposition.load(store, check=False), name, path, progress=begin)
    if as_json:
        print_json(vars(found))
        return
    say(f"{name}, one of {found.models_in_group} models in its group")
    console.print(
        f"weight error       {found.relative_error:.4f}  ‖Ŵ − W‖ / ‖W − W0‖, over {len(found.tensors)} tensors"
    )
    console.print(
        f"predicted          {found.predicted_error:.4f}  the same, of how many models share a tensor's buffer,"
        " less what shared bases keep apart, with what packing and α add",
        soft_wrap=True,
    )
    console.print(f"kept tensors       {'exact' if found.kept_exact else 'NOT EXACT'}")
    console.print("Both are interference in the weights, not the accuracy: evaluate the model for that.")


def report(
    store: Store,
    out: Annotated[Path, typer.Option(metavar="FILE", help="The HTML file to write.")] = Path("report.html"),
    model: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=PATH", help="A checkpoint that was added, to be compared with; two show cosines."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write one HTML file with pictures: sizes, interference, cosines and energy of deltas, and what is kept."""
    with errors(), progress() as begin:
        checkpoints = named(model or [])
        superposition = Superposition.load(store, check=False)
        write_report(superposition, out, checkpoints, title=store, progress=begin)
    if as_json:
        print_json({"file": str(out), "models": superposition.names, "compared": list(checkpoints)})
        return
    say(f"{out}: {len(superposition.members)} models, {len(checkpoints)} checkpoints compared")
