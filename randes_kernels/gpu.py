"""The operators on a GPU: which kernels a call launches. The only importer of Triton beside the kernels."""

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from randes_kernels import mixing, slices
from randes_kernels.format import Matrix, Transform
from randes_kernels.hadamard import hadamard
from randes_kernels.kernels import retrieve as retrieving
from randes_kernels.kernels import superpose as superposing
from randes_kernels.kernels.activation_side import activation_side
from randes_kernels.kernels.group import group
from randes_kernels.kernels.route import reciprocals_on, route, turn, turn_back
from randes_kernels.kernels.transform import Sides, sides_of, transform_arguments
from randes_kernels.kernels.weight_side import weight_side
from randes_kernels.lowrank import own_product
from randes_kernels.packing import Packed, of_operands
from randes_kernels.tiles import Plan, device_name, linear_plan

__all__ = ["plan_of", "prepare", "retrieve", "superpose_", "superposed_linear"]


def plan_of(x: Tensor, weight: Tensor, delta: Packed, ids: Tensor, keys: Tensor, permuted: bool) -> Plan:
    """The plan of a call with these operands, already transposed where the call is."""
    words, (m, k) = delta.words, x.shape
    itemsizes = weight.itemsize, words.itemsize
    one_way, describable = _layout(weight.shape, weight.stride(), words.shape, words.stride(), itemsizes)
    describable = describable and (weight.data_ptr() | words.data_ptr()) % 16 == 0
    describable = describable and delta.bits >= 1  # of half a bit a tile's rows are 8 bytes: copies take 16 at least
    return linear_plan(
        m, weight.shape[0], k, x.dtype, runs=ids.shape[0], models=keys.shape[0], turned=permuted or not one_way,
        aligned=describable and k * x.itemsize % 16 == 0, bits=delta.bits,
        device=device_name(x.device.index or 0),
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
    ids, keys, scale, slots = ids.contiguous(), keys.contiguous(), scale.contiguous(), slots.contiguous()
    bias, biases = bias if bias is None else bias.contiguous(), biases if biases is None else biases.contiguous()
    mixed, permuted, sides = _turning(transform, weight.shape[1], transposed)
    if mixed:
        scale = scale * mixing.unit(transform.matrix)
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


def prepare(transform: Transform, k: int, device: torch.device) -> None:
    """See ``randes_kernels.prepare``."""
    if transform.matrix == Matrix.DIAGONAL:
        reciprocals_on(device)
    elif transform.matrix == Matrix.ROTATION:
        hadamard(torch.zeros((1, k), device=device))


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


@lru_cache(maxsize=1024)
def _layout(
    weight: tuple[int, ...], weight_stride: tuple[int, ...], words: tuple[int, ...], words_stride: tuple[int, ...],
    itemsizes: tuple[int, int],
) -> tuple[bool, bool]:  # fmt: skip
    """Of a weight (N, K) and of D (S, N, K): whether the weight side can walk them, and descriptors describe them.

    Both lie row by row, or both column by column; without a slot of D there is nothing to rebuild.
    """
    rows = weight_stride[1] == words_stride[2] == 1
    columns = weight_stride[0] == words_stride[1] == 1
    pairs = zip((weight, words), (weight_stride, words_stride), itemsizes, strict=True)
    return (rows or columns) and words[0] > 0, all(_describable(*pair) for pair in pairs)


def _describable(shape: tuple[int, ...], stride: tuple[int, ...], itemsize: int) -> bool:
    """Whether a tensor descriptor can describe a weight, or what a transposed one is the transpose of."""
    if stride[-1] != 1:
        shape, stride = (*shape[:-2], shape[-1], shape[-2]), (*stride[:-2], stride[-1], stride[-2])
    expected = [math.prod(shape[place + 1 :]) for place in range(len(shape))]
    whole = all(size == 1 or found == right for size, found, right in zip(shape, stride, expected, strict=True))
    return whole and math.prod(shape) > 0 and shape[-1] * itemsize % 16 == 0


@lru_cache(maxsize=1024)
def _turning(transform: Transform, k: int, transposed: bool) -> tuple[bool, bool, Sides]:
    """Whether a matrix mixes the columns, whether they are permuted, and which signs flip what comes in and out."""
    mixed = transform.matrix != Matrix.SIGNS
    return mixed, transform_arguments(transform, k).permuted, sides_of(transform, transposed)
