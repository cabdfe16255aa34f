"""What is peculiar to one vendor's contract: each rule of its page, against a server or the strict receiver."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import time_ns
from typing import Any
from urllib.parse import parse_qs, parse_qsl, urlsplit

import orjson
import pytest
from support.backend_fixtures import (
    SECRET,
    T0_NS,
    Request,
    ScriptedServer,
    answer,
    kinds_of,
    record,
    record_id,
    records,
    usage,
)
from support.backend_trials import made

from sidecar.backends import BACKENDS, Context, backend_settings
from sidecar.backends.flexprice import FlexpriceBackend
from sidecar.backends.lago import LagoBackend
from sidecar.backends.ledgerbee import LedgerbeeBackend
from sidecar.backends.openmeter import OpenmeterBackend
from sidecar.backends.revenium import completion
from sidecar.backends.revenium.backend import ReveniumBackend
from sidecar.backends.revenium.transaction import elements
from sidecar.backends.stripe.backend import StripeBackend
from sidecar.backends.stripe.reports import Complaint, ReportError, read_report
from sidecar.dev.mock_backends import Receiver, Terms
from sidecar.meters.definition import DEFAULT_METERS, read_meters
from sidecar.model.delivery import (
    KEY_MISMATCH,
    Blocked,
    Dedup,
    Delivered,
    Duplicate,
    Encoded,
    Event,
    Refused,
    Retry,
    Undone,
    Unknown,
    Verdict,
)
from sidecar.model.exchange import Outcome, Subscriber, Usage, UsageState
from sidecar.settings import load

NOBODY = record(1, subscriber=None)
HASHED = record(2, subscriber=Subscriber("key_" + "0f" * 16, "header:x-api-key"))
KNOWN = {"acme": "cus_acme", "key_" + "0f" * 16: "cus_hashed"}


Vendor = Callable[..., Awaitable[Receiver]]


@pytest.fixture
async def vendor() -> AsyncIterator[Vendor]:
    """Starts a stand-in of one vendor that knows the key `k`."""
    async with AsyncExitStack() as stack:

        async def start(name: str, **options: Any) -> Receiver:
            receiver = Receiver(terms={name: Terms(key="k")}, **options)
            await receiver.start()
            stack.push_async_callback(receiver.aclose)
            return receiver

        yield start


def only(encoded: Encoded) -> Any:
    (sealed,) = encoded.sealed
    return orjson.loads(sealed.body)


def cost(total: str | None, currency: str = "USD", **parts: str) -> dict[str, Any]:
    state = "unpriced" if total is None else "exact"
    return {"currency": currency, "total": total, "parts": parts, "state": state, "source": "custom", "model": "m"}


# Customers


@pytest.mark.parametrize("name", ["ledgerbee", "stripe", "flexprice", "openmeter", "lago"])
async def test_who_cannot_be_billed_is_parked_until_a_mapping_says_who_it_is(name: str, tmp_path: Path) -> None:
    row = BACKENDS[name]
    values = {s.name: s.default_value() for s in row.settings}
    key = next(s for s in row.settings if s.name == "api_key")
    values["api_key"] = key.value(SECRET)
    nobody = row.make(values, Context(data_dir=tmp_path))
    assert nobody.encode([NOBODY, HASHED]).parked == {NOBODY.id: "no_customer", HASHED.id: "no_customer"}
    mapped = row.make(values, Context(data_dir=tmp_path, subscribers={"key_" + "0f" * 16: {name: "cus_hashed"}}))
    encoded = mapped.encode([HASHED])
    assert encoded.parked == {}
    assert all(b"cus_hashed" in sealed.body for sealed in encoded.sealed)
    assert all(b"0f0f" not in sealed.body.replace(b'"subscriber":"key_' + b"0f" * 16, b"") for sealed in encoded.sealed)
    emptied = row.make(values, Context(data_dir=tmp_path, subscribers={"key_" + "0f" * 16: {name: ""}}))
    assert emptied.encode([HASHED]).parked == {HASHED.id: "no_customer"}, "nobody is billed under an empty name"
    for backend in (nobody, mapped, emptied):
        await backend.aclose()


@pytest.mark.parametrize("name", ["ledgerbee", "stripe", "flexprice", "openmeter", "lago"])
async def test_what_becomes_of_who_cannot_be_billed_may_be_set(name: str, tmp_path: Path) -> None:
    row = BACKENDS[name]
    values = {s.name: s.default_value() for s in row.settings}
    values["api_key"] = next(s for s in row.settings if s.name == "api_key").value(SECRET)
    skips = row.make(values | {"no_customer": "skip"}, Context(data_dir=tmp_path))
    assert skips.encode([NOBODY, HASHED]).skipped == {NOBODY.id: "no_customer", HASHED.id: "no_customer"}
    sends = row.make(values | {"no_customer": "send"}, Context(data_dir=tmp_path))
    encoded = sends.encode([NOBODY, HASHED])
    assert encoded.parked == {NOBODY.id: "no_customer"}, "there is no id to send it under"
    assert encoded.sealed
    assert all(b"key_" + b"0f" * 16 in sealed.body for sealed in encoded.sealed)
    for backend in (skips, sends):
        await backend.aclose()


def test_a_subscriber_that_is_no_hash_is_the_customer_but_at_stripe() -> None:
    plain = record(1, subscriber=Subscriber("tenant-7", "header:x-tenant"))
    assert only(made(FlexpriceBackend, api_key="k").encode([plain]))["events"][0]["external_customer_id"] == "tenant-7"
    assert made(StripeBackend, api_key="k").encode([plain]).parked == {plain.id: "no_customer"}
    theirs = record(1, subscriber=Subscriber("cus_7", "header:x-tenant"))
    assert len(made(StripeBackend, api_key="k").encode([theirs]).sealed) == 3


# Revenium


@pytest.mark.parametrize("mode", ["meter", "event", "rate", "ingest", "events", "completions"])
def test_revenium_sends_unknown_ones_again_only_where_told_and_only_without_a_key(mode: str, tmp_path: Path) -> None:
    def from_environment(**said: str) -> Any:
        environ = {
            "SIDECAR_UPSTREAM_URL": "http://127.0.0.1:9",
            "SIDECAR_BACKENDS": "revenium",
            "SIDECAR_REVENIUM_API_KEY": "k",
            "SIDECAR_REVENIUM_MODE": mode,
            "SIDECAR_REVENIUM_SOURCE_ID": "s",
            **said,
        }
        values = load(environ, backend_settings=backend_settings()).backend("revenium")
        return BACKENDS["revenium"].make(values, Context(data_dir=tmp_path))

    assert not from_environment().abilities.resend_unknown
    assert not from_environment(SIDECAR_REVENIUM_ON_UNKNOWN="park").abilities.resend_unknown
    told = from_environment(SIDECAR_REVENIUM_ON_UNKNOWN="resend").abilities
    assert told.resend_unknown == (told.dedup is Dedup.NONE) == (mode not in ("events", "completions"))


def test_revenium_event_halves_are_joined_and_timed() -> None:
    backend = made(ReveniumBackend, api_key="k", mode="event", api_id="asset-1")
    request, response = (orjson.loads(sealed.body) for sealed in backend.encode([record(1)]).sealed)
    assert request["requestId"] == response["requestId"] == record_id(1)
    assert (request["eventType"], response["eventType"]) == ("REQUEST", "RESPONSE")
    assert response["currentMillis"] - request["currentMillis"] == 1840
    assert request["currentMillis"] == (T0_NS + 1_000_000) // 1_000_000
    assert request["uri"] == "/v1/chat/completions"
    assert (request["responseCode"], response["responseCode"]) == (200, 200)
    assert (request["requestMessageSize"], response["responseMessageSize"]) == (412, 5120)
    assert request["assetId"] == "asset-1"
    assert response["backendLatency"] == 212.4
    assert "input-tokens=43" in response["metadata"]
    ids = [sealed.events[0].event_id for sealed in backend.encode([record(1)]).sealed]
    assert ids == [f"{record_id(1)}:request", f"{record_id(1)}:response"]


def test_revenium_is_told_numbers_in_digits() -> None:
    units: dict[str, int | float | str] = {
        "unit_a": 1e-05,
        "unit_b": 1e16,
        "unit_c": 0.1 + 0.2,
        "unit_d": 10**17,
        "unit_e": "2.50",
        "unit_f": "much",
    }
    told = {one["name"]: one["value"] for one in elements(Usage(usage_state=UsageState.FINAL, units=units))}
    assert [told[f"unit-{letter}"] for letter in "abcdef"] == [
        "0.00001", "10000000000000000", "0.30000000000000004", "100000000000000000", "2.50", "much",
    ]  # fmt: skip


def test_revenium_rate_and_ingest() -> None:
    rate = made(ReveniumBackend, api_key="k", mode="rate", source_id="src-1")
    body = only(rate.encode([record(1)]))
    assert body["sourceId"] == "src-1"
    assert body["subscriberCredentialId"] == "acme"
    assert body["payload"]["input-tokens"] == "43"
    assert body["payload"]["api-calls"] == "1"
    old = made(ReveniumBackend, api_key="k", mode="rate", source_id="s", rate_field="subscription")
    assert only(old.encode([record(1)]))["subscriptionId"] == "acme"
    ingest = made(ReveniumBackend, api_key="k", mode="ingest", source_id="src 4&5")
    (sealed,) = ingest.encode([record(1, subscriber=Subscriber("a b", "jwt:sub"))]).sealed
    assert parse_qs(urlsplit(sealed.path).query) == {"sourceId": ["src 4&5"], "subscriptionId": ["a b"]}
    assert sealed.headers == (("x-revenium-source-type", "custom"),)
    assert all(isinstance(value, str) for value in orjson.loads(sealed.body).values())
    for mode in ("rate", "ingest"):
        with pytest.raises(ValueError, match="SIDECAR_REVENIUM_SOURCE_ID"):
            made(ReveniumBackend, api_key="k", mode=mode)
    unreachable = record(1, status=502, outcome=Outcome.UNREACHABLE, first_byte_ms=None, usage=None)
    assert rate.encode([unreachable]).skipped == {unreachable.id: "nothing_to_rate"}


def test_revenium_completion_of_a_plain_call() -> None:
    backend = made(ReveniumBackend, api_key="k", mode="completions", customers={"acme": "sub-1"})
    call = record(1, trace_id="abc", dimensions={"agent": "bot", "organization_name": "Acme", "other": "x"})
    (sealed,) = backend.encode([call]).sealed
    assert sealed.path == "/meter/v2/ai/completions"
    body = orjson.loads(sealed.body)
    assert (body["inputTokenCount"], body["outputTokenCount"], body["totalTokenCount"]) == (43, 97, 140)
    assert body["cacheReadTokenCount"] == 0
    assert "cacheCreationTokenCount" not in body, "what was not reported is left out, not zero"
    assert body["model"] == "gpt-5-mini-2025-08-07"
    assert body["provider"] == "openai"
    assert (body["stopReason"], body["operationType"], body["costType"], body["isStreamed"]) == (
        "END",
        "CHAT",
        "AI",
        True,
    )
    assert body["requestTime"] == "2026-11-21T09:00:00.124456Z"
    assert body["completionStartTime"] == "2026-11-21T09:00:00.336856Z"
    assert body["responseTime"] == "2026-11-21T09:00:01.965356Z"
    assert (body["requestDuration"], body["timeToFirstToken"]) == (1840, 212)
    assert body["subscriber"] == {"id": "sub-1"}
    assert (body["agent"], body["organizationName"], body["traceId"]) == ("bot", "Acme", "abc")
    assert "other" not in body


async def test_revenium_is_told_costs_where_asked_rounded_and_only_known_ones(vendor: Vendor) -> None:
    receiver = await vendor("revenium")
    backend = made(ReveniumBackend, api_key="k", mode="completions", costs="true", url=receiver.url)
    parts = {
        "input": "0.000875",
        "input_audio": "0.000000000049",
        "output": "0.002",
        "output_reasoning": "0.001",
        "cache_read": "0.0000375",
        "cache_write_5m": "0.00000000005",
        "cache_write_1h": "0.0000000001",
        "web_searches": "0.01",
        "meter:pages": "0.5",
    }
    priced = record(1, cost=cost("0.513912500199", **parts))
    free, declared = record(2, cost=cost("0")), record(3, cost=cost("0.25") | {"state": "declared"})
    unknown = [record(4, cost=cost(None)), record(5, cost=cost("3", "EUR")), record(6)]
    nobody_priced = record(7, usage=usage(cost_usd="0.00000000015"))
    for sealed in backend.encode([priced, free, declared, *unknown, nobody_priced]).sealed:
        assert await backend.send(sealed) == [Delivered()]
    await backend.aclose()
    sent = [{k: v for k, v in body.items() if k.endswith("Cost")} for body in receiver.billed("revenium")]
    assert sent == [
        {
            "inputTokenCost": 0.000875,
            "outputTokenCost": 0.003,
            "cacheReadTokenCost": 0.0000375,
            "cacheCreationTokenCost": 0.0000000002,
            "totalCost": 0.5139125002,
        },
        dict.fromkeys(
            ("inputTokenCost", "outputTokenCost", "cacheReadTokenCost", "cacheCreationTokenCost", "totalCost"), 0
        ),
        {"totalCost": 0.25},
        {},
        {},
        {},
        {"totalCost": 0.0000000002},
    ]
    (sealed,) = made(ReveniumBackend, api_key="k", mode="completions").encode([priced]).sealed
    assert b'Cost"' not in sealed.body, "nobody asked for them"
    with pytest.raises(ValueError, match="SIDECAR_REVENIUM_COSTS: the mode events has no field for costs"):
        made(ReveniumBackend, api_key="k", mode="events", costs="true")


def test_revenium_completions_mode_reports_the_rest_as_events() -> None:
    backend = made(ReveniumBackend, api_key="k", mode="completions")
    for call in (
        record(1, usage=None),
        record(2, usage=usage(output_tokens=None)),
        record(3, usage=usage(model=None, request_model=None)),
    ):
        (sealed,) = backend.encode([call]).sealed
        assert sealed.path == "/meter/v2/events"
        assert orjson.loads(sealed.body)["transactionId"] == call.id
    body = only(
        backend.encode([record(1, usage=usage(output_tokens=None, units={"pages": 3, "audio_seconds": "1.50"}))])
    )
    assert body["payload"] == {
        "api-calls": 1,
        "input-tokens": 43,
        "total-tokens": 140,
        "cache-read-input-tokens": 0,
        "pages": 3,
        "audio-seconds": 1.5,
    }


OF_CLAUDE = {
    "input_tokens": 1150, "output_tokens": 10, "total_tokens": 1160, "cache_read_input_tokens": 1000,
    "cache_write_input_tokens": 50,
}  # fmt: skip
IN_ANTHROPICS_NAMES = {
    "input_tokens": 100, "output_tokens": 10, "cache_read_input_tokens": 1000, "cache_creation_input_tokens": 50,
}  # fmt: skip
IN_OPENAIS_NAMES = {
    "prompt_tokens": 1150, "completion_tokens": 10, "total_tokens": 1160,
    "prompt_tokens_details": {"cached_tokens": 1000, "cache_write_tokens": 50},
}  # fmt: skip


@pytest.mark.parametrize(
    ("said", "counts"),
    [
        (usage(), (43, 97, 140)),
        (
            usage(provider="anthropic", input_tokens=1000, cache_read_input_tokens=700, cache_write_input_tokens=200,
                  output_tokens=50, total_tokens=1050, raw_usage=None),
            (100, 50, 150),
        ),
        *((usage(provider=provider, **OF_CLAUDE, raw_usage=IN_ANTHROPICS_NAMES), (100, 10, 110))
          for provider in ("anthropic", "gcp.vertex_ai", "aws.bedrock", "openrouter", "deepseek")),
        *((usage(provider=provider, **OF_CLAUDE, raw_usage=IN_OPENAIS_NAMES), (1150, 10, 1160))
          for provider in ("anthropic", "gcp.vertex_ai", "aws.bedrock", "openrouter")),
        (
            usage(provider="gcp.gemini", input_tokens=30, output_tokens=90, reasoning_output_tokens=60,
                  total_tokens=120,
                  raw_usage={"promptTokenCount": 30, "candidatesTokenCount": 30, "totalTokenCount": 120}),
            (30, 30, 120),
        ),
        (
            usage(provider="gcp.vertex_ai", input_tokens=30, output_tokens=90, reasoning_output_tokens=60,
                  total_tokens=120, raw_usage=None),
            (30, 30, 120),
        ),
        (
            usage(provider="gcp.vertex_ai", input_tokens=30, output_tokens=90, reasoning_output_tokens=60,
                  total_tokens=120, raw_usage={"prompt_tokens": 30, "completion_tokens": 90, "total_tokens": 120}),
            (30, 90, 120),
        ),
        (
            usage(provider="aws.bedrock", input_tokens=5, cache_read_input_tokens=9, output_tokens=1,
                  raw_usage={"inputTokens": 0, "outputTokens": 1, "totalTokens": 10, "cacheReadInputTokens": 9}),
            (0, 1, 1),
        ),
        (usage(input_tokens=None), None),
        (usage(output_tokens=None), None),
        (usage(total_tokens=None), (43, 97, 140)),
    ],
)  # fmt: skip
def test_native_counts_are_the_vendors_own(said: Usage, counts: tuple[int, int, int] | None) -> None:
    assert completion.counts(said) == counts


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, "END"),
        ({"usage": usage(finish_reasons=["tool_calls"])}, "END"),
        ({"usage": usage(finish_reasons=["stop_sequence"])}, "END_SEQUENCE"),
        ({"usage": usage(finish_reasons=["max_tokens"])}, "TOKEN_LIMIT"),
        ({"usage": usage(finish_reasons=["MAX_TOKENS"])}, "TOKEN_LIMIT"),
        ({"usage": usage(finish_reasons=["SAFETY"])}, "ERROR"),
        ({"usage": usage(finish_reasons=["refusal"])}, "ERROR"),
        ({"usage": usage(finish_reasons=["cancelled"])}, "CANCELLED"),
        ({"usage": usage(finish_reasons=["something new"])}, "END"),
        ({"usage": usage(finish_reasons=[])}, "END"),
        ({"outcome": Outcome.UPSTREAM_TIMEOUT}, "TIMEOUT"),
        ({"outcome": Outcome.UPSTREAM_BROKE}, "ERROR"),
        ({"status": 500}, "ERROR"),
        ({"outcome": Outcome.CLIENT_LEFT, "usage": usage(usage_state=UsageState.PARTIAL)}, "CANCELLED"),
        ({"outcome": Outcome.CLIENT_LEFT}, "END"),
    ],
)
def test_stop_reasons(changes: Mapping[str, Any], reason: str) -> None:
    assert completion.stop_reason(record(1, **changes)) == reason


async def test_revenium_v2_conflicts(tmp_path: Path) -> None:
    async with ScriptedServer().running() as server:
        backend = made(ReveniumBackend, api_key="k", mode="events", url=server.url)
        (sealed,) = backend.encode([record(1)]).sealed
        for reply, verdict in (
            (answer(409, b'{"code": "idempotency_key_mismatch"}'), Refused(KEY_MISMATCH)),
            (answer(409, b'{"code": "idempotency_key_in_progress"}', Retry_After="2"), Retry("http_409", 2.0)),
            (answer(409, b'{"code": "idempotency_key_in_progress"}'), Retry("http_409")),
            (answer(409, b"?", Retry_After="1"), Retry("http_409", 1.0)),
            (answer(409), Refused(KEY_MISMATCH)),
            (answer(422, b'{"title": "Idempotency-Key is already used"}'), Refused(KEY_MISMATCH)),
            (answer(422), Refused("http_422")),
            (answer(422, x_should_retry="true"), Retry("http_422")),
            (answer(422, x_should_retry="false"), Refused("http_422")),
        ):
            server.says(reply)
            assert await backend.send(sealed) == [verdict]
        assert server.requests[0].headers["idempotency-key"] == record_id(1)
        assert server.requests[0].headers["x-api-key"] == "k"
        await backend.aclose()


async def test_revenium_sends_what_another_mode_sealed_where_it_belongs() -> None:
    async with ScriptedServer().running() as server:
        (old,) = made(ReveniumBackend, api_key="k", mode="meter").encode([record(1)]).sealed
        now = made(ReveniumBackend, api_key="k", mode="completions", url=server.url)
        await now.send(old)
        assert server.requests[0].target == "/meter/v1/api/meter"
        assert "idempotency-key" not in server.requests[0].headers
        await now.aclose()


# LedgerBee


async def test_ledgerbee_reports_each_meter_under_its_name_there() -> None:
    async with ScriptedServer(script=lambda _: answer(202, b'{"status": "queued"}')).running() as server:
        both = "input_tokens=0199aaaa-0000-7000-8000-000000000001,api_calls=calls"
        backend = made(LedgerbeeBackend, api_key="k", url=server.url + "/api", meters=both)
        sealed = backend.encode([record(1)]).sealed
        assert [s.events[0].event_id for s in sealed] == [f"{record_id(1)}:input_tokens", f"{record_id(1)}:api_calls"]
        for each in sealed:
            assert await backend.send(each) == [Delivered()]
        first, second = server.requests
        assert first.target == "/api/v1/meters/report"
        assert first.headers["x-api-idempotency-key"] == f"{record_id(1)}:input_tokens"
        body = orjson.loads(first.body)
        assert set(body) == {"value", "customerId", "meterId", "timestamp", "metadata"}
        assert (body["value"], body["timestamp"]) == (43, "2026-11-21T09:00:00.124456Z")
        assert orjson.loads(second.body)["meterName"] == "calls"
        verdict: Verdict
        for key, verdict in ((sealed[0].key, Duplicate()), ("another", Unknown("others_answer"))):
            said = orjson.dumps({"status": "duplicate", "idempotencyKey": key})
            server.says(answer(200, said))
            assert await backend.send(sealed[0]) == [verdict]
        server.script = lambda _: answer(200, b'{"status": "duplicate"}')
        assert await backend.send(sealed[0]) == [Duplicate()]
        for reply, verdict in (
            (answer(403, b'{"code": "LICENSE.REQUIRED"}'), Blocked("LICENSE.REQUIRED")),
            (answer(400, b'{"code": "SHARED_VALIDATION_FAILED"}'), Refused("SHARED_VALIDATION_FAILED")),
            (answer(400, b'{"code": "a text with spaces, maybe a secret"}'), Refused("http_400")),
        ):
            server.says(reply)
            assert await backend.send(sealed[0]) == [verdict]
        await backend.aclose()


async def test_ledgerbee_is_examined(vendor: Vendor) -> None:
    receiver = await vendor("ledgerbee")
    good = made(LedgerbeeBackend, api_key="k", url=receiver.url)
    assert await good.examine() == []
    unknown = made(LedgerbeeBackend, api_key="k", url=receiver.url, meters="api_calls=unknown one & more")
    assert "no meter unknown one" in (await unknown.examine())[0]
    stranger = made(LedgerbeeBackend, api_key="other", url=receiver.url)
    assert len(await stranger.examine()) == 1
    await receiver.aclose()
    assert "does not answer" in (await good.examine())[0]
    for backend in (good, unknown, stranger):
        await backend.aclose()


def test_values_keep_all_their_digits() -> None:
    meters = read_meters([{"name": "cost", "aggregation": {"type": "SUM", "field": "cost_usd", "multiplier": "0.001"}}])
    call = record(1, usage=usage(cost_usd="0.12345678901234567890"))
    body = made(LedgerbeeBackend, api_key="k", definitions=meters).encode([call]).sealed[0].body
    assert b'"value":0.0001234567890123456789,' in body


# Stripe


async def test_stripe_v1_form() -> None:
    async with ScriptedServer().running() as server:
        backend = made(StripeBackend, api_key="sk_test", url=server.url, customers=KNOWN, meters="input_tokens")
        (sealed,) = backend.encode([record(1)]).sealed
        assert await backend.send(sealed) == [Delivered()]
        (request,) = server.requests
        assert dict(parse_qsl(request.body.decode())) == {
            "event_name": "input_tokens",
            "payload[stripe_customer_id]": "cus_acme",
            "payload[value]": "43",
            "identifier": f"{record_id(1)}:input_tokens",
            "timestamp": str(T0_NS // 10**9),
        }
        assert request.headers["content-type"] == "application/x-www-form-urlencoded"
        assert request.headers["authorization"] == "Bearer sk_test"
        assert "idempotency-key" not in request.headers
        assert sealed.subject == "cus_acme:input_tokens"
        assert backend.abilities.one_per_subject
        for reply, verdict in (
            (
                answer(400, b'{"error": {"message": "An event already exists with identifier x.", "type": "y"}}'),
                Duplicate(),
            ),
            (answer(400, b'{"error": {"code": "timestamp_too_far_in_past"}}'), Refused("timestamp_too_far_in_past")),
            (answer(400, b'{"error": {"message": "No such customer already exists"}}'), Refused("http_400")),
            (answer(400, b"already exists identifier"), Refused("http_400")),
            (answer(409), Retry("http_409")),
            (answer(400, Stripe_Should_Retry="true"), Retry("http_400")),
            (answer(500, Stripe_Should_Retry="false"), Retry("http_500")),
            (answer(429, Stripe_Rate_Limited_Reason="global-rate"), Retry("http_429")),
        ):
            server.says(reply)
            assert await backend.send(sealed) == [verdict], reply
        await backend.aclose()


def test_stripe_takes_whole_numbers_unless_told_otherwise() -> None:
    meters = read_meters(
        [
            {"name": "cost", "aggregation": {"type": "SUM", "field": "cost_usd"}},
            {"name": "calls", "aggregation": {"type": "COUNT"}},
        ]
    )
    call = record(1, usage=usage(cost_usd="0.25"))
    encoded = made(StripeBackend, api_key="k", definitions=meters, customers=KNOWN).encode([call])
    assert encoded.parked == {}
    assert [(e.event_id, why.reason, why.detail) for e, why in encoded.withheld.items()] == [
        (f"{call.id}:cost", "value_not_taken", "meter cost = 0.25")
    ]
    assert [e.event_id for s in encoded.sealed for e in s.events] == [f"{call.id}:calls"]  # the other meter goes
    whole = record(2, usage=usage(cost_usd="2.00"))
    assert len(made(StripeBackend, api_key="k", definitions=meters, customers=KNOWN).encode([whole]).sealed) == 2
    allowed = made(
        StripeBackend,
        api_key="k",
        definitions=meters,
        customers=KNOWN,
        customer_key="customer",
        value_key="amount",
        decimals="true",
    )
    fields = dict(parse_qsl(allowed.encode([call]).sealed[0].body.decode()))
    assert (fields["payload[amount]"], fields["payload[customer]"]) == ("0.25", "cus_acme")
    huge = record(3, usage=usage(input_tokens=10**15))
    encoded = made(StripeBackend, api_key="k", customers=KNOWN).encode([huge])
    assert {e.event_id: why.reason for e, why in encoded.withheld.items()} == {
        f"{huge.id}:input_tokens": "value_not_taken"
    }


@pytest.mark.parametrize("backend", [StripeBackend, LagoBackend])
def test_a_meter_that_cannot_be_computed_is_withheld_and_the_others_go(backend: type[Any]) -> None:
    meters = read_meters(
        [
            {"name": "calls", "event_name": "calls", "aggregation": {"type": "COUNT"}},
            {
                "name": "ratio",
                "event_name": "ratio",
                "aggregation": {"type": "SUM", "expression": "output_tokens / input_tokens"},
            },
        ]
    )
    odd, plain = record(1, usage=usage(input_tokens=0)), record(2)
    encoded = made(backend, definitions=meters, customers=KNOWN, api_key="k").encode([odd, plain])
    assert {e.event_id: (w.reason, w.detail) for e, w in encoded.withheld.items()} == {
        f"{odd.id}:ratio": ("value_not_computed", "meter ratio: division by zero")
    }
    sent = [event.event_id for sealed in encoded.sealed for event in sealed.events]
    assert sorted(sent) == [f"{odd.id}:calls", f"{plain.id}:calls", f"{plain.id}:ratio"]
    assert not encoded.parked
    alone = made(backend, definitions=meters[1:], customers=KNOWN, api_key="k")
    assert list(alone.encode([odd]).withheld) == [Event(odd.id, f"{odd.id}:ratio")]
    assert alone.encode([odd]).skipped == {}


def micro(multiplier: str, field: str = "cost_usd") -> dict[str, Any]:
    return {"name": "micro", "aggregation": {"type": "SUM", "field": field, "multiplier": multiplier}}


@pytest.mark.parametrize(
    ("total", "multiplier", "decimals", "sent"),
    [
        ("0.00020475", "1000000", "false", "205"), ("0.0000005", "1000000", "false", "0"),
        ("0.0000015", "1000000", "false", "2"), ("0.00000049", "1000000", "false", "0"),
        ("0", "1000000", "false", "0"), ("12.5", "1000000", "false", "12500000"),
        ("0.00020475", "1000000000", "false", "204750"), ("0.00020475", "1000000", "true", "204.75"),
        ("123456789.123456789012", "1000000", "true", "123456789123457"),
        ("1234567890.1234567", "1000000", "false", None), ("0.255", "100", "false", None),
    ],
)  # fmt: skip
async def test_stripe_is_told_money_in_whole_millionths_rounded_once(
    vendor: Vendor, total: str, multiplier: str, decimals: str, sent: str | None
) -> None:
    receiver = await vendor("stripe")
    definitions = read_meters([micro(multiplier)])
    backend = made(
        StripeBackend, api_key="k", url=receiver.url, definitions=definitions, customers=KNOWN, decimals=decimals
    )
    call = record(1, started_ns=time_ns(), cost=cost(total))
    encoded, again = backend.encode([call]), backend.encode([call])
    assert [one.body for one in encoded.sealed] == [one.body for one in again.sealed], "a redrive says the same"
    for one in encoded.sealed:
        assert await backend.send(one) == [Delivered()]
        assert await backend.send(one) == [Duplicate()]
    await backend.aclose()
    told = [row["payload"]["value"] for row in receiver.billed("stripe")]
    assert told == ([] if sent is None else [sent])
    assert [why.reason for why in encoded.withheld.values()] == (["value_not_taken"] if sent is None else [])


def test_stripe_rounds_nothing_but_money_and_makes_no_event_of_an_unknown_cost() -> None:
    backend = made(StripeBackend, api_key="k", definitions=read_meters([micro("1000000")]), customers=KNOWN)
    unknown = record(1, cost=cost(None))
    assert backend.encode([unknown]).skipped == {unknown.id: "no_value"}
    halves = made(
        StripeBackend, api_key="k", definitions=read_meters([micro("1000000.5", "input_tokens")]), customers=KNOWN
    )
    (why,) = halves.encode([record(2)]).withheld.values()
    assert why.reason == "value_not_taken"
    charged = made(StripeBackend, api_key="k", definitions=read_meters([micro("1000000", "charge")]), customers=KNOWN)
    (sealed,) = charged.encode([record(3, cost=cost(None), charge=cost("0.0000015", "EUR"))]).sealed
    assert dict(parse_qsl(sealed.body.decode()))["payload[value]"] == "2"


@pytest.mark.parametrize("name", ["stripe", "lago", "ledgerbee"])
def test_a_meter_that_a_backend_cannot_take_is_refused_by_name(name: str, tmp_path: Path) -> None:
    row = BACKENDS[name]
    values = {s.name: s.default_value() for s in row.settings}
    values["api_key"] = next(s for s in row.settings if s.name == "api_key").value("k")
    tables = [
        {"name": "models", "aggregation": {"type": "UNIQUE_COUNT", "field": "model"}},
        {"name": "calls", "aggregation": {"type": "COUNT"}},
    ]
    context = Context(data_dir=tmp_path, meters=tables)
    with pytest.raises(ValueError, match=f"the meter models is a UNIQUE_COUNT.*SIDECAR_{name.upper()}_METERS"):
        row.make(values, context)
    setting = next(s for s in row.settings if s.name == "meters")
    assert row.make({**values, "meters": setting.kind.parse("calls")}, context).name == name
    with pytest.raises(ValueError, match=r"^SIDECAR_\w+_METERS: nonsense is no meter; the meters are: models, calls"):
        row.make({**values, "meters": setting.kind.parse("nonsense")}, context)


class Clock:
    def __init__(self) -> None:
        self.now_s = T0_NS / 1e9

    def __call__(self) -> float:
        return self.now_s


async def test_stripe_stream_makes_one_session_for_all_and_renews_it_in_time(vendor: Vendor) -> None:
    clock = Clock()
    receiver = await vendor("stripe", now=clock)
    backend = made(
        StripeBackend,
        api_key="k",
        mode="stream",
        url=receiver.url,
        stream_url=receiver.url,
        customers=KNOWN,
        clock=clock,
    )
    encoded = backend.encode(records(100))
    assert [len(sealed.events) for sealed in encoded.sealed] == [100, 100, 100]
    sent = await asyncio.gather(*(backend.send(sealed) for sealed in encoded.sealed))
    assert sent == [[Delivered()] * 100] * 3
    assert backend._session._token is not None
    first = backend._session._token
    assert "token_receiver_1_" in first, "three requests at once share one session"
    clock.now_s += 839
    await backend.send(encoded.sealed[0])
    assert backend._session._token == first
    clock.now_s += 2
    await backend.send(encoded.sealed[0])
    assert backend._session._token != first, "a token is not used in its last minute"
    assert len(receiver.billed("stripe")) == 300
    await backend.aclose()


def at_the_session(reply: bytes | None, request: Request) -> bytes | None:
    return reply if "session" in request.target else answer(200)


async def test_stripe_stream_renews_a_session_that_is_turned_down_once() -> None:
    sessions = 0

    def script(request: Request) -> bytes | None:
        nonlocal sessions
        if request.target.endswith("session"):
            sessions += 1
            return answer(200, b'{"authentication_token": "tok-%d", "expires_at": "nonsense"}' % sessions)
        good = request.headers["authorization"] == "Bearer tok-2"
        return answer(200) if good else answer(401, b'{"error": {"code": "billing_meter_event_session_expired"}}')

    async with ScriptedServer(script=script).running() as server:
        backend = made(
            StripeBackend, api_key="k", mode="stream", url=server.url, stream_url=server.url, customers=KNOWN
        )
        (sealed,) = backend.encode([record(1)]).sealed
        assert await backend.send(sealed) == [Delivered()] * 3
        assert sessions == 2
        assert all("stripe-version" in request.headers for request in server.requests)
        assert "tok-" not in repr(backend._session)
        server.script = lambda r: (
            answer(200, b'{"authentication_token": "t"}') if "session" in r.target else answer(401)
        )
        backend._session.forget("tok-2")
        assert await backend.send(sealed) == [Blocked("unauthorized")] * 3
        for reply, verdict in (
            (None, Retry("session_reset")),
            (answer(503, Retry_After="4"), Retry("http_503", 4.0)),
            (answer(401), Blocked("unauthorized")),
            (answer(400), Blocked("no_session")),
            (answer(200, b"{}"), Blocked("no_session")),
            (answer(200, b'{"authentication_token": "a\\r\\nb: c"}'), Blocked("no_session")),
        ):
            backend._session.forget(str(backend._session._token))
            server.script = partial(at_the_session, reply)
            assert await backend.send(sealed) == [verdict] * 3
        await backend.aclose()


async def test_stripe_stream_of_which_one_event_is_there_already() -> None:
    """The refusal is of the whole request: only the event that it names is a repeat, and the others were not taken."""
    said = ""

    def script(request: Request) -> bytes | None:
        if request.target.endswith("session"):
            return answer(200, b'{"authentication_token": "t"}')
        return answer(400, orjson.dumps({"error": {"code": "duplicate_meter_event", "message": said}}))

    async with ScriptedServer(script=script).running() as server:
        backend = made(
            StripeBackend, api_key="k", mode="stream", url=server.url, stream_url=server.url, customers=KNOWN
        )
        (sealed,) = backend.encode([record(1)]).sealed
        named, there = Retry("refused_with_others"), sealed.events[1].event_id
        for said, verdicts in (  # noqa: B007 - read by the script
            (f"An event already exists with identifier {there}.", [named, Duplicate(), named]),
            ("An event already exists with this identifier", [Refused("duplicate_meter_event")] * 3),
            ("An event already exists with identifier 0199aaaa-other:x", [Unknown("others_answer")] * 3),
        ):
            assert await backend.send(sealed) == verdicts
        await backend.aclose()


async def test_stripe_windows_and_duplicates_at_the_receiver(vendor: Vendor) -> None:
    clock = Clock()
    receiver = await vendor("stripe", now=clock)
    for mode in ("v1", "v2"):
        backend = made(StripeBackend, api_key="k", mode=mode, url=receiver.url, customers=KNOWN, meters="api_calls")
        assert backend.abilities.age_max_s == 35 * 86_400
        late, ahead, good = (
            backend.encode([record(number, started_ns=T0_NS + offset_s * 10**9)]).sealed[0]
            for number, offset_s in ((1, -35 * 86_400 - 60), (2, 400), (3 if mode == "v1" else 4, 0))
        )
        assert await backend.send(late) == [Refused("timestamp_too_far_in_past")]
        assert await backend.send(ahead) == [Refused("timestamp_in_future")]
        assert await backend.send(good) == [Delivered()]
        assert await backend.send(good) == [Duplicate()]
        for _ in range(2):  # asked again after a lost answer, it does no harm
            assert await backend.cancel(good.events[0], None) == Undone(Delivered())
        unknown = await backend.cancel(Event("nobody", "nobody:api_calls"), None)
        assert unknown == Undone(Refused("resource_missing" if mode == "v1" else "not_found"))
        await backend.aclose()


async def test_stripe_meters_are_compared_and_created_and_never_changed(vendor: Vendor) -> None:
    receiver = await vendor("stripe")
    backend = made(StripeBackend, api_key="k", url=receiver.url)
    assert len(await backend.examine()) == 3
    for meter in DEFAULT_METERS:
        assert "created" in (await backend.provision(meter)).text
        assert "it fits" in (await backend.provision(meter)).text
    assert await backend.examine() == []
    other = made(StripeBackend, api_key="k", url=receiver.url, customer_key="customer", value_key="amount")
    problems = await other.examine()
    assert any("SIDECAR_STRIPE_CUSTOMER_KEY" in problem for problem in problems)
    assert any("SIDECAR_STRIPE_VALUE_KEY" in problem for problem in problems)
    changed = read_meters([{"name": "input_tokens", "aggregation": {"type": "LATEST", "field": "input_tokens"}}])
    told = await backend.provision(changed[0])
    assert not told.fits
    assert "works with sum" in told.text
    assert "left as it is" in told.text
    greatest = read_meters([{"name": "longest", "aggregation": {"type": "MAX", "field": "duration_ms"}}])
    assert not (await backend.provision(greatest[0])).fits
    await receiver.aclose()
    assert "does not answer" in (await backend.examine())[0]
    async with ScriptedServer().running() as server:
        row = {
            "event_name": "api_calls",
            "event_time_window": "hour",
            "default_aggregation": {"formula": "count"},
            "customer_mapping": {"event_payload_key": "stripe_customer_id"},
            "id": "mtr_1",
        }
        server.script = lambda _: answer(200, orjson.dumps({"data": [row], "has_more": True}))
        windowed = made(StripeBackend, api_key="k", url=server.url, meters="api_calls")
        assert ["overwrite each other" in problem for problem in await windowed.examine()] == [True]
        assert len(server.requests) == 2, "a list without an end is not followed for ever"
        await windowed.aclose()
    await backend.aclose()
    await other.aclose()


def test_stripes_late_complaints_are_read() -> None:
    document = {
        "id": "evt_1",
        "type": "v1.billing.meter.error_report_triggered",
        "related_object": {"id": "mtr_1"},
        "data": {
            "developer_message_summary": "There are 3 invalid events",
            "reason": {
                "error_count": 12,
                "error_types": [
                    {
                        "code": "meter_event_customer_not_found",
                        "error_count": 10,
                        "sample_errors": [
                            {"error_message": "…", "request": {"identifier": f"{record_id(1)}:api_calls"}},
                            {"error_message": "…", "request": {"idempotency_key": f"{record_id(2)}:api_calls"}},
                            {"error_message": "…", "request": None},
                        ],
                    },
                    {"code": "timestamp_too_far_in_past", "error_count": 2, "sample_errors": None},
                ],
            },
        },
    }
    report = read_report(orjson.dumps(document))
    assert report.meter == "mtr_1"
    assert report.error_count == 12
    assert report.counts == {"meter_event_customer_not_found": 10, "timestamp_too_far_in_past": 2}
    assert report.complaints == (
        Complaint(f"{record_id(1)}:api_calls", "meter_event_customer_not_found"),
        Complaint(f"{record_id(2)}:api_calls", "meter_event_customer_not_found"),
    )
    assert [c.record_id for c in report.complaints] == [record_id(1), record_id(2)]
    assert report.unnamed == 10
    assert read_report(orjson.dumps(document["data"])).complaints == report.complaints


@pytest.mark.parametrize(
    ("document", "word"),
    [(b"", "no JSON"), (b"[]", "no JSON object"), (b'{"type": "customer.created"}', "another type"),
     (b'{"type": "v1.billing.meter.no_meter_found"}', "fetch the whole event"), (b" " * 2**21, "larger than")],
)  # fmt: skip
def test_what_is_no_report_is_said(document: bytes, word: str) -> None:
    with pytest.raises(ReportError, match=word):
        read_report(document)


# Flexprice, OpenMeter, Lago


async def test_flexprice_events_have_id_time_and_numbers(vendor: Vendor) -> None:
    backend = made(FlexpriceBackend, api_key="k", url="https://api.example.com/v1", environment_id="env-1")
    assert backend.address == "https://api.example.com"
    (event,) = only(backend.encode([record(1, usage=usage(cost_usd="0.5", units={"pages": 2}))]))["events"]
    assert (event["event_id"], event["timestamp"]) == (record_id(1), "2026-11-21T09:00:00.124456Z")
    assert event["properties"]["input_tokens"] == 43
    assert event["properties"]["cost_usd"] == 0.5
    assert event["properties"]["unit_pages"] == 2
    assert event["properties"]["dimension_feature"] == "search"
    assert None not in event["properties"].values()
    assert backend.abilities.events_max == 1000
    assert backend.abilities.bytes_max == 32 * 2**20
    receiver = await vendor("flexprice")
    near = made(FlexpriceBackend, api_key="k", url=receiver.url + "/v1")
    (thousand,) = near.encode(records(1000)).sealed
    assert await near.send(thousand) == [Delivered()] * 1000
    for body in (b'{"events":[]}', b'{"events":[{"event_name":""}]}'):
        bad = type(thousand)(key="k", events=thousand.events[:1], body=body, path=thousand.path)
        assert await near.send(bad) == [Refused("validation_error")]
    await near.aclose()


async def test_money_goes_to_openmeter_as_text_and_to_flexprice_as_a_number_with_all_digits(vendor: Vendor) -> None:
    priced = record(1, cost=cost("1234567.000000000001"), charge=cost("0.00000025", "EUR"))
    calls = [priced, record(2, cost=cost(None)), record(3, cost=cost("0"))]
    receiver = await vendor("openmeter")
    backend = made(OpenmeterBackend, api_key="k", url=receiver.url)
    (batch,) = backend.encode(calls).sealed
    assert await backend.send(batch) == [Delivered()] * 3
    await backend.aclose()
    told = [{k: v for k, v in e["data"].items() if k in ("cost_usd", "charge")} for e in receiver.billed("openmeter")]
    assert told == [{"cost_usd": "1234567.000000000001", "charge": "0.00000025"}, {}, {"cost_usd": "0"}]
    receiver = await vendor("flexprice")
    backend = made(FlexpriceBackend, api_key="k", url=receiver.url)
    (batch,) = backend.encode(calls).sealed
    assert b'"cost_usd":1234567.000000000001,"charge":0.00000025' in batch.body
    assert await backend.send(batch) == [Delivered()] * 3
    text = batch.body.replace(b"0.00000025", b'"0.00000025"')
    assert await backend.send(replace(batch, body=text)) != [Delivered()] * 3, "a text adds up to nothing there"
    await backend.aclose()


@pytest.mark.parametrize("name", ["webhook", "file"])
def test_records_are_passed_on_with_cost_and_charge(name: str, tmp_path: Path) -> None:
    row = BACKENDS[name]
    values = {s.name: s.default_value() for s in row.settings}
    if name == "webhook":
        values["url"] = "http://127.0.0.1:9/"
    call = record(1, cost=cost("0.00020475", input="0.00020475"), charge=cost(None))
    (sealed,) = row.make(values, Context(data_dir=tmp_path)).encode([call]).sealed
    line = orjson.loads(sealed.body)
    assert (line["cost"], line["charge"]) == (call.cost, call.charge)


async def test_flexprice_meters_are_created_compared_and_left_alone(vendor: Vendor) -> None:
    receiver = await vendor("flexprice")
    backend = made(FlexpriceBackend, api_key="k", url=receiver.url)
    definitions = read_meters(
        [
            {
                "name": "calls",
                "aggregation": {"type": "COUNT"},
                "filters": [{"key": "method", "values": ["GET", "POST"]}],
            },
            {"name": "priced", "aggregation": {"type": "SUM", "field": "input_tokens", "multiplier": "0.001"}},
            {"name": "models", "aggregation": {"type": "UNIQUE_COUNT", "field": "model"}, "reset_usage": "NEVER"},
            {
                "name": "peak",
                "aggregation": {"type": "MAX", "field": "status", "bucket_size": "HOUR", "group_by": "model"},
            },
        ]
    )
    for meter in definitions:
        assert "created" in (await backend.provision(meter)).text, meter
        assert "it fits" in (await backend.provision(meter)).text
    there = {row["name"]: row for row in receiver.billed("flexprice")}
    assert there["calls"]["filters"] == [{"key": "method", "values": ["GET", "POST"]}]
    assert there["calls"]["event_name"] == "api_request"
    assert there["priced"]["aggregation"] == {
        "type": "SUM_WITH_MULTIPLIER",
        "field": "input_tokens",
        "multiplier": "0.001",
    }
    assert there["models"]["aggregation"]["type"] == "COUNT_UNIQUE"
    changed = read_meters([{"name": "calls", "aggregation": {"type": "SUM", "field": "status"}}])
    assert "differs in aggregation, filters: it is left as it is" in (await backend.provision(changed[0])).text
    odd = read_meters([{"name": "m", "aggregation": {"type": "MAX", "field": "status", "multiplier": "2"}}])
    assert "left out" in (await backend.provision(odd[0])).text
    assert len(receiver.billed("flexprice")) == 4
    await receiver.aclose()
    assert "does not answer" in (await backend.provision(changed[0])).text
    await backend.aclose()


async def test_openmeter_events_are_cloudevents_in_a_batch() -> None:
    async with ScriptedServer(script=lambda _: answer(204, b"")).running() as server:
        backend = made(OpenmeterBackend, url=server.url, source="site-1", event_type="llm", batch="2")
        first, second = backend.encode(records(3)).sealed
        assert await backend.send(first) == [Delivered()] * 2
        (request,) = server.requests
        assert request.target == "/api/v1/events"
        assert request.headers["content-type"] == "application/cloudevents-batch+json"
        assert "authorization" not in request.headers
        event = orjson.loads(request.body)[0]
        assert {k: v for k, v in event.items() if k != "data"} == {
            "specversion": "1.0",
            "id": record_id(1),
            "source": "site-1",
            "type": "llm",
            "subject": "acme",
            "time": "2026-11-21T09:00:00.124456Z",
            "datacontenttype": "application/json",
        }
        assert event["data"]["output_tokens"] == 97
        assert len(orjson.loads(second.body)) == 1
        server.script = lambda _: answer(412)
        assert await backend.send(second) == [Refused("http_412")]
        await backend.aclose()
        v3 = made(OpenmeterBackend, url=server.url + "/v3", api="v3", api_key="t")
        await v3.send(v3.encode(records(1)).sealed[0])
        assert server.requests[-1].target == "/v3/openmeter/events"
        assert server.requests[-1].headers["authorization"] == "Bearer t"
        await v3.aclose()


async def test_lago_tells_the_events_of_a_refused_batch_apart(vendor: Vendor) -> None:
    receiver = await vendor("lago")
    backend = made(LagoBackend, api_key="k", url=receiver.url, meters="api_calls", value_key="n")
    (known,) = backend.encode([record(2)]).sealed
    assert await backend.send(known) == [Delivered()]
    (batch,) = backend.encode(records(3)).sealed
    assert await backend.send(batch) == [Retry("refused_with_others"), Duplicate(), Retry("refused_with_others")]
    assert len(receiver.billed("lago")) == 1, "nothing of the batch was taken"
    (rest,) = backend.encode([record(1), record(3)]).sealed
    assert await backend.send(rest) == [Delivered()] * 2
    event = receiver.billed("lago")[0]
    assert event["transaction_id"] == f"{record_id(2)}:api_calls"
    assert (event["external_subscription_id"], event["code"]) == ("acme", "api_calls")
    assert event["timestamp"] == "1795251600.125"
    assert event["properties"]["n"] == "1"
    await backend.aclose()


MONEY = read_meters([
    {"name": "api_calls", "aggregation": {"type": "COUNT"}},
    {"name": "paid", "aggregation": {"type": "SUM", "field": "cost_usd", "multiplier": "1.2"}},
    {"name": "charged", "aggregation": {"type": "SUM", "field": "charge"}},
])  # fmt: skip


async def test_lago_is_told_the_cost_of_a_call_once_and_exactly(vendor: Vendor) -> None:
    receiver = await vendor("lago")
    backend = made(LagoBackend, api_key="k", url=receiver.url, definitions=MONEY, cost_meter="paid")
    calls = [
        record(1, cost=cost("0.000204750001"), charge=cost("0.5", "EUR")),
        record(2, cost=cost(None)),
        record(3, usage=None),
        record(4, cost=cost("0")),
        record(5, usage=usage(cost_usd="0.12345678901234567890123")),
        record(6, cost=cost("3", "EUR")),
    ]
    (batch,) = backend.encode(calls).sealed
    assert await backend.send(batch) == [Delivered()] * len(batch.events)
    await backend.aclose()
    # A call has one event with an amount, none where its cost is not known, and a cost of nothing is no unknown one.
    amounts = {
        event["transaction_id"]: event["precise_total_amount_cents"]
        for event in receiver.billed("lago")
        if "precise_total_amount_cents" in event
    }
    assert amounts == {
        f"{record_id(1)}:paid": "0.02457000012",
        f"{record_id(4)}:paid": "0",
        f"{record_id(5)}:paid": "14.814814681481481",
    }
    assert len(receiver.billed("lago")) == 6 + 3 + 1  # calls, costs, and the charge as a plain value
    charged = made(LagoBackend, api_key="k", definitions=MONEY, cost_meter="charged")
    events = [e for e in only(charged.encode(calls[:1]))["events"] if "precise_total_amount_cents" in e]
    assert [(e["code"], e["precise_total_amount_cents"]) for e in events] == [("charged", "50")]
    plain = made(LagoBackend, api_key="k", definitions=MONEY)
    assert b"precise_total_amount_cents" not in plain.encode(calls).sealed[0].body, "nobody asked for it"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"cost_meter": "other"},
            "SIDECAR_LAGO_COST_METER: other is no meter that lago is sent; those are: api_calls, p",
        ),
        ({"cost_meter": "paid", "meters": "api_calls"}, "paid is no meter that lago is sent; those are: api_calls$"),
        ({"cost_meter": "api_calls"}, "the meter api_calls is no amount of money: name one with"),
    ],
)
def test_lago_takes_no_meter_for_costs_that_could_miss_one(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        made(LagoBackend, api_key="k", definitions=MONEY, **settings)


@pytest.mark.parametrize(
    ("body", "kinds"),
    [
        ({"error_details": {"1": {"timestamp": ["invalid_format"]}}}, ["Retry", "Refused"]),
        ({"error_details": {"0": {"transaction_id": ["value_already_exist"], "code": ["x"]}}}, ["Refused", "Retry"]),
        (
            {"error_details": {"0": {"transaction_id": ["value_already_exist"]}, "1": {"a b": []}}},
            ["Duplicate", "Refused"],
        ),
        ({"error_details": {"7": {"code": ["x"]}}}, ["Refused", "Refused"]),
        ({"error_details": {"9" * 5000: {"code": ["x"]}}}, ["Refused", "Refused"]),
        ({"error_details": {"events": ["too_many_events"]}}, ["Refused", "Refused"]),
        ({"error_details": {}}, ["Refused", "Refused"]),
        ([], ["Refused", "Refused"]),
    ],
)
async def test_lago_answers_of_every_shape_give_a_verdict_for_each(body: Any, kinds: list[str]) -> None:
    async with ScriptedServer(script=lambda _: answer(422, orjson.dumps(body))).running() as server:
        backend = made(LagoBackend, api_key="k", url=server.url, meters="api_calls")
        (sealed,) = backend.encode(records(2)).sealed
        assert kinds_of(await backend.send(sealed)) == kinds
        await backend.aclose()


def test_unknown_is_no_verdict_that_an_answer_gives() -> None:
    unknown: Verdict = Unknown("timeout")
    assert unknown != Retry("timeout")
