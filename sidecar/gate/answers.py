"""How long a vendor's answer is believed, what is taken off it meanwhile, and what holds where there is none. Pure.

An answer is old when it comes: the vendor counts with a delay, and each call after it uses something up. So what was
settled here since, and what is reserved for calls that are under way, is taken off:

left now = left in the answer − settled since − reserved

`Since` is the moment up to when the vendor had counted, as it says itself, else the question less the source's lag;
and less the time that our own delivery takes. What lies in between is taken off twice at worst: near its end a limit
may deny a call early, never late. A last call is let through while anything is left, and its reservation is cut to
that: none follows before something is given back, so that a limit is overshot by less than one call each time that the
rest was taken.

An answer says nothing of what is after its period's end, so it ends there, whatever its age: a breach that was read
yesterday must not go on denying in the new month. Times are seconds of a clock that only goes forward, except where
they are called `wall`, which are Unix seconds.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final, NamedTuple

from sidecar.gate.sources.base import Answer, Caller, Known, NoAnswer, Source
from sidecar.settings import AskedSettings

AHEAD: Final = 0.8  # of an answer's age: then it is asked for anew, while the old one still holds
BELIEVED_S_MIN: Final = 1.0  # of any answer, also one whose period is just over: no vendor is asked without a pause
FAILURE_S: Final = 5.0  # after a question without an answer; doubled with each further one,
FAILURE_S_MAX: Final = 60.0  # up to this
DENIED_S_MAX: Final = 60.0  # how far apart a denied subscriber's questions grow while it does not call
WATCHED_S: Final = 900.0  # and for how long it is asked for at all without a call
DELIVERY_S: Final = 5.0  # until what was settled here has been delivered and taken in there
NOT_ASKED: Final = "not_asked"  # nobody was, or the answer is still to come
BUCKET_S: Final = 1.0  # of what was settled since: amounts within a second are one
BUCKETS_MAX: Final = 64  # beyond it the oldest two become one, and count as long as the younger


class OnFailure(StrEnum):
    """What holds where nobody answers, as `SIDECAR_GATE_ON_FAILURE` has it."""

    OPEN = "open"
    CLOSED = "closed"
    LAST = "last"  # as was last answered, then as `open`


class Freshness(StrEnum):
    """On what a decision rests."""

    FRESH = "fresh"  # an answer that is believed
    LAST = "last"  # an old one, because nobody answers
    NONE = "none"  # none: as `SIDECAR_GATE_ON_FAILURE` says


class Standing(StrEnum):
    """What is known of a subject."""

    FRESH = "fresh"
    ABSENT = "absent"  # it has to be asked for
    FAILED = "failed"  # it was asked for in vain


class Decision(NamedTuple):
    """Whether a call may be made, and why. Made for each call, so a tuple."""

    allowed: bool
    source: str
    freshness: Freshness
    reason: str = ""  # why not, or why nobody answered, in a fixed word
    limit: str | None = None  # what stops it, by the vendor's name for it, else the source's
    age_s: float | None = None  # of the answer
    remaining: int | None = None  # in `unit`, after what was taken off
    unit: str | None = None
    message: str | None = None
    shadow: str | None = None  # a limit that would stop it, were it in force


NOBODY_ASKED: Final = Decision(allowed=True, source="", freshness=Freshness.FRESH)


class Told(NamedTuple):
    """What a denied client is told of a decision; the arguments of `denials.Denials`."""

    limit: str
    kind: str  # `quota`, or `rate` for what a short wait may mend
    retry_after_s: float | None
    message: str | None  # None: the sentence of the kind


def told(decision: Decision) -> Told:
    """Of a decision that denies. Nobody is told that a quota is used up because a vendor does not answer."""
    limit = decision.limit or decision.source
    if decision.freshness is Freshness.NONE:
        return Told(limit, "rate", FAILURE_S, "Whether this call may be made cannot be looked up just now.")
    return Told(limit, "quota", None, decision.message or _SENTENCES.get(decision.reason))


_SENTENCES: Final = {
    "no_subscription": "No subscription allows this call.",
    "subscription_ended": "The subscription for this call has ended.",
    "no_customer": "No account allows this call.",
    "no_wallet": "No prepaid balance allows this call.",
    "no_entitlement": "No plan allows this call.",
    "balance_used_up": "The prepaid balance is used up.",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Ages:
    """How long answers are believed, and what holds without one."""

    allowed_s: float = 60.0
    denied_s: float = 5.0
    last_s: float = 3600.0
    on_failure: OnFailure = OnFailure.OPEN

    @classmethod
    def of(cls, settings: AskedSettings, on_failure: str = OnFailure.OPEN) -> Ages:
        """As set."""
        return cls(
            allowed_s=settings.gate_age,
            denied_s=settings.gate_denied_age,
            last_s=settings.gate_last_age,
            on_failure=OnFailure(on_failure),
        )


@dataclass(slots=True)
class Tally:
    """What was settled since a moment; what is older is forgotten."""

    total: int = 0
    _buckets: deque[list[float]] = field(default_factory=deque)  # begin and end
    _amounts: deque[int] = field(default_factory=deque)

    def add(self, amount: int, now_s: float) -> None:
        """So much was settled now."""
        if not amount:
            return
        self.total += amount
        if self._buckets and now_s - self._buckets[-1][0] < BUCKET_S:
            self._buckets[-1][1] = max(self._buckets[-1][1], now_s)
            self._amounts[-1] += amount
            return
        self._buckets.append([now_s, now_s])
        self._amounts.append(amount)
        if len(self._buckets) > BUCKETS_MAX:
            begin, oldest = self._buckets.popleft()[0], self._amounts.popleft()
            self._buckets[0][0] = begin
            self._amounts[0] += oldest

    def forget(self, until_s: float) -> None:
        """What was settled up to here is in the vendor's answer. A bucket that reaches beyond stays whole."""
        while self._buckets and self._buckets[0][1] <= until_s:
            self._buckets.popleft()
            self.total -= self._amounts.popleft()


@dataclass(slots=True)
class Entry:
    """What is known of one subject at one source."""

    subject: str
    answer: Known | None = None
    denied: bool = False  # by the vendor, or by what was taken off its answer
    answered_s: float = 0.0
    believed_s: float = 0.0  # until then
    due_s: float = 0.0  # from then on a call has it asked for anew, while it holds
    until_s: float | None = None  # the end of the answer's period
    failures: int = 0
    reason: str = ""  # of the last failure
    asked_s: float = float("-inf")  # no question before this and a pause
    pause_s: float = 0.0  # until a denied subscriber is asked for again
    used_s: float = float("-inf")  # the last call
    reserved: int = 0
    holds: int = 0
    since: Tally = field(default_factory=Tally)


def take(
    entry: Entry, source: Source, answer: Known, ages: Ages, *, asked_s: float, now_s: float, wall_s: float
) -> None:
    """An answer came to the question of `asked_s`."""
    counted_s = asked_s - source.lag_s
    if answer.at_s is not None:
        counted_s = min(now_s - (wall_s - answer.at_s), asked_s)
    counted_s -= DELIVERY_S
    if entry.until_s is not None and entry.until_s <= now_s:
        counted_s = max(counted_s, entry.until_s)  # what was before belongs to the period that is over
    entry.since.forget(counted_s)
    # Whether the vendor denies is one thing for all its callers, but for a list of rules, which is polled.
    denied = isinstance(answer, Answer) and not answer.allowed
    age_s = ages.denied_s if denied else ages.allowed_s if source.polled_s is None else 2 * source.polled_s
    idle = entry.used_s < entry.answered_s
    entry.pause_s = (
        min(entry.pause_s * 2, max(DENIED_S_MAX, ages.denied_s))
        if denied and idle and entry.pause_s
        else (ages.denied_s)
    )
    entry.answer, entry.answered_s, entry.denied = answer, now_s, denied
    entry.until_s = None if answer.until_s is None else now_s + (answer.until_s - wall_s)
    end_s = now_s + age_s if entry.until_s is None else min(now_s + age_s, entry.until_s)
    entry.believed_s = max(end_s, now_s + BELIEVED_S_MIN)
    entry.due_s = now_s + (entry.believed_s - now_s) * AHEAD
    entry.failures, entry.reason, entry.asked_s = 0, "", now_s


def miss(entry: Entry, none: NoAnswer, now_s: float) -> None:
    """Nobody answered."""
    entry.failures += 1
    entry.reason = none.reason
    entry.asked_s = now_s


def standing(entry: Entry, now_s: float) -> Standing:
    if entry.answer is not None and now_s < entry.believed_s:
        return Standing.FRESH
    return Standing.FAILED if entry.failures else Standing.ABSENT


def may_ask_s(entry: Entry) -> float:
    """From when on it may be asked for again: after a failure not before a pause."""
    if not entry.failures:
        return float("-inf") if entry.answer is None else entry.answered_s + BELIEVED_S_MIN * AHEAD
    return entry.asked_s + min(FAILURE_S * 2.0 ** min(entry.failures - 1, 10), FAILURE_S_MAX)


def deny(entry: Entry, ages: Ages) -> None:
    """What was taken off an answer leaves nothing: a vendor that is topped up meanwhile says so when it is asked."""
    entry.denied = True
    entry.due_s = min(entry.due_s, entry.answered_s + ages.denied_s * AHEAD)


def own_time_s(entry: Entry, source: Source, now_s: float) -> float | None:
    """When it is asked for without a call: a list that is polled, and who is denied, since the denied stop calling."""
    if source.polled_s is not None:
        return (
            max(entry.answered_s + source.polled_s, may_ask_s(entry)) if entry.answer is not None else may_ask_s(entry)
        )
    if not entry.denied or now_s - entry.used_s > WATCHED_S:
        return None
    if entry.failures:
        return may_ask_s(entry)
    next_s = entry.answered_s + entry.pause_s * AHEAD
    if entry.until_s is not None:
        next_s = min(next_s, entry.until_s)
    return max(next_s, may_ask_s(entry))


def left_of(entry: Entry, answer: Answer, unit: str | None) -> int | None:
    """What is left now, in the source's unit; None where nothing is counted down."""
    if answer.remaining is None or unit is None or answer.unit != unit:
        return None
    return answer.remaining - entry.since.total - entry.reserved


def decide(entry: Entry, source: Source, caller: Caller, ages: Ages, *, now_s: float, wall_s: float) -> Decision:
    """By the answer where it is believed; else as the operator has it for when nobody answers."""
    if standing(entry, now_s) is Standing.FRESH:
        return by_answer(entry, source, caller, Freshness.FRESH, now_s=now_s, wall_s=wall_s)
    is_over = entry.until_s is not None and entry.until_s <= now_s
    is_kept = entry.answer is not None and now_s - entry.answered_s <= ages.last_s and not is_over
    if ages.on_failure is OnFailure.LAST and is_kept:
        return by_answer(entry, source, caller, Freshness.LAST, now_s=now_s, wall_s=wall_s)
    return without(source, ages, entry.reason or NOT_ASKED)


def without(source: Source, ages: Ages, reason: str) -> Decision:
    """The decision where there is no answer: `last` without one is `open`."""
    allowed = ages.on_failure is not OnFailure.CLOSED
    return Decision(
        allowed=allowed,
        source=source.name,
        freshness=Freshness.NONE,
        reason=reason,
        limit=None if allowed else source.name,
    )


def reservation(entry: Entry, source: Source, caller: Caller, estimate: Mapping[str, int], wall_s: float) -> int:
    """What a call that is let through holds back: its estimate, and no more than is left."""
    wanted = max(estimate.get(source.unit, 0), 0) if source.unit is not None else 0
    left = None if entry.answer is None else left_of(entry, entry.answer.judge(caller, wall_s), source.unit)
    return wanted if left is None else min(wanted, max(left, 0))


def by_answer(
    entry: Entry, source: Source, caller: Caller, freshness: Freshness, *, now_s: float, wall_s: float
) -> Decision:
    """What the answer says of a call, less what was taken off it."""
    assert entry.answer is not None
    answer = entry.answer.judge(caller, wall_s)
    left = left_of(entry, answer, source.unit)
    used_up = answer.allowed and left is not None and left <= 0
    allowed = answer.allowed and not used_up
    return Decision(
        allowed,
        source.name,
        freshness,
        "used_up_since" if used_up else answer.reason,
        None if allowed else answer.limit or source.name,
        now_s - entry.answered_s,
        answer.remaining if left is None else left,
        answer.unit,
        answer.message,
        answer.shadow,
    )
