"""From what a user calls a checkpoint to its files: folders as they are published, other formats, names of the hub."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.file_download import repo_folder_name
from models import finetune, net
from safetensors.torch import save_file
from test_sources import sharded

import randes
from randes import CheckpointError
from randes.checkpoints import sources
from randes.checkpoints.huggingface import config_of, model_files
from randes.checkpoints.paths.hub import local

ONE = {"a": torch.zeros(2)}


def test_an_index_may_name_files_in_folders(tmp_path: Path) -> None:
    (tmp_path / "parts" / "one").mkdir(parents=True)
    save_file(ONE, tmp_path / "parts" / "one" / "x.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "parts/one/x.safetensors"}}))
    assert [*sources.read(tmp_path)] == ["a"]
    for name in ("parts/../parts/one/x.safetensors", "/x.safetensors", "parts//x.safetensors", "./x.safetensors"):
        index.write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(CheckpointError, match="must be the name of a file beside it, or in a folder there"):
            sources.read(tmp_path)


@pytest.mark.parametrize("again", ["consolidated.safetensors", "consolidated.00-of-01.safetensors"])
def test_the_same_tensors_in_the_makers_names_are_left_alone(again: str, tmp_path: Path) -> None:
    save_file({"output.weight": torch.ones(3)}, tmp_path / again)
    assert [*sources.read(tmp_path)] == ["output.weight"]  # where there is nothing else
    (tmp_path / "consolidated.safetensors.index.json").write_text(json.dumps({"weight_map": {"output.weight": again}}))
    save_file(ONE, tmp_path / "model.safetensors")
    assert [*sources.read(tmp_path)] == ["a"]
    (tmp_path / "model.safetensors").rename(tmp_path / "model-00001-of-00001.safetensors")
    (tmp_path / "consolidated.safetensors.index.json").unlink()
    assert [*sources.read(tmp_path)] == ["a"]
    (tmp_path / "consolidated.safetensors.index.json").write_text(json.dumps({"weight_map": {"output.weight": again}}))
    text = json.dumps({"weight_map": {"a": "model-00001-of-00001.safetensors"}})
    (tmp_path / "model.safetensors.index.json").write_text(text)
    assert [*sources.read(tmp_path)] == ["a"]


def test_the_file_that_transformers_reads_is_the_checkpoint(tmp_path: Path) -> None:
    sharded(tmp_path / "model", {"b": torch.ones(3)}, "model.safetensors.index.json", shards=1)
    save_file(ONE, tmp_path / "model" / "model.safetensors")
    with pytest.warns(UserWarning, match="model.safetensors alone is read, and not model-00001-of-00001"):
        assert [*sources.read(tmp_path / "model")] == ["a"]


def test_a_folder_of_folders_says_which(tmp_path: Path) -> None:
    for name in ("vae", "unet", "tokenizer"):
        (tmp_path / name).mkdir()
    for name in ("vae", "unet"):
        save_file(ONE, tmp_path / name / "diffusion_pytorch_model.safetensors")
    with pytest.raises(CheckpointError, match=r"holds no \*.safetensors file; there are some in unet, vae: give one"):
        sources.read(tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model-Q4_K.gguf", r'is GGUF: .*gguf_file="model-Q4_K.gguf".*dequantize=True.*save_pretrained'),
        ("pytorch_model.bin", r"holds no \*.safetensors file but pickles .*save_pretrained"),
        ("pytorch_model-00001-of-00002.bin", r"but pickles .*save_pretrained"),
        ("tf_model.h5", "but TensorFlow's weights"),
        ("flax_model.msgpack", "but Flax's weights"),
    ],
)
def test_other_formats_are_named_with_what_to_do(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=message):
        randes.Superposition.create(tmp_path)
    if name.endswith(".gguf"):
        with pytest.raises(CheckpointError, match=message):
            randes.Superposition.create(tmp_path / name)


@pytest.mark.parametrize(
    ("method", "advice"),
    [
        ("gptq", "does not turn these back into such. Give the model that it was made from"),
        ("awq", "does not turn these back into such"),
        ("bitsandbytes", r"model.dequantize\(\), save it with save_pretrained"),
        ("fp8", r"transformers.FineGrainedFP8Config\(dequantize=True\)"),
        ("mxfp4", r"transformers.Mxfp4Config\(dequantize=True\)"),
        ("compressed-tensors", r"transformers.CompressedTensorsConfig\(dequantize=True\)"),
    ],
)
def test_quantised_folders_are_named_with_what_to_do(method: str, advice: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    save_file(net().state_dict(), tmp_path / "model.safetensors")
    values = {"model_type": "llama", "quantization_config": {"quant_method": method}}
    (tmp_path / "config.json").write_text(json.dumps(values))
    sup = randes.Superposition.create(net())
    for attempt in (lambda: randes.Superposition.create(tmp_path), lambda: sup.add("a", tmp_path)):
        with pytest.raises(CheckpointError, match=rf"is quantised, by {method}: .*{advice}"):
            attempt()
    if "transformers." in advice and method != "compressed-tensors":  # which needs a package of its own
        kind = getattr(transformers, advice.split(".")[1].split("\\")[0])
        assert kind(dequantize=True).dequantize


@pytest.mark.parametrize(
    "name",
    ["up.qweight", "up.weight.absmax", "up.weight.quant_state.bitsandbytes__nf4", "up.weight_scale_inv", "up.SCB",
     "experts.gate_up_proj_blocks"],
)  # fmt: skip
def test_what_is_beside_weights_in_few_bits_is_known_without_a_configuration(name: str, tmp_path: Path) -> None:
    tensors = net().state_dict() | {name: torch.ones(2)}
    save_file(tensors, tmp_path / "base.safetensors")
    for source in (tensors, tmp_path / "base.safetensors"):
        with pytest.raises(CheckpointError, match=f"is quantised, by .*it has {name}"):
            randes.Superposition.create(source)


def test_a_store_is_no_checkpoint(tmp_path: Path) -> None:
    sup = randes.compress(net(), {"a": finetune(net(), 1)})
    sup.save(tmp_path / "store")
    with pytest.raises(CheckpointError, match="is a store of randes, not a checkpoint; retrieve"):
        sup.add("b", tmp_path / "store")


COMMIT = "0123456789abcdef0123456789abcdef01234567"


def cached(cache: Path, name: str, files: dict[str, Any], revision: str = "main") -> Path:
    """A model in a cache, as ``huggingface_hub`` lays it out."""
    repo = cache / repo_folder_name(repo_id=name, repo_type="model")
    snapshot = repo / "snapshots" / COMMIT
    for folder in (repo / "blobs", repo / "refs", snapshot):
        folder.mkdir(parents=True, exist_ok=True)
    (repo / "refs" / revision).write_text(COMMIT)
    for number, (file, content) in enumerate(files.items()):
        blob = repo / "blobs" / f"{number:064}"
        save_file(content, blob) if file.endswith(".safetensors") else blob.write_text(json.dumps(content))
        (snapshot / file).symlink_to(Path("..") / ".." / "blobs" / blob.name)
    return snapshot


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hub"


def test_a_name_of_the_hub_is_the_folder_in_the_cache(cache: Path, tmp_path: Path) -> None:
    base, tuned = net(), finetune(net(), 1)
    config = {"model_type": "net", "hidden": 32}
    snapshot = cached(cache, "acme/base", {"model.safetensors": base.state_dict(), "config.json": config})
    cached(cache, "acme/tuned", {"model.safetensors": tuned.state_dict(), "config.json": config}, revision="v1")
    assert local("acme/base") == snapshot
    assert config_of("acme/base") is not None
    assert model_files(Path("acme/base")).keys() == {"config.json"}
    found = randes.compress("acme/base", {"a": "acme/tuned@v1"})
    expected = randes.compress(base, {"a": tuned})
    assert found.base_digests == expected.base_digests
    assert found.members["a"].digests == expected.members["a"].digests
    found.save(tmp_path / "store")
    found.remove("a", Path("acme/tuned@v1"))
    (tmp_path / "acme" / "base").mkdir(parents=True)  # what is here comes first
    with pytest.raises(CheckpointError, match=r"acme/base holds no \*.safetensors file"):
        randes.Superposition.create("acme/base")


def test_what_is_not_in_the_cache_is_said_so(cache: Path, tmp_path: Path) -> None:
    cached(cache, "acme/half", {"config.json": {}})  # as AutoConfig leaves it
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    parts = {"model.safetensors.index.json": index, "model-00001-of-00002.safetensors": ONE}
    cached(cache, "acme/part", parts)
    for name in ("acme/half", "acme/part", "acme/none", "none", "acme/half@other"):
        with pytest.raises(CheckpointError, match=f"^{name} does not exist: no file or folder .* hub does not give"):
            sources.read(name)
    for name in ("acme/none.safetensors", "a/b/c", "/acme/none", "./acme/none", "../none"):
        with pytest.raises(CheckpointError, match=r"does not exist$"):
            sources.read(name)


def test_the_command_line_takes_names_of_the_hub(tmp_path: Path) -> None:
    base, tuned = net(), finetune(net(), 1)
    cached(tmp_path / "hub", "acme/base", {"model.safetensors": base.state_dict()})
    cached(tmp_path / "hub", "acme/tuned", {"model.safetensors": tuned.state_dict()})
    command = (
        f"import os; os.environ |= {{'HF_HUB_CACHE': {str(tmp_path / 'hub')!r}, 'HF_HUB_OFFLINE': '1'}};"
        " from randes.cli import app; app()"
    )
    arguments = ("compress", "--base", "acme/base", "--model", "a=acme/tuned", "--out", str(tmp_path / "store"))
    done = subprocess.run([sys.executable, "-c", command, *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert randes.Superposition.load(tmp_path / "store").names == ["a"]


READ_ALL = """
import resource, signal, sys
from randes import CheckpointError
from randes.checkpoints import sources
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
signal.alarm(60)
for folder in sys.argv[1:]:
    try:
        print(*sources.read(folder))
    except CheckpointError as error:
        print("refused")
"""


def test_what_lies_in_the_place_of_a_folders_text_is_not_read(tmp_path: Path) -> None:
    """In a process that ends where it waits or takes all memory."""
    folders = []
    for name in ("config.json", "quantize_config.json", "manifest.json", "model.safetensors.index.json"):
        for how in ("pipe", "without end", "a terabyte"):
            folders.append(folder := tmp_path / f"{how} as {name}")
            folder.mkdir()
            save_file({"weight": torch.zeros(40, 40)}, folder / "model.safetensors")
            if how == "pipe":
                os.mkfifo(folder / name)
            elif how == "without end":
                (folder / name).symlink_to("/dev/zero")
            else:
                with (folder / name).open("wb") as opened:
                    opened.truncate(1 << 40)
    run = subprocess.run([sys.executable, "-c", READ_ALL, *folders], capture_output=True, text=True)
    # What is only perhaps a store, or in few bits, is passed over where weights are there.
    assert run.stdout.split() == ["weight"] * 9 + ["refused"] * 3, run.stderr
