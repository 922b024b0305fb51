"""One dial: a store's size, or how much of each fine-tune it keeps, and what is chosen for that.

What is kept is predicted as 100 % less what was lost on SmolLM2-135M (docs/results.md; bench/quality/smollm_kept.py):

    n       =  (J − 1) + J e                            noise in a delta, in units of it (docs/tuning.md, few bits)
    lost %  =  (OF_NOISE n + OF_ITS_SQUARE n² + BIAS[D] / J) · WITHOUT_BASIS + BY_TABLES[embeddings]

J: models to a group. e: what packing D adds, relative to D (``packed_tensors.added_noise``). BIAS is what few bits lose
by one step for columns loud and quiet, which a rotation makes alike. WITHOUT_BASIS is 1 where there is one.

It orders the choices rightly where fine-tunes are like those. How much yours keep only their evaluation tells.
"""

from dataclasses import dataclass, replace

from randes.config import Config
from randes.errors import RandesError
from randes.inspect.plan import packed_sizes, plan
from randes.inspect.shapes import Shaped, with_shapes
from randes.superposition.packed_tensors import added_noise, in_words
from randes.superposition.superposition import Superposition
from randes_kernels import Transform
from randes_kernels.packing import BITS, HALF

OF_NOISE, OF_ITS_SQUARE = 0.05, 0.0015
WITHOUT_BASIS = 1.8
BIAS: dict[float, float] = {8: 0.0, 4: 0.0, 2: 1.0, 1: 2.5}
"""Of D under signs, where one model is in it; several mix loud columns with quiet ones. Half a bit is for rotations."""
ROTATED: dict[float, float] = {1: 0.0, HALF: 0.2}
"""The same after a rotation, and the bits that one is tried for: it turns a decode step's rows, and more bits gain
little by that."""
MOST_ROTATED = 4
"""Models to a group up to which a rotation keeps more in 1 bit: of 8, a sum is near normal as it is."""
BY_TABLES: dict[float, float] = {2: 0.05, 1: 0.15, HALF: 0.15, 0: 0.8}
GROUPS = (1, 2, 4, 8, 16, 32, 64)
WIDE = 4096
"""Columns, of which half a bit adds as much as of any number of whole spans."""
DIRECTIONS = 4
"""Of a matrix, which rank "auto" is taken to find before the models are read: so many in the mean on SmolLM2."""


@dataclass(frozen=True)
class Choice:
    """How to compress and pack: ``compress(base, models, choice.config).pack(**choice.packing)``.

    store: bytes of the whole store, the base included. times: the same in units of one model. kept: %, predicted.
    exact: whether the size is that of a superposition, not an estimate from shapes.
    """

    config: Config
    bits: float
    embeddings: float
    store: int
    times: float
    kept: float
    exact: bool = False

    @property
    def packing(self) -> dict[str, float]:
        """For ``Superposition.pack``."""
        return {"bits": self.bits, "embeddings": self.embeddings}

    def __str__(self) -> str:
        bits, tables = in_words(self.bits), in_words(self.embeddings)
        rotated = " after a rotation" if self.config.matrix == "rotation" else ""
        size = f"{'' if self.exact else 'about '}{self.times:.2f}x one model"
        return (
            f"groups of {self.config.group_size}, rank {self.config.rank}, D in {bits}{rotated}, embeddings in {tables}"
            f" beside their directions: {size}, and {self.kept:.1f} % of the gain kept as predicted from SmolLM2-135M"
        )


@dataclass(frozen=True)
class Wanted:
    """What a store may take, or what it shall keep: one of them.

    budget: at most so many times one model's bytes. memory: at most so many bytes. quality: at least so many %.
    Raises ``ValueError`` for none, for several, and for values out of range.
    """

    budget: float | None = None
    memory: int | None = None
    quality: float | None = None

    def __post_init__(self) -> None:
        given = {name: value for name, value in vars(self).items() if value is not None}
        if len(given) != 1:
            raise ValueError(f"one of budget, memory and quality must be given, got {', '.join(given) or 'none'}")
        for name, value in given.items():
            least, most = {"budget": (1, None), "memory": (0, None), "quality": (0, 100)}[name]
            if not value > least or (most is not None and value >= most):
                until = f" and below {most}" if most else ""
                raise ValueError(f"{name} must be above {least}{until}, got {value}")

    def best(self, choices: list[Choice]) -> Choice:
        """The one that keeps most of those that fit, or the smallest of those that keep enough.

        Raises ``RandesError`` where there is none.
        """
        fits = [choice for choice in choices if self._fits(choice)]
        if fits and self.quality is None:
            return max(fits, key=lambda choice: (choice.kept, -choice.store))
        if fits:
            return min(fits, key=lambda choice: (choice.store, -choice.kept))
        nearest = max(choices, key=lambda c: c.kept) if self.quality else min(choices, key=lambda c: c.store)
        raise RandesError(f"no store is {self}; the nearest has {nearest}")

    def __str__(self) -> str:
        if self.budget is not None:
            return f"within {self.budget:g}x one model"
        return f"within {self.memory} bytes" if self.memory is not None else f"predicted to keep {self.quality:g} %"

    def _fits(self, choice: Choice) -> bool:
        if self.quality is not None:
            return choice.kept >= self.quality
        return choice.store <= self.memory if self.memory is not None else choice.times <= (self.budget or 0)


def choose(
    base: Shaped, models: int, *, budget: float | None = None, memory: int | None = None,
    quality: float | None = None, config: Config | None = None, rotations: bool = True,
) -> Choice:  # fmt: skip
    """Choose configuration and bits for this number of fine-tunes of ``base``: what keeps the most within a size, or
    takes the least for a quality.

    base: as for ``randes.plan``. models: number of fine-tunes.
    budget: largest size of the whole store, the base included, in units of one model.
    memory: the same in bytes.
    quality: least % of the fine-tunes' gain to keep, in the mean, as predicted.
    config: its other options are used; its group size is chosen.
    rotations: whether a rotation may take the place of column signs, if these are the only column transform. It keeps
        more at 1 bit and below, and adds a product with each row of activations.
    Only shapes are read, so it is not known yet how many directions the models need; ``settled`` chooses again.
    Raises ``ValueError`` unless exactly one of the three is given, and ``RandesError`` if no choice fits.
    """
    wanted, config = Wanted(budget, memory, quality), (config or Config()).resolved(together=True)
    base = with_shapes(base)
    ranked = replace(config, rank=DIRECTIONS) if config.rank == "auto" else config
    found = []
    for group in [size for size in GROUPS if size < 2 * models] or GROUPS[:1]:
        chosen = [replace(config, group_size=group)]
        if rotations and config.transform == Transform():
            chosen.append(replace(chosen[0], matrix="rotation"))
        for embeddings in BY_TABLES:
            for row in plan(base, models, replace(ranked, group_size=group), embeddings=embeddings)[1:]:
                found += [
                    Choice(
                        own, row.bits, embeddings, row.store, row.times, predicted(own, models, row.bits, embeddings)
                    )
                    for own in chosen
                    if _tried(own, row.bits)
                ]
    return wanted.best(found)


def settled(superposition: Superposition, wanted: Wanted) -> Choice:
    """The bits that suit models that are superposed already, from sizes as they are. Raises ``RandesError``."""
    config, models = superposition.config, len(superposition.names)
    found = []
    for bits in (bits for bits in BITS if _tried(config, bits)):
        for embeddings in BY_TABLES:
            sizes, kept = packed_sizes(superposition, bits, embeddings), predicted(config, models, bits, embeddings)
            found.append(Choice(config, bits, embeddings, sizes.total, sizes.total / sizes.base, kept, exact=True))
    return wanted.best(found)


def predicted(config: Config, models: int, bits: float, embeddings: float) -> float:
    """% of the gain that is kept, in the mean over fine-tunes like those it was measured on."""
    sharing = min(models, config.group_size)
    noise = sharing - 1 + sharing * added_noise(bits, WIDE)
    bias = (ROTATED if config.matrix == "rotation" else BIAS)[bits] / sharing
    tables = BY_TABLES[embeddings] if config.embeddings == "own" else 0.0
    return (
        100
        - (OF_NOISE * noise + OF_ITS_SQUARE * noise**2 + bias)
        * (1 if config.resolved(together=True).rank else WITHOUT_BASIS)
        - tables
    )


def _tried(config: Config, bits: float) -> bool:
    if config.matrix != "rotation":
        return bits in BIAS
    return bits in ROTATED and (config.group_size <= MOST_ROTATED or bits == HALF)
