"""The command that serves a store, by the server that suits its models."""

import importlib.util
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from randes.checkpoints.huggingface import class_named, library
from randes.cli.terminal import Store, errors, note
from randes.errors import RandesError
from randes.superposition.store.manifest import read_manifest

PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True}
"""Options that vLLM has and this command does not."""


class Engine(str, Enum):
    """Who answers requests."""

    auto = "auto"
    vllm = "vllm"
    litserve = "litserve"


def serve(
    context: typer.Context,
    store: Store,
    engine: Annotated[
        Engine, typer.Option(help="vllm for models that generate text, litserve for others; auto chooses by the class.")
    ] = Engine.auto,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8000,
    room: Annotated[int, typer.Option(min=0, help="Fine-tunes that can be added while it runs.")] = 0,
    module: Annotated[
        str | None,
        typer.Option(
            metavar="PACKAGE.MODULE:FUNCTION",
            help="What makes a model of the base's class, where that is none of Transformers.",
        ),
    ] = None,
    changes: Annotated[
        bool, typer.Option("--changes", help="Let requests add and remove fine-tunes, by paths on this machine.")
    ] = False,
    batch: Annotated[int, typer.Option(min=1, help="Most rows in one call of the model.")] = 32,
    wait: Annotated[float, typer.Option(min=0, help="Seconds that a batch waits for more rows.")] = 0.0,
    timeout: Annotated[float, typer.Option(help="Seconds after which a waiting request is given up.")] = 30.0,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto for what there is.")] = "auto",
) -> None:
    """Serve a store over HTTP: each request names the model that answers it, and many models share a batch."""
    with errors():
        read_manifest(store)
        if engine is Engine.auto:
            engine = Engine.vllm if module is None and generates(store) else Engine.litserve
        _check_installed(engine)
        if engine is Engine.vllm:
            raise RandesError("vllm: not here yet")
        if context.args:
            raise ValueError(f"there is no option {context.args[0]}; see randes serve --help")
        if changes and not room:
            note("--changes without --room: models can be removed, and served again, but none added")
        from randes.litserve.server import run, server_of
        from randes.litserve.worker import Store as Served

        served = Served(str(store), module, room)
        server = server_of(served, batch=batch, wait=wait, changes=changes, device=device, timeout=timeout)
        try:
            run(server, host, port)
        except RuntimeError as error:
            raise RandesError(f"{store} is not served; the reason is above ({error})") from error


def generates(store: Path) -> bool:
    """Whether a store's models generate text: what its configuration's class says."""
    name = class_named(store)
    return bool(name) and bool(getattr(library(), name).can_generate())


def _check_installed(engine: Engine) -> None:
    found = importlib.util.find_spec(engine.value)
    if found is None or found.origin is None:  # nor a folder of that name
        raise RandesError(
            f"{engine.value} serves this store, and is not installed: python -m pip install 'randes[{engine.value}]'"
        )
