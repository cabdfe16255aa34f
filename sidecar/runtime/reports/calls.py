"""The last calls, one by one, as the spool keeps them: filtered, from the newest backwards, printed oldest first.

What was committed last is read first, so that "the last hundred" costs the same however much is kept.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import orjson

from sidecar.ledger.postgres_queries import PostgresReader
from sidecar.model.exchange import Outcome
from sidecar.model.record_id import ID_LENGTH
from sidecar.runtime.reports.formats import Names, stamp
from sidecar.runtime.reports.parameters import (
    UPSTREAM,
    QueryError,
    Values,
    between,
    conditions,
    dimension_of,
    whole,
)
from sidecar.spool import SpoolReader
from sidecar.spool.types import StoredGroup

LIMIT_MAX: Final = 10_000  # calls in one answer over HTTP
BYTES_MAX: Final = 32 << 20  # of their lines: a record has about 1 KiB and may have 100
WINDOW_RECORDS: Final = 512  # read backwards at a time,
WINDOW_BYTES: Final = 256 << 10  # in steps of so much
# A call's record is committed when it ends: one that began before `since` may stand behind it, but not the
# other way round. A clock that was set back by less than this hides nothing.
CLOCK_SLACK: Final = timedelta(minutes=5)

INSTANCE: Final = "instance"

Record = Mapping[str, Any]


def _usage(record: Record, name: str) -> Any:
    return (record["usage"] or {}).get(name)


def _subscriber(record: Record) -> str | None:
    found = (record["subscriber"] or {}).get("id")
    return None if found is None else str(found)


def _cost(record: Record, name: str) -> Any:
    return (record.get("cost") or {}).get(name)


# What `where` may name beside dimensions.
FIELDS: Final[Mapping[str, Callable[[Record], Any]]] = {
    "subscriber": _subscriber,
    "model": lambda r: _usage(r, "model") or _usage(r, "request_model"),
    "provider": lambda r: _usage(r, "provider"),
    "route": lambda r: r["route"],
    "status": lambda r: "none" if r["status"] is None else r["status"],
    "outcome": lambda r: r["outcome"],
    "method": lambda r: r["method"],
    "instance": lambda r: r["instance"],  # the spool that has it; of many sidecars who of them
    UPSTREAM: lambda r: r["dimensions"].get(UPSTREAM) or r.get("upstream"),
}
# Of these, all that a record can have; an upstream's 999 passes as it came.
POSSIBLE: Final[Mapping[str, Values]] = {
    "status": Values(re.compile(r"[1-9](xx|\d\d)|none", re.ASCII), "a status (429), a class (4xx) or none"),
    "method": Values(re.compile(r"[A-Z][A-Z-]*", re.ASCII), "a method as requests have it: GET, POST"),
    "outcome": Values(re.compile("|".join(Outcome)), f"one of {', '.join(Outcome)}"),
}
# As CSV has them; JSON and NDJSON have the whole record.
COLUMNS: Final[Mapping[str, Callable[[Record], Any]]] = {
    "id": lambda r: r["id"],
    "started_at": lambda r: r["started_at"],
    "status": lambda r: r["status"],
    "outcome": lambda r: r["outcome"],
    "duration_ms": lambda r: r["duration_ms"],
    "first_byte_ms": lambda r: r["first_byte_ms"],
    "subscriber": _subscriber,
    "name": lambda r: None,  # put in by `flat`
    "provider": FIELDS["provider"],
    "model": FIELDS["model"],
    "usage_state": lambda r: _usage(r, "usage_state"),
    "input_tokens": lambda r: _usage(r, "input_tokens"),
    "output_tokens": lambda r: _usage(r, "output_tokens"),
    "total_tokens": lambda r: _usage(r, "total_tokens"),
    "cost": lambda r: _cost(r, "total"),
    "currency": lambda r: _cost(r, "currency"),
    "request_bytes": lambda r: r["request_bytes"],
    "response_bytes": lambda r: r["response_bytes"],
    "method": lambda r: r["method"],
    "route": lambda r: r["route"],
    "url": lambda r: r["url"],
    "error": lambda r: r["error"],
    UPSTREAM: lambda r: r.get("upstream"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordsQuery:
    """Calls that began in `since` to `until` (not included) and of which `where` holds; of these the last `limit`."""

    since: datetime | None = None
    until: datetime | None = None
    where: Mapping[str, tuple[str | None, ...]] = field(default_factory=dict)
    limit: int | None = None
    id: str | None = None


@dataclass(slots=True, kw_only=True)
class Calls:
    """Stored lines, oldest first. `stopped`: why there may be more of them."""

    lines: list[bytes]
    stopped: str | None = None


def records_query(
    *,
    now: datetime,
    dimensions: Collection[str],
    since: str | None = None,
    until: str | None = None,
    where: Sequence[str] = (),
    limit: str | None = None,
    limit_max: int = LIMIT_MAX,
    record_id: str | None = None,
) -> RecordsQuery:
    """Calls, as they were asked for. Raises `QueryError`."""
    if record_id and (since or until or where):
        raise QueryError(": goes without since, until and where: there is one record of an id", "id", record_id)
    begins, ends = between(since, until, now, None)
    return RecordsQuery(
        since=begins,
        until=ends,
        where=conditions(where, {name: POSSIBLE.get(name) for name in FIELDS}, dimensions),
        limit=None if limit is None else whole("limit", limit, limit_max),
        id=None if not record_id else id_of(record_id),
    )


def id_of(text: str) -> str:
    """A record's id, also out of that of one of its events. Raises `QueryError`."""
    found = text.strip()[:ID_LENGTH].lower()
    if len(found) != ID_LENGTH or found.count("-") != 4 or set(found) - set("0123456789abcdef-"):
        raise QueryError(": expected the id of a record, such as 0199c2a1-7c1e-7000-8000-5d6f0a1b2c3d", "id", text)
    return found


def last_calls(
    reader: SpoolReader,
    query: RecordsQuery,
    names: Names,
    *,
    upto: Mapping[str, int] | None = None,
    late: Callable[[], bool] = lambda: False,
    bytes_max: int = BYTES_MAX,
) -> Calls:
    """The last calls of the spool that fit. `upto`: of each instance the last number that counts. `late`: whether it
    took too long; what was found by then is given. Raises `SpoolError`."""
    fits = filter_of(query, names)
    since_ns = 0 if query.since is None else max(int((query.since - CLOCK_SLACK).timestamp() * 1e9), 0)
    ends = {i: reader.last_seq(i) for i in reader.instances()} if upto is None else dict(upto)
    ways = [_backwards(reader, instance, last, since_ns) for instance, last in ends.items()]
    found: list[bytes] = []
    size = 0
    stopped: str | None = None
    for group in heapq.merge(*ways, key=lambda each: -each.committed_ns):
        if late():
            at = stamp(datetime.fromtimestamp(group.committed_ns / 1e9, UTC))
            stopped = f"it took too long: calls that ended before {at} were not looked at"
            break
        for line in reversed(group.lines):
            if fits(line):
                size += len(line)
                if size > bytes_max:
                    stopped = f"more than {bytes_max >> 20} MiB: ask for fewer with limit"
                    break
                found.append(line)
                if len(found) == query.limit:
                    break
        if stopped or len(found) == query.limit:
            break
    found.reverse()
    return Calls(lines=found, stopped=stopped)


def calls_from(
    reader: SpoolReader,
    query: RecordsQuery,
    names: Names,
    upto: Mapping[str, int],
    *,
    missing: Callable[[int], object] = lambda count: None,
) -> Iterator[bytes]:
    """All calls that fit, oldest first, as they are read: however many there are. `missing`: as `SpoolReader.lines` has
    it. Raises `SpoolError`."""
    fits = filter_of(query, names)
    since_ns = 0 if query.since is None else max(int((query.since - CLOCK_SLACK).timestamp() * 1e9), 0)
    for line in reader.lines(since_ns=since_ns, missing=missing):
        place = orjson.loads(line)
        if place["seq"] <= upto.get(place["instance"], 0) and fits(line):
            yield line


def call_by_id(reader: SpoolReader, record_id: str, *, late: Callable[[], bool] = lambda: False) -> Calls:
    """The record with this id. Its id says when the call came in, and it was committed after that."""
    came_ns = int(record_id[:8] + record_id[9:13], 16) * 1_000_000
    slack_ns = int(CLOCK_SLACK.total_seconds() * 1e9)
    needle = f'"{record_id}"'.encode()
    for number, line in enumerate(reader.lines(since_ns=max(came_ns - slack_ns, 0))):
        if needle in line and orjson.loads(line)["id"] == record_id:
            return Calls(lines=[line])
        if number % WINDOW_RECORDS == 0 and late():
            return Calls(lines=[], stopped="it took too long: not all calls were looked at")
    return Calls(lines=[])


def fleet_calls(
    ledger: PostgresReader,
    query: RecordsQuery,
    names: Names,
    *,
    late: Callable[[], bool] = lambda: False,
    bytes_max: int = BYTES_MAX,
) -> Calls:
    """The last calls of all who share a ledger that fit, or the one with an id. By the time they came in, which is what
    the ledger keeps them by; where `instance` is asked for, it is who recorded them. Raises `StorageError`."""
    if query.id is not None:
        row = ledger.record(query.id)
        return Calls(lines=[] if row is None else [row[1]])
    who = query.where.get(INSTANCE)
    fits = filter_of(replace(query, where={n: v for n, v in query.where.items() if n != INSTANCE}), names)
    found: list[bytes] = []
    size, stopped = 0, None
    # An id is made when a call comes in; its record says the same moment, or one a little later.
    since = None if query.since is None else query.since - CLOCK_SLACK
    until = None if query.until is None else query.until + CLOCK_SLACK
    for instance, line in ledger.records(since, until):
        if late():
            stopped = "it took too long: not all calls were looked at"
            break
        if (who is None or instance in who) and fits(line):
            size += len(line)
            if size > bytes_max:
                stopped = f"more than {bytes_max >> 20} MiB: ask for fewer with limit"
                break
            found.append(line)
            if len(found) == query.limit:
                break
    found.reverse()
    return Calls(lines=found, stopped=stopped)


def filter_of(query: RecordsQuery, names: Names) -> Callable[[bytes], bool]:
    """Whether a stored line is asked for. A text that has to stand in it is looked for before it is parsed."""
    wanted: list[tuple[Callable[[Record], Any], frozenset[str | None]]] = []
    needles: list[tuple[bytes, ...]] = []
    for name, values in query.where.items():
        if name == "subscriber":
            values = tuple(id_ for asked in values for id_ in ((None,) if asked is None else names.ids(asked)))
        wanted.append((FIELDS.get(name) or _dimension(name), frozenset(values)))
        if name != "status" and None not in values:
            needles.append(tuple(orjson.dumps(value) for value in values))
    since, until = query.since, query.until
    if not wanted and since is None and until is None:
        return lambda line: True

    def fits(line: bytes) -> bool:
        if not all(any(one in line for one in either) for either in needles):
            return False
        record = orjson.loads(line)
        if since is not None or until is not None:
            started = datetime.fromisoformat(record["started_at"]).astimezone(UTC)
            if (since is not None and started < since) or (until is not None and started >= until):
                return False
        return all(_is_one_of(get(record), values) for get, values in wanted)

    return fits


def _dimension(name: str) -> Callable[[Record], Any]:
    bare = dimension_of(name)
    return lambda record: (record.get("dimensions") or {}).get(bare)


def _is_one_of(value: Any, wanted: frozenset[str | None]) -> bool:
    if isinstance(value, int):  # a status: itself, or its class
        return str(value) in wanted or f"{value // 100}xx" in wanted
    return (value or None) in wanted


def _backwards(reader: SpoolReader, instance: str, last_seq: int, since_ns: int) -> Iterator[StoredGroup]:
    """The groups of an instance up to a number, the newest first."""
    segments = reader.segments(instance)
    first_seq = segments[0].first_seq if segments else last_seq + 1  # what is before it was retired
    upto = last_seq
    while upto >= first_seq:
        after = max(upto - WINDOW_RECORDS, 0)
        window: list[StoredGroup] = []
        place = after
        while place < upto and (groups := reader.read(instance, place, bytes_max=WINDOW_BYTES)):
            window += (group for group in groups if group.lines and group.first_seq <= upto)
            place = groups[-1].last_seq
        if not window:
            upto = _last_there(reader, instance, after, first_seq)
            continue
        for group in reversed(window):
            if group.committed_ns and group.committed_ns < since_ns:
                return
            if group.last_seq > upto:
                more = group.last_seq - upto
                yield StoredGroup(
                    first_seq=group.first_seq,
                    last_seq=upto,
                    lines=group.lines[:-more],
                    salvaged=group.salvaged,
                    committed_ns=group.committed_ns,
                )
            else:
                yield group
        upto = after


def _last_there(reader: SpoolReader, instance: str, upto: int, first_seq: int) -> int:
    """The last number up to this one that has a record; 0: none has. After a loss a million numbers are left out, which
    are not looked through one by one."""

    def is_any(after: int) -> bool:
        groups = reader.read(instance, after, bytes_max=1)
        return any(group.lines and group.first_seq <= upto for group in groups)

    empty, low, step = upto, upto, WINDOW_RECORDS  # behind `empty` there is none; behind `low` there will be
    while not is_any(low):
        if low < first_seq:
            return 0
        empty, low, step = low, max(low - step, first_seq - 1), step * 2
    while empty - low > 1:
        middle = (low + empty) // 2
        empty, low = (empty, middle) if is_any(middle) else (middle, low)
    return empty


def flat(lines: Iterable[bytes], names: Names) -> Iterator[dict[str, Any]]:
    """One mapping of plain values a call, with `COLUMNS`."""
    for line in lines:
        record = orjson.loads(line)
        row = {name: get(record) for name, get in COLUMNS.items()}
        yield row | {"name": names.of(row["subscriber"])}


def as_json(lines: Sequence[bytes], names: Names) -> bytes:
    """A list of the records; the subscriber has its name beside its id, where it has one."""
    return b"[" + b",\n".join(named(line, names) for line in lines) + b"]\n"


def named(line: bytes, names: Names) -> bytes:
    if not names:
        return line
    record = orjson.loads(line)
    name = names.of(_subscriber(record))
    if name is None:
        return line
    record["subscriber"]["name"] = name
    return orjson.dumps(record)
