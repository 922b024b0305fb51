"""Where files are: a path here, or an address elsewhere that has what is used of ``pathlib.Path``."""

import errno
import importlib
import os
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from fnmatch import fnmatchcase
from functools import total_ordering
from hashlib import blake2b
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from randes.errors import CheckpointError

URL = re.compile(r"(?P<protocol>[a-z][a-z0-9+.-]*)://(?P<path>.*)", re.DOTALL)
COLLAPSED = re.compile(r"(s3|s3a|gs|gcs|hf|az|abfs|abfss|memory|http|https|file):/(?!/).*", re.DOTALL)
"""What ``pathlib.Path`` makes of an address."""
LOCAL = ("file", "local")
"""Protocols of paths here."""
LIBRARIES = {
    "s3": "'randes[remote]'",
    "s3a": "'randes[remote]'",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "hf": "huggingface_hub",
}
"""What reads an address, by its protocol, as pip calls it."""

WAITING = 16
"""Threads that ask a server at once."""
A = TypeVar("A")
B = TypeVar("B")


@total_ordering
class Remote(os.PathLike[str]):
    """An address that fsspec reads. What goes wrong there is an ``OSError`` that names it, and a ``FileNotFoundError``
    where nothing is."""

    def __init__(self, system: Any, path: str, protocol: str) -> None:
        """system: of fsspec. path: as that has it."""
        self._system, self._path, self._protocol = system, path.rstrip("/"), protocol

    @classmethod
    def of(cls, url: str) -> "Remote":
        """Raises ``CheckpointError`` where nothing reads such addresses, or a library for it is not installed."""
        found = URL.fullmatch(url)
        assert found is not None
        protocol = found["protocol"]
        try:
            core: Any = importlib.import_module("fsspec.core")
            # A listing that is remembered would not show what another process has written.
            system, path = core.url_to_fs(url, use_listings_cache=False)
        except ImportError as error:
            how = f"pip install {LIBRARIES[protocol]}" if protocol in LIBRARIES else "install it"
            raise CheckpointError(f"{url} needs a library that reads such addresses: {how} ({error})") from error
        except Exception as error:  # whatever a library has against an address
            raise CheckpointError(f"{url} is no address that fsspec reads: {error}") from error
        return cls(system, str(path), protocol)

    def __fspath__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        return f"{self._protocol}://{self._path.lstrip('/')}"

    def __repr__(self) -> str:
        return f"Remote({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Remote) and str(self) == str(other)

    def __lt__(self, other: "Remote") -> bool:
        return str(self) < str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    def __truediv__(self, name: str) -> "Remote":
        return Remote(self._system, f"{self._path}/{name}", self._protocol)

    @property
    def name(self) -> str:
        """What stands after the last slash."""
        return self._path.rpartition("/")[2]

    @property
    def suffix(self) -> str:
        """The name's last dot and what follows it."""
        return os.path.splitext(self.name)[1]

    @property
    def parent(self) -> "Remote":
        """What it lies in."""
        return Remote(self._system, self._path.rpartition("/")[0], self._protocol)

    def resolve(self) -> "Remote":
        """Itself."""
        return self

    def exists(self) -> bool:
        """Whether anything is there, or lies below it."""
        return self.info() is not None

    def is_file(self) -> bool:
        """Whether a file is there."""
        return (found := self.info()) is not None and found["type"] == "file"

    def is_dir(self) -> bool:
        """Whether files lie below it."""
        return (found := self.info()) is not None and found["type"] == "directory"

    def info(self) -> dict[str, Any] | None:
        """What its server says of it; None where nothing is."""
        try:
            with self._said("looked at"):
                self._system.invalidate_cache(self._path)
                found: dict[str, Any] = self._system.info(self._path)
                return found
        except FileNotFoundError:
            return None

    def state(self) -> tuple[int, int] | None:
        """Its size, and a number that changes when it does; None where no file is."""
        if (found := self.info()) is None or found["type"] != "file":
            return None
        known = {key: str(value) for key, value in found.items() if key not in ("atime", "islink")}
        digest = blake2b(repr(sorted(known.items())).encode(), digest_size=7).digest()
        return int(found["size"]), int.from_bytes(digest, "little")

    def iterdir(self) -> Iterator["Remote"]:
        """What lies in it."""
        with self._said("listed"):
            self._system.invalidate_cache(self._path)
            found = self._system.ls(self._path, detail=False)
        inside = {str(path).strip("/") for path in found} - {self._path.strip("/")}  # a folder may list itself
        yield from (self / path.rpartition("/")[2] for path in sorted(inside))

    def glob(self, pattern: str) -> Iterator["Remote"]:
        """What in it has such a name."""
        return (one for one in self.iterdir() if fnmatchcase(one.name, pattern)) if self.exists() else iter(())

    def ranges(self, bounds: list[tuple[int, int]]) -> list[bytes]:
        """The bytes from each first number to each second, asked for together."""
        with self._said("read"):
            starts, ends = [start for start, _ in bounds], [end for _, end in bounds]
            paths = [self._path] * len(bounds)
            found = self._system.cat_ranges(paths, starts, ends, on_error="raise")
        for (start, end), data in zip(bounds, found, strict=True):
            if len(data) != end - start:
                raise OSError(f"{self} could not be read: it gave {len(data)} bytes from {start} to {end}")
        return [bytes(data) for data in found]

    def read_bytes(self) -> bytes:
        """All of a file."""
        if (state := self.state()) is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self))
        return self.ranges([(0, state[0])])[0] if state[0] else b""

    def put(self, file: str) -> None:
        """Write the file of this path here to the address, all of it or nothing."""
        with self._said("written"):
            self._system.put_file(file, self._path)
            self._system.invalidate_cache(self._path)

    def unlink(self, missing_ok: bool = False) -> None:
        """Remove the file."""
        try:
            with self._said("removed"):
                self._system.rm_file(self._path)
        except FileNotFoundError:
            if not missing_ok:
                raise

    @contextmanager
    def _said(self, what: str) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, NotADirectoryError) as error:
            raise FileNotFoundError(f"{self} could not be {what}: {error.strerror or error}") from error
        except OSError as error:
            raise OSError(f"{self} could not be {what}: {error.strerror or error}") from error
        except Exception as error:  # of the library that reads such addresses
            said = str(error).strip().splitlines() or [""]
            raise OSError(f"{self} could not be {what}: {type(error).__name__}: {said[0]}") from error


Location: TypeAlias = Path | Remote
"""A path here, or an address elsewhere."""


def location(where: str | os.PathLike[str]) -> Location:
    """Where a path or an address leads. Raises ``CheckpointError`` for an address that nothing here reads."""
    if isinstance(where, Remote):
        return where
    text = os.fspath(where)
    if isinstance(where, Path) and COLLAPSED.fullmatch(text) and not where.exists():
        raise CheckpointError(f"an address must be given as a text, got a Path, which leaves out slashes: {text}")
    if (found := URL.fullmatch(text)) is None:
        return Path(where)
    return Path(found["path"]) if found["protocol"] in LOCAL else Remote.of(text)


def each(where: Location, function: Callable[[A], B], values: Iterable[A]) -> list[B]:
    """``function`` of each value, one after the other; of many at once where it waits for a server."""
    if not isinstance(where, Remote):
        return list(map(function, values))
    with ThreadPoolExecutor(WAITING) as threads:
        try:
            return list(threads.map(function, values))
        except BaseException:
            threads.shutdown(wait=False, cancel_futures=True)
            raise


def is_remote(where: object) -> bool:
    """Whether a path, as a user gives it, is an address elsewhere."""
    if isinstance(where, Remote):
        return True
    found = URL.fullmatch(where) if isinstance(where, str) else None
    return found is not None and found["protocol"] not in LOCAL
