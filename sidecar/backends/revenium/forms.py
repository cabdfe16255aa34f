"""How each of Revenium's interfaces describes one call: paths and bytes, nothing else.

v1 has `meter` (one object), `event` (two halves with a time each), `rate` and `ingest` (amounts only); v2 has
`events` (amounts) and `completions` (model calls with all that is known). An empty answer means that the
call has nothing that could be rated.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final
from urllib.parse import quote, urlencode, urlsplit

import orjson

from sidecar.backends.base import clip, json_number, label_id, rfc3339
from sidecar.backends.revenium import completion
from sidecar.backends.revenium.transaction import SOURCE, elements, metadata, payload_bytes, status_of
from sidecar.meters.hourly import read_amount
from sidecar.meters.properties import answered
from sidecar.model.record import Record

V1: Final = "/meter/v1/api"
V2: Final = "/meter/v2"
CREDENTIAL_FIELD: Final = "subscriberCredentialId"  # v1 `rate`: the tutorial's name; the older client's is below
SUBSCRIPTION_FIELD: Final = "subscriptionId"

# A dimension of this name fills the field of a completion.
_COMPLETION_DIMENSIONS: Final = {
    "organization_name": "organizationName",
    "product_name": "productName",
    "subscription_id": "subscriptionId",
    "agent": "agent",
    "task_type": "taskType",
    "environment": "environment",
    "region": "region",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What a mode needs to know beside the record."""

    customers: Mapping[str, str]
    subscriber_field: str = "application"
    rate_field: str = CREDENTIAL_FIELD
    api_id: str | None = None
    source_id: str | None = None
    costs: bool = False  # completions: what the call cost, in the place of the vendor's own calculation


@dataclass(frozen=True, slots=True)
class Form:
    """One request: what is put behind the record's id, the path, and the bytes."""

    suffix: str
    path: str
    body: bytes
    headers: tuple[tuple[str, str], ...] = ()


def meter(record: Record, options: Options) -> list[Form]:
    body = payload_bytes(
        record,
        customer=label_id(record, options.customers),
        customer_field=options.subscriber_field,
        api=options.api_id,
    )
    return [Form("", f"{V1}/meter", body)]


def event(record: Record, options: Options) -> list[Form]:
    """Two halves with their own times; what was consumed fits into `metadata` only."""
    start_ms = _millis(record.started_at)
    both = _known(
        requestId=record.id,
        method=record.method,
        uri=urlsplit(record.url).path or "/",
        responseCode=status_of(record),  # the schema wants it in both halves
        source=SOURCE,
        correlationId=record.id,
        assetId=options.api_id,
        remoteHost=record.client_ip,
        userAgent=record.user_agent,
        **{options.subscriber_field: label_id(record, options.customers)},
    )
    consumed = ",".join(f"{e['name']}={e['value']}" for e in elements(record.usage))
    request = {
        **both,
        "eventType": "REQUEST",
        "currentMillis": start_ms,
        "requestMessageSize": record.request_bytes,
        "requestHeaders": list(record.request_headers),
    }
    response = {
        **both,
        "eventType": "RESPONSE",
        "currentMillis": start_ms + int(record.duration_ms or 0),
        "responseMessageSize": record.response_bytes,
        "responseHeaders": list(record.response_headers),
        **_known(
            elapsedTime=None if record.duration_ms is None else int(record.duration_ms),
            backendLatency=record.first_byte_ms,
            metadata=",".join(filter(None, (metadata(record), consumed))) or None,
        ),
    }
    return [
        Form(":request", f"{V1}/event", orjson.dumps(request)),
        Form(":response", f"{V1}/event", orjson.dumps(response)),
    ]


def rate(record: Record, options: Options) -> list[Form]:
    rated = _rated(record)
    if not rated:
        return []
    body = _known(
        sourceId=options.source_id,
        payload=rated,
        sourceType=SOURCE,
        **{options.rate_field: label_id(record, options.customers)},
    )
    return [Form("", f"{V1}/meter/rate", orjson.dumps(body))]


def ingest(record: Record, options: Options) -> list[Form]:
    rated = _rated(record)
    if not rated:
        return []
    query = urlencode(
        _known(sourceId=options.source_id, subscriptionId=label_id(record, options.customers)), quote_via=quote
    )
    headers = (("x-revenium-source-type", SOURCE.lower()),)
    return [Form("", f"{V1}/meter/ingest?{query}", orjson.dumps(rated), headers)]


def events(record: Record, options: Options) -> list[Form]:
    rated = _rated(record)
    if not rated:
        return []
    body = _known(
        transactionId=record.id,
        payload={name: _amount(value) for name, value in rated.items()},
        sourceId=options.source_id,
        subscriberCredential=label_id(record, options.customers),
    )
    return [Form("", f"{V2}/events", orjson.dumps(body))]


def completions(record: Record, options: Options) -> list[Form]:
    """Where both counts and the model are known; the rest is reported as an event."""
    usage = record.usage
    counted = None if usage is None else completion.counts(usage)
    model = None if usage is None else usage.model or usage.request_model
    if usage is None or counted is None or not model:
        return events(record, options)
    read, written, total = counted
    first_ms = record.first_byte_ms or 0.0
    whole_ms = max(record.duration_ms or 0.0, first_ms)
    customer = label_id(record, options.customers)
    body = _known(
        transactionId=record.id,
        costType="AI",
        model=clip(model),
        provider=clip(usage.provider or "unknown"),
        inputTokenCount=read,
        outputTokenCount=written,
        totalTokenCount=total,
        reasoningTokenCount=usage.reasoning_output_tokens,
        cacheCreationTokenCount=usage.cache_write_input_tokens,
        cacheCreation5mTokenCount=usage.cache_write_5m_input_tokens,
        cacheCreation1hTokenCount=usage.cache_write_1h_input_tokens,
        cacheReadTokenCount=usage.cache_read_input_tokens,
        stopReason=completion.stop_reason(record),
        operationType=completion.operation(usage),
        isStreamed=bool(usage.streamed),
        requestTime=rfc3339(record.started_at),
        completionStartTime=rfc3339(record.started_at + timedelta(milliseconds=first_ms)),
        responseTime=rfc3339(record.started_at + timedelta(milliseconds=whole_ms)),
        requestDuration=int(whole_ms),
        timeToFirstToken=int(usage.time_to_first_token_ms if usage.time_to_first_token_ms is not None else first_ms),
        traceId=None if record.trace_id is None else clip(record.trace_id),
        middlewareSource="metering-sidecar",
        actualServiceTier=None if usage.service_tier is None else clip(usage.service_tier),
        errorReason=None if usage.error is None else clip(usage.error),
        errorCode=record.status if (record.status or 0) >= 400 else None,
        subscriber=None if customer is None else {"id": clip(customer)},
        **(completion.costs(record) if options.costs else {}),
        **{
            field: clip(record.dimensions[name])
            for name, field in _COMPLETION_DIMENSIONS.items()
            if record.dimensions.get(name)
        },
    )
    return [Form("", f"{V2}/ai/completions", orjson.dumps(body))]


def _rated(record: Record) -> dict[str, str]:
    """What may be rated of a call, as name and text: the call itself, and what it consumed."""
    if not answered(record):
        return {}
    call = {} if record.parent_id is not None else {"api-calls": "1"}
    return call | {element["name"]: element["value"] for element in elements(record.usage)}


def _amount(text: str) -> orjson.Fragment | str:
    amount = read_amount(text)
    return text if amount is None else json_number(amount)


def _known(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _millis(moment: datetime) -> int:
    return (moment - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(milliseconds=1)
