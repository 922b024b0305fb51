"""Slices of rows on a CPU give the specification's bits, whatever the slice, and stop where int16 does."""

import pytest
import torch
from cases import TENSOR, TRANSFORMS
from torch import Tensor

from randes_kernels import reference, slices
from randes_kernels.format import Transform, model_key

KEY = model_key(3, "model")
SHAPES = [(64, 64), (37, 53), (1, 7), (5, 1), (2, 4000)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def pair(shape: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(shape, generator=generator).to(dtype)
    return (base.float() + 0.1 * torch.randn(shape, generator=generator)).to(dtype), base


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_they_are_the_references_bits(
    transform: Transform, shape: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if shape[1] % transform.segments:
        return  # refused before anything is computed
    monkeypatch.setattr(slices, "SLICE_ELEMENTS", 100)
    tuned, base = pair(shape, dtype)
    expected = torch.zeros(shape, dtype=torch.int32)
    reference.superpose_(expected, tuned, base, 500.0, KEY, TENSOR, transform, False)
    turn = slices.turn(KEY, TENSOR, base.shape, transform)
    for kind in (torch.int16, torch.int32):
        found = torch.zeros(shape, dtype=kind)
        for start, end in slices.spans(*shape, elements=300):  # as a matrix comes in from a file
            rows = slice(start, end)
            done = slices.superpose_rows_(found[rows], tuned[rows], base[rows], 500.0, turn, first=start)
            assert done == end - start
        assert torch.equal(found.int(), expected)
        slices.superpose_rows_(found, tuned, base, 500.0, turn, subtract=True)
        assert not found.any()
    for delta in (expected, expected.to(torch.int16), expected.to(dtype)):
        retrieved = reference.retrieve(base, delta, 1e-3, KEY, TENSOR, transform)
        assert torch.equal(slices.retrieve(base, delta, 1e-3, KEY, TENSOR, transform), retrieved)


@pytest.mark.parametrize("peak", [40_000.0, 2.0**26, 2.0**30])
def test_what_int16_does_not_hold_is_left_alone_and_said(peak: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slices, "SLICE_ELEMENTS", 8)
    base = torch.zeros(8, 4)
    tuned = torch.ones(8, 4)
    tuned[5, 2] = peak
    held = torch.full((8, 4), 7, dtype=torch.int16)
    done = slices.superpose_rows_(held, tuned, base, 1.0, slices.Turn(None, None, None, None))
    assert done == 4
    assert held.tolist() == [[8] * 4] * 4 + [[7] * 4] * 4


def test_the_limits_of_int16_are_held() -> None:
    held = torch.zeros(2, 2, dtype=torch.int16)
    limits = torch.tensor([[32767.0, -32768.0], [0.0, 1.0]])
    nothing = slices.Turn(None, None, None, None)
    assert slices.superpose_rows_(held, limits, torch.zeros(2, 2), 1.0, nothing) == 2
    assert held.tolist() == limits.int().tolist()
    assert slices.superpose_rows_(held, limits.clone(), torch.zeros(2, 2), 1.0, nothing) == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sums_of_squares_are_one_number_however_they_are_sliced(shape: tuple[int, int], dtype: torch.dtype) -> None:
    tuned, base = pair(shape, dtype)
    delta = tuned.double() - base.double()
    expected = (delta * delta).sum(1).tolist()
    assert slices.squares(tuned, base) == expected
    parts = [slices.squares(tuned[start:end], base[start:end]) for start, end in slices.spans(*shape, elements=300)]
    assert [total for part in parts for total in part] == expected
    assert torch.equal(delta, tuned.double() - base.double())


def test_spans_cover_all_rows_and_never_leave_one_alone() -> None:
    for rows in (0, 1, 2, 3, 7, 100):
        for columns in (0, 1, 5, 1000):
            found = slices.spans(rows, columns, 20)
            assert [start for start, _ in found] == [0, *(end for _, end in found[:-1])]
            assert found[-1][1] == rows
            assert rows < 2 or all(end - start > 1 for start, end in found)
