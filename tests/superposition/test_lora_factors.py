"""LoRA factors superposed one by one: what comes back multiplied, what it costs, and what is refused."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from models import finetune, net, stored
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

import randes
from randes import CheckpointError, UnknownModelError
from randes.cli import app
from randes.superposition.lora_factors import A, B

WEIGHTS = ("layers.0.up.weight", "layers.1.up.weight")


def adapter(folder: Path, seed: int, rank: int = 4, alpha: int = 6, extra: dict[str, Tensor] | None = None) -> Path:
    """Of two layers of ``net()``; every seed's update has about the same size."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(seed)
    tensors = dict(extra or {})
    for weight in WEIGHTS:
        prefix = f"base_model.model.{weight.removesuffix('.weight')}"
        tensors[f"{prefix}.lora_A.weight"] = torch.randn(rank, 32, generator=generator)
        tensors[f"{prefix}.lora_B.weight"] = 0.01 * torch.randn(48, rank, generator=generator)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": rank, "lora_alpha": alpha}))
    return folder


def update(folder: Path, weight: str) -> Tensor:
    held = load_file(folder / "adapter_model.safetensors")
    prefix = f"base_model.model.{weight.removesuffix('.weight')}"
    return 6 / 4 * held[f"{prefix}.lora_B.weight"].double() @ held[f"{prefix}.lora_A.weight"].double()


def test_one_adapter_comes_back_merged_and_leaves_the_rest_alone(tmp_path: Path) -> None:
    base, folder = net(), adapter(tmp_path / "a", 0)
    sup = randes.superpose_adapters(base, {"a": folder})
    assert set(sup.superposed) == {weight + factor for weight in WEIGHTS for factor in (A, B)}
    merged = randes.merge_adapter(sup, "a", base, scaling=0.5)
    for name, value in base.state_dict().items():
        if name not in WEIGHTS:
            assert torch.equal(merged[name], value)
            continue
        wanted = 0.5 * update(folder, name)
        torch.testing.assert_close(
            merged[name].double() - value.double(), wanted, rtol=0, atol=1e-2 * float(wanted.std())
        )
    with pytest.raises(ValueError, match="scaling must be a finite number, got nan"):
        randes.merge_adapter(sup, "a", base, scaling=math.nan)


@pytest.mark.parametrize("options", [{}, {"matrix": "rotation"}, {"signs": "columns", "gains": "shared"}], ids=str)
def test_the_products_error_is_what_two_superposed_factors_have(options: dict[str, Any], tmp_path: Path) -> None:
    base, count = net(), 4
    folders = {f"m{seed}": adapter(tmp_path / f"m{seed}", seed) for seed in range(count)}
    sup = randes.superpose_adapters(base, folders, randes.Config(**options))
    own = base.state_dict()
    errors = []
    for name, folder in folders.items():
        merged = randes.merge_adapter(sup, name, base)
        for weight in WEIGHTS:
            wanted = update(folder, weight)
            errors.append(float((merged[weight].double() - own[weight].double() - wanted).norm() / wanted.norm()))
    assert sum(errors) / len(errors) == pytest.approx(math.sqrt(count**2 - 1), rel=0.25)


def test_adapters_join_and_leave_to_the_byte_and_stores_keep_them(tmp_path: Path) -> None:
    base = net()
    folders = {f"m{seed}": adapter(tmp_path / f"m{seed}", seed) for seed in range(2)}
    sup = randes.superpose_adapters(base, folders)
    sup.save(tmp_path / "store")
    loaded = randes.Superposition.load(tmp_path / "store")
    found, before = randes.merge_adapter(loaded, "m1", base), randes.merge_adapter(sup, "m1", base)
    assert all(torch.equal(found[name], before[name]) for name in before)
    with pytest.raises(UnknownModelError, match="nobody"):
        randes.merge_adapter(sup, "nobody", base)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    base, one = net(), adapter(tmp_path / "one", 0)
    with pytest.raises(ValueError, match=r"^adapters must hold at least one"):
        randes.superpose_adapters(base, {})
    with pytest.raises(CheckpointError, match="must be"):
        randes.superpose_adapters(base, {"a": one, "b": adapter(tmp_path / "two", 1, rank=2)})
    whole = {"base_model.model.head.weight": torch.zeros(5, 32)}
    with pytest.raises(CheckpointError, match=r"must hold LoRA factors alone, got all of head\.weight"):
        randes.superpose_adapters(base, {"a": adapter(tmp_path / "whole", 1, extra=whole)})
    sup = randes.superpose_adapters(base, {"a": one})
    with pytest.raises(CheckpointError, match=r"the base must have layers.0.up.weight of \(48, 32\)"):
        randes.merge_adapter(sup, "a", {"other": torch.zeros(3)})
    with pytest.raises(CheckpointError, match="must hold adapters' factors alone"):
        randes.merge_adapter(randes.compress(base, {"a": base}), "a", base)
    with pytest.raises(ValueError, match=r"^centre must be False"):
        randes.superpose_adapters(base, {"a": one}, randes.Config(centre=True))


def test_from_the_command_line(tmp_path: Path) -> None:
    base, folder = net(), adapter(tmp_path / "a", 0)
    save_file(base.state_dict(), tmp_path / "base.safetensors")
    plain = ["--base", str(tmp_path / "base.safetensors"), "--out"]
    made = ["superpose-adapters", *plain, str(tmp_path / "store"), "--adapter", f"a={folder}", "--matrix", "rotation"]
    assert CliRunner().invoke(app, made).exit_code == 0
    merging = [
        "merge-adapter",
        str(tmp_path / "store"),
        "a",
        *plain,
        str(tmp_path / "out.safetensors"),
        "--scaling",
        "2",
    ]
    assert CliRunner().invoke(app, merging).exit_code == 0
    found, own = load_file(tmp_path / "out.safetensors"), base.state_dict()
    wanted = 2 * update(folder, WEIGHTS[0])
    difference = found[WEIGHTS[0]].double() - own[WEIGHTS[0]].double()
    torch.testing.assert_close(difference, wanted, rtol=0, atol=5e-3 * float(wanted.std()))
    result = CliRunner().invoke(app, made)
    assert result.exit_code == 2
    assert "must be empty or a store" in result.stderr or "store" in result.stderr


def test_an_average_counts_what_adapters_left_alone(tmp_path: Path) -> None:
    base = net()
    tuned = finetune(base, 0)
    models = {"full": tuned, "lora": adapter(tmp_path / "a", 0)}
    sup = randes.compress(base, models, randes.Config(others="average", rank=0))
    mean = (base.norm.weight.detach() + tuned.norm.weight.detach()) / 2
    torch.testing.assert_close(sup.retrieve("lora")["norm.weight"], mean)
    added = randes.Superposition.create(base, randes.Config(others="average", rank=0))
    for name, model in models.items():
        added.add(name, model)
    assert stored(added, tmp_path / "added") == stored(sup, tmp_path / "compressed")
