"""The gate asks the vendors' stand-ins over real sockets: once for all, ahead of time, never in the way for long."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from time import monotonic
from typing import Any

import aiohttp
import pytest
from support.backend_fixtures import Request, ScriptedServer
from support.backend_fixtures import answer as http
from support.rawhttp import until
from support.scripted import running_receiver

from sidecar.dev.mock_backends import Do, Fault, GateLie, Lie, Receiver, Terms
from sidecar.gate import asking as asking_module
from sidecar.gate.answers import NOBODY_ASKED, Ages, Decision, Freshness, OnFailure
from sidecar.gate.asking import Asking
from sidecar.gate.sources.base import COST_USD, PICO, Answer, Caller, Known, NoAnswer, OfEach, Source
from sidecar.gate.sources.flexprice import FlexpriceWallets
from sidecar.gate.sources.lago import LagoWallets
from sidecar.gate.sources.openmeter import OpenmeterAccess
from sidecar.gate.sources.revenium import ReveniumProductKey
from sidecar.gate.sources.revenium_controls import ReveniumControls
from sidecar.settings import AskedSettings

KEY = "rev_mk_1234567890"
CALL = {"calls": 1}
WAIT = AskedSettings(gate_timeout=2.0)
SHORT = AskedSettings(gate_timeout=0.1)


def caller(subscriber: str | None = "acme") -> Caller:
    return Caller(subscriber=subscriber)


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    async with running_receiver(terms={"revenium": Terms(key=KEY)}) as (running, _):
        yield running


async def decided(asking: Asking, who: Caller) -> Decision:
    """What a call is told, after the questions that it has to wait for."""
    found = asking.decide(who)
    if found is None:
        await asking.wait(who)
        found = asking.decide(who, final=True)
    assert found is not None
    return found


def used(**amounts: int) -> Callable[[str, int], int]:
    return lambda unit, held: amounts.get(unit, 0)


class Says(OfEach):
    """A source that says what a test tells it, and counts how often it is asked."""

    name, lag_s, by_model = "says", 0.0, False

    def __init__(self, *found: Known | NoAnswer, unit: str | None = "calls", polled_s: float | None = None) -> None:
        self.unit, self.polled_s = unit, polled_s
        self.found = list(found)  # the last one again and again
        self.asked: list[str] = []
        self.hold: asyncio.Event | None = None
        self.at_once = self.most_at_once = 0

    def subject(self, caller: Caller) -> str | None:
        return "*" if self.polled_s is not None else caller.subscriber

    async def ask(self, subject: str) -> Known | NoAnswer:
        self.asked.append(subject)
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            if self.hold is not None:
                await self.hold.wait()
            return self.found.pop(0) if len(self.found) > 1 else self.found[0]
        finally:
            self.at_once -= 1

    async def aclose(self) -> None: ...


YES = Answer(allowed=True)
NO = Answer(allowed=False, reason="quota_used_up")
DOWN = NoAnswer("http_503")


async def test_a_first_call_waits_and_the_others_find_the_answer(receiver: Receiver) -> None:
    source = ReveniumProductKey(api_key=KEY, url=receiver.url)
    async with Asking([source], WAIT) as asking:
        assert asking.decide(caller("acme-quota-2")) is None
        first = await decided(asking, caller("acme-quota-2"))
        assert (first.allowed, first.remaining, first.freshness) == (True, 2, Freshness.FRESH)
        receiver.faults.set(Fault(do=Do.STATUS, status=500))
        second = asking.decide(caller("acme-quota-2"))
        assert second is not None
        assert (second.allowed, second.source) == (True, "revenium")
        assert second.age_s is not None
    assert asking.questions == {("revenium", "answered"): 1}


@pytest.mark.parametrize("calls", [100])
async def test_calls_that_come_together_are_one_question_and_no_more_than_the_quota_pass(
    calls: int, receiver: Receiver
) -> None:
    source = ReveniumProductKey(api_key=KEY, url=receiver.url)
    async with Asking([source], WAIT) as asking:

        async def call() -> bool:
            decision = await decided(asking, caller("acme-quota-10"))
            if decision.allowed:
                asking.reserve(caller("acme-quota-10"), CALL)
            return decision.allowed

        passed = await asyncio.gather(*(call() for _ in range(calls)))
        assert sum(passed) == 10
        assert asking.questions[source.name, "answered"] == 1


async def test_what_a_call_holds_is_given_back_or_settled_once() -> None:
    source = Says(Answer(allowed=True, remaining=3, unit="calls"))
    async with Asking([source], WAIT) as asking:
        await decided(asking, caller())
        holds = [asking.reserve(caller(), CALL) for _ in range(3)]
        found = asking.decide(caller())
        assert found is not None
        assert (found.allowed, found.reason) == (False, "used_up_since")
        asking.release(holds[0])
        asking.release(holds[0])
        asking.settle(holds[1], used(calls=1))
        asking.settle(holds[1], used(calls=1))
        found = asking.decide(caller())
        assert found is not None
        assert (found.allowed, found.remaining) == (True, 1)
        asking.charge(caller(), used(calls=1))
        asking.charge(caller("stranger"), used(calls=1))
        found = asking.decide(caller())
        assert found is not None
        assert not found.allowed


async def test_a_call_is_held_by_its_id_from_its_begin_to_its_end(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    source = Says(Answer(allowed=True, remaining=9, unit="calls"))
    async with Asking([source], WAIT) as asking:
        await decided(asking, caller())

        def left() -> int | None:
            found = asking.decide(caller())
            return None if found is None else found.remaining

        for call_id in ("a-1", "a-2", "b-1", "a-1"):
            asking.began(call_id, caller(), CALL)
        assert left() == 6, "one that is told twice is held once"
        asking.ended("a-1", caller(), used(calls=2))
        assert left() == 5
        asking.ended("a-1", caller(), used())
        asking.ended("never-begun", caller(), used(calls=1))
        assert left() == 4, "what held nothing is charged all the same"
        assert asking.died(lambda call_id: call_id.startswith("a-")) == 1
        assert left() == 5
        assert asking.died(lambda call_id: call_id.startswith("a-")) == 0
        asking.ended("b-1", caller(), used())
        assert left() == 6
        monkeypatch.setattr(asking_module, "OPEN_MAX", 1)
        asking.began("c-1", caller(), CALL)
        asking.began("c-2", caller(), CALL)
        asking.began("c-3", caller(), CALL)
        assert (left(), asking.not_held) == (5, 2)
        assert [record.getMessage() for record in caplog.records] == [
            "more than 1 calls are open: what the others may need is not held back"
        ]


async def test_money_is_counted_down_between_two_answers(receiver: Receiver) -> None:
    source = FlexpriceWallets(api_key=KEY, url=receiver.url)
    async with Asking([source], WAIT) as asking:
        rich = caller("acme-balance-1")
        assert (await decided(asking, rich)).remaining == PICO
        hold = asking.reserve(rich, {COST_USD: PICO // 2, "calls": 1})
        asking.settle(hold, used(cost_usd=PICO * 3 // 4, calls=1))
        found = asking.decide(rich)
        assert found is not None
        assert found.remaining == PICO // 4


@pytest.mark.parametrize("on_failure", list(OnFailure))
@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (Fault(do=Do.DELAY, delay_s=30.0), "timeout"),
        (Fault(do=Do.STATUS, status=500), "http_500"),
        (Fault(do=Do.LIE, lie=Lie.HTML), "html"),
        (Fault(do=Do.LIE, lie=GateLie.CLAIM_EXPIRED), "claim_expired"),
        (Fault(do=Do.LIE, lie=GateLie.CLAIM_UNSIGNED), "claim_algorithm"),
        (Fault(do=Do.LIE, lie=GateLie.NEGATIVE), "claim_numbers"),
        (Fault(do=Do.CUT_BEFORE), "reset"),
    ],
)
async def test_a_vendor_that_gives_no_answer_is_the_operators_word_and_is_counted(
    fault: Fault, reason: str, on_failure: OnFailure, receiver: Receiver
) -> None:
    receiver.faults.set(fault)
    source = ReveniumProductKey(api_key=KEY, url=receiver.url)
    async with Asking([source], AskedSettings(gate_timeout=0.3), on_failure=on_failure) as asking:
        found = await decided(asking, caller("acme"))
        assert (found.allowed, found.freshness) == (on_failure is not OnFailure.CLOSED, Freshness.NONE)
        assert found.reason == reason
        await until(lambda: asking.questions[source.name, reason] == 1)
        again = asking.decide(caller("acme"))
        assert again is not None, "no further call waits for it"
        assert again.reason == reason
        (status,) = asking.status()
        assert (status.reason, status.failures) == (reason, 1)


async def test_last_goes_on_with_what_was_said_and_a_running_count() -> None:
    source = Says(Answer(allowed=True, remaining=2, unit="calls"), DOWN)
    ages = Ages(allowed_s=1.0, on_failure=OnFailure.LAST)
    async with Asking([source], WAIT, ages=ages) as asking:
        await decided(asking, caller())
        asking.settle(asking.reserve(caller(), CALL), used(calls=1))

        async def last() -> bool:
            found = await decided(asking, caller())
            return found.freshness is Freshness.LAST and found.allowed and found.remaining == 1

        await until_async(last)
        asking.reserve(caller(), CALL)
        found = asking.decide(caller())
        assert found is not None
        assert (found.allowed, found.freshness) == (False, Freshness.LAST)


async def test_last_remembers_over_a_restart_what_was_said_and_used(tmp_path: Path) -> None:
    memory = tmp_path / "gate.answers"
    ages, clock = Ages(on_failure=OnFailure.LAST), [1_795_000_000.0]
    left, nothing = Answer(allowed=True, remaining=3, unit="calls"), Answer(allowed=False, reason="no_wallet")
    async with Asking([Says(left, nothing)], WAIT, ages=ages, memory=memory, wall=lambda: clock[0]) as asking:
        await decided(asking, caller("acme"))
        await decided(asking, caller("other"))
        asking.settle(asking.reserve(caller("acme"), CALL), used(calls=1))
        asking.reserve(caller("acme"), CALL)  # its call is open, and nobody sees its end
    assert memory.stat().st_mode & 0o777 == 0o600
    source = Says(DOWN)
    clock[0] += 30
    async with Asking([source], WAIT, ages=ages, memory=memory, wall=lambda: clock[0]) as asking:
        found = await decided(asking, caller("acme"))
        assert (found.allowed, found.freshness, found.remaining) == (True, Freshness.LAST, 1)
        asking.reserve(caller("acme"), CALL)
        assert not (await decided(asking, caller("acme"))).allowed
        found = await decided(asking, caller("other"))
        assert (found.allowed, found.freshness, found.reason) == (False, Freshness.LAST, "no_wallet")
        assert (await decided(asking, caller("new"))).freshness is Freshness.NONE
        assert source.asked == ["acme", "other", "new"], "each was asked for anew"
    async with Asking([Says(YES)], WAIT, ages=ages, memory=memory, wall=lambda: clock[0]) as asking:
        assert (await decided(asking, caller("other"))).freshness is Freshness.FRESH


@pytest.mark.parametrize("what", ["old", "damaged", "over", "not wanted"])
async def test_what_was_said_before_a_restart_holds_no_longer_than_without_one(tmp_path: Path, what: str) -> None:
    memory = tmp_path / "gate.answers"
    clock = [1_795_000_000.0]
    ages = Ages(on_failure=OnFailure.LAST, last_s=100.0)
    no = replace(NO, until_s=clock[0] + 50)
    async with Asking([Says(no)], WAIT, ages=ages, memory=memory, wall=lambda: clock[0]) as asking:
        await decided(asking, caller())
    if what == "damaged":
        memory.write_bytes(memory.read_bytes()[:-5])
    elif what == "not wanted":
        ages = Ages(on_failure=OnFailure.OPEN)
    else:
        clock[0] += 101 if what == "old" else 51
    async with Asking([Says(DOWN)], WAIT, ages=ages, memory=memory, wall=lambda: clock[0]) as asking:
        found = await decided(asking, caller())
    assert (found.allowed, found.freshness) == (True, Freshness.NONE)
    assert memory.exists() == (what != "not wanted")


async def test_what_was_said_is_kept_while_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking_module, "SAVE_S", 0.01)
    memory = tmp_path / "gate.answers"
    async with Asking([Says(NO)], WAIT, ages=Ages(on_failure=OnFailure.LAST), memory=memory) as asking:
        await decided(asking, caller())
        await until(memory.exists)
    async with Asking([Says(NO)], WAIT, ages=Ages(on_failure=OnFailure.LAST), memory=tmp_path / "no" / "x") as asking:
        assert not (await decided(asking, caller())).allowed, "a disk that takes nothing stops nobody"


async def until_async(holds: Callable[[], Any], limit_s: float = 10.0) -> None:
    async with asyncio.timeout(limit_s):
        while not await holds():
            await asyncio.sleep(0.01)


async def test_an_answer_is_renewed_while_calls_come_and_none_of_them_waits() -> None:
    source = Says(YES)
    async with Asking([source], WAIT, ages=Ages(allowed_s=1.0)) as asking:
        await decided(asking, caller())
        waits = 0

        async def renewed() -> bool:
            nonlocal waits
            waits += asking.decide(caller()) is None
            return len(source.asked) >= 3

        await until_async(renewed)
        assert waits == 0


async def test_nobody_is_asked_about_who_does_not_call() -> None:
    source, ahead_s = Says(YES), 0.0
    async with Asking([source], WAIT, mono=lambda: monotonic() + ahead_s) as asking:
        await decided(asking, caller())
        ahead_s = 61.0
        assert len(source.asked) == 1
        assert asking.decide(caller()) is None, "its answer is too old: it is asked for, with the call waiting"


async def test_a_denied_subscriber_is_asked_for_although_it_does_not_call() -> None:
    source = Says(NO, NO, YES)
    async with Asking([source], WAIT, ages=Ages(denied_s=0.1)) as asking:
        assert not (await decided(asking, caller())).allowed
        await until(lambda: len(source.asked) == 3)
        await until(lambda: (found := asking.decide(caller())) is not None and found.allowed)


async def test_who_is_denied_by_what_it_used_here_is_let_in_when_the_vendor_is_topped_up() -> None:
    one = Answer(allowed=True, remaining=1, unit="calls")
    source = Says(one, replace(one, remaining=50))
    async with Asking([source], WAIT, ages=Ages(denied_s=0.1)) as asking:
        await decided(asking, caller())
        asking.settle(asking.reserve(caller(), CALL), used(calls=1))
        assert not (await decided(asking, caller())).allowed
        await until(lambda: len(source.asked) == 2)
        await until(lambda: (found := asking.decide(caller())) is not None and found.allowed)


async def test_a_failed_renewal_lets_the_old_answer_hold_to_its_end() -> None:
    source = Says(YES, DOWN)
    async with Asking([source], WAIT, ages=Ages(allowed_s=1.0, on_failure=OnFailure.CLOSED)) as asking:
        await decided(asking, caller())
        seen: list[tuple[bool, str]] = []

        def closed() -> bool:
            found = asking.decide(caller())
            assert found is not None, "nobody waits"
            seen.append((found.allowed, found.freshness))
            return not found.allowed

        await until(closed)
        assert set(seen[:-1]) == {(True, "fresh")}
        assert seen[-1] == (False, "none")
        assert len(source.asked) == 2, "and the next question waits its pause"


async def test_a_source_that_is_down_keeps_nobody_waiting() -> None:
    source = Says(DOWN)
    async with Asking([source], SHORT) as asking:
        for number in range(asking_module.DOWN_AFTER):
            assert asking.decide(caller(f"c{number}")) is None
            assert (await decided(asking, caller(f"c{number}"))).allowed
        found = [asking.decide(caller(f"new{number}")) for number in range(50)]
        assert all(one is not None and one.reason == "http_503" for one in found)
        assert asking.status()[0].down
        assert len(source.asked) == asking_module.DOWN_AFTER
        source.found = [YES]

        def back() -> bool:
            asking.decide(caller("new7"))
            return not asking.status()[0].down

        await until(back)
        await until(lambda: asking.status()[0].under_way == 0)
        assert len(source.asked) == asking_module.DOWN_AFTER + 1, "one question found out"
        assert (await decided(asking, caller("new8"))).freshness is Freshness.FRESH


async def test_a_call_waits_no_longer_than_the_limit_whatever_the_source_does() -> None:
    source = Says(YES)
    source.hold = asyncio.Event()
    async with Asking([source], SHORT) as asking:
        async with asyncio.timeout(5):
            found = await decided(asking, caller())
        assert (found.freshness, found.reason) == (Freshness.NONE, "timeout")
        await until(lambda: asking.questions[source.name, "timeout"] == 1)


async def test_a_client_that_leaves_takes_nobodys_answer_along() -> None:
    source = Says(YES)
    source.hold = asyncio.Event()
    async with Asking([source], WAIT) as asking:
        left, stays = (asyncio.create_task(decided(asking, caller())) for _ in range(2))
        await until(lambda: len(source.asked) == 1)
        left.cancel()
        await asyncio.wait({left})
        source.hold.set()
        assert (await stays).freshness is Freshness.FRESH
        assert len(source.asked) == 1


async def test_questions_are_bounded_at_once_and_in_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking_module, "WAITING_MAX", 30)
    source = Says(YES)
    source.hold = asyncio.Event()
    async with Asking([source], WAIT) as asking:
        waiting = [asyncio.create_task(decided(asking, caller(f"c{number}"))) for number in range(40)]
        await until(lambda: asking.status()[0].under_way == 30)
        await until(lambda: sum(task.done() for task in waiting) == 10)
        assert {task.result().reason for task in waiting if task.done()} == {"too_many_questions"}
        source.hold.set()
        found = await asyncio.gather(*waiting)
        assert sum(one.freshness is Freshness.FRESH for one in found) == 30
        assert source.most_at_once == asking_module.ASKS_AT_ONCE


async def test_memory_is_bounded_and_what_is_held_stays() -> None:
    source = Says(Answer(allowed=True, remaining=5, unit="calls"))
    async with Asking([source], AskedSettings(gate_subscribers=10)) as asking:
        await decided(asking, caller("kept"))
        hold = asking.reserve(caller("kept"), CALL)
        for number in range(50):
            await decided(asking, caller(f"c{number}"))
        assert asking.status()[0].subjects == 10
        found = asking.decide(caller("kept"))
        assert found is not None
        assert found.remaining == 4
        asking.release(hold)
        assert asking.decide(caller("c1")) is None, "forgotten, and asked for again"


async def test_a_crowd_that_is_held_leaves_no_room_and_is_told_so() -> None:
    source = Says(YES)
    async with Asking([source], AskedSettings(gate_subscribers=10)) as asking:
        for number in range(10):
            await decided(asking, caller(f"c{number}"))
            asking.reserve(caller(f"c{number}"), CALL)
        found = asking.decide(caller("one more"))
        assert found is not None
        assert (found.allowed, found.reason) == (True, "too_many_subscribers")


async def test_whom_no_vendor_can_know_is_the_operators_word() -> None:
    source = Says(NO)
    for on_failure in OnFailure:
        async with Asking([source], WAIT, on_failure=on_failure) as asking:
            found = asking.decide(caller(None))
            assert found is not None
            assert (found.allowed, found.reason) == (on_failure is not OnFailure.CLOSED, "no_customer")
    assert source.asked == []


async def test_of_several_sources_one_no_is_enough_and_all_are_asked_together() -> None:
    yes, no = Says(YES), Says(NO)
    yes.hold = asyncio.Event()
    async with Asking([yes, no], WAIT) as asking:
        assert asking.decide(caller()) is None
        await until(lambda: asking.status()[1].under_way == 0)
        found = asking.decide(caller())
        assert found is not None, "the second says no: nobody waits for the first"
        assert not found.allowed
        yes.hold.set()


async def test_where_nobody_is_asked_every_call_passes() -> None:
    async with Asking([], WAIT) as asking:
        assert asking.decide(caller()) is NOBODY_ASKED
        assert await decided(asking, caller()) is NOBODY_ASKED
        asking.release(asking.reserve(caller(), CALL))


async def test_a_source_that_breaks_is_a_failure_like_another(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Says):
        async def ask(self, subject: str) -> Known | NoAnswer:
            raise RuntimeError("a bug of ours")

    async with Asking([Broken(YES)], WAIT) as asking:
        found = await decided(asking, caller())
    assert (found.allowed, found.reason) == (True, "fault")
    assert "failed to ask" in caplog.text


async def test_rules_are_polled_after_a_restart_that_took_no_time(tmp_path: Path) -> None:
    """What is remembered is too new then to be asked for at once, and no call comes that would have it asked for."""
    memory, ages = tmp_path / "gate.answers", Ages(on_failure=OnFailure.LAST)
    async with Asking([Says(NO, polled_s=60.0)], WAIT, ages=ages, memory=memory) as asking:
        await until(lambda: asking.questions["says", "answered"] == 1)
    source = Says(DOWN, polled_s=60.0)
    async with Asking([source], WAIT, ages=ages, memory=memory) as asking:
        await until(lambda: asking.questions["says", "http_503"] == 1)


async def test_rules_are_polled_without_a_call(receiver: Receiver) -> None:
    source = ReveniumControls(api_key=KEY, team="none", url=receiver.url)
    source.polled_s = 0.05
    async with Asking([source], WAIT) as asking:
        await until(lambda: asking.questions[source.name, "answered"] >= 3)
        found = asking.decide(caller("anybody"))
        assert found is not None
        assert found.allowed
        receiver.faults.set(Fault(do=Do.STATUS, status=500))
        await until(lambda: asking.status()[0].reason == "http_500")


async def test_rules_that_nobody_understands_are_said(receiver: Receiver) -> None:
    async with ScriptedServer(script=lambda _: http(200, b'{"rules": [{}, 7]}')).running() as server:
        async with Asking([ReveniumControls(api_key=KEY, team="t", url=server.url)], WAIT) as asking:
            assert (await decided(asking, caller())).allowed
            assert asking.status()[0].unread == 2


MAKERS: dict[str, Callable[[str], Source]] = {
    "revenium": lambda url: ReveniumProductKey(api_key=KEY, url=url),
    "openmeter": lambda url: OpenmeterAccess(feature="api_calls", unit="calls", url=url),
    "flexprice": lambda url: FlexpriceWallets(api_key=KEY, url=url),
    "lago": lambda url: LagoWallets(api_key=KEY, url=url, by_subscription=False),
}


@pytest.mark.parametrize("name", list(MAKERS))
async def test_every_vendors_stand_in_lets_in_and_turns_away(name: str, receiver: Receiver) -> None:
    kind = "quota" if name in ("revenium", "openmeter") else "balance"
    async with Asking([MAKERS[name](receiver.url)], WAIT) as asking:
        assert (await decided(asking, caller(f"acme-{kind}-2"))).allowed
        unknown = await decided(asking, caller("unknown-1"))
        assert (unknown.allowed, unknown.freshness) == (False, Freshness.FRESH)


async def test_a_stop_leaves_no_question_behind() -> None:
    source = Says(YES)
    source.hold = asyncio.Event()
    async with Asking([source], WAIT) as asking:
        asking.decide(caller())
        await until(lambda: len(source.asked) == 1)
    assert asking.status()[0].under_way == 0
    assert len(asyncio.all_tasks()) == 1


async def test_no_key_and_no_subscriber_is_logged(caplog: pytest.LogCaptureFixture, receiver: Receiver) -> None:
    receiver.faults.set(Fault(do=Do.STATUS, status=500))
    async with Asking([ReveniumProductKey(api_key=KEY, url=receiver.url)], WAIT) as asking:
        for number in range(asking_module.DOWN_AFTER):
            await decided(asking, caller(f"secret-{number}"))
    assert "does not answer the gate (http_500)" in caplog.text
    assert KEY not in caplog.text
    assert "secret-" not in caplog.text


def seen_by(server: ScriptedServer) -> list[Request]:
    return server.requests


async def test_a_connection_is_kept_between_questions() -> None:
    async with ScriptedServer(script=lambda _: http(404, b"{}")).running() as server:
        async with Asking([ReveniumProductKey(api_key=KEY, url=server.url)], WAIT) as asking:
            for number in range(5):
                await decided(asking, caller(f"c{number}"))
        assert len(seen_by(server)) == 5
        assert server.connections == 1


async def test_the_receivers_faults_are_set_over_http_too(receiver: Receiver) -> None:
    async with aiohttp.ClientSession(receiver.url) as session:
        order = {"do": "lie", "lie": "claim_unsigned", "backend": "revenium"}
        async with session.post("/_faults", json=order) as said:
            assert said.status == 200
        async with session.post("/_faults", json=order | {"lie": "claim_lost"}) as said:
            assert said.status == 400
    async with Asking([ReveniumProductKey(api_key=KEY, url=receiver.url)], WAIT) as asking:
        assert (await decided(asking, caller())).reason == "claim_algorithm"
