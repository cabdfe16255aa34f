"""A worker that can do nothing rests, whatever it waits for: one that turned and turned would take the interpreter from
the calls, whose commits wait in the same process. Found when a shared ledger was away, at 100 ms a call."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from support.backend_trials import made
from support.delivery_fixtures import HandClock, MemorySpool, World, plain, record_line, rows_in, until
from support.fake_backend import FakeBackend

from sidecar.backends import backend_settings
from sidecar.backends.ledger import LedgerBackend
from sidecar.delivery import Delivery, StateError, removed_backend, worker
from sidecar.delivery.ledger_worker import SummedBatch
from sidecar.delivery.limits import Limits
from sidecar.delivery.rows import Committed, Turn
from sidecar.delivery.worker import Worker
from sidecar.ledger import LedgerStore
from sidecar.meters.buckets import BatchSums
from sidecar.model.delivery import Abilities, Applied, Backend, Dedup, Retry, Verdict
from sidecar.model.record import Record
from sidecar.runtime.billing import Billing
from sidecar.settings import load
from sidecar.spool import SpoolError, SpoolReader

ITERATIONS = 3000  # of the event loop, in which a worker that does not rest turns some hundreds of times
TURNS_MAX = 12


class Away(LedgerStore):
    """Takes nothing while it is away. `tries`: batches it was given then."""

    away = False
    tries = 0

    def apply_sums(self, instance: str, batch: Applied, sums: Sequence[BatchSums]) -> Verdict:
        if not self.away:
            return super().apply_sums(instance, batch, sums)
        self.tries += 1
        return Retry("unreachable")


class Turns:
    """How often workers turned."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made = 0
        turn = Worker._turn

        async def counted(worker: Worker) -> bool:
            self.made += 1
            return await turn(worker)

        monkeypatch.setattr(Worker, "_turn", counted)

    async def while_nothing_happens(self) -> int:
        before = self.made
        for _ in range(ITERATIONS):
            await asyncio.sleep(0)
        return self.made - before


@pytest.fixture
def turns(monkeypatch: pytest.MonkeyPatch) -> Turns:
    return Turns(monkeypatch)


@pytest.fixture
def world(tmp_path: Path) -> World:
    """Its clock stands still, so that no time comes."""
    return World(tmp_path, clock=HandClock(), limits=Limits())


def handed(backend: LedgerBackend, first: int, last: int) -> SummedBatch:
    stored = [record_line(seq) for seq in range(first, last + 1)]
    sums, _ = backend.add_up([Record.from_json(line) for line in stored])
    assert isinstance(sums, BatchSums)
    return SummedBatch(instance="one", first_seq=first, last_seq=last, sums=sums, stored=stored)


@pytest.mark.parametrize("down_after", [5, 1], ids=["failed once", "is down"])
@pytest.mark.parametrize("handed_over", [False, True])
async def test_a_ledger_that_took_nothing_is_left_alone_until_its_next_try(
    world: World, turns: Turns, handed_over: bool, down_after: int
) -> None:
    world.begin("ledger")
    world.clock = None
    world.limits = Limits(backoff_base_s=600.0, linger_s=0.01, sums_linger_s=0.01, down_after=down_after)
    store = Away(world.directory / "ledger.db")
    backend: LedgerBackend = made(LedgerBackend, open_ledger=lambda: store, denied="send")
    world.spool.add(1)
    async with world.deliver(backend) as delivery:
        delivery.wake()
        await until(lambda: delivery.totals({"one": 1})["ledger"].delivered == 1)
        store.away = True
        world.spool.add(30)
        if handed_over:
            assert delivery.apply(handed(backend, 2, 31))
        delivery.wake()
        await until(lambda: store.tries > 0)
        before = turns.made
        for _ in range(100):  # calls go on, longer than a spool is left alone
            world.spool.add(1)
            delivery.wake()
            await asyncio.sleep(world.limits.linger_s / 10)
        assert turns.made - before < TURNS_MAX
        assert await turns.while_nothing_happens() < TURNS_MAX
        store.away = False
        delivery.end_waits("ledger")
        await until(lambda: delivery.totals(world.spool.upto())["ledger"].delivered == 131, what="it goes on")
    store.close()


Prepared = tuple[FakeBackend, Limits, Callable[[FakeBackend, Delivery], bool]]


def tried(backend: FakeBackend, delivery: Delivery) -> bool:
    return bool(backend.offers) and backend.busy == 0 and delivery.status()[0].under_way == 0


def under_way(backend: FakeBackend, delivery: Delivery) -> bool:
    return backend.busy > 0


def waits(word: str, limits: Limits | None = None, abilities: Abilities | None = None) -> Prepared:
    backend = FakeBackend(behaviour=lambda _: word, abilities=abilities or Abilities())
    return backend, limits or Limits(), tried


def stalls(abilities: Abilities) -> Prepared:
    return FakeBackend(behaviour=lambda _: "stall", abilities=abilities), Limits(), under_way


def mixed() -> Prepared:
    """One of a subject is under way for long, and another of it is due again."""
    backend, limits, reached = stalls(Abilities(one_per_subject=True, concurrency=4))
    backend.script = [[Retry("busy")], "stall"]
    backend.subject_of = lambda record: "one"
    return backend, limits, reached


SITUATIONS: dict[str, Callable[[], Prepared]] = {
    "each fails": lambda: waits("retry:busy"),
    "it is down": lambda: waits("retry:busy", Limits(down_after=1)),
    "it asked to be left alone": lambda: waits("retry:busy:600"),
    "it blocks": lambda: waits("block:wrong_key"),
    "one at a time fails": lambda: waits("retry:busy", abilities=Abilities(concurrency=1)),
    "so much waits that nothing may be added": lambda: waits("retry:busy", Limits(retry_records=1)),
    "no answer comes": lambda: stalls(Abilities(concurrency=1)),
    "no answer comes, and what is sealed is a risk": lambda: stalls(Abilities(dedup=Dedup.NONE, concurrency=2)),
    "one answer of a subject is awaited": lambda: stalls(Abilities(one_per_subject=True, concurrency=4)),
    "one of a subject is awaited, one is due": mixed,
}


@pytest.mark.parametrize("situation", SITUATIONS)
async def test_a_worker_rests_while_nothing_can_be_done(world: World, turns: Turns, situation: str) -> None:
    backend, world.limits, reached = SITUATIONS[situation]()
    world.begin("fake")
    async with world.deliver(backend) as delivery:
        world.spool.add(30)
        delivery.wake()
        await until(lambda: reached(backend, delivery), what=situation)
        await until(lambda: not delivery.status()[0].under_way or backend.busy > 0)
        for _ in range(ITERATIONS):  # what can still be begun is
            await asyncio.sleep(0)
        assert await turns.while_nothing_happens() < TURNS_MAX
        backend.behaviour = None
        backend.released.set()


@pytest.mark.parametrize("asks_for_it", [False, True], ids=["is down", "asks for a pause"])
@pytest.mark.parametrize("beside", [False, True], ids=["by itself", "beside a ledger"])
async def test_delivery_hears_of_each_commit_only_where_that_is_of_use(
    world: World, beside: bool, asks_for_it: bool
) -> None:
    """With a backend that is down it did twice the work for each commit, in the process where calls wait for theirs."""
    world.begin("fake", "ledger")
    world.clock = None
    down_after = 1_000 if asks_for_it else 1
    world.limits = Limits(backoff_base_s=600.0, linger_s=0.01, sums_linger_s=0.01, down_after=down_after)
    store = LedgerStore(world.directory / "ledger.db")
    ledger: LedgerBackend = made(LedgerBackend, open_ledger=lambda: store, denied="send")
    word: list[list[Verdict] | str] = [[Retry("http_429", after_s=600.0)] if asks_for_it else "retry:unreachable"]
    fake = FakeBackend(behaviour=lambda _: word[0])
    backends: list[Backend] = [fake, ledger] if beside else [fake]
    reader = SpoolReader(world.directory)
    async with world.deliver(*backends) as delivery:
        bills = Billing(
            settings=load({}, backend_settings=backend_settings(), serving=False),
            state=delivery.store,
            reader=reader,
            delivery=delivery,
            backends={one.name: one for one in backends},
            sums=[ledger] if beside else [],
        )
        assert not gathers(bills), "one that is up is told at once"
        world.spool.add(1)
        delivery.wake()
        await until(lambda: delivery.is_down("fake"))
        assert gathers(bills)
        await until(lambda: bills._handing is None, what="it is told a moment later")
        word[0] = "ok"
        delivery.end_waits("fake")
        await until(lambda: not delivery.is_down("fake"), what="it takes records again")
        assert not gathers(bills)
    reader.close()
    store.close()


def gathers(bills: Billing) -> bool:
    """Whether a commit waits for others before delivery hears of it."""
    bills.committed()
    return bills._handing is not None


async def test_a_mark_that_cannot_be_written_is_said_once_until_that_changes(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    nobody: Any = None
    settings = load({}, backend_settings=backend_settings(), serving=False)
    bills = Billing(settings=settings, state=nobody, reader=nobody, delivery=nobody, backends={})
    ends: list[OSError | None] = [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))] * 3
    ends += [OSError(errno.EROFS, os.strerror(errno.EROFS)), None, OSError(errno.EROFS, os.strerror(errno.EROFS))]

    def remember_place(*_: object) -> None:
        if (error := ends.pop(0)) is not None:
            raise error

    monkeypatch.setattr("sidecar.runtime.billing.remember_place", remember_place)
    while ends:
        await bills.remember_place()
    said = "the mark by which an older delivery.db is noticed cannot be written: "
    whys = ("No space left on device", "Read-only file system", "Read-only file system")
    assert [record.getMessage() for record in caplog.records] == [said + why for why in whys]


async def test_what_was_parked_for_a_copy_is_told_also_where_the_file_could_not_be_opened_after_it(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.begin("fake")
    world.clock = None
    world.spool.add(5)
    monkeypatch.setattr(worker, "TROUBLE_RETRY_S", 0.01)
    faults: list[Exception] = [StateError("it is away"), SpoolError("it is away"), OSError("it is away")]
    async with world.deliver(FakeBackend(behaviour=lambda _: "retry:unreachable")) as delivery:
        reopen = delivery.store.reopen

        def at_last() -> None:
            if faults:
                raise faults.pop(0)
            reopen()

        await until(lambda: delivery.is_down("fake"))
        monkeypatch.setattr(delivery.store, "reopen", at_last)
        assert await delivery.adopt({"one": 5}) == {"fake": 5}
        assert not faults


@pytest.mark.parametrize("sealed", [True, False])
async def test_what_was_parked_for_a_copy_before_a_step_failed_is_told_too(
    world: World, monkeypatch: pytest.MonkeyPatch, sealed: bool
) -> None:
    """Each record once, also one that has several events, in several requests."""
    world.begin("fake")
    world.clock = None
    world.spool.add(7)
    monkeypatch.setattr(worker, "TROUBLE_RETRY_S", 0.01)
    monkeypatch.setattr(removed_backend, "SLICE", 4)
    backend = FakeBackend(behaviour=lambda _: "retry:unreachable", events_of=lambda _: ("a", "b"))
    steps = 0
    async with world.deliver(backend) as delivery:
        commit = delivery.store.commit

        def now_and_then(turn: Turn) -> Committed:
            nonlocal steps
            if any(one.decision.parked for one in turn.settled) or (turn.sealing and turn.sealing.parked):
                steps += 1
                if steps % 2 == 0:
                    raise StateError("it is away")
            return commit(turn)

        if sealed:
            delivery.wake()
            # Not all of them: with a backend that is down, sealing takes its time, and those not sealed are parked too.
            await until(lambda: plain(world.balance(delivery)) == {"pending": 7} and rows_in(world, "sealed") >= 4)
            await until(lambda: delivery.is_down("fake"))
        else:
            delivery._workers["fake"].resting = True
        monkeypatch.setattr(delivery.store, "commit", now_and_then)
        assert await delivery.adopt({"one": 7}) == {"fake": 7}
        assert steps > 2
        assert world.metrics.parked_by == {("fake", "copied"): 7}
        assert plain(world.balance(delivery)) == {"parked": {"copied": 7}}


@pytest.mark.parametrize("removed", [True, False])
async def test_what_is_missing_in_the_spool_hides_nothing_from_who_parks_the_rest(
    world: World, monkeypatch: pytest.MonkeyPatch, removed: bool
) -> None:
    world.begin("fake")
    world.clock = None
    world.spool.add(3)
    world.spool.hole(numbers=5, missing=5)
    world.spool.add(4)
    read = world.spool.read
    # As where a spool is so large that it is read in several looks: one of them sees the hole alone.
    monkeypatch.setattr(MemorySpool, "read", lambda _, instance, after, **kind: read(instance, after)[:1])
    backend = FakeBackend(behaviour=lambda _: "retry:unreachable")
    if removed:
        async with world.deliver() as delivery:
            await until(lambda: len(delivery.parked(backend="fake")) == 7)
            assert delivery.verify() == []
        backend.behaviour = None
        async with world.deliver(backend) as delivery:
            await until(lambda: plain(world.balance(delivery)) == {"delivered": 7, "skipped": {"missing": 5}})
        return
    async with world.deliver(backend) as delivery:
        delivery._workers["fake"].resting = True
        assert await delivery.adopt({"one": 12}) == {"fake": 7}
        assert plain(world.balance(delivery)) == {"parked": {"copied": 7}, "skipped": {"missing": 5}}
