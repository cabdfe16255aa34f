"""From a reply to what is stored of it: the decision, the parts that go on, what is too late, the history in words.

What must always hold: each event of a settled request has one final fate, and every record that goes on is in a
request of its own or is parked with the reason why it could not be. Parts are encoded again from the records that were
stored with their request, by the encoder that runs now: a part is a new request with a new key, so the bytes
of the old one bind it to nothing, and records are never cut apart.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Final

from sidecar.delivery import encoding
from sidecar.delivery.dedup_window import may_resend, window_left_s
from sidecar.delivery.limits import Limits
from sidecar.delivery.retry_policy import Attempt, Decision, judge, park_all
from sidecar.delivery.rows import NewRequest, Request, Settlement
from sidecar.delivery.types import ENCODE_FAILED, PARTLY_TAKEN, TOO_OLD, WINDOW_ENDED, Fate, Now, Parking
from sidecar.model.delivery import Backend, Dedup, Verdict

_LOG = logging.getLogger(__name__)
SWEEP_SLICE: Final = 200  # requests looked at before the event loop is let go

Lines = Callable[[int], Awaitable[list[bytes]]]
"""The records stored with a request, in the order in which its members first name them."""


@dataclass(slots=True)
class Reply:
    """How one attempt ended."""

    request: Request
    verdicts: Sequence[Verdict]
    started: Now
    interrupted: bool = False  # with the last run
    counted: bool = False  # by the circuit breaker, in a turn that could not be stored


@dataclass(frozen=True, slots=True)
class Terms:
    """What the settlements of one backend are made with."""

    backend: Backend
    limits: Limits
    lines: Lines


async def settle(terms: Terms, reply: Reply, now: Now, roll: float, taken_s: float) -> Settlement:
    """Judge a reply: what is stored of the attempt. One that went well leaves no history. `taken_s`: the monotonic time
    at which the backend last took something."""
    request = reply.request
    attempt = Attempt(
        verdicts=reply.verdicts,
        records=[member.seq for member in request.members],
        started=reply.started,
        ended=now,
        roll=roll,
        stepped=request.stepped,
        taken_s=taken_s,
    )
    decision = judge(attempt, request.tries, terms.backend.abilities, terms.limits)
    if reply.interrupted:
        decision = replace(decision, wait_s=0.0)
    history = request.history
    if decision.open or decision.parked or decision.parts:
        history = remember(history, _entry(now, reply.verdicts), terms.limits)
    return await _settlement(terms, request, decision, history, now)


async def sweep(terms: Terms, waiting: Sequence[Request], now: Now) -> list[Settlement]:
    """Look at everything that waits: windows and ages run on while nothing is offered."""
    settlements = []
    for count, request in enumerate(waiting, 1):
        if count % SWEEP_SLICE == 0:
            await asyncio.sleep(0)
        _warn(terms, request, now)
        settlement = await overdue(terms, request, now)
        if settlement is not None:
            settlements.append(settlement)
    return settlements


def _warn(terms: Terms, request: Request, now: Now) -> None:
    left_s = window_left_s(request.tries, terms.backend.abilities, now, terms.limits)
    if left_s is not None and 0 < left_s < terms.limits.window_warning_s and not request.warned:
        request.warned = True
        facts = {"backend": terms.backend.name, "request": request.key, "left_s": round(left_s)}
        _LOG.warning(
            "requests that may have been taken will be parked when the backend stops recognising them",
            extra={"facts": facts},
        )


async def overdue(terms: Terms, request: Request, now: Now) -> Settlement | None:
    """What is too late to be offered again; None while it is not."""
    abilities, count = terms.backend.abilities, len(request.members)
    if not may_resend(request.tries, abilities, now, terms.limits):
        parking = Parking(WINDOW_ENDED, maybe_taken=True)
        decision = park_all(request.tries, count, parking)
    elif (
        abilities.age_max_s is not None
        and not request.tries.forced
        and request.oldest_s < now.wall_s - abilities.age_max_s
    ):
        decision = park_all(request.tries, count, Parking(TOO_OLD, maybe_taken=request.tries.risky))
        if request.records > 1:
            decision = await _without_old(terms, request, decision, now.wall_s - abilities.age_max_s)
    else:
        return None
    reason = next(iter(decision.parked.values())).reason
    history = remember(request.history, f"{_stamp(now)} parked {reason}", terms.limits)
    return await _settlement(terms, request, decision, history, now)


async def _without_old(terms: Terms, request: Request, decision: Decision, limit_s: float) -> Decision:
    """Park the records of a batch that are too old; the others go on, where a part may be sent alone."""
    if terms.backend.abilities.dedup is not Dedup.EVENT_ID and request.tries.risky:
        return decision
    lines = await terms.lines(request.id)
    old = encoding.older_than(limit_s, list(dict.fromkeys(m.seq for m in request.members)), lines)
    going = tuple(i for i, member in enumerate(request.members) if member.seq not in old)
    return replace(
        decision,
        fates=tuple(Fate.MOVED if i in going else Fate.PARKED for i in range(len(request.members))),
        parked={i: parking for i, parking in decision.parked.items() if i not in going},
        parts=(going,) if going else (),
    )


async def _settlement(
    terms: Terms, request: Request, decision: Decision, history: tuple[str, ...], now: Now
) -> Settlement:
    due_s = now.wall_s + decision.wait_s
    if not decision.parts:
        return Settlement(request=request, decision=decision, history=history, due_s=due_s)
    lines = await terms.lines(request.id)
    by_seq = dict(zip(dict.fromkeys(m.seq for m in request.members), lines, strict=True))
    children: list[NewRequest] = []
    fates, parked = list(decision.fates), dict(decision.parked)
    for part in decision.parts:
        seqs = dict.fromkeys(request.members[i].seq for i in part)
        made, lost = await encoding.again(
            terms.backend, [(seq, by_seq[seq]) for seq in seqs], tries=decision.tries, due_s=due_s
        )
        events = {(request.members[i].seq, request.members[i].event_id) for i in part}
        for new in made:
            offered = {(m.seq, m.event_id) for m in new.members}
            extra = offered - events
            if not offered & events:
                continue
            if extra and terms.backend.abilities.dedup is not Dedup.EVENT_ID:
                # It would repeat events that are somebody else's to send.
                lost.events.update({one: encoding.Lost(PARTLY_TAKEN) for one in offered & events})
                continue
            if extra and new.tries.risk_wall_s is None:
                # Events that were taken go along once more: their window runs from now at the latest.
                tries = replace(new.tries, risk_wall_s=now.wall_s, risk_mono_s=now.mono_s)
                new = replace(new, tries=tries)
            sealed = replace(new.sealed, key=encoding.child_key(request.key, len(children)))
            children.append(replace(new, sealed=sealed, generation=request.generation, history=history))
        carried = {(m.seq, m.event_id) for child in children for m in child.members}
        for i in part:
            one = (request.members[i].seq, request.members[i].event_id)
            if one not in carried:
                # No reason: an encoder of another version or setting makes no such event any more.
                why = lost.why(*one) or encoding.Lost(ENCODE_FAILED)
                fates[i] = Fate.PARKED
                maybe = decision.tries.risky or why.reason == PARTLY_TAKEN
                parked[i] = Parking(why.reason, maybe_taken=maybe)
    decision = replace(decision, fates=tuple(fates), parked=parked)
    return Settlement(request=request, decision=decision, history=history, children=children)


def remember(history: tuple[str, ...], entry: str, limits: Limits) -> tuple[str, ...]:
    """A request's attempts, in words: the first stays, and the latest."""
    grown = (*history, entry)
    if len(grown) <= limits.history_entries:
        return grown
    return (grown[0], *grown[-(limits.history_entries - 1) :])


def _stamp(now: Now) -> str:
    return datetime.fromtimestamp(now.wall_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _entry(now: Now, verdicts: Sequence[Verdict]) -> str:
    """One attempt in words: when, and each kind of answer with how many events got it."""
    kinds = Counter(
        " ".join(filter(None, (type(verdict).__name__.lower(), getattr(verdict, "reason", "")))) for verdict in verdicts
    )
    return " ".join([_stamp(now), ", ".join(f"{n} x {kind}" if n > 1 else kind for kind, n in kinds.items())])
