"""Rotation, diagonal and dense: superposed exactly, retrieved by explicit matrices, served by the same, pinned."""

from hashlib import blake2b
from statistics import NormalDist
from typing import Any

import pytest
import torch
from cases import TENSOR, LinearCase, linear_case, normal, retrieved_product
from test_format import plain_word
from torch import Tensor

from randes_kernels import gpu, mixing, pack, reference, retrieve, slices, superpose_, superposed_linear, unpack
from randes_kernels.format import Matrix, Stream, Transform, model_key
from randes_kernels.hadamard import _sylvester, hadamard
from randes_kernels.packing import operands

KEY = model_key(0, "model")
MATRICES = [Matrix.ROTATION, Matrix.DIAGONAL, Matrix.DENSE]
TRANSFORMS = {
    f"{'two-sided ' if rows else ''}{matrix.name.lower()}": Transform(rows, False, matrix=matrix)
    for matrix in MATRICES
    for rows in (True, False)
}
plain = pytest.mark.parametrize(
    "transform", [TRANSFORMS[m.name.lower()] for m in MATRICES], ids=["rotation", "diagonal", "dense"]
)
every = pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
shapes = pytest.mark.parametrize("shape", [(5, 33, 70), (4, 5, 7), (2, 3, 1)], ids=str)


def with_inverses(case: LinearCase) -> tuple[LinearCase, Tensor | None]:
    """The same layer as a call takes it: of a dense matrix the inverses beside, and their units in the scale."""
    if case.transform.matrix != Matrix.DENSE:
        return case, None
    inverses, units = mixing.inverses_of(case.keys.tolist(), case.tensor, case.weight.shape[1])
    return case._replace(scale=case.scale * torch.tensor(units)), inverses


def run(case: LinearCase) -> Tensor:
    (x, weight, bias, biases, delta, *rest), inverses = with_inverses(case)
    return superposed_linear(x, weight, bias, delta, *rest, biases=biases, inverses=inverses)


def budget(case: LinearCase, expected: Tensor) -> float:
    """What fp32 may lose: of a matrix whose reciprocals are large more, in units of the answer's own size."""
    return 2e-5 * float(expected.abs().max())


# ---------------------------------------------------------------- what the bits are


def test_magnitudes_are_quantiles_of_the_normal_distribution_and_none_is_zero() -> None:
    places = [0.5 + (i + 0.5) / 256 for i in range(128)]
    assert list(mixing.MAGNITUDES) == [round(NormalDist().inv_cdf(place) * 1024) for place in places]
    assert min(mixing.MAGNITUDES) > 0
    assert 0.99 < sum(m**2 for m in mixing.MAGNITUDES) / 128 / 1024**2 < 1
    assert max(mixing.MAGNITUDES) / 1024 < mixing.AMPLIFIES[Matrix.DIAGONAL]


@pytest.mark.parametrize("stream", [Stream.DIAGONAL, Stream.DENSE])
def test_normal_numbers_are_chosen_by_the_bytes_of_the_stream(stream: Stream) -> None:
    found = mixing.diagonal(KEY, TENSOR, 81) if stream == Stream.DIAGONAL else mixing.dense(KEY, TENSOR, 9).flatten()
    for place, value in enumerate(found.tolist()):
        byte = plain_word(KEY, TENSOR, stream, place // 4) >> (8 * (place % 4)) & 255
        expected = mixing.MAGNITUDES[byte & 127] / 1024 * (-1 if byte & 128 else 1)
        assert value == expected * (1 if stream == Stream.DIAGONAL else 1 / 4)


def test_golden_bits() -> None:
    """Pinned for good: a store is these bits."""
    k = 70
    found = {
        "diagonal": (mixing.diagonal(KEY, TENSOR, k) * 1024).to(torch.int16),
        "dense": (mixing.dense(KEY, TENSOR, k) * 1024 * 8).to(torch.int16),
        "signs": mixing.rotation(KEY, TENSOR, k).signs,
        "target": mixing.rotation(KEY, TENSOR, k).target.to(torch.int16),
        "rotation": (reference.column_matrix(KEY, TENSOR, k, TRANSFORMS["rotation"]) * 1024).to(torch.int16),
    }
    assert {name: blake2b(value.numpy().tobytes(), digest_size=8).hexdigest() for name, value in found.items()} == {
        "diagonal": "e212f2fbbb005869", "dense": "af84797acf6d99e5",
        "signs": "2f62f5728df830c3", "target": "0a487ab97d5970af",
        "rotation": "246afe68e7ff0ab5",
    }  # fmt: skip


@pytest.mark.parametrize("k", [1, 3, 4, 70, 96, 256])
def test_a_rotation_is_orthogonal_to_the_last_bit(k: int) -> None:
    eye = torch.eye(k, dtype=torch.float64)
    mixer = mixing.Mixer(KEY, TENSOR, k, Matrix.ROTATION)
    found = mixer.turn(eye)
    assert torch.equal(found, reference.column_matrix(KEY, TENSOR, k, TRANSFORMS["rotation"]))
    assert torch.equal(found @ found.mT, eye)
    assert torch.equal(mixer.back(found), eye)


@pytest.mark.parametrize("delta", ["normal", "rank one", "one column", "constant"])
def test_a_rotation_decorrelates_as_haars_does(delta: str) -> None:
    """The same delta in five models, the worst case: cosines of what lies in D."""
    k, models, seeds = 96, 5, 6
    generator = torch.Generator().manual_seed(0)
    one = {
        "normal": torch.randn(16, k, generator=generator),
        "rank one": torch.outer(torch.randn(16, generator=generator), torch.randn(k, generator=generator)),
        "one column": torch.zeros(16, k).index_fill_(1, torch.tensor([3]), 1.0),
        "constant": torch.ones(16, k),
    }[delta].double()

    def mean_square(matrices: list[Tensor]) -> float:
        turned = torch.stack([(one @ matrix).flatten() for matrix in matrices])
        cosines = torch.corrcoef(torch.cat((turned, -turned), 1))  # of mean zero: cosines
        return float(cosines.triu(1).square().sum()) / (models * (models - 1) / 2)

    ours, haar = [], []
    for seed in range(seeds):
        keys = [model_key(seed, str(model)) for model in range(models)]
        ours.append(mean_square([reference.column_matrix(key, TENSOR, k, TRANSFORMS["rotation"]) for key in keys]))
        drawn = [torch.linalg.qr(torch.randn(k, k, generator=generator, dtype=torch.float64)) for _ in range(models)]
        haar.append(mean_square([q * r.diagonal().sign() for q, r in drawn]))
    # Sixty cosines each: their mean square is known to a fifth.
    assert sum(ours) < 1.8 * sum(haar)


# ---------------------------------------------------------------- superposing and retrieving


@every
@shapes
def test_integers_are_the_specifications_on_both_devices_and_come_back(transform: Transform, shape: Any) -> None:
    _, n, k = shape
    base = normal(n, k)
    tuned = {model_key(0, str(model)): base + 0.1 * normal(n, k, seed=1 + model) for model in range(3)}
    before = torch.randint(-(2**20), 2**20, (n, k), dtype=torch.int32)
    sums = {}
    for name, add in (("reference", reference.superpose_), ("cpu", slices.superpose_), ("gpu", gpu.superpose_)):
        held = sums[name] = before.clone()
        for key, weight in tuned.items() if name != "gpu" else reversed(tuned.items()):
            add(held, weight, base, 5120.0, key, TENSOR, transform, False)
    assert torch.equal(sums["cpu"], sums["reference"])
    assert torch.equal(sums["gpu"], sums["reference"])
    assert not torch.equal(sums["cpu"], before)
    for key, weight in tuned.items():
        superpose_(sums["cpu"], weight, base, 5120.0, key, TENSOR, transform, subtract=True)
    assert torch.equal(sums["cpu"], before)


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_what_is_retrieved_is_the_formula_with_explicit_matrices(transform: Transform, dtype: torch.dtype) -> None:
    base, delta = normal(33, 70).to(dtype), torch.randint(-4000, 4000, (33, 70), dtype=torch.int16)
    expected = reference.retrieve(base, delta, 2.0**-12, KEY, TENSOR, transform)
    for retrieving in (retrieve, gpu.retrieve):
        found = retrieving(base, delta, 2.0**-12, KEY, TENSOR, transform)
        assert found.dtype == dtype
        size = float(expected.abs().max())
        torch.testing.assert_close(found, expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=2e-5 * size)


@pytest.mark.parametrize("matrix", MATRICES)
def test_one_model_comes_back_whole(matrix: Matrix) -> None:
    base = normal(40, 96)
    tuned = base + 0.01 * normal(40, 96, seed=1)
    held, transform = torch.zeros(40, 96, dtype=torch.int32), Transform(True, False, matrix=matrix)
    superpose_(held, tuned, base, 2.0**9 / 0.01, KEY, TENSOR, transform)
    found = retrieve(base, held, 0.01 * 2.0**-9, KEY, TENSOR, transform)
    # Of unit size each, D of these too; a rounding is amplified as interference is.
    assert 0.7 < float(held.double().square().mean().sqrt()) * 2**-9 < 1.5
    error = float((found - tuned).square().mean().sqrt() / 0.01)
    assert error < {Matrix.ROTATION: 1e-3, Matrix.DIAGONAL: 2e-2, Matrix.DENSE: 0.3}[matrix]


# ---------------------------------------------------------------- serving


@every
@shapes
@pytest.mark.parametrize("runs", [1, None])
def test_a_mixed_batch_is_each_rows_own_model(transform: Transform, shape: Any, runs: int | None) -> None:
    case = linear_case(*shape, transform, runs=runs)
    expected = retrieved_product(case)
    error = budget(case, expected)
    torch.testing.assert_close(run(case).double(), expected, rtol=1e-5, atol=error)
    if runs is None:
        call, inverses = with_inverses(case)
        on_gpu = gpu.superposed_linear(*call, False, inverses=inverses)
        torch.testing.assert_close(on_gpu.double(), expected, rtol=1e-5, atol=error)


@every
def test_backward_is_the_transpose_on_both_devices(transform: Transform) -> None:
    case = linear_case(6, 33, 70, transform, bias=False, transposed=True)
    expected = retrieved_product(case, transposed=True)
    call, inverses = with_inverses(case)
    on_gpu = gpu.superposed_linear(*call, True, inverses=inverses)
    torch.testing.assert_close(on_gpu.double(), expected, rtol=1e-5, atol=budget(case, expected))
    forward = linear_case(6, 33, 70, transform, dtype=torch.float64)
    x = forward.x.requires_grad_()
    grad = torch.randn(6, 33, dtype=torch.float64)
    run(forward).backward(grad)
    back = retrieved_product(forward._replace(x=grad, bias=None, biases=None), transposed=True)
    torch.testing.assert_close(x.grad, back, rtol=1e-5, atol=budget(forward, back))


@plain
@pytest.mark.parametrize("bits", [4])
def test_of_a_packed_superposition(transform: Transform, bits: int) -> None:
    case = linear_case(5, 40, 130, transform)
    packed = pack(case.delta, bits)  # type: ignore[arg-type]
    expected = retrieved_product(case._replace(delta=unpack(packed)))
    call, inverses = with_inverses(case._replace(delta=packed))
    for y in (run(case._replace(delta=packed)), gpu.superposed_linear(
        *call._replace(delta=packed.words), False, *operands(packed), inverses=inverses
    )):  # fmt: skip
        torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=budget(case, expected))


@plain
def test_half_precision_holds_turned_activations(transform: Transform) -> None:
    """Though reciprocals of the diagonal reach 205 and inverses more, and activations 1000."""
    case = linear_case(4, 16, 64, transform, bias=False)
    case = case._replace(x=case.x * 1000)
    expected = retrieved_product(case)
    half, inverses = with_inverses(case)
    for y in (run(case.to(torch.float16)), gpu.superposed_linear(*half.to(torch.float16), False, inverses=inverses)):
        representable = expected.abs() < 60000
        assert torch.isfinite(y[representable]).all()
        error = (y[representable].double() - expected[representable]).abs().max() / expected.abs().max()
        assert error < 0.01


def test_an_unknown_id_is_nan_on_a_gpu_whatever_mixes_columns() -> None:
    for matrix in MATRICES:
        transform = Transform(False, False, matrix=matrix)
        case = linear_case(4, 16, 20, transform)
        case.ids[:] = torch.tensor([0, 9, -1, -2])
        call, inverses = with_inverses(case)
        y = gpu.superposed_linear(*call, False, inverses=inverses)
        assert torch.isnan(y).all(1).tolist() == [False, True, False, True]
        back = linear_case(4, 16, 20, transform, bias=False, transposed=True)._replace(ids=case.ids)
        call, inverses = with_inverses(back)
        assert torch.isnan(gpu.superposed_linear(*call, True, inverses=inverses)).any(1).tolist() == [
            False, True, False, True,
        ]  # fmt: skip


@plain
def test_torchs_own_checks(transform: Transform) -> None:
    case, inverses = with_inverses(linear_case(4, 5, 7, transform))
    case.x.requires_grad_()
    arguments = *case[:-1], list(map(int, case.transform)), False, None, [], None, None, inverses
    torch.library.opcheck(torch.ops.randes.superposed_linear.default, arguments)
    base, held = torch.randn(5, 7), torch.zeros(5, 7, dtype=torch.int32)
    own = list(map(int, transform))
    torch.library.opcheck(torch.ops.randes.superpose_.default, (held, base + 1, base, 8.0, KEY, TENSOR, own, False))


def test_what_does_not_fit_is_refused() -> None:
    dense = linear_case(4, 5, 7, TRANSFORMS["dense"])
    x, weight, bias, _, delta, *rest = dense
    with pytest.raises(
        ValueError, match=r"^inverses must be there where the transform's matrix is dense alone, got None"
    ):
        superposed_linear(x, weight, bias, delta, *rest)
    with pytest.raises(ValueError, match=r"^inverses must be \(4, 7, 7\) torch.float32 on cpu, got \(4, 7, 5\)"):
        superposed_linear(x, weight, bias, delta, *rest, inverses=torch.zeros(4, 7, 5))
    for transform in (Transform(matrix=1), Transform(True, False, 1, 1, 2), Transform(True, False, matrix=9)):
        with pytest.raises(ValueError, match=r"^transform must have"):
            superposed_linear(x, weight, bias, delta, *rest[:-1], transform)


def test_hadamard_matrices_are_kept_where_they_are_multiplied_with() -> None:
    _sylvester.cache_clear()
    prepared = normal(3, 1024 + 64)
    with torch.inference_mode():
        hadamard(prepared)
    made = _sylvester.cache_info().misses
    rows = prepared.clone().requires_grad_()
    hadamard(rows).sum().backward()  # what was kept in inference serves training
    assert _sylvester.cache_info().misses == made == 2
    assert rows.grad is not None


@pytest.mark.parametrize("matrix", MATRICES)
def test_preparing_puts_constants_on_a_device_before_a_call(matrix: Matrix) -> None:
    transform = Transform(True, False, matrix=int(matrix))
    _sylvester.cache_clear()
    gpu.reciprocals_on.cache_clear()
    gpu.prepare(transform, 256, torch.device("cpu"))
    assert _sylvester.cache_info().misses == (matrix == Matrix.ROTATION)
    assert gpu.reciprocals_on.cache_info().misses == (matrix == Matrix.DIAGONAL)
