"""Format v1: what a seed and a name mean, bit for bit. Everything random in randes comes from here.

A superposition stores no signs and no permutations; it regenerates them from names. The functions below
are therefore a file format: changing one silently destroys every store written before. Golden files in
``tests/golden`` pin them. (Design, section 3.)

    model key   64-bit BLAKE2b of (seed as 8 little-endian bytes, model name)     keys Philox
    tensor id   64-bit BLAKE2b of the canonical tensor name                       counter words 2 and 3
    stream      what the bits are for                                             counter word 1
    block       index // 128                                                      counter word 0

Everything runs in plain torch integer arithmetic on the CPU; ``primitives`` makes the same bits inside kernels.
"""

from enum import IntEnum
from functools import lru_cache
from hashlib import blake2b
from typing import NamedTuple

import torch
from torch import Tensor

FORMAT_VERSION = 1
SIGNS_PER_BLOCK = 128
"""One Philox call makes four 32-bit words: the signs of 128 neighbours."""
PERMUTATION_ROUNDS = 8
"""Feistel rounds of the keyed bijection: one word of key each, two Philox blocks in all."""

PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
PHILOX_WEYL = (0x9E3779B9, 0xBB67AE85)
PHILOX_ROUNDS = 10
MIX_MULTIPLIERS = (0x85EBCA6B, 0xC2B2AE35)
"""The avalanche of the permutation's round function (the 32-bit finalizer of MurmurHash3)."""

_WORD = 0xFFFFFFFF


class Stream(IntEnum):
    """Counter word 1: keeps the uses of one (model, tensor) pair independent of each other."""

    COLUMN_SIGNS = 0
    ROW_SIGNS = 1
    COLUMN_PERMUTATION = 2
    LAYER_SHUFFLE = 3
    DIAGONAL = 4
    ROTATION_SIGNS = 5
    ROTATION_PERMUTATION = 6
    DENSE = 7


class Matrix(IntEnum):
    """What turns the columns of a delta, from the right: random signs, or what ``mixing`` makes."""

    SIGNS = 0
    ROTATION = 1
    DIAGONAL = 2
    DENSE = 3


class Transform(NamedTuple):
    """Which random transform turns a delta ``(N, K)`` before it is summed.

    ``row_signs``, ``column_signs``: whether rows and columns are flipped.
    ``granule``: columns that a permutation moves together; 0 for no permutation, 1 for one by element.
    ``segments``: equal spans of the K columns that the permutation never leaves, so that a
    tensor-parallel shard can regenerate its own part.
    ``matrix``: a ``Matrix``'s number, which torch.compile traces where older ones trace no enumeration; with any but
    signs there are no column signs and no permutation.
    ``first_row``, ``first_column``: the origin of a shard, where what is turned is a rectangle of a larger matrix: its
    first row and column there, any numbers. ``segments`` are those of its own columns then; ``shard_of`` makes both.
    """

    row_signs: bool = True
    column_signs: bool = True
    granule: int = 0
    segments: int = 1
    matrix: int = 0
    first_row: int = 0
    first_column: int = 0


def model_key(seed: int, name: str) -> int:
    """The Philox key of a model: a function of the superposition's seed and of the model's name alone.

    Returns a signed 64-bit integer (the digest's bits), which a torch int64 tensor can hold.
    Raises ``ValueError`` for a seed that is not an unsigned 64-bit integer.
    """
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"seed must be an unsigned 64-bit integer, got {seed}")
    return _digest(seed.to_bytes(8, "little") + name.encode())


def tensor_id(name: str) -> int:
    """The counter words of a tensor: a function of its canonical (unfused) name, as a signed 64-bit integer."""
    return _digest(name.encode())


def words(value: int) -> tuple[int, int]:
    """The low and the high 32-bit word of a signed 64-bit integer, both unsigned."""
    return value & _WORD, (value >> 32) & _WORD


@lru_cache(maxsize=4096)
def signed_words(value: int) -> tuple[int, int]:
    """The same two words as signed integers: what a 32-bit kernel argument holds."""
    low, high = words(value)
    return low - ((low >> 31) << 32), high - ((high >> 31) << 32)


def philox(counter: tuple[Tensor, int, int, int], key: tuple[int, int]) -> Tensor:
    """Philox4x32-10 (Random123) at many values of counter word 0.

    ``counter``: word 0 as an int64 tensor ``(B,)`` of unsigned 32-bit values, words 1 to 3 as ints.
    ``key``: two unsigned 32-bit words. Returns ``(B, 4)`` int64 of unsigned 32-bit words.
    """
    c0 = counter[0]
    c1, c2, c3 = (torch.full_like(c0, word) for word in counter[1:])
    k0, k1 = key
    for _ in range(PHILOX_ROUNDS):
        hi0, lo0 = _multiply(c0, PHILOX_MULTIPLIERS[0])
        hi1, lo1 = _multiply(c2, PHILOX_MULTIPLIERS[1])
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + PHILOX_WEYL[0]) & _WORD, (k1 + PHILOX_WEYL[1]) & _WORD
    return torch.stack((c0, c1, c2, c3), dim=-1)


def random_words(key: int, tensor: int, stream: Stream, count: int, first: int = 0) -> Tensor:
    """``count`` 32-bit words of a stream from the ``first`` on, as ``(count,)`` int64: four words a block."""
    blocks = torch.arange(first // 4, -(-(first + count) // 4), dtype=torch.int64, device="cpu")
    return philox((blocks, int(stream), *words(tensor)), words(key)).flatten()[first % 4 : first % 4 + count]


def sign_bits(key: int, tensor: int, stream: Stream, count: int, first: int = 0) -> Tensor:
    """``count`` sign bits of a stream from the ``first`` on, as ``(count,)`` bool; True means −1.

    Element i is bit ``i % 32`` of word ``(i // 32) % 4`` of block ``i // 128``.
    """
    word = first // 32
    stream_words = random_words(key, tensor, stream, -(-(first + count) // 32) - word, word)
    bits = (stream_words[:, None] >> torch.arange(32, device="cpu")) & 1
    return bits.flatten()[first % 32 : first % 32 + count].bool()


def signs(key: int, tensor: int, stream: Stream, count: int, first: int = 0) -> Tensor:
    """``count`` signs of a stream from the ``first`` on, as ``(count,)`` int8 of ±1."""
    return 1 - 2 * sign_bits(key, tensor, stream, count, first).to(torch.int8)


def half_bits(n: int) -> int:
    """How many bits of an index below ``n`` the permutation keeps in its right half: about half of them."""
    return ((n - 1).bit_length() + 1) // 2


def permutation(key: int, tensor: int, n: int, *, stream: Stream, span: int = 0, inverse: bool = False) -> Tensor:
    """A keyed bijection of ``range(n)``: where each index goes, as ``(n,)`` int64.

    It can be computed at any index alone, in both directions, without a table. An index is split into a
    left part below ``ceil(n / 2**b)`` and a right part of ``b = half_bits(n)`` bits; eight Feistel rounds add a
    keyed hash of one part to the other (modulo the part's size). Where the two parts span more than n values,
    an index that lands outside walks on until it is inside; it never has to for n a multiple of ``2**b``, which
    the widths of real models are.

    ``span`` numbers the bijections of one stream: each takes its own eight words of key.
    ``inverse``: where each index comes from.
    """
    round_keys = random_words(key, tensor, stream, PERMUTATION_ROUNDS * (span + 1))[-PERMUTATION_ROUNDS:].tolist()
    image = _feistel(torch.arange(n, device="cpu"), n, round_keys, inverse)
    while (outside := image >= n).any():
        image = torch.where(outside, _feistel(image, n, round_keys, inverse), image)
    return image


def column_permutation(key: int, tensor: int, k: int, transform: Transform, *, inverse: bool = False) -> Tensor:
    """Where each of ``k`` columns goes (``inverse``: comes from), as ``(k,)`` int64.

    Each of the transform's segments permutes its own whole granules; the columns after the last whole
    granule of a segment stay where they are. Of a shard, columns are counted from its own first.
    Raises ``ValueError`` where ``k`` is not a multiple of ``segments``, or a shard begins inside of one.
    """
    if k % transform.segments:
        raise ValueError(f"the number of columns must be a multiple of segments = {transform.segments}, got {k}")
    columns = torch.arange(k, device="cpu")
    width, granule = k // transform.segments, transform.granule
    if granule == 0 or granule > width:
        return columns
    before = segments_before(transform, k)
    moved = width // granule * granule
    for segment in range(transform.segments):
        image = permutation(
            key, tensor, width // granule, stream=Stream.COLUMN_PERMUTATION, span=before + segment, inverse=inverse
        )
        start = segment * width
        columns[start : start + moved] = (
            start + (image[:, None] * granule + torch.arange(granule, device="cpu")).flatten()
        )
    return columns


def segments_before(transform: Transform, k: int) -> int:
    """How many segments of the whole matrix lie before a shard of ``k`` columns. Raises ``ValueError`` for a part of
    one."""
    width = k // transform.segments
    if 0 < transform.granule <= width and transform.first_column % width:
        raise ValueError(
            f"a shard of permuted columns must begin where a segment of {width} does, got column"
            f" {transform.first_column}"
        )
    return transform.first_column // width if width else 0


def shard_of(transform: Transform, shape: tuple[int, int], rows: range, columns: range) -> Transform:
    """The transform of a rectangle of a matrix (N, K) that ``transform`` turns whole, or is itself a shard of.

    rows, columns: of the matrix, in steps of 1.
    Raises ``ValueError`` for what lies outside, and for columns that cannot be cut: a rotation and a dense matrix mix
    all of them, and a permutation those of each segment.
    """
    n, k = shape
    for name, part, size in (("rows", rows, n), ("columns", columns, k)):
        if part.step != 1 or not 0 <= part.start <= part.stop <= size:
            raise ValueError(f"{name} of a shard must be a range of those of the matrix, {shape}, got {part}")
    origin = transform.first_row + rows.start, transform.first_column + columns.start
    cut = len(columns) != k
    if cut and transform.matrix in (Matrix.ROTATION, Matrix.DENSE):
        kind = Matrix(transform.matrix).name.lower()
        raise ValueError(f"the {k} columns of a matrix with a {kind} cannot be cut, which mixes all of them; cut rows")
    granule, segments = transform.granule, transform.segments
    if cut and 0 < granule <= k // segments:
        width = k // segments
        if columns.start % width or columns.stop % width or not columns:
            raise ValueError(
                f"{k} columns that are permuted in {segments} segments can be cut at multiples of {width} alone, got"
                f" {columns.start} to {columns.stop}: create the superposition with segments that the shards divide"
            )
        segments = len(columns) // width
    elif cut:
        granule, segments = 0, 1  # nothing moves
    return transform._replace(granule=granule, segments=segments, first_row=origin[0], first_column=origin[1])


def _digest(data: bytes) -> int:
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "little", signed=True)


def _multiply(value: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    # The 64-bit product of two unsigned words wraps in int64 but keeps its bits.
    product = value * multiplier
    return (product >> 32) & _WORD, product & _WORD


def _mix(value: Tensor, round_key: int) -> Tensor:
    # Every intermediate is an unsigned word in an int64.
    value = value ^ round_key
    value = ((value ^ (value >> 16)) * MIX_MULTIPLIERS[0]) & _WORD
    value = ((value ^ (value >> 13)) * MIX_MULTIPLIERS[1]) & _WORD
    return value ^ (value >> 16)


def _feistel(index: Tensor, n: int, round_keys: list[int], inverse: bool) -> Tensor:
    bits = half_bits(n)
    size = -(-n >> bits), 1 << bits  # of the left and of the right part
    parts = [index >> bits, index & (size[1] - 1)]
    for r in reversed(range(PERMUTATION_ROUNDS)) if inverse else range(PERMUTATION_ROUNDS):
        changed = r % 2
        # A hash scaled to the changed part's size: the high word of hash * size.
        step = (_mix(parts[1 - changed], round_keys[r]) * size[changed]) >> 32
        parts[changed] = (parts[changed] + (size[changed] - step if inverse else step)) % size[changed]
    return (parts[0] << bits) | parts[1]
