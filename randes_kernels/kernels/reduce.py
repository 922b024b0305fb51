"""The end of a superposed linear: each row's own bias, and the sum of parts where K was split.

    y[m] = Σ_p parts[p, m] + b_j                     parts (P, M, N) fp32, summed in order; y (M, N)

A row of the base, −1, and every row where models have no biases of their own take the base's.
"""

import triton
import triton.language as tl
from torch import Tensor

TILE_COLUMNS = 1024


@triton.jit
def add_bias(y, bias_ptr, biases_ptr, ids, adapted, columns, column_exists, stride_bj, HAS_BIASES: tl.constexpr):
    """``y`` (rows, columns) plus the bias of each row's model."""
    bias = tl.load(bias_ptr + columns, mask=column_exists, other=0.0).to(tl.float32)[None, :]
    if HAS_BIASES:
        own_rows = biases_ptr + ids[:, None].to(tl.int64) * stride_bj
        own = tl.load(own_rows + columns[None, :], mask=adapted[:, None] & column_exists[None, :], other=0.0)
        bias = tl.where(adapted[:, None], own.to(tl.float32), bias)
    return y + bias


@triton.jit(
    do_not_specialize=["models", "rows_per_id", "stride_pp", "stride_pm", "stride_ym"],
    do_not_specialize_on_alignment=["ids_ptr"],
)
def reduce_kernel(
    y_ptr, parts_ptr, bias_ptr, biases_ptr, ids_ptr, N, models, rows_per_id, stride_pp, stride_pm, stride_bj, stride_ym,
    PARTS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_BIASES: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = columns < N

    y = tl.zeros((1, BLOCK_N), dtype=tl.float32)
    for part in tl.static_range(PARTS):
        y += tl.load(parts_ptr + part * stride_pp + row * stride_pm + columns, mask=inside, other=0.0)[None, :]
    if HAS_BIAS:
        ids = tl.load(ids_ptr + row // rows_per_id + tl.arange(0, 1)).to(tl.int32)
        adapted = (ids >= 0) & (ids < models)
        y = add_bias(y, bias_ptr, biases_ptr, ids, adapted, columns, inside, stride_bj, HAS_BIASES)

    tl.store(y_ptr + row * stride_ym + columns[None, :], y.to(y_ptr.dtype.element_ty), mask=inside[None, :])


def reduce(
    y: Tensor, parts: Tensor, bias: Tensor | None, biases: Tensor | None, ids: Tensor, models: int, rows_per_id: int
) -> Tensor:
    """Launch over ``y``, which is filled and returned."""
    m, n = y.shape
    reduce_kernel[(m, triton.cdiv(n, TILE_COLUMNS))](
        y, parts, bias, biases, ids, n, models, rows_per_id, parts.stride(0), parts.stride(1),
        0 if biases is None else biases.stride(0), y.stride(0),
        PARTS=parts.shape[0], HAS_BIAS=bias is not None, HAS_BIASES=biases is not None, BLOCK_N=TILE_COLUMNS,
        enable_fp_fusion=True,
    )  # fmt: skip
    return y
