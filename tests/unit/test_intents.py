"""Intents of plain calls are written from what their requests have in common, as the careful way would write them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.schema import faults

from sidecar.model.exchange import Exchange, Gate, PlainExchange, RequestShape, ResponseShape, Subscriber
from sidecar.spool import intake as intake_module
from sidecar.spool.frames import EXCHANGE, PLAIN, decode_frame, encode_frame
from sidecar.spool.intake import Intake, Source
from sidecar.spool.types import Batch, Tally, encode_intent, settle

INSTANCE = 'inst "ance"'
STARTED_NS = 1_795_000_000_123_456_789


class Counts:
    def call_ended(self, exchange: Exchange) -> None: ...
    def calls_ended(self, gathered: object) -> None: ...
    def add(self, counts: object) -> None: ...


class Spool:
    """As far as the intake asks it: keeps what is handed over."""

    instance = INSTANCE
    next_seq = 1

    def __init__(self) -> None:
        self.tally = Tally()
        self.open_intents: Mapping[str, bytes] = {}
        self.batches: list[Batch] = []
        self.submit = self.batches.append

    def origins(self) -> Mapping[bytes, int]:
        return {}


def intents(*frames: list[PlainExchange]) -> dict[str, bytes]:
    """What is written for the case that no more is heard of these calls."""
    spool, source = Spool(), Source(bytes(16), lambda number: None)
    taken = Intake(Counts())
    taken.begin(spool)
    taken.came(source)
    for number, opens in enumerate(frames, 1):
        taken.take(source, encode_frame(number, admitted=len(opens), opens=opens))
    taken.store()
    found = [one for batch in spool.batches for one in batch.opens]
    assert len(dict(found)) == len(found)
    assert source.open == dict(found)
    return dict(found)


TEXTS = st.one_of(st.text(max_size=8), st.sampled_from(['"', "%", "%b", "\\", "\ud800", "é", "a" * 300]))
SHAPES = st.builds(
    RequestShape,
    number=st.just(0), method=st.sampled_from(["GET", "POST"]), target=st.just("/"), fields=st.just(()),
    read=st.booleans(), url=TEXTS, route=st.none() | TEXTS, request_headers=st.lists(TEXTS, max_size=3),
    user_agent=st.none() | TEXTS, subscriber=st.none() | st.builds(Subscriber, TEXTS, TEXTS),
    dimensions=st.dictionaries(TEXTS, TEXTS, max_size=2), upstream=st.none() | TEXTS,
)  # fmt: skip
CALLS = st.tuples(
    st.integers(0, 2), st.none() | st.sampled_from(["192.0.2.7", "2001:db8::1"]), st.none() | st.just("a" * 32),
    st.integers(0, 10**9), st.integers(STARTED_NS, STARTED_NS + 10**13), st.none() | st.just('https://x/"%b'),
    st.sampled_from([None, None, Gate("allowed", "calls", "limit", 0.0, {"calls": 1}, True)]),
)  # fmt: skip


@given(kinds=st.lists(SHAPES, min_size=3, max_size=3), made=st.lists(st.lists(CALLS, max_size=4), max_size=3))
@settings(deadline=None)
def test_an_intent_is_what_the_careful_way_writes(kinds: list[RequestShape], made: list[list[Any]]) -> None:
    kinds = [replace(shape, number=number) for number, shape in enumerate(kinds, 7)]
    ids = iter(range(100))
    frames = [
        [
            PlainExchange(kinds[kind], ip, trace, size, b"body", f"{next(ids):036x}", started_ns, 5, gate=gate, url=url)
            for kind, ip, trace, size, started_ns, url, gate in calls
        ]
        for calls in made
    ]
    found = intents(*frames)
    every = [plain for calls in frames for plain in calls]
    assert found == {plain.id: encode_intent(plain.exchange(), instance=INSTANCE) for plain in every}


def plain_call(number: int, **more: Any) -> PlainExchange:
    shape = RequestShape(
        number=number,
        method="POST",
        target="/",
        fields=(),
        read=True,
        url="https://api.example.com/",
        route=None,
        request_headers=["Host"],
        user_agent=None,
        subscriber=Subscriber("acme", "header:x-tenant"),
        dimensions={},
    )
    return PlainExchange(shape, None, None, 3, b"{}", f"{number:036x}", STARTED_NS, 5, **more)


def test_only_what_a_limit_was_asked_about_goes_as_a_whole() -> None:
    calls = [plain_call(1), plain_call(2, gate=Gate("allowed", None, "", 0.0, {}, True))]
    assert [entry[0] for entry in decode_frame(encode_frame(1, opens=calls)).opens] == [PLAIN, EXCHANGE]


def test_what_has_come_back_so_far_is_no_part_of_it() -> None:
    """It was seen by a process that is gone when the intent is read."""
    response = ResponseShape(number=1, status=200, response_headers=["Server"])
    begun = plain_call(1, first_byte_ms=3.5, response=response, response_bytes=10)
    (line,) = intents([begun]).values()
    assert line == encode_intent(plain_call(1).exchange(), instance=INSTANCE)
    assert faults(settle(line, seq=1, instance="i")) == []


def test_kinds_of_requests_are_forgotten_when_there_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intake_module, "SHAPES_MAX", 3)
    calls = [plain_call(number) for number in range(1, 9)]
    found = intents(calls[:5], calls[5:])
    assert [orjson.loads(line)["id"] for line in found.values()] == [call.id for call in calls]


def test_one_that_cannot_be_read_takes_no_other_with_it(caplog: pytest.LogCaptureFixture) -> None:
    odd = plain_call(1)
    odd.started_ns = None  # type: ignore[assignment]
    found = intents([odd, plain_call(2)])
    assert list(found) == [plain_call(2).id]
    assert "cannot be kept" in caplog.text
