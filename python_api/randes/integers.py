"""Deltas as integers: what is rounded, to what, once. (Design, section 5.)

Float sums do not survive add-then-remove; integer sums do, in any order.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from randes.checkpoint import Tensors
from randes.errors import CheckpointError

STEP = 2.0**-9
"""What one unit of a stored integer is worth, in units of a delta's gain. Rounding to it adds an error of
STEP / √12 = 0.06 % of a delta's size for each model, where interference is √(J−1) times that size."""
AVERAGE_STEP = 2.0**-32
"""The same for the sums behind ``others="average"``, in units of the tensors themselves."""


def gain_and_peak(tensor: str, finetuned: Tensor, base: Tensor) -> tuple[float, float]:
    """Root mean square of a delta, computed in fp64 and kept as fp32; and its largest magnitude.

    Raises ``CheckpointError`` for a delta that fp32 cannot hold. ``tensor`` is its name.
    """
    delta = finetuned.double() - base.double()
    # Sums of single rows, added without rounding: the same gain whatever the number of threads.
    mean_square = math.fsum((delta * delta).sum(1).tolist()) / delta.numel()
    gain, peak = float32(math.sqrt(mean_square)), float(delta.abs().max())
    if peak > 0 and not (0 < gain < math.inf and math.isfinite(float32(peak)) and math.isfinite(rate(gain))):
        raise CheckpointError(f"{tensor} must have a delta within the range of fp32, got at most {peak:.3g}")
    return gain, peak


def rate(gain: float) -> float:
    """Steps per unit of weight, an fp32 value."""
    return float32(1 / (gain * STEP)) if gain else math.inf


def narrow(wide: Tensor) -> Tensor:
    """int16 where the values fit, int32 where they do not: a function of the values alone."""
    limits = torch.iinfo(torch.int16)
    low, high = torch.aminmax(wide)
    return wide.to(torch.int16) if limits.min <= low and high <= limits.max else wide


def averaged(sums: Tensors, tensors: Tensors, names: Iterable[str], *, subtract: bool) -> Tensors:
    """The sums behind the averages with one model's ``tensors`` added or taken away: int64 of ``AVERAGE_STEP``."""
    changed = {}
    for name in names:
        if not tensors[name].is_floating_point():
            continue
        value = tensors[name].double()
        if value.numel() and value.abs().max() >= 2**20:
            raise CheckpointError(f"{name} must be below 2**20 to be averaged, got {value.abs().max():.3g}")
        steps = torch.round(value / AVERAGE_STEP).to(torch.int64)
        held = sums.get(name, torch.zeros_like(steps))
        changed[name] = held - steps if subtract else held + steps
    return changed


def float32(value: float) -> float:
    """``value`` as fp32 holds it; infinity where that is beyond its range."""
    return float(torch.tensor(value, dtype=torch.float64, device="cpu").to(torch.float32))
