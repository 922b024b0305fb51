"""Checkpoints and stores elsewhere, in fsspec's memory; and what is said of addresses that nothing here reads."""

from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from models import net
from remote_cases import *  # noqa: F403
from typer.testing import CliRunner

import randes
from randes.checkpoints.on_disk import open_file
from randes.checkpoints.remote.locations import Remote, is_remote, location
from randes.checkpoints.safetensors import write_file
from randes.cli import app
from randes.errors import CheckpointError

_NUMBERS = count()


@pytest.fixture
def address() -> Iterator[str]:
    own = f"/bucket/{next(_NUMBERS)}"
    yield f"memory:/{own}"
    system = fsspec.filesystem("memory")
    if system.exists(own):
        system.rm(own, recursive=True)


def test_what_needs_a_library_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any, **__: Any) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("fsspec.core.url_to_fs", missing)
    with pytest.raises(CheckpointError, match=r"s3://bucket/base needs .*: pip install 'randes\[remote\]'"):
        randes.Superposition.create("s3://bucket/base")


def test_an_address_of_no_known_kind_is_refused() -> None:
    with pytest.raises(CheckpointError, match="nowhere://x is no address that fsspec reads"):
        randes.Superposition.create("nowhere://x")


def test_what_a_library_raises_is_an_error_that_names_the_address(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise RuntimeError("no credentials\nand more")

    def denied(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Access Denied")

    for failure, said in ((refused, "RuntimeError: no credentials"), (denied, "Access Denied")):
        monkeypatch.setattr(MemoryFileSystem, "info", failure)
        with pytest.raises(OSError, match=rf"memory://bucket/x/?.* could not be looked at: {said}"):
            randes.Superposition.create("memory://bucket/x")


def test_fewer_bytes_than_were_asked_for_are_an_error(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sup = randes.Superposition.create(net())
    sup.save(f"{address}/store")
    monkeypatch.setattr(MemoryFileSystem, "cat_ranges", lambda self, paths, *_, **__: [b""] * len(paths))
    with pytest.raises(randes.StoreError, match=r"could not be read: it gave 0 bytes from 0 to \d+"):
        randes.Superposition.load(f"{address}/store")


def test_files_here_may_have_addresses(tmp_path: Path) -> None:
    assert location(f"file://{tmp_path}/x") == tmp_path / "x"
    assert not is_remote(f"file://{tmp_path}/x")
    randes.Superposition.create(net()).save(f"file://{tmp_path}/store")
    assert randes.Superposition.load(tmp_path / "store").names == []


def test_an_address_is_a_path_in_what_is_used_of_one() -> None:
    one = Remote.of("memory://bucket/folder/file.safetensors")
    assert (one.name, one.suffix, str(one.parent)) == ("file.safetensors", ".safetensors", "memory://bucket/folder")
    assert (one.parent / "file.safetensors", one.resolve()) == (one, one)
    assert one > one.parent
    assert repr(one) == "Remote('memory://bucket/folder/file.safetensors')"
    assert one != "memory://bucket/folder/file.safetensors"
    assert not one.exists()
    assert not one.is_dir()
    assert one.state() is None
    assert list(one.parent.glob("*")) == []
    one.unlink(missing_ok=True)
    with pytest.raises(FileNotFoundError):
        one.unlink()
    with pytest.raises(FileNotFoundError):
        one.read_bytes()


def test_a_full_disk_for_what_is_fetched_is_said(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    randes.Superposition.create(net()).save(f"{address}/store")

    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    sup = randes.Superposition.load(f"{address}/store", check=False)
    monkeypatch.setattr("randes.checkpoints.remote.tensors.os.write", full)
    with pytest.raises(OSError, match="what is fetched could not be held: No space left on device"):
        sup.retrieve("__base__")


def test_what_is_held_and_cannot_be_read_again_is_refused(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    randes.Superposition.create(net()).save(f"{address}/store")
    sup = randes.Superposition.load(f"{address}/store")
    monkeypatch.setattr("randes.checkpoints.remote.tensors.os.preadv", lambda *_: 0)
    with pytest.raises(randes.StoreError, match="was altered"):
        sup.retrieve("__base__")


def test_an_empty_tensor_is_nothing_to_fetch(address: str) -> None:
    place = location(f"{address}/empty.safetensors")
    write_file(place, {"empty": torch.empty(0, 4), "scalar": torch.tensor(3.0)})
    found = open_file(place)
    assert found["empty"].shape == (0, 4)
    assert found["scalar"] == 3


def test_servers_want_a_folder_here(address: str) -> None:
    randes.Superposition.create(net()).save(f"{address}/store")
    found = CliRunner().invoke(app, ["serve", f"{address}/store"])
    assert found.exit_code == 2
    assert "servers read a store from a folder on this machine" in found.output
