"""Transformers models inside a served module: their calls are followed, and they are known as no plain ones."""

import inspect
import sys
from typing import Any

from torch import nn

from randes.serving.routing import Router


class Followed:
    """A module's ``forward`` that tells the router of each call, and of its end however it ends: no hook of a module is
    called after a ``KeyboardInterrupt``. It is copied and pickled with its module."""

    def __init__(self, module: nn.Module, router: Router) -> None:
        self._module, self._router = module, router
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

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        batch = self._router.of_part(self._module, args, kwargs)
        if batch is None:
            return self._forward(args, kwargs)
        with self._router.during(batch):
            return self._forward(args, kwargs)

    def _forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._own is not None:
            return self._own(*args, **kwargs)
        return type(self._module).forward(self._module, *args, **kwargs)


def follow_calls(module: nn.Module, router: Router) -> list[Followed]:
    """Have every Transformers model in ``module`` tell the router the shape of each call of it: its rows, and their
    length. So a part that is called by itself is known (one tower of two, a decoder step of ``generate``)."""
    models = (each for each in module.modules() if hasattr(each, "config") and hasattr(each, "get_input_embeddings"))
    return [Followed(model, router) for model in models]


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
                layer.hf_quantizer = Served(RandesConfig(""))
            elif not served and isinstance(quantizer, Served) and not quantizer.quantization_config.base:
                vars(layer).pop("hf_quantizer")
