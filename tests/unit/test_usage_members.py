"""Members of large documents, found exactly: compared with a whole parse, wherever the pieces are cut."""

from __future__ import annotations

import json
import random
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sidecar.usage.formats.json_scanner import BULK_BYTES, ELEMENTS_MAX, VALUE_MAX_BYTES, Members, pruned
from sidecar.usage.providers.base import Tree

WANTED: Tree = {
    "usage": True,
    "id": True,
    "choices": [{"finish_reason": True, "usage": True}],
    "response": {"usage": True, "id": True},
}

TEXT = st.text(st.sampled_from('ab"\\{}[],:é\n\x00'), max_size=12)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["usage", "id", "choices", "response", "a", 'q"', "\\"]) | TEXT, inner, max_size=4
        )
    ),
    max_leaves=20,
)
DOCUMENTS = st.dictionaries(st.sampled_from(["usage", "id", "choices", "response", "b"]) | TEXT, VALUES, max_size=6)


def prune(value: Any, tree: Any) -> Any:
    """What should be left of a document, said in another way."""
    found = {}
    for key, inner in value.items():
        want = tree.get(key)
        if want is True:
            found[key] = inner
        elif isinstance(want, dict) and isinstance(inner, dict):
            found[key] = prune(inner, want)
        elif isinstance(want, list) and isinstance(inner, list):
            found[key] = [prune(element, want[0]) for element in inner if isinstance(element, dict)]
    return found


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    places = sorted(cut % (len(data) + 1) for cut in cuts)
    return [data[a:b] for a, b in zip([0, *places], [*places, len(data)], strict=True)]


@settings(deadline=None)
@given(document=DOCUMENTS, cuts=st.lists(st.integers(0, 10_000), max_size=8), indent=st.sampled_from([None, 2]))
def test_the_same_as_a_whole_parse(document: dict[str, Any], cuts: list[int], indent: int | None) -> None:
    data = json.dumps(document, indent=indent, ensure_ascii=False).encode()
    members = Members(WANTED)
    for piece in pieces(data, cuts):
        members.feed(piece)
    assert members.document == prune(document, WANTED)
    assert members.done


@settings(deadline=None)
@given(data=st.binary(max_size=200) | st.text(st.sampled_from('{}[]",:\\u0tfn1. \n'), max_size=200).map(str.encode))
def test_garbage_is_endured_and_cuts_do_not_matter(data: bytes) -> None:
    whole = pruned(data, WANTED)
    members = Members(WANTED)
    for i in range(len(data)):
        members.feed(data[i : i + 1])
    assert members.document == whole


FILLINGS = {
    "floats": b"[" + b"0.0123456789," * 30_000 + b"1]",
    "pairs": b"[" + b'{"a":[1,2],"b":{}},' * 20_000 + b"{}]",
    "one string": b'"' + b"x" * 300_000 + b'"',
    "quotes": b'"' + b'\\"' * 100_000 + b'"',
    "backslashes": b'"' + b"\\\\" * 100_000 + b'"',
    "brackets in text": b'["' + b"}]{[\\\\" * 50_000 + b'"]',
    "deep": b"[" * 60_000 + b"]" * 60_000,
    "deep and wide": b'{"a":[' * 20_000 + b'"}"' + b"]}" * 20_000,
    "usage in text": b'["' + b'\\"usage\\":{\\"prompt_tokens\\":9}' * 8_000 + b'"]',
    "usage below": b"[" + b'{"usage":{"prompt_tokens":9}},' * 9_000 + b"0]",
    "white": b"[" + b" \n\t\r" * 60_000 + b"]",
}


@pytest.mark.parametrize("filling", FILLINGS)
@pytest.mark.parametrize("size", [1500, 65_536])
def test_usage_behind_much_else_is_found(filling: str, size: int) -> None:
    data = b'{"id":"r","data":' + FILLINGS[filling] + b',"usage":{"prompt_tokens":5}}'
    members = Members(WANTED)
    for start in range(0, len(data), size):
        members.feed(data[start : start + size])
    assert members.document == {"id": "r", "usage": {"prompt_tokens": 5}}
    assert members.done


def test_cut_anywhere_near_the_borders_of_a_bulk() -> None:
    chooser = random.Random(7)
    value = json.dumps([{"t": 'a"b\\', "n": [[1], {"u": "}{"}]} for _ in range(1200)]).encode()
    data = b'{"data":' + value + b',"usage":{"a":1},"id":"x"}'
    assert len(data) > 2 * BULK_BYTES
    for _ in range(60):
        members = Members(WANTED)
        for piece in pieces(data, [chooser.randrange(len(data)) for _ in range(6)]):
            members.feed(piece)
        assert members.document == {"usage": {"a": 1}, "id": "x"}


@pytest.mark.parametrize("spelling", [b'"\\u0075sage"', b'"us\\u0061ge"', b'"usage"'])
def test_escaped_names_are_names(spelling: bytes) -> None:
    assert pruned(b"{" + spelling + b':{"a":1}}', WANTED) == {"usage": {"a": 1}}


def test_of_duplicates_the_last_counts() -> None:
    assert pruned(b'{"usage":{"a":1},"usage":{"a":2}}', WANTED) == {"usage": {"a": 2}}


def test_a_value_too_large_is_dropped_and_said() -> None:
    members = Members(WANTED)
    members.feed(b'{"usage":"' + b"x" * VALUE_MAX_BYTES + b'","id":"r"}')
    assert members.document == {"id": "r"}
    assert members.oversized


def test_elements_are_bounded() -> None:
    members = Members(WANTED)
    members.feed(b'{"choices":[' + b'{"finish_reason":"stop"},' * (ELEMENTS_MAX + 5) + b'{}],"id":"r"}')
    assert len(members.document["choices"]) == ELEMENTS_MAX
    assert members.oversized
    assert members.document["id"] == "r"


def test_spans_are_places_in_the_whole() -> None:
    data = b' {"a": 1, "usage": {"x": [1]}, "b": 2}'
    members = Members({"usage": True})
    members.feed(data[:9])
    members.feed(data[9:])
    start, end = members.span
    assert orjson.loads(data[start:end]) == {"x": [1]}
