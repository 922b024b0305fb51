"""A report's pictures: SVG that takes the page's colour of text, for light and dark.

Text stays text, which a browser draws in its own fonts. Names reach a picture shortened; tables have them whole.
"""

import io
import math
import re
import warnings
from collections.abc import Sequence
from html import escape
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import FuncFormatter, NullFormatter
from numpy.typing import NDArray

TEXT = "#123457"
"""Stands for the page's colour of text until a picture is SVG."""
COLOURS = {"base": "#7b8794", "superposed": "#2f7fd1", "kept": "#e0922f", "basis": "#4fa36b", "separate": "#b5475d"}
STYLE: Any = {
    "svg.fonttype": "none", "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans"], "font.size": 9,
    "text.parse_math": False, "text.color": TEXT, "axes.labelcolor": TEXT, "xtick.color": TEXT, "ytick.color": TEXT,
    "axes.edgecolor": TEXT, "axes.spines.top": False, "axes.spines.right": False,
}  # fmt: skip
LABEL = 26
"""Characters of a name in a picture."""
SPACE = 0.125
"""Inches between two labels: where rows or columns are closer, some have none."""


def short(name: str) -> str:
    """A name as pictures have it: one printable line, without its middle where it is long."""
    line = "".join(letter if letter.isprintable() else "�" for letter in name)
    return line if len(line) <= LABEL else f"{line[: LABEL // 2 - 1]}…{line[-LABEL // 2 :]}"


def bars(rows: Sequence[tuple[str, Sequence[tuple[str, float]]]], unit: float, units: str, title: str) -> str:
    """A horizontal bar a row, of parts laid end to end: (label, ((part, bytes), ...)). unit: bytes of one ``units``."""
    with mpl.rc_context(STYLE | {"svg.hashsalt": title}):
        figure = Figure(figsize=(8, 0.42 * len(rows) + 0.9), layout="constrained")
        axes = figure.add_subplot()
        longest = max(sum(size for _, size in parts) for _, parts in rows)
        named: set[str] = set()
        for place, (_, parts) in enumerate(rows):
            start = 0.0
            for part, size in parts:
                if size:
                    label = None if part in named else part
                    named.add(part)
                    axes.barh(
                        place, size / unit, left=start / unit, color=COLOURS[part.split()[0]], label=label, height=0.7
                    )
                start += size
            axes.text((start + 0.01 * longest) / unit, place, f"{start / unit:.4g} {units}", va="center")
        axes.set_yticks(range(len(rows)), [label for label, _ in rows])
        axes.invert_yaxis()
        axes.set_xlim(0, 1.17 * longest / unit)
        axes.set_xlabel(units)
        axes.tick_params(axis="y", length=0)
        figure.legend(loc="outside upper center", ncols=5, frameon=False)
        return _svg(figure, title)


def heat(
    values: NDArray[np.float64], rows: Sequence[str], columns: Sequence[str], title: str, label: str,
    *, scale: str = "linear", limit: float | None = None, breaks: Sequence[int] = (),
) -> str:  # fmt: skip
    """A cell for each of ``values``; what is NaN has none.

    scale: "linear", "log", or "signed" for colours around zero, up to ``limit`` on both sides.
    breaks: rows (and, in a square, columns) that a line is drawn before.
    """
    count, width = values.shape
    square = list(rows) == list(columns)
    across = min(0.46 if square else 0.6, 7.0 / width)
    down = across if square else min(0.46, 8.0 / count)
    margin = 0.085 * max(len(short(name)) for name in rows)
    below = 0.085 * max(len(short(name)) for name in columns)
    with mpl.rc_context(STYLE | {"svg.hashsalt": title}):
        size = max(across * width, 1.2) + margin + 1.6, max(down * count, 0.9) + below + 0.5
        figure = Figure(figsize=size)
        figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.06)  # a browser's fonts may be wider
        axes = figure.add_subplot()
        shown = axes.imshow(
            values, norm=_norm(values, scale, limit), cmap="RdBu_r" if scale == "signed" else "viridis",
            aspect="equal" if square else "auto", interpolation="nearest",
        )  # fmt: skip
        _ticks(axes, rows, columns, across, down)
        if min(across, down) >= 0.3:
            _numbers(axes, values, shown)
        for place in breaks:
            axes.axhline(place - 0.5, color="#111111", linewidth=1)
            if square:
                axes.axvline(place - 0.5, color="#111111", linewidth=1)
        axes.spines[:].set_visible(False)
        bar = figure.colorbar(
            shown, ax=axes, label=label, fraction=0.05, shrink=min(1.0, 3 / size[1]), aspect=18,
            format=FuncFormatter(lambda value, _: figures(value)),
        )  # fmt: skip
        bar.ax.yaxis.set_minor_formatter(NullFormatter())
        bar.outline.set_visible(False)
        return _svg(figure, title)


def _norm(values: NDArray[np.float64], scale: str, limit: float | None) -> Normalize:
    if scale == "signed":
        return Normalize(-(limit or 1.0), limit or 1.0)
    found = values[np.isfinite(values) & (values > 0)] if scale == "log" else values[np.isfinite(values)]
    low, high = (float(found.min()), float(found.max())) if found.size else (1.0, 1.0)
    if scale == "log":
        return LogNorm(low, max(high, 1.001 * low))
    return Normalize(min(0.0, low), high or 1.0)


def _ticks(axes: Axes, rows: Sequence[str], columns: Sequence[str], across: float, down: float) -> None:
    for axis, names, space in ((axes.xaxis, columns, across), (axes.yaxis, rows, down)):
        every = max(1, math.ceil(SPACE / space - 0.01))
        places = range(0, len(names), every)
        axis.set_ticks(list(places), [short(names[place]) for place in places])
        axis.set_tick_params(length=0, labelsize=8)
    if max(len(short(name)) for name in columns) > 4 * across / 0.3:
        axes.tick_params(axis="x", rotation=90)


def _numbers(axes: Axes, values: NDArray[np.float64], shown: AxesImage) -> None:
    """Each cell's number, dark on light and light on dark."""
    for (row, column), value in np.ndenumerate(values):
        if math.isfinite(value):
            red, green, blue, _ = shown.to_rgba(np.array([value]))[0]
            colour = "#111111" if 0.3 * red + 0.59 * green + 0.11 * blue > 0.5 else "#ffffff"
            axes.text(column, row, figures(value), ha="center", va="center", fontsize=7, color=colour)


def figures(value: float) -> str:
    """A number in about two figures, as short as it can be."""
    if value == 0 or 0.095 <= abs(value) < 99.5:
        return f"{value:.2f}" if abs(value) < 9.95 else f"{value:.1f}"
    if 99.5 <= abs(value) < 9999.5:
        return f"{value:.0f}"
    if 0.00095 <= abs(value) < 0.095:
        return f"{value:.3f}".replace("0.", ".", 1)
    return re.sub(r"e([+-])0*", lambda sign: "e" + sign[1].strip("+"), f"{value:.0e}")


def _svg(figure: Figure, title: str) -> str:
    """Without what a page does not need: the file's head, metadata and names of its parts, which pictures share."""
    held = io.StringIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a browser has letters that matplotlib's font does not
        figure.savefig(held, format="svg", transparent=True, dpi=200, metadata={"Date": None})
    text = held.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r' id="[A-Za-z0-9.]+_\d+"', "", text).replace(TEXT, "currentColor")
    return text.replace("<svg ", f'<svg role="img" aria-label="{escape(title)}" ', 1)
