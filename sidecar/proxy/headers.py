"""Rewriting of heads: what a proxy must change, and nothing else.

Fields are passed on as the bytes they came in, in their order and case. Changed are: hop-by-hop
fields (and those that `Connection` names), framing, `Host`, and what tells the upstream about the
client. No I/O, no clock; every function is a table test away.

One pass over the fields decides and builds at once, because it is done twice for every call; a
second pass is made only where `Connection` names fields to drop.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Final

from sidecar.proxy.rules import Forwarded, ProxyRules, UpstreamAddress
from sidecar.usage import RawHeaders

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

_REQUEST: Final = {
    b"connection": CONNECTION, b"host": HOST, b"te": TE, b"transfer-encoding": TRANSFER_ENCODING,
    b"content-length": CONTENT_LENGTH, b"upgrade": UPGRADE, b"keep-alive": HOP, b"proxy-connection": HOP,
    b"http2-settings": HOP, b"x-forwarded-for": X_FORWARDED_FOR, b"x-forwarded-proto": X_FORWARDED_PROTO,
    b"x-forwarded-host": X_FORWARDED_HOST, b"forwarded": FORWARDED, b"via": VIA, b"user-agent": USER_AGENT,
    b"traceparent": TRACEPARENT, b"idempotency-key": IDEMPOTENCY_KEY,
}  # fmt: skip
_RESPONSE: Final = {
    b"connection": CONNECTION, b"keep-alive": HOP, b"proxy-connection": HOP, b"te": HOP,
    b"transfer-encoding": TRANSFER_ENCODING, b"content-length": CONTENT_LENGTH, b"upgrade": UPGRADE, b"via": VIA,
}  # fmt: skip
# `Connection` may not be used to strip what framing and routing stand on.
_NOT_DROPPED: Final = frozenset({b"host", b"content-length", b"transfer-encoding", b"connection", b"upgrade", b"te"})
_QUIET_TOKENS: Final = frozenset({b"close", b"keep-alive", b"upgrade", b"te", b"http2-settings", b""})

NAMES_KEPT_MAX: Final = 2048  # distinct spellings remembered; clients choose them, so they are bounded
NAME_KEPT_BYTES_MAX: Final = 64
ADDRESSES_KEPT_MAX: Final = 1024  # clients may claim any address in X-Forwarded-For

_TRACEPARENT = re.compile(rb"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}(?:-.*)?\Z")
_ABSOLUTE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://([^/?#]*)")


class _Kinds(dict[bytes, tuple[int, str]]):
    """Field name as spelled -> (what it means, its text): one look-up a field."""

    def __init__(self, meanings: dict[bytes, int]) -> None:
        super().__init__()
        self._meanings = meanings

    def __missing__(self, name: bytes) -> tuple[int, str]:
        kind = (self._meanings.get(name.lower(), PLAIN), name.decode("latin-1"))
        if len(name) <= NAME_KEPT_BYTES_MAX:
            if len(self) >= NAMES_KEPT_MAX:
                self.clear()
            self[name] = kind
        return kind


@dataclass(slots=True, frozen=True)
class Peer:
    """The other end of a client connection: made once, used for all its calls."""

    ip: str | None  # None: a Unix socket
    trusted: bool
    scheme: bytes
    forwarded: bytes  # the field lines that say so, up to the host's value; b"" where none are added


@dataclass(slots=True)
class RequestHead:
    """What one request head says, and the bytes that go upstream instead of it."""

    lines: bytes  # everything after the request line, with the empty line
    names: list[str]
    host: bytes
    user_agent: bytes | None
    traceparent: bytes | None
    forwarded_for: bytes | None
    idempotency_key: bool
    transfer_encoding: bytes | None
    upgrade: bytes | None


class HeaderRules:
    """`ProxyRules`, made ready for the two passes a call."""

    def __init__(self, rules: ProxyRules, address: UpstreamAddress) -> None:
        self._address = address
        self._host_line = b"Host: " + address.authority + b"\r\n"
        self._preserve_host = rules.preserve_host
        self._mode: Forwarded = rules.forwarded
        self._via = rules.via.encode("latin-1") if rules.via else None
        self._trusted = rules.trusted_proxies
        self._trust: dict[str, bool] = {}  # a look-up in networks costs microseconds, and proxies are few
        self._base_url = (rules.public_url or address.url).rstrip("/")
        self._query_values = rules.query_values
        self._request_kinds = _Kinds(_REQUEST)
        self._response_kinds = _Kinds(_RESPONSE)

    # -- the client ------------------------------------------------------------------------------

    def peer(self, ip: str | None, *, tls: bool) -> Peer:
        """What is known of a client connection. An address is written as the upstream should see it."""
        shown = None
        if ip is not None:
            address = _address(ip)
            shown = str(address) if address is not None else None
        trusted = shown is None or self._is_trusted(shown)
        scheme = b"https" if tls else b"http"
        lines = b""
        if self._mode == "x-forwarded":
            client = b"X-Forwarded-For: %b\r\n" % shown.encode() if shown else b""
            lines = client + b"X-Forwarded-Proto: " + scheme + b"\r\nX-Forwarded-Host: "
        return Peer(shown, trusted, scheme, lines)

    def client_ip(self, peer: Peer, forwarded_for: bytes | None) -> str | None:
        """The rightmost address that is no proxy of ours; what an untrusted peer claims is not read."""
        if not peer.trusted or forwarded_for is None:
            return peer.ip
        found = peer.ip
        for entry in reversed(forwarded_for.split(b",")):
            address = _address(entry.strip().decode("latin-1"))
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
        authority = None
        if not target.startswith("/") and target != "*":
            match = _ABSOLUTE.match(target)
            if match is not None:
                authority = match[1]
                target = target[match.end() :]
                if not target.startswith("/"):
                    target = "/" + target
        base = b"" if target == "*" else self._address.base
        return b"%b %b%b HTTP/1.1\r\n" % (
            method.encode("ascii"), base, target.encode("utf-8", "surrogateescape"),
        ), authority  # fmt: skip

    def request(self, fields: RawHeaders, peer: Peer, *, upgrade: bool = False, http10: bool = False,
                authority: str | None = None, drop: frozenset[bytes] | None = None) -> RequestHead:  # fmt: skip
        """Decide every field and build the head in the same pass.

        `upgrade`: a wanted protocol switch is passed on. `authority`: from an absolute-form target,
        which stands above the `Host` field (RFC 9112, 3.2.2). `drop`: the fields that `Connection` names,
        once they are known.
        """
        kinds = self._request_kinds
        parts: list[bytes] = []
        names: list[str] = []
        host = b""
        user_agent = traceparent = forwarded_for = transfer_encoding = upgrade_value = connection = None
        idempotency_key = host_seen = plain_forwarding = False
        forwarded: list[bytes] = []
        proto = forwarded_host = None
        via: list[bytes] = []
        mode = self._mode
        for name, value in fields:
            kind, text = kinds[name]
            names.append(text)
            if kind == PLAIN:
                if drop is None or name.lower() not in drop:
                    parts += (name, b": ", value, b"\r\n")
                continue
            if kind == HOST:
                host_seen = True
                host = authority.encode("latin-1") if authority is not None else value
                parts += (name, b": ", host if self._preserve_host else self._address.authority, b"\r\n")
            elif kind == CONTENT_LENGTH:
                parts += (name, b": ", value, b"\r\n")
            elif kind == USER_AGENT:
                user_agent = value
                parts += (name, b": ", value, b"\r\n")
            elif kind == TRACEPARENT:
                traceparent = value
                parts += (name, b": ", value, b"\r\n")
            elif kind == IDEMPOTENCY_KEY:
                idempotency_key = True
                parts += (name, b": ", value, b"\r\n")
            elif kind == X_FORWARDED_FOR:
                forwarded_for = value if forwarded_for is None else forwarded_for + b", " + value
                if mode != "x-forwarded":
                    parts += (name, b": ", value, b"\r\n")
                plain_forwarding = True
            elif kind in (X_FORWARDED_PROTO, X_FORWARDED_HOST):
                if mode != "x-forwarded":
                    parts += (name, b": ", value, b"\r\n")
                elif kind == X_FORWARDED_PROTO:
                    proto = value
                else:
                    forwarded_host = value
                plain_forwarding = True
            elif kind == FORWARDED:
                if mode == "forwarded":
                    forwarded.append(value)
                else:
                    parts += (name, b": ", value, b"\r\n")
            elif kind == VIA:
                if self._via is not None:
                    via.append(value)
                else:
                    parts += (name, b": ", value, b"\r\n")
            elif kind == TE:
                if b"trailers" in value.lower():
                    parts += (name, b": trailers\r\n")
            elif kind == TRANSFER_ENCODING:
                transfer_encoding = value if transfer_encoding is None else transfer_encoding + b", " + value
                parts += (name, b": chunked\r\n")
            elif kind == UPGRADE:
                upgrade_value = value
                if upgrade:
                    parts += (name, b": ", value, b"\r\nConnection: Upgrade\r\n")
            elif kind == CONNECTION:
                connection = value.lower() if connection is None else connection + b"," + value.lower()
        if connection is not None and drop is None and connection not in _QUIET_TOKENS:
            drop = _named(connection)
            if drop:
                return self.request(fields, peer, upgrade=upgrade, http10=http10, authority=authority, drop=drop)
        if not host_seen:
            host = authority.encode("latin-1") if authority is not None else b""
            parts.append(b"Host: " + host + b"\r\n" if self._preserve_host and host else self._host_line)
        if mode == "x-forwarded":
            if plain_forwarding:
                parts.append(self._x_forwarded(peer, forwarded_for, proto, forwarded_host, host))
            else:
                parts += (peer.forwarded, host, b"\r\n")
        elif mode == "forwarded":
            forwarded.append(_rfc7239(peer, host))
            parts += (b"Forwarded: ", b", ".join(forwarded), b"\r\n")
        if self._via is not None:
            via.append((b"1.0 " if http10 else b"1.1 ") + self._via)
            parts += (b"Via: ", b", ".join(via), b"\r\n")
        parts.append(b"\r\n")
        return RequestHead(
            b"".join(parts), names, host, user_agent, traceparent, forwarded_for, idempotency_key, transfer_encoding,
            upgrade_value,
        )  # fmt: skip

    def _x_forwarded(self, peer: Peer, chain: bytes | None, proto: bytes | None, host: bytes | None,
                     own_host: bytes) -> bytes:  # fmt: skip
        """With earlier entries: ours is appended; scheme and host of a trusted proxy stay."""
        lines = b""
        if peer.ip is not None:
            own = peer.ip.encode()
            lines = b"X-Forwarded-For: %b\r\n" % (own if chain is None else chain + b", " + own)
        elif chain is not None:
            lines = b"X-Forwarded-For: %b\r\n" % chain
        proto = proto if proto is not None and peer.trusted else peer.scheme
        host = host if host is not None and peer.trusted else own_host
        return lines + b"X-Forwarded-Proto: %b\r\nX-Forwarded-Host: %b\r\n" % (proto, host)

    # -- answers ---------------------------------------------------------------------------------

    def response(self, fields: RawHeaders, *, status: int, http10: bool = False,
                 drop: frozenset[bytes] | None = None) -> ResponseHead:  # fmt: skip
        """The field lines of an answer, and how its body ends. Raises `ValueError` for framing that cannot be read.

        `http10`: the client knows no chunks. Only a 101 keeps its `Upgrade`.
        """
        kinds = self._response_kinds
        parts: list[bytes] = []
        names: list[str] = []
        length = coding = connection = None
        for name, value in fields:
            kind, text = kinds[name]
            names.append(text)
            if kind == PLAIN:
                if drop is None or name.lower() not in drop:
                    parts += (name, b": ", value, b"\r\n")
            elif kind == CONTENT_LENGTH:
                length = int(value)
                parts += (name, b": ", value, b"\r\n")
            elif kind == TRANSFER_ENCODING:
                coding = value if coding is None else coding + b"," + value
                if not http10 and status != 204:
                    parts += (name, b": ", value, b"\r\n")
            elif kind == CONNECTION:
                connection = value.lower() if connection is None else connection + b"," + value.lower()
            elif kind == VIA:
                parts += (name, b": ", value, b"\r\n")
            elif kind == UPGRADE and status == 101:
                parts += (name, b": ", value, b"\r\nConnection: Upgrade\r\n")
        close = keep_alive = False
        if connection is not None:
            close = b"close" in connection
            keep_alive = b"keep-alive" in connection
            if drop is None and connection not in _QUIET_TOKENS:
                drop = _named(connection)
                if drop:
                    return self.response(fields, status=status, http10=http10, drop=drop)
        if coding is not None:
            inner, _, last = coding.rpartition(b",")
            if last.strip().lower() != b"chunked":
                raise ValueError("the last transfer coding is not chunked")
            if inner and http10:
                raise ValueError("this client cannot read the transfer coding")
        if self._via is not None:
            parts += (b"Via: 1.1 ", self._via, b"\r\n")
        return ResponseHead(parts, names, length, coding is not None, close, keep_alive)

    # -- records ---------------------------------------------------------------------------------

    def record_url(self, target: str) -> tuple[str, str]:
        """(what a record says, the path alone). Query names stay, their values go unless allowed; an
        authority and a fragment go whole."""
        if not target.startswith("/"):
            match = _ABSOLUTE.match(target)
            if match is not None:
                target = target[match.end() :]
                if not target.startswith("/"):
                    target = "/" + target
        if "#" in target:
            target = target.partition("#")[0]
        path, mark, query = target.partition("?")
        url = f"{self._base_url}{path}" if path != "*" else f"{self._base_url}/*"
        if not mark or not query:
            return url, path
        shown = []
        for pair in query.split("&"):
            name = pair.partition("=")[0]
            if name:
                shown.append(pair if name in self._query_values else name)
        return (f"{url}?{'&'.join(shown)}" if shown else url), path


@dataclass(slots=True)
class ResponseHead:
    """What an answer's head says, and the lines that the client is sent."""

    parts: list[bytes]
    names: list[str]
    length: int | None
    chunked: bool
    close: bool
    keep_alive: bool


def trace_id(traceparent: bytes | None) -> str | None:
    """The W3C trace id, or None where the field is not one."""
    if traceparent is None:
        return None
    match = _TRACEPARENT.match(traceparent)
    if match is None or match[1] == b"0" * 32:
        return None
    return match[1].decode("ascii")


def _named(connection: bytes) -> frozenset[bytes]:
    """The fields that a `Connection` value (in lower case) says to drop."""
    return frozenset(token.strip() for token in connection.split(b",")) - _QUIET_TOKENS - _NOT_DROPPED


def _rfc7239(peer: Peer, host: bytes) -> bytes:
    node = "unknown" if peer.ip is None else f'"[{peer.ip}]"' if ":" in peer.ip else peer.ip
    element = b"for=%b;proto=%b" % (node.encode(), peer.scheme)
    if host:
        quoted = host.replace(b"\\", b"\\\\").replace(b'"', b'\\"')
        element += b';host="%b"' % quoted
    return element


def _address(text: str) -> IPv4Address | IPv6Address | None:
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
