"""The counters of all limits, in the hands of one owner: what was settled, what is out, and what is left.

A process that serves is granted *allowance*: for a call that it asked for, and a little more (a lease) where there is
plenty, so that the next calls need no question. What it was granted and has not told the end of is *out*. Both kinds
are one sum for each process and counter: the record of a call brings back what was reserved for it, a process tells
now and then what its open calls hold (which takes the place of the sum, and so ends its leases), and one that died
holds nothing. What must always hold:

- settled + out <= amount whenever a call of a blocking limit is let in; what it really takes may go over that once.
- All limits that a call falls under are decided in one step: where one denies, nothing is taken of any.
- A call is settled once, into the period that it was let in in.
- Nothing here is kept on a disk. `settle` is given each record, at its end or read again after a restart.

Where many sidecars share their limits, a counter has a `Share`: what is left is what this sidecar holds a lease of.

Times are Unix nanoseconds and come in as arguments.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from sidecar.gate.limits import Action, Charge, Limit
from sidecar.gate.shares import Share
from sidecar.gate.windows import FOREVER_NS, SECOND_NS, Calendar, Sliding, Window

LEASE_PARTS: Final = 50  # a lease is at most this part of what is left
SHARED_PARTS: Final = 8  # the same of what this sidecar holds a lease of, which is a small part of all already
LEASE_CALLS_MAX: Final = 256  # and at most so many calls of the size of the one that asked
HELD_MAX: Final = 1 << 62  # for one call, and leased beside it: a record has it in 64 bits
LATE_NS: Final = 3600 * SECOND_NS  # how long a counter is kept after its period: calls that were let in in it still end
SWEEP_S: Final = 60.0
AHEAD_S: Final = 3600.0  # so long, by its own timer, nothing is forgotten that a clock set back would ask for again
WARN_PERCENT: Final = 80
ALLOWED: Final = "allowed"
DENIED: Final = "denied"
SHADOW: Final = "shadow"
UNDECIDED: Final = "undecided"  # of a call whose client left before


@dataclass(slots=True, eq=False)
class Counter:
    """Of one limit, scope and period; a sliding window has one for ever."""

    limit: Limit
    key: str
    scope: str
    end_ns: int
    settled: int = 0
    out: int = 0  # granted to all processes together
    parts: dict[int, int] = field(default_factory=dict)  # of a sliding window
    told_percent: int = 0
    share: Share | None = None

    def used(self, at_ns: int) -> int:
        """What is settled and counts at that moment."""
        sliding = self.limit.sliding
        return self.settled if sliding is None else sliding.total(self.parts, at_ns)

    def left(self, at_ns: int) -> int:
        """How much may still be granted at that moment, in the limit's unit; below zero where more than that was
        used."""
        share = self.share
        if share is None:
            return self.limit.amount - self.used(at_ns) - self.out
        if share.blocks:
            return share.left - self.out
        return self.limit.amount - self.used(at_ns) - share.others_settled - share.others_leased - self.out

    @property
    def is_used_up(self) -> bool:
        """Until its period ends."""
        limit = self.limit
        others = 0 if self.share is None else self.share.others_settled
        return limit.sliding is None and limit.unit != "concurrent" and self.settled + others >= limit.amount

    def add(self, amount: int, at_ns: int) -> None:
        """Settle so much, in the limit's unit, as of that moment (Unix nanoseconds)."""
        if self.share is not None:
            self.share.unpublished += amount
            self.share.dirty = True
        sliding = self.limit.sliding
        if sliding is None:
            self.settled += amount
        else:
            part = sliding.part(at_ns)
            self.parts[part] = self.parts.get(part, 0) + amount


class Need(NamedTuple):
    """What a call may add to one limit's counter."""

    limit: str
    scope: str
    amount: int


class Decision(NamedTuple):
    """`held`: by counter, what is reserved for the call; `more`: by counter, the lease beside it."""

    decision: str
    limit: str | None = None
    held: Mapping[str, int] = {}
    more: Mapping[str, int] = {}
    full: Sequence[str] = ()  # counters that stay used up until their period ends
    retry_after_s: float | None = None
    leased_to: Sequence[str] = ()  # denied: who else may have something left of it


class Row(NamedTuple):
    """Where one counter stands, for `limits`."""

    limit: Limit
    scope: str
    used: int
    reserved: int
    until_ns: int | None
    here: tuple[int, int] | None = None  # of these by this sidecar, where limits are shared: used, and its lease
    by: Mapping[str, tuple[int, int]] = {}  # the same of each sidecar, by its name


class Counters:
    """`decide`, `settle`; `holding` and `gone` for what is out."""

    def __init__(
        self,
        limits: Sequence[Limit],
        *,
        dry_run: bool = False,
        leases: bool = True,
        reached: Callable[[Counter, int], None] | None = None,
        shared: Callable[[], float] | None = None,
    ) -> None:
        """`dry_run`: no limit blocks. `leases`: False: each call is asked for. `reached`: told once that a counter
        came to so many percent. `shared`: with other sidecars; the clock of their leases, in seconds."""
        self._shared = shared
        self.shift_ns = 0
        """By how much the clock that calendars go by is ahead of the one that times are of: where limits are shared it
        is the database's, so that a period begins for all sidecars at once."""
        self.limits = {limit.name: limit for limit in limits}
        self._dry_run = dry_run
        self._leases = leases
        self._reached = reached
        self._counters: dict[str, Counter] = {}
        self._out: dict[str, dict[str, int]] = {}  # by process, then by counter
        self._leased: dict[str, set[str]] = {}  # by counter: who was given a lease since it last told
        self._swept: deque[int] = deque(maxlen=int(AHEAD_S / SWEEP_S) + 2)  # when, as the clock said

    def decide(self, process: str, needs: Sequence[Need], at_ns: int) -> Decision:
        """Whether a call that needs so much may go, and what it takes of which counter. Raises `KeyError` for a limit
        that is not known."""
        found = [(self._counter_of(need, at_ns), need.amount) for need in needs]
        verdict, name, full = ALLOWED, None, []
        for counter, _ in found:
            if counter.left(at_ns) > 0:
                continue
            limit = counter.limit
            if counter.is_used_up:
                full.append(counter.key)
            if limit.action is Action.BLOCK and not self._dry_run:
                wait_s = self.wait_s(counter, at_ns)
                leased = sorted(self._leased.get(counter.key, ()))
                return Decision(DENIED, limit.name, full=full, leased_to=leased, retry_after_s=wait_s)
            if limit.action is not Action.WARN and verdict is ALLOWED:
                verdict, name = SHADOW, limit.name
        held: dict[str, int] = {}
        more: dict[str, int] = {}
        for counter, amount in found:
            left = counter.left(at_ns)
            # A call that may need more than is left takes the rest and goes: the last one is let in, not turned away.
            reserved = min(amount, left) if left > 0 else amount
            held[counter.key] = reserved
            share = counter.share
            parts = SHARED_PARTS if share is not None and share.blocks else LEASE_PARTS
            lease = 0
            if left > 0 and self._leases:
                lease = min((left - reserved) // parts, amount * LEASE_CALLS_MAX, HELD_MAX)
            if lease >= amount > 0:
                more[counter.key] = lease
                self._leased.setdefault(counter.key, set()).add(process)
            self._grant(process, counter, reserved + more.get(counter.key, 0))
            if share is not None:
                share.taken += reserved + more.get(counter.key, 0)
                share.peak = max(share.peak, counter.out)
        return Decision(verdict, name, held, more, full)

    def lacking(self, needs: Sequence[Need], at_ns: int) -> list[tuple[Counter, int]]:
        """Of which counters more has to be leased before such a call can be decided, and how much it needs of them."""
        found = []
        for need in needs:
            counter = self._counter_of(need, at_ns)
            if counter.share is None or not counter.share.blocks or counter.is_used_up:
                continue
            if counter.left(at_ns) < max(need.amount, 1):
                found.append((counter, max(need.amount, 1)))
        return found

    def low(self, needs: Sequence[Need], at_ns: int) -> list[Counter]:
        """Those of which more should be leased before it runs out."""
        found = [self._counter_of(need, at_ns) for need in needs]
        return [counter for counter in found if counter.share and counter.left(at_ns) < counter.share.low]

    def all(self) -> list[Counter]:
        return list(self._counters.values())

    def wait_s(self, counter: Counter, at_ns: int) -> float | None:
        """How long until some of it is free again, where that is known and is a matter of waiting."""
        limit = counter.limit
        if not limit.is_rate:
            return None
        if limit.unit == "concurrent":
            return 1.0
        window = limit.window
        if isinstance(window, Sliding):
            return max(window.less_at_ns(counter.parts, at_ns) - at_ns, 0) / SECOND_NS
        return max(counter.end_ns - at_ns - self.shift_ns, 0) / SECOND_NS

    def settle(self, process: str, charges: Iterable[Charge], at_ns: int, now_ns: int = FOREVER_NS) -> None:
        """A call has ended. `at_ns`: when it was let in; `now_ns`: the clock may have been set back since."""
        for charge in charges:
            counter = self._counter(charge.limit, charge.key, charge.scope, at_ns + self.shift_ns)
            if charge.reserved:
                self._give_back(process, counter, charge.reserved)
            if charge.amount:
                counter.add(charge.amount, min(at_ns, now_ns))
                if self._reached is not None:
                    self._tell(counter, at_ns)

    def holding(self, process: str, sums: Mapping[str, int], at_ns: int) -> None:
        """What a process's open calls hold, all of it; nothing else is out to it."""
        self.gone(process)
        for key, amount in sums.items():
            counter = self.by_key(key, at_ns)
            if counter is not None and amount > 0:
                self._grant(process, counter, amount)

    def gone(self, process: str) -> None:
        """It holds nothing any more."""
        for key, amount in self._out.pop(process, {}).items():
            counter = self._counters.get(key)
            if counter is not None:
                counter.out -= amount
        for key in [key for key, leased in self._leased.items() if process in leased]:
            self._leased[key].discard(process)
            if not self._leased[key]:
                del self._leased[key]

    def absorb(self, found: Counters) -> None:
        """Add what others have settled."""
        for key, counter in found._counters.items():
            mine = self._counter(counter.limit, key, counter.scope, 0)
            mine.end_ns = counter.end_ns
            mine.settled += counter.settled
            if mine.share is not None:
                mine.share.dirty = True
            for part, amount in counter.parts.items():
                mine.parts[part] = mine.parts.get(part, 0) + amount

    def set_back(self, now_ns: int) -> None:
        """The clock was set back, or may be behind the one that records were made by. What a sliding window has of
        later than now is of now. A calendar's periods have their names: what was used of a later one counts in that."""
        for counter in self._counters.values():
            sliding = counter.limit.sliding
            if sliding is not None and sliding.set_back(counter.parts, now_ns) and counter.share is not None:
                counter.share.dirty = True

    def sweep(self, at_ns: int) -> None:
        """Forget counters that nothing can ask for any more. To be called every `SWEEP_S` by a timer that no setting of
        the clock changes: one that is ahead for a while must not make it forget what is used of the true period."""
        self._swept.append(at_ns)
        earliest_ns = {name: self._earliest_ns(limit) for name, limit in self.limits.items()}
        for key, counter in list(self._counters.items()):
            sliding, at_ns = counter.limit.sliding, earliest_ns[counter.limit.name]
            if sliding is not None:
                oldest = sliding.part(at_ns) - 2 * 60
                counter.parts = {part: amount for part, amount in counter.parts.items() if part >= oldest}
                over = not counter.parts
            else:
                late = counter.end_ns + LATE_NS < at_ns + self.shift_ns
                over = late or not (counter.settled or counter.limit.unit != "concurrent")
            share = counter.share
            if over and not counter.out and not (share is not None and (share.dirty or share.told or share.demand)):
                del self._counters[key]

    def _earliest_ns(self, limit: Limit) -> int:
        """That the clock has said, as far back as that can matter to this limit."""
        sweeps = int(min(limit.reaches_back_s, AHEAD_S) / SWEEP_S) + 2
        return min(list(self._swept)[-sweeps:])

    def rows(self, at_ns: int) -> list[Row]:
        """All counters whose period is now, in the order of the limits, those that used most first."""
        found: dict[str, list[Row]] = {name: [] for name in self.limits}
        for counter in self._counters.values():
            if counter.end_ns <= (now_ns := at_ns + self.shift_ns):
                continue
            if counter.limit.key(counter.scope, now_ns) != counter.key:
                continue  # of a period that is still to come, by a clock that was set back
            found[counter.limit.name].append(self._row(counter, at_ns))
        return [row for rows in found.values() for row in sorted(rows, key=lambda r: (-r.used - r.reserved, r.scope))]

    def end_ns(self, limit: Limit, key: str, scope: str, at_ns: int) -> int | None:
        """When a counter's period ends; None: that is not the one that is now."""
        if limit.key(scope, at_ns) != key:
            return None
        return _end_ns(limit.window, key, at_ns)

    def row(self, limit: str, needs: Sequence[Need], at_ns: int) -> Row | None:
        """Where the counter of this limit stands that such a call falls under."""
        counter = next((self._counter_of(need, at_ns) for need in needs if need.limit == limit), None)
        return None if counter is None else self._row(counter, at_ns)

    def settled(self, key: str, at_ns: int) -> int:
        counter = self._counters.get(key)
        return 0 if counter is None else counter.used(at_ns)

    def reserved(self, key: str) -> int:
        counter = self._counters.get(key)
        return 0 if counter is None else counter.out

    def __repr__(self) -> str:
        return f"<Counters: {len(self._counters)} of {len(self.limits)} limits, {len(self._out)} processes>"

    @staticmethod
    def _row(counter: Counter, at_ns: int) -> Row:
        until_ns = None if counter.end_ns >= FOREVER_NS else counter.end_ns
        used, share = counter.used(at_ns), counter.share
        if share is None:
            return Row(counter.limit, counter.scope, used, counter.out, until_ns)
        held = max(counter.out, share.left)
        return Row(
            counter.limit,
            counter.scope,
            used + share.others_settled,
            held + share.others_leased,
            until_ns,
            (used, held),
        )

    def _counter_of(self, need: Need, at_ns: int) -> Counter:
        limit = self.limits[need.limit]
        at_ns += self.shift_ns
        return self._counter(limit, limit.key(need.scope, at_ns), need.scope, at_ns)

    def _counter(self, limit: Limit, key: str, scope: str, at_ns: int) -> Counter:
        counter = self._counters.get(key)
        if counter is None:
            end_ns = _end_ns(limit.window, key, at_ns)
            share = None
            if self._shared is not None:
                share = Share(limit.action is Action.BLOCK and not self._dry_run, self._shared)
            counter = self._counters[key] = Counter(limit, key, scope, end_ns, share=share)
        return counter

    def by_key(self, key: str, at_ns: int) -> Counter | None:
        """None: of a limit that there is no more."""
        name, _, rest = key.partition("|")
        limit = self.limits.get(name)
        return None if limit is None else self._counter(limit, key, rest.rpartition("|")[0], at_ns + self.shift_ns)

    def _grant(self, process: str, counter: Counter, amount: int) -> None:
        counter.out += amount
        out = self._out.setdefault(process, {})
        out[counter.key] = out.get(counter.key, 0) + amount

    def _give_back(self, process: str, counter: Counter, amount: int) -> None:
        """Never more than is out: what was granted in a life before this one is not."""
        out = self._out.get(process)
        have = 0 if out is None else out.get(counter.key, 0)
        back = min(amount, have)
        if out is None or not back:
            return
        counter.out -= back
        if have == back:
            del out[counter.key]
        else:
            out[counter.key] = have - back

    def _tell(self, counter: Counter, at_ns: int) -> None:
        amount, used = counter.limit.amount, counter.used(at_ns)
        if counter.share is not None:
            used += counter.share.others_settled
        for percent in (100, WARN_PERCENT):
            if used * 100 >= amount * percent:
                if counter.told_percent < percent:
                    counter.told_percent = percent
                    assert self._reached is not None
                    self._reached(counter, percent)
                return
        if counter.limit.sliding is not None:
            counter.told_percent = 0


def _end_ns(window: Window, key: str, at_ns: int) -> int:
    """Of the period that a counter's key names, which two clocks that are apart, or a call that ends late, make another
    one than that of `at_ns`."""
    if not isinstance(window, Calendar):
        return FOREVER_NS
    return (window.named(key.rpartition("|")[2], at_ns) or window.period(at_ns)).end_ns
