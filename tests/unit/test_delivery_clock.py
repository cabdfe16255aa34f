"""Windows, ages and clock steps, over days of a clock that is moved by hand, with restarts between."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from support.delivery_fixtures import START_S, HandClock, World, plain, until
from support.fake_backend import FakeBackend

from sidecar.delivery import Delivery, Limits
from sidecar.model.delivery import Abilities, Atomicity, Dedup, Duplicate, Retry

HOUR = 3600.0
DAY = 24 * HOUR
KEY = Abilities(dedup=Dedup.REQUEST_KEY, dedup_window_s=DAY)
EVENTS = Abilities(events_max=10, atomicity=Atomicity.ALL_OR_NOTHING, dedup=Dedup.EVENT_ID, dedup_window_s=DAY)
NONE = Abilities(dedup=Dedup.NONE)


@pytest.fixture
def world(tmp_path: Path) -> World:
    world = World(tmp_path, clock=HandClock(), limits=Limits(linger_s=0.0, gather_s=0.0))
    world.begin("fake")
    return world


async def pass_time(
    world: World, delivery: Delivery, hours: float, *, step_h: float = 0.25, wait_s: float = 10.0
) -> None:
    """Let both clocks run, with a look at every quarter of an hour."""
    assert world.clock is not None
    for _ in range(round(hours / step_h)):
        world.clock.go(step_h * HOUR)
        delivery.wake()
        await delivery.drain(wait_s)


def seen(world: World, delivery: Delivery) -> dict[str, object]:
    return plain(world.balance(delivery))


@pytest.mark.parametrize("abilities", [KEY, EVENTS, NONE], ids=["key", "events", "none"])
async def test_26_hours_of_refused_connections_park_nothing(world: World, abilities: Abilities) -> None:
    world.spool.add(200)
    backend = FakeBackend(abilities, behaviour=lambda s: "retry:connect_failed")
    async with world.deliver(backend) as delivery:
        await pass_time(world, delivery, 13)
    async with world.deliver(backend) as delivery:
        await pass_time(world, delivery, 13)
        assert seen(world, delivery) == {"pending": 200}
        assert {status.state for status in delivery.status()} == {"down"}
        backend.behaviour = None
        await pass_time(world, delivery, 2)
        assert seen(world, delivery) == {"delivered": 200}


@pytest.mark.parametrize("word", ["lose_before", "retry:http_500"])
async def test_24_hours_of_unknown_or_broken_answers_park(world: World, word: str) -> None:
    world.spool.add(3)
    backend = FakeBackend(KEY, behaviour=lambda s: word)
    async with world.deliver(backend) as delivery:
        await pass_time(world, delivery, 22)
        assert seen(world, delivery) == {"pending": 3}
        await pass_time(world, delivery, 1.5)
        assert seen(world, delivery) == {"parked": {"window_ended": 3}}
        assert len({(offer.key, offer.body) for offer in backend.offers}) == 3
        assert await delivery.redrive() == 0
        backend.behaviour = None
        assert await delivery.redrive(resend_unknown=True) == 3
        await pass_time(world, delivery, 1)
        assert seen(world, delivery) == {"delivered": 3}
    assert {offer.key for offer in backend.offers} == {offer.key for offer in backend.offers[:3]}


async def test_the_window_of_a_leading_part_runs_from_the_refusal_that_it_was_taken_before(world: World) -> None:
    """The halves of a refused batch wait for so long that the backend has forgotten what it took of it."""
    batch = Abilities(events_max=4, atomicity=Atomicity.PREFIX, dedup=Dedup.EVENT_ID, dedup_window_s=DAY)
    ids = world.spool.add(4)
    backend = FakeBackend(batch, poison={ids[2]})
    async with world.deliver(backend) as delivery:
        backend.behaviour = lambda _: None if len(backend.offers) == 1 else "retry:connect"
        await pass_time(world, delivery, 25)
        assert sorted(backend.taken) == sorted(ids[:2])
        backend.taken.clear()
        backend.behaviour = None
        await pass_time(world, delivery, 1)
        assert not backend.taken
        assert seen(world, delivery) == {"parked": {"window_ended": 4}}


async def test_a_window_runs_on_while_the_backend_is_blocked(world: World) -> None:
    world.spool.add(2)
    backend = FakeBackend(KEY, script=["lose_after", "lose_after"], behaviour=lambda s: "block:unauthorized")
    async with world.deliver(backend) as delivery:
        await pass_time(world, delivery, 12)
        world.spool.add(2)  # never offered before the block: nothing to run out
        await pass_time(world, delivery, 12)
        assert seen(world, delivery) == {"parked": {"window_ended": 2}, "pending": 2}
        backend.behaviour = None
        await pass_time(world, delivery, 2)
        assert seen(world, delivery) == {"parked": {"window_ended": 2}, "delivered": 2}


async def test_a_warning_comes_six_hours_before(world: World, caplog: pytest.LogCaptureFixture) -> None:
    world.spool.add(1)
    backend = FakeBackend(KEY, behaviour=lambda s: "lose_before")
    async with world.deliver(backend) as delivery:
        await pass_time(world, delivery, 16)
        assert not [r for r in caplog.records if "will be parked" in r.message]
        await pass_time(world, delivery, 3)
        assert [r.levelno for r in caplog.records if "will be parked" in r.message] == [logging.WARNING]


@pytest.mark.parametrize("step_s", [-DAY, DAY, -2 * HOUR, 90.0])
async def test_a_step_of_the_wall_clock_ends_the_window_and_nothing_else(world: World, step_s: float) -> None:
    assert world.clock is not None
    world.spool.add(1)
    backend = FakeBackend(KEY, script=["lose_after"])
    backend.behaviour = lambda s: "retry:dns"
    async with world.deliver(backend) as delivery:
        await delivery.drain(5.0)
        world.spool.add(5)
        await pass_time(world, delivery, 1)
        world.clock.step(step_s)
        await pass_time(world, delivery, 1)
        backend.behaviour = None
        await pass_time(world, delivery, 3)
        assert seen(world, delivery) == {"parked": {"window_ended": 1}, "delivered": 5}
    assert sum(backend.taken.values()) == 6


@pytest.mark.parametrize(("then", "parked"), [("lose_after", True), ("retry:dns", False)])
async def test_a_step_during_an_attempt_counts_only_if_it_may_have_been_taken(
    world: World, then: str, parked: bool
) -> None:
    assert world.clock is not None
    world.spool.add(1)
    backend = FakeBackend(KEY, script=[f"stall:{then}"])
    async with world.deliver(backend) as delivery:
        delivery.wake()
        await until(lambda: backend.busy == 1)
        world.clock.step(2 * HOUR)
        await pass_time(world, delivery, 0.25, wait_s=0.05)
        backend.released.set()
        await pass_time(world, delivery, 0.5)
        assert seen(world, delivery) == ({"parked": {"window_ended": 1}} if parked else {"delivered": 1})


@pytest.mark.parametrize(
    ("away_s", "expired"), [(60.0, False), (-60.0, True), (-DAY, True), (22 * HOUR, False), (DAY, True)]
)
async def test_a_restart_counts_on_the_wall_clock_alone(world: World, away_s: float, expired: bool) -> None:
    assert world.clock is not None
    world.spool.add(1)
    backend = FakeBackend(KEY, script=["lose_after"])
    backend.behaviour = lambda s: "retry:dns"
    async with world.deliver(backend) as delivery:
        await delivery.drain(5.0)
    world.clock.wall += away_s
    world.clock.mono = 5.0  # another boot
    backend.behaviour = None
    async with world.deliver(backend) as delivery:
        await pass_time(world, delivery, 0.75)
        assert seen(world, delivery) == ({"parked": {"window_ended": 1}} if expired else {"delivered": 1})
    assert sum(backend.taken.values()) == 1


async def test_an_attempt_cut_by_a_stop_counts_from_its_start(world: World) -> None:
    assert world.clock is not None
    world.spool.add(4)
    for abilities, away_s, expected in (
        (KEY, 22 * HOUR, {"delivered": 4}),
        (KEY, 23 * HOUR, {"parked": {"window_ended": 4}}),
        (NONE, 1.0, {"parked": {"unknown": 4}}),
    ):
        for file in world.directory.iterdir():
            file.unlink()
        world.begin("fake")
        backend = FakeBackend(abilities, behaviour=lambda s: "hang")
        async with world.deliver(backend) as delivery:
            await delivery.drain(0.2)
            assert len(backend.offers) == 4
        backend.behaviour = None
        world.clock.wall += away_s
        async with world.deliver(backend) as delivery:
            await delivery.drain(5.0)
            assert seen(world, delivery) == expected
            assert [row.history[-1].split(" ", 1)[1] for row in delivery.parked()] == ["unknown interrupted"] * (
                4 if "parked" in expected else 0
            )


async def test_records_older_than_the_backend_takes_are_parked(world: World) -> None:
    assert world.clock is not None
    batch = Abilities(events_max=10, atomicity=Atomicity.ALL_OR_NOTHING, dedup=Dedup.REQUEST_KEY, age_max_s=2 * HOUR)
    world.spool.add(3, at_s=START_S - 3 * HOUR)
    world.spool.add(3, at_s=START_S - HOUR)
    world.spool.add(3)
    backend = FakeBackend(batch, behaviour=lambda s: "retry:dns")
    async with world.deliver(backend) as delivery:
        await pass_time(world, delivery, 0.5)
        assert seen(world, delivery) == {"parked": {"too_old": 3}, "pending": 6}
        await pass_time(world, delivery, 0.75)  # the sealed batch is cut: its older half is too old now
        assert seen(world, delivery) == {"parked": {"too_old": 6}, "pending": 3}
        backend.behaviour = None
        await pass_time(world, delivery, 0.5)
        assert seen(world, delivery) == {"parked": {"too_old": 6}, "delivered": 3}


async def test_events_from_the_future_wait_for_the_present(world: World) -> None:
    assert world.clock is not None
    world.spool.add(3, at_s=START_S + HOUR)
    backend = FakeBackend(Abilities(dedup=Dedup.REQUEST_KEY, future_max_s=300.0))
    async with world.deliver(backend) as delivery:
        await pass_time(world, delivery, 0.75)
        assert seen(world, delivery) == {"pending": 3}
        await pass_time(world, delivery, 0.5)
        assert seen(world, delivery) == {"delivered": 3}


async def test_a_clock_that_was_behind_for_a_while_holds_nothing_up_for_longer(world: World) -> None:
    assert world.clock is not None
    world.clock.step(-30 * DAY)
    world.spool.add(3)  # made before it was set back: from the future now
    backend = FakeBackend(Abilities(dedup=Dedup.REQUEST_KEY, future_max_s=300.0))
    async with world.deliver(backend) as delivery:
        await pass_time(world, delivery, 3)
    async with world.deliver(backend) as delivery:
        await pass_time(world, delivery, 3)
        assert seen(world, delivery) == {"pending": 3}
        assert not backend.offers
        world.clock.step(30 * DAY)
        await pass_time(world, delivery, 1.25)
        assert seen(world, delivery) == {"delivered": 3}


async def test_a_long_outage_ends_soon_after_the_backend_is_back(world: World) -> None:
    assert world.clock is not None
    world.spool.add(20)
    backend = FakeBackend(KEY, behaviour=lambda s: "retry:http_429" if s.attempt % 2 else "retry:dns")
    async with world.deliver(backend) as delivery:
        await pass_time(world, delivery, 8, step_h=1 / 30)
        assert min(offer.attempt for offer in backend.offers[-20:]) > 3  # by now each waits for minutes
        backend.behaviour = None
        await pass_time(world, delivery, 0.05, step_h=0.005)
        assert seen(world, delivery) == {"delivered": 20}


async def test_what_waits_long_is_hurried_by_the_first_success(world: World) -> None:
    assert world.clock is not None
    world.spool.add(2)
    backend = FakeBackend(KEY, behaviour=lambda s: "retry:dns")
    async with world.deliver(backend) as delivery:
        await pass_time(world, delivery, 24, step_h=0.1)
        backend.behaviour = None
        while not backend.taken:
            await pass_time(world, delivery, 0.005, step_h=0.005)
        await pass_time(world, delivery, 0.001, step_h=0.001)
        assert seen(world, delivery) == {"delivered": 2}


async def go(world: World, delivery: Delivery, seconds: float, *, step_s: float = 0.5) -> None:
    """Let seconds go by, with a look at every half of one."""
    await pass_time(world, delivery, seconds / HOUR, step_h=step_s / HOUR)


@pytest.mark.parametrize(("asked", "held_s"), [("600", 600.0), ("86400", 900.0)])
async def test_the_backends_own_wait_is_obeyed_up_to_a_quarter_of_an_hour(
    world: World, asked: str, held_s: float
) -> None:
    world.spool.add(1)
    backend = FakeBackend(KEY, script=[f"retry:http_429:{asked}"])
    async with world.deliver(backend) as delivery:
        await delivery.drain(5.0)
        await go(world, delivery, held_s - 10.0, step_s=10.0)
        assert len(backend.offers) == 1
        await go(world, delivery, 20.0, step_s=10.0)
        assert seen(world, delivery) == {"delivered": 1}


@pytest.mark.parametrize("reason", ["http_429", "http_503"])
async def test_a_retry_after_pauses_the_whole_backend_and_an_operator_can_end_it(world: World, reason: str) -> None:
    world.spool.add(3)
    other = FakeBackend(KEY, name="other")
    backend = FakeBackend(KEY, script=[f"retry:{reason}:86400"] * 3)
    world.begin("fake", "other")
    async with world.deliver(backend, other) as delivery:
        await delivery.drain(5.0)
        world.spool.add(20)  # these were never offered, so nothing but the pause of the backend holds them
        await go(world, delivery, 600.0, step_s=10.0)
        assert len(backend.offers) == 3
        status = {one.backend: one for one in delivery.status()}
        assert (status["fake"].state, round(status["fake"].paused_s)) == ("paused", 300)
        assert "left alone" in str(status["fake"].reason)
        assert (status["other"].state, status["other"].paused_s) == ("up", 0.0)
        assert sum(other.taken.values()) == 23
        ended = delivery.end_waits("fake")
        assert (ended.was, ended.any, ended.requests) == ("paused", True, 3)
        await go(world, delivery, 1.0)
        assert seen(world, delivery) == {"delivered": 23}
        assert not delivery.end_waits("fake").any
        with pytest.raises(KeyError):
            delivery.end_waits("nobody")


async def test_a_wait_of_a_conflict_holds_its_own_request_only(world: World) -> None:
    world.spool.add(1)
    backend = FakeBackend(KEY, script=["retry:http_409:300"])
    async with world.deliver(backend) as delivery:
        await delivery.drain(5.0)
        world.spool.add(3)
        await go(world, delivery, 5.0)
        assert seen(world, delivery) == {"delivered": 3, "pending": 1}
        await go(world, delivery, 300.0, step_s=10.0)
        assert seen(world, delivery) == {"delivered": 4}


async def test_an_answer_from_before_a_wait_was_ended_pauses_nothing(world: World) -> None:
    assert world.clock is not None
    world.spool.add(2)
    backend = FakeBackend(KEY, script=["stall:retry:http_503:600"])
    async with world.deliver(backend) as delivery:
        delivery.wake()
        await until(lambda: backend.busy == 1 and sum(backend.taken.values()) == 1)
        world.clock.go(1.0)
        delivery.end_waits("fake")
        backend.released.set()
        await until(lambda: backend.busy == 0)
        await delivery.drain(5.0)
        assert {status.state for status in delivery.status()} == {"up"}


@pytest.mark.parametrize("failing", [1, 4, 200])
@pytest.mark.parametrize(("out_s", "within_s"), [(20.0, 5.0), (590.0, 5.0), (HOUR, 30.0)])
@pytest.mark.parametrize("word", ["retry:connect", "lose_before", "retry:http_503"])
async def test_a_recovery_is_noticed_however_many_requests_failed(
    world: World, failing: int, out_s: float, within_s: float, word: str
) -> None:
    world.spool.add(failing)
    backend = FakeBackend(EVENTS if failing > 100 else KEY, behaviour=lambda s: word)
    async with world.deliver(backend) as delivery:
        await go(world, delivery, out_s, step_s=1.0 if out_s < HOUR else 5.0)
        assert len(backend.offers) < 60 + out_s / 2  # one probe at a time
        backend.behaviour = None
        await go(world, delivery, within_s)
        assert backend.taken
        await go(world, delivery, 1.0)
        assert seen(world, delivery) == {"delivered": failing}


async def test_a_second_outage_is_no_longer_than_the_first(world: World) -> None:
    """A request that has failed often before waits no longer for it when the backend fails again."""
    world.spool.add(1)
    backend = FakeBackend(KEY, behaviour=lambda s: "retry:http_500")
    async with world.deliver(backend) as delivery:
        await go(world, delivery, 400.0, step_s=1.0)
        first = backend.offers[0].key
        backend.behaviour = lambda s: "retry:http_500" if s.key == first else None
        world.spool.add(1)
        await go(world, delivery, 30.0)
        assert sum(backend.taken.values()) == 1
        backend.behaviour = lambda s: "retry:connect"
        await go(world, delivery, 60.0)
        backend.behaviour = None
        await go(world, delivery, 5.0)
        assert seen(world, delivery) == {"delivered": 2}


async def test_a_restart_ends_waits_but_not_those_of_events_from_the_future(world: World) -> None:
    assert world.clock is not None
    world.spool.add(2)
    world.spool.add(1, at_s=START_S + HOUR)
    abilities = Abilities(dedup=Dedup.REQUEST_KEY, future_max_s=300.0)
    backend = FakeBackend(abilities, behaviour=lambda s: "retry:http_503:600")
    async with world.deliver(backend) as delivery:
        await delivery.drain(5.0)
    backend.behaviour = None
    async with world.deliver(backend) as delivery:
        await delivery.drain(5.0)
        assert seen(world, delivery) == {"delivered": 2, "pending": 1}
        assert not delivery.end_waits("fake").any
        await delivery.drain(5.0)
        assert seen(world, delivery) == {"delivered": 2, "pending": 1}


KEYED = Abilities(events_max=10, atomicity=Atomicity.ALL_OR_NOTHING, dedup=Dedup.REQUEST_KEY, dedup_window_s=DAY)


@pytest.mark.parametrize(
    ("abilities", "word", "of_ten"),
    [
        (EVENTS, "retry:http_500", {"delivered": 9, "pending": 1}),  # pending until its window ends
        (EVENTS, "lose_before", {"delivered": 9, "pending": 1}),
        (EVENTS, "block:forbidden", {"delivered": 9, "parked": 1}),
        (KEYED, "block:forbidden", {"delivered": 9, "parked": 1}),
        (KEYED, "retry:http_500", {"pending": 10}),  # its key tells of a repeat, and a part would have another
    ],
)
async def test_a_record_that_only_ever_fails_holds_no_other_of_its_batch_up(
    world: World, abilities: Abilities, word: str, of_ten: dict[str, int]
) -> None:
    """The backend breaks at it, or a firewall before it dislikes it, and neither is a refusal."""
    bad = world.spool.add(10)[6]
    backend = FakeBackend(abilities, behaviour=lambda s: word if bad in {one.record_id for one in s.events} else None)
    async with world.deliver(backend) as delivery:
        for _ in range(300):
            world.spool.add(1)
            await go(world, delivery, 10.0, step_s=10.0)
        totals = world.balance(delivery)["fake"]
        parked = dict(totals.parked)
    assert totals.delivered == 300 + of_ten.get("delivered", 0)
    assert totals.pending == of_ten.get("pending", 0)
    assert parked == ({"forbidden": 1} if "parked" in of_ten else {})
    assert set(backend.taken.values()) == {1}


@pytest.mark.parametrize("word", ["retry:http_500", "lose_before", "block:forbidden"])
async def test_a_backend_that_takes_nothing_is_offered_the_same_requests_on_and_on(world: World, word: str) -> None:
    world.spool.add(20)
    backend = FakeBackend(EVENTS, behaviour=lambda _: word)
    async with world.deliver(backend) as delivery:
        await go(world, delivery, 600.0, step_s=2.0)
        assert len(backend.offers) > 20
        assert {len(offer.events) for offer in backend.offers} == {10}
        assert seen(world, delivery) == {"pending": 20}


async def test_a_backend_that_names_one_repeat_at_a_time_is_done_in_minutes(world: World) -> None:
    """The answer to a batch was lost, and each offer of it is refused for one event that is there."""
    batch = Abilities(
        events_max=100,
        atomicity=Atomicity.ALL_OR_NOTHING,
        dedup=Dedup.EVENT_ID,
        dedup_window_s=DAY,
        knows_duplicates=True,
    )
    world.spool.add(100, group=100)
    backend = FakeBackend(batch, script=["lose_after"])
    backend.behaviour = lambda s: [Duplicate(), *[Retry("refused_with_others")] * (len(s.events) - 1)]
    async with world.deliver(backend) as delivery:
        await go(world, delivery, 300.0, step_s=1.0)
        assert seen(world, delivery) == {"duplicate": 100}
