"""The specification against values worked out by hand and against the algebra in dense matrices."""

from typing import Any

import pytest
import torch
from cases import SHAPES, TENSOR, TRANSFORMS, linear_case
from torch import Tensor

from randes_kernels import reference
from randes_kernels.format import Stream, Transform, column_permutation, model_key, signs

KEY, OTHER = model_key(0, "one"), model_key(0, "two")


def dense(key: int, n: int, k: int, transform: Transform) -> tuple[Tensor, Tensor, Tensor]:
    """diag(r) (N, N), diag(c) (K, K) and P (K, K), in fp64; P moves column k of its left operand to π(k)."""
    r = signs(key, TENSOR, Stream.ROW_SIGNS, n).double() if transform.row_signs else torch.ones(n).double()
    c = signs(key, TENSOR, Stream.COLUMN_SIGNS, k).double() if transform.column_signs else torch.ones(k).double()
    p = torch.zeros(k, k, dtype=torch.float64)
    for source, target in enumerate(column_permutation(key, TENSOR, k, transform).tolist()):
        p[source, target] = 1
    return r.diag(), c.diag(), p


def integers(*shape: int) -> Tensor:
    return torch.randint(-9, 10, shape, generator=torch.Generator().manual_seed(0)).double()


def by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """A transform small enough to do on paper: r = (+, −), c = (+, −, −), columns 0 → 1 → 2 → 0."""
    parts = torch.tensor([1, -1]).char(), torch.tensor([1, -1, -1]).char(), torch.tensor([1, 2, 0])
    monkeypatch.setattr(reference, "transform_parts", lambda *_: parts)


def test_superposing_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    by_hand(monkeypatch)
    base = torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
    finetuned = base + torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.25, 6.0]])
    accumulator = torch.full((2, 3), 100, dtype=torch.int32)
    reference.superpose_(accumulator, finetuned, base, 2.0, 0, 0, Transform(), False)
    # δ · 2 = (2 4 6), (8 10.5 12); the half goes to the even 10; signs: (2 −4 −6), (−8 10 12); then moved.
    assert accumulator.tolist() == [[94, 102, 96], [112, 92, 110]]
    reference.superpose_(accumulator, finetuned, base, 2.0, 0, 0, Transform(), True)
    assert accumulator.tolist() == [[100] * 3] * 2


def test_retrieving_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    by_hand(monkeypatch)
    delta = torch.tensor([[-6.0, 2.0, -4.0], [12.0, -8.0, 10.0]])
    retrieved = reference.retrieve(torch.ones(2, 3), delta, 0.5, 0, 0, Transform())
    assert retrieved.tolist() == [[2.0, 3.0, 4.0], [5.0, 6.0, 7.0]]


def test_a_linear_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    by_hand(monkeypatch)
    x = torch.tensor([[1.0, 10.0, 100.0], [1.0, 10.0, 100.0], [1.0, 0.0, 0.0]])
    y = reference.superposed_linear(
        x=x,
        weight=torch.ones(2, 3),
        bias=torch.tensor([1000.0, 2000.0]),
        biases=torch.tensor([[3000.0, 4000.0], [5000.0, 6000.0]]),
        delta=torch.tensor([[[-6.0, 2.0, -4.0], [12.0, -8.0, 10.0]]]),
        ids=torch.tensor([0, -1, 1]),
        keys=torch.tensor([0, 0]),
        scale=torch.tensor([0.5, 0.5]),
        slots=torch.tensor([0, -1]),
        tensor=0,
        transform=Transform(),
    )
    # Ŵ_0 = (2 3 4), (5 6 7); the second row is the base's; the third's model left this weight alone.
    assert y.tolist() == [[3432.0, 4765.0], [1111.0, 2111.0], [5001.0, 6001.0]]


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_superposing_is_the_sum_of_dense_products(shape: Any, transform: Transform) -> None:
    _, n, k = shape
    base, total = integers(n, k), torch.zeros(n, k, dtype=torch.float64)
    accumulator = torch.zeros(n, k, dtype=torch.int32)
    for key, delta in ((KEY, integers(n, k)), (OTHER, integers(n, k).flip(0))):
        r, c, p = dense(key, n, k, transform)
        total += r @ (4 * delta) @ c @ p
        reference.superpose_(accumulator, (base + delta).float(), base.float(), 4.0, key, TENSOR, transform, False)
    assert torch.equal(accumulator.double(), total)


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_retrieving_and_running_are_dense_products(shape: Any, transform: Transform) -> None:
    m, n, k = shape
    case = linear_case(m, n, k, transform, models=3, integers=True, dtype=torch.float64)
    expected = torch.empty(m, n, dtype=torch.float64)
    for row, model in enumerate(case.ids.tolist()):
        assert case.bias is not None
        assert case.biases is not None
        own = case.x[row] @ case.weight.T + (case.bias if model < 0 else case.biases[model])
        if model >= 0 and case.slots[model] >= 0:
            delta, gain, key = case.delta[case.slots[model]], float(case.scale[model]), int(case.keys[model])
            r, c, p = dense(key, n, k, transform)
            whole = case.weight + gain * r @ delta @ p.T @ c
            assert torch.equal(reference.retrieve(case.weight, delta, gain, key, TENSOR, transform), whole)
            own = own + gain * (r @ ((case.x[row] @ c @ p) @ delta.T))
        expected[row] = own
    assert torch.equal(reference.superposed_linear(*case), expected)


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_the_transform_is_orthogonal(transform: Transform) -> None:
    r, c, p = dense(KEY, 33, 70, transform)
    for matrix in (r, c, p):
        assert torch.equal(matrix @ matrix.T, torch.eye(len(matrix), dtype=torch.float64))


def test_models_added_in_any_order_give_the_same_integers() -> None:
    base, *tunes = torch.randn(4, 33, 70, generator=torch.Generator().manual_seed(0))
    totals = []
    for order in ((0, 1, 2), (2, 0, 1), (1, 2, 0)):
        total = torch.zeros(33, 70, dtype=torch.int32)
        for model in order:
            reference.superpose_(total, tunes[model], base, 777.0, KEY + model, TENSOR, Transform(granule=1), False)
        totals.append(total)
    assert torch.equal(totals[0], totals[1])
    assert torch.equal(totals[0], totals[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_results_are_summed_in_fp32_and_rounded_once(dtype: torch.dtype) -> None:
    case = linear_case(8, 33, 70, dtype=dtype)
    exact = reference.superposed_linear(*case.to(torch.float64))
    worst = torch.finfo(dtype).eps / 2 * exact.abs() + 1e-5
    assert ((reference.superposed_linear(*case).double() - exact).abs() <= worst).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_a_retrieved_weight_is_rounded_once_to_the_dtype_of_the_base(dtype: torch.dtype) -> None:
    base = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    delta = torch.randint(-9, 9, (5, 7), dtype=torch.int16)
    retrieved = reference.retrieve(base, delta, 0.125, KEY, TENSOR, Transform())
    exact = reference.retrieve(base.double(), delta, 0.125, KEY, TENSOR, Transform())
    assert retrieved.dtype == dtype
    assert torch.equal(retrieved, exact.to(dtype))
