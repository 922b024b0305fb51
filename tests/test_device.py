"""A whole model on the device that is there: on a GPU with ``pytest -m gpu``, else on the CPU, with the other tests."""

from typing import Any

import pytest
import torch
from models import alone, finetune, net, superposed

import randes

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
pytestmark = [pytest.mark.gpu] if ON_GPU else []
MIX = ["m1", "__base__", "m0", "m2", "m1"]
CLOSE: dict[str, float] = {"rtol": 1e-4, "atol": 1e-4}


def tokens() -> torch.Tensor:
    return torch.randint(11, (len(MIX), 4), generator=torch.Generator().manual_seed(0))


def served(**options: Any) -> tuple[torch.nn.Module, randes.Superposition, randes.SuperposedModel]:
    base = net()
    sup, _ = superposed(base, 3)
    return base, sup, randes.SuperposedModel(net(), sup, **options).to(DEVICE)


def expected(base: torch.nn.Module, sup: randes.Superposition, mix: list[str]) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([alone(base, sup, name)(x[None]) for name, x in zip(mix, tokens(), strict=True)])


def test_a_mixed_batch_is_answered_as_each_model_alone() -> None:
    base, sup, model = served()
    with torch.no_grad():
        y = model(tokens().to(DEVICE), adapter_names=MIX)
    torch.testing.assert_close(y.cpu(), expected(base, sup, MIX), **CLOSE)


def test_a_model_joins_and_leaves() -> None:
    base, sup, model = served(capacity=4)
    tuned = finetune(base, 9)
    with torch.no_grad():
        model.add_adapter("m9", tuned.state_dict())
        y = model(tokens().to(DEVICE), adapter_names=["m9"] * len(MIX))
        torch.testing.assert_close(y.cpu(), expected(base, sup, ["m9"] * len(MIX)), **CLOSE)
        model.delete_adapter("m9", tuned.state_dict())
        y = model(tokens().to(DEVICE), adapter_names=MIX)
    torch.testing.assert_close(y.cpu(), expected(base, sup, MIX), **CLOSE)


def test_a_packed_model_stays_near() -> None:
    base, sup, _ = served()
    model = randes.SuperposedModel(net(), sup.pack(8)).to(DEVICE)
    with torch.no_grad():
        y = model(tokens().to(DEVICE), adapter_names=MIX).cpu()
    right = expected(base, sup, MIX)
    assert (y - right).norm() < 0.05 * right.norm()


def test_the_base_learns_through_its_fine_tunes() -> None:
    _, _, model = served()
    model.requires_grad_(True)
    model(tokens().to(DEVICE), adapter_names=MIX).square().sum().backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert gradients
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_a_compiled_model_answers_as_the_model() -> None:
    _, _, model = served()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="inductor" if ON_GPU else "eager")
    with torch.no_grad():
        x, batch = tokens().to(DEVICE), model.batch(MIX)
        torch.testing.assert_close(compiled(x, adapter_names=batch), model(x, adapter_names=batch), **CLOSE)
    torch._dynamo.reset()
