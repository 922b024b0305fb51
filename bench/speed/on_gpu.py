"""Everything that needs a GPU, in parts that each end inside nine minutes and leave one archive.

    python bench/speed/on_gpu.py 1 --out FOLDER      versions, rates, the GPU tests, a profile, a first bench
    python bench/speed/on_gpu.py 2 --out FOLDER      tiles tuned, what is served most first, and installed
    python bench/speed/on_gpu.py 3 --out FOLDER      the tests with those tiles, a memory check, the benchmarks
    python bench/speed/on_gpu.py 4 --out FOLDER      what is left of tuning and of the benchmarks
    python bench/speed/on_gpu.py 1 --out FOLDER --dry-run     the same on tiny shapes on a CPU

Needs torch, Triton, NumPy and pytest, and installs nothing: the code runs where it lies. Results are kept in
``.cache/on_gpu`` from part to part, and FOLDER gets ``part-<n>.tar.gz``, written anew after each step: unpacked at the
root of a checkout, on this machine or another, it puts the results there and the tuned table into
``randes_kernels/tables``, ready to be committed. A part goes on where the last one ended. In the results

    parts.json                  a row for each step that was run: how it ended, how long it took, what it left out
    look.json, profile-*        the machine; which kernels a call launches
    tests-*.log                 what pytest said in each of its processes
    kernels.json                the rows of bench/speed/kernels.py, which bench/speed/plots.py draws
    tune.json, <device>.json    the trials and the table that bench/speed/tune.py chose
    *.begun                     what was tried: a point that ended its process is not tried again

Each step is a process of its own. One that fails, hangs, or leaves the GPU with an error ends itself alone; a bench or
a tuning that ended so is started again without the point that it was at.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import measure
from measure import ROOT

WORK = ROOT / ".cache" / "on_gpu"
TABLES = ROOT / "randes_kernels" / "tables"
GRACE = 25.0
"""Seconds before its end at which a bench starts nothing new; after it, it is ended."""
CLOSING = 8.0
"""Seconds that the last archive may take."""
SHARDS = 12
"""Processes that the tests are shared among: most of their time goes into compiling kernels, on one core each."""


class Run(NamedTuple):
    """What a step is given. ``seconds``: in which it ends."""

    folder: Path
    seconds: float
    commit: str | None
    dry: bool


class Step(NamedTuple):
    """``seconds``: at most; ``share``: of what the part has left."""

    name: str
    call: Callable[[Run], dict[str, Any]]
    seconds: float = 1e9
    share: float = 1.0


def execute(run: Run, log: str, *command: str, **variables: str) -> tuple[int | None, str]:
    """A process of this Python with the tests on its path: its exit status, None past its time, and its output."""
    paths = os.pathsep.join(str(ROOT / name) for name in ("", "python_api", "bench/speed", "tests", "tests/kernels"))
    environment = os.environ | {"PYTHONPATH": paths, "PYTHONUNBUFFERED": "1"} | variables
    file = run.folder / log
    with file.open("w", encoding="utf-8") as out:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status: int | None = process.wait(max(1.0, run.seconds))
        except subprocess.TimeoutExpired:
            status = None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # its own group: it, and what it started and left
            process.wait()
    return status, file.read_text(encoding="utf-8", errors="replace")


def last_line(output: str, status: int | None) -> str:
    """What a process said last."""
    said = output.strip().splitlines()
    return (said[-1][:300] if said else "nothing") + ("" if status is not None else " (ended by its time limit)")


def own(step: str) -> Callable[[Run], dict[str, Any]]:
    """A step of ``gpu_steps.py``."""

    def call(run: Run) -> dict[str, Any]:
        command = [sys.executable, str(ROOT / "bench/speed/gpu_steps.py"), step, str(run.folder)]
        status, output = execute(run, f"{step}.log", *command, *["--dry-run"] * run.dry)
        return {"passed": status == 0, "said": last_line(output, status)}

    return call


def tests(run: Run) -> dict[str, Any]:
    """``pytest -m gpu``, shared among processes; the log of each says how far it came."""
    start = time.monotonic()
    pytest = (sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", "--tb=short")
    status, output = execute(run, "collect.log", *pytest, "--collect-only")
    found = [line for line in output.splitlines() if line.startswith("tests/") and "::" in line]
    row = {"tests": len(found)}
    if status != 0 or not found:
        # 5: none were found, which is so where there is no GPU.
        return {"passed": run.dry and status == 5, "said": last_line(output, status)} | row
    left = run._replace(seconds=run.seconds - (time.monotonic() - start))
    shards = [found[first::SHARDS] for first in range(min(SHARDS, len(found)))]
    alone = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    with ThreadPoolExecutor(len(shards)) as pool:
        jobs = [
            pool.submit(execute, left, f"tests-{number}.log", *pytest, "-vv", "--durations=5", *shard, **alone)
            for number, shard in enumerate(shards)
        ]
        ended = [job.result() for job in jobs]
    failed = sorted({line for _, output in ended for line in re.findall(r"^(?:FAILED|ERROR) (\S+)", output, re.M)})
    passed = all(status == 0 for status, _ in ended)
    return {"passed": passed, "said": [last_line(output, status) for status, output in ended], "failed": failed} | row


def script(name: str, rows: str, *options: str) -> Callable[[Run], dict[str, Any]]:
    """A bench that keeps the time itself and leaves rows; started again where a point of it ended its process."""

    def call(run: Run) -> dict[str, Any]:
        end, file, restarts = time.monotonic() + run.seconds, run.folder / rows, 0
        while True:
            left = end - time.monotonic()
            minutes = max(0.05, (left - GRACE) / 60)
            command = [
                sys.executable,
                str(ROOT / "bench/speed" / f"{name}.py"),
                "--out",
                str(run.folder),
                "--resume",
                *options,
            ]
            command += ["--minutes", f"{minutes:.2f}", *(["--commit", run.commit] if run.commit else [])]
            command += ["--dry-run"] * run.dry
            status, output = execute(run._replace(seconds=left), f"{name}-{restarts}.log", *command)
            if status in (0, None) or end - time.monotonic() < 2 * GRACE or restarts == 5:
                break
            restarts += 1
        found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"rows": [], "left_out": []}
        return {
            "passed": status == 0, "said": last_line(output, status), "rows": len(found["rows"]),
            "restarts": restarts, "left_out": len(found["left_out"]),
        }  # fmt: skip

    return call


def memory(run: Run) -> dict[str, Any]:
    """compute-sanitizer over one call of each kernel, with packed D and a basis too."""
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    command = [sys.executable, str(ROOT / "bench/speed/gpu_steps.py"), "calls", str(run.folder)]
    if run.dry or tool is None:
        status, output = execute(run, "memory.log", *command, *["--dry-run"] * run.dry)
        said = last_line(output, status) if run.dry else "compute-sanitizer is not there: nothing was checked"
        return {"passed": status == 0 if run.dry else None, "said": said, "calls": output.count("called ")}
    # Without a caching allocator each tensor is an allocation of its own, and what lies beyond its end is an error.
    alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    status, output = execute(run, "memory.log", tool, "--tool", "memcheck", "--error-exitcode", "9", *command, **alone)
    summary = re.search(r"ERROR SUMMARY: (\d+) errors?", output)
    return {
        "passed": status == 0 and summary is not None and summary[1] == "0",
        "said": summary[0] if summary else last_line(output, status), "calls": output.count("called "),
    }  # fmt: skip


TUNE = script("tune", "tune.json", "--install")
BENCH = script("kernels", "kernels.json")
PARTS = {
    "1": (
        Step("look", own("look"), 60),
        Step("tests", tests, 240),
        Step("profile", own("profile"), 60),
        Step("quick bench", script("kernels", "kernels.json", "--select", "quick")),
    ),
    "2": (Step("tune", TUNE),),
    "3": (Step("tests", tests, 200), Step("memory", memory, 100), Step("bench", BENCH)),
    "4": (Step("tune", TUNE, share=0.5), Step("bench", BENCH)),
}


def archive(folder: Path, out: Path, part: str) -> None:
    """The results and the tables, under their paths from the root; in place of the one before only when it is whole."""
    file = out / f"part-{part}.tar.gz"
    half = file.with_suffix(".half")
    with tarfile.open(half, "w:gz", compresslevel=4) as packed:
        packed.add(folder, WORK.relative_to(ROOT))
        packed.add(TABLES, TABLES.relative_to(ROOT))
    half.replace(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--out", type=Path, required=True, help="folder for the archive")
    parser.add_argument("--work", type=Path, default=WORK, help="folder for results, kept from part to part")
    parser.add_argument("--minutes", type=float, default=8.5, help="in which the part ends")
    parser.add_argument("--commit", help="of the code, where there is no git")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on a CPU")
    given = parser.parse_args()
    end = time.monotonic() + 60 * given.minutes - CLOSING
    folder: Path = given.work.resolve()
    for one in (folder, given.out):
        one.mkdir(parents=True, exist_ok=True)
    file = folder / "parts.json"
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"] if file.exists() else []
    for step in PARTS[given.part]:
        start = time.monotonic()
        seconds = min(step.seconds, step.share * (end - start))
        row: dict[str, Any] = {"part": given.part, "step": step.name}
        measure.say(f"part {given.part}: {step.name}, {seconds:.0f} s at most")
        if seconds < 5:
            row |= {"passed": None, "said": "left out for want of time"}
        else:
            try:
                row |= step.call(Run(folder, seconds, given.commit, given.dry_run))
            except Exception as failure:  # the steps after it run all the same
                row |= {"passed": False, "said": f"{type(failure).__name__}: {failure}"}
        row["seconds"] = round(time.monotonic() - start, 1)
        rows.append(row)
        measure.write_rows(file, rows)
        archive(folder, given.out, given.part)
        measure.say(json.dumps(row, ensure_ascii=False))


if __name__ == "__main__":
    main()
