"""What Transformers renames, stacks and cuts when it reads a model's files, as a ``Conversion``."""

import copy
import importlib
import warnings
from collections.abc import Mapping, Set
from dataclasses import replace
from functools import lru_cache
from typing import Any

from torch import Tensor, nn

from randes.checkpoints.huggingface import CONFIG, is_supported, library, skeleton_of
from randes.checkpoints.layout import tied_in
from randes.checkpoints.lazy_tensors import headers
from randes.checkpoints.names.conversion import Conversion, without
from randes.checkpoints.names.pieces import Piece, contiguous
from randes.checkpoints.names.traced import UntraceableError, pieces_of, traced
from randes.checkpoints.on_disk import StoredTensors
from randes.checkpoints.sources import Tensors
from randes.errors import CheckpointError


def read_base(model: nn.Module, tensors: Tensors, where: object) -> tuple[Tensors, Conversion]:
    """A folder's tensors as those of its model, which is on "meta", and the way back to them. where: for messages.

    What the model does not have is left out, with a warning, as Transformers does.
    Raises ``CheckpointError`` as ``conversion_of`` does, and where a tensor of the model is missing.
    """
    conversion = conversion_of(model, tensors, where)
    found = conversion.apply(tensors)
    if unused := found.keys() - model.state_dict().keys():
        names = sorted(unused)
        warnings.warn(
            f"{len(names)} tensors of {where} are left out, because a {type(model).__name__} has none such:"
            f" {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}",
            stacklevel=2,
        )
        conversion = replace(conversion, dropped=frozenset(names))
        found = conversion.apply(tensors)
    check_complete(model, headers(found), where)
    return found, conversion.back(tensors)


def read_finetuned(
    tensors: Tensors, base: Mapping[str, bytes], own: Set[str], dropped: Set[str], where: object
) -> Tensors:  # fmt: skip
    """A fine-tune's tensors, of files, as those of the base's model; what is of no files stays as it is.

    base: the files that go with it. own: its tensors' names; where they are not the model's, as in a store from before
    files were read so, nothing changes. dropped: what is left out of the base's files. where: for messages.
    Raises ``CheckpointError`` as ``conversion_of`` does.
    """
    if not isinstance(tensors, StoredTensors) or CONFIG not in base:
        return tensors
    model = _skeleton(base[CONFIG], len(tensors))
    if model is None or not own <= model.state_dict().keys():
        return tensors
    return without(conversion_of(model, tensors, where).apply(tensors), dropped)


@lru_cache(maxsize=1)
def _skeleton(config: bytes, tensors: int) -> nn.Module | None:
    return skeleton_of(config, tensors, "the base")


def conversion_of(model: nn.Module, tensors: Tensors, where: object) -> Conversion:
    """From the tensors of a folder's files to those of the model that Transformers would make of it.

    What the model does not have stays as it is. Nothing changes for what is no model of Transformers, or of one that is
    older than ``OLDEST``.
    Raises ``CheckpointError`` where Transformers does more than put elements in another order.
    """
    if not is_supported() or not isinstance(model, library().PreTrainedModel):
        return Conversion()
    found = headers(tensors)
    own: dict[str, str] = {}
    made: dict[str, tuple[Piece, ...]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, (converter, by_pattern) in _grouped(model, found).items():
        if converter is None:
            ((before, *others),) = by_pattern.values()
            if others:
                raise CheckpointError(f"{where} has both {before} and {others[0]}, which are one tensor of the model")
            own[name] = before
            continue
        for target, pieces, shape in _converted(model, name, converter, by_pattern, found, where):
            if target in made:
                raise CheckpointError(f"{where} has two tensors that are the model's {target}")
            if len(pieces) == 1 and _is_whole(pieces[0], found):
                own[target] = pieces[0].source
            else:
                made[target], shapes[target] = pieces, shape
    if twice := sorted(own.keys() & made.keys()):
        raise CheckpointError(f"{where} has two tensors that are the model's {twice[0]}")
    return Conversion({name: before for name, before in own.items() if name != before}, made, shapes)


def check_complete(model: nn.Module, tensors: Mapping[str, Tensor], where: object) -> None:
    """Raise ``CheckpointError`` where a tensor of the model is not among these, nor one that it is tied to: it would be
    a random one; and where one has another shape."""
    own = model.state_dict(keep_vars=True)
    ties = tied_in(own)
    there = {ties.get(name, name) for name in own if name in tensors}
    if absent := [name for name in own if ties.get(name, name) not in there]:
        raise CheckpointError(
            f"{where} must have every tensor of a {type(model).__name__}, which its configuration names; it lacks"
            f" {len(absent)} of them, {absent[0]} the first, and Transformers would make those up. Name the class that"
            " it was saved from in architectures"
        )
    for name, value in own.items():
        if name in tensors and (found := tuple(tensors[name].shape)) != tuple(value.shape):
            raise CheckpointError(f"{name} of {where} must be {tuple(value.shape)} as its {CONFIG} says, got {found}")


def _grouped(model: Any, found: Mapping[str, Tensor]) -> dict[str, tuple[Any, dict[str, list[str]]]]:
    """Of each of the model's tensors, or of the first of those that are made together, what makes it, and by pattern
    the names of what it is made of; None and one name where it is only renamed, if at all."""
    loading: Any = importlib.import_module("transformers.core_model_loading")
    mapping: Any = importlib.import_module("transformers.conversion_mapping")
    transforms = mapping.get_model_conversion_mapping(model)
    renamings = [one for one in transforms if isinstance(one, loading.WeightRenaming)]
    converters = [one for one in transforms if isinstance(one, loading.WeightConverter)]
    by_pattern = {pattern: one for one in converters for pattern in one.source_patterns}
    own, prefix = model.state_dict(), model.base_model_prefix
    groups: dict[str, tuple[Any, dict[str, list[str]]]] = {}
    for before in sorted(found, key=loading.dot_natural_key):
        name, pattern = loading.rename_source_key(before, renamings, converters, prefix, own)
        if name not in own and before in own:
            name, pattern = loading.rename_source_key(before, [], [], prefix, own)
        if name in own:
            converter = None if pattern is None else by_pattern[pattern]
            _, some = groups.setdefault(name, (converter, {}))
            some.setdefault(pattern or "", []).append(before)
    return groups


def _converted(
    model: Any, name: str, converter: Any, by_pattern: Mapping[str, list[str]], found: Mapping[str, Tensor],
    where: object,
) -> list[tuple[str, tuple[Piece, ...], tuple[int, ...]]]:  # fmt: skip
    """The tensors that one of Transformers' converters makes, with what each is made of and its shape."""
    running = copy.deepcopy(converter)
    for pattern, names in by_pattern.items():
        for before in names:
            running.add_tensor(name, before, pattern, traced(before, found[before]))
    try:
        values = running.convert(name, model=model, config=model.config)
        values = {target: value[0] if isinstance(value, list) else value for target, value in values.items()}
        return [(target, pieces_of(value), tuple(value.shape)) for target, value in values.items()]
    except UntraceableError as error:
        raise CheckpointError(f"{where} cannot be read as Transformers does: {name} is {error}") from error
    except Exception as error:  # whatever it has against these shapes
        raise CheckpointError(f"{where} cannot be read as Transformers does: {name}: {error}") from error


def _is_whole(piece: Piece, found: Mapping[str, Tensor]) -> bool:
    """Whether a piece is a whole tensor as it is."""
    shape = tuple(found[piece.source].shape)
    return piece.shape == shape and piece.from_stride == piece.to_stride == contiguous(shape)
