"""How a client's connection is closed so that the client can still read its last response.

Where the client may still be sending, closing with unread bytes would reset the connection and take the response with
it. So it is read on, as nginx does: until it is silent for a while, and neither for ever nor without end. A client that
is slow to read what it was written may go on with that, as long as it does.
"""

from __future__ import annotations

from asyncio import Transport

from sidecar.proxy.context import NEVER, Hop


class Closing:
    """A connection that is being closed. Each method says when it is to be looked at again, in the loop's time."""

    __slots__ = ("_hop", "_left_bytes", "_transport", "_unsent_bytes", "_until")

    def __init__(self, hop: Hop, transport: Transport) -> None:
        self._hop = hop
        self._transport = transport
        self._unsent_bytes = transport.get_write_buffer_size()  # when it was last looked at
        self._until = 0.0  # read on at the longest
        self._left_bytes = 0  # that may still come

    def at_once(self) -> float:
        """Close after what is written has left."""
        self._transport.close()
        return self._hop.loop.time() + self._hop.settings.idle_timeout_s

    def lingering(self) -> float:
        """Say that no more is written, and read on what still comes."""
        settings, now = self._hop.settings, self._hop.loop.time()
        self._until = now + settings.linger_total_s
        self._left_bytes = settings.linger_bytes_max
        if self._transport.can_write_eof():
            try:
                self._transport.write_eof()
            except (OSError, RuntimeError):
                self._transport.close()
        return now + settings.linger_s

    def came(self, size_bytes: int) -> float:
        """More of an upload that nobody wants."""
        self._left_bytes -= size_bytes
        if self._left_bytes < 0:
            return self._abort()
        return min(self._hop.loop.time() + self._hop.settings.linger_s, self._until)

    def expired(self) -> float:
        """Nothing came for a while, or too much. A client that still reads its response may go on with that."""
        unsent, before = self._transport.get_write_buffer_size(), self._unsent_bytes
        self._unsent_bytes = unsent
        if 0 < unsent < before:
            return self._hop.loop.time() + self._hop.settings.linger_s
        return self._abort()

    def _abort(self) -> float:
        self._transport.abort()
        return NEVER
