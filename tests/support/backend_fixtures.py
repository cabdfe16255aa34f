"""Records of every kind, a server that answers as told, and each backend ready to be tried."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl

import orjson

from sidecar.model.exchange import Exchange, Outcome, Subscriber, Usage, UsageState
from sidecar.model.record import Record, encode

T0_NS = 1_795_251_600_123_456_000  # 2026-11-21T09:00:00.123456Z
SECRET = "sk-the-secret-0123456789"


def record_id(number: int) -> str:
    return f"0199aaaa-0000-7000-8000-{number:012d}"


def usage(**changes: Any) -> Usage:
    known: dict[str, Any] = {
        "usage_state": UsageState.FINAL,
        "provider": "openai",
        "operation": "chat",
        "streamed": True,
        "model": "gpt-5-mini-2025-08-07",
        "request_model": "gpt-5-mini",
        "response_id": "resp_1",
        "input_tokens": 43,
        "output_tokens": 97,
        "total_tokens": 140,
        "cache_read_input_tokens": 0,
        "finish_reasons": ["stop"],
        "raw_usage": {"prompt_tokens": 43, "completion_tokens": 97, "total_tokens": 140},
    }
    return Usage(**{**known, **changes})


def record(number: int = 1, *, started_ns: int | None = None, **changes: Any) -> Record:
    """One record; what is not said is that of a plain, complete call."""
    known: dict[str, Any] = {
        "method": "POST",
        "url": "https://api.example.com/v1/chat/completions",
        "route": "/v1/chat/completions",
        "request_headers": ["Content-Type", "Authorization"],
        "response_headers": ["Content-Type"],
        "client_ip": "10.0.0.7",
        "user_agent": "client/1.0",
        "subscriber": Subscriber("acme", "header:x-tenant"),
        "dimensions": {"feature": "search"},
        "id": record_id(number),
        "first_byte_ms": 212.4,
        "duration_ms": 1840.9,
        "status": 200,
        "outcome": Outcome.COMPLETE,
        "request_bytes": 412,
        "response_bytes": 5120,
        "usage": usage(),
    }
    start = T0_NS + number * 1_000_000 if started_ns is None else started_ns
    exchange = Exchange(**{**known, **changes}, started_ns=start)
    return Record.from_json(encode(exchange, seq=number, instance="instance-1"))


def records(count: int) -> list[Record]:
    return [record(number) for number in range(1, count + 1)]


HOSTILE = "Zoë \u202e \x1b[31m \"';DROP TABLE calls;-- 日本語 😀 \r\nX-Injected: 1"


def odd_records() -> list[Record]:
    """Everything that a record may be and a careless encoder trips over."""
    many = {f"d{number}": "v" * 200 for number in range(40)}
    return [
        record(1, usage=None),
        record(2, subscriber=None, route=None, client_ip=None, user_agent=None, dimensions={}),
        record(3, subscriber=Subscriber(HOSTILE, "header:x-tenant"), user_agent=HOSTILE, dimensions={HOSTILE: HOSTILE}),
        record(4, url="https://api.example.com/" + "ä" * 4000, request_headers=["X-" + "h" * 200] * 60),
        record(5, usage=Usage(usage_state=UsageState.ABSENT, reason="not in the answer")),
        record(6, usage=usage(usage_state=UsageState.PARTIAL, output_tokens=None, total_tokens=None)),
        record(7, usage=usage(input_tokens=2**62, output_tokens=2**62, total_tokens=2**63 - 1)),
        record(8, usage=usage(units={"audio_seconds": 1.25, HOSTILE: "0.1", "odd": "a lot"}, cost_usd="0.000123")),
        record(9, usage=usage(model=HOSTILE * 20, request_model=None, provider=None, finish_reasons=[])),
        record(10, status=None, outcome=Outcome.CLIENT_LEFT, first_byte_ms=None, duration_ms=None, usage=None),
        record(11, status=502, outcome=Outcome.UNREACHABLE, first_byte_ms=None, usage=None),
        record(12, status=429, outcome=Outcome.DENIED, first_byte_ms=None, usage=None),
        record(13, status=400, outcome=Outcome.REFUSED, first_byte_ms=None, usage=None),
        record(14, status=None, outcome=Outcome.UNKNOWN, first_byte_ms=None, duration_ms=None, usage=None),
        record(15, dimensions=many, usage=usage(cost_usd="1e999999")),
        record(16, method="M-SEARCH", parent_id=record_id(1), status=None, first_byte_ms=None),
        record(17, status=401, subscriber=Subscriber("key_" + "0" * 32, "header:x-api-key"), usage=None),
        record(18, usage=usage(input_tokens=0, output_tokens=0, total_tokens=0, raw_usage={"x": SECRET})),
    ]


@dataclass(frozen=True, slots=True)
class Request:
    """What arrived at the scripted server."""

    method: str
    target: str
    headers: dict[str, str]  # names in lower case
    body: bytes


class Cut(bytes):
    """Sent, and then the connection is closed, whatever was promised."""


Script = Callable[[Request], bytes | None]


def answer(status: int, body: bytes = b"{}", **headers: str) -> bytes:
    """A whole HTTP/1.1 answer; header names are written with `_` for `-`."""
    lines = [f"HTTP/1.1 {status} Reason", f"Content-Length: {len(body)}", "Content-Type: application/json"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


@contextlib.asynccontextmanager
async def listening(
    serve: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]], tls: ssl.SSLContext | None = None
) -> AsyncIterator[int]:
    """A port that serves so, connection by connection, and leaves none behind."""
    tasks: set[asyncio.Task[None]] = set()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            await serve(reader, writer)
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            tasks.discard(task)
            writer.close()

    server = await asyncio.start_server(accept, "127.0.0.1", 0, ssl=tls)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for task in list(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def vendor_yes(request: Request) -> bytes:
    """What the vendor whose path this is answers to something that it takes."""
    path = request.target.partition("?")[0]
    match path.rpartition("/v1/api")[2] if "/meter/v1/api" in path else path:
        case "/v1/billing/meter_events":
            identifier = dict(parse_qsl(request.body.decode())).get("identifier")
            return answer(200, orjson.dumps({"object": "billing.meter_event", "identifier": identifier}))
        case "/v2/billing/meter_events":
            identifier = orjson.loads(request.body)["identifier"]
            return answer(200, orjson.dumps({"object": "v2.billing.meter_event", "identifier": identifier}))
        case "/v2/billing/meter_event_session":
            return answer(200, b'{"authentication_token": "t"}')
        case "/event":
            return answer(201)
        case "/meter/v2/events" | "/meter/v2/ai/completions":
            return answer(200, b'{"id": "x", "label": "x", "resourceType": "metering", "signature": "s"}')
        case "/api/v1/meters/report":
            return answer(202, b'{"status": "queued", "requestId": "r"}')
        case "/v1/events/bulk":
            return answer(202, b'{"message": "Events accepted for processing"}')
        case "/api/v1/events":
            return answer(204, b"")
        case "/openmeter/events" | "/v3/openmeter/events":
            return answer(202, b"")
        case "/api/v1/events/batch":
            return answer(200, request.body)  # it gives back what it took
        case "/" | "/collect" | "/meter" | "/meter/rate" | "/meter/ingest":
            return answer(200)
    raise AssertionError(f"{path} has no yes: give `vendor_yes` (tests/support/backend_fixtures.py) a case for it")


@dataclass
class ScriptedServer:
    """A backend on a real socket. `script` gives the bytes to answer with; None cuts the connection."""

    script: Script = vendor_yes
    requests: list[Request] = field(default_factory=list)
    connections: int = 0
    url: str = ""
    hold: asyncio.Event | None = None

    def says(self, reply: bytes | None) -> None:
        """Answer everything with `reply` from now on."""
        self.script = lambda _: reply

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[ScriptedServer]:
        async with listening(self._serve) as port:
            self.url = f"http://127.0.0.1:{port}"
            yield self

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        while True:
            begin = await reader.readexactly(1)
            if begin == b"\x16":
                return  # asked whether it speaks TLS
            head = (begin + await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            first, *lines = head.rstrip("\r\n").split("\r\n")
            method, target, _ = first.split(" ")
            pairs = (line.split(":", 1) for line in lines)
            headers = {name.lower(): value.strip() for name, value in pairs}
            body = await reader.readexactly(int(headers.get("content-length", "0")))
            request = Request(method, target, headers, body)
            self.requests.append(request)
            if self.hold is not None:
                await self.hold.wait()
            reply = self.script(request)
            if reply is None:
                return
            writer.write(reply)
            await writer.drain()
            if isinstance(reply, Cut):
                return


def kinds_of(verdicts: Sequence[object]) -> list[str]:
    return [type(verdict).__name__ for verdict in verdicts]
