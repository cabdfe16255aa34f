"""Numbers, names and errors out of whatever JSON held."""

from __future__ import annotations

import math
from decimal import Decimal

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.usage.values import (
    COUNT_MAX,
    NAME_MAX_CHARS,
    RAW_USAGE_MAX_BYTES,
    count,
    decimal_text,
    error_word,
    keepable,
    lenient_loads,
    name,
    overlay,
    quantity,
    tolerant_loads,
)

ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0, 0),
        (7, 7),
        (COUNT_MAX, COUNT_MAX),
        (17.0, 17),
        ("19", 19),
        ("0", 0),
        (COUNT_MAX + 1, None),
        (-1, None),
        (1.5, None),
        (-0.5, None),
        (math.nan, None),
        (math.inf, None),
        (True, None),
        (False, None),
        ("", None),
        ("-1", None),
        ("1e3", None),
        (" 1", None),
        ("１２", None),  # full-width digits are no ASCII digits
        ("9" * 400, None),
        ([3], None),
        ({"n": 3}, None),
        (None, None),
    ],
)
def test_what_is_a_count(value: object, expected: int | None) -> None:
    got = count(value)
    assert got == expected
    assert got is None or type(got) is int


@given(ANYTHING)
def test_no_value_is_too_odd(value: object) -> None:
    for function in (count, quantity, decimal_text, name, error_word):
        function(value)
    assert count(value) is None or 0 <= (count(value) or 0) <= COUNT_MAX


@pytest.mark.parametrize(
    ("value", "exponent", "expected"),
    [
        (0.0034305, 0, "0.0034305"),
        (21210000, -10, "0.002121"),
        ("0.10", 0, "0.1"),
        (0, 0, "0"),
        (1e-7, 0, "0.0000001"),
        (3, 0, "3"),
        (100, 0, "100"),
        (-1, 0, None),
        (math.nan, 0, None),
        (math.inf, 0, None),
        (True, 0, None),
        ("a lot", 0, None),
        ("1e999999999999999999", -10, None),
        ("9e999999", -10, None),
        (10**40, 0, None),
        (None, 0, None),
    ],
)
def test_money_is_decimal_text(value: object, exponent: int, expected: str | None) -> None:
    assert decimal_text(value, exponent) == expected


@given(st.decimals(min_value=0, max_value=10**9, places=9))
def test_money_survives(amount: Decimal) -> None:
    text = decimal_text(str(amount))
    assert text is not None
    assert Decimal(text) == amount


def test_names_are_never_empty_and_never_long() -> None:
    assert name("") is None
    assert name(7) is None
    assert name("gpt") == "gpt"
    assert name("x" * NAME_MAX_CHARS) == "x" * NAME_MAX_CHARS
    assert name("x" * 5000) == "x" * (NAME_MAX_CHARS - 1) + "…"  # to be seen as cut


@pytest.mark.parametrize(
    ("error", "word"),
    [
        ({"type": "overloaded_error", "message": "secret"}, "overloaded_error"),
        ({"message": "secret", "code": "rate_limit_exceeded"}, "rate_limit_exceeded"),
        ({"code": 429, "message": "secret"}, "http_429"),
        ({"code": 400, "status": "INVALID_ARGUMENT"}, "http_400"),
        ({"error": {"type": "server_error"}}, "server_error"),
        ("model_not_found", "model_not_found"),
        ("the key sk-123 is wrong", "error"),
        ({"type": "the key sk-123 is wrong"}, "error"),
        ([], "error"),
    ],
)
def test_errors_become_one_word_and_messages_are_never_quoted(error: object, word: str) -> None:
    assert error_word(error) == word


def test_later_reports_replace_field_by_field() -> None:
    first = {"a": 1, "b": 2, "inner": {"x": 1, "y": 2}, "kept": 5}
    later = {"a": 10, "b": None, "inner": {"y": 20}, "kept": True, "new": 3}
    assert overlay(first, later) == {"a": 10, "b": 2, "inner": {"x": 1, "y": 20}, "kept": 5, "new": 3}
    assert first["a"] == 1, "the earlier report is left as it was"


@given(first=st.dictionaries(st.text(max_size=3), ANYTHING), later=st.dictionaries(st.text(max_size=3), ANYTHING))
def test_an_overlay_loses_no_field(first: dict[str, object], later: dict[str, object]) -> None:
    merged = overlay(first, later)
    assert set(merged) == set(first) | set(later)
    assert overlay(merged, later) == merged or any(value != value for value in _leaves(merged))


def _leaves(value: object) -> list[object]:
    if isinstance(value, dict):
        return [leaf for inner in value.values() for leaf in _leaves(inner)]
    if isinstance(value, list):
        return [leaf for inner in value for leaf in _leaves(inner)]
    return [value]


@pytest.mark.parametrize(
    "text",
    [
        b'{"a": NaN, "b": 1}',
        b'{"a": 1e400, "b": 1}',
        b'{"a": ' + b"9" * 5000 + b', "b": 1}',
        b'{"a": "\\ud800", "b": 1}',
        b'{"a": "\xff\xfe", "b": 1}',
        b'\xef\xbb\xbf{"a": Infinity, "b": 1}',
    ],
)
def test_the_forgiving_parser_gives_what_a_record_can_hold(text: bytes) -> None:
    document = tolerant_loads(text)
    assert document["b"] == 1
    assert count(document["a"]) is None
    orjson.dumps(document)


@pytest.mark.parametrize("text", [b"", b"{", b"[" * 3000, b"x" * 70_000, b"nul"])
def test_no_json_is_none(text: bytes) -> None:
    assert lenient_loads(text) is None


def test_what_a_record_cannot_hold_is_not_kept() -> None:
    deep: dict[str, object] = {}
    for _ in range(300):
        deep = {"a": deep}
    assert keepable({"prompt_tokens": 1})
    assert not keepable(deep)
    assert not keepable({"a": "x" * RAW_USAGE_MAX_BYTES})
    assert not keepable({"a": 2**70})
