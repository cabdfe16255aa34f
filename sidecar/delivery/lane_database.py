"""The state of delivery of one lane, in a PostgreSQL that many sidecars share: the second kind of `database`.

Each lane has a schema of its own with the tables that `delivery.db` has. Every step begins by locking the row of the
lane's lease and comparing holder and epoch: who has been deposed commits nothing any more, whole, whatever it believes.
Who takes a lane over locks that row against every step, so a lane changes hands only between two of them; who renews it
does not, so a step that hangs keeps no lease from being renewed. A step whose sidecar falls silent is ended by the
server: nobody else could take its lane until the server finds out by itself that the connection is dead, in hours.

`store` and `queries` are written for threads that may block, and the driver for an event loop (`call`).
"""

from __future__ import annotations

import functools
import re
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Final

from sidecar.delivery.database import Connection
from sidecar.delivery.rows import StateBusy, StateError, StateFull
from sidecar.ledger.lanes import LANES
from sidecar.storage import postgres
from sidecar.storage.postgres import Fault, Postgres, PostgresError, call

PART: Final = "lane_{:02}"  # in `metering.migrations`, and the end of a lane's schema
_SCHEMA: Final = "metering_" + PART

# The tables of `schema.sql`, with PostgreSQL's types. A text sorts by its bytes, as there; `instr` is SQLite's.
STEPS: Final = (
    """
CREATE SCHEMA {schema};
SET LOCAL search_path TO {schema};
CREATE FUNCTION instr(text, text) RETURNS integer LANGUAGE sql IMMUTABLE AS 'SELECT position($2 in $1)';
CREATE FUNCTION instr(bytea, bytea) RETURNS integer LANGUAGE sql IMMUTABLE AS 'SELECT position($2 in $1)';
CREATE TABLE meta(name text PRIMARY KEY, value double precision NOT NULL);
CREATE TABLE backend(name text PRIMARY KEY, since_s double precision NOT NULL, removed integer NOT NULL DEFAULT 0);
CREATE TABLE cursor(
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, backend text COLLATE "C" NOT NULL,
    instance text COLLATE "C" NOT NULL, seq bigint NOT NULL, again_upto bigint NOT NULL DEFAULT 0,
    folded_seq bigint NOT NULL DEFAULT 0, UNIQUE(backend, instance));
CREATE TABLE sealed(
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, cursor bigint NOT NULL, first_seq bigint NOT NULL,
    last_seq bigint NOT NULL, settled integer NOT NULL DEFAULT 0, attempts integer NOT NULL DEFAULT 0,
    under_way integer NOT NULL DEFAULT 0, started_s double precision NOT NULL DEFAULT 0,
    due_s double precision NOT NULL DEFAULT 0, risk_s double precision, expired integer NOT NULL DEFAULT 0,
    forced integer NOT NULL DEFAULT 0, generation integer NOT NULL DEFAULT 0, records bigint NOT NULL,
    size_bytes bigint NOT NULL, at_s double precision NOT NULL, oldest_s double precision NOT NULL, key text NOT NULL,
    subject text NOT NULL, version integer NOT NULL, fates text, history text NOT NULL DEFAULT '[]',
    members bytea NOT NULL);
CREATE INDEX sealed_open ON sealed(cursor) WHERE settled = 0;
CREATE INDEX sealed_seq ON sealed(cursor, last_seq);
CREATE TABLE payload(
    request bigint PRIMARY KEY, path text NOT NULL, content_type text NOT NULL, headers text NOT NULL,
    body bytea NOT NULL, lines bytea NOT NULL);
CREATE TABLE skipped(
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, cursor bigint NOT NULL, reason text NOT NULL,
    first_seq bigint NOT NULL, last_seq bigint NOT NULL, n bigint NOT NULL, seqs bytea);
CREATE INDEX skipped_seq ON skipped(cursor, last_seq);
CREATE TABLE parked(
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, cursor bigint NOT NULL, seq bigint NOT NULL,
    record_id text NOT NULL, event_id text NOT NULL, reason text COLLATE "C" NOT NULL, maybe_taken integer NOT NULL,
    at_s double precision NOT NULL, key text NOT NULL, generation integer NOT NULL, request bigint,
    line bytea NOT NULL, history text NOT NULL);
CREATE INDEX parked_seq ON parked(cursor, seq);
CREATE INDEX parked_request ON parked(request);
CREATE TABLE parts(
    cursor bigint NOT NULL, seq bigint NOT NULL, pending bigint NOT NULL, parked bigint NOT NULL,
    delivered bigint NOT NULL, duplicate bigint NOT NULL, reason text NOT NULL, PRIMARY KEY(cursor, seq));
CREATE TABLE applied(
    cursor bigint NOT NULL, first_seq bigint NOT NULL, last_seq bigint NOT NULL, duplicate integer NOT NULL,
    PRIMARY KEY(cursor, first_seq));
CREATE TABLE counter(
    cursor bigint NOT NULL, folded integer NOT NULL, term text NOT NULL, reason text NOT NULL, n bigint NOT NULL,
    PRIMARY KEY(cursor, folded, term, reason));
""",
)
# Of all lanes: who may commit. Apart from the row that numbers a lane's records, which every commit of records locks.
LEASES: Final = (
    """
CREATE TABLE metering.lane_leases(
    lane smallint PRIMARY KEY, holder text, epoch bigint NOT NULL DEFAULT 0, expires timestamptz);
INSERT INTO metering.lane_leases (lane) SELECT generate_series(0, 15);
CREATE TABLE metering.lane_members(holder text PRIMARY KEY, expires timestamptz NOT NULL);
CREATE TABLE metering.lane_wishes(
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, lane smallint NOT NULL, at timestamptz NOT NULL DEFAULT now(),
    wish text NOT NULL, answer text);
CREATE INDEX lane_wishes_open ON metering.lane_wishes(lane) WHERE answer IS NULL;
""",
)
LEASES_PART: Final = "lane_leases"
SILENT_S: Final = 10  # between two statements of one transaction, on our side: they come within milliseconds
SILENT: Final = f"SET LOCAL idle_in_transaction_session_timeout = '{SILENT_S}s'"


@dataclass(frozen=True, slots=True)
class Held:
    """A lane that somebody holds, since the `epoch`th change of its holder."""

    lane: int
    holder: str
    epoch: int


class Deposed(StateError):
    """The lane is another's by now: nothing of this step was kept, and nothing more may be tried."""


class LaneDatabase:
    """The state of a lane, for its holder."""

    def __init__(self, database: Postgres, held: Held) -> None:
        """`database`: used by nobody in another event loop than `call`'s. Makes the tables if need be."""
        self._database, self._held = database, held
        self._lock = threading.Lock()
        with told(self.where):
            self.created = call(self._make())

    async def _make(self) -> bool:
        """The tables, if need be; whether they were not there."""
        async with self._database.transaction(read_only=True) as db:
            there = await db.fetchval("SELECT to_regnamespace($1) IS NOT NULL", _SCHEMA.format(self._held.lane))
        await self._database.migrate(LEASES_PART, LEASES)
        await _make_tables(self._database, self._held.lane)
        return not there

    @property
    def where(self) -> str:
        return f"lane {self._held.lane} in {self._database.where}"

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        with self._lock, told(self.where), _transaction(self._database, self._held.lane, self._held) as connection:
            if connection is None:
                raise Deposed(f"{self.where} is another sidecar's by now")
            yield connection

    @contextmanager
    def looking(self) -> Iterator[Connection]:
        with self._lock, told(self.where), _transaction(self._database, self._held.lane) as connection:
            assert connection is not None
            yield connection

    def reader(self) -> LaneReading:
        return LaneReading(self._database, self._held.lane)

    def reopen(self) -> None:
        """The driver has done so by itself."""

    def close(self) -> None:
        """Its connections are others' as well."""


class LaneReading:
    """The state of a lane, for whoever wants to know."""

    def __init__(self, database: Postgres, lane: int) -> None:
        self._database, self.lane = database, lane

    @property
    def where(self) -> str:
        return f"lane {self.lane} in {self._database.where}"

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        with told(self.where), _transaction(self._database, self.lane, read_only=True) as connection:
            assert connection is not None
            yield connection

    def apart(self, *, moment: bool = False) -> Any:
        """PostgreSQL keeps no log for who reads long."""
        del moment
        return self.reading()

    def close(self) -> None:
        """Its connections are others' as well."""


@contextmanager
def lanes_read(url: str) -> Iterator[list[LaneReading]]:
    """All lanes, for whoever wants to know and holds none. Raises `StateError`."""
    database = Postgres(url, name="metering-sidecar lanes read")
    try:
        with told(f"the lanes in {database.where}"):
            call(database.require(LEASES_PART, LEASES))
        yield [LaneReading(database, lane) for lane in range(LANES)]
    finally:
        call(database.close())


@contextmanager
def told(where: str) -> Iterator[None]:
    """Errors of the database in the words of delivery: what passes by itself is busy or full."""
    try:
        yield
    except PostgresError as error:
        kind = StateFull if error.fault is Fault.FULL else StateBusy if error.passes else StateError
        raise kind(f"{where}: {error}") from error


async def make_lanes(database: Postgres, backends: Sequence[str]) -> None:
    """The tables of all lanes. These backends get all that comes in a lane that has no record yet: whoever writes one
    and tells no vendor of it himself does this first, so nobody else can have told of it. Of a lane that has records
    already, some may have been told by those who wrote them: its tables stay without a mark, and the first `Delivery`
    takes these records for perhaps delivered (`DeliveryStore.configure`)."""
    await database.migrate(LEASES_PART, LEASES)
    async with database.transaction(read_only=True) as db:
        rows = await db.fetch("SELECT part, version FROM metering.migrations")
    versions = {str(part): int(version) for part, version in rows}
    for lane in range(LANES):
        if versions.get(PART.format(lane)) != len(STEPS):
            await _make_tables(database, lane)
    marks = " UNION ALL ".join(
        f"SELECT {lane} WHERE NOT EXISTS (SELECT FROM {_SCHEMA.format(lane)}.meta WHERE name = 'served')"
        for lane in range(LANES)
    )
    async with database.transaction(read_only=True) as db:
        unmarked = [int(row[0]) for row in await db.fetch(marks)]
    for lane in unmarked if backends else ():
        await _begin_lane(database, lane, backends)


async def _make_tables(database: Postgres, lane: int) -> None:
    await database.migrate(PART.format(lane), [step.format(schema=_SCHEMA.format(lane)) for step in STEPS])


async def _begin_lane(database: Postgres, lane: int, backends: Sequence[str]) -> None:
    """Let these backends get all that comes in this lane, if nothing came yet."""
    schema, now_s = _SCHEMA.format(lane), time.time()
    async with database.transaction() as db:
        # Whoever writes records changes this row: it has done so, or waits until the mark is there.
        if await db.fetchval("SELECT last_seq FROM metering.lanes WHERE lane = $1 FOR UPDATE", lane) != 0:
            return
        marked = await db.execute(
            f"INSERT INTO {schema}.meta(name, value) VALUES('served', $1) ON CONFLICT DO NOTHING", now_s
        )
        for name in backends if marked == "INSERT 0 1" else ():
            await db.execute(f"INSERT INTO {schema}.backend(name, since_s) VALUES($1, $2)", name, now_s)
            await db.execute(
                f"INSERT INTO {schema}.cursor(backend, instance, seq) VALUES($1, $2, 0)", name, spool_of(lane)
            )


def schema_of(lane: int) -> str:
    """Where the tables of a lane are."""
    return _SCHEMA.format(lane)


def spool_of(lane: int) -> str:
    """What a lane is called where the instance of a spool is named."""
    return f"lane-{lane:02}"


@contextmanager
def _transaction(
    database: Postgres, lane: int, held: Held | None = None, *, read_only: bool = False
) -> Iterator[_Statements | None]:
    """A transaction in the driver's loop, for a thread that blocks. None: it is not `held`'s."""
    stack, statements = call(_begin(database, lane, held, read_only=read_only))
    try:
        yield statements
    except BaseException as error:
        # It is told what happened inside, rolls back, and gives the error back, in its own words if it is the driver's.
        if not call(stack.__aexit__(type(error), error, error.__traceback__)):
            raise
    else:
        call(_end(stack, statements))


async def _begin(
    database: Postgres, lane: int, held: Held | None, *, read_only: bool
) -> tuple[AsyncExitStack, _Statements | None]:
    path = f"{_SCHEMA.format(lane)}, {postgres.SCHEMA}"
    async with AsyncExitStack() as stack:
        connection = await stack.enter_async_context(database.transaction(read_only=read_only))
        if held is None:
            await connection.execute(f"SET LOCAL search_path TO {path}; {SILENT}")
        elif await connection.fetchval(_MINE, held.lane, held.holder, held.epoch, path, f"{SILENT_S}s") is None:
            return stack.pop_all(), None
        return stack.pop_all(), _Statements(connection)


async def _end(stack: AsyncExitStack, statements: _Statements | None) -> None:
    async with stack:
        if statements is not None:
            await statements.flush()


# The first statement of a step: whose lane it is, and what `SET LOCAL` does for a transaction that only reads.
_MINE: Final = """
SELECT set_config('search_path', $4, true) || set_config('idle_in_transaction_session_timeout', $5, true)
FROM metering.lane_leases WHERE lane = $1 AND holder = $2 AND epoch = $3 FOR KEY SHARE"""


class _Statements:
    """A connection as `sqlite3` has it, over one of the driver's.

    What gives nothing back waits until something is asked, or the step ends, and goes then as one message: a step is a
    few trips to the server, where each statement by itself would be two, and a change of threads. Such statements have
    their values written out, since a message of several takes none.
    """

    def __init__(self, connection: postgres.Connection) -> None:
        self._connection = connection
        self._waiting: list[_Later] = []

    def execute(self, statement: str, values: Sequence[Any] = (), /) -> _Rows | _Later:
        text, gives = _translated(statement)
        if gives:
            rows = call(self._asked(text, values))
            return _Rows(rows, len(rows))
        later = _Later(self, statement, values)
        self._waiting.append(later)
        if not all(map(_can_be_written, values)):
            _ = later.rowcount
        return later

    def executemany(self, statement: str, rows: Iterable[Sequence[Any]], /) -> None:
        for row in rows:
            self.execute(statement, row)

    async def flush(self) -> None:
        """Send what waits."""
        waiting, self._waiting = self._waiting, []
        if waiting:
            await self._connection.execute(";\n".join(map(str, waiting)))

    async def _asked(self, text: str, values: Sequence[Any]) -> list[Any]:
        await self.flush()
        return await self._connection.fetch(text, *values)

    def count(self, later: _Later) -> int:
        """How many rows a statement changed: then it goes by itself, now."""
        if self._waiting[-1:] != [later]:
            raise AssertionError("asked for after something else was done")
        self._waiting.pop()
        return call(self._counted(later))

    async def _counted(self, later: _Later) -> int:
        await self.flush()
        said = await self._connection.execute(_translated(later.statement)[0], *later.values)
        return int(said.rpartition(" ")[2])


class _Later:
    """A statement that gives no rows. `rowcount` is for whoever asks before anything else is done."""

    def __init__(self, statements: _Statements, statement: str, values: Sequence[Any]) -> None:
        self._statements, self.statement, self.values = statements, statement, values
        self._count: int | None = None

    @property
    def rowcount(self) -> int:
        if self._count is None:
            self._count = self._statements.count(self)
        return self._count

    def __str__(self) -> str:
        """With its values."""
        values = iter(self.values)
        return re.sub(r"\?", lambda _: _written(next(values)), self.statement)

    def fetchone(self) -> Any:
        return None

    def fetchall(self) -> list[Any]:
        return []

    def __iter__(self) -> Iterator[Any]:
        return iter(())


WRITTEN_MAX: Final = 1 << 16  # of a value: what is larger goes as it is, and not as twice as many characters


def _can_be_written(value: Any) -> bool:
    if isinstance(value, str):
        return len(value) <= WRITTEN_MAX and "\0" not in value
    return isinstance(value, (int, float, type(None))) or (isinstance(value, bytes) and len(value) <= WRITTEN_MAX)


def _written(value: Any) -> str:
    """A value as a literal; for texts in the form whose meaning no setting of the server changes."""
    match value:
        case None:
            return "NULL"
        case str():
            return "E'{}'".format(value.replace("\\", "\\\\").replace("'", "''"))
        case bytes():
            return f"E'\\\\x{value.hex()}'::bytea"
        case float():
            return f"'{value!r}'::double precision"
        case _:
            return f"({int(value)})"


class _Rows:
    def __init__(self, rows: list[Any], count: int) -> None:
        self._rows, self.rowcount = rows, count

    def fetchone(self) -> Any:
        return self._rows[0] if self._rows else None

    def fetchall(self) -> list[Any]:
        return self._rows

    def __iter__(self) -> Iterator[Any]:
        return iter(self._rows)


@functools.lru_cache(maxsize=1000)
def _translated(statement: str) -> tuple[str, bool]:
    """With `$1` for the first `?`, and whether it gives rows. No text of ours has a question mark in quotes."""
    numbers = iter(range(1, 1 + statement.count("?")))
    text = re.sub(r"\?", lambda _: f"${next(numbers)}", statement)
    return text, statement.lstrip().startswith("SELECT") or " RETURNING " in statement
