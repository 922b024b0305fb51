"""A failure at each call to the system in turn, of all that changes a store: afterwards it is the old one or the new
one, and what failed can be done again.

Counted are the calls about paths below one folder, and about handles that were opened there.
"""

import errno
import fcntl
import os
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from models import content, deep, finetune, stored

import randes
from randes.errors import RandesError

CALLS = (
    (os, "open write fsync close fstat preadv pread lstat stat mkdir replace unlink listdir scandir"),
    (fcntl, "flock"),
)
"""What randes calls, itself or through ``pathlib``."""
IN_SHARDS = ", in shards"
WRITING = {"write", "fsync", "mkdir"}


class KilledError(BaseException):
    """The process is gone: nothing after this touches the disk."""


class System:
    """The system, whose calls fail from the ``last``-th on, as ``how`` says."""

    def __init__(self, folder: Path, how: str, last: int) -> None:
        self.folder, self.how, self.last = str(folder), how, last
        self.calls, self.failed = 0, 0
        self._handles: set[int] = set()
        self._lock = threading.Lock()

    def ours(self, what: object) -> bool:
        if isinstance(what, int):
            return what in self._handles
        return isinstance(what, str | os.PathLike) and os.fspath(what).startswith(self.folder)

    def call(self, function: Callable[..., Any], name: str, *arguments: Any, **options: Any) -> Any:
        if not arguments or not self.ours(arguments[0]):
            return function(*arguments, **options)
        if name == "close":  # which nobody waits for
            self._handles.discard(arguments[0])
            return function(*arguments, **options)
        with self._lock:
            self.calls += 1
            place = self.calls
        fails = place == self.last or (place > self.last and self.how in ("killed", "full"))
        if fails and self.how == "full" and name not in WRITING:
            fails = False
        if fails:
            self.failed += 1
            self._fail(function, name, arguments, options)
        if self.how == "short" and name == "write" and len(arguments[1]) > 1:
            self.failed += 1
            return function(arguments[0], arguments[1][: len(arguments[1]) // 2])
        found = function(*arguments, **options)
        if name == "open":
            self._handles.add(found)
        return found

    def _fail(self, function: Callable[..., Any], name: str, arguments: Any, options: Any) -> None:
        if self.how == "late":  # what was done, and is said to have failed
            found = function(*arguments, **options)
            if name == "open":
                os.close(found)
        if self.how == "killed":
            if name == "write":
                function(arguments[0], arguments[1][: len(arguments[1]) // 2])
            raise KilledError
        if self.how == "interrupt":
            raise KeyboardInterrupt
        number = errno.ENOSPC if self.how == "full" else errno.EIO
        raise OSError(number, os.strerror(number), str(arguments[0]))


HOW = ("error", "late", "full", "killed", "interrupt", "short")


@contextmanager
def failing(folder: Path, how: str, last: int) -> Iterator[System]:
    """Calls about ``folder`` fail from the ``last``-th on."""
    system, before = System(folder, how, last), []
    for owner, names in CALLS:
        for name in names.split():
            function = getattr(owner, name)
            before.append((owner, name, function))

            def call(*arguments: Any, _own: Any = function, _name: str = name, **options: Any) -> Any:
                return system.call(_own, _name, *arguments, **options)

            setattr(owner, name, call)
    try:
        yield system
    finally:
        for owner, name, function in before:
            setattr(owner, name, function)


class Work:
    """A store, a change of it, and what it is before and after."""

    def __init__(self, folder: Path, verb: str) -> None:
        self.folder, self.verb = folder / "store", verb.removesuffix(IN_SHARDS)
        self.shard_size = 3000 if verb.endswith(IN_SHARDS) else 0
        verb = self.verb
        base = self.base = deep(2)
        self.tuned = {f"m{number}": finetune(base, number) for number in range(3)}
        old = randes.compress(base, {name: self.tuned[name] for name in ("m0", "m1")}, randes.Config())
        old.shard_size = self.shard_size
        self.old = {} if verb in ("compress", "pack") else stored(old, folder / "old")
        self.master = folder / "master"
        old.save(self.master)
        self.new = stored(self.changed(old), folder / "new")
        assert len(self.new) > (12 if self.shard_size else 4)

    def changed(self, sup: randes.Superposition) -> randes.Superposition:
        """The superposition after the change."""
        if self.verb == "add":
            sup.add("m2", self.tuned["m2"])
        elif self.verb == "remove":
            sup.remove("m0", self.tuned["m0"])
        elif self.verb == "pack":
            return sup.pack(4)
        return sup

    def begin(self) -> None:
        """Put the old store there."""
        shutil.rmtree(self.folder.parent / "store", ignore_errors=True)
        if self.old:
            self.folder.mkdir()
            for name, data in self.old.items():
                (self.folder / name).write_bytes(data)

    def made(self) -> randes.Superposition:
        """What is saved at the end, from nothing but what is on the disk."""
        if self.verb == "compress":
            return randes.compress(self.base, {name: self.tuned[name] for name in ("m0", "m1")}, randes.Config())
        source = self.master if self.verb == "pack" else self.folder
        sup = randes.Superposition.load(source)
        done = "m2" in sup.names if self.verb == "add" else "m0" not in sup.names
        return sup if done and self.verb in ("add", "remove") else self.changed(sup)

    def check(self) -> bool:
        """Whether the store is the new one; it must be that or the old one, whole."""
        found = content(self.folder) if self.folder.exists() else {}
        if "manifest.json" not in found:
            assert not self.old, "the store is gone"
            return False
        new = found["manifest.json"] == self.new["manifest.json"]
        expected = self.new if new else self.old
        assert expected.items() <= found.items(), "torn"
        assert randes.Superposition.load(self.folder).names
        return new


VERBS = ("add", "remove", "compress", "pack", f"add{IN_SHARDS}", f"compress{IN_SHARDS}")


def inject(work: Work, how: str, last: int) -> bool:
    """One failure. Raises ``AssertionError`` where the store is torn or the change cannot be done again; whether there
    was a call that far."""
    work.begin()
    sup = None
    with failing(work.folder, how, last) as system:
        try:
            sup = work.made()
            sup.save(work.folder, shard_size=work.shard_size)
            said = False
        except (OSError, RandesError, KeyboardInterrupt, KilledError):
            said = True
    if not system.failed:
        assert not said
        return False
    new = work.check()
    assert new or said, "a save that said nothing did not save"
    if how == "killed" or sup is None:
        sup = work.made()
    sup.save(work.folder, shard_size=work.shard_size)
    assert content(work.folder) == work.new, "done again, it is another store"
    return True


def injected(folder: Path, every: int = 1, first: int = 1) -> tuple[Counter[str], list[str]]:
    """A failure of each kind at each ``every``-th call of each verb: how many there were, and what must not be."""
    done: Counter[str] = Counter()
    wrong = []
    for verb in VERBS:
        work = Work(folder / verb, verb)
        for how in HOW:
            last = first
            while True:
                try:
                    if not inject(work, how, last):
                        break
                except Exception as error:
                    wrong.append(f"{verb}, {how} at call {last}: {type(error).__name__}: {error}")
                done[f"{verb}: {how}"] += 1
                last += every
                if how == "short":
                    break  # all writes of it are short
    return done, wrong
