"""The superposed linear layer on the activation side.

    y = x W0ᵀ + scale_j · r_j ⊙ ( (c_j ⊙ x) P_j Dᵀ ) + b_j                          (design, section 1)

    x (M, K)   W0 (N, K)   D (S, N, K), one slot a group of models   y (M, N)
    j = ids[m // rows_per_id], the model of row m; −1 is the base: y = x W0ᵀ + b

One pass over W0, and one over each slot of D that the tile's rows touch, whatever models they belong to.
Neither a retrieved weight nor a sign ever touches global memory. A permutation is the exception in part: every
column tile would have to gather and hash all of x again, so ``route.py`` turns x once before, in (M, K) bytes.

Transposed, the same kernel is its own backward: x (M, N) → y (M, K), with rows and columns swapping parts.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from randes_kernels.format import signed_words
from randes_kernels.primitives import flip, split_key, tile_signs
from randes_kernels.tiles import linear_tile

NO_SLOT: tl.constexpr = tl.constexpr(2**31 - 1)


@triton.jit(
    do_not_specialize=["M", "models", "rows_per_id", "tensor_lo", "tensor_hi"],
    do_not_specialize_on_alignment=["ids_ptr", "keys_ptr", "scale_ptr", "slots_ptr"],
)
def superposed_linear_kernel(
    x_ptr, turned_ptr, weight_ptr, delta_ptr, bias_ptr, biases_ptr, y_ptr,
    ids_ptr, keys_ptr, scale_ptr, slots_ptr,
    M, N, K, models, rows_per_id, tensor_lo, tensor_hi,
    stride_xm, stride_xk, stride_tm, stride_tk, stride_wn, stride_wk, stride_ds, stride_dn, stride_dk,
    stride_bj, stride_ym,
    IN_STREAM: tl.constexpr, OUT_STREAM: tl.constexpr, FLIP_IN: tl.constexpr, FLIP_OUT: tl.constexpr,
    HAS_BASE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_BIASES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # Row tiles run fastest: the programs that share a weight tile run together and find it in the L2 cache.
    row_tiles = tl.cdiv(M, BLOCK_M)
    rows = (tl.program_id(0) % row_tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    first_column = (tl.program_id(0) // row_tiles) * BLOCK_N
    tile_columns, depth = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    columns = first_column + tile_columns
    row_exists, column_exists = rows < M, columns < N
    # Offsets within a tile fit 32 bits; where a tile begins may not.
    x_rows, wide_column = rows.to(tl.int64), first_column.to(tl.int64)

    # The model of each row. A number that names no model gives NaN, never another model's answer.
    ids = tl.load(ids_ptr + rows // rows_per_id, mask=row_exists, other=-1).to(tl.int32)
    adapted = (ids >= 0) & (ids < models)
    k0, k1 = split_key(tl.load(keys_ptr + ids, mask=adapted, other=0))
    scale = tl.load(scale_ptr + ids, mask=adapted, other=0.0)
    scale = tl.where(adapted | (ids == -1), scale, float("nan"))
    slots = tl.load(slots_ptr + ids, mask=adapted, other=-1)
    slots = tl.where(slots >= 0, slots, NO_SLOT)

    y = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if HAS_BASE:
        for start in range(0, K, BLOCK_K):
            inside = start + depth < K
            x_tile = tl.load(
                x_ptr + tl.cast(start, tl.int64) * stride_xk + x_rows[:, None] * stride_xm + depth[None, :] * stride_xk,
                mask=row_exists[:, None] & inside[None, :], other=0.0,
            )  # fmt: skip
            weight_tile = tl.load(
                weight_ptr + wide_column * stride_wn + tl.cast(start, tl.int64) * stride_wk
                + tile_columns[None, :] * stride_wn + depth[:, None] * stride_wk,
                mask=column_exists[None, :] & inside[:, None], other=0.0,
            )  # fmt: skip
            y = tl.dot(x_tile, weight_tile, y, input_precision="ieee")

    # The slots that these rows touch, lowest first; rows of other slots are zero while one is read.
    delta_y = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    slot = tl.min(slots)
    while slot < NO_SLOT:
        in_slot = slots == slot
        slot_ptr = delta_ptr + slot.to(tl.int64) * stride_ds + wide_column * stride_dn
        for start in range(0, K, BLOCK_K):
            inside = start + depth < K
            x_tile = tl.load(
                turned_ptr + tl.cast(start, tl.int64) * stride_tk
                + x_rows[:, None] * stride_tm + depth[None, :] * stride_tk,
                mask=in_slot[:, None] & inside[None, :], other=0.0,
            )  # fmt: skip
            if FLIP_IN:
                x_tile = flip(x_tile, tile_signs(start, k0, k1, IN_STREAM, tensor_lo, tensor_hi, BLOCK_K))
            delta_tile = tl.load(
                slot_ptr + tl.cast(start, tl.int64) * stride_dk
                + tile_columns[None, :] * stride_dn + depth[:, None] * stride_dk,
                mask=column_exists[None, :] & inside[:, None], other=0.0,
            )  # fmt: skip
            delta_y = tl.dot(x_tile, delta_tile, delta_y, input_precision="ieee")
        slot = tl.min(tl.where(slots > slot, slots, NO_SLOT))

    if FLIP_OUT:
        delta_y = flip(delta_y, tile_signs(first_column, k0, k1, OUT_STREAM, tensor_lo, tensor_hi, BLOCK_N))
    y += scale[:, None] * delta_y
    if HAS_BIAS:
        bias = tl.load(bias_ptr + columns, mask=column_exists, other=0.0).to(tl.float32)
        if HAS_BIASES:
            own = tl.load(
                biases_ptr + ids[:, None].to(tl.int64) * stride_bj + columns[None, :],
                mask=adapted[:, None] & column_exists[None, :], other=0.0,
            )  # fmt: skip
            y += tl.where(adapted[:, None], own.to(tl.float32), bias[None, :])
        else:
            y += bias[None, :]

    y_ptrs = y_ptr + x_rows[:, None] * stride_ym + columns[None, :]
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=row_exists[:, None] & column_exists[None, :])


def superposed_linear(
    x: Tensor, turned: Tensor, weight: Tensor | None, delta: Tensor, bias: Tensor | None, biases: Tensor | None,
    ids: Tensor, keys: Tensor, scale: Tensor, slots: Tensor, tensor: int,
    in_stream: int, out_stream: int, flip_in: bool, flip_out: bool,
) -> Tensor:  # fmt: skip
    """Launch the kernel over ``x``; ``turned`` is what D is multiplied with: x itself, or x with its columns permuted.

    ``weight`` (N, K) and ``delta`` (S, N, K) may have any strides: their transposes make the backward pass.
    Without a weight only the second term is computed.
    """
    (m, k), n = x.shape, delta.shape[1]
    y = torch.empty((m, n), dtype=x.dtype, device=x.device)
    tile = linear_tile(m, n, k, x.dtype)
    tensor_lo, tensor_hi = signed_words(tensor)
    base = x if weight is None else weight  # some pointer, which is not read then
    superposed_linear_kernel[(triton.cdiv(m, tile.m) * triton.cdiv(n, tile.n),)](
        x, turned, base, delta, bias, biases, y, ids, keys, scale, slots,
        m, n, k, keys.shape[0], max(1, m // ids.shape[0]), tensor_lo, tensor_hi,
        *x.stride(), *turned.stride(), *base.stride(), *delta.stride(),
        0 if biases is None else biases.stride(0), y.stride(0),
        IN_STREAM=in_stream, OUT_STREAM=out_stream, FLIP_IN=flip_in, FLIP_OUT=flip_out,
        HAS_BASE=weight is not None, HAS_BIAS=bias is not None, HAS_BIASES=biases is not None,
        BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k, num_warps=tile.warps, num_stages=tile.stages,
        enable_fp_fusion=True,
    )  # fmt: skip
    return y
