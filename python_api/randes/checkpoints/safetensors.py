"""safetensors files, read a part at a time and written whole.

Files are read rather than mapped: what is in memory is counted and bounded, and a file that is cut short meanwhile is
an error instead of a killed process. A file that was replaced or deleted is still read as it was when it was opened.
"""

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from math import prod
from pathlib import Path
from weakref import finalize

import torch
from torch import Tensor

from randes.checkpoints import schema
from randes.checkpoints.files import opened, write_whole
from randes.checkpoints.lazy_tensors import blocks, chunk_bounds, chunks, headers, raw
from randes.checkpoints.remote.locations import Location
from randes.checkpoints.threads import ahead
from randes.errors import CheckpointError

DTYPES = {
    "U64": torch.uint64, "I64": torch.int64, "F64": torch.float64, "C64": torch.complex64, "F32": torch.float32,
    "U32": torch.uint32, "I32": torch.int32, "BF16": torch.bfloat16, "F16": torch.float16, "U16": torch.uint16,
    "I16": torch.int16, "F8_E5M2FNUZ": torch.float8_e5m2fnuz, "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E8M0": torch.float8_e8m0fnu, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
"""By the format's names, in the order in which its own writer puts them in a file."""
_ORDER = {dtype: (place, name) for place, (name, dtype) in enumerate(DTYPES.items())}
LONGEST_HEADER = 100_000_000
"""Bytes, as the format has it."""
MOST_DIMENSIONS = 64
"""Of torch."""
_METADATA = schema.each(schema.text)
_HEADER = schema.each(
    schema.record(
        {
            "dtype": schema.text, "shape": schema.listed(schema.integer(), most=MOST_DIMENSIONS),
            "data_offsets": schema.listed(schema.integer(), 2, 2),
        }
    )
)  # fmt: skip
QUIET = 100_000_000
"""Nanoseconds that a file must have been left alone before its time of change is trusted to show the next one."""


class ChangedError(Exception):
    """A file was written to since it was found right."""


class File:
    """One open safetensors file: where its tensors are, and whether it is as it was."""

    path: Location

    def __init__(self, path: Path, *, links: bool = True) -> None:
        """links: whether ``path`` may be a link.

        Raises ``CheckpointError`` for anything but a whole safetensors file of dtypes that torch has, and ``OSError``
        where nothing is, or the disk does not give it.
        """
        self.path = path
        self._handle = opened(path, links=links)
        finalize(self, os.close, self._handle)
        self._since, self._state = time.time_ns(), self._now()
        self._describe()

    def _describe(self) -> None:
        try:
            self.headers, self.offsets = self._described()
        except (ValueError, ChangedError) as error:
            raise self._no_file(error) from error

    def _described(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """Shape and dtype of each tensor, and where it begins. Raises ``ValueError`` for what the format excludes."""
        size, length = self._state[0], int.from_bytes(self._read(8, 0), "little")
        first = 8 + length
        schema.must(length <= LONGEST_HEADER and first <= size, "its header", "within the file", length)
        text = bytes(self._read(length, 8))
        schema.must(text[:1] == b"{", "its header", "an object", text[:9])
        described = schema.parsed(text, "its header", constants=False)
        metadata = described.pop("__metadata__", {})
        _METADATA("its metadata", metadata)
        "".join((*described, *metadata, *metadata.values())).encode()  # no half of a character (UTF-16's surrogates)
        headers: dict[str, Tensor] = {}
        offsets: dict[str, int] = {}
        _HEADER("its header", described)
        end = 0
        for name, entry in sorted(described.items(), key=lambda one: one[1]["data_offsets"]):
            dtype, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
            schema.must(dtype in DTYPES, f"the dtype of {name}", "one that torch has", dtype)
            # Also of a tensor without elements: torch counts in 64 bits.
            most = prod(max(1, count) for count in shape) * DTYPES[dtype].itemsize
            schema.must(most <= schema.LARGEST, f"the shape of {name}", "of a tensor that torch can have", shape)
            nbytes = prod(shape) * DTYPES[dtype].itemsize
            schema.must((start, stop) == (end, end + nbytes), f"the place of {name}", f"{end} to {end + nbytes}", start)
            headers[name] = torch.empty(shape, dtype=DTYPES[dtype], device="meta")
            offsets[name], end = first + start, stop
        schema.must(first + end == size, "its size", f"{first + end} bytes", size)
        return {name: headers[name] for name in described}, offsets

    def _no_file(self, error: Exception) -> CheckpointError:
        # Only now: a safetensors file may begin with a pickle's first bytes, a pickle is never a safetensors file.
        start = self._start()
        if start[:1] == b"\x80" or start == b"PK":
            return CheckpointError(
                f"{self.path} is a pickle, which can run code when it is opened; save it as safetensors"
                " (safetensors.torch.save_file(model.state_dict(), path))"
            )
        return CheckpointError(f"{self.path} is not a whole safetensors file: {str(error) or 'it ends too soon'}")

    @property
    def nbytes(self) -> int:
        """Of the whole file, as it was opened."""
        return self._state[0]

    def _start(self) -> bytes:
        return os.pread(self._handle, 2, 0)

    def trust(self) -> None:
        """Take the file as it is now for what ``unchanged`` compares with: it was just read and found right."""
        self._state, self._since = self._now(), time.time_ns()

    def unchanged(self) -> bool:
        """Whether nobody wrote to the file since it was trusted. A write that its time cannot show counts as one."""
        return self._now() == self._state and self._since - self._state[1] > QUIET

    def replaced(self) -> bool:
        """Whether its path names another file by now. A file that was deleted is read on."""
        try:
            found, own = os.stat(self.path), os.fstat(self._handle)
        except FileNotFoundError:
            return False
        return (found.st_dev, found.st_ino) != (own.st_dev, own.st_ino)

    def chunks(self, name: str) -> Iterator[Tensor]:
        """One tensor, a run of its first dimension after the other. Raises ``ChangedError``."""
        for start, end in chunk_bounds(self.headers[name]):
            yield self.rows(name, start, end)

    def rows(self, name: str, start: int, end: int) -> Tensor:
        """A run of a tensor's first dimension; (0, 1) of a scalar. Raises ``ChangedError``."""
        if self._now() != self._state:
            raise ChangedError
        header = self.headers[name]
        shape = (end - start, *header.shape[1:]) if header.dim() else ()
        part = blocks.empty(shape, header.dtype)
        if part.numel():
            self._fill(raw(part), self.offsets[name] + start * (part.nbytes // (end - start)))
        return part

    def _now(self) -> tuple[int, int]:
        found = os.fstat(self._handle)
        return found.st_size, found.st_mtime_ns

    def _read(self, count: int, offset: int) -> bytearray:
        read = bytearray(count)
        self._fill(memoryview(read), offset)
        return read

    def _fill(self, memory: memoryview, offset: int) -> None:
        done = 0
        while done < len(memory):
            count = os.preadv(self._handle, [memory[done:]], offset + done)
            if count == 0:
                raise ChangedError
            done += count


def write_file(path: Location, tensors: Mapping[str, Tensor], *, step: Callable[[int], None] = lambda _: None) -> None:
    """Write a safetensors file beside ``path``, flush it to disk, and rename it: all of it, or nothing.

    Tensors that share memory are written once for each name. Lazy ones are read or made while others are written.
    step: called with the bytes of each part. Raises ``OSError`` where the disk does not take it.
    """
    described = headers(tensors)
    for name, header in described.items():
        if header.dtype not in _ORDER:
            raise CheckpointError(f"{name} must be of a dtype that safetensors has, got {header.dtype}")
    names = in_order(described)

    def pieces() -> Iterator[memoryview]:
        yield memoryview(_header(described, names))
        with ahead(part for name in names for part in chunks(tensors, name)) as made:
            for part in made:
                yield raw(part)
                step(part.nbytes)

    write_whole(path, pieces())


def in_order(described: Mapping[str, Tensor]) -> list[str]:
    """The names of tensors as a file has them one after the other."""
    return sorted(described, key=lambda name: (_ORDER[described[name].dtype][0], name))


def file_size(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of the file that ``write_file`` makes of these, which need not be at hand."""
    described = headers(tensors)
    return len(_header(described, in_order(described))) + sum(header.nbytes for header in described.values())


def _header(described: Mapping[str, Tensor], names: Iterable[str]) -> bytes:
    entries, end = {}, 0
    for name in names:
        header = described[name]
        start, end = end, end + header.nbytes
        entries[name] = {
            "dtype": _ORDER[header.dtype][1], "shape": list(header.shape), "data_offsets": [start, end],
        }  # fmt: skip
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
