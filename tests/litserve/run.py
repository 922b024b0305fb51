"""Tests that start LitServe, in an environment of their own beside this one's packages.

    python tests/litserve/run.py                 # everything, four minutes on 2 cores the first time
    python tests/litserve/run.py -k malformed -x # arguments for pytest

The environment is made in ``.cache/litserve`` and used again. Ends with pytest's exit code.
"""

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def made(folder: Path) -> Path:
    """The environment's Python: LitServe, and behind it what this command's own has: torch, Transformers, pytest."""
    python = folder / "bin" / "python"
    if (folder / "whole").is_file():
        return python
    venv.create(folder, clear=True)
    own = sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)})
    (Path(own) / "parent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "-c", str(ROOT / "constraints.txt")]
    print("+ pip install litserve", flush=True)
    subprocess.run([*install, "litserve"], check=True)
    (folder / "whole").write_text("")
    return python


def main() -> int:
    python = made(ROOT / ".cache" / "litserve")
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "python_api", ROOT / "tests")))
    command = [python, "-m", "pytest", "-p", "no:cacheprovider", str(Path(__file__).parent), *sys.argv[1:]]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": paths}).returncode


if __name__ == "__main__":
    sys.exit(main())
