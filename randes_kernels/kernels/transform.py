"""A model's transform on one tile of (N, K), which several kernels share, and its launch arguments."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from randes_kernels.format import Stream, Transform, half_bits
from randes_kernels.primitives import permute_columns, vector_signs

ROW_SIGNS: tl.constexpr = tl.constexpr(int(Stream.ROW_SIGNS))
COLUMN_SIGNS: tl.constexpr = tl.constexpr(int(Stream.COLUMN_SIGNS))
COLUMN_PERMUTATION: tl.constexpr = tl.constexpr(int(Stream.COLUMN_PERMUTATION))


@triton.jit
def transformed_tile(
    N, K, key_lo, key_hi, tensor_lo, tensor_hi, granule, width, bits,
    FLIP_ROWS: tl.constexpr, FLIP_COLUMNS: tl.constexpr, PERMUTED: tl.constexpr, SEGMENTS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """This program's tile: rows ``(BLOCK_N, 1)``, columns ``(1, BLOCK_K)``, what of it is inside the matrix, its sign
    bits, and where its columns go in D, ``(1, BLOCK_K)``."""
    first_row, first_column = tl.program_id(1) * BLOCK_N, tl.program_id(0) * BLOCK_K
    rows = (first_row + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None]
    columns = first_column + tl.arange(0, BLOCK_K)
    inside = (rows < N) & (columns < K)[None, :]
    k0, k1 = tl.cast(key_lo, tl.uint32), tl.cast(key_hi, tl.uint32)
    sign = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.uint32)
    if FLIP_ROWS:
        sign ^= vector_signs(first_row, k0, k1, ROW_SIGNS, tensor_lo, tensor_hi, BLOCK_N)[:, None]
    if FLIP_COLUMNS:
        sign ^= vector_signs(first_column, k0, k1, COLUMN_SIGNS, tensor_lo, tensor_hi, BLOCK_K)[None, :]
    turned_columns = columns
    if PERMUTED:
        turned_columns = permute_columns(
            columns, k0, k1, tensor_lo, tensor_hi, granule, width, bits, 0, COLUMN_PERMUTATION, SEGMENTS
        )
    return rows, columns[None, :], inside, sign, turned_columns[None, :]


class Sides(NamedTuple):
    """Which signs a product with D flips its input and its output with; a backward pass swaps them."""

    in_stream: int
    out_stream: int
    flip_in: bool
    flip_out: bool


def sides_of(transform: Transform, transposed: bool) -> Sides:
    """Columns come in and rows go out; transposed, the other way."""
    if transposed:
        return Sides(Stream.ROW_SIGNS, Stream.COLUMN_SIGNS, transform.row_signs, transform.column_signs)
    return Sides(Stream.COLUMN_SIGNS, Stream.ROW_SIGNS, transform.column_signs, transform.row_signs)


class TransformArguments(NamedTuple):
    """The transform of a tensor with K columns as kernel arguments: ``granule, width, bits``, and the constants."""

    permuted: bool
    numbers: tuple[int, int, int]
    constants: dict[str, Any]


def transform_arguments(transform: Transform, k: int) -> TransformArguments:
    """What ``transformed_tile`` needs beside the tile and the key."""
    width = k // transform.segments
    permuted = 0 < transform.granule <= width
    return TransformArguments(
        permuted,
        (transform.granule, width, half_bits(width // transform.granule)) if permuted else (1, 1, 1),
        {
            "FLIP_ROWS": transform.row_signs,
            "FLIP_COLUMNS": transform.column_signs,
            "PERMUTED": permuted,
            "SEGMENTS": transform.segments,
        },
    )
