"""A store's files: opened, and known again by their size and time of change."""

import os
import re
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

from randes.checkpoints import schema
from randes.checkpoints.huggingface import is_model_file
from randes.checkpoints.on_disk import StoredTensors, open_file
from randes.checkpoints.paths.folder import INDEX
from randes.checkpoints.remote.locations import Location, Remote, each
from randes.checkpoints.safetensors import in_order
from randes.errors import CheckpointError, StoreError

STEM = r"(base|basis|group-(0|[1-9][0-9]{0,8})|unshared-[0-9a-f]{16}|model-[0-9a-f]{16}|average)"
TENSORS = re.compile(rf"{STEM}-[0-9a-f]{{32}}\.safetensors")
"""Names of the files of tensors."""
INDEX_OF_BASE = re.compile(rf"base-[0-9a-f]{{32}}{re.escape(INDEX)}")
"""The same of what says to Transformers which file of a base each tensor is in."""
OURS = re.compile(
    rf"\.?({TENSORS.pattern}|{INDEX_OF_BASE.pattern})(\.[0-9a-f]+\.tmp)?|\.manifest\.json\.[0-9a-f]+\.tmp"
)
"""Both, and those that a save which was cut short has left."""


def tensors_name(where: str, value: object) -> None:
    """A ``schema.Check``."""
    right = isinstance(value, str) and TENSORS.fullmatch(value) is not None
    schema.must(right, where, "the name of a store's file of tensors", value)


def companion_name(where: str, value: object) -> None:
    """A ``schema.Check``."""
    schema.file_name(where, value)
    schema.must(is_companion(str(value)), where, "the name of a file that goes with a model", value)


def is_companion(name: str) -> bool:
    """Whether a file of that name stands beside a store's tensors."""
    return is_model_file(name) or INDEX_OF_BASE.fullmatch(name) is not None


def open_tensors(folder: Location, names: Iterable[str], manifest: dict[str, Any]) -> dict[str, StoredTensors]:
    """The tensors of each kind of some files, in the order that one file would have them in, to be held to the digests
    that a manifest has of them. Raises ``StoreError`` for others than it says."""
    opened = dict(zip(names, each(folder, partial(_opened, folder, manifest), names), strict=True))
    found = {}
    for stem, several in by_stem(opened).items():
        where = {name: place for file in several for name, place in opened[file].where.items()}
        known = {name: digest for file in several for name, digest in manifest["files"][file].items()}
        ordered = in_order({name: file.headers[own] for name, (file, own) in where.items()})
        found[stem] = StoredTensors({name: where[name] for name in ordered}, known, altered)
    return found


def _opened(folder: Location, manifest: dict[str, Any], name: str) -> StoredTensors:
    digests, size = manifest["files"][name], manifest.get("sizes", {}).get(name)
    try:
        tensors = open_file(folder / name, links=False)
    except (CheckpointError, OSError) as error:
        raise StoreError(f"{folder} is not whole: {error}") from error
    if tensors.keys() != digests.keys():
        raise StoreError(f"{folder / name} must hold {sorted(digests)}, got {sorted(tensors)}")
    if size is not None and (found := next(iter(tensors.where.values()))[0].nbytes) != size:
        raise StoreError(f"{folder / name} must have {size} bytes, got {found}")
    return tensors


def by_stem(files: Iterable[str]) -> dict[str, list[str]]:
    """The names of a store's files of tensors by what they hold: the part of their names before a digest."""
    found: dict[str, list[str]] = {}
    for name in files:
        found.setdefault(name.rsplit("-", 1)[0], []).append(name)
    return found


def altered(path: Location, tensor: str) -> StoreError:
    return StoreError(f"{path} was altered: the checksum of {tensor} does not match the manifest")


@dataclass(frozen=True)
class Stored:
    """A store as it was last read or written: where, which, and its files' sizes and times of change."""

    folder: Location
    checksum: str
    files: dict[Location, tuple[int, int] | None]


def stored_now(folder: Location, manifest: dict[str, Any]) -> Stored:
    paths = [folder / name for name in manifest["files"]]
    return Stored(folder.resolve(), manifest["checksum"], dict(zip(paths, each(folder, state_of, paths), strict=True)))


def state_of(file: Location) -> tuple[int, int] | None:
    """What changes when a file is changed; None where there is none, or something else than a file."""
    if isinstance(file, Remote):
        return file.state()
    try:
        found = os.lstat(file)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return (found.st_size, found.st_mtime_ns) if stat.S_ISREG(found.st_mode) else None
