"""What the hop is told: one frozen value, made once from the settings and never changed.

Every limit of the hop is a field here, with its unit in its name and the origin of its default
beside it, so that an operator finds all of them in one place.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Network, IPv6Network
from typing import Literal

Network = IPv4Network | IPv6Network
OnDisconnect = Literal["drain", "stop"]
Forwarded = Literal["x-forwarded", "forwarded", "none"]


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
    linger_s: float = 5.0  # an unwanted upload is read and dropped, so that the answer can be read: until this silence,
    linger_total_s: float = 30.0  # but no longer than this (both are nginx's figures),
    linger_bytes_max: int = 268_435_456  # and no more of it: 2 s of a fast client's sending

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
