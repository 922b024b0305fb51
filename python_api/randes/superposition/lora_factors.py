"""LoRA adapters superposed factor by factor, as the published method's LoRA variant does it.

    D_A = Σ_j A_j turned,   D_B = Σ_j s_j B_j turned           two buffers of (r, K) and (N, r) for each weight
    Ŵ_j = W0 + scaling · B̂_j Â_j                               the factors retrieved, and multiplied then

Â_j and B̂_j both carry their neighbours, so the error of their product is √(J² − 1) times the update where J adapters
share a buffer. Superposing the products s B A themselves (``Superposition.add`` of the adapters' folders) leaves
√(J − 1) times it, for N · K numbers in place of r · (N + K).
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from os import PathLike

import torch
from torch import Tensor

from randes.checkpoints import sources
from randes.checkpoints.configurations import check_configuration
from randes.checkpoints.huggingface import model_files
from randes.checkpoints.lazy_tensors import Progress, silent
from randes.checkpoints.lora import AdapterTensors, Update, read_adapter
from randes.checkpoints.remote.locations import Location, location
from randes.checkpoints.sources import Checkpoint, Tensors
from randes.config import Config
from randes.errors import CheckpointError
from randes.superposition.compress import compress
from randes.superposition.superposition import Superposition

A, B = ".lora_A", ".lora_B"
"""What follows a weight's name for its factors: (r, K), and (N, r) times the adapter's own scaling."""


def superpose_adapters(
    base: Checkpoint, adapters: Mapping[str, str | PathLike[str]], config: Config | None = None, *,
    progress: Progress = silent,
) -> Superposition:  # fmt: skip
    """Superpose the factors of LoRA adapters, as PEFT writes them, measured from zero: see ``merge_adapter``.

    base: the model that they were trained on; only its shapes are read. adapters: their folders by name. All
    must change the same weights with the same rank.
    config: the factors' transforms; ``origin``, ``include``, ``exclude`` and ``min_width`` are set here.
    progress: as for ``compress``.
    Raises ``CheckpointError`` for an adapter that is not supported, keeps whole modules, or does not fit the first,
    and ``ValueError`` for no adapters and for what ``origin="zero"`` excludes.
    """
    if not adapters:
        raise ValueError("adapters must hold at least one adapter, got none")
    for folder in adapters.values():
        check_configuration(model_files(base), folder)
    tensors = sources.read(base)
    factors = {name: _factors(location(folder), tensors) for name, folder in adapters.items()}
    first = next(iter(factors.values()))
    zeros = {name: torch.zeros_like(value) for name, value in first.items()}
    config = replace(
        config or Config(), origin="zero", include=(f"*{A}", f"*{B}"), exclude=(), min_width=1, embeddings="shared"
    )
    return compress(zeros, factors, config, progress=progress)


def merge_adapter(superposition: Superposition, name: str, base: Checkpoint, *, scaling: float = 1.0) -> Tensors:
    """The base with one adapter's retrieved update, ``W0 + scaling · B̂ Â``, each tensor made when it is asked for.

    superposition: what ``superpose_adapters`` made. base: the model that the adapters were trained on.
    Raises ``UnknownModelError``, ``CheckpointError`` for a superposition of something else or another base, and
    ``ValueError`` for a scaling that is not finite.
    """
    if not math.isfinite(scaling):
        raise ValueError(f"scaling must be a finite number, got {scaling}")
    tensors, found = sources.read(base), superposition.retrieve(name)
    weights = [tensor.removesuffix(A) for tensor in found if tensor.endswith(A)]
    if not weights or len(found) != 2 * len(weights):
        raise CheckpointError(f"superposition must hold adapters' factors alone, got {next(iter(found))}")
    updates = {}
    for weight in weights:
        rows, columns = found[weight + B].double(), found[weight + A].double()
        shape = rows.shape[0], columns.shape[1]
        if weight not in tensors or tuple(tensors[weight].shape) != shape:
            raise CheckpointError(f"the base must have {weight} of {shape}, which the adapters were trained on")
        updates[weight] = Update(rows, columns, scaling)
    return AdapterTensors(tensors, updates, {})


def _factors(folder: Location, base: Tensors) -> dict[str, Tensor]:
    adapter = read_adapter(folder, base)
    if whole := adapter.touched - adapter.updates.keys():
        raise CheckpointError(f"{folder} must hold LoRA factors alone, got all of {min(whole)}")
    found: dict[str, Tensor] = {}
    for weight, (rows, columns, scaling) in adapter.updates.items():
        found |= {weight + A: columns.float(), weight + B: (scaling * rows).float()}
    return found
