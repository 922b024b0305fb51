"""How much of each fine-tune survives: every method of ``randes demo``, over seeds and settings.

    python bench/quality/quality.py                 writes bench/results/quality.json, about 20 minutes on 2 cores
    python bench/quality/quality.py --bits          centring, shared bases and few bits: 10 minutes a seed and core
    python bench/quality/quality.py --table [bits]  prints a Markdown table of what is there

Sixteen fine-tunes are trained once for each seed and setting and superposed three ways: the first 8 in one group,
all 16 in two groups of 8, all 16 in one group; with ``--bits`` all 16 in groups of 2, 4, 8 and 16.
"""

import argparse
import copy
import json
import platform
import statistics
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from survival import served

import randes
from randes.demo.digits import accuracy
from randes.demo.report import as_json
from randes.demo.run import evaluate, finetune

RESULTS = Path(__file__).parents[1] / "results" / "quality.json"
BITS_RESULTS = RESULTS.with_stem("quality-bits")
SEEDS = (0, 1, 2)
GROUPINGS = ((8, 8), (16, 8), (16, 16))  # models, models to a group
SETTINGS = {"full fine-tunes": False, "only matrices fine-tuned": True}
RANKS = (4, 16, "auto")
CONFIGURATIONS = {
    "two-sided signs": randes.Config(rank=0),
    **{f"shared basis of rank {rank}": randes.Config(rank=rank) for rank in RANKS},
    "two-sided, centred": randes.Config(rank=0, centre=True),
    "shared basis of rank auto, centred": randes.Config(rank="auto", centre=True),
}
GROUPS = (2, 4, 8, 16)
BITS = {16: 16, 8: 8, 4: 4, 2: 4, 1: 4}
"""Of D, and of coordinates beside it."""


def measure() -> list[dict[str, Any]]:
    """A row for each seed, setting, grouping and method."""
    rows = []
    with Progress() as bars:

        def begin(stage: str, steps: int) -> Any:
            task = bars.add_task(stage, total=steps)
            return lambda: bars.advance(task)

        for seed in SEEDS:
            for setting, matrices_only in SETTINGS.items():
                finetunes = finetune(16, seed=seed, matrices_only=matrices_only, progress=begin)
                for models, group_size in GROUPINGS:
                    outcome = evaluate(finetunes.first(models), group_size=group_size, progress=begin)
                    found = as_json(outcome)
                    where = {"setting": setting, "models": models, "group_size": group_size, "seed": seed}
                    rows += [{**where, **method, "bytes": found["bytes"]} for method in found["methods"]]
    return rows


def measure_bits(seed: int) -> Iterator[dict[str, Any]]:
    """A row for each configuration, size of groups and number of bits; of full fine-tunes."""
    with Progress() as bars:

        def begin(stage: str, steps: int) -> Any:
            task = bars.add_task(f"seed {seed}: {stage}", total=steps)
            return lambda: bars.advance(task)

        finetunes = finetune(16, seed=seed, matrices_only=False, progress=begin)
        probe, step = copy.deepcopy(finetunes.base), begin("evaluating", len(CONFIGURATIONS) * len(GROUPS) * len(BITS))
        with torch.no_grad():
            own = {name: accuracy(model, finetunes.held_out[name]) for name, model in finetunes.models.items()}
        for method, config in CONFIGURATIONS.items():
            for group in GROUPS:
                config = replace(config, group_size=group, seed=seed)
                made = randes.compress(finetunes.base, finetunes.models, config)
                entries = len(own) * sum(made.base[name].numel() for name in made.superposed)
                for d, coordinates in BITS.items():
                    packed, nbytes = served(made, d, coordinates)
                    kept = []
                    for name, images in finetunes.held_out.items():
                        probe.load_state_dict(packed.retrieve(name))
                        with torch.no_grad():
                            kept.append(round(accuracy(probe, images) / own[name], 4))
                    where = {"method": method, "group_size": group, "d": d, "coordinates": coordinates, "seed": seed}
                    yield {**where, "bits": round(8 * nbytes / entries, 4), "kept": kept}
                    step()


def table_of_bits(rows: list[dict[str, Any]]) -> str:
    """By models to a group and bits of D: mean over tasks and seeds ± half the range over seeds, the worst task."""
    columns = [(group, d) for group in GROUPS for d in BITS]
    lines = ["| | " + " | ".join(f"groups of {g}, {d} bit" for g, d in columns) + " |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    for method in CONFIGURATIONS:
        line = [method]
        for column in columns:
            kept = [r["kept"] for r in rows if r["method"] == method and (r["group_size"], r["d"]) == column]
            means = [100 * statistics.mean(shares) for shares in kept]
            worst = min(100 * statistics.mean(task) for task in zip(*kept, strict=True))
            line.append(f"{statistics.mean(means):.1f} ± {(max(means) - min(means)) / 2:.1f} ({worst:.0f})")
        lines.append("| " + " | ".join(line) + " |")
    return "\n".join(lines)


def table(rows: list[dict[str, Any]]) -> str:
    """Normalised accuracy in %, mean over seeds (and half the range over seeds), worst task in brackets."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    cells = list(dict.fromkeys((row["setting"], row["models"], row["group_size"]) for row in rows))
    lines = ["| method | " + " | ".join(f"{s}, {m} in groups of {g}" for s, m, g in cells) + " |"]
    lines.append("|---" * (len(cells) + 1) + "|")
    for method in methods:
        line = [method]
        for cell in cells:
            chosen = [r for r in rows if r["method"] == method and (r["setting"], r["models"], r["group_size"]) == cell]
            means = [100 * row["mean_normalised"] for row in chosen]
            worst = statistics.mean(100 * row["worst_normalised"] for row in chosen)
            spread = (max(means) - min(means)) / 2
            line.append(f"{statistics.mean(means):.1f} ± {spread:.1f} ({worst:.0f})")
        lines.append("| " + " | ".join(line) + " |")
    return "\n".join(lines)


TABLES = {"methods": (RESULTS, table), "bits": (BITS_RESULTS, table_of_bits)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", choices=TABLES, nargs="?", const="methods", help="print what is there")
    parser.add_argument("--bits", action="store_true", help="measure centring, shared bases and few bits")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="with --bits: these; others' rows are kept")
    given = parser.parse_args()
    path, shown = TABLES[given.table or ("bits" if given.bits else "methods")]
    if given.bits:
        for seed in given.seeds:
            kept = [row for row in read(path) if row["seed"] != seed] if path.exists() else []
            for row in measure_bits(seed):
                kept.append(row)
                write(path, kept)
    elif not given.table:
        write(path, measure())
    print(shown(read(path)))


def read(path: Path) -> list[dict[str, Any]]:
    """The rows that are there."""
    rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["rows"]
    return rows


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """A row a line, after what they were measured on."""
    machine = {"device": "cpu", "processor": platform.processor() or platform.machine(), "torch": torch.__version__}
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_text(f'{{"machine": {json.dumps(machine)},\n"rows": [\n{lines}\n]}}\n', encoding="utf-8")


if __name__ == "__main__":
    main()
