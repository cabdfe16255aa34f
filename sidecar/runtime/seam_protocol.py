"""The *seam*, between each process that serves and the one that meters.

A stream socket, on it messages of a length, a kind and a payload. Who serves sends HELLO, then FRAMEs
(`spool.frames`), STATUS when asked, BYE at its end. Who meters answers WELCOME with the last frame that is on disk, ACK
with each further one, HEALTH when writing changes, ASK; and SHIPPED with the last frame that is at the centre, where
responses wait for that.
Where limits are set, who serves asks GATE_ASK whether a call may be made, and hears GATE_ANSWER; it says GATE_HOLDING,
what its open calls hold, by itself and when told to by GATE_TELL. What it says of its calls goes before either.
The listener belongs to the supervisor, so it outlives the process that meters; who serves connects again by itself and
sends again what was not acknowledged.
Nothing that is sent again for ever may stop the rest. A frame that cannot be read is given up by the intake. One that
the metering process dies of, each time, is found so: where connections are lost and nothing is acknowledged, who serves
sends each frame ALONE, and who meters keeps a note on disk while it reads that one (`Trials`).
"""

from __future__ import annotations

import logging
import marshal
import secrets
import socket
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any, Final, NamedTuple

from sidecar.spool.frames import FRAME_BYTES_MAX, MARSHAL_VERSION, FrameError
from sidecar.storage.sockets import SocketError, connect, listen_privately

log = logging.getLogger("sidecar.seam")

SEAM: Final = "seam.sock"  # in the data directory
BESIDE_BYTES_MAX: Final = 1 << 20  # of a message, beside the largest frame

_HEAD: Final = struct.Struct("!IB")  # length of the payload, kind


class Kind(IntEnum):
    HELLO = 1
    FRAME = 2
    STATUS = 3
    BYE = 4
    GATE_ASK = 5
    GATE_HOLDING = 6
    ALONE = 7  # a frame as in FRAME, and nothing else until it is acknowledged
    WELCOME = 11
    ACK = 12
    HEALTH = 13
    ASK = 14
    READ = 15  # everything up to BYE was read
    GATE_ANSWER = 16
    GATE_TELL = 17
    SHIPPED = 18  # as ACK: all frames up to this one are at the centre


_KINDS: Final = {int(kind): kind for kind in Kind}


class Hello(NamedTuple):
    version: str
    source: bytes
    worker: int
    next_number: int


class Status(NamedTuple):
    """How a process that serves does; `asked` is the question that it answers."""

    asked: int
    unseen: int  # open calls that no frame has told of
    connections: int
    drains: int
    state: str
    reason: str | None
    refusing: bool


class Told(NamedTuple):
    """How writing goes. `suspended`: no commit is to be waited for."""

    state: str
    reason: str | None
    suspended: bool


def message(kind: Kind, payload: Any = ()) -> bytes:
    data = payload if isinstance(payload, bytes) else marshal.dumps(tuple(payload), MARSHAL_VERSION)
    return _HEAD.pack(len(data), kind) + data


class Messages:
    """Bytes in, messages out."""

    __slots__ = ("_rest",)

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> Iterator[tuple[Kind, bytes]]:
        """Each message that is whole now; of a kind that is not known, nothing. Raises `FrameError` where no message
        begins: then nobody knows where the next one does."""
        data = self._rest + data if self._rest else data
        self._rest = b""
        at, end = 0, len(data)
        while end - at >= _HEAD.size:
            length, number = _HEAD.unpack_from(data, at)
            if length > FRAME_BYTES_MAX + BESIDE_BYTES_MAX:
                raise FrameError(f"a message of {length} bytes")
            if end - at - _HEAD.size < length:
                break
            at += _HEAD.size
            kind = _KINDS.get(number)
            if kind is not None:
                yield kind, data[at : at + length]
            else:
                log.error("a message of kind %d is passed over", number)
            at += length
        self._rest = data[at:]


def read_tuple(data: bytes) -> tuple[Any, ...]:
    """Raises `FrameError`."""
    try:
        found = marshal.loads(data)  # noqa: S302 - of a process of ours: the socket is our user's alone
    except (ValueError, TypeError, EOFError) as error:
        raise FrameError(f"not a message: {type(error).__name__}") from None
    if type(found) is not tuple:
        raise FrameError("not a message")
    return found


@dataclass(slots=True, frozen=True)
class Address:
    """A path in the data directory, or a name that needs no disk (Linux, where nothing can be written)."""

    path: Path | None = None
    name: str = ""

    def connect(self) -> socket.socket:
        """Raises `OSError`."""
        if self.path is not None:
            return connect(self.path, timeout_s=1.0)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.connect(self.name)
        except OSError:
            sock.close()
            raise
        return sock


def listen_at_seam(data_dir: Path, *, held: bool) -> tuple[socket.socket, Address]:
    """The listener and where it is. `held`: the data directory is ours alone. Raises `SocketError`."""
    path = data_dir.absolute() / SEAM
    if held:
        try:
            listener = listen_privately(path)
        except SocketError:
            if sys.platform != "linux":
                raise
        else:
            return listener, Address(path=path)
    elif sys.platform != "linux":
        raise SocketError(f"{path} cannot be made: nothing can be written there")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    name = f"\0metering-sidecar-{secrets.token_hex(16)}"
    listener.bind(name)
    listener.listen(256)
    return listener, Address(name=name)
