"""Who may read what at the admin port: by the name it is called by, and by the token."""

from __future__ import annotations

import asyncio
import socket
from contextlib import AsyncExitStack, suppress
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from sidecar.model.balance import Balance
from sidecar.runtime.admin import Readiness, application
from sidecar.runtime.admin.guard import CUSTOMER_PATHS, Crowd, Guard, open_port
from sidecar.settings import Address, Secret, SettingsError, load

TOKEN = "a-token-of-the-test"
OPEN = ("/", "/healthz", "/readyz", "/metrics", "/balance", "/times")
ANYWHERE = Address("0.0.0.0", 9464)


def guard(address: Address = ANYWHERE, token: str | None = None, *hosts: str) -> Guard:
    return Guard.of(address, None if token is None else Secret(token), hosts)


def status(one: Guard, path: str, host: str = "10.1.2.3:9464", authorization: str = "") -> int:
    refused = one.refusal(path, [host], authorization)
    return 200 if refused is None else refused.status


@pytest.mark.parametrize(
    ("host", "known"),
    [
        ("127.0.0.1", True),
        ("127.0.0.1:9464", True),
        ("10.1.2.3:9464", True),  # a scrape by the pod's address, a kubelet's probe, a published port
        ("[::1]:9464", True),
        ("[fe80::1]", True),
        ("localhost:9464", True),
        ("LOCALHOST", True),
        ("localhost.", True),
        (socket.gethostname(), True),
        ("metering.internal:1", True),
        ("Metering.Internal.", True),
        ("evil.example", False),
        ("evil.example:9464", False),
        ("127.0.0.1.evil.example", False),
        ("localhost.evil.example", False),
        ("2130706433", False),
        ("0x7f000001", False),
        ("127.1", False),
        ("127.0.0.1@evil.example", False),
        ("evil.example, 127.0.0.1", False),
        ("", False),
        ("[", False),
        ("a:b:c", False),
        ("127.0.0.1:\u0661", False),
    ],
)
def test_only_names_of_ours_are_answered(host: str, known: bool) -> None:
    one = guard(ANYWHERE, None, "metering.internal")
    assert one.knows([host]) is known
    assert status(one, "/metrics", host) == (200 if known else 421)


def test_the_listeners_own_name_and_odd_heads() -> None:
    one = guard(Address("metrics.internal", 9464))
    assert one.knows(["metrics.internal:80"])
    assert one.knows([])  # HTTP/1.0: no browser leaves it out
    assert not one.knows(["127.0.0.1", "127.0.0.1"])
    assert guard(Address(path="/s")).knows(["whatever"]), "no browser reaches a Unix socket"


@pytest.mark.parametrize("path", CUSTOMER_PATHS)
def test_what_shows_customers_needs_the_token_or_loopback(path: str) -> None:
    assert status(guard(), path) == 403
    for near in (Address("127.0.0.1", 1), Address("localhost", 1), Address("::1", 1), Address(path="/s")):
        assert status(guard(near), path) == 200
        assert status(guard(near, TOKEN), path) == 401, "a token that is set is asked for"
    one = guard(ANYWHERE, TOKEN)
    assert status(one, path, authorization=f"Bearer {TOKEN}") == 200
    assert status(one, path, authorization=f"bearer   {TOKEN} ") == 200
    for wrong in (
        "",
        TOKEN,
        f"Basic {TOKEN}",
        "Bearer",
        "Bearer ",
        f"Bearer {TOKEN}x",
        f"Bearer {TOKEN[:-1]}",
        f"Bearer {TOKEN}\udcff",
        f"Bearer{TOKEN}",
    ):
        assert status(one, path, authorization=wrong) == 401, wrong
    assert status(guard(), path, authorization="Bearer ") == 403, "no token is no empty token"
    for other in OPEN:
        assert status(guard(), other) == status(one, other) == 200


class Quiet:
    """An instance of which nothing happens."""

    async def balance(self) -> Balance:
        return Balance(admitted=0, recorded=0, open=0, lost={}, backends={})

    def fleet_balance(self) -> dict[str, object] | None:
        return None

    async def lanes_balance(self) -> dict[str, Any] | None:
        return None

    async def metrics(self) -> bytes:
        return b""

    async def readiness(self) -> Readiness:
        return Readiness(ready=True, state="ok")

    async def times(self) -> list[dict[str, Any]]:
        return []


async def test_over_a_socket() -> None:
    runner = web.AppRunner(application(Quiet(), guard(ANYWHERE, TOKEN)))
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        async with aiohttp.ClientSession() as session:
            for path in OPEN:
                async with session.get(url + path) as answer:
                    assert answer.status == 200, path
                async with session.get(url + path, headers={"Host": "evil.example"}) as answer:
                    assert answer.status == 421
                    assert "SIDECAR_ADMIN_HOSTS" in await answer.text()
            for path in ("/usage", "/%75sage", "/usage/", "/usage?by=subscriber"):
                async with session.get(url + path) as answer:
                    assert (answer.status, answer.headers["WWW-Authenticate"]) == (401, "Bearer"), path
                async with session.get(url + path, headers={"Authorization": f"Bearer {TOKEN}"}) as answer:
                    assert answer.status == 404, "there is none yet"
    finally:
        await runner.cleanup()


async def test_who_only_connects_does_not_keep_others_out() -> None:
    asked, answer = asyncio.Event(), asyncio.Event()

    async def slow(_: web.Request) -> web.Response:
        asked.set()
        await answer.wait()
        return web.Response(text="late")

    app = application(Quiet(), guard(ANYWHERE, TOKEN))
    app.router.add_get("/slow", slow)
    async with AsyncExitStack() as stack:
        listener = socket.create_server(("127.0.0.1", 0))
        await Crowd(3).serve(stack, web.AppRunner(app), listener)
        host, port = listener.getsockname()

        async def come(line: bytes) -> asyncio.StreamReader:
            reader, writer = await asyncio.open_connection(host, port)
            stack.callback(writer.close)
            writer.write(line)
            return reader

        asking = await come(b"GET /slow HTTP/1.0\r\nHost: localhost\r\n\r\n")
        await asked.wait()
        idle = [await come(b"GET / HTT") for _ in range(5)]
        healthy = await come(b"GET /healthz HTTP/1.0\r\nHost: localhost\r\n\r\n")
        assert b"alive" in await healthy.read()
        for one in idle[:3]:
            with suppress(ConnectionResetError):
                assert await one.read() == b"", "the oldest go"
        answer.set()
        assert (await asking.read()).endswith(b"late"), "older than all of them, and asking"


def settings(**values: str):  # type: ignore[no-untyped-def]
    environ = {f"SIDECAR_{name.upper()}": value for name, value in values.items()}
    return load(environ, backend_settings={"ledger": ()}, serving=False)


def test_an_open_port_is_said() -> None:
    assert open_port(settings()) is None
    assert open_port(settings(admin_listen="unix:/s")) is None
    assert open_port(settings(admin_listen="0.0.0.0:1", admin_token=TOKEN)) is None
    said = open_port(settings(admin_listen="0.0.0.0:1"))
    assert said is not None
    assert "0.0.0.0:1" in said
    assert "SIDECAR_ADMIN_TOKEN" in said


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("admin_token", "short"),
        ("admin_token", "with a blank in it!!"),
        ("admin_hosts", "http://x"),
        ("admin_hosts", "x:1"),
    ],
)
def test_settings_that_are_none(name: str, value: str) -> None:
    with pytest.raises(SettingsError) as raised:
        settings(**{name: value})
    assert f"SIDECAR_{name.upper()}" in str(raised.value)
    assert name != "admin_token" or value not in str(raised.value)
