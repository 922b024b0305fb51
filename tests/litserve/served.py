"""A server in a process of its own, and what is asked of it."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

STARTS = 120
"""Seconds that a server may take until it answers."""


class Reply(NamedTuple):
    """status: HTTP's. body: the JSON, or what is none as text."""

    status: int
    body: Any


class Client:
    """Asks one server, from any thread."""

    def __init__(self, port: int, key: str = "") -> None:
        self.at, self.key = f"http://127.0.0.1:{port}", key

    def send(self, method: str, path: str, body: object = None, data: bytes | None = None) -> Reply:
        data = json.dumps(body).encode() if data is None and body is not None else data
        told = {"Content-Type": "application/json", **({"X-API-Key": self.key} if self.key else {})}
        request = urllib.request.Request(self.at + path, data=data, method=method, headers=told)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                status, text = answer.status, answer.read()
        except urllib.error.HTTPError as error:
            status, text = error.code, error.read()
        try:
            return Reply(status, json.loads(text))
        except ValueError:
            return Reply(status, text.decode("utf-8", "replace"))

    def predict(self, model: str, **fields: Any) -> Reply:
        return self.send("POST", "/predict", {"model": model, **fields})

    @property
    def names(self) -> list[str]:
        return [model["id"] for model in self.send("GET", "/v1/models").body["data"]]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


@contextmanager
def serving(folder: Path, *options: str, **environment: str) -> Iterator[tuple[Client, "subprocess.Popen[bytes]"]]:
    """``randes serve`` in a folder, until it answers."""
    port = free_port()
    command = [sys.executable, "-m", "randes", "serve", *options, "--port", str(port)]
    told = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    with (folder / "serve.log").open("wb") as log:
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, env=told, preexec_fn=_hears)
    client = Client(port, environment.get("LIT_SERVER_API_KEY", ""))
    try:
        until = time.monotonic() + STARTS
        while not _answers(client):
            if process.poll() is not None or time.monotonic() > until:
                raise AssertionError(f"the server does not answer:\n{(folder / 'serve.log').read_text()}")
            time.sleep(0.2)
        yield client, process
    finally:
        process.terminate()
        process.wait(timeout=60)


def _hears() -> None:
    """An interrupt, also where the tests were started in a shell's background."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _answers(client: Client) -> bool:
    try:
        return client.send("GET", "/health").status == 200
    except OSError:
        return False
