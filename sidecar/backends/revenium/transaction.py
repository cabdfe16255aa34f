"""One call as Revenium's v1 `/meter` describes it: the payload that `meter` and `revenium` share.

Header names only, never a value; `elements` are text even for numbers; no `platformAPIKey`, because that
would put a secret into stored bytes. The payload has no event time: the service takes the time of receipt.
"""

from __future__ import annotations

import re
from operator import attrgetter
from typing import Any, Final

import orjson

from sidecar.backends.base import clip
from sidecar.meters.hourly import read_amount, usd_of, write_amount
from sidecar.meters.properties import answered
from sidecar.model.exchange import Outcome, Usage
from sidecar.model.record import Record

CLIENT_LEFT_STATUS: Final = 499  # nginx's word for a client that left before it was sent a head
NO_HEAD_STATUS: Final = 503  # cut by us before a head was sent
SOURCE: Final = "CUSTOM"  # the origin label that the vendor's own examples use outside its gateways

# Usage fields; with `-` for `_` they are element names. The first two are the vendor's spelling, the others follow it.
_FIELDS: Final = (
    "input_tokens",
    "output_tokens",
    "total_tokens",
    "cache_read_input_tokens",
    "cache_write_input_tokens",
    "cache_write_5m_input_tokens",
    "cache_write_1h_input_tokens",
    "tool_use_input_tokens",
    "reasoning_output_tokens",
    "text_input_tokens",
    "image_input_tokens",
    "audio_input_tokens",
    "text_output_tokens",
    "image_output_tokens",
    "audio_output_tokens",
    "accepted_prediction_tokens",
    "rejected_prediction_tokens",
)
_ELEMENTS: Final = tuple(name.replace("_", "-") for name in _FIELDS)
_counts: Final = attrgetter(*_FIELDS)  # one call for all of them
_SEPARATORS: Final = re.compile(r"[,=\n\r]")  # what ends a pair, and a line


def payload(
    record: Record, *, customer: str | None, customer_field: str = "application", api: str | None = None
) -> dict[str, Any]:
    """The `/meter` object of one call; fields that are not known are left out."""
    known: dict[str, Any] = {
        "api": api,
        "url": record.url,
        customer_field: customer,
        "metadata": metadata(record),
        "backendLatency": record.first_byte_ms,
        "userAgent": record.user_agent,
        "remoteHost": record.client_ip,
    }
    return {
        "method": record.method,
        "responseCode": status_of(record),
        "requestHeaders": list(record.request_headers),
        "responseHeaders": list(record.response_headers),
        "elements": elements(record.usage),
        "monetized": answered(record),
        "timedOut": record.outcome is Outcome.UPSTREAM_TIMEOUT,
        "requestMessageSize": record.request_bytes,
        "responseMessageSize": record.response_bytes,
        "correlationId": record.id,
        "source": SOURCE,
        **{name: value for name, value in known.items() if value is not None},
    }


def payload_bytes(
    record: Record, *, customer: str | None, customer_field: str = "application", api: str | None = None
) -> bytes:
    return orjson.dumps(payload(record, customer=customer, customer_field=customer_field, api=api))


def status_of(record: Record) -> int:
    """The field is required, so a call without a head gets the code that says why."""
    if record.status is not None:
        return record.status
    if record.parent_id is not None:
        return 200  # a message of a WebSocket that did arrive
    return CLIENT_LEFT_STATUS if record.outcome is Outcome.CLIENT_LEFT else NO_HEAD_STATUS


def elements(usage: Usage | None) -> list[dict[str, str]]:
    """What was consumed, as name and text. Nothing reported gives nothing, never a zero."""
    if usage is None:
        return []
    counts = zip(_ELEMENTS, _counts(usage), strict=True)
    found = [{"name": name, "value": clip(str(value))} for name, value in counts if value is not None]
    if usage.units:
        units = sorted(usage.units.items())
        found += [{"name": clip(name.replace("_", "-")), "value": clip(_text(value))} for name, value in units]
    return found


def _text(value: float | str) -> str:
    """A number as its digits: `0.00001`, and not `1e-05`."""
    amount = read_amount(value) if isinstance(value, float) else None
    return str(value) if amount is None else write_amount(amount)


def metadata(record: Record) -> str | None:
    """Key and value pairs with commas between, as the field wants them: what prices may hang on."""
    pairs: list[tuple[str, str | None]] = []
    if record.usage is not None:
        usage = record.usage
        pairs = [
            ("model", usage.model or usage.request_model),
            ("provider", usage.provider),
            ("operation", usage.operation),
            ("service_tier", usage.service_tier),
            ("usage", usage.usage_state.value),
            ("cost_usd", None if (cost := usd_of(record)) is None else write_amount(cost)),
        ]
    pairs += [("route", record.route), ("outcome", record.outcome.value)]
    texts = [f"{name}={_plain(value)}" for name, value in pairs if value]
    if record.dimensions:
        dimensions = sorted(record.dimensions.items())
        texts += [f"{_plain(f'dimension.{name}')}={_plain(value)}" for name, value in dimensions if value]
    return ",".join(texts)


def _plain(text: str) -> str:
    return clip(_SEPARATORS.sub(" ", text) if _SEPARATORS.search(text) else text)
