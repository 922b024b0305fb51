"""Everything that needs a GPU, on a fresh machine: tests, benches, tile tuning, the memory checker.

    python bench/on_gpu.py FOLDER                        all four parts, one after another
    python bench/on_gpu.py FOLDER bench --minutes 8      one part; run it again to go on with the rows that are left
    python bench/on_gpu.py FOLDER --dry-run              the same on tiny shapes on a CPU, in under a minute

Needs torch, Triton, NumPy, pytest and pytest-benchmark, and installs nothing: the code runs where it lies. Each part is
a process that ends by itself inside ``--minutes``; what it had no time for is named. FOLDER then holds

    parts.json         a row for each part that was run: how it ended, how long it took, what it left out
    tests-*.log        what pytest said
    kernels.json       the rows of bench/kernels.py, which bench/plots.py draws
    tune.json, <device>.json    the trials and the table that bench/tune.py chose
    memcheck.log       what compute-sanitizer said of one call of each kernel, with shapes that are no multiples
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import measure
from measure import ROOT

GRACE = 25.0
"""Seconds before the end at which a part's process starts nothing new; after it, it is ended."""
SHARES = 4
"""Processes that the tests are shared among."""


class Run(NamedTuple):
    """What a part is given."""

    folder: Path
    seconds: float
    commit: str | None
    dry: bool


def execute(run: Run, log: str, *command: str, **variables: str) -> tuple[int | None, str]:
    """A process of this Python with the code on its path: its exit status, None past its time, and its output."""
    paths = os.pathsep.join((str(ROOT), str(ROOT / "python_api"), str(ROOT / "bench"), str(ROOT / "tests")))
    environment = os.environ | {"PYTHONPATH": paths, "PYTHONUNBUFFERED": "1"} | variables
    file = run.folder / log
    with file.open("w", encoding="utf-8") as out:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status: int | None = process.wait(run.seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # its own group: it and what it started
            process.wait()
            status = None
    return status, file.read_text(encoding="utf-8", errors="replace")


def tests(run: Run) -> dict[str, Any]:
    """``pytest -m gpu`` on the test files that have such tests and import here."""
    start = time.monotonic()
    marked = [path for path in sorted((ROOT / "tests").glob("test_*.py")) if "mark.gpu" in path.read_text("utf-8")]
    able, unable = [], {}
    for path in marked:
        status, output = execute(run, "tests.log", sys.executable, "-c", f"import {path.stem}")
        if status == 0:
            able.append(str(path))
        else:
            unable[path.name] = output.strip().splitlines()[-1] if output.strip() else str(status)
    pytest = (sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider")
    status, output = execute(run, "tests.log", *pytest, "--collect-only", *able)
    found = [line for line in output.splitlines() if line.startswith("tests/") and "::" in line]
    row = {"files": [Path(path).name for path in able], "left_out": unable, "tests": len(found)}
    if run.dry:
        return {"passed": status in (0, 5), "said": last_line(output, status)} | row  # 5: none, where there is no GPU
    # Most of the time goes into compiling kernels, on one core each.
    left = run._replace(seconds=max(1.0, run.seconds - (time.monotonic() - start)))
    shares = [found[first::SHARES] for first in range(min(SHARES, len(found)))]
    with ThreadPoolExecutor(SHARES) as pool:
        jobs = [
            pool.submit(execute, left, f"tests-{i}.log", *pytest, "--durations=5", *share)
            for i, share in enumerate(shares)
        ]
        ended = [job.result() for job in jobs]
    passed = bool(found) and all(status == 0 for status, _ in ended)
    return {"passed": passed, "said": [last_line(output, status) for status, output in ended]} | row


def bench(run: Run) -> dict[str, Any]:
    """The rows of bench/kernels.py, those that are not in the folder yet."""
    script = [sys.executable, str(ROOT / "bench/kernels.py"), "--resume", "--device", "cpu" if run.dry else "cuda"]
    return measured(run, "bench.log", script, "kernels.json")


def tune(run: Run) -> dict[str, Any]:
    """The table of bench/tune.py."""
    return measured(run, "tune.log", [sys.executable, str(ROOT / "bench/tune.py")], "tune.json")


def measured(run: Run, log: str, script: list[str], rows: str) -> dict[str, Any]:
    """A script that keeps the time itself, and the rows that it left."""
    minutes = max(0.1, (run.seconds - GRACE) / 60)
    options = ["--out", str(run.folder), "--minutes", f"{minutes:.2f}"]
    options += ["--commit", run.commit] if run.commit else []
    status, output = execute(run, log, *script, *options, *(["--dry-run"] if run.dry else []))
    file = run.folder / rows
    found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"rows": [], "left_out": []}
    return {
        "passed": status == 0, "said": "" if status == 0 else last_line(output, status), "rows": len(found["rows"]),
        "left_out": found["left_out"],
    }  # fmt: skip


def memcheck(run: Run) -> dict[str, Any]:
    """compute-sanitizer over one call of each kernel."""
    calls = [sys.executable, str(Path(__file__)), str(run.folder), "calls"]
    if run.dry:
        status, output = execute(run, "memcheck.log", *calls, TRITON_INTERPRET="1")
        return {"passed": status == 0, "said": last_line(output, status)}
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if tool is None:
        return {"passed": None, "said": "compute-sanitizer is not on the PATH: nothing was checked"}
    # Without a caching allocator each tensor is an allocation of its own, and what lies beyond its end is an error.
    alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    status, output = execute(run, "memcheck.log", tool, "--tool", "memcheck", "--error-exitcode", "9", *calls, **alone)
    summary = re.search(r"ERROR SUMMARY: (\d+) errors?", output)
    return {
        "passed": status == 0 and summary is not None and summary[1] == "0",
        "said": summary[0] if summary else last_line(output, status), "calls": output.count("called "),
    }  # fmt: skip


def calls(run: Run) -> dict[str, Any]:
    """One call of each kernel in each mode, with shapes that are no multiples of a tile; compared, for good measure."""
    import torch
    from cases import LinearCase, linear_case, root_mean_square

    from randes_kernels import Transform, gpu, reference
    from randes_kernels.packing import of_operands

    device = "cuda" if torch.cuda.is_available() else "cpu"
    half = torch.bfloat16 if device == "cuda" else torch.float16
    few, many = (9, 130) if device == "cpu" else (33, 300)
    kinds: list[tuple[str, LinearCase, bool]] = []
    for transposed in (False, True):
        for name, transform in (("two-sided", Transform()), ("permuted", Transform(granule=1))):
            kinds.append((name, linear_case(few, 45, 70, transform, dtype=half, transposed=transposed), transposed))
        prompts = linear_case(many, 72, 136, models=1, slots=1, runs=2, dtype=half, transposed=transposed)
        kinds.append(("prompts of one model", prompts, transposed))
    kinds.append(("rows to be grouped", linear_case(many, 72, 136, models=1, slots=1, dtype=half), False))
    kinds.append(("split K", linear_case(3, 40, 130 if device == "cpu" else 8200, dtype=half), False))
    kinds.append(("fp32", linear_case(33, 45, 70), False))
    for name, case, transposed in kinds:
        held = case.to(device)
        y = gpu.superposed_linear(*held, transposed).cpu().float()
        weight, delta = (held.weight.mT, held.delta.mT) if transposed else (held.weight, held.delta)
        packed = of_operands(delta, None, (), delta.shape[2])
        plan = gpu.plan_of(held.x, weight, packed, held.ids, held.keys, case.transform.granule > 0)
        if not transposed:
            right = reference.superposed_linear(*case.to(torch.float32))
            error = root_mean_square(y - right) / root_mean_square(right)
            assert error < 2e-2, (name, error)
        print(f"called {name}, transposed: {transposed}, {plan.path}", flush=True)
    for transform in (Transform(), Transform(granule=1)):
        base, tuned = torch.randn((2, 45, 70), device=device).to(half)
        summed = torch.zeros((45, 70), dtype=torch.int32, device=device)
        gpu.superpose_(summed, tuned, base, 100.0, 3, 4, transform, False)
        gpu.retrieve(base, summed, 0.01, 3, 4, transform)
        print(f"called superpose_ and retrieve, {transform}", flush=True)
    if device == "cuda":
        torch.cuda.synchronize()
    return {}


def last_line(output: str, status: int | None) -> str:
    """What a process said last."""
    said = output.strip().splitlines()
    return (said[-1][:300] if said else "nothing") + ("" if status is not None else " (ended by its time limit)")


PARTS: dict[str, Callable[[Run], dict[str, Any]]] = {"tests": tests, "bench": bench, "tune": tune, "memcheck": memcheck}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="for results")
    parser.add_argument("parts", nargs="*", help=f"default: {' '.join(PARTS)}")
    parser.add_argument("--minutes", type=float, default=8.5, help="in which each part ends")
    parser.add_argument("--commit", help="of the code, where there is no git")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on a CPU")
    given = parser.parse_args()
    folder = given.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    run = Run(folder, 60 * given.minutes, given.commit, given.dry_run)
    if given.parts == ["calls"]:  # what memcheck starts
        calls(run)
        return
    unknown = set(given.parts) - set(PARTS)
    if unknown:
        parser.error(f"parts must be of {', '.join(PARTS)}, got {', '.join(sorted(unknown))}")
    facts = measure.machine("cpu" if given.dry_run else "cuda", given.commit)
    file = folder / "parts.json"
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"] if file.exists() else []
    for name in given.parts or PARTS:
        start = time.monotonic()
        row = {"part": name} | PARTS[name](run) | {"seconds": round(time.monotonic() - start, 1)} | facts
        rows.append(row)
        measure.write_rows(file, rows)
        shown = {key: value for key, value in row.items() if key not in facts}
        print(json.dumps(shown, ensure_ascii=False), flush=True)


if __name__ == "__main__":
    main()
