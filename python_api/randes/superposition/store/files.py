"""A store's files: opened, and known again by their size and time of change."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from randes.checkpoints.on_disk import StoredTensors, open_file
from randes.errors import CheckpointError, StoreError

OURS = re.compile(
    r"\.?(base|basis|group-\d+|unshared-[0-9a-f]{16}|model-[0-9a-f]{16}|average)-[0-9a-f]{32}\.safetensors(\.\d+\.tmp)?"
    r"|\.manifest\.json\.\d+\.tmp"
)


def open_tensors(folder: Path, name: str, digests: dict[str, str]) -> StoredTensors:
    try:
        tensors = open_file(folder / name)
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
    """What changes when a file is changed; None where there is no file."""
    if not file.exists():
        return None
    found = file.stat()
    return found.st_size, found.st_mtime_ns
