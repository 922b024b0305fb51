"""Chooses tiles on a GPU and writes them as a table that ``randes_kernels.tiles`` reads.

    python bench/speed/tune.py --out FOLDER        writes FOLDER/<architecture>-<product>.json and every trial's row
    python bench/speed/tune.py --out FOLDER --resume --install     goes on, and puts the table where the kernels read it

Each path and each class of rows gets the tile with the least time over real shapes (geometric mean of its time over the
best one's), weights cold. All candidates are tried on two shapes, the best of those on the rest. Then, with those
tiles: from how many rows of one model on the weight side is faster, what a second product costs, and how K is split.
What is served most comes first. One pool of processes compiles ahead, in the same order, and launches nothing.

What cannot compile is no candidate. A candidate is refused before it is timed when it spills registers, or computes
something else than fp32 torch does. One that ends the process is not tried again. What the time did not suffice for
keeps the number that it had, and is named. (One file beyond 300 lines: every step shares the tuner's table and trials.)
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
from concurrent.futures import Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import measure
import torch
from layers import TENSOR, Layer, Point
from torch import Tensor

from randes_kernels import tiles
from randes_kernels.format import SIGNS_PER_BLOCK

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
FEW_ROWS = (128, 256)
"""Where tiles for thousands of rows leave most multiprocessors without a program."""
MEGAHERTZ = 1980
"""Of an H200 at work: cycles of tiles are compared with each other alone."""
COMPILERS = 12
"""Processes that compile."""
BITS = {width + suffix: bits for width in ("half", "fp32") for bits, suffix in tiles.PACKED.items() if bits > 2}
"""Of D, by the table's widths; 2 bits share the tiles of 4."""
STEPS = (
    ("activation", "half", 0), ("weight", "half"), ("activation", "half_4", 0), ("activation", "half", 2),
    ("few", "half"), ("activation", "half", 1), ("crossover", "half"), ("activation", "half_4", 2),
    ("weight", "half_4"), ("activation", "half_4", 1), ("few", "half_4"), ("crossover", "half_4"), ("spans",),
    ("activation", "half", 3), ("activation", "half_8", 0), ("activation", "half_8", 2), ("activation", "half_8", 1),
    ("weight", "half_8"), ("few", "half_8"), ("crossover", "half_8"), ("activation", "half_4", 3),
    ("activation", "half_8", 3), ("activation", "fp32", 0), ("activation", "fp32", 1), ("activation", "fp32_4", 0),
    ("activation", "fp32_8", 0), ("activation", "fp32_4", 1), ("activation", "fp32_8", 1),
)  # fmt: skip
"""What is tuned, what is served most first; classes of rows by their place in a table of four."""


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


@contextmanager
def without_launches() -> Iterator[None]:
    """Kernels are compiled and not launched, so that what is timed has the GPU for itself."""
    from triton.runtime.jit import JITFunction

    launching = JITFunction.__getitem__
    JITFunction.__getitem__ = lambda kernel, grid: partial(kernel.run, grid=grid, warmup=True)
    try:
        yield
    finally:
        JITFunction.__getitem__ = launching


def compile_once(numbers: Numbers, point: Point, device: str) -> None:
    """Fill Triton's cache with a candidate's kernels, K split and whole: in a process of its own."""
    torch.set_grad_enabled(False)
    small = replace(point, shape=(min(512, point.shape[0]), min(4096, point.shape[1])))
    for most_parts in (1, numbers["most_parts"]):
        with using(numbers | {"most_parts": most_parts}), without_launches():
            call_of(layer_at(small, device))(0)


class Tuner:
    """A table under tuning, and the rows of what was tried: now, and before it was resumed."""

    def __init__(
        self, device: str, deadline: float, facts: dict[str, Any], trials: measure.Trials, kept: list[dict[str, Any]]
    ) -> None:
        self.device, self.deadline, self.facts, self.trials = device, deadline, facts, trials
        self.dry = device == "cpu"
        self.half = "fp16" if self.dry else "bf16"  # bf16 products are wrong in Triton's interpreter
        self.shapes = ((40, 72),) if self.dry else SHAPES
        self.name = tiles.device_name(0)
        self.numbers: Numbers = copy.deepcopy(tiles.table(self.name))
        if not self.dry:
            self.numbers["multiprocessors"] = torch.cuda.get_device_properties(0).multi_processor_count
        self.rows = kept
        self.known = {(row["tuned"], str(row["candidate"]), row["point"]): row for row in kept}
        self.left_out: list[str] = []
        self.pool: ProcessPoolExecutor | None = None
        self.compiling: dict[str, Future[None]] = {}

    @property
    def late(self) -> bool:
        return time.monotonic() > self.deadline

    def on_side(self, side: str, width: str, **changed: Any) -> Numbers:
        """The table with one path made the only one, and some of its numbers changed."""
        numbers: Numbers = copy.deepcopy(self.numbers) | changed
        held = numbers["weight_side"][width]
        numbers["weight_side"][width] = None if side == "activation" or not held else held | ALWAYS
        return numbers

    def trial(self, what: str, candidate: Key, numbers: Numbers, point: Point) -> float | None:
        """µs of a call under ``numbers``, and its row; None and a note where the candidate is refused."""
        name = what, str(list(candidate)), str(point)
        if name in self.known:
            return self.known[name].get("median_us")
        row = self.facts | {"tuned": what, "candidate": list(candidate), "point": str(point), "note": ""}
        self.rows.append(row)
        if " ".join(name) in self.trials.fatal:
            row["note"] = "refused: it ended the process"
            return None
        with self.trials.of(" ".join(name)):
            return self.measured(row, numbers, point)

    def measured(self, row: dict[str, Any], numbers: Numbers, point: Point) -> float | None:
        """µs of a call, into its row."""
        before = spilled()
        try:
            layer = layer_at(point, self.device)
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
        jobs = self.compile(what, candidates, points[0])
        wait(jobs, timeout=max(1.0, self.deadline - time.monotonic()))
        failed = sum(job.done() and not job.cancelled() and job.exception() is not None for job in jobs)
        measure.say(f"{what}: {len(candidates)} candidates, {failed} of {len(jobs)} do not compile")
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
                    if took is None:
                        break  # refused on one shape, refused on all
        return ranking(found)

    def compile(self, what: str, candidates: dict[Key, Numbers], point: Point) -> list[Future[None]]:
        """Have the pool compile candidates; what fails there fails again, with a note, when it is tried."""
        if self.dry:
            return []
        if self.pool is None:
            workers = min(COMPILERS, os.cpu_count() or 1)
            self.pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
        jobs = []
        for candidate, numbers in candidates.items():
            name = f"{what} {candidate}"
            if name not in self.compiling and (what, str(list(candidate)), str(point)) not in self.known:
                self.compiling[name] = self.pool.submit(compile_once, numbers, point, self.device)
            jobs += [self.compiling[name]] if name in self.compiling else []
        return jobs

    def ahead(self, steps: Sequence[tuple[Any, ...]]) -> None:
        """Queue what is known to be tried, in the order of the steps."""
        for step in steps:
            if step[0] in ("activation", "weight") and not self.dry:
                what, candidates, points = getattr(self, f"{step[0]}_candidates")(*step[1:])
                self.compile(what, candidates, points[0])

    def close(self) -> None:
        """Compile nothing more."""
        if self.pool is not None:
            self.pool.shutdown(wait=False, cancel_futures=True)

    def activation_candidates(self, width: str, place: int) -> tuple[str, dict[Key, Numbers], list[Point]]:
        """What is tried for one class of rows, and on what."""
        entry = self.numbers["activation_side"][width][place]
        single = width.startswith("fp32")
        heights = [entry["rows"]] if entry["rows"] in ROWS_OF_A_CLASS else [16, 32] if single else [64, 128]
        m = ROWS_OF_A_CLASS.get(entry["rows"], 256)
        m = 1 + min(m, 64) // 2 if self.dry else m
        points = [Point(shape, m, dtype="fp32" if single else self.half, bits=BITS[width]) for shape in self.shapes]
        found = activation_tiles(heights, 4 if single else 2, BITS[width])
        tried = dict.fromkeys([tuple(entry["tile"]), *found])
        candidates = dict(self.with_entry(width, place, tile, entry["turn_first"]) for tile in tried)
        return f"activation side, {width}, up to {entry['rows']} rows", candidates, points

    def with_entry(self, width: str, place: int, tile: Key, turn_first: bool) -> tuple[Key, Numbers]:
        """A candidate for one class of rows."""
        numbers = self.on_side("activation", width)
        numbers["activation_side"][width][place] |= {"tile": list(tile), "turn_first": turn_first}
        return (*tile, "turned first" if turn_first else "turned inside"), numbers

    def activation(self, width: str, place: int) -> None:
        """The tile of one class of rows."""
        entry = self.numbers["activation_side"][width][place]
        what, candidates, points = self.activation_candidates(width, place)
        ranked = self.best(what, candidates, points)[:FINALISTS]
        kept = entry["turn_first"]
        both = [self.with_entry(width, place, one[:-1], not kept) for one in ranked]
        both += [self.with_entry(width, place, one[:-1], kept) for one in ranked[:1]]
        ranked = (self.best(what, dict(both), points) if both else []) or ranked
        if ranked:
            entry |= {"tile": list(ranked[0][:-1]), "turn_first": ranked[0][-1] == "turned first"}

    def weight_candidates(self, width: str, few: bool = False) -> tuple[str, dict[Key, Numbers], list[Point]]:
        """What is tried for many rows of one model, or for ``few``, and on what."""
        candidates, kept = {}, self.numbers["weight_side"][width]
        found = [(*kept["tile"], kept["bulk"]), *weight_tiles(self.device, BITS[width])]
        for *tile, bulk in dict.fromkeys(one for one in found if not few or one[-1] == kept["bulk"]):
            numbers = self.on_side("weight", width)
            numbers["weight_side"][width] = {"tile": tile, "bulk": bulk} | ALWAYS
            candidates[(*tile, "bulk" if bulk else "pointers")] = numbers
        rows = FEW_ROWS if few else (2048,)
        points = [self.prefill(shape, m, width) for m in rows for shape in self.shapes[: 4 if few else None]]
        return f"weight side, {width}" + ", few programs" * few, candidates, points

    def weight(self, width: str) -> None:
        """The tile for many rows of one model."""
        what, candidates, points = self.weight_candidates(width)
        for chosen in self.best(what, candidates, points)[:1]:
            entry = self.numbers["weight_side"][width]
            if entry["bulk"] != (chosen[-1] == "bulk"):
                entry.pop("smaller", None)  # they were of the other kind
            entry |= {"tile": list(chosen[:-1]), "bulk": chosen[-1] == "bulk"}
            entry["cycles"] = self.cycles(what, chosen, points)

    def few(self, width: str) -> None:
        """The tile where that one has too few programs to fill the chip."""
        entry = self.numbers["weight_side"][width]
        what, candidates, points = self.weight_candidates(width, few=True)
        for chosen in self.best(what, candidates, points)[:1]:
            entry.pop("smaller", None)
            if list(chosen[:-1]) != entry["tile"]:
                entry["smaller"] = [{"tile": list(chosen[:-1]), "cycles": self.cycles(what, chosen, points)}]

    def cycles(self, what: str, chosen: Key, points: Sequence[Point]) -> int:
        """What a step of a tile took: a call's time over its waves of programs and its steps, in the middle."""
        tile, found = tiles.Tile(*chosen[:-1]), []
        for row in self.rows:
            if (row["tuned"], row["candidate"]) == (what, list(chosen)) and "median_us" in row:
                point = next(point for point in points if str(point) == row["point"])
                (n, k), m = point.shape, point.m
                waves = math.ceil(math.ceil(m / tile.m) * math.ceil(n / tile.n) / self.numbers["multiprocessors"])
                found.append(row["median_us"] * MEGAHERTZ / (waves * math.ceil(k / tile.k)))
        return max(1, round(statistics.median(found)))

    def prefill(self, shape: tuple[int, int], m: int, width: str = "half") -> Point:
        m = min(m, 48) if self.dry else m
        return Point(shape, m, mix="identical", dtype=self.half, run=m, bits=BITS[width])

    def crossover(self, width: str) -> None:
        """From how many rows of one model on the weight side is faster, and what more products may cost."""
        entry, what = self.numbers["weight_side"][width], f"crossover, {width}"
        shares: dict[int, float] = {}
        for m in (CROSSOVER_ROWS[:2] if self.dry else CROSSOVER_ROWS) + (2048,):
            if self.late:
                self.left_out.append(f"{what} at {m} rows and above")
                return
            shares[m] = self.compare(what, width, m)
        # The smallest number of rows from which on the weight side never loses.
        slower = [m for m, share in shares.items() if share > 1]
        entry["from_rows"] = min((m for m in shares if m > max(slower, default=0)), default=max(shares))
        entry["products"] = round(max(1.0, 1 / shares[2048]), 2)

    def compare(self, what: str, width: str, m: int) -> float:
        """Time on the weight side over time on the activation side, geometric mean over the shapes."""
        found = []
        for shape in self.shapes[:4]:
            point = self.prefill(shape, m, width)
            sides = [self.trial(what, (side, m), self.on_side(side, width), point) for side in ("weight", "activation")]
            if sides[0] and sides[1]:
                found.append(sides[0] / sides[1])
        return statistics.geometric_mean(found) if found else math.inf

    def spans(self) -> None:
        """How K is split: how many programs are wanted, into how many parts at most, none shorter than what."""
        names = ("multiprocessors", "most_parts", "shortest_part")
        count = self.numbers["multiprocessors"]
        candidates: dict[Key, Numbers] = {}
        for values in product((count, 2 * count, 4 * count), (4, 8, 16), (256, 512, 1024, 2048)):
            candidates[values] = self.on_side("activation", "half", **dict(zip(names, values, strict=True)))
        points = [Point(shape, m, dtype=self.half) for m in (8, 64) for shape in self.shapes]
        for chosen in self.best("spans of K", candidates, points)[:1]:
            self.numbers |= dict(zip(names, chosen, strict=True))


ALWAYS = {"from_rows": 1, "products": 1e9}


def ranking(found: dict[Key, list[float]]) -> list[Key]:
    """Candidates that were timed wherever any was, the fastest first."""
    length = max((len(times) for times in found.values()), default=0)
    whole = {one: times for one, times in found.items() if length and len(times) == length and math.inf not in times}
    return sorted(whole, key=lambda candidate: statistics.geometric_mean(whole[candidate]))


def depths(smallest: int, bits: int) -> tuple[int, ...]:
    """Of tiles: at most a block of signs, and of a D packed in spans of columns one span."""
    return (SIGNS_PER_BLOCK,) if bits < 8 else tuple(k for k in (32, 64, 128) if smallest <= k <= SIGNS_PER_BLOCK)


def activation_tiles(heights: list[int], itemsize: int, bits: int = 16) -> list[tuple[int, ...]]:
    """Rows, columns, depth, warps, stages: what fits a multiprocessor's shared memory and a program's registers."""
    pipelines = ((4, 2), (4, 3), (4, 4), (4, 6), (8, 2), (8, 3), (8, 4), (8, 5))
    held = bits / 8 if bits < 16 else itemsize  # bytes of an element of D
    found = product(heights, (32, 64, 128), depths(32, bits), pipelines)
    return [
        (m, n, k, warps, stages)
        for m, n, k, (warps, stages) in found
        if (m * itemsize + n * (itemsize + held)) * k * stages <= SHARED_BYTES
        and 1024 <= n * k <= 16384
        and 2 * m * n <= 64 * 32 * warps  # two accumulators in at most 64 registers each
    ]


def weight_tiles(device: str, bits: int = 16) -> list[tuple[int, int, int, int, int, bool]]:
    """The same of half precision, and whether tiles are read by bulk copies, which sm_90 has."""
    has_bulk = device == "cpu" or torch.cuda.get_device_capability()[0] >= 9
    pipelines = ((4, 2), (4, 3), (4, 4), (8, 2), (8, 3), (8, 4))
    columns = tuple(n for n in (64, 128) if n <= SIGNS_PER_BLOCK)  # one block of row signs
    found = product((64, 128, 256), columns, depths(32, bits), pipelines, (True, False) if has_bulk else (False,))
    return [
        (m, n, k, warps, stages, by_bulk)
        for m, n, k, (warps, stages), by_bulk in found
        if (2 * m + n * (2 + bits / 8)) * k * stages <= SHARED_BYTES
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
    parser.add_argument("--resume", action="store_true", help="keep the trials that are there, make the rest")
    parser.add_argument("--install", action="store_true", help="write the table where the kernels read it, too")
    parser.add_argument("--commit", help="of the code, where there is no git")
    parser.add_argument("--dry-run", action="store_true", help="a few candidates on a CPU, in Triton's interpreter")
    given = parser.parse_args()
    if given.dry_run:
        measure.check_interpreter()
        os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are imported
    measure.prepare()
    device = "cpu" if given.dry_run else "cuda"
    facts = measure.machine(device, given.commit)
    given.out.mkdir(parents=True, exist_ok=True)
    file, begun = given.out / "tune.json", given.out / "tune.begun"
    if not given.resume:
        for one in (file, begun):
            one.unlink(missing_ok=True)
    kept = json.loads(file.read_text(encoding="utf-8"))["rows"] if file.exists() else []
    tuner = Tuner(device, time.monotonic() + 60 * given.minutes, facts, measure.Trials(begun), kept)
    steps = [step for step in STEPS if exists(step, tuner.numbers)]
    steps = DRY_STEPS if given.dry_run else steps
    tuner.ahead(steps)
    with measure.progress(len(steps)) as say:
        for step in steps:
            say(f"{' '.join(map(str, step))}, {len(tuner.rows)} trials so far")
            try:
                getattr(tuner, step[0])(*step[1:])
            finally:
                measure.write_rows(file, tuner.rows, tuner.left_out)
            table = {"measured": {name: value for name, value in facts.items() if value is not None}}
            table |= {name: value for name, value in tuner.numbers.items() if name != "measured"}
            name = f"{tuner.name.replace('/', '-')}.json"
            for folder in (given.out, *[tiles.TABLES] * (given.install and not given.dry_run)):
                (folder / name).write_text(readable(table), encoding="utf-8")
    tuner.close()
    print(f"{len(tuner.rows)} trials; left out: {tuner.left_out or 'nothing'}\n{readable(table)}")


def exists(step: tuple[Any, ...], numbers: Numbers) -> bool:
    """Whether a table has the class that a step tunes."""
    if step[0] == "activation":
        return step[2] < len(numbers["activation_side"][step[1]])
    return step[0] == "spans" or numbers["weight_side"][step[1]] is not None


DRY_STEPS = (("activation", "half", 0), ("weight", "half"), ("crossover", "half"), ("activation", "fp32", 0))


if __name__ == "__main__":
    main()
