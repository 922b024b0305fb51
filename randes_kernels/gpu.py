"""The operators on a GPU: which kernels a call launches. The only importer of Triton beside the kernels."""

from collections.abc import Sequence

import torch
from torch import Tensor

from randes_kernels.format import Transform
from randes_kernels.kernels.activation_side import activation_side
from randes_kernels.kernels.group import group
from randes_kernels.kernels.retrieve import retrieve
from randes_kernels.kernels.route import route
from randes_kernels.kernels.superpose import superpose_
from randes_kernels.kernels.transform import sides_of, transform_arguments
from randes_kernels.kernels.weight_side import weight_side
from randes_kernels.lowrank import own_product
from randes_kernels.packing import Packed, of_operands
from randes_kernels.tiles import Plan, device_name, linear_plan

__all__ = ["plan_of", "retrieve", "superpose_", "superposed_linear"]


def plan_of(x: Tensor, weight: Tensor, delta: Packed, ids: Tensor, keys: Tensor, permuted: bool) -> Plan:
    """The plan of a call with these operands, already transposed where the call is."""
    words = delta.words
    rows = weight.stride(1) == words.stride(2) == 1
    columns = weight.stride(0) == words.stride(1) == 1
    return linear_plan(
        x.shape[0], *weight.shape, x.dtype, runs=ids.shape[0], models=keys.shape[0],
        # Without a slot of D there is nothing to rebuild.
        turned=permuted or not (rows or columns) or words.shape[0] == 0,
        aligned=x.shape[1] * x.itemsize % 16 == 0 and _describable(weight) and _describable(words),
        bits=delta.bits, device=device_name(x.device.index or 0),
    )  # fmt: skip


def superposed_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, biases: Tensor | None, delta: Tensor,
    ids: Tensor, keys: Tensor, scale: Tensor, slots: Tensor, tensor: int, transform: Transform, transposed: bool,
    steps: Tensor | None = None, packing: Sequence[int] = (), directions: Tensor | None = None,
    corrections: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """See ``randes_kernels.superposed_linear``. x (M, K), or (M, N) where ``transposed``, which no packed D is."""
    if x.dtype == torch.float64:
        raise ValueError("x must be fp32, fp16 or bf16 on a GPU, got torch.float64")
    if x.shape[0] == 0:
        return x.new_empty((0, weight.shape[1 if transposed else 0]))
    # The kernels read tables as rows of one piece; these are no copies where they are that already.
    ids, keys, scale, slots = (table.contiguous() for table in (ids, keys, scale, slots))
    bias, biases = (table if table is None else table.contiguous() for table in (bias, biases))
    permuted = transform_arguments(transform, weight.shape[1]).permuted
    sides = sides_of(transform, transposed)
    if transposed:
        weight, delta = weight.mT, delta.mT
    held = of_operands(delta, steps, packing, x.shape[1])
    plan = plan_of(x, weight, held, ids, keys, permuted)
    # The projection on the shared basis: (M, r), and the rows it belongs to are in their first order.
    inner = None if directions is None else x @ directions
    if plan.path == "weight side":
        own = None if inner is None or corrections is None else own_product(inner, ids, corrections)
        order = None
        if plan.grouped:
            x, order, ids = group(x, ids)
        elif not x.is_contiguous() or x.data_ptr() % 16:
            x = x.clone(memory_format=torch.contiguous_format)
        y = weight_side(x, weight, held, bias, biases, ids, keys, scale, slots, tensor, sides, plan, order)
        return y if own is None else y.add_(own)
    rest = keys, scale, slots, tensor
    if transposed and permuted:
        turned, inside = None, sides._replace(flip_out=False)
        if plan.turn_first and sides.flip_in:
            turned = route(x, ids, keys, slots, tensor, transform, sides.in_stream, sides.flip_in)
            inside = inside._replace(flip_in=False)
        product = activation_side(x, turned, None, held, None, None, ids, *rest, inside, plan)
        y = x @ weight.mT
        return route(y, ids, keys, slots, tensor, transform, sides.out_stream, sides.flip_out, turned=product)
    turned = None
    if permuted or (plan.turn_first and sides.flip_in):
        turned = route(x, ids, keys, slots, tensor, transform, sides.in_stream, sides.flip_in)
        sides = sides._replace(flip_in=False)
    return activation_side(x, turned, weight, held, bias, biases, ids, *rest, sides, plan, inner, corrections)


def _describable(matrix: Tensor) -> bool:
    """Whether a tensor descriptor can describe a weight, or what a transposed one is the transpose of."""
    stored = matrix if matrix.stride(-1) == 1 else matrix.mT
    return (
        stored.is_contiguous()
        and stored.numel() > 0
        and stored.shape[-1] * stored.itemsize % 16 == 0
        and stored.data_ptr() % 16 == 0
    )
