"""What a fine-tune keeps that joins a superposition of others later, beside one that was compressed with them.

    python bench/quality/smollm_late.py [--models FOLDER]     into bench/results/smollm-late.json
    python bench/quality/smollm_late.py --table               prints what is there as a Markdown table

Eight fine-tunes of SmolLM2-135M in one group. A shared basis is fixed by those that are there at first, so the last one
finds its own loud directions in it only as far as they are theirs, too. Its neighbours keep what they kept. Shares and
sizes as in ``smollm_kept.py``; packed as by default.
"""

import argparse
from pathlib import Path
from typing import Any

from language import Rows, read, write
from smollm import KINDS, MODELS, base_folder, finetuned
from smollm_kept import Judge

import randes
from randes.superposition.summary import verify

RESULTS = Path(__file__).parents[1] / "results" / "smollm-late.json"
LAST, NEIGHBOUR = "Tcl", "Perl"


def measured(folder: Path) -> Rows:
    """A row for each way in which the last fine-tune may come."""
    base, own = base_folder(folder), finetuned(folder, list(KINDS)[:8])
    judge = Judge(base, {name: own[name] for name in (LAST, NEIGHBOUR)})
    names = {f"{name} 0": path for name, path in own.items()}
    others = {name: path for name, path in names.items() if name != f"{LAST} 0"}
    rows = []
    for way in ("compressed with the others", "added later", "without a basis"):
        config = randes.Config(rank=0 if way == "without a basis" else "auto")
        sup = randes.compress(base, others if way == "added later" else names, config)
        if way == "added later":
            sup.add(f"{LAST} 0", names[f"{LAST} 0"])
        row: dict[str, Any] = {"way": way, "kept": judge.kept(sup.pack())}
        row["error"] = verify(sup, f"{LAST} 0", names[f"{LAST} 0"]).relative_error
        rows.append(row)
    return rows


def table(rows: Rows) -> str:
    """By way: % of the gain kept, and the size of the noise in the weights."""
    lines = [
        f"| the last of eight ({LAST}) | keeps | its neighbour {NEIGHBOUR} | noise in its weights |",
        "|---|---|---|---|",
    ]
    for row in rows:
        last, neighbour = (f"{100 * share:.1f}" for share in row["kept"])
        lines.append(f"| {row['way']} | {last} | {neighbour} | {row['error']:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=MODELS, help="where models are kept (%(default)s)")
    parser.add_argument("--table", action="store_true", help="print what is there")
    given = parser.parse_args()
    if not given.table:
        write(RESULTS, [LAST, NEIGHBOUR], measured(given.models))
    print(table(read(RESULTS)))


if __name__ == "__main__":
    main()
