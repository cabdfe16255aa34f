"""The counters of the owner, what processes decide out of it, and the two together under everything that can happen."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from decimal import Decimal
from types import SimpleNamespace
from typing import Any, cast

import pytest

from sidecar.gate.admission import Admission, Meant, Policy, Verdict
from sidecar.gate.counters import ALLOWED, DENIED, SHADOW, Counter, Counters, Need
from sidecar.gate.denials import Denials
from sidecar.gate.fleet import SharedCounters
from sidecar.gate.limits import Charge, Charging, Facts, Limit, read_limits
from sidecar.gate.owner import Hour, Owner, count_hours, count_records
from sidecar.gate.windows import SECOND_NS
from sidecar.model.exchange import Exchange, Gate, Outcome, Subscriber, Usage, UsageState
from sidecar.model.record import encode
from sidecar.settings import AskedSettings
from sidecar.usage.readers import UsageTaps

AT_NS = 1_795_000_000 * SECOND_NS
DAY_NS = 86_400 * SECOND_NS
DENY = Denials(UsageTaps().endpoints, AskedSettings())


def limits(*short: str, **more: Any) -> tuple[Limit, ...]:
    return read_limits([more] if more else [], short, dimensions=["team"])


def counters(*short: str, **given: Any) -> Counters:
    return Counters(limits(*short), **given)


def settle(book: Counters, key: str, amount: int, reserved: int = 0, at_ns: int = AT_NS, process: str = "a") -> None:
    limit = book.limits[key.split("|", maxsplit=1)[0]]
    book.settle(process, [Charge(limit, key, key.split("|")[1], amount, reserved)], at_ns)


CALLS = "calls-per-day|acme|2026-11-18"
ONE = Need("calls-per-day", "acme", 1)


def test_the_last_one_is_let_in_and_the_next_is_not() -> None:
    book = counters("calls=3/day")
    decisions = [book.decide("a", [ONE], AT_NS).decision for _ in range(5)]
    assert decisions == [ALLOWED] * 3 + [DENIED] * 2
    assert book.reserved(CALLS) == 3
    settle(book, CALLS, 1, 1)
    settle(book, CALLS, 0, 1)  # one that gave it back
    assert (book.settled(CALLS, AT_NS), book.reserved(CALLS)) == (1, 1)
    assert book.decide("a", [ONE], AT_NS).decision == ALLOWED
    assert book.decide("a", [ONE], AT_NS).decision == DENIED


def test_where_one_limit_denies_nothing_is_taken_of_any() -> None:
    book = counters("calls=100/day", "total_tokens=10/day")
    needs = [ONE, Need("total_tokens-per-day", "acme", 10)]
    assert book.decide("a", needs, AT_NS).decision == ALLOWED
    before = book.reserved(CALLS)
    denied = book.decide("a", needs, AT_NS)
    assert (denied.decision, denied.limit) == (DENIED, "total_tokens-per-day")
    assert book.reserved(CALLS) == before


def test_a_call_that_may_need_more_than_is_left_takes_the_rest() -> None:
    book = counters("total_tokens=100/day")
    need = Need("total_tokens-per-day", "acme", 80)
    key = "total_tokens-per-day|acme|2026-11-18"
    assert book.decide("a", [need], AT_NS).held == {key: 80}
    assert book.decide("a", [need], AT_NS).held == {key: 20}
    assert book.decide("a", [need], AT_NS).decision == DENIED
    # each takes what it could at most: over the limit by less than one call
    settle(book, key, 80, 80)
    settle(book, key, 80, 20)
    assert book.settled(key, AT_NS) == 160 <= 100 + 80


def test_a_new_period_is_another_counter_and_a_late_end_belongs_to_the_old_one() -> None:
    book = counters("calls=1/day")
    assert book.decide("a", [ONE], AT_NS).decision == ALLOWED
    assert book.decide("a", [ONE], AT_NS).decision == DENIED
    tomorrow = AT_NS + DAY_NS
    assert book.decide("a", [ONE], tomorrow).decision == ALLOWED
    settle(book, CALLS, 1, 1)
    assert book.settled(CALLS, tomorrow) == 1
    assert book.decide("a", [ONE], tomorrow).decision == DENIED
    assert [row.used + row.reserved for row in book.rows(tomorrow)] == [1]


def test_a_sliding_window_lets_go_of_what_is_old() -> None:
    book = counters("calls=2/60s")
    need, key = Need("calls-per-60s", "acme", 1), "calls-per-60s|acme|"
    for second in (0, 30):
        assert book.decide("a", [need], AT_NS + second * SECOND_NS).decision == ALLOWED
        settle(book, key, 1, 1, AT_NS + second * SECOND_NS)
    denied = book.decide("a", [need], AT_NS + 59 * SECOND_NS)
    assert denied.decision == DENIED
    assert denied.retry_after_s is not None
    assert 1 <= denied.retry_after_s <= 3
    again_ns = AT_NS + 59 * SECOND_NS + int(denied.retry_after_s * SECOND_NS)
    assert book.decide("a", [need], again_ns).decision == ALLOWED
    assert book.decide("a", [need], again_ns).decision == DENIED
    book.sweep(again_ns + 10 * 60 * SECOND_NS)
    assert book.settled(key, again_ns) == 0


class Clock:
    def __init__(self) -> None:
        self.now_ns = AT_NS

    def owner(self, *short: str) -> tuple[Owner, list[tuple[Any, ...]]]:
        """And what it answers."""
        owner = Owner(
            Charging(limits(*short)), dry_run=False, clock_ns=lambda: self.now_ns, call_later=lambda after, do: Timer()
        )
        speaks = Answers()
        owner.came("a", speaks)
        return owner, speaks.heard

    def ended(self, number: int, key: str) -> Exchange:
        """A call that began and ended now."""
        return Exchange(
            method="GET",
            url="u",
            id=f"{number:036x}",
            started_ns=self.now_ns,
            status=200,
            outcome=Outcome.COMPLETE,
            subscriber=Subscriber("acme", "test"),
            gate=Gate("allowed", None, "limits", 0.0, {key: 1}),
        )


class Answers:
    def __init__(self) -> None:
        self.heard: list[tuple[Any, ...]] = []

    def answer(self, payload: tuple[Any, ...]) -> None:
        self.heard.append(payload)

    def please_tell(self) -> None:
        """It has told already."""


@pytest.mark.parametrize("how", ["goes on", "starts anew", "ends late"])
def test_a_clock_that_was_set_back_ends_a_sliding_limit_in_one_window(how: str) -> None:
    clock = Clock()
    owner, heard = clock.owner("calls=60/60s")
    owner.load(Counters(()))
    owner.told("a", (0, {}))
    key, calls = "calls-per-60s|acme|", list[Exchange]()
    for number in range(60):
        clock.now_ns += SECOND_NS // 2
        calls.append(clock.ended(number, key))
        if how != "ends late":
            owner.settle(calls[-1])
    clock.now_ns -= 3600 * SECOND_NS  # by the hour that it was ahead
    if how == "starts anew":
        lines = [encode(call, seq=number, instance="i") for number, call in enumerate(calls, start=1)]
        owner, heard = clock.owner("calls=60/60s")
        owner.load(count_records(lines, Charging(limits("calls=60/60s")), lambda record: True))
        owner.told("a", (0, {}))
    if how == "ends late":
        for call in calls:
            owner.settle(call)

    def decided() -> str:
        heard.clear()
        owner.ask("a", (1, clock.now_ns, None, [("calls-per-60s", "acme", 1)], None))
        return str(heard[0][3])

    assert owner.counters.settled(key, clock.now_ns) == 60
    assert decided() == DENIED, "nothing is given away"
    clock.now_ns += 50 * SECOND_NS
    assert decided() == DENIED
    clock.now_ns += 12 * SECOND_NS
    assert decided() == ALLOWED


def test_a_period_that_a_clock_was_ahead_in_is_used_up_only_then() -> None:
    clock = Clock()
    owner, heard = clock.owner("calls=1/day")
    owner.load(Counters(()))
    owner.told("a", (0, {}))
    policy = Policy(
        limits=limits("calls=1/day"),
        meant=lambda method, target, upstream: Meant("openai", None, True),
        key_of=lambda fields: None,
        deny=DENY,
    )
    gate = Admission(policy, clock_ns=lambda: clock.now_ns, call_later=lambda after, do: Timer())
    gate.send = lambda question: owner.ask("a", question)

    def decided() -> str:
        prepared = gate.prepare("GET", "/v1/x", (), subscriber=Subscriber("acme", "test"), dimensions={}, route=None)
        weighed, found = gate.weigh(prepared), list[Verdict]()
        if (verdict := gate.at_once(weighed)) is None:
            gate.ask(weighed, "id", found.append)
            gate.answered(heard.pop())
            (verdict,) = found
        return verdict.gate.decision

    clock.now_ns += DAY_NS
    owner.settle(clock.ended(1, "calls-per-day|acme|2026-11-19"))
    assert [decided() for _ in range(2)] == [DENIED, DENIED]
    assert not heard, "the second one is known to be denied"
    clock.now_ns -= DAY_NS
    assert owner.rows() == []
    assert [decided() for _ in range(2)] == [ALLOWED, DENIED]
    assert [row.reserved for row in owner.rows()] == [1]
    clock.now_ns += DAY_NS
    assert decided() == DENIED


async def test_sliding_windows_are_published_anew_where_a_clock_was_set() -> None:
    clock, database = Clock(), SimpleNamespace()
    owner = Owner(
        Charging(limits("calls=9/60s", "calls=9/day")),
        dry_run=False,
        clock_ns=lambda: clock.now_ns,
        call_later=lambda after, do: Timer(),
        shared=lambda: 0.0,
    )
    owner.settle(clock.ended(1, "calls-per-60s|acme|"))
    shared = SharedCounters(
        cast(Any, None), cast(Any, None), owner.counters, clock_s=lambda: 0.0, wall_ns=lambda: clock.now_ns
    )
    dirty = []
    for ahead_s in (0, 1, 3600, 3599):

        async def says(question: str, ahead_s: int = ahead_s) -> float:
            return clock.now_ns / SECOND_NS + ahead_s

        database.fetchval = says
        for counter in owner.counters.all():
            assert counter.share is not None
            counter.share.dirty = False
        await shared._compare_clocks(cast(Any, database))
        dirty.append([counter.key for counter in owner.counters.all() if counter.share and counter.share.dirty])
    assert dirty == [[], [], ["calls-per-60s|acme|"], []]


def test_calls_at_once() -> None:
    book = counters("concurrent=2")
    need, key = Need("concurrent", "acme", 1), "concurrent|acme|total"
    assert [book.decide("a", [need], AT_NS).decision for _ in range(3)] == [ALLOWED, ALLOWED, DENIED]
    settle(book, key, 0, 1)
    assert book.decide("a", [need], AT_NS).decision == ALLOWED


def test_warn_and_shadow_and_a_dry_run_deny_nothing() -> None:
    table = {"name": "soft", "unit": "calls", "amount": 1, "window": "day"}
    for action, dry, expected in (("warn", False, ALLOWED), ("shadow", False, SHADOW), ("block", True, SHADOW)):
        book = Counters(read_limits([table | {"action": action}]), dry_run=dry)
        need = Need("soft", "acme", 1)
        found = [book.decide("a", [need], AT_NS) for _ in range(3)]
        assert [decision.decision for decision in found] == [ALLOWED, expected, expected]
        assert found[2].limit == (None if action == "warn" else "soft")
        assert book.reserved("soft|acme|2026-11-18") == 3


def test_it_is_said_once_that_a_limit_is_nearly_used_up_and_that_it_is() -> None:
    said: list[int] = []

    def reached(counter: Counter, percent: int) -> None:
        said.append(percent)

    book = counters("calls=10/day", reached=reached)
    for _ in range(12):
        settle(book, CALLS, 1)
    assert said == [80, 100]


def test_a_lease_is_a_small_part_and_near_the_limit_there_is_none() -> None:
    book = counters("calls=1000/day")
    first = book.decide("a", [ONE], AT_NS)
    assert first.more == {CALLS: 999 // 50}
    settle(book, CALLS, 940)
    assert not book.decide("a", [ONE], AT_NS).more
    assert book.reserved(CALLS) == 1 + 19 + 1


def test_a_lease_can_be_told_whatever_the_amounts_are() -> None:
    book = Counters(read_limits((), ["cost_usd=999999999999999999999999/month"]))
    (more,) = book.decide("a", [Need("cost_usd-per-month", "acme", 10**17)], AT_NS).more.values()
    assert more < 1 << 63


def test_a_process_that_died_holds_nothing_and_one_that_tells_holds_what_it_says() -> None:
    book = counters("calls=1000/day")
    for process in ("a", "b"):
        book.decide(process, [ONE], AT_NS)
    book.gone("a")
    leased = book.reserved(CALLS)
    book.holding("b", {CALLS: 1, "gone-limit|acme|total": 5}, AT_NS)
    assert book.reserved(CALLS) == 1 < leased
    settle(book, CALLS, 1, 1, process="a")  # what it had not been granted in this life
    assert book.reserved(CALLS) == 1


def test_counters_that_nobody_can_ask_for_are_forgotten() -> None:
    book = counters("calls=10/minute", "concurrent=2")
    for number in range(100):
        book.decide("a", [Need("calls-per-minute", f"s{number}", 1), Need("concurrent", f"s{number}", 1)], AT_NS)
    book.gone("a")
    book.sweep(AT_NS + 2 * 3600 * SECOND_NS)
    assert "0 of 2" in repr(book)


@pytest.mark.parametrize("short", ["calls=3/minute", "calls=3/day", "calls=3/month", "calls=3/90s", "calls=3/24h"])
def test_a_clock_that_is_ahead_for_a_while_makes_nothing_forgotten_of_the_true_time(short: str) -> None:
    book = counters(short)
    (name,) = book.limits
    key = book.limits[name].key("acme", AT_NS)
    settle(book, key, 3)
    book.sweep(AT_NS)
    for minute in range(min(int(book.limits[name].reaches_back_s / 60), 59)):
        book.sweep(AT_NS + 400 * DAY_NS + minute * 60 * SECOND_NS)
    book.set_back(AT_NS)
    assert book.decide("a", [Need(name, "acme", 1)], AT_NS).decision == DENIED
    assert book.settled(key, AT_NS) == 3
    for _ in range(120):
        book.sweep(AT_NS + 400 * DAY_NS)
    assert "0 of 1" in repr(book)


# --- the owner and processes together ------------------------------------------------------------------


class Timer:
    def cancel(self) -> None:
        """Never due in these tests unless they say so."""


@dataclass
class World:
    """An owner, processes, and messages between them that are delivered when the test says so."""

    short: tuple[str, ...]
    chance: random.Random
    now_ns: int = AT_NS
    queue: list[Callable[[], None]] = field(default_factory=list)
    lines: list[bytes] = field(default_factory=list)
    sent: int = 0
    admitted_over: int = 0
    processes: dict[str, Process] = field(default_factory=dict)
    number: int = 0

    def __post_init__(self) -> None:
        self.limits = read_limits((), self.short)
        self.owner = self.new_owner()

    def new_owner(self) -> Owner:
        return Owner(
            Charging(self.limits), dry_run=False, clock_ns=lambda: self.now_ns, call_later=lambda after, do: Timer()
        )

    def process(self) -> Process:
        self.number += 1
        made = Process(self, f"{self.number:012x}")
        self.processes[made.tail] = made
        self.owner.came(made.tail, made)
        return made

    def restart_owner(self) -> None:
        """SIGKILL of the process that meters: its counters are gone, and what was on the way to it."""
        self.queue.clear()
        self.owner = self.new_owner()
        for made in self.processes.values():
            made.reconnect()
        self.owner.load(count_records(self.lines, Charging(self.limits), lambda record: True))

    def turn(self) -> None:
        while self.queue:
            self.queue.pop(0)()


class Process:
    def __init__(self, world: World, tail: str) -> None:
        self.world, self.tail = world, tail
        policy = Policy(
            limits=world.limits,
            meant=lambda method, target, upstream: Meant("openai", None, True),
            key_of=lambda fields: None,
            deny=DENY,
        )
        self.gate = Admission(policy, clock_ns=lambda: world.now_ns, call_later=lambda after, do: Timer())
        self.gate.send = self.ask
        self.open: list[Exchange] = []
        self.unwritten: list[Exchange] = []  # in frames that nobody has taken
        self.denied = 0
        self.calls = 0

    # to the owner, in order
    def ask(self, question: tuple[Any, ...]) -> None:
        self.flush()
        owner = self.world.owner
        self.world.queue.append(lambda: owner.ask(self.tail, question))

    def flush(self) -> None:
        ended, self.unwritten = self.unwritten, []
        owner = self.world.owner
        for exchange in ended:
            self.world.queue.append(lambda exchange=exchange: self.record(owner, exchange))  # type: ignore[misc]

    def record(self, owner: Owner, exchange: Exchange) -> None:
        owner.settle(exchange)
        self.world.lines.append(encode(exchange, seq=len(self.world.lines) + 1, instance="i"))

    def tell(self) -> None:
        self.flush()
        told, owner = self.gate.tell(), self.world.owner
        self.world.queue.append(lambda: owner.told(self.tail, told))

    def reconnect(self) -> None:
        self.world.owner.came(self.tail, self)
        for question in self.gate.questions():
            self.ask(question)

    # from the owner
    def answer(self, payload: tuple[Any, ...]) -> None:
        self.world.queue.append(lambda: self.gate.answered(payload))

    def please_tell(self) -> None:
        self.world.queue.append(self.tell)

    def call(self, tokens: int = 10) -> None:
        self.calls += 1
        exchange = Exchange(
            method="POST",
            url="u",
            id=f"{self.calls:024x}{self.tail}",
            subscriber=Subscriber("acme", "test"),
            started_ns=self.world.now_ns,
        )
        prepared = self.gate.prepare("POST", "/v1/x", (), subscriber=exchange.subscriber, dimensions={}, route=None)
        body = b'{"model": "m", "max_tokens": %d}' % tokens
        weighed = self.gate.weigh(prepared, body, len(body))
        verdict = self.gate.at_once(weighed)
        if verdict is not None:
            self.judged(exchange, verdict)
        else:
            self.gate.ask(weighed, exchange.id, lambda verdict: self.judged(exchange, verdict))

    def judged(self, exchange: Exchange, verdict: Verdict) -> None:
        exchange.gate = verdict.gate
        if verdict.denial is None:
            self.world.sent += 1
            self.open.append(exchange)
        else:
            self.denied += 1
            exchange.outcome = Outcome.DENIED
            self.unwritten.append(exchange)

    def end(self, number: int, *, known: bool = True, tokens: int = 10) -> None:
        exchange = self.open.pop(number)
        exchange.outcome = Outcome.COMPLETE if known else Outcome.CLIENT_LEFT
        state = UsageState.FINAL if known else UsageState.ABSENT
        exchange.usage = Usage(usage_state=state, request_model="m", provider="openai")
        exchange.status = 200
        if known:
            exchange.usage.input_tokens, exchange.usage.output_tokens = 5, tokens
            exchange.usage.total_tokens = 5 + tokens
        assert exchange.gate is not None
        self.gate.ended(exchange.gate)
        self.unwritten.append(exchange)

    def die(self) -> None:
        """SIGKILL: of its open calls some have left an intent."""
        world = self.world
        del world.processes[self.tail]
        world.turn()
        lines = [encode(exchange, seq=0, instance="i") for exchange in self.open if world.chance.random() < 0.5]
        world.owner.left(self.tail)
        world.owner.died(self.tail, lines)
        world.lines += lines


def reserved_by_open_calls(world: World) -> dict[str, int]:
    sums: dict[str, int] = {}
    for process in world.processes.values():
        for exchange in process.open:
            assert exchange.gate is not None
            for key, amount in exchange.gate.reserved.items():
                sums[key] = sums.get(key, 0) + amount
    return sums


@pytest.mark.parametrize("seed", range(40))
def test_whatever_happens_settled_is_what_the_records_say_and_reserved_what_open_calls_hold(seed: int) -> None:
    chance = random.Random(seed)
    world = World(("calls=300/day", "total_tokens=6000/day", "concurrent=25"), chance)
    world.owner.load(Counters(()))
    for _ in range(3):
        world.process()
    for _ in range(1500):
        processes = list(world.processes.values())
        process = chance.choice(processes)
        happens = chance.random()
        if happens < 0.5:
            process.call(chance.choice([1, 10, 100]))
        elif happens < 0.85 and process.open:
            process.end(chance.randrange(len(process.open)), known=chance.random() < 0.8, tokens=chance.randint(0, 10))
        elif happens < 0.9:
            process.flush()
        elif happens < 0.95:
            process.tell()
        elif happens < 0.955:
            for each in processes:
                each.flush()
            world.turn()
            world.restart_owner()
        elif happens < 0.96 and len(processes) > 1:
            process.flush()
            process.die()
            world.process()
        for _ in range(chance.randrange(4)):
            if world.queue:
                world.queue.pop(0)()
        concurrent = sum(len(each.open) for each in world.processes.values())
        assert concurrent <= 25
    world.turn()
    for process in world.processes.values():
        process.tell()
    world.turn()
    derived = count_records(world.lines, Charging(world.limits), lambda record: True)
    held = reserved_by_open_calls(world)
    for name in ("calls-per-day", "total_tokens-per-day", "concurrent"):
        period = "total" if name == "concurrent" else "2026-11-18"
        key = f"{name}|acme|{period}"
        assert world.owner.counters.settled(key, world.now_ns) == derived.settled(key, world.now_ns), key
        assert world.owner.counters.reserved(key) == held.get(key, 0), key
    calls = world.owner.counters
    assert (
        calls.settled("calls-per-day|acme|2026-11-18", AT_NS) + calls.reserved("calls-per-day|acme|2026-11-18") <= 300
    )


@pytest.mark.parametrize("seed", range(20))
def test_a_limit_is_used_to_its_last_call_and_never_beyond(seed: int) -> None:
    chance = random.Random(seed)
    world = World(("calls=100/day",), chance)
    world.owner.load(Counters(()))
    processes = [world.process() for _ in range(3)]
    for _ in range(400):
        chance.choice(processes).call()
        for _ in range(chance.randrange(3)):
            if world.queue:
                world.queue.pop(0)()
    world.turn()
    assert world.sent == 100
    assert sum(process.denied for process in processes) == 300


def test_the_answer_that_a_process_had_not_heard_yet_counts_as_held() -> None:
    world = World(("calls=100/day",), random.Random(0))
    world.owner.load(Counters(()))
    process = world.process()
    world.turn()
    process.call()
    world.queue.pop(0)()  # the owner has answered, and the answer is under way
    process.tell()
    world.queue.reverse()  # what it tells comes before the answer is read
    world.queue.pop(0)()
    assert world.owner.counters.reserved(CALLS) >= 1
    world.turn()
    process.tell()
    world.turn()
    assert world.owner.counters.reserved(CALLS) == 1


def test_hours_of_the_ledger_count_where_there_are_no_records_any_more() -> None:
    charging = Charging(
        limits(
            "calls=9/month",
            "total_tokens=9/month",
            "cost_usd=9/month",
            name="teams",
            unit="calls",
            amount=1,
            window="month",
            dimensions={"team": "*"},
        )
    )
    facts = Facts(subscriber="acme", model="m")
    kind: dict[str, Any] = {
        "start_ns": AT_NS,
        "facts": facts,
        "input_tokens": 5,
        "output_tokens": 6,
        "total_tokens": 11,
    }
    hours = [
        Hour(calls=4, with_usage=3, refused=False, cost_usd=Decimal("0.5"), **kind),
        Hour(calls=7, with_usage=1, refused=True, cost_usd=Decimal(0), **kind),
    ]
    book = count_hours(hours, charging)
    assert book.settled("calls-per-month|acme|2026-11", AT_NS) == 5
    assert book.settled("total_tokens-per-month|acme|2026-11", AT_NS) == 22
    assert book.settled("cost_usd-per-month|acme|2026-11", AT_NS) == 5 * 10**11
    assert len(book.rows(AT_NS)) == 3, "the hours know no team"


def test_hours_have_another_model_than_limits() -> None:
    """What was asked for is `gpt-5`, and `gpt-5-2025-08-07` responded."""
    one = {"name": "one", "unit": "calls", "amount": 9, "window": "month", "subscriber": "*"}
    made = read_limits([one, one | {"name": "asked", "model": "gpt-5"}, one | {"name": "each", "model": "*"}])
    hours = [
        Hour(AT_NS, Facts(subscriber="acme", model=model), 4, 4, False, 5, 6, 11, Decimal(0))
        for model in ("gpt-5", "gpt-5-2025-08-07")
    ]
    assert [row.scope for row in count_hours(hours, Charging(made)).rows(AT_NS)] == ["acme"]


def test_the_gate_of_a_record_is_read_back() -> None:
    exchange = Exchange(method="GET", url="u", id="0" * 36, started_ns=AT_NS, outcome=Outcome.COMPLETE)
    exchange.gate = Gate("allowed", None, "limits", 0.0, {CALLS: 1})
    book = count_records([encode(exchange, seq=1, instance="i"), b"no record"], Charging(limits("calls=9/day")), bool)
    assert book.settled(CALLS, AT_NS) == 1
