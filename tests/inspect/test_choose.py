"""One dial: what is chosen fits, keeps the most that fits, and is what the store then takes."""

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

import randes
from randes.cli import app
from randes.errors import RandesError
from randes.inspect.choose import Wanted, settled


def models() -> tuple[nn.ModuleDict, dict[str, nn.ModuleDict]]:
    torch.manual_seed(0)
    layers = {"embed": nn.Embedding(1100, 64), "up": nn.Linear(64, 1024, bias=False), "norm": nn.LayerNorm(64)}
    base, tuned = nn.ModuleDict(layers).bfloat16(), {}
    for number in range(6):
        tuned[f"m{number}"] = copy.deepcopy(base)
        for parameter in tuned[f"m{number}"].parameters():
            parameter.data.add_(0.1 * torch.randn(parameter.shape))
    return base, tuned


@pytest.mark.parametrize("budget", [1.8, 2.0, 2.5, 4.0])
def test_the_store_is_within_its_budget(budget: float) -> None:
    base, tuned = models()
    choice = randes.choose(base, len(tuned), budget=budget, config=randes.Config(rank=0))
    sup = randes.compress(base, tuned, choice.config)
    final = settled(sup, Wanted(budget=budget))
    packed = sup.pack(**final.packing)
    assert packed.sizes.total == final.store, "the arithmetic is what the store takes"
    assert choice.store == pytest.approx(final.store, rel=0.02)
    assert packed.sizes.total <= budget * packed.sizes.base
    assert f"{final.times:.2f}x one model" in str(final)
    assert "about" in str(choice)
    assert "about" not in str(final)


def test_more_room_keeps_more_and_more_quality_takes_more() -> None:
    base, _ = models()
    by_budget = [randes.choose(base, 32, budget=budget) for budget in (3.5, 5.0, 8.0, 20.0)]
    assert [choice.kept for choice in by_budget] == sorted({choice.kept for choice in by_budget})
    assert by_budget[-1].config.group_size == 1
    assert by_budget[-1].embeddings == 2
    by_quality = [randes.choose(base, 32, quality=quality) for quality in (95, 98, 99, 99.5)]
    assert [choice.store for choice in by_quality] == sorted({choice.store for choice in by_quality})
    for choice, quality in zip(by_quality, (95, 98, 99, 99.5), strict=True):
        assert choice.kept >= quality
    nbytes = by_budget[1].store
    assert randes.choose(base, 32, memory=nbytes).store <= nbytes
    assert randes.choose(base, 1, budget=10).config.group_size == 1


def test_what_there_is_no_store_for_says_what_is_nearest() -> None:
    base, _ = models()
    with pytest.raises(
        RandesError, match=r"no store is within 1\.01x one model; the nearest has groups of 64, rank auto"
    ):
        randes.choose(base, 64, budget=1.01)
    with pytest.raises(RandesError, match=r"no store is predicted to keep 99\.99 %; the nearest has groups of 1"):
        randes.choose(base, 64, quality=99.99)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({}, "one of budget, memory and quality must be given, got none"),
        ({"budget": 1.3, "quality": 99.0}, "one of budget, memory and quality must be given, got budget, quality"),
        ({"budget": 1.0}, "budget must be above 1, got 1.0"),
        ({"memory": 0}, "memory must be above 0, got 0"),
        ({"quality": 100.0}, "quality must be above 0 and below 100, got 100.0"),
        ({"budget": float("nan")}, "budget must be above 1, got nan"),
    ],
)
def test_bad_wishes(wanted: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        randes.choose(nn.Linear(64, 64), 8, **wanted)  # type: ignore[arg-type]


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    base, tuned = models()
    save_file(base.state_dict(), tmp_path / "base.safetensors")
    given = ["compress", "--base", str(tmp_path / "base.safetensors")]
    for name, model in tuned.items():
        save_file(model.state_dict(), tmp_path / f"{name}.safetensors")
        given += ["--model", f"{name}={tmp_path / name}.safetensors"]
    return [*given, "--out", str(tmp_path / "store")]


@pytest.mark.parametrize("flags", [("--budget", "2.2x"), ("--memory", "0.6 MB"), ("--quality", "99")])
def test_the_command_line_chooses_and_says_so(files: list[str], flags: tuple[str, str], tmp_path: Path) -> None:
    result = CliRunner().invoke(app, [*files, *flags, "--rank", "0", "--master", str(tmp_path / "master")])
    assert result.exit_code == 0, result.output
    assert "chosen: groups of" in result.output
    sup, master = (randes.Superposition.load(tmp_path / name) for name in ("store", "master"))
    assert sup.packing is not None
    assert master.packing is None
    assert sup.packing.master == master.stored.checksum  # type: ignore[attr-defined]
    if flags[0] == "--budget":
        assert sup.sizes.total <= 2.2 * sup.sizes.base
    if flags[0] == "--memory":
        assert sup.sizes.total <= 600_000
    assert f"{sup.sizes.total / sup.sizes.base:.2f}x one of them" in result.output


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--budget", "1.3 models"), "--budget must be a number with one of the units x, got '1.3 models'"),
        (("--memory", "24"), "--memory must be a number with one of the units mb, gb, mib, gib, got '24'"),
        (("--budget", "1.3x", "--group-size", "8"), "--group-size must be left out with --budget"),
        (("--master", "somewhere"), "--master goes with --budget"),
        (("--budget", "1.01x"), "no store is within 1.01x one model"),
    ],
)
def test_bad_flags(files: list[str], flags: tuple[str, ...], message: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, [*files, *flags])
    assert result.exit_code == 2
    assert message in result.output
    assert not (tmp_path / "store").exists()
