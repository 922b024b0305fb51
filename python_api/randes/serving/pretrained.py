"""A Transformers model and the store that goes with it, loaded by the names that Transformers uses."""

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from randes.checkpoints import schema, sources
from randes.checkpoints.files import read_whole
from randes.checkpoints.huggingface import (
    CONFIG,
    CUT_LATER,
    GENERATION,
    METHOD,
    base_file,
    check_one_device,
    check_version,
    config_of,
    configuration,
    for_store,
    library,
    model_class,
    model_files,
    on_meta,
)
from randes.checkpoints.lazy_tensors import headers
from randes.checkpoints.paths.folder import INDEX
from randes.checkpoints.paths.written import FILE, write_checkpoint
from randes.checkpoints.remote.locations import Remote, location
from randes.checkpoints.safetensors import File, write_file
from randes.checkpoints.sources import weight_map
from randes.errors import CheckpointError, RandesError, StoreError
from randes.superposition.store.manifest import MANIFEST
from randes.superposition.superposition import Superposition

FROM = ("revision", "subfolder", "cache_dir", "token", "local_files_only", "force_download", "proxies")
"""Arguments that say where a model is: its configuration is there too."""
CUTTING = ("tp_plan", "tp_size", "distributed_config", "device_mesh")
"""Arguments by which Transformers cuts a plain model."""
SLACK = 1 << 24
"""Elements of a model besides four times those of the base's tensors: masks and tables that no file has."""


def load_base(
    path_or_name: str | os.PathLike[str], store: str | os.PathLike[str] | Superposition | None, **kwargs: Any
) -> tuple[nn.Module, Superposition]:
    """The base and the superposition for ``SuperposedModel.from_pretrained``, which says what is taken and raised."""
    if isinstance(path_or_name, nn.Module):
        raise ValueError(
            "path_or_name must be a folder or a name, as Transformers takes it, got a module: serve one of your own"
            " with randes.load(store, module)"
        )
    check_version(library())
    check_one_device(kwargs.get("device_map"))
    if cut := [name for name in CUTTING if kwargs.get(name) is not None]:
        raise ValueError(f"{cut[0]} must be left out: {CUT_LATER}")
    path = location(path_or_name)
    if store is None:
        if not (path / MANIFEST).is_file() or not (path / CONFIG).is_file():
            raise StoreError(
                f"store must be given: {path} is not a store with a {CONFIG} (one whose base was a Transformers model)"
            )
        store = path
    superposition = store if isinstance(store, Superposition) else Superposition.load(store)
    if isinstance(path, Remote):
        with TemporaryDirectory(prefix="randes-") as folder:
            try:
                _fetch(path, Path(folder), superposition)
                return _loaded(folder, superposition, kwargs), superposition
            except CheckpointError as error:
                raise CheckpointError(str(error).replace(folder, str(path))) from error
    return _loaded(path_or_name, superposition, kwargs), superposition


def _fetch(path: Remote, folder: Path, superposition: Superposition) -> None:
    """Write the base at an address to a folder, for Transformers, which reads none: a store's, or a model's."""
    if not (path / MANIFEST).is_file():
        write_checkpoint(folder, sources.read(path), model_files(path))
        return
    # What the store was opened as, each tensor held to its digest: not what lies there now.
    write_file(folder / FILE, superposition.layout.joined(superposition.base, ties=False))
    for name, text in for_store(superposition.model_files, FILE).items():
        (folder / name).write_bytes(text)


def _loaded(path_or_name: str | os.PathLike[str], superposition: Superposition, kwargs: dict[str, Any]) -> nn.Module:
    """The base, as Transformers loads it."""
    transformers, path = library(), Path(path_or_name)
    with _own_errors(path_or_name):
        if path.is_dir():
            _check_files(path)
        source = {name: kwargs[name] for name in FROM if name in kwargs}
        trust = {"trust_remote_code": kwargs.get("trust_remote_code", False)}  # nobody is asked
        config = kwargs.pop("config", None) or transformers.AutoConfig.from_pretrained(path_or_name, **source, **trust)
        quantization = getattr(config, "quantization_config", None)
        if isinstance(quantization, dict) and quantization.get("quant_method") == METHOD:
            from randes.checkpoints.quantization import BASE_ALONE  # imports Transformers

            config.quantization_config = {"base": base_file(quantization), "quant_method": BASE_ALONE}
        kind = model_class(config, path_or_name)
        _check_size(kind, config, superposition, path_or_name)
        kwargs.setdefault("use_safetensors", True)  # nothing is unpickled
        model: nn.Module = kind.from_pretrained(path_or_name, config=config, **kwargs)
    check_one_device(getattr(model, "hf_device_map", None))  # what "auto" has become
    return model


def _check_files(folder: Path) -> None:
    """Raise ``ValueError`` for what Transformers would wait for, or look for elsewhere, or fill the memory with."""
    if (text := config_of(folder)) is not None:
        configuration(text, str(folder))
    for file in sorted(folder.iterdir()):
        if file.suffix == ".safetensors":
            File(file)
        elif file.name.endswith(INDEX):
            weight_map(file)
        elif file.name == GENERATION:  # which Transformers does without where it is broken
            schema.each(schema.anything)(GENERATION, schema.parsed(read_whole(file), GENERATION))
        elif file.suffix == ".json":
            read_whole(file)


def _check_size(kind: Any, config: Any, superposition: Superposition, where: object) -> None:
    """Raise ``CheckpointError`` for a model that is far larger than the superposition's base.

    Transformers fills what a file lacks with random numbers, as large as the configuration says it is.
    """
    base = headers(superposition.base)
    model = on_meta(kind, copy.deepcopy(config), len(base), where)
    made = sum(tensor.numel() for tensor in chain(model.parameters(), model.buffers()))
    most = SLACK + 4 * sum(tensor.numel() for tensor in base.values())
    if made > most:
        raise CheckpointError(f"{where} must have a model of at most {most} numbers, as the store's base, got {made}")


@contextmanager
def _own_errors(where: str | os.PathLike[str]) -> Iterator[None]:
    """Whatever Transformers has against a model's files ends as ``CheckpointError``; but not where memory is short, nor
    where a name's files cannot be reached."""
    passed = (RandesError, MemoryError, torch.OutOfMemoryError)
    try:
        yield
    except Exception as error:
        if isinstance(error, passed if Path(where).is_dir() else (*passed, OSError)):
            raise
        raise CheckpointError(f"{where} cannot be loaded by Transformers: {type(error).__name__}: {error}") from error


def opened(module: object, superposition: Superposition | str | os.PathLike[str]) -> Superposition:
    """What ``SuperposedModel`` serves: a superposition, or a store's. Raises ``ValueError`` for anything else."""
    if not isinstance(module, nn.Module):
        raise ValueError(f"base_module must be an nn.Module, got {type(module).__name__}")
    if isinstance(superposition, str | os.PathLike):
        return Superposition.load(superposition)
    if not isinstance(superposition, Superposition):
        raise ValueError(f"superposition must be one, or a store's folder, got {type(superposition).__name__}")
    return superposition
