"""One odd record, or one odd fault: the others are counted, whoever died holds nothing, and calls are decided."""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import orjson
import pytest

from sidecar.gate.admission import Admission, Meant, Policy, Verdict
from sidecar.gate.counters import HELD_MAX, Need
from sidecar.gate.denials import Denials
from sidecar.gate.limits import Charging, Limit, read_limits
from sidecar.gate.owner import Owner, count_records
from sidecar.gate.windows import SECOND_NS
from sidecar.meters.definition import read_meters
from sidecar.model.exchange import Exchange, Gate, Outcome, Subscriber, Usage, UsageState
from sidecar.model.record import Record, encode
from sidecar.model.record_check import read_foreign
from sidecar.runtime import gate_factory
from sidecar.runtime.metering import load_limits
from sidecar.settings import AskedSettings
from sidecar.usage.readers import UsageTaps

AT_NS = 1_795_000_000 * SECOND_NS
COST = "cost_usd-per-month|acme|2026-11"
HUGE = 3 * 10**20
DENY = Denials(UsageTaps().endpoints, AskedSettings())


class Timer:
    def cancel(self) -> None:
        """Never due here."""


def short(*texts: str) -> tuple[Limit, ...]:
    return read_limits((), texts)


def unknown(reserved: dict[str, int], **changes: Any) -> bytes:
    """A call that a process left open."""
    exchange = Exchange(
        method="POST",
        url="u",
        id="0199f7a0-0000-7000-8000-00000000000a",
        started_ns=AT_NS,
        subscriber=Subscriber("acme", "header:x-tenant"),
        usage=Usage(usage_state=UsageState.ABSENT),
        outcome=Outcome.UNKNOWN,
        gate=Gate("allowed", None, "limits", 0.0, reserved),
        **changes,
    )
    return encode(exchange, seq=1, instance="i")


def owner_of(limits: tuple[Limit, ...]) -> Owner:
    return Owner(
        Charging(limits), dry_run=False, clock_ns=lambda: AT_NS, call_later=cast(Any, lambda after, do: Timer())
    )


def test_an_amount_that_json_has_as_text_is_a_number_again() -> None:
    line = unknown({COST: HUGE, "calls-per-day|acme|2026-11-18": 1})
    assert orjson.loads(line)["gate"]["reserved"][COST] == str(HUGE)
    gate = Record.from_json(line).gate
    assert gate is not None
    assert gate.reserved == {COST: HUGE, "calls-per-day|acme|2026-11-18": 1}
    assert read_foreign(line).gate == gate, "a reader of others' records takes it too"
    book = count_records([line], Charging(short("cost_usd=500/month", "calls=9/day")), lambda record: True)
    assert book.settled(COST, AT_NS) == HUGE


@pytest.mark.parametrize("amount", ["1e9", "", "٣", None, 1.5, True, [1], "9" * 61])
def test_an_amount_that_is_no_whole_number_is_left_out_alone(amount: object) -> None:
    row = orjson.loads(unknown({COST: 5, "calls-per-day|acme|2026-11-18": 1}))
    row["gate"]["reserved"][COST] = amount
    gate = Record.from_json(orjson.dumps(row)).gate
    assert gate is not None
    assert gate.reserved == {"calls-per-day|acme|2026-11-18": 1}


def odd() -> bytes:
    """A record that can be read, and not counted."""
    row = orjson.loads(unknown({}))
    row["outcome"], row["usage"] = "complete", row["usage"] | {"usage_state": "final", "input_tokens": "many"}
    return orjson.dumps(row)


def test_one_odd_record_does_not_keep_the_others_from_being_counted(caplog: pytest.LogCaptureFixture) -> None:
    limits = short("input_tokens=500/day")
    key = "input_tokens-per-day|acme|2026-11-18"
    book = count_records([unknown({key: 2}), odd(), unknown({key: 3})], Charging(limits), lambda record: True)
    assert book.settled(key, AT_NS) == 5
    assert [entry.levelno for entry in caplog.records] == [logging.ERROR]
    assert "many" not in caplog.text


def test_what_a_dead_process_held_is_free_whatever_it_left_open() -> None:
    limits = short("concurrent=2", "input_tokens=500/day")
    owner, tail = owner_of(limits), "00000000000a"
    owner.counters.decide(tail, [Need("concurrent", "acme", 1), Need("input_tokens-per-day", "acme", 7)], AT_NS)
    assert owner.counters.reserved("concurrent|acme|total") == 1
    key = "input_tokens-per-day|acme|2026-11-18"
    owner.died(tail, [odd(), b"no record", unknown({"concurrent|acme|total": 1, key: HUGE})])
    assert owner.counters.reserved("concurrent|acme|total") == 0
    assert owner.counters.reserved(key) == 0
    assert owner.counters.settled(key, AT_NS) == HUGE


def test_what_a_dead_process_held_is_free_even_where_its_calls_cannot_be_looked_at() -> None:
    owner, tail = owner_of(short("concurrent=2")), "00000000000a"
    owner.counters.decide(tail, [Need("concurrent", "acme", 1)], AT_NS)

    with pytest.raises(ZeroDivisionError):
        owner.died(tail, (b"" * (1 // (2 - number)) for number in range(4)))
    assert owner.counters.reserved("concurrent|acme|total") == 0


@pytest.mark.parametrize(
    "fault", [TypeError("secret"), KeyError("secret"), OverflowError("secret"), OSError("no disk")]
)
async def test_the_owner_is_loaded_whatever_reading_the_past_says(
    fault: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*given: object) -> None:
        raise fault

    monkeypatch.setattr(gate_factory, "counted", fails)
    monkeypatch.setattr(gate_factory, "is_shared", lambda settings: True)
    monkeypatch.setattr(gate_factory, "ledgers_past", fails)
    owner = owner_of(short("calls=9/day"))
    whole: Any = SimpleNamespace(limits_shared=None)
    bills: Any = SimpleNamespace(spool=SimpleNamespace(instance="i"), reader=None)
    await load_limits(whole, owner, cast(Any, None), bills, 0)
    assert owner.loaded
    assert [entry.levelno for entry in caplog.records] == [logging.ERROR] * 2
    assert "secret" not in caplog.text
    assert ("no disk" in caplog.text) is isinstance(fault, OSError)


def test_no_call_holds_more_than_a_record_has_room_for() -> None:
    """A meter may weigh what it counts by a million millions."""
    meters = read_meters(
        [{"name": "micro", "aggregation": {"type": "SUM", "field": "output_tokens", "multiplier": "1000000000000"}}]
    )
    table = {"name": "big", "unit": "meter:micro", "amount": "9" * 24, "window": "total"}
    limits = read_limits([table], meters=meters)
    owner, held = owner_of(limits), []
    process: Any = SimpleNamespace(please_tell=lambda: None)
    policy = Policy(
        limits=limits, meant=lambda method, target, upstream: Meant("openai"), key_of=lambda fields: None, deny=DENY
    )
    later: Callable[..., Any] = lambda after, do: Timer()  # noqa: E731
    gate = Admission(policy, clock_ns=lambda: AT_NS, call_later=later)
    owner.came("p", process)
    owner.load(count_records([], Charging(limits), bool))
    owner.told("p", (0, {}))
    gate.send = lambda question: owner.ask("p", question)
    process.answer = gate.answered

    def then(verdict: Verdict) -> None:
        held.append(verdict.gate)

    prepared = gate.prepare("POST", "/v1/chat/completions", (), subscriber=None, dimensions={}, route=None)
    for tokens in (10**6, 1, 1, 10**6, 10**6):
        weighed = gate.weigh(prepared, b'{"max_tokens":%d}' % tokens)
        if (verdict := gate.at_once(weighed)) is not None:
            held.append(verdict.gate)
        else:
            gate.ask(weighed, "id", then)
    assert len(held) == 5
    assert all(0 < amount <= HELD_MAX < 1 << 63 for one in held for amount in one.reserved.values())
    for one in held:
        assert Record.from_json(unknown(dict(one.reserved))).gate is not None
        assert type(orjson.loads(unknown(dict(one.reserved)))["gate"]["reserved"].popitem()[1]) is int
