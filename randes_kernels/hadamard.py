"""A rotation's block-diagonal Hadamard matrix, as products of small ones."""

from functools import lru_cache

import torch
from torch import Tensor

BLOCKS = (1024, 256, 64, 16, 4)
"""Sides of the Hadamard matrices: (2^k)²."""


def hadamard(rows: Tensor) -> Tensor:
    """``rows`` (..., K), floats, times the block-diagonal H: symmetric, and its own inverse."""
    k, start, parts = rows.shape[-1], 0, []
    for size in BLOCKS:
        if count := (k - start) // size:
            side = round(size**0.5)
            h = _sylvester(side, rows.dtype, rows.device)
            blocks = rows[..., start : start + count * size].reshape(-1, side, side)
            # Scaled before it is summed, so that half precision's range holds what comes between.
            parts.append(((h / side) @ (blocks @ h)).view(*rows.shape[:-1], count * size))
            start += count * size
    return torch.cat([*parts, rows[..., start:]], -1)


@lru_cache
def _sylvester(side: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Kept where it is multiplied with: a copy for each rotation would have the host wait for the device."""
    with torch.inference_mode(False):  # kept, so it must serve training too
        h = torch.ones(1, 1, dtype=torch.float64, device="cpu")
        while len(h) < side:
            h = torch.cat((torch.cat((h, h), 1), torch.cat((h, -h), 1)))
        return h.to(device, dtype)
