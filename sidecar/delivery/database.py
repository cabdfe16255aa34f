"""What holds the state of delivery: `delivery.db` here, or the schema of a lane in a database that many share.

Both speak the statements of `store` and `queries`: SQLite's way of writing them, `?` for a value, of which everything
used exists in PostgreSQL as well (`lane_database`). One connection writes; all others are read-only. Every step is one
transaction. Everything blocks.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Final, Protocol

from sidecar.delivery.rows import StateBusy, StateError, StateFull
from sidecar.storage.files import Trouble
from sidecar.storage.sqlite import Schema, errors_told, open_db, transaction


class Rows(Protocol):
    """What a statement gave."""

    @property
    def rowcount(self) -> int: ...
    def fetchone(self) -> Any: ...
    def fetchall(self) -> list[Any]: ...
    def __iter__(self) -> Iterator[Any]: ...


class Connection(Protocol):
    """As `sqlite3.Connection`, as far as it is used."""

    def execute(self, statement: str, values: Sequence[Any] = (), /) -> Rows: ...
    def executemany(self, statement: str, rows: Iterable[Sequence[Any]], /) -> Any: ...


class Reading(Protocol):
    """The state, for counting and listing."""

    @property
    def where(self) -> str:
        """Which one it is, in messages."""
        ...

    def reading(self) -> AbstractContextManager[Connection]:
        """One moment of it."""
        ...

    def apart(self, *, moment: bool = False) -> AbstractContextManager[Connection]:
        """By a connection of its own, for what may take minutes: nobody who asks for the balance waits behind it.
        `moment`: all of one moment, at the price that what is written meanwhile is kept twice."""
        ...

    def close(self) -> None: ...


class Database(Protocol):
    """The state, for its one writer. Raises `StateError`, in words."""

    created: bool  # by this program, just now: nothing is known of what came before

    @property
    def where(self) -> str: ...

    def writing(self) -> AbstractContextManager[Connection]:
        """One step: all of it is kept, or nothing."""
        ...

    def looking(self) -> AbstractContextManager[Connection]:
        """To read by the writer's own connection."""
        ...

    def reader(self) -> Reading: ...

    def reopen(self) -> None:
        """A new connection after a failed write: what the old one believed is forgotten."""
        ...

    def close(self) -> None: ...


def _error(text: str, found: Trouble | None) -> StateError:
    kind = {Trouble.FULL: StateFull, Trouble.BUSY: StateBusy}.get(found, StateError) if found else StateError
    return kind(text, found)


SCHEMA: Final = Schema(
    name="delivery",
    version=2,
    tables=Path(__file__).with_name("schema.sql").read_text(),
    when_damaged="move it aside and start again; what may have been delivered before is then parked unless the backend "
    "recognises repeats",
    when_full="make some, delivery goes on by itself",
    error=_error,
)


def _open_writer(path: Path) -> tuple[sqlite3.Connection, bool]:
    """The one writing connection, and whether the file was made by this call."""
    created = not path.exists() or path.stat().st_size == 0
    try:
        return open_db(path, schema=SCHEMA), created
    except StateFull as error:
        if created:  # nothing runs yet that could go on by itself
            raise StateFull(
                f"{path} cannot be made: no room on its disk; free some, or set SIDECAR_DATA_DIR to another disk"
            ) from error
        raise


class DatabaseFile:
    """`delivery.db`, open for writing."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._conn, self.created = _open_writer(path)

    @property
    def where(self) -> str:
        return str(self._path)

    @contextmanager
    def looking(self) -> Iterator[Connection]:
        with self._lock, errors_told(self._path, SCHEMA):
            yield self._conn

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        with self._lock, errors_told(self._path, SCHEMA), transaction(self._conn):
            yield self._conn

    def reader(self) -> FileReading:
        return FileReading(self._path)

    def reopen(self) -> None:
        with self._lock:
            self._conn.close()
            self._conn, _ = _open_writer(self._path)

    def close(self) -> None:
        with self._lock, errors_told(self._path, SCHEMA):
            self._conn.close()


class FileReading:
    """`delivery.db`, open for reading."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._conn = self._open()

    @property
    def where(self) -> str:
        return str(self._path)

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        with self._lock, errors_told(self._path, SCHEMA), _moment(self._conn):
            yield self._conn

    @contextmanager
    def apart(self, *, moment: bool = False) -> Iterator[Connection]:
        conn = self._open()
        try:
            with errors_told(self._path, SCHEMA), _moment(conn) if moment else nullcontext():
                yield conn
        finally:
            conn.close()

    def close(self) -> None:
        with self._lock, errors_told(self._path, SCHEMA):
            self._conn.close()

    def _open(self) -> sqlite3.Connection:
        return open_db(self._path, schema=SCHEMA, read_only=True, lasting=True)


@contextmanager
def _moment(conn: sqlite3.Connection) -> Iterator[None]:
    conn.execute("BEGIN")
    try:
        yield
    finally:
        conn.execute("COMMIT")
