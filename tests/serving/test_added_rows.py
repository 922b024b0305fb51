"""Fine-tunes with tokens that the base does not have: their rows beyond the base's, tied or not, alone and in a mix."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from models import finetune
from torch import Tensor, nn

import randes
from randes.inspect.analysis import storage
from randes.inspect.plan import packed_sizes
from randes.superposition.summary import verify

CLOSE: dict[str, float] = {"rtol": 1e-4, "atol": 1e-5}
VOCABULARY, WIDTH = 1100, 64
SIZES = {"m0": VOCABULARY, "m1": VOCABULARY + 3, "m2": VOCABULARY + 5}


class Net(nn.Module):
    def __init__(self, words: int, tied: bool, bias: bool = False) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(words, WIDTH)
        self.up = nn.Linear(WIDTH, WIDTH)
        self.lm_head = nn.Linear(WIDTH, words, bias=bias)
        if tied:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.lm_head(torch.tanh(self.up(self.embed_tokens(tokens))))
        return out


def made(tied: bool, bias: bool = False) -> tuple[Net, dict[str, Net]]:
    """A base, and fine-tunes of it with more words each."""
    torch.manual_seed(0)
    base, tuned = Net(VOCABULARY, tied, bias), {}
    for number, (name, words) in enumerate(SIZES.items()):
        tuned[name] = Net(words, tied, bias)
        for key, value in finetune(base, number, 0.02).state_dict().items():
            tuned[name].state_dict()[key][: len(value)] = value
    return base, tuned


def retrieved(sup: randes.Superposition, name: str, tied: bool, bias: bool = False) -> Net:
    plain = Net(SIZES[name], tied, bias)
    plain.load_state_dict(sup.retrieve(name))
    return plain


@pytest.mark.parametrize("bits", [None, 2, 0.5])
@pytest.mark.parametrize(("tied", "bias"), [(True, False), (False, False), (False, True), (True, True)])
@torch.no_grad()
def test_models_with_more_words_answer_alone_and_in_a_mix(
    tied: bool, bias: bool, bits: float | None, tmp_path: Path
) -> None:
    base, tuned = made(tied, bias)
    sup = randes.compress(base, tuned)
    if bits is not None:
        sup = sup.pack(bits)
    sup.save(tmp_path / "store")
    sup = randes.Superposition.load(tmp_path / "store")
    plain: dict[str, Net] = {name: retrieved(sup, name, tied, bias) for name in SIZES} | {"__base__": base}
    for name, net in plain.items():
        if name != "__base__":
            assert torch.equal(net.embed_tokens.weight[VOCABULARY:], tuned[name].embed_tokens.weight[VOCABULARY:])
            assert torch.equal(net.lm_head.weight[VOCABULARY:], tuned[name].lm_head.weight[VOCABULARY:])
            assert not torch.equal(net.up.weight, tuned[name].up.weight), "superposed"
    model = randes.SuperposedModel(copy.deepcopy(base), sup)
    x = torch.randint(0, VOCABULARY, (5, 4), generator=torch.Generator().manual_seed(1))
    x[0, 1], x[2, 3] = VOCABULARY + 2, VOCABULARY + 4
    mix = ["m1", "m0", "m2", "__base__", "m1"]
    found = model(x, adapter_names=mix)
    widest = max(SIZES.values())
    assert found.shape == (5, 4, widest)
    for row, name, tokens in zip(found, mix, x, strict=True):
        expected = plain[name](tokens[None])[0]
        torch.testing.assert_close(row[:, : expected.shape[-1]], expected, **CLOSE)
        assert (row[:, expected.shape[-1] :] == -torch.inf).all(), "a word that it does not know is never its"
    for name in SIZES:
        alone = torch.where(x < SIZES[name], x, 0)
        torch.testing.assert_close(model(alone, adapter_names=[name] * 5), plain[name](alone), **CLOSE)
    for names in (["m0"] * 5, ["m1"] * 5, ["m1", "m0", "m1", "m0", "m0"]):
        with pytest.raises(IndexError):
            model(x, adapter_names=names)


@torch.no_grad()
def test_rows_that_a_model_adds_are_read_for_it_alone() -> None:
    base, tuned = made(False, True)
    model = randes.SuperposedModel(copy.deepcopy(base), randes.compress(base, tuned).pack(2))
    head = model.base_model.lm_head
    for name, words in SIZES.items():
        with model.using([name]):
            assert torch.equal(head.bias, tuned[name].lm_head.bias)
            assert len(head.bias) == words
    with model.using(["m0", "m1"]), pytest.raises(randes.WeightReadError):
        _ = head.bias + 1


def test_sizes_count_added_rows_and_packing_makes_the_rest_small() -> None:
    base, tuned = made(True)
    sup = randes.compress(base, tuned)
    assert sup.members["m2"].added["embed_tokens.weight"].shape == (5, WIDTH)
    assert "embed_tokens.weight" not in sup.members["m2"].kept
    added = (3 + 5) * WIDTH * 4
    few = sup.pack(2)
    kept = sum(len(member.kept["up.bias"]) for member in few.members.values()) * 4
    tables = sum(packed.nbytes for name in SIZES for packed in few.few_bits[name].values())
    assert few.sizes.kept == tables + kept + added
    gains = sum(len(member.gains) for member in few.members.values())
    assert storage(few).nbytes == few.sizes.total + 4 * gains
    assert packed_sizes(sup, 2).total == few.sizes.total
    assert tables < 0.06 * 3 * VOCABULARY * WIDTH * 4


@pytest.mark.parametrize("tied", [True, False])
def test_such_a_model_comes_and_goes_to_the_byte(tied: bool, tmp_path: Path) -> None:
    base, tuned = made(tied)
    sup = randes.Superposition.create(base)
    sup.add("m0", tuned["m0"])
    sup.save(tmp_path / "before")
    before = (tmp_path / "before" / "manifest.json").read_bytes()
    sup.add("m2", tuned["m2"])
    found = verify(sup, "m2", tuned["m2"])
    assert found.kept_exact
    assert found.relative_error == pytest.approx(found.predicted_error, rel=0.2)
    other = copy.deepcopy(tuned["m2"])
    other.embed_tokens.weight.data[VOCABULARY + 4] += 1
    for wrong in (other, tuned["m1"], tuned["m0"]):
        with pytest.raises(randes.CheckpointError, match="this is not the checkpoint that was added as 'm2'"):
            sup.remove("m2", wrong)
    sup.remove("m2", tuned["m2"])
    sup.save(tmp_path / "after")
    assert (tmp_path / "after" / "manifest.json").read_bytes() == before


def test_an_added_row_that_is_not_finite_is_refused() -> None:
    base, tuned = made(True)
    tuned["m1"].embed_tokens.weight.data[VOCABULARY] = torch.nan
    sup = randes.Superposition.create(base)
    with pytest.raises(randes.CheckpointError, match=r"embed_tokens\.weight@added must be finite"):
        sup.add("m1", tuned["m1"])
    assert not sup.members


@pytest.mark.parametrize(
    ("embeddings", "message"),
    [("keep", r"tokens\.weight of 'm1' must be \(1100, 64\), got \(1103, 64\)"),
     ("shared", r"of 'm1' must have at most 0 rows more than the base's, got 3")],
)  # fmt: skip
@torch.no_grad()
def test_more_rows_than_there_is_room_for_are_refused_while_serving(embeddings: Any, message: str) -> None:
    base, tuned = made(False)
    sup = randes.compress(base, {"m0": tuned["m0"]}, randes.Config(embeddings=embeddings))
    model = randes.SuperposedModel(copy.deepcopy(base), sup, capacity=4)
    x = torch.zeros(1, 2, dtype=torch.long)
    before = model(x, adapter_names=["m0"])
    with pytest.raises(randes.CheckpointError, match=message):
        model.add_adapter("m1", tuned["m1"])
    assert model.superposition.names == ["m0"]
    assert torch.equal(model(x, adapter_names=["m0"]), before)


def test_a_name_that_stores_use_themselves_is_refused() -> None:
    with pytest.raises(randes.CheckpointError, match="must not end with @added"):
        randes.Superposition.create({"w": torch.randn(64, 64), "w@added": torch.randn(2, 64)})


class Classifier(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.up, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, classes)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.tanh(self.up(x)))
        return out


@torch.no_grad()
def test_heads_for_other_classes_are_kept_as_they_are() -> None:
    torch.manual_seed(0)
    base, tuned = (
        Classifier(40),
        {name: Classifier(classes) for name, classes in {"m0": 40, "m1": 50, "m2": 36}.items()},
    )
    for number, net in enumerate(tuned.values()):
        net.up.load_state_dict(finetune(base, number, 0.02).up.state_dict())
    sup = randes.compress(base, tuned)
    assert sup.superposed == ("up.weight",)
    model, x = randes.SuperposedModel(copy.deepcopy(base), sup), torch.randn(3, WIDTH)
    for row, name, answer in zip(x, tuned, model(x, adapter_names=list(tuned)), strict=True):
        plain = copy.deepcopy(tuned[name])
        plain.load_state_dict(sup.retrieve(name))
        assert torch.equal(plain.head.weight, tuned[name].head.weight)
        torch.testing.assert_close(answer, plain(row), **CLOSE)
    with pytest.raises(
        randes.CheckpointError, match=r"head\.weight must be .*; exclude it, and each model keeps its own"
    ):
        randes.Superposition.create(base).add("m1", tuned["m1"])


@pytest.mark.parametrize("packs", [False, True])
@pytest.mark.parametrize("head", ["tied", "superposed", "kept"])
@torch.no_grad()
def test_a_language_model_with_more_tokens_generates_in_a_mix(head: str, packs: bool, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        tie_word_embeddings=head == "tied", eos_token_id=None,
    )  # fmt: skip
    base = transformers.LlamaForCausalLM(config).eval()
    base.save_pretrained(tmp_path / "base")
    plain, sizes = {}, {"m0": VOCABULARY, "m1": VOCABULARY + 8}
    for number, (name, words) in enumerate(sizes.items()):
        plain[name] = finetune(base, number, 0.02)
        plain[name].resize_token_embeddings(words, mean_resizing=False)
        if words > VOCABULARY:  # which it likes best
            plain[name].get_output_embeddings().weight[VOCABULARY:] *= 60
        plain[name].save_pretrained(tmp_path / name)
    exclude = (*randes.Config.exclude, *(["lm_head.weight"] if head == "kept" else []))
    config = randes.Config(exclude=exclude)
    sup = randes.compress(tmp_path / "base", {name: tmp_path / name for name in plain}, config)
    sup = sup.pack(2) if packs else sup
    sup.save(tmp_path / "store")
    model = randes.from_pretrained(tmp_path / "base", tmp_path / "store")
    for name in plain:
        plain[name].load_state_dict(sup.retrieve(name), strict=False)
        plain[name].tie_weights()
    x = torch.randint(0, VOCABULARY, (3, 5), generator=torch.Generator().manual_seed(1))
    x[1, 2] = VOCABULARY + 7
    mix = ["m0", "m1", "m0"]
    found = model.generate(x, adapter_names=mix, max_new_tokens=6, do_sample=False)
    for name, row, answer in zip(mix, x, found, strict=True):
        assert torch.equal(plain[name].generate(row[None], max_new_tokens=6, do_sample=False)[0], answer)
    assert (found[1, 5:] >= VOCABULARY).any(), "it says words of its own"
