"""The superposed linear layer on the weight side: for tiles of rows that belong to few models.

    y = x ( W0 + scale_j · r_j ⊙ D ⊙ c_j )ᵀ + b_j                                  (design, section 1)

    x (M, K)   W0 (N, K)   D (S, N, K), one slot a group of models   y (M, N)
    j = ids[m // rows_per_id], the model of row m; −1 is the base

A tile of the model's weight is rebuilt in registers and is the left operand of one matrix product, which is computed
transposed: the FLOPs of a plain linear. A retrieved weight never touches memory; the signs of the models at hand do, 16
bits each, written by every program for its own loop, where programs of one model write the same. Rows of one model
should lie side by side: a tile of rows runs its product once for each model in it. ``group.py`` brings rows into such
an order, and ``order`` (M,) says which row of y each one answers.

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
from randes_kernels.kernels.transform import OF_A_CALL, Sides, origin_kind
from randes_kernels.packing import WHOLE_ROW, Packed
from randes_kernels.primitives import (
    SIGNS_PER_BLOCK,
    codes_of,
    levels_of,
    signs_of,
    split_key,
    stored_places,
    unhoisted,
    vector_signs,
    words_from,
)
from randes_kernels.tiles import Plan, programs_of

NO_MODEL: tl.constexpr = tl.constexpr(2**31 - 1)
BAND: tl.constexpr = tl.constexpr(8)
BLOCKS_AT_ONCE: tl.constexpr = tl.constexpr(32)


@triton.jit
def load_tile(
    source, first_row, first_column, rows, columns, stride_row, stride_column,
    TRANSPOSED: tl.constexpr, BULK: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr = 16,
):  # fmt: skip
    """The (HEIGHT, WIDTH) tile at (first_row, first_column) of a matrix; zeros beyond its ``columns``.

    What lies beyond its ``rows`` is finite where the matrix is.

    BULK: ``source`` is a tensor descriptor, of the matrix or, TRANSPOSED, of its transpose. Else it is a pointer to
    the tile's first row.
    """
    if BULK and TRANSPOSED:
        tile = tl.trans(source.load([first_column, first_row]))
    elif BULK:
        tile = source.load([first_row, first_column])
    else:
        across, down = stored_places(WIDTH, BITS), tl.arange(0, HEIGHT)
        exists = (first_column + across < columns)[None, :]
        if TRANSPOSED:
            exists = exists & (first_row + down < rows)[:, None]
        else:
            # The last row stands for all beyond it, whose products nobody stores: a mask a row would cost registers.
            down = tl.minimum(down, rows - 1 - first_row)
        places = down[:, None] * stride_row + across[None, :] * stride_column
        tile = tl.load(source + tl.cast(first_column, tl.int64) * stride_column + places, mask=exists, other=0.0)
    return codes_of(tile, WIDTH, BITS)


@triton.jit
def load_steps(steps_ptr, first_column, columns, BLOCK_N: tl.constexpr):
    """The steps of a tile's rows of D, its columns of y; zeros beyond."""
    own = first_column + tl.arange(0, BLOCK_N)
    return tl.load(steps_ptr + own, mask=own < columns, other=0.0).to(tl.float32)


@triton.jit
def write_masks(
    masks_ptr, columns, k0, k1, STREAM: tl.constexpr, tensor_lo, tensor_hi, first, ORIGIN: tl.constexpr, passes
):
    """``columns`` signs of a stream from the ``first`` on for one key (scalars), as ``flip_by`` takes them."""
    block, lane = unhoisted(tl.arange(0, BLOCKS_AT_ONCE), passes), tl.arange(0, SIGNS_PER_BLOCK)
    keys = tl.zeros((BLOCKS_AT_ONCE,), dtype=tl.uint32)
    for start in range(0, columns, BLOCKS_AT_ONCE * SIGNS_PER_BLOCK):
        words = words_from(
            first, block + start // SIGNS_PER_BLOCK, STREAM, tensor_lo, tensor_hi, keys + k0, keys + k1, ORIGIN
        )
        place = block[:, None] * SIGNS_PER_BLOCK + lane[None, :] + start
        masks = signs_of(words, 0, SIGNS_PER_BLOCK) << 15
        tl.store(masks_ptr + place, masks.to(tl.int16), mask=place < columns)


@triton.jit
def flip_by(values, masks):
    """``values`` (floats of 16 or 32 bits), negated where ``masks`` (int16) has its highest bit set, and never another.

    Masks are loaded: of a tile that is made of loads alone Triton reads every part from shared memory as the product
    takes it. What is computed from a place in the tile would send the whole tile through shared memory once more.
    """
    width: tl.constexpr = values.dtype.primitive_bitwidth
    integer: tl.constexpr = tl.core.get_int_dtype(width, True)
    return (values.to(integer, bitcast=True) ^ (masks.to(integer) << (width - 16))).to(values.dtype, bitcast=True)


@triton.jit
def models_of(rows, M, models, rows_per_id, ids_ptr):
    """The model of each of ``rows``; NO_MODEL beyond the last."""
    ids = tl.load(ids_ptr + rows // rows_per_id, mask=rows < M, other=0).to(tl.int32)
    # Of the numbers that name no model one above stands for all, and none for NO_MODEL.
    return tl.where(rows < M, tl.minimum(ids, models), NO_MODEL)


@triton.jit(
    do_not_specialize=OF_A_CALL,
    do_not_specialize_on_alignment=["order_ptr", "ids_ptr", "keys_ptr", "scale_ptr", "slots_ptr"],
)
def weight_side_kernel(
    x, weight, delta, steps_ptr, bias_ptr, biases_ptr, y_ptr, order_ptr, ids_ptr, keys_ptr, scale_ptr, slots_ptr,
    in_masks_ptr, out_masks_ptr, M, N, K, models, rows_per_id, tensor_lo, tensor_hi, first_in, first_out,
    stride_xm, stride_xk, stride_wn, stride_wk, stride_ds, stride_dn, stride_dk,
    stride_ss, stride_bj, stride_ym,
    IN_STREAM: tl.constexpr, OUT_STREAM: tl.constexpr, FLIP_IN: tl.constexpr, FLIP_OUT: tl.constexpr,
    IN_ORIGIN: tl.constexpr, OUT_ORIGIN: tl.constexpr,
    TRANSPOSED: tl.constexpr, BULK: tl.constexpr, GROUPED: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_BIASES: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    PLANES: tl.constexpr = (8 if BITS < 1 else 8 // BITS) if BITS < 8 else 1
    COLUMNS_A_BYTE: tl.constexpr = 16 if BITS < 1 else PLANES
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

    model = tl.min(models_of(first_row + tl.arange(0, BLOCK_M), M, models, rows_per_id, ids_ptr))
    passes = tl.full((), 0, tl.int32)
    while model < NO_MODEL:
        known = (model >= 0) & (model < models)
        k0, k1 = split_key(tl.load(keys_ptr + model, mask=known, other=0))
        own_columns = first_column + tl.arange(0, BLOCK_N)
        in_masks = in_masks_ptr + model.to(tl.int64) * K
        out_masks = out_masks_ptr + model.to(tl.int64) * N + own_columns
        if known:
            if FLIP_IN:
                write_masks(in_masks, K, k0, k1, IN_STREAM, tensor_lo, tensor_hi, first_in, IN_ORIGIN, passes)
            if FLIP_OUT:
                bits = vector_signs(
                    first_column, k0, k1, OUT_STREAM, tensor_lo, tensor_hi, first_out, OUT_ORIGIN, BLOCK_N
                )  # fmt: skip
                tl.store(out_masks, (bits << 15).to(tl.int16), mask=own_columns < N)
        tl.debug_barrier()
        # Read back as loads (``flip_by``). A number that names no model gives NaN, never another model's answer.
        unknown = tl.where(model == -1, 0.0, float("nan"))
        of_columns = own_columns < tl.where(known, N, 0)
        scale = tl.load(scale_ptr + model + tl.zeros((BLOCK_N,), dtype=tl.int32), mask=of_columns, other=unknown)
        if FLIP_OUT:
            scale = flip_by(scale, tl.load(out_masks, mask=of_columns, other=0))
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
        # In bytes, of whole spans.
        stored_columns = tl.cdiv(K, SIGNS_PER_BLOCK) * (SIGNS_PER_BLOCK // COLUMNS_A_BYTE) if BITS < 8 else K
        delta_columns = tl.where(slot >= 0, stored_columns, 0)
        steps, step_columns = steps_ptr + slot.to(tl.int64) * stride_ss, tl.where(slot >= 0, N, 0)
        if BITS == 8:
            scale *= load_steps(steps, first_column, step_columns, BLOCK_N)

        y = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
        for start in range(0, K, BLOCK_K):
            packed_tile = load_tile(
                delta_rows, delta_row, delta_column + start // COLUMNS_A_BYTE, N, delta_columns, stride_dn, stride_dk,
                TRANSPOSED, BULK, BLOCK_N, WIDTH, BITS,
            )  # fmt: skip
            for plane in tl.static_range(PLANES):
                at = start + plane * WIDTH
                x_tile = load_tile(x_rows, first_row, at, M, K, stride_xm, stride_xk, False, BULK, BLOCK_M, WIDTH)
                weight_tile = load_tile(
                    weight_rows, first_column, at, N, K, stride_wn, stride_wk, TRANSPOSED, BULK, BLOCK_N, WIDTH
                )
                own_scale, delta_tile = scale, packed_tile
                if BITS < 16:
                    delta_tile = levels_of(packed_tile, plane, BITS, dtype)
                if BITS < 8:
                    # Their columns again, not kept through the loop: the product needs the registers.
                    own_scale *= load_steps(
                        steps + at // GROUP * N, unhoisted(first_column, start), step_columns, BLOCK_N
                    )
                if FLIP_IN:
                    flipped = at + tl.arange(0, WIDTH)
                    masks = tl.load(in_masks + flipped, mask=flipped < tl.where(known, K, 0), other=0)
                    delta_tile = flip_by(delta_tile, masks[None, :])
                factor = tl.broadcast_to(own_scale.to(FINE)[:, None], (BLOCK_N, WIDTH))
                rebuilt = tl.fma(delta_tile.to(FINE), factor, weight_tile.to(FINE))
                y = tl.dot(rebuilt.to(x_tile.dtype), tl.trans(x_tile), y, input_precision="ieee")

        # Places and models again, not kept until now: the largest tile needs the registers. In others the places are
        # kept, of which ptxas would spill what is made anew.
        KEPT: tl.constexpr = GROUPED or BLOCK_M < 256
        columns = own_columns if KEPT else unhoisted(first_column, passes) + tl.arange(0, BLOCK_N)
        if HAS_BIASES:
            own_bias = biases_ptr + model.to(tl.int64) * stride_bj
            bias_row = tl.where(known, own_bias, bias_ptr)
            y += tl.load(bias_row + columns, mask=columns < N, other=0.0).to(tl.float32)[:, None]
        elif HAS_BIAS:
            y += tl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)[:, None]
        last_row = unhoisted(first_row, passes)
        rows = tl.arange(0, BLOCK_M) if KEPT else unhoisted(tl.arange(0, BLOCK_M), passes)
        ids = models_of(last_row + rows, M, models, rows_per_id, ids_ptr)
        if GROUPED:
            rows = tl.load(order_ptr + last_row + rows, mask=last_row + rows < M, other=0).to(tl.int64)
            y_ptrs = y_ptr + rows[:, None] * stride_ym + columns[None, :]
        else:
            y_ptrs = y_ptr + last_row.to(tl.int64) * stride_ym + (rows[:, None] * stride_ym + columns[None, :])
        y_tile = tl.trans(y.to(y_ptr.dtype.element_ty))
        tl.store(y_ptrs, y_tile, mask=(ids == model)[:, None] & (columns < N)[None, :])
        model = tl.min(tl.where(ids > model, ids, NO_MODEL))
        passes += 1


def described(base: Tensor, rows: int, columns: int, block: list[int]) -> TensorDescriptor:
    """What lies at ``base`` in one piece, as a matrix. Its own class would check again what ``gpu.plan_of`` knows of
    every operand: 13 µs a call."""
    made: TensorDescriptor = object.__new__(TensorDescriptor)
    made.base, made.shape, made.strides, made.block_shape = base, [rows, columns], [columns, 1], block
    return made


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
        width = tile.k if bits >= 8 else int(tile.k * bits) // 8  # of one plane's columns, and of all planes' bytes
        block = [width, tile.n] if transposed else [tile.n, width]
        of_weight, of_words = ((k, n), (words.shape[2], n)) if transposed else ((n, k), (n, words.shape[2]))
        operands = (
            described(x, m, k, [tile.m, width]),
            described(weight, *of_weight, block),
            described(words, words.shape[0] * of_words[0], of_words[1], block),
        )
    # Written by every program for itself, all the same: none waits for another, and nothing is launched before.
    in_masks, out_masks = (torch.empty((keys.shape[0], size), dtype=torch.int16, device=x.device) for size in (k, n))
    weight_side_kernel[(programs_of(m, n, tile),)](
        *operands, steps, bias, biases, y, order, ids, keys, scale, slots,
        in_masks, out_masks, m, n, k, keys.shape[0], max(1, m // ids.shape[0]), *signed_words(tensor),
        sides.first_in, sides.first_out, *x.stride(), *weight.stride(), *words.stride(), steps.stride(0),
        0 if biases is None else biases.stride(0), y.stride(0),
        IN_STREAM=sides.in_stream, OUT_STREAM=sides.out_stream, FLIP_IN=sides.flip_in, FLIP_OUT=sides.flip_out,
        IN_ORIGIN=origin_kind(sides.first_in), OUT_ORIGIN=origin_kind(sides.first_out),
        TRANSPOSED=transposed, BULK=plan.bulk, GROUPED=order is not None,
        HAS_BIAS=bias is not None, HAS_BIASES=biases is not None, BITS=bits, GROUP=group or WHOLE_ROW,
        BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k, num_warps=tile.warps, num_stages=tile.stages,
        enable_fp_fusion=True,
    )  # fmt: skip
    return y
