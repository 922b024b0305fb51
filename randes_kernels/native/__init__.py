"""Products with a packed D on a CPU, by a library that the machine's own C compiler makes of ``products.c``, once.

torch multiplies with packed weights in bf16 alone and at few widths. Anything else it has to unpack first, a slice at a
time, which takes several times as long as a product of few rows. The price is a C compiler where models are served, as
``torch.compile`` wants one, and a second once for each machine. Without one, or with ``RANDES_NATIVE=0``, torch
unpacks.
"""

import atexit
import ctypes
import os
import platform
import shutil
import stat
import subprocess
import tempfile
import warnings
from functools import cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from randes_kernels.format import SIGNS_PER_BLOCK as SPAN
from randes_kernels.packing import Packed

SWITCH = "RANDES_NATIVE"
SOURCE = Path(__file__).with_name("products.c")
COMPILERS = ("cc", "gcc", "clang")
ALWAYS = ("-O3", "-std=gnu11", "-fPIC")
FOR_THIS_MACHINE = (("-march=native", "-mprefer-vector-width=512"), ("-march=native",), ("-mcpu=native",), ())
"""From the best: not every compiler has each for each processor."""


def product(rows: Tensor, packed: Packed) -> Tensor | None:
    """``rows`` (M, K), of any floating dtype, times D (N, K) transposed: (M, N) fp32.

    None where there is no compiled library. No row changes another's answer, nor does the number of threads.
    """
    library = _library()
    if library is None:
        return None
    x = F.pad(rows.to(torch.float32), (0, -rows.shape[1] % SPAN)).contiguous()
    words, steps = packed.words.contiguous(), packed.steps
    if steps.stride(-1) != 1:
        steps = steps.contiguous()
    (m, k), (n, width) = x.shape, words.shape
    y = torch.empty((m, n), device="cpu")
    library.randes_product(
        y.data_ptr(), x.data_ptr(), words.data_ptr(), steps.data_ptr(), m, n, k, width, packed.columns,
        int(2 * packed.bits), packed.group, steps.stride(0), torch.get_num_threads(),
    )  # fmt: skip
    return y


@cache
def _library() -> Any:
    """Compiled, and loaded; None where that cannot be."""
    if os.environ.get(SWITCH) == "0":
        return None
    threads = _threads_of_torch()
    compiler = os.environ.get("CC") or next(filter(shutil.which, COMPILERS), None)
    reason = "no C compiler was found (cc, gcc, clang, or the one that $CC names)"
    for machine in FOR_THIS_MACHINE if compiler else ():
        flags = (*ALWAYS, *machine, *(("-fopenmp",) if threads else ()))
        try:
            library = ctypes.CDLL(str(_compiled(str(compiler), flags)))
        except (OSError, subprocess.SubprocessError) as error:
            reason = f"{compiler} made nothing of products.c that can be loaded: {error}"
            continue
        library.randes_product.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_int64] * 8 + [ctypes.c_int]
        library.randes_product.restype = None
        return library
    warnings.warn(
        f"products with a packed D take several times as long as they need to on this CPU: {reason}. {SWITCH}=0 says"
        " that this is known",
        stacklevel=2,
    )
    return None


def _threads_of_torch() -> bool:
    """Have the library use torch's own OpenMP threads, where those are GNU's: two pools would wait for each other."""
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8")
        path = next(line.split(maxsplit=5)[5] for line in maps.splitlines() if "libgomp" in line)
        ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
    except (OSError, StopIteration):
        return False
    return True


def _compiled(compiler: str, flags: tuple[str, ...]) -> Path:
    """The library's file, kept for this source, these flags and this processor."""
    source = SOURCE.read_bytes()
    known = blake2b(b"\0".join([source, *(flag.encode() for flag in (compiler, *flags)), _processor()]), digest_size=12)
    folder = _folder()
    made = folder / f"products-{known.hexdigest()}.so"
    if _is_ours(made):
        return made
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        objects, library = Path(scratch) / "products.o", Path(scratch) / "products.so"
        # Linked without OpenMP: its names are those of the library that torch has loaded.
        for command in ((*flags, "-c", str(SOURCE), "-o", str(objects)), ("-shared", str(objects), "-o", str(library))):
            subprocess.run([compiler, *command], check=True, capture_output=True, timeout=120)
        library.replace(made)
    return made


def _processor() -> bytes:
    """What tells one processor's instructions from another's."""
    try:
        lines = Path("/proc/cpuinfo").read_bytes().splitlines()
    except OSError:
        lines = []
    flags = next((line for line in lines if line.startswith((b"flags", b"Features"))), b"")
    return platform.machine().encode() + flags


@cache
def _folder() -> Path:
    """The user's cache; where that cannot be written, or others can write to it, a folder of this process."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "randes"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if _is_ours(folder) and os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    folder = Path(tempfile.mkdtemp(prefix="randes-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _is_ours(path: Path) -> bool:
    """Whether it is there, and nobody else can have written it: what is in it runs."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return False
    return found.st_uid == os.getuid() and not stat.S_ISLNK(found.st_mode) and not found.st_mode & 0o022
