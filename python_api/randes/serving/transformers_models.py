"""A served module and the Transformers models in it: their calls are followed, and they are known as no plain ones."""

import functools
import inspect
import sys
from collections.abc import Callable
from types import CodeType, MethodType
from typing import Any

from torch import nn

from randes.serving.routing import Router


class Followed:
    """A module's ``forward`` that tells the router of each call, and of its end however it ends: no hook of a module is
    called after a ``KeyboardInterrupt``. It is copied and pickled with its module.

    root: it is the whole module that is served. A call of it has one choice from its beginning to its end.
    """

    def __init__(self, module: nn.Module, router: Router, *, root: bool = False) -> None:
        self._module, self._router, self._root = module, router, root
        self._has_rows = _is_model(module)
        self._own = vars(module).get("forward")  # a module's own, as others set it
        vars(module)["forward"] = self

    def remove(self) -> None:
        """The module has its own ``forward`` again."""
        if self._own is None:
            vars(self._module).pop("forward", None)
        else:
            vars(self._module)["forward"] = self._own

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self._own or type(self._module).forward.__get__(self._module))

    @property
    def __code__(self) -> CodeType:  # ``torch.export`` asks where a forward was written
        code: CodeType = inspect.unwrap(self._own or type(self._module).forward).__code__
        return code

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        router = self._router
        if self._root and not router.holds() and kwargs.get("adapter_names") is None:
            with router.during(router.current(), whole=True):
                return self._part(args, kwargs)
        return self._part(args, kwargs)

    def _part(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        batch = self._router.of_part(self._module, args, kwargs) if self._has_rows else None
        if batch is None:
            return self._forward(args, kwargs)
        with self._router.during(batch):
            return self._forward(args, kwargs)

    def _forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._own is not None:
            return self._own(*args, **kwargs)
        return type(self._module).forward(self._module, *args, **kwargs)


def follow_calls(module: nn.Module, router: Router) -> list[Followed]:
    """Have ``module`` answer each call of it as what is chosen when it begins, and every Transformers model in it tell
    the router the shape of each call: its rows, and their length. So a part that is called by itself is known (one
    tower of two, a decoder step of ``generate``)."""
    parts = [part for part in module.modules() if part is not module and _is_model(part)]
    return [Followed(module, router, root=True), *(Followed(part, router) for part in parts)]


def of_one_choice(found: Any, module: nn.Module, router: Router) -> Any:
    """``found``, an attribute of ``module``; a method of it with one choice of models for the whole of a call."""
    if not isinstance(found, MethodType) or found.__self__ is not module or _later(found):
        return found

    @functools.wraps(found)
    def method(*args: Any, **kwargs: Any) -> Any:
        if router.holds():
            return found(*args, **kwargs)
        with router.during(router.current(), whole=True):
            return found(*args, **kwargs)

    return method


def _later(method: MethodType) -> bool:
    """Whether a call of it only makes what runs later."""
    kinds = (inspect.iscoroutinefunction, inspect.isgeneratorfunction, inspect.isasyncgenfunction)
    return any(kind(method) for kind in kinds)


def _is_model(module: nn.Module) -> bool:
    return hasattr(module, "config") and hasattr(module, "get_input_embeddings")


class Recomputed:
    """A model's function for gradient checkpointing: what is run again in a backward pass runs as what it ran as first,
    whatever is chosen then."""

    def __init__(self, checkpoint: Callable[..., Any], router: Router) -> None:
        self.checkpoint, self._router = checkpoint, router

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        router, batch = self._router, self._router.current()

        def run(*inner: Any, **named: Any) -> Any:
            with router.during(batch):
                return function(*inner, **named)

        return self.checkpoint(run, *args, **kwargs)


class EnabledCheckpointing:
    """In the place of what sets a model's function for gradient checkpointing, in every version of Transformers."""

    def __init__(self, module: Any, router: Router) -> None:
        self._module, self._router = module, router

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        type(self._module)._set_gradient_checkpointing(self._module, *args, **kwargs)
        keep_choices(self._module, self._router)


def keep_choices(module: nn.Module, router: Router | None) -> None:
    """Have each layer that is checkpointed run again as what it ran as; without a router, as any module's again."""
    for part in module.modules():
        held = vars(part).get("_gradient_checkpointing_func")
        own = held.checkpoint if isinstance(held, Recomputed) else held
        if own is not None:
            vars(part)["_gradient_checkpointing_func"] = own if router is None else Recomputed(own, router)


def refuse_to_resize(*_: Any, **__: Any) -> None:
    """In the place of a served model's ``resize_token_embeddings``: raises ``ValueError``."""
    raise ValueError(
        "a model that serves many cannot have its token embeddings resized: they are those of its base and fine-tunes;"
        " resize these before they are superposed, or one model that merge_and_unload(name) gives"
    )


def mark_served(module: nn.Module, router: Router | None) -> None:
    """Tell Transformers that the models in ``module`` are no plain ones, so that its ``save_pretrained`` refuses to
    write one of them, its ``Trainer`` to train and ``resize_token_embeddings`` to change one; or that they are again,
    without a router."""
    library = sys.modules.get("transformers")
    if library is None:
        return
    from randes.checkpoints.quantization import RandesConfig, Served

    keep_choices(module, router)
    for layer in module.modules():
        if not isinstance(layer, library.PreTrainedModel):
            continue
        quantizer = getattr(layer, "hf_quantizer", None)
        if router is None:
            for name in ("resize_token_embeddings", "_set_gradient_checkpointing"):
                vars(layer).pop(name, None)
            if isinstance(quantizer, Served) and not quantizer.quantization_config.base:
                vars(layer).pop("hf_quantizer")
            continue
        vars(layer)["resize_token_embeddings"] = refuse_to_resize
        vars(layer)["_set_gradient_checkpointing"] = EnabledCheckpointing(layer, router)
        if quantizer is None:
            layer.hf_quantizer = Served(RandesConfig(""))
