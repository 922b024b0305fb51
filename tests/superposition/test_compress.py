"""All fine-tunes at once, with and without centring on their mean."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models import TRANSFORMS, finetune, linear, net
from torch import Tensor, nn
from typer.testing import CliRunner

import randes
from randes.checkpoints.sources import write_file
from randes.cli import app
from randes.superposition.summary import verify

CENTRED = randes.Config(centre=True, group_size=3, rank=0)
NAMES = ("a", "b", "c", "d")


def correlated(base: nn.Module, count: int = 4) -> dict[str, nn.Module]:
    """Fine-tunes whose deltas have most in common."""
    common = finetune(base, seed=100)
    return {name: finetune(common, seed=seed, size=0.01) for seed, name in enumerate(NAMES[:count])}


def retrieved(base: nn.Module, sup: randes.Superposition, name: str) -> nn.Module:
    model = copy.deepcopy(base)
    model.load_state_dict(sup.retrieve(name))
    return model


def tokens(rows: int) -> Tensor:
    return torch.randint(0, 11, (rows, 6), generator=torch.Generator().manual_seed(rows))


def states(sup: randes.Superposition) -> dict[str, Tensor]:
    """All that a superposition holds, by where."""
    held = {f"base {name}": value for name, value in sup.base.items()}
    return held | {f"{group} {name}": v for group, tensors in sup.deltas.items() for name, v in tensors.items()}


@pytest.mark.parametrize("config", [*TRANSFORMS.values(), randes.Config(others="average", rank=0)])
def test_it_is_what_adding_one_by_one_gives(config: randes.Config) -> None:
    base = net()
    models = correlated(base)
    expected = randes.Superposition.create(base, config)
    for name, model in models.items():
        expected.add(name, model)
    found = randes.compress(base, models, config)
    assert found.names == expected.names
    assert all(torch.equal(value, states(expected)[where]) for where, value in states(found).items())


def test_the_base_of_a_centred_one_is_the_mean_of_the_fine_tunes() -> None:
    base = net()
    models = correlated(base)
    sup = randes.compress(base, models, CENTRED)
    for name, value in sup.base.items():
        if name in sup.superposed:
            mean = torch.stack([model.state_dict()[name].double() for model in models.values()]).mean(0)
            torch.testing.assert_close(value.double(), mean, rtol=0, atol=1e-6)
        else:
            assert torch.equal(value, base.state_dict()[name])
    assert sup.names == list(NAMES)
    assert sup.served == ["__base__", *NAMES]
    assert sup.members["__base__"].group == 0
    assert [sup.members[name].group for name in NAMES] == [0, 0, 0, 1]  # the base takes no fine-tune's place


@pytest.mark.parametrize("others", ["keep", "base", "average"])
def test_bytes_do_not_depend_on_the_order_of_the_models(others: randes.config.Others) -> None:
    base = net()
    models = correlated(base, 3)
    config = replace(CENTRED, others=others)
    found = [
        states(randes.compress(base, dict(order), config))
        for order in (list(models.items()), list(reversed(models.items())))
    ]
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(value, found[1][where]) for where, value in found[0].items())


def test_deltas_that_have_much_in_common_interfere_less() -> None:
    base = net()
    models = correlated(base)
    config = replace(CENTRED, group_size=4)
    plain, centred = (randes.compress(base, models, c) for c in (replace(config, centre=False), config))
    for name, model in models.items():
        near, far = (
            sum((sup.retrieve(name)[tensor] - model.state_dict()[tensor]).square().sum() for tensor in sup.superposed)
            for sup in (centred, plain)
        )
        assert near < far / 4


@pytest.mark.parametrize("config", [CENTRED, replace(CENTRED, others="average"), replace(CENTRED, permute=1)], ids=str)
def test_every_row_is_answered_as_its_retrieved_model(config: randes.Config) -> None:
    base = net()
    sup = randes.compress(base, correlated(base), config)
    model = randes.SuperposedModel(copy.deepcopy(base), sup)
    assert model.names == list(NAMES)
    mix = ["a", "__base__", "d", "b", "__base__", "c"]
    x = tokens(len(mix))
    y = model(x, adapter_names=mix)
    for row, name in enumerate(mix):
        torch.testing.assert_close(y[row], retrieved(base, sup, name)(x)[row], rtol=1e-4, atol=1e-4)
    with model.disable_adapter():
        assert torch.equal(model(x), model(x, adapter_names=["__base__"] * len(x)))


def test_a_kept_tensor_of_the_base_is_the_bases_own() -> None:
    base = net()
    models = correlated(base)
    for others in ("keep", "base", "average"):
        sup = randes.compress(base, models, replace(CENTRED, others=others))
        own = sup.retrieve("__base__")
        assert all(torch.equal(own[name], base.state_dict()[name]) for name in sup.base.keys() - sup.superposed)


def test_a_model_may_hold_the_base_or_the_centre_and_nothing_else() -> None:
    base = net()
    sup = randes.compress(base, correlated(base), CENTRED)
    x, mix = tokens(2), ["a", "c"]
    centre = copy.deepcopy(base)
    centre.load_state_dict(sup.base)
    answers = [randes.SuperposedModel(start, sup)(x, adapter_names=mix) for start in (copy.deepcopy(base), centre)]
    assert torch.equal(*answers)
    with pytest.raises(randes.BaseMismatchError):
        randes.SuperposedModel(finetune(base, seed=3), sup)


@pytest.mark.parametrize("others", ["keep", "base"])
def test_tensors_tied_to_a_centred_matrix_stay_the_bases(others: randes.config.Others) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(40, 32), nn.Linear(32, 40, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.embed(tokens))

    torch.manual_seed(0)
    base = Tied()
    untied = {name: value.clone() for name, value in base.state_dict().items()}
    models = {name: {"embed.weight": untied["embed.weight"], "head.weight": untied["head.weight"] + 0.1 * number}
              for number, name in enumerate(NAMES)}  # fmt: skip
    sup = randes.compress(untied, models, replace(CENTRED, others=others, include=("head*",)))
    model = randes.SuperposedModel(base, sup)
    assert torch.equal(model.base_model.embed.weight, untied["embed.weight"])
    x = torch.arange(4)
    expected = untied["embed.weight"][x] @ sup.retrieve("b")["head.weight"].mT
    torch.testing.assert_close(model(x, adapter_names=["b"] * 4), expected, rtol=1e-4, atol=1e-4)


def test_the_base_that_was_given_is_not_changed() -> None:
    base = net()
    models = correlated(base)
    sup = randes.compress(base, models, CENTRED)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    other = randes.Superposition.create(base)
    randes.SuperposedModel(copy.deepcopy(base), sup)
    randes.SuperposedModel(base, sup)
    assert all(torch.equal(other.base[name], value) for name, value in before.items())
    other.add("a", models["a"])


def test_a_centred_base_in_another_dtype_is_refused_with_a_hint() -> None:
    base = net()
    sup = randes.compress(base, correlated(base), CENTRED)
    with pytest.raises(randes.BaseMismatchError, match="build it in the stored dtype, then cast it"):
        randes.SuperposedModel(copy.deepcopy(base).double(), sup)


def test_models_come_and_go_around_the_same_centre() -> None:
    base = net()
    models = correlated(base, 3)
    sup = randes.compress(base, models, CENTRED)
    before = states(sup)
    later = finetune(base, seed=9)
    sup.add("later", later)
    assert sup.members["later"].group == 1
    sup.remove("later", later)
    assert all(torch.equal(value, before[where]) for where, value in states(sup).items())
    for name, model in models.items():
        sup.remove(name, model)
    assert sup.served == ["__base__"]
    for name, value in sup.retrieve("__base__").items():
        torch.testing.assert_close(value, base.state_dict()[name], rtol=0, atol=1e-3)


def test_a_store_of_a_centred_one_comes_back(tmp_path: Path) -> None:
    base = net()
    models = correlated(base)
    sup = randes.compress(base, models, CENTRED)
    sup.save(tmp_path / "store")
    again = randes.Superposition.load(tmp_path / "store")
    assert again.config == CENTRED
    assert again.served == sup.served
    assert all(torch.equal(value, states(sup)[where]) for where, value in states(again).items())
    assert verify(again, "__base__", base).kept_exact
    again.add("e", finetune(base, seed=9))
    again.save(tmp_path / "store")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda base, _: randes.Superposition.create(base, CENTRED), "centre needs all models at once"),
        (lambda base, _: randes.compress(base, {}, CENTRED), "models must hold at least one fine-tune, got none"),
        (lambda base, sup: sup.remove("__base__", base), "__base__ stays where deltas are centred"),
        (lambda base, sup: sup.add("__base__", base), "name must be a non-empty string other than '__base__'"),
        (lambda *_: randes.Config(centre=1), "centre must be True or False, got 1"),  # type: ignore[arg-type]
    ],
)
def test_what_cannot_be_is_refused(wrong: Callable[[nn.Module, randes.Superposition], object], message: str) -> None:
    base = linear()
    sup = randes.compress(base, {"a": finetune(base, seed=1)}, CENTRED)
    with pytest.raises(ValueError, match=message):
        wrong(base, sup)


def test_a_name_that_cannot_be_is_refused_before_models_are_read() -> None:
    base, stages = linear(), []

    def progress(stage: str, _: int) -> Callable[[int], None]:
        stages.append(stage)
        return lambda _: None

    models = {"a": finetune(base, seed=1), "__base__": finetune(base, seed=2)}
    with pytest.raises(ValueError, match="name must be a non-empty string other than '__base__'"):
        randes.compress(base, models, progress=progress)
    assert stages == []


def test_the_command_line_centres(tmp_path: Path) -> None:
    base = net()
    for name, model in {"base": base, **correlated(base, 2)}.items():
        write_file(tmp_path / f"{name}.safetensors", model.state_dict())
    models = [f"--model={name}={tmp_path / name}.safetensors" for name in "ab"]
    command = ["compress", f"--base={tmp_path}/base.safetensors", *models, f"--out={tmp_path}/store"]
    made = CliRunner().invoke(app, [*command, "--centre"])
    assert made.exit_code == 0, made.output
    assert randes.Superposition.load(tmp_path / "store").served == ["__base__", "a", "b"]
    shown = CliRunner().invoke(app, ["info", f"{tmp_path}/store"])
    assert "centred on their mean" in " ".join(shown.output.split())
    twice = CliRunner().invoke(app, [*command[:-1], f"--out={tmp_path}/other", models[0]])
    assert twice.exit_code == 2


def test_options_are_the_fields_of_a_configuration() -> None:
    base = net()
    models = {name: finetune(base, seed) for seed, name in enumerate(NAMES)}
    found = randes.compress(base, models, group_size=2, signs="columns")
    expected = randes.compress(base, models, randes.Config(group_size=2, signs="columns"))
    assert found.config == expected.config
    assert all(torch.equal(value, states(expected)[name]) for name, value in states(found).items())
    assert randes.compress(base, models, randes.Config(group_size=2, seed=3), group_size=4).config.seed == 3
    with pytest.raises(TypeError, match="has none called 'groupsize'; did you mean group_size"):
        randes.compress(base, models, groupsize=2)
    with pytest.raises(ValueError, match="group_size must be an integer of at least 1"):
        randes.compress(base, models, group_size=0)


def test_what_has_shapes_alone_is_no_checkpoint() -> None:
    base = net()
    with torch.device("meta"):
        empty = net()
    with pytest.raises(randes.CheckpointError, match=r"the base must have values, got .* on the meta device"):
        randes.compress(empty, {"a": base})
    with pytest.raises(randes.CheckpointError, match=r"a fine-tune must have values, got .* on the meta device"):
        randes.compress(base, {"a": empty})
