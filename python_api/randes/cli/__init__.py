"""The command line: ``randes --help``."""

from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from randes.cli.change import add, merge_adapter, pack, remove, retrieve
from randes.cli.demo import demo
from randes.cli.make import compress, superpose_adapters
from randes.cli.planning import plan
from randes.cli.serve import serve
from randes.cli.show import info, report, verify

INTERRUPTED = 130
"""The exit code after Ctrl-C, as a shell has it."""


class Commands(TyperGroup):
    """All commands: an interrupted one ends at once, and a store that it was to change is the old one."""

    def invoke(self, ctx: Any) -> Any:
        """Raises ``typer.Exit`` with ``INTERRUPTED``."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            typer.echo("interrupted", err=True)
            raise typer.Exit(INTERRUPTED) from None


app = typer.Typer(
    cls=Commands,
    help="Many full fine-tunes of one base model in one store.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        try:
            typer.echo(f"randes {version('randes')}")
        except PackageNotFoundError:
            typer.echo("randes, not installed as a package")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Many full fine-tunes of one base model in one store."""


for command in (
    compress, superpose_adapters, merge_adapter, plan, add, remove, pack, retrieve, info, verify, report, serve, demo,
):  # fmt: skip
    app.command()(command)
