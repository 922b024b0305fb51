"""The superposed linear on a CPU: two vendor matmuls around cached signs, for any mix of models.

    y = x W0ᵀ + scale_j · r_j ⊙ ( (c_j ⊙ x) P_j Dᵀ ) + b_j

A model's signs and column order are a few bytes a column next to the weights' thousands, so they are
regenerated once and kept in a bounded cache; no retrieved weight is built. Each product is rounded to the dtype of x
by the vendor's matmul, and their sum once more.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from randes_kernels.format import Stream, Transform, column_permutation, signs

# Enough for 64 models of 224 layers; 0.2 GB of signs then, for models of 16 GB.
_signs = lru_cache(maxsize=2**15)(signs)
_column_permutation = lru_cache(maxsize=2**11)(column_permutation)


def superposed_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, biases: Tensor | None, delta: Tensor,
    ids: Tensor, keys: Tensor, scale: Tensor, slots: Tensor, tensor: int, transform: Transform, transposed: bool,
) -> Tensor:  # fmt: skip
    """See ``randes_kernels.superposed_linear``. Raises ``IndexError`` for an id that names no model."""
    models = ids.tolist()
    if models and not (min(models) >= -1 and max(models) < keys.shape[0]):
        raise IndexError(f"ids must lie in -1 to {keys.shape[0] - 1}, got {min(models)} to {max(models)}")
    if transposed:
        weight, delta = weight.mT, delta.mT
    y = F.linear(x, weight, bias if biases is None else None)
    exact = torch.promote_types(y.dtype, torch.float32)
    total = y.to(exact)
    for slot, places in _places_by_slot(models, slots).items():
        chosen = slice(None) if len(places) == len(models) else torch.tensor(places)
        # (models, rows of each, width): one model for all rows and one for each row are the same code.
        rows = x.view(len(models), -1, x.shape[1])[chosen]
        out = total.view(len(models), -1, y.shape[1])
        members = [models[place] for place in places]
        model_keys = keys[members].tolist()
        turned = _turn(rows, model_keys, tensor, transform, transposed)
        delta_y = _product(turned, delta[slot])
        out[chosen] += _turn_back(delta_y, model_keys, tensor, transform, transposed) * scale[members][:, None, None]
    if bias is not None and biases is not None:
        own = torch.cat((biases, bias[None]))[models]  # −1, the base, is the last row
        total = (total.view(len(models), -1, y.shape[1]) + own[:, None]).view(y.shape)
    return total.to(y.dtype)


def _product(turned: Tensor, delta: Tensor) -> Tensor:
    """``turned`` (..., K) times D (N, K) transposed, in fp32 at least."""
    if turned.dtype != torch.float16:
        product = F.linear(turned, delta)
        return product.to(torch.promote_types(product.dtype, torch.float32))
    # D has unit gain: its product may pass fp16's range though the gain brings it back. Powers of two are exact.
    exponent = torch.frexp(turned.abs().amax(-1, keepdim=True).float()).exponent
    small = torch.ldexp(turned.float(), -exponent).half()
    return torch.ldexp(F.linear(small, delta).float(), exponent)


def _places_by_slot(models: list[int], slots: Tensor) -> dict[int, list[int]]:
    """Which places of the batch read which slot of D; those that read none are left out."""
    slot_of = slots.tolist()
    places: dict[int, list[int]] = {}
    for place, model in enumerate(models):
        if model >= 0 and slot_of[model] >= 0:
            places.setdefault(slot_of[model], []).append(place)
    return places


def _turn(rows: Tensor, keys: list[int], tensor: int, transform: Transform, transposed: bool) -> Tensor:
    """What D is multiplied with: the rows (B, R, width), signed and permuted as D's input side was."""
    flips = transform.row_signs if transposed else transform.column_signs
    if flips:
        rows = rows * _sign_table(keys, tensor, rows, Stream.ROW_SIGNS if transposed else Stream.COLUMN_SIGNS)
    if transform.granule and not transposed:
        order = [_column_permutation(key, tensor, rows.shape[2], transform, inverse=True) for key in keys]
        rows = rows.gather(2, torch.stack(order)[:, None].expand(rows.shape))
    return rows


def _turn_back(out: Tensor, keys: list[int], tensor: int, transform: Transform, transposed: bool) -> Tensor:
    """The product with D (B, R, width), with its output side turned back."""
    if transform.granule and transposed:
        order = [_column_permutation(key, tensor, out.shape[2], transform) for key in keys]
        out = out.gather(2, torch.stack(order)[:, None].expand(out.shape))
    flips = transform.column_signs if transposed else transform.row_signs
    if flips:
        out = out * _sign_table(keys, tensor, out, Stream.COLUMN_SIGNS if transposed else Stream.ROW_SIGNS)
    return out


def _sign_table(keys: list[int], tensor: int, like: Tensor, stream: Stream) -> Tensor:
    return torch.stack([_signs(key, tensor, stream, like.shape[2]) for key in keys])[:, None].to(like.dtype)
