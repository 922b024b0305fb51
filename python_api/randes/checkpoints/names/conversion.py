"""How the tensors of a folder's files are those of a model: which have another name, and which are made of several."""

from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from math import prod
from typing import Any

from torch import Tensor

from randes.checkpoints import schema
from randes.checkpoints.lazy_tensors import LazyTensors, headers
from randes.checkpoints.names.pieces import Piece, Rearranged
from randes.checkpoints.on_disk import StoredTensors
from randes.checkpoints.sources import Tensors
from randes.errors import CheckpointError

_PIECE = schema.record(
    {
        "tensor": schema.text, "shape": schema.listed(schema.integer(1), 0, 64),
        "to_stride": schema.listed(schema.integer(0), 0, 64), "to_offset": schema.integer(0),
        "from_stride": schema.listed(schema.integer(0), 0, 64), "from_offset": schema.integer(0),
    },
)  # fmt: skip
_MADE = schema.record({"shape": schema.listed(schema.integer(0), 0, 64), "pieces": schema.listed(_PIECE, 1)})
RECORD = schema.each(schema.either(schema.one_of(None), schema.text, _MADE))
"""What a manifest says of it (``to_dict``)."""


@dataclass(frozen=True)
class Conversion:
    """From tensors of some names to the same elements under others. What is in none of these keeps its name.

    own_names: of each that is renamed, the name before. pieces: of each that is made of others, of what; shapes: its
    shape. dropped: names in files that no tensor of the model is made of.
    """

    own_names: Mapping[str, str] = field(default_factory=dict)
    pieces: Mapping[str, tuple[Piece, ...]] = field(default_factory=dict)
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    dropped: frozenset[str] = frozenset()

    def __bool__(self) -> bool:
        return bool(self.own_names or self.pieces or self.dropped)

    def apply(self, tensors: Tensors) -> Tensors:
        """The tensors under their new names, those in files still there.

        Raises ``CheckpointError`` where one has another shape, or is not there while others that go with it are.
        """
        if not self:
            return tensors
        pieces = self.check(headers(tensors))
        used = {*self.own_names.values(), *(piece.source for some in self.pieces.values() for piece in some)}
        own = {name: before for name, before in self.own_names.items() if before in tensors}
        own |= {name: name for name in tensors if name not in used | self.dropped}
        return Rearranged(tensors, self.shapes, pieces, own) if pieces else renamed(tensors, own)

    def check(self, held: Mapping[str, Tensor]) -> dict[str, tuple[Piece, ...]]:
        """The ``pieces`` of tensors that are there. Raises ``CheckpointError`` unless these are all their elements."""
        pieces = {name: some for name, some in self.pieces.items() if any(piece.source in held for piece in some)}
        counts: dict[str, int] = {}
        for name, some in pieces.items():
            sources = {piece.source for piece in some}
            if absent := sorted(sources - held.keys()):
                raise CheckpointError(f"{name} is made of {', '.join(absent[:3])} too, which the checkpoint lacks")
            if len({held[source].dtype for source in sources}) > 1:
                raise CheckpointError(f"{name} must be made of tensors of one dtype, got those of {sorted(sources)[0]}")
            if sum(prod(piece.shape) for piece in some) != prod(self.shapes[name]):
                raise CheckpointError(f"{name} must be {self.shapes[name]}, which what it is made of does not fill")
            for piece in some:
                if not piece.fits(prod(self.shapes[name]), held[piece.source].numel()):
                    raise CheckpointError(f"{name} must be made of elements that {piece.source} has")
                counts[piece.source] = counts.get(piece.source, 0) + prod(piece.shape)
        for source, count in counts.items():
            if count != held[source].numel():
                raise CheckpointError(f"{source} must have {count} elements, got {held[source].numel()}")
        return pieces

    def back(self, held: Tensors) -> "Conversion":
        """The way back to ``held``, whose names, shapes and dtypes are looked at."""
        found, known = headers(held), {before: name for name, before in self.own_names.items()}
        pieces: dict[str, tuple[Piece, ...]] = {}
        for name, some in self.pieces.items():
            for piece in some:
                pieces[piece.source] = (*pieces.get(piece.source, ()), piece.back(name))
        return Conversion(known, pieces, {name: tuple(found[name].shape) for name in pieces}, self.dropped)

    def to_dict(self) -> dict[str, Any]:
        """For a manifest: of each new name the one before, or what it is made of."""
        made = {
            name: {"shape": list(self.shapes[name]), "pieces": [_piece(piece) for piece in some]}
            for name, some in self.pieces.items()
        }
        return dict(sorted({**self.own_names, **made, **dict.fromkeys(self.dropped)}.items()))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Conversion":
        """The inverse of ``to_dict``."""
        made = {name: value for name, value in values.items() if isinstance(value, dict)}
        pieces = {
            name: tuple(
                Piece(
                    one["tensor"], tuple(one["shape"]), tuple(one["to_stride"]), one["to_offset"],
                    tuple(one["from_stride"]), one["from_offset"],
                )
                for one in value["pieces"]
            )
            for name, value in made.items()
        }  # fmt: skip
        return cls(
            {name: value for name, value in values.items() if isinstance(value, str)}, pieces,
            {name: tuple(value["shape"]) for name, value in made.items()},
            frozenset(name for name, value in values.items() if value is None),
        )  # fmt: skip


def renamed(tensors: Tensors, names: Mapping[str, str]) -> Tensors:
    """Some of the tensors under other names: of each new name the one here. Lazy ones stay so."""
    if isinstance(tensors, StoredTensors | Rearranged):
        return tensors.renamed(names)
    if isinstance(tensors, LazyTensors):
        return Rearranged(tensors, {}, {}, names)
    return {name: tensors[before] for name, before in names.items()}


def without(tensors: Tensors, names: Set[str]) -> Tensors:
    """The tensors but for those of these names."""
    return renamed(tensors, {name: name for name in tensors if name not in names}) if names else tensors


def _piece(piece: Piece) -> dict[str, Any]:
    fields = piece._asdict()
    return {"tensor": fields.pop("source"), **{name: _plain(value) for name, value in fields.items()}}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
