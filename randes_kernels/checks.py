"""What operators are given, checked in one place: errors name the argument, what was expected and what came."""

import torch
from torch import Tensor

from randes_kernels.format import SIGNS_PER_BLOCK, Matrix, Transform, segments_before
from randes_kernels.lowrank import Basis
from randes_kernels.packing import BITS, Packed

DENSE = int(Matrix.DENSE)  # the last of them; the compiler of torch 2.11 does not trace enumerations
DIAGONAL = int(Matrix.DIAGONAL)
MOST_INDICES = 1 << 30
"""Rows or columns before a shard: kernels count in 32 bits."""


def check_transform(k: int, transform: Transform) -> None:
    """Raise ``ValueError`` for a transform that cannot turn k columns."""
    if transform.granule < 0 or transform.segments < 1:
        raise ValueError(f"transform must have a granule of at least 0 and segments of at least 1, got {transform}")
    if k % transform.segments:
        raise ValueError(
            f"transform must have segments that divide the {k} columns, got segments = {transform.segments}"
        )
    if not 0 <= transform.matrix <= DENSE:
        raise ValueError(f"transform must have a matrix of 0 to {DENSE}, got {transform.matrix}")
    if transform.matrix and (transform.column_signs or transform.granule):
        raise ValueError(f"transform must have no column signs and no permutation beside a matrix, got {transform}")
    if transform.first_row or transform.first_column:
        check_origin(k, transform)


def check_origin(k: int, transform: Transform) -> None:
    """Raise ``ValueError`` for a shard's origin that a transform of k columns cannot have."""
    origin = transform.first_row, transform.first_column
    if not all(0 <= first < MOST_INDICES for first in origin):
        raise ValueError(f"transform must have an origin of rows and columns from 0 to 2^30, got {origin}")
    if transform.first_column and transform.matrix and transform.matrix != DIAGONAL:
        raise ValueError(f"transform must not begin at a later column with a matrix that mixes them, got {transform}")
    segments_before(transform, k)


def check_inverses(inverses: Tensor | None, transform: Transform, keys: Tensor, weight: Tensor) -> None:
    """Raise ``ValueError`` unless dense matrices, and they alone, come with (J, K, K) fp32."""
    if (inverses is None) == (transform.matrix == DENSE):
        found = "None" if inverses is None else tuple(inverses.shape)
        raise ValueError(f"inverses must be there where the transform's matrix is dense alone, got {found}")
    shape = (keys.shape[0], weight.shape[1], weight.shape[1])
    if inverses is not None and (
        inverses.shape != shape or inverses.dtype != torch.float32 or inverses.device != weight.device
    ):
        found = f"{tuple(inverses.shape)} {inverses.dtype} on {inverses.device}"
        raise ValueError(f"inverses must be {shape} torch.float32 on {weight.device}, got {found}")


def check_pair(name: str, value: Tensor, base: Tensor, transform: Transform) -> None:
    """Raise ``ValueError`` unless a tensor is (N, K) as the base is, in a dtype that can be superposed."""
    if value.shape != base.shape or base.dim() != 2:
        raise ValueError(f"{name} must be (N, K) = {tuple(base.shape)}, got {tuple(value.shape)}")
    if base.dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        raise ValueError(f"base must be fp32, fp16, bf16 or fp64, got {base.dtype}")
    if value.device != base.device:
        raise ValueError(f"{name} must be on {base.device} as base is, got {value.device}")
    check_transform(base.shape[1], transform)


def check_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, biases: Tensor | None, delta: Tensor | Packed,
    ids: Tensor, keys: Tensor, scale: Tensor, slots: Tensor,
) -> None:  # fmt: skip
    """Raise ``ValueError`` for an operand of ``superposed_linear`` of another shape, dtype or device."""
    words = delta if isinstance(delta, Tensor) else delta.words
    for name, given, dimensions in (("weight", weight, 2), ("delta", words, 3), ("ids", ids, 1), ("keys", keys, 1)):
        if given.dim() != dimensions:
            raise ValueError(f"{name} must have {dimensions} dimensions, got shape {tuple(given.shape)}")
    n, k = weight.shape
    models = keys.shape[0]
    if x.dim() == 0 or x.shape[-1] != k:
        raise ValueError(f"x must be (..., K) with K = {k}, got {tuple(x.shape)}")
    if x.dtype != weight.dtype:
        raise ValueError(f"x must be {weight.dtype} as weight is, got {x.dtype}")
    if x.device != weight.device:
        raise ValueError(f"x must be on {weight.device} as weight is, got {x.device}")
    expected: list[tuple[str, Tensor | None, tuple[int, ...], torch.dtype]] = [
        ("bias", bias, (n,), x.dtype),
        ("biases", biases, (models, n), x.dtype),
        *_expected_of(delta, n, k, x.dtype),
        ("keys", keys, (models,), torch.int64),
        ("scale", scale, (models,), torch.float32),
        ("slots", slots, (models,), torch.int32),
        ("ids", ids, (ids.shape[0],), torch.int32),
    ]
    device = x.device
    for name, value, shape, dtype in expected:
        if value is None:
            continue
        if value.shape != shape or value.dtype != dtype:
            raise ValueError(f"{name} must be {shape} {dtype}, got {tuple(value.shape)} {value.dtype}")
        if value.device != device:
            raise ValueError(f"{name} must be on {device} as x is, got {value.device}")
    if biases is not None and bias is None:
        raise ValueError("biases needs a base bias beside it, got bias = None")
    rows = x.numel() // k if k else 0
    if ids.shape[0] == 0 or rows % ids.shape[0]:
        raise ValueError(f"ids must divide the {rows} rows of x into equal runs, got {ids.shape[0]} ids")


def check_basis(basis: Basis, x: Tensor, weight: Tensor, keys: Tensor) -> None:
    """Raise ``ValueError`` unless directions are (K, r) and corrections (J, r, N)."""
    rank = basis.directions.shape[-1] if basis.directions.dim() else 0
    shapes = (weight.shape[1], rank), (keys.shape[0], rank, weight.shape[0])
    for name, value, shape in zip(("directions", "corrections"), basis, shapes, strict=True):
        if value.shape != shape or value.dtype != x.dtype or value.device != x.device or not value.is_contiguous():
            found = f"{tuple(value.shape)} {value.dtype} on {value.device}"
            raise ValueError(f"basis.{name} must be {shape} {x.dtype} on {x.device}, in one piece, got {found}")


def _expected_of(
    delta: Tensor | Packed, n: int, k: int, dtype: torch.dtype
) -> list[tuple[str, Tensor | None, tuple[int, ...], torch.dtype]]:
    """Shapes and dtypes of the superpositions' tensors, (S, N, K)."""
    if isinstance(delta, Tensor):
        return [("delta", delta, (delta.shape[0], n, k), dtype)]
    words, steps, bits, group, columns = delta
    if columns != k or bits not in BITS or not words.is_contiguous() or not steps.is_contiguous():
        raise ValueError(f"delta must be packed by randes_kernels.pack from (S, N, K) with K = {k}, got K = {columns}")
    width = k if bits == 8 else -(-k // SIGNS_PER_BLOCK) * SIGNS_PER_BLOCK
    groups = -(-width // group) if group else 1
    return [
        ("delta.words", words, (words.shape[0], n, int(width * bits) // 8), torch.int8 if bits == 8 else torch.uint8),
        ("delta.steps", steps, (words.shape[0], groups, n), torch.float16),
    ]
