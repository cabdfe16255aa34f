"""The one way an SQLite file of ours is opened: durable, private, of a known format, and refused in words otherwise.

Every connection that writes keeps a write-ahead log and syncs each commit (`synchronous=FULL`), and both are read back,
because a build or a file system may refuse them silently. On macOS a plain fsync stops at the drive's cache, so
`fullfsync` is set there. One connection writes and checkpoints, all others are read-only: SQLite before 3.51.3 can
damage a log that two connections checkpoint (https://sqlite.org/wal.html#walresetbug).

A file is told apart by its `user_version` and its tables: 0 and empty is a new one, another version than the schema's
is a newer or an older program's, and tables among which is none of the schema's are another program's. All but a new
one and our own are refused and left as they are, for writing and for reading alike. Nothing is converted: an older
version is taken only where `upgrades` has the tables that it lacks, which takes no time, and whoever reads it knows
that they may not be there yet.
"""

from __future__ import annotations

import contextlib
import re
import sqlite3
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from sidecar.storage.files import StorageError, Trouble, explain, make_private, trouble

# For another connection to finish its transaction. The longest that one of ours takes is a deletion of old rows, which
# is done well within a second; who waits longer waits for a second instance, which the lock forbids, or for a tool.
BUSY_S: Final = 10.0
_FULL: Final = 2  # what `PRAGMA synchronous` answers for FULL
_TABLE: Final = re.compile(r"^\s*CREATE TABLE (?:IF NOT EXISTS )?(\w+)", re.MULTILINE)
_OTHER_DIRECTORY: Final = "set SIDECAR_DATA_DIR to another directory"

ErrorOf = Callable[[str, Trouble | None], StorageError]


@dataclass(frozen=True, slots=True, kw_only=True)
class Schema:
    """What a file of one kind holds, and what is said where it cannot be used.

    `tables`: the statements of a new file, each `CREATE TABLE` at the beginning of a line.
    `upgrades`: of an older version, what makes the next one of it: further tables, nothing that takes long.
    `when_empty`, `when_damaged`, `when_full`: the end of the sentence in these cases, which says what to do.
    `error`: what is raised, made of its text and the trouble.
    """

    name: str  # in messages: "ledger"
    version: int
    tables: str
    when_empty: str = "it is made when it is first written"
    when_damaged: str = "put its copy back, or move it away to begin a new one"
    when_full: str = "free some, writing goes on by itself"
    error: ErrorOf = StorageError
    upgrades: Mapping[int, str] = field(default_factory=dict)

    def reads(self, version: int) -> bool:
        """Whether a file of this version can be used."""
        return all(one in self.upgrades for one in range(version, self.version))

    @property
    def table_names(self) -> frozenset[str]:
        return frozenset(_TABLE.findall(self.tables))


def open_db(path: Path, *, schema: Schema, read_only: bool = False, lasting: bool = False) -> sqlite3.Connection:
    """A connection in autocommit mode that any thread may use, one at a time.

    For writing the file and its tables are made if need be, for its owner alone. `read_only` opens what is there and
    never makes or changes anything. Without `lasting` such a connection is for one short look: a file that nobody has
    open is then read without a log beside it, which a full or read-only disk could not hold.

    Raises the schema's error, with what to do.
    """
    with errors_told(path, schema):
        if read_only:
            return _open_to_read(path, schema, lasting=lasting)
        make_private(path)
        db = _connect(path)
        try:
            _make_durable(db, path, schema)
            _make_tables(db, path, schema)
        except BaseException:
            db.close()
            raise
    return db


def problem_of(path: Path, *, schema: Schema) -> StorageError | None:
    """Why a file that is there cannot be used; None where it can, or passes by itself. Changes nothing."""
    if not path.exists():
        return None
    try:
        with errors_told(path, schema), contextlib.closing(_connect_to_read(path, lasting=False)) as db:
            _version(db, path, schema)
    except StorageError as error:
        return None if error.passes else error
    return None


def check_pages(path: Path, *, schema: Schema) -> None:
    """Read every page, also those that no question would come to. Raises the schema's error where one is damaged."""
    with errors_told(path, schema), contextlib.closing(_connect_to_read(path, lasting=True)) as db:
        (said,) = db.execute("PRAGMA quick_check(1)").fetchone()
    if said != "ok":
        raise schema.error(f"{path} is damaged ({' '.join(said.split())}): {schema.when_damaged}", Trouble.DAMAGED)


@contextlib.contextmanager
def errors_told(path: Path, schema: Schema) -> Iterator[None]:
    """Around any use of a file: errors of SQLite and of the system become the schema's own."""
    try:
        yield
    except (OSError, sqlite3.Error) as error:
        raise error_of(error, path, schema) from error


def error_of(error: OSError | sqlite3.Error, path: Path, schema: Schema) -> StorageError:
    """The schema's own error for one of SQLite or of the system."""
    found = trouble(error, path)
    return schema.error(_words(error, found, path, schema), found)


@contextlib.contextmanager
def transaction(db: sqlite3.Connection) -> Iterator[None]:
    """One step: all of it on disk, or nothing."""
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        with contextlib.suppress(sqlite3.Error):
            if db.in_transaction:
                db.execute("ROLLBACK")
        raise


def _connect(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=BUSY_S)


def _make_durable(db: sqlite3.Connection, path: Path, schema: Schema) -> None:
    if db.execute("PRAGMA journal_mode = WAL").fetchone()[0] != "wal":
        raise schema.error(
            f"{path}: this file system cannot keep a write-ahead log; put the data directory on a local disk",
            Trouble.FAILED,
        )
    db.execute("PRAGMA synchronous = FULL")
    if db.execute("PRAGMA synchronous").fetchone()[0] != _FULL:
        raise schema.error(
            f"{path}: SQLite does not sync every commit here; its build forbids synchronous=FULL", Trouble.FAILED
        )
    if sys.platform == "darwin":
        db.execute("PRAGMA fullfsync = ON")
        db.execute("PRAGMA checkpoint_fullfsync = ON")


def _make_tables(db: sqlite3.Connection, path: Path, schema: Schema) -> None:
    """Make the tables of a new file, and those that an older one lacks. In one transaction: a crash leaves it as it
    was."""
    if _version(db, path, schema) == schema.version:
        return
    with transaction(db):
        version = _version(db, path, schema)  # again, now that nobody else can change it
        for statements in [schema.tables] if version == 0 else map(schema.upgrades.get, range(version, schema.version)):
            _run(db, statements or "")
        db.execute(f"PRAGMA user_version = {schema.version}")


def _run(db: sqlite3.Connection, statements: str) -> None:
    """`executescript` would commit the transaction first."""
    statement = ""
    for line in statements.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            db.execute(statement)
            statement = ""
    if statement.strip():
        db.execute(statement)


def _version(db: sqlite3.Connection, path: Path, schema: Schema) -> int:
    """The format of the file; 0 for one that has nothing in it yet. Refuses what is not ours to open."""
    version = int(db.execute("PRAGMA user_version").fetchone()[0])
    if version > schema.version:
        raise schema.error(
            f"{path} has format {version} and was written by a newer version; this one reads up to {schema.version}: "
            f"update it, or {_OTHER_DIRECTORY}",
            Trouble.NEWER,
        )
    there = {name for (name,) in db.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")}
    if (there or version) and not there & schema.table_names:
        raise schema.error(
            f"{path} is a database of another program, and no {schema.name}: move it away, or {_OTHER_DIRECTORY}",
            Trouble.FOREIGN,
        )
    if version and not schema.reads(version):
        raise schema.error(
            f"{path} has format {version}, which an older release wrote, and is not read here: let that release "
            f"deliver what is in the data directory and move the directory away, or {_OTHER_DIRECTORY}",
            Trouble.OLDER,
        )
    return version


def _open_to_read(path: Path, schema: Schema, *, lasting: bool) -> sqlite3.Connection:
    if not path.exists():
        raise schema.error(f"{path} does not exist yet: {schema.when_empty}", Trouble.GONE)
    db = _connect_to_read(path, lasting=lasting)
    try:
        if _version(db, path, schema) == 0:
            raise schema.error(f"{path} holds no {schema.name} yet: {schema.when_empty}", Trouble.GONE)
    except BaseException:
        db.close()
        raise
    return db


def _connect_to_read(path: Path, *, lasting: bool) -> sqlite3.Connection:
    log = path.with_name(path.name + "-wal")
    quiet = not lasting and (not log.exists() or log.stat().st_size == 0)
    return sqlite3.connect(
        f"{path.absolute().as_uri()}?mode=ro{'&immutable=1' if quiet else ''}",
        uri=True,
        isolation_level=None,
        check_same_thread=False,
        timeout=BUSY_S,
    )


def _words(error: OSError | sqlite3.Error, found: Trouble, path: Path, schema: Schema) -> str:
    match found:
        case Trouble.FULL:
            return f"{path}: no room is left on the disk; {schema.when_full}"
        case Trouble.DAMAGED | Trouble.NOT_DATABASE:
            return f"{path} is damaged ({error}): {schema.when_damaged}"
        case Trouble.BUSY:
            return f"{path} is in use by another process; stop it"
        case Trouble.READ_ONLY:
            return (
                f"{path} cannot be opened: its file system is read-only; mount it for writing "
                f"(the {schema.name} is whole)"
            )
    return explain(error, f"{path} cannot be used", path)
