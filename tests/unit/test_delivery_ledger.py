"""A backend that adds up: whole batches once, whatever happens between its file and ours, and nothing kept a record."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.backend_trials import made
from support.delivery_fixtures import World, connection_of, plain, record_id, record_line, rows_in, until

from sidecar.backends.ledger import LedgerBackend
from sidecar.delivery import Delivery
from sidecar.delivery.corrections import cancel
from sidecar.delivery.ledger_worker import TRIES_WHOLE, SummedBatch
from sidecar.delivery.limits import Limits
from sidecar.ledger import LedgerReader, LedgerStore
from sidecar.meters.buckets import BatchSums, add_batches
from sidecar.model.call_group import CallGroup
from sidecar.model.delivery import Applied, Blocked, Delivered, Encoded, Retry, Verdict
from sidecar.model.exchange import Outcome
from sidecar.model.record import Record


class Scripted(LedgerStore):
    """Answers with these verdicts first; `dies_after`: adds, and says that it failed."""

    verdicts: Sequence[Verdict] = ()
    dies_after = 0
    batches = 0

    def apply_sums(self, instance: str, batch: Applied, sums: Sequence[BatchSums]) -> Verdict:
        if self.verdicts:
            first, *self.verdicts = self.verdicts
            return first
        self.batches += 1
        return super().apply_sums(instance, batch, sums)


class Picky(LedgerBackend):
    """Cannot add some records."""

    poison: frozenset[str] = frozenset()

    def add_up(self, records: Sequence[Record], groups: Sequence[CallGroup] = ()) -> tuple[BatchSums, Encoded]:
        if any(record.id in self.poison for one in (records, *(group.records() for group in groups)) for record in one):
            raise ArithmeticError("not exact")
        return super().add_up(records, groups)


class Keeping(Picky):
    """Wants the lines as well, as the shared ledger does; `wrote`: how many at a time."""

    keeps_lines = True

    def __init__(self, *values: Any) -> None:
        super().__init__(*values)
        self.wrote: list[int] = []
        self.lines: list[bytes] = []

    def applied(self, instance: str) -> Applied | Verdict | None:
        return None

    def apply_sums(
        self, instance: str, batch: Applied, sums: Sequence[object], lines: Sequence[tuple[int, bytes]] = ()
    ) -> Verdict:
        verdict = super().apply_sums(
            instance, batch, [add_batches([one for one in sums if isinstance(one, BatchSums)])]
        )
        if verdict == Delivered():
            self.wrote.append(len(lines))
            self.lines += [line for _, line in lines]
        return verdict


@pytest.fixture
def world(tmp_path: Path) -> World:
    world = World(tmp_path)
    world.begin("ledger")
    return world


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Scripted]:
    store = Scripted(tmp_path / "ledger.db")
    yield store
    store.close()


def ledger(store: LedgerStore, *, denied: str = "send") -> LedgerBackend:
    backend: LedgerBackend = made(LedgerBackend, open_ledger=lambda: store, denied=denied)
    return backend


def calls(world: World) -> int:
    rows = LedgerReader(world.directory / "ledger.db").usage()
    return rows[0].records if rows else 0


def rows(world: World, table: str) -> int:
    return rows_in(world, table)


async def settled(world: World, delivery: Delivery) -> dict[str, object]:
    delivery.wake()
    await until(lambda: delivery.totals(world.spool.upto())["ledger"].pending == 0, what="all is added")
    return plain(world.balance(delivery), "ledger")


async def test_batches_are_added_once_and_nothing_is_kept_a_record(world: World, store: Scripted) -> None:
    world.spool.add(1200)
    world.spool.add(30, "two")
    async with world.deliver(ledger(store)) as delivery:
        assert await settled(world, delivery) == {"delivered": 1230}
        assert calls(world) == 1230
        assert store.batches < 12
        assert [rows(world, table) for table in ("sealed", "payload", "skipped", "parts", "applied")] == [0, 0, 0, 0, 2]
        await until(lambda: world.metrics.events == world.metrics.verdicts["Delivered"] == 1230)  # after the commit
        await delivery.forget({"one": 777})
        assert plain(world.balance(delivery), "ledger") == {"delivered": 1230}
        assert delivery.totals({"one": 1000, "two": 10})["ledger"].total == 1010
    async with world.deliver(ledger(store)) as delivery:
        world.spool.add(5)
        assert await settled(world, delivery) == {"delivered": 1235}
    assert calls(world) == 1235


async def test_what_was_added_before_a_death_is_counted_and_not_added_again(world: World, store: Scripted) -> None:
    """The ledger has a batch, and `delivery.db` knows nothing of it."""
    world.spool.add(40)
    world.spool.append([record_line(41), b"no record", record_line(43, outcome=Outcome.DENIED)])
    before = world.path.read_bytes()
    backend = ledger(store, denied="skip")
    async with world.deliver(backend) as delivery:
        first = await settled(world, delivery)
    assert first == {"delivered": 41, "parked": {"unreadable": 1}, "skipped": {"denied": 1}}
    for name in ("delivery.db-wal", "delivery.db-shm"):
        (world.directory / name).unlink(missing_ok=True)
    world.path.write_bytes(before)
    world.spool.add(7)
    async with world.deliver(ledger(store, denied="park")) as delivery:
        again = await settled(world, delivery)
    # What stood outside the sums is judged as the policy is now; what is in them stays there.
    assert again == {"delivered": 7, "duplicate": 41, "parked": {"unreadable": 1, "denied": 1}}
    assert calls(world) == 48


async def test_a_lost_delivery_db_doubles_nothing_and_a_lost_ledger_is_told(world: World, store: Scripted) -> None:
    world.spool.add(20)
    async with world.deliver(ledger(store)) as delivery:
        await settled(world, delivery)
    for file in world.directory.glob("delivery.db*"):
        file.unlink()
    world.spool.add(5)
    async with world.deliver(ledger(store)) as delivery:
        assert await settled(world, delivery) == {"delivered": 5, "duplicate": 20}
    assert calls(world) == 25
    for file in world.directory.glob("delivery.db*"):
        file.unlink()
    fresh = LedgerStore(world.directory / "other.db")
    async with world.deliver(ledger(fresh)) as delivery:
        assert await settled(world, delivery) == {"parked": {"salvaged": 25}}
        assert all(row.maybe_taken for row in delivery.parked())
    fresh.close()


async def test_a_record_that_cannot_be_added_parks_alone_and_goes_when_it_can(world: World, store: Scripted) -> None:
    ids = world.spool.add(600)
    backend: Picky = made(Picky, open_ledger=lambda: store)
    backend.poison = frozenset({ids[3], ids[4], ids[577]})
    async with world.deliver(backend) as delivery:
        assert await settled(world, delivery) == {"delivered": 597, "parked": {"sum_not_exact": 3}}
        assert {row.record_id for row in delivery.parked()} == backend.poison
        backend.poison = frozenset()
        assert await delivery.redrive() == 3
        assert await settled(world, delivery) == {"delivered": 600}
    assert calls(world) == 600


async def test_a_backlog_goes_in_large_batches_where_lines_go_along(world: World, store: Scripted) -> None:
    limits = world.limits = Limits(sum_records=50, lines_read_records=1000, linger_s=0.002)
    ids = world.spool.add(4300)
    backend: Keeping = made(Keeping, open_ledger=lambda: store)
    backend.poison = frozenset({ids[2777]})
    store.verdicts = [Retry("busy")]
    async with world.deliver(backend) as delivery:
        assert await settled(world, delivery) == {"delivered": 4299, "parked": {"sum_not_exact": 1}}
    assert max(backend.wrote) == limits.lines_read_records
    assert backend.wrote[:2] == [1000, 1000], "not half of it, nor what one look at the spool gives"
    assert [Record.from_json(line).id for line in backend.lines] == [id_ for id_ in ids if id_ != ids[2777]]
    assert calls(world) == 4299


async def test_few_are_held_while_the_ledger_takes_nothing_and_it_goes_on_in_large_batches(
    world: World, store: Scripted
) -> None:
    world.limits = replace(world.limits, sum_records=50, lines_read_records=1000, linger_s=0.002)
    world.spool.add(4000)
    backend: Keeping = made(Keeping, open_ledger=lambda: store)
    store.verdicts = [Retry("unreachable")] * (TRIES_WHOLE + 1)
    async with world.deliver(backend) as delivery:
        assert await settled(world, delivery) == {"delivered": 4000}
    assert backend.wrote == [50, 100, 200, 400, 800, 1000, 1000, 450]


async def test_what_was_handed_over_does_not_wait_for_more_where_it_is_a_whole_batch(
    world: World, store: Scripted
) -> None:
    world.limits = Limits(sums_linger_s=3600.0, lines_records=200, linger_s=0.002)
    backend: Keeping = made(Keeping, open_ledger=lambda: store)
    world.spool.add(1)
    async with world.deliver(backend) as delivery:
        assert await settled(world, delivery) == {"delivered": 1}

        async def hand(first: int, last: int) -> None:
            world.spool.add(last - first + 1)
            for start in range(first, last, 50):
                stored = [record_line(seq) for seq in range(start, start + 50)]
                assert delivery.apply(replace(summed(world, backend, start, start + 49), stored=stored))
            delivery.wake()

        await hand(2, 51)
        await until(lambda: delivery.totals(world.spool.upto())["ledger"].delivered == 51)
        await hand(52, 501)
        await until(lambda: delivery.totals(world.spool.upto())["ledger"].delivered == 451, what="two whole ones")
        assert backend.wrote == [1, 50, 200, 200], "and what is left lingers"


async def test_records_that_are_lost_in_the_spool_are_passed_over(world: World, store: Scripted) -> None:
    world.spool.add(10)
    world.spool.hole(5, 4)
    world.spool.add(10)
    async with world.deliver(ledger(store)) as delivery:
        assert await settled(world, delivery) == {"delivered": 20, "skipped": {"missing": 4}}
    assert calls(world) == 20


async def test_a_ledger_that_takes_nothing_keeps_all_and_says_why(world: World, store: Scripted) -> None:
    world.spool.add(50)
    store.verdicts = [Retry("disk_full")] * 8 + [Blocked("not_writable")] * 3
    async with world.deliver(ledger(store)) as delivery:
        delivery.wake()
        await until(lambda: delivery.status()[0].reason == "disk_full")
        assert plain(world.balance(delivery), "ledger") == {"pending": 50}
        assert await settled(world, delivery) == {"delivered": 50}
        assert world.metrics.blocks == [("ledger", "not_writable"), ("ledger", None)]
        assert delivery.status()[0].state == "up"
    assert calls(world) == 50


async def test_a_drain_does_not_wait_for_a_ledger_that_takes_nothing(world: World, store: Scripted) -> None:
    world.spool.add(50)
    store.verdicts = [Blocked("not_writable")] * 10_000
    async with world.deliver(ledger(store)) as delivery:
        await delivery.drain(5.0)
        assert plain(world.balance(delivery), "ledger") == {"pending": 50}


def summed(world: World, backend: LedgerBackend, first: int, last: int) -> SummedBatch:
    """What the process that has the records at hand makes of them."""
    lines = {record_id(seq): (seq, record_line(seq)) for seq in range(first, last + 1)}
    sums, left = backend.add_up([Record.from_json(line) for _, line in lines.values()])
    kept = {id_: lines[id_] for id_ in (*left.skipped, *left.parked)}
    return SummedBatch(instance="one", first_seq=first, last_seq=last, sums=sums, left=left, lines=kept)


async def test_sums_that_are_handed_over_need_no_reading(world: World, store: Scripted) -> None:
    backend = ledger(store)
    world.spool.add(10)
    async with world.deliver(backend) as delivery:
        assert await settled(world, delivery) == {"delivered": 10}
        world.spool.add(60)
        for first in (11, 21, 31, 41, 51, 61):
            assert delivery.apply(summed(world, backend, first, first + 9))
        parsed = delivery.tail.reads
        delivery.wake()
        await until(lambda: delivery.totals(world.spool.upto())["ledger"].delivered == 70)
        assert delivery.tail.reads <= parsed + 1  # that there is nothing behind them
        assert world.balance(delivery)["ledger"].total == 70
    assert calls(world) == 70


async def test_sums_that_do_not_fit_are_let_go_and_the_spool_is_read(world: World, store: Scripted) -> None:
    backend = ledger(store)
    world.spool.add(70)
    async with world.deliver(backend) as delivery:
        delivery.apply(summed(world, backend, 1, 10))
        delivery.apply(summed(world, backend, 1, 10))  # the same again
        delivery.apply(summed(world, backend, 31, 40))  # some are missing
        delivery.apply(summed(world, backend, 41, 50))
        store.verdicts = [Retry("busy")]
        assert await settled(world, delivery) == {"delivered": 70}
        for first in range(71, 71 + 100 * 3, 3):  # more than is kept
            world.spool.add(3)
            delivery.apply(summed(world, backend, first, first + 2))
        assert await settled(world, delivery) == {"delivered": 370}
    assert calls(world) == 370


async def test_one_call_is_taken_out_of_the_sums_again(world: World, store: Scripted) -> None:
    ids = world.spool.add(30)
    backend = ledger(store)
    async with world.deliver(backend) as delivery:
        await settled(world, delivery)
        [found] = delivery.find(ids[6])
        assert (found.backend, found.seq, found.fate) == ("ledger", 7, "delivered")
        [outcome] = await cancel(ids[6], delivery, {"ledger": backend})
        assert outcome.done, outcome
        assert plain(world.balance(delivery), "ledger") == {"delivered": 29, "skipped": {"cancelled": 1}}
        assert await cancel(ids[6], delivery, {"ledger": backend}) == []
        assert delivery.find("unknown") == []
        await delivery.forget({"one": 30})
        assert plain(world.balance(delivery), "ledger") == {"delivered": 29, "skipped": {"cancelled": 1}}
    assert calls(world) == 29


async def test_a_miscounted_run_is_found(world: World, store: Scripted) -> None:
    world.spool.add(10)
    async with world.deliver(ledger(store)) as delivery:
        await settled(world, delivery)
        await delivery.store.run(lambda: connection_of(delivery.store).execute("UPDATE applied SET last_seq = 9"))
        assert ["delivered says 10, the rows 9" in problem for problem in delivery.verify()] == [True]
        await delivery.store.run(lambda: connection_of(delivery.store).execute("UPDATE counter SET n = 11"))
        assert delivery.totals(world.spool.upto())["ledger"].total == 11
