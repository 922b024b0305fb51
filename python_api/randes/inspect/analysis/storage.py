"""How many numbers and bytes a superposition is, in our count and in FusionBench's."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from randes.checkpoints.lazy_tensors import described, headers, size
from randes.checkpoints.sources import Tensors
from randes.superposition.packed_tensors import SuperposedDelta
from randes.superposition.superposition import Superposition
from randes_kernels import Packed


@dataclass(frozen=True)
class Storage:
    """What is held, in numbers and bytes. ``storage`` and ``fusionbench_storage`` say what they count.

    model_numbers, model_bytes: of one model. numbers, nbytes: of all that the models are made of together.
    context_numbers: those of ``numbers`` that are the models' own contexts: the matrices that turn their deltas.
    """

    model_numbers: int
    model_bytes: int
    numbers: int
    nbytes: int
    context_numbers: int

    def to_dict(self) -> dict[str, float]:
        """Under the names that FusionBench's metadata has, with gigabytes of 10⁹ bytes."""
        return {
            "total_param_count_original": self.model_numbers,
            "total_gb_original": self.model_bytes / 1e9,
            "total_gb_retrieved": self.nbytes / 1e9,
            "nonzero_parameter_count": self.numbers,
            "nonzero_param_count_context": self.context_numbers,
        }


def storage(superposition: Superposition) -> Storage:
    """What a store holds, number by number. ``fusionbench_storage`` counts as FusionBench does.

    Contexts are regenerated from names: of each a store has one gain a tensor.
    """
    sup = superposition
    gains = sum(len(member.gains) for member in sup.members.values())
    held: list[Mapping[str, SuperposedDelta]] = [headers(sup.base), headers(sup.averages), headers(sup.bases)]
    held += [described(tensors) for tensors in sup.held.values()]
    for member in sup.members.values():
        held += [headers(member.kept), headers(member.added), described(member.coordinates)]
    return Storage(
        model_numbers=_elements(sup.base),
        model_bytes=size(sup.base),
        numbers=sum(_count(value) for tensors in held for value in tensors.values()) + gains,
        nbytes=sup.sizes.total + 4 * gains,
        context_numbers=gains,
    )


def fusionbench_storage(superposition: Superposition) -> Storage:
    """The same superposition as FusionBench's RanDeS would count it.

    Contexts count as if they were stored, a byte for each sign and four for each other number. Of a soup
    (``origin="zero"``) everything is counted once; else the base, D unless nothing turns it, and nothing of what is not
    superposed. D counts in the base's dtype, or four bytes where that has fewer.
    """
    sup, config, base = superposition, superposition.config, headers(superposition.base)
    soup, names = config.origin == "zero", len(superposition.names)
    plain = config.matrix == "signs" and config.signs == "none"
    each = 1 if config.matrix == "signs" else 4
    counted = contexts = nbytes = 0
    for name, header in base.items():
        if name not in sup.superposed:
            if soup:
                counted, nbytes = counted + header.numel(), nbytes + header.nbytes
            continue
        if soup or not plain or config.shuffle_layers:
            counted, nbytes = counted + header.numel(), nbytes + header.numel() * max(4, header.itemsize)
        if not plain:
            width = header.shape[-1]
            contexts += names * (width**2 if config.matrix in ("rotation", "dense") else width)
    whole, whole_bytes = _elements(sup.base), size(sup.base)
    return Storage(
        model_numbers=whole,
        model_bytes=whole_bytes,
        numbers=counted + contexts + (0 if soup else whole),
        nbytes=nbytes + each * contexts + (0 if soup else whole_bytes),
        context_numbers=contexts,
    )


def _elements(tensors: Tensors) -> int:
    return sum(header.numel() for header in headers(tensors).values())


def _count(value: SuperposedDelta) -> int:
    """How many numbers a tensor, or what it was packed to, stands for."""
    if not isinstance(value, Packed):
        return value.numel()
    return math.prod(value.words.shape[:-1]) * value.columns + value.steps.numel()
