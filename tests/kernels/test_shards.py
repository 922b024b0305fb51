"""A tensor-parallel shard of a superposed matrix: every operator with an origin against the slice of the whole."""

from typing import Any
from unittest import mock

import pytest
import torch
from cases import TENSOR, LinearCase, basis_of, linear_case, normal, packed_case, retrieved_product, run, unpacked
from torch import Tensor

from randes_kernels import (
    Basis,
    Packed,
    gpu,
    mixing,
    packing,
    reference,
    retrieve,
    slices,
    superpose_,
    superposed_linear,
)  # fmt: skip
from randes_kernels.format import Matrix, Transform, model_key, shard_of
from randes_kernels.tiles import Plan, Tile

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
N, K = 260, 300
ORIGINS = (0, 1, 37, 128, 200)
KEY = model_key(0, "model")
TWO_SIDED, ROTATION, DENSE = Transform(), Transform(True, False, matrix=1), Transform(True, False, matrix=3)
DIAGONAL = Transform(True, False, matrix=int(Matrix.DIAGONAL))
PERMUTED = Transform(granule=1, segments=3)
PLANS = {
    "in the product": Plan("activation side", Tile(16, 32, 32, 4, 2)),
    "in whole blocks": Plan("activation side", Tile(16, 32, 128, 4, 2), parts=2),
    "turned first": Plan("activation side", Tile(16, 32, 32, 4, 2), turn_first=True),
    "weight side": Plan("weight side", Tile(16, 32, 32, 4, 2)),
    "grouped": Plan("weight side", Tile(16, 32, 32, 4, 2), grouped=True),
}
WAYS = {name: (plan, False) for name, plan in PLANS.items()}
WAYS |= {f"{name}, transposed": (PLANS[name], True) for name in ("in the product", "weight side")}


def part_of(first: int, size: int, whole: int) -> range:
    return range(first, min(first + size, whole))


def shard(case: LinearCase, rows: range, columns: range, transposed: bool = False) -> LinearCase:
    """What one device holds of a layer, and the part of x that it gets."""
    down, across = slice(rows.start, rows.stop), slice(columns.start, columns.stop)
    delta = case.delta
    return case._replace(
        x=case.x[:, down if transposed else across].contiguous(),
        weight=case.weight[down, across].contiguous(),
        bias=case.bias if case.bias is None else case.bias[down],
        biases=case.biases if case.biases is None else case.biases[:, down],
        delta=packing.cut(delta, down, columns) if isinstance(delta, Packed) else delta[:, down, across].contiguous(),
        transform=shard_of(case.transform, tuple(case.weight.shape), rows, columns),
    )


def slice_of_the_whole(case: LinearCase, rows: range, columns: range, transposed: bool = False) -> Tensor:
    """What the whole layer makes of that part of x, as the device's rows (columns, transposed) of y."""
    came, went = (rows, columns) if transposed else (columns, rows)
    x = torch.zeros_like(case.x)
    x[:, came.start : came.stop] = case.x[:, came.start : came.stop]
    whole = case if isinstance(case.delta, Tensor) else unpacked(case)
    return retrieved_product(whole._replace(x=x), transposed)[:, went.start : went.stop].to(case.x.dtype)


def launched(case: LinearCase, plan: Plan, transposed: bool = False, *own: Tensor) -> Tensor:
    """What the kernels make of a shard."""
    packed: tuple[Any, ...] = (None, [])
    if isinstance(case.delta, Packed):
        steps, numbers = packing.operands(case.delta)
        packed, case = (steps.to(DEVICE), numbers), case._replace(delta=case.delta.words)
    moved = [value.to(DEVICE) if isinstance(value, Tensor) else value for value in case]
    with mock.patch.object(gpu, "linear_plan", return_value=plan):
        return gpu.superposed_linear(*moved, transposed, *packed, *(value.to(DEVICE) for value in own)).cpu()


def without_origin(case: LinearCase) -> LinearCase:
    return case._replace(transform=case.transform._replace(first_row=0, first_column=0))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("first_column", ORIGINS)
@pytest.mark.parametrize("first_row", ORIGINS)
def test_reference_and_cpu_equal_the_slice_of_the_whole(first_row: int, first_column: int, transposed: bool) -> None:
    case = linear_case(16, N, K, TWO_SIDED, bias=not transposed, integers=True, runs=8, transposed=transposed)
    rows, columns = part_of(first_row, 45, N), part_of(first_column, 70, K)
    own = shard(case, rows, columns, transposed)
    for ids in (case.ids, torch.full_like(case.ids, int(torch.argmax(case.slots)))):  # a mix, and the weight side
        case, own = case._replace(ids=ids), own._replace(ids=ids)
        expected = slice_of_the_whole(case, rows, columns, transposed)
        if transposed:
            assert torch.equal(torch.ops.randes.superposed_linear(*own[:-1], list(own.transform), True), expected)
        else:
            assert torch.equal(reference.superposed_linear(*own), expected)
            assert torch.equal(run(own), expected)
            assert torch.equal(run(own), expected)  # by what the first call left in caches


@pytest.mark.parametrize(("plan", "transposed"), WAYS.values(), ids=WAYS)
@pytest.mark.parametrize(("first_row", "first_column"), [(0, 200), (1, 37), (37, 0), (128, 1), (200, 128)])
def test_kernels_equal_the_slice_of_the_whole(first_row: int, first_column: int, transposed: bool, plan: Plan) -> None:
    dtype = torch.float16 if first_row == 200 else torch.float32
    case = linear_case(18, N, K, TWO_SIDED, bias=not transposed, integers=True, runs=9, transposed=transposed,
                       dtype=dtype)  # fmt: skip
    rows, columns = part_of(first_row, 45, N), part_of(first_column, 70, K)
    own, expected = shard(case, rows, columns, transposed), slice_of_the_whole(case, rows, columns, transposed)
    assert torch.equal(launched(own, plan, transposed), expected)
    if first_row == 1:
        assert not torch.equal(launched(without_origin(own), plan, transposed), expected)


@pytest.mark.parametrize("bits", [16, 8, 4, 2, 1, 0.5])
@pytest.mark.parametrize("path", ["cpu", "activation side", "weight side"])
def test_packed_shards_equal_the_slice_of_the_whole(path: str, bits: float) -> None:
    for first_row, first_column in ((0, 0), (1, 128), (200, 128)) if bits == 0.5 else ((37, 37), (200, 1), (1, 128)):
        case = packed_case(bits, 12, N, K, TWO_SIDED, group=0, runs=6) if bits < 16 else linear_case(
            12, N, K, integers=True, runs=6)  # fmt: skip
        rows, columns = part_of(first_row, 45, N), part_of(first_column, 150, K)
        own, expected = shard(case, rows, columns), slice_of_the_whole(case, rows, columns)
        tile = Tile(16, 32, 128 if bits < 8 else 32, 4, 2)
        found = run(own) if path == "cpu" else launched(own, Plan(path, tile))
        assert torch.equal(found, expected)


def test_a_shard_without_its_origin_is_wrong() -> None:
    case = linear_case(40, N, K, TWO_SIDED, integers=True)
    own = shard(case, range(37, 82), range(200, 270))
    expected = slice_of_the_whole(case, range(37, 82), range(200, 270))
    base = case.ids < 0
    for wrong in (own.transform._replace(first_row=0), own.transform._replace(first_column=0), TWO_SIDED):
        found = run(own._replace(transform=wrong))
        assert torch.equal(found[base], expected[base])
        assert not torch.equal(found, expected)


@pytest.mark.parametrize("plan", [None, PLANS["in the product"]], ids=["cpu", "kernel"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("granule", [1, 3])
def test_shards_of_whole_segments_are_permuted_as_in_the_whole(
    granule: int, transposed: bool, plan: Plan | None
) -> None:
    case = linear_case(6, N, K, PERMUTED._replace(granule=granule), bias=False, integers=True, transposed=transposed)
    for rows, columns in ((range(37, 47), range(100, 300)), (range(32), range(200, 300))):
        own, expected = shard(case, rows, columns, transposed), slice_of_the_whole(case, rows, columns, transposed)
        if plan is not None:
            assert torch.equal(launched(own, plan, transposed), expected)
        else:
            assert torch.equal(torch.ops.randes.superposed_linear(*own[:-1], list(own.transform), transposed), expected)
    assert own.transform.segments == 1


@pytest.mark.parametrize("on_kernel", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_diagonal_is_cut_anywhere_and_what_mixes_columns_by_rows(transposed: bool, on_kernel: bool) -> None:
    for transform, rows, columns in (
        (DIAGONAL, range(37, 82), range(130, 201)), (ROTATION, range(37, 82), range(K)), (DENSE, range(128, 180),
         range(K)),
    ):  # fmt: skip
        case = linear_case(6, N, K, transform, bias=False, transposed=transposed)
        own, expected = shard(case, rows, columns, transposed), slice_of_the_whole(case, rows, columns, transposed)
        inverses = None
        if transform.matrix == Matrix.DENSE:
            inverses, units = mixing.inverses_of(own.keys.tolist(), TENSOR, K)
            own = own._replace(scale=own.scale * torch.tensor(units))
        if on_kernel:
            nothing = () if inverses is None else (None, None, inverses)
            with mock.patch.object(gpu, "linear_plan", return_value=PLANS["in the product"]):
                found = gpu.superposed_linear(*own, transposed, None, [], *nothing)
        else:
            found = torch.ops.randes.superposed_linear(*own[:-1], list(own.transform), transposed, inverses=inverses)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("transform", [TWO_SIDED, PERMUTED, DIAGONAL], ids=["signs", "permuted", "diagonal"])
@pytest.mark.parametrize("first_row", ORIGINS)
def test_superposing_and_retrieving_a_shard_equal_the_slice_of_the_whole(transform: Transform, first_row: int) -> None:
    first = 100 if transform.granule else first_row
    base, tuned = normal(N, K), normal(N, K, seed=1)
    last_row, last = first_row + 40, min(first + 100, K)
    rows, columns = range(first_row, last_row), range(first, last)
    part = slice(first_row, last_row), slice(first, last)
    own, arguments = shard_of(transform, (N, K), rows, columns), (77.0, KEY, TENSOR)
    whole = torch.zeros(N, K, dtype=torch.int32)
    reference.superpose_(whole, tuned, base, *arguments, transform, False)
    back = reference.retrieve(base, whole, 0.5, KEY, TENSOR, transform)[part]
    for device, superpose in (
        ("cpu", reference.superpose_), ("cpu", slices.superpose_), (DEVICE, gpu.superpose_),
        ("cpu", lambda *given: superpose_(*given[:-1], subtract=given[-1])),
    ):  # fmt: skip
        held, after, before = (value.to(device).contiguous() for value in (whole[part] * 0, tuned[part], base[part]))
        superpose(held, after, before, *arguments, own, False)
        assert torch.equal(held.cpu(), whole[part])
    for device, read in (
        ("cpu", reference.retrieve),
        ("cpu", slices.retrieve),
        ("cpu", retrieve),
        (DEVICE, gpu.retrieve),
    ):
        before, held = base[part].to(device).contiguous(), whole[part].to(device).contiguous()
        torch.testing.assert_close(read(before, held, 0.5, KEY, TENSOR, own).cpu(), back, rtol=1e-6, atol=1e-5)


def test_a_shared_basis_is_cut_with_its_layer() -> None:
    case = linear_case(12, N, K, TWO_SIDED, integers=True, bias=False)
    whole = basis_of(case, 7)
    x, weight, _, _, delta, *rest = case
    expected = superposed_linear(x, weight, None, delta, *rest, basis=whole)
    by_rows = []
    for rows in (range(37), range(37, N)):
        (x, weight, _, _, delta, *rest), down = shard(case, rows, range(K)), slice(rows.start, rows.stop)
        own = Basis(whole.directions, whole.corrections[..., down].contiguous())
        by_rows.append(superposed_linear(x, weight, None, delta, *rest, basis=own))
        if rows.start == 0:
            assert torch.equal(launched(shard(case, rows, range(K)), PLANS["in the product"], False, *own), by_rows[-1])
    assert torch.equal(torch.cat(by_rows, 1), expected)
    total = torch.zeros_like(expected)
    for columns in (range(37), range(37, K)):
        x, weight, _, _, delta, *rest = shard(case, range(N), columns)
        own = Basis(whole.directions[columns.start : columns.stop].contiguous(), whole.corrections)
        total += superposed_linear(x, weight, None, delta, *rest, basis=own)
    assert torch.equal(total, expected)


def test_gradients_of_a_shard_are_the_slices_of_the_whole() -> None:
    case = linear_case(6, N, K, TWO_SIDED, integers=True, bias=False, dtype=torch.float64)
    rows, columns = range(37, 82), range(200, 270)
    grad = normal(6, N).round().double()
    x, own = case.x, shard(case, rows, columns)
    x.requires_grad_()
    run(case)[:, 37:82].mul(grad[:, 37:82]).sum().backward()
    part = own.x.detach().requires_grad_()
    run(own._replace(x=part)).mul(grad[:, 37:82]).sum().backward()
    assert x.grad is not None
    assert part.grad is not None
    assert torch.equal(part.grad, x.grad[:, 200:270])
    torch.library.opcheck(torch.ops.randes.superposed_linear, (*own[:-1], list(own.transform), False))


def test_packed_columns_keep_their_numbers_wherever_they_are_cut() -> None:
    delta = normal(2, 5, 300)
    for bits, group, first in (
        (8, 0, 37), (4, 64, 64), (4, 64, 128), (4, 0, 1), (2, 0, 200), (1, 0, 37), (0.5, 0, 128), (2, 128, 128)
    ):  # fmt: skip
        whole = packing.pack(delta, bits, group)
        for columns in (range(first, 300), range(first, first + 70)):
            part = packing.cut(whole, slice(1, 4), columns)
            expected = packing.unpack(whole)[:, 1:4, columns.start : columns.stop]
            assert torch.equal(packing.unpack(part), expected)
            form = packing.pack(delta[:, 1:4, columns.start : columns.stop], bits, group)
            assert [value.shape for value in part[:2]] == [value.shape for value in form[:2]]
            assert part[2:] == form[2:]


def test_what_cannot_be_cut_is_refused() -> None:
    shape = (N, K)
    for transform, why in ((ROTATION, "a rotation cannot be cut"), (DENSE, "a dense cannot be cut")):
        for columns in (range(150), range(150, K)):
            with pytest.raises(ValueError, match=why):
                shard_of(transform, shape, range(N), columns)
        assert shard_of(transform, shape, range(5, N), range(K)).first_row == 5
        with pytest.raises(ValueError, match="must not begin at a later column"):
            retrieve(torch.zeros(3, 4), torch.zeros(3, 4), 1.0, KEY, TENSOR, transform._replace(first_column=4))
    for columns in (range(150), range(50, 150), range(100, 100)):
        with pytest.raises(ValueError, match="can be cut at multiples of 100 alone"):
            shard_of(PERMUTED, shape, range(N), columns)
    for rows, columns in ((range(N), range(1, K + 1)), (range(N, N + 1), range(K)), (range(0, N, 2), range(K))):
        with pytest.raises(ValueError, match="of a shard must be a range of those of the matrix"):
            shard_of(TWO_SIDED, shape, rows, columns)
    for origin in ((-1, 0), (0, -1), (1 << 30, 0)):
        moved = TWO_SIDED._replace(first_row=origin[0], first_column=origin[1])
        with pytest.raises(ValueError, match="must have an origin"):
            retrieve(torch.zeros(3, 4), torch.zeros(3, 4), 1.0, KEY, TENSOR, moved)
    with pytest.raises(ValueError, match="must begin where a segment of 4 does"):
        retrieve(torch.zeros(3, 4), torch.zeros(3, 4), 1.0, KEY, TENSOR, Transform(granule=1, first_column=2))
    with pytest.raises(ValueError, match="cut at multiples of 64 columns, got column 37: pack it with group=0"):
        packing.cut(packing.pack(normal(3, 300), 4), slice(3), range(37, 300))
    with pytest.raises(ValueError, match="cut at multiples of 128 columns, got column 64: use 1 bit or more"):
        packing.cut(packing.pack(normal(3, 300), 0.5), slice(3), range(64, 300))


def test_a_shard_of_a_shard_is_one_of_the_whole() -> None:
    first = shard_of(TWO_SIDED, (N, K), range(37, 200), range(100, 300))
    assert shard_of(first, (163, 200), range(10, 20), range(1, 9)) == Transform(first_row=47, first_column=101)
    assert shard_of(Transform(granule=200, segments=2), (N, K), range(N), range(7)) == Transform(granule=0)
