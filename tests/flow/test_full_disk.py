"""A disk that filled up while nothing ran: the service comes up, says so, and goes on by itself when there is room."""

from __future__ import annotations

import asyncio
import contextlib
import os
import stat
import subprocess
from pathlib import Path

import aiohttp
import pytest
from small_disk import fill_up, small_disk
from tiny import tiny_upstream
from whole import Whole


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
async def test_a_disk_that_filled_up_while_nothing_ran_keeps_nothing_down(tmp_path, end, what, on_full):
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


@pytest.mark.parametrize("pages", [0, 2])
async def test_a_new_directory_on_a_full_disk_is_one_clear_line(tmp_path, pages):
    """Without room for anything, and with some for the lock alone."""
    with small_disk(tmp_path / "disk", "4m") as root:
        filler = fill_up(root)
        os.truncate(filler, filler.stat().st_size - pages * 4096)
        async with tiny_upstream() as upstream:
            whole = Whole(root / "data", upstream, SIDECAR_BACKENDS="ledger")
            whole.env["SIDECAR_DATA_DIR"] = str(root / "data")
            code, _, err = await whole.command("serve")
            assert code in (1, 2)
            said = [line for line in err.splitlines() if not line.startswith("{")]
            assert len(said) == 1, err
            assert "room" in said[0]
            assert "set SIDECAR_DATA_DIR to another disk" in said[0]
            assert "by itself" not in said[0]
            assert "move it away" not in err


async def test_a_disk_that_is_read_only_at_the_start_is_named(tmp_path):
    with small_disk(tmp_path / "disk", "64m") as root:
        async with tiny_upstream() as upstream:
            whole = Whole(root / "data", upstream, SIDECAR_BACKENDS="ledger")
            await whole.start()
            await whole.stop()
            subprocess.run(["mount", "-o", "remount,ro", str(root)], check=True)
            code, _, err = await whole.command("serve")
            assert code == 2
            assert "read-only; mount it for writing" in err
            assert "user" not in err.splitlines()[-1]


async def test_every_file_is_its_owners_alone(tmp_path):
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
