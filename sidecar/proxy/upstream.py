"""Connections to the upstream: how they are made, kept, read and given back.

The one file that talks to the upstream's sockets. A connection belongs to one call at a time; while
nobody owns it, a byte that arrives on it closes it (it would be read as the next call's response).
"""

from __future__ import annotations

import errno
import os
import re
import select
import socket
import ssl
from asyncio import AbstractEventLoop, BaseTransport, TimerHandle
from contextlib import suppress
from typing import Final, Protocol

from aiohttp import (
    ClientConnectorCertificateError,
    ClientConnectorDNSError,
    ClientConnectorError,
    ClientError,
    ClientSSLError,
    ServerFingerprintMismatch,
)

from sidecar.proxy.aiohttp_compat import Connector, Lease, UpstreamProtocol

# Why a call got no response, as its record and the metric say it.
DNS: Final = "dns"
TLS: Final = "tls"
REFUSED: Final = "refused"
TIMEOUT: Final = "timeout"
RESET: Final = "reset"  # it ended before the response did
NOT_HTTP: Final = "not_http"  # what came is no response
NO_ROUTE: Final = "no_route"
NO_RESOURCES: Final = "no_resources"  # ours: descriptors, ports, memory
OTHER: Final = "other"

HINT_MARGIN_S: Final = 1.0  # an upstream that keeps a connection for N seconds has closed it by N; undici's figure
# A call may be silent for minutes, and NAT forgets what is silent (AWS after 350 s, Azure after 240); the SDKs of
# vendors set the same.
TCP_KEEPALIVE_S: Final = 60
TCP_KEEPALIVE_PROBES: Final = 5
READ_BYTES: Final = 262_144  # at once

_HINT = re.compile(rb"(?:\A|[,; \t])(timeout|max)[ \t]*=[ \t]*\"?([0-9]{1,9})(?![0-9])", re.IGNORECASE)
_BY_NUMBER: Final = {
    errno.ECONNREFUSED: REFUSED, errno.ENOENT: REFUSED, errno.EACCES: REFUSED,  # the last two: a Unix socket
    errno.ETIMEDOUT: TIMEOUT, errno.ECONNRESET: RESET, errno.ECONNABORTED: RESET, errno.EPIPE: RESET,
    errno.ENETUNREACH: NO_ROUTE, errno.EHOSTUNREACH: NO_ROUTE, errno.ENETDOWN: NO_ROUTE, errno.EHOSTDOWN: NO_ROUTE,
    errno.EADDRNOTAVAIL: NO_RESOURCES, errno.EMFILE: NO_RESOURCES, errno.ENFILE: NO_RESOURCES,
    errno.ENOBUFS: NO_RESOURCES, errno.ENOMEM: NO_RESOURCES,
}  # fmt: skip


class Owner(Protocol):
    """Whoever uses an upstream connection right now."""

    def upstream_data(self, data: bytes) -> None: ...

    def upstream_lost(self, clean: bool, reset: bool) -> None:
        """`clean`: the peer said that it was done. `reset`: it ended with an error."""
        ...

    def upstream_full(self, full: bool) -> None:
        """Back-pressure: stop (True) or go on (False) writing."""
        ...


class UpstreamConnection(UpstreamProtocol):
    """One connection to the upstream."""

    # aiohttp's part has a dictionary. With more than thirty names in it CPython shares their table among instances no
    # more, and each takes 1,600 bytes instead of 300.
    __slots__ = (
        "_calls_max", "_cut_off", "_hint_s", "_look", "_read_paused", "_said_done", "_upstream", "calls", "generation",
        "hint", "lease", "old_at", "owner", "use_until", "used", "why_lost",
    )  # fmt: skip

    def __init__(self, upstream: Upstream, loop: AbstractEventLoop) -> None:
        super().__init__(loop)
        self.owner: Owner | None = None
        self.lease: Lease | None = None
        self.use_until = 0.0  # the loop's time: whoever takes it later makes a new one
        self.old_at = 0.0  # likewise, whatever it does
        self.generation = 0  # of the certificates that it was made with
        self.calls = 0  # served
        self.why_lost = RESET  # one of the words above
        self.used = False  # it has responded before: its end may have been on the way when it was taken
        self._upstream = upstream
        self._said_done = False
        self._read_paused = False
        self.hint: bytes | None = None  # `Keep-Alive`, as it was read last; without one `idle_s` need not be asked
        self._hint_s: float | None = None
        self._calls_max: int | None = None
        self._look: select.poll | None = None
        self._cut_off: TimerHandle | None = None  # of one that was finished, and has something left to send

    # -- for the owner ---------------------------------------------------------------------------

    def write(self, data: bytes) -> None:
        """Never raises: uvloop does, on a transport that is closed; `upstream_lost` will tell."""
        transport = self.transport
        if transport is not None and not transport.is_closing():
            try:
                transport.write(data)
            except RuntimeError:
                return

    def pause(self, paused: bool) -> None:
        """Stop or go on reading: how a slow client slows the upstream down."""
        transport = self.transport
        if paused == self._read_paused or transport is None or transport.is_closing():
            return
        self._read_paused = paused
        if paused:
            transport.pause_reading()
        else:
            transport.resume_reading()

    def release(self, keep_alive: bytes | None = None) -> None:
        """Give it back, for the next call. `keep_alive`: the field of that name in the response."""
        if self._read_paused:
            self.pause(False)  # else its end would never be noticed
        self.owner = None
        if keep_alive is not None:
            self._take_hint(keep_alive)
        self._upstream.keep(self)

    def _take_hint(self, field: bytes) -> None:
        if field != self.hint:
            self.hint = field
            self._hint_s, calls = keep_alive_hint(field)
            # Apache counts down, Node says its limit each time: the first figure is right for both, and none is left
            # at zero.
            if self._calls_max is None or calls == 0:
                self._calls_max = calls

    def idle_s(self, keepalive_s: float) -> float:
        """How long it may wait for another call; 0: it has served its last."""
        if self._calls_max is not None and self.calls >= self._calls_max:
            return 0.0
        return keepalive_s if self._hint_s is None else min(keepalive_s, self._hint_s)

    def is_usable(self) -> bool:
        """Whether nothing has come on it while it was idle: the kernel may know of its end before the loop does. One
        system call (0.5 µs)."""
        transport = self.transport
        if self._said_done or transport is None or transport.is_closing():
            return False
        look = self._look
        if look is None:
            look = self._look = select.poll()
            sock = transport.get_extra_info("socket")
            if sock is not None:  # else the connection is none of the system's
                look.register(sock.fileno(), select.POLLIN | select.POLLPRI)
        return not look.poll(0)

    def discard(self) -> None:
        """Close it; whatever is still to come is not wanted."""
        self.owner = None
        # abort, not close: what was written and never read would be sent to its end first.
        self.abort()
        self._let_go()

    def finish(self, within_s: float) -> None:
        """Close it after what was written has left, as far as that is taken within that time: the end of a tunnel."""
        transport, self.owner = self.transport, None
        self._let_go()
        if transport is not None and transport.get_write_buffer_size():
            # Nobody looks after it any more, and a peer that reads nothing would have it open for ever.
            self._upstream.finishing.add(self)
            self._cut_off = self._loop.call_later(within_s, transport.abort)

    def _let_go(self) -> None:
        lease, self.lease = self.lease, None
        if lease is not None:
            lease.close()

    # -- called by the event loop ----------------------------------------------------------------

    def connection_made(self, transport: BaseTransport) -> None:
        super().connection_made(transport)
        self.old_at = self._upstream.old_at()
        sock = transport.get_extra_info("socket")
        if sock is not None and sock.family != getattr(socket, "AF_UNIX", None):
            _keep_alive(sock)

    def data_received(self, data: bytes) -> None:
        owner = self.owner
        if owner is not None:
            owner.upstream_data(data)
            return
        self.why_lost = NOT_HTTP  # who speaks before he is asked: SSH, SMTP and the like
        self._upstream.forget(self)
        self.discard()

    def eof_received(self) -> None:
        self._said_done = True

    def connection_lost(self, exc: BaseException | None) -> None:
        unread = b"" if exc is None or self.owner is None else self._unread()
        super().connection_lost(exc)
        if self._cut_off is not None:
            self._cut_off.cancel()
            self._upstream.finishing.discard(self)
        if isinstance(exc, ssl.SSLError):
            self.why_lost = TLS  # a certificate of ours that was wanted is told after the handshake
        self._let_go()
        if unread and self.owner is not None:
            self.owner.upstream_data(unread)
        owner, self.owner = self.owner, None
        if owner is None:
            self._upstream.forget(self)
        else:
            owner.upstream_lost(exc is None and self._said_done, exc is not None)

    def _unread(self) -> bytes:
        """What had come before the connection broke. A server that refuses an upload says so and closes, and a write
        that then fails is heard of before its words are read; the system has them still. Under TLS they are lost."""
        transport = self.transport
        sock = None if transport is None else transport.get_extra_info("socket")
        if transport is None or sock is None or transport.get_extra_info("sslcontext") is not None:
            return b""
        pieces: list[bytes] = []
        with suppress(OSError):  # that it broke, or that nothing is left
            while piece := os.read(sock.fileno(), READ_BYTES):
                pieces.append(piece)
        return b"".join(pieces)

    def pause_writing(self) -> None:
        super().pause_writing()
        if self.owner is not None:
            self.owner.upstream_full(True)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.owner is not None:
            self.owner.upstream_full(False)


class Upstream:
    """Where connections come from, and where the idle ones wait."""

    def __init__(
        self,
        *,
        loop: AbstractEventLoop,
        host: str,
        port: int,
        socket_path: str | None,
        tls: ssl.SSLContext | None,
        server_name: str | None,
        connect_timeout_s: float,
        keepalive_s: float,
        age_s: float,
    ) -> None:
        self._loop = loop
        self._keepalive_s = keepalive_s
        self._age_s = age_s
        self.finishing: set[UpstreamConnection] = set()  # done with, but for what is still to be sent
        self._idle: dict[UpstreamConnection, None] = {}  # in order of use; the last one used is taken next
        self._generation = 0
        self._connector = Connector(
            lambda: UpstreamConnection(self, loop),
            loop=loop,
            host=host,
            port=port,
            tls=tls,
            server_name=server_name,
            socket_path=socket_path,
            connect_timeout_s=connect_timeout_s,
        )

    @property
    def idle(self) -> int:
        """Connections at hand."""
        return len(self._idle)

    def old_at(self) -> float:
        """When a connection made now is too old to be used again."""
        return self._loop.time() + self._age_s

    def take(self) -> UpstreamConnection | None:
        """An idle connection, at once, or None."""
        idle, now = self._idle, self._loop.time()
        while idle:
            connection, _ = idle.popitem()
            if connection.use_until > now and connection.is_usable():
                return connection
            connection.discard()
        return None

    async def connect(self) -> UpstreamConnection:
        """A new one. Raises `TimeoutError` or `UnreachableError`."""
        generation = self._generation
        try:
            lease = await self._connector.connect()
        except TimeoutError:
            raise
        except (ClientError, OSError, ValueError) as error:
            raise UnreachableError(*why_unreachable(error)) from error
        connection = lease.protocol
        assert isinstance(connection, UpstreamConnection)
        connection.lease = lease
        connection.generation = generation
        return connection

    def keep(self, connection: UpstreamConnection) -> None:
        """For the next call, as long as it is likely to be open at the other end, and while its address holds."""
        now = self._loop.time()
        connection.used = True
        connection.calls += 1
        idle_s = self._keepalive_s
        if connection.hint is not None:
            idle_s = connection.idle_s(idle_s)
        until = now + idle_s
        if until > connection.old_at:
            until = connection.old_at
        connection.use_until = until
        # One that is closing is told apart when it is taken, or ends while it waits.
        if until > now and connection.generation == self._generation and connection.transport is not None:
            self._idle[connection] = None
        else:
            connection.discard()

    def renew_tls(self, tls: ssl.SSLContext) -> None:
        """Other certificates, for connections made from now on; those there are serve their call and no other."""
        self._generation += 1
        self._connector.renew_tls(tls)
        self._close_idle()

    def retire(self) -> None:
        """No call will come any more: those that are open end, and each closes its connection behind it."""
        self._keepalive_s = 0.0
        self._close_idle()

    def forget(self, connection: UpstreamConnection) -> None:
        """It ended while it was idle."""
        self._idle.pop(connection, None)

    def sweep(self, now: float) -> None:
        """Close what has been idle for too long. Called about once a second: none is used in between (`take`)."""
        for connection in [connection for connection in self._idle if connection.use_until <= now]:
            del self._idle[connection]
            connection.discard()

    async def aclose(self) -> None:
        """Close all connections."""
        self._close_idle()
        await self._connector.aclose()

    def _close_idle(self) -> None:
        idle, self._idle = self._idle, {}
        for connection in idle:
            connection.discard()


def keep_alive_hint(field: bytes) -> tuple[float | None, int | None]:
    """(how long to keep an idle connection, how many calls it is good for), as a `Keep-Alive` field says it; None: not
    said. The parameters are nowhere defined in an RFC any more (2068, 19.7.1); the least of what is repeated counts."""
    seconds: float | None = None
    calls: int | None = None
    for name, figure in _HINT.findall(field):
        said = int(figure)
        if name.lower() == b"max":
            calls = said if calls is None else min(calls, said)
        else:
            less = max(0.0, said - HINT_MARGIN_S)
            seconds = less if seconds is None else min(seconds, less)
    return seconds, calls


def _keep_alive(sock: socket.socket) -> None:
    options = [
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
        (socket.IPPROTO_TCP, getattr(socket, "TCP_KEEPIDLE", getattr(socket, "TCP_KEEPALIVE", None)), TCP_KEEPALIVE_S),
        (socket.IPPROTO_TCP, getattr(socket, "TCP_KEEPINTVL", None), TCP_KEEPALIVE_S),
        (socket.IPPROTO_TCP, getattr(socket, "TCP_KEEPCNT", None), TCP_KEEPALIVE_PROBES),
    ]
    for level, option, value in options:
        if option is not None:
            with suppress(OSError):  # not known to every system, and the connection is good without
                sock.setsockopt(level, option, value)


class UnreachableError(Exception):
    """Refused, no such host, or no trust in its certificate. `reason` is one of the words above, `words` say more."""

    def __init__(self, reason: str, words: str) -> None:
        super().__init__(words)
        self.reason = reason
        self.words = words


def why_unreachable(error: Exception) -> tuple[str, str]:
    """The reason, and what a person is told; nothing in it came over the wire."""
    if isinstance(error, (ClientConnectorDNSError, UnicodeError)):
        return DNS, getattr(error, "strerror", None) or "there is no such host"
    if isinstance(error, ClientConnectorCertificateError):
        said = getattr(error.certificate_error, "verify_message", None) or "it is not valid"
        return TLS, f"its certificate is not accepted: {said}"
    cause: Exception = error.os_error if isinstance(error, ClientConnectorError) else error
    if isinstance(error, (ClientSSLError, ServerFingerprintMismatch)) or isinstance(cause, ssl.SSLError):
        return TLS, f"the TLS handshake failed: {getattr(cause, 'reason', None) or 'no reason was given'}"
    number = _number(cause)
    return _BY_NUMBER.get(number, OTHER), os.strerror(number) if number > 0 else type(cause).__name__


def _number(error: BaseException) -> int:
    """The system's error number. uvloop and aiohttp make errors without one, which are told by their class."""
    if isinstance(error, OSError) and error.errno:
        return error.errno
    if isinstance(error, ConnectionRefusedError):
        return errno.ECONNREFUSED
    if isinstance(error, TimeoutError):
        return errno.ETIMEDOUT
    return errno.ECONNRESET if isinstance(error, ConnectionError) else 0
