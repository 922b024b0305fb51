"""A Transformers model and the store that goes with it, loaded by the names that Transformers uses."""

import os
from pathlib import Path
from typing import Any

from torch import nn

from randes.checkpoints.huggingface import (
    CONFIG,
    METHOD,
    check_version,
    config_of,
    configuration,
    library,
    model_class,
)
from randes.errors import StoreError
from randes.superposition.store.manifest import MANIFEST
from randes.superposition.superposition import Superposition


def load_base(
    path_or_name: str | os.PathLike[str], store: str | os.PathLike[str] | Superposition | None, **kwargs: Any
) -> tuple[nn.Module, Superposition]:
    """The base and the superposition for ``SuperposedModel.from_pretrained``, which says what is taken and raised."""
    if isinstance(path_or_name, nn.Module):
        raise ValueError(
            "path_or_name must be a folder or a name, as Transformers takes it, got a module: serve one of your own"
            " with randes.load(store, module)"
        )
    transformers = library()
    check_version(transformers)
    path = Path(path_or_name)
    if store is None:
        if not (path / MANIFEST).is_file() or not (path / CONFIG).is_file():
            raise StoreError(
                f"store must be given: {path} is not a store with a {CONFIG} (one whose base was a Transformers model)"
            )
        store = path
    superposition = store if isinstance(store, Superposition) else Superposition.load(store)
    if path.is_dir() and (text := config_of(path)) is not None:
        configuration(text, str(path))
    trust = {"trust_remote_code": kwargs.get("trust_remote_code", False)}  # nobody is asked
    config = kwargs.pop("config", None) or transformers.AutoConfig.from_pretrained(path_or_name, **trust)
    quantization = getattr(config, "quantization_config", None)
    if isinstance(quantization, dict) and quantization.get("quant_method") == METHOD:
        config.transformers_weights = quantization["base"]
        del config.quantization_config
    model: nn.Module = model_class(config, path_or_name).from_pretrained(path_or_name, config=config, **kwargs)
    return model, superposition


def opened(module: object, superposition: Superposition | str | os.PathLike[str]) -> Superposition:
    """What ``SuperposedModel`` serves: a superposition, or a store's. Raises ``ValueError`` for anything else."""
    if not isinstance(module, nn.Module):
        raise ValueError(f"base_module must be an nn.Module, got {type(module).__name__}")
    if isinstance(superposition, str | os.PathLike):
        return Superposition.load(superposition)
    if not isinstance(superposition, Superposition):
        raise ValueError(f"superposition must be one, or a store's folder, got {type(superposition).__name__}")
    return superposition
