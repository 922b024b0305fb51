"""The GPU tests up to a checked launch, on a machine without a GPU: ``python tests/dry_gpu [arguments of pytest]``.

With Triton 3.6, which is fetched into ``.cache`` where another one is installed. Compiling all kernels takes some
minutes of one core the first time; they are kept in ``.cache``, too.
"""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".cache" / "dry_gpu"
TRITON = "3.6.0"


def main() -> int:
    """Runs pytest; returns its exit status."""
    paths = [Path(__file__).parent.resolve(), ROOT, ROOT / "python_api", ROOT / "tests", ROOT / "tests" / "kernels"]
    if importlib.metadata.version("triton") != TRITON:
        own = ROOT / ".cache" / f"triton-{TRITON}"
        if not own.exists():
            install = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(own))
            subprocess.run([*install, f"triton=={TRITON}"], check=True)
        paths.insert(0, own)
    variables = {"PYTHONPATH": os.pathsep.join(map(str, paths)), "TRITON_CACHE_DIR": str(CACHE / "kernels")}
    command = [sys.executable, "-m", "pytest", "-p", "dry_gpu_plugin", "-p", "no:cacheprovider", "-m", "gpu"]
    given = sys.argv[1:] or [str(ROOT / "tests")]
    return subprocess.run([*command, *given], cwd=ROOT, env=os.environ | variables, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
