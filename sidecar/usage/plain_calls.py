"""Plain calls become records: what took the short way is read here, whole, some time after it went by.

Nearly all of them differ from the one before in numbers and ids only. Such a call becomes its line at once, put
together from what its pair of shapes has in common, and is added to the sums of its kind (`model.call_group`): no
object is made for it. Whatever is unusual becomes an `Exchange`, and goes the way of all others.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any, Final, Protocol

import orjson

from sidecar.model.call_group import HOUR_S, CallKind, Gathering
from sidecar.model.exchange import (
    Exchange,
    PlainExchange,
    RequestShape,
    ResponseShape,
    Subscriber,
    Usage,
    cut,
    cut_usage,
)
from sidecar.model.record import LineTemplate
from sidecar.usage import RawHeaders, Taps
from sidecar.usage.readers import UsageTaps
from sidecar.usage.response_headers import ID_MAX_CHARS, VALUE_MAX_BYTES, id_name, request_id
from sidecar.usage.whole import Plan, Row, prepare

log = logging.getLogger(__name__)

PLANS_MAX: Final = 4_096  # remembered: pairs of shapes; as many shapes as there are tenants, models and routes in use

_HOUR_NS: Final = HOUR_S * 1_000_000_000
# What calls of one pair of shapes may differ in that is no number.
_models_of: Final = itemgetter("model", "request_model", "provider", "streamed")
_NO_MODELS: Final = (None, None, None, None)
_NO_ROW: Final[tuple[Row | None, tuple[str, ...], tuple[int, ...]]] = (None, (), ())

_USD: Final = b'{"currency":"USD"'
_NO_TABLE: Final = b'"reason":"no_table"'  # nobody wants to know
_UNKNOWN: Final = (b"null", None)

_Price = Callable[[Mapping[str, Any], float], tuple[bytes, int | None]]
AttributeByBody = Callable[[Subscriber | None, Callable[[str], str | None]], Subscriber | None]


KINDS_MAX: Final = 256  # of calls, for each pair of shapes: one for each model that is asked for, or that responds


@dataclass(slots=True, eq=False)
class _Reading:
    """How calls of one pair of shapes are read and written. `own`: (line of the head, lower-case name) of each field
    whose value is another one for each call. `id_at`: the line of the one that has the vendor's id; 0 where `own` is to
    be asked."""

    plan: Plan | None
    template: LineTemplate | None
    own: tuple[tuple[int, str], ...] = ()
    id_at: int = 0
    kinds: dict[tuple[Any, ...], tuple[CallKind, _Price]] = field(default_factory=dict)  # by `_models_of` their usage


class Pricer(Protocol):
    """What prices calls that have their models in common (`prices.book.Pricer`)."""

    def json(self, row: Mapping[str, Any], started_s: float) -> tuple[bytes, int | None]: ...


class _Free:
    def json(self, row: Mapping[str, Any], started_s: float) -> tuple[bytes, int | None]:
        return _UNKNOWN


def _free(row: Mapping[str, Any]) -> Pricer:
    return _Free()


def _no_cost(row: Mapping[str, Any], started_s: float) -> tuple[bytes, int | None]:
    return _UNKNOWN


class PlainReader:
    """Reads the finished plain calls of one process that serves: the numbers of its shapes mean nothing elsewhere."""

    def __init__(
        self,
        taps: Taps,
        by_body: AttributeByBody | None,
        limit_reached: Callable[[str], None],
        *,
        instance: str = "",
        pricer: Callable[[Mapping[str, Any]], Pricer] | None = _free,
        keep_numbers: bool = False,
        others: Mapping[str, tuple[Taps, Callable[[Mapping[str, Any]], Pricer] | None]] | None = None,
    ) -> None:
        """`by_body`: who pays by a member of the request's body; None: no member could say it. `limit_reached`: told of
        a text that was cut. `instance`: whose records they become. `pricer`: what prices calls with such a usage
        object; None: prices want each call's record, so there are no lines. `keep_numbers`: a meter asks for the
        numbers of each call (`CallGroup.numbers`). `others`: taps and pricer of upstreams by their names, where there
        are several."""
        self._keep_numbers = keep_numbers
        self._pricer = pricer
        self._instance = instance
        self._taps = taps
        self._others = others or {}
        self._by_body = by_body
        self._limit_reached = limit_reached
        self._readings: dict[tuple[int, int], _Reading] = {}
        self._gathered: list[Gathering] = []

    # For most of them: a line each, and sums

    # One way, and long: each step that were a function of its own would cost each call what calling it does.
    def line(self, packed: Sequence[Any], shape: RequestShape, response: ResponseShape, *, seq: int) -> bytes | None:
        """The record's line of a call as `frames` packs it, counted in `take_gathered`; None where it is to be read as
        an `exchange`, for a call that is in any way unusual."""
        (
            _,
            _,
            _,
            client_ip,
            trace_id,
            request_bytes,
            request_body,
            id_,
            started_ns,
            opened_ns,
            first_byte_ms,
            duration_ms,
            response_bytes,
            response_head,
            response_body,
            first_token_ns,
            url,
        ) = packed
        key = shape.number, response.number
        reading = self._readings.get(key)
        if reading is None:
            reading = self._prepare(key, shape, response, response_head)
        template = reading.template
        if template is None or self._pricer is None:
            return None
        plan = reading.plan
        if not shape.read or plan is None:
            (row, names, counts), usage, models = _NO_ROW, b"null", _NO_MODELS
        else:
            said_id = _own_id(reading, response_head) if reading.own else plan.request_id
            found = plan.row(request_body, response_body, said_id, opened_ns, first_token_ns)
            if found is not None:
                row, names, counts = found
                usage, models = orjson.dumps(row), _models_of(row)
            elif plan.nothing_in(response_body):
                (row, names, counts), usage, models = _NO_ROW, b"null", _NO_MODELS
            else:
                return None
        known = reading.kinds.get(models)
        if known is None:
            if len(reading.kinds) >= KINDS_MAX:
                reading.kinds.clear()
            pricer = self._pricer if (other := self._others.get(shape.upstream or "")) is None else other[1]
            assert pricer is not None  # all or none
            known = reading.kinds[models] = (CallKind(), _no_cost if row is None else pricer(row).json)
        kind, price = known
        cost, pico = _UNKNOWN if row is None else price(row, started_ns / 1e9)
        line = template.line(
            seq,
            id_,
            started_ns,
            first_byte_ms,
            duration_ms,
            request_bytes,
            response_bytes,
            client_ip,
            trace_id,
            usage,
            cost,
            url,
        )
        kind.line = kind.line or line
        hour = started_ns // _HOUR_NS * HOUR_S
        gathering = kind.gathering
        if gathering is None or gathering.hour != hour:
            gathering = kind.gathering = Gathering(kind, hour)
            self._gathered.append(gathering)
        gathering.lines.append(line)
        gathering.sizes.append((request_bytes, response_bytes))
        gathering.times.append((duration_ms, first_byte_ms))
        if self._keep_numbers:
            gathering.numbers.append((request_bytes, response_bytes, row))
        if row is not None:
            if pico is None:
                if cost != b"null" and _NO_TABLE not in cost:
                    gathering.unpriced += 1
            elif cost.startswith(_USD):
                gathering.picos.append(pico)
            gathering.counts[names].append(counts)
        return line

    def take_gathered(self) -> Sequence[Gathering]:
        """What was counted since the last time."""
        gathered, self._gathered = self._gathered, []
        for gathering in gathered:
            gathering.kind.gathering = None
        return gathered

    # For the others

    def exchange(self, plain: PlainExchange) -> Exchange:
        """The exchange that the careful way would have made of it. Never raises for what a body holds."""
        exchange = plain.exchange()
        if plain.shape.read and plain.response is not None:
            try:
                if self._by_body is not None or type(self._taps) is not UsageTaps:
                    exchange.usage = self._by_taps(plain, plain.response, exchange)
                else:
                    exchange.usage = self._by_plan(plain, plain.response)
                if exchange.usage is not None:
                    cut_usage(exchange.usage, self._limit_reached)
            except Exception:
                log.exception("a usage reader failed; the call goes on without what it knew")
        return exchange

    def _prepare(self, key: tuple[int, int], shape: RequestShape, response: ResponseShape, head: bytes) -> _Reading:
        if len(self._readings) >= PLANS_MAX:
            self._readings.clear()
        taps = self._taps_of(shape)
        template: LineTemplate | None = None
        if self._by_body is None and type(taps) is UsageTaps:
            with suppress(ValueError):
                template = LineTemplate(shape, response, self._instance)
        plan: Plan | None = None
        own: tuple[tuple[int, str], ...] = ()
        if shape.read and type(taps) is UsageTaps:
            fields = fields_of(head)
            plan = prepare(taps, shape.method, shape.target, shape.fields, response.status, fields)
            if plan is not None:
                names = [name.decode("latin-1").lower() for name, _ in fields]
                own = tuple((at, name) for at, name in enumerate(names, 1) if name in plan.per_call)
        found = self._readings[key] = _Reading(plan, template, own, _id_at(own))
        return found

    def _taps_of(self, shape: RequestShape) -> Taps:
        other = self._others.get(shape.upstream or "")
        return self._taps if other is None else other[0]

    def _by_plan(self, plain: PlainExchange, response: ResponseShape) -> Usage | None:
        key = plain.shape.number, response.number
        head = plain.response_head
        reading = self._readings.get(key) or self._prepare(key, plain.shape, response, head)
        if reading.plan is None:
            return None
        fields = _own(reading, head) if reading.own else None
        return reading.plan.read(
            plain.request_body,
            plain.response_body,
            fields=fields,
            opened_ns=plain.started_mono_ns,
            first_token_ns=plain.first_token_ns,
        )

    def _by_taps(self, plain: PlainExchange, response: ResponseShape, exchange: Exchange) -> Usage | None:
        shape = plain.shape
        taps = self._taps_of(shape)
        asked = taps.request(shape.method, shape.target, shape.fields)
        if asked is None:
            return None
        if plain.request_body:
            asked.feed(plain.request_body)
        usage = None
        tap = taps.response(asked, response.status, fields_of(plain.response_head))
        if tap is not None:
            if plain.response_body:
                tap.feed(plain.response_body)
            usage = tap.finish(True)
        if self._by_body is not None:
            exchange.subscriber = self._by_body(exchange.subscriber, asked.member)
        return usage


def _id_at(own: Sequence[tuple[int, str]]) -> int:
    """The line of the one field that has the vendor's id; 0 where there is none, or more than one of that name."""
    names = [name for _, name in own]
    best = id_name(names)
    return own[names.index(best)][0] if best is not None and names.count(best) == 1 else 0


def _own_id(reading: _Reading, head: bytes) -> str | None:
    """As `request_id(_own(reading, head))`, which costs twice as much."""
    if not reading.id_at:
        return request_id(_own(reading, head))
    value = head.split(b"\r\n")[reading.id_at].partition(b": ")[2]
    return cut(value[:VALUE_MAX_BYTES].decode("latin-1"), ID_MAX_CHARS) or None


def _own(reading: _Reading, head: bytes) -> dict[str, str]:
    """The fields of this response that are another one's in each."""
    lines = head.split(b"\r\n")
    fields: dict[str, str] = {}
    for at, name in reading.own:
        value = lines[at].partition(b": ")[2][:VALUE_MAX_BYTES].decode("latin-1")
        fields[name] = f"{fields[name]}, {value}" if name in fields else value
    return fields


def fields_of(head: bytes) -> RawHeaders:
    """The fields of a plain head."""
    lines = head.split(b"\r\n")
    return [(name, value) for name, _, value in (line.partition(b": ") for line in lines[1:])]
