"""What comes from elsewhere is a record or is told why not: held against another implementation of JSON Schema."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from support.backend_fixtures import odd_records, record, usage

from sidecar.model.exchange import Gate
from sidecar.model.record import Record
from sidecar.model.record_check import LINE_BYTES_MAX, NotARecord, compiled, id_bytes, id_ms, read_foreign
from sidecar.model.record_schema import schema

COST = {
    "currency": "USD",
    "total": "0.1",
    "parts": {"input": "0.1"},
    "state": "exact",
    "source": "custom",
    "model": "m",
}
VALIDATOR = Draft202012Validator(schema())
FULL = record(
    7,
    usage=usage(units={"pages": 2, "money": "0.1"}, raw_usage={"a": [1]}),
    cost=COST,
    charge=COST | {"total": None},
    gate=Gate("allowed", "calls", "limits", 1.5, {"calls": 1}),
    dimensions={"team": "a"},
)
WRONG = st.one_of(
    st.none(), st.booleans(), st.integers(-5, 1000), st.floats(-1e6, 1e6),
    st.text(max_size=5), st.lists(st.integers() | st.text(max_size=3), max_size=2),
    st.dictionaries(st.text(max_size=3), st.integers(0, 9) | st.text(max_size=3), max_size=2),
)  # fmt: skip


def places(row: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path] if path else []
    items = row.items() if isinstance(row, dict) else enumerate(row) if isinstance(row, list) else ()
    for key, value in items:
        found += places(value, (*path, key))
    return found


@given(st.data())
def test_it_says_of_every_change_what_the_schema_says(data: st.DataObject) -> None:
    row = json.loads(FULL.json)
    path = data.draw(st.sampled_from(places(row)))
    inner = row
    for key in path[:-1]:
        inner = inner[key]
    if data.draw(st.booleans()) or isinstance(inner, list):
        inner[path[-1]] = data.draw(WRONG)
    else:
        del inner[path[-1]]
    # A whole float counts as an integer in JSON Schema; what adds up tells them apart.
    whole = json.loads(json.dumps(row), parse_float=lambda text: float(text) + (0.5 if float(text).is_integer() else 0))
    assert (compiled(schema())(whole) is None) == VALIDATOR.is_valid(whole), path


@pytest.mark.parametrize("each", odd_records(), ids=lambda each: str(each.seq))
def test_our_own_records_are_records(each: Record) -> None:
    assert read_foreign(each.json) == each


def changed(**changes: Any) -> bytes:
    row = copy.deepcopy(json.loads(FULL.json)) | changes
    return json.dumps(row).encode()


@pytest.mark.parametrize(
    ("line", "reason", "says"),
    [
        (b"", "no_record", "no JSON"),
        (b"hello", "no_record", "no JSON"),
        (b"[]", "no_record", "no object"),
        (b"\xff", "no_record", "no JSON"),
        (b"{}", "no_record", "id"),
        (FULL.json + b"\n", "no_record", "one line"),
        (json.dumps(json.loads(FULL.json), indent=1).encode(), "no_record", "one line"),
        (changed(version=2), "other_version", "update"),
        (changed(id="0199aaaa-0000-4000-8000-000000000001"), "no_record", "id is none"),
        (changed(id=5), "no_record", "id is not"),
        (changed(started_at="2026-13-01T00:00:00Z"), "no_record", "ValueError"),
        (changed(request_bytes=-1), "no_record", "request_bytes"),
        (changed(request_bytes=True), "no_record", "request_bytes"),
        (changed(usage={**json.loads(FULL.json)["usage"], "input_tokens": "12"}), "no_record", "usage"),
        (changed(dimensions={"password-of-me": 1}), "no_record", "dimensions.*"),
        (changed(user_agent="x" * LINE_BYTES_MAX), "too_large", "at most"),
    ],
)
def test_what_is_none_is_told_with_its_reason_and_nothing_of_it(line: bytes, reason: str, says: str) -> None:
    with pytest.raises(NotARecord) as caught:
        read_foreign(line)
    assert caught.value.reason == reason
    assert says in str(caught.value)
    assert "password-of-me" not in str(caught.value)


@given(st.binary(max_size=200))
def test_any_bytes_are_told_and_never_raise_anything_else(line: bytes) -> None:
    with pytest.raises(NotARecord):
        read_foreign(line)


def test_an_id_in_bytes_keeps_its_order_and_time() -> None:
    one, other = "0199aaaa-0000-7000-8000-000000000001", "0199aaaa-0001-7000-8000-000000000000"
    assert id_bytes(one) < id_bytes(other)
    assert id_ms(other) == id_ms(one) + 1
    with pytest.raises(ValueError, match="no id"):
        id_bytes("x")
