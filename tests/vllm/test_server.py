"""vLLM's OpenAI server over a store, started by ``randes serve``: names, streams, and fine-tunes that come and go."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import tiny
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import randes

FLAGS = (
    "--dtype", "float32", "--enforce-eager", "--block-size", "32", "--max-model-len", "256", "--max-num-seqs", "8",
    "--max-num-batched-tokens", "64", "--enable-prompt-tokens-details",
)  # fmt: skip
LONG = [number % 500 + 1 for number in range(70)]


class Server:
    """A server under test, its store, and what each of its models should answer."""

    def __init__(self, folder: Path) -> None:
        self.base, self.store = tiny.llama(), folder / "store"
        self.base.save_pretrained(folder / "base")  # type: ignore[operator]
        words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(520)}, unk_token="w0"))
        words.pre_tokenizer = pre_tokenizers.Whitespace()
        PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(folder / "base")
        self.superposition = randes.Superposition.create(folder / "base", randes.Config(rank=0))
        for number, name in enumerate(tiny.NAMES):
            self.superposition.add(name, tiny.finetune(self.base, number))
        self.superposition.save(self.store)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [sys.executable, "-m", "randes", "serve", str(self.store), "--port", str(port), "--room", "2", "--"]
        own = {"OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
        self.log = folder / "log"
        with self.log.open("w") as log:
            environment = {**os.environ, **own}
            self.process = subprocess.Popen([*command, *FLAGS], stdout=log, stderr=subprocess.STDOUT, env=environment)
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120)
        ends = time.monotonic() + 300
        while not self.alive():
            assert self.process.poll() is None, self.log.read_text()[-6000:]
            assert time.monotonic() < ends, self.log.read_text()[-6000:]
            time.sleep(1)

    def alive(self) -> bool:
        try:
            return self.http.get("/health").status_code == 200
        except httpx.TransportError:
            return False

    def ask(self, model: str, prompt: list[int], **more: Any) -> httpx.Response:
        body = {"model": model, "prompt": prompt, "max_tokens": tiny.STEPS, "temperature": 0, "ignore_eos": True}
        return self.http.post("/v1/completions", json={**body, "return_token_ids": True, **more})

    def tokens(self, model: str, prompt: list[int], **more: Any) -> list[int]:
        answer = self.ask(model, prompt, **more)
        assert answer.status_code == 200, answer.text
        found: list[int] = answer.json()["choices"][0]["token_ids"]
        return found

    def streamed(self, model: str, prompt: list[int], steps: int = tiny.STEPS) -> Iterator[int]:
        body = {"model": model, "prompt": prompt, "max_tokens": steps, "temperature": 0, "ignore_eos": True}
        with self.http.stream(
            "POST", "/v1/completions", json={**body, "return_token_ids": True, "stream": True}
        ) as lines:
            for line in lines.iter_lines():
                if line.startswith("data: {"):
                    yield from json.loads(line.removeprefix("data: "))["choices"][0].get("token_ids") or ()

    def cached(self, model: str, prompt: list[int]) -> int:
        usage = self.ask(model, prompt).json()["usage"]
        return (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0

    def load(self, name: str, path: str, **more: Any) -> httpx.Response:
        return self.http.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": path, **more})

    def unload(self, name: str) -> httpx.Response:
        return self.http.post("/v1/unload_lora_adapter", json={"lora_name": name})

    def names(self) -> set[str]:
        return {one["id"] for one in self.http.get("/v1/models").json()["data"]}

    def wanted(self, rows: list[tuple[list[int], str]], steps: int = tiny.STEPS) -> list[list[int]]:
        return tiny.of_superposition(self.base, self.superposition, rows, steps)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    made = Server(tmp_path_factory.mktemp("server"))
    yield made
    made.process.send_signal(signal.SIGINT)
    made.process.wait(60)


def test_twelve_clients_at_once_get_each_their_models_answer(server: Server) -> None:
    assert server.names() == {"__base__", "german", "french"}
    assert "vllm.entrypoints.openai.api_server --model" in server.log.read_text()
    rows = [(prompt, name) for prompt in tiny.PROMPTS for name in (*tiny.NAMES, "__base__")] + [
        (LONG, name) for name in (*tiny.NAMES, "__base__")
    ]
    wanted = server.wanted(rows)
    with ThreadPoolExecutor(12) as clients:
        whole = [*clients.map(lambda row: server.tokens(row[1], row[0]), rows)]
        streams = [*clients.map(lambda row: [*server.streamed(row[1], row[0])], rows)]
    assert whole == wanted
    assert streams == wanted


def test_what_is_no_name_is_404_and_what_cannot_be_answered_400(server: Server) -> None:
    for name in ("spanish", "German", "randes:german", "../german", "german@0000000000000000", "\u00e9"):
        assert server.ask(name, [1, 2]).status_code == 404, name
    assert server.ask("german", [1, 2], prompt_logprobs=1).status_code == 400
    assert "prompt_logprobs" in server.ask("__base__", [1, 2], prompt_logprobs=0).text
    assert server.tokens("german", [1, 2]) == server.wanted([([1, 2], "german")])[0]


def test_a_load_that_fails_leaves_everything_as_it_was(server: Server) -> None:
    for path, said in (
        ("randes:spanish", "no model is called"),
        ("/tmp", "lora_path must be randes:NAME"),
        ("randes:german@0123456789abcdef", ""),
    ):
        answer = server.load("another", path)
        if said:
            assert answer.status_code >= 400, answer.text
            assert said in answer.text
        else:  # a version that is no more: the one of now
            assert answer.status_code == 200, answer.text
            assert server.unload("another").status_code == 200
    assert server.load("german", "randes:german").status_code == 400  # it is there
    assert server.alive()
    assert server.names() == {"__base__", "german", "french"}
    assert server.tokens("french", [4, 5]) == server.wanted([([4, 5], "french")])[0]


def test_models_go_and_come_back(server: Server) -> None:
    (own,) = server.wanted([([7, 8, 9], "german")])
    assert server.unload("german").status_code == 200
    assert "german" not in server.names()
    assert server.unload("german").status_code == 404
    assert server.load("german", "randes:german").status_code == 200
    assert server.tokens("german", [7, 8, 9]) == own
    assert server.unload("german").status_code == 200
    assert server.tokens("german", [7, 8, 9]) == own  # who asks for it has it found in the store
    assert server.load("german", "randes:german", load_inplace=True).status_code == 200
    assert server.load("deutsch", "randes:german").status_code == 200  # under a name of the server's
    assert server.tokens("deutsch", [7, 8, 9]) == own
    assert server.unload("deutsch").status_code == 200


def test_a_fine_tune_joins_while_its_neighbours_answer(server: Server) -> None:
    """Last: the store is another afterwards."""
    steps = 180
    (before,) = server.wanted([([3, 1, 4], "german")], steps)
    assert server.cached("german", LONG) in (0, 64)
    assert server.cached("german", LONG) == 64
    stream = server.streamed("german", [3, 1, 4], steps)
    begun = [next(stream)]
    added = randes.Superposition.load(server.store)
    added.add("italian", tiny.finetune(server.base, 7))
    added.save(server.store)
    assert server.ask("italian", [1]).status_code == 200
    # It has been in between, and what was under way ended as it began.
    assert [*begun, *stream] == before
    server.superposition = randes.Superposition.load(server.store)
    rows = [(prompt, name) for prompt in (*tiny.PROMPTS, LONG) for name in ("german", "french", "italian", "__base__")]
    assert server.cached("german", LONG) == 0  # the group is another
    assert [server.tokens(name, prompt) for prompt, name in rows] == server.wanted(rows)
    assert server.cached("german", LONG) == 64
    assert server.names() == {"__base__", "german", "french", "italian"}
    # One more, as there is room for; and then none, while all others go on.
    for number, (name, status) in enumerate((("polish", 200), ("czech", 400))):
        added.add(name, tiny.finetune(server.base, 8 + number))
        added.save(server.store)
        answer = server.ask(name, [1, 2])
        assert answer.status_code == status, answer.text
        if status == 200:
            server.superposition = randes.Superposition.load(server.store)
            rows = [(prompt, name) for prompt, _ in rows[:3] for name in ("italian", "polish")]
            wanted = server.wanted(rows)
    assert [server.tokens(name, prompt) for prompt, name in rows] == wanted
