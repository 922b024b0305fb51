"""Superpositions packed for serving: from Python, in a store, from the command line, in a model."""

import copy
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models import content, finetune, net, stored
from torch import Tensor, nn
from typer.testing import CliRunner

import randes
from randes.checkpoints.sources import write_file
from randes.cli import app
from randes.superposition.summary import summary, verify
from randes_kernels import unpack

CONFIGS = {
    "two-sided": randes.Config(),
    "rank, centred": randes.Config(rank=6, centre=True),
    "permuted, groups of 2": randes.Config(permute=1, group_size=2),
    "shuffled": randes.Config(shuffle_layers=-1),
}
MIX = ["m0", "__base__", "m2", "m1", "m0"]


def made(
    config: randes.Config | None = None, count: int = 3
) -> tuple[nn.Module, dict[str, nn.Module], randes.Superposition]:
    base = net()
    models = {f"m{seed}": finetune(base, seed) for seed in range(count)}
    return base, models, randes.compress(base, models, config or randes.Config())


def tokens(rows: int) -> Tensor:
    return torch.randint(0, 11, (rows, 6), generator=torch.Generator().manual_seed(rows))


@pytest.mark.parametrize("bits", [8, 4, 2, 1, 0.5])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_every_row_is_answered_as_its_retrieved_model(config: randes.Config, bits: float) -> None:
    base, _, sup = made(config)
    packed = sup.pack(bits, coordinates=4 if bits <= 2 else 8)
    model = randes.SuperposedModel(copy.deepcopy(base), packed)
    x = tokens(len(MIX))
    y = model(x, adapter_names=MIX)
    for row, name in enumerate(MIX):
        alone = copy.deepcopy(base)
        if name in packed.members:
            alone.load_state_dict(packed.retrieve(name))
        torch.testing.assert_close(y[row], alone(x)[row], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bits", [8, 4, 2, 1, 0.5])
def test_few_bits_add_what_is_predicted(bits: float) -> None:
    _, models, sup = made(count=4)
    whole, packed = (verify(held, "m1", models["m1"]) for held in (sup, sup.pack(bits)))
    assert packed.relative_error == pytest.approx(packed.predicted_error, rel=0.1)
    assert packed.predicted_error > whole.predicted_error
    assert packed.kept_exact


@pytest.mark.parametrize("bits", [2, 1, 0.5])
def test_a_rotation_keeps_every_delta_at_its_size_where_some_columns_are_loud(bits: float) -> None:
    """A step is of all of a row's columns: under signs a delta whose loud columns are other models' too comes back
    smaller, and one that is even, larger."""
    torch.manual_seed(0)
    base, loud = nn.Linear(256, 256, bias=False), torch.ones(256)
    loud[torch.randperm(256)[:16]] = 12.0
    deltas = {name: 0.01 * torch.randn(256, 256) for name in ("even", "loud", "louder")}
    deltas["loud"] *= loud
    deltas["louder"] *= loud
    tuned = {name: {"weight": base.weight.detach() + delta} for name, delta in deltas.items()}
    off = {}
    for matrix in ("signs", "rotation"):
        held = randes.compress(base, tuned, randes.Config(matrix=matrix, rank=0)).pack(bits)
        back = {name: held.retrieve(name)["weight"] - base.weight.detach() for name in deltas}
        off[matrix] = max(
            abs(float((back[name] * delta).sum() / delta.square().sum()) - 1) for name, delta in deltas.items()
        )
    assert off["signs"] > 0.1
    assert off["rotation"] < 0.03


@pytest.mark.parametrize("coordinates", [16, 8, 4])
def test_coordinates_come_back_in_their_bits(coordinates: int) -> None:
    _, _, sup = made(CONFIGS["rank, centred"])
    packed = sup.pack(8, coordinates=coordinates)
    for name, member in sup.members.items():
        for tensor, held in member.coordinates.items():
            kept = packed.members[name].coordinates[tensor]
            found = kept if isinstance(kept, Tensor) else unpack(kept).mT
            error = (found.float() - held.float()).norm() / held.float().norm()
            assert error < {16: 1e-9, 8: 0.02, 4: 0.15}[coordinates]
    assert packed.sizes.basis <= sup.sizes.basis


def test_sizes_are_those_of_the_bits() -> None:
    base, _, sup = made()
    held = [value for name, value in base.state_dict().items() if name in sup.superposed]
    for bits in (8, 4, 2, 1, 0.5):
        whole = 128 if bits < 1 else 1  # the eight columns of which one is named lie apart
        words = sum(len(w) * math.ceil(math.ceil(w.shape[1] / whole) * whole * bits / 8) for w in held)
        steps = sum(2 * len(w) * (math.ceil(w.shape[1] / 64) if bits == 4 else 1) for w in held)
        assert sup.pack(bits).sizes.superposed == words + steps


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_packed_store_comes_back_to_the_byte(config: randes.Config, tmp_path: Path) -> None:
    _, _, sup = made(config)
    packed = sup.pack(4)
    packed.save(tmp_path / "store")
    again = randes.Superposition.load(tmp_path / "store")
    assert again.packing == packed.packing
    for name in packed.served:
        for tensor, value in packed.retrieve(name).items():
            assert torch.equal(again.retrieve(name)[tensor], value)
    assert stored(again, tmp_path / "again") == content(tmp_path / "store")


def test_the_manifest_names_the_superposition_that_it_was_made_of(tmp_path: Path) -> None:
    _, _, sup = made()
    sup.save(tmp_path / "master")
    sup.pack(2, group=128).save(tmp_path / "packed")
    master, packed = (json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("master", "packed"))
    assert "packed" not in master
    assert packed["packed"] == {"bits": 2, "group": 128, "coordinates": 4, "master": master["checksum"]}


def test_nothing_is_added_to_or_taken_from_what_is_packed() -> None:
    base, models, sup = made()
    packed = sup.pack()
    with pytest.raises(ValueError, match="a packed superposition is for serving: nothing can be added or removed"):
        packed.add("m9", finetune(base, 9))
    with pytest.raises(ValueError, match="nothing can be added or removed"):
        packed.remove("m0", models["m0"])
    with pytest.raises(ValueError, match="cannot be packed again"):
        packed.pack()
    assert packed.names == ["m0", "m1", "m2"]
    sup.remove("m0", models["m0"])  # the master goes on
    assert packed.names == ["m0", "m1", "m2"]


def test_what_cannot_be_packed_is_refused() -> None:
    _, _, sup = made()
    with pytest.raises(ValueError, match=r"bits must be one of 8, 4, 2, 1, 0\.5, got 3"):
        sup.pack(3)
    with pytest.raises(ValueError, match="group must be a multiple of 64 columns, or 0 for a whole row, got 32"):
        sup.pack(4, group=32)
    with pytest.raises(ValueError, match="coordinates must be one of 16, 8, 4, got 2"):
        sup.pack(4, coordinates=2)


def test_a_model_moves_between_dtypes_and_keeps_its_packed_form() -> None:
    base, _, sup = made()
    packed = sup.pack(4)
    model = randes.SuperposedModel(copy.deepcopy(base), packed)
    x = tokens(5)
    before = model(x, adapter_names=MIX)
    halved = model.bfloat16()(x, adapter_names=MIX)
    assert halved.dtype == torch.bfloat16
    assert (halved.float() - before).norm() < 0.05 * before.norm()
    pools = {layer.pool for layer in model.modules() if isinstance(layer, randes.SuperposedLinear)}
    assert all(pool.values.dtype == torch.uint8 and pool.steps.dtype == torch.float16 for pool in pools)
    with torch.autocast("cpu", torch.bfloat16):
        cast = model.float()(x, adapter_names=MIX)
    assert 0 < (cast - before).norm() < 0.05 * before.norm()


def test_no_models_and_models_that_changed_nothing_can_be_packed() -> None:
    base = net()
    sup = randes.Superposition.create(base)
    sup.add("same", copy.deepcopy(base))
    packed = sup.pack(4)
    x = tokens(2)
    y = randes.SuperposedModel(copy.deepcopy(base), packed)(x, adapter_names=["same", "__base__"])
    torch.testing.assert_close(y, base(x))


def test_gradients_reach_the_base_through_a_packed_model() -> None:
    base, _, sup = made(replace(CONFIGS["two-sided"], others="base"))
    model = randes.SuperposedModel(copy.deepcopy(base), sup.pack(8))
    model(tokens(5), adapter_names=MIX).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


def test_the_command_line_packs_a_store(tmp_path: Path) -> None:
    base, _, sup = made()
    sup.save(tmp_path / "store")
    run = CliRunner().invoke
    result = run(app, ["pack", str(tmp_path / "store"), "--bits", "2", "--out", str(tmp_path / "packed")])
    assert result.exit_code == 0, result.output
    assert randes.Superposition.load(tmp_path / "packed").packing == sup.pack(2).packing
    assert "packed for serving in 2 bits" in run(app, ["info", str(tmp_path / "packed")]).output
    assert json.loads(run(app, ["info", str(tmp_path / "packed"), "--json"]).stdout)["packed"]["bits"] == 2
    assert summary(sup)["packed"] is None
    write_file(tmp_path / "m9.safetensors", finetune(base, 9).state_dict())
    added = run(app, ["add", str(tmp_path / "packed"), f"m9={tmp_path}/m9.safetensors"])
    assert added.exit_code == 2
    assert "nothing can be added or removed" in added.output
    again = run(app, ["pack", str(tmp_path / "store"), "--out", str(tmp_path / "store")])
    assert again.exit_code == 2
    assert "must be empty" in again.output
    wrong = run(app, ["pack", str(tmp_path / "store"), "--bits", "5", "--out", str(tmp_path / "five")])
    assert wrong.exit_code == 2
    assert "bits must be one of 8, 4, 2, 1, 0.5, got 5" in wrong.output
    assert not (tmp_path / "five").exists()
