"""vLLM's own classes, as they have to be for a store: its loader, what layers multiply with, norms, and adapters.

Each of them hands a parameter's part to one operator, which finds it by its name: ``torch.compile`` and CUDA graphs
hold the operator, and see nothing of what is behind it.
"""

from collections.abc import Iterable
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.config import get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.layernorm import GemmaRMSNorm, LayerNorm, RMSNorm
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod, VocabParallelEmbedding
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.v1.worker import lora_model_runner_mixin

from randes.checkpoints.huggingface import METHOD
from randes.errors import CheckpointError
from randes.superposition.superposition import Superposition
from randes.vllm.adapters import Adapters
from randes.vllm.refusals import NotServedError, check
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


REPLACED: dict[type, type] = {
    RMSNorm: StoreRMSNorm, GemmaRMSNorm: StoreGemmaRMSNorm, LayerNorm: StoreLayerNorm,
    nn.LayerNorm: StoreTorchLayerNorm, nn.Embedding: StorePositions,
}  # fmt: skip
"""Layers that no quantization method serves, and their classes once models differ in them."""


def kind_of(layer: nn.Module) -> str:
    """What ``Served`` takes a layer for."""
    if isinstance(layer, LinearBase) and isinstance(layer.quant_method, StoreLinearMethod):
        return "" if layer.skip_bias_add else "linear"
    if isinstance(layer, VocabParallelEmbedding) and isinstance(layer.quant_method, StoreEmbeddingMethod):
        return "table"
    if type(layer) is RMSNorm and layer.variance_size_override is not None:
        return ""
    return ("table" if type(layer) is nn.Embedding else "norm") if type(layer) in REPLACED else ""


@register_quantization_config(METHOD)
class StoreConfig(QuantizationConfig):
    """What a store's config.json says of its weights."""

    def get_name(self) -> str:
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.float32, torch.float16, torch.bfloat16]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "StoreConfig":
        return cls()

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        """Raises ``NotServedError`` for layers of experts, and for what a store is not served with."""
        check(get_current_vllm_config())
        if isinstance(layer, RoutedExperts):
            raise NotServedError(f"a store is not served with experts by vLLM ({prefix}): serve it with randes.load")
        if isinstance(layer, LinearBase):
            return StoreLinearMethod()
        return StoreEmbeddingMethod() if isinstance(layer, VocabParallelEmbedding) else None


@register_model_loader(METHOD)
class StoreLoader(BaseModelLoader):
    """The base of a store into a vLLM model, and the fine-tunes beside it."""

    def download_model(self, model_config: Any) -> None:
        """Nothing: a store is a folder."""

    def load_weights(self, model: Any, model_config: Any) -> None:
        """Raises ``StoreError``, and ``CheckpointError`` for what no layer took."""
        config = get_current_vllm_config()
        check(config)
        superposition = Superposition.load(model_config.model, check=False)
        base = superposition.to_files.apply(superposition.layout.joined(superposition.base))
        loaded = model.load_weights((name, base[name]) for name in base)
        if missing := sorted({name for name, _ in model.named_parameters()} - set(loaded or ())):
            raise CheckpointError(f"{model_config.model} has nothing for {missing[0]} of vLLM's {type(model).__name__}")
        scheduler, room = config.scheduler_config, config.lora_config.max_loras
        served = Served(
            model, superposition, kind_of, room if room > len(superposition.names) else None,
            max(scheduler.max_num_batched_tokens, *(config.compilation_config.cudagraph_capture_sizes or [0])),
            scheduler.max_num_seqs,
        )  # fmt: skip
        ends = getattr(model_config.hf_config, "eos_token_id", None) or 0
        served.end = ends[0] if isinstance(ends, list) else ends
        attach(model, served, config.compilation_config.static_forward_context)


def attach(model: nn.Module, served: Served, by_name: dict[str, Any]) -> None:
    """Have a model's layers ask for what models differ in. by_name: where the operator looks."""
    for name, owners in served.owners.items():
        by_name[f"{METHOD}:{name}"] = served
        for layer, parameter in owners:
            vars(layer).setdefault(PARTS, {})[parameter] = name
            vars(layer)[SERVED] = served
            layer.__class__ = REPLACED.get(type(layer), type(layer))
    vars(model)[SERVED] = served  # not a submodule: its weights are the model's

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tokens = kwargs.get("input_ids", args[0] if args else None)
        served.length = None if tokens is None else len(tokens)

    model.register_forward_pre_hook(note, with_kwargs=True)


class StoreAdapters:
    """In the place of vLLM's manager of LoRA adapters, where the model is a store."""

    def __init__(self, vllm_config: Any, *_: Any, **__: Any) -> None:
        self._store = vllm_config.model_config.model
        self.adapters: Adapters

    def create_lora_manager(self, model: nn.Module, vllm_config: Any = None) -> nn.Module:
        """The model, as it is."""
        self.adapters = Adapters(vars(model)[SERVED], self._store)
        return model

    def set_active_adapters(self, requests: Iterable[Any], mapping: Any) -> None:
        """Whose the next step's tokens and rows are. Never raises."""
        asked = [(request.lora_int_id, request.lora_path) for request in requests]
        served = self.adapters.served
        served.unanswered = self.adapters.activate(asked, mapping.index_mapping, mapping.prompt_mapping)

    def add_adapter(self, request: Any) -> bool:
        """Raises for what cannot be served; vLLM's endpoints answer with that."""
        self.adapters.add(request.lora_int_id, request.lora_path)
        return True

    def remove_adapter(self, adapter_id: int) -> bool:
        return self.adapters.remove(adapter_id)

    def remove_all_adapters(self) -> None:
        self.adapters.held.clear()
        self.adapters.warming.clear()

    def list_adapters(self) -> set[int]:
        return {*self.adapters.held}

    def pin_adapter(self, adapter_id: int) -> bool:
        """All of them stay in memory."""
        return adapter_id in self.adapters.held

    @contextmanager
    def dummy_lora_cache(self) -> Any:
        yield

    def add_dummy_lora(self, request: Any, rank: int) -> bool:
        """An adapter that vLLM makes up to warm up with: answered as the base."""
        self.adapters.warming.add(request.lora_int_id)
        return True

    def get_dummy_lora_warmup_rank(self, default_rank: int) -> int:
        return default_rank

    def supports_tower_connector_lora(self) -> bool:
        return False


@cache
def register() -> None:
    """Once a process; importing this module has registered the rest."""
    plain: Any = lora_model_runner_mixin.LRUCacheWorkerLoRAManager

    def manager(vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
        kind = StoreAdapters if vllm_config.model_config.quantization == METHOD else plain
        return kind(vllm_config, *args, **kwargs)

    lora_model_runner_mixin.LRUCacheWorkerLoRAManager = manager
