"""A store gives back what was saved, or raises: torn, altered or foreign files are never read as models."""

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from models import TRANSFORMS, content, deep, finetune, linear, net, stored, superposed
from safetensors.torch import save as serialized
from torch import nn

import randes
from randes import StoreError
from randes.checkpoints import sources

NAMES = ("plain", "ünïcode/日本", "../up", "a b", ".", "-", "x" * 200)


def small() -> nn.Module:
    """One superposed matrix and a kept head."""
    torch.manual_seed(0)
    return nn.Sequential(linear(32, 32), nn.Linear(32, 2))


@pytest.fixture
def store(tmp_path: Path) -> Path:
    sup, _ = superposed(small(), 2)
    sup.save(tmp_path / "store")
    return tmp_path / "store"


@pytest.mark.parametrize("others", ["keep", "average"])
@pytest.mark.parametrize("transform", ["both", "everything"])
def test_a_loaded_superposition_is_the_saved_one(transform: str, others: str, tmp_path: Path) -> None:
    base = net()
    config = randes.Config(**(TRANSFORMS[transform].to_dict() | {"others": others}))
    sup, tuned = superposed(base, 3, config)
    before = stored(sup, tmp_path / "saved")
    loaded = randes.Superposition.load(tmp_path / "saved")
    assert stored(loaded, tmp_path / "again") == before
    assert (loaded.names, loaded.config, loaded.nbytes) == (sup.names, sup.config, sup.nbytes)
    for name in sup.names:
        retrieved = loaded.retrieve(name)
        assert all(torch.equal(retrieved[tensor], value) for tensor, value in sup.retrieve(name).items())
    for superposition in (sup, loaded):
        superposition.remove("m1", tuned["m1"])
        superposition.add("m3", finetune(base, 3))
    assert stored(loaded, tmp_path / "loaded on") == stored(sup, tmp_path / "saved on")


def test_any_name_of_a_model_can_be_stored(tmp_path: Path) -> None:
    base = small()
    sup = randes.Superposition.create(base)
    for number, name in enumerate(NAMES):
        sup.add(name, finetune(base, number))
    sup.save(tmp_path / "nested" / "store")
    loaded = randes.Superposition.load(str(tmp_path / "nested" / "store"))
    assert loaded.names == sorted(NAMES)
    for number, name in enumerate(NAMES):
        assert torch.equal(loaded.retrieve(name)["1.weight"], finetune(base, number).state_dict()["1.weight"])


def test_a_store_without_models_can_be_stored(tmp_path: Path) -> None:
    randes.Superposition.create(small()).save(tmp_path / "store")
    assert randes.Superposition.load(tmp_path / "store").names == []


def test_saving_again_writes_only_what_changed_and_removes_what_is_gone(tmp_path: Path) -> None:
    base = small()
    sup, tuned = superposed(base, 2, randes.Config(group_size=1))
    folder = tmp_path / "store"
    sup.save(folder)
    before = {file.name: file.stat().st_ino for file in folder.iterdir()}
    sup.remove("m1", tuned["m1"])
    sup.save(folder)
    after = {file.name: file.stat().st_ino for file in folder.iterdir()}
    assert set(before) - set(after) == {name for name in before if name.startswith(("group-1", "model-"))} - set(after)
    assert len(before) - len(after) == 2  # its group and what it kept
    assert all(before[name] == node for name, node in after.items() if name != "manifest.json")
    assert content(folder) == stored(sup, tmp_path / "anew")


def test_every_truncated_file_is_refused(store: Path) -> None:
    for name, whole in content(store).items():
        for length in {0, 1, 7, 8, 9, len(whole) // 3, len(whole) // 2, len(whole) - 2, len(whole) - 1}:
            (store / name).write_bytes(whole[:length])
            with pytest.raises(StoreError):
                randes.Superposition.load(store)
        (store / name).write_bytes(whole + b"\0")
        with pytest.raises(StoreError):
            randes.Superposition.load(store)
        (store / name).write_bytes(whole)
    assert randes.Superposition.load(store).names == ["m0", "m1"]


@pytest.mark.no_cover
@pytest.mark.parametrize("mask", [0x01, 0x20, 0xFF])
def test_every_flipped_byte_is_noticed(store: Path, mask: int) -> None:
    for name, whole in content(store).items():
        header = range(0, 200, 3)
        for position in {*header, *range(200, len(whole), 41), len(whole) - 1}:
            altered = bytearray(whole)
            altered[position] ^= mask
            (store / name).write_bytes(altered)
            with pytest.raises(StoreError):
                randes.Superposition.load(store)
        (store / name).write_bytes(whole)
    assert randes.Superposition.load(store).names == ["m0", "m1"]


def test_an_altered_manifest_is_noticed_even_where_it_reads_the_same(tmp_path: Path) -> None:
    base = small()
    sup = randes.Superposition.create(base)
    sup.add("quiet", finetune(base, 1, 1e-6))
    sup.save(tmp_path)
    text = (tmp_path / "manifest.json").read_text()
    assert "e-07" in text or "e-06" in text
    (tmp_path / "manifest.json").write_text(text.replace("e-0", "E-0"))
    with pytest.raises(StoreError):
        randes.Superposition.load(tmp_path)


def test_a_missing_file_is_noticed(store: Path) -> None:
    for name, whole in content(store).items():
        (store / name).unlink()
        with pytest.raises(StoreError):
            randes.Superposition.load(store)
        (store / name).write_bytes(whole)


def test_files_that_changed_places_are_noticed(store: Path) -> None:
    first, second = sorted(store.glob("model-*"))
    one, other = first.read_bytes(), second.read_bytes()
    first.write_bytes(other)
    second.write_bytes(one)
    with pytest.raises(StoreError, match="altered"):
        randes.Superposition.load(store)


def test_another_format_version_is_refused_by_its_number(store: Path) -> None:
    text = (store / "manifest.json").read_text()
    (store / "manifest.json").write_text(text.replace('"version": 1', '"version": 3'))
    with pytest.raises(StoreError, match="version 1 or 2, got 3"):
        randes.Superposition.load(store)


@pytest.mark.parametrize("manifest", ["", "[]", "null", "{}", '{"format": "other"}', "\xff", "[" * 10, '{"a": 1'])
def test_a_manifest_of_something_else_is_refused(manifest: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(manifest, encoding="latin-1")
    with pytest.raises(StoreError):
        randes.Superposition.load(tmp_path)


def test_what_is_no_store_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("text")
    (tmp_path / "folder" / "manifest.json").mkdir(parents=True)
    for name in ("empty", "nowhere", "file", "folder"):
        with pytest.raises(StoreError):
            randes.Superposition.load(tmp_path / name)


@pytest.mark.parametrize("length", [0x80, 0x280])
def test_a_file_whose_header_length_looks_like_a_pickle_is_read(length: int, tmp_path: Path) -> None:
    # safetensors files begin with the length of their header: one in 32 begins with a pickle's first byte.
    file = next(
        file
        for width in range(1, 700)
        if int.from_bytes((file := serialized({"w" * width: torch.ones(1)}))[:8], "little") == length
    )
    (tmp_path / "w.safetensors").write_bytes(file)
    assert len(sources.read(tmp_path / "w.safetensors")) == 1


def test_a_store_of_another_base_is_never_overwritten(store: Path) -> None:
    before = content(store)
    other = randes.Superposition.create(linear(32, 32))
    with pytest.raises(StoreError, match="another base"):
        other.save(store)
    assert content(store) == before


def test_a_folder_of_other_files_and_a_file_are_never_written_to(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    sup = randes.Superposition.create(small())
    for path in (tmp_path, tmp_path / "thesis.tex"):
        with pytest.raises(StoreError):
            sup.save(path)
    assert content(tmp_path) == {"thesis.tex": b"years of work"}


def test_other_files_beside_a_store_survive_a_save(store: Path) -> None:
    (store / "README.md").write_text("mine")
    sup = randes.Superposition.load(store)
    for name in sup.names[1:]:
        sup.remove(name, finetune(small(), int(name[1:])))
    sup.save(store)
    assert (store / "README.md").read_text() == "mine"
    assert randes.Superposition.load(store).names == ["m0"]


class KilledError(Exception):
    """The process is gone: nothing after this touches the disk."""


class Disk:
    """Counts what a save does to the disk, and stops it for good at one step, with half of what it was writing."""

    def __init__(self, last: int, patch: pytest.MonkeyPatch) -> None:
        self.steps, self.last = 0, last
        for owner, name in (
            (os, "fsync"), (os, "write"), (Path, "replace"), (Path, "unlink"), (Path, "mkdir"),
        ):  # fmt: skip
            patch.setattr(owner, name, self.counted(getattr(owner, name), name))

    def counted(self, call: Callable[..., Any], name: str) -> Callable[..., Any]:
        def step(*arguments: Any, **options: Any) -> Any:
            self.steps += 1
            if self.steps < self.last:
                return call(*arguments, **options)
            if self.steps == self.last and name == "write":
                call(arguments[0], arguments[1][: len(arguments[1]) // 2], **options)
            raise KilledError

        return step


def crashes(save: Callable[[], None], monkeypatch: pytest.MonkeyPatch, least: int) -> Iterator[None]:
    """Kills ``save`` at its first step, its second, and so on until it gets through, after ``least`` steps or more."""
    for last in range(1, 1000):
        with monkeypatch.context() as patch:
            disk = Disk(last, patch)
            try:
                save()
            except KilledError:
                pass
            else:
                assert disk.steps == last - 1 >= least
                return
        yield


@pytest.mark.no_cover
def test_a_save_killed_at_any_step_leaves_the_old_store_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, tuned = superposed(deep(), 2)
    old_files = stored(old, tmp_path / "old")
    new, _ = superposed(deep(), 2)
    new.remove("m0", tuned["m0"])
    new.add("m2", finetune(deep(), 2))
    new_files = stored(new, tmp_path / "new")
    folder, seen, left_over = tmp_path / "store", [], 0

    def change() -> None:
        sup = randes.Superposition.load(folder)
        if sup.names == old.names:
            sup.remove("m0", tuned["m0"])
            sup.add("m2", finetune(deep(), 2))
        sup.save(folder)

    def save() -> None:
        for file in content(folder):
            os.remove(folder / file)
        for name, data in old_files.items():
            (folder / name).write_bytes(data)
        change()

    folder.mkdir()
    for _ in crashes(save, monkeypatch, 25):
        names = randes.Superposition.load(folder).names  # every byte is checked
        seen.append(names == new.names)
        expected = new_files if seen[-1] else old_files
        assert names in (old.names, new.names)
        assert expected.items() <= content(folder).items()
        left_over += not content(folder).keys() <= old_files.keys() | new_files.keys()
        change()
        assert content(folder) == new_files
    assert seen == sorted(seen)
    assert {*seen} == {False, True}
    assert left_over > 0


@pytest.mark.no_cover
def test_a_first_save_killed_at_any_step_can_be_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sup, _ = superposed(deep(14), 2)
    files = stored(sup, tmp_path / "whole")
    folder = tmp_path / "store"

    def save() -> None:
        for file in content(folder):
            os.remove(folder / file)
        sup.save(folder)

    for _ in crashes(save, monkeypatch, 100):
        if (folder / "manifest.json").exists():
            assert randes.Superposition.load(folder).names == ["m0", "m1"]
        else:
            with pytest.raises(StoreError, match=r"no manifest\.json"):
                randes.Superposition.load(folder)
        sup.save(folder)
        assert content(folder) == files


def test_what_somebody_else_wrote_meanwhile_is_never_lost(store: Path) -> None:
    first, second = randes.Superposition.load(store), randes.Superposition.load(store)
    first.add("first", finetune(small(), 11))
    first.save(store)
    second.add("second", finetune(small(), 12))
    with pytest.raises(StoreError, match="was written since"):
        second.save(store)
    assert "first" in randes.Superposition.load(store).names


def test_a_file_damaged_since_is_written_again_by_who_holds_its_tensors(tmp_path: Path) -> None:
    sup, _ = superposed(small(), 2)
    before = stored(sup, tmp_path)
    damaged = next(tmp_path.glob("group-0-*"))
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    assert stored(sup, tmp_path) == before


def test_a_file_damaged_since_is_never_taken_for_right(store: Path, tmp_path: Path) -> None:
    sup = randes.Superposition.load(store)
    damaged = next(store.glob("group-0-*"))
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    for use in (
        lambda: sup.save(store),
        lambda: sup.save(tmp_path / "other"),
        lambda: sup.retrieve("m0"),
        lambda: sup.add("m2", finetune(small(), 2)),
        lambda: sup.remove("m0", finetune(small(), 0)),
    ):
        with pytest.raises(StoreError, match=r"was altered: the checksum of 0\.weight"):
            use()
    assert not (tmp_path / "other").exists()
    damaged.unlink()
    with pytest.raises(StoreError, match="is not whole"):
        randes.Superposition.load(store)


def test_a_store_that_is_not_checked_at_once_is_checked_where_it_is_used(tmp_path: Path) -> None:
    base = small()
    superposed(base, 4, randes.Config(group_size=2))[0].save(tmp_path)
    damaged = next(tmp_path.glob("group-1-*"))
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    with pytest.raises(StoreError, match="was altered"):
        randes.Superposition.load(tmp_path)
    sup = randes.Superposition.load(tmp_path, check=False)
    assert sup.retrieve("m0").keys() == base.state_dict().keys()
    with pytest.raises(StoreError, match="was altered"):
        sup.retrieve("m2")


def test_a_loaded_superposition_outlives_its_folder(store: Path, tmp_path: Path) -> None:
    sup = randes.Superposition.load(store)
    expected = sup.retrieve("m0")
    shutil.rmtree(store)
    assert all(torch.equal(value, expected[name]) for name, value in sup.retrieve("m0").items())
    sup.add("m2", finetune(small(), 2))
    sup.save(tmp_path / "again")
    assert randes.Superposition.load(tmp_path / "again").names == ["m0", "m1", "m2"]


def test_what_was_added_is_read_from_the_disk_again_once_it_is_saved(store: Path) -> None:
    sup = randes.Superposition.load(store)
    tuned = finetune(small(), 2)
    sup.add("m2", tuned)
    assert list(sup.deltas[0].held) == ["0.weight"]  # type: ignore[attr-defined]
    sup.save(store)
    assert not sup.deltas[0].held  # type: ignore[attr-defined]
    before = sup.retrieve("m1")
    sup.remove("m2", tuned)
    sup.add("m2", tuned)
    assert all(torch.equal(value, before[name]) for name, value in sup.retrieve("m1").items())


@pytest.mark.parametrize("room", [0, 100, 2_500, 4_000])
def test_a_full_disk_is_said_and_leaves_the_old_store(room: int, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = content(store)
    sup = randes.Superposition.load(store)
    sup.add("m2", finetune(small(), 2))
    write, left = os.write, room

    def full(handle: int, data: memoryview) -> int:
        nonlocal left
        if left == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        done = write(handle, data[:left])
        left -= done
        return done

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(OSError, match=r"could not be written: No space left on device: .*store") as caught:
            sup.save(store)
    assert caught.value.errno == errno.ENOSPC
    assert before.items() <= content(store).items()
    assert len(content(store)) == len(before) or room == 4_000  # all written but the manifest
    assert randes.Superposition.load(store).names == ["m0", "m1"]
    sup.save(store)
    assert randes.Superposition.load(store).names == ["m0", "m1", "m2"]


KILLED = """
import os, random, signal, sys, time
from pathlib import Path
import torch
import randes
sys.path.insert(0, sys.argv[2])
from models import deep, finetune

store, base = Path(sys.argv[1]), deep()
tuned = [finetune(base, number) for number in range(3)]
sup = randes.Superposition.create(base)
sup.add("m0", tuned[0])
sup.save(store)
random.seed(0)
for _ in range(12):
    pid = os.fork()
    if pid == 0:
        while True:
            sup = randes.Superposition.load(store)
            for name, model in (("m1", tuned[1]), ("m2", tuned[2])):
                sup.remove(name, model) if name in sup.names else sup.add(name, model)
                sup.save(store)
    time.sleep(random.uniform(0.01, 0.25))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    print(*randes.Superposition.load(store).names)
"""


def test_a_process_killed_at_any_time_leaves_a_whole_store(tmp_path: Path) -> None:
    folder = str(Path(__file__).parents[1])
    command = [sys.executable, "-c", KILLED, str(tmp_path / "store"), folder]
    run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert len(lines) == 12
    assert {*lines} <= {"m0", "m0 m1", "m0 m2", "m0 m1 m2"}
    assert len({*lines}) > 1
