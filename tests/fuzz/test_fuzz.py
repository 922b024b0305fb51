"""A small budget of each kind of attack, the same at each run; ``python tests/fuzz`` has more."""

import re
from pathlib import Path

import pytest
from corpus import Corpus
from failures import HOW, VERBS, Work, inject
from hypothesis import HealthCheck, settings
from mutations import KINDS, damage
from operations import Store
from readers import beside_a_writer
from rows import RESULTS, read, table

pytestmark = pytest.mark.no_cover  # it does the same many times over
MUTATIONS = 1200
EVERY = 11
"""Calls to the system from one that fails to the next."""


def test_what_was_damaged_is_refused_or_answers_rightly(tmp_path: Path) -> None:
    corpus = Corpus.made(tmp_path)
    done, wrong = damage(corpus, 0, MUTATIONS)
    assert wrong == []
    assert {kind for kind in KINDS if done[f"{kind}: refused"]} >= {*KINDS} - {"names"}
    assert {kind for kind in KINDS if done[f"{kind}: used"]} >= {"bytes of stores", "manifests", "names"}


@pytest.mark.parametrize("verb", VERBS)
def test_a_failure_anywhere_leaves_the_old_store_or_the_new_one(verb: str, tmp_path: Path) -> None:
    work = Work(tmp_path, verb)
    for number, how in enumerate(HOW):
        last = 1 + number
        while inject(work, how, last) and how != "short":
            last += EVERY
        assert last > 1 + number or how == "short"


def test_no_load_beside_a_writer_is_refused(tmp_path: Path) -> None:
    done, wrong = beside_a_writer(tmp_path / "store", 500)
    assert wrong == []
    assert done["stores seen"] > 5


def test_the_table_of_the_longer_runs_is_that_of_their_rows() -> None:
    text = (RESULTS.parents[2] / "docs" / "reliability.md").read_text(encoding="utf-8")
    shown = re.search(r"<!-- reliability: .*? -->\n(.*?)\n<!-- /reliability -->", text, re.DOTALL)
    assert shown is not None
    assert shown[1].strip() == table(read())
    assert not [row["wrong"] for row in read() if row["wrong"]]


TestStore = Store.TestCase
TestStore.settings = settings(
    max_examples=8, stateful_step_count=12, deadline=None, derandomize=True, database=None,
    suppress_health_check=[*HealthCheck],
)  # fmt: skip
