"""How tensors of models that join are read: a thread each to read, to hash and to compute, one ahead of the next."""

from collections.abc import Callable, Iterator
from itertools import islice
from threading import Semaphore
from typing import NamedTuple, TypeAlias

from torch import Tensor

from randes.checkpoints.lazy_tensors import Digest, chunk_bounds, chunks, headers
from randes.checkpoints.lora import AdapterTensors
from randes.checkpoints.tensor_views import source_of
from randes.checkpoints.threads import ahead, one_thread
from randes.superposition.members import NewModel
from randes.superposition.state import State

Pairs: TypeAlias = list[tuple[Tensor, Tensor]]
"""One tensor of a model and of the base, part by part."""


class Chunk(NamedTuple):
    """A run of rows of one model's tensor and of the base's, and the digest of the model's so far."""

    tuned: Tensor
    base: Tensor
    digest: str


class Prefetch:
    """Tensor after tensor: the base's, held for all models, and then each model's by parts, read and hashed ahead.

    As many parts are in memory as two of the largest tensors have: while one is superposed, the next is read.

    computing: the thread for arithmetic, which takes turns on the processors with one that reads and one that hashes.
    """

    def __init__(self, sup: State, models: list[NewModel], step: Callable[[int], None]) -> None:
        self._sup, self._models, self._step = sup, models, step
        self.computing = one_thread()
        sources = [headers(tensors) for tensors in (sup.base, *(model.tensors for model in models))]
        largest = max((len(chunk_bounds(header)) for source in sources for header in source.values()), default=0)
        self._room = Semaphore(2 * largest)
        self._readers = {name: [model for model in models if _differs(sup, model, name)] for name in headers(sup.base)}
        self._values = ahead(self._hashed(), self._room)
        self._taken = 0  # of the parts of the tensor at hand

    def __enter__(self) -> "Prefetch":
        return self

    def __exit__(self, *_: object) -> None:
        self._values.close()
        self.computing.shutdown(cancel_futures=True)

    def __iter__(self) -> Iterator[str]:
        for tensor in headers(self._sup.base):
            self._tensor = tensor
            yield tensor

    def models(self) -> Iterator[tuple[NewModel, Iterator[Chunk]]]:
        """The models that have to be read, each with its parts."""
        readers = self._readers[self._tensor]
        bases = [next(self._values) for _ in chunk_bounds(headers(self._sup.base)[self._tensor])] if readers else []
        for model in self._models:
            if model in readers:
                yield model, self._parts(model)
                self._make_room(self._taken)
            else:
                model.digests[self._tensor] = self._sup.base_digests[self._tensor]
        self._taken = len(bases)
        bases.clear()  # before there is room for as many
        self._make_room(self._taken)

    def spent(self, pairs: Pairs) -> Iterator[tuple[Tensor, Tensor]]:
        """The same pairs, each of which makes room for another part when it was used."""
        while pairs:
            yield pairs.pop(0)
            self._make_room(1)

    def _parts(self, model: NewModel) -> Iterator[Chunk]:
        for _ in chunk_bounds(headers(model.tensors)[self._tensor]):
            self._taken += 1
            yield next(self._values)

    def _make_room(self, count: int) -> None:
        self._taken -= count
        for _ in range(count):
            self._room.release()

    def _hashed(self) -> Iterator[Chunk]:
        """The parts of each tensor that is read, the base's first."""
        bases: list[Tensor] = []
        with ahead(self._read()) as read:
            for tensor in headers(self._sup.base):
                readers = self._readers[tensor]
                bases.clear()  # before the next ones come
                for part in islice(read, len(chunk_bounds(headers(self._sup.base)[tensor])) if readers else 0):
                    bases.append(part)
                    yield Chunk(part, part, "")
                for model in readers:
                    header = headers(model.tensors)[tensor]
                    digest, count = Digest(header), len(chunk_bounds(header))
                    # A tensor of another shape than the base's is kept, and nobody compares the two.
                    for base in bases if is_superposed(self._sup, model, tensor) else bases[:1] * count:
                        part = next(read)
                        digest.update(part)
                        yield Chunk(part, base, digest.hexdigest())
                        self._step(part.nbytes)

    def _read(self) -> Iterator[Tensor]:
        for tensor in headers(self._sup.base):
            if readers := self._readers[tensor]:
                for tensors in (self._sup.base, *(model.tensors for model in readers)):
                    yield from chunks(tensors, tensor)


def is_superposed(sup: State, model: NewModel, tensor: str) -> bool:
    """Whether a model's delta of a tensor is superposed: one that it has in another shape than the base is kept."""
    return tensor in sup.superposed and headers(model.tensors)[tensor].shape == headers(sup.base)[tensor].shape


def _differs(sup: State, model: NewModel, tensor: str) -> bool:
    """Whether a model's tensor may be another than the base's, and has to be read."""
    adapter, name = source_of(model.tensors, tensor)
    base, _ = source_of(sup.base, tensor)
    return not (isinstance(adapter, AdapterTensors) and adapter.base is base and name not in adapter.touched)
