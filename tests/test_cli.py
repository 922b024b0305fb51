"""The command line: every command on real files, and every error on one line."""

import json
import re
from pathlib import Path

import pytest
import torch
from models import finetune, net
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

import randes
from randes.cli import app


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
        "--others", "sum", "--shuffle-layers", 1, "--alpha", 0.5, "--min-width", 16, "--include", "*up*",
        "--exclude", "x",
    )  # fmt: skip
    store = compress(files, *flags)
    sup = randes.Superposition.load(store)
    assert sup.config == randes.Config(
        matrix="rotation", gains="shared", origin="zero", every=2, per_layer=False, vectors=True, others="sum",
        shuffle_layers=1, min_width=16, include=("*up*",), exclude=("x",),
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


def test_nothing_that_a_terminal_obeys_reaches_it(files: Path) -> None:
    evil = "red \x1b[31m\x9b2J\x07\u202e\x7f"
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
