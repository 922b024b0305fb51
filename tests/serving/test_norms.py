"""Norms of somebody's own: run once for all rows where that is right, and otherwise for each model."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import CLOSE, alone, linear, superposed
from torch import Tensor, nn

import randes
from randes.serving.layers.norms import multiplies_by_element
from randes.serving.layers.per_row import RoutedByModel, RoutedNorm

WIDTH = 32
MIX = ["m1", "__base__", "m0", "m1"]


class OwnNorm(nn.Module):
    """Scales by something that is made of its weight."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, WIDTH))
        self.way = way
        self.calls = [0]
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.calls[0] += 1
        self.seen += 1
        x = x / x.float().pow(2).mean(-1, keepdim=True).sqrt().to(x.dtype)
        return WAYS[self.way](x, self.weight)


WAYS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "weight": lambda x, w: x * w,
    "1 + weight": lambda x, w: x * (1 + w),
    "exp": lambda x, w: x * w.float().exp().to(x.dtype),
    "mean": lambda x, w: x * w.mean(),
    "max": lambda x, w: x * w / w.max(),
    "softmax": lambda x, w: x * w.softmax(0) * WIDTH,
    "softmax over the last": lambda x, w: x * w.softmax(-1) * WIDTH,
    "normalize": lambda x, w: x * F.normalize(w, dim=0) * 6,
    "cumsum": lambda x, w: x * w.cumsum(0) / WIDTH,
    "flip": lambda x, w: x * w.flip(0),
    "random": lambda x, w: x * w * (1 + 0 * torch.rand(1)),
    "small alone": lambda x, w: x * (w if (w.abs() > 20).any() else w / w.norm()),
}
ONCE = {"weight", "1 + weight", "exp", "softmax over the last", "random"}


class Around(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm, self.linear = norm, linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(x))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", [(4, WIDTH), (4, 3, WIDTH), (4, 2, 3, WIDTH)])
def test_a_norm_is_each_rows_own_whatever_it_makes_of_its_weight(way: str, shape: tuple[int, ...]) -> None:
    base = Around(OwnNorm(way)).eval()
    sup, _ = superposed(base, 2, size=0.3)
    model = randes.SuperposedModel(copy.deepcopy(base), sup).eval()
    assert isinstance(model.base_model.norm, RoutedNorm if way in ONCE else RoutedByModel)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    for names in (MIX, ["m0"] * 4, ["__base__"] * 4):
        expected = torch.cat([alone(base, sup, name)(row[None]) for name, row in zip(names, x, strict=True)])
        torch.testing.assert_close(model(x, adapter_names=names), expected, **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_trying_a_norm_leaves_no_trace(dtype: torch.dtype) -> None:
    norm: Any = OwnNorm("random").to(dtype)
    called = []
    norm.register_forward_hook(lambda *_: called.append(1))
    weight, state = norm.weight.clone(), torch.random.get_rng_state()
    fields = {name: copy.copy(value) for name, value in vars(norm).items()}
    assert multiplies_by_element(norm)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert (norm.calls, norm.seen.item(), called) == ([0], 0, [])
    assert torch.equal(norm.weight, weight)
    assert vars(norm) == fields


def test_norms_are_tried_wherever_they_are_and_as_they_are_set() -> None:

    class Plain(nn.Module):
        def __init__(self, shares: bool) -> None:
            super().__init__()
            self.weight, self.shares = nn.Parameter(torch.ones(WIDTH)), shares

        def forward(self, x: Tensor) -> Tensor:
            return x * (self.weight.mean() if self.shares else self.weight)

    for shares in (False, True, False):
        for device in ("meta", "cpu"):
            assert multiplies_by_element(Plain(shares).to(device)) is not shares


def test_a_norm_that_cannot_be_tried_is_run_for_each_model() -> None:
    class FirstNorm(OwnNorm):
        def forward(self, x: Tensor) -> Tensor:
            if x.dim() != 4:
                raise ValueError("images alone")
            return x * self.weight[:, None, None]

    assert not multiplies_by_element(FirstNorm("weight"))
