"""What all commands say and take: arguments, progress bars, errors of one line, numbers of bytes."""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
)  # fmt: skip
from rich.text import Text

from randes.checkpoints.lazy_tensors import Progress as Reading
from randes.checkpoints.lazy_tensors import size
from randes.errors import RandesError
from randes.superposition.superposition import Superposition


def shown(text: str) -> str:
    """A text without what a terminal would obey: names and paths may hold anything."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


class Terminal(Console):
    """Shows each text as ``shown``."""

    def render_str(self, text: str, **how: Any) -> Text:
        return super().render_str(shown(text), **how)


console = Terminal()

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
def errors() -> Iterator[None]:
    """What a user can mend is one line on standard error and exit code 2, not a traceback."""
    try:
        yield
    except (RandesError, ValueError, OSError) as error:
        Terminal(stderr=True).print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        raise typer.Exit(2) from error


@contextmanager
def progress() -> Iterator[Callable[[str, int], Callable[[int], None]]]:
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
def steps() -> Iterator[Callable[[str, int], Callable[[], None]]]:
    """The same for work that is counted in steps."""
    columns = TextColumn("{task.description:<14}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True)) as bars:

        def begin(stage: str, steps: int) -> Callable[[], None]:
            task = bars.add_task(stage, total=steps)
            return lambda: bars.advance(task)

        yield begin


def rank_of(text: str) -> int | str:
    """A number where it is one; ``Config`` says what else there can be."""
    return int(text) if re.fullmatch(r"-?\d+", text) else text


def bits_of(text: str) -> float:
    """A number of bits; whole ones, as everywhere, an int."""
    bits = float(text)
    return int(bits) if bits.is_integer() else bits


def name_and_path(text: str) -> tuple[str, Path]:
    name, equals, path = text.partition("=")
    if not (name and equals and path):
        raise ValueError(f"a model must be given as NAME=PATH, got {text!r}")
    return name, Path(path)


def named(models: list[str]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for name, path in map(name_and_path, models):
        if name in found:
            raise ValueError(f"--model must name each fine-tune once, got {name!r} twice")
        found[name] = path
    return found


def print_sizes(superposition: Superposition) -> None:
    sizes = superposition.sizes
    times = f"{sizes.total / sizes.base:.2f}x one of them"
    say(
        f"{len(superposition.members)} models in {mebibytes(sizes.total)}, {times}: base {mebibytes(sizes.base)},"
        f" superposed {mebibytes(sizes.superposed)}, kept per model {mebibytes(sizes.kept)},"
        f"{f' in shared bases {mebibytes(sizes.basis)},' if sizes.basis else ''} as separate models"
        f" {mebibytes(sizes.separate_models)}"
    )


def packed(superposition: Superposition, begin: Reading, **how: Any) -> Superposition:
    """``superposition.pack(**how)`` with a bar."""
    step = begin("packing", sum(map(size, superposition.held.values())))
    return superposition.pack(step=step, **how)


def say(text: str) -> None:
    """One line as it stands: names and paths may hold what rich takes for markup."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def print_json(value: object) -> None:
    """As JSON, in which what a terminal would obey is escaped."""
    text = json.dumps(value, indent=1, ensure_ascii=False)
    print("".join(c if c.isprintable() or c == "\n" else _escaped(c) for c in text))


def _escaped(character: str) -> str:
    units = character.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[place : place + 2].hex()}" for place in range(0, len(units), 2))


def gigabytes(count: int) -> str:
    return f"{count / 1e9:.3g} GB"


def mebibytes(count: int) -> str:
    return f"{count / 2**20:.2f} MiB"
