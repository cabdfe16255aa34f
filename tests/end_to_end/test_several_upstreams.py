"""Several upstreams behind one port, in the whole program: each call where it belongs with its own key, told apart
wherever people look, and changed by a reload while calls go on."""

from __future__ import annotations

import asyncio
import json
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from support.whole import Reloaded

LIMIT_S = 60.0
BODY = {"model": "gpt-5-mini", "messages": []}


class Vendor:
    """A model API that says its name and the key that it was called with; some calls wait until they are let."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.url = ""
        self.calls = 0
        self.waiting = 0
        self.go = asyncio.Event()

    async def answer(self, request: web.Request) -> web.Response:
        self.calls += 1
        await request.read()
        if request.path.endswith("/slow"):
            self.waiting += 1
            await self.go.wait()
        usage = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
        row = {"id": self.name, "object": "chat.completion", "model": "gpt-5-mini", "choices": [], "usage": usage}
        return web.json_response(row, headers={"X-Key": request.headers.get("Authorization", "none")})

    async def start(self, stack: AsyncExitStack) -> Vendor:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self.answer)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        stack.push_async_callback(runner.cleanup)
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        return self


def table(name: str, prefix: str, url: str, key: Path | None = None) -> str:
    own = "" if key is None else f'set_headers = {{ authorization = "Bearer file:{key}" }}\n'
    return f'[[upstreams]]\nname = "{name}"\nprefix = "{prefix}"\nurl = "{url}"\n{own}\n'


async def post(session: aiohttp.ClientSession, url: str) -> tuple[str, str]:
    """Who answered, and with which key it was called."""
    async with session.post(url, json=BODY) as answer:
        assert answer.status == 200, await answer.text()
        return (await answer.json())["id"], answer.headers["X-Key"]


async def ndjson(whole: Reloaded, *arguments: str) -> list[dict[str, Any]]:
    code, out, err = await whole.command(*arguments, "--format", "ndjson")
    assert code == 0, err
    return [json.loads(line) for line in out.splitlines()]


@pytest.mark.timeout(180)
async def test_several_upstreams_are_told_apart_and_changed_without_a_restart(tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("sk-one\n")
    async with AsyncExitStack() as stack:
        a, b, rest = [await Vendor(name).start(stack) for name in ("a", "b", "rest")]
        quiet = '[routes."/healthz"]\nrecord = false\n\n'
        first = quiet + table("a", "/a", a.url, key) + table("b", "/b", b.url)
        whole = await stack.enter_async_context(Reloaded(tmp_path, rest.url, first, SIDECAR_LOG_LEVEL="ERROR"))
        session = await stack.enter_async_context(aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=1)))
        chat = "/v1/chat/completions"
        for _ in range(3):  # the third goes the short way
            assert await post(session, f"{whole.proxy_url}/a{chat}") == ("a", "Bearer sk-one")
        assert await post(session, f"{whole.proxy_url}/b{chat}") == ("b", "none")
        assert await post(session, f"{whole.proxy_url}{chat}") == ("rest", "none")
        for _ in range(2):
            assert await post(session, f"{whole.proxy_url}/b/healthz") == ("b", "none")
        balance = await whole.settled()
        assert (balance["holds"], balance["recorded"]) == (True, 5)
        await whole.until_metric('sidecar_not_recorded_total{route="/healthz"} 2')

        # Told apart by every way to ask.
        by_name = {row["upstream"]: row["calls"] for row in await ndjson(whole, "usage", "--by", "upstream")}
        assert by_name == {"a": 3, "b": 1, "default": 1}
        over_http = await whole.get("/usage?by=upstream,model&where=upstream=b")
        assert [(row["upstream"], row["model"], row["calls"]) for row in over_http] == [("b", "gpt-5-mini", 1)]
        records = await ndjson(whole, "records", "--where", "upstream=a")
        assert [row["upstream"] for row in records] == ["a"] * 3
        code, out, _ = await whole.command("records", "--format", "csv", "--where", "upstream=b")
        assert (code, out.splitlines()[0].rpartition(",")[2], out.splitlines()[1].rpartition(",")[2]) == (
            0,
            "upstream",
            "b",
        )

        # What is wrong changes nothing.
        code, said = await whole.reload(quiet + table("a", "/a", a.url, key) + table("c", "/a", b.url))
        assert code == 1
        assert "two upstreams have the prefix /a: expected another for each" in said
        key.rename(tmp_path / "moved")
        code, said = await whole.reload(first)
        assert code == 1
        assert f"a: set_headers: authorization: '{key}' cannot be read: No such file or directory" in said
        assert "sk-one" not in said
        assert await post(session, f"{whole.proxy_url}/a{chat}") == ("a", "Bearer sk-one")
        assert await post(session, f"{whole.proxy_url}/b{chat}") == ("b", "none")

        # What is right holds from then on; a call that is open ends where it began, on a connection that stays.
        key.write_text("sk-two\n")
        other = await stack.enter_async_context(aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=1)))
        open_call = asyncio.create_task(post(other, f"{whole.proxy_url}/a/slow"))
        async with asyncio.timeout(LIMIT_S):
            while not a.waiting:
                await asyncio.sleep(0.01)
        opened = {each.transport.get_extra_info("sockname") for each in _connections(session)}
        code, said = await whole.reload(quiet + table("a", "/a", b.url, key) + table("c", "/c", a.url))
        assert (code, said) == (0, "reloaded\n")

        async def moved() -> bool:
            return await post(session, f"{whole.proxy_url}/a{chat}") == ("b", "Bearer sk-two")

        async with asyncio.timeout(LIMIT_S):
            while not await moved():
                await asyncio.sleep(0.02)
        assert await post(session, f"{whole.proxy_url}/c{chat}") == ("a", "none")
        assert await post(session, f"{whole.proxy_url}/b{chat}") == ("rest", "none"), "its prefix is nobody's any more"
        assert {each.transport.get_extra_info("sockname") for each in _connections(session)} == opened
        a.go.set()
        assert await open_call == ("a", "Bearer sk-one")
        assert await post(other, f"{whole.proxy_url}/a{chat}") == ("b", "Bearer sk-two")
        assert (await whole.reload(quiet))[0] == 0

        async def one_only() -> bool:
            return await post(session, f"{whole.proxy_url}/a{chat}") == ("rest", "none")

        async with asyncio.timeout(LIMIT_S):
            while not await one_only():
                await asyncio.sleep(0.02)
        balance = await whole.settled()
        assert balance["holds"], balance
        assert balance["recorded"] == a.calls + b.calls + rest.calls - 2
        assert all(row["outcome"] == "complete" for row in await ndjson(whole, "records"))


def _connections(session: aiohttp.ClientSession) -> list[Any]:
    """The idle ones of aiohttp's client."""
    assert session.connector is not None
    return [protocol for pool in session.connector._conns.values() for protocol, _ in pool]
