"""What a superposition holds, and how near a retrieved model is to its original."""

import math
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from randes.checkpoint import Checkpoint
from randes.packed import ERROR, coordinates_of
from randes.streams import Progress, ahead, digests, headers, parts, silent, size
from randes.superposition import Superposition
from randes_kernels.mixing import amplification
from randes_kernels.slices import squares as row_squares


@dataclass(frozen=True)
class Verification:
    """How near a retrieved model is to its original, in weights.

    relative_error: ‖Ŵ − W‖ / ‖W − W0‖ over all superposed tensors together.
    predicted_error: √(J−1), what J models that share a buffer give under signs, permutations and rotations (for α = 1,
        and deltas of one size where gains are shared); more with a diagonal or dense matrix, by what its inverse adds.
        Neither is the accuracy: transforms with the same weight error keep very different shares of it (design,
        section 2).
    tensors: the relative error of each superposed tensor that the model changed.
    kept_exact: whether every tensor that is kept per model came back bit for bit.
    """

    model: str
    models_in_group: int
    relative_error: float
    predicted_error: float
    kept_exact: bool
    tensors: dict[str, float]


def verify(
    superposition: Superposition, name: str, finetuned: Checkpoint, *, progress: Progress = silent
) -> Verification:
    """Compare a model, as retrieved, with the checkpoint that was added under its name.

    progress: told of each stage and its bytes, for a progress bar.
    Raises ``UnknownModelError``, and ``CheckpointError`` for any other checkpoint.
    """
    member = superposition.member(name)
    retrieved = superposition.matrices(name, progress=progress)
    step = progress("verifying", 2 * size(superposition.base))
    original = superposition.read_added(name, finetuned, step=step)
    squares: dict[str, tuple[float, float]] = {}
    for tensor in member.gains:
        own = (parts(tensors, tensor) for tensors in (retrieved, original, superposition.base))
        errors, sizes = [], []
        with ahead(zip(*own, strict=True)) as values:
            for found, tuned, base in values:
                errors += row_squares(found, tuned)
                sizes += row_squares(tuned, base)
                step(tuned.nbytes)
        squares[tensor] = math.fsum(errors), math.fsum(sizes)
    error, total = (sum(part) for part in zip(*squares.values(), strict=True)) if squares else (0.0, 1.0)
    kept = digests(retrieved, headers(member.kept), step=step)
    group = sum(other.group == member.group for other in superposition.members.values())
    return Verification(
        model=name,
        models_in_group=group,
        relative_error=math.sqrt(error / total),
        predicted_error=_predicted_error(superposition, name),
        kept_exact=all(found == member.digests[tensor] for tensor, found in kept.items()),
        tensors={tensor: math.sqrt(error / size) for tensor, (error, size) in squares.items()},
    )


def _predicted_error(superposition: Superposition, name: str) -> float:
    """√(J−1), and what packing adds, over the tensors, each with the J of the models that changed it: a delta scaled
    by α keeps an error of 1−α of its own, and takes α of each neighbour's size."""
    member = superposition.members[name]
    group = {other: m for other, m in superposition.members.items() if m.group == member.group}
    sharing = Counter(superposition.place(other, tensor) for other, m in group.items() for tensor in m.gains)
    error, size, packing = 0.0, 0.0, superposition.packing
    for tensor, gain in member.gains.items():
        weight = gain**2 * headers(superposition.base)[tensor].numel()
        neighbours = sharing[superposition.place(name, tensor)] - 1
        own = weight
        if tensor in member.coordinates:  # the model's own in the shared basis, where nobody interferes
            own += member.units[tensor] ** 2 * _squared_norm(coordinates_of(member.coordinates[tensor]).double())
        columns, matrix = headers(superposition.base)[tensor].shape[1], superposition.config.transform.matrix
        amplified = amplification(superposition.key(name), superposition.tensor_id(tensor), columns, matrix)
        rounding = 0.0 if packing is None else (neighbours + 1) * ERROR[packing.bits] ** 2
        alpha = member.alpha_of(tensor)
        error += (1 - alpha) ** 2 * own + alpha**2 * amplified * (neighbours + rounding) * weight
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
                "tuned_tensors": len(member.alphas),
                "superposed_tensors": len(member.gains),
                "kept_tensors": len(member.kept),
                "kept_bytes": size(member.kept),
            }
            for name, member in ((name, superposition.members[name]) for name in superposition.served)
        },
        "config": superposition.config.to_dict(),
        "packed": None if superposition.packing is None else asdict(superposition.packing),
        "bytes": {**asdict(sizes), "total": sizes.total},
        "coverage": {
            "superposed": _described(superposition, superposition.superposed),
            {"keep": "kept", "sum": "summed"}.get(superposition.config.others, "averaged"): _described(
                superposition, sorted(kept)
            ),
            "shared_with_base": _described(superposition, sorted(shared)),
        },
    }


def _described(superposition: Superposition, names: tuple[str, ...] | list[str]) -> dict[str, str]:
    """Shape and dtype of each tensor."""
    tensors = {name: headers(superposition.base)[name] for name in names}
    return {name: f"{'×'.join(map(str, t.shape))} {str(t.dtype).removeprefix('torch.')}" for name, t in tensors.items()}


def _squared_norm(value: Tensor) -> float:
    return float(value.square().sum())
