"""The tables of the ledger that many sidecars share, and what both sides of it need: the steps that make the tables,
what a record's line says of itself, and the form in which it is copied.

The sums are those of the embedded ledger (`schema`), kept exact by `numeric`, and by instance as well. Beside them the
records themselves are kept, each once by its id, in partitions by day: what is in the sums is exactly what `counted`
says of the records. Texts compare byte by byte (`COLLATE "C"`), as in SQLite.
"""

from __future__ import annotations

import re
from binascii import unhexlify
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from struct import Struct
from typing import Any, Final, NamedTuple
from uuid import NAMESPACE_URL, UUID, uuid5

import orjson

from sidecar.ledger.lanes import LANES, lane_of
from sidecar.ledger.schema import DAY_S, SUMS
from sidecar.meters.buckets import UNIQUE_MAX
from sidecar.meters.hourly import COUNTS, JSON_INT_MAX
from sidecar.storage.postgres import SCHEMA

PART: Final = "ledger"  # of the migrations
_SUM_COLUMNS: Final = ", ".join(f"{name} numeric" for name in SUMS)


def _sum(name: str) -> str:
    return f"coalesce(sum({name}), 0)" if name in COUNTS else f"sum({name})"


def _add_sums(table: str, unit: str, seconds: int) -> str:
    """A statement that adds what is in the parameter `hours`. Counts that are left out are 0; a sum of tokens or money
    is null until one was reported."""
    names = (*SUMS, "cost_usd")
    more = (
        f"{name} = CASE WHEN excluded.{name} IS NULL THEN old.{name} ELSE coalesce(old.{name}, 0) + excluded.{name} END"
        for name in names
    )
    return f"""
  INSERT INTO {SCHEMA}.{table} AS old ({unit}, series, {", ".join(names)})
  SELECT hour / {seconds} * {seconds}, series, {", ".join(map(_sum, names))}
  FROM json_to_recordset(hours) AS t (hour bigint, series bigint, {_SUM_COLUMNS}, cost_usd numeric)
  GROUP BY 1, 2 ORDER BY 1, 2
  ON CONFLICT ({unit}, series) DO UPDATE SET {", ".join(more)};"""


_LATER: Final = (
    "excluded.kind = 'LATEST' AND excluded.value IS NOT NULL AND (old.value IS NULL"
    " OR (excluded.at_us, excluded.record_id) > (old.at_us, old.record_id))"
)

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
    # What is done for each batch, as functions: a question each, whose statements are parsed once for a connection and
    # not each time, as they are where the driver keeps none.
    f"""
CREATE FUNCTION {SCHEMA}.begin_batch(writer text, start text, greatest_seq bigint, batch_lanes json)
RETURNS TABLE (numbered_lane smallint, before bigint) LANGUAGE plpgsql AS $$
-- A batch of records that are all new: of each of its lanes the last number that is given. None: another one writes by
-- this name. `batch_lanes`: how many are for each lane.
#variable_conflict use_column
DECLARE
  total bigint := (SELECT sum(n) FROM json_to_recordset(batch_lanes) AS t (lane smallint, n bigint));
BEGIN
  UPDATE {SCHEMA}.instances
  SET seen = now(), last_seq = greatest(last_seq, greatest_seq), records = records + total, writes = writes + 1
  WHERE instance = writer AND nonce = start;
  IF NOT FOUND THEN
    RETURN;
  END IF;
  PERFORM 1 FROM {SCHEMA}.lanes
  WHERE lane IN (SELECT t.lane FROM json_to_recordset(batch_lanes) AS t (lane smallint)) ORDER BY lane FOR UPDATE;
  RETURN QUERY UPDATE {SCHEMA}.lanes AS lanes SET last_seq = lanes.last_seq + t.n
  FROM json_to_recordset(batch_lanes) AS t (lane smallint, n bigint) WHERE lanes.lane = t.lane
  RETURNING lanes.lane, lanes.last_seq - t.n;
END $$;
CREATE FUNCTION {SCHEMA}.add_sums(hours json, units json, running json)
RETURNS TABLE (bucket_key bytea, bucket_id bigint) LANGUAGE plpgsql AS $$
-- Add what a batch amounts to: by hours and days, other units, and running values of meters. Which of these want to be
-- told the values themselves, since they count different ones.
#variable_conflict use_column
BEGIN{_add_sums("hourly", "hour", 3600)}{_add_sums("daily", "day", DAY_S)}
  IF units IS NOT NULL THEN
    INSERT INTO {SCHEMA}.hourly_units AS old (hour, series, unit, amount)
    SELECT hour, series, unit, sum(amount)
    FROM json_to_recordset(units) AS t (hour bigint, series bigint, unit text COLLATE "C", amount numeric)
    GROUP BY 1, 2, 3 ORDER BY 1, 2, 3
    ON CONFLICT (hour, series, unit) DO UPDATE SET amount = old.amount + excluded.amount;
  END IF;
  IF running IS NOT NULL THEN
    RETURN QUERY WITH put AS (
      INSERT INTO {SCHEMA}.buckets AS old (key, meter, version, subscriber, grp, start, kind, value, at_us, record_id)
      SELECT key, meter, version, subscriber, grp, start, kind, value, coalesce(at_us, 0), coalesce(record_id, '')
      FROM json_to_recordset(running) AS t (key bytea, meter text, version text, subscriber text, grp text,
        start bigint, kind text, value numeric, at_us bigint, record_id text) ORDER BY key
      ON CONFLICT (key) DO UPDATE SET
        value = CASE
          WHEN excluded.kind = 'LATEST' THEN CASE WHEN {_LATER} THEN excluded.value ELSE old.value END
          WHEN excluded.kind = 'MAX' THEN greatest(old.value, excluded.value)
          WHEN excluded.value IS NULL THEN old.value
          ELSE coalesce(old.value, 0) + excluded.value END,
        at_us = CASE WHEN {_LATER} THEN excluded.at_us ELSE old.at_us END,
        record_id = CASE WHEN {_LATER} THEN excluded.record_id ELSE old.record_id END
      RETURNING key, id, kind, value
    )
    SELECT key, id FROM put WHERE kind = 'UNIQUE_COUNT' AND coalesce(value, 0) < {UNIQUE_MAX};
  END IF;
END $$;
""",
)

NO_TIME: Final = 0  # the day of ids that have no time of their own; days are counted from 1970
_TIMED_MS: Final = (1_577_836_800_000, 4_102_444_800_000)  # 2020 to 2099: no clock that is off makes a day outside
_EPOCH: Final = date(1970, 1, 1)
_DAY_MS: Final = 86_400_000
# How `model.record` begins a line, and where it says who pays. A quote in a value is escaped, so that these words with
# their quotes cannot stand inside one.
_HEAD: Final = re.compile(
    rb'\{"id":"([0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12})","seq":([0-9]{1,18}),"instance":"([^"\\]*)"'
)
_NOBODY: Final = b'"subscriber":null'
_PAYER: Final = b'"subscriber":{"id":"'
_PAYERS_KEPT: Final = 10_000  # in memory: 3 MB


class Line(NamedTuple):
    """One record as it is written, without its numbers. `counted`: it is to be in the sums."""

    day: int  # since 1970
    id: bytes  # of a UUID
    seq: int
    lane: int
    counted: bool
    origin: bytes  # its columns `spool` and `subscriber`, as `copied_texts` makes them: the same for all of a customer
    line: bytes


def line_of(stored: bytes, *, counted: bool = True) -> Line | None:
    """What a stored line says of itself, without reading all of it; None: it is no record."""
    head = _HEAD.match(stored)
    if head is not None:
        id_, seq, spool = head.groups()
        begins = stored.find(_PAYER)
        payer = None
        if begins > 0:
            begins += len(_PAYER)
            payer = stored[begins : stored.find(b'"', begins)]
        found = _origins.get((spool, payer))
        if found is None and (_NOBODY in stored if payer is None else b"\\" not in payer):
            found = _origin(spool, payer)
        if found is not None:
            lane, origin = found
            key = unhexlify(id_.replace(b"-", b""))
            if lane is None:
                lane = lane_of(id_.decode())
            return Line(day_of(key), key, int(seq), lane, counted, origin, stored)
    try:
        row = orjson.loads(stored)
        name, number, place, said = str(row["id"]), int(row["seq"]), str(row["instance"]), row["subscriber"]
        payer_ = None if said is None or said["id"] is None else storable(str(said["id"]))
    except (ValueError, KeyError, TypeError):
        return None
    if not 0 <= number <= JSON_INT_MAX:
        return None
    uuid = uuid_of(name)
    origin = copied_texts(storable(place), payer_)
    return Line(day_of(uuid.bytes), uuid.bytes, number, lane_of(payer_ or str(uuid)), counted, origin, stored)


_origins: dict[tuple[bytes, bytes | None], tuple[int | None, bytes]] = {}


def _origin(spool: bytes, payer: bytes | None) -> tuple[int | None, bytes]:
    """The lane of a customer's records in a spool, None where each has its own, and `Line.origin`."""
    if len(_origins) >= _PAYERS_KEPT:
        _origins.clear()
    name = None if payer is None else payer.decode("utf-8", "replace")
    found = lane_of(name) if name else None, copied_texts(spool.decode("utf-8", "replace"), name)
    _origins[spool, payer] = found
    return found


# A batch as the server's `COPY … (FORMAT binary)` reads it: a head, rows of so many fields, each its size and its
# bytes, an end (https://www.postgresql.org/docs/current/sql-copy.html, "Binary Format"). Written here, since the driver
# takes four times as long, value by value.
COLUMNS: Final = (
    "instance", "spool", "subscriber", "day", "id", "lane", "lane_seq", "seq", "counted", "line",
)  # fmt: skip
_COPY_HEAD: Final = b"PGCOPY\n\xff\r\n\0" + bytes(8)
_COPY_END: Final = b"\xff\xff"
_COPY_PIECE: Final = 500  # rows: while the server works on one, the next is made
_DATES_BEGIN: Final = (date(2000, 1, 1) - _EPOCH).days  # PostgreSQL's dates count from here
_row: Final = Struct(">Ii I16s Ih Iq Iq I? I").pack  # from `day` on, and the size of the line


def copied_texts(*texts: str | None) -> bytes:
    """Fields of a row."""
    made = bytearray()
    for text in texts:
        if text is None:
            made += b"\xff\xff\xff\xff"
        else:
            stored = text.encode()
            made += len(stored).to_bytes(4, "big") + stored
    return bytes(made)


async def copied(lines: Sequence[Line], instance: str, last: dict[int, int]) -> AsyncIterator[bytes]:
    """Rows with the number that each gets in its lane; `last`: of each lane the last that is given. Takes it over."""
    begin = len(COLUMNS).to_bytes(2, "big") + copied_texts(instance)
    made = [_COPY_HEAD]
    for start in range(0, len(lines), _COPY_PIECE):
        for day, id_, seq, lane, counted, origin, line in lines[start : start + _COPY_PIECE]:
            number = last[lane] = last[lane] + 1
            numbers = _row(4, day - _DATES_BEGIN, 16, id_, 2, lane, 8, number, 8, seq, 1, counted, len(line))
            made += (begin, origin, numbers, line)
        yield b"".join(made)
        made.clear()
    yield _COPY_END


def storable(text: str) -> str:
    """The same without what PostgreSQL keeps in no text: NUL, and halves of surrogate pairs."""
    if text.isascii() and "\0" not in text:
        return text
    return text.encode("utf-8", "replace").decode().replace("\0", "\N{REPLACEMENT CHARACTER}")


def uuid_of(record_id: str) -> UUID:
    """The key of a record: its id, which is a UUID; of any other text one that is made of it."""
    try:
        return UUID(record_id)
    except ValueError:
        return uuid5(NAMESPACE_URL, storable(record_id))


def day_of(uuid: bytes) -> int:
    """The day (UTC) of the time in a UUID of version 7: which partition a record is in follows from its id alone."""
    if uuid[6] >> 4 != 7:
        return NO_TIME
    ms = int.from_bytes(uuid[:6], "big")
    return ms // _DAY_MS if _TIMED_MS[0] <= ms < _TIMED_MS[1] else NO_TIME


def date_of(day: int) -> date:
    return _EPOCH + timedelta(days=day)


def day_at(moment_s: float) -> int:
    return int(moment_s // DAY_S)


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
