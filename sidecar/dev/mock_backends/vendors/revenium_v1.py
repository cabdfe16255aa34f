"""Revenium v1 (`/meter/v1/api`): one record a request, no keys, so every repetition counts again.

The documents name the statuses 200 (201 for `/event`), 400, 403 and 404 and no error body; the body here is the usual
one of the framework the service runs on. `/event` takes halves without `responseCode`, because the vendor's own
printed example has none, although the schema wants it.

Which consumers exist is decided by name, since nobody can register one here (`asked`): one that ends in `-quota-<n>`
may use n calls.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final
from urllib.parse import parse_qs, urlsplit

import orjson

from sidecar.dev.mock_backends.asked import allowed, is_unknown, signed
from sidecar.dev.mock_backends.checks import (
    Field,
    Problem,
    boolean,
    header_names,
    int32,
    integer,
    is_json,
    mapping,
    number,
    one_of,
    parse_json,
    problems,
    rfc3339,
    sentence,
    text,
)
from sidecar.dev.mock_backends.contract import KEY, Answer, Call, Consumed, Memory, Route, Terms, Unit, Verdict
from sidecar.dev.mock_backends.faults import GateLie

BASE: Final = "/meter/v1/api"

METER_FIELDS: Final[Mapping[str, Field]] = {
    "method": text(required=True, empty=False),
    "responseCode": int32(required=True),
    "requestHeaders": header_names(required=True),
    "responseHeaders": header_names(required=True),
    "elements": Field(lambda value: isinstance(value, list), "must be a list", required=True),
    "platformAPIKey": text(),
    "monetized": boolean(),
    "url": text(), "api": text(), "productKey": text(), "application": text(), "metadata": text(),
    "backendLatency": number(), "gatewayLatency": number(), "timedOut": boolean(),
    "requestMessageSize": integer(), "responseMessageSize": integer(),
    "userAgent": text(), "remoteUser": text(), "remoteHost": text(), "httpProtocol": text(),
    "contentType": text(), "correlationId": text(), "source": text(),
}  # fmt: skip

EVENT_FIELDS: Final[Mapping[str, Field]] = {
    "requestId": text(required=True, empty=False),
    "eventType": one_of("REQUEST", "RESPONSE", required=True),
    "currentMillis": integer(required=True),
    "method": text(), "uri": text(), "responseCode": int32(),
    "assetId": text(), "productKey": text(), "application": text(), "clientId": text(),
    "elapsedTime": integer(), "metadata": text(), "requestMessageSize": integer(), "responseMessageSize": integer(),
    "contentType": text(), "remoteHost": text(), "userAgent": text(), "correlationId": text(),
    "backendLatency": number(), "source": text(),
    "requestHeaders": header_names(), "responseHeaders": header_names(),
}  # fmt: skip

RATE_FIELDS: Final[Mapping[str, Field]] = {
    "payload": mapping(required=True),
    "sourceId": text(),
    "subscriberCredentialId": text(),  # the tutorial's name for the consumer
    "subscriptionId": text(),  # the client libraries' name
    "sourceType": text(),
}

DAY_S: Final = 86_400.0


def meter_problems(body: Mapping[str, Any]) -> list[Problem]:
    """What is wrong with one `/meter` payload; also the measure for arrays of them."""
    found = problems(body, METER_FIELDS)
    elements = body.get("elements")
    for place, element in enumerate(elements if isinstance(elements, list) else ()):
        if not isinstance(element, dict) or not isinstance(element.get("name"), str):
            found.append((f"elements[{place}].name", "is required and must be a string"))
        elif not isinstance(element.get("value"), str):
            found.append((f"elements[{place}].value", "is required and must be a string, also for numbers"))
    return found


def without_key(body: Mapping[str, Any]) -> dict[str, Any]:
    """The payload as it may be listed: the schema lets the API key stand in it."""
    return {name: "[key]" if name == "platformAPIKey" else value for name, value in body.items()}


class ReveniumV1:
    """Everything below `/meter/v1/api`."""

    def __init__(self, memory: Memory, terms: Terms) -> None:
        self._memory = memory
        self._terms = terms
        self.routes = (
            Route(method="POST", path=f"{BASE}/meter", handle=self._meter),
            Route(method="POST", path=f"{BASE}/event", handle=self._event),
            Route(method="POST", path=f"{BASE}/meter/rate", handle=self._rate),
            Route(method="POST", path=f"{BASE}/meter/ingest", handle=self._ingest),
            Route(method="GET", path=f"{BASE}/meter/product-key", handle=self._product_key, lies=self._product_key),
        )

    @staticmethod
    def settings(url: str) -> Mapping[str, str]:
        return {"url": url, "api_key": KEY, "source_id": "demo"}

    @staticmethod
    def consumed(path: str, body: Mapping[str, Any]) -> Consumed | None:
        if "ingest?" in path:
            return Consumed("".join(parse_qs(urlsplit(path).query).get("subscriptionId", [])), body)
        if "elements" in body:
            amounts = {one["name"]: one["value"] for one in body["elements"]}
            return Consumed(body.get("application"), {"api_calls": 1, **amounts})
        if "eventType" not in body:
            return None
        if body["eventType"] != "RESPONSE":  # the second half of a call has what was consumed
            return Consumed(body.get("application"), {})
        said = dict(pair.split("=", 1) for pair in str(body.get("metadata", "")).split(",") if "=" in pair)
        return Consumed(body.get("application"), {"api_calls": 1, **said})

    def fault_body(self, status: int) -> bytes:
        return orjson.dumps({"status": status, "error": "Too Many Requests" if status == 429 else "Server Error"})

    def _meter(self, call: Call) -> Answer:
        body = self._open(call)
        if isinstance(body, Answer):
            return body
        if found := meter_problems(body):
            return _bad(call, found, without_key(body))
        for name in ("productKey", "application"):
            if consumer := body.get(name):
                used = self._memory.recall(f"used:{consumer}", call.at_s) or 0
                self._memory.keep(f"used:{consumer}", used + 1, call.at_s)
        return Answer.json(200, {}, Unit(body.get("correlationId"), without_key(body), Verdict.DELIVERED))

    def _event(self, call: Call) -> Answer:
        body = self._open(call)
        if isinstance(body, Answer):
            return body
        if found := problems(body, EVENT_FIELDS):
            return _bad(call, found, body)
        key = f"{body['requestId']}:{body['eventType']}"
        return Answer.json(201, {}, Unit(key, body, Verdict.DELIVERED))

    def _rate(self, call: Call) -> Answer:
        body = self._open(call)
        if isinstance(body, Answer):
            return body
        if found := problems(body, RATE_FIELDS):
            return _bad(call, found, body)
        return Answer.json(200, {}, Unit(None, body, Verdict.DELIVERED))

    def _ingest(self, call: Call) -> Answer:
        body = self._open(call)
        if isinstance(body, Answer):
            return body
        found = [(f"query parameter {name}", "is required") for name in ("sourceId",) if not call.query.get(name)]
        found += [(name, "must be a plain value") for name, value in body.items() if isinstance(value, dict | list)]
        if found:
            return _bad(call, found, body)
        return Answer.json(200, {}, Unit(None, body, Verdict.DELIVERED))

    def _product_key(self, call: Call, lie: str | None = None) -> Answer:
        if refusal := self._stranger(call):
            return refusal
        consumer = call.query.get("productKey") or call.query.get("application")
        if not consumer:
            return _bad(call, [("productKey", "or application is required")], None)
        if is_unknown(consumer):
            return _error(call, 404, "Not Found", "no such subscription")
        claims = self._claims(consumer, call.at_s - (DAY_S if lie == GateLie.CLAIM_EXPIRED else 0.0))
        if lie == GateLie.NEGATIVE:
            claims["totalQuota"] = -5
        return Answer.json(200, {"claim": signed(claims, lie)})

    def _claims(self, consumer: str, now_s: float) -> dict[str, Any]:
        quota = allowed(consumer, "quota")
        used = self._memory.recall(f"used:{consumer}", now_s) or 0
        month_ms = int(now_s // 2_592_000 * 2_592_000 * 1000)
        return {
            "iss": "HyperCurrent",
            "organization": "Receiver",
            "consumingOrganization": "Receiver",
            "consumer": consumer,
            "product": "receiver",
            "productTags": [],
            "productLicenseTags": [],
            "productVersion": "1.0.0",
            "assets": [],
            "expiration": None,
            "totalQuota": quota or 0,
            "consumedQuota": used,
            "consumedSubscriptionQuota": used,
            "subscriptionStart": month_ms,
            "subscriptionPeriodStart": month_ms,
            "subscriptionPeriodEnd": month_ms + 2_592_000_000,
            "elementAccessEvents": [],
            "timestamp": int(now_s * 1000),
        }

    def _open(self, call: Call) -> dict[str, Any] | Answer:
        """The body, or the refusal."""
        if refusal := self._stranger(call):
            return refusal
        if not is_json(call):
            return _error(call, 415, "Unsupported Media Type", "expected application/json")
        try:
            body = parse_json(call)
        except ValueError:
            return _error(call, 400, "Bad Request", "the body is no JSON")
        if not isinstance(body, dict):
            return _error(call, 400, "Bad Request", "expected one object: there is no list form")
        return body

    def _stranger(self, call: Call) -> Answer | None:
        if self._terms.admits(call.header("x-api-key")):
            return None
        return _error(call, 403, "Forbidden", "check your API key")


def _bad(call: Call, found: list[Problem], body: Any) -> Answer:
    answer = _error(call, 400, "Bad Request", sentence(found))
    if call.method == "GET":
        return answer
    return Answer(answer.status, answer.body, units=(Unit(None, body, Verdict.REFUSED),))


def _error(call: Call, status: int, error: str, message: str) -> Answer:
    return Answer.json(
        status,
        {"timestamp": rfc3339(call.at_s), "status": status, "error": error, "message": message, "path": call.path},
    )
