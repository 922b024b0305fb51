"""What a store's writer and reader refuse, each way once: parts that do not go together, a folder that is taken."""

import errno
import json
import tarfile
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import golden_stores
import pytest
import torch
from models import content, finetune, net, superposed

import randes
from randes import StoreError
from randes.checkpoints.names.conversion import Conversion
from randes.checkpoints.names.pieces import Piece
from randes.superposition.store.check import check_whole
from randes.superposition.store.manifest import MANIFEST, checksum_of
from randes.superposition.store.write import alone, check_new

WEIGHT = "layers.0.up.weight"


def made(**config: Any) -> randes.Superposition:
    return superposed(net(), 2, randes.Config(**config))[0]


@pytest.fixture
def store(tmp_path: Path) -> Path:
    sup = made()
    sup.model_files = {"config.json": b"{}", "tokenizer.json": b"{}"}
    sup.save(tmp_path / "store")
    return tmp_path / "store"


def test_the_way_back_to_the_bases_files_is_saved_and_checked(tmp_path: Path) -> None:
    sup = made()
    back = Conversion({"old": WEIGHT}, dropped=frozenset({"extra"}))
    sup.to_files = back
    sup.save(tmp_path / "store")
    assert randes.Superposition.load(tmp_path / "store").to_files == back
    piece = Piece(WEIGHT, (1,), (1,), 0, (1,), 1 << 40)
    sup.to_files = Conversion({}, {"old": (piece,)}, {"old": (1,)})
    sup.save(tmp_path / "other")
    with pytest.raises(StoreError, match="made of elements that"):
        randes.Superposition.load(tmp_path / "other")


@pytest.mark.parametrize("kind", [*golden_stores.CONFIGS, "basis in 8 bits", "basis in 4 bits", "plain in 2 bits"])
def test_whatever_a_store_has_is_loaded_and_saved(kind: str, tmp_path: Path) -> None:
    with tarfile.open(golden_stores.FILE) as archive:
        members = [member for member in archive if member.name.removeprefix("./").split("/")[0] == kind]
        archive.extractall(tmp_path, members, filter="data")
    sup = randes.Superposition.load(tmp_path / kind)
    assert checksum_of(sup) == json.loads((tmp_path / kind / MANIFEST).read_text(encoding="utf-8"))["checksum"]
    sup.save(tmp_path / "again")
    assert content(tmp_path / "again") == content(tmp_path / kind)


# ---------------------------------------------------------------- parts that do not go together


def narrow(tensors: Any) -> dict[str, torch.Tensor]:
    return {name: value[:, :1] for name, value in tensors.items()}


def wrong_deltas(sup: randes.Superposition) -> None:
    sup.deltas = {0: narrow(sup.deltas[0])}


def wrong_averages(sup: randes.Superposition) -> None:
    sup.averages = {WEIGHT: torch.zeros(1, dtype=torch.int64)}


def wrong_kept(sup: randes.Superposition) -> None:
    member = sup.members["m0"]
    sup.members["m0"] = replace(member, kept={name: value.double() for name, value in member.kept.items()})


def wrong_coordinates(sup: randes.Superposition) -> None:
    sup.members["m0"] = replace(sup.members["m0"], coordinates=narrow(sup.members["m0"].coordinates))


def no_coordinates(sup: randes.Superposition) -> None:
    sup.members["m0"] = replace(sup.members["m0"], units={})


def too_many_units(sup: randes.Superposition) -> None:
    sup.members["m0"].units["nothing"] = 1.0  # type: ignore[index]


APART: dict[str, tuple[dict[str, Any], Callable[[randes.Superposition], None], str]] = {
    "deltas": ({}, wrong_deltas, "in group 0 must be .* torch.int16, got"),
    "averages": ({"others": "average"}, wrong_averages, "the average of .* must be"),
    "kept": ({}, wrong_kept, "of model 'm0' must be .* torch.float32, got .* torch.float64"),
    "coordinates": ({"rank": 4}, wrong_coordinates, "coordinates of .* must be"),
    "no coordinates": ({"rank": 4}, no_coordinates, "must have coordinates in the basis of"),
    "units": ({"rank": 4}, too_many_units, "must have a basis of nothing"),
}


@pytest.mark.parametrize("what", APART)
def test_parts_that_do_not_go_together_are_named(what: str) -> None:
    config, change, said = APART[what]
    base = net()
    sup = randes.compress(base, {f"m{number}": finetune(base, number) for number in range(2)}, randes.Config(**config))
    check_whole(sup)
    change(sup)
    with pytest.raises(ValueError, match=said):
        check_whole(sup)


@pytest.mark.parametrize("bits", [8, 4])
def test_packed_rows_are_those_of_their_tensor(bits: int) -> None:
    sup = made().pack(bits)
    check_whole(sup)
    sup.few_bits = {
        0: {
            name: held._replace(words=held.words[:1], steps=held.steps[:, :1]) for name, held in sup.few_bits[0].items()
        }
    }
    with pytest.raises(ValueError, match=rf"must have \d+ packed rows in {bits} bits, got"):
        check_whole(sup)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_companion_that_was_altered_or_is_gone_is_refused(name: str, store: Path) -> None:
    (store / name).write_bytes(b'{"a": 1}')
    with pytest.raises(StoreError, match=f"{name} was altered or is missing"):
        randes.Superposition.load(store)
    (store / name).unlink()
    with pytest.raises(StoreError, match=f"{name} was altered or is missing"):
        randes.Superposition.load(store)


def test_a_companion_without_end_is_not_read(store: Path) -> None:
    with (store / "tokenizer.json").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(StoreError, match=r"is not whole: .* must have at most"):
        randes.Superposition.load(store)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "it has no manifest.json"),
        ("{", "is torn: "),
        ('{"format": "other"}', "is not a manifest of randes"),
        ('{"format": "randes", "version": 3}', "version 1 or 2, got 3"),
        ('{"format": "randes", "version": 1}', "its checksum does not match"),
    ],
)
def test_a_manifest_of_something_else_is_refused_by_what_it_is(text: str | None, said: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(StoreError, match=said):
        randes.Superposition.load(tmp_path)


def test_tensors_of_other_names_than_the_manifest_says_are_refused(store: Path) -> None:
    first, second = next(store.glob("group-0-*")), next(store.glob("model-*"))
    first.write_bytes(second.read_bytes())
    with pytest.raises(StoreError, match="must hold"):
        randes.Superposition.load(store)


# ---------------------------------------------------------------- where a store goes


def test_a_folder_that_is_taken_is_refused(store: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StoreError, match="must be a folder, got a file"):
        check_new(tmp_path / "file")
    with pytest.raises(StoreError, match="must be empty or a store, got"):
        made().save(tmp_path)
    with pytest.raises(StoreError, match="was written since, or is another's"):
        made(seed=1).save(store)
    with pytest.raises(StoreError, match="a store of another base"):
        superposed(net(1), 1)[0].save(store)


def test_what_a_save_that_was_cut_short_has_left_is_written_over(store: Path, tmp_path: Path) -> None:
    whole = content(store)
    (store / MANIFEST).unlink()
    sup = made()
    sup.model_files = {"config.json": b"{}", "tokenizer.json": b"[]"}
    sup.save(store)
    assert content(store).keys() == whole.keys()
    assert (store / "tokenizer.json").read_bytes() == b"[]"


@pytest.mark.parametrize("others", ["keep", "average"])
def test_what_was_changed_is_read_from_the_new_files(others: str, tmp_path: Path) -> None:
    made(others=others, group_size=1).save(tmp_path)
    sup = randes.Superposition.load(tmp_path)
    tuned = finetune(net(), 2)
    sup.add("m2", tuned)
    sup.save(tmp_path)
    again = randes.Superposition.load(tmp_path).retrieve("m2")
    assert all(torch.equal(value, again[name]) for name, value in sup.retrieve("m2").items())


def test_a_full_disk_leaves_no_new_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("randes.superposition.store.write.write_whole", full)
    with pytest.raises(OSError, match="No space left"):
        made().save(tmp_path / "store")
    assert not [*(tmp_path / "store").iterdir()]


def test_a_tie_of_what_is_not_there_is_refused() -> None:
    sup = made()
    sup.layout = replace(sup.layout, ties={"alias": "nothing"})
    with pytest.raises(ValueError, match="alias must be another name of a tensor that is there, got nothing"):
        check_whole(sup)


def test_added_rows_are_what_the_record_says(tmp_path: Path) -> None:
    base = net()
    longer = dict(finetune(base, 0).state_dict())
    longer[WEIGHT] = torch.cat([longer[WEIGHT], torch.ones(3, longer[WEIGHT].shape[1])])
    sup = randes.Superposition.create(base)
    sup.add("m", longer)
    sup.save(tmp_path / "store")
    again = randes.Superposition.load(tmp_path / "store")
    assert torch.equal(again.retrieve("m")[WEIGHT][-3:], longer[WEIGHT][-3:])
    member = again.members["m"]
    rows = member.added[WEIGHT]
    for wrong, message in (
        ({}, "must have added rows and their digest"),
        ({WEIGHT: rows[:0]}, "must have added rows"),
        ({WEIGHT: rows[:, :1]}, f"rows added to {WEIGHT} of model 'm' must be"),
        ({WEIGHT: rows.double()}, f"rows added to {WEIGHT} of model 'm' must be"),
        ({WEIGHT: rows, "other": rows}, "must have added rows and their digest"),
    ):
        again.members["m"] = replace(member, added=wrong)
        with pytest.raises(ValueError, match=message):
            check_whole(again)


def test_one_saves_at_a_time_and_again_within(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="is not a store: there is no such folder"), alone(tmp_path / "nothing"):
        pass
    waits, done = threading.Event(), threading.Event()

    def other() -> None:
        with alone(tmp_path, waiting=waits.set):
            done.set()

    with alone(tmp_path), alone(tmp_path):
        thread = threading.Thread(target=other)
        thread.start()
        assert waits.wait(30)
        assert not done.is_set()
    thread.join(30)
    assert done.is_set()
