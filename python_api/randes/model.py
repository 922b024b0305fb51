"""``SuperposedModel``: a whole model whose rows may belong to different fine-tunes."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from randes.errors import BaseMismatchError
from randes.kept import KeptTable, route_layer
from randes.linear import DeltaPool, SuperposedLinear
from randes.routing import Batch, Router
from randes.superposition import BASE_NAME, Superposition


class SuperposedModel(nn.Module):
    """A base model that answers as any of a superposition's fine-tunes.

    Its ``nn.Linear`` layers become ``SuperposedLinear``, in place, with the base's own parameters; its other layers
    take each row's own norms, biases and heads where those are kept per model. It serves the models that the
    superposition holds now; make a new one after adding more.

    Raises ``BaseMismatchError`` where ``base_module`` does not hold the superposition's base (cast to its own
    dtype), and ``ValueError`` where a superposed tensor is not the weight of a linear layer that is called.
    """

    def __init__(self, base_module: nn.Module, superposition: Superposition) -> None:
        super().__init__()
        _check_base(base_module, superposition)
        layers = _superposed_layers(base_module, superposition)
        self.router = Router(superposition.names)
        self.base_model = base_module
        _superpose_layers(layers, superposition, self.router)
        _route_others(base_module, superposition, self.router)

    @property
    def names(self) -> list[str]:
        """The models that can be asked for."""
        return list(self.router.names)

    def set_adapter(self, name: str) -> None:
        """Answer every row as this model (or ``"__base__"``) where a call does not say otherwise. All threads."""
        self.router.chosen = self.router.of([name])

    def batch(self, names: Sequence[str]) -> Batch:
        """The models of a batch, once for many calls, and as tensors: ``torch.compile`` does not guard on names."""
        return self.router.of(names)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Answer as the base inside the ``with``, in this thread."""
        with self.router.during(self.router.of([BASE_NAME])):
            yield

    def forward(self, *args: Any, adapter_names: Sequence[str] | Batch | None = None, **kwargs: Any) -> Any:
        """The base model's forward. ``adapter_names``: one name a row of the batch, ``"__base__"`` for the base, or
        what ``batch`` made of them. The batch is the first dimension of the first tensor.

        Raises ``UnknownModelError``, ``ValueError`` for a wrong number of names, and ``RuntimeError`` where no
        model was chosen at all.
        """
        if adapter_names is None:
            return self.base_model(*args, **kwargs)
        batch = self.router.of(adapter_names)
        rows = next(
            (value.shape[0] for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.dim()), 0
        )
        if batch.rows != rows:
            raise ValueError(f"adapter_names must have one name a row of the batch, {rows}, got {batch.rows}")
        with self.router.during(batch):
            return self.base_model(*args, **kwargs)


def _check_base(module: nn.Module, superposition: Superposition) -> None:
    superposition.check_base()
    own = dict(module.state_dict())
    if own.keys() != superposition.base.keys():
        odd = sorted(own.keys() ^ superposition.base.keys())
        raise BaseMismatchError(
            f"the model must have the base's tensors; {len(odd)} are in one alone, {odd[0]} the first"
        )
    for name, base in superposition.base.items():
        value = own[name].detach().cpu()
        if value.shape != base.shape or not torch.equal(value, base.to(value.dtype)):
            raise BaseMismatchError(f"the model is not the superposition's base: {name} differs")


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
        if isinstance(layer, SuperposedLinear):
            raise ValueError("base_module is served by a superposition already; give each its own copy of the base")
        if type(layer) is not nn.Linear or tensor.rpartition(".")[2] != "weight":
            raise ValueError(
                f"{tensor} is superposed, but belongs to a {type(layer).__name__}, not an nn.Linear;"
                " exclude it when the superposition is created"
            )
        layers[name] = layer
    return layers


def _superpose_layers(layers: dict[str, nn.Linear], superposition: Superposition, router: Router) -> None:
    pools: dict[str, DeltaPool] = {}
    for name, linear in layers.items():
        tensor = f"{name}.weight" if name else "weight"
        first = superposition.family(tensor)[0]  # layers that are shuffled share one pool
        if first not in pools:
            pools[first] = DeltaPool(superposition, tensor, linear.weight.dtype).to(linear.weight.device)
        SuperposedLinear.take_over(linear, superposition, name, router, pools[first])


def _route_others(module: nn.Module, superposition: Superposition, router: Router) -> None:
    """Give every layer that is not superposed its models' own tensors."""
    tables: dict[str, dict[str, KeptTable]] = {}
    for tensor in superposition.others:
        owner, _, name = tensor.rpartition(".")
        layer = module.get_submodule(owner)
        if not isinstance(layer, SuperposedLinear):
            tables.setdefault(owner, {})[name] = KeptTable(superposition, tensor, getattr(layer, name))
    for owner, own in tables.items():
        route_layer(module.get_submodule(owner), own, router)
