"""One call, from its head to its one record.

A call is a set of short synchronous steps, each run by the event that makes it possible: a piece of
the upload, a piece of the answer, a lost connection, a passed deadline, a committed record. There
is no task a call (only making a new upstream connection needs one) and no timer a call.

What must always hold:
- `_record` is the one way to an end, and does nothing the second time.
- What ends an answer for the client (its end mark, else its last bytes) waits in `answer.out` until
  the record is on disk; nothing written after it overtakes it.
- The upstream connection is given back before the record is committed, so a slow disk costs no connection.
- A body that was cut off upstream reaches the client cut off.
"""

from __future__ import annotations

import asyncio
import logging
from asyncio import AbstractEventLoop, Task
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from time import monotonic_ns
from typing import TYPE_CHECKING, Final, Protocol

from sidecar.exchange import Exchange, Outcome, Recorder, Subscriber, Usage
from sidecar.proxy import own_answers
from sidecar.proxy.aiohttp_internals import EMPTY_PAYLOAD, RawRequestMessage, StreamReader
from sidecar.proxy.answer import Answer
from sidecar.proxy.headers import HeaderRules, trace_id
from sidecar.proxy.own_answers import OwnAnswer
from sidecar.proxy.rules import ProxyRules
from sidecar.proxy.tunnel import Tunnel
from sidecar.proxy.upstream import UnreachableError, Upstream, UpstreamConnection
from sidecar.usage import RawHeaders, RequestTap, Taps

if TYPE_CHECKING:
    from sidecar.proxy.client import Client

log = logging.getLogger(__name__)

IDEMPOTENT: Final = frozenset({"GET", "HEAD", "OPTIONS", "TRACE", "PUT", "DELETE", "QUERY", "PROPFIND", "REPORT"})
NEVER: Final = float("inf")

Attribute = Callable[[RawHeaders, str, str | None], tuple[Subscriber | None, Mapping[str, str]]]
Route = Callable[[str, str], str | None]


class ProxyMetrics(Protocol):
    """What the hop counts; one call per happening."""

    def request_rejected(self, reason: str) -> None: ...
    def upstream_retried(self) -> None: ...
    def drains_changed(self, delta: int) -> None: ...
    def connections_changed(self, delta: int) -> None: ...
    def limit_reached(self, name: str) -> None: ...


@dataclass(slots=True, kw_only=True)
class Hop:
    """What all calls of one proxy share."""

    rules: ProxyRules
    headers: HeaderRules
    upstream: Upstream
    recorder: Recorder
    taps: Taps
    attribute: Attribute
    route: Route
    metrics: ProxyMetrics
    loop: AbstractEventLoop
    now: float = 0.0  # loop time as of the last sweep: good enough for deadlines, and free
    calls: set[Call] = field(default_factory=set)
    drains: int = 0
    stopping: bool = False
    idle: Callable[[], None] | None = None  # called when the last call is over


class Call:
    """One exchange under way."""

    __slots__ = (
        "_draining", "_exchange", "_full", "_head", "_head_sent", "_heard", "_holding", "_hop", "_http10",
        "_idempotent", "_keep_alive", "_kept", "_message", "_over", "_payload", "_pumping", "_recorded",
        "_request_tap", "_retried", "_send_full", "_task", "_tunnel", "_upgrade", "answer", "client", "connection",
        "deadline", "upload_done",
    )  # fmt: skip

    def __init__(self, hop: Hop, client: Client, message: RawRequestMessage, payload: StreamReader) -> None:
        self._hop = hop
        self._message = message
        self._payload = payload
        self._http10 = message.version.minor == 0
        self._exchange: Exchange
        self._head = b""
        self._kept: list[bytes] | None = None  # the request as sent, while a retry may need it
        self._request_tap: RequestTap | None = None
        self._upgrade = False
        self._idempotent = False
        self._keep_alive = False
        self._heard = False  # a byte of the answer has come
        self._head_sent = False
        self._recorded = False
        self._holding = False  # the record is not on disk yet: nothing leaves
        self._over = False
        self._full = False  # the client does not read as fast as the answer comes
        self._send_full = False  # the upstream does not read as fast as the upload comes
        self._pumping = False
        self._retried = False
        self._draining = False
        self._task: Task[None] | None = None
        self._tunnel: Tunnel | None = None
        self.client: Client | None = client
        self.connection: UpstreamConnection | None = None
        self.answer: Answer | None = None
        self.upload_done = payload is EMPTY_PAYLOAD
        self.deadline = NEVER

    # -- the request -----------------------------------------------------------------------------

    def start(self) -> None:
        """Let the call in and send it on."""
        hop, message, client = self._hop, self._message, self.client
        assert client is not None
        rules = hop.headers
        method, target = message.method, message.path
        if message.upgrade and not self._http10:
            self._upgrade = client.may_switch(message)
        line, authority = rules.request_line(method, target)
        raw = message.raw_headers
        head = rules.request(raw, client.peer, upgrade=self._upgrade, http10=self._http10, authority=authority)
        client_ip = rules.client_ip(client.peer, head.forwarded_for)
        url, path = rules.record_url(target)
        subscriber, dimensions = hop.attribute(raw, target, client_ip)
        agent = head.user_agent
        exchange = self._exchange = Exchange(
            method=method,
            url=url,
            route=hop.route(method, path),
            request_headers=head.names,
            client_ip=client_ip,
            user_agent=None if agent is None else agent.decode("utf-8", "replace"),
            trace_id=None if head.traceparent is None else trace_id(head.traceparent),
            subscriber=subscriber,
            dimensions=dimensions,
        )
        if not hop.recorder.admit(exchange):
            self._recorded = self._over = True
            client.reject(own_answers.SPOOL_FULL, "spool_full")
            return
        hop.calls.add(self)
        refused = self._refused(head.transfer_encoding)
        if refused is not None:
            self._answer_own(refused, Outcome.REFUSED)
            return
        self._request_tap = self._tap_request(method, target, raw)
        self._idempotent = head.idempotency_key or method in IDEMPOTENT
        self._head = line + head.lines
        connection = hop.upstream.take()
        if connection is None:
            self._task = hop.loop.create_task(self._connect())
        else:
            self._send(connection)

    def _refused(self, coding: bytes | None) -> OwnAnswer | None:
        """What the parser lets through and we do not."""
        message = self._message
        if message.version.major != 1 or message.version.minor > 1:
            return own_answers.BAD_VERSION
        if coding is not None and (self._http10 or coding.strip().lower() != b"chunked"):
            return own_answers.AMBIGUOUS
        if message.method == "CONNECT":
            return own_answers.UNKNOWN_METHOD
        return None

    def _tap_request(self, method: str, target: str, raw: RawHeaders) -> RequestTap | None:
        try:
            return self._hop.taps.request(method, target, raw)
        except Exception:
            log.exception("the request tap failed; the call goes on without it")
            return None

    async def _connect(self) -> None:
        try:
            connection = await self._hop.upstream.connect()
        except TimeoutError:
            self._answer_own(own_answers.CONNECT_TIMEOUT, Outcome.UNREACHABLE)
        except UnreachableError as error:
            log.debug("upstream unreachable: %s", error)
            self._answer_own(own_answers.UNREACHABLE, Outcome.UNREACHABLE)
        else:
            if self._over:
                connection.release()
            else:
                self._send(connection)
        finally:
            self._task = None

    def _send(self, connection: UpstreamConnection) -> None:
        """The head and what there is of the body, in one write."""
        hop = self._hop
        self.connection = connection
        connection.owner = self
        self.answer = Answer(
            hop.headers,
            self._announce,
            head_only=self._message.method == "HEAD",
            http10=self._http10,
            upgrade=self._upgrade,
            mute=self.client is None,
        )
        if self._retried:
            assert self._kept is not None
            connection.write(b"".join(self._kept))
            self.deadline = hop.now + hop.rules.response_timeout_s
            return
        data = self._head
        self._head = b""
        if not self.upload_done:
            data += self._take_upload()
        self._kept = [data] if len(data) <= hop.rules.retry_body_bytes_max else None
        connection.write(data)
        if self.upload_done:
            self.deadline = hop.now + hop.rules.response_timeout_s
        else:
            self.deadline = hop.now + hop.rules.idle_timeout_s
            self._read_on()

    def pump(self) -> None:
        """Move what has come of the upload to the upstream, as far as the upstream takes it."""
        connection = self.connection
        if self._pumping or self.upload_done or connection is None or self._send_full or self._recorded:
            return
        hop = self._hop
        wire = self._take_upload()
        if wire:
            kept = self._kept
            if kept is not None:
                kept.append(wire)
                if sum(map(len, kept)) > hop.rules.retry_body_bytes_max or len(kept) > KEPT_PIECES_MAX:
                    self._kept = None
            connection.write(wire)
            waiting = self.upload_done and (self.answer is None or not self.answer.started)
            self.deadline = hop.now + (hop.rules.response_timeout_s if waiting else hop.rules.idle_timeout_s)
        if not self.upload_done:
            self._read_on()

    def _read_on(self) -> None:
        """A read has made room: let the parser go on with what it holds, in a turn of its own."""
        client = self.client
        if client is not None and not self._send_full and client.resume_upload():
            self._hop.loop.call_soon(client.parse_on)

    def _take_upload(self) -> bytes:
        """What has come of the body, framed for the upstream."""
        payload = self._payload
        self._pumping = True  # reading may wake the parser, which would pump again
        try:
            piece = payload.read_nowait()
        finally:
            self._pumping = False
        wire = piece
        chunked = self._message.chunked
        if piece:
            self._exchange.request_bytes += len(piece)
            if self._request_tap is not None:
                try:
                    self._request_tap.feed(piece)
                except Exception:
                    log.exception("the request tap failed; the call goes on without it")
                    self._request_tap = None
            if chunked:
                wire = b"%x\r\n%b\r\n" % (len(piece), piece)
        if payload.at_eof():
            self.upload_done = True
            if chunked:
                wire += b"0\r\n\r\n"
        return wire

    def upload_broke(self, own: OwnAnswer) -> None:
        """The client's body turned out malformed: nothing of it may be taken for whole upstream."""
        self._answer_own(own, Outcome.REFUSED)

    # -- the answer ------------------------------------------------------------------------------

    def upstream_data(self, data: bytes) -> None:
        try:
            self._take_answer(data)
        except Exception:
            self.failed()

    def failed(self) -> None:
        """A fault of ours: the call still ends once, and what was sent of its answer is cut, not added to."""
        log.exception("a call could not be handled")
        if not self._over:
            self._answer_own(own_answers.OWN_FAULT, Outcome.UPSTREAM_BROKE)

    def _take_answer(self, data: bytes) -> None:
        answer, exchange = self.answer, self._exchange
        assert answer is not None
        if not self._heard:
            self._heard = True
            self._kept = None
            exchange.first_byte_ms = (monotonic_ns() - exchange.started_mono_ns) / 1e6
        answer.feed(data)
        if answer.broken is not None:
            self._upstream_broke(answer.broken)
        elif answer.done:
            self._answered()
        elif answer.upgraded:
            self._switch()
        else:
            if self._draining:
                if answer.ended or (answer.started and not self._worth_draining()):
                    self._give_up(Outcome.CLIENT_LEFT)
                return
            if answer.started and self.upload_done:
                self.deadline = self._hop.now + self._hop.rules.idle_timeout_s
            if answer.ended and not self._recorded:
                self._complete()
            self._flush()

    def _announce(self, answer: Answer) -> bytes:
        """The final head is read: choose the reader, and say what the client gets besides."""
        hop, exchange = self._hop, self._exchange
        exchange.response_headers = answer.names
        if self._request_tap is not None:
            try:
                answer.tap = hop.taps.response(self._request_tap, answer.status, answer.fields)
            except Exception:
                log.exception("the response tap failed; the call goes on without it")
        client = self.client
        if client is None:
            return b""
        exchange.status = answer.status
        meter_id = b"X-Meter-Id: " + exchange.id.encode() + b"\r\n" if hop.rules.meter_id_header else b""
        if answer.status == 101:
            return meter_id
        self._keep_alive = not answer.close_delimited and self.upload_done and client.may_keep_alive(self._message)
        if not self._keep_alive:
            return meter_id + b"Connection: close\r\n"
        if self._http10:
            return meter_id + b"Connection: keep-alive\r\n"
        return meter_id

    def _answered(self) -> None:
        """The answer is whole."""
        answer, connection = self.answer, self.connection
        assert answer is not None
        if connection is not None:
            self.connection = None
            if answer.reusable and self.upload_done and not answer.extra:
                connection.release()
            else:
                connection.discard()
        self.deadline = NEVER
        if self._draining:
            self._record(Outcome.CLIENT_LEFT, whole=True)
            self._end()
            return
        if not self._recorded:
            self._complete()
        if not self._holding:
            self._flush()
            self._end()

    def _complete(self) -> None:
        """Record a call that the client has had, or is about to have, in full."""
        self._holding = True
        if self._record(Outcome.COMPLETE, whole=True, release=self._release):
            self._holding = False
        elif self.connection is not None:
            self.connection.pause(True)  # what follows an end mark waits outside

    def _release(self, send: bool) -> None:
        """The record is on disk, or it is decided that the answer goes without, or not at all."""
        self._holding = False
        if self._over:
            return
        client, answer = self.client, self.answer
        if not send:
            self._drop_upstream()
            if client is not None:
                client.reset()
            self._end()
            return
        if self._tunnel is not None:
            if client is not None:
                client.close_soon()
            self._end()
            return
        self._flush()
        if answer is None or answer.done or self.connection is None:
            self._end()
        elif not self._full:
            self.connection.pause(False)

    def _flush(self) -> None:
        answer, client = self.answer, self.client
        if self._holding or answer is None or client is None:
            return
        out = answer.out
        if out:
            if answer.started:
                self._head_sent = True
            client.send(out[0] if len(out) == 1 else b"".join(out))
            out.clear()

    # -- protocol switches -----------------------------------------------------------------------

    def _switch(self) -> None:
        """The upstream answered 101: from here on bytes go both ways unread."""
        client, connection, answer = self.client, self.connection, self.answer
        assert answer is not None
        if client is None or connection is None:
            self._give_up(Outcome.CLIENT_LEFT)
            return
        self._flush()
        self.upload_done = True
        self._tunnel = Tunnel(self, self._exchange, client, connection)
        connection.owner = self._tunnel
        self.touch()
        if answer.tail:
            self._tunnel.upstream_data(answer.tail)
        client.switch(self._tunnel)

    def touch(self) -> None:
        """The tunnel moved."""
        self.deadline = self._hop.now + self._hop.rules.idle_timeout_s

    def tunnel_ended(self, outcome: Outcome) -> None:
        """The upstream's side of the tunnel is gone: the client's is closed once that is on record."""
        self.connection = None
        self.deadline = NEVER
        if self._record(outcome, whole=outcome is Outcome.COMPLETE, release=self._release):
            self._release(True)

    # -- ends ------------------------------------------------------------------------------------

    def upstream_lost(self, clean: bool, reset: bool) -> None:
        connection, self.connection = self.connection, None
        answer = self.answer
        assert answer is not None
        if not self._heard and connection is not None and self._may_retry(connection):
            self._retried = True
            self._hop.metrics.upstream_retried()
            self._task = self._hop.loop.create_task(self._connect())
            return
        answer.eof(clean)
        if answer.broken is not None:
            self._upstream_broke(answer.broken)
        else:
            self._answered()

    def _may_retry(self, connection: UpstreamConnection) -> bool:
        """A pooled connection that died before it said a word, and a request that may go twice."""
        whole = self.upload_done and self._kept is not None
        return whole and connection.uses > 1 and not self._retried and self._idempotent

    def upstream_full(self, full: bool) -> None:
        self._send_full = full
        if not full:
            self.pump()

    def client_full(self, full: bool) -> None:
        """Back-pressure: a slow client slows the upstream down, and never fills our memory."""
        self._full = full
        if self._tunnel is not None:
            self._tunnel.client_full(full)
        elif self.connection is not None and not self._holding:
            self.connection.pause(full)
            if not full and self.upload_done:
                self.deadline = self._hop.now + self._hop.rules.idle_timeout_s

    def client_left(self, error: BaseException | None) -> None:
        """The client's connection is gone."""
        self.client = None
        if self._over:
            return
        answer = self.answer
        if answer is not None:
            answer.mute = True
            answer.out.clear()
        if self._recorded:
            self._drop_upstream()
            self._end()
        elif self._tunnel is not None:
            connection, self.connection = self.connection, None
            if connection is not None:
                connection.finish()
            self._record(Outcome.COMPLETE if error is None else Outcome.CLIENT_LEFT, whole=error is None)
            self._end()
        elif self._may_drain():
            self._draining = True
            self._hop.drains += 1
            self._hop.metrics.drains_changed(1)
            self.deadline = self._hop.loop.time() + self._hop.rules.disconnect_drain_s
            if self.connection is not None:
                self.connection.pause(False)
        else:
            self._give_up(Outcome.CLIENT_LEFT)

    def _may_drain(self) -> bool:
        """Whether the upstream is read on for the sake of the usage in what is still to come."""
        hop = self._hop
        if not self.upload_done or self.connection is None or self._request_tap is None:
            return False
        if hop.rules.disconnect_policy(self._exchange.route) == "stop" or not self._worth_draining():
            return False
        if hop.drains >= hop.rules.drains_max:
            hop.metrics.limit_reached("drains")
            return False
        return True

    def _worth_draining(self) -> bool:
        answer = self.answer
        if answer is None or not answer.started:
            return True
        return answer.tap is not None and answer.tap.waiting

    def expired(self) -> None:
        """The deadline passed. Which one it was follows from where the call stands."""
        self.deadline = NEVER
        hop, answer = self._hop, self.answer
        if self._draining:
            hop.metrics.limit_reached("disconnect_drain")
            self._give_up(Outcome.CLIENT_LEFT)
        elif self._tunnel is not None:
            hop.metrics.limit_reached("idle_timeout")
            self._cut(Outcome.UPSTREAM_TIMEOUT, "the tunnel was silent for too long")
        elif self._full:
            hop.metrics.limit_reached("idle_timeout")
            self._cut(Outcome.CLIENT_LEFT, "the client stopped reading")
        elif not self.upload_done and not self._send_full:
            hop.metrics.limit_reached("idle_timeout")
            self._answer_own(own_answers.TOO_SLOW, Outcome.REFUSED)
        elif answer is None or not answer.started:
            hop.metrics.limit_reached("response_timeout")
            self._answer_own(own_answers.RESPONSE_TIMEOUT, Outcome.UPSTREAM_TIMEOUT)
        else:
            hop.metrics.limit_reached("idle_timeout")
            self._cut(Outcome.UPSTREAM_TIMEOUT, "the upstream fell silent")

    def stop(self) -> None:
        """Cut what is left at the end of the graceful stop."""
        if self._over:
            return
        if self._draining:
            self._give_up(Outcome.CLIENT_LEFT)
        else:
            self._cut(Outcome.STOPPED, "cut at the end of the graceful stop")

    def _upstream_broke(self, error: str) -> None:
        if self._draining:
            self._give_up(Outcome.CLIENT_LEFT, error)
        elif self._head_sent:
            self._cut(Outcome.UPSTREAM_BROKE, error)
        else:
            self._answer_own(own_answers.BROKEN, Outcome.UPSTREAM_BROKE, error)

    def _answer_own(self, own: OwnAnswer, outcome: Outcome, error: str | None = None) -> None:
        """An answer of ours instead of the upstream's, where none has begun."""
        if self._over:
            return
        client = self.client
        if client is None or self._head_sent or self._recorded:
            self._cut(outcome, error or own.message)
            return
        self._drop_upstream()
        exchange = self._exchange
        exchange.status = own.status
        exchange.response_headers = list(own_answers.FIELD_NAMES)
        answer = self.answer = Answer(
            self._hop.headers, self._announce, head_only=False, http10=self._http10, upgrade=False
        )
        head_only = self._message.method == "HEAD"
        answer.body_bytes = 0 if head_only else len(own.body)
        answer.done = True
        self._keep_alive = (
            self.upload_done and outcome is not Outcome.REFUSED and client.may_keep_alive(self._message)
        )  # fmt: skip
        fields = b""
        if self._hop.rules.meter_id_header:
            fields = b"X-Meter-Id: " + exchange.id.encode() + b"\r\n"
        answer.out.append(
            own.encode(
                close=not self._keep_alive, keep_alive_10=self._http10, head_only=head_only, fields=fields
            )
        )  # fmt: skip
        self.deadline = NEVER
        self._holding = True
        if self._record(outcome, whole=False, error=error or own.message, release=self._release):
            self._holding = False
            self._flush()
            self._end()

    def _cut(self, outcome: Outcome, error: str) -> None:
        """End a call whose answer has begun. Framing shows the client that it is not whole; where
        there is none, only a reset does."""
        if self._over:
            return
        self._drop_upstream()
        if not self._recorded:
            self._record(outcome, whole=False, error=error)
            self._flush()
        client, answer = self.client, self.answer
        if client is not None:
            if self._holding or answer is None or answer.close_delimited or outcome is not Outcome.UPSTREAM_BROKE:
                client.reset()
            else:
                client.close_soon()
        self._holding = False
        self._end()

    def _give_up(self, outcome: Outcome, error: str | None = None) -> None:
        """End a call that nobody waits for any more."""
        self._drop_upstream()
        self._record(outcome, whole=self.answer is not None and self.answer.ended, error=error)
        self._end()

    def _drop_upstream(self) -> None:
        task, self._task = self._task, None
        if task is not None and task is not _current_task(self._hop.loop):
            task.cancel()
        connection, self.connection = self.connection, None
        if connection is not None:
            connection.discard()

    def _record(
        self, outcome: Outcome, *, whole: bool, error: str | None = None, release: Callable[[bool], None] | None = None
    ) -> bool:
        """Hand the exchange over, once. False: `release` will be called."""
        if self._recorded:
            return True
        self._recorded = True
        exchange, answer = self._exchange, self.answer
        exchange.outcome = outcome
        exchange.error = error
        exchange.duration_ms = (monotonic_ns() - exchange.started_mono_ns) / 1e6
        if answer is not None:
            if self._tunnel is None:
                exchange.response_bytes = answer.body_bytes
            if answer.tap is not None:
                exchange.usage = self._usage(answer, whole)
        return self._hop.recorder.complete(exchange, release)

    def _usage(self, answer: Answer, whole: bool) -> Usage | None:
        assert answer.tap is not None
        try:
            return answer.tap.finish(whole)
        except Exception:
            log.exception("the response tap failed; the call is recorded without usage")
            return None

    def _end(self) -> None:
        """The call is over for both sides."""
        if self._over:
            return
        self._over = True
        self.deadline = NEVER
        hop = self._hop
        hop.calls.discard(self)
        # The two hold each other: taken apart here, a call is freed at once and the collector finds nothing.
        self.answer = None
        if self._draining:
            hop.drains -= 1
            hop.metrics.drains_changed(-1)
        client, self.client = self.client, None
        if client is not None:
            client.call_over(self._keep_alive, self.upload_done)
        if hop.idle is not None and not hop.calls:
            hop.idle()


KEPT_PIECES_MAX: Final = 64  # of an upload kept for a retry; summing them up must stay cheap


def _current_task(loop: AbstractEventLoop) -> Task[object] | None:
    return asyncio.current_task(loop)
