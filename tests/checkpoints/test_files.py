"""Nothing but regular files is read, nobody waits for one, and what is written goes where it should or nowhere."""

import os
import socket
from pathlib import Path

import pytest

from randes.checkpoints import files
from randes.errors import CheckpointError


def planted(folder: Path) -> dict[str, Path]:
    """Of each kind that is no regular file, one."""
    found = {name: folder / name for name in ("pipe", "folder", "socket", "loop", "nowhere", "link to a device")}
    os.mkfifo(found["pipe"])
    found["folder"].mkdir()
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(os.path.relpath(found["socket"]))
    found["loop"].symlink_to(found["loop"])
    found["nowhere"].symlink_to("/nowhere/at/all")
    found["link to a device"].symlink_to("/dev/zero")
    return found


@pytest.mark.parametrize("links", [True, False])
def test_what_is_no_regular_file_is_refused_at_once(links: bool, tmp_path: Path) -> None:
    for path in planted(tmp_path).values():
        with pytest.raises(CheckpointError, match=r"must be a regular file, got a"):
            files.opened(path, links=links)
    with pytest.raises(FileNotFoundError):
        files.opened(tmp_path / "missing", links=links)


def test_a_link_to_a_file_is_read_where_it_may_be_one(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(b"abc")
    (tmp_path / "link").symlink_to("blob")
    assert files.read_whole(tmp_path / "link") == b"abc"
    with pytest.raises(CheckpointError, match="must be a regular file, got a link"):
        files.read_whole(tmp_path / "link", links=False)


def test_a_file_without_end_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "large").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(CheckpointError, match=f"must have at most {files.LONGEST} bytes, got {2**40}"):
        files.read_whole(tmp_path / "large")


def test_a_link_that_was_planted_is_replaced_and_never_followed(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.write_text("mine")
    (tmp_path / "out").symlink_to(mine)
    (tmp_path / f".out.{os.getpid()}.tmp").symlink_to(mine)
    files.write_whole(tmp_path / "out", [memoryview(b"new")])
    assert mine.read_text() == "mine"
    assert (tmp_path / "out").read_text() == "new"
    assert not (tmp_path / "out").is_symlink()


def test_a_name_for_the_time_being_that_is_taken_is_not_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = tmp_path / "mine"
    mine.write_text("mine")
    monkeypatch.setattr(files, "token_hex", lambda _: "0" * 16)
    (tmp_path / f".out.{'0' * 16}.tmp").symlink_to(mine)
    with pytest.raises(OSError, match="could not be written: File exists"):
        files.write_whole(tmp_path / "out", [memoryview(b"new")])
    assert mine.read_text() == "mine"
    assert not (tmp_path / "out").exists()


def test_the_disk_is_told_the_names_of_new_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = []
    monkeypatch.setattr(files, "sync_folder", told.append)
    files.make_folder(tmp_path / "a" / "b")
    files.make_folder(tmp_path / "a" / "b")
    assert sorted(told) == [tmp_path, tmp_path / "a"]
    assert (tmp_path / "a" / "b").is_dir()
