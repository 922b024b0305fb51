"""Transformers models: each row of a mixed batch is answered, and continued, as its own fine-tune alone would be."""

import copy
import functools
import importlib
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers as hf
from architectures import CASES, SIZES, VOCABULARY, build, tokens
from models import alone, content, counted, finetune, superposed
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor, nn

import randes
import randes.transformers

MIX = ["m1", "__base__", "m0", "m1"]
CONFIG = randes.Config(min_width=16)


class Served(NamedTuple):
    """A superposed model, and plain ones with each fine-tune's retrieved tensors."""

    model: randes.SuperposedModel
    superposition: randes.Superposition
    plain: dict[str, Any]


@functools.cache
def served(name: str) -> Served:
    base = build(name)
    if name == "GPT-OSS":  # whose sinks cannot be routed by row: see below
        tuned = {f"m{number}": finetune(base, number, 0.1) for number in range(2)}
        for model in tuned.values():
            model.load_state_dict({n: v for n, v in base.state_dict().items() if n.endswith("sinks")}, strict=False)
        sup = randes.compress(copy.deepcopy(base), tuned, CONFIG)
    else:
        sup, _ = superposed(base, 2, CONFIG, size=0.1)
    plain = {model: alone(base, sup, model).eval() for model in {*MIX}}
    return Served(randes.SuperposedModel(base, sup), sup, plain)


def of_row(inputs: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    return {name: value[row : row + 1] for name, value in inputs.items()}


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_every_row_is_answered_as_its_model_alone(name: str) -> None:
    model, sup, plain = served(name)
    inputs = CASES[name].inputs()
    y = model(**inputs, adapter_names=MIX)[0]
    for row, own in enumerate(MIX):
        expected = plain[own](**of_row(inputs, row))[0][0]
        torch.testing.assert_close(y[row], expected, rtol=1e-4, atol=1e-4)
        other = plain["m0" if own != "m0" else "m1"](**of_row(inputs, row))[0][0]
        assert not torch.allclose(y[row], other, atol=0.05)
    for own in ("m0", "__base__"):
        with model.using([own]):
            torch.testing.assert_close(model(**inputs)[0], plain[own](**inputs)[0], rtol=1e-4, atol=1e-4)
    assert sup.superposed


GENERATING = [name for name, case in CASES.items() if case.generates]
BEAMS = ["Llama", "GPT-2", "T5", "BART", "Mixtral"]


def check_generation(name: str, **settings: Any) -> None:
    """Token by token: greedy or by beams, with a left-padded row, the cache, and rows that stop early."""
    model, _, plain = served(name)
    inputs = {key: value for key, value in CASES[name].inputs().items() if key != "decoder_input_ids"}
    settings = {"max_new_tokens": 5, "do_sample": False, **settings}
    y = model.generate(**inputs, adapter_names=MIX, **settings)
    copies = settings.get("num_return_sequences", 1)
    assert len(y) == len(MIX) * copies
    for row, own in enumerate(MIX):
        expected = plain[own].generate(**of_row(inputs, row), **settings)
        found = y[row * copies : (row + 1) * copies]
        assert torch.equal(found[:, : expected.shape[1]], expected)


@pytest.mark.parametrize("name", GENERATING)
def test_greedy_tokens_are_those_of_each_model_alone(name: str) -> None:
    check_generation(name)


@pytest.mark.parametrize("name", BEAMS)
def test_beams_and_returned_sequences_are_their_rows_models(name: str) -> None:
    check_generation(name, num_beams=3, num_return_sequences=2)


def test_sampled_sequences_are_their_rows_models() -> None:
    model, _, plain = served("Llama")
    inputs = tokens()
    y = model.generate(**inputs, adapter_names=MIX, max_new_tokens=1, do_sample=True, top_k=1, num_return_sequences=2)
    for row, own in enumerate(MIX):
        expected = plain[own].generate(**of_row(inputs, row), max_new_tokens=1, do_sample=False)
        assert torch.equal(y[2 * row : 2 * row + 2], expected.expand(2, -1))


def test_generation_needs_a_model_for_each_row() -> None:
    model, _, _ = served("Llama")
    for names in (["m0"], ["m0", "m1"], ["m0"] * 8):
        with pytest.raises(ValueError, match=f"one name a row of the batch, 4, got {len(names)}"):
            model.generate(**tokens(), adapter_names=names, max_new_tokens=1)
    with pytest.raises(randes.UnknownModelError, match="'m9'"):
        model.generate(**tokens(), adapter_names=["m9"] * 4, max_new_tokens=1)
    with pytest.raises(RuntimeError, match="no model is chosen"):
        model.generate(**tokens(), max_new_tokens=1)
    wrong = pytest.raises(ValueError, match="one name a row of the batch of a LlamaForCausalLM, 4, got 2")
    with wrong, model.using(["m0", "m1"]):  # no generation: two rows for a name are not expected
        model(**tokens())
    with pytest.raises(RuntimeError, match="no model is chosen"):
        model(**tokens())  # and nothing of the failed calls is left


def test_beams_follow_the_models_that_were_chosen_before() -> None:
    model, _, _ = served("T5")
    settings = {"max_new_tokens": 4, "do_sample": False, "num_beams": 2}
    named = model.generate(**tokens(), adapter_names=MIX, **settings)
    with model.using(MIX):
        assert torch.equal(model.generate(**tokens(), **settings), named)


def test_one_compiled_program_serves_all_mixes() -> None:
    model, _, plain = served("Llama")
    compiled, programs = counted(model)
    for names in (MIX, MIX[::-1]):
        y = compiled(**tokens(), adapter_names=model.batch(names)).logits
        for row, own in enumerate(names):
            expected = plain[own](**of_row(tokens(), row)).logits[0]
            torch.testing.assert_close(y[row], expected, rtol=1e-4, atol=1e-4)
    assert len(programs) == 1
    torch._dynamo.reset()


def test_low_precision_models_stay_near_each_model_alone() -> None:
    base = build("Llama").bfloat16()
    sup, _ = superposed(base, 2, CONFIG, size=0.1)
    model = randes.SuperposedModel(copy.deepcopy(base), sup)
    inputs = tokens()
    y = model(**inputs, adapter_names=MIX).logits
    for row, own in enumerate(MIX):
        expected = alone(base, sup, own)(**of_row(inputs, row)).logits[0]
        real = inputs["attention_mask"][row].bool()
        assert (y[row] - expected)[real].abs().max() < 0.05 * expected.abs().max()


def test_clips_towers_are_called_by_themselves() -> None:
    torch.manual_seed(0)
    text = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
            "num_attention_heads": 4, "max_position_embeddings": 16, "eos_token_id": 2}  # fmt: skip
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
              "image_size": 16, "patch_size": 8}  # fmt: skip
    base = hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=32)).eval()
    sup, _ = superposed(base, 2, CONFIG, size=0.1)
    model = randes.SuperposedModel(copy.deepcopy(base), sup)
    plain = {name: alone(base, sup, name).eval() for name in {*MIX}}
    ids = tokens()["input_ids"][:, :2]
    images = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(1))  # eight rows: four names times two
    with model.using(MIX):
        found = model.base_model.get_text_features(input_ids=ids).pooler_output
    for row, name in enumerate(MIX):
        expected = plain[name].get_text_features(input_ids=ids[row : row + 1]).pooler_output[0]
        torch.testing.assert_close(found[row], expected, rtol=1e-4, atol=1e-4)
    with model.using(MIX * 2):
        found = model.base_model.get_image_features(pixel_values=images).pooler_output
    for row, name in enumerate(MIX * 2):
        expected = plain[name].get_image_features(pixel_values=images[row : row + 1]).pooler_output[0]
        torch.testing.assert_close(found[row], expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"batch of a CLIPVision\w+, 8, got 4; parts with other numbers of rows"):
        model(input_ids=ids, pixel_values=images, adapter_names=MIX)
    with pytest.raises(
        ValueError, match="logit_scale of a RoutedCLIPModel is kept per model"
    ):  # whose: text's, image's?
        model(input_ids=ids, pixel_values=images[:4], adapter_names=MIX)
    one = model(input_ids=ids, pixel_values=images, adapter_names=["m0"] * 4).logits_per_image
    torch.testing.assert_close(
        one, plain["m0"](input_ids=ids, pixel_values=images).logits_per_image, rtol=1e-4, atol=1e-3
    )


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:2 matrices are kept per model")  # DeBERTa's attention reads its weights itself
@pytest.mark.parametrize("name", ["XLNet", "Deberta"])
def test_models_with_other_rows_inside_serve_one_fine_tune_at_a_time(name: str) -> None:
    torch.manual_seed(0)
    if name == "XLNet":  # positions first
        base = hf.XLNetLMHeadModel(hf.XLNetConfig(vocab_size=VOCABULARY, d_model=32, n_layer=1, n_head=4, d_inner=64))
    else:  # linear layers over relative positions
        config = hf.DebertaConfig(**SIZES, relative_attention=True, pos_att_type=["p2c", "c2p"])
        base = hf.DebertaModel(config)
    sup, _ = superposed(base.eval(), 2, CONFIG, size=0.1)
    model = randes.SuperposedModel(copy.deepcopy(base), sup)
    inputs = {key: value[:, 1:] for key, value in tokens().items()}  # as long as it has rows: nothing else would show
    y = model(**inputs, adapter_names=["m0"] * 4)[0]
    torch.testing.assert_close(y, alone(base, sup, "m0").eval()(**inputs)[0], rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=f"must be one model's for a {name}.*other rows than its batch"):
        model(**inputs, adapter_names=MIX)


def test_attention_that_reads_a_kept_tensor_beside_a_cache_serves_one_model_at_a_time() -> None:
    base = build("GPT-OSS")
    sup, _ = superposed(base, 2, CONFIG, size=0.1)
    model = randes.SuperposedModel(copy.deepcopy(base), sup)
    inputs = tokens()
    y = model(**inputs, adapter_names=["m0"] * 4).logits
    torch.testing.assert_close(y, alone(base, sup, "m0").eval()(**inputs).logits, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"sinks of a RoutedGptOssAttention is kept per model, .* one model at a time"):
        model(**inputs, adapter_names=MIX)


# ---------------------------------------------------------------- folders


def write_tokenizer(folder: Path) -> None:
    words = {word: number for number, word in enumerate(["<pad>", "<bos>", "<eos>", *"abcdefgh"])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = Whitespace()
    wrapped = hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
    wrapped.save_pretrained(folder)


@pytest.fixture(scope="module", params=["Llama, tied", "GPT-2"])
def folders(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and two fine-tunes as save_pretrained writes them, and the store of them."""
    folder = tmp_path_factory.mktemp("folders")
    base = build(request.param)
    for name, model in {"base": base, "m0": finetune(base, 0, 0.1), "m1": finetune(base, 1, 0.1)}.items():
        if "tied" in request.param or name != "base":
            model.tie_weights()
        model.save_pretrained(folder / name)
    write_tokenizer(folder / "base")
    sup = randes.compress(folder / "base", {name: folder / name for name in ("m0", "m1")}, CONFIG)
    sup.save(folder / "store")
    return folder


def answers(folder: Path) -> list[Tensor]:
    """What each row of ``tokens()`` is continued with by its own retrieved model."""
    base = hf.AutoModelForCausalLM.from_pretrained(folder / "base")
    sup = randes.Superposition.load(folder / "store")
    found = []
    for row, name in enumerate(MIX):
        model = copy.deepcopy(base)
        if name != "__base__":
            missing, unexpected = model.load_state_dict(sup.retrieve(name), strict=False)
            assert not unexpected
            assert set(missing) <= {"lm_head.weight"}
        found.append(model.generate(**of_row(tokens(), row), max_new_tokens=4, do_sample=False)[0])
    return found


def generated(model: Any) -> list[Tensor]:
    return list(model.generate(**tokens(), adapter_names=MIX, max_new_tokens=4, do_sample=False))


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(a[: len(b)], b) for a, b in zip(found, expected, strict=True))


def test_from_pretrained_builds_the_class_that_the_configuration_names(folders: Path) -> None:
    model = randes.from_pretrained(folders / "base", folders / "store")
    assert type(model.base_model).__name__ == model.config.architectures[0]
    assert same(generated(model), answers(folders))
    assert same(generated(randes.from_pretrained(folders / "store")), answers(folders))
    assert randes.from_pretrained(folders / "store", dtype=torch.bfloat16).dtype == torch.bfloat16


def test_a_store_is_a_folder_that_transformers_reads(folders: Path) -> None:
    model = hf.AutoModelForCausalLM.from_pretrained(folders / "store")
    assert same(generated(model), answers(folders))
    model.set_adapter("m1")
    with model.disable_adapter():
        base = model(**tokens()).logits
    with model.using(MIX):
        mixed = model(**tokens()).logits
    assert torch.equal(mixed[1], model(**tokens(), adapter_names=MIX).logits[1])
    torch.testing.assert_close(mixed[1], base[1], rtol=1e-4, atol=1e-4)
    assert torch.equal(model(**tokens()).logits, model(**tokens(), adapter_names=["m1"] * 4).logits)
    assert hf.AutoTokenizer.from_pretrained(folders / "store")("a b").input_ids == [3, 4]


def test_a_model_is_saved_as_a_store_again(folders: Path, tmp_path: Path) -> None:
    model = randes.from_pretrained(folders / "store")
    model.save_pretrained(tmp_path / "again")
    assert {f.name for f in (tmp_path / "again").iterdir()} == {f.name for f in (folders / "store").iterdir()}
    hf.AutoModelForCausalLM.from_pretrained(folders / "store").save_pretrained(tmp_path / "third")
    assert same(generated(randes.from_pretrained(tmp_path / "third")), answers(folders))


@torch.no_grad()
def test_layers_that_stay_in_single_precision_take_what_half_precision_gives_them() -> None:
    base = build("T5")
    sup, _ = superposed(base, 2, CONFIG, size=0.1)
    plain, model = alone(base, sup, "m1"), randes.SuperposedModel(copy.deepcopy(base), sup)
    for served_or_plain in (plain, model):
        served_or_plain.bfloat16()
        for path, layer in served_or_plain.named_modules():
            if path.endswith(".wo"):
                layer.float()
    inputs = CASES["T5"].inputs()
    exact = alone(base, sup, "m1").float()(**inputs).logits
    expected, found = plain(**inputs).logits.float(), model(**inputs, adapter_names=["m1"] * 4).logits.float()
    assert (found - exact).norm() < 2 * (expected - exact).norm()


def test_what_is_served_is_not_saved_as_a_plain_model(tmp_path: Path) -> None:
    base = build("Llama")
    sup, _ = superposed(base, 1, CONFIG)
    model = randes.SuperposedModel(copy.deepcopy(base), sup)
    model.set_adapter("m0")
    with pytest.raises(ValueError, match="quantized with randes and is not serializable"):
        hf.PreTrainedModel.save_pretrained(model.base_model, tmp_path / "base")
    assert not (tmp_path / "base" / "model.safetensors").exists()
    plain = model.merge_and_unload()
    hf.PreTrainedModel.save_pretrained(plain, tmp_path / "plain")
    again = type(base).from_pretrained(tmp_path / "plain").state_dict()
    assert all(torch.equal(value, again[name]) for name, value in sup.retrieve("m0").items())


def test_a_model_that_joined_is_in_what_is_saved_and_not_in_the_store_before(folders: Path, tmp_path: Path) -> None:
    before = content(folders / "store")
    model = randes.SuperposedModel.from_pretrained(folders / "store", capacity=3)
    model.add_adapter("m2", folders / "m0")
    inputs, mix = tokens(), ["m2", "m0", "__base__", "m1"]
    y = model.generate(**inputs, adapter_names=mix, max_new_tokens=3, do_sample=False)
    assert content(folders / "store") == before
    model.save_pretrained(tmp_path / "again")
    again = randes.from_pretrained(tmp_path / "again")
    assert again.names == ["m0", "m1", "m2"]
    assert torch.equal(again.generate(**inputs, adapter_names=mix, max_new_tokens=3, do_sample=False), y)


CHANGED = ["Llama, tied", "GPT-2", "Mixtral", "GPT-OSS", "BERT, classifier", "T5", "ViT"]
"""Every way of routing; the others take as long, and are right, too."""


@torch.no_grad()
@pytest.mark.parametrize("name", CHANGED)
def test_models_of_every_kind_join_and_are_merged(name: str) -> None:
    base, sup = build(name), served(name).superposition
    if name == "GPT-OSS":
        sup = randes.compress(copy.deepcopy(base), {"m1": alone(base, sup, "m1")}, CONFIG)
    else:
        sup = randes.Superposition.create(copy.deepcopy(base), CONFIG)
    kinds = [type(layer) for layer in base.modules()]
    kept = [{*vars(layer), *layer._buffers, *layer._modules} for layer in base.modules()]
    model = randes.SuperposedModel(copy.deepcopy(base), sup, capacity=2)
    tuned = {f"m{number}": served(name).plain[f"m{number}"] for number in range(2)}
    for own in tuned:
        if own not in sup.names:
            model.add_adapter(own, tuned[own])
    inputs = CASES[name].inputs()
    y = model(**inputs, adapter_names=MIX)[0]
    for row, own in enumerate(MIX):
        expected = alone(base, sup, own).eval()(**of_row(inputs, row))[0][0]
        torch.testing.assert_close(y[row], expected, rtol=1e-4, atol=1e-4)
    plain = model.merge_and_unload("m1")
    assert [type(layer) for layer in plain.modules()] == kinds
    assert [{*vars(layer), *layer._buffers, *layer._modules} for layer in plain.modules()] == kept
    assert torch.equal(plain(**inputs)[0], alone(base, sup, "m1").eval()(**inputs)[0])


def test_a_class_of_transformers_own_has_the_verbs_and_is_merged_to_itself(folders: Path, tmp_path: Path) -> None:
    model = hf.AutoModelForCausalLM.from_pretrained(folders / "store")
    model.delete_adapter("m0")
    with pytest.raises(randes.UnknownModelError, match="there are: m1"):
        model.set_adapter("m0")
    model.add_adapter("m0")
    model.set_adapter("m0")
    assert model.active_adapters() == ["m0"]
    with pytest.raises(ValueError, match="must be made with room"):
        model.add_adapter("m2", folders / "m0")
    y = model(**tokens()).logits
    plain = model.merge_and_unload()
    assert plain is model
    assert type(plain) is getattr(hf, plain.config.architectures[0])
    torch.testing.assert_close(plain(**tokens()).logits, y, rtol=1e-4, atol=1e-4)
    plain.save_pretrained(tmp_path / "plain")
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert torch.equal(again(**tokens()).logits, plain(**tokens()).logits)


@torch.no_grad()
@pytest.mark.parametrize("way", ["call", "names", "wrapper", "part", "generate", "using"])
def test_an_interrupted_call_leaves_no_choice_behind(folders: Path, way: str) -> None:
    # No hook of a module is called then, not even those that are always called.
    model: Any = hf.AutoModelForCausalLM.from_pretrained(folders / "store").eval()
    ids = tokens()["input_ids"]
    ways: dict[str, Any] = {
        "call": lambda: model(input_ids=ids),
        "names": lambda: model(input_ids=ids, adapter_names=["m0"] * len(ids)),
        "wrapper": lambda: randes.transformers.served(model)(input_ids=ids),
        "part": lambda: model.base_model(input_ids=ids),
        "generate": lambda: model.generate(input_ids=ids, max_new_tokens=2),
        "using": lambda: model.using(["m0"])(model)(input_ids=ids),
    }
    model.set_adapter("m1")
    right = model(input_ids=ids).logits
    model.set_adapter("m0")
    layer = next(module for module in model.base_model.modules() if isinstance(module, nn.ModuleList))[0]
    hook = layer.register_forward_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        ways[way]()
    hook.remove()
    model.set_adapter("m1")
    assert model.active_adapters() == ["m1"]
    assert torch.equal(model(input_ids=ids).logits, right)


def test_without_the_method_transformers_finds_no_weights(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.quantizers import auto

    monkeypatch.delitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "randes")
    with pytest.raises(OSError, match="no file named"):
        hf.AutoModelForCausalLM.from_pretrained(folders / "store")


def test_folders_that_are_no_store_or_another_base_are_refused(folders: Path, tmp_path: Path) -> None:
    with pytest.raises(randes.StoreError, match="store must be given"):
        randes.from_pretrained(folders / "base")
    with pytest.raises(randes.BaseMismatchError):
        randes.from_pretrained(folders / "m0", folders / "store")


def test_without_transformers_the_error_says_what_to_install(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'randes\[transformers\]'"):
        randes.from_pretrained(folders / "base", folders / "store")


def test_a_pipeline_answers_as_the_chosen_model(folders: Path) -> None:
    tokenizer = hf.AutoTokenizer.from_pretrained(folders / "base")
    settings = {"max_new_tokens": 4, "do_sample": False, "return_tensors": True}
    base = hf.AutoModelForCausalLM.from_pretrained(folders / "base")
    base.load_state_dict(randes.Superposition.load(folders / "store").retrieve("m1"), strict=False)
    expected = hf.pipeline("text-generation", model=base, tokenizer=tokenizer)("a b c", **settings)
    for model in (
        randes.from_pretrained(folders / "store"),
        hf.AutoModelForCausalLM.from_pretrained(folders / "store"),
    ):
        pipe = hf.pipeline("text-generation", model=model, tokenizer=tokenizer)
        model.set_adapter("m1")
        assert pipe("a b c", **settings) == expected
        model.set_adapter("m0")
        with model.using(["m1"]):
            assert pipe("a b c", **settings) == expected
        assert pipe("a b c", **settings) != expected


def test_a_loaded_module_makes_a_store_that_transformers_reads(tmp_path: Path) -> None:
    base = build("Mixtral")  # whose files would have other names than its modules
    sup = randes.compress(base, {"m0": finetune(base, 0, 0.1)}, CONFIG)
    sup.save(tmp_path / "store")
    model = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "store")
    inputs = tokens()
    y = model(**inputs, adapter_names=["m0"] * 4).logits
    torch.testing.assert_close(y, alone(base, sup, "m0")(**inputs).logits, rtol=1e-4, atol=1e-4)


def test_a_centred_store_with_a_shared_basis_is_loaded_and_right(tmp_path: Path) -> None:
    base = build("GPT-2")
    tuned = {f"m{number}": finetune(base, number, 0.1) for number in range(2)}
    config = randes.Config(min_width=16, centre=True, rank=4, permute=1, group_size=2)
    randes.compress(base, tuned, config).save(tmp_path / "store")
    sup = randes.Superposition.load(tmp_path / "store")
    y = randes.from_pretrained(tmp_path / "store")(**tokens(), adapter_names=MIX).logits
    for row, name in enumerate(MIX):
        plain = copy.deepcopy(base)
        plain.load_state_dict(sup.retrieve(name))  # the base is superposed there, too
        torch.testing.assert_close(y[row], plain(**of_row(tokens(), row)).logits[0], rtol=1e-4, atol=1e-4)


def test_a_superposition_of_a_folder_serves_the_loaded_base(tmp_path: Path) -> None:
    base = build("Mixtral")
    base.save_pretrained(tmp_path / "base")
    assert isinstance(randes.SuperposedModel(base, randes.Superposition.create(tmp_path / "base", CONFIG)), nn.Module)


def test_classifiers_of_other_numbers_of_classes_answer_row_by_row() -> None:
    base = build("BERT, classifier")
    torch.manual_seed(1)
    other = hf.BertForSequenceClassification(
        hf.BertConfig.from_dict({**base.config.to_dict(), "num_labels": 7, "id2label": None})
    ).eval()
    other.bert.load_state_dict(finetune(base.bert, 1, 0.1).state_dict())
    sup = randes.compress(base, {"m0": finetune(base, 0, 0.1), "m1": other}, CONFIG)
    model = randes.SuperposedModel(copy.deepcopy(base), sup)
    inputs = tokens()
    y = model(**inputs, adapter_names=MIX).logits
    assert [len(row) for row in y] == [7, 2, 2, 7]
    other.load_state_dict(sup.retrieve("m1"))
    torch.testing.assert_close(y[3], other(**of_row(inputs, 3)).logits[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(y[2], alone(base, sup, "m0")(**of_row(inputs, 2)).logits[0], rtol=1e-4, atol=1e-4)


def test_every_tested_architecture_is_in_the_documentation() -> None:
    text = (Path(__file__).parents[2] / "docs" / "transformers.md").read_text(encoding="utf-8")
    for name in CASES:
        assert f"| {name} " in text or f", {name}" in text.replace("\n", " "), name


def test_the_library_is_imported_without_transformers() -> None:
    import subprocess

    code = "import sys; sys.modules['transformers'] = None; import randes; assert 'torch' in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert isinstance(build("ViT"), nn.Module)


def test_a_transformers_that_is_too_old_is_refused_with_the_version_needed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(importlib.import_module("transformers"), "__version__", "5.17.0")  # may be made anew since
    message = r"stores need Transformers 5\.20 or later, got 5\.17\.0"
    with pytest.raises(ImportError, match=message):
        randes.from_pretrained(tmp_path)
    with pytest.raises(ImportError, match=message):
        importlib.reload(importlib.import_module("randes.transformers"))
