"""The command line: ``randes --help``."""

import typer

from randes.cli.change import add, merge_adapter, pack, remove, retrieve
from randes.cli.demo import demo
from randes.cli.make import compress, plan, superpose_adapters
from randes.cli.show import info, report, verify

app = typer.Typer(
    help="Many full fine-tunes of one base model in one store.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (
    compress, superpose_adapters, merge_adapter, plan, add, remove, pack, retrieve, info, verify, report, demo,
):  # fmt: skip
    app.command()(command)
