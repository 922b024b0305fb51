"""The superposed linear layer on the weight side: for tiles of rows that belong to few models.

    y = x ( W0 + scale_j · r_j ⊙ D ⊙ c_j )ᵀ + b_j                                  (design, section 1)

    x (M, K)   W0 (N, K)   D (S, N, K), one slot a group of models   y (M, N)
    j = ids[m // rows_per_id], the model of row m; −1 is the base

A tile of the model's weight is rebuilt in registers and is the left operand of one matrix product, which is computed
transposed: the FLOPs of a plain linear. A retrieved weight never touches memory. Rows of one model should lie
side by side: a tile of rows runs its product once for each model in it. ``group.py`` brings rows into such an order,
and ``order`` (M,) says which row of y each one answers.

Transposed, the same kernel is its own backward: x (M, N) → y (M, K), with rows and columns swapping parts.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from randes_kernels.format import signed_words
from randes_kernels.kernels.transform import Sides
from randes_kernels.primitives import flip_sign_bit, split_key, unhoisted, vector_signs
from randes_kernels.tiles import Plan

NO_MODEL: tl.constexpr = tl.constexpr(2**31 - 1)
BAND: tl.constexpr = tl.constexpr(8)


@triton.jit
def load_tile(
    source, first_row, first_column, rows, columns, stride_row, stride_column,
    TRANSPOSED: tl.constexpr, BULK: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The (HEIGHT, WIDTH) tile at (first_row, first_column) of a matrix; zeros beyond its ``rows`` and ``columns``.

    BULK: ``source`` is a tensor descriptor, of the matrix or, TRANSPOSED, of its transpose. Else it is a pointer to
    the tile's first row.
    """
    if BULK and TRANSPOSED:
        tile = tl.trans(source.load([first_column, first_row]))
    elif BULK:
        tile = source.load([first_row, first_column])
    else:
        across, down = tl.arange(0, WIDTH)[None, :], tl.arange(0, HEIGHT)[:, None]
        tile = tl.load(
            source + tl.cast(first_column, tl.int64) * stride_column + down * stride_row + across * stride_column,
            mask=(first_row + down < rows) & (first_column + across < columns), other=0.0,
        )  # fmt: skip
    return tile


@triton.jit
def models_of(first_row, M, models, rows_per_id, ids_ptr, BLOCK_M: tl.constexpr):
    """The model of each row of a tile; NO_MODEL beyond the last."""
    rows = first_row + tl.arange(0, BLOCK_M)
    ids = tl.load(ids_ptr + rows // rows_per_id, mask=rows < M, other=0).to(tl.int32)
    # Of the numbers that name no model one above stands for all, and none for NO_MODEL.
    return tl.where(rows < M, tl.minimum(ids, models), NO_MODEL)


@triton.jit(
    do_not_specialize=["M", "models", "rows_per_id", "tensor_lo", "tensor_hi"],
    do_not_specialize_on_alignment=["order_ptr", "ids_ptr", "keys_ptr", "scale_ptr", "slots_ptr"],
)
def weight_side_kernel(
    x, weight, delta, bias_ptr, biases_ptr, y_ptr, order_ptr, ids_ptr, keys_ptr, scale_ptr, slots_ptr,
    M, N, K, models, rows_per_id, tensor_lo, tensor_hi,
    stride_xm, stride_xk, stride_wn, stride_wk, stride_ds, stride_dn, stride_dk, stride_bj, stride_ym,
    IN_STREAM: tl.constexpr, OUT_STREAM: tl.constexpr, FLIP_IN: tl.constexpr, FLIP_OUT: tl.constexpr,
    TRANSPOSED: tl.constexpr, BULK: tl.constexpr, GROUPED: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_BIASES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # Bands of eight row tiles by all column tiles: what runs together shares its rows and its weights in L2.
    row_tiles, column_tiles = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    band = tl.program_id(0) // (BAND * column_tiles)
    height = tl.minimum(row_tiles - band * BAND, BAND)
    within = tl.program_id(0) % (BAND * column_tiles)
    first_row, first_column = (band * BAND + within % height) * BLOCK_M, (within // height) * BLOCK_N

    model = tl.min(models_of(first_row, M, models, rows_per_id, ids_ptr, BLOCK_M))
    passes = tl.full((), 0, tl.int32)
    while model < NO_MODEL:
        known = (model >= 0) & (model < models)
        k0, k1 = split_key(tl.load(keys_ptr + model, mask=known, other=0))
        scale = tl.load(scale_ptr + model, mask=known, other=0.0)
        # A number that names no model gives NaN, never another model's answer.
        scale = tl.where(known | (model == -1), scale, float("nan")) + tl.zeros((BLOCK_N,), dtype=tl.float32)
        if FLIP_OUT:
            scale = flip_sign_bit(scale, vector_signs(first_column, k0, k1, OUT_STREAM, tensor_lo, tensor_hi, BLOCK_N))
        slot = tl.load(slots_ptr + model, mask=known, other=-1)

        # Where each operand's tiles begin. A model without a slot lies outside of D: zeros, for which nothing is read.
        if BULK:
            x_rows, weight_rows, delta_rows = x, weight, delta
            delta_start = slot * (K if TRANSPOSED else N)
            delta_row, delta_column = first_column, 0
            if TRANSPOSED:
                delta_column = delta_start
            else:
                delta_row += delta_start
        else:
            x_rows = x + tl.cast(first_row, tl.int64) * stride_xm
            weight_rows = weight + tl.cast(first_column, tl.int64) * stride_wn
            delta_rows = delta + slot.to(tl.int64) * stride_ds + tl.cast(first_column, tl.int64) * stride_dn
            delta_row, delta_column = first_column, 0
        delta_columns = tl.where(slot >= 0, K, 0)

        y = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
        for start in range(0, K, BLOCK_K):
            x_tile = load_tile(x_rows, first_row, start, M, K, stride_xm, stride_xk, False, BULK, BLOCK_M, BLOCK_K)
            weight_tile = load_tile(
                weight_rows, first_column, start, N, K, stride_wn, stride_wk, TRANSPOSED, BULK, BLOCK_N, BLOCK_K
            )
            delta_tile = load_tile(
                delta_rows, delta_row, delta_column + start, N, delta_columns, stride_dn, stride_dk,
                TRANSPOSED, BULK, BLOCK_N, BLOCK_K,
            )  # fmt: skip
            if FLIP_IN:
                in_signs = vector_signs(
                    start, unhoisted(k0, start), unhoisted(k1, start), IN_STREAM, tensor_lo, tensor_hi, BLOCK_K
                )
                delta_tile = flip_sign_bit(delta_tile, in_signs[None, :])
            rebuilt = weight_tile.to(tl.float32) + scale[:, None] * delta_tile.to(tl.float32)
            y = tl.dot(rebuilt.to(x_tile.dtype), tl.trans(x_tile), y, input_precision="ieee")

        columns = first_column + tl.arange(0, BLOCK_N)
        if HAS_BIASES:
            own_bias = biases_ptr + model.to(tl.int64) * stride_bj
            bias_row = tl.where(known, own_bias, bias_ptr)
            y += tl.load(bias_row + columns, mask=columns < N, other=0.0).to(tl.float32)[:, None]
        elif HAS_BIAS:
            y += tl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)[:, None]
        # The models again, not kept until now: the product needs the registers.
        first_row = unhoisted(first_row, passes)
        ids = models_of(first_row, M, models, rows_per_id, ids_ptr, BLOCK_M)
        rows = tl.arange(0, BLOCK_M)
        if GROUPED:
            rows = tl.load(order_ptr + first_row + rows, mask=first_row + rows < M, other=0).to(tl.int64)
            y_ptrs = y_ptr + rows[:, None] * stride_ym + columns[None, :]
        else:
            y_ptrs = y_ptr + first_row.to(tl.int64) * stride_ym + rows[:, None] * stride_ym + columns[None, :]
        y_tile = tl.trans(y.to(y_ptr.dtype.element_ty))
        tl.store(y_ptrs, y_tile, mask=(ids == model)[:, None] & (columns < N)[None, :])
        model = tl.min(tl.where(ids > model, ids, NO_MODEL))
        passes += 1


def weight_side(
    x: Tensor, weight: Tensor, delta: Tensor, bias: Tensor | None, biases: Tensor | None,
    ids: Tensor, keys: Tensor, scale: Tensor, slots: Tensor, tensor: int,
    sides: Sides, plan: Plan, order: Tensor | None,
) -> Tensor:  # fmt: skip
    """Launch over ``x``. ``order``: (M,) int32, the row of y that each row of x answers, where that is not its own.

    ``weight`` (N, K) and ``delta`` (S, N, K) are contiguous, or both transposes of what is, as in a backward pass.
    """
    (m, k), n, tile = x.shape, delta.shape[1], plan.tile
    transposed = weight.stride(1) != 1
    y = torch.empty((m, n), dtype=x.dtype, device=x.device)
    operands: tuple[object, ...] = (x, weight, delta)
    if plan.bulk:
        stored = (weight.mT, delta.mT) if transposed else (weight, delta)
        block = [tile.k, tile.n] if transposed else [tile.n, tile.k]
        operands = (
            TensorDescriptor.from_tensor(x, [tile.m, tile.k]),
            *(TensorDescriptor.from_tensor(matrix.reshape(-1, matrix.shape[-1]), block) for matrix in stored),
        )
    weight_side_kernel[(triton.cdiv(m, tile.m) * triton.cdiv(n, tile.n),)](
        *operands, bias, biases, y, order, ids, keys, scale, slots,
        m, n, k, keys.shape[0], max(1, m // ids.shape[0]), *signed_words(tensor),
        *x.stride(), *weight.stride(), *delta.stride(), 0 if biases is None else biases.stride(0), y.stride(0),
        IN_STREAM=sides.in_stream, OUT_STREAM=sides.out_stream, FLIP_IN=sides.flip_in, FLIP_OUT=sides.flip_out,
        TRANSPOSED=transposed, BULK=plan.bulk, GROUPED=order is not None,
        HAS_BIAS=bias is not None, HAS_BIASES=biases is not None,
        BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k, num_warps=tile.warps, num_stages=tile.stages,
        enable_fp_fusion=True,
    )  # fmt: skip
    return y
