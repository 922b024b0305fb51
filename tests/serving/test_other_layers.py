"""Every kind of layer that carries weight: superposed, retrieved, and right for each row of a mixed batch."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import alone, finetune, linear, plain_names, superposed
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import MixtralConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssConfig, GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.pytorch_utils import Conv1D

import randes
from randes.checkpoints.layout import Layout
from randes.checkpoints.tensor_views import View
from randes.serving.layers.other_layers import SuperposedLayer
from randes.serving.layers.superposed import Superposed

CLOSE: dict[str, float] = {"rtol": 1e-4, "atol": 1e-4}
MIX = ["m1", "__base__", "m0", "m1"]
EVERYTHING = randes.Config(include=("*weight", "*experts.*proj"), exclude=(), embeddings="shared", min_width=2)
CONFIGS = {
    "two-sided": EVERYTHING,
    "permuted": randes.Config(
        include=("*weight",), exclude=(), embeddings="shared", min_width=2, permute=1, signs="columns"
    ),
    "rank": randes.Config(include=("*weight",), exclude=(), embeddings="shared", min_width=2, rank=3),
    "auto": randes.Config(include=("*weight",), exclude=(), embeddings="shared", min_width=2, rank="auto"),
    "centred": randes.Config(include=("*weight",), exclude=(), embeddings="shared", min_width=2, centre=True),
}


def floats(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


def tokens(*shape: int) -> Tensor:
    return torch.randint(0, 40, shape, generator=torch.Generator().manual_seed(3))


LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "Conv1D": (lambda: Conv1D(12, 7), lambda: floats(4, 3, 7)),
    "Conv1D, flattened": (lambda: Conv1D(12, 7), lambda: floats(4, 7)),
    "Embedding": (lambda: nn.Embedding(40, 12), lambda: tokens(4, 6)),
    "Embedding, padded": (lambda: nn.Embedding(40, 12, padding_idx=0), lambda: tokens(4, 2, 3)),
    "conv 1d": (lambda: nn.Conv1d(6, 9, 3), lambda: floats(4, 6, 11)),
    "conv 2d": (lambda: nn.Conv2d(3, 9, (3, 2), stride=(2, 1), padding=(1, 0)), lambda: floats(4, 3, 8, 7)),
    "conv 2d, dilated": (
        lambda: nn.Conv2d(3, 9, 3, dilation=2, padding="same", bias=False),
        lambda: floats(4, 3, 8, 7),
    ),
    "conv 2d, circular": (lambda: nn.Conv2d(3, 9, 3, padding=1, padding_mode="circular"), lambda: floats(4, 3, 6, 6)),
    "conv 2d, groups": (lambda: nn.Conv2d(6, 9, 3, groups=3), lambda: floats(4, 6, 5, 5)),
    "conv 3d": (lambda: nn.Conv3d(2, 5, 2, stride=2), lambda: floats(4, 2, 4, 5, 6)),
}


def superposed_over(
    base: nn.Module, config: randes.Config, size: float = 0.3
) -> tuple[randes.SuperposedModel, randes.Superposition]:
    tuned = {f"m{number}": finetune(base, number, size) for number in range(2)}
    sup = randes.compress(copy.deepcopy(base), tuned, config)
    return randes.SuperposedModel(copy.deepcopy(base), sup), sup


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("kind", LAYERS)
def test_every_row_gets_its_models_layer(kind: str, config: str) -> None:
    build, make = LAYERS[kind]
    torch.manual_seed(0)
    base, x = nn.Sequential(build()), make()
    model, sup = superposed_over(base, CONFIGS[config])
    assert isinstance(model.base_model[0], SuperposedLayer)
    assert sup.superposed == ("0.weight",)
    plain = {name: alone(base, sup, name) for name in {*MIX}}
    if config == "centred":  # the base is superposed there, too
        plain["__base__"].load_state_dict(sup.retrieve("__base__"))
    for names in (MIX, ["m0"] * 4, ["__base__"] * 4):
        expected = torch.cat([plain[name](row[None]) for name, row in zip(names, x, strict=True)])
        torch.testing.assert_close(model(x, adapter_names=names), expected, **CLOSE)
    assert not torch.allclose(plain["m0"](x), plain["m1"](x), atol=0.1)
    model.set_adapter("m1")
    torch.testing.assert_close(copy.deepcopy(model).double()(x if "Emb" in kind else x.double()).float(),
                               plain["m1"](x), **CLOSE)  # fmt: skip
    assert plain_names(model) == base.state_dict().keys()


@pytest.mark.parametrize("bits", [8, 4, 2, 1, 0.5])
@pytest.mark.parametrize("kind", LAYERS)
def test_every_row_gets_its_models_layer_from_what_is_packed(kind: str, bits: float) -> None:
    build, make = LAYERS[kind]
    torch.manual_seed(0)
    base, x = nn.Sequential(build()), make()
    for config in (EVERYTHING, CONFIGS["rank"]) if bits == 4 else (EVERYTHING,):
        _, sup = superposed_over(base, config)
        packed = sup.pack(bits)
        assert packed.layout == sup.layout
        model = randes.SuperposedModel(copy.deepcopy(base), packed)
        expected = torch.cat([alone(base, packed, name)(row[None]) for name, row in zip(MIX, x, strict=True)])
        torch.testing.assert_close(model(x, adapter_names=MIX), expected, **CLOSE)
        assert not torch.allclose(model(x, adapter_names=["m0"] * 4), model(x, adapter_names=["m1"] * 4), atol=0.1)
        model.warm_up(rows=(3,))
        low = copy.deepcopy(model).bfloat16()(x if "Emb" in kind else x.bfloat16(), adapter_names=MIX)
        assert (low.float() - expected).norm() < 0.05 * expected.norm()


def test_a_superposed_table_that_is_read_without_its_layer_is_never_the_bases() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(40, 12)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.embed(tokens).to(self.embed.weight.dtype) @ self.embed.weight.T

    base = Reads()
    sup = randes.Superposition.create(base.state_dict(), EVERYTHING)  # of bare tensors, whose reader nobody could see
    for number in range(2):
        sup.add(f"m{number}", finetune(base, number, 0.3))
    model = randes.SuperposedModel(base, sup)
    assert model.base_model.embed.weight.shape == (40, 12)
    for names in (MIX, ["m0"] * 4):
        with pytest.raises(ValueError, match="weight of a SuperposedEmbedding is superposed: call the layer instead"):
            model(tokens(4, 3), adapter_names=names)


def test_warming_up_runs_every_kind_and_changes_nothing() -> None:
    base = nn.Sequential(Conv1D(12, 7), nn.Linear(12, 6), nn.Unflatten(-1, (3, 2)), nn.Conv1d(3, 9, 1))
    model, sup = superposed_over(base, EVERYTHING)
    assert model.base_model[0].weight.stride() == (12, 1)
    (matrix,) = model.base_model[0]._matrices("weight")
    assert matrix.pool.values.stride()[1:] == (1, 12)  # as the weight lies, seen as (N, K)
    shapes = []
    for layer in model.modules():
        if isinstance(layer, Superposed):
            layer.register_forward_hook(lambda _, x, y: shapes.append((*x[0].shape, y.shape[1])))
    model.warm_up(rows=(1, 5))
    assert {*shapes} == {(rows, k, n) for rows in (1, 5) for k, n in ((7, 12), (12, 6), (3, 9))}
    x = floats(4, 7)
    expected = torch.cat([alone(base, sup, name)(row[None]) for name, row in zip(MIX, x, strict=True)])
    torch.testing.assert_close(model(x, adapter_names=MIX), expected, **CLOSE)


def test_one_image_without_a_batch_is_one_models() -> None:
    base = nn.Sequential(nn.Conv2d(3, 9, 3))
    model, sup = superposed_over(base, EVERYTHING)
    model.set_adapter("m0")
    x = floats(3, 5, 5)
    torch.testing.assert_close(model(x), alone(base, sup, "m0")(x), **CLOSE)


def test_gradients_pass_through_a_convolution() -> None:
    base = nn.Sequential(nn.Conv2d(3, 9, 3))
    model, sup = superposed_over(base, EVERYTHING)
    x, plain = floats(4, 3, 5, 5).requires_grad_(), floats(4, 3, 5, 5).requires_grad_()
    model(x, adapter_names=["m0"] * 4).square().sum().backward()
    alone(base, sup, "m0")(plain).square().sum().backward()
    torch.testing.assert_close(x.grad, plain.grad, **CLOSE)


class Experts(nn.Module):
    """Stacked experts behind a router that a row does not share."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        weights, chosen = torch.topk(flat[:, :4].softmax(-1), 2)
        return self.experts(flat, chosen, weights).view(x.shape)


SIZES: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 10, "num_local_experts": 4, "num_experts_per_tok": 2}


def mixtral() -> nn.Module:
    config = MixtralConfig(**SIZES)
    config._experts_implementation = "eager"
    return MixtralExperts(config)


def gpt_oss() -> nn.Module:
    config = GptOssConfig(**SIZES)
    config._experts_implementation = "eager"
    return GptOssExperts(config)


def experts(make: Callable[[], nn.Module]) -> nn.Module:
    base = Experts(make())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return base


@pytest.mark.parametrize("make", [mixtral, gpt_oss])
@pytest.mark.parametrize("length", [1, 5])
def test_stacked_experts_see_each_token_as_its_rows_model(make: Callable[[], nn.Module], length: int) -> None:
    base = experts(make)
    model, sup = superposed_over(base, EVERYTHING, size=0.1)
    assert "experts.gate_up_proj.3" in sup.superposed
    assert len({sup.members["m0"].gains[name] for name in sup.superposed}) == 8  # a gain for each expert
    plain = {name: alone(base, sup, name) for name in {*MIX}}
    for names in (MIX, ["m1"] * 4, ["__base__"] * 4):
        for x in floats(8, 4, length, 8):  # some expert gets one token, of any row
            expected = torch.cat([plain[name](row[None]) for name, row in zip(names, x, strict=True)])
            torch.testing.assert_close(model(x, adapter_names=names), expected, **CLOSE)


@pytest.mark.parametrize("make", [mixtral, gpt_oss])
def test_stacked_experts_are_served_from_what_is_packed(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    base = experts(make)
    _, sup = superposed_over(base, EVERYTHING, size=0.1)
    sup.pack(4).save(tmp_path / "store")
    packed = randes.Superposition.load(tmp_path / "store")
    model, x = randes.SuperposedModel(copy.deepcopy(base), packed), floats(4, 5, 8)
    expected = torch.cat([alone(base, packed, name)(row[None]) for name, row in zip(MIX, x, strict=True)])
    torch.testing.assert_close(model(x, adapter_names=MIX), expected, **CLOSE)
    assert not torch.allclose(expected[:1], alone(base, sup, MIX[0])(x[:1]), atol=1e-3)  # the packed form was served


def test_experts_of_an_unknown_kind_are_refused_and_left_alone() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up_proj = nn.Parameter(torch.randn(4, 8, 8))

        def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
            return x

    base = Experts(Own())
    sup, _ = superposed(base, 1, EVERYTHING)
    with pytest.raises(ValueError, match=r"experts.up_proj is superposed, but belongs to a Own, .*exclude it"):
        randes.SuperposedModel(base, sup)
    assert type(base.experts) is Own


def test_a_file_that_does_not_say_it_is_transposed_is_refused_until_it_is_declared(tmp_path: Path) -> None:
    base = nn.Sequential(Conv1D(12, 7))
    save_file(base.state_dict(), tmp_path / "base.safetensors")
    sup = randes.Superposition.create(tmp_path / "base.safetensors", EVERYTHING)
    with pytest.raises(ValueError, match=r"0.weight is superposed, but belongs to a Conv1D"):
        randes.SuperposedModel(copy.deepcopy(base), sup)
    declared = randes.Config(exclude=(), embeddings="shared", min_width=2, transposed=("0.*",))
    sup = randes.Superposition.create(tmp_path / "base.safetensors", declared)
    assert sup.base["0.weight"].shape == (12, 7)
    sup.add("m", finetune(base, 1))
    sup.save(tmp_path / "store")
    again = randes.Superposition.load(tmp_path / "store")
    assert again.layout == sup.layout
    assert again.config == declared.resolved(together=False)
    model, x = randes.SuperposedModel(copy.deepcopy(base), again), floats(4, 7)
    torch.testing.assert_close(model(x, adapter_names=["m"] * 4), alone(base, again, "m")(x), **CLOSE)


class Fused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 24)

    def forward(self, x: Tensor) -> Tensor:
        return self.qkv(x)


class Unfused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(16, 12), nn.Linear(16, 6), nn.Linear(16, 6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.q(x), self.k(x), self.v(x)], -1)


def test_a_fused_weight_answers_as_its_parts_do() -> None:
    def unfused(model: nn.Module) -> nn.Module:
        parts = Unfused()
        rows = {"q": slice(0, 12), "k": slice(12, 18), "v": slice(18, 24)}
        parts.load_state_dict({
            f"{name}.{last}": value[where]
            for last, value in (("weight", model.qkv.weight), ("bias", model.qkv.bias)) for name, where in rows.items()
        })  # fmt: skip
        return parts

    base = Fused()
    tuned = {name: finetune(base, number) for number, name in enumerate(("m0", "m1"))}
    sizes = {"*q.weight": 12, "*k.weight": 6, "*v.weight": 6}
    config = randes.Config(min_width=2, fused={"*qkv.weight": sizes})
    together = randes.compress(base, tuned, config)
    apart = randes.compress(unfused(base), {n: unfused(m) for n, m in tuned.items()}, randes.Config(min_width=2))
    assert together.superposed == apart.superposed == ("k.weight", "q.weight", "v.weight")
    assert together.members["m0"].gains == apart.members["m0"].gains
    assert all(torch.equal(together.deltas[0][name], apart.deltas[0][name]) for name in apart.superposed)
    x = floats(4, 3, 16)
    fused, three = randes.SuperposedModel(copy.deepcopy(base), together), randes.SuperposedModel(unfused(base), apart)
    torch.testing.assert_close(fused(x, adapter_names=MIX), three(x, adapter_names=MIX), rtol=1e-6, atol=1e-6)
    again = randes.Config.from_dict(together.config.to_dict())
    assert again == together.config
    assert together.retrieve("m0").keys() == tuned["m0"].state_dict().keys()


@pytest.mark.parametrize(
    ("fused", "message"),
    [
        ("qkv", "fused must map patterns"), ({"*qkv": {"*q": 1}}, "at least two parts"),
        ({"qkv": {"*q": 1, "*k": 1}}, "begin with"), ({"*qkv": {"*q": 0, "*k": 1}}, r"fused\['\*qkv'\]"),
    ],
)  # fmt: skip
def test_a_fused_weight_that_is_declared_wrong_is_refused(fused: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        randes.Config(fused=fused)


def test_a_fused_weight_with_other_rows_than_its_parts_is_refused() -> None:
    config = randes.Config(min_width=2, fused={"*qkv.weight": {"*q.weight": 12, "*k.weight": 6}})
    with pytest.raises(randes.CheckpointError, match=r"qkv.weight must have the 18 rows of its parts, got 24"):
        randes.Superposition.create(Fused(), config)


class Tied(nn.Module):
    """A language model with a tied head, called as a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 32)
        self.linear = linear(32, 32)
        self.head = nn.Linear(32, 40, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.linear(self.embed(tokens)))


def tie(model: nn.Module) -> nn.Module:
    model.head.weight = model.embed.weight
    return model


@pytest.mark.parametrize("config", [randes.Config(), EVERYTHING], ids=["kept", "superposed"])
def test_tied_weights_are_held_once_and_right_in_both_places(config: randes.Config, tmp_path: Path) -> None:
    base = tie(Tied())
    tuned = {f"m{number}": tie(finetune(base, number, 0.1)) for number in range(2)}
    without = {name: value for name, value in tuned["m1"].state_dict().items() if name != "head.weight"}
    save_file(without, tmp_path / "m1.safetensors")  # as save_pretrained leaves a tied head out
    sup = randes.compress(base, {"m0": tuned["m0"], "m1": tmp_path / "m1.safetensors"}, config)
    assert "head.weight" not in sup.base
    sup.save(tmp_path / "store")
    sup = randes.Superposition.load(tmp_path / "store")
    model, x = randes.SuperposedModel(copy.deepcopy(base), sup), tokens(4, 5)
    expected = torch.cat([alone(base, sup, name)(row[None]) for name, row in zip(MIX, x, strict=True)])
    torch.testing.assert_close(model(x, adapter_names=MIX), expected, **CLOSE)
    sup.remove("m1", tuned["m1"])
    sup.remove("m0", tuned["m0"].state_dict())
    assert not sup.names


def test_a_base_file_without_its_tied_head_serves_the_tied_model(tmp_path: Path) -> None:
    base = tie(Tied())
    save_file({n: v for n, v in base.state_dict().items() if n != "head.weight"}, tmp_path / "base.safetensors")
    sup = randes.Superposition.create(tmp_path / "base.safetensors")
    sup.add("m", tie(finetune(base, 1)))
    model, x = randes.SuperposedModel(copy.deepcopy(base), sup), tokens(4, 5)
    plain = copy.deepcopy(base)
    plain.load_state_dict(sup.retrieve("m"), strict=False)
    torch.testing.assert_close(model(x, adapter_names=["m"] * 4), plain(x), **CLOSE)


def test_a_head_that_is_untied_in_a_fine_tune_alone_is_refused() -> None:
    base = tie(Tied())
    sup = randes.Superposition.create(base)
    with pytest.raises(randes.CheckpointError, match=r"head.weight is tied to embed.weight in the base and differs"):
        sup.add("m", finetune(base, 1).state_dict() | {"head.weight": torch.zeros(40, 32)})
    assert not sup.names


class Classifier(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.body = linear(32, 32)
        self.head = nn.Linear(32, classes)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.body(x))


def test_heads_of_other_numbers_of_classes_give_a_list(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base, other = Classifier(5), Classifier(7)
    other.body.load_state_dict(finetune(base.body, 1).state_dict())
    sup = randes.Superposition.create(base)
    sup.add("m0", finetune(base, 0))
    sup.add("m1", other)
    sup.save(tmp_path)
    model, x = randes.SuperposedModel(copy.deepcopy(base), randes.Superposition.load(tmp_path)), floats(4, 3, 32)
    other.load_state_dict(sup.retrieve("m1"))
    plain = {"m1": other, **{name: alone(base, sup, name) for name in ("m0", "__base__")}}
    y = model(x, adapter_names=MIX)
    assert isinstance(y, list)
    assert [row.shape for row in y] == [(3, 7), (3, 5), (3, 5), (3, 7)]
    for name, row, own in zip(MIX, x, y, strict=True):
        torch.testing.assert_close(own, plain[name](row), **CLOSE)
        torch.testing.assert_close(model(x, adapter_names=[name] * 4), plain[name](x), **CLOSE)
    with pytest.raises(randes.CheckpointError, match=r"head.weight must be \(5, 32\)"):
        randes.Superposition.create(base, randes.Config(others="base")).add("m1", other)


def test_large_heads_and_norms_of_other_libraries_are_routed_by_row() -> None:
    class OwnNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(32))

        def forward(self, x: Tensor) -> Tensor:
            return (1.0 + self.weight) * x / x.norm(dim=-1, keepdim=True)

    base = nn.Sequential(linear(32, 32), OwnNorm(), nn.Linear(32, 2100))
    sup, _ = superposed(base, 2, randes.Config(include=("0.weight",)), size=0.3)
    model, x = randes.SuperposedModel(copy.deepcopy(base), sup), floats(4, 3, 32)
    expected = torch.cat([alone(base, sup, name)(row[None]) for name, row in zip(MIX, x, strict=True)])
    torch.testing.assert_close(model(x, adapter_names=MIX), expected, **CLOSE)


def test_a_kept_tensor_that_is_read_in_a_mix_gives_its_shape_and_nothing_else() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(32)
            self.linear = linear(32, 32)
            self.uses = False

        def forward(self, x: Tensor) -> Tensor:
            x = x.to(self.norm.weight.dtype).view(-1, self.norm.weight.shape[0])
            return self.linear(self.norm(x)) * (self.norm.weight if self.uses else 1)

    base = Reads()
    sup, _ = superposed(base, 2, size=0.3)
    model, x = randes.SuperposedModel(copy.deepcopy(base), sup), floats(4, 32)
    expected = torch.cat([alone(base, sup, name)(row[None]) for name, row in zip(MIX, x, strict=True)])
    torch.testing.assert_close(model(x, adapter_names=MIX), expected, **CLOSE)
    model.base_model.uses = True
    with pytest.raises(ValueError, match=r"weight of a RoutedLayerNorm is kept per model, .* one model at a time"):
        model(x, adapter_names=MIX)


def test_experts_that_are_layers_are_run_for_each_model() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(linear(32, 32, seed=number) for number in range(2))

        def forward(self, x: Tensor) -> Tensor:
            y = torch.zeros_like(x)
            for number, expert in enumerate(self.experts):
                chosen = (x[..., 0] > 0) == number
                y[chosen] = expert(x[chosen])  # as many tokens as the batch has rows, perhaps
            return y

    base = nn.Sequential(Block())
    sup, _ = superposed(base, 2, size=0.3)
    model, x = randes.SuperposedModel(copy.deepcopy(base), sup), floats(4, 2, 32)
    x[..., 0] = torch.tensor([[1.0, -1]] * 4)  # four tokens to each expert
    expected = torch.cat([alone(base, sup, name)(row[None]) for name, row in zip(MIX, x, strict=True)])
    torch.testing.assert_close(model(x, adapter_names=MIX), expected, **CLOSE)


class Pooling(nn.Module):
    """Attention that reads the weights inside it, as SigLIP's pooling head has it."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.linear = linear(32, 32)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=batch_first)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        return self.attention(x, x, x, need_weights=False)[0]


def test_attention_that_reads_its_weights_is_run_for_each_model_where_it_is_kept() -> None:
    config = randes.Config(exclude=("attention*",))
    base, x = Pooling(True).eval(), floats(4, 3, 32)
    sup, _ = superposed(base, 2, config, size=0.3)
    model = randes.SuperposedModel(copy.deepcopy(base), sup)
    with torch.no_grad():
        expected = torch.cat([alone(base, sup, name)(row[None]) for name, row in zip(MIX, x, strict=True)])
        torch.testing.assert_close(model(x, adapter_names=MIX), expected, **CLOSE)
        torch.testing.assert_close(model(x, adapter_names=["m0"] * 4), alone(base, sup, "m0")(x), **CLOSE)
    for refused, wrong in ((Pooling(True), randes.Config()), (Pooling(False), config)):
        sup, _ = superposed(refused, 1, wrong)
        with pytest.raises(ValueError, match="attention must call its linear layers; a MultiheadAttention reads"):
            randes.SuperposedModel(refused, sup)


@pytest.mark.parametrize(
    ("view", "shape"),
    [
        (View((6, 4), {"a": 4}, transposed=True), (6, 4)), (View((6, 4), {"a": 2, "b": 4}), (6, 4)),
        (View((6, 2, 3), {"a": 6}), (6, 2, 3)), (View((2, 3, 4), {"a": 3, "b": 3}, stacked=True), (2, 3, 4)),
        (View((2, 3, 4), {"a": 4, "b": 4}, transposed=True, stacked=True), (2, 3, 4)),
    ],
)  # fmt: skip
def test_a_tensor_comes_back_from_its_matrices(view: View, shape: tuple[int, ...]) -> None:
    value = floats(*shape)
    layout = Layout({"x": view}, {"y": "x"})
    matrices = layout.split({"x": value, "y": value, "other": value})
    assert all(matrix.dim() == 2 for name, matrix in matrices.items() if name in view.parts)
    back = layout.join(matrices)
    assert back.keys() == {"x", "y", "other"}
    assert torch.equal(back["x"], value)
    assert Layout.from_dict(layout.to_dict()) == layout
