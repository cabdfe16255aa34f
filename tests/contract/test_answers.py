"""Success is the vendor's yes: each backend against its stand-in telling lies, and the table against answers by hand.

A lie is a 2xx of somebody who took nothing: a login page, a proxy, an error under 200, a count that is short. A yes
must still be one in all the ways in which a vendor may word it.
"""

from __future__ import annotations

import asyncio
import gzip
import ssl
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from time import perf_counter
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.backend_fixtures import (
    Cut,
    Request,
    Script,
    ScriptedServer,
    answer,
    kinds_of,
    listening,
    record,
    records,
    vendor_yes,
)
from support.backend_trials import HTTP_TRIALS, PATHS, RECEIVED, TRIALS, at_a_server, build, receiving

from sidecar.backends.answers import ANSWERS, said_yes
from sidecar.backends.http import Answer
from sidecar.cli.connect import _reach_backend, _try
from sidecar.dev.mock_backends import Do, Fault, Lie
from sidecar.meters.definition import DEFAULT_METERS
from sidecar.model.delivery import (
    KEY_MISMATCH,
    Blocked,
    Delivered,
    Duplicate,
    Event,
    Refused,
    Retry,
    Sealed,
    Unknown,
    Verdict,
)

UNEXPECTED = Blocked("unexpected_answer")
IDS = [f"0199aaaa-0000-7000-8000-{number:012d}" for number in range(1, 6)]


def sealed_of(count: int = 1) -> Sealed:
    return Sealed(key="the-key-of-this", events=tuple(Event(one, one) for one in IDS[:count]), body=b"[]")


def judged(row: str, body: Any, status: int = 200, *, count: int = 1, kind: str = "application/json") -> Any:
    """What the table says of one answer; bytes go as they are."""
    data = body if isinstance(body, bytes) else orjson.dumps(body)
    return said_yes(Answer(status, {"content-type": kind}, data), sealed_of(count), ANSWERS[row])


# Every backend, every lie


@pytest.mark.parametrize("lie", list(Lie))
@pytest.mark.parametrize("trial_name", RECEIVED)
async def test_no_lie_is_a_delivery(trial_name: str, lie: Lie, tmp_path: Path) -> None:
    trial = TRIALS[trial_name]
    async with receiving(trial.backend) as receiver:
        backend = build(trial_name, tmp_path, receiver.url + PATHS.get(trial_name, ""))
        await backend.send(backend.encode([record(50)]).sealed[0])  # opens a session where there is one
        before = len(receiver.billed(trial.backend))
        sealed = backend.encode(records(3)).sealed[0]
        receiver.faults.set(Fault(do=Do.LIE, lie=lie, path=sealed.path.partition("?")[0] or None))
        verdicts = await backend.send(sealed)
        assert len(receiver.billed(trial.backend)) == before
        if lie is Lie.WRONG_SHAPE and trial_name == "webhook":
            assert set(kinds_of(verdicts)) == {"Delivered"}, "a body is no part of that contract"
        elif lie in (Lie.HTML, Lie.LOGIN, Lie.PROXY, Lie.PACKED, Lie.WRONG_SHAPE):
            assert verdicts == [UNEXPECTED] * len(sealed.events)
        else:
            assert set(kinds_of(verdicts)) <= {"Unknown", "Blocked"}
        receiver.faults.set()
        assert set(kinds_of(await backend.send(sealed))) == {"Delivered"}
        await backend.aclose()


@pytest.mark.parametrize("trial_name", HTTP_TRIALS)
async def test_what_is_no_yes_at_any_of_them(trial_name: str, tmp_path: Path) -> None:
    foreign = UNEXPECTED if trial_name != "webhook" else Delivered()
    async with at_a_server(trial_name, tmp_path) as (server, backend):
        sealed = backend.encode(records(1)).sealed[0]
        for body, verdict in (
            (b"null", foreign),
            (b'"ok"', foreign),
            (b"[]", foreign),
            (b"17", foreign),
            (b"true", foreign),
            (b"ok", foreign),
            (b"thank you", foreign),
            (b"false", Unknown("said_no")),
            (b'"failed"', Unknown("said_error")),
            (b'{"error": {"code": "x"}, "success": false}', Unknown("said_error")),
            (b'{"errors": true}', Unknown("said_error")),
            (b'{"Error-Code": 17}', Unknown("said_error")),
            (b'{"success": 0, "failed": 1}', Unknown("said_fewer")),
            (b'{"Success": false}', Unknown("said_no")),
            (b'{"accepted": 0}', Unknown("said_fewer")),
            (b'{"data": {"failed": 2}}', Unknown("said_failed")),
            (b'{"status": "FAILED"}', Unknown("said_failed")),
            (b'{"statusCode": 503}', Unknown("said_error")),
            (b'{"accepted": 99}', Unknown("counts_differ")),
            (b'{"status": "que', Unknown("cut_answer")),
            (b"\n <!-- x --><p>hello", UNEXPECTED),
            (b"<HTML><BODY>", UNEXPECTED),
            (gzip.compress(b"{}"), UNEXPECTED),
        ):
            server.says(answer(200, body))
            verdicts = await backend.send(sealed)
            if trial_name.startswith("openmeter") and verdict == Delivered():
                continue
            assert verdicts == [verdict] * len(sealed.events), body
        for status in (203, 205, 206, 207, 226):
            server.script = under_another_status(status)
            assert set(kinds_of(await backend.send(sealed))) == {"Unknown"}, status
        server.script = vendor_yes
        assert set(kinds_of(await backend.send(sealed))) == {"Delivered"}


def renumbered(reply: bytes, status: int) -> bytes:
    head, _, rest = reply.partition(b"\r\n")
    return b"HTTP/1.1 %d Reason\r\n" % status + rest if head else b""


def under_another_status(status: int) -> Script:
    return lambda request: renumbered(vendor_yes(request), status)


@pytest.mark.parametrize(
    ("trial_name", "empty"),
    [("meter", "Delivered"), ("webhook", "Delivered"), ("revenium-meter", "Unknown"), ("revenium-events", "Unknown"),
     ("revenium-completions", "Unknown"), ("ledgerbee", "Unknown"), ("stripe-v1", "Unknown"), ("stripe-v2", "Unknown"),
     ("flexprice", "Unknown"), ("lago", "Unknown"), ("openmeter", "Delivered")],
)  # fmt: skip
async def test_a_bare_2xx_counts_only_where_no_body_is_promised(trial_name: str, empty: str, tmp_path: Path) -> None:
    async with at_a_server(trial_name, tmp_path) as (server, backend):
        sealed = backend.encode(records(1)).sealed[0]
        for reply in (answer(204, b""), answer(202, b""), answer(202, b" \r\n")):
            server.says(reply)
            assert set(kinds_of(await backend.send(sealed))) == {empty}
        server.script = lambda _: answer(200, b"")
        expected = "Unknown" if trial_name == "openmeter" else empty
        assert set(kinds_of(await backend.send(sealed))) == {expected}


@pytest.mark.parametrize("trial_name", HTTP_TRIALS)
async def test_a_trickled_body_ends_with_the_time_limit(trial_name: str, tmp_path: Path) -> None:
    """The head comes at once, the body a byte at a time: it is over when the limit is, and nobody knows."""

    async def trickle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
        while True:
            writer.write(b" ")
            await writer.drain()
            await asyncio.sleep(0.02)

    async with listening(trickle) as port:
        backend: Any = build(trial_name, tmp_path, f"http://127.0.0.1:{port}")
        # Enough to connect on a machine that is busy: a connection that is not made in time has sent nothing.
        backend._client.timeout_s = backend._client.connect_timeout_s = 1.0
        try:
            sealed = backend.encode(records(1)).sealed[0]
            assert await backend.send(sealed) == [Unknown("timeout")] * len(sealed.events)
        finally:
            await backend.aclose()


# The table, by hand


@pytest.mark.parametrize(
    ("row", "body", "status", "kind"),
    [
        ("meter", {"accepted": 1}, 200, "application/json"),
        ("meter", {"accepted": 1, "errors": [], "failed": 0, "error": None, "more": {"x": 1}}, 202, "Application/JSON"),
        ("meter", {"status": "ok", "success": True}, 201, "text/html; charset=UTF-8"),
        ("meter", b"\xef\xbb\xbf {} \n", 200, ""),
        ("meter", {"inserted": 0, "accepted": 1, "duplicates": 1}, 200, "application/json"),
        ("revenium v1 /meter", {}, 200, "application/json;charset=ISO-8859-1"),
        ("revenium v1 /meter", {"id": "x", "anything": []}, 202, "application/hal+json"),
        ("revenium v1 /event, /meter/rate, /meter/ingest", b"", 201, ""),
        ("revenium v2", {"id": "x", "_links": {"self": {"href": "/"}}}, 201, "application/json"),
        ("revenium v2", {"resourceType": "METERING"}, 200, "application/json"),
        ("ledgerbee", {"status": "queued", "requestId": "r"}, 202, "application/json"),
        ("ledgerbee", {"status": "queued"}, 200, "application/json"),
        ("stripe v1", {"object": "billing.meter_event", "livemode": False, "payload": {"value": "0"}}, 200, ""),
        ("stripe v1", {"identifier": IDS[0]}, 200, "application/json"),
        ("stripe v2", {"object": "v2.billing.meter_event", "identifier": IDS[0]}, 200, "application/json"),
        ("stripe stream", {}, 200, "application/json"),
        ("flexprice", {"message": "Event accepted for processing", "event_id": "e"}, 202, "application/json"),
        ("flexprice", {"message": "ok", "event_ids": [IDS[0]]}, 200, "application/json"),
        ("openmeter", b"", 204, ""),
        ("openmeter", {}, 202, "application/json"),
        ("lago", {"events": [{"transaction_id": IDS[0], "properties": {"error": "7", "failed": 3}}]}, 200, ""),
        ("lago", {"events": [{"lago_id": "x"}]}, 200, "application/json"),
        ("webhook", b"ok", 200, "text/html; charset=utf-8"),
        ("webhook", b"null", 200, "application/json"),
        ("webhook", {"received": True}, 200, "application/json"),
        ("webhook", {"success": 1, "count": 812, "queued": 0}, 200, "application/json"),
        ("webhook", [], 200, "application/json"),
    ],
)
def test_a_legitimate_yes_in_each_wording(row: str, body: Any, status: int, kind: str) -> None:
    assert judged(row, body, status, kind=kind) in (Delivered(), [Delivered()])


@pytest.mark.parametrize(
    ("row", "body", "verdict"),
    [
        ("revenium v2", {}, UNEXPECTED),
        ("revenium v2", {"id": "x", "resourceType": "login"}, UNEXPECTED),
        ("ledgerbee", {"requestId": "r"}, UNEXPECTED),
        ("ledgerbee", {"status": "what"}, UNEXPECTED),
        ("ledgerbee", {"status": "duplicate", "idempotencyKey": "the-key-of-this"}, Duplicate()),
        ("ledgerbee", {"status": "Duplicate"}, Duplicate()),
        ("ledgerbee", {"status": "duplicate", "idempotencyKey": "another"}, Unknown("others_answer")),
        ("stripe v1", {}, UNEXPECTED),
        ("stripe v1", {"object": "billing.meter"}, UNEXPECTED),
        ("stripe v1", {"object": "billing.meter_event", "identifier": "another"}, Unknown("others_answer")),
        ("stripe v2", {"object": "billing.meter_event"}, UNEXPECTED),
        ("flexprice", {}, UNEXPECTED),
        ("flexprice", {"code": "validation_error", "message": "x", "http_status_code": 400}, Unknown("said_error")),
        ("flexprice", {"message": "ok", "event_ids": ["a", "b"]}, Unknown("counts_differ")),
        ("lago", {}, UNEXPECTED),
        ("lago", {"events": {}}, UNEXPECTED),
        ("lago", {"events": [{"transaction_id": "another"}]}, Unknown("others_answer")),
        ("lago", {"events": []}, Unknown("said_fewer")),
        ("lago", {"events": [{}, {}]}, Unknown("counts_differ")),
        ("meter", {"accepted": 0, "duplicates": 1}, Duplicate()),
        ("webhook", b"Error: disk full", Unknown("said_error")),
        ("webhook", b"FAILED", Unknown("said_error")),
        ("webhook", {"ok": False}, Unknown("said_no")),
        ("webhook", b'{"ok": tr', Unknown("cut_answer")),
        ("webhook", b"<html>ok</html>", UNEXPECTED),
    ],
)
def test_what_one_contract_does_not_say(row: str, body: Any, verdict: Verdict) -> None:
    assert judged(row, body) == verdict


def test_html_was_certainly_not_taken_and_another_form_perhaps() -> None:
    assert not judged("revenium v1 /meter", b"<html>").maybe_taken
    assert judged("revenium v1 /meter", []).maybe_taken


@pytest.mark.parametrize(
    ("body", "kinds"),
    [
        ({"accepted": 2, "errors": [{"index": 1, "status": 422}]}, ["Delivered", "Refused", "Delivered"]),
        ({"rejected": 1, "errors": [{"index": 0, "status": 422}]}, ["Refused", "Delivered", "Delivered"]),
        ({"success": 2, "failed": 1, "errors": [{"i": 2, "code": "bad"}]}, ["Delivered", "Delivered", "Refused"]),
        ({"accepted": 1, "errors": {"0": {"status": 503}, "2": {"status": 400}}}, ["Retry", "Delivered", "Refused"]),
        ({"failed": [{"id": IDS[0], "error": {"code": "no_customer"}}]}, ["Refused", "Unknown", "Unknown"]),
        ({"accepted": 1, "errors": [{"index": 1, "status": 422}]}, ["Unknown", "Refused", "Unknown"]),
        ({"results": [{"status": "ok"}, {"status": "error"}, {"status": 201}]}, ["Delivered", "Refused", "Delivered"]),
        ({"items": [{"id": IDS[2], "status": 200}, {"id": IDS[0], "status": 429}, {"id": IDS[1], "code": "duplicate"}]},
         ["Retry", "Duplicate", "Delivered"]),
        ([{"status": 200}, {"status": 200}, {"status": 500}], ["Delivered", "Delivered", "Retry"]),
        ({"data": {"failures": [{"index": 0}], "accepted": 2}}, ["Refused", "Delivered", "Delivered"]),
        ({"errors": [{"index": 7, "status": 422}]}, ["Unknown"]),
        ({"errors": [{"id": "another"}]}, ["Unknown"]),
        ({"errors": [{"index": True}]}, ["Unknown"]),
        ({"errors": ["bad"]}, ["Unknown"]),
        ({"results": [{"status": "ok"}]}, ["Delivered"]),
    ],
)  # fmt: skip
def test_an_event_that_is_named_has_its_own_verdict(body: Any, kinds: Sequence[str]) -> None:
    found = judged("meter", body, 207 if kinds != ["Delivered"] else 200, count=3)
    assert kinds_of(found if isinstance(found, list) else [found]) == list(kinds)
    if "code" in orjson.dumps(body).decode() and isinstance(found, list):
        assert any(getattr(v, "reason", "") in ("bad", "no_customer", "http_429") for v in found)


anything = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.floats(allow_nan=False) | st.text(max_size=8)
    | st.sampled_from(["ok", "error", "duplicate", "queued", "billing.meter_event", "metering", *IDS]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(
        st.sampled_from(["error", "errors", "results", "index", "i", "id", "status", "code", "accepted", "failed",
                         "success", "events", "data", "duplicates", "message", "0", "transaction_id", "object"])
        | st.text(max_size=5), inner, max_size=5),
    max_leaves=12,
)  # fmt: skip


@settings(max_examples=300)
@given(anything, st.sampled_from(sorted(ANSWERS)), st.sampled_from([200, 202, 203, 204, 207]), st.integers(1, 4))
def test_whatever_an_answer_holds_there_is_a_verdict_for_each_event(
    body: Any, row: str, status: int, count: int
) -> None:
    for data in (orjson.dumps(body), orjson.dumps(body)[:-1]):
        found = judged(row, data, status, count=count)
        each = found if isinstance(found, list) else [found] * count
        assert len(each) == count
        assert all(len(getattr(verdict, "reason", "")) <= 64 for verdict in each), "a word or a code, never a text"
        if data and not isinstance(body, dict) and row != "webhook":
            assert not any(isinstance(verdict, Delivered | Duplicate) for verdict in each) or isinstance(body, list)
        if isinstance(body, dict) and body.get("error") is True and data == orjson.dumps(body):
            assert not any(isinstance(verdict, Delivered) for verdict in each) or isinstance(found, list)


def test_an_index_of_any_length_is_no_fault_of_ours() -> None:
    assert judged("meter", {"errors": {"9" * 5000: {"code": "bad"}}}, count=2) == Unknown("said_error")


def test_a_large_batch_is_judged_in_a_moment() -> None:
    """By rows and ids: twice the events may take four times as long, not sixteen."""
    took = []
    for count in (2_000, 4_000):
        sealed = Sealed(key="k", events=tuple(Event(f"r{n}", f"e{n}") for n in range(count)), body=b"")
        rows = orjson.dumps({"results": [{"id": f"r{n}", "status": 200 if n else 422} for n in range(count)]})
        times = []
        found: Verdict | list[Verdict] = []
        for _ in range(3):
            began = perf_counter()
            found = said_yes(Answer(200, {}, rows), sealed, ANSWERS["meter"])
            times.append(perf_counter() - began)
        took.append(min(times))
        assert isinstance(found, list)
        assert found[0] == Refused("http_422")
        assert found[1:] == [Delivered()] * (count - 1)
    assert took[1] < 8 * took[0]


def test_lago_names_what_it_took() -> None:
    found = judged("lago", {"events": [{"transaction_id": IDS[0]}, {"transaction_id": IDS[2]}]}, count=3)
    assert found == [Delivered(), Unknown("said_fewer"), Delivered()]


# Refusals that are about the key


@pytest.mark.parametrize("trial_name", ["meter", "webhook", "ledgerbee", "revenium-events", "revenium-completions"])
async def test_a_refusal_that_names_the_key_is_told_apart(trial_name: str, tmp_path: Path) -> None:
    mismatch: Mapping[str, Any] = {"code": "IDEMPOTENCY_KEY_REUSED", "message": "used with another body"}
    async with at_a_server(trial_name, tmp_path) as (server, backend):
        sealed = backend.encode(records(1)).sealed[0]
        for reply, verdict in (
            (answer(409, b""), Refused(KEY_MISMATCH)),
            (answer(409, orjson.dumps(mismatch)), Refused(KEY_MISMATCH)),
            (answer(422, orjson.dumps(mismatch)), Refused(KEY_MISMATCH)),
            (answer(422, b'{"title": "Idempotency-Key is already used"}'), Refused(KEY_MISMATCH)),
            (answer(409, b"", Retry_After="1"), Retry("http_409", 1.0)),
            (answer(409, b'{"code": "idempotency_key_in_progress"}'), Retry("http_409")),
            (answer(422, b'{"message": "no such field"}'), Refused("http_422")),
            (answer(422, b'{"message": "Idempotency-Key is required"}'), Refused("http_422")),
            (answer(422, b'{"item": {"requestHeaders": ["Idempotency-Key"]}}'), Refused("http_422")),
        ):
            server.says(reply)
            assert await backend.send(sealed) == [verdict], reply


@pytest.mark.parametrize("trial_name", ["meter", "webhook", "revenium-meter", "revenium-completions"])
async def test_a_refusal_of_what_is_there_already_is_never_sent_under_another_key(
    trial_name: str, tmp_path: Path
) -> None:
    """A receiver that knows the request again, and says so by a refusal and in words of its own."""
    async with at_a_server(trial_name, tmp_path) as (server, backend):
        sealed = backend.encode(records(2)).sealed[0]
        for status in (400, 409, 412, 422):
            for body in (
                b'{"error": "duplicate event"}',
                b'{"error": {"code": "DUPLICATE_REQUEST"}}',
                b'{"message": "this batch was already processed"}',
                b'{"errors": [{"code": "already_exists"}]}',
                b'{"errors": ["Duplicate"]}',
                b'"already received"',
                b"already received",
                b"this event has already been processed",
            ):
                server.says(answer(status, body))
                assert await backend.send(sealed) == [Refused(KEY_MISMATCH)] * len(sealed.events), (status, body)
        server.says(answer(400, b'{"message": "the meter is already archived"}'))
        assert await backend.send(sealed) == [Refused("http_400")] * len(sealed.events)


@pytest.mark.parametrize("trial_name", ["flexprice", "openmeter"])
async def test_where_events_have_ids_a_refusal_of_a_batch_is_cut_whatever_it_says(
    trial_name: str, tmp_path: Path
) -> None:
    async with at_a_server(trial_name, tmp_path) as (server, backend):
        sealed = backend.encode(records(2)).sealed[0]
        server.says(answer(409, b'{"message": "already there"}'))
        assert await backend.send(sealed) == [Refused("http_409")] * 2


async def test_stripes_idempotency_error_and_a_repeat_of_somebody_else(tmp_path: Path) -> None:
    async with at_a_server("stripe-v1", tmp_path) as (server, backend):
        sealed = backend.encode(records(1)).sealed[0]
        ours = sealed.events[0].event_id
        for error, verdict in (
            ({"type": "idempotency_error", "message": "Keys for idempotent requests …"}, Refused(KEY_MISMATCH)),
            ({"message": f"An event already exists with identifier {ours}."}, Duplicate()),
            ({"message": f"identifier '{ours}' already exists"}, Duplicate()),
            ({"message": "An event already exists with this identifier"}, Duplicate()),
            ({"message": "An event already exists with identifier 0199aaaa-other:x."}, Unknown("others_answer")),
        ):
            server.says(answer(400, orjson.dumps({"error": error})))
            assert await backend.send(sealed) == [verdict], error


# Questions that are no deliveries


async def test_a_page_is_neither_a_meter_that_was_made_nor_a_backend_that_is_well(tmp_path: Path) -> None:
    async with ScriptedServer(script=lambda _: answer(200, b"<html>sign in</html>")).running() as server:
        for trial_name in ("stripe-v1", "flexprice"):
            backend: Any = build(trial_name, tmp_path, server.url)
            told = await backend.provision(DEFAULT_METERS[0])
            assert not told.fits
            server.script = lambda request: answer(200, b"<html>" if request.method == "POST" else b'{"data": []}')
            assert "did not create" in (await backend.provision(DEFAULT_METERS[0])).text
            server.script = lambda _: answer(200, b"<html>sign in</html>")
            await backend.aclose()
        bee: Any = build("ledgerbee", tmp_path, server.url)
        assert ["something else than its API" in problem for problem in await bee.examine()] == [True]
        await bee.aclose()


# What is certainly not taken, though bytes have left


def says(data: bytes, *, tls: ssl.SSLContext | None = None, at_once: bool = False) -> AbstractAsyncContextManager[int]:
    """A port of something else: answers so to whatever comes, and closes."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if not at_once:
            await reader.read(1)
        writer.write(data)
        await writer.drain()
        if at_once:
            await reader.read(100)

    return listening(serve, tls)


def a_certificate() -> ssl.SSLContext:
    trustme = pytest.importorskip("trustme")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert("127.0.0.1").configure_cert(context)
    return context


NOT_HTTP = {
    "ssh": b"SSH-2.0-OpenSSH_9.6\r\n", "smtp": b"220 mail ready\r\n", "tls alert": b"\x15\x03\x01\x00\x02\x02F",
    "page": b"<html>hello</html>", "redis": b"-ERR unknown command 'POST'\r\n", "nearly": b"HTTQ/1.1 200 OK\r\n\r\n",
}  # fmt: skip


@pytest.mark.parametrize("what", NOT_HTTP)
@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("trial_name", ["revenium-meter", "openmeter-forgetful", "meter"])
async def test_a_port_of_another_protocol_took_nothing(
    trial_name: str, at_once: bool, what: str, tmp_path: Path
) -> None:
    async with says(NOT_HTTP[what], at_once=at_once) as port:
        backend = build(trial_name, tmp_path, f"http://127.0.0.1:{port}")
        assert await backend.send(backend.encode(records(1)).sealed[0]) == [Retry("not_http")]
        await backend.aclose()


@pytest.mark.parametrize("trial_name", ["revenium-meter", "openmeter-forgetful", "meter"])
async def test_a_port_that_speaks_tls_took_nothing_that_was_sent_plainly(trial_name: str, tmp_path: Path) -> None:
    async with says(b"", tls=a_certificate()) as port:
        backend = build(trial_name, tmp_path, f"http://127.0.0.1:{port}")
        assert await backend.send(backend.encode(records(1)).sealed[0]) == [Retry("tls")]
        await backend.aclose()
    async with ScriptedServer().running() as server:
        for text in (
            b"<html>400 The plain HTTP request was sent to HTTPS port</html>",
            b"Client sent an HTTP request to an HTTPS server.\n",
        ):
            server.says(answer(400, text))
            backend = build(trial_name, tmp_path, server.url)
            assert await backend.send(backend.encode(records(1)).sealed[0]) == [Retry("tls")]
            await backend.aclose()


async def test_who_hangs_up_before_tls_is_agreed_on_took_nothing_and_is_named(tmp_path: Path) -> None:
    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)

    async with listening(hang_up) as port:
        url = f"https://127.0.0.1:{port}"
        backend = build("revenium-meter", tmp_path, url)
        assert await backend.send(backend.encode(records(1)).sealed[0]) == [Retry("reset")]
        await backend.aclose()
        tried = await _try("meter", _reach_backend("meter", url))
    assert tried.detail == "reset: it closed the connection"


async def test_plain_spoken_to_tls_is_a_retry_too(tmp_path: Path) -> None:
    async with says(b"HTTP/1.1 200 OK\r\n\r\n") as port:
        backend = build("revenium-meter", tmp_path, f"https://127.0.0.1:{port}")
        assert await backend.send(backend.encode(records(1)).sealed[0]) == [Retry("tls")]
        await backend.aclose()


@pytest.mark.parametrize(
    "reply", [b"", b"HTTP/1.1 2", b"HTTP/1.1 2x0 OK\r\n\r\n", b"HTTP/1.1 200 OK\r\nbad\x00\r\n\r\n"]
)
async def test_what_may_have_been_read_stays_unknown(reply: bytes, tmp_path: Path) -> None:
    async with says(reply) as port:
        backend = build("revenium-meter", tmp_path, f"http://127.0.0.1:{port}")
        assert kinds_of(await backend.send(backend.encode(records(1)).sealed[0])) == ["Unknown"]
        await backend.aclose()


async def test_garbage_behind_an_answer_in_http_stays_unknown(tmp_path: Path) -> None:
    """The other side has spoken HTTP on this connection, so it may have read the request."""

    def script(request: Request) -> bytes:
        return vendor_yes(request) if len(server.requests) == 1 else Cut(b"oops")

    async with ScriptedServer(script=script).running() as server:
        backend = build("revenium-meter", tmp_path, server.url)
        first, second = backend.encode(records(2)).sealed
        assert await backend.send(first) == [Delivered()]
        assert await backend.send(second) == [Unknown("not_http")]
        assert server.connections == 1
        await backend.aclose()


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        (b"HTTP/1.1 204 No Content\r\n\r\n{}", Delivered()),
        (b"HTTP/1.1 204 No Content\r\nContent-Length: 4\r\n\r\nnull", Delivered()),
        (b"HTTP/1.1 201 Created\r\nContent-Length: 2\r\n\r\n{}}\n", Delivered()),
        (b"HTTP/1.1 401 No\r\nContent-Length: 1\r\n\r\n{}", Blocked("unauthorized")),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n{}", Unknown("cut_answer")),
        (b"HTTP/1.1 103 Early Hints\r\n\r\noops", Unknown("not_http")),
    ],
)
@pytest.mark.parametrize("trial_name", ["revenium-event", "meter"])
async def test_an_answer_with_more_behind_it_than_it_says_is_an_answer(
    trial_name: str, reply: bytes, verdict: object, tmp_path: Path
) -> None:
    """A body behind a 204, one longer than its length: who sends it has read the request, which is not to go again."""
    async with ScriptedServer().running() as server:
        server.says(reply)
        backend = build(trial_name, tmp_path, server.url)
        sealed = backend.encode(records(1)).sealed[0]
        assert await backend.send(sealed) == [verdict]
        server.script = vendor_yes
        assert await backend.send(sealed) == [Delivered()]
        assert server.connections == 2, "a connection with something left on it is used no more"
        await backend.aclose()


async def test_a_connection_that_is_old_is_used_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steady traffic would keep it for ever, whoever has the name by now."""
    async with ScriptedServer(script=vendor_yes).running() as server:
        backend = build("revenium-event", tmp_path, server.url)
        for sealed in backend.encode(records(2)).sealed:
            assert await backend.send(sealed) == [Delivered()]
        assert server.connections == 1
        await backend.aclose()
        monkeypatch.setattr("sidecar.storage.http_client.CONNECTION_AGE_S", 0.0)
        backend = build("revenium-event", tmp_path, server.url)
        requests = backend.encode(records(2)).sealed
        for sealed in requests:
            assert await backend.send(sealed) == [Delivered()]
        assert server.connections == 1 + len(requests)
        await backend.aclose()
