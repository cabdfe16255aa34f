"""The client's side of a call, as the call sees it."""

from __future__ import annotations

import asyncio
from typing import Protocol

from sidecar.proxy.aiohttp_compat import RawRequestMessage
from sidecar.proxy.headers import Peer
from sidecar.proxy.local_responses import LocalResponse
from sidecar.proxy.tunnel import Tunnel


class Downstream(Protocol):
    """The client's connection, as its call sees it."""

    peer: Peer
    transport: asyncio.Transport | None  # None: it is gone, and its call has been told

    @property
    def full(self) -> bool:
        """Whether the client does not read as fast as the response comes."""
        ...

    def send(self, data: bytes) -> None:
        """Never raises."""
        ...

    def pause(self, paused: bool) -> None:
        """Stop or go on reading what the client sends."""
        ...

    def read_on(self) -> None:
        """Room was made for more of the upload."""
        ...

    def may_keep_alive(self, should_close: bool) -> bool:
        """Whether another request may come after this one. `should_close`: its client says that it is the last."""
        ...

    def may_switch(self, message: RawRequestMessage) -> bool:
        """Whether the protocol switch that this request offers is passed on."""
        ...

    def switch(self, tunnel: Tunnel) -> None:
        """The upstream agreed to the switch."""
        ...

    def reject(self, own: LocalResponse, limit: str) -> None:
        """Respond without a call, and close."""
        ...

    def reset(self) -> None: ...

    def close_soon(self) -> None:
        """Close once what is written has left."""
        ...

    def call_over(self, keep_alive: bool, upload_done: bool) -> None:
        """The last event of a call whose client is still there."""
        ...
