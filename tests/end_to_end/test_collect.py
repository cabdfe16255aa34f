"""`metering-sidecar collect` with a real NATS server: each record once in the ledger, whatever happens to either."""

from __future__ import annotations

import argparse
import asyncio
import io
import json
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import pytest
from support.backend_fixtures import record, record_id
from support.collecting import CollectorHere, collecting, publish
from support.nats_server import DEBIANS, GOOD_STREAM, NatsServer, client, make_stream, nats_cluster, nats_server
from support.tiny import tiny_upstream

from sidecar.backends import Context, backend_settings
from sidecar.backends.nats import NatsBackend
from sidecar.cli import main
from sidecar.cli.collect import collecting_settings, feed
from sidecar.model.delivery import Delivered, Duplicate, Refused
from sidecar.runtime import collect
from sidecar.runtime.app import running
from sidecar.runtime.collector import ACK_WAIT_S
from sidecar.runtime.instance_lock import DataLock
from sidecar.settings import Settings, SettingsError, load
from sidecar.spool import SpoolReader

pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
def server() -> Iterator[NatsServer]:
    with nats_server() as one:
        yield one


def numbered(count: int, first: int = 1) -> list[str]:
    return [record_id(n) for n in range(first, first + count)]


async def test_records_of_a_sidecar_come_into_one_ledger_and_are_billed_once(tmp_path: Path) -> None:
    with nats_server() as server:
        await make_stream(server.url, "S", "S.records")
        async with tiny_upstream() as upstream:
            for name in ("one", "two"):
                async with running(sidecar_settings(tmp_path / name, upstream, server.url)) as sidecar:
                    for _ in range(5):
                        await post(sidecar.proxy_url)
                    async with asyncio.timeout(20):
                        while (await sidecar.metering.balance()).backends["nats"].delivered < 5:
                            await asyncio.sleep(0.02)
        async with collecting(tmp_path / "data", server.url, SIDECAR_BACKENDS="ledger,file") as collector:
            balance = await collector.until_recorded(10)
            assert balance["problems"] == []
            assert {name: one["delivered"] for name, one in balance["backends"].items()} == {"ledger": 10, "file": 10}
            status, ready = await collector.get("/readyz")
            assert (status, ready["status"], ready["notes"]) == (200, "ok", [])
            assert await collector.metric('sidecar_collected_total{outcome="stored"}') == 10
            assert await collector.metric("sidecar_collect_reading") == 1
            assert await collector.metric("sidecar_collect_pending") == 0
            assert await collector.stop() == 0
        kept = [line for name in ("one", "two") for line in lines(tmp_path / name)]
        assert sorted(kept) == sorted((tmp_path / "data" / "records.ndjson").read_bytes().splitlines())
        assert collector.ledger_calls() == 10
        assert len({json.loads(line)["instance"] for line in kept}) == 2, "records say which sidecar they are of"


def sidecar_settings(data_dir: Path, upstream: str, nats_url: str) -> Settings:
    env = {
        "SIDECAR_UPSTREAM_URL": upstream,
        "SIDECAR_DATA_DIR": str(data_dir),
        "SIDECAR_LISTEN": "127.0.0.1:0",
        "SIDECAR_ADMIN_LISTEN": "127.0.0.1:0",
        "SIDECAR_BACKENDS": "nats",
        "SIDECAR_NATS_URL": nats_url,
        "SIDECAR_NATS_STREAM": "S",
        "SIDECAR_NATS_SUBJECT": "S.records",
        "SIDECAR_NATS_REPLICAS": "1",
    }
    return load(env, backend_settings=backend_settings())


async def test_debians_server_does_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """2.9 of 2022: what we use of a server is older than that. It knows no `sync_interval`, which no client sees."""
    with nats_server(of=DEBIANS) as server:
        own = collect.stream_settings(sidecar_settings(tmp_path / "backend", "http://127.0.0.1:1", server.url))
        backend = NatsBackend(own, Context(data_dir=tmp_path))
        async with collecting(tmp_path / "data", server.url, SIDECAR_BACKENDS="ledger,file") as collector:
            assert await collector.provision() == 0
            (first,) = backend.encode([record(n) for n in range(1, 5)]).sealed
            assert await backend.send(first) == [Delivered()] * 4
            ok, where = await backend.reach()
            assert ok
            assert where.startswith(f"127.0.0.1:{server.port}, NATS 2.")
            await collector.until_recorded(4)
            server.kill()
            (second,) = backend.encode([record(n) for n in range(3, 8)]).sealed
            assert not {type(one) for one in await backend.send(second)} & {Delivered, Duplicate, Refused}
            server.start()
            assert await backend.send(second) == [Duplicate()] * 2 + [Delivered()] * 3, "ids are known over a kill"
            # Beyond what the stream knows, the collector does.
            await publish(server.url, [record(n) for n in range(1, 8)], ids=False)
            balance = await collector.until_recorded(7)
            async with asyncio.timeout(20):
                while await collector.metric('sidecar_collected_total{outcome="duplicate"}') < 7:
                    await asyncio.sleep(0.02)
            assert balance["problems"] == []
            assert await collector.stop() == 0
        # A new life begins where the consumer is, and one whose consumer is gone reads all and doubles nothing.
        connection = await client(server.url)
        await connection.jetstream().delete_consumer("S", "metering-sidecar")
        await connection.close()
        assert await backend.send(backend.encode([record(8)]).sealed[0]) == [Delivered()]
        async with collecting(tmp_path / "data", server.url, SIDECAR_BACKENDS="ledger,file") as collector:
            await collector.until_recorded(8)
            assert await collector.provision() == 0
            assert capsys.readouterr().out == "stream S: created\nstream S: it is there, and fits\n"
            assert await collector.stop() == 0
        await backend.aclose()
    assert sorted(collector.ids()) == numbered(8)
    assert collector.ledger_calls() == 8


async def post(url: str) -> None:
    async with aiohttp.ClientSession() as session, session.post(f"{url}/v1/things", json={}) as answer:
        assert answer.status == 200
        await answer.read()


def lines(data_dir: Path) -> list[bytes]:
    """What a sidecar has in its spool."""
    with SpoolReader(data_dir) as reader:
        return list(reader.lines())


async def test_what_comes_twice_is_stored_once(server: NatsServer, tmp_path: Path) -> None:
    await make_stream(server.url, "TWICE", "TWICE.records")
    records = [record(n) for n in range(1, 4)]
    await publish(server.url, records, "TWICE")
    await publish(server.url, [records[0], records[0], record(4)], "TWICE", ids=False)
    async with collecting(tmp_path / "data", server.url, "TWICE") as collector:
        await collector.until_recorded(4)
        async with asyncio.timeout(20):
            while await collector.metric('sidecar_collected_total{outcome="duplicate"}') < 2:
                await asyncio.sleep(0.02)
        await publish(server.url, records, "TWICE", ids=False)
        async with asyncio.timeout(20):
            while await collector.metric('sidecar_collected_total{outcome="duplicate"}') < 5:
                await asyncio.sleep(0.02)
        await collector.kill()
    assert sorted(collector.ids()) == numbered(4)
    async with collecting(tmp_path / "data", server.url, "TWICE") as collector:
        await publish(server.url, [*records, record(5)], "TWICE", ids=False)
        balance = await collector.until_recorded(5)
        assert balance["recorded"] == 5
        assert await collector.stop() == 0
    assert collector.ledger_calls() == 5


async def test_what_is_no_record_lies_aside_and_stops_nothing(
    server: NatsServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    await make_stream(server.url, "ODD", "ODD.records")
    newer = json.dumps(json.loads(record(2).json) | {"version": 2}).encode()
    large = record(3, user_agent="x" * 40_000)
    async with collecting(tmp_path / "data", server.url, "ODD") as collector:
        await publish(server.url, [b"hello", record(1), newer, large, b"", b"\xff\x00", record(4)], "ODD", ids=False)
        connection = await client(server.url)
        await connection.jetstream().publish("ODD.records", record(5).json, headers={"Nats-Msg-Id": "another"})
        await connection.close()
        await collector.until_recorded(2)
        async with asyncio.timeout(20):
            while await collector.metric("sidecar_collect_aside") < 6:
                await asyncio.sleep(0.02)
        status, ready = await collector.get("/readyz")
        assert status == 200
        assert ready["notes"] == ["6 messages are kept aside: `metering-sidecar collect --aside`"]
        assert await collector.stop() == 0
    capsys.readouterr()
    assert main(["collect", "--aside", "--data-dir", str(collector.data_dir)]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["reason"] for row in rows] == [
        "no_record",
        "other_version",
        "too_large",
        "no_record",
        "no_record",
        "other_id",
    ]
    assert rows[0]["body"] == "hello"
    assert rows[0]["source"].startswith("ODD 1 ")
    assert rows[2]["bytes"] > 40_000
    assert collector.ids() == [record_id(1), record_id(4)]


async def test_a_server_that_is_away_and_back(tmp_path: Path) -> None:
    with nats_server() as server:
        await make_stream(server.url, "S", "S.records")
        await publish(server.url, [record(n) for n in range(1, 4)])
        async with collecting(tmp_path / "data", server.url) as collector:
            await collector.until_recorded(3)
            server.kill()
            ready = await collector.until("/readyz", 503)
            assert ready["status"] == "degraded"
            assert ready["notes"][0].startswith("the stream is not read: no connection to nats://127.0.0.1:") or (
                ready["notes"] == ["the stream is not read: the connection to NATS ended"]
            )
            server.start()
            await collector.until("/readyz", 200)
            await publish(server.url, [record(n) for n in range(4, 7)])
            await collector.until_recorded(6)
            assert await collector.stop() == 0
        assert sorted(collector.ids()) == numbered(6)


async def test_it_starts_without_a_server_or_a_stream_and_says_why_nothing_comes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with nats_server() as server:
        server.kill()
        async with collecting(tmp_path / "data", server.url) as collector:
            ready = await collector.until("/readyz", 503)
            server.start()
            async with asyncio.timeout(30):
                while "there is no stream S" not in str(ready["notes"]):
                    await asyncio.sleep(0.05)
                    _, ready = await collector.get("/readyz")
            assert await collector.provision() == 0
            assert capsys.readouterr().out == "stream S: created\n"
            await collector.until("/readyz", 200)
            await publish(server.url, [record(1)])
            await collector.until_recorded(1)
            assert await collector.metric("sidecar_collect_missed_total") == 0, "before the first there was none"
            assert await collector.provision() == 0
            assert capsys.readouterr().out == "stream S: it is there, and fits\n"
            assert await collector.stop() == 0


async def test_a_weak_stream_is_neither_read_nor_changed(
    server: NatsServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    await make_stream(server.url, "WEAK", "WEAK.records", discard="old", duplicate_window=120.0)
    async with collecting(tmp_path / "data", server.url, "WEAK") as collector:
        await publish(server.url, [record(1)], "WEAK")
        async with asyncio.timeout(20):
            while "discard new" not in str((await collector.get("/readyz"))[1]["notes"]):
                await asyncio.sleep(0.05)
        assert await collector.provision() == 1
        assert [line.partition(": ")[2].split()[0:3] for line in capsys.readouterr().out.splitlines()] == [
            ["it", "drops", "the"],
            ["it", "knows", "an"],
        ]
        connection = await client(server.url)
        info = await connection.jetstream().stream_info("WEAK")
        assert (info.config.discard, info.config.duplicate_window) == ("old", 120.0)
        assert info.state.consumer_count == 0
        await connection.close()


async def test_a_stream_that_is_purged_deleted_or_loses_its_consumer_under_way(
    server: NatsServer, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    await make_stream(server.url, "EDIT", "EDIT.records")
    await publish(server.url, [record(n) for n in range(1, 4)], "EDIT")
    connection = await client(server.url)
    context = connection.jetstream()
    async with collecting(tmp_path / "data", server.url, "EDIT") as collector:
        await collector.until_recorded(3)
        await context.delete_consumer("EDIT", "metering-sidecar")
        await publish(server.url, [record(4)], "EDIT")
        await collector.until_recorded(4)
        assert await collector.stop() == 0
        # Purged while nobody reads: what is gone is said, and what is sent again comes.
        await publish(server.url, [record(n) for n in range(5, 8)], "EDIT")
        await context.purge_stream("EDIT")
        await publish(server.url, [record(8)], "EDIT")
        await collector.start()
        await collector.until_recorded(5)
        assert await collector.metric("sidecar_collect_missed_total") == 3
        assert "`spool export | collect --feed -`" in caplog.text
        # As they were exported, with what is there already, and a line that is no record.
        exported = [record(n).json for n in range(1, 8)]
        assert await feed(collector.settings, io.BytesIO(b"\n".join([*exported, b"no record", b""]))) == 1
        said = capsys.readouterr()
        assert said.out == "7 records sent\n"
        assert said.err == "line 8 is no record: no JSON\n"
        await collector.until_recorded(8)
        assert await feed(collector.settings, io.BytesIO(exported[0])) == 0
        assert capsys.readouterr().out == "1 record sent\n"
        await context.delete_stream("EDIT")
        await collector.until("/readyz", 503)
        await context.add_stream(name="EDIT", subjects=["EDIT.records"], **GOOD_STREAM)
        await publish(server.url, [record(n) for n in range(1, 10)], "EDIT")
        await collector.until_recorded(9, limit_s=40)
        assert await collector.stop() == 0
    await connection.close()
    assert sorted(collector.ids()) == numbered(9)


async def test_two_that_keep_records_beside_themselves_do_not_share_a_consumer(
    server: NatsServer, tmp_path: Path
) -> None:
    await make_stream(server.url, "OURS", "OURS.records")
    await publish(server.url, [record(n) for n in range(1, 4)], "OURS")
    async with collecting(tmp_path / "one", server.url, "OURS") as one:
        await one.until_recorded(3)
        async with collecting(tmp_path / "two", server.url, "OURS") as two:
            ready = await two.until("/readyz", 503)
            async with asyncio.timeout(20):
                while "belongs to" not in str(ready["notes"]):
                    await asyncio.sleep(0.05)
                    _, ready = await two.get("/readyz")
            assert "SIDECAR_COLLECT_CONSUMER" in str(ready["notes"])
        async with collecting(tmp_path / "two", server.url, "OURS", SIDECAR_COLLECT_CONSUMER="another") as two:
            await two.until_recorded(3)


def test_settings_that_cannot_be_used_are_one_line_each(tmp_path: Path) -> None:
    env = CollectorHere(tmp_path / "data", "nats://127.0.0.1:1").env
    arguments = argparse.Namespace(data_dir=None)
    assert collecting_settings(arguments, env).collect.collect_consumer == "metering-sidecar"
    with pytest.raises(SettingsError, match="SIDECAR_BACKENDS has nats"):
        collecting_settings(arguments, env | {"SIDECAR_BACKENDS": "ledger,nats"})
    del env["SIDECAR_NATS_URL"]
    with pytest.raises(SettingsError) as caught:
        collecting_settings(arguments, env | {"SIDECAR_BACKENDS": "stripe"})
    assert "SIDECAR_NATS_URL is not set" in str(caught.value)
    assert "SIDECAR_STRIPE_API_KEY is not set" in str(caught.value)
    assert "SIDECAR_UPSTREAM_URL" not in str(caught.value)


async def test_a_data_directory_that_is_in_use_is_said(tmp_path: Path) -> None:
    collector = CollectorHere(tmp_path / "data", "nats://127.0.0.1:1")
    with DataLock.take(collector.data_dir), pytest.raises(collect.CollectError, match="in use by another instance"):
        await collect.collect(collector.settings)


@pytest.mark.timeout(300)
async def test_the_leader_of_the_cluster_is_killed_while_records_come(tmp_path: Path) -> None:
    with nats_cluster() as cluster:
        await make_stream(cluster.url, "S", "S.records", num_replicas=3)
        async with collecting(tmp_path / "data", cluster.url, SIDECAR_NATS_REPLICAS="3") as collector:
            sending = asyncio.ensure_future(send_all(cluster.url, 1500))
            await collector.until_recorded(200)
            cluster.kill_leader("S")
            await asyncio.wait_for(sending, 60)
            # What was on its way when the leader died comes again after ACK_WAIT_S.
            balance = await collector.until_recorded(1500, limit_s=ACK_WAIT_S + 60)
            assert balance["recorded"] == 1500
            assert balance["problems"] == []
            assert await collector.stop() == 0
        assert sorted(collector.ids()) == numbered(1500)
        assert collector.ledger_calls() == 1500


async def send_all(url: str, count: int) -> None:
    """Each until it has an answer, as the backend does it."""
    from nats.errors import Error

    connection = await client(url, reconnect_time_wait=0.1)
    context = connection.jetstream()

    async def send(numbers: range) -> None:
        for number in numbers:
            one = record(number)
            while True:
                try:
                    await context.publish("S.records", one.json, headers={"Nats-Msg-Id": one.id}, timeout=3)
                    break
                except (Error, OSError):
                    await asyncio.sleep(0.05)

    await asyncio.gather(*(send(range(first, count + 1, 20)) for first in range(1, 21)))
    await connection.close()
