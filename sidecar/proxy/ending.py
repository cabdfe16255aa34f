"""How calls end: one way out, whatever happened.

`Call` moves the bytes and says what happened; here is decided what that means for the client, the upstream and the
record, which `recording` makes.
"""

from __future__ import annotations

from sidecar.model.exchange import Outcome
from sidecar.proxy import local_responses
from sidecar.proxy.context import NEVER
from sidecar.proxy.drains import REASONS
from sidecar.proxy.local_responses import OwnAnswer
from sidecar.proxy.recording import Recording
from sidecar.proxy.response_parser import Answer


class Ending(Recording):
    """The part of a call that knows how to end it."""

    __slots__ = ()

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
            self._hop.metrics.drains_changed(1)
            self.deadline = self._hop.loop.time() + self._hop.rules.disconnect_drain_s
            if self.connection is not None:
                self.connection.pause(False)
        else:
            self._give_up(Outcome.CLIENT_LEFT, self._not_drained)

    def _may_drain(self) -> bool:
        """Whether the upstream is read on for the sake of the usage in what is still to come. Takes a slot for it."""
        hop = self._hop
        if not self.upload_done or self.connection is None or self._request_tap is None:
            return False
        if hop.rules.disconnect_policy(self._exchange.route) == "stop" or not self._worth_draining():
            return False
        owners = hop.drains.owners(self._payer(), self._exchange.client_ip)
        limit = hop.drains.take(owners)
        if limit is not None:
            self._not_drained = REASONS[limit]
            hop.not_drained(limit)
            return False
        self._drain_owners = owners
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
            self._answer_own(local_responses.TOO_SLOW, Outcome.REFUSED)
        elif answer is None or not answer.started:
            hop.metrics.limit_reached("response_timeout")
            self._answer_own(local_responses.RESPONSE_TIMEOUT, Outcome.UPSTREAM_TIMEOUT)
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
            self._answer_own(local_responses.OWN_FAULT, Outcome.UPSTREAM_BROKE)

    def _upstream_broke(self, error: str, reason: str) -> None:
        if self._draining:
            self._give_up(Outcome.CLIENT_LEFT, error)
        elif self._head_sent:
            self._cut(Outcome.UPSTREAM_BROKE, error)
        else:
            self._hop.upstream_failed(reason, error)
            self._answer_own(local_responses.BROKEN, Outcome.UPSTREAM_BROKE, f"{error} ({reason})")

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
        exchange.response_headers = list(local_responses.FIELD_NAMES)
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


def _nothing_more(answer: Answer) -> bytes:
    """An answer of ours is written whole; there is no head to be announced."""
    return b""
