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

from sidecar.model.call_group import HOUR_S, NO_PRICE, CallKind, Gathering
from sidecar.model.exchange import (
    Exchange,
    PlainExchange,
    RequestShape,
    ResponseShape,
    Subscriber,
    Usage,
    cut,
    cut_usage,
    unread_usage,
)
from sidecar.model.record import LineTemplate
from sidecar.usage import RawHeaders, Taps
from sidecar.usage.readers import UsageTaps
from sidecar.usage.response_headers import ID_MAX_CHARS, VALUE_MAX_BYTES, id_name, request_id
from sidecar.usage.whole import Plan, Row, Usual, prepare, said_member

log = logging.getLogger(__name__)

PLANS_MAX: Final = 4_096  # remembered: pairs of shapes; as many shapes as there are tenants, models and routes in use

# What calls of one pair of shapes may differ in that is no number.
_models_of: Final = itemgetter("model", "request_model", "provider", "streamed")
_HOUR_NS: Final = HOUR_S * 1_000_000_000

_USD: Final = b'{"currency":"USD"'
_NO_TABLE: Final = b'"reason":"no_table"'  # nobody wants to know
_NO_PRICE: Final = [b'"reason":%b' % orjson.dumps(reason) for reason in NO_PRICE]
_UNKNOWN: Final = (b"null", None)

AttributeByBody = Callable[[Subscriber | None, Callable[[str], str | None]], Subscriber | None]


KINDS_MAX: Final = 256  # of calls, for each pair of shapes: one for each model that is asked for, or that responds


# What a call adds to its line and to the sums of its kind: the kind; its usage as JSON; its cost as JSON and in
# pico-units; the names of its counts and the counts, none where it has no usage; its usage object, where it is asked
# for.
_Told = tuple[CallKind, bytes, tuple[bytes, int | None], tuple[str, ...], tuple[Any, ...], Row | None]


class Pricer(Protocol):
    """What prices calls that have their models in common (`prices.book.Pricer`)."""

    def json(self, row: Mapping[str, Any], started_s: float) -> tuple[bytes, int | None]: ...
    def of_counts(
        self, names: tuple[str, ...], counts: tuple[int, ...], started_s: float
    ) -> tuple[bytes, int | None] | None: ...


# The kind of a call, what prices it, and the form of its usage where it is a usual one.
_Known = tuple[CallKind, Pricer, bytes]
MakePricer = Callable[[Mapping[str, Any]], Pricer]


class _Free:
    def json(self, row: Mapping[str, Any], started_s: float) -> tuple[bytes, int | None]:
        return _UNKNOWN

    def of_counts(
        self, names: tuple[str, ...], counts: tuple[int, ...], started_s: float
    ) -> tuple[bytes, int | None] | None:
        return _UNKNOWN


def _free(row: Mapping[str, Any]) -> Pricer:
    return _Free()


@dataclass(slots=True, eq=False)
class _Reading:
    """How calls of one pair of shapes are read and written. `own`: (line of the head, lower-case name) of each field
    whose value is another one for each call. `id_at`: the line of the one that has the vendor's id; 0 where `own` is to
    be asked."""

    plan: Plan | None
    template: LineTemplate | None
    own: tuple[tuple[int, str], ...] = ()
    id_at: int = 0
    make_pricer: MakePricer | None = None
    kinds: dict[tuple[Any, ...], CallKind] = field(default_factory=dict)  # by `_models_of` their usage
    # By the key of a usual one (`whole.Usual`), by `_models_of` the usage of another.
    known: dict[tuple[Any, ...], _Known] = field(default_factory=dict)
    without: CallKind = field(default_factory=CallKind)  # calls that have no usage


class PlainReader:
    """Reads the finished plain calls of one process that serves: the numbers of its shapes mean nothing elsewhere."""

    def __init__(
        self,
        taps: Taps,
        by_body: AttributeByBody | None,
        limit_reached: Callable[[str], None],
        *,
        instance: str = "",
        pricer: MakePricer | None = _free,
        keep_numbers: bool = False,
        others: Mapping[str, tuple[Taps, MakePricer | None]] | None = None,
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
    def lines(
        self,
        entries: Sequence[Sequence[Any]],
        start: int,
        requests: Mapping[int, RequestShape],
        responses: Mapping[int, ResponseShape],
        *,
        seq: int,
        lines: list[bytes],
    ) -> None:
        """The records' lines of plain calls as `frames` packs them, from `entries[start]` on, which is one: appended to
        `lines`, numbered from `seq` on, and counted in `take_gathered`. Up to the first that is not plain, or in any
        way unusual: that is to be read as an `exchange`. `requests`, `responses`: shapes by their numbers. Raises
        whatever it is that is wrong with one; those before it are appended then."""
        if self._pricer is None:
            return
        readings, keep_numbers = self._readings, self._keep_numbers
        plain = entries[start][0]
        for packed in entries[start:] if start else entries:
            if packed[0] != plain:
                break
            (
                _,
                request,
                answer,
                client_ip,
                trace_id,
                request_bytes,
                request_body,
                id_,
                started_ns,
                _,
                first_byte_ms,
                duration_ms,
                response_bytes,
                response_head,
                response_body,
                _,
                url,
            ) = packed
            try:
                reading = readings.get((request, answer))
                if reading is None:
                    reading = self._prepare((request, answer), requests[request], responses[answer], response_head)
                template, plan = reading.template, reading.plan
                if template is None:
                    break
                usual = None if plan is None else plan.usual(request_body, response_body)
                if usual is None:
                    told = self._unusual(reading, packed)
                else:
                    told = self._usual(reading, usual, response_head, started_ns)
            except Exception:  # a fault of ours takes no call with it: as an exchange it may go without what it knew
                log.exception("a usage reader failed; the call is read by itself")
                break
            if told is None:
                break
            kind, usage, (cost, pico), names, counts, row = told
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
            hour = started_ns // _HOUR_NS * HOUR_S
            gathering = kind.gathering
            if gathering is None or gathering.hour != hour:
                kind.line = kind.line or line
                gathering = kind.gathering = Gathering(kind, hour)
                self._gathered.append(gathering)
            gathering.lines.append(line)
            gathering.sizes.append((request_bytes, response_bytes))
            gathering.times.append((duration_ms, first_byte_ms))
            if keep_numbers:
                gathering.numbers.append((request_bytes, response_bytes, row))
            if names:
                gathering.counts[names].append(counts)
                if pico is not None and cost.startswith(_USD):
                    gathering.picos.append(pico)
                elif pico is None and cost != b"null" and _NO_TABLE not in cost:
                    gathering.unpriced += 1
                    gathering.without_price += any(reason in cost for reason in _NO_PRICE)
            lines.append(line)
            seq += 1

    def _usual(self, reading: _Reading, usual: Usual, head: bytes, started_ns: int) -> _Told | None:
        plan = reading.plan
        assert plan is not None
        said_id = _own_id(reading, head) if reading.own else plan.request_id
        key, response_id, counts, raw = usual
        kind, pricer, form = reading.known.get(key) or _learn(reading, key, plan.usual_row(usual, None), usual)
        usage = form % (orjson.dumps(response_id), said_member(said_id), *counts, orjson.dumps(raw))
        price = pricer.of_counts(key[-1], counts, started_ns / 1e9)
        row = plan.usual_row(usual, said_id) if price is None or self._keep_numbers else None
        if price is None:
            price = pricer.json(row or {}, started_ns / 1e9)
        return kind, usage, price, key[-1], counts, row

    def _unusual(self, reading: _Reading, packed: Sequence[Any]) -> _Told | None:
        """None: it is to be read as an `exchange`."""
        nothing: _Told = (reading.without, b"null", _UNKNOWN, (), (), None)
        plan = reading.plan
        if plan is None:
            return nothing
        *_, request_body, _, started_ns, opened_ns, _, _, _, head, body, first_token_ns, _ = packed
        said_id = _own_id(reading, head) if reading.own else plan.request_id
        found = plan.row(request_body, body, said_id, opened_ns, first_token_ns)
        if found is None:
            return nothing if plan.nothing_in(body) else None
        row, names, counts = found
        key = _models_of(row)
        kind, pricer, _ = reading.known.get(key) or _learn(reading, key, row)
        return kind, orjson.dumps(row), pricer.json(row, started_ns / 1e9), names, counts, row

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
                exchange.usage = unread_usage()
        return exchange

    def _prepare(self, key: tuple[int, int], shape: RequestShape, response: ResponseShape, head: bytes) -> _Reading:
        if len(self._readings) >= PLANS_MAX:
            self._readings.clear()
        taps, make_pricer = self._others.get(shape.upstream or "") or (self._taps, self._pricer)
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
        found = self._readings[key] = _Reading(plan, template, own, _id_at(own), make_pricer)
        return found

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
        taps, _ = self._others.get(shape.upstream or "") or (self._taps, None)
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


def _learn(reading: _Reading, key: tuple[Any, ...], row: Row, usual: Usual | None = None) -> _Known:
    """What calls with this key have in common, `row` being the usage object of one of them."""
    assert reading.make_pricer is not None  # all have one, or there are no lines
    if len(reading.known) >= KINDS_MAX:
        reading.known.clear()
        reading.kinds.clear()
    kind = reading.kinds.setdefault(_models_of(row), CallKind())
    form = b"" if reading.plan is None or usual is None else reading.plan.usual_form(usual)
    found = reading.known[key] = kind, reading.make_pricer(row), form
    return found


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
