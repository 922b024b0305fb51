"""A base and all of its fine-tunes, made into one superposition."""

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from difflib import get_close_matches
from glob import escape
from typing import Any

import torch
from torch import Tensor

from randes.checkpoints import sources
from randes.checkpoints.configurations import check_configuration
from randes.checkpoints.lazy_tensors import Progress, chunk_bounds, chunks, headers, silent, size
from randes.checkpoints.sources import Checkpoint, Tensors
from randes.checkpoints.tensor_views import replaced
from randes.checkpoints.threads import one_thread
from randes.config import Config
from randes.errors import CheckpointError
from randes.superposition import update
from randes.superposition.basis.calibration import calibrated, matched
from randes.superposition.basis.shared_basis import PASSES, loudest
from randes.superposition.members import BASE_NAME, NewModel, check_alpha, check_name
from randes.superposition.reading import heads_of_others, read
from randes.superposition.state import State
from randes.superposition.superposition import Superposition


def compress(
    base: Checkpoint,
    models: Mapping[str, Checkpoint],
    config: Config | None = None,
    *,
    alpha: float = 1.0,
    calibration: Mapping[str, Tensor] | None = None,
    progress: Progress = silent,
    **options: Any,
) -> Superposition:
    """Superpose all of ``models``, fine-tunes of ``base`` by name.

    config: by default ``Config()``, the best default: shared bases of rank "auto". options: fields of
    ``Config`` that replace the configuration's, as in ``compress(base, models, group_size=4)``.

    Checkpoints are read tensor by tensor. Only the superposition and two tensors are in memory, however many models
    there are. A base that is a path stays on the disk.

    With ``config.centre`` the stored base is ``W0 + mean δ``, the mean of the fine-tunes, in the superposed matrices.
    What the deltas have in common is then in the base, so they are smaller, and so is the interference. ``W0`` itself
    is one more superposed model, ``"__base__"``, in the first group, and carries interference like any other. A
    model that is added later is measured from the same centre.

    With ``config.rank`` each superposed matrix gets a shared basis of that many directions, those in which the deltas
    are loudest. Every model keeps its own delta in them, at ``2 · rank · (N + K / J)`` bytes a matrix and model. With
    "auto" each matrix has as many directions as hold at least 2 % each of the deltas' energy. Models that are
    added later keep their own delta in the same directions. (``basis/shared_basis.py``; design, section 2.)

    If a model's head has another number of classes than the base's, it is kept exactly, and so is every other model's.

    alpha: the factor of all models' deltas when they are used: the scaling factor of superposed task arithmetic,
        or 1 / J for the average of a model soup (``origin="zero"``).
    calibration: what ``randes.calibrate`` returned: take the directions that are loudest in the layers' inputs instead.
    progress: called with each stage's name and the bytes that it will read. What it returns is called with the number
        of bytes each time some were read.
    Raises ``TypeError`` for an option that ``Config`` does not have, ``ValueError`` for no models, for an ``alpha``
    that is not finite in fp32 and for a calibration that does not fit, and whatever ``Superposition.create`` and
    ``add`` raise.
    """
    config = with_options(config or Config(), options).resolved(together=True)
    check_models(models, config, alpha, calibration)
    superposition = Superposition.create(base, replace(config, centre=False, rank=0), progress=progress)
    sources, config = read_all(superposition, models, config)
    if not sources:  # there are heads of other sizes, which are kept whole
        return compress(base, models, config, alpha=alpha, calibration=calibration, progress=progress)
    return together(superposition, sources, config, alpha=alpha, calibration=calibration, progress=progress)


def check_models(
    models: Mapping[str, Checkpoint], config: Config, alpha: float, calibration: Mapping[str, Tensor] | None = None
) -> None:
    """Raise ``ValueError`` for what ``compress`` does not take."""
    if not models:
        raise ValueError("models must hold at least one fine-tune, got none")
    check_alpha(alpha)
    for name in models:
        check_name(name)
    if calibration is not None and not config.rank:
        raise ValueError("calibration is for shared bases: config.rank must be 'auto' or above 0, got 0")


def read_all(sup: State, models: Mapping[str, Checkpoint], config: Config) -> tuple[dict[str, Tensors], Config]:
    """The models' tensors over a base; none where some have heads of other sizes, which the configuration then keeps.

    Raises ``CheckpointError`` for a model that does not fit, or whose configuration is another.
    """
    for model in models.values():
        check_configuration(sup.model_files, model)
    try:
        return {name: read(sup, model) for name, model in models.items()}, config
    except CheckpointError:
        if not (heads := heads_of_others(sup, models.values())):
            raise
        return {}, replace(config, exclude=(*config.exclude, *map(escape, heads)))


def together(
    superposition: Superposition, sources: Mapping[str, Tensors], config: Config, *, alpha: float = 1.0,
    calibration: Mapping[str, Tensor] | None = None, progress: Progress = silent,
    put_away: update.PutAway | None = None,
) -> Superposition:  # fmt: skip
    """The models' superposition. superposition: an empty one over their base, or over some tensors of it, which are
    then those that ``sources`` has of each. config: of all of it. put_away: as for ``add_models``."""
    rank = config.rank or 0
    original, superposed = superposition.base, superposition.superposed
    shared = tuple(name for name in superposed if name not in superposition.unshared)
    moments = matched(calibration, original, shared, superposition.layout) if calibration is not None else {}
    matrices = sum(headers(original)[tensor].nbytes for tensor in shared)
    stored = original
    if config.centre:
        stored = _centred(original, sources, shared, progress("centring", matrices * len(sources)))
    bases: dict[str, Tensor] = {}
    if rank:
        matrices_alone = [name for name in shared if name not in superposition.layout.vectors]
        passes = {name: PASSES if name not in moments else int(rank == "auto") for name in matrices_alone}
        nbytes = sum(passes[name] * headers(original)[name].nbytes for name in matrices_alone)
        step = progress("shared bases", nbytes * len(sources))
        unseen = [name for name in matrices_alone if name not in moments]
        bases = loudest(sources, stored, unseen, rank, config.seed, step)
        with one_thread() as computing:
            for name, seen in moments.items():
                found = computing.submit(calibrated, name, *seen, sources, stored, rank, step).result()
                bases |= {name: found} if found.shape[1] else {}
    if config.centre or rank:
        first, layout = superposition, superposition.layout
        config = replace(config, include=superposition.config.include)
        superposition = Superposition(config, stored, superposed, bases=bases, layout=layout)
        superposition.model_files, superposition.to_files = first.model_files, first.to_files
    shifts = config.shuffle_layers > 0
    joining = [NewModel(BASE_NAME, 0, 1.0, original, len(sources) if shifts else 0)] if config.centre else []
    for number, (name, tensors) in enumerate(sources.items()):
        joining.append(NewModel(name, number // config.group_size, float(alpha), tensors, number if shifts else 0))
    step = progress("superposing", size(original) * len(joining))
    update.add_models(superposition, joining, step, put_away)
    return superposition


def with_options(config: Config, options: Mapping[str, Any]) -> Config:
    """Raises ``TypeError`` for a name that is no field of ``Config``."""
    known = [field.name for field in fields(Config)]
    for name in options.keys() - known:
        near = get_close_matches(name, known, 1)
        meant = f"; did you mean {near[0]}?" if near else ""
        raise TypeError(f"compress() takes the fields of randes.Config as options, and has none called {name!r}{meant}")
    return replace(config, **options)


def _centred(
    base: Tensors, models: Mapping[str, Tensors], superposed: tuple[str, ...], step: Callable[[int], None]
) -> Tensors:
    """The base with the mean of the models in place of each superposed matrix.

    Summed in fp64, in the order of the models' names, so that the order in which they come does not matter.
    """
    means = {tensor: _mean(tensor, base, [models[name] for name in sorted(models)], step) for tensor in superposed}
    return replaced(base, means)


def _mean(tensor: str, base: Tensors, models: list[Tensors], step: Callable[[int], None]) -> Tensor:
    header = headers(base)[tensor]
    mean = torch.empty(header.shape, dtype=header.dtype, device="cpu")
    own = zip(chunk_bounds(header), chunks(base, tensor), *(chunks(model, tensor) for model in models), strict=True)
    for (start, end), original, *tuned in own:
        exact = original.double()
        total = torch.zeros_like(exact)
        for part in tuned:
            sources.check_finite(tensor, part)
            total += part.double() - exact
            step(part.nbytes)
        mean[start:end] = (exact + total / len(models)).to(header.dtype)
    return mean
