"""What Transformers and torch do with models besides calling them, done to served ones: pickled, resized, trained."""

import copy
import io
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from architectures import build
from models import alone, finetune
from torch import Tensor

import randes
import randes.transformers

NAMES = ["m0", "m1"]
IDS = torch.arange(3, 15).view(2, 6)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    base = build("Llama")
    base.save_pretrained(folder / "base")
    for number, name in enumerate(NAMES):
        finetune(base, number, 0.1).save_pretrained(folder / name)
    sup = randes.compress(folder / "base", {name: folder / name for name in NAMES}, randes.Config(min_width=16))
    sup.save(folder / "store")
    return folder / "store"


def loaded(store: Path, kind: str) -> Any:
    if kind == "own":
        return hf.AutoModelForCausalLM.from_pretrained(store)
    return randes.from_pretrained(store)


def saved(model: Any, way: str) -> Any:
    if way == "deepcopy":
        return copy.deepcopy(model)
    if way == "pickle":
        return pickle.loads(pickle.dumps(model))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


KINDS = pytest.mark.parametrize("kind", ["wrapper", "own"])


@KINDS
@pytest.mark.parametrize("way", ["pickle", "torch.save", "deepcopy"])
def test_a_pickled_model_is_the_same_and_serves_on(store: Path, kind: str, way: str) -> None:
    model = loaded(store, kind)
    with torch.no_grad():
        y = model(IDS, adapter_names=NAMES).logits
        other = saved(model, way)
        assert torch.equal(other(IDS, adapter_names=NAMES).logits, y)
        assert type(other) is type(model)
        assert other.generate(IDS, adapter_names=NAMES, max_new_tokens=2).shape[0] == 2
        other.set_adapter("m1")  # and is a model of its own
        model.set_adapter("m0")
        assert not torch.equal(other(IDS).logits, model(IDS).logits)
        with pytest.raises(randes.UnknownModelError):
            other(IDS, adapter_names=["m0", "absent"])


@KINDS
def test_embeddings_are_not_resized_until_one_model_is_merged(store: Path, kind: str) -> None:
    model = loaded(store, kind)
    before = model(IDS, adapter_names=NAMES).logits
    model.set_adapter("m0")  # with one model chosen, weights could be read
    for part in (model, model.get_decoder()):
        with pytest.raises(ValueError, match=r"cannot have its token embeddings resized: .*merge_and_unload\(name\)"):
            part.resize_token_embeddings(200)
    assert torch.equal(model(IDS, adapter_names=NAMES).logits, before)
    plain = model.merge_and_unload("m0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain.resize_token_embeddings(200)
    assert plain(IDS).logits.shape[-1] == 200


@KINDS
def test_a_trainer_refuses_it_by_name_and_takes_a_merged_model(store: Path, kind: str, tmp_path: Path) -> None:
    model = loaded(store, kind)
    model.set_adapter("m0")
    how = hf.TrainingArguments(str(tmp_path), report_to=[], use_cpu=True, max_steps=1, save_strategy="no")
    data = [{"input_ids": row, "labels": row} for row in IDS]
    with pytest.raises(ValueError, match=r"cannot be given to a Trainer: .*merge_and_unload\(name\)"):
        hf.Trainer(model, how, train_dataset=data)
    hf.Trainer(model.merge_and_unload("m0"), how, train_dataset=data)


def gradients(model: Any, names: list[str], other: str | None = None) -> dict[str, Tensor]:
    """Of a loss on a mixed batch; ``other`` is chosen before the backward pass."""
    model.train()
    model.requires_grad_(True)
    loss = model(input_ids=IDS, labels=IDS, adapter_names=names, use_cache=False).loss
    if other is not None:
        model.set_adapter(other)
    loss.backward()
    found = {name: value.grad for name, value in model.named_parameters()}
    return {name: value for name, value in found.items() if value is not None}


def enable(model: Any, reentrant: bool) -> None:
    name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    getattr(model, f"{name}_checkpointing_enable")({"use_reentrant": reentrant})


@KINDS
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("first", [True, False])
def test_checkpointed_layers_run_again_as_what_they_ran_as(
    store: Path, kind: str, reentrant: bool, first: bool
) -> None:
    expected = gradients(loaded(store, kind), NAMES)
    if first and kind == "wrapper":  # it was enabled before the model was served
        base = hf.AutoModelForCausalLM.from_pretrained(store.parent / "base")
        enable(base, reentrant)
        model: Any = randes.SuperposedModel(base, randes.Superposition.load(store))
    else:
        model = loaded(store, kind)
        enable(model, reentrant)
    if reentrant:
        model.enable_input_require_grads()
    found = gradients(model, NAMES, None if first else "m1")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)
    if first and kind == "wrapper":
        plain = model.merge_and_unload("m0")
        assert "_set_gradient_checkpointing" not in vars(plain)
        assert not any("Recomputed" in str(vars(part)) for part in plain.modules())


@pytest.mark.parametrize("name", ["FalconForCausalLM", "FalconModel"])
def test_falcons_own_linear_layers_are_served_and_change_outputs_in_place(name: str) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 100, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    base = getattr(hf, name)(hf.FalconConfig(**sizes, bias=True, new_decoder_architecture=True)).eval()
    models = {name: finetune(base, number, 0.1).eval() for number, name in enumerate(NAMES)}
    sup = randes.compress(copy.deepcopy(base), models)
    plain = {name: alone(base, sup, name) for name in NAMES}
    served = randes.SuperposedModel(base, sup)
    y = served(IDS, adapter_names=NAMES)[0]
    for row, own in enumerate(NAMES):
        torch.testing.assert_close(y[row], plain[own](IDS[row : row + 1])[0][0], rtol=1e-4, atol=1e-4)
    merged: Any = served.merge_and_unload("m0")
    assert sum(type(layer).__name__ == "FalconLinear" for layer in merged.modules()) == 8
    torch.testing.assert_close(merged(IDS)[0], plain["m0"](IDS)[0])


def test_what_a_call_left_behind_is_named_when_rows_are_mixed() -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 100, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "lru_width": 64}
    base = hf.RecurrentGemmaForCausalLM(hf.RecurrentGemmaConfig(**sizes, num_attention_heads=4)).eval()
    sup = randes.compress(copy.deepcopy(base), {name: finetune(base, number) for number, name in enumerate(NAMES)})
    served = randes.SuperposedModel(base, sup)
    with torch.no_grad():
        served(IDS[:1], adapter_names=["m0"])  # leaves a state of one row
        with pytest.raises(ValueError, match="its forward sets recurrent_states, which would be the last model's"):
            served(IDS, adapter_names=NAMES)


def test_tied_and_untied_models_are_served_together_from_a_base_with_a_head(tmp_path: Path) -> None:
    tied = build("Llama, tied")
    tied.save_pretrained(tmp_path / "tied")
    finetune(tied, 0, 0.1).save_pretrained(tmp_path / "m0")
    base = copy.deepcopy(tied)
    base.config.tie_word_embeddings = False
    base.lm_head.weight = torch.nn.Parameter(base.model.embed_tokens.weight.detach().clone())
    base.save_pretrained(tmp_path / "base")
    untied = finetune(base, 1, 0.1)
    untied.save_pretrained(tmp_path / "m1")
    models = {name: tmp_path / name for name in NAMES}
    with pytest.raises(randes.CheckpointError, match=r"a head of its own, which the base has tied to .*that tie"):
        randes.compress(tmp_path / "tied", models, randes.Config(min_width=16))
    sup = randes.compress(tmp_path / "base", models, randes.Config(min_width=16, group_size=1))
    own = sup.retrieve("m0")
    torch.testing.assert_close(own["lm_head.weight"], own["model.embed_tokens.weight"], rtol=0, atol=1e-2)
    sup.save(tmp_path / "store")
    model = randes.from_pretrained(tmp_path / "store")
    y = model(IDS, adapter_names=NAMES).logits
    for row, name in enumerate(NAMES):
        plain = hf.AutoModelForCausalLM.from_pretrained(tmp_path / name)
        torch.testing.assert_close(y[row], plain(IDS[row : row + 1]).logits[0], rtol=0, atol=0.02)


@KINDS
def test_one_device_may_be_named_and_several_are_refused(store: Path, kind: str) -> None:
    load: Any = hf.AutoModelForCausalLM.from_pretrained if kind == "own" else randes.from_pretrained
    assert load(store, device_map={"": "cpu"}).active_adapters is not None
    several = {"model.embed_tokens": "cpu", "model.layers": 0, "model.norm": "disk", "lm_head": "cpu"}
    for device_map, found in ((several, "got 0, cpu, disk"), ({"": "disk"}, "got disk")):
        with pytest.raises(ValueError, match=rf"device_map must put a model .* on one device, {found}.*parallelize"):
            load(store, device_map=device_map)
    if kind == "wrapper":
        for name in ("tp_plan", "tp_size", "distributed_config"):
            with pytest.raises(ValueError, match=f"{name} must be left out: several devices share it once it is"):
                load(store, **{name: "auto"})
        with pytest.raises(ValueError, match="device_map must put a model"):
            load(store.parent / "base", store, device_map=several)
