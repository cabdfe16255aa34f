"""`ledgerbee`: LedgerBee's "report usage", one request for each record and meter.

The key is mandatory and travels in a header of its own; a key that is known is answered with 200
`duplicate`, a new one with 202 `queued`. Fields are checked strictly there, so nothing but the documented
ones is sent, and everything else goes into `metadata`. How long keys are remembered is not documented, and a
setting here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import time
from typing import Any, Final

import orjson

from sidecar.backends.answers import ANSWERS
from sidecar.backends.base import (
    Context,
    CustomerSettings,
    chosen_meters,
    clip,
    json_number,
    meter_event,
    metered_calls,
    rfc3339,
)
from sidecar.backends.batching import event_key
from sidecar.backends.http import HEADER_TEXT, Answer, HttpBackend, HttpSettings, refused_with
from sidecar.meters.definition import Kind, Meter
from sidecar.model.delivery import Abilities, Blocked, Dedup, Encoded, Sealed, Verdict
from sidecar.model.record import Record
from sidecar.settings import Secret, Unfit, required_secret, setting, types

HOST: Final = "https://api.ledgerbee.com"
REPORT: Final = "/api/v1/meters/report"
CONCURRENCY: Final = 8  # no limit is published for reports
TAKES: Final = frozenset({Kind.COUNT, Kind.SUM})
_UUID: Final = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")


def _meter_pairs(items: Sequence[str]) -> Mapping[str, str]:
    """`name` or `name=LedgerBee's name or id`."""
    found: dict[str, str] = {}
    for item in items:
        ours, equals, theirs = item.partition("=")
        if not ours.strip() or (equals and not theirs.strip()):
            raise Unfit(f"{item!r}: expected a meter's name, or name=its name or id at LedgerBee")
        found[ours.strip()] = theirs.strip() or ours.strip()
    return found


@dataclass(frozen=True, kw_only=True)
class LedgerbeeSettings(CustomerSettings, HttpSettings):
    url: str = setting(types.http_url, HOST, "the API's host")
    api_key: Secret = required_secret(HEADER_TEXT, "sent as `x-api-key`; scope `meter-report`")
    meters: Mapping[str, str] = setting(
        types.many("meters as name or name=its name or id there, separated by commas", _meter_pairs),
        None,
        "the meters to report; all of them, by their own names, when not set",
    )
    dedup_window: float = setting(types.duration(), "24h", "how long LedgerBee remembers a key (not documented)")


class LedgerbeeBackend(HttpBackend[LedgerbeeSettings]):
    """One report for each record and meter."""

    name = "ledgerbee"
    settings_type = LedgerbeeSettings
    key_header = "x-api-key"

    def __init__(self, settings: LedgerbeeSettings, context: Context, *, clock: Callable[[], float] = time) -> None:
        self.abilities = Abilities(
            dedup=Dedup.REQUEST_KEY,
            dedup_window_s=settings.dedup_window,
            concurrency=CONCURRENCY,
            knows_duplicates=True,
        )
        super().__init__(settings, context, clock=clock)
        self.address = settings.url.removesuffix("/api/v1").removesuffix("/api")
        self._names = settings.meters
        self._meters = chosen_meters(self.name, self._definitions, tuple(self._names), TAKES)

    def encode(self, records: Sequence[Record]) -> Encoded:
        encoded = Encoded()
        calls = metered_calls(records, self._policy, self._customers, self._meters, encoded)
        for record, customer, amounts in calls:
            encoded.sealed += [self._sealed(record, customer, meter, amount) for meter, amount in amounts]
        return encoded

    def _sealed(self, record: Record, customer: str, meter: Meter, amount: Any) -> Sealed:
        theirs = self._names.get(meter.name, meter.name)
        body = {
            "value": json_number(amount),
            "customerId": customer,
            ("meterId" if _UUID.fullmatch(theirs) else "meterName"): theirs,
            "timestamp": rfc3339(record.started_at),
            "metadata": _metadata(record),
        }
        event = meter_event(record, meter)
        return Sealed(key=event_key(event.event_id), events=(event,), body=orjson.dumps(body), path=REPORT)

    async def send(self, sealed: Sealed) -> list[Verdict]:
        headers = {**self._headers, "x-api-idempotency-key": sealed.key}
        return await self._client.offer(self.address + sealed.path, sealed, headers, ANSWERS["ledgerbee"], _judge)

    async def examine(self) -> list[str]:
        """Ask for the subscriptions of each meter: the look-up says whether key, licence and meter are right."""
        problems = []
        for meter in self._meters:
            theirs = self._names.get(meter.name, meter.name)
            where = f"{theirs}/subscriptions" if _UUID.fullmatch(theirs) else f"subscriptions?meterName={theirs}"
            answer = await self._client.request("GET", f"{self.address}/api/v1/meters/{where}", None, self._headers)
            if not isinstance(answer, Answer):
                problems.append(f"ledgerbee does not answer ({answer.reason})")
                break
            code = answer.code("code") or f"http_{answer.status}"
            if answer.status in (401, 403):
                problems.append(f"ledgerbee turned the key down ({code}): it needs the scope meter-report")
                break
            if code == "METER_NOT_FOUND":
                problems.append(f"ledgerbee has no meter {theirs}: create it, or set SIDECAR_LEDGERBEE_METERS")
            elif answer.ok and not isinstance(answer.json(), dict):
                problems.append("ledgerbee's address answers with something else than its API: check the URL")
                break
            elif answer.ok and not _has_subscriptions(answer):
                problems.append(f"ledgerbee: no subscription uses the meter {theirs}: what is reported bills nobody")
        return problems


def _metadata(record: Record) -> dict[str, str | int]:
    """Texts and numbers only; what is not known is left out."""
    usage = record.usage
    known: dict[str, str | int | None] = {
        "model": None if usage is None else usage.model or usage.request_model,
        "provider": None if usage is None else usage.provider,
        "operation": None if usage is None else usage.operation,
        "route": record.route,
        "status": record.status,
        "outcome": str(record.outcome),
        "usage_state": None if usage is None else str(usage.usage_state),
    }
    found: dict[str, str | int] = {}
    for name, value in known.items():
        if value is not None:
            found[name] = clip(value) if isinstance(value, str) else value
    return found


def _judge(answer: Answer, _: Sealed) -> Verdict | None:
    code = answer.code("code")
    if answer.status == 404 and code is not None:
        return refused_with(answer, "code")  # METER_NOT_FOUND: the vendor's own word, so the address is right
    if answer.status == 403 and code is not None:
        return Blocked(code)
    return refused_with(answer, "code") if answer.status in (400, 422) else None


def _has_subscriptions(answer: Answer) -> bool:
    said = answer.json()
    return not isinstance(said, dict) or said.get("subscriptions") != []
