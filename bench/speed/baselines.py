"""What a superposed linear is measured beside: what a user could run instead.

    one materialised model          F.linear on the weight of one model: the floor
    J materialised models           an F.linear for each model in the batch; and one batched matmul over them
    two matmuls                     x W0ᵀ + scale_j · r_j ⊙ ((c_j ⊙ x) P_j Dᵀ) in plain torch, eager and compiled
    K-concatenated                  [x | scale_j · c_j ⊙ x] [W0 | D]ᵀ: one matmul, where only columns are flipped
    retrieve, then F.linear         the weight rebuilt in memory, for each model in the batch
    LoRA, 1-bit deltas              what servers use that keep less of a fine-tune: not the same accuracy

Each is timed at its best: where it matters how the rows of a batch lie, they are sorted by model already, and sign
tables, padding and dequantisation are made before the clock starts.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from layers import Layer
from measure import Contestant, copies_for, free_bytes
from torch import Tensor

FLOOR = "one materialised model"
EACH = "J materialised models"


def baselines(layer: Layer, rivals: str) -> list[Contestant]:
    """Those that exist at this point. ``rivals``: ``"few"``, ``"all"``, or ``"compiled"``: all and what is compiled."""
    chosen: list[Callable[[Layer], Contestant | None]] = [one_model, each_model]
    if layer.point.bits < 16:  # the others read D as it comes
        return [made for make in chosen if (made := make(layer)) is not None]
    chosen.append(two_matmuls)
    if rivals != "few" or layer.point.m >= 64:
        chosen.append(retrieve_first)
    if rivals != "few":
        chosen += [batched, concatenated, lambda layer: lora(layer, 16), lambda layer: lora(layer, 64), one_bit]
    if rivals == "compiled":
        chosen.append(compiled)
    return [made for make in chosen if (made := make(layer)) is not None]


def one_model(layer: Layer) -> Contestant:
    """F.linear of all rows on one materialised model."""
    weights = [weight for copy in layer.materialised or (layer.retrieved(layer.active[0])[None],) for weight in copy]
    copies = min(len(weights), copies_for(layer.unit, layer.device))
    return Contestant(
        FLOOR, lambda i: F.linear(layer.x, weights[i]), copies, held=layer.unit, bytes=layer.traffic(1),
        flops=layer.flops(), rows=all_rows(layer) if len(layer.active) == 1 else None,
    )  # fmt: skip


def each_model(layer: Layer) -> Contestant | None:
    """F.linear of each model's rows on its own weight. With one model in the batch it is the floor."""
    held, weights = layer.point.models * layer.unit, layer.materialised
    if len(layer.active) == 1:
        return None
    if weights is None:
        return left_out(EACH, layer, held)
    x, parts = layer.x[layer.order], layer.parts

    def call(i: int) -> Tensor:
        y = x.new_empty((len(x), layer.point.shape[0]))
        for weight, (_, first, end) in zip(weights[i], parts, strict=True):
            torch.mm(x[first:end], weight.mT, out=y[first:end])
        return y

    return Contestant(
        EACH, call, len(weights), held=held, bytes=layer.traffic(len(parts)), flops=layer.flops(),
        rows=layer.order.argsort(), note="rows sorted by model outside the timer",
    )  # fmt: skip


def batched(layer: Layer) -> Contestant | None:
    """One batched matmul over the models in the batch, their rows padded to the most that one of them has."""
    op, held, weights = "bmm over J materialised models", layer.point.models * layer.unit, layer.materialised
    if weights is None:
        return left_out(op, layer, held)
    x, rows = layer.padded
    padding = x.shape[0] * x.shape[1] / layer.point.m
    return Contestant(
        op, lambda i: torch.bmm(x, weights[i].mT).flatten(0, 1), len(weights), held=held,
        bytes=layer.traffic(len(layer.parts)), flops=layer.flops(padding), rows=rows,
        note=f"rows sorted and padded {padding:.2f}x outside the timer",
    )  # fmt: skip


def signed_sum(
    x: Tensor, weight: Tensor, delta: Tensor, columns: Tensor | None, rows: Tensor, order: Tensor | None, models: Tensor
) -> Tensor:
    """The superposed linear in plain torch, from tables of signs."""
    turned = x if columns is None else x * columns[models]
    if order is not None:
        turned = turned.gather(1, order[models])
    return F.linear(x, weight) + rows[models] * F.linear(turned, delta)


def two_matmuls(
    layer: Layer, function: Callable[..., Tensor] = signed_sum, op: str = "two matmuls, eager"
) -> Contestant | None:
    """Two vendor matmuls and sign operations between them, for one slot of D and no row of the base."""
    if layer.point.groups > 1 or -1 in layer.active:
        return None
    deltas = [delta[0] for delta in layer.deltas]
    held = 2 * layer.unit + sum(table.nbytes for table in layer.tables if table is not None)
    return Contestant(
        op, lambda i: function(layer.x, layer.weights[i], deltas[i], *layer.tables, layer.row_models), len(deltas),
        held=held, bytes=layer.traffic(2, passes=3), flops=layer.flops(2), rows=all_rows(layer),
        note="sign tables made outside the timer",
    )  # fmt: skip


def compiled(layer: Layer) -> Contestant | None:
    """The same under torch.compile, which may fuse the sign operations."""
    torch.compiler.reset()  # or another point's guards would count against this one's
    return two_matmuls(layer, torch.compile(signed_sum, dynamic=False), "two matmuls, compiled")


def concatenated(layer: Layer) -> Contestant | None:
    """One matmul with [W0 | D]: row signs act on the output of D alone, so there must be none."""
    columns, rows, order = layer.tables
    if layer.transform.row_signs or columns is None or order is not None or layer.point.groups > 1:
        return None
    if -1 in layer.active:
        return None
    both = [torch.cat((weight, delta[0]), 1) for weight, delta in zip(layer.weights, layer.deltas, strict=False)]
    factors = rows * columns
    x, models = layer.x, layer.row_models
    return Contestant(
        "K-concatenated matmul", lambda i: F.linear(torch.cat((x, x * factors[models]), 1), both[i]), len(both),
        held=2 * layer.unit + factors.nbytes, bytes=layer.traffic(2), flops=layer.flops(2), rows=all_rows(layer),
        note="sign tables and [W0 | D] made outside the timer",
    )  # fmt: skip


def retrieve_first(layer: Layer) -> Contestant | None:
    """Each model's weight retrieved into memory, then an F.linear of its rows."""
    if -1 in layer.active:
        return None
    x, parts = layer.x[layer.order], layer.parts

    def call(i: int) -> Tensor:
        y = x.new_empty((len(x), layer.point.shape[0]))
        for model, first, end in parts:
            torch.mm(x[first:end], layer.retrieved(model, i).mT, out=y[first:end])
        return y

    return Contestant(
        "retrieve, then F.linear", call, len(layer.deltas), held=(1 + layer.point.groups) * layer.unit,
        bytes=layer.traffic(4 * len(parts)), flops=layer.flops(), rows=layer.order.argsort(),
        note="rows sorted by model outside the timer",
    )  # fmt: skip


def lora(layer: Layer, rank: int) -> Contestant | None:
    """The base and a batched product with each row's own adapter, gathered by id."""
    (n, k), models, ids = layer.point.shape, layer.point.models, layer.ids.long()
    if -1 in layer.active:
        return None
    down, up = layer.random(models, rank, k).mul_(k**-0.5), layer.random(models, n, rank)
    runs = layer.x.view(len(ids), -1, k)

    def call(i: int) -> Tensor:
        low = torch.bmm(runs, down[ids].mT)
        return F.linear(layer.x, layer.weights[i]).add_(torch.bmm(low, up[ids].mT).view(-1, n))

    share = rank * (n + k) / (n * k)
    return Contestant(
        f"LoRA rank {rank}", call, len(layer.weights), held=int((1 + models * share) * layer.unit),
        bytes=layer.traffic(1 + len(layer.active) * share), flops=layer.flops(1 + share), recreated=True,
        note="not the same accuracy; our own re-creation with a gathered bmm",
    )  # fmt: skip


def one_bit(layer: Layer) -> Contestant | None:
    """A 1-bit delta a model, of the BitDelta kind: base matmul, and a batched one with the dequantised signs."""
    op, models = "1-bit deltas", layer.point.models
    if -1 in layer.active:
        return None
    (n, k), active = layer.point.shape, len(layer.active)
    copies = copies_for((1 + active) * layer.unit, layer.device)
    held = int((1 + models / (8 * layer.dtype.itemsize)) * layer.unit)
    if (copies + 1) * active * layer.unit > free_bytes(layer.device):
        return left_out(op, layer, held)
    dense = layer.weights[0].new_empty((copies, active, n, k))
    for place in range(active):
        packed = torch.randint(256, (n, -(-k // 8)), dtype=torch.uint8, device=layer.device)
        bits = packed[:, :, None] >> torch.arange(8, dtype=torch.uint8, device=layer.device) & 1
        dense[:, place] = (bits.to(layer.dtype) * 2 - 1).flatten(1)[:, :k]
    copied = dense.unbind()
    x, rows = layer.padded
    padding = x.shape[0] * x.shape[1] / layer.point.m

    def call(i: int) -> Tensor:
        delta_y = torch.bmm(x, copied[i].mT).flatten(0, 1)
        return F.linear(layer.x, layer.weights[i]).add_(delta_y[rows], alpha=layer.gain)

    return Contestant(
        op, call, copies, held=held, bytes=layer.traffic(1 + active), flops=layer.flops(1 + padding), recreated=True,
        note="not the same accuracy; our own re-creation of the BitDelta kind, dequantised, sorted and padded outside "
        f"the timer; a kernel on packed bits would read {1 + active / (8 * layer.dtype.itemsize):.2f} weights, not "
        f"{1 + active}; memory held counts packed bits",
    )  # fmt: skip


def all_rows(layer: Layer) -> Tensor:
    """Where the output keeps the order of x."""
    return torch.arange(layer.point.m, device=layer.device)


def left_out(op: str, layer: Layer, held: int) -> Contestant:
    """A baseline whose weights do not fit in memory."""
    needed = len(layer.active) * layer.unit / 1e9
    return Contestant(op, None, held=held, note=f"left out: {needed:.1f} GB of weights do not fit")
