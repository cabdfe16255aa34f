"""One answer: choosing how it is read, reading it, and what comes of it.

The answer decides how it is read: its content type, and where that may lie its first byte. The path says which reader
is asked; where the path is unknown, all are, and one must claim what it sees. What no reader recognises gives no usage
at all, never a wrong number. Whatever goes wrong ends the reading, not the call.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Protocol

from sidecar.exchange import Usage, UsageState
from sidecar.usage.batches import BatchFile
from sidecar.usage.bedrock import Converse, Invoke
from sidecar.usage.codings import Codings, Unreadable, decoder
from sidecar.usage.documents import DOCUMENT_MAX_BYTES, Elements, LinesOrDocument, OneDocument, read_whole
from sidecar.usage.estimate import estimate
from sidecar.usage.frames import EventStream
from sidecar.usage.framing import Framing, JsonLines, ServerSentEvents
from sidecar.usage.heads import hinted_provider, request_id
from sidecar.usage.openai import ChatCompletions
from sidecar.usage.own import OwnFields, from_headers
from sidecar.usage.places import Place, Places
from sidecar.usage.plain import Failed, Undecided, Unmetered
from sidecar.usage.reader import Reader, build, clear
from sidecar.usage.requests import RequestReading
from sidecar.usage.stored import SEEN, CountedIds
from sidecar.usage.table import READERS, Row

DEFAULT_PROVIDER = "openai"  # of an answer in OpenAI's shape that nothing else gives away
FINISH_STEPS_MAX = 8  # of decoding, at the end of an answer that was cut off: 4 MiB, about 10 ms
SIGN_PIECE_BYTES = 4_096  # a piece of a stream in which the first token is always looked for
SIGN_MAX_BYTES = 131_072  # … and what is looked through of larger ones: they come long after the first token
LEADING_BLANKS_MAX = 100_000  # pieces; DeepSeek sends an empty line now and then for minutes before its answer

_FRAMES = "application/vnd.amazon.eventstream"
_LINES = ("application/x-ndjson", "application/jsonl", "application/x-jsonl", "application/stream+json")
_JSON_FRAMINGS: dict[str, Callable[[Reader], Framing]] = {
    "": OneDocument,
    "array": Elements,
    "lines": LinesOrDocument,
}


class Fixed(Protocol):
    """What is the same for all calls."""

    anomaly: Callable[[str], None]
    clock_ns: Callable[[], int]
    counted: CountedIds | None
    estimate: bool
    places: Places
    backlog_max_bytes: int


class Asked(Protocol):
    """The request that is being answered."""

    place: Place
    body: RequestReading
    opened_ns: int


class AnswerTap:
    """Implements `sidecar.usage.ResponseTap`."""

    # Defaults stand on the class: a tap is made for every call, and most of these are never set.
    _ended: bool = False  # nothing more is read: the end mark was seen, or the reading has failed
    _settled: bool = False
    _usage: Usage | None = None
    _reason: str | None = None
    _first_token_ns: int = 0
    _sign: re.Pattern[bytes] | None = None  # what the first token looks like, until it was seen
    _bytes: int = 0  # decoded bytes and lines, for an estimate
    _lines: int = 0
    _searched: int = 0  # bytes looked through for the first token
    _blanks: int = 0  # pieces of nothing but blanks before the answer
    _decoder: Codings | None = None
    _framing: Framing | None = None
    _only: bytes = b""  # the first piece of a plain answer, for as long as it is the only one: most are one piece

    def __init__(self, fixed: Fixed, request: Asked, status: int, fields: dict[str, str]) -> None:
        self._fixed = fixed
        self._request = request
        self._status = status
        self._fields = fields
        self._row = request.place.row
        self._reader = self._front = self._choose()
        self._open()

    @property
    def waiting(self) -> bool:
        reader = self._reader
        if self._ended or self._settled or self._status >= 400:
            return False
        if isinstance(reader, Undecided):
            if reader.chosen is None:
                return False
            reader = reader.chosen
        if isinstance(reader, Unmetered | BatchFile) or (reader.final and reader.raw is not None):
            return False
        return not (self._framing is not None and self._framing.streamed and self._never_reports())

    @property
    def behind(self) -> bool:
        """Whether decoded bytes wait: `feed(b"")` works off another step of them, `finish` only a few."""
        return self._decoder is not None and not self._ended and self._decoder.behind

    def feed(self, piece: bytes) -> bool:
        if self._ended:
            return False
        try:
            if self._decoder is None:
                if self._framing is None or self._sign is not None or self._fixed.estimate:
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

    def finish(self, whole: bool) -> Usage | None:
        if not self._settled:
            self._settled = True
            try:
                self._usage = self._finish(whole)
            except Exception:  # noqa: BLE001 - see above
                self._fixed.anomaly("reader_failed")
            self._framing = self._decoder = None
        return self._usage

    def answers(self) -> list[Usage]:
        """For files that hold many answers: those read since the last call, each to be counted once an id."""
        counted = self._fixed.counted
        if counted is None or not isinstance(self._reader, BatchFile):
            return []
        return [usage for usage in self._reader.take() if counted.first(usage)]

    # How the answer is read.

    def _choose(self) -> Reader:
        """The reader that the path, or a header, names."""
        row, place = self._row, self._request.place
        if row is None:
            row = self._row = self._fixed.places.row_by_header(self._fields)
            if row is None:
                return Undecided(self._fixed.anomaly, place.readers)
        if self._status >= 400:
            return Failed(self._fixed.anomaly)
        if row.unmetered is not None and row.reads_stored and self._fixed.counted is not None:
            return (
                BatchFile(self._fixed.anomaly) if row.reader is BatchFile else Undecided(self._fixed.anomaly, READERS)
            )
        reader = Unmetered(self._fixed.anomaly) if row.reader is BatchFile else row.reader(self._fixed.anomaly)
        if row.reader.header_names:
            reader.head(self._fields)
        return reader

    def _open(self) -> None:
        fields, reader = self._fields, self._reader
        content_type = fields.get("content-type", "")
        if content_type != "application/json":
            content_type = content_type.partition(";")[0].strip().lower()
        elements = self._request.place.elements
        if elements and content_type != _FRAMES and any(element.json for element in elements):
            self._front = OwnFields(self._fixed.anomaly, reader, elements)
        elif self._row is None and (self._status >= 400 or not self._request.place.readers):
            self._ended = True
            return
        coding = fields.get("content-encoding")
        if coding:
            try:
                self._decoder = decoder(coding, self._fixed.backlog_max_bytes)
            except Unreadable as broken:
                self._give_up(broken.kind, broken.reason)
                return
        if self._status >= 400:
            self._framing = OneDocument(self._front)
        elif content_type == _FRAMES and isinstance(reader, Converse | Invoke):
            self._stream(EventStream(reader))
        elif content_type in _LINES and (self._row is None or self._row.framing == "lines"):
            self._stream(JsonLines(self._front))
        elif content_type and not _may_hide_json(content_type):
            self._ended = True

    def _stream(self, framing: Framing) -> None:
        """A stream may last: it must not hold its prompt, and it has a first token to wait for."""
        self._framing = framing
        self._sign = self._reader.first_token
        if self._row is not None:
            body = self._request.body
            body.settle()
            self._reader.expect(body.choices)

    def _take(self, piece: bytes) -> bool:
        framing = self._framing
        ended = framing.feed(piece) if framing is not None else self._sniff(piece)
        if self._sign is not None:
            if len(piece) > SIGN_PIECE_BYTES:
                self._searched += len(piece)
            if self._searched > SIGN_MAX_BYTES:
                self._sign = None
            elif self._sign.search(piece) is not None:
                self._first_token_ns = self._fixed.clock_ns()
                self._sign = None
        if self._fixed.estimate:
            self._bytes += len(piece)
            self._lines += piece.count(b"\n")
        if ended:
            self._ended = True
        return ended

    def _sniff(self, piece: bytes) -> bool:
        """Decide by the first byte that is not blank; content types are not to be trusted."""
        if self._only:
            self._framing = OneDocument(self._front)
            self._framing.feed(self._only)
            self._only = b""
            return self._framing.feed(piece)
        if not piece:
            return False
        row = self._row
        if piece[0] == 0x7B and row is not None and row.framing == "" and len(piece) <= DOCUMENT_MAX_BYTES:
            self._only = piece
            return False
        if piece[0] != 0x7B:
            piece = piece.lstrip(b" \t\r\n\xef\xbb\xbf")
        if not piece:
            self._blanks += 1
            if self._blanks > LEADING_BLANKS_MAX:
                raise Unreadable("answer_unrecognised", None)
            return False
        if piece[0] in b"{[":
            self._framing = _JSON_FRAMINGS[row.framing if row is not None else ""](self._front)
        elif piece[0] in b"dei:r":
            self._stream(ServerSentEvents(self._front))
        else:
            raise Unreadable("answer_unrecognised" if row is not None else "", None)
        return self._framing.feed(piece) if self._framing is not None else False

    def _give_up(self, kind: str, reason: str | None) -> None:
        if kind:
            self._fixed.anomaly(kind)
        self._ended = True
        self._reason = self._reason or reason

    def _never_reports(self) -> bool:
        """OpenAI itself sends a stream's usage only when it was asked to."""
        provider = self._request.place.provider or hinted_provider(self._fields)
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
        streamed = ended = False
        if framing is not None:
            framing.finish(whole and self._reason is None)
            streamed, ended = framing.streamed, framing.ended
            if framing.busy:
                self._reason = self._reason or "the answer has more parts than its length allows: not all was read"
        elif self._only:
            ended = read_whole(self._front, self._only)
        usage = self._model_usage(whole, streamed=streamed, ended=ended)
        elements = self._request.place.elements
        return self._with_own_fields(usage, whole) if elements else usage

    def _model_usage(self, whole: bool, *, streamed: bool, ended: bool) -> Usage | None:
        reader, row = self._reader, self._row
        if isinstance(reader, Undecided):
            if reader.chosen is None:
                return self._unclaimed(row)
            reader = reader.chosen
            row = row or self._fixed.places.row_of(reader)
        elif not self._believable(reader, whole):
            return None
        usage = build(reader, streamed=streamed, ended=ended)
        self._complete(usage, reader, row)
        return usage

    def _unclaimed(self, row: Row | None) -> Usage | None:
        """No reader claimed it: nobody's answer, or a stored one of unknown shape."""
        if row is None:
            return None
        usage = Usage(usage_state=UsageState.ABSENT, operation=row.operation, reason=row.unmetered)
        usage.provider = self._request.place.provider or row.provider
        return usage

    def _believable(self, reader: Reader, whole: bool) -> bool:
        """Whether this was a model's answer: seen to be one, or cut off (or unreadable) before that could be seen."""
        if reader.seen or self._reason is not None or self._status >= 400:
            return True
        if isinstance(reader, Unmetered | BatchFile):
            return True
        if self._ended:
            return self._framing is None and not self._only and not self._bytes and self._silent()
        return not whole

    def _silent(self) -> bool:
        """An answer whose type alone says that it has no place for usage: sound, pictures, subtitles."""
        return self._fields.get("content-type", "").startswith(("audio/", "image/", "video/", "application/octet"))

    def _complete(self, usage: Usage, reader: Reader, row: Row | None) -> None:
        place, body = self._request.place, self._request.body
        usage.provider = (
            place.provider
            or reader.provider
            or (row.provider if row is not None else None)
            or hinted_provider(self._fields)
            or DEFAULT_PROVIDER
        )
        usage.request_model = body.model or place.model
        usage.upstream_request_id = request_id(self._fields)
        if self._first_token_ns and usage.streamed and self._request.opened_ns:
            usage.time_to_first_token_ms = (self._first_token_ns - self._request.opened_ns) / 1e6
        if row is not None:
            usage.operation = row.operation
        if self._status >= 400:
            usage.error = usage.error or f"http_{self._status}"
        counted = self._fixed.counted
        if row is not None and row.unmetered is not None:
            first = row.reads_stored and counted is not None and counted.first(usage)
            if not first:
                usage.usage_state = UsageState.ABSENT
                usage.reason = row.unmetered if counted is None or not row.reads_stored else SEEN
                clear(usage)
        elif usage.usage_state is UsageState.ABSENT:
            usage.reason = usage.reason or self._reason or _why_absent(usage, self._status)
            if self._fixed.estimate and self._status < 400:
                estimate(usage, body.bytes_seen, self._bytes, self._lines)
        elif counted is not None:
            counted.first(usage)

    def _with_own_fields(self, usage: Usage | None, whole: bool) -> Usage | None:
        own = from_headers(self._request.place.elements, self._fields)
        if isinstance(self._front, OwnFields):
            own |= self._front.units
        if not own:
            return usage
        if usage is None:
            usage = Usage(usage_state=UsageState.FINAL if whole else UsageState.PARTIAL)
            usage.upstream_request_id = request_id(self._fields)
        usage.units = {**usage.units, **own}
        return usage


def _why_absent(usage: Usage, status: int) -> str:
    if status >= 400:
        return "the call failed"
    if usage.error is not None:
        return "the answer is an error"
    return "the stream ended without usage" if usage.streamed else "the answer states no usage"


def _may_hide_json(content_type: str) -> bool:
    """Types under which JSON or events have been seen; an image or a sound holds neither."""
    return content_type.endswith("json") or content_type.startswith(("text/", "application/octet"))
