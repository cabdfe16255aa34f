"""The lanes of a fleet for people: how they stand, asked of a sidecar that runs or of the database at once, and what is
changed in them while none runs here.

Anybody who has the database can look, whoever holds the lanes. A change is made by their holders alone: it is left in
the database for them (`delivery.wishes`), and of a lane that nobody holds it is looked up first whether there is
anything to change in it, so that nothing is left waiting that means nothing.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from contextlib import suppress
from dataclasses import dataclass, field, replace
from time import monotonic
from typing import Any, Final

from sidecar.delivery.corrections import GONE
from sidecar.delivery.lane_balance import LanesBalance, balance_of, read_lanes
from sidecar.delivery.lane_database import LEASES, LEASES_PART, lanes_read, told
from sidecar.delivery.queries import PAGE, DeliveryQueries, Found, whereabouts
from sidecar.delivery.redrive import EACH_MAX
from sidecar.delivery.rows import Parked, StateError
from sidecar.delivery.types import BEFORE, GAP
from sidecar.delivery.wishes import Asked, Wish, ask
from sidecar.ledger.lanes import LANES
from sidecar.settings import Deliver, Settings
from sidecar.storage.postgres import Postgres, PostgresError, call

log = logging.getLogger(__name__)

FRESH_S: Final = 2.0  # the page asks every five, and many may look at it
ANSWER_S: Final = 3.0  # who asks waits no longer for a database that is slow


def url_of(settings: Settings) -> str | None:
    """Of the database that has the lanes; None where this sidecar tells all of its backends by itself."""
    url = settings.fleet.ledger_url
    return url.reveal() if url is not None and settings.fleet.deliver is Deliver.ELECTED else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """How the lanes stood. `trouble`: why they cannot be looked at now; `balance` is then as of `age_s` ago."""

    balance: LanesBalance | None = None
    age_s: float = 0.0
    trouble: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """As `/balance` and `balance --format json` have it under `lanes`."""
        known = {} if self.balance is None else self.balance.to_dict()
        if known and self.trouble is not None:
            known["age_s"] = round(self.age_s, 1)
        return known | {"trouble": self.trouble}


def look(url: str) -> Seen:
    """Now, at once. Blocks."""
    try:
        return Seen(balance=read_lanes(url))
    except StateError as error:
        return Seen(trouble=str(error))


@dataclass(slots=True)
class Lookout:
    """For a process with an event loop: how the lanes stand, looked at when somebody asks. Nobody waits for a database
    that is away: what was known last is said, with its age."""

    url: str
    _database: Postgres = field(init=False)
    _balance: LanesBalance | None = None
    _at_s: float = 0.0
    _tried_s: float = float("-inf")
    _trouble: str | None = None
    _looking: asyncio.Task[None] | None = None
    _checked: bool = False

    def __post_init__(self) -> None:
        self._database = Postgres(self.url, name="metering-sidecar lanes seen", connections=1)

    async def seen(self) -> Seen:
        """What the database said last; asked anew where that is older than `FRESH_S`, and waited for `ANSWER_S` at
        most."""
        if monotonic() - self._tried_s >= FRESH_S and (self._looking is None or self._looking.done()):
            self._looking = asyncio.create_task(self._look())
        if self._looking is not None and not self._looking.done() and self._trouble is None:
            with suppress(TimeoutError):
                async with asyncio.timeout(ANSWER_S):
                    await asyncio.shield(self._looking)
        trouble = self._trouble
        if self._balance is None and trouble is None:
            trouble = f"{self._database.where} does not answer"
        return Seen(balance=self._balance, age_s=monotonic() - self._at_s, trouble=trouble)

    async def aclose(self) -> None:
        if self._looking is not None:
            self._looking.cancel()
            with suppress(asyncio.CancelledError):
                await self._looking
        await self._database.close()

    async def _look(self) -> None:
        self._tried_s = monotonic()
        try:
            if not self._checked:
                await self._database.require(LEASES_PART, LEASES)
                self._checked = True
            found = await balance_of(self._database)
        except PostgresError as error:
            self._trouble, self._checked = str(error), False
        except Exception as error:
            log.exception("the lanes could not be looked at")
            self._trouble = f"a mistake of ours ({type(error).__name__}), see the log"
        else:
            self._balance, self._at_s, self._trouble = found, self._tried_s, None


# --- changes, where no instance runs ------------------------------------------------------------------


def correct(url: str, wish: Wish) -> Asked:
    """Have something done on every lane by its holder, now, or by the next one. Blocks until those of now have done it,
    with a limit. Raises `StateError`."""
    free = [one for one in read_lanes(url).lanes if one.holder is None]
    answers = []
    lanes = set(range(LANES)) - {one.lane for one in free}
    with lanes_read(url) as readings:
        for one in free:
            there = _EMPTY if one.recorded == 0 else DeliveryQueries(readings[one.lane])
            would, answer = looked_up(wish, there)
            answers.append(answer)
            if would:
                lanes.add(one.lane)
    database = Postgres(url, name="metering-sidecar command")
    try:
        with told(f"the lanes in {database.where}"):
            asked = call(ask(database, {**wish, "by": who()}, lanes))
    finally:
        call(database.close())
    return replace(asked, answers=[*asked.answers, *answers])


class _Empty:
    """Delivery's books of a lane without a record: there may be none yet."""

    def parked(self, **_: Any) -> list[Parked]:
        return []

    def find(self, _: str) -> list[Found]:
        return []


_EMPTY: Final = _Empty()


def looked_up(wish: Wish, queries: DeliveryQueries | _Empty) -> tuple[bool, Any]:
    """Whether something would come of it where nobody delivers just now, and the answer of that place until then: what
    `wishes.grant` gives where nothing came of it."""
    match wish:
        case {"do": "retry"}:  # waits end with whoever waited
            return False, {"was": "up", "paused_s": 0.0, "requests": 0, "any": False}
        case {"do": "redrive", "backend": backend, "reason": reason, "ids": ids, "since_s": since_s}:
            seen: set[str] = set()
            some = False
            if ids is None:
                some = since_s is not None and reason in (None, BEFORE, GAP)  # skipped records are not looked through
                some = some or bool(queries.parked(backend=backend, reason=reason, since_s=since_s, limit=1))
            for start in range(0, len(ids or ()), PAGE):
                chosen, after = ids[start : start + PAGE], 0
                while page := queries.parked(
                    backend=backend, reason=reason, ids=chosen, since_s=since_s, after=after, bodies=False
                ):
                    seen.update(one for row in page for one in (row.record_id, row.event_id))
                    after = page[-1].id
            missing = [one for one in dict.fromkeys(ids or ()) if one not in seen]
            known = [
                {"id": one, "known": whereabouts(queries, one) if index < EACH_MAX else ""}
                for index, one in enumerate(missing)
            ]
            answer = {"redriven": 0, "unskipped": 0, "counts": [], "each": [], "not_found": known}
            return some or bool(seen), answer
        case {"do": "cancel", "one": one, "backend": backend}:
            found = [each.backend for each in queries.find(one) if each.fate not in GONE]
            found += [row.backend for row in queries.parked(ids=[one])]
            return any(backend in (None, name) for name in found), []
    return True, []  # a complaint: looking each event up is no less than the holder does


def who() -> str:
    """Who asks for a change, for the log of whoever makes it."""
    return f"uid {os.getuid()} on {socket.gethostname()}"
