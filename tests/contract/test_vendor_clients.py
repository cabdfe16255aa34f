"""The vendors' own clients, unmodified, drive the receiver as they drive the vendor."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from scripted import running_receiver

from sidecar.receiver import Do, Fault

stripe = pytest.importorskip("stripe", reason="the Stripe client is in the extra `test`")
EVENT = {
    "event_name": "tokens",
    "identifier": "record-1:tokens",
    "payload": {"value": "25", "stripe_customer_id": "cus_1"},
}


def client_of(url: str, key: str = "sk_test_receiver", retries: int = 0) -> Any:
    addresses = {"api": url, "meter_events": url}
    return stripe.StripeClient(key, base_addresses=addresses, max_network_retries=retries)


async def test_stripes_client_reports_meter_events() -> None:
    async with running_receiver() as (receiver, _):
        client = client_of(receiver.url)

        def drive() -> None:
            told = client.v1.billing.meter_events.create(EVENT)
            assert told.object == "billing.meter_event"
            assert told.identifier == EVENT["identifier"]
            with pytest.raises(stripe.InvalidRequestError, match="already exists with identifier"):
                client.v1.billing.meter_events.create(EVENT)
            with pytest.raises(stripe.InvalidRequestError) as refused:
                client.v1.billing.meter_events.create({**EVENT, "identifier": "x", "timestamp": 1})
            assert refused.value.code == "timestamp_too_far_in_past"
            cancelled = client.v1.billing.meter_event_adjustments.create(
                {"event_name": "tokens", "type": "cancel", "cancel": {"identifier": EVENT["identifier"]}}
            )
            assert cancelled.status == "pending"

        await asyncio.to_thread(drive)
        assert [row.verdict for row in receiver.received] == ["delivered", "duplicate", "refused", "delivered"]


async def test_stripes_client_is_safe_against_a_lost_answer() -> None:
    """It sends an Idempotency-Key by itself, so its own retry gets the first answer again."""
    async with running_receiver() as (receiver, _):
        receiver.faults.set(Fault(do=Do.CUT_AFTER, times=1))
        client = client_of(receiver.url, retries=2)
        told = await asyncio.to_thread(client.v1.billing.meter_events.create, EVENT)
        assert told.identifier == EVENT["identifier"]
        assert [row.verdict for row in receiver.received] == ["delivered", "duplicate"]


async def test_stripes_client_defines_and_lists_meters() -> None:
    async with running_receiver() as (receiver, _):
        client = client_of(receiver.url)

        def drive() -> None:
            order = {"display_name": "T", "event_name": "tokens", "default_aggregation": {"formula": "sum"}}
            meter = client.v1.billing.meters.create(order)
            assert meter.value_settings.event_payload_key == "value"
            assert [row.id for row in client.v1.billing.meters.list().auto_paging_iter()] == [meter.id]
            assert client.v1.billing.meters.retrieve(meter.id).event_name == "tokens"

        await asyncio.to_thread(drive)


async def test_stripes_client_streams_under_a_session() -> None:
    async with running_receiver() as (receiver, _):
        client = client_of(receiver.url)

        def drive() -> None:
            single = client.v2.billing.meter_events.create(EVENT)
            assert single.object == "v2.billing.meter_event"
            opened = client.v2.billing.meter_event_session.create()
            stream = client_of(receiver.url, opened.authentication_token).v2.billing.meter_event_stream
            stream.create({"events": [EVENT, {**EVENT, "identifier": "record-2:tokens"}]})
            with pytest.raises(stripe.TemporarySessionExpiredError):
                client_of(receiver.url, "no session").v2.billing.meter_event_stream.create({"events": [EVENT]})

        await asyncio.to_thread(drive)
        assert [row.verdict for row in receiver.received] == ["delivered", "duplicate", "delivered", "blocked"]


async def test_stripes_client_refuses_what_the_receiver_refuses() -> None:
    async with running_receiver() as (receiver, _):
        client = client_of(receiver.url)
        with pytest.raises(stripe.InvalidRequestError, match="event_name"):
            await asyncio.to_thread(client.v1.billing.meter_events.create, {**EVENT, "event_name": ""})
        with pytest.raises(stripe.AuthenticationError):
            await asyncio.to_thread(client_of(receiver.url, " ").v1.billing.meters.list)
