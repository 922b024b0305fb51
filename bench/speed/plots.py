"""Draws the kernel benchmarks of a device and prints the Markdown tables that the README shows.

    python bench/speed/plots.py bench/results/<device>

reads ``kernels.json`` there and leaves three plots beside it: share of the measured roofline by shape, and time and
memory by number of models.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from baselines import EACH, FLOOR
from kernels import OP, SHAPES
from measure import DTYPES

Row = dict[str, Any]
TABLE_ROWS = (1, 8, 64, 512, 2048, 8192)
"""The values of M that the README shows, where they were measured."""
IN_GROUPS = "superposed linear, groups of 8"
STYLES = {  # colour, marker, line: those of other accuracy are dashed
    OP: ("#c1272d", "o", "-"),
    IN_GROUPS: ("#c1272d", "o", ":"),
    FLOOR: ("#222222", "s", "-"),
    EACH: ("#0072b2", "^", "-"),
    "bmm over J materialised models": ("#56b4e9", "v", "-"),
    "two matmuls, eager": ("#009e73", "D", "-"),
    "two matmuls, compiled": ("#7fc97f", "d", "-"),
    "retrieve, then F.linear": ("#8c6d31", "P", "-"),
    "1-bit deltas": ("#cc79a7", "X", "--"),
    "LoRA rank 64": ("#e69f00", ">", "--"),
    "LoRA rank 16": ("#f0c419", "<", "--"),
}


def table(rows: Sequence[Row]) -> str:
    """Markdown tables: the superposed linear by shape and M, with D in few bits, and its rivals at one point."""
    return "\n\n".join(filter(None, (by_shape(rows), by_bits(rows), beside(rows))))


def by_shape(rows: Sequence[Row]) -> str:
    """Time, as a multiple of F.linear's on one materialised model, and share of the roofline."""
    chosen = of_grid(rows)
    shown = [m for m in TABLE_ROWS if any(row["m"] == m for row in chosen)]
    lines = ["| N×K, dtype | " + " | ".join(f"M = {m}" for m in shown) + " |", "|---" * (len(shown) + 1) + "|"]
    for family, shape, dtype in dict.fromkeys((row["family"], row["shape"], row["dtype"]) for row in chosen):
        found = {row["m"]: row for row in chosen if (row["shape"], row["dtype"]) == (shape, dtype)}
        cells = [cell(found[m]) if m in found else "–" for m in shown]
        lines.append(f"| {shape.replace('x', '×')} ({family}), {dtype} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def by_bits(rows: Sequence[Row]) -> str:
    """Time by the bits of D and M, as a multiple of F.linear's; empty where no packed D was measured."""
    chosen = [row for row in rows if row["op"] == OP and row["median_us"] and row.get("bits", 16) < 16]
    if not chosen:
        return ""
    shown = sorted({row["m"] for row in chosen})
    lines = [
        "| 4096×4096, D in few bits | " + " | ".join(f"M = {m}" for m in shown) + " |",
        "|---" * (len(shown) + 1) + "|",
    ]
    for dtype, bits in dict.fromkeys((row["dtype"], row["bits"]) for row in chosen):
        found = {row["m"]: row for row in chosen if (row["dtype"], row["bits"]) == (dtype, bits)}
        lines.append(
            f"| {bits} bits, {dtype} | " + " | ".join(cell(found[m]) if m in found else "–" for m in shown) + " |"
        )
    return "\n".join(lines)


def of_grid(rows: Sequence[Row]) -> list[Row]:
    """The superposed linear's rows of the grid, by shape, in the dtypes that were measured on more than one shape."""
    order = [f"{n}x{k}" for family in SHAPES.values() for n, k in family]
    chosen = [row for row in rows if row["op"] == OP and row["median_us"] and is_default(row)]
    wide = {dtype for dtype in DTYPES if len({row["shape"] for row in chosen if row["dtype"] == dtype}) > 1}
    chosen = [row for row in chosen if row["dtype"] in wide and row["shape"] in order]
    return sorted(chosen, key=lambda row: (row["dtype"], order.index(row["shape"]), row["m"]))


def cell(row: Row) -> str:
    """One point of the table."""
    ratio = f"{row['ratio_to_linear']:.2f}x" if row["ratio_to_linear"] else "–"
    return f"{duration(row['median_us'])}, {ratio}, {100 * row['roofline_share']:.0f} %"


def beside(rows: Sequence[Row]) -> str:
    """Every contestant at 8 rows of 8 models: time, also as a multiple of the superposed linear's, memory and error."""
    lines: list[str] = []
    for dtype in DTYPES:
        chosen = [row for row in rows if is_centre(row) and row["dtype"] == dtype]
        ours = [row["median_us"] for row in chosen if row["op"] == OP]
        if len(chosen) < 2 or not ours or not ours[0]:
            continue
        for row in chosen:
            name = f"**{row['op']}**" if row["op"] == OP else row["op"]
            name += " (not the same accuracy; our re-creation)" if row["recreated"] else ""
            took, share = "–", "–"
            if row["median_us"]:
                took = f"{duration(row['median_us'])} ({duration(row['p20_us'])} to {duration(row['p80_us'])})"
                share = f"{row['median_us'] / ours[0]:.2f}x"
            error = "–" if row["error"] is None else f"{row['error']:.1e}"
            lines.append(f"| {name} | {dtype} | {took} | {share} | {row['held_bytes'] / 1e6:.0f} MB | {error} |")
    head = "| 8 rows of 8 models, 4096×4096 | dtype | time (p20 to p80) | against superposed | memory | error |"
    return "\n".join((head, "|---" * 6 + "|", *lines))


def duration(microseconds: float) -> str:
    """With a unit that leaves two or three digits."""
    if microseconds >= 1e4:
        return f"{microseconds / 1e3:.0f} ms"
    if microseconds >= 1e3:
        return f"{microseconds / 1e3:.1f} ms"
    return f"{microseconds:.0f} µs" if microseconds >= 10 else f"{microseconds:.1f} µs"


def is_default(row: Row) -> bool:
    """Whether a row is of the grid: two-sided signs, 8 models in one group, the mix that so many rows stand for."""
    mix = "distinct" if row["m"] <= 64 else "identical"
    wanted = {"transform": "two-sided", "models": 8, "groups": 1, "mix": mix}
    return (
        all(row[name] == value for name, value in wanted.items())
        and row["dtype"] != "fp16"
        and row.get("bits", 16) == 16
    )


def is_centre(row: Row) -> bool:
    """Whether a row is of the point that every baseline is measured at."""
    return is_default(row) and row["shape"] == "4096x4096" and row["m"] == 8


def draw(rows: Sequence[Row], folder: Path) -> list[Path]:
    """The three plots, as PNG files in ``folder``."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams |= {"figure.constrained_layout.use": True, "axes.spines.top": False, "axes.spines.right": False}
    mpl.rcParams |= {"font.size": 10, "axes.grid": True, "grid.alpha": 0.3, "legend.frameon": False, "savefig.dpi": 150}
    files = {"roofline.png": roofline, "time.png": time_by_models, "memory.png": memory_by_models}
    drawn = []
    for name, plot in files.items():
        figure = plot(rows)
        if figure is not None:
            figure.savefig(folder / name)
            drawn.append(folder / name)
    return drawn


def roofline(rows: Sequence[Row]) -> Any:
    """Share of the measured roofline by shape and number of rows."""
    from matplotlib import pyplot as plt

    chosen = of_grid(rows)
    if not chosen:
        return None
    dtypes = list(dict.fromkeys(row["dtype"] for row in chosen))
    counts = sorted({row["m"] for row in chosen})
    heights = [len({row["shape"] for row in chosen if row["dtype"] == dtype}) for dtype in dtypes]
    size = max(7.0, 3.0 + 0.62 * len(counts)), 1.2 + 0.34 * sum(heights) + 0.8 * len(dtypes)
    figure, axes = plt.subplots(len(dtypes), 1, figsize=size, squeeze=False, height_ratios=heights, sharex=True)
    for axis, dtype in zip(axes[:, 0], dtypes, strict=True):
        of_dtype = [row for row in chosen if row["dtype"] == dtype]
        shapes = list(dict.fromkeys((row["shape"], row["family"]) for row in of_dtype))
        shares = {(row["shape"], row["m"]): 100 * row["roofline_share"] for row in of_dtype}
        cells = [[shares.get((shape, m), float("nan")) for m in counts] for shape, _ in shapes]
        axis.imshow(cells, cmap="viridis", vmin=0, vmax=100, aspect="auto")
        for y, line in enumerate(cells):
            for x, share in enumerate(line):
                if share == share:  # measured, not NaN
                    axis.text(x, y, f"{share:.0f}", ha="center", va="center", color="white" if share < 60 else "black")
        axis.set_xticks(range(len(counts)), [str(m) for m in counts])
        axis.set_yticks(range(len(shapes)), [f"{shape.replace('x', '×')}  {family}" for shape, family in shapes])
        axis.grid(visible=False)
        axis.set_title(dtype)
        axis.tick_params(length=0, labelbottom=True)
    axes[-1, 0].set_xlabel("rows M (all 8 models in the batch up to 64 rows, one above)")
    figure.suptitle(f"Superposed linear: share of the measured roofline (%)\n{rows[0]['device']}", fontsize=11)
    return figure


def time_by_models(rows: Sequence[Row]) -> Any:
    """Time of one batch by the models in it: flat for the superposed linear."""
    return lines_by_models(rows, "median_us", 1e-3, "time of a call (ms)", "Time by number of models in the batch")


def memory_by_models(rows: Sequence[Row]) -> Any:
    """Weights held for the models stored, and what a call allocates on top."""
    return lines_by_models(rows, "peak_bytes", 1e-6, "weights and peak of a call (MB)", "Memory by number of models")


def lines_by_models(rows: Sequence[Row], value: str, unit: float, label: str, title: str) -> Any:
    """A line for each contestant, on the batch for which most numbers of models were measured."""
    from matplotlib import pyplot as plt
    from matplotlib.ticker import LogLocator

    batches: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if row["mix"] == "distinct" and row["transform"] == "two-sided" and row["run"] == 1:
            batches.setdefault((row["shape"], row["m"], row["dtype"]), []).append(row)
    if not batches:
        return None
    (shape, m, dtype), chosen = max(batches.items(), key=lambda batch: len({row["models"] for row in batch[1]}))
    if len({row["models"] for row in chosen}) < 2:
        return None
    figure, axis = plt.subplots(figsize=(8.5, 4.6))
    for op, (colour, marker, line) in STYLES.items():
        of_op = [row for row in chosen if row["op"] == op and row[value] and row["groups"] == 1]
        if op == IN_GROUPS:
            of_op = [row for row in chosen if row["op"] == OP and row[value] and row["models"] == 8 * row["groups"]]
        points = sorted((row["models"], row[value] * unit) for row in of_op)
        if len(points) > 1:
            label_of = f"{op} (re-created)" if of_op[0]["recreated"] else op
            width, order = (3.0, 3) if op == OP else (1.4, 2)
            axis.plot(
                *zip(*points, strict=True), color=colour, marker=marker, linestyle=line, linewidth=width,
                zorder=order, label=label_of,
            )  # fmt: skip
    counts = sorted({row["models"] for row in chosen})
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(counts, [str(count) for count in counts])
    axis.minorticks_off()
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.set_xlabel("models")
    axis.set_ylabel(label)
    axis.set_title(f"{title}: {m} rows, {shape.replace('x', '×')}, {dtype}\n{rows[0]['device']}")
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=9)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="with kernels.json in it")
    folder = parser.parse_args().folder
    rows = json.loads((folder / "kernels.json").read_text(encoding="utf-8"))["rows"]
    draw(rows, folder)
    print(table(rows))


if __name__ == "__main__":
    main()
