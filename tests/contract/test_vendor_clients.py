"""The vendors' own clients, unmodified, drive the receiver as they drive the vendor.

They are in the extra `clients`; the tests of a client that is not installed are left out.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from support.scripted import running_receiver

from sidecar.dev.mock_backends import Do, Fault, Receiver

STRIPE_EVENT = {
    "event_name": "tokens",
    "identifier": "record-1:tokens",
    "payload": {"value": "25", "stripe_customer_id": "cus_1"},
}
NOW = "2026-11-20T09:00:00.123Z"


@pytest.fixture
async def receiver() -> Any:
    async with running_receiver() as (running, _):
        yield running


def installed(name: str) -> Any:
    return pytest.importorskip(name, reason=f"{name} is not installed: it is in the extra `clients`")


def verdicts(receiver: Receiver) -> list[str]:
    return [str(row.verdict) for row in receiver.received]


async def drive(steps: Callable[[], None]) -> None:
    """The clients are synchronous: they run beside the loop that answers them."""
    await asyncio.to_thread(steps)


# -- Stripe


def stripe_client(url: str, key: str = "sk_test_receiver", retries: int = 0) -> Any:
    addresses = {"api": url, "meter_events": url}
    return installed("stripe").StripeClient(key, base_addresses=addresses, max_network_retries=retries)


async def test_stripe_reports_meter_events(receiver: Receiver) -> None:
    stripe, client = installed("stripe"), stripe_client(receiver.url)

    def steps() -> None:
        told = client.v1.billing.meter_events.create(STRIPE_EVENT)
        assert (told.object, told.identifier) == ("billing.meter_event", STRIPE_EVENT["identifier"])
        with pytest.raises(stripe.InvalidRequestError, match="already exists with identifier"):
            client.v1.billing.meter_events.create(STRIPE_EVENT)
        with pytest.raises(stripe.InvalidRequestError) as refused:
            client.v1.billing.meter_events.create({**STRIPE_EVENT, "identifier": "x", "timestamp": 1})
        assert refused.value.code == "timestamp_too_far_in_past"
        with pytest.raises(stripe.InvalidRequestError, match="event_name"):
            client.v1.billing.meter_events.create({**STRIPE_EVENT, "event_name": ""})
        cancelled = client.v1.billing.meter_event_adjustments.create(
            {"event_name": "tokens", "type": "cancel", "cancel": {"identifier": STRIPE_EVENT["identifier"]}}
        )
        assert cancelled.status == "pending"

    await drive(steps)
    assert verdicts(receiver) == ["delivered", "duplicate", "refused", "refused", "delivered"]


async def test_stripe_is_safe_against_a_lost_answer(receiver: Receiver) -> None:
    """The client sends an Idempotency-Key by itself, so its own retry gets the first answer again."""
    client = stripe_client(receiver.url, retries=2)
    receiver.faults.set(Fault(do=Do.CUT_AFTER, times=1))
    await drive(lambda: client.v1.billing.meter_events.create(STRIPE_EVENT))
    assert verdicts(receiver) == ["delivered", "duplicate"]


async def test_stripe_defines_and_lists_meters(receiver: Receiver) -> None:
    client = stripe_client(receiver.url)

    def steps() -> None:
        order = {"display_name": "T", "event_name": "tokens", "default_aggregation": {"formula": "sum"}}
        meter = client.v1.billing.meters.create(order)
        assert meter.value_settings.event_payload_key == "value"
        assert [row.id for row in client.v1.billing.meters.list().auto_paging_iter()] == [meter.id]
        assert client.v1.billing.meters.retrieve(meter.id).event_name == "tokens"

    await drive(steps)


async def test_stripe_streams_under_a_session(receiver: Receiver) -> None:
    stripe, client = installed("stripe"), stripe_client(receiver.url)

    def steps() -> None:
        assert client.v2.billing.meter_events.create(STRIPE_EVENT).object == "v2.billing.meter_event"
        opened = client.v2.billing.meter_event_session.create()
        stream = stripe_client(receiver.url, opened.authentication_token).v2.billing.meter_event_stream
        stream.create({"events": [STRIPE_EVENT, {**STRIPE_EVENT, "identifier": "record-2:tokens"}]})
        with pytest.raises(stripe.TemporarySessionExpiredError):
            stripe_client(receiver.url, "none").v2.billing.meter_event_stream.create({"events": [STRIPE_EVENT]})

    await drive(steps)
    assert verdicts(receiver) == ["delivered", "duplicate", "delivered", "blocked"]


# -- Revenium v2


async def test_revenium_meters_events_and_completions(receiver: Receiver) -> None:
    revenium = installed("revenium_metering")
    completion: dict[str, Any] = {
        "model": "gpt-5-mini",
        "provider": "openai",
        "input_token_count": 43,
        "output_token_count": 97,
        "total_token_count": 140,
        "stop_reason": "END",
        "request_time": NOW,
        "completion_start_time": NOW,
        "response_time": NOW,
        "request_duration": 1877,
        "transaction_id": "t-2",
        "cost_type": "AI",
        "is_streamed": True,
    }

    def steps() -> None:
        with revenium.ReveniumMetering(api_key="rev_mk_x", base_url=receiver.url, max_retries=0) as client:
            event = {"payload": {"calls": 1}, "source_type": "SDK_PYTHON", "transaction_id": "t-1"}
            assert client.events.create(**event).resource_type == "metering"
            client.events.create(**event)
            key = {"Idempotency-Key": "k"}
            assert client.ai.create_completion(**completion, extra_headers=key).id == "t-2"
            client.ai.create_completion(**completion, extra_headers=key)
            with pytest.raises(revenium.ConflictError, match="idempotency_key_mismatch"):
                client.ai.create_completion(**{**completion, "provider": "other"}, extra_headers=key)
            with pytest.raises(revenium.BadRequestError, match="stopReason"):
                client.ai.create_completion(**{**completion, "stop_reason": "stop"})

    await drive(steps)
    # Without a key, which this client never sends by itself, a repetition counts again.
    assert verdicts(receiver) == ["delivered", "delivered", "delivered", "duplicate", "refused", "refused"]


# -- Flexprice


async def test_flexprice_ingests(receiver: Receiver) -> None:
    flexprice = installed("flexprice")
    event = {
        "event_name": "api_request",
        "external_customer_id": "acme",
        "event_id": "e-1",
        "timestamp": NOW,
        "properties": {"tokens": "5"},
    }

    def steps() -> None:
        with flexprice.Flexprice(server_url=f"{receiver.url}/v1", api_key_auth="fp_key") as client:
            assert client.events.ingest_event(**event)["event_id"] == "e-1"
            bulk = client.events.ingest_events_bulk(events=[event, {**event, "event_id": "e-2"}])
            assert list(bulk) == ["message"]

    await drive(steps)
    assert verdicts(receiver) == ["delivered", "duplicate", "delivered"]


# -- OpenMeter


async def test_openmeter_ingests(receiver: Receiver) -> None:
    openmeter = installed("openmeter")
    event = {
        "id": "e-1",
        "source": "sidecar",
        "specversion": "1.0",
        "type": "api_request",
        "subject": "acme",
        "time": NOW,
        "data": {"tokens": 5},
    }

    def steps() -> None:
        with openmeter.Client(endpoint=receiver.url, token="om_x") as client:
            client.events.ingest_event(event)
            client.events.ingest_events([event, {**event, "id": "e-2"}])

    await drive(steps)
    assert verdicts(receiver) == ["delivered", "duplicate", "delivered"]
    assert {row.backend for row in receiver.received} == {"openmeter"}


# -- Lago


async def test_lago_creates_events(receiver: Receiver) -> None:
    installed("lago_python_client")
    from lago_python_client.client import Client
    from lago_python_client.exceptions import LagoApiError
    from lago_python_client.models import BatchEvent, Event

    def event(number: int) -> Any:
        return Event(
            transaction_id=f"t-{number}",
            external_subscription_id="sub_1",
            code="tokens",
            timestamp=1795000000,
            properties={"tokens": 5},
            precise_total_amount_cents=None,
        )

    def steps() -> None:
        client = Client(api_key="lago", api_url=receiver.url)
        made = client.events.create(event(1))
        assert made is not None
        assert made.transaction_id == "t-1"
        client.events.batch_create(BatchEvent(events=[event(2), event(3)]))
        with pytest.raises(LagoApiError) as refused:
            client.events.batch_create(BatchEvent(events=[event(4), event(1)]))
        assert refused.value.response["error_details"] == {"1": {"transaction_id": ["value_already_exist"]}}

    await drive(steps)
    assert verdicts(receiver) == ["delivered", "delivered", "delivered", "refused", "duplicate"]
