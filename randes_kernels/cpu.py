"""The superposed linear on a CPU: around vendor matmuls, from whichever side is cheaper for a model's rows.

    activation side   y = x W0ᵀ + scale_j · r_j ⊙ ( (c_j ⊙ x) P_j Dᵀ ) + b_j     two matmuls, for any mix of models
    weight side       y = x (W0 + scale_j · r_j ⊙ D P_jᵀ ⊙ c_j)ᵀ + b_j           one, for many rows of one model

On the weight side a slice of W0 and D at a time is rebuilt in cache and multiplied at once, so a whole retrieved
weight never exists. A model's signs and column order are a few bytes a column next to the weights' thousands, so they
are regenerated once and kept in a bounded cache. Each matmul rounds to the dtype of x; the activation side rounds the
sum of its two once more, the weight side rounds the rebuilt weight as a materialised one would be.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from randes_kernels.format import Stream, Transform, column_permutation, signs

# Enough for 64 models of 224 layers; 0.2 GB of signs then, for models of 16 GB.
_signs = lru_cache(maxsize=2**15)(signs)
_column_permutation = lru_cache(maxsize=2**11)(column_permutation)

SLICE_BYTES = 4 << 20
"""Of rebuilt weight: stays in the cache while the rows are multiplied with it (bench/cpu_slices.py)."""
WEIGHT_SIDE_ROWS = 48
"""From so many rows of one model on, rebuilding beats a second matmul (bench/cpu_slices.py)."""
WEIGHT_SIDE_ROWS_PERMUTED = {torch.float64: 128, torch.float32: 128, torch.float16: 64}
"""The same where columns are gathered; in bf16 the gather never pays."""


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
    tables = keys, scale, slots, tensor, transform, transposed
    rows = x.shape[0] // len(models)
    slot_of = slots.tolist()
    enough = weight_side_rows(x.dtype, transform)
    by_weight = [
        model for model in set(models) if model >= 0 and slot_of[model] >= 0 and models.count(model) * rows >= enough
    ]
    if not by_weight:
        return _activation_side(x, weight, bias, biases, delta, models, *tables)
    y = x.new_empty((x.shape[0], weight.shape[0]))
    x_runs, y_runs = x.view(len(models), rows, -1), y.view(len(models), rows, -1)
    for model in by_weight:
        own_bias = bias if biases is None else biases[model]
        if len(by_weight) == 1 and models.count(model) == len(models):
            _weight_side(y, x, weight, own_bias, delta, model, *tables)
            continue
        places = [place for place, other in enumerate(models) if other == model]
        alone = y.new_empty((len(places) * rows, y.shape[1]))
        _weight_side(alone, x_runs[places].flatten(0, 1), weight, own_bias, delta, model, *tables)
        y_runs[places] = alone.view(len(places), rows, -1)
    if places := [place for place, model in enumerate(models) if model not in by_weight]:
        others = [models[place] for place in places]
        rest = _activation_side(x_runs[places].flatten(0, 1), weight, bias, biases, delta, others, *tables)
        y_runs[places] = rest.view(len(places), rows, -1)
    return y


def weight_side_rows(dtype: torch.dtype, transform: Transform) -> float:
    """How many rows of one model it takes to rebuild its weight for them."""
    return WEIGHT_SIDE_ROWS_PERMUTED.get(dtype, float("inf")) if transform.granule else WEIGHT_SIDE_ROWS


def _weight_side(
    y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, delta: Tensor, model: int,
    keys: Tensor, scale: Tensor, slots: Tensor, tensor: int, transform: Transform, transposed: bool,
) -> None:  # fmt: skip
    """``y`` (M, N) = x Ŵᵀ + bias for one model, a slice of Ŵ's rows at a time."""
    (n, k), key = weight.shape, int(keys[model])
    delta, gain = delta[int(slots[model])], float(scale[model])
    in_stream, out_stream = Stream.COLUMN_SIGNS, Stream.ROW_SIGNS
    flip_in, flip_out = transform.column_signs, transform.row_signs
    if transposed:
        in_stream, out_stream, flip_in, flip_out = out_stream, in_stream, flip_out, flip_in
    in_signs = _signs(key, tensor, in_stream, k).to(x.dtype) if flip_in else None
    out_signs = (_signs(key, tensor, out_stream, n) if flip_out else torch.ones(n, dtype=torch.int8)).to(x.dtype)
    order = _column_permutation(key, tensor, n if transposed else k, transform) if transform.granule else None
    height = max(32, SLICE_BYTES // (k * x.itemsize))
    # In the layout of W0's own slices, which are transposed on the way back.
    cache = torch.empty((k, min(height, n)), dtype=x.dtype).mT if transposed else x.new_empty((min(height, n), k))
    for start in range(0, n, height):
        part = slice(start, min(start + height, n))
        rebuilt = cache[: part.stop - start]
        if order is None:
            turned_back = delta[part]
        elif transposed:
            turned_back = delta.index_select(0, order[part])
        else:
            turned_back = delta[part].index_select(1, order)
        if in_signs is not None:
            turned_back = torch.mul(turned_back, in_signs, out=rebuilt)
        torch.addcmul(weight[part], turned_back, out_signs[part, None], value=gain, out=rebuilt)
        if bias is None:
            torch.mm(x, rebuilt.mT, out=y[:, part])
        else:
            torch.addmm(bias[part], x, rebuilt.mT, out=y[:, part])


def _activation_side(
    x: Tensor, weight: Tensor, bias: Tensor | None, biases: Tensor | None, delta: Tensor, models: list[int],
    keys: Tensor, scale: Tensor, slots: Tensor, tensor: int, transform: Transform, transposed: bool,
) -> Tensor:  # fmt: skip
    """The rows of any mix of ``models``, in equal runs: one matmul with W0 and one with each slot that they touch."""
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
