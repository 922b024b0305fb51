"""The command line: every command on real files, and every error on one line."""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import finetune, net
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

import randes
from randes.cli import app
from randes.cli.terminal import sized
from randes.superposition import members
from randes.superposition.store.write import alone


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A base and three fine-tunes of it."""
    base = net()
    save_file(base.state_dict(), tmp_path / "base.safetensors")
    for seed in range(3):
        save_file(finetune(base, seed).state_dict(), tmp_path / f"m{seed}.safetensors")
    return tmp_path


def run(*arguments: object, fails: bool = False) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == (2 if fails else 0), result.output
    return result


def compress(files: Path, *options: object, models: int = 2) -> Path:
    named = [part for seed in range(models) for part in ("--model", f"m{seed}={files}/m{seed}.safetensors")]
    run("compress", "--base", files / "base.safetensors", *named, "--out", files / "store", *options)
    return files / "store"


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_a_store_is_what_the_library_makes(files: Path) -> None:
    store = compress(files, "--signs", "columns", "--permute", 1, "--group-size", 2, "--seed", 7)
    sup = randes.Superposition.load(store)
    assert sup.names == ["m0", "m1"]
    assert sup.config == randes.Config(signs="columns", permute=1, group_size=2, seed=7, rank="auto")


def test_every_option_of_the_published_method_has_a_flag(files: Path) -> None:
    flags = (
        "--matrix", "rotation", "--gains", "shared", "--origin", "zero", "--every", 2, "--no-per-layer", "--vectors",
        "--others", "sum", "--shuffle-layers", 1, "--alpha", 0.5, "--min-width", 16, "--only", "*up*",
        "--all", "--exclude", "x",
    )  # fmt: skip
    store = compress(files, *flags)
    sup = randes.Superposition.load(store)
    assert sup.config == randes.Config(
        matrix="rotation", gains="shared", origin="zero", every=2, per_layer=False, vectors=True, others="sum",
        shuffle_layers=1, min_width=16, include=("*up*",), exclude=("x",), rank=0,
    )  # fmt: skip
    assert [(member.alpha, member.index) for member in sup.members.values()] == [(0.5, 0), (0.5, 1)]
    shown = run("info", store).output
    for words in ("a rotation", "one gain for all", "from zero", "one transform for all", "others sum"):
        assert words in " ".join(shown.split())
    again = [part for seed in range(2) for part in ("--model", f"m{seed}={files}/m{seed}.safetensors")]
    wrong = ("compress", "--base", files / "base.safetensors", *again, "--out", files / "other")
    assert "matrix must be one of" in run(*wrong, "--matrix", "haar", fails=True).stderr
    assert "permute must be 0" in run(*wrong, "--matrix", "dense", "--permute", 1, fails=True).stderr
    assert "alpha must be a finite" in run(*wrong, "--alpha", "nan", fails=True).stderr


def test_adding_and_removing_gives_back_the_bytes(files: Path) -> None:
    store = compress(files)
    before = contents(store)
    run("add", store, f"m2={files}/m2.safetensors")
    assert randes.Superposition.load(store).names == ["m0", "m1", "m2"]
    run("remove", store, f"m2={files}/m2.safetensors")
    assert contents(store) == before


def test_long_work_is_shown_in_bytes(files: Path) -> None:
    store = compress(files, models=1)
    for command, stages in (
        (("compress", "--base", files / "base.safetensors", "--model", f"m1={files}/m1.safetensors", "--out",
          files / "other"), ("reading base", "superposing", "writing")),
        (("add", store, f"m1={files}/m1.safetensors"), ("checking", "adding", "writing")),
        (("retrieve", store, "m1", "--out", files / "out.safetensors"), ("checking", "retrieving")),
        (("verify", store, f"m1={files}/m1.safetensors"), ("checking", "verifying")),
        (("remove", store, f"m1={files}/m1.safetensors"), ("checking", "removing", "writing")),
        (("info", store), ("checking",)),
    ):  # fmt: skip
        shown = run(*command).stderr
        for stage in stages:
            assert re.search(rf"^{stage} .*[kK]i?B", shown, re.MULTILINE), shown


def test_shards_are_read_as_one_checkpoint(files: Path) -> None:
    store = compress(files)
    tensors, weight_map = load_file(files / "m2.safetensors"), {}
    (files / "shards").mkdir()
    for number, name in enumerate(tensors):
        file = f"diffusion_pytorch_model-{number:05}.safetensors"
        save_file({name: tensors[name]}, files / "shards" / file)
        weight_map[name] = file
    index = files / "shards" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    run("add", store, f"m2={files}/m2.safetensors")
    before = contents(store)
    run("remove", store, f"m2={files}/shards")
    run("add", store, f"m2={index}")
    assert contents(store) == before


def test_a_retrieved_model_is_a_plain_checkpoint(files: Path) -> None:
    store = compress(files, models=1)
    run("retrieve", store, "m0", "--out", files / "again.safetensors")
    original, again = load_file(files / "m0.safetensors"), load_file(files / "again.safetensors")
    assert original.keys() == again.keys()
    for name, tensor in original.items():
        torch.testing.assert_close(again[name], tensor, rtol=0, atol=1e-3)


def test_info_shows_models_and_coverage(files: Path) -> None:
    store = compress(files)
    found = json.loads(run("info", store, "--json").stdout)
    assert list(found["models"]) == ["m0", "m1"]
    assert found["bytes"]["total"] == randes.Superposition.load(store).nbytes
    shown = run("info", store).stdout
    for tensor in found["coverage"]["superposed"] | found["coverage"]["kept"]:
        assert tensor in shown


def test_verify_says_that_it_is_not_the_accuracy(files: Path) -> None:
    store = compress(files, "--rank", 0)
    shown = run("verify", store, f"m0={files}/m0.safetensors").stdout
    assert "not the accuracy" in shown
    assert "predicted          1.0000  the same, of how many models share a tensor's buffer" in shown
    assert "‖Ŵ − W‖ / ‖W − W0‖, over" in shown
    assert "√" not in shown  # which a shared basis, fewer neighbours, packing or α make another number
    found = json.loads(run("verify", store, f"m0={files}/m0.safetensors", "--json").stdout)
    assert found["relative_error"] == pytest.approx(1.0, rel=0.15)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("add", "{store}", "m0={files}/m0.safetensors"), "a model called 'm0' is there already"),
        (("add", "{store}", "m0"), "a model must be given as NAME=PATH, got 'm0'"),
        (("add", "{store}", "x={files}/absent.safetensors"), "does not exist"),
        (("add", "{files}", "x={files}/m2.safetensors"), "is not a store: it has no manifest.json"),
        (("add", "{store}", "x={files}/m2.safetensors", "--group", "5"), "group must be an integer from 0 to 1"),
        (("remove", "{store}", "x={files}/m0.safetensors"), "no model is called 'x'; there are: m0, m1"),
        (("remove", "{store}", "m0={files}/m1.safetensors"), "not the checkpoint that was added as 'm0'"),
        (("retrieve", "{store}", "x", "--out", "{files}/y"), "no model is called 'x'; there are: m0, m1"),
        (("verify", "{store}", "m0={files}/m1.safetensors"), "not the checkpoint that was added as 'm0'"),
        (("info", "{files}/absent"), "is not a store"),
        (
            ("compress", "--base", "{files}/base.safetensors", "--model", "a={files}/m0.safetensors", "--out",
             "{store}"),
            "--out must not hold a store yet",
        ),
        (
            ("compress", "--base", "{files}/base.safetensors", "--model", "a={files}/m0.safetensors", "--out",
             "{files}/new", "--signs", "rows"),
            "signs must be one of 'both', 'columns', 'none', got 'rows'",
        ),
    ],
)  # fmt: skip
def test_an_error_is_one_line_and_changes_nothing(files: Path, arguments: tuple[str, ...], message: str) -> None:
    store = compress(files)
    before = contents(store)
    result = run(*(argument.format(files=files, store=store) for argument in arguments), fails=True)
    errors = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert message in errors[0]
    assert "Traceback" not in result.output
    assert contents(store) == before
    assert not (files / "y").exists()
    assert not (files / "new").exists()


def test_every_command_has_a_help_text() -> None:
    for command in ("compress", "add", "remove", "retrieve", "info", "verify", "report", "demo"):
        assert command in run("--help").stdout
        assert len(run(command, "--help").stdout.splitlines()) > 5


def test_nothing_that_a_terminal_obeys_reaches_it(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evil = "red \x1b[31m\x9b2J\x07\u202e\x7f"
    monkeypatch.setattr(members, "CONTROLS", ())  # a store from before such names were refused
    store, base, m0 = files / "s \x1b[2J", files / "base.safetensors", files / "m0.safetensors"
    outputs = [run("compress", "--base", base, "--model", f"{evil}={m0}", "--out", store)]
    outputs.append(run("add", store, f"more {evil}={files / 'm1.safetensors'}"))
    outputs += [run("info", store), run("info", store, "--json"), run("verify", store, f"{evil}={m0}")]
    outputs += [run("verify", store, f"{evil}={m0}", "--json"), run("pack", store, "--out", files / "p \x1b")]
    outputs.append(run("retrieve", store, evil, "--out", files / "out \x1b.safetensors"))
    outputs.append(run("report", store, "--out", files / "r \x1b.html"))
    outputs.append(run("retrieve", store, f"no {evil}", "--out", files / "out", fails=True))
    outputs.append(run("info", files / "none \x1b[31m", fails=True))
    outputs.append(run("add", store, f"bad{evil}", fails=True))
    for found in outputs:
        bad = [character for character in found.output if character not in "\n\r" and not character.isprintable()]
        assert bad == [], found.output
    assert [*json.loads(outputs[3].stdout)["models"]] == [f"more {evil}", evil]
    assert "\\x1b[31m" in outputs[2].output


def test_patterns_are_added_to_the_default_and_replace_it_when_asked_to(files: Path) -> None:
    default = randes.Config()
    named = ("--base", files / "base.safetensors", "--model", f"a={files}/m0.safetensors")
    for flags, include, exclude in (
        ((), default.include, default.exclude),
        (("--exclude", "*up*"), default.include, (*default.exclude, "*up*")),
        (("--all",), default.include, ()),
        (("--all", "--exclude", "*up*"), default.include, ("*up*",)),
        (("--only", "*up*"), ("*up*",), default.exclude),
    ):
        out = files / f"store {flags}".replace("*", "")
        run("compress", *named, "--out", out, *flags)
        config = randes.Superposition.load(out).config
        assert (config.include, config.exclude) == (include, exclude)


def test_every_command_writes_json_alone_to_standard_output(files: Path) -> None:
    m0, m1, m2 = (f"m{seed}={files}/m{seed}.safetensors" for seed in range(3))
    store, base = files / "store", files / "base.safetensors"
    named = ("--base", base, "--model", m0, "--model", m1)

    def told(*arguments: object) -> dict[str, object]:
        found: dict[str, object] = json.loads(run(*arguments, "--json").stdout)
        return found

    assert told("compress", *named, "--out", store)["models"] == ["m0", "m1"]
    assert told("compress", *named, "--out", files / "small", "--budget", "9x")["store"] == str(files / "small")
    added = told("add", store, m2)
    assert added["models"] == ["m0", "m1", "m2"]
    assert added["bytes"]["total"] == randes.Superposition.load(store).nbytes  # type: ignore[index]
    assert told("remove", store, m2)["models"] == ["m0", "m1"]
    assert told("pack", store, "--out", files / "packed")["store"] == str(files / "packed")
    written = told("retrieve", store, "m0", "--out", files / "out")
    assert written == {"file": str(files / "out" / "model.safetensors"), "model": "m0", "tensors": 20}
    assert told("report", store, "--out", files / "r.html")["models"] == ["m0", "m1"]
    assert told("verify", store, m0)["kept_exact"]
    assert told("info", store)["models"]
    assert json.loads(run("plan", "--base", base, "--models", 4, "--json").stdout)


def test_a_retrieved_model_opens_as_one(tmp_path: Path) -> None:
    hf = pytest.importorskip("transformers")
    from integrations.architectures import build

    base = build("Llama")
    base.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "tokenizer_config.json").write_text("{}")
    tuned = finetune(base, 1)
    tuned.save_pretrained(tmp_path / "ft")
    store, out = tmp_path / "store", tmp_path / "a" / "folder" / "of its own"
    run("compress", "--base", tmp_path / "base", "--model", f"m={tmp_path / 'ft'}", "--out", store)
    run("retrieve", store, "m", "--out", out)
    assert {"config.json", "model.safetensors", "tokenizer_config.json"} <= {file.name for file in out.iterdir()}
    model = hf.AutoModel.from_pretrained(out)
    expected = randes.Superposition.load(store).retrieve("m")
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected[f"model.{name}"])
    run("retrieve", store, "m", "--out", out)  # the same again
    assert "must be empty, or hold a model" in run("retrieve", store, "m", "--out", tmp_path, fails=True).stderr
    one = tmp_path / "b" / "m.safetensors"
    run("retrieve", store, "m", "--out", one)
    assert [file.name for file in one.parent.iterdir()] == ["m.safetensors"]


@pytest.mark.parametrize("labels", [None, 3])
def test_a_retrieved_head_for_other_classes_opens_as_a_model(tmp_path: Path, labels: int | None) -> None:
    """labels: of the base; Transformers leaves two of them out of a file."""
    hf = pytest.importorskip("transformers")
    sizes = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
             "intermediate_size": 64, "max_position_embeddings": 16}  # fmt: skip
    given = {} if labels is None else {"num_labels": labels}
    hf.BertForSequenceClassification(hf.BertConfig(**sizes, **given)).save_pretrained(tmp_path / "base")
    tuned = finetune(hf.BertForSequenceClassification(hf.BertConfig(**sizes, num_labels=7)), 1)
    tuned.save_pretrained(tmp_path / "ft")
    run("compress", "--base", tmp_path / "base", "--model", f"m={tmp_path / 'ft'}", "--out", tmp_path / "store")
    run("retrieve", tmp_path / "store", "m", "--out", tmp_path / "out")
    model = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert torch.equal(model.classifier.weight, tuned.classifier.weight)
    assert (model.num_labels, model.config.vocab_size) == (7, 50)


PROGRAM = "import sys; sys.argv[0] = 'randes'; {before}; from randes.cli import app; app()"


def started(*arguments: object, before: str = "pass") -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROGRAM.format(before=before), *map(str, arguments)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_add_waits_for_another_and_then_does_its_work_once(files: Path) -> None:
    store = compress(files, models=1)
    with alone(store):
        added = started("add", store, f"m2={files}/m2.safetensors")
        assert added.stderr is not None
        assert "waiting for another command that changes" in added.stderr.readline()
        sup = randes.Superposition.load(store)
        sup.add("m1", files / "m1.safetensors")
        sup.save(store)
    _, shown = added.communicate(timeout=60)
    assert added.returncode == 0, shown
    assert shown.count("adding") == 1
    assert randes.Superposition.load(store).names == ["m0", "m1", "m2"]


@pytest.mark.parametrize(
    "where", ["randes.superposition.store.write.write_file", "randes.superposition.update._passed"]
)
def test_ctrl_c_ends_with_130_and_the_old_store(files: Path, where: str) -> None:
    store = compress(files)
    before = contents(store)
    module = where.rsplit(".", 1)[0]
    # Where the tests run in the background, a shell has had them ignore it.
    hears = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    sleeps = f"{hears}import time, {module}; {where} = lambda *_, **__: (print('now', flush=True), time.sleep(60))"
    added = started("add", store, f"m2={files}/m2.safetensors", before=sleeps)
    assert added.stdout is not None
    assert added.stdout.readline() == "now\n"
    added.send_signal(signal.SIGINT)
    _, shown = added.communicate(timeout=100)
    assert added.returncode == 130, shown
    assert "interrupted" in shown
    assert "Traceback" not in shown
    assert contents(store) == before


def test_names_that_no_line_holds_are_refused_before_anything_is_read(files: Path) -> None:
    store = compress(files, models=1)
    base, m1 = files / "base.safetensors", files / "m1.safetensors"
    for name in (" ", "\t", "a\nb", "\x1b[31m", "a\u2028b", "ä" * 101):
        for arguments in (
            ("add", store, f"{name}={m1}"),
            ("compress", "--base", base, "--model", f"{name}={m1}", "--out", files / "new"),
        ):
            result = run(*arguments, fails=True)
            assert "name must be a non-empty string" in result.stderr
            assert "reading base" not in result.stderr
    run("add", store, f"{'ä' * 100}={m1}")


def test_what_is_warned_of_is_a_note(files: Path) -> None:
    half = {name: value.bfloat16() for name, value in load_file(files / "m0.safetensors").items()}
    save_file(half, files / "half.safetensors")
    store = compress(files, models=1)
    shown = run("add", store, f"half={files}/half.safetensors").stderr
    notes = [line for line in shown.splitlines() if line.startswith("note:")]
    assert len(notes) == 1
    assert "cast to the base's dtype" in notes[0]
    assert "UserWarning" not in shown


def test_bytes_have_one_style_and_never_more_than_all_are_done(files: Path) -> None:
    for count, text in (
        (0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (99_949, "99.9 kB"), (99_950, "100 kB"), (999_499, "999 kB"),
        (999_500, "1.00 MB"), (16_060_000_000, "16.1 GB"), (3 * 10**15, "3000 TB"),
    ):  # fmt: skip
        assert sized(count) == text
    store = compress(files, models=1)
    shown = run("add", store, f"m1={files}/m1.safetensors").output + run("info", store).output
    shown += run("plan", "--base", files / "base.safetensors", "--models", 4).output
    assert not re.search(r"[KMG]iB", shown)
    bars = re.findall(r"([\d.]+) (\w?B) of ([\d.]+) (\w?B)", shown)
    assert bars
    assert all((done, unit) == (total, of) for done, unit, total, of in bars)
    assert re.search(r"^adding m1 ", shown, re.MULTILINE)  # whose bar it is


def test_headings_are_never_cut(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = compress(files)
    for width in (40, 60):
        monkeypatch.setattr("randes.cli.show.console.width", width)
        assert "…" not in run("info", store).stdout


def test_version_help_and_completion() -> None:
    assert re.fullmatch(r"randes [\w., ]+\n", run("--version").stdout)
    assert run("-h").stdout == run("--help").stdout
    assert run("add", "-h").stdout == run("add", "--help").stdout
    assert "--show-completion" in run("--help").stdout
