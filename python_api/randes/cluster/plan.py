"""How long a store takes to be made by so many workers, from rates that were measured or are known.

A worker is a core, as a task of ``on_ray`` has one. It takes a part, reads while it computes, writes the part's files,
and takes the next:

    seconds of a part    max( its tensors of all checkpoints / core,  bytes read / read )  +  bytes written / write

What starts a cluster, and workers that die, are not counted.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, fields, replace
from heapq import heapify, heapreplace
from pathlib import Path
from subprocess import PIPE, Popen
from tempfile import NamedTemporaryFile, TemporaryDirectory

import torch
from torch import Tensor

from randes.checkpoints.lazy_tensors import headers, size
from randes.checkpoints.matrices import matrices_of
from randes.checkpoints.on_disk import StoredTensors
from randes.checkpoints.remote.locations import Location, Remote
from randes.checkpoints.safetensors import write_file
from randes.checkpoints.sources import read
from randes.checkpoints.tensor_views import source_of
from randes.cluster.compress import compress
from randes.config import Config
from randes.errors import RandesError
from randes.inspect.plan import INTEGERS, store_bytes
from randes.inspect.shapes import Shaped, with_shapes
from randes.superposition.basis.shared_basis import PASSES
from randes.superposition.store.contents import bytes_of, parts_of
from randes.superposition.superposition import Superposition

SIDE, MATRICES, MODELS = 1024, 4, 4
"""Of what a core's rate is measured on: 42 MB."""
SAMPLE = 256 << 20
"""Bytes that a disk's or a server's rate is measured on, at most."""
PIECE = 8 << 20


@dataclass(frozen=True)
class Rates:
    """Bytes a second.

    core: of checkpoints, base and fine-tunes alike, that one core superposes when they are in memory.
    read, write: of one worker, from where checkpoints are and to where the store goes.
    storage: of all workers' reading together; 0 where there is no such limit.
    """

    core: float
    read: float
    write: float
    storage: float = 0.0

    def __post_init__(self) -> None:
        for one in fields(self):
            value, least = getattr(self, one.name), 0 if one.name == "storage" else 1
            if not isinstance(value, int | float) or not least <= value < float("inf"):
                raise ValueError(f"{one.name} must be a number of bytes a second, at least {least}, got {value!r}")


@dataclass(frozen=True)
class Run:
    """A store made by so many workers. Bytes but for the first three.

    parts: tasks. seconds: until the last one ends. read, written: by all of them. memory: of what the largest part
    makes, which one worker holds until it is written. core_seconds: workers times seconds, which is what they cost.
    """

    workers: int
    parts: int
    seconds: float
    read: int
    written: int
    memory: int

    @property
    def core_seconds(self) -> float:
        """Of all workers, busy or not, until the last one ends."""
        return self.workers * self.seconds


def plan_run(
    base: Shaped, models: int, rates: Rates, config: Config | None = None, *, workers: Sequence[int] = (1,),
    shard_size: int | str = "2GiB",
) -> list[Run]:  # fmt: skip
    """How long ``randes.cluster.compress`` takes with so many workers. Reads shapes, not values.

    base, models, config: as for ``randes.plan``: how many directions rank "auto" keeps only the models say, so that
    what is written is the most that there can be. shard_size: as for ``compress``. workers: numbers of them, a ``Run``
    for each.
    Raises ``ValueError`` for numbers below 1, and what ``randes.plan`` raises.
    """
    config = (config or Config()).resolved(together=True)
    if wrong := [count for count in workers if type(count) is not int or count < 1]:
        raise ValueError(f"workers must be at least 1, got {wrong[0]!r}")
    if (limit := bytes_of(shard_size)) == 0:
        raise ValueError("shard_size must be above 0: each part is written to files of its own")
    if models < 1:
        raise ValueError(f"models must be at least 1, got {models}")
    found = matrices_of(with_shapes(base), replace(config, centre=False, rank=0))
    digests = dict.fromkeys(headers(found.tensors), "")
    sup = Superposition(found.config, found.tensors, found.superposed, digests, layout=found.layout)
    numbers, shared_names = parts_of(sup, limit), {*found.superposed} - sup.unshared
    parts: list[dict[str, Tensor]] = [{} for _ in range(max(numbers.values()) + 1)]
    for name, value in headers(found.tensors).items():
        parts[numbers[name]][name] = value
    passes, checkpoints = config.centre + (PASSES if config.rank else 0), models + 1
    loads, reads, writes, held = [], [], [], []
    for tensors in parts:
        shared = sum(value.nbytes for name, value in tensors.items() if name in shared_names)
        loads.append(checkpoints * size(tensors))
        reads.append(size(tensors) + checkpoints * (size(tensors) + passes * shared))
        writes.append(store_bytes(tensors, {*found.superposed}, models, config))
        tables = [value for name, value in tensors.items() if name in sup.unshared]
        # One table is written model by model.
        held.append(writes[-1] - (models - 1) * INTEGERS * tables[0].numel() if len(tables) == 1 else writes[-1])
    rows = []
    for count in workers:
        from_storage = min(rates.read, rates.storage / min(count, len(parts)) if rates.storage else rates.read)
        seconds = [
            max(loaded / rates.core, read / from_storage) + written / rates.write
            for loaded, read, written in zip(loads, reads, writes, strict=True)
        ]
        rows.append(Run(count, len(parts), _last(seconds, count), sum(reads), sum(writes), max(held)))
    return rows


def _last(seconds: Sequence[float], workers: int) -> float:
    """When the last task ends, where each worker that is free takes the next."""
    free = [0.0] * workers
    heapify(free)
    for one in seconds:
        heapreplace(free, free[0] + one)
    return max(free)


def measured(
    base: Shaped, config: Config | None = None, *, cores: int = 1, known: Mapping[str, float] | None = None
) -> Rates:
    """Rates of this machine; those that are ``known`` are not measured. Takes some seconds and, in the folder for
    temporary files, 256 MiB.

    base: whose files' rate is ``read``; where it is a configuration or a module, that must be known.
    cores: that are at work at once while one's rate is measured: cores of a machine share its memory.
    Raises ``ValueError`` where there is no file to measure, and what reading and writing raise.
    """
    known, config = dict(known or {}), (config or Config()).resolved(together=True)
    ways: dict[str, Callable[[], float]] = {
        "core": lambda: _core(config, cores), "read": lambda: _reading(base), "write": _writing,
    }  # fmt: skip
    return Rates(**{name: known[name] if name in known else way() for name, way in ways.items()},
                 storage=known.get("storage", 0.0))  # fmt: skip


_ALONE = "from randes.cluster.plan import superpose_alone; superpose_alone()"


def _core(config: Config, cores: int) -> float:
    """Superpose a small model's fine-tunes on so many cores at once, each in a process of its own."""
    if callable(config.include):
        raise ValueError("config.include must be patterns, which others can be told, got a function")
    with ExitStack() as stack:
        alone = [
            stack.enter_context(
                Popen(
                    [sys.executable, "-c", _ALONE], stdin=PIPE, stdout=PIPE, text=True,
                    env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
                )
            )
            for _ in range(cores)
        ]  # fmt: skip
        for number, process in enumerate(alone):
            _tell(process, json.dumps([number, config.to_dict(), SIDE]))
        _answers(alone)  # that it is ready
        for process in alone:
            _tell(process, "begin")
        seconds = [float(answer) for answer in _answers(alone)]
    return (MODELS + 1) * 2 * MATRICES * SIDE * SIDE / (sum(seconds) / cores)


def _tell(process: "Popen[str]", line: str) -> None:
    assert process.stdin is not None
    with suppress(BrokenPipeError):  # which its answer says
        process.stdin.write(f"{line}\n")
        process.stdin.flush()


def _answers(processes: Sequence["Popen[str]"]) -> list[str]:
    found = [process.stdout.readline() for process in processes if process.stdout is not None]
    if not all(found):
        raise RandesError("the rate of a core could not be measured: a process that should do it has ended")
    return found


def superpose_alone() -> None:
    """What a process of ``measured`` does: superpose once, so that libraries are loaded, and once more to be timed."""
    number, values, side = json.loads(input())
    if hasattr(os, "sched_setaffinity"):
        own = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {own[number % len(own)]})
    config, chance = Config.from_dict(values), torch.Generator().manual_seed(0)
    base = {f"layers.{n}.weight": torch.randn(side, side, generator=chance) for n in range(MATRICES)}
    with TemporaryDirectory(prefix="randes-") as name:
        folder, models = Path(name), {}
        for model in ("base", *map(str, range(MODELS))):
            moved = {tensor: value if model == "base" else value + 0.02 * torch.randn(value.shape, generator=chance)
                     for tensor, value in base.items()}  # fmt: skip
            write_file(folder / f"{model}.safetensors", {tensor: value.bfloat16() for tensor, value in moved.items()})
            if model != "base":
                models[model] = str(folder / f"{model}.safetensors")
        for out in ("first", "second"):
            if out == "second":
                print("ready", flush=True)
                input()
            start = time.perf_counter()
            compress(str(folder / "base.safetensors"), models, config, out=folder / out, shard_size="1TiB")
        print(time.perf_counter() - start, flush=True)


def _reading(base: Shaped) -> float:
    """Read a file of the base's that is not in memory."""
    found = with_shapes(base)
    tensors = read(found)
    stored = source_of(tensors, next(iter(tensors)))[0]
    if not isinstance(stored, StoredTensors):
        raise ValueError(f"read must be given: {type(found).__name__} has no files whose rate could be measured")
    path = max(stored.files, key=lambda file: file.nbytes).path
    nbytes = min(SAMPLE, max(file.nbytes for file in stored.files))
    start = time.perf_counter()
    if isinstance(path, Remote):
        bounds = [(first, min(first + PIECE, nbytes)) for first in range(0, nbytes, PIECE)]
        for place in range(0, len(bounds), 4):
            path.ranges(bounds[place : place + 4])
    else:
        start = _read_here(path, nbytes)
    return nbytes / (time.perf_counter() - start)


def _read_here(path: Location, nbytes: int) -> float:
    assert isinstance(path, Path)
    with path.open("rb", buffering=0) as file:
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        start = time.perf_counter()
        for first in range(0, nbytes, PIECE):
            os.pread(file.fileno(), PIECE, first)
    return start


def _writing() -> float:
    """Write a file to the folder for temporary files, and have the disk take it."""
    data = os.urandom(PIECE)
    with NamedTemporaryFile(prefix="randes-") as file:
        start = time.perf_counter()
        for _ in range(SAMPLE // PIECE):
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
        return SAMPLE / (time.perf_counter() - start)
