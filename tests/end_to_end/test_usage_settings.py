"""The settings of the usage side, in the whole: own fields, estimates, pinned readers, who pays by the body."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import aiohttp
from support.rawhttp import Conversation, RawUpstream, reply
from support.whole import Whole

JSON = b"Content-Type: application/json\r\n"
CHAT = b'{"id":"c1","object":"chat.completion","model":"m-1","choices":[{"finish_reason":"stop"}],"usage":%b}'
USAGE = b'{"prompt_tokens":3,"completion_tokens":4,"total_tokens":7}'


async def upstream(conversation: Conversation) -> None:
    """Answers by the path."""
    while True:
        head, _ = await conversation.message()
        target = head.split()[1]
        if target.startswith(b"/search"):
            await conversation.send(reply(b'{"meta":{"rows":12},"credits":9}', fields=JSON + b"X-Credits: 2.5\r\n"))
        elif target.startswith(b"/inner/llm"):
            await conversation.send(reply(CHAT % USAGE, fields=JSON))
        elif b"silent" in target:
            await conversation.send(reply(b'{"id":"c2","object":"chat.completion","choices":[]}', fields=JSON))
        else:
            await conversation.send(reply(b'{"ok":true}', fields=JSON))


async def call(url: str, body: Any = None, method: str = "POST", **headers: str) -> None:
    data = json.dumps(body).encode() if body is not None else None
    async with (
        aiohttp.ClientSession(headers={"Content-Type": "application/json", **headers}) as session,
        session.request(method, url, data=data) as answer,
    ):
        await answer.read()
        assert answer.status == 200


async def test_own_fields_estimates_pins_and_who_pays(tmp_path: Path) -> None:
    config = tmp_path / "sidecar.toml"
    config.write_text('[routes."/inner/llm/chat"]\nprovider = "mistral_ai"\n')
    async with RawUpstream(upstream) as behind:
        whole = Whole(
            tmp_path / "data",
            behind.url,
            SIDECAR_CONFIG=str(config),
            SIDECAR_ELEMENTS="rows=json:meta.rows,credits=header:X-Credits",
            SIDECAR_ESTIMATE="on",
            SIDECAR_PROVIDERS="/inner/llm=openrouter",
            SIDECAR_SUBSCRIBER="header:x-tenant,body:user,header:authorization:plain",
            SIDECAR_BACKENDS="ledger,file",
            SIDECAR_FILE_PATH=str(tmp_path / "out.ndjson"),
        )
        async with whole:
            url = whole.proxy_url
            await call(f"{url}/search?q=1", method="GET", Authorization="by-key")
            await call(f"{url}/inner/llm", {"model": "m-1", "user": "by-body"}, Authorization="by-key")
            await call(f"{url}/inner/llm/chat", {"model": "m-1", "user": "by-body"}, **{"x-tenant": "by-tenant"})
            await call(f"{url}/silent/v1/chat/completions", {"model": "m-2", "user": 77, "messages": ["x" * 400]})
            await call(f"{url}/things", {"pad": "x" * 100_000, "user": "behind a lot"}, method="PUT")
            await call(f"{url}/things", {"user": {"id": "nested"}}, method="PATCH")
            await whole.settled()
            records = await whole.records()
            async with aiohttp.ClientSession() as session, session.get(f"{whole.admin_url}/metrics") as answer:
                metrics = await answer.text()
            assert await whole.stop() == 0, whole.log.read_text()

    search, pinned, routed, silent, put, patch = records
    assert search["usage"]["units"] == {"rows": 12, "credits": 2.5}
    assert search["usage"]["usage_state"] == "final"
    assert pinned["usage"]["provider"] == "openrouter"
    assert routed["usage"]["provider"] == "mistral_ai"
    assert pinned["usage"]["total_tokens"] == 7
    assert silent["usage"]["usage_state"] == "estimated"
    assert silent["usage"]["input_tokens"] > 100
    assert put["usage"] is patch["usage"] is None
    subscribers = [record["subscriber"] for record in records]
    assert subscribers == [
        {"id": "by-key", "source": "header:authorization"},
        {"id": "by-body", "source": "body:user"},
        {"id": "by-tenant", "source": "header:x-tenant"},
        {"id": "77", "source": "body:user"},
        {"id": "behind a lot", "source": "body:user"},
        None,
    ]
    assert 'state="estimated"' in metrics
