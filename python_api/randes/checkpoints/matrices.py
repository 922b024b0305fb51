"""Which tensors of a base are superposed, and as which matrices (``layout.py``)."""

import warnings
from dataclasses import replace
from glob import escape
from typing import NamedTuple

import torch
from torch import nn

from randes.checkpoints import sources
from randes.checkpoints.huggingface import skeleton
from randes.checkpoints.layout import RESERVED, SUPERPOSABLE, Layout, layout_of
from randes.checkpoints.lazy_tensors import headers
from randes.checkpoints.modules.weight_reads import weights_read
from randes.checkpoints.names.conversion import Conversion
from randes.checkpoints.names.from_transformers import read_base
from randes.checkpoints.paths.foreign import FEW_BITS
from randes.checkpoints.paths.hub import local
from randes.checkpoints.sources import Checkpoint, Tensors
from randes.config import Config
from randes.errors import CheckpointError
from randes_kernels.mixing import MOST_DENSE_COLUMNS


class Matrices(NamedTuple):
    """A base's tensors as they are superposed or kept, how they are that, and which of them are superposed.

    config: with names in place of a function that chose them. to_files: back to the tensors of its files.
    module: what they belong to, where that is known; of a folder, on "meta".
    """

    tensors: Tensors
    layout: Layout
    superposed: list[str]
    config: Config
    to_files: Conversion
    module: nn.Module | None


def matrices_of(base: Checkpoint, config: Config) -> Matrices:
    """A base as a superposition has it.

    Raises ``CheckpointError`` for a base without a matrix to superpose, for a matrix whose columns
    ``config.segments`` does not divide, and for one that is too wide for ``config.matrix``.
    """
    base = local(base)
    tensors = sources.read(base)
    asked: list[str] = []
    if callable(choose := config.include):

        def include(name: str, shape: tuple[int, ...]) -> bool:
            if found := bool(choose(name, shape)):
                asked.append(name)
            return found

        config = replace(config, include=include)
    module, to_files = base if isinstance(base, nn.Module) else skeleton(base, len(tensors)), Conversion()
    if module is not None and module is not base:
        tensors, to_files = read_base(module, tensors, base)
    if taken := [name for name in headers(tensors) if name.endswith(RESERVED)]:
        raise CheckpointError(f"a tensor's name must not end with {', '.join(RESERVED)}, got {taken[0]!r}")
    layout = layout_of(tensors, config, module)
    chosen = _every(config.every, tensors, layout, config, _read_by_code(module, layout))
    layout = Layout({name: view for name, view in layout.views.items() if name in chosen}, layout.ties)
    tensors = layout.split(tensors)
    superposed = [name for name in headers(tensors) if layout.parts.get(name, name) in chosen]
    if not superposed:
        for name, value in headers(tensors).items():
            if value.dtype.itemsize == 1 and value.dim() > 1 and value.dtype != torch.bool:
                raise CheckpointError(f"{name} is {value.dtype}: {FEW_BITS}")
        every = f", every = {config.every} of them" if config.every > 1 else ""
        raise CheckpointError(
            f"the base must have a matrix to superpose: fp32, fp16 or bf16, at least {config.min_width} wide,"
            f" matching {config.included} and not {config.exclude}{every}; got none in {len(tensors)} tensors"
        )
    for name in superposed:
        if config.matrix == "dense" and (columns := headers(tensors)[name].shape[1]) > MOST_DENSE_COLUMNS:
            raise CheckpointError(
                f'{name} must have at most {MOST_DENSE_COLUMNS} columns with matrix="dense", got {columns}:'
                f" an inverse of it would take {4 * columns**2 / 1e9:.2g} GB for each model"
            )
        if (columns := headers(tensors)[name].shape[1]) % config.segments:
            raise CheckpointError(f"{name} must have a multiple of {config.segments} columns, got {columns}")
    if asked:
        config = replace(config, include=tuple(escape(name) for name in dict.fromkeys(asked)))
    return Matrices(tensors, layout, superposed, config, to_files, module)


def _read_by_code(module: nn.Module | None, layout: Layout) -> set[str]:
    """The tensors whose values a model's code reads past their layers."""
    read = set() if module is None else weights_read(module)
    return {layout.ties.get(name, name) for name in read}


def _every(count: int, tensors: Tensors, layout: Layout, config: Config, read: set[str]) -> set[str]:
    """The tensors that are superposed: of those that the configuration selects, in their order, each ``count``-th.

    read: those that cannot be, because their values are read.
    """
    selected = [
        name for name, value in headers(tensors).items()
        if name in layout.views or (
            name not in layout.ties and value.dtype in SUPERPOSABLE and config.selects(name, tuple(value.shape))
        )
    ]  # fmt: skip
    if own := [name for name in selected if name in read]:
        warnings.warn(
            f"{len(own)} matrices are kept per model and not superposed, because the model's code reads their values"
            f" past their layers: {', '.join(own[:3])}{', ...' if len(own) > 3 else ''}",
            stacklevel=2,
        )
    return set([name for name in selected if name not in read][count - 1 :: count])
