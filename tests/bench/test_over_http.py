"""The figures on LitServe's page are those of the rows."""

import json
from pathlib import Path

import over_http
import pytest

PAGE = Path(__file__).parents[2] / "docs" / "litserve.md"


def test_the_table_on_the_page_is_that_of_the_rows() -> None:
    rows = json.loads(over_http.RESULTS.read_text(encoding="utf-8"))["rows"]
    text = PAGE.read_text(encoding="utf-8")
    _, _, rest = text.partition("<!-- over http: python bench/speed/over_http.py --table -->\n")
    assert rest.partition("\n<!-- /over http -->")[0] == over_http.table(rows)
    store, plain, processes = (next(row for row in rows if row["way"] == way) for way in over_http.WAYS)
    assert plain["processor"] / store["processor"] == pytest.approx(2 / 3, abs=0.02), "two thirds of the requests"
    assert store["memory"] / processes["memory"] == pytest.approx(1 / 3, abs=0.02), "a third of the memory"
    assert all(len(row["each"]) == row["repeats"] for row in rows)
