"""Layers that make their weights anew in each call and leave them on themselves, where another thread finds them.

Recurrent layers fill a list; ``weight_norm``, ``spectral_norm`` and ``prune`` of ``torch.nn.utils`` set ``weight`` from
other parameters before the forward. In a layer that serves many models what is so made is one call's: its thread's own,
and read as the model's that it was made for.
"""

import threading
from collections.abc import MutableMapping
from typing import Any
from weakref import WeakKeyDictionary, ref

from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from randes.serving.batch import Batch, Version
from randes.serving.layers.served_weights import ServedWeight


def recomputed_in(layer: nn.Module) -> tuple[str, ...]:
    """The names of a layer's weights that are no parameters, but made of some before each call."""
    hooks = layer._forward_pre_hooks.values()
    names = {hook.name for hook in hooks if isinstance(hook, WeightNorm | SpectralNorm)}
    names |= {hook._tensor_name for hook in hooks if isinstance(hook, BasePruningMethod)}
    return tuple(sorted(names | {name for name in ("weight", "bias") if isinstance(vars(layer).get(name), Tensor)}))


class _Made(threading.local):
    """What this thread's calls made: of each layer by name, and for which model; None for all."""

    def __init__(self) -> None:
        self.of: MutableMapping[nn.Module, dict[str, tuple[Tensor, Any]]] = WeakKeyDictionary()


_MADE = _Made()


def recomputed_property(name: str) -> property:
    """In the place of such a weight."""

    def get(self: Any) -> Tensor | ServedWeight:
        value, model = _MADE.of.get(self, {}).get(name, (None, None))
        if value is not None and (model is None or model() is _version(self._router.current())):
            return value
        return ServedWeight(
            self, name, self._router,
            f"{name} of a {type(self).__name__} is made anew in each call, for its model: call the layer instead",
        )  # fmt: skip

    def put(self: Any, value: Tensor) -> None:
        version = _version(self._router.current())
        _MADE.of.setdefault(self, {})[name] = value, None if version is None else ref(version)

    return property(get, put)


def _version(batch: Batch | None) -> Version | None:
    """A batch's one model. None for several: what was made then, with nothing refused, is the same for all of them."""
    if batch is None or batch.mixed:
        return None
    return next((version for version in batch.named.versions if version.number == batch.number), None)


class _Gone:
    """What nobody refers to but weakly."""


class OwnFlatWeights(nn.Module):
    """Mixed into a recurrent layer: the list of its weights is made whenever it is read, for whoever reads it."""

    _flat_weights_names: list[str]

    @property
    def _flat_weights(self) -> list[Any]:
        return [getattr(self, name, None) for name in self._flat_weights_names]

    @_flat_weights.setter
    def _flat_weights(self, _: Any) -> None:
        self._init_flat_weights()

    def _init_flat_weights(self) -> None:
        # For when the layer is a plain one again: it finds that its weights have changed, and fills its list.
        names = self._flat_weights_names
        vars(self)["_flat_weights"] = [None] * len(names)
        vars(self)["_flat_weight_refs"] = [ref(_Gone())] * len(names)

    def _update_flat_weights(self) -> None:
        """Nothing is to be kept up to date."""

    def flatten_parameters(self) -> None:
        """Nor moved together: rows of tables stay where they are."""
