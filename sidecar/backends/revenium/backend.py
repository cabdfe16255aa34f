"""`revenium`: Revenium's metering API, one request a record.

The v1 modes have no key and no event time: what was sent and not answered cannot be sent again without
risking a double, so it is parked unless the operator says otherwise, and gateway errors count as no
answer. How each mode describes a call stands in `_MODES`; the rest is the same for all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import time
from typing import Final

from sidecar.backends.answers import ANSWERS
from sidecar.backends.base import DAY_S, PARK, Context
from sidecar.backends.batching import event_key
from sidecar.backends.http import HEADER_TEXT, Answer, HttpBackend, HttpSettings
from sidecar.backends.revenium import forms
from sidecar.backends.revenium.forms import CREDENTIAL_FIELD, SUBSCRIPTION_FIELD, V1, V2, Form, Options
from sidecar.model.delivery import Abilities, Dedup, Encoded, Event, Retry, Sealed, Verdict
from sidecar.model.record import Record
from sidecar.settings import Secret, required_secret, setting, types

HOST_V1: Final = "https://api.revenium.io"
HOST_V2: Final = "https://api.revenium.ai"
CONCURRENCY: Final = 16  # the vendor's own package replays with 16 at once


@dataclass(frozen=True, slots=True, kw_only=True)
class Mode:
    """One of the vendor's interfaces."""

    forms: Callable[[Record, Options], list[Form]]
    host: str = HOST_V1
    dedup: Dedup = Dedup.NONE
    dedup_window_s: float | None = None
    needs_source: bool = False


_MODES: Final[Mapping[str, Mode]] = {
    "meter": Mode(forms=forms.meter),
    "event": Mode(forms=forms.event),
    "rate": Mode(forms=forms.rate, needs_source=True),
    "ingest": Mode(forms=forms.ingest, needs_source=True),
    "events": Mode(forms=forms.events, host=HOST_V2, dedup=Dedup.REQUEST_KEY, dedup_window_s=DAY_S),
    "completions": Mode(forms=forms.completions, host=HOST_V2, dedup=Dedup.REQUEST_KEY, dedup_window_s=DAY_S),
}

_YES_V1: Final = dict.fromkeys(
    (f"{V1}/event", f"{V1}/meter/rate", f"{V1}/meter/ingest"), "revenium v1 /event, /meter/rate, /meter/ingest"
)


@dataclass(frozen=True, kw_only=True)
class ReveniumSettings(HttpSettings):
    url: str | None = setting(
        types.http_url, None, "the host; the mode's own when not set", also=("REVENIUM_METERING_BASE_URL",)
    )
    api_key: Secret = required_secret(HEADER_TEXT, "sent as `x-api-key`", also=("REVENIUM_METERING_API_KEY",))
    mode: str = setting(types.word_of(*_MODES), "meter", "which of the vendor's interfaces")
    api_id: str | None = setting(types.text, None, "the source's id for `meter` and `event`; found by URL when not set")
    source_id: str | None = setting(
        types.text, None, "the source's id for `rate` and `ingest` (required) and the v2 modes"
    )
    subscriber_field: str = setting(
        types.word_of("application", "productkey"),
        "application",
        "where `meter` and `event` carry the subscriber: `application` or `productkey`",
    )
    rate_field: str = setting(
        types.word_of("credential", "subscription"),
        "credential",
        "where `rate` carries it: `subscriberCredentialId` or `subscriptionId`",
    )
    costs: bool = setting(
        types.flag,
        "false",
        "`completions`: send what a call cost too, as far as it is known; it replaces Revenium's own calculation",
    )
    on_unknown: str = setting(
        types.word_of(PARK, "resend"),
        PARK,
        "v1: what was not answered is kept for you (`park`), or sent again at the risk of doubles (`resend`)",
    )


class ReveniumBackend(HttpBackend[ReveniumSettings]):
    """One record, one request."""

    name = "revenium"
    settings_type = ReveniumSettings
    key_header = "x-api-key"

    def __init__(self, settings: ReveniumSettings, context: Context, *, clock: Callable[[], float] = time) -> None:
        self._mode = _MODES[settings.mode]
        if self._mode.needs_source and not settings.source_id:
            raise ValueError(f"SIDECAR_REVENIUM_SOURCE_ID is not set: the mode {settings.mode} needs it")
        if settings.costs and settings.mode != "completions":
            raise ValueError(
                f"SIDECAR_REVENIUM_COSTS: the mode {settings.mode} has no field for costs; only completions has"
            )
        self.abilities = Abilities(
            dedup=self._mode.dedup,
            dedup_window_s=self._mode.dedup_window_s,
            concurrency=CONCURRENCY,
            # With a key the window decides: beyond it a repeat would be a double, and nobody asked for that.
            resend_unknown=settings.on_unknown == "resend" and self._mode.dedup is Dedup.NONE,
        )
        super().__init__(settings, context, clock=clock)
        self.address = base_address(settings.url or self._mode.host)
        self._is_given = settings.url is not None
        self._options = Options(
            customers=self._customers,
            subscriber_field="productKey" if settings.subscriber_field == "productkey" else "application",
            rate_field=SUBSCRIPTION_FIELD if settings.rate_field == "subscription" else CREDENTIAL_FIELD,
            api_id=settings.api_id,
            source_id=settings.source_id,
            costs=settings.costs,
        )

    def encode(self, records: Sequence[Record]) -> Encoded:
        encoded = Encoded()
        for record in records:
            if self._policy.place(record, encoded):
                forms = self._mode.forms(record, self._options)
                if not forms:
                    encoded.skipped[record.id] = "nothing_to_rate"
                for form in forms:
                    event = Event(record.id, record.id + form.suffix)
                    encoded.sealed.append(
                        Sealed(
                            key=event_key(event.event_id),
                            events=(event,),
                            body=form.body,
                            path=form.path,
                            headers=form.headers,
                        )
                    )
        return encoded

    async def send(self, sealed: Sealed) -> list[Verdict]:
        headers = {**self._headers, **dict(sealed.headers)}
        # The path decides, not the mode: a request that was sealed under another mode goes where it belongs.
        is_v2 = sealed.path.startswith(V2)
        if is_v2:
            headers["idempotency-key"] = sealed.key
        host = self.address if self._is_given else HOST_V2 if is_v2 else HOST_V1
        yes = "revenium v2" if is_v2 else _YES_V1.get(sealed.path.partition("?")[0], "revenium v1 /meter")
        return await self._client.offer(host + sealed.path, sealed, headers, ANSWERS[yes], _judge)


def base_address(url: str) -> str:
    """The host, however much of the vendor's path was given with it: its own packages take all of these."""
    base: str = types.http_url.parse(url)
    for tail in (V1, V2, "/meter"):
        if base.endswith(tail):
            return base.removesuffix(tail)
    return base


def _judge(answer: Answer, _: Sealed) -> Verdict | None:
    """The conflict of a key that passes, and the header with which the service overrules its status."""
    code = answer.code("code") or answer.code("error", "code")
    again = answer.headers.get("x-should-retry", "").lower() == "true" and 400 <= answer.status < 500
    if again or (answer.status == 409 and code == "idempotency_key_in_progress"):
        return Retry(f"http_{answer.status}", answer.retry_after_s(time()))
    return None
