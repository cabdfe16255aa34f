"""What reads along with one call: the tap of its request, that of its response, and what the record learns from them.

Here stands the guard between the traffic and what reads along: a reader never raises; were one to, it is logged, and
the call goes on without what it would have said. Only the pieces of the bodies are not shown by this file: those of the
request are by `RequestBody`, those of the response by `UpstreamResponse`, each with the same guard on its way.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

from sidecar.model.exchange import Exchange, Outcome, Subscriber, Usage, unread_usage
from sidecar.proxy.context import AttributeByBody
from sidecar.proxy.request_body import RequestBody
from sidecar.proxy.response_parser import UpstreamResponse
from sidecar.usage import UNREAD_REQUEST, UNREAD_RESPONSE, RawHeaders, RequestTap, ResponseTap, SocketTap, Taps

log = logging.getLogger(__name__)

T = TypeVar("T")


class CallTaps:
    """Of one call; the response's tap is `UpstreamResponse.tap`. `request`: None: nobody reads along with the request,
    and so nobody does with the response."""

    __slots__ = ("_asked", "_by_body", "_taps", "request")

    def __init__(self, taps: Taps, by_body: AttributeByBody | None) -> None:
        """`taps`: of the upstream that gets the call. `by_body`: as in `Hop.attribute_by_body`."""
        self._taps = taps
        self._by_body = by_body
        self._asked = False  # usage was asked for on the client's behalf
        self.request: RequestTap | None = None

    # -- of the request --------------------------------------------------------------------------

    def open(self, method: str, target: str, fields: RawHeaders) -> None:
        """Read along from here on. `target`: as the upstream gets it."""
        otherwise: RequestTap | None = UNREAD_REQUEST
        self.request = guarded(otherwise, self._taps.request, method, target, fields)

    def feed(self, piece: bytes) -> None:
        """A piece of the request's body that no `RequestBody` has shown."""
        if self.request is not None:
            guarded(None, self.request.feed, piece)

    @property
    def may_ask(self) -> bool:
        """Whether usage might be asked for on the client's behalf, in the request's body."""
        return self.request is not None and guarded(False, getattr, self.request, "may_ask")

    def with_usage_asked(self, whole: bytes) -> bytes | None:
        """The body with usage asked for, and the response then without what the client did not ask for. None: it goes
        as it is."""
        changed = None if self.request is None else guarded(None, self.request.with_usage_asked, whole)
        self._asked = changed is not None
        return changed

    def payer(self, known: Subscriber | None) -> Subscriber | None:
        """Who pays, as far as what came of the body says it; `known`: whom the head named."""
        if self._by_body is None or self.request is None:
            return known
        return guarded(known, self._by_body, known, self.request.member)

    # -- of the response -------------------------------------------------------------------------

    def choose(self, response: UpstreamResponse) -> None:
        """Its final head is read, which says who reads the body."""
        if self.request is not None:
            otherwise: ResponseTap | None = UNREAD_RESPONSE
            response.tap = guarded(otherwise, self._taps.response, self.request, response.status, response.fields)
        if self._asked:
            response.filter = guarded(None, self._taps.answer_filter, response.status, response.fields)

    def socket(self, target: str, response: UpstreamResponse) -> SocketTap | None:
        """What reads along behind a 101."""
        return guarded(None, self._taps.websocket, target, response.fields)

    # -- for the record --------------------------------------------------------------------------

    def finish(
        self, exchange: Exchange, response: UpstreamResponse | None, body: RequestBody | None, *, whole: bool, own: bool
    ) -> None:
        """Put into the record of a call that ends, and whose outcome is known, what the readers say: the usage, and
        what only the request's body says: who pays, and which model gave no response. `whole`: the response is, or has
        its end mark. `own`: the client gets a response of ours."""
        if response is not None and response.tap is not None:
            exchange.usage = _usage_of(response.tap, whole)
        tap = self.request
        if tap is None:
            return
        if body is not None and not body.size_bytes:
            guarded(None, body.look)
            exchange.request_bytes += body.size_bytes
        exchange.subscriber = self.payer(exchange.subscriber)
        if exchange.usage is not None or exchange.outcome in (Outcome.REFUSED, Outcome.DENIED):
            return  # what we turned away ourselves asked no model
        if own or response is None or not response.started:
            exchange.usage = guarded(None, tap.unanswered)


def _usage_of(tap: ResponseTap, whole: bool) -> Usage | None:
    try:
        return tap.finish(whole)
    except Exception:
        log.exception("what reads along with a call failed; its usage is not known")
        return unread_usage()


def is_behind(response: UpstreamResponse | None) -> bool:
    """Whether the reader holds coded bytes that it has not looked into yet."""
    return response is not None and response.tap is not None and guarded(False, getattr, response.tap, "behind")


def is_waiting(response: UpstreamResponse | None) -> bool:
    """Whether what is still to come of the response could say something of usage."""
    if response is None or not response.started:
        return True
    return response.tap is not None and guarded(False, getattr, response.tap, "waiting")


def guarded(otherwise: T, question: Callable[..., T], *args: object) -> T:
    """What the reader says; `otherwise` where it raises. The guard on the way of every chunk is in the response's
    parser."""
    try:
        return question(*args)
    except Exception:
        log.exception("what reads along with a call failed; the call goes on without what it knew")
        return otherwise
