"""vLLM's engine over a store, in a process of its own: ``python engine.py JSON`` prints what it answered as JSON."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
OPTIONS: dict[str, Any] = {
    "load_format": "randes", "enable_lora": True, "max_loras": 2, "skip_tokenizer_init": True, "dtype": "float32",
    "enforce_eager": True, "block_size": 32, "max_num_seqs": 8, "max_num_batched_tokens": 64, "max_model_len": 128,
    "kv_cache_memory_bytes": 1 << 25,
}  # fmt: skip
"""A step holds 64 tokens, so that long prompts are cut."""
MARK = "ANSWER "


def answers(
    store: Path, runs: Sequence[Sequence[tuple[Sequence[int], str]]], steps: int,
    environment: dict[str, str] | None = None, **options: Any,
) -> list[list[tuple[list[int], int]]]:  # fmt: skip
    """Of each run, whose rows are prompts and models' names, the tokens and how many of the prompt's were cached."""
    wanted = {"store": str(store), "options": {**OPTIONS, **options}, "runs": runs, "steps": steps}
    ran = run(wanted, environment)
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-6000:]
    found: list[list[tuple[list[int], int]]] = json.loads(said(ran)[-1])
    return found


def said(ran: subprocess.CompletedProcess[str]) -> list[str]:
    """What a process printed among vLLM's log."""
    return [line.removeprefix(MARK) for line in ran.stdout.splitlines() if line.startswith(MARK)]


def run(wanted: dict[str, Any], environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """The process, ended."""
    own = {"OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", **(environment or {})}
    command = [sys.executable, str(HERE / "engine.py"), json.dumps(wanted)]
    return subprocess.run(command, env={**os.environ, **own}, capture_output=True, text=True, timeout=600)


def main(
    store: str, options: dict[str, Any], runs: list[list[tuple[list[int], str]]], steps: int, bad: bool = False
) -> None:
    """One engine, and one call for each run. bad: names and paths that are none, first."""
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    import randes.vllm

    engine = LLM(store, **options)
    how = SamplingParams(temperature=0, max_tokens=steps, ignore_eos=True, detokenize=False)
    if bad:
        for path in ("randes:spanish@0123456789abcdef", "/tmp", "randes:german@0123456789abcdef"):
            try:
                engine.generate([{"prompt_token_ids": [1]}], how, lora_request=LoRARequest("german", 3, path))
            except Exception as error:
                print(MARK + str(error).replace("\n", " "))
        (output,) = engine.generate([{"prompt_token_ids": [1]}], how)
        print(f"{MARK}{len(output.outputs[0].token_ids)} tokens")
        return
    names = sorted({name for rows in runs for _, name in rows} - {"__base__"})
    found = []
    for rows in runs:
        named = [
            None if name == "__base__" else LoRARequest(name, names.index(name) + 1, randes.vllm.path_of(store, name))
            for _, name in rows
        ]
        outputs = engine.generate([{"prompt_token_ids": prompt} for prompt, _ in rows], how, lora_request=named)
        found.append([(list(one.outputs[0].token_ids), one.num_cached_tokens) for one in outputs])
    print(MARK + json.dumps(found))


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
