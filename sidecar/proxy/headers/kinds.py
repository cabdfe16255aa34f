"""What field names mean to the hop: one look-up a field, by the name as it was spelled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from sidecar.model.exchange import HEADER_NAME_CHARS_MAX, cut

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

REQUEST: Final = {
    b"connection": CONNECTION, b"host": HOST, b"te": TE, b"transfer-encoding": TRANSFER_ENCODING,
    b"content-length": CONTENT_LENGTH, b"upgrade": UPGRADE, b"keep-alive": HOP, b"proxy-connection": HOP,
    b"http2-settings": HOP, b"x-forwarded-for": X_FORWARDED_FOR, b"x-forwarded-proto": X_FORWARDED_PROTO,
    b"x-forwarded-host": X_FORWARDED_HOST, b"forwarded": FORWARDED, b"via": VIA, b"user-agent": USER_AGENT,
    b"traceparent": TRACEPARENT, b"idempotency-key": IDEMPOTENCY_KEY,
}  # fmt: skip
RESPONSE: Final = {
    b"connection": CONNECTION, b"keep-alive": HOP, b"proxy-connection": HOP, b"te": HOP,
    b"transfer-encoding": TRANSFER_ENCODING, b"content-length": CONTENT_LENGTH, b"upgrade": UPGRADE,
}  # fmt: skip
# `Connection` may not be used to strip what framing and routing stand on.
_NOT_DROPPED: Final = frozenset({b"host", b"content-length", b"transfer-encoding", b"connection", b"upgrade", b"te"})
QUIET_TOKENS: Final = frozenset({b"close", b"keep-alive", b"upgrade", b"te", b"http2-settings", b""})

NAMES_KEPT_MAX: Final = 2048  # distinct spellings remembered; clients choose them, so they are bounded
NAME_KEPT_BYTES_MAX: Final = 64


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
