"""Rows brought into an order in which those of one model lie side by side, for the weight side.

    order[place] = m, stably by ids[m // rows_per_id];  grouped[place] = x[m];  grouped_ids[place] = the id of m

    x, grouped (M, K)   ids (B,), each for rows_per_id rows   order, grouped_ids (M,) int32

The order is computed on the device, in the launch that moves the rows, so the host never waits for ids. Each program
counts the runs that come before its own: B comparisons, where moving its row costs K.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE_COLUMNS = 2048


@triton.jit(
    do_not_specialize=["runs", "rows_per_id"],
    do_not_specialize_on_alignment=["ids_ptr", "order_ptr", "grouped_ids_ptr"],
)
def group_kernel(
    grouped_ptr, order_ptr, grouped_ids_ptr, x_ptr, ids_ptr, runs, rows_per_id, K, stride_xm, stride_xk,
    BLOCK_RUNS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    run = row // rows_per_id
    own = tl.load(ids_ptr + run)
    runs_before = tl.full((), 0, tl.int32)
    for start in range(0, runs, BLOCK_RUNS):
        others = start + tl.arange(0, BLOCK_RUNS)
        ids = tl.load(ids_ptr + others, mask=others < runs, other=2**31 - 1)
        comes_before = (ids < own) | ((ids == own) & (others < run))
        runs_before += tl.sum((comes_before & (others < runs)).to(tl.int32))
    place = runs_before * rows_per_id + row % rows_per_id

    if tl.program_id(1) == 0:
        tl.store(order_ptr + place, row)
        tl.store(grouped_ids_ptr + place, own)
    columns = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    moved = tl.load(x_ptr + row.to(tl.int64) * stride_xm + columns * stride_xk, mask=columns < K)
    tl.store(grouped_ptr + place.to(tl.int64) * K + columns, moved, mask=columns < K)


def group(x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Launch over ``x``: its rows in order, ``order`` and their ids."""
    m, k = x.shape
    grouped = torch.empty((m, k), dtype=x.dtype, device=x.device)
    order, grouped_ids = torch.empty((2, m), dtype=torch.int32, device=x.device)
    group_kernel[(m, triton.cdiv(k, TILE_COLUMNS))](
        grouped, order, grouped_ids, x, ids, ids.shape[0], max(1, m // ids.shape[0]), k, *x.stride(),
        BLOCK_RUNS=1024, BLOCK_K=TILE_COLUMNS, enable_fp_fusion=True,
    )  # fmt: skip
    return grouped, order, grouped_ids
