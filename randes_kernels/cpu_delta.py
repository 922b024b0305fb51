"""Products with D on a CPU, as it is or packed: by torch's own products where they are faster than unpacking slices."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from randes_kernels import native
from randes_kernels.format import SIGNS_PER_BLOCK as SPAN
from randes_kernels.packing import Packed, unpack

SLICE_BYTES = 4 << 20
"""Of rebuilt weight: stays in the cache while the rows are multiplied with it (bench/speed/crossover.py)."""
FEW_ROWS = {8: 16, 4: 32, 2: 32, 1: 32, 0.5: 32}
"""Up to how many rows torch's products with packed weights beat unpacking slices, in bf16 at 4096×4096; in fp32 and
fp16 they are slower at every number of rows."""
NATIVE_ROWS = 64
"""Up to how many rows ``native.product`` beats unpacking slices for torch's."""
_vendor_layouts: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def product(turned: Tensor, held: Tensor | Packed, slot: int) -> Tensor:
    """``turned`` (..., K) times D (N, K) transposed, in its dtype or in fp32; of fp16 always in fp32."""
    if isinstance(held, Packed):
        rows = turned.numel() // held.columns
        if turned.dtype == torch.bfloat16 and rows <= FEW_ROWS[held.bits] and _fits_vendor(held):
            return _vendor_product(turned, held, slot)
        packed = packed_in_slot(held, slot)
        if rows <= NATIVE_ROWS and (y := native.product(turned.reshape(-1, held.columns), packed)) is not None:
            return y.view(*turned.shape[:-1], -1)
        return _unpacked_product(turned, packed)
    delta = held[slot]
    if turned.dtype != torch.float16:
        return F.linear(turned, delta)
    # D has unit gain: its product may pass fp16's range though the gain brings it back. Powers of two are exact.
    exponent = torch.frexp(turned.abs().amax(-1, keepdim=True).float()).exponent
    small = torch.ldexp(turned.float(), -exponent).half()
    return torch.ldexp(F.linear(small, delta).float(), exponent)


def in_slot(held: Tensor | Packed, slot: int) -> Tensor | Packed:
    """One slot of D."""
    return held[slot] if isinstance(held, Tensor) else packed_in_slot(held, slot)


def packed_in_slot(held: Packed, slot: int) -> Packed:
    return held._replace(words=held.words[slot], steps=held.steps[slot])


def rows_of(delta: Tensor | Packed, part: slice, dtype: torch.dtype) -> Tensor:
    """Some rows of D (N, K), unpacked."""
    return delta[part] if isinstance(delta, Tensor) else unpack(delta.rows(part), dtype)


def _unpacked_product(turned: Tensor, delta: Packed) -> Tensor:
    """The product with a packed D (N, W), of which a slice at a time is unpacked in cache; of fp16 in fp32."""
    dtype = torch.promote_types(turned.dtype, torch.float32) if turned.dtype == torch.float16 else turned.dtype
    rows, n = turned.reshape(-1, turned.shape[-1]).to(dtype), delta.words.shape[0]
    y = rows.new_empty((len(rows), n))
    height = max(32, SLICE_BYTES // (delta.columns * dtype.itemsize))
    for start in range(0, n, height):
        part = slice(start, min(start + height, n))
        torch.mm(rows, unpack(delta.rows(part), dtype).mT, out=y[:, part])
    return y.view(*turned.shape[:-1], n)


def _fits_vendor(held: Packed) -> bool:
    """Whether torch's products with packed weights take a D of this shape; with others they end the process."""
    return held.words.shape[1] % 16 == 0 and held.columns % SPAN == 0 and held.group in (0, 64, SPAN, 256)


def _vendor_product(turned: Tensor, held: Packed, slot: int) -> Tensor:
    rows = turned.reshape(-1, turned.shape[-1])
    if held.bits == 8:
        y: Tensor = torch.ops.aten._weight_int8pack_mm(rows, held.words[slot], held.steps[slot, 0].to(rows.dtype))
    else:
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, *_vendor_layout(held, slot, rows.dtype))
    return y.view(*turned.shape[:-1], -1)


def _vendor_layout(held: Packed, slot: int, dtype: torch.dtype) -> tuple[Tensor, int, Tensor]:
    """One slot in torch's own layout of 4 bits, which fewer take too: kept for as long as the packed tensor lives."""
    if held.words not in _vendor_layouts:
        _vendor_layouts[held.words] = {}
    kept: dict[int, tuple[Tensor, int, Tensor]] = _vendor_layouts[held.words]
    if slot not in kept:
        # Theirs is (code − 8) · step + zero. With odd levels and none at zero, that is twice our step, and one step to
        # the next of them.
        odd = held.bits >= 1
        levels = unpack(packed_in_slot(held, slot)._replace(steps=torch.ones_like(held.steps[slot])))
        codes = ((levels - 1) / 2 if odd else levels).to(torch.int32) + 8
        group = held.group or SPAN
        steps = held.steps[slot].float().expand(held.columns // group, -1)
        ranges = torch.stack((2 * steps, steps) if odd else (steps, torch.zeros_like(steps)), -1).to(dtype)
        kept[slot] = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1), group, ranges
    return kept[slot]
