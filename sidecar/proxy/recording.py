"""How a call becomes a record, once, and how the end of its answer waits for that.

`_record` hands the exchange over and does nothing the second time. What ends an answer for the client waits in
`answer.out` until the record is on disk (`_complete`, `_release`), and nothing written after it overtakes it. When a
call ends, and how, is decided in `ending`.
"""

from __future__ import annotations

import asyncio
import logging
from asyncio import Task
from collections.abc import Callable
from operator import attrgetter
from time import monotonic_ns
from typing import TYPE_CHECKING, Final

from sidecar.model.exchange import USAGE_CHARS_MAX, USAGE_TEXTS, Exchange, Outcome, Subscriber, Usage, UsageState, cut
from sidecar.proxy.aiohttp_compat import RawRequestMessage
from sidecar.proxy.context import NEVER, Hop
from sidecar.proxy.response_parser import Answer
from sidecar.proxy.tunnel import Tunnel
from sidecar.proxy.upstream import UpstreamConnection
from sidecar.usage import RequestTap

if TYPE_CHECKING:
    from sidecar.proxy.client_connection import Client

log = logging.getLogger(__name__)

_texts: Final = attrgetter(*USAGE_TEXTS)


class Recording:
    """What a call is made of, and its record."""

    __slots__ = (
        "_drain_owners", "_draining", "_exchange", "_full", "_head_sent", "_holding", "_hop", "_http10", "_keep_alive",
        "_message", "_not_drained", "_over", "_recorded", "_request_tap", "_send_full", "_task", "_tunnel", "answer",
        "client", "connection", "deadline", "upload_done",
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
        self._drain_owners: tuple[tuple[str, int], ...] = ()  # on whose account
        self._not_drained: str | None = None  # why it was not read on, though it should have been
        self._task: Task[None] | None = None
        self._tunnel: Tunnel | None = None
        self.client: Client | None = client
        self.connection: UpstreamConnection | None = None
        self.answer: Answer | None = None
        self.upload_done = upload_done
        self.deadline = NEVER

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
        if exchange.usage is not None:
            self._look_over(exchange.usage)
        return self._hop.recorder.complete(exchange, release)

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

    def _payer(self) -> Subscriber | None:
        """Who pays, as far as that is known now that the request has come."""
        tap, by_body, known = self._request_tap, self._hop.attribute_by_body, self._exchange.subscriber
        if tap is None or by_body is None:
            return known
        try:
            return by_body(known, tap.member)
        except Exception:
            log.exception("the request tap failed; who pays is not known yet")
            return known

    def _look_over(self, usage: Usage) -> None:
        """Cut what is too long for a record, and say why nothing is known where the rest was not read."""
        cut_usage(usage, self._hop.metrics.limit_reached)
        if self._not_drained is not None and usage.usage_state in (UsageState.ABSENT, UsageState.PARTIAL):
            usage.reason = self._not_drained

    def _see_upload(self) -> None:
        """Let the tap see what has come of a body that went nowhere."""

    def _was_sent_on(self) -> bool:
        """Whether the call was the upstream's to answer: what we turned away ourselves asked no model."""
        return self._exchange.outcome not in (Outcome.REFUSED, Outcome.DENIED)

    # -- letting go ------------------------------------------------------------------------------

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
            self._tunnel.close()
        # The two hold each other: taken apart here, a call is freed at once and the collector finds nothing.
        self.answer = None
        if self._draining:
            hop.drains.give_back(self._drain_owners)
            hop.metrics.drains_changed(-1)
        client, self.client = self.client, None
        if client is not None:
            client.call_over(self._keep_alive, self.upload_done)
        if hop.idle is not None and not hop.calls:
            hop.idle()


def cut_usage(usage: Usage, limit_reached: Callable[[str], None]) -> None:
    """Most texts are cut where they are read; a model in the path, and what a new reader forgets, is cut here."""
    texts = _texts(usage)
    if sum(map(len, filter(None, texts))) < USAGE_CHARS_MAX:  # nearly always: the six together have some 200
        return
    for name, text in zip(USAGE_TEXTS, texts, strict=True):
        if text is not None and len(text) >= USAGE_CHARS_MAX:
            limit_reached("usage_chars")
            setattr(usage, name, cut(text, USAGE_CHARS_MAX))
