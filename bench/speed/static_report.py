"""What the compiler made of every tile, and what the byte model predicts of it. Needs no GPU.

    python bench/speed/static_report.py [--target sm_90] [--results bench/results/nvidia-h200]

Registers, shared memory and instructions are read from binaries compiled ahead of time; occupancy is how many
programs fit a multiprocessor. Cycles of a step along K, of one warp alone and of all that fit, are those of
``cycles.py``; bytes a cycle are the weights' bytes of a step over the latter: at 19 (4.3 TB/s over 132 multiprocessors
at 1.7 GHz) they keep up with the memory. Predicted times of the layers are the larger of bytes over copy bandwidth and
FLOPs over matmul rate, as they were measured on an H200 (design, section 4); with ``--results`` measured medians stand
beside them.

The table of decode adds what a launch waits for: its first bytes, a wave of programs at a time at the slowest of the
memory, of what is in flight (all but one of the stages) over the latency, and of what instructions keep up with; then
the end, and where K is split an exchange for each halving of the parts and their sum. Constants are guesses from what
such chips are known to take, so what stands there is a model's prediction; nothing of it was measured.
"""

import argparse
import json
import math
import re
import sys
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests" / "kernels"), str(ROOT)]

import aot  # noqa: E402
import cycles  # noqa: E402
import torch  # noqa: E402
import triton  # noqa: E402

from randes_kernels.tiles import Plan, linear_plan  # noqa: E402

# Registers, shared bytes, warps and programs that one multiprocessor holds; threads to a warp.
LIMITS = {"sm_80": (65536, 167936, 64, 32, 32), "sm_90": (65536, 233472, 64, 32, 32)}
COPY_BYTES, MATMUL_FLOPS = 4.3e12, 790e12
"""Of an H200, a second."""
SHAPES = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))
ROWS = (1, 16, 64, 512, 2048, 8192)
MULTIPROCESSORS, CLOCK = 132, 1.7e9
FIRST_BYTES, LATENCY, LAST_BYTES, EXCHANGE, SUM = 1.0e-6, 0.7e-6, 0.5e-6, 0.5e-6, 0.6e-6
"""Seconds: until a program's first weights are there, a load under way with others, the last product and its store,
one meeting of two programs, and the parts read again."""


class Compiled(NamedTuple):
    """A kernel in a tile: what fits, and what a step takes."""

    report: dict[str, Any]
    fits: int
    warps: int
    step: cycles.Step | None
    weight_bytes: float

    def rate(self, programs: int) -> float:
        """Bytes of weights a cycle that so many programs on a multiprocessor keep up with."""
        assert self.step is not None
        return self.weight_bytes * programs / self.step.cycles(self.warps * programs)


def occupancy(row: dict[str, Any], warps: int) -> int:
    """Programs that run on a multiprocessor at once; 0 where its limits are not known here."""
    if row["target"] not in LIMITS:
        return 0
    registers, shared, most_warps, most_programs, threads = LIMITS[row["target"]]
    per_warp = -(-row["registers"] * threads // 256) * 256  # registers are given out in blocks of 256
    return min(
        registers // (per_warp * warps), shared // (row["shared_bytes"] + 1024), most_warps // warps, most_programs
    )


def tile_of(name: str) -> tuple[int, ...] | None:
    """The tile that a kernel's name gives."""
    found = re.search(r"\(([\d, ]+)\)", name)
    return tuple(map(int, found[1].split(","))) if found else None


def weight_bytes(name: str, tile: tuple[int, ...]) -> float:
    """Of W0 and D that a step along K reads."""
    bits = re.search(r"(\d) bits", name)
    size = 4 if "fp32" in name else 2
    return tile[1] * tile[2] * (size + (int(bits[1]) / 8 if bits else size))


def compiled(target: str, only: str) -> dict[str, Compiled]:
    """Every kernel whose name matches ``only``, by its name; of AMD's without cycles."""
    found = {}
    for name, (built, options) in aot.cases(target, whole=True).items():
        if not re.search(only, name):
            continue
        binary = triton.compile(built, aot.TARGETS[target], dict(options))
        code = aot.machine_code(target, binary)
        row = {"target": target, **aot.report(target, binary, code)}
        tile, warps = tile_of(name), options.get("num_warps", 4)
        step = None if tile is None else cycles.step_in(code[0])
        found[name] = Compiled(
            row, occupancy(row, warps), warps, step, 0.0 if tile is None else weight_bytes(name, tile)
        )
    return found


def kernels(found: dict[str, Compiled]) -> list[str]:
    """Lines of the table of kernels."""
    lines = [
        "| kernel | registers | spills | shared KiB | programs a multiprocessor | instructions a step "
        "| cycles of one warp | of one program | of all that fit | weight bytes a cycle |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, one in found.items():
        cells = ["–"] * 5
        if one.step is not None:
            fits = max(1, one.fits)
            times = [one.step.cycles(one.warps * programs) for programs in (1, fits)]
            cells = [str(n) for n in (one.step.instructions, one.step.alone, *times)] + [f"{one.rate(fits):.1f}"]
        row = one.report
        first = (name, row["registers"], row["spills"], f"{row['shared_bytes'] / 1024:.0f}", one.fits or "–")
        lines.append("| " + " | ".join(map(str, (*first, *cells))) + " |")
    return lines


def decode_seconds(one: Compiled, plan: Plan, m: int, n: int, k: int) -> float:
    """Seconds of a launch, by what programs on a multiprocessor keep up with (see above)."""
    programs = -(-m // plan.tile.m) * -(-n // plan.tile.n) * plan.parts
    steps = -(-k // (plan.tile.k * plan.parts))
    seconds = LAST_BYTES
    while programs > 0:
        wave = min(programs, MULTIPROCESSORS * one.fits)
        together = -(-wave // MULTIPROCESSORS)
        in_flight = together * (plan.tile.stages - 1) * one.weight_bytes / (LATENCY * CLOCK)
        rate = min(one.rate(together), in_flight) * CLOCK * wave / together
        seconds += FIRST_BYTES + wave * steps * one.weight_bytes / min(rate, COPY_BYTES)
        programs -= wave
    return seconds + (SUM + EXCHANGE * math.log2(plan.parts) if plan.parts > 1 else 0.0)


def decode(found: dict[str, Compiled], target: str) -> list[str]:
    """Lines of the table of decode."""
    lines = ["| N × K | bits of D | M | tile | parts | bytes / bandwidth µs | predicted µs | share of the bandwidth |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for (n, k), bits, m in product(SHAPES, (16, 8, 4), (16, 32, 64)):
        plan = linear_plan(m, n, k, torch.bfloat16, bits=bits, device=target)
        mode = "" if bits == 16 else f" {bits} bits"
        floor = n * k * (2 + bits / 8) / COPY_BYTES
        one = found.get(f"activation side bf16 {tuple(plan.tile)}{mode} parts")
        if one is None:
            continue
        seconds = decode_seconds(one, plan, m, n, k)
        cells = (f"{n}×{k}", bits, f"≤ {m}", tuple(plan.tile), plan.parts, f"{floor * 1e6:.1f}", f"{seconds * 1e6:.1f}")
        lines.append("| " + " | ".join(map(str, (*cells, f"{floor / seconds:.0%}"))) + " |")
    return lines


def predicted(m: int, n: int, k: int, path: str) -> float:
    """Seconds by the byte model: W0 and D once in 16 bits, and one product or two."""
    moved = 2 * n * k * 2 + m * (n + k) * 2
    products = 1 if path == "weight side" else 2
    return max(moved / COPY_BYTES, products * 2 * m * n * k / MATMUL_FLOPS)


def times(device: str, measured: dict[tuple[int, int, int], float]) -> list[str]:
    """Lines of the table of times; ``measured``: seconds by M, N, K."""
    lines = ["| N × K | M | path | tile | parts | predicted µs | measured µs |", "|---|---|---|---|---|---|---|"]
    for n, k in SHAPES:
        for m in ROWS:
            plan = linear_plan(m, n, k, torch.bfloat16, device=device)
            found = measured.get((m, n, k))
            shown = "not measured" if found is None else f"{found * 1e6:.1f}"
            seconds = predicted(m, n, k, plan.path)
            cells = (f"{n}×{k}", m, plan.path, tuple(plan.tile), plan.parts, f"{seconds * 1e6:.1f}", shown)
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", choices=list(aot.TARGETS), default="sm_90")
    parser.add_argument("--results", type=Path, help="a folder of bench/results with a kernels.json")
    parser.add_argument("--only", default="", help="a pattern: of the kernels whose names match, e.g. 'bf16.*parts'")
    given = parser.parse_args()
    measured = {}
    if given.results is not None:
        for row in json.loads((given.results / "kernels.json").read_text(encoding="utf-8"))["rows"]:
            ours = row["op"] == "superposed linear" and row["transform"] == "two-sided" and row["median_us"]
            if ours and row["dtype"] == "bf16" and row["models"] == 8 and row["groups"] == 1:
                measured[row["m"], row["n"], row["k"]] = row["median_us"] / 1e6
    found = compiled(given.target, given.only)
    lines = [*kernels(found), ""]
    if given.target == "sm_90":  # of the others no bandwidth is known here
        lines += [*decode(found, given.target), ""]
    print("\n".join([*lines, *times(given.target, measured)]))


if __name__ == "__main__":
    main()
