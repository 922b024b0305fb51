"""Which tile a launch uses: a pure function of shape and dtype, decided on the host, never tuned at run time."""

from typing import NamedTuple

import torch


class Tile(NamedTuple):
    """Rows, columns and depth of a program's tile, its warps, and the stages of its load pipeline."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


def linear_tile(m: int, n: int, k: int, dtype: torch.dtype) -> Tile:
    """The tile of the superposed linear for ``(m, k) x (n, k)``.

    One row tile covers a decode batch of up to 64 rows (in fp32: 16), so that each weight byte is read once. The
    sizes are large ones that compile without a register spilled on sm_80, sm_90 and gfx942
    (tests/test_compiled.py); they are not yet measured on a GPU.
    """
    if dtype.itemsize > 2:  # fp32 multiplies without matrix instructions and keeps its operands in registers
        return Tile(16, 64, 32, warps=4, stages=2)
    if m <= 16:
        return Tile(16, 64, 64, warps=4, stages=3)
    if m <= 32:
        return Tile(32, 32, 64, warps=4, stages=3)
    if m <= 64:
        return Tile(64, 64, 64, warps=8, stages=3)
    return Tile(128, 64, 32, warps=8, stages=3)
