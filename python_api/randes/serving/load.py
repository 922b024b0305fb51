"""A store, opened for serving in one call: the base's weights come from it, too."""

import os

import torch
from torch import Tensor, nn

from randes.checkpoints.huggingface import CONFIG
from randes.checkpoints.lazy_tensors import headers
from randes.checkpoints.modules.parameters import plain_state
from randes.errors import BaseMismatchError
from randes.serving.base_layers import base_names
from randes.serving.layers.per_model import Routed
from randes.serving.layers.superposed import Superposed
from randes.serving.model import SuperposedModel
from randes.superposition.superposition import Superposition


def load(
    store: str | os.PathLike[str] | Superposition, module: nn.Module | None = None, *, capacity: int | None = None
) -> SuperposedModel:
    """Serve a store in a new process: ``randes.load("store", Net())``.

    store: the store's folder, or a superposition at hand.
    module: a model of the base's class, with any weights, also on "meta". The base's weights are loaded into it from
        the store, in the module's dtypes and on its devices (from "meta" to the CPU), and it is served in place. Leave
        it out if the base was a Transformers model: ``randes.from_pretrained`` then makes it.
    capacity: the number of models to reserve room for (``SuperposedModel``).

    Raises ``StoreError`` for a folder that is no store, ``BaseMismatchError`` for a module whose names or shapes are
    not the base's, ``ValueError`` without a module where one is needed, and what ``SuperposedModel`` raises.
    """
    superposition = store if isinstance(store, Superposition) else Superposition.load(store)
    if module is None:
        if CONFIG not in superposition.model_files or isinstance(store, Superposition):
            raise ValueError(
                "module must be given, a model of the base's class: randes.load(store, Net()); the store does not say"
                " what class that is"
            )
        return SuperposedModel.from_pretrained(store, superposition, capacity=capacity)
    if not isinstance(module, nn.Module):
        raise ValueError(f"module must be an nn.Module, got {type(module).__name__}")
    fill(module, superposition)
    return SuperposedModel(module, superposition, capacity=capacity)


def fill(module: nn.Module, superposition: Superposition) -> None:
    """Load the base's weights into a module of its class. Nothing is changed by what raises."""
    if any(isinstance(layer, Superposed | Routed) for layer in module.modules()):
        raise ValueError("module is served by a superposition already; give each a model of its own")
    own, names = plain_state(module), base_names(module, superposition)
    held = superposition.layout.joined(superposition.base, ties=False)
    for name, value in own.items():
        shape = tuple(headers(held)[names[name]].shape)
        if tuple(value.shape) != shape:
            raise BaseMismatchError(f"{name} must be {shape} as in the store's base, got {tuple(value.shape)}")
    tensors = [*module.named_parameters(), *module.named_buffers()]
    if unknown := [name for name, value in tensors if value.is_meta and name not in own]:
        raise BaseMismatchError(
            f"{unknown[0]} is on the meta device and in no checkpoint, so no store has its values: make the module on a"
            " device"
        )
    if any(value.is_meta for value in own.values()):
        made = {tensor: _like(own[name], held[tensor]) for name, tensor in names.items()}
        module.load_state_dict({name: made[tensor] for name, tensor in names.items()}, assign=True)
        return
    with torch.no_grad():
        for name, value in own.items():
            value.copy_(held[names[name]])


def _like(own: Tensor, value: Tensor) -> Tensor:
    """A parameter or buffer of its own with the base's values, once for all names that are tied."""
    value = value.to(own.dtype, copy=True)
    return nn.Parameter(value, requires_grad=own.requires_grad) if isinstance(own, nn.Parameter) else value
