"""A superposition in few bits: what servers load.

The integers are the master: models are added to them and taken away. What is made of them here is for serving alone,
and its store's manifest says so and names the master by its checksum. (Design, section 2.)
"""

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from randes.config import one_of
from randes.superposition.integers import STEP
from randes.superposition.packed_tensors import Packing, coordinates_of
from randes.superposition.state import State
from randes.superposition.store.manifest import checksum_of
from randes_kernels import pack
from randes_kernels.packing import BITS, group_for

S = TypeVar("S", bound=State)


def packed(superposition: S, bits: int, group: int | None, coordinates: int | None, step: Callable[[int], None]) -> S:
    """A superposition for serving alone: see ``Superposition.pack``."""
    if superposition.packing is not None:
        raise ValueError("a packed superposition cannot be packed again; pack the one that it was made of")
    one_of("bits", bits, BITS)
    group = group_for(bits) if group is None else group
    coordinates = coordinates_for(bits) if coordinates is None else coordinates
    packing = Packing(bits, group, coordinates, "")
    made = type(superposition)(
        superposition.config, superposition.base, superposition.superposed, superposition.base_digests,
        superposition.bases, superposition.layout,
    )  # fmt: skip
    made.model_files = superposition.model_files
    made.packing = replace(packing, master=checksum_of(superposition))
    made.averages, made.device = superposition.averages, superposition.device
    for number, deltas in superposition.deltas.items():
        made.few_bits[number] = few = {}
        for name in deltas:
            delta = deltas[name]
            few[name] = pack(delta.float() * STEP, bits, group)
            step(delta.nbytes)
    for name, member in superposition.members.items():
        if coordinates < 16:
            # Their own integers, whatever those are worth: a step in fp16 has the range. A direction is a row.
            own = {tensor: coordinates_of(held).mT for tensor, held in member.coordinates.items()}
            member = replace(member, coordinates={t: pack(held.float(), coordinates) for t, held in own.items()})
        made.members[name] = member
    return made


def coordinates_for(bits: int) -> int:
    """Bits of coordinates beside so many of D: at equal storage more directions in 4 bits keep more than few in 8."""
    return max(4, bits)
