"""Format v1 as a source of chance: bijections of every size, balanced signs that are pairwise independent."""

import math
from collections import Counter

import pytest
import torch
from torch import Tensor

from randes_kernels import format as fmt
from randes_kernels.format import Stream, Transform

KEY, OTHER_KEY = fmt.model_key(0, "one"), fmt.model_key(0, "two")
MATRIX, OTHER_MATRIX = fmt.tensor_id("layers.0.weight"), fmt.tensor_id("layers.1.weight")
BITS = 10**7
LARGEST_Z = 4.5
"""A fair source exceeds it once in 147,000 tests; the bits are fixed, so this can only fail after a change."""


def z_score(bits: Tensor) -> float:
    """How far the share of set bits lies from one half, in standard deviations."""
    return abs(int(bits.sum()) - bits.numel() / 2) / (math.sqrt(bits.numel()) / 2)


@pytest.fixture(scope="module")
def bits() -> Tensor:
    return fmt.sign_bits(KEY, MATRIX, Stream.COLUMN_SIGNS, BITS)


def test_signs_are_balanced(bits: Tensor) -> None:
    assert z_score(bits) < LARGEST_Z
    for place in range(128):  # each bit of each word of a block
        assert z_score(bits[place::128]) < LARGEST_Z


@pytest.mark.parametrize(
    ("key", "tensor", "stream"),
    [
        (OTHER_KEY, MATRIX, Stream.COLUMN_SIGNS),
        (KEY, OTHER_MATRIX, Stream.COLUMN_SIGNS),
        (KEY, MATRIX, Stream.ROW_SIGNS),
        (KEY + 1, MATRIX, Stream.COLUMN_SIGNS),
        (KEY, MATRIX + 1, Stream.COLUMN_SIGNS),
    ],
    ids=["models", "tensors", "streams", "neighbouring keys", "neighbouring ids"],
)
def test_signs_are_independent_between(key: int, tensor: int, stream: Stream, bits: Tensor) -> None:
    assert z_score(bits ^ fmt.sign_bits(key, tensor, stream, BITS)) < LARGEST_Z


@pytest.mark.parametrize("distance", [1, 2, 3, 31, 32, 64, 96, 127, 128, 256, 4096])
def test_signs_are_independent_of_their_neighbours(distance: int, bits: Tensor) -> None:
    assert z_score(bits[distance:] ^ bits[:-distance]) < LARGEST_Z


def test_first_signs_are_balanced_over_models_and_tensors() -> None:
    models = [fmt.sign_bits(fmt.model_key(0, f"model {j}"), MATRIX, Stream.ROW_SIGNS, 256) for j in range(1000)]
    tensors = [fmt.sign_bits(KEY, fmt.tensor_id(f"layers.{i}"), Stream.ROW_SIGNS, 256) for i in range(1000)]
    for family in (torch.stack(models), torch.stack(tensors)):
        assert max(z_score(family[:, i]) for i in range(256)) < LARGEST_Z
        assert z_score(family[1:] ^ family[:-1]) < LARGEST_Z


def test_permutations_are_bijections_that_invert_for_every_size() -> None:
    for n in range(1, 2049):
        there = fmt.permutation(KEY, MATRIX, n, stream=Stream.COLUMN_PERMUTATION)
        back = fmt.permutation(KEY, MATRIX, n, stream=Stream.COLUMN_PERMUTATION, inverse=True)
        assert torch.equal(there[back], torch.arange(n)), n
        assert torch.equal(back[there], torch.arange(n)), n


@pytest.mark.parametrize("k", [768, 4096, 11008, 14336, 28672])
def test_permutations_of_real_widths_invert_and_move_nearly_all(k: int) -> None:
    there = fmt.column_permutation(KEY, MATRIX, k, Transform(granule=1))
    back = fmt.column_permutation(KEY, MATRIX, k, Transform(granule=1), inverse=True)
    assert torch.equal(there[back], torch.arange(k))
    assert int((there == torch.arange(k)).sum()) < 10  # a random permutation has one fixed point on average
    # Means of |π(i) − i| and of neighbours' distances are k / 3 for a random permutation.
    for distance in (there - torch.arange(k), there[1:] - there[:-1]):
        assert distance.abs().double().mean().item() == pytest.approx(k / 3, rel=0.05)


@pytest.mark.parametrize("granule", [1, 3, 8, 40])
@pytest.mark.parametrize("segments", [1, 2, 4])
@pytest.mark.parametrize("k", [64, 92, 256])
def test_whole_granules_move_inside_their_segment_and_the_tail_stays(k: int, segments: int, granule: int) -> None:
    transform = Transform(granule=granule, segments=segments)
    there = fmt.column_permutation(KEY, MATRIX, k, transform)
    back = fmt.column_permutation(KEY, MATRIX, k, transform, inverse=True)
    columns, width = torch.arange(k), k // segments
    assert torch.equal(there[back], columns)
    assert torch.equal(back[there], columns)
    assert torch.equal(there // width, columns // width)
    for segment in range(segments):
        within = there[segment * width : (segment + 1) * width] - segment * width
        whole = width // granule * granule
        assert torch.equal(within[whole:], torch.arange(whole, width))
        granules = within[:whole].view(-1, granule)
        assert torch.equal(granules, granules[:, :1] + torch.arange(granule))
        assert (granules[:, 0] % granule == 0).all()


def test_segments_and_streams_and_models_have_permutations_of_their_own() -> None:
    halves = fmt.column_permutation(KEY, MATRIX, 512, Transform(granule=1, segments=2)).view(2, 256)
    others = [
        halves[0],
        halves[1] - 256,
        fmt.permutation(KEY, MATRIX, 256, stream=Stream.LAYER_SHUFFLE),
        fmt.permutation(OTHER_KEY, MATRIX, 256, stream=Stream.COLUMN_PERMUTATION),
        fmt.permutation(KEY, OTHER_MATRIX, 256, stream=Stream.COLUMN_PERMUTATION),
    ]
    for i, one in enumerate(others):
        for other in others[:i]:
            assert int((one == other).sum()) < 10


def test_a_shard_regenerates_its_own_segment() -> None:
    whole = fmt.column_permutation(KEY, MATRIX, 300, Transform(granule=1, segments=3))
    for segment in range(3):
        own = fmt.permutation(KEY, MATRIX, 100, stream=Stream.COLUMN_PERMUTATION, span=segment)
        assert torch.equal(whole[100 * segment : 100 * (segment + 1)] - 100 * segment, own)


@pytest.mark.parametrize("n", [2, 3, 4])
def test_small_permutations_are_uniform(n: int) -> None:
    draws = 100 * math.factorial(n)
    counts = Counter(
        tuple(fmt.permutation(key, MATRIX, n, stream=Stream.COLUMN_PERMUTATION).tolist()) for key in range(draws)
    )
    assert len(counts) == math.factorial(n)
    chi_square = sum((count - 100) ** 2 / 100 for count in counts.values())
    freedom = math.factorial(n) - 1
    assert chi_square < freedom + LARGEST_Z * math.sqrt(2 * freedom)


def test_every_place_is_reached_from_every_place_alike() -> None:
    n, draws = 13, 1300
    counts = torch.zeros(n, n)
    for key in range(draws):
        counts[torch.arange(n), fmt.permutation(key, MATRIX, n, stream=Stream.COLUMN_PERMUTATION)] += 1
    chi_square = float(((counts - draws / n) ** 2 / (draws / n)).sum())
    freedom = (n - 1) ** 2
    assert chi_square < freedom + LARGEST_Z * math.sqrt(2 * freedom)
