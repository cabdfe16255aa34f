"""The vendors' printed curl examples, sent to the receiver as printed, get the answers that stand beside them.

Sent twice over: with curl, where it is installed, and with the same request from here. Two of the examples cannot be
run as they are printed and are mended: an address with `&` outside quotes, and one with a space inside.
"""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import pytest
from support.scripted import running_receiver

V1 = "/meter/v1/api"
HEADERS = {"Content-Type": "application/json", "x-api-key": "YOUR_API_KEY"}
HALF = {
    "requestId": "3cbecf2a-edc6-4683-8934-a258d0fc3a09", "method": "POST", "uri": "/hammerhead-1", "source": "CUSTOM",
    "application": "4d0d8cae-c025-4a4c-907a-3efc0b4c41d1",
}  # fmt: skip


@dataclass(frozen=True)
class Example:
    """One printed command and the status beside it."""

    name: str
    path: str
    status: int
    verdict: str | None = "delivered"
    method: str = "POST"
    headers: dict[str, str] = field(default_factory=lambda: dict(HEADERS))
    body: Any = None  # JSON
    form: tuple[tuple[str, str], ...] = ()
    user: str = ""

    def curl(self, url: str) -> list[str]:
        command = ["curl", "-sS", "-X", self.method, url + self.path, "-w", "\n%{http_code}"]
        for name, value in self.headers.items():
            command += ["-H", f"{name}: {value}"]
        if self.body is not None:
            command += ["-d", json.dumps(self.body, indent=2)]
        for name, value in self.form:
            command += ["-d", f"{name}={value}"]
        return [*command, "-u", self.user] if self.user else command


EXAMPLES = [
    Example(
        name="revenium v1 meter", path=f"{V1}/meter", status=200,
        body={
            "api": "3c2c3d64-2f59-4642-9406-17d7fb5e2d5c", "method": "GET",
            "url": "https://api.example.com/v1/resource", "responseCode": 200,
            "requestHeaders": ["Content-Type", "Authorization"], "responseHeaders": ["Content-Type"],
            "elements": [
                {"name": "input-tokens", "value": "1928913"}, {"name": "output-tokens", "value": "391029302"},
            ],
            "monetized": True,
        },
    ),
    # The response's time lies before the request's, and neither half has a responseCode: that is how it is printed.
    Example(
        name="revenium v1 request half", path=f"{V1}/event", status=201,
        body={**HALF, "eventType": "REQUEST", "currentMillis": 1685402319000},
    ),
    Example(
        name="revenium v1 response half", path=f"{V1}/event", status=201,
        body={**HALF, "eventType": "RESPONSE", "currentMillis": 1675308955000},
    ),
    Example(
        name="revenium v1 rate", path=f"{V1}/meter/rate", status=200,
        body={
            "sourceId": "example-source", "subscriberCredentialId": "user-123", "payload": {"rating": "5"},
            "sourceType": "app",
        },
    ),
    Example(
        name="revenium v1 ingest", path=f"{V1}/meter/ingest?sourceId=src-456&subscriptionId=sub-123", status=200,
        headers={**HEADERS, "x-revenium-source-type": "custom"},
        body={"hotelRoomsBooked": "100", "carRentalCount": "242"},
    ),
    Example(
        name="revenium v1 product key", path=f"{V1}/meter/product-key?productKey=YOUR_SUBSCRIPTION_KEY", status=200,
        method="GET", headers={"x-api-key": "YOUR_API_KEY"}, verdict=None,
    ),
    Example(
        name="revenium v1 credential", path=f"{V1}/meter/product-key?application=YOUR_SUBSCRIPTION_CREDENTIAL",
        status=200, method="GET", headers={"x-api-key": "YOUR_API_KEY"}, verdict=None,
    ),
    Example(
        name="stripe meter event", path="/v1/billing/meter_events", status=200, headers={}, user="sk_test_example:",
        form=(
            ("event_name", "ai_search_api"), ("payload[value]", "25"),
            ("payload[stripe_customer_id]", "cus_NciAYcXfLnqBoz"), ("identifier", "identifier_123"),
        ),
    ),
    Example(
        name="flexprice meter", path="/v1/meters", status=201,
        headers={"Authorization": "Bearer <token>", "Content-Type": "application/json"},
        body={
            "name": "API Usage Meter", "event_name": "api_request", "aggregation": {"type": "COUNT"},
            "filters": [{"key": "method", "values": ["GET", "POST"]}], "reset_usage": "BILLING_PERIOD",
        },
    ),
]  # fmt: skip

ANSWERS: dict[str, dict[str, Any]] = {
    "stripe meter event": {
        "object": "billing.meter_event", "event_name": "ai_search_api", "identifier": "identifier_123",
        "payload": {"value": "25", "stripe_customer_id": "cus_NciAYcXfLnqBoz"},
    },
    "flexprice meter": {
        "name": "API Usage Meter", "event_name": "api_request", "aggregation": {"type": "COUNT"},
        "filters": [{"key": "method", "values": ["GET", "POST"]}], "reset_usage": "BILLING_PERIOD",
        "status": "published",
    },
}  # fmt: skip
KEYS = {
    "stripe meter event": {"object", "created", "event_name", "identifier", "livemode", "payload", "timestamp"},
    "flexprice meter": {
        "id", "name", "tenant_id", "event_name", "aggregation", "filters", "reset_usage", "status", "created_at",
        "updated_at",
    },
    "revenium v1 product key": {"claim"},
    "revenium v1 credential": {"claim"},
}  # fmt: skip


async def with_curl(example: Example, url: str) -> tuple[int, Any]:
    process = await asyncio.create_subprocess_exec(*example.curl(url), stdout=asyncio.subprocess.PIPE)
    out, _ = await process.communicate()
    assert process.returncode == 0
    body, _, status = out.decode().rpartition("\n")
    return int(status), json.loads(body)


async def from_here(example: Example, url: str) -> tuple[int, Any]:
    headers = dict(example.headers)
    data: bytes | aiohttp.Payload | None = None
    if example.body is not None:
        data = json.dumps(example.body).encode()
    elif example.form:
        data = aiohttp.FormData(example.form)()
    if example.user:
        headers["Authorization"] = f"Basic {base64.b64encode(example.user.encode()).decode()}"
    async with (
        aiohttp.ClientSession() as session,
        session.request(example.method, url + example.path, data=data, headers=headers) as answer,
    ):
        return answer.status, await answer.json()


@pytest.mark.parametrize(
    "send",
    [
        pytest.param(with_curl, marks=pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not here")),
        from_here,
    ],
)
@pytest.mark.parametrize("example", [pytest.param(e, id=e.name) for e in EXAMPLES])
async def test_gets_the_documented_answer(example: Example, send: Any) -> None:
    async with running_receiver() as (receiver, _):
        status, body = await send(example, receiver.url)
        assert status == example.status, body
        assert {name: body[name] for name in ANSWERS.get(example.name, {})} == ANSWERS.get(example.name, {})
        assert set(body) == KEYS.get(example.name, set())
        assert [row.verdict for row in receiver.received] == ([] if example.verdict is None else [example.verdict])


async def test_revenium_joins_nothing_but_lists_both_halves() -> None:
    async with running_receiver() as (receiver, _):
        for example in EXAMPLES[1:3]:
            await from_here(example, receiver.url)
        keys = [row.key for row in receiver.received]
        assert keys == [f"{HALF['requestId']}:REQUEST", f"{HALF['requestId']}:RESPONSE"]
