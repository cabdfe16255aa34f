"""Heads of plain messages, known by their lines: the short way of a call.

Nearly all heads that one client sends differ from the one before in a few lines only (a length, a trace id). So a head
is cut into lines, and each line is looked up. What a line means was worked out when it was first seen, and what a
whole head means (who pays, which route, how it is rewritten) when its *shape* was first seen: the careful rewriting
(`headers`) runs once for each shape, its bytes are compared with what comes out here, and a shape whose bytes differ is
never taken. The short way can therefore only forward what the careful way would have forwarded.

Many APIs are called with another target each time (`/orders/123`). Few things depend on it, so request lines that agree
in those count as one line, and what is forwarded and recorded of each is worked out for each (`Aim`).

A head that is like the one before it on its connection is read by the form of its shape at once (`plain_form`).

Only heads that leave nothing to be judged are plain: printable ASCII, every line ended by CRLF, `name: value` with one
space, one Host, one Content-Length at most, nothing about transfer codings of a request, upgrades, expectations or
trailers. For all others the result is None, and the careful way reads them from their first byte.

What is remembered is bounded, and holds header values (credentials too): it is never shown.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any, Final, Generic, NamedTuple, TypeVar

from sidecar.model.target import is_authority
from sidecar.proxy.plain_form import LENGTH_DIGITS_MAX, VALUE, Form, form_of

# What a line means here.
_PASS: Final = 0
_DROP: Final = 1  # hop-by-hop, and says nothing that matters
_LENGTH: Final = 2
_HOST: Final = 3
_CLOSE: Final = 4
_CHUNKED: Final = 5
_TRACE: Final = 6
_KEEP_ALIVE: Final = 7  # the upstream's hint of how long it keeps the connection
_FIRST: Final = 8  # the request or status line
_CODED: Final = 12  # the content, by gzip
_FORWARDED: Final = {b"x-forwarded-for": 9, b"x-forwarded-proto": 10, b"x-forwarded-host": 11}

LINES_MAX: Final = 4_096  # remembered lines
LINES_BYTES_MAX: Final = 2 << 20  # and their bytes: tokens in fields reach some kB
RECENT_MAX: Final = 512  # remembered lines that are known by their names
RECENT_BYTES_MAX: Final = 64  # of each
NAMES_MAX: Final = 2_048
AIMED_MAX: Final = 2_048  # remembered request lines
AIMED_BYTES_MAX: Final = 512 << 10  # and their bytes
SHAPES_MAX: Final = 2_048
FORM_AFTER = 100  # heads of a shape: its form takes half a millisecond to make
FORM_BYTES_MAX: Final = 4_096  # of a head that gets one: it takes eight times as much
PEERS_MAX: Final = 256  # endings of a head that are remembered for each shape
HEAD_BYTES_MAX: Final = 16_384  # a longer head is not plain
FIELDS_MAX: Final = 100
VALUES_MAX: Final = 64  # so many different values make a field one that is known by its name alone

_HEAD_END: Final = b"\r\n\r\n"
_VALUE: Final = re.compile(VALUE)
_NAME: Final = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]{1,256}")
_REQUEST_LINE: Final = re.compile(rb"(GET|POST|PUT|PATCH|DELETE) (/[!\"$-~]*) HTTP/1\.1")
_STATUS_LINE: Final = re.compile(rb"HTTP/1\.1 ([2-5][0-9][0-9]) [ -~]*")
_COME_AGAIN: Final = frozenset({b"Date", b"date"})
_BODILESS: Final = frozenset({204, 304})

# Never plain: what they ask for is the careful way's to judge. (Both parsers read `Proxy-Connection` as `Connection`.)
_CAREFUL_REQUEST: Final = frozenset(
    {
        b"transfer-encoding", b"upgrade", b"expect", b"te", b"trailer", b"http2-settings", b"proxy-authorization",
        b"proxy-authenticate", b"proxy-connection",
    }
)  # fmt: skip
_CAREFUL_RESPONSE: Final = frozenset(
    {b"upgrade", b"trailer", b"te", b"proxy-connection", b"location", b"content-location", b"refresh"}
)
# Their value is another one for each call, and says nothing of what the call is.
_VOLATILE: Final = frozenset(
    {
        b"traceparent", b"tracestate", b"idempotency-key", b"x-request-id", b"x-correlation-id", b"x-amzn-trace-id",
        b"cookie", b"if-none-match", b"x-client-request-id", b"forwarded", b"via", b"x-real-ip",
    }
)  # fmt: skip

_Facts = TypeVar("_Facts")


@dataclass(slots=True)
class Shape(Generic[_Facts]):
    """What heads that differ in volatile lines only have in common.

    The places are those of lines in the head, 0 for none (there stands the request or status line).
    """

    number: int
    heads: object  # whose shape it is
    facts: _Facts  # what the owner worked out when it saw the first one
    added: list[bytes]  # what is forwarded in the place of other lines; and nothing, so that the last one is ended
    places: tuple[int, ...]  # what is forwarded, out of a head's lines and `added`
    sent: Callable[[list[bytes]], tuple[bytes, ...]]  # takes it
    length_at: int
    length_from: int  # where the value stands in that line
    trace_at: int  # of `traceparent`
    trace_from: int
    beside_at: int  # of `X-Forwarded-For` or `Keep-Alive`
    beside_from: int
    close: bool
    chunked: bool
    coded: bool
    endings: dict[object, bytes] = field(default_factory=dict)  # peer -> what is sent behind the message's own lines
    # Where the request says for whom it is forwarded: the places of chain, scheme and host, and of its own host; and by
    # peer what stands around what is said of that.
    forwarded: tuple[int, ...] = ()
    around: dict[object, tuple[bytes, bytes]] = field(default_factory=dict)
    aimed: bool = False  # whether its request lines are others than that of `facts`
    uses: int = 0  # heads that were read without a form
    form: Form | None = None

    def own(self, lines: list[bytes]) -> bytes:
        """What is forwarded of a head itself, each line ended."""
        return b"\r\n".join(self.sent(lines + self.added))


PlainMessage = tuple[Shape[_Facts], bytes, bytes, bytes, int, "Aimed | None", bytes, bytes]
"""(shape, what is forwarded, head up to its empty line, body, bytes of the body that are still to come or `CHUNKED`,
what is its own of a request's target, `traceparent`, whom a request was forwarded for or how long the upstream keeps
its connection): a message whose head is whole and understood. The body is what has come of it; where it is chunked,
with its framing. The last two are empty where nothing is said. A bare tuple: each is taken apart where it is made, and
a class with names would cost a call more."""
CHUNKED: Final = -1

_Fields = list[tuple[bytes, bytes]]


class Aimed(NamedTuple):
    """What is a target's own."""

    line: bytes  # the request line that goes upstream
    url: str  # as a record says it
    target: str  # as whoever takes the call knows it


_WITH_CARE: Final = Aimed(b"", "", "")


class _NotPlain(Exception):
    """A line that the careful way must judge."""


class _Numbers(dict[bytes, int]):
    """The numbers of lines that are remembered, and checked. One that is not is judged when it is looked up, which
    raises `_NotPlain`."""

    def __init__(self, learn: Callable[[bytes], int]) -> None:
        super().__init__()
        self._learn = learn
        self.passing: dict[bytes, int] = {}  # by name: fields of which each line is another one, a trace, an id

    def __missing__(self, line: bytes) -> int:
        name, _, value = line.partition(b": ")
        number = self.passing.get(name)
        if number is not None and _VALUE.fullmatch(value) is not None:
            return number
        return self._learn(line)


class _Heads(Generic[_Facts]):
    """The lines, names and shapes that one direction knows.

    Each line has a number: its own, or that of its name where values say nothing of what a message is. The numbers of a
    head's lines are its shape, and everything else follows from that.
    """

    def __init__(
        self,
        *,
        first: re.Pattern[bytes],
        careful: frozenset[bytes],
        by_value: bool,
        matters: frozenset[bytes],
        sights: int,
        head_bytes_max: int,
        fields_max: int,
    ) -> None:
        """`first`: a plain request or status line; no field's line is one. `careful`: fields of heads that are not
        plain. `by_value`: whether any field's value makes another shape, or only that of those in `matters`, which
        always do. `sights`: how often a shape is seen before it is learned, which costs what a few calls do and is
        wasted on one that does not come again; until then it is not plain."""
        self._first = first
        self._careful = careful
        self._by_value = by_value
        self._matters = matters
        self._sights = sights
        self._head_bytes_max = min(head_bytes_max, HEAD_BYTES_MAX)
        self._fields_max = min(fields_max, FIELDS_MAX)
        self._lines = _Numbers(self._number)
        self._number_of = self._lines.__getitem__
        self._firsts: dict[bytes, int] = {}  # request and status lines, where there are too many for `_lines`
        self.aimed: dict[bytes, Aimed] = {}  # by request line, those of `_lines` that share their number with others
        self._recent: list[bytes] = []  # of `_lines`: known by their names, and come again soon, as a length or a date
        self._lines_bytes = 0
        self._names: dict[bytes, tuple[int, int, bool]] = {}  # meaning, number, whether it is known by its name alone
        self._values: dict[bytes, int] = {}  # name -> different values seen
        self._meanings: dict[int, tuple[int, bytes | None]] = {}  # by number; the line that is forwarded in its place
        self._shapes: dict[tuple[int, ...], Shape[_Facts] | None] = {}
        self._glimpsed: dict[tuple[int, ...], int] = {}
        self._next_id = 0
        self._next_shape = 0
        self._dropped = frozenset({_DROP, _CLOSE, _KEEP_ALIVE})  # meanings of lines that are not forwarded

    def forget(self) -> None:
        """Start anew; numbers are never used twice."""
        self._lines.clear()
        self._lines.passing.clear()
        self._firsts.clear()
        self.aimed.clear()
        self._recent.clear()
        self._lines_bytes = 0
        self._names.clear()
        self._values.clear()
        self._meanings.clear()
        self._forget_shapes()
        self._glimpsed.clear()

    def _forget_shapes(self) -> None:
        """What holds one for longer (a connection, which may be idle for hours) is to hold nothing large."""
        for shape in self._shapes.values():
            if shape is not None:
                shape.form = None
        self._shapes.clear()

    def _id(self, meaning: int, wire: bytes | None = None) -> int:
        self._next_id += 1
        self._meanings[self._next_id] = (meaning, wire)
        return self._next_id

    def read(self, data: bytes, peer: object = None, like: Shape[_Facts] | None = None) -> PlainMessage[_Facts] | None:
        """The message that `data` begins, and nothing behind it; None: it is none, or not plain. `peer`: whose
        connection it came on; what is sent behind the head's own lines is worked out once for each. `like`: what it is
        likely to be."""
        if like is None or like.form is None:
            return self._look_up(data, peer)
        return self._by_form(like, like.form, data, peer) or self._look_up(data, peer)

    def _look_up(self, data: bytes, peer: object) -> PlainMessage[_Facts] | None:
        """As `read`. One function, because it runs twice in many calls: all that can be said of a line was said when it
        was learned, so that a head is checked by being found."""
        head, end, body = data.partition(_HEAD_END)
        if not end or len(head) > self._head_bytes_max:
            return None
        lines = head.split(b"\r\n", self._fields_max)  # of too many, what is left is one line that cannot be plain
        try:
            key = tuple(map(self._number_of, lines))
        except _NotPlain:
            return None
        shape = self._shapes.get(key)
        if shape is None:
            if not self._meanings.keys() >= {*key}:
                return self._look_up(data, peer)  # all was forgotten while its lines were looked up
            shape = self._new_shape(key, lines, peer)
            if shape is None:
                return None
        if shape.length_at:
            left = int(lines[shape.length_at][shape.length_from :]) - len(body)
            if left < 0:
                return None
        elif shape.chunked:
            left = CHUNKED
        elif body:
            return None
        else:
            left = 0
        ending = shape.endings.get(peer)
        if ending is None:
            ending = self._learn_ending(shape, lines, peer)
            if ending is None:
                self._shapes[key] = None
                return None
        aimed = None
        if shape.aimed:
            aimed = self.aimed[lines[0]]
            lines[0] = aimed.line
        trace = lines[shape.trace_at][shape.trace_from :] if shape.trace_at else b""
        beside = lines[shape.beside_at][shape.beside_from :] if shape.beside_at else b""
        read = shape, shape.own(lines) + ending + body, head, body, left, aimed, trace, beside
        shape.uses += 1
        if shape.uses == FORM_AFTER and len(head) <= FORM_BYTES_MAX:
            self._learn_form(key, read, data, peer)
        return read

    def _by_form(self, shape: Shape[_Facts], form: Form, data: bytes, peer: object) -> PlainMessage[_Facts] | None:
        """As `read`, where that is a head of this shape; None: it is to be looked up."""
        match = form.match(data)
        if match is None or shape.heads is not self:
            return None
        end = match.end()
        body = data[end:]
        values = match.groups()
        aimed = None
        if form.first:
            line = values[0]
            if self._lines.get(line) != form.first:
                return None
            aimed = self.aimed[line]
            values = (aimed.line, *values[1:])
        if form.length >= 0:
            left = int(values[form.length]) - len(body)
        elif shape.chunked:
            left = CHUNKED
        else:
            left = -len(body)  # there is none
        ending = self._told_ending(shape, form, values, peer) if form.told else shape.endings.get(peer)
        if ending is None or (left < 0 and not shape.chunked) or end > self._head_bytes_max + 4:
            return None
        return (
            shape,
            form.wire % (*values, ending, body),
            data[: end - 4],
            body,
            left,
            aimed,
            form.trace_said if form.trace < 0 else values[form.trace],
            form.beside_said if form.beside < 0 else values[form.beside],
        )

    def _learn_form(self, key: tuple[int, ...], read: PlainMessage[_Facts], data: bytes, peer: object) -> None:
        """Of a shape that is in use. It is kept where it reads this head as it was read without it."""
        shape, lines = read[0], read[2].split(b"\r\n")
        names = [self._names.get(line.partition(b": ")[0]) for line in lines]
        loose = [at for at, known in enumerate(names) if known is not None and known[1:] == (key[at], True)]
        form = form_of(
            lines,
            loose=loose,
            sent=shape.places,
            added=shape.added,
            first=key[0] if shape.aimed else 0,
            length_at=shape.length_at,
            trace_at=shape.trace_at,
            beside_at=shape.beside_at,
            told_at=self._told_at(shape),
        )
        if self._by_form(shape, form, data, peer) == read:
            shape.form = form

    def _told_at(self, shape: Shape[_Facts]) -> tuple[int, ...]:
        """The places of what its ending is made of, in each head anew."""
        return ()

    def _told_ending(self, shape: Shape[_Facts], form: Form, values: Sequence[bytes], peer: object) -> bytes | None:
        """Of a head whose ending is made anew; None: it is to be looked up."""
        raise NotImplementedError

    def _new_shape(self, key: tuple[int, ...], lines: list[bytes], peer: object) -> Shape[_Facts] | None:
        """Of a head that is not known, if it is to be known now."""
        if key in self._shapes or not self._glimpse(key):
            return None
        return self._learn_shape(key, lines, peer)

    def _learn_shape(self, key: tuple[int, ...], lines: list[bytes], peer: object) -> Shape[_Facts] | None:
        raise NotImplementedError

    def _learn_ending(
        self, shape: Shape[_Facts], lines: list[bytes], peer: object, wire: bytes | None = None
    ) -> bytes | None:
        """For a peer that has sent none of these. `wire`: as the careful way would forward it, where that is known."""
        raise NotImplementedError

    def _number(self, line: bytes) -> int:
        """Of a line that is not remembered. Raises `_NotPlain`."""
        id_: int | None
        if line.partition(b": ")[0] in self._names:
            id_ = self._learn(line)
        else:
            id_ = self._firsts.get(line)
            if id_ is None:
                id_ = self._learn_first(line) if self._first.fullmatch(line) else self._learn(line)
        if id_ is None:
            raise _NotPlain
        return id_

    def _learn_first(self, line: bytes) -> int | None:
        raise NotImplementedError

    def _keep_first(self, line: bytes, wire: bytes | None) -> int:
        id_ = self._id(_FIRST, wire)
        if self._kept < LINES_MAX // 2:
            self._lines[line] = id_
            self._lines_bytes += len(line)
            return id_
        if len(self._firsts) >= LINES_MAX:
            self.forget()
            return self._keep_first(line, wire)
        self._firsts[line] = id_
        return id_

    @property
    def _kept(self) -> int:
        """Lines that are remembered for good."""
        return len(self._lines) - len(self._recent) - len(self.aimed)

    def _again(self, line: bytes, name_id: int) -> int:
        """Remember a line that is known by its name and comes again soon: a length, a date."""
        if len(self._recent) >= RECENT_MAX:
            for old in self._recent:
                del self._lines[old]
            self._recent.clear()
        if len(line) <= RECENT_BYTES_MAX:
            self._lines[line] = name_id
            self._recent.append(line)
        return name_id

    def _learn(self, line: bytes) -> int | None:
        """The number of a line that is not remembered; None: it is not plain."""
        name, colon, value = line.partition(b": ")
        known = self._names.get(name)
        if known is None:
            known = self._learn_name(name)
            if known is None:
                return None
        meaning, name_id, by_name = known
        if not colon or ((value or by_name) and _VALUE.fullmatch(value) is None):
            return None
        if meaning == _LENGTH:
            return self._again(line, name_id) if value.isdigit() and len(value) <= LENGTH_DIGITS_MAX else None
        if by_name:
            if name in _COME_AGAIN:
                return self._again(line, name_id)
            self._lines.passing[name] = name_id
            return name_id
        return self._learn_value(line, name, value, meaning, name_id)

    def _learn_value(self, line: bytes, name: bytes, value: bytes, meaning: int, name_id: int) -> int | None:
        low = name.lower()
        wire: bytes | None = None
        if low == b"connection":
            token = value.lower()
            if token == b"close":
                meaning = _CLOSE
            elif token != b"keep-alive":
                return None
        elif meaning in (_CHUNKED, _CODED):
            if value.lower() != (b"chunked" if meaning == _CHUNKED else b"gzip"):
                return None
        elif meaning == _HOST:
            if not is_authority(value):
                return None
            wire = self._host(name, value)
        seen = self._values[low] = self._values.get(low, 0) + 1
        if seen > VALUES_MAX and low not in self._matters:
            self._names[name] = (meaning, name_id, True)
            return name_id
        if self._kept >= LINES_MAX - RECENT_MAX or self._lines_bytes > LINES_BYTES_MAX:
            self.forget()
            return self._learn(line)
        id_ = self._id(meaning, wire) if self._by_value or low in self._matters else name_id
        self._lines[line] = id_
        self._lines_bytes += len(line)
        return id_

    def _learn_name(self, name: bytes) -> tuple[int, int, bool] | None:
        low = name.lower()
        if low in self._careful or _NAME.fullmatch(name) is None:
            return None
        if len(self._names) >= NAMES_MAX:
            self.forget()
        meaning, by_name = self._meaning(low)
        known = self._names[name] = (meaning, self._id(meaning), by_name)
        return known

    def _meaning(self, low: bytes) -> tuple[int, bool]:
        """What a field means, and whether it is known by its name alone."""
        raise NotImplementedError

    def _host(self, name: bytes, value: bytes) -> bytes:
        raise NotImplementedError

    def _glimpse(self, key: tuple[int, ...]) -> bool:
        """Whether a shape that is not known was seen often enough to be learned now."""
        sights = self._glimpsed.pop(key, 0) + 1
        if sights >= self._sights:
            return True
        if len(self._glimpsed) >= SHAPES_MAX:
            self._glimpsed.clear()
        self._glimpsed[key] = sights
        return False

    def _rewriting(self, key: tuple[int, ...], lines: list[bytes]) -> tuple[dict[int, bytes], set[int]]:
        """By place: lines that are forwarded as another one, and those that are not forwarded."""
        changed: dict[int, bytes] = {}
        dropped: set[int] = set()
        for at, id_ in enumerate(key):
            meaning, wire = self._meanings[id_]
            if meaning in self._dropped:
                dropped.add(at)
            elif wire is not None and wire != lines[at]:
                changed[at] = wire
        return changed, dropped

    def _shape(
        self, key: tuple[int, ...], lines: list[bytes], facts: _Facts, changed: dict[int, bytes], dropped: set[int]
    ) -> Shape[_Facts]:
        """A new shape, of which nothing is checked yet."""
        at_by_meaning = {self._meanings[id_][0]: at for at, id_ in enumerate(key)}
        in_place_of = {at: len(lines) + number for number, at in enumerate(changed)}
        end = len(lines) + len(changed)
        places = (*(in_place_of.get(at, at) for at in range(len(lines)) if at not in dropped), end)

        def value(meaning: int) -> tuple[int, int]:
            at = at_by_meaning.get(meaning, 0)
            return at, lines[at].find(b": ") + 2

        length_at, length_from = value(_LENGTH)
        trace_at, trace_from = value(_TRACE)
        told = [at_by_meaning.get(meaning, 0) for meaning in _FORWARDED.values()]
        beside_at, beside_from = value(_FORWARDED[b"x-forwarded-for"] if any(told) else _KEEP_ALIVE)
        self._next_shape += 1
        return Shape(
            number=self._next_shape,
            heads=self,
            facts=facts,
            added=[*changed.values(), b""],
            places=places,
            sent=itemgetter(*places),
            length_at=length_at,
            length_from=length_from,
            trace_at=trace_at,
            trace_from=trace_from,
            beside_at=beside_at,
            beside_from=beside_from,
            close=_CLOSE in at_by_meaning,
            chunked=_CHUNKED in at_by_meaning,
            coded=_CODED in at_by_meaning,
            forwarded=(*told, at_by_meaning.get(_HOST, 0)) if any(told) else (),
        )

    def _meant(self, key: tuple[int, ...]) -> Counter[int]:
        """How many lines of each meaning there are; none where it does not begin as a message does."""
        meant = Counter(self._meanings[id_][0] for id_ in key)
        if self._meanings[key[0]][0] != _FIRST or meant[_FIRST] != 1:
            return Counter()  # no message
        return meant

    def _remember(self, key: tuple[int, ...], shape: Shape[_Facts] | None) -> Shape[_Facts] | None:
        """None: such heads are read with care."""
        if len(self._shapes) >= SHAPES_MAX:
            self._forget_shapes()
        self._shapes[key] = shape
        return shape


def _fields(lines: list[bytes]) -> _Fields:
    return [(name, value) for name, _, value in (line.partition(b": ") for line in lines)]


Describe = Callable[[str, str, _Fields, "object"], "tuple[_Facts, bytes] | None"]
"""(method, target, fields, peer) -> (what the head means, the bytes that the careful way would forward: request line,
fields, what the proxy adds, empty line), or None for a head that is to be read with care."""
Aim = Callable[[str, str], "tuple[Hashable, Aimed] | None"]
"""(method, target) -> (a key, equal for two targets where a head means the same with either, but for what `Aimed` says;
and that), or None for a target that is to be read with care, whatever the fields are."""
Forward = Callable[[Any, "bytes | None", "bytes | None", "bytes | None", bytes], bytes]
"""(peer, chain, scheme and host that the request was forwarded with, its own host) -> the lines that say so
upstream."""


class PlainRequests(_Heads[_Facts]):
    """Requests of a kind that was seen before."""

    def __init__(
        self,
        *,
        describe: Describe[_Facts],
        aim: Aim | None = None,
        authority: bytes | None,
        base: bytes,
        matters: frozenset[bytes],
        head_bytes_max: int = HEAD_BYTES_MAX,
        fields_max: int = FIELDS_MAX,
        target_bytes_max: int = HEAD_BYTES_MAX,
        sights: int = 1,
        not_passed: Callable[[_Facts], frozenset[bytes]] | None = None,
        forward: Forward | None = None,
        joined: frozenset[bytes] = frozenset(),
    ) -> None:
        """`aim`: None: what depends on a target is not known by it alone, and each is a kind of its own. `authority`:
        what the upstream is told as `Host`; None: what the client said. `base`: the upstream URL's path. `matters`:
        names (lower case) of fields whose value decides what is recorded: who pays, dimensions.
        `not_passed`: of one of several upstreams, the names (lower case) of fields that it is not sent; None: there is
        one upstream. Of several, request line and `Host` of a shape are taken from what the careful way wrote.
        `forward`: what is made of `X-Forwarded-*`; None: they are passed on. `joined`: names (lower case) of fields to
        whose values ours is added: a request that has one is not plain."""
        matters |= {b"user-agent", b"content-type", b"content-encoding", b"host", b"connection"}
        super().__init__(
            first=_REQUEST_LINE,
            careful=_CAREFUL_REQUEST | joined,
            by_value=True,
            matters=matters,
            sights=sights,
            head_bytes_max=head_bytes_max,
            fields_max=fields_max,
        )
        self._describe = describe
        self._aim = aim
        self._kinds: dict[Hashable, int] = {}  # numbers of request lines, by the key of their targets
        self._aimed_bytes = 0
        self._authority = authority
        self._base = base
        self._not_passed = not_passed
        self._forward = forward
        if forward is not None:
            self._dropped |= frozenset(_FORWARDED.values())
        self._target_bytes_max = target_bytes_max

    def _learn_first(self, line: bytes) -> int | None:
        match = _REQUEST_LINE.fullmatch(line)
        if match is None or len(match[2]) > self._target_bytes_max:
            return None
        if self._aim is None:
            return self._keep_first(line, b"%b %b%b HTTP/1.1" % (match[1], self._base, match[2]))
        kind, aimed = self._aim(match[1].decode(), match[2].decode()) or (None, _WITH_CARE)
        number = self._kinds.get(kind)
        if number is None:
            if len(self._kinds) >= NAMES_MAX:
                self.forget()
            number = self._kinds[kind] = self._id(_FIRST)
        if len(self.aimed) >= AIMED_MAX or self._aimed_bytes > AIMED_BYTES_MAX:
            for old in self.aimed:
                del self._lines[old]
            self.aimed.clear()
            self._aimed_bytes = 0
        self._lines[line] = number
        self.aimed[line] = aimed
        self._aimed_bytes += len(line) + sum(map(len, aimed))
        return number

    def forget(self) -> None:
        super().forget()
        self._kinds.clear()
        self._aimed_bytes = 0

    def _learn_shape(self, key: tuple[int, ...], lines: list[bytes], peer: object) -> Shape[_Facts] | None:
        meant = self._meant(key)
        # What comes behind a request that closes, and what may occur twice, is the careful way's to judge.
        once = len({line.partition(b":")[0].lower() for line in lines[1:]}) == len(lines) - 1
        if meant[_HOST] != 1 or meant[_CLOSE] or not once:
            return self._remember(key, None)
        with_care = self._aim is not None and self.aimed[lines[0]] is _WITH_CARE
        described = None if with_care else self._described(lines, peer)
        if described is None:
            return self._remember(key, None)
        changed, dropped = self._rewriting(key, lines)
        if self._not_passed is not None:
            self._send_elsewhere(changed, dropped, lines, described[1], self._not_passed(described[0]))
        shape = self._shape(key, lines, described[0], changed, dropped)
        shape.aimed = self._aim is not None
        ending = self._learn_ending(shape, lines, peer, described[1])
        return self._remember(key, None if ending is None else shape)

    def _send_elsewhere(
        self,
        changed: dict[int, bytes],
        dropped: set[int],
        lines: list[bytes],
        wire: bytes,
        not_passed: frozenset[bytes],
    ) -> None:
        """Both lines that choose an upstream are told apart by their values, so they belong to the shape."""
        names = [line.partition(b":")[0].lower() for line in lines]
        host_at = names.index(b"host", 1)
        sent = wire.split(b"\r\n")
        hosts = [line for line in sent[1:] if line.partition(b":")[0].lower() == b"host"]
        changed.pop(host_at, None)
        if self._aim is None:
            changed[0] = sent[0]
        if hosts:
            changed[host_at] = hosts[0]
        dropped |= {at for at, name in enumerate(names) if at and name in not_passed}

    def _learn_ending(
        self, shape: Shape[_Facts], lines: list[bytes], peer: object, wire: bytes | None = None
    ) -> bytes | None:
        if shape.forwarded and self._forward is not None:
            return self._forwarded(shape, lines, peer, self._forward, wire)
        ending = self._ending(shape, lines, peer, wire)
        if ending is not None:
            if len(shape.endings) >= PEERS_MAX:
                shape.endings.clear()
            shape.endings[peer] = ending
        return ending

    def _told_at(self, shape: Shape[_Facts]) -> tuple[int, ...]:
        return () if self._forward is None else shape.forwarded

    def _told_ending(self, shape: Shape[_Facts], form: Form, values: Sequence[bytes], peer: object) -> bytes | None:
        around = shape.around.get(peer)
        if around is None or self._forward is None:
            return None
        chain, scheme, named_host, host = [values[at] if at >= 0 else said for at, said in form.told]
        return around[0] + self._forward(peer, chain, scheme, named_host, host or b"") + around[1]

    def _forwarded(
        self, shape: Shape[_Facts], lines: list[bytes], peer: object, forward: Forward, wire: bytes | None
    ) -> bytes | None:
        """What is sent behind the own lines of a request that was forwarded before: another one for each client."""
        values = [lines[at].partition(b": ")[2] if at else None for at in shape.forwarded]
        chain, scheme, named_host, host = values
        said = forward(peer, chain, scheme, named_host, host or b"")
        around = shape.around.get(peer)
        if around is None:
            ending = self._ending(shape, lines, peer, wire)
            if ending is None:
                return None
            before, found, after = ending.rpartition(said)
            if not found:
                return None
            if len(shape.around) >= PEERS_MAX:
                shape.around.clear()
            around = shape.around[peer] = before, after
        return around[0] + said + around[1]

    def _ending(self, shape: Shape[_Facts], lines: list[bytes], peer: object, wire: bytes | None) -> bytes | None:
        """As the careful way has it; None where that forwards other lines."""
        if wire is None:
            described = self._described(lines, peer)
            wire = b"" if described is None else described[1]
        own = shape.own([self.aimed[lines[0]].line, *lines[1:]] if shape.aimed else lines)
        return wire[len(own) :] if wire.startswith(own) else None

    def _described(self, lines: list[bytes], peer: object) -> tuple[_Facts, bytes] | None:
        method, target, _ = lines[0].decode().split(" ")
        return self._describe(method, target, _fields(lines[1:]), peer)

    def _meaning(self, low: bytes) -> tuple[int, bool]:
        if low == b"content-length":
            return _LENGTH, True
        if low == b"host":
            return _HOST, False
        if low == b"connection":
            return _DROP, False
        if low == b"keep-alive":
            return _DROP, True
        if low == b"traceparent":
            return _TRACE, low not in self._matters
        if low in _FORWARDED:
            return _FORWARDED[low], low not in self._matters
        return _PASS, low in _VOLATILE and low not in self._matters

    def _host(self, name: bytes, value: bytes) -> bytes:
        return b"%b: %b" % (name, value if self._authority is None else self._authority)


DescribeResponse = Callable[[int, _Fields], "tuple[_Facts, bytes] | None"]
"""(status, fields) -> (what the head means, the fields' lines that the careful way would forward)."""


class PlainResponses(_Heads[_Facts]):
    """Responses of a kind that was seen before. Only values that say how a body is read make another shape. One whose
    end is the connection's is not plain."""

    def __init__(
        self, *, describe: DescribeResponse[_Facts], dropped: frozenset[bytes] = frozenset(), sights: int = 1
    ) -> None:
        """`dropped`: names (lower case) that are ours to send: a response that has one is not plain."""
        matters = frozenset({b"content-type", b"content-encoding", b"transfer-encoding", b"connection"})
        super().__init__(
            first=_STATUS_LINE,
            careful=_CAREFUL_RESPONSE | dropped,
            by_value=False,
            matters=matters,
            sights=sights,
            head_bytes_max=HEAD_BYTES_MAX,
            fields_max=FIELDS_MAX,
        )
        self._describe = describe

    def _learn_ending(
        self, shape: Shape[_Facts], lines: list[bytes], peer: object, wire: bytes | None = None
    ) -> bytes | None:
        raise AssertionError("a response is the same for all peers")

    def _learn_first(self, line: bytes) -> int | None:
        match = _STATUS_LINE.fullmatch(line)
        return None if match is None or int(match[1]) in _BODILESS else self._keep_first(line, None)

    def _learn_shape(self, key: tuple[int, ...], lines: list[bytes], peer: object) -> Shape[_Facts] | None:
        meant = self._meant(key)
        if meant[_LENGTH] + meant[_CHUNKED] != 1:  # two framings, or up to the end of the connection
            return self._remember(key, None)
        described = self._describe(int(lines[0][9:12]), _fields(lines[1:]))
        if described is None:
            return self._remember(key, None)
        shape = self._shape(key, lines, described[0], *self._rewriting(key, lines))
        own = shape.own(lines)[len(lines[0]) + 2 :]
        if not described[1].startswith(own):
            return self._remember(key, None)
        shape.endings[peer] = described[1][len(own) :] + b"\r\n"
        return self._remember(key, shape)

    def _meaning(self, low: bytes) -> tuple[int, bool]:
        if low == b"content-length":
            return _LENGTH, True
        if low == b"transfer-encoding":
            return _CHUNKED, False
        if low == b"content-encoding":
            return _CODED, False
        if low == b"connection":
            return _DROP, False
        if low == b"keep-alive":
            return _KEEP_ALIVE, True
        return _PASS, low in _VOLATILE or low in (b"date", b"set-cookie")

    def _host(self, name: bytes, value: bytes) -> bytes:
        raise AssertionError("a response has no Host")
