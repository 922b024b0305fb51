"""Rows that a fine-tune's matrix has below the base's: tokens that its vocabulary gained.

    W_j (N + A, K)   its first N rows are a delta of the base's like any other's; the A below are the model's own, exact

They have the matrix's name and ``@added`` behind it, in a checkpoint's layout as in a model's file.
"""

from collections.abc import Collection, Iterable, Mapping

from torch import Tensor

from randes.checkpoints.layout import ADDED, Layout
from randes.checkpoints.lazy_tensors import chunk_bounds, chunks, digests, headers, rows
from randes.checkpoints.on_disk import own
from randes.checkpoints.sources import Tensors, check_finite
from randes.superposition.members import NewModel


def with_added(layout: Layout, tensors: Tensors, base: Tensors, candidates: Iterable[str]) -> Layout:
    """The layout of a checkpoint, of which some ``candidates``, matrices, have more rows than the base's.

    Only where the rows that both have are nearer to the base's than to zero: those of another vocabulary, or of a head
    for other classes, are no fine-tune of them, and what few bits would make of them is known for deltas alone.
    """
    aliases = {name: alias for alias, name in layout.ties.items()}
    found, expected = headers(tensors), headers(base)
    more = {}
    for name in candidates:
        held = name if name in found else aliases.get(name, "")
        if name in layout.views or held not in found or found[held].dim() != 2:
            continue
        count = len(found[held]) - len(expected[name])
        if count > 0 and found[held].shape[1:] == expected[name].shape[1:] and _is_near(tensors, held, base, name):
            more[name] = count
    return layout.with_added(more, base)


def _is_near(tensors: Tensors, held: str, base: Tensors, name: str) -> bool:
    """Whether ‖W_j − W0‖ < ‖W_j‖ over the base's rows."""
    from_base = from_zero = 0.0
    for (start, end), part in zip(chunk_bounds(headers(base)[name]), chunks(base, name), strict=True):
        tuned = rows(tensors, held, start, end).float()
        from_base += float((tuned - part).double().square().sum())
        from_zero += float(tuned.double().square().sum())
    return from_base < from_zero


def added_in(names: Collection[str]) -> dict[str, str]:
    """Of the names of a checkpoint's tensors those of added rows, by the matrix that they go below."""
    return {name.removesuffix(ADDED): name for name in names if name.endswith(ADDED)}


def keep_added(model: NewModel) -> None:
    """Record the rows that a model which joins adds. Raises ``CheckpointError`` for NaN or infinity."""
    parts = added_in(headers(model.tensors))
    model.digests |= digests(model.tensors, parts.values(), look=check_finite)
    model.added |= {tensor: own(model.tensors, part) for tensor, part in parts.items()}


def counts(added: Mapping[str, Tensor]) -> dict[str, int]:
    """How many rows a model adds to each matrix."""
    return {tensor: len(held) for tensor, held in headers(added).items()}
