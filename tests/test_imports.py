"""Imports flow one way: between the wings, and inside each of them."""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from itertools import groupby
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "python_api" / "randes"
WINGS = (
    {"config", "errors"},
    {"checkpoints"},
    {"superposition"},
    {"serving", "inspect"},
    {"transformers", "fusionbench", "litserve", "vllm", "parallel", "cluster"},
    {"demo"},
    {"cli"},
)
"""Each may import what stands before it. ``randes`` itself says what is public, and is imported by no other file."""
MOST_FILES = 15
MOST_LINES = 300


def module_of(path: Path) -> str:
    return ".".join(("randes", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")


FILES = {module_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imported(path: Path) -> Iterator[str]:
    """The modules of the package that a file imports, anywhere in it and for whatever reason."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "randes":
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in FILES else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "randes")


GRAPH = {name: set(imported(path)) - {name} for name, path in FILES.items()}


def level_of(module: str) -> int:
    """Which of ``WINGS`` a module belongs to."""
    wing = module.split(".")[1]
    return next(level for level, names in enumerate(WINGS) if wing in names)


def test_every_file_has_its_wing_and_imports_only_what_stands_before_it() -> None:
    inner = {name: found for name, found in GRAPH.items() if name not in ("randes", "randes.__main__")}
    assert len(WINGS) <= 8
    wrong = [(name, other) for name, found in inner.items() for other in found if other == "randes"]
    wrong += [
        (name, other)
        for name, found in inner.items()
        for other in found - {"randes"}
        if name.split(".")[1] != other.split(".")[1] and level_of(other) >= level_of(name)
    ]
    assert wrong == []


def test_no_files_import_each_other_in_a_circle() -> None:
    try:
        TopologicalSorter(GRAPH).prepare()
    except CycleError as error:
        raise AssertionError(" <- ".join(error.args[1])) from None


def test_the_kernels_know_nothing_of_what_is_built_on_them() -> None:
    for path in (ROOT / "randes_kernels").rglob("*.py"):
        assert list(imported(path)) == [], path


def test_no_folder_has_more_files_than_a_reader_takes_in() -> None:
    for folder, files in groupby(FILES.values(), lambda path: path.parent):
        assert len(list(files)) <= MOST_FILES, folder


def test_a_long_file_says_why() -> None:
    for path in (*FILES.values(), *(ROOT / "randes_kernels").rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        if text.count("\n") > MOST_LINES:
            assert "One file, though long" in (ast.get_docstring(ast.parse(text)) or ""), path
