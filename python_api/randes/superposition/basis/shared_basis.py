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
import os
from collections.abc import Callable, Iterable, Mapping
from functools import partial

import torch
from torch import Tensor

from randes.checkpoints.lazy_tensors import headers
from randes.checkpoints.lazy_tensors import rows as rows_of
from randes.checkpoints.on_disk import in_files
from randes.checkpoints.sources import Tensors, check_finite
from randes.checkpoints.threads import unsplit_threads
from randes.config import Rank
from randes_kernels import Packed, Transform, model_key, superposed_linear, tensor_id
from randes_kernels.format import Stream, signs
from randes_kernels.slices import spans

UNIT = 2.0**-14
"""What one of U's integers is worth: its entries lie within ±1."""
SHARE = 0.02
"""Of a matrix's delta energy: what a direction must hold to be kept with rank "auto". A share and no multiple of the
mean direction's, which at equal storage kept less in every width that was measured (docs/results.md)."""
MOST = 50
"""Directions that can hold that much each."""
SPARE = 8
"""Directions beyond the rank that the search keeps, so that the last ones converge too."""
PASSES = 3
AT_A_TIME = 2
"""Tensors whose bases are looked for at once: parts of each are in memory."""
BLOCK = 1 << 18
"""Elements that are in fp32 at a time. A number of its own: sums in another order would give another basis."""


def loudest(
    models: Mapping[str, Tensors], base: Tensors, superposed: Iterable[str], rank: Rank, seed: int,
    step: Callable[[int], None] = lambda _: None,
) -> dict[str, Tensor]:  # fmt: skip
    """``U`` of every tensor, (K, r) int16 of ``UNIT``: the top eigenvectors of ``Σ_j δ_jᵀδ_j / ‖δ_j‖²``.

    r is ``rank``, or half of a narrower side; with "auto", up to there, as many as have ``SHARE`` of the eigenvalues'
    sum each, and a tensor without any is left out. By subspace iteration: a few passes over the models, a part of a
    tensor at a time, from signs that the seed makes.
    models: by name, each with the base's names and shapes. step: called with the bytes read.
    Raises ``CheckpointError`` for a delta that is not finite.
    """
    key, names = model_key(seed, ""), list(superposed)
    # A tensor a thread, whose products torch does not split: the same bytes on any number of cores.
    with unsplit_threads(min(AT_A_TIME, os.cpu_count() or 1)) as threads:
        try:
            made = threads.map(lambda name: _loudest_of(name, models, base, rank, key, step), names)
            found = dict(zip(names, made, strict=True))
        except BaseException:
            threads.shutdown(cancel_futures=True)
            raise
    return {name: basis for name, basis in found.items() if basis.shape[1]}


def widest(rank: Rank, rows: int, columns: int) -> int:
    """How many directions the basis of a matrix can have at most."""
    return min(MOST if rank == "auto" else rank, min(rows, columns) // 2)


def _loudest_of(
    name: str, models: Mapping[str, Tensors], base: Tensors, rank: Rank, key: int, step: Callable[[int], None]
) -> Tensor:
    rows, columns = headers(base)[name].shape
    kept = widest(rank, rows, columns)
    start = signs(key, tensor_id(name), Stream.COLUMN_SIGNS, columns * (kept + SPARE)).view(columns, kept + SPARE)
    found = torch.linalg.qr(start.float())[0]
    for last in [False] * (PASSES - 1) + [True]:
        image, changed = summed(name, models, base, partial(_images, found), torch.zeros_like(found), step)
        # Within the span of the last pass's directions, the loudest ones: eigenvectors of a small matrix.
        energy, small = (part.flip(-1) for part in torch.linalg.eigh(found.mT @ image))
        if last and rank == "auto":  # each model that changed it adds 1, in all directions together
            kept = min(kept, int((energy >= SHARE * changed).sum())) if changed else 0
        found = found @ small[:, :kept] if last else torch.linalg.qr(image)[0]
    return rounded_directions(found)


def _images(directions: Tensor, delta: Tensor) -> Tensor:
    return delta.mT @ (delta @ directions)


def summed(
    name: str, models: Mapping[str, Tensors], base: Tensors, product: Callable[[Tensor], Tensor], total: Tensor,
    step: Callable[[int], None],
) -> tuple[Tensor, int]:  # fmt: skip
    """``total`` plus ``product`` of each model's delta over its ``‖δ‖²``, and how many models changed the matrix.

    product: of rows of a delta, fp32, whose sum is that of the whole. step: called with the bytes read.
    Raises ``CheckpointError`` for a delta that is not finite.
    """
    header, changed = headers(base)[name], 0
    rows, columns = header.shape
    blocks = spans(rows, columns, BLOCK)
    height = max(end - start for start, end in blocks)
    room = torch.empty(2, height, columns, device="cpu")  # new pages for each block would cost more than its sums
    for model in sorted(models):
        own, size = torch.zeros_like(total), 0.0
        tuned, original = _reader(models[model], name), _reader(base, name)
        for start, end in blocks:
            delta, spare = room[:, : end - start]
            delta.copy_(tuned(start, end)).sub_(spare.copy_(original(start, end)))
            size += float(torch.square(delta, out=spare).sum())
            own += product(delta)
            if not math.isfinite(size):
                check_finite(name, delta)
        if size > 0:
            total += own / size
            changed += 1
        step(header.nbytes)
    return total, changed


def _reader(tensors: Tensors, name: str) -> Callable[[int, int], Tensor]:
    """A tensor's rows from the first number to the second: read then, or of a tensor that is made, or in memory."""
    if in_files(tensors):
        return partial(rows_of, tensors, name)
    whole = tensors[name]
    return lambda start, end: whole[start:end]


def rounded_directions(directions: Tensor) -> Tensor:
    """``U`` (K, r) as it is stored."""
    return torch.round(directions / UNIT).to(torch.int16).contiguous()


def coordinates(delta: Tensor, basis: Tensor) -> tuple[Tensor, float]:
    """``B`` of a delta (N, K) fp64: (N, r) int16, and the power of two that its integers are worth."""
    return rounded(delta @ (basis.double() * UNIT))


def rounded(exact: Tensor) -> tuple[Tensor, float]:
    """``coordinates`` of a delta that was multiplied with ``U`` already, a run of rows at a time: (N, r) fp64."""
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
    basis: Tensor, held: Tensor, delta: Tensor | Packed, keys: Tensor, scale: Tensor, slots: Tensor, tensor: int,
    transform: Transform,
) -> Tensor:  # fmt: skip
    """``E_jᵀ`` of J models: (J, r, N) fp32, on the device of ``keys``.

    basis: (K, r) fp32, U. held: (J, r, N) fp32, α_j B_jᵀ. delta: (S, N, K), the superpositions as they are served.
    keys, scale, slots: (J,), as ``superposed_linear`` takes them.
    """
    models, rank, width = held.shape
    ids = torch.arange(models, dtype=torch.int32, device=keys.device)
    nothing = torch.zeros((), device=keys.device).expand(width, basis.shape[0])
    rows = basis.mT.to(keys.device).repeat(models, 1)
    served = delta
    if isinstance(delta, Tensor) and delta.dtype != torch.float32:  # in fp32 what these models read, and no more
        used = torch.unique(slots[slots >= 0])
        served, slots = delta[used.long()].float(), torch.where(slots < 0, -1, torch.searchsorted(used, slots).int())
    loud = superposed_linear(rows, nothing, None, served, ids, keys, scale, slots, tensor, transform)
    return held.to(keys.device) - loud.view(models, rank, width)
