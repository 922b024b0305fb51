"""What a superposition holds and can be asked: all but the verbs that change it, which stand in files beside it."""

from collections.abc import Callable, Iterable, Mapping, MutableMapping
from typing import TypeAlias

import torch
from torch import Tensor

from randes.checkpoints.layout import Layout
from randes.checkpoints.lazy_tensors import Progress, chunks, digests, headers, silent, size
from randes.checkpoints.names.conversion import Conversion
from randes.checkpoints.on_disk import Overlay, check, in_files, unchecked
from randes.checkpoints.sources import Tensors
from randes.config import Config, is_embedding
from randes.errors import BaseMismatchError, RandesError, UnknownModelError
from randes.superposition.added_rows import counts
from randes.superposition.integers import AVERAGE_STEP, shared_gain
from randes.superposition.layer_families import families, shifted, shuffled
from randes.superposition.members import BASE_NAME, Member, Sizes, check_name, free_group, free_index
from randes.superposition.packed_tensors import Packing, SuperposedDelta
from randes_kernels import Packed, Transform, model_key, slices, tensor_id

Group: TypeAlias = int | str
"""Who shares superpositions: the models of a group, or one model alone, by its name."""
UNTURNED = Transform(False, False, 0, 1)


class State:
    """One base and the superposed deltas of its fine-tunes, as integers. device: where adding, removing and retrieving
    compute, "cpu" unless it is set; the bytes are the same."""

    def __init__(
        self, config: Config, base: Tensors, superposed: Iterable[str], base_digests: Mapping[str, str] | None = None,
        bases: Tensors | None = None, layout: Layout | None = None,
    ) -> None:  # fmt: skip
        """For ``create`` and ``load``."""
        self.config = config
        self.base = base
        self.superposed = tuple(sorted(superposed))
        self.unshared = frozenset(name for name in self.superposed if config.is_unshared(name))
        self.layout = layout or Layout()  # how checkpoints, as they come, are these tensors
        parts = self.layout.parts
        self.tables = {name: parts.get(name, name) for name in self.superposed if is_embedding(name)}
        self.base_digests = dict(base_digests or digests(base))
        self.members: dict[str, Member] = {}
        # Of each group, and of each model with matrices that it shares with none: integers, int16 where they fit.
        self.deltas: dict[Group, MutableMapping[str, Tensor]] = {}
        self.packing: Packing | None = None
        self.few_bits: dict[Group, Mapping[str, Packed]] = {}  # in their place, where this is packed for serving
        self.bases = bases or {}  # the shared basis of each tensor, (K, r) int16 (basis/)
        self.averages: MutableMapping[str, Tensor] = {}  # int64 sums over the models, for others="average" and "sum"
        self.device = torch.device("cpu")
        self.model_files: dict[str, bytes] = {}  # files that go with a Transformers base, by name
        self.to_files = Conversion()  # back to the names that the base's files had, where those are others
        self.torn = ""  # why it can be used no more
        self.shard_size = 0  # bytes of tensors in a file of that store; 0 for one file of each kind
        self.stored: object = None  # what store.py knows of the store that this came from or went to
        self._families = families(headers(base), tuple(name for name in self.superposed if name not in self.unshared))
        self._family_of = {name: family for family, names in self._families.items() for name in names}
        self._shared_gains: dict[str, float] = {}

    @property
    def names(self) -> list[str]:
        """The fine-tunes, in alphabetical order: what they are called does not depend on when they were added."""
        return [name for name in self.served if name != BASE_NAME]

    @property
    def served(self) -> list[str]:
        """All that is superposed: the fine-tunes, and ``"__base__"`` where deltas are centred on their mean."""
        return sorted(self.members)

    def member(self, name: str) -> Member:
        """One model's record. Raises ``UnknownModelError`` for a name that was never added."""
        if name not in self.members:
            raise UnknownModelError(f"no model is called {name!r}; there are: {', '.join(self.names) or 'no models'}")
        return self.members[name]

    @property
    def held(self) -> Mapping[Group, Mapping[str, SuperposedDelta]]:
        """Of each group, its superpositions by tensor: integers, or what they were packed to."""
        return self.deltas if self.packing is None else self.few_bits

    def group_of(self, name: str, tensor: str, group: int | None = None) -> Group:
        """Whose superpositions a model's delta of a tensor is in: its group's, or its own, which have its name.

        group: the model's, where it is not a member yet.
        """
        if tensor in self.unshared:
            return name
        return self.members[name].group if group is None else group

    def basis(self, name: str, tensor: str) -> Tensor | None:
        """(K, r) int16: the directions in which a model's delta of a tensor is its own, where there are any."""
        own = self.members[name].directions
        return own[tensor] if tensor in own else self.bases.get(tensor)

    def in_no_bits(self, tensor: str) -> bool:
        """Whether nothing is left of models' deltas of a tensor beside their directions."""
        return self.packing is not None and self.packing.embeddings == 0 and tensor in self.unshared

    def transform(self, tensor: str) -> Transform:
        """How deltas of a tensor are turned: not at all where no others are in their superposition."""
        return UNTURNED if tensor in self.unshared else self.config.transform

    @property
    def has_base(self) -> bool:
        """Whether the base can be asked for: not where the models' weights themselves are superposed."""
        return self.config.origin == "base"

    def key(self, name: str) -> int:
        """A model's Philox key."""
        return model_key(self.config.seed, name)

    def tensor_id(self, tensor: str) -> int:
        """What a tensor's transforms are made of beside the key: one number for all where they share a transform."""
        return tensor_id(tensor if self.config.per_layer else "")

    def shared_gain(self, tensor: str) -> float | None:
        """The gain that all models have of a tensor; None where each has its own.

        Where layers change places, the largest of theirs: what lies in one place has one gain.
        """
        if self.config.gains == "own" or tensor in self.unshared:
            return None
        family = self.family(tensor)
        if family[0] not in self._shared_gains:
            described = headers(self.base)
            found = [
                shared_gain(
                    (
                        total
                        for part in chunks(self.base, name)
                        for total in slices.squares(part, torch.zeros_like(part))
                    ),
                    described[name].numel(),
                )
                for name in family
            ]
            self._shared_gains[family[0]] = max(found)
        return self._shared_gains[family[0]]

    def family(self, tensor: str) -> list[str]:
        """The tensors whose superpositions a model's ``tensor`` may be in: itself, or its shuffled layers."""
        shuffled = self.config.shuffle_layers and tensor not in self.unshared
        return self._families[self._family_of[tensor]] if shuffled else [tensor]

    def place(self, name: str, tensor: str, index: int | None = None) -> str:
        """The tensor in whose superposition a model's delta of ``tensor`` is: itself, unless layers are shuffled.

        index: the model's, where it is not a member yet.
        """
        if not self.config.shuffle_layers or tensor in self.unshared:
            return tensor
        if self.config.shuffle_layers > 0:
            index = self.members[name].index if index is None else index
            return shifted(index * self.config.shuffle_layers, self.family(tensor))[tensor]
        return shuffled(self.key(name), self._family_of[tensor], self.family(tensor))[tensor]

    def averaged(self, name: str, tensor: str) -> Tensor:
        """What a model has of a tensor that it does not keep: the average or sum, or the base's."""
        base = self.base[tensor]
        if name == BASE_NAME or not self.is_averaged(tensor):
            return base
        if self.config.others == "average":
            return (self.averages[tensor].double() * (AVERAGE_STEP / len(self.names))).to(base.dtype)
        total, alpha = self.averages[tensor].double() * AVERAGE_STEP, self.members[name].alpha
        if not self.has_base:
            return (alpha * total).to(base.dtype)
        return (base.double() + alpha * (total - len(self.names) * base.double())).to(base.dtype)

    def is_averaged(self, tensor: str) -> bool:
        """Whether all models have the average or the sum of a tensor, which is not the base's: any of them changed it,
        or it is summed from zero."""
        if tensor not in self.averages:
            return False
        if self.config.others == "sum" and not self.has_base:
            return True
        return any(member.digests[tensor] != self.base_digests[tensor] for member in self.members.values())

    def has_own(self, tensor: str) -> bool:
        """Whether each model may have its own of a tensor that the others decide about as well: a superposed vector,
        or α times a sum."""
        superposed = self.layout.vectors | ({*self.tables.values()} - self.unshared)
        return tensor in superposed or (self.config.others == "sum" and self.is_averaged(tensor))

    @property
    def others(self) -> list[str]:
        """The tensors that some model has its own of, or that are averaged or summed."""
        names = {tensor for tensor in self.averages if self.is_averaged(tensor)}
        for member in self.members.values():
            names |= member.kept.keys()
        return sorted(names)

    def own_tensors(self, name: str) -> set[str]:
        """The tensors of a checkpoint that a model has its own of where no layer multiplies with them: what it keeps,
        and superposed tables of embeddings."""
        member = self.members[name]
        superposed = member.gains.keys() | member.added.keys()
        return {*member.kept, *(self.tables[matrix] for matrix in self.tables.keys() & superposed)}

    def layout_of(self, name: str) -> Layout:
        """How a model's checkpoint is its tensors: with the rows that it adds to some."""
        return self.layout.with_added(counts(self.member(name).added), self.base)

    @property
    def sizes(self) -> Sizes:
        """Bytes by what they are for."""
        base, held, members = size(self.base), self.held.items(), self.members.values()
        own = sum(size(tensors) for group, tensors in held if isinstance(group, str))
        return Sizes(
            base=base,
            superposed=sum(size(tensors) for group, tensors in held if isinstance(group, int)),
            kept=own + sum(member.kept_bytes for member in members) + size(self.averages),
            basis=size(self.bases) + sum(size(m.coordinates) + size(m.directions) for m in members),
            separate_models=base * len(self.names),
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors: base, superposed deltas, and what is kept per model."""
        return self.sizes.total

    def check_base(self, *, step: Callable[[int], None] = lambda _: None) -> None:
        """Raise ``BaseMismatchError`` where the base was changed since this superposition was made of it.

        What lies in files is read again only if those were written to; what is in memory is hashed each time.
        """
        if self.torn:
            raise RandesError(f"the superposition must be loaded again: {self.torn}")
        check(self.base, step)
        held = self.base.held if isinstance(self.base, Overlay) else self.base
        if in_files(held):
            return
        for name, found in digests(held, step=step).items():
            if found != self.base_digests[name]:
                raise BaseMismatchError(f"{name} of the base was changed after the superposition was created of it")

    def check(self, group: int, name: str | None = None, *, progress: Progress = silent) -> None:
        """Raise where the base, a group's integers or a model's own tensors are not what they were."""
        used: list[Mapping[str, SuperposedDelta]] = [self.held.get(group, {}), self.averages, self.bases]
        if name is not None:
            member = self.members[name]
            used += [self.held.get(name, {}), member.kept, member.coordinates, member.directions, member.added]
        nbytes = sum(map(unchecked, [self.base, *used]))
        step = (progress if nbytes else silent)("checking", nbytes)
        self.check_base(step=step)
        for tensors in used:
            check(tensors, step)

    def check_master(self) -> None:
        """Raise ``ValueError`` for what is packed for serving: the integers it was made of are what can be changed."""
        if self.packing is not None:
            raise ValueError(
                "a packed superposition is for serving: nothing can be added or removed;"
                " change the one that it was made of, and pack that again"
            )

    def check_name(self, name: str) -> None:
        """Raise ``ValueError`` for a name that a new model cannot have."""
        check_name(name)
        if name in self.members:
            raise ValueError(f"a model called {name!r} is there already; remove it first or choose another name")

    def next_index(self, wanted: int | None = None) -> int:
        """A new model's place among those that are there, the first that is free; 0 where no layers are shifted."""
        taken = {member.index for member in self.members.values()}
        return free_index(taken, wanted) if self.config.shuffle_layers > 0 else 0

    def place_for(self, group: int | None) -> int:
        """The group a new model joins: where one has room it depends on how full groups are alone."""
        return free_group([self.members[name].group for name in self.names], self.config.group_size, group)
