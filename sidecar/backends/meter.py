"""`meter`: `/meter` payloads as a JSON array, to the URL as given.

For any collector that takes Revenium's v1 payload in batches. The whole request is the unit: one
`Idempotency-Key` for its bytes, and a refusal refuses all of it (delivery then splits it). How long the
collector remembers keys is its own affair and a setting here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from sidecar.backends.answers import ANSWERS
from sidecar.backends.base import BILLING, DAY_S, Context, Policy, label_id, policy_of, policy_settings, revealed
from sidecar.backends.batching import JSON_ARRAY, Piece, seal_batches
from sidecar.backends.http import BODY_BYTES_MAX, HEADER_TEXT, TIMEOUT, HttpClient
from sidecar.backends.revenium.transaction import payload_bytes
from sidecar.model.delivery import Abilities, Atomicity, Dedup, Encoded, Event, Sealed, Verdict
from sidecar.model.record import Record
from sidecar.settings import Setting, types

BATCH_DEFAULT: Final = 100  # design.md, section 7

SETTINGS: Final = (
    Setting("url", types.http_url_query, help="where to POST the batches, as it is", required=True),
    Setting("api_key", HEADER_TEXT, help="sent as `x-api-key`", secret=True),
    Setting("batch", types.count(1, 10_000), str(BATCH_DEFAULT), "most payloads in one request"),
    Setting("dedup_window", types.duration(), "24h", "how long the collector remembers an `Idempotency-Key`"),
    TIMEOUT,
    *policy_settings(BILLING),
)


class MeterBackend:
    """Batches of `/meter` payloads to one address."""

    name = "meter"

    def __init__(
        self,
        *,
        url: str,
        api_key: str | None = None,
        batch: int = BATCH_DEFAULT,
        dedup_window_s: float = DAY_S,
        customers: Mapping[str, str] | None = None,
        policy: Policy = BILLING,
        client: HttpClient | None = None,
    ) -> None:
        self.abilities = Abilities(
            events_max=batch,
            bytes_max=BODY_BYTES_MAX,
            atomicity=Atomicity.ALL_OR_NOTHING,
            dedup=Dedup.REQUEST_KEY,
            dedup_window_s=dedup_window_s,
        )
        self._url = types.http_url_query.parse(url)
        self._auth = {} if api_key is None else {"x-api-key": HEADER_TEXT.parse(api_key)}
        self._customers = dict(customers or {})
        self._policy = policy
        self._client = client or HttpClient(dedup=Dedup.REQUEST_KEY)

    @classmethod
    def from_settings(cls, values: Mapping[str, Any], context: Context) -> MeterBackend:
        return cls(
            url=values["url"],
            api_key=revealed(values["api_key"]),
            batch=values["batch"],
            dedup_window_s=values["dedup_window"],
            customers=context.customers(cls.name),
            policy=policy_of(values),
            client=HttpClient(dedup=Dedup.REQUEST_KEY, timeout_s=values["timeout"]),
        )

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
        headers = {**self._auth, "idempotency-key": sealed.key}
        return await self._client.offer(self._url, sealed, headers, ANSWERS["meter"])

    async def aclose(self) -> None:
        await self._client.aclose()
