"""`openmeter`: OpenMeter's events as CloudEvents, one a record; its meters work on `data`.

An event is known there by `source` and `id`, if the deployment de-duplicates at all: the open-source build
does not unless told to, and then the window is its own. `SIDECAR_OPENMETER_DEDUP_WINDOW=0` says that it does
not, and what was sent without an answer is then parked instead of sent again. v1 compares the whole content type,
so it goes without parameters.

Meters there read numbers from text as well, as exact decimals: what a call cost is sent so, with all its digits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import time
from typing import Final

import orjson

from sidecar.backends.answers import ANSWERS
from sidecar.backends.base import (
    Context,
    CustomerSettings,
    answered_calls,
    rfc3339,
)
from sidecar.backends.batching import JSON_ARRAY, Piece, seal_batches
from sidecar.backends.http import BODY_BYTES_MAX, HEADER_TEXT, HttpBackend, HttpSettings
from sidecar.meters.hourly import write_amount
from sidecar.meters.properties import as_json, properties
from sidecar.model.delivery import Abilities, Atomicity, Dedup, Encoded, Event, Sealed, Verdict
from sidecar.model.record import Record
from sidecar.settings import Secret, secret_setting, setting, types

HOST: Final = "https://openmeter.cloud"
PATHS: Final = {"v1": "/api/v1/events", "v3": "/openmeter/events"}
CONTENT_TYPE: Final = "application/cloudevents-batch+json"
BATCH_DEFAULT: Final = 500  # no limit is stated; 100 to 1000 is what deployments are sized for


@dataclass(frozen=True, kw_only=True)
class OpenmeterSettings(CustomerSettings, HttpSettings):
    url: str = setting(types.http_url, HOST, "the deployment; for v3 with what stands before `/openmeter/events`")
    api_key: Secret | None = secret_setting(HEADER_TEXT, "sent as `Authorization: Bearer …`")
    api: str = setting(types.word_of(*PATHS), "v1", "`v3` for the API that Kong hosts")
    source: str = setting(
        types.text, "metering-sidecar", "the events' `source`: one for the whole installation, for ever"
    )
    event_type: str = setting(types.text, "api_request", "the events' `type`, as the meters have it")
    batch: int = setting(types.count(1, 10_000), str(BATCH_DEFAULT), "most events in one request")
    dedup_window: float = setting(types.duration(), "24h", "how long the deployment remembers an event; 0: not at all")


class OpenmeterBackend(HttpBackend[OpenmeterSettings]):
    """CloudEvents in batches."""

    name = "openmeter"
    settings_type = OpenmeterSettings

    def __init__(self, settings: OpenmeterSettings, context: Context, *, clock: Callable[[], float] = time) -> None:
        self.abilities = Abilities(
            events_max=settings.batch,
            bytes_max=BODY_BYTES_MAX,
            atomicity=Atomicity.PREFIX,
            dedup=Dedup.EVENT_ID if settings.dedup_window > 0 else Dedup.NONE,
            dedup_window_s=settings.dedup_window or None,
        )
        super().__init__(settings, context, clock=clock)
        self.address = settings.url

    def encode(self, records: Sequence[Record]) -> Encoded:
        encoded = Encoded()
        pieces = (
            Piece(Event(record.id, record.id), self._event(record, customer))
            for record, customer in answered_calls(records, self._policy, self._customers, encoded)
        )
        return seal_batches(
            pieces,
            encoded,
            frame=JSON_ARRAY,
            events_max=self.abilities.events_max,
            bytes_max=BODY_BYTES_MAX,
            path=PATHS[self._settings.api],
            content_type=CONTENT_TYPE,
        )

    def _event(self, record: Record, customer: str) -> bytes:
        return orjson.dumps(
            {
                "specversion": "1.0",
                "id": record.id,
                "source": self._settings.source,
                "type": self._settings.event_type,
                "subject": customer,
                "time": rfc3339(record.started_at),
                "datacontenttype": "application/json",
                "data": as_json(properties(record), money=write_amount),
            }
        )

    async def send(self, sealed: Sealed) -> list[Verdict]:
        return await self._client.offer(self.address + sealed.path, sealed, self._headers, ANSWERS["openmeter"])
