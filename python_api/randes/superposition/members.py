"""What a superposition records of each model, and what all of it weighs."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from unicodedata import category

import torch
from torch import Tensor

from randes.checkpoints.lazy_tensors import size
from randes.checkpoints.schema import is_utf8
from randes_kernels import Packed

BASE_NAME = "__base__"
"""The base's own name, where deltas are centred on their mean and it is superposed like any other."""
LARGEST, TINY = torch.finfo(torch.float32).max, torch.finfo(torch.float32).tiny
LONGEST_NAME = 200
"""Bytes of a model's name in UTF-8."""
CONTROLS = ("Cc", "Zl", "Zp")
"""Unicode's control characters, newlines among them, and what separates lines and paragraphs."""
REACH = 64.0
"""Gains that a number of a superposition is worth at most while int16 holds it; a coordinate is 2**15 units."""


@dataclass(frozen=True)
class Member:
    """What is kept of one model beside its part of the superposition.

    gains: root mean square of its delta, for each tensor that it changed and that is superposed.
    digests: of every tensor of its checkpoint, so that only this checkpoint can be taken away again.
    kept: its own other tensors, where they differ from the base's (``others="keep"``).
    coordinates: its deltas in the shared bases, (N, r) int16 by tensor, in steps of ``units``; or (r, N) packed.
    directions: bases of its own, (K, r) int16, of unshared tensors in few bits.
    added: rows that its matrices have below the base's, (A, K) by tensor (added_rows.py).
    index: its place among the models, which its layers are shifted by (``shuffle_layers`` above 0); it stays where
        others come and go.
    alphas: what a tensor's delta is scaled by where that was tuned (``Superposition.tune``); else ``alpha``.
    """

    group: int
    alpha: float
    gains: Mapping[str, float]
    digests: Mapping[str, str]
    kept: Mapping[str, Tensor] = field(default_factory=dict)
    units: Mapping[str, float] = field(default_factory=dict)
    coordinates: Mapping[str, Tensor | Packed] = field(default_factory=dict)
    alphas: Mapping[str, float] = field(default_factory=dict)
    index: int = 0
    directions: Mapping[str, Tensor] = field(default_factory=dict)
    added: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def kept_bytes(self) -> int:
        """Of what it has beside all superpositions, whole tensors and added rows."""
        return size(self.kept) + size(self.added)

    def alpha_of(self, tensor: str) -> float:
        """What the delta of one tensor is scaled by."""
        return self.alphas.get(tensor, self.alpha)


@dataclass(eq=False)
class NewModel:
    """A model on its way in: where its tensors come from, and what was found of them so far (as in ``Member``)."""

    name: str
    group: int
    alpha: float
    tensors: Mapping[str, Tensor]
    index: int = 0
    gains: dict[str, float] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    kept: dict[str, Tensor] = field(default_factory=dict)
    units: dict[str, float] = field(default_factory=dict)
    coordinates: dict[str, Tensor] = field(default_factory=dict)
    added: dict[str, Tensor] = field(default_factory=dict)

    def member(self) -> Member:
        found = self.gains, self.digests, self.kept, self.units, self.coordinates
        return Member(self.group, self.alpha, *found, index=self.index, added=self.added)


def check_name(name: object) -> None:
    """Raise ``ValueError`` for what no fine-tune can be called: a name is a text that one line can hold, other than the
    base's own."""
    text = name if isinstance(name, str) and is_utf8(name) else ""
    right = text.strip() and text != BASE_NAME and len(text.encode()) <= LONGEST_NAME
    if not right or any(category(letter) in CONTROLS for letter in text):
        raise ValueError(
            f"name must be a non-empty string other than {BASE_NAME!r}, in UTF-8, no blanks alone, of at most"
            f" {LONGEST_NAME} bytes and without control characters, got {name!r}"
        )


def free_index(taken: set[int], wanted: int | None) -> int:
    """The first index that no model has, or the ``wanted`` one. Raises ``ValueError`` where that is none or taken."""
    if wanted is None:
        return next(index for index in range(len(taken) + 1) if index not in taken)
    if type(wanted) is not int or wanted < 0 or wanted in taken:
        raise ValueError(f"index must be an integer of at least 0 that no model has, got {wanted!r}")
    return wanted


def free_group(taken: list[int], size: int, wanted: int | None) -> int:
    """The first group with room, or the ``wanted`` one. taken: the group of each model. size: models in a group.

    Raises ``ValueError`` for one that is full, or is not the next to be begun.
    """
    if wanted is None:
        return next(group for group in range(len(taken) + 1) if taken.count(group) < size)
    limit = max(taken, default=-1) + 1
    if type(wanted) is not int or not 0 <= wanted <= limit:
        raise ValueError(f"group must be an integer from 0 to {limit}, got {wanted!r}")
    if taken.count(wanted) >= size:
        raise ValueError(f"group must have room; group {wanted} has its {size} models")
    return wanted


def check_alpha(alpha: object) -> None:
    """Raise ``ValueError`` for an α that is no number, or not finite in fp32. A negative one turns a delta around."""
    if not _within(alpha, -LARGEST):
        raise ValueError(f"alpha must be a finite number in fp32, got {alpha!r}")


def check_scales(name: str, member: Member) -> None:
    """Raise ``ValueError`` where a model's numbers could not be scaled in fp32: what comes back would not be finite."""

    def must(right: bool, what: str, expected: str, value: object) -> None:
        if not right:
            raise ValueError(f"{what} of model {name!r} must be {expected}, got {value!r}")

    for what, number in {"group": member.group, "index": member.index}.items():
        must(type(number) is int and number >= 0, what, "an integer of at least 0", number)
    for what, alpha in {"alpha": member.alpha, **{f"alpha of {t}": a for t, a in member.alphas.items()}}.items():
        must(_within(alpha, -LARGEST), what, "a finite number in fp32", alpha)
    for what, held, least, reach in (("gain", member.gains, TINY, REACH), ("unit", member.units, 5e-324, 2.0**15)):
        for tensor, value in held.items():
            must(_within(value, least), f"{what} of {tensor}", "a finite number in fp32 above 0", value)
            scaled = member.alpha_of(tensor) * value
            must(abs(scaled) * reach <= LARGEST, f"alpha · {what} of {tensor}", f"below {LARGEST / reach:.2g}", scaled)


def _within(value: object, least: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= LARGEST


@dataclass(frozen=True)
class Sizes:
    """Bytes: of the base, of all superposed deltas, of what is kept per model, and of that many whole models.

    basis: of the bases, and of every model's coordinates in them.
    """

    base: int
    superposed: int
    kept: int
    basis: int
    separate_models: int

    @property
    def total(self) -> int:
        """Everything that a store holds."""
        return self.base + self.superposed + self.kept + self.basis
