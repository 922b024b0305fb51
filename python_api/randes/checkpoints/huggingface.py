"""What stands beside a Transformers model's weights and goes into the store of it: configuration, tokenizer, processor.

A store that has them is a folder that ``AutoModel.from_pretrained`` reads, once ``randes.transformers`` is imported;
without that it finds no weights there, so that nothing answers as the base by mistake.
"""

import importlib
import json
import os
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import nn

from randes.errors import BaseMismatchError

OLDEST = 5, 20
"""The first Transformers that serves all that is tested: 5.17 opens no store as a folder, 5.19 serves no experts."""
METHOD = "randes"
CONFIG = "config.json"
PATTERNS = (
    CONFIG, "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*",
    "merges.txt", "*.tiktoken", "spiece.model", "sentencepiece.*.model", "chat_template.*", "*processor_config.json",
)  # fmt: skip


def model_files(base: object) -> dict[str, bytes]:
    """The files by name: those of a Transformers folder, or what a Transformers module says of itself; else none."""
    if isinstance(base, nn.Module):
        return _of_module(base)
    if not isinstance(base, str | os.PathLike) or not (Path(base) / CONFIG).is_file():
        return {}
    files = (file for file in sorted(Path(base).iterdir()) if file.is_file())
    return {file.name: file.read_bytes() for file in files if is_model_file(file.name)}


def is_model_file(name: str) -> bool:
    """Whether a file of that name goes with a model's weights."""
    return any(fnmatchcase(name, pattern) for pattern in PATTERNS)


def config_of(source: object) -> bytes | None:
    """The configuration of a Transformers module, in a folder or beside a file; None where there is none."""
    if isinstance(source, nn.Module):
        return _of_module(source).get(CONFIG)
    if not isinstance(source, str | os.PathLike):
        return None
    path = Path(source)
    file = (path if path.is_dir() else path.parent) / CONFIG
    return file.read_bytes() if file.is_file() else None


def _of_module(module: nn.Module) -> dict[str, bytes]:
    config: Any = getattr(module, "config", None)
    if not hasattr(config, "to_json_string"):
        return {}
    values = json.loads(config.to_json_string())
    values["architectures"] = [type(module).__name__]
    values["dtype"] = str(next(module.parameters()).dtype).removeprefix("torch.")
    found = {CONFIG: json.dumps(values, indent=2).encode()}
    generation: Any = getattr(module, "generation_config", None)
    return found | ({"generation_config.json": generation.to_json_string().encode()} if generation is not None else {})


def for_store(files: dict[str, bytes], base_file: str) -> dict[str, bytes]:
    """The same files for a store whose base is in ``base_file``: the configuration names the method that loads it."""
    if CONFIG not in files:
        return files
    values = json.loads(files[CONFIG])
    values["quantization_config"] = {"quant_method": METHOD, "base": base_file}
    return {**files, CONFIG: (json.dumps(values, indent=2) + "\n").encode()}


def model_class(config: Any, path_or_name: object) -> Any:
    """The class that a configuration names first. Raises ``BaseMismatchError`` where Transformers has none such."""
    names = getattr(config, "architectures", None) or [""]
    found = getattr(library(), names[0], None) if names[0] else None
    if found is None:
        raise BaseMismatchError(f"{path_or_name} must name a class of Transformers in its architectures, got {names}")
    return found


def skeleton(base: object) -> nn.Module | None:
    """The model of a Transformers folder, on "meta", for what its layers say of its tensors.

    None for anything else, where Transformers is not installed, and for a model that it does not know.
    """
    if not isinstance(base, str | os.PathLike) or not (Path(base) / CONFIG).is_file():
        return None
    if importlib.util.find_spec("transformers") is None:
        return None
    transformers = library()
    try:
        config = transformers.AutoConfig.from_pretrained(base)
        with torch.device("meta"):
            model: nn.Module = model_class(config, base)(config)
    except (BaseMismatchError, KeyError, ValueError, OSError):
        return None
    return model


def library() -> Any:
    """Transformers. Raises ``ImportError`` with what to install."""
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise ImportError("this needs Transformers: pip install 'randes[transformers]'") from error


def check_version(transformers: Any) -> None:
    """Raise ``ImportError`` for a Transformers that is too old."""
    found = str(transformers.__version__)
    if tuple(int(number) for number in found.split(".")[:2]) < OLDEST:
        least = ".".join(map(str, OLDEST))
        raise ImportError(
            f"stores need Transformers {least} or later, got {found}: pip install 'transformers>={least}'"
        )
