"""Several sidecars and one ledger in PostgreSQL: the commands and the port answer for all of them, whatever dies."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, closing
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from support.postgres_server import PostgresServer
from support.whole import Whole

from sidecar.cli import main
from sidecar.dev.mock_llm import ScriptedLLM
from sidecar.ledger.postgres_queries import PostgresReader

CHAT = {"model": "gpt-5-mini", "messages": [{"role": "user", "content": "hi"}]}


@asynccontextmanager
async def fleet(directory: Path, url: str, *names: str) -> AsyncIterator[list[Whole]]:
    upstream = ScriptedLLM()
    address = await upstream.start()
    async with AsyncExitStack() as stack:
        stack.push_async_callback(upstream.aclose)
        found = []
        for name in names:
            whole = Whole(
                directory / name,
                address,
                SIDECAR_SUBSCRIBER="header:x-tenant",
                SIDECAR_BACKENDS="ledger",
                SIDECAR_LEDGER_URL=url,
                SIDECAR_INSTANCE=name,
            )
            found.append(await stack.enter_async_context(whole))
        yield found


async def call(whole: Whole, count: int = 1, who: str = "acme") -> None:
    async with aiohttp.ClientSession() as session:
        for _ in range(count):
            async with session.post(
                whole.proxy_url + "/v1/chat/completions",
                json=CHAT,
                headers={"x-tenant": who, "Authorization": "Bearer sk-test"},
            ) as answer:
                assert answer.status == 200
                await answer.read()


async def until(found: Callable[[], bool], *, limit_s: float = 40.0) -> None:
    async with asyncio.timeout(limit_s):
        while not await asyncio.to_thread(found):
            await asyncio.sleep(0.05)


def check(url: str, expected: dict[str, int]) -> None:
    """Each record is there once, and in the sums."""
    with closing(PostgresReader(url)) as reader:
        assert {row.group[0]: row.records for row in reader.usage(["instance"])} == expected
        assert reader.counted() == {name: (count, count) for name, count in expected.items()}


async def said(
    whole: Whole, monkeypatch: pytest.MonkeyPatch, out: pytest.CaptureFixture[str], *command: str
) -> tuple[int, Any]:
    """What a command says as JSON."""
    for name, value in whole.env.items():
        monkeypatch.setenv(name, value)
    code = await asyncio.to_thread(main, [*command, "--format", "json"])
    return code, json.loads(out.readouterr().out)


async def test_any_of_them_answers_for_all(
    tmp_path: Path, postgres_database: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    async with fleet(tmp_path, postgres_database, "edge-1", "edge-2") as (one, two):
        await call(one, 3)
        await call(two, 2, "globex")
        await one.settled()
        await two.settled()
        check(postgres_database, {"edge-1": 3, "edge-2": 2})
        assert not (one.data_dir / "ledger.db").exists()
        rows = await one.get("/usage?by=instance,subscriber")
        assert [(row["instance"], row["subscriber"], row["calls"]) for row in rows] == [
            ("edge-1", "acme", 3),
            ("edge-2", "globex", 2),
        ]
        assert rows == await two.get("/usage?by=instance,subscriber")
        assert (await one.get("/usage?by=&where=instance=edge-2"))[0]["calls"] == 2
        code, told = await said(two, monkeypatch, capfd, "usage", "--by", "instance,subscriber")
        assert (code, told) == (0, rows)
        records = await two.get("/records")
        assert len(records) == 5
        assert [row["started_at"] for row in records] == sorted(row["started_at"] for row in records)
        assert len(await two.get("/records?where=instance=edge-1")) == 3
        assert await two.get(f"/records?id={records[0]['id']}") == [records[0]]
        code, told = await said(two, monkeypatch, capfd, "records", "--limit", "2")
        assert (code, told) == (0, records[-2:])

        def told_by_all() -> bool:
            with closing(PostgresReader(postgres_database)) as reader:
                balances = [row.balance for row in reader.instances()]
            return [b and b["recorded"] for b in balances] == [3, 2]

        await until(told_by_all)
        code, told = await said(one, monkeypatch, capfd, "balance")
        assert (code, told["recorded"], told["fleet"]["sum"]["recorded"], told["fleet"]["in_ledger"]) == (0, 3, 5, 5)
        assert told["fleet"]["holds"]
        assert told["fleet"]["sum"]["backends"]["ledger"]["delivered"] == 5
        assert {name: row["in_ledger"] for name, row in told["fleet"]["instances"].items()} == {
            "edge-1": 3,
            "edge-2": 2,
        }

        async with asyncio.timeout(40):
            while 'sidecar_instance_lag_seconds{instance="edge-2"} 0' not in (await one.text("/metrics")):
                await asyncio.sleep(0.1)
        assert set((await one.get("/balance"))["fleet"]["instances"]) == {"edge-1", "edge-2"}


async def test_a_ledger_that_is_away_keeps_nobody_waiting_and_loses_nothing(
    tmp_path: Path, killable_postgres: PostgresServer
) -> None:
    url = killable_postgres.database()
    async with fleet(tmp_path, url, "edge-1") as (one,):
        await call(one, 3)
        await one.settled()
        killable_postgres.kill()
        await call(one, 20)
        assert (await one.get("/balance"))["recorded"] == 23
        async with asyncio.timeout(40):
            while not any("ledger is " in note for note in (await one.get("/readyz"))["notes"]):
                await asyncio.sleep(0.05)
        await one.kill()  # with all of it on its way
        await one.start()  # and without a ledger
        await call(one, 5)
        killable_postgres.start()
        balance = await one.settled(limit_s=60)
        assert balance["holds"]
        assert balance["recorded"] == 28
        check(url, {"edge-1": 28})


async def test_a_copied_directory_is_refused_and_adopted(tmp_path: Path, postgres_database: str) -> None:
    async with fleet(tmp_path, postgres_database, "edge-1") as (one,):
        await call(one, 3)
        await one.settled()
        copy = tmp_path / "copy"
        shutil.copytree(one.data_dir, copy, ignore=shutil.ignore_patterns("*.sock", "lock"))
        (copy / "place").unlink()  # as a snapshot of a volume, in which nothing tells by itself
        settings = {name: one.env[name] for name in ("SIDECAR_BACKENDS", "SIDECAR_LEDGER_URL", "SIDECAR_INSTANCE")}
        other = Whole(copy, one.env["SIDECAR_UPSTREAM_URL"], **settings)
        async with other:
            await call(other)
            await other.settled()  # the last to start goes on
            await call(one)
            async with asyncio.timeout(40):
                while "ledger is blocked: copied_directory" not in str(await one.get("/readyz")):
                    await asyncio.sleep(0.05)
            assert (await one.get("/balance"))["backends"]["ledger"]["pending"] == 1
            status, _ = await one.change("/adopt", json={"as": "original"})
            assert status == 200
            await one.settled()
            await call(other)
            async with asyncio.timeout(40):
                while "ledger is blocked: copied_directory" not in str(await other.get("/readyz")):
                    await asyncio.sleep(0.05)
        check(postgres_database, {"edge-1": 5})
