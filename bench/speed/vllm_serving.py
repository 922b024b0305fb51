"""vLLM over a store, beside vLLM over one materialised model, over LoRA adapters, and one vLLM for each fine-tune.

    python bench/speed/vllm_serving.py                     # a small random Llama on a CPU: about half an hour
    python bench/speed/vllm_serving.py --width 4096 --layers 32 --dtype bfloat16 --flags "" --out rows.json     # a GPU
    python bench/speed/vllm_serving.py --contestants randes one

Needs what ``tests/vllm/run.py`` installs. All contestants serve fine-tunes of one base, and get the same requests:
prompts of random tokens for models in a Zipf mix, from clients that each wait for their answer before they ask again.
The one materialised model gets all of them: it is the floor. They take turns, so that what else the machine does meets
all alike; on a machine that does much else only their ratios mean something.

Each row: output tokens a second, time to the first token, both over all turns; the memory of a contestant's processes
together after the load, each page that they share counted once (PSS); bytes of the files that it serves; and the load
of the machine.
Rows go to bench/results/<device>/vllm_serving.json.
"""

import argparse
import copy
import itertools
import json
import os
import platform
import random
import shlex
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "python_api")]
RESULTS = ROOT / "bench" / "results"
CONTESTANTS = ("randes", "randes, 2 bits", "one", "lora", "processes")
FLAGS = "--enforce-eager --block-size 32 --kv-cache-memory-bytes 67108864"
"""For the small model on a CPU."""
RANK = 16
LABELS = {
    "randes": "**a store of {models}**", "randes, 2 bits": "**the same in 2 bits**", "one": "one materialised model",
    "lora": f"{{models}} LoRA adapters of rank {RANK} (not the same accuracy)",
    "processes": "{models} processes, a model each",
}  # fmt: skip


class Request(NamedTuple):
    """model: the number of a fine-tune. prompt: tokens."""

    model: int
    prompt: list[int]


class Answer(NamedTuple):
    """Seconds to the first token and to the last, and how many there were."""

    first: float
    last: float
    tokens: int


def requests(count: int, models: int, words: int, length: int, seed: int = 0) -> list[Request]:
    """Model i is asked for in proportion to 1 / (i + 1)."""
    chance = random.Random(seed)
    weights = [1 / (1 + model) for model in range(models)]
    asked = chance.choices(range(models), weights, k=count)
    return [Request(model, [chance.randrange(words) for _ in range(length)]) for model in asked]


def row(name: str, answers: Sequence[Answer], seconds: float, **more: Any) -> dict[str, Any]:
    """What was measured of one contestant."""
    first = sorted(answer.first for answer in answers)
    tokens = sum(answer.tokens for answer in answers)
    return {
        "contestant": name, "requests": len(answers), "tokens_per_second": round(tokens / seconds, 1),
        "first_token_median": round(statistics.median(first), 3),
        "first_token_p95": round(first[int(0.95 * (len(first) - 1))], 3), **more,
    }  # fmt: skip


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as docs/vllm.md shows them, speed and times against the one model's."""
    (floor,) = (one for one in rows if one["contestant"] == "one")
    lines = [
        "| vLLM with | tokens a second | first token, median | files | memory of all processes |",
        "|---|---|---|---|---|",
    ]
    for one in rows:
        speed, first = (one[key] / floor[key] for key in ("tokens_per_second", "first_token_median"))
        name, files, held = LABELS[one["contestant"]].format(**one), one["file_bytes"] / 1e6, one["memory_bytes"] / 1e9
        lines.append(f"| {name} | {speed:.2f}x | {first:.2f}x | {files:.0f} MB | {held:.1f} GB |")
    return "\n".join(lines)


def make(folder: Path, given: argparse.Namespace) -> None:
    """A random base, fine-tunes of it, their store, in 2 bits too, and LoRA adapters of the same base."""
    import torch
    import transformers
    from safetensors.torch import save_file

    import randes

    torch.manual_seed(0)
    heads = max(1, given.width // 64)
    config = transformers.LlamaConfig(
        vocab_size=given.words, hidden_size=given.width, intermediate_size=given.width * 11 // 4, head_dim=64,
        num_hidden_layers=given.layers, num_attention_heads=heads, num_key_value_heads=max(1, heads // 2),
        max_position_embeddings=4096, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    base = transformers.LlamaForCausalLM(config).to(getattr(torch, given.dtype))
    base.save_pretrained(folder / "base")
    layers = {name: one for name, one in base.named_modules() if name.endswith("_proj")}
    for number in range(given.models):
        tuned = copy.deepcopy(base)
        with torch.no_grad():
            for parameter in tuned.parameters():
                parameter.add_(0.1 * parameter.std() * torch.randn_like(parameter))
        tuned.save_pretrained(folder / f"m{number}")
        adapter = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "base_model_name_or_path": str(folder / "base")}
        kinds = sorted({name.rpartition(".")[2] for name in layers})
        (folder / f"lora{number}").mkdir()
        text = json.dumps({**adapter, "target_modules": kinds, "bias": "none", "task_type": "CAUSAL_LM"})
        (folder / f"lora{number}" / "adapter_config.json").write_text(text)
        factors = {}
        for name, layer in layers.items():
            path, (n, k) = f"base_model.model.{name}", layer.weight.shape
            factors[f"{path}.lora_A.weight"] = (torch.randn(RANK, k) / k**0.5).to(layer.weight.dtype)
            factors[f"{path}.lora_B.weight"] = (0.1 * torch.randn(n, RANK) / RANK**0.5).to(layer.weight.dtype)
        save_file(factors, folder / f"lora{number}" / "adapter_model.safetensors")
    names = {f"m{number}": folder / f"m{number}" for number in range(given.models)}
    store = randes.compress(folder / "base", names, randes.Config(rank=0))
    store.save(folder / "store")
    store.pack(2).save(folder / "packed")


@contextmanager
def server(arguments: Sequence[str], folder: Path, given: argparse.Namespace) -> Iterator[tuple[int, int]]:
    """A server's port and process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = ["--port", str(port), "--dtype", given.dtype, "--skip-tokenizer-init", "--max-model-len", "512"]
    flags = [*common, "--max-num-seqs", str(given.clients), *shlex.split(given.flags)]
    command = [sys.executable, *arguments, *flags]
    own = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "PYTHONPATH": os.pathsep.join(sys.path[:2])}
    with (folder / f"log{port}").open("w") as log:
        running = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, **own}, start_new_session=True
        )
    try:
        ends = time.monotonic() + 900
        while not ready(port):
            if running.poll() is not None or time.monotonic() > ends:
                raise RuntimeError((folder / f"log{port}").read_text()[-4000:])
            time.sleep(2)
        yield port, running.pid
    finally:
        running.send_signal(signal.SIGINT)
        try:
            running.wait(60)
        except subprocess.TimeoutExpired:
            running.kill()


def ready(port: int) -> bool:
    import httpx

    try:
        return httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200
    except httpx.TransportError:
        return False


def ask(port: int, name: str, prompt: list[int], tokens: int) -> Answer:
    """One request, streamed."""
    import httpx

    body = {"model": name, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True}
    start, first, count = time.perf_counter(), 0.0, 0
    body |= {"return_token_ids": True, "detokenize": False}
    url = f"http://127.0.0.1:{port}/v1/completions"
    with httpx.stream("POST", url, json=body, timeout=600) as lines:
        lines.raise_for_status()
        for line in lines.iter_lines():
            if line.startswith("data: {"):
                found = json.loads(line.removeprefix("data: "))["choices"][0].get("token_ids") or ()
                first = first or (time.perf_counter() - start if found else 0.0)
                count += len(found)
    return Answer(first, time.perf_counter() - start, count)


def memory(process: int) -> int:
    """Bytes of a process and all below it, each page that they share counted once."""
    children = [int(child) for task in Path(f"/proc/{process}/task").iterdir()
                for child in (task / "children").read_text().split()]  # fmt: skip
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    own = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
    return own + sum(map(memory, children))


def servers(name: str, folder: Path, models: int) -> list[list[str]]:
    """What starts each server of a contestant."""
    plain = ["-m", "vllm.entrypoints.openai.api_server", "--model"]
    if name.startswith("randes"):
        from randes.vllm import path_of

        store = folder / ("packed" if "bits" in name else "store")
        named = [json.dumps({"name": f"m{m}", "path": path_of(store, f"m{m}")}) for m in range(models)]
        lora = ["--load-format", "randes", "--enable-lora", "--max-loras", str(models), "--lora-modules", *named]
        return [[*plain, str(store), *lora]]
    if name == "lora":
        named = [f"m{m}={folder / f'lora{m}'}" for m in range(models)]
        lora = ["--enable-lora", "--max-loras", str(models), "--max-lora-rank", str(RANK), "--lora-modules", *named]
        return [[*plain, str(folder / "base"), *lora]]
    names = range(models) if name == "processes" else [0]
    return [[*plain, str(folder / f"m{m}"), "--served-model-name", f"m{m}"] for m in names]


def size(name: str, folder: Path, models: int) -> int:
    """Bytes of the tensors' files that a contestant serves."""
    folders = {"randes": ["store"], "randes, 2 bits": ["packed"], "one": ["m0"]}
    folders |= {"lora": ["base", *(f"lora{m}" for m in range(models))], "processes": [f"m{m}" for m in range(models)]}
    return sum(file.stat().st_size for one in folders[name] for file in (folder / one).glob("*.safetensors"))


def measure(names: Sequence[str], folder: Path, given: argparse.Namespace) -> list[dict[str, Any]]:
    """All contestants' servers at once, and turns of the load."""
    load = requests(given.requests, given.models, given.words, given.prompt)
    turns = [load[turn :: given.turns] for turn in range(given.turns)]
    answers: dict[str, list[Answer]] = {name: [] for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    with ExitStack() as running, ThreadPoolExecutor(given.clients) as clients:
        ports = {}
        for name in names:
            made = [running.enter_context(server(own, folder, given)) for own in servers(name, folder, given.models)]
            ports[name] = made
            print(f"{name}: {len(made)} servers", flush=True)

        def one(name: str, request: Request) -> Answer:
            model = 0 if name == "one" else request.model
            port = ports[name][model if name == "processes" else 0][0]
            return ask(port, f"m{model}", request.prompt, given.tokens)

        for number, turn in enumerate([load[: given.clients], *turns]):
            for name in names:
                start = time.perf_counter()
                found = list(clients.map(one, itertools.repeat(name), turn))
                taken = time.perf_counter() - start
                print(f"{name}: {len(turn)} requests in {taken:.1f} s", flush=True)
                if number:  # the first turn warms up
                    answers[name] += found
                    seconds[name].append(taken)
        held = {name: sum(memory(process) for _, process in ports[name]) for name in names}
    rows = []
    for name in names:
        more = {
            "memory_bytes": held[name], "file_bytes": size(name, folder, given.models),
            "turn_seconds": [round(value, 2) for value in seconds[name]],
        }  # fmt: skip
        rows.append(row(name, answers[name], sum(seconds[name]), **more))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=CONTESTANTS)
    for name, default in (("models", 8), ("requests", 200), ("clients", 16), ("prompt", 64), ("tokens", 16),
                          ("width", 256), ("layers", 4), ("words", 4096), ("turns", 4)):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--flags", default=FLAGS, help="further flags for every vLLM")
    parser.add_argument("--out", type=Path, default=None)
    given = parser.parse_args()
    import torch

    kind = torch.cuda.get_device_name().replace(" ", "_") if torch.cuda.is_available() else "cpu"
    out = given.out or RESULTS / kind / "vllm_serving.json"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(folder, given)
        rows = measure(given.contestants, folder, given)
    setting = {
        key: getattr(given, key) for key in ("models", "clients", "prompt", "tokens", "width", "layers", "words")
    }
    about = {
        "device": f"{os.cpu_count()} cores, {platform.machine()}" if kind == "cpu" else kind, "dtype": given.dtype,
        "flags": given.flags, "load": round(os.getloadavg()[0], 1), "torch": torch.__version__,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }  # fmt: skip
    found = [{**one, **setting, **about} for one in rows]
    for one in found:
        print(json.dumps(one), flush=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"rows": found}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
