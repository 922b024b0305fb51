"""What is planned against what comes out."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models import finetune, net
from rich.console import Console
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

import randes
from randes.cli import app
from randes.errors import CheckpointError
from randes.superposition.summary import verify

CONFIGS = {
    "two-sided": randes.Config(rank=0),
    "groups of 2": randes.Config(group_size=2, rank=0),
    "rank, centred": randes.Config(rank=6, centre=True),
    "others from the base": randes.Config(others="base", rank=0),
}


def bytes_of(model: randes.SuperposedModel) -> int:
    """Weights in memory: parameters, and what layers hold of all models but for a few numbers of each."""
    small = {"keys", "slots", "scale"}
    held = [*model.named_parameters(), *model.named_buffers()]
    return sum(value.nbytes for name, value in held if name.rpartition(".")[2] not in small)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_sizes_are_what_stores_and_models_take(config: randes.Config) -> None:
    base = net()
    models = {f"m{number}": finetune(base, number) for number in range(5)}
    sup = randes.compress(base, models, config)
    for row in randes.plan(base, 5, config):
        held = sup if row.bits == 16 else sup.pack(row.bits)
        # What a centred superposition keeps of its base is nothing, and what a model may change of its own it did.
        assert held.sizes.total == pytest.approx(row.store, rel=0.03)
        assert row.separate == held.sizes.separate_models
        served = bytes_of(randes.SuperposedModel(net(), held))
        assert served == pytest.approx(row.serving, rel=0.05)


def test_interference_is_what_verify_finds() -> None:
    base = net()
    models = {f"m{number}": finetune(base, number) for number in range(4)}
    sup = randes.compress(base, models, randes.Config(rank=0))
    for row in randes.plan(base, 4, randes.Config(rank=0)):
        held = sup if row.bits == 16 else sup.pack(row.bits)
        assert verify(held, "m1", models["m1"]).relative_error == pytest.approx(row.interference, rel=0.1)


def test_costs_are_the_designs() -> None:
    base = nn.Linear(4096, 1024, dtype=torch.bfloat16)
    plain = randes.Config(rank=0)
    costs = {row.bits: row.decode for row in randes.plan(base, 8, plain)}
    assert costs == pytest.approx({16: 2.0, 8: 1.5, 4: 1.27, 2: 1.13, 1: 1.06, 0.5: 1.03}, abs=0.01)
    many = {row.bits: row.decode_all for row in randes.plan(base, 16, plain)}
    assert many[16] == pytest.approx(3.0)
    ranked = randes.plan(base, 8, randes.Config(rank=32))[0]
    assert ranked.decode == pytest.approx(2 + 32 / 4096 + 32 / 1024 / 8, abs=0.01)
    assert ranked.serving > randes.plan(base, 8, plain)[0].serving


def test_with_rank_auto_it_is_the_most_that_there_can_be() -> None:
    base = net()
    models = {f"m{number}": finetune(base, number) for number in range(5)}
    assert randes.plan(base, 5) == randes.plan(base, 5, randes.Config(rank="auto"))
    assert randes.plan(base, 5) == randes.plan(base, 5, randes.Config(rank=50))
    with torch.no_grad():  # one direction alone in one matrix, and in the others noise, of which half is kept
        for model in models.values():
            model.layers[0].up.weight.copy_(base.layers[0].up.weight + torch.randn(48, 1) @ torch.ones(1, 32))
    sup = randes.compress(base, models)
    assert {basis.shape[1] for basis in sup.bases.values()} == {1, 16}
    for row in randes.plan(base, 5):
        held = sup if row.bits == 16 else sup.pack(row.bits)
        assert 0.8 * row.store < held.sizes.total < row.store
        assert verify(held, "m1", models["m1"]).relative_error < row.interference


def test_values_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file(net().state_dict(), tmp_path / "base.safetensors")
    expected = randes.plan(net(), 3)
    monkeypatch.setattr("randes.checkpoints.on_disk.StoredTensors.chunks", None)
    assert randes.plan(tmp_path / "base.safetensors", 3) == expected


def test_what_cannot_be_planned_is_refused() -> None:
    with pytest.raises(ValueError, match="models must be at least 1, got 0"):
        randes.plan(net(), 0)
    with pytest.raises(CheckpointError, match=r"must have a matrix to superpose.*got none in 2 tensors"):
        randes.plan(nn.LayerNorm(4), 2)


def test_the_command_line_says_what_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("randes.cli.planning.console", Console(width=160))
    base = net()
    save_file(base.state_dict(), tmp_path / "base.safetensors")
    rows = randes.plan(base, 8, replace(randes.Config(), rank=4))
    between = (rows[0].serving + rows[1].serving) / 2e9
    command = ["plan", "--base", f"{tmp_path}/base.safetensors", "--models", "8", "--rank", "4"]
    auto = CliRunner().invoke(app, command[:-2]).stdout
    assert "the models decide how many directions each matrix keeps, 50 at most" in " ".join(auto.split())
    shown = CliRunner().invoke(app, [*command, "--memory", f"{between:.9f}"]).stdout
    assert [line.split()[-2] for line in shown.splitlines() if line.startswith("│")] == [
        "no",
        "yes",
        "yes",
        "yes",
        "yes",
        "yes",
    ]
    found = json.loads(CliRunner().invoke(app, [*command, "--json"]).stdout)
    assert [row["serving"] for row in found] == [row.serving for row in rows]
    wrong = CliRunner().invoke(app, [*command, "--memory", "0"])
    assert wrong.exit_code == 2
    assert "--memory must be above 0" in wrong.output
