"""Checkpoints on disk whose tensors are seen as matrices: read in parts, split and joined on the way."""

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from models import content, stored
from safetensors.torch import save_file
from torch import Tensor, nn

import randes
from randes.checkpoints import lazy_tensors, safetensors, sources
from randes.checkpoints.lazy_tensors import chunks, digests, headers
from randes.checkpoints.safetensors import write_file
from randes.checkpoints.tensor_views import SplitTensors
from randes.superposition.summary import verify

SHAPES = {
    "turned.weight": (9, 12), "qkv.weight": (24, 10), "conv.weight": (9, 4, 3, 2), "experts.up_proj": (4, 10, 8),
    "experts.down_proj": (4, 6, 10), "both.weight": (8, 16), "plain.weight": (11, 8), "head.weight": (1, 8),
}  # fmt: skip
CONFIG = randes.Config(
    rank=0, min_width=2, transposed=("turned.*", "both.*", "*down_proj"),
    fused={"*qkv.weight": {"*q.weight": 12, "*k.weight": 6, "*v.weight": 6},
           "*both.weight": {"*one.weight": 6, "*two.weight": 10}},
)  # fmt: skip
CONFIGS = {
    "plain": CONFIG,
    "rank": randes.Config(**{**vars(CONFIG), "rank": 2}),
    "centred": randes.Config(**{**vars(CONFIG), "centre": True, "permute": 1}),
    "average": randes.Config(**{**vars(CONFIG), "others": "average"}),
}


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of a few rows, so that small tensors have many of them."""
    monkeypatch.setattr(lazy_tensors, "CHUNK_ELEMENTS", 25)
    monkeypatch.setattr(lazy_tensors, "SMALL", 0)


def tensors(seed: int = 0, size: float = 1.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: size * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def tuned(seed: int) -> dict[str, Tensor]:
    deltas = tensors(seed, 0.1)
    return {name: value + deltas[name] for name, value in tensors().items()}


def on_disk(folder: Path, models: dict[str, dict[str, Tensor]]) -> dict[str, Path]:
    folder.mkdir(exist_ok=True)
    for name, held in models.items():
        save_file(held, folder / f"{name}.safetensors")
    return {name: folder / f"{name}.safetensors" for name in models}


def test_parts_are_those_of_the_matrices_in_memory(tmp_path: Path) -> None:
    path = on_disk(tmp_path, {"base": tensors()})["base"]
    layout = randes.Superposition.create(tensors(), CONFIG).layout
    expected, found = layout.split(tensors()), layout.split(sources.read(path))
    assert isinstance(found, SplitTensors)
    assert found.keys() == expected.keys() > {"experts.up_proj.3", "q.weight", "two.weight"}
    assert digests(found) == digests(expected)
    for name, value in expected.items():
        assert torch.equal(torch.cat(list(chunks(found, name))), value)
        assert (headers(found)[name].shape, headers(found)[name].dtype) == (value.shape, value.dtype)
    for matrices in (expected, found):
        joined = layout.joined(matrices)
        for name, value in tensors().items():
            assert torch.equal(joined[name], value)
            assert torch.equal(lazy_tensors.rows(joined, name, 0, len(value) - 1), value[:-1])
    assert layout.joined(found) is found.source
    plain = sources.read(path)
    assert randes.checkpoints.matrices.Layout().split(plain) is plain


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_from_disk_the_store_is_that_from_memory(config: randes.Config, tmp_path: Path) -> None:
    models = {f"m{number}": tuned(number + 1) for number in range(3)}
    if config.others == "keep":
        models["m2"]["head.weight"] = torch.randn(3, 8, generator=torch.Generator().manual_seed(9))
    paths = on_disk(tmp_path / "paths", {"base": tensors(), **models})
    base = paths.pop("base")
    lazily = randes.compress(base, paths, config)
    eagerly = randes.compress(tensors(), models, config)
    before = stored(lazily, tmp_path / "lazily")
    assert before == stored(eagerly, tmp_path / "eagerly")
    again = randes.Superposition.load(tmp_path / "lazily")
    assert stored(again, tmp_path / "again") == before
    assert again.base_digests == eagerly.base_digests == digests(again.base)
    for name in models:
        whole = again.retrieve(name)
        assert whole.keys() == SHAPES.keys()
        write_file(tmp_path / "out.safetensors", again.retrieved(name))
        for tensor, value in sources.read_file(tmp_path / "out.safetensors").items():
            assert torch.equal(value, whole[tensor])
            assert torch.equal(value, eagerly.retrieve(name)[tensor])
    assert verify(again, "m2", paths["m2"]).kept_exact
    again.remove("m2", paths["m2"])
    again.add("m2", models["m2"])
    assert stored(again, tmp_path / "once more") == before
    assert content(tmp_path / "lazily") == before


def test_one_matrix_is_read_at_a_time_and_a_store_is_opened_without_reading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = on_disk(tmp_path, {"base": tensors(), "m0": tuned(1)})
    read: list[tuple[str, int]] = []
    plain = safetensors.File.rows

    def rows(file: safetensors.File, name: str, start: int, end: int) -> Tensor:
        part = plain(file, name, start, end)
        read.append((name, part.numel()))
        return part

    monkeypatch.setattr(safetensors.File, "rows", rows)
    sup = randes.compress(paths["base"], {"m0": paths["m0"]}, CONFIG)
    assert max(count for name, count in read if name == "experts.up_proj") == 160  # two experts of four, hashed
    assert max(count for name, count in read if name in ("qkv.weight", "conv.weight")) == 72  # three rows of nine
    assert sum(count for name, count in read if name == "experts.up_proj") == 320 * (
        2 + 1 + 1
    )  # base hashed as it is and split
    sup.save(tmp_path / "store")
    read.clear()
    again = randes.Superposition.load(tmp_path / "store", check=False)
    assert not read
    again.check_base()
    assert sum(count for _, count in read) == sum(value.numel() for value in tensors().values())


def test_a_plan_counts_the_matrices(tmp_path: Path) -> None:
    path = on_disk(tmp_path, {"base": tensors()})["base"]
    sup = randes.compress(path, {f"m{number}": tuned(number + 1) for number in range(3)}, CONFIG)
    for row in randes.plan(path, 3, CONFIG):
        held = sup if row.bits == 16 else sup.pack(row.bits)
        assert held.sizes.total == row.store
        assert row.separate == held.sizes.separate_models


@pytest.mark.parametrize("name", ["qkv.weight", "experts.down_proj", "plain.weight"])
def test_a_base_file_that_changes_underneath_is_noticed(name: str, tmp_path: Path) -> None:
    path = on_disk(tmp_path, {"base": tensors()})["base"]
    sup = randes.Superposition.create(path, CONFIG)
    sup.add("m0", tuned(1))
    changed = tensors()
    changed[name][-1] += 1
    save_file(changed, path)
    with pytest.raises(randes.BaseMismatchError, match=f"{name} of the base was changed"):
        sup.add("m1", tuned(2))
    with pytest.raises(randes.BaseMismatchError, match=f"{name} of the base was changed"):
        sup.save(tmp_path / "store")
    assert sup.names == ["m0"]


def test_an_adapter_updates_the_tensors_of_the_checkpoint(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(5)
    factors, merged = {}, tensors()
    for module in ("turned", "qkv"):
        n, k = SHAPES[f"{module}.weight"]
        a, b = torch.randn(2, k, generator=generator), 0.1 * torch.randn(n, 2, generator=generator)
        factors |= {f"base_model.model.{module}.lora_A.weight": a, f"base_model.model.{module}.lora_B.weight": b}
        merged[f"{module}.weight"] = (merged[f"{module}.weight"].double() + b.double() @ a.double()).float()
    save_file(factors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))
    path = on_disk(tmp_path / "base", {"base": tensors()})["base"]
    for base in (path, tensors()):
        sup = randes.compress(base, {"m": tmp_path}, CONFIG)
        assert set(sup.members["m"].gains) == {"turned.weight", "q.weight", "k.weight", "v.weight"}
        for name, value in sup.retrieve("m").items():
            torch.testing.assert_close(value, merged[name], rtol=0, atol=1e-3)


class Chooses(nn.Module):
    """Layers whose weights are transposed, fused and tied, as one model."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.qkv = nn.Linear(8, 12)
        self.conv = nn.Conv1d(12, 8, 2)
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.conv(self.qkv(self.embed(tokens)).mT).mean(-1))


def test_alphas_are_fitted_through_the_layout() -> None:
    torch.manual_seed(0)
    base = Chooses()
    config = randes.Config(
        min_width=2,
        exclude=(),
        embeddings="shared",
        fused={"*qkv.weight": {"*q.weight": 4, "*k.weight": 4, "*v.weight": 4}},
    )
    models = {}
    for number in range(4):
        models[f"m{number}"] = copy.deepcopy(base)
        with torch.no_grad():
            for parameter in models[f"m{number}"].parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    sup = randes.compress(base, models, config)
    x = torch.randint(0, 20, (6, 16, 5), generator=torch.Generator().manual_seed(1))
    batches = [(own, models["m0"](own).detach()) for own in x]
    loss: Callable[[nn.Module, tuple[Tensor, Tensor]], Tensor] = lambda m, b: (m(b[0]) - b[1]).square().mean()  # noqa: E731
    found = sup.tune(copy.deepcopy(base), {"m0": batches}, loss, steps=30, rate=0.05)["m0"]
    assert found.after < 0.9 * found.before
    assert sup.members["m0"].alphas.keys() == {"embed.weight", "q.weight", "k.weight", "v.weight", "conv.weight"}
    alone = copy.deepcopy(base)
    alone.load_state_dict(sup.retrieve("m0"))
    with torch.no_grad():
        losses = [float(loss(alone, batch)) for batch in batches[-2:]]  # a quarter of six: what was held out
    assert sum(losses) / 2 == pytest.approx(found.after, rel=1e-3)
    model = randes.SuperposedModel(copy.deepcopy(base), sup)
    torch.testing.assert_close(model(x[0], adapter_names=["m0"] * 16), alone(x[0]), rtol=1e-4, atol=1e-4)
