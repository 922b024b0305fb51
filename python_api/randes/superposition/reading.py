"""How a fine-tune's checkpoint is read as a superposition's tensors."""

from collections.abc import Callable, Container, Iterable

from randes.checkpoints import sources
from randes.checkpoints.fit.tensors import fitted
from randes.checkpoints.lazy_tensors import digests, headers
from randes.checkpoints.names.from_transformers import read_finetuned
from randes.checkpoints.sources import Checkpoint, Tensors
from randes.errors import CheckpointError
from randes.superposition.added_rows import added_in, with_added
from randes.superposition.state import State


def heads_of_others(sup: State, models: Iterable[Checkpoint]) -> list[str]:
    """The matrices that some model has with another number of rows, of which the base's are no part: heads for other
    classes. None where nothing is kept."""
    found = set()
    for model in models if sup.config.others == "keep" else ():
        tensors = _named(sup, model)
        longer = with_added(sup.layout, tensors, sup.base, sup.superposed).views
        for name in sup.superposed:
            own, base = headers(tensors).get(name), headers(sup.base)[name]
            if own is not None and name not in longer and len(own) != len(base) and own.shape[1:] == base.shape[1:]:
                found.add(name)
    return sorted(found - sup.unshared)


def read(sup: State, finetuned: Checkpoint, whole: Container[str] = ()) -> Tensors:
    """A fine-tune's tensors under the base's names, as matrices where they are superposed as such, and rows that it
    adds to one apart, but for those that it keeps ``whole``.

    Raises ``CheckpointError`` for one that does not fit. Tensors that no models share may have other shapes.
    """
    found, layout, keeps = _named(sup, finetuned), sup.layout, sup.config.others == "keep"
    if keeps:
        layout = with_added(layout, found, sup.base, (name for name in sup.superposed if name not in whole))
    tensors = layout.split(found)
    free = sup.base.keys() - {*sup.superposed} | sup.unshared if keeps else set()
    return fitted(tensors, sup.base, free, finetuned, added_in(layout.parts))


def _named(sup: State, finetuned: Checkpoint) -> Tensors:
    """A fine-tune's tensors under the base's names, as its files or its module have them."""
    own = sup.layout.joined(sup.base, ties=False)
    # An adapter is of the base itself, which is not here where deltas are measured from something else.
    found = sources.read(finetuned, None if sup.config.centre or not sup.has_base else own)
    return read_finetuned(found, sup.model_files, own.keys(), sup.to_files.dropped, finetuned)


def read_added(
    sup: State, name: str, finetuned: Checkpoint, *, step: Callable[[int], None] = lambda _: None
) -> Tensors:  # fmt: skip
    """The tensors of the checkpoint that was added as ``name``. step: called with the bytes read.

    Raises ``UnknownModelError``, and ``CheckpointError`` for any other checkpoint.
    """
    member = sup.member(name)
    tensors = read(sup, finetuned, whole=member.kept)
    found = digests(tensors, look=sources.check_finite, step=step)
    if other := sorted({tensor for tensor, _ in found.items() ^ member.digests.items()}):
        raise CheckpointError(
            f"this is not the checkpoint that was added as {name!r}: {len(other)} of {len(tensors)} tensors differ,"
            f" {other[0]} the first"
        )
    return tensors
