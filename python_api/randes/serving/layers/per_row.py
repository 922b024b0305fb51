"""Layers around the superposed ones whose tensors differ between models: each row gets its own model's.

``SuperposedLinear`` routes its bias itself. Norms, embeddings and linear layers that are not superposed are
routed here, by the kind of the layer. Any other layer is run once for each model of a mixed batch, on its rows.
"""

import inspect
from collections.abc import Collection, Iterable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from randes.checkpoints.modules.parameters import base_of, move
from randes.errors import WeightReadError
from randes.serving.layers.by_model import by_model, can_be_split
from randes.serving.layers.norms import multiplies_by_element
from randes.serving.layers.per_model import PerModelTensor, Routed, key_of, routed_class
from randes.serving.layers.recomputed import OwnFlatWeights, recomputed_in
from randes.serving.routing import Router

FEW_ELEMENTS = 1 << 16
"""Of a linear layer's weight that are gathered for each row; a larger one is multiplied model by model, uncopied."""


class RoutedLinear(Routed, nn.Linear):
    """A linear layer that is not superposed, a class head say, with each model's own weight and bias."""

    def forward(self, input: Tensor) -> Any:
        """(..., K) → (..., N); where the rows' models differ in N a list with an output for each, or, where the N are
        tokens, as many as any of them has, −∞ for those that a row's own has not."""
        input, ids = self._spread(input)
        if ids is None:
            return super().forward(input)
        tables = [table for table in map(self._table, ("weight", "bias")) if table is not None]
        if not tables:
            return super().forward(input)
        batch = self._router.batch()
        large = base_of(self, "weight").numel() > FEW_ELEMENTS and not (
            torch.compiler.is_compiling() or batch.refillable
        )
        ragged = any(table.ragged for table in tables)
        if batch.mixed and (ragged or large):
            y = by_model(self._router, super().forward, (input,), {}, ragged=ragged)
            return _of_one_width(y, input.dim()) if ragged and tables[0].vocabulary else y
        weight, bias = self._own("weight", ids), self._own("bias", ids)
        assert weight is not None
        if len(ids) == 1:
            return F.linear(input, weight[0], None if bias is None else bias[0])
        rows = input.reshape(len(ids), -1, input.shape[-1])
        y = rows @ weight.mT if bias is None else torch.baddbmm(bias[:, None], rows, weight.mT)
        return y.view(*input.shape[:-1], self.out_features)


def _of_one_width(rows: list[Tensor], dimensions: int) -> Tensor:
    width = max(row.shape[-1] for row in rows)
    padded = [F.pad(row, (0, width - row.shape[-1]), value=-torch.inf) for row in rows]
    return torch.stack(padded) if rows[0].dim() < dimensions else torch.cat(padded)


class RoutedLayerNorm(Routed, nn.LayerNorm):
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


class RoutedRMSNorm(Routed, nn.RMSNorm):
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


class RoutedNorm(Routed):
    """A library's own norm of one weight, which its forward multiplies by element: Transformers' RMS norms."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., K), the same out: the norm's own forward, with its weight as (B, 1, K)."""
        input, ids = self._spread(input)
        if ids is None or not self._router.batch().mixed:
            y: Tensor = super().forward(input)
            return y
        rows = input.reshape(len(ids), -1, input.shape[-1])
        with self._router.during(replace(self._router.batch(), by_row=True)):
            y = super().forward(rows)
        if y.shape != rows.shape:
            raise ValueError(f"a {type(self).__name__} must multiply by its weight, got {tuple(y.shape)} out of it")
        return y.view(input.shape)


class RoutedEmbedding(Routed, nn.Embedding):
    """An embedding with each model's own table; no table is copied, each token looks in its model's.

    of_positions: what is looked up may be one row of positions, (T,), for all rows of a batch.
    """

    of_positions = False

    def forward(self, input: Tensor) -> Tensor:
        """(B, ...) integers → (B, ..., D)"""
        if self.of_positions and input.dim() == 1 and self._router.batch().mixed:
            input = input[None]  # the same for all rows, and each model's own
        input, ids = self._spread(input)
        table = self._table("weight")
        if ids is not None and table is not None and table.ragged:  # vocabularies of other sizes
            batch = self._router.batch()
            return by_model(self._router, self._of_one, (input,), {}) if batch.mixed else self._of_one(input)
        base = F.embedding(input, base_of(self, "weight"))
        if ids is None or table is None:
            return base
        row = table.row_of(ids)
        if len(ids) == 1:
            row = row[0]  # for whatever is looked up, also a single number
        else:
            row = row.repeat_interleave(input.shape[0] // len(ids) if input.shape[0] else 0)
            row = row.view(-1, *[1] * (input.dim() - 1))
        flat = table.values.flatten(0, 1)
        own = F.embedding(input + row.clamp(min=0) * self.num_embeddings, flat)
        return torch.where((row >= 0)[..., None], own, base)

    def _of_one(self, input: Tensor) -> Tensor:
        """Looked up in the table of the batch's one model."""
        base, table = base_of(self, "weight"), self._table("weight")
        return F.embedding(input, base if table is None else table.of(self._router.batch().number, base))


class RoutedByModel(Routed):
    """Any other layer: run once for each model of a mixed batch, on its rows alone.

    It must take tensors with the batch first, and nothing that remembers a call (a cache), and return one tensor or a
    tuple of them. Others serve one model at a time.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's own forward."""
        if not self._router.batch().mixed or not can_be_split(self, (*args, *kwargs.values())):
            return super().forward(*args, **kwargs)
        return by_model(self._router, super().forward, args, kwargs)


class RoutedRecurrent(OwnFlatWeights, RoutedByModel):
    """An LSTM and the like."""


class RoutedParametrization(RoutedByModel):
    """What ``torch.nn.utils.parametrize`` makes a weight of."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Its own forward. Raises ``ValueError`` where ``parametrize.cached()`` would give that to other models' calls,
        and ``WeightReadError`` for a mix: the rows of a weight are not the batch's."""
        if parametrize._cache_enabled:
            raise ValueError(
                "torch.nn.utils.parametrize.cached() must not be around calls of a model that serves many: it would"
                " give the weights of one to the others"
            )
        if self._router.batch().mixed and any(
            isinstance(part, PerModelTensor) and part.used for part in self.modules()
        ):
            raise WeightReadError(
                "a weight that torch.nn.utils.parametrize makes of tensors that are kept per model cannot be read for"
                " rows of several models at once: run one model at a time"
            )
        return super().forward(*args, **kwargs)


class RoutedBias(Routed):
    """Self-attention that makes a bias of relative positions, one for all rows of a model (T5's)."""

    def compute_bias(self, *args: Any, **kwargs: Any) -> Tensor:
        """(1, heads, queries, keys) of one model, (B, ...) of a mixed batch."""
        batch = self._router.batch()
        biases: dict[int, Tensor] = {}
        for model in sorted(set(batch.numbers)):
            with self._router.during(batch.of_one(model)):
                biases[model] = super().compute_bias(*args, **kwargs)  # type: ignore[misc]
        return torch.cat([biases[model] for model in batch.numbers])


ROUTED: dict[type[nn.Module], type[Routed]] = {
    nn.Linear: RoutedLinear,
    nn.LayerNorm: RoutedLayerNorm,
    nn.RMSNorm: RoutedRMSNorm,
}


def routing_of(layer: nn.Module, tables: Collection[str]) -> type[Routed]:
    """How a layer takes each row's own of its tensors ``tables``."""
    if isinstance(layer, nn.RNNBase):
        return RoutedRecurrent
    if isinstance(layer, parametrize.ParametrizationList):
        return RoutedParametrization
    if recomputed_in(layer):
        return RoutedByModel
    if type(layer) in ROUTED:
        return ROUTED[type(layer)]
    if isinstance(layer, nn.Embedding) and layer.max_norm is None and calls_super(layer):  # max_norm rewrites the table
        return RoutedEmbedding
    own = dict(layer.named_parameters(recurse=False))
    named_norm = type(layer).__name__.endswith("Norm") and not type(layer).__module__.startswith("torch.")
    if named_norm and own.keys() == set(tables) == {"weight"} and own["weight"].dim() == 1:
        return RoutedNorm if multiplies_by_element(layer) else RoutedByModel
    return RoutedByModel


def calls_super(layer: nn.Module) -> bool:
    """Whether an embedding looks its tokens up as ``nn.Embedding`` does, whatever it does before and after."""
    code = getattr(inspect.unwrap(type(layer).forward), "__code__", None)
    return type(layer) is nn.Embedding or "__class__" in getattr(code, "co_freevars", ())


def route_layer(
    layer: nn.Module, tables: dict[str, PerModelTensor], router: Router, kind: type[Routed] | None = None,
    superposed: Iterable[str] = (),
) -> None:  # fmt: skip
    """Make ``layer``, in place, use each row's own model's tensors.

    kind: how, where it is not only kept tensors. superposed: its parameters that are.
    """
    made: Any = layer
    made_class = routed_class(
        kind or routing_of(layer, tables), type(layer), tuple(sorted(tables)), tuple(sorted(superposed)),
        recomputed_in(layer),
    )  # fmt: skip
    made._router = router
    made._tables = nn.ModuleDict({key_of(name): table for name, table in tables.items()})
    move(layer, made_class.moved, made_class)  # last: another thread may be about to call it
