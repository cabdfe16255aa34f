"""One answer: choosing how it is read, reading it, and what comes of it.

The response decides how it is read: by its first bytes, whatever its content type says, unless that is a picture's or a
sound's. The path says which reader is asked first (see `reader_choice`); what that one does not recognise is any
reader's to claim. What nobody recognises gives no usage at all, never a wrong number; where it speaks of usage all the
same, that is said. Whatever goes wrong ends the reading, not the call.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Protocol

from sidecar.model.exchange import Usage, UsageState, unread_usage
from sidecar.usage import Skips
from sidecar.usage.custom_fields import CustomFields, from_headers
from sidecar.usage.endpoints import Endpoint, Endpoints
from sidecar.usage.estimate import estimate
from sidecar.usage.formats.aws_eventstream import EventStream, begins
from sidecar.usage.formats.content_encoding import Codings, Unreadable, decoder
from sidecar.usage.formats.event_stream import Framing, JsonLines, Messages, ServerSentEvents
from sidecar.usage.formats.json_body import DOCUMENT_MAX_BYTES, Elements, LinesOrDocument, OneDocument, read_whole
from sidecar.usage.providers.base import Reader, build, clear, known
from sidecar.usage.providers.fallback import Failed, Unmetered
from sidecar.usage.providers.openai import ChatCompletions
from sidecar.usage.providers.table import Row
from sidecar.usage.reader_choice import Choice, Mentions
from sidecar.usage.request_reader import RequestReader
from sidecar.usage.response_headers import hinted_provider, request_id

DEFAULT_PROVIDER = "openai"  # of an answer in OpenAI's shape that nothing else gives away
FINISH_STEPS_MAX = 6  # of decoding, at the end of an answer that was cut off: 3 MiB, about 10 ms
FIRST_TOKEN_PIECE_BYTES = 4_096  # a piece of a stream in which the first token is always looked for
FIRST_TOKEN_MAX_BYTES = 131_072  # … and what is looked through of larger ones: they come long after the first token
FIRST_TOKEN_MARK_BYTES = 64  # of what a piece ends with: of the first token's mark, which may be cut between two
LEADING_BLANKS_MAX = 100_000  # pieces; DeepSeek sends an empty line now and then for minutes before its answer

_SILENT = ("image/", "audio/", "video/")  # the only types that are taken at their word
_FRAMES = "application/vnd.amazon.eventstream"
_LINES = ("application/x-ndjson", "application/jsonl", "application/x-jsonl", "application/stream+json")
# Of a stream under a wrong name: events, blanks before them, frames.
_STREAM_STARTS = (b"d", b"e", b"i", b":", b"r", b" ", b"\t", b"\r", b"\n", b"\xef", b"\0")
_CLOUDS = ("aws.bedrock", "gcp.vertex_ai")  # whose paths say where a model runs, whoever made it
BROKEN_OFF = "the answer breaks off within its content coding"
UNCLAIMED = "the answer speaks of usage in a way that no reader knows"


class ReaderContext(Protocol):
    """What is the same for all calls."""

    anomaly: Callable[[str], None]
    clock_ns: Callable[[], int]
    estimate: bool
    endpoints: Endpoints
    backlog_max_bytes: int

    def unclaimed(self, method: str, target: str) -> None:
        """Say that an answer spoke of usage and nobody knew it."""
        ...


class RequestFacts(Protocol):
    """The request that is being answered."""

    method: str
    target: str
    endpoint: Endpoint
    body: RequestReader
    opened_ns: int


class ResponseReader:
    """Implements `sidecar.usage.ResponseTap`."""

    # Defaults stand on the class: a tap is made for every call, and most of these are never set.
    _ended: bool = False  # nothing more is read: the end mark was seen, or the reading has failed
    _settled: bool = False
    _usage: Usage | None = None
    _reason: str | None = None
    _first_token_ns: int = 0
    _timed: bool = False  # a stream, whose first token is waited for
    _first_token: re.Pattern[bytes] | None = None  # what the first token looks like, until it was seen
    _bytes: int = 0  # decoded bytes and lines, for an estimate
    _lines: int = 0
    _searched: int = 0  # bytes looked through for the first token
    _searched_end: bytes = b""  # the last of them
    _blanks: int = 0  # pieces of nothing but blanks before the answer
    _decoder: Codings | None = None
    _framing: Framing | None = None
    _only: bytes = b""  # the first piece of a plain answer, for as long as it is the only one: most are one piece
    _start: bytes = b""  # what may be the beginning of a binary frame
    _mentions: Mentions | None = None  # where it is not known yet whose answer it is
    _choice: Choice | None = None

    def __init__(self, context: ReaderContext, request: RequestFacts, status: int, fields: dict[str, str]) -> None:
        self._context = context
        self._request = request
        self._status = status
        self._fields = fields
        self._row = request.endpoint.row
        self._front = self._asked_first = self._choose()
        if isinstance(self._front, Choice):
            self._choice = self._front
            if 200 <= status < 300 and request.method == "POST":
                self._mentions = Mentions()
        self._open()

    @property
    def _reader(self) -> Reader | None:
        """Whose answer it is, as far as is known."""
        return self._choice.best if self._choice is not None else self._asked_first

    @property
    def waiting(self) -> bool:
        reader = self._reader
        if self._ended or self._settled or self._status >= 400 or reader is None:
            return False
        if isinstance(reader, Unmetered) or (reader.final and reader.raw is not None):
            return False
        return not (self._framing is not None and self._framing.streamed and self._never_reports())

    @property
    def behind(self) -> bool:
        """Whether decoded bytes wait: `feed(b"")` works off another step of them, `finish` only a few."""
        return self._decoder is not None and not self._ended and self._decoder.behind

    @property
    def skips(self) -> Skips | None:
        watched = self._first_token is not None or self._mentions is not None or self._context.estimate
        if watched or self._ended or self._decoder is not None or not isinstance(self._framing, Messages):
            return None
        return self._framing.skips

    def feed(self, piece: bytes) -> bool:
        if self._ended:
            return False
        try:
            if self._decoder is None:
                watched = self._first_token is not None or self._mentions is not None or self._context.estimate
                if watched or self._framing is None:
                    return self._take(piece)
                ended = self._ended = self._framing.feed(piece)  # all that most pieces of a stream need
                return ended
            for part in self._decoder.feed(piece):
                if self._take(part):
                    return True
        except Unreadable as broken:
            self._give_up(broken.kind, broken.reason)
        except Exception:  # noqa: BLE001 - a fault in a reader must never become a fault of the call
            self._give_up("reader_failed", "the answer could not be read")
        return False

    def first_token_at(self, first_token_ns: int) -> None:
        """When the first token came, where that was noted by whoever handed the bytes on (0: it did not come)."""
        if self._timed:
            self._first_token_ns = first_token_ns
            self._first_token = None

    def finish(self, whole: bool) -> Usage | None:
        if not self._settled:
            self._settled = True
            try:
                self._usage = self._finish(whole)
            except Exception:  # noqa: BLE001 - see above
                self._context.anomaly("reader_failed")
                self._usage = unread_usage()
            self._framing = self._decoder = None
        return self._usage

    # How the answer is read.

    def _choose(self) -> Reader:
        """The reader that the path, or a header, names; and whoever may claim what that one does not recognise."""
        context, row = self._context, self._row
        if row is not None and row.unmetered is not None and self._request.method == "POST" and self._asks_anew(row):
            row = self._row = None
        if row is None:
            row = self._row = context.endpoints.row_by_header(self._fields)
        if row is None:
            return Choice(context.anomaly, context.endpoints.everybody)
        if self._status >= 400:
            if row.hint_only:
                self._row = None
            return Failed(context.anomaly)
        if row.unmetered is not None:
            return row.reader(context.anomaly)
        reader = row.reader(context.anomaly)
        if reader.header_names:
            reader.head(self._fields)
        return Choice(context.anomaly, context.endpoints.everybody, reader)

    def _asks_anew(self, row: Row) -> bool:
        """A POST that puts a question to a model is no look at a stored answer, whatever its path looks like."""
        return row.reads_stored and self._request.body.asks_a_model

    def _open(self) -> None:
        fields = self._fields
        content_type = fields.get("content-type", "")
        if content_type != "application/json":
            content_type = content_type.partition(";")[0].strip().lower()
        elements = self._request.endpoint.elements
        if elements and content_type != _FRAMES and any(element.json for element in elements):
            self._front = CustomFields(self._context.anomaly, self._asked_first, elements)
        elif self._row is None and (self._status >= 400 or not self._request.endpoint.claimable):
            self._ended = True
            return
        coding = fields.get("content-encoding")
        if coding:
            try:
                self._decoder = decoder(coding, self._context.backlog_max_bytes)
            except Unreadable as broken:
                self._give_up(broken.kind, broken.reason)
                return
        if self._status >= 400:
            self._framing = OneDocument(self._front)
        elif content_type == _FRAMES and self._choice is not None:
            self._stream(EventStream(self._choice))
        elif content_type in _LINES:
            self._stream(JsonLines(self._front))
        elif content_type.startswith(_SILENT):
            self._ended = True

    def _stream(self, framing: Framing) -> None:
        """A stream may last: it must not hold its prompt, and it has a first token to wait for."""
        self._framing = framing
        self._first_token = self._front.first_token if self._choice is None else self._choice.first_token
        self._timed = self._first_token is not None
        body = self._request.body
        body.settle()
        if self._choice is not None:
            self._choice.expect(body.choices)

    def _take(self, piece: bytes) -> bool:
        framing = self._framing
        ended = framing.feed(piece) if framing is not None else self._sniff(piece)
        if self._mentions is not None:
            self._look(piece)
        if self._first_token is not None:
            if len(piece) > FIRST_TOKEN_PIECE_BYTES:
                self._searched += len(piece)
            looked_at = self._searched_end + piece
            if self._searched > FIRST_TOKEN_MAX_BYTES:
                self._first_token = None
            elif self._first_token.search(looked_at) is not None:
                self._first_token_ns = self._context.clock_ns()
                self._first_token = None
            else:
                self._searched_end = looked_at[-FIRST_TOKEN_MARK_BYTES:]
        if self._context.estimate:
            self._bytes += len(piece)
            self._lines += piece.count(b"\n")
        if ended:
            self._ended = True
        return ended

    def _look(self, piece: bytes) -> None:
        """Whether the answer speaks of usage, for as long as nobody has recognised it."""
        assert self._mentions is not None
        if self._choice is not None and self._choice.reader is not None:
            self._mentions = None
        elif not self._only:  # what is one piece is looked through at the end, if need be
            self._mentions.feed(piece)

    def _sniff(self, piece: bytes) -> bool:
        """Decide by the first byte that is not blank; content types are not to be trusted."""
        if self._only:
            only, self._only = self._only, b""
            if self._mentions is not None:
                self._mentions.feed(only)
            self._framing = LinesOrDocument(self._front)
            self._framing.feed(only)
            return self._framing.feed(piece)
        if self._start:
            piece, self._start = self._start + piece, b""
        if not piece:
            return False
        lines = b"}\n" in piece[:-1] or b"}\r\n" in piece[:-2]
        if piece[0] == 0x7B and len(piece) <= DOCUMENT_MAX_BYTES and not lines:
            self._only = piece
            return False
        if piece[0] != 0x7B:
            piece = piece.lstrip(b" \t\r\n\xef\xbb\xbf")
        if not piece:
            self._blanks += 1
            if self._blanks > LEADING_BLANKS_MAX:
                raise Unreadable("answer_unrecognised", None)
            return False
        if piece[0] == 0x7B:
            self._framing = LinesOrDocument(self._front)
        elif piece[0] == 0x5B:
            self._framing = Elements(self._front)
        elif piece[0] in b"dei:r":
            self._stream(ServerSentEvents(self._front))
        elif self._choice is not None and (framed := begins(piece)) is not False:
            if framed is None:
                self._start = piece
                return False
            self._stream(EventStream(self._choice))
        else:
            raise Unreadable("answer_unrecognised" if self._row is not None and self._expects_json() else "", None)
        return self._framing.feed(piece) if self._framing is not None else False

    def _expects_json(self) -> bool:
        """Types under which JSON or events are usual: anything else there is odd."""
        content_type = self._fields.get("content-type", "").partition(";")[0].strip().lower()
        usual = ("text/", "application/octet")
        return not content_type or content_type.endswith("json") or content_type.startswith(usual)

    def _give_up(self, kind: str, reason: str | None) -> None:
        if kind:
            self._context.anomaly(kind)
        self._ended = True
        self._reason = self._reason or reason

    def _never_reports(self) -> bool:
        """OpenAI itself sends a stream's usage only when it was asked to."""
        provider = self._request.endpoint.provider or hinted_provider(self._fields)
        return (
            provider in ("openai", "azure.ai.openai")
            and isinstance(self._reader, ChatCompletions)
            and not self._request.body.asks_for_usage
        )

    # What comes of it.

    def _finish(self, whole: bool) -> Usage | None:
        if self._decoder is not None:
            for _ in range(FINISH_STEPS_MAX):
                if self.behind:
                    self.feed(b"")
            if self.behind:
                self._give_up("decoded_too_large", "the decoded answer is too large for what was sent")
        framing = self._framing
        cut = self._decoder is not None and not self._ended and self._decoder.amid
        streamed = ended = False
        if framing is not None:
            framing.finish(whole and self._reason is None)
            streamed, ended = framing.streamed, framing.ended
            if framing.busy:
                self._reason = self._reason or "the answer has more parts than its length allows: not all was read"
        elif self._only:
            ended = read_whole(self._front, self._only)
        if cut and not ended:  # whatever the response's framing says
            whole = False
            if not streamed:
                self._reason = self._reason or BROKEN_OFF
        usage = self._model_usage(whole, streamed=streamed, ended=ended)
        if self._request.endpoint.elements:
            usage = self._with_custom_fields(usage, whole)
        if whole and self._mentions is not None and (usage is None or not known(usage)):  # cut off is not unknown
            usage = self._unclaimed(usage)
        return usage

    def _model_usage(self, whole: bool, *, streamed: bool, ended: bool) -> Usage | None:
        choice, reader, row = self._choice, self._reader, self._row
        if reader is None:
            return self._nobodys(row)
        if row is not None and row.hint_only and (choice is None or choice.reader is None):
            return None
        if choice is not None and choice.reader is not None:
            if choice.reader is not choice.hint:
                row = self._handed_over(choice.reader)
        elif not self._believable(reader, whole):
            return None
        usage = build(reader, streamed=streamed, ended=ended)
        self._complete(usage, reader, row)
        return usage

    def _handed_over(self, reader: Reader) -> Row | None:
        """The row of the reader that claimed the answer. A cloud's path still says whose cloud it is."""
        mine = self._row
        row = self._context.endpoints.row_of(reader)
        if mine is not None and mine.unmetered is not None:
            return mine
        if mine is not None and mine.provider in _CLOUDS:
            reader.provider = mine.provider
        return row

    def _nobodys(self, row: Row | None) -> Usage | None:
        """No reader claimed it: nobody's answer, or a stored one of unknown shape."""
        if row is None:
            return None
        usage = Usage(usage_state=UsageState.ABSENT, operation=row.operation, reason=row.unmetered)
        usage.provider = self._request.endpoint.provider or row.provider
        return usage

    def _unclaimed(self, usage: Usage | None) -> Usage | None:
        """An answer that speaks of usage and that nobody recognised: it must not go by in silence."""
        choice, mentions = self._choice, self._mentions
        if (
            choice is None
            or choice.reader is not None
            or mentions is None
            or self._row is not self._request.endpoint.row
        ):
            return usage
        mentions.feed(self._only)
        if not mentions.found or (usage is not None and usage.error is not None):
            return usage
        self._context.anomaly("answer_unclaimed")
        self._context.unclaimed(self._request.method, self._request.target)
        if usage is not None:
            usage.reason = UNCLAIMED
        return usage

    def _believable(self, reader: Reader, whole: bool) -> bool:
        """Whether this was a model's answer: seen to be one, or cut off (or unreadable) before that could be seen."""
        if reader.seen or self._reason is not None or self._status >= 400:
            return True
        if isinstance(reader, Unmetered):
            return True
        if self._ended:
            return self._framing is None and not self._only and not self._bytes and self._silent()
        return not whole

    def _silent(self) -> bool:
        """An answer whose type alone says that it has no place for usage: sound, pictures, subtitles."""
        return self._fields.get("content-type", "").lower().startswith((*_SILENT, "application/octet"))

    def _complete(self, usage: Usage, reader: Reader, row: Row | None) -> None:
        endpoint, body = self._request.endpoint, self._request.body
        usage.provider = (
            endpoint.provider
            or reader.provider
            or (row.provider if row is not None else None)
            or hinted_provider(self._fields)
            or DEFAULT_PROVIDER
        )
        usage.request_model = endpoint.asked(body.model)
        usage.upstream_request_id = request_id(self._fields)
        if self._first_token_ns and usage.streamed and self._request.opened_ns:
            usage.time_to_first_token_ms = (self._first_token_ns - self._request.opened_ns) / 1e6
        if row is not None:
            usage.operation = row.operation if row is self._row else reader.operation or row.operation
        if self._status >= 400:
            usage.error = usage.error or f"http_{self._status}"
        if row is not None and row.unmetered is not None:
            usage.usage_state = UsageState.ABSENT
            usage.reason = reader.reason or row.unmetered
            clear(usage)
        elif usage.usage_state is UsageState.ABSENT:
            usage.reason = usage.reason or self._reason or _why_absent(usage, self._status)
            if self._context.estimate and self._status < 400:
                estimate(usage, body.bytes_seen, self._bytes, self._lines)

    def _with_custom_fields(self, usage: Usage | None, whole: bool) -> Usage | None:
        custom = from_headers(self._request.endpoint.elements, self._fields)
        if isinstance(self._front, CustomFields):
            custom |= self._front.units
        if not custom:
            return usage
        if usage is None:
            usage = Usage(usage_state=UsageState.FINAL if whole else UsageState.PARTIAL)
            usage.upstream_request_id = request_id(self._fields)
        usage.units = {**usage.units, **custom}
        return usage


def _why_absent(usage: Usage, status: int) -> str:
    if status >= 400:
        return "the call failed"
    if usage.error is not None:
        return "the answer is an error"
    return "the stream ended without usage" if usage.streamed else "the answer states no usage"


def stream_starts(status: int, content_type: str) -> tuple[bytes, ...]:
    """How the body of such a response begins where it may be a stream, whose first token is timed; none: it is none."""
    kind = content_type.partition(";")[0].strip().lower()
    if kind == _FRAMES or kind in _LINES:
        return (b"",)
    return () if status >= 400 or kind.startswith(_SILENT) else _STREAM_STARTS


def plain_type(content_type: str) -> bool:
    """Whether a body of this type is looked at by its first bytes, and neither sound, pictures, frames nor lines."""
    kind = content_type.partition(";")[0].strip().lower()
    return not kind.startswith(_SILENT) and kind != _FRAMES and kind not in _LINES
