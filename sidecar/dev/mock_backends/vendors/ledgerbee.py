"""LedgerBee "Report usage": one report a request, `x-api-idempotency-key` mandatory, unknown fields refused.

202 `queued` the first time, 200 `duplicate` ever after; another body under a known key is a duplicate as well, which
is the worse of the two readings of the documents and so the one to be safe against. Meters cannot be registered here:
a name or id that begins with `unknown` does not exist, one that begins with `archived` is archived, all others are
active and used by one subscription.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

import orjson

from sidecar.dev.mock_backends.checks import (
    Field,
    is_json,
    mapping,
    moment,
    number,
    parse_json,
    problems,
    rfc3339,
    text,
)
from sidecar.dev.mock_backends.contract import KEY, Answer, Call, Consumed, Memory, Route, Terms, Unit, Verdict

BASE: Final = "/api/v1/meters"
KEY_HEADER: Final = "x-api-idempotency-key"

_UUID: Final = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)

FIELDS: Final[Mapping[str, Field]] = {
    "value": number(required=True),
    "customerId": text(required=True, empty=False),
    "meterId": Field(lambda value: isinstance(value, str) and bool(_UUID.fullmatch(value)), "must be a UUID"),
    "meterName": text(empty=False),
    "timestamp": moment(),
    "metadata": mapping(),
}


class LedgerBee:
    """The report and the two look-ups of subscriptions. The look-ups' paths are our reading of the documents."""

    def __init__(self, memory: Memory, terms: Terms) -> None:
        self._memory = memory
        self._terms = terms
        self.routes = (
            Route(method="POST", path=f"{BASE}/report", handle=self._report),
            Route(method="GET", path=f"{BASE}/subscriptions", handle=self._by_name),
            Route(method="GET", path=f"{BASE}/{{meterId}}/subscriptions", handle=self._by_id),
        )

    @staticmethod
    def settings(url: str) -> Mapping[str, str]:
        return {"url": url, "api_key": KEY}

    @staticmethod
    def consumed(path: str, body: Mapping[str, Any]) -> Consumed | None:
        return Consumed(body["customerId"], {body["meterName"]: body["value"]}) if "meterName" in body else None

    def fault_body(self, status: int) -> bytes:
        return orjson.dumps({"statusCode": status, "message": "Too many requests" if status == 429 else "Server error"})

    def _report(self, call: Call) -> Answer:
        body = self._open(call)
        if isinstance(body, Answer):
            return body
        key = call.header(KEY_HEADER)
        refused = Unit(key or None, body, Verdict.REFUSED)
        if not key:
            return _error(call, 400, f"{KEY_HEADER} is required", refused, code="IDEMPOTENCY_KEY_REQUIRED")
        if refusal := _refusal(call, body, refused):
            return refusal
        if self._memory.recall(key, call.at_s):
            unit = Unit(key, body, Verdict.DUPLICATE)
            return Answer.json(200, {"status": "duplicate", "idempotencyKey": key}, unit)
        self._memory.keep(key, True, call.at_s)
        request_id = f"req-{call.fingerprint()[:24]}"
        return Answer.json(202, {"status": "queued", "requestId": request_id}, Unit(key, body, Verdict.DELIVERED))

    def _open(self, call: Call) -> dict[str, Any] | Answer:
        """The body, or the refusal."""
        if refusal := self._stranger(call):
            return refusal
        try:
            body = parse_json(call) if is_json(call) else None
        except ValueError:
            body = None
        if isinstance(body, dict):
            return body
        return _error(call, 400, "expected application/json with one object", code="SHARED_VALIDATION_FAILED")

    def _by_name(self, call: Call) -> Answer:
        if refusal := self._stranger(call):
            return refusal
        name = call.query.get("meterName")
        if not name:
            return _error(call, 400, "meterName is required", code="METER_IDENTIFIER_REQUIRED")
        return _subscriptions(call, name)

    def _by_id(self, call: Call) -> Answer:
        return self._stranger(call) or _subscriptions(call, call.query["meterId"])

    def _stranger(self, call: Call) -> Answer | None:
        if self._terms.admits(call.header("x-api-key")):
            return None
        return _error(call, 401, "Invalid API key", code="UNAUTHORIZED")


def _refusal(call: Call, body: Mapping[str, Any], refused: Unit) -> Answer | None:
    """What the vendor has against a report that came with a key."""
    found = problems(body, FIELDS, strict=True)
    metadata = body.get("metadata")
    for name, value in metadata.items() if isinstance(metadata, dict) else ():
        if not isinstance(value, str | int | float):
            found.append((f"metadata.{name}", "must be a string, a number or a boolean"))
    if found:
        reply = {"validationErrors": [{"property": name, "constraints": {"is": what}} for name, what in found]}
        return _error(call, 400, "Validation failed", refused, code="SHARED_VALIDATION_FAILED", details=reply)
    meter = body.get("meterId") or body.get("meterName")
    if not meter:
        return _error(call, 400, "provide meterId or meterName", refused, code="METER_IDENTIFIER_REQUIRED")
    if meter.startswith("unknown"):
        return _error(call, 404, "Meter not found", refused, code="METER_NOT_FOUND")
    if meter.startswith("archived"):
        return _error(call, 400, "Meter is not active", refused, code="METER_NOT_ACTIVE")
    return None


def _subscriptions(call: Call, meter: str) -> Answer:
    if meter.startswith("unknown"):
        return _error(call, 404, "Meter not found", code="METER_NOT_FOUND")
    product = {"id": "product-1", "name": "Product"}
    subscription = {"id": "subscription-1", "customerId": "customer-1", "products": [product]}
    return Answer.json(200, {"meterId": meter, "meterName": meter, "subscriptions": [subscription]})


def _error(
    call: Call, status: int, message: str, *units: Unit, code: str, details: Mapping[str, Any] | None = None
) -> Answer:
    """The vendor's envelope; `path` is relative to `/api`."""
    body: dict[str, Any] = {
        "statusCode": status,
        "timestamp": rfc3339(call.at_s),
        "path": call.path.removeprefix("/api"),
        "message": message,
        "code": code,
    }
    if details is not None:
        body["details"] = details
    return Answer.json(status, body, *units)
