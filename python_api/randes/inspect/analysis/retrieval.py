"""How near a retrieved model is to its fine-tune, and how far apart superposing brings the deltas of many."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from randes.checkpoints.lazy_tensors import Progress, chunks, headers, silent, size
from randes.checkpoints.sources import Checkpoint, Tensors
from randes.inspect.analysis.likeness import Comparison, Device, Likeness, Products
from randes.inspect.analysis.subspaces import subspace_similarity
from randes.superposition.reading import read, read_added
from randes.superposition.retrieve import matrices
from randes.superposition.superposition import Superposition

if TYPE_CHECKING:
    from randes.inspect.report.cosines import Cosines

THIRDS = 3
MOST = 12
"""Matrices whose singular directions are looked at: equally spaced ones stand for all."""
DIRECTIONS = 96
"""Of a matrix with more, the loudest that are looked at."""


@dataclass(frozen=True)
class Retrieval:
    """One model as it comes back beside what it was.

    weights: of all floating-point tensors. deltas: of Ŵ − W0 and W − W0, for each superposed tensor that it changed.
    subspaces: for the louder, middle and quieter third of the singular directions of its deltas, the cosine of a delta
    with what comes back of it there: mean over ``sampled`` matrices. None of it is the accuracy.
    """

    weights: Likeness
    deltas: Comparison
    subspaces: tuple[float, ...]
    sampled: int


def retrieval(
    superposition: Superposition, name: str, finetuned: Checkpoint, *, device: Device = "cpu",
    progress: Progress = silent,
) -> Retrieval:  # fmt: skip
    """Compare a retrieved model with its fine-tune, weights and deltas. device: where that is computed.

    Raises ``UnknownModelError``, and ``CheckpointError`` for any other checkpoint than the one that was added.
    """
    sup, member = superposition, superposition.member(name)
    step = progress("comparing", 2 * size(sup.base))
    retrieved, original = matrices(sup, name), read_added(sup, name, finetuned, step=step)
    weights: list[Products] = []
    deltas: dict[str, Products] = {}
    for tensor, header in headers(sup.base).items():
        if not header.is_floating_point():
            continue
        own = (chunks(tensors, tensor) for tensors in (retrieved, original))
        if tensor not in member.gains:
            weights += [Products.of(found.to(device), tuned.to(device)) for found, tuned in zip(*own, strict=True)]
            continue
        of_delta = []
        for found, tuned, base in zip(*own, chunks(sup.base, tensor), strict=True):
            found, tuned, base = (part.to(device).double() for part in (found, tuned, base))
            weights.append(Products.of(found, tuned))
            of_delta.append(Products.of(found - base, tuned - base))
            step(base.nbytes)
        deltas[tensor] = Products.sum(of_delta)
    likenesses = {tensor: own.likeness for tensor, own in deltas.items()}
    able = [tensor for tensor in deltas if min(headers(sup.base)[tensor].shape) >= THIRDS]
    chosen = able[:: max(1, math.ceil(len(able) / MOST))]
    return Retrieval(
        Products.sum(weights).likeness,
        Comparison(likenesses, Products.sum(deltas.values()).likeness),
        _subspaces(sup.base, retrieved, original, chosen, device),
        len(chosen),
    )


def decorrelation(
    superposition: Superposition, models: Mapping[str, Checkpoint], *, progress: Progress = silent
) -> "tuple[Cosines, Cosines]":
    """Cosines of the deltas of ``models`` before and after they are turned to be summed, over all superposed tensors.

    Raises ``UnknownModelError`` for a name that is not in the superposition, and ``CheckpointError`` for a model that
    does not fit.
    """
    from randes.inspect.report.cosines import of_originals  # the report is made with these functions

    for name in models:
        superposition.member(name)
    sources = {name: read(superposition, model) for name, model in models.items()}
    step = progress("cosines", 2 * sum(headers(superposition.base)[name].nbytes for name in superposition.superposed))
    before, after = (of_originals(superposition, sources, turned=turned, step=step) for turned in (False, True))
    return before, after


def _subspaces(
    base: Tensors, retrieved: Tensors, original: Tensors, chosen: list[str], device: Device
) -> tuple[float, ...]:
    found = []
    for tensor in chosen:
        header = headers(base)[tensor]
        directions = min(*header.shape, DIRECTIONS)
        origin = base[tensor].to(device).float()
        delta, back = (tensors[tensor].to(device).float() - origin for tensors in (original, retrieved))
        found.append([own.cosine for own in subspace_similarity(delta, back, THIRDS, directions=directions)])
    return tuple(math.fsum(third) / len(found) for third in zip(*found, strict=True))
