"""Lanes in a simulated fleet: the rows of the database, what each sidecar does with them, and what has to hold.

What is simulated of the database is what its transactions do: a round renews what is held and has not run out, and
takes what is due with the next epoch, all by the database's clock; every commit for a lane begins with the check of its
epoch. What a sidecar does is such a round now and then, and delivery of the lanes that it believes it has: it reads
where a lane stands, seals, sends, and settles, each a transaction of its own. Each start has a name of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from support.fleet import Fleet, Sidecar, Unreachable, Work

from sidecar.ledger.lanes import LANES

TICK_S = 0.25  # between two looks at what must hold: pauses and partitions end without anybody saying so


@dataclass(frozen=True, slots=True)
class Row:
    """A lane's lease as it is read. `left_s`: of its time, by the database's clock; it is over at 0."""

    lane: int
    holder: str | None
    epoch: int
    left_s: float


@dataclass(frozen=True, slots=True)
class Step:
    """What to do in a round."""

    renew: Sequence[int] = ()
    take: Sequence[int] = ()
    release: Sequence[int] = ()


class Decide(Protocol):
    def __call__(self, me: str, rows: Sequence[Row], seen_s: Mapping[str, float]) -> Step:
        """`seen_s`: how long ago, by the database's clock, each sidecar has last looked; 0 for `me`."""


def decide(me: str, rows: Sequence[Row], seen_s: Mapping[str, float], *, round_s: float) -> Step:
    """Each who was seen within two rounds has its share, those that hold more the larger ones, so that few lanes move.

    What is free is taken up to the share; beyond it what nobody took for a round, whoever was to have it: a sidecar
    that looked once and died has a share until it is not counted any more.
    """
    held = dict.fromkeys((name for name, age_s in seen_s.items() if age_s <= 2.2 * round_s), 0)
    held.setdefault(me, 0)  # it lives, though it was long waiting for an answer
    for row in rows:
        if row.holder in held and row.left_s > 0:
            held[row.holder] += 1
    order = sorted(held, key=lambda name: (-held[name], name))
    place = order.index(me)
    share = len(rows) // len(held) + (place < len(rows) % len(held))
    mine = [row.lane for row in rows if row.holder == me and row.left_s > 0]
    free = [row for row in rows if row.left_s <= 0]
    # Not all from the same end: two that look at once would want the same ones.
    free.sort(key=lambda row: (row.lane - place * len(rows) // len(held)) % len(rows))
    wanted = free[: max(0, share - len(mine))]
    late = [row for row in free if row.left_s < -round_s and row not in wanted]
    return Step(renew=mine[:share], release=mine[share:], take=[row.lane for row in (*wanted, *late)])


@dataclass(eq=False)
class _Lease:
    holder: str | None = None
    epoch: int = 0
    expires_s: float = 0.0


@dataclass(eq=False)
class _Queue:
    """A lane's tables of delivery: a request that is sealed and not settled, and how far it came."""

    cursor: int = 0
    sealed: int | None = None  # its number
    settled: int = 0


@dataclass(eq=False)
class _Life:
    """What a sidecar knows of one start. `leaving`: lanes that it lets go when their request is settled."""

    me: str
    held: dict[int, int]  # by lane, the epoch
    renewed_s: float = 0.0  # by its own monotonic clock
    leaving: set[tuple[int, int]] = field(default_factory=set)


def name_of(one: Sidecar) -> str:
    """Of this start: who is started again is another holder."""
    return f"{one.name}/{one.life}"


class Broken(AssertionError):
    """What must always hold does not."""


@dataclass(eq=False)
class Lanes:
    """The database's rows, the sidecars' doings, and the watcher.

    `expiry_s`, `round_s`: of leases. `fenced` False: commits are not checked, to show that it would be seen here.
    """

    fleet: Fleet
    decide: Decide
    expiry_s: float
    round_s: float
    fenced: bool = True
    rows: list[_Lease] = field(default_factory=lambda: [_Lease() for _ in range(LANES)])
    queues: list[_Queue] = field(default_factory=lambda: [_Queue() for _ in range(LANES)])
    seen: dict[str, float] = field(default_factory=dict)
    sent: dict[tuple[int, int], list[int]] = field(default_factory=dict)  # of a lane's request: in which epochs
    refused: int = 0  # commits of who is deposed
    owners: dict[tuple[int, int], str] = field(default_factory=dict)  # of each lane and epoch
    held: dict[str, dict[int, int]] = field(default_factory=dict)  # what each believes: by lane, the epoch
    longest_gap_s: float = 0.0  # that a lane was without a holder, while one that could have held it was well
    longest_unfair_s: float = 0.0  # that shares differed by more than one, while the same were well
    _uncovered_s: list[float] = field(default_factory=lambda: [0.0] * LANES)  # since when nobody well holds it
    _fair_s: float = 0.0  # when shares were fair last
    _changed_s: float = 0.0  # when it changed who is well
    _well_s: dict[str, float] = field(default_factory=dict)  # since when

    def __post_init__(self) -> None:
        self.fleet.spawn(None, self._now_and_then())

    # -- the transactions of the database, each at one moment --------------------------------------

    def renew(self, me: str) -> dict[int, int]:
        """Say that `me` is alive, and renew what it holds and has not run out: by lane, the epoch."""
        self.watch()
        self.seen[me] = self.fleet.now_s
        mine = {n: one for n, one in enumerate(self.rows) if one.holder == me and one.expires_s > self.fleet.now_s}
        for lease in mine.values():
            lease.expires_s = self.fleet.now_s + self.expiry_s
        return {lane: lease.epoch for lane, lease in mine.items()}

    def take(self, me: str) -> dict[int, int]:
        """What is due to `me`, with its new epochs."""
        self.watch()
        taken = {}
        for lane in self._due(me).take:
            lease = self.rows[lane]
            if lease.holder is not None and lease.expires_s > self.fleet.now_s:
                continue
            lease.holder, lease.epoch, lease.expires_s = me, lease.epoch + 1, self.fleet.now_s + self.expiry_s
            taken[lane] = lease.epoch
            if self.owners.setdefault((lane, lease.epoch), me) != me:
                raise Broken(f"epoch {lease.epoch} of lane {lane} was given to two")
        return taken

    def surplus(self, me: str) -> Sequence[int]:
        return self._due(me).release

    def _due(self, me: str) -> Step:
        now_s = self.fleet.now_s
        rows = [Row(n, lease.holder, lease.epoch, lease.expires_s - now_s) for n, lease in enumerate(self.rows)]
        return self.decide(me, rows, {name: now_s - at_s for name, at_s in self.seen.items()})

    def release(self, me: str, lane: int, epoch: int) -> None:
        self.watch()
        lease = self.rows[lane]
        if (lease.holder, lease.epoch) == (me, epoch):
            lease.holder, lease.expires_s = None, self.fleet.now_s

    def leave(self, one: Sidecar) -> None:
        """An ending in good order: nobody waits for what it had."""
        me = name_of(one)
        self.seen.pop(me, None)
        for lane, lease in enumerate(self.rows):
            self.release(me, lane, lease.epoch)

    def commit(self, me: str, lane: int, epoch: int, change: Callable[[_Queue, int], None], number: int) -> bool:
        """A transaction of delivery. False: it is deposed, and nothing happened."""
        lease = self.rows[lane]
        if self.fenced and (lease.holder, lease.epoch) != (me, epoch):
            self.refused += 1
            return False
        if self.owners[(lane, lease.epoch)] != me or epoch != lease.epoch:
            raise Broken(f"{me} committed in lane {lane} with epoch {epoch}: it is at {lease.epoch}")
        change(self.queues[lane], number)
        return True

    # -- what must hold --------------------------------------------------------------------------

    def watch(self) -> None:
        """Before a lease changes, and now and then."""
        now_s = self.fleet.now_s
        well = {name for name, one in self.fleet.sidecars.items() if self.fleet.well(one)}
        if well != self._well_s.keys():
            self._changed_s = now_s
            self._well_s = {name: self._well_s.get(name, now_s) for name in well}
        begun_s = min(self._well_s.values(), default=now_s)
        shares = dict.fromkeys((name_of(self.fleet.sidecars[name]) for name in well), 0)
        for lane, lease in enumerate(self.rows):
            if lease.holder in shares and self.held.get(lease.holder, {}).get(lane) == lease.epoch:
                shares[lease.holder] += 1
                self._uncovered_s[lane] = now_s
            else:
                gap_s = now_s - max(self._uncovered_s[lane], begun_s)
                self.longest_gap_s = max(self.longest_gap_s, gap_s)
        if not shares or max(shares.values()) - min(shares.values()) <= 1:
            self._fair_s = now_s
        else:
            self.longest_unfair_s = max(self.longest_unfair_s, now_s - max(self._fair_s, self._changed_s))

    def _now_and_then(self) -> Work:
        while True:
            self.watch()
            yield TICK_S

    # -- what a sidecar does ---------------------------------------------------------------------

    def rounds(self, one: Sidecar) -> Work:
        """Its leases, the whole life long: renew, take what is due, let go what others have a right to."""
        me = name_of(one)
        held = self.held[me] = {}
        it = _Life(me, held)
        yield self.fleet.chance.uniform(0, self.round_s)
        while True:
            began_s = self.fleet.monotonic_s(one)
            try:
                renewed = yield from self.fleet.ask(one, self.renew, me)
                it.renewed_s = began_s
                for lane in [lane for lane, epoch in held.items() if renewed.get(lane) != epoch]:
                    del held[lane]
                for lane in renewed.keys() - held.keys():  # it was taken, and the reply was lost
                    yield from self.fleet.ask(one, self.release, me, lane, renewed[lane])
                taken = yield from self.fleet.ask(one, self.take, me)
                held.update(taken)
                for lane, epoch in taken.items():
                    self.fleet.spawn(one, self.deliver(one, it, lane, epoch))
                it.leaving |= {(lane, held.get(lane, 0)) for lane in (yield from self.fleet.ask(one, self.surplus, me))}
            except Unreachable:
                pass
            took_s = (self.fleet.monotonic_s(one) - began_s) / one.clock_rate
            yield max(0.05, self.round_s * self.fleet.chance.uniform(0.9, 1.1) / one.clock_rate - took_s)

    def deliver(self, one: Sidecar, it: _Life, lane: int, epoch: int) -> Work:
        """One lane, for as long as it is believed to be held: what is sealed goes out, then the next is sealed."""
        queue, me = self.queues[lane], it.me
        while it.held.get(lane) == epoch:
            if (lane, epoch) in it.leaving:
                del it.held[lane]
                try:
                    yield from self.fleet.ask(one, self.release, me, lane, epoch)
                except Unreachable:
                    pass  # it runs out
                return
            if self.fleet.monotonic_s(one) - it.renewed_s > 2 * self.round_s:  # nothing more is begun
                yield 0.5
                continue
            try:
                cursor, number = yield from self.fleet.ask(one, lambda: (queue.cursor, queue.sealed))
                if number is None:
                    if not (yield from self.fleet.ask(one, self.commit, me, lane, epoch, _seal, cursor + 1)):
                        return
                    number = cursor + 1
            except Unreachable:
                yield 0.5
                continue
            yield self.fleet.chance.uniform(0.02, 1.0)  # on its way to the vendor
            self._note_sent(lane, number, epoch)
            while True:  # what the vendor said is known, and is told until it is stored
                try:
                    if not (yield from self.fleet.ask(one, self.commit, me, lane, epoch, _settle, number)):
                        return
                    break
                except Unreachable:
                    yield 0.5

    def _note_sent(self, lane: int, number: int, epoch: int) -> None:
        """A vendor has seen a request: again only by who took over, under the same number and so the same key."""
        epochs = self.sent.setdefault((lane, number), [])
        if epoch in epochs:
            raise Broken(f"request {number} of lane {lane} was sent twice in epoch {epoch}")
        epochs.append(epoch)


def _seal(queue: _Queue, number: int) -> None:
    if (queue.cursor, queue.sealed) == (number, number):
        return  # it was done, and the reply was lost
    if (queue.cursor, queue.sealed) != (number - 1, None):
        raise Broken(f"request {number} was sealed behind {queue.cursor}")
    queue.cursor = queue.sealed = number


def _settle(queue: _Queue, number: int) -> None:
    if queue.sealed is None and queue.cursor == number:
        return
    if queue.sealed != number:
        raise Broken(f"request {number} was settled, and {queue.sealed} is under way")
    queue.sealed, queue.settled = None, queue.settled + 1
