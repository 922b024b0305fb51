"""How alike tensors and models are, and what a superposition weighs: FusionBench's analysis, for models of any size.

Models are anything ``randes.compress`` takes, and are read a part of a tensor at a time: in memory are two parts, or, of
a singular value decomposition, one matrix. All sums are in fp64. Weights that are alike are not a measure of accuracy.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from randes import checkpoint
from randes.checkpoint import Checkpoint, Tensors
from randes.packed import Held
from randes.streams import LazyTensors, headers, parts, size
from randes.superposition import Superposition
from randes_kernels import Packed

Device = str | torch.device
AT_A_TIME = 1 << 22
"""Elements, of all models together, that one product is made of: 32 MiB in fp64."""
SPARE = 8
"""Directions beyond those asked for that a randomised decomposition keeps, so that the last ones converge too."""
PASSES = 4
"""Subspace iterations: singular values a tenth apart are then told apart to 10⁻⁴."""


def cosine_similarity(first: Tensor, second: Tensor) -> float:
    """Of two tensors of one shape as vectors; 0 where either is zero. Raises ``ValueError`` for other shapes."""
    _same_shape("second", second, first)
    return _Products.of(first, second).cosine


def pairwise_cosines(
    tensors: Sequence[Tensor] | Mapping[str, Checkpoint], names: Iterable[str] | None = None, *, device: Device = "cpu"
) -> Tensor:
    """Cosines of every two: (J, J) fp64, 0 with what is zero.

    tensors: of one shape; or models by name, each as one vector of its floating-point tensors, or of those in ``names``.
    Every part of every tensor is read once and enters one product of all with all. device: where that runs.
    Raises ``ValueError`` for none, or other shapes; ``CheckpointError`` for models that differ in names or shapes.
    """
    if not tensors:
        raise ValueError("tensors must hold at least one tensor or model, got none")
    if isinstance(tensors, Mapping):
        models = [checkpoint.read(model) for model in tensors.values()]
        for model in models[1:]:
            checkpoint.check_fits(model, models[0])
    else:
        for tensor in tensors[1:]:
            _same_shape("tensors", tensor, tensors[0])
        models = [{"": tensor.detach()} for tensor in tensors]
    sums = torch.zeros(len(models), len(models), dtype=torch.float64, device=device)
    for name in _chosen(models[0], names):
        for own in zip(*(parts(model, name) for model in models), strict=True):
            for some in zip(*(part.flatten().split(max(1, AT_A_TIME // len(own))) for part in own), strict=True):
                exact = torch.stack([part.to(device) for part in some]).double()
                sums += exact @ exact.mT
    norms = sums.diagonal().sqrt()
    return (sums / torch.where(norms > 0, norms, torch.inf).outer(norms.clamp(min=1e-300))).clamp(-1, 1).cpu()


@dataclass(frozen=True)
class Likeness:
    """Two tensors: l2 is ‖a − b‖, cosine that of both as vectors, elements how many each has."""

    l2: float
    cosine: float
    elements: int


@dataclass(frozen=True)
class Comparison:
    """Two models: each tensor's likeness by name, and that of all of them as one vector."""

    tensors: Mapping[str, Likeness]
    total: Likeness

    @property
    def mean_cosine(self) -> float:
        """Over the tensors, each counting once whatever its size."""
        return math.fsum(own.cosine for own in self.tensors.values()) / len(self.tensors)

    def layers(self) -> dict[str, float]:
        """The mean cosine of each layer's tensors; a layer is what has one beginning up to its first number."""
        from randes.report.numbers import layers

        return {
            layer: math.fsum(self.tensors[name].cosine for name in names) / len(names)
            for layer, names in layers(self.tensors).items()
        }

    def fusionbench(self) -> dict[str, Any]:
        """Under FusionBench's names, where an l2 is ‖a − b‖ divided by the number of elements."""
        l2 = {name: own.l2 / max(1, own.elements) for name, own in self.tensors.items()}
        return {
            "layerwise_l2": l2,
            "layerwise_cosine_similarity": {name: own.cosine for name, own in self.tensors.items()},
            "total_l2": self.total.l2 / max(1, self.total.elements),
            "average_l2": math.fsum(l2.values()) / len(l2),
            "total_cosine_similarity": self.total.cosine,
            "average_cosine_similarity": self.mean_cosine,
        }


def compare_models(
    first: Checkpoint, second: Checkpoint, names: Iterable[str] | None = None, *, device: Device = "cpu"
) -> Comparison:
    """Two models tensor by tensor and in total. names: those to compare; else every floating-point tensor of ``first``.

    device: where parts are compared. Raises ``CheckpointError`` for models that differ in names, shapes or dtypes, and
    ``ValueError`` for a name that is not there.
    """
    one, other = checkpoint.read(first), checkpoint.read(second)
    checkpoint.check_fits(other, one)
    sums = {name: _Products.over(one, other, name, torch.device(device)) for name in _chosen(one, names)}
    return Comparison({name: own.likeness for name, own in sums.items()}, _Products.sum(sums.values()).likeness)


class _Products(NamedTuple):
    """a·a, b·b, a·b and ‖a − b‖², which is summed by itself: of near tensors the others would cancel."""

    first: float = 0.0
    second: float = 0.0
    both: float = 0.0
    apart: float = 0.0
    elements: int = 0

    @classmethod
    def of(cls, first: Tensor, second: Tensor) -> "_Products":
        a, b = first.detach().double().flatten(), second.detach().double().flatten()
        return cls(float(a @ a), float(b @ b), float(a @ b), float((a - b).square().sum()), a.numel())

    @classmethod
    def over(cls, first: Tensors, second: Tensors, name: str, device: torch.device) -> "_Products":
        return cls.sum(
            cls.of(a.to(device), b.to(device)) for a, b in zip(parts(first, name), parts(second, name), strict=True)
        )

    @classmethod
    def sum(cls, several: Iterable["_Products"]) -> "_Products":
        columns = list(zip(*several, strict=True))
        if not columns:
            return cls()
        return cls(*(math.fsum(column) for column in columns[:4]), sum(columns[4]))  # type: ignore[arg-type]

    @property
    def cosine(self) -> float:
        size = math.sqrt(self.first) * math.sqrt(self.second)
        return max(-1.0, min(1.0, self.both / size)) if size else 0.0

    @property
    def likeness(self) -> Likeness:
        return Likeness(math.sqrt(self.apart), self.cosine, self.elements)


# -------------------------------------------------------------------- singular values


class Chunk(NamedTuple):
    """A run of a matrix's singular directions: u (N, c), s (c,), v (K, c), loudest first."""

    u: Tensor
    s: Tensor
    v: Tensor


@dataclass(frozen=True)
class SubspaceSimilarity:
    """How much of a reference lies in what another matrix has in one run of the reference's singular directions.

    With P the projections onto the run, R the reference and X the other: cosine is that of R and P X P, distance is
    ‖R − P X P‖.
    """

    cosine: float
    distance: float


def svd_partition(
    matrix: Tensor, chunks: int = 3, *, directions: int | None = None, device: Device | None = None
) -> list[Chunk]:
    """The singular value decomposition of ``matrix`` (N, K) in equal runs; the last has what does not divide.

    directions: how many of the loudest are partitioned; all where it is not given. Some are found by subspace iteration
    from a fixed start (Halko, Martinsson and Tropp, arXiv 0909.4061), in ``PASSES`` passes over the matrix
    in place of a whole decomposition. device: where it is computed, in fp32, or fp64 for fp64; else the matrix's own.
    Raises ``ValueError`` for another shape, or more chunks or directions than there are.
    """
    if matrix.dim() != 2:
        raise ValueError(f"matrix must have 2 dimensions, got {tuple(matrix.shape)}")
    most = min(matrix.shape)
    count = most if directions is None else directions
    if not 1 <= count <= most:
        raise ValueError(f"directions must be from 1 to {most}, got {directions}")
    if not 1 <= chunks <= count:
        raise ValueError(f"chunks must be from 1 to {count}, got {chunks}")
    exact = matrix.detach().to(device or matrix.device)
    exact = exact if exact.dtype == torch.float64 else exact.float()
    u, s, v = _loudest(exact, count) if count + SPARE < most else _whole(exact, count)
    width = count // chunks
    ends = [*range(width, width * chunks, width), count]
    return [Chunk(u[:, i:j], s[i:j], v[:, i:j]) for i, j in zip([0, *ends[:-1]], ends, strict=True)]


def subspace_similarity(
    reference: Tensor, other: Tensor, chunks: int = 3, *, directions: int | None = None, device: Device | None = None
) -> list[SubspaceSimilarity]:
    """Of each run of the reference's singular directions; see ``svd_partition`` for the rest.

    ``P X P`` is never made: in the run's own coordinates it is Uᵀ X V, (c, c).
    Raises ``ValueError`` for matrices of different shapes.
    """
    _same_shape("other", other, reference)
    whole, found = float(torch.linalg.vector_norm(reference.detach(), dtype=torch.float64)) ** 2, []
    for u, s, v in svd_partition(reference, chunks, directions=directions, device=device):
        inside = (u.mT @ other.detach().to(u) @ v).double()
        both, size = float((s.double() * inside.diagonal()).sum()), float(inside.square().sum())
        cosine = both / math.sqrt(size * whole) if size and whole else 0.0
        found.append(SubspaceSimilarity(cosine, math.sqrt(max(0.0, whole - 2 * both + size))))
    return found


def _whole(matrix: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, :count], s[:count], vh[:count].mT


def _loudest(matrix: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(matrix.shape[1], count + SPARE, generator=generator, dtype=torch.float64)
    found = start.to(matrix)
    for _ in range(PASSES):
        found = torch.linalg.qr(matrix.mT @ torch.linalg.qr(matrix @ found)[0])[0]
    u, s, vh = torch.linalg.svd(matrix @ found, full_matrices=False)
    return u[:, :count], s[:count], found @ vh[:count].mT


# -------------------------------------------------------------------- storage


@dataclass(frozen=True)
class Storage:
    """Sizes under FusionBench's names. ``storage`` says what is counted.

    gigabytes are 10⁹ bytes. total_gb_original: one model. total_gb_retrieved: all that any of the models is made of.
    nonzero_parameter_count: numbers held for that, of which nonzero_param_count_context are the models' own contexts:
    the matrices that turn their deltas.
    """

    total_param_count_original: int
    total_gb_original: float
    total_gb_retrieved: float
    nonzero_parameter_count: int
    nonzero_param_count_context: int

    def to_dict(self) -> dict[str, float]:
        """As FusionBench's metadata has it."""
        return asdict(self)


def storage(superposition: Superposition) -> Storage:
    """What a store holds, number by number: contexts are regenerated from names, so that a model's is one gain a tensor.

    ``fusionbench_storage`` counts as FusionBench does.
    """
    sup = superposition
    gains = sum(len(member.gains) for member in sup.members.values())
    held: list[Mapping[str, Held]] = [headers(sup.base), headers(sup.averages), headers(sup.bases)]
    held += [tensors.headers if isinstance(tensors, LazyTensors) else tensors for tensors in sup.held.values()]
    for member in sup.members.values():
        held += [headers(member.kept), member.coordinates]
    return Storage(
        total_param_count_original=_elements(sup.base),
        total_gb_original=size(sup.base) / 1e9,
        total_gb_retrieved=(sup.sizes.total + 4 * gains) / 1e9,
        nonzero_parameter_count=sum(_count(value) for tensors in held for value in tensors.values()) + gains,
        nonzero_param_count_context=gains,
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
        total_param_count_original=whole,
        total_gb_original=whole_bytes / 1e9,
        total_gb_retrieved=(nbytes + each * contexts + (0 if soup else whole_bytes)) / 1e9,
        nonzero_parameter_count=counted + contexts + (0 if soup else whole),
        nonzero_param_count_context=contexts,
    )


def _elements(tensors: Tensors) -> int:
    return sum(header.numel() for header in headers(tensors).values())


def _count(value: Held) -> int:
    """How many numbers a tensor, or what it was packed to, stands for."""
    if not isinstance(value, Packed):
        return value.numel()
    return math.prod(value.words.shape[:-1]) * value.columns + value.steps.numel()


def _chosen(model: Tensors, names: Iterable[str] | None) -> list[str]:
    found = headers(model)
    if names is None:
        return [name for name, header in found.items() if header.is_floating_point()]
    chosen = list(names)
    if absent := [name for name in chosen if name not in found]:
        raise ValueError(f"names must be of tensors that the models have, got {absent[0]!r}")
    return chosen


def _same_shape(argument: str, value: Tensor, expected: Tensor) -> None:
    if value.shape != expected.shape:
        raise ValueError(f"{argument} must be of shape {tuple(expected.shape)}, got {tuple(value.shape)}")
