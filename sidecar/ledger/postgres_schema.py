"""The tables of the ledger that many sidecars share, and what both sides of it need: the steps that make the tables,
the way from a blocking caller to the driver, and what a record's line says of itself.

The sums are those of the embedded ledger (`schema`), kept exact by `numeric`, and by instance as well. Beside them the
records themselves are kept, each once by its id, in partitions by day: what is in the sums is exactly what `counted`
says of the records. Texts compare byte by byte (`COLLATE "C"`), as in SQLite.
"""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Any, Final, NamedTuple, TypeVar
from uuid import NAMESPACE_URL, UUID, uuid5

import orjson

from sidecar.ledger.lanes import LANES, lane_of
from sidecar.ledger.schema import SUMS
from sidecar.storage.postgres import CONNECT_S, SCHEMA, Postgres

T = TypeVar("T")

PART: Final = "ledger"  # of the migrations
_SUM_COLUMNS: Final = ", ".join(f"{name} numeric" for name in SUMS)

# Each step is run once for a database and never changed after a release.
STEPS: Final = (
    f"""
CREATE TABLE {SCHEMA}.instances (
  instance text COLLATE "C" PRIMARY KEY,
  nonce text NOT NULL, -- of the last start of its data directory; every write is made with it
  seen timestamptz NOT NULL DEFAULT now(),
  last_seq bigint NOT NULL DEFAULT 0, -- the greatest number of a record, of the spool that was written last
  records bigint NOT NULL DEFAULT 0, -- of it in `records`, ever
  writes bigint NOT NULL DEFAULT 0, -- another number after each change
  earlier bigint, -- what it had delivered to another ledger before it came here
  oldest_pending timestamptz, -- of what it has and this ledger lacks; null: nothing
  balance jsonb, -- its own, as of `balance_at`
  balance_at timestamptz
);
CREATE TABLE {SCHEMA}.lanes (
  lane smallint PRIMARY KEY,
  last_seq bigint NOT NULL DEFAULT 0, -- of the records in it: without holes, in the order of commits
  holder text, -- who delivers, until `expires`
  epoch bigint NOT NULL DEFAULT 0,
  expires timestamptz
) WITH (fillfactor = 50);
INSERT INTO {SCHEMA}.lanes (lane) SELECT generate_series(0, {LANES - 1});
CREATE TABLE {SCHEMA}.records (
  day date NOT NULL, -- of the id's own time
  id uuid NOT NULL,
  instance text COLLATE "C" NOT NULL,
  spool text COLLATE "C" NOT NULL, -- of it, and the record's number there
  seq bigint NOT NULL,
  lane smallint NOT NULL,
  lane_seq bigint NOT NULL,
  subscriber text COLLATE "C",
  counted boolean NOT NULL, -- in the sums
  cancelled_at timestamptz, -- taken out of them again
  line bytea NOT NULL, -- as the spool has it
  PRIMARY KEY (day, id)
) PARTITION BY RANGE (day);
CREATE INDEX records_of_lane ON {SCHEMA}.records (lane, lane_seq);
CREATE TABLE {SCHEMA}.series (
  id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
  key bytea NOT NULL UNIQUE, -- a digest of all of it
  instance text COLLATE "C" NOT NULL,
  subscriber text COLLATE "C",
  model text COLLATE "C",
  provider text COLLATE "C",
  route text COLLATE "C",
  status_class text COLLATE "C" NOT NULL
);
CREATE TABLE {SCHEMA}.series_dimensions (
  series bigint NOT NULL,
  name text COLLATE "C" NOT NULL,
  value text COLLATE "C" NOT NULL,
  PRIMARY KEY (series, name)
);
CREATE TABLE {SCHEMA}.dimension_values ( -- of each name so many at most
  name text COLLATE "C" NOT NULL,
  value text COLLATE "C" NOT NULL,
  PRIMARY KEY (name, value)
);
CREATE TABLE {SCHEMA}.hourly (
  hour bigint NOT NULL, -- Unix seconds of its start, UTC
  series bigint NOT NULL,
  {_SUM_COLUMNS},
  cost_usd numeric,
  PRIMARY KEY (hour, series)
) WITH (fillfactor = 70);
CREATE TABLE {SCHEMA}.daily (
  day bigint NOT NULL,
  series bigint NOT NULL,
  {_SUM_COLUMNS},
  cost_usd numeric,
  PRIMARY KEY (day, series)
) WITH (fillfactor = 70);
CREATE TABLE {SCHEMA}.hourly_units (
  hour bigint NOT NULL,
  series bigint NOT NULL,
  unit text COLLATE "C" NOT NULL,
  amount numeric NOT NULL,
  PRIMARY KEY (hour, series, unit)
);
CREATE TABLE {SCHEMA}.buckets (
  id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
  key bytea NOT NULL UNIQUE,
  meter text COLLATE "C" NOT NULL,
  version text COLLATE "C" NOT NULL,
  subscriber text COLLATE "C",
  grp text COLLATE "C",
  start bigint NOT NULL,
  kind text NOT NULL,
  value numeric,
  at_us bigint NOT NULL,
  record_id text COLLATE "C" NOT NULL
) WITH (fillfactor = 70);
CREATE INDEX buckets_of_meter ON {SCHEMA}.buckets (meter, version, start);
CREATE TABLE {SCHEMA}.uniques (
  bucket bigint NOT NULL,
  hash text COLLATE "C" NOT NULL,
  PRIMARY KEY (bucket, hash)
);
""",
)

NO_TIME: Final = date(1970, 1, 1)  # the day of ids that have no time of their own
_TIMED_MS: Final = (1_577_836_800_000, 4_102_444_800_000)  # 2020 to 2099: no clock that is off makes a day outside
_EPOCH: Final = date(1970, 1, 1)
_DAY_MS: Final = 86_400_000
# As `model.record` writes them. A quote in a value is escaped, so these cannot stand inside one.
_UUID: Final = re.compile("[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
# How `model.record` begins a line, and where it says who pays. A quote in a value is escaped, so that these words with
# their quotes cannot stand inside one.
_ID: Final = b'{"id":"'
_SEQ: Final = b'","seq":'
_INSTANCE: Final = b',"instance":"'
_NOBODY: Final = b'"subscriber":null'
_PAYER: Final = b'"subscriber":{"id":"'
_ID_ENDS: Final = len(_ID) + 36
_SEQ_BEGINS: Final = _ID_ENDS + len(_SEQ)


class Line(NamedTuple):
    """One record as it is written: a row of `records`, without its numbers. `counted`: it is to be in the sums."""

    day: date
    id: str  # a UUID
    spool: str
    seq: int
    lane: int
    subscriber: str | None
    counted: bool
    line: bytes


def line_of(stored: bytes, *, counted: bool = True) -> Line | None:
    """What a stored line says of itself, without reading all of it; None: it is no record."""
    spool_begins = stored.find(_INSTANCE, _SEQ_BEGINS)
    payer_begins = stored.find(_PAYER)
    if (
        stored.startswith(_ID)
        and stored.startswith(_SEQ, _ID_ENDS)
        and spool_begins > 0
        and (payer_begins > 0 or _NOBODY in stored)
    ):
        seq = stored[_SEQ_BEGINS:spool_begins]
        spool_begins += len(_INSTANCE)
        spool = stored[spool_begins : stored.find(b'"', spool_begins)]
        subscriber = b""
        if payer_begins > 0:
            payer_begins += len(_PAYER)
            subscriber = stored[payer_begins : stored.find(b'"', payer_begins)]
        if seq.isdigit() and b"\\" not in subscriber and b"\\" not in spool:
            payer = None if payer_begins < 0 else subscriber.decode("utf-8", "replace")
            id_ = stored[len(_ID) : _ID_ENDS].decode("ascii", "replace")
            return made_line(id_, spool.decode("utf-8", "replace"), int(seq), payer, stored, counted=counted)
    try:
        row = orjson.loads(stored)
        id_, number, place, said = str(row["id"]), int(row["seq"]), str(row["instance"]), row["subscriber"]
        payer = None if said is None or said["id"] is None else storable(str(said["id"]))
    except (ValueError, KeyError, TypeError):
        return None
    return made_line(id_, storable(place), number, payer, stored, counted=counted)


def made_line(record_id: str, spool: str, seq: int, subscriber: str | None, stored: bytes, *, counted: bool) -> Line:
    key = uuid_of(record_id)
    return Line(day_of(key), key, spool, seq, lane_of(subscriber or key), subscriber, counted, stored)


def storable(text: str) -> str:
    """The same without what PostgreSQL keeps in no text: NUL, and halves of surrogate pairs."""
    if text.isascii() and "\0" not in text:
        return text
    return text.encode("utf-8", "replace").decode().replace("\0", "\N{REPLACEMENT CHARACTER}")


def uuid_of(record_id: str) -> str:
    """The key of a record: its id, which is a UUID; of any other text one that is made of it."""
    if _UUID.fullmatch(record_id):
        return record_id
    try:
        return str(UUID(record_id))
    except ValueError:
        return str(uuid5(NAMESPACE_URL, storable(record_id)))


def day_of(uuid: str) -> date:
    """The day (UTC) of the time in a UUID of version 7: which partition a record is in follows from its id alone."""
    if uuid[14] != "7":
        return NO_TIME
    ms = int(uuid[:8] + uuid[9:13], 16)
    return _day(ms // _DAY_MS) if _TIMED_MS[0] <= ms < _TIMED_MS[1] else NO_TIME


_days: dict[int, date] = {}


def _day(number: int) -> date:
    found = _days.get(number)
    if found is None:
        if len(_days) >= 1000:
            _days.clear()
        found = _days[number] = _EPOCH + timedelta(days=number)
    return found


def day_at(moment_s: float) -> date:
    return datetime.fromtimestamp(moment_s, UTC).date()


def partition_of(day: date) -> Sequence[str]:
    """The statements that make the partition of a day. It is attached and not made in place, which would wait for
    everybody who writes."""
    name = f"{SCHEMA}.records_{day:%Y%m%d}"
    ends = day + timedelta(days=1)
    return (
        f"CREATE TABLE {name} (LIKE {SCHEMA}.records INCLUDING ALL)",
        f"ALTER TABLE {SCHEMA}.records ATTACH PARTITION {name} FOR VALUES FROM ('{day}') TO ('{ends}')",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Reported:
    """What a sidecar says of itself. `oldest_pending_s`: Unix seconds of the oldest record that is not here yet;
    `delivered`: how many it says are, those that went to an earlier ledger included."""

    oldest_pending_s: float | None = None
    balance: Mapping[str, Any] | None = None
    delivered: int = 0


class Blocking:
    """A database for callers that block: its connections live in an event loop of their own, in a thread that is
    started with the first question. Calls may come from any thread."""

    def __init__(self, url: str, *, name: str, connections: int = 1) -> None:
        self._url, self._name, self._connections = url, name, connections
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self.db = Postgres(url, name=name, connections=connections)

    def __repr__(self) -> str:
        return f"<Blocking {self.db}>"

    def run(self, do: Coroutine[Any, Any, T]) -> T:
        """Wait for what it returns or raises. Every statement has its time limit, and so has this."""
        return asyncio.run_coroutine_threadsafe(do, self._started()).result()

    def close(self) -> None:
        with self._lock:
            loop, thread, self._loop, self._thread = self._loop, self._thread, None, None
        if loop is None or thread is None:
            return
        asyncio.run_coroutine_threadsafe(self.db.close(), loop).result(2 * CONNECT_S)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(CONNECT_S)
        loop.close()
        self.db = Postgres(self._url, name=self._name, connections=self._connections)

    def _started(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(target=self._loop.run_forever, name=self._name, daemon=True)
                self._thread.start()
            return self._loop
