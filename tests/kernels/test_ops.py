"""The operators as torch sees them: registration, gradients, refusals, compilation, and life without Triton."""

import re
import warnings
from typing import Any

import pytest
import torch
from cases import SHAPES, TENSOR, TRANSFORMS, LinearCase, linear_case, retrieved_product, run
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from randes_kernels import ops, reference, retrieve, superpose_
from randes_kernels.format import Transform, model_key

KEY = model_key(0, "model")
OPS = torch.ops.randes


def raw(case: LinearCase, transposed: bool = False) -> tuple[Any, ...]:
    """The arguments of the registered operator: a schema holds a transform as integers."""
    return *case[:-1], list(map(int, case.transform)), transposed


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("transform", [Transform(), Transform(granule=3)], ids=["signs", "permuted"])
@pytest.mark.parametrize("shape", SHAPES)
def test_opcheck_superposed_linear(shape: Any, transform: Transform, transposed: bool) -> None:
    case = linear_case(*shape, transform, bias=not transposed, transposed=transposed)
    torch.library.opcheck(OPS.superposed_linear.default, raw(case, transposed))
    for name in ("x", "weight", "bias"):
        value = getattr(case, name)
        if value is not None:
            value.requires_grad_()
    torch.library.opcheck(OPS.superposed_linear.default, raw(case, transposed))


def test_opcheck_superpose_and_retrieve() -> None:
    base = torch.randn(5, 7)
    transform = [1, 1, 1, 1]
    accumulator = torch.zeros(5, 7, dtype=torch.int32)
    torch.library.opcheck(OPS.superpose_.default, (accumulator, base + 1, base, 8.0, KEY, TENSOR, transform, False))
    torch.library.opcheck(OPS.retrieve.default, (base, accumulator, 0.5, KEY, TENSOR, transform))


@pytest.mark.parametrize("own_biases", [False, True])
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_gradients_of_x_weight_and_bias(transform: Transform, own_biases: bool) -> None:
    case = linear_case(6, 5, 7, transform, models=3, runs=3, own_biases=own_biases, dtype=torch.float64)
    case.ids[:] = torch.tensor([1, -1, 0])
    case.slots[:] = torch.tensor([1, 0, -1])

    def layer(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return run(case._replace(x=x, weight=weight, bias=bias))

    leaves = [case.x.requires_grad_(), case.weight.requires_grad_(), case.bias.requires_grad_()]  # type: ignore[union-attr]
    assert torch.autograd.gradcheck(layer, leaves)
    assert torch.autograd.gradgradcheck(layer, leaves)


def test_a_frozen_weight_gets_no_gradient_and_x_still_does() -> None:
    case = linear_case(6, 5, 7, Transform(granule=1), dtype=torch.float64)
    case.x.requires_grad_()
    y = run(case)
    grad = torch.randn_like(y)
    y.backward(grad)
    back = case._replace(x=grad, bias=None, biases=None)
    torch.testing.assert_close(case.x.grad, retrieved_product(back, transposed=True))
    assert case.weight.grad is None


def test_the_bias_of_the_base_learns_from_the_rows_that_used_it() -> None:
    case = linear_case(6, 5, 7, models=2, runs=3)
    case.ids[:] = torch.tensor([0, -1, 1])
    for biases, rows in ((case.biases, 2), (None, 6)):
        bias = torch.zeros(5, requires_grad=True)
        run(case._replace(bias=bias, biases=biases)).sum().backward()
        assert torch.equal(bias.grad, torch.full((5,), float(rows)))  # type: ignore[arg-type]


@pytest.mark.parametrize("leading", [(), (1,), (6,), (2, 3), (3, 1, 2), (0,), (2, 0)])
def test_leading_dimensions_are_kept(leading: tuple[int, ...]) -> None:
    case = linear_case(6, 5, 7, Transform(granule=1), integers=True)
    rows = torch.Size(leading).numel()
    case = case._replace(x=case.x[:rows], ids=case.ids[: max(rows, 1)])
    y = run(case._replace(x=case.x.view(*leading, 7)))
    assert y.shape == (*leading, 5)
    if rows:
        assert torch.equal(y.view(rows, 5), reference.superposed_linear(*case))


def test_a_transposed_x_with_leading_dimensions_is_read_by_its_strides() -> None:
    case = linear_case(6, 5, 7, integers=True)
    x = case.x.view(2, 3, 7).transpose(0, 1).contiguous().transpose(0, 1)
    assert not x.is_contiguous()
    assert torch.equal(run(case._replace(x=x)).view(6, 5), run(case))


WRONG = {
    "x": (torch.zeros(6, 8), "x must be (..., K) with K = 7, got (6, 8)"),
    "bias": (torch.zeros(7), "bias must be (5,) torch.float32, got (7,) torch.float32"),
    "biases": (torch.zeros(4, 7), "biases must be (4, 5) torch.float32, got (4, 7) torch.float32"),
    "delta": (torch.zeros(2, 7, 5), "delta must be (2, 5, 7) torch.float32, got (2, 7, 5) torch.float32"),
    "keys": (torch.zeros(4, 1).long(), "keys must have 1 dimensions, got shape (4, 1)"),
    "scale": (torch.zeros(3), "scale must be (4,) torch.float32, got (3,) torch.float32"),
    "slots": (torch.zeros(5).int(), "slots must be (4,) torch.int32, got (5,) torch.int32"),
    "ids": (torch.zeros(6, 1).int(), "ids must have 1 dimensions, got shape (6, 1)"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_shape_is_refused_by_name(name: str) -> None:
    value, message = WRONG[name]
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        run(linear_case(6, 5, 7)._replace(**{name: value}))


@pytest.mark.parametrize("name", ["bias", "biases", "delta", "keys", "scale", "slots", "ids"])
def test_a_wrong_dtype_is_refused_by_name(name: str) -> None:
    case = linear_case(6, 5, 7)
    value = getattr(case, name)
    shape = re.escape(str(tuple(value.shape)))
    message = rf"^{name} must be {shape} {value.dtype}, got {shape} torch.float16$"
    with pytest.raises(ValueError, match=message):
        run(case._replace(**{name: value.half()}))


def test_an_input_of_another_dtype_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^x must be torch.float32 as weight is, got torch.float16$"):
        run(linear_case(6, 5, 7)._replace(x=torch.zeros(6, 7).half()))


def test_biases_without_a_bias_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^biases needs a base bias beside it, got bias = None$"):
        run(linear_case(6, 5, 7)._replace(bias=None))


@pytest.mark.parametrize("count", [0, 4, 12])
def test_ids_that_do_not_divide_the_rows_are_refused(count: int) -> None:
    message = f"^ids must divide the 6 rows of x into equal runs, got {count} ids$"
    with pytest.raises(ValueError, match=message):
        run(linear_case(6, 5, 7)._replace(ids=torch.zeros(count, dtype=torch.int32)))


def test_an_unknown_id_is_refused_on_a_cpu() -> None:
    case = linear_case(6, 5, 7)
    case.ids[0] = 4
    with pytest.raises(IndexError, match="ids must lie in -1 to 3"):
        run(case)


def test_superposing_refuses_what_does_not_fit() -> None:
    base, held = torch.zeros(5, 7), torch.zeros(5, 7, dtype=torch.int32)
    rest = 1.0, KEY, TENSOR, Transform()
    for accumulator, finetuned, against, message in (
        (held[:, :6], base, base, "accumulator must be (N, K) = (5, 7), got (5, 6)"),
        (held, base[:4], base, "finetuned must be (N, K) = (5, 7), got (4, 7)"),
        (held[0], base[0], base[0], "accumulator must be (N, K) = (7,), got (7,)"),
        (held.float(), base, base, "accumulator must be int32 with rows of stride 1, got torch.float32, 1"),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            superpose_(accumulator, finetuned, against, *rest)


def test_retrieving_refuses_what_does_not_fit() -> None:
    base, rest = torch.zeros(5, 7), (1.0, KEY, TENSOR, Transform())
    for delta, against, shapes in ((base[:4], base, "(5, 7), got (4, 7)"), (base[0], base[0], "(7,), got (7,)")):
        with pytest.raises(ValueError, match=re.escape(f"delta must be (N, K) = {shapes}")):
            retrieve(against, delta, *rest)


def test_a_round_trip_through_the_operators_gives_the_fine_tune_back() -> None:
    base = torch.randint(-9, 9, (33, 70)).float()
    finetuned, held = base + torch.randint(-9, 9, (33, 70)), torch.zeros(33, 70, dtype=torch.int32)
    superpose_(held, finetuned, base, 8.0, KEY, TENSOR, Transform(granule=3))
    assert torch.equal(retrieve(base, held, 1 / 8, KEY, TENSOR, Transform(granule=3)), finetuned)
    superpose_(held, finetuned, base, 8.0, KEY, TENSOR, Transform(granule=3), subtract=True)
    assert not held.any()


def test_a_call_that_nobody_watches_skips_the_dispatcher_and_any_other_does_not() -> None:
    case = linear_case(6, 5, 7, integers=True)
    assert case.bias is not None
    operands = case.x, case.weight, case.bias
    assert ops._nobody_watches(*operands)
    for place in range(3):
        leaves = [value.clone().requires_grad_(other == place) for other, value in enumerate(operands)]
        assert not ops._nobody_watches(*leaves)
        with torch.no_grad():
            assert ops._nobody_watches(*leaves)
    with FakeTensorMode():
        assert not ops._nobody_watches(*operands)
    with forward_ad.dual_level():
        assert not ops._nobody_watches(*operands)
    assert not torch.vmap(lambda x: torch.tensor(ops._nobody_watches(x, case.weight, None)))(case.x).any()
    assert not ops._nobody_watches(case.x.to("meta"), case.weight, None)
    with torch.device("meta"):
        assert not ops._nobody_watches(*operands)

    class Subclass(Tensor):
        pass

    assert not ops._nobody_watches(case.x, case.weight.as_subclass(Subclass), None)


def test_a_traced_program_follows_its_ids() -> None:
    case = linear_case(6, 5, 7, models=3, slots=1, integers=True)
    case.slots[:] = 0
    other = case._replace(ids=torch.full_like(case.ids, -1))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(lambda x, ids: run(case._replace(x=x, ids=ids)), (case.x, case.ids))
    assert torch.equal(traced(other.x, other.ids), run(other))


def test_a_default_device_moves_nothing() -> None:
    case = linear_case(40, 5, 7, models=3, runs=40, integers=True)
    with torch.device("meta"), torch.no_grad():
        y = run(case)
    assert torch.equal(y, run(case))


def test_tools_that_watch_see_the_operator() -> None:
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    case = linear_case(6, 5, 7, integers=True)
    with torch.no_grad(), Watch():
        y = run(case)
    assert "randes.superposed_linear.default" in seen
    assert torch.equal(y, run(case))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch's own
def test_a_derivative_on_the_way_forward_is_refused_and_never_wrong() -> None:
    case = linear_case(6, 16, 12, runs=3)
    tangent = torch.ones_like(case.x)

    def layer(x: Tensor) -> Tensor:
        return run(case._replace(x=x))

    for taken in (torch.func.jvp, lambda f, x, t: torch.func.jacfwd(f)(*x)):
        with pytest.raises(NotImplementedError, match="a superposed layer has no forward-mode derivative"):
            taken(layer, (case.x,), (tangent,))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="take it in reverse"):
        layer(forward_ad.make_dual(case.x, tangent))
    with forward_ad.dual_level():
        assert torch.equal(layer(case.x), run(case))  # nothing is derived here
