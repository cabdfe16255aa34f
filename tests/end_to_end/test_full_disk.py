"""A disk that filled up while nothing ran: the service comes up, says so, and goes on by itself when there is room."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import aiohttp
import pytest
from support.small_disk import fill_up, small_disk
from support.tiny import tiny_upstream
from support.whole import ROOT, Whole, environment

from sidecar.runtime import factory
from sidecar.settings import load
from sidecar.spool import SpoolFull
from sidecar.spool.files import Reserve


async def calls(whole: Whole, count: int) -> None:
    async with aiohttp.ClientSession() as session:
        for _ in range(count):
            async with session.post(whole.proxy_url + "/v1/things") as answer:
                assert (await answer.read(), answer.status)[1] == 200


def use_up_inodes(root: Path) -> Path:
    filler = root / "many"
    filler.mkdir()
    with contextlib.suppress(OSError):
        for number in range(100_000):
            (filler / str(number)).touch()
    return filler


@pytest.mark.parametrize("on_full", ["pass", "refuse"])
@pytest.mark.parametrize("what", ["bytes", "inodes"])
@pytest.mark.parametrize("end", ["stop", "kill"])
async def test_a_disk_that_filled_up_while_nothing_ran_keeps_nothing_down(
    tmp_path: Path, end: str, what: str, on_full: str
) -> None:
    with small_disk(tmp_path / "disk", "120m,nr_inodes=300") as root:
        async with tiny_upstream() as upstream:
            whole = Whole(root / "data", upstream, SIDECAR_BACKENDS="ledger", SIDECAR_ON_SPOOL_FULL=on_full)
            whole.log = tmp_path / "log"
            try:
                await whole.start()
                await calls(whole, 5)
                await whole.settled()
                await (whole.kill() if end == "kill" else whole.stop())
                filler = fill_up(root) if what == "bytes" else use_up_inodes(root)
                await whole.start()
                if on_full == "pass":
                    await calls(whole, 5)
                subprocess.run(["rm", "-r", str(filler)], check=True)
                async with asyncio.timeout(20):
                    while (await whole.get("/readyz"))["status"] != "ok":
                        await asyncio.sleep(0.05)
                await calls(whole, 2)
                balance = await whole.settled()
                assert balance["holds"]
                assert balance["recorded"] == (12 if on_full == "pass" else 7)
                assert "move it away" not in whole.log.read_text()
            finally:
                await whole.kill()


def with_ports(whole: Whole) -> Whole:
    """Where it listens is known beforehand: it has no file to say it in."""
    ports = []
    for name in ("SIDECAR_LISTEN", "SIDECAR_ADMIN_LISTEN"):
        with socket.create_server(("127.0.0.1", 0)) as server:
            whole.env[name] = f"127.0.0.1:{server.getsockname()[1]}"
            ports.append(f"http://{whole.env[name]}")
    whole.proxy_url, whole.admin_url = ports
    return whole


async def begun(whole: Whole) -> None:
    """Started, and its admin port answers."""
    with whole.log.open("ab") as log:
        command = (sys.executable, "-m", "sidecar", "serve")
        whole.process = await asyncio.create_subprocess_exec(
            *command, env=environment(whole.env), cwd=ROOT, stderr=log, stdout=log
        )
    async with asyncio.timeout(30):
        while True:
            assert whole.process.returncode is None, whole.log.read_text()
            with contextlib.suppress(aiohttp.ClientError):
                await whole.get("/healthz")
                return
            await asyncio.sleep(0.02)


async def until_ok(whole: Whole) -> None:
    async with asyncio.timeout(20):
        while (await whole.get("/readyz"))["status"] != "ok":
            await asyncio.sleep(0.05)


@pytest.mark.parametrize(("what", "workers"), [("bytes", "2"), ("inodes", "1")])
async def test_a_new_directory_on_a_full_disk_serves_and_records_as_soon_as_there_is_room(
    tmp_path: Path, what: str, workers: str
) -> None:
    with small_disk(tmp_path / "disk", "120m,nr_inodes=300") as root:
        filler = fill_up(root) if what == "bytes" else use_up_inodes(root)
        async with tiny_upstream() as upstream:
            whole = with_ports(Whole(root / "data", upstream, SIDECAR_BACKENDS="ledger,file", SIDECAR_WORKERS=workers))
            whole.env["SIDECAR_SUBSCRIBER"] = "header:authorization"
            whole.log = tmp_path / "log"
            try:
                await begun(whole)
                await calls(whole, 5)
                ready = await whole.get("/readyz")
                assert ready["status"] == "full"
                assert "no room is left" in ready["notes"][0]
                assert "MiB" in ready["notes"][0]
                balance = await whole.get("/balance")
                assert (balance["holds"], balance["admitted"], balance["open"]) == (True, 5, 5)
                text = await whole.text("/metrics")
                assert "sidecar_spool_degraded 1.0" in text
                subprocess.run(["rm", "-r", str(filler)], check=True)
                await until_ok(whole)
                await calls(whole, 2)
                balance = await whole.settled()
                assert balance["holds"]
                assert (balance["admitted"], balance["recorded"], balance["lost"]) == (7, 7, {})
                rows = await whole.records()
                assert len({row["id"] for row in rows}) == 7
                assert len({(row["instance"], row["seq"]) for row in rows}) == 7
                assert len({row["subscriber"] for row in rows}) == 1  # the key of the hashes was kept
                assert await whole.stop() == 0
                await begun(whole)
                await calls(whole, 1)
                balance = await whole.settled()
                assert (balance["holds"], balance["recorded"]) == (True, 8)
                assert len({row["subscriber"] for row in await whole.records()}) == 1
                code, out, _ = await whole.command("spool", "verify")
                assert code == 0, out
            finally:
                await whole.kill()


async def test_what_no_room_was_found_for_until_the_end_is_said(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "4m") as root:
        fill_up(root)
        async with tiny_upstream() as upstream:
            whole = with_ports(Whole(root / "data", upstream, SIDECAR_BACKENDS="ledger"))
            whole.log = tmp_path / "log"
            await begun(whole)
            await calls(whole, 3)
            assert await whole.stop() == 1
            assert "3 calls were served and their records are lost" in whole.log.read_text()


async def test_memory_is_bounded_while_there_is_no_room_and_what_is_lost_is_in_the_balance(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "120m") as root:
        filler = fill_up(root)
        async with tiny_upstream() as upstream:
            whole = with_ports(Whole(root / "data", upstream, SIDECAR_BACKENDS="ledger"))
            whole.env["SIDECAR_SPOOL_MEMORY_BYTES"] = str(1 << 20)
            whole.log = tmp_path / "log"
            try:
                await begun(whole)
                while not (await whole.get("/balance"))["lost"]:
                    await calls(whole, 100)
                filler.unlink()
                await until_ok(whole)
                balance = await whole.settled()
                assert balance["holds"]
                assert balance["lost"]["spool_full"] == balance["admitted"] - balance["recorded"] > 0
            finally:
                await whole.kill()


@pytest.mark.parametrize("what", ["bytes", "inodes"])
async def test_a_reserve_that_was_used_up_keeps_nothing_down(tmp_path: Path, what: str) -> None:
    """Full, started, and full to the last byte before the next start."""
    with small_disk(tmp_path / "disk", "120m,nr_inodes=300") as root:
        async with tiny_upstream() as upstream:
            whole = with_ports(Whole(root / "data", upstream, SIDECAR_BACKENDS="ledger"))
            whole.log = tmp_path / "log"
            try:
                await begun(whole)
                await calls(whole, 3)
                await whole.settled()
                await whole.stop()
                Reserve(whole.data_dir, 0, 0).give_up()
                filler = fill_up(root) if what == "bytes" else use_up_inodes(root)
                await begun(whole)
                await calls(whole, 3)
                assert (await whole.get("/readyz"))["status"] == "full"
                subprocess.run(["rm", "-r", str(filler)], check=True)
                await until_ok(whole)
                balance = await whole.settled()
                assert (balance["holds"], balance["recorded"]) == (True, 6)
            finally:
                await whole.kill()


async def test_a_file_system_that_is_read_only_serves_where_it_was_written_before(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "120m") as root:
        async with tiny_upstream() as upstream:
            whole = with_ports(Whole(root / "data", upstream, SIDECAR_BACKENDS="ledger"))
            whole.log = tmp_path / "log"
            try:
                await begun(whole)
                await calls(whole, 3)
                await whole.settled()
                await whole.stop()
                subprocess.run(["mount", "-o", "remount,ro", str(root)], check=True)
                await begun(whole)
                await calls(whole, 3)
                assert "read-only" in (await whole.get("/readyz"))["notes"][0]
                subprocess.run(["mount", "-o", "remount,rw", str(root)], check=True)
                await until_ok(whole)
                balance = await whole.settled()
                assert (balance["holds"], balance["recorded"]) == (True, 6)
                await whole.stop()
                subprocess.run(["mount", "-o", "remount,ro", str(root)], check=True)
                for more in ({"SIDECAR_ON_SPOOL_FULL": "refuse"}, {"SIDECAR_DATA_DIR": str(root / "new")}):
                    other = with_ports(Whole(root / "data", upstream, SIDECAR_BACKENDS="ledger", **more))
                    other.env |= more
                    code, _, err = await other.command("serve")
                    said = why_not(err)
                    assert (code in (1, 2), len(said)) == (True, 1), err
                    assert "ead-only" in said[0]
                    assert "move it away" not in err
            finally:
                await whole.kill()


def why_not(err: str) -> list[str]:
    """What a start that failed says last; lines of the log stand before it."""
    lines = [json.loads(line) for line in err.splitlines()]
    return [line["message"] for line in lines if line["logger"] == "sidecar.start"]


@pytest.mark.parametrize("pages", [0, 2])
async def test_a_new_directory_on_a_full_disk_is_one_clear_line_with_refuse(tmp_path: Path, pages: int) -> None:
    """Without room for anything, and with some for the lock alone."""
    with small_disk(tmp_path / "disk", "4m") as root:
        filler = fill_up(root)
        os.truncate(filler, filler.stat().st_size - pages * 4096)
        async with tiny_upstream() as upstream:
            whole = Whole(root / "data", upstream, SIDECAR_BACKENDS="ledger", SIDECAR_ON_SPOOL_FULL="refuse")
            code, _, err = await whole.command("serve")
            assert code in (1, 2)
            said = why_not(err)
            assert len(said) == 1, err
            assert "room" in said[0]
            assert "free at least" in said[0] or "set SIDECAR_DATA_DIR to another disk" in said[0]
            assert "by itself" not in said[0]
            assert "move it away" not in err


def test_a_key_that_cannot_be_kept_is_said_by_name(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "4m") as root:
        settings = replace(load({}, backend_settings={"ledger": ()}, serving=False), data_dir=root)
        filler = fill_up(root)
        with pytest.raises(SpoolFull, match=r"hash\.key: no room is left on the disk"):
            factory.hash_key(settings)
        assert list(root.iterdir()) == [filler]
        filler.unlink()
        made = factory.new_hash_key()
        assert factory.hash_key(settings, made) == made == factory.hash_key(settings)


async def test_a_disk_that_is_read_only_at_the_start_is_named(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "64m") as root:
        async with tiny_upstream() as upstream:
            whole = Whole(root / "data", upstream, SIDECAR_BACKENDS="ledger", SIDECAR_ON_SPOOL_FULL="refuse")
            await whole.start()
            await whole.stop()
            subprocess.run(["mount", "-o", "remount,ro", str(root)], check=True)
            code, _, err = await whole.command("serve")
            assert code == 1
            assert "read-only; mount it for writing" in err
            assert "user" not in err.splitlines()[-1]


async def test_every_file_is_its_owners_alone(tmp_path: Path) -> None:
    async with tiny_upstream() as upstream:
        data = tmp_path / "data"
        data.mkdir(mode=0o755)
        data.chmod(0o755)
        (data / "ledger.db").touch(mode=0o644)  # left by an older version
        whole = Whole(data, upstream, SIDECAR_BACKENDS="ledger,file")
        try:
            code, out, _ = await whole.command("check")
            assert "others than user" in out, (code, out)
            await whole.start()
            await calls(whole, 3)
            await whole.settled()
            for path in data.rglob("*"):
                assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path
        finally:
            await whole.kill()
