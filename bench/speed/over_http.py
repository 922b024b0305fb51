"""Requests a second over HTTP: a store in one server, beside one materialised model and a process a model.

    OMP_NUM_THREADS=1 python bench/speed/over_http.py        # 4 fine-tunes of a ViT, needs randes[litserve]
    python bench/speed/over_http.py --models 8 --seconds 20
    python bench/speed/over_http.py --table                  # the committed rows, as docs/litserve.md has them

All are LitServe with our worker's loop and the same clients, ``--clients`` of them: each asks again once it was
answered, for the models in turn. "One materialised model" is asked for that one alone; many models in one server cannot
be faster than that. The three take turns ``--repeats`` times. A row has requests a second, their median and 95th
percentile of seconds, the servers' processor seconds a request, and the memory that is their processes' alone, with the
machine's load: other processes slow requests, but add little to processor seconds. Rows, of medians, go to
bench/results/cpu/over_http.json.
"""

import argparse
import base64
import copy
import http.client
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import measure
import torch
import transformers as hf
from torch import Tensor, nn

import randes
from randes.litserve.replies import Store
from randes.litserve.rows import Rows

RESULTS = Path(__file__).parents[1] / "results" / "cpu" / "over_http.json"
SIZES: dict[str, Any] = {
    "hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 12, "num_attention_heads": 6, "image_size": 96,
    "patch_size": 16, "num_labels": 10,
}  # fmt: skip
SHAPE = (3, 96, 96)
WAYS = ("a store", "one materialised model", "a process a model")


class Plain(nn.Module):
    """One model by itself, in the form that the server asks models in."""

    def __init__(self, module: nn.Module, name: str) -> None:
        super().__init__()
        self.base_model, self.names, self.router = module, [name], SimpleNamespace(versions={name: 0})

    def forward(self, *, adapter_names: Sequence[str], **inputs: Tensor) -> Any:
        return self.base_model(**inputs)


@dataclass(frozen=True)
class OneModel(Store):
    """A Transformers folder, served by itself under its name."""

    def load(self, device: str) -> Rows:
        module: Any = hf.ViTForImageClassification.from_pretrained(self.path)
        plain: Any = Plain(module.eval(), Path(self.path).name)
        return Rows(plain)


def make(folder: Path, models: int) -> None:
    """A base, fine-tunes of it in which every parameter moved, and their store."""
    torch.manual_seed(0)
    base: Any = hf.ViTForImageClassification(hf.ViTConfig(**SIZES))
    base.save_pretrained(folder / "base")
    for number in range(models):
        model = copy.deepcopy(base)
        for value in model.parameters():
            value.data += 0.05 * value.std() * torch.randn_like(value) if value.numel() > 1 else 0
        model.save_pretrained(folder / f"m{number}")
    paths = {f"m{number}": folder / f"m{number}" for number in range(models)}
    randes.compress(folder / "base", paths, randes.Config(rank=0)).save(folder / "store")


@contextmanager
def served(path: Path, batch: int) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    """A server's port and process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    command = [sys.executable, __file__, "--serve", str(path), "--port", str(port), "--batch", str(batch)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        while not _is_up(port):
            if process.poll() is not None:
                raise RuntimeError(f"the server of {path} ended")
            time.sleep(0.2)
        yield port, process
    finally:
        process.terminate()
        process.wait()


def _is_up(port: int) -> bool:
    try:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except OSError:
        return False


def measured(targets: Sequence[tuple[int, str]], clients: int, seconds: float) -> dict[str, float]:
    """targets: port and model, which clients ask in turn."""
    image = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)).numpy()
    tensor = {"dtype": "float32", "shape": list(SHAPE), "data": base64.b64encode(image.tobytes()).decode()}
    bodies = {name: json.dumps({"model": name, "inputs": {"pixel_values": tensor}}) for _, name in targets}
    ends = time.perf_counter() + seconds

    def client(first: int) -> list[float]:
        turns, connections, found = cycle([*targets[first:], *targets[:first]]), {}, []
        while (start := time.perf_counter()) < ends:
            port, name = next(turns)
            connection = connections.setdefault(port, http.client.HTTPConnection("127.0.0.1", port, timeout=120))
            connection.request("POST", "/predict", bodies[name], {"Content-Type": "application/json"})
            answer = connection.getresponse()
            text = answer.read()
            if answer.status != 200:
                raise RuntimeError(text.decode())
            found.append(time.perf_counter() - start)
        return found

    start = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        times = sorted(t for own in pool.map(client, [n % len(targets) for n in range(clients)]) for t in own)
    spent = time.perf_counter() - start
    found = {"requests": len(times), "rate": len(times) / spent, "median": statistics.median(times)}
    return {**found, "p95": times[int(0.95 * (len(times) - 1))]}


def family(processes: Sequence[subprocess.Popen[bytes]]) -> set[int]:
    """The processes and their children."""
    listed = subprocess.run(["ps", "-eo", "pid,ppid"], capture_output=True, text=True, check=True).stdout.split()
    parents = {int(pid): int(parent) for pid, parent in zip(listed[2::2], listed[3::2], strict=True)}
    wanted = {process.pid for process in processes}
    return wanted | {pid for pid, parent in parents.items() if parent in wanted}


def memory(processes: set[int]) -> int:
    """Bytes that they do not share with others."""
    total = 0
    for pid in processes:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith(("Private_Clean", "Private_Dirty")):
                total += int(line.split()[1]) << 10
    return total


def processor_seconds(processes: set[int]) -> float:
    """Seconds of a processor that they have used."""
    fields = (Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in processes)
    return sum(int(used[11]) + int(used[12]) for used in fields) / os.sysconf("SC_CLK_TCK")


def rows(folder: Path, given: argparse.Namespace) -> list[dict[str, Any]]:
    names = [f"m{number}" for number in range(given.models)]
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    loads: list[float] = []
    for _ in range(given.repeats):
        for way in WAYS:
            paths = {"a store": [folder / "store"], "one materialised model": [folder / "m0"]}.get(
                way, [folder / name for name in names]
            )
            with ExitStack() as stack:
                started = [stack.enter_context(served(path, given.batch)) for path in paths]
                ports = [port for port, _ in started]
                asked = {"a store": [(ports[0], name) for name in names], "one materialised model": [(ports[0], "m0")]}
                targets = asked.get(way, [*zip(ports, names, strict=False)])
                measured(targets, given.clients, given.seconds / 4)  # warm
                own = family([process for _, process in started])
                used = processor_seconds(own)
                one = measured(targets, given.clients, given.seconds)
                used = processor_seconds(own) - used
                found[way].append({**one, "processor": used / one["requests"], "memory": memory(own)})
                loads.append(os.getloadavg()[0])
                print(way, found[way][-1], f"load {loads[-1]:.1f}", flush=True)
    shared = {
        "models": given.models, "clients": given.clients, "batch": given.batch, "seconds": given.seconds,
        "repeats": given.repeats, "load": statistics.median(loads), "threads": torch.get_num_threads(),
        "device": measure.processor(), "cores": os.cpu_count(), "torch": torch.__version__, "model": SIZES,
    }  # fmt: skip
    return [
        {"way": way, **{key: statistics.median(one[key] for one in each) for key in each[0]}, "each": each, **shared}
        for way, each in found.items()
    ]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """For a page."""
    by_way = {row["way"]: row for row in rows}
    plain = by_way["one materialised model"]
    measured = f"{plain['models']} fine-tunes, {plain['clients']} clients"
    lines = [f"| {measured} | requests a processor second | of one model's | memory |", "|---|---|---|---|"]
    for way in ("one materialised model", "a store", "a process a model"):
        row = by_way[way]
        shown = f"**{way}**" if way == "a store" else way
        share = 100 * plain["processor"] / row["processor"]
        lines.append(f"| {shown} | {1 / row['processor']:.0f} | {share:.0f} % | {row['memory'] / 1e9:.1f} GB |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=int, default=4)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.table:
        print(table(json.loads(RESULTS.read_text(encoding="utf-8"))["rows"]))
        return
    if given.serve:
        from randes.litserve.server import run, server_of

        kind = Store if (given.serve / "manifest.json").is_file() else OneModel
        run(server_of(kind(str(given.serve)), batch=given.batch, device="cpu"), port=given.port, log_level="error")
        return
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder), given.models)
        text = json.dumps({"rows": rows(Path(folder), given)}, indent=1)
    given.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
