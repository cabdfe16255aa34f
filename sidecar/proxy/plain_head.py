"""Heads of plain messages, known by their lines: the short way of a call.

Nearly all heads that one client sends differ from the one before in a few lines only (a length, a trace id). So a head
is cut into lines, and each line is looked up. What a line means was worked out when it was first seen, and what a
whole head means (who pays, which route, how it is rewritten) when its *shape* was first seen: the careful rewriting
(`headers`) runs once for each shape, its bytes are compared with what comes out here, and a shape whose bytes differ is
never taken. The short way can therefore only forward what the careful way would have forwarded.

Many APIs are called with another target each time (`/orders/123`). Few things depend on it, so request lines that agree
in those count as one line, and what is forwarded and recorded of each is worked out for each (`plain_requests.Aim`).

A head that is like the one before it on its connection is read by the form of its shape at once (`plain_form`).

Only heads that leave nothing to be judged are plain: printable ASCII, every line ended by CRLF, `name: value` with one
space, one Host, one Content-Length at most, nothing about transfer codings of a request, upgrades, expectations or
trailers. For all others the result is None, and the careful way reads them from their first byte.

What is remembered is bounded, and holds header values (credentials too): it is never shown.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from operator import itemgetter
from typing import Final, Generic, NamedTuple, TypeVar

from sidecar.model.target import is_authority
from sidecar.proxy.plain_form import LENGTH_DIGITS_MAX, VALUE, Form, form_of

LINES_MAX: Final = 4_096  # remembered lines
LINES_BYTES_MAX: Final = 2 << 20  # and their bytes: tokens in fields reach some kB
RECENT_MAX: Final = 512  # remembered lines that are known by their names
RECENT_BYTES_MAX: Final = 64  # of each
NAMES_MAX: Final = 2_048
SHAPES_MAX: Final = 2_048
FORM_AFTER = 100  # heads of a shape: its form takes half a millisecond to make. Not Final: tests make it small
FORM_BYTES_MAX: Final = 4_096  # of a head that gets one: it takes eight times as much
PEERS_MAX: Final = 256  # endings of a head that are remembered for each shape
HEAD_BYTES_MAX: Final = 16_384  # a longer head is not plain
FIELDS_MAX: Final = 100
VALUES_MAX: Final = 64  # so many different values make a field one that is known by its name alone

_HEAD_END: Final = b"\r\n\r\n"
_VALUE: Final = re.compile(VALUE)
_NAME: Final = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]{1,256}")
_COME_AGAIN: Final = frozenset({b"Date", b"date"})
# Their value is another one for each call, and says nothing of what the call is.
VOLATILE: Final = frozenset(
    {
        b"traceparent", b"tracestate", b"idempotency-key", b"x-request-id", b"x-correlation-id", b"x-amzn-trace-id",
        b"cookie", b"if-none-match", b"x-client-request-id", b"forwarded", b"via", b"x-real-ip",
    }
)  # fmt: skip

Facts = TypeVar("Facts")


class Meaning(IntEnum):
    """What a line says."""

    PASS = 0
    DROP = 1  # hop-by-hop, and nothing that matters
    LENGTH = 2
    HOST = 3
    CLOSE = 4
    CHUNKED = 5
    TRACE = 6
    KEEP_ALIVE = 7  # the upstream's hint of how long it keeps the connection
    FIRST = 8  # the request or status line
    FORWARDED_FOR = 9
    FORWARDED_PROTO = 10
    FORWARDED_HOST = 11
    CODED = 12  # the content, by gzip


FORWARDED: Final = {
    b"x-forwarded-for": Meaning.FORWARDED_FOR,
    b"x-forwarded-proto": Meaning.FORWARDED_PROTO,
    b"x-forwarded-host": Meaning.FORWARDED_HOST,
}


@dataclass(slots=True)
class Shape(Generic[Facts]):
    """What heads that differ in volatile lines only have in common.

    The places are those of lines in the head, 0 for none (there stands the request or status line).
    """

    number: int
    heads: object  # whose shape it is
    facts: Facts  # what the owner worked out when it saw the first one
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


PlainMessage = tuple[Shape[Facts], bytes, bytes, bytes, int, "Aimed | None", bytes, bytes]
"""(shape, what is forwarded, head up to its empty line, body, bytes of the body that are still to come or `CHUNKED`,
what is its own of a request's target, `traceparent`, whom a request was forwarded for or how long the upstream keeps
its connection): a message whose head is whole and understood. The body is what has come of it; where it is chunked,
with its framing. The last two are empty where nothing is said. A bare tuple: each is taken apart where it is made, and
a class with names would cost a call more."""
CHUNKED: Final = -1

Fields = list[tuple[bytes, bytes]]


class Aimed(NamedTuple):
    """What is a target's own."""

    line: bytes  # the request line that goes upstream
    url: str  # as a record says it
    target: str  # as whoever takes the call knows it


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


class Heads(Generic[Facts]):
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
        self._shapes: dict[tuple[int, ...], Shape[Facts] | None] = {}
        self._glimpsed: dict[tuple[int, ...], int] = {}
        self._next_id = 0
        self._next_shape = 0
        self._dropped = frozenset(
            {Meaning.DROP, Meaning.CLOSE, Meaning.KEEP_ALIVE}
        )  # meanings of lines that are not forwarded

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

    def read(self, data: bytes, peer: object = None, like: Shape[Facts] | None = None) -> PlainMessage[Facts] | None:
        """The message that `data` begins, and nothing behind it; None: it is none, or not plain. `peer`: whose
        connection it came on; what is sent behind the head's own lines is worked out once for each. `like`: what it is
        likely to be."""
        if like is None or like.form is None:
            return self._look_up(data, peer)
        return self._by_form(like, like.form, data, peer) or self._look_up(data, peer)

    def _look_up(self, data: bytes, peer: object) -> PlainMessage[Facts] | None:
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

    def _by_form(self, shape: Shape[Facts], form: Form, data: bytes, peer: object) -> PlainMessage[Facts] | None:
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
            try:
                if self._number_of(line) != form.first:
                    return None
            except _NotPlain:
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

    def _learn_form(self, key: tuple[int, ...], read: PlainMessage[Facts], data: bytes, peer: object) -> None:
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

    def _told_at(self, shape: Shape[Facts]) -> tuple[int, ...]:
        """The places of what its ending is made of, in each head anew."""
        return ()

    def _told_ending(self, shape: Shape[Facts], form: Form, values: Sequence[bytes], peer: object) -> bytes | None:
        """Of a head whose ending is made anew; None: it is to be looked up."""
        raise NotImplementedError

    def _new_shape(self, key: tuple[int, ...], lines: list[bytes], peer: object) -> Shape[Facts] | None:
        """Of a head that is not known, if it is to be known now."""
        if key in self._shapes or not self._glimpse(key):
            return None
        return self._learn_shape(key, lines, peer)

    def _learn_shape(self, key: tuple[int, ...], lines: list[bytes], peer: object) -> Shape[Facts] | None:
        raise NotImplementedError

    def _learn_ending(
        self, shape: Shape[Facts], lines: list[bytes], peer: object, wire: bytes | None = None
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
        id_ = self._id(Meaning.FIRST, wire)
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
        if meaning == Meaning.LENGTH:
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
                meaning = Meaning.CLOSE
            elif token != b"keep-alive":
                return None
        elif meaning in (Meaning.CHUNKED, Meaning.CODED):
            if value.lower() != (b"chunked" if meaning == Meaning.CHUNKED else b"gzip"):
                return None
        elif meaning == Meaning.HOST:
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
        self, key: tuple[int, ...], lines: list[bytes], facts: Facts, changed: dict[int, bytes], dropped: set[int]
    ) -> Shape[Facts]:
        """A new shape, of which nothing is checked yet."""
        at_by_meaning = {self._meanings[id_][0]: at for at, id_ in enumerate(key)}
        in_place_of = {at: len(lines) + number for number, at in enumerate(changed)}
        end = len(lines) + len(changed)
        places = (*(in_place_of.get(at, at) for at in range(len(lines)) if at not in dropped), end)

        def value(meaning: int) -> tuple[int, int]:
            at = at_by_meaning.get(meaning, 0)
            return at, lines[at].find(b": ") + 2

        length_at, length_from = value(Meaning.LENGTH)
        trace_at, trace_from = value(Meaning.TRACE)
        told = [at_by_meaning.get(meaning, 0) for meaning in FORWARDED.values()]
        beside_at, beside_from = value(Meaning.FORWARDED_FOR if any(told) else Meaning.KEEP_ALIVE)
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
            close=Meaning.CLOSE in at_by_meaning,
            chunked=Meaning.CHUNKED in at_by_meaning,
            coded=Meaning.CODED in at_by_meaning,
            forwarded=(*told, at_by_meaning.get(Meaning.HOST, 0)) if any(told) else (),
        )

    def _meant(self, key: tuple[int, ...]) -> Counter[int]:
        """How many lines of each meaning there are; none where it does not begin as a message does."""
        meant = Counter(self._meanings[id_][0] for id_ in key)
        if self._meanings[key[0]][0] != Meaning.FIRST or meant[Meaning.FIRST] != 1:
            return Counter()  # no message
        return meant

    def _remember(self, key: tuple[int, ...], shape: Shape[Facts] | None) -> Shape[Facts] | None:
        """None: such heads are read with care."""
        if len(self._shapes) >= SHAPES_MAX:
            self._forget_shapes()
        self._shapes[key] = shape
        return shape


def fields_of_lines(lines: list[bytes]) -> Fields:
    return [(name, value) for name, _, value in (line.partition(b": ") for line in lines)]
