"""What would silently answer as the wrong model, or leave things half done: refused, or right."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from models import finetune, linear, net, superposed, uses
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from typer.testing import CliRunner

import randes
from randes.cli import app

MIX = ["m0", "m1", "__base__"]


class Experts(nn.Module):
    """Hands a selection of tokens to a linear layer, as a mixture of experts does."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.flatten(0, 1)[[0, 1, 2, 6]])


def test_a_selection_of_tokens_is_refused() -> None:
    base = Experts()
    sup, _ = superposed(base, 2)
    model = randes.SuperposedModel(copy.deepcopy(base), sup)
    with pytest.raises(ValueError, match="first dimension must be the batch"):
        model(torch.ones(2, 5, 32), adapter_names=["m0", "m1"])


def test_flattened_tokens_are_their_rows_own() -> None:
    base = nn.Sequential(nn.Flatten(0, 1), linear(32, 32))
    sup, _ = superposed(base, 2)
    model = randes.SuperposedModel(copy.deepcopy(base), sup)
    x = torch.randn(3, 4, 32, generator=torch.Generator().manual_seed(0))
    y = model(x, adapter_names=MIX).unflatten(0, (3, 4))
    for row, name in enumerate(MIX):
        torch.testing.assert_close(y[row], model(x, adapter_names=[name] * 3).unflatten(0, (3, 4))[row])


def test_a_forward_that_was_replaced_on_a_layer_is_refused() -> None:
    sup, _ = superposed(net(), 2)
    for layer in ("head", "norm"):
        base = net()
        target: Any = next(module for name, module in base.named_modules() if name.endswith(layer))
        target.forward = target.forward  # what hooks that wrap layers do
        with pytest.raises(ValueError, match="forward was replaced on the layer itself"):
            randes.SuperposedModel(base, sup)
        assert not any(isinstance(module, randes.SuperposedLinear) for module in base.modules())


def test_a_model_is_changed_whole_or_not_at_all() -> None:
    base = nn.Sequential(linear(32, 32), linear(48, 32)).half()
    sup = randes.Superposition.create(copy.deepcopy(base))
    loud = copy.deepcopy(base)
    with torch.no_grad():
        loud[1].weight[0, 0] += 8  # all of the delta in one place: 39 gains
    sup.add("loud", loud)
    sup.deltas[0]["1.weight"] = sup.deltas[0]["1.weight"].to(torch.int32) * 10_000  # beyond fp16
    with pytest.raises(ValueError, match=r"the superposition of 1.weight must fit torch.float16"):
        randes.SuperposedModel(base, sup)
    assert [type(layer) for layer in base] == [nn.Linear, nn.Linear]


def test_a_layer_that_is_not_the_bases_is_refused() -> None:
    base = linear()
    sup, _ = superposed(base, 1)
    for other in (finetune(base, 9), linear(seed=3)):
        with pytest.raises(randes.BaseMismatchError, match="weight differs"):
            randes.SuperposedLinear.from_linear(other, sup, "")


def test_a_base_that_was_trained_on_is_refused_everywhere(tmp_path: Path) -> None:
    base = net()
    sup = randes.Superposition.create(base)
    tuned = finetune(base, 0)
    sup.add("m0", tuned)
    with torch.no_grad():
        next(base.parameters()).add_(1)
    for use in uses(sup, base, tuned, tmp_path / "store"):
        with pytest.raises(randes.BaseMismatchError, match="was changed after the superposition was created"):
            use()
    assert not (tmp_path / "store").exists()


def test_checkpointed_activations_are_recomputed_with_their_own_models() -> None:
    base = linear(32, 32)
    sup, _ = superposed(base, 2, size=0.5)
    model = randes.SuperposedModel(base, sup)
    model.set_adapter("m1")

    def gradient(recomputed: bool) -> Tensor:
        x = torch.ones(2, 32, requires_grad=True)
        with model.using(["m0", "__base__"]):
            y = checkpoint(lambda x: model(x).tanh(), x, use_reentrant=False) if recomputed else model(x).tanh()
            y.sum().backward()
        assert x.grad is not None
        return x.grad

    assert torch.equal(gradient(True), gradient(False))


def test_large_activations_do_not_overflow_in_fp16() -> None:
    torch.manual_seed(0)
    base = nn.Linear(1024, 64, bias=False).half()
    sup, _ = superposed(base, 4, size=1e-3)
    layer = randes.SuperposedLinear.from_linear(base, sup, "")
    x = torch.full((1, 1024), 400.0).half() * torch.where(torch.rand(1024) < 0.5, -1, 1)
    y = layer(x, adapter_names=["m0"])
    exact = x.double() @ sup.retrieve("m0")["weight"].double().mT
    assert torch.isfinite(y).all()
    torch.testing.assert_close(y.double(), exact, rtol=1e-2, atol=1.0)


def test_an_average_is_held_once_for_all_models() -> None:
    base = net()
    sup, _ = superposed(base, 6, randes.Config(others="average"))
    model = randes.SuperposedModel(copy.deepcopy(base), sup)
    tables = [module for module in model.modules() if type(module).__name__ == "PerModelTensor"]
    assert tables
    assert all(len(table.values) == 1 for table in tables)  # type: ignore[arg-type]


def test_the_default_device_does_not_matter() -> None:
    base = linear()
    tuned = finetune(base, 0)
    try:
        torch.set_default_device("meta")
        sup = randes.Superposition.create(base, randes.Config(permute=1))
        sup.add("m0", tuned)
        retrieved = sup.retrieve("m0")["weight"]
    finally:
        torch.set_default_device(None)
    torch.testing.assert_close(retrieved, tuned.weight, rtol=0, atol=1e-3)


def test_names_may_hold_what_a_terminal_takes_for_markup(tmp_path: Path) -> None:
    base = linear()
    save_file(base.state_dict(), tmp_path / "base.safetensors")
    save_file(finetune(base, 0).state_dict(), tmp_path / "m.safetensors")
    store, name = tmp_path / "[old]", "x[/b]"
    arguments = ["compress", "--base", f"{tmp_path}/base.safetensors", "--model", f"{name}={tmp_path}/m.safetensors"]
    assert CliRunner().invoke(app, [*arguments, "--out", str(store)]).exit_code == 0
    shown = CliRunner().invoke(app, ["info", str(store)])
    assert shown.exit_code == 0
    assert name in shown.output
    wrong = CliRunner().invoke(app, ["retrieve", str(store), "[/x]", "--out", str(tmp_path / "y")])
    assert wrong.exit_code == 2
    assert "no model is called '[/x]'" in wrong.output


def test_a_file_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    base = linear()
    sup, _ = superposed(base, 1)
    sup.save(tmp_path / "store")
    (tmp_path / "file").write_text("")  # under which no folder can be made
    arguments = ["retrieve", str(tmp_path / "store"), "m0", "--out", str(tmp_path / "file" / "y.safetensors")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert "error:" in result.output
    assert "Traceback" not in result.output
