"""Superposed deltas in few bits: how they are held in memory and in files."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

from randes.checkpoints.layout import STEPS
from randes.checkpoints.lazy_tensors import Described, LazyTensors
from randes.config import one_of
from randes.superposition.integers import STEP
from randes_kernels import Packed, unpack
from randes_kernels.format import SIGNS_PER_BLOCK as SPAN
from randes_kernels.packing import BITS, HALF, LANES, check, with_padding, without_padding

ERROR = {8: 0.009, 4: 0.095, 2: 0.366, 1: 0.756}
"""What packing adds to normal values, relative to their size: in groups of 64 in 4 bits, in rows in fewer."""
LOUDEST = (0.798, 1.128, 1.327, 1.465, 1.57, 1.654, 1.724, 1.783)
"""The mean magnitude of the loudest of one to eight normal numbers."""
SuperposedDelta: TypeAlias = Tensor | Packed


@dataclass(frozen=True)
class Packing:
    """How a superposition was packed.

    bits: of an element of D, 8, 4, 2, 1 or 0.5. group: columns that share a step, 0 for whole rows; not used at 8.
    coordinates: bits of a model's coordinates in the shared bases: 16 (as they were), 8 or 4.
    master: checksum of the manifest of the superposition that this was made of.
    embeddings: bits of an element of the tables that each model has its own deltas of; 0 where their loudest directions
        are all that is left of them, and None where there are no such tables.

    Raises ``ValueError`` for other numbers.
    """

    bits: float
    group: int
    coordinates: int
    master: str
    embeddings: float | None = None

    def __post_init__(self) -> None:
        one_of("coordinates", self.coordinates, (16, 8, 4))
        check(self.bits, self.group)
        one_of("embeddings", self.embeddings, (*BITS, 0, None))

    def of(self, unshared: bool) -> tuple[float, int]:
        """Bits and group of D, or of what is each model's alone, in which a row has one step."""
        return (self.embeddings or 0, 0) if unshared else (self.bits, self.group)


def added_noise(bits: float, columns: int) -> float:
    """The mean square of what packing adds to normal values, relative to theirs. At half a bit the last span's groups
    have fewer columns than eight to choose from."""
    if bits != HALF:
        return ERROR[int(bits)] ** 2
    found = [LOUDEST[len(range(lane, min(columns - span, SPAN), LANES)) - 1]
             for span in range(0, columns, SPAN) for lane in range(min(LANES, columns - span))]  # fmt: skip
    return len(found) * columns / sum(found) ** 2 - 1


def in_words(bits: float) -> str:
    """A number of bits, as "1 bit", "0.5 bit" or "2 bits"."""
    return f"{bits:g} bit" + "s" * (bits > 1 or bits == 0)


def values_of(delta: SuperposedDelta) -> tuple[Tensor, float]:
    """A superposition's numbers, (N, K), and what one of them is worth, in units of a gain."""
    return (unpack(delta), 1.0) if isinstance(delta, Packed) else (delta, STEP)


def coordinates_of(held: SuperposedDelta) -> Tensor:
    """A model's coordinates in a shared basis, (N, r), in steps of its unit."""
    return unpack(held).mT if isinstance(held, Packed) else held


class PackedTensors(Described[Packed]):
    """The packed tensors of a file, each read when somebody asks for it.

    flat: words by name, and steps beside them. columns: of each. Raises ``ValueError`` for other shapes, ``KeyError``
    where one of these is missing.
    """

    def __init__(self, flat: LazyTensors, bits: float, group: int, columns: Mapping[str, int]) -> None:
        self.below = [flat]
        self._headers = {
            name: with_padding(words, flat.headers[f"{name}{STEPS}"], bits, group, columns[name])
            for name, words in flat.headers.items()
            if not name.endswith(STEPS)
        }

    @property
    def headers(self) -> Mapping[str, Packed]:
        """Shapes and dtypes of words and steps."""
        return self._headers

    def __getitem__(self, name: str) -> Packed:
        (flat,), form = self.below, self.headers[name]
        return with_padding(flat[name], flat[f"{name}{STEPS}"], form.bits, form.group, form.columns)


def flattened(tensors: Mapping[str, SuperposedDelta]) -> Mapping[str, Tensor]:
    """As a file holds them: words by name, and steps beside them. What lies in a file stays there."""
    if isinstance(tensors, LazyTensors):
        return tensors
    if isinstance(tensors, PackedTensors):
        return tensors.below[0]
    flat: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if isinstance(value, Packed):
            flat[name], flat[f"{name}{STEPS}"] = without_padding(value)
        else:
            flat[name] = value
    return flat
