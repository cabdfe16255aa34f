"""Every rule of `retry_policy`, `dedup_window` and `circuit_breaker` as a table.

What follows from a verdict, from a clock, from a row of failures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.delivery.circuit_breaker import Pace, next_pace, suspect
from sidecar.delivery.dedup_window import ClockWatch, may_resend, window_left_s
from sidecar.delivery.limits import Limits
from sidecar.delivery.retry_policy import Attempt, Decision, backoff_s, judge
from sidecar.delivery.settlement import remember
from sidecar.delivery.types import PARTLY_TAKEN, SUSPECT, UNKNOWN, WINDOW_ENDED, Fate, Now, Parking, Term, Tries, worst
from sidecar.model.delivery import (
    KEY_MISMATCH,
    Abilities,
    Atomicity,
    Blocked,
    Dedup,
    Delivered,
    Duplicate,
    Refused,
    Retry,
    Unknown,
    Verdict,
)

LIMITS = Limits()
HOUR = 3600.0
START = Now(1_000_000.0, 500.0)
NONE = Abilities(dedup=Dedup.NONE)
KEY = Abilities(dedup=Dedup.REQUEST_KEY, dedup_window_s=24 * HOUR)
KEYED_BATCH = Abilities(
    events_max=100, atomicity=Atomicity.ALL_OR_NOTHING, dedup=Dedup.REQUEST_KEY, dedup_window_s=24 * HOUR
)
EVENT_BATCH = Abilities(
    events_max=100, atomicity=Atomicity.ALL_OR_NOTHING, dedup=Dedup.EVENT_ID, dedup_window_s=24 * HOUR
)
BARE_BATCH = Abilities(events_max=100, atomicity=Atomicity.ALL_OR_NOTHING, dedup=Dedup.NONE)
PREFIX_KEY = Abilities(events_max=100, atomicity=Atomicity.PREFIX, dedup=Dedup.REQUEST_KEY, dedup_window_s=24 * HOUR)
ITEMS = Abilities(events_max=100, atomicity=Atomicity.PER_ITEM, dedup=Dedup.EVENT_ID)
D, U, P, M = Fate.DELIVERED, Fate.DUPLICATE, Fate.PARKED, Fate.MOVED


def later(seconds: float) -> Now:
    return Now(START.wall_s + seconds, START.mono_s + seconds)


def asked(
    verdicts: Sequence[Verdict],
    abilities: Abilities,
    *,
    before: Tries | None = None,
    after_s: float = 1.0,
    records: Sequence[int] | None = None,
    taken_s: float = -math.inf,
) -> Decision:
    attempt = Attempt(
        verdicts=verdicts,
        records=records or range(1, len(verdicts) + 1),
        started=later(after_s - 1),
        ended=later(after_s),
        roll=0.5,
        taken_s=taken_s,
    )
    return judge(attempt, before or Tries(attempts=1), abilities, LIMITS)


RISKY = Tries(attempts=2, risk_wall_s=START.wall_s, risk_mono_s=START.mono_s)


@pytest.mark.parametrize(
    ("verdict", "abilities", "fate", "parked"),
    [
        (Delivered(), NONE, D, None),
        (Duplicate(), KEY, U, None),
        (Refused("http_422"), KEY, P, Parking("http_422")),
        (Refused("http_422"), NONE, P, Parking("http_422")),
        (Refused(KEY_MISMATCH), KEY, P, Parking(KEY_MISMATCH, maybe_taken=True)),
        (Blocked("unexpected_answer", maybe_taken=True), NONE, P, Parking(UNKNOWN, maybe_taken=True)),
        (Blocked("unexpected_answer", maybe_taken=True), KEY, None, None),
        (Blocked("unexpected_answer"), NONE, None, None),
        (Unknown("timeout"), NONE, P, Parking(UNKNOWN, maybe_taken=True)),
        (Unknown("timeout"), KEY, None, None),
        (Unknown("timeout"), Abilities(dedup=Dedup.NONE, resend_unknown=True), None, None),
        (Retry("http_503"), NONE, None, None),
        (Retry("http_429", 7.0), KEY, None, None),
        (Blocked("unauthorized"), NONE, None, None),
    ],
)
def test_one_event(verdict: Verdict, abilities: Abilities, fate: Fate | None, parked: Parking | None) -> None:
    decision = asked([verdict], abilities)
    assert decision.open is (fate is None)
    assert decision.fates == (() if fate is None else (fate,))
    assert dict(decision.parked) == ({} if parked is None else {0: parked})


@pytest.mark.parametrize(
    ("verdict", "risk"),
    [
        (Unknown("timeout"), True),
        (Retry("http_500"), True),
        (Retry("http_503"), True),
        (Retry("504"), True),
        (Retry("http_429"), False),
        (Retry("http_409"), False),
        (Retry("dns"), False),
        (Retry("timeout"), False),
        (Retry("not_http"), False),
        (Blocked("unexpected_answer", maybe_taken=True), True),
        (Retry("code_15003"), False),
        (Blocked("forbidden"), False),
    ],
)
def test_the_window_runs_from_the_first_attempt_that_may_have_been_taken(verdict: Verdict, risk: bool) -> None:
    decision = asked([verdict], KEY, after_s=100.0)
    assert decision.tries.risk_wall_s == (later(99).wall_s if risk else None)
    again = asked([Unknown("timeout")], KEY, before=decision.tries, after_s=500.0)
    assert again.tries.risk_wall_s == later(99 if risk else 499).wall_s


@pytest.mark.parametrize("abilities", [KEYED_BATCH, EVENT_BATCH, BARE_BATCH, PREFIX_KEY])
@pytest.mark.parametrize("before", [None, Tries(attempts=2, risk_wall_s=START.wall_s, risk_mono_s=START.mono_s)])
def test_a_refusal_for_its_key_is_never_cut_into_other_keys(abilities: Abilities, before: Tries | None) -> None:
    decision = asked([Refused(KEY_MISMATCH)] * 4, abilities, before=before)
    assert decision.fates == (P, P, P, P)
    assert not decision.parts
    assert set(decision.parked.values()) == {Parking(KEY_MISMATCH, maybe_taken=True)}


@pytest.mark.parametrize(
    ("verdict", "reason"),
    [(Retry("refused"), "refused"), (Unknown("timeout"), "timeout"), (Retry("http_503"), "http_503")],
)
def test_a_pace_that_is_slowed_remembers_why(verdict: Verdict, reason: str) -> None:
    pace = Pace()
    for second in range(LIMITS.down_after):
        pace = next_pace(pace, [verdict], later(second), 0.5, LIMITS)
    assert (pace.slow, pace.reason) == (True, reason)
    pace = next_pace(pace, [Retry("dns")], later(1000), 0.5, LIMITS)
    assert pace.reason == "dns", "the latest is what an operator has to look at"
    assert next_pace(pace, [Delivered()], later(2000), 0.5, LIMITS).reason is None


def test_a_refused_connection_is_tried_again_for_ever() -> None:
    tries = Tries(attempts=1)
    for hour in range(24 * 40):
        decision = asked([Retry("dns")], KEY, before=tries, after_s=hour * HOUR + 1)
        assert decision.open
        tries = decision.tries
    assert not tries.risky


@pytest.mark.parametrize(
    ("wall_h", "mono_h", "open_"),
    [(1, 1, True), (22.9, 22.9, True), (23, 23, False), (1, 23, False), (23, 1, False), (30, 30, False)],
)
def test_a_window_ends_an_hour_early_on_the_larger_of_both_clocks(wall_h: float, mono_h: float, open_: bool) -> None:
    now = Now(START.wall_s + wall_h * HOUR, START.mono_s + mono_h * HOUR)
    assert may_resend(RISKY, KEY, now, LIMITS) is open_
    attempt = Attempt(verdicts=[Unknown("timeout")], records=[1], started=now, ended=now, roll=0.0)
    decision = judge(attempt, RISKY, KEY, LIMITS)
    assert decision.open is open_
    if not open_:
        assert dict(decision.parked) == {0: Parking(WINDOW_ENDED, maybe_taken=True)}


def test_a_wall_clock_that_went_back_or_stepped_counts_as_expired() -> None:
    assert window_left_s(RISKY, KEY, Now(START.wall_s - 61, START.mono_s), LIMITS) == 0.0
    assert window_left_s(Tries(expired=True), KEY, START, LIMITS) == 0.0
    assert window_left_s(Tries(), KEY, later(1e9), LIMITS) is None
    assert window_left_s(Tries(expired=True), NONE, START, LIMITS) is None
    no_end = Abilities(dedup=Dedup.EVENT_ID)
    assert window_left_s(Tries(expired=True), no_end, START, LIMITS) is None
    other_run = Tries(risk_wall_s=START.wall_s)
    assert window_left_s(other_run, KEY, Now(START.wall_s + HOUR, 3.0), LIMITS) == 22 * HOUR


def test_a_forced_attempt_is_free_once() -> None:
    forced = Tries(expired=True, forced=True)
    assert may_resend(forced, KEY, START, LIMITS)
    assert not asked([Retry("dns")], KEY, before=forced).open


@pytest.mark.parametrize(
    ("moves", "stepped"),
    [
        ([(10, 10), (3600, 3600)], False),
        ([(10, 10), (70, 5)], True),
        ([(10, 10), (5, 70)], True),
        ([(-86_400, 1)], True),
        ([(50, 1)], False),
    ],
)
def test_a_step_of_the_wall_clock_is_seen(moves: list[tuple[float, float]], stepped: bool) -> None:
    watch, seen, now = ClockWatch(START), False, START
    for wall, mono in moves:
        now = Now(now.wall_s + wall, now.mono_s + mono)
        watch, one = watch.look(now, LIMITS)
        seen = seen or one
    assert seen is stepped


# --- batches -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("abilities", "before", "reason", "halves"),
    [
        (KEYED_BATCH, None, "http_400", True),
        (EVENT_BATCH, None, "http_400", True),
        (BARE_BATCH, None, "http_400", True),
        (PREFIX_KEY, None, "http_400", False),  # a leading part may have been taken, and children have new keys
        (PREFIX_KEY, None, "too_large", True),  # nothing of it was read
        (KEYED_BATCH, RISKY, "http_400", True),  # the key would have told
        (EVENT_BATCH, RISKY, "http_400", True),
        (BARE_BATCH, RISKY, "http_400", False),
        (BARE_BATCH, RISKY, "too_large", False),
        (ITEMS, None, "too_large", True),
    ],
)
def test_a_whole_refusal(abilities: Abilities, before: Tries | None, reason: str, halves: bool) -> None:
    decision = asked([Refused(reason)] * 5, abilities, before=before)
    if halves:
        assert decision.fates == (M,) * 5
        assert decision.parts == ((0, 1, 2), (3, 4))
    else:
        assert decision.fates == (P,) * 5
        assert set(decision.parked.values()) == {Parking(reason, maybe_taken=True)}


@pytest.mark.parametrize(("reason", "risky"), [("http_400", True), ("too_large", False)])
def test_halves_of_what_may_be_partly_there_have_a_window(reason: str, risky: bool) -> None:
    prefix = replace(EVENT_BATCH, atomicity=Atomicity.PREFIX)
    assert asked([Refused(reason)] * 5, prefix).tries.risky is risky
    assert not asked([Refused(reason)] * 5, EVENT_BATCH).tries.risky


ALONE = Tries(attempts=9, alone=LIMITS.alone_after - 1, failed_mono_s=START.mono_s)
AT_FAULT = replace(ALONE, risk_wall_s=START.wall_s, risk_mono_s=START.mono_s)


@pytest.mark.parametrize(
    ("verdict", "abilities", "before", "fates"),
    [
        (Retry("http_500"), EVENT_BATCH, ALONE, (M, M)),
        (Unknown("timeout"), EVENT_BATCH, ALONE, (M, M)),
        (Retry("http_500"), EVENT_BATCH, Tries(attempts=9), None),  # nothing else was taken meanwhile
        (Retry("http_503"), EVENT_BATCH, ALONE, None),  # it has too much to do: more requests would be more of it
        (Retry("http_429"), EVENT_BATCH, ALONE, None),
        (Retry("connect"), EVENT_BATCH, ALONE, None),
        (Retry("http_500"), KEYED_BATCH, ALONE, None),
        (Blocked("forbidden"), KEYED_BATCH, ALONE, (M, M)),
        (Blocked("forbidden"), KEYED_BATCH, AT_FAULT, None),
        (Blocked("forbidden"), BARE_BATCH, ALONE, (M, M)),
        (Blocked("forbidden"), BARE_BATCH, AT_FAULT, None),
    ],
)
def test_what_fails_alone_again_and_again_is_cut_where_a_repeat_is_harmless(
    verdict: Verdict, abilities: Abilities, before: Tries, fates: tuple[Fate, ...] | None
) -> None:
    decision = asked([verdict] * 2, abilities, before=before, taken_s=START.mono_s + 0.5)
    assert decision.open is (fates is None)
    assert decision.fates == (fates or ())
    assert decision.parts == (((0,), (1,)) if fates else ())


@pytest.mark.parametrize(("before", "maybe"), [(ALONE, False), (AT_FAULT, True)])
def test_one_that_is_blocked_alone_again_and_again_is_refused(before: Tries, maybe: bool) -> None:
    decision = asked([Blocked("forbidden")], KEY, before=before, taken_s=START.mono_s + 0.5)
    assert dict(decision.parked) == {0: Parking("forbidden", maybe_taken=maybe)}
    foreign = Blocked("unexpected_answer", maybe_taken=True)
    for other in (foreign, Retry("http_500"), Unknown("timeout")):
        assert asked([other], KEY, before=before, taken_s=START.mono_s + 0.5).open


def test_a_request_is_cut_between_records_never_within_one() -> None:
    decision = asked([Refused("http_400")] * 6, EVENT_BATCH, records=[1, 1, 1, 2, 2, 2])
    assert decision.parts == ((0, 1, 2), (3, 4, 5))
    alone = asked([Refused("http_400")] * 3, EVENT_BATCH, records=[1, 1, 1])
    assert alone.fates == (P, P, P)


@pytest.mark.parametrize(
    ("verdicts", "abilities", "records", "fates", "parts"),
    [
        ([Delivered(), Duplicate(), Refused("bad")], ITEMS, [1, 2, 3], (D, U, P), ()),
        ([Delivered(), Retry("http_429"), Unknown("x")], ITEMS, [1, 2, 3], (D, M, M), ((1, 2),)),
        # Lago's all-or-nothing report: the bad ones are named, the good ones were not taken.
        ([Refused("bad"), Retry("not_taken")], KEYED_BATCH, [1, 2], (P, M), ((1,),)),
        ([Delivered(), Retry("http_429")], BARE_BATCH, [1, 2], (D, M), ((1,),)),
        ([Delivered(), Unknown("x")], BARE_BATCH, [1, 2], (D, P), ()),
        # A record is encoded whole: its other event would be billed twice.
        ([Delivered(), Retry("http_429"), Retry("http_429")], BARE_BATCH, [1, 1, 2], (D, P, M), ((2,),)),
        ([Delivered(), Retry("http_429")], ITEMS, [1, 1], (D, M), ((1,),)),
    ],
)
def test_a_report_by_event(
    verdicts: list[Verdict],
    abilities: Abilities,
    records: list[int],
    fates: tuple[Fate, ...],
    parts: tuple[tuple[int, ...], ...],
) -> None:
    decision = asked(verdicts, abilities, records=records)
    assert (decision.open, decision.fates, decision.parts) == (False, fates, parts)
    assert set(decision.parked) == {i for i, fate in enumerate(fates) if fate is P}


def test_a_mixed_report_keeps_a_keyed_request_whole_while_any_of_it_is_unknown() -> None:
    assert asked([Delivered(), Unknown("x")], KEYED_BATCH).open
    parked = asked([Delivered(), Retry("http_429")], BARE_BATCH, records=[1, 1]).parked
    assert dict(parked) == {1: Parking(PARTLY_TAKEN, maybe_taken=True)}


VERDICTS = st.sampled_from(
    [Delivered(), Duplicate(), Refused("a"), Refused("b"), Retry("dns"), Retry("http_500"), Unknown("x"), Blocked("c")]
)


@given(
    verdicts=st.lists(VERDICTS, min_size=1, max_size=8),
    events=st.lists(st.integers(1, 4), min_size=8, max_size=8),
    dedup=st.sampled_from(Dedup),
    atomicity=st.sampled_from(Atomicity),
    risky=st.booleans(),
    hours=st.floats(0, 48),
)
def test_every_event_has_one_fate_and_nothing_risky_is_repeated(
    verdicts: list[Verdict], events: list[int], dedup: Dedup, atomicity: Atomicity, risky: bool, hours: float
) -> None:
    abilities = Abilities(events_max=100, atomicity=atomicity, dedup=dedup, dedup_window_s=24 * HOUR)
    records = sorted(events[: len(verdicts)])
    before = RISKY if risky else Tries(attempts=1)
    decision = asked(verdicts, abilities, before=before, after_s=hours * HOUR + 1, records=records)
    if decision.open:
        assert not any(isinstance(v, Unknown) for v in verdicts) or dedup is not Dedup.NONE
        return
    assert len(decision.fates) == len(verdicts)
    moved = sorted(i for part in decision.parts for i in part)
    assert moved == [i for i, fate in enumerate(decision.fates) if fate is M]
    assert sorted(decision.parked) == [i for i, fate in enumerate(decision.fates) if fate is P]
    for i, (verdict, fate) in enumerate(zip(verdicts, decision.fates, strict=True)):
        assert (fate is D) == isinstance(verdict, Delivered)
        assert (fate is U) == isinstance(verdict, Duplicate)
        if isinstance(verdict, Unknown) and fate is M:
            assert dedup is Dedup.EVENT_ID
        if fate is M and dedup is not Dedup.EVENT_ID:
            taken = {records[j] for j, other in enumerate(decision.fates) if other in (D, U)}
            assert records[i] not in taken


# --- waits and pace ----------------------------------------------------------------------------------------


@given(attempts=st.integers(1, 2000), roll=st.floats(0, 1), after=st.none() | st.floats(0, 1e9))
def test_waits_are_jittered_capped_and_obey_the_backend(attempts: int, roll: float, after: float | None) -> None:
    wait_s = backoff_s(attempts, roll, LIMITS, after)
    own = min(LIMITS.backoff_cap_s, LIMITS.backoff_base_s * 2.0 ** min(attempts - 1, 40))
    assert wait_s > 0
    if after is None:
        assert wait_s <= own
    else:
        assert min(after, LIMITS.retry_after_cap_s) <= wait_s <= max(own, LIMITS.retry_after_cap_s)


def test_a_wait_that_the_backend_asked_for_is_held() -> None:
    assert asked([Retry("http_429", 90.0)], KEY).held
    assert asked([Retry("http_429", 90.0)], KEY).wait_s == 90.0
    assert not asked([Retry("http_429")], KEY).held


def paced(verdicts: Sequence[Verdict], times: int, pace: Pace | None = None) -> Pace:
    pace = pace or Pace()
    for _ in range(times):
        pace = next_pace(pace, verdicts, START, 0.5, LIMITS)
    return pace


def test_a_backend_that_takes_nothing_is_asked_one_at_a_time() -> None:
    assert not paced([Retry("dns")], LIMITS.down_after - 1).slow
    down = paced([Retry("dns")], LIMITS.down_after)
    assert down.slow
    assert down.blocked is None
    assert down.allowed(START, 0, 8) == 0
    assert down.allowed(later(60), 0, 8) == 1
    assert down.allowed(later(60), 1, 8) == 0
    assert paced([Delivered()], 1, down) == Pace()
    assert Pace().allowed(START, 3, 8) == 5


def test_late_answers_of_one_burst_lengthen_no_wait() -> None:
    once = paced([Blocked("unauthorized")], 1)
    assert paced([Blocked("unauthorized")], 20, once) == once
    assert once.blocked == "unauthorized"


def test_probes_of_a_block_get_rarer_up_to_a_limit() -> None:
    pace, now, waits = Pace(), START, []
    for _ in range(12):
        pace = next_pace(pace, [Blocked("forbidden")], now, 1.0, LIMITS)
        waits.append(pace.not_before_s - now.mono_s)
        now = Now(now.wall_s + waits[-1], pace.not_before_s)
    assert waits == sorted(waits)
    assert waits[0] == LIMITS.blocked_base_s
    assert waits[-1] == LIMITS.blocked_cap_s
    assert next_pace(pace, [Retry("http_503")], now, 0.5, LIMITS).blocked == "forbidden"
    assert next_pace(pace, [Refused("http_422")], now, 0.5, LIMITS).blocked is None


def test_a_retry_after_holds_a_backend_that_is_down() -> None:
    assert paced([Retry("http_429", 120.0)], LIMITS.down_after).not_before_s == START.mono_s + 120.0


def test_a_long_row_of_one_refusal_is_suspect_and_one_success_clears_it() -> None:
    almost = paced([Refused("http_400")] * 3, LIMITS.suspect_after - 1)
    assert list(suspect(almost, [Refused("http_400")], LIMITS)) == [Blocked(SUSPECT)]
    assert list(suspect(almost, [Refused("http_422")], LIMITS)) == [Refused("http_422")]
    assert list(suspect(paced([Delivered()], 1, almost), [Refused("http_400")], LIMITS)) == [Refused("http_400")]
    assert paced([Refused("other")], 1, almost).refusals == 1
    held = next_pace(almost, [Blocked(SUSPECT)], START, 0.5, LIMITS)
    assert list(suspect(held, [Refused("http_400")], LIMITS)) == [Blocked(SUSPECT)]


@pytest.mark.parametrize(
    ("counts", "term"),
    [
        ({"parked": 1, "pending": 1, "delivered": 1, "duplicate": 1}, Term.PARKED),
        ({"parked": 0, "pending": 1, "delivered": 1, "duplicate": 1}, Term.OPEN),
        ({"parked": 0, "pending": 0, "delivered": 1, "duplicate": 1}, Term.DELIVERED),
        ({"parked": 0, "pending": 0, "delivered": 0, "duplicate": 1}, Term.DUPLICATE),
    ],
)
def test_a_record_counts_by_its_worst_event(counts: dict[str, int], term: Term) -> None:
    assert worst(**counts) is term


def test_a_record_without_events_has_no_place() -> None:
    with pytest.raises(ValueError, match="no place"):
        worst(parked=0, pending=0, delivered=0, duplicate=0)


def test_history_keeps_the_first_attempt_and_the_latest() -> None:
    history: tuple[str, ...] = ()
    for number in range(100):
        history = remember(history, str(number), LIMITS)
    assert len(history) == LIMITS.history_entries
    assert (history[0], history[-1]) == ("0", "99")
