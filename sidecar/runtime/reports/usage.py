"""Sums of the ledger as they are asked for: filtered, sorted, cut to the largest, with the names of subscribers."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from decimal import Decimal
from functools import reduce
from itertools import chain, islice
from operator import attrgetter, itemgetter
from typing import Any, Final

from sidecar.ledger import (
    COUNTED,
    DIMENSION,
    GROUPS,
    PICO,
    TIMES,
    Group,
    Sums,
    UsageRow,
    read_cost,
    row_of,
    stored_cost,
)
from sidecar.ledger.queries import Ledger
from sidecar.meters.hourly import EXACT
from sidecar.runtime.reports.formats import Names
from sidecar.runtime.reports.parameters import QueryError, UsageQuery

ROWS_MAX: Final = 100_000  # of one answer: some 60 MB of JSON, and as much memory
ADDED_AT_ONCE: Final = 500
HELD_MAX: Final = 20_000  # rows by time that are added up here: some 20 MB, and a tenth of a second
VALUES: Final = tuple(each.name for each in fields(UsageRow) if each.name != "group")  # the cost is the last
_values: Final[Callable[[UsageRow], tuple[Any, ...]]] = attrgetter(*VALUES)


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
            found: dict[str, Any] = dict(zip(self.by, row.group, strict=True))
            if "subscriber" in found:
                found["name"] = names.of(found["subscriber"])
            found["others"] = others
            found.update(zip(VALUES, _values(row), strict=True))
            yield found


def usage(reader: Ledger, query: UsageQuery, names: Names, *, limit_s: float | None = None) -> Usage:
    """Raises `QueryError` where the answer would be too large, and what the reader raises."""
    where = {_meant(name): values for name, values in query.where.items()}
    if "subscriber" in where:
        where["subscriber"] = tuple(
            id_ for asked in where["subscriber"] for id_ in ((None,) if asked is None else names.ids(asked))
        )

    def ask(by: Sequence[str]) -> Iterator[tuple[Group, Sums]]:
        return reader.sums(
            [_meant(name) for name in by], query.since, query.until, where, zone=query.zone, limit_s=limit_s
        )

    if query.top is not None:
        rows, others = largest(query, ask)
    else:
        found = list(islice(ask(query.by), ROWS_MAX + 1))
        if query.sort is not None:
            key = sort_key(query.sort)
            found.sort(key=lambda each: key(each[1]), reverse=query.descending)
        rows = [row_of(group, values) for group, values in found]
        others = [None] * len(rows)
    if len(rows) > ROWS_MAX:
        raise QueryError(
            f"the answer has more than {ROWS_MAX:,} rows: ask for the largest with top, for fewer names with by, "
            "or for less with where and since"
        )
    return Usage(by=query.by, rows=rows, others=others, cut=query.top is not None)


def _meant(name: str) -> str:
    return name if name in GROUPS or name.startswith(DIMENSION) else DIMENSION + name


def largest(
    query: UsageQuery, ask: Callable[[Sequence[str]], Iterable[tuple[Group, Sums]]]
) -> tuple[list[UsageRow], list[int | None]]:
    """The `top` groups by what `sort` says, and one row for all others. Holds no more than the answer in memory.

    Hours, days and months are no such groups, unless there is nothing else: of each of them the same ones are kept,
    which are the largest over all.
    """
    assert query.top is not None
    apart = [place for place, name in enumerate(query.by) if name not in TIMES]
    if len(apart) in (0, len(query.by)):
        best, rest_of_all = _best(query, ask(query.by))
        rows = [row_of(group, values) for group, values in best]
        if not rest_of_all.count:
            return rows, [None] * len(rows)
        rows.append(rest_of_all.row((None,) * len(query.by)))
        return rows, [*[None] * len(best), rest_of_all.count]
    # Where there are few rows they are kept and added up here, so that the ledger is not read twice.
    who_of, when_of = _picked(apart), _picked([place for place in range(len(query.by)) if place not in apart])
    rows_by_time = iter(ask(query.by))
    few = list(islice(rows_by_time, HELD_MAX + 1))
    if len(few) > HELD_MAX:
        best, _ = _best(query, ask([query.by[place] for place in apart]))
    else:
        over_time: dict[Group, list[Sums]] = {}
        for group, values in few:
            over_time.setdefault(who_of(group), []).append(values)
        best, _ = _best(query, ((who, _added(over_time[who])) for who in sorted(over_time, key=_nulls_first)))
    kept = {group: rank for rank, (group, _) in enumerate(best)}
    found: list[tuple[Group, int, UsageRow, int | None]] = []
    rest: dict[Group, _Rest] = {}
    for group, values in chain(few, rows_by_time):
        rank, when = kept.get(who_of(group)), when_of(group)
        if rank is not None:
            found.append((when, rank, row_of(group, values), None))
            if len(found) > ROWS_MAX:
                break
        else:
            if when not in rest:
                rest[when] = _Rest()
            rest[when].add(values)
    for when, all_of_it in rest.items():
        at = iter(when)
        group = tuple(None if place in apart else next(at) for place in range(len(query.by)))
        found.append((when, len(kept), all_of_it.row(group), all_of_it.count))
    found.sort(key=lambda each: (*map(str, each[0]), each[1]))
    return [row for *_, row, _ in found], [others for *_, others in found]


def _picked(places: Sequence[int]) -> Callable[[Group], Group]:
    """What stands there in a group."""
    if len(places) == 1:
        (place,) = places
        return lambda group: (group[place],)
    return itemgetter(*places)


def _best(query: UsageQuery, rows: Iterable[tuple[Group, Sums]]) -> tuple[list[tuple[Group, Sums]], _Rest]:
    """The `top` of them, the best first, and what all others amount to, in one pass."""
    assert query.top is not None
    key, rest = sort_key(query.sort), _Rest()
    heap: list[tuple[Any, int, Group, Sums]] = []
    for number, (group, values) in enumerate(rows):
        rank = key(values)
        one = (rank if query.descending or query.sort is None else -rank, -number, group, values)
        if len(heap) < query.top:
            heapq.heappush(heap, one)
        else:
            rest.add(heapq.heappushpop(heap, one)[3])
    return [(group, values) for _, _, group, values in sorted(heap, key=itemgetter(0, 1), reverse=True)], rest


class _Rest:
    """Sums added up, some hundred at a time."""

    def __init__(self) -> None:
        self.count = 0
        self._waiting: list[Sums] = []

    def add(self, values: Sums) -> None:
        self.count += 1
        self._waiting.append(values)
        if len(self._waiting) == ADDED_AT_ONCE:
            self._waiting = [_added(self._waiting)]

    def row(self, group: Group) -> UsageRow:
        return row_of(group, _added(self._waiting))


def _added(rows: Sequence[Sums]) -> Sums:
    """One of several, column by column, which is many times as fast as one by one; None is where nothing is known."""
    *columns, costs = zip(*rows, strict=True)
    sums = []
    for column in columns:
        known = column if None not in column else [value for value in column if value is not None]
        sums.append(sum(known) if known else None)
    return *sums, _cost_of(costs)


def _cost_of(costs: Sequence[int | str | None]) -> int | str | None:
    """Together, as a column keeps it. Others than whole picodollars are few."""
    pico = [cost for cost in costs if type(cost) is int]
    others = [read_cost(cost) or Decimal(0) for cost in costs if type(cost) is str]
    if not pico and not others:
        return None
    return stored_cost(reduce(EXACT.add, others, read_cost(sum(pico)) or Decimal(0)))


def _nulls_first(group: Group) -> list[tuple[bool, str]]:
    """As the ledger orders them."""
    return [(value is not None, value or "") for value in group]


def sort_key(name: str | None) -> Callable[[Sums], Any]:
    """By one sum, unknown ones last; None: by cost, then tokens, then calls."""
    if name is None:
        tokens, calls = COUNTED.index("total_tokens"), COUNTED.index("calls")
        return lambda values: (_pico(values[-1]), values[tokens] or 0, values[calls] or 0)
    if name == "cost_usd":
        return lambda values: -1 if values[-1] is None else _pico(values[-1])
    place = COUNTED.index(name)
    return lambda values: -1 if values[place] is None else values[place]


def _pico(cost: int | str | None) -> int | Decimal:
    """Whole numbers are compared as such: there may be a hundred thousand of them."""
    return cost if type(cost) is int else (read_cost(cost) or Decimal(0)).scaleb(PICO)
