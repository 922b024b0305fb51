"""Checkpoints that are not of plain weights in safetensors: what they are, and how to make one that is."""

import json
from collections.abc import Iterable
from fnmatch import fnmatchcase

from randes.checkpoints.files import read_whole
from randes.checkpoints.huggingface import CONFIG, METHOD
from randes.checkpoints.remote.locations import Location
from randes.checkpoints.schema import parsed
from randes.errors import CheckpointError

OTHER_FILES = {
    "*.gguf": "GGUF",
    "pytorch_model*.bin": "pickles (pytorch_model.bin), which can run code when they are opened",
    "*.pth": "pickles, which can run code when they are opened",
    "*.pt": "pickles, which can run code when they are opened",
    "*.ckpt": "pickles, which can run code when they are opened",
    "tf_model.h5": "TensorFlow's weights",
    "flax_model.msgpack": "Flax's weights",
    "*.onnx": "ONNX",
}
"""By the names of their files, in a folder without safetensors."""
QUANTIZED = {
    "*.qweight": "GPTQ or AWQ", "*.qzeros": "GPTQ or AWQ", "*.absmax": "bitsandbytes", "*.quant_map": "bitsandbytes",
    "*.quant_state.*": "bitsandbytes", "*.SCB": "bitsandbytes", "*.weight_packed": "compressed-tensors",
    "*.weight_scale_inv": "fp8", "*.weight_scale": "fp8", "*_blocks": "MXFP4",
}  # fmt: skip
"""By the names of tensors that are beside weights in few bits."""
BY_LOADING = {
    "fp8": "FineGrainedFP8Config", "mxfp4": "Mxfp4Config", "compressed-tensors": "CompressedTensorsConfig",
    "metal": "MetalConfig",
}  # fmt: skip
"""Methods that Transformers undoes while it loads, by their configuration's class."""
BY_CALL = ("bitsandbytes", "higgs")
"""Those that ``model.dequantize()`` undoes."""

FEW_BITS = (
    "weights in few bits are superposed as what they were made of. Give the checkpoint in fp32, fp16 or bf16, or load"
    " it with Transformers, call model.dequantize(), and save that"
)
"""Of single tensors."""


def check_format(path: Location) -> None:
    """Raise ``CheckpointError`` for a store, for weights in few bits by a folder's configuration, and for other files
    than safetensors."""
    if not path.is_dir():
        if path.suffix == ".gguf":
            raise CheckpointError(_gguf(path, path.parent, path.name))
        return
    if _is_store(path):
        raise CheckpointError(f"{path} is a store of randes, not a checkpoint; retrieve one of its models first")
    if method := _method(path):
        raise CheckpointError(few_bits(str(path), method))
    if any(path.glob("*.safetensors")):
        return
    for pattern, what in OTHER_FILES.items():
        if found := sorted(file.name for file in path.glob(pattern)):
            if pattern == "*.gguf":
                raise CheckpointError(_gguf(path, path, found[0]))
            raise CheckpointError(
                f"{path} holds no *.safetensors file but {what}: save it as safetensors"
                " (AutoModel.from_pretrained(path).save_pretrained(folder)) and give that folder"
            )


def check_names(where: str, names: Iterable[str]) -> None:
    """Raise ``CheckpointError`` for tensors that are only there beside weights in few bits."""
    for name in names:
        for pattern, method in QUANTIZED.items():
            if fnmatchcase(name, pattern):
                raise CheckpointError(few_bits(where, method, f" (it has {name})"))


def few_bits(where: str, method: str, seen: str = "") -> str:
    """What is said of weights in few bits."""
    if method.lower() in BY_LOADING:
        config = BY_LOADING[method.lower()]
        how = f"load it with from_pretrained(path, quantization_config=transformers.{config}(dequantize=True))"
    elif method.lower() in BY_CALL:
        how = "load it with Transformers and call model.dequantize()"
    else:
        return (
            f"{where} is quantised, by {method}{seen}: weights in fp32, fp16 or bf16 are superposed, and Transformers"
            " does not turn these back into such. Give the model that it was made from"
        )
    return (
        f"{where} is quantised, by {method}{seen}: weights in fp32, fp16 or bf16 are superposed. Give the model that it"
        f" was made from; or {how}, save it with save_pretrained, and give that folder"
    )


def _gguf(path: Location, folder: Location, name: str) -> str:
    return (
        f"{path} is GGUF: weights in safetensors are superposed. Give the model that it was made from; or load it with"
        f' Transformers (from_pretrained("{folder}", gguf_file="{name}",'
        " quantization_config=transformers.GgufConfig(dequantize=True))), save it with save_pretrained, and give that"
        " folder"
    )


def _is_store(folder: Location) -> bool:
    try:
        manifest = json.loads(read_whole(folder / "manifest.json"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(manifest, dict) and manifest.get("format") == METHOD


def _method(folder: Location) -> str | None:
    """The method that a folder's configuration names for its weights in few bits."""
    for file, keys in ((CONFIG, ("quantization_config", "compression_config")), ("quantize_config.json", ("",))):
        try:
            values = parsed(read_whole(folder / file), file)
        except (OSError, ValueError):  # it is refused, or missed, where it is needed
            continue
        for key in keys:
            found = values if key == "" else values.get(key) if isinstance(values, dict) else None
            if isinstance(found, dict) and found:
                method = str(found.get("quant_method") or ("gptq" if key == "" else "an unknown method"))
                return None if method == METHOD else method
    return None
