"""Shared bases from activations: what is seen of a layer's inputs, what becomes of it, and what it is for."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Net, finetune, linear, net, stored
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import randes
from randes.superposition.basis import calibration
from randes.superposition.basis.calibration import COLUMNS, eigenvectors
from randes.superposition.basis.shared_basis import SHARE, UNIT

RANK = randes.Config(rank=4)


def loud(rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Inputs (rows, columns) with most of their energy in four directions (columns, 4), the same for a seed."""
    directions = torch.linalg.qr(torch.randn(columns, 4, generator=torch.Generator().manual_seed(seed)))[0]
    own = torch.Generator().manual_seed(seed + rows)
    within = torch.randn(rows, 4, generator=own) @ directions.mT
    return within + 0.02 * torch.randn(rows, columns, generator=own), directions


def span(a: Tensor, b: Tensor) -> float:
    """The cosine of the largest angle between what two orthonormal sets (K, r) span."""
    return float(torch.linalg.svdvals(a.double().mT @ b.double()).min())


def tokens(rows: int) -> Tensor:
    return torch.randint(0, 11, (rows, 6), generator=torch.Generator().manual_seed(rows))


def test_of_a_narrow_layer_the_second_moments_are_whole() -> None:
    base = net()
    inputs: dict[str, list[Tensor]] = {}
    for name, layer in base.named_modules():
        if isinstance(layer, nn.Linear):
            layer.register_forward_pre_hook(
                lambda _, args, name=name: inputs.setdefault(name, []).append(args[0].detach().double().flatten(0, -2))  # type: ignore[misc]
            )
    seen = []
    found = randes.calibrate(base, [tokens(5), tokens(3)], step=lambda: seen.append(1))
    assert len(seen) == 2
    assert found.keys() == {f"{name}.weight" for name in inputs}
    for name, values in inputs.items():
        x = torch.cat(values)
        torch.testing.assert_close(found[f"{name}.weight"].double(), x.mT @ x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("columns", [COLUMNS - 112, COLUMNS + 188])
def test_the_top_directions_come_back_from_a_sketch_too(columns: int) -> None:
    base = linear(16, columns)
    batches = [loud(300, columns)[0], loud(200, columns)[0]]
    sketch = randes.calibrate(base, batches)["weight"]
    assert sketch.shape == (columns, min(columns, COLUMNS))
    found = eigenvectors(sketch, "weight")[:, :4]
    x = torch.cat(batches).double()
    top = torch.linalg.eigh(x.mT @ x)[1][:, -4:]
    assert span(top, found) > 0.999
    torch.testing.assert_close(found.mT @ found, torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-8)
    assert torch.equal(randes.calibrate(base, batches)["weight"], sketch)


def test_bases_are_the_inputs_top_directions_and_the_same_for_the_same_data(tmp_path: Path) -> None:
    base = net()
    models = {f"m{number}": finetune(base, number) for number in range(3)}
    moments = randes.calibrate(base, [tokens(64)])
    sup = randes.compress(base, models, RANK, calibration=moments)
    for name, u in sup.bases.items():
        assert u.shape == (moments[name].shape[0], 4)
        top = torch.linalg.eigh(moments[name].double())[1][:, -4:]
        assert span(top, u.double() * UNIT) > 0.999
    save_file(moments, tmp_path / "moments.safetensors")
    again = randes.compress(base, models, RANK, calibration=randes.calibrate(base, [tokens(64)]))
    assert stored(again, tmp_path / "again") == stored(sup, tmp_path / "store")
    mix = ["m2", "__base__", "m0"]
    y = randes.SuperposedModel(copy.deepcopy(base), sup)(tokens(3), adapter_names=mix)
    for row, name in enumerate(mix):
        alone = copy.deepcopy(base)
        if name in models:
            alone.load_state_dict(sup.retrieve(name))
        torch.testing.assert_close(y[row], alone(tokens(3))[row], rtol=1e-4, atol=1e-4)


def test_with_auto_a_direction_needs_a_share_of_the_deltas_too() -> None:
    base = linear(400, 160)
    x, directions = loud(500, 160)
    models = {f"m{number}": finetune(base, number, 0.01) for number in range(4)}
    with torch.no_grad():
        for number, model in enumerate(models.values()):
            own = torch.randn(400, 2, generator=torch.Generator().manual_seed(number))
            model.weight += 0.2 * own @ directions[:, :2].mT
    moments = randes.calibrate(base, [x])
    u = randes.compress(base, models, calibration=moments).bases["weight"].double() * UNIT
    deltas = [(model.weight - base.weight).detach().double() for model in models.values()]
    held = sum((d @ u).square().sum(0) / d.square().sum() for d in deltas) / len(deltas)
    assert (held >= SHARE).all()
    assert span(directions[:, :2], torch.linalg.qr(u)[0]) > 0.99
    assert span(u, directions) > 0.99  # and nothing that the inputs do not have
    assert randes.compress(base, models, RANK, calibration=moments).bases["weight"].shape[1] == 4


def test_what_layers_answer_is_nearer_than_with_bases_of_deltas_that_are_loud_elsewhere() -> None:
    base = linear(96, 128)
    models = {f"m{number}": finetune(base, number) for number in range(6)}
    moments = randes.calibrate(base, [loud(300, 128)[0]])
    x = loud(100, 128)[0]
    errors = []
    for given in (None, moments):
        sup = randes.compress(base, models, RANK, calibration=given)
        model = randes.SuperposedLinear.from_linear(copy.deepcopy(base), sup, "")
        errors.append(sum((model(x, adapter_names=["m1"] * 100) - models["m1"](x)).square().sum().item() for _ in "1"))
    assert errors[1] < 0.05 * errors[0]


def test_layers_that_multiply_from_the_right_and_fused_ones_are_seen() -> None:
    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out = nn.Linear(40, 96, bias=False), Conv1D(40, 32)

        def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
            q, k, v = self.qkv(scale * x).chunk(3, -1)
            y: Tensor = self.out(q * k + v)
            return y

    torch.manual_seed(0)
    base = Fused()
    models = {f"m{number}": finetune(base, number) for number in range(2)}
    fused = {"*qkv.weight": {f"*{part}.weight": 32 for part in "qkv"}}
    x = loud(50, 40)[0]
    moments = randes.calibrate(base, [(x, 2.0), {"x": x}, [x]])
    torch.testing.assert_close(moments["qkv.weight"], 6 * x.mT @ x)
    sup = randes.compress(base, models, randes.Config(rank=4, fused=fused), calibration=moments)
    assert sup.bases.keys() == {"q.weight", "k.weight", "v.weight", "out.weight"}
    assert torch.equal(sup.bases["q.weight"], sup.bases["v.weight"])
    assert sup.bases["out.weight"].shape == (32, 4)


def test_matrices_that_were_not_seen_take_their_bases_from_the_deltas() -> None:
    base = net()
    models = {f"m{number}": finetune(base, number) for number in range(2)}
    moments = randes.calibrate(base, [tokens(20)])
    del moments["layers.1.up.weight"]
    found, plain = (randes.compress(base, models, RANK, calibration=given).bases for given in (moments, None))
    assert torch.equal(found["layers.1.up.weight"], plain["layers.1.up.weight"])
    assert not torch.equal(found["layers.1.down.weight"], plain["layers.1.down.weight"])


def test_the_module_is_left_as_it_was() -> None:
    base = net()
    before = {name: value.clone() for name, value in base.state_dict().items()}
    randes.calibrate(base, [tokens(2)])
    with pytest.raises(IndexError):
        randes.calibrate(base, [torch.full((1, 6), 11)])
    assert not any(layer._forward_pre_hooks for layer in base.modules())
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    assert all(parameter.grad is None for parameter in base.parameters())


class Nan(Net):
    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.full((1, 32), float("nan")))


@pytest.mark.parametrize(
    ("module", "batches", "message"),
    [
        (net(), [], "batches must call a linear layer of module, got none of its 7 called"),
        (nn.LayerNorm(4), [torch.ones(2, 4)], "batches must call a linear layer of module, got none of its 0 called"),
        (Nan(), [tokens(2)], "batches must give finite inputs to every layer, got others for head.weight"),
    ],
)
def test_what_cannot_be_calibrated_is_refused(module: nn.Module, batches: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        randes.calibrate(module, batches)


def test_a_calibration_that_does_not_fit_is_refused() -> None:
    base = net()
    models = {"a": finetune(base, 1)}
    moments = randes.calibrate(base, [tokens(4)])
    with pytest.raises(ValueError, match=r"config.rank must be 'auto' or above 0, got 0"):
        randes.compress(base, models, randes.Config(rank=0), calibration=moments)
    wrong = {**moments, "layers.0.up.weight": torch.ones(31, 31)}
    with pytest.raises(
        ValueError, match=r"calibration\['layers.0.up.weight'\] must be .* = \(32, 32\), got \(31, 31\)"
    ):
        randes.compress(base, models, calibration=wrong)
    with pytest.raises(
        ValueError, match=r"must be what randes.calibrate found of this base's layers; got none .* in 1 n"
    ):
        randes.compress(base, models, calibration={"weight": torch.ones(3, 3)})
    with pytest.raises(ValueError, match="must be finite"):
        randes.compress(base, models, calibration={**moments, "layers.0.up.weight": torch.full((32, 32), float("nan"))})


def test_an_input_that_is_always_zero_has_no_directions() -> None:
    assert eigenvectors(torch.zeros(6, 6), "weight").shape == (6, 0)
    base = linear()
    moments = randes.calibrate(base, [torch.zeros(3, 32)])
    assert not randes.compress(base, {"a": finetune(base, 1)}, RANK, calibration=moments).bases
    assert calibration.COLUMNS >= 10 * 50
