"""What follows from a verdict: pure decisions on waiting, resending, splitting, parking and slowing down.

What must always hold: a request that may have been taken is offered again only while the backend still
recognises it (or the operator said that doubles are acceptable); otherwise it is parked, never dropped. A
refusal parks only what was refused for itself. Time and chance come in as arguments, so that every rule
has a table test. Storing the decision and carrying it out are left to `state` and `lane`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Final

from sidecar.verdict import (
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

# Reasons of ours for parking; the others are the backend's own words.
UNKNOWN: Final = "unknown"  # may have been taken, and the backend would not recognise a repeat
WINDOW_ENDED: Final = "window_ended"  # may have been taken, and too long ago to be recognised
TOO_OLD: Final = "too_old"  # older than the backend takes
SALVAGED: Final = "salvaged"  # whether it was delivered before is not known any more
REMOVED: Final = "removed"  # its backend is no longer configured
PARTLY_TAKEN: Final = "partly_taken"  # some events of the request were taken, and a repeat would double them
UNREADABLE: Final = "unreadable"  # the stored line is no record
ENCODE_FAILED: Final = "encode_failed"  # the backend's encoder raised, or forgot the record
SUSPECT: Final = "suspect"  # blocked: everything is refused for one reason, which is more likely ours
MISSING: Final = "missing"  # skipped: recorded once, and no longer readable in a damaged spool
BEFORE: Final = "before"  # skipped: made before the backend was first configured

_SERVER_ERROR: Final = re.compile(r"(?<![0-9])5[0-9]{2}(?![0-9])")
_TOO_LARGE: Final = frozenset({"too_large", "http_413", "413"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Every number of delivery, with where it is from."""

    backoff_base_s: float = 1.0  # mean first wait 0.5 s: a restart of a backend is over within a few of them
    backoff_cap_s: float = 3600.0  # durability.md, section 6
    retry_after_cap_s: float = 21_600.0  # a wait of more than six hours is taken for a mistake
    window_margin_s: float = 3600.0  # windows end an hour early: clocks of two houses, and work under way
    window_warning_s: float = 21_600.0  # durability.md, section 6: six hours before
    clock_step_s: float = 60.0  # what the wall clock may differ from the monotonic one before it has stepped
    down_after: int = 5  # requests failed in a row with nothing taken: the backend is down, one probe at a time
    down_cap_s: float = 30.0  # how late a recovery may be noticed; P8 wants an hour drained in ten minutes
    blocked_base_s: float = 30.0  # an operator has to act; asking more often changes nothing
    blocked_cap_s: float = 600.0
    suspect_after: int = 20  # durability.md, section 6
    window_requests: int = 64  # sealed requests that wait for a free slot or are under way; durability.md, section 2
    retry_records: int = 10_000  # durability.md, section 2: the set that waits for another attempt
    retry_bytes: int = 64 << 20
    encode_records: int = 100  # one slice of the event loop: about 1 ms
    parse_records: int = 40  # one slice of reading lines: about 0.5 ms
    read_bytes: int = 1 << 20
    linger_s: float = 0.1  # between two looks into a spool that was read to its end: batches fill up meanwhile
    gather_s: float = 0.01  # the same where one event is a request: a look for each commit would cost the proxy
    send_limit_s: float = 600.0  # a backend has its own time limits; this one frees the slot when they fail
    sweep_s: float = 60.0  # how often windows, ages and the clock are looked at while nothing happens
    history_entries: int = 20  # attempts remembered with a request: the first, and the last of them


@dataclass(frozen=True, slots=True)
class Now:
    """Both clocks, read at one moment."""

    wall_s: float
    mono_s: float


@dataclass(frozen=True, slots=True)
class Tries:
    """What has been tried. `risk_*`: start of the first attempt that may have been taken."""

    attempts: int = 0
    risk_wall_s: float | None = None
    risk_mono_s: float | None = None  # None with a wall time: that was another run
    expired: bool = False  # the clock stepped: how much of the window is left is not known, so nothing is
    forced: bool = False  # redriven by an operator who accepts doubles: the next attempt is free

    @property
    def risky(self) -> bool:
        return self.expired or self.risk_wall_s is not None


# --- the de-duplication window ---------------------------------------------------------------------------


def window_left_s(tries: Tries, abilities: Abilities, now: Now, limits: Limits) -> float | None:
    """How long a repeat is still recognised; None: without end. Runs on the larger of both clocks."""
    if not tries.risky or abilities.resend_unknown:
        return None
    if abilities.dedup is Dedup.NONE:
        return None  # an answered 5xx is tried again; a lost answer never gets here
    if abilities.dedup_window_s is None:
        return None
    if tries.expired or tries.risk_wall_s is None:
        return 0.0
    gone_s = now.wall_s - tries.risk_wall_s
    if gone_s < -limits.clock_step_s:
        return 0.0
    if tries.risk_mono_s is not None:
        gone_s = max(gone_s, now.mono_s - tries.risk_mono_s)
    return max(abilities.dedup_window_s - limits.window_margin_s - gone_s, 0.0)


def may_resend(tries: Tries, abilities: Abilities, now: Now, limits: Limits) -> bool:
    left_s = window_left_s(tries, abilities, now, limits)
    return tries.forced or left_s is None or left_s > 0


@dataclass(frozen=True, slots=True)
class ClockWatch:
    """Finds a step of the wall clock by comparing it with the monotonic one, look by look."""

    last: Now

    def look(self, now: Now, limits: Limits) -> tuple[ClockWatch, bool]:
        drift_s = (now.wall_s - self.last.wall_s) - (now.mono_s - self.last.mono_s)
        return ClockWatch(now), abs(drift_s) > limits.clock_step_s


def backoff_s(attempts: int, roll: float, limits: Limits, after_s: float | None = None) -> float:
    """Exponential with full jitter (`roll` in 0..1), never before the backend's own `Retry-After`."""
    top_s = min(limits.backoff_cap_s, limits.backoff_base_s * 2.0 ** min(max(attempts - 1, 0), 40))
    wait_s = max(roll * top_s, 0.05 * limits.backoff_base_s)
    return wait_s if after_s is None else max(wait_s, min(after_s, limits.retry_after_cap_s))


# --- one request's verdicts ------------------------------------------------------------------------------


class Fate(StrEnum):
    """What has become of one wire event inside a request. The letters are what is stored."""

    DELIVERED = "d"
    DUPLICATE = "u"
    PARKED = "p"
    MOVED = "m"  # on to a request of its own: a part of a split, or a redrive
    OPEN = "o"  # never stored: the request stays as it is


@dataclass(frozen=True, slots=True)
class Parking:
    reason: str
    maybe_taken: bool = False  # a redrive may bill it twice: only with --resend-unknown


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What is to be done after an attempt.

    `open`: offer it again, as it is, after `wait_s`. Otherwise it is settled: every event has a
    final fate, and those that are `MOVED` go on in `parts` (indices of events), each a request of
    its own.
    """

    open: bool
    tries: Tries
    fates: tuple[Fate, ...] = ()
    parked: Mapping[int, Parking] = field(default_factory=dict)
    parts: tuple[tuple[int, ...], ...] = ()
    wait_s: float = 0.0
    held: bool = False  # the wait is the backend's own: not to be shortened


def may_have_been_taken(verdict: Verdict) -> bool:
    """An unknown outcome, and a server error: the work may have been done before it."""
    if isinstance(verdict, Unknown):
        return True
    return isinstance(verdict, Retry) and _SERVER_ERROR.search(verdict.reason) is not None


def park_all(tries: Tries, events: int, parking: Parking) -> Decision:
    """Settle a request without another attempt."""
    return Decision(
        open=False, tries=tries, fates=(Fate.PARKED,) * events, parked=dict.fromkeys(range(events), parking)
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One attempt and all that its judgement needs."""

    verdicts: Sequence[Verdict]
    records: Sequence[int]  # for each event the number of its record
    started: Now
    ended: Now
    roll: float  # chance, 0..1
    stepped: bool = False  # the wall clock was set while it was under way


def judge(attempt: Attempt, before: Tries, abilities: Abilities, limits: Limits) -> Decision:
    """The one place where a backend's answer becomes an action."""
    if all(type(verdict) is Delivered for verdict in attempt.verdicts):
        return Decision(open=False, tries=before, fates=(Fate.DELIVERED,) * len(attempt.verdicts))
    tries = _tried(attempt, before)
    whole = _whole_refusal(attempt.verdicts)
    if whole is not None and len(set(attempt.records)) > 1:
        return _halve(attempt, whole, before, tries, abilities)
    fates, parked = _fates(attempt, before, tries, abilities, limits)
    after_s = _after_s(attempt.verdicts)
    wait_s = backoff_s(tries.attempts, attempt.roll, limits, after_s)
    left = [i for i, fate in enumerate(fates) if fate is Fate.OPEN]
    if len(left) == len(fates):
        return Decision(open=True, tries=tries, wait_s=wait_s, held=after_s is not None)
    if not left:
        return Decision(open=False, tries=tries, fates=tuple(fates), parked=parked)
    return _part(attempt, fates, parked, left, tries, abilities, wait_s)


def _tried(attempt: Attempt, before: Tries) -> Tries:
    tries = replace(before, forced=False) if before.forced else before
    if tries.risk_wall_s is None and any(may_have_been_taken(v) for v in attempt.verdicts):
        tries = replace(
            tries,
            risk_wall_s=attempt.started.wall_s,
            risk_mono_s=attempt.started.mono_s,
            expired=tries.expired or attempt.stepped,
        )
    return tries


def _whole_refusal(verdicts: Sequence[Verdict]) -> str | None:
    """The reason, if every event was refused for the same one: most likely the request as a whole was."""
    first = verdicts[0]
    if isinstance(first, Refused) and all(v == first for v in verdicts):
        return first.reason
    return None


def _halve(attempt: Attempt, reason: str, before: Tries, tries: Tries, abilities: Abilities) -> Decision:
    """Cut a refused request between two records, where a repeat of its events is harmless; else park it all.

    Harmless: events have ids of their own; or nothing was taken, which a refusal says unless a leading
    part may have been, or an earlier attempt may have been taken and the key would not tell.
    """
    sure = not before.risky or abilities.dedup is Dedup.REQUEST_KEY
    whole = abilities.atomicity is not Atomicity.PREFIX or reason in _TOO_LARGE
    count = len(attempt.verdicts)
    if abilities.dedup is Dedup.EVENT_ID or (sure and whole):
        return Decision(
            open=False,
            tries=tries,
            fates=(Fate.MOVED,) * count,
            parts=_halves(attempt.records),
        )
    return park_all(tries, count, Parking(reason, maybe_taken=True))


def _halves(records: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    numbers = list(dict.fromkeys(records))
    first = set(numbers[: (len(numbers) + 1) // 2])
    return (
        tuple(i for i, n in enumerate(records) if n in first),
        tuple(i for i, n in enumerate(records) if n not in first),
    )


def _fates(
    attempt: Attempt, before: Tries, tries: Tries, abilities: Abilities, limits: Limits
) -> tuple[list[Fate], dict[int, Parking]]:
    resend = may_resend(tries, abilities, attempt.ended, limits)
    fates: list[Fate] = []
    parked: dict[int, Parking] = {}
    for index, verdict in enumerate(attempt.verdicts):
        match verdict:
            case Delivered():
                fates.append(Fate.DELIVERED)
            case Duplicate():
                fates.append(Fate.DUPLICATE)
            case Refused(reason):
                unsure = before.risky and abilities.dedup is Dedup.NONE
                parked[index] = Parking(reason, maybe_taken=unsure)
                fates.append(Fate.PARKED)
            case Unknown() if abilities.dedup is Dedup.NONE and not abilities.resend_unknown:
                parked[index] = Parking(UNKNOWN, maybe_taken=True)
                fates.append(Fate.PARKED)
            case _ if not resend:
                parked[index] = Parking(WINDOW_ENDED, maybe_taken=True)
                fates.append(Fate.PARKED)
            case _:
                fates.append(Fate.OPEN)
    return fates, parked


def _part(
    attempt: Attempt,
    fates: list[Fate],
    parked: dict[int, Parking],
    left: list[int],
    tries: Tries,
    abilities: Abilities,
    wait_s: float,
) -> Decision:
    """Some events are settled and some are not: let the open ones go on in a request of their own."""
    verdicts, records = attempt.verdicts, attempt.records
    settled = {records[i] for i, fate in enumerate(fates) if fate in (Fate.DELIVERED, Fate.DUPLICATE)}
    definite = not tries.risky and not any(may_have_been_taken(verdicts[i]) for i in left)
    if abilities.dedup is Dedup.REQUEST_KEY and not definite:
        return Decision(open=True, tries=tries, wait_s=wait_s)  # only the same request is recognised
    going = left
    if abilities.dedup is not Dedup.EVENT_ID:
        # A record is encoded whole, so a part would repeat its sibling events that were taken.
        going = [i for i in left if records[i] not in settled]
    for i in left:
        if i in going:
            fates[i] = Fate.MOVED
        else:
            fates[i] = Fate.PARKED
            parked[i] = Parking(PARTLY_TAKEN, maybe_taken=True)
    return Decision(
        open=False,
        tries=tries,
        fates=tuple(fates),
        parked=parked,
        parts=(tuple(going),) if going else (),
        wait_s=wait_s,
    )


def _after_s(verdicts: Sequence[Verdict]) -> float | None:
    waits = [v.after_s for v in verdicts if isinstance(v, Retry) and v.after_s is not None]
    return max(waits, default=None)


# --- one backend's pace ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """How a backend has been answering, and how many requests it may be offered.

    Up: as many as it has slots. Down (nothing taken for a while) or blocked (an operator must act): one
    at a time, after a wait, old and fresh ones in turn, so that no stuck record can hide a recovery.
    """

    failures: int = 0  # requests in a row that came to nothing
    refusals: int = 0  # requests in a row refused whole, for `refusal`
    refusal: str = ""
    blocked: str | None = None
    probes: int = 0  # in a row, while down or blocked
    not_before_s: float = 0.0  # monotonic: the next probe

    @property
    def slow(self) -> bool:
        return self.blocked is not None or self.not_before_s > 0

    def allowed(self, now: Now, under_way: int, slots: int) -> int:
        """How many more requests may start."""
        if not self.slow:
            return max(slots - under_way, 0)
        return 1 if under_way == 0 and now.mono_s >= self.not_before_s else 0


def suspect(pace: Pace, verdicts: Sequence[Verdict], limits: Limits) -> Sequence[Verdict]:
    """Turn one more refusal in a long row of the same into a block: a wrong setting must not park a million."""
    reason = _whole_refusal(verdicts)
    if reason is not None and reason == pace.refusal and pace.refusals + 1 >= limits.suspect_after:
        return [Blocked(SUSPECT)] * len(verdicts)
    return verdicts


def next_pace(pace: Pace, verdicts: Sequence[Verdict], now: Now, roll: float, limits: Limits) -> Pace:
    """The pace after one request's verdicts (those that `suspect` left)."""
    if any(isinstance(v, Delivered | Duplicate) for v in verdicts):
        return Pace()
    blocked = next((v.reason for v in verdicts if isinstance(v, Blocked)), None)
    if pace.slow and now.mono_s < pace.not_before_s:
        return pace  # a late answer from before the pace was slowed: no probe
    if blocked is not None:
        top_s = min(limits.blocked_cap_s, limits.blocked_base_s * 2.0 ** min(pace.probes, 20))
        return replace(
            pace,
            blocked=blocked,
            probes=pace.probes + 1,
            not_before_s=now.mono_s + top_s * (0.5 + roll / 2),
        )
    refusal = _whole_refusal(verdicts)
    if refusal is not None:
        # An answer that reads what was sent: whatever blocked or broke the backend before is over.
        refusals = pace.refusals + 1 if refusal == pace.refusal else 1
        return Pace(refusals=refusals, refusal=refusal)
    if any(isinstance(v, Refused) for v in verdicts):
        return Pace()
    failures = pace.failures + 1
    if pace.blocked is None and failures < limits.down_after:
        return replace(pace, failures=failures)
    cap_s = limits.blocked_cap_s if pace.blocked is not None else limits.down_cap_s
    wait_s = min(cap_s, limits.backoff_base_s * 2.0 ** min(pace.probes, 20)) * (0.5 + roll / 2)
    after_s = min(_after_s(verdicts) or 0.0, limits.retry_after_cap_s)
    return replace(pace, failures=failures, probes=pace.probes + 1, not_before_s=now.mono_s + max(wait_s, after_s))


def remember(history: tuple[str, ...], entry: str, limits: Limits) -> tuple[str, ...]:
    """A request's attempts, in words: the first stays, and the latest."""
    grown = (*history, entry)
    if len(grown) <= limits.history_entries:
        return grown
    return (grown[0], *grown[-(limits.history_entries - 1) :])


# --- one record among its events --------------------------------------------------------------------------


class Term(StrEnum):
    """The place of a record in the balance. `open`: sealed and not settled, a part of `pending`."""

    PARKED = "parked"
    OPEN = "open"
    DELIVERED = "delivered"
    DUPLICATE = "duplicate"
    SKIPPED = "skipped"


def worst(*, parked: int, pending: int, delivered: int, duplicate: int) -> Term:
    """A record counts once, by the worst of its events."""
    if parked:
        return Term.PARKED
    if pending:
        return Term.OPEN
    if delivered:
        return Term.DELIVERED
    if duplicate:
        return Term.DUPLICATE
    raise ValueError("a record without any event has no place in the balance")
