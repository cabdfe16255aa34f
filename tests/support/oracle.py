"""A client that remembers only what it is owed: each response that it received complete.

Every call carries its own name, so the judge can tell exactly which record belongs to which response: in `x-call`,
which the sidecar under test files as a dimension, and which makes a head that is like no other; or, most of them, in
the target alone, so that many calls are of one kind.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import aiohttp

CHAT = {"model": "gpt-5-mini", "messages": [{"role": "user", "content": "verse"}]}
STREAM = CHAT | {"stream": True, "stream_options": {"include_usage": True}}
SETTINGS = {
    "SIDECAR_DIMENSIONS": "call=x-call",
    "SIDECAR_QUERY_VALUES": "call",
    "SIDECAR_SUBSCRIBER": "header:x-tenant",
}
IN_TARGET = 0.7  # of all calls: named there


@dataclass
class Oracle:
    """Keeps `clients` calls under way until told to stop."""

    url: Callable[[], str]
    seed: int = 1
    clients: int = 6
    tenants: tuple[str, ...] = ("tenant-0", "tenant-1", "tenant-2")
    pause_s: float = 0.0  # between two calls of a client
    sent: int = 0
    owed: dict[str, str] = field(default_factory=dict)  # call -> what kind it was
    _stopping: bool = False

    async def run(self) -> None:
        self._stopping = False
        limit = aiohttp.ClientTimeout(total=10)
        async with aiohttp.ClientSession(timeout=limit) as session:
            chances = [random.Random(self.seed + n) for n in range(self.clients)]
            await asyncio.gather(*(self._client(session, chance) for chance in chances))

    def stop(self) -> None:
        self._stopping = True

    async def _client(self, session: aiohttp.ClientSession, chance: random.Random) -> None:
        while not self._stopping:
            self.sent += 1
            call = f"call-{self.seed}-{self.sent}"
            kind = chance.choice(("chat", "chat", "stream", "thing"))
            try:
                if await self._call(session, call, kind, in_target=chance.random() < IN_TARGET):
                    self.owed[call] = kind
            except (aiohttp.ClientError, OSError, TimeoutError):
                await asyncio.sleep(0.02)  # it is down, or was killed under us: nothing is owed
            if self.pause_s:
                await asyncio.sleep(self.pause_s)

    async def _call(self, session: aiohttp.ClientSession, call: str, kind: str, *, in_target: bool = False) -> bool:
        tenant = self.tenants[self.sent % len(self.tenants)]
        headers = {"x-tenant": tenant, "authorization": "Bearer sk-test"}
        if not in_target:
            headers["x-call"] = call
        if kind == "thing":
            # POST, because aiohttp sends a GET again by itself when its connection dies: two calls of one name.
            path = f"/v1/things/{call}" if in_target else "/v1/things"
            async with session.post(self.url() + path, json={}, headers=headers) as answer:
                await answer.read()
                return answer.status == 200
        body = STREAM if kind == "stream" else CHAT
        path = "/v1/chat/completions" + (f"?call={call}" if in_target else "")
        async with session.post(self.url() + path, json=body, headers=headers) as answer:
            if kind == "chat":
                await answer.json()
                return answer.status == 200
            async for line in answer.content:
                if line.startswith(b"data: [DONE]"):
                    return answer.status == 200  # a client stops reading here: the record must be on disk now
            return False


def call_of(record: Mapping[str, Any]) -> str | None:
    """The name of a record's call."""
    named: str | None = record["dimensions"].get("call")
    url = urlsplit(record["url"])
    return named or dict(parse_qsl(url.query)).get("call") or url.path.partition("/v1/things/")[2] or None


def judge(owed: dict[str, str], records: list[dict[str, Any]]) -> None:
    """Every response received complete has exactly one record, and the record says what happened."""
    by_call = Counter(map(call_of, records))
    wrong = {f"{call} ({kind})": by_call[call] for call, kind in owed.items() if by_call[call] != 1}
    assert not wrong, f"{len(wrong)} of {len(owed)} owed calls have not exactly one record: {list(wrong.items())[:5]}"
    ids = Counter(record["id"] for record in records)
    assert max(ids.values()) == 1, f"ids that stand twice: {[i for i, n in ids.items() if n > 1][:5]}"
    for record in records:
        kind = owed.get(call_of(record) or "")
        if kind is not None:
            assert record["outcome"] == "complete", record
            assert record["status"] == 200, record
        if kind in ("chat", "stream"):
            assert record["usage"]["usage_state"] == "final", record
            assert record["usage"]["total_tokens"] == record["usage"]["input_tokens"] + record["usage"]["output_tokens"]
