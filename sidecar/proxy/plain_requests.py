"""Heads of plain requests (`plain_head`): where they go, who pays, what is forwarded of each."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Final

from sidecar.proxy.plain_form import Form
from sidecar.proxy.plain_head import (
    FIELDS_MAX,
    FORWARDED,
    HEAD_BYTES_MAX,
    NAMES_MAX,
    PEERS_MAX,
    VOLATILE,
    Aimed,
    Facts,
    Fields,
    Heads,
    Meaning,
    Shape,
    fields_of_lines,
)

AIMED_MAX: Final = 2_048  # remembered request lines
AIMED_BYTES_MAX: Final = 512 << 10  # and their bytes

_REQUEST_LINE: Final = re.compile(rb"(GET|POST|PUT|PATCH|DELETE) (/[!\"$-~]*) HTTP/1\.1")
# Never plain: what they ask for is the careful way's to judge. (Both parsers read `Proxy-Connection` as `Connection`.)
_CAREFUL: Final = frozenset(
    {
        b"transfer-encoding", b"upgrade", b"expect", b"te", b"trailer", b"http2-settings", b"proxy-authorization",
        b"proxy-authenticate", b"proxy-connection",
    }
)  # fmt: skip

_WITH_CARE: Final = Aimed(b"", "", "")

Describe = Callable[[str, str, Fields, object], "tuple[Facts, bytes] | None"]
"""(method, target, fields, peer) -> (what the head means, the bytes that the careful way would forward: request line,
fields, what the proxy adds, empty line), or None for a head that is to be read with care."""
Aim = Callable[[str, str], "tuple[Hashable, Aimed] | None"]
"""(method, target) -> (a key, equal for two targets where a head means the same with either, but for what `Aimed` says;
and that), or None for a target that is to be read with care, whatever the fields are."""
Forward = Callable[[Any, "bytes | None", "bytes | None", "bytes | None", bytes], bytes]
"""(peer, chain, scheme and host that the request was forwarded with, its own host) -> the lines that say so
upstream."""


class PlainRequests(Heads[Facts]):
    """Requests of a kind that was seen before."""

    def __init__(
        self,
        *,
        describe: Describe[Facts],
        aim: Aim | None = None,
        authority: bytes | None,
        base: bytes,
        matters: frozenset[bytes],
        head_bytes_max: int = HEAD_BYTES_MAX,
        fields_max: int = FIELDS_MAX,
        target_bytes_max: int = HEAD_BYTES_MAX,
        sights: int = 1,
        not_passed: Callable[[Facts], frozenset[bytes]] | None = None,
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
            careful=_CAREFUL | joined,
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
            self._dropped |= frozenset(FORWARDED.values())
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
            number = self._kinds[kind] = self._id(Meaning.FIRST)
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

    def _learn_shape(self, key: tuple[int, ...], lines: list[bytes], peer: object) -> Shape[Facts] | None:
        meant = self._meant(key)
        # What comes behind a request that closes, and what may occur twice, is the careful way's to judge.
        once = len({line.partition(b":")[0].lower() for line in lines[1:]}) == len(lines) - 1
        if meant[Meaning.HOST] != 1 or meant[Meaning.CLOSE] or not once:
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
        self, shape: Shape[Facts], lines: list[bytes], peer: object, wire: bytes | None = None
    ) -> bytes | None:
        if shape.forwarded and self._forward is not None:
            return self._forwarded(shape, lines, peer, self._forward, wire)
        ending = self._ending(shape, lines, peer, wire)
        if ending is not None:
            if len(shape.endings) >= PEERS_MAX:
                shape.endings.clear()
            shape.endings[peer] = ending
        return ending

    def _told_at(self, shape: Shape[Facts]) -> tuple[int, ...]:
        return () if self._forward is None else shape.forwarded

    def _told_ending(self, shape: Shape[Facts], form: Form, values: Sequence[bytes], peer: object) -> bytes | None:
        around = shape.around.get(peer)
        if around is None or self._forward is None:
            return None
        chain, scheme, named_host, host = [values[at] if at >= 0 else said for at, said in form.told]
        return around[0] + self._forward(peer, chain, scheme, named_host, host or b"") + around[1]

    def _forwarded(
        self, shape: Shape[Facts], lines: list[bytes], peer: object, forward: Forward, wire: bytes | None
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

    def _ending(self, shape: Shape[Facts], lines: list[bytes], peer: object, wire: bytes | None) -> bytes | None:
        """As the careful way has it; None where that forwards other lines."""
        if wire is None:
            described = self._described(lines, peer)
            wire = b"" if described is None else described[1]
        own = shape.own([self.aimed[lines[0]].line, *lines[1:]] if shape.aimed else lines)
        return wire[len(own) :] if wire.startswith(own) else None

    def _described(self, lines: list[bytes], peer: object) -> tuple[Facts, bytes] | None:
        method, target, _ = lines[0].decode().split(" ")
        return self._describe(method, target, fields_of_lines(lines[1:]), peer)

    def _meaning(self, low: bytes) -> tuple[int, bool]:
        if low == b"content-length":
            return Meaning.LENGTH, True
        if low == b"host":
            return Meaning.HOST, False
        if low == b"connection":
            return Meaning.DROP, False
        if low == b"keep-alive":
            return Meaning.DROP, True
        if low == b"traceparent":
            return Meaning.TRACE, low not in self._matters
        if low in FORWARDED:
            return FORWARDED[low], low not in self._matters
        return Meaning.PASS, low in VOLATILE and low not in self._matters

    def _host(self, name: bytes, value: bytes) -> bytes:
        return b"%b: %b" % (name, value if self._authority is None else self._authority)
