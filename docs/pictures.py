"""Draws the pictures of the README and of concepts.md into docs/images.

    randes demo --out randes-demo && python docs/pictures.py randes-demo

What the demonstration left is what is drawn: its picture, and what becomes of one of its deltas among seven others.
"""

import shutil
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # a file, never a window

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from torch import Tensor

import randes
from randes.checkpoints.sources import read_file

IMAGES = Path(__file__).parent / "images"
OWN, NOISE, MERGED, GREY = "#0b3c6f", "#62a5cf", "#c9733b", "#4d4d4d"


def deltas_of(folder: Path, tensor: str) -> dict[str, Tensor]:
    """Each fine-tune's delta of one matrix, (N, K) fp32."""
    base = read_file(folder / "base.safetensors")
    names = randes.Superposition.load(folder / "store").names
    return {name: read_file(folder / f"{name}.safetensors")[tensor] - base[tensor] for name in names}


def superposition(folder: Path) -> None:
    """One delta, what the others leave beside it when they are merged and when they are superposed, and where it
    points."""
    store = randes.Superposition.load(folder / "store")
    tensor = store.superposed[len(store.superposed) // 2]
    deltas = deltas_of(folder, tensor)
    own = deltas[store.names[0]]
    merged = sum(deltas.values()) - own  # what stays of the others in a sum without transforms
    base = read_file(folder / "base.safetensors")[tensor]
    superposed = store.retrieve(store.names[0])[tensor] - base - own
    superposed = superposed * (merged.norm() / superposed.norm())  # the same size, to compare where they point
    figure, axes = plt.subplots(
        1, 4, figsize=(13, 3.6), gridspec_kw={"width_ratios": (1, 1, 1, 1.5)}, layout="constrained"
    )
    most = float(torch.cat([own, merged, superposed]).abs().quantile(0.98))
    shown = (
        (own, "one model's delta"),
        (merged, "the seven others, summed as they are\n(task arithmetic)"),
        (superposed, "the seven others, superposed\nand turned back (randes)"),
    )
    for place, (values, title) in zip(axes[:3], shown, strict=True):
        place.imshow(values[:64, :64], cmap="RdBu", vmin=-most, vmax=most, interpolation="nearest")
        place.set_title(title, fontsize=10)
        place.set_xticks([])
        place.set_yticks([])
    spread: Axes = axes[3]
    energy = sum((delta @ delta.T).double() for delta in deltas.values())
    loudest = torch.linalg.eigh(energy).eigenvectors.flip(1).float()  # output directions, those of the deltas first
    for values, color, label in ((merged, MERGED, "summed as they are"), (superposed, NOISE, "superposed")):
        inside = (loudest.T @ values).square().sum(1).cumsum(0)
        spread.plot(100 * inside / inside[-1], color=color, label=label, linewidth=2)
    spread.plot((0, len(loudest) - 1), (0, 100), color=GREY, linewidth=1, linestyle=":", label="spread evenly")
    spread.set_title("where the noise of the others points", fontsize=10)
    spread.set_xlabel("output directions, the deltas' loudest first")
    spread.set_ylabel("share of the noise in them, in %")
    spread.spines[["top", "right"]].set_visible(False)
    spread.legend(frameon=False, fontsize=9, loc="lower right")
    figure.savefig(IMAGES / "superposition.png", dpi=110)
    plt.close(figure)


def box(axes: Axes, x: float, y: float, text: str, color: str, *, width: float = 1.5, height: float = 0.62) -> None:
    axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0.04", facecolor=color, edgecolor="none"))
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", color="white", fontsize=10)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=13, color=GREY, linewidth=1.3))


def decode() -> None:
    """One layer in a decode step: three rows of three models, two products."""
    figure, axes = plt.subplots(figsize=(11, 4.4), layout="constrained")
    rows = (("german", "#0b3c6f"), ("legal", "#c9733b"), ("__base__", "#4d4d4d"))
    for place, (name, color) in enumerate(rows):
        y = 3.1 - place
        box(axes, 0, y, f"row of {name}", color)
        box(axes, 10.4, y, "+   its own bias", color, width=1.4)
        if name == "__base__":
            axes.text(3.45, y + 0.31, "needs the base's weight alone", ha="center", va="center", fontsize=9, color=GREY)
            continue
        box(axes, 2.7, y, "its column signs", color)
        box(axes, 7.4, y, "its row signs, its gain", color, width=1.9)
        arrow(axes, (1.56, y + 0.31), (2.62, y + 0.31))
        arrow(axes, (4.26, y + 0.31), (5.0, 2.6))
        arrow(axes, (6.72, 2.6), (7.32, y + 0.31))
        arrow(axes, (9.38, y + 0.31), (10.32, y + 0.31))
    box(axes, 5.06, 2.15, "D\nread once", "#2f7fb8", width=1.6, height=0.95)
    box(axes, 5.06, 4.25, "base weight\nread once", "#777777", width=1.6, height=0.8)
    axes.annotate(
        "",
        (5.0, 4.65),
        (0.75, 3.8),
        arrowprops={"arrowstyle": "-|>", "color": GREY, "connectionstyle": "angle,angleA=90,angleB=0,rad=8"},
    )
    axes.annotate(
        "",
        (11.1, 3.8),
        (6.72, 4.65),
        arrowprops={"arrowstyle": "-|>", "color": GREY, "connectionstyle": "angle,angleA=0,angleB=90,rad=8"},
    )
    axes.text(2.9, 4.78, "all rows, whatever their model", ha="center", fontsize=9, color=GREY)
    axes.text(9.1, 4.78, "the base's output, and what D adds to it", ha="center", fontsize=9, color=GREY)
    axes.text(
        5.86,
        0.55,
        "signs come from the model's name:\nthey are stored nowhere",
        ha="center",
        va="center",
        fontsize=9,
        color=GREY,
    )
    axes.set_xlim(-0.2, 12)
    axes.set_ylim(0.9, 5.2)
    axes.axis("off")
    figure.savefig(IMAGES / "decode.png", dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    demo = Path(sys.argv[1] if len(sys.argv) > 1 else "randes-demo")
    IMAGES.mkdir(exist_ok=True)
    superposition(demo)
    decode()
    shutil.copyfile(demo / "demo.png", IMAGES / "demo.png")
