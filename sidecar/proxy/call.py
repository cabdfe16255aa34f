"""One call, from its head to its answer's last byte.

A call is a set of short synchronous steps, each run by the event that makes it possible: a piece of
the upload, a piece of the answer, a lost connection, a passed deadline, a committed record. There
is no task a call (only making a new upstream connection needs one) and no timer a call. `sending` has what comes
before the answer, `ending` and `recording` what comes after it.

What must always hold here:
- The upstream connection is given back before the record is committed, so a slow disk costs no connection.
- A request goes twice only where a pooled connection died before it said a word, and it may.
- A body that was cut off upstream reaches the client cut off.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from time import monotonic_ns

from sidecar.model.exchange import Exchange, Outcome, Usage
from sidecar.proxy.context import NEVER
from sidecar.proxy.recording import cut_usage
from sidecar.proxy.request_body import Kept
from sidecar.proxy.response_parser import Answer
from sidecar.proxy.sending import Sending
from sidecar.proxy.tunnel import Tunnel
from sidecar.proxy.upstream import NOT_HTTP, RESET, UpstreamConnection
from sidecar.usage import SocketTap

log = logging.getLogger(__name__)


class Call(Sending):
    """One exchange under way."""

    __slots__ = ()

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
            asked=self._message,
            peer=None if self.client is None else self.client.peer,
        )
        if self._retried:
            again = None if self._kept is None else self._kept.whole()
            assert again is not None
            self._kept = None
            self._send_full = False
            connection.write(again)
            self.deadline = hop.now + (hop.rules.response_timeout_s if self.upload_done else hop.rules.idle_timeout_s)
            self.pump()  # what has come of the body since
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

    # -- the answer ------------------------------------------------------------------------------

    def upstream_data(self, data: bytes) -> None:
        try:
            answer = self.answer
            assert answer is not None
            if not self._heard:
                self._hear()
            answer.feed(data)
            if answer.broken is not None:
                self._upstream_broke(answer.broken, NOT_HTTP)
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
        except Exception:
            log.exception("a call could not be handled")
            self.failed()

    def _hear(self) -> None:
        """The first byte of the answer has come."""
        self._heard = True
        self._kept = None
        exchange = self._exchange
        exchange.first_byte_ms = (monotonic_ns() - exchange.started_mono_ns) / 1e6

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
                connection.release(answer.keep_alive)
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
        connection, self.connection = self.connection, None
        answer = self.answer
        assert answer is not None
        if not self._heard and self._may_retry():
            self._retried = True
            self._hop.metrics.upstream_retried()
            self._task = self._hop.loop.create_task(self._connect())
            return
        answer.eof(clean)
        if answer.broken is not None:
            self._upstream_broke(answer.broken, RESET if connection is None else connection.why_lost)
        else:
            self._answered()

    def _may_retry(self) -> bool:
        """A pooled connection that died before it said a word, and a request that may go twice."""
        kept = self._kept  # set only where both held when it was sent
        return kept is not None and kept.whole() is not None and not self._retried

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

    def record_message(self, usage: Usage, release: Callable[[bool], None]) -> bool:
        """A message in the tunnel reported usage: admit its record and hand it over in one step. False: `release` will
        be called. Sizes and names of fields are those of the tunnel, whose own record has them."""
        parent = self._exchange
        message = Exchange(
            method=parent.method,
            url=parent.url,
            route=parent.route,
            client_ip=parent.client_ip,
            user_agent=parent.user_agent,
            trace_id=parent.trace_id,
            subscriber=parent.subscriber,
            dimensions=parent.dimensions,
            parent_id=parent.id,
        )
        recorder = self._hop.recorder
        if not recorder.admit(message):
            self.message_unrecorded()
            return True
        cut_usage(usage, self._hop.metrics.limit_reached)
        message.outcome = Outcome.COMPLETE
        message.duration_ms = 0.0
        message.usage = usage
        return recorder.complete(message, release)

    def soon(self, do: Callable[[], None]) -> None:
        """In the next turn of the loop."""
        self._hop.loop.call_soon(do)

    def message_unrecorded(self) -> None:
        """With `SIDECAR_ON_SPOOL_FULL=refuse` nothing is passed on without its record."""
        self._hop.metrics.limit_reached("spool_full")
        self._cut(Outcome.STOPPED, "a message could not be recorded")

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
