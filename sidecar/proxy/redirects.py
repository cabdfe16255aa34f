"""Where a response points: what leads to the upstream's own address leads back through here.

An upstream builds absolute URLs out of the `Host` it is sent, which is its own (`SIDECAR_PRESERVE_HOST` apart). A
client that follows one leaves the proxy behind: the call is not metered, and most clients drop its credentials on the
way to another origin. So of `Location`, `Content-Location` and `Refresh` exactly that authority is put back to what
the client called; whatever else is there stays, byte for byte, and so do other authorities, `Link` and bodies.

The client's own address is written only where it is certain. Where a proxy that is not trusted stands between, or one
that does not say by which scheme it was called, the URL becomes a path, which a client resolves against what it called.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

from sidecar.model.http_url import UpstreamAddress
from sidecar.model.target import origin_form

# What became of a redirect to the upstream's own address, as the metric says it.
REWRITTEN: Final = "rewritten"
OFF: Final = "off"  # SIDECAR_REWRITE_REDIRECTS=false
OUTSIDE: Final = "outside"  # not below the path of SIDECAR_UPSTREAM_URL: there is no way to it through here
SCHEME: Final = "scheme"  # the same resource by the other scheme, which here would lead to itself for ever

_DEFAULT_PORTS: Final = {b"http": b"80", b"https": b"443"}
# Nothing that a browser reads differently: no credentials, and no backslash, which it takes for a slash.
_URL: Final = re.compile(rb"(?:(https?):)?//([^/?#\\@]*)([/?#].*)?\Z", re.IGNORECASE | re.DOTALL)
_REFRESH: Final = re.compile(
    rb"([ \t]*[0-9.]*[ \t]*[;,][ \t]*(?:url[ \t]*=[ \t]*)?)([\"']?)(.*?)(\2?[ \t]*)\Z", re.IGNORECASE | re.DOTALL
)
_AUTHORITY: Final = re.compile(rb"(?:[A-Za-z0-9._~-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?\Z")
_DOTS: Final = re.compile(rb"/(?:\.|%2e){1,2}(?:[/?#]|\Z)", re.IGNORECASE)
_BETWEEN: Final = frozenset({b"via", b"forwarded", b"x-forwarded-for", b"x-forwarded-proto", b"x-forwarded-host"})


@dataclass(frozen=True, slots=True)
class Called:
    """What the client asked for, as far as it is certain."""

    target: bytes  # in origin form
    scheme: bytes | None = None  # None: the address is not known well enough to be written
    authority: bytes | None = None

    @classmethod
    def of(cls, target: str, fields: Iterable[tuple[bytes, bytes]], *, scheme: bytes, trusted: bool) -> Called:
        """From a request's target and fields, the scheme it came by, and whether its sender is believed. Never
        raises."""
        origin, authority = origin_form(target)
        asked = origin.encode("utf-8", "surrogateescape")
        said: dict[bytes, bytes] = {}
        for name, value in fields:
            said.setdefault(name.lower(), value)
        host = said.get(b"host") if authority is None else authority.encode("utf-8", "replace")
        if not _BETWEEN.isdisjoint(said):
            scheme = said.get(b"x-forwarded-proto", b"").partition(b",")[0].strip().lower() if trusted else b""
            host = said.get(b"x-forwarded-host", host or b"").partition(b",")[0].strip()
        if scheme not in _DEFAULT_PORTS or host is None or not _AUTHORITY.match(host):
            return cls(asked)
        return cls(asked, scheme, host)


class Redirects:
    """The rule, made ready once. `counted` is told what became of each redirect to the upstream's own address."""

    def __init__(
        self, address: UpstreamAddress, *, rewrite: bool, counted: Callable[[str], None], prefix: str = ""
    ) -> None:
        """`prefix`: what clients have in front of the upstream's paths, one of several upstreams'."""
        self._rewrite = rewrite
        self._counted = counted
        self._scheme = b"https" if address.tls else b"http"
        self._authority = address.authority.lower()  # as `Host` has it
        self._base = address.base
        self._prefix = prefix.encode("ascii")
        self._moved = bool(self._base or prefix)  # paths are others here than there
        port = b":" + _DEFAULT_PORTS[self._scheme]
        plain = self._authority.endswith(b"]") or b":" not in self._authority
        self._names = {self._authority, *({self._authority + port, self._authority + b":"} if plain else ())}

    def location(self, value: bytes, called: Called, *, count: bool = True) -> bytes:
        """A `Location` or `Content-Location`, as the client gets it."""
        url, word = self._led_back(value, called)
        if count and word is not None:
            self._counted(word)
        return url

    def refresh(self, value: bytes, called: Called, *, count: bool = True) -> bytes:
        """A `Refresh` field (as HTML has it: `5; url=…`), as the client gets it."""
        match = _REFRESH.match(value)
        if match is None:
            return value
        before, quote, url, after = match.groups()
        return b"%b%b%b%b" % (before, quote, self.location(url, called, count=count), after)

    def _led_back(self, value: bytes, called: Called) -> tuple[bytes, str | None]:
        """The URL, and what became of it; None: it is none of ours."""
        match = _URL.match(value)
        if match is None:
            # A path of the upstream's needs its base taken off, or it would be put in front a second time; and the
            # prefix, which the upstream never sees, put on.
            path = self._below(value) if self._moved and value[:1] == b"/" and self._rewrite else None
            return (value, None) if path is None else (_as_reference(path), REWRITTEN)
        scheme, authority, path = match[1], match[2].lower(), match[3] or b""
        foreign = scheme is not None and scheme.lower() != self._scheme
        # Behind something that ends TLS an upstream knows its own scheme wrongly, or takes it from the client.
        if authority != self._authority if foreign else authority not in self._names:
            return value, None
        below = self._below(path)
        if below is None:
            return value, OUTSIDE
        if foreign and below.partition(b"#")[0] == called.target:
            return value, SCHEME
        if not self._rewrite:
            return value, OFF
        if called.scheme is None or called.authority is None:
            return _as_reference(below), REWRITTEN
        start = b"" if scheme is None else called.scheme + b":"
        return b"%b//%b%b" % (start, called.authority, below), REWRITTEN

    def _below(self, path: bytes) -> bytes | None:
        """The path as clients call it, without the upstream's base; None: it is not below that."""
        base = self._base
        if self._moved:
            if _DOTS.search(path) or not path.startswith(base) or path[len(base) : len(base) + 1] not in b"/?#":
                return None
            path = path[len(base) :]
        return self._prefix + (path if path.startswith(b"/") else b"/" + path)


def _as_reference(path: bytes) -> bytes:
    """A path that stands alone: two slashes at its start would begin another authority (RFC 3986, 4.2)."""
    return b"/." + path if path.startswith(b"//") else path
