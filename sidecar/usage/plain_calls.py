"""Plain calls become exchanges: what took the short way is read here, whole, some time after it went by."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from sidecar.model.exchange import (
    Exchange,
    PlainExchange,
    RequestShape,
    ResponseShape,
    Subscriber,
    Usage,
    cut_usage,
)
from sidecar.usage import RawHeaders, Taps
from sidecar.usage.readers import UsageTaps
from sidecar.usage.response_headers import VALUE_MAX_BYTES
from sidecar.usage.whole import Plan, prepare

log = logging.getLogger(__name__)

PLANS_MAX: Final = 4_096  # remembered: pairs of shapes; as many shapes as there are tenants, models and routes in use

AttributeByBody = Callable[[Subscriber | None, Callable[[str], str | None]], Subscriber | None]


@dataclass(frozen=True, slots=True)
class _Reading:
    """How calls of one pair of shapes are read. `own`: (line of the head, lower-case name) of each field whose value is
    another one for each call."""

    plan: Plan | None
    own: tuple[tuple[int, str], ...] = ()


class PlainReader:
    """Reads the finished plain calls of one process that serves: the numbers of its shapes mean nothing elsewhere."""

    def __init__(self, taps: Taps, by_body: AttributeByBody | None, limit_reached: Callable[[str], None]) -> None:
        """`by_body`: who pays by a member of the request's body; None: no member could say it. `limit_reached`: told of
        a text that was cut."""
        self._taps = taps
        self._by_body = by_body
        self._limit_reached = limit_reached
        self._readings: dict[tuple[int, int], _Reading] = {}

    def exchange(self, plain: PlainExchange) -> Exchange:
        """The exchange that the careful way would have made of it. Never raises for what a body holds."""
        exchange = plain.exchange()
        if plain.shape.read and plain.response is not None:
            try:
                if self._by_body is not None or type(self._taps) is not UsageTaps:
                    exchange.usage = self._by_taps(plain, plain.response, exchange)
                else:
                    exchange.usage = self._by_plan(plain, plain.response, self._taps)
                if exchange.usage is not None:
                    cut_usage(exchange.usage, self._limit_reached)
            except Exception:
                log.exception("a usage reader failed; the call goes on without what it knew")
        return exchange

    def _by_plan(self, plain: PlainExchange, response: ResponseShape, taps: UsageTaps) -> Usage | None:
        key = plain.shape.number, response.number
        reading = self._readings.get(key)
        if reading is None:
            if len(self._readings) >= PLANS_MAX:
                self._readings.clear()
            reading = self._readings[key] = _reading(taps, plain.shape, response, plain.response_head)
        plan = reading.plan
        if plan is None:
            return None
        fields: dict[str, str] | None = None
        if reading.own:
            lines = plain.response_head.split(b"\r\n")
            fields = {}
            for at, name in reading.own:
                value = lines[at].partition(b": ")[2][:VALUE_MAX_BYTES].decode("latin-1")
                fields[name] = f"{fields[name]}, {value}" if name in fields else value
        return plan.read(plain.request_body, plain.response_body, fields=fields)

    def _by_taps(self, plain: PlainExchange, response: ResponseShape, exchange: Exchange) -> Usage | None:
        shape = plain.shape
        asked = self._taps.request(shape.method, shape.target, shape.fields)
        if asked is None:
            return None
        if plain.request_body:
            asked.feed(plain.request_body)
        usage = None
        tap = self._taps.response(asked, response.status, fields_of(plain.response_head))
        if tap is not None:
            if plain.response_body:
                tap.feed(plain.response_body)
            usage = tap.finish(True)
        if self._by_body is not None:
            exchange.subscriber = self._by_body(exchange.subscriber, asked.member)
        return usage


def _reading(taps: UsageTaps, shape: RequestShape, response: ResponseShape, head: bytes) -> _Reading:
    fields = fields_of(head)
    plan = prepare(taps, shape.method, shape.target, shape.fields, response.status, fields)
    if plan is None:
        return _Reading(None)
    names = [name.decode("latin-1").lower() for name, _ in fields]
    return _Reading(plan, tuple((at, name) for at, name in enumerate(names, 1) if name in plan.per_call))


def fields_of(head: bytes) -> RawHeaders:
    """The fields of a plain head."""
    lines = head.split(b"\r\n")
    return [(name, value) for name, _, value in (line.partition(b": ") for line in lines[1:])]
