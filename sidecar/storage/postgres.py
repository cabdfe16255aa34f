"""The one way a PostgreSQL database is used: in transactions, over a few connections, refused in words otherwise.

Nothing depends on a session, so PgBouncer in transaction mode may stand between: every statement is inside a
transaction, no prepared statement is kept (`statement_cache_size=0`), locks are those of a transaction. All of our
tables are in the schema `metering`. Parts bring their own list of steps (`migrate`), which is run once for a database,
by whoever comes first, under a lock.

A transaction whose commit was sent and not answered may have happened: that is `Fault.LOST`, and what is written has
to be such that doing it again changes nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import ssl
import threading
from collections.abc import AsyncIterator, Coroutine, Iterable, Iterator, Sequence
from enum import StrEnum
from typing import Any, Final, Protocol, TypeVar
from urllib.parse import parse_qsl, unquote, urlsplit

from sidecar.storage.files import StorageError

T = TypeVar("T")

SCHEMA: Final = "metering"
CONNECT_S: Final = 5.0
COMMAND_S: Final = 30.0  # a network that is parted shows in nothing else; the largest batch takes well below a second
CONNECTIONS: Final = 2  # of one part: what it writes, and what somebody asks meanwhile
IDLE_S: Final = 60.0
# What texts of any script can be kept in; the second is no encoding, and keeps bytes as they come.
_ENCODINGS: Final = ("UTF8", "SQL_ASCII")
# Of the advisory lock that migrations are made under: any number does, as long as nobody else's program has it.
_MIGRATION_LOCK: Final = 0x6D65_7465_7269_6E67

_VERSIONS: Final = f"""
CREATE SCHEMA IF NOT EXISTS {SCHEMA};
CREATE TABLE IF NOT EXISTS {SCHEMA}.migrations (
  part text PRIMARY KEY, version integer NOT NULL, at timestamptz NOT NULL DEFAULT now());
"""


class Connection(Protocol):
    """What is used of the driver's connection; placeholders are `$1`, `$2`, …; rows are tuples with names."""

    async def execute(self, query: str, *values: Any) -> str: ...
    async def executemany(self, query: str, values: Iterable[Sequence[Any]]) -> None: ...
    async def fetch(self, query: str, *values: Any) -> list[Any]: ...
    async def fetchrow(self, query: str, *values: Any) -> Any: ...
    async def fetchval(self, query: str, *values: Any) -> Any: ...
    async def copy_to_table(
        self,
        table: str,
        *,
        source: AsyncIterator[bytes],
        columns: Sequence[str],
        format: str,  # noqa: A002 - the driver's own name
        schema_name: str | None = None,
    ) -> str: ...


class Fault(StrEnum):
    """What is wrong with a database, or with the way to it."""

    UNREACHABLE = "cannot be reached"
    TLS = "no TLS connection"
    REFUSED = "refuses us"  # user, password, or `pg_hba.conf`
    MISSING = "not there"  # the database
    DENIED = "not permitted"
    READ_ONLY = "read-only"
    BUSY = "busy"  # out of connections or memory, going up or down, deadlock
    FULL = "no room on the disk"
    LOST = "connection lost"  # under way: a commit may have happened
    NEWER = "written by a newer version"
    FOREIGN = "another program's"
    ENCODING = "not for every text"
    DRIVER = "the driver is not installed"
    FAILED = "failed"  # a statement


_PASSES: Final = frozenset(
    {Fault.UNREACHABLE, Fault.READ_ONLY, Fault.BUSY, Fault.FULL, Fault.LOST}
)  # READ_ONLY: a standby becomes the primary


class PostgresError(StorageError):
    """A database cannot be used. The text says why and what to do, in a line, without user or password."""

    def __init__(self, text: str, fault: Fault) -> None:
        super().__init__(text)
        self.fault = fault

    @property
    def passes(self) -> bool:
        """Whether it may pass without anybody doing anything here: what was tried may be tried again."""
        return self.fault in _PASSES


def described(url: str) -> str:
    """Host, port and database of a URL, for messages: `db.example:5432/billing`. Nobody's name, no password."""
    parts = urlsplit(url)
    names = dict(parse_qsl(parts.query))
    host = parts.hostname or names.get("host", "")
    port = parts.port or names.get("port", 5432)
    database = unquote(parts.path.strip("/")) or names.get("dbname") or names.get("database", "")
    return f"{host}:{port}/{database}"


class Postgres:
    """Connections of one part of the program to one database, made when they are wanted, and again after a loss.

    `url`: checked by `postgres_url`; `name`: what the server shows for the connections. It belongs to the event loop in
    which it is first used.
    """

    def __init__(
        self, url: str, *, name: str, connections: int = CONNECTIONS, command_timeout_s: float = COMMAND_S
    ) -> None:
        self._url, self._name, self._most, self._command_s = url, name, connections, command_timeout_s
        self._pool: Any = None
        self._opening = asyncio.Lock()

    def __repr__(self) -> str:
        return f"<Postgres {described(self._url)}>"

    @property
    def where(self) -> str:
        """Host, port and database, for messages."""
        return described(self._url)

    @contextlib.asynccontextmanager
    async def transaction(self, *, read_only: bool = False) -> AsyncIterator[Connection]:
        """One step: all of it in the database, or nothing. Raises `PostgresError`, for statements inside as well.
        `read_only`: all that is read is of one moment."""
        with self._told():
            pool = await self._opened()
            async with (
                pool.acquire(timeout=CONNECT_S + self._command_s) as connection,
                connection.transaction(readonly=read_only, isolation="repeatable_read" if read_only else None),
            ):
                yield connection

    async def migrate(self, part: str, steps: Sequence[str]) -> None:
        """Bring the tables of a part to the version that is the number of `steps`, each some SQL that was never changed
        since it was released. A newer version than we know, and a schema of somebody else, are refused."""
        async with self.transaction() as db:
            if await self._version(db, part) == len(steps):
                return  # without the lock, and without the right to make tables
        async with self.transaction() as db:
            await db.execute("SELECT pg_advisory_xact_lock($1)", _MIGRATION_LOCK)
            await db.execute(_VERSIONS)
            version = await self._version(db, part)
            for step in steps[version:]:
                await db.execute(step)
            await db.execute(
                f"INSERT INTO {SCHEMA}.migrations (part, version) VALUES ($1, $2) "
                "ON CONFLICT (part) DO UPDATE SET version = excluded.version, at = now()",
                part,
                len(steps),
            )
            self._refuse_newer(version, len(steps))

    async def require(self, part: str, steps: Sequence[str]) -> None:
        """That the tables are there and of our version, for who only reads. Changes nothing."""
        async with self.transaction(read_only=True) as db:
            version = await self._version(db, part)
        self._refuse_newer(version, len(steps))
        if version < len(steps):
            raise PostgresError(
                f"the database {self.where} has no tables for this version yet: start a sidecar of it first",
                Fault.MISSING,
            )

    async def close(self) -> None:
        """Close the connections, waiting a moment for those in use."""
        pool, self._pool = self._pool, None
        if pool is None:
            return
        try:
            await asyncio.wait_for(pool.close(), CONNECT_S)
        except TimeoutError:
            pool.terminate()

    async def _version(self, db: Connection, part: str) -> int:
        """Of the tables of a part, 0 where there are none."""
        ours, theirs, encoding = await db.fetchrow(
            "SELECT to_regclass($1) IS NOT NULL, EXISTS (SELECT FROM pg_tables WHERE schemaname = $2), "
            "current_setting('server_encoding')",
            f"{SCHEMA}.migrations",
            SCHEMA,
        )
        if encoding not in _ENCODINGS:
            raise PostgresError(
                f"the database {self.where} keeps texts in {encoding}, which lacks most scripts: make one WITH "
                "TEMPLATE template0 ENCODING 'UTF8', and name it",
                Fault.ENCODING,
            )
        if not ours:
            if theirs:
                raise PostgresError(
                    f"the schema {SCHEMA} of {self.where} is another program's: name another database",
                    Fault.FOREIGN,
                )
            return 0
        found = await db.fetchval(f"SELECT version FROM {SCHEMA}.migrations WHERE part = $1", part)
        return int(found or 0)

    def _refuse_newer(self, version: int, known: int) -> None:
        if version > known:
            raise PostgresError(
                f"the tables of {self.where} are of a newer version ({version}, known are {known}): "
                "install the version of the other sidecars",
                Fault.NEWER,
            )

    async def _opened(self) -> Any:
        """The pool. It makes no connection by itself: whoever needs one makes it, and hears why there is none."""
        if self._pool is not None:
            return self._pool
        async with self._opening:
            if self._pool is None:
                driver = _driver()
                self._pool = await driver.create_pool(
                    self._url,
                    min_size=0,
                    max_size=self._most,
                    max_inactive_connection_lifetime=IDLE_S,
                    timeout=CONNECT_S,
                    command_timeout=self._command_s,
                    statement_cache_size=0,
                    server_settings={"application_name": self._name},
                    reset=_reset,
                )
        return self._pool

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Errors of the driver, the network and the server become ours."""
        try:
            yield
        except PostgresError:
            raise
        except Exception as error:
            found = error_of(error, self.where)
            if found is None:
                raise
            raise found from error


class _Loop:
    """An event loop in a thread, made when it is first needed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._of = 0  # the process whose thread it is: a fork has none

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        with self._lock:
            if self._loop is None or self._of != os.getpid():
                self._loop, self._of = asyncio.new_event_loop(), os.getpid()
                threading.Thread(target=self._loop.run_forever, name="postgres", daemon=True).start()
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()


call: Final = _Loop().run
"""Run something of the driver's for a thread that may block, and give what it returns or raises: in one event loop, for
all of them. Every statement has its time limit, and so has this. Not for a thread that runs a loop itself; and a
`Postgres` that is used so is never used otherwise."""


def _driver() -> Any:
    try:
        import asyncpg
    except ImportError:
        raise PostgresError(
            "the driver for PostgreSQL is not installed: pip install 'metering-sidecar[postgres]'", Fault.DRIVER
        ) from None
    return asyncpg


async def _reset(connection: Any) -> None:
    """What the driver would undo between two uses is the state of a session, and we have none: a round trip less."""


def error_of(error: Exception, where: str) -> PostgresError | None:
    """Our words for an error of the driver, the network or the server; None where it is none of these.

    `where`: host, port and database. The classes of `SQLSTATE` are PostgreSQL's
    (https://www.postgresql.org/docs/current/errcodes-appendix.html).
    """
    state = getattr(error, "sqlstate", None)
    if isinstance(state, str):
        return _of_state(state, error, where)
    if isinstance(error, ssl.SSLError):
        return PostgresError(f"{where} has no certificate that we trust: set sslrootcert in the URL", Fault.TLS)
    if isinstance(error, TimeoutError):
        return PostgresError(f"{where} does not answer: is it there, and may we reach it?", Fault.UNREACHABLE)
    if isinstance(error, ConnectionError) and "SSL" in str(error):
        return PostgresError(f"{where} speaks no TLS: set sslmode in the URL, or switch TLS on there", Fault.TLS)
    if isinstance(error, (ConnectionResetError, BrokenPipeError)):
        return PostgresError(f"the connection to {where} was lost", Fault.LOST)
    if isinstance(error, OSError):
        said = error.strerror or str(error)
        return PostgresError(f"{where} cannot be reached: {said}", Fault.UNREACHABLE)
    return _of_driver(error, where)


def _of_driver(error: Exception, where: str) -> PostgresError | None:
    if not type(error).__module__.startswith("asyncpg"):
        return None
    kind = type(error).__name__
    if kind in ("InterfaceError", "InternalClientError"):
        return PostgresError(f"the connection to {where} was lost", Fault.LOST)
    if kind == "ClientConfigurationError":  # a parameter of the URL, which its text names
        return PostgresError(f"the URL of {where} cannot be used: {error}", Fault.FAILED)
    return PostgresError(f"{where} and the driver do not agree: {kind}", Fault.FAILED)


def _of_state(state: str, error: Exception, where: str) -> PostgresError:
    """By the server's own code; its text is not repeated, since it may quote what was sent."""
    if state == _PROTOCOL and any(words in str(error) for words in _PGBOUNCER_FULL):
        state = "53300"
    said = _STATES.get(state) or _STATES.get(state[:2])
    if said is None:
        return PostgresError(f"{where} failed a statement: {type(error).__name__} ({state})", Fault.FAILED)
    fault, text = said
    return PostgresError(text.format(where), fault)


def read_only(where: str) -> PostgresError:
    """As the server says it to who writes."""
    fault, text = _STATES["25006"]
    return PostgresError(text.format(where), fault)


# What PgBouncer says by is one code for all that is its own.
_PROTOCOL: Final = "08P01"
_PGBOUNCER_FULL: Final = ("no more connections allowed", "query_wait_timeout")
_LOST: Final = (Fault.LOST, "the connection to {} was lost")
_BUSY: Final = (Fault.BUSY, "{} is busy, starting or stopping")
_PASSWORD: Final = (Fault.REFUSED, "{} refuses the user or the password of the URL")
# A whole SQLSTATE, else its class.
_STATES: Final = {
    "28000": _PASSWORD,
    "28P01": _PASSWORD,
    "3D000": (Fault.MISSING, "{}: there is no such database; make it, or correct the URL"),
    "42501": (Fault.DENIED, "{}: the user may not do that; GRANT CREATE ON DATABASE, or let its owner start once"),
    "25006": (Fault.READ_ONLY, "{} is read-only: name the primary, or set target_session_attrs=read-write"),
    "53100": (Fault.FULL, "{} has no room on its disk"),
    "57014": (Fault.BUSY, "{} ended a statement that took too long"),
    "08003": _LOST, "08006": _LOST, "08007": _LOST, "57P01": _LOST, "57P02": _LOST,
    "25P03": _LOST,  # we were silent for too long inside a transaction: stopped, or out of reach
    "08": (Fault.UNREACHABLE, "{} cannot be reached"),
    "40": _BUSY, "55": _BUSY, "57": _BUSY,
    "22M01": (Fault.FAILED, "{}: a record's day is forgotten there by ledger-retention.sql, so it is parked, or aside"),
    "53": (Fault.BUSY, "{} has no connection or memory left"),
}  # fmt: skip
