"""One response of the upstream, read piece by piece and turned into the bytes that the client gets.

Pure: bytes go in through `feed` and come out in `out`; what that means (send, hold, retry, cut) is
for `call` to decide after each `feed`. httptools parses; what it does not know is done here: an
response to HEAD ends at its head, an unsized body ends with its connection, and a sized body needs no
parser once its head is read. A parser costs half a microsecond, so each response has its own and no
state can leak from one to the next.

The upstream is trusted and was chosen, so it is read as leniently as curl and nginx read it, where what is meant is
certain: lines that end in LF alone, blanks behind a chunk's size, and one length said more than once. What the client
gets is strict all the same: heads and chunks are written anew. What clients differ about is refused, and named in
`broken`: other characters in a field's name, a line without a colon, chunk lines ended by LF alone, a last coding that
is not `chunked`, two lengths, length and coding together.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from typing import Final

import httptools

from sidecar.proxy.aiohttp_compat import RawRequestMessage
from sidecar.proxy.headers import FRAMING, OF_THE_HOP, HeaderRules, Peer, ResponseHead
from sidecar.proxy.redirects import Called
from sidecar.usage import UNREAD_RESPONSE, ResponseFilter, ResponseTap, Skips
from sidecar.usage.formats.likeness import Likeness

HEAD_FIELDS_MAX: Final = 256  # of a head, and of the trailers: an upstream is trusted more than a client, not endlessly
HEAD_BYTES_MAX: Final = 262_144  # with all 1xx before it; nginx gives 8 KiB, Node 16 KiB; cookies can be large
BESIDE_BYTES_MAX: Final = HEAD_BYTES_MAX  # of trailers, and of chunk extensions: what comes without a byte of the body
INTERIM_MAX: Final = 32  # 1xx responses to one request
STATUS_MIN: Final = 100  # below, llhttp reads on; above 599 there are some in use (999), and they pass
REASON_CHARS_MAX: Final = 80  # of the parser's own words, which are constants: the longest has 60

_HEAD_END = re.compile(rb"\r?\n\r?\n")
_CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,7})\r\n")
CRLF: Final = b"\r\n"

NOT_ALIKE: Final = Likeness(None)
CHUNK_BYTES_MAX: Final = 4_096  # of a chunk whose size line is known beforehand
_KNOWN: Final[dict[int, tuple[bytes, int, int]]] = {}
chunk_of_read: Final = _KNOWN.get
"""By the length of a read that is one chunk and no more: how it begins (its size, as nearly everybody writes it, and
CRLF), its size, and the length of that beginning. A read of that length which begins and ends so is one chunk: nothing
needs to be parsed. Lengths are added as they are seen, some thousand at most."""
_LENGTH = re.compile(rb"[0-9]+\Z")
_CONTROL = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")

Announce = Callable[["UpstreamResponse"], bytes]
"""Called once with the final head: sets `tap`, and gives the field lines that the client gets besides."""


class UpstreamResponse:
    """Feed it; look at what it says afterwards."""

    __slots__ = (
        "_announce", "_asked", "_at_border", "_beside", "_chunked", "_closes", "_head", "_head_bytes", "_head_only",
        "_http10", "_interim", "_interims", "_mended", "_parser", "_peer", "_reason", "_remaining", "_rules", "_skips",
        "_until_eof", "_upgrade", "body_bytes", "broken", "close_delimited", "done", "ended", "extra", "fields",
        "filter", "keep_alive", "likeness", "mute", "names", "nothing_in", "out", "reusable", "started", "status",
        "tail", "tap", "trailers", "upgraded", "wire_ends",
    )  # fmt: skip

    def __init__(
        self,
        rules: HeaderRules,
        announce: Announce,
        *,
        head_only: bool,
        http10: bool,
        upgrade: bool,
        mute: bool = False,
        asked: RawRequestMessage | None = None,
        peer: Peer | None = None,
    ) -> None:
        self._rules = rules
        self._announce = announce
        self._head_only = head_only
        self._http10 = http10
        self._upgrade = upgrade
        self._asked = asked
        self._peer = peer
        self._parser: httptools.HttpResponseParser | None = self._new_parser()
        self._reason = b""
        self._interim = False
        self._interims = 0
        self._closes = False  # one of them said that the connection ends
        self._head: list[bytes] = []  # as it came, with all 1xx before it, while it is not whole
        self._head_bytes = 0
        self._mended = False  # its lengths, or they are about to be
        self._beside = 0  # bytes since the last one of the body
        self._chunked = False
        self._at_border = False  # the next byte is the first of a chunk, for the client as for the parser
        self._until_eof = False
        self._remaining = -1  # of a sized body; -1: not sized
        self._skips: Skips | None = None  # of what the tap need not be fed, where the next byte is the first of a chunk
        # The same of whole chunks as they come: where it is set, the tap need not be fed one that ends with one of
        # `wire_ends` and has nothing in it, or is alike those before it. `Call.upstream_data` passes such a one on by
        # itself.
        self.nothing_in: Callable[[bytes], bool] | None = None
        self.wire_ends: tuple[bytes, ...] = ()
        self.likeness = NOT_ALIKE
        self.out: list[bytes] = []  # for the client, to be taken after each feed
        self.mute = mute  # nobody is there to read: keep nothing in `out`
        self.status = 0
        self.fields: list[tuple[bytes, bytes]] = []
        self.trailers: list[tuple[bytes, bytes]] = []
        self.names: list[str] = []
        self.tap: ResponseTap | None = None
        self.filter: ResponseFilter | None = None
        self.body_bytes = 0
        self.started = False  # the final head is read
        self.done = False  # the message is whole
        self.ended = False  # the stream's own end mark has been seen
        self.broken: str | None = None  # a fixed text: why this is no response
        self.extra = False  # bytes came behind the end
        self.reusable = False  # the connection may serve another call
        self.keep_alive: bytes | None = None  # how long, as the upstream said it
        self.close_delimited = False  # the client's copy ends by closing
        self.upgraded = False
        self.tail = b""  # what came behind a 101

    def feed(self, data: bytes) -> None:
        """Take what the upstream sent. Look at `broken`; what is raised is a fault of ours."""
        if self._at_border:
            pieces = whole_chunks(data)
            if pieces:
                self._pass(data, pieces)
                return
            self._skips = self.nothing_in = None  # found anew once whole chunks come again
        if self._remaining > 0 and self.started:
            self._feed_sized(data)
            return
        if self._parser is None:
            self.extra = True
        elif self.started:
            before = self.body_bytes
            self._parse(data)
            # Whatever the parser keeps of it meanwhile, a body's frame is no longer than a head.
            self._beside = self._beside + len(data) if self.body_bytes == before else 0
            if self._beside > BESIDE_BYTES_MAX and not self.done and self.broken is None:
                self.broken = "too much of the answer is no body: trailers, or what stands beside the sizes of chunks"
        else:
            self._head.append(data)
            self._head_bytes += len(data)
            if not self._mended:
                self._parse(data)
            elif b"\n" in data:
                self._mend()
        if self.started:
            self._head.clear()
        elif self._head_bytes > HEAD_BYTES_MAX and self.broken is None:
            self.broken = "the head of the answer is too large"
        if self.done or self.broken is not None:
            self._parser = None
            self._at_border = False

    def skip(self, body_bytes: int) -> None:
        """So many bytes of the body, and not all of them, went by elsewhere, behind a head that was fed here."""
        self.body_bytes += body_bytes
        if self._remaining > 0:
            self._remaining -= body_bytes

    def _new_parser(self) -> httptools.HttpResponseParser:
        parser = httptools.HttpResponseParser(self)
        # A length beside chunks is refused by us, in a head: the parser would refuse it among trailers too, where it
        # says nothing (RFC 9110, 6.5.1).
        parser.set_dangerous_leniencies(
            lenient_optional_cr_before_lf=True, lenient_spaces_after_chunk_size=True, lenient_chunked_length=True
        )
        return parser

    def _parse(self, data: bytes) -> None:
        parser = self._parser
        assert parser is not None
        failed = None
        try:
            parser.feed_data(data)
        except httptools.HttpParserUpgrade as switch:
            self.tail = data[switch.args[0] :]
        except httptools.HttpParserError as error:
            failed = error
        if failed is not None:  # and is not being handled any more: an error behind it would have it for its context
            self._failed(failed)
        if self._at_border and data[-1:] != b"\n":
            self._at_border = False  # the first digits of a size came behind the border, and the parser has them

    def _failed(self, error: httptools.HttpParserError) -> None:
        ours = error.__context__
        if isinstance(error, httptools.HttpParserCallbackError) and not isinstance(ours, _NotAResponse | None):
            raise ours  # a fault of ours, and not the upstream's
        if self.done:
            self.extra = True
        elif not self.started and self._interims and _is_after_close(error):
            self._go_on_behind_interims()
        elif not self.started and not self._mended and _is_about_length(error):
            self._mended = True
            self._mend()
        elif self.broken is None:
            self.broken = _why(error)

    def _go_on_behind_interims(self) -> None:
        """A 1xx that says `close`, or is of HTTP/1.0, is followed by the final response all the same. The parser takes
        it for the last message, so another one goes on."""
        raw = b"".join(self._head)
        self._interim = False
        self._parser = self._new_parser()
        self._parse(raw[self._interims_end(raw) :])

    def _interims_end(self, raw: bytes) -> int:
        start = 0
        for _ in range(self._interims):
            start = _head_end(raw, start)[1]
        return start

    def _mend(self) -> None:
        """One length that was said more than once is one length (RFC 9110, 8.6), which the parser does not know: once
        the head is whole, it is parsed anew with a single field."""
        raw = b"".join(self._head)
        start = self._interims_end(raw)
        lines_end, end = _head_end(raw, start)
        if end == 0:
            return  # it is still to come
        lines = one_length(raw[start:lines_end].lstrip(b"\r\n").split(b"\n"))
        if lines is None:
            self.broken = "the answer says more than one length, or none that can be read"
            return
        self.fields = []
        self._reason = b""
        self._parser = self._new_parser()
        self._parse(b"\r\n".join([*lines, b"", raw[end:]]))

    def _feed_sized(self, data: bytes) -> None:
        if len(data) > self._remaining:
            self.extra = True
            data = data[: self._remaining]
        self.on_body(data)
        if not self._remaining:
            self.done = True
            self._parser = None

    def _pass(self, data: bytes, pieces: list[bytes]) -> None:
        """Whole chunks, from one border to another: the parser, which stands at the first, need not see them, and the
        client gets them as they came."""
        self._beside = 0
        self.body_bytes += sum(map(len, pieces))
        if not self.mute:
            self.out.append(data)
        if len(pieces) == 1:  # it has been looked at
            if len(data) not in _KNOWN:
                know_read(data, len(pieces[0]))
        elif self._skips is not None and _hold_nothing(pieces, self._skips):
            return
        tap = self.tap
        if tap is None or self.ended:
            return
        try:
            for piece in pieces:
                if not self.ended:
                    self.ended = tap.feed(piece)
            skips = None if self.ended else tap.skips
        except Exception:  # noqa: BLE001 - see `on_body`
            self.tap, skips = UNREAD_RESPONSE, None
        if skips != self._skips:
            self._look_for(skips)

    def _look_for(self, skips: Skips | None) -> None:
        """What the tap need not be fed from now on."""
        self._skips = skips
        if skips is None or skips.bytes_max < CHUNK_BYTES_MAX:
            self.nothing_in = None
        else:
            self.nothing_in = skips.nothing_in if skips.searches else _in_a_chunk(skips.nothing_in)
            self.wire_ends = _on_the_wire(skips.ends)
            self.likeness = Likeness(skips.looked_at)

    def eof(self, clean: bool) -> None:
        """The connection ended. Only a body without a length of its own may end this way."""
        if self.done:
            return
        if not self.started:
            self.broken = "the connection ended before the answer"
        elif not self._until_eof or not clean:
            self.broken = "the answer was cut off"
        else:
            self._finish()
        self._parser = None

    # -- called by httptools ---------------------------------------------------------------------

    def on_status(self, piece: bytes) -> None:
        if self.done:
            self.extra = True
            return
        self._reason += piece

    def on_header(self, name: bytes, value: bytes) -> None:
        if self.started:
            if self.done:
                self.extra = True
            elif len(self.trailers) >= HEAD_FIELDS_MAX:
                raise _NotAResponse("the trailers of the answer have too many fields")
            else:
                self.trailers.append((name, value))
        else:
            self.fields.append((name, value))

    def on_headers_complete(self) -> None:
        if self.done:
            self.extra = True
            return
        parser = self._parser
        assert parser is not None
        status = parser.get_status_code()
        if len(self.fields) > HEAD_FIELDS_MAX:
            raise _NotAResponse("the answer has too many fields")
        reason = self._reason
        if not reason.isalpha() and _CONTROL.search(reason):
            raise _NotAResponse("the status line holds control characters")
        if status < 200:
            if status < STATUS_MIN:
                raise _NotAResponse("the status is not one of HTTP's")
            if status != 101:
                self._pass_interim(status)
                return
            if not self._upgrade:
                raise _NotAResponse("a protocol switch that nobody asked for")
        head = self._final_head(status)
        self.status = status
        self.names = head.names
        self.keep_alive = head.keep_alive
        self.started = True
        bodiless = self._head_only or status in (204, 304, 101)
        if bodiless:
            # The parser thinks that an unsized response to HEAD ends with the connection; the head says more.
            one_more = parser.should_keep_alive() or parser.get_http_version() == "1.1"
            self.reusable = one_more and not (head.close or self._closes) and status != 101
        else:
            self._frame(head, parser.should_keep_alive())
        ours = self._announce(self)
        if self.filter is not None:
            self._at_border = False  # what the client gets is not what came
        if not self.mute:
            line = b"HTTP/1.1 %d %b\r\n" % (status, self._reason)
            self.out.append(b"".join((line, *head.parts, ours, b"\r\n")))
        if status == 101:
            self.upgraded = True
        elif bodiless:
            self.done = True

    def _final_head(self, status: int) -> ResponseHead:
        try:
            head = ResponseHead(self._rules, self.fields, status=status, http10=self._http10, called=self._called)
        except ValueError as error:
            raise _NotAResponse("the framing of the answer cannot be read") from error
        if head.chunked and head.length is not None:
            raise _NotAResponse("the answer says both a length and a transfer coding")
        return head

    def _called(self) -> Called:
        asked, peer = self._asked, self._peer
        if asked is None or peer is None:
            return Called(b"")
        return Called.of(asked.path, asked.raw_headers, scheme=peer.scheme, trusted=peer.trusted)

    def _frame(self, head: ResponseHead, keep_alive: bool) -> None:
        """How the body ends, there and here."""
        self.reusable = keep_alive and not self._closes
        if head.length is not None:
            self._remaining = head.length
            return
        if not head.chunked:
            self._until_eof = True
            self.reusable = False
        if self._http10:
            self.close_delimited = True
        else:
            self._chunked = True
            self._at_border = head.chunked
            if not head.chunked:
                head.parts.append(b"Transfer-Encoding: chunked\r\n")

    def on_chunk_header(self) -> None:
        self._at_border = False

    def on_chunk_complete(self) -> None:
        self._at_border = self._chunked and not self._until_eof and self.filter is None

    def on_body(self, piece: bytes) -> None:
        if self.done:
            self.extra = True
            return
        size = len(piece)
        if self._remaining > 0:
            self._remaining -= size
        self.body_bytes += size
        tap = self.tap
        if tap is not None and not self.ended:
            try:
                self.ended = tap.feed(piece)
            except Exception:  # noqa: BLE001 - a tap never raises; were it to, the traffic must not feel it
                self.tap = UNREAD_RESPONSE
        if not self.mute:
            if self.filter is not None:
                self._filter(self.filter.feed(piece))
            elif self._chunked:
                self.out += (b"%x\r\n" % size, piece, b"\r\n")
            else:
                self.out.append(piece)

    def on_message_complete(self) -> None:
        if self._interim:
            self._interim = False
        elif not self.done and not self.upgraded:
            self._finish()

    # -- leaves ----------------------------------------------------------------------------------

    def _filter(self, piece: bytes) -> None:
        """What is left of a piece; an empty chunk would end the body."""
        if piece:
            self.out.append(b"%x\r\n%b\r\n" % (len(piece), piece) if self._chunked else piece)

    def catch_up(self) -> None:
        """Let the reader go on in what it holds."""
        if self.tap is not None:
            try:
                self.ended = self.tap.feed(b"")
            except Exception:  # noqa: BLE001 - see `on_body`
                self.tap = UNREAD_RESPONSE

    def _finish(self) -> None:
        self.done = True
        if self.filter is not None and not self.mute:
            self._filter(self.filter.finish())
        if self._chunked and not self.mute:
            if self.trailers:
                kinds = self._rules.response_kinds
                lines = [b"%b: %b\r\n" % field for field in self.trailers if kinds[field[0]][0] not in OF_THE_HOP]
                self.out.append(b"0\r\n" + b"".join(lines) + b"\r\n")
            else:
                self.out.append(b"0\r\n\r\n")

    def _pass_interim(self, status: int) -> None:
        self._interims += 1
        if self._interims > INTERIM_MAX:
            raise _NotAResponse("too many interim answers")
        if self._parser is not None and not self._parser.should_keep_alive():
            self._closes = True
        if not self._http10 and not self.mute:  # HTTP/1.0 knows no 1xx
            kinds = self._rules.response_kinds
            fields = [field for field in self.fields if kinds[field[0]][0] not in FRAMING]  # it may speak of no body
            head = ResponseHead(self._rules, fields, status=status)
            self.out.append(b"HTTP/1.1 %d %b\r\n%b\r\n" % (status, self._reason, b"".join(head.parts)))
        self.fields = []
        self._reason = b""
        self._interim = True


def whole_chunks(data: bytes) -> list[bytes]:
    """What is in the chunks, where `data` is nothing but whole ones, each begun by nothing but its size; else, and
    where the last one (of no size) is among them, an empty list."""
    known = chunk_of_read(len(data))
    if known is not None and data.startswith(known[0]) and data.endswith(CRLF):
        return [data[known[2] : -len(CRLF)]]
    at, end, pieces = 0, len(data), []
    while at < end:
        size = _CHUNK_SIZE.match(data, at)
        if size is None:
            return []
        start = size.end()
        at = start + int(size[1], 16) + 2
        if at > end or at == start + 2 or data[at - 2 : at] != b"\r\n":
            return []
        pieces.append(data[start : at - 2])
    return pieces


def all_alike(data: bytes, likeness: Likeness) -> int:
    """How many bytes there are in the chunks, where `data` is nothing but whole ones of known sizes, and all are alike;
    else 0. What comes faster than it is passed on comes so."""
    end, start, size, rest = likeness.end, likeness.start, likeness.size, likeness.rest
    at, whole, body_bytes = 0, len(data), 0
    while at < whole:
        stop = data.find(end, at) + len(end)
        known = chunk_of_read(stop - at)
        if known is None:
            return 0
        line, inside, text = known
        text += at
        if not (data.startswith(line, at) and data.startswith(start, text) and rest(data, text + size, stop)):
            return 0
        body_bytes += inside
        at = stop
    return body_bytes


def _hold_nothing(pieces: list[bytes], skips: Skips) -> bool:
    """Whether the tap need not be fed these chunks: a few events of text that came together, mostly."""
    for piece in pieces:  # what goes on in the next one may be neither here nor there
        if not piece.endswith(skips.ends):
            return False
    body = b"".join(pieces)
    try:
        return len(body) <= skips.bytes_max and skips.nothing_in(body)
    except Exception:  # noqa: BLE001 - see `on_body`
        return False


def _in_a_chunk(nothing_in: Callable[[bytes], bool]) -> Callable[[bytes], bool]:
    """What looks at a piece, looking at the chunk around it."""

    def look(data: bytes) -> bool:
        return nothing_in(data[data.find(b"\n") + 1 : -len(CRLF)])

    return look


@cache
def _on_the_wire(ends: tuple[bytes, ...]) -> tuple[bytes, ...]:
    return tuple(end + CRLF for end in ends)


def know_read(data: bytes, size: int) -> None:
    """Note how a read of that length, which is one chunk of `size` bytes, begins: if it does so as others will."""
    if size <= CHUNK_BYTES_MAX:
        line = b"%x\r\n" % size
        if data.startswith(line):
            _KNOWN[len(data)] = (line, size, len(line))


class _NotAResponse(Exception):
    """Raised inside a parser callback; the text is ours and fixed."""


def _head_end(raw: bytes, start: int) -> tuple[int, int]:
    """Where the lines of the head end that begins there, and where what follows begins; 0: they do not."""
    while raw[start : start + 1] in (b"\r", b"\n"):  # ahead of a status line, where the parser passes over them too
        start += 1
    found = _HEAD_END.search(raw, start)
    return (0, 0) if found is None else (found.start(), found.end())


def one_length(lines: list[bytes]) -> list[bytes] | None:
    """The lines of a head, with one `Content-Length` where all that it says are the same; else None."""
    kept: list[bytes] = []
    length: bytes | None = None
    for line in lines:
        line = line.removesuffix(b"\r")
        name, colon, value = line.partition(b":")
        if not colon or name.lower() != b"content-length":
            kept.append(line)
            continue
        for said in value.split(b","):
            said = said.strip(b" \t")
            if not _LENGTH.match(said) or (length is not None and said != length):
                return None
            if length is None:
                length = said
                kept.append(b"%b: %b" % (name, said))
    return kept


def _is_about_length(error: BaseException) -> bool:
    """Whether the parser stopped at a length that it found twice, or in a list."""
    text = str(error)
    return "Content-Length" in text and "Transfer-Encoding" not in text


def _is_after_close(error: BaseException) -> bool:
    return "after `Connection: close`" in str(error)


def _why(error: BaseException) -> str:
    inner = error.__context__
    if isinstance(inner, _NotAResponse):
        return str(inner)
    text = str(error)  # one of the parser's constants
    if not text.isascii() or not text.isprintable() or len(text) > REASON_CHARS_MAX:
        return "the answer is not valid HTTP/1.1"
    return f"the answer is not valid HTTP/1.1: {text[:1].lower()}{text[1:]}"
