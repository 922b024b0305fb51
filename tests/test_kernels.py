"""The fused kernels against the specification, in Triton's interpreter where there is no GPU.

Operands are small whole numbers where the result must be equal, not near: then every sum is exact, whatever its
order. bf16 matmuls are wrong in the interpreter and are left to ``test_gpu.py``.
"""

from typing import Any

import pytest
import torch
from cases import (
    SHAPES,
    TENSOR,
    TRANSFORMS,
    LinearCase,
    linear_case,
    retrieved_product,
    root_mean_square,
    two_eager_matmuls,
)
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from randes_kernels import gpu, reference
from randes_kernels.format import Transform, model_key

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
UNPERMUTED = [transform for transform in TRANSFORMS.values() if not transform.granule]

interpreted = settings(
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    phases=[Phase.explicit, Phase.generate],  # shrinking a failure would take minutes in the interpreter
)


def launched(case: LinearCase, transposed: bool = False) -> torch.Tensor:
    return gpu.superposed_linear(*case.to(DEVICE), transposed).cpu()


def assert_exact(case: LinearCase, transposed: bool) -> None:
    expected = retrieved_product(case, transposed).to(case.x.dtype)
    assert torch.equal(launched(case, transposed), expected)
    if not transposed:
        assert torch.equal(reference.superposed_linear(*case), expected)


@st.composite
def layers(draw: st.DrawFn, transforms: list[Transform], largest_m: int, largest_k: int) -> tuple[LinearCase, bool]:
    """A layer of whole numbers and whether it is run transposed, as a backward pass."""
    runs = draw(st.integers(1, largest_m))
    transform = draw(st.sampled_from(transforms))
    transposed = draw(st.booleans())
    bias = not transposed and draw(st.booleans())
    case = linear_case(
        runs * draw(st.integers(1, largest_m // runs)),
        draw(st.integers(1, 70)),
        transform.segments * draw(st.integers(1, largest_k // transform.segments)),
        transform,
        models=draw(st.integers(1, 16)),
        slots=draw(st.integers(1, 3)),
        runs=runs,
        bias=bias,
        own_biases=bias and draw(st.booleans()),
        dtype=draw(st.sampled_from([torch.float32, torch.float16])),
        integers=True,
        transposed=transposed,
        seed=draw(st.integers(0, 2**32)),
    )
    if draw(st.booleans()):
        case = case._replace(x=case.x.mT.contiguous().mT)
    return case, transposed


@settings(interpreted, max_examples=140)
@given(layers(UNPERMUTED, 36, 90))
def test_signed_layers_equal_the_specification(layer: tuple[LinearCase, bool]) -> None:
    assert_exact(*layer)


PERMUTED = [
    Transform(bool(flips & 1), bool(flips & 2), granule, segments)
    for flips in range(4)
    for granule in (1, 3, 8)
    for segments in (1, 2, 3)
]


@settings(interpreted, max_examples=70)
@given(layers(PERMUTED, 3, 140))
def test_permuted_layers_equal_the_specification(layer: tuple[LinearCase, bool]) -> None:
    assert_exact(*layer)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_shapes_and_dtypes_of_either_pass(shape: Any, dtype: torch.dtype, transposed: bool) -> None:
    assert_exact(
        linear_case(*shape, bias=not transposed, dtype=dtype, integers=True, transposed=transposed), transposed
    )


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("transform", [Transform(), Transform(granule=1)], ids=["signs", "permuted"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(4, 64, 128), (5, 45, 70), (3, 5, 7)])
def test_error_is_no_worse_than_eager_of_the_same_dtype(
    shape: Any, dtype: torch.dtype, transform: Transform, transposed: bool
) -> None:
    case = linear_case(*shape, transform, dtype=dtype, bias=not transposed, transposed=transposed)
    exact = retrieved_product(case, transposed)
    error = root_mean_square(launched(case, transposed) - exact)
    eager = root_mean_square(two_eager_matmuls(case, transposed) - exact)
    assert error <= eager + torch.finfo(dtype).eps / 2 * root_mean_square(exact)


@pytest.mark.parametrize("transform", [Transform(), Transform(granule=1)], ids=["signs", "permuted"])
@pytest.mark.parametrize("own_biases", [False, True])
def test_a_row_of_an_unknown_model_is_nan_and_no_other_row_is(transform: Transform, own_biases: bool) -> None:
    case = linear_case(6, 5, 7, transform, models=3, own_biases=own_biases, integers=True)
    known = torch.tensor([0, 1, -1, 2, -1, 0], dtype=torch.int32)
    expected = retrieved_product(case._replace(ids=known))
    for unknown in (3, -2, 2**31 - 1, -(2**31)):
        ids = known.clone()
        ids[2] = unknown
        y = launched(case._replace(ids=ids))
        assert y[2].isnan().all()
        assert torch.equal(y[[0, 1, 3, 4, 5]].double(), expected[[0, 1, 3, 4, 5]])


@pytest.mark.parametrize("transform", [Transform(), Transform(granule=3)], ids=["signs", "permuted"])
def test_a_mixed_batch_equals_separate_batches(transform: Transform) -> None:
    case = linear_case(8, 33, 40, transform, models=5, slots=3, dtype=torch.float16)
    mixed = launched(case)
    for model in case.ids.unique():
        rows = case.ids == model
        alone = launched(case._replace(x=case.x[rows], ids=model[None]))
        assert torch.equal(mixed[rows], alone)


@pytest.mark.parametrize("transform", [Transform(), Transform(granule=1)], ids=["signs", "permuted"])
def test_rows_of_the_base_are_untouched_by_the_superposition(transform: Transform) -> None:
    case = linear_case(6, 20, 24, transform, models=2, slots=1, integers=True)
    case.slots[:] = torch.tensor([0, -1])
    case.ids[:] = torch.tensor([-1, 0, 1, -1, 0, 1])
    drowned = launched(case._replace(delta=torch.full_like(case.delta, 1e30)))
    assert (drowned[case.ids == 0].abs() > 1e20).any()
    assert torch.equal(drowned[case.ids != 0], launched(case)[case.ids != 0])


def test_slots_that_no_row_touches_are_never_read() -> None:
    case = linear_case(6, 20, 24, models=3, slots=3, integers=True)
    case.slots[:] = torch.tensor([2, 1, 0])
    case.ids[:] = torch.tensor([2, 0, -1, 0, 2, 2])
    poisoned = case._replace(delta=case.delta.clone())
    poisoned.delta[1] = float("nan")
    assert torch.equal(launched(poisoned), launched(case))


def test_a_granule_wider_than_a_segment_permutes_nothing() -> None:
    case = linear_case(2, 5, 12, Transform(granule=8, segments=3), integers=True)
    assert torch.equal(launched(case), launched(case._replace(transform=Transform())))
    assert_exact(case, False)


def test_arguments_may_be_views_with_strides() -> None:
    case = linear_case(6, 33, 40, integers=True)
    wide = case._replace(
        x=case.x.repeat_interleave(2, 1)[:, ::2],
        weight=case.weight.mT.contiguous().mT,
        delta=case.delta.mT.contiguous().mT,
    )
    assert torch.equal(launched(wide), launched(case))


def test_no_rows_give_no_rows() -> None:
    case = linear_case(4, 33, 40)
    for transposed, width in ((False, 33), (True, 40)):
        x = torch.empty(0, 33 if transposed else 40)
        assert launched(case._replace(x=x, bias=None, biases=None), transposed).shape == (0, width)


def test_fp64_is_refused() -> None:
    case = linear_case(4, 33, 40, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"x must be fp32, fp16 or bf16 on a GPU, got torch.float64"):
        launched(case)


def test_keys_and_ids_of_any_64_bits_reach_the_kernel() -> None:
    for key, tensor in ((-1, -1), (2**63 - 1, -(2**63)), (2**31, 2**32), (model_key(5, "m"), TENSOR)):
        case = linear_case(3, 40, 36, Transform(granule=1), models=1, slots=1, integers=True)
        assert_exact(case._replace(keys=torch.tensor([key]), tensor=tensor), False)
