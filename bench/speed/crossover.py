"""Where the weight side of the CPU path begins to pay, and how large its slices should be.

    python bench/speed/crossover.py               writes bench/results/cpu/crossover.json, about two minutes on 2 cores

One model's rows through both sides and through ``F.linear``, taken in turns; medians, as multiples of ``F.linear``'s.
The constants of ``randes_kernels/cpu.py`` are read off these rows.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from measure import machine

from randes_kernels import cpu
from randes_kernels.format import Transform, model_key, tensor_id

WIDTH = 4096
ROWS = (16, 32, 48, 64, 128, 256, 512)
SLICES = (1 << 20, 4 << 20, 16 << 20)
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
TURNS = 7


def medians(calls: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Seconds of each call, the median over turns in which all of them are taken."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(TURNS + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if turn:  # the first one warms caches
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(taken) for name, taken in seconds.items()}


def forced(rows: float, slice_bytes: int, arguments: tuple[Any, ...]) -> Callable[[], torch.Tensor]:
    """A call whose weight side begins at ``rows``, with slices of that size."""

    def call() -> torch.Tensor:
        with (
            mock.patch.object(cpu, "weight_side_rows", return_value=rows),
            mock.patch.object(cpu, "SLICE_BYTES", slice_bytes),
        ):
            return cpu.superposed_linear(*arguments)

    return call


def measure(dtype: torch.dtype, transform: Transform, rows: int) -> dict[str, float]:
    """Both sides at one point, over ``F.linear``."""
    generator = torch.Generator().manual_seed(0)
    weight, delta = (torch.randn(WIDTH, WIDTH, generator=generator).to(dtype) for _ in range(2))
    x = torch.randn(rows, WIDTH, generator=generator).to(dtype)
    tables = torch.zeros(1, dtype=torch.int32), torch.tensor([model_key(0, "m")]), torch.full((1,), 0.01)
    arguments = (x, weight, None, None, delta[None], *tables, tables[0], tensor_id("w"), transform, False)
    calls: dict[str, Callable[[], object]] = {"linear": lambda: F.linear(x, weight)}
    calls["activation side"] = forced(math.inf, cpu.SLICE_BYTES, arguments)
    sizes = SLICES if not transform.granule else (cpu.SLICE_BYTES,)
    calls |= {f"weight side, {size >> 20} MiB slices": forced(1, size, arguments) for size in sizes}
    found = medians(calls)
    return {name: round(seconds / found["linear"], 3) for name, seconds in found.items() if name != "linear"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results" / "cpu" / "crossover.json")
    out = parser.parse_args().out
    rows = []
    for short, dtype in DTYPES.items():
        for transform in (Transform(), Transform(granule=1)):
            for m in ROWS:
                ratios = measure(dtype, transform, m)
                rows.append({"dtype": short, "permuted": bool(transform.granule), "rows": m, "over_linear": ratios})
                print(json.dumps(rows[-1]), flush=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(row) for row in rows)
    out.write_text(f'{{"machine": {json.dumps(machine("cpu"))},\n"rows": [\n{lines}\n]}}\n', encoding="utf-8")


if __name__ == "__main__":
    main()
