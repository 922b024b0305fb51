"""How long a store will take to be made: worked out by hand, from rates that were given, and measured."""

import json
import re
from pathlib import Path
from typing import Any

import cluster_plan
import pytest
import torch
from models import finetune, net
from typer.testing import CliRunner

import randes
from randes import cluster
from randes.checkpoints.safetensors import write_file
from randes.cli import app
from randes.cli.planning import lasting
from randes.cluster import Rates

ROWS = COLUMNS = 256
MATRIX = ROWS * COLUMNS * 4
RATES = Rates(core=1e6, read=4e6, write=2e6)


@pytest.fixture
def base(tmp_path: Path) -> str:
    """Three matrices of 256 KiB in fp32, each a part."""
    write_file(tmp_path / "base.safetensors", {f"layers.{n}.weight": torch.ones(ROWS, COLUMNS) for n in range(3)})
    return str(tmp_path / "base.safetensors")


def test_times_are_those_of_the_parts(base: str) -> None:
    store = 3 * MATRIX + 3 * MATRIX // 2  # a base in fp32, and one group's integers
    one, two, many = cluster.plan_run(base, 4, RATES, randes.Config(rank=0), workers=(1, 2, 9), shard_size=MATRIX)
    part = max(5 * MATRIX / 1e6, 6 * MATRIX / 4e6) + store / 3 / 2e6
    assert (one.parts, one.read, one.written, one.memory) == (3, 18 * MATRIX, store, store // 3)
    assert [run.seconds for run in (one, two, many)] == pytest.approx([3 * part, 2 * part, part])
    assert [run.core_seconds for run in (one, two, many)] == pytest.approx([3 * part, 4 * part, 9 * part])


def test_a_shared_basis_is_three_more_readings_and_a_mean_one(base: str) -> None:
    def read(**config: Any) -> int:
        return cluster.plan_run(base, 4, RATES, randes.Config(**config), shard_size=MATRIX)[0].read

    plain = read(rank=0)
    assert read(rank=4) - plain == 3 * 5 * 3 * MATRIX
    assert read(rank=0, centre=True) - plain == 5 * 3 * MATRIX


def test_reading_is_what_takes_long_where_it_is_slow_or_shared(base: str) -> None:
    def seconds(workers: int, **rates: float) -> float:
        found = Rates(**{"core": 1e9, "read": 1e6, "write": 1e9, **rates})
        return cluster.plan_run(base, 4, found, randes.Config(rank=0), workers=[workers], shard_size=MATRIX)[0].seconds

    assert seconds(1) == pytest.approx(18 * MATRIX / 1e6, rel=0.01)
    assert seconds(3) == pytest.approx(6 * MATRIX / 1e6, rel=0.01)
    assert seconds(3, storage=1e6) == pytest.approx(18 * MATRIX / 1e6, rel=0.01)
    assert seconds(9, storage=1e6) == pytest.approx(18 * MATRIX / 1e6, rel=0.01)  # three of them work
    assert seconds(1, storage=1e9) == seconds(1)


def test_what_is_planned_has_the_parts_and_at_least_the_bytes_of_what_is_made(tmp_path: Path) -> None:
    model = net()
    write_file(tmp_path / "base.safetensors", model.state_dict())
    write_file(tmp_path / "m.safetensors", finetune(model, 1).state_dict())
    base, models = str(tmp_path / "base.safetensors"), {"m": str(tmp_path / "m.safetensors")}
    (planned,) = cluster.plan_run(base, 1, RATES, randes.Config(rank=4), shard_size=8000)
    numbers: list[int] = []

    def counted(function: Any, job: Any, parts: range) -> Any:
        numbers.extend(parts)
        return cluster.in_this_process(function, job, parts)

    cluster.compress(base, models, rank=4, out=tmp_path / "store", shard_size=8000, run=counted)
    assert planned.parts == len(numbers)
    assert randes.Superposition.load(tmp_path / "store").nbytes <= planned.written


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"workers": [0]}, "workers must be at least 1, got 0"),
        ({"workers": [1.5]}, "workers must be at least 1, got 1.5"),
        ({"models": 0}, "models must be at least 1, got 0"),
        ({"shard_size": 0}, "shard_size must be above 0"),
        ({"shard_size": "x"}, "shard_size must be a number of bytes"),
    ],
)
def test_numbers_that_cannot_be_are_refused(how: dict[str, Any], said: str, base: str) -> None:
    with pytest.raises(ValueError, match=said):
        cluster.plan_run(**{"base": base, "models": 4, "rates": RATES, **how})


@pytest.mark.parametrize("rate", [{"core": 0}, {"read": -1.0}, {"write": float("inf")}, {"storage": float("nan")}])
def test_rates_that_cannot_be_are_refused(rate: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(rate))} must be a number of bytes a second"):
        Rates(**{"core": 1.0, "read": 1.0, "write": 1.0, **rate})


def test_rates_are_measured_where_they_are_not_given(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("randes.cluster.plan.SAMPLE", 1 << 20)
    monkeypatch.setattr("randes.cluster.plan.PIECE", 1 << 18)
    monkeypatch.setattr("randes.cluster.plan.SIDE", 128)
    found = cluster.measured(base, known={"write": 7.0, "storage": 8.0})
    assert (found.write, found.storage) == (7.0, 8.0)
    assert found.core > 1e3
    assert found.read > 1e3
    assert cluster.measured(base, known={"core": 1.0, "read": 1.0}).write > 1e3
    assert cluster.measured(base, cores=2, known={"write": 1.0, "read": 1.0}).core > 1e3
    with pytest.raises(ValueError, match=r"config\.include must be patterns"):
        cluster.measured(base, randes.Config(include=lambda *_: True), known={"write": 1.0, "read": 1.0})
    monkeypatch.setattr("randes.cluster.plan._ALONE", "raise SystemExit(1)")
    with pytest.raises(randes.RandesError, match="the rate of a core could not"):
        cluster.measured(base, known={"write": 1.0, "read": 1.0})
    known = {"core": 1.0, "write": 1.0}
    with pytest.raises(ValueError, match="read must be given: Net has no files whose rate could be measured"):
        cluster.measured(net(), known=known)
    import fsspec

    fsspec.filesystem("memory").put_file(base, "/rates/base.safetensors")
    assert cluster.measured("memory://rates/base.safetensors", known=known).read > 1e3
    fsspec.filesystem("memory").rm("/rates", recursive=True)


def test_the_command_line_plans_a_run(base: str) -> None:
    command = ["plan", "--base", base, "--models", "4", "--rank", "0", "--workers", "1", "--workers", "9"]
    rates = ["--core", "1", "--read", "4", "--write", "2", "--shard-size", str(MATRIX)]
    shown = CliRunner().invoke(app, [*command, *rates, "--price", "3600"])
    assert shown.exit_code == 0, shown.output
    assert "1.00 MB/s of checkpoints superposed by a core, 4.00 MB/s read and 2.00 MB/s written" in shown.stdout
    found = json.loads(
        CliRunner().invoke(app, [*command, *rates, "--storage", "9", "--price", "3600", "--json"]).stdout
    )
    one, _ = cluster.plan_run(base, 4, RATES, randes.Config(rank=0), workers=(1, 9), shard_size=MATRIX)
    assert found["rates"] == {"core": 1e6, "read": 4e6, "write": 2e6, "storage": 9e6}
    assert found["runs"][0]["seconds"] == pytest.approx(one.seconds)
    assert found["runs"][0]["cost"] == round(one.core_seconds, 2)
    for wrong in (["--price", "-1"], ["--core", "0"], ["--workers", "0"]):
        assert CliRunner().invoke(app, [*command, *rates, *wrong]).exit_code == 2
    alone = CliRunner().invoke(app, ["plan", "--base", base, "--models", "4", "--price", "1"])
    assert alone.exit_code == 2
    assert "--price goes with --workers" in alone.output


def test_times_are_shown_in_words() -> None:
    shown = {5.04: "5.0 s", 59.0: "59.0 s", 61: "1 min", 3599: "1 h 00 min", 7500: "2 h 05 min"}
    assert {seconds: lasting(seconds) for seconds in shown} == shown


def test_the_tables_on_the_page_are_those_of_the_rows() -> None:
    page = (Path(cluster_plan.__file__).parents[2] / "docs" / "remote.md").read_text(encoding="utf-8")
    rows = json.loads(cluster_plan.RESULTS.read_text(encoding="utf-8"))
    for name, table in (("cluster", cluster_plan.table), ("cluster check", cluster_plan.check_table)):
        shown = re.search(rf"<!-- {name}: .*? -->\n(.*?)\n<!-- /{name} -->", page, re.DOTALL)
        assert shown is not None, name
        assert shown[1].strip() == table(rows)
    assert [(run["model"], run["workers"]) for run in rows["runs"]] == [
        (model, count) for model in ("8B", "70B") for count in (1, 8, 64)
    ]
