"""How much of each fine-tune survives: every method of ``randes demo``, over seeds and settings.

    python bench/quality.py                 writes bench/results/quality.json, about 20 minutes on 2 cores
    python bench/quality.py --table         prints the Markdown table of what is there

Sixteen fine-tunes are trained once for each seed and setting and superposed three ways: the first 8 in one group,
all 16 in two groups of 8, all 16 in one group.
"""

import argparse
import json
import platform
import statistics
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from randes.demo.report import as_json
from randes.demo.run import evaluate, finetune

RESULTS = Path(__file__).parent / "results" / "quality.json"
SEEDS = (0, 1, 2)
GROUPINGS = ((8, 8), (16, 8), (16, 16))  # models, models to a group
SETTINGS = {"full fine-tunes": False, "only matrices fine-tuned": True}


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print the table of the committed rows")
    if not parser.parse_args().table:
        machine = {"device": "cpu", "processor": platform.processor() or platform.machine(), "torch": torch.__version__}
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text(json.dumps({"machine": machine, "rows": measure()}, indent=1, ensure_ascii=False) + "\n")
    print(table(json.loads(RESULTS.read_text())["rows"]))


if __name__ == "__main__":
    main()
