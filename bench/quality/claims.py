"""The paper's claims (RanDeS, arXiv 2505.11204), measured again on fine-tunes of a small transformer.

    python bench/quality/claims.py                        writes bench/results/claims.json and its plots
    python bench/quality/claims.py --table decorrelation  prints a Markdown table of the rows that are there; see TABLES

Thirty-two fine-tunes of one base, 64 wide, on tasks made of digits: the first 2, 4, 8, 16 and 32 are superposed; and
three sets of eight, on tasks that are more and more alike. Only matrices are fine-tuned, so that all that is lost is
lost to the superposition. Accuracy is normalised: a share of the individual fine-tune's on the same held-out images.
"""

import argparse
import copy
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import randes
from randes.demo.digits import CLASSES, SIZE, TASKS, DigitEncoder, Task, accuracy, load
from randes.demo.run import Finetunes, finetune_for, pretrain
from randes.inspect import analysis
from randes.inspect.report.cosines import of_originals

RESULTS = Path(__file__).parents[1] / "results" / "claims.json"
MODELS = Path(tempfile.gettempdir()) / "randes-claims"
SEEDS = (0, 1, 2)
COUNTS = (2, 4, 8, 16, 32)
ALPHAS = (0.25, 0.5, 0.75, 1.0, 1.25)
THERE = (1, 2, 4, 8, 12, 16)
"""How many models are there when they are evaluated, while they come and go."""
WIDTH, EPOCHS = 64, 5
OWN_SHARES = (0.5, 0.25, 0.0)
"""Of the pixels, how many each task of a set moves in its own way; the others all tasks of the set move alike."""
PAPER = randes.Config(signs="columns", gains="shared")
METHODS = {
    "neither": replace(PAPER, signs="none"),
    "layer shuffle alone": replace(PAPER, signs="none", shuffle_layers=-1),
    "column signs alone": PAPER,
    "both": replace(PAPER, shuffle_layers=-1),
    "randes, two-sided signs (default)": randes.Config(),
}
Row = dict[str, Any]


def pixels_moved(seed: int, share: float = 1.0, before: int | None = None) -> Callable[[Tensor], Tensor]:
    """Permute this share of the pixels; after a permutation of all of them, where ``before`` seeds one."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.arange(SIZE**2)
    if before is not None:
        first = torch.randperm(SIZE**2, generator=torch.Generator().manual_seed(before))
    own = torch.randperm(SIZE**2, generator=generator)[: round(share * SIZE**2)]
    order = torch.arange(SIZE**2)
    order[own] = own[torch.randperm(len(own), generator=generator)]
    return lambda pixels: pixels.flatten(1)[:, first[order]].view(pixels.shape)


def labels_moved(seed: int) -> Callable[[Tensor], Tensor]:
    """Permute the labels."""
    order = torch.randperm(CLASSES, generator=torch.Generator().manual_seed(seed))
    return lambda labels: order[labels]


def sets() -> dict[str, list[Task]]:
    """The tasks that share a superposition, by what they are called."""
    more = [Task(f"pixels {n}", pixels_moved(100 + n)) for n in range(8)]
    more += [Task(f"labels {n}", labels=labels_moved(100 + n)) for n in range(8)]
    alike = {
        f"alike {share}": [Task(f"task {n}", pixels_moved(200 + n, share, before=200)) for n in range(8)]
        for share in OWN_SHARES
    }
    return {"distinct": [*TASKS, *more], **alike}


def finetuned(seed: int, folder: Path, begin: Any) -> dict[str, Finetunes]:
    """Every set's fine-tunes: read from ``folder``, or trained and written there."""

    def kept(name: str, make: Callable[[], nn.Module]) -> nn.Module:
        file = folder / f"seed{seed}-{name.replace(' ', '-')}.safetensors"
        if not file.exists():
            folder.mkdir(parents=True, exist_ok=True)
            save_file(make().state_dict(), file)
        model = DigitEncoder(WIDTH)
        model.load_state_dict(load_file(file))
        return model.eval()

    base = kept("base", lambda: pretrain(seed, begin, width=WIDTH))
    _, held_out = load(seed)
    found = {}
    for name, tasks in sets().items():
        models: dict[str, nn.Module] = {}
        made: dict[str, nn.Module] = {}

        def make(task: Task, tasks: Sequence[Task] = tasks, made: dict[str, nn.Module] = made) -> nn.Module:
            if not made:
                found = finetune_for(
                    base, tasks, seed=seed, matrices_only=True, progress=begin, epochs=EPOCHS, orders=True
                )
                made |= found.models
            return made[task.name]

        for task in tasks:
            models[task.name] = kept(f"{name}-{task.name}", lambda task=task, make=make: make(task))  # type: ignore[misc]
        found[name] = Finetunes(base, models, {task.name: task.of(held_out) for task in tasks}, seed)
    return found


# -------------------------------------------------------------------- what is measured


class Judge:
    """Normalised accuracy of retrieved models."""

    def __init__(self, tuned: Finetunes) -> None:
        self.tuned, self.model = tuned, copy.deepcopy(tuned.base)
        self.own = {name: accuracy(model, tuned.held_out[name]) for name, model in tuned.models.items()}

    def shares(self, superposition: randes.Superposition, names: Sequence[str]) -> dict[str, float]:
        """Of each model, the mean over them and the worst."""
        found = []
        for name in names:
            self.model.load_state_dict(superposition.retrieve(name))
            found.append(accuracy(self.model, self.tuned.held_out[name]) / self.own[name])
        return {"kept": round(statistics.mean(found), 5), "worst": round(min(found), 5)}


def superposed(tuned: Finetunes, config: randes.Config, alpha: float = 1.0) -> randes.Superposition:
    """All of them in one group."""
    config = replace(config, group_size=len(tuned.models), seed=tuned.seed)
    superposition = randes.Superposition.create(tuned.base, config)
    for name, model in tuned.models.items():
        superposition.add(name, model, alpha=alpha)
    return superposition


def by_count(tuned: Finetunes) -> Iterator[Row]:
    """Accuracy and storage against the number of models."""
    for count in COUNTS:
        first = tuned.first(count)
        judge = Judge(first)
        for method, config in METHODS.items():
            made = superposed(first, config)
            held, theirs = analysis.storage(made), analysis.fusionbench_storage(made)
            yield {
                "experiment": "count", "models": count, "method": method, **judge.shares(made, made.names),
                "bytes": made.nbytes, "separate_bytes": made.sizes.separate_models,
                "fusionbench_gb": theirs.nbytes / 1e9, "context_numbers": held.context_numbers,
                "fusionbench_context_numbers": theirs.context_numbers,
            }  # fmt: skip


def by_similarity(sets: dict[str, Finetunes]) -> Iterator[Row]:
    """Cosines of the deltas before and after, and accuracy, of eight tasks that are more and more alike."""
    for name, tuned in sets.items():
        tuned = tuned.first(8)
        judge, states = Judge(tuned), {name: model.state_dict() for name, model in tuned.models.items()}
        for method, config in METHODS.items():
            made = superposed(tuned, config)
            cosines = {
                when: mean_cosine(of_originals(made, states, turned=turned, step=lambda _: None).values)
                for when, turned in (("before", False), ("after", True))
            }
            yield {"experiment": "similarity", "set": name, "method": method, **cosines,
                   **judge.shares(made, made.names)}  # fmt: skip


def by_alpha(tuned: Finetunes) -> Iterator[Row]:
    """Accuracy against α, with eight models."""
    tuned = tuned.first(8)
    judge = Judge(tuned)
    for method, config in METHODS.items():
        for alpha in ALPHAS:
            made = superposed(tuned, config, alpha)
            yield {"experiment": "alpha", "method": method, "alpha": alpha, **judge.shares(made, made.names)}


def by_coming_and_going(tuned: Finetunes) -> Iterator[Row]:
    """Sixteen models join one by one, then leave in the order in which they came."""
    tuned = tuned.first(16)
    judge, names = Judge(tuned), list(tuned.models)
    for method in ("column signs alone", "randes, two-sided signs (default)"):
        config = replace(METHODS[method], group_size=16, seed=tuned.seed)
        made = randes.Superposition.create(tuned.base, config)
        for name in names:
            made.add(name, tuned.models[name])
            if (there := len(made.names)) in THERE:
                yield {"experiment": "joining", "method": method, "models": there, **judge.shares(made, made.names)}
        for number, name in enumerate(names[:-1], 1):
            made.remove(name, tuned.models[name])
            left = names[number:]
            if len(left) not in THERE:
                continue
            anew = randes.Superposition.create(tuned.base, config)
            for other in left:
                anew.add(other, tuned.models[other])
            same = all(torch.equal(made.deltas[0][tensor], anew.deltas[0][tensor]) for tensor in made.superposed)
            yield {"experiment": "leaving", "method": method, "models": len(left), "bytes_as_if_never_there": same,
                   **judge.shares(made, left)}  # fmt: skip


def times() -> Iterator[Row]:
    """Processor seconds to merge a model and to retrieve one: 24 matrices of 1024², fp32, in memory, one thread."""
    torch.manual_seed(0)
    base = {f"layers.{n}.fc.weight": torch.randn(1024, 1024) for n in range(24)}
    tuned = {str(n): {name: value + 0.01 * torch.randn_like(value) for name, value in base.items()} for n in range(16)}
    for method, config in METHODS.items():
        made = randes.Superposition.create(base, replace(config, group_size=16))
        for count, (name, model) in enumerate(tuned.items(), 1):
            began = time.process_time()
            made.add(name, model)
            merged = time.process_time()
            if count in (2, 4, 8, 16):
                made.retrieve(name)
                yield {"experiment": "times", "method": method, "models": count, "merge_s": round(merged - began, 4),
                       "retrieve_s": round(time.process_time() - merged, 4)}  # fmt: skip


def mean_cosine(values: Tensor) -> float:
    """The mean magnitude of a pair's cosine."""
    apart = values[~torch.eye(len(values), dtype=torch.bool)]
    return round(float(apart.abs().mean()), 6)


def measure(folder: Path, seeds: Sequence[int]) -> list[Row]:
    """All rows."""
    rows: list[Row] = []
    with Progress() as bars:

        def begin(stage: str, steps: int) -> Any:
            task = bars.add_task(stage, total=steps)
            return lambda: bars.advance(task)

        for seed in seeds:
            sets = finetuned(seed, folder, begin)
            distinct = sets["distinct"]
            for rest in (by_count(distinct), by_similarity(sets), by_alpha(distinct), by_coming_and_going(distinct)):
                rows += [{"seed": seed, **row} for row in rest]
        rows += list(times())
    return rows


def main() -> None:
    from claim_tables import TABLES, draw, read

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", choices=TABLES, help="print a table of the committed rows")
    parser.add_argument("--times", action="store_true", help="measure the times alone, and keep the other rows")
    parser.add_argument("--models", type=Path, default=MODELS, help="where fine-tunes are kept (%(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    given = parser.parse_args()
    if given.table is not None:
        print(TABLES[given.table](read(RESULTS)))
        return
    torch.set_num_threads(1)
    machine = {"device": "cpu", "processor": platform.processor() or platform.machine(), "torch": torch.__version__}
    if given.times:
        rows = [row for row in read(RESULTS) if row["experiment"] != "times"] + list(times())
    else:
        rows = measure(given.models, given.seeds)
    RESULTS.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1, ensure_ascii=False) + "\n", "utf-8")
    draw(rows, RESULTS.with_suffix(".png"))


if __name__ == "__main__":
    main()
