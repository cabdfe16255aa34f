"""The attempts of one lane: those under way, and the answers that are not stored yet.

What must always hold: each attempt ends in an answer with one verdict for each event, whatever the backend does; and an
answer is forgotten only after it is on disk, so a file that fails in between costs no verdict. Each attempt is a task
of its own that only leaves its answer here; when to make one and what follows is the lane's.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace

from sidecar.delivery.limits import Limits
from sidecar.delivery.owner import Owner
from sidecar.delivery.state.rows import Request
from sidecar.delivery.types import Now
from sidecar.model.delivery import Backend, Sealed, Unknown, Verdict

_LOG = logging.getLogger(__name__)


@dataclass(slots=True)
class Answer:
    """How one attempt ended."""

    request: Request
    verdicts: Sequence[Verdict]
    started: Now
    interrupted: bool = False  # with the last run
    counted: bool = False  # by the pace, in a turn that could not be stored


class Offering:
    """Offers requests to one backend. `answered` is called when an answer has come."""

    def __init__(self, backend: Backend, owner: Owner, answered: Callable[[Request], None]) -> None:
        self._backend, self._owner, self._answered = backend, owner, answered
        self._under_way: dict[int, Request] = {}
        self._answers: list[Answer] = []
        self._in_hand: list[Answer] = []  # taken from there, and not stored yet

    def __iter__(self) -> Iterator[Request]:
        yield from self._under_way.values()
        yield from (answer.request for answer in self._answers)

    @property
    def under_way(self) -> Collection[Request]:
        return self._under_way.values()

    @property
    def has_answers(self) -> bool:
        return bool(self._answers)

    def offer(self, request: Request, now: Now) -> None:
        """Begin an attempt; that it begins is on disk."""
        request.under_way, request.stepped = True, False
        request.started_s = now.wall_s
        self._under_way[request.id] = request
        self._owner.spawn(self._attempt(request, now))

    def take(self) -> list[Answer]:
        """The answers that have come. They are kept here as well, until they are `stored`."""
        self._in_hand, self._answers = self._answers, []
        return self._in_hand

    def stored(self) -> None:
        self._in_hand = []

    def take_up(self, requests: Sequence[Request], now: Now) -> list[Request]:
        """Believe what is on disk; what this run still knows of attempts is not forgotten. Returns those that wait."""
        known = {answer.request.id: answer for answer in (*self._in_hand, *self._answers)}
        self._in_hand, self._answers = [], []
        waiting = []
        for request in requests:
            if request.id in self._under_way:
                continue
            if not request.under_way:
                waiting.append(request)
            elif request.id in known:
                self._answers.append(replace(known[request.id], request=request))
            else:
                self._answers.append(_interrupted(request, now))
        return waiting

    async def _attempt(self, request: Request, started: Now) -> None:
        assert request.sealed is not None
        sealed, attempt = request.sealed, request.tries.attempts
        sealed = sealed if attempt == sealed.attempt else replace(sealed, attempt=attempt)
        verdicts = await _ask(self._backend, sealed, self._owner.limits)
        self._under_way.pop(request.id, None)
        self._answers.append(Answer(request, verdicts, started))
        self._answered(request)


def _interrupted(request: Request, now: Now) -> Answer:
    """The last run ended during this attempt: it may have been taken, at its start at the earliest."""
    tries = request.tries
    if tries.risk_wall_s is None:
        request.tries = replace(tries, risk_wall_s=request.started_s)
    return Answer(request, [Unknown("interrupted")] * len(request.members), now, interrupted=True)


async def _ask(backend: Backend, sealed: Sealed, limits: Limits) -> Sequence[Verdict]:
    """Whatever the backend does comes back as one verdict for each event."""
    count = len(sealed.events)
    try:
        async with asyncio.timeout(limits.send_limit_s):
            verdicts = await backend.send(sealed)
    except TimeoutError:
        return [Unknown("no_answer")] * count
    except Exception as error:  # noqa: BLE001 - a surprise in one backend is one unknown outcome
        _tell(backend, "a backend raised; the outcome is taken for unknown", error=type(error).__name__)
        return [Unknown(f"raised_{type(error).__name__}")] * count
    if len(verdicts) != count:
        _tell(backend, "a backend gave another number of verdicts than there are events")
        return [Unknown("verdicts_missing")] * count
    return verdicts


def _tell(backend: Backend, text: str, **facts: object) -> None:
    _LOG.error(text, extra={"facts": {"backend": backend.name, **facts}})
