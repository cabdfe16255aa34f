"""One call, from its head to its record and its response's last byte.

A call is a set of short synchronous steps, each run by the event that makes it possible: a piece of the upload, a piece
of the response, a lost connection, a passed deadline, a committed record. There is no task a call (only making a new
upstream connection needs one) and no timer a call.

Where a call stands is its `phase`. `TABLE` says what each event does in each phase (docs/call.md draws it); an event
that is not in it does nothing there. Only a piece of a body in `STREAMING`, which is what nearly every read brings, has
a shorter way. What an end means for the record, the client and the upstream is decided in `ending`. What is no phase
has files of its own: the request's head (`incoming`) and body (`request_body`), the question to the gate
(`gate_question`), what reads along (`call_taps`), and what follows a 101 (`tunnel`).

What must always hold here:
- A call that was let in is recorded once. `_record` is the one place that hands its exchange over.
- What ends a response for the client waits in `HELD` until the record is on disk, and nothing overtakes it.
- The upstream connection is given back before that, so a slow disk costs no connection.
- A request goes twice only where a pooled connection died before it said a word, and it may.
- A body that was cut off upstream reaches the client cut off.
"""

from __future__ import annotations

import asyncio
import logging
from asyncio import Task
from collections.abc import Callable, Mapping
from enum import IntEnum
from time import monotonic_ns
from typing import Final

from sidecar.gate.admission import Admission, Verdict
from sidecar.model.exchange import (
    Exchange,
    Outcome,
    Recorder,
    Usage,
    UsageState,
    cut_usage,
    unread_usage,
)
from sidecar.proxy import ending, local_responses
from sidecar.proxy.aiohttp_compat import EMPTY_PAYLOAD, RawRequestMessage, StreamReader
from sidecar.proxy.call_taps import CallTaps, guarded, is_behind, is_waiting
from sidecar.proxy.connecting import NOTHING, NotConnectedError, Why, connect
from sidecar.proxy.context import NEVER, Destination, Hop
from sidecar.proxy.downstream import Downstream
from sidecar.proxy.drains import REASONS
from sidecar.proxy.ending import Cause, Ending, Phase
from sidecar.proxy.gate_question import GateQuestion
from sidecar.proxy.incoming import head_for, read_head
from sidecar.proxy.local_responses import LocalResponse
from sidecar.proxy.request_body import RequestBody, may_change
from sidecar.proxy.response_parser import UpstreamResponse, all_alike, chunk_of_read
from sidecar.proxy.tunnel import Tunnel
from sidecar.proxy.upstream import NOT_HTTP, RESET, UpstreamConnection
from sidecar.usage import ResponseTap

log = logging.getLogger(__name__)

# What the way of every chunk compares with: a look-up in the enumeration costs as much as the comparison.
STREAMING: Final = Phase.STREAMING
OVER: Final = Phase.OVER

COMPLETED: Final = ending.ending(Phase.STREAMING, Cause.WHOLE, client=True, framed=True)
"""How nearly every call ends, decided once."""


class Event(IntEnum):
    """What may happen to a call."""

    UPLOAD = 0  # a piece of the request's body has come, or there is room for one
    UPLOAD_BROKE = 1
    JUDGED = 2  # whether the call may be made is known
    CONNECTED = 3
    UNREACHABLE = 4
    PIECE = 5  # of the response: an interim one, the head, or some of the body
    END_MARK = 6  # the stream's own, in a body that is not over
    WHOLE = 7  # the response
    SWITCHED = 8  # the upstream agreed to another protocol
    BROKE = 9  # the response is no HTTP, or was cut off
    CLIENT_LEFT = 10
    EXPIRED = 11
    COMMITTED = 12
    NOT_COMMITTED = 13  # what is held may not leave
    STOP = 14
    FAULT = 15  # ours


class Call:
    """One exchange under way."""

    __slots__ = (
        "_connecting", "_drain_owners", "_exchange", "_gathers", "_head", "_hop", "_http10", "_idempotent",
        "_keep_alive", "_message", "_not_drained", "_own", "_passing", "_question", "_recorded", "_recorder", "_switch",
        "_taps", "_target", "_timeout_s", "_to", "_tunnel", "body", "client", "connection", "deadline", "phase",
        "response",
    )  # fmt: skip

    def __init__(self, hop: Hop, client: Downstream, message: RawRequestMessage, payload: StreamReader) -> None:
        self._hop = hop
        self.phase = Phase.CONNECTING
        self.deadline = NEVER
        # the client's side
        self.client: Downstream | None = client
        self._message = message
        self._http10 = message.version.minor == 0
        self._keep_alive = False  # said in the head of the response
        self._drain_owners: tuple[tuple[str, int], ...] = ()  # on whose account the response is read on
        self._not_drained: str | None = None  # why it was not, though it should have been
        # the request
        self.body: RequestBody | None = None  # None: it has none
        if payload is not EMPTY_PAYLOAD:
            self.body = RequestBody(payload, chunked=bool(message.chunked))
        self._taps: CallTaps
        self._head = b""  # as it goes upstream; behind it, where a request goes whole, its body
        self._idempotent = False
        self._switch = False  # a protocol switch is passed on
        self._gathers = False  # its body is gathered before any of it leaves
        self._question: GateQuestion | None = None  # None: nobody asks whether it may be made
        # the upstream's side
        self._to = hop.rest
        self._target = message.path  # as that upstream gets it
        self._timeout_s = hop.rest.timeout_s
        self._connecting: Task[None] | None = None
        self.connection: UpstreamConnection | None = None
        self.response: UpstreamResponse | None = None
        self._passing: UpstreamResponse | None = None  # the same, while most of its chunks may pass unread
        self._own = b""  # the response of ours that the client gets instead
        self._tunnel: Tunnel | None = None
        # the record
        self._recorder: Recorder = hop.recorder
        self._recorded = False
        self._exchange: Exchange

    @classmethod
    def resume(
        cls,
        hop: Hop,
        client: Downstream,
        message: RawRequestMessage,
        exchange: Exchange,
        connection: UpstreamConnection | None,
        *,
        body: bytes,
        again: bytes | None,
        deadline: float,
        to: Destination,
        target: str,
        timeout_s: float,
    ) -> Call:
        """A call whose request was let in and sent already, and of whose response nothing was read yet. `again`: the
        request as it was sent, where it may go once more. `target`: as the upstream `to` gets it. `connection`: None:
        there is none, and the call is about to end."""
        call = cls(hop, client, message, EMPTY_PAYLOAD)
        call._to, call._target, call._timeout_s = to, target, timeout_s
        call._exchange = exchange
        taps = call._taps = CallTaps(to.reading.taps, hop.attribute_by_body)
        taps.open(message.method, target, message.raw_headers)
        if taps.request is not None:
            taps.request.opened_ns = exchange.started_mono_ns  # and not only now, when the response comes
            if body:
                taps.feed(body)
        if again is not None:
            call.body = RequestBody(EMPTY_PAYLOAD, chunked=False)
            call.body.done = True
            call.body.keep(again, hop.settings.retry_body_bytes_max)
        if connection is not None:
            call.connection = connection
            connection.owner = call
            call._expect()
            call.phase = Phase.WAITING
        call.deadline = deadline
        hop.calls.add(call)
        return call

    def stream_on(self, head: bytes, body_bytes: int, *, recorded: bool) -> None:
        """The client has had the head and so many bytes of the body of a response; where that is in chunks, the next
        byte is the first of one. `recorded`: its end mark was among them. To be called next to `resume`."""
        response = self.response
        assert response is not None
        response.mute = True
        response.feed(head)
        response.mute = self.client is None
        response.skip(body_bytes)
        response.ended = self._recorded = recorded
        self._keep_alive = True
        self.phase = Phase.TRAILING if recorded else STREAMING

    def read_along(self, tell: Callable[[ResponseTap], None]) -> None:
        """`tell`: tells a tap what came so far."""
        response = self.response
        if response is not None and response.tap is not None:
            guarded(None, tell, response.tap)

    @property
    def upload_done(self) -> bool:
        return self.body is None or self.body.done

    @property
    def upload_came(self) -> bool:
        """Whether all of it has come, taken or not: what is malformed then stands behind it."""
        return self.body is None or self.body.done or self.body.came

    def _on(self, event: Event, why: Why = NOTHING) -> None:
        handler = TABLE[self.phase][event]
        if handler is not None:
            handler(self, event, why)

    def _step(self, step: Callable[..., None], *args: object) -> None:
        """A step that nobody has called who would notice its fault: the event loop, or what waits for others too."""
        try:
            step(*args)
        except Exception:
            log.exception("a call could not be handled")
            self.failed()

    # -- let in ----------------------------------------------------------------------------------

    def start(self) -> None:
        """Let the call in and send it on. What is raised before it stands in `hop.calls` is the caller's to answer."""
        hop, message, client, body = self._hop, self._message, self.client, self.body
        assert client is not None
        if message.upgrade and not self._http10:
            self._switch = client.may_switch(message)
        request = read_head(hop, message, client.peer, switch=self._switch)
        exchange = self._exchange = request.exchange
        self._to, self._target = request.to, request.target
        self._timeout_s = hop.timeout_s(request.to, exchange.route)
        taps = self._taps = CallTaps(request.to.reading.taps, hop.attribute_by_body)
        if not request.recorded:
            self._recorder = hop.unrecorded
        if not self._recorder.admit(exchange):
            self.phase = OVER
            client.reject(local_responses.SPOOL_FULL, "spool_full")
            return
        hop.calls.add(self)
        if request.refused is not None:
            self._finish(Cause.REFUSED, Why(own=request.refused))
            return
        if request.recorded:
            taps.open(message.method, request.target, request.fields)
        self._idempotent = request.idempotent
        self._head = request.head
        self._gathers = body is not None and taps.may_ask and may_change(message.method, message.raw_headers)
        if body is not None and not self._gathers:
            body.tap = taps.request
        if hop.gate is not None and request.recorded:  # what is not recorded could not be settled
            self._ask_gate(hop.gate)
        else:
            self._go_on()

    def _go_on(self) -> None:
        if self._gathers:
            hop = self._hop
            self.phase = Phase.GATHERING
            self.deadline = hop.loop.time() + hop.settings.idle_timeout_s
            self._on(Event.UPLOAD)
        else:
            self._set_out()

    # -- may it be made? -------------------------------------------------------------------------

    def _ask_gate(self, gate: Admission) -> None:
        hop = self._hop
        self.phase = Phase.ADMISSION
        try:
            question = self._question = GateQuestion(gate, self._exchange, self._target, self._message.raw_headers)
        except Exception:
            log.exception("whether a call may be made could not be asked; SIDECAR_GATE_ON_FAILURE decides")
            self._decided(gate.undecided(self._message.method, self._target, self._exchange.upstream))
            return
        if self.body is None or not question.reads_body:
            self._put(question)
        else:
            self.deadline = hop.loop.time() + hop.settings.idle_timeout_s
            self._on(Event.UPLOAD)

    def _look_ahead(self, event: Event, why: Why) -> None:
        """More of the body that says how much the call may need. Once that is enough, no more is read until it is
        known that the upstream gets it."""
        hop, body, question = self._hop, self.body, self._question
        assert question is not None
        if body is None or body.reading or question.is_put:
            return
        before = body.size_bytes
        body.look_ahead()
        self._exchange.request_bytes = body.size_bytes
        if question.is_enough(body):
            self._put(question)
            return
        if body.size_bytes > before:
            self.deadline = hop.idle_until
        self._read_on()

    def _put(self, question: GateQuestion) -> None:
        self.deadline = NEVER  # the gate has its own
        try:
            question.put(self.body, self._hop.attribute_by_body, self._verdict_came)
        except Exception:
            log.exception("whether a call may be made could not be asked; SIDECAR_GATE_ON_FAILURE decides")
            self._verdict_came(question.undecided())

    def _verdict_came(self, verdict: Verdict) -> None:
        question = self._question
        assert question is not None
        if self.phase is not Phase.ADMISSION:
            question.too_late(verdict)
            return
        question.verdict = verdict
        self._step(self._on, Event.JUDGED)

    def _judged(self, event: Event, why: Why) -> None:
        assert self._question is not None
        assert self._question.verdict is not None
        self._decided(self._question.verdict)

    def _decided(self, verdict: Verdict) -> None:
        self._exchange.gate = verdict.gate
        if verdict.denial is not None:
            self._finish(Cause.DENIED, Why(own=verdict.denial, error=verdict.error))
        else:
            self.phase = Phase.CONNECTING
            self._go_on()

    # -- the request -----------------------------------------------------------------------------

    def pump(self) -> None:
        """A piece of the upload has come."""
        self._on(Event.UPLOAD)

    def upload_broke(self, own: LocalResponse) -> None:
        """The client's body turned out malformed: nothing of it may be taken for whole upstream."""
        self._on(Event.UPLOAD_BROKE, Why(own=own))

    def _gather(self, event: Event, why: Why) -> None:
        hop, client, body, taps = self._hop, self.client, self.body, self._taps
        assert body is not None
        if body.reading:
            return
        before = body.size_bytes
        whole = body.gather()
        self._exchange.request_bytes = body.size_bytes
        if whole is None:
            if body.size_bytes > before:
                self.deadline = hop.idle_until
            self._read_on()
            return
        changed = taps.with_usage_asked(whole)
        if changed is not None:
            assert client is not None
            self._head = head_for(len(changed), self._message, client.peer, self._to, self._target)
            whole = changed
        taps.feed(whole)
        self._head += whole
        self.phase = Phase.CONNECTING
        self._set_out()

    def _set_out(self) -> None:
        """On a connection that is at hand, or a new one."""
        hop, upstream = self._hop, self._to.upstream
        assert upstream is not None
        self.connection = upstream.take()
        if self.connection is None:
            self._connecting = hop.loop.create_task(self._connect())
        else:
            self._send(Event.CONNECTED, NOTHING)

    async def _connect(self) -> None:
        upstream = self._to.upstream
        assert upstream is not None
        try:
            connection = await connect(self._hop, upstream)
        except NotConnectedError as error:
            self._connecting = None
            self._step(self.unreachable, error.why)
        except Exception:
            log.exception("a call could not be handled")
            self._connecting = None
            self.failed()
        else:
            self._connecting = None
            if self.phase is OVER:
                connection.release()
            else:
                self.connection = connection
                self._step(self._on, Event.CONNECTED)

    def unreachable(self, why: Why) -> None:
        """There is no connection, and will be none."""
        self._on(Event.UNREACHABLE, why)

    def _unreachable(self, event: Event, why: Why) -> None:
        assert why.own is not None
        assert why.reason is not None
        if self.body is not None and not self.body.done:  # once it has come nothing is in the way of the next request
            guarded(None, self.body.look)
            self._exchange.request_bytes = self.body.size_bytes
        self._hop.upstream_failed(self._to, why.reason, why.error or "")
        self._finish(Cause.UNREACHABLE, Why(own=why.own, error=f"{local_responses.message_of(why.own)} ({why.reason})"))

    def _send(self, event: Event, why: Why) -> None:
        """The head and what there is of the body, in one write."""
        hop, body, connection = self._hop, self.body, self.connection
        assert connection is not None
        connection.owner = self
        self._expect()
        data, self._head = self._head, b""
        if self._question is not None:
            self._question.sent = True
        if body is not None and (body.holds or not body.done):
            data += body.take()
            self._exchange.request_bytes = body.size_bytes
        if connection.used and self._idempotent:
            if body is None:
                body = self.body = RequestBody(EMPTY_PAYLOAD, chunked=False)
                body.done = True
            body.keep(data, hop.settings.retry_body_bytes_max)
        connection.write(data)
        if body is None or body.done:
            self.phase = Phase.WAITING
            self.deadline = hop.now + self._timeout_s
        else:
            self.phase = Phase.SENDING
            self.deadline = hop.idle_until
            self._read_on()

    def _expect(self) -> None:
        """The next bytes from upstream are the response."""
        self.response = UpstreamResponse(
            self._to.headers,
            self._announce,
            head_only=self._message.method == "HEAD",
            http10=self._http10,
            upgrade=self._switch,
            mute=self.client is None,
            asked=self._message,
            peer=None if self.client is None else self.client.peer,
        )

    def _upload(self, event: Event, why: Why) -> None:
        """Move what has come of the body to the upstream, as far as the upstream takes it."""
        body, connection = self.body, self.connection
        if body is None or self.upload_done or body.reading or body.blocked or connection is None:
            return
        hop = self._hop
        wire = body.take()
        self._exchange.request_bytes = body.size_bytes
        if wire:
            connection.write(wire)
            self.deadline = hop.idle_until
        if not body.done:
            self._read_on()
        elif self.phase is Phase.SENDING:
            self.phase = Phase.WAITING
            self.deadline = hop.now + self._timeout_s
            if self.response is not None and self.response.upgraded:
                self._on(Event.SWITCHED)

    def _read_on(self) -> None:
        client, body = self.client, self.body
        if client is not None and body is not None and not body.blocked:
            client.read_on()

    def upstream_full(self, full: bool) -> None:
        body = self.body
        if body is not None:
            body.blocked = full
            if not full:
                self._on(Event.UPLOAD)

    # -- the response ----------------------------------------------------------------------------

    def upstream_data(self, data: bytes) -> None:
        """Bytes of the response. Nearly every read of a stream is one chunk that nobody is interested in, and is passed
        on as it is. What that costs is how many steps are run, so all of them stand here, and nothing is looked at but
        `_passing`: it is set where a chunk has just passed in `STREAMING`, and unset by all that could matter (`_read`,
        `client_left`). Where a call ends otherwise, its connection loses its owner."""
        passing = self._passing
        if passing is not None:
            known = chunk_of_read(len(data))
            try:
                if (
                    known is not None
                    and data.startswith(known[0])
                    and (
                        (
                            data.startswith((likeness := passing.likeness).start, at := known[2])
                            and likeness.rest(data, at + likeness.size)
                        )
                        or (
                            data.endswith(passing.wire_ends)
                            and passing.nothing_in(data)  # type: ignore[misc]
                            and (not likeness.tries or likeness.other(data, at))
                        )
                    )
                ):
                    passing.body_bytes += known[1]
                    self.deadline = self._hop.idle_until
                    try:
                        self.client.transport.write(data)  # type: ignore[union-attr]
                    except RuntimeError:  # of uvloop, where the client is gone: `client_left` will tell
                        return
                    except Exception:
                        log.exception("a call could not be handled")
                        self.failed()
                    return
            except Exception:
                log.exception("a usage reader failed; the call goes on without what it knew")
        self._read(data)

    def _read(self, data: bytes) -> None:
        """Bytes of the response that have to be looked into."""
        passing, self._passing = self._passing, None
        response = self.response
        assert response is not None
        try:
            if passing is not None and passing.likeness.size and (size := all_alike(data, passing.likeness)):
                self._passing = passing
                passing.body_bytes += size
                self.deadline = self._hop.idle_until
                self.client.send(data)  # type: ignore[union-attr]
                return
            if self.phase is STREAMING:
                response.feed(data)
                if not (response.done or response.ended) and response.broken is None:
                    self.deadline = self._hop.idle_until
                    out, client = response.out, self.client
                    if client is not None:
                        if out:
                            client.send(out[0] if len(out) == 1 else b"".join(out))
                            out.clear()
                        if response.nothing_in is not None:
                            self._passing = response
                    return
            else:
                if self._exchange.first_byte_ms is None:
                    self._hear()
                response.feed(data)
            self._on(self._seen(response), NOTHING if response.broken is None else Why(None, response.broken, NOT_HTTP))
        except Exception:
            log.exception("a call could not be handled")
            self.failed()

    @staticmethod
    def _seen(response: UpstreamResponse) -> Event:
        if response.broken is not None:
            return Event.BROKE
        if response.done:
            return Event.WHOLE
        if response.upgraded:
            return Event.SWITCHED
        return Event.END_MARK if response.ended else Event.PIECE

    def _hear(self) -> None:
        """The first byte of the response has come."""
        if self.body is not None:
            self.body.forget()
        exchange = self._exchange
        exchange.first_byte_ms = (monotonic_ns() - exchange.started_mono_ns) / 1e6

    def _announce(self, response: UpstreamResponse) -> bytes:
        """The final head is read: choose the reader, and say what the client gets besides."""
        exchange = self._exchange
        exchange.response_headers = self._to.headers.names_for_record(response.names)
        self._taps.choose(response)
        client = self.client
        if client is None:
            return b""
        exchange.status = response.status
        meter_id = self._meter_id()
        if response.status == 101:
            return meter_id
        self._keep_alive = (
            not response.close_delimited and self.upload_done and client.may_keep_alive(self._message.should_close)
        )
        if not self._keep_alive:
            return meter_id + b"Connection: close\r\n"
        if self._http10:
            return meter_id + b"Connection: keep-alive\r\n"
        return meter_id

    def _meter_id(self) -> bytes:
        """The field line that tells the client its record's id; what is not recorded has none."""
        exchange = self._exchange
        if not (self._hop.settings.meter_id_header and exchange.id):
            return b""
        return b"X-Meter-Id: " + exchange.id.encode() + b"\r\n"

    def _relay(self, event: Event, why: Why) -> None:
        """The first pieces, or those behind an end mark: all others take the short way in `upstream_data`."""
        response = self.response
        assert response is not None
        if response.started:
            self.deadline = self._hop.idle_until
            if self.phase is not Phase.TRAILING:
                self.phase = STREAMING
        self._flush()

    def _flush(self) -> None:
        client, response = self.client, self.response
        if client is None:
            return
        if self._own:
            client.send(self._own)
        elif response is not None and response.out:
            out = response.out
            client.send(out[0] if len(out) == 1 else b"".join(out))
            out.clear()

    def upstream_lost(self, clean: bool, reset: bool) -> None:
        connection, self.connection = self.connection, None
        response, body = self.response, self.body
        assert response is not None
        if self._exchange.first_byte_ms is None and body is not None and self.client is not None:
            again = body.again()
            if again is not None:
                # A pooled connection that died before it said a word, and a request that may go twice: what was sent
                # of it, and then what comes. For a client that has left nothing goes again.
                self._head = again
                body.blocked = False
                self.phase = Phase.CONNECTING
                self._hop.metrics.upstream_retried()
                self._connecting = self._hop.loop.create_task(self._connect())
                return
        response.eof(clean)
        if response.broken is None:
            self._on(Event.WHOLE)
        else:
            self._on(Event.BROKE, Why(None, response.broken, RESET if connection is None else connection.why_lost))

    def _broke(self, event: Event, why: Why) -> None:
        """The response is no HTTP, or was cut off."""
        end = self._decide(Cause.BROKE)
        if end.client is ending.Client.OWN:
            self._hop.upstream_failed(self._to, why.reason or RESET, why.error or "")
            why = Why(error=f"{why.error} ({why.reason})")
        self._carry_out(end, Cause.BROKE, why)

    # -- its end, and the record -----------------------------------------------------------------

    def _whole(self, event: Event, why: Why) -> None:
        """The response is whole: the connection is given back, and its end waits for the record."""
        response, connection = self.response, self.connection
        assert response is not None
        if connection is not None:
            self.connection = None
            if response.reusable and self.upload_done and not response.extra:
                connection.release(response.keep_alive)
            else:
                connection.discard()
        self.deadline = NEVER
        if self.phase is Phase.TRAILING:
            self._flush()
            self._over()
        elif self.phase not in (Phase.HELD, Phase.CATCHING_UP):
            self._complete(event, why)

    def _complete(self, event: Event, why: Why) -> None:
        """Record a call that the client has had, or is about to have, in full."""
        draining = self.phase is Phase.DRAINING
        self.phase = Phase.CATCHING_UP
        self.deadline = NEVER
        if self.connection is not None:
            self.connection.pause(True)  # what follows an end mark waits outside
        if draining:
            self._catch_up()
        elif is_behind(self.response):
            self._hop.loop.call_soon(self._step, self._catch_up)
        else:
            self._hold(COMPLETED)

    def _catch_up(self) -> None:
        """Let the reader catch up a step a turn, so that no other call waits for this one's sixty megabytes; then
        record."""
        response = self.response
        if self.phase is not Phase.CATCHING_UP or response is None:
            return
        response.catch_up()
        if is_behind(response):
            self._hop.loop.call_soon(self._step, self._catch_up)
        else:
            self._hold(self._decide(Cause.WHOLE))

    def _hold(self, end: Ending, error: str | None = None) -> None:
        """Record; what is held for the client leaves when that is on disk."""
        self.phase, was = Phase.HELD, self.phase
        self.deadline = NEVER
        if end.outcome is None or self._record(end.outcome, whole=end.whole, error=error, tunnel=was is Phase.TUNNEL):
            self._committed(Event.COMMITTED, NOTHING)

    def _release(self, send: bool) -> None:
        """The record is on disk, or it is decided that the response goes without, or not at all."""
        self._step(self._on, Event.COMMITTED if send else Event.NOT_COMMITTED)

    def _committed(self, event: Event, why: Why) -> None:
        client, connection, response = self.client, self.connection, self.response
        if self._tunnel is not None:
            if client is not None:
                client.close_soon()
            self._over()
            return
        self._flush()
        if self._own or connection is None or response is None or response.done:
            self._over()
            return
        self.phase = Phase.TRAILING
        self.deadline = self._hop.idle_until
        if client is None or not client.full:
            connection.pause(False)

    def _record(self, outcome: Outcome, *, whole: bool, error: str | None, tunnel: bool, held: bool = True) -> bool:
        """Hand the exchange over. False: `_release` will be called. Who calls this has left the phases before it."""
        exchange, response = self._exchange, self.response
        if self._question is not None:
            guarded(None, self._question.settle, self.body)
        exchange.outcome = outcome
        exchange.error = error
        exchange.duration_ms = (monotonic_ns() - exchange.started_mono_ns) / 1e6
        if response is not None and not (tunnel or self._own):
            exchange.response_bytes = response.body_bytes
        try:
            self._taps.finish(exchange, response, self.body, whole=whole, own=bool(self._own))
            if exchange.usage is not None:
                self._look_over(exchange.usage)
        except Exception:
            log.exception("what a call consumed cannot be told; it is recorded without")
            exchange.usage = unread_usage()
        goes = self._recorder.complete(exchange, self._release if held else None)
        self._recorded = True
        return goes

    def _record_after_all(self) -> None:
        """A call that ends and was let in has its record, also where a fault of ours came between."""
        try:
            error = local_responses.message_of(local_responses.OWN_FAULT)
            self._record(Outcome.UNKNOWN, whole=False, error=error, tunnel=self._tunnel is not None, held=False)
        except Exception:
            log.exception("a call could not be recorded")

    def _look_over(self, usage: Usage) -> None:
        """Cut what is too long for a record, and say why nothing is known where the rest was not read."""
        cut_usage(usage, self._hop.metrics.limit_reached)
        if self._not_drained is not None and usage.usage_state in (UsageState.ABSENT, UsageState.PARTIAL):
            usage.reason = self._not_drained

    # -- any other end ---------------------------------------------------------------------------

    def client_left(self, error: BaseException | None) -> None:
        """The client's connection is gone."""
        self.client = self._passing = None
        response = self.response
        if response is not None:
            response.mute = True
            response.out.clear()
        self._step(self._on, Event.CLIENT_LEFT, Why(clean=error is None))

    def _left(self, event: Event, why: Why) -> None:
        self._finish(Cause.CLIENT_CLOSED if why.clean else Cause.CLIENT_RESET, Why(error=self._not_drained))

    def _drain_or_leave(self, event: Event, why: Why) -> None:
        if not self._may_drain():
            self._left(event, why)
            return
        self.phase = Phase.DRAINING
        self._hop.metrics.drains_changed(1)
        self.deadline = self._hop.loop.time() + self._hop.settings.disconnect_drain_s
        if self.connection is not None:
            self.connection.pause(False)

    def _may_drain(self) -> bool:
        """Whether the upstream is read on for the sake of the usage in what is still to come. Takes a slot for it."""
        hop, exchange = self._hop, self._exchange
        if not self.upload_done or self.connection is None or self._taps.request is None:
            return False
        if hop.disconnect_policy(exchange.route) == "stop" or not is_waiting(self.response):
            return False
        owners = hop.drains.owners(self._taps.payer(exchange.subscriber), exchange.client_ip)
        limit = hop.drains.take(owners)
        if limit is not None:
            self._not_drained = REASONS[limit]
            hop.not_drained(limit)
            return False
        self._drain_owners = owners
        return True

    def _drain_on(self, event: Event, why: Why) -> None:
        response = self.response
        assert response is not None
        if event is Event.END_MARK or (response.started and not is_waiting(response)):
            self._finish(Cause.DRAINED_ENOUGH)

    def expired(self) -> None:
        """The deadline passed. Which one it was follows from where the call stands."""
        self.deadline = NEVER
        self._step(self._on, Event.EXPIRED)

    def _expire(self, event: Event, why: Why) -> None:
        body, response, client = self.body, self.response, self.client
        cause = ending.silent(
            self.phase,
            client_full=client is not None and client.full,
            upload_waits=body is not None and not (body.done or body.blocked),
            head_came=response is not None and response.started,
        )
        self._hop.metrics.limit_reached(ending.LIMITS[cause])
        self._finish(cause)

    def stop(self) -> None:
        """Cut what is left at the end of the graceful stop."""
        self._step(self._on, Event.STOP)

    def failed(self) -> None:
        """A fault of ours: the call still ends once, and what was sent of its response is cut, not added to."""
        self._on(Event.FAULT)

    def _end(self, event: Event, why: Why) -> None:
        self._finish(CAUSES[event], why)

    def _finish(self, cause: Cause, why: Why = NOTHING) -> None:
        self._carry_out(self._decide(cause), cause, why)

    def _decide(self, cause: Cause) -> Ending:
        response = self.response
        return ending.ending(
            self.phase,
            cause,
            client=self.client is not None,
            framed=response is not None and not response.close_delimited,
            end_mark=response is not None and response.ended,
        )

    def _carry_out(self, end: Ending, cause: Cause, why: Why) -> None:
        """The one way out for all calls that do not end as they should."""
        self._let_go(end)
        if end.client is ending.Client.OWN:
            self._respond(end, cause, why)
            return
        own = why.own or local_responses.FOR.get(cause)
        error = why.error
        if error is None and (end.client is not ending.Client.NOTHING or cause is Cause.FAULT):
            error = ending.ERRORS.get(cause) if own is None else local_responses.message_of(own)
        if end.client is ending.Client.END:
            self._hold(end, error)
            return
        held = self.phase in (Phase.HELD, Phase.CATCHING_UP)
        tunnel, self.phase = self.phase is Phase.TUNNEL, Phase.HELD
        if end.outcome is not None:
            self._record(end.outcome, whole=end.whole, error=error, tunnel=tunnel, held=False)
            if not held:
                self._flush()
        client = self.client
        if client is not None:
            if end.client is ending.Client.CLOSE:
                client.close_soon()
            else:
                client.reset()
        self._over()

    def _respond(self, end: Ending, cause: Cause, why: Why) -> None:
        """A response of ours instead of the upstream's, where the client has had nothing of one."""
        client, exchange = self.client, self._exchange
        own = why.own or local_responses.FOR[cause]
        assert client is not None
        head_only = self._message.method == "HEAD"
        exchange.status = own.status
        exchange.response_headers = list(local_responses.field_names(own))
        exchange.response_bytes = 0 if head_only else len(own.body)
        self._keep_alive = (
            self.upload_done
            and end.outcome is not Outcome.REFUSED
            and client.may_keep_alive(self._message.should_close)
        )
        self._own = own.encode(
            close=not self._keep_alive, keep_alive_10=self._http10, head_only=head_only, fields=self._meter_id()
        )
        self._hold(end, why.error or local_responses.message_of(own))

    def _let_go(self, end: Ending) -> None:
        """Of the upstream."""
        task, self._connecting = self._connecting, None
        if task is not None and task is not asyncio.current_task(self._hop.loop):
            task.cancel()
        connection, self.connection = self.connection, None
        if connection is None:
            return
        if end.upstream is ending.Upstream.FINISH:
            connection.finish(self._hop.settings.idle_timeout_s)
        else:
            connection.discard()

    def _over(self) -> None:
        """The call is over for both sides."""
        self.phase = OVER
        self.deadline = NEVER
        if not self._recorded:
            self._record_after_all()
        hop = self._hop
        hop.calls.discard(self)
        if self._tunnel is not None:
            self._tunnel.close()
            self._tunnel = None
        # The two hold each other: taken apart here, a call is freed at once and the collector finds nothing.
        self.response = self._passing = None
        if self._drain_owners:
            hop.drains.give_back(self._drain_owners)
            hop.metrics.drains_changed(-1)
        client, self.client = self.client, None
        if client is not None:
            try:
                client.call_over(self._keep_alive, self.upload_done)
            except Exception:
                log.exception("a connection cannot go on behind its call, and is closed")
                client.close_soon()
        if hop.idle is not None and not hop.calls:
            hop.idle()

    # -- back-pressure ---------------------------------------------------------------------------

    def client_full(self, full: bool) -> None:
        """A slow client slows the upstream down, and never fills our memory."""
        if self._tunnel is not None:
            self._tunnel.client_full(full)
        elif self.connection is not None and self.phase not in (Phase.HELD, Phase.CATCHING_UP):
            self.connection.pause(full)
            if not full and self.upload_done:
                self.deadline = self._hop.idle_until

    # -- protocol switches -----------------------------------------------------------------------

    def _switch_later(self, event: Event, why: Why) -> None:
        """The upstream agreed before it had the whole request; what belongs to that is not the new protocol's."""
        if self.connection is not None:
            self.connection.pause(True)

    def _join(self, event: Event, why: Why) -> None:
        """The upstream responded with 101: from here on bytes go both ways unread."""
        client, connection, response = self.client, self.connection, self.response
        assert response is not None
        if client is None or connection is None:
            self._finish(Cause.CLIENT_CLOSED)
            return
        self._flush()
        hop = self._hop
        tap = None
        if self._recorder is hop.recorder:
            tap = self._taps.socket(self._target, response)
        gate_of_message = None if self._question is None else self._question.of_message
        tunnel = self._tunnel = Tunnel(self, hop, self._exchange, client, connection, tap, gate_of_message)
        self.phase = Phase.TUNNEL
        connection.owner = tunnel
        connection.pause(client.full)
        self.tunnel_moved()
        if response.tail:
            tunnel.upstream_data(response.tail)
        if self.phase is Phase.TUNNEL:
            client.switch(tunnel)

    def tunnel_moved(self) -> None:
        self.deadline = self._hop.idle_until

    def tunnel_unrecorded(self) -> None:
        """With `SIDECAR_ON_SPOOL_FULL=refuse` nothing is passed on without its record."""
        self._hop.metrics.limit_reached("spool_full")
        if self.phase is not OVER:
            self._finish(Cause.UNRECORDED)

    def tunnel_upstream_gone(self) -> None:
        self.connection = None
        self.deadline = NEVER

    def tunnel_ended(self, reset: bool) -> None:
        """The client's side is closed once the tunnel is on record."""
        self.tunnel_upstream_gone()
        if self.phase is Phase.TUNNEL:
            self._finish(Cause.TUNNEL_RESET if reset else Cause.TUNNEL_CLOSED)


Handler = Callable[[Call, Event, Why], None]

CAUSES: Final[Mapping[Event, Cause]] = {
    Event.UPLOAD_BROKE: Cause.UPLOAD_BROKE,
    Event.NOT_COMMITTED: Cause.NOT_COMMITTED,
    Event.STOP: Cause.STOPPED,
    Event.FAULT: Cause.FAULT,
}
"""Of the events that end a call, whatever its phase."""

_HANDLERS: Final[Mapping[Event, Mapping[Handler, tuple[Phase, ...]]]] = {
    Event.UPLOAD: {
        Call._look_ahead: (Phase.ADMISSION,),
        Call._gather: (Phase.GATHERING,),
        Call._upload: (Phase.SENDING, Phase.STREAMING),
    },
    Event.JUDGED: {Call._judged: (Phase.ADMISSION,)},
    Event.UPLOAD_BROKE: {
        Call._end: (Phase.ADMISSION, Phase.GATHERING, Phase.CONNECTING, Phase.SENDING, Phase.STREAMING),
    },
    Event.CONNECTED: {Call._send: (Phase.CONNECTING,)},
    Event.UNREACHABLE: {Call._unreachable: (Phase.CONNECTING,)},
    Event.PIECE: {
        Call._relay: (Phase.SENDING, Phase.WAITING, Phase.STREAMING, Phase.TRAILING),
        Call._drain_on: (Phase.DRAINING,),
    },
    Event.END_MARK: {
        Call._complete: (Phase.SENDING, Phase.WAITING, Phase.STREAMING),
        Call._drain_on: (Phase.DRAINING,),
        Call._relay: (Phase.TRAILING,),
    },
    Event.WHOLE: {
        Call._whole: (
            Phase.SENDING, Phase.WAITING, Phase.STREAMING, Phase.DRAINING, Phase.CATCHING_UP, Phase.HELD,
            Phase.TRAILING,
        ),
    },
    Event.SWITCHED: {
        Call._switch_later: (Phase.SENDING,),
        Call._join: (Phase.WAITING,),
        Call._left: (Phase.DRAINING,),
    },
    Event.BROKE: {
        Call._broke: (
            Phase.SENDING, Phase.WAITING, Phase.STREAMING, Phase.DRAINING, Phase.CATCHING_UP, Phase.HELD,
            Phase.TRAILING,
        ),
    },
    Event.CLIENT_LEFT: {
        Call._left: (
            Phase.ADMISSION, Phase.GATHERING, Phase.CONNECTING, Phase.SENDING, Phase.TUNNEL, Phase.HELD,
            Phase.TRAILING,
        ),
        Call._drain_or_leave: (Phase.WAITING, Phase.STREAMING),
    },
    Event.EXPIRED: {
        Call._expire: (
            Phase.ADMISSION, Phase.GATHERING, Phase.CONNECTING, Phase.SENDING, Phase.WAITING, Phase.STREAMING,
            Phase.DRAINING, Phase.TUNNEL, Phase.TRAILING,
        ),
    },
    Event.COMMITTED: {Call._committed: (Phase.HELD,)},
    Event.NOT_COMMITTED: {Call._end: (Phase.HELD,)},
    Event.STOP: {Call._end: tuple(phase for phase in Phase if phase is not OVER)},
    Event.FAULT: {Call._end: tuple(phase for phase in Phase if phase is not OVER)},
}  # fmt: skip


def _table() -> list[list[Handler | None]]:
    table: list[list[Handler | None]] = [[None] * len(Event) for _ in Phase]
    for event, handlers in _HANDLERS.items():
        for handler, phases in handlers.items():
            for phase in phases:
                table[phase][event] = handler
    return table


TABLE: Final = _table()
"""By phase and event: what is done. None: nothing, it says nothing new there."""
