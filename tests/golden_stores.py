"""Small stores of every kind, as the code of November 2026 wrote them: later code loads them and writes the same bytes.

    python tests/golden_stores.py stores      writes tests/golden/stores.tar, once and never again
    python tests/golden_stores.py sharded     the same of tests/golden/sharded.tar

They are frozen, as the format is; a new kind of store is another file.
"""

import copy
import io
import json
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import randes

FILE = Path(__file__).parent / "golden" / "stores.tar"
SHARDED = FILE.with_name("sharded.tar")
"""The same of groups in several files each, which version 2 of a manifest is for."""
SHARD_SIZE = 6000
NAMES = ("german", "legal/v2", "código")
BEFORE: dict[str, Any] = {
    "exclude": ("*embed*", "*wte*", "*wpe*", "*norm*", "*shared.weight", "*relative*", "*router*", "*.gate.weight"),
    "embeddings": "shared",
    "rank": 0,
}
"""What was the default then."""
EVERYTHING: dict[str, Any] = {"include": ("*weight",), "exclude": (), "min_width": 2, "embeddings": "shared", "rank": 0}
CONFIGS = {
    "plain": randes.Config(**BEFORE),
    "groups": randes.Config(**BEFORE, group_size=2, seed=7),
    "columns permuted": randes.Config(**BEFORE, signs="columns", permute=1, others="base"),
    "granules": randes.Config(**BEFORE, permute=8, segments=2),
    "shuffled": randes.Config(**BEFORE, shuffle_layers=-1, others="average"),
    "shifted": randes.Config(**BEFORE, shuffle_layers=1, gains="shared", others="sum"),
    "rotation": randes.Config(**BEFORE, matrix="rotation"),
    "vectors": randes.Config(**BEFORE, vectors=True, origin="zero", gains="shared", min_width=1),
    "layers": randes.Config(**EVERYTHING),
    "centred": randes.Config(**BEFORE, centre=True),
    "basis": randes.Config(**{**BEFORE, "rank": 3}),
}


class Tiny(nn.Module):
    """Layers of every kind that a store describes in its own way."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(12, 32)
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(2))
        self.conv = nn.Conv1d(32, 4, 3)
        self.head = nn.Linear(32, 12, bias=False)
        self.head.weight = self.embed.weight


def models() -> tuple[Tiny, dict[str, nn.Module]]:
    """A base and its fine-tunes: values of this file's own."""
    base = Tiny()
    tuned = {}
    for seed, name in enumerate(NAMES):
        generator = torch.Generator().manual_seed(seed)
        tuned[name] = copy.deepcopy(base)
        for parameter in tuned[name].parameters():
            parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return base, tuned


def stores() -> Iterator[tuple[str, randes.Superposition]]:
    """All of them by name."""
    base, tuned = models()
    for name, config in CONFIGS.items():
        sup = randes.compress(base, tuned, config)
        yield name, sup
        if name in ("plain", "basis"):
            for bits in (8, 4, 2):  # as they were before steps were unbiased
                yield f"{name} in {bits} bits", sup.pack(bits)


def write(folder: Path) -> None:
    """A folder for each store, and the digests of what comes out of it."""
    retrieved = {}
    for name, sup in stores():
        sup.save(folder / name)
        if not sup.bases:  # whose products depend on the processor in their last bits
            retrieved[name] = {model: digests(sup, model) for model in NAMES}
    (folder / "retrieved.json").write_text(json.dumps(retrieved, indent=1, ensure_ascii=False), encoding="utf-8")


def digests(sup: randes.Superposition, model: str) -> dict[str, str]:
    """Of each tensor of a model as it comes out of its store, the digest that a manifest would have."""
    from randes.checkpoints.sources import digest

    return {tensor: digest(value) for tensor, value in sup.retrieve(model).items()}


def write_sharded(folder: Path) -> None:
    """A folder for each store in several files a group."""
    base, tuned = models()
    for name in ("plain", "basis"):
        sup = randes.compress(base, tuned, CONFIGS[name])
        sup.save(folder / name, shard_size=SHARD_SIZE)
        if name == "basis":
            sup.pack(4).save(folder / "basis in 4 bits")


def main() -> None:
    file, make = {"stores": (FILE, write), "sharded": (SHARDED, write_sharded)}[sys.argv[1]]
    with tempfile.TemporaryDirectory() as made, tarfile.open(file, "w") as archive:
        make(Path(made))
        for path in sorted(path for path in Path(made).rglob("*") if path.is_file()):
            entry = tarfile.TarInfo(str(path.relative_to(made)))
            data = path.read_bytes()
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))


if __name__ == "__main__":
    main()
