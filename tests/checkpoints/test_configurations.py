"""A fine-tune that was saved to run under another configuration is refused by what differs; labels and names may."""

import copy
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as hf
from architectures import GROUPED, SIZES
from models import finetune, net, stored
from typer.testing import CliRunner

import randes
from randes.checkpoints.configurations import check_configuration
from randes.checkpoints.huggingface import configuration, model_class
from randes.checkpoints.sources import write_file
from randes.cli import app

CONFIG = randes.Config(min_width=16, rank=0)
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **GROUPED}


def compare(base: dict[str, Any], finetuned: dict[str, Any], folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(finetuned))
    check_configuration({"config.json": json.dumps(base).encode()}, folder)


def llama(**values: Any) -> hf.LlamaForCausalLM:
    torch.manual_seed(0)
    return hf.LlamaForCausalLM(hf.LlamaConfig(**{**GROUPED, **values})).eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a fine-tune of it, and the same under another configuration."""
    folder = tmp_path_factory.mktemp("llama")
    base = llama()
    tuned = finetune(base, 0)
    base.save_pretrained(folder / "base")
    tuned.save_pretrained(folder / "same")
    other = llama(rope_theta=5e5, rms_norm_eps=1e-3)
    other.load_state_dict(tuned.state_dict())
    other.save_pretrained(folder / "other")
    return folder


REFUSED = (
    "must have the base's configuration, which all models run under: rms_norm_eps must be 1e-06, got 0.001;"
    r" rope_parameters\.rope_theta must be 10000.0, got 500000.0"
)


def test_a_folder_of_another_configuration_is_refused_before_anything_is_changed(folders: Path, tmp_path: Path) -> None:
    with pytest.raises(randes.CheckpointError, match=REFUSED):
        randes.compress(folders / "base", {"m": folders / "same", "n": folders / "other"}, CONFIG)
    sup = randes.Superposition.create(folders / "base", CONFIG)
    sup.add("m", folders / "same")
    before = stored(sup, tmp_path / "store")
    loaded = randes.Superposition.load(tmp_path / "store")
    for held in (sup, loaded):
        with pytest.raises(randes.CheckpointError, match=REFUSED):
            held.add("n", folders / "other")
        with pytest.raises(randes.CheckpointError, match=REFUSED):
            held.add("n", folders / "other" / "model.safetensors")
        assert held.names == ["m"]
    assert stored(loaded, tmp_path / "again") == before
    for arguments in (
        ["add", tmp_path / "store", f"n={folders / 'other'}"],
        ["compress", "--base", folders / "base", "--model", f"n={folders / 'other'}", "--out", tmp_path / "new"],
    ):
        found = CliRunner().invoke(app, list(map(str, arguments)))
        assert found.exit_code == 2
        assert "must have the base's configuration" in found.output


def test_modules_are_compared_as_folders_are(folders: Path) -> None:
    other = hf.LlamaForCausalLM.from_pretrained(folders / "other")
    for base in (llama(), folders / "base"):
        sup = randes.Superposition.create(base, CONFIG)
        with pytest.raises(randes.CheckpointError, match=f"the LlamaForCausalLM {REFUSED}"):
            sup.add("n", other)
        sup.add("m", hf.LlamaForCausalLM.from_pretrained(folders / "same"))
        sup.remove("m", folders / "same")
        sup.add("n", other.state_dict())  # which says nothing of how it is run
        sup.remove("n", other)  # what was added can always be taken away again
    model = randes.SuperposedModel(llama(), randes.Superposition.create(llama(), CONFIG), capacity=2)
    with pytest.raises(randes.CheckpointError, match=REFUSED):
        model.add_adapter("n", folders / "other")
    assert not model.names


def test_a_base_without_a_configuration_is_compared_with_nothing(folders: Path) -> None:
    sup = randes.Superposition.create(llama().state_dict(), CONFIG)
    sup.add("n", folders / "other")
    assert sup.names == ["n"]


def test_a_store_of_a_store_has_the_same_configuration(folders: Path, tmp_path: Path) -> None:
    sup = randes.Superposition.create(folders / "base", CONFIG)
    stored(sup, tmp_path / "store")
    (tmp_path / "store" / "moved.safetensors").write_bytes((folders / "same" / "model.safetensors").read_bytes())
    randes.Superposition.load(tmp_path / "store").add("m", tmp_path / "store" / "moved.safetensors")


HARMLESS = [
    {"id2label": {"0": "a", "1": "b", "2": "c"}, "label2id": {"a": 0, "b": 1, "c": 2}, "problem_type": "regression"},
    {"_name_or_path": "elsewhere", "transformers_version": "4.40.0", "dtype": "float16", "torch_dtype": "float16"},
    {"use_cache": False, "eos_token_id": [2, 3], "pad_token_id": 5, "bos_token_id": 7, "attention_dropout": 0.5},
    {"rms_norm_eps": 1e-6, "hidden_act": "silu", "rope_scaling": None, "rope_theta": 10000.0, "num_beams": None},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 10000}, "pretraining_tp": 1, "architectures": None},
]
"""What another fine-tune of the same base may say; the last two what a class means by leaving it out."""


@pytest.mark.parametrize("values", HARMLESS, ids=lambda values: next(iter(values)))
def test_what_changes_no_answer_may_differ(values: dict[str, Any], tmp_path: Path) -> None:
    compare(LLAMA, LLAMA | values, tmp_path)
    compare(LLAMA | values, LLAMA, tmp_path)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"rope_theta": 5e5}, "rope_parameters.rope_theta must be 10000.0, got 500000.0"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_parameters.factor must be nothing, got 2.0"),
        ({"hidden_act": "gelu"}, "hidden_act must be 'silu', got 'gelu'"),
        ({"num_attention_heads": 8}, "num_attention_heads must be 4, got 8"),
        ({"a_key_of_the_future": 1}, "a_key_of_the_future must be nothing, got 1"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config must be nothing, got"),
        ({"model_type": "mistral"}, "model_type must be 'llama', got 'mistral'"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures must be .*Causal.*, got .*Sequence"),
    ],
)
def test_what_may_change_an_answer_is_refused_by_name(values: dict[str, Any], named: str, tmp_path: Path) -> None:
    with pytest.raises(randes.CheckpointError, match=named):
        compare(LLAMA, LLAMA | values, tmp_path)
    with pytest.raises(randes.CheckpointError, match="must have the base's configuration"):
        compare(LLAMA | values, LLAMA, tmp_path)


@pytest.mark.parametrize(
    ("architecture", "token", "read"),
    [
        ("LlamaForCausalLM", "pad_token_id", False),
        ("LlamaForSequenceClassification", "pad_token_id", True),
        ("RobertaForCausalLM", "pad_token_id", True),
        ("RobertaForCausalLM", "eos_token_id", False),
        ("BartForConditionalGeneration", "eos_token_id", False),
        ("BartForConditionalGeneration", "pad_token_id", True),
        ("BartForSequenceClassification", "eos_token_id", True),
        ("CLIPTextModelWithProjection", "eos_token_id", True),
    ],
)
def test_tokens_are_compared_where_a_model_reads_them(
    architecture: str, token: str, read: bool, tmp_path: Path
) -> None:
    base = {"architectures": [architecture], token: 1}
    if not read:
        compare(base, base | {token: 2}, tmp_path)
        return
    with pytest.raises(randes.CheckpointError, match=f"{token} must be 1, got 2"):
        compare(base, base | {token: 2}, tmp_path)


def test_configurations_in_a_configuration_are_compared(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "num_attention_heads": 4}
    text, vision = sizes | {"vocab_size": 64}, sizes | {"image_size": 16, "patch_size": 8}
    base = {"model_type": "clip", "text_config": text, "vision_config": vision}
    fine = {"text_config": text | {"layer_norm_eps": 1e-5, "id2label": {"0": "a"}}, "vision_config": vision}
    compare(base, base | fine, tmp_path)
    with pytest.raises(randes.CheckpointError, match=r"vision_config\.hidden_act must be 'quick_gelu', got 'gelu'"):
        compare(base, base | {"vision_config": vision | {"hidden_act": "gelu"}}, tmp_path)


def test_classifiers_have_classes_of_their_own(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = hf.BertForSequenceClassification(hf.BertConfig(**SIZES))
    tuned = hf.BertForSequenceClassification(hf.BertConfig(**SIZES, num_labels=5, problem_type="regression"))
    tuned.load_state_dict({k: v for k, v in base.state_dict().items() if "classifier" not in k}, strict=False)
    tuned.save_pretrained(tmp_path / "tuned")
    sup = randes.Superposition.create(base, CONFIG)
    sup.add("module", tuned)
    sup.add("folder", tmp_path / "tuned")


def test_without_transformers_what_both_say_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = randes.checkpoints.configurations.find_spec
    monkeypatch.setattr(
        randes.checkpoints.configurations, "find_spec", lambda name: None if name == "transformers" else find(name)
    )
    compare(LLAMA, LLAMA | {"id2label": {"0": "a"}}, tmp_path)
    with pytest.raises(randes.CheckpointError, match="hidden_size must be 32, got 33"):
        compare(LLAMA, LLAMA | {"hidden_size": 33, "rms_norm_eps": 1e-5}, tmp_path)
    with pytest.warns(UserWarning, match="one alone has rms_norm_eps in its config.json"):
        compare(LLAMA, LLAMA | {"rms_norm_eps": 1e-5}, tmp_path)


def test_an_unknown_architecture_is_compared_as_it_was_written(tmp_path: Path) -> None:
    base = {"model_type": "nobody_knows", "width": 3}
    compare(base, base | {"transformers_version": "1"}, tmp_path)
    with pytest.raises(randes.CheckpointError, match="width must be 3, got 4"):
        compare(base, base | {"width": 4}, tmp_path)


@pytest.mark.parametrize("text", ["", "[]", '"text"', '{"quantization_config": 3}'])
def test_a_configuration_that_cannot_be_read_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(randes.CheckpointError, match=r"must have a config\.json that can be read"):
        check_configuration({"config.json": b"{}"}, tmp_path)


def test_equal_configurations_need_no_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    compare(LLAMA, copy.deepcopy(LLAMA) | {"_name_or_path": "x"}, tmp_path)


def test_an_adapters_folder_with_a_configuration_is_compared(folders: Path, tmp_path: Path) -> None:
    base = net()
    write_file(tmp_path / "model.safetensors", base.state_dict())
    (tmp_path / "config.json").write_text(json.dumps({"width": 3}))
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "config.json").write_text(json.dumps({"width": 4}))
    with pytest.raises(randes.CheckpointError, match="width must be 3, got 4"):
        randes.superpose_adapters(tmp_path, {"a": tmp_path / "adapter"})


def test_a_base_of_another_configuration_is_not_served(folders: Path) -> None:
    sup = randes.Superposition.create(folders / "base", CONFIG)
    sup.add("m", folders / "same")
    plain = llama().state_dict()
    for values, refused in (({"rope_theta": 5e5}, True), ({"output_hidden_states": True}, False)):
        module = llama(**values)
        module.load_state_dict(plain)
        if refused:
            with pytest.raises(randes.BaseMismatchError, match=r"rope_parameters\.rope_theta must be 10000\.0, got 5"):
                randes.SuperposedModel(module, sup)
            assert type(module.lm_head) is torch.nn.Linear
        else:
            assert randes.SuperposedModel(module, sup).names == ["m"]


@pytest.mark.parametrize(
    "name", ["pipeline", "AutoModel", "logging", "models", "__dict__", "GPT2Config", "is_torch_available", ""]
)
def test_nothing_but_a_model_is_made_of_what_a_configuration_names(name: str) -> None:
    config = SimpleNamespace(architectures=[name])
    with pytest.raises(randes.BaseMismatchError, match="must name a class of Transformers in its architectures"):
        model_class(config, "here")


@pytest.mark.parametrize("values", [{"n_layer": 10**6}, {"n_layer": 10**9}, {"num_labels": 10**9}, {"n_layer": 5000}])
def test_a_model_of_a_million_layers_is_not_made(values: dict[str, Any], tmp_path: Path) -> None:
    config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_embd": 32, "n_head": 2, "vocab_size": 50}
    (tmp_path / "config.json").write_text(json.dumps(config | values))
    write_file(tmp_path / "model.safetensors", {"transformer.wte.weight": torch.zeros(50, 32)})
    began = time.monotonic()
    with pytest.raises(randes.CheckpointError, match=r"at most 65536, got|as many layers as its config\.json says"):
        randes.Superposition.create(tmp_path)
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    "values",
    [{"architectures": "A"}, {"architectures": [1]}, {"model_type": 3}, {"quantization_config": []},
     {"text_config": {"num_hidden_layers": 1e9}}],
)  # fmt: skip
def test_a_configuration_of_other_types_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(randes.CheckpointError, match=r"here must have a config\.json that can be read: config\.json\."):
        configuration(json.dumps(values).encode(), "here")
