"""The superposed linear layer on the activation side: for any mix of models.

    y = x W0ᵀ + scale_j · r_j ⊙ ( (c_j ⊙ x) P_j Dᵀ ) + b_j                          (design, section 1)

    x (M, K)   W0 (N, K)   D (S, N, K), one slot a group of models   y (M, N)
    j = ids[m // rows_per_id], the model of row m; −1 is the base: y = x W0ᵀ + b

One pass over W0, and one over each slot of D that the tile's rows touch, whatever models they belong to; the first
slot is read beside W0, so that the two streams fill the memory system together. Where N has too few columns to
fill the chip K is split, and ``reduce.py`` sums the parts in a fixed order.
Neither a retrieved weight nor a sign ever touches global memory. A permutation is the exception in part: every
column tile would have to gather and hash all of x again, so ``route.py`` turns x once before, in (M, K) bytes.

Where models have something of their own in a shared basis (``lowrank.py``), that is r more columns of K: the projection
of x on it, (M, r), comes in, and each row's is multiplied with its own model's part after the loop.

D may be packed in 8, 4 or 2 bits (``packing.py``). A step along K is then one span of packed columns, and so one
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
from randes_kernels.kernels.reduce import add_bias, reduce
from randes_kernels.kernels.transform import Sides
from randes_kernels.packing import Packed
from randes_kernels.primitives import (
    SIGNS_PER_BLOCK,
    block_words,
    flip,
    levels_of,
    signs_of,
    split_key,
    tile_signs,
    unhoisted,
)
from randes_kernels.tiles import Plan

NO_SLOT: tl.constexpr = tl.constexpr(2**31 - 1)


@triton.jit
def load_transposed(tile_ptr, stride_n, stride_k, exists, inside, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """(BLOCK_K, BLOCK_N): a tile of a weight, transposed. Offsets within it fit 32 bits; where it begins may not."""
    rows, depth = tl.arange(0, BLOCK_N)[None, :], tl.arange(0, BLOCK_K)[:, None]
    return tl.load(tile_ptr + rows * stride_n + depth * stride_k, mask=exists[None, :] & inside[:, None], other=0.0)


@triton.jit(
    do_not_specialize=[
        "M",
        "models",
        "rows_per_id",
        "tensor_lo",
        "tensor_hi",
        "part_depth",
        "rank",
        "stride_ss",
        "stride_yp",
    ],
    do_not_specialize_on_alignment=["ids_ptr", "keys_ptr", "scale_ptr", "slots_ptr"],
)
def activation_side_kernel(
    x_ptr, turned_ptr, weight_ptr, delta_ptr, steps_ptr, inner_ptr, own_ptr, bias_ptr, biases_ptr, y_ptr,
    ids_ptr, keys_ptr, scale_ptr, slots_ptr,
    M, N, K, models, rows_per_id, tensor_lo, tensor_hi, part_depth, rank,
    stride_xm, stride_xk, stride_tm, stride_tk, stride_wn, stride_wk, stride_ds, stride_dn, stride_dk,
    stride_ss, stride_bj, stride_yp, stride_ym,
    IN_STREAM: tl.constexpr, OUT_STREAM: tl.constexpr, FLIP_IN: tl.constexpr, FLIP_OUT: tl.constexpr,
    HAS_BASE: tl.constexpr, TURNED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_BIASES: tl.constexpr,
    BITS: tl.constexpr, GROUP: tl.constexpr, HAS_BASIS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    # Row tiles run fastest: the programs that share a weight tile run together and find it in the L2 cache.
    row_tiles = tl.cdiv(M, BLOCK_M)
    rows = (tl.program_id(0) % row_tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    first_column = (tl.program_id(0) // row_tiles) * BLOCK_N
    part = tl.program_id(1)
    PLANES: tl.constexpr = 8 // BITS if BITS < 8 else 1
    WIDTH: tl.constexpr = BLOCK_K // PLANES
    depth, columns = tl.arange(0, WIDTH), first_column + tl.arange(0, BLOCK_N)
    row_exists, column_exists = rows < M, columns < N
    x_rows, wide_column = rows.to(tl.int64), first_column.to(tl.int64)
    first, end = part * part_depth, tl.minimum(K, (part + 1) * part_depth)

    # The model of each row. A number that names no model gives NaN, never another model's answer.
    ids = tl.load(ids_ptr + rows // rows_per_id, mask=row_exists, other=-1).to(tl.int32)
    adapted = (ids >= 0) & (ids < models)
    k0, k1 = split_key(tl.load(keys_ptr + ids, mask=adapted, other=0))
    slots = tl.load(slots_ptr + ids, mask=adapted, other=-1)
    slots = tl.where(slots >= 0, slots, NO_SLOT)

    # One pass for each slot that these rows touch, lowest first, in which rows of other slots are zero. The first
    # reads W0 beside its slot, or alone where no row reads any.
    base_y = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    delta_y = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    weight_rows = weight_ptr + wide_column * stride_wn
    slot = tl.min(slots)
    passes = tl.full((), 0, tl.int32)
    while (slot < NO_SLOT) | (passes == 0):
        in_slot = (slots == slot) & (slots < NO_SLOT)
        reads_base, reads_delta = columns < tl.where(passes == 0, N, 0), columns < tl.where(slot < NO_SLOT, N, 0)
        delta_rows = delta_ptr + tl.where(slot < NO_SLOT, slot, 0).to(tl.int64) * stride_ds + wide_column * stride_dn
        row_y = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)  # of a packed D, until it meets its step
        steps = steps_ptr + tl.where(slot < NO_SLOT, slot, 0).to(tl.int64) * stride_ss + columns
        for start in range(first, end, BLOCK_K):
            if BITS < 8:
                packed_tile = load_transposed(
                    delta_rows + start // PLANES, stride_dn, stride_dk, reads_delta, depth >= 0, BLOCK_N, WIDTH
                )
            if FLIP_IN:
                keys = unhoisted(k0, start), unhoisted(k1, start)
                position = tl.cast(start, tl.int32)
                words = block_words(position // SIGNS_PER_BLOCK, IN_STREAM, tensor_lo, tensor_hi, keys[0], keys[1])
            for plane in tl.static_range(PLANES):
                at = start + plane * WIDTH
                inside = (at + depth) < end
                shift = tl.cast(at, tl.int64)
                if HAS_BASE:
                    x_tile = tl.load(
                        x_ptr + shift * stride_xk + x_rows[:, None] * stride_xm + depth[None, :] * stride_xk,
                        mask=row_exists[:, None] & inside[None, :], other=0.0,
                    )  # fmt: skip
                    weight_tile = load_transposed(
                        weight_rows + shift * stride_wk, stride_wn, stride_wk, reads_base, inside, BLOCK_N, WIDTH
                    )
                    base_y = tl.dot(x_tile, weight_tile, base_y, input_precision="ieee")
                if TURNED:
                    x_tile = tl.load(
                        turned_ptr + shift * stride_tk + x_rows[:, None] * stride_tm + depth[None, :] * stride_tk,
                        mask=in_slot[:, None] & inside[None, :], other=0.0,
                    )  # fmt: skip
                else:
                    x_tile = tl.where(in_slot[:, None], x_tile, 0.0)
                if FLIP_IN:
                    # Of a span of packed columns a plane's signs are known words of the block.
                    within = plane * WIDTH if BITS < 8 else position % SIGNS_PER_BLOCK
                    x_tile = flip(x_tile, signs_of(words, within, WIDTH))
                if BITS < 8:
                    delta_tile = levels_of(packed_tile, plane, BITS, x_tile.dtype)
                else:
                    delta_tile = load_transposed(
                        delta_rows + shift * stride_dk, stride_dn, stride_dk, reads_delta, inside, BLOCK_N, WIDTH
                    )
                if BITS == 16:
                    delta_y = tl.dot(x_tile, delta_tile, delta_y, input_precision="ieee")
                elif BITS == 8:
                    row_y = tl.dot(x_tile, levels_of(delta_tile, 0, 8, x_tile.dtype), row_y, input_precision="ieee")
                else:
                    group_y = row_y if plane * WIDTH % 64 else tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
                    row_y = tl.dot(x_tile, delta_tile, group_y, input_precision="ieee")
                    if (plane + 1) * WIDTH % 64 == 0:
                        step = tl.load(steps + at // GROUP * N, mask=reads_delta, other=0.0)
                        delta_y += row_y * step.to(tl.float32)[None, :]
        if BITS == 8:
            delta_y += row_y * tl.load(steps, mask=reads_delta, other=0.0).to(tl.float32)[None, :]
        passes += 1
        slot = tl.min(tl.where(slots > slot, slots, NO_SLOT))

    if HAS_BASIS:
        # Each row's projection times its own model's part, one model after the other; of a split K in the first part.
        across = tl.arange(0, BLOCK_R)
        inner = tl.load(
            inner_ptr + x_rows[:, None] * rank + across[None, :],
            mask=row_exists[:, None] & (across < rank)[None, :], other=0.0,
        )  # fmt: skip
        own_ids = tl.where(adapted & (rows < tl.where(part == 0, M, 0)), ids, NO_SLOT)
        model = tl.min(own_ids)
        while model < NO_SLOT:
            own_rows = own_ptr + (model.to(tl.int64) * rank + across[:, None]) * N
            own = tl.load(
                own_rows + columns[None, :], mask=(across < rank)[:, None] & column_exists[None, :], other=0.0
            )
            inner_own = tl.where((own_ids == model)[:, None], inner, 0.0)
            base_y = tl.dot(inner_own, own, base_y, input_precision="ieee")
            model = tl.min(tl.where(own_ids > model, own_ids, NO_SLOT))

    scale = tl.load(scale_ptr + ids, mask=adapted, other=0.0)
    scale = tl.where(adapted | (ids == -1), scale, float("nan"))
    if FLIP_OUT:
        delta_y = flip(delta_y, tile_signs(first_column, k0, k1, OUT_STREAM, tensor_lo, tensor_hi, BLOCK_N))
    y = base_y + scale[:, None] * delta_y
    if HAS_BIAS:
        y = add_bias(y, bias_ptr, biases_ptr, ids, adapted, columns, column_exists, stride_bj, HAS_BIASES)

    y_ptrs = y_ptr + part.to(tl.int64) * stride_yp + x_rows[:, None] * stride_ym + columns[None, :]
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=row_exists[:, None] & column_exists[None, :])


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
    rows_per_id = max(1, m // ids.shape[0])
    y = torch.empty((m, n), dtype=x.dtype, device=x.device)
    whole = plan.parts == 1
    parts = y[None] if whole else torch.empty((plan.parts, m, n), dtype=torch.float32, device=x.device)
    multiplied = x if turned is None else turned
    base = x if weight is None else weight  # some pointer, which is not read then
    activation_side_kernel[(triton.cdiv(m, tile.m) * triton.cdiv(n, tile.n), plan.parts)](
        x, multiplied, base, words, steps, inner, own, bias, biases, parts, ids, keys, scale, slots,
        m, n, k, keys.shape[0], rows_per_id, *signed_words(tensor), triton.cdiv(k, tile.k * plan.parts) * tile.k,
        1 if inner is None else inner.shape[1],
        *x.stride(), *multiplied.stride(), *base.stride(), *words.stride(), steps.stride(0),
        0 if biases is None else biases.stride(0), parts.stride(0), y.stride(0),
        IN_STREAM=sides.in_stream, OUT_STREAM=sides.out_stream, FLIP_IN=sides.flip_in, FLIP_OUT=sides.flip_out,
        HAS_BASE=weight is not None, TURNED=turned is not None or weight is None,
        HAS_BIAS=whole and bias is not None, HAS_BIASES=whole and biases is not None,
        BITS=bits, GROUP=group, HAS_BASIS=inner is not None,
        BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k,
        BLOCK_R=16 if inner is None else max(16, triton.next_power_of_2(inner.shape[1])),
        num_warps=tile.warps, num_stages=tile.stages,
        enable_fp_fusion=True,
    )  # fmt: skip
    return y if whole else reduce(y, parts, bias, biases, ids, keys.shape[0], rows_per_id)
