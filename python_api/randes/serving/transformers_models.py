"""Transformers models inside a served module: their calls are followed, and they are known as no plain ones."""

import sys

from torch import nn
from torch.utils.hooks import RemovableHandle

from randes.serving.routing import Router


def follow_calls(module: nn.Module, router: Router) -> list[RemovableHandle]:
    """Have every Transformers model in ``module`` tell the router the shape of each call of it: its rows, and their
    length. So a part that is called by itself is known (one tower of two, a decoder step of ``generate``)."""
    hooks = []
    for layer in module.modules():
        if hasattr(layer, "config") and hasattr(layer, "get_input_embeddings"):
            hooks.append(layer.register_forward_pre_hook(router.enter, prepend=True, with_kwargs=True))
            hooks.append(layer.register_forward_hook(router.leave, always_call=True))
    return hooks


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
