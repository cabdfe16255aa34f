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

import asyncio
import json
import logging
import marshal
import os
import secrets
import socket
import struct
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any, Final, NamedTuple

from sidecar.gate.admission import Admission
from sidecar.gate.owner import Owner
from sidecar.spool import Health, State
from sidecar.spool.frames import (
    FRAME_BYTES_MAX,
    HEAD_BYTES,
    MARSHAL_VERSION,
    SOURCE_BYTES,
    VERSION,
    FrameError,
    head_of,
)
from sidecar.spool.intake import Intake, Source
from sidecar.spool.recorder import Recorder
from sidecar.storage.sockets import SocketError, connect, listen_privately, peer_uid

log = logging.getLogger("sidecar.seam")

SEAM: Final = "seam.sock"  # in the data directory
ASK_S: Final = 2.0  # who serves and has not answered by then is left out
CONNECT_S_MIN: Final = 0.02  # first pause before another try to connect; doubles
CONNECT_S_MAX: Final = 0.5
BYE_S: Final = 5.0  # how long who serves waits at its end for what it sent to be read
# A process may have died with its connection not accepted yet: what it had sent is read before its calls are settled.
GONE_S: Final = 0.5
HEALTH_S: Final = 0.05  # how late who serves hears that writing has changed
BESIDE_BYTES_MAX: Final = 1 << 20  # of a message, beside the largest frame
ALONE_AFTER: Final = 2  # connections lost in a row, with nothing acknowledged, before each frame goes alone
DEADLY_AFTER: Final = 3  # deaths while one frame was read alone: it is not read again
TRIALS: Final = "seam.trials"  # in the data directory, while there are any

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


_KINDS: Final = frozenset(Kind)


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
            if number in _KINDS:
                yield Kind(number), data[at : at + length]
            else:
                log.error("a message of kind %d is passed over", number)
            at += length
        self._rest = data[at:]


def read_tuple(data: bytes) -> tuple[Any, ...]:
    """Raises `FrameError`."""
    try:
        found = marshal.loads(data)  # noqa: S302 - of a process of ours: the socket is our user's alone
    except (ValueError, TypeError, EOFError) as error:
        raise FrameError(f"not a message: {error}") from None
    if type(found) is not tuple:
        raise FrameError("not a message")
    return found


# --- where the seam is ---------------------------------------------------------------------------------


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


# --- the end that serves -------------------------------------------------------------------------------


class Link(asyncio.Protocol):
    """The way from a recorder to whoever meters (`recorder.Link`): connects, and connects again."""

    def __init__(
        self,
        address: Address,
        source: bytes,
        worker: int,
        status: Callable[[int], Status],
        gate: Admission | None = None,
    ) -> None:
        """`status`: how this process does, as the answer to a question's number. `gate`: whose questions go this way
        too."""
        self._gate: Admission | None = None
        if gate is not None:
            self.ask_for(gate)
        self._address = address
        self._source = source
        self._worker = worker
        self._status = status
        self._recorder: Recorder | None = None
        self._transport: asyncio.Transport | None = None
        self._welcome = False
        self._messages = Messages()
        self._told = Told(State.OK.value, None, suspended=False)
        self._pause_s = CONNECT_S_MIN
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None
        self._closed = False
        self._sent = self._stored = 0  # the last frame that anybody was sent, and that is on disk
        self._breaks = 0  # connections that were lost in a row, with nothing acknowledged
        self._alone_upto = 0  # frames up to this one go alone; 0: none does
        self._alone = 0  # the one that does just now
        self._read = asyncio.Event()
        self.met = asyncio.Event()  # whoever meters was there once

    def ask_for(self, gate: Admission) -> None:
        """Its questions go this way from now on."""
        self._gate = gate
        gate.send = self._ask_gate

    def start(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._connect_soon()

    # As `recorder.Link`

    def send(self, number: int, data: bytes) -> None:
        if self._welcome and not self._alone_upto:
            self._send_frame(number, data)

    def _send_frame(self, number: int, data: bytes, kind: Kind = Kind.FRAME) -> None:
        self._sent = max(number, self._sent)
        # More than the other end takes at once: it is told how much is lost, by the head alone.
        self._write(message(kind, data if len(data) <= FRAME_BYTES_MAX else data[:HEAD_BYTES]))

    def health(self) -> Health:
        return Health(State(self._told.state), self._told.reason)

    # The connection

    def _connect_soon(self) -> None:
        self._timer = None
        if not self._closed:
            self._task = asyncio.get_running_loop().create_task(self._connect())

    async def _connect(self) -> None:
        try:
            sock = self._address.connect()
            sock.setblocking(False)
            await asyncio.get_running_loop().create_unix_connection(lambda: self, sock=sock)
        except OSError:
            self._try_again()

    def _try_again(self) -> None:
        if not self._closed and self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._pause_s, self._connect_soon)
            self._pause_s = min(self._pause_s * 2, CONNECT_S_MAX)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport) or hasattr(transport, "write")
        assert self._recorder is not None
        self._transport = transport  # type: ignore[assignment]
        self._messages = Messages()
        hello = Hello(VERSION, self._source, self._worker, self._recorder.next_number)
        self._write(message(Kind.HELLO, hello))

    def connection_lost(self, exc: Exception | None) -> None:
        assert self._recorder is not None
        if self._welcome and any(number <= self._sent for number, _ in self._recorder.unacknowledged()):
            self._breaks += 1
        self._transport, self._welcome = None, False
        self._try_again()

    def data_received(self, data: bytes) -> None:
        recorder = self._recorder
        assert recorder is not None
        acknowledged = shipped = 0
        try:
            for kind, payload in self._messages.feed(data):
                if kind is Kind.ACK:
                    (acknowledged,) = read_tuple(payload)
                elif kind is Kind.ASK:
                    (number,) = read_tuple(payload)
                    recorder.flush()
                    self._write(message(Kind.STATUS, self._status(number)))
                elif kind is Kind.HEALTH:
                    self._hear(Told(*read_tuple(payload)))
                elif kind is Kind.WELCOME:
                    stored, *told = read_tuple(payload)
                    self._hear(Told(*told))
                    self._begin(stored)
                elif kind is Kind.READ:
                    self._read.set()
                elif kind is Kind.SHIPPED:
                    (shipped,) = read_tuple(payload)
                elif kind is Kind.GATE_ANSWER and self._gate is not None:
                    self._gate.answered(read_tuple(payload))
                elif kind is Kind.GATE_TELL:
                    self.tell_gate()
        except (FrameError, TypeError, ValueError) as error:
            log.error("what the metering process says cannot be read: %s", error)
            if self._transport is not None:
                self._transport.abort()
        if acknowledged:
            self._acknowledged(acknowledged)
        if shipped:
            recorder.shipped(shipped)

    def _acknowledged(self, number: int) -> None:
        assert self._recorder is not None
        if number <= self._stored:
            return  # a new life begins by saying what one before it had said
        self._stored = number
        self._recorder.acknowledged(number)
        if self._alone_upto:
            self._send_alone()
        else:
            self._breaks = 0

    def _begin(self, stored: int) -> None:
        """What it has on disk is done with; the rest goes (again), in order, and then what is new."""
        recorder = self._recorder
        assert recorder is not None
        self._pause_s = CONNECT_S_MIN
        if stored:
            recorder.acknowledged(stored)
        self._stored = max(stored, self._stored)
        self._alone = 0
        if self._breaks >= ALONE_AFTER:
            self._alone_upto = self._sent
            self._send_alone()
        else:
            for number, data in recorder.unacknowledged(stored):
                self._send_frame(number, data)
        self._welcome = True
        self.met.set()
        for question in () if self._gate is None else self._gate.questions():
            self._ask_gate(question)

    def _send_alone(self) -> None:
        """The next of those that may have been too much for whoever meters; behind them, all that has come since."""
        assert self._recorder is not None
        for number, data in self._recorder.unacknowledged():
            if number > self._alone_upto:
                break
            if number != self._alone:
                self._alone = number
                self._send_frame(number, data, Kind.ALONE)
            return
        self._alone_upto = self._breaks = 0
        for number, data in self._recorder.unacknowledged():
            self._send_frame(number, data)

    # The gate

    def _ask_gate(self, question: tuple[Any, ...]) -> None:
        """It is asked again where nobody is there to hear it. What calls took that have ended is said first."""
        if self._welcome:
            self._say_what_ended()
            self._write(message(Kind.GATE_ASK, question))

    def tell_gate(self) -> None:
        """Say what open calls hold, and use no lease any more. Where nobody hears it, a new owner will ask."""
        if self._gate is not None:
            self._say_what_ended()
            told = self._gate.tell()
            if self._welcome:
                self._write(message(Kind.GATE_HOLDING, told))

    def _say_what_ended(self) -> None:
        if self._recorder is not None and self._recorder.gathers:
            self._recorder.flush()

    def _hear(self, told: Told) -> None:
        assert self._recorder is not None
        before, self._told = self._told, told
        if told.suspended:
            self._recorder.suspend(told.reason or "")
        elif before.suspended:
            self._recorder.resume()

    def _write(self, data: bytes) -> None:
        if self._transport is not None:
            self._transport.write(data)

    async def aclose(self) -> bool:
        """The clean end. False: not everything that was sent is known to be read."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        if self._welcome:
            self._write(message(Kind.BYE))
            try:
                async with asyncio.timeout(BYE_S):
                    await self._read.wait()
            except TimeoutError:
                pass
        if self._transport is not None:
            self._transport.close()
        return self._read.is_set()


# --- the end that meters -------------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class Server:
    """A process that serves, as the one that meters knows it."""

    source: Source
    worker: int
    connection: _Connection | None = None
    gone: bool = False  # it has died, or ended: the supervisor says so
    status: Status | None = None
    unseen: int = 0  # of its last status, less what its frames have told of since
    shipped: int = 0  # the last frame that is at the centre


class Trials:
    """Which frames were being read, each alone, when this process or one before it died: how often, kept in a file.

    What dies for another reason does so at another moment: a note stands only while one frame is made into records,
    which is one step of one thread. Where the file cannot be written no frame is ever blamed.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._deaths: dict[str, list[int]] = {}  # by source: the frame, and how often
        try:
            found = {} if path is None else json.loads(path.read_bytes())
            self._deaths = {str(source): [int(number), int(times)] for source, (number, times) in found.items()}
        except (OSError, ValueError, TypeError, AttributeError):
            pass  # there is none, or half of one

    def begin(self, source: bytes, number: int) -> bool:
        """Whether this frame is to be read; if so the next death is its own, until `survived`."""
        known, times = self._deaths.get(source.hex(), (0, 0))
        times = times if known == number else 0
        if times >= DEADLY_AFTER:
            return False
        self._deaths[source.hex()] = [number, times + 1]
        self._keep()
        return True

    def survived(self, source: bytes) -> None:
        if self._deaths.pop(source.hex(), None) is not None:
            self._keep()

    def _keep(self) -> None:
        if self._path is None:
            return
        draft = self._path.with_name(f"{self._path.name}.draft")
        try:
            if self._deaths:
                draft.write_text(json.dumps(self._deaths))
                draft.replace(self._path)  # it has to outlive the process, not the machine
            else:
                self._path.unlink(missing_ok=True)
        except OSError as error:
            log.warning("that a frame is being read alone cannot be kept: %s", error.strerror)


class Seam:
    """Everybody who serves, heard by the one that meters."""

    def __init__(
        self,
        intake: Intake,
        health: Callable[[], Told],
        counted: Callable[[int, int], None],
        gate: Owner | None = None,
        trials: Path | None = None,
    ) -> None:
        """`health`: how writing goes now. `counted`: told the open connections and drains of all together. `gate`: whom
        those that serve ask whether a call may be made. `trials`: where `Trials` are kept."""
        self._trials = Trials(trials)
        self._early: list[tuple[Server, bytes]] = []  # frames that came alone, before there was a spool
        self._intake = intake
        self._gate = gate
        self._health = health
        self._counted = counted
        self._told = health()
        self._servers: dict[bytes, Server] = {}
        self._asked = 0
        self._waiting: asyncio.Event = asyncio.Event()
        self._store: asyncio.Handle | None = None
        self._listener: asyncio.AbstractServer | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._loop = asyncio.get_running_loop()

    async def listen(self, listener: socket.socket) -> None:
        self._listener = await self._loop.create_unix_server(lambda: _Connection(self), sock=listener)
        self._look()

    async def aclose(self) -> None:
        """Hear nobody any more; what was heard is handed to the intake."""
        if self._timer is not None:
            self._timer.cancel()
        if self._listener is not None:
            self._listener.close()
        for server in self._servers.values():
            if server.connection is not None:
                server.connection.close()
        self.store()

    # Who there is

    def expect(self, source: bytes, worker: int) -> None:
        """A process that serves was started: only such are heard."""
        if source not in self._servers:
            server = Server(Source(source, lambda number: self._acknowledge(server, number)), worker)
            self._servers[source] = server
            self._intake.came(server.source)

    def gone(self, source: bytes) -> None:
        """It is no more. Its calls are settled once everything that it had sent is read."""
        server = self._servers.get(source)
        if server is None:
            return
        server.gone = True
        self._waiting.set()
        if server.connection is None:
            self._loop.call_later(GONE_S, self._settle, server)

    @property
    def unseen(self) -> int:
        return sum(server.unseen for server in self._servers.values())

    @property
    def serving(self) -> list[Server]:
        return [server for server in self._servers.values() if not server.gone]

    def _settle(self, server: Server) -> None:
        if server.connection is not None or not self._intake.recording:
            return  # it is being read; or there is no spool yet, and nothing is open in it
        if self._servers.pop(server.source.id, None) is None:
            return
        self.store()
        left_open = list(server.source.open.values())
        settled = self._intake.settle(server.source.id)
        if self._gate is not None:
            self._gate.died(server.source.tail, left_open)
        if settled:
            facts = {"worker": server.worker, "calls": settled}
            log.warning("calls that were open in a process that died are recorded as unknown", extra={"facts": facts})

    def recording(self) -> None:
        """There is a spool now."""
        early, self._early = self._early, []
        for server, data in early:
            self.alone(server, data)
        for server in list(self._servers.values()):
            self._acknowledge(server, server.source.stored)
            if server.gone and server.connection is None:
                self._settle(server)
        self._look_now()
        self.store()

    # What is heard

    def hello(self, connection: _Connection, hello: Hello) -> Server | None:
        """None: it is not heard."""
        server = self._servers.get(hello.source)
        if hello.version != VERSION or server is None:
            log.warning("a process that this instance did not start is not heard at the seam")
            return None
        if server.connection is not None:
            server.connection.close()
        server.connection = connection
        connection.write(message(Kind.WELCOME, (server.source.stored, *self._told)))
        if server.shipped:
            connection.write(message(Kind.SHIPPED, (server.shipped,)))
        if self._asked:  # somebody may be waiting for what it has to tell
            connection.write(message(Kind.ASK, (self._asked,)))
        if self._gate is not None:
            self._gate.came(server.source.tail, connection)
        return server

    def frame(self, server: Server, data: bytes, give_up: str = "") -> None:
        try:
            told = self._intake.take(server.source, data, give_up=give_up)
        except FrameError:
            # Without a number it cannot be acknowledged, but with the next one it is.
            log.error("what a serving process told cannot be read, not even of how many calls: %d bytes", len(data))
            self._intake.count([("sidecar_frames_given_up", "no_head", 1)])
            return
        server.unseen = max(server.unseen - told, 0)
        if self._store is None:
            self._store = self._loop.call_soon(self.store)

    def alone(self, server: Server, data: bytes) -> None:
        """A frame that this process, or one before it, may have died of."""
        if not self._intake.recording:
            self._early.append((server, data))
            return
        self.store()  # what others have told is not its doing
        source = server.source.id
        try:
            number = head_of(data).number
        except FrameError:
            number = 0
        if self._trials.begin(source, number):
            self.frame(server, data)
        else:
            self.frame(server, data, "deadly")
        self.store()
        self._trials.survived(source)

    def asked_gate(self, server: Server, payload: bytes) -> None:
        if self._gate is not None:
            self.store()  # what has ended counts first
            self._gate.ask(server.source.tail, read_tuple(payload))

    def told_gate(self, server: Server, payload: bytes) -> None:
        if self._gate is not None:
            self.store()
            self._gate.told(server.source.tail, read_tuple(payload))

    def store(self) -> None:
        self._store = None
        self._intake.store()

    def status(self, server: Server, status: Status) -> None:
        server.status, server.unseen = status, status.unseen
        servers = self.serving
        self._counted(
            sum(s.status.connections for s in servers if s.status is not None),
            sum(s.status.drains for s in servers if s.status is not None),
        )
        self._waiting.set()

    def closed(self, server: Server, connection: _Connection) -> None:
        if server.connection is connection:
            server.connection = None
            server.unseen = 0
            self._waiting.set()
            if self._gate is not None:
                self._gate.left(server.source.tail)
            if server.gone:
                self._settle(server)

    async def until_alone(self) -> None:
        """Until nobody who serves is connected any more."""
        while any(server.connection is not None for server in self._servers.values()):
            self._waiting.clear()
            await self._waiting.wait()

    async def ask(self) -> list[Status]:
        """How each that serves does now, of those that answer in time; all frames that they had are taken by then."""
        self._asked += 1
        number = self._asked
        asked = self.serving
        for server in asked:
            if server.connection is not None:
                server.connection.write(message(Kind.ASK, (number,)))

        def missing() -> list[Server]:
            # One that is not connected yet, or again, has the more to tell.
            return [s for s in asked if not s.gone and (s.status is None or s.status.asked < number)]

        try:
            async with asyncio.timeout(ASK_S):
                while missing():
                    self._waiting.clear()
                    await self._waiting.wait()
        except TimeoutError:
            pass
        return [s.status for s in asked if s.status is not None and s.status.asked >= number]

    # What is said

    def _acknowledge(self, server: Server, number: int) -> None:
        if server.connection is not None and number:
            server.connection.write(message(Kind.ACK, (number,)))

    def shipped(self, source: bytes, number: int) -> None:
        """All frames of this source up to that number are at the centre."""
        server = self._servers.get(source)
        if server is not None and number > server.shipped:
            server.shipped = number
            if server.connection is not None:
                server.connection.write(message(Kind.SHIPPED, (number,)))

    def _look(self) -> None:
        self._timer = self._loop.call_later(HEALTH_S, self._look)
        self._look_now()

    def _look_now(self) -> None:
        told = self._health()
        if told != self._told:
            self._told = told
            for server in self._servers.values():
                if server.connection is not None:
                    server.connection.write(message(Kind.HEALTH, told))


class _Connection(asyncio.Protocol):
    """One connection at the seam."""

    def __init__(self, seam: Seam) -> None:
        self._seam = seam
        self._messages = Messages()
        self._transport: Any = None
        self._server: Server | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        sock = transport.get_extra_info("socket")
        uid = None if sock is None else peer_uid(sock.fileno())
        if uid is not None and uid != os.geteuid():
            log.warning("another user tried to speak at the seam and is not heard", extra={"facts": {"uid": uid}})
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        try:
            for kind, payload in self._messages.feed(data):
                if self._server is not None:
                    self._hear(self._server, kind, payload)
                    continue
                if kind is not Kind.HELLO:
                    raise FrameError("it did not say who it is")
                source = Hello(*read_tuple(payload))
                if type(source.source) is not bytes or len(source.source) != SOURCE_BYTES:
                    raise FrameError("it did not say who it is")
                self._server = self._seam.hello(self, source)
                if self._server is None:
                    self.close()
                    return
        except (FrameError, TypeError, ValueError) as error:
            log.error("what came over the seam cannot be read: %s", type(error).__name__)
            self.close()

    def _hear(self, server: Server, kind: Kind, payload: bytes) -> None:
        """One that cannot be read is passed over: after a break it would only come again."""
        try:
            if kind is Kind.FRAME:
                self._seam.frame(server, payload)
            elif kind is Kind.ALONE:
                self._seam.alone(server, payload)
            elif kind is Kind.STATUS:
                self._seam.status(server, Status(*read_tuple(payload)))
            elif kind is Kind.GATE_ASK:
                self._seam.asked_gate(server, payload)
            elif kind is Kind.GATE_HOLDING:
                self._seam.told_gate(server, payload)
            elif kind is Kind.BYE:
                self._seam.store()
                self.write(message(Kind.READ))
        except (FrameError, TypeError, ValueError) as error:
            facts = {"kind": kind.name, "error": type(error).__name__}
            log.error("a message at the seam cannot be read and is passed over", extra={"facts": facts})

    def connection_lost(self, exc: Exception | None) -> None:
        if self._server is not None:
            self._seam.closed(self._server, self)

    def write(self, data: bytes) -> None:
        self._transport.write(data)

    def answer(self, payload: tuple[Any, ...]) -> None:
        """To a question whether a call may be made."""
        self.write(message(Kind.GATE_ANSWER, payload))

    def please_tell(self) -> None:
        self.write(message(Kind.GATE_TELL))

    def close(self) -> None:
        self._transport.close()
