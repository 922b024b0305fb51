"""What the kernels compute, in plain torch: the specification, to be read aloud.

For proofs alone: a CPU runs ``slices`` and ``cpu``, which take slices that stay in its cache. ``superposed_linear``
builds each row's weight, the one thing the library never does. (Design, section 1.)
"""

import torch
from torch import Tensor

from randes_kernels import mixing
from randes_kernels.format import Matrix, Stream, Transform, column_permutation, signs
from randes_kernels.hadamard import BLOCKS


def transform_parts(key: int, tensor: int, shape: torch.Size, transform: Transform) -> tuple[Tensor, Tensor, Tensor]:
    """Row signs ``(N,)`` and column signs ``(K,)``, int8 of ±1, and where each column goes, ``(K,)`` int64."""
    n, k = shape
    row_signs, column_signs = torch.ones(n, dtype=torch.int8), torch.ones(k, dtype=torch.int8)
    if transform.row_signs:
        row_signs = signs(key, tensor, Stream.ROW_SIGNS, n, transform.first_row)
    if transform.column_signs:
        column_signs = signs(key, tensor, Stream.COLUMN_SIGNS, k, transform.first_column)
    return row_signs, column_signs, column_permutation(key, tensor, k, transform)


def column_matrix(key: int, tensor: int, k: int, transform: Transform) -> Tensor:
    """R (K, K) fp64: what mixes columns in place of signs, built whole; of a shard with a diagonal, its own part."""
    if transform.matrix == Matrix.DENSE:
        return mixing.dense(key, tensor, k)
    if transform.matrix == Matrix.DIAGONAL:
        return mixing.diagonal(key, tensor, k, transform.first_column).diag()
    product = blocks = torch.eye(k, dtype=torch.float64)
    start = 0
    for side in BLOCKS:
        h = torch.ones(1, 1, dtype=torch.float64)
        while len(h) < side:
            h = torch.kron(torch.tensor([[1, 1], [1, -1]], dtype=torch.float64), h)
        while k - start >= side:
            blocks = blocks.clone()
            blocks[start : start + side, start : start + side] = h / side**0.5
            start += side
    for flips, _, target in zip(*mixing.rotation(key, tensor, k), strict=True):
        moved = torch.zeros(k, k, dtype=torch.float64)
        moved[torch.arange(k), target] = flips.double()
        product = product @ moved @ blocks
    return product


def superpose_(
    accumulator: Tensor, finetuned: Tensor, base: Tensor, rate: float, key: int, tensor: int,
    transform: Transform, subtract: bool,
) -> None:  # fmt: skip
    """A ± r ⊙ rint((W − W0) · rate) ⊙ c · P, in place on ``accumulator`` (N, K) int32; or ± rint(r ⊙ rint(...) R)."""
    row_signs, column_signs, turned_columns = transform_parts(key, tensor, base.shape, transform)
    delta = finetuned.float() - base.float()
    steps = torch.round(delta * rate).to(torch.int32)
    turned = row_signs[:, None] * steps * column_signs
    if transform.matrix:
        turned = torch.round(turned.double() @ column_matrix(key, tensor, base.shape[1], transform)).to(torch.int32)
    accumulator.index_add_(1, turned_columns, turned, alpha=-1 if subtract else 1)


def retrieve(base: Tensor, delta: Tensor, scale: float, key: int, tensor: int, transform: Transform) -> Tensor:
    """Ŵ = W0 + scale · r ⊙ (D Pᵀ) ⊙ c, or W0 + scale · r ⊙ (D R⁻¹), in the shape and dtype of ``base``."""
    row_signs, column_signs, turned_columns = transform_parts(key, tensor, base.shape, transform)
    exact = torch.promote_types(base.dtype, torch.float32)
    turned_back = row_signs[:, None] * delta[:, turned_columns].to(exact) * column_signs
    if transform.matrix:
        mixed = column_matrix(key, tensor, base.shape[1], transform)
        turned_back = torch.linalg.solve(mixed, turned_back.double(), left=False).to(exact)
    return (base.to(exact) + scale * turned_back).to(base.dtype)


def superposed_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, biases: Tensor | None, delta: Tensor,
    ids: Tensor, keys: Tensor, scale: Tensor, slots: Tensor, tensor: int, transform: Transform,
) -> Tensor:  # fmt: skip
    """y[m] = x[m] Ŵ_jᵀ + b_j with j the model of row m, summed in fp32 at least and rounded once."""
    exact = torch.promote_types(x.dtype, torch.float32)
    models = ids.repeat_interleave(x.shape[0] // ids.shape[0]).tolist()
    y = torch.empty((x.shape[0], weight.shape[0]), dtype=exact)
    for row, model in enumerate(models):
        own_weight, own_bias = weight.to(exact), bias
        if model >= 0 and slots[model] >= 0:
            slot, gain, key = int(slots[model]), float(scale[model]), int(keys[model])
            own_weight = retrieve(own_weight, delta[slot], gain, key, tensor, transform)
        if model >= 0 and biases is not None:
            own_bias = biases[model]
        y[row] = own_weight @ x[row].to(exact)
        if own_bias is not None:
            y[row] += own_bias.to(exact)
    return y.to(x.dtype)
