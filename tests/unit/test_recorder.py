"""The recorder: ids and numbers, intents, what waits for the disk and for how long, and what is done without one."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from support.spool_fixtures import SMALL, Told, call, ended, failing, recorded, rows, stalling, until
from support.spool_recorder import SpoolRecorder

from sidecar.model.exchange import Outcome, Usage, UsageState
from sidecar.model.record import Record
from sidecar.spool import Spool, SpoolReader, State
from sidecar.spool import recorder as recorder_module
from sidecar.spool.frames import encode_frame
from sidecar.spool.recorder import _GUESS_BYTES, BUFFERED_AGE_S, GATHER_S_MAX, GATHER_S_MIN, Gathering


class Answers:
    """Releases, as they come."""

    def __init__(self) -> None:
        self.given: list[bool] = []

    def __call__(self, granted: bool) -> None:
        self.given.append(granted)


Held = tuple[Callable[..., SpoolRecorder], threading.Event, Told, Spool]  # what the fixture gives


@pytest.fixture
async def held(tmp_path: Path) -> AsyncIterator[Held]:
    """A recorder's makings over a disk that stalls on order."""
    kind, gate = stalling()
    told = Told()

    async with Spool.open(tmp_path, limits=SMALL, create=kind.create, metrics=told) as spool:

        def make(**given: Any) -> SpoolRecorder:
            return SpoolRecorder(spool, told, **({"commit_wait_s": 0.05} | given))

        yield make, gate, told, spool
        gate.set()


async def test_a_record_has_all_that_the_exchange_says(tmp_path: Path) -> None:
    async with Spool.open(tmp_path, limits=SMALL) as spool:
        recorder = SpoolRecorder(spool, Told())
        exchange = call(usage=Usage(usage_state=UsageState.FINAL, model="m", input_tokens=3))
        await recorded(recorder, exchange)
        with SpoolReader(tmp_path) as reader:
            (group,) = reader.read(spool.instance, 0)
        record = Record.from_json(group.lines[0])
        assert record.id == exchange.id
        assert (record.seq, record.instance) == (1, spool.instance)
        assert record.outcome is Outcome.COMPLETE
        assert record.usage is not None
        assert record.usage.input_tokens == 3
        assert record.duration_ms is not None
        assert record.duration_ms >= 0
        assert exchange.started_ns > 0 < exchange.started_mono_ns


async def test_content_that_json_cannot_hold_still_leaves_a_record(tmp_path: Path) -> None:
    async with Spool.open(tmp_path, limits=SMALL) as spool:
        recorder = SpoolRecorder(spool, Told())
        recorder.admit(odd := call(user_agent="\udcff", dimensions={"a": "\ud800"}))
        recorder._old.update(recorder._young)
        recorder._young.clear()
        recorder._write_intents()
        await ended(recorder, odd)
    assert len(rows(tmp_path, spool.instance)) == 1


async def test_ending_twice_counts_once(tmp_path: Path) -> None:
    told = Told()
    async with Spool.open(tmp_path, limits=SMALL) as spool:
        recorder = SpoolRecorder(spool, told)
        recorder.admit(exchange := call())
        answers = Answers()
        assert recorder.complete(exchange, answers) is False
        assert recorder.complete(exchange, answers) is True
        assert recorder.complete(call(), answers) is True  # never admitted
        await until(lambda: answers.given)
        assert recorder.complete(exchange, answers) is True
    assert answers.given == [True]
    assert told.ended == [exchange]
    assert len(rows(tmp_path, spool.instance)) == 1


async def test_committed_lets_go_after_the_disk_has_it(held: Held) -> None:
    make, gate, _, spool = held
    recorder, answers = make(commit_wait_s=30), Answers()
    gate.clear()
    recorder.admit(exchange := call())
    assert recorder.complete(exchange, answers) is False
    await asyncio.sleep(0.05)
    assert answers.given == []
    with SpoolReader(spool.root) as reader:
        assert reader.last_seq(spool.instance) == 0
    gate.set()
    await until(lambda: answers.given)
    assert answers.given == [True]
    with SpoolReader(spool.root) as reader:
        assert reader.last_seq(spool.instance) == 1


async def test_what_ends_within_a_few_turns_of_a_commit_shares_the_next_one(held: Held) -> None:
    """Whether something does or not, what waits goes: no later call is needed for it."""
    make, gate, _, spool = held
    recorder, answers = make(commit_wait_s=30), Answers()
    gate.clear()
    first, second, third = call(), call(), call()
    for exchange in (first, second, third):
        recorder.admit(exchange)

    def released(granted: bool) -> None:
        asyncio.get_running_loop().call_soon(recorder.complete, third, answers)

    recorder.complete(first, released)
    await until(lambda: recorder._in_flight)
    recorder.complete(second, answers)
    gate.set()
    await until(lambda: len(answers.given) == 2)
    with SpoolReader(spool.root) as reader:
        assert [len(group.lines) for group in reader.groups(spool.instance)] == [1, 2]


async def test_without_anything_held_nothing_waits(held: Held) -> None:
    make, gate, _, spool = held
    recorder = make()
    gate.clear()
    recorder.admit(exchange := call())
    assert recorder.complete(exchange, None) is True
    recorder.flush()
    assert spool.snapshot().totals.open == 1  # waiting for its commit is open
    assert spool.snapshot().totals.holds
    gate.set()
    await until(lambda: spool.snapshot().totals.recorded == 1)
    assert spool.snapshot().totals.open == 0


async def test_buffered_does_not_wait_until_the_disk_is_late(held: Held) -> None:
    make, gate, told, _ = held
    recorder, answers = make(durability="buffered", commit_wait_s=30), Answers()
    gate.clear()
    recorder.admit(exchange := call())
    assert recorder.complete(exchange, answers) is True
    await asyncio.sleep(0.03)
    recorder.admit(late := call())
    assert recorder.complete(late, answers) is False  # the oldest record is older than 20 ms
    assert answers.given == []
    gate.set()
    await until(lambda: answers.given)
    assert answers.given == [True]
    await until(lambda: not recorder._in_flight)
    recorder.admit(later := call())
    assert recorder.complete(later, answers) is True
    assert told.uncommitted == 0


def test_gathering_leaves_the_disk_the_time_that_it_needs() -> None:
    gathering = Gathering()
    gathering.committed(0.010)
    assert gathering.seconds == GATHER_S_MAX, "one slow commit says little"
    for _ in range(50):
        gathering.committed(0.006)
    assert gathering.seconds == pytest.approx(BUFFERED_AGE_S - 0.012, abs=1e-4)
    gathering.committed(0.3)
    assert gathering.seconds == GATHER_S_MIN, "a disk that stands still is believed at once"
    for _ in range(50):
        gathering.committed(0.0004)
    assert gathering.seconds == GATHER_S_MAX


async def test_pass_waits_once_and_then_no_more_until_a_commit(held: Held) -> None:
    make, gate, told, spool = held
    recorder, answers = make(), Answers()
    gate.clear()
    recorder.admit(first := call())
    assert recorder.complete(first, answers) is False
    await until(lambda: answers.given)
    assert answers.given == [True]
    assert told.uncommitted == 1
    assert recorder.health().state is State.DEGRADED
    assert "no commit within 0.05 s" in (recorder.health().reason or "")
    assert not recorder.refusing
    assert recorder.admit(second := call())
    assert recorder.complete(second, answers) is True
    assert told.uncommitted == 2
    gate.set()
    await until(lambda: recorder.health().state is State.OK)
    await until(lambda: spool.snapshot().totals.recorded == 2)
    assert answers.given == [True]  # nobody is released twice
    recorder.admit(third := call())
    assert recorder.complete(third, answers) is False
    await until(lambda: len(answers.given) == 2)


async def test_refuse_cuts_what_waited_and_turns_the_next_away(held: Held) -> None:
    make, gate, told, spool = held
    recorder, answers = make(on_spool_full="refuse"), Answers()
    gate.clear()
    recorder.admit(first := call())
    recorder.admit(in_flight := call())
    assert recorder.complete(first, answers) is False
    await until(lambda: answers.given)
    assert answers.given == [False]
    assert recorder.refusing
    turned_away = call()
    assert recorder.admit(turned_away) is False
    assert turned_away.id == ""
    assert recorder.complete(in_flight, answers) is False  # let in before: held up to the wait, then cut
    await until(lambda: len(answers.given) == 2)
    assert answers.given == [False, False]
    assert told.uncommitted == 0
    gate.set()
    await until(lambda: not recorder.refusing)
    await until(lambda: spool.snapshot().totals.recorded == 2)  # it goes a few turns of the loop behind the other
    assert spool.snapshot().totals.admitted == 2
    assert recorder.admit(call()) is True


async def test_refuse_turns_away_at_once_when_a_write_fails(tmp_path: Path) -> None:
    turns = dict.fromkeys(range(2, 12), "before")
    async with Spool.open(tmp_path, limits=SMALL, create=failing(turns).create) as spool:
        recorder = SpoolRecorder(spool, Told(), on_spool_full="refuse", commit_wait_s=30)
        answers = Answers()
        recorder.admit(exchange := call())
        assert recorder.complete(exchange, answers) is False
        await until(lambda: spool.health().state is State.DEGRADED or answers.given)
        await until(lambda: answers.given == [True])
        await until(lambda: not recorder.refusing)


async def test_memory_is_bounded_and_what_is_lost_is_counted(held: Held) -> None:
    make, gate, told, spool = held
    recorder, answers = make(spool_memory_bytes=4000), Answers()
    recorder.admit(stream := call(route="/stream"))
    await until(lambda: recorder._intended)
    await until(lambda: not recorder._in_flight)
    gate.clear()
    for _ in range(50):
        recorder.admit(exchange := call())
        recorder.complete(exchange, None)
        await asyncio.sleep(0)
    lost = told.lost_by["spool_full"]
    assert 30 < lost < 50
    assert recorder._waiting_bytes < 4000 + _GUESS_BYTES  # the last one that was taken may reach over it
    assert recorder.complete(stream, answers) is True  # its intent is on disk, its record is lost
    lost += 1
    assert recorder.health().state is State.FULL
    recorder.flush()  # the next frame tells of it
    totals = spool.snapshot().totals
    assert totals.lost == {"spool_full": lost}
    assert totals.holds
    gate.set()
    await until(lambda: spool.snapshot().totals.open == 0)
    await until(lambda: not recorder._in_flight and recorder._filling is None)
    with SpoolReader(spool.root) as reader:
        stored = reader.totals(spool.instance)
        assert stored.lost == {"spool_full": lost}  # told to the disk without another call
        assert stored.open == 0
        assert stored.holds
        assert stored.recorded == 51 - lost
    await recorded(recorder, call())
    numbers = [row["seq"] for row in rows(spool.root, spool.instance)]
    assert numbers == [*range(1, 51 - lost + 2)]  # numbers are given by whoever writes: what is lost has none


async def test_refuse_loses_nothing_that_was_let_in(held: Held) -> None:
    make, gate, told, spool = held
    recorder = make(spool_memory_bytes=2000, on_spool_full="refuse", commit_wait_s=30)
    gate.clear()
    let_in = [call() for _ in range(20)]
    for exchange in let_in:
        assert recorder.admit(exchange)
    for exchange in let_in:
        recorder.complete(exchange, None)
        await asyncio.sleep(0)
    assert recorder.refusing
    assert recorder.admit(call()) is False
    gate.set()
    await until(lambda: spool.snapshot().totals.recorded == 20)
    assert not told.lost_by


async def test_an_open_call_has_its_intent_on_disk_and_a_short_one_never_writes_one(tmp_path: Path) -> None:
    async with Spool.open(tmp_path, limits=SMALL) as spool:
        recorder = SpoolRecorder(spool, Told())
        with SpoolReader(tmp_path) as reader:
            for _ in range(20):
                await recorded(recorder, call())
            recorder.admit(stream := call())
            totals = reader.totals(spool.instance)
            assert (totals.admitted, totals.open) == (20, 0)  # nobody on disk knows of it yet
            assert (spool.snapshot().totals.open, recorder.unseen) == (0, 1)
            await until(lambda: reader.totals(spool.instance).open == 1)
            assert reader.totals(spool.instance).admitted == 21
            await until(lambda: recorder._look is None)  # no timer while nothing is fresh
            await ended(recorder, stream)
            assert reader.totals(spool.instance).open == 0
            assert reader.totals(spool.instance).holds


async def test_an_intent_may_be_opened_and_closed_in_one_commit(held: Held) -> None:
    make, gate, _, spool = held
    recorder = make(commit_wait_s=30)
    gate.clear()
    recorder.admit(first := call())
    recorder.complete(first, None)
    recorder.admit(second := call())
    await until(lambda: recorder._intended)
    await asyncio.sleep(0)
    recorder.complete(second, None)
    await asyncio.sleep(0)
    gate.set()
    await until(lambda: spool.snapshot().totals.recorded == 2)
    with SpoolReader(spool.root) as reader:
        assert reader.totals(spool.instance).open == 0
        assert reader.totals(spool.instance).holds


async def test_a_failing_release_does_not_hold_its_neighbours(tmp_path: Path) -> None:
    reported: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: reported.append(context["exception"]))
    async with Spool.open(tmp_path, limits=SMALL) as spool:
        recorder, answers = SpoolRecorder(spool, Told()), Answers()

        def failing_release(granted: bool) -> None:
            raise RuntimeError("the connection is gone")

        for release in (failing_release, answers):
            recorder.admit(exchange := call())
            assert recorder.complete(exchange, release) is False
        await until(lambda: answers.given)
    assert [str(error) for error in reported] == ["the connection is gone"]


@pytest.mark.parametrize("where", ["ended", "open", "both"])
async def test_a_call_that_cannot_be_told_takes_no_other_with_it(
    where: str, held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is counted lost, once, and the end of its response leaves like all others."""
    make, _, _, spool = held
    recorder, answers, odd = make(commit_wait_s=30), Answers(), call()
    real = encode_frame

    def encode(number: int, **given: Any) -> bytes:
        if any(one is odd for name in ("opens", "ended") for one in given.get(name, ())):
            raise ValueError("sk-secret")
        return real(number, **given)

    monkeypatch.setattr(recorder_module, "encode_frame", encode)
    others = [call() for _ in range(2)]
    for one in (others[0], odd, others[1]):
        recorder.admit(one)
    if where != "ended":
        recorder._old.update(recorder._young)
        recorder._young.clear()
        recorder._write_intents()
    if where == "open":
        recorder.flush()
    held_back = [not recorder.complete(one, answers) for one in (others[0], odd, others[1])]
    await until(lambda: len(answers.given) == sum(held_back))
    await until(lambda: spool.snapshot().totals.open == 0)
    totals = spool.snapshot().totals
    assert (totals.admitted, totals.recorded, dict(totals.lost), totals.holds) == (3, 2, {"unreadable": 1}, True)
    assert all(answers.given)


async def test_ids_and_numbers_go_on_over_a_restart(tmp_path: Path) -> None:
    seen: list[str] = []
    instances: set[str] = set()
    for start in range(3):
        async with Spool.open(tmp_path, limits=SMALL) as spool, SpoolRecorder(spool, Told()) as recorder:
            for _ in range(5):
                await recorded(recorder, exchange := call())
                seen.append(exchange.id)
        assert spool.snapshot().last_seq == 5 * (start + 1)
        instances.add(spool.instance)
    (instance,) = instances
    assert [row["id"] for row in rows(tmp_path, instance)] == seen
    assert len(set(seen)) == 15
    assert all(len(id_) == 36 for id_ in seen)


async def test_a_step_of_the_clock_breaks_neither_ids_nor_durations(tmp_path: Path) -> None:
    day_ns = 86_400 * 10**9
    now = [1_800_000_000 * 10**9]
    async with Spool.open(tmp_path, limits=SMALL) as spool:
        recorder = SpoolRecorder(spool, Told(), clock_ns=lambda: now[0])
        made = []
        for step in (0, day_ns, -2 * day_ns, 1):
            now[0] += step
            await recorded(recorder, exchange := call())
            made.append(exchange.id)
            assert exchange.started_ns == now[0]
            assert exchange.duration_ms is not None
            assert 0 <= exchange.duration_ms < 60_000
    assert made == sorted(set(made))
    assert [row["id"] for row in rows(tmp_path, spool.instance)] == made


async def test_delivery_is_woken_after_each_commit_with_records(tmp_path: Path) -> None:
    async with Spool.open(tmp_path, limits=SMALL) as spool:
        recorder = SpoolRecorder(spool, Told())
        woken: list[int] = []
        spool.on_committed(lambda: woken.append(spool.snapshot().last_seq))
        await recorded(recorder, call())
        await recorded(recorder, call())
        assert woken == [1, 2]
        recorder.admit(call())
        await until(lambda: recorder._intended)
        await until(lambda: not recorder._in_flight)
        assert woken == [1, 2]  # an intent is nothing to deliver


async def test_stopping_leaves_nothing_behind(tmp_path: Path) -> None:
    async with Spool.open(tmp_path, limits=SMALL) as spool, SpoolRecorder(spool, Told()) as recorder:
        for _ in range(40):
            recorder.admit(exchange := call())
            recorder.complete(exchange, None)
        recorder.admit(call())  # open for less than 20 ms: still it is told to the disk
        assert "1 open" in repr(recorder)
    assert spool.snapshot().totals.recorded == 40
    with SpoolReader(tmp_path) as reader:
        assert reader.totals(spool.instance).open == 1
        assert reader.totals(spool.instance).holds
    assert "40 recorded" in repr(spool)


# Shipped: the last byte waits for the centre


async def complete_one(recorder: SpoolRecorder, answers: Answers | None) -> bool:
    recorder.admit(exchange := call())
    return recorder.complete(exchange, answers)


async def test_shipped_lets_go_after_the_centre_has_it_and_keeps_no_memory_for_it(held: Held) -> None:
    make, _, told, spool = held
    recorder, answers = make(durability="shipped", commit_wait_s=30), Answers()
    assert await complete_one(recorder, answers) is False
    await until(lambda: not recorder.waiting_records)
    with SpoolReader(spool.root) as reader:
        await until(lambda: reader.last_seq(spool.instance) == 1)
    await asyncio.sleep(0.02)
    assert answers.given == []
    assert recorder._waiting_bytes == 0, "it is on the disk: only who waits is remembered"
    recorder.shipped(1)
    assert answers.given == [True]
    assert told.uncommitted == 0
    assert recorder.health().state is State.OK


async def test_a_centre_that_is_away_is_waited_for_once_and_no_longer(held: Held) -> None:
    make, _, told, _ = held
    recorder, answers, later = make(durability="shipped"), Answers(), Answers()
    assert await complete_one(recorder, answers) is False
    await until(lambda: answers.given)
    assert answers.given == [True]
    assert told.uncommitted == 1
    health = recorder.health()
    assert (health.state, health.reason) == (State.DEGRADED, "the centre has taken no record within 0.05 s")
    assert await complete_one(recorder, later) is True, "not held any more"
    await until(lambda: not recorder.waiting_records)
    assert recorder.health().state is State.DEGRADED, "the disk alone is no centre"
    assert told.uncommitted == 2
    recorder.shipped(2)
    assert recorder.health().state is State.OK
    assert await complete_one(recorder, later) is False, "the promise holds again"
    await until(lambda: not recorder.waiting_records)
    recorder.shipped(3)
    assert later.given == [True]


async def test_with_refuse_nobody_is_told_a_promise_that_the_centre_did_not_keep(held: Held) -> None:
    make, _, _, _ = held
    recorder, answers = make(durability="shipped", on_spool_full="refuse"), Answers()
    assert await complete_one(recorder, answers) is False
    await until(lambda: answers.given)
    assert answers.given == [False]
    assert not recorder.admit(call())
    recorder.shipped(1)
    assert recorder.admit(call())


async def test_a_centre_that_is_told_before_the_frame_ends_is_remembered(held: Held) -> None:
    """After a restart of who meters: the word on the frame may come in the same read as that it is on disk."""
    make, gate, _, _ = held
    recorder, answers = make(durability="shipped", commit_wait_s=30), Answers()
    gate.clear()
    assert await complete_one(recorder, answers) is False
    await asyncio.sleep(0.02)
    recorder.shipped(1)
    assert answers.given == []
    gate.set()
    await until(lambda: answers.given)
    assert answers.given == [True]
