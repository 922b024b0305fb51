"""The choices that fix a superposition when it is created."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from fnmatch import fnmatchcase
from math import prod
from typing import Any, Literal, TypeAlias, get_args

from randes_kernels.format import Matrix, Transform

Signs = Literal["both", "columns", "none"]
Rank: TypeAlias = int | Literal["auto"]
Turning = Literal["signs", "rotation", "diagonal", "dense"]
Gains = Literal["own", "shared"]
Origin = Literal["base", "zero"]
Embeddings = Literal["own", "shared", "keep"]
Others = Literal["keep", "base", "average", "sum"]
Chooses: TypeAlias = Callable[[str, tuple[int, ...]], bool]
"""Of a tensor's name and shape, whether it is superposed."""
TABLES = ("*embed*", "*wte*", "*wpe*", "*shared.weight")
"""Names of tables of embeddings."""
LARGE_TABLE = 1 << 16
"""Elements from which on a table is worth superposing."""
LATER = (
    "centre", "rank", "transposed", "fused", "matrix", "gains", "origin", "every", "per_layer", "vectors", "embeddings",
)  # fmt: skip
"""Options that the first version did not have."""
BEFORE: dict[str, Any] = {"embeddings": "shared", "rank": 0}
"""What they were before there was a choice, where that is not their default."""


@dataclass(frozen=True)
class Config:
    """The transform of each delta before they are summed, which tensors are superposed, and what happens to the others.

    signs: which sides of a weight get random signs: "both" (keeps the most, docs/results.md), "columns" or "none".
    permute: granule of the random column permutation, in columns; 0 for no permutation, 1 for single columns.
    shuffle_layers: −1 to permute same-named layers at random for each model, 0 not to; s > 0 to rotate those of the
        i-th model by i · s.
    group_size: how many models share one superposition. Fewer keep more of each model, and take more storage.
    seed: of every sign and permutation, together with the names of models and tensors.
    others: what a model has of the tensors that are not superposed: "keep" its own (exact, stored), "base" the base's,
        "average" the mean over the models, "sum" the base's plus α times the sum of all models' deltas.
    segments: number of equal spans of a weight's columns. The permutation never leaves a span (tensor parallelism).
    include, exclude: shell patterns of tensor names. A matrix is superposed if include matches and exclude does not.
        include may also be a function of name and shape; a superposition then stores the names that it chose.
    min_width: matrices narrower than this on either side (class heads) are not superposed.
    embeddings: how tables of embeddings, and heads tied to them, are stored. "own": each model's delta by itself, which
        ``pack`` stores in few bits. Tables of less than 65536 elements are then kept exactly, and so are all tables
        if ``others`` is not "keep". "shared": superposed like any matrix, which loses the most. "keep": exactly.
    centre: measure deltas from the mean of the fine-tunes instead of from the base, which makes them smaller. The base
        is then one of the superposed models, and all models must be given at once: see ``randes.compress``.
    rank: directions of each matrix's shared basis, in which every model keeps its own delta exactly. 0 for none;
        "auto" for those that hold at least 2 % of the matrix's delta energy, which may be none. None, the default,
        chooses the best: "auto" if all models are given at once (``randes.compress``, ``plan``, ``choose``) and
        the other options allow a basis, 0 if they are added one by one to ``Superposition.create``.
    transposed: patterns of weights that are (K, N), for layers that multiply from the right (Transformers' Conv1D).
        Not needed for a module or a Transformers folder, where the library finds these layers.
    fused: weights that are a concatenation of others. Signs and gains are those of the parts. Gives the rows of each
        part by its name, ``{"*.qkv.weight": {"*.q.weight": 64, "*.k.weight": 64, "*.v.weight": 64}}``. Every ``*``
        stands for the same beginning. The models are then the same whether weights are fused or not.
    matrix: the column transform: "signs", as ``signs`` says, or in their place a random "rotation", a
        "diagonal" of normal numbers, or a "dense" matrix of them (the paper's other modes; docs/paper.md). Row signs
        stay as ``signs`` says.
    gains: "own" to scale every model's delta to one size before they are summed, "shared" to sum them as they are, as
        the paper does.
    origin: what deltas are measured from: the "base", or "zero", which superposes the fine-tuned weights themselves.
        The base's weights are then not stored, and cannot be asked for.
    every: superpose only the n-th, 2n-th, ... of the selected tensors, in the base's order.
    per_layer: whether each tensor has a transform of its own, or all tensors of a model share one.
    vectors: superpose selected biases, norms and other vectors too, as matrices of one row.

    Raises ``ValueError`` for a value out of range. (Design, sections 1, 2 and 6.)
    """

    signs: Signs = "both"
    permute: int = 0
    shuffle_layers: int = 0
    group_size: int = 8
    seed: int = 0
    others: Others = "keep"
    segments: int = 1
    include: tuple[str, ...] | Chooses = ("*weight", "*experts.*proj")
    exclude: tuple[str, ...] = ("*norm*", "*relative*", "*router*", "*.gate.weight")
    min_width: int = 32
    embeddings: Embeddings = "own"
    centre: bool = False
    rank: Rank | None = None
    transposed: tuple[str, ...] = ()
    fused: Mapping[str, Mapping[str, int]] = field(default_factory=dict, hash=False)
    matrix: Turning = "signs"
    gains: Gains = "own"
    origin: Origin = "base"
    every: int = 1
    per_layer: bool = True
    vectors: bool = False

    def __post_init__(self) -> None:
        one_of("signs", self.signs, get_args(Signs))
        one_of("others", self.others, get_args(Others))
        one_of("matrix", self.matrix, get_args(Turning))
        one_of("gains", self.gains, get_args(Gains))
        one_of("origin", self.origin, get_args(Origin))
        one_of("embeddings", self.embeddings, get_args(Embeddings))
        _at_least("shuffle_layers", self.shuffle_layers, -1)
        _at_least("permute", self.permute, 0)
        _at_least("group_size", self.group_size, 1)
        _at_least("segments", self.segments, 1)
        _at_least("min_width", self.min_width, 1)
        _at_least("seed", self.seed, 0)
        if self.rank not in (None, "auto") and (type(self.rank) is not int or self.rank < 0):
            raise ValueError(f"rank must be an integer of at least 0, or 'auto', got {self.rank!r}")
        _at_least("every", self.every, 1)
        for name in ("centre", "per_layer", "vectors"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if self.seed >= 1 << 64:
            raise ValueError(f"seed must be below 2**64, got {self.seed}")
        for name in ("include", "exclude", "transposed"):
            if name == "include" and callable(self.include):
                continue
            if isinstance(getattr(self, name), str):
                raise ValueError(f"{name} must be a tuple of patterns, got the string {getattr(self, name)!r}")
            object.__setattr__(self, name, tuple(getattr(self, name)))
        _check_fused(self.fused)
        self._check_together()

    def _check_together(self) -> None:
        """Raise for options that exclude each other."""
        if self.centre and self.origin == "zero":
            raise ValueError('centre must be False with origin="zero", which measures no deltas; got True')
        if self.matrix != "signs" and self.permute:
            raise ValueError(
                f"permute must be 0 with matrix={self.matrix!r}, which it goes with signs for; got {self.permute}"
            )
        if self.matrix in ("rotation", "dense") and self.segments > 1:
            raise ValueError(
                f"segments must be 1 with matrix={self.matrix!r}, which mixes all columns; got {self.segments}"
            )
        if self.matrix == "dense" and self.rank:
            raise ValueError(
                f'rank must be 0 with matrix="dense": what a pseudo-inverse gives back is many times too large to be'
                f" taken off again in the directions of a basis; got {self.rank}"
            )

    @property
    def included(self) -> tuple[str, ...]:
        """The patterns of ``include``; of a function what it is called."""
        return (str(self.include),) if callable(self.include) else self.include

    @property
    def transform(self) -> Transform:
        """The same choices as the kernels take them."""
        matrix = Matrix[self.matrix.upper()]
        column_signs = self.signs != "none" and matrix == Matrix.SIGNS
        return Transform(self.signs == "both", column_signs, self.permute, self.segments, int(matrix))

    def resolved(self, *, together: bool) -> "Config":
        """The same with a rank, where that was left open. together: whether all models are at hand at once."""
        if self.rank is not None:
            return self
        possible = together and self.matrix != "dense" and self.origin == "base"
        return replace(self, rank="auto" if possible else 0)

    def selects(self, tensor_name: str, shape: tuple[int, ...]) -> bool:
        """Whether a tensor of this name and shape is superposed, with others' or unshared."""
        if not (len(shape) == 2 or (self.vectors and len(shape) == 1)) or min(shape) < self.min_width:
            return False
        if any(fnmatchcase(tensor_name, pattern) for pattern in self.exclude):
            return False
        if self.embeddings != "shared" and is_embedding(tensor_name) and not self._superposes_table(prod(shape)):
            return False
        if callable(self.include):
            return bool(self.include(tensor_name, shape))
        return any(fnmatchcase(tensor_name, pattern) for pattern in self.include)

    def _superposes_table(self, elements: int) -> bool:
        return self.embeddings != "keep" and self.others == "keep" and elements >= LARGE_TABLE

    def is_unshared(self, tensor_name: str) -> bool:
        """Whether what is superposed of this name is each model's alone."""
        return self.embeddings == "own" and is_embedding(tensor_name)

    def to_dict(self) -> dict[str, Any]:
        """For the manifest: an option that came later only where it is used, so that older versions read the rest.

        Raises ``ValueError`` where ``include`` is a function, which a superposition has made names of.
        """
        if callable(self.include):
            raise ValueError("include must be a tuple of patterns to be written down, got a function")
        values, plain = asdict(self.resolved(together=False)), asdict(Config(**BEFORE))
        return {name: value for name, value in values.items() if name not in LATER or value != plain[name]}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Config":
        """From a manifest, where what is left out is what it was before there was a choice.

        Raises ``ValueError`` for an unknown name.
        """
        return cls.from_choices({**BEFORE, **values})

    @classmethod
    def from_choices(cls, values: Mapping[str, Any]) -> "Config":
        """From options by name; raises ``ValueError`` for an unknown one."""
        unknown = set(values) - {field.name for field in fields(cls)}
        if unknown:
            raise ValueError(f"config must hold known names only, got {sorted(unknown)}")
        return cls(**values)


def _check_fused(fused: object) -> None:
    if not isinstance(fused, Mapping):
        raise ValueError(f"fused must map patterns to the rows of their parts by name, got {fused!r}")
    for pattern, parts in fused.items():
        if not isinstance(parts, Mapping) or len(parts) < 2:
            raise ValueError(f"fused must name at least two parts of {pattern!r}, got {parts!r}")
        for name in (pattern, *parts):
            if not isinstance(name, str) or not name.startswith("*") or set(name[1:]) & set("*?["):
                raise ValueError(f"fused must have names that begin with * and hold no other wildcard, got {name!r}")
        for name, rows in parts.items():
            _at_least(f"fused[{pattern!r}][{name!r}]", rows, 1)


def is_embedding(tensor_name: str) -> bool:
    """Whether a tensor is a table of embeddings, by its name, as ``Config.embeddings`` means it."""
    return any(fnmatchcase(tensor_name, pattern) for pattern in TABLES)


def one_of(name: str, value: object, allowed: tuple[object, ...]) -> None:
    """Raise ``ValueError`` for a value that is none of those allowed."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def _at_least(name: str, value: object, least: int) -> None:
    if type(value) is not int or value < least:  # nor True, which is 1
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
