"""Stores whose groups lie in several files each: the same superposition, whatever is done to it, and nothing torn."""

import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import golden_stores
import pytest
import torch
from models import content, finetune, net, stored
from test_members import rewritten
from typer.testing import CliRunner

import randes
from randes import StoreError
from randes.checkpoints.safetensors import write_file
from randes.checkpoints.sources import combined_digest
from randes.cli import app
from randes.superposition.store.contents import bytes_of, files_of, parts_of
from randes.superposition.store.files import INDEX_OF_BASE, by_stem
from randes.superposition.store.manifest import MANIFEST, checksum_of

SIZE = 8000
CONFIGS = {
    "integers": randes.Config(group_size=2, rank=0),
    "basis, centred": randes.Config(rank=4, centre=True),
    "shuffled": randes.Config(rank=0, shuffle_layers=-1),
    "averages": randes.Config(rank=0, others="average"),
}


def models() -> tuple[Any, dict[str, Any]]:
    base = net()
    return base, {f"m{number}": finetune(base, number) for number in range(3)}


def made(kind: str = "integers") -> randes.Superposition:
    return randes.compress(*models(), CONFIGS[kind])


def manifest_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    return found


def same(a: randes.Superposition, b: randes.Superposition) -> None:
    assert a.names == b.names
    for name in a.names:
        one, other = a.retrieve(name), b.retrieve(name)
        assert one.keys() == other.keys()
        assert all(torch.equal(value, other[tensor]) for tensor, value in one.items())


@pytest.fixture
def store(tmp_path: Path) -> Path:
    sup = made()
    sup.model_files = {"config.json": b"{}", "tokenizer.json": b"{}"}
    sup.save(tmp_path / "store", shard_size=SIZE)
    return tmp_path / "store"


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_store_in_shards_is_the_store_in_one_file_a_kind(kind: str, tmp_path: Path) -> None:
    sup = made(kind)
    whole = stored(sup, tmp_path / "whole")
    sup.save(tmp_path / "shards", shard_size=SIZE)
    names = by_stem(manifest_of(tmp_path / "shards")["files"])
    assert names.keys() == {name.rsplit("-", 1)[0] for name in whole} - {MANIFEST}
    assert all(len(names[stem]) > 1 for stem in ("base", "group-0"))
    loaded = randes.Superposition.load(tmp_path / "shards")
    same(loaded, sup)
    assert list(loaded.base) == list(randes.Superposition.load(tmp_path / "whole").base)
    assert checksum_of(loaded) == manifest_of(tmp_path / "shards")["checksum"]
    loaded.save(tmp_path / "again", shard_size=0)
    assert content(tmp_path / "again") == whole


def test_no_file_has_more_tensors_than_asked_for_but_for_one_that_is_larger_alone(tmp_path: Path) -> None:
    sup = made("basis, centred")
    for size in (1, 5000, SIZE):
        for name, file in files_of(sup, size).items():
            nbytes = sum(file.tensors[tensor].nbytes for tensor in file.digests)
            assert nbytes <= size or len(file.digests) == 1, name
    sup.save(tmp_path, shard_size=5000)
    manifest = manifest_of(tmp_path)
    assert manifest["sizes"] == {name: (tmp_path / name).stat().st_size for name in manifest["files"]}
    assert (manifest["shard_size"], manifest["version"]) == (5000, 2)


@pytest.mark.parametrize("kind", ["basis, centred", "shuffled"])
def test_all_kinds_are_cut_at_the_same_tensors(kind: str) -> None:
    """So that whoever has all models' tensors of one part writes its files without the others'."""
    sup = made(kind)
    parts = parts_of(sup, SIZE)
    assert {*parts.values()} == {*range(max(parts.values()) + 1)}
    for name, file in files_of(sup, SIZE).items():
        own = {parts[tensor.partition("@")[0]] for tensor in file.digests}
        assert len(own) == 1, name
    if kind == "shuffled":
        for matrix in sup.superposed:
            assert len({parts[name] for name in sup.family(matrix)}) == 1


def test_what_changes_a_store_keeps_its_files_size(store: Path, tmp_path: Path) -> None:
    base, tuned = models()
    sup = randes.Superposition.load(store)
    before = manifest_of(store)["files"].keys()
    sup.add("m3", finetune(base, 3))
    sup.remove("m0", tuned["m0"])
    sup.save(store)
    after = manifest_of(store)
    assert after["shard_size"] == SIZE
    kept = {name for name in before & after["files"].keys() if name.startswith("base-")}
    assert kept == {name for name in before if name.startswith("base-")}
    there = {file.name for file in store.iterdir()}
    assert there == {*after["files"], *after["companions"], MANIFEST}  # what is old is gone
    one = randes.Superposition.create(base, CONFIGS["integers"])
    for name, group in (("m1", 0), ("m2", 1), ("m3", 1)):
        one.add(name, finetune(base, int(name[1:])), group=group)
    one.model_files = sup.model_files
    one.save(tmp_path / "one", shard_size=SIZE)
    assert content(tmp_path / "one") == content(store)
    same(randes.Superposition.load(store), one)
    sup.save(store, shard_size=0)
    assert len(by_stem(manifest_of(store)["files"])) == len(manifest_of(store)["files"])
    assert not [file for file in store.iterdir() if INDEX_OF_BASE.fullmatch(file.name)]


def test_what_is_saved_is_read_from_the_new_files(store: Path) -> None:
    sup = randes.Superposition.load(store)
    sup.add("m3", finetune(net(), 3))
    sup.save(store)
    assert not any(held.held for held in sup.deltas.values())  # type: ignore[attr-defined]
    same(sup, randes.Superposition.load(store))


def test_packed_stores_are_in_files_of_the_same_size(store: Path, tmp_path: Path) -> None:
    packed = randes.Superposition.load(store).pack(4)
    packed.save(tmp_path / "packed")
    assert manifest_of(tmp_path / "packed")["shard_size"] == SIZE
    same(randes.Superposition.load(tmp_path / "packed"), packed)
    assert randes.Superposition.load(tmp_path / "packed").packing == packed.packing


# ---------------------------------------------------------------- what is refused


def test_every_file_that_is_cut_damaged_or_gone_is_noticed(store: Path) -> None:
    for name, whole in content(store).items():
        for damaged in (whole[:-1], whole + b"\0", whole[: len(whole) // 2], whole[:-2] + b"??"):
            (store / name).write_bytes(damaged)
            with pytest.raises(StoreError):
                randes.Superposition.load(store)
        (store / name).unlink()
        with pytest.raises(StoreError):
            randes.Superposition.load(store)
        (store / name).write_bytes(whole)
    assert randes.Superposition.load(store).names == ["m0", "m1", "m2"]


def shards(manifest: dict[str, Any], stem: str = "group-0") -> list[str]:
    return by_stem(manifest["files"])[stem]


def drop_one(manifest: dict[str, Any]) -> None:
    name = shards(manifest)[0]
    del manifest["files"][name], manifest["sizes"][name]


def tell_another_size(manifest: dict[str, Any]) -> None:
    manifest["sizes"][shards(manifest)[0]] += 1


def hold_one_twice(manifest: dict[str, Any]) -> None:
    several = next(held for name in shards(manifest, "base") if len(held := manifest["files"][name]) > 1)
    tensor, digest = next(iter(several.items()))
    name = f"base-{combined_digest({tensor: digest})}.safetensors"
    manifest["files"][name], manifest["sizes"][name] = {tensor: digest}, 1


def hold_nothing(manifest: dict[str, Any]) -> None:
    name = f"group-7-{combined_digest({})}.safetensors"
    manifest["files"][name], manifest["sizes"][name] = {}, 100


LIES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a shard less": (drop_one, "must have a superposition in group 0 of"),
    "another size": (tell_another_size, r"must have \d+ bytes, got \d+"),
    "a tensor twice": (hold_one_twice, "the tensors of base must be each in one file"),
    "a file of nothing": (hold_nothing, "must be a file of some tensors"),
    "no sizes": (lambda found: found.pop("sizes"), "sizes must be those of all files"),
    "a size of nothing": (lambda found: found["sizes"].update({f"base-{'0' * 32}.safetensors": 1}), "sizes must be"),
    "a size that is none": (
        lambda found: found["sizes"].update({shards(found)[0]: -1}), "must be an integer from 1 to"
    ),
    "no size of files": (lambda found: found.pop("shard_size"), "version must be 2, for files of a size"),
    "files without bytes": (lambda found: found.update(shard_size=0), "shard_size must be an integer from 1 to"),
    "the version of whole files": (lambda found: found.update(version=1), "the files of .* must be one, got"),
    "a version to come": (lambda found: found.update(version=3), "must be of format version 1 or 2, got 3"),
    "an index elsewhere": (
        lambda found: found["companions"].update({"model.safetensors.index.json": "0" * 32}),
        "must be the name of a file that goes with a model",
    ),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_a_manifest_that_says_what_cannot_be_is_refused(lie: str, store: Path) -> None:
    change, said = LIES[lie]
    rewritten(store, change)
    with pytest.raises(StoreError, match=said):
        randes.Superposition.load(store, check=False)


def test_a_store_of_whole_files_that_says_sizes_is_refused(tmp_path: Path) -> None:
    made().save(tmp_path)
    rewritten(tmp_path, lambda found: found.update(shard_size=1))
    with pytest.raises(StoreError, match="version must be 2, for files of a size, got 1"):
        randes.Superposition.load(tmp_path)


@pytest.mark.parametrize("size", ["2 apples", "", "-1", "GiB", "1e9", -1, 1.5, True, "9" * 400 + "GB", 1 << 63])
def test_a_size_that_is_none_is_refused_before_anything_is_written(size: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r'shard_size must be a number of bytes, or a text as "2GiB"'):
        made().save(tmp_path / "store", shard_size=size)
    assert not (tmp_path / "store").exists()


def test_sizes_are_read_as_they_are_written() -> None:
    sizes = {"2GiB": 2 << 30, "5GB": 5 * 10**9, " 1.5 kb ": 1500, "0": 0, "7": 7, "3b": 3, "1TiB": 1 << 40}
    assert {text: bytes_of(text) for text in sizes} == sizes
    assert bytes_of(12) == 12


# ---------------------------------------------------------------- other programs


def test_the_stores_of_november_2026_are_loaded_and_saved_to_the_same_bytes(tmp_path: Path) -> None:
    with tarfile.open(golden_stores.SHARDED) as archive:
        archive.extractall(tmp_path, filter="data")
    kinds = sorted(path.name for path in tmp_path.iterdir() if path.is_dir())
    assert kinds == ["basis", "basis in 4 bits", "plain"]
    for kind in kinds:
        sup = randes.Superposition.load(tmp_path / kind)
        assert sup.shard_size == golden_stores.SHARD_SIZE
        sup.save(tmp_path / "again" / kind)
        assert content(tmp_path / "again" / kind) == content(tmp_path / kind)
    base, tuned = golden_stores.models()
    sup = randes.compress(base, tuned, golden_stores.CONFIGS["plain"])
    sup.save(tmp_path / "anew", shard_size=golden_stores.SHARD_SIZE)
    assert content(tmp_path / "anew") == content(tmp_path / "plain")


def test_a_transformers_model_is_loaded_from_shards(tmp_path: Path) -> None:
    import transformers
    from corpus import GPT2

    import randes.transformers

    torch.manual_seed(0)
    base = transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2)).eval()
    base.save_pretrained(tmp_path / "base")
    sup = randes.Superposition.create(tmp_path / "base")
    sup.add("m", finetune(base, 1))
    sup.save(tmp_path / "store", shard_size=20000)
    assert len([*(tmp_path / "store").glob("base-*.safetensors")]) > 1
    ids = torch.tensor([[1, 2, 3]])
    expected = randes.from_pretrained(tmp_path / "base", sup)
    for model in (
        randes.from_pretrained(tmp_path / "store"),
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "store"),
    ):
        for name in ("m", "__base__"):
            with torch.no_grad(), model.using([name]), expected.using([name]):
                assert torch.equal(model(input_ids=ids).logits, expected(input_ids=ids).logits)
    index = next((tmp_path / "store").glob("base-*.index.json"))
    index.write_text(index.read_text().replace("transformer.h.0", "transformer.h.9"))
    with pytest.raises(StoreError, match="altered or is missing"):
        randes.from_pretrained(tmp_path / "store")


def test_the_command_line_makes_changes_and_shows_shards(tmp_path: Path) -> None:
    base, tuned = models()
    for name, model in {"base": base, **tuned}.items():
        write_file(tmp_path / f"{name}.safetensors", model.state_dict())

    def run(*arguments: object) -> str:
        found = CliRunner().invoke(app, list(map(str, arguments)))
        assert found.exit_code == 0, found.output
        return found.stdout

    def model(name: str) -> str:
        return f"{name}={tmp_path / f'{name}.safetensors'}"

    store, packed = tmp_path / "store", tmp_path / "packed"
    start = ("compress", "--base", tmp_path / "base.safetensors", "--model", model("m0"), "--model", model("m1"))
    run(*start, "--out", store, "--shard-size", "8kB", "--min-width", 16)
    run("add", store, model("m2"))
    run("remove", store, model("m0"))
    assert manifest_of(store)["shard_size"] == 8000
    assert "in files of 8.00 kB" in run("info", store)
    assert json.loads(run("info", store, "--json"))["shard_size"] == 8000
    assert "kept tensors       exact" in run("verify", store, model("m1"))
    run("report", store, "--out", tmp_path / "report.html", "--model", model("m1"))
    run("retrieve", store, "m1", "--out", tmp_path / "again.safetensors")
    run("pack", store, "--out", packed)
    assert manifest_of(packed)["shard_size"] == 8000
    run("pack", store, "--out", tmp_path / "whole", "--shard-size", "0")
    assert manifest_of(tmp_path / "whole")["version"] == 1
    refused = CliRunner().invoke(app, list(map(str, (*start, "--out", tmp_path / "no", "--shard-size", "many"))))
    assert refused.exit_code == 2
    assert not (tmp_path / "no").exists()
