"""A fleet in simulated time: sidecars with clocks of their own, one database, and everything that goes wrong between.

Nothing here waits or opens anything: the time is a number, chance has a seed, and a run of ten minutes of twenty
sidecars takes a fraction of a second. What a sidecar does is written as a generator that yields how long something
takes; what the database does is a plain function that happens at one moment, as a transaction does.

A request to the database takes a while to come there and the reply to come back. Either is lost when the network is
parted meanwhile, so a statement whose reply never came may have happened. A sidecar that is paused (a long collection
of garbage, a machine that is moved) goes on later exactly where it was, with what it believed then.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from itertools import count
from typing import TypeVar

T = TypeVar("T")
Work = Generator[float, None, None]
TRIP_S = (0.0005, 0.02)  # of a request to the database, and of its reply
TIMEOUT_S = 2.0  # after which a sidecar takes a request for lost


class Unreachable(Exception):
    """No reply came. Whether the statement happened is not known."""


@dataclass(eq=False)
class Sidecar:
    """A process that lives, is paused, dies and is started again under the same name."""

    name: str
    clock_off_s: float  # its wall clock is wrong by so much
    clock_rate: float  # and its monotonic clock runs so fast
    life: int = 0  # counts its starts: what an earlier life had begun is over
    alive: bool = False
    paused_until_s: float = 0.0
    parted_until_s: float = 0.0


@dataclass(eq=False)
class Fleet:
    """Sidecars and the time. `database_away_until_s`: nobody reaches it before."""

    seed: int
    chance: random.Random = field(init=False)
    now_s: float = 0.0
    database_away_until_s: float = 0.0
    sidecars: dict[str, Sidecar] = field(default_factory=dict)
    _queue: list[tuple[float, int, Sidecar | None, int, Work]] = field(default_factory=list)
    _ties: count[int] = field(default_factory=count)

    def __post_init__(self) -> None:
        self.chance = random.Random(self.seed)

    # -- sidecars --------------------------------------------------------------------------------

    def add(self, name: str) -> Sidecar:
        """One that is not started yet. Its clocks are wrong: by up to an hour, and by up to one in a hundred."""
        one = Sidecar(name, self.chance.uniform(-3600, 3600), self.chance.uniform(0.99, 1.01))
        self.sidecars[name] = one
        return one

    def start(self, one: Sidecar, *works: Work) -> None:
        one.life, one.alive, one.paused_until_s = one.life + 1, True, 0.0
        for work in works:
            self.spawn(one, work)

    def kill(self, one: Sidecar) -> None:
        one.alive = False

    def spawn(self, one: Sidecar | None, work: Work, after_s: float = 0.0) -> None:
        """Run it, as a part of a sidecar's life, or of the world's (None)."""
        life = one.life if one else 0
        heapq.heappush(self._queue, (self.now_s + after_s, next(self._ties), one, life, work))

    def monotonic_s(self, one: Sidecar) -> float:
        return 1000.0 + self.now_s * one.clock_rate

    def reaches(self, one: Sidecar) -> bool:
        """Whether a request that is sent now comes to the database."""
        return self.now_s >= max(self.database_away_until_s, one.parted_until_s)

    def well(self, one: Sidecar) -> bool:
        return one.alive and self.now_s >= one.paused_until_s and self.reaches(one)

    def ask(self, one: Sidecar, statement: Callable[..., T], *values: object) -> Generator[float, None, T]:
        """A transaction of the database: it happens in one moment, or not at all. Raises `Unreachable`."""
        yield self.chance.uniform(*TRIP_S)
        if not self.reaches(one):
            yield TIMEOUT_S
            raise Unreachable
        reply = statement(*values)
        yield self.chance.uniform(*TRIP_S)
        if not self.reaches(one):
            yield TIMEOUT_S
            raise Unreachable
        return reply

    # -- time ------------------------------------------------------------------------------------

    def run(self, until_s: float) -> None:
        """Let everything happen that is due until then."""
        while self._queue and self._queue[0][0] <= until_s:
            at_s, _, one, life, work = heapq.heappop(self._queue)
            self.now_s = max(self.now_s, at_s)
            if one is not None:
                if not one.alive or one.life != life:
                    work.close()
                    continue
                if self.now_s < one.paused_until_s:  # it goes on where it was, later
                    heapq.heappush(self._queue, (one.paused_until_s, next(self._ties), one, life, work))
                    continue
            try:
                after_s = next(work)
            except StopIteration:
                pass
            else:
                heapq.heappush(self._queue, (self.now_s + after_s, next(self._ties), one, life, work))
        self.now_s = max(self.now_s, until_s)
