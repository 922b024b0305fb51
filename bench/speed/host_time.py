"""What the host does for one layer's call, beyond its launches: no GPU is needed, and none is used.

    python bench/speed/host_time.py               writes bench/results/cpu/host_time.json; with Triton 3.6

The stand-in driver of ``tests/dry_gpu`` takes the launches, so a call is all Python and Triton. Triton's own share,
which ends in the driver, is measured inside the call and taken off. Of many short rounds the fastest counts: what else
the machine does only ever adds.
"""

import argparse
import json
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import measure
from measure import ROOT

sys.path.append(str(ROOT / "tests" / "dry_gpu"))
import driver

driver.activate()

from layers import TENSOR, Layer, Point  # noqa: E402

from randes_kernels import superposed_linear  # noqa: E402

SHAPE = 1024, 1024
POINTS = {
    "decode, one launch": Point(SHAPE, 8),
    "decode, turned first": Point(SHAPE, 48),
    "decode in 4 bits": Point(SHAPE, 8, bits=4),
    "prefill, descriptors": Point(SHAPE, 2048, mix="identical", run=2048),
    "prefill, grouped": Point(SHAPE, 2048, models=2),
}
CALLS = 10


class Launches:
    """Time and number of Triton's launches."""

    def __init__(self) -> None:
        from triton.runtime.jit import JITFunction

        self.seconds, self.count, launch = 0.0, 0, JITFunction.run

        def run(kernel: Any, *arguments: Any, **options: Any) -> Any:
            start = time.perf_counter()
            result = launch(kernel, *arguments, **options)
            self.seconds += time.perf_counter() - start
            self.count += 1
            return result

        JITFunction.run = run


def host_time(point: Point, launches: Launches, rounds: int) -> dict[str, Any]:
    """µs of a call, of its launches, and of the rest."""
    layer = Layer(replace(point, dtype="bf16"), "cpu")
    rest = layer.ids, layer.keys, layer.scale, layer.slots, TENSOR, layer.transform
    x, weight, delta = layer.x, layer.weights[0], layer.deltas[0]

    def call() -> None:
        superposed_linear(x, weight, None, delta, *rest)

    for _ in range(10):
        call()
    found = []
    for _ in range(rounds):
        launches.seconds, launches.count, start = 0.0, 0, time.perf_counter()
        for _ in range(CALLS):
            call()
        taken = time.perf_counter() - start
        found.append((taken - launches.seconds, taken, launches.count // CALLS))
    beyond, taken, count = min(found)
    median = statistics.median(one[0] for one in found)
    numbers = {"beyond_us": beyond, "median_beyond_us": median, "call_us": taken}
    return {name: measure.short(1e6 * value / CALLS) for name, value in numbers.items()} | {"launches": count}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=measure.RESULTS / "cpu" / "host_time.json")
    parser.add_argument("--rounds", type=int, default=400)
    given = parser.parse_args()
    measure.prepare()
    launches, facts, rows = Launches(), measure.machine("cpu"), []
    for name, point in POINTS.items():
        row = {"point": name, **host_time(point, launches, given.rounds)}
        print(json.dumps(row), flush=True)
        rows.append(row | {"python": sys.version.split()[0]} | facts)
    measure.write_rows(given.out, rows)


if __name__ == "__main__":
    main()
