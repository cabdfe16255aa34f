"""Two connections joined after a 101: bytes go both ways, unread and unframed.

One record covers the whole tunnel. Either side's end is the end of both; what was written before it
still leaves.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sidecar.exchange import Exchange, Outcome

if TYPE_CHECKING:
    from sidecar.proxy.call import Call
    from sidecar.proxy.client import Client
    from sidecar.proxy.upstream import UpstreamConnection


class Tunnel:
    """Owner of the upstream connection from the 101 on."""

    __slots__ = ("_call", "_client", "_connection", "_exchange")

    def __init__(self, call: Call, exchange: Exchange, client: Client, connection: UpstreamConnection) -> None:
        self._call = call
        self._exchange = exchange
        self._client = client
        self._connection = connection

    def from_client(self, data: bytes) -> None:
        self._exchange.request_bytes += len(data)
        self._call.touch()
        self._connection.write(data)

    def upstream_data(self, data: bytes) -> None:
        self._exchange.response_bytes += len(data)
        self._call.touch()
        self._client.send(data)

    def upstream_full(self, full: bool) -> None:
        self._client.pause(full)

    def client_full(self, full: bool) -> None:
        self._connection.pause(full)

    def upstream_lost(self, clean: bool, reset: bool) -> None:
        self._call.tunnel_ended(Outcome.UPSTREAM_BROKE if reset else Outcome.COMPLETE)
