"""Other methods' ways to keep J deltas of one matrix: re-creations in our own code, each with the bytes that it needs.

Each takes (J, N, K) deltas and gives what comes back of them, of the same shape, and the bytes for all J together.
Where a method leaves its scale open it is the unbiased one, ``‖δ‖² / ⟨δ, δ̂⟩``, with which a delta comes back in its
own size: ours are stored so too, and the mean magnitude does far worse. Scales and steps are fp16.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

Made = tuple[Tensor, int]
Method = Callable[[Tensor], Made]
NORMAL_STEPS = {2: 0.498, 3: 0.293, 4: 0.1676, 8: 0.0154}
"""Half the distance of two levels that suits normal values of unit variance (Max, 1960; 8 bits by trial)."""


def by_model(method: Callable[[Tensor, int], Made]) -> Method:
    """One delta after the other; the method is told which."""

    def each(deltas: Tensor) -> Made:
        made = torch.empty_like(deltas)
        nbytes = 0
        for number, delta in enumerate(deltas):
            made[number], held = method(delta, number)
            nbytes += held
        return made, nbytes

    return each


def resized(delta: Tensor, made: Tensor, by_row: bool) -> Made:
    """In the delta's own size, with a scale a row or one; and the scale's bytes."""
    dims = (-1,) if by_row else (-2, -1)
    scale = delta.square().sum(dims, keepdim=True) / (delta * made).sum(dims, keepdim=True).clamp(min=1e-30)
    scale = (scale / scale.amax()).half().float() * scale.amax()  # fp16 has too few small numbers for a delta as it is
    return made * scale, 2 * scale.numel() + 4


def levels(values: Tensor, bits: int) -> Tensor:
    """Odd integers for values, a step a row: the best for the least square of some about a normal distribution's."""
    if bits == 1:
        return values.sign()
    top, rms = 2**bits - 1, values.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-30)
    best, error = torch.empty(0), torch.empty(0)
    for factor in (0.75, 1.0, 1.3, 1.7):
        step = factor * NORMAL_STEPS[bits] * rms
        found = ((values / step - 1) / 2).round_().mul_(2).add_(1).clamp_(-top, top)
        wrong = (values - found * step).square().sum(-1, keepdim=True)
        best = torch.where(wrong < error, found, best) if len(error) else found
        error = torch.minimum(wrong, error) if len(error) else wrong
    return best


def turned(values: Tensor, seed: int, back: bool = False) -> Tensor:
    """By a randomised Hadamard transform of the columns, made of its seed: twice signs, blocks, and a permutation."""
    columns = values.shape[-1]
    block = columns & -columns
    hadamard = torch.ones(1, 1)
    while len(hadamard) < block:
        hadamard = torch.cat([torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)])
    hadamard /= math.sqrt(block)
    generator = torch.Generator().manual_seed(seed)
    rounds = [
        (torch.randint(2, (columns,), generator=generator) * 2.0 - 1, torch.randperm(columns, generator=generator))
        for _ in range(2)
    ]
    for signs, order in reversed(rounds) if back else rounds:
        if back:
            values = (values[..., order.argsort()].unflatten(-1, (-1, block)) @ hadamard).flatten(-2) * signs
        else:
            values = ((values * signs).unflatten(-1, (-1, block)) @ hadamard).flatten(-2)[..., order]
    return values


def few_bits(delta: Tensor, number: int, bits: int, rotated: bool = False) -> Made:
    """BitDelta (arXiv 2402.10193), also in more bits: levels and a scale a row. A rotation is made of a seed."""
    held = turned(delta, number) if rotated else delta
    made, nbytes = resized(held, levels(held, bits), True)
    return turned(made, number, back=True) if rotated else made, delta.numel() * bits // 8 + nbytes


def mean_magnitude(delta: Tensor, number: int) -> Made:
    """BitDelta as published, before it is tuned on data, but with a scale a row."""
    scale = delta.abs().mean(-1, keepdim=True)
    return delta.sign() * scale, delta.numel() // 8 + 2 * len(scale)


def factors(delta: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(N, r) and (r, K): the loudest directions, from the eigenvectors of the smaller of two products."""
    if delta.shape[0] < delta.shape[1]:
        left, right = factors(delta.mT, rank)
        return right.mT, left.mT
    found = torch.linalg.eigh(delta.mT @ delta).eigenvectors.flip(1)[:, :rank]
    return delta @ found, found.mT


def low_rank(delta: Tensor, number: int, bands: Sequence[tuple[int, int]]) -> Made:
    """A truncated singular value decomposition, in bands of (directions, bits) from the loudest on.

    In several bands it is Delta-CoMe's idea (arXiv 2406.08903), in 16 bits TSV-Compress (arXiv 2412.00081). In few bits
    a direction has a step on each side. The left factor is fitted again to the right one as it is stored. Held: levels
    of both factors and their steps.
    """
    ends = [0, *itertools.accumulate(directions for directions, _ in bands)]
    rank = min(ends[-1], *delta.shape)
    right = factors(delta, rank)[1]
    spans = [range(rank)[first:last] for first, last in itertools.pairwise(ends) if first < rank]
    nbytes = 0
    held = torch.empty_like(right)
    for span, (_, bits) in zip(spans, bands, strict=False):
        held[span] = right[span].half().float() if bits == 16 else _own_size(right[span], bits)
    left = torch.linalg.lstsq(held.mT, delta.mT).solution.mT
    made = torch.zeros_like(delta)
    for span, (_, bits) in zip(spans, bands, strict=False):
        part = left[:, span].half().float() if bits == 16 else _own_size(left[:, span].mT, bits).mT
        made += part @ held[span]
        nbytes += sum(delta.shape) * len(span) * bits // 8 + (0 if bits == 16 else 4 * len(span))
    return made, nbytes


def _own_size(vectors: Tensor, bits: int) -> Tensor:
    """In few bits, a step a vector."""
    return resized(vectors, levels(vectors, bits), True)[0]


def sparse_signs(delta: Tensor, number: int, share: float, rotated: bool = False, by_row: bool = False) -> Made:
    """T-Switch (arXiv 2412.00054): signs of the largest ``share``, of a matrix or of each row.

    Held: a bit for each sign, the mask at its entropy, a scale a matrix or a row.
    """
    held = turned(delta, number) if rotated else delta
    among = held if by_row else held.flatten()[None]
    kept = max(1, round(share * among.shape[1]))
    threshold = among.abs().topk(kept, dim=1).values[:, -1:]
    made, nbytes = resized(held, torch.where(held.abs() >= threshold, held.sign(), 0), by_row)
    nbytes += math.ceil((delta.numel() * share + delta.numel() * entropy(share)) / 8)
    return turned(made, number, back=True) if rotated else made, nbytes


def entropy(share: float) -> float:
    """Bits for each entry of a mask of which ``share`` is set, by a coder that loses nothing."""
    return -sum(p * math.log2(p) for p in (share, 1 - share) if 0 < p < 1)


def dropped(delta: Tensor, number: int, share: float, bits: int = 16, rotated: bool = False) -> Made:
    """DARE (arXiv 2311.03099): a random ``share`` of the values, the mask made of a seed.

    Held: the values, in few bits with a scale a row.
    """
    held = turned(delta, number) if rotated else delta
    mask = torch.rand(held.shape, generator=torch.Generator().manual_seed(number + 100)) < share
    few = held.half().float() if bits == 16 else levels(held, bits)
    made, nbytes = resized(held, few * mask, bits < 16)
    return turned(made, number, back=True) if rotated else made, math.ceil(delta.numel() * share * bits / 8) + nbytes


def elected(deltas: Tensor) -> Made:
    """EMR (arXiv 2405.17461): one delta with elected signs and the largest magnitudes. Held: it in 16 bits, a mask of a
    bit and a scale a model."""
    sign = deltas.sum(0).sign()
    unified = sign * torch.where(deltas.sign() == sign, deltas.abs(), 0).amax(0)
    return _masked(deltas, unified, lambda delta: delta.sign() == sign)


def tall_masks(deltas: Tensor, strictness: float = 0.4) -> Made:
    """TALL-masks (arXiv 2405.07813): the sum of all deltas where a model's own part is loud. Held: as EMR."""
    total = deltas.sum(0)
    return _masked(deltas, total, lambda delta: delta.abs() >= strictness * (total - delta).abs())


def _masked(deltas: Tensor, unified: Tensor, mask: Callable[[Tensor], Tensor]) -> Made:
    made, nbytes = torch.empty_like(deltas), 2 * unified.numel()
    for number, delta in enumerate(deltas):
        made[number], scale = resized(delta, unified * mask(delta), False)
        nbytes += unified.numel() // 8 + scale
    return made, nbytes


def summed(deltas: Tensor) -> Made:
    """Task arithmetic (arXiv 2212.04089): one delta for all, λ times. A merged model holds no more than any."""
    return deltas.sum(0, keepdim=True).expand_as(deltas), 0


def ties(deltas: Tensor, density: float = 0.2) -> Made:
    """TIES (arXiv 2306.01708), each model's matrix trimmed to its largest values."""
    trimmed = torch.empty_like(deltas)
    for number, delta in enumerate(deltas):
        threshold = delta.abs().flatten().kthvalue(round((1 - density) * delta.numel())).values
        trimmed[number] = torch.where(delta.abs() > threshold, delta, 0)
    agrees = trimmed.sign() == trimmed.sum(0).sign()
    merged = torch.where(agrees, trimmed, 0).sum(0) / (agrees & (trimmed != 0)).sum(0).clamp(min=1)
    return merged.expand_as(deltas), 0


def singular_vectors_merged(deltas: Tensor) -> Made:
    """TSV-Merge (arXiv 2412.00081): 1/J of every model's directions, all made orthogonal together, and summed."""
    rank = min(deltas.shape[1:]) // len(deltas)
    left, loud, right = zip(*(_decomposed(delta, rank) for delta in deltas), strict=True)
    merged = _nearest_orthogonal(torch.cat(left, 1)) * torch.cat(loud) @ _nearest_orthogonal(torch.cat(right, 1)).mT
    return merged.expand_as(deltas), 0


def _decomposed(delta: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    left, right = factors(delta, rank)
    if delta.shape[0] < delta.shape[1]:  # whose right factor is the one with sizes
        loud = right.norm(dim=1)
        return left, loud, (right / loud[:, None]).mT
    loud = left.norm(dim=0)
    return left / loud, loud, right.mT


def _nearest_orthogonal(vectors: Tensor) -> Tensor:
    left, _, right = torch.linalg.svd(vectors, full_matrices=False)
    return left @ right


def per_model(method: Callable[..., Made], **given: object) -> Method:
    """A method for one delta as one for all."""
    return by_model(partial(method, **given))
