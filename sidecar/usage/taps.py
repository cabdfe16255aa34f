"""Choosing the readers of one call, and keeping every fault of theirs away from it.

`UsageTaps` is made once and holds what is fixed: the table, the pins, the own fields, the limits. For a call it gives
a tap for the request and one for the answer. The answer decides how it is read: its content type, and where that may
lie its first byte; the path says which reader is asked, or, where the path is unknown, all are and one must claim it.
What no reader recognises gives no usage at all, never a wrong number.

No exception leaves a tap. What goes wrong ends the reading, is counted under one word, and becomes the usage's reason.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from urllib.parse import unquote

from sidecar.exchange import Usage, UsageState
from sidecar.patterns import ANY_METHOD, Patterns
from sidecar.usage import RawHeaders, RequestTap
from sidecar.usage.bedrock import Converse, Invoke
from sidecar.usage.codings import Codings, Unreadable, decoder
from sidecar.usage.frames import EventStream
from sidecar.usage.framing import Elements, Framing, JsonLines, LinesOrDocument, OneDocument, ServerSentEvents
from sidecar.usage.heads import Heads, hinted_provider, provider_of_host, request_id
from sidecar.usage.openai import ChatCompletions
from sidecar.usage.plain import Failed, Undecided, Unmetered
from sidecar.usage.reader import Reader, build
from sidecar.usage.requests import RequestReading
from sidecar.usage.table import READERS, ROWS, Row, entries

DEFAULT_PROVIDER = "openai"  # of an answer in OpenAI's shape that nothing else gives away
PATHS_MAX = 1_024  # remembered look-ups of paths; more than any API has without ids in them
LEADING_BLANKS_MAX_BYTES = 1_048_576  # DeepSeek sends empty lines for minutes before its answer


def _ignore(kind: str) -> None:
    """Nobody counts anomalies."""


def _no_clock() -> int:
    return 0


@dataclass(frozen=True, slots=True)
class Pin:
    """All calls of a path belong to this provider, whatever they look like."""

    pattern: str
    provider: str


class UsageTaps:
    """Implements `sidecar.usage.Taps`."""

    __slots__ = (
        "_by_header",
        "_by_reader",
        "_heads",
        "_host_provider",
        "_paths",
        "_pins",
        "_remembered",
        "anomaly",
        "clock_ns",
    )

    def __init__(
        self,
        *,
        upstream_host: str | None = None,
        pins: Sequence[Pin] = (),
        clock_ns: Callable[[], int] = _no_clock,
        anomaly: Callable[[str], None] = _ignore,
        rows: Sequence[Row] = ROWS,
    ) -> None:
        self.anomaly = anomaly
        self.clock_ns = clock_ns
        self._host_provider = provider_of_host(upstream_host)
        self._paths = Patterns(entries(tuple(rows)))
        self._pins = Patterns([(ANY_METHOD, pin.pattern, pin.provider) for pin in pins])
        self._heads = Heads(name for row in rows for name in row.reader.header_names)
        self._by_header = [row for row in rows if not row.paths]
        self._by_reader = {row.reader: row for row in reversed(rows) if row.unmetered is None}
        self._remembered: dict[tuple[str, str], _Place | None] = {}

    def request(self, method: str, target: str, headers: RawHeaders) -> RequestReadingTap | None:
        path = target.partition("?")[0]
        key = (method, path)
        try:
            place = self._remembered[key]
        except KeyError:
            place = self._locate(method, path)
            if len(self._remembered) < PATHS_MAX and len(path) <= 128:
                self._remembered[key] = place
        if place is None:
            return None
        fields = self._heads.pick(headers)
        try:
            return RequestReadingTap(place, fields, self.clock_ns())
        except Exception:  # noqa: BLE001 - a fault in a reader must never become a fault of the call
            self.anomaly("tap_failed")
            return None

    def response(self, request: RequestTap, status: int, headers: RawHeaders) -> ResponseReadingTap | None:
        if not isinstance(request, RequestReadingTap) or status < 200 or status in (204, 205, 304):
            return None
        try:
            return ResponseReadingTap(self, request, status, self._heads.pick(headers))
        except Exception:  # noqa: BLE001 - a fault in a reader must never become a fault of the call
            self.anomaly("tap_failed")
            return None

    def row_by_header(self, fields: dict[str, str]) -> Row | None:
        """The row whose answers give themselves away by a header, on any path."""
        return next((row for row in self._by_header if row.reader.header_names[0] in fields), None)

    def row_of(self, reader: Reader) -> Row | None:
        """The row that a reader of an unknown path stands for."""
        return self._by_reader.get(type(reader))

    def _locate(self, method: str, path: str) -> _Place | None:
        if path.startswith(("http://", "https://")):
            path = "/" + path.split("/", 3)[3] if path.count("/") >= 3 else "/"
        pin = self._pins.match(method, path)
        provider = pin[0] if pin is not None else self._host_provider
        found = self._paths.match(method, path)
        if found is None:
            return _Place(None, None, provider) if method == "POST" else None
        row, places = found
        model = places.get("model") or places.get("deployment")
        return _Place(row, unquote(model) if model else None, provider)


@dataclass(frozen=True, slots=True)
class _Place:
    """What the path alone says."""

    row: Row | None
    model: str | None
    provider: str | None  # pinned, or by the upstream's host


class RequestReadingTap:
    """Implements `sidecar.usage.RequestTap`."""

    __slots__ = ("body", "opened_ns", "place")

    def __init__(self, place: _Place, fields: dict[str, str], opened_ns: int) -> None:
        self.place = place
        self.opened_ns = opened_ns
        self.body = RequestReading(fields.get("content-type", ""), fields.get("content-encoding", ""))

    def feed(self, piece: bytes) -> None:
        try:
            self.body.feed(piece)
        except Exception:  # noqa: BLE001 - see above
            self.body = RequestReading("", "")

    def unanswered(self) -> Usage | None:
        """For a call that got no answer: a model call about which nothing is known but what was asked."""
        row = self.place.row
        if row is None or row.unmetered is not None:
            return None
        usage = Usage(usage_state=UsageState.ABSENT, operation=row.operation, reason="no answer came")
        usage.provider = self.place.provider or row.provider
        usage.request_model = self.body.model or self.place.model
        return usage


class ResponseReadingTap:
    """Implements `sidecar.usage.ResponseTap`."""

    __slots__ = (
        "_anomaly",
        "_decoder",
        "_ended",
        "_fields",
        "_first_token_ns",
        "_framing",
        "_front",
        "_reason",
        "_request",
        "_row",
        "_settled",
        "_sign",
        "_status",
        "_taken",
        "_taps",
        "_usage",
    )

    def __init__(
        self,
        taps: UsageTaps,
        request: RequestReadingTap,
        status: int,
        fields: dict[str, str],
    ) -> None:
        self._taps = taps
        self._anomaly = taps.anomaly
        self._request = request
        self._row = request.place.row
        self._status = status
        self._fields = fields
        self._ended = False  # nothing more is read: the end mark was seen, or the reading has failed
        self._settled = False
        self._usage: Usage | None = None
        self._reason: str | None = None
        self._first_token_ns = 0
        self._taken = 0
        self._sign: re.Pattern[bytes] | None = None  # what the first token looks like, until it was seen
        self._decoder: Codings | None = None
        self._framing: Framing | None = None
        if self._row is not None:
            request.body.settle()
        self._front = self._reader()
        self._front.head(fields)
        self._open()

    @property
    def waiting(self) -> bool:
        if self._ended or self._settled or self._status >= 400 or self._front.final:
            return False
        row = self._row
        if row is None:
            return isinstance(self._front, Undecided) and self._front.chosen is not None
        if row.unmetered is not None or self._framing is None:
            return False
        return not (self._framing.streamed and self._never_reports())

    @property
    def behind(self) -> bool:
        """Whether decoded bytes wait: `feed(b"")` works off another step of them, `finish` all of them."""
        return self._decoder is not None and not self._ended and self._decoder.behind

    def feed(self, piece: bytes) -> bool:
        if self._ended:
            return False
        try:
            if self._decoder is None:
                return self._take(piece)
            return self._decode(piece)
        except Unreadable as broken:
            self._give_up(broken.kind, broken.reason)
        except Exception:  # noqa: BLE001 - see above
            self._give_up("reader_failed", "the answer could not be read")
        return False

    def finish(self, whole: bool) -> Usage | None:
        if not self._settled:
            self._settled = True
            try:
                self._usage = self._finish(whole)
            except Exception:  # noqa: BLE001 - see above
                self._anomaly("reader_failed")
            self._framing = None
            self._decoder = None
        return self._usage

    # How the answer is read.

    def _reader(self) -> Reader:
        row = self._row
        if row is None:
            row = self._row = self._taps.row_by_header(self._fields)
        if row is None:
            return Undecided(self._anomaly, READERS)
        if self._status >= 400:
            return Failed(self._anomaly)
        reader = row.reader(self._anomaly)
        reader.expect(self._request.body.choices)
        return reader

    def _open(self) -> None:
        row = self._row
        if row is None and self._status >= 400:
            self._ended = True
            return
        coding = self._fields.get("content-encoding")
        if coding:
            try:
                self._decoder = decoder(coding)
            except Unreadable as broken:
                self._give_up(broken.kind, broken.reason)
                return
        content_type = self._fields.get("content-type", "").partition(";")[0].strip().lower()
        self._framing = self._framing_for(content_type, row)
        if self._framing is None and content_type and not _may_hide_json(content_type):
            self._ended = True

    def _framing_for(self, content_type: str, row: Row | None) -> Framing | None:
        """By content type where that can be trusted; None leaves it to the first byte."""
        if self._status >= 400:
            return OneDocument(self._front)
        if content_type == _FRAMES and isinstance(self._front, Converse | Invoke):
            self._sign = self._front.first_token
            return EventStream(self._front)
        if content_type in _LINES and (row is None or row.framing == "lines"):
            self._sign = self._front.first_token
            return JsonLines(self._front)
        return None

    def _sniff(self, piece: bytes) -> bool:
        """Decide by the first byte that is not blank; content types are not to be trusted."""
        self._taken += len(piece)
        start = piece.lstrip(b" \t\r\n\xef\xbb\xbf")
        if not start:
            if self._taken > LEADING_BLANKS_MAX_BYTES:
                self._give_up("answer_unrecognised", "nothing but blanks")
            return False
        row = self._row
        if start[0] in b"{[":
            self._framing = _JSON_FRAMINGS[row.framing if row is not None else ""](self._front)
        elif start[0] in b"dei:r":
            self._framing = ServerSentEvents(self._front)
            self._sign = self._front.first_token
        else:
            self._give_up("answer_unrecognised" if row is not None else "", None)
            return False
        return self._framing.feed(start)

    def _take(self, piece: bytes) -> bool:
        if not piece:
            return False
        framing = self._framing
        ended = framing.feed(piece) if framing is not None else self._sniff(piece)
        if self._sign is not None and self._sign.search(piece) is not None:
            self._first_token_ns = self._taps.clock_ns()
            self._sign = None
        if ended:
            self._ended = True
        return ended

    def _decode(self, piece: bytes) -> bool:
        if self._decoder is not None:
            for part in self._decoder.feed(piece):
                if self._take(part):
                    return True
                if self._ended:
                    break
        return False

    def _give_up(self, kind: str, reason: str | None) -> None:
        if kind:
            self._anomaly(kind)
        self._ended = True
        self._reason = self._reason or reason

    def _never_reports(self) -> bool:
        """OpenAI itself sends a stream's usage only when it was asked to."""
        provider = self._request.place.provider or hinted_provider(self._fields)
        return (
            provider in ("openai", "azure.ai.openai")
            and isinstance(self._front, ChatCompletions)
            and not self._request.body.asks_for_usage
        )

    # What comes of it.

    def _finish(self, whole: bool) -> Usage | None:
        if self._decoder is not None and not self._ended:
            try:
                while self._decoder.behind and not self._decode(b""):
                    pass
            except Unreadable as broken:
                self._give_up(broken.kind, broken.reason)
        framing, reader, row = self._framing, self._front, self._row
        if framing is not None:
            framing.finish()
        if isinstance(reader, Undecided):
            if reader.chosen is None:
                return None
            reader = reader.chosen
            row = self._taps.row_of(reader)
        elif row is not None and self._status < 400 and not self._believable(reader, whole):
            return None
        usage = build(
            reader,
            streamed=framing.streamed if framing is not None else False,
            ended=framing is not None and framing.ended,
            size_bytes=framing.size_bytes if framing is not None else 0,
            brackets=framing.brackets if framing is not None else 0,
        )
        self._complete(usage, reader, row)
        return usage

    def _believable(self, reader: Reader, whole: bool) -> bool:
        """Whether this was a model's answer: seen to be one, or cut off (or unreadable) before that could be seen."""
        if reader.seen or isinstance(reader, Unmetered):
            return True
        if self._reason is not None:
            return True
        return self._framing is None and self._taken == 0 and not whole

    def _complete(self, usage: Usage, reader: Reader, row: Row | None) -> None:
        place, body = self._request.place, self._request.body
        usage.provider = self._provider(reader, row)
        usage.operation = row.operation if row is not None else None
        usage.request_model = body.model or place.model
        usage.upstream_request_id = request_id(self._fields)
        if self._first_token_ns > 0 and usage.streamed and self._request.opened_ns:
            usage.time_to_first_token_ms = (self._first_token_ns - self._request.opened_ns) / 1e6
        if self._status >= 400:
            usage.error = usage.error or f"http_{self._status}"
        if row is not None and row.unmetered is not None:
            usage.usage_state = UsageState.ABSENT
            usage.reason = row.unmetered
        elif usage.usage_state is UsageState.ABSENT and usage.reason is None:
            usage.reason = self._reason or _why_absent(usage, self._status)

    def _provider(self, reader: Reader, row: Row | None) -> str | None:
        """Pinned or known by the host; else what the answer, the path or the headers give away."""
        return (
            self._request.place.provider
            or reader.provider
            or (row.provider if row is not None else None)
            or hinted_provider(self._fields)
            or DEFAULT_PROVIDER
        )


def _why_absent(usage: Usage, status: int) -> str:
    if status >= 400:
        return "the call failed"
    if usage.error is not None:
        return "the answer is an error"
    return "the stream ended without usage" if usage.streamed else "the answer states no usage"


_JSON_FRAMINGS: dict[str, Callable[[Reader], Framing]] = {
    "": OneDocument,
    "array": Elements,
    "lines": LinesOrDocument,
}
_FRAMES = "application/vnd.amazon.eventstream"
_LINES = ("application/x-ndjson", "application/jsonl", "application/x-jsonl", "application/stream+json")


def _may_hide_json(content_type: str) -> bool:
    """Types under which JSON or events have been seen; an image or a sound holds neither."""
    return content_type.endswith("json") or content_type.startswith(("text/", "application/octet"))
