"""How a checkpoint's tensors are seen as the matrices that are superposed: the one place that knows.

    (N, K)             itself
    (K, N)             transposed, where a layer multiplies from the right (Transformers' Conv1D)
    (N, C, k, ...)     a convolution's weight, as (N, C · k · ...)
    (E, N, K)          a stack of experts, as E matrices ``name.0`` to ``name.E-1`` with gains and signs of their own;
                       (E, K, N) where the experts multiply from the right
    (N1 + N2, K)       a fused weight, as the matrices that ``Config.fused`` names
    (K,)               a bias or a norm, as (1, K), where ``Config.vectors`` has it superposed

Everything else in randes sees matrices, under these names; checkpoints, modules and the base's file keep the tensors
as they are. A tensor that shares its memory with another (a head tied to an embedding) is that tensor, under the
name that comes first. (Design, section 3: canonical names.)
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from randes.checkpoints.lazy_tensors import LazyTensors, digests, headers
from randes.checkpoints.names.pieces import Rearranged
from randes.checkpoints.on_disk import StoredTensors
from randes.checkpoints.sources import Tensors
from randes.checkpoints.tensor_views import JoinedTensors, SplitTensors, View
from randes.config import Config
from randes.errors import CheckpointError

SUPERPOSABLE = (torch.float32, torch.float16, torch.bfloat16)
ADDED = "@added"
"""Follows a matrix's name, for the rows that a checkpoint has below the base's."""
COORDINATES, DIRECTIONS = "@basis", "@directions"
"""The same in a model's file, for its delta's coordinates in a basis, and for the basis where that is its own."""
STEPS = "@steps"
"""Follows a packed tensor's name in a file, for its steps."""
RESERVED = (ADDED, COORDINATES, DIRECTIONS, STEPS)
"""What no tensor's name may end with."""


@dataclass(frozen=True)
class Layout:
    """Which tensors are seen as which matrices, and which names stand for another's tensor.

    views: by tensor; those that are missing are what they are. ties: for a name its tensor's other, canonical name.
    """

    views: Mapping[str, View] = field(default_factory=dict)
    ties: Mapping[str, str] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.views or self.ties)

    @property
    def vectors(self) -> frozenset[str]:
        """The tensors that are single rows."""
        return frozenset(name for name, view in self.views.items() if view.vector)

    @property
    def parts(self) -> dict[str, str]:
        """Of each matrix the tensor that it is a part of, where that has another name."""
        return {part: tensor for tensor, view in self.views.items() for part in view.parts if part != tensor}

    def with_added(self, counts: Mapping[str, int], base: Tensors) -> "Layout":
        """The layout of a checkpoint that has so many more rows than ``base`` of some matrices: parts of their own."""
        shapes = {name: headers(base)[name].shape for name in counts}
        views = {
            name: View((shape[0] + counts[name], shape[1]), {name: shape[0], f"{name}{ADDED}": counts[name]})
            for name, shape in shapes.items()
        }
        return Layout({**self.views, **views}, self.ties) if views else self

    def split(self, tensors: Tensors) -> Tensors:
        """A checkpoint's tensors as they are superposed or kept: no tied names, and matrices for tensors.

        Lazy ones stay so; where the layout is empty they are the same ones.
        Raises ``CheckpointError`` for a tensor of another shape, and for one that is tied in the base and not here.
        """
        if not self:
            return tensors
        names = self._untied(tensors)
        views = {name: view for name, view in self.views.items() if name in names}  # check_fits says what is missing
        for name, view in views.items():
            shape = tuple(headers(tensors)[names[name]].shape)
            if shape != view.shape:
                raise CheckpointError(f"{name} must be {view.shape} as in the base, got {shape}")
        if isinstance(tensors, LazyTensors):
            return _split(tensors, views, names)
        found = {name: tensors[own] for name, own in names.items()}
        for name, view in views.items():
            found |= view.matrices(found.pop(name))
        return found

    def join(self, tensors: Tensors, *, ties: bool = True) -> dict[str, Tensor]:
        """A checkpoint again: the tensors that ``split`` was given; without ``ties`` each of them once.

        Gradients flow through to the matrices.
        """
        joined = dict(tensors)
        for name, view in self.views.items():
            value = view.tensor(tensors)
            for part in view.parts:
                del joined[part]
            joined[name] = value
        return joined | ({alias: joined[name] for alias, name in self.ties.items()} if ties else {})

    def joined(self, tensors: Tensors, *, ties: bool = True) -> Tensors:
        """The same, each tensor made when it is asked for; what ``split`` was given where that is still at hand."""
        aliases = self.ties if ties else {}
        if not self.views and not aliases:
            return tensors
        if isinstance(tensors, SplitTensors) and isinstance(tensors.source, StoredTensors | Rearranged) and not aliases:
            return tensors.source
        return JoinedTensors(tensors, self.views, aliases)

    def _untied(self, tensors: Tensors) -> dict[str, str]:
        """The names of a checkpoint without tied ones, and of each the name that it has there."""
        names = {name: name for name in tensors}
        for alias, name in self.ties.items():
            if names.pop(alias, None) is None or names.setdefault(name, alias) == alias:
                continue
            if not _same(tensors, names[name], alias):
                raise CheckpointError(
                    f"{alias} is tied to {name} in the base and differs from it in the checkpoint;"
                    " give the base a copy of its own there"
                )
        return names

    def to_dict(self) -> dict[str, Any]:
        """For the manifest: the same for the same tensors in any order. A view's parts have one."""
        views = {name: {**asdict(view), "shape": list(view.shape)} for name, view in sorted(self.views.items())}
        return {"views": views, "ties": dict(sorted(self.ties.items()))}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Layout":
        """From a manifest."""
        views = {
            name: View(tuple(view["shape"]), view["parts"], view["transposed"], view["stacked"])
            for name, view in values["views"].items()
        }
        return cls(views, dict(values["ties"]))


def layout_of(tensors: Tensors, config: Config, module: nn.Module | None = None) -> Layout:
    """The layout of a base. ``module``: what its tensors belong to, where it is known; it may be on "meta".

    Raises ``CheckpointError`` for a fused tensor whose rows ``config.fused`` does not count right.
    """
    ties = tied(tensors)
    if module is not None:
        same = tied_in(module.state_dict(keep_vars=True))
        ties |= {alias: name for alias, name in same.items() if alias in tensors and name in tensors}
    transposed = transposed_in(module) if module is not None else frozenset()
    views = {}
    for name, value in headers(tensors).items():
        if name in ties or value.dtype not in SUPERPOSABLE:
            continue
        turned = name in transposed or any(fnmatchcase(name, pattern) for pattern in config.transposed)
        view = _view(name, tuple(value.shape), turned, config)
        if view is not None:
            views[name] = view
    return Layout(views, ties)


def _view(name: str, shape: tuple[int, ...], transposed: bool, config: Config) -> View | None:
    """How a tensor is seen as matrices; None where it is superposed as it is, or not at all."""
    if 0 in shape:
        return None
    if len(shape) == 1:
        return View(shape, {name: 1}) if config.selects(name, shape) else None
    if len(shape) == 2:
        rows = shape[1] if transposed else shape[0]
        parts = fused_parts(name, rows, config) or {name: rows}
        chosen = all(config.selects(part, (count, prod(shape) // rows)) for part, count in parts.items())
        return View(shape, parts, transposed) if chosen and (transposed or len(parts) > 1) else None
    if len(shape) < 3:
        return None
    if len(shape) == 3 and not re.search(r"(^|\.)weight$", name):
        rows = shape[2] if transposed else shape[1]
        parts = {f"{name}.{number}": rows for number in range(shape[0])}
        return View(shape, parts, transposed, stacked=True) if config.selects(name, shape[1:]) else None
    depthwise = shape[1] == 1  # a few numbers a channel, which no other channel shares
    chosen = not depthwise and config.selects(name, (shape[0], prod(shape[1:])))
    return View(shape, {name: shape[0]}) if chosen else None


def fused_parts(name: str, rows: int, config: Config) -> dict[str, int] | None:
    """The names and rows of a fused tensor's parts, where ``config.fused`` declares them."""
    for pattern, named in config.fused.items():
        if name.endswith(pattern[1:]):
            if sum(named.values()) != rows:
                raise CheckpointError(f"{name} must have the {sum(named.values())} rows of its parts, got {rows}")
            before = name.removesuffix(pattern[1:])
            return {before + part[1:]: count for part, count in named.items()}
    return None


def tied(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Of names for the same memory, for each the first one. Nothing lazy shares any."""
    first: dict[object, str] = {}
    ties: dict[str, str] = {}
    for name, value in () if isinstance(tensors, LazyTensors) else tensors.items():
        if not value.numel() or value.device.type == "meta":
            continue
        where = value.data_ptr(), value.dtype, tuple(value.shape), value.stride()
        if first.setdefault(where, name) != name:
            ties[name] = first[where]
    return ties


def tied_in(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Of names for the same parameter or buffer in a module's state dict, for each the first one."""
    first: dict[int, str] = {}
    return {name: first[id(value)] for name, value in state.items() if first.setdefault(id(value), name) != name}


def transposed_in(module: nn.Module) -> frozenset[str]:
    """The weights of a module's layers that multiply from the right: Transformers' Conv1D, and some experts'."""
    found = set()
    for path, layer in module.named_modules():
        if is_conv1d(layer):
            found.add(f"{path}.weight" if path else "weight")
        elif getattr(layer, "is_transposed", False):
            found |= {f"{path}.{name}" for name, value in layer.named_parameters(recurse=False) if value.dim() == 3}
    return frozenset(found)


def is_conv1d(layer: nn.Module) -> bool:
    """Whether a layer is Transformers' Conv1D; without importing that."""
    return type(layer).__name__ == "Conv1D" and type(layer).__module__ == "transformers.pytorch_utils"


def _split(tensors: LazyTensors, views: Mapping[str, View], names: Mapping[str, str]) -> Tensors:
    if isinstance(tensors, StoredTensors | Rearranged):
        tensors, names = tensors.renamed(names), {name: name for name in names}
    return SplitTensors(tensors, views, names) if views or names.keys() != tensors.keys() else tensors


def _same(tensors: Tensors, a: str, b: str) -> bool:
    if not isinstance(tensors, LazyTensors):
        first, second = tensors[a], tensors[b]
        if first is second or tied({"a": first, "b": second}):
            return True
    found = digests(tensors, [a, b])
    return found[a] == found[b]
