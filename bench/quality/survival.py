"""What each method makes of a set of fine-tunes, what it stores for that, and which share of their gain survives.

Storage is in bits a superposed parameter and model, of all that a method has to hold of its deltas: D's levels and
steps, which a group shares, the shared bases in 16 bits, every model's coordinates and gains; of merged deltas their 16
bits; of what is stored per task its levels or factors with their scales.
"""

import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from finetunes import Finetunes, LanguageModel, bits, matrices
from torch import Tensor

import randes
from randes.demo.baselines import task_arithmetic, ties
from randes_kernels import pack, unpack

Tensors = dict[str, Tensor]
GROUPS = (8, 16, 4, 2)
RANKS = (4, 8, 16, 32, 64)
FP16_RANKS, FOUR_BIT_RANKS = (1, 2, 3, 4, 5, 8, 11, 16), (1, 2, 3, 4, 6, 8, 11, 16, 20, 32, 40)
"""Of truncated singular value decompositions, for every 128 of width."""
MERGED = {
    "task arithmetic, best λ": (task_arithmetic, (0.1, 0.2, 0.3, 0.5, 0.7, 1.0)),
    "TIES, best λ": (ties, (0.2, 0.4, 0.6, 0.8, 1.0, 1.3, 1.6)),
}
"""Merging methods and their λ, of which each gets the one that is best on the validation text."""
CALIBRATING = 32
"""Sequences of each kind to calibrate with."""
PLAIN = randes.Config(include=("layers*weight",), rank=0)


class Made(NamedTuple):
    """One method's work: its row's first entries, bytes for all models, and each model's tensors again."""

    row: dict[str, Any]
    nbytes: int
    state_of: Callable[[str], Tensors]


def configurations() -> dict[str, randes.Config]:
    """What is superposed how; ``group_size`` is varied on top."""
    ranks = {f"shared basis of rank {rank}": replace(PLAIN, rank=rank) for rank in (*RANKS, "auto")}
    return {
        "column signs": replace(PLAIN, signs="columns"),
        "layer shuffle + column signs": replace(PLAIN, signs="columns", shuffle_layers=-1),
        "two-sided signs": PLAIN,
        "two-sided, centred": replace(PLAIN, centre=True),
        **ranks,
        **{f"{name}, centred": replace(config, centre=True) for name, config in ranks.items()},
    }


def packings(config: randes.Config) -> list[tuple[int, int]]:
    """In how many bits D and coordinates are held, one after the other."""
    if config.signs != "both":
        return [(16, 16)]
    if not config.rank:
        return [(16, 16), (8, 16), (4, 16), (2, 16)]
    more = [(8, 8), (4, 8), (2, 8)] if config.centre and config.rank in (16, 32) else []
    return [(16, 16), (4, 4), (2, 4), *more]


def served(made: randes.Superposition, d: int, coordinates: int) -> tuple[randes.Superposition, int]:
    """A superposition with D and coordinates in so many bits, and the bytes of its deltas: with 16, as it is."""
    packed = made if d == 16 else made.pack(d, coordinates=coordinates)
    gains = 4 * sum(len(member.gains) for member in made.members.values())
    # Integers that do not fit int16 are kept in 32 bits; a server holds 16 of every D.
    of_d = packed.sizes.superposed if d < 16 else 2 * sum(d.numel() for g in made.deltas.values() for d in g.values())
    return packed, of_d + packed.sizes.basis + gains


class Judge:
    """Shares of each fine-tune's gain that survive, on validation or test text."""

    def __init__(self, tuned: Finetunes) -> None:
        self.model = LanguageModel(tuned.setting)
        self.kinds = list(tuned.models)
        self.parts = {
            "validation": {kind: rows[: len(rows) // 2] for kind, rows in tuned.texts.validation.items()},
            "test": tuned.texts.test,
        }
        self.base = {part: self._losses(part, lambda _: tuned.base) for part in self.parts}
        self.own = {part: self._losses(part, tuned.models.__getitem__) for part in self.parts}

    def _losses(self, part: str, state_of: Callable[[str], Tensors]) -> list[float]:
        """Bits a byte of each kind."""
        found = []
        for kind in self.kinds:
            self.model.load_state_dict(state_of(kind))
            found.append(bits(self.model, self.parts[part][kind]))
        return found

    def kept(self, part: str, state_of: Callable[[str], Tensors]) -> list[float]:
        """Of each kind, in the order of the kinds."""
        losses = self._losses(part, state_of)
        return [
            (before - loss) / (before - own)
            for before, loss, own in zip(self.base[part], losses, self.own[part], strict=True)
        ]


def superposed(tuned: Finetunes, group: int, only: str) -> Iterator[Made]:
    """Ours, in every number of bits."""
    for method, config in configurations().items():
        if only in method:
            made = randes.compress(tuned.base, tuned.models, replace(config, group_size=group))
            yield from _packed(made, method, packings(config))


def calibrated(tuned: Finetunes, group: int, only: str) -> Iterator[Made]:
    """Ours with bases that come from activations: of the base on training text of every kind."""
    methods = {f"shared basis of rank {rank}, calibrated": rank for rank in (16, "auto")}
    wanted = {method: rank for method, rank in methods.items() if only in method}
    if wanted:
        base = LanguageModel(tuned.setting)
        base.load_state_dict(tuned.base)
        moments = randes.calibrate(base, (rows[:CALIBRATING, :-1].long() for rows in tuned.texts.training.values()))
    for method, rank in wanted.items():
        config = replace(PLAIN, rank=rank, group_size=group)
        made = randes.compress(tuned.base, tuned.models, config, calibration=moments)
        yield from _packed(made, method, [(16, 16), (4, 4)])


def _packed(made: randes.Superposition, method: str, packings: list[tuple[int, int]]) -> Iterator[Made]:
    group = made.config.group_size
    for d, held in packings:
        packed, nbytes = served(made, d, held)
        yield Made({"method": method, "group": group, "d": d, "coordinates": held}, nbytes, packed.retrieve)


def merged(tuned: Finetunes, group: int, judge: Judge, only: str) -> Iterator[Made]:
    """One delta for all models of a group, at the λ that is best on the validation text."""
    deltas, kinds = _deltas(tuned), list(tuned.models)
    for method, (merge, scales) in MERGED.items():
        if only not in method:
            continue
        sums: dict[str, Tensors] = {}
        for first in range(0, len(kinds), group):
            chosen = kinds[first : first + group]
            sums |= dict.fromkeys(chosen, merge([deltas[kind] for kind in chosen]))
        at = partial(_with_deltas, tuned.base, sums)
        survives = {scale: statistics.mean(judge.kept("validation", partial(at, scale))) for scale in scales}
        best = max(scales, key=survives.__getitem__)
        row = {"method": method, "group": group, "scale": best}
        yield Made(row, len(kinds) // group * _bytes(deltas), partial(at, best))


def per_task(tuned: Finetunes, only: str) -> Iterator[Made]:
    """Every model's delta by itself in few bits, or in few directions."""
    methods = {m: approximate for m, approximate in approximations(tuned.setting.width).items() if only in m}
    deltas = _deltas(tuned) if methods else {}
    factors = {kind: {name: _factors(value) for name, value in delta.items()} for kind, delta in deltas.items()}
    for method, approximate in methods.items():
        approximated: dict[str, Tensors] = {}
        nbytes = 0
        for kind, delta in deltas.items():
            found = {name: approximate(value, *factors[kind][name]) for name, value in delta.items()}
            approximated[kind] = {name: value for name, (value, _) in found.items()}
            nbytes += sum(held for _, held in found.values())
        yield Made({"method": method, "group": 1}, nbytes, partial(_with_deltas, tuned.base, approximated, 1.0))


def approximations(width: int) -> dict[str, Callable[[Tensor, Tensor, Tensor], tuple[Tensor, int]]]:
    """What a delta becomes and the bytes of that; given the delta and its factors, (r, N) and (r, K)."""

    def low_rank(rank: int, delta: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, int]:
        left, right = left[:rank].half(), right[:rank].half()
        return left.float().mT @ right.float(), left.nbytes + right.nbytes

    def low_rank_in_four_bits(rank: int, delta: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, int]:
        packed = pack(left[:rank], 4), pack(right[:rank], 4)
        return unpack(packed[0]).mT @ unpack(packed[1]), packed[0].nbytes + packed[1].nbytes

    def one_bit(by_row: bool, delta: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, int]:
        """BitDelta (arXiv 2402.10193), with a scale a matrix or a row, before it is tuned on data."""
        scale = (delta.abs().mean(1, keepdim=True) if by_row else delta.abs().mean()).half()
        return delta.sign() * scale.float(), delta.numel() // 8 + scale.nbytes

    def few_bits(bits: int, delta: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, int]:
        packed = pack(delta, bits)
        return unpack(packed), packed.nbytes

    size = width // 128  # the same shares of all directions, and so the same bits
    return {
        **{f"per-task rank {r * size}": partial(low_rank, r * size) for r in FP16_RANKS},
        **{f"per-task rank {r * size} in 4 bits": partial(low_rank_in_four_bits, r * size) for r in FOUR_BIT_RANKS},
        "per-task 1 bit": partial(one_bit, False),
        "per-task 1 bit, a scale a row": partial(one_bit, True),
        "per-task 2 bits": partial(few_bits, 2),
        "per-task 4 bits": partial(few_bits, 4),
    }


def _factors(delta: Tensor) -> tuple[Tensor, Tensor]:
    """(r, N) and (r, K), whose product over r is the delta: a singular value decomposition, loudest first."""
    u, s, v = torch.linalg.svd(delta, full_matrices=False)
    return (u * s.sqrt()).mT.contiguous(), s.sqrt()[:, None] * v


def measured(
    tuned: Finetunes, groups: Iterable[int], only: str, step: Callable[[str], None]
) -> Iterator[dict[str, Any]]:
    """A row for each method whose name holds ``only``, size of groups and number of bits, after one of the fine-tunes.

    step: called before each, with what it is.
    """
    entries = len(tuned.models) * sum(tuned.base[name].numel() for name in matrices(tuned.base))
    judge = Judge(tuned)
    yield {"method": "fine-tunes", "group": 1, "bits": 16, "base": judge.base["test"], "own": judge.own["test"]}

    def all_made() -> Iterator[Made]:
        yield from per_task(tuned, only)
        for group in groups:
            if group <= len(tuned.models):
                yield from merged(tuned, group, judge, only)
                yield from superposed(tuned, group, only)
                if group == 8:
                    yield from calibrated(tuned, group, only)

    for made in all_made():
        step(f"{made.row['method']}, groups of {made.row['group']}")
        kept = judge.kept("test", made.state_of)
        yield {**made.row, "bits": round(8 * made.nbytes / entries, 4), "kept": [round(share, 4) for share in kept]}


def _deltas(tuned: Finetunes) -> dict[str, Tensors]:
    """Of each model, in the matrices."""
    return {
        kind: {name: state[name] - tuned.base[name] for name in matrices(tuned.base)}
        for kind, state in tuned.models.items()
    }


def _with_deltas(base: Tensors, deltas: dict[str, Tensors], scale: float, kind: str) -> Tensors:
    """The base with so many times a kind's deltas."""
    return {**base, **{name: base[name] + scale * delta for name, delta in deltas[kind].items()}}


def _bytes(deltas: dict[str, Tensors]) -> int:
    """Of one model's delta in 16 bits."""
    return 2 * sum(value.numel() for value in next(iter(deltas.values())).values())
