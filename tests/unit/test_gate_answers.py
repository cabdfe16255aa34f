"""How long an answer is believed, what is taken off it, and what holds without one: tables, no loop and no clock."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.gate import answers
from sidecar.gate.answers import (
    BUCKETS_MAX,
    DELIVERY_S,
    Ages,
    Decision,
    Entry,
    Freshness,
    OnFailure,
    Standing,
    Tally,
    Told,
)
from sidecar.gate.sources.base import Answer, Caller, NoAnswer, OfEach
from sidecar.settings import AskedSettings

WALL_S = 1_795_000_000.0
ACME = Caller(subscriber="acme")
AGES = Ages()


class Stand(OfEach):
    """A source that is never asked."""

    name = "stand"
    by_model = False

    def __init__(self, *, unit: str | None = "calls", lag_s: float = 0.0, polled_s: float | None = None) -> None:
        self.unit, self.lag_s, self.polled_s = unit, lag_s, polled_s

    def subject(self, caller: Caller) -> str | None:
        return caller.subscriber

    async def ask(self, subject: str) -> NoAnswer:
        raise AssertionError("nobody asks here")

    async def aclose(self) -> None: ...


STAND = Stand()
YES = Answer(allowed=True, remaining=10, unit="calls")
NO = Answer(allowed=False, reason="quota_used_up", limit="monthly")


def entry_of(answer: Answer, *, source: Stand = STAND, now_s: float = 1000.0, ages: Ages = AGES) -> Entry:
    entry = Entry("acme")
    entry.used_s = now_s - 0.1
    take(entry, answer, source=source, now_s=now_s, ages=ages)
    return entry


def take(entry: Entry, answer: Answer, *, source: Stand = STAND, now_s: float, ages: Ages = AGES) -> None:
    answers.take(entry, source, answer, ages, asked_s=now_s - 0.1, now_s=now_s, wall_s=WALL_S + now_s - 1000)


def decide(entry: Entry, now_s: float, *, source: Stand = STAND, ages: Ages = AGES) -> Decision:
    return answers.decide(entry, source, ACME, ages, now_s=now_s, wall_s=WALL_S + now_s - 1000)


def test_the_settings_are_the_ages() -> None:
    assert Ages.of(AskedSettings()) == AGES
    own = AskedSettings(gate_age=9.0, gate_denied_age=2.0, gate_last_age=7.0)
    assert Ages.of(own, "last") == Ages(allowed_s=9.0, denied_s=2.0, last_s=7.0, on_failure=OnFailure.LAST)


def test_a_yes_is_believed_for_a_minute_and_a_no_for_five_seconds() -> None:
    yes, no = entry_of(YES), entry_of(NO)
    assert answers.standing(yes, 1059.9) is Standing.FRESH
    assert answers.standing(yes, 1060.0) is Standing.ABSENT
    assert answers.standing(no, 1004.9) is Standing.FRESH
    assert answers.standing(no, 1005.0) is Standing.ABSENT
    assert answers.standing(Entry("x"), 0.0) is Standing.ABSENT


def test_it_is_asked_for_anew_at_four_fifths_of_its_age() -> None:
    yes, no = entry_of(YES), entry_of(NO)
    assert (yes.due_s, no.due_s) == (1048.0, 1004.0)
    answers.deny(yes, AGES)
    assert yes.due_s == 1004.0, "denied by what was used here: as soon as one that the vendor denies"
    assert entry_of(replace(YES, until_s=WALL_S + 10)).due_s == 1008.0


@pytest.mark.parametrize("answer", [YES, NO])
def test_an_answer_ends_with_its_period(answer: Answer) -> None:
    ending = replace(answer, until_s=WALL_S + 3)
    entry = entry_of(ending)
    assert answers.standing(entry, 1002.9) is Standing.FRESH
    assert answers.standing(entry, 1003.0) is Standing.ABSENT
    for word in OnFailure:
        ages = Ages(on_failure=word)
        assert decide(entry, 1003.0, ages=ages).freshness is Freshness.NONE, "nor is it a last answer"


def test_an_answer_whose_period_is_over_is_asked_for_again_with_a_pause() -> None:
    entry = entry_of(replace(NO, until_s=WALL_S - 9))
    assert answers.standing(entry, 1000.9) is Standing.FRESH
    assert answers.standing(entry, 1001.0) is Standing.ABSENT
    assert answers.own_time_s(entry, STAND, 1000.0) == 1000.8


def test_what_was_used_since_is_taken_off() -> None:
    entry = entry_of(YES)
    entry.since.add(4, 1001.0)
    entry.reserved += 3
    found = decide(entry, 1002.0)
    assert (found.allowed, found.remaining, found.unit, found.age_s) == (True, 3, "calls", 2.0)
    entry.reserved += 3
    found = decide(entry, 1003.0)
    assert (found.allowed, found.remaining, found.reason, found.limit) == (False, 0, "used_up_since", "stand")
    take(entry, YES, now_s=1010.0)
    assert decide(entry, 1010.0).remaining == 4, "settled before: in the new answer; reserved: not yet"


def test_of_what_is_left_the_last_call_gets_all() -> None:
    entry = entry_of(YES)
    assert answers.reservation(entry, STAND, ACME, {"calls": 4, "total_tokens": 900}, WALL_S) == 4
    entry.reserved = 4
    assert answers.reservation(entry, STAND, ACME, {"calls": 99}, WALL_S) == 6
    entry.reserved = 10
    assert answers.reservation(entry, STAND, ACME, {"calls": 1}, WALL_S) == 0
    assert answers.reservation(Entry("x"), STAND, ACME, {"calls": 7}, WALL_S) == 7, "nobody knows what is left"
    assert answers.reservation(entry, STAND, ACME, {"calls": -5}, WALL_S) == 0
    assert answers.reservation(entry, Stand(unit=None), ACME, {"calls": 5}, WALL_S) == 0


def test_an_answer_in_another_unit_is_not_counted_down() -> None:
    entry = entry_of(replace(YES, unit="credits"))
    entry.since.add(500, 1001.0)
    assert decide(entry, 1002.0).allowed
    assert decide(entry, 1002.0).remaining == 10


@pytest.mark.parametrize(
    ("answer", "lag_s", "counted_s"),
    [
        (YES, 0.0, 999.9), (YES, 300.0, 699.9), (replace(YES, at_s=WALL_S - 60), 300.0, 940.0),
        (replace(YES, at_s=WALL_S + 500), 0.0, 999.9),
    ],
)  # fmt: skip
def test_since_is_the_moment_up_to_which_the_vendor_had_counted(answer: Answer, lag_s: float, counted_s: float) -> None:
    entry = Entry("acme")
    entry.since.add(1, counted_s - DELIVERY_S - 0.01)
    entry.since.add(2, counted_s - DELIVERY_S + 1.01)
    take(entry, answer, source=Stand(lag_s=lag_s), now_s=1000.0)
    assert entry.since.total == 2


def test_what_was_used_before_the_period_began_is_the_old_periods() -> None:
    entry = entry_of(replace(YES, until_s=WALL_S + 10))
    entry.since.add(7, 1009.0)
    entry.since.add(2, 1010.5)
    take(entry, replace(YES, until_s=WALL_S + 99), source=Stand(lag_s=60.0), now_s=1012.0)
    assert decide(entry, 1012.0).remaining == 8


@pytest.mark.parametrize(
    ("on_failure", "at_s", "allowed", "freshness"),
    [
        ("open", 1100.0, True, "none"), ("closed", 1100.0, False, "none"), ("last", 1100.0, False, "last"),
        ("last", 4601.0, True, "none"), ("open", 1004.0, False, "fresh"), ("closed", 1004.0, False, "fresh"),
    ],
)  # fmt: skip
def test_without_an_answer_the_operators_word_holds(
    on_failure: str, at_s: float, allowed: bool, freshness: str
) -> None:
    ages = Ages(on_failure=OnFailure(on_failure))
    entry = entry_of(NO)
    answers.miss(entry, NoAnswer("http_500"), 1003.0)
    found = decide(entry, at_s, ages=ages)
    assert (found.allowed, found.freshness) == (allowed, freshness)
    assert found.reason == ("http_500" if freshness == "none" else "quota_used_up")
    never = Entry("y")
    answers.miss(never, NoAnswer("timeout"), 1003.0)
    assert decide(never, at_s, ages=ages).allowed is (on_failure != "closed"), "nothing was ever said: `last` is `open`"


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (NO, None),
        (replace(NO, message="Ask finance."), "Ask finance."),
        (replace(NO, reason="no_subscription"), "No subscription allows this call."),
        (replace(NO, reason="balance_used_up"), "The prepaid balance is used up."),
    ],
)
def test_a_denied_client_is_told_why(answer: Answer, sentence: str | None) -> None:
    assert answers.told(decide(entry_of(answer), 1001.0)) == Told("monthly", "quota", None, sentence)


def test_nobody_is_told_that_a_quota_is_used_up_because_a_vendor_does_not_answer() -> None:
    entry = Entry("acme")
    answers.miss(entry, NoAnswer("timeout"), 1000.0)
    found = answers.told(decide(entry, 1001.0, ages=Ages(on_failure=OnFailure.CLOSED)))
    assert (found.limit, found.kind, found.retry_after_s) == ("stand", "rate", 5.0)
    assert found.message == "Whether this call may be made cannot be looked up just now."


def test_a_last_answer_runs_down_too() -> None:
    entry = entry_of(YES)
    answers.miss(entry, NoAnswer("timeout"), 1050.0)
    entry.since.add(10, 1070.0)
    found = decide(entry, 1100.0, ages=Ages(on_failure=OnFailure.LAST))
    assert (found.allowed, found.freshness, found.remaining) == (False, "last", 0)


def test_after_failures_it_is_asked_ever_more_seldom() -> None:
    entry, pauses = Entry("acme"), []
    for _ in range(6):
        answers.miss(entry, NoAnswer("timeout"), 1000.0)
        assert answers.standing(entry, 1000.0) is Standing.FAILED
        pauses.append(answers.may_ask_s(entry) - 1000.0)
    assert pauses == [5.0, 10.0, 20.0, 40.0, 60.0, 60.0]
    take(entry, YES, now_s=1060.0)
    assert answers.standing(entry, 1061.0) is Standing.FRESH
    assert answers.may_ask_s(entry) < 1061.0


def test_who_is_denied_is_asked_for_without_a_call() -> None:
    assert answers.own_time_s(entry_of(YES), STAND, 1000.0) is None
    entry, at_s, pauses = entry_of(NO), 1000.0, []
    for _ in range(6):
        next_s = answers.own_time_s(entry, STAND, at_s)
        assert next_s is not None
        pauses.append(round(next_s - at_s, 1))
        at_s = next_s
        take(entry, NO, now_s=at_s)
    assert pauses == [4.0, 8.0, 16.0, 32.0, 48.0, 48.0], "ever more seldom while it does not call"
    entry.used_s = at_s + 1
    take(entry, NO, now_s=at_s + 2)
    assert entry.pause_s == AGES.denied_s, "a call makes it often again"
    assert answers.own_time_s(entry, STAND, at_s + 902) is None, "after a quarter of an hour nobody waits for it"


def test_who_is_denied_until_a_period_ends_is_asked_for_then() -> None:
    entry = entry_of(replace(NO, until_s=WALL_S + 2))
    assert answers.own_time_s(entry, STAND, 1000.0) == 1002.0


def test_a_list_is_asked_for_by_the_clock() -> None:
    poll = Stand(polled_s=60.0)
    entry = entry_of(YES, source=poll)
    assert answers.own_time_s(entry, poll, 1000.0) == 1060.0
    assert answers.standing(entry, 1119.9) is Standing.FRESH, "two polls may fail before it is too old"
    answers.miss(entry, NoAnswer("timeout"), 1060.0)
    assert answers.own_time_s(entry, poll, 1060.0) == 1065.0


amounts = st.lists(st.tuples(st.integers(0, 50), st.floats(0, 300, width=32)), max_size=200)


@given(amounts, st.floats(0, 300, width=32))
def test_a_tally_never_forgets_what_is_younger(added: list[tuple[int, float]], until_s: float) -> None:
    tally = Tally()
    for amount, at_s in sorted(added, key=lambda pair: pair[1]):
        tally.add(amount, at_s)
    everything = sum(amount for amount, _ in added)
    assert tally.total == everything
    tally.forget(until_s)
    assert sum(amount for amount, at_s in added if at_s > until_s) <= tally.total <= everything
    tally.forget(301.0)
    assert tally.total == 0


def test_a_tally_stays_small() -> None:
    tally = Tally()
    for second in range(100_000):
        tally.add(1, float(second * 2))
    assert tally.total == 100_000
    assert len(tally._buckets) == len(tally._amounts) == BUCKETS_MAX
    tally.forget(199_998.0 - 20.0)
    assert tally.total == 10


steps = st.lists(
    st.tuples(
        st.sampled_from(["call", "call", "call", "pass", "ask"]),
        st.integers(1, 30),  # the estimate
        st.sampled_from([0.0, 0.5, 1.0, 1.0]),  # how much of it the call used
        st.sampled_from([0.0, 1.0, 6.0, 20.0]),  # how long it took, or how much time passes
    ),
    min_size=10,
    max_size=80,
)


@given(steps, st.integers(0, 60), st.sampled_from([0.0, DELIVERY_S]), st.sampled_from([0.0, 30.0, 90.0]))
def test_a_balance_is_overshot_by_the_calls_that_took_the_rest_alone_whenever_it_is_asked_for(
    taken: list[tuple[str, int, float, float]], balance: int, delivery_s: float, lag_s: float
) -> None:
    """A vendor that counts what was delivered, with a delay up to what its source says, and a gate that asks it now and
    then: by what it answered and what was used here, no more is let through than there is, and what one that took the
    rest uses beyond it."""
    source, now_s = Stand(lag_s=90.0), 1000.0
    entry = Entry("acme")
    used: list[tuple[float, int]] = []  # when a call ended, and what it used
    running: list[tuple[float, int, int]] = []  # when it will, what it holds, what it will have used
    beyond = 0  # what calls may use that took the rest, beside that

    def end(until_s: float) -> None:
        for call in sorted(running):
            if call[0] <= until_s:
                running.remove(call)
                entry.reserved -= call[1]
                entry.since.add(call[2], call[0])
                used.append((call[0], call[2]))

    for what, estimate, share, seconds in [("ask", 1, 0.0, 0.0), *taken]:
        end(now_s)
        if what == "ask":
            known = sum(amount for at_s, amount in used if at_s <= now_s - delivery_s - lag_s)
            answer = Answer(allowed=known < balance, remaining=balance - known, unit="calls")
            answers.take(entry, source, answer, AGES, asked_s=now_s, now_s=now_s, wall_s=WALL_S + now_s)
        elif what == "pass":
            now_s += seconds
        elif answers.by_answer(entry, source, ACME, Freshness.FRESH, now_s=now_s, wall_s=WALL_S + now_s).allowed:
            held = answers.reservation(entry, source, ACME, {"calls": estimate}, WALL_S)
            entry.reserved += held
            beyond += estimate - held
            running.append((now_s + seconds, held, round(estimate * share)))
    end(now_s + 1000.0)
    assert sum(amount for _, amount in used) <= balance + beyond
