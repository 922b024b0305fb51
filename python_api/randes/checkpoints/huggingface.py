"""What stands beside a Transformers model's weights and goes into the store of it: configuration, tokenizer, processor.

A store that has them is a folder that ``AutoModel.from_pretrained`` reads, once ``randes.transformers`` is imported;
without that it finds no weights there, so that nothing answers as the base by mistake.
"""

import importlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import get_ident
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from randes.checkpoints import schema
from randes.checkpoints.files import read_whole
from randes.checkpoints.paths.hub import local
from randes.checkpoints.remote.locations import Location, location
from randes.errors import BaseMismatchError, CheckpointError, StoreError

OLDEST = 5, 20
"""The first Transformers that serves all that is tested: 5.17 opens no store as a folder, 5.19 serves no experts."""
METHOD = "randes"
CUT_LATER = "several devices share it once it is served, by randes.parallel.parallelize (docs/several-devices.md)"
CONFIG, GENERATION = "config.json", "generation_config.json"
PATTERNS = (
    CONFIG, GENERATION, "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*",
    "merges.txt", "*.tiktoken", "spiece.model", "sentencepiece.*.model", "chat_template.*", "*processor_config.json",
)  # fmt: skip
COUNTS = re.compile(r"num_(.*_)?(layers|blocks|experts|labels|classes)|n_layers?|.*_layers|depths?")
"""Names of the numbers in a configuration that say how many parts a model has."""
MOST_PARTS = 1 << 16
IMPLEMENTATION = re.compile(r"_?(attn|experts)_implementation(_internal)?")
"""Names of what says which code computes a part. One with "/" is of a repository, and would be fetched and run."""
CONFIGURATION = schema.record(
    {},
    {
        "architectures": schema.either(schema.one_of(None), schema.listed(schema.text, most=64)),
        "model_type": schema.either(schema.one_of(None), schema.text),
        "quantization_config": schema.either(schema.one_of(None), schema.each(schema.anything)),
        "transformers_weights": schema.either(schema.one_of(None), schema.file_name),
    },
    more=True,
)


def model_files(base: object) -> dict[str, bytes]:
    """The files by name: those of a Transformers folder, or what a Transformers module says of itself; else none.

    Raises ``CheckpointError`` for a configuration that is none (``configuration``).
    """
    if isinstance(base, nn.Module):
        return _of_module(base)
    base = local(base)
    if not isinstance(base, str | os.PathLike) or not (location(base) / CONFIG).is_file():
        return {}
    names = sorted(file.name for file in location(base).iterdir() if is_model_file(file.name) and file.is_file())
    return read_files(location(base), names)


def read_files(folder: Location, names: Iterable[str], *, links: bool = True) -> dict[str, bytes]:
    """The bytes of each. links: whether they may be links. Raises ``CheckpointError`` as ``read_whole`` does, and for a
    configuration that is none."""
    found = {name: read_whole(folder / name, links=links) for name in names}
    if CONFIG in found:
        configuration(found[CONFIG], str(folder))
    return found


def configuration(text: bytes, where: str) -> dict[str, Any]:
    """What a ``config.json`` says. Raises ``CheckpointError`` for what is none, for a model of more parts than any
    has: making it would take the machine, and for one whose code is to come from elsewhere."""
    try:
        values: dict[str, Any] = schema.parsed(text, CONFIG)
        CONFIGURATION(CONFIG, values)
        _check_inside(CONFIG, "", values)
    except ValueError as error:
        raise CheckpointError(f"{where} must have a {CONFIG} that can be read: {error}") from error
    return values


def _check_inside(where: str, name: str, value: object) -> None:
    """name: the last key above the value."""
    if isinstance(value, dict):
        for key, inner in value.items():
            # A choice may be made for each part of a model.
            _check_inside(f"{where}.{key}", name if IMPLEMENTATION.fullmatch(name) else key, inner)
    elif isinstance(value, list):
        for inner in value:
            _check_inside(where, name, inner)
    elif isinstance(value, int | float) and COUNTS.fullmatch(name):
        schema.must(value <= MOST_PARTS, where, f"at most {MOST_PARTS}", value)
    elif isinstance(value, str) and IMPLEMENTATION.fullmatch(name):
        schema.must("/" not in value, where, "an implementation of Transformers itself", value)


def is_model_file(name: str) -> bool:
    """Whether a file of that name goes with a model's weights."""
    return any(fnmatchcase(name, pattern) for pattern in PATTERNS)


def config_of(source: object) -> bytes | None:
    """The configuration of a Transformers module, in a folder or beside a file; None where there is none."""
    if isinstance(source, nn.Module):
        return _of_module(source).get(CONFIG)
    source = local(source)
    if not isinstance(source, str | os.PathLike):
        return None
    path = location(source)
    file = (path if path.is_dir() else path.parent) / CONFIG
    return read_whole(file) if file.is_file() else None


def _of_module(module: nn.Module) -> dict[str, bytes]:
    config: Any = getattr(module, "config", None)
    if not hasattr(config, "to_json_string"):
        return {}
    values = json.loads(config.to_json_string())
    values["architectures"] = [type(module).__name__]
    values["dtype"] = str(next(module.parameters()).dtype).removeprefix("torch.")
    found = {CONFIG: json.dumps(values, indent=2).encode()}
    generation: Any = getattr(module, "generation_config", None)
    return found | ({GENERATION: generation.to_json_string().encode()} if generation is not None else {})


def for_store(files: dict[str, bytes], base_file: str) -> dict[str, bytes]:
    """The same files for a store whose base is in ``base_file``: the configuration names the method that loads it."""
    if CONFIG not in files:
        return files
    values = configuration(files[CONFIG], "the base")
    values["quantization_config"] = {"quant_method": METHOD, "base": base_file}
    return {**files, CONFIG: (json.dumps(values, indent=2) + "\n").encode()}


def base_file(quantization: Mapping[str, Any]) -> str:
    """The file of the base's weights, as ``for_store`` wrote it. Raises ``StoreError`` for what is not one's name."""
    try:
        schema.file_name(f"quantization_config.base of the {CONFIG}", name := quantization.get("base"))
    except ValueError as error:
        raise StoreError(str(error)) from error
    return str(name)


def model_class(config: Any, path_or_name: object) -> Any:
    """The class that a configuration names first. Raises ``BaseMismatchError`` where Transformers has none such."""
    names = getattr(config, "architectures", None) or [""]
    transformers = library()
    try:
        found = getattr(transformers, names[0], None) if names[0] else None
    except Exception:  # it is imported now, with whatever that needs
        found = None
    # Nothing else is called, whatever a file names.
    if not isinstance(found, type) or not issubclass(found, transformers.PreTrainedModel):
        raise BaseMismatchError(f"{path_or_name} must name a class of Transformers in its architectures, got {names}")
    return found


def skeleton(base: object, tensors: int) -> nn.Module | None:
    """The model of a Transformers folder, on "meta", for what its layers say of its tensors.

    tensors: how many there are in its files. None for anything else, where Transformers is not installed, and for a
    model that it does not know or cannot make. Raises ``CheckpointError`` for a configuration that is none, and for a
    model of many times as many parts.
    """
    text = config_of(base) if isinstance(base, str | os.PathLike) and location(base).is_dir() else None
    return None if text is None else skeleton_of(text, tensors, base)


def skeleton_of(text: bytes, tensors: int, where: object) -> nn.Module | None:
    """The same of a ``config.json``. where: for messages."""
    values = configuration(text, str(where))
    if (values.get("quantization_config") or {}).get("quant_method") == METHOD:
        del values["quantization_config"]
    if importlib.util.find_spec("transformers") is None:
        return None
    transformers = library()
    try:
        # Transformers reads infinity, written in a way of its own, from files alone.
        with TemporaryDirectory() as folder:
            (Path(folder) / CONFIG).write_text(json.dumps(values))
            config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        return on_meta(model_class(config, where), config, tensors, where)
    except CheckpointError:
        raise
    except Exception:  # whatever a class has against a configuration
        return None


def on_meta(kind: Any, config: Any, tensors: int, where: object) -> nn.Module:
    """A model of a class and a configuration without memory for its tensors. Raises ``CheckpointError`` for one of many
    times as many parts as there are tensors, and whatever the class does."""
    with torch.device("meta"), _parts_below(1000 + 50 * tensors, where):
        model: nn.Module = kind(config)
    return model


def class_of(base: object) -> Any:
    """The class of Transformers that a folder's configuration names first; None where there is none such, or no
    Transformers."""
    text = config_of(base) if isinstance(base, str | os.PathLike) and location(base).is_dir() else None
    if text is None or importlib.util.find_spec("transformers") is None:
        return None
    try:
        return model_class(SimpleNamespace(**configuration(text, str(base))), base)
    except BaseMismatchError:
        return None


def class_named(base: object) -> str:
    """The name of ``class_of``; empty where it is none, or Transformers is older than what stores are opened with."""
    return "" if not is_supported() or (found := class_of(base)) is None else str(found.__name__)


@contextmanager
def _parts_below(most: int, base: object) -> Iterator[None]:
    """Raise ``CheckpointError`` once so many modules and parameters were made in this thread."""
    thread, made = get_ident(), 0

    def count(*_: object) -> None:
        nonlocal made
        made += get_ident() == thread
        if made > most and get_ident() == thread:
            raise CheckpointError(f"{base} must have about as many layers as its {CONFIG} says, got far fewer tensors")

    hooks = register_module_module_registration_hook(count), register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def library() -> Any:
    """Transformers. Raises ``ImportError`` with what to install."""
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise ImportError("this needs Transformers: pip install 'randes[transformers]'") from error


def is_supported() -> bool:
    """Whether there is a Transformers that is new enough."""
    if importlib.util.find_spec("transformers") is None:
        return False
    return tuple(int(number) for number in str(library().__version__).split(".")[:2]) >= OLDEST


def check_version(transformers: Any) -> None:
    """Raise ``ImportError`` for a Transformers that is too old."""
    found = str(transformers.__version__)
    if not is_supported():
        least = ".".join(map(str, OLDEST))
        raise ImportError(
            f"stores need Transformers {least} or later, got {found}: pip install 'transformers>={least}'"
        )


def check_one_device(device_map: Any) -> None:
    """Raise ``ValueError`` for a ``device_map`` that puts a model on several devices, or parts of it on a disk."""
    devices = sorted({str(device) for device in device_map.values()}) if isinstance(device_map, Mapping) else []
    if len(devices) > 1 or devices == ["disk"]:
        raise ValueError(
            f"device_map must put a model that is served on one device, got {', '.join(devices)}: to move tensors from"
            f" one to another it replaces the forward of layers, whose products would then be the base's; {CUT_LATER}"
        )
