"""A matrix's singular directions in runs, and how much of a matrix lies in another's."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from randes.inspect.analysis.likeness import Device, check_same_shape

SPARE = 8
"""Directions beyond those asked for that a randomised decomposition keeps, so that the last ones converge too."""
PASSES = 4
"""Subspace iterations: singular values a tenth apart are then told apart to 10⁻⁴."""


class Chunk(NamedTuple):
    """A run of a matrix's singular directions: u (N, c), s (c,), v (K, c), loudest first."""

    u: Tensor
    s: Tensor
    v: Tensor


@dataclass(frozen=True)
class SubspaceSimilarity:
    """How much of a reference lies in what another matrix has in one run of the reference's singular directions.

    With P the projections onto the run, R the reference and X the other: cosine is that of R and P X P, distance is
    ‖R − P X P‖.
    """

    cosine: float
    distance: float


def svd_partition(
    matrix: Tensor, chunks: int = 3, *, directions: int | None = None, device: Device | None = None
) -> list[Chunk]:
    """The singular value decomposition of ``matrix`` (N, K) in equal runs; the last has what does not divide.

    directions: how many of the loudest are partitioned; all where it is not given. Some are found by subspace iteration
    from a fixed start (Halko, Martinsson and Tropp, arXiv 0909.4061), in ``PASSES`` passes over the matrix
    in place of a whole decomposition. device: where it is computed, in fp32, or fp64 for fp64; else the matrix's own.
    Raises ``ValueError`` for another shape, or more chunks or directions than there are.
    """
    if matrix.dim() != 2:
        raise ValueError(f"matrix must have 2 dimensions, got {tuple(matrix.shape)}")
    most = min(matrix.shape)
    count = most if directions is None else directions
    if not 1 <= count <= most:
        raise ValueError(f"directions must be from 1 to {most}, got {directions}")
    if not 1 <= chunks <= count:
        raise ValueError(f"chunks must be from 1 to {count}, got {chunks}")
    exact = matrix.detach().to(device or matrix.device)
    exact = exact if exact.dtype == torch.float64 else exact.float()
    u, s, v = _loudest(exact, count) if count + SPARE < most else _whole(exact, count)
    width = count // chunks
    ends = [*range(width, width * chunks, width), count]
    return [Chunk(u[:, i:j], s[i:j], v[:, i:j]) for i, j in zip([0, *ends[:-1]], ends, strict=True)]


def subspace_similarity(
    reference: Tensor, other: Tensor, chunks: int = 3, *, directions: int | None = None, device: Device | None = None
) -> list[SubspaceSimilarity]:
    """Of each run of the reference's singular directions; see ``svd_partition`` for the rest.

    ``P X P`` is never made: in the run's own coordinates it is Uᵀ X V, (c, c).
    Raises ``ValueError`` for matrices of different shapes.
    """
    check_same_shape("other", other, reference)
    whole, found = float(torch.linalg.vector_norm(reference.detach(), dtype=torch.float64)) ** 2, []
    for u, s, v in svd_partition(reference, chunks, directions=directions, device=device):
        inside = (u.mT @ other.detach().to(u) @ v).double()
        both, size = float((s.double() * inside.diagonal()).sum()), float(inside.square().sum())
        cosine = both / math.sqrt(size * whole) if size and whole else 0.0
        found.append(SubspaceSimilarity(cosine, math.sqrt(max(0.0, whole - 2 * both + size))))
    return found


def _whole(matrix: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, :count], s[:count], vh[:count].mT


def _loudest(matrix: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(matrix.shape[1], count + SPARE, generator=generator, dtype=torch.float64)
    found = start.to(matrix)
    for _ in range(PASSES):
        found = torch.linalg.qr(matrix.mT @ torch.linalg.qr(matrix @ found)[0])[0]
    u, s, vh = torch.linalg.svd(matrix @ found, full_matrices=False)
    return u[:, :count], s[:count], found @ vh[:count].mT
