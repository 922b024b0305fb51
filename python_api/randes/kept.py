"""Layers around the superposed ones whose tensors differ between models: each row gets its own model's.

``SuperposedLinear`` routes its bias itself. Norms, embeddings and linear layers that are not superposed are
routed here, by the class of the layer. Any other layer can serve one model at a time, and says so.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from randes.routing import Router
from randes.superposition import Superposition


class KeptTable(nn.Module):
    """One tensor as each model has it: the rows of those that differ from the base, and who has which."""

    values: Tensor
    rows: Tensor

    def __init__(self, superposition: Superposition, tensor: str, like: Tensor) -> None:
        super().__init__()
        base = superposition.base[tensor]
        own = [superposition.other(model, tensor) for model in superposition.names]
        differs = [value is not base for value in own]
        values = [value for value, differs_here in zip(own, differs, strict=True) if differs_here]
        rows = torch.tensor(differs, dtype=torch.int32).cumsum(0, dtype=torch.int32) - 1
        rows[~torch.tensor(differs)] = -1
        self.register_buffer("values", torch.stack(values).to(like.device, like.dtype), persistent=False)
        self.register_buffer("rows", rows.to(like.device), persistent=False)

    def row_of(self, ids: Tensor) -> Tensor:
        """For each id the row of ``values`` that is its own, −1 for the base's."""
        return torch.where(ids >= 0, self.rows[ids.clamp(min=0)], -1)

    def select(self, ids: Tensor, base: Tensor) -> Tensor:
        """For each of B ids its model's tensor: (B, *shape)."""
        row = self.row_of(ids)
        own = self.values[row.clamp(min=0)]
        return torch.where((row >= 0).view(-1, *[1] * base.dim()), own, base)


class _Routed(nn.Module):
    """Mixed into a layer's class: what its tables hold counts instead of its own parameters."""

    router: Router
    tables: nn.ModuleDict

    def _own(self, name: str, ids: Tensor) -> Tensor | None:
        """The parameter ``name`` for each id, (B, *shape); None where the layer has none."""
        base = getattr(self, name)
        if base is None:
            return None
        return self.tables[name].select(ids, base) if name in self.tables else base.expand(len(ids), *base.shape)

    def _ids(self, input: Tensor) -> Tensor | None:
        """The ids of the batch; None where it is the base's alone."""
        batch = self.router.batch()
        batch.check(input)
        return None if batch.base_only else batch.on(input.device)


class RoutedLinear(_Routed, nn.Linear):
    """A small linear layer, a class head say, with each model's own weight and bias."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., K) → (..., N)"""
        ids = self._ids(input)
        if ids is None:
            return super().forward(input)
        weight, bias = self._own("weight", ids), self._own("bias", ids)
        assert weight is not None
        if len(ids) == 1:
            return F.linear(input, weight[0], None if bias is None else bias[0])
        rows = input.reshape(len(ids), -1, input.shape[-1])
        y = rows @ weight.mT if bias is None else torch.baddbmm(bias[:, None], rows, weight.mT)
        return y.view(*input.shape[:-1], -1)


class _RoutedNorm(_Routed):
    """A norm is its plain self without parameters, in fp32, and then each row's own."""

    eps: float | None
    normalized_shape: tuple[int, ...]
    normalize: Callable[..., Tensor]

    def forward(self, input: Tensor) -> Tensor:
        """Any shape that ends in ``normalized_shape``; the same out."""
        ids = self._ids(input)
        if ids is None:
            return super().forward(input)  # type: ignore[no-any-return,misc]
        own = [value for name in ("weight", "bias") if (value := self._own_or_none(name, ids)) is not None]
        shape = tuple(self.normalized_shape)
        if len(ids) == 1:
            return type(self).normalize(input, shape, *[value[0] for value in own], eps=self.eps)
        y = type(self).normalize(input.float(), shape, eps=self.eps).view(len(ids), -1, *shape)
        for value, combine in zip(own, (torch.mul, torch.add), strict=False):
            y = combine(y, value.float()[:, None])
        return y.view(input.shape).to(input.dtype)

    def _own_or_none(self, name: str, ids: Tensor) -> Tensor | None:
        return self._own(name, ids) if hasattr(self, name) else None


class RoutedLayerNorm(_RoutedNorm, nn.LayerNorm):
    """A layer norm with each model's own weight and bias."""

    normalize = staticmethod(F.layer_norm)


class RoutedRMSNorm(_RoutedNorm, nn.RMSNorm):
    """An RMS norm with each model's own weight."""

    normalize = staticmethod(F.rms_norm)


class RoutedEmbedding(_Routed, nn.Embedding):
    """An embedding with each model's own table; no table is copied, each token looks in its model's."""

    def forward(self, input: Tensor) -> Tensor:
        """(B, ...) integers → (B, ..., D)"""
        ids = self._ids(input)
        base = F.embedding(input, self.weight)
        if ids is None:
            return base
        table: KeptTable = self.tables["weight"]  # type: ignore[assignment]
        row = table.row_of(ids).view(-1, *[1] * (input.dim() - 1)).expand(len(ids), *input.shape[1:])
        row = row.repeat_interleave(input.shape[0] // len(ids), 0) if len(ids) > 1 else row.expand(input.shape)
        flat = table.values.flatten(0, 1)
        own = F.embedding(input + row.clamp(min=0) * self.num_embeddings, flat)
        return torch.where((row >= 0)[..., None], own, base)


ROUTED: dict[type[nn.Module], type[_Routed]] = {
    nn.Linear: RoutedLinear,
    nn.LayerNorm: RoutedLayerNorm,
    nn.RMSNorm: RoutedRMSNorm,
    nn.Embedding: RoutedEmbedding,
}


class _OneModelAtATime(_Routed):
    """Any other layer: its kept tensors read as those of the batch's one model."""

    def _kept(self, name: str) -> Tensor:
        batch = self.router.batch()
        base = self._parameters.get(name, self._buffers.get(name))
        assert base is not None
        if batch.mixed:
            raise ValueError(
                f"{name} of a {type(self).__name__} is kept per model, and this layer cannot take rows of several models:"
                ' run one model at a time, or superpose with others="base"'
            )
        return self.tables[name].select(batch.on(base.device), base)[0]


def route_layer(layer: nn.Module, tables: dict[str, KeptTable], router: Router) -> None:
    """Make ``layer``, in place, use each row's own model's tensors."""
    plain = type(layer)
    routed = ROUTED.get(plain)
    if routed is None:
        properties = {name: property(lambda self, name=name: self._kept(name)) for name in tables}
        routed = type(plain.__name__, (_OneModelAtATime, plain), properties)
    layer.__class__ = routed
    layer.router = router
    layer.tables = nn.ModuleDict(tables)
