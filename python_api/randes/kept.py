"""Layers around the superposed ones whose tensors differ between models: each row gets its own model's.

``SuperposedLinear`` routes its bias itself. Norms, embeddings and linear layers that are not superposed are
routed here, by the class of the layer. Any other layer is run once for each model of a mixed batch, on its rows.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from randes.routing import Router
from randes.superposition import BASE_NAME, Superposition


class KeptTable(nn.Module):
    """One tensor as each model has it: the rows of those that differ from the base, and who has which."""

    values: Tensor
    rows: Tensor

    def __init__(self, superposition: Superposition, tensor: str, like: Tensor) -> None:
        super().__init__()
        values: list[Tensor] = []
        rows: list[int] = []
        for model in superposition.served:
            own = superposition.other(model, tensor)
            if own is superposition.base[tensor]:
                rows.append(-1)
            elif tensor in superposition.averages and values:
                rows.append(0)  # the average is one for all
            else:
                rows.append(len(values))
                values.append(own)
        self.register_buffer("values", torch.stack(values).to(like.device, like.dtype), persistent=False)
        self.register_buffer("rows", torch.tensor(rows, dtype=torch.int32, device=like.device), persistent=False)

    def row_of(self, ids: Tensor) -> Tensor:
        """For each id the row of ``values`` that is its own, −1 for the base's."""
        return torch.where(ids >= 0, self.rows[ids.clamp(min=0)], -1)

    def select(self, ids: Tensor, base: Tensor) -> Tensor:
        """For each of B ids its model's tensor: (B, *shape)."""
        row = self.row_of(ids)
        own = self.values[row.clamp(min=0)]
        return torch.where((row >= 0).view(-1, *[1] * base.dim()), own, base)


class _Routed(nn.Module):
    """Mixed into a layer's class: what its tables hold counts instead of its own tensors.

    Read from outside, and by layers that are not routed row by row, a kept tensor is that of the batch's one model.
    """

    _router: Router
    _tables: nn.ModuleDict  # of KeptTable

    def _table(self, name: str) -> KeptTable:
        table = self._tables[_key(name)]
        assert isinstance(table, KeptTable)
        return table

    def _own(self, name: str, ids: Tensor) -> Tensor | None:
        """The parameter ``name`` for each id, (B, *shape); None where the layer has none."""
        base = self._parameters[name]
        if base is None:
            return None
        return self._table(name).select(ids, base) if _key(name) in self._tables else base.expand(len(ids), *base.shape)

    def _spread(self, input: Tensor) -> tuple[Tensor, Tensor | None]:
        """The input with a row for each row of the batch, and the batch's ids: None where it is the base's alone."""
        batch = self._router.batch()
        return batch.spread(input), None if batch.runs_base else batch.on(input.device)

    def _kept(self, name: str) -> Tensor:
        batch = self._router.batch()
        base = self._parameters.get(name, self._buffers.get(name))
        assert base is not None
        if batch.mixed:
            raise ValueError(
                f"{name} of a {type(self).__name__} is kept per model, and cannot be read for rows of several models"
                ' at once: run one model at a time, or superpose with others="base"'
            )
        return self._table(name).select(batch.on(base.device), base)[0]

    def extra_repr(self) -> str:
        """The base's: a layer is printed where no model is chosen."""
        with self._router.during(self._router.of([BASE_NAME])):
            return super().extra_repr()


class RoutedLinear(_Routed, nn.Linear):
    """A small linear layer, a class head say, with each model's own weight and bias."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., K) → (..., N)"""
        input, ids = self._spread(input)
        if ids is None:
            return super().forward(input)
        weight, bias = self._own("weight", ids), self._own("bias", ids)
        assert weight is not None
        if len(ids) == 1:
            return F.linear(input, weight[0], None if bias is None else bias[0])
        rows = input.reshape(len(ids), -1, input.shape[-1])
        y = rows @ weight.mT if bias is None else torch.baddbmm(bias[:, None], rows, weight.mT)
        return y.view(*input.shape[:-1], self.out_features)


class RoutedLayerNorm(_Routed, nn.LayerNorm):
    """A layer norm with each model's own weight and bias."""

    def forward(self, input: Tensor) -> Tensor:
        """Any shape that ends in ``normalized_shape``; the same out."""
        input, ids = self._spread(input)
        if ids is None:
            return super().forward(input)
        weight, bias = self._own("weight", ids), self._own("bias", ids)
        if len(ids) == 1:
            weight, bias = (None if value is None else value[0] for value in (weight, bias))
            return F.layer_norm(input, self.normalized_shape, weight, bias, self.eps)
        plain = F.layer_norm(_exact(input), self.normalized_shape, eps=self.eps)
        return _scaled_by_row(plain, weight, bias).to(input.dtype)


class RoutedRMSNorm(_Routed, nn.RMSNorm):
    """An RMS norm with each model's own weight."""

    def forward(self, input: Tensor) -> Tensor:
        """Any shape that ends in ``normalized_shape``; the same out."""
        input, ids = self._spread(input)
        if ids is None:
            return super().forward(input)
        weight = self._own("weight", ids)
        assert weight is not None
        if len(ids) == 1:
            return F.rms_norm(input, self.normalized_shape, weight[0], self.eps)
        plain = F.rms_norm(_exact(input), self.normalized_shape, eps=self.eps)
        return _scaled_by_row(plain, weight, None).to(input.dtype)


def _scaled_by_row(plain: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Each row of a normalised batch times and plus its own model's: ``plain`` fp32, the others (B, *shape)."""
    for value, combine in ((weight, torch.mul), (bias, torch.add)):
        if value is not None:
            runs = plain.view(len(value), -1, *value.shape[1:])
            plain = combine(runs, value.to(plain.dtype)[:, None]).view(plain.shape)
    return plain


def _exact(input: Tensor) -> Tensor:
    return input.to(torch.promote_types(input.dtype, torch.float32))


class RoutedEmbedding(_Routed, nn.Embedding):
    """An embedding with each model's own table; no table is copied, each token looks in its model's."""

    def forward(self, input: Tensor) -> Tensor:
        """(B, ...) integers → (B, ..., D)"""
        input, ids = self._spread(input)
        weight = self._parameters["weight"]
        assert weight is not None
        base = F.embedding(input, weight)
        if ids is None:
            return base
        table = self._table("weight")
        row = table.row_of(ids).repeat_interleave(input.shape[0] // len(ids) if input.shape[0] else 0)
        row = row.view(-1, *[1] * (input.dim() - 1))
        flat = table.values.flatten(0, 1)
        own = F.embedding(input + row.clamp(min=0) * self.num_embeddings, flat)
        return torch.where((row >= 0)[..., None], own, base)


ROUTED: dict[type[nn.Module], type[_Routed]] = {
    nn.Linear: RoutedLinear,
    nn.LayerNorm: RoutedLayerNorm,
    nn.RMSNorm: RoutedRMSNorm,
    nn.Embedding: RoutedEmbedding,
}


class _RoutedByModel(_Routed):
    """Any other layer of one input and one output: run once for each model of a mixed batch, on its rows alone."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's own forward. In a mixed batch it must take one tensor, and return one, with the batch first."""
        batch = self._router.batch()
        inputs = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        if not batch.mixed or len(inputs) != 1:
            return super().forward(*args, **kwargs)
        ids = batch.ids.tolist()
        runs = torch.unflatten(batch.spread(inputs[0]), 0, (len(ids), -1))
        parts: list[Tensor] = []
        places: list[int] = []
        for model in sorted(set(ids)):
            chosen = [place for place, other in enumerate(ids) if other == model]
            part = runs[chosen].flatten(0, 1)
            one = [part if value is inputs[0] else value for value in args]
            named = {name: part if value is inputs[0] else value for name, value in kwargs.items()}
            with self._router.during(batch.of_one(model)):
                y = super().forward(*one, **named)
            if not isinstance(y, Tensor) or y.shape[:1] != part.shape[:1]:
                raise ValueError(
                    f"a {type(self).__name__} with tensors kept per model must return one tensor with the batch first"
                    f" to serve a mixed batch, got {tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__}"
                )
            parts.append(torch.unflatten(y, 0, (len(chosen), -1)))
            places += chosen
        return torch.cat(parts)[torch.tensor(places).argsort().to(runs.device)].flatten(0, 1)


def _key(name: str) -> str:
    return f"own_{name}"  # a tensor may be called what a module's method is


def _kept_property(name: str) -> property:
    return property(lambda self: self._kept(name))


def route_layer(layer: nn.Module, tables: dict[str, KeptTable], router: Router) -> None:
    """Make ``layer``, in place, use each row's own model's tensors."""
    plain = type(layer)
    by_row = ROUTED.get(plain) if getattr(layer, "max_norm", None) is None else None  # max_norm rewrites the table
    bases = (_RoutedByModel, plain) if by_row is None else (by_row,)
    layer.__class__ = type(f"Routed{plain.__name__}", bases, {name: _kept_property(name) for name in tables})
    assert isinstance(layer, _Routed)
    layer._router = router
    layer._tables = nn.ModuleDict({_key(name): table for name, table in tables.items()})
