"""Whether a norm of somebody's own multiplies by its weight, element by element, as its name lets one hope.

Such a norm can be run once for all rows of a batch, with a weight for each (``RoutedNorm``). One that adds its weight
up, or looks for its largest, would mix the models' without a word. So each is tried, on a copy, before it is believed.
"""

from collections import OrderedDict
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

ROWS = 3
SCALES = 1.0, 30.0, 0.01
"""Of the weights that a norm is tried with."""
CLOSE: dict[str, float] = {"rtol": 1e-4, "atol": 1e-5}


_TRIED: dict[tuple[Any, ...], bool] = {}


def multiplies_by_element(norm: nn.Module) -> bool:
    """Whether ``norm``, whose one parameter is its weight (K,), answers for a weight (B, 1, K) each of B rows as it
    would with that row's alone. False also where it cannot be tried.

    Nothing of it changes: neither its buffers, nor its attributes, nor what random numbers come next.
    """
    key = _key(norm)
    if key is None:
        return _tried(norm)
    if key not in _TRIED:
        _TRIED[key] = _tried(norm)
    return _TRIED[key]


def _key(norm: nn.Module) -> tuple[Any, ...] | None:
    """All that a norm's answer can depend on, where that is its class and a few plain values."""
    fields = {name: value for name, value in vars(norm).items() if value or not isinstance(value, dict | set)}
    weight = fields.pop("_parameters")["weight"]
    if all(isinstance(value, bool | int | float | str | torch.dtype | None) for value in fields.values()):
        return type(norm), type(norm).forward, weight.shape, weight.device, tuple(sorted(fields.items(), key=str))
    return None


def _tried(norm: nn.Module) -> bool:
    own = norm._parameters["weight"]
    assert own is not None
    for device in dict.fromkeys((torch.device("cpu"), own.device)):
        if device.type == "meta":
            continue
        forked = torch.random.fork_rng([device] if device.type == "cuda" else [])
        try:
            with forked, device, torch.no_grad(), torch.autocast(device.type, enabled=False):
                return all(_agrees(norm, device, *how) for how in product(SCALES, {False, norm.training}))
        except Exception:  # whatever it needs that is not here: another device, other inputs
            continue
    return False


def _agrees(norm: nn.Module, device: torch.device, scale: float, training: bool) -> bool:
    width = norm._parameters["weight"].numel()  # type: ignore[union-attr]
    generator = torch.Generator().manual_seed(width)
    weights = scale * (torch.rand(ROWS, width, generator=generator, device="cpu") + 0.5)
    weights[:, 1::2] *= -1
    length = 5 if width != 5 else 7  # no place may be taken for another
    for shape in ((), (length,), (2, length)):
        x = torch.randn(ROWS, *shape, width, generator=generator, device="cpu").to(device)
        try:
            alone = [_run(norm, weight, row[None], training) for weight, row in zip(weights, x, strict=True)]
        except Exception:
            if len(shape) == 1:  # the form that all rows of a batch are given to it in
                raise
            continue
        rows = x.reshape(ROWS, -1, width)
        together = _run(norm, weights[:, None], rows, training)
        if together.shape != rows.shape or not all(
            part.shape == row[None].shape for part, row in zip(alone, x, strict=True)
        ):
            return False
        if not torch.allclose(together.view(x.shape), torch.cat(alone), **CLOSE, equal_nan=True):
            return False
    return True


def _run(norm: nn.Module, weight: Tensor, x: Tensor, training: bool) -> Tensor:
    y: Tensor = _probe(norm, weight.to(x.device), x.device, training)(x)
    return y


def _probe(layer: nn.Module, weight: Tensor | None, device: torch.device, training: bool) -> nn.Module:
    """A copy without hooks, whose ``weight`` is read as it is in a layer that serves many models: as a property."""
    kind: Any = type(layer)
    if weight is not None:
        kind = type(kind.__name__, (kind,), {"weight": property(lambda self: weight)})
    probe: nn.Module = kind.__new__(kind)
    held: dict[str, Any] = vars(layer) | ({"_parameters": {}} if weight is not None else {})
    fields = {name: _copied(value, device) for name, value in held.items() if name != "_modules"}
    fields |= {name: OrderedDict() for name in fields if name.endswith("_hooks")}
    fields["_modules"] = {
        name: None if part is None else _probe(part, None, device, training) for name, part in layer._modules.items()
    }
    fields["training"] = training
    vars(probe).update(fields)
    return probe


def _copied(value: Any, device: torch.device) -> Any:
    """Tensors, in fp32 where they are of a lower precision, and what holds some; all else as it is."""
    if isinstance(value, Tensor):
        exact = torch.promote_types(value.dtype, torch.float32) if value.is_floating_point() else value.dtype
        return value.detach().to(device, exact, copy=True)
    if isinstance(value, dict):
        made = value.copy()
        made.update((key, _copied(inner, device)) for key, inner in value.items())
        return made
    return type(value)(_copied(inner, device) for inner in value) if type(value) in (list, tuple, set) else value
