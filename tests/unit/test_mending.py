"""Taking back and complaining, in any order and mixed with redrives and forgetting: every record stays in one place."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from support.delivery_fixtures import World, plain, until
from support.fake_backend import FakeBackend

from sidecar.delivery import Delivery
from sidecar.delivery.corrections import CANCELLED, Named, cancel, complain
from sidecar.delivery.rows import Amendment, Member
from sidecar.delivery.types import Parking
from sidecar.model.delivery import (
    Abilities,
    Atomicity,
    Dedup,
    Delivered,
    Event,
    Refused,
    Retry,
    Sealed,
    Undone,
    Verdict,
)
from sidecar.model.record import Record

BATCH = Abilities(events_max=10, atomicity=Atomicity.ALL_OR_NOTHING, dedup=Dedup.EVENT_ID)
SINGLE = Abilities(dedup=Dedup.REQUEST_KEY, dedup_window_s=86_400)
NONE = Abilities(dedup=Dedup.NONE, concurrency=4)


@dataclass(slots=True)
class Undoing(FakeBackend):
    """Takes back what it is asked to, or says `says`."""

    says: Verdict = field(default_factory=Delivered)
    undone: Counter[str] = field(default_factory=Counter)
    seen: list[Record | None] = field(default_factory=list)

    async def cancel(self, event: Event, record: Record | None) -> Undone:
        self.seen.append(record)
        if isinstance(self.says, Delivered):
            self.undone[event.event_id] += 1
        return Undone(self.says, ("the meter longest keeps it",))


@pytest.fixture
def world(tmp_path: Path) -> World:
    world = World(tmp_path)
    world.begin("fake")
    return world


async def settled(world: World, delivery: Delivery) -> dict[str, object]:
    delivery.wake()
    await until(lambda: delivery.totals(world.spool.upto())["fake"].pending == 0, what=f"{delivery} settled")
    return plain(world.balance(delivery))


async def test_what_is_taken_back_is_passed_over(world: World) -> None:
    ids = world.spool.add(25)
    backend = Undoing(BATCH)
    async with world.deliver(backend) as delivery:
        await settled(world, delivery)
        (outcome,) = await cancel(ids[3], delivery, {"fake": backend})
        assert (outcome.done, outcome.text) == (True, "taken back; the meter longest keeps it")
        assert plain(world.balance(delivery)) == {"delivered": 24, "skipped": {CANCELLED: 1}}
        assert world.metrics.skipped_by == {("fake", CANCELLED): 1}
        assert [record.id for record in backend.seen if record is not None] == [ids[3]]
        assert await cancel(ids[3], delivery, {"fake": backend}) == [], "it is nobody's any more"
        assert await cancel("nobody", delivery, {"fake": backend}) == []
        assert await cancel(ids[4], delivery, {"fake": backend}, backend="other") == []
    assert backend.undone == {ids[3]: 1}


async def test_a_backend_that_says_no_or_cannot_leaves_all_as_it_is(world: World) -> None:
    ids = world.spool.add(2)
    backend = Undoing(SINGLE, says=Refused("resource_missing"))
    async with world.deliver(backend) as delivery:
        await settled(world, delivery)
        for says, word in ((Refused("resource_missing"), "resource_missing"), (Retry("dns"), "dns")):
            backend.says = says
            (outcome,) = await cancel(ids[0], delivery, {"fake": backend})
            assert not outcome.done
            assert word in outcome.text
        (outcome,) = await cancel(ids[0], delivery, {"fake": FakeBackend(SINGLE)})
        assert "cannot take back" in outcome.text
        (outcome,) = await cancel(ids[0], delivery, {})
        assert "is not configured" in outcome.text
        assert plain(world.balance(delivery)) == {"delivered": 2}


async def test_what_is_pending_is_told_to_be_asked_again(world: World) -> None:
    ids = world.spool.add(1)
    backend = Undoing(SINGLE, script=["stall"])
    async with world.deliver(backend) as delivery:
        delivery.wake()
        await until(lambda: backend.busy == 1)
        (outcome,) = await cancel(ids[0], delivery, {"fake": backend})
        assert (outcome.done, "not delivered yet" in outcome.text) == (False, True)
        (outcome,) = await complain("fake", [Named(ids[0], "x")], delivery, {"fake": backend})
        assert (outcome.done, "not settled yet" in outcome.text) == (False, True)
        backend.released.set()
        assert await settled(world, delivery) == {"delivered": 1}


async def test_a_parked_one_is_passed_over_and_one_that_may_have_been_taken_is_taken_back_first(world: World) -> None:
    ids = world.spool.add(3)
    lost = ids[1]
    backend = Undoing(
        NONE, poison={ids[0]}, behaviour=lambda s: "lose_after" if s.events[0].record_id == lost else None
    )
    async with world.deliver(backend) as delivery:
        assert await settled(world, delivery) == {"delivered": 1, "parked": {"unknown": 1, "http_400": 1}}
        assert [outcome.done for outcome in await cancel(ids[0], delivery, {"fake": backend})] == [True]
        assert backend.undone == {}
        backend.says = Refused("no")
        assert [outcome.done for outcome in await cancel(ids[1], delivery, {"fake": backend})] == [False]
        backend.says = Delivered()
        assert [outcome.done for outcome in await cancel(ids[1], delivery, {"fake": backend})] == [True]
        assert backend.undone == {ids[1]: 1}
        assert plain(world.balance(delivery)) == {"delivered": 1, "skipped": {CANCELLED: 2}}


async def test_a_complaint_parks_redrives_and_is_told_twice(world: World) -> None:
    ids = world.spool.add(12)
    backend = Undoing(BATCH, events_of=lambda record: ("calls", "tokens"))
    async with world.deliver(backend) as delivery:
        assert await settled(world, delivery) == {"delivered": 12}
        named = [Named(f"{ids[5]}:calls", "no_customer"), Named(f"{ids[6]}:tokens", "a code\n"), Named("x:calls", "y")]
        outcomes = await complain("fake", named, delivery, {"fake": backend})
        assert [outcome.done for outcome in outcomes] == [True, True, False]
        parked = {"complained:no_customer": 1, "complained:other": 1}
        assert plain(world.balance(delivery)) == {"delivered": 10, "parked": parked}
        assert world.metrics.parked_by == {("fake", reason): 1 for reason in parked}
        assert [one.text for one in await complain("fake", named[:2], delivery, {})] == ["is parked already"] * 2
        rows = delivery.parked()
        assert [(row.maybe_taken, row.history[-1]) for row in rows] == [
            (False, "reported as no_customer"),
            (False, "reported as a code\n"),
        ]
        assert await delivery.redrive() == 2
        assert await settled(world, delivery) == {"delivered": 12}
        again = await complain("fake", named[:1], delivery, {})
        assert again[0].text == "parked as complained:no_customer", "also what was redriven may be complained about"


async def test_what_is_forgotten_or_moved_meanwhile_is_left_alone(world: World) -> None:
    ids = world.spool.add(20, group=10)
    poison = {ids[15]}
    backend = Undoing(BATCH, poison=poison)
    async with world.deliver(backend) as delivery:
        await settled(world, delivery)
        (found,) = [one for one in delivery.find(ids[14]) if one.fate == "delivered"]
        member = Member(found.seq, found.record_id, found.event_id)
        await delivery.forget({"one": 20})
        before = plain(world.balance(delivery))
        for amendment in (
            Amendment(request=found.request, member=member, skip=CANCELLED),
            Amendment(request=10_000, member=member, parking=Parking("complained:x"), line=b"{}"),
        ):
            assert not await delivery.store.run(delivery.store.amend, amendment, 0.0)
        assert plain(world.balance(delivery)) == before
        assert await cancel(ids[2], delivery, {"fake": backend}) == []


@pytest.mark.parametrize("abilities", [BATCH, SINGLE, NONE], ids=lambda a: str(a.dedup))
@pytest.mark.parametrize("seed", range(6))
async def test_any_order_of_all_of_it_keeps_the_balance(tmp_path: Path, abilities: Abilities, seed: int) -> None:
    dice = random.Random(seed)
    world = World(tmp_path)
    world.begin("fake")
    ids = world.spool.add(40, group=7)

    def fate(sealed: Sealed) -> str | None:
        return dice.choice([None, None, None, "lose_after"]) if abilities is NONE else None

    backend = Undoing(
        abilities,
        poison=set(dice.sample(ids, 4)),
        behaviour=fate,
        events_of=lambda record: ("calls", "tokens") if int(record.id[:8]) % 2 else ("",),
    )
    for _ in range(2):  # the second over a new start
        async with world.deliver(backend) as delivery:
            await settled(world, delivery)
            for _ in range(15):
                one = dice.choice(ids)
                event = one if int(one[:8]) % 2 == 0 else f"{one}:{dice.choice(['calls', 'tokens'])}"
                match dice.randrange(5):
                    case 0:
                        await cancel(one, delivery, {"fake": backend})
                    case 1:
                        await cancel(event, delivery, {"fake": backend})
                    case 2:
                        await complain("fake", [Named(event, "code")], delivery, {"fake": backend})
                    case 3:
                        backend.poison.clear()
                        await delivery.redrive(resend_unknown=dice.random() < 0.5)
                        await settled(world, delivery)
                    case _:
                        await delivery.forget({"one": dice.randrange(41)})
                world.balance(delivery)  # it holds, and the rows say the same
            ids += world.spool.add(5)
    # In a batch a redriven record goes whole, as what the backend recognises: its other events are delivered anew.
    assert set(backend.undone.values()) <= {1} or abilities is BATCH, "nothing is taken back twice"
