"""The one way to PostgreSQL: steps that happen once, and faults in words, against a real server."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trustme
from support.postgres_server import PostgresServer

from sidecar.model.grammar import Unfit
from sidecar.settings.types import Kind, postgres_url
from sidecar.storage.postgres import Fault, Postgres, PostgresError, described

pytestmark = pytest.mark.each_postgres

STEPS = [
    "CREATE TABLE metering.first (n int PRIMARY KEY)",
    "CREATE TABLE metering.second (n int); INSERT INTO metering.first VALUES (1)",
]


@pytest.fixture
async def database(postgres_database: str) -> AsyncIterator[Postgres]:
    one = Postgres(postgres_database, name="test")
    yield one
    await one.close()


async def refusal(url: str) -> PostgresError:
    one = Postgres(url, name="test")
    try:
        with pytest.raises(PostgresError) as caught:
            await one.migrate("part", STEPS)
    finally:
        await one.close()
    text = str(caught.value)
    assert "\n" not in text
    assert "s3cret" not in text
    assert "somebody" not in text
    return caught.value


def test_the_server_is_the_one_that_was_asked_for(
    postgres_server: PostgresServer, request: pytest.FixtureRequest
) -> None:
    version = postgres_server.sql("SHOW server_version_num")
    assert (version[:2] == "15") == ("debian-15" in request.node.name)
    assert int(version) >= 150_000


async def test_what_is_done_in_a_transaction_is_there_or_not(database: Postgres) -> None:
    await database.migrate("part", STEPS[:1])
    with pytest.raises(ZeroDivisionError):
        async with database.transaction() as db:
            await db.execute("INSERT INTO metering.first VALUES ($1)", 7)
            raise ZeroDivisionError
    async with database.transaction() as db:
        assert await db.fetchval("SELECT count(*) FROM metering.first") == 0


async def test_each_step_is_done_once_whoever_comes_first(postgres_database: str) -> None:
    several = [Postgres(postgres_database, name=f"test {n}") for n in range(5)]
    try:
        await asyncio.gather(*(one.migrate("part", STEPS) for one in several))
        await several[0].migrate("part", STEPS)
        async with several[1].transaction(read_only=True) as db:
            assert await db.fetchval("SELECT count(*) FROM metering.first") == 1
    finally:
        for one in several:
            await one.close()


async def test_a_version_goes_on_from_the_one_before(database: Postgres) -> None:
    await database.migrate("part", STEPS[:1])
    with pytest.raises(PostgresError, match="no tables for this version yet") as caught:
        await database.require("part", STEPS)
    assert caught.value.fault is Fault.MISSING
    await database.migrate("part", STEPS)
    await database.require("part", STEPS)


async def test_a_newer_version_is_refused_and_left_as_it_is(database: Postgres) -> None:
    await database.migrate("part", STEPS)
    for ask in (database.migrate, database.require):
        with pytest.raises(PostgresError, match=r"newer version \(2, known are 1\)") as caught:
            await ask("part", STEPS[:1])
        assert caught.value.fault is Fault.NEWER
        assert not caught.value.passes
    await database.migrate("part", STEPS)


async def test_a_step_that_fails_leaves_the_version_before(database: Postgres) -> None:
    await database.migrate("part", STEPS[:1])
    with pytest.raises(PostgresError, match="failed a statement") as caught:
        await database.migrate("part", [STEPS[0], "CREATE TABLE metering.third (n int); SELECT 1/0"])
    assert caught.value.fault is Fault.FAILED
    async with database.transaction() as db:
        assert await db.fetchval("SELECT to_regclass('metering.third')") is None
    await database.migrate("part", STEPS)


async def test_a_schema_of_somebody_else_is_refused(database: Postgres) -> None:
    async with database.transaction() as db:
        await db.execute("CREATE SCHEMA metering; CREATE TABLE metering.gas_meters (n int)")
    with pytest.raises(PostgresError, match="another program's: name another database") as caught:
        await database.migrate("part", STEPS)
    assert caught.value.fault is Fault.FOREIGN


async def test_a_database_that_cannot_hold_every_text_is_refused(postgres_server: PostgresServer) -> None:
    postgres_server.sql("CREATE DATABASE narrow TEMPLATE template0 ENCODING 'LATIN1' LC_COLLATE 'C' LC_CTYPE 'C'")
    found = await refusal(postgres_server.url("narrow"))
    assert (found.fault, found.passes) == (Fault.ENCODING, False)
    assert "keeps texts in LATIN1, which lacks most scripts: make one" in str(found)
    assert "\n" not in str(found)


async def test_who_may_not_make_tables_is_told_so(postgres_server: PostgresServer) -> None:
    url = postgres_server.database()
    postgres_server.sql("DO $$ BEGIN CREATE ROLE somebody LOGIN; EXCEPTION WHEN duplicate_object THEN NULL; END $$")
    found = await refusal(url.replace("tester@", "somebody:s3cret@"))
    assert (found.fault, found.passes) == (Fault.DENIED, False)
    assert "GRANT CREATE ON DATABASE" in str(found)


async def test_a_standby_is_waited_for(postgres_server: PostgresServer) -> None:
    url = postgres_server.database()
    name = url.rpartition("/")[2]
    postgres_server.sql(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
    found = await refusal(url)
    assert (found.fault, found.passes) == (Fault.READ_ONLY, True)


async def test_a_database_that_is_not_there(postgres_server: PostgresServer) -> None:
    found = await refusal(postgres_server.url("nothing_like_it"))
    assert (found.fault, found.passes) == (Fault.MISSING, False)


async def test_a_server_that_is_not_there() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        found = await refusal(f"postgresql://somebody:s3cret@127.0.0.1:{port}/billing")
    assert (found.fault, found.passes) == (Fault.UNREACHABLE, True)
    assert f"127.0.0.1:{port}/billing" in str(found)


async def test_a_name_that_is_no_host() -> None:
    found = await refusal("postgresql://somebody:s3cret@nowhere.invalid/billing")
    assert (found.fault, found.passes) == (Fault.UNREACHABLE, True)


async def test_tls_where_there_is_none(postgres_server: PostgresServer) -> None:
    found = await refusal(postgres_server.database() + "?sslmode=require")
    assert (found.fault, found.passes) == (Fault.TLS, False)


async def test_no_connection_left(postgres_server: PostgresServer) -> None:
    url = postgres_server.database()
    name = url.rpartition("/")[2]
    postgres_server.sql("DO $$ BEGIN CREATE ROLE somebody LOGIN; EXCEPTION WHEN duplicate_object THEN NULL; END $$")
    postgres_server.sql(f"ALTER DATABASE {name} CONNECTION LIMIT 0")
    found = await refusal(url.replace("tester@", "somebody:s3cret@"))
    assert (found.fault, found.passes) == (Fault.BUSY, True)


async def test_a_connection_that_the_server_ends_is_made_anew(
    database: Postgres, postgres_server: PostgresServer
) -> None:
    async with database.transaction() as db:
        one = await db.fetchval("SELECT pg_backend_pid()")
    postgres_server.sql(f"SELECT pg_terminate_backend({one}, 5000)")
    with pytest.raises(PostgresError) as caught:
        for _ in range(3):  # the driver may see the end only when it asks
            async with database.transaction() as db:
                assert await db.fetchval("SELECT pg_backend_pid()") != one
            raise PostgresError("it was seen in time", Fault.LOST)
    assert caught.value.fault is Fault.LOST
    async with database.transaction() as db:
        assert await db.fetchval("SELECT 1") == 1


async def test_a_server_that_is_killed_and_comes_back(killable_postgres: PostgresServer) -> None:
    one = Postgres(killable_postgres.database(), name="test")
    try:
        await one.migrate("part", STEPS)
        with pytest.raises(PostgresError) as caught:
            async with one.transaction() as db:
                await db.execute("INSERT INTO metering.first VALUES (9)")
                await asyncio.to_thread(killable_postgres.kill)
        assert caught.value.fault is Fault.LOST
        with pytest.raises(PostgresError) as caught:
            await one.migrate("part", STEPS)
        assert caught.value.passes
        await asyncio.to_thread(killable_postgres.start)
        await one.migrate("part", STEPS)
        async with one.transaction(read_only=True) as db:
            assert [tuple(row) for row in await db.fetch("SELECT n FROM metering.first")] == [(1,)]
    finally:
        await one.close()


async def test_a_statement_that_hangs_is_given_up(postgres_database: str) -> None:
    one = Postgres(postgres_database, name="test", command_timeout_s=0.2)
    try:
        with pytest.raises(PostgresError) as caught:
            async with one.transaction() as db:
                await db.execute("SELECT pg_sleep(60)")
        assert caught.value.passes
        async with one.transaction() as db:
            assert await db.fetchval("SELECT 1") == 1
    finally:
        await one.close()


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://u:s3cret@db.example/billing", "db.example:5432/billing"),
        ("postgres://db.example:6432/b%20c", "db.example:6432/b c"),
        ("postgresql:///billing?host=/run/postgresql", "/run/postgresql:5432/billing"),
        ("postgresql://db.example?dbname=billing&sslmode=verify-full", "db.example:5432/billing"),
    ],
)
def test_a_url_is_shown_without_user_and_password(url: str, shown: str) -> None:
    assert postgres_url.parse(url) == url
    assert described(url) == shown


@pytest.mark.parametrize(
    "url",
    ["", "db.example", "mysql://db.example/billing", "postgresql://db.example", "postgresql:///billing",
     "postgresql://db.example:port/billing", "postgresql://db.example:99999/billing",
     "postgresql://u:a@b/c@db.example/billing", "postgresql://u:a/b@db.example/billing",
     "postgresql://u:a#b@db.example/billing", "postgresql://u:a@b?c@db.example/billing",
     "postgresql://db.example/billing?x", "postgresql://db.example/billing?sslmode=on"],
)  # fmt: skip
def test_what_is_no_url_is_refused(url: str) -> None:
    kind: Kind[str] = postgres_url
    with pytest.raises((ValueError, Unfit)):
        kind.parse(url)


async def tls_before(server: PostgresServer, context: ssl.SSLContext) -> asyncio.Server:
    """A port that speaks PostgreSQL's way into TLS, and hands on to the server, which has none in its package."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(8)  # SSLRequest
        writer.write(b"S")
        try:
            await writer.start_tls(context)
        except (OSError, ssl.SSLError):
            writer.close()
            return
        inner, outer = await asyncio.open_connection("127.0.0.1", server.port)
        await asyncio.gather(pipe(reader, outer), pipe(inner, writer))

    async def pipe(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, ssl.SSLError):
            while data := await source.read(65536):
                sink.write(data)
        sink.close()

    return await asyncio.start_server(serve, "127.0.0.1", 0)


async def test_a_certificate_is_checked_where_the_url_wants_it(postgres_server: PostgresServer, tmp_path: Path) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    trustme.CA().cert_pem.write_to_path(tmp_path / "other.pem")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    name = postgres_server.database().rpartition("/")[2]
    front = await tls_before(postgres_server, context)
    async with front:
        url = f"postgresql://tester@127.0.0.1:{front.sockets[0].getsockname()[1]}/{name}?sslmode=verify-full"
        found = await refusal(f"{url}&sslrootcert={tmp_path}/other.pem")
        assert (found.fault, found.passes) == (Fault.TLS, False)
        assert "set sslrootcert in the URL" in str(found)
        one = Postgres(f"{url}&sslrootcert={tmp_path}/ca.pem", name="test")
        async with one.transaction() as db:
            assert await db.fetchval("SELECT 1") == 1
        await one.close()
