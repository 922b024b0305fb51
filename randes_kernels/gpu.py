"""The operators on a GPU: which kernels a call launches. The only importer of Triton beside the kernels."""

from collections.abc import Sequence

import torch
from torch import Tensor

from randes_kernels import mixing, slices
from randes_kernels.format import Matrix, Transform
from randes_kernels.kernels import retrieve as retrieving
from randes_kernels.kernels import superpose as superposing
from randes_kernels.kernels.activation_side import activation_side
from randes_kernels.kernels.group import group
from randes_kernels.kernels.route import route, turn, turn_back
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
    corrections: Tensor | None = None, inverses: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """See ``randes_kernels.superposed_linear``. x (M, K), or (M, N) where ``transposed``, which no packed D is."""
    if x.dtype == torch.float64:
        raise ValueError("x must be fp32, fp16 or bf16 on a GPU, got torch.float64")
    if x.shape[0] == 0:
        return x.new_empty((0, weight.shape[1 if transposed else 0]))
    # The kernels read tables as rows of one piece; these are no copies where they are that already.
    ids, keys, scale, slots = (table.contiguous() for table in (ids, keys, scale, slots))
    bias, biases = (table if table is None else table.contiguous() for table in (bias, biases))
    mixed = transform.matrix != Matrix.SIGNS
    permuted = transform_arguments(transform, weight.shape[1]).permuted
    if mixed:
        scale = scale * mixing.unit(transform.matrix)
    sides = sides_of(transform, transposed)
    if transposed:
        weight, delta = weight.mT, delta.mT
    held = of_operands(delta, steps, packing, x.shape[1])
    plan = plan_of(x, weight, held, ids, keys, permuted or mixed)
    # A shared basis is r more columns of K inside a decode kernel; prefills, and fp32, whose kernel has no registers
    # left for it, add it afterwards.
    inner = own = None
    if directions is not None and corrections is not None:
        projected = x @ directions
        if plan.path == "weight side" or x.dtype == torch.float32:
            own = own_product(projected, ids, corrections)
        else:
            inner = projected
    if plan.path == "weight side":
        order = None
        if plan.grouped:
            x, order, ids = group(x, ids)
        elif not x.is_contiguous() or x.data_ptr() % 16:
            x = x.clone(memory_format=torch.contiguous_format)
        y = weight_side(x, weight, held, bias, biases, ids, keys, scale, slots, tensor, sides, plan, order)
        return y if own is None else y.add_(own)
    rest = keys, scale, slots, tensor
    if transposed and (permuted or mixed):
        turned, inside = None, sides._replace(flip_out=False)
        if plan.turn_first and sides.flip_in:
            turned = route(x, ids, keys, slots, tensor, transform, sides.in_stream, sides.flip_in)
            inside = inside._replace(flip_in=False)
        product = activation_side(x, turned, None, held, None, None, ids, *rest, inside, plan)
        y = x @ weight.mT
        if inverses is not None:
            return y.add_(mixing.dense_rows(product, ids, inverses, back=True))
        if mixed:
            return turn_back(y, product, ids, keys, slots, tensor, transform)
        return route(y, ids, keys, slots, tensor, transform, sides.out_stream, sides.flip_out, turned=product)
    turned = None
    if inverses is not None:
        turned = mixing.dense_rows(x, ids, inverses)
    elif mixed and not transposed:
        turned = turn(x, ids, keys, slots, tensor, transform)
    elif permuted or (plan.turn_first and sides.flip_in):
        turned = route(x, ids, keys, slots, tensor, transform, sides.in_stream, sides.flip_in)
        sides = sides._replace(flip_in=False)
    y = activation_side(x, turned, weight, held, bias, biases, ids, *rest, sides, plan, inner, corrections)
    return y if own is None else y.add_(own)


def superpose_(
    accumulator: Tensor, finetuned: Tensor, base: Tensor, rate: float, key: int, tensor: int,
    transform: Transform, subtract: bool,
) -> None:  # fmt: skip
    """See ``randes_kernels.superpose_``. Mixed columns are products in fp64, which need no kernel of their own."""
    run = superposing.superpose_ if transform.matrix == Matrix.SIGNS else slices.superpose_
    run(accumulator, finetuned, base, rate, key, tensor, transform, subtract)


def retrieve(base: Tensor, delta: Tensor, scale: float, key: int, tensor: int, transform: Transform) -> Tensor:
    """See ``randes_kernels.retrieve``."""
    run = retrieving.retrieve if transform.matrix == Matrix.SIGNS else slices.retrieve
    return run(base, delta, scale, key, tensor, transform)


def _describable(matrix: Tensor) -> bool:
    """Whether a tensor descriptor can describe a weight, or what a transposed one is the transpose of."""
    stored = matrix if matrix.stride(-1) == 1 else matrix.mT
    return (
        stored.is_contiguous()
        and stored.numel() > 0
        and stored.shape[-1] * stored.itemsize % 16 == 0
        and stored.data_ptr() % 16 == 0
    )
