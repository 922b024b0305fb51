"""What the public functions hand to the kernels, which trust their caller: strides and segments.

A GPU would run these launches; here they are redirected to the interpreter.
"""

from collections.abc import Callable

import pytest
import torch
from cases import TENSOR, linear_case, run
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from randes_kernels import gpu, reference, retrieve, superpose_
from randes_kernels.format import Transform, model_key
from randes_kernels.kernels.weight_side import described

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KEY = model_key(0, "model")


@pytest.fixture(autouse=True)
def _kernels_run_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, place in (("superposed_linear", 10), ("superpose_", 6), ("retrieve", 5)):
        kernel = getattr(gpu, name)

        def launch(*arguments, kernel=kernel, place=place):  # type: ignore[no-untyped-def]
            return kernel(*arguments[:place], Transform(*arguments[place]), *arguments[place + 1 :])

        monkeypatch.setattr(torch.ops.randes, name, launch)


def weights(n: int, k: int) -> tuple[Tensor, Tensor]:
    """A base and a delta of whole numbers."""
    base, delta = torch.randint(-9, 9, (2, n, k), generator=torch.Generator().manual_seed(0)).float()
    return base, delta


def every_second(value: Tensor) -> Tensor:
    """The same values as a view that strides over others."""
    other = torch.stack((value, value.flip(-1)), -1)[..., 0]
    assert torch.equal(other, value)
    assert other.stride(-1) == 2
    return other


def assert_right_or_refused(name: str, result: Callable[[], Tensor], expected: Tensor) -> None:
    """Either the right answer, or a ``ValueError`` that names the argument; never another answer."""
    try:
        found = result()
    except ValueError as error:
        if not str(error).startswith(name):
            raise
    else:
        assert torch.equal(found.cpu(), expected)


@pytest.mark.parametrize("name", ["x", "weight", "delta", "ids", "keys", "scale", "slots", "bias", "biases"])
def test_a_strided_argument_is_read_by_its_strides_or_refused(name: str) -> None:
    case = linear_case(6, 33, 40, integers=True, seed=3)
    expected = reference.superposed_linear(*case)
    held = case.to(DEVICE)
    strided = held._replace(**{name: every_second(getattr(held, name))})
    assert_right_or_refused(name, lambda: run(strided), expected)


@pytest.mark.parametrize("name", ["accumulator", "finetuned", "base"])
def test_superposing_a_strided_tensor_is_right_or_refused(name: str) -> None:
    base, delta = weights(5, 7)
    tensors = {"accumulator": torch.zeros(5, 7, dtype=torch.int32), "finetuned": base + delta, "base": base}
    expected = tensors["accumulator"].clone()
    reference.superpose_(expected, base + delta, base, 4.0, KEY, TENSOR, Transform(), False)
    held = {key: value.to(DEVICE) for key, value in tensors.items()}
    held[name] = every_second(held[name])

    def result() -> Tensor:
        superpose_(*held.values(), 4.0, KEY, TENSOR, Transform())
        return held["accumulator"]

    assert_right_or_refused(name, result, expected)


@pytest.mark.parametrize("name", ["base", "delta"])
def test_retrieving_from_a_strided_tensor_is_right_or_refused(name: str) -> None:
    base, delta = weights(5, 7)
    expected = reference.retrieve(base, delta, 0.5, KEY, TENSOR, Transform())
    held = {"base": base.to(DEVICE), "delta": delta.to(DEVICE)}
    held[name] = every_second(held[name])
    assert_right_or_refused(name, lambda: retrieve(*held.values(), 0.5, KEY, TENSOR, Transform()), expected)


@pytest.mark.parametrize("operator", ["superposed_linear", "superpose_", "retrieve"])
def test_columns_that_do_not_divide_into_segments_are_refused(operator: str) -> None:
    transform = Transform(granule=1, segments=2)
    base = torch.zeros(3, 7, device=DEVICE)[:2]  # the third row gives way to writes past the end
    held = torch.zeros(3, 7, dtype=torch.int32, device=DEVICE)[:2]
    calls: dict[str, Callable[[], object]] = {
        "superposed_linear": lambda: run(linear_case(1, 5, 7, transform).to(DEVICE)),
        "superpose_": lambda: superpose_(held, base + 1, base, 1.0, KEY, TENSOR, transform),
        "retrieve": lambda: retrieve(base, held, 1.0, KEY, TENSOR, transform),
    }
    with pytest.raises(ValueError, match="segments = 2"):
        calls[operator]()


@pytest.mark.parametrize("transform", [Transform(), Transform(granule=1)], ids=["signs", "permuted"])
def test_an_unknown_model_is_nan_in_the_backward_pass_too(transform: Transform) -> None:
    case = linear_case(3, 5, 7, transform, bias=False, integers=True, transposed=True)
    case.ids[:] = torch.tensor([0, 4, -1])
    grad_x = gpu.superposed_linear(*case.to(DEVICE), True).cpu()
    assert grad_x[1].isnan().all()
    assert not grad_x[[0, 2]].isnan().any()


@pytest.mark.parametrize("shape", [(5, 16), (1, 8), (64, 128)])
def test_descriptors_are_what_tritons_own_would_be(shape: tuple[int, int]) -> None:
    x, block = torch.zeros(shape, dtype=torch.float16), [16, 64]
    made, own = described(x, *shape, block), TensorDescriptor.from_tensor(x, block)
    assert type(made) is type(own)
    assert made.base is own.base
    assert (made.shape, made.strides) == (list(own.shape), list(own.strides))
    assert (made.block_shape, made.padding) == (own.block_shape, own.padding)
