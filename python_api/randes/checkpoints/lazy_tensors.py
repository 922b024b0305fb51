"""Tensors that are read or made a part at a time, so that models larger than memory pass through it.

A tensor's part is a run of its first dimension, ``CHUNK_ELEMENTS`` or so: the same runs for every tensor of one shape,
whatever its dtype. Threads read, and hash, the next parts while one is computed with.
"""

import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from hashlib import blake2b
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, mmap
from typing import Generic, TypeAlias, TypeVar
from weakref import WeakValueDictionary, finalize

import numpy as np
import torch
from torch import Tensor

from randes_kernels import Packed
from randes_kernels.slices import spans

CHUNK_ELEMENTS = 1 << 19
"""1 MiB in bf16. Half as long, threads wait for each other more often: a seventh more time; a dozen are in memory."""
KEPT = 4
"""Free blocks of memory that are kept for parts to come."""
SMALLEST = 1 << 17
"""Bytes of a block: smaller tensors are the allocator's."""
HASHING = min(8, os.cpu_count() or 1)
"""Threads that read and hash whole files: BLAKE2b takes 1.3 ns a byte, more than a disk does."""
SMALL = 1 << 20
"""Bytes that are hashed before threads would have begun."""

Progress: TypeAlias = Callable[[str, int], Callable[[int], None]]
"""Told of each stage of long work and its bytes; answers with what is called with the bytes done since."""
V = TypeVar("V")


def silent(stage: str, nbytes: int) -> Callable[[int], None]:
    """A ``Progress`` that tells nobody."""
    return lambda _: None


class Described(Mapping[str, V], Generic[V]):
    """Values by name that are known by their ``headers`` before anybody asks for one."""

    @property
    def headers(self) -> Mapping[str, V]:
        """Shape and dtype of each, as tensors without data."""
        raise NotImplementedError

    def __iter__(self) -> Iterator[str]:
        return iter(self.headers)

    def __len__(self) -> int:
        return len(self.headers)

    def __contains__(self, name: object) -> bool:
        return name in self.headers

    def __reduce__(self) -> tuple[type, tuple[dict[str, V]]]:
        return dict, (dict(self),)  # a copy is of the values: open files are nobody else's


class LazyTensors(Described[Tensor]):
    """Tensors by name that are not in memory: whoever asks for one gets it read, or made, then.

    While somebody holds a tensor, asking again gives the same one.
    """

    below: Sequence["LazyTensors"] = ()
    """Those that these are read from, where files may lie under them."""

    def __init__(self, headers: Mapping[str, Tensor]) -> None:
        self._headers = headers
        self._held: WeakValueDictionary[str, Tensor] = WeakValueDictionary()

    @property
    def headers(self) -> Mapping[str, Tensor]:
        """Shape and dtype of each, as tensors without data."""
        return self._headers

    def chunks(self, name: str) -> Iterator[Tensor]:
        """One tensor, a run of its first dimension after the other."""
        raise NotImplementedError

    def rows(self, name: str, start: int, end: int) -> Tensor:
        """A run of one tensor's first dimension."""
        return self[name][start:end]

    def renamed(self, names: Mapping[str, str]) -> "LazyTensors":
        """Some of the tensors under other names: of each new name the one here."""
        raise NotImplementedError

    def read(self, name: str) -> Tensor:
        """One tensor, the caller's own."""
        header = self.headers[name]
        whole = torch.empty(header.shape, dtype=header.dtype, device="cpu")
        for (start, end), part in zip(chunk_bounds(header), self.chunks(name), strict=True):
            (whole[start:end] if whole.dim() else whole).copy_(part)
        return whole

    def __getitem__(self, name: str) -> Tensor:
        if (held := self._held.get(name)) is None:
            held = self._held[name] = self.read(name)
        return held


def headers(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Shapes and dtypes by name: the tensors themselves, or stand-ins without data for those that would be read."""
    return tensors.headers if isinstance(tensors, LazyTensors) else tensors


def described(tensors: Mapping[str, Tensor] | Mapping[str, Tensor | Packed]) -> Mapping[str, Tensor | Packed]:
    """The same of tensors that may be packed."""
    held: Mapping[str, Tensor | Packed] = getattr(tensors, "headers", tensors)
    return held


def size(tensors: Mapping[str, Tensor] | Mapping[str, Tensor | Packed]) -> int:
    """Bytes of all the tensors together."""
    return sum(value.nbytes for value in described(tensors).values())


def chunk_bounds(header: Tensor) -> list[tuple[int, int]]:
    """The runs of the first dimension that a tensor comes in; one for a scalar."""
    if header.dim() == 0 or header.numel() == 0:
        return [(0, len(header) if header.dim() else 1)]
    return spans(len(header), header.numel() // len(header), CHUNK_ELEMENTS)


def chunks(tensors: Mapping[str, Tensor], name: str) -> Iterator[Tensor]:
    """One tensor, a run of its first dimension after the other; views of it where it is in memory."""
    if isinstance(tensors, LazyTensors):
        yield from tensors.chunks(name)
        return
    value = tensors[name]
    for start, end in chunk_bounds(value):
        yield value[start:end] if value.dim() else value


def rows(tensors: Mapping[str, Tensor], name: str, start: int, end: int) -> Tensor:
    """A run of one tensor's first dimension; a view of it where it is in memory."""
    return tensors.rows(name, start, end) if isinstance(tensors, LazyTensors) else tensors[name][start:end]


class Some(LazyTensors):
    """Some of many tensors, lazy ones or not."""

    def __init__(self, whole: Mapping[str, Tensor], names: Iterable[str]) -> None:
        super().__init__({name: headers(whole)[name] for name in names})
        self._whole = whole
        self.below = [whole] if isinstance(whole, LazyTensors) else []

    def chunks(self, name: str) -> Iterator[Tensor]:
        return chunks(self._whole, name)

    def rows(self, name: str, start: int, end: int) -> Tensor:
        return rows(self._whole, name, start, end)


class Blocks:
    """Memory for parts that are read, used again once nobody holds a part's tensor.

    From the allocator, much of it would stay with the thread that reads, because others free it; fresh from the system,
    each page would be faulted in again.
    """

    def __init__(self) -> None:
        self._free: deque[mmap] = deque(maxlen=KEPT)  # what is full drops the oldest

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor of any values."""
        nbytes = math.prod(shape) * dtype.itemsize
        if nbytes < SMALLEST:
            return torch.empty(shape, dtype=dtype, device="cpu")
        memory = np.frombuffer(block := self._block(nbytes), np.uint8, nbytes)
        finalize(memory, self._free.append, block).atexit = False
        return torch.from_numpy(memory).view(dtype).view(shape)

    def _block(self, nbytes: int) -> mmap:
        for block in reversed(tuple(self._free)):
            if nbytes <= len(block) <= 2 * nbytes:
                with suppress(ValueError):  # another thread was first
                    self._free.remove(block)
                    return block
        return mmap(-1, nbytes, MAP_PRIVATE | MAP_ANONYMOUS)


blocks = Blocks()


class Digest:
    """BLAKE2b over a tensor's dtype, shape and bytes, a part at a time."""

    def __init__(self, header: Tensor) -> None:
        self._state = blake2b(f"{header.dtype} {tuple(header.shape)} ".encode(), digest_size=16)

    def update(self, part: Tensor) -> None:
        self._state.update(raw(part))

    def hexdigest(self) -> str:
        """32 hexadecimal digits."""
        return self._state.hexdigest()


def raw(part: Tensor) -> memoryview:
    """A tensor's bytes; without a copy where they lie one after the other."""
    flat = part.detach().cpu().contiguous().flatten()
    return memoryview(flat.view(torch.uint8).numpy()) if flat.numel() else memoryview(b"")  # type: ignore[arg-type]


def digests(
    tensors: Mapping[str, Tensor], names: Iterable[str] | None = None, *,
    look: Callable[[str, Tensor], None] = lambda *_: None, step: Callable[[int], None] = lambda _: None,
) -> dict[str, str]:  # fmt: skip
    """The digest of each tensor, or of those named, from several threads.

    look: called with a tensor's name and each of its parts on the way, to raise what it finds.
    step: called with the bytes of each part.
    """

    def one(name: str) -> str:
        digest = Digest(headers(tensors)[name])
        for part in chunks(tensors, name):
            look(name, part)
            digest.update(part)
            step(part.nbytes)
        return digest.hexdigest()

    names = list(headers(tensors) if names is None else names)
    if sum(headers(tensors)[name].nbytes for name in names) < SMALL:
        return {name: one(name) for name in names}
    with ThreadPoolExecutor(HASHING) as threads:
        try:
            return dict(zip(names, threads.map(one, names), strict=True))
        except BaseException:
            threads.shutdown(wait=False, cancel_futures=True)
            raise
