"""Models larger than memory: what is read, when, how much of it is held, and what an error on the way leaves behind."""

import gc
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from models import finetune, linear, net, stored, uses
from safetensors.torch import save_file
from torch import Tensor

import randes
from randes.checkpoints import lazy_tensors, safetensors, sources
from randes.checkpoints.lazy_tensors import chunks, digests
from randes.checkpoints.threads import AHEAD, ahead, one_thread
from randes.superposition import update
from randes.superposition.basis.shared_basis import PASSES
from randes.superposition.summary import verify


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts and slices of a few rows, so that small tensors have many of them."""
    monkeypatch.setattr(lazy_tensors, "CHUNK_ELEMENTS", 300)
    monkeypatch.setattr(lazy_tensors, "SMALL", 0)


def on_disk(folder: Path, models: dict[str, torch.nn.Module]) -> dict[str, Path]:
    folder.mkdir(exist_ok=True)
    for name, model in models.items():
        save_file(model.state_dict(), folder / f"{name}.safetensors")
    return {name: folder / f"{name}.safetensors" for name in models}


# ---------------------------------------------------------------- reading ahead


def hundred(made: list[int]) -> Iterator[int]:
    """0 to 99, each put down in ``made`` when it is asked for."""
    for number in range(100):
        made.append(number)
        yield number


def test_values_come_in_order_and_a_few_ahead_only() -> None:
    made: list[int] = []
    with ahead(hundred(made)) as numbers:
        assert next(numbers) == 0
        time.sleep(0.05)
        assert len(made) <= 1 + AHEAD + 1
        assert list(numbers) == list(range(1, 100))
        assert list(numbers) == []


def test_what_one_thread_finds_wrong_ends_all_digests() -> None:
    tensors = {f"t{number}": torch.zeros(1 << 18) for number in range(8)}
    looked = []

    def look(name: str, part: Tensor) -> None:
        looked.append(name)
        if name == "t1":
            raise randes.CheckpointError("t1 is wrong")

    with pytest.raises(randes.CheckpointError, match="t1 is wrong"):
        digests(tensors, look=look)
    assert "t1" in looked


def test_an_error_comes_where_its_value_would_have_and_threads_end() -> None:
    def values() -> Iterator[int]:
        yield 1
        raise OSError("unreadable")

    before = threading.active_count()
    with ahead(values()) as numbers:
        assert next(numbers) == 1
        for _ in range(2):
            with pytest.raises(OSError, match="unreadable"):
                next(numbers)
    with ahead(iter(range(10**9))) as numbers:
        assert next(numbers) == 0
    assert threading.active_count() == before


def test_room_is_made_by_who_takes_the_values() -> None:
    made: list[int] = []
    room = threading.Semaphore(3)
    with ahead(hundred(made), room) as numbers:
        assert [next(numbers) for _ in range(3)] == [0, 1, 2]
        time.sleep(0.05)
        assert len(made) == 4  # the last waits for its place
        room.release()
        assert next(numbers) == 3


def test_another_thread_that_waits_for_a_value_is_told_that_none_comes() -> None:
    with ThreadPoolExecutor(1) as threads:
        with ahead(iter([1]), threading.Semaphore(0)) as numbers:
            waiting = threads.submit(next, numbers)
            time.sleep(0.05)
            assert not waiting.done()
        with pytest.raises(CancelledError):
            waiting.result(timeout=10)


def test_one_thread_is_one_and_the_others_stay_as_they_were() -> None:
    def count() -> int:
        return torch.get_num_threads()

    before = count()
    try:
        torch.set_num_threads(3)
        with one_thread() as thread:
            assert thread.submit(count).result() == 1
            assert count() == 3
            with ThreadPoolExecutor(1) as new:
                assert new.submit(count).result() == 3
    finally:
        torch.set_num_threads(before)


def test_memory_is_used_again_once_nobody_holds_a_view_of_it() -> None:
    blocks = lazy_tensors.Blocks()
    shape, dtype = (512, 256), torch.bfloat16
    part = blocks.empty(shape, dtype)
    assert (part.shape, part.dtype) == (shape, dtype)
    part.fill_(1)
    view, address = part[3:5], part.data_ptr()
    del part
    other = blocks.empty(shape, dtype).fill_(2)
    assert other.data_ptr() != address
    assert view.eq(1).all()
    del view
    assert blocks.empty((300, 256), dtype).data_ptr() == address  # a shorter one fits
    assert blocks.empty((8, 256), dtype).data_ptr() != address
    held = [blocks.empty(shape, dtype) for _ in range(3 * lazy_tensors.KEPT)]
    assert len({part.data_ptr() for part in held}) == len(held)
    held.clear()
    assert len(blocks._free) == lazy_tensors.KEPT


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize(
    "shape", [(), (0,), (1,), (7,), (1000,), (33, 40), (3, 500), (5, 6, 70), (0, 4), (4, 0)], ids=str
)
def test_parts_make_the_tensor_and_its_digest(shape: tuple[int, ...], tmp_path: Path) -> None:
    value = torch.randn(shape)
    sources.write_file(tmp_path / "t.safetensors", {"t": value, "u": torch.zeros(3)})
    stored_there = sources.read(tmp_path / "t.safetensors")
    assert torch.equal(stored_there["t"], value)
    assert stored_there["t"].shape == shape
    assert torch.cat([part.flatten() for part in chunks(stored_there, "t")]).tolist() == value.flatten().tolist()
    assert digests(stored_there) == {"t": sources.digest(value), "u": sources.digest(torch.zeros(3))}


def test_a_tensor_is_the_same_object_while_somebody_holds_it(tmp_path: Path) -> None:
    paths = on_disk(tmp_path, {"m": net()})
    tensors = sources.read(paths["m"])
    first = tensors["head.weight"]
    assert tensors["head.weight"] is first
    place = first.data_ptr()
    del first
    gc.collect()
    assert tensors["head.weight"].data_ptr() is not place


# ---------------------------------------------------------------- the same bytes


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("config", [
    randes.Config(rank=0), randes.Config(permute=1, shuffle_layers=-1, rank=0), randes.Config(others="average", rank=0),
    randes.Config(centre=True, rank=0), randes.Config(rank=5), randes.Config(centre=True, rank=5, group_size=2),
], ids=str)  # fmt: skip
def test_from_disk_in_parts_the_store_is_that_from_memory(config: randes.Config, tmp_path: Path,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    base = net()
    models = {f"m{number}": finetune(base, number) for number in range(3)}
    paths = on_disk(tmp_path / "files", {"base": base, **models})
    found = randes.compress(paths.pop("base"), paths, config)
    added = finetune(base, 9)
    save_file(added.state_dict(), tmp_path / "added.safetensors")
    found.add("added", tmp_path / "added.safetensors")
    found.save(tmp_path / "found")
    again = randes.Superposition.load(tmp_path / "found")
    again.remove("m1", paths["m1"])
    removed = stored(again, tmp_path / "removed")
    retrieved = again.retrieve("m0")
    assert verify(again, "m0", paths["m0"]).kept_exact is True

    monkeypatch.undo()
    expected = randes.compress(base, models, config)
    expected.add("added", added)
    assert stored(expected, tmp_path / "expected") == {
        file.name: file.read_bytes() for file in (tmp_path / "found").iterdir()
    }
    expected.remove("m1", models["m1"])
    assert stored(expected, tmp_path / "expected removed") == removed
    for name, value in expected.retrieve("m0").items():
        torch.testing.assert_close(retrieved[name], value, rtol=0, atol=0 if not config.rank else 1e-6)


@pytest.mark.parametrize(("config", "passes"), [(randes.Config(rank=0), 0), (None, PASSES)], ids=["plain", "default"])
def test_to_compress_a_checkpoint_is_read_once_and_a_few_times_for_a_basis_and_its_bytes_are_counted(
    config: randes.Config | None, passes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = net()
    paths = on_disk(tmp_path, {"base": base, **{f"m{number}": finetune(base, number) for number in range(3)}})
    read: dict[str, int] = {}
    fill = safetensors.File._fill

    def counted(self: safetensors.File, memory: memoryview, offset: int) -> None:
        read[self.path.stem] = read.get(self.path.stem, 0) + len(memory)
        fill(self, memory, offset)

    monkeypatch.setattr(safetensors.File, "_fill", counted)
    stages: dict[str, list[int]] = {}

    def progress(stage: str, nbytes: int) -> Callable[[int], None]:
        stages[stage] = [nbytes]
        return stages[stage].append

    sup = randes.compress(paths.pop("base"), paths, config, progress=progress)
    matrices = sum(lazy_tensors.headers(sup.base)[name].nbytes for name in sup.superposed)
    kept = sum(value.nbytes for value in sup.members["m0"].kept.values())
    for name, path in paths.items():
        assert read[name] <= path.stat().st_size + passes * matrices + kept  # and what is kept, once more
    assert all(sum(done) == nbytes for nbytes, *done in stages.values())
    assert stages["superposing"][0] == 3 * sup.sizes.base
    assert stages.get("shared bases", [0])[0] == 3 * passes * matrices
    sup.save(tmp_path / "store", progress=progress)
    assert sum(stages["writing"][1:]) == stages["writing"][0] == sup.nbytes


# ---------------------------------------------------------------- what changes underneath


@pytest.mark.parametrize("replaced", [False, True])
def test_a_base_file_that_changes_underneath_is_noticed(replaced: bool, tmp_path: Path) -> None:
    base, tuned = linear(), finetune(linear(), 1)
    path = on_disk(tmp_path, {"base": base})["base"]
    sup = randes.Superposition.create(path)
    sup.add("m0", tuned)
    same = path.read_bytes()
    if replaced:
        sources.write_file(path, tuned.state_dict())
    else:
        save_file(tuned.state_dict(), path)
    for use in uses(sup, base, tuned, tmp_path / "store"):
        with pytest.raises(
            randes.BaseMismatchError, match="of the base was changed after the superposition was created"
        ):
            use()
    assert not (tmp_path / "store").exists()
    path.write_bytes(same)
    assert sup.retrieve("m0").keys() == base.state_dict().keys()


def test_a_base_that_is_shortened_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    path = on_disk(tmp_path, {"base": net()})["base"]
    tensors = sources.read(path)
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(randes.CheckpointError, match="was changed"):
        tensors["head.weight"]


class Unreadable(dict[str, Tensor]):
    """A checkpoint on a disk that fails at the n-th time of asking."""

    left = 10**9

    def __getitem__(self, name: str) -> Tensor:
        type(self).left -= 1
        if type(self).left == 0:
            raise OSError("the disk has gone")
        return super().__getitem__(name)


@pytest.mark.no_cover
@pytest.mark.parametrize("others", ["keep", "average"])
@pytest.mark.parametrize("loaded", [False, True])
def test_what_fails_at_any_reading_is_undone(loaded: bool, others: randes.config.Others, tmp_path: Path,
                                             monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    base = net()
    sup = randes.Superposition.create(base, randes.Config(others=others))
    sup.add("m0", finetune(base, 0))
    if loaded:
        sup.save(tmp_path / "store")
        sup = randes.Superposition.load(tmp_path / "store")
    before = stored(sup, tmp_path / "before")
    own = Unreadable(finetune(base, 1).state_dict())
    monkeypatch.setattr(sources, "read", lambda source, _=None: source)
    failures = 0
    for action in (sup.add, sup.remove):
        for left in range(1, 1000):
            Unreadable.left = left
            try:
                action("m1", own)
            except OSError:
                failures += 1
                if left % 7 == 0:
                    Unreadable.left = 10**9
                    held = stored(sup, tmp_path / f"{action.__name__}{left}")
                    assert (held == before) == (action == sup.add)
            else:
                break
    Unreadable.left = 10**9
    assert failures > 40
    assert stored(sup, tmp_path / "after") == before


def test_what_cannot_be_undone_is_used_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    base = net()
    sup = randes.Superposition.create(base)
    sup.add("m1", finetune(base, 1))
    works, left = update._superpose, 3

    def fails(*arguments: Any, **options: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError("the disk has gone")
        works(*arguments, **options)

    monkeypatch.setattr(randes.superposition.update, "_superpose", fails)
    with pytest.raises(randes.RandesError, match="must be loaded again: 'm2' is in part of it"):
        sup.add("m2", finetune(base, 2))
    monkeypatch.undo()
    with pytest.raises(randes.RandesError, match="must be loaded again: 'm2' is in part of it"):
        sup.retrieve("m1")


# ---------------------------------------------------------------- memory

MEASURED = """
import sys
from pathlib import Path
import torch
import randes
from randes.checkpoints.safetensors import write_file
from randes.superposition.summary import verify

def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))

folder = Path(sys.argv[1])
files = {name: folder / name for name in ("m0", "m1", "m2", "m3")}
base, store = folder / "base", folder / "store"

def change(how, name):
    sup = randes.Superposition.load(store, check=False)
    getattr(sup, how)(name, files["m0"])
    sup.save(store)

def retrieve():
    write_file(folder / "out.safetensors", randes.Superposition.load(store, check=False).retrieved("m1"))

warm = torch.zeros(64, 64)
randes.compress({"a.weight": warm}, {"m": {"a.weight": warm + torch.eye(64)}}).retrieve("m")
work = {
    "retrieve": retrieve,
    "verify": lambda: verify(randes.Superposition.load(store), "m1", files["m1"]),
    "add": lambda: change("add", "late"),
    "remove": lambda: change("remove", "m0"),
    "compress": lambda: randes.compress(base, files).save(folder / "again"),
}[sys.argv[2]]
Path("/proc/self/clear_refs").write_text("5")  # from now on the peak is a new one
before = status("VmRSS")
work()
print(status("VmHWM") - before)
"""
HELD = {"retrieve": 0, "verify": 0, "add": 12, "remove": 12, "compress": 12}
"""Tensors of what is written that are in memory: a group's integers."""
TENSOR = 8 << 20
SLACK = 20 << 20
"""Parts of 1 MiB that are read ahead and computed with, in several threads, and what an allocator keeps of them."""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and 4 models, 12 tensors of 8 MiB each, and a store of them."""
    folder = tmp_path_factory.mktemp("large")
    noise = torch.randn(TENSOR // 2, generator=torch.Generator().manual_seed(0)).bfloat16()
    paths = {}
    for number, model in enumerate(("base", "m0", "m1", "m2", "m3")):
        paths[model] = folder / model
        paths[model].mkdir()
        for shard in range(4):
            names = [f"layers.{3 * shard + place}.weight" for place in range(3)]
            tensors = {name: (noise * (1 + number / 50)).view(2048, 2048) for name in names}
            tensors[f"layers.{3 * shard}.norm.bias"] = torch.full((2048,), float(number))
            sources.write_file(paths[model] / f"model-{shard}.safetensors", tensors)
    randes.compress(paths.pop("base"), paths).save(folder / "store")
    return folder


@pytest.mark.parametrize("what", HELD)
def test_memory_is_what_is_written_and_two_tensors(what: str, large: Path) -> None:
    """480 MiB are read. Each work in a process of its own, which has nothing left over from another's."""
    command = [sys.executable, "-c", MEASURED, str(large), what]
    run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) < (HELD[what] + 2) * TENSOR + SLACK
