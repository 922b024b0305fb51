"""Layers without tensors of their own that models differ in, around some that have."""

from collections.abc import Iterator

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from randes.serving.layers.per_model import Routed
from randes.serving.layers.per_row import (
    RoutedBias,
    RoutedByModel,
    RoutedParametrization,
    RoutedRecurrent,
    route_layer,
)
from randes.serving.routing import Router

_READING_INSIDE: dict[type[nn.Module], type[Routed]] = {
    ParametrizationList: RoutedParametrization,
    nn.MultiheadAttention: RoutedByModel,
    nn.RNNBase: RoutedRecurrent,  # whose parametrizations are routed
}
"""What reads the tensors of layers inside it, and leaves or hands on what it makes of them."""


def route_containers(module: nn.Module, router: Router) -> None:
    """What is around layers that do not get the batch: attention's relative positions, experts that are layers of their
    own and get the tokens that chose them, attention that reads weights without calling layers. It runs once for each
    model of a mixed batch."""
    for layer in _with(module, "experts", nn.ModuleList, nn.ModuleDict):
        if not isinstance(layer, Routed):
            route_layer(layer, {}, router, RoutedByModel)
    for kind, routing in _READING_INSIDE.items():
        for layer in list(module.modules()):
            inside = isinstance(layer, kind) and any(isinstance(part, Routed) for part in layer.modules())
            if inside and not isinstance(layer, Routed):
                route_layer(layer, {}, router, routing)
    for layer in _with(module, "relative_attention_bias", nn.Embedding):
        if hasattr(layer, "compute_bias") and not isinstance(layer, Routed):
            route_layer(layer, {}, router, RoutedBias)


def _with(module: nn.Module, name: str, *kinds: type[nn.Module]) -> Iterator[nn.Module]:
    for parent in list(module.modules()):
        if isinstance(getattr(parent, name, None), kinds):
            yield parent
