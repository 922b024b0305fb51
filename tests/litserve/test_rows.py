"""What LitServe's worker does with requests, without LitServe: tensors as JSON, rows of many models in one batch."""

import base64
import json
import re
import sys
from pathlib import Path
from typing import Any

import litserve_net
import numpy as np
import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor, nn
from typer.testing import CliRunner

import randes
from randes.checkpoints.sources import write_file
from randes.cli import app
from randes.cli.serve import generates
from randes.litserve.outputs import Outputs, PaddingError, by_row
from randes.litserve.replies import Add, Remove, Store, to_asks, to_change, to_list
from randes.litserve.rows import Ask, RefusedError, Rows
from randes.litserve.tensors import array_of, json_of

WORDS = ["[PAD]", "[UNK]", "the", "of", "a", "to", "is", "in"]


def moved(model: nn.Module, seed: int) -> nn.Module:
    """A fine-tune: every parameter moved."""
    generator = torch.Generator().manual_seed(seed)
    for value in model.parameters():
        value.data += 0.05 * torch.randn(value.shape, generator=generator)
    return model


# ---------------------------------------------------------------- tensors


def test_tensors_are_read_from_lists_and_from_bytes() -> None:
    assert array_of([[0.5, 1], [2, 3]]).dtype == np.float32
    assert array_of([1, 2]).dtype == np.int64
    assert array_of([True]).dtype == np.bool_
    assert array_of(3).shape == ()
    assert array_of({"dtype": "float16", "data": [1, 2]}).dtype == np.float16
    data = base64.b64encode(np.arange(6, dtype="<f4").tobytes()).decode()
    packed = array_of({"dtype": "float32", "shape": [2, 3], "data": data})
    assert packed.tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("text", "must hold numbers"),
        (None, "must hold numbers"),
        ([1, "a"], "must hold numbers"),
        ([[1], [1, 2]], "same lengths"),
        ([1 << 80], "must hold numbers"),
        ({}, "dtype must be one of"),
        ({"dtype": ["float32"]}, "dtype must be one of"),
        ({"dtype": "complex64", "data": [1]}, "dtype must be one of"),
        ({"dtype": "float32", "data": [1], "bytes": 4}, "no fields but"),
        ({"dtype": "float32", "data": "????", "shape": [1]}, "must be base64"),
        ({"dtype": "float32", "data": "AAAA", "shape": [1]}, "that of its 3 bytes"),
        ({"dtype": "float32", "data": "AAAAAA==", "shape": None}, "that of its 4 bytes"),
        ({"dtype": "float32", "data": "AAAAAA==", "shape": [-1]}, "list of sizes"),
        ({"dtype": "float32", "data": "AAAAAA==", "shape": [True]}, "list of sizes"),
        ({"dtype": "int64", "data": [0.5]}, "that it cannot hold"),
        ({"dtype": "uint8", "data": [256]}, "that it cannot hold"),
        ({"dtype": "float16", "data": [70000]}, "that it cannot hold"),
        ([1e300], "that it cannot hold"),
        ({"dtype": "float32", "data": ["a"]}, "must hold numbers"),
        ({"dtype": "float32", "data": [1, 2], "shape": [3]}, r"shape \[3\]"),
    ],
)
def test_what_is_no_tensor_is_refused(value: object, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        array_of(value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool])
def test_tensors_come_back_as_they_were_sent(dtype: torch.dtype) -> None:
    tensor = torch.tensor([[0, 1], [1, 0.5]]).to(dtype)
    for as_base64 in (False, True):
        sent = json.loads(json.dumps(json_of(tensor, as_base64), allow_nan=False))
        assert torch.equal(torch.from_numpy(array_of(sent).copy()).to(dtype), tensor)


def test_numbers_that_json_does_not_have_are_words() -> None:
    tensor = torch.tensor([[1.0, float("nan")], [float("inf"), float("-inf")]])
    assert json_of(tensor) == [[1.0, "NaN"], ["Infinity", "-Infinity"]]


# ---------------------------------------------------------------- rows of an own module


class Net(nn.Module):
    """Two outputs of each row's own, and scores of each row against all others of its batch."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(32, 48)
        self.head = nn.Linear(48, 4)
        self.calls = 0

    def forward(self, x: Tensor, scale: Tensor | None = None) -> dict[str, Tensor]:
        self.calls += 1
        y = torch.relu(self.up(x))
        logits = self.head(y if scale is None else y * scale[:, None])
        return {"logits": logits, "features": y, "scores": y @ y.T, "sum": y.sum()}


@pytest.fixture
def rows() -> Rows:
    torch.manual_seed(0)
    base = Net()
    models = {name: moved(_copy(base), seed) for seed, name in enumerate("abc")}
    return Rows(randes.load(randes.compress(base, models), Net(), capacity=4))


def _copy(net: Net) -> Net:
    other = Net()
    other.load_state_dict(net.state_dict())
    return other


def ask(name: str, seed: int = 0, **given: Any) -> Ask:
    return Ask(name, {"x": torch.randn(32, generator=torch.Generator().manual_seed(seed)).numpy()}, **given)


def alone(rows: Rows, one: Ask) -> Tensor:
    """What the library answers for the row by itself."""
    x = torch.from_numpy(one.inputs["x"])[None]
    found: Tensor = rows.model(x, adapter_names=[one.model])["logits"][0].detach()
    return found


def answered(outcome: object) -> dict[str, Tensor]:
    assert isinstance(outcome, dict), outcome
    return outcome


def refused(outcome: object, status: int, says: str) -> None:
    assert isinstance(outcome, RefusedError)
    assert outcome.status == status
    assert says in str(outcome)


def test_rows_of_many_models_are_answered_in_one_call(rows: Rows) -> None:
    asks = [ask(name, seed) for seed, name in enumerate(["a", "b", "__base__", "c", "a"])]
    rows.answer(asks)  # outputs that look like others' are looked at once
    before = rows.model.base_model.calls
    outcomes = rows.answer(asks)
    assert rows.model.base_model.calls == before + 1
    for one, outcome in zip(asks, outcomes, strict=True):
        assert torch.allclose(answered(outcome)["logits"], alone(rows, one), atol=1e-5)
    assert rows.names == ["__base__", "a", "b", "c"]


@pytest.mark.parametrize("count", [1, 2, 4, 5, 48])
def test_no_row_gets_what_is_of_others(rows: Rows, count: int) -> None:
    """4 rows have as many as there are classes, 48 as many as there are features."""
    for outcome in rows.answer([ask("a", seed) for seed in range(count)]):
        assert set(answered(outcome)) == {"logits", "features"}


def test_one_bad_row_is_refused_and_the_others_are_answered(rows: Rows) -> None:
    wide = Ask("a", {"x": np.zeros(31, dtype=np.float32)})
    strange = Ask("a", {"y": np.zeros(32, dtype=np.float32)})
    fails = ask("b", 3, outputs=("logits", "nothing"))
    whole = Ask("a", {"x": np.zeros(32, dtype=np.int64)})
    asks = [ask("a"), wide, ask("zz"), strange, fails, whole, Ask("a"), Ask("a", text="the"), ask("b")]
    found = rows.answer(asks)
    refused(found[1], 422, "K = 32")
    refused(found[2], 404, "'zz' does not exist")
    refused(found[3], 422, "inputs must be of x, scale, got y")
    refused(found[4], 422, "outputs must be of logits, features, got nothing")
    refused(found[5], 422, "cannot be run on these inputs")
    refused(found[6], 422, "got neither")
    refused(found[7], 422, "this one has none")
    for place in (0, 8):
        assert torch.allclose(answered(found[place])["logits"], alone(rows, asks[place]), atol=1e-5)


def test_a_row_that_fails_in_a_batch_of_its_shape_fails_alone(rows: Rows) -> None:
    """Found out row by row: the same shapes, and one that the model cannot take."""
    table = nn.Embedding(4, 32)

    class Looks(Net):
        def forward(self, ids: Tensor) -> Any:  # type: ignore[override]
            return super().forward(table(ids))

    torch.manual_seed(0)
    base = Looks()
    looked = Rows(randes.load(randes.compress(base, {"a": moved(_looks(base, Looks), 1)}), Looks()))
    asks = [Ask("a", {"ids": np.array(number)}) for number in (1, 9, 2)] + [Ask("__base__", {"ids": np.array(3)})]
    found = looked.answer(asks)
    refused(found[1], 422, "IndexError")
    assert all("logits" in answered(found[place]) for place in (0, 2, 3))


def _looks(base: nn.Module, kind: type[nn.Module]) -> nn.Module:
    other = kind()
    other.load_state_dict(base.state_dict())
    return other


def test_models_come_and_go_between_batches(rows: Rows, tmp_path: Path) -> None:
    late = moved(_copy(Net()), 9)
    late.load_state_dict({name: value + 0.01 for name, value in rows.model.superposition.retrieve("a").items()})
    write_file(tmp_path / "d.safetensors", late.state_dict())
    refused(rows.answer([ask("d")])[0], 404, "'d'")
    rows.model.add_adapter("d", tmp_path / "d.safetensors")
    assert torch.allclose(answered(rows.answer([ask("d")])[0])["logits"], alone(rows, ask("d")), atol=1e-5)
    rows.model.delete_adapter("d", tmp_path / "d.safetensors")
    refused(rows.answer([ask("d")])[0], 404, "'d'")


def test_a_model_that_refuses_mixed_batches_is_asked_one_model_at_a_time(rows: Rows) -> None:
    whole = rows.model.base_model.forward

    def one_model(*args: Any, **kwargs: Any) -> Any:
        if rows.model.router.current().mixed:  # type: ignore[union-attr]
            raise ValueError("not mixed")
        return whole(*args, **kwargs)

    rows.model.base_model.forward = one_model
    asks = [ask(name, seed) for seed, name in enumerate("abab")]
    for _ in range(2):
        outcomes = rows.answer(asks)
        assert all(torch.allclose(answered(o)["logits"], alone(rows, a), atol=1e-5)
                   for a, o in zip(asks, outcomes, strict=True))  # fmt: skip
    before = rows.model.base_model.calls
    rows.answer(asks)
    assert rows.model.base_model.calls == before + 2


def test_short_memory_is_said_and_forgotten(rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(rows.model, "forward", lambda *_, **__: (_ for _ in ()).throw(MemoryError))
        for outcome in rows.answer([ask("a"), ask("b")]):
            refused(outcome, 503, "memory")
    assert "logits" in answered(rows.answer([ask("a")])[0])


# ---------------------------------------------------------------- texts


@pytest.fixture(scope="module")
def classifiers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of BERT classifiers with a tokenizer."""
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 64}
    config = hf.BertConfig(**sizes, num_attention_heads=4, max_position_embeddings=16, num_labels=5, pad_token_id=0)
    base = hf.BertForSequenceClassification(config).eval()
    words = Tokenizer(WordLevel({word: place for place, word in enumerate(WORDS)}, "[UNK]"))
    words.pre_tokenizer = Whitespace()
    limits: dict[str, Any] = {"model_max_length": 16, "pad_token": "[PAD]", "unk_token": "[UNK]"}
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=words, **limits)
    base.save_pretrained(folder / "base")
    for seed, name in enumerate("ab"):
        model: Any = moved(hf.BertForSequenceClassification.from_pretrained(folder / "base"), seed)
        model.save_pretrained(folder / name)
    for name in ("base", "a", "b"):
        tokenizer.save_pretrained(folder / name)
    randes.compress(folder / "base", {name: folder / name for name in "ab"}).save(folder / "store")
    return folder / "store"


def text_rows(store: Path, **outputs: bool) -> Rows:
    model = randes.from_pretrained(store)
    for name, value in outputs.items():
        setattr(model.base_model.config, name, value)
    return Rows(model.eval(), hf.AutoTokenizer.from_pretrained(store))


TEXTS = ["the of a", "the", "a to is in the of", "of the", "is"]


def test_texts_of_any_length_share_a_batch_and_are_answered_as_alone(classifiers: Path) -> None:
    rows = text_rows(classifiers)
    asks = [Ask(name, text=text) for name, text in zip("abab", TEXTS, strict=False)] + [Ask("__base__", text=TEXTS[4])]
    outcomes = rows.answer(asks)
    assert rows._pads
    for one, outcome in zip(asks, outcomes, strict=True):
        tokens = rows.tokenizer(one.text, return_tensors="pt")
        with torch.no_grad():
            logits = rows.model(**tokens, adapter_names=[one.model]).logits[0]
        assert torch.allclose(answered(outcome)["logits"], logits, atol=1e-5)
    refused(rows.answer([Ask("a", text="the " * 17)])[0], 422, "1 to 16 tokens, got 17")
    refused(rows.answer([Ask("a", text="")])[0], 422, "1 to 16 tokens, got 0")


def test_positions_of_padding_are_cut_off(classifiers: Path) -> None:
    torch.manual_seed(0)
    store = classifiers
    encoder = hf.BertModel.from_pretrained(store.parent / "base")
    finetuned = moved(hf.BertModel.from_pretrained(store.parent / "base"), 1)
    model = randes.load(randes.compress(encoder, {"a": finetuned}), _copy_of(encoder)).eval()
    rows = Rows(model, hf.AutoTokenizer.from_pretrained(store))
    for _ in range(2):
        for text, outcome in zip(TEXTS, rows.answer([Ask("a", text=text) for text in TEXTS]), strict=True):
            own = answered(outcome)["last_hidden_state"]
            assert own.shape == (len(text.split()), 32)
            plain = model(**rows.tokenizer(text, return_tensors="pt"), adapter_names=["a"]).last_hidden_state[0]
            assert torch.allclose(own, plain, atol=1e-4)


def _copy_of(model: Any) -> Any:
    return type(model)(model.config)


def test_texts_are_not_padded_where_padding_changes_answers(classifiers: Path) -> None:
    rows = text_rows(classifiers)
    whole = rows.model.forward

    def without_mask(*, attention_mask: Tensor, **inputs: Any) -> Any:
        return whole(**inputs)  # sees padding as text

    rows.model.forward = without_mask  # type: ignore[method-assign]
    asks = [Ask("a", text=text) for text in TEXTS]
    for one, outcome in zip(asks, rows.answer(asks), strict=True):
        tokens = rows.tokenizer(one.text, return_tensors="pt")
        plain = without_mask(**tokens, adapter_names=["a"]).logits[0]
        assert torch.allclose(answered(outcome)["logits"], plain, atol=1e-5)
    assert not rows._pads


def test_outputs_have_names_whatever_a_model_returns() -> None:
    y, heads = torch.randn(3, 2), [torch.randn(2), torch.randn(4), torch.randn(1)]
    assert by_row(y, 3).keys() == {"output"}
    assert by_row((y, torch.zeros(()), heads), 3).keys() == {"0", "2"}
    (first, *_) = Outputs().of_rows((y, heads), 3, lambda times: (y[:times], heads[:times]))
    assert torch.equal(first["0"], y[0])
    assert torch.equal(first["1"], heads[0])


def test_chosen_labels_are_compared_as_they_are() -> None:
    """An output of integers: one for each token, and one for the whole text."""
    padded = [
        {"tags": torch.tensor([1, 2, 0]), "label": torch.tensor(4)},
        {"tags": torch.tensor([5, 6, 7]), "label": torch.tensor(3)},
    ]
    Outputs().without_padding(padded, [2, 3], lambda _: {"tags": torch.tensor([1, 2]), "label": torch.tensor(4)})
    assert [answer["tags"].tolist() for answer in padded] == [[1, 2], [5, 6, 7]]
    for alone in ({"label": torch.tensor(4)}, {"tags": torch.tensor([1, 3]), "label": torch.tensor(4)}):
        again = [{"tags": torch.tensor([1, 2, 0]), "label": torch.tensor(4)}] * 2
        with pytest.raises(PaddingError, match="tags"):
            Outputs().without_padding(again, [2, 3], lambda _, alone=alone: alone)


def test_a_model_without_rows_is_an_error() -> None:
    with pytest.raises(TypeError, match="a row for each of 3"):
        Outputs().of_rows({"loss": torch.zeros(())}, 3, lambda _: {})


# ---------------------------------------------------------------- images

IMAGES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip
PIXELS = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def images(name: str, row: int, **more: Any) -> Ask:
    return Ask(name, {"pixel_values": PIXELS[row].numpy(), **more})


def test_classifiers_of_other_numbers_of_classes_share_a_batch() -> None:
    torch.manual_seed(0)
    base = hf.ViTForImageClassification(hf.ViTConfig(**IMAGES, num_labels=3)).eval()
    five: Any = hf.ViTForImageClassification(hf.ViTConfig(**IMAGES, num_labels=5))
    five.load_state_dict({k: v for k, v in base.state_dict().items() if "classifier" not in k}, strict=False)
    models = {"three": moved(_copied(base), 1), "five": moved(five, 2)}
    rows = Rows(randes.load(randes.compress(base, models), hf.ViTForImageClassification(base.config)).eval())
    asks = [images(name, row) for row, name in enumerate(["three", "five", "__base__", "five", "three"])]
    for one, outcome in zip(asks, rows.answer(asks), strict=True):
        pixels = torch.from_numpy(one.inputs["pixel_values"])[None]
        with torch.no_grad():
            logits = rows.model(pixels, adapter_names=[one.model]).logits[0]
        assert answered(outcome)["logits"].shape == (5 if one.model == "five" else 3,)
        assert torch.allclose(answered(outcome)["logits"], logits, atol=1e-5)


def test_clips_towers_are_answered_and_its_scores_of_others_are_not() -> None:
    torch.manual_seed(0)
    text = {**IMAGES, "vocab_size": 64, "max_position_embeddings": 8, "eos_token_id": 63, "bos_token_id": 62}
    del text["image_size"], text["patch_size"]
    config = hf.CLIPConfig(text_config=text, vision_config=IMAGES, projection_dim=32)
    base = hf.CLIPModel(config).eval()
    rows = Rows(randes.load(randes.compress(base, {"a": moved(_copied(base), 1)}), hf.CLIPModel(config)).eval())
    ids = np.array([62, 5, 7, 63])
    for count in (1, 2, 3):
        asks = [images("a" if row % 2 else "__base__", row, input_ids=ids) for row in range(count)]
        for one, outcome in zip(asks, rows.answer(asks), strict=True):
            found = answered(outcome)
            assert {"image_embeds", "text_embeds"} <= found.keys()
            assert not found.keys() & {"logits_per_image", "logits_per_text"}
            with torch.no_grad(), rows.model.using([one.model]):
                own = rows.model.base_model(
                    pixel_values=torch.from_numpy(one.inputs["pixel_values"])[None], input_ids=torch.tensor(ids)[None]
                ).image_embeds[0]
            assert torch.allclose(found["image_embeds"], own, atol=1e-5)


def _copied(model: Any) -> Any:
    other = type(model)(model.config)
    other.load_state_dict(model.state_dict())
    return other


# ---------------------------------------------------------------- replies


def test_replies_are_json_with_the_status_of_each(rows: Rows) -> None:
    found = to_asks(rows, [ask("a"), ask("zz"), ask("b", as_base64=True)])
    assert [reply.status for reply in found] == [200, 404, 200]
    assert found[0].content["model"] == "a"
    assert len(found[0].content["outputs"]["logits"]) == 4
    assert found[1].content["error"] == {
        "message": "the model 'zz' does not exist", "type": "NotFoundError", "param": "model", "code": 404,
    }  # fmt: skip
    assert found[2].content["outputs"]["logits"]["dtype"] == "float32"
    assert json.dumps([reply.content for reply in found], allow_nan=False)
    assert to_asks(rows, []) == []


def test_what_fails_unforeseen_is_an_error_of_each_request(rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "answer", lambda _: [{"y": torch.zeros(1, dtype=torch.complex64)}])
    (reply,) = to_asks(rows, [ask("a", as_base64=True)])
    assert (reply.status, reply.content["error"]["type"]) == (500, "InternalServerError")
    monkeypatch.setattr(rows, "answer", lambda _: 1 / 0)
    assert [reply.status for reply in to_asks(rows, [ask("a"), ask("b")])] == [500, 500]


def test_names_are_listed_as_openai_lists_them(rows: Rows) -> None:
    listed = to_list(rows, Store("store"), 5).content
    assert listed["object"] == "list"
    assert listed["data"][1] == {
        "id": "a", "object": "model", "created": 5, "owned_by": "randes", "root": "store", "parent": "__base__",
    }  # fmt: skip


def test_changes_say_what_is_wrong(rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_file(tmp_path / "d.safetensors", rows.model.superposition.retrieve("a"))
    path = str(tmp_path / "d.safetensors")
    added = to_change(rows, Add("d", path))
    assert (added.status, added.content["id"]) == (200, "d")
    for change, status in (
        (Add("d", path), 400), (Add("e", path), 409), (Add("e", str(tmp_path / "nothing")), 409), (Add("e"), 404),
        (Remove("e"), 404), (Remove("__base__"), 400), (Remove("a", path), 400),
    ):  # fmt: skip
        reply = to_change(rows, change)
        assert (change, reply.status) == (change, status)
        assert reply.content["error"]["message"]
    assert to_change(rows, Remove("d", path)).content["deleted"] is True
    assert rows.names == ["__base__", "a", "b", "c"]
    monkeypatch.setattr(rows.model, "delete_adapter", lambda *_: 1 / 0)
    assert to_change(rows, Remove("a")).status == 500


def test_a_store_is_loaded_by_its_class_or_by_a_function(classifiers: Path, tmp_path: Path) -> None:
    rows = Store(str(classifiers), room=2).load("cpu")
    assert rows.tokenizer is not None
    assert rows.names == ["__base__", "a", "b"]
    rows.model.delete_adapter("a", classifiers.parent / "a")
    rows.model.add_adapter("late", classifiers.parent / "a")
    torch.manual_seed(0)
    base = litserve_net.Net()
    randes.compress(base, {"a": moved(litserve_net.Net(), 1)}).save(tmp_path / "store")
    store = str(tmp_path / "store")
    assert Store(store, "litserve_net:Net").load("cpu").names == ["__base__", "a"]
    for module, says in (
        (None, "the store does not say what class"),
        ("litserve_net", "'package.module:function', got 'litserve_net'"),
        (":Net", "'package.module:function', got ':Net'"),
        ("litserve_net:Missing", "Missing"),
        ("no_such_module:Net", "no_such_module"),
        ("served:free_port", "must make an nn.Module, got int"),
    ):
        with pytest.raises(ValueError, match=re.escape(says)):
            Store(store, module).load("cpu")


# ---------------------------------------------------------------- the command


def test_which_server_follows_from_the_class(
    classifiers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["randes.cli.serve"], "is_installed", lambda _: False)  # nothing is started
    assert not generates(classifiers)
    config = hf.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64, n_positions=8)
    hf.GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    hf.GPT2LMHeadModel(config).save_pretrained(tmp_path / "a")
    randes.compress(tmp_path / "base", {"a": tmp_path / "a"}).save(tmp_path / "store")
    assert generates(tmp_path / "store")
    for options, says in (
        ([], "serving needs vLLM"),
        (["--module", "a:b", "--engine", "vllm"], "are for LitServe"),
        (["--changes"], "are for LitServe"),
        (["--engine", "litserve"], "serving needs LitServe"),
        (["--module", "a:b"], "serving needs LitServe"),
        (["--module", "a:b", "--", "--seed", "8"], "flags are for vLLM"),
    ):
        refused_by_command([str(tmp_path / "store"), *options], says)
    refused_by_command([str(classifiers)], "serving needs LitServe")
    refused_by_command([str(tmp_path)], "is not a store")
    packed = randes.Superposition.load(classifiers).pack()
    packed.save(tmp_path / "packed")
    refused_by_command([str(tmp_path / "packed"), "--room", "1"], "--room must be 0 for a packed store")


def refused_by_command(arguments: list[str], says: str) -> None:
    ran = CliRunner().invoke(app, ["serve", *arguments])
    assert ran.exit_code == 2
    assert says in ran.output
