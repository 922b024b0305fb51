"""The layer that is measured: one point of what is varied, and its operands.

D is drawn, not summed: of J models it is noise of root mean square √J, and every model retrieved from it is a model.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from measure import DTYPES, copies_for, free_bytes
from torch import Tensor

from randes_kernels import Packed, Transform, model_key, pack, retrieve, tensor_id, unpack
from randes_kernels.format import Stream, column_permutation, signs
from randes_kernels.packing import packed_bytes

TENSOR = tensor_id("model.layers.0.self_attn.o_proj.weight")
TRANSFORMS = {
    "column signs": Transform(row_signs=False),
    "two-sided": Transform(),
    "two-sided + permutation": Transform(granule=1),
}
MIXES = ("identical", "distinct", "uniform", "zipf-1.5", "base")
SAMPLED_ROWS = 16
"""Rows whose error is computed."""


@dataclass(frozen=True)
class Point:
    """What is varied. ``shape``: (N, K). ``m``: rows, in runs of ``run`` that each belong to one model.

    ``models``: stored, in ``groups`` that each have their own D, in ``bits`` an element or, 16, the dtype of x.
    ``mix``: which models the runs belong to.
    """

    shape: tuple[int, int]
    m: int
    models: int = 8
    mix: str = "distinct"
    transform: str = "two-sided"
    dtype: str = "bf16"
    groups: int = 1
    run: int = 1
    bits: int = 16

    def __str__(self) -> str:
        n, k = self.shape
        groups = f" in {self.groups} groups" if self.groups > 1 else ""
        runs = f" in runs of {self.run}" if self.run > 1 else ""
        bits = f", D in {self.bits} bits" if self.bits < 16 else ""
        return f"{n}×{k} M={self.m}{runs} {self.mix} of {self.models}{groups}, {self.transform}, {self.dtype}{bits}"


def model_ids(point: Point) -> Tensor:
    """The model of each run of rows, (B,) int32; −1 is the base."""
    runs, generator = point.m // point.run, torch.Generator().manual_seed(0)
    if point.mix == "distinct":
        ids = torch.arange(runs) % point.models
    elif point.mix == "uniform":
        ids = torch.randint(point.models, (runs,), generator=generator)
    elif point.mix == "zipf-1.5":
        popularity = torch.arange(1, point.models + 1).double() ** -1.5
        ids = torch.multinomial(popularity, runs, replacement=True, generator=generator)
    else:
        ids = torch.full((runs,), -1 if point.mix == "base" else 0)
    return ids.to(torch.int32)


class Layer:
    """The operands of one point.

    ``weights`` and ``deltas`` are lists of equal copies, so that calls can walk over them and find none in a cache.
    ``order``: x's rows sorted by model. ``parts``: of the sorted rows, each model's (model, first, end).
    """

    def __init__(self, point: Point, device: str) -> None:
        self.point, self.device, self.dtype = point, device, DTYPES[point.dtype]
        self.transform = TRANSFORMS[point.transform]
        n, k = point.shape
        self.generator = torch.Generator(device).manual_seed(0)
        self.unit = n * k * self.dtype.itemsize
        self.x = self.random(point.m, k)
        weight = self.random(1, n, k).mul_(k**-0.5)
        delta = self.random(1, point.groups, n, k).mul_((point.models / point.groups) ** 0.5)
        self.weights = weight.repeat(copies_for(self.unit, device), 1, 1).unbind()
        copies = copies_for(self.unit + point.groups * self.delta_bytes, device)
        self.deltas: Sequence[Tensor | Packed]
        if point.bits == 16:
            self.delta = delta[0]
            self.deltas = delta.repeat(copies, 1, 1, 1).unbind()
        else:
            packed = pack(delta[0], point.bits)
            self.delta = unpack(packed)
            self.deltas = [packed._replace(words=packed.words.clone()) for _ in range(copies)]

        ids = model_ids(point)
        rows = ids.long().repeat_interleave(point.run)
        self.active = sorted(set(ids.tolist()))
        self.order = rows.argsort(stable=True).to(device)
        ends = torch.bincount(rows + 1, minlength=point.models + 1).cumsum(0).tolist()
        self.parts = [(model, ends[model] if model >= 0 else 0, ends[model + 1]) for model in self.active]
        self.row_models = rows.to(device)
        self.model_keys = [model_key(0, f"model {j}") for j in range(point.models)]
        self.ids, self.keys = ids.to(device), torch.tensor(self.model_keys, device=device)
        self.slot_of = [model * point.groups // point.models for model in range(point.models)]
        self.slots = torch.tensor(self.slot_of, dtype=torch.int32, device=device)
        self.gain = 0.05 * k**-0.5
        """A delta is a twentieth of the base, as a fine-tune's is."""
        self.scale = torch.full((point.models,), self.gain, device=device)

    def random(self, *shape: int) -> Tensor:
        """Normal values of the layer's dtype."""
        return torch.randn(shape, dtype=self.dtype, device=self.device, generator=self.generator)

    @property
    def delta_bytes(self) -> int:
        """Of one slot of D."""
        return self.unit if self.point.bits == 16 else packed_bytes(*self.point.shape, self.point.bits)

    @property
    def slots_read(self) -> int:
        """How many slots of D the batch touches."""
        return len({self.slot_of[model] for model in self.active if model >= 0})

    def retrieved(self, model: int, copy: int = 0) -> Tensor:
        """One model's materialised weight (N, K)."""
        if model < 0:
            return self.weights[copy]
        delta, key = self.delta[self.slot_of[model]], self.model_keys[model]
        return retrieve(self.weights[copy], delta, self.gain, key, TENSOR, self.transform)

    @cached_property
    def materialised(self) -> tuple[Tensor, ...] | None:
        """Copies of the weights of the models in the batch, each (A, N, K); None where they do not fit."""
        size = len(self.active) * self.unit
        copies = copies_for(size, self.device)
        if (copies + 1) * size > free_bytes(self.device):
            return None
        whole = self.weights[0].new_empty((copies, len(self.active), *self.point.shape))
        for place, model in enumerate(self.active):
            whole[:, place] = self.retrieved(model)
        return whole.unbind()

    @cached_property
    def padded(self) -> tuple[Tensor, Tensor]:
        """The sorted rows of x, (A, R, K) with zeros after each model's, and where each row of x went in (A · R)."""
        height = max(end - first for _, first, end in self.parts)
        padded = self.x.new_zeros((len(self.parts), height, self.x.shape[1]))
        rows = torch.empty_like(self.order)
        for place, (_, first, end) in enumerate(self.parts):
            padded[place, : end - first] = self.x[self.order[first:end]]
            rows[self.order[first:end]] = place * height + torch.arange(end - first, device=self.device)
        return padded, rows

    @cached_property
    def tables(self) -> tuple[Tensor | None, Tensor, Tensor | None]:
        """Of all models: column signs (J, K), scaled row signs (J, N) or (J, 1), and column order (J, K)."""
        n, k = self.point.shape

        def table(stream: Stream, size: int) -> Tensor:
            made = torch.stack([signs(key, TENSOR, stream, size) for key in self.model_keys])
            return made.to(self.device, self.dtype)

        columns = table(Stream.COLUMN_SIGNS, k) if self.transform.column_signs else None
        rows = self.scale.to(self.dtype)[:, None]
        if self.transform.row_signs:
            rows = rows * table(Stream.ROW_SIGNS, n)
        order = None
        if self.transform.granule:
            orders = [column_permutation(key, TENSOR, k, self.transform, inverse=True) for key in self.model_keys]
            order = torch.stack(orders).to(self.device)
        return columns, rows, order

    @cached_property
    def sampled(self) -> Tensor:
        """The rows whose error is computed."""
        return torch.linspace(0, self.point.m - 1, min(self.point.m, SAMPLED_ROWS), device=self.device).long()

    def answer(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """What ``rows`` of x must give, computed in ``dtype``: (c_j ⊙ x) P_j Dᵀ is the retrieved delta's product."""
        x, models = self.x[rows].to(dtype), self.row_models[rows]
        y = x @ self.weights[0].to(dtype).mT
        columns, scaled_rows, order = self.tables
        if columns is not None:
            x = x * columns[models].to(dtype)
        if order is not None:
            x = x.gather(1, order[models])
        for slot in range(self.point.groups):
            inside = (models >= 0) & (self.slots[models] == slot)
            if inside.any():
                row_signs = scaled_rows[models[inside]].to(dtype).sign()  # the scale itself is not rounded here
                product = x[inside] @ self.delta[slot].to(dtype).mT
                y[inside] += self.scale[models[inside], None].to(dtype) * row_signs * product
        return y

    @cached_property
    def exact(self) -> Tensor:
        """The sampled rows' answer in fp64."""
        return self.answer(self.sampled, torch.float64)

    def error(self, answer: Tensor) -> float:
        """Root mean square of the sampled rows' error, as a share of the exact answer's."""
        return float((answer.double() - self.exact).norm() / self.exact.norm())

    @cached_property
    def materialised_error(self) -> float:
        """What the sampled rows' materialised models make of them."""
        answer, models = torch.empty_like(self.exact), self.row_models[self.sampled]
        for model in models.unique().tolist():
            held = self.materialised
            weight = held[0][self.active.index(model)] if held is not None else self.retrieved(model)
            answer[models == model] = F.linear(self.x[self.sampled[models == model]], weight).double()
        return self.error(answer)

    def traffic(self, weights: float, *, passes: int = 0) -> int:
        """Bytes of a call: weights in units of N · K, x and y once, and further passes over y."""
        (n, k), m = self.point.shape, self.point.m
        return int(weights * self.unit + (m * k + (1 + passes) * m * n) * self.dtype.itemsize)

    def flops(self, products: float = 1.0) -> int:
        """Of a call that multiplies every row ``products`` times."""
        return int(products * 2 * self.point.m * self.point.shape[0] * self.point.shape[1])
