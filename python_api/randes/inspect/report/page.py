"""A report as one HTML file: no scripts, nothing fetched, light and dark."""

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from randes.inspect.report import pictures
from randes.inspect.report.cosines import SAMPLE, Cosines
from randes.inspect.report.html import UNITS, Value, byte_size, details, escaped, figure, number, share, table
from randes.inspect.report.numbers import Cell, Numbers
from randes.inspect.report.text import STYLE, WORDS
from randes.inspect.report.verdict import verdict
from randes.superposition.members import Sizes
from randes.superposition.packed_tensors import in_words


def page(numbers: Numbers, title: str) -> str:
    """The whole file."""
    sections = (
        _header(numbers, title), _sizes(numbers), _models(numbers), _interference(numbers), _retrieved(numbers),
        _cosines(numbers),
        _energy(numbers), _tensors(numbers), WORDS["reading"],
    )  # fmt: skip
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escaped(title)} · randes report</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(sections)
        + "\n</main>\n</body>\n</html>\n"
    )


_LATER = ("matrix", "gains", "origin", "every", "per_layer", "vectors")
"""Options that are shown where they are used."""


def _header(numbers: Numbers, title: str) -> str:
    sizes, config, packing = numbers.sizes, numbers.config, numbers.packing
    count = len([name for name in numbers.names if name != "__base__"])
    whole = sizes.separate_models
    against = (
        f" Separate fine-tunes take {byte_size(whole)[0]}: this is {100 * sizes.total / whole:.0f} %." if whole else ""
    )
    rows: list[tuple[str, object]] = [
        ("signs", config.signs), ("permute", config.permute), ("shuffle_layers", config.shuffle_layers),
        ("group_size", config.group_size), ("seed", config.seed), ("others", config.others),
        ("rank", numbers.ranks.removeprefix("rank ") or 0),
        *((name, value) for name, value in config.to_dict().items() if name in _LATER),
        ("centre", "yes: deltas are measured from the mean of the fine-tunes" if config.centre else "no"),
        ("include", ", ".join(config.included)), ("exclude", ", ".join(config.exclude)),
        ("min_width", config.min_width),
        ("packed", "no: integers, models can be added and removed" if packing is None else
         f"{in_words(packing.bits)}, groups of {packing.group} columns, coordinates in {packing.coordinates} bits;"
         f" for serving only, of the store with checksum {packing.master}"),
    ]  # fmt: skip
    return (
        f"<h1>{escaped(title)}</h1>\n<p class='lead'>{count} fine-tunes and their base in {byte_size(sizes.total)[0]}."
        f"{against}</p>{verdict(numbers)}"
        + details(
            "How it was made", table("config", ("option", "value"), [(option, str(value)) for option, value in rows])
        )
    )


def _sizes(numbers: Numbers) -> str:
    stored = f"this store, packed in {in_words(numbers.packing.bits)}" if numbers.packing else "this store"
    others = {f"packed in {in_words(bits)}": sizes for bits, sizes in numbers.packed.items()
              if numbers.packing is None or numbers.packing.bits != bits}  # fmt: skip
    of = {stored: numbers.sizes, **others}
    count = sum(name != "__base__" for name in numbers.names)
    largest = max(numbers.sizes.separate_models, *(sizes.total for sizes in of.values()))
    power = min(len(UNITS) - 1, int(math.log2(max(largest, 1)) // 10))
    bars: list[tuple[str, list[tuple[str, float]]]] = [
        (f"{count} separate models", [("separate models", numbers.sizes.separate_models)])
    ]
    bars += [(label, list(zip(PARTS, _parts(sizes), strict=True))) for label, sizes in of.items()]
    rows: list[Sequence[Value]] = [
        (label, *map(byte_size, _parts(sizes)), byte_size(sizes.total), share(sizes.total, sizes.separate_models))
        for label, sizes in of.items()
    ]
    whole = numbers.sizes.separate_models
    rows.append((f"{count} separate models", "", "", "", "", byte_size(whole), share(whole, whole)))
    return (
        f"<h2>Sizes</h2>{WORDS['sizes']}"
        + figure(pictures.bars(bars, 1024.0**power, UNITS[power], "Sizes"))
        + table("sizes", ("", *PARTS, "total", "of separate models"), rows)
        + _storage(numbers)
    )


def _storage(numbers: Numbers) -> str:
    ours, theirs = (own.to_dict() for own in numbers.storage)
    rows: list[Sequence[Value]] = [(name, *(_counted(own[name]) for own in (ours, theirs))) for name in ours]
    return details(
        "Numbers and gigabytes, and as FusionBench counts them",
        WORDS["storage"] + table("storage", ("", "this store", "as FusionBench counts"), rows),
    )


def _counted(value: float) -> Value:
    return (f"{value:,}" if isinstance(value, int) else f"{value:.4g}"), value


def _retrieved(numbers: Numbers) -> str:
    if not numbers.retrieved:
        return ""
    rows: list[Sequence[Value]] = []
    layers: list[Sequence[Value]] = []
    names = tuple(numbers.layers)
    for name, own in numbers.retrieved.items():
        thirds = own.subspaces or (math.nan,) * len(THIRDS)
        rows.append((name, *map(number, (own.weights.cosine, own.weights.l2, own.deltas.total.cosine, *thirds))))
        of_layers = own.deltas.layers()
        layers.append((name, *(number(of_layers.get(layer, math.nan)) for layer in names)))
    head = ("model", "cosine of weights", "‖Ŵ − W‖", "cosine of deltas", *THIRDS)
    return (
        f"<h2>Retrieved models beside their fine-tunes</h2>{WORDS['retrieval']}"
        + table("retrieval", head, rows)
        + details("Cosines of deltas by layer", table("retrieval-layers", ("model", *names), layers))
    )


THIRDS = ("louder third", "middle third", "quieter third")
PARTS = ("base", "superposed", "kept per model", "basis and coordinates")


def _parts(sizes: Sizes) -> tuple[int, int, int, int]:
    return sizes.base, sizes.superposed, sizes.kept, sizes.basis


def _models(numbers: Numbers) -> str:
    rows: list[Sequence[Value]] = []
    for name in numbers.names:
        member, own, verified = numbers.members[name], numbers.together(name), numbers.verified.get(name)
        kept = member.kept_bytes
        rows.append((
            name, member.group, member.alpha, len(member.alphas), len(member.gains), len(member.kept), byte_size(kept),
            number(math.sqrt(own.size)), number(own.relative(own.predicted)),
            number(verified.relative_error) if verified else "not given",
            ("yes" if verified.kept_exact else "NO") if verified else "not given",
        ))  # fmt: skip
    head = (
        "model", "group", "α", "tuned α", "superposed tensors", "kept tensors", "kept", "‖δ‖", "predicted error",
        "measured error", "kept exactly",
    )  # fmt: skip
    return f"<h2>Models</h2>{WORDS['models']}" + table("models", head, rows)


def _interference(numbers: Numbers) -> str:
    if not numbers.names:
        return ""
    text = f"<h2>Interference</h2>{WORDS['interference']}"
    predicted = _layers(numbers, numbers.names, lambda cell: cell.relative(cell.predicted))
    finite = predicted[np.isfinite(predicted)]
    if finite.size and finite.max() - finite.min() < 0.01:
        text += f"<p>Predicted, for every model and layer: <b>{pictures.figures(float(finite.mean()))}</b>.</p>"
    else:
        text += _heat(numbers, "predicted", "Predicted weight error", numbers.names, predicted, "‖Ŵ − W‖ / ‖W − W0‖")
    if not numbers.verified:
        return text + "<p>Measured: needs checkpoints (<code>--model NAME=PATH</code>).</p>"
    names = tuple(numbers.verified)
    measured = _layers(numbers, names, lambda cell: cell.relative(cell.measured))
    return text + _heat(numbers, "measured", "Measured weight error", names, measured, "‖Ŵ − W‖ / ‖W − W0‖")


def _energy(numbers: Numbers) -> str:
    if not numbers.names:
        return ""
    energy = _layers(numbers, numbers.names, lambda cell: cell.energy or math.nan)
    return f"<h2>Energy by layer</h2>{WORDS['energy']}" + _heat(
        numbers, "energy", "Energy of the superposed deltas", numbers.names, energy, "g² · N · K", scale="log"
    )


def _layers(numbers: Numbers, names: Sequence[str], value: Callable[[Cell], float]) -> NDArray[np.float64]:
    found = [[value(numbers.layer(name, layer)) for layer in numbers.layers] for name in names]
    return np.array(found, dtype=np.float64)


def _heat(
    numbers: Numbers, key: str, title: str, names: Sequence[str], values: NDArray[np.float64], label: str,
    scale: str = "linear",
) -> str:  # fmt: skip
    """Models by layers: a picture, and its numbers below it."""
    rows: list[Sequence[Value]] = [(name, *map(number, own)) for name, own in zip(names, values.tolist(), strict=True)]
    picture = ""
    if np.isfinite(values).any():
        breaks = _breaks(numbers, names)
        picture = figure(
            pictures.heat(values, names, _endings(tuple(numbers.layers)), title, label, scale=scale, breaks=breaks),
            f"{title} ({label}) of each model, a row, in each layer, a column; lines part groups.",
        )
    numbers_below = details(f"{title}: numbers", table(key, ("model", *numbers.layers), rows))
    return f"<h3>{title}</h3>" + picture + numbers_below


def _cosines(numbers: Numbers) -> str:
    if not numbers.cosines:
        return f"<h2>Cosines between deltas</h2>{WORDS['no cosines']}"
    text = f"<h2>Cosines between deltas</h2>{WORDS['originals' if 'before' in numbers.cosines else 'retrieved']}"
    apart = {key: _off_diagonal(cosines) for key, cosines in numbers.cosines.items()}
    found = np.concatenate([np.abs(values[np.isfinite(values)]) for values in apart.values()])
    limit = max(0.01, float(found.max()) if found.size else 0.0)
    parts = []
    for key, cosines in numbers.cosines.items():
        title, part = WORDS[f"title {key}"], ""
        values = apart[key]
        finite = values[np.isfinite(values)]
        if finite.size:
            part += (
                f"<h3>{title}</h3><p>Mean {finite.mean():.4f}, largest magnitude {np.abs(finite).max():.4f}.</p>"
                + figure(pictures.heat(
                    values, cosines.names, cosines.names, title, "cosine", scale="signed", limit=limit,
                    breaks=_breaks(numbers, cosines.names),
                ))
            )  # fmt: skip
        rows: list[Sequence[Value]] = [
            (name, *map(number, own)) for name, own in zip(cosines.names, cosines.values.tolist(), strict=True)
        ]
        part += details(f"{title}: numbers", table(key, ("model", *cosines.names), rows))
        if cosines.sampled:
            part += (
                f"<p class='note'>{cosines.sampled} of {cosines.tensors} tensors have more than {SAMPLE:,} elements:"
                " of these, equally spaced runs of rows stand for the whole.</p>"
            )
        parts.append(f"<div>{part}</div>")
    return text + f"<div class='pair'>{''.join(parts)}</div>"


def _off_diagonal(cosines: Cosines) -> NDArray[np.float64]:
    values = cosines.values.numpy().copy()
    np.fill_diagonal(values, math.nan)
    return values


def _breaks(numbers: Numbers, names: Sequence[str]) -> list[int]:
    """Where another group begins."""
    groups = [numbers.members[name].group for name in names]
    return [place for place in range(1, len(groups)) if groups[place] != groups[place - 1]]


def _tensors(numbers: Numbers) -> str:
    superposed: list[Sequence[Value]] = []
    other: list[Sequence[Value]] = []
    for kind in sorted(numbers.kinds, key=lambda kind: (kind.fate, -kind.stored, kind.pattern)):
        shape = "×".join(map(str, kind.shape)) or "scalar"
        described = (kind.pattern, kind.tensors, shape, kind.dtype)
        if kind.fate == "superposed":
            superposed.append((*described, kind.models, byte_size(kind.nbytes), byte_size(kind.stored)))
        else:
            other.append(
                (*described, kind.fate, kind.reason, kind.models, byte_size(kind.nbytes), byte_size(kind.stored))
            )
    head = "tensors named", "count", "shape", "dtype"
    return (
        f"<h2>What is superposed</h2>{WORDS['superposed']}"
        + table("superposed", (*head, "models that changed it", "in the base", "superposed, all groups"), superposed)
        + f"<h2>What is not superposed, and why</h2>{WORDS['kept']}"
        + table("kept", (*head, "is", "why", "models with their own", "bytes a model", "stored for all models"), other)
    )


def _endings(layers: Sequence[str]) -> list[str]:
    """The layers' names as a picture tells them apart: without the beginning, and the end, that all of a kind share."""
    numbered = [layer for layer in layers if layer.rpartition(".")[2].isdigit()]
    told: dict[str, str] = {}
    for kind in (numbered, [layer for layer in layers if layer not in numbered]):
        split = [layer.split(".") for layer in kind]
        first = _shared(split)
        last = _shared([parts[first:][::-1] for parts in split])
        first -= 1 if kind is numbered and first else 0  # "layers.3", not "3"
        told |= {layer: ".".join(parts[first : len(parts) - last]) for layer, parts in zip(kind, split, strict=True)}
    return [told[layer] for layer in layers]


def _shared(names: Sequence[Sequence[str]]) -> int:
    """How many parts all begin with, so that each has one left."""
    most = min(map(len, names)) - 1 if len(names) > 1 else 0
    return next((place for place in range(most) if len({parts[place] for parts in names}) > 1), most)
