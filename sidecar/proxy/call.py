"""One call, from its head to its answer's last byte.

A call is a set of short synchronous steps, each run by the event that makes it possible: a piece of
the upload, a piece of the answer, a lost connection, a passed deadline, a committed record. There
is no task a call (only making a new upstream connection needs one) and no timer a call. `ending` has
the other half: how it ends.

What must always hold here:
- The upstream connection is given back before the record is committed, so a slow disk costs no connection.
- A request goes twice only where a pooled connection died before it said a word, and it may.
- A body that was cut off upstream reaches the client cut off.
"""

from __future__ import annotations

import logging
from time import monotonic_ns
from typing import TYPE_CHECKING, Final

from sidecar.exchange import Exchange, Outcome
from sidecar.proxy import own_answers
from sidecar.proxy.aiohttp_internals import EMPTY_PAYLOAD, RawRequestMessage, StreamReader
from sidecar.proxy.answer import Answer
from sidecar.proxy.asking import Gathering, head_of, may_change
from sidecar.proxy.ending import Ending
from sidecar.proxy.headers import trace_id
from sidecar.proxy.hop import NEVER, Hop
from sidecar.proxy.own_answers import OwnAnswer
from sidecar.proxy.tunnel import Tunnel
from sidecar.proxy.upload import Kept, Upload
from sidecar.proxy.upstream import UnreachableError, UpstreamConnection
from sidecar.usage import RawHeaders, RequestTap, SocketTap

if TYPE_CHECKING:
    from sidecar.proxy.client import Client

log = logging.getLogger(__name__)

IDEMPOTENT: Final = frozenset({"GET", "HEAD", "OPTIONS", "TRACE", "PUT", "DELETE", "QUERY", "PROPFIND", "REPORT"})


class Call(Ending):
    """One exchange under way."""

    __slots__ = (
        "_asked", "_gathering", "_head", "_heard", "_idempotent", "_idle_timeout_s", "_kept", "_payload", "_retried",
        "_upgrade", "_upload",
    )  # fmt: skip

    def __init__(self, hop: Hop, client: Client, message: RawRequestMessage, payload: StreamReader) -> None:
        super().__init__(hop, client, message, upload_done=payload is EMPTY_PAYLOAD)
        self._payload = payload
        self._upload: Upload | None = None
        self._gathering: Gathering | None = None
        self._asked = False  # usage was asked for on the client's behalf
        self._head = b""
        self._kept: Kept | None = None  # the request as sent, while a retry may need it
        self._idle_timeout_s = hop.rules.idle_timeout_s
        self._upgrade = False
        self._idempotent = False
        self._heard = False  # a byte of the answer has come
        self._retried = False

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
        tap = self._request_tap
        if not self.upload_done:
            if tap is not None and self._may_ask(tap) and may_change(method, raw):
                self._gathering = Gathering(Upload(self._payload, chunked=False, tap=None), tap)
                self.deadline = hop.loop.time() + self._idle_timeout_s
                self._gather()
                return
            self._upload = Upload(self._payload, chunked=bool(message.chunked), tap=tap)
        self._set_out()

    def _gather(self) -> None:
        gathering, before = self._gathering, self._exchange.request_bytes
        assert gathering is not None
        if gathering.upload.reading:
            return
        body = gathering.take()
        size = self._exchange.request_bytes = gathering.upload.size_bytes
        if body is None:
            if size > before:
                self.deadline = self._hop.now + self._idle_timeout_s
            self._read_on()
            return
        self.upload_done = True
        self._gathering = None
        if gathering.asked:
            self._asked = True
            self._head = self._head_of(len(body))
        self._head += body
        self._set_out()

    def _head_of(self, size_bytes: int) -> bytes:
        """The request's head for a body of another length."""
        client, message, rules = self.client, self._message, self._hop.headers
        assert client is not None
        line, authority = rules.request_line(message.method, message.path)
        fields = head_of(message.raw_headers, size_bytes)
        head = rules.request(fields, client.peer, upgrade=False, http10=self._http10, authority=authority)
        return line + head.lines

    def _set_out(self) -> None:
        """On a connection that is at hand, or a new one."""
        hop = self._hop
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

    def _may_ask(self, tap: RequestTap) -> bool:
        try:
            return tap.may_ask
        except Exception:
            log.exception("the request tap failed; nothing is asked for")
            return False

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
            again = None if self._kept is None else self._kept.whole()
            assert again is not None
            connection.write(again)
            self.deadline = hop.now + hop.rules.response_timeout_s
            return
        data, self._head = self._head, b""
        upload = self._upload
        if upload is not None:
            data += upload.take()
            self._exchange.request_bytes = upload.size_bytes
            self.upload_done = upload.done
        if connection.used and self._idempotent:
            self._kept = Kept(data, hop.rules.retry_body_bytes_max)
        connection.write(data)
        if self.upload_done:
            self.deadline = hop.now + hop.rules.response_timeout_s
        else:
            self.deadline = hop.now + hop.rules.idle_timeout_s
            self._read_on()

    def pump(self) -> None:
        """Move what has come of the upload to the upstream, as far as the upstream takes it."""
        if self._gathering is not None:
            self._gather()
            return
        connection, upload = self.connection, self._upload
        if upload is None or self.upload_done or upload.reading:
            return
        if connection is None or self._send_full or self._recorded:
            return
        hop = self._hop
        wire = upload.take()
        done = self.upload_done = upload.done
        self._exchange.request_bytes = upload.size_bytes
        if wire:
            if self._kept is not None:
                self._kept.add(wire)
            connection.write(wire)
            answer = self.answer
            waiting = done and not (answer is not None and answer.started)
            self.deadline = hop.now + (hop.rules.response_timeout_s if waiting else hop.rules.idle_timeout_s)
        if not done:
            self._read_on()

    def _see_upload(self) -> None:
        upload = self._upload
        if upload is None or upload.size_bytes or upload.done or upload.reading:
            return
        if self._payload.exception() is None:
            upload.take()
            self._exchange.request_bytes = upload.size_bytes

    def _read_on(self) -> None:
        """A read has made room: let the parser go on with what it holds, in a turn of its own."""
        client = self.client
        if client is not None and not self._send_full and client.resume_upload():
            self._hop.loop.call_soon(client.parse_on)

    def upload_broke(self, own: OwnAnswer) -> None:
        """The client's body turned out malformed: nothing of it may be taken for whole upstream."""
        self._answer_own(own, Outcome.REFUSED)

    # -- the answer ------------------------------------------------------------------------------

    def upstream_data(self, data: bytes) -> None:
        try:
            self._take_answer(data)
        except Exception:
            log.exception("a call could not be handled")
            self.failed()

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
        elif self._draining:
            if answer.ended or (answer.started and not self._worth_draining()):
                self._give_up(Outcome.CLIENT_LEFT)
        else:
            if answer.started:
                self.deadline = self._hop.now + self._idle_timeout_s
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
        if self._asked:
            try:
                answer.filter = hop.taps.answer_filter(answer.status, answer.fields)
            except Exception:
                log.exception("the answer could not be filtered; it passes as it is")
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
            self._holding = True
            self._catch_up()
            return
        if not self._recorded:
            self._complete()
        if not self._holding:
            self._flush()
            self._end()

    def upstream_lost(self, clean: bool, reset: bool) -> None:
        self.connection = None
        answer = self.answer
        assert answer is not None
        if not self._heard and self._may_retry():
            self._retried = True
            self._hop.metrics.upstream_retried()
            self._task = self._hop.loop.create_task(self._connect())
            return
        answer.eof(clean)
        if answer.broken is not None:
            self._upstream_broke(answer.broken)
        else:
            self._answered()

    def _may_retry(self) -> bool:
        """A pooled connection that died before it said a word, and a request that may go twice."""
        kept = self._kept  # set only where both held when it was sent
        return kept is not None and kept.whole() is not None and self.upload_done and not self._retried

    # -- back-pressure ---------------------------------------------------------------------------

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
        self._tunnel = Tunnel(self, self._exchange, client, connection, self._tap_socket(answer))
        connection.owner = self._tunnel
        self.touch()
        if answer.tail:
            self._tunnel.upstream_data(answer.tail)
        if not self._over:
            client.switch(self._tunnel)

    def _tap_socket(self, answer: Answer) -> SocketTap | None:
        try:
            return self._hop.taps.websocket(self._message.path, answer.fields)
        except Exception:
            log.exception("the socket's tap failed; the tunnel goes on without it")
            return None

    def touch(self) -> None:
        """The tunnel moved."""
        self.deadline = self._hop.now + self._hop.rules.idle_timeout_s

    def upstream_gone(self) -> None:
        """The tunnel's upstream side is no more; what came of it may still be held."""
        self.connection = None
        self.deadline = NEVER

    def tunnel_ended(self, outcome: Outcome) -> None:
        """The upstream's side of the tunnel is gone: the client's is closed once that is on record."""
        self.upstream_gone()
        if self._record(outcome, whole=outcome is Outcome.COMPLETE, release=self._release):
            self._release(True)
