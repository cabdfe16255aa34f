"""The words for one call: what the proxy saw, what the answer says was consumed, and who pays.

Every other part uses these types. They do no I/O, know no clock and never raise for odd
content. An `Exchange` is filled in by the proxy while the call is open and belongs to nobody else;
from `Recorder.complete` on it is never changed again. It is a plain dataclass with slots, not a frozen one, because
one is made for every call and freezing costs seven times as much (0.3 against 2.2 µs measured).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import StrEnum
from operator import attrgetter
from typing import Any, Final, Protocol

Money = Mapping[str, Any]
"""A `cost` or `charge` as docs/prices.md has it: `currency`, `total` and `parts` (decimals as text; null where nothing
is known), `state`, `source`, `model` and perhaps `reason` and `declared`."""

RawHeaders = Sequence[tuple[bytes, bytes]]
"""Header fields as they came: names in the sender's spelling, in order, repeated ones apart."""


class Outcome(StrEnum):
    """How an exchange ended. Every exchange has exactly one."""

    COMPLETE = "complete"  # the client was handed the whole answer (or its end mark)
    CLIENT_LEFT = "client_left"
    UPSTREAM_BROKE = "upstream_broke"  # the answer began and was cut off, or was no HTTP
    UPSTREAM_TIMEOUT = "upstream_timeout"  # no head in time (504), or silence in a body (cut)
    UNREACHABLE = "unreachable"  # refused, DNS, TLS (502) or connect timeout (504)
    DENIED = "denied"  # by the gate
    REFUSED = "refused"  # by us: a bad request
    STOPPED = "stopped"  # cut by us at the end of SIDECAR_STOP_S
    UNKNOWN = "unknown"  # found open after a crash


# What a record keeps of a text that a client or an upstream chooses. A longer one is cut, with CUT at its end.
URL_CHARS_MAX: Final = 2_048  # base, path and query names; signed URLs are longer by their values, which stay out
USER_AGENT_CHARS_MAX: Final = 512  # browsers in applications reach 400
HEADER_NAME_CHARS_MAX: Final = 128  # each
HEADER_NAMES_CHARS_MAX: Final = 4_096  # those of one head together; browsers and gateways send some 500
USAGE_CHARS_MAX: Final = 512  # each model, id or word of an answer; the longest seen (a Bedrock ARN) is about 200
CUT: Final = "…"


def cut(text: str, chars_max: int) -> str:
    """The text at that length at most, and to be seen as cut."""
    return text if len(text) <= chars_max else text[: chars_max - 1] + CUT


class UsageState(StrEnum):
    """How much of the consumption is known."""

    FINAL = "final"  # the provider's own end mark was seen
    PARTIAL = "partial"  # a lower bound: the end was not seen
    ABSENT = "absent"  # a model call whose answer said nothing; never the same as zero
    ESTIMATED = "estimated"  # only where SIDECAR_ESTIMATE is on


@dataclass(slots=True, kw_only=True)
class Usage:
    """What one answer says was consumed. None means "not reported" and is never zero.

    `input_tokens` and `output_tokens` are inclusive totals (cache and reasoning are inside), and
    `total_tokens` is their sum; every other token count is a part of one of the two. The names
    are OpenTelemetry's span attributes with `gen_ai.usage.` removed.
    """

    usage_state: UsageState
    provider: str | None = None  # OpenTelemetry's gen_ai.provider.name where it has one
    operation: str | None = None  # chat, text_completion, embeddings, generate_content, rerank, …
    streamed: bool | None = None
    model: str | None = None
    request_model: str | None = None
    response_id: str | None = None
    upstream_request_id: str | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    total_tokens: int | None = None
    cache_read_input_tokens: int | None = None
    cache_write_input_tokens: int | None = None
    cache_write_5m_input_tokens: int | None = None
    cache_write_1h_input_tokens: int | None = None
    tool_use_input_tokens: int | None = None
    reasoning_output_tokens: int | None = None
    text_input_tokens: int | None = None
    image_input_tokens: int | None = None
    audio_input_tokens: int | None = None
    text_output_tokens: int | None = None
    image_output_tokens: int | None = None
    audio_output_tokens: int | None = None
    accepted_prediction_tokens: int | None = None
    rejected_prediction_tokens: int | None = None
    units: dict[str, int | float | str] = field(default_factory=dict)  # audio_seconds, search_units, …
    cost_usd: str | None = None  # a decimal as text, only when the provider states it
    finish_reasons: list[str] = field(default_factory=list)  # the vendor's own words
    service_tier: str | None = None
    time_to_first_token_ms: float | None = None
    error: str | None = None  # the vendor's error type, also under status 200
    reason: str | None = None  # why usage is absent or partial, in our words
    raw_usage: Any = None  # the vendor's own usage object, verbatim


USAGE_FIELDS: Final = tuple(f.name for f in fields(Usage))
USAGE_TEXTS: Final = ("model", "request_model", "response_id", "upstream_request_id", "service_tier", "error")


_texts: Final = attrgetter(*USAGE_TEXTS)


def cut_usage(usage: Usage, limit_reached: Callable[[str], None]) -> None:
    """Most texts are cut where they are read; a model in the path, and what a new reader forgets, is cut here."""
    texts = _texts(usage)
    if sum(map(len, filter(None, texts))) < USAGE_CHARS_MAX:  # nearly always: the six together have some 200
        return
    for name, text in zip(USAGE_TEXTS, texts, strict=True):
        if text is not None and len(text) >= USAGE_CHARS_MAX:
            limit_reached("usage_chars")
            setattr(usage, name, cut(text, USAGE_CHARS_MAX))


UNREAD: Final = "a fault of the sidecar's kept it from being read"


def unread_usage() -> Usage:
    """Of a call that could not be read for a fault of ours. It says so, and is not none at all: that is a call which
    consumes nothing, and limits charge nothing for it."""
    return Usage(usage_state=UsageState.ABSENT, reason=UNREAD)


@dataclass(slots=True, frozen=True)
class Subscriber:
    """Who pays, and how we learned it (`header:x-tenant`, `jwt:sub`, …)."""

    id: str
    source: str


@dataclass(slots=True)
class Gate:
    """What was decided before the call was sent on.

    `limit`: the one that denied it, or would have. `source`: who said so: `limits`, a vendor's name, or `on_failure`
    where nobody could be asked. `age_s`: how old the answer was. `reserved`: by counter (`limit|scope|period`), what
    was set aside for the call; its end settles that. `sent`: False: nothing of the call went upstream, so that it took
    nothing of anything. `at_most`: of these counters, what it can have taken, where its request ended before its time.
    `units`: by limit, in which the amounts are, but for those that count calls: it may get another one meanwhile.

    Nobody changes one. It is not frozen, because one is made for each call under limits.
    """

    decision: str  # allowed, denied, shadow; undecided: the client left before
    limit: str | None = None
    source: str = "limits"
    age_s: float = 0.0
    reserved: Mapping[str, int] = field(default_factory=dict)
    sent: bool = True
    at_most: Mapping[str, int] | None = None
    units: Mapping[str, str] | None = None

    def to_dict(self) -> dict[str, Any]:
        """As the record has it."""
        found: dict[str, Any] = {
            "decision": self.decision,
            "limit": self.limit,
            "source": self.source,
            "age_s": self.age_s,
        }
        if self.reserved:
            found["reserved"] = self.reserved
            if self.units:
                found["units"] = self.units
        if not self.sent:
            found["sent"] = False
        if self.at_most:
            found["at_most"] = self.at_most
        return found


@dataclass(slots=True, kw_only=True)
class Exchange:
    """One call as the proxy saw it. Sizes are body bytes on the wire, framing excluded."""

    method: str
    url: str  # upstream base (or SIDECAR_PUBLIC_URL) and path; query names without values
    route: str | None = None  # a configured or known pattern, else None
    request_headers: list[str] = field(default_factory=list)  # names only, in order, as spelled
    client_ip: str | None = None
    user_agent: str | None = None
    trace_id: str | None = None  # from traceparent
    subscriber: Subscriber | None = None
    dimensions: Mapping[str, str] = field(default_factory=dict)
    parent_id: str | None = None
    # Set by `Recorder.admit`:
    id: str = ""  # 36 characters, ordered by time
    started_ns: int = 0  # wall clock, Unix nanoseconds
    started_mono_ns: int = 0  # monotonic, for durations
    # Filled in by the proxy as the call goes on:
    first_byte_ms: float | None = None  # admission to the first byte of the upstream's answer
    duration_ms: float | None = None
    status: int | None = None  # what the client was sent; None: it was sent no head
    outcome: Outcome = Outcome.UNKNOWN
    response_headers: list[str] = field(default_factory=list)
    request_bytes: int = 0
    response_bytes: int = 0
    usage: Usage | None = None  # None: the answer is no model call
    cost: Money | None = None  # what it took, where there is something to be priced
    charge: Money | None = None  # what its customer is asked for it, where prices say so
    error: str | None = None  # a fixed text of ours; never bytes from the wire
    gate: Gate | None = None  # None: no limit and no gate had a say
    upstream: str | None = None  # its name, where there are several


@dataclass(slots=True, frozen=True, kw_only=True)
class RequestShape:
    """What requests that differ in lengths and ids only have in common (see `proxy.plain_head`).

    `number`: never used twice in one process. `target`, `fields`: what a reader of usage asks of the request's head.
    `target` and `url` are those of the first of them; calls to the others are read alike, and have a URL of their own.
    `read`: whether anybody reads the bodies of such calls.
    """

    number: int
    method: str
    target: str
    fields: tuple[tuple[bytes, bytes], ...]
    read: bool
    url: str
    route: str | None
    request_headers: list[str]
    user_agent: str | None
    subscriber: Subscriber | None
    dimensions: Mapping[str, str]
    upstream: str | None = None


@dataclass(slots=True, frozen=True, kw_only=True)
class ResponseShape:
    """The same of responses."""

    number: int
    status: int
    response_headers: list[str]


@dataclass(slots=True, eq=False)
class PlainExchange:
    """One call that took the short way: what is its own, beside its two shapes. Its usage is read later, from bytes.

    The recorder takes one in the place of an `Exchange`.
    """

    shape: RequestShape
    client_ip: str | None
    trace_id: str | None
    request_bytes: int
    request_body: bytes  # empty where nobody reads it
    id: str = ""
    started_ns: int = 0
    started_mono_ns: int = 0
    first_byte_ms: float | None = None
    duration_ms: float | None = None
    response: ResponseShape | None = None  # None: it is open
    response_bytes: int = 0
    response_head: bytes = b""  # as it came, without its empty line; likewise
    response_body: bytes = b""  # of one in chunks what of it has to be read
    gate: Gate | None = None
    first_token_ns: int = 0  # of the monotonic clock; 0: no stream, or its first text was not seen
    url: str | None = None  # None: its shape's

    def exchange(self) -> Exchange:
        """The same as an exchange, without usage."""
        shape, response = self.shape, self.response
        exchange = Exchange(
            method=shape.method,
            url=shape.url if self.url is None else self.url,
            route=shape.route,
            request_headers=shape.request_headers,
            client_ip=self.client_ip,
            user_agent=shape.user_agent,
            trace_id=self.trace_id,
            subscriber=shape.subscriber,
            dimensions=shape.dimensions,
            id=self.id,
            started_ns=self.started_ns,
            started_mono_ns=self.started_mono_ns,
            first_byte_ms=self.first_byte_ms,
            duration_ms=self.duration_ms,
            request_bytes=self.request_bytes,
            gate=self.gate,
            upstream=shape.upstream,
        )
        if response is not None:
            exchange.outcome = Outcome.COMPLETE
            exchange.status = response.status
            exchange.response_headers = response.response_headers
            exchange.response_bytes = self.response_bytes
        return exchange


Release = Callable[[bool], None]
"""Called once on the event loop: True, send what was held; False, cut the connection unclean."""


class Recorder(Protocol):
    """Where exchanges go. The proxy knows only this much of everything behind it."""

    def admit(self, exchange: Exchange | PlainExchange) -> bool:
        """Let a call in: set id and start times, take its place in the intake.

        False means that no record can be promised (`SIDECAR_ON_SPOOL_FULL=refuse`): answer 503
        and forget the exchange.
        """
        ...

    def complete(self, exchange: Exchange | PlainExchange, release: Release | None) -> bool:
        """End an admitted exchange, once; a second call for the same one does nothing and returns True.

        Synchronous, so that it works while a task is being cancelled. True: the held last piece
        may leave now. False: `release` will be called, once, when the record is on disk (or it is
        decided that it goes without). `release=None` means that nothing is held.
        """
        ...
