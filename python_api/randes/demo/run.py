"""The experiment: pre-train, fine-tune, superpose in every way, merge in every way, evaluate on held-out images."""

import copy
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from randes.checkpoints.sources import write_file
from randes.config import Config
from randes.demo import baselines
from randes.demo.digits import TASKS, DigitEncoder, Images, Task, accuracy, load, train
from randes.serving.model import SuperposedModel
from randes.superposition.superposition import Superposition

PRETRAINING_EPOCHS, PRETRAINING_RATE = 20, 2e-3
FINETUNING_EPOCHS, FINETUNING_RATE = 10, 5e-4

METHODS = {
    "randes, column signs": Config(signs="columns"),
    "randes, layer shuffle + column signs": Config(signs="columns", shuffle_layers=-1),
    "randes, column signs + permutation": Config(signs="columns", permute=1),
    "randes, two-sided signs (default)": Config(),
}
DEFAULT = "randes, two-sided signs (default)"

Progress = Callable[[str, int], Callable[[], None]]
"""Begins a stage (its name, its steps) and returns what to call after each step."""


@dataclass
class Row:
    """One method: accuracy on each task's held-out images, and that as a share of the individual fine-tune's."""

    method: str
    accuracy: dict[str, float]
    normalised: dict[str, float]
    scale: float | None = None  # λ, where the method has one

    @staticmethod
    def mean(values: dict[str, float]) -> float:
        """Over the tasks."""
        return sum(values.values()) / len(values)


@dataclass(frozen=True)
class Finetunes:
    """A base pre-trained on plain digits, its fine-tunes by task, and each task's held-out images."""

    base: nn.Module
    models: dict[str, nn.Module]
    held_out: dict[str, Images]
    seed: int

    def first(self, count: int) -> "Finetunes":
        """The first so many tasks alone."""
        names = list(self.models)[:count]
        return Finetunes(
            self.base,
            {name: self.models[name] for name in names},
            {name: self.held_out[name] for name in names},
            self.seed,
        )


@dataclass(frozen=True)
class Outcome:
    """What the methods made of the fine-tunes, and what the default method stores."""

    rows: list[Row]
    superposition: Superposition
    mixed_difference: float  # largest difference of a logit between one mixed batch and separate ones
    mixed_predictions_equal: bool


def finetune(count: int, *, seed: int, matrices_only: bool, progress: Progress) -> Finetunes:
    """Pre-train, and fine-tune for the first ``count`` tasks, 2 to 16.

    matrices_only: fine-tune only what is superposed, so that norms, biases and head are shared and the transforms
    differ most. Raises ``ValueError`` for a count out of range.
    """
    if not 2 <= count <= len(TASKS):
        raise ValueError(f"models must be from 2 to {len(TASKS)}, got {count}")
    base = pretrain(seed, progress)
    return finetune_for(base, TASKS[:count], seed=seed, matrices_only=matrices_only, progress=progress)


def pretrain(seed: int, progress: Progress, *, width: int = 128) -> nn.Module:
    """A base of this width that knows plain digits."""
    torch.manual_seed(seed)
    training, _ = load(seed)
    base = DigitEncoder(width)
    with _one_thread_a_model():
        step = progress("pre-training", PRETRAINING_EPOCHS)
        train(base, training, epochs=PRETRAINING_EPOCHS, rate=PRETRAINING_RATE, seed=seed, step=step)
    return base


def finetune_for(
    base: nn.Module, tasks: Sequence[Task], *, seed: int, matrices_only: bool, progress: Progress,
    epochs: int = FINETUNING_EPOCHS, orders: bool = False,
) -> Finetunes:  # fmt: skip
    """One fine-tune of ``base`` for each task. orders: give each its own order of batches, where tasks may be one."""
    training, held_out = load(seed)
    chosen = set(Superposition.create(base).superposed) if matrices_only else set(base.state_dict())
    with _one_thread_a_model():
        step = progress("fine-tuning", len(tasks) * epochs)

        def finetuned(number: int, task: Task) -> nn.Module:
            model, images, order = copy.deepcopy(base), task.of(training), seed + number * orders
            train(model, images, epochs=epochs, rate=FINETUNING_RATE, seed=order, step=step, only=chosen)
            return model

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            models = pool.map(finetuned, range(len(tasks)), tasks)
            named = dict(zip((task.name for task in tasks), models, strict=True))
    return Finetunes(base, named, {task.name: task.of(held_out) for task in tasks}, seed)


@contextmanager
def _one_thread_a_model() -> Iterator[None]:
    """Matrices this small gain nothing from several threads; the models do, side by side."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def superpose(base: nn.Module, finetuned: dict[str, nn.Module], config: Config) -> Superposition:
    """All fine-tunes in one superposition."""
    superposition = Superposition.create(base, config)
    for name, model in finetuned.items():
        superposition.add(name, model)
    return superposition


def evaluate(finetunes: Finetunes, *, group_size: int, progress: Progress) -> Outcome:
    """Every method on the held-out images; the superposed ones through ``SuperposedLinear`` alone."""
    base, held_out = finetunes.base, finetunes.held_out
    step = progress("evaluating", 4 + len(METHODS))
    individual = {name: accuracy(model, held_out[name]) for name, model in finetunes.models.items()}

    def row(method: str, found: dict[str, float], scale: float | None = None) -> Row:
        step()
        return Row(method, found, {name: found[name] / individual[name] for name in found}, scale)

    rows = [
        row("individual fine-tunes", individual),
        row("base", {name: accuracy(base, images) for name, images in held_out.items()}),
        row("task arithmetic, best λ", *_merged(finetunes, baselines.task_arithmetic)),
        row("TIES, best λ", *_merged(finetunes, baselines.ties)),
    ]
    for method, config in METHODS.items():
        config = replace(config, group_size=group_size, seed=finetunes.seed)
        superposition = superpose(base, finetunes.models, config)
        model = SuperposedModel(copy.deepcopy(base), superposition)
        rows.append(row(method, _superposed(model, held_out)))
    # The last method is the default: the one that is kept.
    return Outcome(rows, superposition, *_mixed_batch(model, held_out))


def save_checkpoints(folder: Path, finetunes: Finetunes, outcome: Outcome) -> None:
    """Base, fine-tunes and store under ``folder``, as the other commands take them."""
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / "base.safetensors", finetunes.base.state_dict())
    for name, model in finetunes.models.items():
        write_file(folder / f"{name}.safetensors", model.state_dict())
    outcome.superposition.save(folder / "store")


@torch.no_grad()
def _superposed(model: SuperposedModel, held_out: dict[str, Images]) -> dict[str, float]:
    found = {}
    for name, images in held_out.items():
        model.set_adapter(name)
        found[name] = accuracy(model, images)
    return found


@torch.no_grad()
def _merged(
    finetunes: Finetunes, merge: Callable[[baselines.Deltas], dict[str, Tensor]]
) -> tuple[dict[str, float], float]:
    """Merge the matrices at the λ that is best on the held-out images; everything else stays each task's own."""
    base, held_out = finetunes.base.state_dict(), finetunes.held_out
    matrices = Superposition.create(base).superposed
    states = {name: model.state_dict() for name, model in finetunes.models.items()}
    merged = merge([{tensor: state[tensor] - base[tensor] for tensor in matrices} for state in states.values()])
    found: dict[float, dict[str, float]] = {}
    model = copy.deepcopy(finetunes.base)
    for scale in baselines.SCALES:
        matrices_at = {tensor: base[tensor] + scale * delta for tensor, delta in merged.items()}
        found[scale] = {}
        for name, state in states.items():
            model.load_state_dict({**state, **matrices_at})
            found[scale][name] = accuracy(model, held_out[name])
    best = max(found, key=lambda scale: Row.mean(found[scale]))
    return found[best], best


@torch.no_grad()
def _mixed_batch(model: SuperposedModel, held_out: dict[str, Images]) -> tuple[float, bool]:
    """One batch of four images of every task against a batch for each task alone."""
    pixels = torch.cat([images.pixels[:4] for images in held_out.values()])
    names = [name for name in held_out for _ in range(4)]
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(0))
    together = model(pixels[order], adapter_names=[names[place] for place in order])
    separate = torch.empty_like(together)
    for name in held_out:
        rows = torch.tensor([names[place] == name for place in order])
        separate[rows] = model(pixels[order][rows], adapter_names=[name] * int(rows.sum()))
    equal = torch.equal(together.argmax(-1), separate.argmax(-1))
    return float((together - separate).abs().max()), equal
