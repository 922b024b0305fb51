"""The superposed deltas in few bits: what servers hold in place of D in 16.

    8 bits       D ≈ w · s                             w int8, one step s a row
    4, 2 or 1    D ≈ (2 v − (2^bits − 1)) · s          v of so many bits, one step s a row or a group of its columns
    ½            D ≈ ± s at one column of eight        the loudest, 3 bits for which it is and one for its sign; else 0

D (..., N, K)   words (..., N, W)   steps (..., G, N) fp16

4 bits and fewer have no level at zero: D is near a normal distribution, for which levels to both sides of it lose less.
Steps are unbiased: which levels are taken is the least square's choice, but what comes back, D̂, keeps the inner product
⟨D, D̂⟩ = ‖D‖². With the least square's own step a delta would return shrunk, to 0.88 of itself at 2 bits and 0.64 at 1,
and accuracy falls much faster for a delta of another size than for as much noise. (Design, section 2.)

Columns are packed in spans of 128, as many as one Philox block has signs, and padded with whole spans. Byte i of a span
holds columns i and i + 64 at 4 bits, every 32nd from i at 2, every 16th at 1, the first in its lowest bits: a tile of
bytes unpacks into tiles of neighbouring columns, by one shift for all of them. Steps lie along N, as a tile reads them.
At half a bit the eight are every 16th column from i, below 16. Their four bits are the low ones of byte i, or from
i = 8 on the high ones of byte i − 8: which of the eight it is, and above that the sign, set for −1. A sign for the
loudest of eight comes back with less noise than one for every second column: 1.5 times what was packed, and not 2.1.
In a file the last span is as wide as its columns: of t that are left, byte i holds every ⌈t · bits / 8⌉-th from i.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from randes_kernels.format import SIGNS_PER_BLOCK as SPAN

HALF = 0.5
BITS = (8, 4, 2, 1, HALF)
OF_SIZE = {4: 0.1676, 2: 0.4978, 1: 0.7979}
"""The step of the best evenly spaced levels for a normal distribution, in units of its size."""
OF_PEAK = 0.92
"""The same in units of a group's largest magnitude over the outermost level, for groups of 64."""
WHOLE_ROW = 1 << 30
"""Columns that share a step where a row has one: more than any row has, so that kernels are compiled once for all."""
OF_EIGHT = 8
LANES = SPAN // OF_EIGHT
"""Groups of eight columns in a span."""
PASSES = 2
CHUNK = 1 << 18
"""Elements that are packed at a time: they stay in a core's cache."""


class Packed(NamedTuple):
    """D in few bits. ``words``: (..., N, W) int8 at 8 bits, uint8 at fewer. ``steps``: (..., G, N) fp16.

    bits: an int, but for ``HALF``.
    group: columns that share a step, 0 where a whole row does. columns: K.
    Beside a D that is not packed, which the kernels take in the same form, bits is 16 and steps is not read.
    """

    words: Tensor
    steps: Tensor
    bits: float
    group: int
    columns: int

    @property
    def nbytes(self) -> int:
        """What both tensors take in a file, without their padding."""
        return packed_bytes(math.prod(self.words.shape[:-1]), self.columns, self.bits, self.group)

    def rows(self, part: slice) -> "Packed":
        """Some rows of the matrices."""
        return self._replace(words=self.words[..., part, :], steps=self.steps[..., part])


def operands(packed: Packed) -> tuple[Tensor, list[int]]:
    """``steps`` and ``packing`` as an operator takes them beside the words: [twice the bits, group]."""
    return packed.steps, [int(2 * packed.bits), packed.group]


def of_operands(delta: Tensor, steps: Tensor | None, packing: Sequence[int], columns: int) -> Packed:
    """What an operator was given: ``packing`` is empty where D is not packed and has no steps."""
    if steps is None:
        return Packed(delta, delta, 16, 0, columns)
    halves, group = packing
    return Packed(delta, steps, halves // 2 or HALF, group, columns)


def check(bits: float, group: int = 64) -> None:
    """Raise ``ValueError`` for what ``pack`` cannot do."""
    if bits not in BITS or (type(bits) is not int and bits != HALF):
        raise ValueError(f"bits must be {', '.join(map(str, BITS[:-1]))} or {HALF}, got {bits!r}")
    if not isinstance(group, int) or group < 0 or group % 64:
        raise ValueError(f"group must be a multiple of 64 columns, or 0 for a whole row, got {group!r}")
    if bits == HALF and group:
        raise ValueError(f"group must be 0 at {HALF} bits, where a whole row has one step, got {group!r}")


def group_for(bits: float) -> int:
    """Columns that share a step by default: 64, but of 2 bits and fewer a whole row, beside which a group's step would
    weigh a quarter of a bit and keep no more (design, section 2)."""
    return 0 if bits <= 2 else 64


def packed_bytes(rows: int, columns: int, bits: float, group: int | None = None, *, padded: bool = False) -> int:
    """What a matrix takes in a file, packed, or ``padded`` in memory."""
    group = 0 if bits == 8 else group_for(bits) if group is None else group
    if (padded and bits < 8) or bits == HALF:
        columns = -(-columns // SPAN) * SPAN
    return rows * (math.ceil(columns * bits / 8) + (-(-columns // group) if group else 1) * 2)


def columns_a_byte(bits: float) -> int:
    """Of packed words."""
    return int(8 // bits)


def pack(delta: Tensor, bits: float, group: int | None = None) -> Packed:
    """``delta`` (..., N, K) in ``bits`` (8, 4, 2, 1 or 0.5) an element.

    group: columns that share a step, a multiple of 64, or 0 for a whole row; by default ``group_for(bits)``. At 8 bits
    and at half a bit a row has one. At 4, 2 and 1 a group's levels are found by least squares over those that the step
    before chose, from two starts: within 1 % of the error of an exhaustive search on normal values. Below 8 bits the
    step then is the unbiased one. Raises ``ValueError``.
    """
    group = group_for(bits) if group is None else group
    check(bits, group)
    rows, columns = delta.flatten(0, -2), delta.shape[-1]
    one = {8: _rows_of_eight, HALF: _loudest}.get(bits, _groups)
    parts = [one(chunk.float(), bits, group) for chunk in torch.split(rows, max(1, CHUNK // max(1, columns)))]
    words, steps = (torch.cat(made) for made in zip(*parts, strict=True))
    if not torch.isfinite(steps).all():
        peak = float(delta.abs().max())
        raise ValueError(
            f"delta must lie within {max(1, 2 ** (bits - 1))} times the range of fp16's steps, got {peak:.3g}"
        )
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
    lead, width = words.shape[:-1], words.shape[-1] * columns_a_byte(bits)
    levels = words.new_empty((*lead, width), dtype=dtype) if out is None else out
    if isinstance(bits, float):
        by_plane = levels.view(*lead, -1, OF_EIGHT, LANES)
        codes = _codes(words)
        signs, places = 1 - 2 * (codes >> 3).view(torch.int8), codes & (OF_EIGHT - 1)
        for number in range(OF_EIGHT):
            by_plane[..., number, :].copy_((places == number).view(torch.int8).mul_(signs))
        levels.mul_(packed.steps.mT.to(dtype))
        return levels[..., : packed.columns]
    planes = 8 // bits
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


def without_padding(packed: Packed) -> tuple[Tensor, Tensor]:
    """Words and steps as a file holds them: of the last span no more columns than there are."""
    words, steps, bits, group, columns = packed
    if isinstance(bits, float) or bits == 8 or columns % SPAN == 0:
        return words, steps
    whole, left = columns // SPAN * SPAN * bits // 8, columns % SPAN
    numbers = F.pad(_apart(words[..., whole:], bits)[..., :left], (0, -left % (8 // bits)), value=1 << (bits - 1))
    groups = -(-columns // group) if group else 1
    return torch.cat((words[..., :whole], _together(numbers, bits)), -1), steps[..., :groups, :].contiguous()


def with_padding(words: Tensor, steps: Tensor, bits: float, group: int, columns: int) -> Packed:
    """What ``without_padding`` was made of; as it is what is padded already. Raises ``ValueError`` for other shapes."""
    group = 0 if bits == 8 else group
    padded = columns if bits == 8 else -(-columns // SPAN) * SPAN
    dense, full = (
        (packed_bytes(1, width, bits, 0) - 2, -(-width // group) if group else 1) for width in (columns, padded)
    )
    found = words.shape[-1], steps.shape[-2]
    if found not in (dense, full) or (*steps.shape[:-2], steps.shape[-1]) != words.shape[:-1]:
        raise ValueError(
            f"{columns} columns in {bits} bits must have {dense[0]} bytes and {dense[1]} steps a row, got {found[0]}"
            f" and {found[1]}, for {tuple(words.shape[:-1])} and {(*steps.shape[:-2], steps.shape[-1])} rows"
        )
    if found != full and isinstance(bits, int):
        whole, left = columns // SPAN * SPAN * bits // 8, columns % SPAN
        # What is padding is as near to zero as a number can be, as ``pack`` leaves it.
        numbers = F.pad(_apart(words[..., whole:], bits)[..., :left], (0, SPAN - left), value=1 << (bits - 1))
        words = torch.cat((words[..., :whole], _together(numbers, bits)), -1)
        steps = F.pad(steps, (0, 0, 0, full[1] - found[1]))
    return Packed(words, steps, bits, group, columns)


def cut(packed: Packed, rows: slice, columns: range) -> Packed:
    """A rectangle of the matrices, its numbers and steps those of the whole: a span's columns may come to lie in two.
    Raises ``ValueError`` where they cannot: inside of a group that shares a step, or at half a bit of a span."""
    words, steps, bits, group, _ = packed.rows(rows)
    unit, padded = SPAN if bits == HALF else group or 1, -(-len(columns) // SPAN) * SPAN
    if columns.start % unit:
        raise ValueError(
            f"D in {bits:g} bits can be cut at multiples of {unit} columns, got column {columns.start}:"
            + (" use 1 bit or more" if bits == HALF else " pack it with group=0, a step for whole rows")
        )
    if bits in (8, HALF):
        width = len(columns) if bits == 8 else padded
        words = words[..., int(columns.start * bits) // 8 :][..., : int(width * bits) // 8]
    else:
        lead, bits = words.shape[:-1], int(bits)
        numbers = _apart(words.view(*lead, -1, SPAN * bits // 8), bits).flatten(-2)[..., columns.start : columns.stop]
        numbers = F.pad(numbers, (0, padded - len(columns)), value=1 << (bits - 1))  # as ``with_padding`` does
        words = _together(numbers.view(*lead, -1, SPAN), bits).flatten(-2)
    if group:
        steps = steps[..., columns.start // group :, :][..., : -(-padded // group), :]
        steps = F.pad(steps, (0, 0, 0, -(-padded // group) - steps.shape[-2]))
    return Packed(words.contiguous(), steps.contiguous(), bits, group, len(columns))


def _apart(span: Tensor, bits: int) -> Tensor:
    """Of bytes (..., W), one span's, their numbers in the order of its columns, (..., W · 8 / bits)."""
    return torch.cat([(span >> first) & ((1 << bits) - 1) for first in range(0, 8, bits)], -1)


def _together(numbers: Tensor, bits: int) -> Tensor:
    """The bytes of a span's numbers."""
    first, *others = numbers.chunk(8 // bits, -1)
    return sum((plane << shift for plane, shift in zip(others, range(bits, 8, bits), strict=True)), first)


def _codes(words: Tensor) -> Tensor:
    """At half a bit: which of eight columns is loud and its sign, (..., spans, LANES)."""
    spans = words.view(*words.shape[:-1], -1, LANES // 2)
    return torch.cat((spans & 15, spans >> 4), -1)


def _loudest(rows: Tensor, *_: float) -> tuple[Tensor, Tensor]:
    """Words (R, W) and steps (R, 1) of rows (R, K) at half a bit."""
    eights = F.pad(rows, (0, -rows.shape[1] % SPAN)).view(len(rows), -1, OF_EIGHT, LANES)
    place = eights.abs().argmax(2, keepdim=True)
    loud = eights.gather(2, place)
    inner = loud.abs().sum((1, 2, 3))
    step = torch.where(inner > 0, rows.square().sum(1) / inner, 0.0).half()
    codes = (place + OF_EIGHT * (loud < 0)).to(torch.uint8)
    low, high = codes.flatten(1, 2).chunk(2, -1)
    return (low | high << 4).flatten(1), step[:, None]


def _rows_of_eight(rows: Tensor, *_: float) -> tuple[Tensor, Tensor]:
    steps = (rows.abs().amax(1, keepdim=True) / 127).half()
    inverse = torch.where(steps > 0, 1 / steps.float(), 0.0)
    return (rows * inverse).round().clamp(-127, 127).to(torch.int8), steps


def _groups(rows: Tensor, bits: float, group: int) -> tuple[Tensor, Tensor]:
    """Words (R, W) and steps (R, G) of rows (R, K)."""
    bits = int(bits)
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
    numbers = chosen.to(torch.uint8).flatten(1)[:, :width].view(len(rows), -1, SPAN)
    return _together(numbers, bits).flatten(1), step[..., 0]


def _numbers(groups: Tensor, step: Tensor, bits: int) -> Tensor:
    """The nearest levels' numbers, 0 to 2^bits − 1."""
    half = 1 << (bits - 1)
    inverse = torch.where(step > 0, 0.5 / step, 0.0)
    return torch.floor(groups * inverse).add_(half).clamp_(0, 2 * half - 1)
