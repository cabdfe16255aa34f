"""The end of the seam that meters: everybody who serves is heard here (`seam_protocol`)."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NoReturn

from sidecar.gate.owner import Owner
from sidecar.runtime.seam_protocol import Hello, Kind, Messages, Status, Told, message, read_tuple
from sidecar.spool.frames import SOURCE_BYTES, VERSION, FrameError, head_of
from sidecar.spool.intake import Intake, Source
from sidecar.storage.sockets import FILE_STAYS, accepting, peer_uid

log = logging.getLogger("sidecar.seam")

# Who serves and has not answered by then is left out. Kubernetes gives a probe of `/readyz` one second if not told
# otherwise, and one worker that hangs is no reason to send traffic away from the others.
ASK_S: Final = 0.7
# A process may have died with its connection not accepted yet: what it had sent is read before its calls are settled.
GONE_S: Final = 0.5
HEALTH_S: Final = 0.05  # how late who serves hears that writing has changed
DEADLY_AFTER: Final = 3  # deaths while one frame was read alone: it is not read again
_OF_CALLS: Final = frozenset({Kind.FRAME, Kind.ALONE, Kind.BYE})  # messages behind which calls are made into records
TRIALS: Final = "seam.trials"  # in the data directory, while there are any


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


def die_of(error: Exception) -> NoReturn:
    """End this process as a kill would, for a fault of ours in what makes records.

    Frames may be half taken then, and the next acknowledgement would cover them. So nothing more is written or
    acknowledged here; who serves sends them to the next process again, which gives up the one that it dies of too.
    """
    log.error("what was told cannot be recorded: this process ends, and the next one is told again", exc_info=error)
    os._exit(1)


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
        self.answers: Sequence[Status] = ()  # to the last question, of those that answered in time
        self._waiting: asyncio.Event = asyncio.Event()
        self._store: asyncio.Handle | None = None
        self._listener: asyncio.AbstractServer | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._loop = asyncio.get_running_loop()

    async def listen(self, listener: socket.socket) -> None:
        self._listener = await self._loop.create_unix_server(
            accepting(lambda: _Connection(self)), sock=listener, **FILE_STAYS
        )
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

    def follows(self, connection: _Connection, data: bytes) -> bool:
        """Whether a frame is the next one of its connection. Where one between was not told, the acknowledgement of
        this one would cover it."""
        try:
            number = head_of(data).number
        except FrameError:
            number = connection.expects
        if connection.expects and number > connection.expects:
            log.error("a serving process has not told of some calls; it is made to tell all again")
            return False
        connection.expects = number + 1 if number else 0
        return True

    def frame(self, server: Server, data: bytes, give_up: str = "") -> None:
        try:
            told = self._intake.take(server.source, data, give_up=give_up)
        except FrameError:
            # Without a number it cannot be acknowledged, but with the next one it is.
            log.error("what a serving process told cannot be read, not even of how many calls: %d bytes", len(data))
            self._intake.count([("sidecar_frames_given_up", "no_head", 1)])
            return
        except Exception as error:  # noqa: BLE001 - it is told there
            die_of(error)
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
        try:
            self._intake.store()
        except Exception as error:  # noqa: BLE001 - it is told there
            die_of(error)

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

    async def ask(self) -> Sequence[Status]:
        """How each that serves does now, of those that answer in time: `answers`. All frames that they had are taken by
        then."""
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
        self.answers = [s.status for s in asked if s.status is not None and s.status.asked >= number]
        return self.answers

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
        self._closed = False
        self.expects = 0  # the number of the next frame; 0: any

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
                if self._closed:
                    return
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
        """One that cannot be read is passed over: after a break it would only come again. A frame with calls is not."""
        try:
            if kind is Kind.FRAME:
                if self._seam.follows(self, payload):
                    self._seam.frame(server, payload)
                else:
                    self.close()
            elif kind is Kind.ALONE:
                self.expects = 0
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
        except Exception as error:
            if kind in _OF_CALLS:
                die_of(error)
            if not isinstance(error, FrameError | TypeError | ValueError):
                raise
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
        self._closed = True
        self._transport.close()
