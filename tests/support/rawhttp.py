"""Raw sockets on both sides of the proxy, so that a test sees every byte, and nothing is mended on the way.

`Hop` is a running proxy between `RawUpstream` (a scripted server: one coroutine a connection) and
`RawClient` (a socket with a few readers). `ListRecorder` keeps what the proxy hands over; `FrameTaps`
is a usage reader whose end mark and usage are plain words in the body.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import socket
import ssl
import struct
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
from support import ways
from support.ports import bound

from sidecar.model.exchange import Exchange, Outcome, PlainExchange, Release, Subscriber, Usage, UsageState
from sidecar.proxy import Attribute, Proxy, Route
from sidecar.proxy.context import AttributeByBody
from sidecar.settings import ProxySettings
from sidecar.usage import RawHeaders, ResponseFilter, SocketTap, Taps
from sidecar.usage.plain_calls import PlainReader

PATIENCE_S = 15.0  # how long a test waits for what must come


class Conversation:
    """One TCP connection with readers that a test can say what it wants with."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.seen = b""  # bytes read and not taken

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        async with asyncio.timeout(PATIENCE_S):
            await self.writer.drain()

    async def until(self, mark: bytes) -> bytes:
        """Read up to and with `mark`. Raises `EOFError` when it does not come."""
        async with asyncio.timeout(PATIENCE_S):
            while mark not in self.seen:
                piece = await self.reader.read(262_144)
                if not piece:
                    raise EOFError(f"closed before {mark!r}; got {self.seen!r}")
                self.seen += piece
        end = self.seen.index(mark) + len(mark)
        taken, self.seen = self.seen[:end], self.seen[end:]
        return taken

    async def exactly(self, size: int) -> bytes:
        came = bytearray(self.seen)  # to bytes each piece would be added by copying all of them
        while len(came) < size:
            async with asyncio.timeout(PATIENCE_S):
                piece = await self.reader.read(262_144)
            if not piece:
                raise EOFError(f"closed after {len(came)} of {size} bytes")
            came += piece
        self.seen = bytes(came[size:])
        return bytes(came[:size])

    async def head(self) -> bytes:
        return await self.until(b"\r\n\r\n")

    async def message(self, *, head_only: bool = False) -> tuple[bytes, bytes]:
        """A head and its body as framed; chunks are left as they are."""
        head = await self.head()
        return head, b"" if head_only else await self.body_of(head)

    async def body_of(self, head: bytes) -> bytes:
        lower = head.lower()
        if b"\r\ntransfer-encoding:" in lower:
            return await self.chunked()
        for line in lower.split(b"\r\n"):
            if line.startswith(b"content-length:"):
                return await self.exactly(int(line.partition(b":")[2]))
        return b""

    async def chunked(self) -> bytes:
        """A chunked body, raw, with its trailers."""
        raw = b""
        while True:
            line = await self.until(b"\r\n")
            raw += line
            size = int(line.partition(b";")[0], 16)
            if size == 0:
                while True:
                    line = await self.until(b"\r\n")
                    raw += line
                    if line == b"\r\n":
                        return raw
            raw += await self.exactly(size + 2)

    async def rest(self) -> bytes:
        """Everything up to a clean end. Raises `ConnectionResetError` on a cut."""
        came = bytearray(self.seen)
        self.seen = b""
        async with asyncio.timeout(PATIENCE_S):
            while piece := await self.reader.read(262_144):
                came += piece
        return bytes(came)

    async def silent(self, seconds: float = 0.05) -> bool:
        """Whether nothing comes for a while."""
        if self.seen:
            return False
        try:
            async with asyncio.timeout(seconds):
                self.seen += await self.reader.read(1)
        except TimeoutError:
            return True
        return False

    def reset(self) -> None:
        """Leave rudely."""
        sock = self.writer.get_extra_info("socket")
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()

    def drop(self) -> None:
        """Be done with it, whatever its state."""
        if not self.writer.transport.is_closing():
            self.writer.transport.abort()

    async def close(self) -> None:
        self.writer.close()
        with contextlib.suppress(ConnectionError, ssl.SSLError, TimeoutError):
            async with asyncio.timeout(PATIENCE_S):
                await self.writer.wait_closed()


Script = Callable[[Conversation], Awaitable[None]]


def dechunk(raw: bytes) -> bytes:
    """The content of a chunked body."""
    out = b""
    while True:
        line, _, raw = raw.partition(b"\r\n")
        size = int(line.partition(b";")[0], 16)
        if size == 0:
            return out
        out, raw = out + raw[:size], raw[size + 2 :]


def fields_of(head: bytes) -> list[tuple[bytes, bytes]]:
    """The field lines of a head, in order."""
    return [
        (name, value.strip(b" "))
        for name, _, value in (line.partition(b":") for line in head.split(b"\r\n")[1:] if line)
    ]


def field_of(head: bytes, name: bytes) -> bytes | None:
    """The value of one field; None where it is absent. Repeats are an error of the test."""
    found = [value for known, value in fields_of(head) if known.lower() == name.lower()]
    assert len(found) < 2, f"{name!r} is repeated in {head!r}"
    return found[0] if found else None


class RawUpstream:
    """A scripted server. `script` runs once a connection; `connections` counts them."""

    def __init__(self, script: Script, *, tls: ssl.SSLContext | None = None, path: str | None = None) -> None:
        self._script = script
        self._tls = tls
        self._path = path
        self._server: asyncio.AbstractServer | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self.connections = 0
        self.open: list[Conversation] = []
        self.errors: list[BaseException] = []
        self.port = 0

    async def __aenter__(self) -> RawUpstream:
        if self._path is not None:
            self._server = await asyncio.start_unix_server(self._accept, self._path)
        else:
            server = await bound(lambda port: asyncio.start_server(self._accept, "127.0.0.1", port, ssl=self._tls))
            self._server, self.port = server, server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *exc: object) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for conversation in self.open:
            conversation.drop()
        if exc[0] is None and self.errors:
            raise self.errors[0]

    @property
    def url(self) -> str:
        if self._path is not None:
            return f"unix:{self._path}"
        return f"http{'s' if self._tls else ''}://{'localhost' if self._tls else '127.0.0.1'}:{self.port}"

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.connections += 1
        conversation = Conversation(reader, writer)
        self.open.append(conversation)
        try:
            await self._script(conversation)
        except (EOFError, ConnectionError, asyncio.CancelledError):
            pass
        except BaseException as error:
            self.errors.append(error)
        finally:
            self._tasks.discard(task)
            writer.close()


class ListRecorder:
    """Keeps exchanges in lists. `hold` keeps answers back until `let_go`; `full` takes no more calls."""

    def __init__(self) -> None:
        self.admitted: list[Exchange | PlainExchange] = []
        self.records: list[Exchange] = []
        self.hold = False
        self.full = False
        self.held: list[Release] = []
        self.plain: PlainReader | None = None  # reads what took the short way
        self.plain_calls = 0
        self._done: set[str] = set()
        self._changed = asyncio.Event()

    def admit(self, exchange: Exchange | PlainExchange) -> bool:
        if self.full:
            return False
        exchange.id = f"{len(self.admitted):036d}"
        exchange.started_ns = time.time_ns()
        exchange.started_mono_ns = time.monotonic_ns()
        self.admitted.append(exchange)
        return True

    def complete(self, exchange: Exchange | PlainExchange, release: Release | None) -> bool:
        assert exchange.id not in self._done, "an exchange ended twice"
        self._done.add(exchange.id)
        assert any(exchange.id == known.id for known in self.admitted[-1000:]), (
            "an exchange ended that was never let in"
        )
        if isinstance(exchange, PlainExchange):
            assert self.plain is not None
            self.plain_calls += 1
            exchange = self.plain.exchange(exchange)
        self.records.append(exchange)
        self._changed.set()
        if self.hold and release is not None:
            self.held.append(release)
            return False
        return True

    def let_go(self, send: bool = True) -> None:
        held, self.held = self.held, []
        for release in held:
            release(send)

    async def ended(self, count: int = 1) -> Exchange:
        """Wait until `count` calls have ended; the last of them."""
        async with asyncio.timeout(PATIENCE_S):
            while len(self.records) < count:
                self._changed.clear()
                await self._changed.wait()
        assert len(self.records) == count, self.records
        return self.records[-1]

    async def let_in(self, count: int = 1) -> None:
        await until(lambda: len(self.admitted) >= count)


async def until(true: Callable[[], bool]) -> None:
    """Wait for a condition, with a limit."""
    async with asyncio.timeout(PATIENCE_S):
        while not true():
            await asyncio.sleep(0.002)


class _FrameRequestTap:
    may_ask = False
    opened_ns = 0

    def __init__(self) -> None:
        self.size = 0

    def feed(self, piece: bytes) -> None:
        self.size += len(piece)

    def with_usage_asked(self, body: bytes) -> bytes | None:
        raise AssertionError("it did not offer to")

    def member(self, name: str) -> str | None:
        return None

    def unanswered(self) -> Usage | None:
        return None


class _FrameResponseTap:
    """Usage is `<usage>`, the end mark is `<end>`; both in one piece each."""

    behind = False
    skips = None

    def __init__(self) -> None:
        self.size = 0
        self.usage_seen = False
        self.end_seen = False

    @property
    def waiting(self) -> bool:
        return not self.usage_seen

    def feed(self, piece: bytes) -> bool:
        self.size += len(piece)
        self.usage_seen = self.usage_seen or b"<usage>" in piece
        self.end_seen = self.end_seen or b"<end>" in piece
        return self.end_seen

    def finish(self, whole: bool) -> Usage | None:
        state = UsageState.FINAL if self.usage_seen else UsageState.ABSENT if whole else UsageState.PARTIAL
        return Usage(usage_state=state, output_tokens=self.size)


class FrameTaps:
    """Taps every call under /model."""

    def kind(self, method: str, target: str) -> bool:
        return target.startswith("/model")

    def request(self, method: str, target: str, headers: RawHeaders) -> _FrameRequestTap | None:
        return _FrameRequestTap() if target.startswith("/model") else None

    def response(self, request: Any, status: int, headers: RawHeaders) -> _FrameResponseTap | None:
        return _FrameResponseTap() if status == 200 else None

    def answer_filter(self, status: int, headers: RawHeaders) -> ResponseFilter | None:
        raise AssertionError("nothing was asked")

    def websocket(self, target: str, headers: RawHeaders) -> SocketTap | None:
        return None


@dataclass
class Counts:
    """What the proxy counted."""

    rejected: list[str] = field(default_factory=list)
    limits: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    redirects: list[str] = field(default_factory=list)
    not_recorded_routes: list[str] = field(default_factory=list)
    failed_upstreams: list[str | None] = field(default_factory=list)
    retries: int = 0
    drains: int = 0
    connections: int = 0

    def request_rejected(self, reason: str) -> None:
        self.rejected.append(reason)

    def upstream_retried(self) -> None:
        self.retries += 1

    def not_recorded(self, route: str) -> None:
        self.not_recorded_routes.append(route)

    def upstream_failed(self, reason: str, upstream: str | None) -> None:
        self.failures.append(reason)
        self.failed_upstreams.append(upstream)

    def redirected(self, what: str) -> None:
        self.redirects.append(what)

    def drains_changed(self, delta: int) -> None:
        self.drains += delta

    def connections_changed(self, delta: int) -> None:
        self.connections += delta

    def limit_reached(self, name: str) -> None:
        self.limits.append(name)


def by_tenant(headers: RawHeaders, target: str, client_ip: str | None) -> tuple[Subscriber | None, Mapping[str, str]]:
    for name, value in headers:
        if name.lower() == b"x-tenant":
            return Subscriber(value.decode("latin-1"), "header:x-tenant"), {}
    return None, {}


class PlainByTenant:
    """`by_tenant`, for the short way."""

    reads = frozenset({b"x-tenant"})

    def plainly(
        self, headers: RawHeaders, target: str, client_ip: str | None
    ) -> tuple[Subscriber | None, Mapping[str, str]] | None:
        return by_tenant(headers, target, client_ip)

    def by_target(self, target: str) -> str:
        return ""


def plainly(attribute: Attribute | None) -> PlainByTenant | None:
    """What opens the short way, where a test has it open."""
    return PlainByTenant() if ways.short_open and attribute in (None, by_tenant) else None


def by_first_segment(method: str, path: str) -> str | None:
    segment = path.split("/")[1] if path.startswith("/") else ""
    return f"/{segment}" if segment else None


class Hop:
    """A proxy in front of a scripted upstream, and clients for it."""

    def __init__(
        self,
        upstream_url: str | None,
        *,
        taps: Taps | None = None,
        attribute: Attribute | None = None,
        attribute_by_body: AttributeByBody | None = None,
        route: Route | None = None,
        **settings: Any,
    ) -> None:
        self.recorder = ListRecorder()
        self.counts = Counts()
        self.settings = ProxySettings(upstream_url=upstream_url, **settings)
        taps = taps or FrameTaps()
        self.recorder.plain = PlainReader(taps, attribute_by_body, self.counts.limit_reached)
        self.proxy = Proxy(
            settings=self.settings,
            recorder=self.recorder,
            taps=taps,
            attribute=attribute or by_tenant,
            attribute_by_body=attribute_by_body,
            plainly=plainly(attribute),
            route=route or by_first_segment,
            metrics=self.counts,
        )
        self.port = 0
        self._clients: list[Conversation] = []

    async def __aenter__(self) -> Hop:
        await self.proxy.start()
        where = await bound(lambda port: self.proxy.listen(host="127.0.0.1", port=port))
        self.port = int(where[1])
        return self

    async def __aexit__(self, *exc: object) -> None:
        for client in self._clients:
            client.drop()
        await self.proxy.aclose()
        if exc[0] is None:
            await until(lambda: self.proxy.open_calls == 0)
            assert len(self.recorder.records) == len(self.recorder.admitted), "a call was let in and left no record"
            assert self.counts.drains == 0
            await until(lambda: self.counts.connections == 0)

    async def client(
        self, *, tls: ssl.SSLContext | None = None, path: str | None = None, receive_buffer: int | None = None
    ) -> Conversation:
        limit = 2**16
        if path is not None:
            reader, writer = await asyncio.open_unix_connection(path, limit=limit)
        elif receive_buffer is not None:
            sock = socket.socket()
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
            sock.setblocking(False)
            await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", self.port))
            reader, writer = await asyncio.open_connection(sock=sock, limit=receive_buffer)
        else:
            name = "localhost" if tls else None
            reader, writer = await asyncio.open_connection(
                "127.0.0.1", self.port, ssl=tls, server_hostname=name, limit=limit
            )
        client = Conversation(reader, writer)
        self._clients.append(client)
        return client

    async def call(self, request: bytes, **options: Any) -> tuple[bytes, bytes]:
        """One request on a connection of its own; head and raw body of the answer."""
        client = await self.client()
        await client.send(request)
        answer = await client.message(**options)
        await client.close()
        return answer

    async def last(self, request: bytes) -> bytes:
        """One request on a connection of its own; all that comes until the proxy closes it."""
        client = await self.client()
        await client.send(request)
        return await client.rest()


def answering(answer: bytes, *, seen: list[bytes] | None = None) -> Script:
    """A script: take whole requests, give the same answer to each, keep the requests."""

    async def script(conversation: Conversation) -> None:
        while True:
            head, body = await conversation.message()
            if seen is not None:
                seen.append(head + body)
            await conversation.send(answer)

    return script


def reply(body: bytes = b"ok", status: bytes = b"200 OK", fields: bytes = b"") -> bytes:
    """A sized answer."""
    return b"HTTP/1.1 %b\r\n%bContent-Length: %d\r\n\r\n%b" % (status, fields, len(body), body)


__all__ = [
    "Conversation", "Counts", "FrameTaps", "Hop", "ListRecorder", "Outcome", "RawUpstream", "answering", "dechunk",
    "field_of", "fields_of", "on_both_loops", "reply", "until",
]  # fmt: skip


def on_both_loops(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run a test under uvloop and under asyncio's own loop: they differ in what a closed connection does."""

    def run(loop_name: str, **arguments: Any) -> None:
        factory = pytest.importorskip("uvloop").new_event_loop if loop_name == "uvloop" else asyncio.new_event_loop
        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(test(**arguments))

    signature = inspect.signature(test)
    own = inspect.Parameter("loop_name", inspect.Parameter.KEYWORD_ONLY)
    run.__signature__ = signature.replace(parameters=[*signature.parameters.values(), own])  # type: ignore[attr-defined]
    run.__name__, run.__doc__, run.__module__ = test.__name__, test.__doc__, test.__module__
    run.pytestmark = list(getattr(test, "pytestmark", []))  # type: ignore[attr-defined]
    marked: Callable[..., None] = pytest.mark.parametrize("loop_name", ["uvloop", "asyncio"])(run)
    return marked
