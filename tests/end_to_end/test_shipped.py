"""`SIDECAR_DURABILITY=shipped` with a real NATS server: no client is told more than the centre has."""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from support.collecting import collecting
from support.nats_server import client, make_stream, nats_server
from support.tiny import tiny_upstream
from support.whole import Whole

from sidecar.backends import backend_settings
from sidecar.cli.shared import serving_settings
from sidecar.runtime.app import Running, running
from sidecar.settings import Settings, SettingsError, load

pytestmark = pytest.mark.timeout(120)


def env_of(data_dir: Path, upstream: str, nats_url: str, **more: str) -> dict[str, str]:
    return {
        "SIDECAR_UPSTREAM_URL": upstream,
        "SIDECAR_DATA_DIR": str(data_dir),
        "SIDECAR_LISTEN": "127.0.0.1:0",
        "SIDECAR_ADMIN_LISTEN": "127.0.0.1:0",
        "SIDECAR_BACKENDS": "ledger,nats",
        "SIDECAR_NATS_URL": nats_url,
        "SIDECAR_NATS_STREAM": "S",
        "SIDECAR_NATS_SUBJECT": "S.records",
        "SIDECAR_NATS_REPLICAS": "1",
        "SIDECAR_DURABILITY": "shipped",
        **more,
    }


def settings_of(env: dict[str, str]) -> Settings:
    return load(env, backend_settings=backend_settings())


async def stored(url: str) -> int:
    connection = await client(url)
    try:
        return int((await connection.jetstream().stream_info("S")).state.messages)
    finally:
        await connection.close()


async def post(sidecar: Running) -> None:
    async with aiohttp.ClientSession() as session, session.post(f"{sidecar.proxy_url}/v1/things", json={}) as answer:
        assert answer.status == 200
        await answer.read()


async def released(sidecar: Running) -> float:
    text = (await sidecar.metering.metrics()).decode()
    (line,) = [line for line in text.splitlines() if line.startswith("sidecar_released_uncommitted_total")]
    return float(line.split()[1])


async def test_when_a_client_has_its_last_byte_the_stream_has_its_record(tmp_path: Path) -> None:
    with nats_server() as server:
        await make_stream(server.url, "S", "S.records")
        async with tiny_upstream() as upstream:
            async with running(settings_of(env_of(tmp_path / "data", upstream, server.url))) as sidecar:
                for number in range(1, 4):
                    await post(sidecar)
                    assert await stored(server.url) == number
                await asyncio.gather(*(post(sidecar) for _ in range(30)))
                assert await stored(server.url) == 33
                assert await released(sidecar) == 0


async def test_a_centre_that_is_away_holds_nobody_up_for_longer_than_the_wait_and_loses_nothing(
    tmp_path: Path,
) -> None:
    with nats_server() as server:
        await make_stream(server.url, "S", "S.records")
        async with tiny_upstream() as upstream:
            env = env_of(
                tmp_path / "data", upstream, server.url, SIDECAR_COMMIT_WAIT_S="0.3", SIDECAR_NATS_TIMEOUT="0.5s"
            )
            async with running(settings_of(env)) as sidecar:
                await post(sidecar)
                server.freeze()
                for _ in range(5):
                    await asyncio.wait_for(post(sidecar), 20)
                assert await released(sidecar) == 5
                readiness = await sidecar.metering.readiness()
                assert (readiness.ready, readiness.state) == (True, "degraded")
                assert readiness.notes[0] == "the centre has taken no record within 0.3 s"
                server.thaw()
                async with asyncio.timeout(40):
                    while (await sidecar.metering.readiness()).state != "ok":
                        await asyncio.sleep(0.05)
                before = await released(sidecar)
                await post(sidecar)
                assert await released(sidecar) == before, "the promise holds again"
                assert await stored(server.url) == 7


async def test_a_node_that_is_gone_with_its_disk_has_taken_no_record_along(tmp_path: Path) -> None:
    """Killed, with its data directory; and the process that meters before that, while responses wait."""
    with nats_server() as server:
        await make_stream(server.url, "S", "S.records")
        async with tiny_upstream() as upstream:
            env: dict[str, Any] = env_of(tmp_path / "data", upstream, server.url, SIDECAR_COMMIT_WAIT_S="30")
            whole = Whole(tmp_path / "data", upstream, **{k: v for k, v in env.items() if k.startswith("SIDECAR_")})
            answered = 0

            async def calls(session: aiohttp.ClientSession, most: int) -> None:
                nonlocal answered
                for _ in range(most):
                    async with session.post(f"{whole.proxy_url}/v1/things", json={}) as answer:
                        await answer.read()
                        answered += answer.status == 200

            async with whole, aiohttp.ClientSession() as session:
                calling = [asyncio.ensure_future(calls(session, 15)) for _ in range(8)]
                async with asyncio.timeout(30):
                    while answered < 30:
                        await asyncio.sleep(0.005)
                for pid in whole.children()["meter"]:
                    os.kill(pid, signal.SIGKILL)
                await asyncio.wait_for(asyncio.gather(*calling), 60)
                assert answered == 120
                assert "sidecar_released_uncommitted_total 0.0" in await whole.text("/metrics")
                await whole.kill()
            shutil.rmtree(tmp_path / "data")
        assert await stored(server.url) >= 120
        async with collecting(tmp_path / "centre", server.url, SIDECAR_BACKENDS="ledger") as collector:
            balance = await collector.until_recorded(120)
            assert balance["recorded"] == 120
            await collector.stop()
        assert len(set(collector.ids())) == 120


def test_without_a_centre_it_is_refused(tmp_path: Path) -> None:
    env = env_of(tmp_path, "http://127.0.0.1:1", "nats://127.0.0.1:1") | {"SIDECAR_BACKENDS": "ledger"}
    arguments = argparse.Namespace(data_dir=None)
    with pytest.raises(SettingsError, match="SIDECAR_DURABILITY=shipped needs a centre: add nats to SIDECAR_BACKENDS"):
        serving_settings(arguments, env)
    assert serving_settings(arguments, env | {"SIDECAR_BACKENDS": "ledger,nats"}).backends == ("ledger", "nats")


async def test_the_shared_ledger_is_a_centre_too(tmp_path: Path, postgres_database: str) -> None:
    import asyncpg

    async with tiny_upstream() as upstream:
        env = env_of(tmp_path / "data", upstream, "nats://127.0.0.1:1", SIDECAR_COMMIT_WAIT_S="20")
        env |= {"SIDECAR_BACKENDS": "ledger", "SIDECAR_LEDGER_URL": postgres_database}
        async with running(settings_of(env)) as sidecar:
            await post(sidecar)
            connection = await asyncpg.connect(postgres_database)
            try:
                for number in range(1, 4):
                    assert await connection.fetchval("SELECT count(*) FROM metering.records") == number
                    await post(sidecar)
                await asyncio.gather(*(post(sidecar) for _ in range(20)))
                assert await connection.fetchval("SELECT count(*) FROM metering.records") == 24
            finally:
                await connection.close()
            assert await released(sidecar) == 0
