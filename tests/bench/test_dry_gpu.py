"""The stand-in driver: it refuses what a device would, and GPU tests launch on it."""

import ctypes
import importlib.metadata
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "tests" / "dry_gpu"))

import driver  # noqa: E402

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
INVALID = 1


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    return ctypes.CDLL(str(driver.build()))


@pytest.mark.parametrize(
    ("numbers", "answer"),
    [
        ((2**31 - 1, 1, 1, 128, 1, 1, 232448), 0),
        ((1, 65536, 1, 128, 1, 1, 0), INVALID),
        ((0, 1, 1, 128, 1, 1, 0), INVALID),
        ((1, 1, 1, 2048, 1, 1, 0), INVALID),
        ((1, 1, 1, 128, 1, 1, 232449), INVALID),
    ],
)
def test_a_launch_is_checked(library: ctypes.CDLL, numbers: tuple[int, ...], answer: int) -> None:
    launch = (ctypes.c_uint32 * 64)(*numbers)  # grid, block, shared bytes; then what is not checked
    assert library.cuLaunchKernelEx(launch, None, None, None) == answer


@pytest.mark.parametrize(
    ("address", "sizes", "stride", "box", "answer"),
    [
        (0x100, (512, 64), 1024, (64, 128), 0),
        (0x108, (512, 64), 1024, (64, 128), INVALID),
        (0x100, (512, 64), 1000, (64, 128), INVALID),
        (0x100, (512, 64), 512, (64, 128), INVALID),
        (0x100, (512, 0), 1024, (64, 128), INVALID),
        (0x100, (512, 64), 1024, (64, 512), INVALID),
        (0x100, (512, 64), 1024, (128, 128), INVALID),  # 256 bytes in a swizzle of 128
    ],
)
def test_a_tensor_map_is_checked(
    library: ctypes.CDLL, address: int, sizes: tuple[int, ...], stride: int, box: tuple[int, ...], answer: int
) -> None:
    bf16, swizzle_128 = 9, 3
    wide, narrow = ctypes.c_uint64 * 2, ctypes.c_uint32 * 2
    arguments = (None, bf16, 2, ctypes.c_void_p(address), wide(*sizes), wide(stride), narrow(*box), narrow(1, 1))
    assert library.cuTensorMapEncodeTiled(*arguments, 0, swizzle_128, 0, 0) == answer


@pytest.mark.skipif(importlib.metadata.version("triton") != "3.6.0", reason="Triton 3.6 asks what is answered here")
def test_gpu_tests_reach_a_launch() -> None:
    command = [sys.executable, "tests/dry_gpu", "tests/kernels/test_gpu.py", "-k", "strided_rows or golden_file"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "launches checked" in run.stdout
    assert " 0 launches" not in run.stdout
