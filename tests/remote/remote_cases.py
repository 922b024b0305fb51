"""What holds wherever checkpoints and stores are: asked of memory by ``test_memory.py``, and of a server that speaks S3
by ``python tests/remote s3``, each of which has a fixture ``address`` of its own."""

import json
import os
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from corpus import GPT2
from models import content, finetune, net, stored
from torch import nn
from typer.testing import CliRunner

import randes
from randes.checkpoints.lora import ADAPTER_CONFIG, WEIGHTS
from randes.checkpoints.remote import tensors
from randes.checkpoints.remote.locations import Remote, location
from randes.checkpoints.safetensors import write_file
from randes.cli import app
from randes.errors import CheckpointError, StoreError
from randes.superposition.store.files import by_stem
from randes.superposition.store.manifest import MANIFEST

SIZE = 8000
FEW = 1 << 16
"""Bytes of fetched tensors that are held, where they are to be fetched again."""


def at(address: str) -> Remote:
    found = location(address)
    assert isinstance(found, Remote)
    return found


def put(address: str, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        put_bytes(at(address) / name, data)


def put_bytes(place: Remote, data: bytes) -> None:
    import tempfile

    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        place.put(file.name)


def found_at(address: str) -> dict[str, bytes]:
    return {one.name: one.read_bytes() for one in at(address).iterdir()}


def written(model: nn.Module, file: Path) -> bytes:
    write_file(file, model.state_dict())
    return file.read_bytes()


@pytest.fixture
def here(tmp_path: Path) -> dict[str, Any]:
    """A base and fine-tunes of each form, in files here."""
    base = net()
    for name, model in {"base": base, **{f"m{number}": finetune(base, number) for number in range(3)}}.items():
        write_file(tmp_path / f"{name}.safetensors", model.state_dict())
    state, shards = finetune(base, 3).state_dict(), tmp_path / "shards"
    shards.mkdir()
    names = sorted(state)
    parts = {"model-1.safetensors": names[:9], "model-2.safetensors": names[9:]}
    for file, own in parts.items():
        write_file(shards / file, {name: state[name] for name in own})
    index = {"metadata": {}, "weight_map": {name: file for file, own in parts.items() for name in own}}
    (shards / "model.safetensors.index.json").write_text(json.dumps(index))
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    pair = {"lora_A": torch.full((2, 32), 0.1), "lora_B": torch.full((48, 2), 0.1)}
    write_file(adapter / WEIGHTS, {f"base_model.model.layers.0.up.{k}.weight": v for k, v in pair.items()})
    (adapter / ADAPTER_CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
    forms = {name: f"{name}.safetensors" for name in ("m0", "m1", "m2")} | {"shards": "shards", "adapter": "adapter"}
    return {"folder": tmp_path, "base": "base.safetensors", "models": forms}


@pytest.fixture
def there(here: dict[str, Any], address: str) -> str:
    """The address that the same files were put to."""
    for name, data in content(here["folder"]).items():
        put_bytes(at(address) / name, data)
    return address


def compressed(here: dict[str, Any], where: str | Path, **how: Any) -> randes.Superposition:
    models = {name: f"{where}/{path}" for name, path in here["models"].items()}
    return randes.compress(f"{where}/{here['base']}", models, randes.Config(group_size=2, **how))


@pytest.fixture
def store(address: str) -> str:
    base = net()
    models = {f"m{number}": finetune(base, number) for number in range(4)}
    sup = randes.compress(base, models, randes.Config(group_size=2, rank=0))
    sup.save(f"{address}/a store", shard_size=SIZE)
    return f"{address}/a store"


# ---------------------------------------------------------------- the same as here


@pytest.mark.parametrize("shard_size", [0, SIZE])
def test_what_is_made_of_files_elsewhere_is_the_store_made_here(
    shard_size: int, here: dict[str, Any], there: str, tmp_path: Path
) -> None:
    own = compressed(here, here["folder"])
    own.save(tmp_path / "store", shard_size=shard_size)
    compressed(here, there).save(f"{there}/store", shard_size=shard_size)
    assert found_at(f"{there}/store") == content(tmp_path / "store")
    loaded = randes.Superposition.load(f"{there}/store")
    for name in own.names:
        expected = own.retrieve(name)
        assert all(torch.equal(value, expected[tensor]) for tensor, value in loaded.retrieve(name).items())
    assert stored(loaded, tmp_path / "brought here") == content(tmp_path / "store")


def test_models_are_added_and_removed_and_what_is_old_is_removed(
    here: dict[str, Any], there: str, tmp_path: Path
) -> None:
    store = f"{there}/store"
    compressed(here, there).save(store, shard_size=SIZE)
    sup = randes.Superposition.load(store)
    sup.remove("m1", f"{there}/m1.safetensors")
    sup.save(store)
    sup.add("again", f"{there}/m1.safetensors")
    sup.save(store)
    own = compressed(here, here["folder"])
    own.remove("m1", here["folder"] / "m1.safetensors")
    own.add("again", here["folder"] / "m1.safetensors")
    own.save(tmp_path / "store", shard_size=SIZE)
    assert found_at(store) == content(tmp_path / "store")


def test_the_command_line_takes_addresses(here: dict[str, Any], there: str, tmp_path: Path) -> None:
    def run(*arguments: object) -> str:
        found = CliRunner().invoke(app, list(map(str, arguments)))
        assert found.exit_code == 0, found.output
        return found.stdout

    store, base = f"{there}/store", f"{there}/base.safetensors"
    models = [part for name in ("m0", "m1") for part in ("--model", f"{name}={there}/{name}.safetensors")]
    run("compress", "--base", base, *models, "--out", store, "--shard-size", "8kB", "--min-width", 16)
    run("add", store, f"shards={there}/shards")
    run("remove", store, f"m0={there}/m0.safetensors")
    assert json.loads(run("info", store, "--json"))["models"].keys() == {"m1", "shards"}
    assert "kept tensors       exact" in run("verify", store, f"m1={there}/m1.safetensors")
    run("report", store, "--out", tmp_path / "report.html", "--model", f"m1={there}/m1.safetensors")
    run("pack", store, "--out", f"{there}/packed")
    assert randes.Superposition.load(f"{there}/packed").packing is not None
    run("retrieve", store, "m1", "--out", f"{there}/out.safetensors")
    run("retrieve", store, "m1", "--out", tmp_path / "out.safetensors")
    assert (at(there) / "out.safetensors").read_bytes() == (tmp_path / "out.safetensors").read_bytes()
    assert json.loads(run("plan", "--base", base, "--models", 4, "--json"))[0]["bits"] == 16
    taken = CliRunner().invoke(app, ["compress", "--base", base, *models, "--out", store])
    assert taken.exit_code == 2
    assert "must not hold a store yet" in taken.output


def test_a_transformers_model_is_served_from_elsewhere(address: str, tmp_path: Path) -> None:
    import transformers

    torch.manual_seed(0)
    base = transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2)).eval()
    base.save_pretrained(tmp_path / "base")
    put(f"{address}/base", content(tmp_path / "base"))
    own = randes.Superposition.create(tmp_path / "base")
    sup = randes.Superposition.create(f"{address}/base")
    for one in (own, sup):
        one.add("m", finetune(base, 1))
    own.save(tmp_path / "store", shard_size=20000)
    sup.save(f"{address}/store", shard_size=20000)
    assert found_at(f"{address}/store") == content(tmp_path / "store")
    ids, expected = torch.tensor([[1, 2, 3]]), randes.from_pretrained(tmp_path / "base", own)
    for model in (
        randes.from_pretrained(f"{address}/store"),
        randes.from_pretrained(f"{address}/base", f"{address}/store"),
        randes.load(f"{address}/store", transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2)).eval()),
    ):
        for name in ("m", "__base__"):
            with torch.no_grad(), model.using([name]), expected.using([name]):
                assert torch.equal(model(input_ids=ids).logits, expected(input_ids=ids).logits)


# ---------------------------------------------------------------- by ranges of bytes, each checked


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """Which bytes of which files are asked for."""
    found: list[tuple[str, int, int]] = []
    own = Remote.ranges

    def ranges(self: Remote, bounds: list[tuple[int, int]]) -> list[bytes]:
        found.extend((self.name, start, end) for start, end in bounds)
        return own(self, bounds)

    monkeypatch.setattr(Remote, "ranges", ranges)
    return found


def test_only_what_is_used_is_fetched_and_once(
    store: str, reads: list[tuple[str, int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensors, "HEAD", 8)
    monkeypatch.setattr(tensors, "RANGE", 1000)
    sup = randes.Superposition.load(store, check=False)
    reads.clear()
    first = sup.retrieve("m0")
    asked = list(reads)
    assert asked
    assert {name.rsplit("-", 1)[0] for name, *_ in asked} <= {
        "base",
        "group-0",
        next(stem for stem in by_stem(name for name, *_ in asked) if stem.startswith("model-")),
    }
    assert all(end - start <= 1000 for _, start, end in asked)
    assert len({*asked}) == len(asked)
    again = sup.retrieve("m0")
    assert reads == asked  # what was fetched is held here
    assert all(torch.equal(value, again[tensor]) for tensor, value in first.items())


def one_of_each(files: dict[str, bytes]) -> dict[str, bytes]:
    """A file of each kind."""
    return {name: files[name] for name in {name.split("-", 1)[0]: name for name in files}.values()}


def test_a_file_that_was_altered_is_refused_when_it_is_used(store: str) -> None:
    whole = found_at(store)
    for name, data in one_of_each(whole).items():
        put_bytes(at(store) / name, data[:-3] + b"???")
        with pytest.raises(StoreError):
            randes.Superposition.load(store)
        put_bytes(at(store) / name, data)
    stem = "group-1"
    name = next(name for name in whole if name.startswith(stem))
    put_bytes(at(store) / name, whole[name][:-3] + b"???")
    sup = randes.Superposition.load(store, check=False)
    sup.retrieve("m0")
    with pytest.raises(StoreError, match="was altered"):
        sup.retrieve("m2")


@pytest.mark.parametrize("cut", [0, 5, 300, -1])
def test_a_file_that_is_cut_short_or_gone_is_refused(cut: int, store: str) -> None:
    for name, data in one_of_each(found_at(store)).items():
        if len(data) > cut:
            put_bytes(at(store) / name, data[:cut])
            with pytest.raises(StoreError):
                randes.Superposition.load(store)
        (at(store) / name).unlink()
        with pytest.raises(StoreError):
            randes.Superposition.load(store)
        put_bytes(at(store) / name, data)
    assert randes.Superposition.load(store).names == ["m0", "m1", "m2", "m3"]


def test_what_was_found_right_stays_so_or_is_refused(store: str) -> None:
    """What lies there is replaced after it was checked: what is held here is used, and nothing else is taken for it."""
    sup = randes.Superposition.load(store)
    before = sup.retrieve("m0")
    for name, data in found_at(store).items():
        if name.endswith(".safetensors"):
            put_bytes(at(store) / name, data[:-9] + b"?" * 9)
    again = sup.retrieve("m0")
    assert all(torch.equal(value, again[tensor]) for tensor, value in before.items())
    for number, _ in list(tensors.fetched._held):
        tensors.fetched.forget(number)
    assert tensors.fetched.nbytes == 0
    with pytest.raises(StoreError, match="was altered"):
        sup.retrieve("m0")


def test_what_was_removed_before_it_was_fetched_is_refused(store: str) -> None:
    sup = randes.Superposition.load(store, check=False)
    for one in at(store).iterdir():
        one.unlink()
    with pytest.raises(StoreError, match="was altered"):
        sup.retrieve("m0")


def test_what_there_is_no_room_for_is_fetched_again(
    store: str, reads: list[tuple[str, int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = randes.Superposition.load(store).retrieve("m3")
    monkeypatch.setattr(tensors, "ROOM", FEW)
    sup = randes.Superposition.load(store)
    for _ in range(2):
        found = sup.retrieve("m3")
        assert all(torch.equal(value, expected[tensor]) for tensor, value in found.items())
        assert tensors.fetched.nbytes <= FEW
    bodies = [read for read in reads if read[1]]
    assert len({*bodies}) < len(bodies)


def test_a_fine_tune_that_changes_while_it_is_read_is_refused(there: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sup = randes.Superposition.create(f"{there}/base.safetensors")
    monkeypatch.setattr(tensors, "ROOM", 0)
    own, seen, path = Remote.ranges, count(), at(there) / "m0.safetensors"
    data = path.read_bytes()

    def ranges(self: Remote, bounds: list[tuple[int, int]]) -> list[bytes]:
        if self == path and next(seen) == 12:
            put_bytes(path, bytes(byte ^ 1 if place > 4000 else byte for place, byte in enumerate(data)))
        return own(self, bounds)

    monkeypatch.setattr(Remote, "ranges", ranges)

    def use() -> None:
        for _ in range(3):
            sup.add("m", str(path))
            sup.remove("m", str(path))

    with pytest.raises(CheckpointError, match="was changed"):
        use()
    assert sup.names in ([], ["m"])


# ---------------------------------------------------------------- writing


def test_a_save_that_fails_at_any_file_leaves_the_old_store_or_the_new_one(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = net()
    sup = randes.compress(base, {f"m{number}": finetune(base, number) for number in range(2)}, randes.Config(rank=0))
    store = f"{address}/store"
    sup.save(store, shard_size=SIZE)
    old = found_at(store)
    changed = randes.Superposition.load(store)
    changed.add("m2", finetune(base, 2))
    changed.shard_size = SIZE
    new = stored(changed, tmp_path / "new")
    steps = 0
    for last in range(1, 100):
        for name in found_at(store).keys() - old.keys():
            (at(store) / name).unlink()
        put(store, old)
        with monkeypatch.context() as patch:
            calls = count(1)

            def failing(call: Callable[..., Any]) -> Callable[..., Any]:
                def one(self: Remote, *given: Any, **how: Any) -> Any:
                    if next(calls) >= last:  # noqa: B023
                        raise OSError(f"{self} could not be reached")
                    return call(self, *given, **how)

                return one

            for name in ("put", "unlink"):
                patch.setattr(Remote, name, failing(getattr(Remote, name)))
            changed = randes.Superposition.load(store)
            changed.add("m2", finetune(base, 2))
            try:
                changed.save(store)
            except OSError:
                steps += 1
        names = randes.Superposition.load(store).names
        found = found_at(store)
        expected = new if names == ["m0", "m1", "m2"] else old
        assert names in (["m0", "m1"], ["m0", "m1", "m2"])
        assert expected.items() <= found.items()
        changed.save(store)
        assert found_at(store) == new
        if next(calls) <= last:
            break
    assert steps >= 5


def test_a_store_that_somebody_else_wrote_to_is_not_written_over(store: str) -> None:
    first, second = randes.Superposition.load(store), randes.Superposition.load(store)
    first.add("first", finetune(net(), 11))
    first.save(store)
    second.add("second", finetune(net(), 12))
    with pytest.raises(StoreError, match="was written since"):
        second.save(store)
    assert "first" in randes.Superposition.load(store).names


def test_what_holds_something_else_is_not_written_to(address: str) -> None:
    put(f"{address}/taken", {"thesis.tex": b"years of work"})
    sup = randes.Superposition.create(net())
    with pytest.raises(StoreError, match="must be empty or a store, got"):
        sup.save(f"{address}/taken")
    with pytest.raises(StoreError, match="must be a folder, got a file"):
        sup.save(f"{address}/taken/thesis.tex")
    assert found_at(f"{address}/taken") == {"thesis.tex": b"years of work"}


# ---------------------------------------------------------------- what is said


def test_an_address_of_nothing_is_said(address: str) -> None:
    with pytest.raises(CheckpointError, match=r"nothing.safetensors does not exist"):
        randes.Superposition.create(f"{address}/nothing.safetensors")
    with pytest.raises(CheckpointError, match="nothing does not exist"):
        randes.Superposition.create(f"{address}/nothing")
    with pytest.raises(StoreError, match=r"is not a store: it has no manifest.json"):
        randes.Superposition.load(f"{address}/nothing")
    put(f"{address}/pickled", {"pytorch_model.bin": b"\x80\x04"})
    with pytest.raises(CheckpointError, match="but pickles"):
        randes.Superposition.create(f"{address}/pickled")
    put(f"{address}/other", {"model.safetensors": b"\x80\x04" * 9, MANIFEST: b"{}"})
    with pytest.raises(CheckpointError, match="is a pickle"):
        randes.Superposition.create(f"{address}/other")


def test_an_address_is_given_as_a_text(address: str) -> None:
    with pytest.raises(CheckpointError, match="an address must be given as a text, got a Path"):
        randes.Superposition.load(Path(address))
    assert os.fspath(at(address)) == address
