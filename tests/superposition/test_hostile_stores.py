"""A store from somewhere else, or beside somebody else: what it names, holds and hides does no harm to its reader."""

import errno
import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from failures import failing
from models import content, finetune, linear, net, stored, superposed
from test_members import rewritten
from torch import nn

import randes
from randes.checkpoints import files
from randes.superposition.store.check import check_whole
from randes.superposition.store.manifest import MANIFEST


@pytest.fixture
def store(tmp_path: Path) -> Path:
    sup, _ = superposed(net(), 2)
    sup.model_files = {"config.json": b"{}", "tokenizer.json": b"{}"}
    sup.save(tmp_path / "store")
    return tmp_path / "store"


def test_links_in_a_store_are_not_followed(store: Path) -> None:
    outside = store.parent / "outside"
    for name, data in content(store).items():
        outside.write_bytes(data)
        (store / name).unlink()
        (store / name).symlink_to(outside)
        with pytest.raises(randes.StoreError, match=r"must be a regular file, got a link|altered or is missing"):
            randes.Superposition.load(store)
        (store / name).unlink()
        (store / name).write_bytes(data)
    assert randes.Superposition.load(store).names == ["m0", "m1"]


def test_pipes_in_a_store_are_not_waited_for(store: Path) -> None:
    for name, data in content(store).items():
        (store / name).unlink()
        os.mkfifo(store / name)
        with pytest.raises(randes.StoreError):
            randes.Superposition.load(store)
        (store / name).unlink()
        (store / name).write_bytes(data)


def test_nothing_is_taken_along_that_no_manifest_names(store: Path) -> None:
    (store / "tokenizer_secret.json").symlink_to("/etc/passwd")
    (store / "tokenizer_more.json").write_text("{}")
    randes.Superposition.load(store).save(store.parent / "again")
    assert not [*(store.parent / "again").glob("tokenizer_*")]


def test_of_an_older_store_links_are_left_where_they_are(store: Path) -> None:
    rewritten(store, lambda manifest: manifest.pop("companions"))
    (store / "tokenizer_secret.json").symlink_to("/etc/passwd")
    randes.Superposition.load(store).save(store.parent / "again")
    assert (store.parent / "again" / "tokenizer.json").exists()
    assert not (store.parent / "again" / "tokenizer_secret.json").exists()


@pytest.mark.parametrize("name", ["../elsewhere.safetensors", "/etc/passwd", "base.safetensors", "..", "", "a/b"])
def test_files_elsewhere_are_not_opened(name: str, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def renamed(manifest: dict[str, Any]) -> None:
        own = next(iter(manifest["files"]))
        manifest["files"][name] = manifest["files"].pop(own)

    rewritten(store, renamed)
    read: list[Path] = []
    monkeypatch.setattr("randes.checkpoints.safetensors.opened", lambda path, links: read.append(path))
    with pytest.raises(randes.StoreError, match="must be the name of a store's file of tensors, got"):
        randes.Superposition.load(store)
    assert not read


@pytest.mark.parametrize("name", ["../config.json", "/etc/passwd", "secret.txt", "tokenizer/../../secret"])
def test_companions_elsewhere_are_not_opened(name: str, store: Path) -> None:
    rewritten(store, lambda manifest: manifest["companions"].update({name: "0" * 32}))
    with pytest.raises(randes.StoreError, match="must be the name of a file"):
        randes.Superposition.load(store)


def add_bits(manifest: dict[str, Any]) -> None:
    manifest["packed"] = {"bits": True, "group": 0, "coordinates": 16, "master": ""}


LIES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no models": lambda found: found.pop("models"),
    "models of another type": lambda found: found.update(models=[1]),
    "a model without a name": lambda found: found["models"].update({"": found["models"].pop("m0")}),
    "the base as a model": lambda found: found["models"].update({"__base__": found["models"].pop("m0")}),
    "no digest": lambda found: found["models"]["m0"]["digests"].pop("norm.weight"),
    "a digest that is none": lambda found: found["models"]["m0"]["digests"].update({"norm.weight": "x"}),
    "an alpha of nothing": lambda found: found["models"]["m0"].update(alphas={"nothing": 1.0}),
    "something else": lambda found: found.update(more=1),
    "no superposed tensors": lambda found: found.update(superposed=[]),
    "superposed numbers": lambda found: found.update(superposed=[1]),
    "no files": lambda found: found.update(files={}),
    "a file twice": lambda found: found["files"].update(
        {f"base-{'0' * 32}.safetensors": next(iter(found["files"].values()))}
    ),
    "True bits": add_bits,
    "True as a number": lambda found: found["config"].update(group_size=True),
    "a large number": lambda found: found["config"].update(seed=1 << 64),
    "patterns that are none": lambda found: found["config"].update(include=[None]),
    "a tie to nothing": lambda found: found.update(layout={"views": {}, "ties": {"a": "b"}, "digests": {}}),
    "a view of nothing": lambda found: found.update(
        layout={"views": {"a": {"shape": [2], "parts": {}, "transposed": 0, "stacked": False}}, "ties": {},
                "digests": {}}
    ),
    "too many segments": lambda found: found["config"].update(segments=7),
    "a step of another size": lambda found: found.update(step=1.0),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_a_manifest_of_something_else_is_refused_whatever_its_checksum(lie: str, store: Path) -> None:
    rewritten(store, LIES[lie])
    with pytest.raises(randes.StoreError, match=r"manifest\.json cannot be used: "):
        randes.Superposition.load(store, check=False)


def test_the_base_is_no_model_of_a_store_that_is_not_centred(tmp_path: Path) -> None:
    superposed(net(), 1, randes.Config(others="base"))[0].save(tmp_path)
    rewritten(tmp_path, lambda manifest: manifest["models"].update({"__base__": manifest["models"].pop("m0")}))
    with pytest.raises(randes.StoreError, match="models must have names, '__base__' where deltas are centred"):
        randes.Superposition.load(tmp_path)


def test_a_group_holds_what_is_superposed(store: Path) -> None:
    rewritten(store, lambda manifest: manifest["superposed"].pop())
    with pytest.raises(randes.StoreError, match="group 0 must hold superposed tensors alone, got "):
        randes.Superposition.load(store)


@pytest.mark.parametrize("bits", [0, 2])
def test_a_table_in_few_bits_has_directions_and_a_unit(bits: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = nn.ModuleDict({"embed": nn.Embedding(2100, 32), "up": linear(32, 32)})
    sup = randes.compress(base, {"m0": finetune(base, 0)}).pack(2, embeddings=bits)
    sup.save(tmp_path)
    again = randes.Superposition.load(tmp_path)
    assert all(torch.equal(value, again.retrieve("m0")[name]) for name, value in sup.retrieve("m0").items())
    rewritten(tmp_path, lambda manifest: manifest["models"]["m0"]["units"].pop("embed.weight"))
    with pytest.raises(randes.StoreError, match=r"must have a unit of embed\.weight"):
        randes.Superposition.load(tmp_path)


@pytest.mark.parametrize("packed", [False, True])
def test_a_table_has_a_gain_and_is_in_no_group(packed: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = nn.ModuleDict({"embed": nn.Embedding(2100, 32), "up": linear(32, 32)})
    sup = randes.compress(base, {"m0": finetune(base, 0)}, randes.Config())
    (sup.pack(0.5) if packed else sup).save(tmp_path)
    if not packed:
        sup.deltas[0] = {**sup.deltas[0], **sup.deltas["m0"]}
        with pytest.raises(ValueError, match=r"group 0 must hold superposed tensors alone, got embed\.weight"):
            check_whole(sup)
    rewritten(tmp_path, lambda manifest: manifest["models"]["m0"]["gains"].pop("embed.weight"))
    with pytest.raises(randes.StoreError, match=r"model 'm0' must have a gain of embed\.weight"):
        randes.Superposition.load(tmp_path)


@pytest.mark.parametrize("wanted", [True, 0.0, "0"])
def test_a_group_and_an_index_are_integers(wanted: Any) -> None:
    sup = randes.Superposition.create(net(), randes.Config(shuffle_layers=1))
    for argument in ("group", "index"):
        with pytest.raises(ValueError, match=f"{argument} must be an integer"):
            sup.add("m0", finetune(net(), 0), **{argument: wanted})
    with pytest.raises(ValueError, match="group_size must be an integer"):
        randes.Config(group_size=wanted)


def test_a_name_that_cannot_be_written_down_is_refused() -> None:
    sup = randes.Superposition.create(net())
    with pytest.raises(ValueError, match=r"name must be a non-empty string .*, in UTF-8, .* got"):
        sup.add("half \ud800", finetune(net(), 0))


@pytest.mark.parametrize("others", ["keep", "average", "sum", "base"])
def test_tensors_of_one_byte_and_of_no_rows_are_superposed_or_kept(others: Any, tmp_path: Path) -> None:
    def state(seed: int) -> dict[str, torch.Tensor]:
        held = linear(32, 32, seed=seed).state_dict()
        scales = torch.full((4,), 1.0 + seed)
        small = {str(dtype): scales.to(dtype) for dtype in (torch.float8_e4m3fn, torch.float8_e5m2)}
        return {**held, **small, "empty.weight": torch.zeros(0, 32), "experts.up_proj": torch.zeros(0, 32, 32)}

    sup = randes.Superposition.create(state(0), randes.Config(others=others, transposed=("*empty*",)))
    sup.add("m", state(1))
    sup.save(tmp_path)
    assert randes.Superposition.load(tmp_path).retrieve("m").keys() == state(0).keys()
    bad = state(2)
    bad["torch.float8_e5m2"] = torch.tensor([float("inf")] * 4).to(torch.float8_e5m2)
    if others != "base":
        with pytest.raises(randes.CheckpointError, match="must be finite"):
            sup.add("bad", bad)


# ---------------------------------------------------------------- saves that fail


def test_a_save_that_fails_after_its_manifest_can_be_done_again_and_changed(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sup = randes.Superposition.load(store)
    sup.add("m2", finetune(net(), 2))
    sync = files.sync_folder

    def fails(folder: Path) -> None:
        if "m2" in json.loads((store / MANIFEST).read_text())["models"]:
            raise OSError(errno.EIO, "Input/output error")
        sync(folder)

    with monkeypatch.context() as patch:
        patch.setattr(files, "sync_folder", fails)
        with pytest.raises(OSError, match="could not be written: Input/output error"):
            sup.save(store)
    assert randes.Superposition.load(store).names == ["m0", "m1", "m2"]
    sup.add("m3", finetune(net(), 3))
    sup.save(store)
    assert content(store) == stored(sup, store.parent / "anew")


def test_a_save_from_nothing_is_done_again_by_a_superposition_that_knows_no_folder(tmp_path: Path) -> None:
    for _ in range(2):  # a configuration has tuples, and lists in JSON
        superposed(net(), 2)[0].save(tmp_path)


def test_a_full_disk_at_the_manifest_leaves_no_new_files(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, write = content(store), files.write_whole

    def full(path: Path, pieces: Any) -> None:
        if path.name == MANIFEST:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, pieces)

    sup = randes.Superposition.load(store)
    sup.add("m2", finetune(net(), 2))
    with monkeypatch.context() as patch:
        patch.setattr("randes.superposition.store.write.write_whole", full)
        with pytest.raises(OSError, match="No space left"):
            sup.save(store)
    assert content(store) == before
    sup.save(store)


def test_what_companions_are_is_there_before_the_manifest(tmp_path: Path) -> None:
    sup, _ = superposed(net(), 1)
    sup.model_files = {"config.json": b"{}", "tokenizer.json": b"{}"}
    last = 0
    while True:
        last += 1
        folder = tmp_path / str(last)
        with failing(folder, "error", last) as system, suppress(OSError, randes.StoreError):
            sup.save(folder)
        if not system.failed:
            break
        if (folder / MANIFEST).exists():
            assert randes.Superposition.load(folder).model_files.keys() == {"config.json", "tokenizer.json"}
        sup.stored = None
        sup.save(folder)
    assert last > 20


def test_a_reader_whose_files_went_reads_the_next_manifest(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from randes.superposition.store import read

    described, left = read.described, [2]

    def meanwhile(folder: Path, manifest: dict[str, Any]) -> Any:
        if left[0]:  # between a reader's manifest and its files, somebody changes the store
            left[0] -= 1
            sup = randes.Superposition.create(net())
            for number in range(2 + 2 - left[0]):
                sup.add(f"m{number}", finetune(net(), number))
            sup.model_files = {"config.json": b"{}", "tokenizer.json": b"{}"}
            for name in content(folder):
                (folder / name).unlink()
            sup.save(folder)
        return described(folder, manifest)

    monkeypatch.setattr(read, "described", meanwhile)
    assert randes.Superposition.load(store).names == ["m0", "m1", "m2", "m3"]


def test_a_store_that_is_another_at_each_look_is_refused_at_last(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from randes.superposition.store import read

    next(store.glob("group-0-*")).unlink()
    looks, read_manifest = [], read.read_manifest

    def another(folder: Path) -> dict[str, Any]:
        looks.append(1)
        return {**read_manifest(folder), "checksum": str(len(looks))}

    monkeypatch.setattr(read, "read_manifest", another)
    with pytest.raises(randes.StoreError, match="is not whole"):
        randes.Superposition.load(store)
    assert len(looks) == read.TRIES + 1


def test_a_store_that_lacks_a_file_for_good_is_refused(store: Path) -> None:
    next(store.glob("group-0-*")).unlink()
    with pytest.raises(randes.StoreError, match="is not whole"):
        randes.Superposition.load(store)
