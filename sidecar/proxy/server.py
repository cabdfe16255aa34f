"""The proxy as a whole: sockets that listen, connections and calls that are open, and their end.

One sweep a fraction of a second walks over the open calls and connections and lets the expired ones
know; no call and no connection has a timer of its own.
"""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import select
import socket
import ssl
import stat
import sys
from asyncio import Server as AsyncioServer
from asyncio import TimerHandle
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final

from sidecar.gate.admission import Admission
from sidecar.model.exchange import Recorder
from sidecar.model.http_url import UpstreamAddress
from sidecar.proxy.aiohttp_compat import Server
from sidecar.proxy.client_connection import Client, Clients
from sidecar.proxy.context import (
    Attribute,
    AttributeByBody,
    Destination,
    Hop,
    PlainAttribution,
    ProxyMetrics,
    Reading,
    Route,
)
from sidecar.proxy.destinations import Destinations
from sidecar.proxy.headers import HeaderRules
from sidecar.proxy.plain_call import PlainCalls
from sidecar.proxy.tls import of_listener, of_named, of_upstream, read, read_or_kept, show, why_unreadable
from sidecar.proxy.upstream import Upstream
from sidecar.settings import ProxySettings, UpstreamSettings
from sidecar.settings.upstreams import DEFAULT_NAME, reread
from sidecar.storage.sockets import FILE_STAYS, accepting, for_both_families, hold_new
from sidecar.usage import Taps

log = logging.getLogger(__name__)

BACKLOG: Final = 4096  # connections waiting to be accepted; the kernel caps it at somaxconn
SWEEP_S_MAX: Final = 1.0  # how late a deadline may be noticed
SWEEP_S_MIN: Final = 0.02
REFUSED_MAX: Final = 64  # connections too many that are answered and read on for a moment; more are closed at once
REFUSED_MIN: Final = 4
FILES_BESIDE: Final = 256  # descriptors for spool, ledger, backends and the admin port; 40 are in use when idle
FILES_BESIDE_MIN: Final = 64
CUT_S: Final = 1.0  # how long cut connections may take to be gone
CAME_S: Final = 1.0  # at a stop: how long what had come by then may take to be taken up
QUEUED_S: Final = 1.0  # and what waits then in the queue of a listener that is never empty
CAME_LOOK_S: Final = 0.005  # between two looks whether there is more of it
LEAVE_LOOK_S: Final = 0.02  # between two looks whether what was written has left
MADE_S: Final = 0.001  # a connection that is being made when no more are: the way to its client and back


def within_files(files: int, settings: ProxySettings) -> ProxySettings:
    """With connections and drains cut down to what this many file descriptors allow: an open call needs one
    for its client and one for the upstream, a drain one, and what else the process has open must go on working."""
    connections, drains = settings.connections, settings.drains
    if files_needed(settings) <= files:
        return settings
    left = files - min(FILES_BESIDE, max(FILES_BESIDE_MIN, files // 4))
    drains = min(drains, left // 8)
    connections = min(connections, max(1, (left - drains - min(REFUSED_MAX, left // 16)) // 2))
    return replace(settings, connections=connections, drains=drains)


def files_needed(settings: ProxySettings) -> int:
    """The file descriptors with which nothing has to be cut down."""
    return 2 * settings.connections + settings.drains + REFUSED_MAX + FILES_BESIDE


def _files() -> int:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return sys.maxsize if soft == resource.RLIM_INFINITY else soft


class Proxy:
    """`start`, `listen` as often as wanted, `stop`, `aclose`."""

    def __init__(
        self,
        *,
        settings: ProxySettings,
        recorder: Recorder,
        taps: Taps,
        attribute: Attribute,
        attribute_by_body: AttributeByBody | None = None,
        plainly: PlainAttribution | None = None,
        route: Route,
        metrics: ProxyMetrics,
        gate: Admission | None = None,
        readings: Mapping[str, Reading] | None = None,
    ) -> None:
        """`gate`: None: every call may be made. `plainly`: as `attribute`, for calls that may take the short way; None:
        none may. `readings`: by the name of each of `settings.upstreams`; None: they are read as all others are."""
        self._settings = settings
        self._parts = (recorder, attribute_by_body, route)
        self._reading = Reading(taps=taps, attribute=attribute, plainly=plainly)
        self._readings = readings or {}
        self._named: tuple[UpstreamSettings, ...] = settings.upstreams  # with the secrets that hold now
        self._metrics = metrics
        self._gate = gate
        self._hop: Hop | None = None
        self._clients: Clients | None = None
        self._plain: PlainCalls | None = None
        self._server: Server | None = None
        self._listeners: list[AsyncioServer] = []
        self._socket_paths: list[str] = []
        self._tls: ssl.SSLContext | None = None  # of the listeners
        self._shown: ssl.SSLContext | None = None  # the one that has the certificate which clients are shown now
        self._sweeper: TimerHandle | None = None
        self._sweep_s = _sweep_s(settings)

    def __repr__(self) -> str:
        hop, clients = self._hop, self._clients
        if hop is None or clients is None:
            return "<Proxy: not started>"
        state = "stopping" if hop.stopping else "leaving" if hop.leaving else "open"
        return f"<Proxy: {state}, {len(clients.open)} connections, {len(hop.calls)} calls, {hop.drains.taken} drains>"

    @property
    def open_calls(self) -> int:
        """Calls under way, those being drained included."""
        return 0 if self._hop is None else len(self._hop.calls)

    async def start(self) -> None:
        """Open the connector. Raises `OSError` or `ssl.SSLError` for certificates that cannot be read."""
        files = _files()
        settings = self._settings = within_files(files, self._settings)
        loop = asyncio.get_running_loop()
        if (shown := of_listener(settings)) is not None:
            tls = self._tls = self._shown = read_or_kept(shown)
            show(tls, lambda: self._shown or tls)
        rest = self._rest()
        named = [self._destination(one, self._readings.get(one.name, self._reading)) for one in self._named]
        recorder, attribute_by_body, route = self._parts
        hop = self._hop = Hop(
            settings=settings,
            rest=rest,
            others=_table(self._named, named, rest),
            named=tuple(named),
            recorder=recorder,
            attribute_by_body=attribute_by_body,
            route=route,
            metrics=self._metrics,
            gate=self._gate,
            loop=loop,
            now=loop.time(),
        )
        refused = min(REFUSED_MAX, max(REFUSED_MIN, files // 16))
        clients = self._clients = Clients(settings.connections, self._metrics, refused_max=refused)
        plain = self._plain = None if self._reading.plainly is None else PlainCalls(hop, rest.headers.base)
        self._server = Server(lambda server: Client(server, hop, clients, plain), loop)
        self._sweeper = loop.call_later(self._sweep_s, self._sweep)

    def _rest(self) -> Destination:
        """What gets the calls that no other upstream does; without a URL for it they are refused."""
        settings = self._settings
        if settings.upstream_url is None:
            return Destination(
                name=None,
                url="",
                headers=self._rules(UpstreamAddress.nowhere(), None),
                upstream=None,
                reading=self._reading,
                timeout_s=settings.upstream_timeout_s,
            )
        address = UpstreamAddress.parse(settings.upstream_url)
        tls = read_or_kept(of_upstream(settings)) if address.tls else None
        return Destination(
            name=DEFAULT_NAME if self._named else None,
            url=settings.upstream_url,
            headers=self._rules(address, None),
            upstream=self._pool(address, tls, settings.upstream_server_name),
            reading=self._reading,
            timeout_s=settings.upstream_timeout_s,
        )

    def _destination(self, one: UpstreamSettings, reading: Reading, pool: Upstream | None = None) -> Destination:
        """`pool`: that it had before, whose connections are good for it still."""
        address = UpstreamAddress.parse(one.url)
        if pool is None:
            pool = self._pool(address, read_or_kept(of_named(one)) if address.tls else None, one.server_name)
        return Destination(
            name=one.name,
            url=one.url,
            headers=self._rules(address, one),
            upstream=pool,
            reading=reading,
            timeout_s=self._settings.upstream_timeout_s if one.timeout_s is None else one.timeout_s,
        )

    def _rules(self, address: UpstreamAddress, one: UpstreamSettings | None) -> HeaderRules:
        return HeaderRules(self._settings, address, self._metrics.limit_reached, self._metrics.redirected, one)

    def _pool(self, address: UpstreamAddress, tls: ssl.SSLContext | None, server_name: str | None) -> Upstream:
        settings = self._settings
        return Upstream(
            loop=asyncio.get_running_loop(),
            host=address.host,
            port=address.port,
            socket_path=address.socket_path,
            tls=tls,
            server_name=server_name,
            connect_timeout_s=settings.upstream_connect_timeout_s,
            keepalive_s=settings.upstream_keepalive_s,
            age_s=settings.upstream_connection_age_s,
        )

    async def listen(
        self,
        *,
        host: str | None = None,
        port: int = 0,
        path: str | None = None,
        sock: socket.socket | None = None,
    ) -> tuple[str, int] | str:
        """Accept calls on a TCP address, a Unix socket's path, or a socket made elsewhere. Says where."""
        server = self._server
        if server is None:
            raise RuntimeError("start the proxy before it listens")
        loop = asyncio.get_running_loop()
        accept = accepting(server)
        tls = self._tls
        handshake_s = self._settings.head_timeout_s if tls is not None else None
        if path is None and sock is None:
            sock = for_both_families(host, port)
        if path is not None:
            _remove_stale(path)
            listener = await loop.create_unix_server(
                accept, path, backlog=BACKLOG, ssl=tls, ssl_handshake_timeout=handshake_s, **FILE_STAYS
            )
            self._listeners.append(listener)
            self._socket_paths.append(path)
            return path
        if sock is not None:
            if sock.family == getattr(socket, "AF_UNIX", None):
                listener = await loop.create_unix_server(
                    accept, sock=sock, backlog=BACKLOG, ssl=tls, ssl_handshake_timeout=handshake_s, **FILE_STAYS
                )
            else:
                listener = await loop.create_server(
                    accept, sock=sock, backlog=BACKLOG, ssl=tls, ssl_handshake_timeout=handshake_s
                )
        else:
            listener = await loop.create_server(
                accept, host, port, backlog=BACKLOG, ssl=tls, ssl_handshake_timeout=handshake_s
            )
        self._listeners.append(listener)
        name = listener.sockets[0].getsockname()
        return name if isinstance(name, str) else (name[0], name[1])

    def reload_tls(self) -> None:
        """Read the certificates of both sides anew; connections made from now on get them. What cannot be read changes
        nothing."""
        settings = self._settings
        shown = of_listener(settings)
        if self._tls is not None and shown is not None and shown.cert is not None:
            try:
                self._shown = read(shown)
            except (OSError, ValueError) as error:
                log.error("the certificate was not reloaded, the old one stays: %s", why_unreadable(error))
        if self._hop is None:
            return
        rest = self._hop.rest
        of_each = [(rest, of_upstream(settings))]
        of_each += [(to, of_named(one)) for one, to in zip(self._named, self._hop.named, strict=True)]
        for to, files in of_each:
            if to.upstream is None or not to.url.startswith("https:") or (files.ca is None and files.cert is None):
                continue
            try:
                to.upstream.renew_tls(read(files))
            except (OSError, ValueError) as error:
                why, which = why_unreadable(error), "" if to.name is None else f" {to.name}"
                log.error("the certificates for the upstream%s were not reloaded, the old ones stay: %s", which, why)

    def reload_secrets(self) -> list[str]:
        """Read the values anew that the upstreams' headers have from files; calls let in from now on are sent them.
        Gives what could not be read, of which the old value stays."""
        named, problems = reread(self._named)
        if named != self._named and self._hop is not None:
            for one, to in zip(named, self._hop.named, strict=True):
                to.headers.set_own(one.set_headers)
            if self._plain is not None:
                self._plain.forget()
        self._named = named
        for problem in problems:
            log.error("a secret was not reloaded, the old one stays: %s", problem)
        return problems

    def renew(
        self,
        *,
        settings: ProxySettings,
        recorder: Recorder,
        taps: Taps,
        readings: Mapping[str, Reading],
        route: Route,
        gate: Admission | None,
    ) -> None:
        """Handle calls by these from now on. Open calls end as they began, at the upstream that they are at, and no
        client's connection is closed. Of `settings` that counts which is asked for each call: upstreams, routes, and
        what becomes of clients that leave. `taps`: of what matches no upstream by name; `readings`: by those names.
        Raises `OSError` or `ValueError` for certificates of an upstream that cannot be read: nothing is changed."""
        hop = self._hop
        if hop is None:
            raise RuntimeError("start the proxy before it is renewed")
        before = {one.name: (one, to.upstream) for one, to in zip(self._named, hop.named, strict=True)}
        pools = {
            one.name: before[one.name][1]
            for one in settings.upstreams
            if one.name in before and _place(before[one.name][0]) == _place(one)
        }
        named = [self._destination(one, readings[one.name], pools.get(one.name)) for one in settings.upstreams]
        name = DEFAULT_NAME if named and hop.rest.upstream is not None else None
        rest = replace(hop.rest, name=name, reading=replace(hop.rest.reading, taps=taps))
        self._named = settings.upstreams
        hop.rest, hop.named, hop.others = rest, tuple(named), _table(self._named, named, rest)
        for each, (_, pool) in before.items():
            if each not in pools and pool is not None:
                pool.retire()
        self._settings = replace(
            self._settings, routes=settings.routes, on_disconnect=settings.on_disconnect, upstreams=settings.upstreams
        )
        self._sweep_s = _sweep_s(self._settings)
        hop.use(self._settings)
        hop.recorder, hop.route, hop.gate = recorder, route, gate
        if self._plain is not None:
            self._plain.forget()

    def leave(self) -> None:
        """Calls are taken as before, but each response from now on is the last on its connection, and says so. So who
        calls loses the connections that are kept with a response on each, and not just when a call begins on one; the
        next call is on a new connection, for which a balancer may choose somebody else."""
        if self._hop is not None:
            self._hop.leaving = True

    async def stop(self, timeout_s: float) -> None:
        """Stop listening, close idle connections, let open calls finish, cut what is left. Never raises.

        What clients have sent by now is still taken up: a call in a socket, or in the queue of those that wait to be
        accepted, would be reset by a close, though its client sent it while everything was well."""
        hop, clients = self._hop, self._clients
        if hop is None or clients is None or hop.stopping:
            self._close_listeners()
            return
        hop.stopping = True
        began = hop.loop.time()
        if self._listeners:
            until = began + min(CAME_S, timeout_s)
            await self._take_what_came(clients, until)
            while hop.loop.time() < until and not await self._close_when_empty():
                await self._take_what_came(clients, until)
            if self._listeners and await self._hold_new():
                # They come without end: no more are made, and those in the queue are taken up.
                await self._take_what_came(clients, began + min(CAME_S + QUEUED_S, timeout_s))
            self._close_listeners()
            # On the connections that were let in last, too: also those whose first request is on its way.
            await self._take_what_came(clients, began + min(2 * CAME_S + QUEUED_S, timeout_s), new=True)
            timeout_s = max(0.0, timeout_s - (hop.loop.time() - began))
        until = hop.loop.time() + timeout_s
        for client in list(clients.open):
            client.stop()
        if hop.calls:
            idle = asyncio.Event()
            hop.idle = idle.set
            try:
                async with asyncio.timeout(timeout_s):
                    await idle.wait()
            except TimeoutError:
                log.warning("%d calls were cut at the end of the graceful stop", len(hop.calls))
        for call in list(hop.calls):
            try:
                call.stop()
            except Exception:
                log.exception("a call could not be cut")
        await self._let_leave(hop, clients, until)
        # Lingering clients are not waited for long.
        gone = asyncio.Event()
        clients.when_empty(gone.set)
        try:
            async with asyncio.timeout(CUT_S):
                await gone.wait()
        except TimeoutError:
            for client in list(clients.open):
                if client.transport is not None:
                    client.transport.abort()

    async def _let_leave(self, hop: Hop, clients: Clients, until: float) -> None:
        """Wait for what was written. A call is over when the last of it is in a buffer of ours, and who reads slowly
        has that still to come: the end of a response, or of what a tunnel's client said."""
        pools = [to.upstream for to in (hop.rest, *hop.named) if to.upstream is not None]
        while hop.loop.time() < until:
            if not (any(client.holds_unsent for client in clients.open) or any(pool.finishing for pool in pools)):
                return
            await asyncio.sleep(LEAVE_LOOK_S)

    async def _close_when_empty(self) -> bool:
        """Close the listeners, with nobody in their queues; False: there was somebody. For this one moment no new
        connection is made, or one would be cut off that came between the look and the end."""
        held = await self._hold_new()
        if _readable(self._files()):
            for file in held:
                hold_new(file, False)
            return False
        self._close_listeners()
        return True

    async def _hold_new(self) -> list[int]:
        """Let no connection be made from now on; the listeners' descriptors where that can be done."""
        held = [file for file in self._files() if file >= 0 and hold_new(file, True)]
        if held:
            await asyncio.sleep(MADE_S)
        return held

    def _files(self) -> list[int]:
        return [sock.fileno() for listener in self._listeners for sock in listener.sockets]

    def _close_listeners(self) -> None:
        for listener in self._listeners:
            listener.close()
        self._listeners.clear()
        for path in self._socket_paths:
            _remove_stale(path)
        self._socket_paths.clear()

    async def _take_what_came(self, clients: Clients, until: float, *, new: bool = False) -> None:
        """Go on until nothing has come any more in two looks: in between a connection may be neither in the queue nor
        among ours yet. `new`: and until no connection is so new that its first request may be on its way."""
        quiet, loop = 0, asyncio.get_running_loop()
        while quiet < 2 and loop.time() < until:
            waits = new and any(client.is_new(CAME_S) for client in clients.open)
            quiet = 0 if waits or self._something_came(clients) else quiet + 1
            await asyncio.sleep(CAME_LOOK_S)

    def _something_came(self, clients: Clients) -> bool:
        """Whether a connection waits to be accepted, or there is something to be read on one that has no call."""
        return _readable([*self._files(), *(client.fileno() for client in clients.open if client.is_idle)])

    async def aclose(self) -> None:
        """Let go of everything; calls that are still open are cut."""
        await self.stop(0)
        if self._sweeper is not None:
            self._sweeper.cancel()
            self._sweeper = None
        if self._hop is not None:
            for to in (self._hop.rest, *self._hop.named):
                if to.upstream is not None:
                    await to.upstream.aclose()

    def _sweep(self) -> None:
        hop, clients = self._hop, self._clients
        assert hop is not None
        assert clients is not None
        now = hop.loop.time()
        hop.tick(now)
        self._sweeper = hop.loop.call_later(self._sweep_s, self._sweep)
        for call in [call for call in hop.calls if call.deadline < now]:
            try:
                call.expired()
            except Exception:
                log.exception("a call could not be ended at its deadline")
        for client in [client for client in clients.open if client.deadline < now]:
            try:
                client.expired()
            except Exception:
                log.exception("a connection could not be ended at its deadline")
                client.reset()
        for to in (hop.rest, *hop.named):
            if to.upstream is not None:
                to.upstream.sweep(now)


def _table(
    named: Sequence[UpstreamSettings], to: Sequence[Destination], rest: Destination
) -> Destinations[Destination] | None:
    """Which of several a call is for; None: there is one only."""
    if not named:
        return None
    pairs = list(zip(named, to, strict=True))
    return Destinations(
        hosts={one.host: found for one, found in pairs if one.host is not None},
        prefixes={one.prefix: found for one, found in pairs if one.host is None},
        rest=rest,
    )


def _place(one: UpstreamSettings) -> tuple[object, ...]:
    """What connections to it are made by."""
    return one.url, one.ca_file, one.cert_file, one.key_file, one.server_name


def _sweep_s(settings: ProxySettings) -> float:
    """How often is looked at deadlines: often enough for the shortest of them."""
    shortest = min(
        settings.upstream_timeout_s,
        *(one.timeout_s for one in settings.upstreams if one.timeout_s is not None),
        *(one.timeout_s for one in settings.routes if one.timeout_s is not None),
        settings.idle_timeout_s,
        settings.head_timeout_s,
        settings.keepalive_timeout_s,
        settings.disconnect_drain_s,
        settings.linger_s,
        settings.upstream_keepalive_s or settings.idle_timeout_s,
    )
    return min(SWEEP_S_MAX, max(SWEEP_S_MIN, shortest / 4))


def _readable(files: Sequence[int]) -> bool:
    """Whether there is something to be read, or somebody to be accepted, on one of them."""
    look = select.poll()
    for file in files:
        if file >= 0:
            look.register(file, select.POLLIN)
    return bool(look.poll(0))


def _remove_stale(path: str) -> None:
    """A socket file left by a process that is gone; anything else stays."""
    try:
        if stat.S_ISSOCK(os.stat(path).st_mode):
            os.unlink(path)
    except OSError:
        pass
