"""FusionBench's configuration, as it is, in our terms: from Python and on the command line."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from fusionbench_cases import (
    ADAPTERS,
    BASE,
    CASES,
    COMMON,
    DELTAS,
    LORA,
    MODELS,
    NAMES,
    Case,
    State,
    write_adapter,
)
from typer.testing import CliRunner

import randes
from randes import fusionbench
from randes.checkpoints.sources import write_file
from randes.cli import app
from randes.errors import RandesError


def options(**keys: Any) -> fusionbench.Options:
    return fusionbench.options({"name": "superposed_task_arithmetic", **COMMON, "scaling_factor": 0.3, **keys}, 4)


def test_each_key_has_its_meaning() -> None:
    config, alpha, lora, notes = options(shift_layers=-1, dropout_rate=2, different_across_layers=False)
    expected = randes.Config(
        signs="columns", shuffle_layers=-1, group_size=4, seed=42, others="sum", min_width=1, gains="shared", every=2,
        include=("*mlp*", "*Dense*", "*attn*", "*Attention*"), exclude=("*bias*",), per_layer=False, vectors=True,
        embeddings="shared", rank=0,
    )  # fmt: skip
    assert (config, alpha, lora) == (expected, 0.3, False)
    assert notes == (
        "joint_matrix_mode, rank, random_components: the original reads none of it, and nothing is done with it here",
        "absorber, ms_mode: of model soups alone, as in the original",
    )
    soup = {"_target_": "fusion_bench.method.randes.SuperposedModelSoupAlgorithm", **COMMON}
    assert fusionbench.options({"method": soup, "modelpool": {}}, 4).config.origin == "zero"
    for ms_mode, factor in (("average", 0.25), ("original", 1.0)):
        assert fusionbench.options({**soup, "ms_mode": ms_mode}, 4).alpha == factor
    for absorber, others in (("average", "average"), ("pretrained", "base"), ("None", "sum"), (None, "sum")):
        assert fusionbench.options({**soup, "absorber": absorber}, 4).config.others == others
    assert fusionbench.options({"name": "superposed_task_arithmetic_lora", **COMMON}, 4).lora


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"name": "superposed_model_soup", "ms_mode": "average"}, "every weight comes back divided by 4"),
        (
            {"name": "superposed_model_soup", "ms_mode": "average", "absorber": "average"},
            "absorber average: kept as it is; the original divides it by 4",
        ),
        ({"name": "superposed_model_soup", "ms_mode": "original", "absorber": "None"}, "comes back as the sum of 4"),
        ({"name": "superposed_model_soup", "scaling_factor": 0.3}, "the original's soup has none"),
        ({"name": "superposed_task_arithmetic_lora", "scaling_factor": 0.3}, "'randes merge-adapter --scaling 0.3'"),
        ({"debug": 1}, "see 'randes report'"), ({"model_path": "here"}, "the store goes where --out says"),
    ],
)  # fmt: skip
def test_what_is_otherwise_here_is_said(keys: dict[str, Any], said: str) -> None:
    assert said in "\n".join(options(**keys).notes)
    assert said not in "\n".join(options().notes)


@pytest.mark.parametrize("models", [0, -1, 2.0, "3", None])
def test_a_number_of_models_is_one(models: Any) -> None:
    with pytest.raises(ValueError, match="models must be an integer of at least 1, got"):
        fusionbench.options({"name": "superposed_task_arithmetic", **COMMON}, models)


def test_targets_are_the_originals() -> None:
    names = [
        "a.mlp.w.weight",
        "a.mlp.w.bias",
        "DenseReluDense.wi",
        "a.attn.q.weight",
        "a.attn.q.bias",
        "SelfAttention.k",
        "n",
    ]
    expected = {
        ("mlp_w",): {0, 2}, ("attn_w",): {3, 5}, ("mlp",): {0, 1, 2}, ("attn",): {3, 4, 5}, ("all",): set(range(7)),
        ("mlp_w", "attn_w"): {0, 2, 3, 5}, ("mlp_w", "attn"): {0, 2, 3, 4, 5}, ("mlp", "attn_w"): {0, 1, 2, 3, 5},
    }  # fmt: skip
    for targets, chosen in expected.items():
        config = options(target_layer=list(targets)).config
        assert {n for n, name in enumerate(names) if config.selects(name, (64, 64))} == chosen
        assert {n for n, name in enumerate(names) if config.selects(name, (64,))} == chosen
    assert options(target_layer="all").config == options(target_layer=["all"]).config


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"mode": "manual_absorption"}, "mode must be one of random_binary_diagonal_matrix, .*got 'manual"),
        ({"name": "dummy"}, "name or _target_ must be one of superposed_model_soup, .*, got 'dummy'"),
        ({"temperature": 1}, "must have FusionBench's keys only, got temperature"),
        ({"target_layer": ["mlps"]}, "target_layer must be one of mlp_w, attn_w, mlp, attn, all, got 'mlps'"),
        ({"target_layer": []}, "target_layer must be a list"),
        ({"absorber": "mean"}, "absorber must be one of average, pretrained, None, got 'mean'"),
        ({"ms_mode": "sum"}, "ms_mode must be one of average, original, got 'sum'"),
        ({"scaling_factor": "x"}, "scaling_factor must be a number, got 'x'"),
        ({"shift_layers": -2}, "shuffle_layers must be an integer of at least -1, got -2"),
    ],
)  # fmt: skip
def test_what_the_original_has_no_meaning_for_is_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        options(**keys)


def test_a_matrix_is_of_a_superposed_tensor() -> None:
    superposition = CASES[0].superposed
    with pytest.raises(ValueError, match=r"tensor must be one that is superposed, got 'embed\.weight'"):
        fusionbench.matrix(superposition, "m0", "embed.weight")
    with pytest.raises(randes.UnknownModelError):
        fusionbench.matrix(superposition, "m9", "embed.weight")


# -------------------------------------------------------------------- on the command line


def written_checkpoints(folder: Path) -> list[str]:
    """The arguments that name them."""
    arguments = ["--base", str(write(folder / "base.safetensors", BASE))]
    for name, state in MODELS.items():
        arguments += ["--model", f"{name}={write(folder / f'{name}.safetensors', state)}"]
    return arguments


def write(path: Path, state: State) -> Path:
    write_file(path, state)
    return path


def compressed(folder: Path, text: str, *more: str) -> tuple[int, str]:
    (folder / "config.yaml").write_text(text)
    arguments = [*written_checkpoints(folder), "--config", str(folder / "config.yaml"), "--out", str(folder / "store")]
    result = CliRunner().invoke(app, ["compress", *arguments, *more])
    return result.exit_code, " ".join(result.output.split())


YAML = "\n".join(f"{key}: {value}" for key, value in {"name": "superposed_task_arithmetic", **COMMON}.items())


def test_the_command_takes_the_configuration_as_it_is(tmp_path: Path) -> None:
    code, said = compressed(tmp_path, YAML + "\nscaling_factor: 0.5\nmodel_path: null\n")
    assert code == 0, said
    assert "note: joint_matrix_mode, rank, random_components: the original reads none of it" in said
    superposition = randes.Superposition.load(tmp_path / "store")
    expected = Case(DELTAS, {"scaling_factor": 0.5}).superposed
    assert {superposition.members[name].alpha for name in NAMES} == {0.5}
    assert superposition.config == expected.config
    for name in NAMES:
        for tensor, value in expected.retrieve(name).items():
            assert torch.equal(superposition.retrieve(name)[tensor], value)


def test_flags_override_the_configuration(tmp_path: Path) -> None:
    code, said = compressed(tmp_path, YAML, "--others", "keep", "--alpha", "0.25", "--signs", "both")
    assert code == 0, said
    superposition = randes.Superposition.load(tmp_path / "store")
    config = superposition.config
    assert (config.others, config.signs, config.seed, config.group_size) == ("keep", "both", 42, 3)
    assert superposition.members["m0"].alpha == 0.25
    assert torch.equal(superposition.retrieve("m1")["embed.weight"], MODELS["m1"]["embed.weight"])


def test_loras_configuration_superposes_factors(tmp_path: Path) -> None:
    arguments = ["--base", str(write(tmp_path / "base.safetensors", BASE)), "--out", str(tmp_path / "store")]
    for name, state in ADAPTERS.items():
        arguments += ["--model", f"{name}={write_adapter(tmp_path / name, state)}"]
    (tmp_path / "config.yaml").write_text(YAML.replace("task_arithmetic", "task_arithmetic_lora"))
    arguments += ["--config", str(tmp_path / "config.yaml")]
    refused = CliRunner().invoke(app, ["compress", *arguments, "--alpha", "0.5"])
    assert "alpha must be left out for adapters" in " ".join(refused.output.split())
    result = CliRunner().invoke(app, ["compress", *arguments])
    assert result.exit_code == 0, result.output
    assert "randes merge-adapter --scaling 1.0" in " ".join(result.output.split())
    superposition = randes.Superposition.load(tmp_path / "store")
    for tensor, value in Case(LORA).superposed.retrieve("m2").items():
        assert torch.equal(superposition.retrieve("m2")[tensor], value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            YAML.replace("random_binary_diagonal_matrix", "manual_absorption"),
            "error: mode must be one of random_binary_",
        ),
        ("- a list", "config.yaml must hold one mapping of keys to values, got list"),
        ("mode: [", "config.yaml must be a YAML file:"),
    ],
)
def test_a_configuration_that_is_none_is_refused(text: str, message: str, tmp_path: Path) -> None:
    code, said = compressed(tmp_path, text)
    assert code == 2
    assert message in said
    assert not (tmp_path / "store").exists()


def test_without_pyyaml_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(RandesError, match=r"python -m pip install 'randes\[yaml\]'"):
        fusionbench.read(tmp_path / "config.yaml")
