"""What supervisor and worker say to each other: lines of JSON over a socket pair.

The supervisor begins with `{"remembered": {instance: seq}}`, what delivery knows of each slot.
A worker sends `{"ready": instance}` once and `{"committed": true}` when there is something to deliver; it answers
`{"ask": n}` with `{"answer": n, …}`. The supervisor also sends `{"do": "stop"}` and `{"do": "reload"}`. The end of the
line is a message too: a worker whose supervisor is gone drains and ends.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Mapping
from typing import Any, Final

import orjson

CANNOT_START: Final = 3  # a worker's exit code: it has said why, and another try would say the same
LOST: Final = 4  # a worker's exit code: records were left over that the disk did not take
LINE_BYTES_MAX: Final = 16 << 20  # a worker's counts with every label at its cap are under 1 MiB


class Wire:
    """One end. Sending never waits; a peer that is gone is noticed by `receive`."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def over(cls, sock: socket.socket) -> Wire:
        sock.setblocking(False)
        return cls(*await asyncio.open_connection(sock=sock, limit=LINE_BYTES_MAX))

    def send(self, message: Mapping[str, Any]) -> None:
        if not self._writer.is_closing():
            self._writer.write(orjson.dumps(message) + b"\n")

    async def receive(self) -> dict[str, Any] | None:
        """The next message; None when the other end is gone."""
        try:
            line = await self._reader.readline()
        except (OSError, ValueError):
            return None
        if not line.endswith(b"\n"):
            return None
        message: dict[str, Any] = orjson.loads(line)
        return message

    async def aclose(self) -> None:
        self._writer.close()
        try:
            await self._writer.wait_closed()
        except OSError:
            pass
