"""How much of each fine-tune's gain in bits per byte survives: a byte-level language model and 16 kinds of text.

    python bench/language.py                 writes bench/results/language.json, minutes a seed on 2 cores
    python bench/language.py --table         prints the Markdown table of what is there

Beside the rows it draws language.png: what survives by storage.

The text is what the test dependencies bring: Python's own library, headers, stubs, fonts, tables. A small transformer
is trained on all kinds mixed, then its layers' matrices are fine-tuned on each kind alone. The share that survives
is ``(L_base − L) / (L_base − L_own)`` on held-out bytes, L in bits per byte: 100 is the fine-tune itself, 0 the base,
less is worse than the base. Storage is counted in bits a superposed parameter and model, as each method would have
to store its deltas (ours: D in 16 bits shared by a group, and what the shared basis holds).
"""

import argparse
import copy
import json
import math
import statistics
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from measure import machine
from rich.progress import Progress
from torch import Tensor, nn

import randes
from randes.demo.baselines import task_arithmetic

RESULTS = Path(__file__).parent / "results" / "language.json"
PLOT = RESULTS.with_suffix(".png")
SEEDS = (0, 1, 2)
WIDTH, LAYERS, HEADS, LENGTH, BATCH = 128, 4, 4, 128, 16
BASE_STEPS, TUNE_STEPS = 600, 80
KIND_BYTES = 400_000
HELD_OUT = 32  # sequences of each kind
GROUPS = (2, 4, 8, 16)
LAMBDAS = (0.1, 0.2, 0.3, 0.5, 0.7, 1.0)


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


def texts() -> dict[str, Tensor]:
    """Each kind's bytes, (sequences, LENGTH + 1) uint8, the held-out ones last."""
    found = {}
    for kind, files in sources().items():
        data = b"".join(file.read_bytes() for file in sorted(files))[:KIND_BYTES]
        rows = len(data) // (LENGTH + 1)
        # Held-out sequences are spread over the files, and no sequence overlaps another.
        order = torch.randperm(rows, generator=torch.Generator().manual_seed(0))
        found[kind] = torch.frombuffer(bytearray(data), dtype=torch.uint8)[: rows * (LENGTH + 1)].view(rows, -1)[order]
        assert rows > 2 * HELD_OUT, f"{kind} has {len(data)} bytes"
    return found


class Block(nn.Module):
    """Pre-norm causal attention and a feed-forward layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH, bias=False), nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        q, k, v = (p(h).unflatten(-1, (HEADS, -1)).transpose(1, 2) for p in (self.q, self.k, self.v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class LanguageModel(nn.Module):
    """Bytes (B, T) to logits (B, T, 256); the embedding is the head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(256, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.place(torch.arange(tokens.shape[1]))
        for layer in self.layers:
            x = layer(x)
        return self.norm(x) @ self.embed.weight.mT


def loss_of(model: nn.Module, sequences: Tensor) -> Tensor:
    """Nats a byte."""
    sequences = sequences.long()
    logits = model(sequences[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), sequences[:, 1:].flatten())


def train(model: nn.Module, data: Tensor, steps: int, rate: float, seed: int) -> nn.Module:
    """Adam with a cosine to zero; only matrices move in a fine-tune, so that nothing else tells models apart."""
    generator = torch.Generator().manual_seed(seed)
    moved = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(moved, lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model, data[torch.randint(len(data), (BATCH,), generator=generator)]).backward()
        optimizer.step()
        schedule.step()
    return model


@torch.no_grad()
def bits(model: nn.Module, held_out: Tensor) -> float:
    """Bits a byte."""
    return float(loss_of(model, held_out)) / math.log(2)


def finetunes(seed: int, step: Callable[[], None]) -> tuple[nn.Module, dict[str, nn.Module], dict[str, Tensor]]:
    """The base, a fine-tune for each kind, and what they are judged on."""
    data = texts()
    torch.manual_seed(seed)
    training = {kind: rows[:-HELD_OUT] for kind, rows in data.items()}
    base = train(LanguageModel(), torch.cat(list(training.values())), BASE_STEPS, 2e-3, seed)
    step()
    models = {}
    for number, (kind, rows) in enumerate(training.items()):
        tuned = copy.deepcopy(base)
        for name, parameter in tuned.named_parameters():
            parameter.requires_grad_("layers" in name and parameter.dim() == 2)
        models[kind] = train(tuned, rows, TUNE_STEPS, 1e-3, seed + number)
        step()
    return base, models, {kind: rows[-HELD_OUT:] for kind, rows in data.items()}


def configurations() -> dict[str, randes.Config]:
    """What is superposed how; ``group_size`` is varied on top."""
    plain = randes.Config(include=("layers*weight",))
    ranks = {f"shared basis of rank {rank}": replace(plain, rank=rank) for rank in (4, 8, 16, 32)}
    return {
        "column signs": replace(plain, signs="columns"),
        "layer shuffle + column signs": replace(plain, signs="columns", shuffle_layers=-1),
        "two-sided signs": plain,
        "two-sided, centred": replace(plain, centre=True),
        **ranks,
        **{f"{name}, centred": replace(config, centre=True) for name, config in ranks.items()},
    }


def low_rank(delta: Tensor, rank: int) -> tuple[Tensor, float]:
    """A truncated singular value decomposition, and bits a parameter in fp16."""
    u, s, v = torch.linalg.svd(delta)
    n, k = delta.shape
    return u[:, :rank] * s[:rank] @ v[:rank], 16 * rank * (n + k) / (n * k)


def one_bit(delta: Tensor, _: int) -> tuple[Tensor, float]:
    """Signs and one scale (BitDelta)."""
    return delta.sign() * delta.abs().mean(), 1.0


def two_bits(delta: Tensor, group: int) -> tuple[Tensor, float]:
    """Four levels around zero with a scale for every ``group`` columns."""
    blocks = delta.unflatten(1, (-1, group))
    step = blocks.abs().amax(-1, keepdim=True) * 0.5
    levels = ((blocks / step - 0.5).round().clamp(-2, 1) + 0.5) * step
    return levels.flatten(1), 2 + 16 / group


PER_TASK = {
    "per-task rank 2": (low_rank, 2), "per-task rank 8": (low_rank, 8), "per-task 1 bit": (one_bit, 0),
    "per-task 2 bits": (two_bits, 64),
}  # fmt: skip


def measure(seed: int, step: Callable[[], None]) -> list[dict[str, Any]]:
    """A row for each method and number of models in a group."""
    base, models, held_out = finetunes(seed, step)
    before = {kind: bits(base, rows) for kind, rows in held_out.items()}
    own = {kind: bits(models[kind], rows) for kind, rows in held_out.items()}
    probe = copy.deepcopy(base)
    origin = {name: value.clone() for name, value in base.state_dict().items()}
    states = {kind: model.state_dict() for kind, model in models.items()}
    rows: list[dict[str, Any]] = []

    def add(method: str, group: int, storage: float, state_of: Callable[[str], dict[str, Tensor]]) -> None:
        kept = {}
        for kind in models:
            probe.load_state_dict(state_of(kind))
            kept[kind] = (before[kind] - bits(probe, held_out[kind])) / (before[kind] - own[kind])
        rows.append({"method": method, "group": group, "bits": storage, "seed": seed, "kept": kept})
        step()

    matrices = [name for name, value in origin.items() if name.startswith("layers") and value.dim() == 2]
    entries = sum(origin[name].numel() for name in matrices)
    deltas = {kind: {name: state[name] - origin[name] for name in matrices} for kind, state in states.items()}
    for group in GROUPS:
        sums = {}
        for first in range(0, len(models), group):
            kinds = list(models)[first : first + group]
            sums |= dict.fromkeys(kinds, task_arithmetic([deltas[kind] for kind in kinds]))

        def merged(kind: str, scale: float, sums: dict[str, dict[str, Tensor]] = sums) -> dict[str, Tensor]:
            return {**origin, **{name: origin[name] + scale * total for name, total in sums[kind].items()}}

        best = []
        for scale in LAMBDAS:
            found = []
            for kind in models:
                probe.load_state_dict(merged(kind, scale))
                found.append((before[kind] - bits(probe, held_out[kind])) / (before[kind] - own[kind]))
            best.append((statistics.mean(found), scale))
        chosen = max(best)[1]
        add("task arithmetic, best λ", group, 16 / group, lambda kind, scale=chosen: merged(kind, scale))  # type: ignore[misc]
        for method, config in configurations().items():
            sup = randes.compress(origin, states, replace(config, group_size=group))
            extra = 8 * sup.sizes.basis / (entries * len(models))
            add(method, group, 16 / group + extra, sup.retrieve)
    for method, (approximate, size) in PER_TASK.items():
        made = {
            kind: {
                name: origin[name] + approximate(deltas[kind][name], size)[0] if name in matrices else value
                for name, value in state.items()
            }
            for kind, state in states.items()
        }
        storage = sum(approximate(origin[name], size)[1] * origin[name].numel() for name in matrices) / entries
        add(method, 1, storage, made.__getitem__)
    rows.append({"method": "fine-tunes", "group": 1, "bits": 16.0, "seed": seed, "base": before, "own": own})
    return rows


def shares(rows: list[dict[str, Any]], method: str, group: int) -> tuple[float, float, float] | None:
    """Mean over kinds and seeds, half the range over seeds, and the worst kind's mean over seeds: in %."""
    chosen = [row["kept"] for row in rows if (row["method"], row["group"]) == (method, group) and "kept" in row]
    if not chosen:
        return None
    means = [100 * statistics.mean(kept.values()) for kept in chosen]
    worst = min(100 * statistics.mean(kept[kind] for kept in chosen) for kind in chosen[0])
    return statistics.mean(means), (max(means) - min(means)) / 2, worst


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: % of the gain that survives, mean ± half the range over seeds, the worst kind in brackets."""
    methods = dict.fromkeys(row["method"] for row in rows if row["group"] > 1)
    lines = ["| method | " + " | ".join(f"groups of {g}" for g in GROUPS) + " |", "|---" * (len(GROUPS) + 1) + "|"]
    for method in methods:
        cells = []
        for group in GROUPS:
            found = shares(rows, method, group)
            storage = next(row["bits"] for row in rows if (row["method"], row["group"]) == (method, group))
            cells.append(
                "–" if found is None else f"{found[0]:.1f} ± {found[1]:.1f} ({found[2]:.0f}), {storage:.2f} bit"
            )
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    for method in PER_TASK:
        found = shares(rows, method, 1)
        storage = next(row["bits"] for row in rows if row["method"] == method)
        assert found is not None
        cell = f"{found[0]:.1f} ± {found[1]:.1f} ({found[2]:.0f}), {storage:.2f} bit"
        lines.append(f"| {method}, no group | {cell} |" + " – |" * (len(GROUPS) - 1))
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """What survives by storage: one line a method over the sizes of groups, a point for what is stored per task."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 5.5), layout="constrained")
    axes.set_prop_cycle(color=plt.get_cmap("tab20").colors)
    for method in dict.fromkeys(row["method"] for row in rows if "kept" in row):
        sizes = sorted({row["group"] for row in rows if row["method"] == method})
        points = []
        for group in sizes:
            found = shares(rows, method, group)
            assert found is not None
            points.append((next(r["bits"] for r in rows if (r["method"], r["group"]) == (method, group)), found[0]))
        alone, ours = method in PER_TASK, method not in PER_TASK and "arithmetic" not in method
        style = {"marker": "x" if alone else "o", "linestyle": "-" if ours else "--", "markersize": 7 if alone else 5}
        axes.plot(*zip(*points, strict=True), label=method, **style)
    axes.set(
        xscale="log", ylim=(-5, 103), xlabel="bits a superposed parameter and model",
        ylabel="share of the fine-tuning gain that survives (%)",
        title=f"16 fine-tunes of a byte-level language model {WIDTH} wide",
    )  # fmt: skip
    axes.set_xticks([0.5, 1, 2, 4, 8], ["0.5", "1", "2", "4", "8"])
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, loc="lower right", ncols=2)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print the table of the committed rows")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="measure these, and keep the others' rows")
    given = parser.parse_args()
    if not given.table:
        rows: list[dict[str, Any]] = []
        if RESULTS.exists():
            held = json.loads(RESULTS.read_text(encoding="utf-8"))["rows"]
            rows = [row for row in held if row["seed"] not in given.seeds]
        steps = 1 + 16 + len(GROUPS) * (1 + len(configurations())) + len(PER_TASK)
        with Progress() as bars:
            for seed in given.seeds:
                task = bars.add_task(f"seed {seed}", total=steps)
                rows += measure(seed, lambda task=task: bars.advance(task))  # type: ignore[misc]
                lines = ",\n".join(json.dumps(row) for row in rows)
                head = json.dumps(machine("cpu"))
                RESULTS.write_text(f'{{"machine": {head},\n"rows": [\n{lines}\n]}}\n', encoding="utf-8")
        draw(rows, PLOT)
    print(table(json.loads(RESULTS.read_text(encoding="utf-8"))["rows"]))


if __name__ == "__main__":
    main()
