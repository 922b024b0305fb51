"""The transforms as Triton functions: the same bits as ``format``, regenerated in registers."""

import triton
import triton.language as tl

from randes_kernels import format as fmt

PHILOX_A: tl.constexpr = tl.constexpr(fmt.PHILOX_MULTIPLIERS[0])
PHILOX_B: tl.constexpr = tl.constexpr(fmt.PHILOX_MULTIPLIERS[1])
WEYL_A: tl.constexpr = tl.constexpr(fmt.PHILOX_WEYL[0])
WEYL_B: tl.constexpr = tl.constexpr(fmt.PHILOX_WEYL[1])
PHILOX_ROUNDS: tl.constexpr = tl.constexpr(fmt.PHILOX_ROUNDS)
MIX_A: tl.constexpr = tl.constexpr(fmt.MIX_MULTIPLIERS[0])
MIX_B: tl.constexpr = tl.constexpr(fmt.MIX_MULTIPLIERS[1])
SIGNS_PER_BLOCK: tl.constexpr = tl.constexpr(fmt.SIGNS_PER_BLOCK)
PERMUTATION_ROUNDS: tl.constexpr = tl.constexpr(fmt.PERMUTATION_ROUNDS)


@triton.jit
def split_key(key):
    """The two words of a Philox key held as int64, of any shape."""
    return key.to(tl.uint32), (key >> 32).to(tl.uint32)


@triton.jit
def philox(c0, c1, c2, c3, k0, k1):
    """Philox4x32-10 on uint32 tensors that broadcast together: four words."""
    for _ in tl.static_range(PHILOX_ROUNDS):
        hi0, lo0 = tl.umulhi(c0, tl.full((), PHILOX_A, tl.uint32)), c0 * tl.full((), PHILOX_A, tl.uint32)
        hi1, lo1 = tl.umulhi(c2, tl.full((), PHILOX_B, tl.uint32)), c2 * tl.full((), PHILOX_B, tl.uint32)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = k0 + tl.full((), WEYL_A, tl.uint32), k1 + tl.full((), WEYL_B, tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def block_words(block, stream: tl.constexpr, tensor_lo, tensor_hi, k0, k1):
    """The four words of one block, for every key of ``k0, k1`` (any shape): 128 signs each."""
    zero = k0 * 0
    c0 = zero + tl.cast(block, tl.uint32)
    c1 = zero + tl.full((), stream, tl.uint32)
    return philox(c0, c1, zero + tl.cast(tensor_lo, tl.uint32), zero + tl.cast(tensor_hi, tl.uint32), k0, k1)


@triton.jit
def words_from(first, block, stream: tl.constexpr, tensor_lo, tensor_hi, k0, k1, ORIGIN: tl.constexpr):
    """As ``block_words``, of the 128 signs from index ``first + 128 · block`` on.

    ORIGIN: what is known of ``first``, which may be a shard's, when the kernel is compiled: 0 that it is zero, 1 that
    it is a multiple of 128, 2 nothing. Then the signs lie in two blocks, whose words are shifted together.
    """
    if ORIGIN > 0:
        block += first // SIGNS_PER_BLOCK
    words = block_words(block, stream, tensor_lo, tensor_hi, k0, k1)
    if ORIGIN > 1:
        rest = block_words(block + 1, stream, tensor_lo, tensor_hi, k0, k1)
        words = shifted_words(words, rest, first % SIGNS_PER_BLOCK)
    return words


@triton.jit
def shifted_words(words, rest, offset):
    """The four words of the 128 signs from ``offset`` (below 128) on in two blocks that follow one another."""
    w0, w1, w2, w3 = words
    w4, w5, w6, w7 = rest
    by_two = offset >= 64
    w0, w1, w2 = tl.where(by_two, w2, w0), tl.where(by_two, w3, w1), tl.where(by_two, w4, w2)
    w3, w4, w5 = tl.where(by_two, w5, w3), tl.where(by_two, w6, w4), tl.where(by_two, w7, w5)
    by_one = offset % 64 >= 32
    w0, w1, w2 = tl.where(by_one, w1, w0), tl.where(by_one, w2, w1), tl.where(by_one, w3, w2)
    w3, w4 = tl.where(by_one, w4, w3), tl.where(by_one, w5, w4)
    low = tl.cast(offset % 32, tl.uint32)
    high = 31 - low  # after a shift by one: by 32 none is defined
    return (
        (w0 >> low) | (w1 << 1 << high),
        (w1 >> low) | (w2 << 1 << high),
        (w2 >> low) | (w3 << 1 << high),
        (w3 >> low) | (w4 << 1 << high),
    )


@triton.jit
def unhoisted(value, start):
    """``value``, an integer, in a loop over ``start`` (below 2**30), so that nothing made of it alone leaves the loop.

    Of a key the compiler would compute ten round keys a row ahead of the loop, and hold them in registers all
    through it. It cannot know that what is added here is zero.
    """
    return value ^ (tl.cast(start, tl.int32) >> 30).to(value.dtype)


@triton.jit
def signs_of(words, first, WIDTH: tl.constexpr):
    """Sign bits of WIDTH neighbours of a block from its ``first`` on: ``(KEYS, WIDTH)`` uint32.

    ``words``: the block's four, (KEYS,) uint32 each. WIDTH divides 128, and ``first`` is a multiple of it below 128.
    The words that the neighbours lie in are chosen once a key, not once an element.
    """
    tl.static_assert(WIDTH == 16 or WIDTH == 32 or WIDTH == 64 or WIDTH == 128)
    w0, w1, w2, w3 = words
    index = tl.arange(0, WIDTH)[None, :]  # of neighbours: what is made of it is known when the kernel is compiled
    shift = (index % 32).to(tl.uint32)
    if WIDTH == 128:
        low = tl.where(index < 32, w0[:, None], w1[:, None])
        high = tl.where(index < 96, w2[:, None], w3[:, None])
        return (tl.where(index < 64, low, high) >> shift) & 1
    in_low_half = first < 64
    even, odd = tl.where(in_low_half, w0, w2), tl.where(in_low_half, w1, w3)
    if WIDTH == 64:
        return (tl.where(index < 32, even[:, None], odd[:, None]) >> shift) & 1
    word = tl.where(first % 64 < 32, even, odd)[:, None]
    if WIDTH == 16:
        shift += tl.cast(first % 32, tl.uint32)
    return (word >> shift) & 1


@triton.jit
def tile_signs(
    start, k0, k1, stream: tl.constexpr, tensor_lo, tensor_hi, first, ORIGIN: tl.constexpr, WIDTH: tl.constexpr
):
    """Sign bits of WIDTH neighbours from ``first + start``, one row of the result a key: ``(KEYS, WIDTH)`` uint32.

    ``k0, k1``: (KEYS,) uint32. WIDTH must divide 128 and ``start`` be a multiple of it; ``first`` is any origin, of
    which ``words_from`` knows ORIGIN. One Philox call a key, or two.
    """
    start = tl.cast(start, tl.int32)
    words = words_from(first, start // SIGNS_PER_BLOCK, stream, tensor_lo, tensor_hi, k0, k1, ORIGIN)
    return signs_of(words, start % SIGNS_PER_BLOCK, WIDTH)


@triton.jit
def vector_signs(
    start, k0, k1, stream: tl.constexpr, tensor_lo, tensor_hi, first, ORIGIN: tl.constexpr, WIDTH: tl.constexpr
):
    """As ``tile_signs`` for one key (scalars): ``(WIDTH,)``."""
    keys = tl.full((1,), 0, tl.uint32)
    bits = tile_signs(start, keys + k0, keys + k1, stream, tensor_lo, tensor_hi, first, ORIGIN, WIDTH)
    return tl.reshape(bits, (WIDTH,))


@triton.jit
def vector_bytes(index, k0, k1, stream: tl.constexpr, tensor_lo, tensor_hi):
    """Bytes of a stream for one key (scalars), sixteen of them a block, as ``mixing`` counts them: like ``index``."""
    zero = (index * 0).to(tl.uint32)
    w0, w1, w2, w3 = block_words(index // 16, stream, tensor_lo, tensor_hi, zero + k0, zero + k1)
    place = index // 4 % 4
    word = tl.where(place < 2, tl.where(place == 0, w0, w1), tl.where(place == 2, w2, w3))
    return (word >> (index % 4 * 8).to(tl.uint32)) & 255


@triton.jit
def flip(values, bits):
    """``values`` (integers or floats of any width), negated where the sign bit is set."""
    return tl.where(bits != 0, -values, values)


@triton.jit
def flip_sign_bit(values, bits):
    """As ``flip``, of floats, by one exclusive or an element: for tiles that a matrix product waits for."""
    width: tl.constexpr = values.dtype.primitive_bitwidth
    integer: tl.constexpr = tl.core.get_int_dtype(width, False)
    return (values.to(integer, bitcast=True) ^ (bits.to(integer) << (width - 1))).to(values.dtype, bitcast=True)


@triton.jit
def levels_of(words, plane: tl.constexpr, BITS: tl.constexpr, dtype: tl.constexpr):
    """Packed levels as floats, exact: of 8 bits the words themselves, else those that lie in one plane of the bytes.

    Twice a number and one are set into the low bits of a power of two, and that power is taken off again: three
    instructions, none of them a conversion, which would run at a quarter of their speed. Of half a bit the words are
    ``codes_of`` them, and a level is one with its sign, or zero in the planes that the code does not name.
    """
    if BITS == 8:
        levels = words.to(dtype)
    elif BITS < 1:
        size: tl.constexpr = dtype.primitive_bitwidth
        one: tl.constexpr = 0x3C00 if dtype == tl.float16 else 0x3F80 << (size - 16)
        code = words.to(tl.core.get_int_dtype(size, False))
        levels = tl.where((code & 7) == plane, (code >> 3) << (size - 1) | one, 0).to(dtype, bitcast=True)
    else:
        half: tl.constexpr = 1 << BITS
        wide = words.to(tl.uint32) if dtype == tl.float32 else words.to(tl.uint16)
        # Of the first plane the numbers lie one bit too low, of the others too high.
        doubled = (wide << 1 if plane == 0 else wide >> (plane * BITS - 1)) & (2 * half - 2)
        if dtype == tl.float16:
            levels = (doubled | 0x6401).to(tl.float16, bitcast=True) - (1024.0 + half)
        elif dtype == tl.bfloat16:
            levels = (doubled | 0x4301).to(tl.bfloat16, bitcast=True) - (128.0 + half)
        else:
            levels = (doubled | 0x4B000001).to(tl.float32, bitcast=True) - (8388608.0 + half)
    return levels


@triton.jit
def stored_places(WIDTH: tl.constexpr, BITS: tl.constexpr):
    """Where the words of a plane's ``WIDTH`` columns lie, from the first of their span on: at half a bit each twice."""
    places = tl.arange(0, WIDTH)
    if BITS < 1:
        places = places % (WIDTH // 2)
    return places


@triton.jit
def codes_of(words, WIDTH: tl.constexpr, BITS: tl.constexpr):
    """Words (…, WIDTH) of ``stored_places``; at half a bit the four bits that are each column's group's."""
    codes = words
    if BITS < 1:
        high = tl.arange(0, WIDTH) // (WIDTH // 2)
        codes = (words >> (4 * high[None, :]).to(tl.uint8)) & 15
    return codes


@triton.jit
def mix(value, round_key):
    """The permutation's hash of uint32 values (``format._mix``)."""
    value = value ^ round_key
    value = (value ^ (value >> 16)) * tl.full((), MIX_A, tl.uint32)
    value = (value ^ (value >> 13)) * tl.full((), MIX_B, tl.uint32)
    return value ^ (value >> 16)


@triton.jit
def add_modulo(value, step, size):
    """``(value + step) % size`` for value and step below size."""
    total = value + step
    return tl.where(total >= size, total - size, total)


@triton.jit
def feistel(index, bits, left_size, a0, a1, a2, a3, b0, b1, b2, b3):
    """One pass of the permutation's Feistel network (``format._feistel``) over uint32 indices."""
    right_size = tl.full((), 1, tl.uint32) << bits
    left, right = index >> bits, index & (right_size - 1)
    left = add_modulo(left, tl.umulhi(mix(right, a0), left_size + right * 0), left_size)
    right = add_modulo(right, tl.umulhi(mix(left, a1), right_size + left * 0), right_size)
    left = add_modulo(left, tl.umulhi(mix(right, a2), left_size + right * 0), left_size)
    right = add_modulo(right, tl.umulhi(mix(left, a3), right_size + left * 0), right_size)
    left = add_modulo(left, tl.umulhi(mix(right, b0), left_size + right * 0), left_size)
    right = add_modulo(right, tl.umulhi(mix(left, b1), right_size + left * 0), right_size)
    left = add_modulo(left, tl.umulhi(mix(right, b2), left_size + right * 0), left_size)
    right = add_modulo(right, tl.umulhi(mix(left, b3), right_size + left * 0), right_size)
    return (left << bits) | right


@triton.jit
def permute_columns(
    columns,
    k0,
    k1,
    tensor_lo,
    tensor_hi,
    granule,
    width,
    half_bits,
    first,
    STREAM: tl.constexpr,
    SEGMENTS: tl.constexpr,
):
    """Where each column goes (``format.column_permutation``).

    ``columns``: (WIDTH,) int32. ``k0, k1``: the model's key, scalars. ``granule``: columns moved together;
    ``width``: of a segment; ``half_bits``: ``format.half_bits`` of the granules in a segment. ``first``: the number
    of the first segment's bijection in the stream; a shard's columns are counted from its own first.
    """
    # With one segment its number is a scalar, and so are its eight words of key: two Philox calls in all.
    if SEGMENTS == 1:
        segment = tl.full((), 0, tl.int32)
    else:
        segment = columns // width
        k0, k1 = k0 + (segment * 0).to(tl.uint32), k1 + (segment * 0).to(tl.uint32)
    block = (first + segment) * 2
    a0, a1, a2, a3 = block_words(block, STREAM, tensor_lo, tensor_hi, k0, k1)
    b0, b1, b2, b3 = block_words(block + 1, STREAM, tensor_lo, tensor_hi, k0, k1)
    within = columns - segment * width
    count = tl.cast(width // granule, tl.uint32)
    bits = tl.cast(half_bits, tl.uint32)
    left_size = ((count - 1) >> bits) + 1
    index = (within // granule).to(tl.uint32)
    moves = index < count
    image = feistel(tl.where(moves, index, 0), bits, left_size, a0, a1, a2, a3, b0, b1, b2, b3)
    while tl.max((image >= count).to(tl.int32)) > 0:
        walked = feistel(image, bits, left_size, a0, a1, a2, a3, b0, b1, b2, b3)
        image = tl.where(image >= count, walked, image)
    moved = segment * width + image.to(tl.int32) * granule + within % granule
    return tl.where(moves, moved, columns)
