"""Whether a base module's layers can serve a superposition, and their change into what does."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from randes.checkpoints.configurations import check_configuration
from randes.checkpoints.modules.other_references import gone_through, held_elsewhere
from randes.checkpoints.modules.parameters import plain_state
from randes.checkpoints.modules.weight_reads import weights_read
from randes.checkpoints.sources import digest
from randes.errors import BaseMismatchError, CheckpointError
from randes.serving.base_layers import Layer, adds_rows, base_names, is_plain, is_relative
from randes.serving.layers.delta_pool import DeltaPool
from randes.serving.layers.linear import SuperposedLinear
from randes.serving.layers.other_layers import SuperposedEmbedding, SuperposedLayer, kind_of
from randes.serving.layers.per_model import PerModelTensor, Routed
from randes.serving.layers.per_row import (
    RoutedEmbedding,
    route_layer,
    routing_of,
)
from randes.serving.layers.recomputed import recomputed_in
from randes.serving.layers.superposed import Superposed, SuperposedMatrix, check_is_base
from randes.serving.routing import Router
from randes.superposition.members import BASE_NAME
from randes.superposition.superposition import Superposition


@dataclass
class Room:
    """For how much a model's tables have rows.

    numbers: of models. groups, kept: of superpositions of groups, and of tensors of each name that models keep; None
    for what there is at first.
    """

    numbers: int
    groups: int | None = None
    kept: int | None = None


def check_added(layers: Sequence[Layer], superposition: Superposition) -> None:
    """Raise ``ValueError`` for a layer that cannot have more rows for some models than the base has."""
    for layer in layers:
        longer = adds_rows(layer, superposition) and not is_plain(layer)
        if longer and kind_of(layer.module, layer.views) is not SuperposedEmbedding:
            raise ValueError(
                f"{layer.path} must be an nn.Linear or an nn.Embedding to have rows beyond the base's for some models,"
                f" got a {type(layer.module).__name__}; exclude its tensors when the superposition is created"
            )


def check_layers(module: nn.Module, layers: Sequence[Layer], superposition: Superposition) -> None:
    """Raise ``BaseMismatchError`` unless the module holds the base, and ``ValueError`` for a layer that would not call
    what serves it."""
    superposition.check_base()
    _check_values(module, superposition)
    try:
        check_configuration(superposition.model_files, module)
    except CheckpointError as error:
        raise BaseMismatchError(f"the model is not the superposition's base: {error}") from None
    for layer in layers:
        if isinstance(layer.module, Superposed | Routed):
            raise ValueError("base_module is served by a superposition already; give each its own copy of the base")
    check_calls(module, layers)
    check_added(layers, superposition)
    read = weights_read(module, seen_alone=True)
    for layer in layers:
        if found := [name for name in layer.views if f"{layer.path}.{name}".lstrip(".") in read]:
            raise ValueError(
                f"{layer.tensors[found[0]]} is superposed, but the model's code reads its values past its layer, where"
                " they are another model's for each row: superpose the model itself, not its tensors alone, and it is"
                " kept per model; or exclude it when the superposition is created"
            )


def check_calls(module: nn.Module, layers: Sequence[Layer]) -> None:
    """Raise ``ValueError`` for a layer that would not call what serves it."""
    for why, _ in obstacles(module, layers):
        raise ValueError(why)
    _check_references(module, layers)


def obstacles(module: nn.Module, layers: Sequence[Layer]) -> Iterator[tuple[str, set[str]]]:
    """Why layers would not call what serves them, and of each reason the superposed tensors that it is for."""
    for path, layer in module.named_modules():
        # These read the weights of the layers inside them without calling those.
        if isinstance(layer, nn.TransformerEncoderLayer) or (
            isinstance(layer, nn.MultiheadAttention) and not _runs_by_model(layer, path, layers)
        ):
            inside = (other for other in layers if other.path == path or other.path.startswith(f"{path}."))
            yield (
                f"{path or 'the model'} must call its linear layers; a {type(layer).__name__} reads their weights"
                " instead, and would silently answer as the base",
                {other.tensors[name] for other in inside for name in other.views},
            )
    for layer in layers:
        superposed = {layer.tensors[name] for name in layer.views}
        tensors = ", ".join(sorted(superposed))
        if "forward" in vars(layer.module):
            yield (
                f"{layer.path}.forward was replaced on the layer itself, and would silently answer as the base",
                superposed,
            )
        if layer.views and (made := recomputed_in(layer.module)):
            yield (
                f"{tensors} is superposed, but {layer.path}.{made[0]} is made anew before each call (torch.nn.utils'"
                " weight_norm, spectral_norm or prune): exclude it when the superposition is created, or remove those",
                superposed,
            )
        if layer.views and not is_plain(layer) and (is_relative(layer) or not kind_of(layer.module, layer.views)):
            yield (
                f"{tensors} is superposed, but belongs to a {type(layer.module).__name__}, which cannot be served as"
                " it is stored (docs/transformers.md lists what can); exclude it when the superposition is created",
                superposed,
            )


def _check_references(module: nn.Module, layers: Sequence[Layer]) -> None:
    """Raise ``ValueError`` where a tensor that models differ in is found past its name, as the base's for all."""
    moved: dict[str, Tensor] = {}
    holders: dict[int, str] = {}
    for layer in layers:
        for name in (*layer.views, *layer.kept):
            moved[f"{layer.path}.{name}".lstrip(".")] = getattr(layer.module, name)
        holders[id(layer.module)] = layer.path
    made = {f"{layer.path}.{name}".lstrip(".") for layer in layers for name in recomputed_in(layer.module)}
    for attribute, name in held_elsewhere(module, moved, made):
        raise ValueError(
            f"{attribute} holds {name}, and would give the base's values for every model: remove it, or look the"
            " parameter up by its name in each call"
        )
    for owner, method, whose in gone_through(module):
        if found := [holders[id(part)] for part in whose.modules() if id(part) in holders]:
            raise ValueError(
                f"{type(owner).__name__}.{method} goes through parameters, those of {found[0] or 'the model'} among"
                " them, and would get the base's values for every model: have it call the layers, or read the"
                " parameters by their names"
            )


def _runs_by_model(attention: nn.MultiheadAttention, path: str, layers: Sequence[Layer]) -> bool:
    """Whether attention that reads the weights inside it can be run for each model: none of them is superposed."""
    inside = [layer for layer in layers if layer.path == path or layer.path.startswith(f"{path}.")]
    return not any(layer.views for layer in inside) and (attention.batch_first or not inside)


def _check_values(module: nn.Module, superposition: Superposition) -> None:
    held = plain_state(module)
    own = {tensor: held[name] for name, tensor in base_names(module, superposition).items()}
    own = {name: value.detach().cpu() for name, value in own.items()}
    added = superposition.members.get(BASE_NAME)
    for name, value in superposition.layout.split(own).items():
        if added is not None and digest(value) == added.digests[name]:
            continue  # as it was before deltas were centred on their mean
        if not superposition.has_base and name in superposition.superposed:
            continue  # it will be zero
        check_is_base(superposition, name, value)


def take_centre(layers: Sequence[Layer], superposition: Superposition) -> None:
    """The mean of the fine-tunes, or zeros, in place of the base: what deltas are measured from.

    As parameters of their own: the base's tensors may be tied to others that are not superposed, and are the caller's.
    """
    centres: dict[str, nn.Parameter] = {}
    for layer in layers:
        for name, view in layer.views.items():
            tensor, weight = layer.tensors[name], getattr(layer.module, name)
            if tensor not in centres:
                centre = view.tensor({part: superposition.base[part] for part in view.parts})
                centres[tensor] = nn.Parameter(centre.to(weight).clone(), requires_grad=weight.requires_grad)
            layer.module.register_parameter(name, centres[tensor])


def take_over(
    layer: Layer, superposition: Superposition, router: Router, pools: Mapping[str, DeltaPool],
    tables: Mapping[str, PerModelTensor], room: Room,
) -> None:  # fmt: skip
    """Turn a layer, in place, into what serves it: its hooks and all references to it stay."""
    module = layer.module
    if is_plain(layer):
        assert isinstance(module, nn.Linear)
        weight, bias = layer.tensors["weight"], layer.tensors.get("bias", "")
        keeps_bias = "bias" in layer.kept
        SuperposedLinear.take_over(
            module, superposition, weight, bias, router, pools[weight], room.numbers, keeps_bias
        )  # fmt: skip
        return
    kind: type[Routed] | None = kind_of(module, layer.views) if layer.views else None
    if is_relative(layer):
        kind = Routed  # read for one model at a time: see RoutedBias
    weights = {
        name: [
            SuperposedMatrix(superposition, part, own, pools[part], room.numbers)
            for part, own in view.matrices(getattr(module, name).detach()).items()
        ]
        for name, view in layer.views.items()
    }
    if kind is None and routing_of(module, layer.kept) is RoutedEmbedding:
        module.of_positions = "position" in layer.path  # type: ignore[assignment]
    route_layer(module, {name: tables[tensor] for name, tensor in layer.kept.items()}, router, kind, layer.views)
    if isinstance(module, SuperposedLayer):
        module.take_weights(weights, layer.views)


def make_pools(layers: Sequence[Layer], superposition: Superposition, room: Room) -> dict[str, DeltaPool]:
    """The superpositions of each matrix; layers that are shuffled or tied share one."""
    by_family: dict[str, DeltaPool] = {}
    pools = {}
    for layer in layers:
        for name, view in layer.views.items():
            for matrix, weight in view.matrices(getattr(layer.module, name).detach()).items():
                first = superposition.family(matrix)[0]
                if first not in by_family:
                    by_family[first] = DeltaPool(superposition, matrix, weight, room.groups)
                pools[matrix] = by_family[first]
    return pools


def make_tables(layers: Sequence[Layer], superposition: Superposition, room: Room) -> dict[str, PerModelTensor]:
    """Of every tensor that some model may have its own of, what each has: one for all layers that are tied."""
    tables: dict[str, PerModelTensor] = {}
    for layer in layers:
        for name, tensor in layer.kept.items():
            if tensor not in tables and not (is_plain(layer) and name == "bias"):
                like = getattr(layer.module, name)
                tables[tensor] = PerModelTensor(superposition, tensor, like, room.numbers, room.kept)
    return tables
