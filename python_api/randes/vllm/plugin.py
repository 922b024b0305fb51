"""vLLM's own classes for a store: its configuration, its loader, and the manager of adapters."""

from collections.abc import Iterable
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import nn
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.v1.worker import lora_model_runner_mixin

from randes.checkpoints.huggingface import METHOD
from randes.errors import CheckpointError
from randes.superposition.superposition import Superposition
from randes.vllm.adapters import Adapters
from randes.vllm.methods import SERVED, StoreEmbeddingMethod, StoreLinearMethod, give_up_weight, kind_of
from randes.vllm.refusals import NotServedError, check
from randes.vllm.served import Served


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
        if not isinstance(config.additional_config or {}, dict):
            raise NotServedError("a store is not served with an additional_config that is no dictionary")
        # What was compiled of a store is kept by what this says, and must not serve one whose models differ elsewhere.
        config.additional_config = {**(config.additional_config or {}), METHOD: sorted(served.by_name)}
        ends = getattr(model_config.hf_config, "eos_token_id", None) or 0
        served.end = ends[0] if isinstance(ends, list) else ends
        attach(model, served, config.compilation_config.static_forward_context)


def attach(model: nn.Module, served: Served, by_name: dict[str, Any]) -> None:
    """Have a model's layers ask for what models differ in. by_name: where the operator looks."""
    for name, owners in served.owners.items():
        by_name[f"{METHOD}:{name}"] = served
        for layer, parameter in owners:
            give_up_weight(layer, parameter, name, served)
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
