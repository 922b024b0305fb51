"""Triton on an H200 that is not there: what is compiled and launched is what a real one would get.

Specialisation, compilation for sm_90, arguments and launches are real; the driver below them (``fake_cuda.c``) checks
and runs nothing. Needs Triton 3.6, which asks a driver for what is answered there, and a C compiler.
"""

import ctypes
import os
import subprocess
from pathlib import Path
from typing import Any

CACHE = Path(__file__).resolve().parents[2] / ".cache" / "dry_gpu"
DEVICE = "sm_90/nvidia-h200"


def build() -> Path:
    """The driver, compiled anew where its source is newer."""
    import triton

    source, library = Path(__file__).with_name("fake_cuda.c"), CACHE / "libcuda.so.1"
    if not library.exists() or library.stat().st_mtime < source.stat().st_mtime:
        CACHE.mkdir(parents=True, exist_ok=True)
        headers = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
        half = library.with_suffix(f".{os.getpid()}")
        command = ("cc", "-shared", "-fPIC", "-w", "-O1", "-Wl,-soname,libcuda.so.1", f"-I{headers}")
        subprocess.run([*command, str(source), "-o", str(half)], check=True)
        half.replace(library)
    return library


def activate() -> ctypes.CDLL:
    """Make Triton launch on it, and the library plan for it. Returns the driver, which counts its ``launches``."""
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ["TRITON_LIBCUDA_PATH"] = str(CACHE)
    import triton

    if not triton.__version__.startswith("3.6."):
        raise RuntimeError(f"the stand-in driver answers what Triton 3.6 asks, got {triton.__version__}")
    library = ctypes.CDLL(str(build()), mode=ctypes.RTLD_GLOBAL)
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.driver import CudaDriver, CudaLauncher, CudaUtils

    class Driver(CudaDriver):  # type: ignore[misc]
        def __init__(self) -> None:
            self.get_device_capability = lambda device=0: (9, 0)
            self.get_current_stream = lambda device=0: 0
            self.get_current_device = lambda: 0
            self.set_current_device = lambda device: None
            self.utils, self.launcher_cls = CudaUtils(), CudaLauncher

        def get_current_target(self) -> Any:
            return GPUTarget("cuda", 90, 32)

    triton.runtime.driver.set_active(Driver())
    from randes_kernels import cpu, gpu, tiles

    for module in (tiles, gpu):
        module.device_name = lambda index: DEVICE  # type: ignore[attr-defined]
    # Tensors stay on the CPU, and what would go to a CPU's functions goes to the kernels.
    for name in ("superposed_linear", "superpose_", "retrieve"):
        if hasattr(cpu, name):
            setattr(cpu, name, getattr(gpu, name))
    return library


def launches(library: ctypes.CDLL) -> int:
    """So far."""
    return int(ctypes.c_long.in_dll(library, "launches").value)
