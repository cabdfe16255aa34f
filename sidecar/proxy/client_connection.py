"""A client's connection: requests come out of it in order, answers go into it in order.

It owns what belongs to the connection and not to a call: pipelining, keep-alive, what is too large
or malformed to become a call, and closing so that the client can still read its last answer.
"""

from __future__ import annotations

import logging
import re
import socket
import struct
from asyncio import BaseTransport
from collections import deque
from typing import TYPE_CHECKING, Final

from sidecar.proxy import local_responses
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
from sidecar.proxy.call import Call
from sidecar.proxy.context import NEVER, Hop
from sidecar.proxy.local_responses import OwnAnswer
from sidecar.proxy.tunnel import Tunnel

if TYPE_CHECKING:
    from sidecar.proxy.server import Clients

log = logging.getLogger(__name__)

LAST_CHUNK: Final = b"\r\n0\r\n\r\n"
SWITCH_TAIL_BYTES_MAX: Final = 65_536  # what a client may send ahead of the 101
RESET: Final = struct.pack("ii", 1, 0)  # SO_LINGER: close with a reset, so that a cut cannot look like an end

_REQUEST_LINE = re.compile(rb"(?:\r\n)*[!#$%&'*+.^_`|~0-9A-Za-z-]{1,64} [!-~]+ HTTP/1\.[01]\r\n")


class Client(ClientProtocol):
    """One client connection."""

    __slots__ = (
        "_behind", "_clients", "_closing", "_deaf", "_head_bytes", "_hop", "_last_bytes", "_no_more", "_own",
        "_queue", "_switch_tail", "_switching", "_taking", "_tunnel", "_uploading", "call", "deadline",
        "full", "peer",
    )  # fmt: skip

    def __init__(self, server: Server, hop: Hop, clients: Clients) -> None:
        rules = hop.rules
        super().__init__(
            server,
            hop.loop,
            target_bytes_max=rules.target_bytes_max,
            field_bytes_max=rules.head_bytes_max,
            fields_max=rules.head_fields_max,
        )
        self._hop = hop
        self._clients = clients
        self._queue: deque[tuple[RawRequestMessage, StreamReader]] = deque()
        self._uploading: StreamReader | None = None  # a chunked body that is still coming
        self._last_bytes = b""  # of what came while it did
        self._head_bytes = 0  # of a head that is still coming
        self._no_more = False  # no request behind the ones in hand will be taken
        self._deaf = False  # what comes is dropped
        self._own: OwnAnswer | None = None  # to be sent when the calls in hand are answered
        self._behind = False  # requests were parsed ahead; reading is paused until they are taken up
        self._taking = False
        self._closing = False
        self._switching = False  # a protocol switch was asked for, and is not decided
        self._switch_tail = b""
        self._tunnel: Tunnel | None = None
        self.full = False  # the client does not read as fast as we write
        self.call: Call | None = None
        self.deadline = NEVER

    # -- called by the event loop ----------------------------------------------------------------

    def connection_made(self, transport: BaseTransport) -> None:
        super().connection_made(transport)
        peer = transport.get_extra_info("peername")
        ip = peer[0] if isinstance(peer, tuple) else None
        tls = transport.get_extra_info("sslcontext") is not None
        self.peer = self._hop.headers.peer(ip, tls=tls)
        self.deadline = self._hop.loop.time() + self._hop.rules.head_timeout_s
        if not self._clients.opened(self):
            self.reject(local_responses.TOO_MANY, "connections")

    def connection_lost(self, exc: BaseException | None) -> None:
        self._clients.closed(self)
        super().connection_lost(exc)
        self._deaf = True
        self._queue.clear()
        self._tunnel = None
        call, self.call = self.call, None
        if call is not None:
            call.client_left(exc)

    def data_received(self, data: bytes) -> None:
        if self._tunnel is not None:
            self._tunnel.from_client(data)
            return
        if self._deaf:
            return
        if self._switching:
            self._keep_for_switch(data)
            return
        try:
            messages, switched, tail = self.parse(data)
        except HttpProcessingError as error:
            self._malformed(error, data)
            return
        if messages:
            if len(data) + self._head_bytes > self._hop.rules.head_bytes_max and self._too_large(messages[-1][0]):
                self._refuse(local_responses.HEAD_TOO_LARGE, "head_too_large")
                return
            self._head_bytes = 0
            self._line_up(messages, data, switched, tail)
            if self.call is None:
                self._take()
                return
        elif self._uploading is not None:
            self._last_bytes = (self._last_bytes + data)[-len(LAST_CHUNK) :]
            if self._uploading.is_eof():
                self._body_ended(safe=self._last_bytes == LAST_CHUNK)
        elif data and (self.call is None or self.call.upload_done):
            self._count_head(len(data))
        call = self.call
        if call is not None and not call.upload_done:
            call.pump()

    def pause_writing(self) -> None:
        super().pause_writing()
        self.full = True
        if self.call is not None:
            self.call.client_full(True)

    def resume_writing(self) -> None:
        super().resume_writing()
        self.full = False
        if self.call is not None:
            self.call.client_full(False)

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
            self._hop.loop.call_soon(self.parse_on)

    def parse_on(self) -> None:
        """Parse what the parser held back while an upload was paused."""
        if not self._deaf and self.transport is not None:
            self.data_received(b"")

    def may_keep_alive(self, message: RawRequestMessage) -> bool:
        """Whether another request may come after this one; said in the head of its answer."""
        if message.should_close or self._hop.stopping:
            return False
        return not self._no_more or bool(self._queue)

    def may_switch(self, message: RawRequestMessage) -> bool:
        """Whether a protocol switch is passed on: HTTP/2 would hide its calls from the record."""
        return self._switching and b"h2c" not in message.headers.get("Upgrade", "").lower().encode("utf-8", "replace")

    def switch(self, tunnel: Tunnel) -> None:
        """The upstream agreed: hand over what was sent ahead."""
        self._tunnel = tunnel
        self._switching = False
        tail, self._switch_tail = self._switch_tail, b""
        self.pause(False)
        if tail:
            tunnel.from_client(tail)

    def call_over(self, keep_alive: bool, upload_done: bool) -> None:
        """The answer is written; go on to the next request, or close."""
        self.call = None
        transport = self.transport
        if transport is None or transport.is_closing():
            return
        if not keep_alive or self._hop.stopping:
            self._hang_up(linger=not upload_done or self._no_more)
            return
        if self._switching:
            self._switch_declined()
        self.deadline = self._hop.now + self._hop.rules.keepalive_timeout_s
        if not self._taking and (self._queue or self._behind or self._no_more):
            self._take()

    def reject(self, own: OwnAnswer, limit: str) -> None:
        """Answer without a call (nothing is recorded) and close."""
        self._hop.metrics.limit_reached(limit)
        self.send(own.encode(close=True))
        self._hang_up(linger=True)

    def reset(self) -> None:
        """Cut, so that nothing can be taken for a clean end. `abort` alone would send one."""
        self._deaf = True
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

    def expired(self) -> None:
        """The connection's own deadline passed: idle, a head that does not end, or lingering."""
        self.deadline = NEVER
        transport = self.transport
        if transport is None:
            return
        if self._closing:
            transport.abort()
        elif self._head_bytes:
            self._hop.metrics.limit_reached("head_timeout")
            self._refuse(local_responses.TOO_SLOW, "head_timeout")
        else:
            transport.close()

    def stop(self) -> None:
        """Close if no call is open; else the open one is the last."""
        if self.call is None and self.transport is not None and not self._closing:
            self.transport.close()

    # -- leaves ----------------------------------------------------------------------------------

    def _line_up(self, messages: Messages, data: bytes, switched: bool, tail: bytes) -> None:
        """Put what was parsed into the queue, unless it stands behind something that cannot be trusted."""
        if self._uploading is not None:
            # A body ended and a request follows in one piece: trailers cannot be told from fields.
            self._body_ended(safe=False)
            return
        for message, payload in messages:
            if self._no_more:
                break
            self._queue.append((message, payload))
            if message.chunked:
                self._chunked(payload, data, last=message is messages[-1][0])
            if message.upgrade:
                self._switch_asked(message, data, switched, tail)
        if len(self._queue) >= PIPELINE_MAX // 2:
            self._behind = True
            self.pause(True)

    def _take(self) -> None:
        """Take up the next requests. A call may be over before `start` returns."""
        self._taking = True
        try:
            while self.call is None and self._queue and not self._closing:
                message, payload = self._queue.popleft()
                self.parser_idle_again()
                if len(self._hop.calls) >= self._hop.rules.calls_max:
                    self.reject(local_responses.TOO_MANY, "calls")
                    return
                self.deadline = NEVER
                call = self.call = Call(self._hop, self, message, payload)
                try:
                    call.start()
                except Exception:
                    log.exception("a call could not be let in")
                    self._start_failed(call)
        finally:
            self._taking = False
        if self._behind and not self._queue and not self._closing:
            self._behind = False
            self.pause(False)
            self._hop.loop.call_soon(self.parse_on)
        elif self.call is None and not self._closing:
            if self._own is not None:
                self.send(self._own.encode(close=True))
                self._hang_up(linger=True)
            elif self._no_more and not self._switching:
                self._hang_up(linger=True)

    def _start_failed(self, call: Call) -> None:
        if call in self._hop.calls:
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
            self._no_more = True

    def _body_ended(self, *, safe: bool) -> None:
        self._uploading = None
        self._last_bytes = b""
        if not safe:
            self._no_more = True

    def _count_head(self, size: int) -> None:
        if not self._head_bytes:
            self.deadline = self._hop.loop.time() + self._hop.rules.head_timeout_s
        self._head_bytes += size
        if self._head_bytes > self._hop.rules.head_bytes_max:
            self._refuse(local_responses.HEAD_TOO_LARGE, "head_too_large")

    def _too_large(self, message: RawRequestMessage) -> bool:
        size = sum(len(name) + len(value) + 4 for name, value in message.raw_headers)
        return size + len(message.path) > self._hop.rules.head_bytes_max

    def _malformed(self, error: HttpProcessingError, data: bytes) -> None:
        """Fixed texts only: the parser's own words hold bytes of the request, secrets included."""
        kind = refusal(error, self._hop.rules.target_bytes_max)
        call = self.call
        if call is not None and not call.upload_done:
            self._own_refused("bad_chunk")
            call.upload_broke(local_responses.BAD_CHUNK)
        elif kind == "target":
            self._refuse(local_responses.TARGET_TOO_LONG, "target_too_long")
        elif kind == "head":
            self._refuse(local_responses.HEAD_TOO_LARGE, "head_too_large")
        elif kind == "method" and _REQUEST_LINE.match(data):
            self._refuse(local_responses.UNKNOWN_METHOD, "unknown_method")
        else:
            self._refuse(local_responses.BAD_REQUEST, "malformed")

    def _refuse(self, own: OwnAnswer, reason: str) -> None:
        """Something that is no call: answered after the calls in hand, and the end of the connection."""
        self._own_refused(reason)
        self._own = own
        if self.call is None:
            self._take()

    def _own_refused(self, reason: str) -> None:
        self._hop.metrics.request_rejected(reason)
        self._no_more = self._deaf = True

    def _switch_asked(self, message: RawRequestMessage, data: bytes, switched: bool, tail: bytes) -> None:
        """What follows is another protocol's, if the upstream agrees. aiohttp's parser keeps what came
        behind the head for WebSocket only; for others it is lost, so the connection ends after the answer,
        and with bytes behind the head the switch is not passed on at all."""
        if switched:
            self._switching = True
            self._switch_tail = tail
        else:
            self._no_more = True
            whole = data.find(b"\r\n\r\n") + 4 == len(data)
            self._switching = whole and not message.should_close and self._uploading is None

    def _keep_for_switch(self, data: bytes) -> None:
        self._switch_tail += data
        if len(self._switch_tail) > SWITCH_TAIL_BYTES_MAX:
            self.pause(True)

    def _switch_declined(self) -> None:
        """The answer was no 101: what was sent ahead is HTTP after all."""
        self._switching = False
        self.pause(False)
        tail, self._switch_tail = self._switch_tail, b""
        self.parser_resume_http()
        if tail:
            self._hop.loop.call_soon(self.data_received, tail)

    def _hang_up(self, *, linger: bool) -> None:
        """Close after what is written has left. `linger`: the client may still be sending, and closing
        with unread bytes would reset the connection and take the answer with it."""
        transport = self.transport
        if self._closing or transport is None or transport.is_closing():
            return
        self._closing = self._deaf = True
        self._queue.clear()
        if not linger:
            transport.close()
            return
        self.deadline = self._hop.loop.time() + self._hop.rules.linger_s
        if self.upload_paused:
            self.resume_upload()
        self.pause(False)
        if transport.can_write_eof():
            try:
                transport.write_eof()
            except (OSError, RuntimeError):
                transport.close()
