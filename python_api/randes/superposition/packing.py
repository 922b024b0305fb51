"""A superposition in few bits: what servers load.

The integers are the master: models are added to them and taken away. What is made of them here is for serving alone,
and its store's manifest says so and names the master by its checksum. (Design, section 2.)

    shared matrices      D in few bits
    unshared ones        Ŵ_j = W0 + α_j ( B_j U_jᵀ + g_j R_j )
                         U_j (K, r), the loudest directions of a model's delta, B_j = δ_j U_j (N, r), its coordinates in
                         them in few bits, and R_j, in few bits or none, what these as they are leave of it

A table's delta has most of its energy in few directions. Those of one model are fewer than those of all, and need no
other model to be known.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from randes.checkpoints.threads import one_thread
from randes.config import one_of
from randes.superposition.basis import shared_basis
from randes.superposition.basis.shared_basis import UNIT, widest
from randes.superposition.integers import STEP
from randes.superposition.packed_tensors import Packing, coordinates_of
from randes.superposition.state import State
from randes.superposition.store.manifest import checksum_of
from randes_kernels import Packed, pack
from randes_kernels.packing import BITS, HALF, group_for, packed_bytes

S = TypeVar("S", bound=State)
COLUMNS_A_DIRECTION = 64
"""Of a table for each of its directions, which weigh a sixteenth of a bit an element in 4 bits then."""
BLOCK = 1 << 12
"""Rows that are in fp64 at a time."""


def packed(
    superposition: S, bits: float, group: int | None, coordinates: int | None,
    embeddings: float | None, step: Callable[[int], None],
) -> S:  # fmt: skip
    """A superposition for serving alone: see ``Superposition.pack``."""
    if superposition.packing is not None:
        raise ValueError("a packed superposition cannot be packed again; pack the one that it was made of")
    one_of("bits", bits, BITS)
    group = group_for(bits) if group is None else group
    coordinates = coordinates_for(bits) if coordinates is None else coordinates
    embeddings = embeddings_for(bits) if embeddings is None else embeddings
    one_of("embeddings", embeddings, (*BITS, 0))
    packing = Packing(bits, group, coordinates, "", embeddings if superposition.unshared else None)
    made = type(superposition)(
        superposition.config, superposition.base, superposition.superposed, superposition.base_digests,
        superposition.bases, superposition.layout,
    )  # fmt: skip
    made.model_files, made.to_files = superposition.model_files, superposition.to_files
    made.packing = replace(packing, master=checksum_of(superposition))
    made.averages, made.device, made.shard_size = superposition.averages, superposition.device, superposition.shard_size
    for name, member in superposition.members.items():
        if coordinates < 16:
            own = {tensor: coordinates_of(held) for tensor, held in member.coordinates.items()}
            member = replace(member, coordinates={t: _packed(held, made.packing) for t, held in own.items()})
        made.members[name] = member
    with one_thread() as computing:  # where no number of threads changes the last bits
        for number, deltas in superposition.deltas.items():
            few: dict[str, Packed] = {}
            for tensor in deltas:
                delta = deltas[tensor].float() * STEP
                if isinstance(number, str):
                    few |= computing.submit(_pack_alone, made, number, tensor, delta, made.packing).result()
                else:
                    few[tensor] = pack(delta, bits, group)
                step(deltas[tensor].nbytes)
            if few:
                made.few_bits[number] = few
    return made


def _pack_alone(made: State, name: str, tensor: str, delta: Tensor, packing: Packing) -> dict[str, Packed]:
    """Record the loudest directions of a delta (N, K) that model ``name`` has to itself, in units of its gain; what
    they leave of it, in few bits, which replaces it."""
    rank, member = max(1, delta.shape[1] // COLUMNS_A_DIRECTION), made.members[name]
    nothing, gain = {tensor: torch.zeros((), device="cpu").expand(delta.shape)}, member.gains[tensor]
    directions = shared_basis.loudest({name: {tensor: delta}}, nothing, [tensor], rank, made.config.seed)[tensor]
    u = directions.double() * UNIT
    exact, unit = shared_basis.rounded(torch.cat([rows.double() @ u for rows in torch.split(delta, BLOCK)]) * gain)
    held = exact if packing.coordinates == 16 else _packed(exact, packing)
    made.members[name] = replace(
        member,
        units={**member.units, tensor: unit},
        coordinates={**member.coordinates, tensor: held},
        directions={**member.directions, tensor: directions},
    )
    if not packing.embeddings:
        return {}
    for rows, own in zip(torch.split(delta, BLOCK), torch.split(coordinates_of(held), BLOCK), strict=True):
        rows -= (own.double() @ u.mT * (unit / gain)).float()
    return {tensor: pack(delta, *packing.of(unshared=True))}


def _packed(held: Tensor, packing: Packing) -> Packed:
    """Coordinates (N, r), a direction as a row: their own integers, whatever those are worth. A step in fp16 has the
    range."""
    return pack(held.mT.float(), packing.coordinates)


def coordinates_for(bits: float) -> int:
    """Bits of coordinates beside so many of D: at equal storage more directions in 4 bits keep more than few in 8."""
    return max(4, int(bits))


def embeddings_for(bits: float) -> float:
    """Bits of tables beside so many of D: beside their directions half a bit keeps as much as one, and a tenth of a
    point less than two (docs/results.md)."""
    return HALF if bits <= 2 else 2


def table_bytes(rows: int, columns: int, bits: float, embeddings: float | None = None) -> tuple[int, int, int]:
    """What one model's delta of a table takes beside D in so many bits: its directions in a file, and what they leave,
    in a file and in memory."""
    rank = widest(max(1, columns // COLUMNS_A_DIRECTION), rows, columns)
    left = embeddings_for(bits) if embeddings is None else embeddings
    directions = 2 * columns * rank + packed_bytes(rank, rows, coordinates_for(bits))
    if not left:
        return directions, 0, 0
    return directions, packed_bytes(rows, columns, left, 0), packed_bytes(rows, columns, left, 0, padded=True)
