"""The record's line: it reads back as it was written, and no content makes it fail."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.model.exchange import Exchange, Outcome, Subscriber, Usage, UsageState
from sidecar.model.record import Record, encode, encode_exactly, record_of

ID = "0199f7a0-0000-7000-8000-000000000001"


def exchange(**changes: Any) -> Exchange:
    fields: dict[str, Any] = {
        "id": ID,
        "method": "POST",
        "url": "https://api.example.com/v1/chat/completions",
        "started_ns": 1_763_629_200_123_456_789,
        "status": 200,
        "outcome": Outcome.COMPLETE,
        "subscriber": Subscriber("acme", "header:x-tenant"),
    }
    return Exchange(**(fields | changes))


def test_it_reads_back_as_it_was_written() -> None:
    usage = Usage(usage_state=UsageState.FINAL, input_tokens=43, output_tokens=0, cache_read_input_tokens=0)
    line = encode(exchange(usage=usage, request_headers=["Content-Type"]), seq=41, instance="i")
    record = Record.from_json(line)
    assert (record.id, record.seq, record.instance, record.json) == (ID, 41, "i", line)
    assert record.subscriber == Subscriber("acme", "header:x-tenant")
    assert record.request_headers == ("Content-Type",)
    assert record.started_at.isoformat() == "2025-11-20T09:00:00.123456+00:00"
    assert record.usage == usage


def test_null_is_never_zero_and_zero_is_never_null() -> None:
    usage = Usage(usage_state=UsageState.ABSENT, output_tokens=0)
    row = json.loads(encode(exchange(usage=usage), seq=1, instance="i"))["usage"]
    assert row["input_tokens"] is None
    assert row["output_tokens"] == 0
    assert "cache_read_input_tokens" not in row
    assert json.loads(encode(exchange(), seq=1, instance="i"))["usage"] is None


_CORE = (
    "usage_state", "provider", "operation", "streamed", "model", "request_model", "response_id",
    "input_tokens", "output_tokens", "total_tokens",
)  # fmt: skip
_CONTAINERS = {
    "units": st.sampled_from([{}, {"pages": 0}]),
    "finish_reasons": st.sampled_from([[], ["stop"]]),
    "raw_usage": st.sampled_from([None, 0, False, "", [], {}, [0], {"a": None}]),
}
_PLAIN = [f.name for f in fields(Usage) if f.name not in (*_CONTAINERS, "usage_state")]


@given(
    values=st.builds(
        lambda plain, containers: plain | containers,
        st.dictionaries(st.sampled_from(_PLAIN), st.sampled_from([None, 0, False, "", 1, 0.0])),
        st.fixed_dictionaries({}, optional=_CONTAINERS),
    )
)
def test_the_core_is_always_there_and_of_the_rest_what_was_reported(values: dict[str, Any]) -> None:
    usage = Usage(usage_state=UsageState.FINAL, **values)
    row = json.loads(encode(exchange(usage=usage), seq=1, instance="i"))["usage"]
    given_ = {f.name: getattr(usage, f.name) for f in fields(Usage)}
    assert row == {k: v for k, v in given_.items() if k in _CORE or (v is not None and v not in ([], {}))}
    assert list(row) == [f.name for f in fields(Usage) if f.name in row]


def test_the_time_has_microseconds_and_says_utc() -> None:
    assert json.loads(encode(exchange(), seq=1, instance="i"))["started_at"].endswith("Z")


@pytest.mark.parametrize("text", ["\udcff", "a\ud800b", "\x00", "é"])
def test_text_that_was_no_utf8_still_makes_a_record(text: str) -> None:
    odd = exchange(url=text, request_headers=[text], dimensions={text: text}, user_agent=text)
    assert Record.from_json(encode(odd, seq=1, instance="i")).id == ID


@given(
    raw=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()) | st.binary(max_size=4),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
        max_leaves=20,
    )
)
def test_no_raw_usage_makes_it_fail(raw: object) -> None:
    usage = Usage(usage_state=UsageState.FINAL, raw_usage=raw)
    assert Record.from_json(encode(exchange(usage=usage), seq=1, instance="i")).id == ID


@pytest.mark.parametrize("line", [b"", b"{}", b"[]", b"null", b'{"id": 1}', b"\xff", b'{"id":"x","subscriber":3}'])
def test_what_is_no_record_is_refused_as_such(line: bytes) -> None:
    with pytest.raises(ValueError, match="not a record"):
        Record.from_json(line)


def test_what_is_at_hand_is_what_would_be_read() -> None:
    usage = Usage(usage_state=UsageState.FINAL, input_tokens=43, units={"pages": "1.5"}, raw_usage={"a": [1, 2.5]})
    made = [
        exchange(usage=usage, request_headers=["Content-Type"], dimensions={"team": "x"}, first_byte_ms=0.25),
        exchange(subscriber=None, started_ns=1_764_360_000_123_456_789, error="cut"),
    ]
    for seq, one in enumerate(made, 7):
        line, exact = encode_exactly(one, seq=seq, instance="i")
        assert exact
        assert record_of(one, seq=seq, instance="i", line=line) == Record.from_json(line)


def test_a_line_that_says_less_than_its_exchange_is_told() -> None:
    odd = Exchange(method="GET", url="http://up/\udcff", id="a" * 36)
    line, exact = encode_exactly(odd, seq=1, instance="i")
    assert not exact
    assert Record.from_json(line).url == "http://up/?"
