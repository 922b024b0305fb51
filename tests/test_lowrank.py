"""What each model has of its own in a shared basis, inside the operator: kernels, CPU, gradients, errors."""

from typing import Any
from unittest import mock

import pytest
import torch
from cases import TRANSFORMS, LinearCase, linear_case, retrieved_product
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from randes_kernels import Basis, Transform, gpu, lowrank, pack, superposed_linear, unpack
from randes_kernels.tiles import Plan, Tile

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def basis_of(case: LinearCase, rank: int, seed: int = 0) -> Basis:
    """Small whole numbers, so that every sum is exact."""
    generator = torch.Generator().manual_seed(seed)
    n, k = case.weight.shape
    shapes = (k, rank), (len(case.keys), rank, n)
    return Basis(*(torch.randint(-1, 2, shape, generator=generator).to(case.x.dtype) for shape in shapes))


def expected(case: LinearCase, basis: Basis) -> Tensor:
    """In fp64: the layer without a basis, and each row's projection times its own model's part."""
    y = retrieved_product(case if isinstance(case.delta, Tensor) else case._replace(delta=unpack(case.delta)))
    models = case.ids.repeat_interleave(len(case.x) // len(case.ids)).tolist()
    for row, model in enumerate(models):
        if model >= 0:
            y[row] += case.x[row].double() @ basis.directions.double() @ basis.corrections[model].double()
    return y


def run(case: LinearCase, basis: Basis) -> Tensor:
    x, weight, bias, biases, delta, *rest = case
    return superposed_linear(x, weight, bias, delta, *rest, biases=biases, basis=basis)


@settings(
    derandomize=True, deadline=None, max_examples=15, phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.too_slow],
)  # fmt: skip
@given(st.data())
def test_kernels_equal_the_specification(data: st.DataObject) -> None:
    draw = data.draw
    side = draw(st.sampled_from(["activation side", "activation side", "weight side"]))
    transform = draw(st.sampled_from([t for t in TRANSFORMS.values() if side.startswith("act") or not t.granule]))
    runs = draw(st.integers(1, 12))
    case = linear_case(
        runs * draw(st.integers(1, 2)), draw(st.integers(1, 70)), draw(st.integers(1, 150)), transform, runs=runs,
        models=draw(st.sampled_from([1, 5, 20])), dtype=draw(st.sampled_from([torch.float32, torch.float16])),
        integers=True, seed=draw(st.integers(0, 2**32)),
    )  # fmt: skip
    held = basis_of(case, draw(st.sampled_from([1, 7, 16, 20])))
    packing: tuple[Any, ...] = (None, [])
    words = case
    if draw(st.booleans()):
        made = pack(case.delta, 4)
        made = made._replace(steps=torch.ones_like(made.steps))
        case, words, packing = (
            case._replace(delta=made),
            case._replace(delta=made.words),
            (made.steps.to(DEVICE), [4, 64]),
        )
    tile = Tile(16, 32, 128 if packing[1] else 32, warps=4, stages=2)
    plan = Plan(side, tile, grouped=draw(st.booleans()))
    if side.startswith("act"):
        plan = Plan(side, tile, parts=draw(st.sampled_from([1, 2])), turn_first=draw(st.booleans()))
    with mock.patch.object(gpu, "linear_plan", return_value=plan):
        moved = [value.to(DEVICE) if isinstance(value, Tensor) else value for value in words]
        y = gpu.superposed_linear(*moved, False, *packing, *(value.to(DEVICE) for value in held)).cpu()
    exact = expected(case, held)
    if case.x.dtype == torch.float32 or side.startswith("act"):
        assert torch.equal(y, exact.to(y.dtype))
    else:  # what prefills add, they round first
        torch.testing.assert_close(y.double(), exact, rtol=2e-3, atol=0.1)


@pytest.mark.parametrize("few", [16, 0], ids=["one product", "gathered"])
@pytest.mark.parametrize("rows", [3, 60])
def test_a_cpu_equals_the_specification(rows: int, few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowrank, "FEW_MODELS", few)
    for dtype in (torch.float32, torch.float64):
        case = linear_case(rows, 20, 30, integers=True, dtype=dtype, runs=3)
        held = basis_of(case, 5)
        assert torch.equal(run(case, held), expected(case, held).to(dtype))


def test_gradients_are_those_of_the_retrieved_weights() -> None:
    case = linear_case(6, 20, 30, Transform(granule=1), integers=True, runs=3, dtype=torch.float64)
    held = basis_of(case, 4)
    x = case.x.clone().requires_grad_()
    run(case._replace(x=x), held).square().sum().backward()
    y = expected(case, held)
    rows = []
    for row, model in enumerate(case.ids.repeat_interleave(2).tolist()):
        own = torch.autograd.functional.jacobian(
            lambda v, row=row: expected(case._replace(x=case.x.index_copy(0, torch.tensor([row]), v[None])), held)[row],
            case.x[row],
        )
        rows.append(2 * y[row] @ own)
        assert model >= -1
    torch.testing.assert_close(x.grad, torch.stack(rows))


def test_the_operator_takes_a_basis_in_a_compiled_program() -> None:
    compiled = torch.compile(run, fullgraph=True, backend="eager")
    case = linear_case(6, 20, 30, integers=True, runs=3)
    held = basis_of(case, 4)
    assert torch.equal(compiled(case, held), expected(case, held).float())
    torch._dynamo.reset()


def test_a_basis_that_does_not_fit_is_refused() -> None:
    case = linear_case(6, 20, 30)
    held = basis_of(case, 4)
    with pytest.raises(
        ValueError, match=r"basis\.directions must be \(30, 4\) torch.float32 on cpu, in one piece, got"
    ):
        run(case, held._replace(directions=held.directions.half()))
    with pytest.raises(ValueError, match=r"basis\.corrections must be \(4, 4, 20\) .* got \(4, 4, 19\)"):
        run(case, held._replace(corrections=held.corrections[..., :19].contiguous()))
