"""The demonstration's table and its picture."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # a file, never a window

import matplotlib.pyplot as plt
from rich.console import Console
from rich.table import Table

from randes.demo.run import DEFAULT, Outcome, Row


def as_json(outcome: Outcome) -> dict[str, Any]:
    """Everything that the table shows, and each task's accuracy."""
    sizes = outcome.superposition.sizes
    return {
        "methods": [
            {
                "method": row.method,
                "mean_accuracy": Row.mean(row.accuracy),
                "worst_accuracy": min(row.accuracy.values()),
                "mean_normalised": Row.mean(row.normalised),
                "worst_normalised": min(row.normalised.values()),
                "scale": row.scale,
                "accuracy": row.accuracy,
            }
            for row in outcome.rows
        ],
        "bytes": {**vars(sizes), "total": sizes.total},
        "mixed_batch": {
            "models": len(outcome.superposition.names),
            "largest_logit_difference": outcome.mixed_difference,
            "predictions_equal": outcome.mixed_predictions_equal,
        },
    }


def print_table(outcome: Outcome, console: Console) -> None:
    """The table, the sizes, and the mixed batch."""
    count = len(outcome.superposition.names)
    table = Table(title=f"{count} fine-tunes, accuracy on held-out images in %", title_justify="left")
    table.add_column("method")
    for column in ("mean", "worst", "normalised mean", "normalised worst"):
        table.add_column(column, justify="right")
    for row in outcome.rows:
        scale = "" if row.scale is None else f" = {row.scale}"
        figures = (
            Row.mean(row.accuracy),
            min(row.accuracy.values()),
            Row.mean(row.normalised),
            min(row.normalised.values()),
        )
        style = "bold" if row.method == DEFAULT else None
        table.add_row(row.method + scale, *(f"{100 * figure:.1f}" for figure in figures), style=style)
    console.print(table)
    sizes = outcome.superposition.sizes
    console.print(
        f"{count} separate models {sizes.separate_models:,} bytes; store {sizes.total:,} bytes: base {sizes.base:,},"
        f" superposed {sizes.superposed:,}, kept per model {sizes.kept:,}",
        highlight=False,
        soft_wrap=True,
    )
    console.print(
        f"One batch of {4 * count} rows of {count} models against {count} separate batches: predictions"
        f" {'equal' if outcome.mixed_predictions_equal else 'NOT EQUAL'}, logits within {outcome.mixed_difference:.1e}",
        highlight=False,
        soft_wrap=True,
    )


def draw(outcome: Outcome, path: Path) -> None:
    """Mean accuracy by method above, each task's by method below; as a PNG."""
    figure, (means, tasks) = plt.subplots(
        2, 1, figsize=(11, 8.5), gridspec_kw={"height_ratios": (1, 1.25)}, layout="constrained"
    )
    palette = ("#4d4d4d", "#bdbdbd", "#e0a458", "#c9733b", "#a6cee3", "#62a5cf", "#2f7fb8", "#0b3c6f")
    rows = outcome.rows
    for place, (row, color) in enumerate(zip(rows, palette, strict=True)):
        mean, worst = 100 * Row.mean(row.accuracy), 100 * min(row.accuracy.values())
        means.barh(place, mean, color=color)
        means.plot(worst, place, marker="|", color="black", markersize=14)
        means.text(101, place, f"{mean:.1f}", va="center")
    means.set_yticks(range(len(rows)), [row.method for row in rows])
    means.invert_yaxis()
    means.set_xlim(0, 108)
    means.set_xlabel("accuracy on held-out images in %: mean (bar) and worst task (mark)")
    sizes = outcome.superposition.sizes
    means.set_title(
        f"{len(outcome.superposition.names)} fine-tunes in {sizes.total / 2**20:.2f} MiB"
        f" instead of {sizes.separate_models / 2**20:.2f} MiB"
    )
    names = list(rows[0].accuracy)
    width = 0.85 / len(rows)
    for place, (row, color) in enumerate(zip(rows, palette, strict=True)):
        at = [task + (place - len(rows) / 2 + 0.5) * width for task in range(len(names))]
        tasks.bar(at, [100 * row.accuracy[name] for name in names], width, color=color, label=row.method)
    tasks.set_xticks(range(len(names)), names, rotation=30, ha="right")
    tasks.set_ylabel("accuracy in %")
    tasks.legend(ncols=4, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.22))
    for axes in (means, tasks):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)
