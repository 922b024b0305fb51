"""Every kernel, compiled ahead of time for GPUs that are not here, by the oldest and the newest Triton supported."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import triton

from randes_kernels.tiles import TABLES, Tile

ROOT = Path(__file__).parents[2]
OLDEST = "3.6.0"
TARGETS = {"sm_80", "sm_90", "gfx942"}
OF_OLDEST = {"sm_90"}
"""What the oldest compiles here, and of products with D every second one: all of them by both would take half of the
time of all tests. The others by hand, where kernels or tables change:
``PYTHONPATH=.cache/triton-3.6.0 python tests/kernels/aot.py``."""
SHARED_MEMORY = {"sm_80": 166_912, "sm_90": 232_448, "gfx942": 65_536}
"""What one program may use, bytes."""

SHORT = ("fp16", "bf16")
DETOUR = {"weight side fp16 (256, 128, 128, 8, 2) 1 bits bulk grouped"}
"""What goes through shared memory once more: planes of 16 columns that are rebuilt in fp32 (docs/kernels.md)."""
Row = dict[str, Any]


def oldest_triton() -> Path:
    """The oldest Triton in a folder of its own, installed there once."""
    folder = ROOT / ".cache" / f"triton-{OLDEST}"
    if not (folder / "triton" / "__init__.py").exists():
        install = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target")
        subprocess.run([*install, str(folder), f"triton=={OLDEST}"], check=True)
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Row]]:
    """What both Tritons made of the kernels; they compile at the same time."""
    jobs = [(triton.__version__, None, target) for target in sorted(TARGETS)]
    jobs += [(OLDEST, oldest_triton(), target) for target in sorted(OF_OLDEST)]
    compilers = []
    for version, path, target in jobs:
        half = () if path is None else ("--half",)
        environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("cache"))}
        environment.pop("TRITON_INTERPRET", None)
        if path is not None:
            environment["PYTHONPATH"] = str(path)
        command = [sys.executable, str(ROOT / "tests" / "kernels" / "aot.py"), target, *half]
        started = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        compilers.append((version, started))
    found: dict[str, list[Row]] = {}
    with ThreadPoolExecutor(len(compilers)) as threads:  # each output is read while it is written
        outputs = list(threads.map(lambda job: job[1].communicate(), compilers))
    for (version, compiler), (out, errors) in zip(compilers, outputs, strict=True):
        assert compiler.returncode == 0, errors
        rows = [json.loads(line) for line in out.splitlines()]
        assert {row["triton"] for row in rows} == {version}
        found.setdefault(version, []).extend(rows)
    return found


@pytest.fixture(params=["newest", "oldest"])
def compiled(request: pytest.FixtureRequest, rows: dict[str, list[Row]]) -> list[Row]:
    """The rows of one Triton."""
    return rows[triton.__version__ if request.param == "newest" else OLDEST]


def named(rows: list[Row], *, kernel: str = "", target: str = "") -> list[Row]:
    """The rows of a kernel and a target; never none."""
    chosen = [row for row in rows if row["kernel"].startswith(kernel) and row["target"].startswith(target)]
    assert chosen
    return chosen


def tiles_of(table: dict[str, Any]) -> list[Tile]:
    """Every tile that a table names."""
    classes = [entry for width in table["activation_side"].values() for entry in width]
    for side in filter(None, table["weight_side"].values()):
        classes += [side, *side["smaller"]]
    return [Tile(*entry["tile"]) for entry in classes]


def test_every_kernel_compiles_for_every_target(compiled: list[Row]) -> None:
    kernels = {row["kernel"] for row in compiled}
    named = {"activation", "weight", "group", "superpose", "retrieve", "route"}
    newest = compiled[0]["triton"] == triton.__version__
    for target in TARGETS if newest else OF_OLDEST:
        assert {row["kernel"].split()[0] for row in compiled if row["target"] == target} == named
    if not newest:
        return
    for path in TABLES.glob("*.json"):
        for tile in tiles_of(json.loads(path.read_text(encoding="utf-8"))):
            of_tile = [kernel for kernel in kernels if str(tuple(tile)) in kernel]
            assert of_tile, f"{tile} of {path.name} is not compiled"


def test_no_register_is_spilled(compiled: list[Row]) -> None:
    assert [row for row in compiled if row["spills"] or row["local_bytes"]] == []


def test_shared_memory_fits(compiled: list[Row]) -> None:
    assert [row for row in compiled if row["shared_bytes"] > SHARED_MEMORY[row["target"]]] == []


@pytest.mark.parametrize("kernel", [f"{side} side {dtype}" for side in ("activation", "weight") for dtype in SHORT])
def test_the_matmul_uses_matrix_instructions(compiled: list[Row], kernel: str) -> None:
    assert [row for row in named(compiled, kernel=kernel) if not row["matrix_instructions"]] == []


def test_hopper_rebuilds_the_weight_as_the_register_operand_of_wgmma(compiled: list[Row]) -> None:
    bulk = [row for row in named(compiled, kernel="weight side", target="sm_90") if "bulk" in row["kernel"]]
    assert bulk
    assert [row for row in bulk if not (row["register_operands"] == row["matrix_instructions"] > 0)] == []
    assert [row for row in bulk if not row["bulk_copies"]] == []
    # From shared memory into the product's layout at once, not back into it.
    assert {row["kernel"] for row in bulk if row["loop_stores"]} == DETOUR


@pytest.mark.parametrize("kernel", ["activation", "weight", "group", "superpose", "retrieve"])
def test_weights_are_read_sixteen_bytes_at_a_time(compiled: list[Row], kernel: str) -> None:
    assert [row for row in named(compiled, kernel=kernel) if not row["wide_loads"]] == []


def test_superposing_fuses_no_multiply_with_an_add(compiled: list[Row]) -> None:
    # It would round once instead of twice, and a GPU's integers would differ from a CPU's.
    assert [row for row in named(compiled, kernel="superpose") if row["fused_multiply_adds"]] == []
