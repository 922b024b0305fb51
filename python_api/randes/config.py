"""The choices that fix a superposition when it is created."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

from randes_kernels.format import Transform

Signs = Literal["both", "columns", "none"]
Rank = int | Literal["auto"]
LATER = ("centre", "rank", "transposed", "fused")
"""Options that the first version did not have."""
Others = Literal["keep", "base", "average"]


@dataclass(frozen=True)
class Config:
    """How deltas are turned before they are summed, and what becomes of everything that is not a matrix.

    signs: which sides of a weight are flipped by random signs; "both" keeps the most (docs/method.md).
    permute: granule of the random column permutation in columns; 0 for none, 1 for by element.
    shuffle_layers: −1 to permute same-named layers at random for each model, 0 not to.
    group_size: how many models share one superposition: fewer keep more of each, and store more.
    seed: of every sign and permutation, together with the names of models and tensors.
    others: what a model's other tensors are: "keep" its own (exact, stored), "base" the base's,
        "average" the mean over the models.
    segments: equal spans of a weight's columns that the permutation never leaves (tensor parallelism).
    include, exclude: shell patterns of tensor names; a matrix is superposed if the first match and the second do not.
    min_width: matrices narrower than this on either side (class heads) are not superposed.
    centre: measure deltas from the mean of the fine-tunes instead of from the base, which makes them smaller. The base
        is then one of the superposed models, and all models must be there at once: see ``randes.compress``.
    rank: directions of each matrix's shared basis, in which every model keeps its own delta exactly; 0 for none,
        "auto" for those that hold at least 2 % of the matrix's delta energy, which may be none. All models must be
        there at once here, too.
    transposed: patterns of weights that are (K, N), for layers that multiply from the right (Transformers' Conv1D).
        Where the base is a module, or a Transformers folder, its layers say so themselves.
    fused: weights that are the concatenation of others, which signs and gains come from: the rows of each part by
        its name, ``{"*.qkv.weight": {"*.q.weight": 64, "*.k.weight": 64, "*.v.weight": 64}}``. Every ``*`` stands for
        the same beginning. Fused or not, the models are then the same.

    Raises ``ValueError`` for a value out of range. (Design, sections 1, 2 and 6.)
    """

    signs: Signs = "both"
    permute: int = 0
    shuffle_layers: int = 0
    group_size: int = 8
    seed: int = 0
    others: Others = "keep"
    segments: int = 1
    include: tuple[str, ...] = ("*weight", "*experts.*proj")
    exclude: tuple[str, ...] = (
        "*embed*",
        "*wte*",
        "*wpe*",
        "*norm*",
        "*shared.weight",
        "*relative*",
        "*router*",
        "*.gate.weight",
    )
    min_width: int = 32
    centre: bool = False
    rank: Rank = 0
    transposed: tuple[str, ...] = ()
    fused: Mapping[str, Mapping[str, int]] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        _one_of("signs", self.signs, get_args(Signs))
        _one_of("others", self.others, get_args(Others))
        _one_of("shuffle_layers", self.shuffle_layers, (0, -1))
        _at_least("permute", self.permute, 0)
        _at_least("group_size", self.group_size, 1)
        _at_least("segments", self.segments, 1)
        _at_least("min_width", self.min_width, 1)
        _at_least("seed", self.seed, 0)
        if self.rank != "auto" and (not isinstance(self.rank, int) or self.rank < 0):
            raise ValueError(f"rank must be an integer of at least 0, or 'auto', got {self.rank!r}")
        if not isinstance(self.centre, bool):
            raise ValueError(f"centre must be True or False, got {self.centre!r}")
        if self.seed >= 1 << 64:
            raise ValueError(f"seed must be below 2**64, got {self.seed}")
        for name in ("include", "exclude", "transposed"):
            if isinstance(getattr(self, name), str):
                raise ValueError(f"{name} must be a tuple of patterns, got the string {getattr(self, name)!r}")
            object.__setattr__(self, name, tuple(getattr(self, name)))
        _check_fused(self.fused)

    @property
    def transform(self) -> Transform:
        """The same choices as the kernels take them."""
        return Transform(self.signs == "both", self.signs != "none", self.permute, self.segments)

    def selects(self, tensor_name: str, shape: tuple[int, ...]) -> bool:
        """Whether a tensor of this name and shape is superposed."""
        return (
            len(shape) == 2
            and min(shape) >= self.min_width
            and any(fnmatchcase(tensor_name, pattern) for pattern in self.include)
            and not any(fnmatchcase(tensor_name, pattern) for pattern in self.exclude)
        )

    def to_dict(self) -> dict[str, Any]:
        """For the manifest: an option that came later only where it is used, so that older versions read the rest."""
        values, plain = asdict(self), asdict(Config())
        return {name: value for name, value in values.items() if name not in LATER or value != plain[name]}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Config":
        """From a manifest; raises ``ValueError`` for an unknown name."""
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


def _one_of(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def _at_least(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")


TOGETHER = Config(rank="auto")
"""What is taken where no config is given and all models are at hand: at equal storage a basis keeps more of each than
smaller groups do (docs/method.md). Models that come one by one cannot know one, so ``Config()`` has none."""
