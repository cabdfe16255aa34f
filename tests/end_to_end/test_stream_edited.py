"""A stream that is edited, purged, sealed or removed while records go through it: the one who sends and the one who
reads say why, what is not safe waits, and each record comes once when it is mended."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from support.backend_fixtures import record, record_id
from support.collecting import CollectorHere, collecting, publish
from support.nats_server import GOOD_STREAM, NatsServer, client, make_stream, nats_server

from sidecar.backends import Context
from sidecar.backends.nats import NatsBackend
from sidecar.cli.collect import feed
from sidecar.model.delivery import Blocked, Delivered, Duplicate, Retry, Verdict
from sidecar.runtime import collect

if TYPE_CHECKING:
    from nats.aio.client import Client

pytestmark = pytest.mark.timeout(120)
CONSUMER = "metering-sidecar"


@pytest.fixture(scope="module")
def server() -> Iterator[NatsServer]:
    with nats_server() as one:
        yield one


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is looked at every minute, and an idle look takes two seconds: long for a test."""
    monkeypatch.setattr("sidecar.storage.nats.LOOK_AGAIN_S", 0.1)
    monkeypatch.setattr("sidecar.runtime.collector.LOOK_AGAIN_S", 0.1)
    monkeypatch.setattr("sidecar.runtime.collector.ASK_S", 0.2)


Step = Callable[[Any, str], Awaitable[object]]


def edited(**changes: Any) -> Step:
    async def edit(context: Any, stream: str) -> None:
        if "subjects" in changes:
            changes["subjects"] = [one.format(stream) for one in changes["subjects"]]
        await context.update_stream((await context.stream_info(stream)).config, **changes)

    return edit


async def removed(context: Any, stream: str) -> None:
    await context.delete_stream(stream)


async def made(context: Any, stream: str) -> None:
    await context.add_stream(name=stream, subjects=[f"{stream}.records"], **GOOD_STREAM)


async def made_anew(context: Any, stream: str) -> None:
    await removed(context, stream)
    await made(context, stream)


async def purged(context: Any, stream: str) -> None:
    await context.purge_stream(stream)


class Kind(NamedTuple):
    change: Step
    mended: Step
    sends: str  # the first word of why nothing is sent; "" where it is
    says: str  # to the one who sends, and to the one who reads
    reads: bool = True  # what is in it
    takes: bool = False  # what others send, who do not look


KINDS = {
    "short age": Kind(
        edited(max_age=600.0, duplicate_window=600.0), edited(max_age=7 * 86_400.0, duplicate_window=3600.0),
        "weak_stream", "it knows an id for 10m", takes=True,
    ),
    "interest": Kind(edited(retention="interest"), made_anew, "weak_stream", "its retention is interest", takes=True),
    "no subject": Kind(edited(subjects=["other.{}"]), edited(subjects=["{}.records"]), "weak_stream", "does not take"),
    "discard old": Kind(edited(discard="old"), edited(discard="new"), "weak_stream", "it drops the oldest", takes=True),
    "sealed": Kind(edited(sealed=True), made_anew, "weak_stream", "it is sealed"),
    "full": Kind(edited(max_msgs=3), edited(max_msgs=-1), "stream_full", ""),
    "removed": Kind(removed, made, "no_stream", "there is no stream", reads=False),
    "purged": Kind(purged, edited(), "", ""),
}  # fmt: skip


class Both:
    """The two sides of one stream."""

    def __init__(self, backend: NatsBackend, collector: CollectorHere, connection: Client) -> None:
        self.backend, self.collector, self.connection = backend, collector, connection
        self.context = connection.jetstream()

    async def send(self, *numbers: int) -> set[Verdict]:
        (sealed,) = self.backend.encode([record(n) for n in numbers]).sealed
        return set(await self.backend.send(sealed))

    async def sent(self, *numbers: int) -> None:
        async with asyncio.timeout(20):
            while await self.send(*numbers) - {Delivered(), Duplicate()}:
                await asyncio.sleep(0.05)

    async def ready(self, says: str) -> tuple[int, dict[str, Any]]:
        """What `/readyz` says, once that is in its notes; without, once there are none."""
        async with asyncio.timeout(20):
            while True:
                status, body = await self.collector.get("/readyz")
                notes = str(body["notes"]) if body["notes"] else ""
                if says in notes if says else not notes:
                    return status, body
                await asyncio.sleep(0.05)


@asynccontextmanager
async def flowing(server: NatsServer, stream: str, tmp_path: Path) -> AsyncIterator[Both]:
    """Three records went through it."""
    await make_stream(server.url, stream, f"{stream}.records")
    connection = await client(server.url)
    async with collecting(tmp_path / "data", server.url, stream) as collector:
        backend = NatsBackend(collect.stream_settings(collector.settings), Context(data_dir=tmp_path))
        try:
            both = Both(backend, collector, connection)
            await both.ready("")
            await both.sent(1, 2, 3)
            await collector.until_recorded(3)
            yield both
        finally:
            await backend.aclose()
            await connection.close()


@pytest.mark.parametrize("name", list(KINDS))
async def test_what_is_not_safe_waits_is_said_and_comes_once_when_it_is_mended(
    server: NatsServer, tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    kind, stream = KINDS[name], name.title().replace(" ", "")
    async with flowing(server, stream, tmp_path) as both:
        await kind.change(both.context, stream)
        if kind.sends:
            await until_refused(both, kind)
        status, ready = await both.ready(kind.says)
        if kind.reads:
            assert (status, ready["status"]) == (200, "degraded" if kind.says else "ok")
        else:
            assert (status, ready["status"]) == (503, "degraded")
        assert kind.says in caplog.text
        if kind.sends:
            assert not await both.send(7, 8) & {Delivered(), Duplicate()}, "it waits"
        if kind.takes:
            await publish(server.url, [record(4)], stream)
            await both.collector.until_recorded(4)
        await kind.mended(both.context, stream)
        await both.sent(4, 5, 6, 7, 8)
        await both.collector.until_recorded(8)
        assert (await both.ready(""))[0] == 200
        assert await both.collector.metric("sidecar_collect_missed_total") == 0
        assert await both.collector.stop() == 0
    assert sorted(both.collector.ids()) == [record_id(n) for n in range(1, 9)]
    assert both.collector.ledger_calls() == 8


async def until_refused(both: Both, kind: Kind) -> None:
    """What is sent until it is noticed is safe, or is sent again when it is mended."""
    async with asyncio.timeout(20):
        while True:
            (verdict,) = await both.send(4)
            if isinstance(verdict, Blocked | Retry):
                assert verdict.reason.startswith(kind.sends), verdict
                assert kind.says in verdict.reason
                return
            await asyncio.sleep(0.05)


async def test_a_consumer_that_is_paused_or_edited_is_said_and_read_on(server: NatsServer, tmp_path: Path) -> None:
    async with flowing(server, "PAUSED", tmp_path) as both:

        async def pause(until: str) -> None:
            asked = json.dumps({"pause_until": until}).encode()
            await both.connection.request(f"$JS.API.CONSUMER.PAUSE.PAUSED.{CONSUMER}", asked, timeout=5)

        await pause("2099-01-01T00:00:00Z")
        status, _ = await both.ready(f"is paused: `nats consumer resume PAUSED {CONSUMER}` lets it go on")
        assert status == 503
        await both.sent(4, 5)
        # What is purged now was never read: that is said, and an export sent again brings it.
        await purged(both.context, "PAUSED")
        await both.sent(6)
        await pause("2020-01-01T00:00:00Z")
        await both.collector.until_recorded(4)
        assert await both.collector.metric("sidecar_collect_missed_total") == 2
        exported = io.BytesIO(b"\n".join(record(n).json for n in range(1, 7)))
        assert await feed(both.collector.settings, exported) == 0
        await both.collector.until_recorded(6)
        config = (await both.context.consumer_info("PAUSED", CONSUMER)).config
        config.max_deliver = 3
        await both.context.add_consumer("PAUSED", config)
        assert (await both.ready("gives up on a message after 3 times"))[0] == 503
        config.max_deliver = -1
        await both.context.add_consumer("PAUSED", config)
        await both.sent(7)
        await both.collector.until_recorded(7)
        assert (await both.ready(""))[0] == 200
        assert await both.collector.stop() == 0
    assert sorted(both.collector.ids()) == [record_id(n) for n in range(1, 8)]
