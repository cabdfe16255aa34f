"""A client's connection: requests come out of it in order, responses go into it in order.

It owns what belongs to the connection and not to a call: pipelining, keep-alive, what is too large or malformed to
become a call, and protocol switches. How it is closed so that the client can still read its last response is told in
`closing`.

What must always hold here:
- No next call while the client's transport is full, or while one is open: what a client does not read costs nobody
  anything, and is not asked of the upstream.
- What is read and not parsed yet is at most one read of the socket. Until it is worked off the socket is not read.
- A plain request with a small body is waited for, a moment, so that it can go whole. If it does not come in time the
  head goes on alone, as do those of the next requests on that connection.
- What stands behind a request that offers another protocol is that protocol's, or HTTP, and which of the two is known
  only by the response. Until then it is kept, and given to neither. Bytes of a body are given to its call alone.
"""

from __future__ import annotations

import logging
import re
import socket
import struct
from asyncio import BaseTransport, TimerHandle
from collections.abc import Callable
from enum import IntEnum
from time import monotonic_ns
from typing import Any, Final

from sidecar.proxy import borders, local_responses
from sidecar.proxy.aiohttp_compat import (
    PIPELINE_MAX,
    ClientProtocol,
    HttpProcessingError,
    Messages,
    RawRequestMessage,
    Server,
    StreamReader,
    refusal,
)
from sidecar.proxy.borders import HEAD_END, LAST_CHUNK, PIECE_BYTES
from sidecar.proxy.call import Call
from sidecar.proxy.closing import Closing
from sidecar.proxy.context import NEVER, Hop, ProxyMetrics
from sidecar.proxy.local_responses import LocalResponse
from sidecar.proxy.plain_call import PlainCall, PlainCalls
from sidecar.proxy.plain_head import Shape
from sidecar.proxy.tunnel import Tunnel

log = logging.getLogger(__name__)

AHEAD_BYTES_MAX: Final = 65_536  # what a client may send ahead of a 101 before it is no longer read
REST_WAIT_S: Final = 0.002  # for a body behind its head: most clients write the two one after the other
UNWAITED: Final = 16  # requests on a connection, behind one whose body came later
WAITING_MAX: Final = PIPELINE_MAX // 2  # requests parsed ahead; the parser stops by itself at twice as many
RESET: Final = struct.pack("ii", 1, 0)  # SO_LINGER: close with a reset, so that a cut cannot look like an end

_REQUEST_LINE = re.compile(rb"(?:\r\n)*[!#$%&'*+.^_`|~0-9A-Za-z-]{1,64} [!-~]+ HTTP/1\.[01]\r\n")


class Input(IntEnum):
    """What is done with what the client sends."""

    REQUESTS = 0  # it is parsed
    AHEAD = 1  # it is kept: a protocol switch was asked for, and is not decided
    TUNNEL = 2  # it goes to the upstream as it came
    DROPPED = 3


class Clients:
    """The open client connections."""

    def __init__(self, connections_max: int, metrics: ProxyMetrics, *, refused_max: int = 64) -> None:
        self.open: set[Client] = set()
        self._max = connections_max
        self._lingering_max = connections_max + refused_max
        self._metrics = metrics
        self._on_empty: list[Callable[[], None]] = []

    def opened(self, client: Client) -> bool:
        """Count it in. False when there are too many; the caller responds with 503."""
        self.open.add(client)
        self._metrics.connections_changed(1)
        return len(self.open) <= self._max

    @property
    def may_linger(self) -> bool:
        """Whether there is room for a refused client to be read on until it has seen its refusal."""
        return len(self.open) <= self._lingering_max

    def closed(self, client: Client) -> None:
        if client in self.open:
            self.open.discard(client)
            self._metrics.connections_changed(-1)
            if not self.open:
                for tell in self._on_empty:
                    tell()

    def when_empty(self, tell: Callable[[], None]) -> None:
        """`tell` is called once there is none any more, at once where there is none now."""
        self._on_empty.append(tell)
        if not self.open:
            tell()


class Client(ClientProtocol):
    """One client connection."""

    __slots__ = (
        "_ahead", "_apart", "_at", "_begun", "_begun_ns", "_border", "_called", "_clients", "_closing", "_head_bytes",
        "_hop", "_input", "_last_bytes", "_last_call", "_may_hold", "_offer", "_own", "_parser_holds", "_plain",
        "_queue", "_rest_late", "_sized", "_sized_left", "_taking", "_tunnel", "_unread", "_unwaited", "_upgrade_body",
        "_upgrade_left", "_uploading", "call", "deadline", "full", "like", "peer", "plainly",
    )  # fmt: skip

    def __init__(self, server: Server, hop: Hop, clients: Clients, plain: PlainCalls | None = None) -> None:
        settings = hop.settings
        super().__init__(
            server,
            hop.loop,
            target_bytes_max=settings.target_bytes,
            field_bytes_max=settings.head_bytes,
            fields_max=settings.head_fields_max,
        )
        self._hop = hop
        self._clients = clients
        self._plain = plain
        # the connection
        self._input = Input.REQUESTS
        # Nothing but plain requests has come, so that all the rest below is as it was at the beginning. Whatever could
        # change it clears this first; it is looked at as a whole again when something comes between two calls.
        self.plainly = False
        self.like: Shape[Any] | None = None  # of the last plain request
        self._called = False  # a call has been over on it
        # A plain request of which not all has come, since when, and until when it is waited for.
        self._begun = b""
        self._begun_ns = 0
        self._rest_late: TimerHandle | None = None
        self._unwaited = 0  # so many more are not waited for: one has come late
        self.deadline = NEVER
        self.full = False  # the client does not read as fast as we write
        # what came and is not parsed
        self._unread = b""
        self._at = 0  # in `_unread`: how far it is parsed
        self._parser_holds = False  # requests: it stopped at its own limit
        self._may_hold = False  # the beginning of one
        self._apart = False  # what is not parsed is parsed request by request: something in it is malformed
        # the head and the body that are coming
        self._head_bytes = 0  # of a head that is still coming
        self._border = b""  # the last bytes that were parsed: the end of a head may begin in them
        self._sized: StreamReader | None = None  # a sized body that is still coming, behind a request by itself
        self._sized_left = 0
        self._uploading: StreamReader | None = None  # a chunked body that is still coming
        self._last_bytes = b""  # of what came while it did
        self._upgrade_body: StreamReader | None = None  # the body of a request that offers another protocol
        self._upgrade_left = 0  # of such a body, where it is sized
        # requests, and what is done with them
        self._queue: list[tuple[RawRequestMessage, StreamReader]] = []  # short: an empty deque takes 760 bytes
        self._last_call = False  # no request behind the ones in hand will be taken
        self._taking = False
        self.call: Call | PlainCall | None = None
        # another protocol
        self._offer: RawRequestMessage | None = None  # the request that offers it, where that is passed on
        self._ahead = bytearray()
        self._tunnel: Tunnel | None = None
        # the end
        self._own: LocalResponse | None = None  # to be sent when the calls in hand are answered
        self._closing: Closing | None = None

    # -- called by the event loop ----------------------------------------------------------------

    def connection_made(self, transport: BaseTransport) -> None:
        super().connection_made(transport)
        self._step(self._begin)

    def _begin(self) -> None:
        transport = self.transport
        assert transport is not None
        peer = transport.get_extra_info("peername")
        ip = peer[0] if isinstance(peer, tuple) else None
        tls = transport.get_extra_info("sslcontext") is not None
        self.peer = self._hop.headers.peer(ip, tls=tls)
        self.deadline = self._hop.loop.time() + self._hop.settings.head_timeout_s
        if not self._clients.opened(self):
            self.reject(local_responses.TOO_MANY, "connections", linger=self._clients.may_linger)

    def connection_lost(self, exc: BaseException | None) -> None:
        if self._begun:
            self._step(self._go_without_rest)
        self._clients.closed(self)
        super().connection_lost(exc)
        self.plainly = False
        self._input = Input.DROPPED
        self._queue.clear()
        self._unread = b""
        self._tunnel = None
        call, self.call = self.call, None
        if call is not None:
            call.client_left(exc)

    def data_received(self, data: bytes) -> None:
        """The one place that decides which way bytes go, before the first of them is looked at."""
        if self._begun:
            data, self._begun = self._begun + data, b""
        plain = self._plain
        if (
            plain is not None
            and self.call is None
            and (self.plainly or self._begin_anew_if_clear())
            and plain.take(self, data)
        ):
            if self._rest_late is not None and not self._begun:
                self._rest_came()
            return
        self._go_with_care(data)

    def wait_for_rest(self, data: bytes) -> bool:
        """Keep the beginning of a plain request for the rest to come. False: it is not waited for."""
        if self._rest_late is None:
            if self._unwaited:
                self._unwaited -= 1
                return False
            self._begun_ns = monotonic_ns()
            self._rest_late = self._hop.loop.call_later(REST_WAIT_S, self._step, self._go_without_rest)
            self.deadline = NEVER
        self._begun = data
        return True

    def _rest_came(self) -> None:
        """The request is whole, and went the short way."""
        if self._rest_late is not None:
            self._rest_late.cancel()
            self._rest_late = None
        if isinstance(self.call, PlainCall):
            self.call.began_at(self._begun_ns)

    def _go_without_rest(self) -> None:
        self._unwaited = UNWAITED
        data, self._begun = self._begun, b""
        if data:
            self._go_with_care(data)

    def _go_with_care(self, data: bytes) -> None:
        if self._rest_late is not None:
            self._rest_late.cancel()
            self._rest_late = None
        self.plainly = False
        if self._input is Input.REQUESTS:
            self._parse(data)
        elif self._input is Input.TUNNEL:
            assert self._tunnel is not None
            self._tunnel.from_client(data)
        elif self._input is Input.AHEAD:
            self._keep(data)
        elif self._closing is not None:
            self.deadline = self._closing.came(len(data))

    def _begin_anew_if_clear(self) -> bool:
        """Where the next byte is the first of a request, and nothing of an earlier one is in the way, all is from now
        on as on a new connection (`plainly`). Returns whether it is."""
        self.plainly = self._input is Input.REQUESTS and not (
            self._head_bytes
            or self._queue
            or self._last_call
            or self._parser_holds
            or self._may_hold
            or self._unread
            or self.full
            or self._closing is not None
            or self._uploading is not None
            or self._upgrade_body is not None
            or self._offer is not None
        )
        if self.plainly:
            self._border = b""  # the end of a request that is over: no head begins in it
        return self.plainly

    def pause_writing(self) -> None:
        super().pause_writing()
        self.plainly = False
        self.full = True
        if self.call is not None:
            self.call.client_full(True)

    def resume_writing(self) -> None:
        super().resume_writing()
        self.full = False
        if self.call is not None:
            self.call.client_full(False)
        elif self._closing is None:
            if not self._head_bytes:
                self.deadline = self._hop.loop.time() + self._hop.settings.keepalive_timeout_s
            self._take()

    # -- parsing ---------------------------------------------------------------------------------

    def _parse(self, data: bytes) -> None:
        if self._at < len(self._unread) or self._parser_holds:
            # The socket is paused, but what a TLS layer had decrypted may still come.
            self._unread, self._at = self._unread[self._at :] + data, 0
            return
        if len(data) <= PIECE_BYTES and not (self._head_bytes or self._may_hold or self._is_delicate(data, 0)):
            self._feed(data)  # the way of nearly every request
            if not (self._queue or self._apart):
                return
        else:
            self._unread, self._at = data, 0
        self._parse_unread()

    def _is_delicate(self, data: bytes, at: int) -> bool:
        """Whether it has to be given to the parser piece by piece (`borders`)."""
        if self._upgrade_body is not None:
            return True
        if self.call is not None and not self.call.upload_came:
            return False
        return borders.may_be_more(data, at, len(self._queue))

    def _parse_unread(self) -> None:
        self._parse_pieces()
        call = self.call
        if call is not None and not call.upload_done:
            call.pump()  # once, however many pieces it took

    def _parse_pieces(self) -> None:
        """Parse what was read, as long as its requests are not too many; read on when that is all."""
        while self._input is Input.REQUESTS and not self.upload_paused:
            if len(self._queue) >= WAITING_MAX:
                self.pause(True)
                return
            if self._parser_holds:
                self._parser_holds = False
                self._feed(b"")
                continue
            data, at = self._unread, self._at
            if at >= len(data):
                self._unread, self._at, self._apart = b"", 0, False
                break
            end = self._end_of_piece(data, at)
            self._at = end
            self._feed(data if end - at == len(data) else data[at:end], pump=False)
        if self._at < len(self._unread):
            if self._input is Input.REQUESTS:
                self.pause(True)  # the upload is paused
                return
            data, self._unread, self._at = self._unread[self._at :], b"", 0
            self.data_received(data)  # it goes another way now
        elif self._is_held:
            self.pause(False)

    def _end_of_piece(self, data: bytes, at: int) -> int:
        """Where the parser is stopped to look: where a sized body ends, or where a head, or a body whose request offers
        another protocol, may end. All that goes on in another body is one piece."""
        if self._upgrade_body is not None and self._upgrade_left > 0:
            return min(len(data), at + self._upgrade_left)
        if self._sized is not None and self._sized_left > 0:
            return min(len(data), at + self._sized_left)
        if self._upgrade_body is None and self.call is not None and not self.call.upload_came and not self._queue:
            return len(data)
        mark, reach = HEAD_END, at + PIECE_BYTES
        if self._upgrade_body is not None and self._offer is None:
            # Chunks, and nothing but requests behind them. Behind trailers none is taken, so only the plain end counts.
            mark, reach = LAST_CHUNK[2:], len(data)
        across = borders.end_across(mark, self._border, data, at)
        if across >= 0:
            return across
        by_head = self._head_bytes or self._may_hold or self._apart or self._upgrade_body is not None
        if by_head or self._is_delicate(data, at):
            found = data.find(mark, at, reach)
            if found >= 0:
                return found + len(mark)
        return min(len(data), reach)

    def _feed(self, data: bytes, *, pump: bool = True) -> None:
        """Give it to the parser, and take what comes of it."""
        self.plainly = False
        before = self._border
        if data:
            self._border = borders.border(before, data)
        in_body = bool(self._queue) and self._body_waits()
        anew = not (self._may_hold or self._head_bytes)
        if data:
            self._may_hold = True
        try:
            messages, switched, tail = self.parse(data)
        except HttpProcessingError as error:
            if anew and not self._apart and 0 <= data.find(HEAD_END) < len(data) - len(HEAD_END):
                self._parse_apart(data, before)
            else:
                self._malformed(error, data)
            return
        if messages:
            self._may_hold = not borders.is_all(messages, before, data)
            self._sized, self._sized_left = borders.body_left(messages, data, alone=anew) or (None, 0)
            limit = self._hop.settings.head_bytes
            if len(data) + self._head_bytes > limit and borders.head_bytes(messages[-1][0]) > limit:
                self._refuse(local_responses.HEAD_TOO_LARGE, "head_too_large")
                return
            self._head_bytes = 0
            self._line_up(messages, before[1 - len(HEAD_END) :], data, switched, tail)
            if self.call is None:
                self._take()
                return
        elif self._sized is not None:
            self._sized_came(self._sized, len(data))
        elif self._uploading is not None:
            self._last_bytes = (self._last_bytes + data)[-len(LAST_CHUNK) :]
            if self._uploading.is_eof():
                self._body_ended(safe=self._last_bytes == LAST_CHUNK)
        elif data and (self.call is None or self.call.upload_done) and not in_body:
            self._count_head(len(data))
        if self._upgrade_body is not None and not messages:
            self._upgrade_body_came(data, switched, tail)
        call = self.call
        if pump and call is not None and not call.upload_done:
            call.pump()

    def _parse_apart(self, data: bytes, before: bytes) -> None:
        """The parser gives nothing of what it was given together with something malformed: parse that again, by a new
        one and request by request, so that those before it are served. `before`: as for `is_all`."""
        self.parser_anew()
        self._may_hold = False
        self._border = before
        self._apart = True
        self._unread = data + self._unread[self._at :]  # all that was read may be parsed, and still be there
        self._at = 0

    def _sized_came(self, payload: StreamReader, size: int) -> None:
        """More of it: where it ends with what came, and is read, the parser holds nothing of the next request."""
        self._sized_left -= size
        if self._sized_left < 0:
            self._sized = None
        elif not self._sized_left and payload.is_eof():
            self._sized = None
            self._may_hold = False

    def _body_waits(self) -> bool:
        """Whether what comes is the body of a request that waits its turn, behind the call that is open."""
        return not self._queue[-1][1].is_eof()

    # -- for the call ----------------------------------------------------------------------------

    def send(self, data: bytes) -> None:
        """Never raises: uvloop does, on a transport that is closed; `client_left` will tell."""
        transport = self.transport
        if transport is not None and not transport.is_closing():
            try:
                transport.write(data)
            except RuntimeError:
                return

    def read_on(self) -> None:
        """A read of the upload has made room: let the parser go on with what it holds, in a turn of its own."""
        if self.resume_upload():
            self._hop.loop.call_soon(self._step, self._parse_on)

    def _step(self, step: Callable[[], None]) -> None:
        """What the event loop calls: where it fails, the client would wait for ever."""
        try:
            step()
        except Exception:
            log.exception("a client's connection could not be served")
            if self.call is None:
                self.reject(local_responses.OWN_FAULT, "proxy_fault")
            else:
                self.reset()

    def _parse_on(self) -> None:
        """Parse what was held back: by the parser, while an upload was paused, and by us."""
        if self._input is Input.REQUESTS and self.transport is not None and not self.upload_paused:
            self._feed(b"")
            self._parse_unread()

    def may_keep_alive(self, should_close: bool) -> bool:
        """Whether another request may come after this one; said in the head of its response."""
        if should_close or self._hop.leaving or self._hop.stopping:
            return False
        return not self._last_call or bool(self._queue)

    def may_switch(self, message: RawRequestMessage) -> bool:
        """Whether the protocol switch that this request offers is passed on."""
        return message is self._offer

    def switch(self, tunnel: Tunnel) -> None:
        """The upstream agreed: hand over what was sent ahead."""
        self._tunnel = tunnel
        self._input = Input.TUNNEL
        self._offer = None
        ahead, self._ahead = self._ahead, bytearray()
        self.pause(False)
        if ahead:
            tunnel.from_client(bytes(ahead))

    def call_over(self, keep_alive: bool, upload_done: bool) -> None:
        """The response is written; go on to the next request, or close."""
        self.call = None
        self._called = True
        if self.plainly and keep_alive and not self._hop.stopping:  # nothing waits, and nothing is to be closed
            self.deadline = self._hop.now + self._hop.settings.keepalive_timeout_s
            return
        transport = self.transport
        if transport is None or transport.is_closing():
            return
        settings = self._hop.settings
        if not keep_alive or self._hop.stopping:
            self._hang_up(linger=not upload_done or self._last_call)
            return
        if self._offer is not None and not self._queue:
            self._declined()
        self.deadline = self._hop.now + (settings.idle_timeout_s if self.full else settings.keepalive_timeout_s)
        if not self._taking and (self._queue or self._parser_holds or self._unread or self._last_call):
            self._take()

    def reject(self, own: LocalResponse, limit: str, *, linger: bool = True) -> None:
        """Respond without a call (nothing is recorded) and close."""
        self._hop.metrics.limit_reached(limit)
        self.send(own.encode(close=True))
        self._hang_up(linger=linger)

    def reset(self) -> None:
        """Cut, so that nothing can be taken for a clean end. `abort` alone would send one."""
        self.plainly = False
        self._input = Input.DROPPED
        transport = self.transport
        if transport is None:
            return
        sock = transport.get_extra_info("socket")
        if sock is not None and sock.family != getattr(socket, "AF_UNIX", None):
            try:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            except OSError:
                log.debug("SO_LINGER could not be set; the cut will look like an end")
        transport.abort()

    def close_soon(self) -> None:
        """Close once what is written has left."""
        self._hang_up(linger=False)

    # -- for the server --------------------------------------------------------------------------

    def expired(self) -> None:
        """The connection's own deadline passed: idle, a head that does not end, or nothing more to be waited for."""
        self.deadline = NEVER
        transport = self.transport
        if transport is None:
            return
        if self._closing is not None:
            self.deadline = self._closing.expired()
        elif self._head_bytes:
            self._hop.metrics.limit_reached("head_timeout")
            self._refuse(local_responses.TOO_SLOW, "head_timeout")
        elif self.full:
            self._hop.metrics.limit_reached("idle_timeout")
            self.reset()  # it asked for more than it reads
        else:
            self._hang_up(linger=False)

    @property
    def is_idle(self) -> bool:
        """Whether it is open, and no call is."""
        return self.call is None and self.transport is not None and self._closing is None and not self._begun

    @property
    def holds_unsent(self) -> bool:
        """Whether some of what was written for it has not left."""
        return self.transport is not None and self.transport.get_write_buffer_size() > 0

    def is_new(self, within_s: float) -> bool:
        """Whether it was made so lately that its first request may still be under way."""
        if self._called or not self.is_idle:
            return False
        return self._hop.loop.time() < self.deadline - self._hop.settings.head_timeout_s + within_s

    def fileno(self) -> int:
        """Of its socket; -1: it has none."""
        sock = None if self.transport is None else self.transport.get_extra_info("socket")
        return -1 if sock is None else int(sock.fileno())

    def stop(self) -> None:
        """Close if no call is open; else the open one is the last."""
        if self._begun:
            self._go_without_rest()
        if self.is_idle:
            self._hang_up(linger=False)

    # -- requests --------------------------------------------------------------------------------

    def _line_up(self, messages: Messages, before: bytes, data: bytes, switched: bool, tail: bytes) -> None:
        """Put what was parsed into the queue, unless it stands behind something that cannot be trusted."""
        if self._uploading is not None:
            # A body ended and a request follows in one piece: trailers cannot be told from fields.
            self._body_ended(safe=False)
            return
        for message, payload in messages:
            if self._last_call:
                break
            self._queue.append((message, payload))
            if message.chunked:
                self._chunked(payload, data, last=message is messages[-1][0])
            if message.upgrade:
                self._offered(message, payload, before + data, switched, tail)
        if len(self._queue) >= PIPELINE_MAX:
            self._parser_holds = True

    def _take(self) -> None:
        """Take up the next request, where the client reads. A call may be over before `start` returns."""
        self._taking = True
        try:
            while self.call is None and self._queue and self._closing is None and not self.full:
                message, payload = self._queue.pop(0)
                self.parser_idle_again()
                if len(self._hop.calls) >= self._hop.settings.calls_max:
                    self.reject(local_responses.TOO_MANY, "calls")
                    return
                self.deadline = NEVER
                try:
                    call = self.call = Call(self._hop, self, message, payload)
                    call.start()
                except Exception:
                    log.exception("a call could not be let in")
                    self._start_failed()
        finally:
            self._taking = False
        if self._closing is not None or self._queue:
            return
        if self.call is None and self._own is not None:
            self.send(self._own.encode(close=True))
            self._hang_up(linger=True)
        elif self.call is None and self._last_call:
            self._hang_up(linger=True)
        elif self._input is Input.REQUESTS and (self._parser_holds or self._unread or self._is_held):
            self._hop.loop.call_soon(self._step, self._parse_on)

    def _start_failed(self) -> None:
        call = self.call
        if call is not None and call in self._hop.calls:
            call.failed()
        else:  # not let in yet: there is nothing to record
            self.call = None
            self.reject(local_responses.OWN_FAULT, "proxy_fault")

    def _chunked(self, payload: StreamReader, data: bytes, *, last: bool) -> None:
        """aiohttp's parser gives the last trailer of a chunked request to the next one as its first
        field. So another request is taken only where it is certain that there was no trailer."""
        self._last_bytes = data[-len(LAST_CHUNK) :]
        if not payload.is_eof():
            self._uploading = payload
        elif not last or self._last_bytes != LAST_CHUNK:
            self._last_call = True

    def _body_ended(self, *, safe: bool) -> None:
        self._uploading = None
        self._last_bytes = b""
        if not safe:
            self._last_call = True

    def _count_head(self, size: int) -> None:
        if not self._head_bytes:
            self.deadline = self._hop.loop.time() + self._hop.settings.head_timeout_s
        self._head_bytes += size
        if self._head_bytes > self._hop.settings.head_bytes:
            self._refuse(local_responses.HEAD_TOO_LARGE, "head_too_large")

    def _malformed(self, error: HttpProcessingError, data: bytes) -> None:
        """Fixed texts only: the parser's own words hold bytes of the request, secrets included."""
        kind = refusal(error, self._hop.settings.target_bytes)
        call = self.call
        if call is not None and not call.upload_came:
            self._count_and_drop_input("bad_chunk")
            call.upload_broke(local_responses.BAD_CHUNK)
        elif kind == "target":
            self._refuse(local_responses.TARGET_TOO_LONG, "target_too_long")
        elif kind == "head":
            self._refuse(local_responses.HEAD_TOO_LARGE, "head_too_large")
        elif kind == "method" and _REQUEST_LINE.match(data):
            self._refuse(local_responses.UNKNOWN_METHOD, "unknown_method")
        else:
            self._refuse(local_responses.BAD_REQUEST, "malformed")

    def _refuse(self, own: LocalResponse, reason: str) -> None:
        """Something that is no call: answered after the calls in hand, and the end of the connection."""
        self._count_and_drop_input(reason)
        self._own = own
        if self.call is None:
            self._take()

    def _count_and_drop_input(self, reason: str) -> None:
        """What has come and what comes is no call any more."""
        self._hop.metrics.request_rejected(reason)
        self._last_call = True
        self._input = Input.DROPPED
        self._unread, self._at, self._parser_holds, self._apart = b"", 0, False, False

    # -- another protocol ------------------------------------------------------------------------

    def _offered(
        self, message: RawRequestMessage, payload: StreamReader, data: bytes, switched: bool, tail: bytes
    ) -> None:
        """A request offers another protocol. One that is not passed on is like any other. What is passed on is decided
        by the response, and until the request is whole what comes is its body."""
        if borders.may_pass_on(message):
            self._offer = message
        if not payload.is_eof():
            self._upgrade_body = payload
            self._upgrade_left = 0 if message.chunked else borders.length_of(message) - payload.total_bytes
        elif switched:
            self._upgrade_whole(tail, parser_switched=True)
        elif data.endswith(HEAD_END) and data.count(HEAD_END) == 1:
            self._upgrade_whole(b"", parser_switched=False)
        else:  # nobody knows what the parser has lost behind it
            self._offer = None
            self._last_call = True

    def _upgrade_body_came(self, data: bytes, switched: bool, tail: bytes) -> None:
        payload = self._upgrade_body
        assert payload is not None
        if payload.is_eof():
            self._upgrade_body = None
            self._upgrade_whole(tail, parser_switched=switched)
        elif self._upgrade_left > 0:
            self._upgrade_left -= len(data)

    def _upgrade_whole(self, tail: bytes, *, parser_switched: bool) -> None:
        """The request is whole. `tail`: what the parser gave back of what stood behind it."""
        if self._offer is not None:
            self._input = Input.AHEAD
            self._ahead = bytearray(tail)
        elif parser_switched:
            self._http_again(tail)

    def _keep(self, data: bytes) -> None:
        """It is the new protocol's, if the upstream agrees."""
        self._ahead += data
        if len(self._ahead) > AHEAD_BYTES_MAX:
            self.pause(True)

    def _declined(self) -> None:
        """The response was no 101: what was sent ahead is HTTP after all."""
        self._offer = None
        if self._input is Input.AHEAD:
            self._input = Input.REQUESTS
            ahead, self._ahead = self._ahead, bytearray()
            self._http_again(bytes(ahead))
            if ahead:
                self._hop.loop.call_soon(self._step, self._parse_on)
            else:
                self.pause(False)

    def _http_again(self, tail: bytes) -> None:
        self.parser_resume_http()
        self._unread, self._at = tail + self._unread[self._at :], 0

    # -- the end ---------------------------------------------------------------------------------

    def _hang_up(self, *, linger: bool) -> None:
        """Close after what is written has left. `linger`: the client may still be sending (`closing`)."""
        transport = self.transport
        if self._closing is not None or transport is None or transport.is_closing():
            return
        closing = self._closing = Closing(self._hop, transport)
        self.plainly = False
        self._input = Input.DROPPED
        self._queue.clear()
        self._unread, self._at, self._parser_holds = b"", 0, False
        if not linger:
            self.deadline = closing.at_once()
            return
        if self.upload_paused:
            self.resume_upload()
        self.pause(False)
        self.deadline = closing.lingering()
