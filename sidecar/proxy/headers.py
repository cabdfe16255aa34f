"""Rewriting of heads: what a proxy must change, and nothing else.

Fields are passed on as the bytes they came in, in their order and case. Changed are: hop-by-hop
fields (and those that `Connection` names), framing, `Host`, and what tells the upstream about the
client. No I/O, no clock; every function is a table test away.

One pass over the fields decides and builds at once, because it is done for every call; a second pass
is made only where `Connection` names fields to drop.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Final

from sidecar.model.exchange import (
    CUT,
    HEADER_NAME_CHARS_MAX,
    HEADER_NAMES_CHARS_MAX,
    URL_CHARS_MAX,
    USER_AGENT_CHARS_MAX,
    cut,
)
from sidecar.model.http_url import UpstreamAddress
from sidecar.model.target import below, origin_form
from sidecar.proxy.redirects import Called, Redirects
from sidecar.settings import ProxySettings, SetHeader, UpstreamSettings
from sidecar.usage import RawHeaders

METER_ID: Final = b"x-meter-id"
ADDRESSES_KEPT_MAX: Final = 1024  # clients may claim any address in X-Forwarded-For
CHAIN_KEPT_BYTES_MAX: Final = 256  # of such a field that is remembered

_TRACEPARENT = re.compile(rb"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}(?:-.*)?\Z")

# What a field name means to the hop.
PLAIN: Final = 0
HOP: Final = 1  # dropped
CONNECTION: Final = 2
HOST: Final = 3
TE: Final = 4
TRANSFER_ENCODING: Final = 5
CONTENT_LENGTH: Final = 6
UPGRADE: Final = 7
X_FORWARDED_FOR: Final = 8
X_FORWARDED_PROTO: Final = 9
X_FORWARDED_HOST: Final = 10
FORWARDED: Final = 11
VIA: Final = 12
USER_AGENT: Final = 13
TRACEPARENT: Final = 14
IDEMPOTENCY_KEY: Final = 15
KEEP_ALIVE: Final = 16  # dropped, and read: how long the upstream means to keep a connection
LOCATION: Final = 17  # this and what follows may point to the upstream
CONTENT_LOCATION: Final = 18
REFRESH: Final = 19
REMOVED: Final = 20  # read, and not passed on: this upstream is sent another one, or none

REQUEST: Final = {
    b"connection": CONNECTION, b"host": HOST, b"te": TE, b"transfer-encoding": TRANSFER_ENCODING,
    b"content-length": CONTENT_LENGTH, b"upgrade": UPGRADE, b"keep-alive": HOP, b"proxy-connection": HOP,
    b"http2-settings": HOP, b"x-forwarded-for": X_FORWARDED_FOR, b"x-forwarded-proto": X_FORWARDED_PROTO,
    b"x-forwarded-host": X_FORWARDED_HOST, b"forwarded": FORWARDED, b"via": VIA, b"user-agent": USER_AGENT,
    b"traceparent": TRACEPARENT, b"idempotency-key": IDEMPOTENCY_KEY,
}  # fmt: skip
RESPONSE: Final = {
    b"connection": CONNECTION, b"keep-alive": KEEP_ALIVE, b"proxy-connection": HOP, b"te": HOP,
    b"transfer-encoding": TRANSFER_ENCODING, b"content-length": CONTENT_LENGTH, b"upgrade": UPGRADE,
    b"location": LOCATION, b"content-location": CONTENT_LOCATION, b"refresh": REFRESH,
}  # fmt: skip
FRAMING: Final = frozenset({TRANSFER_ENCODING, CONTENT_LENGTH})
# What a trailer has no business to say (RFC 9110, 6.5.1): a client that merges trailers would take it for the head's.
OF_THE_HOP: Final = FRAMING | {HOP, CONNECTION, UPGRADE, KEEP_ALIVE}
# The statuses whose `Upgrade` is the response's own: which protocol follows, and which one the call has to be made in
# (RFC 9110, 15.5.22). In any other it is an advertisement of the hop behind.
NAMES_PROTOCOL: Final = frozenset({101, 426})
# `Connection` may not be used to strip what framing and routing stand on.
_NOT_DROPPED: Final = frozenset({b"host", b"content-length", b"transfer-encoding", b"connection", b"upgrade", b"te"})
QUIET_TOKENS: Final = frozenset({b"close", b"keep-alive", b"upgrade", b"te", b"http2-settings", b""})

NAMES_KEPT_MAX: Final = 2048  # distinct spellings remembered; clients choose them, so they are bounded
NAME_KEPT_BYTES_MAX: Final = 64
NAMES_UNCOUNTED: Final = HEADER_NAMES_CHARS_MAX // HEADER_NAME_CHARS_MAX  # so many are short enough whatever they say


class Kinds(dict[bytes, tuple[int, str]]):
    """Field name as spelled -> (what it means, its text in a record): one look-up a field. `too_long` is told of a
    name that a record does not keep whole."""

    def __init__(self, meanings: dict[bytes, int], too_long: Callable[[], None]) -> None:
        super().__init__()
        self._meanings = meanings
        self._too_long = too_long

    def __missing__(self, name: bytes) -> tuple[int, str]:
        if len(name) > HEADER_NAME_CHARS_MAX:
            self._too_long()
        kind = (self._meanings.get(name.lower(), PLAIN), cut(name.decode("latin-1"), HEADER_NAME_CHARS_MAX))
        if len(name) <= NAME_KEPT_BYTES_MAX:
            if len(self) >= NAMES_KEPT_MAX:
                self.clear()
            self[name] = kind
        return kind


def named(connection: bytes) -> frozenset[bytes]:
    """The fields that a `Connection` value (in lower case) says to drop."""
    return frozenset(token.strip() for token in connection.split(b",")) - QUIET_TOKENS - _NOT_DROPPED


@dataclass(slots=True, frozen=True, eq=False)
class Peer:
    """The other end of client connections from one address: one object, which is compared by being it."""

    ip: str | None  # None: a Unix socket
    trusted: bool
    scheme: bytes
    forwarded: bytes  # the field lines that say so, up to the host's value; b"" where none are added


def _ignore(word: str) -> None:
    """What nobody counts."""


class HeaderRules:
    """`ProxySettings`, made ready for the two passes a call. `limit_reached` is told what a record does not keep whole,
    `redirected` what became of a redirect to the upstream."""

    def __init__(
        self,
        settings: ProxySettings,
        address: UpstreamAddress,
        limit_reached: Callable[[str], None] = _ignore,
        redirected: Callable[[str], None] = _ignore,
        upstream: UpstreamSettings | None = None,
    ) -> None:
        """`upstream`: one of several, whose address it is."""
        prefix = "" if upstream is None else upstream.prefix
        self._address = address
        self._peers: dict[tuple[str | None, bool], Peer] = {}
        self.authority = address.authority
        self.base = address.base
        self.preserve_host = settings.preserve_host
        self.mode = str(settings.forwarded)
        self.via = settings.via.encode("latin-1") if settings.via else None
        self._trusted = settings.trusted_proxies
        self._client_ips: dict[tuple[Peer, bytes], tuple[str | None]] = {}  # of what trusted proxies said, likewise
        self._trust: dict[str, bool] = {}  # a look-up in networks costs microseconds, and proxies are few
        self.record_base = (settings.public_url + prefix if settings.public_url else address.url).rstrip("/")
        self._query_values = frozenset(settings.query_values)
        self._base = address.base.decode("ascii")
        self._limit_reached = limit_reached
        too_long = partial(limit_reached, "header_name_chars")
        self.redirects = Redirects(address, rewrite=settings.rewrite_redirects, counted=redirected, prefix=prefix)
        self.meter_id = settings.meter_id_header
        names = () if upstream is None else (*(one.name for one in upstream.set_headers), *upstream.remove_headers)
        self.not_passed = frozenset(name.encode("latin-1") for name in names)
        self.own_lines = b""
        self.set_own(() if upstream is None else upstream.set_headers)
        self.request_kinds = Kinds({**REQUEST, **dict.fromkeys(self.not_passed, REMOVED)}, too_long)
        # The field is ours then: one of the upstream's beside it could be taken for it.
        self.response_kinds = Kinds(RESPONSE | {METER_ID: HOP} if self.meter_id else RESPONSE, too_long)

    @property
    def forward(self) -> Callable[[Peer, bytes | None, bytes | None, bytes | None, bytes], bytes] | None:
        """What is made of the `X-Forwarded-*` fields of a request (`x_forwarded`); None: they are passed on."""
        return x_forwarded if self.mode == "x-forwarded" else None

    @property
    def joined(self) -> frozenset[bytes]:
        """Fields (lower case) to whose values in a request ours is added."""
        names = {b"forwarded": self.mode == "forwarded", b"via": self.via is not None}
        return frozenset(name for name, is_ours in names.items() if is_ours)

    def set_own(self, headers: Iterable[SetHeader]) -> None:
        """The fields that the upstream is sent in the place of the client's, from now on."""
        self.own_lines = b"".join(
            b"%b: %b\r\n" % (one.name.encode("latin-1"), one.value.reveal().encode("latin-1")) for one in headers
        )

    def names_for_record(self, names: list[str]) -> list[str]:
        """The names of a head's fields, as many as a record keeps; a last one of `CUT` says that there were more."""
        if len(names) <= NAMES_UNCOUNTED:
            return names
        left = HEADER_NAMES_CHARS_MAX
        for place, name in enumerate(names):
            left -= len(name)
            if left < 0:
                self._limit_reached("header_names_chars")
                return [*names[:place], CUT]
        return names

    # -- the client ------------------------------------------------------------------------------

    def peer(self, ip: str | None, *, tls: bool) -> Peer:
        """What is known of a client connection. An address is written as the upstream should see it."""
        known = self._peers.get((ip, tls))
        if known is None:
            if len(self._peers) >= ADDRESSES_KEPT_MAX:
                self._peers.clear()
            known = self._peers[ip, tls] = self._peer(ip, tls=tls)
        return known

    def _peer(self, ip: str | None, *, tls: bool) -> Peer:
        shown = None
        if ip is not None:
            address = address_in(ip)
            shown = str(address) if address is not None else None
        trusted = shown is None or self._is_trusted(shown)
        scheme = b"https" if tls else b"http"
        lines = b""
        if self.mode == "x-forwarded":
            client = b"X-Forwarded-For: %b\r\n" % shown.encode() if shown else b""
            lines = client + b"X-Forwarded-Proto: " + scheme + b"\r\nX-Forwarded-Host: "
        return Peer(shown, trusted, scheme, lines)

    def client_ip(self, peer: Peer, forwarded_for: bytes | None) -> str | None:
        """The rightmost address that is no proxy of ours; what an untrusted peer claims is not read."""
        if not peer.trusted or forwarded_for is None:
            return peer.ip
        if len(forwarded_for) > CHAIN_KEPT_BYTES_MAX:
            return self._client_ip(peer, forwarded_for)
        known = self._client_ips.get((peer, forwarded_for))
        if known is None:
            if len(self._client_ips) >= ADDRESSES_KEPT_MAX:
                self._client_ips.clear()
            known = self._client_ips[peer, forwarded_for] = (self._client_ip(peer, forwarded_for),)
        return known[0]

    def _client_ip(self, peer: Peer, forwarded_for: bytes) -> str | None:
        found = peer.ip
        for entry in reversed(forwarded_for.split(b",")):
            address = address_in(entry.strip().decode("latin-1"))
            if address is None:
                break
            found = str(address)
            if not self._is_trusted(found):
                break
        return found

    def _is_trusted(self, ip: str) -> bool:
        if not self._trusted:
            return False
        known = self._trust.get(ip)
        if known is None:
            address = ip_address(ip)
            known = any(address.version == net.version and address in net for net in self._trusted)
            if len(self._trust) >= ADDRESSES_KEPT_MAX:
                self._trust.clear()
            self._trust[ip] = known
        return known

    # -- requests --------------------------------------------------------------------------------

    def request_line(self, method: str, target: str) -> tuple[bytes, str | None]:
        """The line that goes upstream, and the authority of an absolute-form target.

        The target stays as it came, byte for byte; an absolute one loses its scheme and authority,
        which choose no upstream here.
        """
        target, authority = origin_form(target)
        base = b"" if target == "*" else self._address.base
        return b"%b %b%b HTTP/1.1\r\n" % (
            method.encode("ascii"),
            base,
            target.encode("utf-8", "surrogateescape"),
        ), authority

    def request(
        self,
        fields: RawHeaders,
        peer: Peer,
        *,
        upgrade: bool = False,
        http10: bool = False,
        authority: str | None = None,
    ) -> RequestHead:
        """What goes upstream. `upgrade`: a wanted protocol switch is passed on. `authority`: from an
        absolute-form target, which stands above the `Host` field (RFC 9112, 3.2.2)."""
        return RequestHead(self, fields, peer, upgrade=upgrade, http10=http10, authority=authority)

    # -- records ---------------------------------------------------------------------------------

    def record_url(self, target: str) -> tuple[str, str]:
        """(what a record says, the path in its normal form). The record has the path as it was spelled; query names
        stay, their values go unless allowed; an authority and a fragment go whole."""
        target, _ = origin_form(target)
        if "#" in target:
            target = target.partition("#")[0]
        path, _, query = target.partition("?")
        url = f"{self.record_base}{path}" if path != "*" else f"{self.record_base}/*"
        if query and (names := self._shown(query)):
            url = f"{url}?{names}"
        if len(url) > URL_CHARS_MAX:
            self._limit_reached("url_chars")
            url = cut(url, URL_CHARS_MAX)
        return url, below(self._base, path)

    def _shown(self, query: str) -> str:
        shown = []
        for pair in query.split("&"):
            name = pair.partition("=")[0]
            if name:
                shown.append(pair if name in self._query_values else name)
        return "&".join(shown)

    def agent(self, field: bytes | None) -> str | None:
        """`User-Agent` as a record has it."""
        if field is None:
            return None
        if len(field) > USER_AGENT_CHARS_MAX:
            self._limit_reached("user_agent_chars")
        return cut(field.decode("utf-8", "replace"), USER_AGENT_CHARS_MAX)


class RequestHead:
    """What one request head says, and the bytes that go upstream instead of it.

    Each field that means something to the hop has a handler; all others are passed on as they are. `fields` are what
    there is to be read for the record: the client's own, without those that its `Connection` takes out, and with the
    host of an absolute target in the place of `Host`, as the upstream is told of it.
    """

    __slots__ = (
        "_authority", "_connection", "_forwarded", "_forwarded_host", "_forwarded_proto", "_host_seen", "_http10",
        "_parts", "_peer", "_rules", "_upgrade", "_via", "fields", "forwarded_for", "host", "idempotency_key", "lines",
        "names", "traceparent", "transfer_encoding", "user_agent",
    )  # fmt: skip

    def __init__(
        self, rules: HeaderRules, fields: RawHeaders, peer: Peer, *, upgrade: bool, http10: bool, authority: str | None
    ) -> None:
        self._rules = rules
        self._peer = peer
        self._upgrade = upgrade
        self._http10 = http10
        self._authority = authority
        self._host_seen = False
        self._connection = b""  # all values, in lower case
        self._forwarded: list[bytes] = []
        self._forwarded_proto: bytes | None = None
        self._forwarded_host: bytes | None = None
        self._via: list[bytes] = []
        self.host = b""  # as the client said it
        self.user_agent: bytes | None = None
        self.traceparent: bytes | None = None
        self.forwarded_for: bytes | None = None
        self.idempotency_key = False
        self.transfer_encoding: bytes | None = None
        self.names: list[str] = []
        self.fields = fields
        self._build(fields, frozenset())
        if self._connection and self._connection not in QUIET_TOKENS:
            self._build_without(named(self._connection), fields)
        if authority is not None:
            self._tell_host(authority.encode("latin-1"))
        self._add_own()
        self.lines = b"".join(self._parts)

    def _build(self, fields: RawHeaders, drop: frozenset[bytes]) -> None:
        meanings = self._rules.request_kinds
        names = self.names
        parts: list[bytes] = []
        self._parts = parts
        for name, value in fields:
            kind, text = meanings[name]
            names.append(text)
            if kind:
                if not drop or name.lower() not in drop:
                    _REQUEST_HANDLERS[kind](self, name, value)
            elif not drop or name.lower() not in drop:
                parts += (name, b": ", value, b"\r\n")

    def _build_without(self, drop: frozenset[bytes], fields: RawHeaders) -> None:
        if drop:
            self.names, self._forwarded, self._via = [], [], []
            self.forwarded_for = self.transfer_encoding = self._forwarded_proto = self._forwarded_host = None
            self.user_agent = self.traceparent = None
            self.idempotency_key = False
            self._build(fields, drop)
            self.fields = [field for field in fields if field[0].lower() not in drop]

    def _tell_host(self, authority: bytes) -> None:
        self.fields = [field for field in self.fields if field[0].lower() != b"host"] + [(b"Host", authority)]

    def _pass(self, name: bytes, value: bytes) -> None:
        self._parts += (name, b": ", value, b"\r\n")

    def _drop(self, name: bytes, value: bytes) -> None:
        pass

    def _on_removed(self, name: bytes, value: bytes) -> None:
        """What the record says of the client it says all the same."""
        kind = REQUEST.get(name.lower(), PLAIN)
        if kind == USER_AGENT:
            self.user_agent = value
        elif kind == TRACEPARENT:
            self.traceparent = value

    def _on_connection(self, name: bytes, value: bytes) -> None:
        self._connection = self._connection + b"," + value.lower() if self._connection else value.lower()

    def _on_host(self, name: bytes, value: bytes) -> None:
        rules = self._rules
        self._host_seen = True
        self.host = value if self._authority is None else self._authority.encode("latin-1")
        self._parts += (name, b": ", self.host if rules.preserve_host else rules.authority, b"\r\n")

    def _on_user_agent(self, name: bytes, value: bytes) -> None:
        self.user_agent = value
        self._parts += (name, b": ", value, b"\r\n")

    def _on_traceparent(self, name: bytes, value: bytes) -> None:
        self.traceparent = value
        self._parts += (name, b": ", value, b"\r\n")

    def _on_idempotency_key(self, name: bytes, value: bytes) -> None:
        self.idempotency_key = True
        self._parts += (name, b": ", value, b"\r\n")

    def _on_te(self, name: bytes, value: bytes) -> None:
        if b"trailers" in value.lower():
            self._parts += (name, b": trailers\r\n")

    def _on_transfer_encoding(self, name: bytes, value: bytes) -> None:
        self.transfer_encoding = value if self.transfer_encoding is None else self.transfer_encoding + b", " + value
        self._parts += (name, b": chunked\r\n")

    def _on_upgrade(self, name: bytes, value: bytes) -> None:
        if self._upgrade:
            self._parts += (name, b": ", value, b"\r\nConnection: Upgrade\r\n")

    def _on_forwarded_for(self, name: bytes, value: bytes) -> None:
        self.forwarded_for = value if self.forwarded_for is None else self.forwarded_for + b", " + value
        if self._rules.mode != "x-forwarded":
            self._parts += (name, b": ", value, b"\r\n")

    def _on_forwarded_proto(self, name: bytes, value: bytes) -> None:
        if self._rules.mode == "x-forwarded":
            self._forwarded_proto = value
        else:
            self._parts += (name, b": ", value, b"\r\n")

    def _on_forwarded_host(self, name: bytes, value: bytes) -> None:
        if self._rules.mode == "x-forwarded":
            self._forwarded_host = value
        else:
            self._parts += (name, b": ", value, b"\r\n")

    def _on_forwarded(self, name: bytes, value: bytes) -> None:
        if self._rules.mode == "forwarded":
            self._forwarded.append(value)
        else:
            self._parts += (name, b": ", value, b"\r\n")

    def _on_via(self, name: bytes, value: bytes) -> None:
        if self._rules.via is not None:
            self._via.append(value)
        else:
            self._parts += (name, b": ", value, b"\r\n")

    def _add_own(self) -> None:
        """What the upstream is told by us, and the empty line."""
        rules, parts, peer = self._rules, self._parts, self._peer
        if not self._host_seen:
            if self._authority is not None:
                self.host = self._authority.encode("latin-1")
            host = self.host if rules.preserve_host and self.host else rules.authority
            parts += (b"Host: ", host, b"\r\n")
        if rules.own_lines:
            parts.append(rules.own_lines)
        mode = rules.mode
        if mode == "x-forwarded":
            if self.forwarded_for is self._forwarded_proto is self._forwarded_host is None:
                parts += (peer.forwarded, self.host, b"\r\n")
            else:
                said = (self.forwarded_for, self._forwarded_proto, self._forwarded_host)
                parts.append(x_forwarded(peer, *said, self.host))
        elif mode == "forwarded":
            self._forwarded.append(_rfc7239(peer, self.host))
            parts += (b"Forwarded: ", b", ".join(self._forwarded), b"\r\n")
        if rules.via is not None:
            self._via.append((b"1.0 " if self._http10 else b"1.1 ") + rules.via)
            parts += (b"Via: ", b", ".join(self._via), b"\r\n")
        parts.append(b"\r\n")


_REQUEST_HANDLERS: Final[dict[int, Callable[[RequestHead, bytes, bytes], None]]] = {
    HOP: RequestHead._drop,
    CONNECTION: RequestHead._on_connection,
    HOST: RequestHead._on_host,
    TE: RequestHead._on_te,
    TRANSFER_ENCODING: RequestHead._on_transfer_encoding,
    CONTENT_LENGTH: RequestHead._pass,
    UPGRADE: RequestHead._on_upgrade,
    X_FORWARDED_FOR: RequestHead._on_forwarded_for,
    X_FORWARDED_PROTO: RequestHead._on_forwarded_proto,
    X_FORWARDED_HOST: RequestHead._on_forwarded_host,
    FORWARDED: RequestHead._on_forwarded,
    VIA: RequestHead._on_via,
    USER_AGENT: RequestHead._on_user_agent,
    TRACEPARENT: RequestHead._on_traceparent,
    IDEMPOTENCY_KEY: RequestHead._on_idempotency_key,
    REMOVED: RequestHead._on_removed,
}


class ResponseHead:
    """What a response's head says, and the lines that the client is sent. Raises `ValueError` for
    framing that cannot be read.

    `http10`: the client knows no chunks. Only a 101 and a 426 keep their `Upgrade`. `called` says what the client asked
    for, where a field points to the upstream.
    """

    __slots__ = ("_called", "chunked", "close", "keep_alive", "length", "names", "parts")

    def __init__(
        self,
        rules: HeaderRules,
        fields: RawHeaders,
        *,
        status: int,
        http10: bool = False,
        called: Callable[[], Called] | None = None,
    ) -> None:
        self.length: int | None = None
        self.chunked = False
        self.close = False
        self.keep_alive: bytes | None = None  # the field, as it came
        self.names: list[str] = []
        self.parts: list[bytes] = []
        self._called = called
        connection = self._build(rules, fields, status, http10, frozenset())
        if connection is not None:
            self.close = b"close" in connection
            if connection not in QUIET_TOKENS:
                drop = named(connection)
                if drop:
                    self.names, self.parts = [], []
                    self._build(rules, fields, status, http10, drop)
        if rules.via is not None:
            self.parts += (b"Via: 1.1 ", rules.via, b"\r\n")

    def _build(
        self, rules: HeaderRules, fields: RawHeaders, status: int, http10: bool, drop: frozenset[bytes]
    ) -> bytes | None:
        kinds, names, parts = rules.response_kinds, self.names, self.parts
        coding = connection = None
        for name, value in fields:
            kind, text = kinds[name]
            names.append(text)
            if kind == PLAIN:
                if not drop or name.lower() not in drop:
                    parts += (name, b": ", value, b"\r\n")
            elif kind == CONTENT_LENGTH:
                self.length = int(value)
                parts += (name, b": ", value, b"\r\n")
            elif kind == CONNECTION:
                connection = value.lower() if connection is None else connection + b"," + value.lower()
            elif kind == TRANSFER_ENCODING:
                coding = value if coding is None else coding + b"," + value
                if not http10 and status != 204:
                    parts += (name, b": ", value, b"\r\n")
            elif kind == KEEP_ALIVE:
                self.keep_alive = value if self.keep_alive is None else self.keep_alive + b"," + value
            elif kind == UPGRADE and status in NAMES_PROTOCOL:
                parts += (name, b": ", value, b"\r\nConnection: Upgrade\r\n")
            elif kind >= LOCATION and (not drop or name.lower() not in drop):
                parts += (name, b": ", self._led_back(rules.redirects, kind, value, count=not drop), b"\r\n")
        if coding is not None:
            inner, _, last = coding.rpartition(b",")
            if last.strip().lower() != b"chunked":
                raise ValueError("the last transfer coding is not chunked")
            if inner and http10:
                raise ValueError("this client cannot read the transfer coding")
            self.chunked = True
        return connection

    def _led_back(self, redirects: Redirects, kind: int, value: bytes, *, count: bool) -> bytes:
        called = Called(b"") if self._called is None else self._called()
        if kind == REFRESH:
            return redirects.refresh(value, called, count=count)
        return redirects.location(value, called, count=count and kind == LOCATION)


def _rfc7239(peer: Peer, host: bytes) -> bytes:
    node = "unknown" if peer.ip is None else f'"[{peer.ip}]"' if ":" in peer.ip else peer.ip
    element = b"for=%b;proto=%b" % (node.encode(), peer.scheme)
    if host:
        quoted = host.replace(b"\\", b"\\\\").replace(b'"', b'\\"')
        element += b';host="%b"' % quoted
    return element


def trace_id(traceparent: bytes | None) -> str | None:
    """The W3C trace id, or None where the field is not one."""
    if traceparent is None:
        return None
    match = _TRACEPARENT.match(traceparent)
    if match is None or match[1] == b"0" * 32:
        return None
    return match[1].decode("ascii")


def x_forwarded(peer: Peer, chain: bytes | None, proto: bytes | None, named_host: bytes | None, host: bytes) -> bytes:
    """The lines about the client of a request that has such: ours is appended to the chain; scheme and host of a
    trusted proxy stay. `host`: what the request itself is for."""
    if peer.ip is not None:
        own = peer.ip.encode()
        chain = own if chain is None else chain + b", " + own
    return b"%bX-Forwarded-Proto: %b\r\nX-Forwarded-Host: %b\r\n" % (
        b"" if chain is None else b"X-Forwarded-For: %b\r\n" % chain,
        proto if proto is not None and peer.trusted else peer.scheme,
        named_host if named_host is not None and peer.trusted else host,
    )


def address_in(text: str) -> IPv4Address | IPv6Address | None:
    """An address as found in X-Forwarded-For: also with a port, in brackets, or IPv4 in IPv6's clothes."""
    text = text.strip().strip('"')
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        address = ip_address(text.partition("%")[0])
    except ValueError:
        return None
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address
