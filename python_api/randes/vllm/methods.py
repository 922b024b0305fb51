"""vLLM's layers as they have to be for a store: what linear layers and tables multiply with, and norms.

Each of them hands a parameter's part to one operator, which finds it by its name: ``torch.compile`` and CUDA graphs
hold the operator, and see nothing of what is behind it.
"""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.layernorm import GemmaRMSNorm, LayerNorm, RMSNorm
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod, VocabParallelEmbedding

from randes.checkpoints.huggingface import METHOD
from randes.checkpoints.modules.weight_reads import reads_its_own
from randes.serving.layers.per_row import calls_super
from randes.vllm.served import Served

PARTS, SERVED = "randes_parts", "randes_served"
"""Attributes of vLLM's layers: of each of its parameters that models differ in the name; and of its model."""

library = torch.library.Library("randes_vllm", "DEF")
library.define("answer(Tensor x, str name, int width, ScalarType dtype) -> Tensor")


def _answer(x: Tensor, name: str, width: int, dtype: torch.dtype) -> Tensor:
    served: Served = get_forward_context().no_compile_layers[f"{METHOD}:{name}"]
    return served.answer(name, x).to(dtype)


def _fake(x: Tensor, name: str, width: int, dtype: torch.dtype) -> Tensor:
    return x.new_empty((x.shape[0], width), dtype=dtype)


library.impl("answer", _answer, "CompositeExplicitAutograd")
torch.library.register_fake("randes_vllm::answer", _fake, lib=library)


def part(layer: nn.Module, parameter: str) -> str | None:
    """The name of what a layer's parameter is for many models; None where they all have the base's."""
    found: str | None = vars(layer).get(PARTS, {}).get(parameter)
    return found


def answer(x: Tensor, name: str, like: Tensor) -> Tensor:
    """A parameter's part for the step's tokens; (T, N) for ``like`` (N, ...), and (T, K) for a table's (V, K)."""
    width = like.shape[-1] if x.dtype == torch.int64 else like.shape[0]
    result: Tensor = torch.ops.randes_vllm.answer(x, name, width, like.dtype)
    return result


def per_token(x: Tensor, layer: nn.Module, parameter: str) -> Tensor | None:
    """A vector as each token's model has it, to meet x (T, ..., N): (T, ..., N), or (N,) where all have the base's."""
    value: Tensor | None = getattr(layer, parameter)
    name = part(layer, parameter)
    if value is None or name is None:
        return value
    return answer(x, name, value).view(x.shape[0], *[1] * (x.dim() - 2), -1)


class StoreLinearMethod(UnquantizedLinearMethod):
    """A linear layer's product, and its bias."""

    def process_weights_after_loading(self, layer: Any) -> None:
        if part(layer, "weight") is None:
            super().process_weights_after_loading(layer)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x: (T, K). bias: the layer's, where it is added here at all."""
        name, own = part(layer, "weight"), part(layer, "bias")
        alike = bias if own is None else None
        y: Tensor = super().apply(layer, x, alike) if name is None else answer(x, name, layer.weight)
        if name is not None and alike is not None:
            y = y + alike
        return y if bias is None or own is None else y + answer(x, own, bias)


class StoreEmbeddingMethod(UnquantizedEmbeddingMethod):
    """Embeddings' rows, and a head's product."""

    def create_weights(self, layer: Any, *args: Any, **kwargs: Any) -> None:
        super().create_weights(layer, *args, **kwargs)
        layer.use_fused_embedding = False  # it would read the weight itself

    def process_weights_after_loading(self, layer: Any) -> None:
        if part(layer, "weight") is None:
            super().process_weights_after_loading(layer)

    def embedding(self, layer: Any, input_: Tensor) -> Tensor:
        """(T,) integers → (T, K)"""
        name = part(layer, "weight")
        if name is None:
            rows: Tensor = super().embedding(layer, input_)
            return rows
        return answer(input_.reshape(-1, 1), name, layer.weight)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Logits (rows, V); vLLM computes them outside of what is compiled."""
        served: Any = vars(layer).get(SERVED)
        name, own = part(layer, "weight"), part(layer, "bias")
        alike = bias if own is None else None
        y: Tensor = super().apply(layer, x, alike) if name is None else served.logits(name, x)
        if name is not None and alike is not None:
            y = y + alike
        return y if bias is None or own is None else y + served.head_bias(own, x)


class RMSNorms:
    """Mixed into vLLM's RMS norms: each token's own weight."""

    offset = 0.0

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        norm: Any = self
        if residual is not None:
            x = residual = x + residual
        weight = per_token(x, norm, "weight")
        assert weight is not None
        y = F.rms_norm(x.float(), x.shape[-1:], None, norm.variance_epsilon) * (weight.float() + self.offset)
        y = y.to(x.dtype)
        return y if residual is None else (y, residual)


class LayerNorms:
    """Mixed into layer norms: each token's own weight and bias."""

    def forward(self, x: Tensor) -> Tensor:
        norm: Any = self
        y = F.layer_norm(x.float(), norm.normalized_shape, None, None, norm.eps)
        weight, bias = per_token(x, norm, "weight"), per_token(x, norm, "bias")
        y = y if weight is None else y * weight.float()
        y = y if bias is None else y + bias.float()
        return y.to(x.dtype)


class StoreRMSNorm(RMSNorms, RMSNorm):
    """w * x / rms(x)"""


class StoreGemmaRMSNorm(RMSNorms, GemmaRMSNorm):
    """(1 + w) * x / rms(x)"""

    offset = 1.0


class StoreLayerNorm(LayerNorms, LayerNorm):
    """vLLM's."""


class StoreTorchLayerNorm(LayerNorms, nn.LayerNorm):
    """torch's, which some of vLLM's models use."""


class StorePositions(nn.Embedding):
    """A table of positions, or of anything else that a plain embedding looks up."""

    def forward(self, input: Tensor) -> Tensor:
        return answer(input.reshape(-1, 1).long(), str(part(self, "weight")), self.weight)


NORMS: dict[type, type] = {
    RMSNorm: StoreRMSNorm, GemmaRMSNorm: StoreGemmaRMSNorm, LayerNorm: StoreLayerNorm, nn.LayerNorm: StoreTorchLayerNorm
}  # fmt: skip
"""Norms, which no quantization method serves, and their classes once models differ in them."""


@cache
def replaced(kind: type) -> type:
    """The class of a layer once models differ in it; its own where a quantization method serves it."""
    if issubclass(kind, nn.Embedding) and not issubclass(kind, StorePositions):  # its own forward, around the look-up
        return type(f"Store{kind.__name__}", (kind, StorePositions), {"__module__": kind.__module__})
    return NORMS.get(kind, kind)


def give_up_weight(layer: nn.Module, parameter: str, name: str, served: Served) -> None:
    """Have a layer ask for what models differ in. Its own parameter has a shape and no values: code that reads it past
    the layer fails at the start, and does not find the base's."""
    vars(layer).setdefault(PARTS, {})[parameter] = name
    vars(layer)[SERVED] = served
    empty = torch.empty_like(getattr(layer, parameter), device="meta")
    setattr(layer, parameter, nn.Parameter(empty, requires_grad=False))
    if isinstance(layer, LinearBase):
        layer.quant_method = StoreLinearMethod()
    elif isinstance(layer, VocabParallelEmbedding):
        layer.quant_method, layer.use_fused_embedding = StoreEmbeddingMethod(), False
    kind: Any = type(layer)
    layer.__class__ = replaced(kind)


def kind_of(layer: nn.Module) -> str:
    """What ``Served`` takes a layer for."""
    # Some of vLLM's models do not tell their layers of a quantization: those are plain here, too.
    if isinstance(layer, LinearBase) and type(layer.quant_method) in (StoreLinearMethod, UnquantizedLinearMethod):
        return "" if layer.skip_bias_add else "linear"
    if isinstance(layer, VocabParallelEmbedding):
        plain = type(layer.quant_method) in (StoreEmbeddingMethod, UnquantizedEmbeddingMethod)
        return "table" if plain else ""
    if type(layer) is RMSNorm and layer.variance_size_override is not None:
        return ""
    if isinstance(layer, nn.Embedding) and calls_super(layer) and not reads_its_own(layer, "weight"):
        return "table"
    return "norm" if type(layer) in NORMS else ""
