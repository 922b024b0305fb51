"""What other methods make of a matrix's deltas (rival_methods.py), each form with the name that rows call it by."""

from typing import NamedTuple

import rival_methods as methods
from rival_methods import Method, per_model


class Form(NamedTuple):
    """What a tensor's deltas become. by_tier: three methods, for the third of the matrices of the least variance, the
    next, and the rest."""

    name: str
    method: Method
    by_tier: tuple[Method, ...] = ()


def bits(count: int, rotated: bool = False) -> Form:
    name = f"{count} bit{'s' * (count > 1)}" + ", rotated" * rotated
    return Form(name, per_model(methods.few_bits, bits=count, rotated=rotated))


def of_rank(rank: int, count: int) -> Form:
    return Form(f"rank {rank} in {count} bits", per_model(methods.low_rank, bands=((rank, count),)))


def mixed(*bands: tuple[int, int]) -> Form:
    """(directions, bits) from the loudest on."""
    name = "rank " + " + ".join(str(rank) for rank, _ in bands) + " in " + ", ".join(str(n) for _, n in bands) + " bits"
    return Form(name, per_model(methods.low_rank, bands=bands))


def signs(share: float) -> Form:
    """Sparse ones by row."""
    method = per_model(methods.sparse_signs, share=share, rotated=True, by_row=True)
    return Form(f"{100 * share:g} % of a row, rotated", method)


def dropped(share: float, count: int, rotated: bool = False) -> Form:
    method = per_model(methods.dropped, share=share, bits=count, rotated=rotated)
    return Form(f"{100 * share:g} % in {count} bit{'s' * (count > 1)}" + ", rotated" * rotated, method)


def uneven(share: float, count: int) -> Form:
    """More of what varies more."""
    tiers = tuple(per_model(methods.dropped, share=factor * share, bits=count) for factor in (0.5, 1.0, 1.5))
    return Form(f"{100 * share:g} % in {count} bits, by variance", tiers[1], tiers)


ALONE = {
    "EMR": Form("an elected delta and masks", methods.elected),
    "TALL-masks": Form("the sum and masks", methods.tall_masks),
}
"""Of all models at once, with a mask for each."""


def forms_at(width: int) -> list[tuple[str, Form]]:
    """Methods in the forms that do best on a real model (rivals.py), at sizes from a sixteenth of a bit to two; ranks
    are the same shares of all directions, and so as many bits, at any ``width``."""
    size = width // 128
    ranks = [("SVD", of_rank(rank * size, 4)) for rank in (1, 2, 4, 8, 11, 16, 32)]
    few = [("BitDelta", bits(count, rotated=turned)) for count in (1, 2) for turned in (False, True)]
    bands = ((1, 2, 4), (1, 4, 7), (1, 8, 14), (2, 16, 28))
    come = [("Delta-CoMe", mixed(*zip((size * n for n in ranks), (8, 3, 2), strict=True))) for ranks in bands]
    switch = [("T-Switch", signs(share)) for share in (0.01, 0.02, 0.05, 0.1, 0.2)]
    dare = [("DARE", dropped(share, 1, rotated=True)) for share in (0.125, 0.25, 0.5)]
    return [*few, *ranks, *come, *switch, *dare, *ALONE.items()]
