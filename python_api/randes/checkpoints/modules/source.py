"""The source of a module's classes, as trees: what their methods are, and what they reach from ``self``."""

import ast
import inspect
import textwrap
from collections.abc import Iterator


def methods_of(kind: type, *, but_of: tuple[str, ...]) -> Iterator[ast.FunctionDef]:
    """The functions that a class and its parents define, the class's own first.

    but_of: prefixes of packages whose classes are left out, as ``("torch.",)``. A class without source has none.
    """
    for made in kind.__mro__:
        if made is object or made.__module__.startswith(but_of):
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(made)))
        except (OSError, TypeError, SyntaxError):
            continue
        yield from (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


def names_after_self(node: ast.expr) -> tuple[str, ...]:
    """``self.a.b`` as ("a", "b"); none for anything else."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return tuple(reversed(names)) if isinstance(node, ast.Name) and node.id == "self" else ()
