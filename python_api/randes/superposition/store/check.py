"""Whether a store's tensors are what its manifest says of them: read is what this has let through."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from randes.checkpoints.layout import ADDED, SUPERPOSABLE
from randes.checkpoints.lazy_tensors import described, headers
from randes.superposition.added_rows import added_in
from randes.superposition.members import BASE_NAME
from randes.superposition.packed_tensors import SuperposedDelta
from randes.superposition.state import Group, State
from randes_kernels import Packed

INTEGERS = (torch.int16, torch.int32)


def check_whole(superposition: State) -> None:
    """Raise ``ValueError`` where a model lacks what its record says that it has: it would answer as the base there; and
    where a tensor is of another shape or dtype than it can be."""
    _check_base(superposition)
    for group, held in superposition.held.items():
        _check_group(superposition, group, described(held))
    base = headers(superposition.base)
    for tensor, basis in headers(superposition.bases).items():
        _must_be(basis, f"the basis of {tensor}", (base[tensor].shape[1], *basis.shape[1:2]), (torch.int16,))
    for tensor, average in headers(superposition.averages).items():
        _must_be(average, f"the average of {tensor}", tuple(base[tensor].shape), (torch.int64,))
    for name in superposition.members:
        _check_member(superposition, name)


def _check_base(superposition: State) -> None:
    base, config = headers(superposition.base), superposition.config
    for tensor in superposition.superposed:
        found = base[tensor]
        _must_be(found, tensor, tuple(found.shape[:2]), SUPERPOSABLE)
        if 0 in found.shape or found.shape[1] % config.segments:
            raise ValueError(f"{tensor} must have a multiple of {config.segments} columns, got {tuple(found.shape)}")
    joined = headers(superposition.layout.joined(superposition.base, ties=False))
    for alias, tensor in superposition.layout.ties.items():
        if tensor not in joined or alias in joined:
            raise ValueError(f"{alias} must be another name of a tensor that is there, got {tensor}")
    if (BASE_NAME in superposition.members) != config.centre or "" in superposition.members:
        raise ValueError(f"models must have names, {BASE_NAME!r} where deltas are centred; got {superposition.served}")


def _check_group(superposition: State, group: Group, held: Mapping[str, Tensor | Packed]) -> None:
    base, packing = headers(superposition.base), superposition.packing
    for tensor, found in held.items():
        if tensor not in superposition.superposed or (tensor in superposition.unshared) is not isinstance(group, str):
            raise ValueError(f"group {group} must hold superposed tensors alone, got {tensor}")
        if isinstance(group, str) and tensor not in superposition.members[group].gains:
            raise ValueError(f"model {group!r} must have a gain of {tensor}, of which it has a delta")
        rows, columns = base[tensor].shape
        if isinstance(found, Tensor):
            _must_be(found, f"{tensor} in group {group}", (rows, columns), INTEGERS)
            continue
        assert packing is not None
        _check_packed(found, tensor, rows, packing.of(tensor in superposition.unshared)[0])


def _check_member(superposition: State, name: str) -> None:
    """Raise ``ValueError`` where one model is not what its record says."""

    def must(right: bool, tensor: str, what: str) -> None:
        if not right:
            raise ValueError(f"model {name!r} must have {what} of {tensor}, which is not there")

    member, packing, base = superposition.members[name], superposition.packing, headers(superposition.base)
    for tensor in base:
        must(tensor in member.digests, tensor, "a digest")
    for tensor in member.gains:
        must(tensor in superposition.superposed, tensor, "a superposed delta")
        group, unshared = superposition.group_of(name, tensor), tensor in superposition.unshared
        if packing is not None and unshared:
            must(tensor in member.directions, tensor, "directions")
            if superposition.in_no_bits(tensor):
                continue
        held = superposition.held.get(group, {})
        must(superposition.place(name, tensor) in held, tensor, f"a superposition in group {group}")
    for tensor in member.alphas:
        must(tensor in member.gains, tensor, "a superposed delta")
    _check_coordinates(superposition, name, must)
    for tensor, kept in headers(member.kept).items():
        must(tensor in base and tensor not in member.gains, tensor, "no own values beside a delta")
        _must_be(kept, f"{tensor} of model {name!r}", tuple(kept.shape), (base[tensor].dtype,))
    added = headers(member.added)
    for tensor in added.keys() | added_in(member.digests).keys():
        must(tensor in added and f"{tensor}{ADDED}" in member.digests, tensor, "added rows and their digest")
        must(tensor in superposition.superposed and tensor not in member.kept, tensor, "a superposed matrix above them")
        shape = (len(added[tensor]), base[tensor].shape[1])
        must(len(added[tensor]) > 0, tensor, "added rows")
        _must_be(added[tensor], f"rows added to {tensor} of model {name!r}", shape, (base[tensor].dtype,))
    if superposition.config.others == "keep":
        for tensor in base.keys() - set(superposition.superposed):
            changed = member.digests[tensor] != superposition.base_digests[tensor]
            must(tensor in member.kept or not changed, tensor, "its own values")


def _check_coordinates(superposition: State, name: str, must: Callable[[bool, str, str], None]) -> None:
    member, packing, base = superposition.members[name], superposition.packing, headers(superposition.base)
    bases = {**headers(superposition.bases), **headers(member.directions)}
    for tensor, own in headers(member.directions).items():
        must(tensor in member.units, tensor, "a unit")
        _must_be(own, f"directions of {tensor}", (base[tensor].shape[1], *own.shape[1:2]), (torch.int16,))
    for tensor in member.gains.keys() & bases.keys():
        must(tensor in member.units, tensor, "coordinates in the basis")
    for tensor in member.units:
        must(tensor in member.gains and tensor in bases, tensor, "a basis")
        rows, rank = base[tensor].shape[0], bases[tensor].shape[1]
        held: SuperposedDelta = described(member.coordinates)[tensor]
        if isinstance(held, Tensor):
            _must_be(held, f"coordinates of {tensor}", (rows, rank), (torch.int16,))
        else:
            assert packing is not None
            _check_packed(held, f"coordinates of {tensor}", rank, packing.coordinates)


def _must_be(found: Tensor, what: str, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> None:
    if tuple(found.shape) != shape or found.dtype not in dtypes:
        raise ValueError(f"{what} must be {shape} {dtypes[0]}, got {tuple(found.shape)} {found.dtype}")


def _check_packed(found: Packed, what: str, rows: int, bits: float) -> None:
    """Of how many columns they are, ``PackedTensors`` has seen."""
    words, steps = found.words, found.steps
    right = tuple(words.shape[:-1]) == (rows,) and steps.dim() == 2
    if not right or words.dtype != (torch.int8 if bits == 8 else torch.uint8) or steps.dtype != torch.float16:
        raise ValueError(f"{what} must have {rows} packed rows in {bits} bits, got {tuple(words.shape)} {words.dtype}")
