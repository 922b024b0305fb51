"""Tokens a second of a whole model on a CPU: a batch of eight fine-tunes from a store, beside what one would do else.

    python bench/speed/generate.py STORE [--dtype bf16 fp32] [--tokens 24] [--turns 3]
    python bench/speed/generate.py --table

STORE is a packed store of eight fine-tunes of a Transformers model that generates, say SmolLM2-135M's
(``bench/quality/smollm.py`` makes them; ``randes compress``, ``randes pack``). Ways take turns in one process, and each
answers the same prompt, eight times or once. The base stands for a materialised fine-tune: they cost the same. Rows in
``bench/results/cpu/generate.json``.
"""

import argparse
import json
import time
from collections.abc import Callable
from statistics import median
from typing import Any

from measure import DTYPES, RESULTS, machine, prepare, progress, short, write_rows

FILE = RESULTS / "cpu" / "generate.json"
PROMPT = "The quick brown fox jumps over"
MIXED, UNPACKED, BASE, APART = (
    "8 fine-tunes, one batch", "the same without a C compiler", "the base, the same batch",
    "8 materialised models, one after the other",
)  # fmt: skip
ONE, ONE_BASE = "1 fine-tune, one row", "the base, one row"
AGAINST = {MIXED: (BASE, APART), UNPACKED: (BASE, APART), ONE: (ONE_BASE, None)}


def ways(store: str, dtype: str, tokens: int) -> dict[str, Callable[[], Any]]:
    """What generates so many tokens, by name."""
    import torch
    from transformers import AutoTokenizer

    import randes
    from randes_kernels import cpu_delta

    model = randes.from_pretrained(store, dtype=DTYPES[dtype])
    names = model.superposition.names[:8]
    prompts = AutoTokenizer.from_pretrained(store)([PROMPT] * 8, return_tensors="pt")

    def generated(adapters: list[str]) -> None:
        own = {name: value[: len(adapters)] for name, value in prompts.items()}
        with torch.inference_mode():
            model.generate(**own, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, adapter_names=adapters)

    def without_compiler() -> None:
        before, cpu_delta.NATIVE_ROWS = cpu_delta.NATIVE_ROWS, 0
        try:
            generated(names)
        finally:
            cpu_delta.NATIVE_ROWS = before

    def apart() -> None:
        for _ in names:
            generated(["__base__"])

    return {
        MIXED: lambda: generated(names),
        BASE: lambda: generated(["__base__"] * 8),
        APART: apart,
        ONE: lambda: generated(names[:1]),
        ONE_BASE: lambda: generated(["__base__"]),
        UNPACKED: without_compiler,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """In Markdown: seconds, and how many times the other ways' they are."""
    lines = ["| | dtype | seconds | against the base | 8 one after the other take |", "|---|---|---|---|---|"]
    seconds = {(row["dtype"], row["way"]): row["seconds"] for row in rows}
    for (dtype, way), taken in seconds.items():
        base, apart = AGAINST.get(way, (None, None))
        against = f"{taken / seconds[dtype, base]:.2f}x" if base else "–"
        times = f"{seconds[dtype, apart] / taken:.2f}x" if apart else "–"
        lines.append(f"| {way} | {dtype} | {taken:.2f} | {against} | {times} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", nargs="?")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bf16", "fp32"])
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--table", action="store_true", help="print what is there")
    given = parser.parse_args()
    if given.table:
        print(table(json.loads(FILE.read_text(encoding="utf-8"))["rows"]))
        return
    if given.store is None:
        parser.error("STORE is missing")
    prepare()
    rows = []
    for dtype in given.dtype:
        contestants = ways(given.store, dtype, given.tokens)
        times: dict[str, list[float]] = {way: [] for way in contestants}
        with progress((given.turns + 1) * len(contestants)) as step:
            for turn in range(given.turns + 1):  # the first warms up
                for way, call in contestants.items():
                    began = time.perf_counter()
                    call()
                    if turn:
                        times[way].append(time.perf_counter() - began)
                    step(way)
        rows += [
            {"way": way, "dtype": dtype, "tokens": given.tokens, "seconds": short(median(taken)),
             "all": [short(one) for one in taken], **machine("cpu")}
            for way, taken in times.items()
        ]  # fmt: skip
        write_rows(FILE, rows)
    print(table(rows))


if __name__ == "__main__":
    main()
