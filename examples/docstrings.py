"""Text classification out of what is installed: which part of a package is a docstring from?

Real text, written by many people, without a download. Sources are read, never imported.
"""

import ast
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

TASKS = {
    "torch": ("ao", "cuda", "distributed", "distributions", "fx", "nn", "onnx", "optim"),
    "numpy": ("_core", "lib", "ma", "polynomial"),
    "scipy": ("interpolate", "io", "linalg", "optimize", "signal", "sparse", "special", "stats"),
    "sklearn": ("cluster", "decomposition", "ensemble", "linear_model", "metrics", "model_selection", "preprocessing"),
    "sympy": ("combinatorics", "core", "functions", "geometry", "matrices", "physics", "polys", "solvers"),
    "matplotlib": ("axes", "backend_bases", "colors", "patches", "transforms", "widgets"),
    "transformers": ("cli", "generation", "integrations", "pipelines", "utils"),
    "Python": ("asyncio", "email", "http", "importlib", "logging", "multiprocessing", "unittest", "xml"),
}
"""Of each package the parts to tell apart; of Python, packages of its own library."""
LEAST_WORDS, TELLING_WORDS = 6, 40  # shorter docstrings say too little; two that begin alike count as one


class Texts(NamedTuple):
    """Token ids of each text, and its class (count,) int64."""

    tokens: list[list[int]]
    labels: Tensor


class Task(NamedTuple):
    """A classification problem. classes: their names, in the order of the labels."""

    classes: tuple[str, ...]
    training: Texts
    held_out: Texts


def docstrings(module: str) -> Iterator[tuple[str, str]]:
    """Qualified names and docstrings of a package's or module's functions and classes, read without importing it."""
    root, *inside = module.split(".")
    spec = find_spec(root)
    if spec is None or spec.origin is None:
        raise ValueError(f"the tasks need {root}, which is not installed: pip install -c constraints.txt -e '.[test]'")
    path = Path(spec.origin).parent.joinpath(*inside)
    for file in sorted(path.rglob("*.py")) if path.is_dir() else [path.with_suffix(".py")]:
        if "tests" not in file.parts:
            yield from _inside(ast.parse(file.read_bytes()), f"{module}:{file.relative_to(path.parent).as_posix()}")


def _inside(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(child) or ""
            if len(text.split()) >= LEAST_WORDS:
                yield f"{name}.{child.name}", text
            yield from _inside(child, f"{name}.{child.name}")


def make_task(
    package: str, classes: Sequence[str], tokenizer: Any, *, training: int, held_out: int, length: int
) -> Task:
    """As many docstrings of each class, the held-out ones those whose names have the smallest hashes.

    training, held_out: texts of all classes together. length: the most tokens of each that are kept.
    Raises ``ValueError`` for a class that has too few.
    """
    training, held_out = training // len(classes), held_out // len(classes)
    seen: set[tuple[str, ...]] = set()
    parts: tuple[list[str], list[str]] = ([], [])
    for name in classes:
        module = name if package == "Python" else f"{package}.{name}"
        by_hash = sorted((blake2b(where.encode()).digest(), text) for where, text in docstrings(module))
        texts = []
        for _, text in by_hash:
            beginning = tuple(text.split()[:TELLING_WORDS])
            if beginning not in seen:
                seen.add(beginning)
                texts.append(text)
        if len(texts) < training + held_out:
            raise ValueError(f"{module} must have {training + held_out} docstrings, got {len(texts)}")
        parts[0].extend(texts[held_out : held_out + training])
        parts[1].extend(texts[:held_out])

    def encoded(texts: list[str], each: int) -> Texts:
        tokens = tokenizer(texts, truncation=True, max_length=length, padding=False)["input_ids"]
        return Texts(tokens, torch.arange(len(classes)).repeat_interleave(each))

    return Task(tuple(classes), encoded(parts[0], training), encoded(parts[1], held_out))
