"""The superposed linear layer on the weight side: for tiles of rows that belong to few models.

    y = x ( W0 + scale_j · r_j ⊙ D ⊙ c_j )ᵀ + b_j                                  (design, section 1)

    x (M, K)   W0 (N, K)   D (S, N, K), one slot a group of models   y (M, N)
    j = ids[m // rows_per_id], the model of row m; −1 is the base

A tile of the model's weight is rebuilt in registers and is the left operand of one matrix product, which is computed
transposed: the FLOPs of a plain linear. A retrieved weight never touches memory. Rows of one model should lie
side by side: a tile of rows runs its product once for each model in it. ``group.py`` brings rows into such an order,
and ``order`` (M,) says which row of y each one answers.

Of a D packed in few bits (``packing.py``) a step along K is a span of packed columns, rebuilt and multiplied a plane
at a time; the steps are factors of the scale.

Transposed, the same kernel is its own backward: x (M, N) → y (M, K), with rows and columns swapping parts. That
of a packed D is not there: a backward pass unpacks it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from randes_kernels.format import signed_words
from randes_kernels.kernels.transform import Sides
from randes_kernels.packing import Packed
from randes_kernels.primitives import (
    SIGNS_PER_BLOCK,
    block_words,
    flip_sign_bit,
    levels_of,
    signs_of,
    split_key,
    unhoisted,
    vector_signs,
)
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
def load_steps(steps_ptr, first_column, columns, BLOCK_N: tl.constexpr):
    """The steps of a tile's rows of D, its columns of y; zeros beyond."""
    own = first_column + tl.arange(0, BLOCK_N)
    return tl.load(steps_ptr + own, mask=own < columns, other=0.0).to(tl.float32)


@triton.jit
def models_of(first_row, M, models, rows_per_id, ids_ptr, BLOCK_M: tl.constexpr):
    """The model of each row of a tile; NO_MODEL beyond the last."""
    rows = first_row + tl.arange(0, BLOCK_M)
    ids = tl.load(ids_ptr + rows // rows_per_id, mask=rows < M, other=0).to(tl.int32)
    # Of the numbers that name no model one above stands for all, and none for NO_MODEL.
    return tl.where(rows < M, tl.minimum(ids, models), NO_MODEL)


@triton.jit(
    do_not_specialize=["M", "models", "rows_per_id", "tensor_lo", "tensor_hi", "stride_ss"],
    do_not_specialize_on_alignment=["order_ptr", "ids_ptr", "keys_ptr", "scale_ptr", "slots_ptr"],
)
def weight_side_kernel(
    x, weight, delta, steps_ptr, bias_ptr, biases_ptr, y_ptr, order_ptr, ids_ptr, keys_ptr, scale_ptr, slots_ptr,
    M, N, K, models, rows_per_id, tensor_lo, tensor_hi,
    stride_xm, stride_xk, stride_wn, stride_wk, stride_ds, stride_dn, stride_dk,
    stride_ss, stride_bj, stride_ym,
    IN_STREAM: tl.constexpr, OUT_STREAM: tl.constexpr, FLIP_IN: tl.constexpr, FLIP_OUT: tl.constexpr,
    TRANSPOSED: tl.constexpr, BULK: tl.constexpr, GROUPED: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_BIASES: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    PLANES: tl.constexpr = 8 // BITS if BITS < 8 else 1
    WIDTH: tl.constexpr = BLOCK_K // PLANES
    # bf16 has the range of a gain, and its fused multiply-add rounds once: a third less instructions than in fp32.
    dtype: tl.constexpr = weight.dtype if BULK else weight.dtype.element_ty
    FINE: tl.constexpr = tl.bfloat16 if dtype == tl.bfloat16 else tl.float32
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
        key_lo, key_hi = tl.full((1,), 0, tl.uint32) + k0, tl.full((1,), 0, tl.uint32) + k1
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
        stored_columns = tl.cdiv(K, SIGNS_PER_BLOCK) * WIDTH if BITS < 8 else K  # whole spans, in bytes
        delta_columns = tl.where(slot >= 0, stored_columns, 0)
        steps, step_columns = steps_ptr + slot.to(tl.int64) * stride_ss, tl.where(slot >= 0, N, 0)
        if BITS == 8:
            scale *= load_steps(steps, first_column, step_columns, BLOCK_N)

        y = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
        for start in range(0, K, BLOCK_K):
            packed_tile = load_tile(
                delta_rows, delta_row, delta_column + start // PLANES, N, delta_columns, stride_dn, stride_dk,
                TRANSPOSED, BULK, BLOCK_N, WIDTH,
            )  # fmt: skip
            if FLIP_IN:
                keys = unhoisted(key_lo, start), unhoisted(key_hi, start)
                position = tl.cast(start, tl.int32)
                words = block_words(position // SIGNS_PER_BLOCK, IN_STREAM, tensor_lo, tensor_hi, keys[0], keys[1])
            for plane in tl.static_range(PLANES):
                at = start + plane * WIDTH
                x_tile = load_tile(x_rows, first_row, at, M, K, stride_xm, stride_xk, False, BULK, BLOCK_M, WIDTH)
                weight_tile = load_tile(
                    weight_rows, first_column, at, N, K, stride_wn, stride_wk, TRANSPOSED, BULK, BLOCK_N, WIDTH
                )
                own_scale, delta_tile = scale, packed_tile
                if BITS < 16:
                    delta_tile = levels_of(packed_tile, plane, BITS, FINE)
                if BITS < 8:
                    # Their columns again, not kept through the loop: the product needs the registers.
                    own_scale *= load_steps(
                        steps + at // GROUP * N, unhoisted(first_column, start), step_columns, BLOCK_N
                    )
                if FLIP_IN:
                    within = plane * WIDTH if BITS < 8 else position % SIGNS_PER_BLOCK
                    delta_tile = flip_sign_bit(delta_tile, signs_of(words, within, WIDTH))
                factor = tl.broadcast_to(own_scale.to(FINE)[:, None], (BLOCK_N, WIDTH))
                rebuilt = tl.fma(delta_tile.to(FINE), factor, weight_tile.to(FINE))
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
    x: Tensor, weight: Tensor, delta: Packed, bias: Tensor | None, biases: Tensor | None,
    ids: Tensor, keys: Tensor, scale: Tensor, slots: Tensor, tensor: int,
    sides: Sides, plan: Plan, order: Tensor | None,
) -> Tensor:  # fmt: skip
    """Launch over ``x``. ``order``: (M,) int32, the row of y that each row of x answers, where that is not its own.

    ``weight`` (N, K) and ``delta`` (S, N, K) are contiguous, or both transposes of what is, as in a backward pass.
    """
    words, steps, bits, group, _ = delta
    (m, k), n, tile = x.shape, words.shape[1], plan.tile
    transposed = weight.stride(1) != 1
    y = torch.empty((m, n), dtype=x.dtype, device=x.device)
    operands: tuple[object, ...] = (x, weight, words)
    if plan.bulk:
        width = tile.k if bits >= 8 else tile.k * bits // 8  # of one plane's columns, and of all planes' bytes
        stored = (weight.mT, words.mT) if transposed else (weight, words)
        block = [width, tile.n] if transposed else [tile.n, width]
        operands = (
            TensorDescriptor.from_tensor(x, [tile.m, width]),
            *(TensorDescriptor.from_tensor(matrix.reshape(-1, matrix.shape[-1]), block) for matrix in stored),
        )
    weight_side_kernel[(triton.cdiv(m, tile.m) * triton.cdiv(n, tile.n),)](
        *operands, steps, bias, biases, y, order, ids, keys, scale, slots,
        m, n, k, keys.shape[0], max(1, m // ids.shape[0]), *signed_words(tensor),
        *x.stride(), *weight.stride(), *words.stride(), steps.stride(0),
        0 if biases is None else biases.stride(0), y.stride(0),
        IN_STREAM=sides.in_stream, OUT_STREAM=sides.out_stream, FLIP_IN=sides.flip_in, FLIP_OUT=sides.flip_out,
        TRANSPOSED=transposed, BULK=plan.bulk, GROUPED=order is not None,
        HAS_BIAS=bias is not None, HAS_BIASES=biases is not None, BITS=bits, GROUP=group,
        BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k, num_warps=tile.warps, num_stages=tile.stages,
        enable_fp_fusion=True,
    )  # fmt: skip
    return y
