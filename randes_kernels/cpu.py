"""The superposed linear on a CPU: around vendor matmuls, from whichever side is cheaper for a model's rows.

    activation side   y = x W0ᵀ + scale_j · r_j ⊙ ( (c_j ⊙ x) P_j Dᵀ ) + b_j     two matmuls, for any mix of models
    weight side       y = x (W0 + scale_j · r_j ⊙ D P_jᵀ ⊙ c_j)ᵀ + b_j           one, for many rows of one model

On the weight side a slice of W0 and D at a time is rebuilt in cache and multiplied at once, so a whole retrieved
weight never exists. A model's signs and column order are a few bytes a column next to the weights' thousands, so they
are regenerated once and kept in a bounded cache. Each matmul rounds to the dtype of x; the activation side rounds the
sum of its two once more, the weight side rounds the rebuilt weight as a materialised one would be.
"""

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from randes_kernels import cpu_delta, mixing
from randes_kernels.cpu_delta import in_slot, product, rows_of
from randes_kernels.format import Matrix, Stream, Transform, column_permutation, signs
from randes_kernels.lowrank import own_product
from randes_kernels.packing import Packed, of_operands

# Enough for 64 models of 224 layers; 0.2 GB of signs then, for models of 16 GB.
_signs = lru_cache(maxsize=2**15)(signs)
_column_permutation = lru_cache(maxsize=2**11)(column_permutation)

KEPT_ELEMENTS = 1 << 16
"""Of a batch's signs that are kept as they are used: 8 rows of a layer 8192 wide; 128 MiB of them in fp32 at most."""


def superposed_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, biases: Tensor | None, delta: Tensor,
    ids: Tensor, keys: Tensor, scale: Tensor, slots: Tensor, tensor: int, transform: Transform, transposed: bool,
    steps: Tensor | None = None, packing: Sequence[int] = (), directions: Tensor | None = None,
    corrections: Tensor | None = None, inverses: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """See ``randes_kernels.superposed_linear``. Raises ``IndexError`` for an id that names no model."""
    models = ids.tolist()
    if models and not (min(models) >= -1 and max(models) < keys.shape[0]):
        raise IndexError(f"ids must lie in -1 to {keys.shape[0] - 1}, got {min(models)} to {max(models)}")
    if transposed:
        weight, delta = weight.mT, delta.mT
    held = delta if steps is None else of_operands(delta, steps, packing, weight.shape[1])
    operands = x, weight, bias, biases, held, models, keys, scale, slots, tensor, transform, transposed
    # Rebuilding a weight whose columns are mixed would take products of its own.
    y = _activation_side(*operands, inverses) if transform.matrix else _superposed(*operands)
    if directions is not None and corrections is not None:
        y += own_product(x @ directions, ids, corrections)
    return y


def _superposed(
    x: Tensor, weight: Tensor, bias: Tensor | None, biases: Tensor | None, held: Tensor | Packed, models: list[int],
    keys: Tensor, scale: Tensor, slots: Tensor, tensor: int, transform: Transform, transposed: bool,
) -> Tensor:  # fmt: skip
    """Each model's rows from the side that is cheaper for their number."""
    tables = keys, scale, slots, tensor, transform, transposed
    rows = x.shape[0] // len(models)
    slot_of = slots.tolist()
    enough = weight_side_rows(x.dtype, transform)
    rows_of = {model: runs * rows for model, runs in Counter(models).items()}
    by_weight = {model for model in rows_of if model >= 0 and slot_of[model] >= 0 and rows_of[model] >= enough}
    if not by_weight:
        return _activation_side(x, weight, bias, biases, held, models, *tables)
    y = x.new_empty((x.shape[0], weight.shape[0]))
    x_runs, y_runs = x.view(len(models), rows, -1), y.view(len(models), rows, -1)
    for model in sorted(by_weight):
        own_bias = bias if biases is None else biases[model]
        if len(rows_of) == 1:
            _weight_side(y, x, weight, own_bias, held, model, *tables)
            continue
        places = [place for place, other in enumerate(models) if other == model]
        alone = y.new_empty((len(places) * rows, y.shape[1]))
        _weight_side(alone, x_runs[places].flatten(0, 1), weight, own_bias, held, model, *tables)
        y_runs[places] = alone.view(len(places), rows, -1)
    if places := [place for place, model in enumerate(models) if model not in by_weight]:
        others = [models[place] for place in places]
        rest = _activation_side(x_runs[places].flatten(0, 1), weight, bias, biases, held, others, *tables)
        y_runs[places] = rest.view(len(places), rows, -1)
    return y


def weight_side_rows(dtype: torch.dtype, transform: Transform) -> float:
    """From how many rows of one model on rebuilding its weight beats a second matmul (bench/speed/crossover.py)."""
    slow_to_rebuild = dtype == torch.bfloat16
    if transform.granule:  # its columns are gathered, which never pays in bf16
        return float("inf") if slow_to_rebuild else 128
    return 48 if slow_to_rebuild else 16


def _weight_side(
    y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, held: Tensor | Packed, model: int,
    keys: Tensor, scale: Tensor, slots: Tensor, tensor: int, transform: Transform, transposed: bool,
) -> None:  # fmt: skip
    """``y`` (M, N) = x Ŵᵀ + bias for one model, a slice of Ŵ's rows at a time."""
    (n, k), key = weight.shape, int(keys[model])
    whole, gain = in_slot(held, int(slots[model])), float(scale[model])
    in_stream, out_stream = Stream.COLUMN_SIGNS, Stream.ROW_SIGNS
    flip_in, flip_out = transform.column_signs, transform.row_signs
    if transposed:
        in_stream, out_stream, flip_in, flip_out = out_stream, in_stream, flip_out, flip_in
    in_signs = _signs(key, tensor, in_stream, k, _first(transform, in_stream)).to(x.dtype) if flip_in else None
    out_signs = torch.ones(n, dtype=torch.int8, device="cpu")
    if flip_out:
        out_signs = _signs(key, tensor, out_stream, n, _first(transform, out_stream))
    out_signs = out_signs.to(torch.float32 if x.dtype == torch.float16 else x.dtype)
    order = _column_permutation(key, tensor, n if transposed else k, transform) if transform.granule else None
    height = max(32, cpu_delta.SLICE_BYTES // (k * x.itemsize))
    # In the layout of W0's own slices, which are transposed on the way back.
    cache = x.new_empty((k, min(height, n))).mT if transposed else x.new_empty((min(height, n), k))
    for start in range(0, n, height):
        part = slice(start, min(start + height, n))
        rebuilt = cache[: part.stop - start]
        if order is None:
            turned_back = rows_of(whole, part, x.dtype)
        elif transposed and isinstance(whole, Tensor):  # no packed D runs transposed
            turned_back = whole.index_select(0, order[part])
        else:
            turned_back = rows_of(whole, part, x.dtype).index_select(1, order)
        if in_signs is not None:
            turned_back = torch.mul(turned_back, in_signs, out=rebuilt)
        if x.dtype == torch.float16:  # whose range a gain may leave: its product in fp32, then rounded once
            rebuilt.copy_(torch.addcmul(weight[part].float(), turned_back.float(), out_signs[part, None], value=gain))
        else:
            torch.addcmul(weight[part], turned_back, out_signs[part, None], value=gain, out=rebuilt)
        if bias is None:
            torch.mm(x, rebuilt.mT, out=y[:, part])
        else:
            torch.addmm(bias[part], x, rebuilt.mT, out=y[:, part])


def _activation_side(
    x: Tensor, weight: Tensor, bias: Tensor | None, biases: Tensor | None, held: Tensor | Packed, models: list[int],
    keys: Tensor, scale: Tensor, slots: Tensor, tensor: int, transform: Transform, transposed: bool,
    inverses: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The rows of any mix of ``models``, in equal runs: one matmul with W0 and one with each slot that they touch."""
    # (models, rows of each, width): one model for all rows and one for each row are the same code.
    runs = x.view(len(models), -1, x.shape[1])
    # All that is small comes first: after a matmul has streamed the weights through the caches, each small operation
    # costs ten times as much.
    key_of, gain_of = keys.tolist(), (scale * mixing.unit(transform.matrix)).tolist()
    passes = []
    for slot, places in _places_by_slot(models, slots.tolist()).items():
        chosen = slice(None) if len(places) == len(models) else torch.tensor(places, device="cpu")
        members = [models[place] for place in places]
        mixed = None if inverses is None else (inverses, torch.tensor(members, device="cpu"))
        turn = _Turn(tuple(key_of[model] for model in members), tensor, transform, transposed, runs.dtype, mixed)
        gains = tuple(gain_of[model] for model in members)
        passes.append((chosen, turn.input(runs[chosen]), slot, turn.output(weight.shape[0], gains), turn))

    y = F.linear(x, weight, bias if biases is None else None)
    out = y.view(len(models), -1, y.shape[1])
    exact = torch.promote_types(y.dtype, torch.float32)
    for chosen, turned, slot, (order, factors), turn in passes:
        delta_y = product(turned, held, slot)
        if transposed and transform.matrix != Matrix.SIGNS:
            delta_y = turn.mixed(delta_y, back=True)
        if order is not None:
            delta_y = delta_y.gather(2, order.expand(delta_y.shape))
        # The factors are exact, so their product with what a matmul has rounded, and the sum, are too.
        if isinstance(chosen, slice):
            out = out + delta_y * factors
        else:
            out = out.to(exact)
            out[chosen] += delta_y * factors
    if bias is not None and biases is not None:
        own = torch.cat((biases, bias[None]))[models]  # −1, the base, is the last row
        out = out.to(exact) + own[:, None]
    return out.reshape(y.shape).to(y.dtype)


def _places_by_slot(models: list[int], slot_of: list[int]) -> dict[int, list[int]]:
    """Which places of the batch read which slot of D; those that read none are left out."""
    places: dict[int, list[int]] = {}
    for place, model in enumerate(models):
        if model >= 0 and slot_of[model] >= 0:
            places.setdefault(slot_of[model], []).append(place)
    return places


class _Turn(NamedTuple):
    """The transforms of B models, for both ends of a product with D."""

    keys: tuple[int, ...]
    tensor: int
    transform: Transform
    transposed: bool
    dtype: torch.dtype
    inverses: tuple[Tensor, Tensor] | None  # of dense matrices: all models', (J, K, K), and the numbers of these

    def mixed(self, rows: Tensor, *, back: bool) -> Tensor:
        """Rows (B, R, K) as ``mixing`` turns them."""
        if self.inverses is None:
            first = self.transform.first_column
            return mixing.turned_rows(rows, self.keys, self.tensor, self.transform.matrix, back=back, first=first)
        inverses, numbers = self.inverses
        return mixing.dense_rows(rows.flatten(0, 1), numbers, inverses, back=back).view(rows.shape)

    def input(self, rows: Tensor) -> Tensor:
        """What D is multiplied with: the rows (B, R, width), signed and permuted as D's input side was."""
        flips = self.transform.row_signs if self.transposed else self.transform.column_signs
        if flips:
            stream = Stream.ROW_SIGNS if self.transposed else Stream.COLUMN_SIGNS
            rows = rows * self.signs(stream, rows.shape[2], self.dtype)
        if self.transform.matrix != Matrix.SIGNS and not self.transposed:
            return self.mixed(rows, back=False)
        if self.transform.granule and not self.transposed:
            rows = rows.gather(2, self.order(rows.shape[2], inverse=True).expand(rows.shape))
        return rows

    def output(self, width: int, gains: tuple[float, ...]) -> tuple[Tensor | None, Tensor]:
        """For the product (B, R, width): the order of its columns, if that changes, and then what they are times."""
        order = self.order(width, inverse=False) if self.transform.granule and self.transposed else None
        exact = torch.promote_types(self.dtype, torch.float32)
        flips = self.transform.column_signs if self.transposed else self.transform.row_signs
        if not flips:
            return order, torch.tensor(gains, dtype=exact, device="cpu")[:, None, None]
        stream = Stream.COLUMN_SIGNS if self.transposed else Stream.ROW_SIGNS
        return order, self.signs(stream, width, exact, gains)

    def signs(self, stream: Stream, width: int, dtype: torch.dtype, gains: tuple[float, ...] = ()) -> Tensor:
        """(B, 1, width), times ``gains``. A small batch's are kept: it comes again at each token."""
        make = _kept_table if len(self.keys) * width <= KEPT_ELEMENTS else _kept_table.__wrapped__
        return make(self.keys, self.tensor, stream, width, _first(self.transform, stream), dtype, gains)

    def order(self, width: int, *, inverse: bool) -> Tensor:
        """Of the columns, (B, 1, width)."""
        order = [_column_permutation(key, self.tensor, width, self.transform, inverse=inverse) for key in self.keys]
        return torch.stack(order)[:, None]


def _first(transform: Transform, stream: Stream) -> int:
    """Where a shard's signs begin in their stream."""
    return transform.first_row if stream == Stream.ROW_SIGNS else transform.first_column


@lru_cache(maxsize=512)
def _kept_table(
    keys: tuple[int, ...], tensor: int, stream: Stream, width: int, first: int, dtype: torch.dtype,
    gains: tuple[float, ...],
) -> Tensor:  # fmt: skip
    table = torch.stack([_signs(key, tensor, stream, width, first) for key in keys])[:, None].to(dtype)
    return table * torch.tensor(gains, dtype=dtype, device="cpu")[:, None, None] if gains else table
