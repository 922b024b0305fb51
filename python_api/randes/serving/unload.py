"""The way back: a base module as it was before it was superposed, with the weights of one model."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from randes.checkpoints.modules.parameters import move_back, moved_in, plain_state
from randes.serving.base_layers import base_names
from randes.serving.layers.delta_pool import DeltaPool
from randes.superposition.superposition import Superposition


class Original:
    """A layer as it was before it was taken over."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer, self.kind = layer, type(layer)
        self._names = [set(names) for names in self._held()]

    def _held(self) -> list[Any]:
        layer = self.layer
        return [vars(layer), layer._buffers, layer._modules, layer._non_persistent_buffers_set]

    def is_changed(self) -> bool:
        """Whether it has been taken over since; what was added to it counts from now on, and nothing later does."""
        self._names = [set(names) - before for names, before in zip(self._held(), self._names, strict=True)]
        return type(self.layer) is not self.kind or any(self._names)

    def restore(self) -> None:
        """Make it that again, with the parameters that it has now."""
        moved = moved_in(self.layer)
        self.layer.__class__ = self.kind
        move_back(self.layer, moved)
        for held, added in zip(self._held(), self._names, strict=True):
            for name in added & set(held):
                held.discard(name) if isinstance(held, set) else held.pop(name)


def check_whole(module: nn.Module) -> None:
    """Raise ``ValueError`` where a device holds a part of the model alone."""
    for part in module.modules():
        if isinstance(part, DeltaPool) and part.shard is not None:
            raise ValueError(
                f"a model that is cut into shards cannot become a plain one: {part.tensor} is not whole here; load the"
                " store anew, without cutting it"
            )


def merged_tensors(module: nn.Module, superposition: Superposition, name: str) -> dict[str, Tensor]:
    """A model's retrieved tensors by the module's names, in its dtypes and on its devices; its own where those are.

    Raises ``ValueError`` where it is cut into shards."""
    check_whole(module)
    names = base_names(module, superposition)
    made: dict[int, Tensor] = {}
    own = plain_state(module)
    if name not in superposition.members:  # the base, whose parameters the module never lost
        return own
    values = superposition.retrieved(name)
    for place, held in own.items():
        if id(held) not in made:
            value = values[names[place]].to(held.device, held.dtype)
            if value.shape == held.shape and torch.equal(value, held):
                value = held
            elif isinstance(held, nn.Parameter):
                value = nn.Parameter(value, requires_grad=held.requires_grad)
            made[id(held)] = value
    return {place: made[id(held)] for place, held in own.items()}


def give(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put tensors in the place of a plain module's, by name; those that were tied are one."""
    for place, value in tensors.items():
        path, _, last = place.rpartition(".")
        layer = module.get_submodule(path)
        held: dict[str, Any] = layer._parameters if last in layer._parameters else layer._buffers
        held[last] = value
        if isinstance(layer, nn.Linear) and last == "weight":
            layer.out_features = len(value)  # a head of other classes


class Unloaded(nn.Module):
    """In the place of a base module that was given back."""

    def forward(self, *_: Any, **__: Any) -> None:
        """Raises ``RuntimeError``."""
        raise RuntimeError("this model was unloaded: call the module that merge_and_unload returned")
