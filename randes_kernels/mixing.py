"""What turns columns in place of signs: a rotation, a diagonal of normal numbers, or a dense matrix of them.

    superposed    T = rint(δ / step) R                of whole numbers: exact in fp64, then rounded once
    retrieved     Ŵ = W0 + scale · r ⊙ (D R⁻¹)
    served        y = x W0ᵀ + scale · r ⊙ ((x R⁻ᵀ) Dᵀ)  + b

    rotation      R = Π diag(s_i) P_i H_i             ROUNDS of signs, a permutation, and Hadamard matrices in blocks
    diagonal      R = diag(g)                         of 256 quantiles of the normal distribution
    dense         R = 2^-m G                          (K, K) of the same numbers, 2^m about √K

A rotation's blocks are powers of 4, as many of the largest as fit: H of side 4^k is h ⊗ h with h of side 2^k, so that
its scale 2^-k is exact, and K columns cost K · 2^(k+2) operations in place of K². It is orthogonal to the last bit. It
is not of Haar's distribution, and decorrelates as well (test_mixing.py). Sums of whole numbers times powers of two
are exact in fp64 in any order, and rounding is symmetric: what one machine adds another takes away.

Activations are turned before the product with D, so that no retrieved weight exists here either: O(K · 2^(k+2)) for a
rotation, O(K²) for each model of a dense matrix, whose inverse is in memory for each model. It is computed in fp32 at
least, and rounded to the dtype of x once. The published method's modes are these (RanDeS, arXiv 2505.11204).
"""

import math
from functools import cached_property, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from randes_kernels.format import SIGNS_PER_BLOCK, Matrix, Stream, permutation, random_words, signs
from randes_kernels.hadamard import hadamard

ROUNDS = 2
"""After one, an output is a sum of one block's inputs; after two, of all columns, in blocks of √K and more."""
MAGNITUDES = (
    5, 15, 25, 35, 45, 55, 65, 75, 85, 95, 105, 116, 126, 136, 146, 156, 166, 176, 187, 197, 207, 217, 227, 238, 248,
    258, 269, 279, 290, 300, 311, 321, 332, 342, 353, 363, 374, 385, 396, 406, 417, 428, 439, 450, 461, 472, 484,
    495, 506, 518, 529, 540, 552, 564, 575, 587, 599, 611, 623, 635, 647, 660, 672, 684, 697, 710, 722, 735, 748,
    762, 775, 788, 802, 816, 829, 843, 858, 872, 886, 901, 916, 931, 946, 962, 977, 993, 1009, 1026, 1043, 1060,
    1077, 1094, 1112, 1131, 1149, 1168, 1188, 1208, 1228, 1249, 1270, 1292, 1315, 1338, 1362, 1386, 1412, 1438, 1466,
    1494, 1524, 1555, 1587, 1622, 1658, 1696, 1737, 1781, 1828, 1880, 1937, 2000, 2073, 2157, 2260, 2391, 2581, 2955,
)  # fmt: skip
"""Of a normal number in units of 2^-10: the (i + ½) / 128 quantiles of its magnitude. Written out, because libraries
differ in the last bit of the function; none is zero."""
MAGNITUDE_BITS = 10
RECIPROCAL_UNIT = 2.0**-8
"""What reciprocals of the diagonal are in units of: they lie below 1 then, and activations stay in half precision's
range. It goes into the scale."""
MOST_DENSE_COLUMNS = 4096
"""Of a dense matrix: its inverse takes 64 MiB then, for each model and tensor, and a minute to find."""
AMPLIFIES = {Matrix.SIGNS: 1, Matrix.ROTATION: 1, Matrix.DIAGONAL: 3, Matrix.DENSE: 5}
"""How many times what bounds it before a row's largest number may be: its largest, for signs and a diagonal, or its
length."""


class Rotation(NamedTuple):
    """How B models rotate K columns: ``signs`` (B, ROUNDS, K) int8, and where columns come from and go to, int64."""

    signs: Tensor
    source: Tensor
    target: Tensor

    def turn(self, rows: Tensor) -> Tensor:
        """``rows`` (B, n, K), floats, times R."""
        for number in range(ROUNDS):
            rows = _taken(rows * self.signs[:, number, None], self.source[:, number])
            rows = hadamard(rows)
        return rows

    def back(self, rows: Tensor) -> Tensor:
        """``rows`` (B, n, K) times Rᵀ."""
        for number in reversed(range(ROUNDS)):
            rows = _taken(hadamard(rows), self.target[:, number]) * self.signs[:, number, None]
        return rows


class Mixer:
    """One model's R for one tensor of ``k`` columns, which ``key`` and ``tensor`` make. first: of a shard with a
    diagonal, its first column."""

    def __init__(
        self, key: int, tensor: int, k: int, matrix: int, device: torch.device | str = "cpu", first: int = 0
    ) -> None:
        self._made_of, self._first = (key, tensor, k), first
        self.matrix, self._device = Matrix(matrix), device

    @cached_property
    def _rotation(self) -> Rotation:
        return Rotation(*(part[None].to(self._device) for part in rotation(*self._made_of)))

    @cached_property
    def _values(self) -> Tensor:
        if self.matrix == Matrix.DIAGONAL:
            return diagonal(*self._made_of, self._first).to(self._device)
        return dense(*self._made_of).to(self._device)

    @cached_property
    def _inverse(self) -> Tensor:
        if self.matrix == Matrix.DIAGONAL:
            return 1 / self._values
        return inverse(self._values)

    def turn(self, steps: Tensor) -> Tensor:
        """Whole numbers (n, K), fp64, times R: exact, and not rounded."""
        if self.matrix == Matrix.ROTATION:
            return self._rotation.turn(steps[None])[0]
        return steps * self._values if self.matrix == Matrix.DIAGONAL else steps @ self._values

    def back(self, rows: Tensor) -> Tensor:
        """``rows`` (n, K), fp32 or fp64, times R⁻¹."""
        if self.matrix == Matrix.ROTATION:
            return self._rotation.back(rows[None])[0]
        if self.matrix == Matrix.DIAGONAL:
            return rows * self._inverse.to(rows.dtype)
        return (rows.double() @ self._inverse).to(rows.dtype)  # whose entries are large


def rotation(key: int, tensor: int, k: int) -> Rotation:
    """One model's: (ROUNDS, K) each. Round i takes the i-th whole blocks of signs, and the i-th permutation."""
    padded = padded_columns(k)
    flips = signs(key, tensor, Stream.ROTATION_SIGNS, ROUNDS * padded).view(ROUNDS, padded)[:, :k]
    moves = [
        torch.stack([
            permutation(key, tensor, k, stream=Stream.ROTATION_PERMUTATION, span=number, inverse=inverse)
            for number in range(ROUNDS)
        ])
        for inverse in (True, False)
    ]  # fmt: skip
    return Rotation(flips, *moves)


def padded_columns(k: int) -> int:
    """Columns of a round's signs, in whole blocks."""
    return -(-k // SIGNS_PER_BLOCK) * SIGNS_PER_BLOCK


def diagonal(key: int, tensor: int, k: int, first: int = 0) -> Tensor:
    """``g`` (K,) fp64, of which none is zero, from the ``first`` column on."""
    return _normal(key, tensor, Stream.DIAGONAL, k, first)


def dense(key: int, tensor: int, k: int) -> Tensor:
    """``2^-m G`` (K, K) fp64, with columns of length about 1."""
    return _normal(key, tensor, Stream.DENSE, k * k).view(k, k) * 2.0 ** -(k.bit_length() // 2)


def inverse(matrix: Tensor) -> Tensor:
    """Of a dense matrix, fp64; its pseudo-inverse, where it has none."""
    found, info = torch.linalg.inv_ex(matrix)
    own: Tensor = found if not info.any() else torch.linalg.pinv(matrix)
    return own


def reciprocals() -> Tensor:
    """Of the 256 numbers of a diagonal, by the byte that chooses them: (256,) fp32 of ``RECIPROCAL_UNIT``."""
    return (RECIPROCAL_UNIT / _numbers()).float()


def unit(matrix: int) -> float:
    """What turned activations are in units of: a factor of the scale."""
    return 1 / RECIPROCAL_UNIT if matrix == Matrix.DIAGONAL else 1.0


def inverses_of(keys: list[int], tensor: int, k: int) -> tuple[Tensor, list[float]]:
    """The inverses of J models' dense matrices as activations are multiplied with them, (J, K, K) fp32.

    And the power of two that each is in units of, a factor of the scale: none of them makes a number larger than the
    largest of its row, so that half precision holds it.
    """
    inverses, units = torch.empty(len(keys), k, k, device="cpu"), []
    for number, key in enumerate(keys):
        found = inverse(dense(key, tensor, k))
        longest = float(torch.linalg.matrix_norm(found, 1).maximum(torch.linalg.matrix_norm(found, torch.inf)))
        units.append(2.0 ** math.frexp(longest)[1])
        inverses[number] = found / units[-1]
    return inverses, units


def turned_rows(
    rows: Tensor, keys: tuple[int, ...], tensor: int, matrix: int, *, back: bool = False, first: int = 0
) -> Tensor:
    """Activations (B, n, K) of B models, in ``unit``: times R⁻ᵀ; ``back``: what D's columns have given, times R⁻¹.

    Of a rotation or a diagonal, which may be a shard's from column ``first`` on; ``dense_rows`` are those of a dense
    matrix.
    """
    exact = rows.to(torch.promote_types(rows.dtype, torch.float32))
    k = rows.shape[-1]
    if matrix == Matrix.DIAGONAL:
        exact = exact * torch.stack([_kept_reciprocals(key, tensor, k, first) for key in keys])[:, None].to(exact)
    else:
        own = stacked(keys, tensor, k)
        exact = own.back(exact) if back else own.turn(exact)
    return exact.to(rows.dtype)


def stacked(keys: tuple[int, ...], tensor: int, k: int) -> Rotation:
    """The rotations of B models, (B, ROUNDS, K) each."""
    made = [_kept_rotation(key, tensor, k) for key in keys]
    return Rotation(*(torch.stack(parts) for parts in zip(*made, strict=True)))


def tables_back(keys: list[int], tensor: int, k: int, matrix: int, first: int = 0) -> Tensor:
    """Of J models what ``back_by_tables`` reads: (J, 2, ROUNDS, K) int64 of a rotation, (J, K) fp32 of a diagonal."""
    if matrix == Matrix.ROTATION:
        own = stacked(tuple(keys), tensor, k)
        return torch.stack((own.signs.long(), own.target), 1)
    if matrix == Matrix.DIAGONAL:
        return torch.stack([1 / diagonal(key, tensor, k, first) for key in keys]).float()
    return torch.empty(len(keys), 0, device="cpu")


def back_by_tables(rows: Tensor, ids: Tensor, tables: Tensor, inverses: Tensor | None, matrix: int) -> Tensor:
    """Rows of D (B, n, K), fp32 or fp64, of models ``ids`` (B,), times R⁻¹; or times a dense matrix's ``inverses``."""
    if matrix == Matrix.DIAGONAL:
        return rows * tables[ids][:, None]
    if inverses is not None:
        return dense_rows(rows.flatten(0, 1), ids, inverses, back=True).view(rows.shape)
    flips, target = tables[ids].unbind(1)
    return Rotation(flips.to(rows.dtype), target, target).back(rows)


def amplification(key: int, tensor: int, k: int, matrix: int) -> float:
    """How many times the mean square of a neighbour's delta is that of the noise it leaves in what a model retrieves.

    1 for signs and rotations, which keep lengths. Of a diagonal about 400: its smallest numbers are divided by.
    """
    if matrix == Matrix.DIAGONAL:
        return growth(k, matrix) * float(diagonal(key, tensor, k).square().reciprocal().mean())
    if matrix == Matrix.DENSE:
        return growth(k, matrix) / k * float(inverse(dense(key, tensor, k)).square().sum())
    return 1.0


def growth(k: int, matrix: int) -> float:
    """How many times a delta's mean square is that of the delta times R, in expectation."""
    if matrix == Matrix.DIAGONAL:
        return float(_numbers().square().mean())
    if matrix == Matrix.DENSE:
        return k * float(_numbers().square().mean()) * 4.0 ** -(k.bit_length() // 2)
    return 1.0


def dense_rows(rows: Tensor, ids: Tensor, inverses: Tensor, *, back: bool = False) -> Tensor:
    """As ``turned_rows`` of dense matrices, for the models ``ids`` (B,) of equal runs of rows (M, K).

    inverses: (J, K, K), as ``inverses_of`` makes them. A product with all rows for each model that there is: on a GPU
    which are in a batch is not known without waiting for it. Zero for the base, and NaN for an id that names no model.
    """
    exact = torch.promote_types(rows.dtype, torch.float32)
    runs = rows.to(exact).reshape(len(ids), -1, rows.shape[-1])
    known = (ids >= -1) & (ids < len(inverses))
    turned = torch.where(known, 0.0, torch.nan).to(exact)[:, None, None].expand(runs.shape)
    models = range(len(inverses))
    for model in models if ids.device.type != "cpu" else sorted(set(ids.tolist()) & set(models)):
        matrix = inverses[model].to(exact)
        turned = torch.where((ids == model)[:, None, None], runs @ (matrix if back else matrix.mT), turned)
    return turned.reshape(rows.shape).to(rows.dtype)


def _taken(rows: Tensor, order: Tensor) -> Tensor:
    """Columns of rows (B, n, K) in an order of each, (B, K)."""
    if len(order) == 1:
        return rows.index_select(-1, order[0])
    return rows.gather(-1, order[:, None].expand(rows.shape))


def _normal(key: int, tensor: int, stream: Stream, count: int, first: int = 0) -> Tensor:
    """Number i is chosen by byte ``i % 4`` of word ``i // 4`` of the stream, the lowest first."""
    words = random_words(key, tensor, stream, -(-(first + count) // 4) - first // 4, first // 4)
    chosen = (words[:, None] >> torch.tensor([0, 8, 16, 24], device="cpu")) & 255
    return _numbers()[chosen.flatten()[first % 4 : first % 4 + count]]


@lru_cache
def _numbers() -> Tensor:
    """By byte: its low seven bits choose a magnitude, the high one makes it negative. (256,) fp64."""
    half = torch.tensor(MAGNITUDES, dtype=torch.float64, device="cpu") * 2.0**-MAGNITUDE_BITS
    return torch.cat((half, -half))


# Of 16 models' 256 matrices, which come in turn: with room for fewer each would be made again every time.
_kept_rotation = lru_cache(maxsize=2**12)(rotation)


@lru_cache(maxsize=2**13)
def _kept_reciprocals(key: int, tensor: int, k: int, first: int) -> Tensor:
    return RECIPROCAL_UNIT / diagonal(key, tensor, k, first)
