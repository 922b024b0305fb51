"""Names of models on the Hugging Face hub, as the folders that ``huggingface_hub`` keeps them in."""

import importlib
import json
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from randes.checkpoints.files import read_whole
from randes.checkpoints.paths.folder import INDEX
from randes.checkpoints.remote.locations import is_remote, location
from randes.errors import CheckpointError

NAME = re.compile(r"(?P<name>[\w][\w.-]*(/[\w][\w.-]*)?)(@(?P<revision>[\w./-]+))?")
"""``owner/name`` or ``name``, and a branch, tag or commit after an @."""
FILES = ["*.safetensors", "*.json", "tokenizer*", "vocab.*", "merges.txt", "*.model", "*.tiktoken", "chat_template.*"]
"""Weights, their index, configurations, and what else a store keeps beside them."""
SPARE = ["original/*", "onnx/*", "openvino/*", "coreml/*", "consolidated*"]
"""The same again in other forms."""


def local(source: Any) -> Any:
    """A source that is the name of a model on the hub as the folder of its files, one that is an address elsewhere as
    what reads it; any other source as it is.

    A path that is there is never a name. Files are taken from the cache where they are in it whole, and fetched where
    not, unless ``HF_HUB_OFFLINE`` is set. Raises ``CheckpointError`` where the hub does not give them.
    """
    if is_remote(source):
        return location(source)
    if not isinstance(source, str | os.PathLike) or os.path.lexists(source):
        return source
    found = NAME.fullmatch(os.fspath(source))
    if found is None or Path(source).suffix in (".safetensors", ".json", ".gguf", ".bin", ".pt", ".pth"):
        return source
    try:
        hub: Any = importlib.import_module("huggingface_hub")
    except ImportError:
        return source
    wanted: dict[str, Any] = {
        "repo_id": found["name"],
        "revision": found["revision"],
        "allow_patterns": FILES,
        "ignore_patterns": SPARE,
    }
    with suppress(Exception):  # not in the cache, or not whole
        folder = Path(hub.snapshot_download(**wanted, local_files_only=True))
        if _is_whole(folder):
            return folder
    try:
        folder = Path(hub.snapshot_download(**wanted))  # offline too it is what the cache has, be it a part
        if not _is_whole(folder):
            raise FileNotFoundError(f"what there is of it, in {folder}, is no whole checkpoint in safetensors")
        return folder
    except Exception as error:  # whatever network, hub and cache have against it
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(
            f"{source} does not exist: no file or folder is called so here, and the Hugging Face hub does not give a"
            f" model of that name: {reason[0]}"
        ) from error


def _is_whole(folder: Path) -> bool:
    """Whether all weights are there: a cache may hold a configuration alone, or some of the shards."""
    for index in folder.glob(f"*{INDEX}"):
        named = set(json.loads(read_whole(index))["weight_map"].values())
        if not all((folder / name).is_file() for name in named):
            return False
    return any(folder.glob("*.safetensors"))
