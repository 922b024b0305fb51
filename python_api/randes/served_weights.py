"""What the parameters of a layer that serves many models are to whoever reads them.

Such a layer has no one weight. The base's parameter moves to ``base_weight``, where it is trained, cast, saved and
loaded as any other. ``weight`` stays as a property, by which nobody gets the base's for a row of another model: it is
the batch's one model's own, where that is kept, or a ``ServedWeight``, which is no tensor.
"""

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from randes.errors import WeightReadError

if TYPE_CHECKING:
    from randes.routing import Router

PREFIX = "base_"
"""Before a parameter's or buffer's name in a layer where models may have their own."""

DESCRIBED = frozenset((
    "shape", "dtype", "device", "ndim", "layout", "is_cuda", "is_cpu", "is_meta", "is_sparse", "is_quantized",
    "requires_grad", "size", "dim", "numel", "nelement", "stride", "element_size", "nbytes", "itemsize",
    "is_floating_point", "is_complex", "is_contiguous", "is_nested", "is_inference", "storage_offset",
))  # fmt: skip
"""What is the same for all models' weights, and may be asked for."""

_DESCRIBING = {torch.is_floating_point, torch.is_complex, torch.numel}


class ServedWeight:
    """In the place of a weight that is another for each model.

    Its shape, dtype and device can be asked for. ``F.linear`` with it is each row's own model's product, where the
    layer has one. All else is answered where every row of the batch is the base's, and raises ``WeightReadError``
    otherwise: with whose values to compute is not known.
    """

    def __init__(self, layer: nn.Module, name: str, router: "Router", refusal: str) -> None:
        """layer: whose parameter ``name`` this is. refusal: what the error says."""
        self._layer, self._name, self._router, self._refusal = layer, name, router, refusal

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
    " and or xor lt le gt ge iadd isub imul itruediv getitem setitem iter array bool float int"
)
for _name in _OPERATORS.split():
    setattr(ServedWeight, f"__{_name}__", _operator(f"__{_name}__"))


def base_of(layer: nn.Module, name: str) -> Tensor:
    """A layer's own parameter or buffer, the base's, whether it has moved or not."""
    for held in (layer._parameters, layer._buffers):
        for place in (PREFIX + name, name):
            if (value := held.get(place)) is not None:
                return value
    raise AttributeError(f"a {type(layer).__name__} has no parameter {name}")


def has(layer: nn.Module, name: str) -> bool:
    """Whether a layer has a parameter or buffer of that name that is not None."""
    held = {**layer._parameters, **layer._buffers}
    return held.get(PREFIX + name, held.get(name)) is not None


def move(layer: nn.Module, names: frozenset[str], kind: type[nn.Module]) -> None:
    """Make ``layer`` a ``kind``, whose properties stand for ``names``, and move what it has there to ``base_…``.

    Another thread may be calling the layer meanwhile: it finds the old class with the old names or the new with the
    new. Raises ``ValueError`` where something of such a name is there already.
    """
    if taken := [PREFIX + name for name in names if hasattr(layer, PREFIX + name)]:
        raise ValueError(f"a {type(layer).__name__} must have nothing called {taken[0]}, which the base's is to be")
    fields: dict[str, Any] = vars(layer)
    for field in ("_parameters", "_buffers"):
        moved = {PREFIX + name: value for name, value in fields[field].items() if name in names}
        fields[field] = {**fields[field], **moved}
    fields["_non_persistent_buffers_set"] |= {PREFIX + name for name in names & layer._non_persistent_buffers_set}
    layer.__class__ = kind
    for field in ("_parameters", "_buffers"):
        fields[field] = {_moved(name, names): value for name, value in fields[field].items()}


def move_back(layer: nn.Module, names: frozenset[str]) -> None:
    """What ``move`` moved, under its own names again; the class stays."""
    fields: dict[str, Any] = vars(layer)
    back = {PREFIX + name: name for name in names}
    for field in ("_parameters", "_buffers"):
        fields[field] = {back.get(name, name): value for name, value in fields[field].items()}
    layer._non_persistent_buffers_set -= back.keys()


def _moved(name: str, names: frozenset[str]) -> str:
    return PREFIX + name if name in names else name


def moved_in(layer: nn.Module) -> frozenset[str]:
    """The names in a layer that are properties now."""
    return getattr(type(layer), "moved", frozenset())


def plain_state(module: nn.Module) -> dict[str, Tensor]:
    """A module's state dict by the names that it has when nothing is superposed in it; the tensors themselves."""
    own: dict[str, Tensor] = module.state_dict(keep_vars=True)
    plain = {}
    for name, value in own.items():
        path, dot, last = name.rpartition(".")
        moved = moved_in(module.get_submodule(path))
        kept = last.removeprefix(PREFIX)
        plain[path + dot + (kept if kept != last and kept in moved else last)] = value
    return plain
