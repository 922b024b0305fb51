"""``SuperposedModel``: a whole model whose rows may belong to different fine-tunes."""

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from randes.checkpoints.lazy_tensors import Progress, silent
from randes.checkpoints.sources import Checkpoint
from randes.serving.batch import Batch
from randes.serving.pretrained import load_base, opened
from randes.serving.routing import Router, check_rows, first_input, sequences_of
from randes.serving.served_models import ServedModels
from randes.serving.takeover import check_layers, take_centre
from randes.serving.transformers_models import follow_calls, mark_served, of_one_choice
from randes.serving.unload import Unloaded, give, merged_tensors
from randes.serving.warm_up import run_each_kind
from randes.superposition import update
from randes.superposition.members import BASE_NAME
from randes.superposition.reading import read
from randes.superposition.superposition import Superposition


class SuperposedModel(nn.Module):
    """A base model that answers as any of a superposition's fine-tunes.

    Its ``nn.Linear`` layers become ``SuperposedLinear``, in place, with the base's own parameters. Other layers with
    superposed weights are replaced likewise (``layers/other_layers.py``). All other layers use each row's own norms,
    biases and heads where those are kept per model.

    superposition: a ``Superposition``, or a store's folder. base_module must hold the base's weights: ``randes.load``
    loads them into it from the store.
    capacity: the number of models to reserve room for, so that they can be added and deleted while others are answered.
    It takes memory for the superpositions of all their groups and one more, and for what models keep
    (``served_models.py``, docs/serving.md). Without it the model serves those that the superposition holds now.

    ``add_adapter`` and ``delete_adapter`` change the superposition in memory only. The store that it was loaded from
    stays as it is; ``save_pretrained`` writes another.

    If deltas are centred on their mean, ``base_module`` must hold the base that was compressed, in its dtype, or the
    stored one. The superposed layers' weights become that mean, and ``"__base__"`` is one of the superposed
    models. If the fine-tuned weights themselves are superposed (``origin="zero"``), the superposed layers' weights
    become zeros, whatever they were, and ``"__base__"`` is an unknown name.

    Raises ``BaseMismatchError`` if ``base_module`` does not hold the superposition's base (cast to its own
    dtype), and ``ValueError`` if a superposed tensor belongs to a layer of no known kind or one that is not called,
    for a capacity below the number of models, and for a capacity with a packed superposition.
    """

    def __init__(
        self, base_module: nn.Module, superposition: Superposition | str | os.PathLike[str], *,
        capacity: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        superposition = opened(base_module, superposition)
        self.router = Router((), superposition.has_base)
        self._served = ServedModels(superposition, self.router, capacity)
        layers = self._served.layers(base_module)
        check_layers(base_module, layers, superposition)
        own = [(layer.module, dict(layer.module._parameters)) for layer in layers]
        try:
            if superposition.config.centre or not superposition.has_base:
                take_centre(layers, superposition)
            self._served.take_over(base_module, layers)
            self._served.serve(base_module, superposition.served)
        except BaseException:  # the module is changed whole or not at all
            for original in reversed(self._served.originals):
                original.restore()
            for module, parameters in own:
                module._parameters.update(parameters)
            raise
        self.base_model = base_module
        self._hooks = follow_calls(base_module, self.router)
        mark_served(base_module, self.router)

    @classmethod
    def from_pretrained(
        cls, path_or_name: str | os.PathLike[str], store: str | os.PathLike[str] | Superposition | None = None, *,
        capacity: int | None = None, **kwargs: Any,
    ) -> "SuperposedModel":  # fmt: skip
        """A Transformers model over a store: the class that its configuration names, and every fine-tune in the store.

        path_or_name: the base, as Transformers' ``from_pretrained`` takes it; or the store itself, if it was made
            from a Transformers model.
        store: the store's folder, or a ``Superposition``; ``path_or_name`` if it is left out.
        capacity: the number of models to reserve room for (``SuperposedModel``).
        kwargs: for Transformers' ``from_pretrained``: ``dtype``, ``device_map`` (of one device) and so on. Weights are
            read from safetensors only, unless ``use_safetensors=False`` is among them.
        Raises ``StoreError`` for a folder that is not such a store, ``CheckpointError`` for one whose files are broken
        or lie, ``BaseMismatchError`` for another base or a configuration that names no class of Transformers,
        ``OSError`` if a name's files cannot be reached, ``ValueError`` for a ``device_map`` of several devices or a
        ``tp_plan``, and ``ImportError`` without a recent Transformers.
        """
        module, superposition = load_base(path_or_name, store, **kwargs)
        return cls(module, superposition, capacity=capacity)

    @property
    def names(self) -> list[str]:
        """The models that can be asked for."""
        return self._served.names

    @property
    def superposition(self) -> Superposition:
        """The superposition that is served. Some of its models may not be served (``delete_adapter``)."""
        return self._served.superposition

    def add_adapter(
        self, name: str, checkpoint: Checkpoint | None = None, *, group: int | None = None, alpha: float = 1.0,
        progress: Progress = silent,
    ) -> None:  # fmt: skip
        """Superpose one more fine-tune and serve it, while other threads are answered. Calls that began before see the
        models that were there when they began.

        checkpoint: a model, a state dict or a path, as ``Superposition.add`` takes it; group, alpha and progress are
        passed to it. None to serve a model that the superposition has already.
        Raises what ``Superposition.add`` does, ``ValueError`` without a capacity or if the superposition is
        packed, ``UnknownModelError``, and ``CapacityError`` if there is no room, or if calls under way
        still need what the last change replaced. Nothing is changed then.
        """
        served, superposition = self._served, self.superposition
        with self.router.changing:
            if checkpoint is None:
                if superposition.member(name) and name in self.router.names:
                    raise ValueError(f"a model called {name!r} is served already")
                served.check_capacity(1)
                served.serve(self.base_model, [*self.router.names, name])
                return
            superposition.check_master()
            superposition.check_name(name)
            served.check_room(superposition.place_for(group), 1)
            superposition.add(name, checkpoint, group=group, alpha=alpha, progress=progress)
            try:
                served.serve(self.base_model, [*self.router.names, name])
            except BaseException:
                superposition.remove(name, checkpoint)
                raise

    def delete_adapter(self, name: str, checkpoint: Checkpoint | None = None, *, progress: Progress = silent) -> None:
        """Stop serving a model, while other threads are answered. Calls that began before still finish with it.

        checkpoint: the checkpoint that was added as this model, to subtract it from the superposition, exactly. Without
        it the model stays superposed: it remains in its neighbours' noise and in what is saved, and
        ``add_adapter(name)`` serves it again.
        Raises ``UnknownModelError``, ``ValueError`` for the model that ``set_adapter`` chose and for the base; with a
        checkpoint what ``Superposition.remove`` and ``add_adapter`` do. Nothing is changed then.
        """
        served, superposition = self._served, self.superposition
        with self.router.changing:
            if name == BASE_NAME:
                raise ValueError(f"name must be a fine-tune's, got {name!r}")
            if checkpoint is None:
                self.router.of([name])
            member = superposition.member(name)
            if self.router.chosen is not None and name in self.router.chosen.models:
                raise ValueError(f"name must not be the model that set_adapter chose, {name!r}; choose another first")
            names = [other for other in self.router.names if other != name]
            if checkpoint is None:
                served.serve(self.base_model, names)
                return
            superposition.check_master()
            served.check_room(member.group)
            superposition.remove(name, checkpoint, progress=progress)
            try:
                served.serve(self.base_model, names)
            except BaseException:
                update.restore_model(superposition, name, member, read(superposition, checkpoint, member.kept))
                raise

    def set_adapter(self, name: str) -> None:
        """Answer as this model (or ``"__base__"``) in all later calls that name no model, in all threads."""
        self.router.choose(name)

    @property
    def active_adapters(self) -> list[str]:
        """The models that would answer a call of this thread that names none: a scope's, the chosen one, or none."""
        batch = self.router.current()
        return [] if batch is None else batch.models

    @property
    def active_adapter(self) -> str | None:
        """The one model of ``active_adapters``; None if there is none, or if there are several."""
        names = self.active_adapters
        return names[0] if len(names) == 1 else None

    def merge_and_unload(self, name: str | None = None) -> nn.Module:
        """The base module as a plain model again, of its own classes, with one model's retrieved weights.

        name: of the model, ``"__base__"`` for the base's weights; by default the active one.
        Weights that differ from the base's are new tensors, in the module's dtype and on its devices. For a moment
        memory holds them beside the old ones. This object can no longer be called. No call may be under way.
        Raises ``UnknownModelError``, ``RuntimeError`` if no model is active, and ``ValueError`` if several are.
        """
        with self.router.changing:
            batch = self.router.batch() if name is None else self.router.of([name])
            if len(batch.named.versions) > 1:
                raise ValueError(f"name must be given where several models are active, {batch.models}")
            module = self.base_model
            merged = merged_tensors(module, self.superposition, batch.models[0])
            for hook in self._hooks:
                hook.remove()
            for original in reversed(self._served.originals):
                original.restore()
            give(module, merged)
            mark_served(module, None)
            self.router.serve([])
            self.base_model = Unloaded()
            return module

    def unload(self) -> nn.Module:
        """The base module as a plain model again, with the base's weights: ``merge_and_unload("__base__")``."""
        return self.merge_and_unload(BASE_NAME)

    def batch(self, names: Sequence[str], *, refillable: bool = False) -> Batch:
        """The models of a batch, once for many calls, and as tensors on the model's device: ``torch.compile`` does not
        guard on names, and no call copies anything.

        refillable: ``batch.fill(names)`` gives its rows to other models, in place, as a captured CUDA graph needs it;
        layers that run once for each model refuse such a batch. Raises ``UnknownModelError``, and ``ValueError`` for no
        names or a bare string.
        """
        device = next((value.device for value in self.base_model.parameters()), torch.device("cpu"))
        return self.router.of(names).to(device, refillable)

    def using(self, names: Sequence[str] | Batch) -> AbstractContextManager[None]:
        """Answer as these models inside the ``with``: one name a row, or one for all rows.

        For calls that take no ``adapter_names``, and for backward passes that run the forward again (activation
        checkpointing). It holds for the thread that enters it. Inside a coroutine or a generator it holds for that one
        alone; others that run while it awaits or has yielded have scopes of their own. docs/guarantees.md says which
        threads and tasks that are started inside have the scope, and which need ``adapter_names``.
        """
        return self.router.using(self.router.of(names))

    def disable_adapter(self) -> AbstractContextManager[None]:
        """Answer as the base inside the ``with``; see ``using``."""
        return self.using([BASE_NAME])

    @torch.no_grad()
    def warm_up(self, rows: Sequence[int] | None = None) -> None:
        """Run every kind of superposed layer once with each kernel that it may need, for one model and for a mix.

        A GPU kernel is compiled at its first use, which takes about a second. A server calls this first, so that no
        request waits for it and nothing is compiled while a CUDA graph is captured. rows: numbers of rows to run with;
        by default, on a GPU, one for every path, tile and split that up to 8192 rows use. Raises ``ValueError``
        for a number below 1.
        """
        if rows is not None and any(count < 1 for count in rows):
            raise ValueError(f"rows must be numbers of at least 1, got {list(rows)}")
        run_each_kind(self, self.router, self._served.room.numbers, rows)

    def forward(self, *args: Any, adapter_names: Sequence[str] | Batch | None = None, **kwargs: Any) -> Any:
        """The base model's forward. ``adapter_names``: one name a row of the batch, ``"__base__"`` for the base, or
        what ``batch`` made of them. The batch is the first dimension of the first tensor.

        Raises ``UnknownModelError``, ``ValueError`` for a wrong number of names, and ``RuntimeError`` where no
        model was chosen at all.
        """
        if adapter_names is None:
            with self.router.during(self.router.current(), whole=True):  # what is chosen for all may change under way
                return self.base_model(*args, **kwargs)
        batch = self.router.of(adapter_names)
        with self.router.during(batch.over(check_rows(batch, first_input(args, kwargs))), whole=True):
            return self.base_model(*args, **kwargs)

    def generate(self, *args: Any, adapter_names: Sequence[str] | Batch | None = None, **kwargs: Any) -> Any:
        """The base model's ``generate`` (Transformers), with a model for each row: a row's beams and returned sequences
        are its model's. Raises as ``forward`` does."""
        with self.generating(adapter_names, args, kwargs):
            base: Any = self.base_model
            return base.generate(*args, **kwargs)

    def generating(
        self, names: Sequence[str] | Batch | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> AbstractContextManager[None]:
        """Answer as these models inside the ``with``, for one call of ``generate`` with these arguments."""
        batch = self.router.current() if names is None else self.router.of(names)
        if batch is None or (names is None and not batch.mixed):
            return self.router.during(batch, whole=True)
        check_rows(batch, first_input((*args, kwargs.get("inputs")), kwargs))
        return self.router.during(replace(batch, spreads=sequences_of(self.base_model, kwargs)), whole=True)

    def save_pretrained(self, path: str | os.PathLike[str], *, shard_size: int | str | None = None) -> None:
        """Write the superposition as it is now to a store, models that are not served included, with the base's
        configuration and tokenizer if it has any. shard_size: as for ``Superposition.save``."""
        with self.router.changing:
            self.superposition.save(path, shard_size=shard_size)

    def __getattr__(self, name: str) -> Any:
        """Every other attribute of the base model: its configuration, device, and what pipelines ask for. A call of one
        of its methods is answered as the models that are chosen when it begins."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
        return of_one_choice(getattr(self.base_model, name), self.base_model, self.router)
