"""The one HTTP client of the backends, and the verdict that a status stands for.

What must always hold: `Unknown` is said only when a byte of the request may have left and no answer's head
came back; a failure to resolve, connect or shake hands is a `Retry`, because nothing was sent. A wrong
address blocks the backend instead of refusing its records one by one. No URL, header value or body text
gets into a reason. Following redirects, cookies and retrying are not done here: the first two would carry
a key elsewhere, the third is delivery's.

A backend adds what its vendor says beyond the status (`judge`); waiting and parking are left to delivery.
"""

from __future__ import annotations

import re
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from time import time
from types import SimpleNamespace
from typing import Any, Final, cast

import aiohttp
import orjson

from sidecar import __version__
from sidecar.settings import Setting, kinds
from sidecar.verdict import Blocked, Dedup, Delivered, Refused, Retry, Sealed, Unknown, Verdict

CONNECT_TIMEOUT_S: Final = 10.0  # as for upstreams; a backend that takes longer is not there
ANSWER_TIMEOUT_S: Final = 30.0  # from the first byte sent; vendors' own packages use 10 to 80
BODY_BYTES_MAX: Final = 1_000_000  # where a vendor states none: nginx refuses bodies above 1 MiB unless told otherwise
ANSWER_BYTES_MAX: Final = 256 * 1024  # of an answer that is looked at; a report over 1000 events is below 200 KiB
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


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back. `body` is empty or cut when reading it failed: the status holds all the same."""

    status: int
    headers: Mapping[str, str]
    body: bytes = b""

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


Judge = Callable[[Answer, Sealed], "Verdict | list[Verdict] | None"]
"""A vendor's own reading of an answer: one verdict for all, one for each event, or None for the common rule."""


def verdict_of(answer: Answer, *, dedup: Dedup, now_s: float) -> Verdict:
    """What a status says where the vendor says nothing else (durability.md, section 6)."""
    status, after_s = answer.status, answer.retry_after_s(now_s)
    if answer.ok:
        return Delivered()
    if 300 <= status < 400 or status in _ADDRESS or status in _OPERATOR:
        return Blocked(_OPERATOR.get(status) or f"http_{status}")
    if status in _GATEWAY and dedup is Dedup.NONE:
        return Unknown(f"http_{status}")
    # A conflict is worth another try only where the server says when: the key's first request is under way.
    if status in _AGAIN or 500 <= status < 600 or (status == 409 and after_s is not None):
        return Retry(f"http_{status}", after_s)
    if 400 <= status < 500:
        return Refused("too_large" if status == 413 else f"http_{status}")
    return Unknown(f"http_{status}")  # no final status at all: nothing can be concluded


def refused_with(answer: Answer, *path: str) -> Refused:
    """A refusal that names the vendor's code where there is one, else the status."""
    return Refused(answer.code(*path) or f"http_{answer.status}")


def _header_text(value: str) -> str:
    if not _HEADER_VALUE.fullmatch(value):
        raise kinds.Unfit("expected printable ASCII, without spaces or line ends around it")
    return value


HEADER_TEXT: Final = kinds.Kind("a text that a header can carry", _header_text)

TIMEOUT: Final = Setting(
    "timeout", kinds.duration(0.1, 600), f"{ANSWER_TIMEOUT_S:g}s", "how long the answer to one request may take"
)


@dataclass(slots=True)
class _Trace:
    """How far a request got. `connected`: from here on a byte may have left."""

    connected: bool = False


async def _mark_connected(_: aiohttp.ClientSession, context: SimpleNamespace, __: Any) -> None:
    trace = context.trace_request_ctx
    if isinstance(trace, _Trace):
        trace.connected = True


@dataclass(slots=True, kw_only=True)
class HttpClient:
    """Connections to one backend. Opened with the first request, closed with `aclose`."""

    dedup: Dedup
    timeout_s: float = ANSWER_TIMEOUT_S
    connect_timeout_s: float = CONNECT_TIMEOUT_S
    tls: ssl.SSLContext | None = None  # None: the system's certificates, verified
    clock: Callable[[], float] = time
    _session: aiohttp.ClientSession | None = field(default=None, init=False)

    async def offer(
        self, url: str, sealed: Sealed, headers: Mapping[str, str], judge: Judge | None = None
    ) -> list[Verdict]:
        """POST a sealed request once; one verdict for each of its events."""
        answer = await self.request("POST", url, sealed.body, {"content-type": sealed.content_type, **headers})
        said: Verdict | list[Verdict] | None
        if isinstance(answer, Answer):
            said = None if judge is None else judge(answer, sealed)
            if said is None:
                said = verdict_of(answer, dedup=self.dedup, now_s=self.clock())
        else:
            said = answer
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
                answered = {name.lower(): value for name, value in response.headers.items()}
                return Answer(response.status, answered, await _read(response))
        except aiohttp.InvalidURL:
            return Blocked("bad_url")
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            return _without_answer(error, trace.connected)

    async def aclose(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            idle_s = IDLE_NO_DEDUP_S if self.dedup is Dedup.NONE else IDLE_S
            trace = aiohttp.TraceConfig()
            trace.on_connection_create_end.append(cast(Any, _mark_connected))
            trace.on_connection_reuseconn.append(cast(Any, _mark_connected))
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


def _without_answer(error: Exception, connected: bool) -> Retry | Unknown:
    timed_out = isinstance(error, TimeoutError)
    if connected:
        return Unknown("timeout" if timed_out else "connection_lost")
    if timed_out:
        return Retry("connect_timeout")
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return Retry("dns")
    if isinstance(error, (aiohttp.ClientSSLError, ssl.SSLError)):
        return Retry("tls")
    return Retry("connect")


async def _read(response: aiohttp.ClientResponse) -> bytes:
    """The answer's body up to the limit. What goes wrong here cannot undo the status."""
    pieces: list[bytes] = []
    size = 0
    try:
        async for piece in response.content.iter_any():
            pieces.append(piece)
            size += len(piece)
            if size >= ANSWER_BYTES_MAX:
                response.close()  # the rest would have to be read before the connection is of use again
                break
    except (TimeoutError, aiohttp.ClientError, OSError):
        response.close()
    return b"".join(pieces)[:ANSWER_BYTES_MAX]


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
