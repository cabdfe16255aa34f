"""The one HTTP client of the backends, and the verdict that an answer, or the lack of one, stands for.

What must always hold: a 2xx is judged by the vendor's own yes (`answers`), never by its status alone. A failure
to resolve, connect or shake hands is a `Retry`, because nothing was sent; so is a connection on which something
else than HTTP came back, or whose port speaks TLS where we spoke plainly: no vendor read the request there. Any
other end without an answer is `Unknown`. A wrong address blocks the backend instead of refusing its records one
by one. No URL, header value or body text gets into a reason. Following redirects, cookies and retrying are not
done here: the first two would carry a key elsewhere, the third is delivery's.

A backend adds what its vendor says in a refusal beyond the status (`judge`); waiting and parking are left to delivery.
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
from time import time
from types import SimpleNamespace
from typing import Any, ClassVar, Final, Generic, TypeVar, cast
from urllib.parse import urlsplit

import aiohttp
import orjson

from sidecar import __version__
from sidecar.backends.answers import Yes, said_yes
from sidecar.backends.base import BillingSettings, Context
from sidecar.model.delivery import KEY_MISMATCH, Abilities, Blocked, Dedup, Refused, Retry, Sealed, Unknown, Verdict
from sidecar.settings import Secret, Unfit, setting, types

CONNECT_TIMEOUT_S: Final = 10.0  # as for upstreams; a backend that takes longer is not there
ANSWER_TIMEOUT_S: Final = 30.0  # from the first byte sent; vendors' own packages use 10 to 80
BODY_BYTES_MAX: Final = 1_000_000  # where a vendor states none: nginx refuses bodies above 1 MiB unless told otherwise
ANSWER_BYTES_MAX: Final = 256 * 1024  # of an answer that is looked at; a report over 1000 events is below 200 KiB
ECHO: Final = 3  # and so many times what was sent: a vendor may give back each event with fields of its own
TLS_QUESTION_S: Final = 2.0  # for asking a port that said nothing whether it speaks TLS
IDLE_S: Final = 15.0  # how long an unused connection is kept; aiohttp's own default
IDLE_NO_DEDUP_S: Final = 2.0  # where a repeat is billed twice, no connection that the server may just be closing
RETRY_AFTER_S_MAX: Final = 86_400.0  # a vendor asking for more than a day is taken for a mistake of the day

_HEADER_VALUE: Final = re.compile(r"[!-~]([ -~]*[!-~])?")
_CODE: Final = re.compile(r"[A-Za-z0-9_.:-]{1,64}")

# A wrong address, scheme, method or form: every record would meet the same, so none may be parked for it.
_ADDRESS: Final = frozenset({404, 405, 406, 410, 411, 415, 421, 426})
_OPERATOR: Final = {401: "unauthorized", 402: "payment_required", 403: "forbidden", 407: "proxy_auth", 451: "legal"}
_AGAIN: Final = frozenset({408, 425, 429})
_GATEWAY: Final = frozenset({502, 504})  # the server behind the gateway may have had the request

# A refusal that is about the request's key. 422 is the IETF draft's for other bytes, 409 most vendors', 400 Stripe's.
_MISMATCH: Final = frozenset({400, 409, 412, 422})
_KEY: Final = re.compile(r"idempoten|webhook-id", re.IGNORECASE)
_NO_KEY: Final = re.compile(r"required|missing", re.IGNORECASE)
_SAYS: Final = ("code", "type", "title", "message", "error", "detail")  # an answer may also repeat what was sent
_RUNNING: Final = re.compile(rb"in[_ -]?progress|in[_ -]?use|concurrent|still running|being processed", re.IGNORECASE)
LOOKED_BYTES: Final = 4096  # of a refusal, for such words

# How web servers answer plain HTTP on their TLS port, in a 400 of their own: nginx, Go, Apache, Tomcat.
_WANTS_TLS: Final = re.compile(
    rb"plain HTTP request was sent to HTTPS|HTTP request to an HTTPS|speaking plain HTTP to an SSL"
    rb"|host and port requires TLS",
    re.IGNORECASE,
)


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

    @property
    def names_key(self) -> bool:
        """Whether a refusal speaks of our key: something came under it before, with other bytes."""
        if self.status not in _MISMATCH:
            return False
        said = self.json()
        error = said.get("error") if isinstance(said, dict) else None
        parts = [part for part in (said, error) if isinstance(part, dict)]
        texts = [value for part in parts for name in _SAYS if isinstance(value := part.get(name), str)]
        if said is None and len(self.body) <= LOOKED_BYTES:
            texts = [self.body.decode(errors="replace")]
        return any(_KEY.search(text) and not _NO_KEY.search(text) for text in texts)

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


Judge = Callable[[Answer, Sealed], "Verdict | list[Verdict] | None"]
"""A vendor's own reading of an answer that is no 2xx: one verdict for all, one for each event, or None for the common
rule."""


def verdict_of(answer: Answer, *, dedup: Dedup, now_s: float) -> Verdict:
    """What a status that is no 2xx says where the vendor says nothing else, so that no record is lost or billed twice.

    Only what is known to be refused is refused; what may have been taken is `Unknown`, and what was not is tried again.
    """
    status, after_s = answer.status, answer.retry_after_s(now_s)
    if 300 <= status < 400 or status in _ADDRESS or status in _OPERATOR:
        return Blocked(_OPERATOR.get(status) or f"http_{status}")
    if status in _GATEWAY and dedup is Dedup.NONE:
        return Unknown(f"http_{status}")
    # A conflict is worth another try only where the server says when: the key's first request is under way.
    if status in _AGAIN or 500 <= status < 600 or (status == 409 and after_s is not None):
        return Retry(f"http_{status}", after_s)
    if status == 400 and _WANTS_TLS.search(answer.body[:LOOKED_BYTES]):
        return Retry("tls")  # the web server's own word: nobody behind it saw the request
    if status == 409 and _RUNNING.search(answer.body[:LOOKED_BYTES]):
        return Retry("http_409")
    if answer.names_key or (status == 409 and dedup is Dedup.REQUEST_KEY):
        return Refused(KEY_MISMATCH)
    if 400 <= status < 500:
        return Refused("too_large" if status == 413 else f"http_{status}")
    return Unknown(f"http_{status}")  # no final status at all: nothing can be concluded


def refused_with(answer: Answer, *path: str) -> Refused:
    """A refusal that names the vendor's code where there is one, else the status."""
    return Refused(KEY_MISMATCH if answer.names_key else answer.code(*path) or f"http_{answer.status}")


def _header_text(value: str) -> str:
    if not _HEADER_VALUE.fullmatch(value):
        raise Unfit("expected printable ASCII, without spaces or line ends around it")
    return value


HEADER_TEXT: Final = types.Kind("a text that a header can carry", _header_text)


@dataclass(frozen=True, kw_only=True)
class HttpSettings(BillingSettings):
    """What the settings of every backend on the network end with. Each adds its `url`, its `api_key` and its own."""

    timeout: float = setting(
        types.duration(0.1, 600), f"{ANSWER_TIMEOUT_S:g}s", "how long the answer to one request may take"
    )


@dataclass(slots=True)
class _Trace:
    """How far a request got. `connected`: from here on a byte may have left; `fresh`: on a connection of its own."""

    connected: bool = False
    fresh: bool = False


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
    """Connections to one backend. Opened with the first request, closed with `aclose`."""

    dedup: Dedup
    timeout_s: float = ANSWER_TIMEOUT_S
    connect_timeout_s: float = CONNECT_TIMEOUT_S
    tls: ssl.SSLContext | None = None  # None: the system's certificates, verified
    clock: Callable[[], float] = time
    _session: aiohttp.ClientSession | None = field(default=None, init=False)
    _spoke_http: bool = field(default=False, init=False)  # an answer has come, so this is no port of another protocol

    async def offer(
        self, url: str, sealed: Sealed, headers: Mapping[str, str], yes: Yes, judge: Judge | None = None
    ) -> list[Verdict]:
        """POST a sealed request once; one verdict for each of its events. `yes`: how the vendor says that it has it."""
        answer = await self.request("POST", url, sealed.body, {"content-type": sealed.content_type, **headers})
        said: Verdict | list[Verdict] | None
        if not isinstance(answer, Answer):
            said = answer
        elif answer.ok:
            said = said_yes(answer, sealed, yes)
        else:
            said = None if judge is None else judge(answer, sealed)
            if said is None:
                said = verdict_of(answer, dedup=self.dedup, now_s=self.clock())
        if not isinstance(said, list):
            return [said] * len(sealed.events)
        if len(said) != len(sealed.events):
            raise AssertionError(f"{len(said)} verdicts for {len(sealed.events)} events")
        return said

    async def request(
        self, method: str, url: str, body: bytes | None, headers: Mapping[str, str]
    ) -> Answer | Retry | Blocked | Unknown:
        """One request, one answer; or the verdict for having none."""
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
            return Blocked("bad_url")
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            return await self._without_answer(error, trace, url)

    async def _without_answer(self, error: Exception, trace: _Trace, url: str) -> Retry | Unknown:
        """Whether it may have been taken all the same: only what cannot have been is worth a `Retry`."""
        reason = fault_of(error)
        if not trace.connected:
            return Retry(reason)
        if not trace.fresh:
            return Unknown(reason)
        if reason == "not_http":
            return Retry(reason)
        silent = reason in ("reset", "timeout") and not self._spoke_http
        if silent and url.startswith("http://") and await speaks_tls(url):
            return Retry("tls")
        return Unknown(reason)

    async def aclose(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            idle_s = IDLE_NO_DEDUP_S if self.dedup is Dedup.NONE else IDLE_S
            trace = aiohttp.TraceConfig()
            trace.on_connection_create_end.append(cast(Any, _mark_connected))
            trace.on_connection_reuseconn.append(cast(Any, _mark_reused))
            self._session = aiohttp.ClientSession(
                # limit=0: `Abilities.concurrency` is the limit, and delivery keeps it.
                connector=aiohttp.TCPConnector(
                    limit=0, keepalive_timeout=idle_s, ssl=self.tls if self.tls is not None else True
                ),
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


S = TypeVar("S", bound=HttpSettings)


class HttpBackend(Generic[S]):
    """What every backend on the network has: settings, customers, meters, the key's header and the client.

    A backend names itself, its `settings_type` and its `abilities`; where these hang on the settings it sets them
    before it calls this constructor.
    """

    name: ClassVar[str]
    settings_type: ClassVar[type[Any]]
    key_header: ClassVar[str] = "authorization"  # that header says `Bearer …`, any other the key alone
    abilities: Abilities

    def __init__(self, settings: S, context: Context, *, clock: Callable[[], float] = time) -> None:
        """`clock`: Unix seconds. Raises `MetersError`, and `ValueError` for settings that do not go together."""
        self._settings = settings
        self._policy = settings.policy
        self._customers = context.customers(self.name)
        self._definitions = context.definitions()
        self._clock = clock
        self._headers: dict[str, str] = {}
        key: Secret | None = getattr(settings, "api_key", None)
        if key is not None:
            bearer = self.key_header == "authorization"
            self._headers[self.key_header] = f"Bearer {key.reveal()}" if bearer else key.reveal()
        self._client = HttpClient(dedup=self.abilities.dedup, timeout_s=settings.timeout, clock=clock)

    async def aclose(self) -> None:
        await self._client.aclose()


def fault_of(error: BaseException) -> str:
    """What went wrong between us and the other side, in one of a few fixed words."""
    if isinstance(error, TimeoutError):
        return "timeout"
    if isinstance(error, (aiohttp.ClientConnectorDNSError, socket.gaierror)):
        return "dns"
    if isinstance(error, (aiohttp.ClientSSLError, ssl.SSLError, ssl.CertificateError)):
        return "tls"
    if isinstance(error, aiohttp.ClientResponseError):
        # The parser's words at the first byte of an answer; what is HTTP and broken reads otherwise.
        return "not_http" if "Expected HTTP/" in error.message else "bad_http"
    if isinstance(error, (aiohttp.ServerDisconnectedError, aiohttp.ClientPayloadError)):
        return "reset"
    number = error.errno if isinstance(error, OSError) else None
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
    except ValueError:
        return None
    if when.tzinfo is None:
        when = when.replace(tzinfo=UTC)
    return max(0.0, (when - datetime.fromtimestamp(now_s, UTC)).total_seconds())
