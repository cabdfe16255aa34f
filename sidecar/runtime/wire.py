"""The *wire*, between the supervisor and each process that it started: lines of JSON over a socket pair.

Its end is a message too: a process whose supervisor is gone finishes what it has and ends.
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

CANNOT_START: Final = 3  # exit codes of a process: it has said why, and another try would say the same
LOST: Final = 4  # records were left over that the disk did not take
LINE_BYTES_MAX: Final = 1 << 20


class Wire:
    """The end of a process that was started. Sending never waits; a supervisor that is gone is noticed by `receive`."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def over(cls, sock: socket.socket) -> Wire:
        sock.setblocking(False)
        return cls(*await asyncio.open_connection(sock=sock, limit=LINE_BYTES_MAX))

    def send(self, **fields: Any) -> None:
        if not self._writer.is_closing():
            self._writer.write(json.dumps(fields).encode() + b"\n")

    async def receive(self) -> dict[str, Any] | None:
        """The next message; None when the supervisor is gone."""
        try:
            line = await self._reader.readline()
        except (OSError, ValueError):
            return None
        if not line.endswith(b"\n"):
            return None
        found: dict[str, Any] = json.loads(line)
        return found

    async def aclose(self) -> None:
        self._writer.close()
        try:
            await self._writer.wait_closed()
        except OSError:
            pass


@dataclass(slots=True)
class WireEnd:
    """The supervisor's end: no loop, never waits."""

    sock: socket.socket
    rest: bytes = field(default=b"")

    def send(self, fields: Mapping[str, Any]) -> None:
        try:
            self.sock.sendall(json.dumps(dict(fields)).encode() + b"\n")
        except OSError:
            pass  # it is gone: its end is noticed by other means

    def receive(self) -> list[dict[str, Any]] | None:
        """What has come; None when the other end is gone."""
        try:
            data = self.sock.recv(65_536)
        except BlockingIOError:
            return []
        except OSError:
            return None
        if not data:
            return None
        *lines, self.rest = (self.rest + data).split(b"\n")
        return [json.loads(line) for line in lines]
