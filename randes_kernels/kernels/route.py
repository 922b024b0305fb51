"""Turned activations: each row's columns flipped, and moved, as its own model's columns of D are.

    forward    t[m, π_j(k)] = c_jk · x[m, k]                     what D is then multiplied with
    backward   y[m, k] += c_jk · t[m, π_j(k)]                    what came out of Dᵀ, back in place

    x, t, y (M, K)   j = ids[m // rows_per_id]; −1 and tensors that model j left alone: t = 0, y unchanged

Done once, before (after) the matmul: inside it every tile of N columns would hash and gather all of x again,
about N / 64 times the work. It costs 2·M·K elements of traffic where the weights cost 2·N·K, with M ≪ N.
A rotation's rounds are such turns too, with signs and permutations of their own, and Hadamard products between them
(``mixing.py``); a diagonal takes the place of signs, by its numbers' reciprocals.
A matmul of up to 64 rows makes signs alone itself; beyond, every column tile would make them again, and they are made
here too.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from randes_kernels.format import Matrix, Stream, Transform, half_bits, signed_words
from randes_kernels.hadamard import hadamard
from randes_kernels.kernels.transform import origin_kind, transform_arguments
from randes_kernels.mixing import ROUNDS, padded_columns, reciprocals
from randes_kernels.primitives import flip, permute_columns, split_key, vector_bytes, vector_signs

TILE_COLUMNS = 128
DIAGONAL: tl.constexpr = tl.constexpr(int(Stream.DIAGONAL))


@triton.jit(
    do_not_specialize=["models", "rows_per_id", "tensor_lo", "tensor_hi", "segment", "origin"],
    do_not_specialize_on_alignment=["ids_ptr", "keys_ptr", "slots_ptr"],
)
def route_kernel(
    x_ptr, turned_ptr, reciprocals_ptr, ids_ptr, keys_ptr, slots_ptr, models, rows_per_id, tensor_lo, tensor_hi,
    K, granule, width, bits, segment, origin, stride_xm, stride_xk, stride_tm,
    STREAM: tl.constexpr, PERMUTATION: tl.constexpr, BACK: tl.constexpr, FLIP: tl.constexpr, SCALED: tl.constexpr,
    PERMUTED: tl.constexpr, SEGMENTS: tl.constexpr, ORIGIN: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    first_column = tl.program_id(1) * BLOCK_K
    columns = first_column + tl.arange(0, BLOCK_K)
    inside = columns < K

    model = tl.load(ids_ptr + row // rows_per_id)
    known = (model >= 0) & (model < models)
    slot = tl.load(slots_ptr + model, mask=known, other=-1)
    unknown = (model >= models) | (model < -1)  # its NaN has to arrive
    superposed = columns < tl.where((slot >= 0) | unknown, K, 0)  # no column of a row that reads no D
    k0, k1 = split_key(tl.load(keys_ptr + model, mask=known, other=0))
    turned_columns = columns
    if PERMUTED:
        turned_columns = permute_columns(
            columns, k0, k1, tensor_lo, tensor_hi, granule, width, bits, segment, PERMUTATION, SEGMENTS
        )
    x_ptrs = x_ptr + row * stride_xm + columns.to(tl.int64) * stride_xk
    turned_ptrs = turned_ptr + row * stride_tm + turned_columns

    source = turned_ptrs if BACK else x_ptrs
    moved = tl.load(source, mask=superposed, other=0.0)
    if FLIP:
        moved = flip(
            moved, vector_signs(first_column, k0, k1, STREAM, tensor_lo, tensor_hi, origin, ORIGIN, BLOCK_K)
        )  # fmt: skip
    if SCALED:
        places = columns if ORIGIN == 0 else origin + columns  # of neighbours the first share a block, known before
        factors = tl.load(reciprocals_ptr + vector_bytes(places, k0, k1, DIAGONAL, tensor_lo, tensor_hi))
        moved = (moved.to(tl.float32) * factors).to(moved.dtype)
    if BACK:
        tl.store(x_ptrs, tl.load(x_ptrs, mask=inside, other=0.0) + moved, mask=inside)
    else:
        tl.store(turned_ptrs, moved, mask=inside)


def route(
    x: Tensor, ids: Tensor, keys: Tensor, slots: Tensor, tensor: int, transform: Transform, stream: int, flip: bool,
    turned: Tensor | None = None, round: int = 0,
) -> Tensor:  # fmt: skip
    """Launch over ``x``: turned, with the signs of ``stream``; or, given ``turned``, add that to ``x`` in place.

    Row signs, the input's in a backward pass, come without a permutation. ``stream`` DIAGONAL divides by that, and
    ROTATION_SIGNS takes those and the permutation of one ``round``.
    """
    m, k = x.shape
    back, scaled, rotates = turned is not None, stream == Stream.DIAGONAL, stream == Stream.ROTATION_SIGNS
    turned = torch.empty((m, k), dtype=x.dtype, device=x.device) if turned is None else turned
    permuted, permutation = False, (1, 1, 1, 0)
    origin = transform.first_row if stream == Stream.ROW_SIGNS else transform.first_column
    if stream == Stream.COLUMN_SIGNS:
        permuted, permutation, *_ = transform_arguments(transform, k)
    elif rotates:
        permuted, permutation, origin = True, (1, k, half_bits(k), round), round * padded_columns(k)
    route_kernel[(m, -(-k // TILE_COLUMNS))](
        x, turned, reciprocals_on(x.device) if scaled else x, ids, keys, slots,
        keys.shape[0], max(1, m // ids.shape[0]), *signed_words(tensor),
        k, *permutation, origin, *x.stride(), turned.stride(0),
        STREAM=stream, PERMUTATION=Stream.ROTATION_PERMUTATION if rotates else Stream.COLUMN_PERMUTATION,
        BACK=back, FLIP=flip, SCALED=scaled, PERMUTED=permuted, SEGMENTS=transform.segments,
        ORIGIN=origin_kind(origin), BLOCK_K=TILE_COLUMNS, num_warps=1, enable_fp_fusion=True,
    )  # fmt: skip
    return x if back else turned


def turn(x: Tensor, ids: Tensor, keys: Tensor, slots: Tensor, tensor: int, transform: Transform) -> Tensor:
    """``x`` (M, K) as ``mixing.turned_rows`` turns it, by a rotation or a diagonal of each row's own model."""
    own = ids, keys, slots, tensor, transform
    if transform.matrix == Matrix.DIAGONAL:
        return route(x, *own, Stream.DIAGONAL, False)
    rows = x.float()
    for number in range(ROUNDS):
        rows = hadamard(route(rows, *own, Stream.ROTATION_SIGNS, True, round=number))
    return rows.to(x.dtype)


def turn_back(
    y: Tensor, product: Tensor, ids: Tensor, keys: Tensor, slots: Tensor, tensor: int, transform: Transform
) -> Tensor:
    """``y`` (M, K) plus ``product``, what came out of Dᵀ, turned back: in place."""
    own = ids, keys, slots, tensor, transform
    if transform.matrix == Matrix.DIAGONAL:
        return route(y, *own, Stream.DIAGONAL, False, turned=product)
    rows = product.float()
    for number in reversed(range(ROUNDS)):
        rows = route(torch.zeros_like(rows), *own, Stream.ROTATION_SIGNS, True, turned=hadamard(rows), round=number)
    return y.add_(rows)


@lru_cache
def reciprocals_on(device: torch.device) -> Tensor:
    """``mixing.reciprocals`` where a kernel reads them."""
    return reciprocals().to(device)
