"""The rules of rewriting, made ready once; targets, client addresses, and what a record says of them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Final

from sidecar.model.exchange import URL_CHARS_MAX, USER_AGENT_CHARS_MAX, cut
from sidecar.model.http_url import UpstreamAddress
from sidecar.model.target import below, origin_form
from sidecar.proxy.config import Forwarded, ProxyRules
from sidecar.proxy.headers.kinds import HOP, REQUEST, RESPONSE, Kinds
from sidecar.proxy.headers.request import RequestHead
from sidecar.usage import RawHeaders

METER_ID: Final = b"x-meter-id"
ADDRESSES_KEPT_MAX: Final = 1024  # clients may claim any address in X-Forwarded-For

_TRACEPARENT = re.compile(rb"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}(?:-.*)?\Z")


@dataclass(slots=True, frozen=True)
class Peer:
    """The other end of a client connection: made once, used for all its calls."""

    ip: str | None  # None: a Unix socket
    trusted: bool
    scheme: bytes
    forwarded: bytes  # the field lines that say so, up to the host's value; b"" where none are added


def _ignore(limit: str) -> None:
    """A limit that nobody counts."""


class HeaderRules:
    """`ProxyRules`, made ready for the two passes a call. `limit_reached` is told what a record does not keep whole."""

    def __init__(
        self, rules: ProxyRules, address: UpstreamAddress, limit_reached: Callable[[str], None] = _ignore
    ) -> None:
        self._address = address
        self.authority = address.authority
        self.preserve_host = rules.preserve_host
        self.mode: Forwarded = rules.forwarded
        self.via = rules.via.encode("latin-1") if rules.via else None
        self._trusted = rules.trusted_proxies
        self._trust: dict[str, bool] = {}  # a look-up in networks costs microseconds, and proxies are few
        self._base_url = (rules.public_url or address.url).rstrip("/")
        self._query_values = rules.query_values
        self._base = address.base.decode("ascii")
        self._limit_reached = limit_reached
        too_long = partial(limit_reached, "header_name_chars")
        self.meter_id = rules.meter_id_header
        self.request_kinds = Kinds(REQUEST, too_long)
        # The field is ours then: one of the upstream's beside it could be taken for it.
        self.response_kinds = Kinds(RESPONSE | {METER_ID: HOP} if self.meter_id else RESPONSE, too_long)

    # -- the client ------------------------------------------------------------------------------

    def peer(self, ip: str | None, *, tls: bool) -> Peer:
        """What is known of a client connection. An address is written as the upstream should see it."""
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
            method.encode("ascii"), base, target.encode("utf-8", "surrogateescape"),
        ), authority  # fmt: skip

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
        url = f"{self._base_url}{path}" if path != "*" else f"{self._base_url}/*"
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


def trace_id(traceparent: bytes | None) -> str | None:
    """The W3C trace id, or None where the field is not one."""
    if traceparent is None:
        return None
    match = _TRACEPARENT.match(traceparent)
    if match is None or match[1] == b"0" * 32:
        return None
    return match[1].decode("ascii")


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
