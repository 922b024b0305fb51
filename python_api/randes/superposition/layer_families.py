"""Same-named layers: which tensors differ in a layer's number alone, and how a model shuffles or shifts them."""

import re
from collections.abc import Mapping

from torch import Tensor

from randes_kernels.format import Stream, permutation, tensor_id


def families(tensors: Mapping[str, Tensor], names: tuple[str, ...]) -> dict[str, list[str]]:
    """The names by family: of one shape, equal but for their first number. In order of that number.

    ``layers.3.attention.q.weight`` is of the family ``layers.*.attention.q.weight (64, 64)``; a name without
    a number is a family of its own.
    """
    found: dict[str, list[str]] = {}
    for name in names:
        pattern = re.sub(r"(?<![^.])\d+(?![^.])", "*", name, count=1)
        found.setdefault(f"{pattern} {tuple(tensors[name].shape)}", []).append(name)
    return {family: sorted(members, key=_numbers) for family, members in found.items()}


def shuffled(key: int, family: str, members: list[str]) -> dict[str, str]:
    """Where one model keeps the delta of each layer of a family: a permutation keyed by model and family."""
    order = permutation(key, tensor_id(family), len(members), stream=Stream.LAYER_SHUFFLE).tolist()
    return {name: members[place] for name, place in zip(members, order, strict=True)}


def shifted(by: int, members: list[str]) -> dict[str, str]:
    """Where a model that is moved ``by`` layers keeps the deltas of a family: after the last layer comes the first."""
    return {name: members[(place + by) % len(members)] for place, name in enumerate(members)}


def _numbers(name: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", name)]
