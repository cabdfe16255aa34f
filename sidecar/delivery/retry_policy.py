"""What follows from one attempt's verdicts: pure decisions on resending, waiting, splitting and parking.

What must always hold: a request that may have been taken is offered again only while the backend still
recognises it (or the operator said that doubles are acceptable); otherwise it is parked, never dropped. A
refusal parks only what was refused for itself. Time and chance come in as arguments, so that every rule
has a table test. Storing the decision and carrying it out are left to the store and the worker.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from sidecar.delivery.dedup_window import may_resend
from sidecar.delivery.limits import Limits
from sidecar.delivery.types import PARTLY_TAKEN, UNKNOWN, WINDOW_ENDED, Fate, Now, Parking, Tries
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

_SERVER_ERROR: Final = re.compile(r"(?<![0-9])5[0-9]{2}(?![0-9])")
_PAUSE: Final = re.compile(r"(?<![0-9])(429|503)(?![0-9])")
_TOO_LARGE: Final = frozenset({"too_large", "http_413", "413"})


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One attempt and all that its judgement needs."""

    verdicts: Sequence[Verdict]
    records: Sequence[int]  # for each event the number of its record
    started: Now
    ended: Now
    roll: float  # chance, 0..1
    stepped: bool = False  # the wall clock was set while it was under way
    taken_s: float = -math.inf  # monotonic: when the backend last took something


def judge(attempt: Attempt, before: Tries, abilities: Abilities, limits: Limits) -> Decision:
    """The one place where a backend's answer becomes an action."""
    if all(type(verdict) is Delivered for verdict in attempt.verdicts):
        return Decision(open=False, tries=before, fates=(Fate.DELIVERED,) * len(attempt.verdicts))
    tries = _tried(attempt, before, abilities)
    whole = whole_refusal(attempt.verdicts)
    if whole is not None and whole != KEY_MISMATCH and len(set(attempt.records)) > 1:
        return _halve(attempt, whole, before, tries, abilities)
    fates, parked = _fates(attempt, before, tries, abilities, limits)
    after_s = asked_wait_s(attempt.verdicts)
    own_s = backoff_s(tries.attempts, attempt.roll, limits)
    wait_s = backoff_s(tries.attempts, attempt.roll, limits, after_s)
    again = Decision(open=True, tries=tries, wait_s=wait_s, held=wait_s > own_s)
    left = [i for i, fate in enumerate(fates) if fate is Fate.OPEN]
    if len(left) == len(fates):
        if tries.alone >= limits.alone_after and (given := _give_way(attempt, tries, abilities)) is not None:
            return given
        return again
    if not left:
        return Decision(open=False, tries=tries, fates=tuple(fates), parked=parked)
    risky = tries.risky or any(may_have_been_taken(attempt.verdicts[i]) for i in left)
    if risky and abilities.dedup is Dedup.REQUEST_KEY:
        return again  # only the same request is recognised
    return _part(attempt, fates, parked, left, tries, abilities, limits)


def park_all(tries: Tries, events: int, parking: Parking) -> Decision:
    """Settle a request without another attempt."""
    return Decision(
        open=False, tries=tries, fates=(Fate.PARKED,) * events, parked=dict.fromkeys(range(events), parking)
    )


def backoff_s(attempts: int, roll: float, limits: Limits, after_s: float | None = None) -> float:
    """Exponential with full jitter (`roll` in 0..1), never before the backend's own `Retry-After`."""
    top_s = min(limits.backoff_cap_s, limits.backoff_base_s * 2.0 ** min(max(attempts - 1, 0), 40))
    wait_s = max(roll * top_s, 0.05 * limits.backoff_base_s)
    return wait_s if after_s is None else max(wait_s, min(after_s, limits.retry_after_cap_s))


def may_have_been_taken(verdict: Verdict) -> bool:
    """An unknown outcome, and a server error: the work may have been done before it. Also a yes in a foreign form."""
    if isinstance(verdict, Unknown) or (isinstance(verdict, Blocked) and verdict.maybe_taken):
        return True
    return isinstance(verdict, Retry) and _SERVER_ERROR.search(verdict.reason) is not None


def whole_refusal(verdicts: Sequence[Verdict]) -> str | None:
    """The reason, if every event was refused for the same one: most likely the request as a whole was."""
    first = verdicts[0]
    if isinstance(first, Refused) and all(v == first for v in verdicts):
        return first.reason
    return None


def asked_wait_s(verdicts: Sequence[Verdict]) -> float | None:
    """The longest wait that the backend asked for itself."""
    waits = [v.after_s for v in verdicts if isinstance(v, Retry) and v.after_s is not None]
    return max(waits, default=None)


def asked_pause_s(verdicts: Sequence[Verdict], limits: Limits) -> float:
    """How long nothing at all is to be offered: what a 429 or 503 says is meant for the client, not for a request."""
    if Retry not in set(map(type, verdicts)):  # as nearly always, and told without a look at each
        return 0.0
    paused = [v for v in verdicts if isinstance(v, Retry) and _PAUSE.search(v.reason)]
    return min(asked_wait_s(paused) or 0.0, limits.retry_after_cap_s)


def _part_may_be_taken(verdicts: Sequence[Verdict], abilities: Abilities) -> bool:
    """A refusal of several events that may have come after a leading part of them was taken."""
    reason = whole_refusal(verdicts)
    return (
        reason is not None
        and reason not in _TOO_LARGE
        and abilities.atomicity is Atomicity.PREFIX
        and len(verdicts) > 1
    )


def _tried(attempt: Attempt, before: Tries, abilities: Abilities) -> Tries:
    tries = replace(before, forced=False) if before.forced else before
    risky = any(map(may_have_been_taken, attempt.verdicts)) or _part_may_be_taken(attempt.verdicts, abilities)
    if tries.risk_wall_s is None and risky:
        tries = replace(
            tries,
            risk_wall_s=attempt.started.wall_s,
            risk_mono_s=attempt.started.mono_s,
            expired=tries.expired or attempt.stepped,
        )
    if all(map(_may_be_its_fault, attempt.verdicts)):
        alone = tries.alone + (attempt.taken_s > tries.failed_mono_s)
        tries = replace(tries, alone=alone, failed_mono_s=attempt.ended.mono_s)
    return tries


def _may_be_its_fault(verdict: Verdict) -> bool:
    """No answer to what was sent, or one that is no refusal: what is in it may be why. A full backend's is not."""
    if isinstance(verdict, Retry) and _PAUSE.search(verdict.reason):
        return False
    return isinstance(verdict, Blocked) or may_have_been_taken(verdict)


def _halve(attempt: Attempt, reason: str, before: Tries, tries: Tries, abilities: Abilities) -> Decision:
    """Cut a refused request between two records, where a repeat of its events is harmless; else park it all.

    Harmless: events have ids of their own; or nothing was taken, which a refusal says unless a leading
    part may have been, or an earlier attempt may have been taken and the key would not tell.
    """
    sure = not before.risky or abilities.dedup is Dedup.REQUEST_KEY
    count = len(attempt.verdicts)
    if abilities.dedup is Dedup.EVENT_ID or (sure and not _part_may_be_taken(attempt.verdicts, abilities)):
        return Decision(
            open=False,
            tries=tries,
            fates=(Fate.MOVED,) * count,
            parts=_halves(attempt.records),
        )
    return park_all(tries, count, Parking(reason, maybe_taken=True))


def _give_way(attempt: Attempt, tries: Tries, abilities: Abilities) -> Decision | None:
    """Others are taken and this request never is: it is about a record of it, and no other is to wait for that one.

    It is cut between two records where a repeat is harmless. One that is blocked by itself is refused, however it is
    worded (a firewall that dislikes a text in it). What remains is offered on for as long as it may be.
    """
    if len(set(attempt.records)) > 1:
        if tries.risky and abilities.dedup is not Dedup.EVENT_ID:
            return None
        fates = (Fate.MOVED,) * len(attempt.verdicts)
        # The good half is taken at once, and of the other one it is known that it is not: its waits begin anew.
        tries = replace(tries, attempts=1, alone=tries.alone - 1)
        return Decision(open=False, tries=tries, fates=fates, parts=_halves(attempt.records))
    blocked = [v for v in attempt.verdicts if isinstance(v, Blocked) and not v.maybe_taken]
    if len(blocked) < len(attempt.verdicts):
        return None
    return park_all(tries, len(blocked), Parking(blocked[0].reason, maybe_taken=tries.risky))


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
                # Something is there under this key: another key would not be recognised as a repeat of it.
                unsure = reason == KEY_MISMATCH or (before.risky and abilities.dedup is Dedup.NONE)
                parked[index] = Parking(reason, maybe_taken=unsure)
                fates.append(Fate.PARKED)
            case Unknown() | Blocked(maybe_taken=True) if (
                abilities.dedup is Dedup.NONE and not abilities.resend_unknown
            ):
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
    limits: Limits,
) -> Decision:
    """Some events are settled and some are not: let the open ones go on in a request of their own. There is headway, so
    their waits begin anew: where a vendor names one event at a time, they would add up to days."""
    records = attempt.records
    settled = {records[i] for i, fate in enumerate(fates) if fate in (Fate.DELIVERED, Fate.DUPLICATE)}
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
        tries=replace(tries, attempts=1),
        fates=tuple(fates),
        parked=parked,
        parts=(tuple(going),) if going else (),
        wait_s=backoff_s(1, attempt.roll, limits, asked_wait_s(attempt.verdicts)),
    )
