"""Layers that make their weights anew in each call: a call gets those of its own model, whoever else is answered."""

import copy
import pickle
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import CLOSE, linear
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import randes

MIX = ["m1", "__base__", "m0", "m1"]


def old_norm(layer: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated
        return torch.nn.utils.weight_norm(layer)


def spectral(layer: nn.Module) -> nn.Module:
    return torch.nn.utils.spectral_norm(layer)


def pruned(layer: nn.Module) -> nn.Module:
    with torch.no_grad():
        return prune.l1_unstructured(layer, "weight", 0.5)


class Rows(nn.Module):
    """Rows (B, T, 32) through a layer that is made anew, and one that is superposed."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.linear = layer, linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.layer, nn.Conv1d):
            return self.linear(self.layer(x.mT).mT)
        if isinstance(self.layer, nn.Embedding):
            return self.linear(self.layer((10 * x[..., 0]).abs().long()))
        y = self.layer(x)
        return self.linear(y[0] if isinstance(y, tuple) else y)


MADE: dict[str, Callable[[], nn.Module]] = {
    "weight_norm": lambda: old_norm(nn.Linear(32, 32)),
    "weight_norm of a convolution": lambda: old_norm(nn.Conv1d(32, 32, 3, padding=1)),
    "weight_norm of an embedding": lambda: old_norm(nn.Embedding(64, 32)),
    "spectral_norm": lambda: spectral(nn.Linear(32, 32)),
    "prune": lambda: pruned(nn.Linear(32, 32)),
    "prune of a convolution": lambda: pruned(nn.Conv1d(32, 32, 3, padding=1)),
    "prune of a bias": lambda: prune.l1_unstructured(nn.LayerNorm(32), "weight", 0.5),
    "LSTM": lambda: nn.LSTM(32, 32, batch_first=True),
    "GRU": lambda: nn.GRU(32, 32, batch_first=True, bidirectional=False, num_layers=2),
    "parametrized LSTM": lambda: parametrizations.weight_norm(nn.LSTM(32, 32, batch_first=True), "weight_hh_l0"),
}


def served(make: Callable[[], nn.Module]) -> tuple[randes.SuperposedModel, dict[str, nn.Module]]:
    def model() -> nn.Module:
        torch.manual_seed(0)
        return Rows(make()).eval()

    base = model()
    sup = randes.Superposition.create(base, randes.Config(exclude=("layer.*",)))
    for number in range(2):
        generator = torch.Generator().manual_seed(number)
        moved = {
            name: value + 0.3 * torch.randn(value.shape, generator=generator) * value.ne(0)
            for name, value in model().state_dict().items()
            if not name.endswith(("_mask", "_u", "_v.0"))
        }
        sup.add(f"m{number}", model().state_dict() | moved)
    plain = {"__base__": model()}
    for name in sup.names:
        plain[name] = model()
        plain[name].load_state_dict(sup.retrieve(name))
    return randes.SuperposedModel(base, sup).eval(), plain


def rows() -> Tensor:
    return torch.randn(4, 5, 32, generator=torch.Generator().manual_seed(3))


def agree(model: Any, plain: dict[str, nn.Module], x: Tensor) -> None:
    for name in ("m0", "m1", "__base__", "m0"):
        torch.testing.assert_close(model(x, adapter_names=[name] * 4), plain[name](x), **CLOSE)


@pytest.mark.parametrize("made", MADE)
@torch.no_grad()
def test_a_weight_that_is_made_in_each_call_is_its_models(made: str) -> None:
    model, plain = served(MADE[made])
    x = rows()
    assert not torch.allclose(plain["m0"](x), plain["m1"](x), atol=0.1)
    agree(model, plain, x)
    with pytest.raises(ValueError, match=r"several models|must return tensors with the batch first"):
        model(x, adapter_names=MIX)
    if not made.startswith("parametrized"):  # which torch does not pickle
        agree(pickle.loads(pickle.dumps(model)), plain, x)
    agree(copy.deepcopy(model), plain, x)
    model.double()
    agree(model, {name: copy.deepcopy(own).double() for name, own in plain.items()}, x.double())
    model.float()
    torch.testing.assert_close(model.merge_and_unload("m1")(x), plain["m1"](x), **CLOSE)


@pytest.mark.parametrize("made", [name for name in MADE if "LSTM" not in name and name != "GRU"])
@torch.no_grad()
def test_another_threads_call_in_the_midst_of_one_changes_nothing(made: str) -> None:
    model, plain = served(MADE[made])
    x, others = rows(), []

    def meanwhile(*_: Any) -> None:
        if not others:  # between what makes the weight, and the forward
            others.append(None)
            thread = threading.Thread(target=call)
            thread.start()
            thread.join()

    @torch.no_grad()
    def call() -> None:
        others[0] = model(x, adapter_names=["m1"] * 4)

    model.base_model.layer.register_forward_pre_hook(meanwhile)
    y = model(x, adapter_names=["m0"] * 4)
    torch.testing.assert_close(y, plain["m0"](x), **CLOSE)
    torch.testing.assert_close(others[0], plain["m1"](x), **CLOSE)


@pytest.mark.parametrize("made", ["LSTM", "GRU", "parametrized LSTM"])
@torch.no_grad()
def test_a_recurrent_layers_list_is_of_whoever_reads_it(made: str) -> None:
    model, plain = served(MADE[made])
    layer = model.base_model.layer
    for update, read in (("m0", "m1"), ("m1", "m0"), ("m1", "__base__")):
        with model.using([update]):
            layer._update_flat_weights()
        plain[read](rows())  # a plain one fills its list then
        with model.using([read]):
            for own, expected in zip(layer._flat_weights, plain[read].layer._flat_weights, strict=True):
                torch.testing.assert_close(own, expected)


@torch.no_grad()
def test_a_weight_that_was_made_for_another_model_is_not_read() -> None:
    model, plain = served(MADE["weight_norm"])
    model(rows(), adapter_names=["m0"] * 4)
    layer: Any = model.base_model.layer
    with model.using(["m1"]):
        assert layer.weight.shape == (32, 32)
        with pytest.raises(randes.WeightReadError, match="made anew in each call, for its model"):
            layer.weight.sum()
        layer(rows())
        plain["m1"](rows())
        torch.testing.assert_close(layer.weight, plain["m1"].layer.weight)


def test_a_superposed_layer_whose_bias_is_made_anew_is_refused() -> None:
    def make() -> nn.Module:
        return nn.Sequential(prune.l1_unstructured(linear(32, 32), "bias", 0.5), linear(32, 32))

    sup = randes.Superposition.create(make())
    sup.add("m", {name: value + 0.1 for name, value in make().state_dict().items() if "mask" not in name}
            | {name: value for name, value in make().state_dict().items() if "mask" in name})  # fmt: skip
    with pytest.raises(ValueError, match=r"0\.weight is superposed, but 0\.bias is made anew before each call"):
        randes.SuperposedModel(make(), sup)


class Gained(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(32))

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.gain


def gained(layer: nn.Module) -> nn.Module:
    return parametrize.register_parametrization(layer, "weight", Gained())


@pytest.mark.parametrize("make", [parametrizations.weight_norm, gained])
@torch.no_grad()
def test_a_cache_of_parametrizations_would_give_one_models_weight_to_another(make: Callable[..., nn.Module]) -> None:
    model, plain = served(lambda: make(nn.Linear(32, 32)))
    x = rows()
    agree(model, plain, x)
    for name in ("m0", "m1"):
        with pytest.raises(ValueError, match=r"parametrize.cached\(\) must not be around"), parametrize.cached():
            model(x, adapter_names=[name] * 4)
    agree(model, plain, x)


@torch.no_grad()
def test_the_rows_of_a_weight_are_not_taken_for_a_batchs() -> None:
    base = nn.Sequential(linear(32, 32), gained(nn.Linear(32, 4)))
    sup = randes.Superposition.create(base, randes.Config(exclude=("1.*",)))
    gain = "1.parametrizations.weight.0.gain"
    for number in range(2):
        sup.add(f"m{number}", base.state_dict() | {gain: torch.full((32,), 2.0 + number)})
    plain = copy.deepcopy(base)
    model, x = randes.SuperposedModel(base, sup), rows()[:, 0]
    plain.load_state_dict(sup.retrieve("m1"))
    torch.testing.assert_close(model(x, adapter_names=["m1"] * 4), plain(x), **CLOSE)
    with pytest.raises(randes.WeightReadError, match="run one model at a time"):
        model(x, adapter_names=MIX)
    with pytest.raises(ValueError, match="must not be around"), parametrize.cached():
        model(x, adapter_names=["m1"] * 4)
