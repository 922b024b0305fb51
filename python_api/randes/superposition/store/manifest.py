"""A store's manifest: what it says of files, models and tensors, and how it is checked."""

import json
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from hashlib import blake2b
from typing import Any

from randes.checkpoints import schema, sources
from randes.checkpoints.files import read_whole
from randes.checkpoints.huggingface import CONFIG, for_store
from randes.checkpoints.layout import Layout
from randes.checkpoints.names.conversion import RECORD
from randes.checkpoints.paths.folder import INDEX
from randes.checkpoints.remote.locations import Location
from randes.config import Config
from randes.errors import CheckpointError, StoreError, UnknownModelError
from randes.superposition.integers import AVERAGE_STEP, STEP
from randes.superposition.members import Member, check_scales
from randes.superposition.packed_tensors import Packing
from randes.superposition.state import State
from randes.superposition.store.contents import StoreFile, files_of, letters_of
from randes.superposition.store.files import by_stem, companion_name, tensors_name
from randes_kernels import FORMAT_VERSION, model_key
from randes_kernels.packing import HALF

MANIFEST = "manifest.json"
SHARDED = 2
"""The version of a manifest whose groups are in several files each. Seeds mean what they mean in ``FORMAT_VERSION``;
who reads only that says so, and reads nothing."""


def _option(default: object) -> schema.Check:
    """What a value of ``Config`` is in JSON; which values there can be, it says itself."""
    if isinstance(default, bool):
        return schema.truth
    if isinstance(default, tuple):
        return schema.listed(schema.text)
    if isinstance(default, str | int):
        return schema.either(schema.text, schema.integer(-1, (1 << 64) - 1))
    return schema.each(schema.each(schema.integer(1, 1 << 31)))


_PLAIN = Config().resolved(together=False)
_MODEL = schema.record(
    # ``check_scales`` says which numbers they can be.
    {
        "group": schema.anything, "alpha": schema.anything, "gains": schema.each(schema.anything),
        "digests": schema.each(schema.digest),
    },
    {"units": schema.each(schema.anything), "alphas": schema.each(schema.anything), "index": schema.anything},
)  # fmt: skip
_VIEW = schema.record(
    {
        "shape": schema.listed(schema.integer(1), 1, 64), "parts": schema.each(schema.integer(1)),
        "transposed": schema.truth, "stacked": schema.truth,
    },
)  # fmt: skip
_MANIFEST = schema.record(
    {
        "format": schema.one_of("randes"), "version": schema.one_of(FORMAT_VERSION, SHARDED), "checksum": schema.digest,
        "config": schema.record({}, {one.name: _option(getattr(_PLAIN, one.name)) for one in fields(Config)}),
        "step": schema.one_of(STEP), "average_step": schema.one_of(AVERAGE_STEP), "base": schema.digest,
        "superposed": schema.listed(schema.text, 1), "models": schema.each(_MODEL),
        "files": schema.each(schema.each(schema.digest), tensors_name),
    },
    {
        "layout": schema.record(
            {"views": schema.each(_VIEW), "ties": schema.each(schema.text), "digests": schema.each(schema.digest)},
        ),
        "companions": schema.each(schema.digest, companion_name),
        "names": RECORD,
        "packed": schema.each(schema.either(schema.text, schema.one_of(HALF), schema.integer())),
        "shard_size": schema.integer(1), "sizes": schema.each(schema.integer(1), tensors_name),
    },
)  # fmt: skip


def read_manifest(folder: Location) -> dict[str, Any]:
    """The manifest alone, checked against its own checksum and what a manifest must be. Raises ``StoreError``."""
    try:
        data = read_whole(folder / MANIFEST, links=False)
        manifest = schema.parsed(data, MANIFEST)
    except FileNotFoundError as error:
        raise StoreError(f"{folder} is not a store: it has no {MANIFEST}") from error
    except (OSError, CheckpointError) as error:
        raise StoreError(f"{folder} is not a store: {error}") from error
    except ValueError as error:
        raise StoreError(f"{folder / MANIFEST} is torn: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != "randes":
        raise StoreError(f"{folder / MANIFEST} is not a manifest of randes")
    if (version := manifest.get("version")) not in (FORMAT_VERSION, SHARDED):
        raise StoreError(f"{folder} must be of format version {FORMAT_VERSION} or {SHARDED}, got {version}")
    if manifest.get("checksum") != _checksum(manifest) or data.decode() != text_of(manifest):
        raise StoreError(f"{folder / MANIFEST} was altered: its checksum does not match its content")
    try:
        _MANIFEST(MANIFEST, manifest)
        for name, digests in manifest["files"].items():
            right = name.rsplit("-", 1)[1] == f"{sources.combined_digest(digests)}.safetensors"
            schema.must(right, "a file", "named by the digests of its tensors", name)
        stems = by_stem(manifest["files"])
        schema.must("base" in stems, "files", "some with a base", sorted(manifest["files"]))
        sharded = manifest["version"] == SHARDED
        for name, held in manifest["files"].items():
            schema.must(bool(held) or not sharded, name, "a file of some tensors", held)
        for kind, names in stems.items():
            schema.must(sharded or len(names) == 1, f"the files of {kind}", "one", names)
            tensors = [tensor for name in names for tensor in manifest["files"][name]]
            schema.must(len({*tensors}) == len(tensors), f"the tensors of {kind}", "each in one file", tensors)
        expected = manifest["files"].keys() if sharded else set()
        schema.must(manifest.get("sizes", {}).keys() == expected, "sizes", "those of all files", manifest.get("sizes"))
        schema.must(("shard_size" in manifest) == sharded, "version", f"{SHARDED}, for files of a size", version)
    except ValueError as error:
        raise StoreError(f"{folder / MANIFEST} cannot be used: {error}") from error
    return manifest


def described(folder: Location, manifest: dict[str, Any]) -> tuple[Config, Layout, Packing | None, dict[str, Member]]:
    """What a manifest says of all tensors and of each model, without these. Raises ``StoreError`` for other values."""
    try:
        config = Config.from_dict(manifest["config"])
        layout = Layout.from_dict(manifest["layout"]) if "layout" in manifest else Layout()
        packing = Packing(**manifest["packed"]) if "packed" in manifest else None
        members = {name: Member(**record) for name, record in manifest["models"].items()}
        for name, member in members.items():
            check_scales(name, member)
            members[name] = replace(
                member, alpha=float(member.alpha), gains=_floats(member.gains), units=_floats(member.units),
                alphas=_floats(member.alphas),
            )  # fmt: skip
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise StoreError(f"{folder / MANIFEST} cannot be used: {error}") from error
    return config, layout, packing, members


def _floats(numbers: Mapping[str, float]) -> dict[str, float]:
    """As torch takes them: JSON has integers beyond 64 bits."""
    return {name: float(value) for name, value in numbers.items()}


def manifest_of(superposition: State, files: Mapping[str, StoreFile], shard_size: int) -> dict[str, Any]:
    """What a manifest says of these ``files``. Only one of a sharded store has sizes, and another version."""
    tensors = {name: file.digests for name, file in files.items()}
    manifest: dict[str, Any] = {
        "format": "randes",
        "version": SHARDED if shard_size else FORMAT_VERSION,
        "config": superposition.config.to_dict(),
        "step": STEP,
        "average_step": AVERAGE_STEP,
        "base": sources.combined_digest(superposition.base_digests),
        "superposed": list(superposition.superposed),
        "models": {name: record_of(superposition.members[name]) for name in superposition.served},
        "files": tensors,
    }
    if shard_size:
        manifest |= {"shard_size": shard_size, "sizes": {name: file.nbytes for name, file in files.items()}}
    if layout := superposition.layout:
        split = sorted(part for view in layout.views.values() for part in view.parts)
        own = {part: superposition.base_digests[part] for part in split}
        manifest["layout"] = layout.to_dict() | {"digests": own}
    if superposition.model_files:
        beside = model_files_in(superposition, tensors)
        manifest["companions"] = {name: digest_of(text) for name, text in beside.items()}
    if superposition.to_files:
        manifest["names"] = superposition.to_files.to_dict()
    if superposition.packing is not None:
        packed = asdict(superposition.packing)
        manifest["packed"] = {name: value for name, value in packed.items() if value is not None}
    manifest["checksum"] = _checksum(manifest)
    return manifest


def model_files_in(superposition: State, files: Mapping[str, Mapping[str, str]]) -> dict[str, bytes]:
    """The files beside the tensors, as they stand in a store that has these ``files``: what Transformers reads."""
    base = {name: digests for name, digests in files.items() if name.startswith("base-")}
    if len(base) == 1 or CONFIG not in superposition.model_files:
        return for_store(superposition.model_files, next(iter(base)))
    digest = sources.combined_digest({tensor: one for digests in base.values() for tensor, one in digests.items()})
    index = {"metadata": {}, "weight_map": {tensor: name for name, own in base.items() for tensor in own}}
    name = f"base-{digest}{INDEX}"
    return {**for_store(superposition.model_files, name), name: (json.dumps(index, indent=1) + "\n").encode()}


def digest_of(text: bytes) -> str:
    return blake2b(text, digest_size=16).hexdigest()


def checksum_of(superposition: State) -> str:
    """What the manifest of a store of this superposition says of itself."""
    files = files_of(superposition, superposition.shard_size)
    checksum: str = manifest_of(superposition, files, superposition.shard_size)["checksum"]
    return checksum


def version_of(manifest: Mapping[str, Any], name: str) -> str:
    """What a model's answers depend on, in 16 letters: another one once any of it changes, its neighbours included.

    Raises ``UnknownModelError`` for a model that the manifest has not.
    """
    models = manifest["models"]
    if name not in models:
        raise UnknownModelError(f"no model is called {name!r}; there are: {', '.join(sorted(models)) or 'no models'}")
    letters = letters_of(model_key(manifest["config"]["seed"], name))
    own = {f"group-{models[name]['group']}", f"model-{letters}", f"unshared-{letters}", "base", "basis", "average"}
    files = sorted(file for file in manifest["files"] if file.rsplit("-", 1)[0] in own)
    content = {"files": files, "model": models[name]} | {key: manifest.get(key) for key in ("config", "packed")}
    return blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=8).hexdigest()


def record_of(member: Member) -> dict[str, Any]:
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


def text_of(manifest: dict[str, Any]) -> str:
    return json.dumps(manifest, indent=1, ensure_ascii=False) + "\n"


def _checksum(manifest: dict[str, Any]) -> str:
    content = {key: value for key, value in manifest.items() if key != "checksum"}
    return blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()
