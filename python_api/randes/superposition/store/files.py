"""A store's files: opened, and known again by their size and time of change."""

import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from randes.checkpoints import schema
from randes.checkpoints.huggingface import is_model_file
from randes.checkpoints.on_disk import StoredTensors, open_file
from randes.errors import CheckpointError, StoreError

STEM = r"(base|basis|group-(0|[1-9][0-9]{0,8})|unshared-[0-9a-f]{16}|model-[0-9a-f]{16}|average)"
TENSORS = re.compile(rf"{STEM}-[0-9a-f]{{32}}\.safetensors")
"""Names of the files of tensors."""
OURS = re.compile(rf"\.?{TENSORS.pattern}(\.[0-9a-f]+\.tmp)?|\.manifest\.json\.[0-9a-f]+\.tmp")
"""The same, and those that a save which was cut short has left."""


def tensors_name(where: str, value: object) -> None:
    """A ``schema.Check``."""
    right = isinstance(value, str) and TENSORS.fullmatch(value) is not None
    schema.must(right, where, "the name of a store's file of tensors", value)


def companion_name(where: str, value: object) -> None:
    """A ``schema.Check``."""
    schema.file_name(where, value)
    schema.must(is_model_file(str(value)), where, "the name of a file that goes with a model", value)


def open_tensors(folder: Path, name: str, digests: dict[str, str]) -> StoredTensors:
    try:
        tensors = open_file(folder / name, links=False)
    except (CheckpointError, OSError) as error:
        raise StoreError(f"{folder} is not whole: {error}") from error
    if tensors.keys() != digests.keys():
        raise StoreError(f"{folder / name} must hold {sorted(digests)}, got {sorted(tensors)}")
    return tensors.held_to(digests, _altered)


def _altered(path: Path, tensor: str) -> StoreError:
    return StoreError(f"{path} was altered: the checksum of {tensor} does not match the manifest")


@dataclass(frozen=True)
class Stored:
    """A store as it was last read or written: where, which, and its files' sizes and times of change."""

    folder: Path
    checksum: str
    files: dict[Path, tuple[int, int] | None]


def stored_now(folder: Path, manifest: dict[str, Any]) -> Stored:
    return Stored(
        folder.resolve(), manifest["checksum"], {folder / name: state_of(folder / name) for name in manifest["files"]}
    )


def state_of(file: Path) -> tuple[int, int] | None:
    """What changes when a file is changed; None where there is none, or something else than a file."""
    try:
        found = os.lstat(file)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return (found.st_size, found.st_mtime_ns) if stat.S_ISREG(found.st_mode) else None
