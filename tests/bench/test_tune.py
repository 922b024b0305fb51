"""α fitted on a loss: it helps where noise drowns a delta, is checked, is stored, and is served."""

import copy
from pathlib import Path

import pytest
import torch
from models import content, finetune, net, stored
from torch import Tensor, nn

import randes
from randes.errors import UnknownModelError


def made(config: randes.Config | None = None) -> tuple[nn.Module, dict[str, nn.Module], randes.Superposition]:
    base = net()
    models = {f"m{number}": finetune(base, number) for number in range(6)}
    return base, models, randes.compress(base, models, config or randes.Config())


def tokens(seed: int) -> Tensor:
    return torch.randint(0, 11, (16, 6), generator=torch.Generator().manual_seed(seed))


def batches(model: nn.Module, count: int = 8) -> list[tuple[Tensor, Tensor]]:
    """Inputs and what the fine-tune itself answers."""
    return [(tokens(seed), model(tokens(seed)).detach()) for seed in range(count)]


def distance(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    return (module(x) - y).square().mean()


@pytest.mark.parametrize("config", [randes.Config(), randes.Config(rank=4, centre=True)], ids=["plain", "rank"])
def test_a_fit_that_helps_is_kept_and_served(config: randes.Config, tmp_path: Path) -> None:
    base, models, sup = made(config)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    steps = 0

    def step() -> None:
        nonlocal steps
        steps += 1

    found = sup.tune(base, {name: batches(models[name]) for name in ("m0", "m1")}, distance, step=step)
    assert steps == 2 * 40
    assert all(torch.equal(base.state_dict()[name], value) for name, value in before.items())
    for name in ("m0", "m1"):
        assert found[name].kept
        assert found[name].after < 0.95 * found[name].before
        assert sup.members[name].alphas.keys() == sup.members[name].gains.keys()
        own = copy.deepcopy(base)
        own.load_state_dict(sup.retrieve(name))
        mean = sum(distance(own, batch).item() for batch in batches(models[name])[-2:]) / 2
        assert mean == pytest.approx(found[name].after, rel=1e-3)
        mixed = randes.SuperposedModel(copy.deepcopy(base), sup)
        torch.testing.assert_close(mixed(tokens(3), adapter_names=[name] * 16), own(tokens(3)), rtol=1e-4, atol=1e-4)
    assert not sup.members["m2"].alphas
    sup.save(tmp_path / "store")
    again = randes.Superposition.load(tmp_path / "store")
    assert again.members["m0"].alphas == sup.members["m0"].alphas
    assert stored(again, tmp_path / "again") == content(tmp_path / "store")
    assert again.pack(4).members["m0"].alphas == sup.members["m0"].alphas
    sup.remove("m0", models["m0"])


def test_a_fit_that_does_not_help_is_dropped() -> None:
    base, models, sup = made()
    # It is fitted on large answers that no model gives, and checked on the fine-tune's.
    own = [(x, 50 * torch.ones_like(y)) for x, y in batches(models["m0"])[:6]] + batches(models["m0"])[6:]
    found = sup.tune(base, {"m0": own}, distance, rate=0.5)
    assert not found["m0"].kept
    assert not sup.members["m0"].alphas


def test_what_cannot_be_tuned_is_refused() -> None:
    base, models, sup = made()
    own = batches(models["m0"])
    with pytest.raises(UnknownModelError, match=r"batches must be of models that are there, m0, m1.*; got 'm9'"):
        sup.tune(base, {"m0": own, "m9": own}, distance)
    with pytest.raises(ValueError, match="batches must hold at least 2 a model, one to check with; got 1 of m0"):
        sup.tune(base, {"m0": own[:1]}, distance)
    with pytest.raises(ValueError, match="held_out must lie between 0 and 1, got 1"):
        sup.tune(base, {"m0": own}, distance, held_out=1)
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        sup.tune(base, {"m0": own}, distance, steps=0)
    with pytest.raises(ValueError, match="rate must be a finite number above 0, got nan"):
        sup.tune(base, {"m0": own}, distance, rate=float("nan"))
    assert not sup.members["m0"].alphas
