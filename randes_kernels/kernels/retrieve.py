"""One model's weight out of a superposition, for export.

    Ŵ[:, k] = W0[:, k] + scale · r · D[:, π(k)] · c_k                                      (design, section 1)

    W0, Ŵ (N, K) fp32, fp16 or bf16   D (N, K) integers or floats

Reads W0 and D once and writes Ŵ once. Serving never calls it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from randes_kernels.format import Transform, signed_words
from randes_kernels.kernels.transform import transform_arguments, transformed_tile
from randes_kernels.primitives import flip

TILE_ROWS, TILE_COLUMNS = 32, 128


@triton.jit(do_not_specialize=["key_lo", "key_hi", "tensor_lo", "tensor_hi", "segment", "origin_row", "origin_column"])
def retrieve_kernel(
    out_ptr, base_ptr, delta_ptr, scale, key_lo, key_hi, tensor_lo, tensor_hi,
    N, K, granule, width, bits, segment, origin_row, origin_column,
    stride_on, stride_bn, stride_dn,
    FLIP_ROWS: tl.constexpr, FLIP_COLUMNS: tl.constexpr, PERMUTED: tl.constexpr, SEGMENTS: tl.constexpr,
    ROW_ORIGIN: tl.constexpr, COLUMN_ORIGIN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    rows, columns, inside, sign, turned_columns = transformed_tile(
        N, K, key_lo, key_hi, tensor_lo, tensor_hi, granule, width, bits, segment, origin_row, origin_column,
        FLIP_ROWS, FLIP_COLUMNS, PERMUTED, SEGMENTS, ROW_ORIGIN, COLUMN_ORIGIN, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    delta = tl.load(delta_ptr + rows * stride_dn + turned_columns, mask=inside, other=0).to(tl.float32)
    base = tl.load(base_ptr + rows * stride_bn + columns, mask=inside, other=0.0).to(tl.float32)
    retrieved = base + scale * flip(delta, sign)

    tl.store(out_ptr + rows * stride_on + columns, retrieved.to(out_ptr.dtype.element_ty), mask=inside)


def retrieve(base: Tensor, delta: Tensor, scale: float, key: int, tensor: int, transform: Transform) -> Tensor:
    """Launch the kernel; the result has the shape and dtype of ``base``."""
    n, k = base.shape
    out = torch.empty((n, k), dtype=base.dtype, device=base.device)
    arguments = transform_arguments(transform, k)
    retrieve_kernel[(triton.cdiv(k, TILE_COLUMNS), triton.cdiv(n, TILE_ROWS))](
        out, base, delta, scale, *signed_words(key), *signed_words(tensor),
        n, k, *arguments.permutation, *arguments.origin, out.stride(0), base.stride(0), delta.stride(0),
        **arguments.constants, BLOCK_N=TILE_ROWS, BLOCK_K=TILE_COLUMNS, enable_fp_fusion=True,
    )  # fmt: skip
    return out
