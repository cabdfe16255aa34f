"""A record and its JSON: the one form that is stored, delivered and printed.

`encode` turns a finished exchange into the line that the spool keeps; `Record.from_json` reads
such a line back for delivery. The line is made once: `webhook`, `file` and `records` pass it on
byte for byte, and a backend's own form is derived from it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import compress
from operator import attrgetter, is_not
from typing import Any, Final

import orjson

from sidecar.model.exchange import (
    USAGE_FIELDS,
    Exchange,
    Gate,
    Money,
    Outcome,
    RequestShape,
    ResponseShape,
    Subscriber,
    Usage,
    UsageState,
)

RECORD_VERSION: Final = 1
"""Of the record's form (docs/record.md). A field may be added under the same number; one that is taken away, renamed or
means something else is another number."""

_usage_values: Final = attrgetter(*USAGE_FIELDS)  # one call for all fields: half the cost of a loop
# Always present, as null where nothing was reported, so that readers can rely on the keys.
USAGE_CORE: Final = frozenset(
    {"usage_state", "provider", "operation", "streamed", "model", "request_model", "response_id",
     "input_tokens", "output_tokens", "total_tokens"}
)  # fmt: skip
_OUTCOMES: Final = {outcome.value: outcome for outcome in Outcome}  # a tenth of what calling the enumeration costs
_STATES: Final = {state.value: state for state in UsageState}
_NO_VALUE: Final = object()
# What each field holds where it is left out; a core field never holds it.
_LEFT_OUT: Final = tuple(_NO_VALUE if name in USAGE_CORE else None for name in USAGE_FIELDS)

_INT_MAX: Final = 2**63 - 1  # orjson's own bound on what it writes
WHOLE: Final = re.compile(r"-?[0-9]{1,60}")  # one beyond it, as text
_DEPTH_MAX: Final = 100  # orjson stops at 254; a provider's usage object is five deep


@dataclass(slots=True, kw_only=True)
class Record:
    """One call for good: exchange, usage, subscriber, dimensions. One per call, and nobody changes it.

    Not frozen, because a frozen one takes 2 µs more to make, and delivery makes one for each backend.
    """

    id: str
    seq: int
    instance: str
    parent_id: str | None
    started_at: datetime  # UTC
    started_s: float  # the same, Unix seconds
    first_byte_ms: float | None
    duration_ms: float | None
    method: str
    url: str
    route: str | None
    status: int | None
    outcome: Outcome
    request_headers: tuple[str, ...]
    response_headers: tuple[str, ...]
    request_bytes: int
    response_bytes: int
    client_ip: str | None
    user_agent: str | None
    trace_id: str | None
    subscriber: Subscriber | None
    dimensions: dict[str, str]
    usage: Usage | None
    error: str | None
    gate: Gate | None = None
    json: bytes  # the stored line, without its line end
    cost: Money | None = None
    charge: Money | None = None
    upstream: str | None = None  # None: there is one only

    @classmethod
    def from_json(cls, line: bytes) -> Record:
        """Read a stored line. Raises `ValueError` when it is no record; unknown keys are left alone."""
        try:
            return _read(orjson.loads(line), line)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"not a record: {type(error).__name__}: {error}") from None


def encode(exchange: Exchange, *, seq: int, instance: str) -> bytes:
    """The record's line: compact JSON, no line end. Times in UTC with microseconds."""
    return encode_exactly(exchange, seq=seq, instance=instance)[0]


def encode_exactly(exchange: Exchange, *, seq: int, instance: str) -> tuple[bytes, bool]:
    """The line, and whether it says exactly what the exchange does, so that `record_of` may be used in the place of
    reading it."""
    row = _row(exchange, seq, instance)
    try:
        return orjson.dumps(row, option=orjson.OPT_UTC_Z), True
    except TypeError:  # orjson.JSONEncodeError is one; a record with a mark in it beats no record
        return orjson.dumps(_storable(row), option=orjson.OPT_UTC_Z), False


def record_of(exchange: Exchange, *, seq: int, instance: str, line: bytes) -> Record:
    """What `Record.from_json` makes of this line, without reading it: the exchange is still at hand."""
    started_at = _started_at(exchange.started_ns)
    return Record(
        id=exchange.id,
        seq=seq,
        instance=instance,
        parent_id=exchange.parent_id,
        started_at=started_at,
        started_s=started_at.timestamp(),
        first_byte_ms=exchange.first_byte_ms,
        duration_ms=exchange.duration_ms,
        method=exchange.method,
        url=exchange.url,
        route=exchange.route,
        status=exchange.status,
        outcome=exchange.outcome,
        request_headers=tuple(exchange.request_headers),
        response_headers=tuple(exchange.response_headers),
        request_bytes=exchange.request_bytes,
        response_bytes=exchange.response_bytes,
        client_ip=exchange.client_ip,
        user_agent=exchange.user_agent,
        trace_id=exchange.trace_id,
        subscriber=exchange.subscriber,
        dimensions=dict(exchange.dimensions),
        usage=exchange.usage,
        error=exchange.error,
        gate=exchange.gate,
        json=line,
        cost=exchange.cost,
        charge=exchange.charge,
        upstream=exchange.upstream,
    )


class LineTemplate:
    """The lines of calls that have both heads in common: what differs is put between what was written once.

    Gives what `encode` gives, byte for byte where the usage object is `usage_to_dict`'s. Without a response they are
    what is known of calls that are open (`open_line`).
    """

    __slots__ = ("_client_ip", "_client_ip_json", "_form", "_second", "_second_text", "_url")

    def __init__(self, request: RequestShape, response: ResponseShape | None, instance: str) -> None:
        """Raises `ValueError` where a text cannot be stored as it is: such calls are written by `encode`."""
        subscriber = request.subscriber
        between = {
            "route": request.route,
            "status": None if response is None else response.status,
            "outcome": Outcome.UNKNOWN if response is None else Outcome.COMPLETE,
            "request_headers": request.request_headers,
            "response_headers": [] if response is None else response.response_headers,
        }
        behind = {
            "subscriber": None if subscriber is None else {"id": subscriber.id, "source": subscriber.source},
            "dimensions": request.dimensions,
        }
        self._form = (
            b'{"id":"%%b","seq":%%d,"instance":%b,"version":%b,"parent_id":null,"started_at":"%%b","first_byte_ms":%%b,'
            b'"duration_ms":%%b,%b,"url":%%b,%b,"request_bytes":%%d,"response_bytes":%%d,"client_ip":%%b,"user_agent":%b,"trace_id":%%b,%b,"usage":%%b'
            b',"cost":%%b,"error":null%b}'
        ) % (
            *map(_literal, (instance, RECORD_VERSION, {"method": request.method}, between, request.user_agent, behind)),
            b"" if request.upstream is None else b"," + _literal({"upstream": request.upstream}),
        )
        self._url = _json(request.url)
        self._client_ip: str | None = None
        self._client_ip_json = b"null"
        self._second, self._second_text = -1, b""

    def open_line(
        self,
        id_: str,
        started_ns: int,
        request_bytes: int,
        client_ip: str | None,
        trace_id: str | None,
        url: str | None,
    ) -> bytes:
        """Of a call of which nothing has come back, and which has no number yet."""
        return self.line(0, id_, started_ns, None, None, request_bytes, 0, client_ip, trace_id, b"null", b"null", url)

    def line(
        self,
        seq: int,
        id_: str,
        started_ns: int,
        first_byte_ms: float | None,
        duration_ms: float | None,
        request_bytes: int,
        response_bytes: int,
        client_ip: str | None,
        trace_id: str | None,
        usage: bytes,
        cost: bytes,
        url: str | None = None,
    ) -> bytes:
        """`usage`, `cost`: JSON. `url`: None: that of the shape. The times are those of `Exchange`."""
        second, micros = divmod(started_ns // 1000, 1_000_000)
        if second != self._second:
            self._second_text = datetime.fromtimestamp(second, UTC).strftime("%Y-%m-%dT%H:%M:%S").encode()
            self._second = second
        if client_ip != self._client_ip:
            self._client_ip_json, self._client_ip = orjson.dumps(client_ip), client_ip
        duration = orjson.dumps(duration_ms)
        return self._form % (
            id_.encode(),
            seq,
            b"%b.%06dZ" % (self._second_text, micros) if micros else self._second_text + b"Z",
            # Written once where it is the same, as it mostly is.
            duration if first_byte_ms == duration_ms else orjson.dumps(first_byte_ms),
            duration,
            self._url if url is None else orjson.dumps(url),
            request_bytes,
            response_bytes,
            self._client_ip_json,
            b"null" if trace_id is None else orjson.dumps(trace_id),
            usage,
            cost,
        )


def _json(value: Any) -> bytes:
    try:
        return orjson.dumps(value)
    except TypeError as error:
        raise ValueError(f"not storable as it is: {error}") from None


def _literal(value: Any) -> bytes:
    """JSON for a place in a form: of an object its members alone."""
    text = _json(value)
    return (text[1:-1] if isinstance(value, dict) else text).replace(b"%", b"%%")


def _started_at(started_ns: int) -> datetime:
    """Cut to microseconds, and never rounded: a fraction of a float would."""
    seconds, micros = divmod(started_ns // 1000, 1_000_000)
    return datetime.fromtimestamp(seconds, UTC).replace(microsecond=micros)


def _row(exchange: Exchange, seq: int, instance: str) -> dict[str, Any]:
    subscriber, usage = exchange.subscriber, exchange.usage
    row: dict[str, Any] = {
        "id": exchange.id,
        "seq": seq,
        "instance": instance,
        "version": RECORD_VERSION,
        "parent_id": exchange.parent_id,
        "started_at": _started_at(exchange.started_ns),
        "first_byte_ms": exchange.first_byte_ms,
        "duration_ms": exchange.duration_ms,
        "method": exchange.method,
        "url": exchange.url,
        "route": exchange.route,
        "status": exchange.status,
        "outcome": exchange.outcome,
        "request_headers": exchange.request_headers,
        "response_headers": exchange.response_headers,
        "request_bytes": exchange.request_bytes,
        "response_bytes": exchange.response_bytes,
        "client_ip": exchange.client_ip,
        "user_agent": exchange.user_agent,
        "trace_id": exchange.trace_id,
        "subscriber": None if subscriber is None else {"id": subscriber.id, "source": subscriber.source},
        "dimensions": exchange.dimensions,
        "usage": None if usage is None else usage_to_dict(usage),
        "cost": exchange.cost,
        **({} if exchange.charge is None else {"charge": exchange.charge}),
        "error": exchange.error,
    }
    if exchange.gate is not None:  # left out, not null: most sidecars have no limits
        row["gate"] = exchange.gate.to_dict()
    if exchange.upstream is not None:  # likewise: most have one upstream
        row["upstream"] = exchange.upstream
    return row


def _storable(value: Any, depth: int = 0) -> Any:
    """The same with what JSON cannot hold made visible: lone surrogates (raw bytes of a header or target that
    were no UTF-8) as `?`, huge integers as text, and whatever else stands there as the name of its type."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if value is None or isinstance(value, (bool, float, datetime)):
        return value
    if isinstance(value, int):
        return value if -_INT_MAX <= value <= _INT_MAX else str(value)
    if depth < _DEPTH_MAX and isinstance(value, Mapping):
        return {str(_storable(str(key))): _storable(item, depth + 1) for key, item in value.items()}
    if depth < _DEPTH_MAX and isinstance(value, (list, tuple)):
        return [_storable(item, depth + 1) for item in value]
    return f"<{type(value).__name__}>"


def usage_to_dict(usage: Usage) -> dict[str, Any]:
    """The record's `usage` object: the core keys always, the others where something was reported."""
    values = _usage_values(usage)
    # No loop of ours over 37 fields: 40 bytecodes instead of 400, which is 3 µs of a running process.
    row = dict(compress(zip(USAGE_FIELDS, values, strict=True), map(is_not, values, _LEFT_OUT)))
    if not usage.units:
        row.pop("units", None)
    if not usage.finish_reasons:
        row.pop("finish_reasons", None)
    if not usage.raw_usage and usage.raw_usage in ([], {}):
        row.pop("raw_usage", None)
    return row


def _read(row: dict[str, Any], line: bytes) -> Record:
    subscriber, usage = row["subscriber"], row["usage"]
    started_at = datetime.fromisoformat(row["started_at"])
    return Record(
        id=row["id"],
        seq=row["seq"],
        instance=row["instance"],
        parent_id=row.get("parent_id"),
        started_at=started_at,
        started_s=started_at.timestamp(),
        first_byte_ms=row.get("first_byte_ms"),
        duration_ms=row.get("duration_ms"),
        method=row["method"],
        url=row["url"],
        route=row.get("route"),
        status=row["status"],
        outcome=_OUTCOMES[row["outcome"]],
        request_headers=tuple(row["request_headers"]),
        response_headers=tuple(row["response_headers"]),
        request_bytes=row["request_bytes"],
        response_bytes=row["response_bytes"],
        client_ip=row.get("client_ip"),
        user_agent=row.get("user_agent"),
        trace_id=row.get("trace_id"),
        subscriber=None if subscriber is None else Subscriber(subscriber["id"], subscriber["source"]),
        dimensions=row.get("dimensions") or {},
        usage=None if usage is None else usage_of(usage),
        error=row.get("error"),
        gate=None if (gate := row.get("gate")) is None else _read_gate(gate),
        json=line,
        cost=row.get("cost"),
        charge=row.get("charge"),
        upstream=row.get("upstream"),
    )


def _read_gate(row: dict[str, Any]) -> Gate:
    source, age_s = row.get("source") or "", row.get("age_s") or 0.0
    reserved, at_most = _read_amounts(row.get("reserved") or {}), row.get("at_most")
    sent, units = row.get("sent", True), row.get("units")
    return Gate(
        row["decision"],
        row.get("limit"),
        source,
        age_s,
        reserved,
        sent,
        _read_amounts(at_most) if at_most else None,
        units if isinstance(units, dict) else None,
    )


def _read_amounts(stored: dict[str, Any]) -> dict[str, int]:
    """Whole numbers, of which some are too large for JSON's. What is none is left out, so that its call is counted by
    what its record says beside it."""
    if all(type(amount) is int for amount in stored.values()):
        return stored
    return {
        key: int(amount)
        for key, amount in stored.items()
        if type(amount) is int or (type(amount) is str and WHOLE.fullmatch(amount))
    }


def usage_of(row: dict[str, Any]) -> Usage:
    """What `usage_to_dict` was made of. Takes `row` over. Raises `KeyError` for a state that is none."""
    row["usage_state"] = _STATES[row["usage_state"]]
    try:
        return Usage(**row)
    except TypeError:  # a key that a later version added
        return Usage(**{name: row[name] for name in USAGE_FIELDS if name in row})
