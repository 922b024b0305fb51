"""The superposed deltas in few bits: what servers hold in place of D in 16.

    8 bits       D ≈ w · s                             w int8, one step s a row
    4, 2 or 1    D ≈ (2 v − (2^bits − 1)) · s          v of so many bits, one step s a row or a group of its columns

D (..., N, K)   words (..., N, W)   steps (..., G, N) fp16

4 bits and fewer have no level at zero: D is near a normal distribution, for which levels to both sides of it lose less.
Steps are unbiased: which levels are taken is the least square's choice, but what comes back, D̂, keeps the inner product
⟨D, D̂⟩ = ‖D‖². With the least square's own step a delta would return shrunk, to 0.88 of itself at 2 bits and 0.64 at 1,
and accuracy falls much faster for a delta of another size than for as much noise. (Design, section 2.)

Columns are packed in spans of 128, as many as one Philox block has signs, and padded with whole spans. Byte i of a span
holds columns i and i + 64 at 4 bits, every 32nd from i at 2, every 16th at 1, the first in its lowest bits: a tile of
bytes unpacks into tiles of neighbouring columns, by one shift for all of them. Steps lie along N, as a tile reads them.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from randes_kernels.format import SIGNS_PER_BLOCK as SPAN

BITS = (8, 4, 2, 1)
OF_SIZE = {4: 0.1676, 2: 0.4978, 1: 0.7979}
"""The step of the best evenly spaced levels for a normal distribution, in units of its size."""
OF_PEAK = 0.92
"""The same in units of a group's largest magnitude over the outermost level, for groups of 64."""
WHOLE_ROW = 1 << 30
"""Columns that share a step where a row has one: more than any row has, so that kernels are compiled once for all."""
PASSES = 2
CHUNK = 1 << 18
"""Elements that are packed at a time: they stay in a core's cache."""


class Packed(NamedTuple):
    """D in few bits. ``words``: (..., N, W) int8 at 8 bits, uint8 at fewer. ``steps``: (..., G, N) fp16.

    group: columns that share a step, 0 where a whole row does. columns: K.
    Beside a D that is not packed, which the kernels take in the same form, bits is 16 and steps is not read.
    """

    words: Tensor
    steps: Tensor
    bits: int
    group: int
    columns: int

    @property
    def nbytes(self) -> int:
        """What both tensors take."""
        return self.words.nbytes + self.steps.nbytes

    def rows(self, part: slice) -> "Packed":
        """Some rows of the matrices."""
        return self._replace(words=self.words[..., part, :], steps=self.steps[..., part])


def of_operands(delta: Tensor, steps: Tensor | None, packing: Sequence[int], columns: int) -> Packed:
    """What an operator was given: ``packing`` is [bits, group], and empty where D is not packed and has no steps."""
    if steps is None:
        return Packed(delta, delta, 16, 0, columns)
    bits, group = packing
    return Packed(delta, steps, bits, group, columns)


def check(bits: int, group: int = 64) -> None:
    """Raise ``ValueError`` for what ``pack`` cannot do."""
    if bits not in BITS:
        raise ValueError(f"bits must be {', '.join(map(str, BITS[:-1]))} or {BITS[-1]}, got {bits!r}")
    if not isinstance(group, int) or group < 0 or group % 64:
        raise ValueError(f"group must be a multiple of 64 columns, or 0 for a whole row, got {group!r}")


def group_for(bits: int) -> int:
    """Columns that share a step by default: 64, but of 1 bit a whole row, beside which a group's step would weigh a
    quarter of a bit and keep no more (design, section 2)."""
    return 0 if bits == 1 else 64


def packed_bytes(rows: int, columns: int, bits: int, group: int | None = None) -> int:
    """What a matrix takes, packed."""
    if bits == 8:
        return rows * (columns + 2)
    group = group_for(bits) if group is None else group
    width = -(-columns // SPAN) * SPAN
    return rows * (width * bits // 8 + (-(-width // group) if group else 1) * 2)


def pack(delta: Tensor, bits: int, group: int | None = None) -> Packed:
    """``delta`` (..., N, K) in ``bits`` (8, 4, 2 or 1) an element.

    group: columns that share a step, a multiple of 64, or 0 for a whole row; by default ``group_for(bits)``. At 8 bits
    a row has one, for its largest magnitude. A group's levels are found by least squares over those that the step
    before chose, from two starts: within 1 % of the error of an exhaustive search on normal values. Its step then is
    the unbiased one. Raises ``ValueError``.
    """
    group = group_for(bits) if group is None else group
    check(bits, group)
    rows, columns = delta.flatten(0, -2), delta.shape[-1]
    one = _rows_of_eight if bits == 8 else _groups
    parts = [one(chunk.float(), bits, group) for chunk in torch.split(rows, max(1, CHUNK // max(1, columns)))]
    words, steps = (torch.cat(made) for made in zip(*parts, strict=True))
    if not torch.isfinite(steps).all():
        peak = float(delta.abs().max())
        raise ValueError(f"delta must lie within {1 << (bits - 1)} times the range of fp16's steps, got {peak:.3g}")
    words = words.view(*delta.shape[:-1], -1)
    steps = steps.view(*delta.shape[:-1], -1).mT.contiguous()
    return Packed(words, steps, bits, 0 if bits == 8 else group, columns)


def unpack(packed: Packed, dtype: torch.dtype = torch.float32, out: Tensor | None = None) -> Tensor:
    """(..., N, K) of ``dtype``, with rows of stride 1 but, where K is padded, not contiguous.

    out: (..., N, padded K) to fill. Exact in fp32; half precision rounds the step and its product with a level.
    """
    words, bits = packed.words, packed.bits
    if bits == 8:
        levels = words.to(dtype) if out is None else out.copy_(words)
        return levels.mul_(packed.steps.mT.to(dtype))
    lead, planes = words.shape[:-1], 8 // bits
    width = words.shape[-1] * planes
    levels = words.new_empty((*lead, width), dtype=dtype) if out is None else out
    by_plane = levels.view(*lead, -1, planes, SPAN // planes)
    plane = torch.empty_like(words)
    for number in range(planes):
        torch.bitwise_right_shift(words, number * bits, out=plane)
        if number < planes - 1:  # of the last nothing is left above it
            plane.bitwise_and_((1 << bits) - 1)
        by_plane[..., number, :].copy_(plane.view(*lead, -1, SPAN // planes))
    steps, group = packed.steps.mT, packed.group or width
    # v − (2^bits − 1) / 2 and twice a step: exact, both.
    levels.sub_(((1 << bits) - 1) / 2)
    for first in range(0, width, group) if width % group else ():
        levels[..., first : first + group].mul_(2 * steps[..., first // group, None].to(dtype))
    if width % group == 0:
        levels.view(*lead, -1, group).mul_((2 * steps.float()).to(dtype)[..., None])
    return levels[..., : packed.columns]


def _rows_of_eight(rows: Tensor, *_: int) -> tuple[Tensor, Tensor]:
    steps = (rows.abs().amax(1, keepdim=True) / 127).half()
    inverse = torch.where(steps > 0, 1 / steps.float(), 0.0)
    return (rows * inverse).round().clamp(-127, 127).to(torch.int8), steps


def _groups(rows: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor]:
    """Words (R, W) and steps (R, G) of rows (R, K)."""
    top = (1 << bits) - 1
    columns = rows.shape[1]
    width = -(-columns // SPAN) * SPAN
    group = group or width
    padded = F.pad(rows, (0, -(-width // group) * group - columns))
    groups = padded.view(len(rows), -1, group)
    counted = F.pad(torch.ones(columns, device=rows.device), (0, padded.shape[1] - columns)).view(-1, group)
    size = (groups.square().sum(-1, keepdim=True) / counted.sum(-1, keepdim=True).clamp(min=1)).sqrt()
    peak = groups.abs().amax(-1, keepdim=True)
    step, least = torch.zeros_like(size), torch.full_like(size, torch.inf)
    for found in (OF_SIZE[bits] * size, OF_PEAK / top * peak):
        for _ in range(PASSES):
            levels = (2 * _numbers(groups, found, bits) - top) * counted
            found = (groups * levels).sum(-1, keepdim=True) / levels.square().sum(-1, keepdim=True).clamp(min=1)
        chosen = (2 * _numbers(groups, found, bits) - top) * found
        error = (chosen - groups).mul_(counted).square().sum(-1, keepdim=True)
        step, least = torch.where(error < least, found, step), torch.minimum(error, least)
    chosen = _numbers(groups, step, bits)
    inner = ((2 * chosen - top) * counted * groups).sum(-1, keepdim=True)
    step = torch.where(inner > 0, groups.square().sum(-1, keepdim=True) / inner, 0.0).half()
    numbers = chosen.to(torch.uint8).flatten(1)[:, :width]
    planes = 8 // bits
    by_plane = numbers.view(len(rows), -1, planes, SPAN // planes)
    words = sum((by_plane[:, :, number] << (number * bits) for number in range(1, planes)), by_plane[:, :, 0])
    return words.flatten(1), step[..., 0]


def _numbers(groups: Tensor, step: Tensor, bits: int) -> Tensor:
    """The nearest levels' numbers, 0 to 2^bits − 1."""
    half = 1 << (bits - 1)
    inverse = torch.where(step > 0, 0.5 / step, 0.0)
    return torch.floor(groups * inverse).add_(half).clamp_(0, 2 * half - 1)
