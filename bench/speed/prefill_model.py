"""What prefills would take by a simple model of the weight side on sm_90. Needs no GPU: predictions, never results.

    python bench/speed/prefill_model.py [--bits 16]

A step of a tile takes the cycles that the table of tiles gives, the largest of three:

    products   m·n·k / 2048: all of the tensor cores, 64 rows of the weight's tile an instruction
    shared     shared memory, 128 bytes a cycle: x read once for 64 columns of y, all three tiles written, W0 and D read
    one warp   half of the products, which Triton leaves running from step to step, and what one warp does beside them

One program runs on a multiprocessor, so waves times steps times cycles is the time; not less than the bytes of W0 and D
take from memory. Left out: the start and end of programs, L2, and how far the clock falls under load.
"""

import argparse
import math
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2])]

import torch  # noqa: E402

from randes_kernels.tiles import Tile, linear_plan, table  # noqa: E402

DEVICE = "sm_90/nvidia-h200"
CLOCK, COPY_BYTES, MATMUL_FLOPS = 1.7e9, 4.3e12, 790e12
"""Of an H200, a second; the last two as they were measured there."""
SHAPES = ((4096, 4096), (1024, 4096), (28672, 4096), (4096, 14336))
ROWS = (128, 256, 512, 2048, 8192)


def shared_cycles(tile: Tile) -> float:
    """Of a step with a D of 16 bits: what shared memory takes."""
    return 2 * tile.k * (tile.m * tile.n / 64 + tile.m + 2 * tile.n + 2 * tile.n) / 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, choices=(16, 8, 4), default=16, help="of D")
    bits = parser.parse_args().bits
    side = table(DEVICE)["weight_side"][{16: "half", 8: "half_8", 4: "half_4"}[bits]]
    print("| tile | products | shared (16 bits) | a step, as planned with |\n|---|---|---|---|")
    cycles = {}
    for entry in (side, *side["smaller"]):
        tile = Tile(*entry["tile"])
        cycles[tile] = entry["cycles"]
        print(f"| {tuple(tile)} | {tile.m * tile.n * tile.k // 2048} | {shared_cycles(tile):.0f} | {entry['cycles']} |")
    print("\n| N × K | M | tile | programs | waves | predicted µs | plain linear's floor, µs | ratio |")
    print("|---|---|---|---|---|---|---|---|")
    for (n, k), m in ((shape, m) for shape in SHAPES for m in ROWS):
        plan = linear_plan(m, n, k, torch.bfloat16, bits=bits, device=DEVICE)
        tile = plan.tile
        programs = math.ceil(m / tile.m) * math.ceil(n / tile.n) * plan.parts
        floor = max(2 * n * k / COPY_BYTES, 2 * m * n * k / MATMUL_FLOPS)
        if tile not in cycles or plan.path != "weight side":
            print(f"| {n}×{k} | {m} | {plan.path}, {tuple(tile)} | {programs} | – | – | {floor * 1e6:.0f} | – |")
            continue
        waves = math.ceil(programs / table(DEVICE)["multiprocessors"])
        moved = n * k * (2 + bits / 8) / COPY_BYTES
        time = max(moved, waves * math.ceil(k / tile.k) * cycles[tile] / CLOCK)
        cells = (f"{n}×{k}", m, tuple(tile), programs, waves, f"{time * 1e6:.0f}", f"{floor * 1e6:.0f}")
        print("| " + " | ".join(map(str, cells)) + f" | {time / floor:.2f} |")


if __name__ == "__main__":
    main()
