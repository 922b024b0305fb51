"""Small superposed layers to test with, and what they must compute, built the long way.

A case's fields stand in the order of the operator's arguments, so ``reference.superposed_linear(*case)`` and
``gpu.superposed_linear(*case, transposed)`` run the same layer.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from randes_kernels import Basis, Packed, pack, reference, superposed_linear, unpack
from randes_kernels.format import Transform, model_key, tensor_id

TENSOR = tensor_id("model.layers.0.mlp.down_proj.weight")

SHAPES = ((32, 64, 128), (33, 45, 70), (3, 5, 7))
"""(M, N, K): aligned, ragged, smaller than a tile."""

TRANSFORMS = {
    "two-sided": Transform(),
    "columns": Transform(row_signs=False),
    "rows": Transform(column_signs=False),
    "none": Transform(row_signs=False, column_signs=False),
    "permuted": Transform(row_signs=False, column_signs=False, granule=1),
    "signs and permutation": Transform(granule=1),
    "granules of 3": Transform(granule=3),
    "granules of 8, columns": Transform(row_signs=False, granule=8),
}


class LinearCase(NamedTuple):
    """The arguments of the superposed linear, up to the transform."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    biases: Tensor | None
    delta: Tensor | Packed
    ids: Tensor
    keys: Tensor
    scale: Tensor
    slots: Tensor
    tensor: int
    transform: Transform

    def to(self, target: torch.dtype | str) -> "LinearCase":
        """With the floating operands in another dtype, or with everything on another device."""
        floats = ("x", "weight", "bias", "biases", "delta")
        names = floats if isinstance(target, torch.dtype) else (*floats, "ids", "keys", "scale", "slots")
        held = {name: getattr(self, name) for name in names}
        return self._replace(**{name: moved(value, target) for name, value in held.items() if value is not None})


def moved(value: Tensor | Packed, target: torch.dtype | str) -> Tensor | Packed:
    """In another dtype, which a packed tensor does not have, or on another device."""
    if isinstance(value, Tensor):
        return value.to(target)
    return (
        value
        if isinstance(target, torch.dtype)
        else value._replace(words=value.words.to(target), steps=value.steps.to(target))
    )


def linear_case(
    m: int,
    n: int,
    k: int,
    transform: Transform | None = None,
    *,
    models: int = 4,
    slots: int = 2,
    runs: int | None = None,
    bias: bool = True,
    own_biases: bool = True,
    dtype: torch.dtype = torch.float32,
    integers: bool = False,
    transposed: bool = False,
    seed: int = 0,
) -> LinearCase:
    """A random layer: models in every slot and in none, rows of every model and of the base.

    ``integers``: operands so small and whole that every sum is exact in ``dtype``, whatever its order.
    ``runs``: how many ids, each for M / runs rows. ``transposed``: x is (M, N), as for the backward pass.
    """
    generator = torch.Generator().manual_seed(seed)

    def values(*shape: int, size: float = 1.0) -> Tensor:
        if integers:
            return torch.randint(-1, 2, shape, generator=generator).to(dtype)
        return (torch.randn(shape, generator=generator) * size).to(dtype)

    depth = n if transposed else k
    scale = 2.0 ** torch.randint(-1, 2, (models,), generator=generator)
    return LinearCase(
        x=values(m, depth),
        weight=values(n, k, size=depth**-0.5),
        bias=values(n) if bias else None,
        biases=values(models, n) if bias and own_biases else None,
        delta=values(slots, n, k),
        ids=torch.randint(-1, models, (runs or m,), generator=generator, dtype=torch.int32),
        keys=torch.tensor([model_key(seed, f"model {j}") for j in range(models)]),
        scale=scale if integers else scale * depth**-0.5,
        slots=torch.randint(-1, slots, (models,), generator=generator, dtype=torch.int32),
        tensor=TENSOR,
        transform=transform or Transform(),
    )


def run(case: LinearCase) -> Tensor:
    """The layer through the function that people call."""
    x, weight, bias, biases, delta, ids, keys, scale, slots, tensor, transform = case
    return superposed_linear(x, weight, bias, delta, ids, keys, scale, slots, tensor, transform, biases=biases)


def retrieved_product(case: LinearCase, transposed: bool = False) -> Tensor:
    """In fp64, each row times its own model's whole weight, plus its own bias: (M, N), or (M, K) transposed."""
    exact = case.to(torch.float64)
    rows_of_an_id = max(1, case.x.shape[0] // case.ids.shape[0])
    rows = []
    for m, x in enumerate(exact.x):
        model = int(case.ids[m // rows_of_an_id])
        own, bias = exact.weight, exact.bias
        if model >= 0 and case.slots[model] >= 0:
            delta, gain, key = exact.delta[case.slots[model]], float(case.scale[model]), int(case.keys[model])
            own = reference.retrieve(own, delta, gain, key, case.tensor, case.transform)
        if model >= 0 and exact.biases is not None:
            bias = exact.biases[model]
        y = x @ own if transposed else own @ x
        rows.append(y if bias is None or transposed else y + bias)
    return torch.stack(rows)


def two_eager_matmuls(case: LinearCase, transposed: bool = False) -> Tensor:
    """What plain torch makes of the same layer in the same dtype: sign and gather operations about two matmuls."""
    x, gain = case.x, case.scale.to(case.x.dtype)
    rows_of_an_id = x.shape[0] // case.ids.shape[0]
    models = case.ids.repeat_interleave(rows_of_an_id).tolist()
    adapted = {m: model for m, model in enumerate(models) if model >= 0 and case.slots[model] >= 0}
    parts = {}
    for m, model in adapted.items():
        made = reference.transform_parts(int(case.keys[model]), case.tensor, case.weight.shape, case.transform)
        parts[m] = [part.to(x.device) for part in made]
    turned = torch.zeros_like(x)
    for m, (r, c, moved) in parts.items():
        if transposed:
            turned[m] = r * x[m]
        else:
            turned[m, moved] = c * x[m]
    y = F.linear(x, case.weight.mT if transposed else case.weight)
    products = [F.linear(turned, delta.mT if transposed else delta) for delta in case.delta]
    for m, (r, c, moved) in parts.items():
        product = products[case.slots[adapted[m]]][m]
        y[m] += gain[adapted[m]] * (product[moved] * c if transposed else product * r)
    for m, model in enumerate(models):
        if case.bias is not None and not transposed:
            y[m] += case.bias if model < 0 or case.biases is None else case.biases[model]
    return y


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def packed_case(
    bits: float, m: int, n: int, k: int, transform: Transform, group: int = 64, **options: Any
) -> LinearCase:
    """A layer of whole numbers over a random packed D whose steps are powers of two: every sum is exact."""
    case = linear_case(m, n, k, transform, integers=True, **options)
    seed = options.get("seed", 0)
    made = pack(normal(len(case.delta), n, k, seed=seed), bits, group if bits >= 1 else 0)
    powers = torch.randint(-1, 2, made.steps.shape, generator=torch.Generator().manual_seed(seed))
    return case._replace(delta=made._replace(steps=(2.0**powers).half()))


def unpacked(case: LinearCase) -> LinearCase:
    return case._replace(delta=unpack(case.delta))


def basis_of(case: LinearCase, rank: int, seed: int = 0) -> Basis:
    """Small whole numbers, so that every sum is exact."""
    generator = torch.Generator().manual_seed(seed)
    n, k = case.weight.shape
    shapes = (k, rank), (len(case.keys), rank, n)
    return Basis(*(torch.randint(-1, 2, shape, generator=generator).to(case.x.dtype) for shape in shapes))


def basis_product(case: LinearCase, basis: Basis) -> Tensor:
    """In fp64: the layer without a basis, and each row's projection times its own model's part."""
    y = retrieved_product(case if isinstance(case.delta, Tensor) else case._replace(delta=unpack(case.delta)))
    models = case.ids.repeat_interleave(len(case.x) // len(case.ids)).tolist()
    for row, model in enumerate(models):
        if model >= 0:
            y[row] += case.x[row].double() @ basis.directions.double() @ basis.corrections[model].double()
    return y


def run_with_basis(case: LinearCase, basis: Basis) -> Tensor:
    x, weight, bias, biases, delta, *rest = case
    return superposed_linear(x, weight, bias, delta, *rest, biases=biases, basis=basis)


def root_mean_square(values: Tensor) -> float:
    return values.double().square().mean().sqrt().item()
