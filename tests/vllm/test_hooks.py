"""What the plugin relies on is in vLLM's sources: of the version installed, and of the next one, which is fetched."""

import ast
import re
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from run import ROOT, SOURCES, VLLM

PLUGIN = ROOT / "python_api" / "randes" / "vllm"
CALLED = {
    "lora/resolver.py": {
        "LoRAResolver.resolve_lora": "self base_model_name lora_name",
        "_LoRAResolverRegistry.register_resolver": "self resolver_name resolver",
    },
    "lora/request.py": {"LoRARequest": "lora_name lora_int_id lora_path base_model_name load_inplace"},
    "lora/layers/utils.py": {"LoRAMapping": "index_mapping prompt_mapping"},
    "entrypoints/openai/models/serving.py": {
        "OpenAIServingModels.load_lora_adapter": "self request base_model_name",
        "OpenAIServingModels.resolve_lora": "self lora_name",
    },
    "entrypoints/serve/engine/serving.py": {"BaseServing._get_active_default_mm_loras": "self request"},
    "v1/engine/input_processor.py": {
        "InputProcessor.__init__": "self vllm_config",
        "InputProcessor.process_inputs": "self request_id prompt params supported_tasks arrival_time lora_request",
    },
    "v1/worker/lora_model_runner_mixin.py": {"LoRAModelRunnerMixin.load_lora_model": "self model vllm_config device"},
    "model_executor/model_loader/__init__.py": {"register_model_loader": "load_format"},
    "model_executor/model_loader/base_loader.py": {
        "BaseModelLoader.download_model": "self model_config",
        "BaseModelLoader.load_weights": "self model model_config",
    },
    "model_executor/layers/quantization/__init__.py": {"register_quantization_config": "quantization"},
    "model_executor/layers/quantization/base_config.py": {"QuantizationConfig.get_quant_method": "self layer prefix"},
    "model_executor/layers/linear.py": {
        "UnquantizedLinearMethod.apply": "self layer x bias",
        "UnquantizedLinearMethod.process_weights_after_loading": "self layer",
    },
    "model_executor/layers/vocab_parallel_embedding.py": {
        "UnquantizedEmbeddingMethod.apply": "self layer x bias",
        "UnquantizedEmbeddingMethod.embedding": "self layer input_",
        "UnquantizedEmbeddingMethod.create_weights": "self layer",
        "UnquantizedEmbeddingMethod.process_weights_after_loading": "self layer",
    },
    "model_executor/layers/layernorm.py": {
        "RMSNorm.forward_native": "self x residual",
        "GemmaRMSNorm.forward_native": "self x residual",
        "LayerNorm.forward_native": "self x",
    },
    "forward_context.py": {"ForwardContext": "no_compile_layers"},
}
"""Of each function the arguments that it begins with, and of each class fields that it has."""
WRITTEN = {
    "v1/worker/lora_model_runner_mixin.py": ("self.lora_manager = LRUCacheWorkerLoRAManager(",),
    "config/vllm.py": ("vllm_factors.append(additional_config_hash)",),
    "compilation/backends.py": ("config_hash = vllm_config.compute_hash()",),
    "v1/core/kv_cache_utils.py": ("lora_request.lora_name, lora_request.lora_path",),
    "model_executor/model_loader/base_loader.py": ("self.load_weights(model, model_config)",),
    "model_executor/layers/logits_processor.py": ("lm_head.quant_method.apply(",),
    "model_executor/layers/vocab_parallel_embedding.py": (
        "self.use_fused_embedding = (", "if self.use_fused_embedding:", "self.quant_method.embedding(self,",
    ),
    "model_executor/layers/linear.py": ("self.skip_bias_add = skip_bias_add", "self.quant_method.apply(self, "),
    "model_executor/layers/layernorm.py": ("self.variance_epsilon = eps", "self.variance_size_override = (",
                                           "self.normalized_shape = (hidden_size,)", "self.eps = eps"),
    "entrypoints/openai/models/serving.py": (
        "self.lora_requests", "self.lora_id_counter", "self.engine_client.add_lora(", "self.model_config",
    ),
    "entrypoints/serve/engine/serving.py": (
        "request.model in self.models.lora_requests", "return self.models.lora_requests[request.model]",
        "raise VLLMNotFoundError(", "self.model_config",
    ),
    "exceptions.py": ("class VLLMNotFoundError(VLLMClientError)", "class VLLMValidationError(VLLMClientError)"),
}  # fmt: skip
"""What stands in a file as it is."""


@pytest.fixture(scope="module", params=[VLLM.partition("==")[2], pytest.param(SOURCES, marks=pytest.mark.nightly)])
def sources(request: pytest.FixtureRequest) -> Path:
    """Where the ``vllm`` package of a version is, as text."""
    if request.param != SOURCES:
        files = metadata.files(VLLM.partition("==")[0]) or []
        return Path(str(next(file.locate() for file in files if str(file) == "vllm/__init__.py"))).parent
    folder = ROOT / ".cache" / f"vllm-{SOURCES}"
    if not (folder / "vllm" / "__init__.py").is_file():  # a third of a GB, of which the Python is kept
        fetch = (sys.executable, "-m", "pip", "download", "--no-deps", "-d", str(folder), f"vllm=={SOURCES}")
        subprocess.run(fetch, check=True)
        (wheel,) = folder.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder, [name for name in archive.namelist() if name.endswith(".py")])
        wheel.unlink()
    return folder / "vllm"


def arguments(file: Path) -> dict[str, list[str]]:
    """Of each function and method the names of its arguments, and of each class its fields."""
    found: dict[str, list[str]] = {}
    for node in ast.parse(file.read_text("utf-8")).body:
        inner = node.body if isinstance(node, ast.ClassDef) else [node]
        prefix = f"{node.name}." if isinstance(node, ast.ClassDef) else ""
        for one in inner:
            if isinstance(one, ast.FunctionDef | ast.AsyncFunctionDef):
                found[prefix + one.name] = [argument.arg for argument in (*one.args.posonlyargs, *one.args.args)]
        if isinstance(node, ast.ClassDef):
            names = [
                one.target.id for one in inner if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name)
            ]
            found[node.name] = names
    return found


def test_what_is_called_or_replaced_takes_what_it_is_given(sources: Path) -> None:
    wrong = []
    for name, functions in CALLED.items():
        found = arguments(sources / name)
        for function, wanted in functions.items():
            have = found.get(function)
            if (
                have is None
                or ("." in function and have[: len(wanted.split())] != wanted.split())
                or not {*wanted.split()} <= {*have}
            ):
                wrong.append((name, function, have))
    assert wrong == []


def test_what_is_read_stands_there(sources: Path) -> None:
    assert [
        (name, text)
        for name, texts in WRITTEN.items()
        for text in texts
        if text not in (sources / name).read_text("utf-8")
    ] == []


def test_all_that_vllm_calls_on_the_manager_of_adapters_is_there(sources: Path) -> None:
    called = {
        name
        for file in (sources / "v1" / "worker").rglob("*.py")
        for name in re.findall(r"lora_manager\.(\w+)\(", file.read_text("utf-8"))
    }
    assert "set_active_adapters" in called
    own = {name.partition(".")[2] for name in arguments(PLUGIN / "plugin.py") if name.startswith("StoreAdapters.")}
    assert called <= own


def test_the_quantization_config_has_what_it_must(sources: Path) -> None:
    text = (sources / "model_executor" / "layers" / "quantization" / "base_config.py").read_text("utf-8")
    (config,) = [n for n in ast.parse(text).body if isinstance(n, ast.ClassDef) and n.name == "QuantizationConfig"]
    needed = {
        one.name
        for one in config.body
        if isinstance(one, ast.FunctionDef) and any("abstractmethod" in ast.unparse(d) for d in one.decorator_list)
    }
    own = {name.partition(".")[2] for name in arguments(PLUGIN / "plugin.py") if name.startswith("StoreConfig.")}
    assert needed <= own


def test_what_is_refused_has_a_name_in_the_configuration(sources: Path) -> None:
    """A flag that is called otherwise would be refused no more."""
    text = "\n".join(file.read_text("utf-8") for file in (sources / "config").glob("*.py"))
    read = re.findall(
        r"(?:model|parallel|lora|offload|config|cache_config)\.(\w+)", (PLUGIN / "refusals.py").read_text()
    )
    names = {name for name in read if name not in ("manifest", "get", "of", "check")}
    missing = {name for name in names if not re.search(rf"\b{name}\b\s*[:(]", text)}
    assert missing == set()
    assert "pipeline_parallel_size" in names
