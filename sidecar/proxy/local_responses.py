"""The responses that are ours: small JSON with fixed texts.

No byte of a request ever appears in them: a header echoed in a 400 has leaked many a secret.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from sidecar.gate.admission import Response
from sidecar.proxy.ending import Cause


@dataclass(frozen=True, slots=True)
class LocalResponse:
    """One fixed response. `reason` is also the label of its counter."""

    status: int
    phrase: str
    type: str
    message: str

    @property
    def body(self) -> bytes:
        return b'{"error": {"type": "%b", "message": "%b"}}' % (self.type.encode(), self.message.encode())

    def encode(
        self, *, close: bool, keep_alive_10: bool = False, head_only: bool = False, fields: bytes = b""
    ) -> bytes:
        """The whole response. `fields` are further field lines, each with its line end."""
        body = self.body
        connection = b"Connection: close\r\n" if close else b"Connection: keep-alive\r\n" if keep_alive_10 else b""
        return b"HTTP/1.1 %d %b\r\nContent-Type: application/json\r\nContent-Length: %d\r\n%b%b\r\n%b" % (
            self.status,
            self.phrase.encode(),
            len(body),
            connection,
            fields,
            b"" if head_only else body,
        )


FIELD_NAMES: Final = ("Content-Type", "Content-Length")


def field_names(own: LocalResponse | Response) -> tuple[str, ...]:
    """Of its head, for the record."""
    return FIELD_NAMES if isinstance(own, LocalResponse) else (*(name for name, _ in own.headers), "Content-Length")


def message_of(own: LocalResponse | Response) -> str:
    """Why, as the record says it."""
    return own.message if isinstance(own, LocalResponse) else "denied"


BAD_REQUEST: Final = LocalResponse(400, "Bad Request", "bad_request", "the request is not valid HTTP/1.1")
AMBIGUOUS: Final = LocalResponse(
    400, "Bad Request", "ambiguous_framing", "the request's framing can be read in more than one way"
)
BAD_CHUNK: Final = LocalResponse(400, "Bad Request", "bad_chunk", "the request's chunked body is malformed")
BAD_VERSION: Final = LocalResponse(400, "Bad Request", "bad_version", "only HTTP/1.0 and HTTP/1.1 are spoken here")
BAD_HOST: Final = LocalResponse(400, "Bad Request", "bad_host", "the request's Host is not valid")
TOO_SLOW: Final = LocalResponse(408, "Request Timeout", "request_timeout", "the request did not arrive in time")
TARGET_TOO_LONG: Final = LocalResponse(414, "URI Too Long", "target_too_long", "the request target is too long")
HEAD_TOO_LARGE: Final = LocalResponse(
    431, "Request Header Fields Too Large", "head_too_large", "the request's header fields are too large or too many"
)
UNKNOWN_METHOD: Final = LocalResponse(501, "Not Implemented", "unknown_method", "this method is not passed on")
OWN_FAULT: Final = LocalResponse(500, "Internal Server Error", "proxy_fault", "the proxy failed to handle this call")
NO_UPSTREAM: Final = LocalResponse(404, "Not Found", "no_upstream", "no upstream is set for this path or host")
UNREACHABLE: Final = LocalResponse(502, "Bad Gateway", "upstream_unreachable", "no connection to the upstream")
BROKEN: Final = LocalResponse(502, "Bad Gateway", "upstream_broke", "the upstream gave no valid response")
SPOOL_FULL: Final = LocalResponse(
    503, "Service Unavailable", "metering_unavailable", "no call can be recorded right now"
)
TOO_MANY: Final = LocalResponse(503, "Service Unavailable", "too_many_calls", "too many calls are open")
CONNECT_TIMEOUT: Final = LocalResponse(
    504, "Gateway Timeout", "upstream_connect_timeout", "the upstream accepted no connection in time"
)
RESPONSE_TIMEOUT: Final = LocalResponse(
    504, "Gateway Timeout", "upstream_timeout", "the upstream did not answer in time"
)

FOR: Final[Mapping[Cause, LocalResponse]] = {
    Cause.UPLOAD_STALLED: TOO_SLOW,
    Cause.UPLOAD_BROKE: BAD_CHUNK,
    Cause.UNREACHABLE: UNREACHABLE,
    Cause.NO_RESPONSE: RESPONSE_TIMEOUT,
    Cause.BROKE: BROKEN,
    Cause.FAULT: OWN_FAULT,
}
"""What a client is told when its call ends for this cause, unless there is something more exact to say."""
