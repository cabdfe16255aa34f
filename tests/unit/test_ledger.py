"""The embedded store: exact, once, and null is not zero."""

from __future__ import annotations

import random
import sqlite3
import subprocess
import sys
import threading
from collections import Counter
from contextlib import closing
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from fractions import Fraction
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from zoneinfo import ZoneInfo

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.backend_fixtures import T0_NS, odd_records, record, records, usage
from support.backend_trials import made
from support.ledgers import LedgerUnderTest

from sidecar.backends.ledger import DEDUP_WINDOW_S, LedgerBackend
from sidecar.ledger import LedgerError, LedgerReader, LedgerStore, TooLongError
from sidecar.ledger.queries import Ledger
from sidecar.ledger.store import KEYS_KEPT_S
from sidecar.meters.definition import read_meters
from sidecar.meters.hourly import (
    TOKENS,
    body_of,
    delta_of,
    deltas,
    from_wire,
    grouped,
    hour_of,
    read_amount,
    to_wire,
    write_amount,
)
from sidecar.model.call_group import CallGroup, CallKind
from sidecar.model.delivery import Blocked, Delivered, Duplicate, Event, Refused, Retry
from sidecar.model.exchange import Outcome, Subscriber, Usage, UsageState
from sidecar.model.record import Record

HOUR_NS = 3600 * 10**9


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.db"


def put(store: LedgerStore, batch: list[Record], key: str = "k") -> object:
    return store.apply(key, body_of(deltas(grouped(batch))))


def test_sums_by_any_group(ledger: LedgerUnderTest) -> None:
    with_other = [
        record(1),
        record(2, subscriber=Subscriber("zoe", "jwt:sub"), started_ns=T0_NS + HOUR_NS),
        record(3, usage=usage(model="claude-sonnet-4-5", provider="anthropic", input_tokens=7)),
        record(4, usage=None, status=500),
        record(5, subscriber=None, route=None, usage=None),
    ]
    assert ledger.put(with_other) == Delivered()
    reader = ledger.reader()
    (total,) = reader.usage()
    assert (total.records, total.calls, total.errors, total.with_usage) == (5, 5, 1, 3)
    assert (total.input_tokens, total.output_tokens, total.request_bytes) == (93, 291, 5 * 412)
    assert [(r.group, r.calls) for r in reader.usage(["subscriber"])] == [((None,), 1), (("acme",), 3), (("zoe",), 1)]
    by_model = {r.group: r.input_tokens for r in reader.usage(["model", "provider"])}
    assert by_model[("claude-sonnet-4-5", "anthropic")] == 7
    assert by_model[(None, None)] is None, "calls without usage have no token sum"
    assert [r.group for r in reader.usage(["hour"])] == [("2026-11-21T09:00Z",), ("2026-11-21T10:00Z",)]
    assert [r.group for r in reader.usage(["day"])] == [("2026-11-21",)]
    assert [r.group for r in reader.usage(["month", "status"])] == [("2026-11", "2xx"), ("2026-11", "5xx")]
    assert [r.group for r in reader.usage(["route"])] == [(None,), ("/v1/chat/completions",)]
    since = datetime(2026, 11, 21, 10, 30, tzinfo=UTC)
    assert [r.calls for r in reader.usage(since=since)] == [1], "the hour that since lies in counts"
    assert [r.calls for r in reader.usage(until=since)] == [5]
    assert reader.usage(since=since + timedelta(days=1)) == []


def test_null_stays_apart_from_zero(ledger: LedgerUnderTest) -> None:
    ledger.put([record(1, usage=Usage(usage_state=UsageState.ABSENT, model="m"))], "a")
    (row,) = ledger.reader().usage()
    assert (row.input_tokens, row.total_tokens, row.cost_usd) == (None, None, None)
    assert (row.with_usage, row.without_usage) == (0, 1)
    ledger.put([record(2, usage=usage(model="m", input_tokens=0, output_tokens=None, total_tokens=None))], "b")
    (row,) = ledger.reader().usage()
    assert (row.input_tokens, row.output_tokens, row.cache_read_input_tokens) == (0, None, 0)
    ledger.put([record(3, usage=usage(model="m", usage_state=UsageState.PARTIAL))], "c")
    (row,) = ledger.reader().usage()
    assert (row.with_usage, row.partial_usage, row.without_usage, row.output_tokens) == (2, 1, 1, 97)


def test_numbers_of_any_size_and_money_are_exact(ledger: LedgerUnderTest) -> None:
    huge = usage(input_tokens=2**63 - 1, cost_usd="0.1", units={"audio_seconds": 0.1, "pages": 3})
    ledger.put([record(n, usage=huge) for n in range(1, 4)], "a")
    ledger.put([record(4, usage=usage(input_tokens=1, cost_usd="1e-9", units={"audio_seconds": "0.2"}))], "b")
    (row,) = ledger.reader().usage()
    assert row.input_tokens == 3 * (2**63 - 1) + 1
    assert row.cost_usd == "0.300000001"
    assert ledger.reader().units(["subscriber"]) == {("acme",): {"audio_seconds": "0.5", "pages": "9"}}


@pytest.mark.parametrize(
    "odd", ["1e999999", "nan", "inf", "", "1" * 41, "0x10", "1,5", "1e-30", True, None, [], {}, float("nan"), 1e300]
)
def test_an_odd_amount_is_no_amount(odd: object) -> None:
    assert read_amount(odd) is None


@given(st.lists(st.decimals(min_value=-(10**17), max_value=10**17, places=12), min_size=1, max_size=30))
def test_money_adds_up_as_fractions_do(amounts: list[Decimal]) -> None:
    batch = [record(n, usage=usage(cost_usd=write_amount(a))) for n, a in enumerate(amounts, 1)]
    (delta,) = deltas(grouped(batch))
    assert delta.cost_usd is not None
    assert Fraction(delta.cost_usd) == sum(map(Fraction, amounts))
    (again,) = from_wire(orjson.loads(orjson.dumps(to_wire([delta]))))
    assert again == delta


def test_the_effects_of_odd_records_survive_the_wire() -> None:
    batch = deltas(grouped(odd_records()))
    assert from_wire(orjson.loads(body_of(batch))["hourly"]) == batch


def test_odd_records_are_added_up_as_all_others(ledger: LedgerUnderTest) -> None:
    assert ledger.put(odd_records()) == Delivered()
    (row,) = ledger.reader().usage()
    assert (row.records, row.calls) == (18, 17)
    by = [(row.group, row.calls) for row in ledger.reader().usage(["subscriber", "model", "route", "status"])]
    assert by == sorted(by, key=lambda each: [(text is not None, (text or "").encode()) for text in each[0]])
    assert sum(calls for _, calls in by) == 17


def test_a_credential_that_was_turned_down_is_nobodys(ledger: LedgerUnderTest) -> None:
    keys = [Subscriber(f"key_{n:032x}", "header:x-api-key") for n in range(50)]
    ledger.put([record(n, subscriber=key, status=401, usage=None) for n, key in enumerate(keys)])
    denied = record(99, subscriber=keys[0], status=403, outcome=Outcome.DENIED, first_byte_ms=None, usage=None)
    ledger.put([denied], "denied")
    groups = [r.group[0] for r in ledger.reader().usage(["subscriber"])]
    assert groups == [keys[0].id, "unauthenticated"], "the gate's own refusal names who was refused"


# Once


def test_a_delivery_counts_once(ledger: LedgerUnderTest) -> None:
    assert ledger.put(records(10)) == Delivered()
    assert ledger.put(records(10)) == Duplicate()
    ledger.reopen()
    assert ledger.put(records(10)) == Duplicate()
    assert ledger.reader().usage()[0].calls == 10


@settings(max_examples=25)
@given(st.randoms(use_true_random=False))
def test_any_order_and_any_repeats_give_the_same_sums(
    tmp_path_factory: pytest.TempPathFactory, chance: random.Random
) -> None:
    everything = odd_records() + records(40)
    cuts = sorted(chance.sample(range(1, len(everything)), 5))
    parts = [everything[a:b] for a, b in zip([0, *cuts], [*cuts, len(everything)], strict=True)]
    sends = [(str(number), body_of(deltas(grouped(part)))) for number, part in enumerate(parts)] * 2
    chance.shuffle(sends)
    directory = tmp_path_factory.mktemp("ledgers")
    store = LedgerStore(directory / "parts.db")
    for key, body in sends:
        store.apply(key, body)
    whole = LedgerStore(directory / "whole.db")
    whole.apply("all", body_of(deltas(grouped(everything))))
    assert dump(store) == dump(whole)
    store.close()
    whole.close()


def dump(store: LedgerStore) -> Counter[tuple[object, ...]]:
    db = store._open()
    hourly = db.execute("SELECT series.key, hourly.* FROM hourly JOIN series ON series.id = hourly.series").fetchall()
    units = db.execute("SELECT key, hour, unit, amount FROM hourly_units JOIN series ON id = series").fetchall()
    return Counter([(key, hour, *sums) for key, hour, _, *sums in hourly] + units)


def test_keys_are_kept_for_the_backends_window_and_no_longer(path: Path) -> None:
    assert KEYS_KEPT_S == DEDUP_WINDOW_S == LedgerBackend.abilities.dedup_window_s
    now = [1_800_000_000.0]
    store = LedgerStore(path, clock=lambda: now[0])
    put(store, records(1), "old")
    now[0] += KEYS_KEPT_S - 1
    assert put(store, records(1), "old") == Duplicate()
    now[0] += 3601
    put(store, records(1), "new")
    assert put(store, records(1), "old") == Delivered(), "the window is over"
    assert put(store, records(1), "new") == Duplicate()
    store.close()


KILLED = """
import sys
from pathlib import Path
from support.backend_fixtures import records
from sidecar.ledger import LedgerStore
from sidecar.meters.definition import read_meters
from sidecar.meters.hourly import body_of, deltas, grouped
store = LedgerStore(Path(sys.argv[1]))
body = body_of(deltas(grouped(records(3))))
for number in range(int(sys.argv[2]), 1000):
    store.apply(str(number), body)
    print(number, flush=True)
"""


def test_a_kill_between_two_commits_loses_and_doubles_nothing(path: Path) -> None:
    tests = str(Path(__file__).parent.parent)
    done = 0
    for seen in (3, 11):
        child = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(path), str(done)],
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(tests).parent,
            env={"PYTHONPATH": f"{tests}:."},
        )
        assert child.stdout is not None
        for _ in range(seen):
            child.stdout.readline()
        child.kill()
        rest = child.stdout.read().split()
        child.stdout.close()
        child.wait()
        said = done + seen + len([line for line in rest if line])
        store = LedgerStore(path)
        calls = LedgerReader(path).usage()[0].calls
        assert calls % 3 == 0
        assert said <= calls // 3 <= said + 1, "what was said to be in is in; one more may be"
        for key in range(calls // 3):
            assert put(store, records(3), str(key)) == Duplicate()
        store.close()
        done = calls // 3


def test_reading_while_writing(path: Path) -> None:
    store = LedgerStore(path)
    stop = threading.Event()
    problems: list[BaseException] = []

    def read() -> None:
        try:
            while not stop.is_set():
                rows = LedgerReader(path).usage(["subscriber"])
                assert all(row.calls % 4 == 0 for row in rows), "a delivery is seen whole or not at all"
        except BaseException as error:
            problems.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(100):
        assert put(store, records(4), str(number)) == Delivered()
    stop.set()
    reader.join(10)
    assert problems == []
    store.close()
    assert LedgerReader(path).usage()[0].calls == 400, "also after the writer has gone"


# Faults


METERS = read_meters(
    [
        {"name": "calls", "aggregation": {"type": "COUNT"}},
        {"name": "tokens", "aggregation": {"type": "SUM", "field": "total_tokens", "multiplier": "0.001"}},
        {"name": "paid", "aggregation": {"type": "SUM", "field": "cost_usd", "bucket_size": "HOUR"}},
        {"name": "longest", "aggregation": {"type": "MAX", "field": "duration_ms"}},
        {"name": "models", "aggregation": {"type": "UNIQUE_COUNT", "field": "model"}},
    ]
)
SUMS = METERS[:3]


def said(reader: Ledger) -> list[object]:
    """Every sum and running total that is not zero: what was taken back leaves a zero where nothing was."""
    hours = [
        (row.group, {name: value for name, value in asdict(row).items() if value not in (None, 0, "0")})
        for row in reader.usage(["hour", "subscriber", "model", "status"])
        if row.records
    ]
    totals = [(m.name, [r for r in reader.meter(m) if Decimal(r.value)]) for m in SUMS]
    units = {k: {n: v for n, v in u.items() if Decimal(v)} for k, u in reader.units(["subscriber"]).items()}
    return [hours, totals, {k: u for k, u in units.items() if u}]


async def test_what_is_undone_was_never_there(ledger: LedgerUnderTest) -> None:
    batch = odd_records()
    backend = ledger.backend(METERS)
    for sealed in backend.encode(batch).sealed:
        assert set(await backend.send(sealed)) == {Delivered()}
    reader, expected = ledger.reader(), said(ledger.reader())
    for place, gone in enumerate(batch[:9], 1):
        with TemporaryDirectory() as directory:
            other = made(LedgerBackend, open_ledger=partial(LedgerStore, Path(directory, "o.db")), definitions=METERS)
            for sealed in other.encode(batch[place:]).sealed:
                assert set(await other.send(sealed)) == {Delivered()}
            await other.aclose()
            expected = said(LedgerReader(Path(directory, "o.db")))
        undone = await backend.cancel(Event(gone.id, gone.id), gone)
        assert undone.verdict == Delivered()
        assert all(text.endswith("keeps it") for text in undone.left)
        assert said(reader) == expected, gone
        assert (await backend.cancel(Event(gone.id, gone.id), gone)).verdict == Duplicate(), "once, however often"
        assert said(reader) == expected
    for sealed in backend.encode(batch).sealed:
        assert set(await backend.send(sealed)) == {Duplicate()}, "what was taken back does not come back"
    assert said(reader) == expected


async def test_what_cannot_be_undone_is_left_and_said(ledger: LedgerUnderTest) -> None:
    here, never = record(1), record(2, subscriber=Subscriber("nobody-yet", "jwt:sub"))
    backend = ledger.backend(METERS)
    (sealed,) = backend.encode([here]).sealed
    await backend.send(sealed)
    assert (await backend.cancel(Event(never.id, never.id), never)).verdict == Refused("not_in_ledger")
    assert (await backend.cancel(Event(here.id, here.id), None)).verdict == Refused("record_gone")
    await backend.aclose()
    ledger.reopen()
    changed = read_meters([{"name": "calls", "aggregation": {"type": "COUNT"}, "reset_usage": "NEVER"}])
    later = ledger.backend(changed)
    (sealed,) = later.encode([record(3)]).sealed
    await later.send(sealed)
    undone = await later.cancel(Event(here.id, here.id), here)
    assert undone.verdict == Delivered()
    assert ["defined otherwise" in text for text in undone.left] == [True]
    assert [row.value for row in ledger.reader().meter(changed[0])] == ["1"]
    assert ledger.reader().usage()[0].records == 1
    await later.aclose()


def test_a_ledger_that_is_not_there_says_so(path: Path) -> None:
    with pytest.raises(LedgerError, match="first delivery"):
        LedgerReader(path).usage()
    path.touch()
    with pytest.raises(LedgerError, match="first delivery"):
        LedgerReader(path).usage()


def test_an_unknown_group_is_named_with_the_known_ones(ledger: LedgerUnderTest) -> None:
    ledger.put([])
    ledger.put(records(1))
    with pytest.raises(LedgerError, match="'planet': expected subscriber, model"):
        ledger.reader().usage(["planet"])


def test_days_add_up_to_the_hours_whatever_is_asked_for(ledger: LedgerUnderTest) -> None:
    """Whole days are read from the daily sums, the rest from the hourly ones: no call is missed or counted twice."""
    day = 24 * HOUR_NS
    times = [T0_NS + offset for offset in (-3 * day, -2 * day - 9 * HOUR_NS, -day, -HOUR_NS, 0, HOUR_NS, day, 2 * day)]
    batch = [priced(n, f"0.{n}", "m" if n % 2 else "k", started_ns=at) for n, at in enumerate(times * 3, 1)]
    ledger.put(batch)
    reader = ledger.reader()
    for since_h in (-80, -72, -33, -9, 0, 3, 15, None):
        for until_h in (-24, -9, 0, 1, 15, 39, 63, None):
            since, until = (
                None if hours is None else datetime(2026, 11, 21, 9, tzinfo=UTC) + timedelta(hours=hours)
                for hours in (since_h, until_h)
            )
            for by in ((), ("model",), ("day",), ("day", "model"), ("month", "subscriber")):
                rows = reader.usage(by, since, until)
                found = {row.group: (row.calls, row.input_tokens, row.cost_usd) for row in rows}
                added: dict[tuple[str | None, ...], list[Any]] = {}
                for row in reader.usage(("hour", *by), since, until):
                    sums = added.setdefault(row.group[1:], [0, 0, Decimal(0)])
                    sums[0] += row.calls
                    sums[1] += row.input_tokens
                    sums[2] += Decimal(row.cost_usd or 0)
                assert found == {who: (a, b, write_amount(c)) for who, (a, b, c) in added.items()}, (since, until, by)


def dimensioned(number: int, **dimensions: str) -> Record:
    return record(number, dimensions=dimensions)


def test_usage_by_and_of_a_dimension(ledger: LedgerUnderTest) -> None:
    batch = [dimensioned(1, feature="search", team="a"), dimensioned(2, feature="search"), dimensioned(3)]
    ledger.put([*batch, dimensioned(4)])
    reader = ledger.reader()
    by = [(r.group, r.calls) for r in reader.usage(["feature"])]
    assert by == [((None,), 2), (("search",), 2)]
    assert [(r.group, r.calls) for r in reader.usage(["dimensions.team", "day"])] == [
        ((None, "2026-11-21"), 3),
        (("a", "2026-11-21"), 1),
    ]
    assert reader.usage(["dimensions.never"])[0].group == (None,), "a dimension that no call had yet"
    asked: list[tuple[dict[str, list[str | None]], int]] = [
        ({"feature": ["search"]}, 2),
        ({"feature": ["search", None]}, 4),
        ({"feature": [None]}, 2),
        ({"feature": ["search"], "dimensions.team": [None]}, 1),
        ({"model": [None]}, 0),
        ({"status": ["2xx", "5xx"]}, 4),
    ]
    for where, calls in asked:
        assert sum([row.calls for row in reader.usage([], where=where)]) == calls, where


async def test_a_dimension_has_so_many_values_and_no_more(
    ledger: LedgerUnderTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("store", "postgres_store"):
        monkeypatch.setattr(f"sidecar.ledger.{module}.DIMENSION_VALUES_MAX", 3)
    for number in range(1, 7):
        ledger.put([dimensioned(number, feature=f"f{number}")], str(number))
    ledger.reopen()  # what is known is read from the file
    ledger.put([dimensioned(7, feature="f7"), dimensioned(8, feature="f1")], "7")
    by = {row.group[0]: row.calls for row in ledger.reader().usage(["feature"])}
    assert by == {"f1": 2, "f2": 1, "f3": 1, "(other)": 4}
    gone = dimensioned(7, feature="f7")
    undone = await ledger.backend(()).cancel(Event(gone.id, gone.id), gone)
    assert undone.verdict == Delivered(), "what is filed under other is found there"
    assert {row.group[0]: row.calls for row in ledger.reader().usage(["feature"])}["(other)"] == 3


def test_days_and_hours_of_a_time_zone(ledger: LedgerUnderTest) -> None:
    begin = int(datetime(2026, 10, 24, tzinfo=UTC).timestamp()) * 10**9  # Berlin's clocks go back on the 25th
    ledger.put([record(n, started_ns=begin + n * HOUR_NS) for n in range(24 * 3)])
    reader = ledger.reader()
    for name in ("Europe/Berlin", "America/St_Johns", "Asia/Kathmandu", "Pacific/Kiritimati"):
        zone = ZoneInfo(name)
        counted: Counter[str] = Counter()
        for n in range(24 * 3):
            counted[(datetime.fromtimestamp(begin // 10**9 + n * 3600, zone)).date().isoformat()] += 1
        assert {r.group[0]: r.calls for r in reader.usage(["day"], zone=zone)} == counted, name
        assert {r.group[0]: r.calls for r in reader.usage(["day", "model"], zone=zone)} == counted
    berlin = ZoneInfo("Europe/Berlin")
    hours = [row.group[0] for row in reader.usage(["hour"], zone=berlin)]
    assert len(hours) == 72
    assert hours[24:27] == ["2026-10-25T02:00+02:00", "2026-10-25T02:00+01:00", "2026-10-25T03:00+01:00"]
    assert [row.group for row in reader.usage(["month"], zone=berlin)] == [("2026-10",)]


def test_sums_that_sqlite_cannot_add_up_are_exact(ledger: LedgerUnderTest) -> None:
    for number, (cost, tokens) in enumerate([("0.1", 1), ("1e-20", 2**63), ("9e15", 2**62), ("9e15", 2**62)], 1):
        one = record(number, usage=usage(cost_usd=cost, input_tokens=tokens), started_ns=T0_NS + number * HOUR_NS)
        ledger.put([one], str(number))
    for by in ((), ("subscriber",), ("day",), ("day", "model")):
        (row,) = ledger.reader().usage(by)
        assert (row.cost_usd, row.input_tokens) == ("18000000000000000.10000000000000000001", 2**64 + 1), by
    assert [row.cost_usd for row in ledger.reader().usage(["hour"])] == [
        "0.1",
        "0.00000000000000000001",
        "9000000000000000",
        "9000000000000000",
    ]


def test_whole_costs_beyond_what_an_integer_holds_are_exact(ledger: LedgerUnderTest) -> None:
    """In SQLite a text without a point passes for an integer, and integers are picodollars."""
    for number, cost in enumerate(["9e15", "9300000", "-9300000", "7"]):
        one = record(number, usage=usage(cost_usd=cost, model=f"m{number}"), started_ns=T0_NS + number * HOUR_NS)
        ledger.put([one], str(number))
    reader = ledger.reader()
    alone = ["9000000000000000", "9300000", "-9300000", "7"]
    assert [row.cost_usd for row in reader.usage(["hour"])] == alone
    assert [row.cost_usd for row in reader.usage(["model"])] == alone
    assert [row.cost_usd for row in reader.usage(["day"], zone=ZoneInfo("Asia/Tokyo"))] == ["9000000000000007"]
    assert [row.cost_usd for row in reader.usage(where={"model": ("m1",)})] == ["9300000"]
    assert [row.cost_usd for row in reader.usage(where={"subscriber": ("acme",)})] == ["9000000000000007"]


def test_what_a_client_sent_is_asked_for_as_it_was_sent(ledger: LedgerUnderTest) -> None:
    """PostgreSQL keeps no NUL, and takes none in a question."""
    odd = record(
        1, usage=usage(model="nul\0x"), subscriber=Subscriber("s\0", "header:x"), dimensions={"feature": "f\0"}
    )
    ledger.put([odd, record(2)])
    for name, value in (("model", "nul\0x"), ("subscriber", "s\0"), ("dimensions.feature", "f\0")):
        assert [row.calls for row in ledger.reader().usage(where={name: (value, "nobody")})] == [1], name


def test_a_question_that_takes_too_long_is_given_up(ledger: LedgerUnderTest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sidecar.ledger.queries.STEPS_BETWEEN_LOOKS", 1)
    many = [record(n, subscriber=Subscriber(f"s{n}", "jwt:sub"), started_ns=T0_NS + n * HOUR_NS) for n in range(3000)]
    ledger.put(many)
    reader = ledger.reader()
    with pytest.raises(TooLongError):
        reader.usage(["subscriber", "hour", "model", "route"], limit_s=-1)
    assert reader.usage(limit_s=60)[0].records == 3000


def test_the_version_is_another_one_after_each_change(ledger: LedgerUnderTest) -> None:
    reader = ledger.reader()
    ledger.put([], "0")
    first = reader.version()
    assert reader.version() == first
    ledger.put(records(1), "a")
    second = reader.version()
    assert second != first
    ledger.put(records(1), "a")  # a repeat
    ledger.put([record(2)], "b")
    assert reader.version() not in (first, second)
    reader.close()


def test_an_older_ledger_is_refused_with_what_to_do(path: Path) -> None:
    LedgerStore(path).close()
    with closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA user_version = 3")
    with pytest.raises(LedgerError, match=r"has format 3, which an older release wrote.* let that release deliver"):
        LedgerStore(path)


def test_a_newer_ledger_is_refused_by_name(path: Path) -> None:
    LedgerStore(path).close()
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    for use in (lambda: LedgerStore(path), lambda: LedgerReader(path).usage()):
        with pytest.raises(LedgerError, match="newer version"):
            use()


def test_a_damaged_ledger_is_kept_and_said(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """And keeps nobody from starting: it is made of the spool, and no call waits for it."""
    path.write_bytes(b"this is no database, but it is long enough to be looked at" * 100)
    store = LedgerStore(path)
    (said,) = [entry.getMessage() for entry in caplog.records]
    assert f"{path} is damaged (file is not a database): put its copy back, or move it away" in said
    with pytest.raises(LedgerError, match="is damaged"):
        LedgerReader(path).usage()
    assert path.read_bytes().startswith(b"this is no database")
    assert put(store, records(1), "a") == Blocked("ledger_damaged")
    assert store.applied("one") == Blocked("ledger_damaged")
    path.unlink()
    assert put(store, records(1), "a") == Delivered(), "it was moved away, as the message says"
    store.close()


def test_a_newer_ledger_keeps_nobody_from_going_on_for_one_that_died(path: Path) -> None:
    LedgerStore(path).close()
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    store = LedgerStore(path, resumed=True)
    assert put(store, records(1), "a") == Blocked("newer_version")
    store.close()


def test_a_ledger_damaged_while_open_blocks(path: Path) -> None:
    store = LedgerStore(path)
    put(store, records(1), "a")
    store.close()
    path.write_bytes(b"x" * 8192)
    assert put(store, records(1), "b") == Blocked("ledger_damaged")
    store.close()


def test_a_full_disk_waits_and_counts_nothing(path: Path) -> None:
    store = LedgerStore(path)
    put(store, records(1), "a")
    pages = store._open().execute("PRAGMA page_count").fetchone()[0]
    store._open().execute(f"PRAGMA max_page_count = {pages}")
    many = [record(n, subscriber=Subscriber(f"s{n}-{'x' * 150}", "jwt:sub")) for n in range(500)]
    assert put(store, many, "b") == Retry("disk_full")
    assert LedgerReader(path).usage()[0].calls == 1
    assert put(store, many, "b") == Delivered(), "a new connection has no such limit: the disk has room again"
    assert LedgerReader(path).usage()[0].calls == 501
    store.close()


def test_a_locked_ledger_waits(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sidecar.storage.sqlite.BUSY_S", 0.05)
    store = LedgerStore(path)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    assert put(store, records(1)) == Retry("busy")
    other.execute("ROLLBACK")
    other.close()
    assert put(store, records(1)) == Delivered()
    store.close()


def test_a_sum_that_would_not_be_exact_is_refused_whole(path: Path) -> None:
    store = LedgerStore(path)
    put(store, records(1), "a")
    body = orjson.loads(body_of(deltas(grouped([record(2, usage=usage(cost_usd="1"))]))))
    body["hourly"][0]["cost_usd"] = "1e200"
    assert store.apply("b", orjson.dumps(body)) == Delivered()
    body["hourly"][0]["cost_usd"] = "0.1"
    assert store.apply("c", orjson.dumps(body)) == Refused("sum_not_exact")
    assert store.apply("c", orjson.dumps(body)) == Refused("sum_not_exact")
    assert LedgerReader(path).usage()[0].calls == 2
    store.close()


def priced(number: int, total: str | None, model: str = "gpt-5", started_ns: int | None = None) -> Record:
    state = "unpriced" if total is None else "exact"
    cost: dict[str, Any] = {"currency": "USD", "total": total, "parts": {}, "state": state, "source": "custom"}
    return record(number, usage=usage(model=model), cost=cost, started_ns=started_ns)


async def test_calls_that_the_cost_lacks_are_counted_beside_it(ledger: LedgerUnderTest) -> None:
    batch = [
        priced(1, "0.25"),
        priced(2, None),
        priced(3, "0"),
        priced(4, None),
        priced(5, None, "llama-7"),
        record(6, usage=None),
        record(7),
        record(9, status=429, cost={"currency": None, "total": None, "reason": "no_usage"}),
        record(10, cost={"currency": None, "total": None, "reason": "no_table"}),
        priced(8, None, "old-1", started_ns=T0_NS - 40 * 24 * HOUR_NS),
    ]
    ledger.put(batch)
    reader = ledger.reader()
    by_model = {row.group[0]: (row.unpriced, row.cost_usd) for row in reader.usage(["model"])}
    assert by_model == {
        None: (0, None),
        "gpt-5": (2, "0.25"),
        "gpt-5-mini-2025-08-07": (0, None),
        "llama-7": (1, None),
        "old-1": (1, None),
    }
    at = datetime(2026, 11, 21, 9, tzinfo=UTC)
    seen = reader.unpriced(at - timedelta(days=30))
    assert [(one.provider, one.model, one.calls, one.last) for one in seen] == [
        ("openai", "gpt-5", 2, at),
        ("openai", "llama-7", 1, at),
    ]
    assert [one.model for one in reader.unpriced()] == ["gpt-5", "llama-7", "old-1"]
    backend = ledger.backend(())
    for gone in batch[1:5]:
        assert (await backend.cancel(Event(gone.id, gone.id), gone)).verdict == Delivered()
    assert [one.model for one in reader.unpriced()] == ["old-1"], "what was cancelled lacks nowhere"


def test_calls_of_an_api_without_models_lack_no_cost(ledger: LedgerUnderTest) -> None:
    """It states counts of its own, and no price is set for them."""
    none: dict[str, Any] = {"currency": None, "total": None, "parts": {}, "state": "unpriced", "reason": "no_model"}
    own = Usage(usage_state=UsageState.FINAL, units={"rows": 3})
    batch = [record(n, usage=own, cost=none) for n in range(3)]
    batch.append(record(3, usage=Usage(usage_state=UsageState.FINAL, provider="openai", input_tokens=1), cost=none))
    ledger.put(batch)
    assert [(row.group, row.unpriced) for row in ledger.reader().usage(["provider"])] == [
        ((None,), 0),
        (("openai",), 1),
    ]
    group = CallGroup(CallKind(_example=batch[0]), hour_of(batch[0]), lines=[b""] * 3, unpriced=3)
    assert delta_of(group).counts["unpriced"] == 0


def test_calls_counted_together_lack_the_same_costs_as_one_by_one() -> None:
    calls = [priced(1, "0.25"), priced(2, None), priced(3, None)]
    group = CallGroup(CallKind(_example=calls[0]), hour_of(calls[0]), lines=[b""] * len(calls))
    for one in calls:
        group.request_bytes += one.request_bytes
        group.response_bytes += one.response_bytes
        for name in TOKENS:
            count = getattr(one.usage, name)
            if count is not None:
                group.tokens[name] = group.tokens.get(name, 0) + count
    group.priced, group.unpriced, group.cost_pico = 1, 2, 250_000_000_000
    assert [delta_of(group)] == deltas(grouped(calls))
