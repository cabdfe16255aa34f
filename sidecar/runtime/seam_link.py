"""The end of the seam that serves: what a recorder has gathered, on its way to the process that meters
(`seam_protocol`)."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any, Final

from sidecar.gate.admission import Admission
from sidecar.runtime.seam_protocol import Address, Hello, Kind, Messages, Status, Told, message, read_tuple
from sidecar.spool import Health, State
from sidecar.spool.frames import FRAME_BYTES_MAX, HEAD_BYTES, VERSION, FrameError
from sidecar.spool.recorder import Recorder
from sidecar.storage.files import said_by

log = logging.getLogger("sidecar.seam")

CONNECT_S_MIN: Final = 0.02  # first pause before another try to connect; doubles
CONNECT_S_MAX: Final = 0.5
BYE_S: Final = 5.0  # how long who serves waits at its end for what it sent to be read
ALONE_AFTER: Final = 2  # connections lost in a row, with nothing acknowledged, before each frame goes alone


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

    def begin_anew(self) -> None:
        if self._transport is not None:
            self._transport.abort()

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
            log.error("what the metering process says cannot be read: %s", said_by(error))
            self.begin_anew()
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
