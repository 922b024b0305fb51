"""What of a model's output is a row's own, found out once for each output.

A server gives every request its row of a batch. Two things in a batch are of others: scores of a row against the other
rows, and the positions that pad a short text to the longest. Where an output looks like either, one row is run in
another batch, and the shapes tell.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

Answer = dict[str, Tensor]
"""One row's outputs by name."""
CLOSE = {torch.float64: 1e-4, torch.float32: 1e-4}
"""By how much a text's outputs may differ where it is padded, relative to their largest; 0.02 in fewer bits."""


class PaddingError(Exception):
    """Padding changes what a model answers: its texts are not to be padded."""


class Outputs:
    """Which outputs of one model are a row's own, as far as was seen yet."""

    def __init__(self) -> None:
        self._own: dict[str, bool] = {}
        self._per_token: dict[str, bool] = {}

    def of_rows(self, output: object, rows: int, again: Callable[[int], object]) -> list[Answer]:
        """The outputs of each row that are its own.

        again: the output of the first row alone, so many times. Raises ``TypeError`` where nothing has a row for each.
        """
        found = by_row(output, rows)
        others = [name for name, values in found.items() if name not in self._own and rows in values[0].shape]
        if others:
            count = 1 if rows > 1 else 2
            elsewhere = by_row(again(count), count)
            for name in others:
                self._own[name] = name in elsewhere and elsewhere[name][0].shape == found[name][0].shape
        shown = {name: values for name, values in found.items() if self._own.get(name, True)}
        return [{name: values[row] for name, values in shown.items()} for row in range(rows)]

    def without_padding(self, answers: list[Answer], lengths: Sequence[int], alone: Callable[[int], Answer]) -> None:
        """Cut what is of positions behind a row's own ``lengths``, in place.

        alone: one row's answer where nothing is padded. Raises ``PaddingError`` where that is another.
        """
        longest, shortest = max(lengths), min(range(len(lengths)), key=lengths.__getitem__)
        if answers[0].keys() - self._per_token.keys():
            self._compare(answers[shortest], alone(shortest), lengths[shortest], longest)
        for answer, length in zip(answers, lengths, strict=True):
            answer.update({name: value[:length] for name, value in answer.items() if self._per_token[name]})

    def _compare(self, padded: Answer, alone: Answer, length: int, longest: int) -> None:
        for name, value in padded.items():
            own = alone.get(name)
            if own is None:
                raise PaddingError(name)
            per_token = value.dim() > 0 and own.shape == (length, *value.shape[1:]) and len(value) == longest
            cut = value[:length] if per_token else value
            if cut.shape != own.shape or not _close(cut, own):
                raise PaddingError(name)
            self._per_token[name] = per_token


def _close(value: Tensor, own: Tensor) -> bool:
    if not own.is_floating_point():
        return torch.equal(value, own)
    scale = own.abs().max().item() if own.numel() else 0.0
    return torch.allclose(value, own, rtol=0, atol=CLOSE.get(own.dtype, 0.02) * scale, equal_nan=True)


def by_row(output: object, rows: int) -> dict[str, Sequence[Tensor]]:
    """What of an output has a tensor for each row, by its name. Raises ``TypeError`` where nothing has."""
    if isinstance(output, Mapping):
        named: dict[str, object] = dict(output)
    elif isinstance(output, tuple):
        named = {str(place): value for place, value in enumerate(output)}
    else:
        named = {"output": output}
    found: dict[str, Sequence[Tensor]] = {}
    for name, value in named.items():
        if isinstance(value, Tensor) and value.dim() and len(value) == rows:
            found[name] = list(value)
        elif isinstance(value, list) and len(value) == rows and all(isinstance(one, Tensor) for one in value):
            found[name] = value  # heads of different shapes
    if not found:
        raise TypeError(f"the model must return a tensor with a row for each of {rows}, got {type(output).__name__}")
    return found
