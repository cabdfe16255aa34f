"""How calls end: one way out, whatever happened.

`_record` hands the exchange over and does nothing the second time. What ends an answer for the client
waits in `answer.out` until the record is on disk (`_complete`, `_release`), and nothing written after
it overtakes it. `Call` moves the bytes and says what happened; here is decided what that means for the
client, the upstream and the record.
"""

from __future__ import annotations

import asyncio
import logging
from asyncio import Task
from collections.abc import Callable
from time import monotonic_ns
from typing import TYPE_CHECKING

from sidecar.exchange import Exchange, Outcome, Usage
from sidecar.proxy import own_answers
from sidecar.proxy.aiohttp_internals import RawRequestMessage
from sidecar.proxy.answer import Answer
from sidecar.proxy.hop import NEVER, Hop
from sidecar.proxy.own_answers import OwnAnswer
from sidecar.proxy.tunnel import Tunnel
from sidecar.proxy.upstream import UpstreamConnection
from sidecar.usage import RequestTap

if TYPE_CHECKING:
    from sidecar.proxy.client import Client

log = logging.getLogger(__name__)


class Ending:
    """The half of a call that knows how to end it."""

    __slots__ = (
        "_draining", "_exchange", "_full", "_head_sent", "_holding", "_hop", "_http10", "_keep_alive", "_message",
        "_over", "_recorded", "_request_tap", "_send_full", "_task", "_tunnel", "answer", "client", "connection",
        "deadline", "upload_done",
    )  # fmt: skip

    def __init__(self, hop: Hop, client: Client, message: RawRequestMessage, *, upload_done: bool) -> None:
        self._hop = hop
        self._message = message
        self._http10 = message.version.minor == 0
        self._exchange: Exchange
        self._request_tap: RequestTap | None = None
        self._keep_alive = False
        self._head_sent = False
        self._recorded = False
        self._holding = False  # the record is not on disk yet: nothing leaves
        self._over = False
        self._full = False  # the client does not read as fast as the answer comes
        self._send_full = False  # the upstream does not read as fast as the upload comes
        self._draining = False
        self._task: Task[None] | None = None
        self._tunnel: Tunnel | None = None
        self.client: Client | None = client
        self.connection: UpstreamConnection | None = None
        self.answer: Answer | None = None
        self.upload_done = upload_done
        self.deadline = NEVER

    # -- the record, and what waits for it -------------------------------------------------------

    def _complete(self) -> None:
        """Record a call that the client has had, or is about to have, in full."""
        self._holding = True
        if self._is_behind():
            self._hop.loop.call_soon(self._catch_up)
        elif self._record(Outcome.COMPLETE, whole=True, release=self._release):
            self._holding = False
            return
        if self.connection is not None:
            self.connection.pause(True)  # what follows an end mark waits outside

    def _is_behind(self) -> bool:
        """Whether the reader holds coded bytes that it has not looked into yet."""
        answer = self.answer
        try:
            return answer is not None and answer.tap is not None and answer.tap.behind
        except Exception:
            log.exception("the response tap failed")
            return False

    def _catch_up(self) -> None:
        """Let the reader catch up a step a turn, so that no other call waits for this one's sixty megabytes; then
        record."""
        answer = self.answer
        if self._recorded or self._over or answer is None:
            return
        answer.catch_up()
        if self._is_behind():
            self._hop.loop.call_soon(self._catch_up)
            return
        outcome = Outcome.COMPLETE if self.client is not None else Outcome.CLIENT_LEFT
        if self._record(outcome, whole=True, release=self._release):
            self._release(True)

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
        if self._request_tap is not None:
            self._ask_request(self._request_tap)
        return self._hop.recorder.complete(exchange, release)

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
        message.outcome = Outcome.COMPLETE
        message.duration_ms = 0.0
        message.usage = usage
        return recorder.complete(message, release)

    def message_unrecorded(self) -> None:
        """With `SIDECAR_ON_SPOOL_FULL=refuse` nothing is passed on without its record."""
        self._hop.metrics.limit_reached("spool_full")
        self._cut(Outcome.STOPPED, "a message could not be recorded")

    def _usage(self, answer: Answer, whole: bool) -> Usage | None:
        assert answer.tap is not None
        try:
            return answer.tap.finish(whole)
        except Exception:
            log.exception("the response tap failed; the call is recorded without usage")
            return None

    def _ask_request(self, tap: RequestTap) -> None:
        """What only the request's body says: who pays, and which model gave no answer."""
        exchange, answer, by_body = self._exchange, self.answer, self._hop.attribute_by_body
        try:
            self._see_upload()
            if by_body is not None:
                exchange.subscriber = by_body(exchange.subscriber, tap.member)
            if (answer is None or not answer.started) and exchange.usage is None and self._was_sent_on():
                exchange.usage = tap.unanswered()
        except Exception:
            log.exception("the request tap failed; the call is recorded without what it knew")

    def _see_upload(self) -> None:
        """Let the tap see what has come of a body that went nowhere."""

    def _was_sent_on(self) -> bool:
        """Whether the call was the upstream's to answer: what we turned away ourselves asked no model."""
        return self._exchange.outcome not in (Outcome.REFUSED, Outcome.DENIED)

    # -- the client leaves -----------------------------------------------------------------------

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
        elif self._holding:
            return  # the answer is whole: `_catch_up` will end the call
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

    # -- something else happens ------------------------------------------------------------------

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

    def failed(self) -> None:
        """A fault of ours: the call still ends once, and what was sent of its answer is cut, not added to."""
        if not self._over:
            self._answer_own(own_answers.OWN_FAULT, Outcome.UPSTREAM_BROKE)

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
        read = self.answer
        answer = self.answer = Answer(
            self._hop.headers, _nothing_more, head_only=False, http10=self._http10, upgrade=False
        )
        if read is not None:
            answer.tap = read.tap  # it broke before any of it was passed on, and may still have said what it used
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
        if task is not None and task is not asyncio.current_task(self._hop.loop):
            task.cancel()
        connection, self.connection = self.connection, None
        if connection is not None:
            connection.discard()

    def _end(self) -> None:
        """The call is over for both sides."""
        if self._over:
            return
        self._over = True
        self.deadline = NEVER
        hop = self._hop
        hop.calls.discard(self)
        if self._tunnel is not None:
            self._tunnel.closed = True
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


def _nothing_more(answer: Answer) -> bytes:
    """An answer of ours is written whole; there is no head to be announced."""
    return b""
