"""Folders whose tensors have other names than the modules: read, served, and written back as they were."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from architectures import build
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typer.testing import CliRunner

import randes
import randes.transformers
from randes.checkpoints.sources import read
from randes.cli import app
from randes.serving.servable import servable
from randes.superposition.reading import read as read_finetuned
from randes.superposition.store.manifest import read_manifest

CONFIG = randes.Config(rank=0)
RENAMED = ["GPT-NeoX", "Mixtral", "Qwen3-MoE", "ViT"]


@pytest.fixture(autouse=True)
def quiet() -> Any:
    """Transformers' bars."""
    hf.utils.logging.disable_progress_bar()
    yield
    hf.utils.logging.enable_progress_bar()


@torch.no_grad()
def moved(model: nn.Module, seed: int) -> nn.Module:
    """``model``, a fine-tune of itself."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.add_(0.02 * torch.randn(p.shape, generator=generator))
    return model


def folders(tmp_path: Path, name: str) -> dict[str, Path]:
    """A base and two fine-tunes, as ``save_pretrained`` writes them."""
    paths = {kind: tmp_path / kind for kind in ("base", "a", "b")}
    for seed, path in enumerate(paths.values()):
        model: Any = build(name) if seed == 0 else moved(build(name), seed)
        model.save_pretrained(path)
    return paths


def compress(paths: dict[str, Path], store: Path) -> None:
    superposition = randes.compress(paths["base"], {"a": paths["a"], "b": paths["b"]}, CONFIG)
    superposition.save(store)


def tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("name", RENAMED)
def test_what_is_retrieved_has_the_files_names_shapes_and_dtypes_and_the_base_its_bytes(
    name: str, tmp_path: Path
) -> None:
    paths = folders(tmp_path, name)
    shutil.copytree(paths["base"], tmp_path / "same")
    randes.compress(paths["base"], {"same": tmp_path / "same", "a": paths["a"]}, CONFIG).save(tmp_path / "store")
    assert tensors(paths["base"]).keys() != build(name).state_dict().keys()
    for model, folder in (("same", paths["base"]), ("a", paths["a"])):
        out = tmp_path / f"{model}.safetensors"
        done = CliRunner().invoke(app, ["retrieve", str(tmp_path / "store"), model, "--out", str(out)])
        assert done.exit_code == 0, done.output
        found, own = load_file(out), tensors(folder)
        assert found.keys() == own.keys()
        for tensor, value in own.items():
            assert (found[tensor].shape, found[tensor].dtype) == (value.shape, value.dtype)
            assert model != "same" or torch.equal(found[tensor], value), tensor
            assert (found[tensor] - value).norm() <= 1e-2 * value.norm()


def test_a_store_is_served_whatever_the_folders_called_their_tensors(tmp_path: Path) -> None:
    """One fine-tune as Transformers writes it, and one under the module's own names."""
    paths = folders(tmp_path, "Mixtral")
    own: Any = moved(build("Mixtral"), 2)
    save_file({name: value.clone() for name, value in own.state_dict().items()}, paths["b"] / "model.safetensors")
    compress(paths, tmp_path / "store")
    superposition = randes.Superposition.load(tmp_path / "store")
    tokens = torch.arange(3, 19).view(2, 8)
    for served in (
        randes.from_pretrained(tmp_path / "store"), randes.from_pretrained(paths["base"], tmp_path / "store"),
        hf.AutoModelForCausalLM.from_pretrained(tmp_path / "store"),
    ):  # fmt: skip
        mixed = served(tokens, adapter_names=["a", "b"]).logits
        for row, name in enumerate("ab"):
            plain: Any = build("Mixtral")
            plain.load_state_dict(superposition.retrieve(name))
            assert torch.allclose(mixed[row], plain(tokens[row : row + 1]).logits[0], atol=1e-4)
    found = superposition.layout.join(read_finetuned(superposition, paths["b"]))
    assert all(torch.equal(found[name], value) for name, value in own.state_dict().items())


def test_models_are_added_to_a_loaded_store_and_taken_away_again(tmp_path: Path) -> None:
    paths = folders(tmp_path, "Mixtral")
    compress(paths, tmp_path / "store")
    superposition = randes.Superposition.load(tmp_path / "store")
    before = read_manifest(tmp_path / "store")["checksum"]
    moved(build("Mixtral"), 5).save_pretrained(tmp_path / "c")  # type: ignore[operator]
    superposition.add("c", tmp_path / "c")
    assert superposition.retrieved("c", as_files=True).keys() == tensors(tmp_path / "c").keys()
    superposition.add("d", build("Mixtral"))
    superposition.remove("d", build("Mixtral"))
    superposition.remove("c", tmp_path / "c")
    superposition.save(tmp_path / "store")
    assert read_manifest(tmp_path / "store")["checksum"] == before


@pytest.mark.parametrize("how", [{}, {"centre": True}, {"rank": 4}, {"origin": "zero"}])
def test_every_way_to_superpose_reads_folders_as_the_loaded_models(how: dict[str, Any], tmp_path: Path) -> None:
    paths, config = folders(tmp_path, "Mixtral"), randes.Config(**how)
    loaded = {"a": moved(build("Mixtral"), 1), "b": moved(build("Mixtral"), 2)}
    expected = randes.compress(build("Mixtral"), loaded, config)
    found = randes.compress(paths["base"], {name: paths[name] for name in "ab"}, config)
    found.save(tmp_path / "store")
    if config.rank == 0:
        found.pack(2).save(tmp_path / "packed")
        assert randes.Superposition.load(tmp_path / "packed").to_files == found.to_files
    for superposition in (found, randes.Superposition.load(tmp_path / "store")):
        for name in "ab":
            right = expected.retrieve(name)
            assert superposition.retrieve(name).keys() == right.keys()
            assert all(torch.equal(value, right[tensor]) for tensor, value in superposition.retrieve(name).items())


def test_what_the_model_does_not_have_is_left_out_and_named(tmp_path: Path) -> None:
    paths = folders(tmp_path, "Llama")
    for path in (paths["base"], paths["a"]):
        save_file({**tensors(path), "model.layers.9.mtp.weight": torch.ones(40, 40)}, path / "model.safetensors")
    with pytest.warns(UserWarning, match=r"1 tensors .* are left out.*model\.layers\.9\.mtp\.weight"):
        compress(paths, tmp_path / "store")
    superposition = randes.Superposition.load(tmp_path / "store")
    assert superposition.retrieved("a", as_files=True).keys() == tensors(paths["b"]).keys()
    assert read_manifest(tmp_path / "store")["names"] == {"model.layers.9.mtp.weight": None}
    superposition.add("c", paths["a"])
    save_file({**tensors(paths["b"]), "value_head.weight": torch.ones(40, 40)}, paths["b"] / "model.safetensors")
    with pytest.raises(randes.CheckpointError, match=r"value_head\.weight"):
        superposition.add("d", paths["b"])


def test_a_folder_that_lacks_a_tensor_of_its_class_is_refused(tmp_path: Path) -> None:
    paths = folders(tmp_path, "Mixtral")
    few = tensors(paths["base"])
    few.pop("model.norm.weight")
    save_file(few, paths["base"] / "model.safetensors")
    with pytest.raises(randes.CheckpointError, match=r"MixtralForCausalLM.* lacks 1 of them, model\.norm\.weight"):
        compress(paths, tmp_path / "store")
    few.pop("model.layers.0.block_sparse_moe.experts.1.w1.weight")
    save_file(few, paths["base"] / "model.safetensors")
    with pytest.raises(randes.CheckpointError, match=r"cannot be read as Transformers does: .*gate_up_proj: Sizes"):
        compress(paths, tmp_path / "store")
    for part in ("w2", "w3"):
        few.pop(f"model.layers.0.block_sparse_moe.experts.1.{part}.weight")
    save_file({**few, "model.norm.weight": torch.ones(32)}, paths["base"] / "model.safetensors")
    with pytest.raises(randes.CheckpointError, match=r"gate_up_proj .* must be \(4, 128, 32\) .* got \(3, 128, 32\)"):
        compress(paths, tmp_path / "store")


def test_names_from_before_stay_a_stores_own(tmp_path: Path) -> None:
    """A store of files under their own names, as they were made once, takes fine-tunes under these."""
    paths = folders(tmp_path, "GPT-NeoX")
    superposition = randes.Superposition.create(tensors(paths["base"]), CONFIG)
    superposition.model_files = {"config.json": (paths["base"] / "config.json").read_bytes()}
    superposition.save(tmp_path / "store")
    old = randes.Superposition.load(tmp_path / "store")
    old.add("a", paths["a"])
    assert old.retrieved("a", as_files=True).keys() == read(paths["a"]).keys()


@pytest.mark.parametrize(
    "names",
    [
        {"gpt_neox.embed_in.weight": 3}, {"x": {"shape": [4], "pieces": []}}, {"x": {"shape": [4]}},
        {"x": {"shape": [64], "pieces": [{
            "tensor": "gpt_neox.final_layer_norm.weight", "shape": [64], "to_stride": [1], "to_offset": 0,
            "from_stride": [1], "from_offset": 32,
        }]}},
    ],
)  # fmt: skip
def test_a_manifest_with_names_that_no_store_has_is_refused(names: dict[str, Any], tmp_path: Path) -> None:
    from randes.superposition.store import manifest as module

    paths = folders(tmp_path, "GPT-NeoX")
    compress(paths, tmp_path / "store")
    manifest = read_manifest(tmp_path / "store")
    manifest["names"] = names
    manifest["checksum"] = module._checksum(manifest)
    (tmp_path / "store" / "manifest.json").write_text(module.text_of(manifest))
    with pytest.raises(randes.StoreError, match="cannot be used"):
        randes.Superposition.load(tmp_path / "store")


def vision(kind: str) -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "image_size": 32}
    return getattr(hf, f"{kind}VisionModel")(
        getattr(hf, f"{kind}VisionConfig")(**sizes, num_attention_heads=4, patch_size=8)
    )


def test_what_no_layer_serves_is_kept_and_named_and_the_store_answers(tmp_path: Path) -> None:
    base = vision("Siglip")
    base.save_pretrained(tmp_path / "base")
    tuned = moved(vision("Siglip"), 1)
    tuned.save_pretrained(tmp_path / "a")  # type: ignore[operator]
    named = pytest.warns(UserWarning, match=r"cannot be served with them: .*head\.attention\.in_proj_weight")
    with named, pytest.warns(UserWarning, match=r"past their layers: head\.attention\.out_proj\.weight"):
        superposition = randes.compress(tmp_path / "base", {"a": tmp_path / "a"}, CONFIG)
    superposition.save(tmp_path / "store")
    served = randes.from_pretrained(tmp_path / "store")
    served.set_adapter("a")
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    right = tuned(pixels).pooler_output
    assert (served(pixels).pooler_output - right).norm() < 1e-2 * (right - base(pixels).pooler_output).norm()


def test_what_cannot_be_served_is_refused_before_a_value_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = hf.BitConfig(embedding_size=32, hidden_sizes=[32, 64], depths=[1, 1], num_groups=4)
    hf.BitModel(config).save_pretrained(tmp_path / "base")
    monkeypatch.setattr("randes.superposition.superposition.digests", lambda *_, **__: pytest.fail("values are read"))
    with pytest.raises(
        randes.CheckpointError, match=r"a BitModel cannot be served: .* belongs to a WeightStandardized"
    ):
        randes.compress(tmp_path / "base", {"a": tmp_path / "base"})


def test_plain_modules_and_state_dicts_are_not_asked_to_be_served() -> None:
    attention = nn.MultiheadAttention(64, 2)
    for base in (attention, attention.state_dict()):
        assert servable(base, CONFIG) is CONFIG


def test_the_store_says_how_files_are_made_of_its_tensors(tmp_path: Path) -> None:
    paths = folders(tmp_path, "Mixtral")
    compress(paths, tmp_path / "store")
    names = json.loads((tmp_path / "store" / "manifest.json").read_text())["names"]
    assert names["model.layers.0.block_sparse_moe.gate.weight"] == "model.layers.0.mlp.gate.weight"
    expert = names["model.layers.0.block_sparse_moe.experts.1.w3.weight"]
    assert expert == {
        "shape": [64, 32],
        "pieces": [{
            "tensor": "model.layers.0.mlp.experts.gate_up_proj", "shape": [1, 64, 32], "to_stride": [2048, 32, 1],
            "to_offset": 0, "from_stride": [4096, 32, 1], "from_offset": 4096 + 2048,
        }],
    }  # fmt: skip
    compress(folders(tmp_path / "plain", "Llama"), tmp_path / "other")
    assert "names" not in read_manifest(tmp_path / "other")
