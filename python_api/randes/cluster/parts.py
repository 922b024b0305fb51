"""One part of a store: some of the base's tensors, all models' of these, and the files that they make.

Parts know nothing of one another. What couples tensors is within one: layers that are shuffled, matrices of one tensor,
names that are tied (``store/contents.py``).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from randes.checkpoints.huggingface import model_files
from randes.checkpoints.layout import Layout
from randes.checkpoints.lazy_tensors import LazyTensors, Some, digests, headers
from randes.checkpoints.matrices import Matrices, matrices_of
from randes.checkpoints.names.conversion import renamed
from randes.checkpoints.on_disk import open_file
from randes.checkpoints.remote.locations import location
from randes.checkpoints.safetensors import file_size, write_file
from randes.checkpoints.sources import Tensors, combined_digest
from randes.config import Config
from randes.superposition.compress import read_all, together
from randes.superposition.state import State
from randes.superposition.store.contents import files_of, group_file, parts_of, plain_name
from randes.superposition.store.files import altered, state_of
from randes.superposition.store.manifest import record_of
from randes.superposition.superposition import Superposition


@dataclass(frozen=True)
class Job:
    """What all parts of a store have in common, as any machine can read it: paths and addresses. config: resolved."""

    base: str
    models: Mapping[str, str]
    config: Config
    alpha: float
    out: str
    shard_size: int


class Written(NamedTuple):
    """A file of tensors that a part has written: their digests, its size, and what tells when it changes."""

    digests: dict[str, str]
    nbytes: int
    state: tuple[int, int] | None


class Part(NamedTuple):
    """What a manifest has to know of one part. records: of each model, what is said of these tensors."""

    number: int
    config: Config
    base_digests: dict[str, str]
    records: dict[str, dict[str, Any]]
    files: dict[str, Written]


@dataclass(frozen=True)
class Plan:
    """A job whose checkpoints were opened; no tensor was read. sup: over the base, without digests or models."""

    sup: Superposition
    models: dict[str, Tensors]
    config: Config
    parts: dict[str, int]

    @property
    def count(self) -> int:
        """How many parts there are."""
        return max(self.parts.values()) + 1

    def nbytes(self, number: int) -> int:
        """Bytes of the base's tensors of a part, and of all models'."""
        base = headers(self.sup.base)
        own = sum(value.nbytes for name, value in base.items() if self.parts[name] == number)
        return own * (1 + len(self.models))


def planned(job: Job) -> Plan:
    """Open the checkpoints and share the tensors out to parts. Raises as ``randes.compress`` does for checkpoints that
    do not fit, by their shapes."""
    config = job.config
    while True:
        found = matrices_of(job.base, replace(config, centre=False, rank=0))
        sup = _over(found)
        sup.model_files, sup.to_files = model_files(job.base), found.to_files
        models, config = read_all(sup, job.models, config)
        if models:
            return Plan(sup, models, config, parts_of(sup, job.shard_size))


def _over(found: Matrices) -> Superposition:
    return Superposition(
        found.config, found.tensors, found.superposed, dict.fromkeys(headers(found.tensors), ""), layout=found.layout
    )


def made(job: Job, number: int) -> Part:
    """Write a part's files to the job's store, and say what is in them. Doing it again gives the same bytes."""
    plan = planned(job)
    sup, names = plan.sup, {name for name, part in plan.parts.items() if part == number}
    layout = Layout(
        {name: view for name, view in sup.layout.views.items() if name in names},
        {alias: name for alias, name in sup.layout.ties.items() if name in names},
    )
    joined = sup.layout.joined(sup.base, ties=False)
    tensors = layout.split(renamed(joined, {name: name for name in headers(joined) if name in names}))
    superposed = [name for name in sup.superposed if name in names]
    first = Superposition.over(tensors, layout, superposed, sup.config)
    models = {
        name: Some(held, [own for own in headers(held) if plain_name(own) in names])
        for name, held in plan.models.items()
    }
    out, written = location(job.out), dict[str, Written]()

    def put_away(sup: State, name: str, tensor: str) -> LazyTensors:
        """Write a model's own delta of a table, which is a file, before the next model's is made."""
        held = {tensor: sup.deltas[name][tensor]}
        known = digests(held)
        file = f"{group_file(sup, name)}-{combined_digest(known)}.safetensors"
        write_file(out / file, held)
        written[file] = Written(known, file_size(held), state_of(out / file))
        return open_file(out / file, links=False).held_to(known, altered)

    alone = len(first.unshared) == 1
    whole = together(first, models, plan.config, alpha=job.alpha, put_away=put_away if alone else None)
    for name, file in files_of(whole, job.shard_size).items():
        if name in written:
            continue
        write_file(out / name, file.tensors)
        written[name] = Written(file.digests, file.nbytes, state_of(out / name))
    records = {name: record_of(member) for name, member in whole.members.items()}
    return Part(number, whole.config, dict(whole.base_digests), records, written)
