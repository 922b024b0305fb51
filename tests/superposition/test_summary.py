"""What is reported of a superposition: sizes, coverage, and a model's weight error."""

import copy
import json
import math

import pytest
import torch
from models import finetune, net

import randes
from randes.superposition.summary import summary, verify


@pytest.fixture
def base() -> torch.nn.Module:
    return net()


def test_weight_error_is_what_the_number_of_models_predicts(base: torch.nn.Module) -> None:
    sup = randes.Superposition.create(base)
    tuned = {f"m{seed}": finetune(base, seed) for seed in range(5)}
    for name, model in tuned.items():
        sup.add(name, model)
    for name, model in tuned.items():
        found = verify(sup, name, model)
        assert found.models_in_group == 5
        assert found.predicted_error == 2.0
        assert found.relative_error == pytest.approx(2.0, rel=0.1)
        assert found.kept_exact
        assert found.tensors.keys() == set(sup.superposed)


def test_one_model_alone_comes_back_but_for_the_rounding(base: torch.nn.Module) -> None:
    sup = randes.Superposition.create(base)
    sup.add("alone", finetune(base, 0))
    found = verify(sup, "alone", finetune(base, 0))
    assert found.predicted_error == 0
    assert found.relative_error == pytest.approx(2.0**-9 / math.sqrt(12), rel=0.05)


def test_verifying_another_checkpoint_is_refused(base: torch.nn.Module) -> None:
    sup = randes.Superposition.create(base)
    sup.add("a", finetune(base, 0))
    with pytest.raises(randes.CheckpointError, match="not the checkpoint that was added as 'a'"):
        verify(sup, "a", finetune(base, 1))
    with pytest.raises(randes.UnknownModelError, match="no model is called 'b'; there are: a"):
        verify(sup, "b", finetune(base, 1))


@pytest.mark.parametrize("others", ["keep", "base", "average"])
def test_the_summary_covers_every_tensor_once_and_counts_every_byte(base: torch.nn.Module, others: str) -> None:
    sup = randes.Superposition.create(base, randes.Config(others=others))  # type: ignore[arg-type]
    sup.add("a", finetune(base, 0))
    sup.add("b", copy.deepcopy(base))  # changes nothing
    found = json.loads(json.dumps(summary(sup)))
    covered = [tensor for tensors in found["coverage"].values() for tensor in tensors]
    assert sorted(covered) == sorted(sup.base)
    assert found["bytes"]["total"] == sup.nbytes
    assert found["bytes"]["separate_models"] == 2 * found["bytes"]["base"]
    assert found["models"]["b"]["superposed_tensors"] == 0
    assert (found["bytes"]["kept"] > 0) == (others != "base")
