"""Every branch of what reads and writes files is taken by tests.

Measured in a process of its own, of few tests, which are enough; ``pytest --cov`` counts those of the whole library.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
WHOLE = (
    "randes_kernels/format.py", "python_api/randes/checkpoints/files.py", "python_api/randes/checkpoints/schema.py",
    "python_api/randes/checkpoints/safetensors.py", "python_api/randes/checkpoints/on_disk.py",
    "python_api/randes/checkpoints/remote/*.py", "python_api/randes/superposition/store/*.py",
)  # fmt: skip
TESTS = (
    "tests/kernels/test_format.py", "tests/checkpoints/test_files.py", "tests/checkpoints/test_schema.py",
    "tests/checkpoints/test_on_disk.py", "tests/superposition/test_store_refusals.py",
    "tests/superposition/test_hostile_stores.py", "tests/superposition/test_members.py",
    "tests/vllm/test_adapter_paths.py",
    "tests/superposition/test_sharded_stores.py", "tests/remote/test_memory.py", "tests/remote/test_cluster.py",
)  # fmt: skip
REPEATED = "twenty_fresh_processes or flipped_bit or before_the_manifest or of_one_byte or command_line"
"""Tests that do the same thing many times over: what they find needs that, but no branch does."""


def test_every_branch_of_format_files_and_store_is_taken(tmp_path: Path) -> None:
    def coverage(*command: str) -> None:
        run = subprocess.run(
            [sys.executable, "-m", "coverage", *command], cwd=ROOT, capture_output=True, text=True,
            env={**os.environ, "COVERAGE_FILE": str(tmp_path / "counted")},
        )  # fmt: skip
        assert run.returncode == 0, run.stdout + run.stderr

    pytest = ("-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", f"not ({REPEATED})")
    alone = f"--rcfile={os.devnull}"  # pyproject.toml is about the whole library
    coverage("run", alone, "--branch", f"--include={','.join(WHOLE)}", *pytest, *TESTS)
    coverage("json", alone, "-o", str(tmp_path / "counted.json"))
    found = json.loads((tmp_path / "counted.json").read_text(encoding="utf-8"))["files"]
    expected = {str(path.relative_to(ROOT)) for pattern in WHOLE for path in ROOT.glob(pattern)}
    assert expected == found.keys()
    missing = {
        name: {"lines": one["missing_lines"], "branches": one["missing_branches"]}
        for name, one in found.items()
        if one["missing_lines"] or one["missing_branches"] or one["excluded_lines"]
    }
    assert missing == {}
