"""Transformers models over a store, by the names that Transformers uses. It is imported at the first call only."""

import importlib
import os
from pathlib import Path
from typing import Any

from torch import nn

from randes.companions import CONFIG, METHOD
from randes.errors import BaseMismatchError, StoreError
from randes.model import SuperposedModel
from randes.store import MANIFEST
from randes.superposition import Superposition

OLDEST = 5, 20
"""The first Transformers that serves all that is tested: 5.17 opens no store as a folder, 5.19 serves no experts."""


def from_pretrained(
    path_or_name: str | os.PathLike[str], store: str | os.PathLike[str] | Superposition | None = None, *,
    capacity: int | None = None, **kwargs: Any,
) -> SuperposedModel:  # fmt: skip
    """A Transformers model over a store: the class that its configuration names, and every fine-tune in the store.

    path_or_name: the base, as Transformers' ``from_pretrained`` takes it; or the store itself, where that was made of
        a Transformers model.
    store: the store's folder, or a superposition at hand; ``path_or_name`` where it is left out.
    capacity: for how many models there shall be room (``SuperposedModel``).
    kwargs: for Transformers' ``from_pretrained``: ``dtype``, ``device_map``, ``attn_implementation``...
    Raises ``StoreError`` for a folder that is not such a store, ``BaseMismatchError`` for another base or a
    configuration that names no class of Transformers, and ``ImportError`` where that is not installed, or too old.
    """
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
    config = kwargs.pop("config", None) or transformers.AutoConfig.from_pretrained(path_or_name)
    quantization = getattr(config, "quantization_config", None)
    if isinstance(quantization, dict) and quantization.get("quant_method") == METHOD:
        config.transformers_weights = quantization["base"]
        del config.quantization_config
    model = model_class(config, path_or_name).from_pretrained(path_or_name, config=config, **kwargs)
    return SuperposedModel(model, superposition, capacity=capacity)


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
    import torch

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
