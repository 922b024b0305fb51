"""What each model has of its own in a shared basis, inside the operator: kernels, CPU, gradients, errors."""

from typing import Any
from unittest import mock

import pytest
import torch
from cases import TRANSFORMS, basis_of, basis_product, linear_case, run_with_basis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from randes_kernels import Transform, gpu, lowrank, pack
from randes_kernels.packing import operands
from randes_kernels.tiles import Plan, Tile

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


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
            (made.steps.to(DEVICE), operands(made)[1]),
        )
    tile = Tile(16, 32, 128 if packing[1] else 32, warps=4, stages=2)
    plan = Plan(side, tile, grouped=draw(st.booleans()))
    if side.startswith("act"):
        plan = Plan(side, tile, parts=draw(st.sampled_from([1, 2])), turn_first=draw(st.booleans()))
    with mock.patch.object(gpu, "linear_plan", return_value=plan):
        moved = [value.to(DEVICE) if isinstance(value, Tensor) else value for value in words]
        y = gpu.superposed_linear(*moved, False, *packing, *(value.to(DEVICE) for value in held)).cpu()
    exact = basis_product(case, held)
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
        assert torch.equal(run_with_basis(case, held), basis_product(case, held).to(dtype))


def test_gradients_are_those_of_the_retrieved_weights() -> None:
    case = linear_case(6, 20, 30, Transform(granule=1), integers=True, runs=3, dtype=torch.float64)
    held = basis_of(case, 4)
    x = case.x.clone().requires_grad_()
    run_with_basis(case._replace(x=x), held).square().sum().backward()
    y = basis_product(case, held)
    rows = []
    for row in range(len(case.x)):

        def answer(own: Tensor, row: int = row) -> Tensor:
            x = case.x.index_copy(0, torch.tensor([row]), own[None])
            return basis_product(case._replace(x=x), held)[row]

        rows.append(2 * y[row] @ torch.autograd.functional.jacobian(answer, case.x[row]))
    torch.testing.assert_close(x.grad, torch.stack(rows))


def test_the_operator_takes_a_basis_in_a_compiled_program() -> None:
    compiled = torch.compile(run_with_basis, fullgraph=True, backend="eager")
    case = linear_case(6, 20, 30, integers=True, runs=3)
    held = basis_of(case, 4)
    assert torch.equal(compiled(case, held), basis_product(case, held).float())
    torch._dynamo.reset()


def test_a_basis_that_does_not_fit_is_refused() -> None:
    case = linear_case(6, 20, 30)
    held = basis_of(case, 4)
    with pytest.raises(
        ValueError, match=r"basis\.directions must be \(30, 4\) torch.float32 on cpu, in one piece, got"
    ):
        run_with_basis(case, held._replace(directions=held.directions.half()))
    with pytest.raises(ValueError, match=r"basis\.corrections must be \(4, 4, 20\) .* got \(4, 4, 19\)"):
        run_with_basis(case, held._replace(corrections=held.corrections[..., :19].contiguous()))
