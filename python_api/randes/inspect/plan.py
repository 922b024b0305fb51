"""What a superposition will take and cost, from the base's shapes alone: to choose before compressing."""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from torch import Tensor

from randes.checkpoints.lazy_tensors import headers, size
from randes.checkpoints.matrices import matrices_of
from randes.config import Config, Rank
from randes.inspect.shapes import Shaped, with_shapes
from randes.superposition.basis.shared_basis import widest
from randes.superposition.members import Sizes
from randes.superposition.packed_tensors import added_noise
from randes.superposition.packing import COLUMNS_A_DIRECTION, coordinates_for, table_bytes
from randes.superposition.superposition import Superposition
from randes_kernels.packing import BITS, packed_bytes

INTEGERS = 2
"""Bytes of an element of the integers; a model whose deltas have long tails may widen some matrices to four."""


@dataclass(frozen=True)
class Row:
    """One choice of bits. Sizes are bytes, except the last three.

    bits: of an element of D in a server; 16 is the base's own dtype, made from the integers at loading.
    store: bytes on the disk of what servers load, the base included. At 16 bits models can be added to it, too.
    times: the same in units of one whole model.
    serving: bytes of weights in memory.
    kept: the part of ``store``, at most, that each model has to itself: everything that is not superposed, if every
        model changed all of it, and its deltas of tables of embeddings.
    separate: bytes of that many whole models.
    decode, decode_all: weight bytes that a decode step reads, in units of one plain model's, for rows of one group's
        models, and for rows of all groups' models.
    interference: predicted size of the noise in a retrieved delta, in units of the delta, under signs, permutations and
        rotations. A shared basis reduces it by the part of the delta that lies in the basis. It is not the accuracy.
    """

    bits: float
    store: int
    times: float
    serving: int
    kept: int
    separate: int
    decode: float
    decode_all: float
    interference: float


def plan(
    base: Shaped, models: int, config: Config | None = None, *, embeddings: float | None = None
) -> list[Row]:  # fmt: skip
    """The sizes and costs of ``models`` fine-tunes of ``base`` at each number of bits. Only shapes are read.

    base: a checkpoint, as ``randes.compress`` takes it, a module on the meta device, a Transformers configuration, or
        the name of a model, as Transformers' ``from_pretrained`` takes it, of which only the configuration is read.
    config: as for ``randes.compress``. With rank "auto" the number of directions depends on the models. Sizes and
        costs are then upper bounds, with ``basis.MOST`` directions a matrix, or half of its narrower side.
    embeddings: bits of tables, as ``pack`` takes them.
    Raises ``ValueError`` for a number of models below 1, and ``CheckpointError`` for a base that is not found or has
    nothing to superpose. (Design, sections 2 and 4.)
    """
    config = (config or Config()).resolved(together=True)
    if models < 1:
        raise ValueError(f"models must be at least 1, got {models}")
    found = matrices_of(with_shapes(base), config)
    split, names = found.tensors, found.superposed
    tensors = headers(split)
    matrices = {name: tensors[name] for name in names if not config.is_unshared(name)}
    tables = {name: tensors[name] for name in names if config.is_unshared(name)}
    superposed = models + config.centre
    sharing = min(superposed, config.group_size + config.centre)
    groups = -(-models // config.group_size)
    others = size(tensors) - size(matrices) - size(tables)
    copies = _copies(config, models)
    inverses = superposed * _sum(matrices, lambda value: 4 * value.shape[1] ** 2) if config.matrix == "dense" else 0
    rows = []
    for bits in (16, *BITS):
        _, held = _delta_bytes(matrices, bits)
        _, corrections = _basis_bytes(matrices, config.rank or 0, superposed, bits)
        rounding = sharing * _rounding(matrices, bits)
        own, looked_up = _table_bytes(tables, bits, embeddings)
        plain, kept = size(matrices), copies * others + models * own
        store = store_bytes(tensors, {*names}, models, config, bits, embeddings)
        rows.append(
            Row(
                bits=bits,
                store=store,
                times=store / size(tensors),
                serving=size(tensors) + groups * held + corrections + copies * others + models * looked_up + inverses,
                kept=kept,
                separate=models * size(tensors),
                decode=(plain + held + corrections / superposed) / plain,
                decode_all=(plain + groups * held + corrections) / plain,
                interference=math.sqrt(sharing - 1 + rounding),
            )
        )
    return rows


def packed_sizes(superposition: Superposition, bits: float, embeddings: float | None = None) -> Sizes:
    """What ``pack(bits, embeddings=embeddings)`` of this superposition takes, or of the one that it was packed from; by
    arithmetic.

    With the coordinates that ``pack`` takes by default.
    """
    sup, packing = superposition, superposition.packing
    if packing is not None and packing.bits == bits and embeddings in (None, packing.embeddings):
        return sup.sizes
    sizes, shapes = sup.sizes, {name: header.shape for name, header in headers(sup.base).items()}
    shared = [shapes[name] for group, held in sup.held.items() if isinstance(group, int) for name in held]
    members = sup.members.values()
    own_tables = [shapes[name] for member in members for name in member.gains if name in sup.unshared]
    tables = [table_bytes(rows, columns, bits, embeddings) for rows, columns in own_tables]
    own = [
        packed_bytes(headers(sup.bases)[tensor].shape[1], shapes[tensor][0], coordinates_for(bits))
        for member in members
        for tensor in member.coordinates
        if tensor not in sup.unshared
    ]
    return Sizes(
        base=sizes.base,
        superposed=sum(packed_bytes(rows, columns, bits) for rows, columns in shared),
        kept=sum(member.kept_bytes for member in members) + size(sup.averages) + sum(left for _, left, _ in tables),
        basis=size(sup.bases) + sum(own) + sum(directions for directions, *_ in tables),
        separate_models=sizes.separate_models,
    )


def store_bytes(
    tensors: Mapping[str, Tensor], superposed: Collection[str], models: int, config: Config, bits: float = 16,
    embeddings: float | None = None,
) -> int:  # fmt: skip
    """Of the store of so many fine-tunes, or of its part with these tensors of the base alone. config: resolved."""
    matrices = {name: value for name, value in tensors.items() if name in superposed and not config.is_unshared(name)}
    tables = {name: value for name, value in tensors.items() if name in superposed and config.is_unshared(name)}
    groups, (stored, _) = -(-models // config.group_size), _delta_bytes(matrices, bits)
    basis, _ = _basis_bytes(matrices, config.rank or 0, models + config.centre, bits)
    kept = _copies(config, models) * (size(tensors) - size(matrices) - size(tables))
    return size(tensors) + groups * stored + basis + kept + models * _table_bytes(tables, bits, embeddings)[0]


def _copies(config: Config, models: int) -> int:
    """How many times what is not superposed is stored beside the base's."""
    return {"keep": models, "base": 0, "average": 1, "sum": 1}[config.others]


def _delta_bytes(matrices: Mapping[str, Tensor], bits: float) -> tuple[int, int]:
    """Of one group's D of all matrices: on the disk, and in memory."""
    if bits == 16:
        return _sum(matrices, lambda value: value.numel() * INTEGERS), size(matrices)
    return (
        _sum(matrices, lambda value: packed_bytes(len(value), value.shape[1], bits)),
        _sum(matrices, lambda value: packed_bytes(len(value), value.shape[1], bits, padded=True)),
    )


def _rounding(matrices: Mapping[str, Tensor], bits: float) -> float:
    """What packing adds, as a share of D, in the mean over all matrices' elements."""
    if bits == 16:
        return 0.0
    elements = [(value.numel(), value.shape[1]) for value in matrices.values()]
    return sum(count * added_noise(bits, columns) for count, columns in elements) / sum(count for count, _ in elements)


def _basis_bytes(matrices: Mapping[str, Tensor], rank: Rank, models: int, bits: float) -> tuple[int, int]:
    """Of all shared bases, and all models' parts in them: on the disk, and in memory. bits: of an element of D."""
    stored = served = 0
    for value in matrices.values():
        n, k = value.shape
        r = widest(rank, n, k)
        stored += 2 * k * r + models * (2 * r * n if bits == 16 else packed_bytes(r, n, coordinates_for(bits)))
        served += (k * r + models * n * r) * value.itemsize
    return stored, served


def _table_bytes(tables: Mapping[str, Tensor], bits: float, embeddings: float | None) -> tuple[int, int]:
    """Of one model's deltas of all tables: on the disk, and in memory, where their directions are in the base's dtype
    and where, beside D in 16 bits, the tables are whole."""
    if bits == 16:
        return _sum(tables, lambda value: value.numel() * INTEGERS), size(tables)
    stored = served = 0
    for value in tables.values():
        rows, columns = value.shape
        directions, left, held = table_bytes(rows, columns, bits, embeddings)
        stored += directions + left
        served += held + (rows + columns) * max(1, columns // COLUMNS_A_DIRECTION) * value.itemsize
    return stored, served


def _sum(matrices: Mapping[str, Tensor], nbytes: Callable[[Tensor], int]) -> int:
    return sum(map(nbytes, matrices.values()))
