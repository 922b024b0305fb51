"""Checkpoints and stores in a server that speaks S3, a process of its own: ``python tests/remote s3``."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import count

import fsspec
import pytest
from models import net
from remote_cases import *  # noqa: F403

import randes
from randes.checkpoints.remote.locations import Remote, location

BUCKET = "models"
_NUMBERS = count()


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    before = dict(os.environ)
    os.environ |= {
        "AWS_ENDPOINT_URL": url, "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-p", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        for _ in range(300):
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                time.sleep(0.1)
        fsspec.filesystem("s3", use_listings_cache=False).mkdir(BUCKET)
        yield url
    finally:
        process.terminate()
        process.wait()
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture
def address(server: str) -> str:
    return f"s3://{BUCKET}/{next(_NUMBERS)}/prefix"


def test_a_bucket_that_is_not_there_is_said_and_not_made(server: str) -> None:
    with pytest.raises(randes.CheckpointError, match="s3://nobody/base does not exist"):
        randes.Superposition.create("s3://nobody/base")
    with pytest.raises(OSError, match="s3://nobody"):
        randes.Superposition.create(net()).save("s3://nobody/store")
    assert not location("s3://nobody").exists()


def test_a_file_is_put_whole_or_not_at_all(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that is so large that it goes up in several parts, of which the last fails."""
    place = location(f"{address}/large")
    assert isinstance(place, Remote)
    system = place._system
    own, seen = type(system)._call_s3, []

    async def failing(self: object, method: str, *given: object, **how: object) -> object:
        seen.append(method)
        if method == "upload_part" and seen.count("upload_part") > 1:
            raise OSError("the connection is gone")
        return await own(self, method, *given, **how)

    with monkeypatch.context() as patch:
        patch.setattr(type(system), "_call_s3", failing)
        from tempfile import NamedTemporaryFile

        with NamedTemporaryFile() as file:
            file.truncate(120 << 20)
            with pytest.raises(OSError, match="could not be written: the connection is gone"):
                place.put(file.name)
    assert seen.count("upload_part") > 1
    assert not place.exists()
