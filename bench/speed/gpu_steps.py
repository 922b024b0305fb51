"""What ``on_gpu.py`` runs in processes of their own, so that none of them takes the others along.

python bench/speed/gpu_steps.py look FOLDER        versions, the rate of a large copy, of an 8192³ product: look.json
python bench/speed/gpu_steps.py profile FOLDER     four kinds of launches under torch's profiler: profile-*.txt, .json
python bench/speed/gpu_steps.py calls FOLDER       one call of each kernel in each mode, for compute-sanitizer
"""

import argparse
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import measure
import torch
from layers import Layer, Point

sys.path.append(str(measure.ROOT / "tests" / "kernels"))  # for the cases
POINTS = {
    "decode 8": Point((4096, 4096), 8),
    "decode 64": Point((4096, 4096), 64),
    "decode 8 in 4 bits": Point((4096, 4096), 8, bits=4),
    "prefill": Point((4096, 4096), 2048, mix="identical", run=2048),
}
PACKAGES = ("torch", "triton", "numpy", "transformers", "pytest")


def look(folder: Path, device: str) -> None:
    """The machine, and what it reaches."""
    found = measure.machine(device) | {"python": platform.python_version(), "processors": os.cpu_count()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    roofline = measure.Roofline(device, tiny=device == "cpu")
    found["copy_gb_per_s"] = measure.short(roofline.bytes_per_s / 1e9)
    found["matmul_tflops"] = measure.short(roofline.flops_per_s("bf16" if device == "cuda" else "fp32") / 1e12)
    if device == "cuda":
        found["smi"] = measure.output_of("nvidia-smi", "-q", "-d", "CLOCK,POWER")
    (folder / "look.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    measure.say(f"{found['copy_gb_per_s']} GB/s copied, {found['matmul_tflops']} TFLOP/s multiplied")


def profile(folder: Path, device: str) -> None:
    """Which kernels a call launches, and how long each of them takes."""
    from kernels import superposed

    kinds = [torch.profiler.ProfilerActivity.CPU]
    kinds += [torch.profiler.ProfilerActivity.CUDA] if device == "cuda" else []
    for name, point in POINTS.items():
        if device == "cpu":
            point = replace(point, shape=(96, 64), m=min(point.m, 64), run=min(point.run, 64), dtype="fp32")
        call = superposed(Layer(point, device)).call
        assert call is not None
        for _ in range(3):
            call(0)
        measure.synchronize(device)
        with torch.profiler.profile(activities=kinds, record_shapes=True) as held:
            call(0)
            measure.synchronize(device)
        table = held.key_averages().table(sort_by=f"{device}_time_total", row_limit=20)
        file = folder / f"profile-{name.replace(' ', '-')}.txt"
        file.write_text(f"{point}\n{table}\n", encoding="utf-8")
        held.export_chrome_trace(str(file.with_suffix(".json")))
        measure.say(f"profiled {name}")


def calls(_: Path, device: str) -> None:
    """Shapes that are no multiples of a tile; compared with the reference, for good measure."""
    from cases import basis_of, basis_product, packed_case, retrieved_product, root_mean_square, unpacked

    from randes_kernels import Transform, gpu
    from randes_kernels.packing import BITS, operands

    def compare(name: str, y: torch.Tensor, right: torch.Tensor) -> None:
        error = root_mean_square(y.cpu().double() - right) / root_mean_square(right)
        assert error < 2e-2, (name, error)
        print(f"called {name}", flush=True)

    few, many = (33, 300) if device == "cuda" else (9, 130)
    for name, case, transposed in kinds(few, many, device):
        y = gpu.superposed_linear(*case.to(device), transposed)
        compare(f"{name}, transposed: {transposed}", y, retrieved_product(case, transposed))
    for bits in BITS:
        for rows, runs in ((few, None), (many, 1)):
            case = packed_case(bits, rows, 45, 200, Transform(), models=2, runs=runs, dtype=torch.float16)
            x, weight, bias, biases, held, *rest = case.to(device)
            y = gpu.superposed_linear(x, weight, bias, biases, held.words, *rest, False, *operands(held))
            compare(f"{bits} bits, {rows} rows", y, retrieved_product(unpacked(case)))
    for rows, rank in ((few, 4), (few, 40), (many, 16)):
        (case,) = (one for _, one, _ in kinds(rows, rows, device, only="two-sided"))
        basis = basis_of(case, rank)
        x, weight, bias, biases, delta, *rest = case.to(device)
        own = (part.to(device) for part in basis)
        y = gpu.superposed_linear(x, weight, bias, biases, delta, *rest, False, None, [], *own)
        compare(f"a basis of {rank}, {rows} rows", y, basis_product(case, basis))
    for transform in (Transform(), Transform(granule=1)):
        base, tuned = torch.randn((2, 45, 70), device=device).half()
        summed = torch.zeros((45, 70), dtype=torch.int32, device=device)
        gpu.superpose_(summed, tuned, base, 100.0, 3, 4, transform, False)
        gpu.retrieve(base, summed, 0.01, 3, 4, transform)
        print(f"called superpose_ and retrieve, {transform}", flush=True)
    measure.synchronize(device)


def kinds(few: int, many: int, device: str, only: str = "") -> Iterator[tuple[str, Any, bool]]:
    """Layers that meet each path and mode; of one name ``only`` forward."""
    from cases import linear_case

    from randes_kernels import Transform

    half = torch.bfloat16 if device == "cuda" else torch.float16
    for transposed in (False, True):
        options: dict[str, Any] = {"dtype": half, "transposed": transposed, "bias": not transposed}
        for name, transform in (("two-sided", Transform()), ("permuted", Transform(granule=1))):
            if not only or (name == only and not transposed):
                yield name, linear_case(few, 45, 70, transform, **options), transposed
        if not only:
            yield "prompts of one model", linear_case(many, 72, 136, models=1, slots=1, runs=2, **options), transposed
    if not only:
        yield "rows to be grouped", linear_case(many, 72, 136, models=1, slots=1, dtype=half), False
        yield "split K", linear_case(3, 40, 8200 if device == "cuda" else 130, dtype=half), False
        yield "fp32", linear_case(few, 45, 70), False


STEPS = {"look": look, "profile": profile, "calls": calls}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=STEPS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on a CPU, in Triton's interpreter")
    given = parser.parse_args()
    if given.dry_run:
        if given.step == "calls":
            measure.check_interpreter()
        os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are imported
    given.folder.mkdir(parents=True, exist_ok=True)
    measure.prepare()
    STEPS[given.step](given.folder, "cpu" if given.dry_run else "cuda")


if __name__ == "__main__":
    main()
