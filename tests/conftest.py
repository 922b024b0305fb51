"""Kernels run in Triton's interpreter where there is no GPU; the choice must be made before they are imported."""

import os
from importlib import metadata
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))  # more would wait for each other


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With ``-m gpu`` only files that have such tests are imported: what others need may be missing on that machine."""
    if config.option.markexpr != "gpu" or collection_path.suffix != ".py":
        return None
    return "mark.gpu" not in collection_path.read_text(encoding="utf-8") or None


def interpreter_breaks() -> bool:
    """Whether kernels run in an interpreter that this NumPy breaks: Triton 3.6's, from NumPy 2.4 on."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return False
    try:
        numpy, triton = (tuple(map(int, metadata.version(name).split(".")[:2])) for name in ("numpy", "triton"))
    except metadata.PackageNotFoundError:
        return False
    return triton < (3, 7) and numpy >= (2, 4)


def runs_kernels(module: object) -> bool:
    """Whether a test file imports what is written in Triton."""
    kernels = ("triton", "randes_kernels.gpu", "randes_kernels.kernels", "randes_kernels.primitives")
    names = (str(getattr(value, "__name__", "")) for value in vars(module).values())
    origins = (str(getattr(value, "__module__", "")) for value in vars(module).values())
    return any(name.startswith(kernels) for name in (*names, *origins))


def count_few(items: list[pytest.Item]) -> None:
    """Of the cases of a test that may run kernels only the first is counted with ``--cov``, and none of hypothesis':
    counting makes Triton's interpreter half as fast, and the other cases take other branches of kernels alone, which
    are not counted."""
    kernels = {module: runs_kernels(module) for module in {i.module for i in items if isinstance(i, pytest.Function)}}
    before = set()
    for item in items:
        if isinstance(item, pytest.Function) and kernels[item.module]:
            if item.function in before or getattr(item.function, "is_hypothesis_test", False):
                item.add_marker("no_cover")
            before.add(item.function)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """GPU tests are chosen with ``-m gpu``; elsewhere they are left out, not counted as skipped."""
    count_few(items)
    if not torch.cuda.is_available():
        gpu = [item for item in items if item.get_closest_marker("gpu")]
        config.hook.pytest_deselected(items=gpu)
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]
    if interpreter_breaks():
        reason = "Triton 3.6's interpreter needs a NumPy before 2.4"
        for item in items:
            if isinstance(item, pytest.Function) and runs_kernels(item.module):
                item.add_marker(pytest.mark.skip(reason=reason))
