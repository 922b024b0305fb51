"""The table and the plot of rivals.py: its rows beside those of our own stores."""

import statistics
from pathlib import Path
from typing import Any

from language import Rows

BEFORE = 1.035
"""Where a size axis of what is beside the base begins: a merged model stands there."""
WORTH = 0.3
"""In points: what a larger form of a method has to keep more, to be a line of the short table."""
SHORT = (
    ("task arithmetic", "the sum", "the sum"),
    ("T-Switch", "1.5 % of a row, rotated", "1 bit, rotated"),
    ("Delta-CoMe", "rank 2 + 34 + 60 in 8, 3, 2 bits", "rank 32 in 4 bits"),
    ("BitDelta", "1 bit, rotated", "1 bit, rotated"),
)
"""Rivals of the first table that is read: merging, and the best three of other kinds."""
OURS_IN_SHORT = ((4, 0.5, 0), (4, 0.5, 0.5), (8, 2, 0.5), (4, 1, 2))
"""Beside our default (the third) the smallest, the middle and the large end: a group, bits of D and of tables."""
FLOOR = 0.075
"""In %: the least loss that is drawn. More is kept than this tells apart from all."""
STYLES = {
    "BitDelta": ("tab:orange", "s"),
    "T-Switch": ("tab:green", "^"),
    "Delta-CoMe": ("tab:purple", "D"),
    "SVD": ("tab:brown", "v"),
    "TSV-Compress": ("tab:blue", "<"),
    "UltraDelta": ("tab:cyan", ">"),
    "DARE": ("tab:olive", "X"),
    "EMR": ("tab:pink", "P"),
    "TALL-masks": ("tab:gray", "p"),
    "task arithmetic": ("dimgray", "1"),
    "TIES": ("dimgray", "2"),
    "TSV-Merge": ("dimgray", "3"),
}


def mean_and_worst(row: dict[str, Any]) -> tuple[float, float]:
    """In %."""
    return 100 * statistics.mean(row["kept"]), 100 * min(row["kept"])


def front(rows: Rows, worth: float = 0.0) -> Rows:
    """Those that keep more, by at least ``worth`` points, than any as small to a thousandth of a model."""
    best: Rows = []
    for row in sorted(rows, key=lambda row: (round(row["times"], 3), -statistics.mean(row["kept"]))):
        if not best or mean_and_worst(row)[0] > mean_and_worst(best[-1])[0] + worth:
            best.append(row)
    return best


def of_eight(ours: Rows) -> Rows:
    """Our stores of as many models as the rivals have."""
    return [row for row in ours if row["models"] == 8]


def named(row: dict[str, Any]) -> tuple[str, str, str]:
    """One of our stores."""
    kind = "rotated" if row["matrix"] == "rotation" else "signs"
    rank = f", rank {row['rank']}" if row["rank"] else ""
    d = f"{row['bits']} bit{'s' * (row['bits'] != 1)} for {row['group']}"
    beside = {0: "directions", 0.5: "directions and 0.5 bits", 1: "directions and 1 bit", 2: "directions and 2 bits"}
    table = beside.get(row["embeddings"], str(row["embeddings"]))
    return "**ours**", f"{d}, {kind}{rank}", table


def short_table(rows: Rows, ours: Rows) -> str:
    """Eight lines of it."""
    forms = [((row["method"], row["form"], row["table"]), row) for row in rows]
    found = [(row, form[0], form[1] + scaled(row), form[2]) for form, row in forms if form in SHORT]
    for row in of_eight(ours):
        kind = row["group"], row["bits"], row["embeddings"]
        if kind in OURS_IN_SHORT and row["rank"] == "auto" and (row["group"] == 8 or row["matrix"] == "rotation"):
            found.append((row, *named(row)))
    return _lines(found)


def table(rows: Rows, ours: Rows, whole: bool = False) -> str:
    """By whole-store size: the mean share that is kept, the worst in brackets. whole: not only each method's best."""
    by_method = [[row for row in rows if row["method"] == method] for method in STYLES]
    chosen = rows if whole else [row for some in by_method for row in front(some, WORTH)]
    found = [(row, row["method"], row["form"] + scaled(row), row["table"]) for row in chosen]
    found += [(row, *named(row)) for row in front(of_eight(ours), 0.0 if whole else WORTH)]
    return _lines(found)


def _lines(found: list[tuple[dict[str, Any], str, str, str]]) -> str:
    lines = ["| method | matrices | table | kept | whole store |", "|---|---|---|---|---|"]
    for row, *cells in sorted(found, key=lambda line: (line[0]["times"], line[1])):
        mean, worst = mean_and_worst(row)
        lines.append(f"| {' | '.join(cells)} | {mean:.1f} ({worst:.1f}) | {row['times']:.2f}x |")
    return "\n".join(lines)


def scaled(row: dict[str, Any]) -> str:
    """λ, where it was chosen to be another than 1."""
    return f", λ = {row['scale']:g}" if row["scale"] != 1 else ""


def draw(rows: Rows, ours: Rows, file: Path) -> None:
    """What is kept by whole-store size; the worst of the eight is a fainter mark below the mean."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    mpl.rcParams |= {"figure.constrained_layout.use": True, "axes.spines.top": False, "axes.spines.right": False}
    mpl.rcParams |= {"font.size": 10, "axes.grid": True, "grid.alpha": 0.25, "legend.frameon": False}
    figure, axis = plt.subplots(figsize=(10, 6.2))

    def lost(share: float) -> float:
        return max(100 - share, FLOOR)

    def points(some: Rows, label: str, colour: str, marker: str, size: float, line: str = "") -> None:
        where = [max(row["times"], BEFORE) - 1 for row in some]
        mean, worst = zip(*(map(lost, mean_and_worst(row)) for row in some), strict=True)
        axis.vlines(where, mean, worst, color=colour, alpha=0.2, lw=1.2)
        axis.plot(where, worst, marker, color=colour, alpha=0.25, ms=0.7 * size)
        axis.plot(where, mean, marker + line, color=colour, ms=size, label=label, zorder=3)

    best = front(of_eight(ours))
    points(best, "ours", "tab:red", "o", 8, "-")
    points([row for row in of_eight(ours) if row not in best], "ours, other settings", "lightcoral", "o", 4)
    for method, (colour, marker) in STYLES.items():
        chosen = [row for row in rows if row["method"] == method]
        if chosen:
            points(chosen, method, colour, marker, 7)
        for row in chosen:
            if "rotated" in row["form"]:
                where = row["times"] - 1, lost(mean_and_worst(row)[0])
                axis.annotate(
                    "rotated", where, (-6, 3), textcoords="offset points", color=colour, fontsize=8, ha="right"
                )
    kept = (20, 40, 60, 80, 90, 95, 98, 99, 99.5, 99.8, 99.9)
    sizes = (1.05, 1.1, 1.2, 1.3, 1.5, 2, 2.5, 3.5)
    axis.set(xscale="log", yscale="log", ylim=(85, 0.075), xlim=(0.92 * (BEFORE - 1), 2.9))
    axis.set_yticks([100 - share for share in kept], [f"{share:g} %" for share in kept])
    axis.set_xticks([BEFORE - 1, *(size - 1 for size in sizes)], ["1x,\nmerged", *(f"{size:g}x" for size in sizes)])
    axis.minorticks_off()
    axis.set(xlabel="whole store of 8 fine-tunes, the base with it, in units of one model in bf16",
             ylabel="share of the fine-tuning gain that is kept")  # fmt: skip
    axis.set_title("SmolLM2-135M, 8 full fine-tunes: mean, and fainter the worst of the eight")
    axis.legend(loc="lower right", ncols=2, fontsize=9)
    figure.savefig(file, dpi=120)
    plt.close(figure)
