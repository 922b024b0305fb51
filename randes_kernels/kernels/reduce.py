"""The end of a superposed linear: each row's own bias, and the sum of parts where K was split.

    y[m] = Σ_p parts[p, m] + b_j                     parts (P, M, N) fp32, summed in order; y (M, N)

A row of the base, −1, and every row where models have no biases of their own take the base's.

The program that is last to bring its part sums a tile, so there is no second launch, and parts are read in their order,
so bits do not depend on which was last. Programs of a tile arrive in pairs, as in a knockout: the first of a pair
leaves a mark and goes, the second takes the mark away and goes on. A mark is one 64-bit number, which uninitialised
memory does not hold but by a chance of 2⁻⁶⁴: nothing has to be cleared before, neither at a launch nor when a
graph is replayed, and no two streams share anything.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

MARK: tl.constexpr = tl.constexpr(0x5E1F6A7C93D0B842)


@triton.jit
def add_bias(y, bias_ptr, biases_ptr, ids, adapted, columns, column_exists, stride_bj, HAS_BIASES: tl.constexpr):
    """``y`` (rows, columns) plus the bias of each row's model."""
    bias = tl.load(bias_ptr + columns, mask=column_exists, other=0.0).to(tl.float32)[None, :]
    if HAS_BIASES:
        own_rows = biases_ptr + ids[:, None].to(tl.int64) * stride_bj
        own = tl.load(own_rows + columns[None, :], mask=adapted[:, None] & column_exists[None, :], other=0.0)
        bias = tl.where(adapted[:, None], own.to(tl.float32), bias)
    return y + bias


@triton.jit
def arrives_last(parts_end, tile, part, PARTS: tl.constexpr):
    """Whether a tile's other parts are there, now that this program has stored its own.

    ``parts_end``: where the marks of all tiles begin, PARTS − 1 a tile. PARTS is at most 16.
    """
    tl.static_assert(PARTS <= 16)
    marks = parts_end.to(tl.pointer_type(tl.int64)) + tl.cast(tile, tl.int64) * (PARTS - 1)
    last = part >= 0
    before = 0
    tl.debug_barrier()  # all threads have stored, before one of them says so
    for level in tl.static_range(4):
        left = (PARTS + (1 << level) - 1) >> level  # programs still there
        if left > 1:
            place = part >> level
            paired = last & ((place ^ 1) < left)
            own = marks + before + place // 2
            found = tl.atomic_xchg(own, tl.full((), MARK, tl.int64), mask=paired, sem="acq_rel")
            second = paired & (found == MARK)
            tl.store(own, tl.full((), 0, tl.int64), mask=second)
            last = second | (last & ((place ^ 1) >= left))
            before += left // 2
    return last


@triton.jit
def finish(
    y, y_ptr, parts_ptr, bias_ptr, biases_ptr, ids, adapted, rows, columns, M, N,
    PARTS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_BIASES: tl.constexpr,
):  # fmt: skip
    """Store a tile of ``y``, summed over the programs of its parts and with each row's bias."""
    column_exists = columns < N
    places, exists = rows.to(tl.int64)[:, None] * N + columns[None, :], (rows < M)[:, None] & column_exists[None, :]
    last = tl.program_id(1) >= 0
    if PARTS > 1:
        size = tl.cast(M, tl.int64) * N
        tl.store(parts_ptr + tl.program_id(1) * size + places, y, mask=exists)
        marks = parts_ptr + (PARTS * size + 1) // 2 * 2  # of 64 bits, and so they lie
        last = arrives_last(marks, tl.program_id(0), tl.program_id(1), PARTS)
    if last:
        if PARTS > 1:
            # Past the L1 cache, which knows nothing of what others store.
            y = tl.load(parts_ptr + places, mask=exists, other=0.0, cache_modifier=".cg")
            for part in tl.static_range(1, PARTS):
                y += tl.load(parts_ptr + part * size + places, mask=exists, other=0.0, cache_modifier=".cg")
        if HAS_BIAS:
            y = add_bias(y, bias_ptr, biases_ptr, ids, adapted, columns, column_exists, N, HAS_BIASES)
        tl.store(y_ptr + places, y.to(y_ptr.dtype.element_ty), mask=exists)


def workspace(y: Tensor, tiles: int, parts: int) -> Tensor:
    """Uninitialised memory for the parts of ``y`` and the marks of its tiles."""
    return torch.empty(parts * y.numel() + 1 + 2 * tiles * (parts - 1), dtype=torch.float32, device=y.device)
