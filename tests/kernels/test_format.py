"""Format v1 pinned bit for bit: known answers, an oracle in plain Python, a golden file, fresh processes."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from pathlib import Path
from typing import Any

import pytest
import torch

from randes_kernels import format as fmt
from randes_kernels.format import Stream, Transform

GOLDEN = Path(__file__).parents[1] / "golden" / "format_v1.json"
WORD = 0xFFFFFFFF
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((WORD,) * 4, (WORD,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def plain_philox(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    """Philox4x32-10 on Python integers, from Random123's definition."""
    (a, b, c, d), (k, q) = counter, key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = (p1 >> 32) ^ b ^ k, p1 & WORD, (p0 >> 32) ^ d ^ q, p0 & WORD
        k, q = (k + 0x9E3779B9) & WORD, (q + 0xBB67AE85) & WORD
    return a, b, c, d


def plain_word(key: int, tensor: int, stream: int, place: int) -> int:
    counter = (place // 4, stream, tensor % 2**32, (tensor >> 32) % 2**32)
    return plain_philox(counter, (key % 2**32, (key >> 32) % 2**32))[place % 4]


def plain_permutation(index: int, n: int, round_keys: list[int]) -> int:
    """Where one index goes: eight rounds between quotient and remainder, walking on until inside."""
    bits = 0
    while 4**bits < n:
        bits += 1
    right_size = 2**bits
    left_size = -(-n // right_size)
    while True:
        left, right = index // right_size, index % right_size
        for r, round_key in enumerate(round_keys):
            h = (left if r % 2 else right) ^ round_key
            h = (h ^ (h >> 16)) * 0x85EBCA6B % 2**32
            h = (h ^ (h >> 13)) * 0xC2B2AE35 % 2**32
            h ^= h >> 16
            if r % 2:
                right = (right + h * right_size // 2**32) % right_size
            else:
                left = (left + h * left_size // 2**32) % left_size
        index = left * right_size + right
        if index < n:
            return index


def golden() -> dict[str, Any]:
    """What the golden file holds, recomputed. Writing it anew breaks every superposition on disk.

    It was written once, before the first store, with ``GOLDEN.write_text(json.dumps(golden(), indent=1))``.
    """
    names = [(0, "", ""), (7, "code", "lm_head.weight"), (2**64 - 1, "deutsch/ä", "model.layers.31.mlp.up_proj.weight")]
    pairs = [(fmt.model_key(seed, model), fmt.tensor_id(tensor)) for seed, model, tensor in names]

    def text(numbers: Iterable[Any]) -> str:
        return " ".join(str(int(number)) for number in numbers)

    def sign_text(key: int, tensor: int, stream: Stream, count: int) -> str:
        bits = fmt.sign_bits(key, tensor, stream, count).tolist()
        return f"{sum(bit << i for i, bit in enumerate(bits)):x}"

    key, tensor = pairs[1]
    transforms = [Transform(granule=1), Transform(granule=1, segments=3), Transform(granule=8, segments=2)]
    return {
        "format": fmt.FORMAT_VERSION,
        "names": {f"{seed} {model} {name}": text(pair) for (seed, model, name), pair in zip(names, pairs, strict=True)},
        "signs": {
            f"{pair} {stream.name} {count}": sign_text(*pair, stream, count)
            for pair in pairs
            for stream in list(Stream)[:4]  # later ones are pinned in test_mixing.py
            for count in (1, 31, 128, 300)
        },
        "permutations": {
            f"{n} {span}": text(fmt.permutation(key, tensor, n, stream=Stream.COLUMN_PERMUTATION, span=span))
            for n in (1, 2, 3, 16, 77, 256, 300)
            for span in (0, 1, 5)
        },
        "columns": {
            text(transform[:4]): text(fmt.column_permutation(key, tensor, 150, transform)) for transform in transforms
        },
        "layers": text(fmt.permutation(key, tensor, 36, stream=Stream.LAYER_SHUFFLE)),
    }


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_philox_gives_the_published_answers(counter: Any, key: Any, answer: Any) -> None:
    blocks = torch.tensor([counter[0], counter[0] ^ 1])
    assert tuple(fmt.philox((blocks, *counter[1:]), key)[0].tolist()) == answer
    assert plain_philox(counter, key) == answer


def test_names_become_blake2b_digests() -> None:
    digest = blake2b((258).to_bytes(8, "little") + "modèle".encode(), digest_size=8).digest()
    assert fmt.model_key(258, "modèle") == int.from_bytes(digest, "little", signed=True)
    assert fmt.model_key(0x0102030405060708, "m") == int.from_bytes(
        blake2b(b"\x08\x07\x06\x05\x04\x03\x02\x01m", digest_size=8).digest(), "little", signed=True
    )
    digest = blake2b(b"model.layers.0.self_attn.q_proj.weight", digest_size=8).digest()
    assert fmt.tensor_id("model.layers.0.self_attn.q_proj.weight") == int.from_bytes(digest, "little", signed=True)


@pytest.mark.parametrize("value", [0, 1, -1, 2**63 - 1, -(2**63), 0x123456789ABCDEF0, -0x123456789ABCDEF0])
def test_words_are_the_halves_of_an_integer(value: int) -> None:
    low, high = fmt.words(value)
    assert low + (high << 32) == value % 2**64
    assert max(low, high) <= WORD
    assert min(low, high) >= 0
    for word, signed in zip((low, high), fmt.signed_words(value), strict=True):
        assert -(2**31) <= signed < 2**31
        assert signed % 2**32 == word


@pytest.mark.parametrize("stream", Stream)
@pytest.mark.parametrize("count", [1, 5, 128, 1000])
def test_signs_are_the_bits_of_the_stream_in_order(stream: Stream, count: int) -> None:
    for key, tensor in [(fmt.model_key(3, "a"), fmt.tensor_id("t")), (-1, 2**63 - 1), (2**40, -(2**35))]:
        bits = [plain_word(key, tensor, stream, i // 32) >> (i % 32) & 1 for i in range(count)]
        assert fmt.sign_bits(key, tensor, stream, count).tolist() == bits
        signs = fmt.signs(key, tensor, stream, count)
        assert signs.dtype == torch.int8
        assert signs.tolist() == [-1 if bit else 1 for bit in bits]


@pytest.mark.parametrize("n", [1, 2, 3, 8, 63, 64, 65, 256, 1000])
@pytest.mark.parametrize("span", [0, 3])
def test_a_permutation_is_eight_keyed_feistel_rounds(n: int, span: int) -> None:
    key, tensor = fmt.model_key(1, "p"), fmt.tensor_id("q")
    for stream in (Stream.COLUMN_PERMUTATION, Stream.LAYER_SHUFFLE):
        round_keys = [plain_word(key, tensor, stream, 8 * span + r) for r in range(8)]
        expected = [plain_permutation(i, n, round_keys) for i in range(n)]
        assert fmt.permutation(key, tensor, n, stream=stream, span=span).tolist() == expected


def test_the_golden_file_is_reproduced_exactly() -> None:
    assert golden() == json.loads(GOLDEN.read_text())


FRESH = """
import gc, hashlib, importlib.util, sys
gc.disable()  # importing torch is nearly all that this does
spec = importlib.util.spec_from_file_location("fmt", sys.argv[1])
fmt = importlib.util.module_from_spec(spec)
sys.modules["fmt"] = fmt
spec.loader.exec_module(fmt)
digest = hashlib.sha256()
for seed, model, tensor in ((0, "", ""), (9, "kode", "a.weight"), (2**64 - 1, "ß", "b.weight")):
    pair = fmt.model_key(seed, model), fmt.tensor_id(tensor)
    digest.update(repr(pair).encode())
    for stream in list(fmt.Stream)[:4]:
        digest.update(fmt.signs(*pair, stream, 999).numpy().tobytes())
        digest.update(fmt.permutation(*pair, 321, stream=stream).numpy().tobytes())
    digest.update(fmt.column_permutation(*pair, 300, fmt.Transform(granule=3, segments=4)).numpy().tobytes())
print(digest.hexdigest())
"""
FRESH_DIGEST = "d408daab76263770b1ba0b3f1309f7689eb408e12d0a100bc45663b9aad2baaf"


def test_twenty_fresh_processes_give_the_same_bits() -> None:
    def run(hash_seed: int) -> str:
        environment = {**os.environ, "PYTHONHASHSEED": str(hash_seed), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", FRESH, fmt.__file__]
        return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.strip()

    with ThreadPoolExecutor(2) as pool:
        digests = list(pool.map(run, random.SystemRandom().sample(range(1, 2**32), 20)))
    assert set(digests) == {FRESH_DIGEST}


def test_seeds_outside_of_64_bits_are_refused() -> None:
    for seed in (-1, 2**64):
        with pytest.raises(ValueError, match=f"seed must be an unsigned 64-bit integer, got {seed}"):
            fmt.model_key(seed, "m")
    assert fmt.model_key(2**64 - 1, "m") != fmt.model_key(0, "m")


def test_columns_that_do_not_divide_into_segments_are_refused() -> None:
    with pytest.raises(ValueError, match=r"columns must be a multiple of segments = 3, got 64"):
        fmt.column_permutation(1, 2, 64, Transform(granule=1, segments=3))


def test_columns_that_segments_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="must be a multiple of segments = 3, got 32"):
        fmt.column_permutation(1, 2, 32, Transform(True, True, 1, 3))


@pytest.mark.parametrize("granule", [0, 8])
def test_columns_stay_where_there_is_nothing_to_move(granule: int) -> None:
    """Without a permutation, and where a segment is narrower than what moves together."""
    columns = fmt.column_permutation(1, 2, 12, Transform(granule=granule, segments=2))
    assert columns.tolist() == list(range(12))


@pytest.mark.parametrize("first", [0, 1, 31, 37, 128, 200, 2368])
def test_a_stream_is_the_same_from_any_place_on(first: int) -> None:
    for stream in fmt.Stream:
        whole = fmt.signs(1, 2, stream, 2700)
        assert torch.equal(fmt.signs(1, 2, stream, 300, first), whole[first : first + 300])
        words = fmt.random_words(1, 2, stream, 2700)
        assert torch.equal(fmt.random_words(1, 2, stream, 9, first), words[first : first + 9])
    for granule in (1, 3, 8):
        transform = Transform(granule=granule, segments=9)
        moved = fmt.column_permutation(1, 2, 9 * 37, transform)
        own = transform._replace(segments=4, first_column=2 * 37)
        assert torch.equal(fmt.column_permutation(1, 2, 4 * 37, own) + 2 * 37, moved[2 * 37 : 6 * 37])


PERMUTED = Transform(granule=2, segments=4)


def test_a_shard_of_a_shard_has_the_origin_of_both() -> None:
    whole = Transform()
    shard = fmt.shard_of(whole, (100, 300), range(10, 60), range(37, 237))
    assert fmt.shard_of(shard, (50, 200), range(5, 6), range(3, 9)) == whole._replace(first_row=15, first_column=40)


def test_segments_of_a_shard_are_permuted_as_in_the_whole() -> None:
    whole = fmt.column_permutation(5, 7, 64, PERMUTED)
    shard = fmt.shard_of(PERMUTED, (8, 64), range(8), range(16, 48))
    assert (shard.segments, shard.granule) == (2, 2)
    assert torch.equal(fmt.column_permutation(5, 7, 32, shard) + 16, whole[16:48])


def test_columns_that_no_permutation_moves_can_be_cut_anywhere() -> None:
    shard = fmt.shard_of(Transform(granule=40), (8, 32), range(8), range(3, 7))
    assert shard == Transform(first_column=3)
    assert fmt.column_permutation(5, 7, 4, shard).tolist() == [0, 1, 2, 3]


def test_all_columns_of_a_rotation_and_some_of_its_rows_are_a_shard() -> None:
    rotated = Transform(column_signs=False, matrix=int(fmt.Matrix.ROTATION))
    assert fmt.shard_of(rotated, (8, 32), range(2, 8), range(32)) == rotated._replace(first_row=2)


@pytest.mark.parametrize(
    ("transform", "rows", "columns", "message"),
    [
        (Transform(), range(9), range(8), "rows of a shard must be a range"),
        (Transform(), range(0, 8, 2), range(8), "rows of a shard must be a range"),
        (Transform(), range(8), range(-1, 8), "columns of a shard must be a range"),
        (Transform(column_signs=False, matrix=int(fmt.Matrix.DENSE)), range(8), range(8), "dense cannot be cut"),
        (PERMUTED, range(8), range(12), "can be cut at multiples of 8 alone"),
        (PERMUTED, range(8), range(8, 8), "can be cut at multiples of 8 alone"),
    ],
)
def test_what_is_no_shard_is_refused(transform: Transform, rows: range, columns: range, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fmt.shard_of(transform, (8, 32), rows, columns)


def test_a_shard_that_begins_inside_of_a_segment_is_refused() -> None:
    with pytest.raises(ValueError, match="must begin where a segment of 8 does"):
        fmt.column_permutation(5, 7, 32, PERMUTED._replace(first_column=3))


def test_no_columns_have_no_segments_before_them() -> None:
    assert fmt.segments_before(Transform(first_column=5), 0) == 0
