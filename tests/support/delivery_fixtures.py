"""A spool in memory, a clock that is moved by hand, a counter of metrics, and a running delivery over them."""

from __future__ import annotations

import asyncio
import random
import sqlite3
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractContextManager, asynccontextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from sidecar.delivery import Delivery, DeliveryStore, Limits
from sidecar.delivery.database import DatabaseFile, FileReading
from sidecar.delivery.lane_database import Held, LaneDatabase, LaneReading
from sidecar.model.balance import BackendTotals
from sidecar.model.delivery import Backend, Verdict
from sidecar.model.exchange import Exchange, Outcome, Subscriber
from sidecar.model.record import encode
from sidecar.spool.types import SpoolTotals, StoredGroup
from sidecar.storage.postgres import Postgres, call

START_S = datetime(2026, 11, 20, 9, tzinfo=UTC).timestamp()
QUICK = Limits(
    linger_s=0.002, gather_s=0.001, backoff_base_s=0.002, down_cap_s=0.01, blocked_base_s=0.005, blocked_cap_s=0.02
)


def record_line(
    seq: int,
    instance: str = "one",
    *,
    at_s: float = START_S,
    outcome: Outcome = Outcome.COMPLETE,
    subscriber: str = "acme",
    route: str | None = None,
) -> bytes:
    exchange = Exchange(
        method="POST",
        url="https://api.example.com/v1/chat",
        route=route,
        id=record_id(seq, instance),
        started_ns=int(at_s * 1e9),
        outcome=outcome,
        status=200,
        subscriber=Subscriber(subscriber, "header:x-tenant"),
    )
    return encode(exchange, seq=seq, instance=instance)


def record_id(seq: int, instance: str = "one") -> str:
    return f"{seq:08d}-{instance:0>4.4}-7000-8000-000000000000"


@dataclass(slots=True)
class MemorySpool:
    """Keeps the reader's contract: groups in order, whole, one after the other."""

    groups: dict[str, list[StoredGroup]] = field(default_factory=dict)
    reads: int = 0
    retired: dict[str, int] = field(default_factory=dict)

    def append(self, lines: Sequence[bytes], instance: str = "one", *, salvaged: bool = False) -> None:
        groups = self.groups.setdefault(instance, [])
        first = groups[-1].last_seq + 1 if groups else 1
        groups.append(
            StoredGroup(first_seq=first, last_seq=first + len(lines) - 1, lines=tuple(lines), salvaged=salvaged)
        )

    def add(self, count: int, instance: str = "one", *, group: int = 10, **kind: object) -> list[str]:
        """Records in groups; returns their ids."""
        first = self.last_seq(instance) + 1
        seqs = list(range(first, first + count))
        for start in range(0, count, group):
            self.append([record_line(seq, instance, **kind) for seq in seqs[start : start + group]], instance)  # type: ignore[arg-type]
        return [record_id(seq, instance) for seq in seqs]

    def hole(self, numbers: int, missing: int, instance: str = "one") -> None:
        first = self.last_seq(instance) + 1
        self.groups.setdefault(instance, []).append(
            StoredGroup(first_seq=first, last_seq=first + numbers - 1, lines=(), missing=missing)
        )

    def retire(self, upto: int, instance: str = "one") -> None:
        """Whole groups go; how many records were ever put in stays known."""
        groups = self.groups[instance]
        gone = [group for group in groups if group.last_seq <= upto]
        self.retired[instance] = self.retired.get(instance, 0) + sum(len(group.lines) for group in gone)
        self.groups[instance] = groups[len(gone) :]

    def instances(self) -> list[str]:
        return sorted(self.groups)

    def read(self, instance: str, after_seq: int, *, bytes_max: int = 1 << 20) -> list[StoredGroup]:
        self.reads += 1
        found: list[StoredGroup] = []
        size = 0
        for group in self.groups.get(instance, []):
            if group.last_seq > after_seq and size < bytes_max:
                found.append(group)
                size += sum(map(len, group.lines))
        return found

    def last_seq(self, instance: str) -> int:
        groups = self.groups.get(instance)
        return groups[-1].last_seq if groups else 0

    def count(self, instance: str, after_seq: int, upto_seq: int) -> int:
        return sum(
            after_seq < seq <= upto_seq
            for group in self.groups.get(instance, [])
            for seq, _ in enumerate(group.lines, group.first_seq)
        )

    def totals(self, instance: str) -> SpoolTotals:
        there = sum(len(g.lines) + g.missing for g in self.groups.get(instance, []))
        return SpoolTotals(recorded=there + self.retired.get(instance, 0))

    def upto(self) -> dict[str, int]:
        return {instance: self.last_seq(instance) for instance in self.groups}

    def recorded(self) -> int:
        return sum(self.totals(instance).recorded for instance in self.groups)


@dataclass(slots=True)
class HandClock:
    """Both clocks stand until they are moved; `step` moves the wall clock alone."""

    wall: float = START_S + 60.0
    mono: float = 1000.0

    def wall_s(self) -> float:
        return self.wall

    def mono_s(self) -> float:
        return self.mono

    def go(self, seconds: float) -> None:
        self.wall += seconds
        self.mono += seconds

    def step(self, seconds: float) -> None:
        self.wall += seconds


@dataclass(slots=True)
class CountingMetrics:
    events: int = 0
    verdicts: Counter[str] = field(default_factory=Counter)
    parked_by: Counter[tuple[str, str]] = field(default_factory=Counter)
    skipped_by: Counter[tuple[str, str]] = field(default_factory=Counter)
    blocks: list[tuple[str, str | None]] = field(default_factory=list)

    def sealed(self, backend: str, events: int) -> None:
        self.events += events

    def batch_settled(self, backend: str, verdicts: Sequence[Verdict], seconds: float) -> None:
        self.verdicts.update(type(verdict).__name__ for verdict in verdicts)

    def parked(self, backend: str, reason: str, count: int) -> None:
        self.parked_by[(backend, reason)] += count

    def skipped(self, backend: str, reason: str, count: int) -> None:
        self.skipped_by[(backend, reason)] += count

    def blocked(self, backend: str, reason: str | None) -> None:
        self.blocks.append((backend, reason))


@dataclass(slots=True)
class World:
    """One data directory with its spool; `deliver` is one run of the program over it."""

    directory: Path
    spool: MemorySpool = field(default_factory=MemorySpool)
    clock: HandClock | None = None
    limits: Limits = QUICK
    metrics: CountingMetrics = field(default_factory=CountingMetrics)
    seed: int = 1
    skip_gaps: bool = False
    shared: Postgres | None = None  # else the state is in the file
    held: Held = field(default_factory=lambda: Held(lane=3, holder="tester", epoch=1))

    @property
    def path(self) -> Path:
        return self.directory / "delivery.db"

    def open(self) -> DeliveryStore:
        if self.shared is None:
            return DeliveryStore.open(self.path)
        database = LaneDatabase(self.shared, self.held)
        call(hold(self.shared, self.held))
        return DeliveryStore(database)

    def begin(self, *names: str) -> None:
        """A first start with these backends over an empty spool, so that nothing counts as made before."""
        store = self.open()
        store.configure(names, [], START_S)
        store.close()

    @asynccontextmanager
    async def deliver(self, *backends: Backend, may_send: Callable[[], bool] = lambda: True) -> AsyncIterator[Delivery]:
        store = self.open()
        try:
            delivery = Delivery(
                reader=self.spool,
                store=store,
                backends=backends,
                metrics=self.metrics,
                clock=self.clock,
                chance=random.Random(self.seed),
                limits=self.limits,
                skip_gaps=self.skip_gaps,
                may_send=may_send,
            )
            async with delivery:
                yield delivery
        finally:
            store.close()

    def balance(self, delivery: Delivery) -> dict[str, BackendTotals]:
        """The totals, after checking that they hold and that the rows say the same."""
        totals = delivery.totals(self.spool.upto())
        for name, one in totals.items():
            assert one.total == self.spool.recorded(), (name, one, self.spool.recorded())
        assert delivery.verify() == []
        return totals


async def until(condition: Callable[[], bool], *, what: str = "", limit_s: float = 30.0) -> None:
    """Wait for something to become true."""
    try:
        async with asyncio.timeout(limit_s):
            while not condition():
                await asyncio.sleep(0.001)
    except TimeoutError:
        raise AssertionError(f"never happened: {what or condition}") from None


def plain(totals: Mapping[str, BackendTotals], name: str = "fake") -> dict[str, object]:
    """What is not zero."""
    one = totals[name]
    row = {"delivered": one.delivered, "duplicate": one.duplicate, "pending": one.pending}
    found: dict[str, object] = {key: value for key, value in row.items() if value}
    if one.parked:
        found["parked"] = dict(one.parked)
    if one.skipped:
        found["skipped"] = dict(one.skipped)
    return found


async def hold(database: Postgres, held: Held) -> None:
    """Let it be the holder of its lane, whoever was before."""
    async with database.transaction() as db:
        await db.execute(
            "INSERT INTO metering.lane_leases (lane, holder, epoch) VALUES ($1, $2, $3)"
            " ON CONFLICT (lane) DO UPDATE SET holder = excluded.holder, epoch = excluded.epoch",
            held.lane,
            held.holder,
            held.epoch,
        )


def connection_of(store: DeliveryStore) -> sqlite3.Connection:
    """The one that it writes its file by."""
    assert isinstance(store._database, DatabaseFile)
    return store._database._conn


def held(delivery: Delivery) -> AbstractContextManager[object]:
    """Nobody else may count meanwhile by the connection that the balance is read by."""
    database = delivery._queries._database
    return database._lock if isinstance(database, FileReading) else nullcontext()


def rows_in(world: World, table: str) -> int:
    """What is in a table, as another process sees it."""
    reading = FileReading(world.path) if world.shared is None else LaneReading(world.shared, world.held.lane)
    try:
        with reading.reading() as connection:
            return int(connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0])
    finally:
        reading.close()
