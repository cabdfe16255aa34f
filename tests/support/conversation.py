"""A proxy between a client and an upstream that are nothing but words: transports in memory, a clock that a test moves.

The real proxy runs, from its client connections to its upstream connections; what stands at its ends is a `Peer`, which
says bytes, hears what came for it, stops reading, ends or resets. Nothing waits: after each step the loop turns until
nobody has anything left to do, so a conversation takes milliseconds and always goes the same way.

    with conversation() as talk:
        talk.client.says(get(b"/a"))
        talk.upstream.hears(sent(b"/a"))
        talk.upstream.says(ok(b"hello"))
        talk.client.hears(ok(b"hello"))
        talk.recorded(Outcome.COMPLETE, status=200, response_bytes=5)
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator
from typing import Any

from support.rawhttp import Counts, FrameTaps, ListRecorder, by_first_segment, by_tenant, plainly

from sidecar.model.exchange import Exchange, Outcome
from sidecar.proxy import Proxy
from sidecar.proxy.plain_call import PlainCall
from sidecar.proxy.upstream import Upstream, UpstreamConnection
from sidecar.settings import ProxySettings
from sidecar.usage.plain_calls import PlainReader

TURNS = 24  # of the loop after a step: more than any step of the proxy takes
FULL_BYTES = 65_536  # written and not read: the transport says that it is full, as asyncio's and uvloop's do
READ_BYTES = 262_144  # the most that either loop reads from a socket at once
GET_HEAD = b"GET %b HTTP/1.1\r\nHost: me\r\n%b\r\n"
POST_HEAD = b"POST %b HTTP/1.1\r\nHost: me\r\n%b\r\n"


def get(target: bytes = b"/a", fields: bytes = b"") -> bytes:
    return GET_HEAD % (target, fields)


def post(body: bytes, target: bytes = b"/a", fields: bytes = b"") -> bytes:
    return POST_HEAD % (target, fields + b"Content-Length: %d\r\n" % len(body)) + body


def post_head(target: bytes = b"/a", fields: bytes = b"") -> bytes:
    return POST_HEAD % (target, fields)


def sent(request: bytes) -> bytes:
    """The request as the upstream gets it."""
    return request.replace(b"Host: me\r\n", b"Host: up.test\r\n")


def ok(body: bytes = b"ok", fields: bytes = b"", status: bytes = b"200 OK") -> bytes:
    return b"HTTP/1.1 %b\r\n%bContent-Length: %d\r\n\r\n%b" % (status, fields, len(body), body)


def own(status: bytes, type_: bytes, message: bytes, connection: bytes = b"Connection: close\r\n") -> bytes:
    """An answer of the proxy itself."""
    body = b'{"error": {"type": "%b", "message": "%b"}}' % (type_, message)
    return b"HTTP/1.1 %b\r\nContent-Type: application/json\r\nContent-Length: %d\r\n%b\r\n%b" % (
        status,
        len(body),
        connection,
        body,
    )


def size(response: bytes) -> int:
    """Of its body."""
    return len(response.partition(b"\r\n\r\n")[2])


def closing(response: bytes) -> bytes:
    """The response as it is passed on where the connection ends behind it."""
    head, _, body = response.partition(b"\r\n\r\n")
    return head + b"\r\n" + CLOSE + b"\r\n" + body


# Heads of responses, what comes of an offer, the proxy's own responses, and what a record says of a cut.
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
UNTIL_CLOSE = b"HTTP/1.1 200 OK\r\n\r\n"
SIZED_10 = b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n"
CLOSE = b"Connection: close\r\n"
AGREED = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n"
BAD_GATEWAY = own(b"502 Bad Gateway", b"upstream_broke", b"the upstream gave no valid response", b"")
TOO_SLOW = own(b"408 Request Timeout", b"request_timeout", b"the request did not arrive in time")
RESET = "the connection ended before the answer (reset)"


class _Socket:
    """What the proxy asks of a socket before it cuts: that closing it resets; and before it takes one: whether anything
    has come."""

    family = socket.AF_INET
    _silent = socket.socketpair()  # the system's, for whoever polls: nothing ever comes on it
    for _end in _silent:
        _end.setblocking(False)  # as any socket of a loop is

    def __init__(self) -> None:
        self.resets = False

    def setsockopt(self, level: int, name: int, value: object) -> None:
        self.resets = self.resets or name == socket.SO_LINGER

    def fileno(self) -> int:
        return self._silent[0].fileno()


class _Transport(asyncio.Transport):
    """The proxy's end of one connection."""

    def __init__(self, peer: Peer) -> None:
        self.socket = _Socket()
        super().__init__({"peername": ("127.0.0.1", 40000), "socket": self.socket})
        self._peer = peer

    def write(self, data: Any) -> None:
        if not self._peer.over and not self._peer.closing:
            self._peer.take(bytes(data))

    def is_closing(self) -> bool:
        return self._peer.over or self._peer.closing

    def get_write_buffer_size(self) -> int:
        return len(self._peer.unread)

    def pause_reading(self) -> None:
        self._peer.held = True

    def resume_reading(self) -> None:
        self._peer.held = False
        self._peer.later(self._peer.deliver)

    def is_reading(self) -> bool:
        return not self._peer.held

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        self._peer.half_closed = True

    def close(self) -> None:
        self._peer.closing = True
        self._peer.flushed()

    def abort(self) -> None:
        self._peer.ended(reset=self.socket.resets)


class Peer:
    """One end of the conversation: a client, or an upstream's connection."""

    def __init__(self, talk: Talk, protocol: asyncio.Protocol) -> None:
        self._talk = talk
        self._loop = talk.loop
        self._reads = True
        self._inbox: list[bytes] = []  # said, and not read by the proxy
        self._ending: list[tuple[bool, Exception | None]] = []
        self.protocol = protocol
        self.transport = _Transport(self)
        self.heard = b""
        self.unread = b""  # what the proxy wrote while this end did not read
        self.held = False  # the proxy does not read
        self.half_closed = False  # the proxy has said that it is done
        self.closing = False
        self.over = False
        self.was_reset = False
        protocol.connection_made(self.transport)

    # -- what a test says ------------------------------------------------------------------------

    def says(self, *pieces: bytes) -> None:
        """Each piece in a read of its own, as far as the proxy reads."""
        for piece in pieces:
            self._inbox += [piece[at : at + READ_BYTES] for at in range(0, len(piece), READ_BYTES)]
            self.deliver()
            self._talk.turn()

    def says_ahead(self, *pieces: bytes) -> None:
        """Without a turn of the loop behind it: what comes next comes in the same turn."""
        for piece in pieces:
            self._inbox += [piece[at : at + READ_BYTES] for at in range(0, len(piece), READ_BYTES)]
            self.deliver()

    def leaves(self) -> None:
        """Close in good order."""
        self._leave(True, None)

    def resets(self) -> None:
        self._leave(False, ConnectionResetError(104, "reset by peer"))

    def stops_reading(self) -> None:
        self._reads = False

    def reads_on(self) -> None:
        self._reads = True
        self.heard += self.unread
        was_full, self.unread = len(self.unread) > FULL_BYTES, b""
        if self.closing:
            self.flushed()
        elif was_full and not self.over:
            self.protocol.resume_writing()
        self._talk.turn()

    def reads(self, size: int) -> None:
        """That much of what was written, and no more."""
        was_full = len(self.unread) > FULL_BYTES
        self.heard, self.unread = self.heard + self.unread[:size], self.unread[size:]
        if was_full and len(self.unread) <= FULL_BYTES and not (self.closing or self.over):
            self.protocol.resume_writing()
        self._talk.turn()

    # -- what a test looks at --------------------------------------------------------------------

    def hears(self, expected: bytes) -> None:
        """All that came since the last time, to the byte."""
        assert self.heard == expected, f"\nheard    {self.heard!r}\nexpected {expected!r}"
        self.heard = b""

    def hears_nothing(self) -> None:
        self.hears(b"")

    @property
    def waiting_bytes(self) -> int:
        """Said, and still with the kernel because the proxy does not read."""
        return sum(map(len, self._inbox))

    def is_open(self) -> None:
        assert not self.over
        assert not self.closing
        assert not self.half_closed

    def is_closed(self) -> None:
        """In good order: after what was written has left; a client that still sends is read on for a while."""
        assert not self.was_reset, "it was reset"
        assert self.over or self.closing or self.half_closed, "it is open"

    def is_cut(self) -> None:
        """So that nobody can take it for an end."""
        assert self.over
        assert self.was_reset

    def is_dropped(self) -> None:
        assert self.over

    # -- for the transport -----------------------------------------------------------------------

    def take(self, data: bytes) -> None:
        if self._reads:
            self.heard += data
            return
        was_full = len(self.unread) > FULL_BYTES
        self.unread += data
        if not was_full and len(self.unread) > FULL_BYTES:
            self.protocol.pause_writing()

    def deliver(self) -> None:
        while self._inbox and not self.held and not self.over and not self.closing:
            self.protocol.data_received(self._inbox.pop(0))
        if self._ending and not self.held and not self.over:
            clean, error = self._ending.pop()
            if clean:
                self.protocol.eof_received()
            self._lost(error)

    def flushed(self) -> None:
        """The proxy closes; it is gone once all is read."""
        if not self.unread:
            self.ended(reset=False)

    def ended(self, *, reset: bool) -> None:
        if not self.over:
            self.was_reset = reset
            self._lost(None)

    def later(self, do: Any) -> None:
        self._loop.call_soon(do)

    def _leave(self, clean: bool, error: Exception | None) -> None:
        self._ending.append((clean, error))
        if error is not None:
            self._inbox.clear()
            self.held = False
        self.deliver()
        self._talk.turn()

    def _lost(self, error: Exception | None) -> None:
        self.over = True
        self._loop.call_soon(self.protocol.connection_lost, error)


class _Lease:
    """A new connection to the upstream, as the connector hands it out."""

    def __init__(self, protocol: UpstreamConnection, peer: Peer) -> None:
        self.protocol = protocol
        self._peer = peer

    def close(self) -> None:
        self._peer.transport.close()


class _Connector:
    """In the place of aiohttp's: makes connections of memory, when the test lets it."""

    def __init__(self, talk: Talk, pool: Upstream) -> None:
        self._talk = talk
        self._pool = pool
        self.open = asyncio.Event()
        self.open.set()
        self.error: Exception | None = None

    async def connect(self) -> _Lease:
        await self.open.wait()
        if self.error is not None:
            raise self.error
        talk = self._talk
        connection = UpstreamConnection(self._pool, talk.loop)
        peer = Peer(talk, connection)
        talk.upstreams.append(peer)
        return _Lease(connection, peer)

    async def aclose(self) -> None:
        return None


class Talk:
    """The whole conversation."""

    def __init__(self, **options: Any) -> None:
        self.recorder = ListRecorder()
        self.counts = Counts()
        self.loop = asyncio.new_event_loop()
        self.now = 1_000.0
        self.loop.time = lambda: self.now  # type: ignore[method-assign]
        self.upstreams: list[Peer] = []
        self.clients: list[Peer] = []
        taps = options.pop("taps", None) or FrameTaps()
        attribute_by_body = options.pop("attribute_by_body", None)
        self.recorder.plain = PlainReader(taps, attribute_by_body, self.counts.limit_reached)
        settings = {"forwarded": "none", "upstream_url": "http://up.test", **options}
        self.proxy = Proxy(
            settings=ProxySettings(**settings),
            recorder=self.recorder,
            taps=taps,
            attribute=by_tenant,
            attribute_by_body=attribute_by_body,
            plainly=plainly(None),
            route=by_first_segment,
            metrics=self.counts,
        )
        self.connectors: list[_Connector] = []  # one for each upstream
        self._seen = 0
        self._stopping: asyncio.Task[None] | None = None

    def start(self) -> None:
        self.loop.run_until_complete(self.proxy.start())
        for to in (*self.hop.named, self.hop.rest):  # that of the rest is at hand to a test
            if to.upstream is not None:
                real = to.upstream._connector
                self.connector = to.upstream._connector = _Connector(self, to.upstream)
                self.connectors.append(self.connector)
                self.loop.run_until_complete(real.aclose())
        self.client = self.new_client()

    def new_client(self) -> Peer:
        assert self.proxy._server is not None
        peer = Peer(self, self.proxy._server())
        self.clients.append(peer)
        self.turn()
        return peer

    @property
    def hop(self) -> Any:
        assert self.proxy._hop is not None
        return self.proxy._hop

    @property
    def upstream(self) -> Peer:
        """The upstream's newest connection."""
        assert self.upstreams, "no connection to the upstream was made"
        return self.upstreams[-1]

    @property
    def call(self) -> Any:
        (call,) = self.hop.calls
        return call

    # -- what happens ----------------------------------------------------------------------------

    def turn(self) -> None:
        async def turns() -> None:
            for _ in range(TURNS):
                await asyncio.sleep(0)

        self.loop.run_until_complete(turns())

    def passes(self, seconds: float) -> None:
        """Time passes, and the proxy looks at its deadlines."""
        self.now += seconds
        self.proxy._sweep()
        self.turn()

    def connects(self, *, now: bool = True, error: Exception | None = None) -> None:
        """Connections to upstreams that are wanted from here on are there at once, or when this is said again; or they
        are never there."""
        for connector in self.connectors:
            connector.error = error
            (connector.open.set if now else connector.open.clear)()
        self.turn()

    def warm(self) -> None:
        """One plain call, so that a connection to the upstream waits in the pool."""
        self.client.says(get(b"/warm"))
        self.upstream.hears(sent(get(b"/warm")))
        self.upstream.says(ok())
        self.client.hears(ok())
        self.recorded(Outcome.COMPLETE, status=200, response_bytes=2)
        self.recorder.plain_calls = 0  # of those that a test counts it is none

    def holds(self) -> None:
        """From here on records wait for the disk."""
        self.recorder.hold = True

    def commits(self, send: bool = True) -> None:
        self.recorder.let_go(send)
        self.turn()

    def stops(self, timeout_s: float = 5.0) -> None:
        self._stopping = self.loop.create_task(self.proxy.stop(timeout_s))
        self.turn()

    def break_the_parser(self) -> None:
        """A fault of ours: what reads the response of the open call raises from now on."""

        class Broken:
            def __init__(self, parser: Any) -> None:
                self._parser = parser

            def __getattr__(self, name: str) -> Any:
                if name in ("feed", "read", "pieces"):
                    raise RuntimeError("a fault of ours")
                return getattr(self._parser, name)

        call = self.call
        if not isinstance(call, PlainCall):
            call.response = Broken(call.response)
        elif call._stream is None:
            call._calls.responses = Broken(call._calls.responses)  # type: ignore[assignment]
        else:
            call._stream = Broken(call._stream)  # type: ignore[assignment]

    # -- what a test looks at --------------------------------------------------------------------

    def recorded(
        self,
        outcome: Outcome,
        *,
        status: int | None,
        request_bytes: int = 0,
        response_bytes: int = 0,
        error: str | None = None,
    ) -> Exchange:
        """The next record, which has these facts."""
        assert len(self.recorder.records) > self._seen, "there is no further record"
        exchange = self.recorder.records[self._seen]
        self._seen += 1
        facts = (exchange.outcome, exchange.status, exchange.request_bytes, exchange.response_bytes, exchange.error)
        assert facts == (outcome, status, request_bytes, response_bytes, error)
        return exchange

    def nothing_recorded(self) -> None:
        assert len(self.recorder.records) == self._seen, self.recorder.records[self._seen :]

    def finish(self) -> None:
        """Everybody leaves; every call that was let in has its record, and nothing is left open."""
        for peer in self.clients + self.upstreams:
            if not peer.over:
                peer.leaves()
        if self.recorder.held:
            self.commits()
        self.loop.run_until_complete(self.proxy.aclose())
        self.turn()
        assert self.proxy.open_calls == 0
        assert len(self.recorder.records) == len(self.recorder.admitted)
        assert self.counts.drains == 0
        assert self.counts.connections == 0

    def close(self) -> None:
        self.loop.close()


@contextlib.contextmanager
def conversation(talk: Talk | None = None, **options: Any) -> Iterator[Talk]:
    """`options` are those of `ProxySettings`, and `taps`, `attribute_by_body`; or the `talk` itself."""
    talk = talk or Talk(**options)
    asyncio.set_event_loop(talk.loop)
    try:
        talk.start()
        yield talk
        talk.finish()
    finally:
        asyncio.set_event_loop(None)
        talk.close()
