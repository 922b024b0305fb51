"""Every kernel, compiled ahead of time for GPUs that are not here, by the oldest and the newest Triton supported."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import triton

ROOT = Path(__file__).parent.parent
OLDEST = "3.6.0"
TARGETS = {"sm_80", "sm_90", "gfx942"}
SHARED_MEMORY = {"sm_80": 166_912, "sm_90": 232_448, "gfx942": 65_536}
"""What one program may use, bytes."""

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
    paths = {triton.__version__: None, OLDEST: oldest_triton()}
    compilers = {}
    for version, path in paths.items():
        environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("cache"))}
        environment.pop("TRITON_INTERPRET", None)
        if path is not None:
            environment["PYTHONPATH"] = str(path)
        command = [sys.executable, str(ROOT / "tests" / "aot.py")]
        compilers[version] = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
    found = {}
    for version, compiler in compilers.items():
        out, errors = compiler.communicate()
        assert compiler.returncode == 0, errors
        found[version] = [json.loads(line) for line in out.splitlines()]
        assert {row["triton"] for row in found[version]} == {version}
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


def test_every_kernel_compiles_for_every_target(compiled: list[Row]) -> None:
    kernels = {row["kernel"] for row in compiled}
    assert {kernel.split()[0] for kernel in kernels} == {"linear", "superpose", "retrieve", "route"}
    assert {(row["kernel"], row["target"]) for row in compiled} == {(k, t) for k in kernels for t in TARGETS}


def test_no_register_is_spilled(compiled: list[Row]) -> None:
    assert [row for row in compiled if row["spills"] or row["local_bytes"]] == []


def test_shared_memory_fits(compiled: list[Row]) -> None:
    assert [row for row in compiled if row["shared_bytes"] > SHARED_MEMORY[row["target"]]] == []


@pytest.mark.parametrize("kernel", ["linear fp16", "linear bf16"])
def test_the_matmul_uses_matrix_instructions(compiled: list[Row], kernel: str) -> None:
    assert [row for row in named(compiled, kernel=kernel) if not row["matrix_instructions"]] == []


@pytest.mark.parametrize("kernel", ["linear", "superpose", "retrieve"])
def test_weights_are_read_sixteen_bytes_at_a_time(compiled: list[Row], kernel: str) -> None:
    assert [row for row in named(compiled, kernel=kernel) if not row["wide_loads"]] == []


def test_superposing_fuses_no_multiply_with_an_add(compiled: list[Row]) -> None:
    # It would round once instead of twice, and a GPU's integers would differ from a CPU's.
    assert [row for row in named(compiled, kernel="superpose") if row["fused_multiply_adds"]] == []
