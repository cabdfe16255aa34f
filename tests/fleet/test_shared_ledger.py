"""The ledger in PostgreSQL: each record once whoever sends it, its faults as verdicts, and copies refused by name."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager, closing
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from support.backend_fixtures import T0_NS, odd_records, record, records
from support.ledgers import again
from support.pgbouncer import pgbouncer
from support.postgres_server import PostgresServer
from support.statements import before_statements
from support.whole import children, suspend

from sidecar.cli.connect import try_everything
from sidecar.cli.shared import known_backend_settings
from sidecar.ledger.identity import Identity
from sidecar.ledger.lanes import lane_of
from sidecar.ledger.postgres_queries import PostgresReader
from sidecar.ledger.postgres_schema import NO_TIME, PART, STEPS, Line, Reported, copied_texts, date_of, day_of, line_of
from sidecar.ledger.postgres_store import PostgresStore
from sidecar.meters.buckets import BatchSums
from sidecar.model.delivery import Blocked, Delivered, Duplicate, Refused, Retry, Verdict
from sidecar.model.exchange import Subscriber
from sidecar.model.record import Record
from sidecar.settings import load
from sidecar.storage.postgres import COMMAND_S, Fault, Postgres, PostgresError

pytestmark = pytest.mark.each_postgres
Opened = Callable[..., PostgresStore]


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Opened]:
    """Opens stores; each name has a data directory of its own."""
    with ExitStack() as stack:

        def store(url: str, name: str = "one", directory: Path | None = None) -> PostgresStore:
            directory = directory or tmp_path / name
            directory.mkdir(exist_ok=True)
            made = PostgresStore(url, Identity(directory, name))
            stack.callback(made.close)
            return made

        yield store


def lines_of(batch: Sequence[Record], *, counted: bool = True) -> list[Line]:
    found = [line_of(one.json, counted=counted) for one in batch]
    return [line for line in found if line is not None]


def put(store: PostgresStore, batch: Sequence[Record], *, counted: bool = True) -> Verdict:
    return store.write(lines_of(batch, counted=counted), None, again)


def calls(number: int, count: int, start: int = 1) -> list[Record]:
    """Of a few customers, with ids of their own for each `number`."""
    return [
        record(
            n,
            id=f"0199aaaa-0000-7000-8{number:03d}-{n:012d}",
            subscriber=Subscriber(f"customer-{n % 7}", "jwt:sub"),
            started_ns=T0_NS + n % 3 * 3600 * 10**9,
        )
        for n in range(start, start + count)
    ]


def check(url: str, expected: int) -> None:
    """Totals are the records, and a lane has numbers without holes."""
    with closing(PostgresReader(url)) as reader:
        rows = reader.usage(["instance"])
        counted = reader.counted()
        assert sum(row.records for row in rows) == expected
        assert {row.group[0]: row.records for row in rows} == {name: n for name, (_, n) in counted.items() if n}
        assert sum(row.records for row in reader.usage(["hour", "subscriber"])) == expected
        assert {one.instance: one.records for one in reader.instances() if one.records} == {
            name: n for name, (n, _) in counted.items()
        }
    assert holes(url) == []


def holes(url: str) -> list[str]:
    server, _, database = url.rpartition("/")
    return [
        row
        for row in sql(
            f"{server}/{database}",
            "SELECT l.lane, l.last_seq, count(r.*), max(r.lane_seq) FROM metering.lanes l "
            "LEFT JOIN metering.records r USING (lane) GROUP BY 1, 2 "
            "HAVING l.last_seq <> count(r.*) OR count(DISTINCT r.lane_seq) <> count(r.*) "
            "OR coalesce(max(r.lane_seq), 0) <> l.last_seq",
        ).splitlines()
        if row
    ]


def sql(url: str, statements: str) -> str:
    import asyncpg

    async def run() -> str:
        connection = await asyncpg.connect(url)
        try:
            if not statements.startswith("SELECT"):
                await connection.execute(statements)
                return ""
            return "\n".join("|".join(map(str, row)) for row in await connection.fetch(statements))
        finally:
            await connection.close()

    with ThreadPoolExecutor(1) as pool:  # also for a test that has a loop of its own
        return pool.submit(asyncio.run, run()).result()


# Once


def test_what_comes_again_in_other_cuts_or_from_a_copy_changes_nothing(postgres_database: str, opened: Opened) -> None:
    store, other = opened(postgres_database), opened(postgres_database, "two")
    everything = odd_records() + records(60)[20:]
    assert put(store, everything[:30]) == Delivered()
    assert put(store, everything[:30]) == Duplicate()
    assert put(store, everything[20:40]) == Delivered(), "a part of it is new"
    assert put(other, everything) == Delivered(), "of another, which has more"
    chance = random.Random(7)
    for _ in range(6):
        begin, end = sorted(chance.sample(range(len(everything) + 1), 2))
        assert put(chance.choice([store, other]), everything[begin:end]) == Duplicate()
    check(postgres_database, len(everything))
    assert put(store, [everything[0], everything[0]]) == Duplicate(), "twice in one batch"
    twice = calls(1, 1) * 2
    assert put(store, twice) == Delivered()
    check(postgres_database, len(everything) + 1)


def test_many_who_write_the_same_at_once_do_not_wait_in_a_circle(postgres_database: str, opened: Opened) -> None:
    everything = calls(1, 240)
    verdicts: list[Verdict] = []

    def write(name: str) -> None:
        store = opened(postgres_database, name)
        chance = random.Random(name)
        cuts = [everything[at : at + 30] for at in range(0, len(everything), 15)]
        chance.shuffle(cuts)
        for cut in cuts:
            while isinstance(verdict := put(store, cut), Retry):
                verdicts.append(verdict)
            verdicts.append(verdict)

    put(opened(postgres_database, "first"), calls(2, 1))  # the tables are there
    writers = [threading.Thread(target=write, args=(f"w{n}",)) for n in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(120)
    assert {type(verdict) for verdict in verdicts} <= {Delivered, Duplicate, Retry}
    check(postgres_database, len(everything) + 1)


def test_what_was_kept_out_is_counted_when_it_is_wanted_and_never_twice(postgres_database: str, opened: Opened) -> None:
    store = opened(postgres_database)
    batch = records(10)
    assert put(store, batch, counted=False) == Delivered()
    with closing(PostgresReader(postgres_database)) as reader:
        assert reader.usage() == []
        assert put(store, batch[:4]) == Delivered(), "as after a redrive"
        assert put(store, batch) == Delivered()
        assert put(store, batch) == Duplicate()
        assert put(store, batch, counted=False) == Duplicate()
        assert reader.usage()[0].records == 10
    check(postgres_database, 10)


def test_batches_go_through_a_pooler_whoever_has_which_connection(postgres_database: str, opened: Opened) -> None:
    with pgbouncer(postgres_database) as between:
        stores = [opened(between, name) for name in ("one", "two", "three", "four")]
        for turn in range(3):
            for number, store in enumerate(stores):
                assert put(store, calls(number, 20, start=1 + 20 * turn)) == Delivered()
        assert put(stores[0], [*calls(1, 60), *calls(4, 1)]) == Delivered(), "nearly all are there already"
        for store in stores:
            store.close()
    check(postgres_database, 4 * 60 + 1)


def test_sums_that_are_ready_are_used_and_those_of_a_part_are_worked_out(
    postgres_database: str, opened: Opened
) -> None:
    store = opened(postgres_database)
    batch = records(20)
    asked: list[int] = []

    def counting(lines: Sequence[bytes]) -> BatchSums:
        asked.append(len(lines))
        return again(lines)

    assert store.write(lines_of(batch[:10]), [again([r.json for r in batch[:10]])], counting) == Delivered()
    assert asked == []
    assert store.write(lines_of(batch), [again([r.json for r in batch])], counting) == Delivered()
    assert asked == [10], "of those that are new alone"
    check(postgres_database, 20)


def test_a_day_and_a_lane_follow_from_the_record_alone(postgres_database: str, opened: Opened) -> None:
    store = opened(postgres_database)
    names = [str(uuid4()), str(uuid4()), "0fffffff-ffff-7fff-8000-000000000001", "no uuid at all \0"]
    *odd, far, text = lines_of([record(number, id=name) for number, name in enumerate(names, 1)])
    assert {line.day for line in (*odd, far, text)} == {NO_TIME}
    assert store.write([*odd, far, text], None, again) == Delivered()
    assert store.write([text, far], None, again) == Duplicate()
    assert str(date_of(day_of(UUID("019aa4a0-0000-7000-8000-000000000001").bytes))) == "2025-11-21"
    nobody = record(5, subscriber=None)
    put(store, [nobody, *calls(1, 30)])
    told = sql(postgres_database, "SELECT id, lane, subscriber FROM metering.records WHERE day <> '1970-01-01'")
    for row in told.splitlines():
        id_, lane, subscriber = row.split("|")
        assert int(lane) == lane_of(id_ if subscriber == "None" else subscriber)


def test_lines_are_read_as_they_are_written() -> None:
    for one in odd_records():
        line = line_of(one.json)
        assert line is not None
        assert (line.id, line.seq) == (UUID(one.id).bytes, one.seq)
        assert line.origin == copied_texts(one.instance, None if one.subscriber is None else one.subscriber.id)
    assert line_of(b"no record") is None
    assert line_of(b'{"id":"x","seq":"y"}') is None
    nul = line_of(record(1, subscriber=Subscriber("a\0b", "jwt:sub")).json)
    assert nul is not None
    assert nul.origin == copied_texts("instance-1", "a\N{REPLACEMENT CHARACTER}b")
    beyond = record(1).json.replace(b'"seq":1,', b'"seq":9223372036854775808,')
    assert line_of(beyond) is None, "no number that the ledger has room for"


# Faults


def test_a_server_that_is_away_is_waited_for_and_gone_on_with(
    killable_postgres: PostgresServer, opened: Opened
) -> None:
    url = killable_postgres.database()
    store = opened(url)
    assert put(store, records(5)) == Delivered()
    killable_postgres.kill()
    first, second = put(store, records(10)), put(store, records(10))
    assert {type(first), type(second)} == {Retry}
    killable_postgres.start()
    verdict = put(store, records(10))
    if isinstance(verdict, Retry):  # it recovers still
        verdict = put(store, records(10))
    assert verdict == Delivered()
    check(url, 10)


def test_a_server_that_is_killed_before_any_statement_keeps_totals_and_records_alike(
    killable_postgres: PostgresServer, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = killable_postgres.database()
    store, batches = opened(url), [calls(1, 10, start=1 + 10 * n) for n in range(2)]
    assert put(store, batches[0]) == Delivered()
    said: list[str] = []
    left = [0]

    def kill(statement: str) -> None:
        said.append(statement)
        left[0] -= 1
        if left[0] == 0:
            killable_postgres.kill()

    before_statements(kill, monkeypatch.setattr)
    assert put(store, batches[1]) == Delivered()
    assert said[0].startswith("BEGIN")
    assert said[-1].startswith("COMMIT")
    steps = len(said)
    assert steps >= 5
    batches += [calls(1, 10, start=1 + 10 * n) for n in range(2, 1 + steps)]
    for at, batch in enumerate(batches[2:], 2):
        left[0] = at
        assert isinstance(put(store, batch), Retry), said[-1]
        killable_postgres.start()
        while isinstance(put(store, batch), Retry):  # it recovers still
            pass
    check(url, 10 * len(batches))


def test_a_commit_that_is_not_answered_is_found_when_it_comes_again(
    postgres_database: str, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = postgres_database
    store, batch = opened(url), calls(1, 10)
    real: Any = Postgres.transaction

    @asynccontextmanager
    async def lost(self: Postgres, **more: Any) -> AsyncIterator[Any]:
        async with real(self, **more) as connection:
            yield connection
        if not more:
            raise PostgresError("the connection was lost", Fault.LOST)

    assert put(store, batch[:5]) == Delivered()
    monkeypatch.setattr(Postgres, "transaction", lost)
    assert put(store, batch) == Retry("connection_lost")
    monkeypatch.undo()
    assert put(store, batch) == Duplicate()
    check(url, 10)


def test_each_fault_is_a_verdict_with_its_reason(postgres_server: PostgresServer, opened: Opened) -> None:
    url = postgres_server.database()
    store, batch = opened(url), records(3)
    assert put(store, batch[:1]) == Delivered()
    name = url.rpartition("/")[2]

    def as_(fault: str, mend: str, where: str = name) -> Verdict:
        postgres_server.sql(fault, where)
        broken = opened(url)  # as after a restart
        verdict = put(broken, batch)
        postgres_server.sql(mend, where)
        broken.close()
        return verdict

    read_only = f"ALTER DATABASE {name} SET default_transaction_read_only = on"
    writable = f"ALTER DATABASE {name} RESET default_transaction_read_only"
    assert as_(read_only, writable, "postgres") == Retry("read_only")
    raising = (
        "CREATE FUNCTION public.fails() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN RAISE EXCEPTION 'full' USING ERRCODE = '{}'; END $$;"
        "CREATE TRIGGER fails BEFORE INSERT ON metering.hourly EXECUTE FUNCTION public.fails()"
    )
    mended = "DROP TRIGGER fails ON metering.hourly; DROP FUNCTION public.fails()"
    assert as_(raising.format("53100"), mended) == Retry("disk_full")
    assert as_(raising.format("53300"), mended) == Retry("busy")
    assert as_(raising.format("40P01"), mended) == Retry("busy")
    assert as_(raising.format("22021"), mended) == Refused("not_storable")
    newer = "UPDATE metering.migrations SET version = 999 WHERE part = 'ledger'"
    older = f"UPDATE metering.migrations SET version = {len(STEPS)} WHERE part = '{PART}'"
    assert as_(newer, older) == Blocked("newer_version")
    assert put(opened(f"{url}_gone"), batch) == Blocked("no_database")
    foreign = postgres_server.database()
    postgres_server.sql("CREATE SCHEMA metering; CREATE TABLE metering.theirs (id int)", foreign.rpartition("/")[2])
    assert put(opened(foreign, "three"), batch) == Blocked("other_program")
    postgres_server.sql("CREATE ROLE nobody_at_all NOLOGIN; CREATE ROLE crowded LOGIN CONNECTION LIMIT 0")
    assert put(opened(url.replace("tester", "nobody_at_all")), batch) == Blocked("wrong_password")
    assert put(opened(url.replace("tester", "crowded")), batch) == Retry("busy")
    postgres_server.sql("CREATE ROLE stranger LOGIN")
    assert put(opened(url.replace("tester", "stranger")), batch) == Blocked("not_permitted")
    assert put(opened("postgresql://tester@127.0.0.1:1/x"), batch) == Retry("unreachable")
    assert put(opened(url), batch) == Delivered(), "and nothing of all that was counted"
    check(url, 3)


def test_a_reason_is_logged_once_and_holds_no_password(
    opened: Opened, caplog: pytest.LogCaptureFixture, postgres_database: str
) -> None:
    store = opened("postgresql://somebody:s3cret@127.0.0.1:1/billing")
    for _ in range(3):
        assert put(store, records(1)) == Retry("unreachable")
    said = [one.getMessage() for one in caplog.records if "shared ledger" in one.getMessage()]
    assert len(said) == 1
    assert "127.0.0.1:1/billing cannot be reached" in said[0]
    assert "s3cret" not in caplog.text
    assert "somebody" not in caplog.text


async def test_what_would_take_no_records_is_said_beforehand(
    postgres_server: PostgresServer, opened: Opened, tmp_path: Path
) -> None:
    url = postgres_server.database()
    store = opened(url)
    assert store.look() is None
    assert sql(url, "SELECT 1 FROM pg_tables WHERE schemaname = 'metering'") == "", "nothing is made by looking"
    assert put(store, records(1)) == Delivered()
    assert store.look() is None
    assert "there is no such database" in (opened(f"{url}_gone").look() or "")
    environ = {"SIDECAR_DATA_DIR": str(tmp_path / "d"), "SIDECAR_UPSTREAM_URL": "http://127.0.0.1:1"}
    for address, result in ((url, "reached"), (f"{url}_gone", "failed")):
        settings = load({**environ, "SIDECAR_LEDGER_URL": address}, backend_settings=known_backend_settings())
        (tried,) = [one for one in await try_everything(settings) if one.what == "ledger"]
        assert tried.result == result, tried
    assert not (tmp_path / "d" / "ledger.db").exists()


def test_a_reader_says_why_it_cannot_answer(postgres_database: str) -> None:
    with closing(PostgresReader(postgres_database)) as reader, pytest.raises(PostgresError, match="no tables"):
        reader.usage()
    with closing(PostgresReader("postgresql://x@127.0.0.1:1/y")) as reader:
        with pytest.raises(PostgresError, match="cannot be reached"):
            reader.usage()


# Who writes


def test_a_restart_is_known_again_and_a_copy_is_refused_by_name(
    postgres_database: str, opened: Opened, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    original, copy = tmp_path / "original", tmp_path / "copy"
    first = opened(postgres_database, "edge-1", original)
    assert put(first, calls(1, 3)) == Delivered()
    first.close()
    shutil.copytree(original, copy)
    again_ = opened(postgres_database, "edge-1", original)
    assert put(again_, calls(1, 6)) == Delivered(), "a restart"
    other = opened(postgres_database, "edge-1", copy)
    assert put(other, calls(2, 3)) == Blocked("copied_directory")
    assert "as edge-1" in caplog.text
    assert "adopt --as" in caplog.text
    assert put(again_, calls(1, 9)) == Delivered(), "who was there goes on"
    other.close()
    # Somebody decides that the copy is another one.
    Identity(copy, "edge-1").become_new()
    assert put(opened(postgres_database, "edge-2", copy), calls(2, 3)) == Delivered()
    check(postgres_database, 12)


def test_of_two_that_run_the_last_to_start_goes_on_and_it_can_be_taken_back(
    postgres_database: str, opened: Opened, tmp_path: Path
) -> None:
    original, copy = tmp_path / "original", tmp_path / "copy"
    first = opened(postgres_database, "edge-1", original)
    assert put(first, calls(1, 3)) == Delivered()
    shutil.copytree(original, copy)  # while it runs: the copy knows the nonce that is in force
    second = opened(postgres_database, "edge-1", copy)
    assert put(second, calls(2, 3)) == Delivered()
    assert put(first, calls(1, 6)) == Blocked("copied_directory")
    assert first.report(Reported()) == Blocked("copied_directory")
    first.close()
    Identity(original, "edge-1").take_over()
    assert put(opened(postgres_database, "edge-1", original), calls(1, 6)) == Delivered()
    assert put(second, calls(2, 6)) == Blocked("copied_directory")
    check(postgres_database, 9)


def test_a_start_that_died_after_the_commit_is_no_copy(postgres_database: str, opened: Opened, tmp_path: Path) -> None:
    directory = tmp_path / "d"
    first = opened(postgres_database, "edge-1", directory)
    assert put(first, calls(1, 1)) == Delivered()
    first.close()
    dying = Identity(directory, "edge-1")
    dying.begin()  # sent and committed; and then it died
    sql(postgres_database, f"UPDATE metering.instances SET nonce = '{dying.nonce}' WHERE instance = 'edge-1'")
    assert put(opened(postgres_database, "edge-1", directory), calls(1, 2)) == Delivered()


def test_a_server_that_hangs_does_not_hold_up_the_end(killable_postgres: PostgresServer, opened: Opened) -> None:
    store = opened(killable_postgres.database())
    assert put(store, calls(1, 1)) == Delivered()
    hanging = children(killable_postgres.pid)
    for pid in hanging:
        suspend(pid)
    try:
        with ThreadPoolExecutor() as pool:
            written = pool.submit(put, store, calls(1, 2))
            while not store._lock.locked():
                time.sleep(0.001)
            began_s = time.monotonic()
            store.close()
            assert time.monotonic() - began_s < COMMAND_S / 2, "it was not waited for until its time limit"
            assert isinstance(written.result(), Retry)
    finally:
        for pid in hanging:
            os.kill(pid, signal.SIGCONT)


def test_an_id_is_made_once_and_stays(tmp_path: Path) -> None:
    assert Identity(tmp_path).name == ""
    at_once = [Identity(tmp_path) for _ in range(8)]  # the ledger and the limits of a process, before either has begun
    with ThreadPoolExecutor() as pool:
        (name,) = set(pool.map(Identity.ensure, at_once))
    assert Identity(tmp_path).ensure() == Identity(tmp_path).name == name != ""
    assert Identity(tmp_path, "edge-1").name == "edge-1"
    assert (tmp_path / "instance").stat().st_mode & 0o777 == 0o600
    (tmp_path / "instance").write_text("torn")
    assert Identity(tmp_path).ensure() != name


def test_what_an_instance_says_of_itself_is_told(postgres_database: str, opened: Opened) -> None:
    store = opened(postgres_database, "edge-1")
    put(store, calls(1, 3))
    put(opened(postgres_database, "edge-2"), calls(2, 2))
    assert store.report(Reported(oldest_pending_s=1.0, balance={"admitted": 3})) == Delivered()
    with closing(PostgresReader(postgres_database)) as reader:
        one, two = reader.instances()
        assert (one.instance, one.records, one.last_seq, one.balance) == ("edge-1", 3, 3, {"admitted": 3})
        assert one.oldest_pending_s is not None
        assert one.oldest_pending_s > 3600
        assert (two.instance, two.records, two.oldest_pending_s, two.balance) == ("edge-2", 2, None, None)
        assert [(row.group, row.calls) for row in reader.usage(["instance"])] == [(("edge-1",), 3), (("edge-2",), 2)]
        assert [row.calls for row in reader.usage([], where={"instance": ["edge-2"]})] == [2]


def test_records_are_found_by_id_and_by_time(postgres_database: str, opened: Opened) -> None:
    store = opened(postgres_database, "edge-1")
    batch = calls(1, 1200)
    put(store, batch)
    with closing(PostgresReader(postgres_database)) as reader:
        assert reader.record(batch[7].id) == ("edge-1", batch[7].json)
        assert reader.record("0199aaaa-0000-7000-8999-000000000001") is None
        assert [line for _, line in reader.records()] == [one.json for one in reversed(batch)]
        assert [line for _, line in reader.records(backwards=False)] == [one.json for one in batch]
