"""Compressing and retrieving checkpoints from disk, beside plainly copying the same bytes.

    python bench/speed/streaming.py                     # 1 GB of bf16 base and 8 fine-tunes in shards
    python bench/speed/streaming.py --bytes 3e8 --models 4 --folder /data

Without shared bases, which take three more readings of the fine-tunes and a small product in each.

Each row: bytes read and written, seconds, processor seconds and peak memory of randes in a process of its own, and
seconds of reading the same input files and writing as many bytes as randes did, flushed to disk. The files leave the
page cache before each, so both read from the disk. Medians of several runs in turn, with the load of the machine beside
them: other processes slow randes, which computes, more than the copy. Rows go to bench/results/cpu/streaming.json.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from randes.checkpoints.safetensors import write_file

RESULTS = Path(__file__).parents[1] / "results" / "cpu" / "streaming.json"
PIECE = 16 << 20
WIDTH, INNER = 2048, 5632
REPEATS = 3

WORKER = """
import json, resource, sys, time
from pathlib import Path
import randes
from randes.checkpoints.safetensors import write_file
kind, base, models, store, out = json.loads(sys.argv[1])
def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))
def processor():
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
Path("/proc/self/clear_refs").write_text("5")  # the peak so far was the imports'
before, used, start = status("VmRSS"), processor(), time.perf_counter()
if kind == "compress":
    randes.compress(base, models, randes.Config(rank=0)).save(store)
else:
    write_file(Path(out), randes.Superposition.load(store, check=False).retrieved("m0"))
seconds = time.perf_counter() - start
print(json.dumps({"seconds": seconds, "processor": processor() - used, "memory": status("VmHWM") - before}))
"""


def make(folder: Path, nbytes: float, models: int) -> None:
    """A base and fine-tunes of it in bf16, in shards of four layers with an index, as Transformers writes them."""
    shapes = {"mlp.up.weight": (INNER, WIDTH), "mlp.down.weight": (WIDTH, INNER), "attn.weight": (2 * WIDTH, WIDTH)}
    layer = 2 * sum(n * k for n, k in shapes.values())
    layers = max(1, round(nbytes / layer))
    noise = torch.randn(1 << 24, generator=torch.Generator().manual_seed(0))
    for model in ("base", *(f"m{number}" for number in range(models))):
        (folder / model).mkdir()
        seed, index = sum(model.encode()), {}
        for shard, first in enumerate(range(0, layers, 4)):
            tensors = {}
            for place in range(first, min(first + 4, layers)):
                for name, (n, k) in shapes.items():
                    start = (place * 7919 + 13 * n) % (1 << 20)
                    value = 0.02 * noise[start : start + n * k]
                    if model != "base":
                        value = value + 0.002 * noise[seed * 31 % (1 << 20) + place :][: n * k]
                    tensors[f"layers.{place}.{name}"] = value.view(n, k).bfloat16()
                tensors[f"layers.{place}.norm.weight"] = torch.ones(WIDTH, dtype=torch.bfloat16)
            file = f"model-{shard:05}.safetensors"
            write_file(folder / model / file, tensors)
            index |= dict.fromkeys(tensors, file)
        (folder / model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def files(*folders: Path) -> list[Path]:
    return [file for folder in folders for file in sorted(folder.rglob("*.safetensors"))]


def forget(paths: list[Path]) -> None:
    """Out of the page cache."""
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def copy(sources: list[Path], written: int, target: Path) -> float:
    """Seconds of reading all of ``sources`` and writing ``written`` bytes."""
    start, memory = time.perf_counter(), memoryview(bytearray(PIECE))
    for source in sources:
        with source.open("rb", buffering=0) as file:
            while file.readinto(memory):
                pass
    with target.open("wb", buffering=0) as file:
        for place in range(0, written, PIECE):
            file.write(memory[: min(PIECE, written - place)])
        os.fsync(file.fileno())
    seconds = time.perf_counter() - start
    target.unlink()
    return seconds


def measure(kind: str, folder: Path, models: int, note: dict[str, object]) -> dict[str, object]:
    """The median of several runs of randes and of the copy, in turn."""
    store, out, scratch = folder / "store", folder / "out.safetensors", folder / "scratch"
    names = [f"m{number}" for number in range(models)]
    request = [kind, str(folder / "base"), {name: str(folder / name) for name in names}, str(store), str(out)]
    sources = files(folder / "base", *(folder / name for name in names)) if kind == "compress" else files(store)
    runs, plain = [], []
    for _ in range(REPEATS):
        if kind == "compress":
            shutil.rmtree(store, ignore_errors=True)
        out.unlink(missing_ok=True)
        forget(sources)
        command = [sys.executable, "-c", WORKER, json.dumps(request)]
        runs.append(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
        written = sum(file.stat().st_size for file in (files(store) if kind == "compress" else [out]))
        forget(sources)
        plain.append(copy(sources, written, scratch))
    ours = [run["seconds"] for run in runs]
    seconds, floor = statistics.median(ours), statistics.median(plain)
    return {
        "what": kind, "models": models, "read_bytes": sum(file.stat().st_size for file in sources),
        "written_bytes": written, "seconds": round(seconds, 2), "copy_seconds": round(floor, 2),
        "share_of_copy": round(floor / seconds, 3), "all_seconds": [round(value, 2) for value in ours],
        "all_copy_seconds": [round(value, 2) for value in plain],
        "processor_seconds": round(min(run["processor"] for run in runs), 2),
        "peak_memory_bytes": max(run["memory"] for run in runs), "load": round(os.getloadavg()[0], 1), **note,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bytes", type=float, default=1e9, help="of one model")
    parser.add_argument("--models", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--folder", type=Path, default=None, help="on the disk to be measured; a temporary one")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    note = {"device": f"{os.cpu_count()} cores, {platform.machine()}", "torch": torch.__version__,
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}  # fmt: skip
    rows = []
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        make(folder, options.bytes, max(options.models))
        for models in options.models:
            for kind in ("compress", "retrieve"):
                rows.append(measure(kind, folder, models, note))
                print(json.dumps(rows[-1]), flush=True)
    options.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
