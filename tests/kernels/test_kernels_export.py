"""The kernels that write a superposition and that read a whole weight back, against the specification."""

from typing import Any

import pytest
import torch
from cases import SHAPES, TENSOR, TRANSFORMS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from randes_kernels import gpu, reference
from randes_kernels.format import Transform, model_key

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KEY = model_key(1, "model")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def weights(n: int, k: int, dtype: torch.dtype, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A base and its fine-tune, in a dtype."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(n, k, generator=generator).to(dtype)
    return base, (base.float() + 0.05 * torch.randn(n, k, generator=generator)).to(dtype)


def superposed(accumulator: torch.Tensor, finetuned: torch.Tensor, base: torch.Tensor, *arguments: Any) -> torch.Tensor:
    """The accumulator afterwards, computed by the kernel on a copy."""
    result = accumulator.to(DEVICE, copy=True)
    gpu.superpose_(result, finetuned.to(DEVICE), base.to(DEVICE), *arguments)
    return result.cpu()


def specified(accumulator: torch.Tensor, *arguments: Any) -> torch.Tensor:
    result = accumulator.clone()
    reference.superpose_(result, *arguments)
    return result


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_superposing_is_bit_identical(transform: Transform, shape: Any, dtype: torch.dtype) -> None:
    _, n, k = shape
    base, finetuned = weights(n, k, dtype)
    before = torch.randint(-(2**30), 2**30, (n, k), dtype=torch.int32)
    arguments = finetuned, base, 512 / 0.05, KEY, TENSOR, transform, False
    assert torch.equal(superposed(before, *arguments), specified(before, *arguments))


@settings(derandomize=True, deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 50)),
    transform=st.builds(
        Transform,
        st.booleans(),
        st.booleans(),
        st.integers(0, 9),
        st.integers(1, 3),
        st.just(0),
        st.integers(0, 300),
        st.integers(0, 300),
    ),
    rate=st.floats(2**-10, 2**20, width=32),
    dtype=st.sampled_from(DTYPES),
    subtract=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_superposing_any_layer_is_bit_identical(
    shape: tuple[int, int], transform: Transform, rate: float, dtype: torch.dtype, subtract: bool, seed: int
) -> None:
    n, k = shape[0], shape[1] * transform.segments
    if transform.granule:  # a shard begins where a segment does
        transform = transform._replace(first_column=transform.first_column // shape[1] * shape[1])
    arguments = *reversed(weights(n, k, dtype, seed)), rate, model_key(seed, "m"), TENSOR, transform, subtract
    zeros = torch.zeros(n, k, dtype=torch.int32)
    assert torch.equal(superposed(zeros, *arguments), specified(zeros, *arguments))


def test_halves_round_to_even() -> None:
    delta = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 0.49999997, -0.50000006, 7.0, 0.0, 16777215.0, -1e9]])
    whole = torch.tensor([[0, 2, 2, 0, -2, -2, 0, -1, 7, 0, 16777215, -1000000000]], dtype=torch.int32)
    plain = Transform(row_signs=False, column_signs=False)
    zeros = torch.zeros_like(whole)
    assert torch.equal(superposed(zeros, delta, torch.zeros_like(delta), 1.0, KEY, TENSOR, plain, False), whole)


def test_taking_away_gives_back_the_bytes_from_before() -> None:
    base, finetuned = weights(33, 70, torch.bfloat16)
    before = torch.randint(-1000, 1000, (33, 70), dtype=torch.int32)
    arguments = finetuned, base, 1e4, KEY, TENSOR, Transform(granule=3)
    added = superposed(before, *arguments, False)
    assert not torch.equal(added, before)
    assert torch.equal(superposed(added, *arguments, True), before)


def test_rows_of_wider_tensors_are_read_by_their_stride() -> None:
    base, finetuned = weights(33, 70, torch.float32)
    zeros = torch.zeros(33, 70, dtype=torch.int32)
    wide_base, wide_finetuned = (
        torch.cat((value, torch.full_like(value, 9.0)), 1)[:, :70] for value in (base, finetuned)
    )
    arguments = 1e4, KEY, TENSOR, Transform(granule=1)
    expected = specified(zeros, finetuned, base, *arguments, False)
    result = zeros.to(DEVICE)
    gpu.superpose_(result, wide_finetuned.to(DEVICE), wide_base.to(DEVICE), *arguments, False)
    assert torch.equal(result.cpu(), expected)


@pytest.mark.parametrize(
    ("dtype", "delta_dtype"),
    [(torch.float32, torch.int16), (torch.float16, torch.float16), (torch.bfloat16, torch.int32)],
    ids=str,
)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_a_retrieved_weight_equals_the_specification(
    transform: Transform, shape: Any, dtype: torch.dtype, delta_dtype: torch.dtype
) -> None:
    _, n, k = shape
    base, _ = weights(n, k, dtype)
    if dtype == torch.bfloat16:  # the interpreter truncates to bf16 instead of rounding: nothing to round here
        base = base.round()
    delta = torch.randint(-20, 20, (n, k)).to(delta_dtype)
    arguments = 0.25, KEY, TENSOR, transform
    retrieved = gpu.retrieve(base.to(DEVICE), delta.to(DEVICE), *arguments).cpu()
    assert retrieved.dtype == dtype
    # A quarter of a small integer is exact in fp32, and so the sum is rounded once, fused or not.
    assert torch.equal(retrieved, reference.retrieve(base, delta, *arguments))


@pytest.mark.parametrize("transform", [Transform(), Transform(granule=1)], ids=["signs", "permuted"])
def test_retrieving_a_superposed_delta_alone_gives_it_back(transform: Transform) -> None:
    base = torch.randint(-9, 9, (33, 70)).float()
    finetuned = base + torch.randint(-9, 9, (33, 70))
    zeros = torch.zeros(33, 70, dtype=torch.int32)
    delta = superposed(zeros, finetuned, base, 4.0, KEY, TENSOR, transform, False)
    back = gpu.retrieve(base.to(DEVICE), delta.to(DEVICE), 0.25, KEY, TENSOR, transform).cpu()
    assert torch.equal(back, finetuned)
