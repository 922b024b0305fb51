"""The command line: ``randes --help``."""

import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

from randes import fusionbench
from randes.basis import MOST
from randes.compress import compress as make
from randes.config import Config
from randes.errors import RandesError
from randes.factors import merge_adapter as merged
from randes.factors import superpose_adapters as make_of_adapters
from randes.files import write_file
from randes.fusionbench import Options
from randes.plan import plan as plan_of
from randes.report import write as write_report
from randes.store import MANIFEST, check_new
from randes.streams import Progress as Begin
from randes.streams import size
from randes.summary import ranks, summary
from randes.summary import verify as verify_model
from randes.superposition import Superposition

app = typer.Typer(
    help="Many full fine-tunes of one base model in one store.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console()
_WORDS = {"rotation": "a rotation", "diagonal": "a diagonal of normal numbers", "dense": "a dense matrix"}

Store = Annotated[Path, typer.Argument(metavar="DIR", help="A store.")]
NamedModel = Annotated[
    str,
    typer.Argument(
        metavar="NAME=PATH",
        help="A model and its checkpoint: safetensors, a folder of shards, their index, or a LoRA adapter's folder.",
    ),
]

Rank = Annotated[
    str,
    typer.Option(
        metavar="auto|INTEGER",
        help="Directions of each matrix in which every model keeps its own delta; 0 for none.",
    ),
]


@contextmanager
def _errors() -> Iterator[None]:
    """What a user can mend is one line on standard error and exit code 2, not a traceback."""
    try:
        yield
    except (RandesError, ValueError, OSError) as error:
        Console(stderr=True).print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        raise typer.Exit(2) from error


@contextmanager
def _progress() -> Iterator[Callable[[str, int], Callable[[int], None]]]:
    """A bar for each stage of long work, on standard error: bytes, speed and the time that is left."""
    columns = (
        TextColumn("{task.description:<14}"), BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True)) as bars:

        def begin(stage: str, nbytes: int) -> Callable[[int], None]:
            task = bars.add_task(stage, total=nbytes)
            return lambda done: bars.advance(task, done)

        yield begin


@contextmanager
def _steps() -> Iterator[Callable[[str, int], Callable[[], None]]]:
    """The same for work that is counted in steps."""
    columns = TextColumn("{task.description:<14}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True)) as bars:

        def begin(stage: str, steps: int) -> Callable[[], None]:
            task = bars.add_task(stage, total=steps)
            return lambda: bars.advance(task)

        yield begin


def _rank(text: str) -> int | str:
    """A number where it is one; ``Config`` says what else there can be."""
    return int(text) if re.fullmatch(r"-?\d+", text) else text


def _name_and_path(text: str) -> tuple[str, Path]:
    name, equals, path = text.partition("=")
    if not (name and equals and path):
        raise ValueError(f"a model must be given as NAME=PATH, got {text!r}")
    return name, Path(path)


def _named(models: list[str]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for name, path in map(_name_and_path, models):
        if name in found:
            raise ValueError(f"--model must name each fine-tune once, got {name!r} twice")
        found[name] = path
    return found


@app.command()
def compress(
    context: typer.Context,
    base: Annotated[
        Path, typer.Option(help="The base model's checkpoint: safetensors, a folder of shards or their index.")
    ],
    model: Annotated[
        list[str],
        typer.Option(metavar="NAME=PATH", help="A fine-tune, or a LoRA adapter's folder; may be given many times."),
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the store goes; must not hold one yet.")],
    signs: Annotated[str, typer.Option(help="both, columns or none.")] = "both",
    permute: Annotated[int, typer.Option(help="Granule of the column permutation; 0 for none.")] = 0,
    shuffle_layers: Annotated[
        int, typer.Option(help="-1 to shuffle same-named layers, s > 0 to move the i-th model's by i · s.")
    ] = 0,
    group_size: Annotated[int, typer.Option(help="Models that share one superposition.")] = 8,
    seed: Annotated[int, typer.Option(help="Of all signs and permutations.")] = 0,
    others: Annotated[str, typer.Option(help="What is not superposed: keep, base, average or sum.")] = "keep",
    include: Annotated[
        list[str] | None, typer.Option(help="Pattern of tensors to superpose; replaces the default.")
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(help="Pattern of tensors not to superpose; replaces the default.")
    ] = None,
    min_width: Annotated[int, typer.Option(help="Narrower matrices are not superposed.")] = Config.min_width,
    centre: Annotated[
        bool, typer.Option(help="Measure deltas from the mean of the fine-tunes; the base is then superposed too.")
    ] = False,
    rank: Annotated[
        str | None,
        typer.Option(
            metavar="auto|INTEGER",
            help="Directions of each matrix in which every model keeps its own delta; 0 for none. By default auto, and"
            " 0 with a dense matrix or an origin of zero.",
        ),
    ] = None,
    matrix: Annotated[
        str, typer.Option(help="What turns columns: signs, or in their place rotation, diagonal or dense.")
    ] = "signs",
    gains: Annotated[str, typer.Option(help="own: all deltas in one size; shared: summed as they are.")] = "own",
    origin: Annotated[str, typer.Option(help="base, or zero to superpose the weights themselves.")] = "base",
    every: Annotated[int, typer.Option(help="Superpose only every n-th of the tensors that are selected.")] = 1,
    per_layer: Annotated[bool, typer.Option(help="A transform for each tensor, or one for all of a model.")] = True,
    vectors: Annotated[bool, typer.Option(help="Superpose selected biases, norms and other vectors too.")] = False,
    alpha: Annotated[float, typer.Option(help="What all models' deltas are scaled by when they are used.")] = 1.0,
    config_file: Annotated[
        Path | None,
        typer.Option("--config", metavar="YAML", help="FusionBench's keys of a RanDeS method; flags override them."),
    ] = None,
) -> None:
    """Superpose fine-tunes of one base into a new store."""
    with _errors(), _progress() as begin:
        if (out / MANIFEST).exists():
            raise ValueError(f"--out must not hold a store yet, got {out}; use 'randes add' to add to it")
        patterns = {"include": include, "exclude": exclude}
        options: dict[str, Any] = {name: tuple(given) for name, given in patterns.items() if given is not None}
        # A basis is what the first cannot have, and the second has no deltas for.
        by_default = "0" if matrix == "dense" or origin == "zero" else "auto"
        options |= {
            "signs": signs, "permute": permute, "shuffle_layers": shuffle_layers, "group_size": group_size,
            "seed": seed, "others": others, "centre": centre, "rank": _rank(rank or by_default), "min_width": min_width,
            "matrix": matrix, "gains": gains, "origin": origin, "every": every, "per_layer": per_layer,
            "vectors": vectors,
        }  # fmt: skip
        models = _named(model)
        chosen = Options(Config(**options), alpha, False, ())
        if config_file is not None:
            chosen = _overridden(fusionbench.options(fusionbench.read(config_file), len(models)), context, options)
        check_new(out)
        if chosen.lora:
            if alpha != 1.0:
                raise ValueError(f"alpha must be left out for adapters: merge-adapter --scaling takes it; got {alpha}")
            superposition = make_of_adapters(base, models, chosen.config, progress=begin)
        else:
            superposition = make(base, models, chosen.config, alpha=chosen.alpha, progress=begin)
        superposition.save(out, progress=begin)
    _print_sizes(superposition)


def _overridden(found: Options, context: typer.Context, flags: dict[str, Any]) -> Options:
    """FusionBench's configuration, with the flags that were given in its place; its notes go to standard error."""
    for note in found.notes:
        Console(stderr=True).print(f"[bold]note:[/] {escape(note)}", highlight=False, soft_wrap=True)
    sources = {name: context.get_parameter_source(name) for name in context.params}
    given = {name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}
    config = replace(found.config, **{name: value for name, value in flags.items() if name in given})
    return found._replace(config=config, alpha=context.params["alpha"] if "alpha" in given else found.alpha)


@app.command()
def superpose_adapters(
    base: Annotated[Path, typer.Option(help="The model that the adapters were trained on; its shapes are read.")],
    adapter: Annotated[
        list[str], typer.Option(metavar="NAME=PATH", help="A LoRA adapter's folder; may be given many times.")
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the store goes; must not hold one yet.")],
    signs: Annotated[str, typer.Option(help="As for compress.")] = "both",
    matrix: Annotated[str, typer.Option(help="As for compress.")] = "signs",
    gains: Annotated[str, typer.Option(help="As for compress.")] = "own",
    shuffle_layers: Annotated[int, typer.Option(help="As for compress.")] = 0,
    group_size: Annotated[int, typer.Option(help="As for compress.")] = 8,
    seed: Annotated[int, typer.Option(help="As for compress.")] = 0,
    per_layer: Annotated[bool, typer.Option(help="As for compress.")] = True,
) -> None:
    """Superpose the factors of LoRA adapters, A and B, which merge-adapter multiplies again."""
    with _errors(), _progress() as begin:
        check_new(out)
        options: dict[str, Any] = {"matrix": matrix, "gains": gains, "per_layer": per_layer}
        config = Config(signs, 0, shuffle_layers, group_size, seed, **options)  # type: ignore[arg-type]
        superposition = make_of_adapters(base, _named(adapter), config, progress=begin)
        superposition.save(out, progress=begin)
    _print_sizes(superposition)


@app.command()
def merge_adapter(
    store: Store,
    name: Annotated[str, typer.Argument(metavar="NAME", help="The adapter.")],
    base: Annotated[Path, typer.Option(help="The model that the adapters were trained on.")],
    out: Annotated[Path, typer.Option(metavar="PATH", help="The safetensors file to write.")],
    scaling: Annotated[float, typer.Option(help="What the update is scaled by.")] = 1.0,
) -> None:
    """Write the base with one adapter's retrieved update, from a store of superpose-adapters."""
    with _errors(), _progress() as begin:
        tensors = merged(Superposition.load(store), name, base, scaling=scaling)
        write_file(out, tensors, step=begin("merging", size(tensors)))
    _say(f"{out}: {len(tensors)} tensors of {name}")


@app.command()
def plan(
    base: Annotated[Path, typer.Option(help="The base model's checkpoint; its shapes are read, not its values.")],
    models: Annotated[int, typer.Option(help="How many fine-tunes there will be.")],
    memory: Annotated[float | None, typer.Option(metavar="GB", help="What servers have, in 10⁹ bytes.")] = None,
    group_size: Annotated[int, typer.Option(help="Models that share one superposition.")] = 8,
    others: Annotated[str, typer.Option(help="What is not superposed: keep, base, average or sum.")] = "keep",
    centre: Annotated[bool, typer.Option(help="As for compress.")] = False,
    rank: Rank = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Show what a store will take and cost at each number of bits, before anything is compressed."""
    with _errors():
        if memory is not None and not memory > 0:
            raise ValueError(f"--memory must be above 0, got {memory}")
        config = Config(group_size=group_size, others=others, centre=centre, rank=_rank(rank))  # type: ignore[arg-type]
        rows = plan_of(base, models, config)
    if as_json:
        print(json.dumps([asdict(row) for row in rows], indent=1))
        return
    table = Table("bits", "store", "in memory", "decode, one group", "decode, all groups", "interference", "fits")
    for row in rows:
        fits = "" if memory is None else "yes" if row.serving <= memory * 1e9 else "no"
        costs = f"{row.decode:.2f}x", f"{row.decode_all:.2f}x", f"{row.interference:.2f}"
        table.add_row(str(row.bits), _gigabytes(row.store), _gigabytes(row.serving), *costs, fits)
    console.print(table)
    console.print(
        f"As separate models {_gigabytes(rows[0].separate)}. Of store and memory at most"
        f" {_gigabytes(rows[0].kept)} is what models keep of their own; models that share it with the base need less."
    )
    if config.rank == "auto":
        console.print(
            f"rank auto: the models decide how many directions each matrix keeps, {MOST} at most; this counts all of"
            " those. With --rank 0 there are none."
        )
    console.print(
        "decode: weight bytes that a step reads, in units of one plain model's. interference: noise in a retrieved"
        " delta's weights, in units of the delta; it is not the accuracy: evaluate the models for that."
    )


@app.command()
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


@app.command()
def remove(store: Store, model: NamedModel) -> None:
    """Take a fine-tune out of a store, exactly; its checkpoint is needed for that."""
    _change(store, model, lambda held, name, path, begin: held.remove(name, path, progress=begin))


def _change(store: Path, model: str, change: Callable[[Superposition, str, Path, Begin], None]) -> None:
    with _errors(), _progress() as begin:
        name, path = _name_and_path(model)
        superposition = Superposition.load(store, check=False)
        change(superposition, name, path, begin)
        superposition.save(store, progress=begin)
    _print_sizes(superposition)


@app.command()
def pack(
    store: Store,
    out: Annotated[Path, typer.Option(metavar="DIR2", help="Where the packed store goes; must not hold one yet.")],
    bits: Annotated[int, typer.Option(help="Of an element of the superpositions: 8, 4 or 2.")] = 4,
    group: Annotated[int, typer.Option(help="Columns that share a scale, at 4 and 2 bits.")] = 64,
    coordinates: Annotated[
        int | None,
        typer.Option(help="Bits of each model's own part in shared bases: 16, 8 or 4. By default as D, 4 at least."),
    ] = None,
) -> None:
    """Write a store in few bits, for serving: models are added to and removed from the one it is made of."""
    with _errors(), _progress() as begin:
        check_new(out)
        superposition = Superposition.load(store, progress=begin)
        step = begin("packing", superposition.sizes.superposed)
        superposition = superposition.pack(bits, group=group, coordinates=coordinates, step=step)
        superposition.save(out, progress=begin)
    _print_sizes(superposition)


@app.command()
def retrieve(
    store: Store,
    name: Annotated[str, typer.Argument(metavar="NAME", help="The model.")],
    out: Annotated[Path, typer.Option(metavar="PATH", help="The safetensors file to write.")],
) -> None:
    """Write one model as a plain checkpoint again."""
    with _errors(), _progress() as begin:
        tensors = Superposition.load(store, check=False).retrieved(name, progress=begin)
        write_file(out, tensors, step=begin("retrieving", size(tensors)))
    _say(f"{out}: {len(tensors)} tensors of {name}")


@app.command()
def info(store: Store, as_json: Annotated[bool, typer.Option("--json", help="Everything, as JSON.")] = False) -> None:
    """Show models, transform, sizes and coverage of a store, after checking every byte of it."""
    with _errors(), _progress() as begin:
        superposition = Superposition.load(store, progress=begin)
    found = summary(superposition)
    if as_json:
        print(json.dumps(found, indent=1, ensure_ascii=False))
        return
    table = Table(
        "model", "group", "α", "tuned α", "superposed tensors", "kept tensors", "kept bytes", title=escape(str(store))
    )
    for name, model in found["models"].items():
        table.add_row(escape(name), *map(str, model.values()))
    console.print(table)
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
        _say(f"packed for serving in {packing.bits} bits, of the store with checksum {packing.master}")
    for coverage, tensors in found["coverage"].items():
        console.print(f"[bold]{coverage.replace('_', ' ')}[/] ({len(tensors)})")
        for tensor, described in tensors.items():
            _say(f"  {tensor}  {described}")
    _print_sizes(superposition)


@app.command()
def verify(
    store: Store, model: NamedModel, as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False
) -> None:
    """Compare a model, as retrieved, with the checkpoint that was added: weight error, not accuracy."""
    with _errors(), _progress() as begin:
        name, path = _name_and_path(model)
        found = verify_model(Superposition.load(store, check=False), name, path, progress=begin)
    if as_json:
        print(json.dumps(vars(found), indent=1))
        return
    _say(f"{name}, one of {found.models_in_group} models in its group")
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


@app.command()
def report(
    store: Store,
    out: Annotated[Path, typer.Option(metavar="FILE", help="The HTML file to write.")] = Path("report.html"),
    model: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=PATH", help="A checkpoint that was added, to be compared with; two show cosines."),
    ] = None,
) -> None:
    """Write one HTML file with pictures: sizes, interference, cosines and energy of deltas, and what is kept."""
    with _errors(), _progress() as begin:
        checkpoints = _named(model or [])
        superposition = Superposition.load(store, check=False)
        write_report(superposition, out, checkpoints, title=str(store), progress=begin)
    _say(f"{out}: {len(superposition.members)} models, {len(checkpoints)} checkpoints compared")


@app.command()
def demo(
    models: Annotated[int, typer.Option(help="Fine-tunes, 2 to 16.")] = 8,
    group_size: Annotated[int, typer.Option(help="Models that share one superposition.")] = 8,
    seed: Annotated[int, typer.Option(help="Of data split, training, signs and permutations.")] = 0,
    matrices_only: Annotated[bool, typer.Option(help="Fine-tune only what is superposed; share the rest.")] = False,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where checkpoints, store and picture go.")] = Path(
        "randes-demo"
    ),
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the table as JSON.")] = None,
) -> None:
    """Fine-tune a small transformer on tasks made of digits, superpose all of it, and compare with merging."""
    try:
        from randes.demo import report, run
    except ModuleNotFoundError as error:
        Console(stderr=True).print(f"[bold red]error:[/] {error.name} is missing: python -m pip install 'randes[demo]'")
        raise typer.Exit(2) from error
    with _errors(), _steps() as begin:
        finetunes = run.finetune(models, seed=seed, matrices_only=matrices_only, progress=begin)
        outcome = run.evaluate(finetunes, group_size=group_size, progress=begin)
        run.save_checkpoints(out, finetunes, outcome)
        report.draw(outcome, out / "demo.png")
        if json_file is not None:
            json_file.write_text(json.dumps(report.as_json(outcome), indent=1, ensure_ascii=False) + "\n", "utf-8")
    report.print_table(outcome, console)
    _say(f"Checkpoints, store and picture (demo.png) are in {out}.")


def _print_sizes(superposition: Superposition) -> None:
    sizes = superposition.sizes
    _say(
        f"{len(superposition.members)} models in {_mebibytes(sizes.total)}: base {_mebibytes(sizes.base)}, superposed"
        f" {_mebibytes(sizes.superposed)}, kept per model {_mebibytes(sizes.kept)},"
        f"{f' in shared bases {_mebibytes(sizes.basis)},' if sizes.basis else ''} as separate models"
        f" {_mebibytes(sizes.separate_models)}"
    )


def _say(text: str) -> None:
    """One line as it stands: names and paths may hold what rich takes for markup."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.3g} GB"


def _mebibytes(count: int) -> str:
    return f"{count / 2**20:.2f} MiB"


if __name__ == "__main__":
    sys.exit(app())
