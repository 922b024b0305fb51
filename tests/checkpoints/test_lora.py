"""LoRA adapters as PEFT writes them: the merged weight, worked out here, is what is superposed; the rest is refused."""

import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from models import net, stored
from safetensors.torch import save_file
from torch import Tensor
from typer.testing import CliRunner

import randes
from randes import CheckpointError
from randes.checkpoints import sources
from randes.checkpoints.lora import AdapterTensors
from randes.cli import app

RANK, ALPHA = 4, 6
UP, DOWN = "layers.0.up", "layers.1.down"


def adapter(folder: Path, ranks: dict[str, int] | None = None, extra: dict[str, Tensor] | None = None,
            turned: bool = False, **config: Any) -> Path:  # fmt: skip
    """An adapter of two layers of ``net()``."""
    folder.mkdir(exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    tensors, base = dict(extra or {}), net().state_dict()
    for module in (UP, DOWN):
        n, k = reversed(base[f"{module}.weight"].shape) if turned else base[f"{module}.weight"].shape
        r = (ranks or {}).get(module, RANK)
        tensors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(r, k, generator=generator)
        tensors[f"base_model.model.{module}.lora_B.weight"] = 0.01 * torch.randn(n, r, generator=generator)
    save_file(tensors, folder / "adapter_model.safetensors")
    plain = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "bias": "none", "use_dora": False}
    (folder / "adapter_config.json").write_text(json.dumps(plain | config))
    return folder


def factors(folder: Path, module: str) -> tuple[Tensor, Tensor]:
    held = sources.read_file(folder / "adapter_model.safetensors")
    prefix = f"base_model.model.{module}"
    return held[f"{prefix}.lora_A.weight"].double(), held[f"{prefix}.lora_B.weight"].double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("config", "scaling"),
    [
        ({}, {UP: ALPHA / RANK, DOWN: ALPHA / RANK}),
        ({"use_rslora": True}, {UP: ALPHA / math.sqrt(RANK), DOWN: ALPHA / math.sqrt(RANK)}),
        ({"rank_pattern": {"up": 2}}, {UP: ALPHA / 2, DOWN: ALPHA / RANK}),
        ({"alpha_pattern": {r"layers\.1\.down": 1, "p": 9}}, {UP: ALPHA / RANK, DOWN: 1 / RANK}),
        ({"rank_pattern": {UP: 2}, "alpha_pattern": {"up": 5}, "use_rslora": True},
         {UP: 5 / math.sqrt(2), DOWN: ALPHA / math.sqrt(RANK)}),
        ({"fan_in_fan_out": True}, {UP: ALPHA / RANK, DOWN: ALPHA / RANK}),
    ],
)  # fmt: skip
def test_it_is_the_merged_model(config: dict[str, Any], scaling: dict[str, float], dtype: torch.dtype,
                                tmp_path: Path) -> None:  # fmt: skip
    base = net(dtype=dtype).state_dict()
    ranks = {UP: 2} if "rank_pattern" in config else None
    folder = adapter(tmp_path / "a", ranks, turned="fan_in_fan_out" in config, **config)
    merged = sources.read(folder, base)
    assert isinstance(merged, AdapterTensors)
    assert merged.touched == {f"{UP}.weight", f"{DOWN}.weight"}
    for name, value in base.items():
        expected = value
        if (module := name.removesuffix(".weight")) in scaling:
            a, b = factors(folder, module)
            product = (b @ a).mT if "fan_in_fan_out" in config else b @ a
            expected = (value.double() + scaling[module] * product).to(dtype)
            assert not torch.equal(merged[name], value)
        # A matmul sums in another order; what is rounded from it may differ in its last bit.
        torch.testing.assert_close(merged[name], expected, rtol=torch.finfo(dtype).eps, atol=0)
        assert merged[name].dtype == dtype


def test_it_is_superposed_as_the_merged_model_is(tmp_path: Path) -> None:
    base = net()
    own_head = {f"base_model.model.head.{kind}": value + 1 for kind, value in base.head.state_dict().items()}
    folder = adapter(tmp_path / "a", extra=own_head, modules_to_save=["head"])
    merged = dict(sources.read(folder, base.state_dict()))
    assert torch.equal(merged["head.bias"], base.head.bias + 1)
    stores = []
    for number, finetuned in enumerate((folder, merged)):
        sup = randes.Superposition.create(base)
        sup.add("m", finetuned)
        assert sorted(sup.members["m"].gains) == [f"{UP}.weight", f"{DOWN}.weight"]
        assert sorted(sup.members["m"].kept) == ["head.bias", "head.weight"]
        stores.append(stored(sup, tmp_path / f"store{number}"))
        sup.remove("m", folder)
        assert sup.deltas == {}
    together = randes.compress(base, {"m": folder}, randes.Config(rank=0))
    assert stores[0] == stores[1] == stored(together, tmp_path / "compressed")


def test_with_centring_it_is_of_the_original_base(tmp_path: Path) -> None:
    base = net()
    folder = adapter(tmp_path / "a")
    merged = dict(sources.read(folder, base.state_dict()))
    config = randes.Config(centre=True, rank=0)
    found, expected = (randes.compress(base, {"a": model, "b": net(seed=0)}, config) for model in (folder, merged))
    assert stored(found, tmp_path / "found") == stored(expected, tmp_path / "expected")
    with pytest.raises(CheckpointError, match="is a LoRA adapter, which needs the model it was trained on; merge it"):
        found.add("c", folder)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_dora": True}, "use_dora = False, got True"),
        ({"bias": "lora_only"}, "bias = 'none', got 'lora_only'"),
        ({"lora_bias": True}, "lora_bias = False, got True"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = True, got 'pissa'"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"peft_type": "IA3"}, "peft_type must be 'LORA', got 'IA3'"),
        ({"r": None}, "must be a LoRA adapter's: it.r must be an integer from 1"),
        ({"rank_pattern": {"up": 3}}, r"layers.0.up must have lora_A \(3, in\)"),
    ],
)
def test_what_is_not_supported_is_named(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    sup = randes.Superposition.create(net())
    with pytest.raises(CheckpointError, match=message):
        sup.add("m", adapter(tmp_path / "a", **config))
    assert sup.names == []


@pytest.mark.parametrize(
    ("key", "shape", "message"),
    [
        ("base_model.model.layers.0.up.lora_magnitude_vector", (48,), "lora_magnitude_vector"),
        ("base_model.model.embed.lora_embedding_A", (4, 11), "lora_embedding_A"),
        ("base_model.model.layers.2.up.lora_A.weight", (4, 32), "lora_A and lora_B of each layer, got .* layers.2.up"),
        ("base_model.model.absent.weight", (4, 32), "changes absent.weight, which is not in the base"),
        ("base_model.model.head.bias", (6,), r"must fit head.bias, \(5,\) .* got \(6,\)"),
        ("layers.0.up.weight", (48, 32), "got layers.0.up.weight"),
    ],
)
def test_tensors_that_are_no_update_of_the_base_are_named(
    key: str, shape: tuple[int, ...], message: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=message):
        randes.compress(net(), {"m": adapter(tmp_path / "a", extra={key: torch.zeros(shape)})})


def test_an_adapter_of_another_width_or_without_weights_is_refused(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "a", turned=True)
    with pytest.raises(CheckpointError, match=r"must fit layers.0.up.weight, \(48, 32\) .* got \(32, 48\)"):
        sources.read(folder, net().state_dict())
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"holds no adapter_model\.safetensors"):
        sources.read(folder, net().state_dict())


def test_the_command_line_takes_one(tmp_path: Path) -> None:
    save_file(net().state_dict(), tmp_path / "base.safetensors")
    folder = adapter(tmp_path / "a")
    for command in (
        ["compress", "--base", f"{tmp_path}/base.safetensors", "--model", f"a={folder}", "--out", f"{tmp_path}/s"],
        ["verify", f"{tmp_path}/s", f"a={folder}"],
        ["add", f"{tmp_path}/s", f"b={folder}"],
        ["remove", f"{tmp_path}/s", f"a={folder}"],
    ):
        run = CliRunner().invoke(app, command)
        assert run.exit_code == 0, run.output
    assert randes.Superposition.load(tmp_path / "s").names == ["b"]


@pytest.mark.parametrize(
    "pattern",
    [
        "(a+)+$",
        "(a|b)*",
        "(?=x)",
        "(",
        "a{99999999999}",
        "x" * 1001,
        ".*" * 12 + "x",
        "(a|a)" * 30,
        "[",
        "\ud800",
        "a**",
    ],
)
def test_a_pattern_that_takes_for_ever_is_refused_at_once(pattern: str, tmp_path: Path) -> None:
    base = net().state_dict()
    for key in ("rank_pattern", "alpha_pattern"):
        folder = adapter(tmp_path / key, **{key: {pattern: RANK}})
        began = time.monotonic()
        with pytest.raises(CheckpointError, match=r"must be|must have rank and alpha patterns"):
            sources.read(folder, base)
        assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    "change",
    [{"r": 0}, {"r": True}, {"r": "8"}, {"r": 1 << 40}, {"lora_alpha": float("nan")}, {"lora_alpha": 1e308},
     {"rank_pattern": []}, {"rank_pattern": {"up": 2.5}}, {"use_rslora": "yes"}, {"alpha_pattern": {"up": None}}],
)  # fmt: skip
def test_a_configuration_of_other_types_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="must be a LoRA adapter's: it"):
        sources.read(adapter(tmp_path / "a", **change), net().state_dict())


def test_factors_are_in_floating_point(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "a")
    held = dict(sources.read_file(folder / "adapter_model.safetensors"))
    key = f"base_model.model.{UP}.lora_A.weight"
    for dtype in (torch.int32, torch.complex64, torch.bool):
        save_file(held | {key: held[key].to(dtype)}, folder / "adapter_model.safetensors")
        with pytest.raises(CheckpointError, match=f"must have {key} in floating point, got {dtype}"):
            sources.read(folder, net().state_dict())
