"""Whether what is superposed of a Transformers model can be served, found out before any of its values are read."""

import functools
import warnings
from collections.abc import Iterable
from dataclasses import replace
from glob import escape
from typing import Any

from torch import nn

from randes.checkpoints.huggingface import class_named
from randes.checkpoints.matrices import Matrices, matrices_of
from randes.checkpoints.modules.parameters import is_transformers
from randes.checkpoints.sources import Checkpoint
from randes.config import Config
from randes.errors import CheckpointError
from randes.serving.base_layers import Layer, layers_of
from randes.serving.takeover import check_calls, obstacles
from randes.superposition.compress import compress as superpose
from randes.superposition.superposition import Superposition

FEW = 3


@functools.wraps(superpose)
def compress(base: Checkpoint, models: Any, config: Config | None = None, **kwargs: Any) -> Superposition:
    return superpose(base, models, servable(base, config or Config()), **kwargs)


def servable(base: Checkpoint, config: Config) -> Config:
    """The configuration for a base that is a model of Transformers or a folder of one, without the matrices of layers
    that cannot be served by several models' weights: they are kept per model, and named in a warning.

    Shapes are read, not values. Raises ``CheckpointError`` where the model cannot be served all the same, or nothing
    would be left to superpose.
    """
    found = _matrices(base, config)
    if found is None:
        return config
    module, layers = found
    stuck = [(why, tensors) for why, tensors in obstacles(module, layers) if tensors]
    names = sorted({name for _, tensors in stuck for name in tensors})
    if names:
        config = replace(config, exclude=(*config.exclude, *map(escape, names)))
        if {name for layer in layers for name in _superposed([layer])} <= {*names}:
            raise CheckpointError(f"a {type(module).__name__} cannot be served: {stuck[0][0]}")
        warnings.warn(
            f"{len(names)} tensors are kept per model and not superposed, because a {type(module).__name__} cannot be"
            f" served with them: {', '.join(names[:FEW])}{', ...' if len(names) > FEW else ''}",
            stacklevel=3,
        )
        found = _matrices(base, config)
        assert found is not None
        module, layers = found
    try:
        check_calls(module, layers)
    except ValueError as error:
        raise CheckpointError(f"a {type(module).__name__} cannot be served: {error}") from error
    return config


def _matrices(base: Checkpoint, config: Config) -> tuple[nn.Module, list[Layer]] | None:
    """A model of Transformers and its layers; None for anything else."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # who superposes it is warned
        found: Matrices = matrices_of(base, replace(config, centre=False, rank=0))
    module = found.module
    if module is None and (name := class_named(base)):
        raise CheckpointError(f"{base} cannot be served: no {name} can be made of its configuration")
    if module is None or not is_transformers(module):
        return None
    nothing = {"": ""}  # no digests: nothing is read
    superposition = Superposition(found.config, found.tensors, found.superposed, nothing, layout=found.layout)
    return module, layers_of(module, superposition, superposition.base.keys())  # models may differ in any


def _superposed(layers: Iterable[Layer]) -> set[str]:
    return {layer.tensors[name] for layer in layers for name in layer.views}
