"""The lowest and the newest versions of what randes depends on, each in an environment of its own:

    python tests/package/versions.py lowest
    python tests/package/versions.py newest

Versions are read from pyproject.toml: of every dependency the one behind ``>=``, or whatever the index has newest.
torch is the one of constraints.txt, as others bring several GB on Linux; ``--torch 2.11.0`` takes another. The tests in
``TESTS`` must pass; the command prints what was installed and ends with pytest's exit code.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
EXTRAS = ("demo", "report", "yaml", "transformers")
TOOLS = ("pytest", "hypothesis", "safetensors")
TESTS = (
    "tests/test_cli.py", "tests/test_config.py", "tests/superposition/test_superposition.py",
    "tests/superposition/test_compress.py", "tests/serving/test_load.py", "tests/serving/test_linear.py",
    "tests/inspect/test_shapes.py", "tests/inspect/test_report.py",
)  # fmt: skip


def requirements() -> list[str]:
    """What the package and ``EXTRAS`` need, as pyproject.toml says it."""
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    needed = re.search(r"^dependencies = \[(.*?)\n\]", text, re.DOTALL | re.MULTILINE)
    assert needed is not None
    found = re.findall(r'"([^"]+)"', needed[1])
    for extra in EXTRAS:
        line = re.search(rf"^{extra} = \[(.*)\]", text, re.MULTILINE)
        assert line is not None, extra
        found += re.findall(r'"([^"]+)"', line[1])
    return list(dict.fromkeys(found))


def chosen(which: str, torch: str) -> list[str]:
    """Requirements as pip takes them."""
    lowest = which == "lowest"
    found = [f"torch=={torch}"]
    for requirement in (*requirements(), *TOOLS):
        name, _, least = requirement.partition(">=")
        if name != "torch":
            found.append(f"{name}=={least}" if lowest and least else name)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", choices=("lowest", "newest"))
    pinned = re.search(r"^torch==(\S+)", (ROOT / "constraints.txt").read_text("utf-8"), re.MULTILINE)
    assert pinned is not None
    parser.add_argument("--torch", default=pinned[1], metavar="VERSION")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = Path(folder) / "bin" / "python"
        wanted = chosen(given.which, given.torch)
        print("+ pip install", *wanted, flush=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *wanted], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", "-e", ROOT], check=True)
        subprocess.run([python, "-m", "pip", "list"], check=True)
        return subprocess.run([python, "-m", "pytest", "-p", "no:cacheprovider", *TESTS], cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main())
