"""The end of the spools, read and parsed once for all backends, and for each one complete."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from pathlib import Path

import pytest
from support.delivery_fixtures import MemorySpool, World, plain, record_line, until
from support.fake_backend import FakeBackend

from sidecar.delivery import Delivery, Limits, tail
from sidecar.delivery.tail import Tail
from sidecar.model.delivery import Abilities, Atomicity, Dedup
from sidecar.model.record import Record
from sidecar.spool import StoredGroup

EVENTS = Abilities(events_max=100, atomicity=Atomicity.ALL_OR_NOTHING, dedup=Dedup.EVENT_ID)
NAMES = ("fake", "second", "third")


@pytest.fixture
def world(tmp_path: Path) -> World:
    world = World(tmp_path)
    world.begin(*NAMES)
    return world


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> Counter[bytes]:
    """How often each line was parsed."""
    found: Counter[bytes] = Counter()
    plainly = Record.from_json

    def counting(line: bytes) -> Record:
        found[line] += 1
        return plainly(line)

    monkeypatch.setattr(Record, "from_json", counting)
    return found


def three() -> list[FakeBackend]:
    return [FakeBackend(EVENTS, name=name) for name in NAMES]


async def all_settled(world: World, delivery: Delivery) -> None:
    delivery.wake()
    await until(lambda: all(t.pending == 0 for t in delivery.totals(world.spool.upto()).values()), what="settled")


async def test_three_backends_read_and_parse_a_record_once(world: World, parsed: Counter[bytes]) -> None:
    world.spool.add(900, group=50)
    backends = three()
    async with world.deliver(*backends) as delivery:
        await all_settled(world, delivery)
        assert all(plain(world.balance(delivery), name) == {"delivered": 900} for name in NAMES)
        assert delivery.tail.reads <= 5
    assert set(parsed.values()) == {1}
    assert len(parsed) == 900
    assert all(set(backend.taken.values()) == {1} for backend in backends)


async def test_what_was_just_committed_is_not_read_from_the_disk(
    world: World, parsed: Counter[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tail, "OFFERED_LOOK_S", 1e9)  # however slow the machine is
    backends = three()
    async with world.deliver(*backends) as delivery:
        await all_settled(world, delivery)
        reads = delivery.tail.reads
        for _ in range(40):
            world.spool.add(3, group=3)
            group = world.spool.groups["one"][-1]
            delivery.offer("one", group, [Record.from_json(line) for line in group.lines])
            delivery.wake()
            await asyncio.sleep(0)
        await all_settled(world, delivery)
        assert delivery.tail.reads <= reads + 3
        assert plain(world.balance(delivery), "third") == {"delivered": 120}
    assert set(parsed.values()) == {1}


async def test_what_was_not_handed_over_is_read(world: World) -> None:
    """A writer hands over some of what it commits, and some of that is let go before it is needed."""
    world.limits = Limits(linger_s=0.002, tail_bytes=4000, tail_pieces=3)
    chance, backends = random.Random(7), three()
    async with world.deliver(*backends) as delivery:
        for number in range(60):
            world.spool.add(chance.randrange(1, 5), group=5)
            if chance.random() < 0.6:
                delivery.offer("one", world.spool.groups["one"][-1])
            if chance.random() < 0.7:
                delivery.wake()
            if number % 10 == 0:
                await asyncio.sleep(0.003)
        await all_settled(world, delivery)
        recorded = world.spool.recorded()
        assert all(plain(world.balance(delivery), name) == {"delivered": recorded} for name in NAMES)
    assert all(set(backend.taken.values()) == {1} for backend in backends)


async def test_a_backend_that_was_down_reads_for_itself_and_joins_again(world: World, parsed: Counter[bytes]) -> None:
    world.limits = Limits(linger_s=0.002, read_bytes=20_000, tail_bytes=60_000, down_cap_s=0.01, backoff_base_s=0.002)
    good, down = FakeBackend(EVENTS), FakeBackend(EVENTS, name="second", behaviour=lambda s: "retry:refused")
    async with world.deliver(good, down) as delivery:
        for _ in range(20):
            world.spool.add(100, group=20)
            delivery.wake()
            await until(lambda: len(good.taken) == world.spool.recorded())
        assert plain(world.balance(delivery), "second") == {"pending": 2000}
        down.behaviour = None
        await all_settled(world, delivery)
        parsed.clear()
        for _ in range(5):
            world.spool.add(50, group=10)
            await all_settled(world, delivery)
        assert set(parsed.values()) == {1}
    assert set(down.taken.values()) == {1}
    assert len(down.taken) == 2250


async def test_holes_and_numbers_before_are_told_apart() -> None:
    spool = MemorySpool()
    spool.append([record_line(seq) for seq in range(1, 6)])
    spool.hole(5, 3)
    spool.append([record_line(seq) for seq in range(11, 14)])
    spools = Tail(spool, Limits())
    found = await spools.read("one", 0, 0.0)
    assert found.piece is not None
    assert [item.seq for item in found.piece.after(0)] == [1, 2, 3, 4, 5, 10, 11, 12, 13]
    assert [item.seq for item in found.piece.after(4)] == [5, 10, 11, 12, 13]
    assert [item.hole.records for item in found.piece.after(0) if item.hole] == [3]
    again = await spools.read("one", 7, 0.0)
    assert again.piece is found.piece
    assert (await spools.read("one", 13, 0.0)).piece is None
    assert spools.reads == 1, "the end is known until there is a wake"
    spool.append([record_line(14)])
    spools.wake()
    grown = await spools.read("one", 13, 0.0)
    assert grown.piece is not None
    assert grown.piece.last_seq == 14


async def test_a_group_with_a_hole_is_not_believed() -> None:
    spool = MemorySpool()
    spool.hole(3, 2)
    spools = Tail(spool, Limits())
    spools.offer("one", StoredGroup(first_seq=1, last_seq=3, lines=(), missing=2))
    found = await spools.read("one", 0, 0.0)
    assert found.piece is not None
    assert spools.reads == 1
