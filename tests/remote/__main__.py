"""What needs a server, or a cluster, in an environment of its own:

    python tests/remote s3         stores and checkpoints in a server that speaks S3 (moto), over HTTP
    python tests/remote ray        stores made by a Ray cluster of this machine's cores, and a worker that is killed

Versions are those of constraints.txt. The environment is made in a temporary folder, or at ``--env FOLDER``, where it
stays and is used again. The command ends with pytest's exit code.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
NEEDED = {"s3": ("remote", "moto[server]"), "ray": ("ray", "")}
"""Of each what it needs: an extra of the package, and what else."""
TOOLS = ("pytest", "hypothesis", "safetensors")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", choices=NEEDED)
    parser.add_argument("--env", type=Path, metavar="FOLDER")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (given.env or Path(temporary)).resolve()
        extra, more = NEEDED[given.which]
        python = folder / "bin" / "python"
        if not python.exists():
            venv.create(folder, with_pip=True)
            packages = [f".[{extra},transformers,report]", "torch", *TOOLS, *([more] if more else [])]
            command = [python, "-m", "pip", "install", "-q", "-c", "constraints.txt", "-e", *packages]
            subprocess.run(command, cwd=ROOT, check=True)
        tests = f"tests/remote/{given.which}_cases.py"
        told = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "python_api")))}
        return subprocess.run([python, "-m", "pytest", "-p", "no:cacheprovider", tests], cwd=ROOT, env=told).returncode


if __name__ == "__main__":
    sys.exit(main())
