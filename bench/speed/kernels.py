"""The superposed linear, timed beside its baselines: one JSON row for each at each point.

    python bench/speed/kernels.py --device cuda            every point, to bench/results/<device>/kernels.json
    python bench/speed/kernels.py --device cpu             the smaller selection for a CPU
    pytest bench/speed/kernels.py                          a few points under pytest-benchmark

The full product of shapes, rows, models, mixes, transforms and dtypes is far too large. What is measured is

    star    from two centres (o_proj of Llama-3-8B; 8 rows of 8 models, and 2048 rows of one) one axis at a time:
            models, mix, transform, dtype, groups, runs; beside every baseline
    grid    every shape by every M, two-sided signs, 8 models: all of them in the batch up to 64 rows, one above;
            beside the few baselines that matter most
    cpu     four shapes by four M in fp32 and bf16; the first centre and an axis of models beside every baseline

Above 64 rows a mixed batch comes in prompts of 256 rows, one id each, or in runs of one row where the point says so.
"""

import argparse
import json
import time
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

import measure
import pytest
import torch
from baselines import EACH, FLOOR, baselines
from layers import MIXES, TENSOR, TRANSFORMS, Layer, Point
from measure import RESULTS, Contestant, Roofline, Times, short

from randes_kernels import cpu, superposed_linear
from randes_kernels.packing import BITS, of_operands

SHAPES = {
    "Llama-3-8B": ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)),
    "Qwen2.5-7B": ((37888, 3584), (3584, 18944)),
    "ViT-L/14": ((1024, 1024), (4096, 1024), (1024, 4096)),
    "ViT-B/32": ((768, 768), (2304, 768), (3072, 768), (768, 3072)),
    "odd": ((3424, 3424),),
}
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 2048, 8192)
OP = "superposed linear"
DECODE = Point((4096, 4096), 8)
CROWD = Point((4096, 4096), 64, models=64)
PREFILL = Point((4096, 4096), 2048, mix="identical", run=256)
Points = list[tuple[Point, str]]


def star() -> Points:
    """Around the centres, one axis at a time, each point with the baselines beside it."""
    points = [(DECODE, "compiled"), (PREFILL, "compiled"), (replace(CROWD, models=8), "compiled")]
    points += [(replace(CROWD, models=models), "all") for models in (2, 16, 64)]
    points += [(replace(CROWD, models=models, groups=models // 8), "few") for models in (16, 64)]
    points += [(replace(DECODE, transform=transform), "compiled") for transform in TRANSFORMS]
    points += [(replace(centre, mix=mix), "all") for mix in MIXES for centre in (DECODE, CROWD, PREFILL)]
    points += [(replace(PREFILL, mix=mix, run=1), "few") for mix in ("distinct", "zipf-1.5")]
    points += [(replace(centre, transform=transform), "all") for transform in TRANSFORMS for centre in (CROWD, PREFILL)]
    points += [(replace(DECODE, shape=shape), "all") for shape in SHAPES["Llama-3-8B"]]
    points += [(replace(centre, dtype=dtype), "few") for dtype in ("fp16", "fp32") for centre in (DECODE, PREFILL)]
    points += [(replace(centre, bits=bits), "few") for bits in BITS for centre in (DECODE, PREFILL)]
    return points


def grid() -> Points:
    """Every shape by every number of rows."""
    shapes = [shape for family in SHAPES.values() for shape in family]
    return [(at_rows(Point(shape, m)), "few") for shape, m in product(shapes, ROWS)]


def on_cpu() -> Points:
    """What a CPU is measured on."""
    shapes = ((4096, 4096), (3072, 768), (768, 3072), (1024, 4096))
    points = [(replace(DECODE, dtype=dtype), "compiled") for dtype in ("fp32", "bf16")]
    crowd = Point((1024, 4096), 64, dtype="fp32")
    points += [(replace(crowd, models=models), "all") for models in (2, 8, 16, 64)]
    points += [(replace(crowd, models=models, groups=models // 8), "few") for models in (16, 64)]
    for dtype, shape, m in product(("fp32", "bf16"), shapes, (1, 8, 64, 512)):
        points.append((at_rows(Point(shape, m, dtype=dtype)), "few"))
    for dtype, bits, m in product(("bf16", "fp32"), BITS, (1, 8, 64, 512)):
        points.append((at_rows(Point((4096, 4096), m, dtype=dtype, bits=bits)), "few"))
    return points


def tiny() -> Points:
    """A dry run: every kind of point and baseline on shapes that cost nothing."""
    points: dict[Point, str] = {}
    for point, rivals in star():
        small = replace(point, shape=(96, 64), m={8: 8, 64: 16, 2048: 128}[point.m], run=min(point.run, 16))
        small = replace(small, models=min(point.models, 4), groups=min(point.groups, 2))
        points.setdefault(small, "all" if rivals == "compiled" else rivals)
    return [*points.items(), *((at_rows(Point((70, 45), m, dtype="fp32")), "few") for m in (1, 128))]


def at_rows(point: Point) -> Point:
    """The mix that so many rows stand for: a decode batch of all models, or prompts of one."""
    return point if point.m <= 64 else replace(point, mix="identical", run=min(point.m, 256))


def quick() -> Points:
    """The four layers of Llama-3-8B from one row to thousands: a first look."""
    shapes, rows = SHAPES["Llama-3-8B"], (1, 8, 64, 512, 2048, 8192, 16, 32, 128)
    return [(at_rows(Point(shape, m)), "few") for m, shape in product(rows, shapes)]


SELECTIONS = {"star": star, "grid": grid, "cpu": on_cpu, "tiny": tiny, "quick": quick}


def superposed(layer: Layer) -> Contestant:
    """What is measured: ``randes_kernels.superposed_linear``."""
    x, rest = layer.x, (layer.ids, layer.keys, layer.scale, layer.slots, TENSOR, layer.transform)
    path, tile = path_and_tile(layer)
    one_product = path == "weight side" or not layer.slots_read
    return Contestant(
        OP, lambda i: superposed_linear(x, layer.weights[i], None, layer.deltas[i], *rest), len(layer.deltas),
        held=layer.unit + layer.point.groups * layer.delta_bytes + 16 * layer.point.models,
        bytes=layer.traffic(1 + layer.slots_read * layer.delta_bytes / layer.unit),
        flops=layer.flops(1 if one_product else 2),
        rows=torch.arange(layer.point.m, device=layer.device), path=path, tile=tile,
    )  # fmt: skip


def path_and_tile(layer: Layer) -> tuple[str, str | None]:
    """Which side the call runs on and, on a GPU, the tile that it chose: rows × columns × depth, warps, stages."""
    if layer.device == "cuda":
        from randes_kernels import gpu

        permuted = layer.transform.granule > 0
        held = layer.deltas[0]
        packed = of_operands(held, None, (), layer.point.shape[1]) if isinstance(held, torch.Tensor) else held
        plan = gpu.plan_of(layer.x, layer.weights[0], packed, layer.ids, layer.keys, permuted)
        tile = plan.tile
        modes = [mode.replace("_", " ") for mode in ("turn_first", "grouped", "bulk") if getattr(plan, mode)]
        modes += [f"{plan.parts} parts"] if plan.parts > 1 else []
        return plan.path, " ".join((f"{tile.m}×{tile.n}×{tile.k} w{tile.warps} s{tile.stages}", *modes))
    enough = cpu.weight_side_rows(layer.dtype, layer.transform)
    rebuilt = {model >= 0 and end - first >= enough for model, first, end in layer.parts}
    return "both sides" if len(rebuilt) == 2 else "weight side" if True in rebuilt else "activation side", None


def measure_point(point: Point, rivals: str, device: str, roofline: Roofline) -> list[dict[str, Any]]:
    """The rows of one point: the superposed linear, then its baselines."""
    layer = Layer(point, device)
    contestants = [superposed(layer), *baselines(layer, rivals)]
    notes = {one.op: one.note for one in contestants}
    times: dict[str, Times] = {}
    able = []
    for one in contestants:
        if one.call is None:
            continue
        try:
            one.call(0)
            if device == "cuda":
                expected = roofline.microseconds(one, point.dtype)
                times[one.op] = measure.gpu_times(one.call, one.copies, expected)
        except Exception as failure:
            measure.synchronize(device)  # raises where a GPU is past using
            notes[one.op] = f"failed: {type(failure).__name__}: {str(failure)[:200]}"
        else:
            able.append(one)
    if device == "cpu":
        turns, turn = (2, 1e-4) if roofline.tiny else (measure.TURNS, measure.TURN)
        times = {
            one.op: found for one, found in zip(able, measure.cpu_times(able, turns=turns, turn=turn), strict=True)
        }
    facts = facts_of(layer)
    return [
        facts
        | {"op": one.op, "path": one.path, "tile": one.tile, "recreated": one.recreated, "note": notes[one.op]}
        | results(one, layer, roofline, times)
        for one in contestants
    ]


def facts_of(layer: Layer) -> dict[str, Any]:
    """The point's coordinates, flat, and what they come to."""
    point, (n, k) = layer.point, layer.point.shape
    family = next((name for name, shapes in SHAPES.items() if point.shape in shapes), None)
    coordinates = {name: value for name, value in asdict(point).items() if name != "shape"}
    return {"shape": f"{n}x{k}", "family": family, "n": n, "k": k, **coordinates, "active": len(layer.active)}


def results(one: Contestant, layer: Layer, roofline: Roofline, times: dict[str, Times]) -> dict[str, Any]:
    """What was measured of a contestant, None where it was left out: times in µs, bytes, FLOPs, shares, errors."""
    took, floor, each = times.get(one.op), times.get(FLOOR), times.get(EACH)
    each = floor if len(layer.active) == 1 else each
    predicted = roofline.microseconds(one, layer.point.dtype)
    error = peak = None
    if took is not None and one.call is not None:
        call = one.call
        peak = one.held + measure.peak_bytes(lambda: call(0), layer.device)
        error = layer.error(call(0)[one.rows[layer.sampled]]) if one.rows is not None else None
    found = {
        "median_us": took and took.median, "p20_us": took and took.p20, "p80_us": took and took.p80,
        "eager_us": took and took.eager, "host_us": took and took.host,
        "bytes": one.bytes, "flops": one.flops, "predicted_us": predicted,
        "roofline_share": took and predicted / took.median,
        "ratio_to_linear": took and floor and took.median / floor.median,
        "gain_over_materialised": took and each and each.median / took.median,
        "held_bytes": one.held, "peak_bytes": peak,
        "error": error, "materialised_error": layer.materialised_error,
        "copy_gb_per_s": roofline.bytes_per_s / 1e9,
        "matmul_tflops": roofline.flops_per_s(layer.point.dtype) / 1e12,
    }  # fmt: skip
    return {name: short(value) for name, value in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--select", nargs="+", choices=SELECTIONS, help="default: star grid, or cpu on a CPU")
    parser.add_argument("--out", type=Path, help="folder; default: bench/results/<device>")
    parser.add_argument("--minutes", type=float, default=60.0, help="start no further point after so many")
    parser.add_argument("--resume", action="store_true", help="keep the rows that are there, measure the rest")
    parser.add_argument("--commit", help="of the code, where there is no git")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes: that everything runs, not how fast")
    given = parser.parse_args()
    deadline = time.monotonic() + 60 * given.minutes
    measure.prepare()
    file = (given.out or RESULTS / measure.folder_name(given.device)) / "kernels.json"
    names = ["tiny"] if given.dry_run else given.select or (["star", "grid"] if given.device == "cuda" else ["cpu"])
    points: dict[Point, str] = {}
    for name in names:
        for point, rivals in SELECTIONS[name]():
            points.setdefault(point, rivals)
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"] if given.resume and file.exists() else []
    roofline, facts = Roofline(given.device, tiny=given.dry_run), measure.machine(given.device, given.commit)
    file.parent.mkdir(parents=True, exist_ok=True)
    begun = file.with_suffix(".begun")
    if not given.resume:
        begun.unlink(missing_ok=True)
    trials = measure.Trials(begun)
    done = {row["point"] for row in rows} | trials.fatal
    left = {point: rivals for point, rivals in points.items() if str(point) not in done}
    with measure.progress(len(left)) as say:
        for point, rivals in list(left.items()):
            if time.monotonic() > deadline:
                break
            say(str(point))
            with trials.of(str(point)):
                found = measure_point(point, rivals, given.device, roofline)
            rows += [{"point": str(point)} | row | facts for row in found]
            del left[point]
            measure.write_rows(file, rows, [str(point) for point in left])
    if trials.fatal:
        measure.say(f"left out, because they ended the process: {sorted(trials.fatal)}")
    print(f"{len(rows)} rows in {file}; left out for want of time: {[str(point) for point in left] or 'nothing'}")


@pytest.mark.parametrize(("m", "op"), [(m, op) for m in (1, 8, 64) for op in (OP, FLOOR, EACH) if m > 1 or op != EACH])
def test_linear(benchmark: Any, m: int, op: str) -> None:
    """Wall time of a call that is waited for, warm: to compare two states of the code on one machine."""
    device, dtype = ("cuda", "bf16") if torch.cuda.is_available() else ("cpu", "fp32")
    layer = Layer(Point((1024, 1024), m, dtype=dtype), device)
    (contestant,) = (one for one in (superposed(layer), *baselines(layer, "few")) if one.op == op)

    def call() -> None:
        assert contestant.call is not None
        contestant.call(0)
        measure.synchronize(device)

    benchmark.extra_info |= {"point": str(layer.point), "path": contestant.path, "tile": contestant.tile}
    benchmark(call)


if __name__ == "__main__":
    main()
