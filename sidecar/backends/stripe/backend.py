"""`stripe`: Stripe's billing meters, one event for each record and meter.

Three interfaces: `v1` (one form-encoded event a request), `v2` (one in JSON) and `stream` (up to 100, under a
session of fifteen minutes and on a host of its own). In all of them the event's `identifier`, made of record
and meter, is what de-duplicates, for a day. v1 is sent without an `Idempotency-Key`, because Stripe replays the
stored answer of a key, a 500 included, and no retry would ever get through.

Values are texts, whole numbers unless allowed otherwise. What counts money in millionths or less (a meter of `cost_usd`
with the multiplier 1000000) is rounded to whole ones, half to even: once for each event, when it is made, from the
record alone, so that every repeat and every redrive says the same. The customer must be Stripe's own id: an event
for one that does not exist is answered with 200 and dropped later.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from time import time
from typing import Final
from urllib.parse import urlencode

import orjson

from sidecar.backends.answers import ANSWERS
from sidecar.backends.base import (
    DAY_S,
    Context,
    CustomerSettings,
    Provision,
    chosen_meters,
    meter_event,
    metered_calls,
    plain_number,
    rfc3339,
    rounded,
    subscriber_id,
    without_customer,
)
from sidecar.backends.batching import JSON_EVENTS, Piece, event_key, seal_batches
from sidecar.backends.http import HEADER_TEXT, Answer, HttpBackend, HttpSettings, refused_with
from sidecar.backends.stripe.meters import FORM, FORMULAS, Payload, StripeMeters
from sidecar.backends.stripe.session import StreamSession
from sidecar.meters.definition import Meter
from sidecar.model.delivery import (
    Abilities,
    Atomicity,
    Blocked,
    Dedup,
    Duplicate,
    Encoded,
    Event,
    Refused,
    Retry,
    Sealed,
    Undone,
    Unknown,
    Verdict,
    Withheld,
)
from sidecar.model.record import Record
from sidecar.settings import Secret, required_secret, setting, types

HOST: Final = "https://api.stripe.com"
STREAM_HOST: Final = "https://meter-events.stripe.com"
VERSION: Final = "2024-09-30.acacia"  # the release in which v2 meter events came
EVENTS_V1: Final = "/v1/billing/meter_events"
EVENTS_V2: Final = "/v2/billing/meter_events"
STREAM: Final = "/v2/billing/meter_event_stream"
ADJUSTMENTS_V1: Final = "/v1/billing/meter_event_adjustments"
ADJUSTMENTS_V2: Final = "/v2/billing/meter_event_adjustments"
STREAM_EVENTS_MAX: Final = 100
STREAM_BYTES_MAX: Final = 1_000_000  # 100 events have 30 kB; no limit is documented
PAST_S_MAX: Final = 35 * DAY_S
FUTURE_S_MAX: Final = 300.0
CONCURRENCY: Final = 32  # of 1,000 calls a second that an account may make
MICRO: Final = 1_000_000  # units of money so small that half of one may be rounded away
DIGITS_MAX: Final = 15  # before Stripe reports `meter_event_value_too_many_digits`; its number is not documented
TAKES: Final = frozenset(FORMULAS)
_IDENTIFIER: Final = re.compile(r"identifier:?\s+[`'\"]?([\w.:~-]{8,})", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class StripeSettings(CustomerSettings, HttpSettings):
    url: str = setting(types.http_url, HOST, "the API's host")
    stream_url: str = setting(types.http_url, STREAM_HOST, "the host of the stream")
    api_key: Secret = required_secret(HEADER_TEXT, "secret or restricted key", also=("STRIPE_API_KEY",))
    mode: str = setting(types.word_of("v1", "v2", "stream"), "v1", "which of the interfaces")
    customer_key: str = setting(types.text, "stripe_customer_id", "the payload key of the customer, as at the meters")
    value_key: str = setting(types.text, "value", "the payload key of the value, as at the meters")
    meters: tuple[str, ...] = setting(types.names, None, "the meters to send; all of them when not set")
    decimals: bool = setting(types.flag, "false", "send values that are no whole numbers too")
    version: str = setting(HEADER_TEXT, VERSION, "the `Stripe-Version` of v2 and stream")


class StripeBackend(HttpBackend[StripeSettings]):
    """Meter events."""

    name = "stripe"
    settings_type = StripeSettings

    def __init__(self, settings: StripeSettings, context: Context, *, clock: Callable[[], float] = time) -> None:
        stream = settings.mode == "stream"
        self.abilities = Abilities(
            events_max=STREAM_EVENTS_MAX if stream else 1,
            bytes_max=STREAM_BYTES_MAX if stream else None,
            atomicity=Atomicity.ALL_OR_NOTHING if stream else Atomicity.SINGLE,
            dedup=Dedup.EVENT_ID,
            dedup_window_s=DAY_S,
            age_max_s=PAST_S_MAX,
            future_max_s=FUTURE_S_MAX,
            concurrency=CONCURRENCY,
            one_per_subject=settings.mode == "v1",
            knows_duplicates=not stream,
        )
        super().__init__(settings, context, clock=clock)
        self.address = settings.url
        self._mode = settings.mode
        self._version = {"stripe-version": settings.version}
        self._payload = Payload(settings.customer_key, settings.value_key, settings.decimals)
        self._meters = chosen_meters(self.name, self._definitions, settings.meters, TAKES)
        self._meters_there = StripeMeters(self._client, self.address, self._headers, self._payload)
        self._session = StreamSession(self._client, self.address, {**self._headers, **self._version}, clock)

    def encode(self, records: Sequence[Record]) -> Encoded:
        encoded = Encoded()
        pieces: list[Piece] = []
        calls = metered_calls(records, self._policy, self._customers, self._meters, encoded)
        for record, customer, amounts in calls:
            if not self._is_theirs(record, customer) and without_customer(record, self._policy, encoded) is None:
                continue
            for meter, exact in amounts:
                amount = self._whole_money(meter, exact)
                if not self._is_taken(amount):
                    why = f"meter {meter.name} = {plain_number(amount)}"
                    encoded.withheld[meter_event(record, meter)] = Withheld("value_not_taken", why)
                elif self._mode == "stream":
                    pieces.append(self._piece(record, customer, meter, amount))
                else:
                    encoded.sealed.append(self._sealed(record, customer, meter, amount))
        return seal_batches(
            pieces,
            encoded,
            frame=JSON_EVENTS,
            events_max=STREAM_EVENTS_MAX,
            bytes_max=STREAM_BYTES_MAX,
            path=STREAM,
        )

    def _is_theirs(self, record: Record, customer: str) -> bool:
        """Mapped, or an id that is plainly Stripe's: all others would be dropped there."""
        return customer.startswith("cus_") or subscriber_id(record) in self._customers

    def _whole_money(self, meter: Meter, amount: int | Decimal) -> int | Decimal:
        """What is sent of it: the amount, but money in millionths or less whole where Stripe would not take its digits.

        In larger units nothing is rounded: a cent of a sum in dollars would be gone.
        """
        if not meter.is_money or (meter.multiplier or 1) < MICRO or isinstance(amount, int) or self._is_taken(amount):
            return amount
        return rounded(amount, 0)

    def _is_taken(self, amount: int | Decimal) -> bool:
        whole = isinstance(amount, int) or amount == amount.to_integral_value()
        return (whole or self._payload.decimals) and len(
            plain_number(amount).replace(".", "").lstrip("-")
        ) <= DIGITS_MAX

    def _sealed(self, record: Record, customer: str, meter: Meter, amount: int | Decimal) -> Sealed:
        event = meter_event(record, meter)
        name = meter.event_name or meter.name
        if self._mode == "v2":
            body, path, content_type = self._json(event, record, customer, meter, amount), EVENTS_V2, "application/json"
        else:
            fields = {
                "event_name": name,
                f"payload[{self._payload.customer_key}]": customer,
                f"payload[{self._payload.value_key}]": plain_number(amount),
                "identifier": event.event_id,
                "timestamp": str(int(record.started_at.timestamp())),
            }
            body, path, content_type = urlencode(fields).encode(), EVENTS_V1, FORM
        return Sealed(
            key=event_key(event.event_id),
            events=(event,),
            body=body,
            path=path,
            content_type=content_type,
            subject=f"{customer}:{name}",
        )

    def _piece(self, record: Record, customer: str, meter: Meter, amount: int | Decimal) -> Piece:
        event = meter_event(record, meter)
        return Piece(event, self._json(event, record, customer, meter, amount))

    def _json(self, event: Event, record: Record, customer: str, meter: Meter, amount: int | Decimal) -> bytes:
        return orjson.dumps(
            {
                "event_name": meter.event_name or meter.name,
                "identifier": event.event_id,
                "payload": {self._payload.customer_key: customer, self._payload.value_key: plain_number(amount)},
                "timestamp": rfc3339(record.started_at),
            }
        )

    async def send(self, sealed: Sealed) -> list[Verdict]:
        if sealed.path == STREAM:
            return await self._stream(sealed)
        is_v1 = sealed.path == EVENTS_V1
        headers = dict(self._headers) if is_v1 else {**self._headers, **self._version}
        yes = ANSWERS["stripe v1" if is_v1 else "stripe v2"]
        return await self._client.offer(self.address + sealed.path, sealed, headers, yes, self._judge)

    async def _stream(self, sealed: Sealed) -> list[Verdict]:
        """With the session's token; once more with a new one when it has run out, since nothing was taken then."""
        verdicts: list[Verdict] = []
        for _ in range(2):
            token = await self._session.token()
            if not isinstance(token, str):
                return [token] * len(sealed.events)
            headers = {"authorization": f"Bearer {token}", **self._version}
            yes = ANSWERS["stripe stream"]
            verdicts = await self._client.offer(self._settings.stream_url + STREAM, sealed, headers, yes, self._judge)
            if verdicts[0] != Blocked("unauthorized"):
                return verdicts
            self._session.forget(token)
        return verdicts

    def _judge(self, answer: Answer, sealed: Sealed) -> Verdict | list[Verdict] | None:
        if answer.status == 400 and (known := _known(answer)) is not None:
            return _there_already(known, sealed)
        should = answer.headers.get("stripe-should-retry", "").lower()
        if answer.status == 409 or (should == "true" and 400 <= answer.status < 500):
            return Retry(f"http_{answer.status}", answer.retry_after_s(self._clock()))
        if answer.status == 404 and answer.code("error", "code") is None:
            return None
        return refused_with(answer, "error", "code") if answer.status in (400, 404) else None

    async def cancel(self, event: Event, record: Record | None) -> Undone:
        """Take an event back, within a day of its receipt."""
        meter = next((m for m in self._meters if m.name == event.event_id.rpartition(":")[2]), None)
        name = event.event_id.rpartition(":")[2] if meter is None else meter.event_name or meter.name
        if self._mode == "v1":
            fields = {"event_name": name, "type": "cancel", "cancel[identifier]": event.event_id}
            body, path, content_type = urlencode(fields).encode(), ADJUSTMENTS_V1, FORM
            headers = dict(self._headers)
        else:
            payload = {"event_name": name, "type": "cancel", "cancel": {"identifier": event.event_id}}
            body, path, content_type = orjson.dumps(payload), ADJUSTMENTS_V2, "application/json"
            headers = {**self._headers, **self._version}
        sealed = Sealed(key=event_key(event.event_id), events=(event,), body=body, path=path, content_type=content_type)
        yes = ANSWERS["stripe adjustments"]
        return Undone((await self._client.offer(self.address + path, sealed, headers, yes, self._judge))[0])

    async def examine(self) -> list[str]:
        """Compare the meters at Stripe with ours."""
        return await self._meters_there.compare(self._meters)

    async def provision(self, meter: Meter) -> Provision:
        """Create the meter where its event name is free; never change one that is there."""
        return await self._meters_there.provide(meter)


def _there_already(known: str, sealed: Sealed) -> Verdict | list[Verdict]:
    """A refusal because of one event that is there. It says nothing of the others that came with it: they go again."""
    ids = [event.event_id for event in sealed.events]
    if len(ids) == 1 and known == "":
        return Duplicate()
    if known == "":
        return Refused("duplicate_meter_event")
    if known not in ids:
        return Unknown("others_answer")  # another's id in a refusal of ours says nothing about ours
    return [Duplicate() if one == known else Retry("refused_with_others") for one in ids]


def _known(answer: Answer) -> str | None:
    """The identifier that was used before, or nothing where it is not named; None where that is not what is said.

    v1 says so in words only, so the words are matched loosely.
    """
    said = answer.json()
    error = said.get("error") if isinstance(said, dict) else None
    if not isinstance(error, dict):
        return None
    message = str(error.get("message", ""))
    lower = message.lower()
    if error.get("code") != "duplicate_meter_event" and not ("already exists" in lower and "identifier" in lower):
        return None
    named = _IDENTIFIER.search(message)
    return named[1].rstrip(".") if named is not None else ""
