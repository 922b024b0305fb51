"""Ways to a parameter past its name: references that a module holds beside it, and code that goes through all of them.

By either the base's parameter is found when another stands under its name, so that a model with such ways to a tensor
that is to be another for each fine-tune cannot be served.
"""

import ast
import inspect
from collections.abc import Collection, Iterator, Mapping
from functools import partial
from types import FunctionType
from typing import Any

from torch import Tensor, nn

from randes.checkpoints.modules.parameters import DESCRIBED
from randes.checkpoints.modules.source import methods_of, names_after_self

_OF_ANY_MODULE = vars(nn.Module()).keys()


def held_elsewhere(
    module: nn.Module, moved: Mapping[str, Tensor], passing: Collection[str] = ()
) -> Iterator[tuple[str, str]]:
    """The attributes inside ``module`` that hold one of the parameters ``moved``, or a part of its memory, and that
    parameter's name: also in lists, dictionaries, partials and closures, and as a buffer that no state dict has.

    passing: attributes that may hold some, as they are made anew before they are read.
    """
    by_storage: dict[int, list[tuple[str, Tensor]]] = {}
    for name, value in moved.items():
        by_storage.setdefault(_storage(value), []).append((name, value))
    for path, part in module.named_modules():
        fields = {name: value for name, value in vars(part).items() if name not in _OF_ANY_MODULE}
        fields |= {name: part._buffers.get(name) for name in part._non_persistent_buffers_set}
        for field, value in fields.items():
            attribute = f"{path}.{field}".lstrip(".")
            if attribute in passing or (field == "_flat_weights" and isinstance(part, nn.RNNBase)):
                continue
            for leaf in _leaves(value, set()):
                for name, parameter in by_storage.get(_storage(leaf), ()):
                    if _overlap(leaf, parameter):
                        yield attribute, name


def _storage(value: Tensor) -> int:
    try:
        return int(value.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # sparse ones, and those that are made of others
        return id(value)


def _overlap(one: Tensor, other: Tensor) -> bool:
    if one is other:
        return True
    (first, last), (start, end) = _extent(one), _extent(other)
    return first < end and start < last


def _extent(value: Tensor) -> tuple[int, int]:
    """The bytes of its storage that a tensor reaches from and to."""
    size = value.element_size()
    first = int(value.storage_offset()) * size
    reach = sum((length - 1) * step for length, step in zip(value.shape, value.stride(), strict=True))
    return first, first + (int(reach) + 1) * size if value.numel() else first


def _leaves(value: Any, seen: set[int]) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
        return
    inner: list[Any] = []
    if isinstance(value, dict):
        inner = list(value.values())
    elif isinstance(value, list | tuple | set | frozenset):
        inner = list(value)
    elif isinstance(value, partial):
        inner = [value.func, *value.args, *value.keywords.values()]
    elif isinstance(value, FunctionType):
        inner = [*inspect.getclosurevars(value).nonlocals.values(), *(value.__defaults__ or ())]
    if inner and id(value) not in seen:
        seen.add(id(value))
        for part in inner:
            yield from _leaves(part, seen)


# ---------------------------------------------------------------- code that goes through parameters

_ALL = "parameters", "named_parameters"


def gone_through(module: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """Layers inside ``module`` whose forward goes through parameters and does more than describe them: each with the
    method that does, and the layer whose parameters those are, or may be."""
    for layer in module.modules():
        for method, chain in _loops(type(layer)):
            whose: Any = layer
            for name in chain:
                whose = getattr(whose, name, None)
            yield layer, method, whose if isinstance(whose, nn.Module) else layer


_LOOPS: dict[type, set[tuple[str, tuple[str, ...]]]] = {}


def _loops(kind: type) -> set[tuple[str, tuple[str, ...]]]:
    """The methods that a class's forward comes to and that go through parameters, each with the names after ``self``
    of whose they are."""
    if kind not in _LOOPS:
        methods = _methods(kind)
        known, next_ones = set(), ["forward"]
        found = set()
        while next_ones:
            name = next_ones.pop()
            if name in known:
                continue
            known.add(name)
            for method in methods.get(name, ()):
                found |= {(name, chain) for chain in _read_through(method)}
                nodes = (node for node in ast.walk(method) if isinstance(node, ast.Attribute))
                next_ones += [node.attr for node in nodes if isinstance(node.value, ast.Name | ast.Call)]
        _LOOPS[kind] = found
    return _LOOPS[kind]


def _methods(kind: type) -> dict[str, list[ast.FunctionDef]]:
    methods: dict[str, list[ast.FunctionDef]] = {}
    for method in methods_of(kind, but_of=("torch.", "transformers.")):
        methods.setdefault(method.name, []).append(method)
    return methods


def _read_through(method: ast.FunctionDef) -> Iterator[tuple[str, ...]]:
    """Whose parameters a method goes through and reads, as the names after ``self``; () where that is not said."""
    parents = {id(inner): node for node in ast.walk(method) for inner in ast.iter_child_nodes(node)}
    for node in ast.walk(method):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _ALL):
            continue
        if _reads(node, parents, method):
            yield names_after_self(node.func.value)


def _reads(node: ast.AST, parents: dict[int, ast.AST], method: ast.FunctionDef) -> bool:
    """Whether what stands for parameters, or for one, is more than described."""
    outer = parents[id(node)]
    if isinstance(outer, ast.Attribute):
        return outer.attr not in DESCRIBED
    if isinstance(outer, ast.Call) and isinstance(outer.func, ast.Name) and outer.func.id in ("next", "iter"):
        return _reads(outer, parents, method)
    target: ast.AST | None = None
    if isinstance(outer, ast.For | ast.comprehension):
        target = outer.target
    elif isinstance(outer, ast.Assign) and len(outer.targets) == 1:
        target = outer.targets[0]
    if isinstance(target, ast.Tuple):
        target = target.elts[-1]
    if not isinstance(target, ast.Name):
        return not isinstance(outer, ast.Expr)
    uses = [
        use for use in ast.walk(method)
        if isinstance(use, ast.Name) and use.id == target.id and isinstance(use.ctx, ast.Load)
    ]  # fmt: skip
    return any(not isinstance(at := parents[id(use)], ast.Attribute) or at.attr not in DESCRIBED for use in uses)
