"""A base and all of its fine-tunes, made into one superposition."""

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch

from randes.basis import loudest
from randes.checkpoint import Checkpoint, Tensors
from randes.config import Config
from randes.superposition import Superposition


def compress(
    base: Checkpoint,
    models: Mapping[str, Checkpoint],
    config: Config | None = None,
    *,
    step: Callable[[], None] = lambda: None,
) -> Superposition:
    """Superpose all of ``models``, fine-tunes of ``base`` by name.

    With ``config.centre`` the stored base is ``W0 + mean δ``, the mean of the fine-tunes, in the superposed matrices.
    Deltas measured from it are smaller by what they have in common, and so is the interference. ``W0`` itself
    is then one more superposed model, ``"__base__"``, in the first group: it carries interference like any other. A
    model added later is measured from the same centre.

    With ``config.rank`` each superposed matrix gets a shared basis of that many directions, the loudest of the deltas
    at hand; every model keeps its own delta in them, at ``2 · rank · (N + K / J)`` bytes a matrix and model.
    (``basis.py``; design, section 2.)

    step: called after each model, for a progress bar.
    Raises ``ValueError`` for no models, and whatever ``Superposition.create`` and ``add`` raise.
    """
    config = config or Config()
    if not models:
        raise ValueError("models must hold at least one fine-tune, got none")
    superposition = Superposition.create(base, replace(config, centre=False, rank=0))
    original, superposed = superposition.base, superposition.superposed
    if config.centre or config.rank:
        stored = _centred(superposition, models) if config.centre else original
        bases = loudest(models, stored, superposed, config.rank, config.seed, superposition.read) if config.rank else {}
        companions = superposition.companions
        superposition = Superposition(config, stored, superposed, bases=bases, layout=superposition.layout)
        superposition.companions = companions
    if config.centre:
        superposition.add_base(superposition.layout.join(original))
    for name, finetuned in models.items():
        superposition.add(name, finetuned)
        step()
    return superposition


def _centred(superposition: Superposition, models: Mapping[str, Checkpoint]) -> Tensors:
    """The base with the mean of the models in place of each superposed matrix.

    Summed in fp64, in the order of the models' names, so that the order in which they come does not matter.
    """
    base = superposition.base
    sums = {tensor: torch.zeros(base[tensor].shape, dtype=torch.float64) for tensor in superposition.superposed}
    for name in sorted(models):
        tensors = superposition.read(models[name])
        for tensor, total in sums.items():
            total += tensors[tensor].double() - base[tensor].double()
    means = {
        tensor: (base[tensor].double() + total / len(models)).to(base[tensor].dtype) for tensor, total in sums.items()
    }
    return {**base, **means}
