"""Where a backend's sealed requests wait: never offered, due again later, or behind another of the same subject.

Fresh requests keep their bytes; those that wait for another attempt leave them on disk, so that a long outage
costs little memory. Order: what is due again goes before what was never offered, older before younger.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterator

from sidecar.delivery.limits import Limits
from sidecar.delivery.rows import Request
from sidecar.delivery.types import Now


class RequestQueue:
    """The requests of one backend that are not under way."""

    def __init__(self, limits: Limits, *, one_per_subject: bool) -> None:
        self._limits = limits
        self.fresh: deque[Request] = deque()
        self.later_records = self.later_bytes = 0
        self._later: list[tuple[float, int, Request]] = []  # monotonic due time, id
        self._one_per_subject = one_per_subject
        self._called: set[str] = set()  # subjects that are being called
        self._behind: dict[str, deque[Request]] = {}

    def __iter__(self) -> Iterator[Request]:
        yield from self.fresh
        for behind in self._behind.values():
            yield from behind
        for entry in self._later:
            yield entry[2]

    @property
    def queued(self) -> int:
        """Requests that only wait for a slot or a subject."""
        return len(self.fresh) + sum(map(len, self._behind.values()))

    @property
    def next_due_s(self) -> float | None:
        return self._later[0][0] if self._later else None

    @property
    def full(self) -> bool:
        """Whether so much waits for another attempt that nothing may be added."""
        return self.later_records >= self._limits.retry_records or self.later_bytes >= self._limits.retry_bytes

    @property
    def later(self) -> int:
        return len(self._later)

    def put_later(self, request: Request, due_s: float) -> None:
        request.sealed = None
        self.later_records += request.records
        self.later_bytes += request.size_bytes
        heapq.heappush(self._later, (due_s, request.id, request))

    def put_ahead(self, request: Request, now: Now) -> None:
        """Its events are from the future, by a clock that may be set: how far off that is, is looked at again."""
        self.put_later(request, now.mono_s + min(request.due_s - now.wall_s, self._limits.backoff_cap_s))

    def take(self, now: Now, *, fresh_first: bool = False, early: bool = False) -> Request | None:
        """The next request to offer; its subject counts as called from now on.

        `early`: before its time is over where nothing else may go, to see whether the backend takes anything.
        """
        now_s = now.mono_s
        while True:
            if early and not (self._later and self._later[0][0] <= now_s) and not (fresh_first and self.fresh):
                self._bring_forward(now)
            early = False
            if self._later and self._later[0][0] <= now_s and not (fresh_first and self.fresh):
                request = heapq.heappop(self._later)[2]
                self.later_records -= request.records
                self.later_bytes -= request.size_bytes
                if _is_ahead(request, now):
                    self.put_ahead(request, now)
                    continue
            elif self.fresh:
                request = self.fresh.popleft()
            else:
                return None
            if self.call(request.subject):
                return request
            self._behind.setdefault(request.subject, deque()).append(request)

    def call(self, subject: str) -> bool:
        """Note that a subject is called; False when it is being called already."""
        if not self._one_per_subject or not subject:
            return True
        if subject in self._called:
            return False
        self._called.add(subject)
        return True

    def called(self, subject: str) -> None:
        """The call of a subject has ended: the next one that waits for it may go."""
        self._called.discard(subject)
        behind = self._behind.get(subject)
        if behind:
            self.fresh.appendleft(behind.popleft())
            if not behind:
                del self._behind[subject]

    def drop(self, ids: set[int]) -> None:
        """Requests that were settled without being offered again."""
        self.fresh = deque(request for request in self.fresh if request.id not in ids)
        for subject, behind in list(self._behind.items()):
            left = deque(request for request in behind if request.id not in ids)
            if left:
                self._behind[subject] = left
            else:
                del self._behind[subject]
        self._replace([entry for entry in self._later if entry[1] not in ids])

    def hurry(self, now: Now, *, held_too: bool = False) -> int:
        """Its backend is back: long backoffs need not be waited out. Returns how many were cut short.

        A wait that it asked for still holds, unless an operator knows better; so does one for an event's own time.
        """
        count, entries = 0, []
        for due, id_, request in self._later:
            cut = due > now.mono_s and not _is_ahead(request, now) and (held_too or not request.held)
            count += cut
            request.held = request.held and not cut
            entries.append((now.mono_s if cut else due, id_, request))
        self._replace(entries)
        return count

    def can_go_early(self, now: Now) -> bool:
        """Whether something waits for nothing but its own backoff."""
        return any(not r.held and not _is_ahead(r, now) for _, _, r in self._later)

    def _bring_forward(self, now: Now) -> None:
        """Let the first request that waits for nothing but its own backoff be due now."""
        eligible = [entry for entry in self._later if not entry[2].held and not _is_ahead(entry[2], now)]
        if eligible:
            first = min(eligible)
            self._replace([(now.mono_s, *e[1:]) if e[1] == first[1] else e for e in self._later])

    def _replace(self, entries: list[tuple[float, int, Request]]) -> None:
        heapq.heapify(entries)
        self._later = entries
        self.later_records = sum(entry[2].records for entry in entries)
        self.later_bytes = sum(entry[2].size_bytes for entry in entries)


def _is_ahead(request: Request, now: Now) -> bool:
    """Whether its events are from the future: never offered, and due at a time of their own."""
    return request.tries.attempts == 0 and request.due_s > now.wall_s
