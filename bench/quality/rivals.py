"""Other methods at the same whole-store sizes, on the fine-tunes of SmolLM2-135M: re-creations, by the same judge.

    python bench/quality/rivals.py [--models FOLDER]     two hours on one core, into bench/results/rivals.json
    python bench/quality/rivals.py --table [all]         prints what is there as a Markdown table, each method's best
    python bench/quality/rivals.py --plot                draws it beside our stores: bench/results/smollm.png

Each method is in the form in which it does best here: unbiased scales, scales a row, rotated where that helps; rows say
which. A store is counted whole: the base once, and for every model all that a file of that form would need, with its
norms as they are (rival_methods.py says what each needs). A merged model needs no base beside it, and takes 1x. The
table of embeddings has a form of its own, said in the row: what does best for its size. What a method leaves open
(λ) is chosen by the mean loss on a quarter of the validation text. That text is half of what shares are measured on:
in the rivals' favour.
"""

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import rival_methods as methods
import torch
from language import read, write
from rich.progress import Progress
from rival_forms import Form, bits, dropped, mixed, of_rank, signs, uneven
from rival_methods import per_model
from rival_tables import draw, short_table, table
from safetensors import safe_open
from smollm import KINDS, MODELS, base_folder, finetuned, held_out_loss
from smollm_kept import RESULTS as OURS
from smollm_kept import Judge
from torch import Tensor

RESULTS = OURS.with_name("rivals.json")
FINETUNES = 8
CHOOSING = 2
"""Sequences of each kind's validation text to choose λ on."""
MERGED, RESCALED = (0.1, 0.2, 0.3, 0.45), (0.4, 0.7, 1.0)


class Rival(NamedTuple):
    """A method in one form, with one for the table. scales: λ, of which it gets the best. alone: one merged model."""

    method: str
    matrices: Form
    table: Form
    scales: tuple[float, ...] = (1.0,)
    alone: bool = False

    @property
    def entries(self) -> dict[str, str]:
        """That tell its row from others."""
        return {"method": self.method, "form": self.matrices.name, "table": self.table.name}


def rivals() -> Iterator[Rival]:
    """Those of interest first."""
    one, turned = bits(1), bits(1, rotated=True)
    yield Rival("BitDelta", one, one)
    yield Rival("BitDelta", turned, turned)
    yield Rival("T-Switch", signs(0.015), turned)
    for rank in (13, 26):
        yield Rival("SVD", of_rank(rank, 4), of_rank(32, 4))
    for ranks in ((2, 16, 30), (2, 34, 60), (4, 68, 120)):
        yield Rival("Delta-CoMe", mixed(*zip(ranks, (8, 3, 2), strict=True)), of_rank(32, 4))
    yield Rival("T-Switch", signs(0.03), signs(0.03))
    elected = Form("an elected delta and masks", methods.elected)
    yield Rival("EMR", elected, elected, RESCALED)
    yield Rival("DARE", dropped(0.125, 1, rotated=True), turned)
    magnitude = Form("1 bit, mean magnitude", per_model(methods.mean_magnitude))
    yield Rival("BitDelta", magnitude, magnitude)
    yield Rival("SVD", of_rank(52, 2), of_rank(32, 4))
    total = Form("the sum", methods.summed)
    yield Rival("task arithmetic", total, total, MERGED, alone=True)
    yield Rival("T-Switch", signs(0.1), turned)
    yield Rival("UltraDelta", uneven(0.25, 4), one, RESCALED)
    yield Rival("DARE", dropped(0.1, 16), one, RESCALED)
    yield Rival("T-Switch", Form("5 % of a matrix", per_model(methods.sparse_signs, share=0.05)), one, RESCALED)
    masks = Form("the sum and masks", methods.tall_masks)
    yield Rival("TALL-masks", masks, masks, RESCALED)
    yield Rival("TSV-Compress", of_rank(72, 16), of_rank(72, 16))
    trimmed = Form("20 % of each, merged", methods.ties)
    yield Rival("TIES", trimmed, trimmed, (0.4, 0.7, 1.0, 1.4), alone=True)
    yield Rival("TSV-Merge", Form("1/8 of the directions", methods.singular_vectors_merged), total, MERGED, alone=True)
    yield Rival("T-Switch", signs(0.05), turned)
    yield Rival("T-Switch", signs(0.01), signs(0.01))
    yield Rival("BitDelta", bits(2, rotated=True), turned)
    yield Rival("SVD", of_rank(13, 16), of_rank(16, 16))


@dataclass(frozen=True)
class Models:
    """A base and fine-tunes of it on disk, read a tensor at a time."""

    base: Path
    own: Mapping[str, Path]

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        with safe_open(self.base / "model.safetensors", "pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 not a dict

    def tensor(self, folder: Path, name: str) -> Tensor:
        with safe_open(folder / "model.safetensors", "pt") as file:
            found: Tensor = file.get_tensor(name).float()
        return found

    def deltas(self, name: str) -> Tensor:
        """(J, ...) of one tensor."""
        base = self.tensor(self.base, name)
        return torch.stack([self.tensor(folder, name) - base for folder in self.own.values()])

    @cached_property
    def tiers(self) -> dict[str, int]:
        """Of each matrix, from the third of the least variance on."""
        names = [name for name, shape in self.shapes.items() if len(shape) == 2]
        order = sorted(names, key=lambda name: float(self.deltas(name).square().mean()))
        return {name: 3 * number // len(order) for number, name in enumerate(order)}


@dataclass
class Made:
    """All that a rival makes of the fine-tunes, as deltas, and a whole store's bytes. exact: what λ does not scale."""

    models: Models
    deltas: dict[str, Tensor]
    exact: frozenset[str]
    nbytes: int
    scale: float = 1.0

    @classmethod
    def of(cls, models: Models, rival: Rival) -> "Made":
        made: dict[str, Tensor] = {}
        vectors = frozenset(name for name, shape in models.shapes.items() if len(shape) < 2)
        whole = sum(2 * torch.Size(shape).numel() for shape in models.shapes.values())
        nbytes = whole
        for name in models.shapes:
            deltas = models.deltas(name)
            if name in vectors:
                nbytes += 2 * deltas.numel()
                made[name] = methods.summed(deltas)[0] if rival.alone else deltas
                continue
            form = rival.table if "embed" in name else rival.matrices
            method = form.by_tier[models.tiers[name]] if form.by_tier else form.method
            found, held = method(deltas)
            made[name] = found.bfloat16()  # all of the fine-tunes at once, in as much memory as they take
            nbytes += held
        return cls(models, made, frozenset() if rival.alone else vectors, whole if rival.alone else nbytes)

    def retrieve(self, name: str) -> dict[str, Tensor]:
        """A fine-tune, or its first copy, in bf16 as ours are."""
        number = list(self.models.own).index(name.removesuffix(" 0"))
        scales = {tensor: 1.0 if tensor in self.exact else self.scale for tensor in self.deltas}
        return {
            tensor: (self.models.tensor(self.models.base, tensor) + scales[tensor] * values[number].float()).bfloat16()
            for tensor, values in self.deltas.items()
        }


def best_scale(judge: Judge, made: Made, scales: tuple[float, ...]) -> float:
    """By the mean loss on some of the validation text."""

    def loss(scale: float) -> float:
        made.scale, total = scale, 0.0
        for name, rows in judge.texts.items():
            judge.model.load_state_dict(made.retrieve(name), strict=False)
            judge.model.tie_weights()
            total += held_out_loss(judge.model, rows[:CHOOSING])
        return total

    return min(scales, key=loss) if len(scales) > 1 else scales[0]


@torch.no_grad()
def measured(folder: Path, wanted: list[Rival]) -> Iterator[dict[str, Any]]:
    """A row for each."""
    models = Models(base_folder(folder), finetuned(folder, list(KINDS)[:FINETUNES]))
    judge = Judge(models.base, models.own)
    for rival in wanted:
        made = Made.of(models, rival)
        made.scale = best_scale(judge, made, rival.scales)
        size = {"bytes": made.nbytes, "times": made.nbytes / (2 * sum(p.numel() for p in judge.model.parameters()))}
        yield {**rival.entries, "scale": made.scale, "kept": judge.kept(made), **size}  # type: ignore[arg-type]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=MODELS, help="where models are kept (%(default)s)")
    parser.add_argument("--only", default="", help="measure methods whose row holds this, and keep other rows")
    parser.add_argument(
        "--table", choices=("short", "best", "all"), nargs="?", const="best", help="print what is there"
    )
    parser.add_argument("--plot", action="store_true", help="draw what is there")
    given = parser.parse_args()
    if given.table:
        rows = read(RESULTS), read(OURS)
        print(short_table(*rows) if given.table == "short" else table(*rows, given.table == "all"))
    if given.plot:
        draw(read(RESULTS), read(OURS), OURS.with_suffix(".png"))
    if given.table or given.plot:
        return
    there = [{key: row[key] for key in ("method", "form", "table")} for row in read(RESULTS)]
    wanted = [rival for rival in rivals() if given.only in str(rival.entries) and rival.entries not in there]
    with Progress() as bars:
        task = bars.add_task("rivals", total=len(wanted))
        for row in measured(given.models, wanted):
            write(RESULTS, list(KINDS)[:FINETUNES], [*read(RESULTS), row])
            bars.advance(task)


if __name__ == "__main__":
    main()
