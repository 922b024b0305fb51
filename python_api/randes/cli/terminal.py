"""What all commands say and take: arguments, progress bars, errors of one line, numbers of bytes."""

import json
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)  # fmt: skip
from rich.table import Column, Table
from rich.text import Text

from randes.checkpoints.lazy_tensors import Progress as Reading
from randes.checkpoints.lazy_tensors import size
from randes.errors import RandesError
from randes.superposition.store.contents import bytes_of
from randes.superposition.superposition import Superposition


def shown(text: str) -> str:
    """A text without what a terminal would obey: names and paths may hold anything."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


class Terminal(Console):
    """Shows each text as ``shown``."""

    def render_str(self, text: str, **how: Any) -> Text:
        return super().render_str(shown(text), **how)


console = Terminal()

Store = Annotated[str, typer.Argument(metavar="DIR", help="A store: a folder, or an address, s3://bucket/store.")]
NamedModel = Annotated[
    str,
    typer.Argument(
        metavar="NAME=PATH",
        help="A model and its checkpoint: safetensors, a folder of shards, their index, or a LoRA adapter's folder.",
    ),
]

Json = Annotated[bool, typer.Option("--json", help="What was done, as JSON.")]
Rank = Annotated[
    str,
    typer.Option(
        metavar="auto|INTEGER",
        help="Directions of each matrix in which every model keeps its own delta; 0 for none.",
    ),
]
ShardSize = Annotated[
    str | None,
    typer.Option(
        metavar="BYTES",
        help="Bytes of tensors in a file of the store, as 2GiB; 0 for one file of each kind, however large. By default"
        " as in the store that it is made of, and 0 for a new one.",
    ),
]


@contextmanager
def errors() -> Iterator[None]:
    """What a user can mend is one line on standard error and exit code 2, not a traceback; a warning is a line too."""
    with warnings.catch_warnings():
        warnings.simplefilter("default", UserWarning)
        warnings.showwarning = _show_warning
        try:
            yield
        except (RandesError, ValueError, OSError, ImportError) as error:
            Terminal(stderr=True).print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
            raise typer.Exit(2) from error


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    note(str(message))


def note(text: str) -> None:
    """One line on standard error, of what a user should know."""
    Terminal(stderr=True).print(f"[bold]note:[/] {escape(text)}", highlight=False, soft_wrap=True)


class Amount(ProgressColumn):
    """How much of a stage's bytes is done, of how many, and how fast; what is read twice counts to the whole once."""

    def render(self, task: Task) -> Text:
        total = int(task.total or 0)
        speed = task.finished_speed or task.speed
        text = f"{sized(min(int(task.completed), total))} of {sized(total)}"
        return Text(f"{text}, {sized(int(speed))}/s" if speed else text, "progress.download")


@contextmanager
def progress(name: str = "") -> Iterator[Callable[[str, int], Callable[[int], None]]]:
    """A bar for each stage of long work, on standard error: bytes, speed and the time that is left.

    name: of the model that it is done with.
    """
    columns = (
        TextColumn("{task.description:<14}", markup=False), BarColumn(), Amount(Column(no_wrap=True)),
        TimeRemainingColumn(elapsed_when_finished=True),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True)) as bars:

        def end() -> None:  # what had not to be read is done too
            for task in bars.tasks:
                bars.update(task.id, completed=task.total)

        def begin(stage: str, nbytes: int) -> Callable[[int], None]:
            end()
            task = bars.add_task(shown(f"{stage} {name}".strip()), total=nbytes)
            return lambda done: bars.advance(task, done)

        yield begin
        end()


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


def shard_bytes(text: str | None) -> int | None:
    """What ``--shard-size`` says, looked at before any work is done; None where it is not given."""
    return None if text is None else bytes_of(text)


def name_and_path(text: str) -> tuple[str, str]:
    name, equals, path = text.partition("=")
    if not (name and equals and path):
        raise ValueError(f"a model must be given as NAME=PATH, got {text!r}")
    return name, path


def named(models: list[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, path in map(name_and_path, models):
        if name in found:
            raise ValueError(f"--model must name each fine-tune once, got {name!r} twice")
        found[name] = path
    return found


def print_sizes(superposition: Superposition, as_json: bool = False, **more: Any) -> None:
    """What a store has by now; as JSON with ``more``."""
    sizes = superposition.sizes
    if as_json:
        nbytes = {
            "base": sizes.base, "superposed": sizes.superposed, "kept": sizes.kept, "basis": sizes.basis,
            "total": sizes.total, "separate_models": sizes.separate_models,
        }  # fmt: skip
        print_json({"models": superposition.names, "bytes": nbytes, **more})
        return
    times = f"{sizes.total / sizes.base:.2f}x one of them"
    say(
        f"{len(superposition.members)} models in {sized(sizes.total)}, {times}: base {sized(sizes.base)},"
        f" superposed {sized(sizes.superposed)}, kept per model {sized(sizes.kept)},"
        f"{f' in shared bases {sized(sizes.basis)},' if sizes.basis else ''} as separate models"
        f" {sized(sizes.separate_models)}"
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


def sized(count: int) -> str:
    """Bytes in the one style of all commands: three digits and a decimal unit, as --memory takes them."""
    value, units = float(count), ["B", "kB", "MB", "GB", "TB"]
    while abs(value) >= 999.5 and len(units) > 1:
        value /= 1000
        del units[0]
    return f"{value:.0f} {units[0]}" if units[0] == "B" or value >= 99.95 else f"{value:#.3g} {units[0]}"


def table(*headings: str, title: str | None = None) -> Table:
    """A table whose cells are wrapped where a terminal is narrow, and never cut."""
    return Table(*(Column(heading, overflow="fold") for heading in headings), title=title)
