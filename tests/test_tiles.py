"""The choice of a tile: pure, few, and of sizes that the primitives can make signs for."""

from itertools import pairwise

import pytest
import torch

from randes_kernels.tiles import Tile, linear_tile

LAYERS = [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (48, 40), (1, 1)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_arguments_always_give_the_same_tile(dtype: torch.dtype) -> None:
    first = {(m, layer): linear_tile(m, *layer, dtype) for m in (1, 17, 64, 4096) for layer in LAYERS}
    again = {(m, layer): linear_tile(m, *layer, dtype) for m in (4096, 64, 17, 1) for layer in reversed(LAYERS)}
    assert first == again
    assert all(isinstance(tile, Tile) for tile in first.values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("m", range(1, 65))
def test_a_decode_batch_is_one_row_tile(m: int, dtype: torch.dtype) -> None:
    for layer in LAYERS:
        assert linear_tile(m, *layer, dtype).m >= m


@pytest.mark.parametrize("dtype", DTYPES)
def test_sizes_are_what_matrix_instructions_and_sign_blocks_allow(dtype: torch.dtype) -> None:
    for m in range(1, 8193):
        tile = linear_tile(m, 4096, 4096, dtype)
        assert tile.m in (16, 32, 64, 128)
        assert tile.n in (32, 64, 128)  # tile_signs: one Philox block a key
        assert tile.k in (32, 64, 128)
        assert tile.warps in (1, 2, 4, 8)
        assert tile.stages >= 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_few_classes_cover_every_batch_and_grow_with_it(dtype: torch.dtype) -> None:
    for layer in LAYERS:
        tiles = [linear_tile(m, *layer, dtype) for m in range(1, 8193)]
        changes = sum(one != other for one, other in pairwise(tiles))
        assert len(set(tiles)) <= 6
        assert changes == len(set(tiles)) - 1  # each class is one range of batch sizes
        assert all(one.m <= other.m for one, other in pairwise(tiles))


def test_fp16_and_bf16_share_their_tiles() -> None:
    for m in range(1, 300):
        assert linear_tile(m, 4096, 4096, torch.float16) == linear_tile(m, 4096, 4096, torch.bfloat16)
