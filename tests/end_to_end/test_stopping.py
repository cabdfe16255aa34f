"""Stopping and not starting: `/readyz` through the whole drain, the delay before it, and start errors of one line."""

from __future__ import annotations

import asyncio
import fcntl
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import trustme
from aiohttp import web
from aiohttp.test_utils import TestServer
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)
from support.tiny import tiny_upstream
from support.whole import ROOT, Whole, environment

from sidecar.runtime import factory
from sidecar.runtime.metering import only_fault
from sidecar.settings import Settings
from sidecar.spool import SpoolError
from sidecar.storage.sockets import SocketError

CHAT = {"model": "gpt-5-mini", "messages": []}
LIMIT_S = 30.0


class Held:
    """An upstream that sends the beginning of an answer, and its end when it is let."""

    def __init__(self) -> None:
        self.go = asyncio.Event()

    async def answer(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"first ")
        await self.go.wait()
        await response.write(b"last")
        return response


async def read(url: str) -> tuple[int, str]:
    async with aiohttp.ClientSession() as session, session.get(url) as answer:
        return answer.status, await answer.text()


async def until(found: Callable[[], Any]) -> None:
    async with asyncio.timeout(LIMIT_S):
        while not await found():
            await asyncio.sleep(0.02)


@pytest.mark.parametrize("workers", ["1", "2"])
async def test_the_admin_port_answers_through_the_whole_drain(tmp_path: Path, workers: str) -> None:
    held = Held()
    app = web.Application()
    app.router.add_get("/slow", held.answer)
    async with TestServer(app) as upstream:
        whole = Whole(tmp_path / "data", str(upstream.make_url("")), SIDECAR_WORKERS=workers)
        async with whole, aiohttp.ClientSession() as session, session.get(f"{whole.proxy_url}/slow") as call:
            assert await call.content.read(6) == b"first "
            assert whole.process is not None
            whole.process.send_signal(signal.SIGTERM)

            async def is_stopping() -> bool:
                return (await read(f"{whole.admin_url}/readyz"))[0] == 503

            async def is_closed() -> bool:
                try:
                    await read(f"{whole.proxy_url}/x")
                except aiohttp.ClientError:
                    return True
                return False

            async def is_told() -> bool:
                # A worker that is busy may be left out of one answer.
                balance, metrics = await whole.get("/balance"), (await read(f"{whole.admin_url}/metrics"))[1]
                return balance["open"] == 1 and "\nsidecar_open 1.0" in metrics

            await until(is_stopping)
            await until(is_closed)
            await until(is_told)
            status, text = await read(f"{whole.admin_url}/readyz")
            assert (status, '"stopping"' in text) == (503, True)
            assert (await read(f"{whole.admin_url}/healthz"))[0] == 200
            held.go.set()
            assert await call.content.read() == b"last"
            async with asyncio.timeout(LIMIT_S):
                assert await whole.process.wait() == 0, whole.log.read_text()
        assert [record["response_bytes"] for record in await whole.records() if "/slow" in record["url"]] == [10]


async def test_the_admin_port_answers_during_the_last_delivery(tmp_path: Path) -> None:
    """A backend that takes its time at the end: the port is there until it is done, and then all is over."""
    held = Held()
    app = web.Application()
    app.router.add_post("/hook", held.answer)
    async with TestServer(app) as hook, tiny_upstream() as upstream:
        whole = Whole(
            tmp_path / "data",
            upstream,
            SIDECAR_BACKENDS="ledger,webhook",
            SIDECAR_WEBHOOK_URL=str(hook.make_url("/hook")),
            SIDECAR_WEBHOOK_SECRET="a-secret-of-the-test",
        )
        async with whole:
            await call_once(whole)
            assert whole.process is not None
            whole.process.send_signal(signal.SIGTERM)
            seen = []
            async with asyncio.timeout(LIMIT_S):
                while True:
                    try:
                        seen.append((await read(f"{whole.admin_url}/readyz"))[0])
                        seen.append(200 - (await read(f"{whole.admin_url}/balance"))[0])
                    except aiohttp.ClientError:
                        break
                    if seen.count(503) == 3:
                        held.go.set()
                    await asyncio.sleep(0.05)
                assert await whole.process.wait() == 0, whole.log.read_text()
            assert seen.count(503) >= 3, "the drain waited for the backend, and the port was there"
            assert set(seen[1::2]) == {0}, "the balance was always told"


async def call_once(whole: Whole) -> int:
    async with aiohttp.ClientSession() as session:
        async with session.post(whole.proxy_url + "/v1/chat/completions", json=CHAT) as answer:
            await answer.read()
            return answer.status


@pytest.mark.parametrize("workers", ["1", "2"])
async def test_calls_are_taken_during_the_delay_and_a_second_signal_ends_it(tmp_path: Path, workers: str) -> None:
    async with tiny_upstream() as upstream:
        whole = Whole(tmp_path / "data", upstream, SIDECAR_WORKERS=workers, SIDECAR_STOP_DELAY_S="10m")
        async with whole:
            assert (await read(f"{whole.admin_url}/readyz"))[0] == 200
            assert whole.process is not None
            # A service manager signals the workers too.
            tasks = Path(f"/proc/{whole.process.pid}/task").iterdir()
            children = [int(pid) for task in tasks for pid in (task / "children").read_text().split()]
            for pid in (whole.process.pid, *children):
                os.kill(pid, signal.SIGTERM)

            async def is_stopping() -> bool:
                return (await read(f"{whole.admin_url}/readyz"))[0] == 503

            await until(is_stopping)
            for _ in range(5):
                assert await call_once(whole) == 200
            assert await whole.stop(signal.SIGINT) == 0, whole.log.read_text()
        assert len(await whole.records()) == 5


@pytest.mark.skipif(sys.platform != "linux", reason="what a process has open is told by Linux")
async def test_a_wish_for_new_settings_ends_no_start(tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    data_dir.mkdir()
    async with tiny_upstream() as upstream:
        whole = Whole(data_dir, upstream)
        with (data_dir / "lock").open("w") as held:
            # As the workers of an instance that is gone hold it: they are waited for.
            fcntl.flock(held, fcntl.LOCK_EX)
            starting = asyncio.create_task(whole.start())
            async with asyncio.timeout(LIMIT_S):
                while whole.process is None or not _has_open(whole.process.pid, data_dir / "lock"):
                    await asyncio.sleep(0.02)
            whole.process.send_signal(signal.SIGHUP)
        await starting
        async with asyncio.timeout(LIMIT_S):
            while '"number": 1' not in (data_dir / "lock").read_text():
                await asyncio.sleep(0.02)
        assert await whole.stop() == 0, whole.log.read_text()


def _has_open(pid: int, path: Path) -> bool:
    with suppress(OSError):
        return any(one.resolve() == path for one in Path(f"/proc/{pid}/fd").iterdir())
    return False


@pytest.mark.parametrize(
    ("files", "connections", "level"),
    [(20_000, None, "DEBUG"), (4_096, None, "WARNING"), (20_000, 10_241, "WARNING"), (200_000, None, None)],
)
def test_fewer_file_descriptors_are_said_where_it_matters(
    files: int,
    connections: int | None,
    level: str | None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Not where the default is cut by a little: nobody asked for it."""
    monkeypatch.setattr(resource, "getrlimit", lambda which: (files, files))
    settings = Settings()
    if connections is not None:
        settings = replace(settings, proxy=replace(settings.proxy, connections=connections))
    caplog.set_level("DEBUG", logger=factory.log.name)
    factory.raise_file_limit(settings)
    assert [each.levelname for each in caplog.records] == ([] if level is None else [level])


async def serve(tmp_path: Path, **settings: str) -> tuple[int, str]:
    """The exit code and what was said, of a start that is expected to fail."""
    whole = Whole(
        tmp_path / "data", "http://127.0.0.1:9", SIDECAR_CONNECTIONS="100", SIDECAR_LOG_FORMAT="text", **settings
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "sidecar",
        "serve",
        env=environment(whole.env),
        cwd=ROOT,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(LIMIT_S):
            _, err = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode is not None
    return process.returncode, err.decode()


async def refused(tmp_path: Path, setting: str, listen: str, why: str, workers: str = "1") -> None:
    code, said = await serve(tmp_path, SIDECAR_WORKERS=workers, **{setting: listen})
    assert code == 1, said
    assert len(said.splitlines()) == 1, said
    assert why in said
    assert said.rstrip().endswith(f"set {setting}")


@pytest.mark.parametrize("setting", ["SIDECAR_LISTEN", "SIDECAR_ADMIN_LISTEN"])
@pytest.mark.parametrize("workers", ["1", "2"])
async def test_an_address_that_cannot_be_had_is_one_line(tmp_path: Path, setting: str, workers: str) -> None:
    with socket.create_server(("127.0.0.1", 0), reuse_port=True) as taken:
        where = f"127.0.0.1:{taken.getsockname()[1]}"
        await refused(tmp_path, setting, where, f"{where} is in use by another program", workers)
    plain = tmp_path / "plain"
    plain.write_text("mine")
    await refused(tmp_path, setting, f"unix:{plain}", "is there and is no socket: move it away", workers)
    assert plain.read_text() == "mine"


@pytest.mark.parametrize(
    ("listen", "why"),
    [
        ("192.0.2.1:0", "192.0.2.1:0 is no address of this machine"),
        ("no.such.host.invalid:0", "no address and no name that this machine knows"),
        ("unix:/no/such/directory/x.sock", "there is no directory /no/such/directory"),
    ],
)
async def test_other_addresses_that_cannot_be_had(tmp_path: Path, listen: str, why: str) -> None:
    await refused(tmp_path, "SIDECAR_LISTEN", listen, why, "2" if "unix" in listen else "1")
    await refused(tmp_path, "SIDECAR_ADMIN_LISTEN", listen, why)


async def test_a_socket_of_a_living_program_is_not_taken_away(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as taken:
        taken.bind(str(path))
        taken.listen(1)
        await refused(tmp_path, "SIDECAR_LISTEN", f"unix:{path}", "is in use by another program")
        await refused(tmp_path, "SIDECAR_ADMIN_LISTEN", f"unix:{path}", "is in use by another program", "2")
    async with tiny_upstream() as upstream:  # now nobody listens there any more
        whole = Whole(tmp_path / "data", upstream, SIDECAR_LISTEN=f"unix:{path}")
        async with whole:
            assert await whole.stop() == 0


@pytest.mark.parametrize("workers", ["1", "2"])
async def test_a_data_directory_that_cannot_be_used_is_a_wrong_setting(tmp_path: Path, workers: str) -> None:
    (tmp_path / "data").write_text("no directory")
    code, said = await serve(tmp_path, SIDECAR_WORKERS=workers)
    assert code == 2, said
    assert "set SIDECAR_DATA_DIR" in said
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize("workers", ["1", "2"])
async def test_a_certificate_that_is_none_is_one_line(tmp_path: Path, workers: str) -> None:
    for name in ("cert", "key"):
        (tmp_path / name).write_text("-----BEGIN CERTIFICATE-----\nhalf")
    code, said = await serve(
        tmp_path,
        SIDECAR_WORKERS=workers,
        SIDECAR_TLS_CERT_FILE=str(tmp_path / "cert"),
        SIDECAR_TLS_KEY_FILE=str(tmp_path / "key"),
    )
    assert code == 2, said
    assert "SIDECAR_TLS_CERT_FILE" in said
    assert "Traceback" not in said


async def test_an_unreadable_key_is_told_with_the_rest_of_the_settings(tmp_path: Path) -> None:
    """`check` and `serve` say the same, and nobody is asked for a password."""
    good, locked, bad = (tmp_path / name for name in ("good.pem", "locked.pem", "bad.pem"))
    chain = trustme.CA().issue_cert("localhost")
    chain.private_key_and_cert_chain_pem.write_to_path(good)
    key = load_pem_private_key(chain.private_key_pem.bytes(), None)
    secret = BestAvailableEncryption(b"secret")
    locked.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, secret))
    bad.write_text("nothing")
    settings = {
        "SIDECAR_TLS_CERT_FILE": str(good),
        "SIDECAR_TLS_KEY_FILE": str(locked),
        "SIDECAR_ADMIN_HOSTS": "http://x",
        "SIDECAR_UPSTREAM_CERT_FILE": str(good),
        "SIDECAR_UPSTREAM_KEY_FILE": str(bad),
        "SIDECAR_UPSTREAM_CA_FILE": str(bad),
        "SIDECAR_LOG_FORMAT": "text",
    }
    whole = Whole(tmp_path / "data", "https://127.0.0.1:9", **settings)
    for command in ("check", "serve"):
        code, _, said = await whole.command(command)
        assert code == 2
        problems = said.splitlines()[1:]
        assert len(problems) == 4, said
        for words in (
            "SIDECAR_ADMIN_HOSTS",
            "SIDECAR_TLS_KEY_FILE: the key is encrypted",
            "SIDECAR_UPSTREAM_KEY_FILE: expected",
            "SIDECAR_UPSTREAM_CA_FILE: expected",
        ):
            assert [words in problem for problem in problems].count(True) == 1, said
    good.write_bytes(chain.private_key_and_cert_chain_pem.bytes())
    whole.env.update(SIDECAR_TLS_KEY_FILE=str(good), SIDECAR_UPSTREAM_KEY_FILE=str(good), SIDECAR_ADMIN_HOSTS="x")
    whole.env.update(SIDECAR_UPSTREAM_CA_FILE=str(good))
    assert (await whole.command("check"))[0] == 0


def test_a_fault_of_a_start_is_found_in_groups_and_a_bug_is_not_hidden() -> None:
    known = (OSError, SpoolError)
    one = SocketError("in use")
    assert only_fault(BaseExceptionGroup("", [BaseExceptionGroup("", [one])]), known) is one
    assert only_fault(BaseExceptionGroup("", [SpoolError("full"), BaseExceptionGroup("", [one])]), known) is not None
    assert only_fault(BaseExceptionGroup("", [one, BaseExceptionGroup("", [ValueError()])]), known) is None


async def test_check_and_start_say_that_the_admin_port_is_open(tmp_path: Path) -> None:
    async with tiny_upstream() as upstream:
        whole = Whole(tmp_path / "data", upstream, SIDECAR_ADMIN_LISTEN="0.0.0.0:0")
        async with whole:
            assert "SIDECAR_ADMIN_TOKEN is not set" in whole.log.read_text()
            code, said, _ = await whole.command("check")
            assert (code, "note: the admin port 0.0.0.0:0 can be reached by others" in said) == (0, True)
            assert (await read(f"{whole.admin_url}/records"))[0] == 403
            assert (await read(f"{whole.admin_url}/balance"))[0] == 200
            assert whole.process is not None
            assert await whole.stop() == 0
