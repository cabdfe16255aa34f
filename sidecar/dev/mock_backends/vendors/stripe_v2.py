"""Stripe v2: single meter events in JSON, and the stream of up to 100 under a session of fifteen minutes.

Every call names its `Stripe-Version`. Identifiers are shared with v1. A single duplicate is refused with
`duplicate_meter_event`; the stream's answer has no room for one, so it takes the batch and counts nothing twice.
The stream lives on a host of its own at the vendor, and on the same port here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, Final

import orjson

from sidecar.dev.mock_backends.checks import Field, is_json, moment, parse_json, parse_time, problems, rfc3339, text
from sidecar.dev.mock_backends.contract import KEY, Answer, Call, Consumed, Memory, Route, Terms, Unit, Verdict, bearer
from sidecar.dev.mock_backends.vendors import stripe_events
from sidecar.dev.mock_backends.vendors.stripe_events import Book, MeterEvent, secret_key

SESSION_S: Final = 900.0
BATCH_MAX: Final = 100

FIELDS: Final[Mapping[str, Field]] = {
    "event_name": text(required=True, empty=False, max_chars=stripe_events.NAME_CHARS_MAX),
    "identifier": text(empty=False, max_chars=stripe_events.IDENTIFIER_CHARS_MAX),
    "payload": Field(
        lambda value: isinstance(value, dict) and all(isinstance(v, str) for v in value.values()),
        "must map strings to strings, also for numbers",
        required=True,
    ),
    "timestamp": moment(),
}


class StripeV2:
    """`/v2/billing/…`."""

    def __init__(self, memory: Memory, terms: Terms) -> None:
        self._book = Book(memory)
        self._memory = memory
        self._terms = terms
        self.routes = (
            Route(method="POST", path="/v2/billing/meter_events", handle=self._single),
            Route(method="POST", path="/v2/billing/meter_event_adjustments", handle=self._adjust),
            Route(method="POST", path="/v2/billing/meter_event_session", handle=self._session),
            Route(method="POST", path="/v2/billing/meter_event_stream", handle=self._stream),
        )

    @staticmethod
    def settings(url: str) -> Mapping[str, str]:
        return {"url": url, "stream_url": url, "api_key": KEY}

    @staticmethod
    def consumed(path: str, body: Mapping[str, Any]) -> Consumed | None:
        if "identifier" not in body:
            return None
        return Consumed(body["payload"]["stripe_customer_id"], {body["event_name"]: body["payload"]["value"]})

    def fault_body(self, status: int) -> bytes:
        return _error(status, "rate_limit" if status == 429 else "api_error", "told to").body

    def _session(self, call: Call) -> Answer:
        if refusal := self._stranger(call):
            return refusal
        if call.body and _object(call) != {}:
            return _error(400, "parameter_unknown", "a session takes no parameters")
        number = (self._memory.recall("sessions", call.at_s) or 0) + 1
        token = f"token_receiver_{number}_{hashlib.sha256(secret_key(call).encode()).hexdigest()[:12]}"
        self._memory.keep("sessions", number, call.at_s)
        self._memory.keep(f"session:{_digest(token)}", True, call.at_s)
        reply = {
            "id": f"mes_receiver_{number}",
            "object": "v2.billing.meter_event_session",
            "authentication_token": token,
            "created": rfc3339(call.at_s),
            "expires_at": rfc3339(call.at_s + SESSION_S),
            "livemode": False,
        }
        return Answer.json(200, reply)

    def _single(self, call: Call) -> Answer:
        if refusal := self._stranger(call):
            return refusal
        body = _object(call)
        if body is None:
            return _error(400, "parameter_invalid", "the body is no JSON object")
        event, refused = self._read(call, body)
        if event is None:
            return refused
        if self._book.has(event.identifier, call.at_s):
            message = "A meter event with a duplicate identifier has already been submitted."
            return _error(400, "duplicate_meter_event", message, Unit(event.identifier, body, Verdict.DUPLICATE))
        reply = {
            "object": "v2.billing.meter_event",
            "created": rfc3339(call.at_s),
            "event_name": event.event_name,
            "identifier": event.identifier,
            "livemode": False,
            "payload": event.payload,
            "timestamp": rfc3339(event.at_s),
        }
        return Answer.json(200, reply, Unit(event.identifier, body, self._book.enter(event, call.at_s)))

    def _stream(self, call: Call) -> Answer:
        token = bearer(call)
        if not call.header("Stripe-Version"):
            return _error(400, "missing_version", "the Stripe-Version header is required")
        if not token or self._memory.recall(f"session:{_digest(token)}", call.at_s, SESSION_S) is None:
            message = "The temporary session token has expired: create a new one."
            return _error(401, "billing_meter_event_session_expired", message, kind="temporary_session_expired")
        body = _object(call)
        rows = body.get("events") if body is not None else None
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            return _error(400, "parameter_invalid", "events must be an array of objects")
        if not 1 <= len(rows) <= BATCH_MAX:
            return _error(400, "parameter_invalid", f"events must have 1 to {BATCH_MAX} items, not {len(rows)}")
        events = []
        for place, row in enumerate(rows):
            event, refused = self._read(call, row, place)
            if event is None:
                return refused
            events.append(event)
        units = []
        for event, row in zip(events, rows, strict=True):
            known = self._book.has(event.identifier, call.at_s)
            verdict = Verdict.DUPLICATE if known else self._book.enter(event, call.at_s)
            units.append(Unit(event.identifier, row, verdict))
        return Answer.json(200, {}, *units)

    def _adjust(self, call: Call) -> Answer:
        if refusal := self._stranger(call):
            return refusal
        body = _object(call) or {}
        cancel = body.get("cancel")
        identifier = cancel.get("identifier") if isinstance(cancel, dict) else None
        name = body.get("event_name")
        if body.get("type") != "cancel" or not isinstance(identifier, str) or not isinstance(name, str):
            return _error(400, "parameter_invalid", "event_name, type=cancel and cancel.identifier are required")
        if not self._book.cancels(identifier, name, call.at_s):
            return _error(404, "not_found", "no such meter event within the last 24 hours")
        reply = {
            "id": f"mea_receiver_{identifier}",
            "object": "v2.billing.meter_event_adjustment",
            "cancel": {"identifier": identifier},
            "created": rfc3339(call.at_s),
            "event_name": name,
            "livemode": False,
            "status": "pending",
            "type": "cancel",
        }
        return Answer.json(200, reply, Unit(f"cancel:{identifier}", body, Verdict.DELIVERED))

    def _read(self, call: Call, row: dict[str, Any], place: int | None = None) -> tuple[MeterEvent | None, Answer]:
        """The event, or the refusal of the whole call."""
        where = "" if place is None else f"events[{place}]."
        given = row.get("identifier")
        unit = Unit(given if isinstance(given, str) else None, row, Verdict.REFUSED)
        if found := problems(row, FIELDS, strict=True):
            name, what = found[0]
            return None, _error(400, "parameter_invalid", f"{where}{name} {what}", unit)
        at_s = parse_time(row.get("timestamp"))
        event = MeterEvent(
            event_name=row["event_name"],
            payload=row["payload"],
            identifier=given or f"{stripe_events.identifier_for(call, None)}_{place or 0}",
            at_s=call.at_s if at_s is None else at_s,
        )
        if late := event.window_problem(call.at_s):
            return None, _error(400, late[0], f"{where}timestamp: {late[1]}", unit)
        return event, Answer(200)

    def _stranger(self, call: Call) -> Answer | None:
        if not self._terms.admits(secret_key(call)):
            return _error(401, "unauthorized", "You did not provide a valid API key.")
        if not call.header("Stripe-Version"):
            return _error(400, "missing_version", "the Stripe-Version header is required")
        return None


def _object(call: Call) -> dict[str, Any] | None:
    if not is_json(call):
        return None
    try:
        body = parse_json(call)
    except ValueError:
        return None
    return body if isinstance(body, dict) else None


def _digest(token: str) -> str:
    """Tokens are credentials: the store has only this."""
    return hashlib.sha256(token.encode()).hexdigest()


def _error(status: int, code: str, message: str, *units: Unit, kind: str | None = None) -> Answer:
    """`type` stands only where the vendor's clients tell errors apart by it."""
    reply = {"code": code, "message": message} | ({} if kind is None else {"type": kind})
    return Answer(status, orjson.dumps({"error": reply}), units=units)
