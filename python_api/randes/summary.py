"""What a superposition holds, and how near a retrieved model is to its original."""

import math
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from randes import checkpoint
from randes.checkpoint import Checkpoint
from randes.superposition import Superposition


@dataclass(frozen=True)
class Verification:
    """How near a retrieved model is to its original, in weights.

    relative_error: ‖Ŵ − W‖ / ‖W − W0‖ over all superposed tensors together.
    predicted_error: √(J−1), what J models that share a buffer give under every transform (for α = 1). Neither is
        the accuracy: transforms with the same weight error keep very different shares of it (design, section 2).
    tensors: the relative error of each superposed tensor that the model changed.
    kept_exact: whether every tensor that is kept per model came back bit for bit.
    """

    model: str
    models_in_group: int
    relative_error: float
    predicted_error: float
    kept_exact: bool
    tensors: dict[str, float]


def verify(superposition: Superposition, name: str, finetuned: Checkpoint) -> Verification:
    """Compare a model, as retrieved, with the checkpoint that was added under its name.

    Raises ``UnknownModelError``, and ``CheckpointError`` for any other checkpoint.
    """
    original = superposition.read_added(name, finetuned)
    member = superposition.members[name]
    retrieved = superposition.layout.split(superposition.retrieve(name))
    squares = {
        tensor: (
            _squared_norm(retrieved[tensor].double() - original[tensor].double()),
            _squared_norm(original[tensor].double() - superposition.base[tensor].double()),
        )
        for tensor in member.gains
    }
    error, size = (sum(part) for part in zip(*squares.values(), strict=True)) if squares else (0.0, 1.0)
    group = sum(other.group == member.group for other in superposition.members.values())
    return Verification(
        model=name,
        models_in_group=group,
        relative_error=math.sqrt(error / size),
        predicted_error=_predicted_error(superposition, name),
        kept_exact=all(checkpoint.digest(retrieved[tensor]) == member.digests[tensor] for tensor in member.kept),
        tensors={tensor: math.sqrt(error / size) for tensor, (error, size) in squares.items()},
    )


def _predicted_error(superposition: Superposition, name: str) -> float:
    """√(J−1) over the tensors, each with the J of the models that changed it: a delta scaled by α keeps an error
    of 1−α of its own, and takes α of each neighbour's size."""
    member = superposition.members[name]
    group = {other: m for other, m in superposition.members.items() if m.group == member.group}
    sharing = Counter(superposition.place(other, tensor) for other, m in group.items() for tensor in m.gains)
    error = size = 0.0
    for tensor, gain in member.gains.items():
        weight = gain**2 * superposition.base[tensor].numel()
        neighbours = sharing[superposition.place(name, tensor)] - 1
        own = weight
        if tensor in member.coordinates:  # the model's own in the shared basis, where nobody interferes
            own += member.units[tensor] ** 2 * _squared_norm(member.coordinates[tensor].double())
        error += (1 - member.alpha) ** 2 * own + member.alpha**2 * neighbours * weight
        size += own
    return math.sqrt(error / size) if size else 0.0


def summary(superposition: Superposition) -> dict[str, Any]:
    """Models, transform, sizes in bytes, and which tensors are superposed, kept or shared: ready for JSON."""
    sizes = superposition.sizes
    kept = set(superposition.others)
    shared = superposition.base.keys() - kept - set(superposition.superposed)
    return {
        "models": {
            name: {
                "group": member.group,
                "alpha": member.alpha,
                "superposed_tensors": len(member.gains),
                "kept_tensors": len(member.kept),
                "kept_bytes": sum(value.nbytes for value in member.kept.values()),
            }
            for name, member in ((name, superposition.members[name]) for name in superposition.served)
        },
        "config": superposition.config.to_dict(),
        "bytes": {**asdict(sizes), "total": sizes.total},
        "coverage": {
            "superposed": _described(superposition, superposition.superposed),
            "kept" if superposition.config.others == "keep" else "averaged": _described(superposition, sorted(kept)),
            "shared_with_base": _described(superposition, sorted(shared)),
        },
    }


def _described(superposition: Superposition, names: tuple[str, ...] | list[str]) -> dict[str, str]:
    """Shape and dtype of each tensor."""
    tensors = {name: superposition.base[name] for name in names}
    return {name: f"{'×'.join(map(str, t.shape))} {str(t.dtype).removeprefix('torch.')}" for name, t in tensors.items()}


def _squared_norm(value: Tensor) -> float:
    return float(value.square().sum())
