"""The operators on a real GPU, in every dtype that they serve there. Alone with ``pytest -m gpu``."""

import json
from typing import Any

import pytest
import torch
from cases import (
    SHAPES,
    TENSOR,
    TRANSFORMS,
    LinearCase,
    basis_of,
    basis_product,
    linear_case,
    normal,
    packed_case,
    retrieved_product,
    root_mean_square,
    run,
    run_with_basis,
    two_eager_matmuls,
    unpacked,
)
from test_format import GOLDEN
from test_mixing import TRANSFORMS as MIXED
from test_mixing import budget, with_inverses
from torch import Tensor

from randes_kernels import Basis, pack, prepare, reference, retrieve, superpose_, superposed_linear, unpack
from randes_kernels import format as fmt
from randes_kernels.format import Transform, model_key, tensor_id
from randes_kernels.packing import BITS

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
KEY = model_key(0, "model")


def on_gpu(case: LinearCase) -> Tensor:
    return run(case.to("cuda")).cpu()


def gradients(case: LinearCase, grad: Tensor) -> list[Tensor]:
    """Of x, weight and bias, on the case's device and in its dtype."""
    assert case.bias is not None
    leaves = [value.detach().clone().requires_grad_() for value in (case.x, case.weight, case.bias)]
    x, weight, bias = leaves
    y = run(case._replace(x=x, weight=weight, bias=bias))
    return list(torch.autograd.grad(y, leaves, grad.to(y)))


def compiled_variants() -> int:
    from randes_kernels.kernels.activation_side import activation_side_kernel
    from randes_kernels.kernels.weight_side import weight_side_kernel

    device = torch.cuda.current_device()
    return sum(len(kernel.device_caches[device][0]) for kernel in (activation_side_kernel, weight_side_kernel))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (1, 256, 256), (17, 100, 300), (65, 130, 257), (200, 64, 96)])
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_whole_numbers_equal_the_specification(transform: Transform, shape: Any, dtype: torch.dtype) -> None:
    case = linear_case(*shape, transform, models=9, slots=3, dtype=dtype, integers=True)
    assert torch.equal(on_gpu(case), reference.superposed_linear(*case))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("runs", [1, 3, 300], ids="{} runs".format)
@pytest.mark.parametrize("shape", [(300, 264, 520), (600, 130, 258)], ids=str)
def test_whole_numbers_equal_the_specification_in_a_prefill(shape: Any, runs: int, dtype: torch.dtype) -> None:
    # Two models, so that rows of their own are still grouped for the weight side.
    case = linear_case(*shape, models=2, slots=2, runs=runs, dtype=dtype, integers=True)
    case.slots[:] = torch.tensor([1, 0])
    assert torch.equal(on_gpu(case), reference.superposed_linear(*case))


@pytest.mark.parametrize("dtype", DTYPES)
def test_whole_numbers_equal_the_specification_where_the_depth_is_split(dtype: torch.dtype) -> None:
    case = linear_case(8, 40, 4096, dtype=dtype, integers=True)
    assert torch.equal(on_gpu(case), reference.superposed_linear(*case))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(32, 64, 128), (33, 45, 70), (3, 5, 7), (300, 264, 520)])
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_gradients_equal_those_of_the_cpu_in_fp64(transform: Transform, shape: Any, dtype: torch.dtype) -> None:
    case = linear_case(*shape, transform, dtype=dtype, integers=True)
    grad = torch.randint(-1, 2, shape[:2], generator=torch.Generator().manual_seed(1))
    expected = gradients(case.to(torch.float64), grad)
    for found, exact in zip(gradients(case.to("cuda"), grad.cuda()), expected, strict=True):
        assert torch.equal(found.cpu(), exact.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(16, 256, 512), (64, 256, 1024), (129, 257, 515), (4, 20, 30)])
@pytest.mark.parametrize("transform", [Transform(), Transform(granule=1), Transform(granule=8)], ids=str)
def test_error_is_no_worse_than_eager_of_the_same_dtype(transform: Transform, shape: Any, dtype: torch.dtype) -> None:
    case = linear_case(*shape, transform, dtype=dtype)
    exact = retrieved_product(case)
    error = root_mean_square(on_gpu(case) - exact)
    eager = root_mean_square(two_eager_matmuls(case.to("cuda")).cpu() - exact)
    assert error <= eager + torch.finfo(dtype).eps / 2 * root_mean_square(exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 130, 4096), (17, 100, 300), (65, 130, 257), (300, 264, 512)], ids=str)
@pytest.mark.parametrize("transform", [Transform(), Transform(granule=8)], ids=["signs", "permuted"])
@pytest.mark.parametrize("bits", BITS)
def test_few_bits_equal_the_specification(bits: int, transform: Transform, shape: Any, dtype: torch.dtype) -> None:
    case = packed_case(bits, *shape, transform, models=2, runs=1 if shape[0] == 300 else None, dtype=dtype)
    assert torch.equal(on_gpu(case), retrieved_product(unpacked(case)).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(16, 256, 1024), (64, 256, 1024), (512, 256, 1024)], ids=str)
@pytest.mark.parametrize("bits", BITS)
def test_few_bits_err_no_more_than_eager(bits: int, shape: Any, dtype: torch.dtype) -> None:
    case = linear_case(*shape, runs=1 if shape[0] == 512 else None, dtype=dtype)
    held = pack(case.delta, bits)
    exact = retrieved_product(case._replace(delta=unpack(held)))
    eager = two_eager_matmuls(case._replace(delta=unpack(held).to(dtype)).to("cuda")).cpu()
    error = root_mean_square(on_gpu(case._replace(delta=held)) - exact)
    assert error <= root_mean_square(eager - exact) + torch.finfo(dtype).eps / 2 * root_mean_square(exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 130, 4096), (17, 100, 300), (65, 130, 257)], ids=str)
@pytest.mark.parametrize("rank", [4, 32])
def test_a_shared_basis_equals_the_specification(rank: int, shape: Any, dtype: torch.dtype) -> None:
    case = linear_case(*shape, models=20, integers=True, dtype=dtype)
    held = basis_of(case, rank)
    # The projection is rounded to the dtype: exact for sums of up to 256.
    case = case._replace(x=case.x * (torch.rand(shape[2]) < 64 / shape[2]))
    y = run_with_basis(case.to("cuda"), Basis(*(value.cuda() for value in held))).cpu()
    assert torch.equal(y, basis_product(case, held).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transform", [Transform(), Transform(granule=3)], ids=["signs", "permuted"])
def test_a_mixed_batch_equals_separate_batches(transform: Transform, dtype: torch.dtype) -> None:
    case = linear_case(16, 133, 240, transform, models=7, slots=3, dtype=dtype).to("cuda")
    mixed = run(case)
    for model in case.ids.unique():
        rows = case.ids == model
        assert torch.equal(mixed[rows], run(case._replace(x=case.x[rows], ids=model[None])))


@pytest.mark.parametrize("transform", [Transform(), Transform(granule=1)], ids=["signs", "permuted"])
def test_a_row_of_an_unknown_model_is_nan_and_no_other_row_is(transform: Transform) -> None:
    case = linear_case(6, 33, 40, transform, models=3, integers=True)
    case.ids[:] = torch.tensor([0, 1, 3, 2, -1, 0])
    y = on_gpu(case)
    case.ids[2] = -1
    others = [0, 1, 3, 4, 5]
    assert y[2].isnan().all()
    assert torch.equal(y[others], reference.superposed_linear(*case)[others])


def test_strided_rows_and_leading_dimensions_are_kept() -> None:
    case = linear_case(12, 33, 40, Transform(granule=1), runs=4, integers=True)
    x = case.x.view(4, 3, 40).repeat_interleave(2, 2)
    y = run(case.to("cuda")._replace(x=x.cuda()[..., ::2]))
    assert torch.equal(y.cpu().view(12, 33), reference.superposed_linear(*case))


def test_fp64_is_refused() -> None:
    with pytest.raises(ValueError, match=r"x must be fp32, fp16 or bf16 on a GPU, got torch.float64"):
        on_gpu(linear_case(3, 5, 7, dtype=torch.float64))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(64, 256), (133, 270), (5, 7)])
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_superposing_is_bit_identical_with_the_cpu(transform: Transform, shape: Any, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(shape, generator=generator).to(dtype)
    finetuned = (base.float() + 0.05 * torch.randn(shape, generator=generator)).to(dtype)
    held = torch.randint(-1000, 1000, shape, generator=generator, dtype=torch.int32)
    rest = 512 / 0.05, KEY, TENSOR, transform
    found, expected = held.cuda(), held.clone()
    superpose_(found, finetuned.cuda(), base.cuda(), *rest)
    superpose_(expected, finetuned, base, *rest)
    assert torch.equal(found.cpu(), expected)
    # What the GPU added the CPU takes away.
    superpose_(taken := found.cpu(), finetuned, base, *rest, subtract=True)
    assert torch.equal(taken, held)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_a_retrieved_weight_equals_the_specification(transform: Transform, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(133, 270, generator=generator).to(dtype)
    delta = torch.randint(-50, 50, (133, 270), generator=generator, dtype=torch.int16)
    rest = 0.25, KEY, TENSOR, transform
    assert torch.equal(retrieve(base.cuda(), delta.cuda(), *rest).cpu(), reference.retrieve(base, delta, *rest))


def test_signs_and_permutations_are_those_of_the_golden_file() -> None:
    golden = json.loads(GOLDEN.read_text())
    key, tensor = model_key(7, "code"), tensor_id("lm_head.weight")
    ones, columns = torch.ones(300, 300, device="cuda"), torch.arange(150.0, device="cuda")[None]
    for stream, transform, line in (
        (fmt.Stream.COLUMN_SIGNS, Transform(row_signs=False), (0, slice(None))),
        (fmt.Stream.ROW_SIGNS, Transform(column_signs=False), (slice(None), 0)),
    ):
        signs = retrieve(ones * 0, ones, 1.0, key, tensor, transform)[line].tolist()
        bits = sum(1 << i for i, sign in enumerate(signs) if sign < 0)
        assert f"{bits:x}" == golden["signs"][f"{(key, tensor)} {stream.name} 300"]
    for name, expected in golden["columns"].items():
        granule, segments = map(int, name.split()[2:])
        moved = retrieve(columns * 0, columns, 1.0, key, tensor, Transform(False, False, granule, segments))
        assert " ".join(str(int(column)) for column in moved[0]) == expected


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_kernel_is_compiled_anew_for_other_models_ids_or_row_counts(dtype: torch.dtype) -> None:
    def serve(models: int, rows: tuple[int, ...]) -> None:
        for m in rows:
            case = linear_case(m, 64, 128, models=models, slots=3, dtype=dtype, integers=True, seed=m)
            assert torch.equal(on_gpu(case), reference.superposed_linear(*case))

    serve(4, (8, 24, 40, 100, 130))  # one of each class of tiles
    before = compiled_variants()
    assert before > 0
    serve(5, (1, 7, 15, 16, 17, 31, 32, 33, 48, 63, 64, 65, 96, 130))
    serve(16, (2, 16, 32, 64, 128))
    serve(1, (1, 3))
    assert compiled_variants() == before


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_no_kernel_is_compiled_anew_for_other_prefills(dtype: torch.dtype) -> None:
    def serve(models: int, rows: int, runs: int) -> None:
        case = linear_case(rows, 64, 128, models=models, slots=1, runs=runs, dtype=dtype, integers=True, seed=rows)
        assert torch.equal(on_gpu(case), reference.superposed_linear(*case))

    serve(4, 1024, 1)
    serve(1, 1024, 1024)
    before = compiled_variants()
    for models, rows, runs in ((5, 600, 1), (16, 2048, 2), (9, 777, 1), (1, 1030, 1030), (64, 1024, 1)):
        serve(models, rows, runs)
    assert compiled_variants() == before


@pytest.mark.parametrize("transform", [Transform(), Transform(granule=1)], ids=["signs", "permuted"])
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_a_call_never_waits_for_the_gpu(transform: Transform) -> None:
    case = linear_case(6, 33, 40, transform).to("cuda")
    run(case)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(case)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("transform", [Transform(), Transform(granule=1)], ids=["signs", "permuted"])
def test_a_captured_graph_serves_other_ids(transform: Transform) -> None:
    case = linear_case(6, 33, 40, transform, integers=True)
    held = case.to("cuda")
    run(held)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run(held)
    for ids in (case.ids, case.ids.roll(1), torch.full_like(case.ids, -1)):
        held.ids.copy_(ids)
        graph.replay()
        assert torch.equal(y.cpu(), reference.superposed_linear(*case._replace(ids=ids)))


@pytest.mark.parametrize("transform", MIXED.values(), ids=MIXED)
def test_columns_are_mixed_as_on_a_cpu(transform: Transform) -> None:
    case = linear_case(9, 130, 257, transform, models=5)
    expected = retrieved_product(case)
    call, inverses = with_inverses(case)
    x, weight, bias, biases, delta, *rest = call.to("cuda")
    x.requires_grad_()
    on_device = None if inverses is None else inverses.cuda()
    y = superposed_linear(x, weight, bias, delta, *rest, biases=biases, inverses=on_device)
    torch.testing.assert_close(y.detach().cpu().double(), expected, rtol=1e-5, atol=budget(case, expected))
    grad = normal(9, 130)
    y.backward(grad.cuda())
    back = retrieved_product(case._replace(x=grad, bias=None, biases=None), transposed=True)
    torch.testing.assert_close(x.grad.cpu().double(), back, rtol=1e-5, atol=budget(case, back))
    base, tuned = normal(130, 257), normal(130, 257, seed=1)
    held = {device: torch.zeros(130, 257, dtype=torch.int32, device=device) for device in ("cpu", "cuda")}
    for device, sums in held.items():
        superpose_(sums, tuned.to(device), base.to(device), 512.0, KEY, TENSOR, transform)
    assert torch.equal(held["cuda"].cpu(), held["cpu"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2048, 1024, 4096), (64, 1024, 4096), (8, 1024, 4096)], ids=str)
def test_repeated_calls_agree_to_the_bit(shape: Any, dtype: torch.dtype) -> None:
    # A race in a pipeline of loads would show in some of many calls, under load, and not in small ones.
    case = linear_case(*shape, models=1, slots=1, runs=1, dtype=dtype).to("cuda")
    first = run(case)
    differing = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(50):
        differing += (run(case) != first).sum()
    assert not first.isnan().any()
    assert int(differing) == 0


@pytest.mark.parametrize("transform", [Transform(False, False, matrix=1), Transform(False, False, matrix=2)], ids=str)
def test_a_rotation_and_a_diagonal_are_captured_once_they_are_prepared(transform: Transform) -> None:
    case = linear_case(6, 33, 40, transform, integers=True).to("cuda")
    prepare(transform, 40, case.x.device)
    expected = run(case)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run(case)
    graph.replay()
    assert torch.equal(y, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [16, 4])
def test_a_shard_has_the_signs_of_its_origin(bits: int, dtype: torch.dtype) -> None:
    def serve(m: int, first_row: int, first_column: int) -> None:
        transform = Transform(first_row=first_row, first_column=first_column)
        options: dict[str, Any] = {"models": 3, "slots": 2, "dtype": dtype}
        if bits == 16:
            case = plain = linear_case(m, 130, 256, transform, integers=True, **options)
        else:
            case = packed_case(bits, m, 130, 256, transform, **options)
            plain = unpacked(case)
        assert torch.equal(on_gpu(case), retrieved_product(plain).to(dtype))

    for m in (3, 40, 300):
        for origin in ((0, 37), (37, 0), (128, 256), (2368, 1)):
            serve(m, *origin)
        before = compiled_variants()
        for origin in ((0, 1), (1000, 0), (1024, 128), (1, 18944)):  # others of the same kinds
            serve(m, *origin)
        assert compiled_variants() == before
