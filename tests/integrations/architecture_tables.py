"""The documentation's tables of architectures, made of what ``architecture_sweep.py`` has measured."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from architecture_measure import kind

Row = Mapping[str, Any]

WAYS = {
    "single": "one model, by `set_adapter`", "named": "one model, by name", "mixed": "a mixed batch",
    "square": "a mixed batch as large as its rows are long", "generates": "`generate`, one model",
    "generates_mixed": "`generate`, a mixed batch", "disk": "one model, from folders by way of a store",
    "disk_mixed": "a mixed batch, from folders by way of a store",
}  # fmt: skip
COLUMNS = ("disk", "single", "disk_mixed", "mixed", "generates", "generates_mixed")
WORDS = {"right": "yes", "refused": "no", "both": "some", "": "–"}
REASONS = {
    r"is kept per model, and cannot be read|its values are": "Its code reads a tensor that each model has its own of"
    " past the layer that holds it.",
    r"inside, it has other rows than its batch": "Parts of it put something before the rows, or lay out rows anew.",
    r"parts with other numbers of rows|must have one name a row": "Parts of it have other numbers of rows than the"
    " batch.",
    r"first dimension must be the batch": "A layer of it is called with something else than rows first.",
    r"must return tensors with the batch first": "A part that is run for each model returns other things than tensors.",
    r"must call its linear layers": "It has an `nn.MultiheadAttention` that takes rows second, whose weights are read.",
    r"cannot be served: .* belongs to a|is superposed, but belongs to a": "Its layers are of a class of their own.",
    r"must have a matrix to superpose": "It has no matrix of 32 or more to a side that is called as one.",
    r"must be finite": "Transformers makes parameters of it that are not finite.",
}  # fmt: skip
"""Of what a refusal says, why."""


def totals(measured: Mapping[str, Any]) -> str:
    """How many classes come to what, in each way to call them."""
    rows, kinds = measured["rows"], ("right", "refused", "wrong", "crashed", "late")
    lines = [f"| {len(rows)} classes | {' | '.join(kinds)} | not built or run |", "|---" * (len(kinds) + 2) + "|"]
    for way, named in WAYS.items():
        found = Counter(kind(row[way]) for row in rows if way in row)
        counts = " | ".join(str(found[one]) for one in kinds)
        lines.append(f"| {named} | {counts} | {found['not run'] + found['indistinct']} |")
    versions = f"Transformers {measured['machine']['transformers']}, torch {measured['machine']['torch']}"
    return "\n".join([*lines, "", f"({versions}.)"])


def architectures(measured: Mapping[str, Any]) -> str:
    """What each architecture can: those that can the same share a line."""
    lines: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for name, rows in by_architecture(measured["rows"]).items():
        found = tuple(WORDS[together(row.get(way, "") for row in rows)] for way in COLUMNS)
        if set(found) != {"–"}:
            lines[found].append(name)
    order = {word: place for place, word in enumerate(("yes", "some", "–", "no"))}
    table = [
        "| one model, from folders | one model, loaded | mixed, from folders | mixed, loaded | generates"
        " | generates, mixed | architectures |",
        "|---" * 7 + "|",
    ]  # fmt: skip
    for found in sorted(lines, key=lambda words: [order[word] for word in words]):
        table.append(f"| {' | '.join(found)} | {', '.join(lines[found])} |")
    return "\n".join(table)


def refusals(measured: Mapping[str, Any]) -> str:
    """Why architectures are refused, alone and in mixed batches."""
    whole: dict[str, set[str]] = defaultdict(set)
    mixed: dict[str, set[str]] = defaultdict(set)
    for name, rows in by_architecture(measured["rows"]).items():
        for row in rows:
            for way in WAYS:
                if kind(row.get(way, "")) == "refused":
                    reason = reason_of(row[way])
                    (whole if way in ("disk", "single") else mixed)[reason].add(name)
    lines = ["| why | refused | one model at a time |", "|---|---|---|"]
    for reason in dict.fromkeys([*REASONS.values(), *whole, *mixed]):
        alone = mixed[reason] - whole[reason]
        if whole[reason] or alone:
            lines.append(
                f"| {reason} | {', '.join(sorted(whole[reason])) or '–'} | {', '.join(sorted(alone)) or '–'} |"
            )
    return "\n".join(lines)


def by_architecture(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows of classes that were built, by what Transformers calls their architecture."""
    found: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if row["model_type"]:
            found[row["model_type"]].append(row)
    return dict(sorted(found.items()))


def together(outcomes: Iterable[str]) -> str:
    """What several classes come to: right, refused, both, or nothing that is known."""
    found = {kind(outcome) for outcome in outcomes} & {"right", "refused"}
    return "both" if len(found) > 1 else next(iter(found), "")


def reason_of(outcome: str) -> str:
    """Why, in a line of the table."""
    return next((why for pattern, why in REASONS.items() if re.search(pattern, outcome)), outcome.partition(": ")[2])


TABLES = {"architectures": totals, "architecture table": architectures, "architecture refusals": refusals}
"""By the name that each has in the documentation."""
