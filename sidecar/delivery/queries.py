"""Counting and listing the state of delivery, through a connection that cannot write.

The totals come from the counters that every transaction keeps; `verify` counts the same again from rows alone
and says where the two differ. Counting goes through a spool in windows of record numbers, so that
memory stays flat. Everything here blocks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol

import orjson

from sidecar.delivery.database import Connection, FileReading, Reading
from sidecar.delivery.rows import Parked, Run
from sidecar.delivery.types import Fate, SpoolReader, Term, worst
from sidecar.model.balance import BackendTotals

WINDOW_RECORDS: Final = 20_000  # of one cursor counted at a time: some 10 MB
FIND_REQUESTS: Final = 10_000  # searched in one read, so that no log has to be kept for the whole search
PAGE: Final = 500  # parked events read at a time

Place = tuple[str, str]  # term, reason


@dataclass(slots=True)
class Found:
    """Where an event with a given id went."""

    backend: str
    instance: str
    seq: int
    record_id: str
    event_id: str
    key: str
    fate: str  # a term, or `open`
    sealed_at_s: float  # 0: not known
    request: int  # 0: none, it is in the sums of a backend that adds up
    cursor: int


@dataclass(slots=True)
class Sums:
    """One backend's counters up to some record, and what the spool has to be asked for the rest."""

    places: Counter[Place] = field(default_factory=Counter)
    behind: list[tuple[str, int, int]] = field(default_factory=list)  # instance, after, up to: pending there


@dataclass(slots=True)
class Record:
    """The events of one record by place, counted from rows."""

    pending: int = 0
    delivered: int = 0
    duplicate: int = 0
    skipped: str | None = None
    parked: list[str] = field(default_factory=list)

    @property
    def place(self) -> Place | None:
        if not (self.pending or self.delivered or self.duplicate or self.parked):
            return None if self.skipped is None else (Term.SKIPPED.value, self.skipped)
        term = worst(parked=len(self.parked), pending=self.pending, delivered=self.delivered, duplicate=self.duplicate)
        return term.value, min(self.parked) if term is Term.PARKED else ""


def totals_of(sums: Sums, count: Callable[[str, int, int], int]) -> BackendTotals:
    """One backend's side of the balance. `count` asks the spool for what lies behind a cursor."""
    plain: Counter[str] = Counter()
    parked: dict[str, int] = {}
    skipped: dict[str, int] = {}
    for (term, reason), n in sums.places.items():
        if n == 0:
            continue
        if term == Term.PARKED.value:
            parked[reason] = n
        elif term == Term.SKIPPED.value:
            skipped[reason] = n
        else:
            plain[term] += n
    behind = sum(count(instance, after, upto) for instance, after, upto in sums.behind)
    return BackendTotals(
        delivered=plain[Term.DELIVERED.value],
        duplicate=plain[Term.DUPLICATE.value],
        pending=plain[Term.OPEN.value] + behind,
        parked=parked,
        skipped=skipped,
    )


class DeliveryQueries:
    """The state of delivery, open for reading."""

    def __init__(self, database: Reading) -> None:
        self._database = database
        self._reading, self._apart = database.reading, database.apart

    @classmethod
    def open(cls, path: Path) -> DeliveryQueries:
        """Of the file."""
        return cls(FileReading(path))

    def close(self) -> None:
        self._database.close()

    def backends(self) -> list[str]:
        """Those that delivery worked for when it last started."""
        with self._reading() as conn:
            return [name for (name,) in conn.execute("SELECT name FROM backend WHERE removed = 0 ORDER BY name")]

    def cursors(self, backend: str) -> dict[str, int]:
        """How far a backend is in each instance's spool."""
        with self._reading() as conn:
            return dict(conn.execute("SELECT instance, seq FROM cursor WHERE backend = ?", (backend,)).fetchall())

    # --- the balance ------------------------------------------------------------------------------

    def sums(self, backends: Sequence[str], upto: Mapping[str, int]) -> dict[str, Sums]:
        """Each backend's counters, without the records behind `upto`: one read transaction."""
        result = {name: Sums() for name in backends}
        with self._reading() as conn:
            seen: dict[str, set[str]] = {name: set() for name in backends}
            for cursor, backend, instance, seq, folded in _cursors(conn):
                if backend not in result or instance not in upto:
                    continue
                seen[backend].add(instance)
                sums = result[backend]
                sums.places.update(_counters(conn, cursor, folded=0))
                limit = upto[instance]
                if seq > limit:
                    sums.places.subtract(_recount(conn, cursor, max(limit, folded), seq))
                elif seq < limit:
                    sums.behind.append((instance, seq, limit))
        for name, sums in result.items():
            sums.behind.extend((instance, 0, limit) for instance, limit in upto.items() if instance not in seen[name])
        return result

    def parked_now(self) -> dict[tuple[str, str], int]:
        """Records parked, by backend and reason, removed backends included."""
        result: Counter[tuple[str, str]] = Counter()
        with self._reading() as conn:
            for backend, reason, n in conn.execute(
                "SELECT backend, reason, n FROM counter JOIN cursor ON cursor.id = counter.cursor"
                " WHERE folded = 0 AND term = ? AND n != 0",
                (Term.PARKED.value,),
            ):
                result[(backend, reason)] += n
        return dict(result)

    def verify(self) -> list[str]:
        """Count everything again from rows. Returns each difference in words; empty when all is well."""
        problems: list[str] = []
        with self._apart(moment=True) as conn:
            for cursor, backend, instance, seq, folded in _cursors(conn):
                kept = _counters(conn, cursor, folded=0)
                rows = _counters(conn, cursor, folded=1)
                rows.update(_recount(conn, cursor, folded, seq))
                rows.update(_left_over(conn, cursor, folded))
                for place in sorted(kept.keys() | rows.keys()):
                    if kept[place] != rows[place]:
                        name = " ".join(filter(None, place))
                        problems.append(
                            f"{backend}, instance {instance}: the counter of {name} says {kept[place]},"
                            f" the rows {rows[place]}"
                        )
                problems += [
                    f"{backend}, instance {instance}: {text}" for text in _contradictions(conn, cursor, folded)
                ]
        return problems

    def ahead_of(self, reader: SpoolReader) -> list[str]:
        """Where delivery has been further than the spool goes: records were lost together with their file."""
        with self._reading() as conn:
            cursors = _cursors(conn)
        return [
            f"{backend}, instance {instance}: delivered up to record {seq}, but the spool ends at {last}:"
            f" {seq - last} record numbers were lost with its file"
            for _, backend, instance, seq, _ in cursors
            if seq > (last := reader.last_seq(instance))
        ]

    # --- looking things up ------------------------------------------------------------------------

    def parked(
        self,
        *,
        backend: str | None = None,
        reason: str | None = None,
        ids: Sequence[str] | None = None,
        since_s: float | None = None,
        after: int = 0,
        limit: int = PAGE,
        bodies: bool = True,
    ) -> list[Parked]:
        """Parked events in the order of their parking, a page at a time (`after` is the last one's id)."""
        where: list[str] = ["parked.id > ?"]
        values: list[object] = [after]
        for clause, value in (
            ("cursor.backend = ?", backend),
            ("parked.reason = ?", reason),
            ("parked.at_s >= ?", since_s),
        ):
            if value is not None:
                where.append(clause)
                values.append(value)
        if ids is not None:
            marks = ", ".join("?" * len(ids))
            where.append(f"(parked.record_id IN ({marks}) OR parked.event_id IN ({marks}))")
            values += [*ids, *ids]
        body = "payload.body" if bodies else "NULL"
        with self._reading() as conn:
            rows = conn.execute(
                "SELECT parked.id, cursor.id, backend, instance, parked.seq, record_id, event_id, reason, maybe_taken,"
                f" at_s, key, generation, parked.request, line, {body}, history FROM parked"
                " JOIN cursor ON cursor.id = parked.cursor LEFT JOIN payload ON payload.request = parked.request"
                f" WHERE {' AND '.join(where)} ORDER BY parked.id LIMIT ?",
                (*values, limit),
            ).fetchall()
        return [
            Parked(
                id=r[0],
                cursor=r[1],
                backend=r[2],
                instance=r[3],
                seq=r[4],
                record_id=r[5],
                event_id=r[6],
                reason=r[7],
                maybe_taken=bool(r[8]),
                at_s=r[9],
                key=r[10],
                generation=r[11],
                request=r[12],
                line=r[13],
                body=r[14],
                history=tuple(orjson.loads(r[15])),
            )
            for r in rows
        ]

    def last_parked(self) -> int:
        """The number of the last event that was parked."""
        with self._reading() as conn:
            return int(conn.execute("SELECT coalesce(max(id), 0) FROM parked").fetchone()[0])

    def find(self, one: str, reader: SpoolReader | None = None) -> list[Found]:
        """Every event with this id or of this record that is remembered: for complaints and cancellations.

        A plain scan: ids of delivered events are kept for the retention (until `fold`) but not indexed, because an
        index over random ids would cost every delivery more than a rare question may. Of a backend that adds up only
        numbers are kept, so its records are looked for in the spool, where `reader` is given.
        """
        needle = f'"{one}"'.encode()
        found: list[Found] = []
        with self._apart() as conn:
            (last,) = conn.execute("SELECT coalesce(max(id), 0) FROM sealed").fetchone()
            for after in range(0, last, FIND_REQUESTS):
                for backend, instance, request, key, at_s, fates, blob, cursor in conn.execute(
                    "SELECT backend, instance, sealed.id, key, at_s, fates, members, cursor FROM sealed"
                    " JOIN cursor ON cursor.id = sealed.cursor"
                    " WHERE sealed.id > ? AND sealed.id <= ? AND instr(members, ?) > 0 ORDER BY sealed.id",
                    (after, after + FIND_REQUESTS, needle),
                ):
                    for index, row in enumerate(orjson.loads(blob)):
                        if one in (row[1], row[-1]):
                            fate = "open" if fates is None else _FATES[fates[index]]
                            event = (backend, instance, row[0], row[1], row[-1])
                            found.append(Found(*event, key, fate, at_s, request, cursor))
        return found if reader is None else found + self._find_applied(one, reader)

    def _find_applied(self, one: str, reader: SpoolReader) -> list[Found]:
        found = []
        with self._apart() as conn:
            summed = conn.execute(
                "SELECT id, backend, instance, folded_seq FROM cursor"
                " WHERE EXISTS(SELECT 1 FROM applied WHERE cursor = cursor.id) ORDER BY id"
            ).fetchall()
            seqs = {i: _seqs_of(one, reader, i, min(r[3] for r in summed if r[2] == i)) for i in {r[2] for r in summed}}
            for cursor, backend, instance, _ in summed:
                for seq in seqs[instance]:
                    for run in runs_between(conn, cursor, seq - 1, seq):
                        fate = "duplicate" if run.duplicate else "delivered"
                        found.append(Found(backend, instance, seq, one, one, "", fate, 0.0, 0, cursor))
        return found


class _LooksUp(Protocol):
    """Delivery at work, or its books alone."""

    def parked(self, *, ids: Sequence[str] | None, limit: int) -> list[Parked]: ...
    def find(self, one: str, /) -> list[Found]: ...


def whereabouts(books: _LooksUp, one: str) -> str:
    """What is known of an id that is not among the parked events that were chosen."""
    parked = books.parked(ids=[one], limit=1)
    if parked:
        return f"parked at {parked[0].backend} as {parked[0].reason}, so not among those chosen"
    found = [each for each in books.find(one) if each.fate != "moved"]
    return f"{'pending' if found[-1].fate == 'open' else found[-1].fate} at {found[-1].backend}" if found else ""


_FATES: Final = {
    Fate.DELIVERED.value: "delivered",
    Fate.DUPLICATE.value: "duplicate",
    Fate.PARKED.value: "parked",
    Fate.MOVED.value: "moved",
}


def _seqs_of(record_id: str, reader: SpoolReader, instance: str, after: int) -> list[int]:
    """The numbers beyond `after` of the stored records with this id: one, unless it stands twice (never ours)."""
    needle, found = f'"{record_id}"'.encode(), []
    while groups := reader.read(instance, after):
        for group in groups:
            for seq, line in enumerate(group.lines, group.first_seq):
                if needle in line and _id_of(line) == record_id:
                    found.append(seq)
        after = groups[-1].last_seq
    return found


def _id_of(line: bytes) -> object:
    try:
        return orjson.loads(line)["id"]
    except (ValueError, KeyError, TypeError):
        return None


def runs_between(conn: Connection, cursor: int, after: int, upto: int) -> list[Run]:
    """What is in the sums of the records numbered `after < seq <= upto`."""
    rows = conn.execute(
        "SELECT first_seq, last_seq, duplicate FROM applied WHERE cursor = ? AND last_seq > ? AND first_seq <= ?",
        (cursor, after, upto),
    )
    return [Run(max(first, after + 1), min(last, upto), bool(duplicate)) for first, last, duplicate in rows]


def records_between(conn: Connection, cursor: int, after: int, upto: int) -> dict[int, Record]:
    """Every record numbered `after < seq <= upto` with the places of its events, from rows."""
    records: dict[int, Record] = {}
    (span,) = conn.execute(
        "SELECT coalesce(max(last_seq - first_seq), 0) FROM sealed WHERE cursor = ? AND last_seq > ?", (cursor, after)
    ).fetchone()
    for fates, blob in conn.execute(
        "SELECT fates, members FROM sealed WHERE cursor = ? AND last_seq > ? AND last_seq <= ? AND first_seq <= ?",
        (cursor, after, upto + span, upto),
    ):
        for index, row in enumerate(orjson.loads(blob)):
            if after < row[0] <= upto:
                _add_event(records.setdefault(row[0], Record()), None if fates is None else fates[index])
    for seq, reason in conn.execute(
        "SELECT seq, reason FROM parked WHERE cursor = ? AND seq > ? AND seq <= ?", (cursor, after, upto)
    ):
        records.setdefault(seq, Record()).parked.append(reason)
    for reason, blob in conn.execute(
        "SELECT reason, seqs FROM skipped WHERE cursor = ? AND last_seq > ? AND first_seq <= ? AND seqs IS NOT NULL",
        (cursor, after, upto),
    ):
        for seq in orjson.loads(blob):
            if after < seq <= upto:
                records.setdefault(seq, Record()).skipped = reason
    return records


def _add_event(record: Record, fate: str | None) -> None:
    if fate is None:
        record.pending += 1
    elif fate == Fate.DELIVERED.value:
        record.delivered += 1
    elif fate == Fate.DUPLICATE.value:
        record.duplicate += 1
    # Parked ones are counted from their own table, moved ones where they went.


def _recount(conn: Connection, cursor: int, after: int, upto: int) -> Counter[Place]:
    places: Counter[Place] = Counter()
    for low in range(after, upto, WINDOW_RECORDS):
        for record in records_between(conn, cursor, low, min(low + WINDOW_RECORDS, upto)).values():
            if record.place is not None:
                places[record.place] += 1
    for run in runs_between(conn, cursor, after, upto):
        places[(Term.DUPLICATE.value if run.duplicate else Term.DELIVERED.value, "")] += run.records
    # Ranges were counted when they were passed over; their records are not looked at one by one.
    for reason, n in conn.execute(
        "SELECT reason, sum(n) FROM skipped WHERE cursor = ? AND last_seq > ? AND seqs IS NULL GROUP BY reason",
        (cursor, after),
    ):
        places[(Term.SKIPPED.value, reason)] += n
    return places


def _left_over(conn: Connection, cursor: int, folded: int) -> Counter[Place]:
    """Records whose rows are gone except for what is still open or parked of them."""
    places: Counter[Place] = Counter()
    for pending, parked, delivered, duplicate, reason in conn.execute(
        "SELECT pending, parked, delivered, duplicate, reason FROM parts WHERE cursor = ? AND seq <= ?",
        (cursor, folded),
    ):
        term = worst(pending=pending, parked=parked, delivered=delivered, duplicate=duplicate)
        places[(term.value, reason if term is Term.PARKED else "")] += 1
    return places


def _contradictions(conn: Connection, cursor: int, folded: int) -> list[str]:
    """Rows of `parts` that do not say what the events' own rows say."""
    found = []
    for seq, pending, parked, delivered, duplicate in conn.execute(
        "SELECT seq, pending, parked, delivered, duplicate FROM parts WHERE cursor = ? ORDER BY seq", (cursor,)
    ):
        rows = records_between(conn, cursor, seq - 1, seq).get(seq, Record())
        same = pending == rows.pending and parked == len(rows.parked)
        if seq > folded:
            same = same and delivered == rows.delivered and duplicate == rows.duplicate
        if not same:
            found.append(f"record {seq} has other events than its row in `parts` says")
    return found


def _counters(conn: Connection, cursor: int, *, folded: int) -> Counter[Place]:
    return Counter(
        {
            (term, reason): n
            for term, reason, n in conn.execute(
                "SELECT term, reason, n FROM counter WHERE cursor = ? AND folded = ? AND n != 0", (cursor, folded)
            )
        }
    )


def _cursors(conn: Connection) -> list[tuple[int, str, str, int, int]]:
    return conn.execute("SELECT id, backend, instance, seq, folded_seq FROM cursor ORDER BY id").fetchall()
