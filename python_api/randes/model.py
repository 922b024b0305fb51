"""``SuperposedModel``: a whole model whose rows may belong to different fine-tunes."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from randes import store
from randes.errors import StoreError
from randes.inside import Layer, check_layers, follow_calls, layers_of, route_containers, take_centre, take_over
from randes.kept import KeptTable
from randes.layer_kinds import SuperposedLayer
from randes.linear import DeltaPool, Superposed, SuperposedLinear
from randes.routing import Batch, Router, first_input
from randes.superposition import BASE_NAME, Superposition
from randes_kernels.tiles import device_name, rows_of_plans


class SuperposedModel(nn.Module):
    """A base model that answers as any of a superposition's fine-tunes.

    Its ``nn.Linear`` layers become ``SuperposedLinear``, in place, with the base's own parameters, and other layers
    with superposed weights what serves them (``layer_kinds.py``); the rest take each row's own norms, biases and heads
    where those are kept per model. It serves the models that the
    superposition holds now; make a new one after adding more.

    Where deltas are centred on their mean, ``base_module`` holds the base that was compressed, in its dtype, or the
    stored one. The superposed layers' weights become that mean, and ``"__base__"`` is answered by one of the superposed
    models. Where the fine-tuned weights themselves are superposed (``origin="zero"``), the superposed layers' weights
    become zeros, whatever they were, and ``"__base__"`` is a name like any other that nobody added.

    Raises ``BaseMismatchError`` where ``base_module`` does not hold the superposition's base (cast to its own
    dtype), and ``ValueError`` where a superposed tensor belongs to a layer of no known kind, or one that is not called.
    """

    def __init__(self, base_module: nn.Module, superposition: Superposition) -> None:
        super().__init__()
        layers = layers_of(base_module, superposition)
        check_layers(base_module, layers, superposition)
        pools = _pools(layers, superposition)
        tables = _kept_tables(layers, superposition)
        # Nothing fails from here on: the model is changed whole or not at all.
        self.router = Router(superposition.served, superposition.has_base)
        self.base_model = base_module
        if superposition.config.centre or not superposition.has_base:
            take_centre(layers, superposition)
        for layer in layers:
            take_over(layer, superposition, self.router, pools, tables)
        route_containers(base_module, self.router)
        follow_calls(base_module, self.router)
        self._store = superposition.stored

    @property
    def names(self) -> list[str]:
        """The models that can be asked for."""
        return [name for name in self.router.names if name != BASE_NAME]

    def set_adapter(self, name: str) -> None:
        """Answer every row as this model (or ``"__base__"``) where a call does not say otherwise. All threads."""
        self.router.chosen = self.router.of([name])

    def batch(self, names: Sequence[str]) -> Batch:
        """The models of a batch, once for many calls, and as tensors: ``torch.compile`` does not guard on names."""
        return self.router.of(names)

    @contextmanager
    def using(self, names: Sequence[str] | Batch) -> Iterator[None]:
        """Answer as these models inside the ``with``: one name a row, or one for all rows.

        For calls that take no ``adapter_names``, and for backward passes that run the forward again (activation
        checkpointing). It holds for this thread alone; do not ``await`` inside.
        """
        with self.router.during(self.router.of(names)):
            yield

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Answer as the base inside the ``with``; see ``using``."""
        with self.using([BASE_NAME]):
            yield

    @torch.no_grad()
    def warm_up(self, rows: Sequence[int] | None = None) -> None:
        """Run every kind of superposed layer once for each kernel that it may need, for one model and for a mix.

        A GPU kernel is compiled at its first use, in about a second; a server calls this first, so that no request
        waits for it. rows: how many rows to run with; by default, on a GPU, a number for every path, tile and split
        that up to 8192 rows choose. Raises ``ValueError`` for a number below 1.
        """
        if rows is not None and any(count < 1 for count in rows):
            raise ValueError(f"rows must be numbers of at least 1, got {list(rows)}")
        kinds: dict[tuple[object, ...], tuple[Superposed, Tensor]] = {}
        for layer in self.modules():
            for own, weight in _products(layer):
                modes: list[bool] = [not own.pool.slots, weight.stride(1) == 1]
                if isinstance(own, SuperposedLinear):
                    modes += [own.bias is None, own.biases is None]
                kinds.setdefault((weight.shape, weight.dtype, weight.device, *modes), (own, weight))
        names = [*self.names, *([BASE_NAME] if self.router.has_base else [])]
        first = names[:1]
        for own, weight in kinds.values():
            for count in self._rows_of_plans(own, weight) if rows is None else rows:
                x = weight.new_zeros(count, weight.shape[1])
                for mix in (first, [names[row % len(names)] for row in range(count)]):
                    if isinstance(own, SuperposedLinear):
                        own(x, adapter_names=mix)
                    else:
                        own(x, weight, self.router.of(mix).on(x.device))

    def _rows_of_plans(self, layer: Superposed, weight: Tensor) -> list[int]:
        if weight.device.type == "cpu":
            return [1]  # nothing is compiled there
        turned = layer.transform.granule > 0 or layer.transform.matrix > 0 or not layer.pool.slots
        n, k = weight.shape
        bits = 16 if layer.pool.packing is None else layer.pool.packing[0]
        return rows_of_plans(
            n, k, weight.dtype, models=len(self.router.names), turned=turned, bits=bits,
            device=device_name(weight.device.index or 0),
        )  # fmt: skip

    def forward(self, *args: Any, adapter_names: Sequence[str] | Batch | None = None, **kwargs: Any) -> Any:
        """The base model's forward. ``adapter_names``: one name a row of the batch, ``"__base__"`` for the base, or
        what ``batch`` made of them. The batch is the first dimension of the first tensor.

        Raises ``UnknownModelError``, ``ValueError`` for a wrong number of names, and ``RuntimeError`` where no
        model was chosen at all.
        """
        if adapter_names is None:
            return self.base_model(*args, **kwargs)
        batch = self.router.of(adapter_names)
        with self.router.during(batch.over(_check_rows(batch, first_input(args, kwargs)))):
            return self.base_model(*args, **kwargs)

    def generate(self, *args: Any, adapter_names: Sequence[str] | Batch | None = None, **kwargs: Any) -> Any:
        """The base model's ``generate`` (Transformers), with a model for each row: a row's beams and returned sequences
        are its model's. Raises as ``forward`` does."""
        with self.generating(adapter_names, args, kwargs):
            base: Any = self.base_model
            return base.generate(*args, **kwargs)

    @contextmanager
    def generating(
        self, names: Sequence[str] | Batch | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Iterator[None]:
        """Answer as these models inside the ``with``, for one call of ``generate`` with these arguments."""
        batch = self.router.current() if names is None else self.router.of(names)
        if batch is None or (names is None and not batch.mixed):
            yield
            return
        _check_rows(batch, first_input((*args, kwargs.get("inputs")), kwargs))
        with self.router.during(replace(batch, spreads=True)):
            yield

    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        """Write the store that this model was made of to a new folder, with its configuration and tokenizer.

        Raises ``StoreError`` where its superposition was in no store when the model was made: save that itself then.
        """
        if not isinstance(self._store, store.Stored):
            raise StoreError("the model's superposition was in no store: save it with Superposition.save(path)")
        store.load(self._store.folder).save(path)

    def __getattr__(self, name: str) -> Any:
        """Whatever else the base model has: its configuration, device, and what pipelines ask for."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
        return getattr(self.base_model, name)


def _products(layer: nn.Module) -> Iterator[tuple[Superposed, Tensor]]:
    """What a layer multiplies with, and the base's weights (N, K) beside."""
    if isinstance(layer, SuperposedLinear):
        yield layer, layer.weight
    elif isinstance(layer, SuperposedLayer):
        yield from layer.products()


def _check_rows(batch: Batch, first: Tensor | None) -> Tensor:
    if first is None or batch.rows != first.shape[0]:
        rows = 0 if first is None else first.shape[0]
        raise ValueError(f"adapter_names must have one name a row of the batch, {rows}, got {batch.rows}")
    return first


def _pools(layers: Sequence[Layer], superposition: Superposition) -> dict[str, DeltaPool]:
    """The superpositions of each matrix; layers that are shuffled or tied share one."""
    by_family: dict[str, DeltaPool] = {}
    pools = {}
    for layer in layers:
        for name, view in layer.views.items():
            weight = getattr(layer.module, name)
            for matrix in view.parts:
                first = superposition.family(matrix)[0]
                if first not in by_family:
                    pool = DeltaPool(superposition, matrix, weight.dtype).to(weight.device)
                    if (
                        view.transposed and pool.packing is None
                    ):  # in one order of memory with the weight, as the kernels like it
                        pool.values = pool.values.mT.contiguous().mT
                    by_family[first] = pool
                pools[matrix] = by_family[first]
    return pools


def _kept_tables(layers: Sequence[Layer], superposition: Superposition) -> dict[str, KeptTable]:
    """Of every tensor that some model has its own of, what each has: one for all layers that are tied."""
    tables: dict[str, KeptTable] = {}
    for layer in layers:
        for name, tensor in layer.kept.items():
            if tensor not in tables:
                tables[tensor] = KeptTable(superposition, tensor, getattr(layer.module, name))
    return tables
