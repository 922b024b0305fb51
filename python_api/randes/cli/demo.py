"""The command that shows all of it on digits."""

import json
from pathlib import Path
from shlex import quote
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from randes.cli.terminal import console, errors, say, steps


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
        what = escape(f"{error.name} is missing: python -m pip install 'randes[demo]'")
        Console(stderr=True).print(f"[bold red]error:[/] {what}")
        raise typer.Exit(2) from error
    with errors(), steps() as begin:
        finetunes = run.finetune(models, seed=seed, matrices_only=matrices_only, progress=begin)
        outcome = run.evaluate(finetunes, group_size=group_size, progress=begin)
        run.save_checkpoints(out, finetunes, outcome)
        report.draw(outcome, out / "demo.png")
        if json_file is not None:
            json_file.write_text(json.dumps(report.as_json(outcome), indent=1, ensure_ascii=False) + "\n", "utf-8")
    report.print_table(outcome, console)
    say(f"Checkpoints, store and picture (demo.png) are in {out}. What to try on them next:")
    for command in next_commands(out, list(finetunes.models)):
        say(f"    {command}")


def next_commands(out: Path, names: list[str]) -> list[str]:
    """What can be done with the store that was just written; each can be run as it stands."""
    first, last = names[0], names[-1]
    folder = quote(str(out))
    return [
        f"randes info {folder}/store",
        f"randes verify {folder}/store {first}={folder}/{first}.safetensors",
        f"randes pack {folder}/store --out {folder}/served",
        f"randes remove {folder}/store {last}={folder}/{last}.safetensors",
        f"randes add {folder}/store {last}={folder}/{last}.safetensors",
        f"randes retrieve {folder}/store {first} --out {folder}/{first}-again.safetensors",
    ]
