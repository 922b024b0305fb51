"""How far an answer is from each row's own model, of the distance between models: over all tensors of an output."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from architecture_inputs import ROWS
from torch import Tensor, nn

SMALLEST = 1e-5
"""Of the distance between models, what any computation's rounding may be."""
LARGEST = 1e-3
"""Where rounding may be more, as behind the best of many scores, nothing is said of an answer."""


def tensors(output: Any, path: str = "", seen: set[int] | None = None) -> Iterator[tuple[str, Tensor]]:
    """Every floating tensor of an output by its place in it, caches included."""
    seen = set() if seen is None else seen
    if isinstance(output, Tensor):
        if output.is_floating_point() or output.is_complex():
            yield path, (torch.view_as_real(output) if output.is_complex() else output).detach()
        return
    if id(output) in seen or output is None or isinstance(output, str | int | float | bool | nn.Module):
        return
    seen.add(id(output))
    parts: Any = {}
    if isinstance(output, Mapping):
        parts = output.items()
    elif isinstance(output, list | tuple):
        parts = enumerate(output)
    elif type(output).__module__.startswith("transformers."):
        parts = vars(output).items()
    for name, part in parts:
        yield from tensors(part, f"{path}.{name}", seen)


def axis_of(value: Tensor) -> int | None:
    """Which dimension is the batch's, or the batch's times others'; None where that cannot be told."""
    if value.dim() and value.shape[0] and value.shape[0] % ROWS == 0:
        return 0
    axes = [axis for axis, size in enumerate(value.shape) if size == ROWS]
    return axes[0] if len(axes) == 1 else None


def row_of(value: Tensor, axis: int, row: int) -> Tensor:
    """One row of the batch."""
    return value.movedim(axis, 0).unflatten(0, (ROWS, -1))[row]


def _finite(value: Tensor) -> Tensor:
    return torch.nan_to_num(value.double(), 0.0, 0.0, 0.0)


def distance(found: Tensor, expected: Tensor) -> float:
    """Root of the summed squares; infinite where shapes differ, or what is finite."""
    if found.shape != expected.shape or not torch.equal(found.isfinite(), expected.isfinite()):
        return float("inf")
    return float((_finite(found) - _finite(expected)).norm())


class IndistinctError(Exception):
    """The models do not differ in their answers: nothing can be measured."""


Answers = dict[str, dict[str, Tensor]]
"""By model, the tensors of an output by their places."""


def axes_of(found: dict[str, Tensor]) -> dict[str, int]:
    """Which dimension of each tensor is the batch's, where that can be told."""
    return {place: axis for place, value in found.items() if (axis := axis_of(value)) is not None}


def gap(mine: Tensor, others: list[Tensor]) -> float:
    """How far one model's tensor is from the nearest other's; 0 where that is not more than rounding."""
    least = min(distance(other, mine) for other in others)
    return least if 1e-3 * float(_finite(mine).norm()) < least < float("inf") else 0.0


class Error(NamedTuple):
    """The worst place of an answer. size: the distance from each row's own model there, of that between models.

    excess: the same, of what rounding may be there; above 1 the answer is another.
    """

    size: float
    excess: float
    where: str


def error_of(
    found: dict[str, Tensor], answers: Answers, owners: list[str], *, rounding: dict[str, float] | None = None,
    axes: dict[str, int] | None = None,
) -> Error:  # fmt: skip
    """How far an answer is from each row's own model.

    owners: one model, or one of each row. rounding: what it may move each tensor by, of the distance between models.
    axes: where rows are; by default where the answers' shapes say.
    Raises ``IndistinctError`` where no output tells models apart.
    """
    worst, rounding = Error(0.0, 0.0, ""), rounding or {}
    measured = False
    if found.keys() != answers[owners[0]].keys():
        odd = sorted(found.keys() ^ answers[owners[0]].keys())
        return Error(float("inf"), float("inf"), f"{odd[:3]}, which are in one alone")
    axes = axes_of(found) if axes is None else axes
    for place, value in found.items():
        for row, own in enumerate(owners):
            expected = answers[own][place]
            if value.shape != expected.shape:
                return Error(float("inf"), float("inf"), f"{place}, {tuple(value.shape)} for {tuple(expected.shape)}")
            everyone = [value, expected, *(answers[other][place] for other in answers if other != own)]
            if len(owners) > 1:
                if place not in axes:
                    continue
                everyone = [row_of(x, axes[place], row) for x in everyone]
            scale = gap(everyone[1], everyone[2:])
            if not scale or rounding.get(place, SMALLEST) > LARGEST:
                continue
            measured = True
            size = distance(everyone[0], everyone[1]) / scale
            excess = size / rounding.get(place, SMALLEST)
            if not excess <= worst.excess:
                worst = Error(size, excess, f"{place} of {own!r}" + (f", row {row}" if len(owners) > 1 else ""))
    if not measured:
        raise IndistinctError
    return worst
