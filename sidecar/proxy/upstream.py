"""Connections to the upstream: how they are made, kept, read and given back.

The one file that talks to the upstream's sockets. A connection belongs to one call at a time; while
nobody owns it, a byte that arrives on it closes it (it would be read as the next call's answer).
"""

from __future__ import annotations

import ssl
from asyncio import AbstractEventLoop, Transport
from typing import Protocol

from aiohttp import ClientError

from sidecar.proxy.aiohttp_internals import Pool, PooledConnection, UpstreamProtocol


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

    def __init__(self, loop: AbstractEventLoop) -> None:
        super().__init__(loop)
        self.owner: Owner | None = None
        self.lease: PooledConnection | None = None
        self.uses = 0
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
        """Give it back to the pool."""
        if self._read_paused:
            self.pause(False)  # else its end would never be noticed
        self.owner = None
        lease, self.lease = self.lease, None
        if lease is not None:
            lease.release()

    def discard(self) -> None:
        """Close it; whatever is still to come is not wanted."""
        self.owner = None
        self.unusable = True
        lease, self.lease = self.lease, None
        if lease is not None:
            # abort, not close: an answer that nobody reads would be sent to its end first.
            self.abort()
            lease.close()

    def finish(self) -> None:
        """Close it after what was written has left: the end of a tunnel."""
        self.owner = None
        self.unusable = True
        lease, self.lease = self.lease, None
        if lease is not None:
            lease.close()

    # -- called by the event loop ----------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        owner = self.owner
        if owner is not None:
            owner.upstream_data(data)
            return
        self.unusable = True
        if self.transport is not None:
            self.transport.close()

    def eof_received(self) -> None:
        self._said_done = True

    def connection_lost(self, exc: BaseException | None) -> None:
        super().connection_lost(exc)
        lease, self.lease = self.lease, None
        if lease is not None:
            lease.close()
        owner, self.owner = self.owner, None
        if owner is not None:
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
    """Where connections come from."""

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
        self._pool = Pool(
            lambda: UpstreamConnection(loop),
            loop=loop,
            host=host,
            port=port,
            tls=tls,
            server_name=server_name,
            socket_path=socket_path,
            connect_timeout_s=connect_timeout_s,
            keepalive_s=keepalive_s,
        )

    def take(self) -> UpstreamConnection | None:
        """A pooled connection, at once, or None."""
        lease = self._pool.take()
        return None if lease is None else _leased(lease)

    async def connect(self) -> UpstreamConnection:
        """A new one. Raises `TimeoutError` or `UnreachableError`."""
        try:
            return _leased(await self._pool.connect())
        except TimeoutError:
            raise
        except (ClientError, OSError, ValueError) as error:
            raise UnreachableError(type(error).__name__) from error

    async def aclose(self) -> None:
        await self._pool.aclose()


class UnreachableError(Exception):
    """Refused, no such host, or no trust in its certificate."""


def _leased(lease: PooledConnection) -> UpstreamConnection:
    connection = lease.protocol
    assert isinstance(connection, UpstreamConnection)
    connection.lease = lease
    connection.uses += 1
    return connection


def client_tls(*, ca_file: str | None, cert_file: str | None, key_file: str | None) -> ssl.SSLContext:
    """How the upstream is verified. ALPN is set because a server may otherwise pick HTTP/2."""
    context = ssl.create_default_context(cafile=ca_file)
    context.set_alpn_protocols(["http/1.1"])
    if cert_file is not None:
        context.load_cert_chain(cert_file, key_file)
    return context


def is_open(transport: Transport | None) -> bool:
    """Whether bytes may still be written."""
    return transport is not None and not transport.is_closing()
