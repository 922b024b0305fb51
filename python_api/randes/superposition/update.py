"""How models join a superposition and leave it: a tensor at a time, and all of it or nothing.

One model that joins is measured first, which finds everything that can be wrong with it, and superposed then, in a
second reading. Each tensor's integers are replaced as a whole, so what an error interrupts is undone exactly by the
opposite. Models that make a new superposition join it together, each tensor read once for both: nobody has seen it yet.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor
from functools import partial
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from randes.checkpoints.lazy_tensors import LazyTensors, chunks, headers
from randes.checkpoints.on_disk import Overlay, own
from randes.checkpoints.sources import check_finite
from randes.checkpoints.threads import ahead, one_thread
from randes.errors import CheckpointError, RandesError
from randes.superposition.added_rows import keep_added
from randes.superposition.basis import shared_basis
from randes.superposition.integers import averaged, check_average, gain_of, narrow, rate
from randes.superposition.members import BASE_NAME, Member, NewModel, check_scales
from randes.superposition.packed_tensors import coordinates_of
from randes.superposition.prefetch import Chunk, Pairs, Prefetch, is_superposed
from randes.superposition.state import Group, State
from randes_kernels import mixing, slices, superpose_
from randes_kernels.format import Matrix

NOTHING_LEFT = 2.0**-40
"""The gain of a delta that lies wholly in the shared basis; the rest of it is zero."""
PutAway: TypeAlias = Callable[[State, str, str], LazyTensors]
SUMMED = ("average", "sum")
"""What ``Config.others`` makes of a sum over the models."""


def add_model(sup: State, model: NewModel, step: Callable[[int], None]) -> None:
    """Superpose one more model. Nothing is changed by what raises."""
    keep_added(model)
    with Prefetch(sup, [model], step) as reading:
        for tensor in reading:
            for _, incoming in reading.models():
                _measure(sup, model, tensor, incoming, reading.computing, hold=tensor in sup.bases)
    member = model.member()
    check_scales(model.name, member)
    change(sup, model, step)
    sup.members[model.name] = member


def remove_model(sup: State, name: str, tensors: Mapping[str, Tensor], step: Callable[[int], None]) -> None:
    """Take a model away, whose ``tensors`` were found to be those that joined. Nothing is changed by what raises."""
    held = sup.members[name]
    model = _measured(name, held, tensors)
    change(sup, model, step, subtract=True, check=partial(check_comes_back, sup, name))
    del sup.members[name]
    tidy(sup, held.group, name)


def restore_model(sup: State, name: str, member: Member, tensors: Mapping[str, Tensor]) -> None:
    """Undo ``remove_model``, whatever group the model was in."""
    change(sup, _measured(name, member, tensors), lambda _: None)
    sup.members[name] = member


def _measured(name: str, held: Member, tensors: Mapping[str, Tensor]) -> NewModel:
    """A model that was measured when it joined."""
    model = NewModel(name, held.group, held.alpha, tensors, held.index, dict(held.gains))
    model.units = dict(held.units)
    model.coordinates = {tensor: coordinates_of(own) for tensor, own in held.coordinates.items()}
    return model


def add_models(
    sup: State, models: list[NewModel], step: Callable[[int], None], put_away: PutAway | None = None
) -> None:
    """Superpose the models of a new superposition, which what raises leaves unfinished.

    put_away: called with the superposition, a model's name and a tensor that it shares with no other, once its delta is
    complete; what it answers with has it from then on, and memory need not. For superpositions with one such tensor.
    """
    for model in models:
        keep_added(model)
    with Prefetch(sup, models, step) as reading:
        for tensor in reading:
            for model, incoming in reading.models():
                pairs = _measure(sup, model, tensor, incoming, reading.computing, hold=True)
                _superpose(sup, model, tensor, reading.spent(pairs), reading.computing, in_place=True)
                if put_away is not None and tensor in sup.unshared and tensor in model.gains:
                    sup.deltas[model.name] = Overlay({}, put_away(sup, model.name, tensor))
                pairs.clear()  # before the next tensor comes
            for model in models:
                if _is_averaged(sup, model, tensor):
                    _average(sup, model, tensor, subtract=False)
    members = {model.name: model.member() for model in models}
    for name, member in members.items():
        check_scales(name, member)
    sup.members |= members


def change(
    sup: State, model: NewModel, step: Callable[[int], None], *, subtract: bool = False,
    check: Callable[[], None] = lambda: None,
) -> None:  # fmt: skip
    """Add a measured model's integers, or take them away. What raises, ``check`` at the end included, undoes it."""

    def one(tensor: str, subtract: bool) -> None:
        if _is_averaged(sup, model, tensor):
            _average(sup, model, tensor, subtract=subtract)
        else:
            with ahead(zip(chunks(model.tensors, tensor), chunks(sup.base, tensor), strict=True)) as pairs:
                _superpose(sup, model, tensor, pairs, computing, subtract=subtract)

    done: list[str] = []
    with one_thread() as computing:
        try:
            for tensor in headers(sup.base):
                if tensor in model.gains or _is_averaged(sup, model, tensor):
                    one(tensor, subtract)
                    done.append(tensor)
                    step(headers(sup.base)[tensor].nbytes)
            check()
        except BaseException:
            try:
                for tensor in done:
                    one(tensor, not subtract)
                tidy(sup, model.group, model.name)
            except BaseException as error:
                sup.torn = f"{model.name!r} is in part of it, and could not be read to take it out again"
                raise RandesError(f"the superposition must be loaded again: {sup.torn}") from error
            raise


def _measure(
    sup: State, model: NewModel, tensor: str, incoming: Iterable[Chunk], computing: Executor, *, hold: bool
) -> Pairs:
    """Everything about one tensor of a model that joins; its parts, if they are to be held.

    Raises ``CheckpointError`` for what cannot be superposed.
    """
    superposed = is_superposed(sup, model, tensor)
    pairs, sums, digest = computing.submit(_passed, sup, tensor, incoming, superposed, hold and superposed).result()
    model.digests[tensor] = digest
    if digest == sup.base_digests[tensor]:
        return []
    if not superposed:
        if sup.config.others == "keep":
            model.kept[tensor] = own(model.tensors, tensor)
        return []
    if tensor in sup.bases:
        for part, _ in pairs:
            check_finite(tensor, part)
        u = sup.bases[tensor].double() * shared_basis.UNIT

        def products() -> Tensor:
            return torch.cat([(part.double() - base.double()) @ u for part, base in pairs])

        inside = computing.submit(products).result()  # where no number of threads changes the last bits
        model.coordinates[tensor], model.units[tensor] = shared_basis.rounded(inside)
        sums = [total for pair in _differences(sup, model, tensor, pairs) for total in slices.squares(*pair)]

    def peak() -> float:
        again = pairs or zip(chunks(model.tensors, tensor), chunks(sup.base, tensor), strict=True)
        differences = _differences(sup, model, tensor, again)
        largest = max(float((part.double() - base.double()).abs().max()) for part, base in differences)
        matrix = sup.transform(tensor).matrix
        if matrix in (Matrix.ROTATION, Matrix.DENSE):  # which may gather a whole row in one place
            largest = math.sqrt(max(sums))
        return largest * mixing.AMPLIFIES[Matrix(matrix)]

    count, shared = headers(sup.base)[tensor].numel(), sup.shared_gain(tensor)
    growth = mixing.AMPLIFIES[Matrix(sup.transform(tensor).matrix)]
    models = 1 if tensor in sup.unshared else sup.config.group_size
    gain = gain_of(tensor, sums, count, models, peak, shared=shared, growth=growth)
    if gain == 0 and not (tensor in model.coordinates and model.coordinates[tensor].any()):
        # −0.0 for 0.0: other bytes, the same weight.
        model.coordinates.pop(tensor, None)
        model.units.pop(tensor, None)
        return []
    model.gains[tensor] = gain or NOTHING_LEFT
    return pairs


def _passed(
    sup: State, tensor: str, incoming: Iterable[Chunk], superposed: bool, hold: bool
) -> tuple[Pairs, list[float], str]:
    """What is found while the parts of a tensor go by: those to be held, sums of squares, the digest of all."""
    pairs: Pairs = []
    sums: list[float] = []
    digest = ""
    for part, base, digest in incoming:  # noqa: B007 (the last part's is of all)
        if not superposed:
            check_finite(tensor, part)
            if sup.config.others in SUMMED:
                check_average(tensor, part)
        elif tensor not in sup.bases:
            sums += slices.squares(part, base)
        if hold:
            pairs.append((part, base))
    return pairs, sums, digest


def _differences(
    sup: State, model: NewModel, tensor: str, pairs: Iterable[tuple[Tensor, Tensor]]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Parts whose differences are superposed: fine-tune and base; with a shared basis, what it leaves and zero."""
    first = 0
    for part, base in pairs:
        if tensor in model.coordinates:
            held = model.coordinates[tensor][first : first + len(part)]
            rest = shared_basis.remainder(part.double() - base.double(), sup.bases[tensor], held, model.units[tensor])
            first += len(part)
            part, base = rest, torch.zeros_like(rest)
        yield part, base


def _superpose(
    sup: State, model: NewModel, tensor: str, pairs: Iterable[tuple[Tensor, Tensor]], computing: Executor, *,
    subtract: bool = False, in_place: bool = False,
) -> None:  # fmt: skip
    """Add one tensor's turned delta to its group's integers, or take it away, once all of it is done."""
    if tensor not in model.gains:
        return
    key, place = sup.key(model.name), sup.place(model.name, tensor, model.index)
    number, steps = sup.tensor_id(tensor), rate(model.gains[tensor])
    group = sup.deltas.setdefault(sup.group_of(model.name, tensor, model.group), {})
    shape = headers(sup.base)[tensor].shape
    if place not in group:
        held = torch.from_numpy(np.zeros(shape, np.int16))  # whose pages come when they are written to
    else:
        held = group[place] if in_place else own(group, place)
    pairs = _differences(sup, model, tensor, pairs)
    if sup.device.type != "cpu":
        finetuned, base = (torch.cat(side).to(sup.device) for side in zip(*pairs, strict=True))
        wide = held.to(sup.device, torch.int32)
        superpose_(wide, finetuned, base, steps, key, number, sup.transform(tensor), subtract=subtract)
        group[place] = narrow(wide).cpu()
        return
    turn = slices.turn(key, number, shape, sup.transform(tensor))
    # In a tensor that nobody sees yet, or that is replaced: who stops waiting here leaves the old one.
    group[place] = computing.submit(_added, held, pairs, steps, turn, subtract).result()


def _added(
    held: Tensor, pairs: Iterable[tuple[Tensor, Tensor]], steps: float, turn: slices.Turn, subtract: bool
) -> Tensor:
    """``held``, or as int32 where it must be, with all parts added or taken away."""
    add = partial(slices.superpose_rows_, rate=steps, turn=turn, subtract=subtract)
    first = 0
    for part, base in pairs:
        end = first + len(part)
        done = add(held[first:end], part, base, first=first)
        if done < len(part):  # int16 does not hold it
            held = held.to(torch.int32)
            add(held[first + done : end], part[done:], base[done:], first=first + done)
        first = end
    return narrow(held)


def _is_averaged(sup: State, model: NewModel, tensor: str) -> bool:
    averaging = sup.config.others in SUMMED and model.name != BASE_NAME and tensor not in sup.superposed
    return averaging and headers(sup.base)[tensor].is_floating_point()


def _average(sup: State, model: NewModel, tensor: str, *, subtract: bool) -> None:
    held = sup.averages.get(tensor)
    sup.averages[tensor] = averaged(held, model.tensors[tensor], subtract=subtract)


def check_comes_back(sup: State, name: str) -> None:
    """Raise ``CheckpointError`` unless what a model alone had a delta in is zero once it was taken away."""
    for group in (sup.members[name].group, name):
        for place in sorted(_unused(sup, group, without=name)):
            if any(part.any() for part in chunks(sup.deltas[group], place)):
                raise CheckpointError(f"{place} does not come back to zero without {name!r}: its integers were altered")


def tidy(sup: State, *groups: Group) -> None:
    """Drop what no model has anything in any more."""
    for group in groups:
        for place in _unused(sup, group):
            del sup.deltas[group][place]
        if group in sup.deltas and not sup.deltas[group]:
            del sup.deltas[group]
    if not sup.names:
        sup.averages = {}


def _unused(sup: State, group: Group, without: str | None = None) -> set[str]:
    used = {
        sup.place(name, tensor)
        for name, member in sup.members.items()
        if name != without and group in (member.group, name)
        for tensor in member.gains
        if sup.group_of(name, tensor) == group
    }
    return headers(sup.deltas.get(group, {})).keys() - used
