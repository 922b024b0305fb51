"""A checkout on a machine where nothing of the project, and little else, is installed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MISSING = ("hypothesis", "ruff", "mypy", "sklearn", "matplotlib", "xdist", "transformers")
WITHOUT = """
import os, sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in os.environ["MISSING"].split():
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
sys.path[:] = [path for path in sys.path if not os.path.isdir(os.path.join(path, "randes_kernels"))]
"""


def bare(tmp_path: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """A Python process without those packages and without the project on its path."""
    (tmp_path / "sitecustomize.py").write_text(WITHOUT)
    variables = {"PYTHONPATH": str(tmp_path), "MISSING": " ".join(MISSING), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=os.environ | variables, capture_output=True, text=True
    )


def test_gpu_tests_are_collected(tmp_path: Path) -> None:
    run = bare(tmp_path, "-m", "pytest", "-m", "gpu", "--collect-only", "-p", "no:cacheprovider")
    # 5: no tests, which is so where there is no GPU; 2 where a file cannot be imported.
    assert run.returncode in (0, 5), run.stdout + run.stderr
    assert "test" in run.stdout.splitlines()[-1]


@pytest.mark.parametrize("script", ["kernels", "tune", "on_gpu", "crossover"])
def test_benches_find_the_tree(script: str, tmp_path: Path) -> None:
    run = bare(tmp_path, f"bench/speed/{script}.py", "--help")
    assert run.returncode == 0, run.stderr
