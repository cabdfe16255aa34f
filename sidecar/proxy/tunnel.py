"""Two connections joined after a 101: bytes go both ways as they came; where they are a model's, a copy is read along.

One record covers the whole tunnel; each message that reports usage leaves one more, and in `committed` mode the piece
that ends such a message waits for that record, and what comes behind it waits its turn. Of a piece with a great many of
them a step is read in each turn of the loop, so that others have theirs. Either side's end is the end of both; what was
written before it still leaves.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol

from sidecar.model.exchange import Exchange, Gate, Outcome, Usage, cut_usage
from sidecar.proxy.call_taps import guarded
from sidecar.proxy.context import Hop
from sidecar.proxy.upstream import UpstreamConnection
from sidecar.usage import SocketTap

log = logging.getLogger(__name__)


class TunnelClient(Protocol):
    """The client's side."""

    @property
    def full(self) -> bool: ...

    def send(self, data: bytes) -> None: ...
    def pause(self, paused: bool) -> None: ...


class TunnelOwner(Protocol):
    """Whose tunnel it is: keeps its deadline and makes its record."""

    def tunnel_moved(self) -> None:
        """Bytes went one way or the other."""
        ...

    def tunnel_unrecorded(self) -> None:
        """A message's record will not be written, and so what is held may not leave."""
        ...

    def tunnel_upstream_gone(self) -> None:
        """The upstream's end has come; what came before it may still be held."""
        ...

    def tunnel_ended(self, reset: bool) -> None:
        """The upstream's end has come, and nothing is held any more."""
        ...

    def failed(self) -> None:
        """A fault of ours: both sides are cut."""
        ...


class Tunnel:
    """Owner of the upstream connection from the 101 on."""

    __slots__ = (
        "_client", "_closed", "_connection", "_exchange", "_gate_of_message", "_going_on", "_held", "_hop", "_lost",
        "_owner", "_tap", "_waiting",
    )  # fmt: skip

    def __init__(
        self,
        owner: TunnelOwner,
        hop: Hop,
        exchange: Exchange,
        client: TunnelClient,
        connection: UpstreamConnection,
        tap: SocketTap | None,
        gate_of_message: Callable[[], Gate | None] | None = None,
    ) -> None:
        """`exchange`: of the call that became a tunnel; its sizes are counted here. `tap`: None: nobody reads along.
        `gate_of_message`: by what limits a message counts; None: there are none."""
        self._owner = owner
        self._hop = hop
        self._exchange = exchange
        self._client = client
        self._connection = connection
        self._tap = tap
        self._gate_of_message = gate_of_message
        self._waiting = 0  # records of messages that are not on disk yet, and one for what is still to be read
        self._going_on = False  # the next turn reads on
        self._held: list[bytes] = []  # what waits for them
        self._lost: bool | None = None  # the upstream's end (True: a reset) came behind what is held
        self._closed = False  # the call is over

    def from_client(self, data: bytes) -> None:
        self._exchange.request_bytes += len(data)
        self._owner.tunnel_moved()
        self._connection.write(data)
        if self._tap is not None:
            self._tap.from_client(data)

    def upstream_data(self, data: bytes) -> None:
        self._exchange.response_bytes += len(data)
        self._owner.tunnel_moved()
        if self._tap is not None:
            self._read(self._tap, data)
            if self._closed:
                return
        if self._waiting:
            self._held.append(data)
            self._connection.pause(True)
        else:
            self._client.send(data)

    def _read(self, tap: SocketTap, data: bytes) -> None:
        """Read along, and go on with what is more than a step in the next turn: what came waits for that as well."""
        for usage in tap.from_server(data):
            if not self._record(usage):
                self._waiting += 1
            if self._closed:
                return
        if tap.behind and not self._going_on:
            self._going_on = True
            self._waiting += 1
            self._hop.loop.call_soon(self._step, self._go_on)

    def _step(self, step: Callable[..., None], *args: object) -> None:
        """What the event loop calls, or a commit: where it fails, both sides would wait for ever."""
        try:
            step(*args)
        except Exception:
            log.exception("a tunnel could not be served")
            self._owner.failed()

    def _go_on(self) -> None:
        self._going_on = False
        if self._tap is not None and not self._closed:
            self._read(self._tap, b"")
            self._released(True)

    def close(self) -> None:
        """The call is over. What has come counts all the same."""
        self._closed = True
        while self._tap is not None and self._tap.behind:
            for usage in self._tap.from_server(b""):
                self._record(usage)

    def _record(self, usage: Usage) -> bool:
        """A message reported usage: admit its record and hand it over in one step. False: `_released` will be called.
        Sizes and names of fields are those of the tunnel, whose own record has them."""
        call, hop = self._exchange, self._hop
        message = Exchange(
            method=call.method,
            url=call.url,
            route=call.route,
            client_ip=call.client_ip,
            user_agent=call.user_agent,
            trace_id=call.trace_id,
            subscriber=call.subscriber,
            dimensions=call.dimensions,
            parent_id=call.id,
            upstream=call.upstream,
        )
        if not hop.recorder.admit(message):
            self._owner.tunnel_unrecorded()
            return True
        if self._gate_of_message is not None:
            message.gate = guarded(None, self._gate_of_message)
        guarded(None, cut_usage, usage, hop.metrics.limit_reached)
        message.outcome = Outcome.COMPLETE
        message.duration_ms = 0.0
        message.usage = usage
        return hop.recorder.complete(message, self._released)

    def _released(self, send: bool) -> None:
        """A message's record is on disk, or it is decided that it goes without, or not at all."""
        self._step(self._let_leave, send)

    def _let_leave(self, send: bool) -> None:
        if self._closed:
            return
        if not send:
            self._owner.tunnel_unrecorded()
            return
        self._waiting -= 1
        if self._waiting:
            return
        held, self._held = self._held, []
        self._client.send(held[0] if len(held) == 1 else b"".join(held))
        if self._lost is not None:
            self._owner.tunnel_ended(self._lost)
        elif not self._client.full:
            self._connection.pause(False)

    def upstream_full(self, full: bool) -> None:
        self._client.pause(full)

    def client_full(self, full: bool) -> None:
        if not self._waiting:
            self._connection.pause(full)

    def upstream_lost(self, clean: bool, reset: bool) -> None:
        if self._waiting:
            self._lost = reset
            self._owner.tunnel_upstream_gone()
        else:
            self._owner.tunnel_ended(reset)
