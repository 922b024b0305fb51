"""The CPU path against the specification and against fp64, in every dtype that it serves.

Every test runs twice: with the crossovers as they were measured, and with every model's rows on the weight side.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import (
    SHAPES,
    TRANSFORMS,
    LinearCase,
    linear_case,
    retrieved_product,
    root_mean_square,
    two_eager_matmuls,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from randes_kernels import cpu, cpu_delta, reference
from randes_kernels.format import Stream, Transform

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
ALL_TRANSFORMS = [
    *TRANSFORMS.values(),
    *(Transform(rows, True, granule, segments) for rows in (0, 1) for granule in (0, 1, 4) for segments in (2, 3)),
]


@pytest.fixture(autouse=True, scope="module", params=["measured crossovers", "weight side from one row on"])
def _sides(request: pytest.FixtureRequest) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if request.param.startswith("weight side"):
            patch.setattr(cpu, "weight_side_rows", lambda dtype, transform: 1)
            patch.setattr(cpu_delta, "SLICE_BYTES", 1)
        yield


def assert_exact(case: LinearCase, transposed: bool) -> None:
    expected = retrieved_product(case, transposed).to(case.x.dtype)
    assert torch.equal(cpu.superposed_linear(*case, transposed), expected)
    if not transposed:
        assert torch.equal(reference.superposed_linear(*case), expected)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(32, 48, 64), (33, 45, 30), (3, 5, 7)])
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_whole_numbers_equal_the_specification(
    transform: Transform, shape: Any, dtype: torch.dtype, transposed: bool
) -> None:
    case = linear_case(*shape, transform, bias=not transposed, dtype=dtype, integers=True, transposed=transposed)
    assert_exact(case, transposed)


@settings(derandomize=True, deadline=None, max_examples=150)
@given(st.data())
def test_any_layer_equals_the_specification(data: st.DataObject) -> None:
    transform = data.draw(st.sampled_from(ALL_TRANSFORMS))
    transposed, runs = data.draw(st.booleans()), data.draw(st.integers(1, 9))
    bias = not transposed and data.draw(st.booleans())
    case = linear_case(
        runs * data.draw(st.integers(1, 5)),
        data.draw(st.integers(1, 40)),
        transform.segments * data.draw(st.integers(1, 20)),
        transform,
        models=data.draw(st.integers(1, 16)),
        slots=data.draw(st.integers(1, 3)),
        runs=runs,
        bias=bias,
        own_biases=bias and data.draw(st.booleans()),
        dtype=data.draw(st.sampled_from(DTYPES)),
        integers=True,
        transposed=transposed,
        seed=data.draw(st.integers(0, 2**32)),
    )
    if data.draw(st.booleans()):
        case = case._replace(x=case.x.mT.contiguous().mT)
    assert_exact(case, transposed)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_error_is_no_worse_than_eager_of_the_same_dtype(shape: Any, dtype: torch.dtype, transposed: bool) -> None:
    case = linear_case(*shape, Transform(granule=1), dtype=dtype, bias=not transposed, transposed=transposed)
    exact = retrieved_product(case, transposed)
    error = root_mean_square(cpu.superposed_linear(*case, transposed) - exact)
    eager = root_mean_square(two_eager_matmuls(case, transposed) - exact)
    assert error <= eager + torch.finfo(dtype).eps / 2 * root_mean_square(exact)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_mixed_batch_equals_separate_batches(dtype: torch.dtype) -> None:
    case = linear_case(12, 33, 40, models=5, slots=3, dtype=dtype, integers=True)
    mixed = cpu.superposed_linear(*case, False)
    for model in case.ids.unique():
        rows = case.ids == model
        assert torch.equal(mixed[rows], cpu.superposed_linear(*case._replace(x=case.x[rows], ids=model[None]), False))


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_rows_of_one_model_are_served_from_its_rebuilt_weight(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = []
    weight_side = cpu._weight_side
    monkeypatch.setattr(cpu, "_weight_side", lambda *a: (served.append((a[1].shape[0], a[5])), weight_side(*a)))
    enough = int(cpu.weight_side_rows(dtype, Transform()))
    case = linear_case(4 * enough, 33, 40, runs=4, models=3, slots=1, dtype=dtype, integers=True)
    case.slots[:] = torch.tensor([0, 0, -1])
    for ids, expected in (
        ([0, 0, 0, 0], [(4 * enough, 0)]),
        ([1, -1, 0, 1], [(enough, 0), (2 * enough, 1)]),
        ([2, 2, -1, -1], []),
    ):
        served.clear()
        case.ids[:] = torch.tensor(ids)
        assert torch.equal(cpu.superposed_linear(*case, False), reference.superposed_linear(*case))
        assert sorted(served) == expected


def test_a_gain_that_fp16_cannot_hold_is_not_rounded_to_it() -> None:
    case = linear_case(40, 16, 24, runs=1, models=1, slots=1, bias=False, dtype=torch.float16)
    case.ids[:], case.slots[:] = 0, 0
    small = case._replace(scale=torch.full((1,), 1e-8), delta=case.delta * 1000, weight=case.weight * 0)
    exact = retrieved_product(small)
    assert root_mean_square(cpu.superposed_linear(*small, False) - exact) < 0.1 * root_mean_square(exact)


def test_rows_of_the_base_never_read_the_superposition() -> None:
    case = linear_case(6, 20, 24, Transform(granule=1), models=2, slots=1, integers=True)
    case.slots[:] = torch.tensor([0, -1])
    case.ids[:] = torch.tensor([-1, 0, 1, -1, 0, 1])
    y = cpu.superposed_linear(*case._replace(delta=torch.full_like(case.delta, float("nan"))), False)
    assert y[case.ids == 0].isnan().all()
    assert torch.equal(y[case.ids != 0], cpu.superposed_linear(*case, False)[case.ids != 0])


@pytest.mark.parametrize("unknown", [4, -2, 2**31 - 1])
def test_an_id_that_names_no_model_is_refused(unknown: int) -> None:
    case = linear_case(3, 5, 7, models=4)
    case.ids[:] = torch.tensor([0, unknown, -1])
    low, high = min(unknown, -1), max(unknown, 0)
    with pytest.raises(IndexError, match=rf"ids must lie in -1 to 3, got {low} to {high}"):
        cpu.superposed_linear(*case, False)


@pytest.mark.parametrize("transposed", [False, True])
def test_no_rows_give_no_rows(transposed: bool) -> None:
    case = linear_case(4, 5, 7, Transform(granule=1), bias=False)
    y = cpu.superposed_linear(*case._replace(x=torch.empty(0, 5 if transposed else 7)), transposed)
    assert y.shape == (0, 7 if transposed else 5)


def test_columns_that_do_not_divide_into_segments_are_refused() -> None:
    case = linear_case(3, 5, 7, Transform(granule=1, segments=2), models=1, slots=1)
    case.ids[:], case.slots[:] = 0, 0
    with pytest.raises(ValueError, match=r"columns must be a multiple of segments = 2, got 7"):
        cpu.superposed_linear(*case, False)


def test_cached_signs_are_never_written_to() -> None:
    case = linear_case(6, 20, 24, Transform(granule=1), models=3, slots=1)
    first = cpu.superposed_linear(*case, False)
    cpu.superposed_linear(*linear_case(6, 20, 24, Transform(granule=1), bias=False, models=3, transposed=True), True)
    assert torch.equal(cpu.superposed_linear(*case, False), first)
    key = int(case.keys[0])
    for stream, width in ((Stream.COLUMN_SIGNS, 24), (Stream.ROW_SIGNS, 20)):
        held = cpu._signs(key, case.tensor, stream, width)
        assert torch.equal(held, cpu._signs.__wrapped__(key, case.tensor, stream, width))
