"""One backend's lane and several beside each other: what is delivered, parked, split, retried, held."""

from __future__ import annotations

import asyncio
import inspect
import sqlite3
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.delivery_fixtures import (
    QUICK,
    START_S,
    HandClock,
    MemorySpool,
    World,
    connection_of,
    held,
    plain,
    record_id,
    record_line,
    rows_in,
    until,
)
from support.fake_backend import FakeBackend

from sidecar.delivery import Delivery, DeliveryStore, StateError, encoding, store, worker
from sidecar.model.delivery import (
    KEY_MISMATCH,
    Abilities,
    Atomicity,
    Blocked,
    Dedup,
    Delivered,
    Refused,
    Retry,
    Sealed,
    Unknown,
    Verdict,
)
from sidecar.model.exchange import Outcome
from sidecar.spool.types import SpoolDamaged, StoredGroup
from sidecar.storage.postgres import Postgres, call

BATCH = Abilities(events_max=10, atomicity=Atomicity.ALL_OR_NOTHING, dedup=Dedup.REQUEST_KEY, dedup_window_s=86_400)
EVENTS = Abilities(events_max=10, atomicity=Atomicity.ALL_OR_NOTHING, dedup=Dedup.EVENT_ID, dedup_window_s=86_400)
ITEMS = Abilities(events_max=10, atomicity=Atomicity.PER_ITEM, dedup=Dedup.EVENT_ID, knows_duplicates=True)
PREFIX = Abilities(events_max=10, atomicity=Atomicity.PREFIX, dedup=Dedup.EVENT_ID)
SINGLE = Abilities(dedup=Dedup.REQUEST_KEY, dedup_window_s=86_400)
NONE = Abilities(dedup=Dedup.NONE, concurrency=4)


@pytest.fixture(params=["file", pytest.param("lane", marks=pytest.mark.server)])
def world(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[World]:
    """With the state in `delivery.db`, and with that of a lane in PostgreSQL."""
    world = World(tmp_path)
    if request.param == "lane":
        world.shared = Postgres(request.getfixturevalue("postgres_database"), name="test")
    world.begin("fake")
    yield world
    if world.shared is not None:
        call(world.shared.close())


def only_in_a_file(world: World) -> None:
    if world.shared is not None:
        pytest.skip("of the file")


def settled(world: World, delivery: Delivery, name: str = "fake") -> bool:
    return delivery.totals(world.spool.upto())[name].pending == 0


def rows(world: World, table: str) -> int:
    return rows_in(world, table)


async def all_settled(world: World, delivery: Delivery, name: str = "fake") -> dict[str, object]:
    delivery.wake()
    await until(lambda: settled(world, delivery, name), what=f"{delivery} settled")
    return plain(world.balance(delivery), name)


@pytest.mark.parametrize("abilities", [BATCH, EVENTS, ITEMS, PREFIX, SINGLE, NONE], ids=lambda a: str(a.atomicity))
async def test_every_record_is_delivered_once(world: World, abilities: Abilities) -> None:
    world.begin("fake", "other")
    backend = FakeBackend(abilities)
    ids = world.spool.add(137)
    async with world.deliver(backend, FakeBackend(SINGLE, name="other")) as delivery:
        assert await all_settled(world, delivery) == {"delivered": 137}
        more = world.spool.add(30, "two")
        assert await all_settled(world, delivery) == {"delivered": 167}
    assert backend.taken == Counter([*ids, *more])
    assert all(offer.attempt == 1 for offer in backend.offers)
    assert backend.busy_most <= abilities.concurrency


async def test_records_go_in_order_where_nothing_fails(world: World) -> None:
    backend = FakeBackend(Abilities(concurrency=1, dedup=Dedup.REQUEST_KEY))
    ids = world.spool.add(60)
    async with world.deliver(backend) as delivery:
        await all_settled(world, delivery)
    assert [offer.key for offer in backend.offers] == ids


async def test_a_batch_fills_up_before_it_leaves(world: World) -> None:
    backend = FakeBackend(BATCH)
    async with world.deliver(backend) as delivery:
        for _ in range(25):
            world.spool.add(1)
            delivery.wake()
        assert await all_settled(world, delivery) == {"delivered": 25}
    assert len(backend.offers) <= 5


async def test_a_retry_sends_the_same_bytes_and_key(world: World) -> None:
    backend = FakeBackend(BATCH, script=["retry:http_503", "lose_after", "retry:dns", "raise", "short"])
    world.spool.add(10)
    async with world.deliver(backend) as delivery:
        assert await all_settled(world, delivery) == {"delivered": 10}
    assert len({(offer.key, offer.body) for offer in backend.offers}) == 1
    assert [offer.attempt for offer in backend.offers] == [1, 2, 3, 4, 5, 6]
    assert set(backend.taken.values()) == {1}


@pytest.mark.parametrize("abilities", [BATCH, EVENTS, PREFIX])
async def test_a_refused_batch_is_split_until_the_bad_record_stands_alone(world: World, abilities: Abilities) -> None:
    ids = world.spool.add(40)
    backend = FakeBackend(abilities, poison={ids[3], ids[17]})
    async with world.deliver(backend) as delivery:
        assert await all_settled(world, delivery) == {"delivered": 38, "parked": {"http_400": 2}}
        parked = delivery.parked()
    assert {row.record_id for row in parked} == {ids[3], ids[17]}
    assert all(row.body and row.line and "refused http_400" in row.history[-1] for row in parked)
    assert set(backend.taken) == set(ids) - backend.poison
    assert set(backend.taken.values()) == {1}
    assert any(offer.key.endswith(".0") for offer in backend.offers)


async def test_a_report_settles_each_event_apart(world: World) -> None:
    ids = world.spool.add(10)
    yes = Delivered()
    report: list[Verdict] = [
        *(yes, yes, yes, yes, Refused("bad_customer"), Retry("http_429")),
        *(yes, yes, yes, Unknown("lost")),
    ]
    backend = FakeBackend(ITEMS, script=[report])
    async with world.deliver(backend) as delivery:
        assert await all_settled(world, delivery) == {"delivered": 9, "parked": {"bad_customer": 1}}
    assert [event.event_id for event in backend.offers[1].events] == [ids[5], ids[9]]
    assert backend.offers[1].key == f"{backend.offers[0].key}.0"


async def test_duplicates_are_counted_apart(world: World) -> None:
    ids = world.spool.add(10)
    backend = FakeBackend(ITEMS)
    backend.taken.update(ids[:4])
    async with world.deliver(backend) as delivery:
        assert await all_settled(world, delivery) == {"delivered": 6, "duplicate": 4}


async def test_one_stuck_record_holds_nothing_else_up(world: World) -> None:
    ids = world.spool.add(300)
    stuck = {ids[0], ids[5], ids[9]}
    backend = FakeBackend(SINGLE, behaviour=lambda s: "retry:http_500" if s.events[0].record_id in stuck else None)
    async with world.deliver(backend) as delivery:
        delivery.wake()
        await until(lambda: delivery.totals(world.spool.upto())["fake"].delivered == 297)
        assert plain(world.balance(delivery)) == {"delivered": 297, "pending": 3}
        stuck.clear()
        assert await all_settled(world, delivery) == {"delivered": 300}


async def test_one_stuck_backend_holds_no_other_up(world: World) -> None:
    world.begin("fake", "other")
    world.spool.add(100)
    stuck, good = FakeBackend(SINGLE, behaviour=lambda s: "stall"), FakeBackend(SINGLE, name="other")
    async with world.deliver(stuck, good) as delivery:
        delivery.wake()
        await until(lambda: len(good.taken) == 100)
        totals = world.balance(delivery)
        assert plain(totals, "fake") == {"pending": 100}
        assert delivery.retired_upto() == {"one": next(c.seq for c in delivery.store.cursors("fake"))}
        stuck.released.set()
        assert await all_settled(world, delivery) == {"delivered": 100}
        assert delivery.retired_upto() == {"one": 100}


async def test_a_lost_answer_is_parked_where_a_repeat_would_double(world: World) -> None:
    ids = world.spool.add(50)
    backend = FakeBackend(NONE, behaviour=lambda s: "lose_after" if s.events[0].record_id == ids[7] else None)
    async with world.deliver(backend) as delivery:
        assert await all_settled(world, delivery) == {"delivered": 49, "parked": {"unknown": 1}}
        [parked] = delivery.parked(reason="unknown")
        assert parked.maybe_taken
        assert await delivery.redrive() == 0  # not without the operator's word
        backend.behaviour = None
        assert await delivery.redrive(resend_unknown=True) == 1
        assert await all_settled(world, delivery) == {"delivered": 50}
    assert backend.offers[-1].body == next(o.body for o in backend.offers if o.key == ids[7])
    assert backend.taken[ids[7]] == 2


@pytest.mark.parametrize("abilities", [SINGLE, BATCH, EVENTS])
async def test_a_refusal_for_its_key_parks_what_may_be_there(world: World, abilities: Abilities) -> None:
    """Taken, the answer lost, and then refused for the key: no part of it goes under another key unasked."""
    ids = world.spool.add(10)
    backend = FakeBackend(abilities)

    def behave(sealed: Sealed) -> str | None:
        if ids[3] not in {event.record_id for event in sealed.events} or "~" in sealed.key:
            return None
        return "lose_after" if sealed.attempt == 1 else f"refuse:{KEY_MISMATCH}"

    backend.behaviour = behave
    async with world.deliver(backend) as delivery:
        settled_as = await all_settled(world, delivery)
        lost = 1 if abilities is SINGLE else 10
        assert settled_as.pop("parked") == {KEY_MISMATCH: lost}
        assert all(parked.maybe_taken for parked in delivery.parked())
        assert await delivery.redrive() == 0
        assert len({key for key, in_ in keys_of(backend).items() if ids[3] in in_}) == 1
        assert await delivery.redrive(resend_unknown=True) == lost
        assert await all_settled(world, delivery) in ({"delivered": 10}, {"delivered": 10 - lost, "duplicate": lost})
    assert len({key for key, in_ in keys_of(backend).items() if ids[3] in in_}) == 2, "refused again under the old one"


def keys_of(backend: FakeBackend) -> dict[str, set[str]]:
    return {offer.key: {event.record_id for event in offer.events} for offer in backend.offers}


async def test_a_yes_in_a_foreign_form_parks_what_may_be_there_and_keeps_the_rest(world: World) -> None:
    world.spool.add(50)
    foreign: list[Verdict] = [Blocked("unexpected_answer", maybe_taken=True)]
    backend = FakeBackend(NONE, behaviour=lambda s: foreign)
    async with world.deliver(backend) as delivery:
        delivery.wake()
        await until(lambda: ("fake", "unexpected_answer") in world.metrics.blocks)
        await until(lambda: len(backend.offers) > 6)
        totals = world.balance(delivery)["fake"]
        assert set(totals.parked) == {"unknown"}
        assert max(map(len, keys_of(backend).values())) == 1
        assert len(backend.offers) == len(keys_of(backend)), "none is offered twice: that would double it"
        backend.behaviour = None
        await all_settled(world, delivery)
        assert world.balance(delivery)["fake"].delivered >= 30


async def test_why_a_backend_is_down_is_said(world: World, caplog: pytest.LogCaptureFixture) -> None:
    world.spool.add(50)
    backend = FakeBackend(SINGLE, behaviour=lambda s: "retry:refused")
    async with world.deliver(backend) as delivery:
        delivery.wake()
        await until(lambda: delivery.status()[0].state == "down")
        assert delivery.status()[0].reason == "refused"
        said = [record for record in caplog.records if record.levelname == "WARNING"]
        words = "fake is down: refused; it is asked again from time to time"
        assert [record.getMessage() for record in said] == [words]
        assert said[0].facts == {"backend": "fake", "reason": "refused"}  # type: ignore[attr-defined]
        backend.behaviour = lambda s: "retry:dns"
        await until(lambda: delivery.status()[0].reason == "dns")
        backend.behaviour = None
        assert await all_settled(world, delivery) == {"delivered": 50}
        assert delivery.status()[0].reason is None


async def test_an_operator_may_accept_doubles(world: World) -> None:
    world.spool.add(3)
    backend = FakeBackend(Abilities(dedup=Dedup.NONE, resend_unknown=True), script=["lose_after"])
    async with world.deliver(backend) as delivery:
        assert await all_settled(world, delivery) == {"delivered": 3}
    assert sum(backend.taken.values()) == 4


async def test_without_dedup_no_more_is_sealed_than_is_under_way(world: World) -> None:
    world.spool.add(200)
    backend = FakeBackend(NONE, latency_s=0.001)
    most = 0
    async with world.deliver(backend) as delivery:
        delivery.wake()
        while not settled(world, delivery):
            [status] = delivery.status()
            most = max(most, status.sealed)
            await asyncio.sleep(0)
        assert plain(world.balance(delivery)) == {"delivered": 200}
    assert most <= NONE.concurrency


async def test_blocked_keeps_everything_and_goes_on_by_itself(world: World) -> None:
    world.spool.add(500)
    backend = FakeBackend(SINGLE, behaviour=lambda s: "block:unauthorized")
    async with world.deliver(backend) as delivery:
        delivery.wake()
        await until(lambda: ("fake", "unauthorized") in world.metrics.blocks)
        await until(lambda: len(backend.offers) > 12)
        [status] = delivery.status()
        assert (status.state, status.reason) == ("blocked", "unauthorized")
        assert plain(world.balance(delivery)) == {"pending": 500}
        backend.behaviour = None
        assert await all_settled(world, delivery) == {"delivered": 500}
        assert world.metrics.blocks[-1] == ("fake", None)
    assert len(world.metrics.blocks) == 2


@pytest.mark.parametrize("abilities", [SINGLE, BATCH])
async def test_many_refusals_for_one_reason_are_suspect(world: World, abilities: Abilities) -> None:
    world.spool.add(400)
    backend = FakeBackend(abilities, behaviour=lambda s: "refuse:http_400")
    async with world.deliver(backend) as delivery:
        delivery.wake()
        await until(lambda: ("fake", "suspect") in world.metrics.blocks)
        seen = len(backend.offers)
        await until(lambda: len(backend.offers) > seen + 5)
        totals = world.balance(delivery)["fake"]
        assert sum(totals.parked.values()) < QUICK.suspect_after
        assert totals.pending > 380
        backend.behaviour = None
        result = await all_settled(world, delivery)
        assert (
            result == {"delivered": 400 - sum(totals.parked.values()), "parked": dict(totals.parked)}
            or not totals.parked
        )


async def test_denied_refused_and_unsettled_calls_are_not_billed(world: World) -> None:
    world.begin("fake", "other")
    for outcome in (Outcome.COMPLETE, Outcome.DENIED, Outcome.REFUSED, Outcome.UNKNOWN):
        world.spool.add(2, outcome=outcome)
    everything = FakeBackend(Abilities(bills=False), name="other")
    async with world.deliver(FakeBackend(BATCH), everything) as delivery:
        assert await all_settled(world, delivery) == {
            "delivered": 2,
            "skipped": {"denied": 2, "refused": 2},
            "parked": {"unsettled": 2},
        }
        assert await all_settled(world, delivery, "other") == {"delivered": 8}


async def test_a_line_that_is_no_record_is_parked(world: World) -> None:
    world.spool.append([record_line(1), b"{}", b"\xff", record_line(4)])
    async with world.deliver(FakeBackend(BATCH)) as delivery:
        assert await all_settled(world, delivery) == {"delivered": 2, "parked": {"unreadable": 2}}


async def test_records_that_cannot_be_read_any_more_are_told(world: World) -> None:
    world.spool.add(5)
    world.spool.hole(numbers=7, missing=6)
    world.spool.add(5)
    async with world.deliver(FakeBackend(BATCH)) as delivery:
        assert await all_settled(world, delivery) == {"delivered": 10, "skipped": {"missing": 6}}


async def test_an_encoder_that_raises_parks_only_its_record(world: World) -> None:
    ids = world.spool.add(20)

    def skip(record: object) -> None:
        if getattr(record, "id", "") == ids[4]:
            raise ValueError("an encoder's bug")

    async with world.deliver(FakeBackend(BATCH, skip=skip)) as delivery:
        assert await all_settled(world, delivery) == {"delivered": 19, "parked": {"encode_failed": 1}}


async def test_a_record_counts_once_by_its_worst_event(world: World) -> None:
    ids = world.spool.add(12)
    verdicts = {f"{ids[0]}:b": "refuse:no_meter", f"{ids[1]}:a": "lose_before"}
    backend = FakeBackend(
        Abilities(dedup=Dedup.NONE),
        events_of=lambda r: ("a", "b", "c"),
        behaviour=lambda s: verdicts.get(s.events[0].event_id),
    )
    async with world.deliver(backend) as delivery:
        assert await all_settled(world, delivery) == {"delivered": 10, "parked": {"no_meter": 1, "unknown": 1}}
        assert len(backend.taken) == 34
        verdicts.clear()
        assert await delivery.redrive(reason="no_meter") == 1
        assert await all_settled(world, delivery) == {"delivered": 11, "parked": {"unknown": 1}}
    assert backend.offers[-1].key == f"{ids[0]}:b~1"
    assert set(backend.taken.values()) == {1}


async def test_several_events_in_a_batch_that_is_split(world: World) -> None:
    ids = world.spool.add(20)
    backend = FakeBackend(EVENTS, events_of=lambda r: ("a", "b", "c"), poison={ids[4]})
    async with world.deliver(backend) as delivery:
        assert await all_settled(world, delivery) == {"delivered": 19, "parked": {"http_400": 1}}
        assert len(delivery.parked()) == 3
        backend.poison.clear()
        assert await delivery.redrive() == 3
        assert await all_settled(world, delivery) == {"delivered": 20}
    assert set(backend.taken.values()) == {1}
    assert len(backend.taken) == 60


@pytest.mark.parametrize("names", [("a", "b"), ("a", "b", "c", "d")])
async def test_no_batch_ends_inside_a_record(world: World, names: tuple[str, ...]) -> None:
    ids = world.spool.add(30)
    keyed = replace(BATCH, events_max=3)
    backend = FakeBackend(keyed, events_of=lambda r: names, poison={ids[4], ids[5], ids[20]})
    async with world.deliver(backend) as delivery:
        assert await all_settled(world, delivery) == {"delivered": 27, "parked": {"http_400": 3}}
        backend.poison.clear()
        assert await delivery.redrive() == 3 * len(names)
        assert await all_settled(world, delivery) == {"delivered": 30}
    assert set(backend.taken.values()) == {1}
    for offer in backend.offers:
        owners = Counter(event.record_id for event in offer.events)
        assert len(owners) == 1 or set(owners.values()) == {len(names)}


async def test_redriven_refusals_get_a_new_key_each_time(world: World) -> None:
    ids = world.spool.add(5)
    backend = FakeBackend(SINGLE, poison={ids[2]})
    async with world.deliver(backend) as delivery:
        assert await all_settled(world, delivery) == {"delivered": 4, "parked": {"http_400": 1}}
        assert await delivery.redrive(ids=[ids[2]], backend="other") == 0
        assert await delivery.redrive(ids=[ids[2]]) == 1
        assert await all_settled(world, delivery) == {"delivered": 4, "parked": {"http_400": 1}}
        backend.poison.clear()
        assert await delivery.redrive(backend="fake", reason="http_400") == 1
        assert await all_settled(world, delivery) == {"delivered": 5}
        assert delivery.parked() == []
        assert rows(world, "payload") == 0
    keys = [offer.key for offer in backend.offers if offer.events[0].record_id == ids[2]]
    assert keys == [ids[2], f"{ids[2]}~1", f"{ids[2]}~2"]


async def test_a_mapping_made_later_lets_parked_records_go(world: World) -> None:
    ids = world.spool.add(8)
    unmapped = {ids[1], ids[6]}
    backend = FakeBackend(BATCH, park=lambda r: "no_customer" if r.id in unmapped else None)
    async with world.deliver(backend) as delivery:
        assert await all_settled(world, delivery) == {"delivered": 6, "parked": {"no_customer": 2}}
        assert await delivery.redrive() == 0  # still unmapped: stays parked
        unmapped.clear()
        assert await delivery.redrive(reason="no_customer") == 2
        assert await all_settled(world, delivery) == {"delivered": 8}
    assert set(backend.taken.values()) == {1}


async def test_one_parked_record_may_become_several_events(world: World) -> None:
    world.spool.add(6)
    unmapped = ["no_customer"]
    backend = FakeBackend(SINGLE, park=lambda r: unmapped[0] if unmapped else None, events_of=lambda r: ("a", "b", "c"))
    async with world.deliver(backend) as delivery:
        assert await all_settled(world, delivery) == {"parked": {"no_customer": 6}}
        unmapped.clear()
        assert await delivery.redrive() == 18  # events
        assert await all_settled(world, delivery) == {"delivered": 6}
        assert rows(world, "payload") == 0  # nothing that is settled keeps its bytes
        await delivery.forget({"one": 6})
        assert world.balance(delivery)["fake"].delivered == 6
        assert [rows(world, table) for table in ("sealed", "parts", "parked")] == [0, 0, 0]


async def test_a_redrive_of_what_needs_no_event_now_is_skipped(world: World) -> None:
    world.spool.add(4)
    reasons = {"park": "no_customer", "skip": None}
    backend = FakeBackend(BATCH, park=lambda r: reasons["park"], skip=lambda r: reasons["skip"])
    async with world.deliver(backend) as delivery:
        assert await all_settled(world, delivery) == {"parked": {"no_customer": 4}}
        reasons.update(park=None, skip="no_value")
        assert await delivery.redrive() == 4
        assert plain(world.balance(delivery)) == {"skipped": {"no_value": 4}}


async def test_one_call_at_a_time_for_a_subject(world: World) -> None:
    for name in ("a", "b", "c"):
        world.spool.add(20, subscriber=name)
    backend = FakeBackend(
        Abilities(dedup=Dedup.REQUEST_KEY, concurrency=6, one_per_subject=True),
        subject_of=lambda r: r.subscriber.id if r.subscriber else "",
        latency_s=0.001,
    )
    async with world.deliver(backend) as delivery:
        assert await all_settled(world, delivery) == {"delivered": 60}
    assert backend.subject_most == 1
    assert backend.busy_most > 1


async def test_a_new_backend_begins_behind_what_is_there(world: World) -> None:
    world.spool.add(20)
    async with world.deliver(FakeBackend(BATCH)) as delivery:
        await all_settled(world, delivery)
    late = FakeBackend(BATCH, name="late")
    async with world.deliver(FakeBackend(BATCH), late) as delivery:
        assert plain(world.balance(delivery), "late") == {"skipped": {"before": 20}}
        world.spool.add(5)
        assert await all_settled(world, delivery, "late") == {"delivered": 5, "skipped": {"before": 20}}


async def test_the_first_backend_ever_begins_behind_what_is_there_too(tmp_path: Path) -> None:
    world = World(tmp_path)
    async with world.deliver():
        world.spool.add(5)
    async with world.deliver(FakeBackend(BATCH)) as delivery:
        assert plain(world.balance(delivery)) == {"skipped": {"before": 5}}
        assert delivery.retired_upto() == {"one": 5}


async def test_older_records_go_to_a_new_backend_by_redrive(world: World) -> None:
    world.clock = HandClock()
    world.spool.add(20, at_s=START_S - 100)
    ids = world.spool.add(15, at_s=START_S - 10)
    async with world.deliver(FakeBackend(BATCH)) as delivery:
        await all_settled(world, delivery)
    late = FakeBackend(SINGLE, name="late", poison={ids[3]}, skip=lambda r: "no_value" if r.id == ids[4] else None)
    async with world.deliver(FakeBackend(BATCH), late) as delivery:
        world.spool.add(5)
        assert await delivery.redrive(backend="late", since_s=START_S - 50) == 15
        expected = {
            "delivered": 18,
            "parked": {"http_400": 1},
            "skipped": {"before": 20, "no_value": 1},
        }
        assert await all_settled(world, delivery, "late") == expected
        assert await delivery.redrive(backend="late", reason="before", since_s=START_S - 50) == 0
        assert await delivery.redrive(backend="late", reason="before", since_s=START_S - 1000) == 20
        assert (await all_settled(world, delivery, "late"))["delivered"] == 38
    assert set(late.taken.values()) == {1}


async def test_what_a_removed_backend_had_still_to_get_is_parked(world: World) -> None:
    world.begin("fake", "other")
    world.spool.add(30)
    stuck = FakeBackend(SINGLE, behaviour=lambda s: "retry:dns")
    async with world.deliver(stuck, FakeBackend(SINGLE, name="other")) as delivery:
        delivery.wake()
        await until(lambda: len(stuck.offers) > 3)
    async with world.deliver(FakeBackend(SINGLE, name="other")) as delivery:
        await until(lambda: len(delivery.parked(backend="fake")) == 30)
        assert {row.reason for row in delivery.parked(backend="fake")} == {"removed"}
        assert "fake" not in delivery.totals(world.spool.upto())
        await until(lambda: settled(world, delivery, "other"))
        world.spool.add(7)
        await all_settled(world, delivery, "other")
    # It was pending when it was left out, and is so again; so is what was recorded meanwhile.
    back = FakeBackend(SINGLE)
    async with world.deliver(back, FakeBackend(SINGLE, name="other")) as delivery:
        await until(lambda: plain(world.balance(delivery)) == {"delivered": 37})
    assert set(back.taken.values()) == {1}
    assert {offer.key for offer in stuck.offers} <= {offer.key for offer in back.offers}  # sealed as it was


async def test_a_lost_state_file_doubles_nothing(world: World) -> None:
    only_in_a_file(world)
    world.clock = HandClock()
    world.spool.add(20)
    for abilities, age_s, expected in (
        (EVENTS, 60.0, {"delivered": 20}),
        (EVENTS, 82_900.0, {"parked": {"salvaged": 20}}),  # the window ends an hour early
        (ITEMS, 9e6, {"delivered": 20}),  # no window: recognised for ever
        (BATCH, 60.0, {"parked": {"salvaged": 20}}),
    ):
        for file in world.directory.iterdir():
            file.unlink()
        world.clock.wall = START_S + age_s
        async with world.deliver(FakeBackend(abilities)) as delivery:
            assert await all_settled(world, delivery) == expected
            assert all(row.maybe_taken for row in delivery.parked())


async def test_forgetting_keeps_the_count(world: World) -> None:
    ids = world.spool.add(200)
    backend = FakeBackend(EVENTS, events_of=lambda r: ("a", "b"), poison={ids[10], ids[150]})
    async with world.deliver(backend) as delivery:
        before = await all_settled(world, delivery)
        assert delivery.find(ids[3])[0].fate == "delivered"
        with held(delivery):  # a search or a recount takes minutes: the balance does not wait for it
            assert delivery.find(ids[3])[0].fate == "delivered"
            assert delivery._queries.verify() == []
        await delivery.forget({"one": 120})
        assert plain(world.balance(delivery)) == before
        assert delivery.find(ids[3]) == []
        assert delivery.find(ids[130])[0].fate == "delivered"
        backend.poison.clear()
        assert await delivery.redrive() == 4
        assert await all_settled(world, delivery) == {"delivered": 200}
        await delivery.forget({"one": 200})
        assert plain(world.balance(delivery)) == {"delivered": 200}


async def test_draining_waits_for_no_batch_to_fill_and_for_no_one_who_is_down(world: World) -> None:
    world.begin("fake", "other")
    backend, down = FakeBackend(BATCH), FakeBackend(SINGLE, name="other", behaviour=lambda s: "retry:connect")
    async with world.deliver(backend, down) as delivery:
        world.spool.add(7)
        await delivery.drain(5.0)
        assert sum(backend.taken.values()) == 7
    world.spool.add(3)
    hanging = FakeBackend(BATCH, behaviour=lambda s: "hang")
    async with world.deliver(hanging) as delivery:
        await delivery.drain(0.05)
        assert plain(world.balance(delivery)) == {"delivered": 7, "pending": 3}


@pytest.mark.parametrize(
    ("where", "name"),
    [
        (worker.Worker, "_turn"),
        (worker.Worker, "_judge"),
        (worker.Worker, "_ask"),
        (worker.Worker, "_settled"),
        (worker.Worker, "_sealed"),
        (encoding, "plan"),
    ],
)
async def test_a_mistake_of_ours_in_one_lane_holds_up_no_other(
    where: Any, name: str, world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is said, and the lane goes on as soon as it can, each record once."""
    monkeypatch.setattr(worker, "TROUBLE_RETRY_S", 0.01)
    ids = world.spool.add(40)
    backends = FakeBackend(SINGLE), FakeBackend(SINGLE, name="other")
    world.begin("fake", "other")
    real, away = getattr(where, name), True

    def is_fake(one: Any, *_: Any) -> bool:
        name: str = getattr(one, "backend", one).name
        return name == "fake"

    async def later(*args: Any, **more: Any) -> Any:
        if away and is_fake(*args):
            raise KeyError("what a client said")
        return await real(*args, **more)

    def instead(*args: Any, **more: Any) -> Any:
        if away and is_fake(*args):
            raise KeyError("what a client said")
        return real(*args, **more)

    monkeypatch.setattr(where, name, later if inspect.iscoroutinefunction(real) else instead)
    async with world.deliver(*backends) as delivery:
        delivery.wake()
        assert await all_settled(world, delivery, "other") == {"delivered": 40}
        await until(lambda: "delivery waits: a mistake of ours" in caplog.messages)
        if name == "_turn":  # others come to an end of what can fail
            said = delivery.status()[0]
            assert (said.state, said.reason) == ("down", "a mistake of ours (KeyError), see the log")
        away = False
        assert await all_settled(world, delivery) == {"delivered": 40}
        assert delivery.status()[0].reason is None
    assert backends[1].taken == Counter(ids)
    assert set(backends[0].taken) == set(ids)


async def test_a_spool_that_cannot_be_read_is_asked_again(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "TROUBLE_RETRY_S", 0.01)

    class Flaky(MemorySpool):
        def read(self, instance: str, after_seq: int, *, bytes_max: int = 1 << 20) -> list[StoredGroup]:
            self.reads += 1
            if self.reads % 3:
                raise SpoolDamaged("one page is broken")
            return MemorySpool.read(self, instance, after_seq, bytes_max=bytes_max)

    world.spool = Flaky()
    world.spool.add(30)
    backend = FakeBackend(NONE, latency_s=0.002)
    async with world.deliver(backend) as delivery:
        delivery.wake()
        await until(lambda: delivery.status()[0].reason == "one page is broken")
        assert await all_settled(world, delivery) == {"delivered": 30}
    assert set(backend.taken.values()) == {1}


async def test_verdicts_wait_for_room_on_the_disk(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    only_in_a_file(world)
    monkeypatch.setattr(store, "FULL_RETRY_S", 0.01)
    world.spool.add(400)
    backend = FakeBackend(NONE, latency_s=0.001)
    async with world.deliver(backend) as delivery:
        delivery.wake()
        await until(lambda: len(backend.taken) > 20)
        connection = connection_of(delivery.store)
        full = await delivery.store.run(lambda: connection.execute("PRAGMA max_page_count = 1").fetchone())
        await until(lambda: backend.busy == 0)
        stuck = len(backend.taken)
        await asyncio.sleep(0.05)
        assert len(backend.taken) <= stuck + NONE.concurrency
        assert full is not None
        await delivery.store.run(lambda: connection.execute("PRAGMA max_page_count = 1000000").fetchone())
        assert await all_settled(world, delivery) == {"delivered": 400}
    assert set(backend.taken.values()) == {1}


async def test_a_state_file_that_fails_is_opened_again_and_believed(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    only_in_a_file(world)
    monkeypatch.setattr(worker, "TROUBLE_RETRY_S", 0.01)
    ids = world.spool.add(300)
    backends = [FakeBackend(NONE, latency_s=0.001), FakeBackend(SINGLE, name="other", latency_s=0.001)]
    world.begin("fake", "other")
    async with world.deliver(*backends) as delivery:
        delivery.wake()
        for taken in (20, 60, 150):
            await until(lambda n=taken: len(backends[0].taken) > n)  # type: ignore[misc]
            await delivery.store.run(connection_of(delivery.store).close)
        await all_settled(world, delivery, "other")
        assert await all_settled(world, delivery) == {"delivered": 300}
        assert plain(world.balance(delivery), "other") == {"delivered": 300}
    assert all(backend.taken == Counter(ids) for backend in backends)


def test_a_newer_file_is_refused_by_name(world: World) -> None:
    only_in_a_file(world)
    with sqlite3.connect(world.path) as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(StateError, match=r"delivery\.db has format 99.*update it"):
        DeliveryStore.open(world.path)


def test_a_file_that_is_no_database_is_told(tmp_path: Path) -> None:
    path = tmp_path / "delivery.db"
    path.write_bytes(b"not a database at all" * 500)
    with pytest.raises(StateError, match=r"damaged.*move it aside"):
        DeliveryStore.open(path)


async def test_a_miscounted_row_is_found(world: World) -> None:
    only_in_a_file(world)
    world.spool.add(10)
    async with world.deliver(FakeBackend(BATCH)) as delivery:
        await all_settled(world, delivery)
    with sqlite3.connect(world.path) as connection:
        connection.execute("UPDATE counter SET n = n + 1 WHERE term = 'delivered'")
    connection.close()
    async with world.deliver(FakeBackend(BATCH)) as delivery:
        assert delivery.totals(world.spool.upto())["fake"].total == 11
        assert ["delivered says 11, the rows 10" in problem for problem in delivery.verify()] == [True]


async def test_a_spool_behind_its_cursor_is_told(world: World) -> None:
    world.spool.add(30)
    async with world.deliver(FakeBackend(BATCH)) as delivery:
        await all_settled(world, delivery)
    world.spool = MemorySpool()
    world.spool.add(25)
    async with world.deliver(FakeBackend(BATCH)) as delivery:
        assert ["5 record numbers were lost" in problem for problem in delivery.verify()] == [True]


def test_ids_of_the_fixtures_are_as_long_as_real_ones() -> None:
    assert len(record_id(1)) == 36
