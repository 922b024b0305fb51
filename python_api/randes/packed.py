"""A superposition in few bits: what servers load.

The integers are the master: models are added to them and taken away. What is made of them here is for serving alone,
and its store's manifest says so and names the master by its checksum. (Design, section 2.)
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeAlias

from torch import Tensor

from randes.config import one_of
from randes.integers import STEP
from randes.streams import LazyTensors
from randes_kernels import Packed, pack, unpack
from randes_kernels.packing import check

if TYPE_CHECKING:
    from randes.superposition import Superposition

STEPS = "@steps"
"""Follows a packed tensor's name in a file, for its steps."""
ERROR = {8: 0.009, 4: 0.094, 2: 0.337}
"""What packing adds to normal values, relative to their size, in groups of 64."""
Held: TypeAlias = Tensor | Packed


@dataclass(frozen=True)
class Packing:
    """How a superposition was packed.

    bits: of an element of D, 8, 4 or 2. group: columns that share a step, of 4 and 2 bits.
    coordinates: bits of a model's coordinates in the shared bases: 16 (as they were), 8 or 4.
    master: checksum of the manifest of the superposition that this was made of.

    Raises ``ValueError`` for other numbers.
    """

    bits: int
    group: int
    coordinates: int
    master: str

    def __post_init__(self) -> None:
        one_of("coordinates", self.coordinates, (16, 8, 4))
        check(self.bits, self.group)


def packed(
    superposition: "Superposition", bits: int, group: int, coordinates: int | None, step: Callable[[int], None]
) -> "Superposition":
    """A superposition for serving alone: see ``Superposition.pack``."""
    from randes import store
    from randes.superposition import Superposition

    if superposition.packing is not None:
        raise ValueError("a packed superposition cannot be packed again; pack the one that it was made of")
    one_of("bits", bits, (8, 4, 2))
    coordinates = coordinates_for(bits) if coordinates is None else coordinates
    packing = Packing(bits, group, coordinates, "")
    made = Superposition(
        superposition.config, superposition.base, superposition.superposed, superposition.base_digests,
        superposition.bases, superposition.layout,
    )  # fmt: skip
    made.companions = superposition.companions
    made.packing = replace(packing, master=store.checksum_of(superposition))
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


def values_of(delta: Held) -> tuple[Tensor, float]:
    """A superposition's numbers, (N, K), and what one of them is worth, in units of a gain."""
    return (unpack(delta), 1.0) if isinstance(delta, Packed) else (delta, STEP)


def coordinates_of(held: Held) -> Tensor:
    """A model's coordinates in a shared basis, (N, r), in steps of its unit."""
    return unpack(held).mT if isinstance(held, Packed) else held


class PackedTensors(Mapping[str, Packed]):
    """The packed tensors of a file, each read when somebody asks for it.

    flat: words by name, and steps beside them. columns: of each.
    """

    def __init__(self, flat: LazyTensors, bits: int, group: int, columns: Mapping[str, int]) -> None:
        self.below = [flat]
        self.headers = {
            name: Packed(words, flat.headers[f"{name}{STEPS}"], bits, 0 if bits == 8 else group, columns[name])
            for name, words in flat.headers.items()
            if not name.endswith(STEPS)
        }

    def __getitem__(self, name: str) -> Packed:
        header, (flat,) = self.headers[name], self.below
        return header._replace(words=flat[name], steps=flat[f"{name}{STEPS}"])

    def __iter__(self) -> Iterator[str]:
        return iter(self.headers)

    def __len__(self) -> int:
        return len(self.headers)

    def __contains__(self, name: object) -> bool:
        return name in self.headers

    def __reduce__(self) -> tuple[type, tuple[dict[str, Packed]]]:
        return dict, (dict(self),)  # as of LazyTensors


def flattened(tensors: Mapping[str, Held]) -> Mapping[str, Tensor]:
    """As a file holds them: words by name, and steps beside them. What lies in a file stays there."""
    if isinstance(tensors, LazyTensors):
        return tensors
    if isinstance(tensors, PackedTensors):
        return tensors.below[0]
    flat: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if isinstance(value, Packed):
            flat |= {name: value.words, f"{name}{STEPS}": value.steps}
        else:
            flat[name] = value
    return flat
