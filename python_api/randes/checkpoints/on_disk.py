"""Tensors that lie in files until somebody asks for them, and what was changed of them since, in memory."""

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping

from torch import Tensor

from randes.checkpoints.lazy_tensors import LazyTensors, chunks, digests, headers, rows
from randes.checkpoints.remote.locations import Location
from randes.checkpoints.remote.tensors import open_safetensors
from randes.checkpoints.safetensors import ChangedError, File
from randes.errors import CheckpointError
from randes_kernels import Packed


class StoredTensors(LazyTensors):
    """Tensors of open safetensors files, each read when somebody asks for it.

    where: of each name, the file and the tensor's name in it.
    known: digests to be held to: nobody gets a tensor that was not found right. ``check`` looks at many at once, which
        is faster; what it did not see is looked at when somebody first asks for it.
    altered: makes the error to raise where a tensor is not what ``known`` says, of file and tensor's name.
    """

    def __init__(
        self, where: Mapping[str, tuple[File, str]], known: Mapping[str, str] | None = None,
        altered: Callable[[Location, str], Exception] | None = None,
    ) -> None:  # fmt: skip
        super().__init__({name: file.headers[own] for name, (file, own) in where.items()})
        self.where = dict(where)
        self.known = known
        self._altered = altered or (lambda path, name: CheckpointError(f"{name} in {path} was changed"))
        self._right: set[str] = set()

    @property
    def files(self) -> list[File]:
        return list({id(file): file for file, _ in self.where.values()}.values())

    def chunks(self, name: str) -> Iterator[Tensor]:
        self._check_first_use(name)
        file, own = self.where[name]
        try:
            yield from file.chunks(own)
        except ChangedError:
            raise self._altered(file.path, name) from None

    def rows(self, name: str, start: int, end: int) -> Tensor:
        self._check_first_use(name)
        file, own = self.where[name]
        try:
            return file.rows(own, start, end)
        except ChangedError:
            raise self._altered(file.path, name) from None

    def renamed(self, names: Mapping[str, str]) -> "StoredTensors":
        """Some of the tensors under other names: of each new name the one here."""
        known = None if self.known is None else {new: self.known[old] for new, old in names.items()}
        some = StoredTensors({new: self.where[old] for new, old in names.items()}, known, self._altered)
        some._right = {new for new, old in names.items() if old in self._right}
        return some

    def expect(self, known: Mapping[str, str], altered: Callable[[Location, str], Exception]) -> None:
        """Hold the tensors to these digests, which were just found of them."""
        self.known, self._altered, self._right = known, altered, set(self.where)

    def held_to(self, known: Mapping[str, str], altered: Callable[[Location, str], Exception]) -> "StoredTensors":
        """The same, to be held to these digests."""
        return StoredTensors(self.where, known, altered)

    def check(self, step: Callable[[int], None] = lambda _: None) -> None:
        """Raise ``altered``'s error unless every tensor has its digest. What was found right, in a file that nobody
        wrote to or put another in the place of since, is not read again."""
        if self.known is None:
            return
        for file in self.files:
            if file.replaced():
                self._reopen(file)
        names = self.unchecked()
        self._right -= set(names)  # also of those that are not reached below
        for file in self.files:
            if not file.unchanged():
                file.trust()
        self._compare(names, step)

    def unchecked(self) -> list[str]:
        """The tensors that ``check`` would read."""
        changed = [file for file in self.files if not file.unchanged()]
        return [name for name, (file, _) in self.where.items() if file in changed or name not in self._right]

    def _check_first_use(self, name: str) -> None:
        if self.known is not None and name not in self._right:
            self._compare([name])

    def _compare(self, names: Iterable[str], step: Callable[[int], None] = lambda _: None) -> None:
        """Raise ``altered``'s error for the first tensor that has not its digest; the others were found right."""
        assert self.known is not None
        where = {name: self.where[name] for name in names}
        for name, found in digests(StoredTensors(where, altered=self._altered), step=step).items():
            if found != self.known[name]:
                raise self._altered(where[name][0].path, name)
            self._right.add(name)

    def _reopen(self, file: File) -> None:
        mine = {name: own for name, (its, own) in self.where.items() if its is file}
        try:
            other = open_safetensors(file.path)
        except (CheckpointError, OSError):
            raise self._altered(file.path, next(iter(mine))) from None
        for name, own in mine.items():
            header, new = self.headers[name], other.headers.get(own)
            if new is None or (new.shape, new.dtype) != (header.shape, header.dtype):
                raise self._altered(file.path, name)
            self.where[name] = other, own
            self._right.discard(name)


def open_file(path: Location, *, links: bool = True) -> StoredTensors:
    """The tensors of one safetensors file. Raises ``CheckpointError`` for anything else, and for a link without
    ``links``; ``OSError`` where nothing is."""
    file = open_safetensors(path, links=links)
    return StoredTensors({name: (file, name) for name in file.headers})


class Overlay(LazyTensors, MutableMapping[str, Tensor]):
    """What is held in memory, over what lies in files. What is set is held; files are never changed."""

    below: list[LazyTensors]

    def __init__(self, held: dict[str, Tensor], *below: LazyTensors) -> None:
        super().__init__({})
        self.held, self.below = held, list(below)

    @property
    def headers(self) -> Mapping[str, Tensor]:
        return {name: value for layer in (*self.below, self.held) for name, value in headers(layer).items()}

    def chunks(self, name: str) -> Iterator[Tensor]:
        return chunks(self._layer(name), name)

    def rows(self, name: str, start: int, end: int) -> Tensor:
        return rows(self._layer(name), name, start, end)

    def __getitem__(self, name: str) -> Tensor:
        return self._layer(name)[name]

    def __contains__(self, name: object) -> bool:
        return any(name in layer for layer in (self.held, *self.below))

    def __setitem__(self, name: str, value: Tensor) -> None:
        self.held[name] = value

    def __delitem__(self, name: str) -> None:
        self._layer(name)
        self.held.pop(name, None)
        self.below = [layer.renamed({own: own for own in layer if own != name}) for layer in self.below]

    def _layer(self, name: str) -> Mapping[str, Tensor]:
        for layer in (self.held, *self.below):
            if name in layer:
                return layer
        raise KeyError(name)


def own(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """A tensor that nobody else has: read anew, or a copy."""
    if isinstance(tensors, Overlay):
        return own(tensors._layer(name), name)
    return tensors.read(name) if isinstance(tensors, LazyTensors) else tensors[name].clone()


def check(
    tensors: Mapping[str, Tensor] | Mapping[str, Tensor | Packed], step: Callable[[int], None] = lambda _: None
) -> None:
    """Raise where what lies in files is not what it was, by its digests. What is in memory is the caller's."""
    for stored in _stored(tensors):
        stored.check(step)


def unchecked(tensors: Mapping[str, Tensor] | Mapping[str, Tensor | Packed]) -> int:
    """Bytes of files that ``check`` would read."""
    stored = [stored for stored in _stored(tensors) if stored.known is not None]
    return sum(layer.headers[name].nbytes for layer in stored for name in layer.unchecked())


def in_files(tensors: Mapping[str, Tensor]) -> bool:
    """Whether tensors lie in files, as they are or split: ``check`` finds all that changes then."""
    return isinstance(tensors, StoredTensors) or any(map(in_files, getattr(tensors, "below", ())))


def _stored(tensors: Mapping[str, Tensor] | Mapping[str, Tensor | Packed]) -> Iterator[StoredTensors]:
    if isinstance(tensors, StoredTensors):
        yield tensors
    for layer in getattr(tensors, "below", ()):
        yield from _stored(layer)


def known_digests(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The digest of each tensor; of what lies in files those that it was just found to have."""
    check(tensors)
    if isinstance(tensors, Overlay):
        found = {name: value for layer in tensors.below for name, value in known_digests(layer).items()}
        return found | digests(tensors.held)
    if isinstance(tensors, StoredTensors) and tensors.known is not None:
        return {name: tensors.known[name] for name in tensors}
    return digests(tensors)
