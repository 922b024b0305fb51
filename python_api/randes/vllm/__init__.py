"""vLLM serves a store: by ``randes serve STORE``, or by itself, once randes is installed beside it (docs/vllm.md).

LLM(store, load_format="randes", enable_lora=True, max_loras=8)
llm.generate(prompts, lora_request=LoRARequest("german", 1, randes.vllm.path_of(store, "german")))
"""

from randes.vllm.paths import path_of

__all__ = ["path_of", "register"]


def register() -> None:
    """Make vLLM know stores; it calls this in each of its processes. Other models are not touched."""
    from randes.vllm import front_end, plugin

    plugin.register()
    front_end.register()
