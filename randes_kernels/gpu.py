"""The operators on a GPU: which kernels a call launches. The only importer of Triton beside the kernels."""

import torch
from torch import Tensor

from randes_kernels.format import Stream, Transform
from randes_kernels.kernels.linear import superposed_linear as launch_linear
from randes_kernels.kernels.retrieve import retrieve
from randes_kernels.kernels.route import route
from randes_kernels.kernels.superpose import superpose_
from randes_kernels.kernels.transform import transform_arguments

__all__ = ["retrieve", "superpose_", "superposed_linear"]


def superposed_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, biases: Tensor | None, delta: Tensor,
    ids: Tensor, keys: Tensor, scale: Tensor, slots: Tensor, tensor: int, transform: Transform, transposed: bool,
) -> Tensor:  # fmt: skip
    """See ``randes_kernels.superposed_linear``. x (M, K), or (M, N) where ``transposed``."""
    if x.dtype == torch.float64:
        raise ValueError("x must be fp32, fp16 or bf16 on a GPU, got torch.float64")
    if x.shape[0] == 0:
        return x.new_empty((0, weight.shape[1 if transposed else 0]))
    # The kernels read tables as rows of one piece; these are no copies where they are that already.
    ids, keys, scale, slots = (table.contiguous() for table in (ids, keys, scale, slots))
    bias, biases = (table if table is None else table.contiguous() for table in (bias, biases))
    models = (ids, keys, scale, slots, tensor)
    permuted = transform_arguments(transform, weight.shape[1]).permuted
    routing = (ids, keys, slots, tensor, transform)
    if not transposed:
        turned = route(x, *routing) if permuted else x
        return launch_linear(
            x, turned, weight, delta, bias, biases, *models,
            Stream.COLUMN_SIGNS, Stream.ROW_SIGNS, transform.column_signs and not permuted, transform.row_signs,
        )  # fmt: skip
    streams = Stream.ROW_SIGNS, Stream.COLUMN_SIGNS, transform.row_signs
    if not permuted:
        return launch_linear(x, x, weight.mT, delta.mT, None, None, *models, *streams, transform.column_signs)
    turned = launch_linear(x, x, None, delta.mT, None, None, *models, *streams, False)
    return route(x @ weight, *routing, turned=turned)
