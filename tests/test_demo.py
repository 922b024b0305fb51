"""The demonstration, small: its data, its baselines, and the whole command."""

import json
import shlex
import sys
from pathlib import Path

import pytest
import torch
from matplotlib.image import imread
from torch import Tensor
from typer.testing import CliRunner

import randes
import randes.demo
from randes.cli import app
from randes.demo import baselines, digits, run

ACCURACY_COLUMNS = {"mean_accuracy", "worst_accuracy", "mean_normalised", "worst_normalised"}


def test_tasks_are_sixteen_different_problems() -> None:
    _, held_out = digits.load(0)
    made = [task.of(held_out) for task in digits.TASKS]
    assert len({task.name for task in digits.TASKS}) == len(made) == 16
    for place, one in enumerate(made):
        for other in made[:place]:
            assert not (torch.equal(one.pixels, other.pixels) and torch.equal(one.labels, other.labels))
        assert not (torch.equal(one.pixels, held_out.pixels) and torch.equal(one.labels, held_out.labels))
        assert one.pixels.shape == held_out.pixels.shape
        assert 0 <= float(one.pixels.min()) <= float(one.pixels.max()) <= 1


def test_no_held_out_image_is_trained_on() -> None:
    training, held_out = digits.load(3)
    assert len(training.labels) + len(held_out.labels) == 1797
    seen = {image.numpy().tobytes() for image in training.pixels}
    assert sum(image.numpy().tobytes() in seen for image in held_out.pixels) == 0


def test_task_arithmetic_sums_the_deltas() -> None:
    merged = baselines.task_arithmetic([{"w": torch.tensor([1.0, -2.0])}, {"w": torch.tensor([3.0, 1.0])}])
    assert merged["w"].tolist() == [4.0, -1.0]


def test_ties_trims_elects_and_averages_what_agrees() -> None:
    # Of each delta the larger half is kept: [4, -3, ., .], [5, 2, ., .], [-1, ., ., 6].
    deltas: list[dict[str, Tensor]] = [
        {"a": torch.tensor([4.0, -3.0]), "b": torch.tensor([1.0, 0.5])},
        {"a": torch.tensor([5.0, 2.0]), "b": torch.tensor([0.1, 0.2])},
        {"a": torch.tensor([-1.0, 0.3]), "b": torch.tensor([0.4, 6.0])},
    ]
    merged = baselines.ties(deltas, density=0.5)
    assert merged["a"].tolist() == [4.5, -3.0]
    assert merged["b"].tolist() == [0.0, 6.0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the whole command leaves, with three fine-tunes of a few epochs."""
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "PRETRAINING_EPOCHS", 4)
        patch.setattr(run, "FINETUNING_EPOCHS", 3)
        arguments = [
            "demo",
            "--models",
            "3",
            "--group-size",
            "2",
            "--out",
            str(folder),
            "--json",
            str(folder / "t.json"),
        ]
        result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    (folder / "output.txt").write_text(result.output)
    return folder


def test_the_table_has_every_method_and_every_byte(folder: Path) -> None:
    found = json.loads((folder / "t.json").read_text())
    assert [row["method"] for row in found["methods"]] == [
        "individual fine-tunes", "base", "task arithmetic, best λ", "TIES, best λ", *run.METHODS,
    ]  # fmt: skip
    for row in found["methods"]:
        assert row.keys() >= ACCURACY_COLUMNS
        assert row["worst_accuracy"] == min(row["accuracy"].values())
        assert row["mean_accuracy"] == pytest.approx(sum(row["accuracy"].values()) / 3)
    assert found["methods"][0]["mean_normalised"] == 1
    sup = randes.Superposition.load(folder / "store")
    assert found["bytes"]["total"] == sup.nbytes
    assert found["bytes"]["kept"] > 0


def test_a_mixed_batch_is_the_separate_batches(folder: Path) -> None:
    mixed = json.loads((folder / "t.json").read_text())["mixed_batch"]
    assert mixed["models"] == 3
    assert mixed["predictions_equal"]
    assert mixed["largest_logit_difference"] < 1e-4


def test_the_other_commands_take_what_it_leaves(folder: Path) -> None:
    sup = randes.Superposition.load(folder / "store")
    assert sup.names == sorted(task.name for task in digits.TASKS[:3])
    before = (folder / "store" / "manifest.json").read_bytes()
    for command in ("remove", "add"):
        result = CliRunner().invoke(app, [command, str(folder / "store"), f"rot90={folder}/rot90.safetensors"])
        assert result.exit_code == 0, result.output
    assert (folder / "store" / "manifest.json").read_bytes() == before


def test_the_commands_that_it_names_next_run_as_they_stand(folder: Path) -> None:
    said = (folder / "output.txt").read_text().partition("What to try on them next:\n")[2]
    commands = [line.removeprefix("    ") for line in said.splitlines()]
    assert [command.split()[1] for command in commands] == ["info", "verify", "pack", "remove", "add", "retrieve"]
    before = (folder / "store" / "manifest.json").read_bytes()
    for command in commands:
        result = CliRunner().invoke(app, shlex.split(command)[1:])
        assert result.exit_code == 0, result.output
    assert (folder / "store" / "manifest.json").read_bytes() == before
    assert randes.Superposition.load(folder / "served").packing is not None


def test_the_picture_shows_something(folder: Path) -> None:
    picture = imread(folder / "demo.png")
    assert min(picture.shape[:2]) > 500
    assert len({tuple(color) for color in picture.reshape(-1, picture.shape[-1])[::97]}) > 8


def test_a_number_of_models_out_of_range_is_refused() -> None:
    result = CliRunner().invoke(app, ["demo", "--models", "17"])
    assert result.exit_code == 2
    assert "models must be from 2 to 16, got 17" in result.output


def test_without_its_packages_the_demo_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("randes.demo.run", "randes.demo.digits"):
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(randes.demo, "run")
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    result = CliRunner().invoke(app, ["demo"])
    assert result.exit_code == 2
    assert "sklearn.datasets is missing: python -m pip install 'randes[demo]'" in "".join(result.output.split("\n"))
