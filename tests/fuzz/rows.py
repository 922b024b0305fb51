"""What the longer runs found, kept as rows, and the table of them in docs/reliability.md."""

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parents[2] / "bench" / "results" / "reliability.json"
NAMES = {
    "mutations": "stores, checkpoints and configurations, damaged", "every": "calls to the system that fail",
    "loads": "loads beside a writer", "operations": "random operations", "soak": "serving while models come and go",
}  # fmt: skip


def read() -> list[dict[str, Any]]:
    """The rows that are committed."""
    found: list[dict[str, Any]] = json.loads(RESULTS.read_text(encoding="utf-8"))["rows"]
    return found


def keep(out: Path, row: dict[str, Any]) -> None:
    """Put a row into a file, in the place of the one of the same name."""
    rows = json.loads(out.read_text(encoding="utf-8"))["rows"] if out.exists() else []
    rows = [other for other in rows if other["what"] != row["what"]] + [row]
    rows.sort(key=lambda one: [*NAMES.values()].index(one["what"]))
    out.write_text(json.dumps({"rows": rows}, indent=1, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")


def table(rows: list[dict[str, Any]]) -> str:
    """In Markdown."""
    lines = ["| attack | how many | wrong | `python tests/fuzz` with |", "|---|---|---|---|"]
    for row in rows:
        lines.append(f"| {row['what']} | {_counted(row)} | {len(row['wrong'])} | `{row['command']}` |")
    return "\n".join(lines)


def _counted(row: dict[str, Any]) -> str:
    counts: dict[str, int] = row["counts"]
    kind = next(name for name, what in NAMES.items() if what == row["what"])
    if kind == "mutations":
        used = sum(count for name, count in counts.items() if name.endswith(": used"))
        return f"{sum(counts.values()):,}, {used:,} of them used, the others refused"
    if kind == "every":
        return f"{sum(counts.values()):,}"
    if kind == "loads":
        return f"{counts['loaded']:,} of {counts['stores seen']:,} stores, {counts.get('refused', 0)} refused"
    if kind == "operations":
        return f"{counts['sequences']:,} sequences of 20"
    grown = counts["KiB that memory grew by"] / 1024
    answers = f"{counts['answers']:,} answers, {counts['changes']:,} changes, {row['seconds'] / 60:.0f} minutes"
    return f"{answers}; memory grew by {grown:.1f} MiB"
