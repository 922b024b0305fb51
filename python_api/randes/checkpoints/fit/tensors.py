"""Whether a fine-tune's tensors are the base's by name, shape and dtype; and what may differ, as nothing is lost."""

import os
import warnings
from collections import Counter
from collections.abc import Mapping, Set
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from randes.checkpoints.fit.fitted_tensors import FittedTensors
from randes.checkpoints.layout import tied
from randes.checkpoints.lazy_tensors import digests, headers
from randes.checkpoints.paths.foreign import FEW_BITS
from randes.checkpoints.sources import check_values, some
from randes.config import is_embedding
from randes.errors import CheckpointError

CAST = (torch.float32, torch.float16, torch.bfloat16)
"""What is cast from and to: a model that was trained or saved in another of these than its base."""
CONSTANTS = (
    "*rotary_emb.inv_freq", "*rotary_emb.cos_cached", "*rotary_emb.sin_cached", "*rotary.inv_freq",
    "*embeddings.position_ids", "*embeddings.token_type_ids", "*attn.bias", "*attn.masked_bias",
    "*attention.masked_bias", "*attention.bias", "*attn.causal_mask",
)  # fmt: skip
"""Names of what older versions of Transformers saved, and newer ones make of the configuration: no file's is used."""
HEADS = ("*head.weight", "*embed_out.weight", "*output.weight", "*output_layer.weight", "*decoder.weight")
"""Names of heads over the vocabulary."""
ENTRIES = (torch.bool, torch.uint8, torch.int64)
"""Dtypes that masks and positions have."""


def fitted(
    tensors: Mapping[str, Tensor], base: Mapping[str, Tensor], free: Set[str], finetuned: object,
    added: Mapping[str, str] | None = None,
) -> Mapping[str, Tensor]:  # fmt: skip
    """A fine-tune's tensors as the base has them: in its dtypes, and without what its model makes by itself.

    A head that is an embedding table again may be left out, or be there too. Warns of what is cast.
    free: names of tensors whose shapes may differ. finetuned: where they are from, for messages. added: by matrix, the
    names of rows below the base's.
    Raises ``CheckpointError`` as ``check_fits`` does, and for a head that is tied in the base and not here.
    """
    added = added or {}
    check_values(tensors, "a fine-tune")
    where = str(finetuned) if isinstance(finetuned, str | os.PathLike) else f"the {type(finetuned).__name__}"
    found, expected, ties = headers(tensors), headers(base), tied(tensors)
    from_where = {name: (tensors, name) for name in found if name in expected}
    for name in expected.keys() - found.keys() if from_where else ():
        if is_constant(name, expected[name]):
            from_where[name] = base, name
        elif table := _repeated(name, base):
            from_where[name] = tensors, table
    for name in found.keys() - expected.keys():
        spare = is_constant(name, found[name]) or ties.get(name) in expected
        if not spare and not (from_where and _repeats(name, tensors, base, where)):
            from_where[name] = tensors, name
    whole = FittedTensors(from_where, {})
    check_fits(whole, base, free, {*added.values()}, cast=True)
    other = {name: own.dtype for name, own in expected.items() if whole.headers[name].dtype != own.dtype}
    other |= {added[name]: dtype for name, dtype in other.items() if name in added}
    if not other:
        return tensors if from_where.keys() == found.keys() else whole
    pairs = Counter((_short(whole.headers[name].dtype), _short(dtype)) for name, dtype in other.items())
    counted = "; ".join(f"{count} of {len(expected)} from {old} to {new}" for (old, new), count in pairs.items())
    warnings.warn(f"tensors of {where} are cast to the base's dtype: {counted}", stacklevel=3)
    return FittedTensors(from_where, other)


def check_fits(
    tensors: Mapping[str, Tensor], base: Mapping[str, Tensor], free: Set[str] = frozenset(),
    beside: Set[str] = frozenset(), *, cast: bool = False,
) -> None:  # fmt: skip
    """Raise ``CheckpointError`` unless ``tensors`` has the base's names, shapes and dtypes. Reads no values.

    free: names of tensors whose shapes may differ.
    beside: of those that may be there and not in the base. cast: whether other dtypes may be, which can be cast.
    """
    found, expected = headers(tensors), headers(base)
    if not found.keys() & expected.keys():
        raise CheckpointError(f"no tensor matches the base; it has {some(expected)}, the checkpoint {some(found)}")
    if missing := expected.keys() - found.keys():
        raise CheckpointError(f"{len(missing)} tensors of the base are missing from the checkpoint: {some(missing)}")
    if extra := found.keys() - expected.keys() - beside:
        raise CheckpointError(f"{len(extra)} tensors of the checkpoint are not in the base: {some(extra)}")
    for name, own in expected.items():
        value = found[name]
        fits = value.dtype == own.dtype or (cast and {value.dtype, own.dtype} <= {*CAST})
        if (value.shape != own.shape and name not in free) or not fits:
            hint = "; exclude it, and each model keeps its own" if value.shape != own.shape else ""
            hint = f": {FEW_BITS}" if value.dtype.itemsize == 1 < own.dtype.itemsize else hint
            raise CheckpointError(
                f"{name} must be {tuple(own.shape)} {own.dtype} as in the base, got {tuple(value.shape)}"
                f" {value.dtype}{hint}"
            )


def is_constant(name: str, header: Tensor) -> bool:
    """Whether a tensor is one that its model makes of its configuration, whatever a file says."""
    if not any(fnmatchcase(name, pattern) for pattern in CONSTANTS):
        return False
    # GPT-2's mask (1, 1, T, T) is called as some attention's bias, which is one of rows.
    return header.dim() != 1 or header.dtype in ENTRIES or "rotary" in name


def is_head(name: str) -> bool:
    """Whether a tensor's name is that of a head over the vocabulary, which may be tied to the embeddings."""
    return any(fnmatchcase(name, pattern) for pattern in HEADS)


def tables_like(name: str, found: Mapping[str, Tensor]) -> list[str]:
    """The tables of embeddings of the same shape and dtype as a tensor, by names and headers."""
    own = found[name].shape, found[name].dtype
    return [table for table in found if table != name and is_embedding(table) and own == _kind(found[table])]


def _repeats(name: str, tensors: Mapping[str, Tensor], base: Mapping[str, Tensor], where: str) -> bool:
    """Whether a tensor that the base has not is one of its tables of embeddings again: a head that is tied there.

    Raises ``CheckpointError`` for a head that is another.
    """
    tables = [table for table in tables_like(name, headers(tensors)) if table in base]
    if not tables or headers(tensors)[name].dim() != 2:
        return False
    known = digests(tensors, [name, *tables])
    if any(known[table] == known[name] for table in tables):
        return True
    if not is_head(name):
        return False
    raise CheckpointError(
        f"{name} of {where} is a head of its own, which the base has tied to {tables[0]}: give the base one too, a copy"
        f" of that under the name {name} (with tie_word_embeddings false), and make the store of it; models that tie"
        " theirs still fit"
    )


def _repeated(name: str, base: Mapping[str, Tensor]) -> str | None:
    """The table of embeddings that a head of the base is again."""
    tables = tables_like(name, headers(base)) if is_head(name) else []
    if not tables:
        return None
    known = digests(base, [name, *tables])
    return next((table for table in tables if known[table] == known[name]), None)


def _kind(header: Tensor) -> tuple[torch.Size, torch.dtype]:
    return header.shape, header.dtype


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
