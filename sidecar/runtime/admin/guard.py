"""Who may read what at the admin port: the name it is called by, and the token for what shows customers.

A page in an operator's browser may send requests to any address of this network and, once its own name is made to
point at us (DNS rebinding), read the answers. Such a request carries a name that is not ours. An IP address as `Host`
cannot be made to point elsewhere and is let through: a scrape by pod address, a probe, a published port of a container.
How many connect at once is bounded here too, before anybody has asked for anything.
"""

from __future__ import annotations

import asyncio
import hmac
import re
import socket
from asyncio import Protocol
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from ipaddress import ip_address
from operator import itemgetter
from typing import Final

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from sidecar.runtime.admin.answers import json_answer
from sidecar.settings import Address, Secret, Settings
from sidecar.storage.sockets import accepting

CUSTOMER_PATHS: Final = ("/usage", "/records", "/parked", "/limits")  # what shows who uses what; the page asks for it
CONNECTIONS_MAX: Final = 256  # pages, scrapes and probes are a dozen
BACKLOG: Final = 128
ALWAYS: Final = "localhost"  # no browser asks the network for it
_HOST: Final = re.compile(r"(\[[^\]]*\]|[^:\[\]]*)(?::\d*)?", re.ASCII)  # RFC 9110, 7.2: host, and perhaps a port


@dataclass(frozen=True, slots=True, kw_only=True)
class Guard:
    """What is let through. `hosts`: names beside the listener's own."""

    address: Address
    token: Secret | None = None
    hosts: frozenset[str] = field(default_factory=frozenset)

    @classmethod
    def of(cls, address: Address, token: Secret | None, hosts: Sequence[str]) -> Guard:
        own = (ALWAYS, address.host, socket.gethostname())
        return cls(address=address, token=token, hosts=frozenset(_plain(name) for name in (*own, *hosts) if name))

    def knows(self, fields: Sequence[str]) -> bool:
        """Whether a request with these `Host` fields is meant for us. None at all: no browser leaves it out."""
        if self.address.path is not None or not fields:
            return True
        found = _HOST.fullmatch(fields[0].strip())
        if len(fields) > 1 or found is None:
            return False
        host = found[1]
        return _plain(host) in self.hosts or _is_address(host.removeprefix("[").removesuffix("]"))

    def opens(self, authorization: str) -> bool:
        """Whether this `Authorization` has the token."""
        scheme, _, given = authorization.partition(" ")
        wanted = b"" if self.token is None else self.token.reveal().encode()
        same = hmac.compare_digest(given.strip().encode("utf-8", "surrogateescape"), wanted)
        return same and self.token is not None and scheme.lower() == "bearer"

    def refusal(self, path: str, hosts: Sequence[str], authorization: str) -> web.Response | None:
        """The answer to who may not; None: let through."""
        if not self.knows(hosts):
            why = "the admin port is not called by this name; SIDECAR_ADMIN_HOSTS adds names"
            return json_answer({"error": why}, status=421)
        if path not in CUSTOMER_PATHS:
            return None
        if self.token is None:
            if self.address.private:
                return None
            why = "this shows customers, and others can reach the port: set SIDECAR_ADMIN_TOKEN, or listen on loopback"
            return json_answer({"error": why}, status=403)
        if self.opens(authorization):
            return None
        why = "this shows customers: send Authorization: Bearer, and SIDECAR_ADMIN_TOKEN behind it"
        answer = json_answer({"error": why}, status=401)
        answer.headers["WWW-Authenticate"] = "Bearer"
        return answer

    @property
    def middleware(self) -> Middleware:
        @web.middleware
        async def guarded(request: web.Request, handler: Handler) -> web.StreamResponse:
            headers = request.headers
            # Without the slash behind it: what the router does not know as ours must not be another way in.
            path = request.path.rstrip("/") or "/"
            refused = self.refusal(path, headers.getall("Host", []), headers.get("Authorization", ""))
            return await handler(request) if refused is None else refused

        return guarded


class Crowd:
    """At most `most` connections at once: who comes then is let in, and the oldest of those that ask nothing goes, else
    the oldest. Whoever only connects would else keep for ever what delivery needs: descriptors, and memory."""

    def __init__(self, most: int = CONNECTIONS_MAX) -> None:
        self._most = most
        self._asking: set[Protocol] = set()

    async def serve(self, stack: AsyncExitStack, runner: web.AppRunner, listener: socket.socket) -> None:
        """Answer there; closed with the stack."""
        runner.app.middlewares.insert(0, self._middleware)
        await runner.setup()
        stack.push_async_callback(runner.cleanup)
        server = runner.server
        assert server is not None

        def coming() -> Protocol:
            self._make_room(server.connections)
            return server()

        listening = await asyncio.get_running_loop().create_server(accepting(coming), sock=listener, backlog=BACKLOG)
        stack.callback(listening.close)

    def _make_room(self, there: Sequence[web.RequestHandler]) -> None:
        opened = [(one in self._asking, one.transport) for one in there]
        staying = [(asks, transport) for asks, transport in opened if transport and not transport.is_closing()]
        staying.sort(key=itemgetter(0))
        for _, transport in staying[: max(len(staying) + 1 - self._most, 0)]:
            transport.abort()  # an answer that nobody reads would keep it open

    @property
    def _middleware(self) -> Middleware:
        @web.middleware
        async def told(request: web.Request, handler: Handler) -> web.StreamResponse:
            self._asking.add(request.protocol)
            try:
                return await handler(request)
            finally:
                self._asking.discard(request.protocol)

        return told


def open_port(settings: Settings) -> str | None:
    """What an operator should know of a port that others can reach and that asks for no token."""
    address = settings.serve.admin_listen
    if address.private or settings.serve.admin_token is not None:
        return None
    return (
        f"the admin port {address} can be reached by others and SIDECAR_ADMIN_TOKEN is not set: /metrics and /balance "
        "are open to them, what shows customers answers 403"
    )


def _plain(name: str) -> str:
    return name.lower().removesuffix(".")


def _is_address(text: str) -> bool:
    try:
        ip_address(text)
    except ValueError:
        return False
    return True
