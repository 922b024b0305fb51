"""The numbers of a report: sizes, cosines of deltas, energy and interference, and what became of each tensor."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import Tensor

from randes.checkpoints.layout import SUPERPOSABLE
from randes.checkpoints.lazy_tensors import Progress, described, headers, silent
from randes.checkpoints.sources import Checkpoint
from randes.config import Config, is_embedding
from randes.inspect.analysis.likeness import layers
from randes.inspect.analysis.retrieval import Retrieval, retrieval
from randes.inspect.analysis.storage import Storage, fusionbench_storage, storage
from randes.inspect.plan import packed_sizes
from randes.inspect.report.cosines import Cosines, of_originals, of_retrieved
from randes.superposition.members import Member, Sizes
from randes.superposition.packed_tensors import Packing, SuperposedDelta
from randes.superposition.reading import read
from randes.superposition.summary import Verification, energy, predicted, ranks, sharing_of, verify
from randes.superposition.superposition import Superposition
from randes_kernels.packing import BITS


@dataclass(frozen=True)
class Cell:
    """One model's delta of one tensor, or of a layer's tensors together.

    energy: ‖δ‖² of what is superposed of it, g² · N · K; where gains are shared, the mean over its group's models.
    size: ‖δ‖² with what the model keeps in a shared basis. predicted, measured: error² of what comes back of it,
    ‖Ŵ − W‖² (``summary.verify``); measured is NaN without its checkpoint.
    """

    energy: float
    size: float
    predicted: float
    measured: float

    def relative(self, error: float) -> float:
        """‖Ŵ − W‖ / ‖W − W0‖."""
        return math.sqrt(error / self.size) if self.size else math.nan

    @classmethod
    def of(cls, cells: Iterable["Cell"]) -> "Cell":
        """Several together."""
        columns = [(cell.energy, cell.size, cell.predicted, cell.measured) for cell in cells]
        return cls(*map(sum, zip(*columns, strict=True))) if columns else cls(0.0, 0.0, 0.0, math.nan)


@dataclass(frozen=True)
class Kind:
    """Tensors whose names differ in numbers alone, of one shape and dtype, and of one fate.

    reason: why they are not superposed; empty where they are. nbytes: of one model's own copies.
    stored: bytes that the store holds of them beside the base. models: how many have their own.
    """

    pattern: str
    tensors: int
    shape: tuple[int, ...]
    dtype: str
    fate: str
    reason: str
    models: int
    nbytes: int
    stored: int


@dataclass(frozen=True)
class Numbers:
    """What a report shows. names: by group, then in alphabetical order. packed: sizes by bits, of ``pack``.

    cosines: before and after with two checkpoints or more; else of what is retrieved. cells: by model and tensor.
    layers: the tensors of each layer. verified, retrieved: of each model with a checkpoint. storage: ours, and
    as FusionBench counts.
    """

    config: Config
    ranks: str
    packing: Packing | None
    names: tuple[str, ...]
    members: Mapping[str, Member]
    sizes: Sizes
    packed: Mapping[float, Sizes]
    cosines: Mapping[str, Cosines]
    cells: Mapping[str, Mapping[str, Cell]]
    layers: Mapping[str, tuple[str, ...]]
    verified: Mapping[str, Verification]
    retrieved: Mapping[str, Retrieval]
    storage: tuple[Storage, Storage]
    kinds: tuple[Kind, ...]

    def layer(self, model: str, layer: str) -> Cell:
        """One model's delta of one layer."""
        own = self.cells[model]
        return Cell.of(own[tensor] for tensor in self.layers[layer] if tensor in own)

    def together(self, model: str) -> Cell:
        """One model's delta of everything that is superposed."""
        return Cell.of(self.cells[model].values())


def measure(
    superposition: Superposition, checkpoints: Mapping[str, Checkpoint], *, progress: Progress = silent
) -> Numbers:
    """What ``write`` shows; raises what it raises."""
    sup = superposition
    names = tuple(sorted(sup.served, key=lambda name: (sup.members[name].group, name)))
    given = {name: checkpoints[name] for name in names if name in checkpoints}
    verified = {name: verify(sup, name, checkpoint, progress=progress) for name, checkpoint in given.items()}
    for name in names:
        sup.check(sup.members[name].group, name, progress=progress)
    return Numbers(
        config=sup.config,
        ranks=ranks(sup),
        packing=sup.packing,
        names=names,
        members={name: sup.members[name] for name in names},
        sizes=sup.sizes,
        packed={bits: packed_sizes(sup, bits) for bits in BITS},
        cosines=_cosines(sup, names, given, progress),
        cells=_cells(sup, names, verified),
        layers=layers(sup.superposed),
        verified=verified,
        retrieved={name: retrieval(sup, name, checkpoint, progress=progress) for name, checkpoint in given.items()},
        storage=(storage(sup), fusionbench_storage(sup)),
        kinds=_kinds(sup),
    )


def _cosines(
    sup: Superposition, names: tuple[str, ...], given: Mapping[str, Checkpoint], progress: Progress
) -> dict[str, Cosines]:
    matrices = sum(headers(sup.base)[tensor].nbytes for tensor in sup.superposed)
    if len(given) >= 2:
        models = {name: read(sup, checkpoint) for name, checkpoint in given.items()}
        step = progress("cosines", 2 * matrices)
        return {
            "before": of_originals(sup, models, turned=False, step=step),
            "after": of_originals(sup, models, turned=True, step=step),
        }
    if len(names) < 2:
        return {}
    step = progress("cosines", matrices)
    return {"retrieved": of_retrieved(sup, names, step=step)}


# -------------------------------------------------------------------- energy and interference


def _cells(
    sup: Superposition, names: tuple[str, ...], verified: Mapping[str, Verification]
) -> dict[str, dict[str, Cell]]:
    """The terms of ``verify``'s prediction tensor by tensor."""
    cells: dict[str, dict[str, Cell]] = {name: {} for name in names}
    for (name, tensor), sharing in sharing_of(sup).items():
        superposed = energy(sup, name, tensor, sharing)
        size, error = predicted(sup, name, tensor, sharing)
        measured = verified[name].tensors[tensor] ** 2 * size if name in verified else math.nan
        cells[name][tensor] = Cell(superposed, size, error, measured)
    return cells


# -------------------------------------------------------------------- what became of each tensor


def _kinds(sup: Superposition) -> tuple[Kind, ...]:
    kept, joint = set(sup.others), "summed" if sup.config.others == "sum" else "averaged"
    found: dict[tuple[str, str, tuple[int, ...], str, str], list[tuple[int, int, int]]] = {}
    for name, header in headers(sup.base).items():
        own = [member for member in sup.members.values() if name in member.gains or name in member.kept]
        if name in sup.superposed:
            fate, reason = "its own delta" if name in sup.unshared else "superposed", ""
            stored = sum(_nbytes(held, name) for held in sup.held.values() if name in held)
            whole = [part for member in sup.members.values() for part in (headers(member.kept), headers(member.added))]
            stored += sum(part[name].nbytes for part in whole if name in part)
        else:
            fate = (joint if name in sup.averages else "kept per model") if name in kept else "shared with the base"
            reason = why_not(sup.config, name, header)
            stored = sum(headers(member.kept)[name].nbytes for member in own)
            stored += headers(sup.averages)[name].nbytes if name in sup.averages else 0
        pattern = re.sub(r"\d+", "*", name)
        key = (fate, pattern, tuple(header.shape), str(header.dtype).removeprefix("torch."), reason)
        found.setdefault(key, []).append((len(own), header.nbytes, stored))
    kinds = []
    for (fate, pattern, shape, dtype, reason), each in found.items():
        models, own_bytes, in_store = zip(*each, strict=True)
        kinds.append(Kind(pattern, len(each), shape, dtype, fate, reason, max(models), sum(own_bytes), sum(in_store)))
    return tuple(kinds)


def why_not(config: Config, name: str, header: Tensor) -> str:
    """Why a tensor is not superposed: the first of ``Config``'s conditions that it does not meet."""
    shape = tuple(header.shape)
    if len(shape) != 2:
        return "not a matrix"
    if header.dtype not in SUPERPOSABLE:
        return f"dtype {str(header.dtype).removeprefix('torch.')}"
    if excluding := next((pattern for pattern in config.exclude if fnmatchcase(name, pattern)), None):
        return f"excluded by {excluding}"
    if is_embedding(name) and config.embeddings != "shared":
        small = config.embeddings == "own" and config.others == "keep"
        return "a small table of embeddings" if small else f"a table of embeddings, {config.embeddings} them"
    if not any(fnmatchcase(name, pattern) for pattern in config.included):
        return f"not matched by include ({', '.join(config.included)})"
    if min(shape) < config.min_width:
        return f"narrower than min_width ({config.min_width})"
    return "not chosen when the store was created"


def _nbytes(held: Mapping[str, SuperposedDelta], name: str) -> int:
    return described(held)[name].nbytes
