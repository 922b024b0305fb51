"""Parameters that are found past their names are the base's for every model: such modules are refused by name."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import CLOSE, alone, linear, superposed
from torch import Tensor, nn

import randes


class Held(nn.Module):
    """Keeps a reference to a parameter, or to something near it."""

    def __init__(self, hold: Callable[[Any], None]) -> None:
        super().__init__()
        self.lin, self.norm = linear(32, 32), nn.LayerNorm(32)
        self.inner = nn.Identity()
        hold(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(self.norm(x))


def set_closure(module: Any) -> None:
    weight = module.lin.weight
    module.inner.project = lambda x: x @ weight.T


HELD: dict[str, tuple[str, Callable[[Any], None]]] = {
    "a list": ("held holds lin.weight", lambda m: setattr(m, "held", [m.lin.weight])),
    "a norm's": ("inner.held holds norm.bias", lambda m: setattr(m.inner, "held", (1, [m.norm.bias]))),
    "nested": ("held holds lin.weight", lambda m: setattr(m, "held", {"a": [({"b": m.lin.weight},)]})),
    "an alias": ("held holds lin.weight", lambda m: setattr(m, "held", m.lin.weight.detach())),
    "a view": ("held holds lin.weight", lambda m: setattr(m, "held", m.lin.weight.detach().T[3])),
    "a partial": ("held holds lin.bias", lambda m: setattr(m, "held", partial(F.linear, bias=m.lin.bias))),
    "a closure": ("inner.project holds lin.weight", set_closure),
    "a buffer": (
        "alias holds lin.weight", lambda m: m.register_buffer("alias", m.lin.weight.detach()[:2], persistent=False),
    ),
}  # fmt: skip


@pytest.mark.parametrize("capacity", [None, 3])
@pytest.mark.parametrize("held", HELD)
def test_references_beside_a_parameter_are_refused(held: str, capacity: int | None) -> None:
    said, hold = HELD[held]
    base = Held(hold)
    sup, _ = superposed(Held(lambda _: None), 1)
    with pytest.raises(ValueError, match=f"^{said}, and would give the base's values for every model"):
        randes.SuperposedModel(base, sup, capacity=capacity)
    assert type(base.lin) is nn.Linear
    assert "weight" in base.lin._parameters


def beside(module: Any) -> None:
    flat = torch.zeros(2, 32)
    module.norm.bias = nn.Parameter(flat[0])
    module.held = [flat[1], module.lin.weight.detach().clone(), 3, "x", {"self": module}]
    module.held.append(module.held)
    module.closed = lambda: flat[1].numel() if False else module.held


def test_tensors_of_their_own_are_not() -> None:
    sup, _ = superposed(Held(lambda m: setattr(m.norm, "bias", nn.Parameter(torch.zeros(32)))), 1)
    randes.SuperposedModel(Held(lambda m: setattr(m, "held", [m.lin.weight.detach().clone()])), sup)
    base = Held(beside)
    base.closed = None
    randes.SuperposedModel(base, sup)  # a part of the same memory, but another


class Goes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ff, self.last = nn.Sequential(linear(32, 32), linear(32, 32)), linear(32, 32)


class Loops(Goes):
    def forward(self, x: Tensor) -> Tensor:
        for p in self.ff.parameters():
            x = x @ p.T if p.dim() == 2 else x + p
        return self.last(x)


class Named(Goes):
    def forward(self, x: Tensor) -> Tensor:
        return self.last(x) * sum(p.norm() for _, p in self.ff.named_parameters())


class Through(Goes):
    def forward(self, x: Tensor) -> Tensor:
        return self.scaled(self.ff(x))

    def scaled(self, x: Tensor) -> Tensor:
        return x / self._size

    @property
    def _size(self) -> Tensor:
        return torch.nn.utils.parameters_to_vector(self.last.parameters()).norm()


class Next(Goes):
    def forward(self, x: Tensor) -> Tensor:
        weight = next(iter(self.last.parameters()))
        return self.ff(x.to(weight.dtype)) @ weight


class Within(Goes):
    def forward(self, x: Tensor) -> Tensor:
        for layer in self.ff:
            x = x + list(layer.parameters())[1]
        return x


@pytest.mark.parametrize(
    ("kind", "method", "whose"),
    [(Loops, "forward", "ff.0"), (Named, "forward", "ff.0"), (Through, "_size", "last"), (Next, "forward", "last"),
     (Within, "forward", "ff.0")],
)  # fmt: skip
def test_code_that_goes_through_parameters_is_refused(kind: type[nn.Module], method: str, whose: str) -> None:
    base = kind()
    sup, _ = superposed(base, 1)
    with pytest.raises(ValueError, match=rf"{kind.__name__}\.{method} goes through parameters, those of {whose} among"):
        randes.SuperposedModel(base, sup)


class Describes(Goes):
    """Asks what parameters are like, counts and freezes them, where nothing is computed."""

    def forward(self, x: Tensor) -> Tensor:
        first = next(self.parameters())
        assert all(p.requires_grad for p in self.last.parameters())
        assert sum(p.numel() for _, p in self.named_parameters()) > 0
        return self.last(self.ff(x.to(next(self.ff.parameters()).dtype).to(first.device)))

    def freeze(self) -> None:
        for p in self.parameters():
            p.requires_grad_(False)

    def optimiser(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1.0)


def test_code_that_describes_or_trains_them_is_served() -> None:
    base = Describes()
    sup, _ = superposed(base, 2, size=0.1)
    model, x = randes.SuperposedModel(copy.deepcopy(base), sup), torch.ones(3, 32)
    for name in ("m0", "m1", "__base__"):
        torch.testing.assert_close(model(x, adapter_names=[name] * 3), alone(base, sup, name)(x), **CLOSE)
