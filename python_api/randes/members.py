"""What a superposition records of each model, and what all of it weighs."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from randes_kernels import Packed

BASE_NAME = "__base__"
"""The base's own name, where deltas are centred on their mean and it is superposed like any other."""


@dataclass(frozen=True)
class Member:
    """What is kept of one model beside its part of the superposition.

    gains: root mean square of its delta, for each tensor that it changed and that is superposed.
    digests: of every tensor of its checkpoint, so that only this checkpoint can be taken away again.
    kept: its own other tensors, where they differ from the base's (``others="keep"``).
    coordinates: its deltas in the shared bases, (N, r) int16 by tensor, in steps of ``units``; or (r, N) packed.
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

    def alpha_of(self, tensor: str) -> float:
        """What the delta of one tensor is scaled by."""
        return self.alphas.get(tensor, self.alpha)


@dataclass(frozen=True)
class Sizes:
    """Bytes: of the base, of all superposed deltas, of what is kept per model, and of that many whole models.

    basis: of the shared bases, and of every model's coordinates in them.
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
