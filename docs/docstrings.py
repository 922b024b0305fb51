"""How docstrings are shown on the site: arguments, which stand as ``name: text``, become a list."""

import re
from typing import Any

import griffe

ARGUMENT = re.compile(r"(?m)^(?=(?:\w+, )*\w+: )(?P<names>(?:\w+, )*\w+): ")


class ArgumentLists(griffe.Extension):
    """Rewrites every docstring of the package as Markdown."""

    def on_object(self, *, obj: Any, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(text: str) -> str:
    """``name: text`` at a line's beginning as an item of a list, double backticks as single ones."""
    text = re.sub(r"``(.+?)``", r"`\1`", text, flags=re.DOTALL)
    listed = ARGUMENT.sub(lambda found: f"\n- **{found['names']}**: ", text)
    return re.sub(r"(?m)^(Raises|Returns|With|By|Else) ", r"\n\1 ", listed)
