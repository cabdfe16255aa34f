"""Who delivers which lane: a lease a lane, in the database that all sidecars share, by the database's clock.

A sidecar that is alive says so each round, renews the lanes that it holds, gives back what it has beyond its share and
takes what is free, up to its share. `plan` decides, from one moment's rows alone; `Leases` reads and writes them. The
epoch of a lane grows with each change of its holder, and every step of a holder compares it (`lane_database`), so a
lease that is believed for too long does no harm: clocks of sidecars matter to nothing here.

No lane waits for another: who holds a lane renews it whatever is being stored of it, and a lane that is being written
to while it is taken is left for the next round.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Final

from sidecar.delivery.lane_database import LEASES, LEASES_PART, SILENT, Held
from sidecar.ledger.lanes import LANES
from sidecar.storage.postgres import Connection, Postgres

log = logging.getLogger(__name__)

LEASE_S: Final = 10.0  # how long a lane lies still when its holder dies
RENEW_S: Final = 3.0  # three chances to renew before it runs out
# How long a sidecar that says nothing any more keeps its share: a round may be late, or missed. One that lives and is
# not counted for a moment loses nothing, since what is not free is not taken.
MEMBER_S: Final = 2.2 * RENEW_S
_LEASE: Final = timedelta(seconds=LEASE_S)
_MEMBER: Final = timedelta(seconds=MEMBER_S)


@dataclass(frozen=True, slots=True)
class Lease:
    """A lane, as its row says. `runs`: it has not run out."""

    lane: int
    holder: str | None
    epoch: int
    runs: bool


@dataclass(frozen=True, slots=True)
class Plan:
    """What one sidecar does next."""

    keep: tuple[int, ...] = ()
    give: tuple[int, ...] = ()  # back, so that others have their share
    take: tuple[int, ...] = ()


def share_of(me: str, alive: Collection[str], lanes: int = LANES) -> int:
    """How many lanes are this sidecar's: as many as everybody's, and one more for the first so many by name."""
    names = sorted({*alive, me})
    each, over = divmod(lanes, len(names))
    return each + (names.index(me) < over)


def plan(me: str, leases: Sequence[Lease], alive: Collection[str]) -> Plan:
    """`alive`: who has said so lately. Each counts on the others to come to the same shares, and whoever knows less
    than they do is corrected by the rows: what is not free is not taken."""
    share = share_of(me, alive, len(leases))
    mine = [lease.lane for lease in leases if lease.holder == me and lease.runs]
    free = [lease.lane for lease in leases if not (lease.holder is not None and lease.runs)]
    # Those who see the same lanes free begin at different ones.
    names = sorted({*alive, me})
    begin = names.index(me) * len(free) // len(names)
    order = free[begin:] + free[:begin]
    keep, give = mine[:share], mine[share:]
    return Plan(tuple(keep), tuple(give), tuple(sorted(order[: share - len(keep)])))


@dataclass(slots=True)
class Leases:
    """One sidecar's part in it. `me`: its name, which no other bears."""

    database: Postgres
    me: str
    held: dict[int, Held] = field(default_factory=dict)
    unheld: int = 0  # lanes that were nobody's when all were looked at last

    async def round(self) -> Mapping[int, Held]:
        """Renew, and take what is due; what is held now, by lane. What is to be given back stays held until `release`.
        Raises `PostgresError`, as its two halves do."""
        await self.renew()
        return await self.take()

    async def renew(self) -> Mapping[int, Held]:
        """Say that this one is alive, and renew what it holds; what that is now. Raises `PostgresError`; what is held
        then is still held for as long as the leases run, which only the database knows."""
        async with self._step() as db:
            await db.execute(
                "INSERT INTO metering.lane_members (holder, expires) VALUES ($1, clock_timestamp() + $2)"
                " ON CONFLICT (holder) DO UPDATE SET expires = excluded.expires",
                self.me,
                _MEMBER,
            )
            renewed = await db.fetch(
                "UPDATE metering.lane_leases SET expires = clock_timestamp() + $2"
                " WHERE holder = $1 AND expires > clock_timestamp() RETURNING lane, epoch",
                self.me,
                _LEASE,
            )
            found = {int(lane): int(epoch) for lane, epoch in renewed}
        self.held = {lane: one for lane, one in self.held.items() if found.get(lane) == one.epoch}
        for lane in found.keys() - self.held.keys():
            # Of a run before this one under the same name: its epoch is over, and so is whatever it believed.
            await self._give(Held(lane, self.me, found[lane]))
        return dict(self.held)

    async def take(self) -> Mapping[int, Held]:
        """Take what is free and due; what is held now."""
        async with self._step() as db:
            due = plan(self.me, await _leases(db), await _alive(db))
            taken = await _take(db, due.take, self.me) if due.take else {}
        self.held |= {lane: Held(lane, self.me, epoch) for lane, epoch in taken.items()}
        return dict(self.held)

    async def surplus(self) -> tuple[int, ...]:
        """Lanes that others have a right to: to be finished with, and released."""
        async with self.database.transaction(read_only=True) as db:
            leases = await _leases(db)
            due = plan(self.me, leases, await _alive(db))
        self.unheld = sum(lease.holder is None or not lease.runs for lease in leases)
        return due.give

    async def release(self, held: Held) -> None:
        """Give a lane back, whose work has ended."""
        if self.held.get(held.lane) == held:  # else it was lost meanwhile, and may have been taken anew
            del self.held[held.lane]
        await self._give(held)

    async def leave(self) -> None:
        """Give all back, and be counted no more."""
        for held in list(self.held.values()):
            await self.release(held)
        async with self._step() as db:
            await db.execute("DELETE FROM metering.lane_members WHERE holder = $1", self.me)

    async def prepare(self) -> None:
        """The tables, if need be."""
        await self.database.migrate(LEASES_PART, LEASES)

    async def _give(self, held: Held) -> None:
        async with self._step() as db:
            await db.execute(
                "UPDATE metering.lane_leases SET holder = NULL, expires = NULL"
                " WHERE lane = $1 AND holder = $2 AND epoch = $3",
                held.lane,
                self.me,
                held.epoch,
            )

    @contextlib.asynccontextmanager
    async def _step(self) -> AsyncIterator[Connection]:
        """A transaction that the server ends where we fall silent in it: rows of leases are everybody's."""
        async with self.database.transaction() as db:
            await db.execute(SILENT)
            yield db


async def _leases(db: Connection) -> list[Lease]:
    rows = await db.fetch(
        "SELECT lane, holder, epoch, coalesce(expires > clock_timestamp(), false) FROM metering.lane_leases"
        " ORDER BY lane"
    )
    return [Lease(*row) for row in rows]


async def _alive(db: Connection) -> list[str]:
    rows = await db.fetch("SELECT holder FROM metering.lane_members WHERE expires > clock_timestamp()")
    return [str(row[0]) for row in rows]


async def _take(db: Connection, lanes: Sequence[int], me: str) -> dict[int, int]:
    """The new epochs of those that were still free. One of which somebody is storing a step, its holder of before as a
    rule, is not waited for: it may hang, and other lanes are not to lie still for that."""
    rows = await db.fetch(
        "WITH free AS (SELECT lane FROM metering.lane_leases WHERE lane = ANY($1)"
        " AND (holder IS NULL OR expires < clock_timestamp()) ORDER BY lane FOR UPDATE SKIP LOCKED)"
        " UPDATE metering.lane_leases AS one SET holder = $2, epoch = one.epoch + 1, expires = clock_timestamp() + $3"
        " FROM free WHERE one.lane = free.lane RETURNING one.lane, one.epoch",
        list(lanes),
        me,
        _LEASE,
    )
    return {int(lane): int(epoch) for lane, epoch in rows}
