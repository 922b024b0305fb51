"""The tables and plots of ``claims.py``: what docs/results.md shows, made of its rows."""

import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
STEPS = (1, 2, 4, 8, 12, 16)
"""Of models that are there while they come and go, those that the table shows."""
STYLES = {
    "neither": ("tab:gray", "x"),
    "layer shuffle alone": ("tab:olive", "v"),
    "column signs alone": ("tab:blue", "s"),
    "both": ("tab:purple", "D"),
    "randes, two-sided signs (default)": ("tab:red", "o"),
}


def read(file: Path) -> list[Row]:
    """The committed rows."""
    rows: list[Row] = json.loads(file.read_text(encoding="utf-8"))["rows"]
    return rows


def chosen(rows: Sequence[Row], experiment: str, **wanted: object) -> list[Row]:
    """Those of one experiment with these entries."""
    return [r for r in rows if r["experiment"] == experiment and all(r[key] == wanted[key] for key in wanted)]


def distinct(rows: Sequence[Row], experiment: str, key: str) -> list[Any]:
    """What an entry is, in the order of the rows."""
    return list(dict.fromkeys(row[key] for row in chosen(rows, experiment)))


def mean(rows: Sequence[Row], key: str) -> float:
    """Over seeds."""
    return statistics.mean(row[key] for row in rows)


def share(rows: Sequence[Row]) -> str:
    """Normalised accuracy in %: mean over tasks and seeds ± half the range over seeds, the worst task in brackets."""
    kept = [100 * row["kept"] for row in rows]
    return f"{statistics.mean(kept):.1f} ± {(max(kept) - min(kept)) / 2:.1f} ({100 * mean(rows, 'worst'):.0f})"


def grid(
    rows: Sequence[Row], experiment: str, key: str, heading: Callable[[Any], str], cell: Callable[[list[Row]], str]
) -> str:
    """A line for each method, a column for each value of ``key``."""
    values, methods = distinct(rows, experiment, key), distinct(rows, experiment, "method")
    body = [[m, *(cell(chosen(rows, experiment, method=m, **{key: value})) for value in values)] for m in methods]
    return markdown(["method", *map(heading, values)], body)


def markdown(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = ["| " + " | ".join(line) + " |" for line in (head, *body)]
    return "\n".join((lines[0], "|---" * len(head) + "|", *lines[1:]))


def named(name: str) -> str:
    """A set of tasks by the share of the pixels that each task moves in its own way."""
    return "distinct tasks" if name == "distinct" else f"own share {100 * float(name.split()[1]):.0f} %"


def decorrelation(rows: Sequence[Row]) -> str:
    """Mean magnitude of a pair's cosine, before and after."""
    return grid(rows, "similarity", "set", named, lambda r: f"{mean(r, 'before'):.3f} → {mean(r, 'after'):.4f}")


def similarity(rows: Sequence[Row]) -> str:
    """Accuracy of eight models by how alike their tasks are."""

    def heading(name: str) -> str:
        return f"{named(name)}, cosine {mean(chosen(rows, 'similarity', set=name), 'before'):.2f}"

    return grid(rows, "similarity", "set", heading, share)


def count(rows: Sequence[Row]) -> str:
    """Accuracy by the number of models."""
    return grid(rows, "count", "models", lambda n: f"{n} models", share)


def alpha(rows: Sequence[Row]) -> str:
    """Accuracy of eight models by α."""
    return grid(rows, "alpha", "alpha", lambda value: f"α = {value}", share)


def joining(rows: Sequence[Row]) -> str:
    """Accuracy of those that are there, as models come and go."""
    body = []
    for method in distinct(rows, "joining", "method"):
        for what, experiment in (("coming", "joining"), ("going", "leaving")):
            cells = [chosen(rows, experiment, method=method, models=n) for n in STEPS]
            body.append([f"{method}, {what}", *(share(cell) if cell else "–" for cell in cells)])
    return markdown(["", *(f"{n} there" for n in STEPS)], body)


def storage(rows: Sequence[Row]) -> str:
    """Bytes, ours and as FusionBench would count the same superposition."""
    body = []
    for models in distinct(rows, "count", "models"):
        ours = chosen(rows, "count", models=models, method="randes, two-sided signs (default)")[0]
        paper = chosen(rows, "count", models=models, method="column signs alone")[0]
        separate = ours["separate_bytes"]
        body.append([
            str(models), f"{separate / 1e6:.2f} MB", f"{ours['bytes'] / 1e6:.2f} MB",
            f"{100 * ours['bytes'] / separate:.0f} %", f"{ours['context_numbers']}",
            f"{1000 * paper['fusionbench_gb']:.2f} MB", f"{paper['fusionbench_context_numbers']}",
        ])  # fmt: skip
    head = ["models", "separate", "store", "of separate", "context numbers", "column signs as FusionBench counts",
            "context numbers there"]  # fmt: skip
    return markdown(head, body)


def times(rows: Sequence[Row]) -> str:
    """Processor seconds to merge one more model, and to retrieve one."""
    return grid(
        rows,
        "times",
        "models",
        lambda n: f"{n} models",
        lambda r: f"{mean(r, 'merge_s'):.2f} s, {mean(r, 'retrieve_s'):.2f} s",
    )


TABLES: dict[str, Callable[[Sequence[Row]], str]] = {
    "decorrelation": decorrelation, "count": count, "similarity": similarity, "alpha": alpha, "joining": joining,
    "storage": storage, "times": times,
}  # fmt: skip


def draw(rows: Sequence[Row], file: Path) -> None:
    """Four plots of accuracy in one PNG: by number of models, by likeness, by α, and as models come and go."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    mpl.rcParams |= {"figure.constrained_layout.use": True, "axes.spines.top": False, "axes.spines.right": False}
    mpl.rcParams |= {"font.size": 9, "axes.grid": True, "grid.alpha": 0.3, "legend.frameon": False, "savefig.dpi": 130}
    figure, axes = plt.subplots(2, 2, figsize=(10, 7))

    def line(axis: Any, method: str, points: Sequence[tuple[float, list[Row]]], dashed: bool = False) -> None:
        colour, marker = STYLES[method]
        where = [x for x, _ in points]
        values = [[100 * row["kept"] for row in some] for _, some in points]
        axis.fill_between(where, [min(v) for v in values], [max(v) for v in values], color=colour, alpha=0.15, lw=0)
        label = None if dashed else method
        middle = [statistics.mean(v) for v in values]
        axis.plot(where, middle, color=colour, marker=marker, ms=4, ls="--" if dashed else "-", label=label)

    for method in STYLES:
        counts = distinct(rows, "count", "models")
        line(axes[0, 0], method, [(n, chosen(rows, "count", method=method, models=n)) for n in counts])
        sets = [chosen(rows, "similarity", method=method, set=name) for name in distinct(rows, "similarity", "set")]
        line(axes[0, 1], method, sorted((mean(some, "before"), some) for some in sets))
        alphas = distinct(rows, "alpha", "alpha")
        line(axes[1, 0], method, [(a, chosen(rows, "alpha", method=method, alpha=a)) for a in alphas])
        for experiment, at in (("joining", lambda n: n), ("leaving", lambda n: 32 - n)):
            if chosen(rows, experiment, method=method):
                there = sorted(distinct(rows, experiment, "models"), key=at)
                points = [(at(n), chosen(rows, experiment, method=method, models=n)) for n in there]
                if experiment == "leaving":
                    points.insert(0, (16, chosen(rows, "joining", method=method, models=16)))
                line(axes[1, 1], method, points, dashed=experiment == "leaving")
    axes[0, 0].set_xscale("log", base=2)
    axes[0, 0].set_xticks(counts, [str(n) for n in counts])
    axes[1, 1].set_xticks(range(0, 33, 4), [str(n if n <= 16 else 32 - n) for n in range(0, 33, 4)])
    titles = ("By number of models", "8 models, by likeness of their tasks", "8 models, by α",
              "16 models join one by one, then leave in that order")  # fmt: skip
    labels = "models", "mean cosine of two deltas", "α", "models that are there"
    for axis, title, label in zip(axes.flat, titles, labels, strict=True):
        axis.set(title=title, xlabel=label, ylabel="normalised accuracy (%)", ylim=(0, 103))
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8)
    figure.savefig(file)
    plt.close(figure)
