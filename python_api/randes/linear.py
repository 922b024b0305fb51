"""``SuperposedLinear``: an ``nn.Linear`` that answers as any of many fine-tunes, row by row."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from randes import basis
from randes.basis import UNIT
from randes.errors import BaseMismatchError
from randes.integers import STEP
from randes.packed import Held, coordinates_of, values_of
from randes.routing import Batch, Router
from randes.streams import headers
from randes.superposition import Superposition
from randes_kernels import Basis, Packed, mixing, superposed_linear, unpack
from randes_kernels.format import Matrix

PEAK_BITS = 3
"""The largest of what is near a normal distribution of size 1 lies about there: below 2³."""


class DeltaPool(nn.Module):
    """The superpositions that a layer reads, ``(S, N, K)``: one slot a group of models, in its dtype or in few bits.

    unit: what one of its numbers is worth, in units of a gain; 1, but where models share one gain, which says nothing
    of the deltas' size: a power of two then, which brings them near 1 as half precision needs them.

    A module of its own because layers that are shuffled share one, and must go on sharing it when they move.
    """

    values: Tensor
    steps: Tensor | None

    def __init__(self, superposition: Superposition, tensor: str, dtype: torch.dtype) -> None:
        super().__init__()
        family = superposition.family(tensor)
        held = {
            (group, place): deltas[place]
            for group, deltas in sorted(superposition.held.items())
            for place in family
            if place in deltas
        }
        self.slots = {where: slot for slot, where in enumerate(held)}
        self.tensor = tensor
        self.packing: tuple[int, int, int] | None = None
        self.unit = 1.0
        steps = None
        if held and superposition.packing is not None:
            packed = [value for value in held.values() if isinstance(value, Packed)]
            values, steps = (torch.stack(parts) for parts in zip(*(value[:2] for value in packed), strict=True))
            self.packing = packed[0][2:]
        else:
            values = torch.empty((len(held), *headers(superposition.base)[tensor].shape), dtype=dtype)
            if held and superposition.config.gains == "shared":
                peak = max(float(values_of(value)[0].abs().max()) for value in held.values())
                self.unit = 2.0 ** (math.frexp(peak * STEP)[1] - PEAK_BITS)
            for slot, value in enumerate(held.values()):
                numbers, unit = values_of(value)
                values[slot] = numbers.float() * (unit / self.unit)
        self.register_buffer("values", values, persistent=False)
        self.register_buffer("steps", steps, persistent=False)
        self._check_finite()

    @property
    def delta(self) -> Held:
        """As ``superposed_linear`` takes it."""
        if self.packing is None:
            return self.values
        assert self.steps is not None
        return Packed(self.values, self.steps, *self.packing)

    def rows(self, slots: Tensor, rows: Tensor) -> Tensor:
        """Rows of the superpositions, (..., K) for integers (...): what an embedding looks up."""
        if self.packing is None:
            return self.values[slots, rows]
        assert self.steps is not None
        return unpack(Packed(self.values[slots, rows], self.steps[slots, :, rows].mT, *self.packing))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "DeltaPool":
        before, steps = self.values.dtype, self.steps
        super()._apply(fn, recurse)
        if steps is not None and self.steps is not None and self.steps.dtype != steps.dtype:
            self.steps = steps.to(self.steps.device)  # part of the packed form, whatever the layer becomes
        if self.values.dtype != before:
            self._check_finite()
        return self

    def _check_finite(self) -> None:
        # One infinity would reach the other rows of a matmul's tile as NaN.
        if not torch.isfinite(self.values).all():
            dtype = self.values.dtype
            raise ValueError(
                f"the superposition of {self.tensor} must fit {dtype}, got infinity; serve it in another dtype"
            )


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

    def _take_deltas(self, superposition: Superposition, tensor: str, weight: Tensor, pool: DeltaPool) -> None:
        """Those of ``superposition``'s matrix ``tensor``, for a layer whose own is ``weight`` (N, K)."""
        names, device = superposition.served, weight.device
        members = [superposition.members[model] for model in names]
        self.pool = pool
        self.tensor, self.transform = superposition.tensor_id(tensor), superposition.config.transform
        keys = [superposition.key(model) for model in names]
        slots = [
            self.pool.slots[member.group, superposition.place(model, tensor)] if tensor in member.gains else -1
            for model, member in zip(names, members, strict=True)
        ]
        inverses, units = None, [1.0] * len(names)
        if self.transform.matrix == Matrix.DENSE:
            inverses, units = mixing.inverses_of(keys, self.tensor, weight.shape[1])
            inverses = inverses.to(device)
        scale = [
            member.alpha_of(tensor) * member.gains.get(tensor, 0.0) * self.pool.unit * unit
            for member, unit in zip(members, units, strict=True)
        ]
        self.register_buffer("keys", torch.tensor(keys, dtype=torch.int64, device=device), persistent=False)
        self.register_buffer("slots", torch.tensor(slots, dtype=torch.int32, device=device), persistent=False)
        self.register_buffer("scale", torch.tensor(scale, dtype=torch.float32, device=device), persistent=False)
        self.register_buffer("inverses", inverses, persistent=False)
        self._keep_basis(superposition, tensor, weight)

    def _keep_basis(self, superposition: Superposition, tensor: str, weight: Tensor) -> None:
        """The shared basis U (K, r), and for each model what is added and taken off in it, (J, r, N)."""
        shared = corrections = None
        if tensor in superposition.bases:
            members = [superposition.members[model] for model in superposition.served]
            shared = superposition.bases[tensor].float() * UNIT
            held = torch.zeros(len(members), shared.shape[1], weight.shape[0])
            for number, member in enumerate(members):
                if tensor in member.coordinates:
                    own = coordinates_of(member.coordinates[tensor])
                    held[number] = own.mT.float() * (member.alpha_of(tensor) * member.units[tensor])
            corrections = basis.corrections(
                shared, held, self.pool.delta, self.keys, self.scale, self.slots, self.tensor, self.transform
            ).to(weight.dtype)
            shared = shared.to(weight)
        self.register_buffer("shared_basis", shared, persistent=False)
        self.register_buffer("corrections", corrections, persistent=False)

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

    def __init__(self, superposition: Superposition, tensor: str, weight: Tensor, pool: DeltaPool) -> None:
        super().__init__()
        self._take_deltas(superposition, tensor, weight, pool)

    def forward(self, x: Tensor, weight: Tensor, ids: Tensor, bias: Tensor | None = None) -> Tensor:
        """(..., K) → (..., N). weight: (N, K), the base's. ids: (B,) int32, of B equal runs of the rows of x."""
        return self._product(x, weight, bias, ids)


def _in_one_dtype(x: Tensor, *others: Held | None) -> tuple[Any, ...]:
    """Operands as they meet in the matmul: as they are, or cast by autocast, which leaves what is packed."""
    if not torch.is_autocast_enabled(x.device.type):
        return x, *others
    dtype = torch.get_autocast_dtype(x.device.type)
    return tuple(value.to(dtype) if isinstance(value, Tensor) else value for value in (x, *others))


class SuperposedLinear(Superposed, nn.Linear):
    """A linear layer over a base weight (N, K) and the superposed deltas of J fine-tunes of it.

    ``layer(x)`` with x (..., K) is ``F.linear(x, Ŵ_j, b_j)`` with j the model of each row, and no Ŵ_j is ever
    built: one pass over the base weight and one over the superposition, whatever models the rows belong to.
    ``weight`` and ``bias`` are the base's, under their own names. Gradients flow to x and to both of them.
    (Design, section 1.)
    """

    biases: Tensor | None

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
        pool = pool or DeltaPool(superposition, tensor, linear.weight.dtype).to(linear.weight.device)
        return cls.take_over(layer, superposition, tensor, tensor_of(name, "bias"), router, pool)

    @classmethod
    def take_over(
        cls, linear: nn.Linear, superposition: Superposition, weight: str, bias: str, router: Router, pool: DeltaPool
    ) -> "SuperposedLinear":
        """Turn ``linear`` itself into a superposed layer: its hooks and all references to it stay.

        weight, bias: the names of its tensors in the base.
        """
        linear.__class__ = cls
        assert isinstance(linear, cls)
        linear._superpose(superposition, weight, bias, router, pool)
        return linear

    def _superpose(self, superposition: Superposition, weight: str, bias: str, router: Router, pool: DeltaPool) -> None:
        biases = None
        self.router = router
        if self.bias is not None and (bias in superposition.others or bias in superposition.layout.vectors):
            own = [superposition.other(model, bias) for model in superposition.served]
            biases = torch.stack(own).to(self.weight.device, self.weight.dtype)
        self.register_buffer("biases", biases, persistent=False)
        self._take_deltas(superposition, weight, self.weight, pool)

    def forward(self, input: Tensor, adapter_names: Sequence[str] | Batch | None = None) -> Tensor:
        """``input``: (..., K). ``adapter_names``: one name a row of its first dimension, or one for all rows.

        Without names the router's batch counts. Raises ``UnknownModelError``, ``ValueError`` for a number of
        names that does not fit, and ``RuntimeError`` where no model was chosen at all.
        """
        batch = self.router.batch() if adapter_names is None else self._named(input, adapter_names)
        if batch.runs_base:
            return F.linear(input, self.weight, self.bias)
        x = batch.spread(input)
        return self._product(x, self.weight, self.bias, batch.on(x.device), self.biases)

    def extra_repr(self) -> str:
        """The shape, and how many models share how many slots."""
        return f"{super().extra_repr()}, models={len(self.keys)}, slots={len(self.pool.slots)}"

    def _named(self, input: Tensor, adapter_names: Sequence[str] | Batch) -> Batch:
        batch = self.router.of(adapter_names)
        if batch.rows not in (1, input.shape[0]):
            raise ValueError(f"adapter_names must have one name a row, {input.shape[0]}, got {batch.rows}")
        return batch
