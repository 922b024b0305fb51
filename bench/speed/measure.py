"""How a call is timed, what the machine was measured to reach in the same run, and the rows that say so.

Times are median, 20th and 80th percentile in µs a call. Weights are cold: a call finds none of them in the last-level
cache, because calls walk over copies of them that are together four times its size (of what random replacement would
keep, 2 % survive that).

    cuda   device time: one CUDA graph of many calls, timed with events, a sample each replay; beside it the eager wall
           time of a call that is waited for, and the time the host takes to issue one
    cpu    wall time: the contestants take turns, so that what else the machine does meets all of them alike

The roofline is what this machine did in this run, in the fastest fifth of several tries: a large copy, counting bytes
read and written, and a large vendor matmul. Where reading is faster than copying, a share of it may pass 1.
(Longer than 300 lines, as all that the benches share.)
"""

import gc
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "python_api")]  # benches run where the tree lies, installed or not
RESULTS = Path(__file__).parents[1] / "results"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

CALLS_OF_A_GRAPH = 300.0
"""µs of calls in a graph, at least: what launching the graph costs is a few."""
TURNS, FEW_TURNS, TURN = 9, 3, 0.025
"""On a CPU: turns of each contestant, of one that takes half a second, and the seconds of a turn, at least."""


class Contestant(NamedTuple):
    """One way to compute a layer, at one point.

    ``call``: one call, on copy ``i`` of the weights that it reads; None where it was left out, as ``note`` says.
    ``copies``: of those weights. ``held``: bytes kept for all models stored. ``bytes``, ``flops``: what one call must
    read and write, and compute (design, section 4).
    ``rows``: the row of the output that answers each row of x; None where the output is not that layer's.
    ``recreated``: whether it is our own re-creation of what another system does.
    """

    op: str
    call: Callable[[int], Tensor] | None
    copies: int = 1
    held: int = 0
    bytes: int = 0
    flops: int = 0
    rows: Tensor | None = None
    note: str = ""
    recreated: bool = False
    path: str | None = None
    tile: str | None = None


class Times(NamedTuple):
    """Of one call, in µs. ``eager``: wall time until its result is there; ``host``: until it is issued."""

    median: float
    p20: float
    p80: float
    eager: float
    host: float | None = None


class Roofline:
    """What a device did in this run: ``bytes_per_s`` of a copy, ``flops_per_s`` of a vendor matmul in a dtype."""

    def __init__(self, device: str, *, tiny: bool = False) -> None:
        self.device, self.tiny = device, tiny
        source = torch.empty(
            2**20 if tiny else (2**30 if device == "cuda" else 2**28), dtype=torch.uint8, device=device
        )
        target = source.random_(0, 255).clone()
        self.bytes_per_s = 2 * source.numel() / fast_fifth(lambda: target.copy_(source), device)
        self.flops_per_s = lru_cache(self._flops_per_s)

    def _flops_per_s(self, dtype: str) -> float:
        size = 128 if self.tiny else (8192 if self.device == "cuda" else 2048)
        a, b = torch.randn((2, size, size), device=self.device).to(DTYPES[dtype])
        return 2 * size**3 / fast_fifth(lambda: a @ b, self.device)

    def microseconds(self, contestant: Contestant, dtype: str) -> float:
        """The least time that one call can take."""
        return 1e6 * max(contestant.bytes / self.bytes_per_s, contestant.flops / self.flops_per_s(dtype))


def fast_fifth(call: Callable[[], object], device: str) -> float:
    """Seconds of a call: the 20th percentile of several."""
    if device == "cuda":
        return 1e-6 * gpu_times(lambda _: call(), 1, CALLS_OF_A_GRAPH / 5, wall=False).p20
    seconds = []
    for _ in range(10):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return percentiles(seconds[1:])[1]


def synchronize(device: str) -> None:
    """Wait for all that was issued."""
    if device == "cuda":
        torch.cuda.synchronize()


def gpu_times(call: Callable[[int], object], copies: int, expected: float, *, wall: bool = True) -> Times:
    """A call on a GPU, with weights cold. ``expected``: its time in µs, roughly. ``wall``: measure eager times too."""
    calls = copies * math.ceil(max(1.0, CALLS_OF_A_GRAPH / expected) / copies)
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for i in range(2):  # compiles, and lets the libraries set themselves up
            call(i % copies)
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(calls):
            call(i % copies)
    for _ in range(2):
        graph.replay()
    torch.cuda.synchronize()
    start = time.perf_counter()
    graph.replay()
    torch.cuda.synchronize()
    replays = min(100, max(10, int(0.06 / (time.perf_counter() - start))))
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(replays)]
    for begin, end in marks:
        begin.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    samples = [1e3 * begin.elapsed_time(end) / calls for begin, end in marks]
    del graph
    return Times(*percentiles(samples), *(eager_times(call, copies) if wall else (math.nan, None)))


def eager_times(call: Callable[[int], object], copies: int, calls: int = 20) -> tuple[float, float]:
    """Median wall time in µs of a call that is waited for, and of issuing one."""
    waited = []
    for i in range(calls):
        start = time.perf_counter()
        call(i % copies)
        torch.cuda.synchronize()
        waited.append(1e6 * (time.perf_counter() - start))
    issued = []
    for i in range(calls):
        start = time.perf_counter()
        call(i % copies)
        issued.append(1e6 * (time.perf_counter() - start))
    torch.cuda.synchronize()
    return statistics.median(waited), statistics.median(issued)


def cpu_times(contestants: Sequence[Contestant], *, turns: int = TURNS, turn: float = TURN) -> list[Times]:
    """Calls on a CPU, the contestants taking turns."""
    repeats = []
    for one in contestants:
        assert one.call is not None
        one.call(0)
        start = time.perf_counter()
        one.call(one.copies - 1)
        repeats.append(turn / (time.perf_counter() - start))
    samples: list[list[float]] = [[] for _ in contestants]
    for number in range(turns):
        for one, wanted, found in zip(contestants, repeats, samples, strict=True):
            if wanted < turn / 0.5 and number >= FEW_TURNS:
                continue
            calls = max(1, math.ceil(wanted))
            start = time.perf_counter()
            for i in range(calls):
                one.call(i % one.copies)  # type: ignore[misc]
            found.append(1e6 * (time.perf_counter() - start) / calls)
    return [Times(*percentiles(found), eager=statistics.median(found)) for found in samples]


def percentiles(samples: list[float]) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile."""
    fifths = statistics.quantiles(samples, n=5, method="inclusive")
    return statistics.median(samples), fifths[0], fifths[3]


def copies_for(read: int, device: str) -> int:
    """How many copies of ``read`` bytes are together four times the last-level cache."""
    return max(1, math.ceil(4 * cache_bytes(device) / read))


@lru_cache
def cache_bytes(device: str) -> int:
    """Of the last-level cache."""
    if device == "cuda":
        return int(torch.cuda.get_device_properties(0).L2_cache_size)
    sizes = sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"))
    return max((int(size.read_text().strip("K\n")) << 10 for size in sizes), default=32 << 20)


def free_bytes(device: str) -> int:
    """Memory that a measurement may take: three quarters of what is free."""
    if device == "cuda":
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info()[0] * 3 // 4)
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * 3 // 4


def peak_bytes(call: Callable[[], object], device: str) -> int:
    """The most memory that one call has allocated at a time, its result included."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        call()
    allocated = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            allocated += event.nbytes()
            peak = max(peak, allocated)
    return peak


def machine(device: str, commit: str | None = None) -> dict[str, Any]:
    """What every row says of where and when it was measured. ``commit``: given where there is no git."""
    gpu = device == "cuda"
    return {
        "device": torch.cuda.get_device_name() if gpu else processor(),
        "threads": None if gpu else torch.get_num_threads(),
        "driver": output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if gpu else None,
        "torch": torch.__version__,
        "triton": triton_version(),
        "commit": commit or current_commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    }


def processor() -> str:
    """The CPU's own name."""
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


def triton_version() -> str | None:
    """None where there is no Triton, which a CPU does not need."""
    try:
        import triton
    except ImportError:
        return None
    return str(triton.__version__)


def current_commit() -> str | None:
    """The commit's first twelve digits, and whether the code has changed since."""
    commit = output_of("git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD")
    changed = commit and output_of("git", "-C", str(ROOT), "status", "--porcelain", "randes_kernels")
    return f"{commit} and changes" if changed else commit


def output_of(*command: str) -> str | None:
    """What a command printed; None where it cannot run."""
    try:
        run = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return run.stdout.strip()


def folder_name(device: str) -> str:
    """Of the results: ``cpu``, or the product's name, ``nvidia-h200``."""
    return torch.cuda.get_device_name().lower().replace(" ", "-") if device == "cuda" else "cpu"


def prepare() -> None:
    """No gradients, and no garbage collection over what imports have left: capturing a graph starts one."""
    torch.set_grad_enabled(False)
    gc.collect()
    gc.freeze()


def check_interpreter() -> None:
    """Raise ``RuntimeError`` where Triton's interpreter runs no kernel: 3.6's breaks with NumPy 2.4 and later."""
    numpy, triton = (tuple(map(int, metadata.version(name).split(".")[:2])) for name in ("numpy", "triton"))
    if triton < (3, 7) and numpy >= (2, 4):
        raise RuntimeError("Triton 3.6's interpreter needs a NumPy before 2.4: a dry run is not possible here")


def write_rows(path: Path, rows: Sequence[dict[str, Any]], left_out: Sequence[str] = ()) -> None:
    """A row a line, so that a change of one is a change of one line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_text(f'{{"left_out": {json.dumps(left_out)}, "rows": [\n{lines}\n]}}\n', encoding="utf-8")


def short(value: Any) -> Any:
    """Floats to four significant digits: more were not measured."""
    return float(f"{value:.4g}") if isinstance(value, float) else value


class Trials:
    """Which trial is under way, in a file that outlives the process: what ended one is ``fatal`` and not tried again.

    A CUDA error may stick: nothing else runs in that process then, and in the next one it would meet the same point.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        begun, ended = ({line[2:] for line in lines if line.startswith(mark)} for mark in "+-")
        self.fatal = begun - ended

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        """Around a trial: what raises has ended the process."""
        self._write("+", name)
        yield
        self._write("-", name)

    def _write(self, mark: str, name: str) -> None:
        with self.file.open("a", encoding="utf-8") as out:
            out.write(f"{mark} {name}\n")


def say(what: str) -> None:
    """A line, with the time: a log that is cut off shows how far it came."""
    print(f"{time.strftime('%H:%M:%S')} {what}", flush=True)


@contextmanager
def progress(total: int) -> Iterator[Callable[[str], None]]:
    """Says what is being measured: a bar on a terminal where rich is installed, else a line each."""
    try:
        from rich.progress import Progress
    except ImportError:
        Progress = None  # type: ignore[assignment,misc]
    if Progress is None or not sys.stdout.isatty():
        done = iter(range(1, total + 1))
        yield lambda what: say(f"{next(done, total)}/{total} {what}")
        return
    with Progress() as bars:
        task = bars.add_task("", total=total)
        yield lambda what: bars.update(task, advance=1, description=what)
