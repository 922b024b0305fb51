"""A weight that is another for each model: right in a product, and otherwise never read as the base's."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import CLOSE, Net, alone, counted, finetune, linear, net, superposed, tokens
from torch import Tensor, nn

import randes
from randes.serving.layers.served_weights import ServedWeight

MIX = ["m1", "__base__", "m0", "m1"]


class Calls(nn.Module):
    """A linear layer whose weight is used past it, in ``use``."""

    def __init__(self, use: Callable[[nn.Linear, Tensor], Tensor]) -> None:
        super().__init__()
        self.lin = linear(32, 32)
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self.lin, x)


class Wide(Calls):
    """With one more, so that something is superposed in any case."""

    def __init__(self, use: Callable[[nn.Linear, Tensor], Tensor]) -> None:
        super().__init__(use)
        self.first = linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.first(x))


def served(module: nn.Module, size: float = 0.3) -> tuple[randes.SuperposedModel, randes.Superposition, nn.Module]:
    """From tensors alone, so that nobody could look into the model's code."""
    base = copy.deepcopy(module)
    sup = randes.Superposition.create(base.state_dict())
    for number in range(2):
        sup.add(f"m{number}", finetune(base, number, size).state_dict())
    return randes.SuperposedModel(module, sup), sup, base


def rows(count: int, width: int = 32) -> Tensor:
    return torch.randn(count, 3, width, generator=torch.Generator().manual_seed(5))


READS: dict[str, Callable[[nn.Linear, Tensor], Any]] = {
    "x @ w.T": lambda lin, x: x @ lin.weight.T,
    "x @ w.mT": lambda lin, x: x @ lin.weight.mT,
    "x @ w": lambda lin, x: x @ lin.weight,
    "w @ x": lambda lin, x: lin.weight @ x.mT,
    "matmul": lambda lin, x: torch.matmul(x, lin.weight),
    "einsum": lambda lin, x: torch.einsum("btk,nk->btn", x, lin.weight),
    "cat": lambda lin, x: torch.cat([lin.weight, lin.weight]),
    "stack": lambda lin, x: torch.stack([lin.weight]),
    "slice": lambda lin, x: lin.weight[:4],
    "data": lambda lin, x: lin.weight.data,
    "detach": lambda lin, x: lin.weight.detach(),
    "to": lambda lin, x: lin.weight.to(torch.float64),
    "grad": lambda lin, x: lin.weight.grad,
    "sum": lambda lin, x: lin.weight.sum() * x,
    "scaled": lambda lin, x: 2 * lin.weight,
    "norm": lambda lin, x: torch.linalg.norm(lin.weight),
    "clone": lambda lin, x: lin.weight.clone(),
    "equal": lambda lin, x: lin.weight == 0,
    "not equal": lambda lin, x: x * (lin.weight != 0),
    "equal to a tensor": lambda lin, x: torch.zeros(32, 32) == lin.weight,
    "numpy": lambda lin, x: lin.weight.numpy(),
    "item": lambda lin, x: float(lin.weight),
    "iterated": lambda lin, x: list(lin.weight),
    "changed": lambda lin, x: nn.init.zeros_(lin.weight),
    "conv": lambda lin, x: F.conv1d(x.mT, lin.weight[..., None]),
    "attention": lambda lin, x: F.multi_head_attention_forward(
        x, x, x, 32, 4, lin.weight, None, None, None, False, 0.0, lin.weight, None
    ),
}


@pytest.mark.parametrize("read", READS)
def test_values_that_are_read_are_refused_where_a_row_is_not_the_bases(read: str) -> None:
    model, _, base = served(Calls(READS[read]))
    layer = model.base_model.lin
    x = rows(4)
    for names in (MIX, ["m0"] * 4):
        with pytest.raises(randes.WeightReadError, match=r"lin\.weight is superposed, another for each model"):
            model(x, adapter_names=names)
    model.set_adapter("m0")
    with pytest.raises(randes.WeightReadError):
        READS[read](layer, x)  # outside a call, too
    assert torch.equal(base.lin.weight, layer.base_weight)


def test_a_base_that_was_asked_for_is_read_as_it_is() -> None:
    model, _, base = served(Calls(lambda lin, x: x @ lin.weight.T + lin.weight.sum()))
    x = rows(4)
    with model.disable_adapter():
        assert torch.equal(model(x), base(x))
    with pytest.raises(randes.WeightReadError):
        _ = model.base_model.lin.weight.T  # no model is chosen


def by_linear(lin: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x, lin.weight) + F.linear(input=x, weight=lin.weight)


def test_a_product_with_the_weight_is_each_rows_own_models() -> None:
    model, sup, base = served(Calls(by_linear))
    x = rows(4)
    for names in (MIX, ["m0"] * 4, ["__base__"] * 4):
        expected = torch.cat([alone(base, sup, name)(row[None]) for name, row in zip(names, x, strict=True)])
        torch.testing.assert_close(model(x, adapter_names=names), expected, **CLOSE)
    assert not torch.allclose(alone(base, sup, "m0")(x), base(x), atol=0.1)


@pytest.mark.parametrize("exclude", [(), ("lin.*",)])
def test_its_bias_goes_along(exclude: tuple[str, ...]) -> None:
    base = Wide(lambda lin, x: F.linear(x, lin.weight, lin.bias))
    sup, _ = superposed(base, 2, randes.Config(exclude=exclude), 0.3)
    assert ("lin.weight" in sup.superposed) != bool(exclude)
    model = randes.SuperposedModel(copy.deepcopy(base), sup)
    x = rows(4)
    for names in (MIX, ["m0"] * 4, ["__base__"] * 4):
        expected = torch.cat([alone(base, sup, name)(row[None]) for name, row in zip(names, x, strict=True)])
        torch.testing.assert_close(model(x, adapter_names=names), expected, **CLOSE)


@pytest.mark.parametrize("read", ["w", "b"])
def test_a_kept_parameter_is_read_for_one_model_and_refused_for_a_mix(read: str) -> None:
    base = Wide(lambda lin, x: x @ lin.weight.T if read == "w" else lin(x) + lin.bias)
    sup, _ = superposed(base, 2, randes.Config(exclude=("lin.*",)), 0.3)
    model = randes.SuperposedModel(copy.deepcopy(base), sup)
    x = rows(4)
    for name in ("m0", "m1", "__base__"):
        torch.testing.assert_close(model(x, adapter_names=[name] * 4), alone(base, sup, name)(x), **CLOSE)
    with pytest.raises(randes.WeightReadError, match="is kept per model, and cannot be read for rows of several"):
        model(x, adapter_names=MIX)


class Told(nn.Module):
    """Asks what a weight is like, which is the same for all models."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.lin.weight
        assert weight.shape == (32, 32)
        assert weight.size(0) == weight.shape[1]
        assert weight.ndim == 2
        return self.lin(x.to(weight.dtype).to(weight.device)) * F.linear(x, weight)


def test_what_all_models_weights_have_in_common_can_be_asked_for_and_compiled() -> None:
    model, sup, base = served(Told())
    layer = model.base_model.lin
    weight = layer.weight
    assert not isinstance(weight, Tensor)
    assert (weight.dtype, weight.device.type, weight.requires_grad) == (torch.float32, "cpu", True)
    assert (weight.numel(), weight.stride(), len(weight), weight.is_floating_point()) == (1024, (32, 1), 32, True)
    assert torch.is_floating_point(weight)
    assert "weight, (32, 32), torch.float32" in repr(weight)
    assert not hasattr(weight, "ds_id")
    x = rows(4)
    compiled, programs = counted(model)
    for names in (MIX, MIX[::-1]):
        expected = torch.cat([alone(base, sup, name)(row[None]) for name, row in zip(names, x, strict=True)])
        torch.testing.assert_close(compiled(x, adapter_names=model.batch(names)), expected, **CLOSE)
    assert len(programs) == 1


def test_state_dicts_say_base_where_models_differ_and_do_not_load_as_a_plain_models() -> None:
    base = net()
    sup, _ = superposed(base, 2)
    model = randes.SuperposedModel(copy.deepcopy(base), sup)
    model.set_adapter("m0")
    state = model.base_model.state_dict()
    assert "norm.weight" not in state
    assert torch.equal(state["norm.base_weight"], base.norm.weight)
    assert torch.equal(state["layers.0.up.base_weight"], base.layers[0].up.weight)
    assert torch.equal(model.base_model.norm.weight, sup.retrieve("m0")["norm.weight"])  # the chosen model's own
    with pytest.raises(RuntimeError, match="Unexpected key"):
        Net().load_state_dict(state)
    with pytest.raises(RuntimeError, match="Missing key"):
        model.base_model.load_state_dict(base.state_dict())
    other = randes.SuperposedModel(copy.deepcopy(base), sup)
    other.load_state_dict(model.state_dict())
    assert model.unload().state_dict().keys() == base.state_dict().keys()


def test_an_optimiser_trains_the_bases_parameters_through_all_rows() -> None:
    model, _, base = served(Calls(lambda lin, x: lin(x)))
    x = rows(4)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    model(x, adapter_names=MIX).square().sum().backward()
    optimiser.step()
    moved = model.base_model.lin.base_weight
    assert isinstance(moved, nn.Parameter)
    assert not torch.equal(moved, base.lin.weight)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_and_pickles_answer_alike(copied: Callable[[Any], Any]) -> None:
    base = net()
    sup, _ = superposed(base, 3)
    model = randes.SuperposedModel(copy.deepcopy(base), sup)
    other, x = copied(model), tokens(4)
    names = ["m1", "__base__", "m0", "m2"]
    assert torch.equal(other(x, adapter_names=names), model(x, adapter_names=names))
    assert [type(part) for part in other.modules()] == [type(part) for part in model.modules()]
    half = copy.deepcopy(other).half()
    assert half(x, adapter_names=names).dtype == torch.float16


def test_a_layer_with_something_of_that_name_already_is_refused() -> None:
    base = nn.Sequential(linear(32, 32))
    sup, _ = superposed(base, 1)
    taken = copy.deepcopy(base)
    taken[0].base_weight = "mine"
    with pytest.raises(ValueError, match="must have nothing called base_weight"):
        randes.SuperposedModel(taken, sup)
    assert type(taken[0]) is nn.Linear
    assert list(taken.state_dict()) == ["0.weight", "0.bias"]


def test_a_weight_is_not_replaced_by_assignment() -> None:
    model, _, _ = served(Calls(by_linear))
    for value in (nn.Parameter(torch.ones(32, 32)), torch.ones(32, 32)):
        with pytest.raises((KeyError, AttributeError)):
            model.base_model.lin.weight = value
    assert isinstance(model.base_model.lin.weight, ServedWeight)


def test_what_is_assigned_to_a_weight_is_not_dropped() -> None:
    model, _, _ = served(Calls(by_linear))
    layer = model.base_model.lin
    for name in ("m0", "__base__"):
        model.set_adapter(name)
        for field, value in (("data", torch.zeros(32, 32)), ("requires_grad", False), ("grad", None), ("tag", 1)):
            with pytest.raises(randes.WeightReadError, match=f"its {field} cannot be set; .* is base_weight"):
                setattr(layer.weight, field, value)
    assert layer.weight.requires_grad
    assert len({layer.weight, layer.weight}) == 2  # as tensors are: each is itself
    assert (weight := layer.weight) in [weight]


def test_a_bases_weight_is_compared() -> None:
    model, _, base = served(Calls(by_linear))
    with model.disable_adapter():
        assert bool((model.base_model.lin.weight == base.lin.weight).all())
        assert not bool((model.base_model.lin.weight != base.lin.weight).any())
