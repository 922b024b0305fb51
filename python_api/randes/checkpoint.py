"""Reading, checking and writing one model's tensors. Nothing here unpickles."""

import os
from collections.abc import Mapping, Set
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from typing import TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from randes.errors import CheckpointError

Checkpoint: TypeAlias = nn.Module | Mapping[str, Tensor] | str | os.PathLike[str]
"""A model, a state dict, or a path: a safetensors file, or a folder of them."""

Tensors: TypeAlias = dict[str, Tensor]


def read(source: Checkpoint) -> Tensors:
    """The tensors of a checkpoint by name, detached, on the CPU; not copied where they are there already.

    Raises ``CheckpointError`` for a pickle, a file that is not whole, or no tensors at all.
    """
    if isinstance(source, nn.Module):
        tensors = dict(source.state_dict(keep_vars=True))
    elif isinstance(source, Mapping):
        tensors = dict(source)
    elif isinstance(source, str | os.PathLike):
        tensors = _read_path(Path(source))
    else:
        raise CheckpointError(f"a checkpoint must be an nn.Module, a state dict or a path, got {type(source).__name__}")
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{name} must be a tensor, got {type(value).__name__}")
    if not tensors:
        raise CheckpointError("a checkpoint must hold tensors, got none")
    # Tied tensors stay so, wherever they come from.
    moved = {id(value): value.detach().cpu() for value in tensors.values()}
    return {name: moved[id(value)] for name, value in tensors.items()}


def _read_path(path: Path) -> Tensors:
    if path.is_dir():
        files = sorted(path.glob("*.safetensors"))
        if not files:
            raise CheckpointError(f"{path} holds no *.safetensors file")
    elif path.exists():
        files = [path]
    else:
        raise CheckpointError(f"{path} does not exist")
    tensors: Tensors = {}
    for file in files:
        held = read_file(file)
        if twice := sorted(tensors.keys() & held.keys()):
            raise CheckpointError(f"{path} must hold each tensor once, got {twice[0]} in {file.name} and before")
        tensors |= held
    return tensors


def read_file(path: Path) -> Tensors:
    """The tensors of one safetensors file. Raises ``CheckpointError`` for anything else."""
    try:
        with safe_open(path, framework="pt") as tensors:
            return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 (not a mapping)
    except SafetensorError as error:
        # Only now: a safetensors file may begin with a pickle's first bytes, a pickle is never a safetensors file.
        with path.open("rb") as file:
            start = file.read(2)
        if start[:1] == b"\x80" or start == b"PK":
            raise CheckpointError(
                f"{path} is a pickle, which can run code when it is opened; save it as safetensors"
                " (safetensors.torch.save_file(model.state_dict(), path))"
            ) from error
        raise CheckpointError(f"{path} is not a whole safetensors file: {error}") from error


def write_file(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file beside ``path``, flush it to disk, and rename it: all of it, or nothing."""
    seen: set[int] = set()
    separate: Tensors = {}
    for name, value in tensors.items():
        value = value.detach().cpu().contiguous()
        # Tied tensors share storage, which the file format does not; each name gets its own copy.
        storage = value.untyped_storage()
        whole = storage.nbytes() == value.nbytes and storage.data_ptr() not in seen
        separate[name] = value if whole else value.clone()
        seen.add(storage.data_ptr())
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file(separate, beside)
        replace(beside, path)
    except SafetensorError as error:
        raise CheckpointError(f"{path} could not be written: {error}") from error
    finally:
        with suppress(FileNotFoundError):
            beside.unlink()


def replace(beside: Path, path: Path) -> None:
    """Rename ``beside`` to ``path`` so that a crash at any moment leaves the old file or the new one."""
    with beside.open("rb") as file:
        os.fsync(file.fileno())
    beside.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def digest(tensor: Tensor) -> str:
    """32 hexadecimal digits of BLAKE2b over a tensor's dtype, shape and bytes."""
    state = blake2b(f"{tensor.dtype} {tuple(tensor.shape)} ".encode(), digest_size=16)
    flat = tensor.detach().cpu().contiguous().flatten()
    if flat.numel():
        state.update(flat.view(torch.uint8).numpy().data)
    return state.hexdigest()


def combined_digest(digests: Mapping[str, str]) -> str:
    """One digest of many named ones, whatever their order."""
    lines = "".join(f"{name}\0{value}\n" for name, value in sorted(digests.items()))
    return blake2b(lines.encode(), digest_size=16).hexdigest()


def check_fits(tensors: Tensors, base: Tensors, free: Set[str] = frozenset()) -> None:
    """Raise ``CheckpointError`` unless ``tensors`` has the base's names, shapes and dtypes, and finite values.

    free: names of tensors whose shapes may differ.
    """
    if not tensors.keys() & base.keys():
        raise CheckpointError(f"no tensor matches the base; it has {_some(base)}, the checkpoint {_some(tensors)}")
    if missing := base.keys() - tensors.keys():
        raise CheckpointError(f"{len(missing)} tensors of the base are missing from the checkpoint: {_some(missing)}")
    if extra := tensors.keys() - base.keys():
        raise CheckpointError(f"{len(extra)} tensors of the checkpoint are not in the base: {_some(extra)}")
    for name, own in base.items():
        value = tensors[name]
        if (value.shape != own.shape and name not in free) or value.dtype != own.dtype:
            raise CheckpointError(
                f"{name} must be {tuple(own.shape)} {own.dtype} as in the base, got {tuple(value.shape)} {value.dtype}"
            )
    check_finite(tensors)


def check_finite(tensors: Tensors) -> None:
    """Raise ``CheckpointError`` for NaN or infinity."""
    for name, value in tensors.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise CheckpointError(f"{name} must be finite, got NaN or infinity")


def _some(names: Mapping[str, object] | set[str]) -> str:
    few = sorted(names)[:5]
    return ", ".join(few) + (", …" if len(names) > len(few) else "")
