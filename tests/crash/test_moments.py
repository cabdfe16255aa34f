"""Deaths and faults at chosen moments, on the whole sidecar: what is hard to hit by chance."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sqlite3
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from support.filled import fill
from support.mishaps import watching
from support.oracle import CHAT, SETTINGS, STREAM, Oracle, judge
from support.small_disk import fill_up, small_disk
from support.tiny import USAGE, chunk, tiny_upstream
from support.whole import Whole, children

from sidecar.dev.mock_backends.faults import Do, Fault
from sidecar.spool import Limits, SpoolReader

pytestmark = pytest.mark.timeout(240)  # several starts each, which take seconds on a busy machine

REVENIUM_SLOTS = 16  # requests at once: what may be under way at a kill


@asynccontextmanager
async def halting_upstream(*, after: int, last: bytes | None) -> AsyncIterator[str]:
    """Streams so many events, then `last`, and never the terminal chunk."""

    async def chat(request: web.Request) -> web.StreamResponse:
        answer = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await answer.prepare(request)
        for number in range(after):
            await answer.write(chunk(choices=[{"index": 0, "delta": {"content": f"w{number}"}, "finish_reason": None}]))
        if last is not None:
            await answer.write(chunk(usage=USAGE))
            await answer.write(last)
        await asyncio.Event().wait()
        return answer

    app = web.Application()
    app.router.add_post("/v1/chat/completions", chat)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield "http://{}:{}".format(*runner.addresses[0][:2])
    finally:
        await runner.cleanup()


async def until(condition: Callable[[], Any], *, limit_s: float = 30.0) -> None:
    async with asyncio.timeout(limit_s):
        while not condition():
            await asyncio.sleep(0.005)


async def call(whole: Whole, name: str) -> int:
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{whole.proxy_url}/v1/chat/completions", json=CHAT, headers={"x-call": name}) as answer,
    ):
        await answer.read()
        return answer.status


@pytest.mark.parametrize("workers", ["1", "2"])
async def test_a_kill_between_the_end_mark_and_the_terminal_chunk(tmp_path: Path, workers: str) -> None:
    async with halting_upstream(after=3, last=b"data: [DONE]\n\n") as upstream:
        whole = Whole(tmp_path / "data", upstream, **SETTINGS, SIDECAR_WORKERS=workers)
        async with whole:
            assert whole.process is not None
            pids = [whole.process.pid, *children(whole.process.pid)]
            url, headers = f"{whole.proxy_url}/v1/chat/completions", {"x-call": "one"}
            async with aiohttp.ClientSession() as session, session.post(url, json=STREAM, headers=headers) as answer:
                async for line in answer.content:
                    if line.startswith(b"data: [DONE]"):
                        break  # here every client stops reading
                else:
                    raise AssertionError("the end mark never came")
                for pid in pids:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                await whole.kill()
            await whole.start()
            await whole.settled()
            (record,) = await whole.records()
            judge({"one": "stream"}, [record])


async def test_one_open_stream_on_an_idle_sidecar_then_a_kill(tmp_path: Path) -> None:
    async with halting_upstream(after=1, last=None) as upstream:
        whole = Whole(tmp_path / "data", upstream, **SETTINGS)
        async with whole:
            url, headers = f"{whole.proxy_url}/v1/chat/completions", {"x-call": "one"}
            async with aiohttp.ClientSession() as session, session.post(url, json=STREAM, headers=headers) as answer:
                await answer.content.readline()
                with SpoolReader(whole.data_dir) as reader:  # nothing else happens that would take the intent along
                    await until(lambda: any(reader.totals(one).open for one in reader.instances()), limit_s=5)
                await whole.kill()
            await whole.start()
            balance = await whole.settled()
            (record,) = await whole.records()
    assert (record["outcome"], record["usage"], record["duration_ms"]) == ("unknown", None, None)
    assert record["dimensions"]["call"] == "one"
    assert balance["holds"], balance


# --- a full disk ---------------------------------------------------------------------------------------


async def test_a_full_disk_while_delivery_has_work_then_a_kill(tmp_path: Path) -> None:
    """Verdicts are still stored, so the kill doubles nothing; the calls behind it are kept once there is room."""
    with small_disk(tmp_path / "disk", "48m") as root:
        async with tiny_upstream() as upstream, watching() as (receiver, url):
            whole = Whole(
                root / "data",
                upstream,
                **SETTINGS,
                SIDECAR_BACKENDS="webhook",
                SIDECAR_WEBHOOK_URL=f"{url}/webhook",
                SIDECAR_WEBHOOK_BATCH="1",
                SIDECAR_COMMIT_WAIT_S="0.2",
            )
            whole.log = tmp_path / "log"
            async with whole:
                receiver.faults.set(Fault(do=Do.STATUS, status=503))  # undelivered work piles up
                for number in range(30):
                    assert await call(whole, f"before-{number}") == 200
                filler = fill_up(root)
                assert await call(whole, "full") == 200  # passes, and waits in memory
                await said(whole, lambda ready: ready["status"] in ("full", "degraded"))
                receiver.faults.set()
                await delivered(whole, "webhook", 30)  # the verdicts had room
                balance = await whole.get("/balance")
                assert balance["holds"], balance
                assert balance["open"] == 1
                await whole.kill()
                await whole.start()
                await delivered(whole, "webhook", 30)
                assert await call(whole, "still-full") == 200
                filler.unlink()
                await said(whole, lambda ready: ready["status"] == "ok")
                assert await call(whole, "after") == 200
                balance = await whole.settled()
                records = await whole.records()
                assert await whole.stop() == 0, whole.log.read_text()
    billed = receiver.billed("webhook")
    expected = Counter([*(f"before-{number}" for number in range(30)), "still-full", "after"])
    assert Counter(row["dimensions"]["call"] for row in billed) == expected
    assert len({row["id"] for row in billed}) == balance["recorded"] == len(billed)
    # A disk that is nearly full lets go of what is delivered, but only of segments that are written no more.
    kept = Counter(record["dimensions"]["call"] for record in records)
    assert kept in (expected, Counter(["still-full", "after"]))
    assert {record["id"] for record in records} <= {row["id"] for row in billed}
    assert balance["holds"], balance
    assert not any(balance["lost"].values()), balance


async def said(whole: Whole, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    async with asyncio.timeout(30):
        while not condition(ready := await whole.get("/readyz")):
            await asyncio.sleep(0.02)
    return dict(ready)


async def delivered(whole: Whole, backend: str, count: int) -> None:
    async with asyncio.timeout(150):
        while (await whole.get("/balance"))["backends"][backend]["delivered"] < count:
            await asyncio.sleep(0.05)


# --- much that is pending ------------------------------------------------------------------------------


@asynccontextmanager
async def with_pending(
    tmp_path: Path, upstream: str, count: int, limits: Limits | None = None, **settings: str
) -> AsyncIterator[tuple[Whole, list[str]]]:
    """A stopped sidecar that knows its backends, with so many records in its spool that none of them has seen."""
    whole = Whole(tmp_path / "data", upstream, **settings)
    await whole.start()
    assert await whole.stop() == 0, whole.log.read_text()
    ids = await fill(whole.data_dir, count, limits)
    try:
        yield whole, ids
    finally:
        await whole.kill()


@pytest.mark.parametrize("path", ["/no/such/place", "/_received"])
async def test_a_wrong_url_parks_none_of_10_000(tmp_path: Path, path: str) -> None:
    async with tiny_upstream() as upstream, watching() as (receiver, url):
        settings: dict[str, Any] = {"SIDECAR_BACKENDS": "webhook", "SIDECAR_WEBHOOK_URL": url + path}
        async with with_pending(tmp_path, upstream, 10_000, **settings) as (whole, ids):
            await whole.start()
            ready = await said(whole, lambda ready: any("blocked" in note for note in ready["notes"]))
            assert "webhook is blocked" in " ".join(ready["notes"])
            balance = await whole.get("/balance")
            assert balance["backends"]["webhook"]["pending"] == 10_000
            assert not any(balance["backends"]["webhook"]["parked"].values())
            assert await whole.stop() == 0
            whole.env["SIDECAR_WEBHOOK_URL"] = f"{url}/webhook"
            await whole.start()
            balance = await whole.settled()
            assert balance["holds"], balance
            assert await whole.stop() == 0
    assert Counter(row["id"] for row in receiver.billed("webhook")) == Counter(ids)


async def test_without_deduplication_a_kill_parks_no_more_than_was_under_way(tmp_path: Path) -> None:
    kills = 3
    async with tiny_upstream() as upstream, watching() as (receiver, url):
        settings: dict[str, Any] = {
            "SIDECAR_BACKENDS": "revenium",
            "SIDECAR_REVENIUM_URL": url,
            "SIDECAR_REVENIUM_API_KEY": "key-of-the-tests",
        }
        async with with_pending(tmp_path, upstream, 2_000, **settings) as (whole, ids):

            def more_than(count: int) -> Callable[[], bool]:
                return lambda: receiver.requests["revenium"] > count

            receiver.faults.set(Fault(do=Do.DELAY, delay_s=0.15))
            for number in range(kills):
                seen = receiver.requests["revenium"]
                await whole.start()
                await until(more_than(seen + 40 + number))
                await whole.kill()
            receiver.faults.set()
            await whole.start()
            balance = await whole.settled(limit_s=60)
            code, out, err = await whole.command("spool", "parked", "--format", "ndjson")
            assert code == 0, err
            assert await whole.stop() == 0
    parked = {row["record_id"] for row in map(json.loads, out.splitlines())}
    billed = Counter(row["correlationId"] for row in receiver.billed("revenium"))
    assert 0 < len(parked) <= kills * REVENIUM_SLOTS
    assert balance["backends"]["revenium"]["parked"] == {"unknown": len(parked)}
    assert max(billed.values()) == 1
    assert set(ids) - parked <= billed.keys() <= set(ids)
    assert balance["holds"], balance


async def test_a_stop_while_sending_and_a_start_with_less_room(tmp_path: Path) -> None:
    """What was asked to end in the middle of its work goes on where it was, also with less memory and no retention."""
    async with tiny_upstream() as upstream, watching() as (receiver, url):
        settings: dict[str, Any] = {"SIDECAR_BACKENDS": "meter,webhook", "SIDECAR_METER_URL": f"{url}/meter"}
        settings |= {"SIDECAR_WEBHOOK_URL": f"{url}/webhook"}
        async with with_pending(tmp_path, upstream, 5_000, **settings) as (whole, ids):
            receiver.faults.set(Fault(do=Do.DELAY, delay_s=6.0))  # longer than the last pass at the end
            await whole.start()
            await until(lambda: receiver.requests["meter"] and receiver.requests["webhook"])
            assert await whole.stop() == 0
            assert (await whole.command("balance"))[0] == 0
            receiver.faults.set()
            whole.env |= {"SIDECAR_SPOOL_MEMORY_BYTES": "1MiB", "SIDECAR_RETENTION": "0s"}
            await whole.start()
            balance = await whole.settled()
            assert await whole.stop() == 0
    assert balance["holds"], balance
    assert Counter(row["id"] for row in receiver.billed("webhook")) == Counter(ids)
    assert Counter(row["correlationId"] for row in receiver.billed("meter")) == Counter(ids)
    assert all(len(digests) == 1 for digests in receiver.digests.values())


# --- the balance ---------------------------------------------------------------------------------------


async def test_a_miscounted_row_makes_balance_exit_1(tmp_path: Path) -> None:
    async with tiny_upstream() as upstream:
        whole = Whole(tmp_path / "data", upstream)
        async with whole:
            for number in range(5):
                await call(whole, f"{number}")
            await whole.settled()
            assert await whole.stop() == 0
            assert (await whole.command("balance"))[0] == 0
            with contextlib.closing(sqlite3.connect(whole.data_dir / "delivery.db")) as connection:
                connection.execute("UPDATE counter SET n = n + 1 WHERE term = 'delivered'")
                connection.commit()
            for running in (False, True):
                if running:
                    await whole.start()
                code, out, err = await whole.command("balance", "--format", "json")
                assert code == 1, out
                assert json.loads(out)["holds"] is False
                assert "ledger: recorded 5 is not 6" in err
            code, _, err = await whole.command("spool", "verify")
            assert code == 1
            assert "ledger" in err


async def test_the_recount_agrees_through_redrive_adoption_and_other_backends(tmp_path: Path) -> None:
    """`spool verify` reads every row; the counters were kept one by one. After each step they say the same."""
    async with tiny_upstream() as upstream, watching() as (receiver, url), AsyncExitStack() as stack:
        hooks = {"SIDECAR_WEBHOOK_URL": f"{url}/webhook", "SIDECAR_METER_URL": f"{url}/meter"}
        whole = Whole(tmp_path / "data", upstream, **SETTINGS, **hooks, SIDECAR_BACKENDS="ledger,webhook")
        total = 0

        async def some_calls(count: int) -> None:
            nonlocal total
            await asyncio.gather(*(call(whole, f"{total + number}") for number in range(count)))
            total += count

        async def agrees() -> dict[str, Any]:
            balance = await whole.settled()
            assert balance["holds"], balance
            assert balance["recorded"] == total
            for command in (["spool", "verify"], ["balance"]):
                code, out, err = await whole.command(*command)
                assert code == 0, out + err
            return dict(balance["backends"])

        whole.env["SIDECAR_WORKERS"] = "4"
        stack.push_async_callback(whole.kill)
        await whole.start()
        receiver.poison_one("webhook")
        await some_calls(40)
        assert sum((await agrees())["webhook"]["parked"].values()) == 1
        receiver.poison.clear()
        code, _, err = await whole.command("spool", "redrive")
        assert code == 0, err
        assert (await agrees())["webhook"]["delivered"] == total
        await whole.kill()  # its workers drain, and leave four slots for one to adopt

        whole.env |= {"SIDECAR_WORKERS": "1", "SIDECAR_BACKENDS": "ledger,webhook,meter"}
        await whole.start()
        await some_calls(10)
        backends = await agrees()
        assert backends["meter"]["skipped"] == {"before": 40}
        assert await whole.stop() == 0

        whole.env["SIDECAR_BACKENDS"] = "ledger,meter"
        await whole.start()
        await some_calls(10)
        backends = await agrees()
        assert backends["ledger"]["delivered"] == backends["meter"]["delivered"] + 40 == total
        assert await whole.stop() == 0
        code, out, err = await whole.command("spool", "verify")
        assert code == 0, out + err
        assert len(await whole.records()) == total


async def test_the_recount_agrees_after_retention(tmp_path: Path) -> None:
    """Segments that are delivered go, and what was counted of them stays: over a kill, and a redrive after it."""
    count, small = 20_000, Limits(segment_bytes=1 << 20)
    async with tiny_upstream() as upstream, watching() as (receiver, url):
        settings = {
            "SIDECAR_BACKENDS": "ledger,webhook",
            "SIDECAR_WEBHOOK_URL": f"{url}/webhook",
            "SIDECAR_RETENTION": "0s",
        }
        async with with_pending(tmp_path, upstream, count, small, **settings) as (whole, ids):
            (slot,) = (path for path in (whole.data_dir / "spool").iterdir() if path.is_dir())
            segments = sorted(slot.glob("*.seg"))
            assert len(segments) > 2

            async def agrees() -> dict[str, Any]:
                balance = await whole.settled(limit_s=60)
                assert balance["holds"], balance
                await until(lambda: not any(path.exists() for path in segments[:-1]), limit_s=100)
                assert await whole.get("/balance") == balance
                for command in (["spool", "verify"], ["balance"]):
                    code, out, err = await whole.command(*command)
                    assert code == 0, out + err
                return balance

            receiver.poison_one("webhook")
            await whole.start()
            assert await call(whole, "one") == 200
            before = await agrees()
            assert before["recorded"] == before["backends"]["ledger"]["delivered"] == count + 1
            assert sum(before["backends"]["webhook"]["parked"].values()) == 1
            assert len(await whole.records()) < count
            await whole.kill()
            code, out, err = await whole.command("spool", "verify")
            assert code == 0, out + err

            receiver.poison.clear()
            await whole.start()
            assert await agrees() == before
            code, out, err = await whole.command("spool", "redrive")
            assert code == 0, out + err
            after = await agrees()
            assert after["backends"]["webhook"]["delivered"] == count + 1
    billed = Counter(row["id"] for row in receiver.billed("webhook"))
    assert len(billed) == count + 1
    assert max(billed.values()) == 1
    assert billed.keys() > set(ids)


async def test_from_four_workers_to_one_under_load(tmp_path: Path) -> None:
    owed: dict[str, str] = {}
    async with (
        tiny_upstream() as upstream,
        Whole(tmp_path / "data", upstream, **SETTINGS, SIDECAR_WORKERS="4") as whole,
    ):
        for seed, workers in enumerate(("1", "2")):
            owed |= await some_load(whole, seed, die=True)
            whole.env["SIDECAR_WORKERS"] = workers
            await whole.start()
        owed |= await some_load(whole, 2, die=False)
        balance = await whole.settled()
        records = await whole.records()
        assert await whole.stop() == 0
    judge(owed, records)
    assert balance["holds"], balance
    ledger = balance["backends"]["ledger"]
    assert ledger["delivered"] + ledger["duplicate"] == balance["recorded"] == len(records)
    # One process writes for all; who served a call stands at the end of its id. The kernel deals the connections out.
    assert len({record["instance"] for record in records}) == 1
    assert len({record["id"][-12:] for record in records}) > 3


async def some_load(whole: Whole, seed: int, *, die: bool) -> dict[str, str]:
    """Some sixty calls, and then perhaps death in the middle of them; what is owed."""
    oracle = Oracle(lambda: whole.proxy_url, seed=seed, clients=6)
    load = asyncio.create_task(oracle.run())
    try:
        await until(lambda: len(oracle.owed) >= 60 or load.done())
        if die:
            await whole.kill()
    finally:
        oracle.stop()
        await load
    return oracle.owed
