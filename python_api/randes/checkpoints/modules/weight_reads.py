"""Which weights a model's code reads itself, past the layer that they belong to.

A superposed weight is another for each model and has no values to be read, so that such a tensor is kept per model
instead. Transformers' models are run once for that, on "meta", and every use of a weight outside its own layer is seen.
Where that cannot be done, as with a module of somebody's own whose inputs are not known, the source of its classes is
searched. What both miss is refused when it is read.
"""

import ast
import inspect
import sys
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from randes.checkpoints.modules.parameters import DESCRIBED, is_transformers, move
from randes.checkpoints.modules.source import methods_of, names_after_self

TOKENS = 8
SAMPLES = 16000
"""Of an example's text, and of its sound: a second, as the strides of speech models need."""


def weights_read(module: nn.Module, *, seen_alone: bool = False) -> set[str]:
    """The names of weights that ``module``'s code reads, as in its state dict.

    seen_alone: only those that a run has shown, and not what stands in code that may never run.
    """
    found: set[str] = set()
    if is_transformers(module):
        found, whole = _seen(module)
        if whole or seen_alone:
            return found
    if not seen_alone:
        found |= _written(module)
    for name, part in module.named_children():
        found |= {f"{name}.{inner}" for inner in weights_read(part, seen_alone=seen_alone)}
    return found


# ---------------------------------------------------------------- seen in a run


class _Watched(Tensor):
    """A weight as others than its layer get it: what is computed with it is noted."""

    path: str
    notes: set[str]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.linear and func not in _DESCRIBING:  # F.linear is answered (serving/layers/served_weights.py)
            for value in (*args, *(kwargs or {}).values()):
                for leaf in value if isinstance(value, list | tuple) else (value,):
                    if isinstance(leaf, cls):
                        leaf.notes.add(leaf.path)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


def _describing() -> Iterator[Any]:
    for name in DESCRIBED:
        found = getattr(Tensor, name)
        yield found if callable(found) else found.__get__


_DESCRIBING = {*_describing(), Tensor.__len__, torch.is_floating_point, torch.is_complex, torch.numel}


def _seen(model: Any) -> tuple[set[str], bool]:
    """The weights that a Transformers model reads in a run on "meta", and whether that came to its end."""
    notes: set[str] = set()
    try:
        with torch.device("meta"), torch.random.fork_rng([]):
            skeleton: nn.Module = type(model)(model.config)
        for path, layer in list(skeleton.named_modules()):
            if isinstance(layer._parameters.get("weight"), nn.Parameter) and not layer._modules:
                _watch(layer, f"{path}.weight", notes)
        with torch.no_grad(), torch.device("meta"), torch.random.fork_rng([]):
            skeleton.eval()(**_example(skeleton))
    except Exception:  # whatever this model cannot do on "meta", where nothing has a value
        return notes, False
    return notes, True


def _watch(layer: nn.Module, name: str, notes: set[str]) -> None:
    def weight(self: Any) -> Tensor:
        base: Tensor = self.base_weight
        caller = sys._getframe(1).f_locals
        if caller.get("self") is self:
            return base
        watched = base.detach().as_subclass(_Watched)
        watched.path, watched.notes = name, notes
        return watched

    kind = type(layer)
    move(layer, frozenset(("weight",)), type(kind.__name__, (kind,), {"weight": property(weight)}))


def _example(model: Any) -> dict[str, Any]:
    """Inputs of the kinds that a model takes, of one row."""
    config = model.config
    takes = inspect.signature(model.forward).parameters

    def of(*names: str, default: int) -> int:
        for part in (config, *(getattr(config, f"{name}_config", None) for name in ("vision", "audio", "text"))):
            for name in names:
                if isinstance(found := getattr(part, name, None), int):
                    return found
        return default

    size = of("image_size", default=224)
    bands, frames = of("num_mel_bins", default=80), 2 * of("max_source_positions", default=500)
    examples = {
        "input_ids": torch.ones(1, TOKENS, dtype=torch.long),
        "decoder_input_ids": torch.ones(1, TOKENS, dtype=torch.long),
        "pixel_values": torch.ones(1, of("num_channels", "in_channels", default=3), size, size),
        "input_values": torch.ones(1, SAMPLES),
        "input_features": torch.ones(1, bands, frames),
    }
    return {name: value for name, value in examples.items() if name in takes}


# ---------------------------------------------------------------- written in the source

_BEFORE = ("__init__", "_init_weights", "reset_parameters", "tie_weights", "extra_repr")
"""What runs before anything is served, or prints."""


def _written(module: nn.Module) -> set[str]:
    """The weights of layers inside ``module`` that its own code names."""
    found = set()
    for chain in _chains(type(module)):
        *path, last = chain
        layer: Any = module
        for name in path:
            layer = getattr(layer, name, None)
        if isinstance(layer, nn.Module) and last in layer._parameters:
            found.add(".".join(chain))
    return found


_CHAINS: dict[type, set[tuple[str, ...]]] = {}


def _chains(kind: type) -> set[tuple[str, ...]]:
    """``self.a.b.weight`` in a class's methods, as ("a", "b", "weight"), where it is not only described."""
    if kind in _CHAINS:
        return _CHAINS[kind]
    found = _CHAINS[kind] = set()
    for method in methods_of(kind, but_of=("torch.",)):
        if method.name not in _BEFORE:
            found |= {chain for chain in _reads(method) if len(chain) > 1}
    return found


def reads_its_own(layer: nn.Module, name: str) -> bool:
    """Whether a layer's own code, and not torch's, reads the values of its parameter ``name``."""
    methods = methods_of(type(layer), but_of=("torch.",))
    return any((name,) in _reads(method) for method in methods if method.name not in _BEFORE)


def _reads(method: ast.FunctionDef) -> Iterator[tuple[str, ...]]:
    answered = set()  # nodes of no interest: what is described, and what goes to F.linear
    for node in ast.walk(method):
        if isinstance(node, ast.Attribute) and node.attr in DESCRIBED:
            answered.add(id(node.value))
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("F.linear", "functional.linear")):
            answered |= {id(value) for value in (*node.args, *(keyword.value for keyword in node.keywords))}
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and id(node) not in answered:
            yield names_after_self(node)
