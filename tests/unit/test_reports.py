"""What is asked of the numbers, and what is answered: the code under the commands and the admin port alike."""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import pty
import random
import struct
import subprocess
import sys
import termios
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import orjson
import pytest
from support.backend_fixtures import T0_NS, record, usage
from support.spool_fixtures import Told, call, open_small, recorded
from support.spool_recorder import SpoolRecorder

from sidecar.cli import limits, main
from sidecar.cli import spool as spool_command
from sidecar.ledger import LedgerReader, LedgerStore
from sidecar.meters.hourly import body_of, deltas, grouped
from sidecar.model.exchange import Outcome, Subscriber
from sidecar.model.record import Record
from sidecar.runtime.reports import calls, lists, parameters
from sidecar.runtime.reports import usage as reports
from sidecar.runtime.reports.formats import Format, Names, written
from sidecar.runtime.reports.parameters import QueryError, UsageQuery, usage_query
from sidecar.spool import SpoolReader
from sidecar.spool.recovery import NUMBERS_SKIPPED

NOW = datetime(2026, 11, 22, 12, 30, tzinfo=UTC)
HOUR_NS = 3600 * 10**9
NOBODY = Names({})
ODD = ("x" * 200, "<b>\u202eevil\u2066", "=SUM(A1)", "a\x1b[31mb\r\n", "東京 Müller")


def asked(**given: Any) -> UsageQuery:
    return usage_query(now=NOW, dimensions=("feature", "model", "name"), **given)


def test_a_question_is_read_as_it_is_meant() -> None:
    assert asked() == UsageQuery()
    query = asked(
        by=" subscriber, day,feature,subscriber",
        since="24h",
        until="2026-11-22",
        sort="cost",
        top="5",
        where=["feature=search", "model=a", "model=", "dimensions.model=x=y"],
        timezone="Europe/Berlin",
    )
    assert query.by == ("subscriber", "day", "feature")
    assert query.since == NOW - timedelta(hours=24)
    assert query.until == datetime(2026, 11, 21, 23, tzinfo=UTC), "midnight in Berlin"
    assert query.where == {"feature": ("search",), "model": ("a", None), "dimensions.model": ("x=y",)}
    assert (query.sort, query.descending, query.top) == ("cost_usd", True, 5)
    assert asked(by="").by == ()
    assert asked(sort="+calls").descending is False
    assert asked(timezone="utc").zone is None
    assert asked(since="today", timezone="Asia/Tokyo").since == datetime(2026, 11, 21, 15, tzinfo=UTC)


def test_today_begins_once_where_a_clock_goes_back_over_midnight() -> None:
    """In Havana 2026-11-01 has 00:00 to 01:00 twice, at 04:00 and at 05:00 UTC."""
    for hour in (4, 5, 6, 20):
        now = datetime(2026, 11, 1, hour, 30, tzinfo=UTC)
        assert parameters.moment("today", now, ZoneInfo("America/Havana")) == datetime(2026, 11, 1, 4, tzinfo=UTC)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"by": "featur"}, "by='featur'; did you mean feature?"),
        ({"by": "colour"}, "by='colour': expected one of subscriber, model"),
        ({"by": "name"}, "by='name'; did you mean dimensions.name?"),
        (
            {"by": "subscriber,model,provider,route,status,hour,day,month,feature"},
            "by: 9 names are too many: at most 8",
        ),
        ({"where": ["hour=1"]}, "where='hour': expected one of subscriber"),
        ({"where": ["status=200"]}, "where='status=200': expected a class (2xx, 4xx)"),
        ({"where": ["=x"]}, "where='=x': expected NAME=VALUE"),
        ({"where": ["model=x"] * 33}, "where: 33 conditions are too many: at most 32"),
        ({"since": "9" * 300 + "d"}, "is no time"),
        ({"since": "1d", "until": "2d"}, "until='2d' is not behind '1d'"),
        ({"top": "10001"}, "top='10001': expected a whole number, 1 to 10,000"),
        ({"top": "１"}, "expected a whole number"),
        ({"sort": "colour"}, "sort='colour': expected one of cost"),
        ({"timezone": "/etc/passwd"}, "is no time zone"),
        ({"timezone": "Berlin\x00"}, "is no time zone"),
        ({"timezone": ""}, "is no time zone"),
        ({"timezone": "posixrules/x"}, "is no time zone"),
    ],
)
def test_what_cannot_be_read_says_what_would_do(given: dict[str, Any], said: str) -> None:
    with pytest.raises(QueryError) as raised:
        asked(**given)
    assert said in str(raised.value)
    assert len(str(raised.value)) < 400


@pytest.mark.parametrize("zone", [None, ZoneInfo("Asia/Tokyo"), ZoneInfo("America/New_York")])
def test_a_time_beyond_all_others_is_the_last_or_the_first(zone: ZoneInfo | None) -> None:
    for text in ("9999-12-31T23:59", "9999-12-31", "9999-01-01T00:00-12:00"):
        assert parameters.moment(text, NOW, zone) == parameters.NEWEST
    for text in ("0001-01-01", "0001-01-01T00:00+14:00"):
        assert parameters.moment(text, NOW, zone) == parameters.OLDEST


def test_a_time_before_all_others_is_the_first() -> None:
    for text in ("99999w", "1969-12-31", "0001-01-02"):
        assert parameters.moment(text, NOW) == parameters.OLDEST
    for text in ("1e9999d", "99999999999w", "0000-01-01"):
        with pytest.raises(QueryError, match="is no time"):
            parameters.moment(text, NOW)


def put(store: LedgerStore, batch: list[Record], key: str = "k") -> None:
    store.apply(key, body_of(deltas(grouped(batch))))


def test_the_largest_and_all_others_are_the_whole(tmp_path: Path) -> None:
    chance = random.Random(7)
    store = LedgerStore(tmp_path / "ledger.db")
    batch = [
        record(
            n,
            subscriber=None if n % 17 == 0 else Subscriber(f"s{chance.randrange(30):02}", "header:x"),
            started_ns=T0_NS + chance.randrange(72) * HOUR_NS,
            usage=usage(
                model=f"m{n % 3}", input_tokens=chance.randrange(10**6), cost_usd=f"0.{chance.randrange(10**6)}"
            ),
        )
        for n in range(400)
    ]
    put(store, batch)
    store.close()
    reader = LedgerReader(tmp_path / "ledger.db")
    whole = reader.usage(["subscriber"])
    for sort in ("cost_usd", "input_tokens", "+calls", None):
        found = reports.usage(reader, asked(by="subscriber", top="5", **({"sort": sort} if sort else {})), NOBODY)
        assert found.others == [None] * 5 + [len(whole) - 5]
        names = [sort.lstrip("+")] if sort else ["cost_usd", "total_tokens", "calls"]

        def key(row: Any, names: list[str] = names) -> list[Decimal]:
            return [Decimal(getattr(row, name) or 0) for name in names]

        best = sorted(whole, key=key, reverse=sort != "+calls")[:5]
        assert [key(row) for row in found.rows[:5]] == [key(row) for row in best]
        assert sum(row.calls for row in found.rows) == 400
        assert sum(Decimal(row.cost_usd or 0) for row in found.rows) == sum(Decimal(row.cost_usd or 0) for row in whole)
    by_day = reports.usage(reader, asked(by="day,subscriber", top="3", sort="input_tokens"), NOBODY)
    assert len({row.group[1] for row, others in zip(by_day.rows, by_day.others, strict=True) if others is None}) == 3
    days = [row.group[0] for row in by_day.rows]
    assert days == sorted(days, key=str), "day by day"
    for day in reader.usage(["day"]):
        assert sum(row.calls for row in by_day.rows if row.group[0] == day.group[0]) == day.calls
    top_days = reports.usage(reader, asked(by="day", top="1"), NOBODY)
    assert top_days.others[-1] == len(reader.usage(["day"])) - 1, "days are groups where there is nothing else"
    ascending = reports.usage(reader, asked(by="subscriber", sort="+input_tokens"), NOBODY)
    tokens = [row.input_tokens or 0 for row in ascending.rows]
    assert tokens == sorted(tokens)


def test_the_largest_over_time_are_the_same_whoever_adds_them_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chance = random.Random(11)
    store = LedgerStore(tmp_path / "ledger.db")
    batch = [
        record(
            n,
            subscriber=None if n % 13 == 0 else Subscriber(f"s{chance.randrange(20):02}", "header:x"),
            started_ns=T0_NS + chance.randrange(96) * HOUR_NS,
            usage=usage(model=f"m{n % 3}", cost_usd=chance.choice(("0.1", "1e-15", "0"))) if n % 5 else None,
        )
        for n in range(300)
    ]
    put(store, batch)
    store.close()
    reader = LedgerReader(tmp_path / "ledger.db")
    for by in ("day,subscriber", "model,hour,subscriber", "subscriber,month"):
        for sort in ("cost_usd", "calls", "+calls", "cached"):
            for zone in (None, "Europe/Berlin"):
                query = asked(by=by, top="4", sort=sort, timezone=zone)
                few = reports.usage(reader, query, NOBODY)
                with monkeypatch.context() as patch:
                    patch.setattr(reports, "HELD_MAX", 3)
                    assert reports.usage(reader, query, NOBODY) == few


def test_too_many_rows_are_refused_and_the_largest_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reports, "ROWS_MAX", 50)
    store = LedgerStore(tmp_path / "ledger.db")
    put(store, [record(n, subscriber=Subscriber(f"s{n}", "header:x")) for n in range(60)])
    store.close()
    reader = LedgerReader(tmp_path / "ledger.db")
    with pytest.raises(QueryError, match=r"more than 50 rows: ask for the largest with top"):
        reports.usage(reader, asked(by="subscriber"), NOBODY)
    assert len(reports.usage(reader, asked(by="subscriber", top="10"), NOBODY).rows) == 11


def test_a_subscriber_is_found_by_name_and_told_by_both(tmp_path: Path) -> None:
    store = LedgerStore(tmp_path / "ledger.db")
    put(store, [record(n, subscriber=Subscriber(who, "header:x")) for n, who in enumerate(("a", "b", "c", "Twin"))])
    store.close()
    names = Names({"a": "Acme Inc.", "b": "Twin", "c": "Twin"})
    reader = LedgerReader(tmp_path / "ledger.db")
    found = reports.usage(reader, asked(by="subscriber", where=["subscriber=Acme Inc."]), names)
    assert [(row["subscriber"], row["name"], row["calls"]) for row in found.flat(names)] == [("a", "Acme Inc.", 1)]
    twins = reports.usage(reader, asked(by="subscriber", where=["subscriber=Twin"]), names)
    assert {row.group[0] for row in twins.rows} == {"b", "c", "Twin"}
    assert names.shown("a") == "Acme Inc."
    assert names.shown("b") == "Twin (b)", "two that are called alike are told apart"
    assert (names.shown("d"), names.shown(None)) == ("d", None)


def test_json_is_written_as_the_library_does() -> None:
    rows: list[dict[str, Any]] = [{"a": 2**70, "b": "\udc00"}, {"a": [1, {"c": None}], "b": "é\n"}, {"a": {}, "b": []}]
    for some in (rows, rows[:1], []):
        for indent in (None, 2):
            text = "".join(written(some, ("a", "b"), Format.JSON, indent=indent))
            assert orjson.loads(text.replace(str(2**70), "1").replace("\\udc00", "")) is not None
            assert text.endswith("]\n")


# The calls themselves


@pytest.fixture
async def spool(tmp_path: Path) -> AsyncIterator[tuple[Path, list[dict[str, Any]]]]:
    """Records over several segments and two instances; and all of them, oldest first."""
    for life in range(2):
        async with open_small(tmp_path, instance=f"instance-{life}") as opened:
            recorder = SpoolRecorder(opened, Told())
            for n in range(60):
                who = ODD[n // 10 % 5] if n % 10 == 0 else f"s{n % 4}"
                await recorded(
                    recorder,
                    call(
                        subscriber=None if n % 7 == 0 else Subscriber(who, "header:x-tenant"),
                        status=(200, 200, 429, None)[n % 4],
                        outcome=Outcome.UNREACHABLE if n % 4 == 3 else Outcome.COMPLETE,
                        usage=usage(model=f"m{n % 3}"),
                        dimensions={"feature": "search"} if n % 2 else {},
                    ),
                )
    with SpoolReader(tmp_path) as reader:
        yield tmp_path, [orjson.loads(line) for line in reader.lines()]


async def test_the_last_calls_are_those_of_the_whole_that_fit(
    spool: tuple[Path, list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calls, "WINDOW_RECORDS", 7)
    monkeypatch.setattr(calls, "WINDOW_BYTES", 2000)
    path, every = spool
    since = every[40]["started_at"]
    questions: list[tuple[dict[str, Any], Any]] = [
        ({}, lambda r: True),
        ({"where": ["subscriber=s1"]}, lambda r: (r["subscriber"] or {}).get("id") == "s1"),
        ({"where": ["subscriber="]}, lambda r: r["subscriber"] is None),
        ({"where": ["status=4xx", "status=none"]}, lambda r: r["status"] in (429, None)),
        (
            {"where": ["status=429", "model=m1", "feature="]},
            lambda r: (r["status"], r["usage"]["model"]) == (429, "m1"),
        ),
        ({"where": ["outcome=unreachable"]}, lambda r: r["outcome"] == "unreachable"),
        ({"where": ["feature=search"]}, lambda r: bool(r["dimensions"])),
        ({"where": [f"subscriber={ODD[1]}"]}, lambda r: (r["subscriber"] or {}).get("id") == ODD[1]),
        ({"since": since}, lambda r: r["started_at"] >= since),
        ({"until": since}, lambda r: r["started_at"] < since),
        ({"where": ["model=never"]}, lambda r: False),
    ]
    with SpoolReader(path) as reader:
        ends = {instance: reader.last_seq(instance) for instance in reader.instances()}
        for given, fits in questions:
            for limit in (1, 3, 50, 1000, None):
                query = calls.records_query(
                    now=NOW, dimensions=("feature",), limit=None if limit is None else str(limit), **given
                )
                found = [orjson.loads(line)["id"] for line in calls.last_calls(reader, query, NOBODY).lines]
                wanted = [each["id"] for each in every if fits(each)]
                assert found == (wanted if limit is None else wanted[-limit:]), (given, limit)
                if limit is None:
                    assert [
                        orjson.loads(line)["id"] for line in calls.calls_from(reader, query, NOBODY, ends)
                    ] == wanted
        for each in (every[0], every[-1], every[70]):
            (line,) = calls.call_by_id(reader, calls.id_of(each["id"] + ":event")).lines
            assert orjson.loads(line) == each
        assert calls.call_by_id(reader, "0199c2a1-7c1e-7000-8000-5d6f0a1b2c3d").lines == []


async def test_reading_backwards_has_an_end(spool: tuple[Path, list[dict[str, Any]]]) -> None:
    path, every = spool
    query = calls.records_query(now=NOW, dimensions=())
    with SpoolReader(path) as reader:
        late = calls.last_calls(reader, query, NOBODY, late=lambda: True)
        assert (late.lines, late.stopped is not None) == ([], True)
        few = calls.last_calls(reader, query, NOBODY, bytes_max=5000)
        assert few.stopped is not None
        assert [orjson.loads(line) for line in few.lines] == every[-len(few.lines) :]


async def test_numbers_that_were_left_out_are_not_looked_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a loss of unknown size a million of them are."""
    for life in range(2):
        async with open_small(tmp_path, instance="a") as opened:
            recorder = SpoolRecorder(opened, Told())
            for _ in range(20):
                await recorded(recorder, call())
        if not life:
            newest = max((tmp_path / "spool" / "a").glob("*.seg"))
            newest.write_bytes(newest.read_bytes()[: newest.stat().st_size // 2])
    reads: list[int] = []
    read = SpoolReader.read

    def noted(self: SpoolReader, instance: str, after_seq: int, **more: Any) -> Any:
        reads.append(after_seq)
        return read(self, instance, after_seq, **more)

    with SpoolReader(tmp_path) as reader:
        assert reader.last_seq("a") > NUMBERS_SKIPPED
        every = list(reader.lines())
        monkeypatch.setattr(SpoolReader, "read", noted)
        query = calls.records_query(now=NOW, dimensions=())
        assert calls.last_calls(reader, query, NOBODY).lines == every
    assert len(every) > 20
    assert len(reads) < 100


def test_usage_fits_a_real_terminal_of_80_columns_and_latin_1(tmp_path: Path) -> None:
    store = LedgerStore(tmp_path / "ledger.db")
    put(store, [record(n, subscriber=Subscriber(who, "header:x")) for n, who in enumerate(ODD)])
    store.close()
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"} | {
        "SIDECAR_DATA_DIR": str(tmp_path),
        "PYTHONIOENCODING": "latin-1",
    }
    command = [sys.executable, "-m", "sidecar", "usage", "--by", "subscriber,model,day"]
    with subprocess.Popen(command, stdout=theirs, stderr=theirs, env=environment) as child:
        os.close(theirs)
        said = b""
        with contextlib.suppress(OSError):  # as a terminal ends that nobody writes to any more
            while piece := os.read(ours, 65536):
                said += piece
        os.close(ours)
    lines = said.decode("latin-1").splitlines()
    assert child.returncode == 0, lines
    assert lines[0].split()[:3] == ["subscriber", "model", "day"]
    assert len([line for line in lines if "2026-11-21" in line]) == len(ODD)
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "ascii"])
@pytest.mark.parametrize("columns", [80, 200])
async def test_tables_fit_the_terminal_and_its_characters(
    spool: tuple[Path, list[dict[str, Any]]], encoding: str, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, every = spool
    store = LedgerStore(path / "ledger.db")
    large = usage(
        model="claude-sonnet-4-5-20250929-v1:0",
        cost_usd="12345.678901",
        cache_read_input_tokens=10**9,
        input_tokens=10**10,
        output_tokens=10**9,
        total_tokens=11 * 10**9,
    )
    batch = [
        record(n, subscriber=Subscriber(who, "header:x"), status=(200, 500)[n % 2], usage=large)
        for n, who in enumerate(ODD * 2)
    ]
    put(store, batch)
    store.close()
    monkeypatch.setenv("SIDECAR_DATA_DIR", str(path))
    monkeypatch.setenv("COLUMNS", str(columns))
    for command in (
        "usage",
        "usage --by subscriber,model,route,hour",
        "usage --by day,subscriber --top 2",
        "records --limit 20",
        "records --where status=none",
        "balance",
        "spool status",
        "spool parked",
        "spool verify",
        "meters list",
        "meters test",
        "usage --meter input_tokens",
        "prices show gpt-5-mini",
        *(f"records --id {one['id']}" for one in every if (one["subscriber"] or {}).get("id") in ODD),
    ):
        raw = io.BytesIO()
        monkeypatch.setattr("sys.stdout", io.TextIOWrapper(raw, encoding=encoding))
        assert main(command.split()) in (0, 1), command
        text = raw.getvalue().decode("utf-8" if encoding == "utf-8" else encoding)
        assert all(line.isprintable() for line in text.split("\n")), command
        if command.split()[0] in ("usage", "records", "balance") and "--id" not in command:
            wide = [line for line in text.splitlines() if len(line) > columns]
            assert not wide, (command, wide)


SHARED: dict[str, Any] = {
    "here": {"used": "34567890", "leased": "1000"},
    "instances": {"edge-1": {"used": "1200000000", "leased": "0"}, "edge-0": {"used": "34567890", "leased": "1000"}},
}


def by_instance(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return lists.limits(rows, lists.limits_query(by="instance"), Names({}))


def test_a_shared_limit_by_instance_says_what_each_sidecar_used_and_has_leased() -> None:
    plain: dict[str, Any] = {
        "limit": "a",
        "scope": {"subscriber": "acme"},
        "used": "5",
        "reserved": "1",
        "amount": "10",
        "percent": 50.0,
    }
    rows = by_instance([plain, plain | SHARED | {"amount": "2000000000"}])
    assert [(row["instance"], row["used"], row["reserved"], row["percent"]) for row in rows] == [
        (None, "5", "1", 50.0),
        ("edge-1", "1200000000", "0", 60.0),
        ("edge-0", "34567890", "1000", 1.7),
    ]
    assert all(row.keys().isdisjoint(("here", "instances")) for row in lists.limits_flat(rows))
    with pytest.raises(QueryError, match="by='model': expected instance"):
        lists.limits_query(by="model")


@pytest.mark.parametrize("columns", [80, 120])
def test_limits_and_what_is_parked_fit_too_and_no_time_is_cut(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    limit: dict[str, Any] = {
        "limit": "acme-monthly-budget",
        "scope": {"subscriber": ODD[1], "model": "claude-sonnet-4-5-20250929"},
        "unit": "total_tokens",
        "used": "1234567890",
        "reserved": "1000",
        "amount": "2000000000",
        "percent": 61.7,
        "window": "month",
        "until": "2026-12-01T00:00:00Z",
        "action": "warn",
    }
    parked: dict[str, Any] = {
        "parked_at": "2026-11-29 02:15:57",
        "backend": "stripe",
        "reason": "value_not_taken (meter pages)",
        "subscriber": ODD[0],
        "maybe_taken": True,
        "attempts": 3,
        "event_id": "0199c2a1-7c1e-7000-8000-5d6f0a1b2c3d:p",
    }
    for text, time in (
        (limits.report([limit], Names({})), "2026-12-01 00:00"),
        (limits.report([limit | SHARED], Names({})), "2026-12-01 00:00"),
        (limits.report(by_instance([limit | SHARED]), Names({})), "2026-12-01 00:00"),
        (spool_command.parked_table([parked]), "2026-11-29 02:15:57"),
    ):
        assert max(map(len, text.splitlines())) <= columns, text
        assert time in text
        assert "\u202e" not in text
