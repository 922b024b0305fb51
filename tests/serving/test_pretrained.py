"""Folders of Transformers models that lie, or are broken: whatever Transformers has against them ends as our error."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from models import finetune
from torch import nn

import randes
import randes.transformers

CONFIG = {
    "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_embd": 32, "n_head": 2, "n_layer": 2,
    "n_positions": 16, "vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A folder with a model's files and an index of them; the store of it and of one fine-tune is beside it."""
    torch.manual_seed(0)
    model = hf.GPT2LMHeadModel(hf.GPT2Config(**CONFIG))
    folder = tmp_path / "base"
    model.save_pretrained(folder, max_shard_size="20KB")
    sup = randes.Superposition.create(folder, randes.Config(min_width=16))
    sup.add("m", finetune(model, 1))
    sup.save(tmp_path / "store")
    return folder


def load(base: Path, **kwargs: Any) -> randes.SuperposedModel:
    return randes.from_pretrained(base, base.parent / "store", **kwargs)


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize(
    "values",
    [
        {"bos_token_id": [None]}, {"n_embd": "a"}, {"n_head": 3}, {"n_inner": -5}, {"attn_pdrop": 7.0},
        {"activation_function": "a/b"}, {"model_type": "nobody"}, {"dtype": "nn"}, {"__class__": 3}, {"id2label": 3},
        {"n_positions": 2**62}, {"auto_map": {"AutoConfig": 3}, "model_type": "nobody"},
        {"quantization_config": {}}, {"vocab_size": 51},
        {"_attn_implementation": "flash_attention_2"},
    ],
    ids=json.dumps,
)  # fmt: skip
def test_a_configuration_that_transformers_cannot_use_is_our_error(values: dict[str, Any], base: Path) -> None:
    change(base / "config.json", **values)
    with pytest.raises(randes.CheckpointError, match=r"base (cannot be loaded by Transformers: \w+: |must have a)"):
        load(base)


@pytest.mark.parametrize("name", ["someone/code", "paged|someone/code@main"])
@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "_experts_implementation_internal"])
def test_code_of_a_repository_is_not_fetched(key: str, name: str, base: Path) -> None:
    for value in (name, {"text_config": name}):
        change(base / "config.json", **{key: value})
        with pytest.raises(randes.CheckpointError, match=rf"{key}.* must be an implementation of Transformers itself"):
            load(base)
        with pytest.raises(randes.CheckpointError, match="must be an implementation of Transformers itself"):
            randes.Superposition.create(base)


@pytest.mark.parametrize("values", [{"n_embd": 2**20}, {"n_positions": 2**24}, {"vocab_size": 2**26}], ids=json.dumps)
def test_a_model_far_larger_than_the_stores_base_is_not_made(
    values: dict[str, Any], base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change(base / "config.json", **values)
    monkeypatch.setattr(hf.GPT2LMHeadModel, "from_pretrained", None)
    with pytest.raises(randes.CheckpointError, match=r"must have a model of at most \d+ numbers, as the store's base"):
        load(base)


def test_files_elsewhere_are_not_opened(base: Path) -> None:
    weights = next(base.glob("*-00001-*.safetensors"))
    weights.rename(base.parent / weights.name)
    index = base / "model.safetensors.index.json"
    named = json.loads(index.read_text())["weight_map"]
    change(index, weight_map={name: f"../{file}" if file == weights.name else file for name, file in named.items()})
    with pytest.raises(randes.CheckpointError, match=r"weight_map.* got '\.\./model"):
        load(base)
    (base.parent / weights.name).rename(weights)
    change(index, weight_map=named)
    change(base / "config.json", transformers_weights="../store/base.safetensors")
    with pytest.raises(randes.CheckpointError, match=r"transformers_weights must be the name of a file beside it"):
        load(base)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors.index.json", "weights"])
@pytest.mark.parametrize("what", ["pipe", "cut short", "folder"])
def test_a_file_that_is_none_is_refused_at_once(name: str, what: str, base: Path) -> None:
    file = next(base.glob("*.safetensors")) if name == "weights" else base / name
    if what == "cut short":
        os.truncate(file, 3)
    else:
        file.unlink()
        os.mkfifo(file) if what == "pipe" else file.mkdir()
    began = time.monotonic()
    with pytest.raises(randes.CheckpointError):
        load(base)
    assert time.monotonic() - began < 5


def test_a_pickle_is_not_opened(base: Path, tmp_path: Path) -> None:
    model = load(base).merge_and_unload("m")
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    for file in base.glob("model*"):
        file.unlink()
    (tmp_path / "pytorch_model.bin").rename(base / "pytorch_model.bin")
    with pytest.raises(randes.CheckpointError, match=r"OSError: .*no file named model\.safetensors"):
        load(base)


def test_what_is_no_fault_of_a_folder_stays_what_it_is(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def short(*_: Any, **__: Any) -> nn.Module:
        raise torch.OutOfMemoryError("short")

    with monkeypatch.context() as patch:
        patch.setattr(hf.GPT2LMHeadModel, "from_pretrained", short)
        with pytest.raises(torch.OutOfMemoryError, match="short"):
            load(base)
    with pytest.raises(OSError, match=r"couldn't find them"):  # it cannot be reached, or is not there
        randes.from_pretrained("nobody/nothing", base.parent / "store", local_files_only=True)


def test_where_a_model_is_holds_for_its_configuration(base: Path) -> None:
    (base / "inner").mkdir()
    for file in base.glob("*.*"):
        file.rename(base / "inner" / file.name)
    assert load(base, subfolder="inner").names == ["m"]


@pytest.mark.parametrize("values", [{"base": "../a"}, {"base": ""}, {"base": None}, {"base": 3}, {}], ids=json.dumps)
def test_the_file_of_the_base_is_beside_the_configuration(values: dict[str, Any], base: Path) -> None:
    store = base.parent / "store"
    change(base / "config.json", quantization_config={"quant_method": "randes", **values})
    with pytest.raises(randes.StoreError, match="must be the name of a file beside it"):
        load(base)
    change(store / "config.json", quantization_config={"quant_method": "randes", **values})
    with pytest.raises(randes.StoreError, match="must be the name of a file beside it"):
        hf.AutoModelForCausalLM.from_pretrained(store)
