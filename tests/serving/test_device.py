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


MIXES = [MIX, ["m0"] * len(MIX), ["__base__"] * len(MIX), ["m2", "m1", "__base__", "m1", "m0"]]


def replayed(model: randes.SuperposedModel, batch: Any, x: torch.Tensor) -> Any:
    """A call that can be made again on other rows and models in the same places: a graph, where there are any."""
    if not ON_GPU:
        return lambda: model(x, adapter_names=batch)
    model.warm_up(rows=(1, len(MIX), x.numel()))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            model(x, adapter_names=batch)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = model(x, adapter_names=batch)

    def replay() -> torch.Tensor:
        graph.replay()
        return y

    return replay


def test_a_captured_step_answers_other_rows_of_other_models() -> None:
    base, sup, model = served()
    with torch.no_grad():
        x, batch = tokens().to(DEVICE), model.batch(MIX, refillable=True)
        step = replayed(model, batch, x)
        for shift, mix in enumerate(MIXES):
            rows = (tokens() + shift) % 11
            x.copy_(rows)
            batch.fill(mix)
            right = torch.cat([alone(base, sup, name)(row[None]) for name, row in zip(mix, rows, strict=True)])
            torch.testing.assert_close(step().cpu(), right, **CLOSE)


def test_a_captured_step_keeps_its_models_while_others_come_and_go() -> None:
    _, _, model = served(capacity=4)
    with torch.no_grad():
        x, batch = tokens().to(DEVICE), model.batch(MIX, refillable=True)
        step = replayed(model, batch, x)
        before = step().clone()
        tuned = finetune(net(), 9)
        model.add_adapter("m9", tuned.state_dict())  # its group's models change, and the step's are those of before
        assert torch.equal(step(), before)
        with pytest.raises(randes.CapacityError):
            model.delete_adapter("m9", tuned.state_dict())  # what the step keeps has no room to be replaced again
        batch.fill(["m9"] * len(MIX))
        after = step().clone()
        model.delete_adapter("m9", tuned.state_dict())
        assert torch.equal(step(), after)
