"""Sums of the ledger as they are asked for: filtered, sorted, cut to the largest, with the names of subscribers."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from decimal import Decimal
from typing import Any, Final

from sidecar.ledger import LedgerReader, UsageRow
from sidecar.meters.hourly import EXACT, write_amount
from sidecar.runtime.reports.formats import Names
from sidecar.runtime.reports.parameters import QueryError, UsageQuery

ROWS_MAX: Final = 100_000  # of one answer: some 60 MB of JSON, and as much memory
TIMES: Final = frozenset({"hour", "day", "month"})
VALUES: Final = tuple(each.name for each in fields(UsageRow) if each.name != "group")


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """The answer. `others`: of a row that stands for all that `top` left out, of how many; else None."""

    by: tuple[str, ...]
    rows: Sequence[UsageRow]
    others: Sequence[int | None]
    cut: bool  # whether `top` was asked for

    def columns(self) -> tuple[str, ...]:
        """As JSON and CSV have them: groups, names, what was left out, sums."""
        named = [*self.by]
        if "subscriber" in named:
            named.insert(named.index("subscriber") + 1, "name")
        return (*named, *(["others"] if self.cut else []), *VALUES)

    def flat(self, names: Names) -> Iterable[dict[str, Any]]:
        """One mapping a row, with all columns."""
        for row, others in zip(self.rows, self.others, strict=True):
            found = dict(zip(self.by, row.group, strict=True))
            if "subscriber" in found:
                found["name"] = names.of(found["subscriber"])
            values = asdict(row)
            del values["group"]
            yield found | {"others": others} | values


def usage(reader: LedgerReader, query: UsageQuery, names: Names, *, limit_s: float | None = None) -> Usage:
    """Raises `QueryError` where the answer would be too large, and what the reader raises."""
    where = dict(query.where)
    if "subscriber" in where:
        where["subscriber"] = tuple(
            id_ for asked in where["subscriber"] for id_ in ((None,) if asked is None else names.ids(asked))
        )
    rows = reader.usage(query.by, query.since, query.until, where, limit_s)
    others: list[int | None] = [None] * len(rows)
    if query.top is not None:
        rows, others = largest(rows, query)
    elif query.sort is not None:
        rows = sorted(rows, key=sort_key(query.sort), reverse=query.descending)
    if len(rows) > ROWS_MAX:
        raise QueryError(
            f"the answer has more than {ROWS_MAX:,} rows: ask for the largest with top, for fewer names with by, "
            "or for less with where and since"
        )
    return Usage(by=query.by, rows=rows, others=others, cut=query.top is not None)


def largest(rows: Sequence[UsageRow], query: UsageQuery) -> tuple[list[UsageRow], list[int | None]]:
    """The `top` groups by what `sort` says, and one row for all others.

    Hours, days and months are no such groups: of each of them the same ones are kept, which are the largest over all.
    """
    assert query.top is not None
    apart = [place for place, name in enumerate(query.by) if name not in TIMES]
    wholes: dict[tuple[str | None, ...], UsageRow] = {}
    for row in rows:
        who = tuple(row.group[place] for place in apart)
        there = wholes.get(who)
        wholes[who] = row if there is None else added(there, row)
    key = sort_key(query.sort)
    choose = heapq.nlargest if query.descending else heapq.nsmallest
    kept = {who: rank for rank, (who, _) in enumerate(choose(query.top, wholes.items(), key=lambda item: key(item[1])))}
    found: list[tuple[tuple[object, ...], UsageRow, int | None]] = []
    rest: dict[tuple[str | None, ...], tuple[UsageRow, int]] = {}
    for row in rows:
        who = tuple(row.group[place] for place in apart)
        when = tuple(None if place in apart else value for place, value in enumerate(row.group))
        if who in kept:
            found.append(((*map(str, when), kept[who]), row, None))
        elif when in rest:
            whole, count = rest[when]
            rest[when] = added(whole, row), count + 1
        else:
            rest[when] = replace(row, group=when), 1
    found += [((*map(str, when), len(kept)), row, count) for when, (row, count) in rest.items()]
    found.sort(key=lambda each: each[0])
    return [row for _, row, _ in found], [others for _, _, others in found]


def added(one: UsageRow, other: UsageRow) -> UsageRow:
    """Two rows as one, under the first one's group."""
    values: dict[str, Any] = {}
    for name in VALUES:
        a, b = getattr(one, name), getattr(other, name)
        if a is None or b is None:
            values[name] = a if b is None else b
        elif name == "cost_usd":
            values[name] = write_amount(EXACT.add(Decimal(a), Decimal(b)))
        else:
            values[name] = a + b
    return UsageRow(group=one.group, **values)


def sort_key(name: str | None) -> Callable[[UsageRow], Any]:
    """By one column, unknown ones last; None: by cost, then tokens, then calls."""
    if name is None:
        return lambda row: (Decimal(row.cost_usd or 0), row.total_tokens or 0, row.calls)
    if name == "cost_usd":
        return lambda row: Decimal(row.cost_usd) if row.cost_usd is not None else Decimal(-1)
    return lambda row: -1 if (value := getattr(row, name)) is None else value
