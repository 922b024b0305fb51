"""safetensors files elsewhere: tensors are fetched by ranges of bytes, each whole when its first part is asked for.

What was fetched lies in a file of this process alone until there is no more room for it, and is read from there: the
bytes that were found right are those that are used. Where a tensor is fetched again, it must be what it was.
"""

import os
from collections import OrderedDict
from collections.abc import Iterator
from hashlib import blake2b
from itertools import count
from tempfile import gettempdir, mkstemp
from threading import Lock
from weakref import finalize

from torch import Tensor

from randes.checkpoints.lazy_tensors import blocks, raw
from randes.checkpoints.remote.locations import Location, Remote
from randes.checkpoints.safetensors import ChangedError, File
from randes.errors import CheckpointError

ROOM = 4 << 30
"""Bytes of fetched tensors that are held on the disk; the last one is, however large."""
RANGE, AT_ONCE = 8 << 20, 4
"""Bytes of a range, and ranges that are asked for together."""
HEAD = 1 << 17
"""Bytes that are read with a file's first eight: most headers are shorter."""


class Spool:
    """A file of this process alone, without a name, closed when nobody has it any more."""

    def __init__(self) -> None:
        self.handle, name = mkstemp(prefix="randes-")
        finalize(self, os.close, self.handle)
        os.unlink(name)

    def write(self, data: bytes) -> None:
        """Add to its end."""
        memory = memoryview(data)
        try:
            while len(memory):
                memory = memory[os.write(self.handle, memory) :]
        except OSError as error:
            raise OSError(error.errno, f"what is fetched could not be held: {error.strerror}", gettempdir()) from error


class Fetched:
    """Tensors that were fetched, in files without names, the least recently used dropped first."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._held: OrderedDict[tuple[int, str], tuple[Spool, int]] = OrderedDict()
        self.nbytes = 0

    def get(self, key: tuple[int, str]) -> Spool | None:
        """What is held; it stays readable for whoever has it."""
        with self._lock:
            if key not in self._held:
                return None
            self._held.move_to_end(key)
            return self._held[key][0]

    def put(self, key: tuple[int, str], file: Spool, nbytes: int) -> None:
        """Hold one more, and drop others where there is no room."""
        with self._lock:
            self._held[key] = file, nbytes
            self.nbytes += nbytes
            while self.nbytes > ROOM and len(self._held) > 1:
                self.nbytes -= self._held.popitem(last=False)[1][1]

    def forget(self, number: int) -> None:
        """Drop all of one file."""
        with self._lock:
            for key in [key for key in self._held if key[0] == number]:
                self.nbytes -= self._held.pop(key)[1]


fetched = Fetched()
_numbers = count()


class RemoteFile(File):
    """One safetensors file elsewhere. Whoever reads it sees what it was when it was opened, or ``ChangedError``."""

    def __init__(self, path: Remote) -> None:
        """Raises ``CheckpointError`` for what is no whole safetensors file, and ``OSError`` where it is not given."""
        self.path: Location = path
        self._remote, self._number = path, next(_numbers)
        if (state := path.state()) is None:
            raise FileNotFoundError(f"{path} is not there")
        self._state = state
        self._head = path.ranges([(0, min(HEAD, state[0]))])[0] if state[0] else b""
        self._digests: dict[str, str] = {}
        self._locks: dict[str, Lock] = {}
        finalize(self, fetched.forget, self._number).atexit = False
        self._describe()
        self._head = b""

    def trust(self) -> None:
        """What was fetched is as it was."""

    def unchanged(self) -> bool:
        """Always: what lies there may be written to, what is read of it here is not."""
        return True

    def replaced(self) -> bool:
        """Never, likewise."""
        return False

    def rows(self, name: str, start: int, end: int) -> Tensor:
        header = self.headers[name]
        shape = (end - start, *header.shape[1:]) if header.dim() else ()
        part = blocks.empty(shape, header.dtype)
        if part.numel():
            held, memory, done = self._fetch(name), raw(part), 0
            first = start * (part.nbytes // (end - start))
            while done < len(memory):
                if not (more := os.preadv(held.handle, [memory[done:]], first + done)):
                    raise ChangedError
                done += more
        return part

    def _start(self) -> bytes:
        return self._head[:2]

    def _fill(self, memory: memoryview, offset: int) -> None:
        end = offset + len(memory)
        if end > self._state[0]:
            raise ChangedError
        if end <= len(self._head):
            memory[:] = self._head[offset:end]
        else:
            memory[:] = b"".join(self._remote.ranges([(offset, end)]))

    def _fetch(self, name: str) -> Spool:
        """A file of one tensor's bytes. Raises ``ChangedError`` where these are others than the first time."""
        key = self._number, name
        with self._locks.setdefault(name, Lock()):
            if (held := fetched.get(key)) is not None:
                return held
            file, state = Spool(), blake2b(digest_size=16)
            try:
                for data in self._pieces(name):
                    file.write(data)
                    state.update(data)
            except FileNotFoundError:
                raise ChangedError from None
            if self._digests.setdefault(name, state.hexdigest()) != state.hexdigest():
                raise ChangedError
            fetched.put(key, file, self.headers[name].nbytes)
            return file

    def _pieces(self, name: str) -> Iterator[bytes]:
        first = self.offsets[name]
        last = first + self.headers[name].nbytes
        bounds = [(start, min(start + RANGE, last)) for start in range(first, last, RANGE)]
        for place in range(0, len(bounds), AT_ONCE):
            yield from self._remote.ranges(bounds[place : place + AT_ONCE])


def open_safetensors(path: Location, *, links: bool = True) -> File:
    """A safetensors file, wherever it is. links: whether a path may be a link. Raises as the classes do."""
    if not isinstance(path, Remote):
        return File(path, links=links)
    try:
        return RemoteFile(path)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist") from error
