"""What the plugin makes of a model that fuses, cuts and pads as vLLM does, without vLLM."""

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import CLOSE, finetune
from torch import Tensor, nn

import randes
from randes.vllm.adapters import Adapters
from randes.vllm.layers import Product, Table, Vectors
from randes.vllm.paths import path_of
from randes.vllm.places import Place, places_in
from randes.vllm.served import Served

NAMES = ["m0", "m1", "m2"]


class Plain(nn.Module):
    """As a checkpoint has it: tokens (B, T) to logits (B, T, 1100)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(1100, 64)
        self.norm = nn.LayerNorm(64)
        self.q, self.k = nn.Linear(64, 96), nn.Linear(64, 32)
        self.o = nn.Linear(128, 64)
        self.head = nn.Linear(64, 1100, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(self.embed(tokens))
        return self.head(self.o(torch.cat([self.q(x), self.k(x)], -1).relu()))


class Head(nn.Linear):
    """A table as well."""


class Fused(nn.Module):
    """The same as vLLM has it: q and k in one, tables padded, and rank's part of two."""

    def __init__(self, rank: int = 0, world: int = 1) -> None:
        super().__init__()
        self.rank, self.world = rank, world
        self.embed = nn.Embedding(1152 // world, 64)
        self.norm = nn.LayerNorm(64)
        self.qk, self.o = nn.Linear(64, 128 // world), nn.Linear(128 // world, 64)
        self.head = Head(64, 1152 // world, bias=False)
        self.unused = nn.Linear(2, 2)
        self.says = True

    def part(self, value: Tensor, dim: int) -> Tensor:
        size = value.shape[dim] // self.world
        return value.narrow(dim, self.rank * size, size)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str] | None:
        loaded = set()
        for name, value in weights:
            layer, _, kind = name.partition(".")
            if layer in ("q", "k"):
                rows = slice(0, 96 // self.world) if layer == "q" else slice(96 // self.world, None)
                getattr(self.qk, kind).data[rows] = self.part(value, 0)
                loaded.add(f"qk.{kind}")
            elif layer in ("embed", "head"):
                table = getattr(self, layer).weight.data
                first = self.rank * len(table)
                own = value[first : min(first + len(table), 1100)]
                table[: len(own)], table[len(own) :] = own, 0
                loaded.add(name)
            elif layer in ("norm", "o"):
                getattr(getattr(self, layer), kind).data.copy_(self.part(value, 1) if name == "o.weight" else value)
                loaded.add(name)
        return loaded if self.says else None


def kind_of(layer: nn.Module) -> str:
    kinds = {Head: "table", nn.Embedding: "table", nn.Linear: "linear", nn.LayerNorm: "norm"}
    return kinds.get(type(layer), "")


def made(config: randes.Config | None = None, bits: float | None = None, count: int = 3) -> tuple[Plain, Any]:
    base = Plain()
    tuned = {name: finetune(base, seed) for seed, name in enumerate(NAMES[:count])}
    superposition = randes.compress(copy.deepcopy(base), tuned, config or randes.Config(rank=0))
    return base, superposition if bits is None else superposition.pack(bits)


def served(superposition: randes.Superposition, room: int | None = None, rank: int = 0, world: int = 1) -> Served:
    model = Fused(rank, world)
    names = superposition.layout.joined(superposition.base)
    model.load_weights((name, names[name]) for name in names)
    return Served(model, superposition, kind_of, room, 64, 16)


def has(one: Served, name: str, x: Tensor, value: Tensor, parameter: str) -> Tensor:
    """A parameter's part, or, where all have the base's, what that gives."""
    if name in one.by_name:
        return one.answer(name, x)
    return value.expand(len(x), -1) if parameter == "bias" else x @ value.mT


def run(one: Served, base: Plain, tokens: Tensor, numbers: list[int]) -> Tensor:
    """The model's steps for flat tokens (T,), each of its own model: logits (T, 1152)."""
    one.of_step(numbers, numbers)
    one.length = len(tokens)
    x = one.answer("embed.weight", tokens[:, None])
    x = nn.functional.layer_norm(x, (64,)) * one.answer("norm.weight", x) + one.answer("norm.bias", x)
    x = (one.answer("qk.weight", x) + one.answer("qk.bias", x)).relu()
    x = one.answer("o.weight", x) + one.answer("o.bias", x)
    return one.logits("head.weight", x)


@pytest.mark.parametrize(
    ("config", "bits"),
    [
        pytest.param({}, None, id="default"),
        pytest.param({"rank": 4}, 2, id="basis, 2 bits"),
        pytest.param({"embeddings": "shared", "permute": 1}, 8, id="embeddings superposed"),
        pytest.param({"embeddings": "keep", "exclude": ("*head*", "*norm*"), "vectors": True}, None, id="head kept"),
        pytest.param({"shuffle_layers": -1, "others": "average"}, None, id="shuffled, averages"),
    ],
)
def test_tokens_of_all_models_are_answered_as_by_each_alone(config: dict[str, Any], bits: float | None) -> None:
    base, superposition = made(randes.Config(**{"rank": 0, **config}), bits)
    one = served(superposition)
    assert {type(layer) for layer in one.by_name.values()} == {Product, Vectors, Table}
    tokens = torch.tensor([0, 5, 1099, 7, 7, 7, 900])
    numbers = [one.models.router.versions[name].number for name in (*NAMES, "m1", "m0", "__base__", "m2")]
    found = run(one, base, tokens, numbers)
    model = randes.SuperposedModel(copy.deepcopy(base), superposition)
    wanted = model(tokens[:, None], adapter_names=[*NAMES, "m1", "m0", "__base__", "m2"])[:, 0]
    torch.testing.assert_close(found[:, :1100], wanted, **CLOSE)
    assert not found[:, 1100:].any()
    assert not torch.allclose(wanted[3], wanted[4], atol=1e-2)  # the test can fail


@pytest.mark.parametrize("bits", [None, 2])
def test_shards_lie_where_the_loader_lays_them(bits: float | None) -> None:
    _, superposition = made(bits=bits)
    parts = [served(superposition, rank=rank, world=2) for rank in range(2)]
    whole = served(superposition)
    numbers = [0, 1, 2, -1, 1]
    for one in (whole, *parts):
        one.of_step(numbers, numbers)
    x, y = torch.randn(5, 64), torch.randn(5, 128)
    tokens = torch.tensor([3, 500, 575, 20, 0])
    rows = [one.answer("qk.weight", x) for one in parts]
    together = torch.cat([rows[0][:, :48], rows[1][:, :48], rows[0][:, 48:], rows[1][:, 48:]], -1)
    torch.testing.assert_close(together, whole.answer("qk.weight", x), **CLOSE)
    columns = sum(one.answer("o.weight", part) for one, part in zip(parts, y.chunk(2, -1), strict=True))
    torch.testing.assert_close(columns, whole.answer("o.weight", y), **CLOSE)
    torch.testing.assert_close(
        parts[0].answer("embed.weight", tokens[:, None]), whole.answer("embed.weight", tokens[:, None])
    )
    logits = torch.cat([one.logits("head.weight", x) for one in parts], -1)
    torch.testing.assert_close(logits, whole.logits("head.weight", x), **CLOSE)


def test_a_place_is_a_rectangle_of_a_tensor() -> None:
    _, superposition = made()
    model = Fused(1, 2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = places_in(model, superposition, {"q.weight", "k.bias", "o.weight", "embed.weight"})
    assert found == {
        "qk.weight": [Place("q.weight", range(48), 48, 0, 64)],
        "qk.bias": [Place("k.bias", range(48, 64), 16, 0, 1)],
        "o.weight": [Place("o.weight", range(64), 0, 64, 64)],
        "embed.weight": [Place("embed.weight", range(524), 576, 0, 64)],
    }
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())


def test_what_no_layer_takes_is_an_error_at_the_start() -> None:
    _, superposition = made()
    with pytest.raises(randes.CheckpointError, match=r"1 tensors .* no layer of vLLM's Fused, z.weight the first"):
        places_in(Fused(), superposition, {"z.weight"})

    class Mixed(Fused):
        def part(self, value: Tensor, dim: int) -> Tensor:
            return value.flip(0)  # rows in another order

    with pytest.raises(randes.CheckpointError, match=r"must lie in one piece in vLLM's qk.weight"):
        places_in(Mixed(), superposition, {"q.weight"})
    silent = Fused()
    silent.says = False
    with pytest.raises(randes.CheckpointError, match="must say which parameters it loaded, got None"):
        places_in(silent, superposition, {"q.weight"})
    with pytest.raises(randes.CheckpointError, match=r"norm.weight is kept per model, which vLLM's LayerNorm"):
        Served(Fused(), superposition, lambda layer: kind_of(layer).replace("norm", ""), None, 8, 8)


def test_rows_that_are_no_tokens_are_refused() -> None:
    _, superposition = made()
    one = served(superposition)
    one.of_step([0, 1], [0, 1])
    one.length = 2
    with pytest.raises(ValueError, match=r"norm.bias must have a row for each of 2 tokens, got \(6, 16\)"):
        one.answer("norm.bias", torch.zeros(6, 16))


# ------------------------------------------------------------------ adapters


def stored(folder: Path, room: int | None = None, count: int = 2, **how: Any) -> tuple[Plain, Any, Adapters]:
    base, superposition = made(count=count, **how)
    superposition.save(folder)
    held = randes.Superposition.load(folder)
    return base, superposition, Adapters(served(held, room), str(folder))


def test_adapters_are_versions_of_fine_tunes(tmp_path: Path) -> None:
    _, _, adapters = stored(tmp_path / "store")
    adapters.add(5, path_of(tmp_path / "store", "m1"))
    adapters.add(6, path_of(tmp_path / "store", "m0"))
    assert adapters.activate([], [5, 5, 0, 6], [5, 0, 6]) == []
    assert adapters.served.tokens.tolist()[:5] == [1, 1, -1, 0, -1]
    assert adapters.served.row_numbers == [1, -1, 0]
    assert adapters.remove(5)
    assert not adapters.remove(5)


@pytest.mark.parametrize(
    ("path", "error", "said"),
    [
        ("randes:m9@0123456789abcdef", randes.UnknownModelError, "no model is called 'm9'; there are: m0, m1"),
        ("randes:m1@0123456789abcdef", ValueError, "lora_path must be randes:m1@"),
        ("randes:m1", ValueError, "as the store is now, got 'randes:m1'"),
        ("/adapters/m1", ValueError, "lora_path must be randes:NAME"),
    ],
)
def test_a_bad_name_is_an_error_and_never_the_base(path: str, error: Any, said: str, tmp_path: Path) -> None:
    _, _, adapters = stored(tmp_path / "store")
    with pytest.raises(error, match=said):
        adapters.add(1, path)
    # Where nobody has checked it, the rows get no answer, and all others go on.
    adapters.add(2, path_of(tmp_path / "store", "m1"))
    assert adapters.activate([(1, path), (2, "")], [1, 2], [1, 2]) == [0]
    one = adapters.served
    one.unanswered, one.end = [0], 7
    logits = one.logits("head.weight", torch.randn(2, 64))
    assert logits[0].argmax() == 7
    assert logits[0, 7] == 0
    assert torch.isinf(logits[0]).sum() == 1151
    assert torch.isfinite(logits[1]).all()


def test_a_fine_tune_joins_and_what_is_under_way_stays(tmp_path: Path) -> None:
    base, superposition, adapters = stored(tmp_path / "store", room=4)
    tokens = torch.tensor([3, 4])
    before = path_of(tmp_path / "store", "m0")
    adapters.add(1, before)
    adapters.activate([], [1, 1], [1, 1])
    old = run(adapters.served, base, tokens, [adapters.held[1].number] * 2)
    superposition.add("m2", finetune(base, 2))
    superposition.save(tmp_path / "store")
    assert path_of(tmp_path / "store", "m0") != before  # it has a neighbour more
    adapters.add(2, path_of(tmp_path / "store", "m2"))
    adapters.add(3, path_of(tmp_path / "store", "m0"))
    assert torch.equal(run(adapters.served, base, tokens, [adapters.held[1].number] * 2), old)
    model = randes.SuperposedModel(copy.deepcopy(base), randes.Superposition.load(tmp_path / "store"))
    wanted = model(tokens[:, None], adapter_names=["m0", "m2"])[:, 0]
    found = run(adapters.served, base, tokens, [adapters.held[3].number, adapters.held[2].number])
    torch.testing.assert_close(found[:, :1100], wanted, **CLOSE)
    # The next change needs the old version's room, which nobody uses: it becomes the one that took its place.
    adapters.activate([], [2, 3], [2, 3])
    superposition.add("m3", finetune(base, 3))
    superposition.save(tmp_path / "store")
    adapters.add(4, path_of(tmp_path / "store", "m3"))
    assert adapters.held[1].number not in (adapters.held[2].number, adapters.held[4].number)
    superposition.add("m4", finetune(base, 4))
    superposition.save(tmp_path / "store")
    with pytest.raises(randes.CapacityError, match="capacity is 4 models"):
        adapters.add(5, path_of(tmp_path / "store", "m4"))
    adapters.add(6, next(path for path in adapters._versions.values() if path.startswith("randes:m3@")))


def test_without_room_a_changed_store_is_refused(tmp_path: Path) -> None:
    base, superposition, adapters = stored(tmp_path / "store")
    superposition.add("m2", finetune(base, 2))
    superposition.save(tmp_path / "store")
    with pytest.raises(randes.CapacityError, match="randes serve STORE --room 4"):
        adapters.add(1, path_of(tmp_path / "store", "m2"))


def test_another_base_is_refused(tmp_path: Path) -> None:
    _, _, adapters = stored(tmp_path / "store", room=4)
    other = finetune(Plain(), 50)
    superposition = randes.Superposition.create(other, randes.Config(rank=0))
    superposition.add("m0", finetune(other, 0))
    (tmp_path / "store" / "manifest.json").unlink()
    superposition.save(tmp_path / "store")
    with pytest.raises(randes.BaseMismatchError, match="another base than the server was started with"):
        adapters.add(1, path_of(tmp_path / "store", "m0"))


class Words(nn.Module):
    """A table, tied to a head, of so many tokens."""

    def __init__(self, words: int) -> None:
        super().__init__()
        self.embed_tokens, self.lm_head = nn.Embedding(words, 64), nn.Linear(64, words, bias=False)
        self.lm_head.weight = self.embed_tokens.weight


def test_a_model_with_tokens_of_its_own_is_refused() -> None:
    base, superposition = made(randes.Config(rank=0, embeddings="keep"))
    longer = finetune(base, 9)
    longer.embed = nn.Embedding(1101, 64)
    superposition.add("longer", longer)
    with pytest.raises(randes.CheckpointError, match=r"embed.weight must have one shape in all models"):
        served(superposition)
    words = Words(1100)
    superposed = randes.Superposition.create(words, randes.Config(rank=0))
    more = Words(1101)
    more.embed_tokens.weight.data[:1100] = words.embed_tokens.weight
    superposed.add("longer", more)
    with pytest.raises(randes.CheckpointError, match=r"'longer' has tokens of its own, in embed_tokens.weight"):
        Served(Fused(), superposed, kind_of, None, 8, 8)
