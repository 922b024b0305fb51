"""Saving a superposition: new files beside the old, the manifest renamed last, and only then the old ones removed."""

import fcntl
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any

from randes.checkpoints import sources
from randes.checkpoints.files import make_folder, read_whole, write_whole
from randes.checkpoints.huggingface import is_model_file
from randes.checkpoints.lazy_tensors import Progress, silent, size
from randes.checkpoints.on_disk import Overlay
from randes.checkpoints.remote.locations import Location, Remote, location
from randes.checkpoints.safetensors import write_file
from randes.errors import StoreError
from randes.superposition.state import State
from randes.superposition.store.contents import StoreFile, bytes_of, files_of, group_file
from randes.superposition.store.files import OURS, Stored, by_stem, open_tensors, state_of, stored_now
from randes.superposition.store.manifest import MANIFEST, manifest_of, model_files_in, read_manifest, text_of


def save(
    superposition: State, path: str | os.PathLike[str], *, shard_size: int | str | None = None,
    progress: Progress = silent,
) -> None:  # fmt: skip
    """Write the store at ``path``: a folder that is new, empty, or the store that this came from or went to last.

    shard_size: bytes of tensors in a file, as a number or as "2GiB"; 0 for one file of each kind, however large. By
        default as in the store that this came from or went to last, and 0 for the first one.
    progress: told of each stage and its bytes. Raises ``StoreError`` for any other folder, and for a store that was
    changed since; ``ValueError`` for a ``shard_size`` that is none; ``OSError`` where the disk does not take it. The
    store is the old one then.
    """
    folder = location(path)
    limit = superposition.shard_size if shard_size is None else bytes_of(shard_size)
    superposition.check_base()
    files = files_of(superposition, limit)
    write(superposition, folder, files, limit, progress=progress)


def write(
    superposition: State, folder: Location, files: Mapping[str, StoreFile], limit: int, *,
    there: Mapping[Location, tuple[int, int] | None] = MappingProxyType({}), progress: Progress = silent,
) -> None:  # fmt: skip
    """Write a store of these ``files``, as ``save`` does. there: those that are written already, as they were then.

    Raises ``StoreError`` where one of those is another by now.
    """
    manifest = manifest_of(superposition, files, limit)
    check_destination(superposition, folder, manifest)
    make_folder(folder)
    with alone(folder):
        check_destination(superposition, folder, manifest)
        known = superposition.stored.files if isinstance(superposition.stored, Stored) else {}
        changed = {
            name: file.tensors
            for name, file in files.items()
            if folder / name not in there
            and ((state := state_of(folder / name)) is None or known.get(folder / name) != state)
        }
        touched = [name for name in files if folder / name in there and state_of(folder / name) != there[folder / name]]
        for found in open_tensors(folder, touched, manifest).values():
            found.check()
        beside = model_files_in(superposition, manifest["files"])
        new = [folder / name for name in (*changed, *beside) if state_of(folder / name) is None]
        step = progress("writing", sum(map(size, changed.values())))
        try:
            for name, tensors in changed.items():
                write_file(folder / name, tensors, step=step)
            for name, text in beside.items():
                if state_of(folder / name) is None or read_whole(folder / name, links=False) != text:
                    write_whole(folder / name, [memoryview(text)])
            write_whole(folder / MANIFEST, [memoryview(text_of(manifest).encode())])
        except BaseException:
            if _is_written(folder, manifest):
                superposition.stored, superposition.shard_size = stored_now(folder, manifest), limit
            else:
                with suppress(OSError):
                    for file in new:  # a full disk is full enough, and no manifest names them
                        file.unlink(missing_ok=True)
            raise
        superposition.stored, superposition.shard_size = stored_now(folder, manifest), limit
        # The store is the new one: what stays undone is done by the next save.
        with suppress(OSError, StoreError):
            _reopen(superposition, folder, manifest)
        with suppress(OSError):
            for file in folder.iterdir():
                if OURS.fullmatch(file.name) and file.name not in {*manifest["files"], *beside}:
                    file.unlink()


def _is_written(folder: Location, manifest: dict[str, Any]) -> bool:
    """Whether the store is the new one, although what came after its manifest failed; as far as can be known."""
    try:
        return bool(read_manifest(folder)["checksum"] == manifest["checksum"])
    except StoreError:
        return (folder / MANIFEST).exists()


def _reopen(superposition: State, folder: Location, manifest: dict[str, Any]) -> None:
    """Read what came from a store from its new files, so that the old ones' space and what was held come free."""
    groups = {group_file(superposition, group): group for group in superposition.deltas}
    for stem, names in by_stem(manifest["files"]).items():
        if stem in groups:
            group = groups[stem]
            if isinstance(held := superposition.deltas.get(group), Overlay) and held.held:
                superposition.deltas[group] = Overlay({}, open_tensors(folder, names, manifest)[stem])
        elif stem == "average" and isinstance(superposition.averages, Overlay):
            superposition.averages = Overlay({}, open_tensors(folder, names, manifest)[stem])


def check_destination(superposition: State, folder: Location, manifest: dict[str, Any] | None = None) -> None:
    """Raise ``StoreError`` unless ``folder`` is new, empty, or the store that this came from or went to last.

    A store that somebody else has written to meanwhile holds models that would be lost. ``manifest``: what is to be
    written; where it stands there already, a save that was cut short is done again.
    """
    if (folder / MANIFEST).exists():
        found, stored = read_manifest(folder), superposition.stored
        if found["base"] != sources.combined_digest(superposition.base_digests):
            raise StoreError(f"{folder} holds a store of another base; save to another folder")
        ours = isinstance(stored, Stored) and (stored.folder, stored.checksum) == (folder.resolve(), found["checksum"])
        if not ours and (manifest is None or found["checksum"] != manifest["checksum"]):
            raise StoreError(f"{folder} holds a store that was written since, or is another's; load it and change that")
    else:
        check_new(folder)


def check_new(folder: Location) -> None:
    """Raise ``StoreError`` unless ``folder`` can take a new store: it is not there, or empty but for what a save that
    was cut short has left."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise StoreError(f"{folder} must be a folder, got a file")
    names = [file.name for file in folder.iterdir()]
    # A save writes what stands beside the tensors after these: without one it is somebody else's.
    begun = any(OURS.fullmatch(name) and name.startswith("base-") for name in names)
    if strangers := [n for n in names if not OURS.fullmatch(n) and not (begun and is_model_file(n))]:
        raise StoreError(f"{folder} must be empty or a store, got {sorted(strangers)[:3]}")


class _Held(threading.local):
    """The folders that this thread keeps to itself."""

    def __init__(self) -> None:
        self.folders: set[Path] = set()


_HELD = _Held()


@contextmanager
def alone(folder: Location, *, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Keep other processes and threads from saving to ``folder`` meanwhile; within it this one may.

    Elsewhere than here nobody can be kept from it: of a store in object storage one process is the writer.
    waiting: called where another one does, before it is waited for. Raises ``StoreError`` where there is no folder.
    """
    if isinstance(folder, Remote):
        yield
        return
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise StoreError(f"{folder} is not a store: there is no such folder") from error
    resolved = folder.resolve()
    mine = resolved not in _HELD.folders
    try:
        if mine:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                waiting()
                fcntl.flock(handle, fcntl.LOCK_EX)
            _HELD.folders.add(resolved)
        yield
    finally:
        os.close(handle)
        if mine:
            _HELD.folders.discard(resolved)
