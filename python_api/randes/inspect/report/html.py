"""A page's parts: tables, folded details, figures, and values as they are shown."""

import math
from collections.abc import Iterable, Sequence
from html import escape
from typing import TypeAlias

from randes.inspect.report import pictures

Value: TypeAlias = str | int | float | tuple[str, object]
"""What a table has in a place: text, a number, or what is shown and what it is exactly."""
UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def escaped(value: object) -> str:
    """As a page shows it: names may hold anything."""
    return escape("".join(c if c.isprintable() else "�" for c in str(value)))


def table(key: str, head: Sequence[str], rows: Iterable[Sequence[Value]]) -> str:
    cells = "".join(f"<th>{escaped(name)}</th>" for name in head)
    lines = [f"<thead><tr>{cells}</tr></thead>"]
    for row in rows:
        lines.append("<tr>" + "".join(map(cell, row)) + "</tr>")
    return f'<div class="wide"><table id="{key}">' + "\n".join(lines) + "</table></div>\n"


def cell(value: Value) -> str:
    if isinstance(value, str):
        return f"<td>{escaped(value)}</td>"
    shown, exact = value if isinstance(value, tuple) else (str(value), value)
    return f'<td class="n" title="{escaped(exact)}">{escaped(shown)}</td>'


def details(summary: str, inside: str) -> str:
    return f"<details><summary>{escaped(summary)}</summary>{inside}</details>\n"


def figure(svg: str, caption: str = "") -> str:
    below = f"<figcaption>{escaped(caption)}</figcaption>" if caption else ""
    return f"<figure>{svg}{below}</figure>\n"


def number(value: float) -> tuple[str, object]:
    return (pictures.figures(value), value) if math.isfinite(value) else ("–", "none")


def share(part: int, whole: int) -> Value:
    return (f"{100 * part / whole:.1f} %", part / whole) if whole else "–"


def byte_size(count: int) -> tuple[str, int]:
    power = min(len(UNITS) - 1, int(math.log2(count) // 10)) if count else 0
    return (f"{count / 1024**power:.4g} {UNITS[power]}" if power else f"{count} B"), count
