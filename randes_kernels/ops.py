"""The operators, registered with torch.library once: Triton on CUDA, plain torch on the CPU, fakes, autograd.

Model ids, keys, gains and slots are tensors, so nothing is guarded or compiled anew when a model is added or a
batch changes its mix. Without Triton this module imports and serves the CPU; a CUDA tensor then raises.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from randes_kernels import cpu, slices
from randes_kernels.checks import check_basis, check_inverses, check_linear, check_pair, check_transform
from randes_kernels.format import Transform
from randes_kernels.lowrank import Basis, own_product
from randes_kernels.packing import Packed, of_operands, operands, unpack

library = torch.library.Library("randes", "DEF")
library.define(
    "superposed_linear(Tensor x, Tensor weight, Tensor? bias, Tensor? biases, Tensor delta, Tensor ids, Tensor keys,"
    " Tensor scale, Tensor slots, int tensor, int[] transform, bool transposed, Tensor? steps=None, int[] packing=[],"
    " Tensor? directions=None, Tensor? corrections=None, Tensor? inverses=None) -> Tensor"
)
library.define(
    "superpose_(Tensor(a!) accumulator, Tensor finetuned, Tensor base, float rate, int key, int tensor,"
    " int[] transform, bool subtract) -> ()"
)
library.define("retrieve(Tensor base, Tensor delta, float scale, int key, int tensor, int[] transform) -> Tensor")


def superposed_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    delta: Tensor | Packed,
    ids: Tensor,
    keys: Tensor,
    scale: Tensor,
    slots: Tensor,
    tensor: int,
    transform: Transform,
    *,
    biases: Tensor | None = None,
    basis: Basis | None = None,
    inverses: Tensor | None = None,
) -> Tensor:
    """The linear layer of many models at once: ``y = x Ŵ_jᵀ + b_j`` for the model j of each row, Ŵ_j never built.

    x: (..., K), fp32, fp16 or bf16 (on a CPU also fp64), any strides.
    weight: (N, K), the base's W0, of x's dtype. bias: (N,) or None, the base's.
    delta: (S, N, K), of x's dtype, or packed (``packing.pack``): the superpositions, one slot a group of models.
    ids: (B,) int32: the models of B equal runs of the M = prod(...) rows, so of each row where B = M; −1 is the base.
    keys: (J,) int64, the models' Philox keys (``format.model_key``).
    scale: (J,) fp32, what D is multiplied with: α_j g_j.
    slots: (J,) int32, the slot each model is superposed in; −1 where it left this tensor as the base has it.
    tensor: ``format.tensor_id`` of the weight's name. biases: (J, N) or None: each model's own bias.
    transform: of a shard, whose weight, D and biases these are then, with its origin (``format.shard_of``).
    basis: what each model adds in a basis that all share, (K, r) and (J, r, N) of x's dtype.
    inverses: (J, K, K) fp32, where the transform's matrix is dense: ``mixing.inverses_of``, whose units are in
        ``scale``.

    Returns (..., N) of x's dtype. A GPU sums in fp32 and rounds once, a CPU rounds each of two products and their sum;
    for many rows of one model both round the rebuilt weight instead, as a materialised one would be. So a row's
    last bits depend on how many rows its batch has. Gradients flow to x, weight and bias; past a packed D it is
    unpacked for them.
    Raises ``ValueError`` for shapes and dtypes that do not fit, and on a CPU ``IndexError`` for an unknown id; on
    a GPU, which is not asked to wait for the answer, an unknown id's rows are NaN. (Design, section 1.)
    """
    check_linear(x, weight, bias, biases, delta, ids, keys, scale, slots)
    check_transform(weight.shape[1], transform)
    check_inverses(inverses, transform, keys, weight)
    if basis is not None:
        check_basis(basis, x, weight, keys)
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    packed: tuple[Any, ...] = (None, []) if isinstance(delta, Tensor) else operands(delta)
    own: tuple[Any, ...] = (*(basis or (None, None)), inverses)
    words = delta if isinstance(delta, Tensor) else delta.words
    tensors = rows, weight, bias, biases, words, ids, keys, scale, slots
    if _nobody_watches(x, weight, bias, biases, words):
        kernel = cpu.superposed_linear if x.device.type == "cpu" else _on_gpu("superposed_linear")
        y = kernel(*tensors, tensor, transform, False, *packed, *own)
    else:
        if not torch.compiler.is_compiling():
            _refuse_forward_mode(x, weight, bias, biases)
        y = torch.ops.randes.superposed_linear(*tensors, tensor, list(map(int, transform)), False, *packed, *own)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], weight.shape[0])


def _refuse_forward_mode(*operands: Tensor | None) -> None:
    """Raise ``NotImplementedError`` where a derivative is taken on the way forward, which no kernel here does."""
    levels = torch._C._functorch.get_interpreter_stack() or ()
    if any(level.key() == torch._C._functorch.TransformType.Jvp for level in levels) or (
        forward_ad._current_level >= 0
        and any(value is not None and forward_ad.unpack_dual(value).tangent is not None for value in operands)
    ):
        raise NotImplementedError(
            "a superposed layer has no forward-mode derivative (jvp, jacfwd, dual tensors): take it in reverse"
            " (backward), or of the plain model that merge_and_unload gives"
        )


def _nobody_watches(*operands: Tensor | None) -> bool:
    """Whether the kernel may be called as it is: nothing traces, transforms or differentiates the call.

    The dispatcher and its autograd wrapper take 30 µs a call, and on a CPU whose caches a matmul has just swept 250.
    """
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None or forward_ad._current_level >= 0:
        return False
    if torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    recorded = torch.is_grad_enabled()
    for operand in operands:
        if operand is None:
            continue
        plain = type(operand) in (Tensor, Parameter) and operand.device.type in ("cpu", "cuda")
        if not plain or (recorded and operand.requires_grad):
            return False
    return True


def superpose_(
    accumulator: Tensor, finetuned: Tensor, base: Tensor, rate: float, key: int, tensor: int, transform: Transform,
    *, subtract: bool = False,
) -> None:  # fmt: skip
    """Add the transformed delta ``finetuned − base`` to ``accumulator``, or take it away: in place, exact.

    accumulator: (N, K) int32, rows contiguous. finetuned, base: (N, K), fp32, fp16 or bf16.
    rate: steps per unit of weight, 1 / (gain · step), an fp32 value. key: ``format.model_key``.
    transform: of a shard with its origin.
    Raises ``ValueError`` for shapes and dtypes that do not fit. (Design, sections 1 and 5.)
    """
    check_pair("accumulator", accumulator, base, transform)
    check_pair("finetuned", finetuned, base, transform)
    if finetuned.dtype != base.dtype or base.dtype == torch.float64:
        raise ValueError(
            f"finetuned and base must be of one dtype, fp32, fp16 or bf16, got {finetuned.dtype}, {base.dtype}"
        )
    if accumulator.dtype != torch.int32 or accumulator.stride(1) != 1:
        raise ValueError(
            f"accumulator must be int32 with rows of stride 1, got {accumulator.dtype}, {accumulator.stride(1)}"
        )
    finetuned, base = finetuned.contiguous(), base.contiguous()
    torch.ops.randes.superpose_(accumulator, finetuned, base, rate, key, tensor, list(map(int, transform)), subtract)


def retrieve(base: Tensor, delta: Tensor, scale: float, key: int, tensor: int, transform: Transform) -> Tensor:
    """One model's weight ``W0 + scale · (D turned back)``, (N, K) of ``base``'s dtype: for export, not for serving.

    base: (N, K), fp32, fp16 or bf16 (on a CPU also fp64). delta: (N, K), integers or floats.
    scale: what a unit of D is worth. transform: of a shard with its origin.
    Raises ``ValueError`` for shapes that do not fit. (Design, section 1.)
    """
    check_pair("delta", delta, base, transform)
    base, delta = base.contiguous(), delta.contiguous()
    return torch.ops.randes.retrieve(base, delta, scale, key, tensor, list(map(int, transform)))


def prepare(transform: Transform, k: int, device: torch.device) -> None:
    """Put where calls will read them the constants that turn ``k`` columns, before a CUDA graph is captured.

    A call puts them there too, the first time; a capture refuses what the host has to wait for.
    """
    if device.type == "cuda":
        from randes_kernels import gpu

        gpu.prepare(transform, k, device)


def _with_transform(kernel: Callable[..., Any], place: int) -> Callable[..., Any]:
    """``kernel`` called with a ``Transform`` in place of the list of integers that a schema can hold."""

    def call(*arguments: Any) -> Any:
        return _no_view(kernel(*arguments[:place], Transform(*arguments[place]), *arguments[place + 1 :]))

    return call


def _no_view(y: Tensor | None) -> Tensor | None:
    """A result of the same memory that is nobody's view: autograd lets no view that an operator returns be changed in
    place, as Falcon does with its layers' outputs."""
    if y is None or not y._is_view():
        return y
    whole = torch.empty(0, dtype=y.dtype, device=y.device)
    return whole.set_(y.untyped_storage(), y.storage_offset(), y.shape, y.stride())


def _on_gpu(name: str) -> Callable[..., Any]:
    """The operator's GPU kernel; Triton is imported at its first call, so that a CPU never needs it."""

    def call(first: Tensor, *arguments: Any) -> Any:
        from randes_kernels import gpu

        kernel = getattr(gpu, name)
        if first.device.index == torch.cuda.current_device():
            return kernel(first, *arguments)  # entering it would change nothing
        with torch.cuda.device(first.device):
            return kernel(first, *arguments)

    return call


for _name, _kernel, _place in (
    ("superposed_linear", cpu.superposed_linear, 10),
    ("superpose_", slices.superpose_, 6),
    ("retrieve", slices.retrieve, 5),
):
    library.impl(_name, _with_transform(_kernel, _place), "CPU")
    library.impl(_name, _with_transform(_on_gpu(_name), _place), "CUDA")


@torch.library.register_fake("randes::superposed_linear", lib=library)
def _linear_fake(x: Tensor, weight: Tensor, *arguments: Any) -> Tensor:
    transposed = arguments[9]
    return x.new_empty((x.shape[0], weight.shape[1 if transposed else 0]))


@torch.library.register_fake("randes::superpose_", lib=library)
def _superpose_fake(*_: Any) -> None:
    return None


@torch.library.register_fake("randes::retrieve", lib=library)
def _retrieve_fake(base: Tensor, *_: Any) -> Tensor:
    return base.new_empty(base.shape)


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, biases, delta, ids, keys, scale, slots, tensor, transform, transposed, steps, packing, *own = inputs
    # own: of a shared basis, and of dense matrices. x is needed for the base weight's gradient alone.
    ctx.save_for_backward(x if weight.requires_grad else None, weight, delta, steps, ids, keys, scale, slots, *own)
    ctx.tensor, ctx.transform, ctx.packing, ctx.transposed = tensor, transform, packing, transposed
    ctx.own_biases = biases is not None


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, delta, steps, ids, keys, scale, slots, directions, corrections, inverses = ctx.saved_tensors
    grad_x = grad_weight = grad_bias = None
    if ctx.needs_input_grad[0]:
        if steps is not None:  # a packed D runs forward alone
            delta = unpack(of_operands(delta, steps, ctx.packing, weight.shape[1]), weight.dtype).contiguous()
        # The layer is linear in x, so its own transpose is its backward pass.
        grad_x = torch.ops.randes.superposed_linear(
            grad,
            weight,
            None,
            None,
            delta,
            ids,
            keys,
            scale,
            slots,
            ctx.tensor,
            ctx.transform,
            not ctx.transposed,
            inverses=inverses,
        )
        if corrections is not None:
            grad_x = grad_x + own_product(grad, ids, corrections.mT) @ directions.mT
    if ctx.needs_input_grad[1]:
        grad_weight = x.mT @ grad if ctx.transposed else grad.mT @ x
    if ctx.needs_input_grad[2]:
        # Rows of models with biases of their own did not use the base's.
        used = grad
        if ctx.own_biases:
            is_base = (ids < 0).repeat_interleave(grad.shape[0] // ids.shape[0])
            used = grad * is_base[:, None]
        grad_bias = used.sum(0)
    return (grad_x, grad_weight, grad_bias, *(None,) * 14)


torch.library.register_autograd(
    "randes::superposed_linear", _linear_backward, setup_context=_keep_for_backward, lib=library
)
