"""What the parameters of a layer that serves many models are to whoever reads them.

Such a layer has no one weight. The base's parameter moves to ``base_weight``, where it is trained, cast, saved and
loaded as any other. ``weight`` stays as a property, by which nobody gets the base's for a row of another model: it is
the batch's one model's own, where that is kept, or a ``ServedWeight``, which is no tensor.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from randes.checkpoints.modules.parameters import DESCRIBED, PREFIX, base_of
from randes.errors import WeightReadError
from randes.serving.routing import Router

_FIELDS = "_layer", "_name", "_router", "_refusal"
_DESCRIBING = {torch.is_floating_point, torch.is_complex, torch.numel}


class ServedWeight:
    """In the place of a weight that is another for each model.

    Its shape, dtype and device can be asked for. ``F.linear`` with it is each row's own model's product, where the
    layer has one. All else is answered where every row of the batch is the base's, and raises ``WeightReadError``
    otherwise: with whose values to compute is not known.
    """

    _layer: nn.Module
    _name: str
    _router: Router
    _refusal: str

    def __init__(self, layer: nn.Module, name: str, router: Router, refusal: str) -> None:
        """layer: whose parameter ``name`` this is. refusal: what the error says."""
        for field, value in zip(_FIELDS, (layer, name, router, refusal), strict=True):
            object.__setattr__(self, field, value)

    def __setattr__(self, name: str, value: Any) -> None:
        raise WeightReadError(
            f"{self._name} of a {type(self._layer).__name__} is another for each model, so that its {name} cannot be"
            f" set; the base's parameter is {PREFIX}{self._name}"
        )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or not hasattr(Tensor, name):
            raise AttributeError(f"a {type(self).__name__} has no {name}")
        base = base_of(self._layer, self._name)
        return getattr(base if name in DESCRIBED else self._read(), name)

    def __len__(self) -> int:
        return len(base_of(self._layer, self._name))

    def __repr__(self) -> str:
        base = base_of(self._layer, self._name)
        return f"{type(self).__name__}({self._name}, {tuple(base.shape)}, {base.dtype}, {base.device})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _DESCRIBING:
            return func(*(base_of(arg._layer, arg._name) if isinstance(arg, cls) else arg for arg in args), **kwargs)
        if func is F.linear:
            product = _product(*args, **kwargs)
            if product is not None:
                return product
        return func(*map(_values, args), **{name: _values(value) for name, value in kwargs.items()})

    def _read(self) -> Tensor:
        """The base's values, for a batch of nothing else. Raises ``WeightReadError``."""
        batch = self._router.current()
        if batch is None or not batch.runs_base:
            raise WeightReadError(self._refusal)
        return base_of(self._layer, self._name)


def _product(input: Any, weight: Any, bias: Any = None) -> Tensor | None:
    """``F.linear`` by the layer that the weight is of; None where it has no such product."""
    if not isinstance(weight, ServedWeight) or isinstance(input, ServedWeight):
        return None
    layer: Any = weight._layer
    y: Tensor | None = None
    if isinstance(bias, ServedWeight):
        if isinstance(layer, nn.Linear) and (bias._layer, bias._name, weight._name) == (layer, "bias", "weight"):
            y = layer.forward(input)  # the layer itself, as if it had been called
    elif hasattr(layer, "product_with"):
        y = layer.product_with(input, weight._name, bias)
    return y


def _values(value: Any) -> Any:
    """An operator's argument with what can be read in the place of weights, also of those in lists."""
    if isinstance(value, ServedWeight):
        return value._read()
    return type(value)(map(_values, value)) if type(value) in (list, tuple) else value


def _operator(name: str) -> Any:
    """``w @ x`` and the like, which Python looks up on the class."""

    def operate(self: ServedWeight, *args: Any) -> Any:
        return getattr(self._read(), name)(*map(_values, args))

    return operate


_OPERATORS = (
    "add radd sub rsub mul rmul truediv rtruediv floordiv rfloordiv mod rmod pow rpow matmul rmatmul neg pos abs invert"
    " and or xor eq ne lt le gt ge iadd isub imul itruediv getitem setitem iter array bool float int"
)
for _name in _OPERATORS.split():
    setattr(ServedWeight, f"__{_name}__", _operator(f"__{_name}__"))
