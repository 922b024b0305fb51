"""Superposed deltas in few bits: how they are held in memory and in files."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

from randes.checkpoints.lazy_tensors import Described, LazyTensors
from randes.config import one_of
from randes.superposition.integers import STEP
from randes_kernels import Packed, unpack
from randes_kernels.packing import BITS, check

STEPS = "@steps"
"""Follows a packed tensor's name in a file, for its steps."""
ERROR = {8: 0.009, 4: 0.095, 2: 0.359, 1: 0.756}
"""What packing adds to normal values, relative to their size, in groups of 64, of 1 bit in rows."""
SuperposedDelta: TypeAlias = Tensor | Packed


@dataclass(frozen=True)
class Packing:
    """How a superposition was packed.

    bits: of an element of D, 8, 4, 2 or 1. group: columns that share a step, 0 for whole rows; not used at 8 bits.
    coordinates: bits of a model's coordinates in the shared bases: 16 (as they were), 8 or 4.
    master: checksum of the manifest of the superposition that this was made of.
    embeddings: bits of an element of the tables that each model has its own deltas of; 0 where their loudest directions
        are all that is left of them, and None where there are no such tables.

    Raises ``ValueError`` for other numbers.
    """

    bits: int
    group: int
    coordinates: int
    master: str
    embeddings: int | None = None

    def __post_init__(self) -> None:
        one_of("coordinates", self.coordinates, (16, 8, 4))
        check(self.bits, self.group)
        one_of("embeddings", self.embeddings, (*BITS, 0, None))

    def of(self, unshared: bool) -> tuple[int, int]:
        """Bits and group of D, or of what is each model's alone, in which a row has one step."""
        return (self.embeddings or 0, 0) if unshared else (self.bits, self.group)


def values_of(delta: SuperposedDelta) -> tuple[Tensor, float]:
    """A superposition's numbers, (N, K), and what one of them is worth, in units of a gain."""
    return (unpack(delta), 1.0) if isinstance(delta, Packed) else (delta, STEP)


def coordinates_of(held: SuperposedDelta) -> Tensor:
    """A model's coordinates in a shared basis, (N, r), in steps of its unit."""
    return unpack(held).mT if isinstance(held, Packed) else held


class PackedTensors(Described[Packed]):
    """The packed tensors of a file, each read when somebody asks for it.

    flat: words by name, and steps beside them. columns: of each.
    """

    def __init__(self, flat: LazyTensors, bits: int, group: int, columns: Mapping[str, int]) -> None:
        self.below = [flat]
        self._headers = {
            name: Packed(words, flat.headers[f"{name}{STEPS}"], bits, 0 if bits == 8 else group, columns[name])
            for name, words in flat.headers.items()
            if not name.endswith(STEPS)
        }

    @property
    def headers(self) -> Mapping[str, Packed]:
        """Shapes and dtypes of words and steps."""
        return self._headers

    def __getitem__(self, name: str) -> Packed:
        header, (flat,) = self.headers[name], self.below
        return header._replace(words=flat[name], steps=flat[f"{name}{STEPS}"])


def flattened(tensors: Mapping[str, SuperposedDelta]) -> Mapping[str, Tensor]:
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
