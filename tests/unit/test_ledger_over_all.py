"""Sums over all subscribers: what is read where none of them is asked for is what theirs amount to, also in a ledger of
before they were kept."""

from __future__ import annotations

import random
import sqlite3
from contextlib import closing
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from itertools import cycle, product
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest

from sidecar.ledger import LedgerReader, LedgerStore, UsageRow, queries, store
from sidecar.ledger.schema import SCHEMA
from sidecar.meters.hourly import TOKENS, Delta, Series, body_of
from sidecar.model.delivery import Delivered

HOUR_S = 3600
BEGIN = datetime(2026, 10, 23, 5, tzinfo=UTC)  # a summer time ends two days later
BY: tuple[list[str], ...] = (
    [], ["model"], ["day"], ["hour", "model"], ["month"], ["day", "feature"], ["provider", "status"], ["instance"],
)  # fmt: skip
WHERE: tuple[dict[str, Any], ...] = ({}, {"model": ("m1", None)}, {"dimensions.feature": ("x",)})


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(store, "CATCH_UP_PAUSE_S", 0.0)
    return tmp_path / "ledger.db"


def effects(chance: random.Random, *, first: int, hours: int, odd: bool) -> list[Delta]:
    """Zero, nothing, what was taken back, and numbers that SQLite cannot add up."""
    found = []
    for _ in range(300):
        series = Series(
            chance.choice(("a", "b", "c", None)),
            chance.choice(("m1", "m2", None)),
            "p",
            None,
            chance.choice(("2xx", "5xx")),
            chance.choice(((), (("feature", "x"),))),
        )
        delta = Delta(int(BEGIN.timestamp()) + (first + chance.randrange(hours)) * HOUR_S, series)
        delta.counts.update(records=1, calls=chance.randrange(2), request_bytes=chance.randrange(1000))
        great = chance.choice((7, 2**62, 2**70)) if odd else 7
        delta.tokens = {name: chance.choice((0, 5, great)) for name in TOKENS if chance.random() < 0.4}
        if chance.random() < 0.5:
            delta.cost_usd = Decimal(chance.choice(("0", "0.1", "1e-15" if odd else "0.000001")))
        found.append(delta)
        if chance.random() < 0.1:
            found.append(delta.negative())
    return found


def add(path: Path, key: str, batch: list[Delta]) -> None:
    with closing(LedgerStore(path)) as ledger:
        assert ledger.apply(key, body_of(batch)) == Delivered()


def everything(path: Path) -> list[list[UsageRow]]:
    reader, since = LedgerReader(path, "one"), BEGIN + timedelta(hours=37)
    zones = (None, ZoneInfo("Europe/Berlin"), ZoneInfo("Asia/Kolkata"))
    times, wheres = cycle(((None, None), (since, None), (None, since), (None, None))), cycle((*WHERE, *WHERE[:2]))
    return [
        reader.usage(by, begin, end, where, zone=zone)
        for (by, zone), (begin, end), where in zip(product(BY, zones), times, wheres, strict=False)
    ]


def the_long_way(path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[UsageRow]]:
    with monkeypatch.context() as patch:
        patch.setattr(queries, "_over_all", lambda *_: False)
        return everything(path)


def since(path: Path) -> int | None:
    with closing(sqlite3.connect(path)) as db:
        row = db.execute("SELECT hour FROM all_since").fetchone()
    return None if row is None else int(row[0])


def as_version_4(path: Path) -> None:
    """As a ledger was before there were such sums."""
    with closing(sqlite3.connect(path)) as db:
        for table in ("hourly_all", "daily_all", "all_since"):
            db.execute(f"DROP TABLE {table}")
        db.execute("PRAGMA user_version = 4")
        db.commit()


def caught_up(path: Path) -> None:
    ledger = LedgerStore(path)
    if ledger._catching_up is not None:
        ledger._catching_up.join()
    ledger.close()


@pytest.mark.parametrize("odd", [False, True])
def test_they_are_what_each_subscribers_sums_amount_to(path: Path, monkeypatch: pytest.MonkeyPatch, odd: bool) -> None:
    chance = random.Random(odd)
    add(path, "one", effects(chance, first=0, hours=24 * 5, odd=odd))
    add(path, "two", effects(chance, first=0, hours=24 * 5, odd=odd))
    assert since(path) == 0
    assert everything(path) == the_long_way(path, monkeypatch)


def test_few_rows_are_read_where_no_subscriber_is_asked_for(path: Path) -> None:
    add(path, "one", [Delta(3600, Series(f"s{n}", "m", "p", None, "2xx")) for n in range(500)])
    with closing(sqlite3.connect(path)) as db:
        counts = [db.execute(f"SELECT count(*) FROM {table}").fetchone()[0] for table in ("hourly_all", "daily_all")]
    assert counts == [1, 1]


@pytest.mark.parametrize("odd", [False, True])
def test_a_ledger_of_before_is_read_at_once_and_caught_up_with(
    path: Path, monkeypatch: pytest.MonkeyPatch, odd: bool
) -> None:
    chance = random.Random(odd)
    add(path, "one", effects(chance, first=24, hours=24 * 4, odd=odd))
    as_version_4(path)
    before = everything(path)
    assert before == the_long_way(path, monkeypatch)
    # What comes meanwhile: in new hours, in the last of the old ones, in old ones, and before all of them.
    monkeypatch.setattr(LedgerStore, "_catch_up", lambda self: None)
    add(path, "two", effects(chance, first=0, hours=24 * 6, odd=odd))
    begun = since(path)
    assert begun is not None
    assert begun > BEGIN.timestamp()
    expected = the_long_way(path, monkeypatch)
    assert everything(path) == expected
    monkeypatch.undo()
    caught_up(path)
    assert since(path) == 0
    assert everything(path) == expected
    assert everything(path) == the_long_way(path, monkeypatch)
    add(path, "three", effects(chance, first=0, hours=24 * 6, odd=odd))
    assert everything(path) == the_long_way(path, monkeypatch)


def test_each_day_that_is_caught_up_with_counts_at_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a death between two of them loses and doubles nothing."""
    chance = random.Random(7)
    add(path, "one", effects(chance, first=0, hours=24 * 5, odd=False))
    as_version_4(path)
    expected = everything(path)
    days, seen = LedgerStore._catch_up_day, list[int | None]()

    def one_day(self: LedgerStore, db: sqlite3.Connection, *, exact: bool) -> bool:
        days(self, db, exact=exact)
        return False  # it ends here

    while not seen or seen[-1] != 0:
        with monkeypatch.context() as patch:
            patch.setattr(LedgerStore, "_catch_up_day", one_day)
            patch.setattr(store, "CATCH_UP_PAUSE_S", 0.0)
            caught_up(path)
        seen.append(since(path))
        assert everything(path) == expected
    assert len(seen) == 7, "six days are touched, and then there is none before them"
    assert everything(path) == the_long_way(path, monkeypatch)


def test_a_ledger_that_somebody_filled_is_caught_up_with(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add(path, "one", effects(random.Random(1), first=0, hours=30, odd=False))
    with closing(sqlite3.connect(path)) as db:
        for table in ("hourly_all", "daily_all", "all_since"):
            db.execute(f"DELETE FROM {table}")
        db.commit()
    expected = everything(path)
    caught_up(path)
    assert since(path) == 0
    assert everything(path) == expected == the_long_way(path, monkeypatch)


def test_an_older_version_that_lacks_only_tables_is_taken(path: Path) -> None:
    LedgerStore(path).close()
    as_version_4(path)
    assert LedgerReader(path).usage() == []
    LedgerStore(path).close()
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (SCHEMA.version,)
        assert db.execute("SELECT count(*) FROM hourly_all").fetchone() == (0,)
