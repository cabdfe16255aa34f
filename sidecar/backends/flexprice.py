"""`flexprice`: Flexprice's events in bulk, one event a record; its meters work on the properties.

Storage there folds two events only when `event_id` and `timestamp` are the same, so both always travel, made
from the record. A 400 may come after a leading part was taken and does not say which event it means: the
parts are then sent again with the same ids. A 202 means handed on, not stored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import time
from typing import Any, Final

import orjson

from sidecar.backends.answers import ANSWERS
from sidecar.backends.base import (
    Context,
    CustomerSettings,
    Provision,
    answered_calls,
    json_number,
    rfc3339,
)
from sidecar.backends.batching import JSON_EVENTS, Piece, seal_batches
from sidecar.backends.http import HEADER_TEXT, Answer, HttpBackend, HttpSettings, refused_with
from sidecar.meters.definition import Kind, Meter
from sidecar.meters.hourly import write_amount
from sidecar.meters.properties import as_json, properties
from sidecar.model.delivery import Abilities, Atomicity, Dedup, Encoded, Event, Sealed, Verdict
from sidecar.model.record import Record
from sidecar.settings import Secret, required_secret, setting, types

HOST: Final = "https://us.api.flexprice.io"  # as the vendor's package; https://api.cloud.flexprice.io is India's
BULK: Final = "/v1/events/bulk"
METERS: Final = "/v1/meters"
EVENTS_MAX: Final = 1000
BYTES_MAX: Final = 32 * 1024 * 1024
CONCURRENCY: Final = 4  # of 100 bulk requests a minute that the hosted service takes
SOURCE: Final = "metering-sidecar"


@dataclass(frozen=True, kw_only=True)
class FlexpriceSettings(CustomerSettings, HttpSettings):
    url: str = setting(types.http_url, HOST, "with or without `/v1`; `https://api.cloud.flexprice.io` in India")
    api_key: Secret = required_secret(HEADER_TEXT, "sent as `x-api-key`", also=("FLEXPRICE_API_KEY",))
    event_name: str = setting(types.text, "api_request", "the event's name, as the meters have it")
    environment_id: str | None = setting(
        HEADER_TEXT, None, "sent as `X-Environment-ID`, where the key is not bound to one"
    )


class FlexpriceBackend(HttpBackend[FlexpriceSettings]):
    """Events in bulk."""

    name = "flexprice"
    settings_type = FlexpriceSettings
    key_header = "x-api-key"
    abilities = Abilities(
        events_max=EVENTS_MAX,
        bytes_max=BYTES_MAX,
        atomicity=Atomicity.PREFIX,
        dedup=Dedup.EVENT_ID,
        dedup_window_s=None,  # the same id and time are the same row for ever
        concurrency=CONCURRENCY,
    )

    def __init__(self, settings: FlexpriceSettings, context: Context, *, clock: Callable[[], float] = time) -> None:
        super().__init__(settings, context, clock=clock)
        self.address = settings.url.removesuffix("/v1")
        if settings.environment_id is not None:
            self._headers["x-environment-id"] = settings.environment_id

    def encode(self, records: Sequence[Record]) -> Encoded:
        encoded = Encoded()
        pieces = (
            Piece(Event(record.id, record.id), self._event(record, customer))
            for record, customer in answered_calls(records, self._policy, self._customers, encoded)
        )
        return seal_batches(pieces, encoded, frame=JSON_EVENTS, events_max=EVENTS_MAX, bytes_max=BYTES_MAX, path=BULK)

    def _event(self, record: Record, customer: str) -> bytes:
        return orjson.dumps(
            {
                "event_id": record.id,
                "event_name": self._settings.event_name,
                "external_customer_id": customer,
                "timestamp": rfc3339(record.started_at),
                "source": SOURCE,
                "properties": as_json(properties(record), money=json_number),
            }
        )

    async def send(self, sealed: Sealed) -> list[Verdict]:
        return await self._client.offer(self.address + sealed.path, sealed, self._headers, ANSWERS["flexprice"], _judge)

    async def provision(self, meter: Meter) -> Provision:
        """Create the meter where its name is free; compare, and change nothing, where it is not."""
        wanted, why = self._definition(meter)
        if wanted is None:
            return Provision(False, why)
        there = await self._client.request("GET", f"{self.address}{METERS}?limit=1000", None, self._headers)
        if not isinstance(there, Answer):
            return Provision(False, f"flexprice does not answer ({there.reason})")
        if not there.ok or not isinstance(there.json(), dict | list):
            return Provision(False, f"flexprice does not list its meters (http_{there.status}): check URL and key")
        for row in _rows(there):
            if row.get("name") == meter.name:
                different = _differences(wanted, row)
                if not different:
                    return Provision(True, f"flexprice has the meter {meter.name}, and it fits")
                what = ", ".join(different)
                return Provision(False, f"flexprice's meter {meter.name} differs in {what}: it is left as it is")
        headers = {**self._headers, "content-type": "application/json"}
        made = await self._client.request("POST", self.address + METERS, orjson.dumps(wanted), headers)
        if isinstance(made, Answer) and made.ok and _is_meter(made):
            return Provision(True, f"flexprice: created the meter {meter.name}")
        why = (made.code("code") or f"http_{made.status}") if isinstance(made, Answer) else made.reason
        return Provision(False, f"flexprice did not create the meter {meter.name} ({why})")

    def _definition(self, meter: Meter) -> tuple[dict[str, Any] | None, str]:
        """The meter in their words; what they cannot express is said, not approximated."""
        aggregation: dict[str, Any] = {"type": str(meter.kind)}
        if meter.kind is Kind.UNIQUE_COUNT:
            aggregation["type"] = "COUNT_UNIQUE"
        if meter.field is not None:
            aggregation["field"] = meter.field
        if meter.expression is not None:
            aggregation["expression"] = meter.expression.text
        if meter.bucket_size is not None:
            aggregation["bucket_size"] = str(meter.bucket_size)
        if meter.group_by is not None:
            aggregation["group_by"] = meter.group_by
        if meter.multiplier is not None:
            if meter.kind is not Kind.SUM or meter.expression is not None or meter.bucket_size is not None:
                return None, f"flexprice takes a multiplier only with a plain SUM of a field: {meter.name} is left out"
            aggregation |= {"type": "SUM_WITH_MULTIPLIER", "multiplier": write_amount(meter.multiplier)}
        return {
            "name": meter.name,
            "event_name": meter.event_name or self._settings.event_name,
            "aggregation": aggregation,
            "filters": [{"key": f.key, "values": list(f.values)} for f in meter.filters],
            "reset_usage": str(meter.reset),
        }, ""


def _judge(answer: Answer, _: Sealed) -> Verdict | None:
    if answer.status == 404 and answer.code("code") is None:
        return None
    return refused_with(answer, "code") if answer.status in (400, 404, 409, 422) else None


def _is_meter(answer: Answer) -> bool:
    said = answer.json()
    return isinstance(said, dict) and any(isinstance(said.get(name), str) for name in ("id", "name"))


def _rows(answer: Answer) -> list[Mapping[str, Any]]:
    """The meters of a list answer, under whichever key it has them."""
    said = answer.json()
    rows = said.get("items", said.get("meters", said.get("data"))) if isinstance(said, dict) else said
    return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []


def _differences(wanted: Mapping[str, Any], there: Mapping[str, Any]) -> list[str]:
    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: plain(part) for name, part in value.items() if part not in (None, "", [], {}, "0")}
        return value or None

    return [
        name
        for name in ("event_name", "aggregation", "filters", "reset_usage")
        if plain(wanted.get(name)) != plain(there.get(name))
    ]
