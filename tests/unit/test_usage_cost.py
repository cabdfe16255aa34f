"""A body costs its length: the catalogue of shapes, as a guard for the readers alone.

What a whole call costs the sidecar is measured in `end_to_end/test_busy_bodies.py`, at its own process. Here only
reading runs, a small part of that, so a stand-in for the rest of the way is added to both sides (`carried`): the
bound is that of the whole call, and the shapes are many. Ratios of processor time within one run, and nothing absolute.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.busy import DOCUMENTS, STREAMS, TEXT, USAGE, filled, members_of

from sidecar.usage.formats.json_scanner import Members
from sidecar.usage.formats.json_tail import Tail
from sidecar.usage.providers.base import Tree
from sidecar.usage.readers import RequestReadingTap, UsageTaps

PIECE = 65_536
TURNS_MIN, TURNS_MAX = 2, 16
RATIO_MAX = 3.0
SAME = bytes(range(256))

CHAT = "/v1/chat/completions"
SSE = b"text/event-stream"
JSON = b"application/json"


TAPS = UsageTaps(anomaly=lambda kind: None)


def answered(body: bytes, kind: bytes, path: str = CHAT, seen: list[str] | None = None) -> Any:
    taps = TAPS if seen is None else UsageTaps(anomaly=seen.append)  # one for the whole process
    request = taps.request("POST", path, [])
    assert request is not None
    request.feed(b'{"model":"m"}')
    answer = taps.response(request, 200, [(b"Content-Type", kind)])
    assert answer is not None
    for start in range(0, len(body), PIECE):
        answer.feed(body[start : start + PIECE])
    return answer.finish(True)


def asked(body: bytes, seen: list[str] | None = None) -> tuple[str | None, str | None]:
    taps = UsageTaps(body_fields=("user",), anomaly=(seen if seen is not None else []).append)
    request = taps.request("POST", CHAT, [(b"Content-Type", JSON)])
    assert isinstance(request, RequestReadingTap)
    for start in range(0, len(body), PIECE):
        request.feed(body[start : start + PIECE])
    return request.body.model, request.member("user")


def spent_ns(run: Callable[[], object]) -> int:
    before = time.process_time_ns()
    run()
    return time.process_time_ns() - before


def carried(body: bytes, run: Callable[[], object]) -> None:
    """In place of the way through the sidecar, kernel and all: that costs 1.3 ns a byte where this costs as much."""
    for start in range(0, len(body), PIECE):
        body[start : start + PIECE].translate(SAME).translate(SAME)
    run()


def ratio(run: Callable[[], object], body: bytes) -> float:
    """How much dearer a body is than as much plain text: both are timed in turn, and the quickest of each counts,
    because whatever else runs on the machine can only add to them."""
    dear = text = 1 << 62
    found = float("inf")
    for turn in range(TURNS_MAX):
        text = min(text, spent_ns(lambda: carried(TEXT, lambda: answered(TEXT, JSON))))
        dear = min(dear, spent_ns(lambda: carried(body, run)))
        found = dear / text * len(TEXT) / len(body)
        if turn >= TURNS_MIN and found <= RATIO_MAX:
            break
    return found


@pytest.mark.parametrize("shape", DOCUMENTS)
def test_an_answer_costs_its_length_and_its_usage_is_found(shape: str) -> None:
    body = DOCUMENTS[shape]
    usage = answered(body, JSON)
    assert (usage.input_tokens, usage.output_tokens, usage.usage_state) == (5, 7, "final")
    assert usage.model == "m"
    assert ratio(lambda: answered(body, JSON), body) <= RATIO_MAX


@pytest.mark.parametrize("shape", ["small objects", "scalars", "objects in what is skipped", "escaped names", "quotes"])
def test_a_request_costs_its_length_and_its_members_are_found(shape: str) -> None:
    body = DOCUMENTS[shape][:-1] + b',"user":"me"}'
    assert asked(body) == ("m", "me")
    assert ratio(lambda: asked(body), body) <= RATIO_MAX


@pytest.mark.parametrize("shape", STREAMS)
def test_a_stream_costs_its_length_and_its_end_is_read(shape: str) -> None:
    last = b'\n\ndata: {"id":"r","model":"m","choices":[],' + USAGE + b"}\n\ndata: [DONE]\n\n"
    body = STREAMS[shape] + last
    usage = answered(body, SSE)
    assert (usage.input_tokens, usage.output_tokens, usage.usage_state) == (5, 7, "final")
    assert ratio(lambda: answered(body, SSE), body) <= RATIO_MAX


def test_what_was_left_unread_is_counted() -> None:
    seen: list[str] = []
    answered(DOCUMENTS["small objects"], JSON, seen=seen)
    assert seen == ["document_too_busy"]
    seen.clear()
    asked(DOCUMENTS["small objects"], seen)
    assert seen == ["request_too_busy"]
    seen.clear()
    answered(STREAMS["usage"], SSE, seen=seen)
    assert seen.count("stream_too_busy") == 1


def test_usage_that_stood_in_the_middle_is_said_to_be_missing() -> None:
    body = members_of(b'"x":{"a":1},').replace(USAGE, b'"z":1')
    body = body[: len(body) // 2].rpartition(b',"x"')[0] + b"," + USAGE + b"," + filled(b'"x":{"a":1},') + b'"z":1}'
    usage = answered(body, JSON)
    assert usage.usage_state == "absent"
    assert "not all was read" in usage.reason


def test_a_busy_answer_that_was_cut_off_proves_nothing() -> None:
    taps = UsageTaps()
    request = taps.request("POST", CHAT, [])
    assert request is not None
    answer = taps.response(request, 200, [(b"Content-Type", JSON)])
    assert answer is not None
    answer.feed(b'{"model":"m","choices":[],' + filled(b'"x":{"a":1},', 200_000) + b'"inner":{"a":1,' + USAGE + b"}")
    usage = answer.finish(False)
    assert usage is not None
    assert usage.usage_state == "absent"


WANTED: Tree = {
    "usage": True,
    "id": True,
    "choices": [{"finish_reason": True, "usage": True}],
    "response": {"usage": True, "id": True},
}
TEXTS = st.text(st.sampled_from('ab"\\{}[],:é\n'), max_size=9)
SCALARS = st.none() | st.booleans() | st.integers(-(2**53), 2**53) | TEXTS
INNER = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["usage", "id", "a", 'q"']), inner, max_size=3)
    ),
    max_leaves=8,
)
NAMES = st.sampled_from(["usage", "id", "choices", "response", "b", 'c"', "\\"])
MEMBERS = st.lists(st.tuples(NAMES, INNER), max_size=8)
FLOODS = st.sampled_from([b'"x":{"a":1},', b'"x":"{[\\"",', b'"x":[],'])


def prune(value: Any, tree: Any) -> Any:
    """What should be left of a document without lists of objects."""
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


def written(members: list[tuple[str, Any]]) -> bytes:
    """A document in which names may stand again."""
    return ("{" + ",".join(f"{json.dumps(key)}:{json.dumps(value)}" for key, value in members) + "}").encode()


@settings(deadline=None)
@given(members=MEMBERS, cuts=st.lists(st.integers(0, 5_000), max_size=6))
def test_with_names_that_stand_again_the_same_as_a_whole_parse(members: list[tuple[str, Any]], cuts: list[int]) -> None:
    data = written(members)
    places = sorted(cut % (len(data) + 1) for cut in cuts)
    scanned = Members(WANTED)
    for start, stop in zip([0, *places], [*places, len(data)], strict=True):
        scanned.feed(data[start:stop])
    whole = prune(json.loads(data), WANTED)
    if any(key in ("choices", "response") for key, _ in members):
        # A name that stands again with another kind of value keeps what it was as long as nothing of it is wanted.
        whole = {key: value for key, value in whole.items() if key in ("usage", "id")}
        assert {key: scanned.document.get(key) for key in whole} == whole
    else:
        assert scanned.document == whole
    assert scanned.done


@settings(deadline=None)
@given(members=MEMBERS, flood=FLOODS, at=st.integers(0, 70_000))
def test_the_members_behind_a_flood_are_those_of_a_whole_parse(
    members: list[tuple[str, Any]], flood: bytes, at: int
) -> None:
    data = b'{"head":1,' + filled(flood, 90_000) + b'"y":0,' + written([*members, ("id", "r")])[1:]
    scanned = Members(WANTED, steps=16)
    scanned.feed(data[:at])
    scanned.feed(data[at:])
    assert scanned.busy
    whole = json.loads(data)
    found = scanned.document
    assert scanned.done
    for key in ("usage", "id"):
        assert found.get(key) == whole.get(key)


def test_what_was_open_when_the_reading_stopped_is_read_on() -> None:
    inner = filled(b'{"a":1,"b":"]}"},', 300_000)
    data = b'{"response":{"id":"r","output":[' + inner + b'0],"usage":{"n":1}},"other":{"usage":2},"id":"o"}'
    members = Members(WANTED, steps=16)
    for start in range(0, len(data), 1000):
        members.feed(data[start : start + 1000])
    assert members.busy
    assert members.document == {"response": {"id": "r", "usage": {"n": 1}}, "id": "o"}
    data = b'{"choices":[{"usage":1,"logprobs":[' + inner + b'0],"finish_reason":"stop"},{"finish_reason":"length"}]}'
    members = Members(WANTED, steps=16)
    members.feed(data)
    assert members.document == {"choices": [{"usage": 1, "finish_reason": "stop"}, {"finish_reason": "length"}]}


def test_a_tail_is_cut_anywhere() -> None:
    chance = random.Random(3)
    for _ in range(300):
        text = "".join(chance.choice('\\"{[,:a') for _ in range(chance.randrange(20_000)))
        tail = Tail()
        whole = b'{"x":' + json.dumps([text, {"y": text}]).encode() + b',"id":"r"}'
        for start in range(0, len(whole), 999):
            tail.feed(whole[start : start + 999])
        found = tail.value(())
        assert found is not None
        assert found["id"] == "r"
