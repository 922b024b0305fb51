"""What a model is besides its matrices: norms, embeddings, heads and buffers, each row's own."""

import copy
from typing import Any

import pytest
import torch
from models import Scaled, alone, finetune, linear, plain_names, superposed
from torch import Tensor, nn

import randes

CLOSE: dict[str, float] = {"rtol": 1e-4, "atol": 1e-4}
MIX = ["m1", "__base__", "m0", "m1"]


class Around(nn.Module):
    """A layer between two superposed ones, or behind an index."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.linear = linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if not x.is_floating_point() else self.layer(self.linear(x))


def served(
    layer: nn.Module, config: randes.Config | None = None
) -> tuple[randes.SuperposedModel, randes.Superposition, nn.Module, dict[str, nn.Module]]:
    base = Around(layer)
    sup, tuned = superposed(base, 2, config, size=0.3)
    return randes.SuperposedModel(copy.deepcopy(base), sup), sup, base, tuned


def check(layer: nn.Module, x: Tensor, config: randes.Config | None = None) -> None:
    """Mixed, one model at a time, and as the base, against plain models that run alone."""
    model, sup, base, _ = served(layer, config)
    plain = {name: alone(base, sup, name) for name in {*MIX}}
    for names in (MIX, ["m0"] * len(x), ["__base__"] * len(x)):
        y = model(x, adapter_names=names)
        expected = torch.cat([plain[name](row[None]) for name, row in zip(names, x, strict=True)])
        assert y.dtype == expected.dtype
        torch.testing.assert_close(y, expected, **CLOSE)
    assert not x.numel() or not torch.allclose(model(x, adapter_names=["m0"] * len(x)), plain["m1"](x), atol=0.1)


def floats(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("others", ["keep", "base", "average"])
@pytest.mark.parametrize("shape", [(4, 32), (4, 3, 32), (4, 2, 3, 32), (4, 0, 32)])
@pytest.mark.parametrize(
    "layer",
    [
        nn.LayerNorm(32), nn.LayerNorm(32, bias=False), nn.LayerNorm(32, elementwise_affine=False),
        nn.RMSNorm(32), nn.RMSNorm(32, eps=0.1), nn.RMSNorm(32, elementwise_affine=False),
        nn.Linear(32, 5), nn.Linear(32, 5, bias=False),
    ],
    ids=str,
)  # fmt: skip
def test_every_row_goes_through_its_models_own_layer(layer: nn.Module, shape: tuple[int, ...], others: Any) -> None:
    check(layer, floats(*shape), randes.Config(others=others))


@pytest.mark.parametrize("layer", [nn.LayerNorm((3, 32)), nn.RMSNorm((3, 32))], ids=str)
def test_norms_over_several_dimensions_are_routed(layer: nn.Module) -> None:
    check(layer, floats(4, 3, 32))
    check(layer, floats(4, 2, 3, 32))


@pytest.mark.parametrize("shape", [(4, 1), (4, 6), (4, 2, 3)])
def test_every_token_is_looked_up_in_its_rows_own_table(shape: tuple[int, ...]) -> None:
    tokens = torch.randint(0, 9, shape, generator=torch.Generator().manual_seed(1))
    check(nn.Embedding(9, 6), tokens)


def test_tokens_without_a_batch_are_refused_in_a_mix() -> None:
    # Positions 0 to 3 of a batch of four rows look like one token a row: no way to tell, so no guess.
    model, _, _, _ = served(nn.Embedding(9, 6))
    with pytest.raises(ValueError, match="first dimension must be the batch"):
        model(torch.arange(4), adapter_names=MIX)


@pytest.mark.parametrize("eps", [None, 1e-6])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_norms_of_low_precision_agree_with_the_plain_ones(dtype: torch.dtype, eps: float | None) -> None:
    tolerance = 4 * torch.finfo(dtype).eps
    for layer in (nn.LayerNorm(32), nn.RMSNorm(32, eps=eps)):
        base = nn.Sequential(layer, nn.Linear(32, 32)).to(dtype)
        sup, _ = superposed(base, 2, size=0.3)
        model = randes.SuperposedModel(copy.deepcopy(base), sup)
        x = (1e-2 * floats(4, 32)).to(dtype)
        with model.router.during(model.router.of(MIX)):
            mixed = model.base_model[0](x)
        plain = torch.cat([alone(base, sup, name)[0](row[None]) for name, row in zip(MIX, x, strict=True)])
        torch.testing.assert_close(mixed, plain, rtol=tolerance, atol=tolerance)


def test_a_layer_that_only_one_model_changed_is_the_bases_for_the_other() -> None:
    base = Around(nn.LayerNorm(32))
    sup, _ = superposed(base, 1)
    sup.add("m1", base.state_dict() | {"linear.weight": finetune(base, 3).state_dict()["linear.weight"]})
    model = randes.SuperposedModel(copy.deepcopy(base), sup)
    x = floats(4, 32)
    expected = torch.cat([alone(base, sup, name)(row[None]) for name, row in zip(MIX, x, strict=True)])
    torch.testing.assert_close(model(x, adapter_names=MIX), expected, **CLOSE)


class Tied(nn.Module):
    """Reads its embedding's table itself, as a tied head does."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 32)
        self.linear = linear(32, 32)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.linear(self.embed(tokens)) @ self.embed.weight.T


def test_a_table_that_is_read_without_its_layer_is_never_the_bases() -> None:
    base = Tied()
    sup, _ = superposed(base, 2, size=0.3)
    model = randes.SuperposedModel(copy.deepcopy(base), sup)
    tokens = torch.tensor([[1, 2], [3, 4]])
    try:
        y = model(tokens, adapter_names=["m0", "m0"])
    except ValueError:
        return  # refused is as good
    torch.testing.assert_close(y, alone(base, sup, "m0")(tokens), **CLOSE)


class Attributes(nn.Module):
    """Parameters and attributes under names that a dictionary or a router has too."""

    def __init__(self) -> None:
        super().__init__()
        self.keys = nn.Parameter(torch.ones(32))
        self.values = nn.Parameter(torch.zeros(32))
        self.router = nn.Linear(32, 32)
        self.tables = 3

    def forward(self, x: Tensor) -> Tensor:
        return self.router(x) * self.keys * self.tables + self.values


def test_a_layers_own_attributes_are_left_alone() -> None:
    mixed_and_alone(Attributes(), floats(4, 32))


def mixed_and_alone(layer: nn.Module, x: Tensor) -> None:
    """Right for one model, for the base, and for a mix, which is then forgotten."""
    model, sup, base, tuned = served(layer)
    assert repr(model)
    for _ in range(2):
        for name in ("m0", "m1", "__base__"):
            torch.testing.assert_close(model(x, adapter_names=[name] * 4), alone(base, sup, name)(x), **CLOSE)
        expected = torch.cat([alone(base, sup, name)(row[None]) for name, row in zip(MIX, x, strict=True)])
        torch.testing.assert_close(model(x, adapter_names=MIX), expected, **CLOSE)
        with pytest.raises(RuntimeError, match="no model is chosen"):
            model(x)
    model.set_adapter("m1")
    torch.testing.assert_close(copy.deepcopy(model)(x), alone(base, sup, "m1")(x), **CLOSE)
    torch.testing.assert_close(model.double()(x.double()), alone(base, sup, "m1").double()(x.double()), **CLOSE)
    assert plain_names(model) == base.state_dict().keys()
    assert tuned.keys() == {"m0", "m1"}


@pytest.mark.parametrize(
    "layer", [Scaled(), nn.PReLU(32), nn.Bilinear(32, 32, 4), nn.BatchNorm1d(32), nn.Conv1d(32, 4, 1)], ids=str
)
def test_any_layer_of_tensors_is_run_for_each_model_on_its_rows(layer: nn.Module) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = layer

        def forward(self, x: Tensor) -> Tensor:
            if isinstance(layer, nn.Bilinear):
                return self.inner(x, x)
            return self.inner(x[..., None]) if isinstance(layer, nn.Conv1d) else self.inner(x)

    base = Twice().eval()
    model, sup, around, _ = served(base)
    around.eval()
    model.eval()
    x = floats(4, 32)
    for name in ("m0", "m1", "__base__"):
        torch.testing.assert_close(model(x, adapter_names=[name] * 4), alone(around, sup, name)(x), **CLOSE)
    expected = torch.cat([alone(around, sup, name)(row[None]) for name, row in zip(MIX, x, strict=True)])
    torch.testing.assert_close(model(x, adapter_names=MIX), expected, **CLOSE)
    with pytest.raises(RuntimeError, match="no model is chosen"):
        model(x)


def test_a_model_can_be_printed_before_a_model_is_chosen() -> None:
    for layer in (nn.Conv1d(32, 4, 1), nn.BatchNorm1d(32), nn.LayerNorm(32), nn.Linear(32, 4), Scaled()):
        assert type(layer).__name__ in repr(served(layer)[0])


class Recurrent(nn.Module):
    """An LSTM, which keeps its weights in a list beside its parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = linear(32, 32)
        self.rnn = nn.LSTM(32, 6, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(self.linear(x))[0]


def test_recurrent_layers_serve_one_model_at_a_time() -> None:
    base = Recurrent()
    sup, _ = superposed(base, 2, size=0.3)
    model = randes.SuperposedModel(copy.deepcopy(base), sup)
    x = floats(4, 3, 32)
    for name in ("m0", "m1", "__base__", "m0"):
        torch.testing.assert_close(model(x, adapter_names=[name] * 4), alone(base, sup, name)(x), **CLOSE)
    with pytest.raises(ValueError, match="a RoutedLSTM with tensors kept per model must return tensors"):
        model(x, adapter_names=MIX)


class Buffered(nn.Module):
    """Scales by buffers, one of integers."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(32))
        self.register_buffer("power", torch.tensor(1))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.scale) ** self.power


@pytest.mark.parametrize("others", ["keep", "base", "average"])
def test_buffers_that_nobody_changed_do_not_stand_in_the_way_of_a_mix(others: Any) -> None:
    check(Buffered(), floats(4, 32), randes.Config(others=others))


def test_buffers_that_a_model_changed_are_its_own() -> None:
    base = Around(Buffered())
    tuned = finetune(base, 1)
    tuned.layer.scale.fill_(2.5)
    tuned.layer.power.fill_(2)
    sup = randes.Superposition.create(base)
    sup.add("m", tuned)
    model = randes.SuperposedModel(copy.deepcopy(base), sup)
    x = floats(4, 32)
    torch.testing.assert_close(model(x, adapter_names=["m"] * 4), alone(base, sup, "m")(x), **CLOSE)
    assert torch.equal(model(x, adapter_names=["__base__"] * 4), base(x))
    mixed = model(x, adapter_names=["m", "m", "m", "__base__"])
    torch.testing.assert_close(mixed, torch.cat((alone(base, sup, "m")(x[:3]), base(x[3:]))), **CLOSE)


def test_a_norm_that_sees_something_else_than_the_batch_first_refuses() -> None:
    model, _, _, _ = served(nn.LayerNorm(32))
    wrong = pytest.raises(ValueError, match=r"names 4 rows, but a layer's input is \(3, 4, 32\)")
    with wrong, model.router.during(model.router.of(MIX)):
        model.base_model.layer(floats(3, 4, 32))


def test_gradients_reach_the_base_through_its_own_rows_alone() -> None:
    model, _, base, _ = served(nn.LayerNorm(32))
    x = floats(4, 32)
    model(x, adapter_names=MIX).square().sum().backward()
    base(x[1:2]).square().sum().backward()  # the only row of the base
    grad = dict(model.base_model.named_parameters())["layer.base_weight"].grad
    torch.testing.assert_close(grad, base.layer.weight.grad, rtol=1e-4, atol=1e-4)


def test_an_embedding_looks_up_one_number_and_none() -> None:
    model, sup, base, _ = served(nn.Embedding(40, 32))
    for tokens in (torch.tensor(7), torch.tensor([3, 4]), torch.zeros(0, dtype=torch.long)):
        with model.using(["m1"]):
            own = alone(base, sup, "m1").layer(tokens)
            assert torch.equal(model.base_model.layer(tokens), own)
            assert own.shape == (*tokens.shape, 32)


class Leaves(nn.Module):
    """Does something beside returning its answer."""

    def __init__(self, does: str) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(32))
        self.inner = nn.Identity()
        self.does, self.seen, self.skip, self.held = does, 0, None, torch.zeros(32)
        self.past: list[Tensor] = []

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        self.seen += 1
        if self.does == "its input":
            x += self.gain
            return x
        if self.does == "a view of its input":
            x[:, 0].zero_()
        if self.does == "a later input":
            assert mask is not None
            mask.mul_(self.gain)
        if self.does == "skip":
            self.skip = x * self.gain
        if self.does == "past":
            self.past.append(x)
        if self.does == "held":
            self.held.add_(x.detach().sum(0))
        if self.does == "inner.skip":
            self.inner.skip = (x,)
        return x * self.gain


class GivesMask(nn.Module):
    def __init__(self, does: str) -> None:
        super().__init__()
        self.linear, self.layer = linear(32, 32), Leaves(does)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(1 * self.linear(x), mask=torch.ones_like(x))


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(
    "does", ["its input", "a view of its input", "a later input", "skip", "past", "held", "inner.skip", "nothing"]
)
def test_what_a_layer_does_beside_its_answer_is_not_lost_in_a_mix(does: str, mode: Any) -> None:
    base = GivesMask(does)
    sup, _ = superposed(base, 2, size=0.3)
    model, x = randes.SuperposedModel(copy.deepcopy(base), sup), floats(4, 32)
    with mode():
        for name in ("m0", "m1", "__base__"):
            torch.testing.assert_close(model(x, adapter_names=[name] * 4), alone(base, sup, name)(x), **CLOSE)
        if does == "nothing":
            expected = torch.cat([alone(base, sup, name)(row[None]) for name, row in zip(MIX, x, strict=True)])
            torch.testing.assert_close(model(x, adapter_names=MIX), expected, **CLOSE)
            return
        said = "must leave its inputs as they are" if "input" in does else f"but its forward sets {does}"
        with pytest.raises(ValueError, match=said):
            model(x, adapter_names=MIX)


class Scales(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return 3 * super().forward(input)


class Reads(nn.Module):
    def __init__(self, kind: type[nn.Embedding], words: int) -> None:
        super().__init__()
        self.embed, self.linear = kind(words, 32), linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.embed(x))


@pytest.mark.parametrize("capacity", [None, 6])
@pytest.mark.parametrize("kind", [nn.Embedding, Scales])
@torch.no_grad()
def test_vocabularies_of_other_sizes_are_each_models_own(kind: type[nn.Embedding], capacity: int | None) -> None:
    base = Reads(kind, 11)
    sup = randes.Superposition.create(base)
    for number, words in enumerate((11, 14, 9)):
        sup.add(f"m{number}", finetune(Reads(kind, words), number, 0.3).state_dict() | {
            name: value + 0.1 for name, value in base.state_dict().items() if "linear" in name
        })  # fmt: skip
    plain: dict[str, nn.Module] = {"__base__": copy.deepcopy(base)}
    for number, words in enumerate((11, 14, 9)):
        plain[f"m{number}"] = Reads(kind, words)
        plain[f"m{number}"].load_state_dict(sup.retrieve(f"m{number}"))
    model = randes.SuperposedModel(base, sup, capacity=capacity)
    x = torch.randint(0, 9, (4, 3), generator=torch.Generator().manual_seed(1))
    mix = ["m2", "__base__", "m1", "m0"]
    for names in (mix, mix[::-1], *([name] * 4 for name in mix)):
        expected = torch.cat([plain[name](row[None]) for name, row in zip(names, x, strict=True)])
        torch.testing.assert_close(model(x, adapter_names=names), expected, **CLOSE)
    x[1] = 13  # a word of one model
    torch.testing.assert_close(model(x, adapter_names=["m0", "m1", "m2", "m0"])[1], plain["m1"](x[1:2])[0], **CLOSE)
    for names in (mix, ["m0"] * 4):
        with pytest.raises(IndexError):
            model(x, adapter_names=names)
