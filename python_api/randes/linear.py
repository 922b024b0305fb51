"""``SuperposedLinear``: an ``nn.Linear`` that answers as any of many fine-tunes, row by row."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from randes import basis
from randes.basis import UNIT
from randes.errors import BaseMismatchError
from randes.leases import put
from randes.packed import Held, coordinates_of
from randes.pools import DeltaPool, group_rows
from randes.routing import Batch, Router, Version
from randes.served_weights import ServedWeight, move
from randes.superposition import Superposition
from randes_kernels import Basis, mixing, superposed_linear
from randes_kernels.format import Matrix


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


def check_is_base(superposition: Superposition, tensor: str, value: Tensor) -> None:
    """Raise ``BaseMismatchError`` unless ``value`` is the base's tensor of that name, cast to its own dtype."""
    base = superposition.base.get(tensor)
    value = value.detach().cpu()
    if value.dim() == 1 and tensor in superposition.layout.vectors:
        if not superposition.has_base:
            return  # each model has its own, measured from zero
        value = value[None]
    if base is None or value.shape != base.shape or not torch.equal(value, base.to(value.dtype)):
        hint = (
            " (deltas are centred: build it in the stored dtype, then cast it)" if superposition.config.centre else ""
        )
        raise BaseMismatchError(f"the model is not the superposition's base: {tensor} differs{hint}")


class Superposed(nn.Module):
    """Mixed into a layer, or beside it for one of its weights: the superposed deltas of a matrix (N, K).

    What it holds is not in the layer's state dict. The weight itself stays the layer's, and comes with each product.
    """

    keys: Tensor
    slots: Tensor
    scale: Tensor
    shared_basis: Tensor | None
    corrections: Tensor | None
    inverses: Tensor | None  # of dense matrices (Config.matrix), one a model

    def _take_deltas(
        self, superposition: Superposition, tensor: str, weight: Tensor, pool: DeltaPool, numbers: int
    ) -> None:
        """Those of ``superposition``'s matrix ``tensor``, for a layer whose own is ``weight`` (N, K).

        numbers: of models that there is room for; ``write`` says which those are.
        """
        self.pool, self.matrix = pool, tensor
        self.tensor, self.transform = superposition.tensor_id(tensor), superposition.config.transform
        shared = corrections = inverses = None
        if self.transform.matrix == Matrix.DENSE:
            columns = weight.shape[1]
            inverses = torch.zeros(numbers, columns, columns, dtype=torch.float32, device=weight.device)
        if tensor in superposition.bases:  # U (K, r), and for each model what is added and taken off in it
            shared = (superposition.bases[tensor].float() * UNIT).to(weight)
            corrections = weight.new_zeros(numbers, shared.shape[1], weight.shape[0])
        tables: dict[str, Tensor | None] = {
            "keys": torch.zeros(numbers, dtype=torch.int64, device=weight.device),
            "slots": torch.full((numbers,), -1, dtype=torch.int32, device=weight.device),
            "scale": torch.zeros(numbers, dtype=torch.float32, device=weight.device),
            "shared_basis": shared,
            "corrections": corrections,
            "inverses": inverses,
        }
        for name, table in tables.items():
            self.register_buffer(name, table, persistent=False)

    @torch.no_grad()
    def write(self, superposition: Superposition, versions: Sequence[Version]) -> None:
        """Fill these models' rows, which nobody reads yet; their groups' superpositions are there."""
        if not versions:
            return
        tensor, numbers = self.matrix, [version.number for version in versions]
        members = [superposition.members[version.name] for version in versions]
        slots = [
            self.pool.slots[version.group, superposition.place(version.name, tensor)] if tensor in member.gains else -1
            for version, member in zip(versions, members, strict=True)
        ]
        keys = [superposition.key(version.name) for version in versions]
        units = [self.pool.units.get(slot, 1.0) for slot in slots]
        if self.inverses is not None:
            inverses, factors = mixing.inverses_of(keys, self.tensor, self.inverses.shape[1])
            put(self.inverses, numbers, inverses)
            units = [unit * factor for unit, factor in zip(units, factors, strict=True)]
        gains = [member.alpha_of(tensor) * member.gains.get(tensor, 0.0) for member in members]
        scale = [gain * unit for gain, unit in zip(gains, units, strict=True)]
        put(self.keys, numbers, torch.tensor(keys, dtype=torch.int64, device="cpu"))
        put(self.slots, numbers, torch.tensor(slots, dtype=torch.int32, device="cpu"))
        put(self.scale, numbers, torch.tensor(scale, dtype=torch.float32, device="cpu"))
        if self.corrections is None:
            return
        shared = superposition.bases[tensor].float() * UNIT
        held = torch.zeros(len(members), *self.corrections.shape[1:])
        for place, member in enumerate(members):
            if tensor in member.coordinates:
                own = coordinates_of(member.coordinates[tensor])
                held[place] = own.mT.float() * (member.alpha_of(tensor) * member.units[tensor])
        tables = self.keys[numbers], self.scale[numbers], self.slots[numbers]
        corrections = basis.corrections(shared, held, self.pool.delta, *tables, self.tensor, self.transform)
        put(self.corrections, numbers, corrections)

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
        operands = x, weight, bias, self.pool.delta, biases, self.shared_basis, self.corrections
        x, weight, bias, delta, biases, shared, corrections = _in_one_dtype(*operands)
        return superposed_linear(
            x, weight, bias, delta, ids, self.keys, self.scale, self.slots, self.tensor, self.transform, biases=biases,
            basis=None if shared is None else Basis(shared, corrections), inverses=self.inverses,
        )  # fmt: skip


class SuperposedMatrix(Superposed):
    """The superposed deltas of one weight, or a part of one, of a layer of another kind than ``nn.Linear``."""

    def __init__(
        self, superposition: Superposition, tensor: str, weight: Tensor, pool: DeltaPool, numbers: int
    ) -> None:
        super().__init__()
        self._take_deltas(superposition, tensor, weight, pool, numbers)

    def forward(self, x: Tensor, weight: Tensor, ids: Tensor, bias: Tensor | None = None) -> Tensor:
        """(..., K) → (..., N). weight: (N, K), the base's. ids: (B,) int32, of B equal runs of the rows of x."""
        return self._product(x, weight, bias, ids)


def _in_one_dtype(x: Tensor, *others: Held | None) -> tuple[Any, ...]:
    """Operands as they meet in the matmul: as they are, or cast by autocast, which leaves what is packed."""
    if not torch.is_autocast_enabled(x.device.type):
        return x, *others
    dtype = torch.get_autocast_dtype(x.device.type)
    return tuple(value.to(dtype) if isinstance(value, Tensor) else value for value in (x, *others))


def _as_wide(x: Tensor, weight: Tensor) -> Tensor:
    """Half precision as single where the weight is that: T5 keeps one of its layers so, and casts what goes in where
    ``weight`` is a tensor."""
    wider = weight.dtype == torch.float32 and x.dtype in (torch.float16, torch.bfloat16)
    return x.to(weight.dtype) if wider and not torch.is_autocast_enabled(x.device.type) else x


class SuperposedLinear(Superposed, nn.Linear):
    """A linear layer over a base weight (N, K) and the superposed deltas of J fine-tunes of it.

    ``layer(x)`` with x (..., K) is ``F.linear(x, Ŵ_j, b_j)`` with j the model of each row, and no Ŵ_j is ever
    built: one pass over the base weight and one over the superposition, whatever models the rows belong to.
    The base's weight and bias are ``base_weight`` and ``base_bias``. Gradients flow to x and to both of them.
    ``weight`` has their shape, dtype and device and no values, for it is another for each model: ``F.linear`` with it
    is this layer's product, and other reads raise ``WeightReadError``. (Design, section 1; served_weights.py.)
    """

    moved: ClassVar[frozenset[str]] = frozenset(("weight", "bias"))

    base_weight: Tensor
    base_bias: Tensor | None
    biases: Tensor | None
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
        router: tells the layer which models a batch belongs to; by default one of its own, and a call names them.
        pool: the superpositions in the layer's dtype, where another layer holds them already.
        Raises ``ValueError`` where the superposition has no such weight or one of another shape, and
        ``BaseMismatchError`` where the layer's weight or bias is not the base's.
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
            for version in {version.group: version for version in versions}.values():
                pool.write(superposition, superposition.members[version.name].group, version.group)
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
        move(linear, cls.moved, cls)

    @torch.no_grad()
    def write(self, superposition: Superposition, versions: Sequence[Version]) -> None:
        """See ``Superposed.write``; and their biases."""
        super().write(superposition, versions)
        if self.biases is not None and versions:
            own = [superposition.other(version.name, self.bias_tensor) for version in versions]
            put(self.biases, [version.number for version in versions], torch.stack(own))

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
        return self._product(x, self.base_weight, self.base_bias, batch.on(x.device), self.biases)

    def product_with(self, x: Tensor, name: str, bias: Tensor | None = None) -> Tensor | None:
        """``F.linear`` of x (..., K) with ``weight`` as each row's own model has it; None for the base alone."""
        batch = self.router.batch()
        if batch.runs_base:
            return None
        x = batch.spread(x)
        return self._product(x, self.base_weight, bias, batch.on(x.device))

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
        return base if batch.number < 0 else biases[batch.number]

    def extra_repr(self) -> str:
        """The shape, and how many models share how many slots."""
        return f"{super().extra_repr()}, models={len(self.router.names)}, slots={len(self.pool.slots)}"

    def _named(self, input: Tensor, adapter_names: Sequence[str] | Batch) -> Batch:
        batch = self.router.of(adapter_names)
        if batch.rows not in (1, input.shape[0]):
            raise ValueError(f"adapter_names must have one name a row, {input.shape[0]}, got {batch.rows}")
        return batch
