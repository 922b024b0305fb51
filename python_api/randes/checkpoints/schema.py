"""What comes from outside, held to what it must be before anything is opened, made or changed: manifests of stores,
headers and indexes of safetensors, configurations of adapters and models.

A ``Check`` is called with where a value stands and the value, and raises ``ValueError`` unless it is as it must be.
They are put together as the JSON is: ``record({"weight_map": each(file_name)})``.
"""

import json
from collections.abc import Callable, Mapping
from math import isfinite
from typing import Any, TypeAlias

Check: TypeAlias = Callable[[str, object], None]
DEEPEST = 64
"""Levels of a text; nothing that is read here has more than a dozen."""
LARGEST = (1 << 63) - 1
"""Of a number of bytes, or of elements of a tensor."""
SHOWN = 60
"""Characters of a value in an error."""


def parsed(text: bytes, what: str, *, constants: bool = True) -> Any:
    """The value of a JSON text: UTF-8, no key twice in an object, ``DEEPEST`` levels at most. Raises ``ValueError``.

    constants: whether it may have NaN and Infinity, which Transformers writes into configurations and JSON lacks.
    """
    try:
        value = json.loads(
            text.decode("utf-8"), object_pairs_hook=_once, parse_constant=float if constants else _no_constant
        )
    except RecursionError:
        raise ValueError(f"{what} must be at most {DEEPEST} levels deep, got more") from None
    except ValueError as error:
        raise ValueError(f"{what} must be JSON, got {error}") from error
    level = [value]
    for _ in range(DEEPEST):
        level = [inner for one in level for inner in _inside(one)]
        if not level:
            return value
    raise ValueError(f"{what} must be at most {DEEPEST} levels deep, got more")


def must(right: bool, where: str, expected: str, value: object) -> None:
    """Raise ``ValueError`` with what was expected and what came."""
    if not right:
        shown = repr(value)
        raise ValueError(f"{where} must be {expected}, got {shown[:SHOWN]}{'…' * (len(shown) > SHOWN)}")


def anything(where: str, value: object) -> None:
    """What is looked at elsewhere."""


def text(where: str, value: object) -> None:
    must(isinstance(value, str) and is_utf8(value), where, "a text in UTF-8", value)


def truth(where: str, value: object) -> None:
    must(isinstance(value, bool), where, "true or false", value)


def file_name(where: str, value: object) -> None:
    plain = isinstance(value, str) and value not in ("", ".", "..") and not {*value} & {"/", "\\", "\0"}
    short = plain and isinstance(value, str) and is_utf8(value) and len(value.encode()) <= 255
    must(short, where, "the name of a file beside it", value)


def file_below(where: str, value: object) -> None:
    """A file's name, or its path from there through folders."""
    for part in value.split("/") if isinstance(value, str) else [value]:
        try:
            file_name(where, part)
        except ValueError:
            must(False, where, "the name of a file beside it, or in a folder there", value)


def digest(where: str, value: object) -> None:
    right = isinstance(value, str) and len(value) == 32 and not {*value} - {*"0123456789abcdef"}
    must(right, where, "32 hexadecimal digits", value)


def integer(least: int = 0, most: int = LARGEST) -> Check:
    def check(where: str, value: object) -> None:
        right = type(value) is int and least <= value <= most
        must(right, where, f"an integer from {least} to {most}", value)

    return check


def number(where: str, value: object) -> None:
    right = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300 and isfinite(value)
    must(right, where, "a finite number", value)


def one_of(*allowed: object) -> Check:
    def check(where: str, value: object) -> None:
        # 1 is not True here, nor 1.0.
        right = any(type(value) is type(one) and value == one for one in allowed)
        must(right, where, " or ".join(map(repr, allowed)), value)

    return check


def either(*checks: Check) -> Check:
    """Any of several; what the last one says where none is right."""

    def check(where: str, value: object) -> None:
        for one in checks[:-1]:
            try:
                return one(where, value)
            except ValueError:
                continue
        return checks[-1](where, value)

    return check


def listed(check: Check, least: int = 0, most: int = LARGEST) -> Check:
    def check_all(where: str, value: object) -> None:
        must(isinstance(value, list), where, "a list", value)
        assert isinstance(value, list)
        must(least <= len(value) <= most, f"the length of {where}", f"from {least} to {most}", len(value))
        for place, inner in enumerate(value):
            check(f"{where}[{place}]", inner)

    return check_all


def each(check: Check, key: Check = text) -> Check:
    """An object of any keys."""

    def check_all(where: str, value: object) -> None:
        must(isinstance(value, dict), where, "an object", value)
        assert isinstance(value, dict)
        for name, inner in value.items():
            key(f"a key of {where}", name)
            check(f"{where}[{name!r}]", inner)

    return check_all


def record(required: Mapping[str, Check], optional: Mapping[str, Check] | None = None, *, more: bool = False) -> Check:
    """An object of these keys; of any others besides with ``more``."""
    known = {**required, **(optional or {})}

    def check_all(where: str, value: object) -> None:
        must(isinstance(value, dict), where, "an object", value)
        assert isinstance(value, dict)
        missing, strange = required.keys() - value.keys(), value.keys() - known.keys()
        must(not missing, where, f"an object with {', '.join(sorted(required))}", sorted(value))
        must(more or not strange, where, f"an object of {', '.join(known)} alone", sorted(strange))
        for name in known.keys() & value.keys():
            known[name](f"{where}.{name}", value[name])

    return check_all


def is_utf8(value: str) -> bool:
    """Whether a text can be written down: JSON and the command line can hold halves of characters, which cannot."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _no_constant(name: str) -> None:
    raise ValueError(f"the number {name}")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in found if names.count(name) > 1)!r} twice in one object")
    return found


def _inside(value: Any) -> list[Any]:
    held = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [inner for inner in held if isinstance(inner, dict | list)]
