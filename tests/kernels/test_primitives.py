"""Each Triton function against ``format``, through kernels that do nothing else: bit for bit."""

from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from test_format import KNOWN_ANSWERS
from torch import Tensor

from randes_kernels import format as fmt
from randes_kernels.format import Stream, Transform, half_bits, signed_words
from randes_kernels.kernels.transform import origin_kind
from randes_kernels.primitives import flip, permute_columns, philox, split_key, tile_signs, vector_signs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KEYS = [fmt.model_key(0, "a"), fmt.model_key(0, "b"), -1, 0, 2**63 - 1, -(2**63), 2**31, 2**32]
TENSORS = [fmt.tensor_id("layers.0.weight"), -1, 2**31, 2**40 + 1]


@triton.jit
def philox_kernel(out_ptr, counter_ptr, key_ptr):
    c0, c1 = tl.load(counter_ptr).to(tl.uint32), tl.load(counter_ptr + 1).to(tl.uint32)
    c2, c3 = tl.load(counter_ptr + 2).to(tl.uint32), tl.load(counter_ptr + 3).to(tl.uint32)
    k0, k1 = split_key(tl.load(key_ptr))
    w0, w1, w2, w3 = philox(c0, c1, c2, c3, k0, k1)
    tl.store(out_ptr, w0.to(tl.int64))
    tl.store(out_ptr + 1, w1.to(tl.int64))
    tl.store(out_ptr + 2, w2.to(tl.int64))
    tl.store(out_ptr + 3, w3.to(tl.int64))


@triton.jit
def tile_signs_kernel(
    out_ptr, keys_ptr, start, lo, hi, first, ORIGIN: tl.constexpr,
    STREAM: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    rows = tl.arange(0, KEYS)
    k0, k1 = split_key(tl.load(keys_ptr + rows))
    bits = tile_signs(start, k0, k1, STREAM, lo, hi, first, ORIGIN, WIDTH)
    tl.store(out_ptr + rows[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :], bits.to(tl.int64))


@triton.jit
def vector_signs_kernel(
    out_ptr, k0, k1, start, lo, hi, first, ORIGIN: tl.constexpr, STREAM: tl.constexpr, WIDTH: tl.constexpr
):
    k0, k1 = tl.cast(k0, tl.uint32), tl.cast(k1, tl.uint32)
    bits = vector_signs(start, k0, k1, STREAM, lo, hi, first, ORIGIN, WIDTH)
    tl.store(out_ptr + tl.arange(0, WIDTH), bits.to(tl.int64))


PERMUTATION: tl.constexpr = tl.constexpr(int(Stream.COLUMN_PERMUTATION))


@triton.jit
def permute_kernel(
    out_ptr, k0, k1, lo, hi, K, granule, width, bits, SEGMENTS: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    columns = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    k0, k1 = tl.cast(k0, tl.uint32), tl.cast(k1, tl.uint32)
    moved = permute_columns(columns, k0, k1, lo, hi, granule, width, bits, 0, PERMUTATION, SEGMENTS)
    tl.store(out_ptr + columns, moved.to(tl.int64), mask=columns < K)


@triton.jit
def flip_kernel(out_ptr, values_ptr, bits_ptr, WIDTH: tl.constexpr):
    places = tl.arange(0, WIDTH)
    tl.store(out_ptr + places, flip(tl.load(values_ptr + places), tl.load(bits_ptr + places)))


def permuted(key: int, tensor: int, k: int, transform: Transform) -> Tensor:
    """Where the primitive sends each column, in tiles of 128."""
    out = torch.full((k,), -1, device=DEVICE)
    width = k // transform.segments
    bits = half_bits(width // transform.granule)
    permute_kernel[(triton.cdiv(k, 128),)](
        out, *signed_words(key), *signed_words(tensor), k, transform.granule, width, bits, transform.segments, 128
    )
    return out.cpu()


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_philox_gives_the_published_answers(counter: Any, key: Any, answer: Any) -> None:
    out = torch.zeros(4, dtype=torch.int64, device=DEVICE)
    low, high = key
    joined = torch.tensor([low | (high << 32)], dtype=torch.uint64).view(torch.int64)
    philox_kernel[(1,)](out, torch.tensor(counter, device=DEVICE), joined.to(DEVICE))
    assert tuple(out.tolist()) == answer


@pytest.mark.parametrize("width", [32, 64, 128])
@pytest.mark.parametrize("stream", Stream)
@pytest.mark.parametrize("tensor", TENSORS)
def test_a_tile_has_the_signs_of_each_of_its_keys(tensor: int, stream: Stream, width: int) -> None:
    keys = torch.tensor(KEYS, device=DEVICE)
    for start in range(0, 384, width):
        out = torch.full((len(KEYS), width), -1, device=DEVICE)
        tile_signs_kernel[(1,)](out, keys, start, *signed_words(tensor), 0, 0, int(stream), len(KEYS), width)
        expected = [fmt.sign_bits(key, tensor, stream, start + width)[start:].long() for key in KEYS]
        assert torch.equal(out.cpu(), torch.stack(expected))


@pytest.mark.parametrize("width", [16, 32, 64, 128])
@pytest.mark.parametrize("first", [0, 1, 31, 32, 37, 64, 95, 96, 127, 128, 200, 2368])
def test_a_tile_of_a_shard_has_the_signs_from_its_origin_on(first: int, width: int) -> None:
    keys, tensor = torch.tensor(KEYS, device=DEVICE), TENSORS[0]
    for start in range(0, 256, max(width, 64)):
        expected = torch.stack([fmt.sign_bits(key, tensor, Stream.ROW_SIGNS, width, first + start) for key in KEYS])
        for origin in range(origin_kind(first), 3):  # what holds for any number holds for these
            out = torch.full((len(KEYS), width), -1, device=DEVICE)
            tile_signs_kernel[(1,)](
                out, keys, start, *signed_words(tensor), first, origin, int(Stream.ROW_SIGNS), len(KEYS), width
            )
            assert torch.equal(out.cpu(), expected.long())


@pytest.mark.parametrize("width", [32, 64, 128])
@pytest.mark.parametrize("key", KEYS)
def test_a_vector_has_the_signs_of_its_key(key: int, width: int) -> None:
    tensor = TENSORS[0]
    for start in (0, width, 3 * width, 128 * 300 + width):
        out = torch.full((width,), -1, device=DEVICE)
        vector_signs_kernel[(1,)](
            out, *signed_words(key), start, *signed_words(tensor), 0, 0, int(Stream.ROW_SIGNS), width
        )
        expected = fmt.sign_bits(key, tensor, Stream.ROW_SIGNS, start + width)[start:].long()
        assert torch.equal(out.cpu(), expected)


@pytest.mark.parametrize("granule", [1, 3, 8])
@pytest.mark.parametrize("segments", [1, 2, 3])
@pytest.mark.parametrize("k", [48, 150, 258, 768])  # whole, ragged, and walking sizes
def test_columns_go_where_the_format_sends_them(k: int, segments: int, granule: int) -> None:
    transform = Transform(granule=granule, segments=segments)
    for key, tensor in zip(KEYS[:3], TENSORS, strict=False):
        assert torch.equal(permuted(key, tensor, k, transform), fmt.column_permutation(key, tensor, k, transform))


@pytest.mark.parametrize("k", [*range(1, 34), 127, 129, 1000, 4096])
def test_columns_of_any_number_go_where_the_format_sends_them(k: int) -> None:
    transform = Transform(granule=1)
    assert torch.equal(
        permuted(KEYS[0], TENSORS[0], k, transform), fmt.column_permutation(KEYS[0], TENSORS[0], k, transform)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int32, torch.int16])
def test_flip_negates_where_the_bit_is_set(dtype: torch.dtype) -> None:
    values = torch.arange(-16, 16).to(dtype)
    bits = torch.tensor([0, 1] * 16)
    out = torch.empty_like(values, device=DEVICE)
    flip_kernel[(1,)](out, values.to(DEVICE), bits.to(DEVICE), 32)
    assert torch.equal(out.cpu(), torch.where(bits == 1, -values, values))
