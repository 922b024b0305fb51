"""``SuperposedModel``: a whole model whose rows may belong to different fine-tunes."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from randes.checkpoint import digest
from randes.errors import BaseMismatchError
from randes.kept import KeptTable, route_layer
from randes.linear import DeltaPool, SuperposedLinear, check_is_base, tensor_of
from randes.routing import Batch, Router
from randes.superposition import BASE_NAME, Superposition
from randes_kernels.tiles import device_name, rows_of_plans


class SuperposedModel(nn.Module):
    """A base model that answers as any of a superposition's fine-tunes.

    Its ``nn.Linear`` layers become ``SuperposedLinear``, in place, with the base's own parameters; its other layers
    take each row's own norms, biases and heads where those are kept per model. It serves the models that the
    superposition holds now; make a new one after adding more.

    Where deltas are centred on their mean, ``base_module`` holds the base that was compressed, in its dtype, or the
    stored one. The superposed layers' weights become that mean, and ``"__base__"`` is answered by one of the superposed
    models.

    Raises ``BaseMismatchError`` where ``base_module`` does not hold the superposition's base (cast to its own
    dtype), and ``ValueError`` where a superposed tensor is not the weight of a linear layer that is called.
    """

    def __init__(self, base_module: nn.Module, superposition: Superposition) -> None:
        super().__init__()
        _check_base(base_module, superposition)
        layers = _superposed_layers(base_module, superposition)
        pools = _pools(layers, superposition)
        tables = _kept_tables(base_module, layers, superposition)
        # Nothing fails from here on: the model is changed whole or not at all.
        self.router = Router(superposition.served)
        self.base_model = base_module
        if superposition.config.centre:
            _take_centre(layers, superposition)
        for name, linear in layers.items():
            SuperposedLinear.take_over(linear, superposition, name, self.router, pools[name])
        for name, own in tables.items():
            route_layer(base_module.get_submodule(name), own, self.router)

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
        kinds: dict[tuple[object, ...], SuperposedLinear] = {}
        for layer in self.modules():
            if isinstance(layer, SuperposedLinear):
                modes = layer.bias is None, layer.biases is None, not layer.pool.slots
                kinds.setdefault((layer.weight.shape, layer.weight.dtype, layer.weight.device, *modes), layer)
        first, names = self.names[:1] or [BASE_NAME], [*self.names, BASE_NAME]
        for layer in kinds.values():
            for count in self._rows_of_plans(layer) if rows is None else rows:
                x = layer.weight.new_zeros(count, layer.in_features)
                for mix in (first, [names[row % len(names)] for row in range(count)]):
                    layer(x, adapter_names=mix)

    def _rows_of_plans(self, layer: SuperposedLinear) -> list[int]:
        weight = layer.weight
        if weight.device.type == "cpu":
            return [1]  # nothing is compiled there
        turned = layer.transform.granule > 0 or not layer.pool.slots
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
        inputs = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.dim())
        first = next(inputs, None)
        if first is None or batch.rows != first.shape[0]:
            rows = 0 if first is None else first.shape[0]
            raise ValueError(f"adapter_names must have one name a row of the batch, {rows}, got {batch.rows}")
        with self.router.during(batch.over(first)):
            return self.base_model(*args, **kwargs)


def _check_base(module: nn.Module, superposition: Superposition) -> None:
    superposition.check_base()
    own = dict(module.state_dict())
    if own.keys() != superposition.base.keys():
        odd = sorted(own.keys() ^ superposition.base.keys())
        raise BaseMismatchError(
            f"the model must have the base's tensors; {len(odd)} are in one alone, {odd[0]} the first"
        )
    added = superposition.members.get(BASE_NAME)
    for name, value in own.items():
        if added is not None and digest(value) == added.digests[name]:
            continue  # as it was before deltas were centred on their mean
        check_is_base(superposition, name, value)


def _take_centre(layers: dict[str, nn.Linear], superposition: Superposition) -> None:
    """The mean of the fine-tunes in place of the base: what deltas are measured from.

    As parameters of their own: the base's tensors may be tied to others that are not superposed, and are the caller's.
    """
    for name, layer in layers.items():
        centre = superposition.base[tensor_of(name, "weight")].to(layer.weight)
        layer.weight = nn.Parameter(centre.clone(), requires_grad=layer.weight.requires_grad)


def _superposed_layers(module: nn.Module, superposition: Superposition) -> dict[str, nn.Linear]:
    """The linear layers whose weights are superposed, by name: all of them, or an error."""
    modules = dict(module.named_modules())
    for name, layer in modules.items():
        # These read the weights of the layers inside them without calling those.
        if isinstance(layer, nn.MultiheadAttention | nn.TransformerEncoderLayer):
            raise ValueError(
                f"{name or 'the model'} must call its linear layers; a {type(layer).__name__} reads their weights"
                " instead, and would silently answer as the base"
            )
    layers = {}
    for tensor in superposition.superposed:
        name = tensor.rpartition(".")[0]
        layer = modules.get(name)
        if layer is not None and "forward" in vars(layer):
            raise ValueError(f"{name}.forward was replaced on the layer itself, and would silently answer as the base")
        if isinstance(layer, SuperposedLinear):
            raise ValueError("base_module is served by a superposition already; give each its own copy of the base")
        if type(layer) is not nn.Linear or tensor.rpartition(".")[2] != "weight":
            raise ValueError(
                f"{tensor} is superposed, but belongs to a {type(layer).__name__}, not an nn.Linear;"
                " exclude it when the superposition is created"
            )
        layers[name] = layer
    return layers


def _pools(layers: dict[str, nn.Linear], superposition: Superposition) -> dict[str, DeltaPool]:
    """The superpositions that each layer reads; layers that are shuffled share one."""
    by_family: dict[str, DeltaPool] = {}
    pools = {}
    for name, linear in layers.items():
        tensor = tensor_of(name, "weight")
        first = superposition.family(tensor)[0]
        if first not in by_family:
            by_family[first] = DeltaPool(superposition, tensor, linear.weight.dtype).to(linear.weight.device)
        pools[name] = by_family[first]
    return pools


def _kept_tables(
    module: nn.Module, layers: dict[str, nn.Linear], superposition: Superposition
) -> dict[str, dict[str, KeptTable]]:
    """Of every layer that is not superposed its models' own tensors. Raises ``ValueError`` for a shared layer."""
    tables: dict[str, dict[str, KeptTable]] = {}
    for tensor in superposition.others:
        owner, _, name = tensor.rpartition(".")
        if owner not in layers:
            layer = module.get_submodule(owner)
            tables.setdefault(owner, {})[name] = KeptTable(superposition, tensor, getattr(layer, name))
    owners = [module.get_submodule(owner) for owner in tables]
    for owner, layer in zip(tables, owners, strict=True):
        if sum(other is layer for other in owners) > 1:
            raise ValueError(f"{owner} is shared under several names, and cannot have tensors kept for each model")
        if "forward" in vars(layer):
            raise ValueError(f"{owner}.forward was replaced on the layer itself, and would silently answer as the base")
    return tables
