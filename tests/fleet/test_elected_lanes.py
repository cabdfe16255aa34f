"""The lanes of one sidecar over a real database that hangs, or is away at the start: no lane waits for another, nothing
is sent under a lease that may have run out, and what nobody can have delivered is delivered."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from support.delivery_fixtures import CountingMetrics, World, record_line, until
from support.fake_backend import FakeBackend
from support.ledgers import again

from sidecar.delivery import elected, leases
from sidecar.delivery.elected import Elected
from sidecar.delivery.lane_database import make_lanes
from sidecar.delivery.types import BEFORE
from sidecar.ledger.identity import Identity
from sidecar.ledger.lanes import LANES, lane_of
from sidecar.ledger.postgres_schema import line_of
from sidecar.ledger.postgres_store import PostgresStore
from sidecar.model.delivery import Abilities, Backend, Blocked, Delivered, Duplicate
from sidecar.storage.postgres import Postgres

ROUND_S = 0.4  # instead of three seconds, and leases accordingly


@pytest.fixture(autouse=True)
async def room() -> None:
    elected.make_room_for_lanes()


@pytest.fixture(autouse=True)
def quick_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elected, "RENEW_S", ROUND_S)
    monkeypatch.setattr(elected, "LOOK_S", ROUND_S / 4)
    monkeypatch.setattr(elected, "TROUBLE_S", ROUND_S)


@pytest.fixture
async def database(postgres_database: str) -> AsyncIterator[Postgres]:
    found = Postgres(postgres_database, name="test", connections=4)
    yield found
    await found.close()


@pytest.fixture
def ledger(tmp_path: Path, postgres_database: str) -> Iterator[PostgresStore]:
    """Of a sidecar that is elected: as the program makes it."""
    found = PostgresStore(postgres_database, Identity(tmp_path, "one"), lambda database: make_lanes(database, ["fake"]))
    yield found
    found.close()


def put(ledger: PostgresStore, seqs: range, subscriber: str = "acme") -> list[str]:
    """Records of one customer; their ids."""
    lines = [line_of(record_line(seq, subscriber=subscriber)) for seq in seqs]
    assert isinstance(ledger.write([line for line in lines if line is not None], None, again), Delivered)
    return [f"{seq:08d}-0one-7000-8000-000000000000" for seq in seqs]


class Backends:
    """What each lane's backend was offered, over all of its lives."""

    def __init__(self, abilities: Abilities) -> None:
        self.abilities, self.made = abilities, list[FakeBackend]()

    def make(self) -> list[Backend]:
        self.made.append(FakeBackend(self.abilities))
        return [self.made[-1]]

    @property
    def taken(self) -> Counter[str]:
        return sum((one.taken for one in self.made), Counter[str]())


@asynccontextmanager
async def delivering(url: str, abilities: Abilities | None = None) -> AsyncIterator[tuple[Elected, Backends]]:
    backends = Backends(abilities or Abilities())
    async with Elected(
        url=url, me="one/life", names=["fake"], make=backends.make, metrics=CountingMetrics(), retention_s=3600.0
    ) as one:
        await until(lambda: len(one.lanes) == LANES, what="all lanes")
        yield one, backends


async def leases_end(database: Postgres, without: int | None = None) -> list[datetime]:
    """When leases run out, of lanes that are held."""
    async with database.transaction() as db:
        rows = await db.fetch("SELECT lane, expires FROM metering.lane_leases WHERE holder IS NOT NULL")
    return [ends for lane, ends in rows if lane != without]


async def renewed(database: Postgres, without: int | None = None) -> None:
    """Wait until all leases but that lane's were renewed, twice."""
    async with asyncio.timeout(30):
        for _ in range(2):
            before = max(await leases_end(database, without))
            while min(await leases_end(database, without)) <= before:
                await asyncio.sleep(ROUND_S / 10)


async def test_a_lane_whose_step_hangs_holds_up_no_other_while_it_is_held_and_when_it_is_lost(
    postgres_database: str, database: Postgres, ledger: PostgresStore
) -> None:
    stuck = lane_of("acme")
    other = next(name for name in ("a", "b", "c", "d") if lane_of(name) != stuck)
    async with delivering(postgres_database) as (one, backends):
        async with database.transaction() as db:
            await db.execute(f"LOCK TABLE metering_lane_{stuck:02}.cursor IN ACCESS EXCLUSIVE MODE")
            await asyncio.to_thread(put, ledger, range(1, 3))
            async with asyncio.timeout(30):
                while not await database_waits(database):
                    await asyncio.sleep(0.02)
            await renewed(database)
            assert len(one.lanes) == LANES
            async with database.transaction() as deposing:
                await deposing.execute(
                    "UPDATE metering.lane_leases SET holder = 'two', epoch = epoch + 1,"
                    " expires = clock_timestamp() + interval '1 h' WHERE lane = $1",
                    stuck,
                )
            await until(lambda: len(one.lanes) == LANES - 1, what="the lane is let go of")
            await renewed(database, without=stuck)
            [mine] = await asyncio.to_thread(put, ledger, range(3, 4), other)
            await until(lambda: backends.taken[mine] == 1, what="another lane's record is delivered")
            assert sum(backends.taken.values()) == 1
    assert sum(backends.taken.values()) == 1


async def database_waits(database: Postgres) -> bool:
    async with database.transaction() as db:
        return bool(await db.fetchval("SELECT EXISTS (SELECT FROM pg_locks WHERE NOT granted)"))


async def test_a_stop_does_not_wait_for_a_step_that_hangs(
    postgres_database: str, database: Postgres, ledger: PostgresStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(elected, "STOP_REST_S", 0.2)
    monkeypatch.setattr(elected, "STOP_END_S", 0.2)
    async with database.transaction() as db:
        async with asyncio.timeout(25), delivering(postgres_database) as (_, backends):
            await db.execute(f"LOCK TABLE metering_lane_{lane_of('acme'):02}.cursor IN ACCESS EXCLUSIVE MODE")
            await asyncio.to_thread(put, ledger, range(1, 3))
            async with asyncio.timeout(20):
                while not await database_waits(database):
                    await asyncio.sleep(0.02)
        assert await leases_end(database) == [], "the lanes are given back"
    assert not backends.taken


async def test_neither_a_start_nor_a_stop_waits_for_a_database_that_takes_connections_and_says_nothing() -> None:
    asked = asyncio.Event()

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.set()
        await reader.read()
        writer.close()

    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    url = f"postgresql://somebody@127.0.0.1:{server.sockets[0].getsockname()[1]}/ledger?sslmode=disable"
    async with Elected(
        url=url, me="one/life", names=["fake"], make=list, metrics=CountingMetrics(), retention_s=3600.0
    ) as one:
        assert not asked.is_set(), "it is begun before anybody was asked"
        async with asyncio.timeout(30):
            await asked.wait()
        assert one.lanes == []
        asked.clear()
    assert not asked.is_set(), "and ended without a question: it held no lane"
    server.close()


async def test_nothing_is_sent_under_a_lease_that_may_have_run_out(
    postgres_database: str, database: Postgres, ledger: PostgresStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Renewing hangs while all else of the database works: nobody has taken the lane, and its steps go on."""
    async with delivering(postgres_database) as (one, backends):
        async with database.transaction() as db:
            await db.execute("LOCK TABLE metering.lane_members IN ACCESS EXCLUSIVE MODE")
            monkeypatch.setattr(elected, "LATE_S", ROUND_S)
            await until(one._is_late, what="nobody has renewed")
            ids = await asyncio.to_thread(put, ledger, range(1, 3))
            await until(lambda: not one.lanes, what="what nobody renews is let go of")
            await asyncio.sleep(2 * ROUND_S)
            assert not backends.taken
            monkeypatch.setattr(elected, "LATE_S", 2 * leases.RENEW_S)
        await until(lambda: backends.taken == Counter(ids), what="delivered when it is renewed")


async def test_a_request_waits_at_the_last_moment_too(tmp_path: Path) -> None:
    """It was stored as begun, and the time ran out meanwhile."""
    world, backend = World(tmp_path), FakeBackend(Abilities())
    world.begin("fake")
    world.spool.add(1)
    async with world.deliver(backend, may_send=lambda: allowed) as delivery:
        allowed = False
        delivery.wake()
        await until(lambda: any(status.under_way for status in delivery.status()), what="stored as begun")
        await asyncio.sleep(0.3)
        assert not backend.offers
        allowed = True
        await until(lambda: sum(backend.taken.values()) == 1, what="sent")
    assert [offer.attempt for offer in backend.offers] == [1]


# --- which records may have been delivered before -----------------------------------------------------


async def fates(url: str, ids: list[str]) -> tuple[set[str], set[str]]:
    """Which of these a holder of all lanes delivers, and which it parks, to a backend that recognises nothing."""
    async with delivering(url) as (one, backends):

        def settled() -> bool:
            return len(backends.taken) + sum(one.parked_now().values()) == len(ids)

        async with asyncio.timeout(30):
            while not await asyncio.to_thread(settled):
                await asyncio.sleep(0.05)
        parked = [row for delivery in one.deliveries().values() for row in await asyncio.to_thread(delivery.parked)]
    return set(backends.taken), {row.record_id for row in parked}


async def test_what_was_recorded_before_the_lanes_could_be_made_is_simply_delivered(
    postgres_database: str, ledger: PostgresStore
) -> None:
    """The database was away when the sidecar started, so the first who reaches it is whoever writes the ledger."""
    ids = await asyncio.to_thread(put, ledger, range(1, 11))
    assert await fates(postgres_database, ids) == (set(ids), set())


async def test_a_start_that_ends_while_it_makes_the_lanes_leaves_none_that_nobody_is_told_of(
    postgres_database: str, database: Postgres, ledger: PostgresStore
) -> None:
    await make_lanes(database, [])  # as of a process that was killed: tables without a mark
    ids = await asyncio.to_thread(put, ledger, range(1, 11))
    assert await fates(postgres_database, ids) == (set(ids), set())


async def test_what_sidecars_recorded_that_tell_for_themselves_may_have_been_delivered(
    tmp_path: Path, postgres_database: str
) -> None:
    own = PostgresStore(postgres_database, Identity(tmp_path, "own"))
    ids = await asyncio.to_thread(put, own, range(1, 11))
    await asyncio.to_thread(own.close)
    assert await fates(postgres_database, ids) == (set(), set(ids))


async def test_a_backend_that_is_added_later_begins_with_what_comes_then(
    postgres_database: str, ledger: PostgresStore
) -> None:
    await asyncio.to_thread(put, ledger, range(1, 11))
    backends = Backends(Abilities())

    def both() -> list[Backend]:
        return [*backends.make(), FakeBackend(name="later")]

    async with delivering(postgres_database):
        pass
    one = Elected(
        url=postgres_database,
        me="one/next",
        names=["fake", "later"],
        make=both,
        metrics=CountingMetrics(),
        retention_s=3600.0,
    )
    async with one:
        await until(lambda: len(one.lanes) == LANES, what="all lanes")
        await asyncio.to_thread(put, ledger, range(11, 13))
        name = f"lane-{lane_of('acme'):02}"

        def totals() -> dict[str, int]:
            found = one.deliveries()[lane_of("acme")].totals({name: 12})
            return {"delivered": found["later"].delivered, **found["later"].skipped}

        async with asyncio.timeout(30):
            while await asyncio.to_thread(totals) != {"delivered": 2, BEFORE: 10}:
                await asyncio.sleep(0.05)


# --- a directory that is put back, and a network that is parted -----------------------------------------


async def test_what_a_directory_sends_again_that_was_put_back_from_a_backup_is_told_to_nobody_twice(
    tmp_path: Path, postgres_database: str
) -> None:
    """Its spool and its `delivery.db` are older than what was delivered: what they have goes to the ledger again."""
    place = tmp_path / "one"

    def opened() -> PostgresStore:
        identity = Identity(place, "one")
        return PostgresStore(postgres_database, identity, lambda database: make_lanes(database, ["fake"]))

    place.mkdir()
    ledger = opened()
    ids = await asyncio.to_thread(put, ledger, range(1, 6))
    await asyncio.to_thread(ledger.close)
    shutil.copytree(place, tmp_path / "backup")
    ledger = opened()
    ids += await asyncio.to_thread(put, ledger, range(6, 11))
    await asyncio.to_thread(ledger.close)
    shutil.rmtree(place)
    (tmp_path / "backup").rename(place)
    ledger = opened()
    lines = [line for line in (line_of(record_line(seq)) for seq in range(1, 6)) if line is not None]
    verdict = await asyncio.to_thread(ledger.write, lines, None, again)
    assert verdict == Blocked("copied_directory")  # somebody decides first
    await asyncio.to_thread(lambda: ledger.adopt(copy=False))
    verdict = await asyncio.to_thread(ledger.write, lines, None, again)
    assert isinstance(verdict, Delivered | Duplicate)
    ids += await asyncio.to_thread(put, ledger, range(11, 13))
    await asyncio.to_thread(ledger.close)
    async with delivering(postgres_database) as (_, backends):
        await until(lambda: len(backends.taken) == len(ids), what="all delivered")
        assert backends.taken == Counter(ids)


class Parted:
    """A way to the database that can be cut, so that nothing comes through and nobody is told."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        assert parts.hostname is not None
        assert parts.port is not None
        self._url, self._host, self._port = url, parts.hostname, parts.port
        self._open = asyncio.Event()
        self._open.set()
        self._tasks: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def url(self) -> AsyncIterator[str]:
        server = await asyncio.start_server(self._carry, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        try:
            yield self._url.replace(f":{self._port}/", f":{port}/")
        finally:
            server.close()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def part(self) -> None:
        self._open.clear()

    def heal(self) -> None:
        self._open.set()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection(self._host, self._port)

        async def one_way(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
            with contextlib.suppress(OSError):
                while data := await source.read(65_536):
                    await self._open.wait()
                    target.write(data)
            await self._open.wait()
            target.close()

        for source, target in ((reader, far_writer), (far_reader, writer)):
            task = asyncio.create_task(one_way(source, target))
            self._tasks.add(task)


async def test_who_is_parted_from_the_database_stops_in_time_and_the_other_side_goes_on(
    postgres_database: str, ledger: PostgresStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever side the holder is on: here the one that is cut off holds half of the lanes, and the other half."""
    monkeypatch.setattr(leases, "_LEASE", timedelta(seconds=10 * ROUND_S))
    monkeypatch.setattr(leases, "_MEMBER", timedelta(seconds=5 * ROUND_S))
    monkeypatch.setattr(elected, "LATE_S", 5 * ROUND_S)
    monkeypatch.setattr(elected, "STOP_END_S", 0.5)
    way, here, there = Parted(postgres_database), Backends(Abilities()), Backends(Abilities())

    def sidecar(url: str, me: str, backends: Backends) -> Elected:
        return Elected(
            url=url, me=me, names=["fake"], make=backends.make, metrics=CountingMetrics(), retention_s=3600.0
        )

    async with way.url() as url, sidecar(url, "cut", here) as cut, sidecar(postgres_database, "well", there) as well:
        await until(lambda: len(cut.lanes) == len(well.lanes) == LANES // 2, what="shares")
        names = [next(f"c{n}" for n in range(999) if lane_of(f"c{n}") == lane) for lane in range(LANES)]
        way.part()
        await until(lambda: not cut.lanes, what="what is cut off is let go of")
        await until(lambda: len(well.lanes) == LANES, what="the other side has all lanes")
        ids = [(await asyncio.to_thread(put, ledger, range(n, n + 1), name))[0] for n, name in enumerate(names, 1)]
        await until(lambda: there.taken == Counter(ids), what="delivered by who is well")
        assert not here.taken
        way.heal()
        await until(lambda: len(cut.lanes) == len(well.lanes) == LANES // 2, what="shares again")
        ids += [(await asyncio.to_thread(put, ledger, range(n, n + 1), name))[0] for n, name in enumerate(names, 101)]
        await until(lambda: there.taken + here.taken == Counter(ids), what="delivered by both")
    assert there.taken + here.taken == Counter(ids)
