"""What a user could do instead with one model's memory: merge the fine-tunes. Our own implementations."""

from collections.abc import Sequence

import torch
from torch import Tensor

Deltas = Sequence[dict[str, Tensor]]
"""Of each model its deltas, fine-tuned minus base, by tensor."""

SCALES = tuple(round(0.1 * i, 1) for i in range(1, 16))
"""λ of which each merging method gets the one that is best on the held-out images: in its favour."""


def task_arithmetic(deltas: Deltas) -> dict[str, Tensor]:
    """The sum of all deltas (arXiv 2212.04089); λ times it is added to the base."""
    return {name: torch.stack([delta[name] for delta in deltas]).sum(0) for name in deltas[0]}


def ties(deltas: Deltas, density: float = 0.2) -> dict[str, Tensor]:
    """TIES merging (arXiv 2306.01708): trim each model's delta to its largest values, elect a sign for each weight,
    and average the values that agree with it; λ times it is added to the base.

    density: the share of each model's values that is kept, over all its tensors together.
    """
    names, shapes = list(deltas[0]), [delta.shape for delta in deltas[0].values()]
    vectors = torch.stack([torch.cat([delta[name].flatten() for name in names]) for delta in deltas])
    keep = max(1, round(density * vectors.shape[1]))
    threshold = vectors.abs().topk(keep, dim=1).values[:, -1:]
    trimmed = torch.where(vectors.abs() >= threshold, vectors, 0)
    agrees = trimmed.sign() == trimmed.sum(0).sign()
    merged = torch.where(agrees, trimmed, 0).sum(0) / (agrees & (trimmed != 0)).sum(0).clamp(min=1)
    parts = torch.split(merged, [shape.numel() for shape in shapes])
    return {name: part.view(shape) for name, part, shape in zip(names, parts, shapes, strict=True)}
