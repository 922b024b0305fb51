"""The load and the rows of the bench of vLLM, and the table in its page."""

import json
from collections import Counter
from pathlib import Path

import vllm_serving
from vllm_serving import Answer, requests, row, table

ROOT = Path(__file__).parent.parent.parent


def test_requests_are_a_zipf_mix_and_the_same_each_time() -> None:
    found = requests(4000, 8, 100, 5)
    assert found == requests(4000, 8, 100, 5)
    counts = Counter(request.model for request in found)
    assert 1.7 < counts[0] / counts[1] < 2.3
    assert 6 < counts[0] / counts[7] < 10
    assert all(len(request.prompt) == 5 and max(request.prompt) < 100 for request in found)


def test_a_row_is_of_all_answers() -> None:
    answers = [Answer(number / 100, 1.0, 10) for number in range(1, 101)]
    found = row("one", answers, 20.0, more=1)
    assert found == {
        "contestant": "one", "requests": 100, "tokens_per_second": 50.0, "first_token_median": 0.505,
        "first_token_p95": 0.95, "more": 1,
    }  # fmt: skip


def test_every_contestant_is_started_over_what_it_serves(tmp_path: Path) -> None:
    for name, folders in {"one": ["m0"], "processes": ["m0", "m1"], "lora": ["base"]}.items():
        commands = vllm_serving.servers(name, tmp_path, 2)
        assert [Path(command[command.index("--model") + 1]).name for command in commands] == folders
    assert set(vllm_serving.LABELS) == {*vllm_serving.CONTESTANTS}


def test_the_table_in_the_page_is_that_of_the_rows() -> None:
    rows = json.loads((ROOT / "bench" / "results" / "cpu" / "vllm_serving.json").read_text("utf-8"))["rows"]
    page = (ROOT / "docs" / "vllm.md").read_text("utf-8")
    shown = page.partition("<!-- vllm: python bench/speed/vllm_serving.py -->\n")[2].partition("\n<!-- /vllm -->")[0]
    assert shown == table(rows)
    assert all(one["requests"] == 200 for one in rows)
