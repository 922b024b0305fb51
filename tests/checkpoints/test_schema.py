"""Values from outside: each kind of check lets through what it says, and names what it does not."""

import json
from typing import Any

import pytest

from randes.checkpoints import schema

RIGHT: list[tuple[schema.Check, list[Any]]] = [
    (schema.anything, [None, float("nan")]),
    (schema.text, ["", "日本", "\x1b"]),
    (schema.truth, [True, False]),
    (schema.file_name, ["a", "a.safetensors", ".hidden", "x" * 255]),
    (schema.digest, ["0123456789abcdef" * 2]),
    (schema.integer(1, 3), [1, 2, 3]),
    (schema.number, [0, -1.5, 3, 1e299]),
    (schema.one_of(None, 1, "a"), [None, 1, "a"]),
    (schema.either(schema.truth, schema.integer()), [True, 7]),
    (schema.listed(schema.integer(), 1, 2), [[1], [1, 2]]),
    (schema.each(schema.integer()), [{}, {"a": 1}]),
    (schema.record({"a": schema.truth}, {"b": schema.text}), [{"a": True}, {"a": True, "b": ""}]),
    (schema.record({"a": schema.truth}, more=True), [{"a": True, "c": 1}]),
]
WRONG: list[tuple[schema.Check, list[Any]]] = [
    (schema.text, [None, 1, "\ud800"]),
    (schema.truth, [None, 0, 1, "true"]),
    (schema.file_name, ["", ".", "..", "a/b", "../a", "/a", "a\\b", "a\0", "x" * 256, "\ud800", 3]),
    (schema.digest, ["", "0" * 31, "0" * 33, "g" * 32, "A" * 32, 5]),
    (schema.integer(1, 3), [0, 4, 1.0, True, "1", None, 10**400]),
    (schema.number, [True, "1", None, float("nan"), float("inf"), 10**400, 1e308]),
    (schema.one_of(None, 1, "a"), [True, 1.0, "b", [], {}]),
    (schema.either(schema.truth, schema.integer()), ["", -1, None]),
    (schema.listed(schema.integer(), 1, 2), [[], [1, 2, 3], [""], "ab", {"0": 1}]),
    (schema.each(schema.integer(), schema.digest), [{"a": 1}, {"0" * 32: ""}, [], None]),
    (schema.record({"a": schema.truth}, {"b": schema.text}), [{}, {"b": ""}, {"a": 1}, {"a": True, "c": 1}, []]),
    (schema.record({"a": schema.truth}, more=True), [{"c": 1}, {"a": None}]),
]


@pytest.mark.parametrize(("check", "values"), RIGHT)
def test_what_is_right_is_let_through(check: schema.Check, values: list[Any]) -> None:
    for value in values:
        check("it", value)


@pytest.mark.parametrize(("check", "values"), WRONG)
def test_what_is_wrong_is_named(check: schema.Check, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(ValueError, match=r"it(\W.*)? must be .*, got "):
            check("it", value)


def test_a_long_value_is_cut_in_the_error() -> None:
    with pytest.raises(ValueError, match=r"it must be true or false, got 'x{59}…$"):
        schema.truth("it", "x" * 1000)


def test_a_text_is_parsed() -> None:
    assert schema.parsed(b'{"a": [1, {"b": null}]}', "it") == {"a": [1, {"b": None}]}
    deep = "[" * schema.DEEPEST + "]" * schema.DEEPEST
    assert json.dumps(schema.parsed(deep.encode(), "it")) == deep


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "must be JSON"),
        (b"\xff", "must be JSON, got 'utf-8'"),
        (b"{", "must be JSON"),
        (b"9" * 5000, "must be JSON"),
        (b'{"a": 1, "b": {"c": 1, "d": 2, "c": 3}}', "must be JSON, got 'c' twice in one object"),
        (b"[" * 65 + b"]" * 65, "must be at most 64 levels deep"),
        (b"[" * 100_000 + b"]" * 100_000, "must be at most 64 levels deep"),
        (b'{"a":' * 65 + b"1" + b"}" * 65, "must be at most 64 levels deep"),
    ],
)
def test_what_is_no_text_is_refused(text: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=f"^it {message}"):
        schema.parsed(text, "it")


@pytest.mark.parametrize("constant", ["NaN", "Infinity", "-Infinity"])
def test_numbers_that_are_none_are_let_through_where_others_write_them(constant: str) -> None:
    text = f'{{"limit": [0.0, {constant}]}}'.encode()
    assert repr(schema.parsed(text, "it")["limit"][1]) == repr(float(constant))
    with pytest.raises(ValueError, match=f"^it must be JSON, got the number {constant}"):
        schema.parsed(text, "it", constants=False)


def test_a_file_may_be_in_a_folder_below() -> None:
    for name in ("a", "a/b", "a/b/c.safetensors"):
        schema.file_below("it", name)
    for name in ("", "/a", "a//b", "../a", "a/../b", 3, None):
        with pytest.raises(ValueError, match=r"^it must be"):
            schema.file_below("it", name)
