"""`openmeter`: OpenMeter's events as CloudEvents, one a record; its meters work on `data`.

An event is known there by `source` and `id`, if the deployment de-duplicates at all: the open-source build
does not unless told to, and then the window is its own. `SIDECAR_OPENMETER_DEDUP_WINDOW=0` says that it does
not, and what was sent without an answer is then parked instead of sent again. v1 compares the whole content type,
so it goes without parameters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import orjson

from sidecar.backends.answers import ANSWERS
from sidecar.backends.base import (
    BILLING,
    DAY_S,
    Context,
    Policy,
    answered_calls,
    policy_of,
    policy_settings,
    revealed,
    rfc3339,
)
from sidecar.backends.batching import JSON_ARRAY, Piece, seal_batches
from sidecar.backends.http import BODY_BYTES_MAX, HEADER_TEXT, TIMEOUT, HttpClient
from sidecar.meters.properties import as_json, properties
from sidecar.model.delivery import Abilities, Atomicity, Dedup, Encoded, Event, Sealed, Verdict
from sidecar.model.record import Record
from sidecar.settings import Setting, types

HOST: Final = "https://openmeter.cloud"
PATHS: Final = {"v1": "/api/v1/events", "v3": "/openmeter/events"}
CONTENT_TYPE: Final = "application/cloudevents-batch+json"
BATCH_DEFAULT: Final = 500  # no limit is stated; 100 to 1000 is what deployments are sized for

SETTINGS: Final = (
    Setting("url", types.http_url, HOST, "the deployment; for v3 with what stands before `/openmeter/events`"),
    Setting("api_key", HEADER_TEXT, help="sent as `Authorization: Bearer …`", secret=True),
    Setting("api", types.word_of(*PATHS), "v1", "`v3` for the API that Kong hosts"),
    Setting("source", types.text, "metering-sidecar", "the events' `source`: one for the whole installation, for ever"),
    Setting("event_type", types.text, "api_request", "the events' `type`, as the meters have it"),
    Setting("batch", types.count(1, 10_000), str(BATCH_DEFAULT), "most events in one request"),
    Setting("dedup_window", types.duration(), "24h", "how long the deployment remembers an event; 0: not at all"),
    TIMEOUT,
    *policy_settings(BILLING),
)


class OpenmeterBackend:
    """CloudEvents in batches."""

    name = "openmeter"

    def __init__(
        self,
        *,
        url: str = HOST,
        api_key: str | None = None,
        api: str = "v1",
        source: str = "metering-sidecar",
        event_type: str = "api_request",
        batch: int = BATCH_DEFAULT,
        dedup_window_s: float = DAY_S,
        customers: Mapping[str, str] | None = None,
        policy: Policy = BILLING,
        timeout_s: float | None = None,
    ) -> None:
        dedup = Dedup.EVENT_ID if dedup_window_s > 0 else Dedup.NONE
        self.abilities = Abilities(
            events_max=batch,
            bytes_max=BODY_BYTES_MAX,
            atomicity=Atomicity.PREFIX,
            dedup=dedup,
            dedup_window_s=dedup_window_s or None,
        )
        self.address: str = types.http_url.parse(url)
        self._path = PATHS[api]
        self._headers = {} if api_key is None else {"authorization": f"Bearer {HEADER_TEXT.parse(api_key)}"}
        self._source, self._type = source, event_type
        self._customers = dict(customers or {})
        self._policy = policy
        self._client = HttpClient(dedup=dedup) if timeout_s is None else HttpClient(dedup=dedup, timeout_s=timeout_s)

    @classmethod
    def from_settings(cls, values: Mapping[str, Any], context: Context) -> OpenmeterBackend:
        return cls(
            url=values["url"],
            api_key=revealed(values["api_key"]),
            api=values["api"],
            source=values["source"],
            event_type=values["event_type"],
            batch=values["batch"],
            dedup_window_s=values["dedup_window"],
            customers=context.customers(cls.name),
            policy=policy_of(values),
            timeout_s=values["timeout"],
        )

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
            path=self._path,
            content_type=CONTENT_TYPE,
        )

    def _event(self, record: Record, customer: str) -> bytes:
        return orjson.dumps(
            {
                "specversion": "1.0",
                "id": record.id,
                "source": self._source,
                "type": self._type,
                "subject": customer,
                "time": rfc3339(record.started_at),
                "datacontenttype": "application/json",
                "data": as_json(properties(record)),
            }
        )

    async def send(self, sealed: Sealed) -> list[Verdict]:
        return await self._client.offer(self.address + sealed.path, sealed, self._headers, ANSWERS["openmeter"])

    async def aclose(self) -> None:
        await self._client.aclose()
