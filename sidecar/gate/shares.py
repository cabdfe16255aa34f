"""What one of many sidecars may use of a counter that all of them share: pure, and how much it asks for.

The database has for each counter what the records of each sidecar say (*settled*) and what each may use beyond that
(its *lease*). What must always hold there when something is granted: settled + leases <= amount. Here a call is let in
out of the lease alone: what was settled since it was last published, and what is out, fit into it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

LEASE_S: Final = 10.0  # by the database's clock: how long a sidecar that died keeps what it held
# It is used no longer than this after the question was sent. The rest is for a clock that runs slow, and for the
# processes that serve, which use what they were given for a second more.
USED_S: Final = 6.0
AHEAD_S: Final = 2.0  # of its own rate is leased ahead: two rounds
PARTS: Final = 50  # at most this part of what is left after the calls that wait is leased ahead of any call


def ahead_of(rate: float, room: int) -> int:
    """How much to hold beyond what is in use. `rate`: used a second; `room`: what is left in the whole fleet. Nothing
    once less than `PARTS` are left: from there on each call is asked for."""
    return max(min(int(rate * AHEAD_S), room // PARTS), 0)


def granted(*, keep: int, demand: int, ahead: int, room: int) -> int:
    """A lease. `keep`: what is held and may be used already; it is never taken away, since it may be in use. `demand`:
    what calls wait for; `ahead`: what is wanted beside. `room`: the amount, without what is settled and others hold."""
    free = max(room - keep, 0)
    asked = min(demand, free)
    return keep + asked + min(ahead, (free - asked) // PARTS)


def shift_of(offset_ns: int, part_ns: int) -> int:
    """By how many parts of a sliding window our clock is behind the database's, negative where it is ahead. Rounded up:
    what is counted a part too long lets nothing through."""
    return 0 if abs(offset_ns) * 2 <= part_ns else -(-offset_ns // part_ns)


@dataclass(slots=True, eq=False)
class Share:
    """Of one counter, here. `blocks`: False: it only warns, and goes by what was known last. `clock_s`: one that no
    setting of the time changes and that goes on while the machine sleeps."""

    blocks: bool
    clock_s: Callable[[], float]
    lease: int = 0  # on top of what is published
    until_s: float = 0.0
    unpublished: int = 0  # settled here since
    others_settled: int = 0
    others_leased: int = 0
    room: int = 0  # in the whole fleet, as of the last answer
    demand: int = 0  # of calls that wait
    taken: int = 0  # since the rate was last looked at
    peak: int = 0  # of what was out, since the last round
    rate: float = 0.0
    rated_s: float = 0.0
    low: int = 0  # with less left than this more is asked for, before it runs out
    dirty: bool = True  # the database does not have what we have
    told: bool = False  # it has a lease of ours
    stored: tuple[int, float] | None = None  # what it has of us, and until when it keeps that, Unix seconds

    @property
    def left(self) -> int:
        """Without what is out."""
        return (self.lease if self.clock_s() < self.until_s else 0) - self.unpublished

    def rated(self, now_s: float) -> float:
        """The rate, with what was taken since."""
        took_s = now_s - self.rated_s
        if took_s >= 0.25:
            self.rate = (self.rate + self.taken / min(took_s, AHEAD_S)) / 2
            self.taken, self.rated_s = 0, now_s
        return self.rate

    def cut(self, out: int, now_s: float, *, places: bool) -> int:
        """Give up what is not needed, here and now, before the database is told; what is kept, without what is about to
        be published. `places`: of calls at once, which come back: those lately in use are kept while there are more."""
        use = out + self.unpublished
        if not self.blocks:
            self.rated_s = now_s
            return out
        rate = self.rated(now_s)
        wanted = use + (0 if places else ahead_of(rate, self.room))
        if places and self.room >= PARTS:
            wanted = max(wanted, self.peak)
        if now_s < self.until_s:
            self.lease = min(self.lease, max(wanted, use))
            use = max(self.lease, use)
        self.peak = out
        return max(use - self.unpublished, out)

    def answered(self, published: int, lease: int, until_s: float, out: int) -> None:
        self.unpublished -= published
        self.lease, self.until_s = lease, until_s
        self.low = max(lease - self.unpublished - out, 0) // 2
        self.told = lease > 0
