"""The names of a module's parameters, and how some of them move aside for properties that stand for them.

A layer that serves many models has no one weight: the base's parameter moves to ``base_weight``, where it is trained,
cast, saved and loaded as any other, and ``weight`` becomes a property of the layer's class.
"""

from typing import Any

from torch import Tensor, nn

PREFIX = "base_"
"""Before a parameter's or buffer's name in a layer where models may have their own."""

DESCRIBED = frozenset((
    "shape", "dtype", "device", "ndim", "layout", "is_cuda", "is_cpu", "is_meta", "is_sparse", "is_quantized",
    "requires_grad", "size", "dim", "numel", "nelement", "stride", "element_size", "nbytes", "itemsize",
    "is_floating_point", "is_complex", "is_contiguous", "is_nested", "is_inference", "storage_offset",
))  # fmt: skip
"""What is the same for all models' weights, and may be asked for."""


def is_transformers(module: nn.Module) -> bool:
    """Whether a module is a model of Transformers; without importing that."""
    return all(hasattr(module, name) for name in ("config", "get_input_embeddings", "main_input_name"))


def base_of(layer: nn.Module, name: str) -> Tensor:
    """A layer's own parameter or buffer, the base's, whether it has moved or not; or what it last made of others."""
    for held in (layer._parameters, layer._buffers):
        for place in (PREFIX + name, name):
            if (value := held.get(place)) is not None:
                return value
    made: Any = vars(layer).get(name)
    if isinstance(made, Tensor):
        return made
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
