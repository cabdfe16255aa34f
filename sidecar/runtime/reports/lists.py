"""What stands where just now: what is parked and why, and who is at what of which limit."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from heapq import merge
from itertools import islice
from operator import itemgetter
from typing import Any, Final

import orjson

from sidecar.delivery.queries import DeliveryQueries
from sidecar.runtime.reports.formats import Names, stamp
from sidecar.runtime.reports.parameters import QueryError, guess, whole

PAGE: Final = 500  # parked events read at a time
PARKED_MAX: Final = 10_000  # in one answer over HTTP: some 30 MB with their records
# A table and CSV have these; JSON and NDJSON also what follows.
PARKED: Final = ("parked_at", "backend", "reason", "subscriber", "name", "maybe_taken", "attempts", "event_id")
PARKED_WHOLE: Final = (*PARKED, "record_id", "key", "history", "record")
LIMITS: Final = (
    "limit", "scope", "subscriber", "name", "unit", "used", "reserved", "amount", "percent", "window", "until",
    "action",
)  # fmt: skip
LIMITS_BY_INSTANCE: Final = (*LIMITS[:2], "instance", *LIMITS[2:])


@dataclass(frozen=True, slots=True, kw_only=True)
class ParkedQuery:
    backend: str | None = None
    reason: str | None = None
    limit: int | None = None


def parked_query(*, backend: str | None = None, reason: str | None = None, limit: str | None = None) -> ParkedQuery:
    """Raises `QueryError`."""
    return ParkedQuery(
        backend=backend or None,
        reason=reason or None,
        limit=None if limit is None else whole("limit", limit, PARKED_MAX),
    )


def check_backend(accounts: Iterable[DeliveryQueries], query: ParkedQuery, configured: Collection[str]) -> None:
    """That it is one: nothing parked of a mistyped one looks like good news. Raises `QueryError`, `StateError`."""
    if query.backend is None or query.backend in configured:
        return
    known = set(configured)
    for one in accounts:
        known.update(one.backends(), (name for name, _ in one.parked_now()))
    if query.backend not in known:
        there = f"({', '.join(sorted(known)) or 'none'}){guess(query.backend, known)}"
        raise QueryError(f" is not one of the backends of this instance {there}", "backend", query.backend)


def parked(accounts: Iterable[DeliveryQueries], query: ParkedQuery, names: Names) -> Iterator[dict[str, Any]]:
    """One row an event, in the order of their parking, of each place as it has them. Raises `StateError`."""
    rows = merge(*(_parked(one, query, names) for one in accounts), key=itemgetter("parked_at"))
    return islice(rows, query.limit)


def _parked(accounts: DeliveryQueries, query: ParkedQuery, names: Names) -> Iterator[dict[str, Any]]:
    after = 0
    while True:
        page = accounts.parked(backend=query.backend, reason=query.reason, after=after, limit=PAGE, bodies=False)
        for one in page:
            record = orjson.loads(one.line) if one.line else None
            subscriber = _subscriber(record)
            yield {
                "parked_at": stamp(datetime.fromtimestamp(one.at_s, UTC)),
                "backend": one.backend,
                "reason": one.reason,
                "subscriber": subscriber,
                "name": names.of(subscriber),
                "event_id": one.event_id,
                "maybe_taken": one.maybe_taken,
                "attempts": len(one.history),
                "record_id": one.record_id,
                "key": one.key,
                "history": list(one.history),
                "record": record,
            }
        if len(page) < PAGE:
            return
        after = page[-1].id


def _subscriber(record: Mapping[str, Any] | None) -> str | None:
    """Who pays, in our own ids: what `[subscribers]` has to map where no customer is known."""
    found = (record or {}).get("subscriber")
    return str(found["id"]) if isinstance(found, dict) and found.get("id") is not None else None


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitsQuery:
    limit: str | None = None  # the name of one
    over: float | None = None  # percent
    by_instance: bool = False


def limits_query(*, limit: str | None = None, over: str | None = None, by: str | None = None) -> LimitsQuery:
    """Raises `QueryError`."""
    if by not in (None, "", "instance"):
        raise QueryError(": expected instance", "by", by)
    percent = None
    if over:
        try:
            percent = float(over)
        except ValueError:
            percent = -1.0
        if not 0 <= percent <= 1e6:
            raise QueryError(": expected a number of percent, such as 80", "over", over)
    return LimitsQuery(limit=limit or None, over=percent, by_instance=bool(by))


def limits(rows: Iterable[Mapping[str, Any]], query: LimitsQuery, names: Names) -> list[dict[str, Any]]:
    """One row a limit and scope, or of these one for each sidecar that shares it; where the scope is a subscriber, with
    its name."""
    found: list[dict[str, Any]] = []
    for row in rows:
        if query.limit is not None and row["limit"] != query.limit:
            continue
        if query.over is not None and row["percent"] is not None and row["percent"] < query.over:
            continue
        subscriber = row["scope"].get("subscriber")
        whole = {**row, "subscriber": subscriber, "name": names.of(subscriber)}
        found += _by_instance(whole) if query.by_instance else [whole]
    return found


def _by_instance(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What each sidecar has of a limit; one that is not shared has nobody's name."""
    instances = row.pop("instances", None)
    row.pop("here", None)
    if instances is None:
        yield {**row, "instance": None}
        return
    amount = Decimal(row["amount"])
    for name, share in instances.items():
        percent = round(float(100 * Decimal(share["used"]) / amount), 1) if amount else None
        yield {**row, "instance": name, "used": share["used"], "reserved": share["leased"], "percent": percent}


def limits_flat(rows: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """The same with plain values alone."""
    for row in rows:
        # JSON alone tells the parts beside the whole.
        row = {name: value for name, value in row.items() if name not in ("here", "instances")}
        yield {**row, "scope": ", ".join(f"{name} {value}" for name, value in row["scope"].items())}
