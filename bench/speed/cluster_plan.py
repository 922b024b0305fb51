"""How long stores take to be made by many workers: rates measured here, and the smallest case made for real on Ray.

    python bench/speed/cluster_plan.py --out bench/results/cluster.json     measures; needs Ray, and takes some minutes
    python bench/speed/cluster_plan.py --table                              prints the tables of the rows

The check makes a store of ``CHECKED`` on a Ray cluster of one and of two cores of this machine, with workers that are
there already. Before each run the rates are measured anew, because others use the machine, too.
"""

import argparse
import json
import platform
import statistics
import time
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from randes import cluster
from randes.checkpoints.safetensors import write_file
from randes.cli.planning import lasting
from randes.cli.terminal import sized

RESULTS = Path(__file__).parent.parent / "results" / "cluster.json"
FINETUNES, SHARD_SIZE = 64, "256MiB"
WORKERS = (1, 8, 64)
MODELS = {
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
}
"""Llama's shapes; both have 8 key-value heads and 128,256 tokens."""
CHECKED = {"matrices": 24, "rows": 1024, "columns": 2048, "finetunes": 4, "shard_size": "20MB", "runs": 5}


def checkpoints(folder: Path) -> tuple[str, dict[str, str]]:
    """The base and the fine-tunes of the check, in bf16."""
    chance, shape = torch.Generator().manual_seed(0), (CHECKED["rows"], CHECKED["columns"])
    base = {f"layers.{n}.weight": torch.randn(shape, generator=chance) for n in range(CHECKED["matrices"])}
    names = {name: str(folder / f"{name}.safetensors") for name in ("base", *map(str, range(CHECKED["finetunes"])))}
    for name, path in names.items():
        moved = {tensor: value if name == "base" else value + 0.02 * torch.randn(shape, generator=chance)
                 for tensor, value in base.items()}  # fmt: skip
        write_file(Path(path), {tensor: value.bfloat16() for tensor, value in moved.items()})
    return names.pop("base"), names


def check() -> list[dict[str, Any]]:
    """Predicted and measured seconds of the smallest case."""
    import ray

    rows = []
    with TemporaryDirectory() as name:
        folder = Path(name)
        base, models = checkpoints(folder)
        for workers in (1, 2):
            ray.init(num_cpus=workers, include_dashboard=False, log_to_driver=False)
            size = CHECKED["shard_size"]
            cluster.compress(base, models, out=folder / f"warm {workers}", shard_size=size, run=cluster.on_ray())
            for number in range(CHECKED["runs"]):
                rates = cluster.measured(base, cores=workers)
                (planned,) = cluster.plan_run(base, len(models), rates, workers=[workers], shard_size=size)
                start = time.perf_counter()
                out = folder / f"{workers} {number}"
                cluster.compress(base, models, out=out, shard_size=size, run=cluster.on_ray())
                taken = time.perf_counter() - start
                timed = {"predicted": planned.seconds, "seconds": taken}
                rows.append({"workers": workers, **timed, "rates": asdict(rates)})
                print(rows[-1])
            ray.shutdown()
    return rows


def runs(rates: cluster.Rates) -> list[dict[str, Any]]:
    """Of each model and number of workers."""
    import transformers

    rows = []
    for name, shape in MODELS.items():
        config = transformers.LlamaConfig(**shape, num_key_value_heads=8, vocab_size=128256, dtype="bfloat16")
        config.architectures = ["LlamaForCausalLM"]
        found = cluster.plan_run(config, FINETUNES, rates, workers=WORKERS, shard_size=SHARD_SIZE)
        rows += [{"model": name, **asdict(run), "core_seconds": run.core_seconds} for run in found]
    return rows


def table(found: dict[str, Any]) -> str:
    """Of all runs."""
    lines = ["| model | workers | parts | time | core hours | read | written | memory of a worker |", "|" + "---|" * 8]
    for row in found["runs"]:
        moved = " | ".join(sized(row[key]) for key in ("read", "written", "memory"))
        hours = f"{row['core_seconds'] / 3600:,.0f}"
        lines.append(
            f"| {row['model']} | {row['workers']} | {row['parts']} | {lasting(row['seconds'])} | {hours} | {moved} |"
        )
    return "\n".join(lines)


def check_table(found: dict[str, Any]) -> str:
    """Of the smallest case, as planned and as it was."""
    lines = ["| workers | planned | taken | taken / planned, median and range |", "|---|---|---|---|"]
    for workers in (1, 2):
        rows = [row for row in found["check"] if row["workers"] == workers]
        planned, taken = (statistics.median(row[key] for row in rows) for key in ("predicted", "seconds"))
        times = sorted(row["seconds"] / row["predicted"] for row in rows)
        spread = f"{statistics.median(times):.2f} ({times[0]:.2f} to {times[-1]:.2f})"
        lines.append(f"| {workers} | {planned:.1f} s | {taken:.1f} s | {spread} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--table", action="store_true")
    given = parser.parse_args()
    if given.out is not None:
        rows = check()
        middle = {key: statistics.median(row["rates"][key] for row in rows) for key in ("core", "read", "write")}
        found = {
            "device": f"{platform.machine()}, 2 cores, shared", "torch": torch.__version__, "rates": middle,
            "finetunes": FINETUNES, "shard_size": SHARD_SIZE, "checked": CHECKED, "check": rows,
            "runs": runs(cluster.Rates(**middle)),
        }  # fmt: skip
        given.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if given.table or given.out is not None:
        found = json.loads((given.out or RESULTS).read_text(encoding="utf-8"))
        print(table(found), check_table(found), sep="\n\n")


if __name__ == "__main__":
    main()
