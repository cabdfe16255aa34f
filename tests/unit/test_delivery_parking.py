"""What parks, what is said of it, and what a redrive says became of it; backends that are left out and put back."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from support.delivery_fixtures import QUICK, START_S, HandClock, World, plain, until
from support.fake_backend import FakeBackend

from sidecar.delivery import Delivery
from sidecar.delivery.parking_log import EVERY_S, KINDS_MAX, ParkingLog, Told
from sidecar.delivery.redrive import Became
from sidecar.model.delivery import Abilities, Atomicity, Dedup

SINGLE = Abilities(dedup=Dedup.EVENT_ID, dedup_window_s=86_400.0)
NONE = Abilities(dedup=Dedup.NONE)
KEY = Abilities(dedup=Dedup.REQUEST_KEY, dedup_window_s=86_400.0)
BATCH = Abilities(events_max=10, atomicity=Atomicity.ALL_OR_NOTHING, dedup=Dedup.EVENT_ID, dedup_window_s=86_400.0)
BARE_BATCH = Abilities(events_max=10, atomicity=Atomicity.ALL_OR_NOTHING, dedup=Dedup.REQUEST_KEY)


@pytest.fixture
def world(tmp_path: Path) -> World:
    world = World(tmp_path)
    world.begin("fake")
    return world


def sees(world: World, delivery: Delivery, expected: Mapping[str, object], name: str = "fake") -> bool:
    return plain(world.balance(delivery), name) == expected


# --- one event -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("abilities", [SINGLE, BATCH, KEY, NONE, BARE_BATCH])
async def test_an_event_that_cannot_be_sent_parks_alone(world: World, abilities: Abilities) -> None:
    ids = world.spool.add(5)
    odd = {ids[2]}
    backend = FakeBackend(
        abilities,
        events_of=lambda r: ("rows", "pages"),
        withhold=lambda r, name: "value_not_taken" if name == "pages" and r.id in odd else None,
    )
    async with world.deliver(backend) as delivery:
        delivery.wake()
        await until(lambda: sees(world, delivery, {"delivered": 4, "parked": {"value_not_taken": 1}}))
        assert backend.taken[f"{ids[2]}:rows"] == 1
        (row,) = delivery.parked()
        assert (row.event_id, row.record_id, row.reason) == (f"{ids[2]}:pages", ids[2], "value_not_taken")
        assert row.history == ("not sent: meter pages",)
        told = await delivery.offer_again()
        assert [(one.event_id, one.became, one.reason, one.detail) for one in told.each] == [
            (f"{ids[2]}:pages", Became.STILL_PARKED, "value_not_taken", "meter pages")
        ]
        odd.clear()
        told = await delivery.offer_again()
        if abilities is BARE_BATCH:  # it could only go with its sibling, which would be billed twice
            assert [one.became for one in told.each] == [Became.SIBLINGS_TAKEN]
            return
        assert told.offered == 1
        await until(lambda: sees(world, delivery, {"delivered": 5}))
        await delivery.forget({"one": 5})
        assert sees(world, delivery, {"delivered": 5})
    assert set(backend.taken.values()) == {1}
    assert len(backend.taken) == 10


async def test_a_record_of_which_no_event_can_be_sent_counts_once(world: World) -> None:
    world.spool.add(3)
    backend = FakeBackend(SINGLE, events_of=lambda r: ("a", "b"), withhold=lambda r, name: f"odd_{name}")
    async with world.deliver(backend) as delivery:
        delivery.wake()
        await until(lambda: sees(world, delivery, {"parked": {"odd_a": 3}}))
        assert len(delivery.parked()) == 6
        # What is stored is counted a moment later.
        await until(lambda: world.metrics.parked_by == {("fake", "odd_a"): 3, ("fake", "odd_b"): 3})
        backend.withhold = lambda r, name: "odd_b" if name == "b" else None
        assert (await delivery.offer_again()).offered == 3
        await until(lambda: sees(world, delivery, {"parked": {"odd_b": 3}}))
    async with world.deliver(backend) as delivery:
        backend.withhold = lambda r, name: None
        assert (await delivery.offer_again()).offered == 3
        await until(lambda: sees(world, delivery, {"delivered": 3}))


async def test_a_split_keeps_the_event_that_goes_and_parks_the_one_that_cannot(world: World) -> None:
    """The encoder has learned of a fault between sealing and splitting."""
    ids = world.spool.add(4)
    backend = FakeBackend(BATCH, events_of=lambda r: ("a", "b"), script=["stall:refuse:http_400"])
    async with world.deliver(backend) as delivery:
        delivery.wake()
        await until(lambda: backend.busy == 1)
        backend.withhold = lambda r, name: "odd" if (r.id, name) == (ids[1], "b") else None
        backend.released.set()
        await until(lambda: sees(world, delivery, {"delivered": 3, "parked": {"odd": 1}}))
    assert backend.taken[f"{ids[1]}:a"] == 1


# --- what a redrive says -------------------------------------------------------------------------------------


async def test_a_redrive_says_what_became_of_each_and_keeps_the_new_reason(world: World) -> None:
    ids = world.spool.add(4)
    unmapped = set(ids[:3])
    backend = FakeBackend(
        SINGLE,
        events_of=lambda r: ("rows", "pages"),
        park=lambda r: "no_customer" if r.id in unmapped else None,
        withhold=lambda r, name: "value_not_taken" if name == "pages" and r.id == ids[0] else None,
    )
    async with world.deliver(backend) as delivery:
        delivery.wake()
        await until(lambda: sees(world, delivery, {"delivered": 1, "parked": {"no_customer": 3}}))
        told = await delivery.offer_again()
        assert told.counts == {("still_parked", "no_customer"): 3}
        unmapped.discard(ids[0])
        unmapped.discard(ids[1])
        told = await delivery.offer_again(ids=[*ids[:2], ids[3], "nonsense"])
        assert told.counts == {("offered", ""): 3, ("still_parked", "value_not_taken"): 1}
        assert [one.detail for one in told.each if one.became is Became.STILL_PARKED] == ["meter pages"]
        assert told.not_found == [(ids[3], "delivered at fake"), ("nonsense", "")]
        await until(lambda: sees(world, delivery, {"delivered": 2, "parked": {"no_customer": 1, "value_not_taken": 1}}))
        unmapped.clear()
        backend.park = lambda r: "other" if r.id == ids[2] else None
        told = await delivery.offer_again(reason="no_customer")
        assert told.counts == {("still_parked", "other"): 1}
        assert {row.reason for row in delivery.parked()} == {"other", "value_not_taken"}
        assert (await delivery.offer_again(ids=[ids[2]], reason="no_customer")).not_found == [
            (ids[2], "parked at fake as other, so not among those chosen")
        ]
        assert sees(world, delivery, {"delivered": 2, "parked": {"other": 1, "value_not_taken": 1}})


async def test_a_redrive_tells_of_what_may_have_been_taken(world: World) -> None:
    world.spool.add(2)
    backend = FakeBackend(NONE, script=["lose_after"])
    async with world.deliver(backend) as delivery:
        delivery.wake()
        await until(lambda: sees(world, delivery, {"delivered": 1, "parked": {"unknown": 1}}))
        told = await delivery.offer_again()
        assert (told.offered, told.counts) == (0, {("maybe_taken", "unknown"): 1})
        assert (await delivery.offer_again(resend_unknown=True)).counts == {("offered", ""): 1}


async def test_a_redrive_of_many_counts_and_names_few(world: World) -> None:
    ids = world.spool.add(700, group=100)
    parked = ["no_customer"]
    backend = FakeBackend(BATCH, park=lambda r: parked[0])
    async with world.deliver(backend) as delivery:
        delivery.wake()
        await until(lambda: sees(world, delivery, {"parked": {"no_customer": 700}}))
        parked[0] = "other"  # each of them gets a new row, which is not looked at again
        told = await delivery.offer_again(ids=ids)
        assert told.counts == {("still_parked", "other"): 700}
        assert len(told.each) == 20
        assert told.not_found == []
        assert sees(world, delivery, {"parked": {"other": 700}})


# --- the log ---------------------------------------------------------------------------------------------------


def test_parking_is_told_at_once_and_then_hourly() -> None:
    log = ParkingLog()
    assert log.parked("stripe", "no_customer", 2, 0.0) == Told("stripe", "no_customer", 2, first=True)
    assert log.parked("stripe", "too_old", 1, 1.0) == Told("stripe", "too_old", 1, first=True)
    assert log.parked("lago", "no_customer", 1, 1.0) == Told("lago", "no_customer", 1, first=True)
    for second in range(10, 3000, 10):
        assert log.parked("stripe", "no_customer", 3, float(second)) is None
    assert log.due(EVERY_S - 1) == []
    assert log.due(EVERY_S) == [Told("stripe", "no_customer", 3 * 299, first=False)]
    assert log.due(2 * EVERY_S) == []
    assert log.parked("stripe", "no_customer", 5, 2 * EVERY_S) == Told("stripe", "no_customer", 5, first=False)


def test_reasons_that_a_vendor_makes_up_do_not_fill_the_log() -> None:
    log = ParkingLog()
    told = [log.parked("stripe", f"code_{n}", 1, 0.0) for n in range(3 * KINDS_MAX)]
    assert sum(one is not None for one in told) == KINDS_MAX + 1
    assert log.due(EVERY_S) == [Told("stripe", "other", 2 * KINDS_MAX - 1, first=False)]


async def test_what_is_parked_at_sealing_and_by_a_refusal_is_logged(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    world.clock = HandClock()
    ids = world.spool.add(20)
    backend = FakeBackend(SINGLE, park=lambda r: "no_customer" if r.id == ids[0] else None, poison=set(ids[1:4]))
    async with world.deliver(backend) as delivery:
        await delivery.drain(5.0)
    lines = [r.facts for r in caplog.records if "are parked" in r.message]  # type: ignore[attr-defined]
    assert sorted((one["backend"], one["reason"], one["records"]) for one in lines) == [
        ("fake", "http_400", 1),
        ("fake", "no_customer", 1),
    ]


# --- left out and put back -------------------------------------------------------------------------------------


@pytest.mark.parametrize("abilities", [SINGLE, BATCH, KEY, NONE])
async def test_a_backend_that_is_put_back_gets_what_it_missed_once(
    world: World, abilities: Abilities, caplog: pytest.LogCaptureFixture
) -> None:
    world.begin("fake", "other")
    caplog.set_level(logging.INFO)
    world.spool.add(30)
    stuck = FakeBackend(abilities, behaviour=lambda s: "retry:dns")
    async with world.deliver(stuck, FakeBackend(SINGLE, name="other")) as delivery:
        delivery.wake()
        await until(lambda: len(stuck.offers) > 3)
    async with world.deliver(FakeBackend(SINGLE, name="other")) as delivery:
        await until(lambda: len(delivery.parked(backend="fake")) == 30)
        assert delivery.parked_now() == {("fake", "removed"): 30}
        world.spool.add(7)
        world.spool.add(3, "new0")
        delivery.wake()
        await until(lambda: sees(world, delivery, {"delivered": 40}, "other"))
    back = FakeBackend(abilities)
    async with world.deliver(back, FakeBackend(SINGLE, name="other")) as delivery:
        await until(lambda: not delivery.parked(reason="removed") or abilities is NONE)
        kept = len(delivery.parked())
        want = {"delivered": 40 - kept} | ({"parked": {"unknown": kept}} if kept else {})
        if abilities is not NONE:
            assert kept == 0
            await until(lambda: sees(world, delivery, want))
    async with world.deliver(back, FakeBackend(SINGLE, name="other")) as delivery:
        await until(lambda: len(back.taken) + len(delivery.parked()) == 40)
        world.balance(delivery)
    assert set(back.taken.values()) == {1}
    said = [r.facts for r in caplog.records if "left out for a while" in r.message]  # type: ignore[attr-defined]
    assert [(one["backend"], one["pending"], one["skipped"]) for one in said] == [("fake", 10, 0)]


async def test_a_gap_is_passed_over_where_that_is_set_and_said(world: World, caplog: pytest.LogCaptureFixture) -> None:
    world.clock = HandClock()
    world.begin("fake", "other")
    other = FakeBackend(SINGLE, name="other")
    async with world.deliver(other) as delivery:
        world.spool.add(7)
        await delivery.drain(5.0)
    back = FakeBackend(SINGLE)
    world.skip_gaps = True
    for _ in range(2):
        async with world.deliver(back, other) as delivery:
            assert sees(world, delivery, {"skipped": {"gap": 7}})
    world.skip_gaps = False
    async with world.deliver(back, other) as delivery:
        await delivery.drain(5.0)
        assert sees(world, delivery, {"skipped": {"gap": 7}})  # decided is decided
        assert await delivery.redrive(backend="fake", reason="gap", since_s=START_S - 100) == 7
        await delivery.drain(5.0)
        assert sees(world, delivery, {"delivered": 7})
    assert world.metrics.skipped_by[("fake", "gap")] == 7
    assert [r.levelname for r in caplog.records if "left out for a while" in r.message] == ["WARNING"]


async def test_what_retention_took_during_a_gap_is_said_and_the_rest_goes(world: World) -> None:
    world.begin("fake", "other")
    other = FakeBackend(SINGLE, name="other")
    async with world.deliver(other) as delivery:
        world.spool.add(30)
        delivery.wake()
        await until(lambda: sees(world, delivery, {"delivered": 30}, "other"))
        world.spool.retire(20)
        await delivery.forget({"one": 20})
    back = FakeBackend(SINGLE)
    async with world.deliver(back, other) as delivery:
        delivery.wake()
        await until(lambda: sees(world, delivery, {"delivered": 10, "skipped": {"retired": 20}}))
        assert await delivery.redrive(backend="fake", since_s=0.0) == 0  # there is nothing to redrive
        await delivery.forget({"one": 30})
        assert sees(world, delivery, {"delivered": 10, "skipped": {"retired": 20}})
    assert set(back.taken.values()) == {1}


@pytest.mark.parametrize(("away_s", "expected"), [(60.0, "delivered"), (90_000.0, "parked")])
async def test_a_request_that_was_under_way_when_its_backend_was_left_out_keeps_its_window(
    world: World, away_s: float, expected: str
) -> None:
    world.clock, world.limits = HandClock(), replace(QUICK, sweep_s=0.05)
    world.spool.add(2)
    lost = FakeBackend(KEY, behaviour=lambda s: "lose_after")
    async with world.deliver(lost) as delivery:
        await delivery.drain(1.0)
        assert sum(lost.taken.values()) == 2
    async with world.deliver() as delivery:
        await until(lambda: len(delivery.parked(backend="fake")) == 2)
        assert all(row.maybe_taken for row in delivery.parked())
    world.clock.go(away_s)
    lost.behaviour = None
    async with world.deliver(lost) as delivery:
        want = {"delivered": 2} if expected == "delivered" else {"parked": {"window_ended": 2}}
        await until(lambda: sees(world, delivery, want))
    assert set(lost.taken.values()) == {1}
    assert len({(offer.key, offer.body) for offer in lost.offers}) == 2


async def test_a_new_backend_still_begins_now(world: World, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with world.deliver(FakeBackend(SINGLE)) as delivery:
        world.spool.add(5)
        delivery.wake()
        await until(lambda: sees(world, delivery, {"delivered": 5}))
    async with world.deliver(FakeBackend(SINGLE), FakeBackend(SINGLE, name="new")) as delivery:
        assert sees(world, delivery, {"skipped": {"before": 5}}, "new")
    assert world.metrics.skipped_by[("new", "before")] == 5
    assert [r.levelname for r in caplog.records if "is new" in r.message] == ["INFO"]


# --- customers that are mapped later ------------------------------------------------------------------------------


@pytest.mark.parametrize("abilities", [SINGLE, BATCH])
async def test_what_has_a_customer_now_goes_again_and_the_rest_is_not_touched(
    world: World, abilities: Abilities
) -> None:
    ids = world.spool.add(6)
    nobody, other = {ids[1], ids[3]}, {ids[5]}

    def parks(record: object) -> str | None:
        id_ = record.id  # type: ignore[attr-defined]
        return "no_customer" if id_ in nobody else "unsettled" if id_ in other else None

    backend = FakeBackend(abilities, park=parks)
    async with world.deliver(backend) as delivery:
        delivery.wake()
        await until(lambda: sees(world, delivery, {"delivered": 3, "parked": {"no_customer": 2, "unsettled": 1}}))
        before = [row.id for row in delivery.parked()]
        assert (await delivery.offer_mapped()).offered == 0
        assert [row.id for row in delivery.parked()] == before
        nobody.discard(ids[1])
        other.clear()  # what is parked for another reason is for an operator to offer
        assert (await delivery.offer_mapped()).offered == 1
        await until(lambda: sees(world, delivery, {"delivered": 4, "parked": {"no_customer": 1, "unsettled": 1}}))
        assert (await delivery.offer_mapped()).offered == 0
        assert set(backend.taken.values()) == {1}
