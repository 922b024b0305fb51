"""What vLLM's server does with names: fine-tunes of the store by theirs, and paths with the version that it has now.

Each of these leaves other models as they were.
"""

from functools import cache, wraps
from typing import Any

from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.engine.serving import BaseServing
from vllm.exceptions import VLLMNotFoundError, VLLMValidationError
from vllm.lora.request import LoRARequest
from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry
from vllm.v1.engine.input_processor import InputProcessor

from randes.checkpoints.huggingface import METHOD
from randes.errors import RandesError, UnknownModelError
from randes.vllm.paths import paths_of
from randes.vllm.refusals import check, check_request


class StoreResolver(LoRAResolver):
    """Finds a fine-tune that the store has got, when somebody asks for it."""

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        """None where there is none of that name, or no store: the answer is 404 then."""
        try:
            return LoRARequest(lora_name, 1, paths_of(base_model_name).of(lora_name))
        except RandesError:
            return None


async def move_on(models: Any) -> None:
    """Give names whose versions have changed new adapters: requests under way keep theirs, and what was cached for
    them is not used for others."""
    paths = paths_of(models.model_config.model)
    for name, held in [*models.lora_requests.items()]:
        try:
            path = paths.current(held.lora_path)
            if path != held.lora_path:
                moved = LoRARequest(name, models.lora_id_counter.inc(1), path, held.base_model_name)
                await models.engine_client.add_lora(moved)
                models.lora_requests[name] = moved
        except Exception:  # it was removed from the store, or there is no room yet: it stays what it was
            continue


@cache
def register() -> None:
    """Once a process."""
    LoRAResolverRegistry.register_resolver(METHOD, StoreResolver())
    load, resolve = OpenAIServingModels.load_lora_adapter, OpenAIServingModels.resolve_lora
    begin, process = InputProcessor.__init__, InputProcessor.process_inputs
    by_content = BaseServing._get_active_default_mm_loras

    @wraps(load)
    async def load_lora_adapter(self: Any, request: Any, base_model_name: str | None = None) -> Any:
        if self.model_config.quantization != METHOD:
            return await load(self, request, base_model_name)
        name, before = request.lora_name, None
        try:
            path = paths_of(self.model_config.model).current(request.lora_path)
            request = request.model_copy(update={"lora_path": path})
        except (RandesError, ValueError):
            pass  # the engine says why
        if request.load_inplace:  # with a number of its own: requests under way keep theirs
            before = self.lora_requests.pop(name, None)
        result = await load(self, request, base_model_name)
        if isinstance(result, ErrorResponse):
            if before is not None:
                self.lora_requests.setdefault(name, before)
        else:
            await move_on(self)
        return result

    @wraps(resolve)
    async def resolve_lora(self: Any, lora_name: str) -> Any:
        result = await resolve(self, lora_name)
        if self.model_config.quantization == METHOD and isinstance(result, LoRARequest):
            await move_on(self)
        return result

    @wraps(by_content)
    def chosen_by_content(self: Any, request: Any) -> Any:
        # A fine-tune called "text" is not who answers the base's chats, whose messages have parts of that type.
        return None if self.model_config.quantization == METHOD else by_content(self, request)

    @wraps(begin)
    def __init__(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        if vllm_config.model_config.quantization == METHOD:
            check(vllm_config)  # here, too, where whoever starts it sees why
        begin(self, vllm_config, *args, **kwargs)

    @wraps(process)
    def process_inputs(self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        if self.model_config.quantization == METHOD:
            # (supported_tasks, arrival_time, lora_request, ...)
            lora = kwargs.get("lora_request", args[2] if len(args) > 2 else None)
            path = None if lora is None else lora.lora_path
            try:
                check_request(self.model_config.model, path, getattr(params, "prompt_logprobs", None))
            except UnknownModelError as error:
                raise VLLMNotFoundError(str(error)) from error
            except ValueError as error:
                raise VLLMValidationError(str(error)) from error
        return process(self, request_id, prompt, params, *args, **kwargs)

    OpenAIServingModels.load_lora_adapter = load_lora_adapter
    OpenAIServingModels.resolve_lora = resolve_lora
    BaseServing._get_active_default_mm_loras = chosen_by_content
    InputProcessor.__init__, InputProcessor.process_inputs = __init__, process_inputs
