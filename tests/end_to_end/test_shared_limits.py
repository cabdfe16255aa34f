"""Limits that several sidecars share over a real PostgreSQL: exact near the limit, whoever dies."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from support.counted_api import LIMIT_S, call, client, upstream
from support.postgres_server import PostgresServer
from support.whole import Whole


@asynccontextmanager
async def fleet(
    directory: Path, upstream_url: str, url: str, count: int, **settings: str
) -> AsyncIterator[list[Whole]]:
    async with AsyncExitStack() as stack:
        found = []
        for number in range(count):
            whole = Whole(
                directory / f"edge-{number}",
                upstream_url,
                SIDECAR_SUBSCRIBER="header:x-tenant",
                SIDECAR_BACKENDS="ledger",
                SIDECAR_LEDGER_URL=url,
                SIDECAR_INSTANCE=f"edge-{number}",
                **settings,
            )
            found.append(await stack.enter_async_context(whole))
        for whole in found:
            await counted(whole)
        yield found


async def counted(whole: Whole) -> None:
    """Until it counts with the others: before, who calls is told what the setting for that says."""
    async with asyncio.timeout(LIMIT_S):
        while "sidecar_limits_away 0" not in await whole.text("/metrics"):
            await asyncio.sleep(0.1)


async def until(whole: Whole, limit: str, used: str, reserved: str = "0") -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    try:
        async with asyncio.timeout(LIMIT_S):
            while True:
                rows = [row for row in (await whole.get("/limits"))["limits"] if row["limit"] == limit]
                if [(row["used"], row["reserved"]) for row in rows] == [(used, reserved)]:
                    return rows[0]
                await asyncio.sleep(0.1)
    except TimeoutError:
        raise AssertionError(f"{limit} is not at {used} and {reserved}: {rows}; {whole.log.read_text()}") from None


@pytest.mark.timeout(180)
async def test_of_400_calls_over_three_sidecars_exactly_100_are_let_in_and_a_restart_changes_nothing(
    tmp_path: Path, postgres_database: str
) -> None:
    async with upstream() as (up, url), client() as session:
        settings = {"SIDECAR_LIMITS": "calls=100/day", "SIDECAR_GATE_ON_FAILURE": "closed"}
        async with fleet(tmp_path, url, postgres_database, 3, **settings) as sidecars:
            answers = await asyncio.gather(*(call(session, sidecars[n % 3]) for n in range(400)))
            statuses = [status for status, _ in answers]
            let_in = statuses.count(200)
            assert 0 < up.calls == let_in <= 100, {one: statuses.count(one) for one in set(statuses)}
            # The last few may be leased to a sidecar that did not need them: they are given back, and let in then.
            async with asyncio.timeout(LIMIT_S):
                while let_in < 100:
                    for whole in sidecars:
                        let_in += (await call(session, whole))[0] == 200
            assert up.calls == let_in == 100
            row = await until(sidecars[0], "calls-per-day", "100")
            assert 0 < int(row["here"]["used"]) < 100
            assert row["instances"]["edge-0"] == row["here"]
            parts = (await sidecars[1].get("/limits?by=instance"))["limits"]
            assert {part["instance"]: part["used"] for part in parts} == {
                name: share["used"] for name, share in row["instances"].items()
            }
            assert sum(int(part["used"]) for part in parts) == 100
            await sidecars[1].kill()
            await sidecars[1].start()
            await counted(sidecars[1])
            await until(sidecars[1], "calls-per-day", "100")
            assert (await call(session, sidecars[1]))[0] == 402


@pytest.mark.timeout(180)
async def test_a_lease_of_who_was_killed_is_void(tmp_path: Path, postgres_database: str) -> None:
    async with upstream() as (up, url), client() as session:
        settings = {"SIDECAR_LIMITS": "concurrent=4", "SIDECAR_GATE_ON_FAILURE": "closed"}
        async with fleet(tmp_path, url, postgres_database, 2, **settings) as (one, two):
            up.gate.clear()
            held = [asyncio.create_task(call(session, one)) for _ in range(4)]
            async with asyncio.timeout(LIMIT_S):
                while up.open < 4:
                    await asyncio.sleep(0.02)
            assert (await call(session, two))[0] == 429
            await one.kill()
            await asyncio.gather(*held, return_exceptions=True)
            up.gate.set()
            async with asyncio.timeout(LIMIT_S):
                while (await call(session, two))[0] != 200:
                    await asyncio.sleep(0.2)


@pytest.mark.timeout(180)
@pytest.mark.parametrize(("policy", "expected"), [("open", 200), ("closed", 429)])
async def test_while_the_database_is_away_the_setting_decides_and_it_goes_on_by_itself(
    tmp_path: Path, killable_postgres: PostgresServer, policy: str, expected: int
) -> None:
    database = killable_postgres.database()
    async with upstream() as (_, url), client() as session:
        settings = {"SIDECAR_LIMITS": "total_tokens=1000000/60s", "SIDECAR_GATE_ON_FAILURE": policy}
        async with fleet(tmp_path, url, database, 1, **settings) as (one,):
            assert (await call(session, one, max_tokens=50))[0] == 200
            killable_postgres.kill()
            await one.until_metric("sidecar_limits_away")
            async with asyncio.timeout(LIMIT_S):
                while (await call(session, one, who="other", max_tokens=50))[0] != expected:
                    await asyncio.sleep(0.1)
            assert any("shared limits cannot be counted" in note for note in (await one.get("/readyz"))["notes"])
            killable_postgres.start()
            await counted(one)
            assert (await call(session, one, who="new", max_tokens=50))[0] == 200
