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
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from randes import checkpoint
from randes.checkpoint import Tensors
from randes.companions import companions, for_store
from randes.config import Config
from randes.errors import CheckpointError, StoreError
from randes.integers import AVERAGE_STEP, STEP
from randes.layout import Layout
from randes.members import Member
from randes.superposition import Superposition
from randes_kernels import FORMAT_VERSION

MANIFEST = "manifest.json"
COORDINATES = "@basis"
"""Follows a tensor's name in a model's file, for its delta's coordinates in the shared basis."""
_OURS = re.compile(
    r"\.?(base|basis|group-\d+|model-[0-9a-f]{16}|average)-[0-9a-f]{32}\.safetensors(\.\d+\.tmp)?"
    r"|\.manifest\.json\.\d+\.tmp"
)


def save(superposition: Superposition, path: str | os.PathLike[str]) -> None:
    """Write the store at ``path``: a folder that is new, empty, or the store that this came from or went to last.

    Raises ``StoreError`` for any other folder, and for a store that was changed since.
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
        for name, stem in zip(manifest["files"], sorted(contents), strict=True):
            if (state := _state(folder / name)) is None or known.get(folder / name) != state:
                checkpoint.write_file(folder / name, dict(sorted(contents[stem].items())))
        beside = folder / f".{MANIFEST}.{os.getpid()}.tmp"
        beside.write_text(_text(manifest), encoding="utf-8")
        checkpoint.replace(beside, folder / MANIFEST)
        base_file = next(name for name in manifest["files"] if name.startswith("base-"))
        for name, content in for_store(superposition.companions, base_file).items():
            beside = folder / f".{name}.{os.getpid()}.tmp"
            beside.write_bytes(content)
            checkpoint.replace(beside, folder / name)
        superposition.stored = _stored(folder, manifest)
        for file in folder.iterdir():
            if _OURS.fullmatch(file.name) and file.name not in manifest["files"]:
                file.unlink()


def load(path: str | os.PathLike[str]) -> Superposition:
    """Read a store, checking every tensor against the manifest and the manifest against itself.

    Raises ``StoreError`` for anything missing, torn, truncated, altered, or of another version.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    contents: dict[str, Tensors] = {}
    digests_of: dict[str, dict[str, str]] = {}
    for name, digests in manifest["files"].items():
        try:
            tensors = checkpoint.read_file(folder / name)
        except (CheckpointError, OSError) as error:
            raise StoreError(f"{folder} is not whole: {error}") from error
        if tensors.keys() != digests.keys():
            raise StoreError(f"{folder / name} must hold {sorted(digests)}, got {sorted(tensors)}")
        for tensor, value in tensors.items():
            if checkpoint.digest(value) != digests[tensor]:
                raise StoreError(f"{folder / name} was altered: the checksum of {tensor} does not match the manifest")
        stem = name.rsplit("-", 1)[0]
        contents[stem], digests_of[stem] = tensors, digests
    base, base_digests = contents.pop("base"), digests_of["base"]
    layout = Layout.from_dict(manifest["layout"]) if "layout" in manifest else Layout()
    if layout.views:
        base = layout.split(base)
        base_digests = {name: checkpoint.digest(value) for name, value in base.items()}
    bases = contents.pop("basis", {})
    superposition = Superposition(
        Config.from_dict(manifest["config"]), base, manifest["superposed"], base_digests, bases, layout
    )
    for name, record in manifest["models"].items():
        kept = contents.pop(_model_file(superposition, name), {})
        coordinates = {tensor: kept.pop(f"{tensor}{COORDINATES}") for tensor in record.get("units", {})}
        superposition.members[name] = Member(**record, kept=kept, coordinates=coordinates)
    superposition.averages = contents.pop("average", {})
    superposition.deltas = {int(stem.split("-")[1]): tensors for stem, tensors in contents.items()}
    superposition.companions = companions(folder)
    superposition.stored = _stored(folder, manifest)
    return superposition


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


def _contents(superposition: Superposition) -> dict[str, Tensors]:
    """What each file holds, by the part of its name before the digest."""
    base = superposition.base
    if superposition.layout.views:
        base = superposition.layout.join(base, ties=False)
    contents = {"base": base, "basis": superposition.bases}
    contents |= {f"group-{group}": tensors for group, tensors in sorted(superposition.deltas.items())}
    for name in superposition.served:
        member = superposition.members[name]
        held = {f"{tensor}{COORDINATES}": value for tensor, value in member.coordinates.items()}
        contents[_model_file(superposition, name)] = {**member.kept, **held}
    contents["average"] = superposition.averages
    return {stem: tensors for stem, tensors in contents.items() if tensors}


def _manifest(superposition: Superposition, contents: dict[str, Tensors]) -> dict[str, Any]:
    files = {}
    for stem, tensors in sorted(contents.items()):
        # The base's have just been checked against its bytes.
        known = superposition.base_digests if tensors is superposition.base else None
        digests = known or {name: checkpoint.digest(value) for name, value in tensors.items()}
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
    } | ({"layout": superposition.layout.to_dict()} if superposition.layout else {})
    manifest["checksum"] = _checksum(manifest)
    return manifest


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
    return record | ({"units": dict(sorted(member.units.items()))} if member.units else {})


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
    if strangers := [file.name for file in folder.iterdir() if not _OURS.fullmatch(file.name)]:
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
