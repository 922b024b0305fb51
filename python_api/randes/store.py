"""A superposition on disk: a folder of safetensors files and one manifest that names and checks them.

    manifest.json                              format version, config, models, files, checksums of every tensor
    base-<digest>.safetensors                  the base model
    basis-<digest>.safetensors                 the shared basis of each tensor, where there is one
    group-<number>-<digest>.safetensors        integers of one group, by tensor
    model-<key>-<digest>.safetensors           what one model keeps of its own
    average-<digest>.safetensors               sums behind others="average"
    config.json, tokenizer...                  what a Transformers base has beside its weights (companions.py)

Files are named by what they hold and never rewritten. A save writes the new ones beside the old, renames the
manifest last, and only then removes what no manifest names: a crash at any moment leaves the old store or the
new one. The bytes depend on the models and their groups alone, not on the order in which they were added.
"""

import fcntl
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

from randes import checkpoint
from randes.checkpoint import Tensors
from randes.companions import companions, for_store, is_companion
from randes.config import Config
from randes.errors import CheckpointError, StoreError
from randes.files import write_file, write_whole
from randes.integers import AVERAGE_STEP, STEP
from randes.layout import Layout
from randes.members import Member, check_scales
from randes.packed import STEPS, Held, PackedTensors, Packing, flattened
from randes.stored import Layers, StoredTensors, known_digests, open_file
from randes.streams import Progress, headers, silent, size
from randes.superposition import Superposition
from randes_kernels import FORMAT_VERSION

MANIFEST = "manifest.json"
COORDINATES = "@basis"
"""Follows a tensor's name in a model's file, for its delta's coordinates in the shared basis."""
_OURS = re.compile(
    r"\.?(base|basis|group-\d+|model-[0-9a-f]{16}|average)-[0-9a-f]{32}\.safetensors(\.\d+\.tmp)?"
    r"|\.manifest\.json\.\d+\.tmp"
)


def save(superposition: Superposition, path: str | os.PathLike[str], *, progress: Progress = silent) -> None:
    """Write the store at ``path``: a folder that is new, empty, or the store that this came from or went to last.

    progress: told of each stage and its bytes. Raises ``StoreError`` for any other folder, and for a store that was
    changed since; ``OSError`` where the disk does not take it. The store is the old one then.
    """
    folder = Path(path)
    superposition.check_base()
    contents = _contents(superposition)
    manifest = _manifest(superposition, contents)
    check_destination(superposition, folder, manifest)
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        check_destination(superposition, folder, manifest)
        known = superposition.stored.files if isinstance(superposition.stored, Stored) else {}
        files = zip(manifest["files"], sorted(contents), strict=True)
        changed = {
            name: contents[stem]
            for name, stem in files
            if (state := _state(folder / name)) is None or known.get(folder / name) != state
        }
        beside = _companions(superposition, manifest["files"])
        new = [folder / name for name in (*changed, *beside) if _state(folder / name) is None]
        step = progress("writing", sum(map(size, changed.values())))
        try:
            for name, tensors in changed.items():
                write_file(folder / name, tensors, step=step)
            for name, text in beside.items():
                write_whole(folder / name, [memoryview(text)])
        except OSError:
            for file in new:  # a full disk is full enough, and no manifest names them
                file.unlink(missing_ok=True)
            raise
        write_whole(folder / MANIFEST, [memoryview(_text(manifest).encode())])
        superposition.stored = _stored(folder, manifest)
        _reopen(superposition, folder, manifest)
        for file in folder.iterdir():
            if _OURS.fullmatch(file.name) and file.name not in manifest["files"]:
                file.unlink()


def load(path: str | os.PathLike[str], *, check: bool = True, progress: Progress = silent) -> Superposition:
    """Open a store, checking every tensor against the manifest and the manifest against itself.

    check: False to check each file's tensors when they are first used. progress: told of each stage and its bytes.
    Raises ``StoreError`` for anything missing, torn, truncated, altered, or of another version.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    config, layout, packing, members = _described(folder, manifest)
    contents: dict[str, StoredTensors] = {
        name.rsplit("-", 1)[0]: _open(folder, name, digests) for name, digests in manifest["files"].items()
    }
    if check:
        step = progress("checking", sum(map(size, contents.values())))
        for tensors in contents.values():
            tensors.check(step)
    stored = contents.pop("base")
    assert stored.known is not None
    base = layout.split(stored)
    known = {**stored.known, **manifest.get("layout", {}).get("digests", {})}
    superposition = Superposition(
        config, base, manifest["superposed"], {name: known[name] for name in base},
        contents.pop("basis", {}), layout,
    )  # fmt: skip
    superposition.packing = packing
    for name, member in members.items():
        own = contents.pop(_model_file(superposition, name), StoredTensors({}))
        held = {tensor: f"{tensor}{COORDINATES}" for tensor in member.units}
        coordinates: Mapping[str, Held] = own.renamed(held)
        if packing is not None and packing.coordinates < 16:
            held |= {f"{tensor}{STEPS}": f"{stem}{STEPS}" for tensor, stem in held.items()}
            rows = {tensor: headers(base)[tensor].shape[0] for tensor in member.units}
            coordinates = PackedTensors(own.renamed(held), packing.coordinates, 64, rows)
        kept = {tensor: tensor for tensor in own if tensor not in held.values()}
        superposition.members[name] = replace(member, kept=own.renamed(kept), coordinates=coordinates)
    superposition.averages = Layers({}, contents.pop("average")) if "average" in contents else {}
    groups = {int(stem.split("-")[1]): tensors for stem, tensors in contents.items()}
    if packing is None:
        superposition.deltas = {number: Layers({}, tensors) for number, tensors in groups.items()}
    else:
        columns = {tensor: headers(base)[tensor].shape[1] for tensor in superposition.superposed}
        superposition.few_bits = {
            number: PackedTensors(tensors, packing.bits, packing.group, columns) for number, tensors in groups.items()
        }
    superposition.companions = companions(folder)
    for name, known_text in manifest.get("companions", {}).items():
        if name not in superposition.companions or _digest(superposition.companions[name]) != known_text:
            raise StoreError(
                f"{folder / name} was altered or is missing: its checksum does not match the manifest. Models answer by"
                " what it says; to change it, change it beside the base and make the store anew"
            )
    superposition.stored = _stored(folder, manifest)
    return superposition


def _open(folder: Path, name: str, digests: dict[str, str]) -> StoredTensors:
    try:
        tensors = open_file(folder / name)
    except (CheckpointError, OSError) as error:
        raise StoreError(f"{folder} is not whole: {error}") from error
    if tensors.keys() != digests.keys():
        raise StoreError(f"{folder / name} must hold {sorted(digests)}, got {sorted(tensors)}")
    return tensors.held_to(digests, _altered)


def _altered(path: Path, tensor: str) -> StoreError:
    return StoreError(f"{path} was altered: the checksum of {tensor} does not match the manifest")


def _reopen(superposition: Superposition, folder: Path, manifest: dict[str, Any]) -> None:
    """Read what came from a store from its new files, so that the old ones' space and what was held come free."""
    for name, digests in manifest["files"].items():
        stem = name.rsplit("-", 1)[0]
        if stem.startswith("group-"):
            group = int(stem.split("-")[1])
            if isinstance(held := superposition.deltas.get(group), Layers) and held.held:
                superposition.deltas[group] = Layers({}, _open(folder, name, digests))
        elif stem == "average" and isinstance(superposition.averages, Layers):
            superposition.averages = Layers({}, _open(folder, name, digests))


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest alone, checked against its own checksum. Raises ``StoreError``."""
    try:
        text = (folder / MANIFEST).read_text(encoding="utf-8")
        manifest = json.loads(text)
    except FileNotFoundError as error:
        raise StoreError(f"{folder} is not a store: it has no {MANIFEST}") from error
    except OSError as error:
        raise StoreError(f"{folder} is not a store: {error}") from error
    except ValueError as error:
        raise StoreError(f"{folder / MANIFEST} is torn: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != "randes":
        raise StoreError(f"{folder / MANIFEST} is not a manifest of randes")
    if manifest.get("version") != FORMAT_VERSION:
        raise StoreError(f"{folder} must be of format version {FORMAT_VERSION}, got {manifest.get('version')}")
    if manifest.get("checksum") != _checksum(manifest) or text != _text(manifest):
        raise StoreError(f"{folder / MANIFEST} was altered: its checksum does not match its content")
    if (manifest["step"], manifest["average_step"]) != (STEP, AVERAGE_STEP):
        raise StoreError(f"{folder} must have steps {STEP} and {AVERAGE_STEP}, got {manifest['step']}")
    return manifest


def _described(folder: Path, manifest: dict[str, Any]) -> tuple[Config, Layout, Packing | None, dict[str, Member]]:
    """What a manifest says of all tensors and of each model, without these. Raises ``StoreError`` for other values."""
    try:
        config = Config.from_dict(manifest["config"])
        layout = Layout.from_dict(manifest["layout"]) if "layout" in manifest else Layout()
        packing = Packing(**manifest["packed"]) if "packed" in manifest else None
        members = {name: Member(**record) for name, record in manifest["models"].items()}
        for name, member in members.items():
            check_scales(name, member)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise StoreError(f"{folder / MANIFEST} cannot be used: {error}") from error
    return config, layout, packing, members


def _contents(superposition: Superposition) -> dict[str, Tensors]:
    """What each file holds, by the part of its name before the digest."""
    base = superposition.layout.joined(superposition.base, ties=False)
    contents: dict[str, Tensors] = {"base": base, "basis": superposition.bases}
    contents |= {f"group-{group}": flattened(held) for group, held in sorted(superposition.held.items())}
    for name in superposition.served:
        member = superposition.members[name]
        own, coordinates = member.kept, member.coordinates
        if isinstance(own, StoredTensors) and isinstance(coordinates, StoredTensors):
            own = Layers({}, own, coordinates.renamed({f"{tensor}{COORDINATES}": tensor for tensor in coordinates}))
        else:
            own = {**own, **flattened({f"{tensor}{COORDINATES}": value for tensor, value in coordinates.items()})}
        contents[_model_file(superposition, name)] = own
    contents["average"] = superposition.averages
    return {stem: tensors for stem, tensors in contents.items() if tensors}


def _manifest(superposition: Superposition, contents: dict[str, Tensors]) -> dict[str, Any]:
    files = {}
    for stem, tensors in sorted(contents.items()):
        # The base's have just been checked against its bytes.
        digests = superposition.base_digests if tensors is superposition.base else known_digests(tensors)
        files[f"{stem}-{checkpoint.combined_digest(digests)}.safetensors"] = dict(sorted(digests.items()))
    manifest = {
        "format": "randes",
        "version": FORMAT_VERSION,
        "config": superposition.config.to_dict(),
        "step": STEP,
        "average_step": AVERAGE_STEP,
        "base": checkpoint.combined_digest(superposition.base_digests),
        "superposed": list(superposition.superposed),
        "models": {name: _record(superposition.members[name]) for name in superposition.served},
        "files": files,
    }
    if layout := superposition.layout:
        split = sorted(part for view in layout.views.values() for part in view.parts)
        own = {part: superposition.base_digests[part] for part in split}
        manifest["layout"] = layout.to_dict() | {"digests": own}
    if superposition.companions:
        manifest["companions"] = {name: _digest(text) for name, text in _companions(superposition, files).items()}
    if superposition.packing is not None:
        manifest["packed"] = asdict(superposition.packing)
    manifest["checksum"] = _checksum(manifest)
    return manifest


def _companions(superposition: Superposition, files: Iterable[str]) -> dict[str, bytes]:
    """The files beside the tensors, as they stand in a store that has these ``files``."""
    base_file = next(name for name in files if name.startswith("base-"))
    return for_store(superposition.companions, base_file)


def _digest(text: bytes) -> str:
    return blake2b(text, digest_size=16).hexdigest()


def checksum_of(superposition: Superposition) -> str:
    """What the manifest of a store of this superposition says of itself."""
    checksum: str = _manifest(superposition, _contents(superposition))["checksum"]
    return checksum


def _model_file(superposition: Superposition, name: str) -> str:
    # A model's name may hold what a file's name may not; its key is as unique.
    return f"model-{superposition.key(name) & (1 << 64) - 1:016x}"


def _record(member: Member) -> dict[str, Any]:
    record = {
        "group": member.group,
        "alpha": member.alpha,
        "gains": dict(sorted(member.gains.items())),
        "digests": dict(sorted(member.digests.items())),
    }
    later = {
        "units": dict(sorted(member.units.items())), "alphas": dict(sorted(member.alphas.items())),
        "index": member.index,
    }  # fmt: skip
    return record | {name: value for name, value in later.items() if value}


def _text(manifest: dict[str, Any]) -> str:
    return json.dumps(manifest, indent=1, ensure_ascii=False) + "\n"


def _checksum(manifest: dict[str, Any]) -> str:
    content = {key: value for key, value in manifest.items() if key != "checksum"}
    return blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()


def check_destination(superposition: Superposition, folder: Path, manifest: dict[str, Any] | None = None) -> None:
    """Raise ``StoreError`` unless ``folder`` is new, empty, or the store that this came from or went to last.

    A store that somebody else has written to meanwhile holds models that would be lost. ``manifest``: what is to be
    written; where it stands there already, a save that was cut short is done again.
    """
    if (folder / MANIFEST).exists():
        found, stored = read_manifest(folder), superposition.stored
        if found["base"] != checkpoint.combined_digest(superposition.base_digests):
            raise StoreError(f"{folder} holds a store of another base; save to another folder")
        ours = isinstance(stored, Stored) and (stored.folder, stored.checksum) == (folder.resolve(), found["checksum"])
        if not ours and found != manifest:
            raise StoreError(f"{folder} holds a store that was written since, or is another's; load it and change that")
    else:
        check_new(folder)


def check_new(folder: Path) -> None:
    """Raise ``StoreError`` unless ``folder`` can take a new store: it is not there, or empty but for what a save that
    was cut short has left."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise StoreError(f"{folder} must be a folder, got a file")
    names = [file.name for file in folder.iterdir()]
    # A save writes what stands beside the tensors after these: without one it is somebody else's.
    begun = any(_OURS.fullmatch(name) and name.startswith("base-") for name in names)
    if strangers := [n for n in names if not _OURS.fullmatch(n) and not (begun and is_companion(n))]:
        raise StoreError(f"{folder} must be empty or a store, got {sorted(strangers)[:3]}")


@dataclass(frozen=True)
class Stored:
    """A store as it was last read or written: where, which, and its files' sizes and times of change."""

    folder: Path
    checksum: str
    files: dict[Path, tuple[int, int] | None]


def _stored(folder: Path, manifest: dict[str, Any]) -> Stored:
    return Stored(
        folder.resolve(), manifest["checksum"], {folder / name: _state(folder / name) for name in manifest["files"]}
    )


def _state(file: Path) -> tuple[int, int] | None:
    """What changes when a file is changed; None where there is no file."""
    if not file.exists():
        return None
    found = file.stat()
    return found.st_size, found.st_mtime_ns


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep other processes from saving to ``folder`` meanwhile."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
