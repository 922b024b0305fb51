"""Many fine-tunes of one base, superposed: added, taken away again to the byte, retrieved."""

import os
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from randes import checkpoint, superposing
from randes.arranged import SplitTensors, replaced
from randes.checkpoint import Checkpoint, Tensors
from randes.companions import companions
from randes.config import Config
from randes.configurations import check_configuration
from randes.errors import BaseMismatchError, CheckpointError, RandesError, UnknownModelError
from randes.integers import AVERAGE_STEP, shared_gain
from randes.layers import families, shifted, shuffled
from randes.layout import Layout, matrices_of, tied
from randes.members import BASE_NAME, Member, Sizes, check_alpha
from randes.packed import Held, Packing, packed
from randes.retrieved import Retrieved
from randes.stored import Layers, StoredTensors, check, in_files, unchecked
from randes.streams import LazyTensors, Progress, digests, headers, parts, silent, size
from randes.superposing import Joining
from randes.tune import Tuned, tune
from randes_kernels import Packed, model_key, slices, tensor_id

__all__ = ["BASE_NAME", "Superposition"]


class Superposition:
    """One base and the superposed deltas of its fine-tunes, as integers. Make one with ``create`` or ``load``.

    The base's tensors are shared with what it was created from, not copied: a path's stay on the disk and are read when
    they are needed. Training them on in place, or writing to the files, is noticed at the next use, and refused with
    ``BaseMismatchError``.

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
        self.base_digests = dict(base_digests or digests(base))
        self.members: dict[str, Member] = {}
        # Of each group: the integers by tensor, int16 where they fit.
        self.deltas: dict[int, MutableMapping[str, Tensor]] = {}
        self.packing: Packing | None = None
        self.few_bits: dict[int, Mapping[str, Packed]] = {}  # in their place, where this is packed for serving
        self.bases = bases or {}  # the shared basis of each tensor, (K, r) int16 (basis.py)
        self.averages: MutableMapping[str, Tensor] = {}  # int64 sums over the models, for others="average" and "sum"
        self.device = torch.device("cpu")
        self.companions: dict[str, bytes] = {}  # files that go with a Transformers base, by name
        self.torn = ""  # why it can be used no more
        self.stored: object = None  # what store.py knows of the store that this came from or went to
        self._families = families(headers(base), self.superposed)
        self._family_of = {name: family for family, names in self._families.items() for name in names}
        self._shared_gains: dict[str, float] = {}

    @classmethod
    def create(cls, base: Checkpoint, config: Config | None = None, *, progress: Progress = silent) -> "Superposition":
        """An empty superposition over ``base``: an nn.Module, a state dict, or a path to safetensors.

        progress: told of each stage and its bytes, for a progress bar.

        Raises ``CheckpointError`` for a base that is not finite or has no matrix to superpose, and for a matrix
        whose columns ``config.segments`` does not divide; ``ValueError`` for
        ``config.centre`` and ``config.rank``.
        """
        config = config or Config()
        for option in ("centre", "rank"):
            if getattr(config, option):
                raise ValueError(f"config.{option} needs all models at once: use randes.compress(base, models, config)")
        tensors, layout, superposed, config = matrices_of(base, config)
        step = progress("reading base", size(tensors))
        found = digests(tensors, look=checkpoint.check_finite, step=step)
        if isinstance(tensors, StoredTensors | SplitTensors):
            tensors.expect(found, _changed)
        if config.origin == "zero":
            zeros = {name: _zeros(headers(tensors)[name]) for name in superposed}
            tensors, found = replaced(tensors, zeros), found | digests(zeros)
        superposition = cls(config, tensors, superposed, found, layout=layout)
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

    def add(
        self, name: str, finetuned: Checkpoint, *, group: int | None = None, alpha: float = 1.0,
        index: int | None = None, progress: Progress = silent,
    ) -> None:  # fmt: skip
        """Superpose a fine-tune of the base. Models of the same groups give the same bytes in any order of adding, but
        where layers shift by a model's place, which it takes when it is added (``shuffle_layers`` above 0).

        finetuned: a model, a state dict, or a path, which is read tensor by tensor: safetensors, or a LoRA adapter.
        group: the superposition it joins; by default the first that has room.
        alpha: what its deltas are scaled by when they are used (1 is the fine-tune itself).
        index: its place, where layers shift; by default the first that is free.
        progress: told of each stage and its bytes, for a progress bar.
        Raises ``ValueError`` for a name that is taken or not allowed, a group that is full, an index that is taken, or
        an alpha that is not finite in fp32, alone or times the delta; and ``CheckpointError`` for a checkpoint that
        does not fit the base, or whose configuration is another (``configurations.py``). Nothing is changed then.
        """
        self.check_master()
        self.check_name(name)
        check_alpha(alpha)
        check_configuration(self.companions, finetuned)
        model = Joining(name, self.place_for(group), float(alpha), self.read(finetuned), self.next_index(index))
        self.check(model.group, progress=progress)
        step = progress("adding", 2 * size(self.base))
        superposing.join(self, model, step)

    def remove(self, name: str, finetuned: Checkpoint, *, progress: Progress = silent) -> None:
        """Take a model away again, exactly: the bytes are those from before it was added.

        finetuned: the checkpoint that was added (its delta has to be known to be subtracted).
        Raises ``UnknownModelError`` for an unknown name and ``CheckpointError`` for any other checkpoint.
        Nothing is changed then.
        """
        self.check_master()
        member = self.member(name)
        if name == BASE_NAME:
            raise ValueError(f"name must be a fine-tune's; {BASE_NAME} stays where deltas are centred on their mean")
        self.check(member.group, progress=progress)
        step = progress("removing", 2 * size(self.base))
        superposing.leave(self, name, self.read_added(name, finetuned, step=step), step)

    def pack(
        self, bits: int = 4, *, group: int = 64, coordinates: int | None = None,
        step: Callable[[int], None] = lambda _: None,
    ) -> "Superposition":  # fmt: skip
        """The same models with D in 8, 4 or 2 bits, for serving: nothing can be added to it or taken away.

        group: columns of a matrix that share a scale, at 4 and 2 bits; a multiple of 64. At 8 bits a row has one.
        coordinates: bits of what each model keeps in the shared bases (``Config.rank``): 16, 8 or 4; by default as many
            as D, but no less than 4.
        step: called with the bytes of integers that were packed, for a progress bar.
        Raises ``ValueError`` for other numbers, and for a superposition that is packed already. (Design, section 2.)
        """
        return packed(self, bits, group, coordinates, step)

    def tune(
        self, module: nn.Module, batches: Mapping[str, Sequence[Any]], loss: Callable[[nn.Module, Any], Tensor],
        *, steps: int = 40, rate: float = 0.02, held_out: float = 0.25, step: Callable[[], None] = lambda: None,
    ) -> dict[str, Tuned]:  # fmt: skip
        """Fit α of each superposed matrix of each model in ``batches`` on a loss, by Adam; its deltas stay as they are.

        module: the base's module, whose tensors are replaced for each call and not changed.
        batches: for each model, batches of its own data; the last ``held_out`` share of them checks the fit, which is
            kept only where their mean loss falls. loss: called with the module and a batch; a scalar.
        steps: updates a model. rate: of α at each. step: called after each update, for a progress bar.
        Returns each model's loss on its held-out batches before and after. One model in memory at a time, whole.
        Raises ``UnknownModelError`` for a name, and ``ValueError`` for too few batches. (Design, section 2.)
        """
        return tune(self, module, batches, loss, steps=steps, rate=rate, held_out=held_out, step=step)

    def retrieve(self, name: str) -> dict[str, Tensor]:
        """A model's tensors again, as a state dict: the one place where a whole retrieved weight exists.

        Kept tensors are exact; superposed ones carry the other models of the group as noise.
        Raises ``UnknownModelError``.
        """
        joined = self.layout.joined(self.matrices(name), ties=False)
        assert isinstance(joined, LazyTensors)
        whole = {tensor: joined.read(tensor) for tensor in joined}
        return whole | {alias: whole[tensor] for alias, tensor in self.layout.ties.items()}

    def retrieved(self, name: str, *, progress: Progress = silent) -> Tensors:
        """The same as a mapping that makes each tensor when it is asked for, for models larger than memory.

        ``randes.checkpoint.write_file`` writes it without holding more than a part of a tensor.
        """
        return self.layout.joined(self.matrices(name, progress=progress))

    def matrices(self, name: str, *, progress: Progress = silent) -> Retrieved:
        """The same by the superposition's own names: matrices for what is superposed as such (``Layout``)."""
        self.check(self.member(name).group, name, progress=progress)
        return Retrieved(self, name)

    def save(self, path: str | os.PathLike[str], *, progress: Progress = silent) -> None:
        """Write a store: a folder of safetensors and one manifest. See ``randes.store``."""
        from randes import store

        store.save(self, path, progress=progress)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, check: bool = True, progress: Progress = silent) -> "Superposition":
        """Open a store and check every byte of it. Its tensors stay on the disk until they are needed.

        check: False to check only what is used, when it is. Raises ``StoreError``.
        """
        from randes import store

        return store.load(path, check=check, progress=progress)

    # ---------------------------------------------------------------- what serving needs

    @property
    def held(self) -> Mapping[int, Mapping[str, Held]]:
        """Of each group, its superpositions by tensor: integers, or what they were packed to."""
        return self.deltas if self.packing is None else self.few_bits

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
        if self.config.gains == "own":
            return None
        family = self.family(tensor)
        if family[0] not in self._shared_gains:
            described = headers(self.base)
            found = [
                shared_gain(
                    (
                        total
                        for part in parts(self.base, name)
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
        return self._families[self._family_of[tensor]] if self.config.shuffle_layers else [tensor]

    def place(self, name: str, tensor: str, index: int | None = None) -> str:
        """The tensor in whose superposition a model's delta of ``tensor`` is: itself, unless layers are shuffled.

        index: the model's, where it is not a member yet.
        """
        if not self.config.shuffle_layers:
            return tensor
        if self.config.shuffle_layers > 0:
            index = self.members[name].index if index is None else index
            return shifted(index * self.config.shuffle_layers, self.family(tensor))[tensor]
        return shuffled(self.key(name), self._family_of[tensor], self.family(tensor))[tensor]

    def other(self, name: str, tensor: str) -> Tensor:
        """What a model has of a tensor that no layer multiplies with: its own, the average or sum, or the base's; of a
        superposed vector what comes back of it."""
        if tensor in self.layout.vectors:
            return Retrieved(self, name)[tensor][0]
        own = self.members[name].kept.get(tensor)
        if own is not None:
            return own
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
        return tensor in self.layout.vectors or (self.config.others == "sum" and self.is_averaged(tensor))

    def read(self, finetuned: Checkpoint) -> Tensors:
        """A fine-tune's tensors under the base's names, as matrices where they are superposed as such.

        Raises ``CheckpointError`` for one that does not fit. Kept tensors (``others="keep"``) may have other shapes.
        """
        # An adapter is of the base itself, which is not here where deltas are measured from something else.
        measured = self.config.centre or not self.has_base
        base = None if measured else self.layout.joined(self.base, ties=False)
        tensors = self.layout.split(checkpoint.read(finetuned, base))
        # A head that this checkpoint ties and the base's omits.
        extra = {alias for alias, name in tied(tensors).items() if alias not in self.base and name in self.base}
        if extra:
            tensors = {name: value for name, value in tensors.items() if name not in extra}
        free = self.base.keys() - set(self.superposed) if self.config.others == "keep" else set()
        checkpoint.check_fits(tensors, self.base, free)
        return tensors

    def read_added(self, name: str, finetuned: Checkpoint, *, step: Callable[[int], None] = lambda _: None) -> Tensors:
        """The tensors of the checkpoint that was added as ``name``. step: called with the bytes read.

        Raises ``UnknownModelError``, and ``CheckpointError`` for any other checkpoint.
        """
        member = self.member(name)
        tensors = self.read(finetuned)
        found = digests(tensors, look=checkpoint.check_finite, step=step)
        other = [tensor for tensor in tensors if found[tensor] != member.digests[tensor]]
        if other:
            raise CheckpointError(
                f"this is not the checkpoint that was added as {name!r}: {len(other)} of {len(tensors)} tensors differ,"
                f" {other[0]} the first"
            )
        return tensors

    @property
    def others(self) -> list[str]:
        """The tensors that some model has its own of, or that are averaged or summed."""
        names = {tensor for tensor in self.averages if self.is_averaged(tensor)}
        for member in self.members.values():
            names |= member.kept.keys()
        return sorted(names)

    @property
    def sizes(self) -> Sizes:
        """Bytes by what they are for."""
        base = size(self.base)
        return Sizes(
            base=base,
            superposed=sum(map(size, self.held.values())),
            kept=sum(size(member.kept) for member in self.members.values()) + size(self.averages),
            basis=size(self.bases) + sum(size(member.coordinates) for member in self.members.values()),
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
        held = self.base.held if isinstance(self.base, Layers) else self.base
        if in_files(held):
            return
        for name, found in digests(held, step=step).items():
            if found != self.base_digests[name]:
                raise BaseMismatchError(f"{name} of the base was changed after the superposition was created of it")

    def check(self, group: int, name: str | None = None, *, progress: Progress = silent) -> None:
        """Raise where the base, a group's integers or a model's own tensors are not what they were."""
        used: list[Mapping[str, Held]] = [self.held.get(group, {}), self.averages, self.bases]
        if name is not None:
            used += [self.members[name].kept, self.members[name].coordinates]
        nbytes = sum(map(unchecked, [self.base, *used]))
        step = (progress if nbytes else silent)("checking", nbytes)
        self.check_base(step=step)
        for tensors in used:
            check(tensors, step)

    # ---------------------------------------------------------------- inside

    def check_master(self) -> None:
        """Raise ``ValueError`` for what is packed for serving: the integers it was made of are what can be changed."""
        if self.packing is not None:
            raise ValueError(
                "a packed superposition is for serving: nothing can be added or removed;"
                " change the one that it was made of, and pack that again"
            )

    def check_name(self, name: str) -> None:
        """Raise ``ValueError`` for a name that a new model cannot have."""
        if not isinstance(name, str) or not name or name == BASE_NAME:
            raise ValueError(f"name must be a non-empty string other than {BASE_NAME!r}, got {name!r}")
        if name in self.members:
            raise ValueError(f"a model called {name!r} is there already; remove it first or choose another name")

    def next_index(self, wanted: int | None = None) -> int:
        """A new model's place among those that are there, the first that is free; 0 where no layers are shifted."""
        if self.config.shuffle_layers <= 0:
            return 0
        taken = {member.index for member in self.members.values()}
        if wanted is None:
            return next(index for index in range(len(taken) + 1) if index not in taken)
        if not isinstance(wanted, int) or wanted < 0 or wanted in taken:
            raise ValueError(f"index must be an integer of at least 0 that no model has, got {wanted!r}")
        return wanted

    def place_for(self, group: int | None) -> int:
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


def _zeros(header: Tensor) -> Tensor:
    """Of a tensor's shape and dtype, in the memory of one number."""
    return torch.zeros((), dtype=header.dtype, device="cpu").expand(header.shape)


def _changed(path: Path, tensor: str) -> BaseMismatchError:
    return BaseMismatchError(f"{tensor} of the base was changed after the superposition was created of it, in {path}")
