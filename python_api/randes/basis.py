"""The shared basis: each matrix's loudest input directions, in which every model keeps its own delta exactly.

    U (K, r)        orthonormal columns, one basis a tensor for all models
    B_j (N, r)      δ_j U, kept by model j
    superposed      δ_j − B_j Uᵀ
    retrieved       Ŵ_j = W0 + α_j ( T_j (I − U Uᵀ) + B_j Uᵀ ),    T_j = g_j · r_j ⊙ D P_jᵀ ⊙ c_j
    served          y = x W0ᵀ + α_j x T_jᵀ + (x U) E_jᵀ,           E_j = α_j (B_j − T_j U)

Inputs of a layer have most of their energy in few directions, the same for all models: there interference is
loudest, and cheapest to remove. What T_j does to those directions is known once D is, so it is taken off together with
adding B_j: serving costs one product of rank r, and the kernels stay as they are. (Design, section 2.)

U and B_j are whole numbers times powers of two, so that B_j Uᵀ is exact in fp64 whatever the order of its sums: what
one machine has superposed another can take away.
"""

import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from randes import checkpoint
from randes.checkpoint import Checkpoint, Tensors
from randes_kernels import Transform, model_key, superposed_linear, tensor_id
from randes_kernels.format import Stream, signs

UNIT = 2.0**-14
"""What one of U's integers is worth: its entries lie within ±1."""
SPARE = 8
"""Directions beyond the rank that the search keeps, so that the last ones converge too."""
PASSES = 3


def loudest(
    models: Mapping[str, Checkpoint], base: Tensors, superposed: Iterable[str], rank: int, seed: int,
    read: Callable[[Checkpoint], Tensors] = checkpoint.read,
) -> Tensors:  # fmt: skip
    """``U`` of every tensor, (K, r) int16 of ``UNIT``: the top eigenvectors of ``Σ_j δ_jᵀδ_j / ‖δ_j‖²``.

    r is ``rank``, or half of a narrower side. By subspace iteration: a few passes over the models, one model in
    memory at a time, from signs that the seed makes. read: gives the tensors of one of ``models``.
    """
    key = model_key(seed, "")
    found = {}
    for name in superposed:
        rows, columns = base[name].shape
        width = min(rank, min(rows, columns) // 2) + SPARE
        start = signs(key, tensor_id(name), Stream.COLUMN_SIGNS, columns * width).view(columns, width)
        found[name] = torch.linalg.qr(start.float())[0]
    for last in [False] * (PASSES - 1) + [True]:
        images = {name: torch.zeros_like(directions) for name, directions in found.items()}
        for model in sorted(models):
            tensors = read(models[model])
            for name, directions in found.items():
                delta = tensors[name].float() - base[name].float()
                size = delta.square().sum()
                if size > 0:
                    images[name] += delta.mT @ (delta @ directions) / size
        for name, image in images.items():
            # Within the span of the last pass's directions, the loudest ones: eigenvectors of a small matrix.
            small = torch.linalg.eigh(found[name].mT @ image)[1].flip(1)
            kept = found[name].shape[1] - SPARE
            found[name] = found[name] @ small[:, :kept] if last else torch.linalg.qr(image)[0]
    return {name: torch.round(u / UNIT).to(torch.int16) for name, u in found.items()}


def coordinates(delta: Tensor, basis: Tensor) -> tuple[Tensor, float]:
    """``B`` of a delta (N, K) fp64: (N, r) int16, and the power of two that its integers are worth."""
    exact = delta @ (basis.double() * UNIT)
    peak = float(exact.abs().max())
    unit = 2.0 ** math.ceil(math.log2(peak / (2**15 - 1))) if peak > 0 else 1.0
    return torch.round(exact / unit).to(torch.int16), unit


def remainder(delta: Tensor, basis: Tensor, held: Tensor, unit: float) -> Tensor:
    """``δ − B Uᵀ`` as fp32, the same on every machine: its product is a sum of integers below 2**53."""
    return (delta - (held.double() @ basis.double().mT) * (unit * UNIT)).float()


def retrieved(turned_back: Tensor, basis: Tensor, held: Tensor, unit: float) -> Tensor:
    """``T (I − U Uᵀ) + B Uᵀ`` for ``turned_back`` = T (N, K) fp32."""
    u = basis.float() * UNIT
    return turned_back + (held.float() * unit - turned_back @ u) @ u.mT


def corrections(
    basis: Tensor, held: Tensor, delta: Tensor, keys: Tensor, scale: Tensor, slots: Tensor, tensor: int,
    transform: Transform,
) -> Tensor:  # fmt: skip
    """``E_jᵀ`` of J models: (J, r, N) fp32, on the device of ``delta``.

    basis: (K, r) fp32, U. held: (J, r, N) fp32, α_j B_jᵀ. delta: (S, N, K), the superpositions as they are served.
    keys, scale, slots: (J,), as ``superposed_linear`` takes them.
    """
    models, rank, width = held.shape
    ids = torch.arange(models, dtype=torch.int32, device=delta.device)
    nothing = torch.zeros((), device=delta.device).expand(width, basis.shape[0])
    rows = basis.mT.to(delta.device).repeat(models, 1)
    loud = superposed_linear(rows, nothing, None, delta.float(), ids, keys, scale, slots, tensor, transform)
    return held.to(delta.device) - loud.view(models, rank, width)
