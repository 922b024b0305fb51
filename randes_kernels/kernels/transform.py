"""A model's transform on one tile of (N, K), which several kernels share, and its launch arguments.

A tensor-parallel shard is turned as its rectangle of the whole matrix is: its row i has the sign of row first_row + i
there. No launch is compiled anew for another origin, but for each of three kinds: none, whole blocks of signs, any
number (``primitives.words_from``). What has none costs nothing for it.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from randes_kernels.format import SIGNS_PER_BLOCK, Stream, Transform, half_bits, segments_before
from randes_kernels.primitives import permute_columns, vector_signs

ROW_SIGNS: tl.constexpr = tl.constexpr(int(Stream.ROW_SIGNS))
COLUMN_SIGNS: tl.constexpr = tl.constexpr(int(Stream.COLUMN_SIGNS))
COLUMN_PERMUTATION: tl.constexpr = tl.constexpr(int(Stream.COLUMN_PERMUTATION))
OF_A_CALL = ["M", "models", "rows_per_id", "tensor_lo", "tensor_hi", "first_in", "first_out", "stride_ss"]
"""Arguments of a product that no kernel is compiled anew for."""


@triton.jit
def transformed_tile(
    N, K, key_lo, key_hi, tensor_lo, tensor_hi, granule, width, bits, segment, origin_row, origin_column,
    FLIP_ROWS: tl.constexpr, FLIP_COLUMNS: tl.constexpr, PERMUTED: tl.constexpr, SEGMENTS: tl.constexpr,
    ROW_ORIGIN: tl.constexpr, COLUMN_ORIGIN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
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
        row_bits = vector_signs(
            first_row, k0, k1, ROW_SIGNS, tensor_lo, tensor_hi, origin_row, ROW_ORIGIN, BLOCK_N
        )  # fmt: skip
        sign ^= row_bits[:, None]
    if FLIP_COLUMNS:
        column_bits = vector_signs(
            first_column, k0, k1, COLUMN_SIGNS, tensor_lo, tensor_hi, origin_column, COLUMN_ORIGIN, BLOCK_K
        )  # fmt: skip
        sign ^= column_bits[None, :]
    turned_columns = columns
    if PERMUTED:
        first_segment = 0  # a constant, where there is no origin: one register less, and none is spilled on sm_80
        if COLUMN_ORIGIN != 0:
            first_segment = segment
        turned_columns = permute_columns(
            columns, k0, k1, tensor_lo, tensor_hi, granule, width, bits, first_segment, COLUMN_PERMUTATION, SEGMENTS
        )
    return rows, columns[None, :], inside, sign, turned_columns[None, :]


class Sides(NamedTuple):
    """Which signs a product with D flips its input and its output with, and from which on; a backward pass swaps
    them."""

    in_stream: int
    out_stream: int
    flip_in: bool
    flip_out: bool
    first_in: int = 0
    first_out: int = 0


def sides_of(transform: Transform, transposed: bool) -> Sides:
    """Columns come in and rows go out; transposed, the other way."""
    rows = Stream.ROW_SIGNS, transform.row_signs, transform.first_row
    columns = Stream.COLUMN_SIGNS, transform.column_signs, transform.first_column
    (came, flip_in, first_in), (went, flip_out, first_out) = (rows, columns) if transposed else (columns, rows)
    return Sides(came, went, flip_in, flip_out, first_in, first_out)


def origin_kind(first: int) -> int:
    """What a kernel is compiled for of an origin: 0 for none, 1 for whole blocks of signs, 2 for any number."""
    return 0 if first == 0 else 2 if first % SIGNS_PER_BLOCK else 1


class TransformArguments(NamedTuple):
    """The transform of a tensor with K columns as kernel arguments: ``granule, width, bits`` of its permutation and
    the first segment's number, its origin, and the constants."""

    permuted: bool
    permutation: tuple[int, int, int, int]
    origin: tuple[int, int]
    constants: dict[str, Any]


def transform_arguments(transform: Transform, k: int) -> TransformArguments:
    """What ``transformed_tile`` needs beside the tile and the key."""
    width = k // transform.segments
    permuted = 0 < transform.granule <= width
    return TransformArguments(
        permuted,
        (transform.granule, width, half_bits(width // transform.granule), segments_before(transform, k))
        if permuted
        else (1, 1, 1, 0),
        (transform.first_row, transform.first_column),
        {
            "FLIP_ROWS": transform.row_signs,
            "FLIP_COLUMNS": transform.column_signs,
            "PERMUTED": permuted,
            "SEGMENTS": transform.segments,
            "ROW_ORIGIN": origin_kind(transform.first_row),
            "COLUMN_ORIGIN": origin_kind(transform.first_column),
        },
    )
