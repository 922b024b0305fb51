"""What of vLLM a store is not served with: found before anything is loaded."""

import os
from typing import Any

from randes.errors import RandesError
from randes.vllm.paths import paths_of

START = "start it with 'randes serve STORE', which gives the flags that are needed"


class NotServedError(RandesError, ValueError):
    """vLLM was started with something that a store cannot be served with."""


def check(config: Any) -> None:
    """Raise ``NotServedError`` for what a ``VllmConfig`` has that would be answered wrongly, or as the base."""
    model, parallel = config.model_config, config.parallel_config
    required = {
        "--enable-lora, by which requests name their fine-tunes": config.lora_config is not None,
        "--load-format randes": str(config.load_config.load_format) == "randes",
    }
    for what, there in required.items():
        if not there:
            raise NotServedError(f"a store must be served with {what}: {START}")
    lora, offload = config.lora_config, config.offload_config
    refused = {
        "pipeline parallelism (--pipeline-parallel-size)": parallel.pipeline_parallel_size > 1,
        "data parallelism (--data-parallel-size); start a server for each": parallel.data_parallel_size > 1,
        "context parallelism": parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1,
        "dual batch overlap (--enable-dbo)": parallel.enable_dbo,
        "speculative decoding (--speculative-config)": config.speculative_config is not None,
        "--enable-sleep-mode": model.enable_sleep_mode,
        "--enable-prompt-embeds": model.enable_prompt_embeds,
        "--kv-sharing-fast-prefill": config.cache_config.kv_sharing_fast_prefill,
        "--fully-sharded-loras": lora.fully_sharded_loras,
        "online quantization (--quantization-config)": model.quantization_config is not None,
        "weights that are offloaded (--cpu-offload-gb)": offload.uva.cpu_offload_gb
        + offload.prefetch.offload_group_size
        > 0,
        "a head in another dtype (head_dtype)": model.head_dtype != model.dtype,
        "models of images or sound": model.is_multimodal_model,
        "an encoder beside the decoder": model.is_encoder_decoder,
        "a latent attention, which reads weights past their layers (MLA)": model.use_mla,
        "pooling models (--runner pooling)": model.runner_type != "generate",
        "VLLM_SKIP_MODEL_NAME_VALIDATION, which answers any name as the base": os.environ.get(
            "VLLM_SKIP_MODEL_NAME_VALIDATION", "0"
        ).lower()
        not in ("0", "false", ""),
    }
    for what, there in refused.items():
        if there:
            raise NotServedError(f"a store is not served with {what} (docs/vllm.md)")


def check_request(store: str, path: str | None, prompt_logprobs: object) -> None:
    """Raise ``ValueError`` for a request that would be answered wrongly. path: of its adapter; None for the base.

    Raises ``UnknownModelError`` for a fine-tune that is not in the store.
    """
    paths = paths_of(store)
    if path is not None:
        paths.check(path)
    elif paths.manifest["config"].get("origin") == "zero":
        raise ValueError("model must be a fine-tune's name: this store has no base (origin='zero')")
    if prompt_logprobs is not None:
        raise ValueError("prompt_logprobs must be left out: whose head the prompt's rows need is not known there")
