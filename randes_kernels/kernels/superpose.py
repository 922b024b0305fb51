"""Adding a delta to a superposition, or taking it away, in one pass.

    A[:, π(k)] ±= r · rint((W[:, k] − W0[:, k]) · rate) · c_k          rate = 1 / (gain · step)  (design, section 5)

    W, W0 (N, K) fp32, fp16 or bf16   A (N, K) int32, in place

Every operation is exact or correctly rounded, and fusing a multiply with a subtract is off, so the integers are
the same on every device: what a GPU added a CPU can take away. Neither δ nor its signs touch global memory.
"""

import triton
import triton.language as tl
from torch import Tensor

from randes_kernels.format import Transform, signed_words
from randes_kernels.kernels.transform import transform_arguments, transformed_tile
from randes_kernels.primitives import flip

TILE_ROWS, TILE_COLUMNS = 32, 128


@triton.jit
def round_half_even(value):
    """fp32 to int32, ties to even, exact for |value| < 2**31: Triton has no portable instruction for it."""
    floor = tl.floor(value)
    rest = value - floor  # exact
    whole = floor.to(tl.int32)
    up = (rest > 0.5) | ((rest == 0.5) & ((whole & 1) == 1))
    return whole + up.to(tl.int32)


@triton.jit(do_not_specialize=["key_lo", "key_hi", "tensor_lo", "tensor_hi", "segment", "origin_row", "origin_column"])
def superpose_kernel(
    accumulator_ptr, finetuned_ptr, base_ptr, rate, key_lo, key_hi, tensor_lo, tensor_hi,
    N, K, granule, width, bits, segment, origin_row, origin_column,
    stride_an, stride_fn, stride_bn, SUBTRACT: tl.constexpr,
    FLIP_ROWS: tl.constexpr, FLIP_COLUMNS: tl.constexpr, PERMUTED: tl.constexpr, SEGMENTS: tl.constexpr,
    ROW_ORIGIN: tl.constexpr, COLUMN_ORIGIN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    rows, columns, inside, sign, turned_columns = transformed_tile(
        N, K, key_lo, key_hi, tensor_lo, tensor_hi, granule, width, bits, segment, origin_row, origin_column,
        FLIP_ROWS, FLIP_COLUMNS, PERMUTED, SEGMENTS, ROW_ORIGIN, COLUMN_ORIGIN, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    finetuned = tl.load(finetuned_ptr + rows * stride_fn + columns, mask=inside, other=0.0).to(tl.float32)
    base = tl.load(base_ptr + rows * stride_bn + columns, mask=inside, other=0.0).to(tl.float32)
    steps = flip(round_half_even((finetuned - base) * rate), sign)

    cells = accumulator_ptr + rows * stride_an + turned_columns
    held = tl.load(cells, mask=inside, other=0)
    tl.store(cells, held - steps if SUBTRACT else held + steps, mask=inside)


def superpose_(
    accumulator: Tensor, finetuned: Tensor, base: Tensor, rate: float, key: int, tensor: int,
    transform: Transform, subtract: bool,
) -> None:  # fmt: skip
    """Launch the kernel over all of ``accumulator``, in place."""
    n, k = base.shape
    arguments = transform_arguments(transform, k)
    superpose_kernel[(triton.cdiv(k, TILE_COLUMNS), triton.cdiv(n, TILE_ROWS))](
        accumulator, finetuned, base, rate, *signed_words(key), *signed_words(tensor),
        n, k, *arguments.permutation, *arguments.origin,
        accumulator.stride(0), finetuned.stride(0), base.stride(0), SUBTRACT=subtract,
        **arguments.constants, BLOCK_N=TILE_ROWS, BLOCK_K=TILE_COLUMNS, enable_fp_fusion=False,
    )  # fmt: skip
