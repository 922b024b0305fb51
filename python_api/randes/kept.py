"""Layers around the superposed ones whose tensors differ between models: each row gets its own model's.

``SuperposedLinear`` routes its bias itself. Norms, embeddings and linear layers that are not superposed are
routed here, by the kind of the layer. Any other layer is run once for each model of a mixed batch, on its rows.
"""

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from randes.routing import Router
from randes.superposition import BASE_NAME, Superposition

FEW_ELEMENTS = 1 << 16
"""Of a linear layer's weight that are gathered for each row; a larger one is multiplied model by model, uncopied."""


class KeptTable(nn.Module):
    """One tensor as each model has it: the rows of those that differ from the base, and who has which.

    Where models differ in its shape (heads of other numbers of classes), ``values`` is empty and each has its own.
    """

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
                values.append(own.to(like.device, like.dtype))
        self.ragged = any(value.shape != like.shape for value in values)
        for number, value in enumerate(values if self.ragged else []):
            self.register_buffer(f"value_{number}", value, persistent=False)
        self.register_buffer("values", torch.empty(0) if self.ragged else torch.stack(values), persistent=False)
        self.register_buffer("rows", torch.tensor(rows, dtype=torch.int32, device=like.device), persistent=False)
        self.numbers = tuple(rows)

    def row_of(self, ids: Tensor) -> Tensor:
        """For each id the row of ``values`` that is its own, −1 for the base's."""
        return torch.where(ids >= 0, self.rows[ids.clamp(min=0)], -1)

    def select(self, ids: Tensor, base: Tensor, *place: int) -> Tensor:
        """For each of B ids its model's tensor, or what is at ``place`` in it: (B, *shape)."""
        row = self.row_of(ids)
        own, base = self.values[(row.clamp(min=0), *place)], base[place]
        return torch.where((row >= 0).view(-1, *[1] * base.dim()), own, base)

    def of(self, model: int, base: Tensor) -> Tensor:
        """One model's tensor, not copied."""
        row = -1 if model < 0 else self.numbers[model]
        if row < 0:
            return base
        return getattr(self, f"value_{row}") if self.ragged else self.values[row]


class Unreadable(Tensor):
    """A kept tensor as a mixed batch reads it where nobody routes it: its shape, dtype and device can be asked for.

    Anything else is refused with ``ValueError``: whose values to compute with is not known.
    """

    _described: str

    @classmethod
    def like(cls, base: Tensor, described: str) -> "Unreadable":
        """In place of ``base``, which the error will call ``described``."""
        error = ValueError(
            f"{described} is kept per model, and cannot be read for rows of several models at once:"
            ' run one model at a time, or superpose with others="base"'
        )
        if torch.compiler.is_compiling():
            raise error
        found = base.detach().as_subclass(cls)
        found._error = error  # type: ignore[attr-defined]
        return found

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        leaves = [*args, *(kwargs or {}).values()]
        raise next(leaf for leaf in leaves if isinstance(leaf, cls))._error


_METADATA = {
    *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "layout", "is_cuda", "is_meta")),
    Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, torch.is_floating_point, Tensor.__len__,
}  # fmt: skip


class Routed(nn.Module):
    """Mixed into a layer's class: what its tables hold counts instead of its own tensors.

    Read from outside, and by layers that are not routed row by row, a kept tensor is that of the batch's one model.
    """

    _router: Router
    _tables: nn.ModuleDict  # of KeptTable

    def _table(self, name: str) -> KeptTable | None:
        table = self._tables[_key(name)] if _key(name) in self._tables else None
        assert table is None or isinstance(table, KeptTable)
        return table

    def _own(self, name: str, ids: Tensor, *place: int) -> Tensor | None:
        """The parameter ``name`` for each id, or what is at ``place`` in it, (B, *shape); None where there is none."""
        base, table = self._parameters[name], self._table(name)
        if base is None:
            return None
        if table is None:
            return base[place].expand(len(ids), *base[place].shape)
        if not self._router.batch().mixed and not torch.compiler.is_compiling():
            return table.of(self._router.batch().number, base)[place][None]
        return table.select(ids, base, *place)

    def _spread(self, input: Tensor) -> tuple[Tensor, Tensor | None]:
        """The input with a row for each row of the batch, and the batch's ids: None where it is the base's alone."""
        batch = self._router.batch()
        return batch.spread(input), None if batch.runs_base else batch.on(input.device)

    def _kept(self, name: str) -> Tensor:
        batch, table = self._router.batch(), self._table(name)
        base = self._parameters.get(name, self._buffers.get(name))
        assert base is not None
        assert table is not None
        if batch.by_row:
            return table.select(batch.on(base.device), base)[:, None]
        if batch.mixed:
            return Unreadable.like(base, f"{name} of a {type(self).__name__}")
        if torch.compiler.is_compiling():
            return table.select(batch.on(base.device), base)[0]
        return table.of(batch.number, base)

    def extra_repr(self) -> str:
        """The base's: a layer is printed where no model is chosen."""
        with self._router.during(self._router.of([BASE_NAME])):
            return super().extra_repr()


class RoutedLinear(Routed, nn.Linear):
    """A linear layer that is not superposed, a class head say, with each model's own weight and bias."""

    def forward(self, input: Tensor) -> Any:
        """(..., K) → (..., N); a list with an output for each row where their models differ in N."""
        input, ids = self._spread(input)
        if ids is None:
            return super().forward(input)
        large = self._parameters["weight"].numel() > FEW_ELEMENTS  # type: ignore[union-attr]
        ragged = any(table is not None and table.ragged for table in map(self._table, ("weight", "bias")))
        if len(ids) > 1 and (ragged or (large and not torch.compiler.is_compiling())):
            return _by_model(self._router, super().forward, (input,), {}, ragged=ragged)
        weight, bias = self._own("weight", ids), self._own("bias", ids)
        assert weight is not None
        if len(ids) == 1:
            return F.linear(input, weight[0], None if bias is None else bias[0])
        rows = input.reshape(len(ids), -1, input.shape[-1])
        y = rows @ weight.mT if bias is None else torch.baddbmm(bias[:, None], rows, weight.mT)
        return y.view(*input.shape[:-1], self.out_features)


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
        if ids is None or len(ids) == 1:
            y: Tensor = super().forward(input)
            return y
        rows = input.reshape(len(ids), -1, input.shape[-1])
        with self._router.during(replace(self._router.batch(), by_row=True)):
            y = super().forward(rows)
        if y.shape != rows.shape:
            raise ValueError(f"a {type(self).__name__} must multiply by its weight, got {tuple(y.shape)} out of it")
        return y.view(input.shape)


class RoutedEmbedding(Routed, nn.Embedding):
    """An embedding with each model's own table; no table is copied, each token looks in its model's."""

    def forward(self, input: Tensor) -> Tensor:
        """(B, ...) integers → (B, ..., D)"""
        input, ids = self._spread(input)
        weight, table = self._parameters["weight"], self._table("weight")
        assert weight is not None
        assert table is not None
        base = F.embedding(input, weight)
        if ids is None:
            return base
        row = table.row_of(ids).repeat_interleave(input.shape[0] // len(ids) if input.shape[0] else 0)
        row = row.view(-1, *[1] * (input.dim() - 1))
        flat = table.values.flatten(0, 1)
        own = F.embedding(input + row.clamp(min=0) * self.num_embeddings, flat)
        return torch.where((row >= 0)[..., None], own, base)


class RoutedByModel(Routed):
    """Any other layer: run once for each model of a mixed batch, on its rows alone.

    It must take tensors with the batch first, and nothing that remembers a call (a cache), and return one tensor or a
    tuple of them. Others serve one model at a time.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's own forward."""
        if not self._router.batch().mixed or not _can_be_split(self, (*args, *kwargs.values())):
            return super().forward(*args, **kwargs)
        return _by_model(self._router, super().forward, args, kwargs)


def _can_be_split(layer: nn.Module, values: tuple[Any, ...]) -> bool:
    plain = (Tensor, bool, int, float, str, torch.dtype, torch.device, type(None))
    whole = hasattr(layer, "config") and hasattr(layer, "get_input_embeddings")  # its outputs may compare rows (CLIP's)
    return not whole and any(isinstance(v, Tensor) for v in values) and all(isinstance(v, plain) for v in values)


def _by_model(
    router: Router, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], *, ragged: bool = False
) -> Any:
    """``function`` of each model's rows; its outputs in the rows' order, or as a list of them where they are ragged."""
    batch = router.batch()
    ids = batch.ids.tolist()
    runs: dict[int, Tensor] = {}
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            runs[id(value)] = torch.unflatten(batch.spread(value), 0, (len(ids), -1))
    lengths = {run.shape[1] for run in runs.values()}
    parts: list[tuple[Tensor, ...]] = []
    places: list[int] = []
    single = True
    for model in sorted(set(ids)):
        chosen = [place for place, other in enumerate(ids) if other == model]

        def part(value: Any, chosen: list[int] = chosen) -> Any:
            return runs[id(value)][chosen].flatten(0, 1) if isinstance(value, Tensor) else value

        with router.during(batch.of_one(model)):
            y = function(*map(part, args), **{name: part(value) for name, value in kwargs.items()})
        single = isinstance(y, Tensor)
        outputs = (y,) if single else y
        if not isinstance(outputs, tuple) or not all(
            isinstance(out, Tensor) and out.dim() and out.shape[0] / len(chosen) in lengths for out in outputs
        ):
            raise ValueError(
                f"a {type(getattr(function, '__self__', function)).__name__} with tensors kept per model must return"
                " tensors with the batch first to serve a mixed batch"
            )
        parts.append(tuple(torch.unflatten(out, 0, (len(chosen), -1)) for out in outputs))
        places += chosen
    order = torch.tensor(places).argsort()
    if ragged:
        rows = [row for (part,) in parts for row in part]
        return [rows[place].squeeze(0) if lengths == {1} else rows[place] for place in order.tolist()]
    joined = tuple(torch.cat(outputs)[order.to(outputs[0].device)].flatten(0, 1) for outputs in zip(*parts, strict=True))
    return joined[0] if single else joined


class RoutedBias(Routed):
    """Self-attention that makes a bias of relative positions, one for all rows of a model (T5's)."""

    def compute_bias(self, *args: Any, **kwargs: Any) -> Tensor:
        """(1, heads, queries, keys) of one model, (B, ...) of a mixed batch."""
        batch = self._router.batch()
        biases: dict[int, Tensor] = {}
        for model in sorted(set(batch.ids.tolist())):
            with self._router.during(batch.of_one(model)):
                biases[model] = super().compute_bias(*args, **kwargs)  # type: ignore[misc]
        return torch.cat([biases[model] for model in batch.ids.tolist()])


ROUTED: dict[type[nn.Module], type[Routed]] = {
    nn.Linear: RoutedLinear,
    nn.LayerNorm: RoutedLayerNorm,
    nn.RMSNorm: RoutedRMSNorm,
}


def _key(name: str) -> str:
    return f"own_{name}"  # a tensor may be called what a module's method is


def _kept_property(name: str) -> property:
    return property(lambda self: self._kept(name))


def _kind_of(layer: nn.Module, tables: dict[str, KeptTable]) -> type[Routed]:
    if type(layer) in ROUTED:
        return ROUTED[type(layer)]
    if isinstance(layer, nn.Embedding) and layer.max_norm is None and calls_super(layer):  # max_norm rewrites the table
        return RoutedEmbedding
    own = dict(layer.named_parameters(recurse=False))
    named_norm = type(layer).__name__.endswith("Norm") and not type(layer).__module__.startswith("torch.")
    if named_norm and own.keys() == tables.keys() == {"weight"} and own["weight"].dim() == 1:
        return RoutedNorm
    return RoutedByModel


def calls_super(layer: nn.Module) -> bool:
    """Whether an embedding looks its tokens up as ``nn.Embedding`` does, whatever it does before and after."""
    code = getattr(inspect.unwrap(type(layer).forward), "__code__", None)
    return type(layer) is nn.Embedding or "__class__" in getattr(code, "co_freevars", ())


def route_layer(
    layer: nn.Module, tables: dict[str, KeptTable], router: Router, kind: type[Routed] | None = None
) -> None:
    """Make ``layer``, in place, use each row's own model's tensors. kind: how, where it is not only kept tensors."""
    plain, kind = type(layer), kind or _kind_of(layer, tables)
    bases: tuple[type, ...] = (kind, plain)
    if issubclass(kind, plain):
        bases = (kind,)
    elif issubclass(kind, nn.Embedding):
        bases = (plain, kind)  # its own forward, around the routed look-up
    way = "Superposed" if kind.__name__.startswith("Superposed") else "Routed"
    layer.__class__ = type(f"{way}{plain.__name__}", bases, {name: _kept_property(name) for name in tables})
    assert isinstance(layer, Routed)
    layer._router = router
    layer._tables = nn.ModuleDict({_key(name): table for name, table in tables.items()})
