"""Connections to the upstream: how they are made, kept, read and given back.

The one file that talks to the upstream's sockets. A connection belongs to one call at a time; while
nobody owns it, a byte that arrives on it closes it (it would be read as the next call's answer).
"""

from __future__ import annotations

import errno
import os
import ssl
from asyncio import AbstractEventLoop
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

# Why a call got no answer, as its record and the metric say it.
DNS: Final = "dns"
TLS: Final = "tls"
REFUSED: Final = "refused"
TIMEOUT: Final = "timeout"
RESET: Final = "reset"  # it ended before the answer did
NOT_HTTP: Final = "not_http"  # what came is no answer
NO_ROUTE: Final = "no_route"
NO_RESOURCES: Final = "no_resources"  # ours: descriptors, ports, memory
OTHER: Final = "other"

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

    def __init__(self, upstream: Upstream, loop: AbstractEventLoop) -> None:
        super().__init__(loop)
        self.owner: Owner | None = None
        self.lease: Lease | None = None
        self.idle_since = 0.0
        self.why_lost = RESET  # one of the words above
        self.used = False  # it has answered before: its end may have been on the way when it was taken
        self._upstream = upstream
        self._said_done = False
        self._read_paused = False

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

    def release(self) -> None:
        """Give it back, for the next call."""
        if self._read_paused:
            self.pause(False)  # else its end would never be noticed
        self.owner = None
        self._upstream.keep(self)

    def discard(self) -> None:
        """Close it; whatever is still to come is not wanted."""
        self.owner = None
        # abort, not close: what was written and never read would be sent to its end first.
        self.abort()
        self._let_go()

    def finish(self) -> None:
        """Close it after what was written has left: the end of a tunnel."""
        self.owner = None
        self._let_go()

    def _let_go(self) -> None:
        lease, self.lease = self.lease, None
        if lease is not None:
            lease.close()

    # -- called by the event loop ----------------------------------------------------------------

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
        super().connection_lost(exc)
        if isinstance(exc, ssl.SSLError):
            self.why_lost = TLS  # a certificate of ours that was wanted is told after the handshake
        self._let_go()
        owner, self.owner = self.owner, None
        if owner is None:
            self._upstream.forget(self)
        else:
            owner.upstream_lost(exc is None and self._said_done, exc is not None)

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
    ) -> None:
        self._loop = loop
        self._keepalive_s = keepalive_s
        self._idle: dict[UpstreamConnection, None] = {}  # in order of use; the last one used is taken next
        self._now = loop.time()
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

    def take(self) -> UpstreamConnection | None:
        """An idle connection, at once, or None."""
        idle = self._idle
        while idle:
            connection, _ = idle.popitem()
            if connection.is_connected():
                return connection
        return None

    async def connect(self) -> UpstreamConnection:
        """A new one. Raises `TimeoutError` or `UnreachableError`."""
        try:
            lease = await self._connector.connect()
        except TimeoutError:
            raise
        except (ClientError, OSError, ValueError) as error:
            raise UnreachableError(*why_unreachable(error)) from error
        connection = lease.protocol
        assert isinstance(connection, UpstreamConnection)
        connection.lease = lease
        return connection

    def keep(self, connection: UpstreamConnection) -> None:
        """For the next call. Which connections expire is looked up in `sweep`."""
        if connection.is_connected():
            connection.used = True
            connection.idle_since = self._now
            self._idle[connection] = None
        else:
            connection.discard()

    def forget(self, connection: UpstreamConnection) -> None:
        """It ended while it was idle."""
        self._idle.pop(connection, None)

    def sweep(self, now: float) -> None:
        """Close what has been idle for too long. Called a few times a second; the time it is told is what
        connections are marked with, so that giving one back asks for no clock."""
        self._now = now
        oldest = now - self._keepalive_s
        expired = []
        for connection in self._idle:
            if connection.idle_since >= oldest:
                break
            expired.append(connection)
        for connection in expired:
            del self._idle[connection]
            connection.discard()

    async def aclose(self) -> None:
        """Close all connections."""
        idle, self._idle = self._idle, {}
        for connection in idle:
            connection.discard()
        await self._connector.aclose()


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


def client_tls(*, ca_file: str | None, cert_file: str | None, key_file: str | None) -> ssl.SSLContext:
    """How the upstream is verified. ALPN is set because a server may otherwise pick HTTP/2."""
    context = ssl.create_default_context(cafile=ca_file)
    context.set_alpn_protocols(["http/1.1"])
    if cert_file is not None:
        context.load_cert_chain(cert_file, key_file)
    return context
