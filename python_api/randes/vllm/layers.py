"""What one parameter of a vLLM model is to a batch of tokens of many models.

    Product    y = x Ŵ_jᵀ                 a linear layer's weight, fused of several matrices or not
    Vectors    each token's own           a bias, or what a norm multiplies with
    Table      row t of Ŵ_j; x Ŵ_jᵀ       embeddings, heads, and what is both

Each is called with the number of every token's model, −1 for the base, in a buffer whose address stays.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from randes.serving.layers.other_layers import SuperposedEmbedding
from randes.serving.layers.per_model import PerModelTensor
from randes.serving.layers.superposed import SuperposedMatrix
from randes.vllm.places import Place


class Product(nn.Module):
    """weight: (N, K), vLLM's. matrices: of each place in it that is superposed."""

    def __init__(self, weight: Tensor, matrices: Sequence[tuple[Place, SuperposedMatrix]]) -> None:
        super().__init__()
        self.matrices = nn.ModuleList(matrix for _, matrix in matrices)
        self.runs: list[tuple[Tensor, SuperposedMatrix | None]] = []
        last = 0
        for place, matrix in matrices:
            self._base_alone(weight[last : place.rows.start])
            self.runs.append((weight[place.rows.start : place.rows.stop], matrix))
            last = place.rows.stop
        self._base_alone(weight[last:])

    def _base_alone(self, rows: Tensor) -> None:
        if len(rows):
            self.runs.append((rows, None))

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        """(T, K) → (T, N)"""
        found = [F.linear(x, rows) if own is None else own(x, rows, ids) for rows, own in self.runs]
        return found[0] if len(found) == 1 else torch.cat(found, -1)


class Vectors(nn.Module):
    """value: (N,), vLLM's. tables: of each place in it what models have of their own."""

    def __init__(self, value: Tensor, tables: Sequence[tuple[Place, PerModelTensor]]) -> None:
        super().__init__()
        self.value, self.places = value, [place.rows for place, _ in tables]
        self.tables = nn.ModuleList(table for _, table in tables)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        """(T, ...) → (T, N), whatever x holds."""
        own = self.value.expand(len(ids), -1).clone()
        for rows, table in zip(self.places, self.tables, strict=True):
            assert isinstance(table, PerModelTensor)
            if table.used:
                part = slice(rows.start, rows.stop)
                own[:, part] = table.select(ids, self.value[part])
        return own


class Table(nn.Module):
    """weight: (V, K), vLLM's. place: of the tokens in it, which are its first rows; the others pad it. own: what models
    have of them, whole or as deltas."""

    def __init__(self, weight: Tensor, own: PerModelTensor | SuperposedEmbedding, place: Place) -> None:
        super().__init__()
        self.weight, self.own = weight, own
        self.count, self.first_row = len(place.rows), place.first_row

    def forward(self, tokens: Tensor, ids: Tensor) -> Tensor:
        """(T, 1) integers → (T, K)"""
        own, tokens = self.own, tokens[:, 0]
        if isinstance(own, SuperposedEmbedding):
            return own.of_rows(tokens, ids)
        assert isinstance(own, PerModelTensor)
        base = F.embedding(tokens, self.weight)
        if not own.used:
            return base
        row = own.row_of(ids)
        found = F.embedding(tokens + row.clamp(min=0) * self.count, own.values.flatten(0, 1))
        return torch.where((row >= 0)[:, None], found, base)

    def product(self, x: Tensor, ids: Tensor, numbers: Sequence[int]) -> Tensor:
        """(T, K) → (T, V), zeros for rows that pad. numbers: the ids, as the host knows them."""
        own, weight = self.own, self.weight[: self.count]
        if isinstance(own, PerModelTensor):
            y = x.new_zeros(len(x), self.count)
            for number in set(numbers):
                where = [place for place, other in enumerate(numbers) if other == number]
                y[where] = F.linear(x[where], own.of(number, weight))
        else:
            y = own.matrix(x, weight, ids)
        return F.pad(y, (0, len(self.weight) - self.count))
