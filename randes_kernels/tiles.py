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

    One row tile covers a decode batch of up to 64 rows, so that each weight byte is read once; above, row tiles
    of 128. These are defaults from the compiled code (no spills, wide loads), not from measurements on a GPU.
    """
    rows = next((size for size in (16, 32, 64) if m <= size), 128)
    if dtype.itemsize > 2:  # fp32 multiplies without matrix instructions: keep the tile in registers
        return Tile(min(rows, 32), 32, 32, warps=4, stages=2)
    if rows <= 32:
        return Tile(rows, 64, 128, warps=4, stages=3)
    return Tile(rows, 128, 64, warps=8 if rows == 128 else 4, stages=3)
