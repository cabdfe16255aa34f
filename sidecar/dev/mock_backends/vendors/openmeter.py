"""OpenMeter: CloudEvents at `/api/v1/events` (204) and at the v3 path (202).

v1 compares the whole content type, so a `; charset=utf-8` is refused there; v3 reads it properly. An event is known by
`source` and `id` for 32 days, which is the example configuration: the open-source build de-duplicates nothing unless
told to. Duplicates get the normal answer. What the vendor's sink would silently drop (a missing attribute) is refused
here at once: a stand-in that swallows it would hide the mistake.

The gate may ask for a customer's access to two features, `api_calls` and `total_tokens`: one whose id ends in
`-quota-<n>` may use n of each, and has what was not covered as overage; any other has access without a balance.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import orjson

from sidecar.dev.mock_backends.asked import allowed, consume, consumed, is_unknown
from sidecar.dev.mock_backends.checks import (
    Field,
    Problem,
    decimal_text,
    mapping,
    media_type,
    moment,
    one_of,
    parse_json,
    problems,
    sentence,
    text,
)
from sidecar.dev.mock_backends.contract import Answer, Call, Consumed, Memory, Route, Terms, Unit, Verdict, bearer

V1: Final = "/api/v1/events"
V3: Final = ("/openmeter/events", "/v3/openmeter/events", "/api/v3/openmeter/events")
WINDOW_S: Final = 768 * 3600.0
ACCESS: Final = "/api/v1/customers/{customer}/access"
VALUE: Final = "/api/v2/customers/{customer}/entitlements/{feature}/value"
FEATURES: Final = ("api_calls", "total_tokens")

ONE: Final = "application/cloudevents+json"
MANY: Final = "application/cloudevents-batch+json"
EITHER: Final = "application/json"

FIELDS: Final[Mapping[str, Field]] = {
    "id": text(required=True, empty=False),
    "source": text(required=True, empty=False),
    "specversion": one_of("1.0", required=True),
    "type": text(required=True, empty=False),
    "subject": text(required=True, empty=False),
    "time": moment(),
    "datacontenttype": one_of("application/json"),
    "dataschema": text(),
    "data": mapping(),
}
# Properties whose sums are money: read from text as exact decimals. A float would be taken too, with what it lost.
AMOUNTS: Final[Mapping[str, Field]] = {name: decimal_text() for name in ("cost_usd", "charge")}


class OpenMeter:
    """The two event paths, and what a customer has access to."""

    def __init__(self, memory: Memory, terms: Terms) -> None:
        self._memory = memory
        self._terms = terms
        self.routes = (
            Route(method="POST", path=V1, handle=self._v1),
            *(Route(method="POST", path=path, handle=self._v3) for path in V3),
            Route(method="GET", path=ACCESS, handle=self._access, lies=self._access),
            Route(method="GET", path=VALUE, handle=self._value, lies=self._value),
        )

    @staticmethod
    def settings(url: str) -> Mapping[str, str]:
        return {"url": url}

    @staticmethod
    def consumed(path: str, body: Mapping[str, Any]) -> Consumed | None:
        return Consumed(body["subject"], {"api_calls": 1, **body["data"]}) if "specversion" in body else None

    def fault_body(self, status: int) -> bytes:
        return _problem(status, "told to").body

    def _v1(self, call: Call) -> Answer:
        return self._take(call, call.header("Content-Type"), 204)

    def _v3(self, call: Call) -> Answer:
        return self._take(call, media_type(call), 202)

    def _take(self, call: Call, kind: str, success: int) -> Answer:
        if self._terms.key is not None and not self._terms.admits(bearer(call)):
            return _problem(401, "the token is missing or wrong")
        if kind not in (ONE, MANY, EITHER):
            return _problem(400, "invalid content type")
        try:
            body = parse_json(call)
        except ValueError:
            return _problem(400, "the body is no JSON")
        events = _events(body, kind)
        if events is None:
            return _problem(400, f"the body does not fit {kind}")
        for place, event in enumerate(events):
            if found := _problems(event):
                units = (Unit(_key_of(row), row, Verdict.REFUSED) for row in events)
                return _problem(400, f"event {place}: {sentence(found)}", *units)
        return Answer(success, units=tuple(self._enter(call, event) for event in events))

    def _enter(self, call: Call, event: dict[str, Any]) -> Unit:
        name = f"{event['source']}\0{event['id']}"
        if self._memory.recall(name, call.at_s, WINDOW_S):
            return Unit(event["id"], event, Verdict.DUPLICATE)
        self._memory.keep(name, True, call.at_s)
        tokens = (event.get("data") or {}).get("total_tokens")
        used = {"api_calls": 1, "total_tokens": tokens if isinstance(tokens, int) else 0}
        consume(self._memory, event["subject"], used, call.at_s)
        return Unit(event["id"], event, Verdict.DELIVERED)

    def _access(self, call: Call, lie: str | None = None) -> Answer:
        if refusal := self._no_customer(call):
            return refusal
        return Answer.json(200, {"entitlements": {name: self._entitlement(call, name, lie) for name in FEATURES}})

    def _value(self, call: Call, lie: str | None = None) -> Answer:
        if refusal := self._no_customer(call):
            return refusal
        if call.query["feature"] not in FEATURES:
            return _problem(404, "no such entitlement")
        return Answer.json(200, self._entitlement(call, call.query["feature"], lie))

    def _no_customer(self, call: Call) -> Answer | None:
        if self._terms.key is not None and not self._terms.admits(bearer(call)):
            return _problem(401, "the token is missing or wrong")
        return _problem(404, "no such customer") if is_unknown(call.query["customer"]) else None

    def _entitlement(self, call: Call, feature: str, lie: str | None) -> dict[str, Any]:
        customer = call.query["customer"]
        quota = allowed(customer, "quota")
        if lie is not None:
            return {"hasAccess": True, "balance": -5, "usage": 5, "overage": 0}
        if quota is None:
            return {"hasAccess": True}
        used = consumed(self._memory, customer, feature, call.at_s)
        return {
            "hasAccess": used < quota,
            "balance": max(quota - used, 0),
            "usage": used,
            "overage": max(used - quota, 0),
        }


def _events(body: Any, kind: str) -> list[dict[str, Any]] | None:
    """The events of a body whose form its content type allows."""
    if isinstance(body, dict):
        return None if kind == MANY else [body]
    if isinstance(body, list) and body and kind != ONE and all(isinstance(event, dict) for event in body):
        return body
    return None


def _problems(event: dict[str, Any]) -> list[Problem]:
    found, data = problems(event, FIELDS), event.get("data")
    if isinstance(data, dict):
        found += [(f"data.{name}", what) for name, what in problems(data, AMOUNTS)]
    return found


def _key_of(event: dict[str, Any]) -> str | None:
    value = event.get("id")
    return value if isinstance(value, str) else None


def _problem(status: int, detail: str, *units: Unit) -> Answer:
    title = {400: "Bad Request", 401: "Unauthorized", 404: "Not Found", 429: "Too Many Requests"}.get(
        status, "Internal Server Error"
    )
    reply = {"type": "about:blank", "title": title, "status": status, "detail": detail}
    return Answer(status, orjson.dumps(reply), "application/problem+json", units=units)
