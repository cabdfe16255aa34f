"""`lago`: Lago's events in batches, one for each record and meter; the subscription is addressed, not the customer.

A batch is taken whole or not at all, and its refusal names each bad event by its index, among them those that
are there already: these are delivered, and the good ones go again without the bad. The event's time always
travels, because on ClickHouse it is part of the identity. A `code` that no billable metric has is ignored there,
silently.

`SIDECAR_LAGO_COST_METER` names the meter whose events bear money for Lago's dynamic charges. It has to be a SUM of what
calls cost or are charged, so that such an event is there for each call with a known amount and for no other, and the
amount is on one event of a call: it cannot be missed, nor counted twice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from time import time
from typing import Any, Final

import orjson

from sidecar.backends.answers import ANSWERS
from sidecar.backends.base import (
    Context,
    CustomerSettings,
    chosen_meters,
    clip,
    meter_event,
    metered_calls,
    plain_number,
    rounded,
)
from sidecar.backends.batching import JSON_EVENTS, Piece, seal_batches
from sidecar.backends.denials import is_index
from sidecar.backends.http import HEADER_TEXT, Answer, HttpBackend, HttpSettings, refused_with
from sidecar.meters.definition import Kind, Meter
from sidecar.meters.hourly import EXACT, write_amount
from sidecar.model.delivery import Abilities, Atomicity, Dedup, Duplicate, Encoded, Refused, Retry, Sealed, Verdict
from sidecar.model.record import Record
from sidecar.settings import Secret, required_secret, setting, types

HOST: Final = "https://api.getlago.com"
BATCH: Final = "/api/v1/events/batch"
EVENTS_MAX: Final = 100
BYTES_MAX: Final = 1_000_000  # 100 events have 50 kB; no limit is documented
AMOUNT_PLACES: Final = 15  # of `precise_total_amount_cents`, which is kept as numeric(40, 15)
TAKES: Final = frozenset({Kind.COUNT, Kind.SUM, Kind.LATEST, Kind.MAX})
_THERE: Final = {"transaction_id": ["value_already_exist"]}


@dataclass(frozen=True, kw_only=True)
class LagoSettings(CustomerSettings, HttpSettings):
    url: str = setting(types.http_url, HOST, "the API's host; `https://api.eu.getlago.com` in Europe, or your own")
    api_key: Secret = required_secret(HEADER_TEXT, "sent as `Authorization: Bearer …`", also=("LAGO_API_KEY",))
    meters: tuple[str, ...] = setting(types.names, None, "the meters to send; all of them when not set")
    value_key: str = setting(types.text, "value", "the property that the billable metrics aggregate")
    cost_meter: str | None = setting(
        types.text,
        None,
        "the meter (a SUM of `cost_usd` or `charge`) whose events carry its value in cents as "
        "`precise_total_amount_cents`, for a dynamic charge",
    )


class LagoBackend(HttpBackend[LagoSettings]):
    """Events in batches."""

    name = "lago"
    settings_type = LagoSettings
    abilities = Abilities(
        events_max=EVENTS_MAX,
        bytes_max=BYTES_MAX,
        atomicity=Atomicity.PER_ITEM,
        dedup=Dedup.EVENT_ID,
        dedup_window_s=None,  # unique for ever within a subscription; with the time, on ClickHouse
        knows_duplicates=True,
    )

    def __init__(self, settings: LagoSettings, context: Context, *, clock: Callable[[], float] = time) -> None:
        super().__init__(settings, context, clock=clock)
        self.address = settings.url.removesuffix("/api/v1")
        self._meters = chosen_meters(self.name, self._definitions, settings.meters, TAKES)
        self._cost_meter = _cost_meter(settings.cost_meter, self._meters)

    def encode(self, records: Sequence[Record]) -> Encoded:
        encoded = Encoded()
        calls = metered_calls(records, self._policy, self._customers, self._meters, encoded)
        pieces = (
            self._piece(record, subscription, meter, amount)
            for record, subscription, amounts in calls
            for meter, amount in amounts
        )
        return seal_batches(pieces, encoded, frame=JSON_EVENTS, events_max=EVENTS_MAX, bytes_max=BYTES_MAX, path=BATCH)

    def _piece(self, record: Record, subscription: str, meter: Meter, amount: Any) -> Piece:
        event = meter_event(record, meter)
        payload = {
            "transaction_id": event.event_id,
            "external_subscription_id": subscription,
            "code": meter.event_name or meter.name,
            "timestamp": f"{record.started_at.timestamp():.3f}",
            "properties": {**_dimensions(record), self._settings.value_key: plain_number(amount)},
        }
        if meter is self._cost_meter:
            payload["precise_total_amount_cents"] = _cents(amount)
        return Piece(event, orjson.dumps(payload))

    async def send(self, sealed: Sealed) -> list[Verdict]:
        return await self._client.offer(self.address + sealed.path, sealed, self._headers, ANSWERS["lago"], _judge)


def _cost_meter(name: str | None, meters: Sequence[Meter]) -> Meter | None:
    """The meter that bears money. Raises `ValueError` where it is none that could."""
    if name is None:
        return None
    found = next((meter for meter in meters if meter.name == name), None)
    if found is None:
        sent = ", ".join(meter.name for meter in meters)
        raise ValueError(f"SIDECAR_LAGO_COST_METER: {name} is no meter that lago is sent; those are: {sent}")
    if not found.is_money:
        raise ValueError(
            f"SIDECAR_LAGO_COST_METER: the meter {name} is no amount of money: name one with "
            'aggregation = { type = "SUM", field = "cost_usd" } (or "charge")'
        )
    return found


def _cents(amount: int | Decimal) -> str:
    """An amount in hundredths. All digits of a price fit; more, by a multiplier, are rounded half to even."""
    cents = EXACT.multiply(Decimal(amount), Decimal(100))
    return write_amount(rounded(cents, AMOUNT_PLACES))


def _dimensions(record: Record) -> dict[str, str]:
    """What a charge may be filtered or grouped by."""
    usage = record.usage
    known = {
        "model": None if usage is None else usage.model or usage.request_model,
        "provider": None if usage is None else usage.provider,
        "operation": None if usage is None else usage.operation,
        "route": record.route,
        "usage_state": None if usage is None else str(usage.usage_state),
        **{f"dimension_{name}": value for name, value in sorted(record.dimensions.items())},
    }
    return {clip(name): clip(value) for name, value in known.items() if value is not None}


def _judge(answer: Answer, sealed: Sealed) -> Verdict | list[Verdict] | None:
    if answer.status == 404 and answer.code("code") is None:
        return None
    if answer.status != 422:
        return refused_with(answer, "code") if answer.status in (400, 404) else None
    said = answer.json()
    details = said.get("error_details") if isinstance(said, dict) else None
    if not isinstance(details, dict) or not details or not _is_by_index(details, len(sealed.events)):
        return refused_with(answer, "code")
    # Nothing of the batch was taken: who is not named is good, and goes again.
    return [_of_one(details.get(str(index))) for index in range(len(sealed.events))]


def _is_by_index(details: Mapping[str, Any], count: int) -> bool:
    return all(is_index(name) and int(name) < count for name in details)


def _of_one(errors: object) -> Verdict:
    if errors is None:
        return Retry("refused_with_others")
    if errors == _THERE:
        return Duplicate()
    names = sorted(errors) if isinstance(errors, dict) else []
    return Refused(f"invalid_{names[0]}" if names and names[0].isidentifier() and len(names[0]) <= 40 else "http_422")
