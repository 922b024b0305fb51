"""Files opened so that nothing but a regular file is ever read, and nobody waits for one; and written so that a crash
leaves the old one or the new one."""

import errno
import os
import stat
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from secrets import token_hex
from tempfile import NamedTemporaryFile

from randes.checkpoints.remote.locations import Location, Remote
from randes.errors import CheckpointError

LONGEST = 1 << 30
"""Bytes of a text that is read whole: a manifest of a thousand models has a tenth of them."""


def opened(path: Path, *, links: bool = True) -> int:
    """A handle to read a regular file with, for the caller to close.

    links: whether it may be a link, as a cache's checkpoints are. A store's files are none.
    Raises ``CheckpointError``, at once, for a link, a folder, a pipe, a device or a socket; ``OSError`` where nothing
    is.
    """
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if links else os.O_NOFOLLOW)
    try:
        handle = os.open(path, flags)
    except OSError as error:
        nowhere = error.errno == errno.ENOENT and path.is_symlink()
        if error.errno not in (errno.ELOOP, errno.ENXIO, errno.ENODEV) and not nowhere:
            raise
        what = "a link" if nowhere or error.errno == errno.ELOOP else "a socket or a device"
        raise CheckpointError(f"{path} must be a regular file, got {what}") from error
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise CheckpointError(f"{path} must be a regular file, got a folder, a pipe or a device")
    return handle


def read_whole(path: Location, *, links: bool = True) -> bytes:
    """The bytes of a regular file. Raises as ``opened`` does, and ``CheckpointError`` for more than ``LONGEST``."""
    if isinstance(path, Remote):
        _check_length(path, (path.state() or (0, 0))[0])
        return path.read_bytes()
    with open(opened(path, links=links), "rb") as file:
        _check_length(path, os.fstat(file.fileno()).st_size)
        return file.read(LONGEST)


def _check_length(path: Location, count: int) -> None:
    if count > LONGEST:
        raise CheckpointError(f"{path} must have at most {LONGEST} bytes, got {count}")


def write_whole(path: Location, pieces: Iterable[memoryview]) -> None:
    """Write a file beside ``path``, flush it to disk, and rename it; elsewhere, write it here and put it there whole.

    Raises ``OSError`` where the disk is full, or it is not taken.
    """
    if isinstance(path, Remote):
        with NamedTemporaryFile(prefix="randes-") as spool:
            for data in pieces:
                spool.write(data)
            spool.flush()
            path.put(spool.name)
        return
    # Of a name that nobody can have planted anything under.
    beside = path.with_name(f".{path.name}.{token_hex(8)}.tmp")
    try:
        handle = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            for data in pieces:
                while len(data):
                    data = data[os.write(handle, data) :]
            os.fsync(handle)
        finally:
            os.close(handle)
        beside.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        raise OSError(error.errno, f"could not be written: {error.strerror or error}", str(path)) from error
    finally:
        with suppress(OSError):
            beside.unlink()


def make_folder(folder: Location) -> None:
    """Make a folder and those above it that are missing, so that a crash does not lose their names. Elsewhere folders
    are no more than a part of files' names."""
    if isinstance(folder, Remote):
        return
    missing = [one for one in (folder, *folder.parents) if not one.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for made in missing:
        sync_folder(made.parent)


def sync_folder(folder: Path) -> None:
    """Have the disk know the names in a folder."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
