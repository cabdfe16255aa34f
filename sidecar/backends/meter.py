"""`meter`: `/meter` payloads as a JSON array, to the URL as given.

For any collector that takes Revenium's v1 payload in batches. The whole request is the unit: one
`Idempotency-Key` for its bytes, and a refusal refuses all of it (delivery then splits it). How long the
collector remembers keys is its own affair and a setting here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import time
from typing import Final

from sidecar.backends.answers import ANSWERS
from sidecar.backends.base import Context, label_id
from sidecar.backends.batching import JSON_ARRAY, Piece, seal_batches
from sidecar.backends.http import BODY_BYTES_MAX, HEADER_TEXT, HttpBackend, HttpSettings
from sidecar.backends.revenium.transaction import payload_bytes
from sidecar.model.delivery import Abilities, Atomicity, Dedup, Encoded, Event, Sealed, Verdict
from sidecar.model.record import Record
from sidecar.settings import Secret, required_setting, secret_setting, setting, types

BATCH_DEFAULT: Final = 100  # some 90 kB: one packet train, and little to send again


@dataclass(frozen=True, kw_only=True)
class MeterSettings(HttpSettings):
    url: str = required_setting(types.http_url_query, "where to POST the batches, as it is")
    api_key: Secret | None = secret_setting(HEADER_TEXT, "sent as `x-api-key`")
    batch: int = setting(types.count(1, 10_000), str(BATCH_DEFAULT), "most payloads in one request")
    dedup_window: float = setting(types.duration(), "24h", "how long the collector remembers an `Idempotency-Key`")


class MeterBackend(HttpBackend[MeterSettings]):
    """Batches of `/meter` payloads to one address."""

    name = "meter"
    settings_type = MeterSettings
    key_header = "x-api-key"

    def __init__(self, settings: MeterSettings, context: Context, *, clock: Callable[[], float] = time) -> None:
        self.abilities = Abilities(
            events_max=settings.batch,
            bytes_max=BODY_BYTES_MAX,
            atomicity=Atomicity.ALL_OR_NOTHING,
            dedup=Dedup.REQUEST_KEY,
            dedup_window_s=settings.dedup_window,
        )
        super().__init__(settings, context, clock=clock)

    def encode(self, records: Sequence[Record]) -> Encoded:
        encoded = Encoded()
        pieces = (
            Piece(Event(r.id, r.id), payload_bytes(r, customer=label_id(r, self._customers)))
            for r in records
            if self._policy.place(r, encoded)
        )
        return seal_batches(
            pieces,
            encoded,
            frame=JSON_ARRAY,
            events_max=self.abilities.events_max,
            bytes_max=self.abilities.bytes_max,
        )

    async def send(self, sealed: Sealed) -> list[Verdict]:
        headers = {**self._headers, "idempotency-key": sealed.key}
        return await self._client.offer(self._settings.url, sealed, headers, ANSWERS["meter"])
