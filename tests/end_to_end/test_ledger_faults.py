"""A database that is not as it should be, under a sidecar that runs: calls go on, one line says why wherever somebody
looks (`/readyz`, the log, the metrics, `check --connect`), and when it is mended all records are in, once."""

from __future__ import annotations

import asyncio
import secrets
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import aiohttp
import pytest
from support.backend_fixtures import record
from support.ledgers import again
from support.pgbouncer import pgbouncer
from support.postgres_server import PostgresServer
from support.small_disk import fill_up, small_disk
from support.tiny import tiny_upstream

from sidecar.cli.connect import try_everything
from sidecar.cli.shared import known_backend_settings
from sidecar.delivery.limits import Limits
from sidecar.ledger.identity import Identity
from sidecar.ledger.postgres_queries import PostgresReader
from sidecar.ledger.postgres_schema import STEPS, line_of
from sidecar.ledger.postgres_store import PostgresStore
from sidecar.model.delivery import Delivered, Duplicate
from sidecar.runtime.app import Running, running
from sidecar.settings import Settings, load

pytestmark = pytest.mark.timeout(120)
PASSWORD = "hunter2-hunter2"


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend that takes nothing is tried every few seconds; a test has no time for that."""
    limits = partial(Limits, probe_soon_s=0.3, blocked_base_s=0.3, blocked_cap_s=0.3, backoff_base_s=0.2)
    monkeypatch.setattr("sidecar.delivery.service.Limits", limits)


@dataclass
class Place:
    """A database and a user of its own on the server of all tests, who is nobody special there."""

    server: PostgresServer
    options: str = ""
    name: str = field(default_factory=lambda: f"f_{secrets.token_hex(6)}")
    user: str = field(default_factory=lambda: f"somebody_{secrets.token_hex(6)}")

    def __post_init__(self) -> None:
        self.server.sql(f"CREATE ROLE {self.user} LOGIN PASSWORD '{PASSWORD}'")
        self.server.sql(f"CREATE DATABASE {self.name} OWNER {self.user} {self.options}")

    @property
    def url(self) -> str:
        return f"postgresql://{self.user}:{PASSWORD}@127.0.0.1:{self.server.port}/{self.name}"

    def sql(self, statements: str) -> str:
        return self.server.sql(statements, self.name)

    def admin(self, statements: str) -> None:
        """By the superuser, from another database; whoever is connected is thrown out."""
        for statement in statements.split(";"):
            self.server.sql(statement)
        self.thrown_out()

    def thrown_out(self) -> None:
        gone = "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE usename = "
        self.server.sql(f"{gone}'{self.user}'")

    def asks_for_password(self) -> None:
        """In this database alone; all others trust whoever comes."""
        hba = self.server.directory / "data" / "pg_hba.conf"
        hba.write_text(f"host {self.name} {self.user} 127.0.0.1/32 scram-sha-256\n{hba.read_text()}")
        self.server.sql("SELECT pg_reload_conf()")


class Fault(NamedTuple):
    broken: Callable[[Place], object]
    mended: Callable[[Place], object]
    word: str  # in `/readyz` and the metrics
    says: str  # in the log and by `check --connect`
    blocks: bool = True  # until somebody acts; else it may pass
    at_start: bool = False  # found out then, and after any other fault


def _admin(statements: str) -> Callable[[Place], None]:
    return lambda place: place.admin(statements.format(name=place.name, user=place.user))


def _sql(statements: str) -> Callable[[Place], None]:
    def run(place: Place) -> None:
        place.sql(statements.format(name=place.name, user=place.user))
        place.thrown_out()

    return run


FAULTS = {
    "another password": Fault(
        _admin("ALTER ROLE {user} PASSWORD 'another'"), _admin(f"ALTER ROLE {{user}} PASSWORD '{PASSWORD}'"),
        "wrong_password", "refuses the user or the password of the URL",
    ),
    "no database": Fault(
        _admin("ALTER DATABASE {name} ALLOW_CONNECTIONS false;"
               "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = '{name}';"
               "ALTER DATABASE {name} RENAME TO {name}_gone"),
        _admin("ALTER DATABASE {name}_gone RENAME TO {name};ALTER DATABASE {name} ALLOW_CONNECTIONS true"),
        "no_database", "there is no such database; make it, or correct the URL",
    ),
    "another program's": Fault(
        _sql("ALTER SCHEMA metering RENAME TO ours; CREATE SCHEMA metering AUTHORIZATION {user}; "
             "CREATE TABLE metering.gas_meters (n int)"),
        _sql("DROP SCHEMA metering CASCADE; ALTER SCHEMA ours RENAME TO metering"),
        "other_program", "is another program's: name another database", at_start=True,
    ),
    "newer version": Fault(
        _sql("UPDATE metering.migrations SET version = version + 900 WHERE part = 'ledger'"),
        _sql("UPDATE metering.migrations SET version = version - 900 WHERE part = 'ledger'"),
        "newer_version",
        f"of a newer version ({len(STEPS) + 900}, known are {len(STEPS)}): install the version of the other sidecars",
        at_start=True,
    ),
    "not permitted": Fault(
        _sql("ALTER SCHEMA metering OWNER TO tester; REVOKE ALL ON SCHEMA metering FROM {user}"),
        _sql("ALTER SCHEMA metering OWNER TO {user}"),
        "not_permitted", "the user may not do that; GRANT CREATE ON DATABASE, or let its owner start once",
    ),
    "read-only": Fault(
        _admin("ALTER DATABASE {name} SET default_transaction_read_only = on"),
        _admin("ALTER DATABASE {name} RESET default_transaction_read_only"),
        "read_only", "is read-only: name the primary, or set target_session_attrs=read-write", blocks=False,
    ),
    "no connection left": Fault(
        _admin("ALTER ROLE {user} CONNECTION LIMIT 0"), _admin("ALTER ROLE {user} CONNECTION LIMIT -1"),
        "busy", "has no connection or memory left", blocks=False,
    ),
}  # fmt: skip


@asynccontextmanager
async def sidecar(tmp_path: Path, url: str) -> AsyncIterator[tuple[Running, Settings]]:
    async with tiny_upstream() as upstream:
        env = {
            "SIDECAR_UPSTREAM_URL": upstream,
            "SIDECAR_DATA_DIR": str(tmp_path / "data"),
            "SIDECAR_LISTEN": "127.0.0.1:0",
            "SIDECAR_ADMIN_LISTEN": "127.0.0.1:0",
            "SIDECAR_BACKENDS": "ledger",
            "SIDECAR_LEDGER_URL": url,
        }
        settings = load(env, backend_settings=known_backend_settings())
        async with running(settings) as one:
            yield one, settings


async def call(one: Running, count: int) -> None:
    async with aiohttp.ClientSession() as session:
        for _ in range(count):
            async with session.post(f"{one.proxy_url}/v1/things", json={}) as answer:
                assert answer.status == 200
                await answer.read()


async def delivered(one: Running, count: int) -> None:
    async with asyncio.timeout(40):
        while True:
            found = (await one.metering.balance()).backends.get("ledger")
            if found is not None and found.delivered + found.duplicate == count and not found.pending:
                return
            await asyncio.sleep(0.02)


async def page(one: Running, path: str) -> str:
    async with aiohttp.ClientSession() as session, session.get(one.admin_url + path) as answer:
        return await answer.text()


async def note(one: Running, word: str) -> None:
    """Until `/readyz` says this of the ledger."""
    said = ""
    try:
        async with asyncio.timeout(30):
            while f": {word}" not in said:
                said = await page(one, "/readyz")
                await asyncio.sleep(0.02)
    except TimeoutError:
        raise AssertionError(f"{word} is not in {said}") from None


def counted(url: str) -> int:
    """Records in the ledger; its sums say the same."""
    with closing(PostgresReader(url)) as reader:
        (count, also), *others = reader.counted().values()
        assert not others
        assert count == also == sum(row.records for row in reader.usage(["instance"]))
        return int(count)


async def test_a_fault_of_the_database_is_said_everywhere_and_ends_by_itself(
    tmp_path: Path, postgres_server: PostgresServer, caplog: pytest.LogCaptureFixture
) -> None:
    place = Place(postgres_server)
    place.asks_for_password()
    at_start = [fault for fault in FAULTS.values() if fault.at_start]
    async with sidecar(tmp_path, place.url) as (one, settings):
        await call(one, 2)
        await delivered(one, 2)
        for number, fault in enumerate(one_ for one_ in FAULTS.values() if not one_.at_start):
            await asyncio.to_thread(fault.broken, place)
            await said_and_mended(one, settings, fault, place, 2 + 5 * number)
    for number, fault in enumerate(at_start, len(FAULTS) - len(at_start)):
        await asyncio.to_thread(fault.broken, place)
        async with sidecar(tmp_path, place.url) as (one, settings):
            await said_and_mended(one, settings, fault, place, 2 + 5 * number)
    said = [entry.getMessage() for entry in caplog.records if "the shared ledger takes nothing" in entry.getMessage()]
    assert not any("\n" in line for line in said)
    for name, fault in FAULTS.items():
        assert any(fault.says in line for line in said), name
    assert counted(place.url) == 2 + 5 * len(FAULTS)
    assert PASSWORD not in caplog.text
    assert place.user not in caplog.text


async def said_and_mended(one: Running, settings: Settings, fault: Fault, place: Place, before: int) -> None:
    """`before`: how many records are in the ledger."""
    await call(one, 3)
    await note(one, fault.word)
    (tried,) = [found for found in await try_everything(settings) if found.what == "ledger"]
    assert tried.result == "failed", fault
    assert fault.says in tried.detail
    assert "\n" not in tried.detail
    metrics = await page(one, "/metrics")
    assert f'sidecar_blocked{{backend="ledger"}} {int(fault.blocks)}' in metrics, fault
    assert f'sidecar_send_failures_total{{backend="ledger",reason="{fault.word}"}}' in metrics
    await call(one, 2)
    await asyncio.to_thread(fault.mended, place)
    await delivered(one, before + 5)
    assert "ledger is " not in await page(one, "/readyz")


async def test_a_disk_that_is_full_holds_records_in_the_spool(
    tmp_path: Path, postgres_server: PostgresServer, caplog: pytest.LogCaptureFixture
) -> None:
    """A real one: the records' tables are on a small disk of their own."""
    directory = Path(tempfile.mkdtemp(prefix="tablespace-"))
    try:
        with small_disk(directory / "disk", "24m") as disk:
            (disk / "space").mkdir()
            directory.chmod(0o755)
            shutil.chown(disk / "space", postgres_server.owner)
            space = f"small_{secrets.token_hex(4)}"
            postgres_server.sql(f"CREATE TABLESPACE {space} LOCATION '{disk}/space'")
            place = Place(postgres_server, f"TABLESPACE {space}")
            async with sidecar(tmp_path, place.url) as (one, _):
                await call(one, 2)
                await delivered(one, 2)
                filler = fill_up(disk)
                async with asyncio.timeout(30):
                    while ": disk_full" not in await page(one, "/readyz"):
                        await call(one, 20)  # until what they need is more than was left in the pages that are there
                assert (await page(one, "/healthz")).strip()
                recorded = (await one.metering.balance()).recorded
                filler.unlink()
                await delivered(one, recorded)
            assert counted(place.url) == recorded
            assert "has no room on its disk" in caplog.text
            place.thrown_out()
            postgres_server.sql(f"DROP DATABASE {place.name}")
            postgres_server.sql(f"DROP TABLESPACE {space}")
    finally:
        shutil.rmtree(directory, ignore_errors=True)


async def test_records_wait_before_a_standby_until_it_is_the_primary(
    tmp_path: Path, postgres_server: PostgresServer, caplog: pytest.LogCaptureFixture
) -> None:
    """A real one, that follows; then the primary is given up, and the standby promoted."""
    place = Place(postgres_server)
    with postgres_server.standby() as standby:
        url = place.url.replace(f":{postgres_server.port}/", f":{standby.port}/")
        async with sidecar(tmp_path, url) as (one, settings):
            await call(one, 3)
            await note(one, "read_only")
            assert "is read-only: name the primary, or set target_session_attrs=read-write" in caplog.text
            (tried,) = [found for found in await try_everything(settings) if found.what == "ledger"]
            assert (tried.result, tried.detail) == (
                "failed",
                f"127.0.0.1:{standby.port}/{place.name} is a standby, which takes no records: name the primary",
            )
            await asyncio.to_thread(standby.sql, "SELECT pg_promote()")
            await delivered(one, 3)
        assert counted(url) == 3


async def test_pgbouncer_that_takes_no_more_is_said(
    tmp_path: Path, postgres_server: PostgresServer, caplog: pytest.LogCaptureFixture
) -> None:
    asyncpg = pytest.importorskip("asyncpg")
    place = Place(postgres_server)
    with pgbouncer(place.url, max_client_conn=1) as url:
        taken = await asyncpg.connect(url, statement_cache_size=0)
        async with sidecar(tmp_path, url) as (one, settings):
            await call(one, 3)
            await note(one, "busy")
            (tried,) = [found for found in await try_everything(settings) if found.what == "ledger"]
            assert tried.result == "failed"
            assert "has no connection or memory left" in tried.detail
            assert "has no connection or memory left" in caplog.text
            await taken.close()
            await delivered(one, 3)
    assert counted(place.url) == 3


@pytest.mark.parametrize("day", ["0100", "7fff"])
async def test_a_clock_that_is_off_counts_each_record_once(day: str, tmp_path: Path, postgres_database: str) -> None:
    """In the year 2004 or 6429, say the ids: a record of such a day is one like any other, and a repeat is known."""
    batch = [record(n, id=f"{day}aaaa-0000-7000-8000-{n:012d}") for n in range(1, 4)]
    lines = [line for one in batch if (line := line_of(one.json)) is not None]
    (tmp_path / "d").mkdir()
    with closing(PostgresStore(postgres_database, Identity(tmp_path / "d", "one"))) as store:
        assert await asyncio.to_thread(store.write, lines[:2], None, again) == Delivered()
        assert await asyncio.to_thread(store.write, lines, None, again) == Delivered()
        assert await asyncio.to_thread(store.write, lines, None, again) == Duplicate()
    assert counted(postgres_database) == 3
