"""The published method's other options: what each makes of the models, worked out from its formula."""

import copy
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Block, alone, finetune, net, stored, superposed
from torch import Tensor, nn

import randes
from randes.errors import CheckpointError, UnknownModelError
from randes.superposition.integers import STEP
from randes.superposition.summary import predicted, summary, verify

ROTATED = randes.Config(matrix="rotation", rank=0)
PLAIN = randes.Config(signs="none", gains="shared", rank=0)
"""As the published method's identity: deltas are summed as they are."""
OPTIONS = {
    "shared gains": randes.Config(gains="shared", group_size=2, rank=0),
    "from zero": randes.Config(origin="zero", rank=0),
    "a soup": randes.Config(origin="zero", gains="shared", signs="columns", others="sum", rank=0),
    "shifted": randes.Config(shuffle_layers=1, rank=0),
    "shifted, shared gains": randes.Config(shuffle_layers=2, gains="shared", signs="columns", group_size=2, rank=0),
    "every second": randes.Config(every=2, rank=0),
    "one transform": randes.Config(per_layer=False, permute=1, rank=0),
    "summed": randes.Config(others="sum", rank=0),
    "rotated": ROTATED,
    "rotated, one side, shuffled": randes.Config(
        matrix="rotation", signs="none", gains="shared", shuffle_layers=-1, rank=0
    ),
    "rotated, in a basis": randes.Config(matrix="rotation", rank=4, centre=True),
    "diagonal": randes.Config(matrix="diagonal", segments=2, rank=0),
    "diagonal, one transform": randes.Config(
        matrix="diagonal", signs="columns", per_layer=False, gains="shared", rank=0
    ),
    "dense": randes.Config(matrix="dense", group_size=1, rank=0),
    "dense soup": randes.Config(matrix="dense", signs="none", origin="zero", gains="shared", others="sum", rank=0),
}
TOKENS = torch.arange(24).view(4, 6) % 11


@pytest.mark.parametrize("config", OPTIONS.values(), ids=OPTIONS)
def test_each_serves_what_it_retrieves_and_comes_back_to_the_byte(config: randes.Config, tmp_path: Path) -> None:
    base = net()
    tuned = {f"m{number}": finetune(base, number) for number in range(3)}
    sup = randes.compress(copy.deepcopy(base), tuned, config)
    before = stored(sup, tmp_path / "before")
    extra = finetune(base, 9, size=0.4)
    sup.add("extra", extra)
    assert stored(sup, tmp_path / "with") != before
    sup.remove("extra", extra)
    assert stored(sup, tmp_path / "after") == before

    loaded = randes.Superposition.load(tmp_path / "before")
    assert loaded.config == config
    names = list(tuned)
    model = randes.SuperposedModel(copy.deepcopy(base), loaded)
    mixed = [*names, names[0]]
    y = model(TOKENS, adapter_names=mixed)
    for row, name in enumerate(mixed):
        expected = alone(base, sup, name)(TOKENS[row : row + 1])[0]
        torch.testing.assert_close(
            y[row], expected, rtol=1e-4, atol=1e-4 * max(1.0, float(expected.detach().abs().max()))
        )


@pytest.mark.parametrize("name", ["a soup", "one transform", "summed", "rotated", "diagonal", "dense soup"])
def test_the_order_of_adding_does_not_matter(name: str, tmp_path: Path) -> None:
    base = net()
    sup, tuned = superposed(base, 3, OPTIONS[name])
    again = randes.Superposition.create(copy.deepcopy(base), OPTIONS[name])
    for model in reversed(tuned):
        again.add(model, tuned[model])
    assert stored(again, tmp_path / "a") == stored(sup, tmp_path / "b")


def test_the_sum_of_deltas_is_what_identity_and_one_gain_retrieve() -> None:
    base = net()
    models = {f"m{number}": finetune(base, number) for number in range(3)}
    sup = randes.compress(base, models, replace(PLAIN, others="sum"), alpha=0.3)
    own = base.state_dict()
    for name in models:
        retrieved = sup.retrieve(name)
        for tensor, value in own.items():
            total = sum(model.state_dict()[tensor].double() - value.double() for model in models.values())
            expected = (value.double() + 0.3 * total).float()
            step = 3 * 0.3 * STEP * sup.members[name].gains.get(tensor, 0)
            torch.testing.assert_close(retrieved[tensor], expected, rtol=1e-6, atol=step + 1e-7)


def test_a_soup_is_the_mean_of_the_weights_and_has_no_base(tmp_path: Path) -> None:
    base = net()
    models = {f"m{number}": finetune(base, number) for number in range(4)}
    config = replace(PLAIN, origin="zero", others="sum")
    sup = randes.compress(base, models, config, alpha=1 / 4)
    assert not any(sup.base[name].any() for name in sup.superposed)
    for tensor, value in sup.retrieve("m1").items():
        mean = sum(model.state_dict()[tensor].double() for model in models.values()) / 4
        torch.testing.assert_close(value, mean.to(value.dtype), rtol=1e-5, atol=1e-6)
    model = randes.SuperposedModel(copy.deepcopy(base), sup)
    for ask in (lambda: model(TOKENS, adapter_names=["__base__"] * 4), lambda: sup.retrieve("__base__")):
        with pytest.raises(UnknownModelError, match="__base__"):
            ask()
    with pytest.raises(UnknownModelError), model.disable_adapter():
        pass
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))
    with pytest.raises(CheckpointError, match="LoRA adapter"):
        sup.add("lora", tmp_path)


def test_a_layer_alone_answers_from_zero_whatever_its_own_weight_is() -> None:
    base = net()
    sup, _ = superposed(base, 2, randes.Config(origin="zero", rank=0))
    layer = randes.SuperposedLinear.from_linear(base.layers[0].up, sup, "layers.0.up")
    x = torch.ones(2, 32)
    weight = sup.retrieve("m1")["layers.0.up.weight"]
    bias = sup.retrieve("m1")["layers.0.up.bias"]
    torch.testing.assert_close(layer(x, adapter_names=["m1"]), x @ weight.T + bias, rtol=1e-4, atol=1e-4)
    assert base.layers[0].up.weight.any()


def test_a_shared_gain_is_a_function_of_the_base_alone() -> None:
    base = net()
    sup = randes.compress(base, {"a": finetune(base, 0, 0.001), "b": finetune(base, 1, 0.3)}, PLAIN)
    for tensor in sup.superposed:
        gains = {member.gains[tensor] for member in sup.members.values()}
        (gain,) = gains
        size = float(base.state_dict()[tensor].double().square().mean().sqrt())
        assert 1 <= gain / (size * 2**-12) <= 2
        assert math.log2(gain).is_integer()


def test_a_delta_beyond_the_integers_is_refused_with_a_shared_gain() -> None:
    base = net()
    far = copy.deepcopy(base)
    with torch.no_grad():
        far.layers[0].up.weight[0, 0] = 200.0
    sup = randes.Superposition.create(base, PLAIN)
    with pytest.raises(CheckpointError, match="times the gain that models share: too far for int32"):
        sup.add("far", far)
    assert not sup.deltas


class Towers(nn.Module):
    """Two stacks of different depth."""

    def __init__(self) -> None:
        super().__init__()
        self.text = nn.ModuleList(Block(32, 32) for _ in range(3))
        self.vision = nn.ModuleList(Block(32, 48) for _ in range(2))


def test_layers_shift_by_each_models_index_around_their_own_family() -> None:
    torch.manual_seed(0)
    base = Towers()
    models = {name: finetune(base, number) for number, name in enumerate(["z", "a", "m"])}
    sup = randes.compress(base, models, randes.Config(shuffle_layers=1, rank=0))
    assert [sup.members[name].index for name in models] == [0, 1, 2]
    assert sup.place("a", "text.2.up.weight") == "text.0.up.weight"
    assert sup.place("m", "text.2.up.weight") == "text.1.up.weight"
    assert sup.place("a", "vision.1.up.weight") == "vision.0.up.weight"
    assert sup.place("m", "vision.1.up.weight") == "vision.1.up.weight"
    before = sup.retrieve("m")
    sup.remove("a", models["a"])
    assert sup.place("m", "text.2.up.weight") == "text.1.up.weight"
    assert sup.place("z", "text.2.up.weight") == "text.2.up.weight"
    sup.add("new", models["a"])
    assert sup.members["new"].index == 1
    sup.remove("new", models["a"])
    sup.add("a", models["a"])
    assert all(torch.equal(value, sup.retrieve("m")[name]) for name, value in before.items())


def test_an_index_is_stored_where_layers_shift_and_nowhere_else(tmp_path: Path) -> None:
    base = net()
    for config, expected in ((randes.Config(shuffle_layers=1, rank=0), 1), (randes.Config(rank=0), None)):
        folder = tmp_path / str(config.shuffle_layers)
        sup, _ = superposed(base, 2, config)
        sup.save(folder)
        assert json.loads((folder / "manifest.json").read_text())["models"]["m1"].get("index") == expected
        assert randes.Superposition.load(folder).members["m1"].index == (expected or 0)


def test_every_nth_selected_tensor_is_superposed_and_the_rest_is_kept() -> None:
    base = net()
    every = randes.Superposition.create(base).superposed
    in_order = [name for name in base.state_dict() if name in every]
    sup = randes.Superposition.create(base, randes.Config(every=4, rank=0))
    assert sup.superposed == (in_order[3],)
    tuned = finetune(base, 0)
    sup.add("m", tuned)
    assert torch.equal(sup.retrieve("m")[in_order[0]], tuned.state_dict()[in_order[0]])
    with pytest.raises(CheckpointError, match="every = 7"):
        randes.Superposition.create(base, randes.Config(every=7, rank=0))


def test_every_counts_tensors_not_the_parts_they_are_seen_as() -> None:
    base = net()
    fused = {"*.up.weight": {"*.a.weight": 16, "*.b.weight": 32}}
    config = randes.Config(every=2, fused=fused, min_width=16, rank=0)
    assert set(randes.Superposition.create(base, config).superposed) == {
        f"layers.{number}.down.weight" for number in range(3)
    }
    sup = randes.Superposition.create(base, replace(config, every=5))
    assert sup.superposed == ("layers.2.a.weight", "layers.2.b.weight")


def test_one_transform_turns_every_tensor() -> None:
    base = net()
    with torch.no_grad():
        for layer in base.layers:
            layer.up.weight.copy_(base.layers[0].up.weight)
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for layer in tuned.layers:
            layer.up.weight += 0.05 * torch.eye(48, 32)
    own, same = (randes.compress(base, {"m": tuned}, randes.Config(per_layer=each, rank=0)) for each in (True, False))
    first, second = "layers.0.up.weight", "layers.1.up.weight"
    assert torch.equal(same.deltas[0][first], same.deltas[0][second])
    assert not torch.equal(own.deltas[0][first], own.deltas[0][second])


def test_alpha_is_every_models() -> None:
    base = net()
    models = {"a": finetune(base, 0), "b": finetune(base, 1)}
    sup = randes.compress(base, models, alpha=0.25)
    assert {member.alpha for member in sup.members.values()} == {0.25}
    with pytest.raises(ValueError, match=r"^alpha must be a finite number"):
        randes.compress(base, models, alpha=math.nan)
    centred = randes.compress(base, models, randes.Config(centre=True, rank=0), alpha=0.25)
    assert centred.members["__base__"].alpha == 1.0


def test_sums_have_each_models_alpha_when_served() -> None:
    base = net()
    sup = randes.Superposition.create(copy.deepcopy(base), randes.Config(others="sum", rank=0))
    for name, alpha in (("a", 0.5), ("b", 2.0), ("c", 0.5)):
        sup.add(name, finetune(base, ord(name)), alpha=alpha)
    model = randes.SuperposedModel(copy.deepcopy(base), sup)
    names = ["a", "b", "c", "__base__"]
    y = model(TOKENS, adapter_names=names)
    for row, name in enumerate(names):
        torch.testing.assert_close(y[row], alone(base, sup, name)(TOKENS[row : row + 1])[0], rtol=1e-4, atol=1e-4)
    assert summary(sup)["coverage"]["summed"]


def test_half_precision_serves_deltas_of_any_size_beside_their_shared_gain() -> None:
    base = net(dtype=torch.float16)
    sup, _ = superposed(base, 2, randes.Config(gains="shared", origin="zero", rank=0), size=2.0)
    model = randes.SuperposedModel(copy.deepcopy(base), sup)
    layer = model.base_model.layers[0].up
    assert 1 <= float(layer.pool.values.abs().max()) <= 8
    x = 100 * torch.ones(2, 32, dtype=torch.float16)
    y = layer(x, adapter_names=["m0", "m1"])
    for row, name in enumerate(["m0", "m1"]):
        own = sup.retrieve(name)
        expected = x[row].float() @ own["layers.0.up.weight"].float().T + own["layers.0.up.bias"].float()
        torch.testing.assert_close(y[row].float(), expected, rtol=0.01, atol=2.0)


@pytest.mark.parametrize("matrix", ["rotation", "diagonal", "dense"])
def test_every_kind_of_layer_serves_mixed_columns(matrix: Any) -> None:
    """An embedding by row, a convolution by window, a fused weight by part."""
    base = Kinds()
    config = randes.Config(
        matrix=matrix, include=("*weight",), exclude=(), embeddings="shared", min_width=8,
        fused={"*.fused.weight": {"*.a.weight": 16, "*.b.weight": 16}},
    )  # fmt: skip
    sup, _ = superposed(base, 2, config)
    assert len(sup.superposed) == 4
    model = randes.SuperposedModel(copy.deepcopy(base), sup)
    names = ["m0", "__base__", "m1", "m0"]
    y = model(TOKENS, adapter_names=names)
    for row, name in enumerate(names):
        expected = alone(base, sup, name)(TOKENS[row : row + 1])[0]
        torch.testing.assert_close(
            y[row], expected, rtol=1e-4, atol=1e-4 * max(1.0, float(expected.detach().abs().max()))
        )


class Kinds(nn.Module):
    """(B, T) tokens to (B, T, 32)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens = nn.Embedding(12, 16)
        self.window = nn.Conv1d(16, 16, 3, padding=1)
        self.inner = nn.ModuleDict({"fused": nn.Linear(16, 32)})

    def forward(self, tokens: Tensor) -> Tensor:
        return self.inner["fused"](self.window(self.tokens(tokens).mT).mT)


@pytest.mark.parametrize("matrix", ["rotation", "dense"])
def test_one_compiled_program_serves_every_mix(matrix: Any) -> None:
    base = net()
    sup, _ = superposed(base, 2, randes.Config(matrix=matrix, rank=0))
    model = randes.SuperposedModel(copy.deepcopy(base), sup)
    layer = model.base_model.layers[0].up
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    x = torch.randn(4, 32)
    for names in (["m0", "m1", "m0", "__base__"], ["m1"] * 4):
        batch = model.batch(names)
        with model.using(batch):
            torch.testing.assert_close(compiled(x), layer(x), rtol=1e-5, atol=1e-5)


def test_a_dense_matrix_too_wide_for_its_inverse_is_refused_with_its_size() -> None:
    base = {"wide.weight": torch.ones(32, 5000)}
    with pytest.raises(CheckpointError, match=r"at most 4096 columns with matrix=\"dense\", got 5000: .* 0.1 GB"):
        randes.Superposition.create(base, randes.Config(matrix="dense", rank=0))


def test_half_a_model_keeps_fp32_inverses() -> None:
    base = net()
    sup, _ = superposed(base, 2, randes.Config(matrix="dense", rank=0))
    layer = randes.SuperposedModel(copy.deepcopy(base), sup).half().base_model.layers[0].up
    assert layer.inverses.dtype == torch.float32
    assert torch.isfinite(layer(torch.ones(1, 32, dtype=torch.float16), adapter_names=["m0"])).all()


def test_plan_counts_the_inverses_of_dense_matrices() -> None:
    base = net()
    plain, dense = (randes.plan(base, 3, randes.Config(matrix=matrix, rank=0)) for matrix in ("signs", "dense"))
    assert dense[0].serving - plain[0].serving == 3 * sum(
        4 * base.state_dict()[name].shape[1] ** 2 for name in randes.Superposition.create(base).superposed
    )


def test_a_function_chooses_and_its_names_are_kept(tmp_path: Path) -> None:
    base = net()
    sup = randes.Superposition.create(base, randes.Config(include=lambda name, shape: ".1." in name and shape[0] == 48))
    assert sup.superposed == ("layers.1.up.weight",)
    assert sup.config.include == ("layers.1.up.weight",)
    sup.save(tmp_path)
    assert randes.Superposition.load(tmp_path).superposed == sup.superposed
    odd = {"a[0].weight": torch.ones(32, 32), "a0.weight": torch.ones(32, 32)}
    config = randes.Superposition.create(odd, randes.Config(include=lambda name, _: "[" in name)).config
    assert randes.Superposition.create(odd, config).superposed == ("a[0].weight",)


VECTORS = randes.Config(vectors=True, include=("*",), exclude=("temperature", "head.*"), rank=0)


@pytest.mark.parametrize(
    "config",
    [
        VECTORS,
        replace(VECTORS, origin="zero", gains="shared"),
        replace(VECTORS, matrix="rotation", centre=True, rank=2),
        replace(VECTORS, shuffle_layers=1, others="base"),
    ],
    ids=["from the base", "from zero", "centred", "shifted"],
)
def test_vectors_are_superposed_as_rows_and_served_as_they_come_back(config: randes.Config, tmp_path: Path) -> None:
    base = net()
    tuned = {f"m{number}": finetune(base, number) for number in range(3)}
    sup = randes.compress(copy.deepcopy(base), tuned, config)
    assert {"layers.0.norm.bias", "layers.2.up.bias", "norm.weight"} <= set(sup.superposed)
    retrieved = sup.retrieve("m1")
    for name, value in tuned["m1"].state_dict().items():
        assert retrieved[name].shape == value.shape
    sup.save(tmp_path)
    loaded = randes.Superposition.load(tmp_path)
    assert all(torch.equal(value, loaded.retrieve("m1")[name]) for name, value in retrieved.items())
    extra = finetune(base, 7)
    before = stored(loaded, tmp_path / "a")
    loaded.add("extra", extra)
    loaded.remove("extra", extra)
    assert stored(loaded, tmp_path / "b") == before
    model = randes.SuperposedModel(copy.deepcopy(base), loaded)
    names = ["m0", "m1", "m2", "m1"]
    y = model(TOKENS, adapter_names=names)
    for row, name in enumerate(names):
        expected = alone(base, sup, name)(TOKENS[row : row + 1])[0]
        torch.testing.assert_close(y[row], expected, rtol=1e-4, atol=1e-4)


def test_one_superposed_vector_alone_comes_back_exactly_but_for_rounding() -> None:
    base = net()
    tuned = finetune(base, 0)
    sup = randes.compress(base, {"m": tuned}, VECTORS)
    found, wanted = sup.retrieve("m")["norm.weight"], tuned.state_dict()["norm.weight"]
    torch.testing.assert_close(found, wanted, rtol=0, atol=2 * STEP * sup.members["m"].gains["norm.weight"])
    layer = randes.SuperposedLinear.from_linear(base.layers[0].up, sup, "layers.0.up")
    x = torch.ones(1, 32)
    torch.testing.assert_close(layer(x, adapter_names=["m"]), tuned.layers[0].up(x).detach(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("matrix", ["signs", "rotation", "diagonal", "dense"])
def test_the_error_is_the_predicted_one(matrix: Any) -> None:
    base = net()
    tuned = {f"m{number}": finetune(base, number) for number in range(3)}
    sup = randes.compress(base, tuned, randes.Config(matrix=matrix, rank=0))
    found = verify(sup, "m1", tuned["m1"])
    assert found.relative_error == pytest.approx(found.predicted_error, rel=0.3)
    assert (found.predicted_error > 2) == (matrix in ("diagonal", "dense"))


@pytest.mark.parametrize(
    ("matrix", "rank"), [("signs", 4), ("rotation", 4), ("diagonal", 4), ("diagonal", 0), ("dense", 0)]
)
def test_the_error_is_the_predicted_one_where_gains_say_nothing_of_deltas(matrix: Any, rank: int) -> None:
    base = net()
    tuned = {f"m{number}": finetune(base, number) for number in range(3)}
    sup = randes.compress(base, tuned, randes.Config(matrix=matrix, rank=rank, gains="shared"))
    found, weights = verify(sup, "m1", tuned["m1"]), tuned["m1"].state_dict()
    assert found.relative_error == pytest.approx(found.predicted_error, rel=0.3)
    for tensor in sup.members["m1"].gains:
        size = float((weights[tensor].double() - sup.base[tensor].double()).square().sum())
        assert predicted(sup, "m1", tensor, 3)[0] == pytest.approx(size, rel=0.3)


@pytest.mark.parametrize(
    "config",
    [
        replace(VECTORS, gains="shared", others="sum"),
        randes.Config(matrix="dense", shuffle_layers=1, group_size=2, rank=0),
        randes.Config(matrix="rotation", origin="zero", gains="shared", others="sum", rank=0),
    ],
    ids=["vectors and sums", "dense, shifted", "rotated from zero"],
)
def test_models_join_and_leave_while_they_are_served(config: randes.Config) -> None:
    base = net()
    sup, tuned = superposed(base, 2, config)
    model = randes.SuperposedModel(copy.deepcopy(base), sup, capacity=4)

    def agrees(names: list[str]) -> None:
        y = model(TOKENS[: len(names)], adapter_names=names)
        for row, name in enumerate(names):
            expected = alone(base, sup, name)(TOKENS[row : row + 1])[0].detach()
            torch.testing.assert_close(y[row], expected, rtol=1e-4, atol=1e-4 * max(1.0, float(expected.abs().max())))

    agrees(["m0", "m1"])
    model.add_adapter("m2", finetune(base, 2))
    agrees(["m0", "m1", "m2"])
    model.delete_adapter("m0", tuned["m0"])
    agrees(["m1", "m2"])
    model.add_adapter("m3", finetune(base, 3))
    agrees(["m3", "m1", "m2"])
    with pytest.raises(ValueError, match=r"^index must be"):
        randes.Superposition.create(base, randes.Config(shuffle_layers=1, rank=0)).add("x", tuned["m0"], index=-1)
