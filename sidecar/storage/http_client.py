"""The client for questions to others on the network: one request, one answer, or why there was none.

A failure to resolve, connect or shake hands means that nothing was sent, and so does a connection on which something
else than HTTP came back, or whose port speaks TLS where we spoke plainly. Any other end without an answer may have been
read there. Following redirects, cookies and retrying are not done here: the first two would carry a key elsewhere,
the third is the caller's.
"""

from __future__ import annotations

import asyncio
import errno
import re
import socket
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import partial
from time import monotonic, time
from types import SimpleNamespace
from typing import Any, Final, cast
from urllib.parse import urlsplit

import aiohttp
import orjson
from aiohttp.client_proto import ResponseHandler

from sidecar import __version__

CONNECT_TIMEOUT_S: Final = 10.0  # as for upstreams; a server that takes longer is not there
ANSWER_TIMEOUT_S: Final = 30.0  # from the first byte sent; vendors' own packages use 10 to 80
ANSWER_BYTES_MAX: Final = 256 * 1024  # of an answer that is looked at; a report over 1000 events is below 200 KiB
ECHO: Final = 3  # and so many times what was sent: a vendor may give back each event with fields of its own
TLS_QUESTION_S: Final = 2.0  # for asking a port that said nothing whether it speaks TLS
CONNECTION_AGE_S: Final = 300.0  # as towards upstreams (`SIDECAR_UPSTREAM_CONNECTION_AGE_S`)
IDLE_S: Final = 15.0  # how long an unused connection is kept; aiohttp's own default
RETRY_AFTER_S_MAX: Final = 86_400.0  # a vendor asking for more than a day is taken for a mistake of the day

_HTTP: Final = b"HTTP/"
_CODE: Final = re.compile(r"[A-Za-z0-9_.:-]{1,64}")


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back. `cut`: why the body is not whole; a refusal holds all the same."""

    status: int
    headers: Mapping[str, str]
    body: bytes = b""
    cut: str | None = None

    @property
    def ok(self) -> bool:
        return 200 <= self.status < 300

    def json(self) -> Any:
        """The body as JSON, or None: vendors answer with HTML pages where nobody expects them."""
        try:
            return orjson.loads(self.body)
        except orjson.JSONDecodeError:
            return None

    def code(self, *path: str) -> str | None:
        """A vendor's error code, if it looks like one: never free text, which may repeat what was sent."""
        value = self.json()
        for name in path:
            value = value.get(name) if isinstance(value, dict) else None
        if isinstance(value, int) and not isinstance(value, bool):
            value = str(value)
        return value if isinstance(value, str) and _CODE.fullmatch(value) else None

    def retry_after_s(self, now_s: float) -> float | None:
        """The wait that the server asks for, in either of its two forms or in milliseconds."""
        millis = _number(self.headers.get("retry-after-ms"))
        if millis is not None:
            return min(millis / 1000, RETRY_AFTER_S_MAX)
        text = self.headers.get("retry-after")
        seconds = _number(text)
        if seconds is None and text is not None:
            seconds = _until(text, now_s)
        return None if seconds is None else min(seconds, RETRY_AFTER_S_MAX)


@dataclass(frozen=True, slots=True)
class NoAnswer:
    """Why nothing came back, in one of a few fixed words. `maybe_read`: whether the request may have got there."""

    reason: str
    maybe_read: bool = False


BAD_URL: Final = NoAnswer("bad_url")


@dataclass(slots=True)
class _Trace:
    """How far a request got. `connected`: from here on a byte may have left; `fresh`: on a connection of its own."""

    connected: bool = False
    fresh: bool = False


class _NotHttp(aiohttp.ClientError):
    """The first that came on a connection is not HTTP: who is there has read no request."""


class _Wire(ResponseHandler):
    """A connection that tells an answer from what comes behind it.

    aiohttp drops an answer that it has read when nonsense follows in the same piece: a body behind a 204, one longer
    than its `Content-Length`. Others take such an answer, and its request was read: so a head goes on by itself.

    It is used no more when it is old: with steady traffic it would never rest, and whoever has the name by now, behind
    a balancer or after a move, would get nothing for as long as the old server lives.
    """

    _began = False

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop)
        self._old_at_s = monotonic() + CONNECTION_AGE_S

    @property
    def should_close(self) -> bool:
        return super().should_close or monotonic() >= self._old_at_s

    def data_received(self, data: bytes) -> None:
        if not self._began and (begin := data.lstrip(b"\r\n")):
            self._began = True
            if not begin.startswith(_HTTP[: len(begin)]):
                self.set_exception(_NotHttp())
                if self.transport is not None:
                    self.transport.close()
                return
        head, end, rest = data.partition(b"\r\n\r\n")
        super().data_received(head + end)
        if rest:
            super().data_received(rest)


async def _mark_connected(_: aiohttp.ClientSession, context: SimpleNamespace, __: Any) -> None:
    trace = context.trace_request_ctx
    if isinstance(trace, _Trace):
        trace.connected = trace.fresh = True


async def _mark_reused(_: aiohttp.ClientSession, context: SimpleNamespace, __: Any) -> None:
    trace = context.trace_request_ctx
    if isinstance(trace, _Trace):
        trace.connected, trace.fresh = True, False


@dataclass(slots=True, kw_only=True)
class HttpClient:
    """Connections to one server. Opened with the first request, closed with `aclose`."""

    timeout_s: float = ANSWER_TIMEOUT_S
    connect_timeout_s: float = CONNECT_TIMEOUT_S
    tls: ssl.SSLContext | None = None  # None: the system's certificates, verified
    clock: Callable[[], float] = time
    idle_s: float = IDLE_S
    _session: aiohttp.ClientSession | None = field(default=None, init=False)
    _spoke_http: bool = field(default=False, init=False)  # an answer has come, so this is no port of another protocol

    async def ask(self, method: str, url: str, body: bytes | None, headers: Mapping[str, str]) -> Answer | NoAnswer:
        """One request, one answer; or why there is none."""
        trace = _Trace()
        try:
            async with self._open().request(
                method,
                url,
                data=body,
                headers=headers,
                allow_redirects=False,
                trace_request_ctx=trace,
            ) as response:
                self._spoke_http = True
                answered = {name.lower(): value for name, value in response.headers.items()}
                most = ANSWER_BYTES_MAX + ECHO * len(body or b"")
                return Answer(response.status, answered, *await _read(response, most))
        except aiohttp.InvalidURL:
            return BAD_URL
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            return await self._without_answer(error, trace, url)

    async def _without_answer(self, error: Exception, trace: _Trace, url: str) -> NoAnswer:
        """Whether the request may have been read all the same."""
        reason = fault_of(error)
        if not trace.connected:
            return NoAnswer(reason)
        if not trace.fresh:
            return NoAnswer(reason, maybe_read=True)
        if isinstance(error, _NotHttp):
            return NoAnswer(reason)
        silent = reason in ("reset", "timeout") and not self._spoke_http
        if silent and url.startswith("http://") and await speaks_tls(url):
            return NoAnswer("tls")
        return NoAnswer(reason, maybe_read=True)

    async def aclose(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            trace = aiohttp.TraceConfig()
            trace.on_connection_create_end.append(cast(Any, _mark_connected))
            trace.on_connection_reuseconn.append(cast(Any, _mark_reused))
            # limit=0: how many requests run at once is the caller's to say.
            connector = aiohttp.TCPConnector(
                limit=0, keepalive_timeout=self.idle_s, ssl=self.tls if self.tls is not None else True
            )
            # Not of aiohttp's public face, like the hop's (`proxy.aiohttp_compat`).
            connector._factory = partial(_Wire, asyncio.get_running_loop())  # type: ignore[assignment]
            self._session = aiohttp.ClientSession(
                connector=connector,
                timeout=aiohttp.ClientTimeout(
                    total=self.connect_timeout_s + self.timeout_s,
                    connect=self.connect_timeout_s,
                    sock_read=self.timeout_s,
                ),
                cookie_jar=aiohttp.DummyCookieJar(),
                headers={"user-agent": f"metering-sidecar/{__version__}"},
                trace_configs=[trace],
            )
        return self._session


def fault_of(error: BaseException) -> str:
    """What went wrong between us and the other side, in one of a few fixed words."""
    if isinstance(error, TimeoutError):
        return "timeout"
    if isinstance(error, (aiohttp.ClientConnectorDNSError, socket.gaierror)):
        return "dns"
    if isinstance(error, (aiohttp.ClientSSLError, ssl.SSLError, ssl.CertificateError)):
        return "tls"
    if isinstance(error, _NotHttp):
        return "not_http"
    if isinstance(error, aiohttp.ClientResponseError):
        # The parser's words at the first byte of an answer; what is HTTP and broken reads otherwise.
        return "not_http" if "Expected HTTP/" in error.message else "bad_http"
    if isinstance(error, (aiohttp.ServerDisconnectedError, aiohttp.ClientPayloadError)):
        return "reset"
    number = error.errno if isinstance(error, OSError) else None
    if isinstance(error, aiohttp.ClientConnectorError) and isinstance(error.os_error, ConnectionError) and not number:
        return "reset"  # an event loop's own word for it, without a number: closed during the handshake
    return _FAULTS.get(number or 0, "connect" if isinstance(error, aiohttp.ClientConnectorError) else "reset")


_FAULTS: Final[Mapping[int, str]] = {
    errno.ECONNREFUSED: "refused",
    errno.ECONNRESET: "reset",
    errno.ECONNABORTED: "reset",
    errno.EPIPE: "reset",
    errno.ETIMEDOUT: "timeout",
    errno.EHOSTUNREACH: "unreachable",
    errno.ENETUNREACH: "unreachable",
    errno.EHOSTDOWN: "unreachable",
}


async def speaks_tls(url: str) -> bool:
    """Whether the port of an `http://` address greets in TLS: then nobody there read what was sent plainly.

    Asked only after a connection ended without a byte from a port that never answered in HTTP. No certificate is
    looked at, and nothing is sent but the greeting.
    """
    parts = urlsplit(url)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        async with asyncio.timeout(TLS_QUESTION_S):
            _, writer = await asyncio.open_connection(parts.hostname, parts.port or 80, ssl=context)
    except ssl.SSLError as error:
        return "ALERT" in (error.reason or "")  # it refuses us, in TLS
    except (OSError, TimeoutError, ValueError):
        return False
    writer.transport.abort()
    return True


async def _read(response: aiohttp.ClientResponse, most: int) -> tuple[bytes, str | None]:
    """The answer's body up to the limit, and why it is not whole. What goes wrong here cannot undo a refusal."""
    pieces: list[bytes] = []
    size = 0
    cut: str | None = None
    try:
        async for piece in response.content.iter_any():
            pieces.append(piece)
            size += len(piece)
            if size > most:
                response.close()  # the rest would have to be read before the connection is of use again
                cut = "answer_too_long"
                break
    except (TimeoutError, aiohttp.ClientError, OSError) as error:
        response.close()
        cut = fault_of(error)
    return b"".join(pieces)[:most], cut


def _number(text: str | None) -> float | None:
    if text is None or not re.fullmatch(r"\s*[0-9]{1,12}(\.[0-9]{1,6})?\s*", text):
        return None
    return float(text)


def _until(text: str, now_s: float) -> float | None:
    try:
        when = parsedate_to_datetime(text)
    except (ValueError, OverflowError):  # no date; a year or zone of more digits than one has
        return None
    if when.tzinfo is None:
        when = when.replace(tzinfo=UTC)
    return max(0.0, (when - datetime.fromtimestamp(now_s, UTC)).total_seconds())
