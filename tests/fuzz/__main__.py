"""Longer runs than the tests have:

    python tests/fuzz --mutations 100000 --every 1 --loads 10000 --operations 100 --soak 30

Each part runs where its number is given, prints what it counted, and names what must not be, with the seed or the call
that makes it again. The exit status is 1 where there is any.
"""

import argparse
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(path) for path in (Path(__file__).parent, ROOT / "tests", ROOT, ROOT / "python_api")]

from corpus import Corpus  # noqa: E402
from failures import injected  # noqa: E402
from hypothesis import settings  # noqa: E402
from hypothesis.stateful import run_state_machine_as_test  # noqa: E402
from mutations import damage  # noqa: E402
from operations import Store  # noqa: E402
from readers import beside_a_writer  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import Progress  # noqa: E402
from rows import NAMES, keep, read, table  # noqa: E402
from soak import soak  # noqa: E402

Found = tuple[Counter[str], list[str]]


def operations(examples: int) -> Found:
    """Sequences of 20 random operations each."""
    how = settings(max_examples=examples, stateful_step_count=20, deadline=None, database=None)
    run_state_machine_as_test(Store, settings=how)
    return Counter({"sequences": examples}), []


def damages(at: Path, first: int, count: int) -> Found:
    """Damages of the seeds ``first`` and on; what must not be is shown as it comes."""
    corpus, done, wrong = Corpus.made(at), Counter[str](), list[str]()
    with Progress(console=Console(stderr=True)) as bars:
        task = bars.add_task("damages", total=count)
        for start in range(first, first + count, 500):
            some = min(500, first + count - start)
            ends, found = damage(corpus, start, some)
            done += ends
            wrong += found
            for line in found:
                bars.console.print(line, markup=False)
            bars.advance(task, some)
    return done, wrong


def part(what: str, command: str, run: Callable[[], Found], out: Path | None) -> int:
    """Run one, print what it found and keep that as a row of ``out``; how much of it must not be."""
    began = time.monotonic()
    done, wrong = run()
    seconds = round(time.monotonic() - began)
    print(f"{what}: {seconds} s")
    for name, count in sorted(done.items()):
        print(f"  {count:8} {name}")
    for line in wrong:
        print(f"  WRONG {line}")
    if out is not None:
        keep(out, {"what": what, "command": command, "seconds": seconds, "counts": done, "wrong": wrong})
    return len(wrong)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutations", type=int, default=0, help="damaged stores, checkpoints and configurations")
    parser.add_argument("--first", type=int, default=0, help="the first one's seed")
    parser.add_argument("--every", type=int, default=0, help="a failure at each so many-th call to the system")
    parser.add_argument("--loads", type=int, default=0, help="loads beside a writer")
    parser.add_argument("--operations", type=int, default=0, help="sequences of 20 random operations")
    parser.add_argument("--soak", type=int, default=0, help="minutes of serving while models come and go")
    parser.add_argument("--out", type=Path, help="a file of rows to put what was found into")
    parser.add_argument("--table", action="store_true", help="show the table of what was found")
    given = parser.parse_args()
    if given.table:
        print(table(read()))
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        at = Path(folder)
        runs: dict[str, Callable[[], Found]] = {
            "mutations": lambda: damages(at / "corpus", given.first, given.mutations),
            "every": lambda: injected(at / "failures", given.every),
            "loads": lambda: beside_a_writer(at / "store", given.loads),
            "operations": lambda: operations(given.operations),
            "soak": lambda: soak(given.soak * 60),
        }
        for name, run in runs.items():
            if count := getattr(given, name):
                wrong += part(NAMES[name], f"--{name} {count}", run, given.out)
    if not given.table:
        print("all as it must be" if not wrong else f"{wrong} not as they must be")
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main())
