"""A store of which any bit was flipped gives what it held, or raises: with every way of reading it."""

import json
import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from models import content, finetune, net
from torch import Tensor
from typer.testing import CliRunner

import randes
from randes.checkpoints.lazy_tensors import digests
from randes.checkpoints.on_disk import Overlay, check, in_files, known_digests, open_file, own, unchecked
from randes.checkpoints.sources import write_file
from randes.cli import app
from randes.superposition.retrieve import Retrieved
from randes.superposition.summary import verify

FLIPS = 5
"""Bits of each file, one at a time: some in the header of it, the others anywhere."""
STORES = {
    "integers": (randes.Config(rank=0), None),
    "a basis, centred": (randes.Config(rank=6, centre=True), None),
    "averages": (randes.Config(others="average", group_size=2, rank=0), None),
    "8 bits": (randes.Config(rank=0), (8, 16)),
    "4 bits, a basis in 8": (randes.Config(rank=6), (4, 8)),
    "2 bits, a basis in 4, averages": (randes.Config(rank=6, others="average", group_size=2), (2, 4)),
}


@pytest.fixture(params=STORES.values(), ids=STORES)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Three models; the checkpoint of ``m1`` lies beside."""
    config, packing = request.param
    base = net()
    models = {f"m{seed}": finetune(base, seed) for seed in range(3)}
    sup = randes.compress(base, models, config)
    if packing is not None:
        sup = sup.pack(packing[0], coordinates=packing[1])
    sup.save(tmp_path / "store")
    write_file(tmp_path / "m1.safetensors", models["m1"].state_dict())
    return tmp_path / "store"


def damaged(store: Path) -> Iterator[str]:
    """Each file of the store with one bit flipped, and then as it was."""
    chosen = random.Random(0)
    for name, whole in content(store).items():
        header = 8 + struct.unpack("<Q", whole[:8])[0] if name.endswith("safetensors") else len(whole)
        data = [chosen.randrange(header, len(whole)) for _ in range(FLIPS)] if header < len(whole) else []
        for position in [*(chosen.randrange(header) for _ in range(FLIPS // 2)), *data, len(whole) - 1]:
            altered = bytearray(whole)
            altered[position] ^= 1 << chosen.randrange(8)
            (store / name).write_bytes(altered)
            yield f"{name}, byte {position} of {len(whole)}"
        (store / name).write_bytes(whole)


def loaded(store: Path) -> dict[str, Tensor]:
    return randes.Superposition.load(store).retrieve("m1")


def retrieved(store: Path) -> dict[str, Tensor]:
    return randes.Superposition.load(store, check=False).retrieve("m1")


def one_by_one(store: Path) -> dict[str, Tensor]:
    """Without asking the superposition for a check of anything."""
    sup = randes.Superposition.load(store, check=False)
    return dict(Retrieved(sup, "m1"))


def verified(store: Path) -> dict[str, Tensor]:
    sup = randes.Superposition.load(store, check=False)
    found = verify(sup, "m1", store.parent / "m1.safetensors")
    return {"errors": torch.tensor([found.relative_error, found.predicted_error, *found.tensors.values()])}


@pytest.mark.no_cover
@pytest.mark.parametrize("read", [loaded, retrieved, one_by_one, verified])
def test_a_flipped_bit_is_an_error_or_changes_nothing(store: Path, read: Callable[[Path], dict[str, Tensor]]) -> None:
    whole, refused = read(store), 0
    for what in damaged(store):
        try:
            found = read(store)
        except randes.StoreError:
            refused += 1
            continue
        assert found.keys() == whole.keys(), what
        assert all(torch.equal(found[tensor], value) for tensor, value in whole.items()), what
    assert refused


def test_the_command_line_refuses_what_it_would_use(tmp_path: Path) -> None:
    base = net()
    models = {f"m{seed}": finetune(base, seed) for seed in range(3)}
    randes.compress(base, models, randes.Config(rank=6, group_size=2)).pack(4).save(tmp_path / "store")
    write_file(tmp_path / "m1.safetensors", models["m1"].state_dict())
    retrieving = ["retrieve", str(tmp_path / "store"), "m1", "--out", str(tmp_path / "out.safetensors")]
    verifying = ["verify", str(tmp_path / "store"), f"m1={tmp_path / 'm1.safetensors'}"]
    used = {
        path
        for path in (tmp_path / "store").glob("*.safetensors")
        if path.name.startswith(("base", "basis", "group-0"))
    }
    assert len(used) == 3
    for path in sorted(used):
        whole = path.read_bytes()
        path.write_bytes(whole[:-9] + bytes([whole[-9] ^ 4]) + whole[-8:])
        for arguments in (retrieving, verifying):
            found = CliRunner().invoke(app, arguments)
            assert found.exit_code == 2
            assert "was altered: the checksum of" in found.output
            assert not (tmp_path / "out.safetensors").exists()
        path.write_bytes(whole)
    assert CliRunner().invoke(app, retrieving).exit_code == 0


def test_one_model_is_retrieved_without_reading_other_groups(tmp_path: Path) -> None:
    base = net()
    sup = randes.compress(
        base, {f"m{seed}": finetune(base, seed) for seed in range(4)}, randes.Config(group_size=2, rank=0)
    )
    for number, saved in enumerate((sup, sup.pack(4))):
        saved.save(store := tmp_path / str(number))
        other = next(store.glob("group-1-*"))
        other.write_bytes(other.read_bytes()[:-1] + b"?")
        again = randes.Superposition.load(store, check=False)
        assert all(torch.equal(value, saved.retrieve("m1")[tensor]) for tensor, value in again.retrieve("m1").items())
        with pytest.raises(randes.StoreError, match="was altered"):
            again.retrieve("m2")


def test_what_was_found_right_before_its_file_changed_is_looked_at_again(tmp_path: Path) -> None:
    write_file(path := tmp_path / "two.safetensors", {"a": torch.zeros(4), "b": torch.zeros(4)})
    tensors = open_file(path)
    tensors.expect(digests(tensors), lambda _, name: randes.CheckpointError(name))
    with path.open("r+b") as file:
        file.seek(-32, 2)
        file.write(b"??" * 16)
    for name in ("a", "a"):
        with pytest.raises(randes.CheckpointError, match=name):
            tensors.check()
    with pytest.raises(randes.CheckpointError, match="b"):
        tensors["b"]


def test_a_file_that_ends_too_soon_is_said_to_have_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_file(path := tmp_path / "w.safetensors", {"w": torch.zeros(4)})
    tensors = open_file(path)
    monkeypatch.setattr("os.preadv", lambda *_: 0)
    for read in (lambda: tensors["w"], lambda: tensors.rows("w", 0, 1)):
        with pytest.raises(randes.CheckpointError, match=r"w in .* was changed"):
            read()
    with pytest.raises(randes.CheckpointError, match="is not a whole safetensors file: it ends too soon"):
        open_file(path)


def test_a_dtype_that_the_format_lacks_is_named_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(randes.CheckpointError, match="w must be of a dtype that safetensors has, got"):
        write_file(tmp_path / "w.safetensors", {"w": torch.zeros(4, dtype=torch.complex128)})
    assert not [*tmp_path.iterdir()]


def replaced(path: Path, how: str) -> None:
    """Put something in the place of a file of two tensors of four zeros."""
    zeros = torch.zeros(4)
    path.unlink()
    if how == "another shape":
        write_file(path, {"a": zeros, "b": zeros[:2]})
    elif how == "one tensor":
        write_file(path, {"a": zeros})
    elif how == "no file":
        path.mkdir()
    elif how == "other values":
        write_file(path, {"a": zeros, "b": zeros + 1})
    elif how == "the same":
        write_file(path, {"a": zeros, "b": zeros})


@pytest.mark.parametrize("how", ["another shape", "one tensor", "no file", "other values", "the same", "nothing"])
def test_a_file_in_the_place_of_another_is_that_one_or_refused(how: str, tmp_path: Path) -> None:
    write_file(path := tmp_path / "two.safetensors", {"a": torch.zeros(4), "b": torch.zeros(4)})
    tensors = open_file(path)
    tensors.expect(digests(tensors), lambda path, _: randes.CheckpointError(f"{path} is another"))
    replaced(path, how)
    if how in ("the same", "nothing"):  # a file that was deleted is read on
        check(tensors)
        assert torch.equal(tensors["b"], torch.zeros(4))
    else:
        with pytest.raises(randes.CheckpointError, match="is another"):
            check(tensors)


def test_what_was_written_to_since_it_was_found_right_is_not_read(tmp_path: Path) -> None:
    write_file(path := tmp_path / "one.safetensors", {"a": torch.zeros(4)})
    tensors = open_file(path)
    with path.open("ab") as file:
        file.write(b"more")
    for read in (lambda: tensors["a"], lambda: tensors.rows("a", 0, 1)):
        with pytest.raises(randes.CheckpointError, match=r"a in .* was changed"):
            read()


def test_what_is_held_lies_over_what_is_in_files(tmp_path: Path) -> None:
    write_file(path := tmp_path / "two.safetensors", {"a": torch.zeros(4), "b": torch.ones(4)})
    tensors = open_file(path)
    both = Overlay({"b": torch.full((4,), 2.0)}, tensors)
    both["c"] = torch.full((4,), 3.0)
    values = {"a": 0.0, "b": 2.0, "c": 3.0}
    for name, value in values.items():
        expected = torch.full((4,), value)
        assert torch.equal(both[name], expected)
        assert torch.equal(both.rows(name, 1, 3), expected[1:3])
        assert torch.equal(own(both, name), expected)
        assert torch.equal(torch.cat([*both.chunks(name)]), expected)
    assert known_digests(both) == digests({name: torch.full((4,), value) for name, value in values.items()})
    assert in_files(both)
    assert not in_files({"a": torch.zeros(4)})
    assert unchecked(both) == 0
    known = tensors.held_to(digests(tensors), lambda *_: randes.CheckpointError())
    assert unchecked(known) == 32
    assert known_digests(known) == known.known
    for name in ("a", "b"):
        del both[name]
    assert {*both} == {"c"}
    for missing in (lambda: both["a"], lambda: both.__delitem__("a")):
        with pytest.raises(KeyError):
            missing()


@pytest.mark.parametrize("start", [b"\x80\x02", b"PK\x03\x04"])
def test_a_pickle_is_named_as_one(start: bytes, tmp_path: Path) -> None:
    (path := tmp_path / "w.bin").write_bytes(start)
    with pytest.raises(randes.CheckpointError, match="is a pickle, which can run code"):
        open_file(path)


def test_a_tensor_without_numbers_is_read(tmp_path: Path) -> None:
    write_file(tmp_path / "empty.safetensors", {"none": torch.empty(0, 3), "some": torch.ones(2)})
    held = open_file(tmp_path / "empty.safetensors")
    assert held["none"].shape == (0, 3)
    assert held.rows("none", 0, 0).shape == (0, 3)


def test_a_header_is_json_as_the_format_has_it(tmp_path: Path) -> None:
    write_file(path := tmp_path / "w.safetensors", {"w": torch.zeros(4)})
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length]) | {"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}
    header["w"]["more"] = float("nan")  # which the format's own reader refuses, in a part that nobody uses
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    with pytest.raises(randes.CheckpointError, match="its header must be JSON, got the number NaN"):
        open_file(path)
