"""Heads of plain messages, known by their lines: the short way of a call.

Nearly all heads that one client sends differ from the one before in a few lines only (a length, a trace id). So a head
is cut into lines, and each line is looked up. What a line means was worked out when it was first seen, and what a
whole head means (who pays, which route, how it is rewritten) when its *shape* was first seen: the careful rewriting
(`headers`) runs once for each shape, its bytes are compared with what comes out here, and a shape whose bytes differ is
never taken. The short way can therefore only forward what the careful way would have forwarded.

Only heads that leave nothing to be judged are plain: printable ASCII, every line ended by CRLF, `name: value` with one
space, one Host, one Content-Length at most, nothing about transfer codings of a request, upgrades, expectations or
trailers. For all others the result is None, and the careful way reads them from their first byte.

What is remembered is bounded, and holds header values (credentials too): it is never shown.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Generic, TypeVar

# What a line means here.
_PASS: Final = 0
_DROP: Final = 1  # hop-by-hop, and says nothing that matters
_LENGTH: Final = 2
_HOST: Final = 3
_CLOSE: Final = 4
_CHUNKED: Final = 5
_TRACE: Final = 6
_KEEP_ALIVE: Final = 7  # the upstream's hint of how long it keeps the connection

LINES_MAX: Final = 4_096  # remembered lines
LINES_BYTES_MAX: Final = 2 << 20  # and their bytes: tokens in fields reach some kB
NAMES_MAX: Final = 2_048
SHAPES_MAX: Final = 2_048
PEERS_MAX: Final = 256  # endings of a head that are remembered for each shape
HEAD_BYTES_MAX: Final = 16_384  # a longer head is not plain
FIELDS_MAX: Final = 100
VALUES_MAX: Final = 64  # so many different values make a field one that is known by its name alone
LENGTH_DIGITS_MAX: Final = 9

_PRINTABLE: Final = bytes(range(0x20, 0x7F)) + b"\r\n"
_NAME: Final = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]{1,256}")
_REQUEST_LINE: Final = re.compile(rb"(GET|POST|PUT|PATCH|DELETE) (/[!\"$-~]*) HTTP/1\.1")
_STATUS_LINE: Final = re.compile(rb"HTTP/1\.1 ([2-5][0-9][0-9]) [ -~]*")
_BODILESS: Final = frozenset({204, 304})

# Never plain: what they ask for is the careful way's to judge.
_CAREFUL_REQUEST: Final = frozenset(
    {
        b"transfer-encoding", b"upgrade", b"expect", b"te", b"trailer", b"http2-settings", b"proxy-authorization",
        b"proxy-authenticate", b"x-forwarded-for", b"x-forwarded-proto", b"x-forwarded-host", b"forwarded", b"via",
    }
)  # fmt: skip
# A coded body can be a thousand times what it is on the wire: the careful way looks into it step by step.
_CAREFUL_RESPONSE: Final = frozenset(
    {b"upgrade", b"trailer", b"te", b"location", b"content-location", b"refresh", b"content-encoding"}
)
# Their value is another one for each call, and says nothing of what the call is.
_VOLATILE: Final = frozenset(
    {
        b"traceparent", b"tracestate", b"idempotency-key", b"x-request-id", b"x-correlation-id", b"x-amzn-trace-id",
        b"cookie", b"if-none-match", b"x-client-request-id",
    }
)  # fmt: skip

_Facts = TypeVar("_Facts")


@dataclass(slots=True)
class Shape(Generic[_Facts]):
    """What heads that differ in volatile lines only have in common."""

    number: int
    facts: _Facts  # what the owner worked out when it saw the first one
    endings: dict[object, bytes] = field(default_factory=dict)  # peer -> what is sent behind the message's own lines


@dataclass(slots=True)
class PlainHead(Generic[_Facts]):
    """One head, understood."""

    shape: Shape[_Facts]
    wire: bytes  # what is forwarded, the empty line included
    length: int  # of the body, bytes; 0 where no length is given (requests), -1 (responses)
    close: bool  # `Connection: close`; responses only
    chunked: bool  # responses only
    trace: bytes | None  # the value of `traceparent`
    keep_alive: bytes | None  # the value of the upstream's `Keep-Alive`


_Known = tuple[int, int, bytes, int]  # meaning, id, wire form, length
_Fields = list[tuple[bytes, bytes]]


class _Heads(Generic[_Facts]):
    """The lines, names and shapes that one direction knows."""

    def __init__(self, *, careful: frozenset[bytes], by_value: bool, matters: frozenset[bytes]) -> None:
        """`careful`: fields of heads that are not plain. `by_value`: whether any field's value makes another shape,
        or only that of those in `matters`, which always do."""
        self._careful = careful
        self._by_value = by_value
        self._matters = matters
        self._lines: dict[bytes, _Known] = {}
        self._lines_bytes = 0
        self._names: dict[bytes, tuple[int, int, bool]] = {}  # meaning, id, whether it is known by its name alone
        self._values: dict[bytes, int] = {}  # name -> different values seen
        self._shapes: dict[tuple[int, ...], Shape[_Facts] | None] = {}
        self._next_id = 0
        self._next_shape = 0

    def forget(self) -> None:
        """Start anew; numbers are never used twice."""
        self._lines.clear()
        self._lines_bytes = 0
        self._names.clear()
        self._values.clear()
        self._shapes.clear()

    def _id(self) -> int:
        self._next_id += 1
        return self._next_id

    def _learn(self, line: bytes) -> _Known | None:
        """What a line means that is not remembered; None: it is not plain."""
        name, colon, value = line.partition(b": ")
        known = self._names.get(name)
        if known is None:
            known = self._learn_name(name)
            if known is None:
                return None
        if not colon or value[:1] == b" " or value[-1:] == b" ":
            return None
        meaning, name_id, by_name = known
        if meaning == _LENGTH:
            if not value.isdigit() or len(value) > LENGTH_DIGITS_MAX:
                return None
            return meaning, name_id, line, int(value)
        if by_name:
            return meaning, name_id, line, 0
        return self._learn_value(line, name, value, meaning, name_id)

    def _learn_value(self, line: bytes, name: bytes, value: bytes, meaning: int, name_id: int) -> _Known | None:
        low = name.lower()
        wire = line
        if low == b"connection":
            token = value.lower()
            if token == b"close":
                meaning = _CLOSE
            elif token != b"keep-alive":
                return None
        elif meaning == _CHUNKED:
            if value.lower() != b"chunked":
                return None
        elif meaning == _HOST:
            wire = self._host(name, value)
        seen = self._values[low] = self._values.get(low, 0) + 1
        if seen > VALUES_MAX and low not in self._matters:
            self._names[name] = (meaning, name_id, True)
            return meaning, name_id, wire, 0
        if len(self._lines) >= LINES_MAX or self._lines_bytes > LINES_BYTES_MAX:
            self.forget()
            return self._learn(line)
        found = self._lines[line] = (
            meaning,
            self._id() if self._by_value or low in self._matters else name_id,
            wire,
            0,
        )
        self._lines_bytes += len(line)
        return found

    def _learn_name(self, name: bytes) -> tuple[int, int, bool] | None:
        low = name.lower()
        if low in self._careful or _NAME.fullmatch(name) is None:
            return None
        if len(self._names) >= NAMES_MAX:
            self.forget()
        known = self._names[name] = self._meaning(low, self._id())
        return known

    def _meaning(self, low: bytes, id_: int) -> tuple[int, int, bool]:
        raise NotImplementedError

    def _host(self, name: bytes, value: bytes) -> bytes:
        raise NotImplementedError

    def _keep_shape(self, key: tuple[int, ...], facts: _Facts | None) -> Shape[_Facts] | None:
        """Remember what a head of these lines is; None: such heads are read with care."""
        if len(self._shapes) >= SHAPES_MAX:
            self._shapes.clear()
        shape: Shape[_Facts] | None = None
        if facts is not None:
            self._next_shape += 1
            shape = Shape(self._next_shape, facts)
        self._shapes[key] = shape
        return shape


def _cut(head: bytes, fields_max: int) -> list[bytes] | None:
    """The lines of a head (without the empty one); None where a byte or a line end is not plain."""
    lines = head.split(b"\r\n")
    ends = len(lines) - 1
    if head.translate(None, _PRINTABLE) or head.count(b"\r") != ends or head.count(b"\n") != ends:
        return None
    return lines if ends <= fields_max else None


def _fields(lines: list[bytes]) -> _Fields:
    return [(name, value) for name, _, value in (line.partition(b": ") for line in lines)]


Describe = Callable[[str, str, _Fields, "object"], "tuple[_Facts, bytes] | None"]
"""(method, target, fields, peer) -> (what the head means, the bytes that the careful way would forward: request line,
fields, what the proxy adds, empty line), or None for a head that is to be read with care."""


class PlainRequests(_Heads[_Facts]):
    """Requests of a kind that was seen before."""

    def __init__(
        self,
        *,
        describe: Describe[_Facts],
        authority: bytes | None,
        base: bytes,
        matters: frozenset[bytes],
        head_bytes_max: int = HEAD_BYTES_MAX,
        fields_max: int = FIELDS_MAX,
        target_bytes_max: int = HEAD_BYTES_MAX,
    ) -> None:
        """`authority`: what the upstream is told as `Host`; None: what the client said. `base`: the upstream URL's
        path. `matters`: names (lower case) of fields whose value decides what is recorded: who pays, dimensions."""
        matters |= {b"user-agent", b"content-type", b"content-encoding", b"host", b"connection"}
        super().__init__(careful=_CAREFUL_REQUEST, by_value=True, matters=matters)
        self._describe = describe
        self._authority = authority
        self._base = base
        self._head_bytes_max = min(head_bytes_max, HEAD_BYTES_MAX)
        self._fields_max = min(fields_max, FIELDS_MAX)
        self._target_bytes_max = target_bytes_max
        self._targets: dict[bytes, tuple[int, bytes, str, str]] = {}

    def forget(self) -> None:
        super().forget()
        self._targets.clear()

    def read(self, head: bytes, peer: object) -> PlainHead[_Facts] | None:  # noqa: C901 - one pass, for every call
        """`head`: up to, and without, its empty line and the CRLF before. `peer`: whose connection it is; equal peers
        are told the same of. None: not plain."""
        if len(head) > self._head_bytes_max or (lines := _cut(head, self._fields_max)) is None:
            return None
        target = self._targets.get(lines[0])
        if target is None:
            target = self._learn_target(lines[0])
            if target is None:
                return None
        id_, wire, method, path = target
        key, out = [id_], [wire]
        get = self._lines.get
        length, hosts, lengths = 0, 0, 0
        trace = None
        for line in lines[1:]:
            known = get(line)
            if known is None:
                known = self._learn(line)
                if known is None:
                    return None
                get = self._lines.get
            meaning, id_, wire, size = known
            key.append(id_)
            if meaning == _PASS:
                out.append(wire)
            elif meaning == _LENGTH:
                length = size
                lengths += 1
                out.append(wire)
            elif meaning == _HOST:
                hosts += 1
                out.append(wire)
            elif meaning == _TRACE:
                if trace is not None:
                    return None
                trace = line.partition(b": ")[2]
                out.append(wire)
            elif meaning == _CLOSE:
                return None  # what comes behind it is the careful way's to refuse
        if hosts != 1 or lengths > 1:
            return None
        shape_key = tuple(key)
        out.append(b"")
        own = b"\r\n".join(out)
        try:
            shape = self._shapes[shape_key]
        except KeyError:
            shape = self._learn_shape(shape_key, own, method, path, lines, peer)
        if shape is None:
            return None
        ending = shape.endings.get(peer)
        if ending is None:
            ending = self._learn_ending(shape, own, method, path, lines, peer)
            if ending is None:
                self._shapes[shape_key] = None
                return None
        return PlainHead(shape, own + ending, length, False, False, trace, None)

    def _learn_target(self, line: bytes) -> tuple[int, bytes, str, str] | None:
        match = _REQUEST_LINE.fullmatch(line)
        if match is None or len(match[2]) > self._target_bytes_max:
            return None
        if len(self._targets) >= LINES_MAX:
            self._targets.clear()
        wire = b"%b %b%b HTTP/1.1" % (match[1], self._base, match[2])
        found = self._targets[line] = (self._id(), wire, match[1].decode(), match[2].decode())
        return found

    def _learn_shape(
        self, key: tuple[int, ...], own: bytes, method: str, target: str, lines: list[bytes], peer: object
    ) -> Shape[_Facts] | None:
        fields = _fields(lines[1:])
        if len({name.lower() for name, _ in fields}) < len(fields):
            return self._keep_shape(key, None)  # which names may occur twice is the careful way's to judge
        described = self._describe(method, target, fields, peer)
        if described is None or not described[1].startswith(own):
            return self._keep_shape(key, None)
        shape = self._keep_shape(key, described[0])
        if shape is not None:
            shape.endings[peer] = described[1][len(own) :]
        return shape

    def _learn_ending(
        self, shape: Shape[_Facts], own: bytes, method: str, target: str, lines: list[bytes], peer: object
    ) -> bytes | None:
        described = self._describe(method, target, _fields(lines[1:]), peer)
        if described is None or not described[1].startswith(own):
            return None
        if len(shape.endings) >= PEERS_MAX:
            shape.endings.clear()
        ending = shape.endings[peer] = described[1][len(own) :]
        return ending

    def _meaning(self, low: bytes, id_: int) -> tuple[int, int, bool]:
        if low == b"content-length":
            return _LENGTH, id_, True
        if low == b"host":
            return _HOST, id_, False
        if low == b"connection":
            return _DROP, id_, False
        if low in (b"keep-alive", b"proxy-connection"):
            return _DROP, id_, True
        if low == b"traceparent":
            return _TRACE, id_, low not in self._matters
        return _PASS, id_, low in _VOLATILE and low not in self._matters

    def _host(self, name: bytes, value: bytes) -> bytes:
        return b"%b: %b" % (name, value if self._authority is None else self._authority)


DescribeResponse = Callable[[int, _Fields], "tuple[_Facts, bytes] | None"]
"""(status, fields) -> (what the head means, the fields' lines that the careful way would forward)."""


class PlainResponses(_Heads[_Facts]):
    """Responses of a kind that was seen before. Only values that say how a body is read make another shape."""

    def __init__(self, *, describe: DescribeResponse[_Facts], dropped: frozenset[bytes] = frozenset()) -> None:
        """`dropped`: names (lower case) that are ours to send: a response that has one is not plain."""
        matters = frozenset({b"content-type", b"transfer-encoding", b"connection"})
        super().__init__(careful=_CAREFUL_RESPONSE | dropped, by_value=False, matters=matters)
        self._describe = describe
        self._statuses: dict[bytes, tuple[int, int]] = {}

    def forget(self) -> None:
        super().forget()
        self._statuses.clear()

    def read(self, head: bytes) -> PlainHead[_Facts] | None:  # noqa: C901 - one pass, for every call
        """`head`: as for requests. `wire` ends behind the last field: the caller may add its own, and the empty
        line. A response without a length and not in chunks is not plain: its end would be the connection's."""
        if len(head) > HEAD_BYTES_MAX or (lines := _cut(head, FIELDS_MAX)) is None:
            return None
        status = self._statuses.get(lines[0])
        if status is None:
            status = self._learn_status(lines[0])
            if status is None:
                return None
        key, out = [status[1]], [lines[0]]
        get = self._lines.get
        length, close, chunked = -1, False, False
        keep_alive = None
        for line in lines[1:]:
            known = get(line)
            if known is None:
                known = self._learn(line)
                if known is None:
                    return None
                get = self._lines.get
            meaning, id_, _, size = known
            key.append(id_)
            if meaning == _PASS:
                out.append(line)
            elif meaning == _LENGTH:
                if length >= 0 or chunked:
                    return None
                length = size
                out.append(line)
            elif meaning == _CHUNKED:
                if length >= 0 or chunked:
                    return None
                chunked = True
                out.append(line)
            elif meaning == _CLOSE:
                close = True
            elif meaning == _KEEP_ALIVE:
                keep_alive = line.partition(b": ")[2]
        if length < 0 and not chunked:
            return None
        shape_key = tuple(key)
        out.append(b"")
        own = b"\r\n".join(out)
        try:
            shape = self._shapes[shape_key]
        except KeyError:
            shape = self._learn_shape(shape_key, own[len(lines[0]) + 2 :], status[0], lines)
        if shape is None:
            return None
        return PlainHead(shape, own + shape.endings[None], length, close, chunked, None, keep_alive)

    def _learn_status(self, line: bytes) -> tuple[int, int] | None:
        match = _STATUS_LINE.fullmatch(line)
        if match is None or (status := int(match[1])) in _BODILESS:
            return None
        if len(self._statuses) >= LINES_MAX:
            self._statuses.clear()
        found = self._statuses[line] = (status, self._id())
        return found

    def _learn_shape(self, key: tuple[int, ...], own: bytes, status: int, lines: list[bytes]) -> Shape[_Facts] | None:
        described = self._describe(status, _fields(lines[1:]))
        if described is None or not described[1].startswith(own):
            return self._keep_shape(key, None)
        shape = self._keep_shape(key, described[0])
        if shape is not None:
            shape.endings[None] = described[1][len(own) :]
        return shape

    def _meaning(self, low: bytes, id_: int) -> tuple[int, int, bool]:
        if low == b"content-length":
            return _LENGTH, id_, True
        if low == b"transfer-encoding":
            return _CHUNKED, id_, False
        if low == b"connection":
            return _DROP, id_, False
        if low == b"keep-alive":
            return _KEEP_ALIVE, id_, True
        if low == b"proxy-connection":
            return _DROP, id_, True
        return _PASS, id_, low in _VOLATILE or low in (b"date", b"set-cookie")

    def _host(self, name: bytes, value: bytes) -> bytes:
        raise AssertionError("a response has no Host")
