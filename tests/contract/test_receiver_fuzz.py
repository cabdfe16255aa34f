"""Whatever is sent to the receiver gets an answer of the vendor's, never a fault of ours."""

from __future__ import annotations

import asyncio
import copy
import json
from typing import Any
from urllib.parse import urlencode

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from multidict import CIMultiDict
from support.scripted import running_receiver

from sidecar.dev.mock_backends.contract import Answer, Call, Route, Terms
from sidecar.dev.mock_backends.store import Store
from sidecar.dev.mock_backends.vendors import VENDORS

NOW = "2026-11-20T09:00:00Z"
# One good body for every path that takes one; the fuzzer breaks it in places.
GOOD: dict[str, Any] = {
    "/meter": [{"method": "GET", "responseCode": 200, "requestHeaders": [], "responseHeaders": [], "elements": []}],
    "/meter/v1/api/meter": {
        "method": "GET", "responseCode": 200, "requestHeaders": ["A"], "responseHeaders": [],
        "elements": [{"name": "n", "value": "1"}], "application": "a", "correlationId": "c", "platformAPIKey": "k",
    },
    "/meter/v1/api/event": {"requestId": "q", "eventType": "REQUEST", "currentMillis": 1},
    "/meter/v1/api/meter/rate": {"payload": {"a": 1}},
    "/meter/v1/api/meter/ingest": {"a": "1"},
    "/meter/v2/events": {"transactionId": "t", "payload": {"a": 1}},
    "/meter/v2/ai/completions": {
        "model": "m", "provider": "p", "inputTokenCount": 1, "outputTokenCount": 1, "totalTokenCount": 2,
        "stopReason": "END", "requestTime": NOW, "completionStartTime": NOW, "responseTime": NOW,
        "requestDuration": 1, "subscriber": {"id": "s"},
    },
    "/api/v1/meters/report": {"value": 1, "customerId": "c", "meterName": "m", "timestamp": NOW, "metadata": {"a": 1}},
    "/v1/billing/meter_events": {"event_name": "e", "payload": {"value": "1"}, "identifier": "i", "timestamp": "1"},
    "/v1/billing/meter_event_adjustments": {"event_name": "e", "type": "cancel", "cancel": {"identifier": "i"}},
    "/v1/billing/meters": {"display_name": "d", "event_name": "e", "default_aggregation": {"formula": "sum"}},
    "/v2/billing/meter_events": {"event_name": "e", "payload": {"value": "1"}, "identifier": "i", "timestamp": NOW},
    "/v2/billing/meter_event_adjustments": {"event_name": "e", "type": "cancel", "cancel": {"identifier": "i"}},
    "/v2/billing/meter_event_session": {},
    "/v2/billing/meter_event_stream": {"events": [{"event_name": "e", "payload": {}}]},
    "/v1/events": {"event_name": "e", "external_customer_id": "c", "event_id": "i", "timestamp": NOW, "properties": {}},
    "/v1/events/bulk": {"events": [{"event_name": "e", "external_customer_id": "c"}]},
    "/v1/meters": {
        "name": "n", "event_name": "e", "reset_usage": "NEVER", "filters": [{"key": "k", "values": ["v"]}],
        "aggregation": {"type": "SUM_WITH_MULTIPLIER", "field": "f", "multiplier": "1.5"},
    },
    "/api/v1/events": {"event": {"transaction_id": "t", "external_subscription_id": "s", "code": "c"}},
    "/api/v1/events/batch": {"events": [{"transaction_id": "t", "external_subscription_id": "s", "code": "c"}]},
    "/openmeter/events": [{"id": "i", "source": "s", "specversion": "1.0", "type": "t", "subject": "u", "data": {}}],
    "/webhook": {"id": "r"},
}  # fmt: skip
GOOD["/v3/openmeter/events"] = GOOD["/api/v3/openmeter/events"] = GOOD["/openmeter/events"]

values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
    | st.sampled_from(["unknown", "archived", NOW, "", " ", "e", "i"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abi_é", max_size=3), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


def places(body: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a body, itself included."""
    found = [path]
    if isinstance(body, dict | list):
        for key, inner in body.items() if isinstance(body, dict) else enumerate(body):
            found += places(inner, (*path, key))
    return found


@st.composite
def broken(draw: st.DrawFn, body: Any) -> Any:
    """The body with up to two places changed."""
    body = copy.deepcopy(body)
    for _ in range(draw(st.integers(0, 2))):
        path = draw(st.sampled_from(places(body)))
        if not path:
            return draw(values)
        inner = body
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = draw(values)
    return body


def form(body: Any) -> bytes:
    pairs: list[tuple[str, str]] = []

    def flatten(name: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                flatten(f"{name}[{key}]" if name else str(key), inner)
        else:
            pairs.append((name, str(value)))

    flatten("", body)
    return urlencode(pairs).encode()


def routes() -> list[Any]:
    rows = [(row.backend, row.vendor, place) for row in VENDORS for place in range(len(built(row.vendor).routes))]
    return [
        pytest.param(build, place, id=f"{backend}-{route.method}-{route.path}")
        for backend, build, place in rows
        if (route := built(build).routes[place]).method == "POST"
    ]


def built(build: Any) -> Any:
    return build(Store().memory("test"), Terms())


def call_of(route: Route, body: bytes, content_type: str, key: str) -> Call:
    headers = CIMultiDict(
        {
            "Content-Type": content_type,
            "x-api-key": "k",
            "Authorization": "Bearer k",
            "Stripe-Version": "x",
            "Idempotency-Key": key,
            "x-api-idempotency-key": key,
            "webhook-id": key,
        }
    )
    return Call(route.method, route.path, {"sourceId": "s"}, headers, body, 1_795_000_000.0)


def is_vendors(answer: Answer) -> None:
    assert 200 <= answer.status < 500
    assert not answer.body or orjson.loads(answer.body) is not None
    orjson.dumps([[unit.key, unit.body, unit.verdict] for unit in answer.units])


@pytest.mark.parametrize(("build", "place"), routes())
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_any_json_gets_the_vendors_answer_twice(build: Any, place: int, data: st.DataObject) -> None:
    route: Route = built(build).routes[place]
    assert route.path in GOOD, "give the new route a good body"
    body = data.draw(broken(GOOD[route.path]))
    kind = "application/json"
    raw = json.dumps(body).encode()
    if route.path.startswith("/v1/billing"):
        kind, raw = "application/x-www-form-urlencoded", form(body)
    elif route.path == "/webhook":
        kind = "application/x-ndjson"
    call = call_of(route, raw, kind, data.draw(st.sampled_from(["", "k"])))
    for _ in range(2):
        if route.when is None or route.when(call):
            is_vendors(route.handle(call))
        if route.exclusive is not None:
            assert isinstance(route.exclusive(call), str | None)
        if route.busy is not None:
            is_vendors(route.busy(call))


@pytest.mark.parametrize(("build", "place"), routes())
@given(
    body=st.binary(max_size=40),
    kind=st.sampled_from(
        ["application/json", "text/plain", "", 'a/b; c="', "application/x-www-form-urlencoded", "application/x-ndjson"]
    ),
)
@settings(max_examples=10, deadline=None)
def test_any_bytes_get_the_vendors_answer(build: Any, place: int, body: bytes, kind: str) -> None:
    route: Route = built(build).routes[place]
    call = call_of(route, body, kind, "k")
    if route.when is None or route.when(call):
        is_vendors(route.handle(call))


@pytest.mark.parametrize(
    ("target", "header"),
    [
        (b"/meter", b"Idempotency-Key: \xff\xfe"),
        (b"/meter/v1/api/meter/ingest?sourceId=%ff%fe", b"X: y"),
        (b"/%ff/%00/..", b"X: y"),
        (b"/meter?%ff=%ff&a=\"&a=1", b"Idempotency-Key: k"),
        (b"/v1/billing/meter_events", b"Authorization: Basic \xff"),
        (b"/v1/billing/meter_events", b"Authorization: Basic /////w=="),
        (b"/meter", b"Content-Encoding: gzip"),
    ],
)  # fmt: skip
async def test_odd_bytes_in_the_head_are_no_fault_of_ours(target: bytes, header: bytes) -> None:
    body = orjson.dumps(GOOD["/meter"])
    async with running_receiver() as (receiver, session):
        host, port = receiver.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        head = b"POST %b HTTP/1.1\r\nHost: x\r\nx-api-key: k\r\nContent-Type: application/json\r\n%b\r\n" % (
            target,
            header,
        )
        writer.write(head + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        answer = await reader.read()
        writer.close()
        await writer.wait_closed()
        assert answer.split(b" ")[1] < b"500", answer
        async with session.get("/_received") as listed:
            assert listed.status == 200
            [json.loads(line) for line in (await listed.text()).splitlines()]
