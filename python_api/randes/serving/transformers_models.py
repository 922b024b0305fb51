"""A served module and the Transformers models in it: their calls are followed, and they are known as no plain ones."""

import functools
import inspect
import sys
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


def mark_served(module: nn.Module, served: bool = True) -> None:
    """Tell Transformers that the models in ``module`` are no plain ones, so that its ``save_pretrained`` refuses to
    write one of them; or that they are again."""
    library = sys.modules.get("transformers")
    if library is None:
        return
    from randes.checkpoints.quantization import RandesConfig, Served

    for layer in module.modules():
        if isinstance(layer, library.PreTrainedModel):
            quantizer = getattr(layer, "hf_quantizer", None)
            if served and quantizer is None:
                layer.hf_quantizer = Served(RandesConfig())
            elif not served and isinstance(quantizer, Served) and not quantizer.quantization_config.base:
                vars(layer).pop("hf_quantizer")
