"""Plain calls become exchanges: what took the short way is read here, whole, some time after it went by."""

from __future__ import annotations

import logging
from collections.abc import Callable

from sidecar.model.exchange import Exchange, PlainExchange, Subscriber, cut_usage
from sidecar.usage import RawHeaders, Taps

log = logging.getLogger(__name__)

AttributeByBody = Callable[[Subscriber | None, Callable[[str], str | None]], Subscriber | None]


class PlainReader:
    """The taps and the attribution of one process, for finished plain calls."""

    def __init__(self, taps: Taps, by_body: AttributeByBody | None, limit_reached: Callable[[str], None]) -> None:
        """`by_body`: who pays by a member of the request's body; None: no member could say it. `limit_reached`: told of
        a text that was cut."""
        self._taps = taps
        self._by_body = by_body
        self._limit_reached = limit_reached

    def exchange(self, plain: PlainExchange) -> Exchange:
        """The exchange that the careful way would have made of it. Never raises for what a body holds."""
        exchange = plain.exchange()
        if plain.shape.read and plain.response is not None:
            try:
                self._read(plain, exchange)
            except Exception:
                log.exception("a usage reader failed; the call goes on without what it knew")
        return exchange

    def _read(self, plain: PlainExchange, exchange: Exchange) -> None:
        shape, response = plain.shape, plain.response
        assert response is not None
        asked = self._taps.request(shape.method, shape.target, shape.fields)
        if asked is None:
            return
        if plain.request_body:
            asked.feed(plain.request_body)
        tap = self._taps.response(asked, response.status, fields_of(plain.response_head))
        if tap is not None:
            if plain.response_body:
                tap.feed(plain.response_body)
            exchange.usage = tap.finish(True)
        if self._by_body is not None:
            exchange.subscriber = self._by_body(exchange.subscriber, asked.member)
        if exchange.usage is not None:
            cut_usage(exchange.usage, self._limit_reached)


def fields_of(head: bytes) -> RawHeaders:
    """The fields of a plain head."""
    lines = head.split(b"\r\n")
    return [(name, value) for name, _, value in (line.partition(b": ") for line in lines[1:])]
