"""A layer that is run once for each model of a mixed batch, on its rows, and what it must not do then."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from randes.serving.layers.delta_pool import DeltaPool
from randes.serving.layers.per_model import PerModelTensor
from randes.serving.layers.recomputed import recomputed_in
from randes.serving.routing import Router


def can_be_split(layer: nn.Module, values: tuple[Any, ...]) -> bool:
    """Whether a call with these arguments can be one of each model's rows."""
    plain = (Tensor, bool, int, float, str, torch.dtype, torch.device, type(None))
    whole = hasattr(layer, "config") and hasattr(layer, "get_input_embeddings")  # its outputs may compare rows (CLIP's)
    return not whole and any(isinstance(v, Tensor) for v in values) and all(isinstance(v, plain) for v in values)


def by_model(
    router: Router, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], *, ragged: bool = False
) -> Any:
    """``function`` of each model's rows; its outputs in the rows' order, or as a list of them where they are ragged.

    function: a layer's forward, which must neither change its inputs in place nor leave tensors behind: what it is
    given are copies of some rows, and what it leaves would be one model's. Raises ``ValueError`` where it does.
    """
    batch = router.batch()
    ids = batch.numbers
    layer = function.__self__  # type: ignore[attr-defined]
    before = _tensors_in(layer)
    runs: dict[int, Tensor] = {}
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            runs[id(value)] = torch.unflatten(batch.spread(value), 0, (len(ids), -1))
    lengths = {run.shape[1] for run in runs.values()}
    # Or with its positions flattened into it, as routers of experts return them.
    outputs_may_have = lengths | {run.shape[1] * run.shape[2] for run in runs.values() if run.dim() > 3}
    parts: list[tuple[Tensor | None, ...]] = []
    places: list[int] = []
    single = True
    for model in sorted(set(ids)):
        chosen = [place for place, other in enumerate(ids) if other == model]
        taken = {value: _rows_of(run, chosen) for value, run in runs.items()}
        versions = [part._version for part in taken.values()]

        def part(value: Any, taken: dict[int, Tensor] = taken) -> Any:
            return taken[id(value)] if isinstance(value, Tensor) else value

        with router.during(batch.of_one(model)):
            try:
                y = function(*map(part, args), **{name: part(value) for name, value in kwargs.items()})
            except RuntimeError as error:
                if not before:
                    raise
                # What a call before this one left is of other rows than these.
                raise ValueError(_leaves_behind(layer, next(iter(before)))) from error
        if [part._version for part in taken.values()] != versions:
            raise ValueError(
                f"a {type(layer).__name__} with tensors kept per model must leave its inputs as they are to serve a"
                " mixed batch, got one changed in place: it is given rows of them, and the batch would stay as it was"
            )
        single = isinstance(y, Tensor)
        outputs = (y,) if single else y
        if not isinstance(outputs, tuple) or not all(
            out is None or (isinstance(out, Tensor) and out.dim() and out.shape[0] / len(chosen) in outputs_may_have)
            for out in outputs
        ):
            raise ValueError(
                f"a {type(layer).__name__} with tensors kept per model must return tensors with the batch first to"
                " serve a mixed batch"
            )
        parts.append(tuple(None if out is None else torch.unflatten(out, 0, (len(chosen), -1)) for out in outputs))
        places += chosen
    left = _tensors_in(layer)
    if changed := [name for name, (_, state) in left.items() if name not in before or before[name][1] != state]:
        raise ValueError(_leaves_behind(layer, changed[0]))
    order = torch.tensor(places).argsort()
    if ragged:
        rows = [row for (own,) in parts if own is not None for row in own]
        return [rows[place].squeeze(0) if lengths == {1} else rows[place] for place in order.tolist()]
    joined = tuple(_in_order(outputs, order) for outputs in zip(*parts, strict=True))
    return joined[0] if single else joined


def _leaves_behind(layer: object, name: str) -> str:
    return (
        f"a {type(layer).__name__} with tensors kept per model must leave no tensors behind to serve a mixed batch, but"
        f" its forward sets {name}, which would be the last model's, for its rows alone"
    )


def _rows_of(run: Tensor, chosen: list[int]) -> Tensor:
    if not torch.is_inference_mode_enabled():
        return run[chosen].flatten(0, 1)
    with torch.inference_mode(False), torch.no_grad():  # tensors of inference do not say whether they have changed
        return run[chosen].flatten(0, 1)


_OF_ANY_MODULE = vars(nn.Module()).keys()


def _tensors_in(layer: nn.Module) -> dict[str, tuple[list[Tensor], list[tuple[int, int]]]]:
    """The tensors in a layer, and inside what is in it, that are no parameters or buffers: those that an attribute
    holds, and which they are, in what state."""
    found = {}
    for path, part in layer.named_modules():
        if not isinstance(part, PerModelTensor | DeltaPool):
            passing = {*_OF_ANY_MODULE, *recomputed_in(part)}
            for name, value in vars(part).items():
                if name not in passing and (tensors := list(_leaves(value))):
                    states = [(id(leaf), -1 if leaf.is_inference() else leaf._version) for leaf in tensors]
                    found[f"{path}.{name}".lstrip(".")] = tensors, states
    return found


def _leaves(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple | dict):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _leaves(inner)


def _in_order(outputs: tuple[Tensor | None, ...], order: Tensor) -> Tensor | None:
    """One output of each model, (rows, ...) each, as one of the rows in ``order``; None where there is none."""
    held = [out for out in outputs if out is not None]
    return torch.cat(held)[order.to(held[0].device)].flatten(0, 1) if held else None
