"""The superposed linear layer on the activation side: for any mix of models.

    y = x W0ᵀ + scale_j · r_j ⊙ ( (c_j ⊙ x) P_j Dᵀ ) + b_j                          (design, section 1)

    x (M, K)   W0 (N, K)   D (S, N, K), one slot a group of models   y (M, N)
    j = ids[m // rows_per_id], the model of row m; −1 is the base: y = x W0ᵀ + b

Products are computed transposed, a tile of a weight times a few columns of xᵀ: warps then share out the weight's rows,
and on Hopper a matrix instruction reads them where the copy left them, or takes a packed D's levels from registers.

One pass over W0, and one over each slot of D that the tile's rows touch, whatever models they belong to; the first
slot is read beside W0, so that the two streams fill the memory system together. What a row's product with a slot that
is not its own comes to is dropped when the pass ends. Where N has too few columns to fill the chip K is split, and the
last program of a tile sums the parts in a fixed order (``reduce.py``).
Neither a retrieved weight nor a sign ever touches global memory. A permutation is the exception in part: every
column tile would have to gather and hash all of x again, so ``route.py`` turns x once before, in (M, K) bytes.

Where models have something of their own in a shared basis (``lowrank.py``), that is r more columns of K: the projection
of x on it, (M, r), comes in, and each row's is multiplied with its own model's part after the loop.

D may be packed in 8 bits or fewer (``packing.py``). A step along K is then one span of packed columns, and so one
block of signs: its bytes are loaded once and unpacked a plane at a time, each a product of its own with the x of the
plane's columns. Levels are small odd integers, exact in any dtype; steps multiply sums, in fp32.

Transposed, the same kernel is its own backward: x (M, N) → y (M, K), with rows and columns swapping parts. That
of a packed D is not there: a backward pass unpacks it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from randes_kernels.format import signed_words
from randes_kernels.kernels.reduce import finish, workspace
from randes_kernels.kernels.transform import OF_A_CALL, Sides, origin_kind
from randes_kernels.packing import WHOLE_ROW, Packed
from randes_kernels.primitives import (
    SIGNS_PER_BLOCK,
    codes_of,
    flip_sign_bit,
    levels_of,
    signs_of,
    split_key,
    stored_places,
    tile_signs,
    unhoisted,
    words_from,
)
from randes_kernels.tiles import Plan, programs_of

NO_SLOT: tl.constexpr = tl.constexpr(2**31 - 1)
RANK_STEP: tl.constexpr = tl.constexpr(16)


@triton.jit
def load_rows(
    rows_ptr, stride_row, row_exists, inside, WHOLE: tl.constexpr, BLOCK_M: tl.constexpr, WIDTH: tl.constexpr
):
    """(BLOCK_M, WIDTH) of x. ``WHOLE``: all columns are inside."""
    down, across = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, WIDTH)[None, :]
    mask = row_exists[:, None] if WHOLE else row_exists[:, None] & inside[None, :]
    return tl.load(rows_ptr + down.to(tl.int64) * stride_row + across, mask=mask, other=0.0)


@triton.jit
def load_weight(
    tile_ptr, stride_n, stride_k, reads, inside,
    ALWAYS: tl.constexpr, WHOLE: tl.constexpr, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr = 16,
):  # fmt: skip
    """(BLOCK_N, WIDTH): a tile of a weight. Offsets within it fit 32 bits; where it begins may not.

    ``reads``: (BLOCK_N,), the rows that are there and wanted. Of a tile that is ``WHOLE`` and ``ALWAYS`` wanted no
    mask is made.
    """
    down, across = tl.arange(0, BLOCK_N)[:, None], stored_places(WIDTH, BITS)[None, :]
    tile_ptrs = tile_ptr + down * stride_n + across * stride_k
    if WHOLE and ALWAYS:
        tile = tl.load(tile_ptrs)
    elif WHOLE:
        tile = tl.load(tile_ptrs, mask=reads[:, None] & (across >= 0), other=0)
    else:
        tile = tl.load(tile_ptrs, mask=reads[:, None] & inside[None, :], other=0)
    return codes_of(tile, WIDTH, BITS)


@triton.jit
def load_steps(steps_ptr, start, end, N, reads, columns, GROUP: tl.constexpr):
    """The steps of a span's two halves of 64 columns, (BLOCK_N,) each, fp16; nothing is read from ``end`` on."""
    mask = reads & (columns < tl.where(start < end, N, 0))
    low = tl.load(steps_ptr + start // GROUP * N + columns, mask=mask, other=0.0)
    high = tl.load(steps_ptr + (start + 64) // GROUP * N + columns, mask=mask, other=0.0)
    return low, high


@triton.jit
def packed_product(
    y, half_y, packed_tile, x_tile, low, high, PLANE: tl.constexpr, BITS: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """``y`` and the sum of this half of a span, which meets its step and is added when the half is over."""
    first: tl.constexpr = PLANE * WIDTH
    if first % 64 == 0:
        half_y = tl.zeros_like(y)
    half_y = tl.dot(levels_of(packed_tile, PLANE, BITS, x_tile.dtype), tl.trans(x_tile), half_y, input_precision="ieee")
    if (first + WIDTH) % 64 == 0:
        step = low if first < 64 else high
        y += half_y * step.to(tl.float32)[:, None]
    return y, half_y


@triton.jit
def models_of(rows, M, models, rows_per_id, ids_ptr):
    """The model of each row, −1 beyond the last, and whether it is a model: neither the base nor an unknown number."""
    ids = tl.load(ids_ptr + rows // rows_per_id, mask=rows < M, other=-1).to(tl.int32)
    return ids, (ids >= 0) & (ids < models)


@triton.jit
def add_own(
    y, inner_ptr, own_ptr, ids, rows, columns, rank, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """``y`` plus each row's projection times its own model's part of a basis, one model after the other.

    ``ids``: NO_SLOT for rows that have none.
    """
    across = tl.arange(0, RANK_STEP)
    model = tl.min(ids)
    while model < NO_SLOT:
        own_rows = own_ptr + model.to(tl.int64) * rank * N
        for start in range(0, rank, RANK_STEP):
            inside = (start + across) < rank
            inner = tl.load(
                inner_ptr + rows.to(tl.int64)[:, None] * rank + (start + across)[None, :],
                mask=(ids == model)[:, None] & inside[None, :], other=0.0,
            )  # fmt: skip
            own = tl.load(
                own_rows + (start + across).to(tl.int64)[None, :] * N + columns[:, None],
                mask=inside[None, :] & (columns < N)[:, None], other=0.0,
            )  # fmt: skip
            y = tl.dot(own, tl.trans(inner), y, input_precision="ieee")
        model = tl.min(tl.where(ids > model, ids, NO_SLOT))
    return y


@triton.jit(
    do_not_specialize=[*OF_A_CALL, "rank"],
    do_not_specialize_on_alignment=["ids_ptr", "keys_ptr", "scale_ptr", "slots_ptr"],
)
def activation_side_kernel(
    x_ptr, turned_ptr, weight_ptr, delta_ptr, steps_ptr, inner_ptr, own_ptr, bias_ptr, biases_ptr, y_ptr, parts_ptr,
    ids_ptr, keys_ptr, scale_ptr, slots_ptr,
    M, N, K, models, rows_per_id, tensor_lo, tensor_hi, rank, first_in, first_out,
    stride_xm, stride_tm, stride_wn, stride_wk, stride_ds, stride_dn, stride_dk, stride_ss,
    IN_STREAM: tl.constexpr, OUT_STREAM: tl.constexpr, FLIP_IN: tl.constexpr, FLIP_OUT: tl.constexpr,
    IN_ORIGIN: tl.constexpr, OUT_ORIGIN: tl.constexpr,
    HAS_BASE: tl.constexpr, TURNED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_BIASES: tl.constexpr,
    HAS_BASIS: tl.constexpr, ONE_SLOT: tl.constexpr, WHOLE: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    PARTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # Row tiles run fastest: the programs that share a weight tile run together and find it in the L2 cache.
    row_tiles = tl.cdiv(M, BLOCK_M)
    first_row, first_column = (tl.program_id(0) % row_tiles) * BLOCK_M, (tl.program_id(0) // row_tiles) * BLOCK_N
    rows, columns = first_row + tl.arange(0, BLOCK_M), first_column + tl.arange(0, BLOCK_N)
    part, part_depth = tl.program_id(1), tl.cdiv(K, BLOCK_K * PARTS) * BLOCK_K
    first, end = part * part_depth, tl.minimum(K, (part + 1) * part_depth)
    PLANES: tl.constexpr = (8 if BITS < 1 else 8 // BITS) if BITS < 8 else 1
    COLUMNS_A_BYTE: tl.constexpr = 16 if BITS < 1 else PLANES
    WIDTH: tl.constexpr = BLOCK_K // PLANES

    x_rows = x_ptr + first_row.to(tl.int64) * stride_xm
    turned_rows = turned_ptr + first_row.to(tl.int64) * stride_tm
    weight_rows = weight_ptr + first_column.to(tl.int64) * stride_wn
    ids, adapted = models_of(rows, M, models, rows_per_id, ids_ptr)
    k0, k1 = split_key(tl.load(keys_ptr + ids, mask=adapted, other=0))
    slots = tl.load(slots_ptr + ids, mask=adapted, other=-1)
    slots = tl.where(slots >= 0, slots, NO_SLOT)

    # One pass for each slot that these rows touch, lowest first. The first reads W0 beside its slot, or alone where no
    # row reads any. An only slot is read unasked: weights would wait for ids, slots and their minimum, 1.5 µs.
    y = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    slot = tl.full((), 0, tl.int32) if ONE_SLOT else tl.min(slots)
    passes = tl.full((), 0, tl.int32)
    while (passes == 0) | (slot < NO_SLOT):
        reads_base, reads_delta = columns < tl.where(passes == 0, N, 0), columns < tl.where(slot < NO_SLOT, N, 0)
        held = tl.where(slot < NO_SLOT, slot, 0).to(tl.int64)
        delta_rows = delta_ptr + held * stride_ds + first_column.to(tl.int64) * stride_dn
        steps = steps_ptr + held * stride_ss
        slot_y = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
        if BITS < 8:
            half_y = slot_y
            low, high = load_steps(steps, first, end, N, reads_delta, columns, GROUP)
        for start in range(first, end, BLOCK_K):
            if FLIP_IN:
                keys = unhoisted(k0, start), unhoisted(k1, start)
                position = tl.cast(start, tl.int32)
                block = position // SIGNS_PER_BLOCK
                words = words_from(first_in, block, IN_STREAM, tensor_lo, tensor_hi, keys[0], keys[1], IN_ORIGIN)
            if BITS < 8:
                packed_tile = load_weight(
                    delta_rows + start // COLUMNS_A_BYTE, stride_dn, stride_dk, reads_delta, tl.arange(0, WIDTH) >= 0,
                    ONE_SLOT, WHOLE, BLOCK_N, WIDTH, BITS,
                )  # fmt: skip
                # A step ahead, in registers: too few bytes for the pipeline, and too far away to be waited for.
                next_low, next_high = load_steps(steps, start + BLOCK_K, end, N, reads_delta, columns, GROUP)
            for plane in tl.static_range(PLANES):
                at = start + plane * WIDTH
                row_exists, inside = rows < M, (at + tl.arange(0, WIDTH)) < end
                shift = tl.cast(at, tl.int64)
                if HAS_BASE:
                    x_tile = load_rows(x_rows + shift, stride_xm, row_exists, inside, WHOLE, BLOCK_M, WIDTH)
                    weight_tile = load_weight(
                        weight_rows + shift * stride_wk, stride_wn, stride_wk, reads_base, inside,
                        ONE_SLOT, WHOLE, BLOCK_N, WIDTH,
                    )  # fmt: skip
                    y = tl.dot(weight_tile, tl.trans(x_tile), y, input_precision="ieee")
                if TURNED:
                    x_tile = load_rows(turned_rows + shift, stride_tm, row_exists, inside, WHOLE, BLOCK_M, WIDTH)
                if FLIP_IN:
                    # Of a span of packed columns a plane's signs are known words of the block.
                    within = plane * WIDTH if BITS < 8 else position % SIGNS_PER_BLOCK
                    x_tile = flip_sign_bit(x_tile, signs_of(words, within, WIDTH))
                if BITS < 8:
                    slot_y, half_y = packed_product(slot_y, half_y, packed_tile, x_tile, low, high, plane, BITS, WIDTH)
                else:
                    delta_tile = load_weight(
                        delta_rows + shift * stride_dk, stride_dn, stride_dk, reads_delta, inside,
                        ONE_SLOT, WHOLE, BLOCK_N, WIDTH,
                    )  # fmt: skip
                    if BITS == 8:
                        delta_tile = levels_of(delta_tile, 0, 8, x_tile.dtype)
                    slot_y = tl.dot(delta_tile, tl.trans(x_tile), slot_y, input_precision="ieee")
            if BITS < 8:
                low, high = next_low, next_high

        # What rows are is loaded again, here and below, not kept until now: the products need the registers.
        if BITS == 8:
            slot_y *= tl.load(steps + columns, mask=reads_delta, other=0.0).to(tl.float32)[:, None]
        own_ids, own_adapted = models_of(unhoisted(rows, passes), M, models, rows_per_id, ids_ptr)
        if FLIP_OUT:
            own_k0, own_k1 = split_key(tl.load(keys_ptr + own_ids, mask=own_adapted, other=0))
            bits = tile_signs(
                first_column, own_k0, own_k1, OUT_STREAM, tensor_lo, tensor_hi, first_out, OUT_ORIGIN, BLOCK_N
            )  # fmt: skip
            slot_y = flip_sign_bit(slot_y, tl.trans(bits))
        scale = tl.load(scale_ptr + own_ids, mask=own_adapted, other=0.0)[None, :]
        in_slot = tl.load(slots_ptr + own_ids, mask=own_adapted, other=-1)[None, :] == slot
        y = tl.where(in_slot, y + scale * slot_y, y)
        passes += 1
        slot = tl.full((), NO_SLOT, tl.int32) if ONE_SLOT else tl.min(tl.where(slots > slot, slots, NO_SLOT))

    rows = unhoisted(rows, passes)
    ids, adapted = models_of(rows, M, models, rows_per_id, ids_ptr)
    if HAS_BASIS:
        own_ids = tl.where(adapted & (rows < tl.where(part == 0, M, 0)), ids, NO_SLOT)
        y = add_own(y, inner_ptr, own_ptr, own_ids, rows, columns, rank, N, BLOCK_M, BLOCK_N)
    # A number that names no model gives NaN, never another model's answer.
    y = tl.where((adapted | (ids == -1))[None, :], y, float("nan"))
    finish(
        tl.trans(y), y_ptr, parts_ptr, bias_ptr, biases_ptr, ids, adapted, rows, columns, M, N,
        PARTS, HAS_BIAS, HAS_BIASES,
    )  # fmt: skip


def activation_side(
    x: Tensor, turned: Tensor | None, weight: Tensor | None, delta: Packed, bias: Tensor | None,
    biases: Tensor | None, ids: Tensor, keys: Tensor, scale: Tensor, slots: Tensor, tensor: int,
    sides: Sides, plan: Plan, inner: Tensor | None = None, own: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Launch over ``x``. ``turned``: what D is multiplied with, where it is not x itself: x with its columns permuted.

    ``weight`` (N, K) and an unpacked ``delta`` (S, N, K) may have any strides: their transposes make the backward pass.
    Without a weight only the second term is computed. ``inner``, ``own``: (M, r), and (J, r, N), to be added.
    """
    words, steps, bits, group, _ = delta
    (m, k), n, tile = x.shape, words.shape[1], plan.tile
    x = x if x.stride(1) == 1 else x.contiguous()
    multiplied = x if turned is None else turned
    base = x if weight is None else weight  # some pointer, which is not read then
    y = torch.empty((m, n), dtype=x.dtype, device=x.device)
    tiles = programs_of(m, n, tile)
    parts = y if plan.parts == 1 else workspace(y, tiles, plan.parts)
    activation_side_kernel[(tiles, plan.parts)](
        x, multiplied, base, words, steps, inner, own, bias, biases, y, parts, ids, keys, scale, slots,
        m, n, k, keys.shape[0], max(1, m // ids.shape[0]), *signed_words(tensor),
        1 if inner is None else inner.shape[1], sides.first_in, sides.first_out,
        x.stride(0), multiplied.stride(0), *base.stride(), *words.stride(), steps.stride(0),
        IN_STREAM=sides.in_stream, OUT_STREAM=sides.out_stream, FLIP_IN=sides.flip_in, FLIP_OUT=sides.flip_out,
        IN_ORIGIN=origin_kind(sides.first_in), OUT_ORIGIN=origin_kind(sides.first_out),
        HAS_BASE=weight is not None, TURNED=turned is not None or weight is None,
        HAS_BIAS=bias is not None, HAS_BIASES=biases is not None, HAS_BASIS=inner is not None,
        ONE_SLOT=words.shape[0] == 1, WHOLE=n % tile.n == 0 and k % tile.k == 0, BITS=bits, GROUP=group or WHOLE_ROW,
        PARTS=plan.parts, BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k, num_warps=tile.warps, num_stages=tile.stages,
        enable_fp_fusion=True,
    )  # fmt: skip
    return y
