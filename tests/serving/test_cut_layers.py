"""A layer's part for one of several devices: what the parts make together is what the layer makes."""

import copy
import pickle
from typing import Any

import pytest
import torch
from models import CLOSE, finetune, linear
from torch import Tensor, nn

import randes
from randes.checkpoints.tensor_views import View
from randes.errors import WeightReadError
from randes.serving.batch import Version
from randes.serving.layers.delta_pool import DeltaPool
from randes.serving.layers.other_layers import SuperposedEmbedding
from randes.serving.layers.per_model import PerModelTensor
from randes.serving.layers.per_row import route_layer
from randes.serving.layers.shards import Shard
from randes.serving.layers.superposed import SuperposedMatrix, first_versions
from randes.serving.routing import Router

N, K, WORLD = 70, 210, 3
NAMES = ["m1", "__base__", "m0", "m2"]
CONFIGS = {
    "signs": randes.Config(rank=0),
    "basis": randes.Config(rank=5),
    "segments": randes.Config(permute=1, segments=3, rank=0),
    "shuffled": randes.Config(shuffle_layers=-1, rank=0),
    "diagonal": randes.Config(matrix="diagonal", rank=0),
    "shared gains": randes.Config(gains="shared", rank=0),
}


def built(config: randes.Config, bits: float = 16, bias: bool = True) -> tuple[randes.SuperposedLinear, Any]:
    base = linear(N, K)
    base.bias = base.bias if bias else None
    tuned: dict[str, Any] = {f"m{number}": finetune(base, number) for number in range(3)}
    sup = randes.compress(copy.deepcopy(base), tuned, config)
    if bits < 16:
        sup = sup.pack(bits, group=0)
    return randes.SuperposedLinear.from_linear(base, sup, ""), sup


def inputs(rows: int = 4) -> Tensor:
    return torch.randn(rows, 3, K, generator=torch.Generator().manual_seed(5))


def together(parts: list[randes.SuperposedLinear], x: Tensor, dim: int) -> Tensor:
    """What devices make of their parts: outputs side by side, or their sum."""
    if dim == 0:
        return torch.cat([part(x, adapter_names=NAMES) for part in parts], -1)
    own = x.split([part.in_features for part in parts], -1)
    return sum(part(piece.contiguous(), adapter_names=NAMES) for part, piece in zip(parts, own, strict=True))


@pytest.mark.parametrize("bits", [16, 8, 4, 2, 1])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_parts_together_are_the_layer(config: randes.Config, dim: int, bits: float) -> None:
    layer, _ = built(config, bits)
    parts = [layer.shard(dim, rank, WORLD) for rank in range(WORLD)]
    expected = layer(inputs(), adapter_names=NAMES)
    torch.testing.assert_close(together(parts, inputs(), dim), expected, **CLOSE)
    assert [part.base_weight.shape for part in parts] == [
        ((24, 24, 22)[rank], K) if dim == 0 else (N, K // WORLD) for rank in range(WORLD)
    ]
    assert (layer.out_features, layer.in_features, layer.pool.shard) == (N, K, None)  # as it was
    for part in parts:
        part.transform = part.transform._replace(first_row=0, first_column=0)
    assert not torch.allclose(together(parts, inputs(), dim), expected, **CLOSE)


def test_a_part_has_memory_of_its_own_and_no_more() -> None:
    layer, _ = built(randes.Config(rank=0))
    whole = sum(value.nbytes for value in (*layer.parameters(), *layer.buffers()))
    part = layer.shard(1, 1, WORLD)
    assert sum(value.nbytes for value in (*part.parameters(), *part.buffers())) < whole / 2.5
    held = {value.untyped_storage().data_ptr() for value in (layer.base_weight, layer.pool.values)}
    assert held.isdisjoint(
        {part.base_weight.untyped_storage().data_ptr(), part.pool.values.untyped_storage().data_ptr()}
    )
    assert part.pool.values.untyped_storage().nbytes() == part.pool.values.nbytes
    layer.pool.values[0] += 1  # what was cut before is not what is cut now
    assert not torch.equal(layer.shard(1, 1, WORLD).pool.values, part.pool.values)
    layer.pool.values[0] -= 1
    first, second = layer.shard(0, 0, 1), layer.shard(0, 0, 1)  # two layers with one pool go on having one
    second.pool, first.pool.shard = first.pool, None
    cuts: Any = {}
    for one in (first, second):
        one.cut(Shard.of((N, K), 0, 1, 2), cuts)
    assert first.pool is second.pool
    assert copy.deepcopy(layer).shard(0, 0, 2).out_features == N // 2
    again = pickle.loads(pickle.dumps(layer.shard(0, 1, 2)))
    torch.testing.assert_close(again(inputs(), adapter_names=NAMES), layer(inputs(), adapter_names=NAMES)[..., 35:])
    assert again.bias_tensor == "bias"


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("config", [CONFIGS["signs"], CONFIGS["basis"]], ids=["signs", "basis"])
def test_what_is_written_later_is_cut_too(config: randes.Config, dim: int) -> None:
    layer, sup = built(config)
    parts = [layer.shard(dim, rank, WORLD) for rank in range(WORLD)]
    versions = [Version(v.name, 2 - v.number, v.group) for v in first_versions(sup)]  # in each other's places
    for one in (layer, *parts):
        one.pool.values.zero_()
        one.pool.write_all(sup, versions)
        one.write(sup, versions)
    layer.router.serve(versions)
    expected = layer(inputs(), adapter_names=NAMES)
    torch.testing.assert_close(together(parts, inputs(), dim), expected, **CLOSE)
    first, _ = built(config)
    torch.testing.assert_close(first(inputs(), adapter_names=NAMES), expected, **CLOSE)


@pytest.mark.parametrize("bits", [16, 4, 1])
@pytest.mark.parametrize("config", [CONFIGS["signs"], CONFIGS["basis"]], ids=["signs", "basis"])
def test_a_matrix_is_filled_as_any_rectangle_of_the_whole(config: randes.Config, bits: float) -> None:
    layer, sup = built(config, bits)
    shard = Shard((N, K), range(13, 50), range(37, 137))
    weight = layer.base_weight.detach()[13:50, 37:137].contiguous()
    versions = first_versions(sup)
    pool = DeltaPool(sup, "weight", weight, shard=shard)
    pool.write_all(sup, versions)
    matrix = SuperposedMatrix(sup, "weight", weight, pool, len(versions))
    matrix.write(sup, versions)
    ids = layer.router.of(NAMES).ids
    x = torch.zeros(4, 3, K)
    x[..., 37:137] = inputs()[..., 37:137]
    whole = layer(x, adapter_names=NAMES) - layer.shard(1, 0, 210)(x[..., :1], adapter_names=NAMES)  # the bias
    torch.testing.assert_close(matrix(inputs()[..., 37:137].contiguous(), weight, ids), whole[..., 13:50], **CLOSE)


@pytest.mark.parametrize("bits", [16, 2])
@pytest.mark.parametrize("embeddings", ["own", "shared"])
def test_a_vocabulary_is_cut_for_looking_up_and_for_multiplying(embeddings: Any, bits: int) -> None:
    torch.manual_seed(0)
    base: Any = nn.ModuleDict({"embed_tokens": nn.Embedding(1100, 64), "up": nn.Linear(64, 64)})
    tuned: dict[str, Any] = {f"m{number}": finetune(base, number) for number in range(3)}
    sup = randes.compress(copy.deepcopy(base), tuned, randes.Config(rank=0, embeddings=embeddings))
    sup = sup if bits == 16 else sup.pack(bits)
    tensor, rows = "embed_tokens.weight", range(550, 1100)
    shard, versions = Shard((1100, 64), rows, range(64)), first_versions(sup)
    whole = base["embed_tokens"].weight.detach()
    weight = whole[550:]
    pool = DeltaPool(sup, tensor, weight, shard=shard)
    pool.write_all(sup, versions)
    router = Router(("m0", "m1", "m2"), True)
    shell = nn.Embedding.from_pretrained(weight)
    view = {"weight": View((550, 64), {tensor: 550})}
    route_layer(shell, {}, router, SuperposedEmbedding, view)
    assert isinstance(shell, SuperposedEmbedding)
    matrix = SuperposedMatrix(sup, tensor, weight, pool, len(versions))
    shell.take_weights({"weight": [matrix]}, view)
    matrix.write(sup, versions)
    shell.write(sup, versions)
    router.serve(versions)
    tokens = torch.randint(550, 1100, (4, 5), generator=torch.Generator().manual_seed(0))
    plain = {name: sup.retrieve(name)[tensor] for name in sup.names} | {"__base__": whole}
    with router.using(router.of(NAMES)):
        found = shell(tokens - 550)
    for row, name in enumerate(NAMES):
        torch.testing.assert_close(found[row], plain[name][tokens[row]], **CLOSE)
    x = torch.randn(4, 2, 64)
    expected = torch.stack([x[row] @ plain[name][550:].mT for row, name in enumerate(NAMES)])
    torch.testing.assert_close(matrix(x, weight, router.of(NAMES).ids), expected, **CLOSE)


def test_kept_tensors_are_cut_as_well() -> None:
    layer, sup = built(CONFIGS["signs"])
    shard = Shard((N, 1), range(13, 50), range(1))
    versions = first_versions(sup)
    table = PerModelTensor(sup, "bias", layer.base_bias.detach()[13:50], len(versions), shard=shard)
    rows = {v.name: table.hold(sup, v.name, {}, lambda: None) for v in versions}
    table.write([Version(v.name, v.number, kept={"bias": rows[v.name]}) for v in versions])
    assert layer.biases is not None
    ids = torch.tensor([2, -1, 0])
    found = table.select(ids, layer.base_bias[13:50])
    assert torch.equal(found, torch.stack([layer.biases[2], layer.base_bias, layer.biases[0]])[:, 13:50])


def test_the_bias_is_the_first_parts() -> None:
    layer, _ = built(CONFIGS["signs"])
    first, second, _ = (layer.shard(1, rank, WORLD) for rank in range(WORLD))
    assert torch.equal(first.base_bias, layer.base_bias)
    assert second.base_bias is None
    assert second.biases is None
    assert layer.shard(0, 1, WORLD).biases.shape == (3, 24)
    assert dict(layer.named_parameters()).keys() == {"base_weight", "base_bias"}


@pytest.mark.parametrize("dim", [0, 1])
def test_a_part_is_compiled_without_breaks(dim: int) -> None:
    layer, _ = built(CONFIGS["signs"])
    part = layer.shard(dim, 1, WORLD)
    x, batch = inputs()[..., : part.in_features].contiguous(), layer.router.of(NAMES)
    torch._dynamo.reset()
    compiled = torch.compile(part, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, adapter_names=batch), part(x, adapter_names=batch), **CLOSE)
    assert part.transform.first_row + part.transform.first_column in (24, 70)


def test_gradients_flow_to_a_part() -> None:
    layer, _ = built(CONFIGS["signs"])
    x = inputs().requires_grad_()
    layer(x, adapter_names=NAMES).sum().backward()
    own = inputs().requires_grad_()
    parts = [layer.shard(0, rank, WORLD) for rank in range(WORLD)]
    together(parts, own, 0).sum().backward()
    torch.testing.assert_close(own.grad, x.grad, **CLOSE)
    grads = torch.cat([part.base_weight.grad for part in parts])
    torch.testing.assert_close(grads, layer.base_weight.grad, **CLOSE)


@pytest.mark.parametrize(
    ("config", "dim", "why"),
    [
        (randes.Config(matrix="rotation", rank=0), 1, "a rotation cannot be cut"),
        (randes.Config(matrix="dense", rank=0), 1, "a dense cannot be cut"),
        (randes.Config(permute=1, rank=0), 1, "can be cut at multiples of 210 alone"),
        (randes.Config(permute=1, segments=2, rank=0), 1, "can be cut at multiples of 105 alone"),
    ],
)
def test_what_cannot_be_cut_is_refused_and_unchanged(config: randes.Config, dim: int, why: str) -> None:
    layer, sup = built(config)
    before = layer(inputs(), adapter_names=NAMES)
    for rank in range(WORLD):
        with pytest.raises(ValueError, match=f"weight cannot be cut as asked.*{why}"):
            layer.shard(dim, rank, WORLD)
        with pytest.raises(ValueError, match=why):
            layer.cut(Shard.of((N, K), dim, rank, WORLD))
    shard = Shard.of((N, K), dim, 1, WORLD)
    with pytest.raises(ValueError, match=why):
        SuperposedMatrix(
            sup, "weight", torch.zeros(N, K // 3), DeltaPool(sup, "weight", torch.zeros(N, 70), shard=shard), 3
        )
    assert torch.equal(layer(inputs(), adapter_names=NAMES), before)
    parts = [layer.shard(0, rank, WORLD) for rank in range(WORLD)]  # rows can always be cut
    torch.testing.assert_close(together(parts, inputs(), 0), before, **CLOSE)


def test_other_refusals() -> None:
    layer, _ = built(CONFIGS["signs"])
    for numbers, why in (((2, 0, 1), "dim must be 0 or 1"), ((0, 3, 3), "rank one of 3"), ((0, 0, 69), "some of 70")):
        with pytest.raises(ValueError, match=why):
            layer.shard(*numbers)
    part = layer.shard(0, 0, 2)
    with pytest.raises(ValueError, match="must be whole to be cut, got a shard"):
        part.shard(1, 0, 2)
    with part.router.using(part.router.of(["m0"])), pytest.raises(WeightReadError, match="cut into shards: call the"):
        nn.functional.linear(inputs(), part.weight)
    with pytest.raises(ValueError, match="rows of a shard must be a range"):
        Shard((N, K), range(60, 71), range(K))
    packed, _ = built(CONFIGS["signs"], bits=0.5)
    for rank in range(WORLD):  # in all devices, where it cannot be in one
        with pytest.raises(ValueError, match="cut at multiples of 128 columns, got column 70"):
            packed.shard(1, rank, WORLD)
    assert packed.pool.shard is None
