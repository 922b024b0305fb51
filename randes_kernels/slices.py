"""``superpose_`` and ``retrieve``, some rows of a matrix at a time: the same bits as ``reference``.

On a CPU, and on a GPU where a matrix mixes columns, which takes no kernel of its own.

    superpose_rows_   A[i] ± rint( (W[i] − W0[i]) · (rate · c) · r_i ) · P     A int16 or int32, i from ``first``
    retrieve_rows     W0[i] + (D[i] Pᵀ) · (scale · c) · r_i
    with a matrix R   A[i] ± rint( rint( (W[i] − W0[i]) · rate · r_i ) R )    W0[i] + (D[i] R⁻¹) · scale · r_i

Signs go onto the float, which rounds a half to the even number on both sides of zero, so the integers are those of
rounding first. A slice of rows stays in the cache through all of its steps, in scratch that is allocated once: most of
the time of whole intermediates goes into page faults.
"""

from threading import local
from typing import NamedTuple

import torch
from torch import Tensor

from randes_kernels.format import Matrix, Stream, Transform, column_permutation, signs
from randes_kernels.mixing import Mixer

SLICE_ELEMENTS = 1 << 18
"""Of a slice: its copies, 2 MiB in fp32, fit a third-level cache if not a second, and the overhead of its operators is
a tenth. With a quarter as many a matrix takes half as long again."""
_kept = local()
_SHORT = torch.iinfo(torch.int16)


class Turn(NamedTuple):
    """How one model turns one tensor: its signs as fp32, (N, 1) and (K,), and where columns go and come from; or what
    mixes them."""

    rows: Tensor | None
    columns: Tensor | None
    target: Tensor | None
    source: Tensor | None
    mixer: Mixer | None = None


def turn(
    key: int, tensor: int, shape: torch.Size, transform: Transform, device: torch.device | str = "cpu"
) -> Turn:  # fmt: skip
    """What ``key`` and ``tensor`` make of a matrix (N, K)."""
    (n, k), first_row, first_column = shape, transform.first_row, transform.first_column
    if transform.matrix != Matrix.SIGNS:
        rows = None
        if transform.row_signs:
            rows = signs(key, tensor, Stream.ROW_SIGNS, n, first_row).float()[:, None].to(device)
        return Turn(rows, None, None, None, Mixer(key, tensor, k, transform.matrix, device, first_column))
    moves = transform.granule > 0
    return Turn(
        signs(key, tensor, Stream.ROW_SIGNS, n, first_row).float()[:, None] if transform.row_signs else None,
        signs(key, tensor, Stream.COLUMN_SIGNS, k, first_column).float() if transform.column_signs else None,
        column_permutation(key, tensor, k, transform) if moves else None,
        column_permutation(key, tensor, k, transform, inverse=True) if moves else None,
    )


def spans(rows: int, columns: int, elements: int) -> list[tuple[int, int]]:
    """Equal runs of rows, about ``elements`` each, and none of a single row where there are more."""
    height = max(2, elements // max(columns, 1))
    count = max(1, rows // height)
    return [(rows * i // count, rows * (i + 1) // count) for i in range(count)]


def squares(value: Tensor, other: Tensor) -> list[float]:
    """Sums over each row of the squares of ``value − other``, (N, K) each, in fp64.

    One sum a row, whatever the number of rows at a time and of threads: added without rounding they are one number.
    """
    sums = torch.empty(len(value), dtype=torch.float64, device=value.device)
    first, second = _scratch(value, torch.float64)
    for start, end in spans(len(value), value.shape[1], SLICE_ELEMENTS):
        difference = _difference(value[start:end], other[start:end], first, second)
        torch.sum(difference.mul_(difference), 1, out=sums[start:end])
    return sums.tolist()


def superpose_rows_(
    accumulator: Tensor, finetuned: Tensor, base: Tensor, rate: float, turn: Turn, *, first: int = 0,
    subtract: bool = False,
) -> int:  # fmt: skip
    """Add rows of a turned delta, or take them away, in place, as far as int16 holds the sums.

    accumulator: (n, K) int16 or int32. finetuned, base: (n, K), fp32, fp16 or bf16, rows from ``first`` of the matrix.
    Returns how many rows were done: all of them, or those before a slice that int16 does not hold, which is unchanged.
    """
    factor = -rate if subtract else rate
    short = accumulator.dtype == torch.int16
    columns = None if turn.columns is None else turn.columns * factor
    one, other = _scratch(accumulator, torch.float32)
    for start, end in spans(len(accumulator), accumulator.shape[1], SLICE_ELEMENTS):
        steps, spare = _difference(finetuned[start:end], base[start:end], one, other), other[: end - start]
        steps.mul_(factor if columns is None else columns)
        if turn.mixer is not None:  # after which what lay beyond int16 may lie within
            steps = turn.mixer.turn(steps.round_().double())
        steps.round_()
        if turn.source is not None:
            steps, spare = torch.index_select(steps, 1, turn.source, out=spare), steps
        held, flips = accumulator[start:end], None if turn.rows is None else turn.rows[first + start : first + end]
        if not short:
            held.add_((steps if flips is None else steps.mul_(flips)).to(torch.int32))
            continue
        # Exact below 2**22, and whatever is not lies far outside of int16.
        sums = spare.copy_(held)
        sums = sums.add_(steps) if flips is None else sums.addcmul_(steps, flips)
        low, high = torch.aminmax(sums)
        if low.item() < _SHORT.min or high.item() > _SHORT.max:
            return start
        held.copy_(sums)
    return accumulator.shape[0]


def retrieve_rows(base: Tensor, delta: Tensor, scale: float, turn: Turn, *, first: int = 0) -> Tensor:
    """``W0 + scale · (D turned back)`` for the rows from ``first``: (n, K) of ``base``'s dtype.

    base: (n, K), fp32, fp16, bf16 or fp64. delta: (n, K), integers or floats.
    """
    exact = torch.promote_types(base.dtype, torch.float32)
    retrieved = torch.empty_like(base, memory_format=torch.contiguous_format)
    columns = None if turn.columns is None else turn.columns.to(exact) * scale
    one, other = _scratch(base, exact)
    for start, end in spans(len(base), base.shape[1], SLICE_ELEMENTS):
        turned_back, spare = one[: end - start].copy_(delta[start:end]), other[: end - start]
        if turn.mixer is not None:
            turned_back = turn.mixer.back(turned_back)
        if turn.target is not None:
            turned_back, spare = torch.index_select(turned_back, 1, turn.target, out=spare), turned_back
        turned_back.mul_(scale if columns is None else columns)
        if turn.rows is not None:
            turned_back.mul_(turn.rows[first + start : first + end])
        retrieved[start:end] = turned_back.add_(spare.copy_(base[start:end]))
    return retrieved


def _scratch(matrix: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Room for two of the largest slices of (N, K): made for each, its pages would be given back and faulted in again.

    On a CPU a thread uses its room again for the next matrix; on a GPU, streams may not share it.
    """
    rows, columns = matrix.shape
    height = max(end - start for start, end in spans(rows, columns, SLICE_ELEMENTS))
    needed = 2 * height * columns * dtype.itemsize
    room: Tensor | None = getattr(_kept, "room", None) if matrix.device.type == "cpu" else None
    if room is None or room.numel() < needed:
        room = torch.empty(needed, dtype=torch.uint8, device=matrix.device)
    if matrix.device.type == "cpu":
        _kept.room = room
    one, other = room[:needed].view(dtype).view(2, height, columns)
    return one, other


def _difference(value: Tensor, other: Tensor, result: Tensor, spare: Tensor) -> Tensor:
    """``value − other`` in the dtype of the scratch that it is made in."""
    rows = len(value)
    return result[:rows].copy_(value).sub_(spare[:rows].copy_(other))


def superpose_(
    accumulator: Tensor, finetuned: Tensor, base: Tensor, rate: float, key: int, tensor: int,
    transform: Transform, subtract: bool,
) -> None:  # fmt: skip
    """``reference.superpose_`` of whole matrices: what the operator runs."""
    own = turn(key, tensor, base.shape, transform, base.device)
    superpose_rows_(accumulator, finetuned, base, rate, own, subtract=subtract)


def retrieve(base: Tensor, delta: Tensor, scale: float, key: int, tensor: int, transform: Transform) -> Tensor:
    """``reference.retrieve`` of whole matrices: what the operator runs."""
    return retrieve_rows(base, delta, scale, turn(key, tensor, base.shape, transform, base.device))
