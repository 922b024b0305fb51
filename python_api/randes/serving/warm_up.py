"""Running every kind of superposed layer once, so that no kernel is compiled while a request waits."""

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from randes.serving.layers.linear import SuperposedLinear
from randes.serving.layers.other_layers import SuperposedLayer
from randes.serving.layers.superposed import Superposed
from randes.serving.routing import Router
from randes.superposition.members import BASE_NAME
from randes_kernels import prepare
from randes_kernels.tiles import device_name, rows_of_plans


def run_each_kind(model: nn.Module, router: Router, numbers: int, rows: Sequence[int] | None) -> None:
    """See ``SuperposedModel.warm_up``. numbers: of models that there is room for."""
    kinds: dict[tuple[object, ...], tuple[Superposed, Tensor]] = {}
    for layer in model.modules():
        for own, weight in _products(layer):
            modes: list[object] = [min(2, len(own.pool.slots)), weight.stride(1) == 1, own.transform]
            if isinstance(own, SuperposedLinear):
                modes += [own.bias is None, own.biases is None]
            kinds.setdefault((weight.shape, weight.dtype, weight.device, *modes), (own, weight))
    names = [*[name for name in router.names if name != BASE_NAME], *([BASE_NAME] if router.has_base else [])]
    first = names[:1]
    for own, weight in kinds.values():
        prepare(own.transform, weight.shape[1], weight.device)
        for count in _rows_of_plans(own, weight, numbers) if rows is None else rows:
            x = weight.new_zeros(count, weight.shape[1])
            for mix in (first, [names[row % len(names)] for row in range(count)]):
                if isinstance(own, SuperposedLinear):
                    run: Any = own if own.pool.shard is None else own.forward  # past hooks that wait for other devices
                    run(x, adapter_names=mix)
                else:
                    own(x, weight, router.of(mix).on(x.device))


def _rows_of_plans(layer: Superposed, weight: Tensor, numbers: int) -> list[int]:
    if weight.device.type == "cpu":
        return [1]  # nothing is compiled there
    turned = layer.transform.granule > 0 or layer.transform.matrix > 0 or not layer.pool.slots
    n, k = weight.shape
    bits = 16 if layer.pool.packing is None else layer.pool.packing[0]
    return rows_of_plans(
        n, k, weight.dtype, models=numbers, turned=turned, bits=bits,
        device=device_name(weight.device.index or 0),
    )  # fmt: skip


def _products(layer: nn.Module) -> Iterator[tuple[Superposed, Tensor]]:
    """What a layer multiplies with, and the base's weights (N, K) beside."""
    if isinstance(layer, SuperposedLinear):
        yield layer, layer.base_weight
    elif isinstance(layer, SuperposedLayer):
        yield from layer.products()
