"""D in few bits: the packed form itself, and every path that reads it, against unpacking first."""

import math
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from cases import (
    TRANSFORMS,
    LinearCase,
    linear_case,
    normal,
    packed_case,
    retrieved_product,
    root_mean_square,
    run,
    two_eager_matmuls,
    unpacked,
)
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from randes.superposition.packed_tensors import added_noise
from randes_kernels import Packed, Transform, cpu, cpu_delta, gpu, pack, packing, superposed_linear, unpack
from randes_kernels.packing import packed_bytes, with_padding, without_padding
from randes_kernels.tiles import Plan, Tile

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BITS = (8, 4, 2, 1, 0.5)
SHAPES = ((33, 45, 70), (3, 5, 7), (20, 48, 256))
UNPERMUTED = [transform for transform in TRANSFORMS.values() if not transform.granule]


def operands(case: LinearCase) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """As the device functions take them: the case with the words in D's place, and what comes after ``transposed``."""
    delta = case.delta
    assert isinstance(delta, Packed)
    return case._replace(delta=delta.words), (delta.steps.to(DEVICE), packing.operands(delta)[1])


def launched(case: LinearCase, plan: Plan | None = None) -> Tensor:
    words, packing = operands(case)
    planned = mock.patch.object(gpu, "linear_plan", gpu.linear_plan if plan is None else lambda *_, **__: plan)
    with planned:
        moved = [value.to(DEVICE) if isinstance(value, Tensor) else value for value in words]
        return gpu.superposed_linear(*moved, False, *packing).cpu()


# ---------------------------------------------------------------- the form


@pytest.mark.parametrize("bits", [8, 4, 2, 1])
def test_words_and_steps_are_laid_out_as_the_format_says(bits: int) -> None:
    delta = normal(2, 5, 300)
    made = pack(delta, bits)
    levels = torch.empty(2, 5, 384)
    for column in range(300 if bits == 8 else 384):
        span, within = divmod(column, 128)
        if bits == 8:
            levels[..., column] = made.words[..., column].float()
        else:
            width = 16 * bits  # bytes of a span
            byte = made.words[..., span * width + within % width].int()
            number = byte >> (within // width * bits) & (2**bits - 1)
            levels[..., column] = (2 * number - (2**bits - 1)).float()
        step = made.steps[:, column // 64 if bits == 4 else 0].float()
        levels[..., column] *= step
    assert torch.equal(unpack(made), levels[..., :300])
    assert made.words.dtype == (torch.int8 if bits == 8 else torch.uint8)
    assert made.steps.dtype == torch.float16
    assert made.steps.shape == (2, 6 if bits == 4 else 1, 5)


def test_half_a_bit_names_the_loudest_of_eight_columns() -> None:
    delta = normal(2, 5, 300)
    made = pack(delta, 0.5)
    columns = F.pad(delta, (0, 84)).view(2, 5, 3, 8, 16)
    expected = torch.zeros(2, 5, 3, 8, 16)
    for lane in range(16):
        byte = made.words.view(2, 5, 3, 8)[..., lane % 8].int()
        code = byte >> (4 * (lane // 8)) & 15
        assert torch.equal(code & 7, columns[..., lane].abs().argmax(-1))
        sign = 1 - 2 * (code >> 3)
        expected[..., lane].scatter_(-1, (code & 7).long()[..., None], sign[..., None].float())
        assert torch.equal(expected[..., lane].abs().amax(-1), torch.ones(2, 5, 3))
    assert torch.equal(unpack(made), (expected.view(2, 5, 384) * made.steps.mT.float())[..., :300])
    assert made.steps.shape == (2, 1, 5)
    assert made.nbytes == made.words.nbytes + made.steps.nbytes == 2 * 5 * (3 * 8 + 2)


@pytest.mark.parametrize("columns", [1, 3, 64, 65, 127, 128, 300, 576])
@pytest.mark.parametrize(("bits", "group"), [(8, 0), (4, 64), (4, 0), (2, 64), (2, 192), (1, 0), (0.5, 0)])
def test_a_file_holds_no_padding(bits: float, group: int, columns: int) -> None:
    made = pack(normal(2, 5, columns), bits, group)
    words, steps = without_padding(made)
    assert words.nbytes + steps.nbytes == made.nbytes == packed_bytes(10, columns, bits, group)
    whole = -(-columns // 128) * 128  # of half a bit, whose eight columns lie apart
    assert words.shape == (2, 5, math.ceil((columns if bits >= 1 else whole) * bits / 8))
    for held in ((words, steps), (made.words, made.steps)):  # as stores were before, too
        back = with_padding(*held, bits, group, columns)
        assert torch.equal(back.words, made.words)
        assert torch.equal(back.steps, made.steps)
        assert back[2:] == made[2:]
    with pytest.raises(ValueError, match=f"{columns} columns in {bits} bits must have"):
        with_padding(words[..., :-1], steps, bits, group, columns)
    with pytest.raises(ValueError, match="steps a row"):
        with_padding(words, steps[..., :-1], bits, group, columns)


def test_the_last_span_in_a_file_never_changes() -> None:
    """Worked out by hand: of five columns in 2 bits bytes are two, and hold columns 0, 2, 4 and 1, 3."""
    words, _ = without_padding(pack(torch.tensor([[-3.0, -1, 1, 3, 3]]), 2, 0))
    assert words.tolist() == [[0b10111000, 0b10101101]]


def test_the_packed_form_never_changes() -> None:
    """Worked out by hand: values that are levels already, at either end and between."""
    row = torch.tensor([[-15.0, -13, 15, 1, -1] + [7, -7] * 29 + [15.0]]) * 0.25
    made = pack(row, 4)
    assert made.steps.tolist() == [[0.25], [0.0]]  # the second group is padding
    # Columns 0 and 64 in a byte; what is padding is as near to zero as a number can be, above it.
    assert made.words[0, :6].tolist() == [8 << 4 | number for number in (0, 1, 15, 8, 7, 11)]
    two = pack(torch.tensor([[-3.0, -1, 1, 3] * 16]), 2, 64)
    assert two.steps.tolist() == [[1.0], [0.0]]
    assert two.words[0, :4].tolist() == [0b10100000, 0b10100101, 0b10101010, 0b10101111]
    one = pack(torch.tensor([[-2.0, -2, 2] + [2.0] * 15 + [-2.0] * 2]), 1)
    assert one.steps.tolist() == [[2.0]]
    # Columns 0 and 16, 1 and 17 and so on in a byte: the lowest bits; what is padding is above zero.
    assert one.words[0, :5].tolist() == [0b11111110, 0b11111110, 0b11111101, 0b11111101, 0b11111111]
    # Column 33 is the third of the second lane, 121 the eighth of the tenth; where all are zero the first is named.
    half = pack(
        torch.zeros(1, 128).index_fill(1, torch.tensor([33]), -2.0).index_fill(1, torch.tensor([121]), 2.0), 0.5
    )
    assert half.steps.tolist() == [[2.0]]
    assert half.words.tolist() == [[0, 0b01111010, 0, 0, 0, 0, 0, 0]]
    eight = pack(torch.tensor([[127.0, -64, 0, 1]]), 8)
    assert eight.steps.tolist() == [[1.0]]
    assert eight.words.tolist() == [[127, -64, 0, 1]]


@pytest.mark.parametrize(("bits", "error"), [(8, 0.009), (4, 0.0947), (2, 0.366), (1, 0.756), (0.5, 1.23)])
def test_normal_values_lose_what_is_documented(bits: float, error: float) -> None:
    delta = normal(64, 4096) * 2.6
    found = root_mean_square(unpack(pack(delta, bits)) - delta) / root_mean_square(delta)
    assert found == pytest.approx(error, rel=0.05)
    assert found == pytest.approx(added_noise(bits, 4096) ** 0.5, rel=0.05)  # what predictions are made with


@pytest.mark.parametrize("columns", [5, 16, 48, 100, 128, 200, 576])
def test_half_a_bit_loses_less_where_there_are_fewer_than_eight_to_choose_from(columns: int) -> None:
    delta = normal(4096, columns)
    found = root_mean_square(unpack(pack(delta, 0.5)) - delta) / root_mean_square(delta)
    # A step a row adapts to few columns: the law is of many.
    assert found == pytest.approx(added_noise(0.5, columns) ** 0.5, rel=0.05 if columns > 16 else 0.3)


@pytest.mark.parametrize(
    ("bits", "group"), [*((bits, group) for bits in (4, 2, 1) for group in (0, 64, 192)), (0.5, 0)]
)
def test_what_comes_back_keeps_the_inner_product_whatever_is_packed(bits: float, group: int) -> None:
    for delta in (normal(16, 576), normal(16, 576) ** 3, normal(16, 576) + 2, normal(16, 100).exp()):
        made = unpack(pack(delta, bits, group)).double()
        span = group or delta.shape[1]
        for first in range(0, delta.shape[1], span):
            own, back = (value[:, first : first + span].double() for value in (delta, made))
            size = own.square().sum(1)
            torch.testing.assert_close((own * back).sum(1), size, rtol=2**-11, atol=0)  # the step is fp16


@pytest.mark.parametrize("bits", [4, 2, 1])
def test_levels_are_within_two_percent_of_the_best(bits: float) -> None:
    groups = normal(64, 64)
    top = 2**bits - 1
    best = torch.full((64,), torch.inf)
    for step in torch.linspace(0.05, 2, 400):
        levels = 2 * torch.floor(groups * 0.5 / step).add(2 ** (bits - 1)).clamp(0, top) - top
        unbiased = groups.square().sum(1) / (groups * levels).sum(1)
        best = torch.minimum(best, (levels * unbiased[:, None] - groups).square().sum(1))
    found = (unpack(pack(groups, bits, 64)) - groups).square().sum()
    assert found.sqrt() < 1.02 * best.sum().sqrt()


@pytest.mark.parametrize("bits", BITS)
def test_zeros_stay_zeros_and_a_quiet_group_is_as_good_as_a_loud_one(bits: float) -> None:
    delta = normal(4, 256)
    delta[1] = 0
    delta[2, :64] = 0
    delta[3] *= 1e-3
    made = unpack(pack(delta, bits, 64 if bits >= 1 else 0))
    assert not made[1].any()
    if 1 <= bits < 8:
        assert not made[2, :64].any()
    assert root_mean_square(made[3] - delta[3]) < {1: 0.8, 0.5: 1.3}.get(bits, 0.4) * root_mean_square(delta[3])


@pytest.mark.parametrize("bits", BITS)
def test_unpacking_in_another_dtype_and_a_part_of_the_rows(bits: float) -> None:
    made = pack(normal(2, 40, 200), bits, 128 if bits >= 1 else 0)
    whole = unpack(made)
    assert torch.equal(unpack(made.rows(slice(8, 24))), whole[:, 8:24])
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        error = (unpack(made, dtype).double() - whole.double()).abs()
        assert (error <= 2 * torch.finfo(dtype).eps * whole.double().abs()).all()


def test_what_cannot_be_packed_is_refused() -> None:
    with pytest.raises(ValueError, match=r"bits must be 8, 4, 2, 1 or 0\.5, got 3"):
        pack(normal(4, 64), 3)
    with pytest.raises(ValueError, match="group must be a multiple of 64 columns, or 0 for a whole row, got 32"):
        pack(normal(4, 64), 4, 32)
    with pytest.raises(ValueError, match=r"group must be 0 at 0\.5 bits, where a whole row has one step, got 64"):
        pack(normal(4, 64), 0.5, 64)
    with pytest.raises(ValueError, match=r"bits must be .*, got 2\.0"):
        pack(normal(4, 64), 2.0)
    with pytest.raises(ValueError, match=r"delta must lie within .* of fp16's steps, got 1e\+08"):
        pack(torch.full((4, 64), 1e8), 4)


# ---------------------------------------------------------------- the kernels, in Triton's interpreter


@settings(
    derandomize=True, deadline=None, max_examples=25, phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.too_slow],
)  # fmt: skip
@given(st.data())
def test_kernels_equal_the_specification(data: st.DataObject) -> None:
    draw = data.draw
    bits, dtype = draw(st.sampled_from(BITS)), draw(st.sampled_from([torch.float32, torch.float16]))
    side = draw(st.sampled_from(["activation side", "weight side"]))
    transform = draw(st.sampled_from(list(TRANSFORMS.values()) if side.startswith("act") else UNPERMUTED))
    runs = draw(st.integers(1, 12))
    bias = draw(st.booleans())
    case = packed_case(
        bits, runs * draw(st.integers(1, 3)), draw(st.integers(1, 70)), draw(st.integers(1, 300)), transform,
        draw(st.sampled_from([0, 64, 128, 192])), runs=runs, models=draw(st.integers(1, 9)),
        slots=draw(st.integers(1, 3)), dtype=dtype, bias=bias, own_biases=bias and draw(st.booleans()),
        seed=draw(st.integers(0, 2**32)),
    )  # fmt: skip
    tile = Tile(16, 32, 128 if bits < 8 else 32, warps=4, stages=2)
    if side == "weight side":
        described = case.weight.shape[1] % 8 == 0 and draw(st.booleans())
        described = described and bits >= 1 and (bits < 8 or case.x.shape[1] % 16 == 0)
        plan = Plan(side, tile, grouped=draw(st.booleans()), bulk=described)
    else:
        plan = Plan(side, tile, parts=draw(st.sampled_from([1, 2])), turn_first=draw(st.booleans()))
    assert torch.equal(launched(case, plan), retrieved_product(unpacked(case)).to(dtype))


@pytest.mark.parametrize(
    ("m", "bits"), [(3, 8), (3, 4), (3, 1), (20, 2), (20, 8), (130, 4), (130, 1), (3, 0.5), (130, 0.5)]
)
def test_the_plans_that_launches_choose_are_right(m: int, bits: float) -> None:
    case = packed_case(bits, m, 40, 140, Transform(), runs=3 if m == 3 else 5, dtype=torch.float16)
    assert torch.equal(launched(case), retrieved_product(unpacked(case)).half())


@pytest.mark.parametrize("bits", BITS)
def test_an_unknown_id_is_nan_and_its_neighbours_are_not(bits: float) -> None:
    case = packed_case(bits, 4, 40, 256, Transform())
    ids = torch.tensor([0, 99, -1, 1], dtype=torch.int32)
    y = launched(case._replace(ids=ids))
    assert y[1].isnan().all()
    known = retrieved_product(unpacked(case._replace(ids=torch.tensor([0, -1, -1, 1], dtype=torch.int32))))
    assert torch.equal(y[[0, 2, 3]], known[[0, 2, 3]].float())


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_kernels_err_no_more_than_eager_torch(dtype: torch.dtype, bits: float) -> None:
    case = linear_case(24, 48, 300, dtype=dtype)
    held = pack(case.delta, bits)
    exact = retrieved_product(case._replace(delta=unpack(held)))
    eager = two_eager_matmuls(case._replace(delta=unpack(held).to(dtype)))
    error = root_mean_square(launched(case._replace(delta=held)) - exact)
    assert error <= 1.1 * root_mean_square(eager - exact) + torch.finfo(dtype).eps * root_mean_square(exact) / 4


# ---------------------------------------------------------------- the CPU


@pytest.fixture(params=["measured crossovers", "weight side", "slices"])
def _every_path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param != "measured crossovers":
        monkeypatch.setattr(cpu_delta, "SLICE_BYTES", 1)
        monkeypatch.setattr(cpu_delta, "FEW_ROWS", dict.fromkeys(BITS, 0))
    if request.param == "weight side":
        monkeypatch.setattr(cpu, "weight_side_rows", lambda dtype, transform: 1)


@pytest.mark.usefixtures("_every_path")
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("bits", BITS)
def test_a_cpu_equals_the_specification(bits: float, transform: Transform) -> None:
    for shape in SHAPES:
        for dtype in (torch.float32, torch.float64):
            case = packed_case(bits, *shape, transform, dtype=dtype)
            assert torch.equal(run(case), retrieved_product(unpacked(case)).to(dtype))


@pytest.mark.usefixtures("_every_path")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", BITS)
def test_a_cpu_errs_no_more_than_eager_torch(bits: float, dtype: torch.dtype) -> None:
    for m in (3, 24):
        case = linear_case(m, 64, 512, dtype=dtype, runs=3)
        held = pack(case.delta, bits)
        exact = retrieved_product(case._replace(delta=unpack(held)))
        eager = two_eager_matmuls(case._replace(delta=unpack(held).to(dtype)))
        error = root_mean_square(run(case._replace(delta=held)) - exact)
        assert error <= 1.2 * root_mean_square(eager - exact) + torch.finfo(dtype).eps * root_mean_square(exact) / 2


def test_a_kept_layout_is_made_once_and_goes_with_its_tensor() -> None:
    case = linear_case(8, 64, 512, dtype=torch.bfloat16)
    before = len(cpu_delta._vendor_layouts)
    held = pack(case.delta, 4)
    first = run(case._replace(delta=held))
    assert len(cpu_delta._vendor_layouts) == before + 1
    assert torch.equal(run(case._replace(delta=held)), first)
    del held
    assert len(cpu_delta._vendor_layouts) == before


# ---------------------------------------------------------------- the operator


def test_the_operator_is_registered_whole() -> None:
    case, packing = operands(packed_case(4, 6, 16, 128, Transform(), runs=3))
    call = (*case[:-1], list(map(int, case[-1])), False, *packing)
    grad = [value.clone().requires_grad_() for value in (case[0], case[1])]
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(torch.ops.randes.superposed_linear, (*grad, *call[2:]), test_utils=checks)


@pytest.mark.parametrize("bits", BITS)
def test_gradients_are_those_of_the_unpacked(bits: float) -> None:
    case = packed_case(bits, 6, 16, 70, Transform(granule=1), runs=3)
    grads = []
    for layer in (case, unpacked(case)):
        leaves = [value.clone().requires_grad_() for value in (case.x, case.weight, case.bias)]
        x, weight, bias = leaves
        run(layer._replace(x=x, weight=weight, bias=bias)).square().sum().backward()
        grads.append([leaf.grad for leaf in leaves])
    for packed, plain in zip(*grads, strict=True):
        assert torch.equal(packed, plain)


def test_one_compilation_serves_any_mix_of_a_packed_layer() -> None:
    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed, (models, slots, runs, length) in enumerate(((3, 2, 4, 3), (5, 3, 2, 6), (16, 2, 7, 5))):
            case = packed_case(4, runs * length, 5, 300, Transform(), models=models, slots=slots, runs=runs, seed=seed)
            assert torch.equal(compiled(case), retrieved_product(unpacked(case)).float())
    torch._dynamo.reset()


def test_packed_operands_that_do_not_fit_are_refused() -> None:
    x, weight, bias, biases, delta, *rest = packed_case(4, 6, 16, 128, Transform())
    assert isinstance(delta, Packed)

    def call(wrong: Packed) -> None:
        superposed_linear(x, weight, bias, wrong, *rest, biases=biases)

    with pytest.raises(ValueError, match=r"delta must be packed by randes_kernels\.pack"):
        call(delta._replace(bits=3))
    with pytest.raises(ValueError, match=r"delta must be packed .* with K = 128, got K = 64"):
        call(delta._replace(columns=64))
    with pytest.raises(ValueError, match=r"delta.words must be \(2, 16, 64\) torch.uint8, got \(2, 16, 32\)"):
        call(delta._replace(words=delta.words[..., :32].contiguous()))
    with pytest.raises(ValueError, match=r"delta.steps must be \(2, 2, 16\) torch.float16, got"):
        call(delta._replace(steps=delta.steps.float()))
