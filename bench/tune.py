"""Chooses tiles on a GPU and writes them as a table that ``randes_kernels.tiles`` reads.

    python bench/tune.py --out FOLDER        writes FOLDER/<architecture>-<product>.json and every trial's row

Each path and each class of rows gets the tile with the least time over real shapes (geometric mean of its time over the
best one's), weights cold. All candidates are tried on two shapes, the best of those on the rest. Then, with those
tiles: from how many rows of one model on the weight side is faster, what a second product costs, and how K is split.

A candidate is refused before it is timed when it does not compile, spills registers, or computes something else than
fp32 torch does. What the time did not suffice for keeps the number that it had, and is named.
"""

import argparse
import copy
import json
import math
import multiprocessing
import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any

import measure
import torch
from layers import TENSOR, Layer, Point
from torch import Tensor

from randes_kernels import tiles

Numbers = dict[str, Any]
Key = tuple[int | str, ...]

SHAPES = ((4096, 4096), (28672, 4096), (6144, 4096), (4096, 14336), (4096, 1024), (1024, 4096))
FIRST_SHAPES = 2
FINALISTS = 6
SHARED_BYTES = 227 << 10
"""Of a multiprocessor, for one program (sm_90; where there is less, candidates fail to compile and are noted)."""
LIMITS = {"bf16": 1e-2, "fp16": 2e-3, "fp32": 1e-5}
"""Root mean square of a candidate's error, as a share of the answer's: a few roundings of the dtype."""
ROWS_OF_A_CLASS = {16: 8, 32: 32, 64: 64}
"""The rows that a class is tuned on, by its largest number of them; 256 above."""
CROSSOVER_ROWS = (32, 64, 96, 128, 192, 256, 512, 1024)


@contextmanager
def using(numbers: Numbers) -> Iterator[None]:
    """Plans made from ``numbers`` instead of the device's table."""
    kept = tiles.table
    tiles.table = lambda device: numbers  # type: ignore[assignment]
    tiles.linear_plan.cache_clear()
    try:
        yield
    finally:
        tiles.table = kept
        tiles.linear_plan.cache_clear()


@lru_cache(maxsize=8)
def layer_at(point: Point, device: str) -> Layer:
    """A point's operands, kept while its candidates are tried."""
    return Layer(point, device)


@lru_cache(maxsize=8)
def expected(point: Point, device: str) -> Tensor:
    """What fp32 torch makes of a point."""
    return layer_at(point, device).answer(torch.arange(point.m, device=device), torch.float32)


def call_of(layer: Layer) -> Callable[[int], Tensor]:
    """The operator's GPU side, below the dispatcher: a dry run gives it tensors of a CPU."""
    from randes_kernels import gpu

    rest = (layer.ids, layer.keys, layer.scale, layer.slots, TENSOR, layer.transform, False)
    return lambda i: gpu.superposed_linear(layer.x, layer.weights[i], None, None, layer.deltas[i], *rest)


def spilled() -> int:
    """Bytes of registers spilled by all kernels that were loaded so far."""
    found = 0
    for name, module in list(sys.modules.items()):
        if name.startswith("randes_kernels.kernels."):
            for kernel in vars(module).values():
                for caches in getattr(kernel, "device_caches", {}).values():
                    found += sum(getattr(compiled, "n_spills", None) or 0 for compiled in caches[0].values())
    return found


def compile_once(numbers: Numbers, point: Point, device: str) -> None:
    """Fill Triton's cache with a candidate's kernels, K split and whole: in a process of its own."""
    torch.set_grad_enabled(False)
    small = replace(point, shape=(min(512, point.shape[0]), min(4096, point.shape[1])))
    for most_parts in (1, numbers["most_parts"]):
        with using(numbers | {"most_parts": most_parts}):
            call_of(layer_at(small, device))(0)


class Tuner:
    """A table under tuning, and the rows of what was tried."""

    def __init__(self, device: str, deadline: float, facts: dict[str, Any]) -> None:
        self.device, self.deadline, self.facts = device, deadline, facts
        self.dry = device == "cpu"
        self.half = "fp16" if self.dry else "bf16"  # bf16 products are wrong in Triton's interpreter
        self.shapes = ((40, 72),) if self.dry else SHAPES
        self.name = tiles.device_name(0)
        self.numbers: Numbers = copy.deepcopy(tiles.table(self.name))
        if not self.dry:
            self.numbers["multiprocessors"] = torch.cuda.get_device_properties(0).multi_processor_count
        self.rows: list[dict[str, Any]] = []
        self.left_out: list[str] = []

    @property
    def late(self) -> bool:
        return time.monotonic() > self.deadline

    def on_side(self, side: str, **changed: Any) -> Numbers:
        """The table with one path made the only one, and some of its numbers changed."""
        numbers: Numbers = copy.deepcopy(self.numbers) | changed
        half = numbers["weight_side"]["half"]
        numbers["weight_side"]["half"] = None if side == "activation" or not half else half | ALWAYS
        return numbers

    def trial(self, what: str, candidate: Key, numbers: Numbers, point: Point) -> float | None:
        """µs of a call under ``numbers``, and its row; None and a note where the candidate is refused."""
        layer = layer_at(point, self.device)
        row = self.facts | {"tuned": what, "candidate": list(candidate), "point": str(point), "note": ""}
        self.rows.append(row)
        before = spilled()
        try:
            with using(numbers):
                call = call_of(layer)
                answer, right = call(0), expected(point, self.device)
                error = float((answer.float() - right).norm() / right.norm())
                row["error"] = measure.short(error)
                if not error <= LIMITS[point.dtype]:
                    row["note"] = f"refused: its error passes {LIMITS[point.dtype]}"
                elif spilled() > before:
                    row["note"] = f"refused: spills {spilled() - before} registers' bytes"
                else:
                    times = self.times(layer, call)
                    row |= {"median_us": measure.short(times.median), "p20_us": measure.short(times.p20)}
                    row |= {"p80_us": measure.short(times.p80)}
                    return times.median
        except Exception as failure:
            measure.synchronize(self.device)  # raises where a GPU is past using
            row["note"] = f"refused: {type(failure).__name__}: {str(failure)[:160]}"
        return None

    def times(self, layer: Layer, call: Callable[[int], Tensor]) -> measure.Times:
        if self.dry:
            start = time.perf_counter()
            call(0)
            return measure.Times(*[1e6 * (time.perf_counter() - start)] * 4)
        read = 2 * layer.unit / 3e6  # µs at 3 TB/s: how many calls a graph needs, roughly
        return measure.gpu_times(call, len(layer.deltas), read, wall=False)

    def best(self, what: str, candidates: dict[Key, Numbers], points: Sequence[Point]) -> list[Key]:
        """The candidates that were timed on all ``points``, the fastest first."""
        candidates = dict(list(candidates.items())[:2]) if self.dry else candidates
        self.compile(what, candidates, points[0])
        found: dict[Key, list[float]] = {candidate: [] for candidate in candidates}
        for stage in (points[:FIRST_SHAPES], points[FIRST_SHAPES:]):
            ranked = ranking(found)[:FINALISTS] if ranking(found) else list(found)
            found = {candidate: found[candidate] for candidate in ranked}
            for candidate in ranked:
                if self.late:
                    self.left_out.append(f"{what}: {candidate} on {[str(point) for point in stage]}")
                    continue
                for point in stage:
                    took = self.trial(what, candidate, candidates[candidate], point)
                    found[candidate].append(math.inf if took is None else took)
        return ranking(found)

    def compile(self, what: str, candidates: dict[Key, Numbers], point: Point) -> None:
        """Compile all candidates at once, on all cores; what fails here fails again, with a note, when it is tried."""
        if self.dry:
            return compile_once(next(iter(candidates.values())), point, self.device)
        workers = min(12, os.cpu_count() or 1, len(candidates))
        pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
        jobs = [pool.submit(compile_once, numbers, point, self.device) for numbers in candidates.values()]
        _, undone = wait(jobs, timeout=max(1.0, self.deadline - time.monotonic()))
        print(f"{what}: {len(jobs) - len(undone)} of {len(jobs)} candidates compiled", flush=True)
        pool.shutdown(wait=False, cancel_futures=True)
        return None

    def activation_side(self, width: str, place: int) -> None:
        """The tile of one class of rows."""
        entry = self.numbers["activation_side"][width][place]
        what, dtype = f"activation side, {width}, up to {entry['rows']} rows", "fp32" if width == "fp32" else self.half
        heights = [entry["rows"]] if entry["rows"] in ROWS_OF_A_CLASS else [16, 32] if width == "fp32" else [64, 128]
        m = ROWS_OF_A_CLASS.get(entry["rows"], 256)
        if self.dry:
            m = 1 + min(m, 64) // 2
        points = [Point(shape, m, dtype=dtype) for shape in self.shapes]

        def with_entry(tile: Key, turn_first: bool) -> tuple[Key, Numbers]:
            numbers = self.on_side("activation")
            numbers["activation_side"][width][place] |= {"tile": list(tile), "turn_first": turn_first}
            return (*tile, "turned first" if turn_first else "turned inside"), numbers

        kept = entry["turn_first"]
        tiles_tried = dict.fromkeys([tuple(entry["tile"]), *activation_tiles(heights, 4 if width == "fp32" else 2)])
        ranked = self.best(what, dict(with_entry(tile, kept) for tile in tiles_tried), points)[:FINALISTS]
        both = [with_entry(one[:-1], not kept) for one in ranked] + [with_entry(one[:-1], kept) for one in ranked[:1]]
        ranked = (self.best(what, dict(both), points) if both else []) or ranked
        if ranked:
            entry |= {"tile": list(ranked[0][:-1]), "turn_first": ranked[0][-1] == "turned first"}

    def weight_side(self) -> None:
        """The tile for many rows of one model."""
        candidates, kept = {}, self.numbers["weight_side"]["half"]
        for *tile, bulk in dict.fromkeys([(*kept["tile"], kept["bulk"]), *weight_tiles(self.device)]):
            numbers = self.on_side("weight")
            numbers["weight_side"]["half"] = {"tile": tile, "bulk": bulk} | ALWAYS
            candidates[(*tile, "bulk" if bulk else "pointers")] = numbers
        for chosen in self.best("weight side, half", candidates, [self.prefill(shape, 2048) for shape in self.shapes])[
            :1
        ]:
            self.numbers["weight_side"]["half"] = kept | {"tile": list(chosen[:-1]), "bulk": chosen[-1] == "bulk"}

    def prefill(self, shape: tuple[int, int], m: int) -> Point:
        m = min(m, 48) if self.dry else m
        return Point(shape, m, mix="identical", dtype=self.half, run=m)

    def crossover(self) -> None:
        """From how many rows of one model on the weight side is faster, and what more products may cost."""
        half = self.numbers["weight_side"]["half"]
        shares: dict[int, float] = {}
        for m in (CROSSOVER_ROWS[:2] if self.dry else CROSSOVER_ROWS) + (2048,):
            if self.late:
                self.left_out.append(f"crossover at {m} rows and above")
                return
            shares[m] = self.compare("crossover", self.on_side("weight"), self.on_side("activation"), m)
        # The smallest number of rows from which on the weight side never loses.
        slower = [m for m, share in shares.items() if share > 1]
        half["from_rows"] = min((m for m in shares if m > max(slower, default=0)), default=max(shares))
        half["products"] = round(max(1.0, 1 / shares[2048]), 2)

    def compare(self, what: str, one: Numbers, other: Numbers, m: int) -> float:
        """Time under ``one`` over time under ``other``, geometric mean over the shapes."""
        found = []
        for shape in self.shapes[:4]:
            point = self.prefill(shape, m)
            sides = [self.trial(what, (name, m), numbers, point) for name, numbers in (("one", one), ("other", other))]
            if sides[0] and sides[1]:
                found.append(sides[0] / sides[1])
        return statistics.geometric_mean(found) if found else math.inf

    def spans(self) -> None:
        """How K is split: how many programs are wanted, into how many parts at most, none shorter than what."""
        names = ("multiprocessors", "most_parts", "shortest_part")
        count = self.numbers["multiprocessors"]
        candidates: dict[Key, Numbers] = {}
        for values in product((count, 2 * count, 4 * count), (4, 8, 16), (256, 512, 1024, 2048)):
            candidates[values] = self.on_side("activation", **dict(zip(names, values, strict=True)))
        points = [Point(shape, m, dtype=self.half) for m in (8, 64) for shape in self.shapes]
        for chosen in self.best("spans of K", candidates, points)[:1]:
            self.numbers |= dict(zip(names, chosen, strict=True))


ALWAYS = {"from_rows": 1, "products": 1e9}


def ranking(found: dict[Key, list[float]]) -> list[Key]:
    """Candidates that were timed wherever any was, the fastest first."""
    length = max((len(times) for times in found.values()), default=0)
    whole = {one: times for one, times in found.items() if length and len(times) == length and math.inf not in times}
    return sorted(whole, key=lambda candidate: statistics.geometric_mean(whole[candidate]))


def activation_tiles(heights: list[int], itemsize: int) -> list[tuple[int, ...]]:
    """Rows, columns, depth, warps, stages: what fits a multiprocessor's shared memory and a program's registers."""
    pipelines = ((4, 2), (4, 3), (4, 4), (4, 6), (8, 2), (8, 3), (8, 4))
    found = product(heights, (32, 64, 128), (32, 64, 128, 256), pipelines)
    return [
        (m, n, k, warps, stages)
        for m, n, k, (warps, stages) in found
        if (m + 2 * n) * k * itemsize * stages <= SHARED_BYTES
        and 1024 <= n * k <= 16384
        and 2 * m * n <= 64 * 32 * warps  # two accumulators in at most 64 registers each
    ]


def weight_tiles(device: str) -> list[tuple[int, int, int, int, int, bool]]:
    """The same, and whether tiles are read by bulk copies, which sm_90 has."""
    has_bulk = device == "cpu" or torch.cuda.get_device_capability()[0] >= 9
    pipelines = ((4, 2), (4, 3), (4, 4), (8, 2), (8, 3), (8, 4))
    found = product((64, 128, 256), (64, 128, 256), (32, 64, 128), pipelines, (True, False) if has_bulk else (False,))
    return [
        (m, n, k, warps, stages, by_bulk)
        for m, n, k, (warps, stages), by_bulk in found
        if (m + 2 * n) * k * 2 * stages <= SHARED_BYTES
        and 32 * 32 * warps < m * n <= 128 * 32 * warps  # an accumulator in at most 128 registers
        and (by_bulk or stages == 3 or not has_bulk)  # pointers are the exception where there are bulk copies
    ]


def readable(table: Numbers) -> str:
    """A table as JSON, what is innermost on one line."""
    text = json.dumps(table, indent=2)
    for innermost in (r"\[\s+([\d,\s]+?)\s+\]", r"\{\s+([^{}]*?)\s+\}"):
        text = re.sub(innermost, lambda found: found[0][0] + re.sub(r"\s+", " ", found[1]) + found[0][-1], text)
    return text + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the table and the rows of all trials")
    parser.add_argument("--minutes", type=float, default=60.0, help="start no further trial after so many")
    parser.add_argument("--commit", help="of the code, where there is no git")
    parser.add_argument("--dry-run", action="store_true", help="a few candidates on a CPU, in Triton's interpreter")
    given = parser.parse_args()
    if given.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are imported
    measure.prepare()
    device = "cpu" if given.dry_run else "cuda"
    facts = measure.machine(device, given.commit)
    tuner = Tuner(device, time.monotonic() + 60 * given.minutes, facts)
    classes = [
        (width, place) for width in ("half", "fp32") for place in range(len(tuner.numbers["activation_side"][width]))
    ]
    classes = classes[:: len(classes) - 1] if given.dry_run else classes
    sides = {one: lambda one=one: tuner.activation_side(*one) for one in classes}
    steps: list[Callable[[], None]] = [step for (width, _), step in sides.items() if width == "half"]
    steps += [tuner.weight_side, tuner.crossover, tuner.spans]
    steps += [step for (width, _), step in sides.items() if width == "fp32"]  # what is served least comes last
    with measure.progress(len(steps)) as say:
        for step in steps:
            say(f"{len(tuner.rows)} trials so far")
            step()
            table = {"measured": {name: value for name, value in facts.items() if value is not None}}
            table |= {name: value for name, value in tuner.numbers.items() if name != "measured"}
            given.out.mkdir(parents=True, exist_ok=True)
            (given.out / f"{tuner.name.replace('/', '-')}.json").write_text(readable(table), encoding="utf-8")
            measure.write_rows(given.out / "tune.json", tuner.rows, tuner.left_out)
    print(f"{len(tuner.rows)} trials; left out: {tuner.left_out or 'nothing'}\n{readable(table)}")


if __name__ == "__main__":
    main()
