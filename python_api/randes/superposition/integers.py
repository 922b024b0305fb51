"""Deltas as integers: what is rounded, to what, once. (Design, section 5.)

Float sums do not survive add-then-remove; integer sums do, in any order.
"""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from randes.errors import CheckpointError

STEP = 2.0**-9
"""What one unit of a stored integer is worth, in units of a delta's gain. Rounding to it adds an error of
STEP / √12 = 0.06 % of a delta's size for each model, where interference is √(J−1) times that size."""
AVERAGE_STEP = 2.0**-32
"""The same for the sums behind ``others="average"``, in units of the tensors themselves."""


SHARED_BITS = 12
"""How far below the size of a base's tensor its models' shared gain lies: a step is 2⁻²¹ of that size."""


def shared_gain(sums: Iterable[float], count: int) -> float:
    """The gain that all models have of a tensor, from the base's alone: a power of two, 2⁻¹² to 2⁻¹¹ times its size.

    sums: the squares of its ``count`` entries, summed row by row. Of a base that is zero it is 2⁻¹². A function of
    nothing that changes when models come and go, so it has to be small enough for any of them: what a fine-tune moved
    weights by is rounded to at most 3e-7 of the weights' size, and integers are wide where it is more than their 500th.
    """
    mean = math.fsum(sums) / count
    if not mean:
        return 2.0**-SHARED_BITS
    return math.ldexp(1.0, max(math.frexp(math.sqrt(mean))[1] - SHARED_BITS, -100))


def gain_of(
    tensor: str, sums: Iterable[float], count: int, group_size: int, peak: Callable[[], float], *,
    shared: float | None = None, growth: float = 1.0,
) -> float:  # fmt: skip
    """Root mean square of a delta, computed in fp64 and kept as fp32; or ``shared``, where all models have that one.

    tensor: its name. sums: the squares of its ``count`` entries, summed row by row; added without rounding, they give
    the same gain whatever the number of threads. peak: finds its largest magnitude, where that could be too large.
    growth: how many times larger than a delta its transform may make a number; ``peak`` counts it in.
    Raises ``CheckpointError`` for a delta that is not finite, or that fp32 or ``group_size`` sums in int32 cannot hold.
    """
    total = math.fsum(sums)
    if not math.isfinite(total):
        raise CheckpointError(f"{tensor} must be finite, got NaN or infinity")
    if total == 0:
        return 0.0
    gain = float32(math.sqrt(total / count)) if shared is None else shared
    # No entry is larger than the root of the sum, which is hardly ever too large itself.
    if not _fits(gain, growth * math.sqrt(total), group_size):
        largest = peak()
        if not (0 < gain < math.inf and math.isfinite(float32(largest)) and math.isfinite(rate(gain))):
            raise CheckpointError(f"{tensor} must have a delta within the range of fp32, got at most {largest:.3g}")
        if not _fits(gain, largest, group_size):
            of = "its own size" if shared is None else "the gain that models share"
            raise CheckpointError(f"{tensor} has a delta {largest / gain:.3g} times {of}: too far for int32")
    return gain


def _fits(gain: float, peak: float, group_size: int) -> bool:
    in_range = 0 < gain < math.inf and math.isfinite(float32(peak)) and math.isfinite(rate(gain))
    return in_range and peak / gain / STEP * (group_size + 1) < 2**31


def rate(gain: float) -> float:
    """Steps per unit of weight, an fp32 value."""
    return float32(1 / (gain * STEP)) if gain else math.inf


def narrow(wide: Tensor) -> Tensor:
    """int16 where the values fit, int32 where they do not: a function of the values alone."""
    if wide.dtype == torch.int16:
        return wide
    limits = torch.iinfo(torch.int16)
    low, high = torch.aminmax(wide)
    return wide.to(torch.int16) if limits.min <= low and high <= limits.max else wide


def check_average(name: str, part: Tensor) -> None:
    """Raise ``CheckpointError`` where a tensor is too large for the sums behind the averages."""
    if part.is_floating_point() and part.numel() and (peak := float(part.double().abs().max())) >= 2**20:
        raise CheckpointError(f"{name} must be below 2**20 to be averaged, got {peak:.3g}")


def averaged(held: Tensor | None, value: Tensor, *, subtract: bool) -> Tensor:
    """The sum behind an average with one model's tensor added or taken away: int64 of ``AVERAGE_STEP``."""
    steps = value.to(torch.float64, copy=True).div_(AVERAGE_STEP).round_().to(torch.int64)
    if subtract:
        steps.neg_()
    return steps if held is None else steps.add_(held)


def float32(value: float) -> float:
    """``value`` as fp32 holds it; infinity where that is beyond its range."""
    return float(torch.tensor(value, dtype=torch.float64, device="cpu").to(torch.float32))
