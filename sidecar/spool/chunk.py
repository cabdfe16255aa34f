"""One chunk: one SQLite file, and the one connection that may write it.

What must always hold
- A row is a *group*: records committed together, with cumulative totals and a checksum over all of it.
- Only this connection writes or checkpoints the file; everybody else opens it `mode=ro` (SQLite before
  3.51.3 can corrupt a log that two connections reset).
- Nothing is checkpointed before the chunk is sealed, so until then everything but the schema is in the
  write-ahead log; a chunk that is not sealed and has no log has lost it.
- After a failed write or sync the file is never written again: SQLite's and the kernel's ideas of it may differ.
- A chunk counts only below the next chunk's first number. A transaction that failed after its commit mark was
  written may come back to life in the old file; the same records are in the next one, and only there they count.

Which chunk comes when, and what goes into a group, is `writer`'s.
"""

from __future__ import annotations

import sqlite3
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from sidecar.spool import files
from sidecar.spool.groups import IntentGroup, Opening, RecordGroup
from sidecar.spool.words import REMOVED, SpoolDamaged, SpoolError, SpoolFailed, SpoolFull
from sidecar.storage.files import Trouble, make_private, trouble

FORMAT: Final = 1  # user_version: raise it with a step in MIGRATIONS
APPLICATION_ID: Final = 0x4D53_504C  # "MSPL"
_HEADER: Final = b"SQLite format 3\0"
# A commit of one small record costs a whole leaf page in the log. Pages of 16 KiB took a third more records a second in
# big groups (400,000 against 300,000) at three times the log for single ones, with the same latency: so small pages.
PAGE_BYTES: Final = 4096
NO_BOUND: Final = (1 << 63) - 1  # beyond every number
_BUSY_S: Final = 5.0  # readers are short; only a stranger's shell on the file can make us wait

# From format n to n + 1, run in one transaction, file by file. Format 1 is the first.
MIGRATIONS: Final[Mapping[int, str]] = {}

_SCHEMA: Final = (
    "CREATE TABLE meta (name TEXT PRIMARY KEY, value) WITHOUT ROWID",
    """CREATE TABLE record_group (
        first_seq INTEGER PRIMARY KEY, last_seq INTEGER NOT NULL, count INTEGER NOT NULL,
        commit_number INTEGER NOT NULL, committed_ns INTEGER NOT NULL, salvaged INTEGER NOT NULL,
        admitted INTEGER NOT NULL, recorded INTEGER NOT NULL, lost TEXT NOT NULL,
        closes TEXT NOT NULL, crc32 INTEGER NOT NULL, body BLOB NOT NULL
    )""",
    """CREATE TABLE intent_group (
        commit_number INTEGER PRIMARY KEY, count INTEGER NOT NULL, committed_ns INTEGER NOT NULL,
        admitted INTEGER NOT NULL, recorded INTEGER NOT NULL, lost TEXT NOT NULL,
        closes TEXT NOT NULL, crc32 INTEGER NOT NULL, body BLOB NOT NULL
    )""",
    f"PRAGMA application_id = {APPLICATION_ID}",
    f"PRAGMA user_version = {FORMAT}",
)
_INSERT_RECORDS: Final = "INSERT INTO record_group VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
_INSERT_INTENTS: Final = "INSERT INTO intent_group VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"
_INSERT_META: Final = "INSERT OR REPLACE INTO meta VALUES (?, ?)"


class Chunk:
    """A chunk open for writing."""

    def __init__(self, path: Path, number: int, connection: sqlite3.Connection) -> None:
        self.path = path
        self.number = number
        self._connection = connection
        self.opening: Opening | None = None
        self.broken = False  # a write or sync failed: hands off

    @classmethod
    def create(cls, path: Path, number: int, instance: str) -> Chunk:
        """A new, empty file, its schema on disk. Raises `SpoolFull` or another `SpoolError`."""
        try:
            make_private(path)
            connection = _connect(path)
        except sqlite3.Error as error:
            raise translate(error, path) from error
        except OSError as error:
            raise files.translate(error, f"cannot make {path}") from error
        try:
            connection.execute(f"PRAGMA page_size = {PAGE_BYTES}")
            # Nothing is at stake before the schema's commit, and on a slow disk each sync here would be felt.
            connection.execute("PRAGMA synchronous = OFF")
            _prepare(connection, path)
            connection.execute("BEGIN")
            for statement in _SCHEMA:
                connection.execute(statement)
            connection.execute(_INSERT_META, ("instance", instance))
            connection.execute(_INSERT_META, ("number", number))
            connection.execute("COMMIT")
            # The schema goes into the main file, its frames stay in the log: from now on an empty or
            # missing log beside a chunk that is not sealed means that the log was lost.
            connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
        except (sqlite3.Error, SpoolError) as error:
            connection.close()
            files.remove_chunk(path)
            raise (error if isinstance(error, SpoolError) else translate(error, path)) from error
        return cls(path, number, connection)

    @classmethod
    def reopen(cls, path: Path, number: int) -> Chunk:
        """A file left by an earlier run; the log is recovered."""
        try:
            make_private(path)
            connection = _connect(path)
        except sqlite3.Error as error:
            raise translate(error, path) from error
        except OSError as error:
            raise files.translate(error, f"cannot open {path}") from error
        try:
            if connection.execute("PRAGMA application_id").fetchone()[0] != APPLICATION_ID:
                raise SpoolDamaged(f"{path} is not a chunk of a spool")
            check_version(connection.execute("PRAGMA user_version").fetchone()[0], path)
            _prepare(connection, path)
            chunk = cls(path, number, connection)
            first_seq, base = meta(connection, "first_seq"), meta(connection, "base_recorded")
            if first_seq is not None:
                chunk.opening = Opening(int(first_seq), int(base or 0))
        except (sqlite3.Error, SpoolError) as error:
            close_untouched(connection, path)
            raise (error if isinstance(error, SpoolError) else translate(error, path)) from error
        return chunk

    @property
    def connection(self) -> sqlite3.Connection:
        """For reading by the owner while nobody writes (recovery)."""
        return self._connection

    def write(self, groups: Iterable[RecordGroup], intents: IntentGroup | None, opening: Opening | None) -> None:
        """One durable transaction. Raises `SpoolFull` (may be tried again here) or `SpoolFailed` (never)."""
        rows = [group.row() for group in groups]
        execute = self._connection.execute
        try:
            if len(rows) == 1 and intents is None and opening is None:
                execute(_INSERT_RECORDS, rows[0])  # a transaction of its own: one hand-over of the interpreter lock
            else:
                execute("BEGIN IMMEDIATE")
                for row in rows:
                    execute(_INSERT_RECORDS, row)
                if intents is not None:
                    execute(_INSERT_INTENTS, intents.row())
                if opening is not None:
                    execute(_INSERT_META, ("first_seq", opening.first_seq))
                    execute(_INSERT_META, ("base_recorded", opening.base_recorded))
                execute("COMMIT")
        except sqlite3.Error as error:
            raise self._failed(error) from error
        if opening is not None:
            self.opening = opening

    def _failed(self, error: sqlite3.Error) -> SpoolError:
        """Undo what is left of the transaction and say whether this file may be written again."""
        try:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
        except sqlite3.Error:
            self.broken = True
        said = translate(error, self.path)
        # A write refused for want of room put nothing into the page cache that could vanish later, and a file of
        # its own would need the room that is not there: the one failure after which the same file goes on.
        if isinstance(said, SpoolFull) and not self.broken:
            return said
        self.broken = True
        return said if isinstance(said, SpoolFailed) else SpoolFailed(str(said))

    def migrate(self) -> None:
        """Bring a file of an older format up to date."""
        try:
            _migrate(self._connection, self.path)
        except sqlite3.Error as error:
            raise self._failed(error) from error

    def seal(self) -> None:
        """Nothing more will come: bring the log into the main file and close. Takes long; not for the writer thread.

        Raises `SpoolFull` or `SpoolFailed`; the log then still holds everything.
        """
        try:
            if meta(self._connection, "sealed") is None:
                self._connection.execute(_INSERT_META, ("sealed", 1))
            busy, _, _ = self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        except sqlite3.Error as error:
            raise self._failed(error) from error
        if busy:
            raise SpoolFull(f"{self.path}: a reader holds it; it is put away later")
        self._connection.close()

    def close(self) -> None:
        """Close without another write: what is in the log stays in the log."""
        close_untouched(self._connection, self.path)


def close_untouched(connection: sqlite3.Connection, path: Path) -> None:
    """Close without the checkpoint that SQLite makes when the last connection of a file goes.

    A reader that is open at that moment makes ours not the last one, and a reader may not write.
    """
    guard = None
    try:
        guard = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)
        guard.execute("SELECT count(*) FROM meta").fetchone()
    except sqlite3.Error:
        pass  # unreadable also for a reader: then SQLite will not checkpoint it either
    connection.close()
    if guard is not None:
        guard.close()


def meta(connection: sqlite3.Connection, name: str) -> Any:
    row = connection.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
    return None if row is None else row[0]


def readable_rows(
    connection: sqlite3.Connection, table: str, key: str, columns: str, start: int = 0, bound: int = NO_BOUND
) -> Iterator[tuple[Any, ...]]:
    """Rows with `start <= key < bound`, in order; beyond a broken page, what can be reached from the other end."""
    inside = f"FROM {table} WHERE {key} >= ? AND {key} < ? ORDER BY {key}"
    try:
        for row in connection.execute(f"SELECT {columns} {inside}", (start, bound)):
            start = row[0] + 1
            yield row
        return
    except sqlite3.Error:
        pass
    keys: list[int] = []
    try:  # keys first, so that the rows need not be held in memory to be turned round
        for (found,) in connection.execute(f"SELECT {key} {inside} DESC", (start, bound)):
            keys.append(found)
    except sqlite3.Error:
        pass
    for found in reversed(keys):
        try:
            row = connection.execute(f"SELECT {columns} FROM {table} WHERE {key} = ?", (found,)).fetchone()
        except sqlite3.Error:
            continue
        if row is not None:
            yield row


def check_header(path: Path) -> int:
    """The format of a chunk, from its first bytes alone. Raises `SpoolDamaged`, or `SpoolError` for a newer one."""
    try:
        with path.open("rb") as file:
            head = file.read(100)
    except OSError as error:
        raise files.translate(error, f"cannot read {path}") from error
    if len(head) < 100 or not head.startswith(_HEADER):
        raise SpoolDamaged(f"{path} is not an SQLite file")
    if int.from_bytes(head[68:72], "big") != APPLICATION_ID:
        raise SpoolDamaged(f"{path} is not a chunk of a spool")
    version = int.from_bytes(head[60:64], "big")
    check_version(version, path)
    return version


def check_version(version: int, path: Path) -> None:
    """Refuse a newer format by name."""
    if version > FORMAT:
        raise SpoolError(
            f"{path} has format {version} and this version reads up to {FORMAT}: it was written by a newer release;"
            " run that release, or set SIDECAR_DATA_DIR to another directory"
        )


def translate(error: sqlite3.Error, path: Path) -> SpoolError:
    """An SQLite error in the spool's words."""
    match trouble(error, path):
        case Trouble.FULL:
            return SpoolFull(f"no room for {path}: free some disk space; records wait in memory until there is")
        case Trouble.DAMAGED | Trouble.NOT_DATABASE:
            return SpoolDamaged(f"{path} is damaged: {error}")
        case Trouble.READ_ONLY:
            return SpoolFailed(f"{path} cannot be written: its file system is read-only; mount it for writing")
        case Trouble.GONE:
            return SpoolFailed(f"{path} cannot be written: {REMOVED}")
        case Trouble.DENIED:
            return SpoolFailed(f"{path} cannot be written ({error}): check the directory's owner, mode and mount")
    return SpoolFailed(f"writing {path} failed: {getattr(error, 'sqlite_errorname', '')} {error}".strip())


def _connect(path: Path) -> sqlite3.Connection:
    # The writer thread writes, the housekeeping thread makes and seals: one after the other, never at once.
    return sqlite3.connect(path, isolation_level=None, timeout=_BUSY_S, check_same_thread=False, cached_statements=16)


def _prepare(connection: sqlite3.Connection, path: Path) -> None:
    """Durable and quiet. Set on every connection, and read back: a build may refuse."""
    mode = connection.execute("PRAGMA journal_mode = WAL").fetchone()[0]
    if mode != "wal":
        raise SpoolError(f"{path}: SQLite cannot keep a write-ahead log there (it says {mode!r}); use a local disk")
    connection.execute("PRAGMA synchronous = FULL")
    level = connection.execute("PRAGMA synchronous").fetchone()[0]
    if level < 2:
        raise SpoolError(f"{path}: SQLite does not sync ({level}): this build cannot keep records safely")
    if sys.platform == "darwin":  # there a plain fsync stops at the drive's cache
        connection.execute("PRAGMA fullfsync = 1")
        connection.execute("PRAGMA checkpoint_fullfsync = 1")
    connection.execute("PRAGMA wal_autocheckpoint = 0")
    connection.execute("PRAGMA cache_size = -1024")  # KiB: the writer only appends
    connection.execute("PRAGMA temp_store = MEMORY")


def _migrate(connection: sqlite3.Connection, path: Path, steps: Mapping[int, str] = MIGRATIONS) -> None:
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    while version < FORMAT:
        if version not in steps:
            raise SpoolDamaged(f"{path} has format {version}, which no release wrote")
        connection.executescript(f"BEGIN; {steps[version]}; PRAGMA user_version = {version + 1}; COMMIT;")
        version += 1
