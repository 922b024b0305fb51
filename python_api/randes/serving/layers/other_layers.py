"""Superposed layers of other kinds than ``nn.Linear``: each is its own forward around the same product.

    Transformers' Conv1D    y = x Ŵ + b, with W (K, N) seen as its transpose
    nn.Conv1d, 2d, 3d       windows of x as rows, times Ŵ (N, C · k · ...); groups cost their number in products
    nn.Embedding            row i of Ŵ_j = W0[i] + α_j g_j r_j[i] · c_j ⊙ (D[i] P_jᵀ)
    stacked experts         each expert's tokens, of any models, in one product with its own matrix
    a fused nn.Linear       a product for each of its parts, which have signs and gains of their own

Kept tensors beside the weight (biases) are each row's own model's. (Design, sections 1 and 3.)
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from randes.checkpoints.layout import is_conv1d
from randes.checkpoints.modules.parameters import base_of
from randes.checkpoints.tensor_views import View
from randes.serving.batch import Version
from randes.serving.layers.per_model import Routed
from randes.serving.layers.superposed import SuperposedMatrix
from randes.serving.table_rows import put
from randes.superposition.superposition import Superposition
from randes_kernels import mixing
from randes_kernels.reference import transform_parts


class SuperposedLayer(Routed):
    """Mixed into a layer's class: its weights' deltas, matrix by matrix."""

    _weights: nn.ModuleDict  # by parameter, a list of SuperposedMatrix
    _views: Mapping[str, View]

    def take_weights(self, weights: Mapping[str, Sequence[SuperposedMatrix]], views: Mapping[str, View]) -> None:
        """The superposed parameters' matrices by name, in the order of their views."""
        self._weights = nn.ModuleDict({_key(name): nn.ModuleList(own) for name, own in weights.items()})
        self._views = views
        self._prepare()

    def _prepare(self) -> None:
        """What a kind needs beside its matrices; after they are there."""

    def _matrices(self, name: str) -> list[SuperposedMatrix]:
        held = self._weights[_key(name)]
        assert isinstance(held, nn.ModuleList)
        return [matrix for matrix in held if isinstance(matrix, SuperposedMatrix)]

    def products(self) -> Iterator[tuple[SuperposedMatrix, Tensor]]:
        """Every matrix with the part of a weight that it multiplies beside, (N, K)."""
        for name, view in self._views.items():
            yield from zip(self._matrices(name), view.matrices(base_of(self, name)).values(), strict=True)

    def _multiply(self, x: Tensor, ids: Tensor, name: str = "weight") -> Tensor:
        """``x Ŵ_jᵀ`` with the parameter's matrices, one beside the other."""
        parts = self._views[name].matrices(base_of(self, name)).values()
        products: list[Tensor] = [own(x, part, ids) for own, part in zip(self._matrices(name), parts, strict=True)]
        return products[0] if len(products) == 1 else torch.cat(products, -1)

    def product_with(self, x: Tensor, name: str, bias: Tensor | None = None) -> Tensor | None:
        """``F.linear`` of x (..., K) with the parameter ``name``, (N, K), as each row's own model has it; None for one
        of another form."""
        view, batch = self._views[name], self._router.batch()
        if view.transposed or len(view.shape) != 2 or batch.runs_base:
            return None
        x = batch.spread(x)
        y = self._multiply(x, batch.on(x.device), name)
        y = y if bias is None else y + bias
        return self._matrices(name)[0].with_added(y, x, batch)

    def _plus_bias(self, y: Tensor, ids: Tensor) -> Tensor:
        """y (..., N) plus each row's own model's bias."""
        own = self._own("bias", ids)
        return y if own is None else (y.reshape(len(own), -1, y.shape[-1]) + own[:, None].to(y.dtype)).view(y.shape)


class SuperposedConv1D(SuperposedLayer):
    """Transformers' Conv1D, and an ``nn.Linear`` of several fused matrices."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) → (..., N)"""
        x, ids = self._spread(x)
        return super().forward(x) if ids is None else self._plus_bias(self._multiply(x, ids), ids)


class SuperposedConv(SuperposedLayer, nn.modules.conv._ConvNd):
    """A convolution over any number of dimensions."""

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, ...) → (B, N, ...); without B where all rows are one model's."""
        dimensions = len(self.kernel_size)
        if input.dim() == dimensions + 1 and not self._router.batch().mixed:
            return self.forward(input[None])[0]
        input, ids = self._spread(input)
        if ids is None:
            return super().forward(input)
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        x = F.pad(input, self._reversed_padding_repeated_twice, mode=mode)
        for axis, (size, stride, dilation) in enumerate(zip(self.kernel_size, self.stride, self.dilation, strict=True)):
            x = x.unfold(2 + axis, (size - 1) * dilation + 1, stride)[..., ::dilation]
        places = range(2, 2 + dimensions)
        windows = x.permute(0, *places, 1, *range(2 + dimensions, x.dim()))
        windows = windows.reshape(*windows.shape[: 1 + dimensions], self.groups, -1)
        products = [self._multiply(windows[..., group, :], ids) for group in range(self.groups)]
        width = self.out_channels // self.groups
        own = [y[..., group * width : (group + 1) * width] for group, y in enumerate(products)]
        return self._plus_bias(torch.cat(own, -1), ids).movedim(-1, 1)


SIGNS = "row_signs", "column_signs", "columns"


class SuperposedEmbedding(SuperposedLayer, nn.Embedding):
    """An embedding superposed by row: a token's row of D is turned back on its way out.

    Row signs take a byte a token and model, kept beside the layer.
    """

    row_signs: Tensor
    column_signs: Tensor
    columns: Tensor
    mixed: Tensor  # what turns columns back in place of signs

    def _prepare(self) -> None:
        (matrix,), weight = self._matrices("weight"), base_of(self, "weight")
        parts = transform_parts(0, matrix.tensor, weight.shape, matrix.transform)
        for name, like in zip(SIGNS, parts, strict=True):
            table = torch.zeros((len(matrix.keys), *like.shape), dtype=like.dtype, device=weight.device)
            self.register_buffer(name, table, persistent=False)
        mixed = self._mixed(0, matrix, weight.shape)
        table = torch.zeros((len(matrix.keys), *mixed.shape), dtype=mixed.dtype, device=weight.device)
        self.register_buffer("mixed", table, persistent=False)

    def write(self, superposition: Superposition, versions: Sequence[Version]) -> None:
        """Fill these models' rows, which nobody reads yet."""
        (matrix,), shape = self._matrices("weight"), base_of(self, "weight").shape
        for version in versions:
            parts = transform_parts(superposition.key(version.name), matrix.tensor, shape, matrix.transform)
            for name, own in zip(SIGNS, parts, strict=True):
                put(getattr(self, name), version.number, own)
            put(self.mixed, version.number, self._mixed(superposition.key(version.name), matrix, shape))

    @staticmethod
    def _mixed(key: int, matrix: SuperposedMatrix, shape: torch.Size) -> Tensor:
        """What turns one model's columns back in place of signs."""
        transform = matrix.transform
        return mixing.tables_back([key], matrix.tensor, shape[1], transform.matrix, transform.first_column)[0]

    def forward(self, input: Tensor) -> Tensor:
        """(B, ...) integers → (B, ..., K)"""
        input, ids = self._spread(input)
        (matrix,) = self._matrices("weight")
        if ids is not None and matrix.added is not None:
            return self._with_added(matrix, matrix.added, input, ids)
        return self._of_base_rows(matrix, input, ids)

    def _with_added(self, matrix: SuperposedMatrix, added: Tensor, input: Tensor, ids: Tensor) -> Tensor:
        """The same, where some models have tokens of their own. Raises ``IndexError`` for one that a row's lacks."""
        place, counts = input.reshape(len(ids), -1) - self.num_embeddings, matrix.added_counts
        assert counts is not None
        model = ids.clamp(min=0)
        known = place < torch.where(ids < 0, 0, counts[model])[:, None]
        if torch.compiler.is_compiling() or known.is_cuda:
            torch._assert_async(known.all(), "a token must be in its model's vocabulary")
        elif not known.all():
            token = int(input.reshape(known.shape)[~known][0])
            raise IndexError(f"token {token} is not in the vocabulary of its row's model")
        own = added[model[:, None], place.clamp(min=0)]
        found = self._of_base_rows(matrix, torch.where(input < self.num_embeddings, input, 0), ids)
        return torch.where((place < 0).view(input.shape)[..., None], found, own.view(found.shape))

    @property
    def matrix(self) -> SuperposedMatrix:
        """The deltas of its table, to multiply with."""
        return self._matrices("weight")[0]

    def of_rows(self, input: Tensor, ids: Tensor) -> Tensor:
        """The look-up for the models that ids (B,) name, whatever batch there is: (B, ...) integers → (B, ..., K)"""
        return self._of_base_rows(self.matrix, input, ids)

    def _of_base_rows(self, matrix: SuperposedMatrix, input: Tensor, ids: Tensor | None) -> Tensor:
        base = F.embedding(input, base_of(self, "weight"))
        if ids is None:
            return base
        tokens = input.reshape(len(ids), -1)
        delta = self._turned_back(matrix, tokens, ids) if matrix.pool.slots else 0.0
        if matrix.corrections is not None:
            own, model = matrix.corrections, ids.clamp(min=0)
            directions = matrix.shared_basis if matrix.directions is None else matrix.directions[model]
            assert directions is not None
            inside = own[model[:, None], :, tokens] @ directions.mT
            delta = delta + torch.where((ids >= 0)[:, None, None], inside, 0)
        return base if isinstance(delta, float) else (base + delta.view(base.shape)).to(base.dtype)

    def _turned_back(self, matrix: SuperposedMatrix, tokens: Tensor, ids: Tensor) -> Tensor:
        """Rows of each model's delta, as its superposition gives them back: (B, T, K) for tokens (B, T)."""
        model = ids.clamp(min=0)[:, None]
        slot = matrix.slots[model]
        delta = matrix.pool.rows(slot.clamp(min=0), tokens)
        delta = delta.to(torch.promote_types(base_of(self, "weight").dtype, torch.float32))
        if matrix.transform.matrix:
            delta = mixing.back_by_tables(delta, model[:, 0], self.mixed, matrix.inverses, matrix.transform.matrix)
        if matrix.transform.granule:
            delta = delta.gather(-1, self.columns[model].expand_as(delta))
        delta = delta * (matrix.scale[model] * self.row_signs[model, tokens])[..., None] * self.column_signs[model]
        return torch.where(((ids[:, None] >= 0) & (slot >= 0))[..., None], delta, 0)


class SuperposedExperts(SuperposedLayer):
    """Stacked experts of Transformers: a token goes to its own model's version of the experts that it chose."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states: (tokens, K), of equal runs of tokens for each row. Chosen experts and their weights:
        (tokens, chosen)."""
        hidden_states, ids = self._spread(hidden_states)
        if ids is None:
            y: Tensor = super().forward(hidden_states, top_k_index, top_k_weights)
            return y
        y = torch.zeros_like(hidden_states)
        first = "gate_up_proj" if self.has_gate else "up_proj"
        gate: Any = self._apply_gate if self.has_gate else self.act_fn
        for expert in torch.unique(top_k_index).tolist():
            if expert >= self.num_experts:  # a token that another device's expert takes
                continue
            token, chosen = torch.where(top_k_index == expert)
            own = ids if len(ids) == 1 else ids[token // (len(hidden_states) // len(ids))]
            x = self._of_expert(hidden_states[token], own, first, expert)
            x = gate(x)
            x = self._of_expert(x, own, "down_proj", expert) * top_k_weights[token, chosen, None]
            y.index_add_(0, token, x.to(y.dtype))
        return y

    def _of_expert(self, x: Tensor, ids: Tensor, name: str, expert: int) -> Tensor:
        weight = base_of(self, name)[expert]
        y = self._matrices(name)[expert](x, weight.mT if self.is_transposed else weight, ids)
        if self.has_bias:
            y = y + self._own(f"{name}_bias", ids, expert)
        return y


def is_linear(layer: nn.Module) -> bool:
    """Whether a layer is an ``nn.Linear``, or Falcon's, which adds the bias for itself; without importing that."""
    falcon = type(layer).__name__, type(layer).__module__
    return type(layer) is nn.Linear or falcon == ("FalconLinear", "transformers.models.falcon.modeling_falcon")


def kind_of(layer: nn.Module, weights: Mapping[str, View]) -> type[SuperposedLayer] | None:
    """The class that serves a layer whose parameters ``weights`` are superposed; None where there is none."""
    if set(weights) == {"weight"}:
        if is_linear(layer) or (is_conv1d(layer) and weights["weight"].transposed):
            return SuperposedConv1D
        if type(layer) in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
            return SuperposedConv
        if isinstance(layer, nn.Embedding) and layer.max_norm is None:
            return SuperposedEmbedding
    if hasattr(layer, "_apply_gate") and not getattr(layer, "has_post_expert_norm", True):
        both = {"gate_up_proj" if layer.has_gate else "up_proj", "down_proj"}
        if set(weights) == both and all(view.transposed == layer.is_transposed for view in weights.values()):
            return SuperposedExperts
    return None


def _key(name: str) -> str:
    return f"deltas_of_{name}"
