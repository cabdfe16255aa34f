"""The tables of `ledger.db`, how its file is opened, and how its numbers are kept exact.

Sums are kept in columns without a type of their own (`ANY` in a strict table): a whole number that fits 64
bits as an integer, a larger one and every decimal as text. SQLite itself never adds them up, because its
`sum` turns text into floats and overflows integers; Python does, on both ways.

Only the delivering process writes; every other connection is opened `mode=ro` for short transactions
(SQLite before 3.51.3 can damage a WAL that two connections checkpoint).
"""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Final

from sidecar.meters.hourly import COUNTS, JSON_INT_MAX, TOKENS
from sidecar.storage.files import Trouble, make_private, trouble

VERSION: Final = 1
BUSY_S: Final = 5.0  # another process may be finishing; longer means that it is stuck
SUMS: Final = (*COUNTS, *TOKENS)

_TABLES: Final = f"""
CREATE TABLE applied (
  key TEXT PRIMARY KEY, -- of a sealed delivery: made from record ids, so it is unique over all spools
  at INTEGER NOT NULL -- Unix seconds
) STRICT, WITHOUT ROWID;
CREATE INDEX applied_at ON applied (at);
CREATE TABLE series (
  id INTEGER PRIMARY KEY,
  key TEXT NOT NULL UNIQUE, -- the five as a JSON array: unlike NULLs in an index, two nulls are the same
  subscriber TEXT,
  model TEXT,
  provider TEXT,
  route TEXT,
  status_class TEXT NOT NULL
) STRICT;
CREATE TABLE hourly (
  hour INTEGER NOT NULL, -- Unix seconds of its start, UTC
  series INTEGER NOT NULL REFERENCES series (id),
  {", ".join(f"{name} ANY" for name in SUMS)},
  cost_usd TEXT,
  PRIMARY KEY (hour, series)
) STRICT, WITHOUT ROWID;
CREATE TABLE hourly_units (
  hour INTEGER NOT NULL,
  series INTEGER NOT NULL REFERENCES series (id),
  unit TEXT NOT NULL,
  amount TEXT NOT NULL,
  PRIMARY KEY (hour, series, unit)
) STRICT, WITHOUT ROWID;
CREATE TABLE buckets (
  id INTEGER PRIMARY KEY,
  key TEXT NOT NULL UNIQUE, -- the five as a JSON array
  meter TEXT NOT NULL,
  version TEXT NOT NULL, -- of the definition: a changed meter starts anew
  subscriber TEXT,
  grp TEXT,
  start INTEGER NOT NULL, -- Unix seconds, UTC
  kind TEXT NOT NULL,
  value TEXT, -- COUNT, SUM, MAX, LATEST: an exact decimal; UNIQUE_COUNT: how many
  at_us INTEGER NOT NULL, -- LATEST: of which record
  record_id TEXT NOT NULL
) STRICT;
CREATE INDEX buckets_of_meter ON buckets (meter, version, start);
CREATE TABLE uniques (
  bucket INTEGER NOT NULL REFERENCES buckets (id),
  hash TEXT NOT NULL,
  PRIMARY KEY (bucket, hash)
) STRICT, WITHOUT ROWID;
"""


class LedgerError(Exception):
    """The ledger cannot be used; the text says what to do."""


def open_to_write(path: Path) -> sqlite3.Connection:
    """The one writing connection, with tables of this version."""
    make_private(path)
    db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=BUSY_S)
    try:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        db.execute("PRAGMA fullfsync = ON")  # macOS: a plain fsync leaves the data in the drive's cache
        version = check_version(db, path)
        if version == 0:
            db.executescript(f"BEGIN IMMEDIATE; {_TABLES} PRAGMA user_version = {VERSION}; COMMIT;")
    except BaseException:
        db.close()
        raise
    return db


def open_to_read(path: Path) -> sqlite3.Connection:
    """A connection for one short look. Raises `LedgerError` when there is nothing to read."""
    if not path.exists():
        raise LedgerError(f"{path} does not exist yet: the ledger is made with the first delivery to it")
    db = _connect_to_read(path)
    try:
        if check_version(db, path) == 0:
            raise LedgerError(f"{path} holds no ledger yet: it is made with the first delivery to it")
    except BaseException:
        db.close()
        raise
    return db


def ledger_problem(path: Path) -> str | None:
    """Why a ledger that is there cannot be used, or None. Only looks, also beside the one who writes it."""
    if not path.exists():
        return None
    try:
        db = _connect_to_read(path)
        try:
            check_version(db, path)
        finally:
            db.close()
    except LedgerError as error:
        return str(error)
    except sqlite3.Error as error:
        return told(error, path)
    return None


def told(error: OSError | sqlite3.Error, path: Path) -> str | None:
    """Why a ledger cannot be used, in words that tell what to do; None where that passes by itself.

    Only of one that is damaged it is said that it may be moved away: the sums of all others are whole.
    """
    match trouble(error, path):
        case Trouble.FULL | Trouble.BUSY:
            return None
        case Trouble.DAMAGED | Trouble.NOT_DATABASE:
            return f"{path} is damaged ({error}): put its copy back, or move it away to begin a new one"
        case Trouble.READ_ONLY:
            return f"{path} cannot be opened: its file system is read-only; mount it for writing (the ledger is whole)"
        case Trouble.DENIED:
            return f"{path} cannot be opened ({error}): give this user the data directory and what is in it"
    return f"{path} cannot be read ({error}): look at its disk, and leave the ledger where it is"


def _connect_to_read(path: Path) -> sqlite3.Connection:
    """Without a log beside it nobody has it open and it needs none: on a full or read-only disk none can be made."""
    log = path.with_name(path.name + "-wal")
    quiet = not log.exists() or log.stat().st_size == 0
    return sqlite3.connect(
        f"{path.resolve().as_uri()}?mode=ro{'&immutable=1' if quiet else ''}",
        uri=True, isolation_level=None, timeout=BUSY_S,
    )  # fmt: skip


def check_version(db: sqlite3.Connection, path: Path) -> int:
    version = int(db.execute("PRAGMA user_version").fetchone()[0])
    if version > VERSION:
        raise LedgerError(
            f"{path} was written by a newer version (format {version}, this one knows {VERSION}): "
            "install that version, or set SIDECAR_DATA_DIR to another directory"
        )
    return version


def stored(value: int) -> int | str:
    """A whole number as a column keeps it."""
    return value if -JSON_INT_MAX <= value <= JSON_INT_MAX else str(value)
