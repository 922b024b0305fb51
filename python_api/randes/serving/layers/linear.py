"""``SuperposedLinear``: an ``nn.Linear`` that answers as any of many fine-tunes, row by row."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from randes.checkpoints.modules.parameters import move
from randes.errors import CheckpointError, WeightReadError
from randes.serving.batch import Batch, Version
from randes.serving.layers.delta_pool import Cuts, DeltaPool
from randes.serving.layers.served_weights import ServedWeight
from randes.serving.layers.shards import Shard, cut_buffers, own_copy, shallow_copy
from randes.serving.layers.superposed import Superposed, check_is_base, first_versions, tensor_of
from randes.serving.routing import Router
from randes.serving.table_rows import put
from randes.superposition.retrieve import unsuperposed
from randes.superposition.superposition import Superposition


def _as_wide(x: Tensor, weight: Tensor) -> Tensor:
    """Half precision as single where the weight is that: T5 keeps one of its layers so, and casts what goes in where
    ``weight`` is a tensor."""
    wider = weight.dtype == torch.float32 and x.dtype in (torch.float16, torch.bfloat16)
    return x.to(weight.dtype) if wider and not torch.is_autocast_enabled(x.device.type) else x


class SuperposedLinear(Superposed, nn.Linear):
    """A linear layer over a base weight (N, K) and the superposed deltas of J fine-tunes of it.

    ``layer(x)`` with x (..., K) is ``F.linear(x, Ŵ_j, b_j)``, where j is the model of each row. No Ŵ_j is ever
    built: there is one pass over the base weight and one over the superposition, whatever models the rows belong to.
    The base's weight and bias are ``base_weight`` and ``base_bias``. Gradients flow to x and to both of them.
    ``weight`` has the base weight's shape, dtype and device but no values, because it differs between models.
    ``F.linear`` with it is this layer's product; other reads raise ``WeightReadError``. (Design, section 1;
    served_weights.py.)
    """

    moved: ClassVar[frozenset[str]] = frozenset(("weight", "bias"))

    base_weight: Tensor
    base_bias: Tensor | None
    biases: Tensor | None
    added_biases: Tensor | None  # (J, A), of rows that models add
    router: Router
    bias_tensor: str

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        superposition: Superposition,
        name: str,
        *,
        router: Router | None = None,
        pool: DeltaPool | None = None,
    ) -> "SuperposedLinear":
        """A layer that takes over ``linear``'s parameters, for the models of ``superposition``.

        name: the layer's name in the base, so that its weight is ``f"{name}.weight"`` there.
        router: tells the layer which models a batch belongs to; by default its own, and calls name the models.
        pool: the superpositions in the layer's dtype, if another layer holds them already.
        Raises ``ValueError`` if the superposition has no such weight or one of another shape, and
        ``BaseMismatchError`` if the layer's weight or bias is not the base's.
        """
        tensor = tensor_of(name, "weight")
        if tensor not in superposition.superposed:
            raise ValueError(f"name must be a superposed layer's, got {name!r}; {tensor} is not superposed")
        if linear.weight.shape != superposition.base[tensor].shape:
            shape = tuple(superposition.base[tensor].shape)
            raise ValueError(f"{tensor} must be (N, K) = {shape}, got {tuple(linear.weight.shape)}")
        if superposition.has_base:
            check_is_base(superposition, tensor, linear.weight)
        if linear.bias is not None:
            check_is_base(superposition, tensor_of(name, "bias"), linear.bias)
        layer = nn.Linear(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        layer.weight, layer.bias = linear.weight, linear.bias
        if not superposition.has_base:  # deltas are measured from zero
            layer.weight = nn.Parameter(torch.zeros_like(linear.weight), requires_grad=linear.weight.requires_grad)
        layer.train(linear.training)
        router = router or Router(superposition.served, superposition.has_base)
        versions = first_versions(superposition)
        if pool is None:
            pool = DeltaPool(superposition, tensor, linear.weight)
            pool.write_all(superposition, versions)
        bias = tensor_of(name, "bias")
        keeps_bias = bias in superposition.others or bias in superposition.layout.vectors
        cls.take_over(layer, superposition, tensor, bias, router, pool, len(versions), keeps_bias)
        assert isinstance(layer, cls)
        layer.write(superposition, versions)
        return layer

    @classmethod
    def take_over(
        cls, linear: nn.Linear, superposition: Superposition, weight: str, bias: str, router: Router, pool: DeltaPool,
        numbers: int, keeps_bias: bool,
    ) -> None:  # fmt: skip
        """Turn ``linear`` itself into a superposed layer: its hooks and all references to it stay.

        weight, bias: the names of its tensors in the base. numbers: of models that there is room for, which ``write``
        fills. keeps_bias: whether each may have its own.
        """
        layer: Any = linear
        biases = None
        if linear.bias is not None and keeps_bias:
            biases = linear.bias.detach().new_zeros(numbers, len(linear.bias))
        layer.router, layer.bias_tensor = router, bias
        layer.register_buffer("biases", biases, persistent=False)
        cls._take_deltas(layer, superposition, weight, linear.weight, pool, numbers)
        added = None if biases is None or layer.added is None else biases.new_zeros(layer.added.shape[:2])
        layer.register_buffer("added_biases", added, persistent=False)
        move(linear, cls.moved, cls)

    @torch.no_grad()
    def write(self, superposition: Superposition, versions: Sequence[Version]) -> None:
        """See ``Superposed.write``; and their biases."""
        super().write(superposition, versions)
        if self.biases is None:
            return
        for version in versions:
            own, shard = unsuperposed(superposition, version.name, self.bias_tensor), self.pool.shard
            count = self.out_features if shard is None else shard.shape[0]
            added = len(superposition.members[version.name].added.get(self.matrix, ()))
            if own.shape != (count + added,):
                raise CheckpointError(
                    f"{self.bias_tensor} of {version.name!r} must be ({count + added},) as its weight, got"
                    f" {tuple(own.shape)}"
                )
            put(self.biases, version.number, own[:count] if shard is None else shard.of_rows(own))
            if self.added_biases is not None:
                put(self.added_biases, version.number, F.pad(own[count:], (0, self.added_biases.shape[1] - added)))

    def forward(self, input: Tensor, adapter_names: Sequence[str] | Batch | None = None) -> Tensor:
        """``input``: (..., K). ``adapter_names``: one name a row of its first dimension, or one for all rows.

        Without names the router's batch counts. Raises ``UnknownModelError``, ``ValueError`` for a number of
        names that does not fit, and ``RuntimeError`` where no model was chosen at all.
        """
        batch = self.router.batch() if adapter_names is None else self._named(input, adapter_names)
        input = _as_wide(input, self.base_weight)
        if batch.runs_base:
            return F.linear(input, self.base_weight, self.base_bias)
        x = batch.spread(input)
        y = self._product(x, self.base_weight, self.base_bias, batch.on(x.device), self.biases)
        return self.with_added(y, x, batch, self.added_biases)

    def product_with(self, x: Tensor, name: str, bias: Tensor | None = None) -> Tensor | None:
        """``F.linear`` of x (..., K) with ``weight`` as each row's own model has it; None for the base alone.

        Raises ``WeightReadError`` for a shard, whose parts' products nobody would put together.
        """
        if self.pool.shard is not None:
            raise WeightReadError(f"{self.matrix} is cut into shards: call the layer, and not F.linear with its weight")
        batch = self.router.batch()
        if batch.runs_base:
            return None
        x = batch.spread(x)
        return self.with_added(self._product(x, self.base_weight, bias, batch.on(x.device)), x, batch)

    @property
    def weight(self) -> ServedWeight:  # type: ignore[override]
        """Its shape, dtype and device, and ``F.linear`` with it; see above."""
        return ServedWeight(
            self, "weight", self.router,
            f"{self.matrix} is superposed, another for each model, and has no values to be read: call the layer, or"
            f' F.linear with its weight; or keep it per model with Config(exclude=("{self.matrix}", ...))',
        )  # fmt: skip

    @property
    def bias(self) -> Any:  # type: ignore[override]
        """The bias, where the models have one between them, or of the batch's one model."""
        base, biases, batch = self.base_bias, self.biases, self.router.current()
        if base is None or biases is None:
            return base
        if batch is None or batch.mixed:
            return ServedWeight(
                self, "bias", self.router,
                f"{self.bias_tensor} is kept per model, and cannot be read for rows of several models at once, or where"
                " no model is chosen: run one model at a time",
            )  # fmt: skip
        if torch.compiler.is_compiling():
            ids = batch.on(base.device)
            return torch.where(ids >= 0, biases[ids.clamp(min=0)[0]], base)
        if batch.number < 0:
            return base
        if self.added_biases is None or self.added_counts is None:
            return biases[batch.number]
        added = self.added_biases[batch.number, : int(self.added_counts[batch.number])]
        return torch.cat([biases[batch.number], added])

    def shard(self, dim: int, rank: int, world: int) -> "SuperposedLinear":
        """Part ``rank`` of ``world`` of this layer, for one of several devices, in memory of its own; this stays whole.

        dim: 0 cuts rows of the weight (column-parallel): x is whole, and the parts' outputs stand side by side. 1 cuts
            columns (row-parallel): a part gets its columns of x, and the outputs' sum is the layer's; the first part
            adds the bias.
        Models that are served later are cut as these are. Raises ``ValueError`` for other numbers, and for a matrix
        that cannot be cut so: a rotation or a dense matrix by columns, a permutation inside of a segment, a packed D
        inside of columns that share a step, and one that models add rows to.
        """
        shape = self.out_features, self.in_features
        own = Shard.of(shape, dim, rank, world)
        for other in range(world):  # none of the parts, where one cannot be
            self.check_cut(Shard.of(shape, dim, other, world))
        made = shallow_copy(self)
        made.cut(own)
        return made

    @torch.no_grad()
    def cut(self, shard: Shard, cuts: Cuts | None = None) -> None:
        """Keep a rectangle of the weight alone, and what goes with it, in place: hooks and references stay. The bias is
        that of the shard which has the first column. cuts: what other layers are cut into that share a pool with this
        one, and may go on sharing. Raises as ``shard`` does, and nothing is changed then."""
        self._cut_deltas(shard, {} if cuts is None else cuts)
        self.out_features, self.in_features = len(shard.rows), len(shard.columns)
        parts: dict[str, Any] = {"base_weight": shard.of_tensor, "base_bias": shard.of_rows}
        cut_buffers(self, {"biases": shard.of_rows})
        for name, part in parts.items():
            if (held := self._parameters.get(name)) is not None:
                self._parameters[name] = nn.Parameter(own_copy(part(held)), requires_grad=held.requires_grad)
        if shard.columns.start:
            self._parameters["base_bias"], self.biases = None, None

    def extra_repr(self) -> str:
        """The shape, and how many models share how many slots."""
        return f"{super().extra_repr()}, models={len(self.router.names)}, slots={len(self.pool.slots)}"

    def _named(self, input: Tensor, adapter_names: Sequence[str] | Batch) -> Batch:
        batch = self.router.of(adapter_names)
        if batch.rows not in (1, input.shape[0]):
            raise ValueError(f"adapter_names must have one name a row, {input.shape[0]}, got {batch.rows}")
        return batch
