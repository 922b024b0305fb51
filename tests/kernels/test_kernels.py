"""The fused kernels against the specification, in Triton's interpreter where there is no GPU.

Operands are small whole numbers where the result must be equal, not near: then every sum is exact, whatever its
order. bf16 matmuls are wrong in the interpreter and are left to ``test_gpu.py``.
"""

from typing import Any
from unittest import mock

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
from randes_kernels.kernels.group import group
from randes_kernels.packing import of_operands
from randes_kernels.tiles import Plan, Tile

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
UNPERMUTED = [transform for transform in TRANSFORMS.values() if not transform.granule]

interpreted = settings(
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    phases=[Phase.explicit, Phase.generate],  # shrinking a failure would take minutes in the interpreter
)


def launched(case: LinearCase, transposed: bool = False, plan: Plan | None = None) -> torch.Tensor:
    """What the kernels make of a case, by the plan that is chosen for it or by this one."""
    planned = mock.patch.object(gpu, "linear_plan", gpu.linear_plan if plan is None else lambda *_, **__: plan)
    with planned:
        return gpu.superposed_linear(*case.to(DEVICE), transposed).cpu()


def assert_exact(case: LinearCase, transposed: bool, plan: Plan | None = None) -> None:
    expected = retrieved_product(case, transposed).to(case.x.dtype)
    assert torch.equal(launched(case, transposed, plan), expected)
    if not transposed:
        assert torch.equal(reference.superposed_linear(*case), expected)


@st.composite
def layers(draw: st.DrawFn, transforms: list[Transform], largest_m: int, largest_k: int) -> tuple[LinearCase, bool]:
    """A layer of whole numbers, which may be a shard, and whether it is run transposed, as a backward pass."""
    runs = draw(st.integers(1, largest_m))
    transform = draw(st.sampled_from(transforms))
    width = draw(st.integers(1, largest_k // transform.segments))
    first_row, first_column = (draw(st.sampled_from([0, 0, 37, 128, 200])) for _ in range(2))
    if transform.granule:  # which begins where a segment does
        first_column = first_column % 3 * width
    transform = transform._replace(first_row=first_row, first_column=first_column)
    transposed = draw(st.booleans())
    bias = not transposed and draw(st.booleans())
    case = linear_case(
        runs * draw(st.integers(1, largest_m // runs)),
        draw(st.integers(1, 70)),
        transform.segments * width,
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


@settings(interpreted, max_examples=50)
@given(layers(UNPERMUTED, 36, 90))
def test_signed_layers_equal_the_specification(layer: tuple[LinearCase, bool]) -> None:
    assert_exact(*layer)


PERMUTED = [
    Transform(bool(flips & 1), bool(flips & 2), granule, segments)
    for flips in range(4)
    for granule in (1, 3, 8)
    for segments in (1, 2, 3)
]


@settings(interpreted, max_examples=40)
@given(layers(PERMUTED, 3, 140))
def test_permuted_layers_equal_the_specification(layer: tuple[LinearCase, bool]) -> None:
    assert_exact(*layer)


SMALL = Tile(16, 32, 32, warps=4, stages=2)


@settings(interpreted, max_examples=30)
@given(layers(UNPERMUTED, 40, 90), st.booleans(), st.booleans())
def test_the_weight_side_equals_the_specification(
    layer: tuple[LinearCase, bool], grouped: bool, described: bool
) -> None:
    case, transposed = layer
    # A tensor descriptor's rows begin at multiples of 16 bytes.
    bulk = described and case.weight.shape[1] % 8 == case.x.shape[1] % 8 == 0
    assert_exact(case, transposed, Plan("weight side", SMALL, grouped=grouped, bulk=bulk))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_bulk_copies_read_edges_as_zeros(dtype: torch.dtype, grouped: bool, transposed: bool) -> None:
    case = linear_case(40, 48, 88, runs=8, slots=3, bias=not transposed, dtype=dtype, integers=True,
                       transposed=transposed)  # fmt: skip
    assert_exact(case, transposed, Plan("weight side", SMALL, grouped=grouped, bulk=True))


@pytest.mark.parametrize("transform", [Transform(), Transform(granule=1)], ids=["signs", "permuted"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("parts", [2, 3, 8])
def test_a_split_depth_equals_the_specification(parts: int, transposed: bool, transform: Transform) -> None:
    case = linear_case(9, 45, 140, transform, bias=not transposed, integers=True, transposed=transposed)
    assert_exact(case, transposed, Plan("activation side", SMALL, parts=parts))


@pytest.mark.parametrize("plan", [Plan("weight side", SMALL, grouped=grouped) for grouped in (False, True)], ids=str)
def test_no_row_of_a_tile_reaches_another_on_the_weight_side(plan: Plan) -> None:
    case = linear_case(20, 20, 24, models=4, slots=2, integers=True)
    case.ids[:] = torch.tensor([0, 1, 2, 3, -1] * 4)
    case.slots[:] = torch.tensor([0, 1, 0, -1])
    expected = retrieved_product(case).float()
    drowned = case._replace(delta=case.delta.clone())
    drowned.delta[1] = float("nan")
    y = launched(drowned, plan=plan)
    others = case.ids != 1
    assert y[~others].isnan().all()
    assert torch.equal(y[others], expected[others])
    for unknown in (4, -2, 2**31 - 1, -(2**31)):
        case.ids[3] = unknown
        y = launched(case, plan=plan)
        assert y[3].isnan().all()
        assert torch.equal(torch.cat((y[:3], y[4:])), torch.cat((expected[:3], expected[4:])))


def test_no_descriptor_is_made_of_what_none_can_describe() -> None:
    bulk = Plan("weight side", SMALL, bulk=True)
    case = linear_case(20, 16, 24, runs=1, models=2, slots=1, integers=True)
    wide = torch.zeros(20, 28)
    wide[:, :24] = case.x
    for x in (wide[:, :24], case.x.mT.contiguous().mT, case.x[:1].expand(20, 24)):
        assert_exact(case._replace(x=x), False, bulk)
    nowhere = case._replace(delta=case.delta[:0], slots=torch.full_like(case.slots, -1))
    held = of_operands(nowhere.delta, None, (), 24)
    operands = nowhere.x.repeat(100, 1), nowhere.weight, held, nowhere.ids, nowhere.keys
    assert gpu.plan_of(*operands, permuted=False).path == "activation side"
    assert_exact(nowhere, False)


@pytest.mark.parametrize("runs", [1, 7, 63])
def test_rows_are_brought_into_the_order_of_their_models(runs: int) -> None:
    case = linear_case(63, 4, 40, runs=runs, models=5)
    moved, order, ids = group(case.x.to(DEVICE), case.ids.to(DEVICE))
    of_rows = case.ids.repeat_interleave(63 // runs)
    expected = torch.argsort(of_rows, stable=True)
    assert torch.equal(order.cpu().long(), expected)
    assert torch.equal(ids.cpu(), of_rows[expected])
    assert torch.equal(moved.cpu(), case.x[expected])


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
