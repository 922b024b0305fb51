"""The end of a superposed linear: which program sums a tile's parts, whoever comes last, and in what memory."""

from itertools import permutations
from unittest import mock

import pytest
import torch
import triton
import triton.language as tl
from cases import linear_case, retrieved_product
from test_kernels import SMALL, launched

from randes_kernels.kernels import activation_side
from randes_kernels.kernels.reduce import arrives_last, workspace
from randes_kernels.tiles import Plan

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@triton.jit
def arrive_kernel(out_ptr, marks_ptr, tile, part, PARTS: tl.constexpr):
    tl.store(out_ptr, arrives_last(marks_ptr, tile, part, PARTS).to(tl.int32))


def last_of(order: tuple[int, ...], marks: torch.Tensor, tile: int) -> list[bool]:
    """What each program of a tile is told, one after the other."""
    told = []
    for part in order:
        out = torch.zeros(1, dtype=torch.int32, device=DEVICE)
        arrive_kernel[(1,)](out, marks, tile, part, len(order))
        told.append(bool(out))
    return told


@pytest.mark.parametrize("parts", [2, 3, 4])
def test_only_the_last_program_to_arrive_sums_in_any_order(parts: int) -> None:
    marks = torch.randint(-(2**62), 2**62, (3, parts - 1), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    others = marks[[0, 2]].clone()
    for order in permutations(range(parts)):  # in the same memory, as a graph that is replayed
        assert last_of(order, marks, 1) == [False] * (parts - 1) + [True]
        assert not marks[1].any()
    assert torch.equal(marks[[0, 2]], others)


def test_eight_parts_meet_in_three_rounds() -> None:
    marks = torch.full((1, 7), -1, device=DEVICE)
    assert last_of((3, 7, 0, 4, 5, 1, 6, 2), marks, 0) == [False] * 7 + [True]


@pytest.mark.parametrize("parts", [2, 4])
def test_memory_is_taken_as_it_is_found(parts: int) -> None:
    case = linear_case(20, 45, 140, integers=True)
    expected = retrieved_product(case).to(case.x.dtype)
    kept: list[torch.Tensor] = []

    def found(y: torch.Tensor, tiles: int, parts: int) -> torch.Tensor:
        if not kept:
            kept.append(workspace(y, tiles, parts).fill_(float("nan")))
        return kept[0]

    with mock.patch.object(activation_side, "workspace", found):
        for _ in range(2):
            assert torch.equal(launched(case, plan=Plan("activation side", SMALL, parts=parts)), expected)
