"""Frames become messages wherever they are cut, and what is no WebSocket ends the reading within its bounds."""

from __future__ import annotations

import tracemalloc
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from support.wsframes import BINARY, CLOSE, PING, PONG, TEXT, Packer, fragments, frame

from sidecar.model.exchange import Usage
from sidecar.usage.formats.websocket import (
    LOOKS_FREE,
    MESSAGE_MAX_BYTES,
    STEP_MESSAGES,
    UNITS_FREE,
    UNPACKED_MAX_BYTES,
    Inflater,
    MessageReader,
    SessionTap,
    extensions,
    is_websocket,
)
from sidecar.usage.readers import UsageTaps

MASK = b"\x11\xfe\x00\x37"


class Anomalies(list[str]):
    def __call__(self, kind: str) -> None:
        self.append(kind)


def read(
    data: bytes, *, masked: bool = False, inflater: Inflater | None = None, cuts: tuple[int, ...] = ()
) -> tuple[list[bytes | dict[str, Any]], Anomalies]:
    anomalies = Anomalies()
    reader = MessageReader(masked=masked, inflater=inflater, anomaly=anomalies)
    found: list[bytes | dict[str, Any]] = []
    places = sorted({0, *(cut % (len(data) + 1) for cut in cuts), len(data)})
    for start, stop in pairwise(places):
        found += reader.feed(data[start:stop])
    return found, anomalies


@given(
    messages=st.lists(st.binary(max_size=300) | st.integers(0, 70_000).map(lambda n: b"z" * n), max_size=5),
    masked=st.booleans(),
    packed=st.sampled_from([None, True, False]),
    shares=st.lists(st.integers(0, 400), max_size=3),
    cuts=st.lists(st.integers(0, 1 << 20), max_size=8).map(tuple),
)
def test_messages_are_found_wherever_the_bytes_are_cut(
    messages: list[bytes], masked: bool, packed: bool | None, shares: list[int], cuts: tuple[int, ...]
) -> None:
    mask = MASK if masked else None
    pack = Packer(takeover=packed) if packed is not None else None
    wire = b""
    for message in messages:
        payload = pack(message) if pack is not None else message
        places = sorted({0, *(share % (len(payload) + 1) for share in shares), len(payload)})
        pieces = [payload[a:b] for a, b in pairwise(places)] or [b""]
        ping = frame(b"still there?", PING, mask=mask)
        wire += fragments(pieces, mask=mask, reserved=0x40 if pack is not None else 0, between=ping) + ping
    inflater = Inflater(takeover=packed) if packed is not None else None
    found, anomalies = read(wire, masked=masked, inflater=inflater, cuts=cuts)
    assert found == messages
    assert not anomalies


def test_byte_by_byte() -> None:
    wire = frame(b"a" * 70_000, BINARY) + frame(b"b" * 200) + fragments([b"c", b"", b"d"]) + frame(b"")
    reader = MessageReader(masked=False, inflater=None, anomaly=Anomalies())
    found = [message for place in range(len(wire)) for message in reader.feed(wire[place : place + 1])]
    assert found == [b"a" * 70_000, b"b" * 200, b"cd", b""]


@pytest.mark.parametrize(
    "broken",
    [
        pytest.param(frame(b"x", mask=MASK), id="masked where it must not be"),
        pytest.param(frame(b"x", reserved=0x40), id="packed and nobody agreed"),
        pytest.param(frame(b"x", reserved=0x20), id="reserved"),
        pytest.param(frame(b"x", 3), id="unknown kind"),
        pytest.param(frame(b"x", 11), id="unknown control"),
        pytest.param(frame(b"x", 0), id="continues nothing"),
        pytest.param(frame(b"x", final=False) + frame(b"y"), id="begins inside another"),
        pytest.param(frame(b"x", PING, final=False), id="a cut ping"),
        pytest.param(frame(b"x" * 126, PONG), id="a long pong"),
        pytest.param(b"\x81\xff" + b"\xff" * 8, id="a masked length beyond all"),
        pytest.param(b"\x81\x7f" + b"\xff" * 8, id="a length beyond all"),
    ],
)
def test_a_bad_frame_ends_the_reading(broken: bytes) -> None:
    found, anomalies = read(frame(b"before") + broken + frame(b"behind"))
    assert found == [b"before"]
    assert anomalies == ["websocket_frame"]


def test_a_client_that_does_not_mask_is_not_read() -> None:
    assert read(frame(b"x"), masked=True) == ([], ["websocket_frame"])


def test_nothing_comes_behind_the_goodbye() -> None:
    assert read(frame(b"a") + frame(b"\x03\xe8", CLOSE) + frame(b"b")) == ([b"a"], [])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("cut", [False, True])
def test_a_large_message_that_holds_nothing_is_passed_over_and_the_next_one_read(packed: bool, cut: bool) -> None:
    large = b"ab" * (MESSAGE_MAX_BYTES // 2 + 1)
    pack = Packer()
    payloads = [pack(m) for m in (b"one", large, b"two two")] if packed else [b"one", large, b"two two"]
    reserved = 0x40 if packed else 0
    middle = payloads[1]
    pieces = [middle[:1000], middle[1000:]] if cut else [middle]
    first, last = (frame(payload, reserved=reserved) for payload in payloads[::2])
    wire = first + fragments(pieces, reserved=reserved) + last
    found, anomalies = read(wire, inflater=Inflater(takeover=True) if packed else None)
    assert found == [b"one", b"two two"]
    assert not anomalies


def test_the_largest_message_is_read() -> None:
    found, anomalies = read(frame(b"x" * MESSAGE_MAX_BYTES), cuts=(5, 70_000))
    assert [len(message) for message in found] == [MESSAGE_MAX_BYTES]
    assert not anomalies


def test_a_bomb_ends_the_reading_in_bounded_memory() -> None:
    bomb = frame(Packer()(bytes(64 << 20)), reserved=0x40)
    assert len(bomb) < 100_000
    tracemalloc.start()
    try:
        found, anomalies = read(bomb, inflater=Inflater(takeover=True))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (found, anomalies) == ([], ["websocket_too_dense"])
    assert peak < 3 * UNPACKED_MAX_BYTES


def test_many_small_bombs_are_one() -> None:
    pack = Packer(takeover=False)
    wire = frame(pack(bytes(200_000)), reserved=0x40) * 1_000
    found, anomalies = read(wire, inflater=Inflater(takeover=False))
    assert len(found) < 2 * UNPACKED_MAX_BYTES // 200_000
    assert anomalies == ["websocket_too_dense"]


@pytest.mark.parametrize("payload", [b"\xff\xff\xff", b"\x03\x00trailing"])
def test_broken_packing_ends_the_reading(payload: bytes) -> None:
    found, anomalies = read(frame(payload, reserved=0x40) + frame(b"x"), inflater=Inflater(takeover=True))
    assert (found, anomalies) == ([], ["websocket_coding"])


def test_plain_messages_may_stand_between_packed_ones() -> None:
    pack = Packer()
    wire = frame(pack(b"abc"), reserved=0x40) + frame(b"plain") + frame(pack(b"abcabc"), reserved=0x40)
    assert read(wire, inflater=Inflater(takeover=True)) == ([b"abc", b"plain", b"abcabc"], [])


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, frozenset()),
        (b"", frozenset()),
        (b"permessage-deflate", {"permessage-deflate"}),
        (b" permessage-deflate ; server_no_context_takeover; server_max_window_bits=12",
         {"permessage-deflate", "server_no_context_takeover", "server_max_window_bits"}),
        (b"x-webkit-deflate-frame", None),
        (b"permessage-deflate, x-more", None),
    ],
)  # fmt: skip
def test_what_was_agreed_on(value: bytes | None, expected: set[str] | None) -> None:
    assert extensions([] if value is None else [(b"Sec-WebSocket-Extensions", value)]) == expected


def test_only_a_websocket_is_read() -> None:
    taps = UsageTaps()
    assert taps.websocket("/v1/realtime", [(b"Upgrade", b"WebSocket")]) is not None
    assert taps.websocket("/v1/realtime", [(b"Upgrade", b"h2c")]) is None
    assert taps.websocket("/chat", [(b"Upgrade", b"websocket")]) is None
    assert not is_websocket([])


@pytest.mark.parametrize(
    ("path", "provider"),
    [
        ("/ws/google.ai.generativelanguage.v1beta.GenerativeService.BidiGenerateContent?key=k", "gcp.gemini"),
        ("/ws/google.ai.generativelanguage.v1alpha.GenerativeService.BidiGenerateContentConstrained", "gcp.gemini"),
        ("/ws/google.cloud.aiplatform.v1beta1.LlmBidiService/BidiGenerateContent", "gcp.vertex_ai"),
        ("/v1/realtime?model=gpt-realtime", "openai"),
        ("/openai/realtime?deployment=d", "openai"),
        ("/v1/responses", "openai"),
    ],
)
def test_the_paths_of_the_clients(path: str, provider: str) -> None:
    tap = UsageTaps().websocket(path, [(b"Upgrade", b"websocket")])
    assert tap is not None
    lines = (
        b'{"usageMetadata":{"totalTokenCount":1,"promptTokenCount":1}}',
        b'{"type":"response.done","response":{"usage":{"input_tokens":1}}}',
        b'{"type":"response.completed","response":{"usage":{"input_tokens":1}}}',
    )
    (usage,) = tap.from_server(b"".join(map(frame, lines)))
    assert usage.provider == provider


@given(st.binary(max_size=400), st.booleans(), st.booleans(), st.lists(st.integers(0, 400), max_size=3).map(tuple))
@example(b"\xc1\x00", False, True, ())
def test_fuzz_any_bytes_are_endured(data: bytes, masked: bool, packed: bool, cuts: tuple[int, ...]) -> None:
    anomalies: tuple[Anomalies, ...] = ()
    for wire in (data, frame(data, TEXT, mask=MASK if masked else None, reserved=0x40 if packed else 0)):
        anomalies += (read(wire, masked=masked, inflater=Inflater(takeover=True) if packed else None, cuts=cuts)[1],)
    assert all(len(kinds) <= 1 for kinds in anomalies)


DONE = (
    b'{"type":"response.done","response":{"id":"resp_%d","status":"completed",'
    b'"usage":{"input_tokens":%d,"output_tokens":1,"total_tokens":%d}}}'
)
DELTA = b'{"type":"response.output_text.delta","event_id":"event_%d","delta":"word"}'
LIVE = b'{"usageMetadata":{"promptTokenCount":1,"responseTokenCount":2,"totalTokenCount":3}}'


def tapped(path: str, anomalies: Anomalies | None = None) -> SessionTap:
    tap = UsageTaps(anomaly=Anomalies() if anomalies is None else anomalies).websocket(
        path, [(b"Upgrade", b"websocket")]
    )
    assert tap is not None
    return tap


def fed(path: str, wire: bytes, cuts: Sequence[int] = ()) -> tuple[list[Usage], Anomalies]:
    """All usages of what the server says, each step's worth taken; and how many steps it took at most for a piece."""
    anomalies = Anomalies()
    tap = tapped(path, anomalies)
    found: list[Usage] = []
    places = sorted({0, *(cut % (len(wire) + 1) for cut in cuts), len(wire)})
    for start, stop in pairwise(places):
        found += tap.from_server(wire[start:stop])
        while tap.behind:
            found += tap.from_server(b"")
    return found, anomalies


@given(
    kinds=st.lists(st.sampled_from(["done", "delta", "ping", "sound", "fragments", "large"]), min_size=1, max_size=60),
    times=st.integers(1, 8),
    cuts=st.lists(st.integers(0, 1 << 22), max_size=8),
)
def test_of_a_real_session_nothing_is_lost_however_it_comes(kinds: list[str], times: int, cuts: list[int]) -> None:
    wire = b""
    for number, kind in enumerate(kinds * times):
        if kind == "done":
            wire += frame(DONE % (number, number, number + 1))
        elif kind == "fragments":
            said = DONE % (number, number, number + 1)
            wire += fragments([said[:-1] + b" " * 1_000, said[-1:] + b" " * 1_000], between=frame(b"", PING))
        elif kind == "large":
            wire += frame(b'{"type":"response.done","pad":"' + b"x" * 70_000 + b'",' + (DONE % (number, number, 0))[1:])
        else:
            payload = DELTA % number if kind == "delta" else b"" if kind == "ping" else b"\x00" * 900
            wire += frame(payload, {"delta": TEXT, "ping": PING, "sound": BINARY}[kind])
    found, anomalies = fed("/v1/realtime", wire, cuts)
    expected = [n for n, kind in enumerate(kinds * times) if kind in ("done", "fragments", "large")]
    assert [usage.input_tokens for usage in found] == expected
    assert not anomalies


@pytest.mark.parametrize("size", [70, 1_000, 65_536, 1 << 30])
def test_a_long_session_of_the_smallest_messages_counts_to_its_end(size: int) -> None:
    wire = b"".join(frame(DELTA % number) * 8 + frame(LIVE) for number in range(5_000))
    found, anomalies = fed("/ws/x.BidiGenerateContent", wire, tuple(range(0, len(wire), size)))
    assert len(found) == 5_000
    assert not anomalies


def test_of_many_that_count_a_step_is_given_out_and_the_rest_waits() -> None:
    tap = tapped("/v1/realtime")
    wire = b"".join(frame(DONE % (number, number, number)) for number in range(3 * STEP_MESSAGES))
    given_out = [len(tap.from_server(wire[:-5]))]
    while tap.behind:
        given_out.append(len(tap.from_server(b"")))
    assert given_out == [STEP_MESSAGES, STEP_MESSAGES, STEP_MESSAGES - 1]
    assert [usage.input_tokens for usage in tap.from_server(wire[-5:])] == [3 * STEP_MESSAGES - 1]
    assert not tap.behind


@pytest.mark.parametrize("unit", [frame(b""), frame(b"", PING), frame(b"", 0, final=False), frame(b"x")])
def test_more_frames_than_any_session_has_end_the_reading(unit: bytes) -> None:
    start = frame(b"x", final=False) if unit[0] == 0 else b""
    found, anomalies = fed("/v1/realtime", start + unit * (4 * UNITS_FREE) + frame(DONE % (1, 1, 1)))
    assert (found, anomalies) == ([], ["websocket_too_busy"])


def test_what_a_client_says_beyond_its_ration_is_left_unread_and_the_rest_goes_on() -> None:
    anomalies = Anomalies()
    tap = tapped("/v1/realtime?model=asked", anomalies)
    unread = frame(b'{"type":"session.update","session":{"model":"unread"}}', mask=MASK)
    tap.from_client(frame(b"x" * 60, mask=MASK) * (LOOKS_FREE + 600) + unread)
    assert anomalies == ["websocket_too_busy"]
    tap.from_client(frame(b"\0" * 60_000, BINARY, mask=MASK))
    tap.from_client(frame(b'{"type":"session.update","session":{"model":"new"}}', mask=MASK))
    (usage,) = tap.from_server(frame(DONE % (1, 1, 1)))
    assert usage.request_model == "new"
    assert anomalies == ["websocket_too_busy"]


@given(
    sizes=st.lists(st.integers(0, 200) | st.integers(3_900, 4_300) | st.integers(65_400, 65_700), max_size=12),
    mask=st.binary(min_size=4, max_size=4),
    behind=st.integers(0, 4_200),
    cuts=st.lists(st.integers(0, 1 << 20), max_size=5),
)
def test_what_a_client_says_is_found_under_any_mask(
    sizes: list[int], mask: bytes, behind: int, cuts: list[int]
) -> None:
    tap = tapped("/v1/realtime")
    wire = b"".join(frame(b"s" * size, BINARY, mask=mask) for size in sizes)
    said = b'{"pad":"' + b"e" * behind + b'","type":"session.update","session":{"model":"new"}}'
    wire += frame(said, mask=mask) + frame(b"", PING, mask=mask)
    places = sorted({0, *(cut % (len(wire) + 1) for cut in cuts), len(wire)})
    for start, stop in pairwise(places):
        tap.from_client(wire[start:stop])
    (usage,) = tap.from_server(frame(DONE % (1, 1, 1)))
    assert usage.request_model == "new"
