"""Which fine-tunes vLLM's adapters are, as they come and go while others are answered."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from randes.errors import BaseMismatchError, CapacityError, StoreError
from randes.serving.batch import Version
from randes.superposition.members import BASE_NAME
from randes.superposition.store.manifest import read_manifest, record_of, version_of
from randes.superposition.superposition import Superposition
from randes.vllm.paths import PREFIX, paths_of
from randes.vllm.served import Served

logger = logging.getLogger("vllm.randes")
BASE = 0
"""vLLM's number for no adapter."""


class Adapters:
    """The adapters of one worker, by the numbers that vLLM gives them.

    An adapter is one version of a fine-tune, and keeps it: requests under way finish with what they began with. Where
    room is short, those that the last step did not use become the versions that took their place.
    """

    def __init__(self, served: Served, store: str) -> None:
        self.served, self.store = served, store
        self.held: dict[int, Version] = {}
        self.warming: set[int] = set()  # numbers that vLLM makes up while it warms up
        self._active: set[int] = set()
        self._lost: set[int] = set()
        self._versions = self._paths(read_manifest(Path(store)))
        self._base = served.models.router.versions.get(BASE_NAME)  # a model like others where deltas are centred

    def add(self, number: int, path: str) -> None:
        """Have a number stand for the fine-tune at a path, which the store may have got since.

        Raises ``UnknownModelError``, ``ValueError`` for a path that is not as the store is now, ``CapacityError``
        where there is no room, and what is wrong with the store. Nothing is changed then.
        """
        if path not in self._versions.values():
            if path != (now := paths_of(self.store).current(path)):
                raise ValueError(f"lora_path must be {now}, as the store is now, got {path!r}")
            self._read_again()
        name = next(name for name, own in self._versions.items() if own == path)
        self.held[number] = self.served.models.router.versions[name]
        self._lost.discard(number)

    def remove(self, number: int) -> bool:
        """Whether it was there."""
        return self.held.pop(number, None) is not None

    def activate(self, requests: Iterable[tuple[int, str]], tokens: Sequence[int], rows: Sequence[int]) -> list[int]:
        """Give the step's tokens, and the rows that logits are computed for, their models.

        Never raises: what cannot be served is logged, and its rows are returned, to be given no answer.
        """
        for number, path in requests:
            if number not in self.held and number not in self.warming | self._lost:
                try:
                    self.add(number, path)
                except Exception as error:  # whatever it is, other requests go on
                    self._lost.add(number)
                    logger.error("adapter %s at %s cannot be served, and is not answered: %s", number, path, error)
        self._active = {*map(int, rows)}
        self.served.of_step(self._numbers(tokens), self._numbers(rows))
        return [place for place, number in enumerate(rows) if not self._known(int(number))]

    def _known(self, number: int) -> bool:
        return number == BASE or number in self.held or number in self.warming

    def _numbers(self, adapters: Sequence[int]) -> list[int]:
        asked = np.asarray(adapters, dtype=np.int64)
        found = np.full(len(asked), -1 if self._base is None else self._base.number, dtype=np.int32)
        for number in np.unique(asked).tolist():
            if number in self.held:
                found[asked == number] = self.held[number].number
        numbers: list[int] = found.tolist()
        return numbers

    def _read_again(self) -> None:
        """Serve the store as it is now, beside what adapters still hold of it as it was."""
        models = self.served.models
        if models.capacity is None:
            raise CapacityError(
                "the store has changed, and the server was started with room for the fine-tunes that there were:"
                " start it with more, randes serve STORE --room 4"
            )
        manifest = read_manifest(Path(self.store))
        new, old = Superposition.load(self.store, check=False), models.superposition
        if read_manifest(Path(self.store))["checksum"] != manifest["checksum"]:
            raise StoreError(f"{self.store} is being written to; try again")
        if new.base_digests != old.base_digests or new.config != old.config or new.superposed != old.superposed:
            raise BaseMismatchError(f"{self.store} has another base than the server was started with: start it again")
        models.check_capacity(len(new.names) - len(models.names))
        self.served.check_new(new)
        for name, member in old.members.items():  # who is the same stays, and is known by its identity
            if name in new.members and record_of(member) == record_of(new.members[name]):
                new.members[name] = member
        models.superposition = new
        try:
            try:
                models.serve(self.served, new.served)
            except CapacityError:
                self._let_go()
                models.serve(self.served, new.served)
        except BaseException:
            models.superposition = old
            raise
        self._versions = self._paths(manifest)

    def _let_go(self) -> None:
        versions = self.served.models.router.versions
        idle = {number: held.name for number, held in self.held.items() if number not in self._active}
        self.held.update({number: versions[name] for number, name in idle.items() if name in versions})

    @staticmethod
    def _paths(manifest: Mapping[str, Any]) -> dict[str, str]:
        return {name: f"{PREFIX}{name}@{version_of(manifest, name)}" for name in manifest["models"]}
