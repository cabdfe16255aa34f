"""`config/ledger-retention.sql`: days of the shared ledger are forgotten whole, never one that somebody waits for, and
nothing of them counts twice."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack, closing
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from support.backend_fixtures import record
from support.ledgers import again
from support.postgres_server import PostgresServer

from sidecar.delivery.lane_database import make_lanes
from sidecar.ledger.identity import Identity
from sidecar.ledger.postgres_queries import PostgresReader
from sidecar.ledger.postgres_schema import line_of
from sidecar.ledger.postgres_store import PostgresStore
from sidecar.model.delivery import Delivered, Duplicate, Refused, Verdict
from sidecar.model.record import Record
from sidecar.storage.postgres import Postgres

pytestmark = pytest.mark.each_postgres
SCRIPT = Path(__file__).parent.parent.parent / "config" / "ledger-retention.sql"


def of_day(ago: int, count: int = 3) -> list[Record]:
    """Records whose ids are so many days old."""
    ms = int(datetime.combine(day(ago), datetime.min.time(), UTC).timestamp() * 1000) + 43_200_000
    head = f"{ms >> 16:08x}-{ms & 0xFFFF:04x}"
    return [record(n, id=f"{head}-7000-8000-{n:012d}") for n in range(1, count + 1)]


def day(ago: int) -> date:
    return (datetime.now(UTC) - timedelta(days=ago)).date()


class Ledger:
    def __init__(self, server: PostgresServer, directory: Path, stack: ExitStack) -> None:
        self.server, self._directory, self._stack = server, directory, stack
        self.url = server.database()
        self.name = self.url.rpartition("/")[2]
        self.store = self.opened()

    def opened(self) -> PostgresStore:
        """As after a restart."""
        store = PostgresStore(self.url, Identity(self._directory, "one"))
        self._stack.callback(store.close)
        return store

    def put(self, batch: list[Record]) -> Verdict:
        return self.store.write([line for one in batch if (line := line_of(one.json)) is not None], None, again)

    def forget(self, **variables: str) -> CompletedProcess[str]:
        return self.server.script(SCRIPT, self.name, **variables)

    def kept(self) -> dict[date, int]:
        rows = self.server.sql("SELECT day, count(*) FROM metering.records GROUP BY 1", self.name).splitlines()
        return {date.fromisoformat(row.split("|")[0]): int(row.split("|")[1]) for row in rows}

    def summed(self) -> int:
        with closing(PostgresReader(self.url)) as reader:
            return sum(row.records for row in reader.usage(["instance"]))


@pytest.fixture
def ledger(postgres_server: PostgresServer, tmp_path: Path) -> Iterator[Ledger]:
    """Three records of each of four days."""
    with ExitStack() as stack:
        found = Ledger(postgres_server, tmp_path, stack)
        for ago in (40, 35, 10, 0):
            assert found.put(of_day(ago)) == Delivered()
        yield found


def test_old_days_are_forgotten_and_what_they_add_up_to_stays(ledger: Ledger) -> None:
    done = ledger.forget(keep_days="30")
    assert done.returncode == 0, done.stderr
    assert [line.partition("NOTICE:  ")[2] for line in done.stderr.splitlines()] == [
        f"{day(40)} is forgotten",
        f"{day(35)} is forgotten",
    ]
    assert ledger.kept() == {day(10): 3, day(0): 3}
    assert ledger.summed() == 12
    assert ledger.forget(keep_days="30").stderr == "", "it is done once"
    assert ledger.put(of_day(10, 5)) == Delivered()
    assert ledger.summed() == 14


def test_a_record_of_a_forgotten_day_is_refused_and_never_counts_twice(ledger: Ledger) -> None:
    late = of_day(40)
    ledger.put(late)
    before = ledger.summed()
    assert ledger.forget(keep_days="30").returncode == 0
    for store in (ledger.store, ledger.opened()):
        ledger.store = store
        # A batch with one of them is refused whole: who sends it looks for it by halves.
        assert ledger.put([*of_day(10), *late]) == Refused("not_storable")
        assert ledger.put(late[:1]) == Refused("not_storable")
        assert ledger.put(of_day(10)) == Duplicate()
    assert ledger.summed() == before
    assert day(40) not in ledger.kept()


def test_a_day_that_a_lane_has_to_deliver_is_kept(ledger: Ledger) -> None:
    rows = ledger.server.sql(
        f"SELECT lane, max(lane_seq) FROM metering.records WHERE day = '{day(35)}' GROUP BY 1", ledger.name
    ).splitlines()
    lane, last = (int(word) for word in rows[0].split("|"))

    async def make() -> None:
        database = Postgres(ledger.url, name="test")
        await make_lanes(database, ())
        await database.close()

    asyncio.run(make())
    home = f"metering_lane_{lane:02}"
    ledger.server.sql(
        f"INSERT INTO {home}.backend (name, since_s) VALUES ('stripe', 0), ('lago', 0);"
        f"INSERT INTO {home}.backend (name, since_s, removed) VALUES ('gone', 0, 1);"
        f"INSERT INTO {home}.cursor (backend, instance, seq) VALUES ('stripe', 'lane-{lane:02}', {last}),"
        f" ('lago', 'lane-{lane:02}', {last - 1})",
        ledger.name,
    )
    done = ledger.forget(keep_days="30")
    assert f"{day(35)} is kept: lago has not been told of all of it by lane {lane:02}" in done.stderr
    assert ledger.kept()[day(35)] == 3
    ledger.server.sql(
        f"UPDATE {home}.cursor SET seq = {last} WHERE backend = 'lago';"
        f"INSERT INTO {home}.sealed (cursor, first_seq, last_seq, records, size_bytes, at_s, oldest_s, key, subject,"
        f" version, members) SELECT id, {last}, {last}, 1, 1, 0, 0, 'k', '', 1, '' FROM {home}.cursor"
        " WHERE backend = 'stripe'",
        ledger.name,
    )
    assert f"{day(35)} is kept: stripe has not been told" in ledger.forget(keep_days="30").stderr
    ledger.server.sql(f"UPDATE {home}.sealed SET settled = 1", ledger.name)
    assert f"{day(35)} is forgotten" in ledger.forget(keep_days="30").stderr


def test_a_day_is_kept_while_a_sidecar_is_behind_by_as_much(ledger: Ledger) -> None:
    ledger.server.sql(f"UPDATE metering.instances SET oldest_pending = '{day(40)} 12:00Z'", ledger.name)
    done = ledger.forget(keep_days="30")
    assert f"{day(40)} is kept: one has records as old that are not here yet" in done.stderr
    assert len(ledger.kept()) == 4
    ledger.server.sql("UPDATE metering.instances SET oldest_pending = NULL", ledger.name)
    ledger.forget(keep_days="30")
    assert len(ledger.kept()) == 2


@pytest.mark.parametrize(
    ("variables", "says"),
    [({}, "syntax error"), ({"keep_days": "0"}, "1 or more"), ({"keep_days": "x"}, "invalid input syntax for type")],
)
def test_without_a_number_of_days_nothing_is_forgotten(ledger: Ledger, variables: dict[str, str], says: str) -> None:
    done = ledger.forget(**variables)
    assert done.returncode != 0
    assert says in done.stderr
    assert len(ledger.kept()) == 4


def test_the_page_says_how() -> None:
    page = (SCRIPT.parent.parent / "docs" / "fleet.md").read_text()
    assert "-v keep_days=30 -f config/ledger-retention.sql" in page
