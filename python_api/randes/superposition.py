"""Many fine-tunes of one base, superposed: added, taken away again to the byte, retrieved."""

import math
import os
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from randes import basis, checkpoint
from randes.checkpoint import Checkpoint, Tensors
from randes.companions import companions
from randes.config import Config
from randes.errors import BaseMismatchError, CheckpointError, UnknownModelError
from randes.integers import AVERAGE_STEP, STEP, averaged, gain_and_peak, narrow, rate
from randes.layers import families, shuffled
from randes.layout import Layout, layout_of, superposed_names, tied
from randes.members import Member, Sizes
from randes_kernels import model_key, retrieve, superpose_, tensor_id

BASE_NAME = "__base__"
NOTHING_LEFT = 2.0**-40
"""The gain of a delta that lies wholly in the shared basis; the rest of it is zero."""


class Superposition:
    """One base and the superposed deltas of its fine-tunes, as integers. Make one with ``create`` or ``load``.

    The base's tensors are shared with what it was created from, not copied. Training them on in place is noticed
    at the next use, and refused with ``BaseMismatchError``.

    device: where adding, removing and retrieving compute, "cpu" unless it is set; the bytes are the same.
    """

    def __init__(
        self, config: Config, base: Tensors, superposed: Iterable[str], base_digests: Mapping[str, str] | None = None,
        bases: Tensors | None = None, layout: Layout | None = None,
    ) -> None:  # fmt: skip
        """For ``create`` and ``load``."""
        self.config = config
        self.base = base
        self.superposed = tuple(sorted(superposed))
        self.layout = layout or Layout()  # how base and fine-tunes, as they come, are these tensors (layout.py)
        self.base_digests = dict(base_digests or {name: checkpoint.digest(value) for name, value in base.items()})
        self.members: dict[str, Member] = {}
        self.deltas: dict[int, Tensors] = {}  # of each group: the integers by tensor, int16 where they fit
        self.bases = bases or {}  # the shared basis of each tensor, (K, r) int16 (basis.py)
        self.averages: Tensors = {}  # int64 sums over the models, for others="average"
        self.device = torch.device("cpu")
        self.companions: dict[str, bytes] = {}  # files that go with a Transformers base, by name
        self.stored: object = None  # what store.py knows of the store that this came from or went to
        self._families = families(base, self.superposed)
        self._family_of = {name: family for family, names in self._families.items() for name in names}

    @classmethod
    def create(cls, base: Checkpoint, config: Config | None = None) -> "Superposition":
        """An empty superposition over ``base``: an nn.Module, a state dict, or a path to safetensors.

        Raises ``CheckpointError`` for a base that is not finite or has no matrix to superpose, and for a matrix
        whose columns ``config.segments`` does not divide; ``ValueError`` for
        ``config.centre`` and ``config.rank``.
        """
        config = config or Config()
        for option in ("centre", "rank"):
            if getattr(config, option):
                raise ValueError(f"config.{option} needs all models at once: use randes.compress(base, models, config)")
        tensors = checkpoint.read(base)
        checkpoint.check_finite(tensors)
        layout = layout_of(tensors, config, base if isinstance(base, nn.Module) else _skeleton(base, tensors))
        tensors = layout.split(tensors)
        superposed = superposed_names(tensors, layout, config)
        if not superposed:
            raise CheckpointError(
                f"the base must have a matrix to superpose: fp32, fp16 or bf16, at least {config.min_width} wide,"
                f" matching {config.include} and not {config.exclude}; got none in {len(tensors)} tensors"
            )
        for name in superposed:
            if tensors[name].shape[1] % config.segments:
                columns = tensors[name].shape[1]
                raise CheckpointError(f"{name} must have a multiple of {config.segments} columns, got {columns}")
        superposition = cls(config, tensors, superposed, layout=layout)
        superposition.companions = companions(base)
        return superposition

    # ---------------------------------------------------------------- models

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
            known = ", ".join(self.names) or "no models"
            raise UnknownModelError(f"no model is called {name!r}; there are: {known}")
        return self.members[name]

    def add(self, name: str, finetuned: Checkpoint, *, group: int | None = None, alpha: float = 1.0) -> None:
        """Superpose a fine-tune of the base. Models of the same groups give the same bytes in any order of adding.

        group: the superposition it joins; by default the first that has room.
        alpha: what its deltas are scaled by when they are used (1 is the fine-tune itself).
        Raises ``ValueError`` for a name that is taken or not allowed or a group that is full, and
        ``CheckpointError`` for a checkpoint that does not fit the base. Nothing is changed then.
        """
        if not isinstance(name, str) or not name or name == BASE_NAME:
            raise ValueError(f"name must be a non-empty string other than {BASE_NAME!r}, got {name!r}")
        if name in self.members:
            raise ValueError(f"a model called {name!r} is there already; remove it first or choose another name")
        if not math.isfinite(alpha):
            raise ValueError(f"alpha must be a finite number, got {alpha}")
        self._join(name, finetuned, self._place(group), alpha)

    def add_base(self, base: Checkpoint) -> None:
        """Superpose the base itself, for ``randes.compress``: in the first group, beside its fine-tunes."""
        self._join(BASE_NAME, base, 0, 1.0)

    def _join(self, name: str, finetuned: Checkpoint, group: int, alpha: float) -> None:
        self.check_base()
        tensors = self.read(finetuned)
        digests = {tensor: checkpoint.digest(value) for tensor, value in tensors.items()}
        changed = {tensor for tensor in tensors if digests[tensor] != self.base_digests[tensor]}
        changed_matrices = sorted(changed & set(self.superposed))
        coordinates, units = self._coordinates(tensors, changed_matrices)
        gains = {}
        for tensor in changed_matrices:
            gain, peak = gain_and_peak(tensor, *self._difference(tensors, tensor, coordinates, units))
            if gain == 0 and not (tensor in coordinates and coordinates[tensor].any()):
                continue  # −0.0 for 0.0: other bytes, the same weight
            gain = gain or NOTHING_LEFT
            if peak / gain / STEP * (self.config.group_size + 1) >= 2**31:
                raise CheckpointError(f"{tensor} has a delta {peak / gain:.3g} times its own size: too far for int32")
            gains[tensor] = gain
        coordinates = {tensor: held for tensor, held in coordinates.items() if tensor in gains}
        units = {tensor: unit for tensor, unit in units.items() if tensor in gains}
        member = Member(group, float(alpha), gains, digests, self._own(tensors, changed), units, coordinates)
        deltas = self._with(name, member, tensors, subtract=False)
        averages = self.averages if name == BASE_NAME else self._averaged(tensors, subtract=False)

        self.members[name], self.averages = member, averages
        self.deltas[group] = deltas

    def remove(self, name: str, finetuned: Checkpoint) -> None:
        """Take a model away again, exactly: the bytes are those from before it was added.

        finetuned: the checkpoint that was added (its delta has to be known to be subtracted).
        Raises ``UnknownModelError`` for an unknown name and ``CheckpointError`` for any other checkpoint.
        Nothing is changed then.
        """
        member = self.member(name)
        if name == BASE_NAME:
            raise ValueError(f"name must be a fine-tune's; {BASE_NAME} stays where deltas are centred on their mean")
        self.check_base()
        tensors = self.read_added(name, finetuned)
        deltas = self._with(name, member, tensors, subtract=True)
        averages = self._averaged(tensors, subtract=True)

        del self.members[name]
        self.averages = averages if self.names else {}
        self.deltas[member.group] = deltas
        if not deltas:
            del self.deltas[member.group]

    def retrieve(self, name: str) -> Tensors:
        """A model's tensors again, as a state dict: the one place where a whole retrieved weight exists.

        Kept tensors are exact; superposed ones carry the other models of the group as noise.
        Raises ``UnknownModelError``.
        """
        member = self.member(name)
        self.check_base()
        key, transform = self.key(name), self.config.transform
        retrieved = {tensor: self.other(name, tensor).clone() for tensor in self.base if tensor not in member.gains}
        for tensor, gain in member.gains.items():
            base = self.base[tensor].to(self.device)
            delta = self.deltas[member.group][self.place(name, tensor)].to(self.device)
            scale = gain * STEP
            if tensor not in self.bases:
                whole = retrieve(base, delta, member.alpha * scale, key, tensor_id(tensor), transform)
            else:
                turned_back = retrieve(torch.zeros_like(base, dtype=torch.float32), delta, scale, key,
                                       tensor_id(tensor), transform)  # fmt: skip
                held = member.coordinates[tensor].to(self.device), member.units[tensor]
                own = basis.retrieved(turned_back, self.bases[tensor].to(self.device), *held)
                whole = (base.float() + member.alpha * own).to(base.dtype)
            retrieved[tensor] = whole.cpu()
        return self.layout.join(retrieved)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a store: a folder of safetensors and one manifest. See ``randes.store``."""
        from randes import store

        store.save(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Superposition":
        """Read a store and check every byte of it. Raises ``StoreError``."""
        from randes import store

        return store.load(path)

    # ---------------------------------------------------------------- what serving needs

    def key(self, name: str) -> int:
        """A model's Philox key."""
        return model_key(self.config.seed, name)

    def family(self, tensor: str) -> list[str]:
        """The tensors whose superpositions a model's ``tensor`` may be in: itself, or its shuffled layers."""
        return self._families[self._family_of[tensor]] if self.config.shuffle_layers else [tensor]

    def place(self, name: str, tensor: str) -> str:
        """The tensor in whose superposition a model's delta of ``tensor`` is: itself, unless layers are shuffled."""
        if not self.config.shuffle_layers:
            return tensor
        return shuffled(self.key(name), self._family_of[tensor], self.family(tensor))[tensor]

    def other(self, name: str, tensor: str) -> Tensor:
        """What a model has of a tensor that is not superposed for it: its own, the average, or the base's."""
        own = self.members[name].kept.get(tensor)
        if own is not None:
            return own
        base = self.base[tensor]
        if tensor in self.averages and self._differs(tensor) and name != BASE_NAME:
            return (self.averages[tensor].double() * (AVERAGE_STEP / len(self.names))).to(base.dtype)
        return base

    def read(self, finetuned: Checkpoint) -> Tensors:
        """A fine-tune's tensors under the base's names, as matrices where they are superposed as such.

        Raises ``CheckpointError`` for one that does not fit. Kept tensors (``others="keep"``) may have other shapes.
        """
        tensors = self.layout.split(checkpoint.read(finetuned))
        for alias, name in tied(tensors).items():
            if alias not in self.base and name in self.base:
                del tensors[alias]  # a head that this checkpoint ties and the base's omits
        free = self.base.keys() - set(self.superposed) if self.config.others == "keep" else set()
        checkpoint.check_fits(tensors, self.base, free)
        return tensors

    def read_added(self, name: str, finetuned: Checkpoint) -> Tensors:
        """The tensors of the checkpoint that was added as ``name``.

        Raises ``UnknownModelError``, and ``CheckpointError`` for any other checkpoint.
        """
        member = self.member(name)
        tensors = self.read(finetuned)
        other = [tensor for tensor, value in tensors.items() if checkpoint.digest(value) != member.digests[tensor]]
        if other:
            raise CheckpointError(
                f"this is not the checkpoint that was added as {name!r}: {len(other)} of {len(tensors)} tensors differ,"
                f" {other[0]} the first"
            )
        return tensors

    @property
    def others(self) -> list[str]:
        """The tensors that some model has its own of, or that are averaged."""
        names = {tensor for tensor in self.averages if self._differs(tensor)}
        for member in self.members.values():
            names |= member.kept.keys()
        return sorted(names)

    @property
    def sizes(self) -> Sizes:
        """Bytes by what they are for."""
        base = _bytes(self.base.values())
        return Sizes(
            base=base,
            superposed=sum(_bytes(tensors.values()) for tensors in self.deltas.values()),
            kept=sum(_bytes(member.kept.values()) for member in self.members.values()) + _bytes(self.averages.values()),
            basis=_bytes(self.bases.values())
            + sum(_bytes(member.coordinates.values()) for member in self.members.values()),
            separate_models=base * len(self.names),
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors: base, superposed deltas, and what is kept per model."""
        return self.sizes.total

    def check_base(self) -> None:
        """Raise ``BaseMismatchError`` where the base was changed in place since this superposition was made of it."""
        for name, value in self.base.items():
            if checkpoint.digest(value) != self.base_digests[name]:
                raise BaseMismatchError(f"{name} of the base was changed after the superposition was created of it")

    # ---------------------------------------------------------------- inside

    def _differs(self, tensor: str) -> bool:
        """Whether any model's own tensor is not the base's."""
        return any(member.digests[tensor] != self.base_digests[tensor] for member in self.members.values())

    def _place(self, group: int | None) -> int:
        """The group a new model joins. Where one has room the choice depends on how full groups are alone."""
        taken = [self.members[name].group for name in self.names]
        if group is None:
            return next(g for g in range(len(taken) + 1) if taken.count(g) < self.config.group_size)
        limit = max(taken, default=-1) + 1
        if not isinstance(group, int) or not 0 <= group <= limit:
            raise ValueError(f"group must be an integer from 0 to {limit}, got {group!r}")
        if taken.count(group) >= self.config.group_size:
            raise ValueError(f"group must have room; group {group} has its {self.config.group_size} models")
        return group

    def _coordinates(self, tensors: Tensors, changed: list[str]) -> tuple[Tensors, dict[str, float]]:
        """A model's deltas in the shared bases, and what their integers are worth."""
        found = {
            tensor: basis.coordinates(tensors[tensor].double() - self.base[tensor].double(), self.bases[tensor])
            for tensor in changed
            if tensor in self.bases
        }
        return {name: held for name, (held, _) in found.items()}, {name: unit for name, (_, unit) in found.items()}

    def _difference(
        self, tensors: Tensors, tensor: str, coordinates: Mapping[str, Tensor], units: Mapping[str, float]
    ) -> tuple[Tensor, Tensor]:
        """Two tensors whose difference is superposed: fine-tune and base; with a shared basis, the rest and zero."""
        if tensor not in coordinates:
            return tensors[tensor], self.base[tensor]
        delta = tensors[tensor].double() - self.base[tensor].double()
        rest = basis.remainder(delta, self.bases[tensor], coordinates[tensor], units[tensor])
        return rest, torch.zeros_like(rest)

    def _own(self, tensors: Tensors, changed: set[str]) -> Tensors:
        if self.config.others != "keep":
            return {}
        return {tensor: tensors[tensor].clone() for tensor in sorted(changed - set(self.superposed))}

    def _with(self, name: str, member: Member, tensors: Tensors, *, subtract: bool) -> Tensors:
        """The group's integers with the model added or taken away; the held ones are left as they are."""
        deltas = dict(self.deltas.get(member.group, {}))
        key, transform = self.key(name), self.config.transform
        for tensor, gain in member.gains.items():
            place = self.place(name, tensor)
            held = deltas.get(place)
            if held is None:
                wide = torch.zeros(self.base[tensor].shape, dtype=torch.int32, device=self.device)
            else:
                wide = held.to(self.device, torch.int32, copy=True)
            pair = self._difference(tensors, tensor, member.coordinates, member.units)
            finetuned, base = (value.to(self.device) for value in pair)
            superpose_(wide, finetuned, base, rate(gain), key, tensor_id(tensor), transform, subtract=subtract)
            deltas[place] = narrow(wide).cpu()
        if subtract:
            places = {
                self.place(other, tensor) for other in self._neighbours(name) for tensor in self.members[other].gains
            }
            for place in deltas.keys() - places:
                if deltas.pop(place).any():
                    raise CheckpointError(
                        f"{place} does not come back to zero without {name!r}: its integers were altered"
                    )
        return deltas

    def _averaged(self, tensors: Tensors, *, subtract: bool) -> Tensors:
        if self.config.others != "average":
            return {}
        return averaged(self.averages, tensors, self.base.keys() - set(self.superposed), subtract=subtract)

    def _neighbours(self, name: str) -> list[str]:
        group = self.members[name].group
        return [other for other, member in self.members.items() if member.group == group and other != name]


def _skeleton(base: object, tensors: Tensors) -> nn.Module | None:
    """The model of a Transformers folder, where its tensors have the names that the folder's files have."""
    from randes.pretrained import skeleton

    model = skeleton(base)
    return model if model is not None and tensors.keys() <= model.state_dict().keys() else None


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
