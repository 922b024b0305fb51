"""Tables of embeddings that each model has its own delta of: exact as they come, in few bits, looked up and tied."""

import copy
from pathlib import Path

import pytest
import torch
from models import alone, content, counted, finetune
from torch import Tensor, nn

import randes
from randes.serving.layers.other_layers import SuperposedEmbedding
from randes.serving.layers.superposed import Superposed

CLOSE: dict[str, float] = {"rtol": 1e-4, "atol": 1e-5}
VOCABULARY, WIDTH = 1100, 64
NAMES = ("m0", "m1", "m2")


class Net(nn.Module):
    """Tokens and their positions, a matrix, and a head that may be tied."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.position_embeddings = nn.Embedding(VOCABULARY, WIDTH)
        self.up = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.embed_tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed_tokens(tokens) + self.position_embeddings(torch.arange(tokens.shape[1]))
        out: Tensor = self.head(torch.tanh(self.up(x)))
        return out


def made(tied: bool = True) -> tuple[Net, dict[str, Net]]:
    """A base, and fine-tunes whose tables moved mostly in a few directions."""
    torch.manual_seed(0)
    base, tuned = Net(tied), {}
    for seed, name in enumerate(NAMES):
        generator = torch.Generator().manual_seed(seed)
        tuned[name] = copy.deepcopy(base)
        for parameter in tuned[name].parameters():
            parameter.data.add_(0.02 * torch.randn(parameter.shape, generator=generator))
            if parameter.dim() == 2:
                loud = torch.randn(len(parameter), 1, generator=generator) * torch.randn(WIDTH, generator=generator)
                parameter.data.add_(0.1 * loud)
    return base, tuned


def tokens(rows: int) -> Tensor:
    return torch.randint(0, VOCABULARY, (rows, 5), generator=torch.Generator().manual_seed(rows))


def check(base: Net, sup: randes.Superposition) -> randes.SuperposedModel:
    """A mix, each model by itself and the base answer as the plain models do."""
    model = randes.SuperposedModel(copy.deepcopy(base), sup)
    mix = [*NAMES, "__base__", "m1"]
    x = tokens(len(mix))
    plain: dict[str, nn.Module] = {name: alone(base, sup, name) for name in NAMES}
    plain["__base__"] = copy.deepcopy(base)
    if sup.config.centre:
        plain["__base__"].load_state_dict(sup.retrieve("__base__"))
    expected = torch.cat([plain[name](row[None]) for name, row in zip(mix, x, strict=True)])
    torch.testing.assert_close(model(x, adapter_names=mix), expected, **CLOSE)
    for name in NAMES:
        torch.testing.assert_close(model(x, adapter_names=[name] * len(x)), plain[name](x), **CLOSE)
    return model


def kinds(model: nn.Module) -> dict[str, type[nn.Module]]:
    return {path: type(part) for path, part in model.named_modules() if path.endswith(("tokens", "embeddings", "head"))}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("config", [None, randes.Config(), randes.Config(centre=True), randes.Config(permute=1)])
def test_each_model_has_its_own_table(tied: bool, config: randes.Config | None) -> None:
    base, tuned = made(tied)
    sup = randes.compress(base, tuned, config)
    assert sup.unshared == {"embed_tokens.weight", "position_embeddings.weight"}
    for name in NAMES:
        found = sup.retrieve(name)["embed_tokens.weight"]
        torch.testing.assert_close(found, tuned[name].embed_tokens.weight.detach(), rtol=0, atol=3e-4)
    model = check(base, sup)
    assert not any(issubclass(kind, SuperposedEmbedding) for kind in kinds(model).values()), "they are there as tensors"


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bits", [0, 0.5, 1, 2, 4, 8])
def test_tables_in_few_bits(tied: bool, bits: float, tmp_path: Path) -> None:
    base, tuned = made(tied)
    sup = randes.compress(base, tuned).pack(2, embeddings=bits)
    model = check(base, sup)
    found = kinds(model)
    assert issubclass(next(kind for path, kind in found.items() if path.endswith("tokens")), SuperposedEmbedding)
    looked_up_for_all = next(kind for path, kind in found.items() if path.endswith("embeddings"))
    assert not issubclass(looked_up_for_all, SuperposedEmbedding)
    assert issubclass(next(kind for path, kind in found.items() if path.endswith("head")), Superposed)
    errors = [sup.retrieve(name)["embed_tokens.weight"] - tuned[name].embed_tokens.weight.detach() for name in NAMES]
    noise = 0.02 * (1.0 if bits == 0 else {0.5: 1.3, 1: 0.76, 2: 0.37, 4: 0.15, 8: 0.15}[bits])
    assert max(float(error.square().mean().sqrt()) for error in errors) < 1.15 * noise
    sup.save(tmp_path / "store")
    again = randes.Superposition.load(tmp_path / "store")
    for name in NAMES:
        for tensor, value in sup.retrieve(name).items():
            assert torch.equal(again.retrieve(name)[tensor], value), tensor
    check(base, again)
    again.save(tmp_path / "again")
    assert content(tmp_path / "again") == content(tmp_path / "store")


def test_a_table_takes_what_its_bits_are() -> None:
    base, tuned = made()
    sup = randes.compress(base, tuned)
    elements = 2 * VOCABULARY * WIDTH  # tokens and positions
    whole = sup.sizes
    assert whole.kept - 2 * 3 * elements == 3 * 4 * WIDTH, "integers, and the biases"
    for bits in (2, 1):
        kept = sup.pack(1, embeddings=bits).sizes.kept - 3 * 4 * WIDTH
        assert kept == 3 * (elements * bits // 8 + 2 * 2 * VOCABULARY), "and a step a row"
    assert sup.pack(1, embeddings=0).sizes.kept == 3 * 4 * WIDTH


def test_models_come_and_go_and_leave_no_byte(tmp_path: Path) -> None:
    base, tuned = made()
    sup = randes.Superposition.create(base)
    sup.add("m0", tuned["m0"])
    sup.save(tmp_path / "one")
    sup.add("m1", tuned["m1"])
    sup.save(tmp_path / "two")
    other = randes.Superposition.create(base)
    other.add("m1", tuned["m1"])
    other.add("m0", tuned["m0"])
    other.save(tmp_path / "turned")
    assert content(tmp_path / "turned") == content(tmp_path / "two")
    back = randes.Superposition.load(tmp_path / "two")
    back.remove("m1", tuned["m1"])
    back.save(tmp_path / "back")
    assert content(tmp_path / "back") == content(tmp_path / "one")
    assert "m1" not in sup.deltas or "m1" not in back.deltas


def test_live_models_come_and_go() -> None:
    base, tuned = made()
    sup = randes.Superposition.create(base)
    sup.add("m0", tuned["m0"])
    model = randes.SuperposedModel(copy.deepcopy(base), sup, capacity=3)
    x = tokens(2)
    torch.testing.assert_close(model(x, adapter_names=["m0"] * 2), alone(base, sup, "m0")(x), **CLOSE)
    for name in ("m1", "m2"):
        model.add_adapter(name, tuned[name])
        torch.testing.assert_close(model(x, adapter_names=[name] * 2), alone(base, sup, name)(x), **CLOSE)
    model.delete_adapter("m1", tuned["m1"])
    torch.testing.assert_close(model(x, adapter_names=["m0", "m2"])[1], alone(base, sup, "m2")(x)[1], **CLOSE)


def test_a_vocabulary_that_is_no_fine_tune_of_the_base_is_kept_whole(tmp_path: Path) -> None:
    base, tuned = made(tied=False)
    larger = tuned["m1"]
    larger.embed_tokens = nn.Embedding(VOCABULARY + 3, WIDTH)
    for sup in (randes.compress(base, tuned), randes.compress(base, tuned).pack(2)):
        assert set(sup.members["m1"].kept) == {"embed_tokens.weight", "up.bias"}
        assert torch.equal(sup.retrieve("m1")["embed_tokens.weight"], larger.embed_tokens.weight)
        model = randes.SuperposedModel(copy.deepcopy(base), sup)
        x = tokens(3)
        last = torch.full((1, 5), VOCABULARY + 2)
        torch.testing.assert_close(model(x, adapter_names=["m0"] * 3), alone(base, sup, "m0")(x), **CLOSE)
        torch.testing.assert_close(
            model(last, adapter_names=["m1"]), larger_alone(base, sup, larger)(last), **CLOSE
        )  # fmt: skip
        sup.save(tmp_path / str(sup.packing is None))
        assert torch.equal(
            randes.Superposition.load(tmp_path / str(sup.packing is None)).retrieve("m1")["embed_tokens.weight"],
            larger.embed_tokens.weight,
        )


def larger_alone(base: Net, sup: randes.Superposition, like: Net) -> Net:
    found = copy.deepcopy(like)
    found.load_state_dict(sup.retrieve("m1"))
    return found


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (randes.Config(embeddings="keep"), set()),
        (randes.Config(embeddings="shared"), set()),
        (randes.Config(others="average"), set()),
        (randes.Config(exclude=("embed*",)), {"position_embeddings.weight"}),
    ],
)
def test_tables_are_kept_shared_or_averaged(config: randes.Config, expected: set[str]) -> None:
    base, tuned = made()
    sup = randes.compress(base, tuned, config)
    assert sup.unshared == expected
    assert ("embed_tokens.weight" in sup.superposed) == (config.embeddings == "shared")
    check(base, sup)


def test_small_tables_are_kept() -> None:
    base = nn.ModuleDict({"embed": nn.Embedding(100, 64), "up": nn.Linear(64, 64)})
    tuned = copy.deepcopy(base)
    for parameter in tuned.parameters():
        parameter.data.add_(0.1)
    sup = randes.compress(base, {"a": tuned})
    assert torch.equal(sup.members["a"].kept["embed.weight"], tuned["embed"].weight)


@pytest.mark.parametrize("bad", [3, -1, "two"])
def test_bits_of_tables_are_checked(bad: object) -> None:
    base, tuned = made()
    with pytest.raises(ValueError, match=f"embeddings must be one of 8, 4, 2, 1, 0\\.5, 0, got {bad!r}"):
        randes.compress(base, tuned).pack(2, embeddings=bad)  # type: ignore[arg-type]


def test_a_packed_table_compiles_once() -> None:
    base, tuned = made()
    sup = randes.compress(base, tuned).pack(2)
    served = randes.SuperposedModel(copy.deepcopy(base), sup)
    model, programs = counted(served)
    x = tokens(3)
    for mix in (["m0", "m1", "m2"], ["m2", "m2", "__base__"]):
        expected = torch.cat(
            [(base if n == "__base__" else alone(base, sup, n))(row[None]) for n, row in zip(mix, x, strict=True)]
        )
        torch.testing.assert_close(model(x, adapter_names=served.batch(mix)), expected, **CLOSE)
    assert len(programs) == 1


@pytest.mark.parametrize("tied", [True, False])
def test_a_language_model_of_transformers_in_few_bits(tied: bool, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        tie_word_embeddings=tied,
    )  # fmt: skip
    base = transformers.LlamaForCausalLM(config).eval()
    base.save_pretrained(tmp_path / "base")
    for name in NAMES:
        finetune(base, int(name[1:]), 0.02).save_pretrained(tmp_path / name)
    sup = randes.compress(tmp_path / "base", {name: tmp_path / name for name in NAMES}).pack(1)
    assert sup.unshared == {"model.embed_tokens.weight"}
    sup.save(tmp_path / "store")
    model = randes.from_pretrained(tmp_path / "base", tmp_path / "store")
    x = tokens(3)
    found = model.generate(x, adapter_names=list(NAMES), max_new_tokens=6, do_sample=False)
    for name, row, answer in zip(NAMES, x, found, strict=True):
        plain = copy.deepcopy(base)
        plain.load_state_dict(sup.retrieve(name), strict=False)
        plain.tie_weights()
        assert torch.equal(plain.generate(row[None], max_new_tokens=6, do_sample=False)[0], answer)
        mixed = model(input_ids=x, adapter_names=[name] * 3).logits
        torch.testing.assert_close(mixed, plain(input_ids=x).logits, **CLOSE)
