"""α for each matrix of each model, fitted on a loss: a few numbers that balance a delta against its neighbours' noise.

A superposed delta comes back with noise. Scaling it down loses some of the delta and as much of the noise; where the
network hears the noise more than the delta that is a gain. Which matrices those are only a loss can tell.
(Design, section 2.)
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from randes.errors import UnknownModelError
from randes.superposition.members import check_scales
from randes.superposition.retrieve import matrices
from randes.superposition.state import State

Loss = Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True)
class Tuned:
    """What fitting did for one model: its mean loss on held-out batches before and after, and whether it was kept."""

    before: float
    after: float

    @property
    def kept(self) -> bool:
        """Only what helps on batches that it was not fitted on is kept."""
        return self.after < self.before


def tune(
    superposition: State, module: nn.Module, batches: Mapping[str, Sequence[Any]], loss: Loss,
    *, steps: int, rate: float, held_out: float, step: Callable[[], None],
) -> dict[str, Tuned]:  # fmt: skip
    """See ``Superposition.tune``."""
    if not 0 < held_out < 1:
        raise ValueError(f"held_out must lie between 0 and 1, got {held_out}")
    if not 0 < rate < math.inf:
        raise ValueError(f"rate must be a finite number above 0, got {rate}")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    for name, own in batches.items():
        if name not in superposition.names:
            known = ", ".join(superposition.names) or "no models"
            raise UnknownModelError(f"batches must be of models that are there, {known}; got {name!r}")
        if len(own) < 2:
            raise ValueError(f"batches must hold at least 2 a model, one to check with; got {len(own)} of {name}")
    found, alphas = {}, {}
    for name, own in batches.items():
        checked = max(1, round(held_out * len(own)))
        problem = _Problem(superposition, name, module, loss)
        before = problem.mean_loss(own[-checked:])
        problem.fit(own[:-checked], steps, rate, step)
        found[name] = Tuned(before, problem.mean_loss(own[-checked:]))
        if found[name].kept:
            alphas[name] = problem.alphas
    for name, own_alphas in alphas.items():
        member = replace(superposition.members[name], alphas=own_alphas)
        check_scales(name, member)
        superposition.members[name] = member
    return found


class _Problem:
    """One model's loss as a function of its α."""

    def __init__(self, superposition: State, name: str, module: nn.Module, loss: Loss) -> None:
        member = superposition.members[name]
        device = next(module.parameters()).device
        retrieved = matrices(superposition, name)
        self.layout = superposition.layout
        self.fixed = {tensor: retrieved[tensor].to(device) for tensor in retrieved if tensor not in member.gains}
        self.base = {tensor: superposition.base[tensor].to(device) for tensor in member.gains}
        self.deltas = {tensor: retrieved.delta(tensor).to(device) for tensor in member.gains}
        start = [member.alpha_of(tensor) for tensor in self.deltas]
        self.alpha = torch.tensor(start, dtype=torch.float32, device=device, requires_grad=True)
        self.module = _WithLoss(module, loss)

    def loss(self, batch: Any) -> Tensor:
        tensors = dict(self.fixed)
        for alpha, (tensor, delta) in zip(self.alpha, self.deltas.items(), strict=True):
            base = self.base[tensor]
            tensors[tensor] = (base.float() + alpha * delta).to(base.dtype)
        named = {f"module.{tensor}": value for tensor, value in self.layout.join(tensors).items()}
        value = functional_call(self.module, named, (batch,))
        assert isinstance(value, Tensor)
        return value

    @torch.no_grad()
    def mean_loss(self, batches: Sequence[Any]) -> float:
        return sum(float(self.loss(batch)) for batch in batches) / len(batches)

    def fit(self, batches: Sequence[Any], steps: int, rate: float, step: Callable[[], None]) -> None:
        optimizer = torch.optim.Adam([self.alpha], lr=rate)
        with torch.enable_grad():
            for number in range(steps):
                optimizer.zero_grad()
                (grad,) = torch.autograd.grad(self.loss(batches[number % len(batches)]), self.alpha)
                self.alpha.grad = grad
                optimizer.step()
                step()

    @property
    def alphas(self) -> dict[str, float]:
        return dict(zip(self.deltas, self.alpha.tolist(), strict=True))


class _WithLoss(nn.Module):
    """A module whose answer is the loss, so that its tensors can be replaced for one call of both."""

    def __init__(self, module: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.module, self._loss = module, loss

    def forward(self, batch: Any) -> Tensor:
        return self._loss(self.module, batch)
