"""Many fine-tunes of one base, superposed: added, taken away again to the byte, retrieved."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from randes.checkpoints import sources
from randes.checkpoints.configurations import check_configuration
from randes.checkpoints.huggingface import model_files
from randes.checkpoints.layout import Layout
from randes.checkpoints.lazy_tensors import LazyTensors, Progress, digests, headers, silent, size
from randes.checkpoints.matrices import matrices_of
from randes.checkpoints.names.pieces import Rearranged
from randes.checkpoints.on_disk import StoredTensors
from randes.checkpoints.remote.locations import Location
from randes.checkpoints.sources import Checkpoint, Tensors
from randes.checkpoints.tensor_views import SplitTensors, replaced
from randes.config import Config
from randes.errors import BaseMismatchError
from randes.superposition import update
from randes.superposition.members import BASE_NAME, NewModel, check_alpha
from randes.superposition.packing import packed
from randes.superposition.reading import read, read_added
from randes.superposition.retrieve import matrices
from randes.superposition.state import State
from randes.superposition.store.read import load
from randes.superposition.store.write import save
from randes.superposition.summary import Verification, described, summary, verify
from randes.superposition.tune import Tuned, tune


class Superposition(State):
    """One base and the superposed deltas of its fine-tunes, as integers. Make one with ``create`` or ``load``.

    The base's tensors are not copied: those of a module are shared with it, those of a path stay on the disk and are
    read when they are needed. If the module is trained further or the files are written to, the next use raises
    ``BaseMismatchError``.

    device: where adding, removing and retrieving compute; "cpu" unless it is set. The bytes are the same on all.
    """

    @classmethod
    def create(cls, base: Checkpoint, config: Config | None = None, *, progress: Progress = silent) -> "Superposition":
        """An empty superposition over ``base``: an nn.Module, a state dict, or a path to safetensors.

        progress: called with each stage and its bytes, for a progress bar.

        Raises ``CheckpointError`` for a base that is not finite or has no matrix to superpose, and for a matrix
        whose columns ``config.segments`` does not divide; ``ValueError`` for
        ``config.centre``, and for a ``config.rank`` other than 0 or None.
        """
        config = (config or Config()).resolved(together=False)
        for option in ("centre", "rank"):
            if getattr(config, option):
                raise ValueError(f"config.{option} needs all models at once: use randes.compress(base, models, config)")
        found = matrices_of(base, config)
        superposition = cls.over(found.tensors, found.layout, found.superposed, found.config, progress=progress)
        superposition.model_files, superposition.to_files = model_files(base), found.to_files
        return superposition

    @classmethod
    def over(
        cls, tensors: Tensors, layout: Layout, superposed: Sequence[str], config: Config, *,
        progress: Progress = silent,
    ) -> "Superposition":  # fmt: skip
        """For ``create``: over a base's tensors, or some of them, as they are superposed or kept."""
        sources.check_values(tensors, "the base")
        step = progress("reading base", size(tensors))
        found = digests(tensors, look=sources.check_finite, step=step)
        if isinstance(tensors, StoredTensors | Rearranged | SplitTensors):
            tensors.expect(found, _changed)
        if config.origin == "zero":
            zeros = {name: _zeros(headers(tensors)[name]) for name in superposed}
            tensors, found = replaced(tensors, zeros), found | digests(zeros)
        return cls(config, tensors, superposed, found, layout=layout)

    # ---------------------------------------------------------------- models

    def add(
        self, name: str, finetuned: Checkpoint, *, group: int | None = None, alpha: float = 1.0,
        index: int | None = None, progress: Progress = silent,
    ) -> None:  # fmt: skip
        """Superpose a fine-tune of the base. The bytes do not depend on the order of adding, unless layers are shifted
        by a model's place (``shuffle_layers`` above 0), which a model gets when it is added.

        finetuned: a model, a state dict, or a path to safetensors or a LoRA adapter, which is read tensor by tensor.
        group: the superposition it joins; by default the first that has room.
        alpha: the factor of its deltas when they are used (1 is the fine-tune itself).
        index: its place, if layers are shifted; by default the first that is free.
        progress: called with each stage and its bytes, for a progress bar.
        Raises ``ValueError`` for a name that is taken or not allowed, a group that is full, an index that is taken, or
        an alpha that is not finite in fp32, alone or times the delta; and ``CheckpointError`` for a checkpoint that
        does not fit the base, or has another configuration. Nothing is changed then.
        """
        self.check_master()
        self.check_name(name)
        check_alpha(alpha)
        check_configuration(self.model_files, finetuned)
        model = NewModel(name, self.place_for(group), float(alpha), read(self, finetuned), self.next_index(index))
        self.check(model.group, progress=progress)
        step = progress("adding", 2 * size(self.base))
        update.add_model(self, model, step)

    def remove(self, name: str, finetuned: Checkpoint | None = None, *, progress: Progress = silent) -> None:
        """Remove a model, exactly: the bytes are again those from before it was added.

        finetuned: the checkpoint that was added. It must be given, because its delta is subtracted.
        Raises ``UnknownModelError`` for an unknown name, ``ValueError`` without a checkpoint and ``CheckpointError``
        for any other one. Nothing is changed then.
        """
        self.check_master()
        if finetuned is None:
            self.member(name)
            raise ValueError(
                f"finetuned must be the checkpoint that was added as {name!r}, whose delta is subtracted; got None."
                " Without it the model can only be served no more: SuperposedModel.delete_adapter(name)"
            )
        member = self.member(name)
        if name == BASE_NAME:
            raise ValueError(f"name must be a fine-tune's; {BASE_NAME} stays where deltas are centred on their mean")
        self.check(member.group, progress=progress)
        step = progress("removing", 2 * size(self.base))
        update.remove_model(self, name, read_added(self, name, finetuned, step=step), step)

    def pack(
        self, bits: float = 2, *, group: int | None = None, coordinates: int | None = None,
        embeddings: float | None = None,
        step: Callable[[int], None] = lambda _: None,
    ) -> "Superposition":  # fmt: skip
        """The same models with D in 8, 4, 2, 1 or 0.5 bits, for serving. Models cannot be added to it or removed.

        group: columns of a matrix that share a step, a multiple of 64, or 0 for whole rows; by default 64 at 4 bits,
            and 0 at fewer. At 8 bits and at 0.5 each row has one step.
        coordinates: bits of each model's coordinates in the shared bases (``Config.rank``): 16, 8 or 4; by default as
            many as D, and at least 4.
        embeddings: bits of the tables of embeddings (``Config.embeddings``) beside their loudest directions, which
            take a sixteenth of a bit: 8, 4, 2, 1 or 0.5, or 0 for the directions alone; by default 0.5, or 2 if D has
            more than 2.
        step: called with the bytes of integers that were packed, for a progress bar.
        Raises ``ValueError`` for other numbers, and for a superposition that is packed already. (Design, section 2.)
        """
        return packed(self, bits, group, coordinates, embeddings, step)

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
        """A model's tensors as a state dict. Only here do whole retrieved weights exist.

        Kept tensors are exact. Superposed tensors carry noise from the other models of the group. ``"__base__"`` is the
        base, exactly, unless deltas are centred: then it carries noise as the others do.
        Raises ``UnknownModelError``.
        """
        joined = self._joined(name, silent, ties=False)
        if isinstance(joined, LazyTensors):
            whole = {tensor: joined.read(tensor) for tensor in joined}
        else:
            whole = {tensor: value.clone() for tensor, value in joined.items()}
        return whole | {alias: whole[tensor] for alias, tensor in self.layout.ties.items()}

    def retrieved(self, name: str, *, as_files: bool = False, progress: Progress = silent) -> Tensors:
        """The same as a mapping that makes each tensor when it is asked for, for models larger than memory.

        as_files: use the names and shapes in the files of the Transformers folder that the base came from, where they
            differ from the model's (``checkpoints/names``).

        ``randes.checkpoints.sources.write_file`` writes it with only a part of a tensor in memory.
        """
        tensors = self._joined(name, progress, ties=True)
        return self.to_files.apply(tensors) if as_files else tensors

    def _joined(self, name: str, progress: Progress, *, ties: bool) -> Tensors:
        """A model's tensors as its checkpoint had them; the base's for its own name, where it is no member."""
        if name == BASE_NAME and name not in self.members and self.has_base:
            self.check_base()
            return self.layout.joined(self.base, ties=ties)
        return self.layout_of(name).joined(matrices(self, name, progress=progress), ties=ties)

    # ---------------------------------------------------------------- questions

    def verify(self, name: str, finetuned: Checkpoint, *, progress: Progress = silent) -> Verification:
        """Compare a retrieved model with the checkpoint that was added under its name. It measures weights, not
        accuracy. Raises ``UnknownModelError``, and ``CheckpointError`` for any other checkpoint."""
        return verify(self, name, finetuned, progress=progress)

    def info(self) -> dict[str, Any]:
        """Models, configuration, sizes in bytes, and which tensors are superposed, kept or shared; ready for JSON."""
        return summary(self)

    def __str__(self) -> str:
        return described(self)

    def __len__(self) -> int:
        """How many fine-tunes there are."""
        return len(self.names)

    def __bool__(self) -> bool:
        return True  # also while no model was added yet

    def __iter__(self) -> Iterator[str]:
        """The fine-tunes' names."""
        return iter(self.names)

    def __contains__(self, name: object) -> bool:
        return name in self.names

    # ---------------------------------------------------------------- stores

    def save(
        self, path: str | os.PathLike[str], *, shard_size: int | str | None = None, progress: Progress = silent
    ) -> None:
        """Write a store: a folder of safetensors and one manifest. See ``randes.superposition.store``.

        path: a folder that is new, empty, or the store that this came from or went to last.
        shard_size: bytes of tensors in a file, as a number or as "2GiB"; 0 for one file of each kind, however large. By
            default as in the store that this came from or went to last, and 0 for a new one. A tensor stays whole.
        progress: told of each stage and its bytes, for a progress bar.
        Raises ``StoreError`` for another folder, and for a store that somebody else has changed since; ``ValueError``
        for a ``shard_size`` that is none; ``OSError`` where the disk does not take it. The store is the old one then.
        """
        save(self, path, shard_size=shard_size, progress=progress)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, check: bool = True, progress: Progress = silent) -> "Superposition":
        """Open a store and check every byte of it. Its tensors stay on the disk until they are needed.

        check: False to check each tensor when it is first used instead. Raises ``StoreError``.
        """
        return load(cls, path, check=check, progress=progress)


def _zeros(header: Tensor) -> Tensor:
    """Of a tensor's shape and dtype, in the memory of one number."""
    return torch.zeros((), dtype=header.dtype, device="cpu").expand(header.shape)


def _changed(path: Location, tensor: str) -> BaseMismatchError:
    return BaseMismatchError(f"{tensor} of the base was changed after the superposition was created of it, in {path}")
