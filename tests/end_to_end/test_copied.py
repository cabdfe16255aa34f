"""A data directory that was copied or put back: noticed at the start, nothing sent twice, and the operator decides."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sqlite3
import subprocess
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path

import aiohttp
import pytest
from support.tiny import tiny_upstream
from support.whole import Whole, running_receiver

from sidecar.delivery import removed_backend
from sidecar.runtime import offline
from sidecar.runtime.directory_identity import As

pytestmark = pytest.mark.timeout(240)  # several starts each, which take seconds on a busy machine


async def calls(whole: Whole, count: int) -> None:
    async with aiohttp.ClientSession() as session:
        for _ in range(count):
            async with session.post(whole.proxy_url + "/v1/things", headers={"x-tenant": "acme"}) as answer:
                await answer.read()
                assert answer.status == 200


async def taken(url: str, backend: str) -> list[str]:
    async with aiohttp.ClientSession() as session, session.get(url + "/_received") as answer:
        rows = [json.loads(line) for line in (await answer.text()).splitlines()]
    found = []
    for row in rows:
        if row["backend"] == backend:
            found += [one["id"] for one in row["body"]]
    return found


def settings(url: str, **more: str) -> dict[str, str]:
    return {
        "SIDECAR_BACKENDS": "webhook,ledger",
        "SIDECAR_WEBHOOK_URL": f"{url}/webhook",
        "SIDECAR_SUBSCRIBER": "header:x-tenant",
        **more,
    }


@asynccontextmanager
async def copied(tmp_path: Path) -> AsyncIterator[tuple[Whole, Whole, str]]:
    """An original that has delivered everything, and a copy from when ten records were pending."""
    async with running_receiver() as (_, url), tiny_upstream() as upstream:
        original = Whole(tmp_path / "data", upstream, **settings("http://127.0.0.1:9"))
        copy = Whole(tmp_path / "copy", upstream, **settings(url))
        try:
            await original.start()
            await calls(original, 10)
            assert await original.stop() == 0
            subprocess.run(["cp", "-a", str(tmp_path / "data"), str(tmp_path / "copy")], check=True)
            original.env |= settings(url)
            await original.start()
            await calls(original, 3)
            await original.settled()
            yield original, copy, url
        finally:
            await original.kill()
            if copy.process is not None:
                await copy.kill()


async def until_pending(whole: Whole, count: int) -> None:
    async with asyncio.timeout(20):
        while (await whole.get("/balance"))["backends"]["webhook"]["pending"] != count:
            await asyncio.sleep(0.05)


async def test_a_copy_waits_and_is_left_to_the_original(tmp_path: Path) -> None:
    async with copied(tmp_path) as (original, copy, url):
        await copy.start()
        await calls(copy, 5)
        await until_pending(copy, 15)
        ready = await copy.get("/readyz")
        assert ready["status"] == "ok"
        assert "was copied or put back" in ready["notes"][0]
        assert "spool adopt" in ready["notes"][0]
        assert any(note.startswith("webhook is blocked: this data directory was copied") for note in ready["notes"])
        assert "sidecar_directory_copied 1.0" in await copy.text("/metrics")
        code, _, err = await copy.command("balance")
        assert (code, "was copied or put back" in err) == (0, True)
        assert '"ERROR"' in copy.log.read_text()
        assert copy.log.read_text().count("was copied or put back") >= 1
        await copy.stop()
        code, _, err = await copy.command("balance")
        assert "was copied or put back" in err
        await copy.start()  # it is not forgotten over a restart
        await until_pending(copy, 15)

        code, out, err = await copy.command("spool", "adopt", "--as", "copy")
        assert code == 0, err
        assert "webhook 10" in out
        balance = await copy.settled()
        assert balance["holds"]
        assert balance["backends"]["webhook"]["parked"] == {"copied": 10}
        assert balance["backends"]["webhook"]["delivered"] == 5
        assert "copied" not in str((await copy.get("/readyz"))["notes"])
        assert set(Counter(await taken(url, "webhook")).values()) == {1}
        rows = await original.records() + await copy.records()
        places = Counter((row["instance"], row["seq"]) for row in rows)
        assert sum(1 for count in places.values() if count > 1) == 10  # the copied records themselves, and no other
        await copy.stop()
        await copy.start()
        await calls(copy, 2)
        balance = await copy.settled()
        assert balance["backends"]["webhook"]["delivered"] == 7
        await calls(original, 2)
        await original.settled()
        rows = await original.records() + await copy.records()
        numbers = {row["id"]: (row["instance"], row["seq"]) for row in rows}
        assert len(set(numbers.values())) == len(numbers)
        assert len(numbers) == 10 + 3 + 5 + 2 + 2
        code, out, _ = await copy.command("spool", "verify")
        assert code == 0, out


@pytest.mark.parametrize("running", [True, False])
async def test_what_delivery_had_not_begun_in_the_copy_is_left_too(tmp_path: Path, running: bool) -> None:
    """`delivery.db` is read before the spool while a directory is copied live: it may not know of the spool yet."""
    async with copied(tmp_path) as (_, copy, url):
        with closing(sqlite3.connect(tmp_path / "copy" / "delivery.db")) as db, db:
            (cursor,) = db.execute("SELECT id FROM cursor WHERE backend = 'webhook'").fetchone()
            db.execute("DELETE FROM payload WHERE request IN (SELECT id FROM sealed WHERE cursor = ?)", (cursor,))
            for table in ("sealed", "counter"):
                db.execute(f"DELETE FROM {table} WHERE cursor = ?", (cursor,))
            db.execute("DELETE FROM cursor WHERE id = ?", (cursor,))
        if running:
            await copy.start()
            await until_pending(copy, 10)
        code, out, err = await copy.command("spool", "adopt", "--as", "copy")
        assert code == 0, err
        assert "webhook 10" in out
        if not running:
            await copy.start()
        await calls(copy, 5)
        balance = await copy.settled()
        assert balance["backends"]["webhook"]["parked"] == {"copied": 10}
        assert balance["backends"]["webhook"]["delivered"] == 5
        assert set(Counter(await taken(url, "webhook")).values()) == {1}


async def test_an_original_goes_on_as_before(tmp_path: Path) -> None:
    async with copied(tmp_path) as (original, copy, _):
        await original.kill()
        await copy.start()
        await until_pending(copy, 10)
        code, out, err = await copy.command("spool", "adopt", "--as", "original")
        assert (code, err) == (0, "")
        assert "delivered as before" in out
        balance = await copy.settled()
        assert balance["backends"]["webhook"]["delivered"] == 10
        code, _, err = await copy.command("spool", "adopt", "--as", "original")
        assert code == 1
        assert "not noticed to be a copy" in err


@pytest.mark.parametrize("how", ["original", "copy"])
async def test_adopted_while_nothing_runs(tmp_path: Path, how: str) -> None:
    """Also where nothing was noticed: after a snapshot of a whole volume."""
    async with copied(tmp_path) as (_, copy, _):
        code, _, err = await copy.command("spool", "adopt", "--as", how)
        assert code == 0, err
        await copy.start()
        assert (await copy.get("/readyz"))["notes"] == []
        balance = await copy.settled()
        assert balance["backends"]["webhook"]["parked"] == ({"copied": 10} if how == "copy" else {})
        assert balance["backends"]["ledger"]["delivered"] == 10


async def test_what_a_copy_recorded_itself_is_delivered_also_when_it_is_adopted_while_stopped(tmp_path: Path) -> None:
    async with copied(tmp_path) as (original, copy, url):
        await copy.start()
        await calls(copy, 5)
        await until_pending(copy, 15)
        assert await copy.stop() == 0
        code, out, err = await copy.command("spool", "adopt", "--as", "copy")
        assert (code, "webhook 10" in out) == (0, True), out + err
        await copy.start()
        balance = await copy.settled()
        assert balance["holds"]
        assert balance["backends"]["webhook"]["parked"] == {"copied": 10}
        assert balance["backends"]["webhook"]["delivered"] == 5
        assert set(Counter(await taken(url, "webhook")).values()) == {1}
        code, out, _ = await copy.command("spool", "redrive", "--reason", "copied", "--resend-unknown")
        assert code == 0, out  # the operator's own wish: what the original has sent too is there twice
        balance = await copy.settled()
        assert balance["holds"]
        assert balance["backends"]["webhook"]["parked"] == {}
        for whole in (original, copy):
            code, out, _ = await whole.command("spool", "verify")
            assert code == 0, out


async def test_an_adoption_that_is_cut_short_leaves_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing was noticed, the operator says that it is a copy, and the command dies before it has parked all."""
    async with copied(tmp_path) as (_, copy, url):
        (copy.data_dir / "place").unlink()  # as after a snapshot of a whole volume: nothing tells
        before = Counter(await taken(url, "webhook"))

        async def cut_short(*_: object) -> None:
            raise InterruptedError

        monkeypatch.setattr(removed_backend, "leave", cut_short)
        with pytest.raises(InterruptedError):
            await offline.adopt(copy.data_dir, As.COPY)
        await copy.start()
        await until_pending(copy, 10)
        assert "was copied or put back" in (await copy.get("/readyz"))["notes"][0]
        assert Counter(await taken(url, "webhook")) == before
        code, out, _ = await copy.command("spool", "adopt", "--as", "copy")
        assert (code, "webhook 10" in out) == (0, True)
        assert (await copy.settled())["holds"]
        assert Counter(await taken(url, "webhook")) == before


async def test_what_is_no_copy_is_not_taken_for_one(tmp_path: Path) -> None:
    """A restart, a kill, a move, a directory of an older version."""
    async with running_receiver() as (_, url), tiny_upstream() as upstream:
        whole = Whole(tmp_path / "data", upstream, **settings(url))
        try:
            for step in ("stop", "kill", "move", "older"):
                await whole.start()
                await calls(whole, 3)
                await whole.settled()
                assert (await whole.get("/readyz"))["notes"] == [], step
                await (whole.kill() if step == "kill" else whole.stop())
                if step == "move":
                    os.rename(tmp_path / "data", tmp_path / "moved")
                    whole.data_dir = tmp_path / "moved"
                    whole.env["SIDECAR_DATA_DIR"] = str(whole.data_dir)
                if step == "older":
                    (whole.data_dir / "place").unlink()
            await whole.start()
            assert (await whole.get("/readyz"))["notes"] == []
        finally:
            await whole.kill()


@pytest.mark.parametrize("same_inode", [True, False])
async def test_an_older_delivery_db_alone_is_noticed(tmp_path: Path, same_inode: bool) -> None:
    async with running_receiver() as (_, url), tiny_upstream() as upstream:
        whole = Whole(tmp_path / "data", upstream, **settings(url))
        try:
            await whole.start()
            await calls(whole, 3)
            await whole.settled()
            await whole.stop()
            older = shutil.copy(whole.data_dir / "delivery.db", tmp_path / "older")
            await whole.start()
            await calls(whole, 5)
            await whole.settled()
            await whole.stop()
            await whole.start()  # at every start and once a minute it is kept how far delivery has come
            await whole.stop()
            if same_inode:
                shutil.copyfile(older, whole.data_dir / "delivery.db")
            else:
                os.replace(older, whole.data_dir / "delivery.db")
            await whole.start()
            await until_pending(whole, 5)
            assert "delivery.db is" in (await whole.get("/readyz"))["notes"][0]
            assert len(await taken(url, "webhook")) == 8
        finally:
            await whole.kill()
