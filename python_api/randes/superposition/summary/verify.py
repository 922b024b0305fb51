"""How near a retrieved model is to its original, as measured and as predicted."""

import math
from collections import Counter
from dataclasses import dataclass

from torch import Tensor

from randes.checkpoints.lazy_tensors import Progress, chunks, digests, headers, silent, size
from randes.checkpoints.sources import Checkpoint
from randes.checkpoints.threads import ahead
from randes.superposition.added_rows import added_in
from randes.superposition.members import Member
from randes.superposition.packed_tensors import added_noise, coordinates_of, values_of
from randes.superposition.reading import read_added
from randes.superposition.retrieve import matrices
from randes.superposition.state import State
from randes_kernels.mixing import amplification, growth
from randes_kernels.slices import squares as row_squares


@dataclass(frozen=True)
class Verification:
    """How near a retrieved model is to its original, in weights.

    relative_error: ‖Ŵ − W‖ / ‖W − W0‖ over all superposed tensors together, as measured.
    predicted_error: the same as J models that share a buffer should have it: √(J−1) under signs, permutations and
        rotations for α = 1 and deltas of one size. Less by what is in a shared basis; more by what packing adds, what α
        takes from the delta, and the inverse of a diagonal or dense matrix.
    Neither is the accuracy: transforms with the same weight error keep very different shares of it (design, section 2).
    tensors: the relative error of each superposed tensor that the model changed.
    kept_exact: whether every tensor that is kept per model came back bit for bit.
    """

    model: str
    models_in_group: int
    relative_error: float
    predicted_error: float
    kept_exact: bool
    tensors: dict[str, float]


def verify(superposition: State, name: str, finetuned: Checkpoint, *, progress: Progress = silent) -> Verification:
    """Compare a model, as retrieved, with the checkpoint that was added under its name.

    progress: told of each stage and its bytes, for a progress bar.
    Raises ``UnknownModelError``, and ``CheckpointError`` for any other checkpoint.
    """
    member = superposition.member(name)
    retrieved = matrices(superposition, name, progress=progress)
    step = progress("verifying", 2 * size(superposition.base))
    original = read_added(superposition, name, finetuned, step=step)
    squares: dict[str, tuple[float, float]] = {}
    for tensor in member.gains:
        own = (chunks(tensors, tensor) for tensors in (retrieved, original, superposition.base))
        errors, sizes = [], []
        with ahead(zip(*own, strict=True)) as values:
            for found, tuned, base in values:
                errors += row_squares(found, tuned)
                sizes += row_squares(tuned, base)
                step(tuned.nbytes)
        squares[tensor] = math.fsum(errors), math.fsum(sizes)
    error, total = (sum(part) for part in zip(*squares.values(), strict=True)) if squares else (0.0, 1.0)
    kept = digests(retrieved, [*headers(member.kept), *added_in(member.digests).values()], step=step)
    group = sum(other.group == member.group for other in superposition.members.values())
    return Verification(
        model=name,
        models_in_group=group,
        relative_error=math.sqrt(error / total),
        predicted_error=_predicted_error(superposition, name),
        kept_exact=all(found == member.digests[tensor] for tensor, found in kept.items()),
        tensors={tensor: math.sqrt(error / size) for tensor, (error, size) in squares.items()},
    )


def _predicted_error(superposition: State, name: str) -> float:
    sharing = sharing_of(superposition)
    found = [predicted(superposition, name, t, sharing[name, t]) for t in superposition.members[name].gains]
    size, error = (sum(column) for column in zip(*found, strict=True)) if found else (0.0, 0.0)
    return math.sqrt(error / size) if size else 0.0


def sharing_of(superposition: State) -> dict[tuple[str, str], int]:
    """Of each model and tensor that it has a delta of, how many models' deltas are in the same superposition."""
    lying = {
        (name, tensor): (superposition.group_of(name, tensor), superposition.place(name, tensor))
        for name, member in superposition.members.items()
        for tensor in member.gains
    }
    counted = Counter(lying.values())
    return {where: counted[place] for where, place in lying.items()}


def predicted(superposition: State, name: str, tensor: str, sharing: int) -> tuple[float, float]:
    """‖δ‖² of a model's delta of one tensor, and ‖Ŵ − W‖² of what comes back where so many models share the buffer.

    Every neighbour comes as large as the delta itself, and packing adds a share of all of them; what turns columns back
    may amplify that, and a shared basis takes its directions' part of it away. A delta scaled by α keeps an error of
    1 − α of its own.
    """
    member, packing = superposition.members[name], superposition.packing
    header = headers(superposition.base)[tensor]
    size = energy(superposition, name, tensor, sharing)
    if tensor in superposition.unshared:
        return _predicted_alone(superposition, member, tensor, size)
    columns, matrix = header.shape[1], superposition.config.transform.matrix
    amplified = amplification(superposition.key(name), superposition.tensor_id(tensor), columns, matrix)
    noise = (
        (sharing - 1 + (0.0 if packing is None else sharing * added_noise(packing.bits, columns))) * size * amplified
    )
    if tensor in member.coordinates:  # the model's own in the shared basis, where nobody interferes
        own = member.units[tensor] ** 2 * _squared_norm(coordinates_of(member.coordinates[tensor]).double())
        noise *= 1 - rank_of(superposition, tensor) / columns
        if packing is not None and packing.coordinates < 16:
            noise += own * added_noise(packing.coordinates, len(header))
        size += own
    alpha = member.alpha_of(tensor)
    return size, (1 - alpha) ** 2 * size + alpha**2 * noise


def _predicted_alone(superposition: State, member: Member, tensor: str, size: float) -> tuple[float, float]:
    """The same of a delta that the model has to itself: the error of few bits, and of α. What they round is what is not
    in its directions, and what those lose."""
    error, alpha, packing = 0.0, member.alpha_of(tensor), superposition.packing
    if packing is not None:
        own = member.units[tensor] ** 2 * _squared_norm(coordinates_of(member.coordinates[tensor]).double())
        rows, columns = headers(superposition.base)[tensor].shape
        rounded = own * added_noise(packing.coordinates, rows) if packing.coordinates < 16 else 0.0
        left = added_noise(packing.embeddings, columns) if packing.embeddings else 1.0
        error = (max(0.0, size - own) + rounded) * left
    return size, (1 - alpha) ** 2 * size + alpha**2 * error


def energy(superposition: State, name: str, tensor: str, sharing: int) -> float:
    """‖δ‖² of what is superposed of a model's delta of one tensor; where gains are shared, which say nothing of it, the
    mean over the models in the buffer, from what is in there."""
    member, config = superposition.members[name], superposition.config
    header, gain = headers(superposition.base)[tensor], member.gains[tensor]
    if config.gains == "own" or tensor in superposition.unshared:
        return gain**2 * header.numel()
    numbers, unit = values_of(superposition.held[member.group][superposition.place(name, tensor)])
    return (
        (gain * unit) ** 2
        * _squared_norm(numbers.double())
        / (sharing * growth(header.shape[1], config.transform.matrix))
    )


def rank_of(superposition: State, tensor: str) -> int:
    """How many directions a matrix's shared basis has; 0 where it has none."""
    return int(headers(superposition.bases)[tensor].shape[1]) if tensor in superposition.bases else 0


def _squared_norm(value: Tensor) -> float:
    return float(value.square().sum())
