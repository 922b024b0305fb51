"""What share of each fine-tune's gain a whole store of SmolLM2-135M keeps, and what that store takes.

    python bench/quality/smollm_kept.py [--models FOLDER]     an hour and a half on 2 cores, into
                                                              bench/results/smollm.json; smollm.py makes the models
    python bench/quality/smollm_kept.py --table [more]        prints what is there as a Markdown table

The share is ``(L_base − L_retrieved) / (L_base − L_own)`` in nats a token on held-out text, everything retrieved:
matrices, tables, norms. A store is counted whole, the base with it, in units of one model in bf16. Where there are
more models than fine-tunes, they are these again under other names, so with other signs: the interference of so many.
Sixteen and thirty-two fine-tunes are the first eight and those on the next kinds of text.
"""

import argparse
import json
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from language import Rows, read, write
from rich.progress import Progress
from smollm import KINDS, MODELS, Texts, base_folder, finetuned, held_out_loss

import randes
from randes.config import Rank
from randes.superposition.packed_tensors import in_words

RESULTS = Path(__file__).parents[1] / "results" / "smollm.json"


@dataclass(frozen=True)
class Store:
    """One way to keep so many models. bits: of D, 16 for the integers themselves. embeddings: bits of the tables beside
    their directions, or what ``Config.embeddings`` says. finetunes: how many there are; 8 where a row says nothing."""

    models: int
    group: int
    rank: Rank
    bits: float
    embeddings: float | str
    matrix: str = "signs"
    finetunes: int = 8

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> "Store":
        """That a row is of."""
        return cls(**{key: row[key] for key in cls.__dataclass_fields__ if key in row})


FORMS: dict[tuple[int, int, Rank, str], tuple[tuple[float, float | str], ...]] = {
    (8, 4, "auto", "rotation"): ((0.5, 0.5), (0.5, 1), (0.5, 0), (1, 0.5), (1, 1), (1, 2)),
    (8, 8, "auto", "signs"): ((2, 0.5), (2, 0), (2, 1), (2, 2), (1, 0), (1, 1), (1, 2), (16, "own")),
    (8, 3, "auto", "rotation"): ((1, 0.5), (1, 1)),
    (8, 2, "auto", "rotation"): ((0.5, 0.5), (0.5, 1), (0.5, 2), (1, 0.5), (1, 1)),
    (8, 8, "auto", "rotation"): ((0.5, 0.5), (1, 1)),
    (32, 8, "auto", "signs"): ((2, 0), (1, 0), (1, 1)),
    (32, 4, "auto", "rotation"): ((0.5, 0), (0.5, 0.5)),
    (32, 8, "auto", "rotation"): ((0.5, 0.5),),
    (32, 16, "auto", "signs"): ((2, 0), (1, 0)),
    (8, 1, "auto", "rotation"): ((0.5, 0.5), (0.5, 1)),
    (8, 1, 0, "rotation"): ((1, 2),),
    (8, 1, 0, "signs"): ((1, 2),),
    (8, 4, "auto", "signs"): ((2, 1), (2, 2), (1, 1)),
    (8, 8, 16, "signs"): ((1, 1), (1, 2)),
    (8, 8, 0, "signs"): ((1, 1), (2, 2)),
}
"""Models, to a group, rank and what turns columns: of one superposition, the bits of D and of the tables."""


def stores() -> Iterator[Store]:
    """Those of one superposition one after the other."""
    for (models, group, rank, matrix), forms in FORMS.items():
        for bits, embeddings in forms:
            yield Store(models, group, rank, bits, embeddings, matrix)
    yield Store(8, 8, "auto", 2, "shared")
    for finetunes, groups in ((16, (8, 16)), (32, (8, 16, 32))):
        for group in groups:
            for bits in (2, 1):
                yield Store(finetunes, group, "auto", bits, 0.5, finetunes=finetunes)
        yield Store(finetunes, 4, "auto", 0.5, 0.5, "rotation", finetunes=finetunes)


class Judge:
    """Losses on the held-out text of each kind, in fp32: bf16 would move a share by half a point. Nothing is chosen on
    the validation text here, so it counts too."""

    def __init__(self, base: Path, own: Mapping[str, Path]) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(base)
        self.model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
        read = {name: Texts.read(name, tokenizer) for name in own}
        self.texts = {name: torch.cat([texts.validation, texts.test]) for name, texts in read.items()}
        self.base, self.own = {}, {}
        for name, folder in own.items():
            self.base[name] = self._loss_of(base, name, folder.name)
            self.own[name] = self._loss_of(folder, name, folder.name)

    def _loss_of(self, folder: Path, name: str, text: str) -> float:
        """Of a model as it is, kept beside the models: these take longer than a store's. text: what it is named by."""
        from transformers import AutoModelForCausalLM

        file, key = folder.with_name("losses.json"), f"{folder.name} on {text}"
        known: dict[str, float] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        if key not in known:
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
            known[key] = held_out_loss(model, self.texts[name])
            file.write_text(json.dumps(known, indent=1), encoding="utf-8")
        return known[key]

    def kept(self, made: randes.Superposition) -> list[float]:
        """Of each kind, in their order."""
        found = []
        for name, rows in self.texts.items():
            self.model.load_state_dict(made.retrieve(f"{name} 0"), strict=False)
            self.model.tie_weights()
            lost = held_out_loss(self.model, rows)
            found.append((self.base[name] - lost) / (self.base[name] - self.own[name]))
        return found


def measured(folder: Path, wanted: str, done: set[Store]) -> Iterator[dict[str, Any]]:
    """A row for each store whose description holds ``wanted`` and that is not done."""
    base, judge, made, of = base_folder(folder), None, None, None
    for store in stores():
        if wanted not in str(store) or store in done:
            continue
        if judge is None or len(judge.own) != store.finetunes:
            own = finetuned(folder, list(KINDS)[: store.finetunes])
            judge = Judge(base, own)
        held = store.embeddings if isinstance(store.embeddings, str) else "own"
        superposed = replace(store, bits=16, embeddings=held)
        if made is None or superposed != of:
            names = {
                f"{name} {copy}": path for copy in range(store.models // store.finetunes) for name, path in own.items()
            }
            config = randes.Config(
                group_size=store.group,
                rank=store.rank,
                embeddings=held,  # type: ignore[arg-type]
                matrix=store.matrix,  # type: ignore[arg-type]
            )
            made, of = randes.compress(base, names, config), superposed
        served = made
        if store.bits < 16:
            bits = None if isinstance(store.embeddings, str) else store.embeddings
            served = made.pack(store.bits, embeddings=bits)
        yield {
            **asdict(store),
            "kept": judge.kept(served),
            "bytes": served.sizes.total,
            "times": served.sizes.total / served.sizes.base,
            "rank_mean": statistics.mean(basis.shape[1] for basis in made.bases.values()) if made.bases else 0,
        }


def table(rows: Rows, finetunes: tuple[int, ...] = (8,)) -> str:
    """By store: % of the gain that is kept in the mean, the worst in brackets, and the whole store's size."""
    lines = ["| models | a group | rank | D | embeddings | kept | whole store |", "|---|---|---|---|---|---|---|"]
    chosen = [row for row in rows if Store.of(row).finetunes in finetunes]
    for row in sorted(chosen, key=lambda row: (row["models"], row["times"])):
        mean, worst = 100 * statistics.mean(row["kept"]), 100 * min(row["kept"])
        bits = in_words(row["bits"]) + (", rotated" if row["matrix"] == "rotation" else "")
        cells = row["models"], row["group"], row["rank"], bits, row["embeddings"]
        lines.append(f"| {' | '.join(map(str, cells))} | {mean:.1f} ({worst:.1f}) | {row['times']:.2f}x |")
    return "\n".join(lines)


TABLES = {"eight": (8,), "more": (16, 32)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=MODELS, help="where models are kept (%(default)s)")
    parser.add_argument("--only", default="", help="measure stores whose description holds this, and keep other rows")
    parser.add_argument("--again", action="store_true", help="measure those too that are there")
    parser.add_argument("--table", choices=TABLES, nargs="?", const="eight", help="print what is there")
    given = parser.parse_args()
    if given.table:
        print(table(read(RESULTS), TABLES[given.table]))
        return
    done = set() if given.again else {Store.of(row) for row in read(RESULTS)}
    with Progress() as bars:
        task = bars.add_task("stores", total=sum(given.only in str(store) and store not in done for store in stores()))
        for row in measured(given.models, given.only, done):
            rows = [*(old for old in read(RESULTS) if Store.of(old) != Store.of(row)), row]
            write(RESULTS, list(KINDS)[: max(len(row["kept"]) for row in rows)], rows)
            bars.advance(task)
    print(table(read(RESULTS)))


if __name__ == "__main__":
    main()
