"""Who may change something: only who can open `control.sock`; each change is logged; the TCP port only reads."""

from __future__ import annotations

import json
import os
import shutil
import socket
import stat
import struct
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from support.tiny import tiny_upstream
from support.whole import Whole

from sidecar.runtime.admin.control import CHANGES
from sidecar.storage import sockets

CHAT = {"model": "gpt-5-mini", "messages": []}


async def one_call(whole: Whole) -> dict[str, Any]:
    async with aiohttp.ClientSession() as session:
        async with session.post(whole.proxy_url + "/v1/chat/completions", json=CHAT) as answer:
            await answer.read()
    await whole.settled()
    (record,) = await whole.records()
    return record


def log_lines(whole: Whole, message: str) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in whole.log.read_text().splitlines() if line.startswith("{")]
    return [row for row in rows if row["message"] == message]


@pytest.mark.parametrize("workers", ["1", "2"])
async def test_the_admin_port_changes_nothing_and_the_socket_says_who_did(tmp_path: Path, workers: str) -> None:
    async with tiny_upstream() as upstream:
        whole = Whole(tmp_path / "data", upstream, SIDECAR_WORKERS=workers, SIDECAR_LOG_LEVEL="INFO")
        async with whole:
            record = await one_call(whole)
            path = whole.data_dir / "control.sock"
            assert stat.S_ISSOCK(path.lstat().st_mode)
            assert stat.S_IMODE(path.lstat().st_mode) == 0o600
            async with aiohttp.ClientSession() as session:
                for name in CHANGES:
                    async with session.post(f"{whole.admin_url}/{name}", json={"id": record["id"]}) as answer:
                        assert answer.status in (404, 405), name
            assert (await whole.get("/balance"))["backends"]["ledger"]["delivered"] == 1
            code, out, err = await whole.command("spool", "cancel", record["id"])
            assert (code, err) == (0, ""), out
            (row,) = log_lines(whole, "cancel")
            assert row["level"] == "INFO"
            assert row["uid"] == os.getuid()
            assert row["asked"] == {"id": record["id"]}
            assert row["done"] == row["of"] == 1
            assert (await whole.get("/balance"))["backends"]["ledger"]["skipped"] == {"cancelled": 1}
            assert await whole.stop() == 0
        assert not path.exists()


async def test_a_deep_directory_and_a_socket_that_was_left_behind(tmp_path: Path) -> None:
    """The path is longer than a socket's address may be, and a killed instance leaves its file."""
    async with tiny_upstream() as upstream:
        deep = tmp_path / ("d" * 90) / ("e" * 90) / "data"
        deep.parent.mkdir(parents=True)
        whole = Whole(deep, upstream)
        async with whole:
            record = await one_call(whole)
            await whole.kill()
            assert (deep / "control.sock").exists()
            code, out, _ = await whole.command("spool", "cancel", "nobody")  # nobody runs: the lock is taken
            assert (code, "nothing is known" in out) == (1, True)
            await whole.start()
            code, out, err = await whole.command("spool", "cancel", "nobody", record["id"])
            assert code == 1, out + err
            assert ["nothing is known of nobody" in out, "taken back" in out] == [True, True], "each by itself"
            code, out, err = await whole.command("spool", "cancel", record["id"])
            assert (code, "nothing is known" in out) == (1, True), out + err
            assert await whole.stop() == 0
        assert not (deep / "control.sock").exists()


async def test_something_else_in_its_place_is_kept_and_calls_are_served(tmp_path: Path) -> None:
    async with tiny_upstream() as upstream:
        whole = Whole(tmp_path / "data", upstream)
        whole.data_dir.mkdir()
        place = whole.data_dir / "control.sock"
        place.write_text("mine")
        async with whole:
            await one_call(whole)
            code, _, err = await whole.command("spool", "redrive")
            assert code == 1
            assert "has no control.sock" in err
            assert "is there and is no socket: move it away" in whole.log.read_text()
            assert await whole.stop() == 0
        assert place.read_text() == "mine"


def test_nobody_gets_in_before_the_mode_is_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the umask, there is no moment at which the socket accepts and is open to others."""
    path, modes = tmp_path / "control.sock", []
    listen = socket.socket.listen

    def watched(self: socket.socket, backlog: int) -> None:
        modes.append(stat.S_IMODE(path.lstat().st_mode))
        listen(self, backlog)

    monkeypatch.setattr(socket, "socket", type("Watched", (socket.socket,), {"listen": watched}))
    old = os.umask(0)
    try:
        with sockets.listen_privately(path):
            assert modes == [0o600]
    finally:
        os.umask(old)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs another user")
async def test_another_user_is_told_so(tmp_path: Path) -> None:
    async with tiny_upstream() as upstream:
        whole = Whole(tmp_path / "data", upstream)
        async with whole:
            path = whole.data_dir / "control.sock"
            for directory in (whole.data_dir, *whole.data_dir.parents):
                if directory != Path("/") and directory.stat().st_uid == os.geteuid():
                    directory.chmod(directory.stat().st_mode | 0o005)
            with pytest.raises(PermissionError):
                as_nobody(lambda: sockets.connect(path, timeout_s=5))
            assert await whole.stop() == 0


def as_nobody(do: Any) -> None:
    """Raises what it raised there, by number."""
    ours, theirs = socket.socketpair()
    if (pid := os.fork()) == 0:
        number = 0
        try:
            os.setgid(65534)
            os.setuid(65534)
            do()
        except OSError as error:
            number = error.errno or -1
        finally:
            theirs.send(struct.pack("i", number))
            os._exit(0)
    os.waitpid(pid, 0)
    (number,) = struct.unpack("i", ours.recv(4))
    ours.close()
    theirs.close()
    if number:
        raise OSError(number, os.strerror(number))


def test_who_asks_is_known(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 120) / "control.sock"
    path.parent.mkdir()
    with sockets.listen_privately(path) as listener, sockets.connect(path, timeout_s=5):
        accepted, _ = listener.accept()
        with accepted:
            assert sockets.peer_uid(accepted.fileno()) == os.getuid()
    with pytest.raises(sockets.SocketError, match="cannot be made"):
        sockets.listen_privately(tmp_path / "none" / "control.sock")
    shutil.rmtree(path.parent)
