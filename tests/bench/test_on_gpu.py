"""What will run on a GPU, its control flow on a CPU: every part ends in time, and no step takes another along."""

import json
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import measure
import on_gpu
import pytest
import tune
from on_gpu import Run, Step

from randes_kernels import tiles

ROOT = Path(__file__).parents[2]


def run_part(part: str, folder: Path, *options: str) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows that a part left and what its archive holds."""
    command = [
        sys.executable,
        str(ROOT / "bench" / "speed" / "on_gpu.py"),
        part,
        "--dry-run",
        "--work",
        str(folder / "work"),
    ]
    run = subprocess.run([*command, "--out", str(folder / "out"), *options], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    with tarfile.open(folder / "out" / f"part-{part}.tar.gz") as packed:
        names = packed.getnames()
    return json.loads((folder / "work" / "parts.json").read_text())["rows"], names


def test_a_part_ends_in_time_with_a_row_for_each_step_in_an_archive(tmp_path: Path) -> None:
    rows, names = run_part("1", tmp_path, "--minutes", "0.8")  # the first step is done in half a minute
    assert [row["step"] for row in rows] == ["look", "tests", "profile", "quick bench"]
    assert rows[0]["passed"] or "ended by its time limit" in rows[0]["said"]  # on a busy machine
    own = [".cache/on_gpu/look.json"] if rows[0]["passed"] else []
    assert {".cache/on_gpu/parts.json", "randes_kernels/tables/default.json", *own} <= {*names}
    # On another day it goes on: rows are added.
    rows, _ = run_part("2", tmp_path, "--minutes", "0.2")
    assert [row["step"] for row in rows][4:] == ["tune"]


def in_process(monkeypatch: pytest.MonkeyPatch, folder: Path, *steps: Step) -> list[dict[str, Any]]:
    monkeypatch.setattr(on_gpu, "PARTS", {"1": steps})
    monkeypatch.setattr(sys, "argv", ["on_gpu.py", "1", "--out", str(folder), "--work", str(folder / "work")])
    on_gpu.main()
    rows: list[dict[str, Any]] = json.loads((folder / "work" / "parts.json").read_text())["rows"]
    return rows


def test_a_step_that_fails_or_hangs_ends_itself_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fails(_: Run) -> dict[str, Any]:
        raise OSError("no such thing")

    def hangs(run: Run) -> dict[str, Any]:
        status, output = on_gpu.execute(run._replace(seconds=1), "x.log", sys.executable, "-c", "while True: pass")
        return {"passed": status == 0, "said": on_gpu.last_line(output, status)}

    def works(_: Run) -> dict[str, Any]:
        return {"passed": True}

    rows = in_process(monkeypatch, tmp_path, Step("fails", fails), Step("hangs", hangs), Step("works", works))
    assert [row["passed"] for row in rows] == [False, False, True]
    assert "no such thing" in rows[0]["said"]
    assert "ended by its time limit" in rows[1]["said"]


STICKY = """
import json, os, sys
from pathlib import Path
import measure
out = Path(sys.argv[sys.argv.index("--out") + 1])
trials, file = measure.Trials(out / "rows.begun"), out / "rows.json"
rows = json.loads(file.read_text())["rows"] if file.exists() else []
for point in "abc":
    if point in trials.fatal or point in rows:
        continue
    with trials.of(point):
        if point == "b":
            os._exit(7)  # as a CUDA error that sticks ends a process
    rows.append(point)
    measure.write_rows(file, rows)
"""


def test_a_point_that_ends_its_process_is_not_tried_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "bench" / "speed").mkdir(parents=True)
    (tmp_path / "bench" / "speed" / "sticky.py").write_text(STICKY)
    monkeypatch.setattr(on_gpu, "ROOT", tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "bench" / "speed"))
    execute = on_gpu.execute
    monkeypatch.setattr(on_gpu, "execute", lambda *a, **k: execute(*a, **k, PYTHONPATH=str(ROOT / "bench" / "speed")))
    row = on_gpu.script("sticky", "rows.json")(Run(tmp_path, 900, None, False))
    assert row == {"passed": True, "said": "nothing", "rows": 2, "restarts": 1, "left_out": 0}
    assert measure.Trials(tmp_path / "rows.begun").fatal == {"b"}


def test_tuning_covers_every_class_of_every_table() -> None:
    for path in tiles.TABLES.glob("*.json"):
        table = json.loads(path.read_text())
        classes = {(width, place) for width, rows in table["activation_side"].items() for place in range(len(rows))}
        sides = {width for width, entry in table["weight_side"].items() if entry is not None}
        assert {step[1:] for step in tune.STEPS if step[0] == "activation"} >= classes
        for kind in ("weight", "few", "crossover"):
            assert {step[1] for step in tune.STEPS if step[0] == kind} >= sides
    assert len(set(tune.STEPS)) == len(tune.STEPS)
    assert [step[:2] for step in tune.STEPS[:2]] == [("activation", "half"), ("weight", "half")]


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_only_what_can_compile_is_tried(bits: int) -> None:
    found = [*tune.activation_tiles([16, 32, 64, 128], 2, bits), *tune.weight_tiles("cpu", bits)]
    assert len(found) > 40
    for _, n, k, _, stages, *_ in found:
        assert n <= 128  # one block of signs each way
        assert k == 128 if bits < 8 else k <= 128
        assert stages > 1
