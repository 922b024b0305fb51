"""The shapes of a model that is not at hand: on the meta device, or known by its configuration alone."""

import json
import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol, TypeAlias

import torch
from torch import nn

from randes.checkpoints.huggingface import CONFIG, config_of, configuration, library, model_class
from randes.checkpoints.paths.hub import NAME
from randes.checkpoints.remote.locations import Location, Remote, location
from randes.checkpoints.sources import Checkpoint
from randes.errors import CheckpointError

FILES = (".safetensors", ".json", ".gguf", ".bin", ".pt", ".pth")
"""Endings of files, which are no names of models."""


class Configuration(Protocol):
    """A Transformers configuration."""

    model_type: str


Shaped: TypeAlias = Checkpoint | Configuration
"""What has shapes: a checkpoint, a module on "meta", a Transformers configuration, or the name of such a model."""


def with_shapes(base: Shaped) -> Checkpoint:
    """A checkpoint, or a module on "meta", that has the shapes and dtypes of ``base``.

    Raises ``CheckpointError`` for a path where nothing is and whose name Transformers does not find, and for a
    configuration that Transformers makes no model of; ``ImportError`` where one is given and that is not installed.
    """
    if isinstance(base, str | os.PathLike):
        return _of_path(location(base))
    if isinstance(getattr(base, "model_type", None), str) and not isinstance(base, nn.Module):
        return _of_configuration(base, type(base).__name__)
    return base  # type: ignore[return-value]


def _of_path(path: Location) -> Checkpoint:
    if path.is_dir() and not any(path.glob("*.safetensors")) and (text := config_of(path)) is not None:
        values = configuration(text, str(path))
        if isinstance(path, Remote):
            return _of_configuration(_from_values(values), str(path))
        return _of_configuration(_named(str(path)), str(path))
    if isinstance(path, Remote):
        return path
    found = None if os.path.lexists(path) else NAME.fullmatch(path.as_posix())
    if found is None or path.suffix in FILES:
        return path
    return _of_configuration(_named(found["name"], found["revision"]), path.as_posix())


def _from_values(values: dict[str, Any]) -> Any:
    """The configuration that a text says, which is not in a folder here."""
    with TemporaryDirectory() as folder:
        (Path(folder) / CONFIG).write_text(json.dumps(values))
        return _named(folder)


def _named(name: str, revision: str | None = None) -> Any:
    """The configuration of a model that Transformers finds by its name."""
    try:
        return library().AutoConfig.from_pretrained(name, revision=revision or "main", trust_remote_code=False)
    except (OSError, ValueError) as error:
        said = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{name} is no path, and no model that Transformers finds: {said}") from error
    except ImportError as error:
        raise CheckpointError(f"{name} does not exist; to look it up as a model's name, {error}") from error


def _of_configuration(config: Any, where: str) -> nn.Module:
    transformers = library()
    try:
        with torch.device("meta"):
            if getattr(config, "architectures", None):
                model: nn.Module = model_class(config, where)(config)
            else:
                model = _by_its_kind(transformers, config)
    except Exception as error:  # whatever a class has against a configuration
        said = str(error).splitlines()[0]
        raise CheckpointError(f"Transformers makes no model of {where}: {said}") from error
    dtype = getattr(config, "dtype", None) or torch.float32
    return model.to(getattr(torch, dtype) if isinstance(dtype, str) else dtype)


def _by_its_kind(transformers: Any, config: Any) -> nn.Module:
    """A configuration that no model was saved with: the language model of its kind, or what there is."""
    try:
        made: nn.Module = transformers.AutoModelForCausalLM.from_config(config)
    except ValueError:
        made = transformers.AutoModel.from_config(config)
    return made
