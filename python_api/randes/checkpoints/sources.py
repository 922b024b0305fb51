"""Where one model's tensors come from, and whether they fit the base. Nothing here unpickles."""

import math
import os
from collections.abc import Mapping, Set
from hashlib import blake2b
from typing import TypeAlias

import torch
from torch import Tensor, nn

from randes.checkpoints import schema
from randes.checkpoints.files import read_whole
from randes.checkpoints.lazy_tensors import LazyTensors, digests
from randes.checkpoints.lora import ADAPTER_CONFIG, read_adapter
from randes.checkpoints.on_disk import StoredTensors, open_file
from randes.checkpoints.paths.folder import INDEX, files_of, index_of
from randes.checkpoints.paths.foreign import check_format, check_names
from randes.checkpoints.paths.hub import local
from randes.checkpoints.remote.locations import Location, location
from randes.checkpoints.remote.tensors import open_safetensors
from randes.checkpoints.safetensors import File, write_file
from randes.errors import CheckpointError

__all__ = ["Checkpoint", "Tensors", "digest", "read", "read_file", "write_file"]

Checkpoint: TypeAlias = nn.Module | Mapping[str, Tensor] | str | os.PathLike[str]
"""A model, a state dict, or a path: a safetensors file, a folder of shards, their index, or a LoRA adapter's folder; or
the name of one on the Hugging Face hub, ``owner/name`` or ``owner/name@revision``; or the address of such a file or
folder elsewhere, ``s3://bucket/model`` (``checkpoints/remote``)."""

Tensors: TypeAlias = Mapping[str, Tensor]
_INDEX = schema.record({"weight_map": schema.each(schema.file_below)}, more=True)


def read(source: Checkpoint, base: Mapping[str, Tensor] | None = None) -> Tensors:
    """The tensors of a checkpoint by name, detached, on the CPU; not copied where they are there already.

    What is on the meta device stays there, for its shapes (``check_values``).
    Those of a path are read when they are asked for (``StoredTensors``), their names, shapes and dtypes at once.
    base: what a LoRA adapter's update is of; without it an adapter is no checkpoint.
    Raises ``CheckpointError`` for a pickle, weights in few bits, a file that is not whole, or no tensors at all.
    """
    source = local(source)
    if isinstance(source, str | os.PathLike):
        path = location(source)
        if (path / ADAPTER_CONFIG).exists():
            return read_adapter(path, base)
        found = _open_path(path)
        check_names(str(path), found)
        return found
    if isinstance(source, LazyTensors):
        return source
    if isinstance(source, nn.Module):
        tensors = dict(source.state_dict(keep_vars=True))
    elif isinstance(source, Mapping):
        tensors = dict(source)
    else:
        raise CheckpointError(f"a checkpoint must be an nn.Module, a state dict or a path, got {type(source).__name__}")
    for name, value in tensors.items():
        if not isinstance(name, str) or not schema.is_utf8(name):
            raise CheckpointError(f"a tensor's name must be a text in UTF-8, got {name!r}")
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{name} must be a tensor, got {type(value).__name__}")
    if not tensors:
        raise CheckpointError("a checkpoint must hold tensors, got none")
    check_names(f"the {type(source).__name__}", tensors)
    # Tied tensors stay so, wherever they come from.
    moved = {id(value): value.detach() if value.is_meta else value.detach().cpu() for value in tensors.values()}
    return {name: moved[id(value)] for name, value in tensors.items()}


def _open_path(path: Location) -> StoredTensors:
    check_format(path)
    if path.name.endswith(INDEX):
        return _indexed(path)
    if not path.is_dir():
        if not path.exists():
            raise CheckpointError(f"{path} does not exist")
        return _some_tensors(path, open_file(path))
    if (index := index_of(path)) is not None:
        return _indexed(index)
    where: dict[str, tuple[File, str]] = {}
    for file in map(open_safetensors, files_of(path)):
        if twice := sorted(where.keys() & file.headers.keys()):
            raise CheckpointError(f"{path} must hold each tensor once, got {twice[0]} in {file.path.name} and before")
        where |= {name: (file, name) for name in file.headers}
    return _some_tensors(path, StoredTensors(where))


def weight_map(index: Location) -> dict[str, str]:
    """The file of each tensor, as Transformers and Diffusers write it. Raises ``CheckpointError`` for what is no index,
    and for files that are not beside it."""
    try:
        found = schema.parsed(read_whole(index), "it")
        _INDEX("it", found)
    except ValueError as error:
        raise CheckpointError(f"{index} must be an index with a weight_map: {error}") from error
    named: dict[str, str] = found["weight_map"]
    return named


def _indexed(index: Location) -> StoredTensors:
    """The shards that an index names."""
    by_file: dict[str, set[str]] = {}
    for name, beside in weight_map(index).items():
        by_file.setdefault(beside, set()).add(name)
    where: dict[str, tuple[File, str]] = {}
    for file_name, names in sorted(by_file.items()):
        path = index.parent / file_name
        if not path.is_file():
            raise CheckpointError(f"{index} names {file_name}, which is not a file beside it or below")
        file = open_safetensors(path)
        if absent := names - file.headers.keys():
            raise CheckpointError(f"{index} names {some(absent)} in {file_name}, which does not hold that")
        if extra := file.headers.keys() - names:
            raise CheckpointError(f"{index} must name every tensor of its shards, got {some(extra)} in {file_name}")
        where |= {name: (file, name) for name in sorted(names)}
    return _some_tensors(index, StoredTensors(where))


def _some_tensors(path: Location, tensors: StoredTensors) -> StoredTensors:
    if not tensors:
        raise CheckpointError(f"{path} must hold tensors, got none")
    return tensors


def read_file(path: Location) -> Tensors:
    """The tensors of one safetensors file. Raises ``CheckpointError`` for anything else."""
    return dict(open_file(path))


def digest(tensor: Tensor) -> str:
    """32 hexadecimal digits of BLAKE2b over a tensor's dtype, shape and bytes."""
    return digests({"": tensor})[""]


def combined_digest(digests: Mapping[str, str]) -> str:
    """One digest of many named ones, whatever their order."""
    lines = "".join(f"{name}\0{value}\n" for name, value in sorted(digests.items()))
    return blake2b(lines.encode(), digest_size=16).hexdigest()


def check_values(tensors: Tensors, whose: str) -> None:
    """Raise ``CheckpointError`` for tensors that are on the meta device, and have shapes alone."""
    for name, value in () if isinstance(tensors, LazyTensors) else tensors.items():
        if value.is_meta:
            raise CheckpointError(f"{whose} must have values, got {name} on the meta device")


def check_finite(name: str, part: Tensor) -> None:
    """Raise ``CheckpointError`` for NaN or infinity in a part of the tensor of this name."""
    if not part.is_floating_point() or (part.itemsize > 1 and math.isfinite(part.sum())):
        return  # forty times as fast as looking at each: a sum is finite only of what is
    if not torch.isfinite(part.float() if part.itemsize == 1 else part).all():  # torch looks at none of one byte
        raise CheckpointError(f"{name} must be finite, got NaN or infinity")


def some(names: Mapping[str, object] | Set[str]) -> str:
    """A few of the names, for messages."""
    few = sorted(names)[:5]
    return ", ".join(few) + (", …" if len(names) > len(few) else "")
