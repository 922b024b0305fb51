"""``import randes.parallel``: a served model cut over several devices, each with its part of every layer.

    mesh = init_device_mesh("cuda", (torch.distributed.get_world_size(),))
    model = randes.from_pretrained("store")  # whole, on the CPU, in each process
    parallelize(model, mesh)                 # each keeps its part
    model.to(f"cuda:{torch.distributed.get_rank()}")

Every process makes the same calls, with the same ``adapter_names``, and gets the same answers.
"""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.distributed.tensor import Shard as Split
from torch.distributed.tensor.parallel import ParallelStyle

from randes.serving.layers.delta_pool import Cuts
from randes.serving.layers.linear import SuperposedLinear
from randes.serving.layers.shards import Shard, own_copy
from randes.serving.model import SuperposedModel


class _CutLinear(ParallelStyle):
    """A style of ``torch.distributed.tensor.parallel`` for superposed and plain linear layers.

    whole: what goes in and out is whole on every device, whatever the cut.
    """

    dim: ClassVar[int]

    def __init__(self, *, whole: bool = False) -> None:
        super().__init__()
        self.whole = whole

    def check(self, module: nn.Module, mesh: DeviceMesh) -> Shard:
        """The part of a layer that this process keeps. Raises ``ValueError`` for one of which any process could not
        keep its own."""
        if mesh.ndim != 1:
            raise ValueError(f"device_mesh must have one dimension, got {mesh.ndim}: pass mesh['tp'], say")
        if type(module) is not nn.Linear and not isinstance(module, SuperposedLinear):
            raise ValueError(
                f"a {type(module).__name__} cannot be cut, only an nn.Linear whose weight is superposed as one matrix,"
                " or is the same in all models: superpose it, or leave its whole block out of the plan"
            )
        shape, world = (module.out_features, module.in_features), mesh.size()
        shards = [Shard.of(shape, self.dim, rank, world) for rank in range(world)]
        if isinstance(module, SuperposedLinear):
            for shard in shards:
                module.check_cut(shard)
        return shards[mesh.get_local_rank()]

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh, cuts: Cuts | None = None) -> nn.Module:
        shard = self.check(module, device_mesh)
        if isinstance(module, SuperposedLinear):
            module.cut(shard, cuts)
        else:
            _cut_plain(module, shard)

        def came(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
            x, *rest = args or (kwargs.pop("input"),)
            return (self._came(x, shard, device_mesh), *rest), kwargs

        module.register_forward_pre_hook(came, with_kwargs=True)
        module.register_forward_hook(lambda _, __, y: self._went(y, shard, device_mesh))
        return module

    def _came(self, x: Tensor, shard: Shard, mesh: DeviceMesh) -> Tensor:
        raise NotImplementedError

    def _went(self, y: Tensor, shard: Shard, mesh: DeviceMesh) -> Tensor:
        raise NotImplementedError


class ColumnParallel(_CutLinear):
    """Cuts the rows of a weight: each device makes its own outputs of a whole x.

    whole: they are then gathered, so that every device has all of them. By default each keeps its own, for a
    ``RowParallel`` layer to take.
    """

    dim = 0

    def _came(self, x: Tensor, shard: Shard, mesh: DeviceMesh) -> Tensor:
        if not torch.is_grad_enabled() and not isinstance(x, DTensor):
            return x
        whole = _spread(x, mesh, Replicate())
        return whole.to_local(grad_placements=[Partial()])  # of which each device has its own outputs' part

    def _went(self, y: Tensor, shard: Shard, mesh: DeviceMesh) -> Tensor:
        return _side_by_side(y, shard.shape[0], mesh) if self.whole else y


class RowParallel(_CutLinear):
    """Cuts the columns of a weight: each device multiplies its own part of x, and the products are summed.

    whole: x is whole on every device, which takes its part. By default each has its own, from a ``ColumnParallel``.
    """

    dim = 1

    def _came(self, x: Tensor, shard: Shard, mesh: DeviceMesh) -> Tensor:
        if self.whole and not isinstance(x, DTensor):
            x = DTensor.from_local(x, mesh, [Replicate()], run_check=False)
        return x.redistribute(mesh, [Split(-1)]).to_local() if isinstance(x, DTensor) else x

    def _went(self, y: Tensor, shard: Shard, mesh: DeviceMesh) -> Tensor:
        if torch.is_grad_enabled() or isinstance(y, DTensor):
            return _spread(y, mesh, Partial()).to_local()
        y = y.contiguous()  # in the product's own memory
        dist.all_reduce(y, group=mesh.get_group())
        return y


STYLES: dict[str, ParallelStyle] = {
    "colwise": ColumnParallel(),
    "colwise_gather_output": ColumnParallel(whole=True),
    "colwise_rep": ColumnParallel(whole=True),
    "rowwise": RowParallel(),
    "rowwise_split_input": RowParallel(whole=True),
    "rowwise_rep": RowParallel(whole=True),
}
"""By the names that Transformers' plans have."""
LEFT_WHOLE = {
    "embedding_rowwise", "embedding_colwise", "replicate", "replicated_with_grad_allreduce", "mla_kv_a_proj",
    "moe_tp_experts",
}  # fmt: skip
"""What every device has all of: in Transformers' plans these take and give what is whole on every device."""


def parallelize(
    model: nn.Module, device_mesh: DeviceMesh, plan: Mapping[str, str | ParallelStyle] | None = None
) -> nn.Module:
    """Keep of a served model's layers the part that is this process's, in place, and return the model.

    model: a ``SuperposedModel``, or what Transformers' ``from_pretrained`` made of a store (``randes.transformers``).
    device_mesh: of one dimension, over all processes that answer together.
    plan: by the layers' names, ``*`` for any number, ``ColumnParallel()`` or ``RowParallel()``, or what Transformers'
        plans call them. By default the plan of the Transformers model.

    Embeddings, norms and experts stay whole on every device. Models can be added and deleted as before, by the same
    calls in every process; ``merge_and_unload`` is refused. Raises ``ValueError`` before anything is changed: for a
    model without a plan, a plan of yours that names what is not there, layers that a plan cuts and that cannot be
    (``SuperposedLinear.shard`` says which), and for attention whose heads the number of processes does not divide.
    """
    served = vars(model).get("_randes", model)
    if not isinstance(served, SuperposedModel):
        raise ValueError(f"model must be one that serves a superposition, got a {type(model).__name__}")
    root: Any = served.base_model
    own = getattr(root, "tp_plan", None) if plan is None else plan
    if not own:
        raise ValueError(f"plan must be given for a {type(root).__name__}, which has none of its own")
    if plan is None:
        _check_heads(root, device_mesh.size())
    elif unknown := sorted(set(own) - {name for path in _paths(root) for name in (path, _general(path))}):
        raise ValueError(f"plan must name layers of the model, got {unknown[0]!r}")
    chosen = list(_chosen(root, own, device_mesh))
    cuts: Cuts = WeakKeyDictionary()  # of pools that shuffled layers share
    for layer, style in chosen:
        if isinstance(style, _CutLinear):
            style._apply(layer, device_mesh, cuts)
        else:
            style._apply(layer, device_mesh)
    return model


def _paths(root: nn.Module) -> Iterator[str]:
    """Of everything that a plan may name."""
    yield from (path for path, _ in root.named_modules())
    yield from (path for path, _ in root.named_parameters())


def _general(path: str) -> str:
    """With ``*`` in the place of numbers, as in a plan."""
    return ".".join("*" if part.isdecimal() else part for part in path.split("."))


def _chosen(
    root: nn.Module, plan: Mapping[str, str | ParallelStyle], mesh: DeviceMesh
) -> Iterator[tuple[nn.Module, ParallelStyle]]:
    """The layers that a plan cuts, each once. Raises ``ValueError`` for one that cannot be."""
    for path, layer in root.named_modules():
        wanted = plan.get(path, plan.get(_general(path)))
        if wanted is None or wanted in LEFT_WHOLE:
            continue
        style = STYLES.get(wanted) if isinstance(wanted, str) else wanted
        if style is None:
            known = ", ".join(sorted(STYLES))
            raise ValueError(f"plan must have styles among {known} for layers that are served, got {wanted!r}: {path}")
        try:
            if isinstance(style, _CutLinear):
                style.check(layer, mesh)
        except ValueError as error:
            if isinstance(style, ColumnParallel) and style.whole:
                continue  # all of it on every device is the same to everyone else
            raise ValueError(f"{path}: {error}") from None
        yield layer, style


def _check_heads(root: Any, world: int) -> None:
    """Raise ``ValueError`` where a device would have a part of a head."""
    config: Any = getattr(root, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    for name in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(config, name, None)
        if isinstance(heads, int) and heads % world:
            raise ValueError(f"device_mesh must divide the model's {name}, {heads}, got {world} processes")


def _spread(value: Tensor, mesh: DeviceMesh, placement: Any) -> DTensor:
    """A tensor that is whole on every device, of one that is ``placement`` there, or says itself how it is."""
    spread = value if isinstance(value, DTensor) else DTensor.from_local(value, mesh, [placement], run_check=False)
    return spread.redistribute(mesh, [Replicate()])


def _side_by_side(y: Tensor, width: int, mesh: DeviceMesh) -> Tensor:
    shape = torch.Size((*y.shape[:-1], width))
    stride = torch.empty(shape, device="meta").stride()
    parts = DTensor.from_local(y, mesh, [Split(-1)], run_check=False, shape=shape, stride=stride)
    return parts.redistribute(mesh, [Replicate()]).to_local()


@torch.no_grad()
def _cut_plain(linear: Any, shard: Shard) -> None:
    """A layer that is the same in all models."""
    parts = {"weight": shard.of_tensor, "bias": shard.of_rows}
    for name, part in parts.items():
        if (held := linear._parameters.get(name)) is not None:
            linear._parameters[name] = nn.Parameter(own_copy(part(held)), requires_grad=held.requires_grad)
    if shard.columns.start:
        linear.bias = None
    linear.out_features, linear.in_features = len(shard.rows), len(shard.columns)
