"""The shared basis: found, exact, stored, served, and what it is for."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models import counted, finetune, linear, net, stored
from torch import Tensor, nn
from typer.testing import CliRunner

import randes
from randes.checkpoints.sources import write_file
from randes.cli import app
from randes.serving.layers.superposed import Superposed
from randes.superposition import summary
from randes.superposition.basis import shared_basis
from randes.superposition.basis.shared_basis import UNIT
from randes.superposition.summary import verify
from randes_kernels import lowrank

RANK = randes.Config(rank=6)
CONFIGS = {
    "rank": RANK,
    "centred": replace(RANK, centre=True),
    "permuted, groups of 2": replace(RANK, permute=1, group_size=2),
    "shuffled": replace(RANK, shuffle_layers=-1),
    "columns": replace(RANK, signs="columns"),
    "auto": replace(RANK, rank="auto"),
    "auto, centred, groups of 2": replace(RANK, rank="auto", centre=True, group_size=2),
}
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def loud(base: nn.Module, count: int = 4, size: float = 0.1) -> dict[str, nn.Module]:
    """Fine-tunes whose deltas are loudest in four directions of each matrix's input, the same for all of them."""
    models = {}
    for number in range(count):
        tuned = finetune(base, number, 0.01)
        with torch.no_grad():
            for name, parameter in tuned.named_parameters():
                if parameter.dim() == 2:
                    shared = torch.Generator().manual_seed(len(name))
                    directions = torch.linalg.qr(torch.randn(parameter.shape[1], 4, generator=shared))[0]
                    own = torch.Generator().manual_seed(number)
                    parameter += size * torch.randn(len(parameter), 4, generator=own) @ directions.mT
        models[f"m{number}"] = tuned
    return models


class Uneven(nn.Module):
    """Three matrices of which ``uneven`` makes deltas with 4, no and 9 loud directions."""

    def __init__(self) -> None:
        super().__init__()
        self.few, self.none, self.many = nn.Linear(32, 256), nn.Linear(256, 160), nn.Linear(160, 40)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.many(torch.relu(self.none(torch.relu(self.few(x)))))
        return hidden


def uneven(count: int = 4) -> tuple[nn.Module, dict[str, nn.Module]]:
    torch.manual_seed(0)
    base = Uneven()
    directions = {"few": torch.linalg.qr(torch.randn(32, 4))[0], "many": torch.linalg.qr(torch.randn(160, 9))[0]}
    models = {f"m{number}": finetune(base, number, 0.003) for number in range(count)}
    for model in models.values():
        for name, shared in directions.items():
            weight = model.get_submodule(name).weight
            with torch.no_grad():
                weight += 0.1 * torch.randn(len(weight), shared.shape[1]) @ shared.mT
    return base, models


def tokens(rows: int) -> Tensor:
    return torch.randint(0, 11, (rows, 6), generator=torch.Generator().manual_seed(rows))


def retrieved(base: nn.Module, sup: randes.Superposition, name: str) -> nn.Module:
    model = copy.deepcopy(base)
    if name in sup.members:
        model.load_state_dict(sup.retrieve(name))
    return model


def test_the_loudest_directions_are_the_top_eigenvectors() -> None:
    base = linear(96, 64)
    models = loud(base)
    u = shared_basis.loudest({n: m.state_dict() for n, m in models.items()}, dict(base.state_dict()), ["weight"], 4, 0)[
        "weight"
    ]
    assert u.shape == (64, 4)
    u = u.double() * UNIT
    torch.testing.assert_close(u.mT @ u, torch.eye(4, dtype=torch.float64), rtol=0, atol=2e-3)
    deltas = [(m.weight - base.weight).detach().double() for m in models.values()]
    gram = sum(d.mT @ d / d.square().sum() for d in deltas)
    top = torch.linalg.eigh(gram)[1][:, -4:]
    assert torch.linalg.matrix_norm(top.mT @ u, ord=2, dim=(0, 1)) > 0.999
    assert torch.linalg.svdvals(top.mT @ u).min() > 0.99


def test_the_rest_of_a_delta_is_exact_whatever_the_order_of_the_sums() -> None:
    torch.manual_seed(0)
    delta = torch.randn(48, 40, dtype=torch.float64)
    u = torch.randint(-(2**14), 2**14, (40, 5), dtype=torch.int16)
    held, unit = shared_basis.coordinates(delta, u)
    assert unit == 2.0 ** round(torch.log2(torch.tensor(unit)).item())
    rest = shared_basis.remainder(delta, u, held, unit)
    exact = torch.tensor(
        [[sum(int(b) * int(c) for b, c in zip(row, column, strict=True)) for column in u] for row in held],
        dtype=torch.float64,
    )
    assert torch.equal(rest, (delta - exact * (unit * UNIT)).float())
    assert torch.equal(rest, shared_basis.remainder(delta.flip(1), u.flip(0), held, unit).flip(1))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_every_row_is_answered_as_its_retrieved_model(config: randes.Config) -> None:
    base = net()
    sup = randes.compress(base, loud(base), config)
    model = randes.SuperposedModel(copy.deepcopy(base), sup)
    mix = ["m0", "__base__", "m3", "m1", "m2", "m0"]
    x = tokens(len(mix))
    y = model(x, adapter_names=mix)
    for row, name in enumerate(mix):
        torch.testing.assert_close(y[row], retrieved(base, sup, name)(x)[row], **CLOSE)
    torch.testing.assert_close(model(x, adapter_names=["m2"] * 6), retrieved(base, sup, "m2")(x), **CLOSE)


def test_many_models_gather_and_few_do_not_and_both_answer_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    base = net()
    sup = randes.compress(base, loud(base), RANK)
    model = randes.SuperposedModel(copy.deepcopy(base), sup)
    x, mix = tokens(4), ["m0", "__base__", "m3", "m1"]
    few = model(x, adapter_names=mix)
    monkeypatch.setattr(lowrank, "FEW_MODELS", 0)
    torch.testing.assert_close(model(x, adapter_names=mix), few, **CLOSE)


def test_auto_keeps_the_directions_that_hold_a_share_and_where_there_are_none_no_basis() -> None:
    base, models = uneven()
    sup = randes.compress(base, models, randes.Config(rank="auto"))
    assert {name: basis.shape[1] for name, basis in sup.bases.items()} == {"few.weight": 4, "many.weight": 9}
    for name, u in sup.bases.items():
        deltas = [(m.state_dict()[name] - base.state_dict()[name]).double() for m in models.values()]
        held = sum((d @ (u.double() * UNIT)).square().sum(0) / d.square().sum() for d in deltas) / len(deltas)
        assert (held > shared_basis.SHARE).all()
        rest = [d - d @ (u.double() * UNIT) @ (u.double() * UNIT).mT for d in deltas]
        gram = sum(r.mT @ r / d.square().sum() for r, d in zip(rest, deltas, strict=True)) / len(deltas)
        assert torch.linalg.eigvalsh(gram)[-1] < shared_basis.SHARE


@pytest.mark.parametrize("calibrated", [False, True])
def test_any_number_of_threads_makes_the_same_bytes(calibrated: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(linear(320, 320), linear(640, 320, seed=1))
    models = loud(base, count=3)
    x = torch.randn(2000, 320)
    moments = randes.calibrate(base, [x]) if calibrated else None
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            made = randes.compress(base, models, randes.Config(rank=4 if calibrated else "auto"), calibration=moments)
            assert made.bases
            found.append(stored(made, tmp_path / str(count)))
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    assert found[0] == found[1] == found[2]


def test_auto_keeps_no_more_than_half_of_the_narrower_side() -> None:
    base = linear(48, 32)
    models = {f"m{number}": finetune(base, number).state_dict() for number in range(3)}  # 1 / 32 in every direction
    found = shared_basis.loudest(models, dict(base.state_dict()), ["weight"], "auto", 0)
    assert found["weight"].shape == (32, 16)
    assert shared_basis.widest("auto", 4096, 4096) == shared_basis.MOST == round(1 / shared_basis.SHARE)


@pytest.mark.parametrize("group_size", [8, 2])
def test_matrices_of_different_ranks_are_served_packed_stored_and_changed(group_size: int, tmp_path: Path) -> None:
    base, models = uneven()
    sup = randes.compress(base, models, randes.Config(rank="auto", group_size=group_size))
    x, mix = torch.randn(6, 32), ["m0", "__base__", "m3", "m1", "m2", "m0"]
    for held in (sup, sup.pack(8), sup.pack(4), sup.pack(2)):
        held.save(tmp_path / f"store-{held.packing.bits if held.packing else 16}")
        again = randes.Superposition.load(tmp_path / f"store-{held.packing.bits if held.packing else 16}")
        y = randes.SuperposedModel(copy.deepcopy(base), again)(x, adapter_names=mix)
        for row, name in enumerate(mix):
            torch.testing.assert_close(y[row], retrieved(base, held, name)(x)[row], **CLOSE)
        found = verify(again, "m1", models["m1"])
        assert found.relative_error == pytest.approx(found.predicted_error, rel=0.1)
    before = stored(sup, tmp_path / "before")
    later = uneven(6)[1]["m5"]
    sup.add("later", later)
    assert sup.members["later"].coordinates.keys() == {"few.weight", "many.weight"}
    for tensor, u in sup.bases.items():  # its own delta in the directions that were there before it
        delta = (later.state_dict()[tensor] - base.state_dict()[tensor]).double()
        found = (sup.retrieve("later")[tensor] - base.state_dict()[tensor]).double()
        off = (found - delta) @ (u.double() * UNIT)
        assert off.norm() < 1e-3 * (delta @ (u.double() * UNIT)).norm()
    sup.remove("later", later)
    assert stored(sup, tmp_path / "after") == before


def test_auto_may_find_nothing_at_all(tmp_path: Path) -> None:
    base = linear(160, 256)
    models = {f"m{number}": finetune(base, number) for number in range(4)}
    sup = randes.compress(base, models)
    assert not sup.bases
    assert summary.ranks(sup) == "rank 0 to 0, 0.0 in the mean (auto)"
    sup.save(tmp_path / "store")
    again = randes.Superposition.load(tmp_path / "store")
    plain = randes.compress(base, models, randes.Config(rank=0))
    assert all(torch.equal(value, again.retrieve("m1")[name]) for name, value in plain.retrieve("m1").items())


def test_a_basis_is_the_default_where_all_models_are_at_hand_and_nowhere_else(tmp_path: Path) -> None:
    base, models = uneven()
    assert randes.compress(base, models).config == randes.Config(rank="auto")
    assert randes.compress(base, models, randes.Config(group_size=2)).config.rank == "auto"
    assert randes.compress(base, models, randes.Config(rank=0)).config.rank == 0
    for config in (randes.Config(matrix="dense"), randes.Config(origin="zero")):
        assert randes.compress(base, models, config).config.rank == 0
    assert randes.Superposition.create(base, randes.Config()).config.rank == 0
    assert (
        "rank" not in json.loads(stored(randes.Superposition.create(base), tmp_path / "s")["manifest.json"])["config"]
    )


def test_interference_in_the_loudest_directions_is_gone() -> None:
    base = net()
    models = loud(base)
    plain, ranked = (randes.compress(base, models, config) for config in (randes.Config(rank=0), RANK))
    for name, model in models.items():
        far, near = verify(plain, name, model), verify(ranked, name, model)
        assert near.relative_error < far.relative_error / 3
        assert near.relative_error == pytest.approx(near.predicted_error, rel=0.25)
        assert near.kept_exact


def test_a_delta_that_lies_in_the_basis_comes_back(tmp_path: Path) -> None:
    base = linear(64, 48)
    models = loud(base, 2)
    with torch.no_grad():
        for tuned in models.values():
            tuned.bias.copy_(base.bias)
            delta = tuned.weight - base.weight
            u, s, v = torch.linalg.svd(delta)
            tuned.weight.copy_(base.weight + u[:, :4] * s[:4] @ v[:4])
    sup = randes.compress(base, models, replace(RANK, rank=8))
    for name, tuned in models.items():
        assert verify(sup, name, tuned).relative_error < 2e-3


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_models_come_and_go_to_the_byte(config: randes.Config, tmp_path: Path) -> None:
    base = net()
    models = loud(base, 3)
    sup = randes.compress(base, models, config)
    before = stored(sup, tmp_path / "before")
    later = finetune(base, 9)
    sup.add("later", later)
    sup.remove("later", later)
    assert stored(sup, tmp_path / "after") == before
    again = randes.compress(base, dict(reversed(models.items())), config)
    if config.group_size > 2:
        assert stored(again, tmp_path / "again") == before


def test_a_store_comes_back_and_says_what_the_bases_weigh(tmp_path: Path) -> None:
    base = net()
    models = loud(base)
    sup = randes.compress(base, models, RANK)
    sup.save(tmp_path / "store")
    again = randes.Superposition.load(tmp_path / "store")
    for name in models:
        assert all(torch.equal(value, again.retrieve(name)[where]) for where, value in sup.retrieve(name).items())
    matrices = [base.state_dict()[name].shape for name in sup.superposed]
    assert sup.sizes.basis == sum(2 * 6 * (k + 4 * n) for n, k in matrices)
    on_disk = sum(file.stat().st_size for file in (tmp_path / "store").glob("*.safetensors"))
    assert sup.nbytes <= on_disk <= sup.nbytes + 20_000
    again.remove("m1", models["m1"])
    again.save(tmp_path / "store")


def test_gradients_reach_the_input() -> None:
    base = linear(64, 48)
    sup = randes.compress(base, loud(base, 3), RANK)
    layer = randes.SuperposedLinear.from_linear(copy.deepcopy(base), sup, "")
    x = torch.randn(4, 48, requires_grad=True)
    mix = ["m0", "__base__", "m2", "m1"]
    (found,) = torch.autograd.grad(layer(x, adapter_names=mix).square().sum(), x)
    rows = [retrieved(base, sup, name)(x[row]) for row, name in enumerate(mix)]
    (expected,) = torch.autograd.grad(torch.stack(rows).square().sum(), x)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_it_survives_another_dtype() -> None:
    base = net()
    sup = randes.compress(base, loud(base), RANK)
    model = randes.SuperposedModel(copy.deepcopy(base), sup)
    x, mix = tokens(3), ["m0", "m1", "__base__"]
    exact = model(x, adapter_names=mix)
    half = model.to(torch.bfloat16)(x, adapter_names=mix)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), exact, rtol=0.1, atol=0.1)


def test_a_model_in_half_precision_finds_its_corrections_in_its_own_group() -> None:
    base = net()
    models = loud(base)
    late = models.pop("m3")
    sup = randes.compress(base, models, replace(RANK, group_size=2))
    half = randes.SuperposedModel(copy.deepcopy(base).bfloat16(), sup, capacity=6)
    half.add_adapter("m3", late)  # its group's superposition is written to the last slot alone
    exact = randes.SuperposedModel(copy.deepcopy(base), sup)
    x, mix = tokens(5), ["m3", "m0", "__base__", "m2", "m1"]
    torch.testing.assert_close(half(x, adapter_names=mix).float(), exact(x, adapter_names=mix), rtol=0.1, atol=0.1)
    numbers = {name: version.number for name, version in half.router.versions.items()}
    for one, other in zip(exact.base_model.modules(), half.base_model.modules(), strict=True):
        if isinstance(one, Superposed) and one.corrections is not None and isinstance(other, Superposed):
            found = other.corrections[[numbers[name] for name in sup.served]]
            torch.testing.assert_close(found.float(), one.corrections, rtol=0.02, atol=0.005)


def test_one_program_serves_all_mixes() -> None:
    base = net()
    sup = randes.compress(base, loud(base), RANK)
    model = randes.SuperposedModel(copy.deepcopy(base), sup)
    compiled, programs = counted(model, dynamic=True)
    for mix in (["m0", "m1", "__base__"], ["m2"] * 5, ["__base__"] * 2, ["m3", "m0", "m3", "m3"]):
        x = tokens(len(mix))
        torch.testing.assert_close(compiled(x, adapter_names=model.batch(mix)), model(x, adapter_names=mix), **CLOSE)
    assert len(programs) == 1
    torch._dynamo.reset()


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="rank needs all models at once"):
        randes.Superposition.create(net(), RANK)
    with pytest.raises(ValueError, match="rank must be an integer of at least 0, or 'auto', got 'best'"):
        randes.Config(rank="best")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="rank must be an integer of at least 0, or 'auto', got -1"):
        randes.Config(rank=-1)


@pytest.mark.parametrize(("options", "rank", "shown"), [
    (["--rank=4"], 4, "shared bases of rank 4"),
    ([], "auto", "shared bases of rank 0 to 9, 4.3 in the mean (auto)"),
])  # fmt: skip
def test_the_command_line_keeps_a_basis(
    tmp_path: Path, options: list[str], rank: randes.config.Rank, shown: str
) -> None:
    base, tuned = uneven(2)
    for name, model in {"base": base, **tuned}.items():
        write_file(tmp_path / f"{name}.safetensors", model.state_dict())
    models = [f"--model={name}={tmp_path / name}.safetensors" for name in ("m0", "m1")]
    command = ["compress", f"--base={tmp_path}/base.safetensors", *models, f"--out={tmp_path}/store"]
    made = CliRunner().invoke(app, [*command, *options])
    assert made.exit_code == 0, made.output
    assert "in shared bases" in " ".join(made.output.split())
    assert randes.Superposition.load(tmp_path / "store").config.rank == rank
    info = " ".join(CliRunner().invoke(app, ["info", f"{tmp_path}/store"]).output.split())
    assert shown in info
    assert "many.weight 40×160 float32, rank " in info
    wrong = CliRunner().invoke(app, [*command[:-1], f"--out={tmp_path}/other", "--rank=best"])
    assert wrong.exit_code == 2
    assert "rank must be an integer of at least 0, or 'auto', got 'best'" in " ".join(wrong.output.split())


def test_a_delta_that_is_not_finite_has_no_basis() -> None:
    base = nn.ModuleList(nn.Linear(32, 32) for _ in range(4))
    tuned = finetune(base, 0).state_dict()
    tuned["2.weight"][3, 4] = torch.inf
    with pytest.raises(randes.CheckpointError, match=r"2\.weight must be finite, got NaN or infinity"):
        randes.compress(base, {"m0": tuned}, randes.Config(rank=4))
