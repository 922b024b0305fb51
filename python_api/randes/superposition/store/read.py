"""Opening a store."""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from randes.checkpoints.huggingface import model_files
from randes.checkpoints.layout import Layout
from randes.checkpoints.lazy_tensors import Progress, headers, silent, size
from randes.checkpoints.lazy_tensors import described as headers_of
from randes.checkpoints.on_disk import Overlay, StoredTensors
from randes.config import Config
from randes.errors import StoreError
from randes.superposition.members import Member
from randes.superposition.packed_tensors import STEPS, PackedTensors, Packing, SuperposedDelta
from randes.superposition.state import Group, State
from randes.superposition.store.files import open_tensors, stored_now
from randes.superposition.store.manifest import (
    COORDINATES,
    DIRECTIONS,
    MANIFEST,
    described,
    digest_of,
    group_file,
    model_file,
    read_manifest,
)
from randes_kernels import Packed

S = TypeVar("S", bound=State)


def load(kind: type[S], path: str | os.PathLike[str], *, check: bool = True, progress: Progress = silent) -> S:
    """Open a store as a ``kind``, checking every tensor against the manifest and the manifest against itself.

    check: False to check each file's tensors when they are first used. progress: told of each stage and its bytes.
    Raises ``StoreError`` for anything missing, torn, truncated, altered, or of another version.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    found = described(folder, manifest)
    contents: dict[str, StoredTensors] = {
        name.rsplit("-", 1)[0]: open_tensors(folder, name, digests) for name, digests in manifest["files"].items()
    }
    if check:
        step = progress("checking", sum(map(size, contents.values())))
        for tensors in contents.values():
            tensors.check(step)
    try:
        superposition = _put_together(kind, manifest, found, contents)
        _check_whole(superposition)
    except (AttributeError, AssertionError, IndexError, KeyError, TypeError, ValueError) as error:
        raise StoreError(f"{folder / MANIFEST} cannot be used: {error}") from error
    superposition.model_files = model_files(folder)
    for name, known_text in manifest.get("companions", {}).items():
        if name not in superposition.model_files or digest_of(superposition.model_files[name]) != known_text:
            raise StoreError(
                f"{folder / name} was altered or is missing: its checksum does not match the manifest. Models answer by"
                " what it says; to change it, change it beside the base and make the store anew"
            )
    superposition.stored = stored_now(folder, manifest)
    return superposition


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
    for name, member in members.items():
        own = contents.pop(model_file(superposition, name), StoredTensors({}))
        held = {tensor: f"{tensor}{COORDINATES}" for tensor in member.units}
        coordinates: Mapping[str, SuperposedDelta] = own.renamed(held)
        if packing is not None and packing.coordinates < 16:
            held |= {f"{tensor}{STEPS}": f"{stem}{STEPS}" for tensor, stem in held.items()}
            rows = {tensor: headers(base)[tensor].shape[0] for tensor in member.units}
            coordinates = PackedTensors(own.renamed(held), packing.coordinates, 64, rows)
        directions = {stem.removesuffix(DIRECTIONS): stem for stem in own if stem.endswith(DIRECTIONS)}
        kept = {tensor: tensor for tensor in own if tensor not in {*held.values(), *directions.values()}}
        superposition.members[name] = replace(
            member, kept=own.renamed(kept), coordinates=coordinates, directions=own.renamed(directions)
        )
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


def _check_whole(superposition: State) -> None:
    """Raise ``ValueError`` where a model lacks what its record says that it has: it would answer as the base there."""
    for name, member in superposition.members.items():

        def must(right: bool, tensor: str, what: str, name: str = name) -> None:
            if not right:
                raise ValueError(f"model {name!r} must have {what} of {tensor}, which is not there")

        for tensor in member.gains:
            must(tensor in superposition.superposed, tensor, "a superposed delta")
            group = superposition.group_of(name, tensor)
            held = superposition.held.get(group, {})
            packing, unshared = superposition.packing, tensor in superposition.unshared
            if packing is not None and unshared:
                must(tensor in member.directions, tensor, "directions")
                if superposition.in_no_bits(tensor):
                    continue
            must(superposition.place(name, tensor) in held, tensor, f"a superposition in group {group}")
            if packing is not None:
                rows = headers(superposition.base)[tensor].shape[0]
                own = headers_of(held)[superposition.place(name, tensor)]
                must(isinstance(own, Packed) and own.words.shape[:-1] == (rows,), tensor, f"{rows} packed rows")
        for tensor in member.units:
            must(tensor in member.gains and superposition.basis(name, tensor) is not None, tensor, "a basis")
        if superposition.config.others == "keep":
            for tensor in superposition.base.keys() - set(superposition.superposed):
                changed = member.digests[tensor] != superposition.base_digests[tensor]
                must(tensor in member.kept or not changed, tensor, "its own values")
