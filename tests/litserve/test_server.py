"""LitServe started for real, by ``randes serve``: ``python tests/litserve/run.py``."""

import base64
import copy
import http.client
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from litserve_net import Net
from served import Client, free_port, serving
from torch import Tensor, nn

import randes
from randes.checkpoints.sources import write_file
from randes.litserve.tensors import array_of

HERE = Path(__file__).parent
X = torch.randn(40, 32, generator=torch.Generator().manual_seed(0))


def moved(model: nn.Module, seed: int) -> nn.Module:
    model, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    for value in model.parameters():
        value.data += 0.05 * torch.randn(value.shape, generator=generator)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of three fine-tunes, and files of two more."""
    folder = tmp_path_factory.mktemp("litserve")
    torch.manual_seed(0)
    base = Net()
    models = {name: moved(base, seed) for seed, name in enumerate("abcde")}
    for name, model in models.items():
        write_file(folder / f"{name}.safetensors", model.state_dict())
    randes.compress(base, {name: models[name] for name in "abc"}).save(folder / "store")
    return folder


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[Client]:
    options = ("store", "--module", "litserve_net:Net", "--room", "2", "--changes", "--wait", "0.02")
    with serving(folder, *options, PYTHONPATH=_path()) as (client, _):
        yield client


def _path() -> str:
    return os.pathsep.join([str(HERE), *os.environ["PYTHONPATH"].split(os.pathsep)])


@pytest.fixture(scope="module")
def expected(folder: Path) -> Any:
    """What the library answers for a row."""
    model = randes.load(folder / "store", Net(), capacity=5).eval()

    def logits(name: str, x: Tensor) -> Tensor:
        with torch.no_grad():
            found: Tensor = model(x[None], adapter_names=[name])["logits"][0]
        return found

    return logits


def ask(client: Client, name: str, row: int, **fields: Any) -> Any:
    return client.predict(name, inputs={"x": X[row].tolist()}, **fields)


def test_rows_of_many_models_at_once_are_each_answered_by_theirs(client: Client, expected: Any) -> None:
    names = ["a", "b", "__base__", "c"] * 10
    with ThreadPoolExecutor(16) as pool:
        replies = list(pool.map(lambda row: ask(client, names[row], row), range(40)))
    for row, (name, reply) in enumerate(zip(names, replies, strict=True)):
        assert reply.status == 200, reply
        assert reply.body["model"] == name
        assert set(reply.body["outputs"]) == {"logits"}, "scores are of others' rows"
        assert torch.allclose(torch.tensor(reply.body["outputs"]["logits"]), expected(name, X[row]), atol=1e-5)


def test_tensors_may_be_bytes(client: Client, expected: Any) -> None:
    data = {"dtype": "float32", "shape": [32], "data": base64.b64encode(X[3].numpy().tobytes()).decode()}
    reply = client.predict("b", inputs={"x": data}, outputs=["logits"], encoding="base64")
    found = array_of(reply.body["outputs"]["logits"])
    assert found.dtype == np.float32
    assert torch.allclose(torch.tensor(found), expected("b", X[3]), atol=1e-5)


def test_names_are_listed_as_openai_lists_them(client: Client) -> None:
    listed = client.send("GET", "/v1/models").body
    assert listed["object"] == "list"
    assert client.names == ["__base__", "a", "b", "c"]
    assert {model["object"] for model in listed["data"]} == {"model"}


def test_unknown_names_are_404_and_never_the_base(client: Client) -> None:
    for name in ("z", "", "A", "a/../b", "__BASE__", "x" * 5000):
        reply = ask(client, name, 0)
        assert (reply.status, reply.body["error"]["type"]) == (404, "NotFoundError")
        assert reply.body["error"]["param"] == "model"


MALFORMED: dict[str, tuple[bytes, int]] = {
    "no JSON": (b"{nonsense", 400),
    "nothing": (b"", 422),
    "not an object": (b"[1, 2]", 422),
    "no text at all": (b"\xff\xfe\x00", 400),
    "deep": (b'{"model": "a", "inputs": {"x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}}", 400),
    "no model": (b'{"inputs": {"x": [1]}}', 422),
    "a model that is a number": (b'{"model": 3, "inputs": {"x": [1]}}', 422),
    "another field": (b'{"model": "a", "inputs": {"x": [1]}, "adapter": "b"}', 422),
    "no inputs": (b'{"model": "a"}', 422),
    "inputs and text": (b'{"model": "a", "inputs": {"x": [1.0]}, "text": "a"}', 422),
    "text without a tokenizer": (b'{"model": "a", "text": "a"}', 422),
    "another argument": (b'{"model": "a", "inputs": {"y": [1.0]}}', 422),
    "too narrow": (b'{"model": "a", "inputs": {"x": [1.0, 2.0]}}', 422),
    "a number": (b'{"model": "a", "inputs": {"x": 1.0}}', 422),
    "an empty list": (b'{"model": "a", "inputs": {"x": []}}', 422),
    "ragged": (b'{"model": "a", "inputs": {"x": [[1.0], [1.0, 2.0]]}}', 422),
    "words": (b'{"model": "a", "inputs": {"x": ["1"]}}', 422),
    "NaN beside another field": (b'{"model": "a", "inputs": {"x": [NaN]}, "y": NaN}', 422),
    "a dtype that is a list": (b'{"model": "a", "inputs": {"x": {"dtype": [], "data": [1]}}}', 422),
    "bytes that are none": (b'{"model": "a", "inputs": {"x": {"dtype": "float32", "shape": [1], "data": "?"}}}', 422),
    "a shape that is larger": (
        b'{"model": "a", "inputs": {"x": {"dtype": "float32", "shape": [1e9], "data": ""}}}',
        422,
    ),
    "another output": (b'{"model": "a", "inputs": {"x": ' + str(X[0].tolist()).encode() + b'}, "outputs": ["y"]}', 422),
    "another encoding": (b'{"model": "a", "inputs": {"x": [1.0]}, "encoding": "pickle"}', 422),
}


@pytest.mark.parametrize("what", MALFORMED)
def test_what_is_malformed_is_refused_with_a_reason(client: Client, what: str) -> None:
    data, status = MALFORMED[what]
    reply = client.send("POST", "/predict", data=data)
    assert reply.status == status, reply
    assert reply.body["error"]["code"] == status
    assert reply.body["error"]["message"]
    assert ask(client, "a", 0).status == 200


def test_who_comes_with_the_malformed_is_answered(client: Client, expected: Any) -> None:
    bodies = [data for data, _ in MALFORMED.values() if len(data) < 10_000]
    with ThreadPoolExecutor(16) as pool:
        bad = [pool.submit(client.send, "POST", "/predict", data=data) for data in bodies]
        good = [pool.submit(ask, client, "abc"[row % 3], row) for row in range(40)]
    assert all(reply.result().status in (400, 422) for reply in bad)
    for row, reply in enumerate(good):
        found = reply.result()
        assert found.status == 200, found
        assert torch.allclose(
            torch.tensor(found.body["outputs"]["logits"]), expected("abc"[row % 3], X[row]), atol=1e-5
        )


def test_what_is_too_large_and_paths_that_are_none(client: Client) -> None:
    assert client.send("GET", "/v1/nothing").status == 404
    assert client.send("GET", "/predict").status == 405
    too_large = b'{"model": "' + b"a" * (101 << 20) + b'"}'
    assert client.send("POST", "/predict", data=too_large).status == 413
    assert ask(client, "a", 0).status == 200


def test_models_come_and_go_while_others_are_answered(client: Client, folder: Path, expected: Any) -> None:
    stopped: list[bool] = []

    def steadily(name: str) -> list[Any]:
        found = []
        while not stopped:
            found.append((name, ask(client, name, 1)))
        return found

    with ThreadPoolExecutor(2) as pool:
        steady = [pool.submit(steadily, name) for name in ("a", "__base__")]
        try:
            assert ask(client, "d", 0).status == 404
            added = client.send("POST", "/v1/models", {"model": "d", "path": "d.safetensors"})
            assert added.status == 200, added
            assert "d" in client.names
            first = ask(client, "d", 0)
            assert first.status == 200
            again = client.send("POST", "/v1/models", {"model": "d", "path": "d.safetensors"})
            assert again.status == 400
            assert client.send("POST", "/v1/models", {"model": "e", "path": "nothing.safetensors"}).status == 400
            assert client.send("POST", "/v1/models", {"model": "e", "path": "store"}).status == 400
            assert client.send("POST", "/v1/models", {"model": "e"}).status == 404
            assert client.send("POST", "/v1/models", {"model": "e", "path": "e.safetensors"}).status == 200
            full = client.send("POST", "/v1/models", {"model": "f", "path": "e.safetensors"})
            assert (full.status, full.body["error"]["type"]) == (409, "ConflictError")
            assert client.send("DELETE", "/v1/models/e?path=d.safetensors").status == 400, "another checkpoint"
            assert client.send("DELETE", "/v1/models/e?path=e.safetensors").status == 200
            assert client.send("DELETE", "/v1/models/d").status == 200, "without a checkpoint it stays superposed"
            assert ask(client, "d", 0).status == 404
            assert client.send("POST", "/v1/models", {"model": "d"}).status == 200
            assert client.send("DELETE", "/v1/models/d?path=d.safetensors").status == 200
            assert client.send("DELETE", "/v1/models/d").status == 404
            assert client.send("DELETE", "/v1/models/__base__").status == 400
        finally:
            stopped.append(True)
    assert client.names == ["__base__", "a", "b", "c"]
    for name, reply in (pair for one in steady for pair in one.result()):
        assert reply.status == 200, reply
        found = torch.tensor(reply.body["outputs"]["logits"])
        close = torch.allclose(found, expected(name, X[1]), atol=1e-5)
        assert close or name == "a", "only who is in the group has another's noise meanwhile"
    assert torch.allclose(
        torch.tensor(ask(client, "a", 1).body["outputs"]["logits"]), expected("a", X[1]), atol=1e-5
    ), "to what it was before"


def test_a_key_is_asked_for_everywhere(folder: Path) -> None:
    options = ("store", "--module", "litserve_net:Net", "--room", "1", "--changes")
    with serving(folder, *options, PYTHONPATH=_path(), LIT_SERVER_API_KEY="secret") as (client, _):
        assert ask(client, "a", 0).status == 200
        assert client.names == ["__base__", "a", "b", "c"]
        for other in ("", "guessed"):
            stranger = Client(0, other)
            stranger.at = client.at
            replies = [
                ask(stranger, "a", 0), stranger.send("GET", "/v1/models"), stranger.send("DELETE", "/v1/models/a"),
                stranger.send("POST", "/v1/models", {"model": "d", "path": "d.safetensors"}),
            ]  # fmt: skip
            assert {reply.status for reply in replies} <= {401, 403}
            assert all(reply.body["error"]["message"] for reply in replies)
        assert client.names == ["__base__", "a", "b", "c"]


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_it_ends_when_it_is_told_to_and_leaves_no_process(folder: Path, how: signal.Signals) -> None:
    with serving(folder, "store", "--module", "litserve_net:Net", PYTHONPATH=_path()) as (client, process):
        assert ask(client, "a", 0).status == 200
        assert client.send("POST", "/v1/models", {"model": "d", "path": "d.safetensors"}).status == 405
        assert client.send("DELETE", "/v1/models/a").status in (404, 405)
        children = _children(process.pid)
        assert children
        process.send_signal(how)
        process.wait(timeout=60)
        assert _left(children) == []


def test_a_killed_worker_ends_the_server_and_no_request_waits_for_ever(folder: Path) -> None:
    with serving(folder, "store", "--module", "litserve_net:Net", PYTHONPATH=_path()) as (client, process):
        assert ask(client, "a", 0).status == 200
        children = _children(process.pid)
        (worker,) = [pid for pid in children if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text()]
        os.kill(worker, signal.SIGKILL)
        with suppress(OSError, http.client.HTTPException):  # the connection may end with the server
            assert ask(client, "a", 0).status >= 500
        process.wait(timeout=60)
        assert process.returncode == 2
        assert "the process that has the model was ended" in (folder / "serve.log").read_text()
        assert _left(children) == []


def _left(children: list[int]) -> list[int]:
    """Those that are still there when they should have ended."""
    until = time.monotonic() + 10
    while (left := [pid for pid in children if Path(f"/proc/{pid}").exists()]) and time.monotonic() < until:
        time.sleep(0.1)
    return left


def _children(pid: int) -> list[int]:
    listed = subprocess.run(["ps", "-eo", "pid,ppid"], capture_output=True, text=True, check=True).stdout.split()
    return [int(own) for own, parent in zip(listed[2::2], listed[3::2], strict=True) if int(parent) == pid]


def test_the_code_of_the_page_makes_a_server() -> None:
    page = (HERE.parents[1] / "docs" / "litserve.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict[str, Any] = {"__name__": "page"}
    exec(compile(block, "litserve.md", "exec"), names)
    paths = {getattr(route, "path", "") for route in names["server"].app.routes}
    assert paths >= {"/predict", "/health", "/v1/models", "/v1/models/{name:path}"}


def test_a_store_that_cannot_be_served_is_an_error_of_one_line(folder: Path) -> None:
    told = {**os.environ, "PYTHONPATH": _path()}
    for module, says in (("litserve_net:Nothing", "Nothing"), ("nothing:Net", "nothing"), ("served:free_port", "int")):
        command = [sys.executable, "-m", "randes", "serve", "store", "--module", module, "--port", str(free_port())]
        ran = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, env=told)
        assert ran.returncode == 2
        assert says in ran.stderr
        assert "is not served: the model cannot be loaded" in ran.stderr.splitlines()[-1]


def test_a_transformers_model_is_served_by_its_class_with_texts(tmp_path: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 64}
    config = hf.BertConfig(**sizes, num_attention_heads=4, max_position_embeddings=16, num_labels=3, pad_token_id=0)
    base = hf.BertForSequenceClassification(config)
    words = ["[PAD]", "[UNK]", "the", "of", "a", "to"]
    tokens = Tokenizer(WordLevel({word: place for place, word in enumerate(words)}, "[UNK]"))
    tokens.pre_tokenizer = Whitespace()
    limits: dict[str, Any] = {"model_max_length": 16, "pad_token": "[PAD]", "unk_token": "[UNK]"}
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=tokens, **limits)
    for name, model in (("base", base), ("a", moved(base, 1)), ("b", moved(base, 2))):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    randes.compress(tmp_path / "base", {name: tmp_path / name for name in "ab"}).save(tmp_path / "store")
    model = randes.from_pretrained(tmp_path / "store").eval()
    texts = ["the of a", "to", "a a a of the", "of to"] * 4
    with serving(tmp_path, "store", "--wait", "0.05") as (client, _):
        with ThreadPoolExecutor(16) as pool:
            replies = list(pool.map(lambda row: client.predict("ab"[row % 2], text=texts[row]), range(16)))
        for row, reply in enumerate(replies):
            assert reply.status == 200, reply
            with torch.no_grad():
                own = model(**tokenizer(texts[row], return_tensors="pt"), adapter_names=["ab"[row % 2]]).logits[0]
            assert torch.allclose(torch.tensor(reply.body["outputs"]["logits"]), own, atol=1e-5)
        ids = client.predict("a", inputs={"input_ids": [2, 3, 4]})
        found, as_text = (torch.tensor(reply.body["outputs"]["logits"]) for reply in (ids, replies[0]))
        assert torch.allclose(found, as_text, atol=1e-5)
        assert client.predict("a", inputs={"input_ids": [2, 99]}).status == 422
        assert client.predict("a", inputs={"input_ids": [-1]}).status == 422
        assert client.predict("a", text="the " * 17).status == 422
        assert client.predict("a", text="the").status == 200
