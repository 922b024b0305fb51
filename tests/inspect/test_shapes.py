"""What is planned for a model that is not at hand."""

import json
from pathlib import Path

import pytest
import torch
import transformers as hf
from models import net
from safetensors.torch import save_model

import randes
from randes.errors import CheckpointError

SIZES = {"vocab_size": 200, "n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 32}


def gpt2(**values: object) -> hf.GPT2Config:
    return hf.GPT2Config(**SIZES, **values)


def test_a_module_on_meta_is_planned_for_as_one_with_values() -> None:
    with torch.device("meta"):
        empty, tied = net(), hf.GPT2LMHeadModel(gpt2())
    assert randes.plan(empty, 5) == randes.plan(net(), 5)
    assert randes.plan(tied, 5) == randes.plan(hf.GPT2LMHeadModel(gpt2()), 5)
    chosen = randes.choose(empty, 5, budget=4)
    assert chosen == randes.choose(net(), 5, budget=4)


def test_a_configuration_is_planned_for_as_its_model() -> None:
    expected = randes.plan(hf.GPT2LMHeadModel(gpt2()), 8)
    assert randes.plan(gpt2(), 8) == expected
    assert randes.plan(gpt2(architectures=["GPT2LMHeadModel"]), 8) == expected
    assert randes.plan(gpt2(dtype="bfloat16"), 8)[0].separate == expected[0].separate // 2
    classes = hf.ViTConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=128)
    assert randes.plan(classes, 8) == randes.plan(hf.ViTModel(classes), 8)
    chosen = randes.choose(gpt2(), 5, budget=4)
    assert chosen == randes.choose(hf.GPT2LMHeadModel(gpt2()), 5, budget=4)


def test_a_name_is_looked_up_as_transformers_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "owner" / "tiny-gpt2"
    hf.GPT2LMHeadModel(gpt2()).save_pretrained(folder)
    expected = randes.plan(folder, 8)
    for file in folder.glob("*.safetensors"):
        file.unlink()
    assert randes.plan(folder, 8) == expected, "its configuration is enough"
    asked = []
    config = hf.AutoConfig.from_pretrained(folder)
    monkeypatch.setattr(
        hf.AutoConfig, "from_pretrained", lambda *name, **how: asked.append((*name, how["revision"])) or config
    )
    assert randes.plan("owner/elsewhere", 8) == randes.plan("owner/elsewhere@v2", 8) == expected
    assert asked == [("owner/elsewhere", "main"), ("owner/elsewhere", "v2")]


def test_what_has_no_shapes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(name: str, **_: object) -> None:
        raise OSError(f"cannot find {name}\nand more lines")

    monkeypatch.setattr(hf.AutoConfig, "from_pretrained", offline)
    with pytest.raises(CheckpointError, match="no/such is no path, and no model that Transformers finds: cannot find"):
        randes.plan("no/such", 3)
    for path in ("./a/b/c", tmp_path / "none", "absent.safetensors"):
        with pytest.raises(CheckpointError, match="does not exist"):
            randes.plan(path, 3)
    with pytest.raises(CheckpointError, match=r"Transformers makes no model of PreTrainedConfig: [^\n]*$"):
        randes.plan(hf.PreTrainedConfig(), 3)
    (tmp_path / "config.json").write_text(json.dumps({"num_hidden_layers": 10**9}))
    with pytest.raises(CheckpointError, match=r"must have a config.json that can be read"):
        randes.plan(tmp_path, 3)
    (tmp_path / "config.json").unlink()
    save_model(net(), str(tmp_path / "model.safetensors"))
    assert randes.plan(tmp_path, 3) == randes.plan(net(), 3), "files that are there are read"
