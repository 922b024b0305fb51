"""One HTML file that shows what a store holds, what it weighs, and how its models lie in it."""

import os
from collections.abc import Mapping
from pathlib import Path

from randes.checkpoints.files import write_whole
from randes.checkpoints.lazy_tensors import Progress, silent
from randes.checkpoints.sources import Checkpoint
from randes.errors import RandesError
from randes.inspect.report.numbers import measure
from randes.superposition.superposition import Superposition

__all__ = ["measure", "write"]


def write(
    superposition: Superposition,
    path: str | os.PathLike[str],
    checkpoints: Mapping[str, Checkpoint] | None = None,
    *,
    title: str = "superposition",
    progress: Progress = silent,
) -> None:
    """Write a report to ``path`` (``*.html``): one page that needs no other file, no network and no scripts.

    checkpoints: those of some models by name, as they were added. Each adds its measured weight error. Two or more add
        the cosines of their deltas before and after their transforms. Without them the page shows what the store knows.
    title: the page's name for the store. progress: called with each stage and its bytes, for a progress bar.
    Raises ``ValueError`` for another path, ``UnknownModelError``, ``CheckpointError`` for another checkpoint than the
    one that was added, and ``RandesError`` without matplotlib; nothing is written then. (docs/report.md.)
    """
    path, checkpoints = Path(path), checkpoints or {}
    if path.suffix not in (".html", ".htm"):
        raise ValueError(f"the report's path must end in .html, got {path}")
    if path.is_dir() or not path.parent.is_dir():
        raise ValueError(f"the report's path must be of a file in a folder that is there, got {path}")
    for name in checkpoints:
        superposition.member(name)
    try:
        from randes.inspect.report.page import page
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        raise RandesError("a report needs matplotlib: python -m pip install 'randes[report]'") from error
    text = page(measure(superposition, checkpoints, progress=progress), title)
    write_whole(path, [memoryview(text.encode("utf-8"))])
