"""`revenium`: Revenium's metering API, one request a record.

The v1 modes have no key and no event time: what was sent and not answered cannot be sent again without
risking a double, so it is parked unless the operator says otherwise, and gateway errors count as no
answer. How each mode describes a call stands in `_MODES`; the rest is the same for all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from sidecar.backends.base import (
    BILLING,
    Context,
    Policy,
    event_key,
    label_id,
    policy_of,
    policy_settings,
    revealed,
)
from sidecar.backends.http import HEADER_TEXT, TIMEOUT, HttpClient
from sidecar.backends.transaction import payload_bytes
from sidecar.record import Record
from sidecar.settings import Setting, kinds
from sidecar.verdict import Abilities, Dedup, Encoded, Event, Sealed, Verdict

HOST_V1: Final = "https://api.revenium.io"
CONCURRENCY: Final = 16  # the vendor's own package replays with 16 at once


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What a mode needs to know beside the record."""

    customers: Mapping[str, str]
    subscriber_field: str = "application"
    api_id: str | None = None


@dataclass(frozen=True, slots=True)
class Form:
    """One request: what is put behind the record's id, the path, and the bytes."""

    suffix: str
    path: str
    body: bytes
    headers: tuple[tuple[str, str], ...] = ()


def _meter(record: Record, options: Options) -> list[Form]:
    body = payload_bytes(
        record,
        customer=label_id(record, options.customers),
        customer_field=options.subscriber_field,
        api=options.api_id,
    )
    return [Form("", "/meter/v1/api/meter", body)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Mode:
    """One of the vendor's interfaces."""

    forms: Callable[[Record, Options], list[Form]]
    host: str
    dedup: Dedup
    dedup_window_s: float | None = None


_MODES: Final[Mapping[str, Mode]] = {
    "meter": Mode(forms=_meter, host=HOST_V1, dedup=Dedup.NONE),
}

SETTINGS: Final = (
    Setting("url", kinds.http_url, help="the host; the mode's own when not set", also=("REVENIUM_METERING_BASE_URL",)),
    Setting("api_key", HEADER_TEXT, help="sent as `x-api-key`", secret=True, required=True,
            also=("REVENIUM_METERING_API_KEY",)),
    Setting("mode", kinds.word_of(*_MODES), "meter", "which of the vendor's interfaces"),
    Setting("api_id", kinds.text, help="the source's id at Revenium; found by URL when not set"),
    Setting("subscriber_field", kinds.word_of("application", "productKey".lower()), "application",
            "where v1 carries the subscriber: `application` or `productkey`"),
    Setting("resend_unknown", kinds.flag, "false", "v1: send again what was not answered, at the risk of doubles"),
    TIMEOUT,
    *policy_settings(BILLING),
)  # fmt: skip


class ReveniumBackend:
    """One record, one request."""

    name = "revenium"

    def __init__(
        self,
        *,
        api_key: str,
        url: str | None = None,
        mode: str = "meter",
        api_id: str | None = None,
        subscriber_field: str = "application",
        customers: Mapping[str, str] | None = None,
        resend_unknown: bool = False,
        policy: Policy = BILLING,
        client: HttpClient | None = None,
    ) -> None:
        self._mode = _MODES[mode]
        self.abilities = Abilities(
            dedup=self._mode.dedup,
            dedup_window_s=self._mode.dedup_window_s,
            concurrency=CONCURRENCY,
            resend_unknown=resend_unknown,
        )
        self._base = _base(url or self._mode.host)
        self._headers = {"x-api-key": HEADER_TEXT.parse(api_key)}
        self._options = Options(customers=dict(customers or {}), subscriber_field=subscriber_field, api_id=api_id)
        self._policy = policy
        self._client = client or HttpClient(dedup=self._mode.dedup)

    @classmethod
    def from_settings(cls, values: Mapping[str, Any], context: Context) -> ReveniumBackend:
        mode = values["mode"]
        return cls(
            api_key=revealed(values["api_key"]) or "",
            url=values["url"],
            mode=mode,
            api_id=values["api_id"],
            subscriber_field={"productkey": "productKey"}.get(values["subscriber_field"], "application"),
            customers=context.customers(cls.name),
            resend_unknown=values["resend_unknown"],
            policy=policy_of(values),
            client=HttpClient(dedup=_MODES[mode].dedup, timeout_s=values["timeout"]),
        )

    def encode(self, records: Sequence[Record]) -> Encoded:
        encoded = Encoded()
        for record in records:
            if self._policy.place(record, encoded):
                for form in self._mode.forms(record, self._options):
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
        if self._mode.dedup is Dedup.REQUEST_KEY:
            headers["idempotency-key"] = sealed.key
        return await self._client.offer(self._base + sealed.path, sealed, headers)

    async def aclose(self) -> None:
        await self._client.aclose()


def _base(url: str) -> str:
    """The host, however much of the vendor's path was given with it: its own packages take all of these."""
    base: str = kinds.http_url.parse(url)
    for tail in ("/meter/v1/api", "/meter/v2", "/meter"):
        if base.endswith(tail):
            return base.removesuffix(tail)
    return base
