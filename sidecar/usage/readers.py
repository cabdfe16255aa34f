"""The taps of one process: what is fixed is here, what belongs to a call is in the taps that it gives out.

Everything comes in as plain values and callables, also the clock, so that a test needs nothing but bytes. No exception
leaves a tap: what goes wrong ends the reading, is counted under one word, and becomes the usage's reason.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sidecar.model.exchange import Usage, UsageState
from sidecar.model.grammar import Element
from sidecar.usage import UNREAD_REQUEST, UNREAD_RESPONSE, RawHeaders, RequestTap, UnreadRequest, UnreadResponse
from sidecar.usage.endpoints import Endpoint, Endpoints, Pin
from sidecar.usage.formats.content_encoding import BACKLOG_MAX_BYTES
from sidecar.usage.formats.websocket import SessionTap, is_websocket
from sidecar.usage.include_usage import UsageChunkFilter, may_ask, with_usage_asked
from sidecar.usage.providers.realtime import Session, session
from sidecar.usage.providers.table import ROWS, Row
from sidecar.usage.request_reader import RequestReader
from sidecar.usage.response_reader import ResponseReader

__all__ = ["Element", "Pin", "UsageTaps"]


UNMATCHED = Endpoint(None, None, None, ())
"""A call whose answer is nobody's; its request is read all the same."""


def _ignore(kind: str) -> None:
    """Nobody counts anomalies."""


def _say_nothing(method: str, target: str) -> None:
    """Nobody is told of unclaimed answers."""


def _no_clock() -> int:
    return 0


class UsageTaps:
    """Implements `sidecar.usage.Taps`.

    `upstream_host`, `upstream_base`: of the upstream's URL; the base is its path. `estimate`: rough numbers where there
    are none. `ask_for_usage`: offer to add it to requests (see `include_usage`). `body_fields`: members of requests
    that somebody will ask for. `backlog_max_bytes`: coded bytes that may wait for decoding, the side buffer of a call.

    `unclaimed` may be set to what is told the method and the target of an answer that speaks of usage and that no
    reader knows.
    """

    __slots__ = (
        "anomaly",
        "ask_for_usage",
        "backlog_max_bytes",
        "body_fields",
        "clock_ns",
        "endpoints",
        "estimate",
        "unclaimed",
        "upstream_host",
    )  # fmt: skip

    def __init__(
        self,
        *,
        upstream_host: str | None = None,
        upstream_base: str = "",
        pins: Sequence[Pin] = (),
        elements: Sequence[Element] = (),
        estimate: bool = False,
        ask_for_usage: bool = False,
        body_fields: Sequence[str] = (),
        backlog_max_bytes: int = BACKLOG_MAX_BYTES,
        clock_ns: Callable[[], int] = _no_clock,
        anomaly: Callable[[str], None] = _ignore,
        rows: Sequence[Row] = ROWS,
    ) -> None:
        self.anomaly = anomaly
        self.upstream_host = upstream_host
        self.unclaimed: Callable[[str, str], None] = _say_nothing
        self.clock_ns = clock_ns
        self.estimate = estimate
        self.ask_for_usage = ask_for_usage
        self.body_fields = tuple(body_fields)
        self.backlog_max_bytes = backlog_max_bytes
        self.endpoints = Endpoints(rows, pins, elements, upstream_host, upstream_base)

    def kind(self, method: str, target: str) -> tuple[Endpoint | None, bool]:
        endpoint = self.endpoints.of(method, target)
        return endpoint, endpoint is not None and self._may_ask(endpoint, target)

    def _may_ask(self, endpoint: Endpoint, target: str) -> bool:
        if not self.ask_for_usage or endpoint.row is None:
            return False
        return may_ask(endpoint.row.reader, endpoint.provider, self.endpoints.meant(target)[0])

    def request(self, method: str, target: str, headers: RawHeaders) -> RequestReadingTap | UnreadRequest | None:
        try:
            endpoint = self.endpoints.of(method, target)
            if endpoint is None:
                if not self.body_fields:
                    return None
                endpoint = UNMATCHED
            tap = RequestReadingTap(self, endpoint, method, target, headers, self.clock_ns())
            tap.may_ask = self._may_ask(endpoint, target)
            return tap
        except Exception:  # noqa: BLE001 - a fault in a reader must never become a fault of the call
            self.anomaly("tap_failed")
            return UNREAD_REQUEST

    def response(self, request: RequestTap, status: int, headers: RawHeaders) -> ResponseReader | UnreadResponse | None:
        if status < 200 or status in (204, 205, 304):
            return None
        if not isinstance(request, RequestReadingTap):
            return UNREAD_RESPONSE if request is UNREAD_REQUEST else None
        if request.endpoint is UNMATCHED:
            return None
        try:
            return ResponseReader(self, request, status, self.endpoints.heads.pick(headers))
        except Exception:  # noqa: BLE001 - see above
            self.anomaly("tap_failed")
            return UNREAD_RESPONSE

    def answer_filter(self, status: int, headers: RawHeaders) -> UsageChunkFilter | None:
        """Takes the extra chunk out of a stream; where that cannot be done, it stays, and is counted."""
        fields = self.endpoints.heads.pick(headers)
        if status != 200 or not fields.get("content-type", "").lower().startswith("text/event-stream"):
            return None
        plain = fields.get("content-encoding", "").lower() in ("", "identity")
        if plain and not any(name.lower() == b"content-length" for name, _ in headers):
            return UsageChunkFilter()
        self.anomaly("usage_chunk_left")
        return None

    def socket(self, target: str) -> Session | None:
        """The reader of a WebSocket's messages; None where they are nobody's."""
        try:
            return session(
                target, self.endpoints.provider_of("GET", target), self.anomaly, self.endpoints.meant(target)[0]
            )
        except Exception:  # noqa: BLE001 - see above
            self.anomaly("tap_failed")
            return None

    def websocket(self, target: str, headers: RawHeaders) -> SessionTap | None:
        """The tap of a connection that a 101 with this head switched; None where its messages are nobody's."""
        session = self.socket(target)
        if session is None or not is_websocket(headers):
            return None
        try:
            return SessionTap.over(session, headers, self.anomaly)
        except Exception:  # noqa: BLE001 - see above
            self.anomaly("tap_failed")
            return None


class RequestReadingTap:
    """Implements `sidecar.usage.RequestTap`."""

    __slots__ = ("_headers", "_taps", "body", "endpoint", "may_ask", "method", "opened_ns", "target")

    def __init__(
        self, taps: UsageTaps, endpoint: Endpoint, method: str, target: str, headers: RawHeaders, opened_ns: int
    ) -> None:
        self._taps = taps
        self.method = method
        self.target = target
        self._headers: RawHeaders | None = headers
        self.endpoint = endpoint
        self.may_ask = False
        self.opened_ns = opened_ns
        self.body = RequestReader(taps.body_fields, taps.anomaly)

    def feed(self, piece: bytes) -> None:
        try:
            headers = self._headers
            if headers is not None and piece:
                self._headers = None
                if piece[0] != 0x7B:  # a form, or coded; an object needs no head to be recognised
                    self.body.describe(self._taps.endpoints.heads.pick(headers))
            self.body.feed(piece)
        except Exception:  # noqa: BLE001 - see above
            self._taps.anomaly("tap_failed")
            self.body = RequestReader()

    def member(self, name: str) -> str | None:
        """A text or a whole number at the body's top level, if `body_fields` has it."""
        try:
            self.body.settle()
            value = self.body.facts().get(name)
        except Exception:  # noqa: BLE001 - see above
            self._taps.anomaly("tap_failed")
            return None
        return str(value) if type(value) in (str, int) and value != "" else None

    def with_usage_asked(self, body: bytes) -> bytes | None:
        """The whole body with usage asked for; None where it is to stay as it is."""
        try:
            return with_usage_asked(body)
        except Exception:  # noqa: BLE001 - see above
            self._taps.anomaly("tap_failed")
            return None

    def unanswered(self) -> Usage | None:
        """For a call that got no answer: a model call about which nothing is known but what was asked."""
        row = self.endpoint.row
        if row is None or row.unmetered is not None or row.hint_only:
            return None
        usage = Usage(usage_state=UsageState.ABSENT, operation=row.operation, reason="no answer came")
        usage.provider = self.endpoint.provider or row.provider
        usage.request_model = self.endpoint.asked(self.body.model)
        return usage
