"""``SuperposedLinear``: a linear layer in every way that PyTorch knows, with each row's own weight."""

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import TRANSFORMS, finetune, linear, superposed
from torch import Tensor, nn

import randes
from randes.superposition.integers import STEP

NAMES = ["m1", "__base__", "m0", "m2"]


def layer_and_weights(
    config: randes.Config | None = None, dtype: torch.dtype = torch.float32
) -> tuple[randes.SuperposedLinear, dict[str, tuple[Tensor, Tensor]], randes.Superposition]:
    """A layer over three models, and what each row's weight and bias must be."""
    base = linear(48, 40, dtype=dtype)
    sup, _ = superposed(base, 3, config)
    own = {name: (state["weight"], state["bias"]) for name in sup.names if (state := sup.retrieve(name))}
    own["__base__"] = (base.weight.detach().clone(), base.bias.detach().clone())
    return randes.SuperposedLinear.from_linear(base, sup, ""), own, sup


def expected(own: dict[str, tuple[Tensor, Tensor]], x: Tensor, names: list[str]) -> Tensor:
    return torch.stack([F.linear(row, *own[name]) for name, row in zip(names, x, strict=True)])


def inputs(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5)).to(dtype)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("shape", [(4, 40), (4, 3, 40), (4, 2, 3, 40), (4, 0, 40)])
def test_every_row_has_its_own_weight_and_bias_under_any_leading_dimensions(
    transform: str, shape: tuple[int, ...]
) -> None:
    layer, own, _ = layer_and_weights(TRANSFORMS[transform])
    x = inputs(*shape)
    y = layer(x, adapter_names=NAMES)
    assert y.shape == (*shape[:-1], 48)
    torch.testing.assert_close(y, expected(own, x, NAMES), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(40,), (7, 40), (5, 3, 40)])
def test_one_name_is_every_rows(shape: tuple[int, ...]) -> None:
    layer, own, _ = layer_and_weights()
    torch.testing.assert_close(
        layer(inputs(*shape), adapter_names=["m2"]), F.linear(inputs(*shape), *own["m2"]), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_as_accurate_as_a_plain_layer_of_the_retrieved_weight(dtype: torch.dtype) -> None:
    layer, own, sup = layer_and_weights(dtype=dtype)
    x = inputs(4, 40, dtype=dtype)
    base = {name: value.double() for name, value in sup.base.items()}
    as_fp64 = randes.Superposition(sup.config, base, sup.superposed)
    as_fp64.members, as_fp64.deltas = sup.members, sup.deltas
    exact_own = {name: (as_fp64.retrieve(name)["weight"], own[name][1].double()) for name in sup.names}
    exact_own["__base__"] = (base["weight"], base["bias"])
    exact = expected(exact_own, x.double(), NAMES)
    error = (layer(x, adapter_names=NAMES).double() - exact).norm()
    plain_error = (expected(own, x, NAMES).double() - exact).norm()
    assert error < 2 * plain_error + torch.finfo(dtype).eps * exact.norm()


def test_it_is_a_linear_layer_with_the_base_layers_parameters() -> None:
    base = linear(48, 40)
    sup, _ = superposed(base, 2)
    layer = randes.SuperposedLinear.from_linear(base, sup, "")
    assert isinstance(layer, nn.Linear)
    assert (layer.in_features, layer.out_features) == (40, 48)
    assert layer.base_weight is base.weight
    assert layer.base_bias is base.bias
    assert type(base) is nn.Linear
    assert list(layer.state_dict()) == ["base_weight", "base_bias"]
    assert [name for name, _ in layer.named_parameters()] == ["base_weight", "base_bias"]
    assert "in_features=40, out_features=48, bias=True, models=2" in repr(layer)


def test_a_layer_without_bias_has_none() -> None:
    base = nn.Linear(32, 32, bias=False)
    sup, _ = superposed(base, 2)
    layer = randes.SuperposedLinear.from_linear(base, sup, "")
    assert list(layer.state_dict()) == ["base_weight"]
    x = inputs(2, 32)
    y = layer(x, adapter_names=["m1", "__base__"])
    torch.testing.assert_close(y[0], sup.retrieve("m1")["weight"] @ x[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(y[1], base.weight @ x[1], rtol=1e-4, atol=1e-5)


def test_a_chosen_part_of_a_model_goes_by_its_name() -> None:
    base = nn.Sequential(linear(32, 32, seed=1), nn.Sequential(linear(48, 32, seed=2)))
    sup, _ = superposed(base, 2)
    layer = randes.SuperposedLinear.from_linear(base[1][0], sup, "1.0")
    x = inputs(3, 32)
    state = sup.retrieve("m0")
    torch.testing.assert_close(
        layer(x, adapter_names=["m0"]), F.linear(x, state["1.0.weight"], state["1.0.bias"]), rtol=1e-4, atol=1e-5
    )
    with pytest.raises(ValueError, match=r"1\.weight is not superposed"):
        randes.SuperposedLinear.from_linear(base[0], sup, "1")
    with pytest.raises(ValueError, match=r"\(N, K\) = \(48, 32\), got \(32, 32\)"):
        randes.SuperposedLinear.from_linear(base[0], sup, "1.0")


def half_and_back(layer: nn.Module) -> nn.Module:
    return layer.half().float()


@pytest.mark.parametrize(
    ("change", "dtype", "tolerance"),
    [
        (lambda layer: layer.half(), torch.float16, 5e-3),
        (lambda layer: layer.to(torch.bfloat16), torch.bfloat16, 4e-2),
        (lambda layer: layer.double(), torch.float64, 1e-5),
        (half_and_back, torch.float32, 5e-3),
        (copy.deepcopy, torch.float32, 1e-5),
        (lambda layer: copy.deepcopy(layer).double(), torch.float64, 1e-5),
    ],
)
def test_conversions_keep_the_answers_and_the_gains_in_fp32(change: Any, dtype: torch.dtype, tolerance: float) -> None:
    base = linear(48, 40)
    sup = randes.Superposition.create(base)
    tuned = finetune(base, 1, 1e-6)  # its gain times a step is below the smallest number of fp16
    sup.add("quiet", tuned)
    sup.add("loud", finetune(base, 2))
    layer = change(randes.SuperposedLinear.from_linear(copy.deepcopy(base), sup, ""))
    assert layer.scale.dtype == torch.float32
    assert sup.members["quiet"].gains["weight"] * STEP < torch.finfo(torch.float16).tiny
    assert torch.equal(layer.scale, torch.tensor([sup.members[name].gains["weight"] for name in sup.names]))
    x = inputs(2, 40)
    y = layer(x.to(dtype), adapter_names=["loud", "quiet"])
    assert y.dtype == dtype
    states = [sup.retrieve("loud"), sup.retrieve("quiet")]
    for answer, row, state in zip(y, x, states, strict=True):
        torch.testing.assert_close(
            answer.float(), F.linear(row, state["weight"], state["bias"]), rtol=0, atol=tolerance
        )


@pytest.mark.parametrize("transform", ["both", "permuted"])
def test_gradients_are_those_of_the_retrieved_weights(transform: str) -> None:
    layer, own, _ = layer_and_weights(TRANSFORMS[transform])
    x = inputs(4, 3, 40).requires_grad_()
    grad = inputs(4, 3, 48)
    layer(x, adapter_names=NAMES).backward(grad)

    plain_x = x.detach().clone().requires_grad_()
    expected(own, plain_x, NAMES).backward(grad)
    torch.testing.assert_close(x.grad, plain_x.grad, rtol=1e-4, atol=1e-5)
    weight, bias = layer.base_weight.grad, layer.base_bias.grad
    torch.testing.assert_close(weight, torch.einsum("brn,brk->nk", grad, x.detach()), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(bias, grad[NAMES.index("__base__")].sum(0))  # others used their own


def test_autocast_answers_in_its_dtype_near_the_exact_answer() -> None:
    layer, own, _ = layer_and_weights()
    x = inputs(4, 40).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x, adapter_names=NAMES)
        base = layer(x, adapter_names=["__base__"])
    assert y.dtype == base.dtype == torch.bfloat16
    exact = expected(own, x, NAMES)
    assert (y.float() - exact).norm() < 0.02 * exact.norm()
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32


def test_hooks_and_training_mode_survive() -> None:
    base = nn.Sequential(linear(32, 32))
    sup, _ = superposed(base, 1)
    base.eval()
    seen = []
    base[0].register_forward_hook(lambda *_: seen.append("after"))
    base[0].register_forward_pre_hook(lambda *_: seen.append("before"))
    same = base[0]
    model = randes.SuperposedModel(base, sup)
    assert base[0] is same
    assert not base[0].training
    model(inputs(2, 32), adapter_names=["m0", "__base__"])
    assert seen == ["before", "after"]


def test_layers_that_share_shuffled_superpositions_hold_them_once() -> None:
    base = nn.Sequential(*[linear(32, 32, seed=number) for number in range(3)])
    sup, _ = superposed(base, 2, TRANSFORMS["shuffled"])
    model = copy.deepcopy(randes.SuperposedModel(base, sup)).double()
    pools = {id(layer.pool) for layer in model.base_model}
    assert len(pools) == 1
    assert model.base_model[0].pool.values.shape == (3, 32, 32)


def test_a_delta_of_one_model_alone_is_applied_to_rounding() -> None:
    base, tuned = linear(48, 40), finetune(linear(48, 40), 1)
    sup = randes.Superposition.create(base)
    sup.add("m", tuned)
    x = inputs(4, 40)
    y = randes.SuperposedLinear.from_linear(base, sup, "")(x, adapter_names=["m"])
    moved = (tuned(x) - base(x)).norm()
    assert (y - tuned(x)).norm() < 2 * STEP / math.sqrt(12) * moved


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        (["m0", "m1"], ValueError, "one name a row, 4, got 2"),
        ([], ValueError, "adapter_names"),
        ("m0", ValueError, "adapter_names"),
        ("m0m1", ValueError, "adapter_names must be a list"),
        (["m0", "m1", "m9", "m1"], randes.UnknownModelError, "no model is called 'm9'; there are: m0, m1, m2"),
    ],
)
def test_names_that_do_not_fit_are_refused(names: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        layer_and_weights()[0](inputs(4, 40), adapter_names=names)


def test_without_names_there_is_no_answer() -> None:
    with pytest.raises(RuntimeError, match="no model is chosen"):
        layer_and_weights()[0](inputs(4, 40))


def test_an_input_of_another_width_or_dtype_is_refused() -> None:
    layer, _, _ = layer_and_weights()
    with pytest.raises(ValueError, match=r"K = 40, got \(4, 39\)"):
        layer(inputs(4, 39), adapter_names=NAMES)
    with pytest.raises(ValueError, match="float64"):
        layer(inputs(4, 40).double(), adapter_names=NAMES)
    with pytest.raises(ValueError, match="float32"):
        copy.deepcopy(layer).half()(inputs(4, 40), adapter_names=NAMES)


def test_half_precision_is_taken_as_single_where_the_layer_is_that() -> None:
    layer, _, _ = layer_and_weights()
    x = inputs(4, 40).half()
    for names in (NAMES, ["__base__"] * 4):
        assert torch.equal(layer(x, adapter_names=names), layer(x.float(), adapter_names=names))
