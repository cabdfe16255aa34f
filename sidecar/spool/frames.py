"""What a serving process tells of its calls, as bytes: a *frame* of everything that one turn of its loop, or ten
milliseconds, brought.

A frame is `marshal` of plain tuples: it is written and read by two processes of one program on one machine, and costs
a third of JSON. `VERSION` is said once, when two processes meet; others than ours are never read. Frames of one source
are numbered from 1 and counted once, however often they are sent.

    (number, admitted, lost, opens, ended, closes, counts, requests, responses)

Before it stands a *head* of fixed fields, which can be read whatever the rest is: the number, and how many calls it
tells of (`Head`). Where the rest cannot be read, that is what is known of it.


- `admitted`: calls that were let in and that no earlier frame told of. A crash takes those without a trace.
- `lost`: `{reason: calls}` that were given up since the last frame, or None.
- `opens`: calls that have been open for long, so that a crash leaves a record of them: `(EXCHANGE, …)`, or `(PLAIN, …)`
  with what is known before anything comes back.
- `ended`: what ended, each a tuple that begins with its kind: `(EXCHANGE, …)`, or `(PLAIN, …)` of a call that took the
  short way and whose usage is still to be read.
- `closes`: ids of calls in `ended` or `lost` that an earlier `opens` told of.
- `counts`: what only the hop can count, `(name, label, count)` each.
- `requests`, `responses`: the shapes that plain calls of this frame refer to, by number. Each frame has its own, so
  that whoever reads it needs no other; one that is known by its number need not be read again.
"""

from __future__ import annotations

import marshal
import struct
import sys
import zlib
from collections.abc import Iterable, Mapping, Sequence
from operator import attrgetter
from typing import Any, Final, NamedTuple

from sidecar.model.exchange import (
    USAGE_FIELDS,
    Exchange,
    Gate,
    Outcome,
    PlainExchange,
    RequestShape,
    ResponseShape,
    Subscriber,
    Usage,
    UsageState,
)

# Raised with every change of what stands in a frame. The form of `marshal` itself may differ between two Pythons.
VERSION: Final = f"9 {sys.implementation.cache_tag}"
EXCHANGE: Final = 0  # kinds of what ended
PLAIN: Final = 1
GATED: Final = 2  # a plain call, and what the gate said of it: `(GATED, plain, gate)`
MARSHAL_VERSION: Final = 2  # without the table of what stood before: each object costs a look-up there
FRAME_BYTES_MAX: Final = 64 << 20  # of one; a frame of the largest records there can be has a tenth of it
SOURCE_BYTES: Final = 16
UNREADABLE: Final = "unreadable"  # the reason of calls that are lost because what was told of them cannot be read
_HEAD: Final = struct.Struct("!QII")
_CHECK: Final = struct.Struct("!I")  # CRC-32 of the fields before it
HEAD_BYTES: Final = _HEAD.size + _CHECK.size
_DEPTH_MAX: Final = 100  # of a provider's own usage object; real ones are five deep

_usage_values: Final = attrgetter(*USAGE_FIELDS)
_OUTCOMES: Final = {outcome.value: outcome for outcome in Outcome}
_STATES: Final = {state.value: state for state in UsageState}


class FrameError(ValueError):
    """These bytes are no frame of ours."""


class Head(NamedTuple):
    """What can be said of a frame without reading it. `ends`: calls that are over with it, as a record or lost, and of
    which no intent was told before: nothing is left of them without it."""

    number: int
    admitted: int
    ends: int


class Told(NamedTuple):
    """A frame as it was read."""

    number: int
    admitted: int
    lost: Mapping[str, int] | None
    opens: Sequence[tuple[Any, ...]]
    ended: Sequence[tuple[Any, ...]]
    closes: Sequence[str]
    counts: Sequence[tuple[str, str, float]]
    requests: Mapping[int, tuple[Any, ...]]
    responses: Mapping[int, tuple[Any, ...]]

    @property
    def is_for_disk(self) -> bool:
        return bool(self.admitted or self.lost or self.opens or self.ended or self.closes)


def encode_frame(
    number: int,
    *,
    admitted: int = 0,
    lost: Mapping[str, int] | None = None,
    opens: Iterable[Exchange | PlainExchange] = (),
    ended: Iterable[Exchange | PlainExchange] = (),
    closes: Sequence[str] = (),
    counts: Sequence[tuple[str, str, float]] = (),
) -> bytes:
    """The frame. An exchange with something in it that cannot be sent goes with its name in that place: a record with
    a mark in it beats no record."""
    requests: dict[int, tuple[Any, ...]] = {}
    responses: dict[int, tuple[Any, ...]] = {}
    entries = []
    opened = []
    for exchange in opens:
        if isinstance(exchange, PlainExchange) and exchange.gate is None:
            if exchange.shape.number not in requests:
                requests[exchange.shape.number] = _packed_request(exchange.shape)
            opened.append(_packed_open(exchange))
        else:
            opened.append(_packed(_whole(exchange)))
    for exchange in ended:
        if isinstance(exchange, PlainExchange) and exchange.response is not None:
            shape, response = exchange.shape, exchange.response
            if shape.number not in requests:
                requests[shape.number] = _packed_request(shape)
            if response.number not in responses:
                responses[response.number] = (response.status, response.response_headers)
            entry = _packed_plain(exchange, shape.number, response.number)
            entries.append(entry if exchange.gate is None else (GATED, entry, packed_gate(exchange.gate)))
        else:
            entries.append(_packed(_whole(exchange)))
    frame = (
        number,
        admitted,
        None if lost is None else dict(lost),
        opened,
        entries,
        list(closes),
        list(counts),
        requests,
        responses,
    )
    try:
        data = marshal.dumps(frame, MARSHAL_VERSION)
    except ValueError:  # a type of somebody's own, or nested too deeply
        data = marshal.dumps(_plain(frame), MARSHAL_VERSION)
    gone = 0 if lost is None else sum(lost.values())
    head = _HEAD.pack(number, admitted, max(len(entries) + gone - len(closes), 0))
    return head + _CHECK.pack(zlib.crc32(head)) + data


def head_of(data: bytes) -> Head:
    """Raises `FrameError`."""
    if len(data) < HEAD_BYTES or _CHECK.unpack_from(data, _HEAD.size)[0] != zlib.crc32(data[: _HEAD.size]):
        raise FrameError("not a frame: its head cannot be read")
    return Head(*_HEAD.unpack_from(data))


def decode_frame(data: bytes, head: Head | None = None) -> Told:
    """`head`: its own, where it was read before. Raises `FrameError`."""
    head = head or head_of(data)
    try:
        # Of a process of ours: the socket is our user's alone.
        told = Told(*marshal.loads(memoryview(data)[HEAD_BYTES:]))  # noqa: S302
    except (ValueError, TypeError, EOFError) as error:
        raise FrameError(f"not a frame: {type(error).__name__}") from None
    if (
        (told.number, told.admitted) != head[:2]
        or not (told.lost is None or type(told.lost) is dict)
        or {type(told.opens), type(told.ended), type(told.closes), type(told.counts)} != {list}
        or {type(told.requests), type(told.responses)} != {dict}
        or not all(type(one) is tuple and len(one) == 3 for one in told.counts)
        or not all(type(id_) is str for id_ in told.closes)
        or not all(type(count) is int for count in (told.lost or {}).values())
    ):
        raise FrameError("not a frame: other fields than expected")
    return told


def given_up(head: Head, why: str) -> Told:
    """In the place of a frame that is not read: what it told of is counted, and lost. Calls whose intent was told
    before are none of these: they stay open, and become records when their process ends."""
    lost = {UNREADABLE: head.ends} if head.ends else None
    counts = [("sidecar_frames_given_up", why, 1.0), ("sidecar_lost", UNREADABLE, float(head.ends))]
    return Told(head.number, head.admitted, lost, [], [], [], counts, {}, {})


def _packed(e: Exchange) -> tuple[Any, ...]:
    subscriber, usage = e.subscriber, e.usage
    return (
        EXCHANGE,
        e.id,
        e.method,
        e.url,
        e.route,
        e.request_headers,
        e.client_ip,
        e.user_agent,
        e.trace_id,
        None if subscriber is None else (subscriber.id, subscriber.source),
        e.dimensions if type(e.dimensions) is dict else dict(e.dimensions),
        e.parent_id,
        e.started_ns,
        e.started_mono_ns,
        e.first_byte_ms,
        e.duration_ms,
        e.status,
        e.outcome.value,
        e.response_headers,
        e.request_bytes,
        e.response_bytes,
        # `usage_state` is the first of its fields, and a type of ours.
        None if usage is None else (usage.usage_state.value, *_usage_values(usage)[1:]),
        e.error,
        None if e.gate is None else packed_gate(e.gate),
        e.upstream,
    )


def packed_gate(gate: Gate) -> tuple[Any, ...]:
    g = gate
    return g.decision, g.limit, g.source, g.age_s, dict(g.reserved), g.sent, g.at_most, g.units


def gate_of(packed: Sequence[Any]) -> Gate:
    """Raises `FrameError`."""
    try:
        return Gate(*packed)
    except TypeError as error:
        raise FrameError(f"not a frame: {type(error).__name__}") from None


def _whole(exchange: Exchange | PlainExchange) -> Exchange:
    return exchange.exchange() if isinstance(exchange, PlainExchange) else exchange


def _packed_plain(e: PlainExchange, shape: int, response: int) -> tuple[Any, ...]:
    return (
        PLAIN,
        shape,
        response,
        e.client_ip,
        e.trace_id,
        e.request_bytes,
        e.request_body,
        e.id,
        e.started_ns,
        e.started_mono_ns,
        e.first_byte_ms,
        e.duration_ms,
        e.response_bytes,
        e.response_head,
        e.response_body,
        e.first_token_ns,
        e.url,
    )


def _packed_open(e: PlainExchange) -> tuple[Any, ...]:
    return PLAIN, e.shape.number, e.id, e.started_ns, e.request_bytes, e.client_ip, e.trace_id, e.url


def _packed_request(shape: RequestShape) -> tuple[Any, ...]:
    subscriber = shape.subscriber
    return (
        shape.method,
        shape.target,
        shape.fields,
        shape.read,
        shape.url,
        shape.route,
        shape.request_headers,
        shape.user_agent,
        None if subscriber is None else (subscriber.id, subscriber.source),
        shape.dimensions,
        shape.upstream,
    )


def request_shape_of(number: int, packed: Sequence[Any]) -> RequestShape:
    """Raises `FrameError`."""
    try:
        method, target, fields, read, url, route, request_headers, user_agent, subscriber, dimensions, upstream = packed
        return RequestShape(
            number=number,
            method=method,
            target=target,
            fields=fields,
            read=read,
            url=url,
            route=route,
            request_headers=request_headers,
            user_agent=user_agent,
            subscriber=None if subscriber is None else Subscriber(*subscriber),
            dimensions=dimensions,
            upstream=upstream,
        )
    except (TypeError, ValueError) as error:
        raise FrameError(f"not a frame: {type(error).__name__}") from None


def response_shape_of(number: int, packed: Sequence[Any]) -> ResponseShape:
    """Raises `FrameError`."""
    try:
        status, response_headers = packed
    except (TypeError, ValueError) as error:
        raise FrameError(f"not a frame: {type(error).__name__}") from None
    return ResponseShape(number=number, status=status, response_headers=response_headers)


def plain_of(packed: Sequence[Any], shape: RequestShape, response: ResponseShape) -> PlainExchange:
    """The plain call that an entry of `ended` holds, of these two shapes."""
    try:
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
            started_mono_ns,
            first_byte_ms,
            duration_ms,
            response_bytes,
            response_head,
            response_body,
            first_token_ns,
            url,
        ) = packed
    except ValueError as error:
        raise FrameError(f"not a frame: {type(error).__name__}") from None
    return PlainExchange(
        shape,
        client_ip,
        trace_id,
        request_bytes,
        request_body,
        id_,
        started_ns,
        started_mono_ns,
        first_byte_ms,
        duration_ms,
        response,
        response_bytes,
        response_head,
        response_body,
        None,
        first_token_ns,
        url,
    )


def open_of(packed: Sequence[Any], shape: RequestShape) -> PlainExchange:
    """The plain call that an entry of `opens` holds, of this shape. Raises `FrameError`."""
    try:
        _, _, id_, started_ns, request_bytes, client_ip, trace_id, url = packed
    except ValueError as error:
        raise FrameError(f"not a frame: {type(error).__name__}") from None
    return PlainExchange(shape, client_ip, trace_id, request_bytes, b"", id_, started_ns, url=url)


def exchange_of(packed: Sequence[Any]) -> Exchange:
    """The exchange that an entry of `opens` or `ended` holds. Raises `FrameError` for a kind that is not known."""
    try:
        (
            kind,
            id_,
            method,
            url,
            route,
            request_headers,
            client_ip,
            user_agent,
            trace_id,
            subscriber,
            dimensions,
            parent_id,
            started_ns,
            started_mono_ns,
            first_byte_ms,
            duration_ms,
            status,
            outcome,
            response_headers,
            request_bytes,
            response_bytes,
            usage,
            error,
            gate,
            upstream,
        ) = packed
        if kind != EXCHANGE:
            raise FrameError(f"not a frame: an entry of kind {kind}")
        return Exchange(
            id=id_,
            method=method,
            url=url,
            route=route,
            request_headers=request_headers,
            client_ip=client_ip,
            user_agent=user_agent,
            trace_id=trace_id,
            subscriber=None if subscriber is None else Subscriber(*subscriber),
            dimensions=dimensions,
            parent_id=parent_id,
            started_ns=started_ns,
            started_mono_ns=started_mono_ns,
            first_byte_ms=first_byte_ms,
            duration_ms=duration_ms,
            status=status,
            outcome=_OUTCOMES[outcome],
            response_headers=response_headers,
            request_bytes=request_bytes,
            response_bytes=response_bytes,
            usage=None if usage is None else _usage_of(usage),
            error=error,
            gate=None if gate is None else gate_of(gate),
            upstream=upstream,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise FrameError(f"not a frame: {type(error).__name__}") from None


def _usage_of(values: Sequence[Any]) -> Usage:
    named = dict(zip(USAGE_FIELDS, values, strict=True))
    named["usage_state"] = _STATES[named["usage_state"]]
    return Usage(**named)


def _plain(value: Any, depth: int = 0) -> Any:
    """The same of plain types alone; what is something else leaves the name of its type."""
    if value is None or type(value) in (str, int, float, bool, bytes):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int | float):
        return float(value) if isinstance(value, float) else int(value)
    if depth < _DEPTH_MAX and isinstance(value, Mapping):
        return {_plain(key, depth + 1): _plain(item, depth + 1) for key, item in value.items()}
    if depth < _DEPTH_MAX and isinstance(value, tuple):
        return tuple(_plain(item, depth + 1) for item in value)
    if depth < _DEPTH_MAX and isinstance(value, list):
        return [_plain(item, depth + 1) for item in value]
    return f"<{type(value).__name__}>"
