"""What every superposed layer has: a pool with its matrix's deltas, and tables of what tells models apart."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from randes.checkpoints.lazy_tensors import headers
from randes.errors import BaseMismatchError, CheckpointError
from randes.serving.batch import Batch, Version
from randes.serving.layers.delta_pool import Cuts, DeltaPool, group_rows
from randes.serving.layers.shards import Shard, cut_buffers
from randes.serving.table_rows import put
from randes.superposition.basis import shared_basis
from randes.superposition.basis.shared_basis import UNIT
from randes.superposition.members import Member
from randes.superposition.packed_tensors import SuperposedDelta, coordinates_of
from randes.superposition.superposition import Superposition
from randes_kernels import Basis, Transform, mixing, superposed_linear
from randes_kernels.format import Matrix
from randes_kernels.lowrank import own_product


def first_versions(superposition: Superposition) -> list[Version]:
    """The models of a superposition, as a layer by itself serves them."""
    rows = group_rows(superposition)
    return [
        Version(name, number, rows[superposition.members[name].group])
        for number, name in enumerate(superposition.served)
    ]


def tensor_of(layer: str, parameter: str) -> str:
    """A parameter's name in a state dict; the layer's is empty for the model itself."""
    return f"{layer}.{parameter}" if layer else parameter


def added_cannot_be_cut(tensor: str) -> ValueError:
    """The refusal of a shard of a matrix that is longer in some models."""
    return ValueError(f"{tensor} has rows beyond the base's in some models, and cannot be cut into shards")


def check_is_base(superposition: Superposition, tensor: str, value: Tensor) -> None:
    """Raise ``BaseMismatchError`` unless ``value`` is the base's tensor of that name, cast to its own dtype."""
    base = superposition.base.get(tensor)
    value = value.detach().cpu()
    if value.dim() == 1 and tensor in superposition.layout.vectors:
        if not superposition.has_base:
            return  # each model has its own, measured from zero
        value = value[None]
    if base is None or value.shape != base.shape or not torch.equal(value, base.to(value.dtype)):
        centred = " Deltas are centred here: build it in the stored dtype, then cast it." * superposition.config.centre
        raise BaseMismatchError(
            f"the model is not the superposition's base: {tensor} differs.{centred}"
            " randes.load(store, model) loads the base's weights into a model of its class"
        )


class Superposed(nn.Module):
    """Mixed into a layer, or beside it for one of its weights: the superposed deltas of a matrix (N, K).

    What it holds is not in the layer's state dict. The weight itself stays the layer's, and comes with each product.
    """

    keys: Tensor
    slots: Tensor
    scale: Tensor
    shared_basis: Tensor | None
    directions: Tensor | None  # (J, K, r), of a basis a model
    corrections: Tensor | None
    inverses: Tensor | None  # of dense matrices (Config.matrix), one a model
    added: Tensor | None  # (J, A, K): rows that models' matrices have below the base's
    added_counts: Tensor | None

    def _take_deltas(
        self, superposition: Superposition, tensor: str, weight: Tensor, pool: DeltaPool, numbers: int
    ) -> None:
        """Those of ``superposition``'s matrix ``tensor``, for a layer whose own is ``weight`` (N, K), or what the
        pool's shard is of it.

        numbers: of models that there is room for; ``write`` says which those are. Raises ``ValueError`` for a matrix
        that cannot be cut as the shard is.
        """
        self.pool, self.matrix = pool, tensor
        self.tensor, self.transform = superposition.tensor_id(tensor), superposition.transform(tensor)
        if pool.shard is not None:
            self.transform = pool.shard.transform(self.transform)
        shared = corrections = inverses = directions = None
        if self.transform.matrix == Matrix.DENSE:
            columns = weight.shape[1]
            inverses = torch.zeros(numbers, columns, columns, dtype=torch.float32, device=weight.device)
        if tensor in superposition.bases:  # U (K, r), and for each model what is added and taken off in it
            shared = pool.of_columns(superposition.bases[tensor].float() * UNIT).to(weight)
            corrections = weight.new_zeros(numbers, shared.shape[1], weight.shape[0])
        ranks = {
            headers(m.directions)[tensor].shape[1] for m in superposition.members.values() if tensor in m.directions
        }
        if ranks:  # in few bits each model has a basis of its own
            directions = weight.new_zeros(numbers, weight.shape[1], max(ranks))
            corrections = weight.new_zeros(numbers, max(ranks), weight.shape[0])
        tables: dict[str, Tensor | None] = {
            "keys": torch.zeros(numbers, dtype=torch.int64, device=weight.device),
            "slots": torch.full((numbers,), -1, dtype=torch.int32, device=weight.device),
            "scale": torch.zeros(numbers, dtype=torch.float32, device=weight.device),
            "shared_basis": shared,
            "directions": directions,
            "corrections": corrections,
            "inverses": inverses,
            "added": None,
            "added_counts": None,
        }
        if most := max((len(m.added[tensor]) for m in superposition.members.values() if tensor in m.added), default=0):
            if pool.shard is not None:
                raise added_cannot_be_cut(tensor)
            tables["added"] = weight.new_zeros(numbers, most, weight.shape[1])
            tables["added_counts"] = torch.zeros(numbers, dtype=torch.int32, device=weight.device)
        for name, table in tables.items():
            self.register_buffer(name, table, persistent=False)

    @torch.no_grad()
    def write(self, superposition: Superposition, versions: Sequence[Version]) -> None:
        """Fill these models' rows, which nobody reads yet; their groups' superpositions are there."""
        if not versions:
            return
        tensor, numbers = self.matrix, [version.number for version in versions]
        members = [superposition.members[version.name] for version in versions]
        self._write_added(versions, members)
        numbered = [
            self.pool.slots[self.pool.row_of(version), superposition.place(version.name, tensor)]
            if tensor in member.gains and not superposition.in_no_bits(tensor)
            else -1
            for version, member in zip(versions, members, strict=True)
        ]
        keys = [superposition.key(version.name) for version in versions]
        units = [self.pool.units.get(slot, 1.0) for slot in numbered]
        if self.inverses is not None:
            inverses, factors = mixing.inverses_of(keys, self.tensor, self.inverses.shape[1])
            put(self.inverses, numbers, inverses)
            units = [unit * factor for unit, factor in zip(units, factors, strict=True)]
        gains = [member.alpha_of(tensor) * member.gains.get(tensor, 0.0) for member in members]
        scaled = [gain * unit for gain, unit in zip(gains, units, strict=True)]
        put(self.keys, numbers, torch.tensor(keys, dtype=torch.int64, device="cpu"))
        put(self.slots, numbers, torch.tensor(numbered, dtype=torch.int32, device="cpu"))
        put(self.scale, numbers, torch.tensor(scaled, dtype=torch.float32, device="cpu"))
        if self.corrections is None:
            return
        whole = self.corrections.shape[2] if self.pool.shard is None else self.pool.shard.shape[0]
        held = torch.zeros(len(members), self.corrections.shape[1], whole)
        for place, member in enumerate(members):
            if tensor in member.coordinates:
                own = coordinates_of(member.coordinates[tensor])
                held[place] = own.mT.float() * (member.alpha_of(tensor) * member.units[tensor])
            if self.directions is not None and tensor in member.directions:
                put(self.directions, numbers[place], self.pool.of_columns(member.directions[tensor].float() * UNIT))
        held = held if self.pool.shard is None else self.pool.shard.of_rows(held)
        if self.directions is None:
            shared = superposition.bases[tensor].float() * UNIT
            tables = self.keys[numbers], self.scale[numbers], self.slots[numbers]
            delta, transform = self.pool.delta, self.transform
            if self.pool.shard is not None and self.pool.shard.cuts_columns:
                delta, transform, tables = self._of_all_columns(superposition, versions, *tables)
            held = shared_basis.corrections(shared, held, delta, *tables, self.tensor, transform)
        put(self.corrections, numbers, held)

    def _of_all_columns(
        self, superposition: Superposition, versions: Sequence[Version], keys: Tensor, scale: Tensor, slots: Tensor
    ) -> tuple[SuperposedDelta, Transform, tuple[Tensor, Tensor, Tensor]]:
        """Of a shard the superpositions with its rows and all columns, for the time of a change: what models have of
        their own in a basis is as large on every device as where nothing is cut."""
        shard, groups = self.pool.shard, group_rows(superposition)
        assert shard is not None
        rows = Shard(shard.shape, shard.rows, range(shard.shape[1]))
        like = self.pool.values.new_empty(()).expand(len(shard.rows), shard.shape[1])
        pool = DeltaPool(superposition, self.pool.tensor, like, shard=rows)
        own = [replace(version, group=groups[superposition.members[version.name].group]) for version in versions]
        pool.write_all(superposition, own)
        found = [
            -1 if slot < 0 else pool.slots[pool.row_of(version), superposition.place(version.name, self.matrix)]
            for slot, version in zip(slots.tolist(), own, strict=True)
        ]
        numbered = torch.tensor(found, dtype=torch.int32, device=keys.device)
        return pool.delta, rows.transform(superposition.transform(self.matrix)), (keys, scale, numbered)

    def check_cut(self, shard: Shard) -> None:
        """Raise ``ValueError`` for a part that the matrix cannot be cut into."""
        if self.added is not None:
            raise added_cannot_be_cut(self.matrix)
        if self.pool.shard is not None:
            raise ValueError(f"{self.matrix} must be whole to be cut, got a shard of it already")
        try:
            shard.transform(self.transform)
            shard.of_delta(_on_meta(self.pool.delta))
        except ValueError as error:
            raise ValueError(f"{self.matrix} cannot be cut as asked: {error}") from None

    def _cut_deltas(self, shard: Shard, cuts: Cuts) -> None:
        """Keep a part of the matrix. Raises ``ValueError`` where it cannot be cut there, and nothing is changed."""
        self.check_cut(shard)
        own = cuts.setdefault(self.pool, {})
        if shard not in own:
            own[shard] = self.pool.cut(shard)
        self.transform, self.pool = shard.transform(self.transform), own[shard]
        parts = {"shared_basis": shard.of_columns, "directions": shard.of_columns, "corrections": shard.of_rows}
        cut_buffers(self, parts)

    def _write_added(self, versions: Sequence[Version], members: Sequence[Member]) -> None:
        room = 0 if self.added is None else self.added.shape[1]
        for version, member in zip(versions, members, strict=True):
            rows = member.added.get(self.matrix, self.keys.new_zeros(0, 1))
            if len(rows) > room:
                raise CheckpointError(
                    f"{self.matrix} of {version.name!r} must have at most {room} rows more than the base's, got"
                    f" {len(rows)}: a model with more can join only where one was served from the start"
                )
            if self.added is not None and self.added_counts is not None:
                whole = self.added.new_zeros(self.added.shape[1:])
                whole[: len(rows)] = rows
                put(self.added, version.number, whole)
                put(self.added_counts, version.number, torch.tensor(len(rows), dtype=torch.int32, device="cpu"))

    def with_added(self, y: Tensor, x: Tensor, batch: Batch, biases: Tensor | None = None) -> Tensor:
        """Products y (..., N) of x (..., K) beside those with the rows that models add, (..., N + A).

        A is what the batch's one model adds, or the most of any. In the rows of a model that adds fewer, what is
        missing is −∞: a token that it does not know is never one of its own. biases: (J, A), of those rows.
        """
        if self.added is None or self.added_counts is None:
            return y
        ids, added = batch.on(x.device), self.added
        if not batch.mixed and not torch.compiler.is_compiling():
            added = added[:, : int(self.added_counts[batch.number])]
        model = ids.clamp(min=0)
        runs = x.reshape(len(ids), -1, x.shape[-1])
        own = torch.bmm(runs, added[model].to(runs.dtype).mT)
        own = own if biases is None else own + biases[model, None, : own.shape[-1]]
        counts = torch.where(ids < 0, 0, self.added_counts[model])
        missing = torch.arange(own.shape[-1], device=x.device) >= counts[:, None]
        own = own.masked_fill(missing[:, None], -torch.inf)
        return torch.cat([y, own.view(*y.shape[:-1], -1).to(y.dtype)], -1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Superposed":
        scale, inverses = self.scale, self.inverses
        super()._apply(fn, recurse)
        # A gain of 1e-6 would not survive .half(): gains stay fp32 whatever the layer becomes. So do inverses.
        if self.scale.dtype != torch.float32:
            self.scale = scale.to(self.scale.device)
            self.inverses = None if inverses is None else inverses.to(self.scale.device)
        return self

    def _product(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, biases: Tensor | None = None
    ) -> Tensor:
        """``x Ŵ_jᵀ + b_j`` for x (..., K) and the model j of each of B equal runs of its rows."""
        operands = x, weight, bias, self.pool.delta, biases, self.shared_basis, self.corrections, self.directions
        x, weight, bias, delta, biases, shared, corrections, directions = _in_one_dtype(*operands)
        y = superposed_linear(
            x, weight, bias, delta, ids, self.keys, self.scale, self.slots, self.tensor, self.transform, biases=biases,
            basis=None if shared is None else Basis(shared, corrections), inverses=self.inverses,
        )  # fmt: skip
        if directions is None:
            return y
        runs = x.reshape(len(ids), -1, x.shape[-1])
        inside = torch.bmm(runs, directions[ids.clamp(min=0)])
        return y + own_product(inside.flatten(0, 1), ids, corrections).view(y.shape)


class SuperposedMatrix(Superposed):
    """The superposed deltas of one weight, or a part of one, of a layer of another kind than ``nn.Linear``.

    weight: (N, K), or what the pool's shard is of it.
    """

    def __init__(
        self, superposition: Superposition, tensor: str, weight: Tensor, pool: DeltaPool, numbers: int
    ) -> None:
        super().__init__()
        self._take_deltas(superposition, tensor, weight, pool, numbers)

    def forward(self, x: Tensor, weight: Tensor, ids: Tensor, bias: Tensor | None = None) -> Tensor:
        """(..., K) → (..., N). weight: (N, K), the base's. ids: (B,) int32, of B equal runs of the rows of x."""
        return self._product(x, weight, bias, ids)


def _on_meta(delta: SuperposedDelta) -> SuperposedDelta:
    if isinstance(delta, Tensor):
        return delta.to("meta")
    return delta._replace(words=delta.words.to("meta"), steps=delta.steps.to("meta"))


def _in_one_dtype(x: Tensor, *others: SuperposedDelta | None) -> tuple[Any, ...]:
    """Operands as they meet in the matmul: as they are, or cast by autocast, which leaves what is packed."""
    if not torch.is_autocast_enabled(x.device.type):
        return x, *others
    dtype = torch.get_autocast_dtype(x.device.type)
    return tuple(value.to(dtype) if isinstance(value, Tensor) else value for value in (x, *others))
