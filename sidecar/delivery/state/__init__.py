"""What delivery must remember: how far each backend is, what is sealed, what was said of it, what is parked.

What must always hold: a cursor moves only in the transaction that stores what the records behind it
became; nothing may be sent that is not stored here with bytes, key and members; verdicts, counters and
parked rows change in one transaction. Written by delivery only, through one connection; all methods block and
may be called from any one thread at a time (a lock sees to it). What to do next is decided elsewhere.

Here are the lock, the transaction and the steps by name. What a step does to the rows stands in a room for each
matter: `cursors`, `placing`, `verdicts`, `amending`, `folding`, upon `requests`, `aside` and `books`.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from sidecar.delivery.state import amending, cursors, folding, placing, requests, verdicts
from sidecar.delivery.state.accounts import records_between
from sidecar.delivery.state.books import Books
from sidecar.delivery.state.cursors import Configured, Count
from sidecar.delivery.state.rows import (
    Amendment,
    Cursor,
    NewRequest,
    Place,
    Range,
    Redrive,
    Request,
    Sealing,
    Settlement,
    StateBusy,
    StateError,
    StateFull,
    Turned,
    Unskip,
)
from sidecar.delivery.state.schema import open_writer, told, transaction

__all__ = ["DeliveryState", "StateBusy", "StateError", "StateFull"]


class DeliveryState:
    """`delivery.db`, open for writing."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._conn, self.created = open_writer(path)

    @classmethod
    def open(cls, path: Path) -> DeliveryState:
        return cls(path)

    def close(self) -> None:
        with self._lock, told(self.path):
            self._conn.close()

    def reopen(self) -> None:
        """A new connection after a failed write: what the old one believed is forgotten."""
        with self._lock:
            self._conn.close()
            self._conn, _ = open_writer(self.path)

    # --- backends and cursors ---------------------------------------------------------------------

    def configure(
        self,
        names: Sequence[str],
        places: Sequence[Place],
        now_s: float,
        *,
        count: Count = lambda instance, after, upto: upto - after,
        skip_gaps: bool = False,
    ) -> Configured:
        """Note which backends are configured now, and give new ones their cursors.

        In a file that has served before, a new backend begins behind the records that are there.
        In an empty one (the first start, or its predecessor is lost) it begins with them all, and what is there
        already counts as perhaps delivered. One that was left out for a while goes on where it stopped, unless
        gaps are to be skipped. `count` asks a spool how many records it still has between two numbers.
        """
        with self._step() as books:
            return cursors.configure(books, names, places, now_s, count=count, skip_gaps=skip_gaps)

    def parted(self, name: str) -> None:
        """A removed backend's remainder is parked: there is nothing left to do for it."""
        with self._step() as books:
            cursors.part(books.conn, name)

    def cursors(self, backend: str) -> list[Cursor]:
        with self._held() as conn:
            return cursors.of_backend(conn, backend)

    def start_cursor(self, backend: str, instance: str) -> Cursor:
        """A cursor at the beginning of an instance's spool: one that appeared while this backend was configured."""
        with self._step() as books:
            return cursors.start(books.conn, backend, instance)

    # --- clock ------------------------------------------------------------------------------------

    def saw_clock(self, wall_s: float) -> float | None:
        """Keep the wall clock's latest reading; returns the one before."""
        with self._step() as books:
            row = books.conn.execute("SELECT value FROM meta WHERE name = 'wall_s'").fetchone()
            books.conn.execute(
                "INSERT INTO meta(name, value) VALUES('wall_s', ?) ON CONFLICT DO UPDATE SET value = excluded.value",
                (wall_s,),
            )
        return None if row is None else float(row[0])

    def last_clock(self) -> float | None:
        """The wall clock when delivery last looked at it."""
        with self._held() as conn:
            row = conn.execute("SELECT value FROM meta WHERE name = 'wall_s'").fetchone()
        return None if row is None else float(row[0])

    def all_cursors(self) -> dict[str, int]:
        """How far each backend is in each spool, by "backend instance"."""
        with self._held() as conn:
            rows = conn.execute("SELECT backend, instance, seq FROM cursor").fetchall()
        return {f"{backend} {instance}": int(seq) for backend, instance, seq in rows}

    def served(self) -> list[str]:
        """The backends that this file works for."""
        with self._held() as conn:
            return [name for (name,) in conn.execute("SELECT name FROM backend WHERE removed = 0 ORDER BY name")]

    def expire_risks(self) -> int:
        """The clock stepped: no open request that may have been taken is recognised for sure any more."""
        with self._step() as books:
            return books.conn.execute(
                "UPDATE sealed SET expired = 1"
                " WHERE settled = 0 AND expired = 0 AND (risk_s IS NOT NULL OR under_way = 1)"
            ).rowcount

    # --- the way of a record ----------------------------------------------------------------------

    def seal(self, sealing: Sealing, now_s: float) -> list[int]:
        """Store requests with bytes, key and members, and move the cursor over their records: one transaction."""
        with self._step() as books:
            return placing.seal(books, sealing, now_s)

    def turn(
        self,
        settlements: Sequence[Settlement],
        begin: Sequence[int],
        load: Sequence[int],
        now_s: float,
        sealing: Sealing | None = None,
    ) -> Turned:
        """Store what was said of requests, that others are offered now, and new ones: one transaction."""
        with self._step() as books:
            children = [verdicts.settle(books, one, now_s) for one in settlements]
            requests.begin(books.conn, begin, now_s)
            loaded = {request: requests.load(books.conn, request) for request in load}
            sealed = [] if sealing is None else placing.seal(books, sealing, now_s)
        return Turned(children, sealed, loaded)

    def open_requests(self, backend: str) -> list[Request]:
        """All sealed requests without a verdict, oldest first, without their bytes."""
        with self._held() as conn:
            return requests.open_requests(conn, backend)

    def lines(self, request: int) -> list[bytes]:
        """The records of a request, in the order in which its members first name them."""
        with self._held() as conn:
            return requests.lines(conn, request)

    def stored(self, request: int) -> NewRequest | None:
        """A settled request as it was sealed, while its bytes are kept."""
        with self._held() as conn:
            return requests.stored(conn, request)

    def fold(self, instance: str, upto_seq: int) -> bool:
        """Forget settled requests of one instance up to a number, a slice a call; False when nothing is left to do.

        Their records go on counting: their places are added to the folded counters, and what is still open or
        parked of them keeps a row in `parts`.
        """
        with self._step() as books:
            return folding.fold(books.conn, instance, upto_seq)

    # --- what an operator mends -------------------------------------------------------------------

    def redrive(self, step: Redrive, now_s: float) -> list[int]:
        """Let parked events go on: one transaction marks them moved and stores the requests that carry them."""
        with self._step() as books:
            return amending.redrive(books, step, now_s)

    def amend(self, one: Amendment, now_s: float) -> bool:
        """Let a delivered event be so no more. False: it has moved meanwhile, or too little is remembered of it."""
        with self._step() as books:
            return amending.amend(books, one, now_s)

    def ranges(self, backend: str) -> list[Range]:
        """What was skipped for a backend without being looked at."""
        with self._held() as conn:
            return placing.ranges(conn, backend)

    def known(self, cursor: int, after: int, upto: int) -> set[int]:
        """Which of these numbers have a place of their own already."""
        with self._held() as conn:
            return set(records_between(conn, cursor, after, upto))

    def unskip(self, step: Unskip, now_s: float) -> list[int]:
        """Let records out of a range that was skipped: one transaction, as if they were sealed for the first time."""
        with self._step() as books:
            return placing.unskip(books, step, now_s)

    # --- inside -----------------------------------------------------------------------------------

    @contextmanager
    def _held(self) -> Iterator[sqlite3.Connection]:
        """The connection, for one thread at a time. What the rooms cannot do is told with the file's name."""
        with self._lock, told(self.path):
            try:
                yield self._conn
            except StateError as error:
                raise type(error)(f"{self.path}: {error}") from error

    @contextmanager
    def _step(self) -> Iterator[Books]:
        """One transaction, with its books. What changes nothing (counting, listing) has connections of its own."""
        with self._held() as conn, transaction(conn):
            books = Books(conn)
            yield books
            books.close()
