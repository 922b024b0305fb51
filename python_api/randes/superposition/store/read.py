"""Opening a store."""

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar

from randes.checkpoints.huggingface import CONFIG, is_model_file, read_files
from randes.checkpoints.layout import COORDINATES, DIRECTIONS, STEPS, Layout
from randes.checkpoints.lazy_tensors import Progress, headers, silent, size
from randes.checkpoints.names.conversion import Conversion
from randes.checkpoints.on_disk import Overlay, StoredTensors
from randes.checkpoints.remote.locations import Location, location
from randes.config import Config
from randes.errors import CheckpointError, StoreError
from randes.superposition.added_rows import added_in
from randes.superposition.members import Member
from randes.superposition.packed_tensors import PackedTensors, Packing, SuperposedDelta
from randes.superposition.state import Group, State
from randes.superposition.store.check import check_whole
from randes.superposition.store.contents import group_file, model_file
from randes.superposition.store.files import INDEX_OF_BASE, is_companion, open_tensors, state_of, stored_now
from randes.superposition.store.manifest import MANIFEST, described, digest_of, read_manifest

S = TypeVar("S", bound=State)
_ALTERED = (
    "was altered or is missing: its checksum does not match the manifest. Models answer by what it says; to change it,"
    " change it beside the base and make the store anew"
)
_UNUSABLE = (
    ArithmeticError, AttributeError, AssertionError, LookupError, CheckpointError, RuntimeError, TypeError, ValueError,
)  # fmt: skip
"""What values that no store has may raise."""
TRIES = 100
"""Manifests that are read before files are said to be missing: each was written since the one before."""


def load(kind: type[S], path: str | os.PathLike[str], *, check: bool = True, progress: Progress = silent) -> S:
    """Open a store as a ``kind``, checking every tensor against the manifest and the manifest against itself.

    check: False to check each file's tensors when they are first used. progress: told of each stage and its bytes.
    Raises ``StoreError`` for anything missing, torn, truncated, altered, or of another version.
    """
    folder = location(path)
    manifest = read_manifest(folder)
    for _ in range(TRIES):
        try:
            return _load(kind, folder, manifest, check=check, progress=progress)
        except StoreError:
            # A writer drops the files of the manifest before its own: this one's may have gone while they were opened.
            before, manifest = manifest, read_manifest(folder)
            if manifest["checksum"] == before["checksum"]:
                raise
    return _load(kind, folder, manifest, check=check, progress=progress)


def _load(kind: type[S], folder: Location, manifest: dict[str, Any], *, check: bool, progress: Progress) -> S:
    found = described(folder, manifest)
    stored = stored_now(folder, manifest)  # before they are read: what is written to since is not what was read
    contents = open_tensors(folder, manifest["files"], manifest)
    beside = _companions(folder, manifest)
    if check:
        step = progress("checking", sum(map(size, contents.values())))
        for tensors in contents.values():
            tensors.check(step)
    try:
        superposition = _put_together(kind, manifest, found, contents)
        check_whole(superposition)
    except _UNUSABLE as error:
        raise StoreError(f"{folder / MANIFEST} cannot be used: {error}") from error
    superposition.model_files = {name: text for name, text in beside.items() if not INDEX_OF_BASE.fullmatch(name)}
    superposition.stored, superposition.shard_size = stored, manifest.get("shard_size", 0)
    return superposition


def _companions(folder: Location, manifest: dict[str, Any]) -> dict[str, bytes]:
    """What the manifest names beside the tensors, held to its digests; of a store from before it did, what is there."""
    known: dict[str, str] | None = manifest.get("companions")
    files = {file.name for file in folder.iterdir() if is_companion(file.name) and state_of(file) is not None}
    old = {name for name in files if is_model_file(name)} if CONFIG in files else set()
    names = old if known is None else known.keys()
    for name in names - files:
        raise StoreError(f"{folder / name} {_ALTERED}")
    try:
        found = read_files(folder, sorted(names), links=False)
    except (CheckpointError, OSError) as error:
        raise StoreError(f"{folder} is not whole: {error}") from error
    for name, digest in (known or {}).items():
        if digest_of(found[name]) != digest:
            raise StoreError(f"{folder / name} {_ALTERED}")
    return found


def _put_together(
    kind: type[S], manifest: dict[str, Any], found: tuple[Config, Layout, Packing | None, dict[str, Member]],
    contents: dict[str, StoredTensors],
) -> S:  # fmt: skip
    """The superposition of what a manifest describes and its files hold, by the part of their names before a digest."""
    config, layout, packing, members = found
    stored = contents.pop("base")
    assert stored.known is not None
    base = layout.split(stored)
    known = {**stored.known, **manifest.get("layout", {}).get("digests", {})}
    superposition = kind(
        config, base, manifest["superposed"], {name: known[name] for name in base},
        contents.pop("basis", {}), layout,
    )  # fmt: skip
    superposition.packing = packing
    superposition.to_files = Conversion.from_dict(manifest.get("names", {}))
    superposition.to_files.check(headers(layout.joined(base)))
    for name, member in members.items():
        own = contents.pop(model_file(superposition, name), StoredTensors({}))
        held = {tensor: f"{tensor}{COORDINATES}" for tensor in member.units}
        coordinates: Mapping[str, SuperposedDelta] = own.renamed(held)
        if packing is not None and packing.coordinates < 16:
            held |= {f"{tensor}{STEPS}": f"{stem}{STEPS}" for tensor, stem in held.items()}
            rows = {tensor: headers(base)[tensor].shape[0] for tensor in member.units}
            coordinates = PackedTensors(own.renamed(held), packing.coordinates, 64, rows)
        directions = {stem.removesuffix(DIRECTIONS): stem for stem in own if stem.endswith(DIRECTIONS)}
        added = added_in(own)
        kept = {
            tensor: tensor for tensor in own if tensor not in {*held.values(), *directions.values(), *added.values()}
        }
        superposition.members[name] = replace(
            member, kept=own.renamed(kept), coordinates=coordinates, directions=own.renamed(directions),
            added=own.renamed(added),
        )  # fmt: skip
    superposition.averages = Overlay({}, contents.pop("average")) if "average" in contents else {}
    alone = {group_file(superposition, name): name for name in members}
    if strangers := [stem for stem in contents if not stem.startswith("group-") and stem not in alone]:
        raise ValueError(f"{strangers[0]} is the file of no model in it")
    groups: dict[Group, StoredTensors] = {
        alone[stem] if stem in alone else int(stem.split("-")[1]): held for stem, held in contents.items()
    }
    if packing is None:
        superposition.deltas = {group: Overlay({}, tensors) for group, tensors in groups.items()}
    else:
        columns = {tensor: headers(base)[tensor].shape[1] for tensor in superposition.superposed}
        superposition.few_bits = {
            group: PackedTensors(tensors, *packing.of(isinstance(group, str)), columns)
            for group, tensors in groups.items()
        }
    return superposition
