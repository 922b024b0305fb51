"""Every architecture of Transformers: a served model answers as the retrieved model alone, or refuses with our error.

    python tests/integrations/architecture_sweep.py [--only REGEX] [--json FILE] [--jobs 2] [--seconds 60] [--again]
                                          [--look]

Each class that ``architecture_cases.py`` builds gets two fine-tunes with every parameter moved. What is served, one
model at a time and in mixed batches, is compared with plain models that hold the retrieved tensors
(``architecture_measure.py``). What cannot be built small or run with made-up inputs is listed with the reason.
"""

import argparse
import json
import multiprocessing
import platform
import re
import resource
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from architecture_cases import Case, cases
from architecture_inputs import described
from architecture_measure import OUTCOMES, Result, kind, timed
from architecture_tables import TABLES

MEMORY = 6 << 30


def _worker(case: Case, pipe: Any, seconds: int, look: bool) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))  # of work, however busy the machine is
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY + _address_space(), MEMORY + _address_space()))
    sys.stdout = sys.stderr = open("/dev/null", "w")  # noqa: SIM115
    try:
        result = timed(case, look)
    except BaseException as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        why = f"not run: {described(error)} (the sweep's own, {Path(last.filename).name}:{last.lineno})"
        result = Result(case.name, **dict.fromkeys(OUTCOMES, why))
    pipe.send(asdict(result))


def _address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


RESULTS = Path(__file__).parents[2] / "bench" / "results" / "architectures.json"


def sweep(chosen: list[Case], jobs: int, seconds: int, look: bool = True) -> Iterator[Result]:
    """Each case in a process of its own, with limits on memory and time."""
    context = multiprocessing.get_context("fork")
    waiting, running = list(reversed(chosen)), {}
    while waiting or running:
        while waiting and len(running) < jobs:
            case = waiting.pop()
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_worker, args=(case, theirs, seconds, look))
            process.start()
            theirs.close()
            running[case.name] = (process, ours, time.perf_counter())
        for name, (process, pipe, start) in list(running.items()):
            late = time.perf_counter() - start > 20 * seconds
            if not (pipe.poll(0.01) or late):
                continue
            try:
                yield Result(**pipe.recv()) if pipe.poll() else _lost(name, f"over {20 * seconds} s")
            except EOFError:
                yield _lost(name, f"its process ended, at {seconds} s of work or for another reason")
            process.kill()
            process.join()
            del running[name]


def _lost(name: str, why: str) -> Result:
    return Result(name, **dict.fromkeys(OUTCOMES, f"not run: {why}"))


def versions() -> dict[str, str]:
    """What the results were measured with."""
    return {"transformers": hf.__version__, "torch": torch.__version__, "processor": platform.machine()}


def prepare() -> None:
    """For this process and those that are forked from it."""
    import transformers.models.bert.modeling_bert
    import transformers.models.vit.modeling_vit  # noqa: F401

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    hf.logging.set_verbosity_error()
    hf.utils.logging.disable_progress_bar()


def breadth_first(chosen: list[Case]) -> list[Case]:
    """One class of each family first, by the word that its name begins with."""
    place: Counter[str] = Counter()
    order = {}
    for case in chosen:
        family = re.split(r"(?<=.)(Model|For[A-Z])", case.class_name)[0]
        order[case.name] = place[family]
        place[family] += 1
    return sorted(chosen, key=lambda case: order[case.name])


def main() -> None:
    """Measure what was not measured yet, and print totals."""
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="a regular expression of class names")
    parser.add_argument("--json", type=Path, help="where rows are kept; those that are there are not measured again")
    parser.add_argument("--again", action="store_true", help="measure them all the same")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seconds", type=int, default=60, help="of work for one class")
    parser.add_argument("--look", action="store_true", help="for matrices that do not show in the output, too")
    parser.add_argument("--table", action="store_true", help="print what is in the rows that are committed, and end")
    options = parser.parse_args()
    if options.table:
        measured = json.loads(RESULTS.read_text())
        print("\n\n".join(f"{name}\n\n{table(measured)}" for name, table in TABLES.items()))
        return
    prepare()
    rows: dict[str, dict[str, Any]] = {}
    if options.json and options.json.exists():
        rows = {row["name"]: row for row in json.loads(options.json.read_text())["rows"]}
    chosen = [case for case in cases() if re.search(options.only, case.name)]
    todo = [case for case in breadth_first(chosen) if options.again or not rows.get(case.name, {}).get("disk")]

    def save() -> None:
        if options.json:
            ordered = [rows[name] for name in sorted(rows)]
            options.json.write_text(json.dumps({"machine": versions(), "rows": ordered}, indent=1) + "\n")

    with Progress(auto_refresh=False, console=Console(stderr=True)) as progress:
        task = progress.add_task("architectures", total=len(todo))
        for result in sweep(todo, options.jobs, options.seconds, options.look):
            rows[result.name] = asdict(result)
            progress.update(task, advance=1, description=result.name[:40], refresh=True)
            if len(rows) % 20 == 0:
                save()
    save()
    table = Table("class", *OUTCOMES, "error", "unseen")
    shown = [rows[case.name] for case in chosen]
    for row in shown:
        if {kind(row[way]) for way in OUTCOMES} - {"right", "", "not run"}:
            table.add_row(row["name"], *(row[way] for way in OUTCOMES), f"{row['error']:.1g}", str(len(row["unseen"])))
    console = Console()
    console.print(table)
    for column in OUTCOMES:
        console.print(column, dict(Counter(kind(row[column]) for row in shown)))


if __name__ == "__main__":
    main()
