"""What each file of a store holds: by kind, and of a kind in one file or in several of a chosen size.

Where files have a size, the tensors are cut into parts, in order of their names, so that of no kind a part's shapes
have more bytes: the base, each group, each model and so on have their own files of each part. Whoever has all models'
tensors of one part can write its files without the others. A tensor stays whole; one that is larger has a file to
itself.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from randes.checkpoints import sources
from randes.checkpoints.layout import ADDED, COORDINATES, DIRECTIONS, RESERVED, STEPS
from randes.checkpoints.lazy_tensors import Some, headers
from randes.checkpoints.on_disk import Overlay, StoredTensors, known_digests
from randes.checkpoints.safetensors import file_size
from randes.checkpoints.sources import Tensors
from randes.superposition.packed_tensors import flattened
from randes.superposition.state import Group, State

UNITS = {
    "": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "kib": 2**10, "mib": 2**20, "gib": 2**30,
    "tib": 2**40,
}  # fmt: skip
_SIZE = re.compile(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]*)\s*")
INTEGERS = 2
"""Bytes of an element of the integers, where they do not need four."""


@dataclass(frozen=True)
class StoreFile:
    """One file of tensors: their digests, and what it takes on the disk, in bytes."""

    tensors: Tensors
    digests: dict[str, str]
    nbytes: int


def bytes_of(size: int | str) -> int:
    """A size of files in bytes: a number, or a text as "2GiB" or "500MB"; 0 for one file of each kind, however large.

    Raises ``ValueError`` for anything else.
    """
    if isinstance(size, str) and (found := _SIZE.fullmatch(size)) and (unit := UNITS.get(found[2].lower())):
        size = int(min(float(found[1]) * unit, 1 << 64))
    if type(size) is not int or not 0 <= size < 1 << 63:
        raise ValueError(f'shard_size must be a number of bytes, or a text as "2GiB", at least 0, got {size!r}')
    return size


def files_of(superposition: State, shard_size: int) -> dict[str, StoreFile]:
    """The files of tensors by name. shard_size: bytes of tensors in each; 0 for one file of each kind."""
    parts = parts_of(superposition, shard_size) if shard_size else {}
    files = {}
    for stem, tensors in contents_of(superposition).items():
        # The base's have just been checked against its bytes.
        digests = superposition.base_digests if tensors is superposition.base else known_digests(tensors)
        for names in _cut(tensors, parts, shard_size) if shard_size else [list(headers(tensors))]:
            some = tensors if len(names) == len(headers(tensors)) else Some(tensors, names)
            own = {name: digests[name] for name in sorted(names)}
            found = StoreFile(some, own, file_size(some))
            files[f"{stem}-{sources.combined_digest(own)}.safetensors"] = found
    return files


def parts_of(superposition: State, shard_size: int) -> dict[str, int]:
    """Of each tensor, under all names that it has in files but for what follows them, the number of its part.

    It depends on the base's shapes alone. What is shuffled among layers stays together.
    """
    parts: dict[str, int] = {}
    number = taken = 0
    for names, nbytes in _units(superposition):
        if taken and taken + nbytes > shard_size:
            number, taken = number + 1, 0
        taken += nbytes
        parts |= dict.fromkeys(names, number)
    return parts


def _units(superposition: State) -> list[tuple[list[str], int]]:
    """The names that cannot be in parts of their own, each tensor with its matrices, and their bytes."""
    base, views = headers(superposition.base), superposition.layout.views
    joined = headers(superposition.layout.joined(superposition.base, ties=False))
    unit_of = {name: [name, *(part for part in views[name].parts if part != name)] if name in views else [name]
               for name in joined}  # fmt: skip
    whole = superposition.layout.parts
    for matrix in superposition.superposed:
        together = {
            id(unit): unit for unit in (unit_of[whole.get(name, name)] for name in superposition.family(matrix))
        }
        if len(together) > 1:
            merged = sorted({name for unit in together.values() for name in unit})
            unit_of |= {name: merged for name in merged if name in joined}
    units = {id(unit): unit for unit in unit_of.values()}.values()

    def nbytes(unit: list[str]) -> int:
        integers = sum(INTEGERS * base[name].numel() for name in unit if name in superposition.superposed)
        return max(integers, sum(joined[name].nbytes for name in unit if name in joined))

    return sorted((sorted(unit), nbytes(unit)) for unit in units)


def _cut(tensors: Tensors, parts: Mapping[str, int], shard_size: int) -> Iterator[list[str]]:
    """The names of each file."""
    by_part: dict[int, list[str]] = {}
    for name in sorted(headers(tensors)):
        by_part.setdefault(parts[plain_name(name)], []).append(name)
    for _, names in sorted(by_part.items()):
        taken, some = 0, list[str]()
        for name in names:
            nbytes = headers(tensors)[name].nbytes
            if some and taken + nbytes > shard_size:
                yield some
                taken, some = 0, []
            taken += nbytes
            some.append(name)
        yield some


def plain_name(name: str) -> str:
    """A tensor's name, without what says which of its values these are."""
    while name.endswith(RESERVED):
        name = name[: name.rindex("@")]
    return name


def contents_of(superposition: State) -> dict[str, Tensors]:
    """What there is of each kind, by the part of its files' names before a digest."""
    base = superposition.layout.joined(superposition.base, ties=False)
    contents: dict[str, Tensors] = {"base": base, "basis": superposition.bases}
    contents |= {group_file(superposition, group): flattened(held) for group, held in superposition.held.items()}
    for name in superposition.served:
        member = superposition.members[name]
        own, coordinates = member.kept, member.coordinates
        if (
            isinstance(own, StoredTensors)
            and isinstance(coordinates, StoredTensors)
            and not (member.directions or member.added)
        ):
            own = Overlay({}, own, coordinates.renamed({f"{tensor}{COORDINATES}": tensor for tensor in coordinates}))
        else:
            held = flattened(coordinates)
            own = {**own, **{_coordinates_in(stem): held[stem] for stem in held}}
            own |= {f"{tensor}{DIRECTIONS}": value for tensor, value in member.directions.items()}
            own |= {f"{tensor}{ADDED}": value for tensor, value in member.added.items()}
        contents[model_file(superposition, name)] = own
    contents["average"] = superposition.averages
    return {stem: contents[stem] for stem in sorted(contents) if contents[stem]}


def _coordinates_in(stem: str) -> str:
    """What a file calls a tensor's coordinates, or their steps."""
    tensor = stem.removesuffix(STEPS)
    return f"{tensor}{COORDINATES}{stem[len(tensor) :]}"


def model_file(superposition: State, name: str) -> str:
    """What a model keeps of its own."""
    return f"model-{_letters(superposition, name)}"


def group_file(superposition: State, group: Group) -> str:
    """A group's superpositions, or the deltas of one model that no other shares."""
    return f"group-{group}" if isinstance(group, int) else f"unshared-{_letters(superposition, group)}"


def _letters(superposition: State, name: str) -> str:
    # A model's name may hold what a file's name may not; its key is as unique.
    return letters_of(superposition.key(name))


def letters_of(key: int) -> str:
    """A model's key as files' names have it."""
    return f"{key & (1 << 64) - 1:016x}"
