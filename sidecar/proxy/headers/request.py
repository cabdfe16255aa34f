"""A request's head, rewritten for the upstream."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from sidecar.proxy.headers import kinds
from sidecar.proxy.headers.kinds import QUIET_TOKENS, named
from sidecar.usage import RawHeaders

if TYPE_CHECKING:
    from sidecar.proxy.headers.rewriting import HeaderRules, Peer


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
        mode = rules.mode
        if mode == "x-forwarded":
            if self.forwarded_for is self._forwarded_proto is self._forwarded_host is None:
                parts += (peer.forwarded, self.host, b"\r\n")
            else:
                self._add_x_forwarded()
        elif mode == "forwarded":
            self._forwarded.append(_rfc7239(peer, self.host))
            parts += (b"Forwarded: ", b", ".join(self._forwarded), b"\r\n")
        if rules.via is not None:
            self._via.append((b"1.0 " if self._http10 else b"1.1 ") + rules.via)
            parts += (b"Via: ", b", ".join(self._via), b"\r\n")
        parts.append(b"\r\n")

    def _add_x_forwarded(self) -> None:
        """With earlier entries: ours is appended; scheme and host of a trusted proxy stay."""
        peer, chain = self._peer, self.forwarded_for
        if peer.ip is not None:
            own = peer.ip.encode()
            chain = own if chain is None else chain + b", " + own
        if chain is not None:
            self._parts += (b"X-Forwarded-For: ", chain, b"\r\n")
        proto, host = self._forwarded_proto, self._forwarded_host
        self._parts += (
            b"X-Forwarded-Proto: ", proto if proto is not None and peer.trusted else peer.scheme,
            b"\r\nX-Forwarded-Host: ", host if host is not None and peer.trusted else self.host, b"\r\n",
        )  # fmt: skip


_REQUEST_HANDLERS: Final[dict[int, Callable[[RequestHead, bytes, bytes], None]]] = {
    kinds.HOP: RequestHead._drop,
    kinds.CONNECTION: RequestHead._on_connection,
    kinds.HOST: RequestHead._on_host,
    kinds.TE: RequestHead._on_te,
    kinds.TRANSFER_ENCODING: RequestHead._on_transfer_encoding,
    kinds.CONTENT_LENGTH: RequestHead._pass,
    kinds.UPGRADE: RequestHead._on_upgrade,
    kinds.X_FORWARDED_FOR: RequestHead._on_forwarded_for,
    kinds.X_FORWARDED_PROTO: RequestHead._on_forwarded_proto,
    kinds.X_FORWARDED_HOST: RequestHead._on_forwarded_host,
    kinds.FORWARDED: RequestHead._on_forwarded,
    kinds.VIA: RequestHead._on_via,
    kinds.USER_AGENT: RequestHead._on_user_agent,
    kinds.TRACEPARENT: RequestHead._on_traceparent,
    kinds.IDEMPOTENCY_KEY: RequestHead._on_idempotency_key,
}


def _rfc7239(peer: Peer, host: bytes) -> bytes:
    node = "unknown" if peer.ip is None else f'"[{peer.ip}]"' if ":" in peer.ip else peer.ip
    element = b"for=%b;proto=%b" % (node.encode(), peer.scheme)
    if host:
        quoted = host.replace(b"\\", b"\\\\").replace(b'"', b'\\"')
        element += b';host="%b"' % quoted
    return element
