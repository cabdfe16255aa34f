"""New records for one lane: read from its spools in turn, made into requests, and counted once they are stored.

What must always hold: records are taken from a spool only when what became of them is stored; until then the same ones
come again. How many requests there is room for is the lane's to say, and storing them too.
"""

from __future__ import annotations

import itertools
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from sidecar.delivery import encoding
from sidecar.delivery.owner import Owner
from sidecar.delivery.sources import Source, Sources
from sidecar.delivery.state.rows import Cursor, Sealing
from sidecar.delivery.types import MISSING, Now
from sidecar.model.delivery import Backend

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Planned:
    """Records that are about to be sealed."""

    source: Source
    plan: encoding.Plan
    at_once: set[int] = field(default_factory=set)  # which requests are offered as soon as they are stored

    def step(self) -> Sealing:
        source, plan = self.source, self.plan
        return Sealing(
            cursor=source.cursor,
            from_seq=source.seq,
            to_seq=plan.upto_seq,
            requests=plan.requests,
            at_once=self.at_once,
            skipped=plan.skipped,
            parked=plan.parked,
            holes=plan.holes,
        )


class Supply:
    """All spools of one backend, as requests. `start` makes the cursor for an instance that is new."""

    def __init__(self, backend: Backend, owner: Owner, start: Callable[[str], Awaitable[Cursor]]) -> None:
        self._backend, self._owner, self._start = backend, owner, start
        self._sources = self._new_sources()
        self._per_record = 1.0  # requests that a record gives

    @property
    def next_look_s(self) -> float | None:
        """When there may be something to read, if something may be there."""
        return self._sources.next_look_s

    @property
    def unread(self) -> bool:
        """Whether there is, or may be, something that is not sealed yet."""
        return self._sources.unread

    def take_up(self, cursors: Sequence[Cursor]) -> None:
        """Begin where these are; what was read before is read again."""
        self._sources = self._new_sources()
        for cursor in cursors:
            self._sources.add(cursor)

    def wake(self) -> None:
        self._sources.wake()

    async def plan(self, room: int, now: Now, *, hurry: bool) -> Planned | None:
        """Decide on the next records of one spool, as far as so many requests have room."""
        limits, wanted = self._owner.limits, self._wanted(room)
        source = await self._sources.next(wanted, now.mono_s, hurry=hurry)
        if source is None:
            return None
        items = list(itertools.islice(source.items, wanted))
        plan = await encoding.plan(
            self._backend, items, room=room, again_upto=source.again_upto, now_s=now.wall_s, limits=limits
        )
        return Planned(source, plan)

    def placed(self, planned: Planned) -> None:
        """It is stored: go on behind it, and count what was sealed, skipped, parked and lost."""
        plan, metrics, name = planned.plan, self._owner.metrics, self._backend.name
        planned.source.move(plan.taken, plan.upto_seq)
        events = sum(len(request.members) for request in plan.requests)
        if events:
            metrics.sealed(name, events)
        for reason, seqs in plan.skipped.items():
            metrics.skipped(name, reason, len(seqs))
        missing = sum(hole.records for hole in plan.holes)
        if missing:
            metrics.skipped(name, MISSING, missing)
            _LOG.error(
                "records were lost with a damaged spool file", extra={"facts": {"backend": name, "records": missing}}
            )
        reasons = {(parked.seq, parked.reason) for parked in plan.parked}
        for reason, count in Counter(reason for _, reason in reasons).items():
            self._owner.parked_some(name, reason, count)
        if plan.requests and plan.taken:
            # Learned from the last ones: how many requests a record gives (one for each meter, say).
            self._per_record = max(len(plan.requests) / plan.taken, 0.01)

    def _wanted(self, room: int) -> int:
        """How many records to take for so many requests: a slice of the event loop at most."""
        most = self._owner.limits.encode_records
        if self._backend.abilities.events_max > 1:
            return most
        return max(1, min(most, int(room / self._per_record)))

    def _new_sources(self) -> Sources:
        limits = self._owner.limits
        gap_s = limits.linger_s if self._backend.abilities.events_max > 1 else limits.gather_s
        return Sources(self._owner.reader, self._start, read_bytes=limits.read_bytes, gap_s=gap_s)
