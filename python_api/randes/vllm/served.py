"""A vLLM model's layers as they answer for a store's fine-tunes, and whose each token of the step under way is."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from randes.checkpoints.lazy_tensors import headers
from randes.checkpoints.tensor_views import View
from randes.errors import CheckpointError
from randes.serving.layers.delta_pool import DeltaPool
from randes.serving.layers.other_layers import SuperposedEmbedding
from randes.serving.layers.per_model import PerModelTensor
from randes.serving.layers.per_row import route_layer
from randes.serving.layers.shards import Shard
from randes.serving.layers.superposed import SuperposedMatrix
from randes.serving.routing import Router
from randes.serving.served_models import ServedModels
from randes.superposition.superposition import Superposition
from randes.vllm.layers import Product, Table, Vectors
from randes.vllm.places import Place, places_in

KindOf = Callable[[nn.Module], str]
"""Of a layer: "linear", "table", "norm", or "" for what cannot be served."""


class Served(nn.Module):
    """What models differ in, parameter by parameter of a vLLM model that holds the base's weights.

    room: for how many fine-tunes; None for those that there are. tokens, rows: the most that a step has of tokens, and
    of rows that logits are computed for. The model's layers are not changed: ``owners`` says whose the parameters are.

    Raises ``CheckpointError`` for a tensor that models differ in and that no layer can serve.
    """

    def __init__(
        self, model: nn.Module, superposition: Superposition, kind_of: KindOf, room: int | None, tokens: int, rows: int
    ) -> None:
        super().__init__()
        _check(superposition)
        self.models = ServedModels(superposition, Router((), superposition.has_base), room)
        whole = {name for name in superposition.tables if name in superposition.unshared and not superposition.packing}
        kept = {*superposition.others, *superposition.layout.vectors, *whole}
        deltas = {*superposition.superposed} - superposition.layout.vectors - whole
        if room is None:
            changed = {name for member in superposition.members.values() for name in member.gains}
            kept, deltas = kept - (whole - changed), deltas & changed
        parameters: dict[str, Any] = dict(model.named_parameters())
        places = places_in(model, superposition, kept | deltas)
        device = next(iter(parameters.values())).device
        self._pools: dict[str, DeltaPool] = {}
        self._deltas = deltas
        self.by_name: dict[str, Product | Vectors | Table] = {}
        self.owners: dict[str, list[tuple[nn.Module, str]]] = {}
        for name, own in places.items():
            owners = self.owners[name] = [
                (module, attribute)
                for module in model.modules()
                for attribute, parameter in module.named_parameters(recurse=False)
                if parameter is parameters[name]
            ]
            kinds = {kind_of(module) for module, _ in owners}
            self.by_name[name] = self._layer(name, parameters[name].data, own, kinds, owners)
        self._layers = nn.ModuleList(self.by_name.values())
        self.tokens = torch.full((tokens,), -1, dtype=torch.int32, device=device)
        self.rows = torch.full((rows,), -1, dtype=torch.int32, device=device)
        self.row_numbers: list[int] = []  # the same, as the host knows them
        self.length: int | None = None  # of the step's tokens with what pads them
        self.unanswered: list[int] = []  # rows that no model was found for
        self.end = 0  # the token that ends an answer
        self.models.serve(self, superposition.served)

    def _layer(
        self, name: str, value: Tensor, places: list[Place], kinds: set[str], owners: list[tuple[nn.Module, str]]
    ) -> Product | Vectors | Table:
        superposed = [place.tensor in self._deltas for place in places]
        if value.dim() == 2 and kinds == {"linear"} and all(superposed):
            return Product(value, [(place, self._matrix(place, value)) for place in places])
        if value.dim() == 1 and kinds and kinds <= {"linear", "norm", "table"} and not any(superposed):
            return Vectors(value, [(place, self._table(place, value)) for place in places])
        if value.dim() == 2 and kinds == {"table"} and len(places) == 1 and places[0].rows.start == 0:
            (place,) = places
            own = self._embedding(place, value) if superposed[0] else self._table(place, value)
            return Table(value, own, place)
        classes = ", ".join(sorted({type(module).__name__ for module, _ in owners}))
        how = "superposed" if any(superposed) else "kept per model"
        raise CheckpointError(
            f"{places[0].tensor} is {how}, which vLLM's {classes or 'layer'} ({name}) cannot serve: make the store anew"
            f" with it {'excluded' if any(superposed) else 'superposed'}, or serve it with randes.load"
        )

    def _matrix(self, place: Place, value: Tensor) -> SuperposedMatrix:
        superposition, weight = self.models.superposition, value[place.rows.start : place.rows.stop]
        first = superposition.family(place.tensor)[0]
        if first not in self._pools:
            shard = self._shard(place)
            self._pools[first] = DeltaPool(superposition, place.tensor, weight, self.models.room.groups, shard)
        return SuperposedMatrix(superposition, place.tensor, weight, self._pools[first], self.models.room.numbers)

    def _table(self, place: Place, value: Tensor) -> PerModelTensor:
        like, room = value[place.rows.start : place.rows.stop], self.models.room
        shard = self._shard(place)
        table = PerModelTensor(self.models.superposition, place.tensor, like, room.numbers, room.kept, shard)
        if table.ragged:
            raise CheckpointError(f"{place.tensor} must have one shape in all models for vLLM to serve them")
        return table

    def _shard(self, place: Place) -> Shard | None:
        """None for a whole tensor."""
        superposition = self.models.superposition
        shape = tuple(headers(superposition.base)[place.tensor].shape)
        whole = (
            (shape[-1], 1) if len(shape) == 1 or place.tensor in superposition.layout.vectors else (shape[0], shape[1])
        )
        rows = range(place.first_row, place.first_row + len(place.rows))
        columns = range(place.first_column, place.first_column + place.columns)
        return None if (len(rows), len(columns)) == whole else Shard(whole, rows, columns)

    def _embedding(self, place: Place, value: Tensor) -> SuperposedEmbedding:
        matrix, weight = self._matrix(place, value), value[: place.rows.stop]
        shell = nn.Embedding(len(weight), weight.shape[1], device="meta")
        shell.weight = nn.Parameter(weight, requires_grad=False)
        view = {"weight": View(tuple(weight.shape), {place.tensor: len(weight)})}
        route_layer(shell, {}, self.models.router, SuperposedEmbedding, view)
        assert isinstance(shell, SuperposedEmbedding)
        shell.take_weights({"weight": [matrix]}, view)
        return shell

    def of_step(self, tokens: Sequence[int], rows: Sequence[int], padding: int = -1) -> None:
        """The numbers of the models that the next step's tokens are for, and the rows that logits are computed for."""
        self.row_numbers = list(rows)
        for buffer, numbers in ((self.tokens, tokens), (self.rows, rows)):
            whole = torch.full(buffer.shape, padding, dtype=torch.int32, device="cpu")
            whole[: len(numbers)] = torch.tensor(numbers, dtype=torch.int32, device="cpu")
            buffer.copy_(whole.pin_memory() if buffer.is_cuda else whole, non_blocking=True)

    def answer(self, name: str, x: Tensor) -> Tensor:
        """A parameter's part for the step's tokens. Raises ``ValueError`` for other rows than those."""
        if self.length not in (None, len(x)):
            raise ValueError(
                f"the input of vLLM's {name} must have a row for each of {self.length} tokens, got {tuple(x.shape)}:"
                " whose they are cannot be told"
            )
        own: Tensor = self.by_name[name](x, self.tokens[: len(x)])
        return own

    def logits(self, name: str, x: Tensor) -> Tensor:
        """A head's product for the step's rows."""
        layer = self.by_name[name]
        assert isinstance(layer, Table)
        numbers = (self.row_numbers + [-1] * len(x))[: len(x)]  # of a run to measure memory there are none
        y = layer.product(x, self.rows[: len(x)], numbers)
        if self.unanswered:
            y[self.unanswered] = -torch.inf
            if 0 <= (end := self.end - layer.first_row) < layer.count:
                y[self.unanswered, end] = 0.0
        return y

    def head_bias(self, name: str, x: Tensor) -> Tensor:
        """A head's bias for the step's rows."""
        layer = self.by_name[name]
        assert isinstance(layer, Vectors)
        own: Tensor = layer(x, self.rows[: len(x)])
        return own

    def check_new(self, superposition: Superposition) -> None:
        """Raise ``CheckpointError`` for a superposition that differs in what the layers were made for."""
        _check(superposition)
        tables = {one.tensor for one in self.modules() if isinstance(one, PerModelTensor) and one.used}
        matrices = {one.matrix for one in self.modules() if isinstance(one, SuperposedMatrix)}
        held: Mapping[str, Any] = headers(superposition.base)
        for name in superposition.served:
            for tensor in sorted({*superposition.own_tensors(name), *superposition.members[name].gains}):
                if tensor in held and tensor not in tables | matrices:
                    raise CheckpointError(
                        f"{tensor} of {name!r} differs from the base's, which no model did when the server started:"
                        " start it again"
                    )


def _check(superposition: Superposition) -> None:
    for name, member in superposition.members.items():
        if member.added:
            raise CheckpointError(
                f"{name!r} has tokens of its own, in {min(member.added)}: vLLM gives all models one vocabulary; serve"
                " it with randes.load"
            )
