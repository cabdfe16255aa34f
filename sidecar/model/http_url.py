"""Addresses of HTTP services as users write them: `http(s)://host[:port][/base]`, and `unix:/path[:/base]` upstream.

One form comes out for every spelling of the same address: scheme and host in lower case, no port where it is the
scheme's own, no slash at the end.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

from sidecar.model.grammar import Unfit, UnfitSecret

PORTS: Final = {"http": 80, "https": 443}
# Labels as names have them: none that is empty or longer than 63 characters can be looked up.
HOST: Final = re.compile(r"[A-Za-z0-9_-]{1,63}(?:\.[A-Za-z0-9_-]{1,63})*\.?|\[[0-9A-Fa-f:.]+(?:%[A-Za-z0-9._-]+)?\]")
EXPECTED: Final = "an http:// or https:// address"


def can_be_looked_up(host: str) -> bool:
    """Whether a host that may be of other characters too (`HOST` is of ASCII) has labels that a name may have. Of one
    that has not the resolver raises `UnicodeError`, which nobody expects of it."""
    try:
        host.encode("idna")
    except UnicodeError:
        return False
    return True


def http_url(text: str, *, query: bool = False) -> str:
    """The address in its one form; with `query` it may have one, and its path keeps a slash at the end before it.

    Raises `UnfitSecret`: there may be a password in it.
    """
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError:
        raise UnfitSecret("expected a host, and a port from 1 to 65535") from None
    if parts.scheme not in PORTS or not parts.netloc:
        raise UnfitSecret(f"expected {EXPECTED}")
    if "@" in parts.netloc:
        raise UnfitSecret("expected no user and password inside the address: they would show in records and logs")
    if not text.isascii() or not text.isprintable() or any(c in text for c in ' "<>\\^`{|}'):
        raise UnfitSecret("expected an address in plain ASCII (a host as xn--…, other characters as %XX)")
    host = parts.netloc.removesuffix(f":{port}") if port is not None else parts.netloc.removesuffix(":")
    if not HOST.fullmatch(host) or port == 0:
        raise UnfitSecret("expected a host, and a port from 1 to 65535")
    if "#" in text or ("?" in text and not query):
        raise UnfitSecret("expected an address without " + ("a fragment" if query else "query and fragment"))
    authority = host.lower() if port in (None, PORTS[parts.scheme]) else f"{host.lower()}:{port}"
    path = parts.path if parts.query else parts.path.rstrip("/")
    return f"{parts.scheme}://{authority}{path}" + (f"?{parts.query}" if parts.query else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class UpstreamAddress:
    """Where the calls go, taken apart once."""

    url: str  # for records: scheme, authority and base, no trailing slash, no credentials
    tls: bool
    host: str
    port: int
    authority: bytes  # for the Host field
    base: bytes  # path prefix, without trailing slash
    socket_path: str | None  # set for unix:

    @classmethod
    def parse(cls, text: str) -> UpstreamAddress:
        """Raises `Unfit` that says what is expected."""
        if text.startswith("unix:"):
            return cls._parse_unix(text)
        url = http_url(text)
        parts = urlsplit(url)
        assert parts.hostname is not None
        return cls(
            url=url,
            tls=parts.scheme == "https",
            host=parts.hostname,
            port=parts.port or PORTS[parts.scheme],
            authority=parts.netloc.encode(),
            base=parts.path.encode(),
            socket_path=None,
        )

    @classmethod
    def nowhere(cls) -> UpstreamAddress:
        """Of calls that go to no upstream: a record's URL is their path alone."""
        return cls(url="", tls=False, host="", port=0, authority=b"", base=b"", socket_path=None)

    @classmethod
    def _parse_unix(cls, text: str) -> UpstreamAddress:
        socket, colon, base = text.removeprefix("unix:").partition(":")
        if not socket.startswith("/") or (colon and not base.startswith("/")) or not text.isprintable():
            raise Unfit("expected unix:/path/of/socket, or unix:/path/of/socket:/base")
        base = base.rstrip("/")
        if not base.isascii() or any(c in base for c in ' "<>\\^`{|}?#'):
            raise Unfit("expected a base path in plain ASCII (other characters as %XX), without query and fragment")
        return cls(
            url=f"http://localhost{base}",
            tls=False,
            host="localhost",
            port=PORTS["http"],
            authority=b"localhost",
            base=base.encode(),
            socket_path=socket,
        )

    def __str__(self) -> str:
        """As it is written."""
        return (
            self.url
            if self.socket_path is None
            else f"unix:{self.socket_path}" + (f":{self.base.decode()}" if self.base else "")
        )
