"""`metering-sidecar collect` into the ledger in PostgreSQL, with real servers of both kinds."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from support.backend_fixtures import record, record_id
from support.collecting import CollectorHere, publish
from support.nats_server import make_stream, nats_server

pytestmark = pytest.mark.timeout(120)


async def rows(url: str) -> dict[str, bool]:
    """The ids in the ledger, and whether they are in its sums."""
    import asyncpg

    connection = await asyncpg.connect(url)
    try:
        found = await connection.fetch("SELECT id::text, counted FROM metering.records")
        return {row[0]: row[1] for row in found}
    finally:
        await connection.close()


async def calls(url: str) -> int:
    import asyncpg

    connection = await asyncpg.connect(url)
    try:
        return int(await connection.fetchval("SELECT sum(calls) FROM metering.hourly"))
    finally:
        await connection.close()


async def until_there(url: str, count: int) -> dict[str, bool]:
    import asyncpg

    found: dict[str, Any] = {}
    async with asyncio.timeout(40):
        while len(found) < count:
            await asyncio.sleep(0.05)
            try:
                found = await rows(url)
            except (asyncpg.PostgresError, OSError):
                continue
    return found


async def test_two_collectors_share_a_stream_and_each_record_is_in_the_ledger_once(
    tmp_path: Path, postgres_database: str
) -> None:
    with nats_server() as server:
        await make_stream(server.url, "S", "S.records")
        both = [
            CollectorHere(tmp_path / name, server.url, SIDECAR_LEDGER_URL=postgres_database, SIDECAR_BACKENDS="ledger")
            for name in ("one", "two")
        ]
        for one in both:
            await one.start()
        try:
            for one in both:
                await one.until("/readyz", 200)
            records = [record(n) for n in range(1, 301)]
            await publish(server.url, records)
            await publish(server.url, [b"no record", *records[:50]], ids=False)
            found = await until_there(postgres_database, 300)
            async with asyncio.timeout(30):
                while sum([await one.metric("sidecar_collected_total") for one in both]) < 351:
                    await asyncio.sleep(0.05)
            assert sum([await one.metric("sidecar_collect_aside") for one in both]) == 1
            assert [await one.metric("sidecar_collect_missed_total") for one in both] == [0, 0]
        finally:
            for one in both:
                await one.stop()
        assert found == {record_id(n): True for n in range(1, 301)}
        assert await calls(postgres_database) == 300


async def test_a_ledger_that_is_not_there_keeps_records_in_the_stream(tmp_path: Path, postgres_database: str) -> None:
    with nats_server() as server:
        await make_stream(server.url, "S", "S.records")
        await publish(server.url, [record(n) for n in range(1, 6)])
        missing = postgres_database.rpartition("/")[0] + "/not_there_at_all"
        away = CollectorHere(tmp_path / "one", server.url, SIDECAR_LEDGER_URL=missing, SIDECAR_BACKENDS="ledger")
        await away.start()
        try:
            async with asyncio.timeout(30):
                while "the ledger takes nothing just now" not in str((await away.get("/readyz"))[1]["notes"]):
                    await asyncio.sleep(0.05)
            assert (await away.get("/readyz"))[0] == 503
        finally:
            await away.stop()
        there = CollectorHere(
            tmp_path / "one", server.url, SIDECAR_LEDGER_URL=postgres_database, SIDECAR_BACKENDS="ledger"
        )
        await there.start()
        try:
            assert len(await until_there(postgres_database, 5)) == 5
        finally:
            await there.stop()
