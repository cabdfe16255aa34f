"""Drain slots are shared: one client cannot use them all up and so make everybody's calls free of charge."""

from __future__ import annotations

import asyncio
import logging
from ipaddress import ip_network

import pytest
from support.rawhttp import Conversation, Hop, Outcome, RawUpstream, until

from sidecar.model.exchange import Exchange, Subscriber, UsageState
from sidecar.proxy.drains import ALL, OWN, REASONS, Drains

STREAM = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nwords\r\n"
USAGE = b"7\r\n<usage>\r\n0\r\n\r\n"
LOCAL = "127.0.0.1"


class Upstream:
    """Streams one piece to each call, and the usage only once it is let to."""

    def __init__(self) -> None:
        self.go_on = asyncio.Event()

    async def __call__(self, conversation: Conversation) -> None:
        await conversation.message()
        await conversation.send(STREAM)
        await self.go_on.wait()
        await conversation.send(USAGE)


async def leave(hop: Hop, tenant: str | None = None, client_ip: str | None = None) -> None:
    """Read the first words and go. Returns when the proxy has noticed."""
    before = hop.counts.drains + len(hop.recorder.records)
    fields = f"X-Tenant: {tenant}\r\n" if tenant is not None else ""
    if client_ip is not None:
        fields += f"X-Forwarded-For: {client_ip}\r\n"
    client = await hop.client()
    await client.send(f"GET /model HTTP/1.1\r\nHost: me\r\n{fields}\r\n".encode())
    await client.until(b"words")
    await client.close()
    await until(lambda: hop.counts.drains + len(hop.recorder.records) == before + 1)


def payer(exchange: Exchange) -> str | None:
    return None if exchange.subscriber is None else exchange.subscriber.id


async def test_a_subscriber_gets_a_quarter_and_others_are_still_metered(caplog: pytest.LogCaptureFixture) -> None:
    upstream = Upstream()
    async with RawUpstream(upstream) as server, Hop(server.url, drains=8) as hop:
        with caplog.at_level(logging.WARNING):
            for _ in range(5):
                await leave(hop, "holder")
            await leave(hop, "other")
        assert hop.counts.drains == 3
        assert hop.counts.limits == ["drains_share"] * 3
        upstream.go_on.set()
        await hop.recorder.ended(6)
    states = [(payer(e), e.usage.usage_state) for e in hop.recorder.records if e.usage is not None]
    assert states.count(("holder", UsageState.FINAL)) == 2
    assert ("other", UsageState.FINAL) in states
    turned_away = [e for e in hop.recorder.records if e.usage is not None and e.usage.usage_state != "final"]
    assert len(turned_away) == 3
    for exchange in turned_away:
        assert exchange.outcome is Outcome.CLIENT_LEFT
        assert exchange.usage is not None
        assert exchange.usage.reason == exchange.error == REASONS[OWN]
    (line,) = [r for r in caplog.records if r.levelno == logging.WARNING]  # one line for three: it is not to flood
    assert REASONS[OWN] in line.getMessage()
    assert line.facts["limit"] == "drains_share"  # type: ignore[attr-defined]


async def test_an_address_gets_a_quarter_where_nobody_is_named() -> None:
    upstream = Upstream()
    async with RawUpstream(upstream) as server, Hop(server.url, drains=8) as hop:
        for _ in range(4):
            await leave(hop)
        await leave(hop, "other")
        assert hop.counts.drains == 3
        upstream.go_on.set()
        await hop.recorder.ended(5)


async def test_one_address_gets_half_whatever_it_calls_itself() -> None:
    upstream = Upstream()
    async with RawUpstream(upstream) as server, Hop(server.url, drains=8) as hop:
        for number in range(6):
            await leave(hop, f"made-up-{number}")
        assert hop.counts.drains == 4
        assert hop.counts.limits == ["drains_share"] * 2
        upstream.go_on.set()
        await hop.recorder.ended(6)


async def test_all_slots_taken_is_counted_said_and_on_record(caplog: pytest.LogCaptureFixture) -> None:
    upstream = Upstream()
    trusted = (ip_network("127.0.0.0/8"),)
    async with RawUpstream(upstream) as server, Hop(server.url, drains=4, trusted_proxies=trusted) as hop:
        for number in range(4):
            await leave(hop, f"t{number}", f"192.0.2.{number}")
        assert hop.counts.drains == 4
        await leave(hop, "late", "192.0.2.9")
        assert hop.counts.limits == ["drains"]
        (late,) = hop.recorder.records
        assert late.usage is not None
        assert late.usage.reason == late.error == REASONS[ALL]
        upstream.go_on.set()
        await hop.recorder.ended(5)
        await leave(hop, "again", "192.0.2.9")  # the slots come back
        await hop.recorder.ended(6)
        assert hop.counts.limits == ["drains"]
    assert any(REASONS[ALL] in record.getMessage() for record in caplog.records)


async def test_who_pays_may_stand_in_the_body() -> None:
    """The slots go on the account of whom the body names, though the head says another."""

    def by_body(known: Subscriber | None, member: object) -> Subscriber | None:
        return Subscriber("by-body", "body:user")

    upstream = Upstream()
    async with (
        RawUpstream(upstream) as server,
        Hop(server.url, drains=8, attribute_by_body=by_body) as hop,
    ):
        for number in range(3):
            await leave(hop, f"t{number}")
        assert hop.counts.drains == 2
        upstream.go_on.set()
        await hop.recorder.ended(3)


def subscriber(name: str) -> Subscriber:
    return Subscriber(name, "header:x")


@pytest.mark.parametrize(
    ("slots", "whose", "taken"),
    [
        (8, [("a", LOCAL)] * 5, 2),
        (8, [(None, LOCAL)] * 5, 2),
        (8, [(None, None)] * 5, 2),
        (8, [(f"s{n}", LOCAL) for n in range(9)], 4),
        (8, [(f"s{n}", None) for n in range(9)], 8),  # a Unix socket: a gateway with all of them
        (8, [(None, f"2001:db8::{n}") for n in range(9)], 2),  # one network is one client
        (8, [(None, f"2001:db8:{n}::1") for n in range(9)], 8),
        (8, [("a", f"192.0.2.{n}") for n in range(9)], 2),
        (1, [("a", LOCAL)] * 2, 1),
        (3, [("a", LOCAL), ("b", LOCAL), ("b", "192.0.2.1")], 2),
        (0, [("a", LOCAL)], 0),
    ],
)
def test_shares(slots: int, whose: list[tuple[str | None, str | None]], taken: int) -> None:
    drains = Drains(slots)
    owners = [drains.owners(None if name is None else subscriber(name), ip) for name, ip in whose]
    got = [each for each in owners if drains.take(each) is None]
    assert len(got) == drains.taken == taken
    for each in got:
        drains.give_back(each)
    assert drains.taken == 0
    assert sum(drains.take(each) is None for each in owners) == taken  # nothing is kept of what was given back
