"""Opening `delivery.db` (its tables are in `schema.sql`), and saying no to a file that is not ours to open.

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

from sidecar.delivery.rows import StateBusy, StateError, StateFull
from sidecar.storage.files import Trouble, make_private, trouble

VERSION: Final = 1
_TABLES: Final = Path(__file__).with_name("schema.sql")
BUSY_TIMEOUT_S: Final = 10.0  # another writer can only be a second instance, which the lock forbids


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
            for statement in _TABLES.read_text().split(";\n"):
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
