"""What the hop is told: one frozen value, made once from the settings and never changed.

Every limit of the hop is a field here, with its unit in its name and the origin of its default
beside it, so that an operator finds all of them in one place.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Network, IPv6Network
from typing import Final, Literal
from urllib.parse import urlsplit

Network = IPv4Network | IPv6Network
OnDisconnect = Literal["drain", "stop"]
Forwarded = Literal["x-forwarded", "forwarded", "none"]

_PORTS: Final = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True, kw_only=True)
class ProxyRules:
    """How calls are passed on, who is believed, and where it ends."""

    upstream_url: str  # http(s)://host[:port][/base], or unix:/path[:/base]
    public_url: str | None = None  # what records say instead of the upstream's base
    preserve_host: bool = False
    forwarded: Forwarded = "x-forwarded"
    via: str | None = None  # pseudonym for `Via`; None: none is added
    trusted_proxies: tuple[Network, ...] = ()
    query_values: frozenset[str] = frozenset()  # names whose values a record may keep
    meter_id_header: bool = False  # X-Meter-Id on answers
    rewrite_redirects: bool = True  # those to the upstream's own address lead back through here

    on_disconnect: OnDisconnect = "drain"
    on_disconnect_routes: Mapping[str, OnDisconnect] = field(default_factory=dict)
    disconnect_drain_s: float = 30.0
    drains_max: int = 256  # each holds an upstream connection that nobody reads

    connect_timeout_s: float = 10.0
    response_timeout_s: float = 600.0  # to the head of the answer: long model calls think for minutes
    idle_timeout_s: float = 600.0  # between two pieces of a body or of a tunnel
    head_timeout_s: float = 30.0  # a request head, first to last byte (slow-loris); Apache allows 20 to 40
    keepalive_timeout_s: float = 75.0  # an idle client connection; nginx's figure
    upstream_keepalive_s: float = 4.0  # an idle upstream connection; uvicorn and Node close theirs after 5
    upstream_connection_age_s: float = 300.0  # any upstream connection: so a name that moved is followed
    linger_s: float = 5.0  # how long an unwanted upload is read and dropped, so that the answer can be read

    head_bytes_max: int = 65_536  # a whole head; Envoy allows 60 KiB, and tokens in cookies grow
    head_fields_max: int = 128  # aiohttp's figure; Envoy allows 100
    target_bytes_max: int = 16_384  # signed URLs reach 8 KiB
    connections_max: int = 20_000  # client connections; each costs a descriptor here and one upstream
    calls_max: int = 20_000  # calls open at once, streams included
    retry_body_bytes_max: int = 65_536  # a request kept at hand for the one retry
    stop_s: float = 30.0

    upstream_ca_file: str | None = None
    upstream_client_cert_file: str | None = None
    upstream_client_key_file: str | None = None
    upstream_server_name: str | None = None  # SNI and the name that the certificate must bear
    listener_cert_file: str | None = None
    listener_key_file: str | None = None

    def disconnect_policy(self, route: str | None) -> OnDisconnect:
        """What to do when the client leaves a call on this route."""
        return self.on_disconnect if route is None else self.on_disconnect_routes.get(route, self.on_disconnect)


@dataclass(frozen=True, slots=True, kw_only=True)
class UpstreamAddress:
    """`upstream_url`, taken apart once."""

    url: str  # for records: scheme, authority and base, no trailing slash, no credentials
    tls: bool
    host: str
    port: int
    authority: bytes  # for the Host field
    base: bytes  # path prefix, without trailing slash
    socket_path: str | None  # set for unix:

    @classmethod
    def parse(cls, url: str) -> UpstreamAddress:
        """Raises `ValueError` that says what is expected."""
        if url.startswith("unix:"):
            return cls._parse_unix(url)
        parts = urlsplit(url)
        if parts.scheme not in _PORTS or not parts.hostname:
            raise ValueError(f"{_shown(url)!r}: expected http://host[:port][/base], https://… or unix:/path")
        if parts.username is not None or parts.query or parts.fragment:
            raise ValueError("the upstream URL may hold no credentials, query or fragment")
        try:
            host = parts.hostname.encode("idna").decode("ascii") if ":" not in parts.hostname else parts.hostname
            port = parts.port or _PORTS[parts.scheme]
        except ValueError:
            raise ValueError(f"{_shown(url)!r}: expected a host name and a port from 1 to 65535") from None
        shown_host = f"[{host}]" if ":" in host else host
        authority = shown_host if port == _PORTS[parts.scheme] else f"{shown_host}:{port}"
        base = parts.path.rstrip("/")
        if not base.isascii() or not base.isprintable() or " " in base:
            raise ValueError("the upstream URL's path must be percent-encoded")
        return cls(
            url=f"{parts.scheme}://{authority}{base}",
            tls=parts.scheme == "https",
            host=host,
            port=port,
            authority=authority.encode(),
            base=base.encode(),
            socket_path=None,
        )

    @classmethod
    def _parse_unix(cls, url: str) -> UpstreamAddress:
        path, _, base = url[len("unix:") :].partition(":")
        if not path.startswith("/") or (base and not base.startswith("/")):
            raise ValueError(f"{url!r}: expected unix:/path/to/socket or unix:/path/to/socket:/base")
        base = base.rstrip("/")
        return cls(
            url=f"http://localhost{base}",
            tls=False,
            host="localhost",
            port=80,
            authority=b"localhost",
            base=base.encode(),
            socket_path=path,
        )


def _shown(url: str) -> str:
    """A URL without what may be a password."""
    return url.rpartition("@")[2]
