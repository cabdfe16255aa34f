"""Lago with its events in PostgreSQL: `transaction_id` is unique for ever within a subscription.

A duplicate is refused with 422 `value_already_exist`. A batch is taken whole or not at all, and its answer names what
is wrong by the event's index, duplicates among the rest. An unknown `code` is taken and ignored, silently.

The customer of a subscription `sub_<name>` is `<name>`, and its wallet holds what the name says (`asked`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

import orjson

from sidecar.dev.mock_backends.asked import consume, dollars_left, is_unknown
from sidecar.dev.mock_backends.checks import is_integer, is_json, is_number, parse_json, rfc3339
from sidecar.dev.mock_backends.contract import KEY, Answer, Call, Consumed, Memory, Route, Terms, Unit, Verdict, bearer

BATCH_MAX: Final = 100
_TIMESTAMP: Final = re.compile(r"\d{1,12}(\.\d{1,9})?")
_AMOUNT: Final = re.compile(r"-?\d{1,25}(\.\d{1,15})?")

Errors = dict[str, list[str]]


class Lago:
    """`/api/v1/events` and `/api/v1/events/batch`, and what a customer's wallet has left."""

    def __init__(self, memory: Memory, terms: Terms) -> None:
        self._memory = memory
        self._terms = terms
        self.routes = (
            Route(method="POST", path="/api/v1/events", handle=self._single, when=_is_lagos),
            Route(method="POST", path="/api/v1/events/batch", handle=self._batch),
            Route(method="GET", path="/api/v1/wallets", handle=self._wallets, lies=self._wallets),
            Route(method="GET", path="/api/v1/subscriptions/{subscription}", handle=self._subscription),
        )

    @staticmethod
    def settings(url: str) -> Mapping[str, str]:
        return {"url": url, "api_key": KEY}

    @staticmethod
    def consumed(path: str, body: Mapping[str, Any]) -> Consumed | None:
        if "external_subscription_id" not in body:
            return None
        return Consumed(body["external_subscription_id"], {body["code"]: body["properties"]["value"]})

    def fault_body(self, status: int) -> bytes:
        return orjson.dumps({"status": status, "error": "Too Many Requests" if status == 429 else "Internal Error"})

    def _single(self, call: Call) -> Answer:
        body = self._open(call)
        if isinstance(body, Answer):
            return body
        event = body.get("event")
        if not isinstance(event, dict):
            return _error(400, "Bad Request", None)
        errors, is_known = self._look(call, event, set())
        if errors:
            verdict = Verdict.DUPLICATE if is_known and len(errors) == 1 else Verdict.REFUSED
            return _unprocessable(errors, Unit(_key_of(event), event, verdict))
        return Answer.json(200, {"event": self._enter(call, event)}, Unit(_key_of(event), event, Verdict.DELIVERED))

    def _batch(self, call: Call) -> Answer:
        body = self._open(call)
        if isinstance(body, Answer):
            return body
        events = body.get("events")
        if not isinstance(events, list) or not events:
            return _unprocessable({"events": ["no_events"]})
        if len(events) > BATCH_MAX:
            return _unprocessable({"events": ["too_many_events"]})
        details: dict[str, Errors] = {}
        units: list[Unit] = []
        within: set[tuple[str, str]] = set()
        for place, event in enumerate(events):
            if not isinstance(event, dict):
                return _error(400, "Bad Request", None)
            errors, is_known = self._look(call, event, within)
            if errors:
                details[str(place)] = errors
            units.append(Unit(_key_of(event), event, Verdict.DUPLICATE if is_known else Verdict.REFUSED))
        if details:
            return _unprocessable(details, *units)
        taken = [self._enter(call, event) for event in events]
        delivered = (Unit(unit.key, unit.body, Verdict.DELIVERED) for unit in units)
        return Answer.json(200, {"events": taken}, *delivered)

    def _look(self, call: Call, event: Mapping[str, Any], within: set[tuple[str, str]]) -> tuple[Errors, bool]:
        """What is wrong with an event, and whether it is here already; notes it for the rest of its batch."""
        errors: Errors = {}
        for name in ("transaction_id", "external_subscription_id", "code"):
            if not isinstance(event.get(name), str) or not event[name]:
                errors[name] = ["value_is_mandatory"]
        timestamp = event.get("timestamp")
        if timestamp is not None and not _is_timestamp(timestamp):
            errors["timestamp"] = ["invalid_format"]
        properties = event.get("properties", {})
        if not isinstance(properties, dict) or not all(isinstance(v, str | int | float) for v in properties.values()):
            errors["properties"] = ["invalid_format"]
        amount = event.get("precise_total_amount_cents")
        if amount is not None and not _is_amount(amount):
            errors["precise_total_amount_cents"] = ["invalid_format"]
        identity = (str(event.get("external_subscription_id")), str(event.get("transaction_id")))
        is_known = self._memory.recall("\0".join(identity), call.at_s) is not None
        if is_known or identity in within:
            errors.setdefault("transaction_id", ["value_already_exist"])
        within.add(identity)
        return errors, is_known

    def _enter(self, call: Call, event: Mapping[str, Any]) -> dict[str, Any]:
        """Keep it, and give it back as the vendor shows it."""
        self._memory.keep(f"{event['external_subscription_id']}\0{event['transaction_id']}", True, call.at_s)
        consume(self._memory, _owner(event["external_subscription_id"]), {"events": 1}, call.at_s)
        at_s = float(event["timestamp"]) if event.get("timestamp") is not None else call.at_s
        return {
            "lago_id": f"receiver-{call.fingerprint()[:12]}",
            "transaction_id": event["transaction_id"],
            "lago_customer_id": None,
            "code": event["code"],
            "timestamp": rfc3339(at_s),
            "precise_total_amount_cents": event.get("precise_total_amount_cents"),
            "properties": event.get("properties", {}),
            "lago_subscription_id": None,
            "external_subscription_id": event["external_subscription_id"],
            "created_at": rfc3339(call.at_s),
        }

    def _wallets(self, call: Call, lie: str | None = None) -> Answer:
        if not self._terms.admits(bearer(call)):
            return _error(401, "Unauthorized", None)
        customer = call.query.get("external_customer_id", "")
        if is_unknown(customer):
            return _error(404, "Not Found", "customer_not_found")
        left = dollars_left(self._memory, customer, call.at_s)
        cents: Any = "a lot" if lie is not None else int(left * 100)
        wallet = {
            "lago_id": "receiver",
            "lago_customer_id": "receiver",
            "external_customer_id": customer,
            "status": "active",
            "currency": "USD",
            "rate_amount": "1.0",
            "balance_cents": int(left * 100),
            "ongoing_balance_cents": cents,
            "credits_ongoing_balance": str(left),
            "expiration_at": None,
            "last_balance_sync_at": None,
        }
        pages = {"current_page": 1, "next_page": None, "prev_page": None, "total_pages": 1, "total_count": 1}
        return Answer.json(200, {"wallets": [wallet], "meta": pages})

    def _subscription(self, call: Call) -> Answer:
        if not self._terms.admits(bearer(call)):
            return _error(401, "Unauthorized", None)
        subscription = call.query["subscription"]
        if is_unknown(subscription):
            return _error(404, "Not Found", "subscription_not_found")
        row = {"external_id": subscription, "external_customer_id": _owner(subscription), "status": "active"}
        return Answer.json(200, {"subscription": row})

    def _open(self, call: Call) -> dict[str, Any] | Answer:
        if not self._terms.admits(bearer(call)):
            return _error(401, "Unauthorized", None)
        if not is_json(call):
            return _error(400, "Bad Request", None)
        try:
            body = parse_json(call)
        except ValueError:
            return _error(400, "Bad Request", None)
        return body if isinstance(body, dict) else _error(400, "Bad Request", None)


def _owner(subscription: str) -> str:
    """Whose a subscription is: nobody can say so here, so it is in its name."""
    return subscription.removeprefix("sub_")


def _is_lagos(call: Call) -> bool:
    """The path is OpenMeter's too; only Lago wraps a single event into `event`."""
    if not is_json(call):
        return False
    try:
        body = parse_json(call)
    except ValueError:
        return False
    return isinstance(body, dict) and "event" in body


def _is_timestamp(value: Any) -> bool:
    """Unix seconds as a number or as text; decimals are milliseconds."""
    if isinstance(value, str):
        return bool(_TIMESTAMP.fullmatch(value))
    return (is_integer(value) or is_number(value)) and 0 <= value < 10**12


def _is_amount(value: Any) -> bool:
    """Cents as text, as far as the column keeps them: numeric(40, 15)."""
    return isinstance(value, str) and bool(_AMOUNT.fullmatch(value))


def _key_of(event: Mapping[str, Any]) -> str | None:
    value = event.get("transaction_id")
    return value if isinstance(value, str) else None


def _unprocessable(details: Mapping[str, Any], *units: Unit) -> Answer:
    body = {
        "status": 422,
        "error": "Unprocessable Entity",
        "code": "validation_errors",
        "error_details": details,
    }
    return Answer(422, orjson.dumps(body), units=units)


def _error(status: int, error: str, code: str | None) -> Answer:
    return Answer.json(status, {"status": status, "error": error} | ({"code": code} if code else {}))
