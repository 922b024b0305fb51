"""A shared basis from what a base's layers are given, instead of from the deltas at hand.

    M = Σ x xᵀ            over all inputs x (K,) of a layer
    Y = M Ω   (K, s)      what is kept of it, a batch at a time; Ω is I up to s = 512 columns, and beyond random signs
    U = the top eigenvectors of Y (ΩᵀY)⁻¹ Yᵀ, which is M where Ω is I

Noise in a weight is the same in all directions. What it does to the layer's output goes with the energy that inputs
have in a direction: the top eigenvectors of M are where a model's own delta is worth most. (Design, section 2. The
sketch is Nyström's: Tropp, Yurtsever, Udell, Cevher, "Fixed-rank approximation of a positive-semidefinite matrix from
streaming data", 2017.)
"""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from randes.checkpoints.layout import Layout, is_conv1d, tied_in
from randes.checkpoints.lazy_tensors import headers
from randes.checkpoints.sources import Tensors
from randes.config import Rank
from randes.superposition.basis.shared_basis import SHARE, rounded_directions, summed, widest
from randes_kernels import model_key, tensor_id
from randes_kernels.format import Stream, signs

COLUMNS = 512
"""Of a sketch: ten times the directions that "auto" keeps at most, in 2 KiB an input of a layer."""
CERTAIN = 1e-6
"""What is smaller than this share of the largest eigenvalue is fp32's rounding."""


def calibrate(
    module: nn.Module, batches: Iterable[Any], *, step: Callable[[], None] = lambda: None
) -> dict[str, Tensor]:
    """Second moments of the inputs of a base's layers, for ``randes.compress(..., calibration=...)``.

    module: the base, ready to run: in eval mode, on its device. The ``nn.Linear`` layers and Transformers' Conv1D
        that it calls are measured; bases of other matrices come from the deltas.
    batches: the inputs, run without gradients: a mapping is passed as keywords, a tuple or a list as arguments,
        anything else as the one argument. Every row counts, so leave padding out. Use data like what will be served,
        a few thousand tokens over all models' kinds together.
    step: called after each batch, for a progress bar.
    Returns for each weight's name ``M Ω`` (K, min(K, 512)) fp32: the same for the same batches in the same order.
    Raises ``ValueError`` if no layer was called, and for inputs that are not finite. The module is not changed.
    """
    found: dict[str, Tensor] = {}
    ties = tied_in(module.state_dict(keep_vars=True))
    layers = [named for named in module.named_modules() if isinstance(named[1], nn.Linear) or is_conv1d(named[1])]
    hooks = []
    for path, layer in layers:
        name = f"{path}.weight" if path else "weight"
        see = partial(_see, found, ties.get(name, name))
        hooks.append(layer.register_forward_pre_hook(see, with_kwargs=True))
    try:
        with torch.no_grad():
            for batch in batches:
                _run(module, batch)
                step()
    finally:
        for hook in hooks:
            hook.remove()
    if not found:
        raise ValueError(f"batches must call a linear layer of module, got none of its {len(layers)} called")
    for name, sketch in found.items():
        if not torch.isfinite(sketch).all():
            raise ValueError(f"batches must give finite inputs to every layer, got others for {name}")
    return {name: sketch.cpu() for name, sketch in found.items()}


def _run(module: nn.Module, batch: Any) -> None:
    if isinstance(batch, Mapping):
        module(**batch)
    elif isinstance(batch, tuple | list):
        module(*batch)
    else:
        module(batch)


def _see(found: dict[str, Tensor], name: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    value: Tensor = next(iter((*args, *kwargs.values())))
    x = value.detach().flatten(0, -2).float() if value.dim() > 1 else value.detach()[None].float()
    columns = x.shape[1]
    if name not in found:
        found[name] = x.new_zeros(columns, min(columns, COLUMNS))
    seen = x if columns <= COLUMNS else x @ _signs(name, columns).to(x.device)
    found[name] += x.mT @ seen


def _signs(name: str, columns: int) -> Tensor:
    """Ω of a wide layer, (K, s) fp32: the same in every process."""
    flat = signs(model_key(0, ""), tensor_id(name), Stream.COLUMN_SIGNS, columns * COLUMNS)
    return flat.view(columns, COLUMNS).float()


def matched(
    calibration: Mapping[str, Tensor], base: Tensors, superposed: Iterable[str], layout: Layout
) -> dict[str, tuple[str, Tensor]]:
    """Of superposed matrices that there are moments for, those and their name: a part has its tensor's.

    Raises ``ValueError`` for moments of another shape than the matrix's or not finite, and where there are none of any.
    """
    found = {}
    for name in superposed:
        tensor = layout.parts.get(name, name)
        if tensor not in calibration:
            continue
        columns, shape = headers(base)[name].shape[1], tuple(calibration[tensor].shape)
        if shape != (columns, min(columns, COLUMNS)):
            wanted = columns, min(columns, COLUMNS)
            raise ValueError(f"calibration[{tensor!r}] must be (K, min(K, {COLUMNS})) = {wanted}, got {shape}")
        if not torch.isfinite(calibration[tensor]).all():
            raise ValueError(f"calibration[{tensor!r}] must be finite, got NaN or infinity")
        found[name] = tensor, calibration[tensor]
    if not found:
        raise ValueError(
            "calibration must be what randes.calibrate found of this base's layers;"
            f" got none of the superposed matrices in {len(calibration)} names"
        )
    return found


def calibrated(
    name: str, where: str, sketch: Tensor, models: Mapping[str, Tensors], base: Tensors, rank: Rank,
    step: Callable[[int], None],
) -> Tensor:  # fmt: skip
    """``U`` of one matrix, (K, r) int16 of ``basis.UNIT``, from its moments.

    With rank "auto" those of the inputs' loudest directions in which the deltas have ``SHARE`` of their energy or more.
    where: the name that the moments were taken under. step: called with the bytes read, of which an integer needs none.
    """
    directions = eigenvectors(sketch, where)[:, : widest(rank, *headers(base)[name].shape)].float()
    if rank != "auto":
        return rounded_directions(directions)
    energy, changed = summed(
        name, models, base, lambda delta: (delta @ directions).square().sum(0), torch.zeros(directions.shape[1]), step
    )
    return rounded_directions(directions[:, energy >= SHARE * max(changed, 1)])


def eigenvectors(sketch: Tensor, where: str) -> Tensor:
    """Of the moments that a sketch (K, s) is of, loudest first: (K, at most s) fp64."""
    wide = sketch.double()
    columns, width = wide.shape
    small = wide if columns == width else _signs(where, columns).double().mT @ wide
    values, vectors = torch.linalg.eigh((small + small.mT) / 2)
    certain = values > CERTAIN * values[-1]
    # With small = V Λ Vᵀ this is a factor F of the moments, F Fᵀ = Y V Λ⁻¹ Vᵀ Yᵀ.
    factor = wide @ (vectors[:, certain] / values[certain].sqrt())
    directions: Tensor = torch.linalg.svd(factor, full_matrices=False)[0]
    return directions
