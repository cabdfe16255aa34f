"""Flexprice: single events, bulk, and meters, as the open server behaves with its default settings.

Bulk takes events one by one: the first bad one ends the request with 400, and those before it are in. Storage folds
two events only if `event_id` *and* timestamp are the same instant; one without a timestamp is always new. All of that
is answered with 202. `properties` may hold text and numbers alike. The base may end in `/v1` or not: it is part of
the paths here, as it is there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

import orjson

from sidecar.dev.mock_backends.asked import consume, dollars_left, is_unknown
from sidecar.dev.mock_backends.checks import (
    Field,
    Problem,
    mapping,
    moment,
    number,
    one_of,
    parse_json,
    parse_time,
    problems,
    rfc3339,
    sentence,
    text,
)  # fmt: skip
from sidecar.dev.mock_backends.contract import KEY, Answer, Call, Consumed, Memory, Route, Terms, Unit, Verdict

BULK_MAX: Final = 1_000
BODY_BYTES_MAX: Final = 32 * 2**20

EVENT_FIELDS: Final[Mapping[str, Field]] = {
    "event_name": Field(lambda v: isinstance(v, str) and v.strip() != "", "must be a non-empty string", required=True),
    "external_customer_id": text(required=True, empty=False),
    "event_id": text(),
    "customer_id": text(),
    "timestamp": moment(),
    "source": text(),
    "properties": mapping(),
}
# Properties whose sums are money: text is taken by the API, and adds up to nothing there.
AMOUNTS: Final[Mapping[str, Field]] = {name: number() for name in ("cost_usd", "charge")}
AGGREGATIONS: Final = (
    "COUNT", "SUM", "AVG", "COUNT_UNIQUE", "LATEST", "SUM_WITH_MULTIPLIER", "MAX", "WEIGHTED_SUM",
)  # fmt: skip
BUCKETS: Final = ("MINUTE", "15MIN", "30MIN", "HOUR", "3HOUR", "6HOUR", "12HOUR", "DAY", "WEEK", "MONTH")
METER_FIELDS: Final[Mapping[str, Field]] = {
    "name": text(required=True, empty=False),
    "event_name": text(required=True, empty=False),
    "aggregation": mapping(required=True),
    "filters": Field(lambda value: isinstance(value, list), "must be a list"),
    "reset_usage": one_of("BILLING_PERIOD", "NEVER", required=True),
}
AGGREGATION_FIELDS: Final[Mapping[str, Field]] = {
    "type": one_of(*AGGREGATIONS, required=True),
    "field": text(), "expression": text(), "group_by": text(),
    "multiplier": Field(
        lambda v: isinstance(v, str) and bool(re.fullmatch(r"\d+(\.\d+)?", v)) and float(v) > 0,
        "must be a decimal string above 0",
    ),
    "bucket_size": one_of(*BUCKETS),
}  # fmt: skip


class Flexprice:
    """`/v1/events`, `/v1/events/bulk`, `/v1/meters`, and what a customer's wallet has left (`asked`)."""

    def __init__(self, memory: Memory, terms: Terms) -> None:
        self._memory = memory
        self._terms = terms
        self.routes = (
            Route(method="POST", path="/v1/events", handle=self._single),
            Route(method="POST", path="/v1/events/bulk", handle=self._bulk),
            Route(method="POST", path="/v1/meters", handle=self._define),
            Route(method="GET", path="/v1/meters", handle=self._meters),
            Route(method="GET", path="/v1/meters/{id}", handle=self._meter),
            Route(method="GET", path="/v1/customers/wallets", handle=self._wallets, lies=self._wallets),
        )

    @staticmethod
    def settings(url: str) -> Mapping[str, str]:
        return {"url": url, "api_key": KEY}

    @staticmethod
    def consumed(path: str, body: Mapping[str, Any]) -> Consumed | None:
        if "external_customer_id" not in body:
            return None
        return Consumed(body["external_customer_id"], {"api_calls": 1, **body["properties"]})

    def fault_body(self, status: int) -> bytes:
        code = {429: "too_many_requests", 503: "service_unavailable"}.get(status, "internal_error")
        return _error(status, code, "told to").body

    def _single(self, call: Call) -> Answer:
        body = self._open(call)
        if isinstance(body, Answer):
            return body
        if found := _event_problems(body):
            return _invalid(found, Unit(_id_of(body), body, Verdict.REFUSED))
        event_id = body.get("event_id") or f"event_{call.fingerprint()[:26]}"
        reply = {"message": "Event accepted for processing", "event_id": event_id}
        return Answer.json(202, reply, self._take(call, body, 0))

    def _bulk(self, call: Call) -> Answer:
        body = self._open(call)
        if isinstance(body, Answer):
            return body
        events = body.get("events")
        if not isinstance(events, list) or not 1 <= len(events) <= BULK_MAX:
            return _invalid([("events", f"must be a list of 1 to {BULK_MAX}")])
        units: list[Unit] = []
        for place, event in enumerate(events):
            found = _event_problems(event) if isinstance(event, dict) else [("event", "must be an object")]
            if found:
                # What stands before the bad one is in, what stands behind it was never looked at.
                refused = [Unit(_id_of(row), row, Verdict.REFUSED) for row in events[place:]]
                return _invalid(found, *units, *refused)
            units.append(self._take(call, event, place))
        return Answer.json(202, {"message": "Events accepted for processing"}, *units)

    def _take(self, call: Call, event: dict[str, Any], place: int) -> Unit:
        event_id, at_s = _id_of(event), parse_time(event.get("timestamp"))
        verdict = Verdict.DELIVERED
        if event_id is not None and at_s is not None:
            name = f"event:{at_s:.3f}:{event_id}"  # event times are stored with milliseconds
            if self._memory.recall(name, call.at_s):
                verdict = Verdict.DUPLICATE
            else:
                self._memory.keep(name, True, call.at_s)
        if verdict is Verdict.DELIVERED:
            consume(self._memory, event.get("external_customer_id"), {"events": 1}, call.at_s)
        return Unit(event_id, event, verdict)

    def _wallets(self, call: Call, lie: str | None = None) -> Answer:
        if refusal := self._stranger(call, bearer_too=False):
            return refusal
        customer = call.query.get("lookup_key") or call.query.get("id")
        if not customer:
            return _invalid([("id", "or lookup_key is required")])
        if is_unknown(customer):
            return _error(404, "not_found", "no such customer")
        left = f"{dollars_left(self._memory, customer, call.at_s):.2f}"
        wallet: dict[str, Any] = {
            "id": f"wallet_{customer}",
            "customer_id": f"cust_{customer}",
            "currency": "usd",
            "wallet_status": "active",
            "wallet_type": "PRE_PAID",
            "conversion_rate": "1",
            "balance": left,
            "credit_balance": left,
        }
        if call.query.get("include_real_time_balance") == "true":
            live = "NaN" if lie is not None else left
            wallet |= {"real_time_balance": live, "real_time_credit_balance": live, "is_cached_fallback": False}
        return Answer.json(200, [wallet])

    def _define(self, call: Call) -> Answer:
        body = self._open(call, bearer_too=True)
        if isinstance(body, Answer):
            return body
        if found := _meter_problems(body):
            return _invalid(found, Unit(None, body, Verdict.REFUSED))
        meters: list[Any] = self._memory.recall("meters", call.at_s) or []
        now = rfc3339(call.at_s)
        meter = {
            "id": f"meter_receiver_{len(meters) + 1}",
            "name": body["name"],
            "tenant_id": "tenant_receiver",
            "event_name": body["event_name"],
            "aggregation": body["aggregation"],
            "filters": body.get("filters") or [],
            "reset_usage": body["reset_usage"],
            "status": "published",
            "created_at": now,
            "updated_at": now,
        }
        self._memory.keep("meters", [*meters, meter], call.at_s)
        return Answer.json(201, meter, Unit(meter["id"], body, Verdict.DELIVERED))

    def _meters(self, call: Call) -> Answer:
        if refusal := self._stranger(call, bearer_too=True):
            return refusal
        meters = self._memory.recall("meters", call.at_s) or []
        page = {"total": len(meters), "limit": len(meters), "offset": 0}
        return Answer.json(200, {"items": meters, "pagination": page})

    def _meter(self, call: Call) -> Answer:
        if refusal := self._stranger(call, bearer_too=True):
            return refusal
        for meter in self._memory.recall("meters", call.at_s) or []:
            if meter["id"] == call.query["id"]:
                return Answer.json(200, meter)
        return _error(404, "not_found", "no such meter")

    def _open(self, call: Call, *, bearer_too: bool = False) -> dict[str, Any] | Answer:
        if refusal := self._stranger(call, bearer_too=bearer_too):
            return refusal
        if len(call.body) > BODY_BYTES_MAX:
            return _error(400, "validation_error", "the body is larger than 32 MiB: split it")
        try:
            body = parse_json(call)
        except ValueError:
            return _error(400, "validation_error", "the body is no JSON")
        return body if isinstance(body, dict) else _error(400, "validation_error", "expected an object")

    def _stranger(self, call: Call, *, bearer_too: bool) -> Answer | None:
        """The key's header; a bearer token is a user's and passes only where the printed example has one."""
        if self._terms.admits(call.header("x-api-key")):
            return None
        if bearer_too and call.header("Authorization").startswith("Bearer ") and self._terms.key is None:
            return None
        return Answer.json(401, {"error": "Unauthorized"})


def _event_problems(event: Mapping[str, Any]) -> list[Problem]:
    found, known = problems(event, EVENT_FIELDS), event.get("properties")
    if isinstance(known, dict):
        found += [(f"properties.{name}", what) for name, what in problems(known, AMOUNTS)]
    return found


def _meter_problems(body: Mapping[str, Any]) -> list[Problem]:
    found = problems(body, METER_FIELDS)
    aggregation = body.get("aggregation")
    if isinstance(aggregation, dict):
        found += [(f"aggregation.{name}", what) for name, what in problems(aggregation, AGGREGATION_FIELDS)]
        found += _aggregation_problems(aggregation)
    filters = body.get("filters")
    for place, row in enumerate(filters if isinstance(filters, list) else ()):
        if not (isinstance(row, dict) and row.get("key") and row.get("values")):
            found.append((f"filters[{place}]", "needs a key and values"))
    return found


def _aggregation_problems(aggregation: Mapping[str, Any]) -> list[Problem]:
    """The rules that bind several fields together."""
    kind = aggregation.get("type")
    field, expression = aggregation.get("field"), aggregation.get("expression")
    bucket = aggregation.get("bucket_size")
    rules = (
        (field and expression, "expression", "cannot stand beside field"),
        (kind != "COUNT" and not field and not expression, "field", f"is required for {kind}"),
        (expression and kind not in ("SUM", "AVG", "MAX", "LATEST"), "expression", f"is not for {kind}"),
        (kind == "SUM_WITH_MULTIPLIER" and not aggregation.get("multiplier"), "multiplier", f"is required for {kind}"),
        (bucket and kind not in ("MAX", "SUM"), "bucket_size", f"is not for {kind}"),
        (aggregation.get("group_by") and not (kind == "MAX" and bucket), "group_by", "needs MAX and a bucket_size"),
    )
    return [(f"aggregation.{name}", what) for broken, name, what in rules if broken]


def _id_of(event: Any) -> str | None:
    value = event.get("event_id") if isinstance(event, dict) else None
    return value if isinstance(value, str) and value else None


def _invalid(found: list[Problem], *units: Unit) -> Answer:
    return _error(400, "validation_error", sentence(found), *units)


def _error(status: int, code: str, message: str, *units: Unit) -> Answer:
    reply = {"code": code, "message": message, "http_status_code": status, "details": None}
    return Answer(status, orjson.dumps(reply), units=units)
