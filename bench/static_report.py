"""What the compiler made of every tile, and what the byte model predicts of it. Needs no GPU.

    python bench/static_report.py [--target sm_90] [--results bench/results/nvidia-h200]

Registers, shared memory and instructions are read from binaries compiled ahead of time; occupancy is how many
programs fit a multiprocessor. "Per weight byte" is what one multiprocessor issues in the inner loop for each byte of W0
and D it reads: at 19 bytes a clock (4.3 TB/s over 132 of them at 1.7 GHz) and 4 instructions a clock, decode is
memory-bound below 0.2. Predicted times are the larger of bytes over copy bandwidth and FLOPs over matmul rate, as
they were measured on an H200 (design, section 4); with ``--results`` measured medians stand beside them.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]

import aot  # noqa: E402
import torch  # noqa: E402
import triton  # noqa: E402

from randes_kernels.tiles import linear_plan  # noqa: E402

# Registers, shared bytes, warps and programs that one multiprocessor holds; threads to a warp.
LIMITS = {"sm_80": (65536, 167936, 64, 32, 32), "sm_90": (65536, 233472, 64, 32, 32)}
COPY_BYTES, MATMUL_FLOPS = 4.3e12, 790e12
"""Of an H200, a second."""
SHAPES = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))
ROWS = (1, 16, 64, 512, 2048, 8192)


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


def kernels(target: str) -> list[str]:
    """Lines of the table of kernels."""
    lines = [
        "| kernel | registers | spills | shared KiB | programs a multiprocessor | instructions per weight byte |",
        "|---|---|---|---|---|---|",
    ]
    for name, (built, options) in aot.cases(target).items():
        row = {"target": target, **aot.report(target, triton.compile(built, aot.TARGETS[target], dict(options)))}
        tile, per_byte = tile_of(name), "–"
        if tile is not None and row["loop_instructions"]:
            weight_bytes = 2 * tile[1] * tile[2] * (4 if "fp32" in name else 2)
            per_byte = f"{row['loop_instructions'] * tile[3] / weight_bytes:.2f}"
        fits = occupancy(row, options.get("num_warps", 4)) or "–"
        shared = f"{row['shared_bytes'] / 1024:.0f}"
        lines.append(f"| {name} | {row['registers']} | {row['spills']} | {shared} | {fits} | {per_byte} |")
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
    given = parser.parse_args()
    measured = {}
    if given.results is not None:
        for row in json.loads((given.results / "kernels.json").read_text(encoding="utf-8"))["rows"]:
            ours = row["op"] == "superposed linear" and row["transform"] == "two-sided" and row["median_us"]
            if ours and row["dtype"] == "bf16" and row["models"] == 8 and row["groups"] == 1:
                measured[row["m"], row["n"], row["k"]] = row["median_us"] / 1e6
    print("\n".join([*kernels(given.target), "", *times(given.target, measured)]))


if __name__ == "__main__":
    main()
