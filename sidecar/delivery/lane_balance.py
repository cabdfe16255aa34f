"""How all lanes of a fleet stand, for whoever wants to know and holds none: who delivers each, where its records are.

    in the ledger = the sum of what is in the lanes
    in the lane = delivered + duplicate + parked{reason} + pending + skipped{reason}      (for each backend of a lane)

The terms come from different places: what is in the ledger from its sidecars' rows, what is in a lane from the number
that its last record got, the rest from the counters that its holders keep. All of it is read in one moment, so that a
difference is one. Nothing is changed, whoever holds the lanes, and also where nobody does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Final

from sidecar.delivery.lane_database import (
    LEASES,
    LEASES_PART,
    LaneReading,
    lanes_read,
    schema_of,
    spool_of,
    told,
)
from sidecar.delivery.queries import DeliveryQueries, Sums, totals_of
from sidecar.delivery.wishes import WAIT_S
from sidecar.ledger.lanes import named
from sidecar.model.balance import BackendTotals, add_totals
from sidecar.storage.postgres import Connection, Postgres, call

_LANES: Final = """
SELECT lane, lanes.last_seq, CASE WHEN leases.expires > clock_timestamp() THEN leases.holder END, (
  SELECT count(*) FROM metering.lane_wishes AS asked
  WHERE asked.lane = lanes.lane AND answer IS NULL AND at > clock_timestamp() - $1::interval)
FROM metering.lanes AS lanes JOIN metering.lane_leases AS leases USING (lane) ORDER BY lane"""
# Of one lane; a backend without a cursor has got nothing yet. The names of columns sort differently, hence COLLATE.
_COUNTERS: Final = """
SELECT {lane}, backend.name, coalesce(cursor.seq, 0), counter.term, counter.reason, counter.n
FROM {schema}.backend AS backend
LEFT JOIN {schema}.cursor AS cursor ON cursor.backend = backend.name COLLATE "C" AND cursor.instance = '{spool}'
LEFT JOIN {schema}.counter AS counter ON counter.cursor = cursor.id AND counter.folded = 0 AND counter.n <> 0
WHERE backend.removed = 0"""
# The first record behind a number. Numbers have no holes, but the oldest go with their day.
_FIRST: Final = """
SELECT t.lane, t.after, (SELECT min(lane_seq) FROM metering.records WHERE lane = t.lane AND lane_seq > t.after)
FROM unnest($1::smallint[], $2::bigint[]) AS t (lane, after)"""

_HOLES: Final = """
SELECT cursor.backend, lanes.last_seq - cursor.seq, (
  SELECT count(*) FROM metering.records WHERE lane = ? AND lane_seq > cursor.seq)
FROM cursor JOIN backend ON backend.name = cursor.backend COLLATE "C" AND backend.removed = 0
JOIN metering.lanes AS lanes ON lanes.lane = ? ORDER BY cursor.backend"""


@dataclass(frozen=True, slots=True, kw_only=True)
class LaneBalance:
    """One lane. `holder`: the sidecar that delivers it now; None: none does."""

    lane: int
    recorded: int  # that are in it, ever
    holder: str | None = None
    asked: int = 0  # changes that its holder, or the next one, has still to make
    backends: Mapping[str, BackendTotals] = field(default_factory=dict)

    @property
    def problems(self) -> list[str]:
        """Each sum that does not come out, in words."""
        found = (totals.problem(name, self.recorded) for name, totals in self.backends.items())
        return [f"lane {self.lane}, {problem}" for problem in found if problem is not None]

    def to_dict(self) -> dict[str, Any]:
        return {
            "lane": self.lane,
            "holder": self.holder,
            "recorded": self.recorded,
            "asked": self.asked,
            "backends": {name: totals.to_dict() for name, totals in self.backends.items()},
            "holds": not self.problems,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class LanesBalance:
    """All of them, of one moment. `in_ledger`: what all sidecars have put into the ledger together."""

    lanes: Sequence[LaneBalance]
    in_ledger: int

    @property
    def recorded(self) -> int:
        return sum(one.recorded for one in self.lanes)

    @property
    def total(self) -> dict[str, BackendTotals]:
        """Each backend's, over the lanes that know it."""
        names = dict.fromkeys(name for one in self.lanes for name in one.backends)
        return {name: add_totals(one.backends[name] for one in self.lanes if name in one.backends) for name in names}

    def recorded_for(self, backend: str) -> int:
        """What is in the lanes that know a backend."""
        return sum(one.recorded for one in self.lanes if backend in one.backends)

    @property
    def holders(self) -> dict[str, list[int]]:
        """Who delivers which, by name."""
        found: dict[str, list[int]] = {}
        for one in self.lanes:
            if one.holder is not None:
                found.setdefault(one.holder, []).append(one.lane)
        return dict(sorted(found.items()))

    @property
    def unheld(self) -> list[int]:
        return [one.lane for one in self.lanes if one.holder is None]

    @property
    def problems(self) -> list[str]:
        found = [problem for one in self.lanes for problem in one.problems]
        if self.recorded != self.in_ledger:
            found.append(
                f"{self.recorded} records are in the lanes, and the sidecars have put {self.in_ledger} into the "
                "ledger: was a part of its database put back, or changed by hand?"
            )
        return found

    @property
    def notes(self) -> list[str]:
        """What an operator has to know of them."""
        pending = sum(totals.pending for one in self.lanes if one.holder is None for totals in one.backends.values())
        waits = f"{pending:,} deliveries wait for one" if pending else "what comes there waits for one"
        return [f"no running sidecar delivers {named(self.unheld)}: {waits}"] if self.unheld else []

    @property
    def holds(self) -> bool:
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """As `balance --format json` has it under `lanes`."""
        backends = {name: {"recorded": self.recorded_for(name)} | one.to_dict() for name, one in self.total.items()}
        return {
            "lanes": [one.to_dict() for one in self.lanes],
            "sum": {"recorded": self.recorded, "backends": backends},
            "in_ledger": self.in_ledger,
            "holders": self.holders,
            "unheld": self.unheld,
            "problems": self.problems,
            "notes": self.notes,
            "holds": self.holds,
        }


def read_lanes(url: str) -> LanesBalance:
    """How they stand now. Blocks. Raises `StateError`."""
    database = Postgres(url, name="metering-sidecar lanes read")
    try:
        with told(f"the lanes in {database.where}"):
            call(database.require(LEASES_PART, LEASES))
            return call(balance_of(database))
    finally:
        call(database.close())


def verify_lanes(url: str) -> list[str]:
    """Count everything again from rows, lane by lane; each difference in words. Blocks. Raises `StateError`."""
    balance = read_lanes(url)
    problems = balance.problems
    with lanes_read(url) as lanes:
        for one, lane in zip(balance.lanes, lanes, strict=True):
            if one.backends:  # else nobody has delivered it yet, and there are no tables
                problems += DeliveryQueries(lane).verify() + _holes(lane)
    return problems


def _holes(lane: LaneReading) -> list[str]:
    """Of what backends have still to get, all has to be there."""
    with lane.reading() as connection:
        rows = connection.execute(_HOLES, (lane.lane, lane.lane)).fetchall()
    return [
        f"lane {lane.lane}, {backend}: of {due} records that it has still to get {due - there} are not in the ledger"
        " any more"
        for backend, due, there in rows
        if due != there
    ]


async def balance_of(database: Postgres) -> LanesBalance:
    """How they stand now. Raises `PostgresError`, also where no sidecar has made the tables yet."""
    async with database.transaction(read_only=True) as db:
        rows = await db.fetch(_LANES, timedelta(seconds=WAIT_S))
        in_ledger = await db.fetchval("SELECT coalesce(sum(records), 0)::bigint FROM metering.instances")
        totals = await _totals(db, {int(row[0]): int(row[1]) for row in rows})
    return LanesBalance(
        lanes=[
            LaneBalance(
                lane=lane,
                recorded=int(recorded),
                holder=None if holder is None else sidecar_of(holder),
                asked=int(asked),
                backends=totals[lane],
            )
            for lane, recorded, holder, asked in rows
        ],
        in_ledger=int(in_ledger),
    )


def sidecar_of(holder: str) -> str:
    """The name of a sidecar, which calls itself anew with each start."""
    return holder.partition("/")[0]


async def _totals(db: Connection, last: Mapping[int, int]) -> dict[int, dict[str, BackendTotals]]:
    """What has become of the records of each lane at each backend. `last`: how many are in it."""
    rows = await db.fetch("SELECT nspname FROM pg_namespace WHERE nspname LIKE 'metering\\_lane\\_%'")
    there = {str(row[0]) for row in rows}
    asked = [
        _COUNTERS.format(lane=lane, schema=schema_of(lane), spool=spool_of(lane))
        for lane in last
        if schema_of(lane) in there
    ]
    counted = await db.fetch("\nUNION ALL".join(asked)) if asked else []
    sums: dict[tuple[int, str], Sums] = {}
    for lane, backend, seq, term, reason, n in counted:
        one = sums.setdefault((lane, backend), Sums())
        if term is not None:
            one.places[(term, reason)] = int(n)
        if seq < last[lane] and not one.behind:
            one.behind.append((spool_of(lane), int(seq), last[lane]))
    places = [(lane, one.behind[0][1]) for (lane, _), one in sums.items() if one.behind]
    found = await db.fetch(_FIRST, [lane for lane, _ in places], [after for _, after in places]) if places else []
    first = {(spool_of(lane), int(after)): number for lane, after, number in found}

    def count(instance: str, after: int, upto: int) -> int:
        number = first[(instance, after)]
        return 0 if number is None else max(0, upto - int(number) + 1)

    totals: dict[int, dict[str, BackendTotals]] = {lane: {} for lane in last}
    for (lane, backend), one in sorted(sums.items()):
        totals[lane][backend] = totals_of(one, count)
    return totals
