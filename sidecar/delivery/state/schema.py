"""The tables of `delivery.db`, opening the file, and saying no to one that is not ours to open.

One connection writes and checkpoints; all others are `mode=ro` (SQLite before 3.51.3 has a WAL-reset
corruption with two that checkpoint). Every step is one transaction with `synchronous=FULL`.
"""

from __future__ import annotations

import contextlib
import sqlite3
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from sidecar.delivery.state.rows import StateBusy, StateError, StateFull
from sidecar.storage.files import Trouble, make_private, trouble

VERSION: Final = 1
BUSY_TIMEOUT_S: Final = 10.0  # another writer can only be a second instance, which the lock forbids

# `cursor` is a pair of backend and instance. `sealed` has one short row for each request, for as long as
# delivered records are kept; `payload` its bytes and records, until it is settled and none of it is parked.
# `parts` has a row for each record with more than one event, and for those left over by `fold`.
# `fates` has a letter for each event of a settled request: d(elivered), (d)u(plicate), p(arked), m(oved on).
_TABLES: Final = """
CREATE TABLE meta(name TEXT PRIMARY KEY, value REAL NOT NULL) WITHOUT ROWID;
CREATE TABLE backend(name TEXT PRIMARY KEY, since_s REAL NOT NULL, removed INTEGER NOT NULL DEFAULT 0) WITHOUT ROWID;
CREATE TABLE cursor(
    id INTEGER PRIMARY KEY, backend TEXT NOT NULL, instance TEXT NOT NULL, seq INTEGER NOT NULL,
    again_upto INTEGER NOT NULL DEFAULT 0, folded_seq INTEGER NOT NULL DEFAULT 0, UNIQUE(backend, instance));
CREATE TABLE sealed(
    id INTEGER PRIMARY KEY, cursor INTEGER NOT NULL, first_seq INTEGER NOT NULL, last_seq INTEGER NOT NULL,
    settled INTEGER NOT NULL DEFAULT 0, attempts INTEGER NOT NULL DEFAULT 0, under_way INTEGER NOT NULL DEFAULT 0,
    started_s REAL NOT NULL DEFAULT 0, due_s REAL NOT NULL DEFAULT 0, risk_s REAL, expired INTEGER NOT NULL DEFAULT 0,
    forced INTEGER NOT NULL DEFAULT 0, generation INTEGER NOT NULL DEFAULT 0, records INTEGER NOT NULL,
    size_bytes INTEGER NOT NULL, at_s REAL NOT NULL, oldest_s REAL NOT NULL, key TEXT NOT NULL, subject TEXT NOT NULL,
    version INTEGER NOT NULL, fates TEXT, history TEXT NOT NULL DEFAULT '[]', members BLOB NOT NULL);
CREATE INDEX sealed_open ON sealed(cursor) WHERE settled = 0;
CREATE INDEX sealed_seq ON sealed(cursor, last_seq);
CREATE TABLE payload(
    request INTEGER PRIMARY KEY, path TEXT NOT NULL, content_type TEXT NOT NULL, headers TEXT NOT NULL,
    body BLOB NOT NULL, lines BLOB NOT NULL);
CREATE TABLE skipped(
    id INTEGER PRIMARY KEY, cursor INTEGER NOT NULL, reason TEXT NOT NULL, first_seq INTEGER NOT NULL,
    last_seq INTEGER NOT NULL, n INTEGER NOT NULL, seqs BLOB);
CREATE INDEX skipped_seq ON skipped(cursor, last_seq);
CREATE TABLE parked(
    id INTEGER PRIMARY KEY, cursor INTEGER NOT NULL, seq INTEGER NOT NULL, record_id TEXT NOT NULL,
    event_id TEXT NOT NULL, reason TEXT NOT NULL, maybe_taken INTEGER NOT NULL, at_s REAL NOT NULL,
    key TEXT NOT NULL, generation INTEGER NOT NULL, request INTEGER, line BLOB NOT NULL, history TEXT NOT NULL);
CREATE INDEX parked_seq ON parked(cursor, seq);
CREATE INDEX parked_request ON parked(request);
CREATE TABLE parts(
    cursor INTEGER NOT NULL, seq INTEGER NOT NULL, pending INTEGER NOT NULL, parked INTEGER NOT NULL,
    delivered INTEGER NOT NULL, duplicate INTEGER NOT NULL, reason TEXT NOT NULL,
    PRIMARY KEY(cursor, seq)) WITHOUT ROWID;
CREATE TABLE counter(
    cursor INTEGER NOT NULL, folded INTEGER NOT NULL, term TEXT NOT NULL, reason TEXT NOT NULL, n INTEGER NOT NULL,
    PRIMARY KEY(cursor, folded, term, reason)) WITHOUT ROWID;
"""


def open_writer(path: Path) -> tuple[sqlite3.Connection, bool]:
    """The one writing connection, and whether the file was made by this call."""
    created = not path.exists() or path.stat().st_size == 0
    try:
        with told(path):
            make_private(path)
            conn = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=BUSY_TIMEOUT_S)
            try:
                _prepare(conn, path)
            except BaseException:
                conn.close()
                raise
    except StateFull as error:
        if created:  # nothing runs yet that could go on by itself
            raise StateFull(
                f"{path} cannot be made: no room on its disk; free some, or set SIDECAR_DATA_DIR to another disk"
            ) from error
        raise
    return conn, created


def open_reader(path: Path) -> sqlite3.Connection:
    """A connection that cannot write, for counting and listing."""
    with told(path):
        conn = sqlite3.connect(
            f"{path.absolute().as_uri()}?mode=ro", uri=True, isolation_level=None, check_same_thread=False,
            timeout=BUSY_TIMEOUT_S,
        )  # fmt: skip
        try:
            _check_version(conn, path)
        except BaseException:
            conn.close()
            raise
    return conn


def _prepare(conn: sqlite3.Connection, path: Path) -> None:
    if conn.execute("PRAGMA journal_mode=WAL").fetchone()[0] != "wal":
        raise StateError(
            f"{path}: this file system cannot keep a write-ahead log; put the data directory on a local disk"
        )
    conn.execute("PRAGMA synchronous=FULL")
    if sys.platform == "darwin":
        conn.execute("PRAGMA fullfsync=ON")
    if conn.execute("PRAGMA synchronous").fetchone()[0] != 2:
        raise StateError(f"{path}: SQLite does not sync every commit here; its build forbids synchronous=FULL")
    with transaction(conn):
        if _check_version(conn, path) == 0:
            for statement in _TABLES.split(";\n"):
                conn.execute(statement)
            conn.execute(f"PRAGMA user_version={VERSION}")


def _check_version(conn: sqlite3.Connection, path: Path) -> int:
    version = int(conn.execute("PRAGMA user_version").fetchone()[0])
    if version > VERSION:
        raise StateError(
            f"{path} has format {version}, written by a newer version; this one reads up to {VERSION}: update it"
        )
    return version


@contextlib.contextmanager
def transaction(conn: sqlite3.Connection) -> Iterator[None]:
    """One step: all of it on disk, or nothing."""
    conn.execute("BEGIN IMMEDIATE")
    try:
        yield
        conn.execute("COMMIT")
    except BaseException:
        with contextlib.suppress(sqlite3.Error):
            if conn.in_transaction:
                conn.execute("ROLLBACK")
        raise


@contextlib.contextmanager
def told(path: Path) -> Iterator[None]:
    """SQLite's errors in our words; nobody else names them."""
    try:
        yield
    except (OSError, sqlite3.Error) as error:
        match trouble(error, path):
            case Trouble.FULL:
                raise StateFull(f"{path}: no room on the disk; make some, delivery goes on by itself") from error
            case Trouble.DAMAGED | Trouble.NOT_DATABASE:
                raise StateError(
                    f"{path} is damaged ({error}): move it aside and start again; what may have been delivered before "
                    "is then parked unless the backend recognises repeats"
                ) from error
            case Trouble.BUSY:
                raise StateBusy(f"{path} is in use by another process; stop it") from error
            case Trouble.READ_ONLY:
                raise StateError(f"{path}: its file system is read-only; mount it for writing") from error
            case Trouble.DENIED:
                raise StateError(f"{path} cannot be opened ({error}): give this user the data directory") from error
            case Trouble.GONE:
                raise StateError(f"{path}: its directory was removed or moved; put it back") from error
        raise StateError(f"{path}: {error}") from error
