"""One limit that a simulated fleet shares: what the database grants, what sidecars let through of it, and what may go
wrong between.

The database has what is settled, and for each sidecar what it holds and until when. A sidecar asks for what a call
needs and a little more (the lease), tells once a second what has ended and what it still holds, and lets calls through
out of the lease until it is used up, or over by its own clock. Whatever it tells is a sum since its beginning, so that
telling it twice changes nothing. What a dead sidecar had let through is known when it is back: its records tell.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, field

from support.fleet import Fleet, Sidecar, Unreachable, Work

DRIFT = 0.02  # by how much of its time a lease is over earlier for its holder: two clocks that differ by 1 % each

Size = Callable[[int, int, int], int]
"""Of a lease: what is left, what the call needs, how many sidecars hold something."""


@dataclass(eq=False)
class _Hold:
    amount: int
    expires_s: float


@dataclass(eq=False)
class SharedLimit:
    fleet: Fleet
    amount: int
    size: Size
    lease_s: float
    tell_s: float
    counts_held: bool = True  # False: only what is settled counts, to show that it would be seen here
    settled: int = 0
    told: dict[str, int] = field(default_factory=dict)  # of each sidecar, ever
    holds: dict[str, _Hold] = field(default_factory=dict)
    dropped: list[int] = field(default_factory=list)  # what was held when a lease was over
    largest: int = 0  # of all leases, without what their calls held
    open_most: int = 0  # that calls of one sidecar held at once
    through: int = 0  # let through, by whomever, whether it is told or not
    denied: int = 0
    spools: dict[str, int] = field(default_factory=dict)  # what records of a sidecar say that it let through

    # -- the statements of the database -----------------------------------------------------------

    def grant(self, me: str, ended: int, holding: int, need: int) -> int | None:
        """What has ended and what is held is told, and `need` asked for on top: the lease beside it; None: denied."""
        self._drop()
        self.settled += max(0, ended - self.told.get(me, 0))
        self.told[me] = max(ended, self.told.get(me, 0))
        others = sum(hold.amount for name, hold in self.holds.items() if name != me)
        left = self.amount - self.settled - holding - (others if self.counts_held else 0)
        lease: int | None = None
        if need == 0:
            lease = 0
        elif left >= need:
            lease = max(0, min(self.size(left - need, need, len(self.holds) or 1), left - need))
            self.largest = max(self.largest, lease)
        self.holds[me] = _Hold(holding + (need + lease if lease is not None else 0), self.fleet.now_s + self.lease_s)
        return lease

    def _drop(self) -> None:
        """What was held beyond its time is anybody's again."""
        for name, hold in list(self.holds.items()):
            if hold.expires_s < self.fleet.now_s:
                if hold.amount:
                    self.dropped.append(hold.amount)
                del self.holds[name]

    # -- what a sidecar does -----------------------------------------------------------------------

    def serves(self, one: Sidecar, calls_a_s: float, call_max: int) -> Work:
        """Its calls, one after the other as they come; what each takes is known when it comes."""
        it = _Holder(ended=self.spools.setdefault(one.name, 0))
        self.fleet.spawn(one, self._tells(one, it))
        while True:
            yield self.fleet.chance.expovariate(calls_a_s)
            self.fleet.spawn(one, self._call(one, it, self.fleet.chance.randint(1, call_max)))

    def _call(self, one: Sidecar, it: _Holder, need: int) -> Work:
        while it.asking and not self._has(one, it, need):
            yield 0.05
        if not self._has(one, it, need):
            it.asking = True
            try:
                lease = yield from self._ask(one, it, need)
            except Unreachable:
                lease = None
            it.asking = False
            if lease is None:
                self.denied += 1
                return
            it.left += need
        it.left -= need
        it.open += need
        self.open_most = max(self.open_most, it.open)
        self.through += need
        self.spools[one.name] += need  # whatever becomes of it, its record will be there
        yield self.fleet.chance.uniform(0.05, 3.0)
        it.open -= need
        it.ended += need

    def _has(self, one: Sidecar, it: _Holder, need: int) -> bool:
        return it.left >= need and self.fleet.monotonic_s(one) < it.until_s

    def _ask(self, one: Sidecar, it: _Holder, need: int) -> Generator[float, None, int | None]:
        began_s, ended, held = self.fleet.monotonic_s(one), it.ended, it.open
        it.left = 0  # it is told as given back, whatever becomes of the question
        lease = yield from self.fleet.ask(one, self.grant, one.name, ended, held, need)
        if lease is not None:
            it.left, it.until_s = lease, began_s + self.lease_s * (1 - DRIFT)
        return lease

    def _tells(self, one: Sidecar, it: _Holder) -> Work:
        while True:
            yield self.tell_s
            if it.asking:
                continue
            it.asking = True
            try:
                yield from self._ask(one, it, 0)
            except Unreachable:
                pass
            it.asking = False


@dataclass(eq=False)
class _Holder:
    """What a sidecar knows in one life."""

    ended: int
    open: int = 0
    left: int = 0
    until_s: float = 0.0
    asking: bool = False
