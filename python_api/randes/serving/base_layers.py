"""Which tensors of a superposition each layer of a base module holds, and which of them it multiplies with."""

from collections.abc import Collection
from dataclasses import dataclass, field

from torch import nn

from randes.checkpoints.layout import tied_in
from randes.checkpoints.lazy_tensors import headers
from randes.checkpoints.modules.parameters import plain_state
from randes.checkpoints.modules.weight_reads import reads_its_own, weights_read
from randes.checkpoints.tensor_views import View
from randes.errors import BaseMismatchError
from randes.serving.layers.other_layers import SuperposedEmbedding, is_linear, kind_of
from randes.serving.layers.per_row import RoutedByModel, calls_super, routing_of
from randes.serving.layers.recomputed import recomputed_in
from randes.superposition.superposition import Superposition


@dataclass
class Layer:
    """One layer of a base module that models have tensors of their own in.

    path: its name in the module, the first where it has several.
    views: of its parameters that are superposed, the matrices. kept: of the others the tensors' names.
    tensors: the base's name of each of its parameters and buffers; tied ones have that of the first.
    """

    path: str
    module: nn.Module
    views: dict[str, View] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    tensors: dict[str, str] = field(default_factory=dict)


def layers_of(module: nn.Module, superposition: Superposition, wanted: Collection[str] | None = None) -> list[Layer]:
    """The layers with superposed or kept tensors.

    wanted: of which layers all tensors that are not superposed may come to be kept, beside those that take each row's
    own in one pass: those that hold one of these. By default only what some model has of its own is kept.
    Raises ``BaseMismatchError`` where the module has other tensors than the base, and ``ValueError`` where one layer
    is to be two.
    """
    views = {name: view for name, view in _views(superposition).items() if not view.vector}
    parts = superposition.layout.parts
    unpacked = {parts.get(name, name) for name in superposition.unshared if superposition.packing is None}
    names = base_names(module, superposition)
    others = {*superposition.others, *superposition.layout.vectors}
    layers: dict[int, Layer] = {}
    for name, tensor in names.items():
        path, _, last = name.rpartition(".")
        owner = module.get_submodule(path)
        layer = layers.setdefault(id(owner), Layer(path, owner))
        if layer.tensors.setdefault(last, tensor) != tensor:
            raise ValueError(f"{path} is shared with {layer.path}, and cannot have other tensors than that")
        if tensor in views:
            layer.views[last] = views[tensor]
        elif tensor in others or wanted is not None:
            layer.kept[last] = tensor
    tables = {*superposition.tables.values()}
    # Asking a module takes a run of it, which those that stay whole anyway need not.
    read = set() if tables <= unpacked else weights_read(module, seen_alone=True)
    for layer in layers.values():
        # Whole in each model's table, where nothing can look them up, or they are there as exactly as they came.
        whole = {name: tensor for name, tensor in layer.tensors.items() if tensor in tables}
        if whole and (unpacked.issuperset(whole.values()) or not _takes_deltas(layer, superposition, read)):
            layer.views = {name: view for name, view in layer.views.items() if name not in whole}
            layer.kept |= whole
    if wanted is not None:
        for layer in layers.values():
            own = others.union(wanted).intersection(layer.tensors.values())
            if not layer.views and not own and issubclass(routing_of(layer.module, layer.kept), RoutedByModel):
                layer.kept = {}
    return [layer for layer in layers.values() if layer.views or layer.kept]


def _views(superposition: Superposition) -> dict[str, View]:
    """Of every superposed tensor of a checkpoint its matrices."""
    parts = {part for view in superposition.layout.views.values() for part in view.parts}
    plain = [name for name in superposition.superposed if name not in parts]
    shapes = {name: tuple(headers(superposition.base)[name].shape) for name in plain}
    return {**superposition.layout.views, **{name: View(shapes[name], {name: shapes[name][0]}) for name in plain}}


def base_names(module: nn.Module, superposition: Superposition) -> dict[str, str]:
    """Of every tensor of the module its name in the base: its own, or that of one it is tied to."""
    held = {superposition.layout.parts.get(name, name) for name in superposition.base}
    own = plain_state(module)
    ties = tied_in(own)
    known = {ties.get(name, name): name for name in reversed(own) if name in held}
    names = {name: name if name in held else known.get(ties.get(name, name), "") for name in own}
    odd = sorted({name for name, tensor in names.items() if not tensor} | (held - own.keys()))
    if odd:
        raise BaseMismatchError(
            f"the model must have the base's tensors; {len(odd)} are in one alone, {odd[0]} the first"
            " (where a model's files have other names than its modules, superpose the loaded models)"
        )
    return names


def is_relative(layer: Layer) -> bool:
    """Whether a layer is looked up for pairs of positions, and not for rows."""
    return isinstance(layer.module, nn.Embedding) and "relative" in layer.path


def is_plain(layer: Layer) -> bool:
    """Whether a layer is an ``nn.Linear`` whose weight is one matrix."""
    return is_linear(layer.module) and layer.views.keys() == {"weight"} and (
        set(layer.views["weight"].parts) == {layer.tensors["weight"]} and not layer.views["weight"].transposed
    )  # fmt: skip


def adds_rows(layer: Layer, superposition: Superposition) -> bool:
    """Whether some model has rows below the base's in a matrix of a layer."""
    tensors = {layer.tensors[name] for name in layer.views}
    return any(not tensors.isdisjoint(member.added) for member in superposition.members.values())


def _takes_deltas(layer: Layer, superposition: Superposition, read: Collection[str]) -> bool:
    """Whether a layer can multiply with tables of embeddings, or look them up, where they are not there as tensors.

    read: the weights of the module that its code reads past their layers.
    """
    module, tensors = layer.module, {layer.tensors[name] for name in layer.views}
    if recomputed_in(module) or any(f"{layer.path}.{name}".lstrip(".") in read for name in layer.views):
        return False
    if any(not tensors.isdisjoint(member.kept) for member in superposition.members.values()):
        return False  # some model's is of another shape
    if is_plain(layer):
        return True
    kind = kind_of(module, layer.views)
    if kind is not SuperposedEmbedding:
        return kind is not None and not adds_rows(layer, superposition)
    by_row = calls_super(module) and not reads_its_own(module, "weight")
    return by_row and not is_relative(layer) and "position" not in layer.path
