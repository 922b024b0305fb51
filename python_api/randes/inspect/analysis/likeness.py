"""How alike tensors and models are, as vectors. Models are read a part of a tensor at a time; sums are in fp64."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from randes.checkpoints import sources
from randes.checkpoints.fit.tensors import check_fits
from randes.checkpoints.lazy_tensors import chunks, headers
from randes.checkpoints.sources import Checkpoint, Tensors

Device = str | torch.device
AT_A_TIME = 1 << 22
"""Elements, of all models together, that one product is made of: 32 MiB in fp64."""


def cosine_similarity(first: Tensor, second: Tensor) -> float:
    """Of two tensors of one shape as vectors; 0 where either is zero. Raises ``ValueError`` for other shapes."""
    check_same_shape("second", second, first)
    return Products.of(first, second).cosine


def pairwise_cosines(
    tensors: Sequence[Tensor] | Mapping[str, Checkpoint], names: Iterable[str] | None = None, *, device: Device = "cpu"
) -> Tensor:
    """Cosines of every two: (J, J) fp64, 0 with what is zero.

    tensors: of one shape; or models by name, each as one vector of its floating-point tensors, or of those in
    ``names``. Every part of every tensor is read once and enters one product of all with all. device: where that runs.
    Raises ``ValueError`` for none, or other shapes; ``CheckpointError`` for models that differ in names or shapes.
    """
    if not tensors:
        raise ValueError("tensors must hold at least one tensor or model, got none")
    if isinstance(tensors, Mapping):
        models = [sources.read(model) for model in tensors.values()]
        for model in models[1:]:
            check_fits(model, models[0])
    else:
        for tensor in tensors[1:]:
            check_same_shape("tensors", tensor, tensors[0])
        models = [{"": tensor.detach()} for tensor in tensors]
    sums = torch.zeros(len(models), len(models), dtype=torch.float64, device=device)
    for name in _chosen(models[0], names):
        for own in zip(*(chunks(model, name) for model in models), strict=True):
            for some in zip(*(part.flatten().split(max(1, AT_A_TIME // len(own))) for part in own), strict=True):
                exact = torch.stack([part.to(device) for part in some]).double()
                sums += exact @ exact.mT
    norms = sums.diagonal().sqrt()
    return (sums / torch.where(norms > 0, norms, torch.inf).outer(norms.clamp(min=1e-300))).clamp(-1, 1).cpu()


@dataclass(frozen=True)
class Likeness:
    """Two tensors: l2 is ‖a − b‖, cosine that of both as vectors, elements how many each has."""

    l2: float
    cosine: float
    elements: int


@dataclass(frozen=True)
class Comparison:
    """Two models: each tensor's likeness by name, and that of all of them as one vector."""

    tensors: Mapping[str, Likeness]
    total: Likeness

    @property
    def mean_cosine(self) -> float:
        """Over the tensors, each counting once whatever its size."""
        return math.fsum(own.cosine for own in self.tensors.values()) / len(self.tensors)

    def layers(self) -> dict[str, float]:
        """The mean cosine of each layer's tensors; a layer is what has one beginning up to its first number."""
        return {
            layer: math.fsum(self.tensors[name].cosine for name in names) / len(names)
            for layer, names in layers(self.tensors).items()
        }

    def fusionbench(self) -> dict[str, Any]:
        """Under FusionBench's names, where an l2 is ‖a − b‖ divided by the number of elements."""
        l2 = {name: own.l2 / max(1, own.elements) for name, own in self.tensors.items()}
        return {
            "layerwise_l2": l2,
            "layerwise_cosine_similarity": {name: own.cosine for name, own in self.tensors.items()},
            "total_l2": self.total.l2 / max(1, self.total.elements),
            "average_l2": math.fsum(l2.values()) / len(l2),
            "total_cosine_similarity": self.total.cosine,
            "average_cosine_similarity": self.mean_cosine,
        }


def layers(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """The tensors of each layer, which is named by what comes before and with the first number of their names."""
    found: dict[str, list[str]] = {}
    for name in names:
        numbered = re.match(r"(?:.*?\.)?\d+(?=\.|$)", name)
        found.setdefault(numbered[0] if numbered else name, []).append(name)
    in_order = sorted(
        found,
        key=lambda layer: [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in layer.split(".")],
    )
    return {layer: tuple(found[layer]) for layer in in_order}


def compare_models(
    first: Checkpoint, second: Checkpoint, names: Iterable[str] | None = None, *, device: Device = "cpu"
) -> Comparison:
    """Two models tensor by tensor and in total. names: those to compare; else every floating-point tensor of ``first``.

    device: where parts are compared. Raises ``CheckpointError`` for models that differ in names, shapes or dtypes, and
    ``ValueError`` for a name that is not there.
    """
    one, other = sources.read(first), sources.read(second)
    check_fits(other, one)
    sums = {name: Products.over(one, other, name, torch.device(device)) for name in _chosen(one, names)}
    return Comparison({name: own.likeness for name, own in sums.items()}, Products.sum(sums.values()).likeness)


class Products(NamedTuple):
    """a·a, b·b, a·b and ‖a − b‖², which is summed by itself: of near tensors the others would cancel."""

    first: float = 0.0
    second: float = 0.0
    both: float = 0.0
    apart: float = 0.0
    elements: int = 0

    @classmethod
    def of(cls, first: Tensor, second: Tensor) -> "Products":
        a, b = first.detach().double().flatten(), second.detach().double().flatten()
        return cls(float(a @ a), float(b @ b), float(a @ b), float((a - b).square().sum()), a.numel())

    @classmethod
    def over(cls, first: Tensors, second: Tensors, name: str, device: torch.device) -> "Products":
        return cls.sum(
            cls.of(a.to(device), b.to(device)) for a, b in zip(chunks(first, name), chunks(second, name), strict=True)
        )

    @classmethod
    def sum(cls, several: Iterable["Products"]) -> "Products":
        own = list(several)
        first, second, both, apart = (math.fsum(products[place] for products in own) for place in range(4))
        return cls(first, second, both, apart, sum(products.elements for products in own))

    @property
    def cosine(self) -> float:
        size = math.sqrt(self.first) * math.sqrt(self.second)
        return max(-1.0, min(1.0, self.both / size)) if size else 0.0

    @property
    def likeness(self) -> Likeness:
        return Likeness(math.sqrt(self.apart), self.cosine, self.elements)


def _chosen(model: Tensors, names: Iterable[str] | None) -> list[str]:
    found = headers(model)
    if names is None:
        return [name for name, header in found.items() if header.is_floating_point()]
    chosen = list(names)
    if not chosen:
        raise ValueError("names must hold at least one tensor's, got none")
    if absent := [name for name in chosen if name not in found]:
        raise ValueError(f"names must be of tensors that the models have, got {absent[0]!r}")
    return chosen


def check_same_shape(argument: str, value: Tensor, expected: Tensor) -> None:
    """Raise ``ValueError`` that names the argument."""
    if value.shape != expected.shape:
        raise ValueError(f"{argument} must be of shape {tuple(expected.shape)}, got {tuple(value.shape)}")
