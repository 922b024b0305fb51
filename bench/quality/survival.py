"""What each method makes of a set of fine-tunes, what it stores for that, and which share of their gain survives.

Storage is in bits a superposed parameter and model, of all that a method has to hold of its deltas: D's levels and
steps, which a group shares, the shared bases in 16 bits, every model's coordinates and gains; of merged deltas their 16
bits; of what is stored per task its levels or factors with their scales.
"""

import statistics
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from finetunes import Finetunes, LanguageModel, bits, matrices
from rival_forms import forms_at
from torch import Tensor

import randes
from randes.demo.baselines import task_arithmetic, ties

Tensors = dict[str, Tensor]
Keys = Collection[tuple[str, int, float, int]]
"""Of rows: method, models to a group, bits of D and of coordinates."""
GROUPS = (8, 16, 4, 2)
RANKS = (4, 8, 16, 32, 64)
MERGED = {
    "task arithmetic, best λ": (task_arithmetic, (0.1, 0.2, 0.3, 0.5, 0.7, 1.0)),
    "TIES, best λ": (ties, (0.2, 0.4, 0.6, 0.8, 1.0, 1.3, 1.6)),
}
"""Merging methods and their λ, of which each gets the one that is best on the validation text."""
CALIBRATING = 32
"""Sequences of each kind to calibrate with."""
AUTO = "shared basis of rank auto"
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
        f"{AUTO}, rotated": replace(PLAIN, rank="auto", matrix="rotation"),
    }


def packings(method: str, config: randes.Config) -> list[tuple[float, int]]:
    """In how many bits D and coordinates are held, one after the other."""
    if config.signs != "both" or config.centre:
        return [(16, 16)]
    if not config.rank:
        return [(16, 16), (4, 16), (2, 16), (1, 16), (0.5, 16)]
    if config.matrix == "rotation":
        return [(2, 4), (1, 4), (0.5, 4)]
    return [(16, 16), (4, 4), *([(2, 4), (1, 4), (0.5, 4)] if config.rank == "auto" else [])]


def served(made: randes.Superposition, d: float, coordinates: int) -> tuple[randes.Superposition, int]:
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


def superposed(tuned: Finetunes, group: int, only: str, there: Keys) -> Iterator[Made]:
    """Ours, in every number of bits that is not ``there``."""
    for method, config in configurations().items():
        wanted = [(d, held) for d, held in packings(method, config) if (method, group, d, held) not in there]
        if only in method and wanted:
            made = randes.compress(tuned.base, tuned.models, replace(config, group_size=group))
            yield from _packed(made, method, wanted)


def calibrated(tuned: Finetunes, group: int, only: str, there: Keys) -> Iterator[Made]:
    """Ours with bases that come from activations: of the base on training text of every kind."""
    methods = {f"shared basis of rank {rank}, calibrated": rank for rank in (16, "auto")}
    wanted = {m: rank for m, rank in methods.items() if only in m and (m, group, 16, 16) not in there}
    if wanted:
        base = LanguageModel(tuned.setting)
        base.load_state_dict(tuned.base)
        moments = randes.calibrate(base, (rows[:CALIBRATING, :-1].long() for rows in tuned.texts.training.values()))
    for method, rank in wanted.items():
        config = replace(PLAIN, rank=rank, group_size=group)
        yield from _packed(randes.compress(tuned.base, tuned.models, config, calibration=moments), method, [(16, 16)])


def _packed(made: randes.Superposition, method: str, packings: list[tuple[float, int]]) -> Iterator[Made]:
    group = made.config.group_size
    for d, held in packings:
        packed, nbytes = served(made, d, held)
        yield Made({"method": method, "group": group, "d": d, "coordinates": held}, nbytes, packed.retrieve)


def merged(tuned: Finetunes, group: int, judge: Judge, only: str, there: Keys) -> Iterator[Made]:
    """One delta for all models of a group, at the λ that is best on the validation text."""
    deltas, kinds = _deltas(tuned), list(tuned.models)
    for method, (merge, scales) in MERGED.items():
        if only not in method or (method, group, 16, 16) in there:
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


def others(tuned: Finetunes, only: str, there: Keys) -> Iterator[Made]:
    """Other methods that keep something for each model, in the forms that do best (rival_forms.py)."""
    deltas = _deltas(tuned)
    for method, form in forms_at(tuned.setting.width):
        name = f"{method}, {form.name}"
        if only not in name or (name, 1, 16, 16) in there:
            continue
        found: dict[str, Tensors] = {kind: {} for kind in deltas}
        nbytes = 0
        for tensor in matrices(tuned.base):
            made, held = form.method(torch.stack([delta[tensor] for delta in deltas.values()]))
            nbytes += held
            for kind, value in zip(deltas, made, strict=True):
                found[kind][tensor] = value
        yield Made({"method": name, "group": 1}, nbytes, partial(_with_deltas, tuned.base, found, 1.0))


def measured(
    tuned: Finetunes, groups: Iterable[int], only: str, there: Keys, step: Callable[[str], None]
) -> Iterator[dict[str, Any]]:
    """A row for each method whose name holds ``only``, size of groups and number of bits that is not ``there``, after
    one of the fine-tunes.

    step: called before each, with what it is.
    """
    entries = len(tuned.models) * sum(tuned.base[name].numel() for name in matrices(tuned.base))
    judge = Judge(tuned)
    yield {"method": "fine-tunes", "group": 1, "bits": 16, "base": judge.base["test"], "own": judge.own["test"]}

    def all_made() -> Iterator[Made]:
        yield from others(tuned, only, there)
        for group in groups:
            if group <= len(tuned.models):
                yield from merged(tuned, group, judge, only, there)
                yield from superposed(tuned, group, only, there)
                if group == 8:
                    yield from calibrated(tuned, group, only, there)

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
