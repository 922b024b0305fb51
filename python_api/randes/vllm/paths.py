"""What vLLM calls a store's fine-tunes: adapters at paths ``randes:NAME@VERSION``.

The version is of all that a model's answers depend on, its neighbours in the superposition included. vLLM separates its
prefix cache by names and paths, so that what was cached before a change is nobody's afterwards.
"""

import os
from functools import cache
from pathlib import Path
from typing import Any

from randes.errors import StoreError
from randes.superposition.store.manifest import MANIFEST, read_manifest, version_of

PREFIX = "randes:"


class Paths:
    """The paths of one store's fine-tunes, as its manifest says they are now."""

    def __init__(self, store: Path) -> None:
        self._store = store
        self._read: tuple[tuple[int, ...], dict[str, Any]] | None = None
        self._given: set[str] = set()

    @property
    def manifest(self) -> dict[str, Any]:
        """Read again where its file is another. Raises ``StoreError``."""
        try:
            found = os.stat(self._store / MANIFEST)
        except OSError as error:
            raise StoreError(f"{self._store} is not a store: {error}") from error
        state = found.st_ino, found.st_mtime_ns, found.st_size
        if self._read is None or self._read[0] != state:
            self._read = state, read_manifest(self._store)
        return self._read[1]

    def of(self, name: str) -> str:
        """The path of a fine-tune. Raises ``UnknownModelError``."""
        path = f"{PREFIX}{name}@{version_of(self.manifest, name)}"
        self._given.add(path)
        return path

    def current(self, path: str) -> str:
        """The path as it is now of one that somebody wrote, with a version or without.

        Raises ``UnknownModelError`` for another name and ``ValueError`` for what is no such path.
        """
        return self.of(self.name_in(path))

    def name_in(self, path: str) -> str:
        """Whose path it is. Raises ``ValueError`` where it is none."""
        if not path.startswith(PREFIX):
            raise ValueError(
                f"lora_path must be {PREFIX}NAME, a fine-tune of the store, got {path!r}; adapters of other kinds are"
                " superposed first (randes superpose-adapters, or randes add)"
            )
        rest = path.removeprefix(PREFIX)
        return rest if rest in self.manifest["models"] else rest.rpartition("@")[0] or rest

    def check(self, path: str) -> None:
        """Raise for a path that is not, and was not, that of a fine-tune of the store."""
        if path not in self._given and path != (now := self.current(path)):
            raise ValueError(f"lora_path must be {now}, as the store is now, got {path!r}")


@cache
def paths_of(store: str) -> Paths:
    """One for each store in a process."""
    return Paths(Path(store))


def path_of(store: str | os.PathLike[str], name: str) -> str:
    """The adapter's path of a fine-tune of a store, for ``LoRARequest(name, 1, path_of(store, name))``.

    Raises ``UnknownModelError`` and ``StoreError``.
    """
    return paths_of(os.fspath(store)).of(name)
