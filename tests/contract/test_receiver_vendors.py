"""Each vendor's documented answers, from the receiver: what is taken, what is refused and how, what is a duplicate."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlencode

import aiohttp
import pytest
from support.scripted import running_receiver

from sidecar.dev.mock_backends import Do, Fault, Receiver, Terms
from sidecar.dev.mock_backends.vendors.flexprice import BULK_MAX
from sidecar.dev.mock_backends.vendors.lago import BATCH_MAX as LAGO_MAX
from sidecar.dev.mock_backends.vendors.stripe_v2 import BATCH_MAX as STREAM_MAX
from sidecar.dev.mock_backends.vendors.webhook import secret_bytes, signature

NOW_S = 1_795_000_000.0
DAY_S = 86_400.0
KEY = "rev_mk_1234567890"


class Clock:
    """The receiver's clock, set by hand."""

    def __init__(self) -> None:
        self.now_s = NOW_S

    def __call__(self) -> float:
        return self.now_s


class Caller:
    """Sends to one receiver and gives back status, body and headers."""

    def __init__(self, receiver: Receiver, session: aiohttp.ClientSession, clock: Clock) -> None:
        self.receiver = receiver
        self.clock = clock
        self._session = session
        self.headers: dict[str, str] = {"x-api-key": KEY}

    async def __call__(self, path: str, body: Any = None, *, method: str = "POST", **headers: str) -> tuple[int, Any]:
        named = {**self.headers, **{name.replace("_", "-"): value for name, value in headers.items()}}
        named.setdefault("Content-Type", "application/json")
        data = body if isinstance(body, bytes | str | io.BytesIO) else json.dumps(body)
        async with self._session.request(method, path, data=data, headers=named) as answer:
            self.answer_headers = answer.headers
            text = await answer.text()
            return answer.status, json.loads(text) if text else None

    @property
    def verdicts(self) -> list[str]:
        return [row.verdict for row in self.receiver.received]


@pytest.fixture
async def call() -> Any:
    clock = Clock()
    async with running_receiver(now=clock) as (receiver, session):
        yield Caller(receiver, session, clock)


def without(body: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in body.items() if key != name}


# -- Revenium v1

METER = {
    "method": "GET", "url": "https://api.example.com/v1/resource", "responseCode": 200,
    "requestHeaders": ["Content-Type"], "responseHeaders": [], "elements": [{"name": "input-tokens", "value": "19"}],
    "monetized": True, "correlationId": "r-1",
}  # fmt: skip


async def test_revenium_v1_counts_every_repetition(call: Caller) -> None:
    for _ in range(2):
        assert await call("/meter/v1/api/meter", METER, Idempotency_Key="ignored") == (200, {})
    assert call.verdicts == ["delivered", "delivered"]
    assert [row.key for row in call.receiver.received] == ["r-1", "r-1"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"method": None}, "method is required"),
        ({"responseCode": "200"}, "responseCode must be an integer"),
        ({"responseCode": 2**31}, "responseCode must be an integer"),
        ({"requestHeaders": None}, "requestHeaders is required"),
        ({"requestHeaders": ["Authorization: Bearer x"]}, "names only"),
        ({"requestHeaders": [["Authorization", "x"]]}, "names only"),
        ({"elements": None}, "elements is required"),
        ({"elements": [{"name": "input-tokens", "value": 19}]}, "elements[0].value is required and must be a string"),
        ({"elements": [{"value": "19"}]}, "elements[0].name"),
        ({"elements": ["input-tokens"]}, "elements[0].name"),
        ({"monetized": "true"}, "monetized must be a boolean"),
        ({"backendLatency": "12"}, "backendLatency must be a number"),
    ],
)
async def test_revenium_v1_refuses(call: Caller, change: dict[str, Any], says: str) -> None:
    status, body = await call("/meter/v1/api/meter", {**METER, **change})
    assert status == 400
    assert says in body["message"]
    assert call.verdicts == ["refused"]


async def test_revenium_v1_needs_a_key_json_and_one_object(call: Caller) -> None:
    assert (await call("/meter/v1/api/meter", METER, x_api_key=""))[0] == 403
    assert (await call("/meter/v1/api/meter", [METER]))[0] == 400
    assert (await call("/meter/v1/api/meter", METER, Content_Type="text/plain"))[0] == 415
    assert (await call("/meter/v1/api/meter", METER, Content_Type="application/json; charset=utf-8"))[0] == 200
    assert call.verdicts == ["blocked", "refused", "refused", "delivered"]


async def test_revenium_v1_takes_both_halves_of_an_event(call: Caller) -> None:
    half = {"requestId": "q", "eventType": "REQUEST", "method": "POST", "currentMillis": 1685402319000, "uri": "/x"}
    assert (await call("/meter/v1/api/event", half))[0] == 201
    assert (await call("/meter/v1/api/event", {**half, "eventType": "RESPONSE", "responseCode": 200}))[0] == 201
    assert [row.key for row in call.receiver.received] == ["q:REQUEST", "q:RESPONSE"]
    for bad in (without(half, "requestId"), {**half, "eventType": "OTHER"}, {**half, "currentMillis": "1685402319000"}):
        assert (await call("/meter/v1/api/event", bad))[0] == 400


async def test_revenium_v1_rates_and_ingests(call: Caller) -> None:
    rate = {"sourceId": "s", "subscriberCredentialId": "u", "payload": {"rating": "5"}, "sourceType": "app"}
    assert await call("/meter/v1/api/meter/rate", rate) == (200, {})
    assert (await call("/meter/v1/api/meter/rate", without(rate, "payload")))[0] == 400
    path = "/meter/v1/api/meter/ingest?sourceId=s&subscriptionId=u"
    assert await call(path, {"rooms": "100"}, x_revenium_source_type="custom") == (200, {})
    assert (await call("/meter/v1/api/meter/ingest", {"rooms": "100"}))[0] == 400
    assert (await call(path, {"rooms": {"single": "100"}}))[0] == 400
    assert call.receiver.received[2].path == path


async def test_revenium_v1_answers_for_a_consumer(call: Caller) -> None:
    path = "/meter/v1/api/meter/product-key"
    status, body = await call(f"{path}?application=acme-quota-2", method="GET")
    assert status == 200
    head, payload, _ = (base64.urlsafe_b64decode(p + "==") for p in body["claim"].split("."))
    assert json.loads(head)["alg"] == "RS256"
    claims = json.loads(payload)
    assert (claims["totalQuota"], claims["consumedQuota"]) == (2, 0)
    await call("/meter/v1/api/meter", {**METER, "application": "acme-quota-2"})
    _, body = await call(f"{path}?application=acme-quota-2", method="GET")
    assert json.loads(base64.urlsafe_b64decode(body["claim"].split(".")[1] + "=="))["consumedQuota"] == 1
    assert (await call(f"{path}?productKey=unknown-1", method="GET"))[0] == 404
    assert (await call(path, method="GET"))[0] == 400
    assert (await call(f"{path}?productKey=p", method="GET", x_api_key=""))[0] == 403


# -- Revenium v2

EVENT = {"transactionId": "t-1", "payload": {"storageGB": 15.5, "plan": "gold"}, "sourceType": "KONG"}
COMPLETION = {
    "model": "gpt-5-mini", "provider": "openai", "inputTokenCount": 43, "outputTokenCount": 97, "totalTokenCount": 140,
    "stopReason": "END", "requestTime": "2026-11-20T09:00:00.123Z", "completionStartTime": "2026-11-20T09:00:01Z",
    "responseTime": "2026-11-20T09:00:02+00:00", "requestDuration": 1877, "transactionId": "t-2", "costType": "AI",
    "isStreamed": True, "subscriber": {"id": "acme", "credential": {"name": "n", "value": "v"}},
    "clientSurface": "sdk", "entrypoint": "cli", "brandNewField": 1,
}  # fmt: skip
V2 = pytest.mark.parametrize(
    ("path", "record"), [("/meter/v2/events", EVENT), ("/meter/v2/ai/completions", COMPLETION)]
)


@V2
async def test_revenium_v2_replays_a_key_for_a_day(call: Caller, path: str, record: dict[str, Any]) -> None:
    first = await call(path, record, Idempotency_Key="k")
    assert first[0] == 200
    assert first[1]["resourceType"] == "metering"
    assert await call(path, record, Idempotency_Key="k") == first
    status, body = await call(path, {**record, "transactionId": "other"}, Idempotency_Key="k")
    assert (status, body["code"]) == (409, "idempotency_key_mismatch")
    assert (await call(path, record, Idempotency_Key="k", x_api_key="another account"))[0] == 200
    call.clock.now_s += DAY_S - 1
    assert await call(path, record, Idempotency_Key="k") == first
    call.clock.now_s += 1
    assert (await call(path, record, Idempotency_Key="k"))[0] == 200
    assert call.verdicts == ["delivered", "duplicate", "refused", "delivered", "duplicate", "delivered"]


@V2
async def test_revenium_v2_counts_again_without_a_key(call: Caller, path: str, record: dict[str, Any]) -> None:
    for _ in range(2):
        assert (await call(path, record))[0] == 200
    assert call.verdicts == ["delivered", "delivered"]


async def test_revenium_v2_refuses_the_same_key_while_the_first_runs(call: Caller) -> None:
    call.receiver.faults.set(Fault(do=Do.DELAY, delay_s=0.3, times=1))
    first = asyncio.create_task(call("/meter/v2/events", EVENT, Idempotency_Key="k"))
    while not call.receiver.faults.status()[0]["hits"]:
        await asyncio.sleep(0.005)
    status, body = await call("/meter/v2/events", EVENT, Idempotency_Key="k")
    assert (status, body["code"]) == (409, "idempotency_key_in_progress")
    assert call.answer_headers["Retry-After"] == "1"
    assert (await first)[0] == 200


@pytest.mark.parametrize("key", ["", " ", "a b", "a" * 256, "\u00e9"])
async def test_revenium_v2_refuses_a_key_that_is_none(call: Caller, key: str) -> None:
    assert (await call("/meter/v2/events", EVENT, Idempotency_Key=key))[0] == 400


@V2
async def test_revenium_v2_forgets_what_it_refused(call: Caller, path: str, record: dict[str, Any]) -> None:
    bad = without(record, "payload" if "payload" in record else "model")
    assert (await call(path, bad, Idempotency_Key="k"))[0] == 400
    assert (await call(path, record, Idempotency_Key="k"))[0] == 200
    assert (await call(path, record, x_api_key=""))[0] == 401


@pytest.mark.parametrize(
    "change",
    [
        *({name: None} for name in (
            "model", "provider", "inputTokenCount", "outputTokenCount", "totalTokenCount", "stopReason", "requestTime",
            "completionStartTime", "responseTime", "requestDuration",
        )),
        {"inputTokenCount": 1.5}, {"inputTokenCount": "43"}, {"stopReason": "stop"}, {"requestTime": 1795000000},
        {"requestTime": "2026-11-20T09:00:00"}, {"requestTime": "2026-13-20T09:00:00Z"}, {"costType": "API"},
        {"operationType": "chat"}, {"traceType": "a b"}, {"traceName": "x" * 257}, {"clientSurface": "x" * 65},
        {"subscriber": "acme"}, {"subscriber": {"id": 7}}, {"isStreamed": "yes"},
        {"totalCost": "0.1"}, {"totalCost": -0.1}, {"inputTokenCost": 0.00000000001}, {"cacheReadTokenCost": True},
    ],
)  # fmt: skip
async def test_revenium_v2_refuses_a_completion(call: Caller, change: dict[str, Any]) -> None:
    status, body = await call("/meter/v2/ai/completions", {**COMPLETION, **change})
    assert status == 400
    assert next(iter(change)) in body["details"]["error"]


async def test_revenium_v2_takes_the_fields_that_two_clients_call_optional(call: Caller) -> None:
    record = COMPLETION
    for name in ("transactionId", "costType", "isStreamed"):
        record = without(record, name)
    assert (await call("/meter/v2/ai/completions", record))[0] == 200
    assert (await call("/meter/v2/events", {**EVENT, "payload": {"x": [1]}}))[0] == 400
    assert (await call("/meter/v2/events", {**EVENT, "sourceType": "SIDECAR"}))[0] == 400


# -- LedgerBee

REPORT = {
    "value": 2.5, "customerId": "cus_1", "meterName": "api_calls", "timestamp": "2026-11-20T09:00:00.123Z",
    "metadata": {"model": "gpt", "n": 1, "cached": False},
}  # fmt: skip
REPORT_PATH = "/api/v1/meters/report"


async def test_ledgerbee_queues_once(call: Caller) -> None:
    status, body = await call(REPORT_PATH, REPORT, x_api_idempotency_key="k")
    assert (status, body["status"]) == (202, "queued")
    assert body["requestId"]
    for again in (REPORT, {**REPORT, "value": 3}):
        assert await call(REPORT_PATH, again, x_api_idempotency_key="k") == (
            200,
            {"status": "duplicate", "idempotencyKey": "k"},
        )
    assert call.verdicts == ["delivered", "duplicate", "duplicate"]


@pytest.mark.parametrize(
    ("change", "status", "code"),
    [
        ({"value": None}, 400, "SHARED_VALIDATION_FAILED"),
        ({"value": "2"}, 400, "SHARED_VALIDATION_FAILED"),
        ({"customerId": ""}, 400, "SHARED_VALIDATION_FAILED"),
        ({"model": "gpt"}, 400, "SHARED_VALIDATION_FAILED"),
        ({"metadata": {"a": {"b": 1}}}, 400, "SHARED_VALIDATION_FAILED"),
        ({"metadata": {"a": None}}, 400, "SHARED_VALIDATION_FAILED"),
        ({"timestamp": 1795000000}, 400, "SHARED_VALIDATION_FAILED"),
        ({"meterId": "not-a-uuid"}, 400, "SHARED_VALIDATION_FAILED"),
        ({"meterName": None}, 400, "METER_IDENTIFIER_REQUIRED"),
        ({"meterName": "unknown"}, 404, "METER_NOT_FOUND"),
        ({"meterName": "archived-1"}, 400, "METER_NOT_ACTIVE"),
    ],
)
async def test_ledgerbee_refuses_in_its_envelope(call: Caller, change: dict[str, Any], status: int, code: str) -> None:
    got, body = await call(REPORT_PATH, {**REPORT, **change}, x_api_idempotency_key="k")
    assert (got, body["code"], body["statusCode"], body["path"]) == (status, code, status, "/v1/meters/report")
    if code == "SHARED_VALIDATION_FAILED":
        assert body["details"]["validationErrors"][0]["property"].startswith(next(iter(change)))
    assert call.verdicts == ["refused"]


async def test_ledgerbee_insists_on_its_own_header_and_a_key(call: Caller) -> None:
    assert (await call(REPORT_PATH, REPORT, Idempotency_Key="k"))[0] == 400
    status, body = await call(REPORT_PATH, REPORT, x_api_idempotency_key="k", x_api_key="")
    assert (status, body["code"]) == (401, "UNAUTHORIZED")
    assert call.verdicts == ["refused", "blocked"]


async def test_ledgerbee_looks_meters_up(call: Caller) -> None:
    base = "/api/v1/meters"
    uuid = "3cbecf2a-edc6-4683-8934-a258d0fc3a09"
    for path, status in (
        (f"{base}/subscriptions?meterName=api_calls", 200),
        (f"{base}/{uuid}/subscriptions", 200),
        (f"{base}/subscriptions", 400),
        (f"{base}/subscriptions?meterName=unknown", 404),
    ):
        assert (await call(path, method="GET"))[0] == status
    assert call.verdicts == []


# -- Stripe v1

STRIPE = {
    "event_name": "ai_search_api", "payload[value]": "25", "payload[stripe_customer_id]": "cus_1",
    "identifier": "identifier_123",
}  # fmt: skip
STRIPE_PATH = "/v1/billing/meter_events"


async def stripe(call: Caller, form: Sequence[tuple[str, str]] | dict[str, str], **headers: str) -> tuple[int, Any]:
    named = {"Content_Type": "application/x-www-form-urlencoded", "Authorization": "Bearer sk_test_1", **headers}
    return await call(STRIPE_PATH, urlencode(form), **named)


async def test_stripe_v1_takes_a_form_and_refuses_the_identifier_again(call: Caller) -> None:
    basic = "Basic " + base64.b64encode(b"sk_test_1:").decode()
    status, body = await stripe(call, STRIPE, Authorization=basic)
    assert status == 200
    assert body == {
        "object": "billing.meter_event",
        "created": int(NOW_S),
        "event_name": "ai_search_api",
        "identifier": "identifier_123",
        "livemode": False,
        "timestamp": int(NOW_S),
        "payload": {"value": "25", "stripe_customer_id": "cus_1"},
    }
    status, body = await stripe(call, {**STRIPE, "payload[value]": "26"})
    assert status == 400
    assert body["error"]["type"] == "invalid_request_error"
    assert body["error"]["message"] == "An event already exists with identifier identifier_123."
    assert "code" not in body["error"]
    call.clock.now_s += DAY_S
    assert (await stripe(call, STRIPE))[0] == 200
    assert call.verdicts == ["delivered", "duplicate", "delivered"]


async def test_stripe_v1_replays_a_key(call: Caller) -> None:
    first = await stripe(call, STRIPE, Idempotency_Key="k")
    assert await stripe(call, STRIPE, Idempotency_Key="k") == first
    assert call.answer_headers["Idempotent-Replayed"] == "true"
    status, body = await stripe(call, {**STRIPE, "identifier": "other"}, Idempotency_Key="k")
    assert (status, body["error"]["type"]) == (400, "idempotency_error")
    assert call.verdicts == ["delivered", "duplicate", "refused"]


async def test_stripe_v1_replays_a_stored_500_too(call: Caller) -> None:
    call.receiver.faults.set(Fault(do=Do.STATUS, status=500, times=1))
    for _ in range(3):
        assert (await stripe(call, STRIPE, Idempotency_Key="k"))[0] == 500
    assert call.answer_headers["Idempotent-Replayed"] == "true"
    assert (await stripe(call, STRIPE))[0] == 200
    assert call.verdicts == ["retry", "retry", "delivered"]


async def test_stripe_v1_does_not_store_a_429(call: Caller) -> None:
    call.receiver.faults.set(Fault(do=Do.STATUS, status=429, times=1))
    assert (await stripe(call, STRIPE, Idempotency_Key="k"))[0] == 429
    assert (await stripe(call, STRIPE, Idempotency_Key="k"))[0] == 200


@pytest.mark.parametrize(
    ("change", "code", "param"),
    [
        ({"event_name": None}, "parameter_missing", "event_name"),
        ({"payload[value]": None, "payload[stripe_customer_id]": None}, "parameter_missing", "payload"),
        ({"event_name": "x" * 101}, None, "event_name"),
        ({"identifier": "x" * 101}, None, "identifier"),
        ({"timestamp": "1795000000.5"}, "parameter_invalid_integer", "timestamp"),
        ({"timestamp": "2026-11-20T09:00:00Z"}, "parameter_invalid_integer", "timestamp"),
        ({"timestamp": str(int(NOW_S - 35 * DAY_S - 1))}, "timestamp_too_far_in_past", "timestamp"),
        ({"timestamp": str(int(NOW_S + 301))}, "timestamp_in_future", "timestamp"),
        ({"model": "gpt"}, "parameter_unknown", "model"),
        ({"payload[a][b]": "1"}, "parameter_invalid", "payload"),
    ],
)
async def test_stripe_v1_refuses(call: Caller, change: dict[str, Any], code: str | None, param: str) -> None:
    form = {name: value for name, value in {**STRIPE, **change}.items() if value is not None}
    status, body = await stripe(call, form)
    assert status == 400
    assert (body["error"].get("code"), body["error"]["param"]) == (code, param)
    assert call.verdicts == ["refused"]


async def test_stripe_v1_takes_the_limits_themselves(call: Caller) -> None:
    for change in (
        {"event_name": "x" * 100},
        {"identifier": "y" * 100},
        {"timestamp": str(int(NOW_S - 35 * DAY_S))},
        {"timestamp": str(int(NOW_S + 300))},
    ):
        form = {**STRIPE, "identifier": str(change)[:99], **change}
        assert (await stripe(call, form))[0] == 200


async def test_stripe_v1_needs_a_key_and_a_form(call: Caller) -> None:
    assert (await stripe(call, STRIPE, Authorization=""))[0] == 401
    assert (await stripe(call, STRIPE, Content_Type="application/json"))[0] == 400
    assert (
        await call(STRIPE_PATH, "a[b=1", Content_Type="application/x-www-form-urlencoded", Authorization="Bearer k")
    )[0] == 400
    assert call.verdicts == ["blocked", "refused", "refused"]


@pytest.mark.parametrize(
    "change",
    [
        {"payload[stripe_customer_id]": None},
        {"payload[value]": None},
        {"payload[value]": "many"},
        {"payload[value]": "NaN"},
        {"payload[value]": "1234567890.123456"},
    ],
)
async def test_stripe_v1_takes_with_a_200_what_it_will_not_bill(call: Caller, change: dict[str, Any]) -> None:
    form = {name: value for name, value in {**STRIPE, **change}.items() if value is not None}
    assert (await stripe(call, form))[0] == 200
    assert call.verdicts == ["dropped"]
    assert call.receiver.billed("stripe") == []


async def test_stripe_v1_runs_one_call_for_a_customer_and_meter(call: Caller) -> None:
    call.receiver.faults.set(Fault(do=Do.DELAY, delay_s=0.3, times=1))
    first = asyncio.create_task(stripe(call, STRIPE))
    while not call.receiver.faults.status()[0]["hits"]:
        await asyncio.sleep(0.005)
    status, body = await stripe(call, {**STRIPE, "identifier": "2"})
    assert (status, body["error"]["code"]) == (429, "lock_timeout")
    assert (await stripe(call, {**STRIPE, "identifier": "3", "payload[stripe_customer_id]": "cus_2"}))[0] == 200
    assert (await stripe(call, {**STRIPE, "identifier": "4", "event_name": "other"}))[0] == 200
    assert (await first)[0] == 200


async def test_stripe_v1_cancels_within_a_day(call: Caller) -> None:
    await stripe(call, STRIPE)
    form = {"event_name": "ai_search_api", "type": "cancel", "cancel[identifier]": "identifier_123"}
    headers = {"Content_Type": "application/x-www-form-urlencoded", "Authorization": "Bearer sk_test_1"}
    path = "/v1/billing/meter_event_adjustments"
    status, body = await call(path, urlencode(form), **headers)
    assert (status, body["status"], body["cancel"]) == (200, "pending", {"identifier": "identifier_123"})
    for bad in (
        without(form, "type"),
        {**form, "type": "range"},
        {**form, "event_name": "other"},
        without(form, "cancel[identifier]"),
    ):
        assert (await call(path, urlencode(bad), **headers))[0] == 400
    call.clock.now_s += DAY_S
    assert (await call(path, urlencode(form), **headers))[0] == 400


async def test_stripe_v1_defines_meters_and_then_knows_no_others(call: Caller) -> None:
    headers = {"Content_Type": "application/x-www-form-urlencoded", "Authorization": "Bearer sk_test_1"}
    form = {
        "display_name": "Tokens",
        "event_name": "tokens",
        "default_aggregation[formula]": "sum",
        "customer_mapping[event_payload_key]": "customer",
        "customer_mapping[type]": "by_id",
        "value_settings[event_payload_key]": "amount",
    }
    path = "/v1/billing/meters"
    status, meter = await call(path, urlencode(form), **headers)
    assert status == 200
    assert meter["value_settings"] == {"event_payload_key": "amount"}
    assert (await call(path, urlencode(form), **headers))[0] == 400
    for bad in ({"default_aggregation[formula]": "max"}, {"event_time_window": "week"}, {"display_name": ""}):
        assert (await call(path, urlencode({**form, "event_name": "new", **bad}), **headers))[0] == 400
    status, page = await call(path, method="GET", **headers)
    assert [row["id"] for row in page["data"]] == [meter["id"]]
    assert (await call(f"{path}/{meter['id']}", method="GET", **headers)) == (200, meter)
    assert (await call(f"{path}/mtr_none", method="GET", **headers))[0] == 404
    before = len(call.verdicts)
    await stripe(call, {"event_name": "tokens", "payload[customer]": "c", "payload[amount]": "1"})
    await stripe(call, STRIPE)
    await stripe(call, {"event_name": "tokens", "payload[stripe_customer_id]": "c", "payload[value]": "1"})
    assert call.verdicts[before:] == ["delivered", "dropped", "dropped"]


# -- Stripe v2

V2_EVENT = {
    "event_name": "tokens", "identifier": "i-1", "payload": {"stripe_customer_id": "cus_1", "value": "25"},
    "timestamp": "2026-11-18T09:00:00.123Z",
}  # fmt: skip
V2_HEADERS = {"Authorization": "Bearer sk_test_1", "Stripe_Version": "2026-10-29.clover"}


async def test_stripe_v2_single(call: Caller) -> None:
    path = "/v2/billing/meter_events"
    status, body = await call(path, V2_EVENT, **V2_HEADERS)
    assert (status, body["object"], body["identifier"]) == (200, "v2.billing.meter_event", "i-1")
    status, body = await call(path, V2_EVENT, **V2_HEADERS)
    assert (status, body["error"]["code"]) == (400, "duplicate_meter_event")
    assert (await call(path, V2_EVENT, Authorization="Bearer sk"))[0] == 400, "no Stripe-Version"
    assert (await call(path, V2_EVENT, Stripe_Version="x"))[0] == 401
    change: Mapping[str, object]
    for change in (
        {"payload": {"value": 25}},
        {"timestamp": 1795000000},
        {"identifier": "x" * 101},
        {"event_name": None},
        {"more": 1},
    ):
        assert (await call(path, {**V2_EVENT, **change}, **V2_HEADERS))[0] == 400
    assert call.verdicts == ["delivered", "duplicate", "refused", "blocked", *["refused"] * 5]


async def test_stripe_v2_stream_under_a_session(call: Caller) -> None:
    path = "/v2/billing/meter_event_stream"
    assert (await call("/v2/billing/meter_event_session", Stripe_Version="x"))[0] == 401
    status, session = await call("/v2/billing/meter_event_session", b"", **V2_HEADERS)
    assert (status, session["object"]) == (200, "v2.billing.meter_event_session")
    assert (await call("/v2/billing/meter_event_session", {}, **V2_HEADERS))[0] == 200
    headers = {"Authorization": f"Bearer {session['authentication_token']}", "Stripe_Version": "x"}
    events = [{**V2_EVENT, "identifier": f"e{n}"} for n in range(STREAM_MAX)]
    assert await call(path, {"events": events}, **headers) == (200, {})
    assert await call(path, {"events": events[:2]}, **headers) == (200, {})
    assert call.verdicts == ["blocked", *["delivered"] * STREAM_MAX, "duplicate", "duplicate"]
    assert [row.key for row in call.receiver.received[1:3]] == ["e0", "e1"]
    for bad in ([], [V2_EVENT] * (STREAM_MAX + 1), [{**V2_EVENT, "payload": {"value": 1}}], ["x"], None):
        assert (await call(path, {"events": bad}, **headers))[0] == 400
    call.clock.now_s += 899
    assert (await call(path, {"events": events[:1]}, **headers))[0] == 200
    call.clock.now_s += 1
    status, body = await call(path, {"events": events[:1]}, **headers)
    assert (status, body["error"]["code"]) == (401, "billing_meter_event_session_expired")
    assert (await call(path, {"events": events[:1]}, **V2_HEADERS))[0] == 401, "the secret key is no session"
    assert session["authentication_token"] not in json.dumps([row.body for row in call.receiver.received])


async def test_stripe_v2_one_bad_event_refuses_the_stream_whole(call: Caller) -> None:
    _, session = await call("/v2/billing/meter_event_session", b"", **V2_HEADERS)
    headers = {"Authorization": f"Bearer {session['authentication_token']}", "Stripe_Version": "x"}
    late = {**V2_EVENT, "identifier": "late", "timestamp": "2020-01-01T00:00:00Z"}
    status, body = await call("/v2/billing/meter_event_stream", {"events": [V2_EVENT, late]}, **headers)
    assert (status, body["error"]["code"]) == (400, "timestamp_too_far_in_past")
    assert call.receiver.billed("stripe") == []


async def test_stripe_v2_cancels_what_v1_took(call: Caller) -> None:
    await stripe(call, STRIPE)
    order = {"event_name": "ai_search_api", "type": "cancel", "cancel": {"identifier": "identifier_123"}}
    assert (await call("/v2/billing/meter_event_adjustments", order, **V2_HEADERS))[0] == 200
    assert (await call("/v2/billing/meter_event_adjustments", {**order, "event_name": "x"}, **V2_HEADERS))[0] == 404
    assert (await call("/v2/billing/meter_event_adjustments", {}, **V2_HEADERS))[0] == 400


# -- Flexprice

FLEX = {
    "event_id": "e-1", "event_name": "api_request", "external_customer_id": "acme",
    "timestamp": "2026-11-20T09:00:00.123Z", "properties": {"tokens": 5, "model": "gpt"},
}  # fmt: skip


async def test_flexprice_folds_only_the_same_id_and_instant(call: Caller) -> None:
    status, body = await call("/v1/events", FLEX)
    assert (status, body["event_id"]) == (202, "e-1")
    for change, verdict in (
        ({}, "duplicate"),
        ({"timestamp": "2026-11-20T10:00:00.123+01:00"}, "duplicate"),
        ({"timestamp": "2026-11-20T09:00:00.124Z"}, "delivered"),
        ({"timestamp": None}, "delivered"),
        ({"timestamp": None}, "delivered"),
        ({"event_id": None}, "delivered"),
    ):
        assert (await call("/v1/events", {**FLEX, **change}))[0] == 202
        assert call.verdicts[-1] == verdict, change


async def test_flexprice_bulk_keeps_what_stands_before_the_bad_one(call: Caller) -> None:
    events = [{**FLEX, "event_id": f"e{n}"} for n in range(4)]
    events[2] = {**events[2], "event_name": "  "}
    status, body = await call("/v1/events/bulk", {"events": events})
    assert (status, body["code"], body["http_status_code"]) == (400, "validation_error", 400)
    assert call.verdicts == ["delivered", "delivered", "refused", "refused"]
    assert "2" not in body["message"], "the vendor does not say which"
    events[2] = {**events[2], "event_name": "api_request"}
    assert await call("/v1/events/bulk", {"events": events}) == (202, {"message": "Events accepted for processing"})
    assert [event["event_id"] for event in call.receiver.billed("flexprice")] == ["e0", "e1", "e2", "e3"]


@pytest.mark.parametrize(("count", "status"), [(0, 400), (1, 202), (BULK_MAX, 202), (BULK_MAX + 1, 400)])
async def test_flexprice_bulk_limits(call: Caller, count: int, status: int) -> None:
    events = [{**FLEX, "event_id": f"e{n}"} for n in range(count)]
    assert (await call("/v1/events/bulk", {"events": events}))[0] == status


async def test_flexprice_refuses_above_32_mib_with_400(call: Caller) -> None:
    body = json.dumps({"events": [{**FLEX, "source": "x" * (32 * 2**20)}]})
    status, told = await call("/v1/events/bulk", io.BytesIO(body.encode()))
    assert (status, told["code"]) == (400, "validation_error")


async def test_flexprice_wants_its_own_header_on_events(call: Caller) -> None:
    assert await call("/v1/events", FLEX, x_api_key="", Authorization="Bearer key") == (401, {"error": "Unauthorized"})
    change: Mapping[str, object]
    for change in ({"external_customer_id": None}, {"external_customer_id": 7}, {"timestamp": 1}, {"properties": []}):
        assert (await call("/v1/events", {**FLEX, **change}))[0] == 400
    assert (await call("/v1/events", {**FLEX, "properties": {"tokens": "5"}, "event_id": "text"}))[0] == 202


FLEX_METER = {
    "name": "Tokens", "event_name": "api_request", "reset_usage": "BILLING_PERIOD",
    "aggregation": {"type": "SUM", "field": "tokens"}, "filters": [{"key": "method", "values": ["GET"]}],
}  # fmt: skip


async def test_flexprice_defines_meters(call: Caller) -> None:
    status, meter = await call("/v1/meters", FLEX_METER)
    assert (status, meter["status"], meter["filters"]) == (201, "published", FLEX_METER["filters"])
    assert (await call(f"/v1/meters/{meter['id']}", method="GET")) == (200, meter)
    assert (await call("/v1/meters", method="GET"))[1]["items"] == [meter]
    assert (await call("/v1/meters/none", method="GET"))[0] == 404


@pytest.mark.parametrize(
    ("aggregation", "status"),
    [
        ({"type": "COUNT"}, 201),
        ({"type": "COUNT_UNIQUE", "field": "user"}, 201),
        ({"type": "SUM", "expression": "tokens * 2"}, 201),
        ({"type": "SUM_WITH_MULTIPLIER", "field": "tokens", "multiplier": "1.5"}, 201),
        ({"type": "MAX", "field": "seats", "bucket_size": "HOUR", "group_by": "user"}, 201),
        ({"type": "UNIQUE_COUNT", "field": "user"}, 400),
        ({"type": "SUM"}, 400),
        ({"type": "SUM", "field": "a", "expression": "b"}, 400),
        ({"type": "COUNT_UNIQUE", "expression": "user"}, 400),
        ({"type": "SUM_WITH_MULTIPLIER", "field": "tokens"}, 400),
        ({"type": "SUM_WITH_MULTIPLIER", "field": "tokens", "multiplier": "0"}, 400),
        ({"type": "COUNT", "bucket_size": "DAY"}, 400),
        ({"type": "SUM", "field": "a", "bucket_size": "YEAR"}, 400),
        ({"type": "MAX", "field": "a", "group_by": "user"}, 400),
        ({}, 400),
    ],
)
async def test_flexprice_aggregations(call: Caller, aggregation: dict[str, Any], status: int) -> None:
    assert (await call("/v1/meters", {**FLEX_METER, "aggregation": aggregation}))[0] == status


@pytest.mark.parametrize(
    "change",
    [
        {"name": ""},
        {"event_name": None},
        {"reset_usage": "MONTHLY"},
        {"filters": [{"key": "x", "values": []}]},
        {"filters": {}},
    ],
)
async def test_flexprice_refuses_a_meter(call: Caller, change: dict[str, Any]) -> None:
    assert (await call("/v1/meters", {**FLEX_METER, **change}))[0] == 400


# -- OpenMeter

CLOUD = {
    "id": "e-1", "source": "sidecar", "specversion": "1.0", "type": "api_request", "subject": "acme",
    "time": "2026-11-20T09:00:00Z", "data": {"tokens": 5},
}  # fmt: skip
MANY = "application/cloudevents-batch+json"
OM = "/api/v1/events"


async def test_openmeter_takes_one_or_many_and_drops_duplicates(call: Caller) -> None:
    assert await call(OM, CLOUD, Content_Type="application/cloudevents+json") == (204, None)
    assert await call(OM, [CLOUD, {**CLOUD, "id": "e-2"}], Content_Type=MANY) == (204, None)
    assert await call(OM, {**CLOUD, "source": "other"}, Content_Type="application/json") == (204, None)
    assert call.verdicts == ["delivered", "duplicate", "delivered", "delivered"]
    assert {row.backend for row in call.receiver.received} == {"openmeter"}
    call.clock.now_s += 32 * DAY_S
    assert await call(OM, CLOUD) == (204, None)
    assert call.verdicts[-1] == "delivered"


@pytest.mark.parametrize("path", ["/openmeter/events", "/v3/openmeter/events", "/api/v3/openmeter/events"])
async def test_openmeter_v3_reads_the_content_type_properly(call: Caller, path: str) -> None:
    assert await call(path, [CLOUD], Content_Type="application/json; charset=utf-8") == (202, None)
    assert (await call(OM, [CLOUD], Content_Type="application/json; charset=utf-8"))[0] == 400


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (CLOUD, MANY), ([CLOUD], "application/cloudevents+json"), ([], MANY), ("", "application/json"),
        ([CLOUD, {**CLOUD, "subject": ""}], MANY), ({**CLOUD, "specversion": "0.3"}, "application/json"),
        (without(CLOUD, "id"), "application/json"), ({**CLOUD, "time": "yesterday"}, "application/json"),
        ({**CLOUD, "data": [1]}, "application/json"), (CLOUD, "text/plain"),
        ([{**CLOUD, "data": {"cost_usd": 0.1}}], MANY), ([{**CLOUD, "data": {"charge": "1e-6"}}], MANY),
    ],
)  # fmt: skip
async def test_openmeter_refuses_with_a_problem(call: Caller, body: Any, kind: str) -> None:
    status, told = await call(OM, body, Content_Type=kind)
    assert (status, told["status"], told["title"]) == (400, 400, "Bad Request")
    assert call.answer_headers["Content-Type"] == "application/problem+json"
    assert call.receiver.billed("openmeter") == []


async def test_openmeter_asks_for_a_token_only_where_one_was_set() -> None:
    async with running_receiver(terms={"openmeter": Terms(key="om_1")}) as (receiver, session):
        caller = Caller(receiver, session, Clock())
        assert (await caller(OM, CLOUD))[0] == 401
        assert (await caller(OM, CLOUD, Authorization="Bearer om_1"))[0] == 204


# -- Lago

LAGO = {
    "transaction_id": "t-1", "external_subscription_id": "sub_1", "code": "tokens", "timestamp": 1795000000.123,
    "properties": {"tokens": 5, "model": "gpt"},
}  # fmt: skip
LAGO_AUTH = {"Authorization": "Bearer lago_key"}


async def test_lago_refuses_a_known_transaction(call: Caller) -> None:
    status, body = await call(OM, {"event": LAGO}, **LAGO_AUTH)
    assert (status, body["event"]["transaction_id"]) == (200, "t-1")
    assert body["event"]["timestamp"] == "2026-11-18T11:06:40.123Z"
    status, body = await call(OM, {"event": {**LAGO, "timestamp": 1}}, **LAGO_AUTH)
    assert (status, body["code"]) == (422, "validation_errors")
    assert body["error_details"] == {"transaction_id": ["value_already_exist"]}
    assert (await call(OM, {"event": {**LAGO, "external_subscription_id": "sub_2"}}, **LAGO_AUTH))[0] == 200
    assert call.verdicts == ["delivered", "duplicate", "delivered"]
    assert {row.backend for row in call.receiver.received} == {"lago"}


async def test_lago_takes_a_batch_whole_or_not_at_all(call: Caller) -> None:
    path = "/api/v1/events/batch"
    events = [{**LAGO, "transaction_id": f"t{n}"} for n in range(4)]
    assert (await call(path, {"events": events[:1]}, **LAGO_AUTH))[0] == 200
    bad = [events[0], events[1], {**events[2], "timestamp": "soon"}, events[1]]
    status, body = await call(path, {"events": bad}, **LAGO_AUTH)
    assert status == 422
    assert body["error_details"] == {
        "0": {"transaction_id": ["value_already_exist"]},
        "2": {"timestamp": ["invalid_format"]},
        "3": {"transaction_id": ["value_already_exist"]},
    }
    assert call.verdicts == ["delivered", "duplicate", "refused", "refused", "refused"]
    status, body = await call(path, {"events": events[1:]}, **LAGO_AUTH)
    assert (status, [event["transaction_id"] for event in body["events"]]) == (200, ["t1", "t2", "t3"])
    assert len(call.receiver.billed("lago")) == 4


@pytest.mark.parametrize(("count", "status"), [(0, 422), (1, 200), (LAGO_MAX, 200), (LAGO_MAX + 1, 422)])
async def test_lago_batch_limits(call: Caller, count: int, status: int) -> None:
    events = [{**LAGO, "transaction_id": f"t{n}"} for n in range(count)]
    got, body = await call("/api/v1/events/batch", {"events": events}, **LAGO_AUTH)
    assert got == status
    if status == 422:
        assert body["error_details"]["events"][0] in ("no_events", "too_many_events")


async def test_lago_refuses(call: Caller) -> None:
    change: Mapping[str, object]
    for change in (
        {"transaction_id": None},
        {"external_subscription_id": ""},
        {"code": None},
        {"timestamp": -1},
        {"timestamp": True},
        {"properties": {"a": []}},
        {"precise_total_amount_cents": 1.5},
        {"precise_total_amount_cents": "1e-6"},
        {"precise_total_amount_cents": "0." + "1" * 16},
    ):
        status, body = await call(OM, {"event": {**LAGO, **change}}, **LAGO_AUTH)
        assert status == 422
        assert next(iter(change)) in body["error_details"]
    assert (await call(OM, {"event": LAGO}))[0] == 401
    assert (await call(OM, {"event": []}, **LAGO_AUTH))[0] == 400
    assert (await call("/api/v1/events/batch", b"{", **LAGO_AUTH))[0] == 400
    for timestamp in ("1795000000.123", 1795000000, None):
        assert (
            await call(OM, {"event": {**LAGO, "transaction_id": str(timestamp), "timestamp": timestamp}}, **LAGO_AUTH)
        )[0] == 200


# -- the sidecar's own: /meter and /webhook

RECORD = {"id": "r-1", "status": 200}
LINES = json.dumps(RECORD) + "\n" + json.dumps({"id": "r-2"}) + "\n"
SECRET = "a secret for signing"
NDJSON = {"Content_Type": "application/x-ndjson"}


def signed(body: str, *, identity: str = "k", at_s: float = NOW_S, secret: str = SECRET) -> dict[str, str]:
    stamp = str(int(at_s))
    entry = signature(secret_bytes(secret), identity, stamp, body.encode())
    return {**NDJSON, "webhook_id": identity, "webhook_timestamp": stamp, "webhook_signature": f"v1,bm8= {entry}"}


async def test_webhook_takes_lines_once_for_an_id(call: Caller) -> None:
    assert await call("/webhook", LINES, **NDJSON, webhook_id="k") == (204, None)
    assert await call("/webhook", LINES, **NDJSON, webhook_id="k") == (204, None)
    assert (await call("/webhook", LINES.replace("200", "201"), **NDJSON, webhook_id="k"))[0] == 409
    assert await call("/webhook", LINES, **NDJSON) == (204, None)
    assert call.verdicts == ["delivered", "duplicate", "refused", "delivered"]
    assert [record["id"] for record in call.receiver.billed("webhook")] == ["r-1", "r-2", "r-1", "r-2"]
    for bad in ("", "\n", "{", "[]\n", '{"id": 1}\n', LINES + "x"):
        assert (await call("/webhook", bad, **NDJSON))[0] == 400
    assert (await call("/webhook", LINES))[0] == 415


@pytest.mark.parametrize("secret", [SECRET, "whsec_" + base64.b64encode(b"sixteen bytes or").decode()])
async def test_webhook_checks_the_signature_when_it_has_the_secret(secret: str) -> None:
    clock = Clock()
    async with running_receiver(terms={"webhook": Terms(secret=secret)}, now=clock) as (receiver, session):
        caller = Caller(receiver, session, clock)
        good = signed(LINES, secret=secret)
        assert (await caller("/webhook", LINES, **good))[0] == 204
        assert (await caller("/webhook", LINES + LINES, **good))[0] == 401, "another body"
        assert (await caller("/webhook", LINES, **{**good, "webhook_id": "other"}))[0] == 401
        assert (await caller("/webhook", LINES, **signed(LINES, secret="another secret")))[0] == 401
        assert (await caller("/webhook", LINES, **signed(LINES, at_s=NOW_S - 301, secret=secret)))[0] == 401
        assert (await caller("/webhook", LINES, **signed(LINES, at_s=NOW_S + 300, secret=secret)))[0] == 204
        for missing in ("webhook_id", "webhook_timestamp", "webhook_signature"):
            assert (await caller("/webhook", LINES, **without(good, missing)))[0] == 401


def test_a_webhook_secret_that_is_no_base64_is_said_at_start() -> None:
    with pytest.raises(ValueError, match="goes on with no base64"):
        Receiver(terms={"webhook": Terms(secret="whsec_%%%")})


async def test_meter_takes_an_array_whole_or_not_at_all(call: Caller) -> None:
    assert await call("/meter", [METER, METER], Idempotency_Key="k") == (200, {"accepted": 2})
    assert await call("/meter", [METER, METER], Idempotency_Key="k") == (200, {"accepted": 2})
    status, body = await call("/meter", [METER], Idempotency_Key="k")
    assert (status, body["code"]) == (409, "idempotency_key_mismatch")
    status, body = await call("/meter", [METER, without(METER, "method")])
    assert (status, body["index"]) == (400, 1)
    assert (await call("/meter", []))[0] == 400
    assert (await call("/meter", METER))[0] == 400
    assert call.verdicts == ["delivered", "duplicate", *["refused"] * 4]
    assert len(call.receiver.billed("meter")) == 2
