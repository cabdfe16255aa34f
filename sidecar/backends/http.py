"""The HTTP client of the backends, and the verdict that an answer, or the lack of one, stands for.

What must always hold: a 2xx is judged by the vendor's own yes (`answers`), never by its status alone. Where nothing
came back, what cannot have been read there is a `Retry`, and any other end is `Unknown` (`storage.http_client` tells
them apart). A wrong address blocks the backend instead of refusing its records one by one. No URL, header value or
body text gets into a reason. Retrying is delivery's.

A backend adds what its vendor says in a refusal beyond the status (`judge`); waiting and parking are left to delivery.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import time
from typing import Any, ClassVar, Final, Generic, TypeVar

from sidecar.backends.answers import Yes, said_yes
from sidecar.backends.base import BillingSettings, Context
from sidecar.model.delivery import KEY_MISMATCH, Abilities, Blocked, Dedup, Refused, Retry, Sealed, Unknown, Verdict
from sidecar.settings import Secret, setting, types
from sidecar.storage import http_client
from sidecar.storage.http_client import ANSWER_TIMEOUT_S, BAD_URL, Answer, fault_of

__all__ = [
    "BODY_BYTES_MAX",
    "HEADER_TEXT",
    "LOOKED_BYTES",
    "Answer",
    "HttpBackend",
    "HttpClient",
    "HttpSettings",
    "Judge",
    "fault_of",
    "refused_with",
    "verdict_of",
]

HEADER_TEXT: Final = types.header_text
BODY_BYTES_MAX: Final = 1_000_000  # where a vendor states none: nginx refuses bodies above 1 MiB unless told otherwise
IDLE_NO_DEDUP_S: Final = 2.0  # where a repeat is billed twice, no connection that the server may just be closing

# A wrong address, scheme, method or form: every record would meet the same, so none may be parked for it.
_ADDRESS: Final = frozenset({404, 405, 406, 410, 411, 415, 421, 426})
_OPERATOR: Final = {401: "unauthorized", 402: "payment_required", 403: "forbidden", 407: "proxy_auth", 451: "legal"}
_AGAIN: Final = frozenset({408, 425, 429})
# A gateway's own: the server behind it may have had the request. 520 to 524 are a content network's (521 and 523 say
# that it could not be connected to), 598 and 599 those of some proxies that waited for long enough.
_GATEWAY: Final = frozenset({502, 504, 520, 522, 524, 598, 599})

# A refusal that is about the request's key. 422 is the IETF draft's for other bytes, 409 most vendors', 400 Stripe's.
_MISMATCH: Final = frozenset({400, 409, 412, 422})
_KEY: Final = re.compile(r"idempoten|webhook-id", re.IGNORECASE)
# Or about what came before, in whatever words: only its id tells of a repeat under another key.
_THERE: Final = re.compile(
    r"duplicate|already[ _-]?(been[ _-])?"
    r"(accept|deliver|exist|handle|ingest|known|process|receiv|record|seen|stor|there|used)",
    re.IGNORECASE,
)
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
    if _names_key(answer) or (status == 409 and dedup is Dedup.REQUEST_KEY):
        return Refused(KEY_MISMATCH)
    if dedup is not Dedup.EVENT_ID and any(map(_THERE.search, _said_of_key(answer))):
        return Refused(KEY_MISMATCH)
    if 400 <= status < 500:
        return Refused("too_large" if status == 413 else f"http_{status}")
    return Unknown(f"http_{status}")  # no final status at all: nothing can be concluded


def _names_key(answer: Answer) -> bool:
    """Whether a refusal speaks of our key: something came under it before, with other bytes."""
    return any(_KEY.search(text) and not _NO_KEY.search(text) for text in _said_of_key(answer))


def _said_of_key(answer: Answer) -> list[str]:
    """The words of a refusal that may be about the key."""
    if answer.status not in _MISMATCH:
        return []
    said = answer.json()
    inside = [said.get("error"), *_rows(said.get("errors"))] if isinstance(said, dict) else []
    parts = [part for part in (said, *inside) if isinstance(part, dict)]
    texts = [value for part in parts for name in _SAYS if isinstance(value := part.get(name), str)]
    texts += [text for text in (said, *inside) if isinstance(text, str)]
    if said is None and len(answer.body) <= LOOKED_BYTES:
        texts = [answer.body.decode(errors="replace")]
    return texts


def _rows(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def refused_with(answer: Answer, *path: str) -> Refused:
    """A refusal that names the vendor's code where there is one, else the status."""
    return Refused(KEY_MISMATCH if _names_key(answer) else answer.code(*path) or f"http_{answer.status}")


@dataclass(frozen=True, kw_only=True)
class HttpSettings(BillingSettings):
    """What the settings of every backend on the network end with. Each adds its `url`, its `api_key` and its own."""

    timeout: float = setting(
        types.duration(0.1, 600), f"{ANSWER_TIMEOUT_S:g}s", "how long the response to one request may take"
    )


@dataclass(slots=True, kw_only=True)
class HttpClient(http_client.HttpClient):
    """Connections to one backend."""

    dedup: Dedup

    def __post_init__(self) -> None:
        if self.dedup is Dedup.NONE:
            self.idle_s = IDLE_NO_DEDUP_S

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
        answer = await self.ask(method, url, body, headers)
        if isinstance(answer, Answer):
            return answer
        if answer is BAD_URL:
            return Blocked(answer.reason)
        # Only what cannot have been taken is worth a `Retry`.
        return Unknown(answer.reason) if answer.maybe_read else Retry(answer.reason)


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
