"""Two sidecars behind a plain load balancer are restarted in turn at 100 calls a second, and no call notices.

The balancer is a real nginx with the configuration of docs/behind-nginx.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import signal
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web
from support.ports import free_port
from support.whole import START_LIMIT_S, STOP_LIMIT_S, Whole, children

ROOT = Path(__file__).parent.parent.parent
NGINX = shutil.which("nginx") or shutil.which("/usr/sbin/nginx")
PER_S = 100
LIMIT_S = 60.0  # the calls end by then, whatever becomes of the restarts
USER = "user root; " if os.geteuid() == 0 else ""  # root's worker would turn into a user who cannot read the folder
pytestmark = pytest.mark.skipif(NGINX is None, reason="nginx is not installed")


def free_ports(count: int) -> list[int]:
    """Free ones, none twice."""
    ports: set[int] = set()
    while len(ports) < count:
        ports.add(free_port())
    return list(ports)


async def until(condition: Callable[[], bool], what: str, limit_s: float = STOP_LIMIT_S) -> None:
    try:
        async with asyncio.timeout(limit_s):
            while not condition():
                await asyncio.sleep(0.02)
    except TimeoutError:
        raise AssertionError(f"not within {limit_s:.0f} s: {what}") from None


class Balancer:
    """nginx, as the page has it, but for its ports and without TLS."""

    def __init__(self, folder: Path, port: int, servers: dict[str, int]) -> None:
        self.folder, self.port, self.servers = folder, port, servers
        self.errors = folder / "errors.log"
        self.config = folder / "nginx.conf"
        self.process: asyncio.subprocess.Process | None = None

    def write(self, *names: str) -> None:
        """With these sidecars to send calls to."""
        page = (ROOT / "docs" / "behind-nginx.md").read_text()
        (block,) = re.findall(r"^```nginx\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
        for shown, name in (("127.0.0.1:8081", "one"), ("127.0.0.1:8082", "two")):
            line = re.search(rf"^ *server {shown}.*\n", block, re.MULTILINE)
            assert line is not None
            used = line[0].replace(shown, f"127.0.0.1:{self.servers[name]}") if name in names else ""
            block = block.replace(line[0], used)
        block = block.replace("listen 443 ssl;", f"listen 127.0.0.1:{self.port};")
        paths = "".join(
            f"{name}_temp_path {self.folder}/{name}; " for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        self.config.write_text(
            f"{USER}daemon off; worker_processes 1; pid {self.folder}/pid; error_log {self.errors} info;\n"
            f"events {{ worker_connections 1024; }}\nhttp {{ access_log off; {paths}\n{block} }}\n"
        )

    async def __aenter__(self) -> Balancer:
        assert NGINX is not None
        self.write(*self.servers)
        self.process = await asyncio.create_subprocess_exec(NGINX, "-e", str(self.errors), "-c", str(self.config))

        def listens() -> bool:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                return True
            return False

        await until(listens, "nginx listens", START_LIMIT_S)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self.process is not None
        if self.process.returncode is None:
            self.process.send_signal(signal.SIGTERM)
        await asyncio.wait_for(self.process.wait(), STOP_LIMIT_S)

    async def reload(self, *names: str) -> None:
        """Send calls to these from now on; back when none of those that sent them elsewhere is left."""
        assert self.process is not None
        before = set(children(self.process.pid))
        self.write(*names)
        self.process.send_signal(signal.SIGHUP)

        def changed() -> bool:
            assert self.process is not None
            now = set(children(self.process.pid))
            return bool(now) and not now & before

        await until(changed, "nginx has read its configuration anew")


@asynccontextmanager
async def application() -> AsyncIterator[str]:
    """What is behind the sidecars: it takes 20 ms, so that some calls are always open."""

    async def answer(request: web.Request) -> web.Response:
        body = await request.read()
        await asyncio.sleep(0.02)
        return web.Response(body=body or b"ok")

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", answer)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


async def calls(url: str, stop: asyncio.Event) -> Counter[str]:
    """100 a second; what became of them. Every other one is a POST, which nobody may send twice."""
    seen: Counter[str] = Counter()

    async def call(session: aiohttp.ClientSession, number: int) -> None:
        method, body = ("POST", f"call {number}".encode()) if number % 2 else ("GET", None)
        try:
            async with session.request(method, f"{url}/things/{number}", data=body) as response:
                right = await response.read() == (body or b"ok")
                seen[f"{response.status}" if right else f"{response.status}, another body"] += 1
        except aiohttp.ClientError as error:
            seen[type(error).__name__] += 1

    began_s = time.monotonic()
    # A connection for each call: an idle one would be closed by nginx's own reload, just when a call begins on it.
    connector = aiohttp.TCPConnector(force_close=True)
    async with aiohttp.ClientSession(connector=connector) as session, asyncio.TaskGroup() as group:
        for number in range(int(LIMIT_S * PER_S)):
            if stop.is_set():
                break
            group.create_task(call(session, number))
            await asyncio.sleep(max(0.0, began_s + (number + 1) / PER_S - time.monotonic()))
    return seen


async def ready(whole: Whole) -> int:
    with contextlib.suppress(aiohttp.ClientError, OSError):
        async with aiohttp.ClientSession() as session, session.get(whole.admin_url + "/readyz") as response:
            return response.status
    return 0


async def restart_told(balancer: Balancer, name: str, whole: Whole) -> None:
    """As an operator's script does it: SIGTERM, and when `/readyz` says 503 the balancer is told to leave it out. The
    delay ends by the second SIGTERM when it has done so."""
    assert whole.process is not None
    whole.process.send_signal(signal.SIGTERM)
    async with asyncio.timeout(STOP_LIMIT_S):
        while await ready(whole) != 503:
            await asyncio.sleep(0.02)
    await balancer.reload(*(other for other in balancer.servers if other != name))
    assert await whole.stop() == 0
    await whole.start()
    await balancer.reload(*balancer.servers)


async def restart_unseen(balancer: Balancer, name: str, whole: Whole) -> None:
    """Nobody tells the balancer anything. Its idle connections run out during the delay, as each response is the last
    on its own; then it learns of the end by a connection that is refused, and nothing was sent on such a one."""
    assert await whole.stop() == 0
    await whole.start()


@pytest.mark.timeout(180)
@pytest.mark.parametrize(("how", "delay_s"), [("told", "30"), ("unseen", "1")])
async def test_two_sidecars_are_restarted_in_turn_and_no_call_is_refused(
    tmp_path: Path, how: str, delay_s: str
) -> None:
    front, *ports = free_ports(5)
    names = ("one", "two")
    async with application() as upstream, contextlib.AsyncExitStack() as stack:
        sidecars = {}
        for number, name in enumerate(names):
            whole = Whole(
                tmp_path / name,
                upstream,
                SIDECAR_LISTEN=f"127.0.0.1:{ports[number]}",
                SIDECAR_ADMIN_LISTEN=f"127.0.0.1:{ports[number + 2]}",
                SIDECAR_STOP_DELAY_S=delay_s,
                SIDECAR_TRUSTED_PROXIES="127.0.0.1/32",
            )
            sidecars[name] = await stack.enter_async_context(whole)
        balancer = Balancer(tmp_path, front, dict(zip(names, ports, strict=False)))
        await stack.enter_async_context(balancer)
        stop = asyncio.Event()
        load = asyncio.create_task(calls(f"http://127.0.0.1:{front}", stop))
        try:
            for name, whole in sidecars.items():
                before = whole.process
                await (restart_told if how == "told" else restart_unseen)(balancer, name, whole)
                assert whole.process is not before
            assert not load.done(), "the restarts took longer than the calls"
        finally:
            stop.set()
            seen = await load
        print(f"{how}: {dict(seen)}")
        said = balancer.errors.read_text()
        assert set(seen) == {"200"}, said[-3000:]
        assert seen["200"] >= PER_S
        if how == "told":
            assert "refused" not in said, said[-3000:]
        # Every call is on one of the two, once.
        total = 0
        for whole in sidecars.values():
            balance = await whole.settled()
            assert balance["holds"], balance
            total += balance["recorded"]
        assert total == seen["200"]
