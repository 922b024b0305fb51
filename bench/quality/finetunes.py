"""A byte-level language model and its fine-tunes on kinds of text: trained once, kept as safetensors, read again.

    python bench/quality/finetunes.py [--models FOLDER] [--setting narrow] [--seeds 0 1 2]

The text is what the test dependencies bring: Python's own library, headers, stubs, fonts, tables. A small transformer
is trained on all kinds mixed, then its layers' matrices are fine-tuned on each kind alone. Of every kind some sequences
are for validation (whatever a method chooses, it chooses there) and some for the test.
"""

import argparse
import copy
import hashlib
import math
import statistics
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.progress import Progress
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

MODELS = Path(tempfile.gettempdir()) / "randes-finetunes"
LENGTH = 128
KIND_BYTES = 400_000
HELD_OUT = 32  # sequences of each kind to test on, and as many aside to validate on


@dataclass(frozen=True)
class Setting:
    """One size of model and how it is trained. Batches are small: few tokens teach the most that way.

    kinds: every how manieth kind of text has a fine-tune; the base is trained on all of them.
    """

    width: int
    layers: int
    heads: int
    base_steps: int
    tune_steps: int
    tune_rate: float
    kinds: int = 1
    base_batch: int = 4
    base_rate: float = 3e-3
    tune_batch: int = 8


SETTINGS = {
    "narrow": Setting(width=128, layers=4, heads=4, base_steps=4000, tune_steps=160, tune_rate=1e-3),
    "wide": Setting(
        width=512, layers=2, heads=8, base_steps=1200, tune_steps=80, tune_rate=5e-4, kinds=2, base_rate=1.5e-3
    ),
}


def sources() -> dict[str, Iterator[Path]]:
    """Where each kind of text is found."""

    def package(name: str) -> Path:
        spec = find_spec(name)
        assert spec is not None
        assert spec.origin is not None
        return Path(spec.origin).parent

    library, torch_folder = Path(sysconfig.get_path("stdlib")), package("torch")
    return {
        "torch headers": (torch_folder / "include" / "ATen").rglob("*.h"),
        "torch operators": (torch_folder / "include" / "c10").rglob("*.h"),
        "torch stubs": torch_folder.rglob("*.pyi"),
        "type stubs": (package("mypy") / "typeshed" / "stdlib").rglob("*.pyi"),
        "numpy tests": (package("numpy") / "_core" / "tests").rglob("*.py"),
        "sympy": (package("sympy") / "polys").rglob("*.py"),
        "sklearn descriptions": (package("sklearn") / "datasets" / "descr").rglob("*.rst"),
        "tables of numbers": (package("sklearn") / "datasets" / "data").rglob("*.csv"),
        "font metrics": (package("matplotlib") / "mpl-data").rglob("*.afm"),
        "pictures": (package("matplotlib") / "mpl-data" / "images").rglob("*.svg"),
        "Python topics": (library / "pydoc_data").rglob("*.py"),
        "encodings": (library / "encodings").rglob("*.py"),
        "asyncio": (library / "asyncio").rglob("*.py"),
        "email": (library / "email").rglob("*.py"),
        "idle": (library / "idlelib").rglob("*.py"),
        "unittest": (library / "unittest").rglob("*.py"),
    }


@dataclass(frozen=True)
class Texts:
    """Sequences of each kind, (rows, LENGTH + 1) uint8; no two overlap, and the parts are spread over the files."""

    training: dict[str, Tensor]
    validation: dict[str, Tensor]
    test: dict[str, Tensor]

    @classmethod
    def read(cls) -> "Texts":
        """From the installed packages."""
        found = cls({}, {}, {})
        for kind, files in sources().items():
            data = b"".join(file.read_bytes() for file in sorted(files))[:KIND_BYTES]
            count = len(data) // (LENGTH + 1)
            assert count > 4 * HELD_OUT, f"{kind} has {len(data)} bytes"
            order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
            rows = torch.frombuffer(bytearray(data), dtype=torch.uint8)[: count * (LENGTH + 1)].view(count, -1)[order]
            found.training[kind] = rows[: -2 * HELD_OUT]
            found.validation[kind], found.test[kind] = rows[-2 * HELD_OUT :].split(HELD_OUT)
        return found

    @cached_property
    def digest(self) -> str:
        """Of every byte to train on: other package versions bring other texts."""
        parts = hashlib.blake2b(digest_size=8)
        for rows in self.training.values():
            parts.update(rows.numpy().tobytes())
        return parts.hexdigest()


class Block(nn.Module):
    """Pre-norm causal attention and a feed-forward layer."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        q, k, v = (p(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.q, self.k, self.v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class LanguageModel(nn.Module):
    """Bytes (B, T) to logits (B, T, 256); the embedding is the head."""

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        width = setting.width
        self.embed, self.place = nn.Embedding(256, width), nn.Embedding(LENGTH, width)
        self.layers = nn.ModuleList(Block(width, setting.heads) for _ in range(setting.layers))
        self.norm = nn.LayerNorm(width)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
        for table in (self.embed, self.place):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.place.weight[: tokens.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return self.norm(x) @ self.embed.weight.mT


def loss_of(model: nn.Module, sequences: Tensor) -> Tensor:
    """Nats a byte."""
    sequences = sequences.long()
    logits = model(sequences[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), sequences[:, 1:].flatten())


@torch.no_grad()
def bits(model: nn.Module, sequences: Tensor) -> float:
    """Bits a byte. Eight sequences at a time stay in a core's cache."""
    return statistics.mean(float(loss_of(model, part)) for part in sequences.split(8)) / math.log(2)


def warmed_up_cosine(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """A tenth of the steps of warm-up, 100 at most, and a cosine to zero."""
    warm_up = min(100, steps // 10)
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / warm_up) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
    )


def train(model: nn.Module, data: Tensor, steps: int, batch: int, rate: float, seed: int) -> None:
    """Adam, some steps of warm-up and a cosine to zero."""
    generator = torch.Generator().manual_seed(seed)
    moved = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(moved, lr=rate, betas=(0.9, 0.95))
    schedule = warmed_up_cosine(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model, data[torch.randint(len(data), (batch,), generator=generator)]).backward()
        optimizer.step()
        schedule.step()


@dataclass(frozen=True)
class Finetunes:
    """A base, its fine-tunes as state dicts by kind, and what they are judged on."""

    setting: Setting
    base: dict[str, Tensor]
    models: dict[str, dict[str, Tensor]]
    texts: Texts


def matrices(state: dict[str, Tensor]) -> list[str]:
    """What a fine-tune moves: the layers' weights, so that nothing else tells models apart."""
    return [name for name, value in state.items() if name.startswith("layers") and value.dim() == 2]


def finetunes(setting: Setting, seed: int, folder: Path, step: Callable[[], None] = lambda: None) -> Finetunes:
    """Read from ``folder``, or trained and written there. step: called after the base and after each fine-tune."""
    texts = Texts.read()
    recipe = hashlib.blake2b(f"{setting} {texts.digest}".encode(), digest_size=4).hexdigest()
    place = folder / f"{setting.width}-seed{seed}-{recipe}"
    place.mkdir(parents=True, exist_ok=True)

    def kept(name: str, train_it: Callable[[], nn.Module]) -> dict[str, Tensor]:
        file = place / f"{name.replace(' ', '-')}.safetensors"
        if not file.exists():
            beside = file.with_suffix(".part")
            save_file(train_it().state_dict(), beside)
            beside.rename(file)
        step()
        return load_file(file)

    def trained_base() -> nn.Module:
        torch.manual_seed(seed)
        model = LanguageModel(setting)
        train(model, torch.cat(list(texts.training.values())), setting.base_steps, setting.base_batch,
              setting.base_rate, seed)  # fmt: skip
        return model

    base = kept("base", trained_base)
    moved = set(matrices(base))

    def tuned(number: int, kind: str) -> nn.Module:
        model = LanguageModel(setting)
        model.load_state_dict(copy.deepcopy(base))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in moved)
        train(model, texts.training[kind], setting.tune_steps, setting.tune_batch, setting.tune_rate, seed + number)
        return model

    kinds = list(texts.training)[:: setting.kinds]
    models = {kind: kept(kind, lambda n=n, kind=kind: tuned(n, kind)) for n, kind in enumerate(kinds)}  # type: ignore[misc]
    return Finetunes(setting, base, models, texts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=MODELS, help="where models are kept (%(default)s)")
    parser.add_argument("--setting", choices=SETTINGS, default="narrow")
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2))
    given = parser.parse_args()
    setting = SETTINGS[given.setting]
    with Progress() as bars:
        for seed in given.seeds:
            task = bars.add_task(f"{given.setting}, seed {seed}", total=1 + 16 // setting.kinds)
            finetunes(setting, seed, given.models, lambda task=task: bars.advance(task))  # type: ignore[misc]


if __name__ == "__main__":
    main()
