"""How much of each fine-tune's gain in bits per byte survives: a byte-level language model and kinds of text.

    python bench/quality/language.py                    half an hour a seed and core, into bench/results/language.json,
                                                and draws language.png, what survives by storage
    python bench/quality/language.py --setting wide     the same for a wider model: language-wide.json
    python bench/quality/language.py --table [NAME]     prints a Markdown table: methods, bits or frontier
    python bench/quality/language.py --draw             draws what is there

The share that survives is ``(L_base − L) / (L_base − L_own)`` on held-out bytes, L in bits per byte: 100 % is the
fine-tune itself, 0 the base, less is worse than the base. Models are trained once and kept (finetunes.py); what each
method stores is counted in survival.py.
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from finetunes import MODELS, SETTINGS, finetunes
from rich.progress import Progress
from survival import AUTO, GROUPS, measured

from randes.superposition.packed_tensors import in_words

sys.path.append(str(Path(__file__).parents[1] / "speed"))
from measure import machine

SEEDS = (0, 1, 2)
RESULTS = Path(__file__).parents[1] / "results" / "language.json"
PLOT = RESULTS.with_suffix(".png")
Rows = list[dict[str, Any]]

BUDGETS = (0.07, 0.14, 0.28, 0.56, 1.0, 2.0)
SLACK = 1.125
"""A method may take an eighth more than a budget: levels of 2 bits are 2.25 with their steps."""
FAMILIES: dict[str, Callable[[str], bool]] = {
    "ours": lambda method: method.startswith(("two-sided", "shared")),
    "column signs, with or without layer shuffle": lambda method: method.endswith("column signs"),
    "merged: task arithmetic, TIES": lambda method: method.endswith("best λ"),
    "low rank: SVD, Delta-CoMe": lambda method: method.startswith(("SVD", "Delta-CoMe")),
    "bits and signs: BitDelta, T-Switch, DARE": lambda method: method.startswith(("BitDelta", "T-Switch", "DARE")),
    "masks: EMR, TALL-masks": lambda method: method.startswith(("EMR", "TALL-masks")),
}
"""What is compared at equal storage."""


class Share(NamedTuple):
    """In %: the mean over kinds and seeds, half the range over seeds (nan of one), the worst kind's mean over seeds.

    bits: storage."""

    mean: float
    spread: float
    worst: float
    bits: float


def shares(rows: Rows, method: str, group: int, d: float = 16, coordinates: int = 16) -> Share | None:
    """Of one method, with D and coordinates in so many bits; None where it was not measured."""
    wanted = method, group, d, coordinates
    chosen = [row for row in rows if "kept" in row and _key(row) == wanted]
    if not chosen:
        return None
    means = [100 * statistics.mean(row["kept"]) for row in chosen]
    worst = min(100 * statistics.mean(kept) for kept in zip(*(row["kept"] for row in chosen), strict=True))
    spread = (max(means) - min(means)) / 2 if len(means) > 1 else math.nan
    return Share(statistics.mean(means), spread, worst, chosen[0]["bits"])


def _key(row: dict[str, Any]) -> tuple[str, int, float, int]:
    return row["method"], row["group"], row.get("d", 16), row.get("coordinates", 16)


def every(rows: Rows) -> dict[tuple[str, int, float, int], Share]:
    """All that was measured, by method, group and bits."""
    found = {}
    for key in dict.fromkeys(_key(row) for row in rows if "kept" in row):
        share = shares(rows, *key)
        assert share is not None
        found[key] = share
    return found


def ranging(share: Share) -> str:
    """Half the range over seeds, where there are several."""
    return "" if math.isnan(share.spread) else f" ± {share.spread:.1f}"


def groups_of(rows: Rows) -> list[int]:
    """Sizes of groups that were measured."""
    return sorted({row["group"] for row in rows} - {1})


def table(rows: Rows) -> str:
    """By method, at 16 bits: % of the gain that survives ± half the range over seeds, the worst kind in brackets."""
    groups = groups_of(rows)
    found = every(rows)

    def cell(method: str, group: int) -> str:
        share = found.get((method, group, 16, 16))
        if share is None:
            return "–"
        return f"{share.mean:.1f}{ranging(share)} ({share.worst:.0f}), {share.bits:.2f} bit"

    lines = ["| method | " + " | ".join(f"groups of {g}" for g in groups) + " |", "|---" * (len(groups) + 1) + "|"]
    for method in dict.fromkeys(row["method"] for row in rows if row["group"] > 1 and "rank 64" not in row["method"]):
        lines.append(f"| {method} | " + " | ".join(cell(method, group) for group in groups) + " |")
    return "\n".join(lines)


def table_of_bits(rows: Rows) -> str:
    """By bits of D, with coordinates in 4 below 16: the mean, in brackets the worst kind, and all that is held."""
    found, wide = every(rows), (16, 4, 2, 1, 0.5)
    lines = ["| | a group | " + " | ".join(f"D in {in_words(d)}" for d in wide) + " |", "|---" * (len(wide) + 2) + "|"]
    for method in ("two-sided signs", AUTO, f"{AUTO}, rotated"):
        for group in groups_of(rows):
            cells = [found.get((method, group, d, 4 if "rank" in method and d < 16 else 16)) for d in wide]
            shown = ["–" if s is None else f"{s.mean:.1f} ({s.worst:.0f}), {s.bits:.2f} bit" for s in cells]
            lines.append(f"| {method} | {group} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def described(key: tuple[str, int, float, int]) -> str:
    """A method with its bits and its group."""
    method, group, d, held = key
    packed = f", D in {in_words(d)}" if group > 1 and FAMILIES["ours"](method) else ""
    packed += f", coordinates in {held}" if "rank" in method and packed else ""
    return f"{method}{packed}, groups of {group}" if group > 1 else method


def table_of_frontier(rows: Rows) -> str:
    """The best of each family at equal storage: mean ± half the range over seeds, the worst kind, and what it is."""
    found = every(rows)
    lines = ["| at most | " + " | ".join(FAMILIES) + " |", "|---" * (len(FAMILIES) + 1) + "|"]
    for budget in BUDGETS:
        cells = []
        for belongs in FAMILIES.values():
            fits = {key: s for key, s in found.items() if belongs(key[0]) and s.bits <= budget * SLACK}
            best = max(fits, key=lambda key: fits[key].mean, default=None)
            if best is None:
                cells.append("–")
                continue
            share = fits[best]
            what = f"{share.bits:.2f} bit: {described(best)}"
            cells.append(f"**{share.mean:.1f}**{ranging(share)} ({share.worst:.0f}), {what}")
        lines.append(f"| {budget:g} bit | " + " | ".join(cells) + " |")
    return "\n".join(lines)


TABLES = {"methods": table, "bits": table_of_bits, "frontier": table_of_frontier}


def results(setting: str) -> Path:
    """The file of a setting."""
    return RESULTS if setting == "narrow" else RESULTS.with_stem(f"language-{setting}")


def read(path: Path) -> Rows:
    """The rows that are there."""
    rows: Rows = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    return rows


def write(path: Path, kinds: list[str], rows: Rows) -> None:
    """A row a line; ``kept`` is in the order of the kinds."""
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    head = f'"machine": {json.dumps(machine("cpu"))},\n"kinds": {json.dumps(kinds)}'
    path.write_text(f'{{{head},\n"rows": [\n{lines}\n]}}\n', encoding="utf-8")


def curves(rows: Rows) -> dict[str, list[tuple[float, float]]]:
    """What is drawn: (bits, share) by storage, each curve by its label."""
    found = every(rows)

    def over_groups(method: str, d: int = 16, held: int = 16) -> list[tuple[float, float]]:
        return [(s.bits, s.mean) for key, s in found.items() if (key[0], *key[2:]) == (method, d, held)]

    def over(*methods: str) -> list[tuple[float, float]]:
        return [(s.bits, s.mean) for key, s in found.items() if key[0] in methods]

    def named(method: str) -> list[str]:
        return [key[0] for key in found if key[0].startswith(method)]

    best: dict[str, list[tuple[float, float]]] = {"ours, the best at each storage": []}
    for share in sorted((s for key, s in found.items() if FAMILIES["ours"](key[0])), key=lambda s: (s.bits, -s.mean)):
        envelope = best["ours, the best at each storage"]
        if not envelope or share.mean > envelope[-1][1]:
            envelope.append((share.bits, share.mean))
    return {
        **best,
        "ours: two-sided signs, D in 16 bits": over_groups("two-sided signs"),
        "ours: two-sided signs, D in 2 bits": over_groups("two-sided signs", 2),
        "ours: rank auto, D in 2 bits": over_groups(AUTO, 2, 4),
        "ours: rank auto, rotated, D in half a bit": over_groups(f"{AUTO}, rotated", 0.5, 4),
        "column signs, layer shuffle (RanDeS)": over_groups("layer shuffle + column signs"),
        "column signs": over_groups("column signs"),
        "task arithmetic": over("task arithmetic, best λ"),
        "TIES": over("TIES, best λ"),
        "SVD in 4 bits": over(*named("SVD")),
        "Delta-CoMe": over(*named("Delta-CoMe")),
        "BitDelta, rotated": over(*(method for method in named("BitDelta") if "rotated" in method)),
        "T-Switch, rotated": over(*named("T-Switch")),
        "DARE, 1 bit, rotated": over(*named("DARE")),
        "EMR, TALL-masks": over(*named("EMR"), *named("TALL-masks")),
    }


STYLES = (
    ("lightgray", "", "-"), ("tab:blue", "o", "-"), ("tab:cyan", "o", "-"), ("tab:green", "o", "-"),
    ("tab:purple", "o", "-"), ("tab:olive", "v", "--"), ("tab:brown", "v", "--"), ("tab:gray", "s", ":"),
    ("silver", "s", ":"), ("tab:orange", "x", "--"), ("tab:red", "x", "--"), ("deeppink", "D", "--"),
    ("crimson", "D", "--"), ("tab:pink", "P", "--"), ("black", "^", ""),
)  # fmt: skip
"""Colour, marker and line of each curve."""


def draw() -> None:
    """What survives by storage: a row of pictures a setting, on the right what is above 85 %."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    measured_settings = [setting for setting in SETTINGS if results(setting).exists()]
    figure, axes = plt.subplots(
        len(measured_settings), 2, figsize=(13, 5.2 * len(measured_settings) + 1), squeeze=False, layout="constrained"
    )
    for setting, row in zip(measured_settings, axes, strict=True):
        rows, size = read(results(setting)), SETTINGS[setting]
        kinds = len(next(row["kept"] for row in rows if "kept" in row))
        seeds = len({row["seed"] for row in rows})
        for axis, (low, high) in zip(row, ((0, 102), (85, 100.5)), strict=True):
            for (label, points), (color, marker, line) in zip(curves(rows).items(), STYLES, strict=True):
                if not points:
                    continue
                x, y = zip(*sorted(points), strict=True)
                axis.plot(x, y, line, label=label, color=color, marker=marker, markersize=5,
                          linewidth=1.5 if marker else 7, zorder=2 if marker else 1)  # fmt: skip
            ticks = (0.0625, 0.125, 0.25, 0.5, 1, 2, 4, 8, 16)
            axis.set(xscale="log", xlim=(0.03, 17), ylim=(low, high), xlabel="bits a superposed parameter and model")
            axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            axis.minorticks_off()
            axis.grid(alpha=0.3)
        row[0].set(ylabel="share of the fine-tuning gain that survives (%)")
        row[0].set_title(f"{kinds} fine-tunes of a model {size.width} wide, {seeds} seed{'s' * (seeds > 1)}")
        row[1].set_title("the same, above 85 %")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=9)
    figure.savefig(PLOT, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setting", choices=SETTINGS, default="narrow")
    parser.add_argument("--models", type=Path, default=MODELS, help="where models are kept (%(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="measure what these lack")
    parser.add_argument("--groups", type=int, nargs="+", default=GROUPS, help="models to a group (%(default)s)")
    parser.add_argument("--only", default="", help="measure methods whose name holds this")
    parser.add_argument("--table", choices=TABLES, nargs="?", const="methods", help="print what is there")
    parser.add_argument("--draw", action="store_true", help="draw what is there")
    given = parser.parse_args()
    path = results(given.setting)
    if given.table:
        print(TABLES[given.table](read(path)))
        return
    with Progress() as bars:
        for seed in () if given.draw else given.seeds:
            task = bars.add_task(f"seed {seed}", total=None)

            tuned = finetunes(SETTINGS[given.setting], seed, given.models)
            there = {_key(row) for row in read(path) if row["seed"] == seed}
            for row in measured(
                tuned, given.groups, given.only, there,
                lambda what, task=task: bars.update(task, advance=1, description=what),
            ):  # fmt: skip
                old = [other for other in read(path) if (other["seed"], _key(other)) != (seed, _key(row))]
                write(path, list(tuned.models), [*old, {**row, "seed": seed}])
    draw()


if __name__ == "__main__":
    main()
