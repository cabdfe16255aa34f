"""Stripe v1: form-encoded meter events, adjustments and meters.

Two layers of de-duplication. `Idempotency-Key` replays the stored answer, a 500 included, and refuses other
parameters. `identifier` is refused with 400 and a message, but no code of its own, once it is known; integrators read
that as "delivered". Of one customer and event name only one call may run at a time.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, Final
from urllib.parse import parse_qsl

import orjson

from sidecar.dev.mock_backends.checks import media_type
from sidecar.dev.mock_backends.contract import KEY, Answer, Call, Consumed, Memory, Route, Terms, Unit, Verdict
from sidecar.dev.mock_backends.replay import Replay
from sidecar.dev.mock_backends.vendors import stripe_events
from sidecar.dev.mock_backends.vendors.stripe_events import Book, MeterEvent, secret_key

FORM: Final = "application/x-www-form-urlencoded"
_PART: Final = re.compile(r"([^\[\]]+)((?:\[[^\[\]]*\])*)")

Form = dict[str, Any]
Problem = tuple[str | None, str, str | None]
"""Code, message, parameter."""


class StripeV1:
    """`/v1/billing/meter_events`, `…_adjustments` and `/v1/billing/meters`."""

    def __init__(self, memory: Memory, terms: Terms) -> None:
        self._book = Book(memory)
        self._replay = Replay(memory)
        self._terms = terms
        self.routes = (
            Route(
                method="POST",
                path="/v1/billing/meter_events",
                handle=self._keyed(self._event),
                exclusive=_customer_and_meter,
                busy=_busy,
                failed=self._failed,
            ),
            Route(
                method="POST",
                path="/v1/billing/meter_event_adjustments",
                handle=self._keyed(self._adjust),
                failed=self._failed,
            ),
            Route(method="POST", path="/v1/billing/meters", handle=self._keyed(self._define), failed=self._failed),
            Route(method="GET", path="/v1/billing/meters", handle=self._meters),
            Route(method="GET", path="/v1/billing/meters/{id}", handle=self._meter),
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
        if status == 429:
            return _error(429, (None, "Request rate limit exceeded.", None), kind="invalid_request_error").body
        return _error(status, (None, "An unknown error occurred.", None), kind="api_error").body

    def _keyed(self, handle: Callable[[Call, Form], Answer]) -> Callable[[Call], Answer]:
        """The general layer: credentials, form, and the stored answer of a known key."""

        def keyed(call: Call) -> Answer:
            credential = secret_key(call)
            if not self._terms.admits(credential):
                return _unauthorized(credential)
            key = call.header("Idempotency-Key")
            if key and (stored := self._replay.recall(call, credential, key)):
                if not stored.same:
                    problem = (
                        "Keys for idempotent requests can only be used with the same parameters as the first time."
                    )
                    return _error(400, (None, problem, None), kind="idempotency_error")
                unit = Unit(key, _form(call.body), Verdict.DUPLICATE)
                units = (unit,) if stored.answer.status < 500 else ()
                return Answer(
                    stored.answer.status, stored.answer.body, headers={"Idempotent-Replayed": "true"}, units=units
                )
            if call.body and media_type(call) != FORM:
                return _error(400, (None, f"Invalid request: the content type must be {FORM}.", None))
            form = _form(call.body)
            if form is None:
                return _error(400, (None, "Invalid request: the body is no form.", None))
            answer = handle(call, form)
            if key and any(unit.verdict is not Verdict.REFUSED for unit in answer.units):
                self._replay.keep(call, credential, key, answer)
            return answer

        return keyed

    def _failed(self, call: Call, answer: Answer) -> None:
        """A 500 is stored and replayed like any other answer; a 429 never ran."""
        key = call.header("Idempotency-Key")
        if key and answer.status >= 500:
            self._replay.keep(call, secret_key(call), key, answer)

    def _event(self, call: Call, form: Form) -> Answer:
        problem = _event_problem(form)
        if problem is not None:
            return _error(400, problem, Unit(form_text(form, "identifier"), form, Verdict.REFUSED))
        event = MeterEvent(
            event_name=form["event_name"],
            payload=form["payload"],
            identifier=stripe_events.identifier_for(call, form.get("identifier")),
            at_s=float(form.get("timestamp", int(call.at_s))),
        )
        if late := event.window_problem(call.at_s):
            return _error(400, (*late, "timestamp"), Unit(event.identifier, form, Verdict.REFUSED))
        if self._book.has(event.identifier, call.at_s):
            message = f"An event already exists with identifier {event.identifier}."
            return _error(400, (None, message, None), Unit(event.identifier, form, Verdict.DUPLICATE))
        verdict = self._book.enter(event, call.at_s)
        reply = {
            "object": "billing.meter_event",
            "created": int(call.at_s),
            "event_name": event.event_name,
            "identifier": event.identifier,
            "livemode": False,
            "payload": event.payload,
            "timestamp": int(event.at_s),
        }
        return Answer.json(200, reply, Unit(event.identifier, form, verdict))

    def _adjust(self, call: Call, form: Form) -> Answer:
        problem = _missing(form, "event_name", "type") or _unknown(form, "event_name", "type", "cancel", "expand")
        problem = problem or _no_text(form, "event_name", "type")
        cancel = form.get("cancel")
        identifier = cancel.get("identifier") if isinstance(cancel, dict) else None
        if problem is None and form["type"] != "cancel":
            problem = (None, "Invalid type: must be cancel", "type")
        if problem is None and not identifier:
            problem = ("parameter_missing", "Missing required param: cancel[identifier].", "cancel[identifier]")
        if problem is None and not self._book.cancels(str(identifier), form["event_name"], call.at_s):
            problem = ("resource_missing", f"No such meter event within the last 24 hours: '{identifier}'", "cancel")
        if problem is not None:
            return _error(400, problem, Unit(None, form, Verdict.REFUSED))
        reply = {
            "object": "billing.meter_event_adjustment",
            "cancel": {"identifier": identifier},
            "event_name": form["event_name"],
            "livemode": False,
            "status": "pending",
            "type": "cancel",
        }
        return Answer.json(200, reply, Unit(f"cancel:{identifier}", form, Verdict.DELIVERED))

    def _define(self, call: Call, form: Form) -> Answer:
        aggregation, customer, value = (
            _part(form, name) for name in ("default_aggregation", "customer_mapping", "value_settings")
        )
        meters = self._book.meters(call.at_s)
        problem = _missing(form, "display_name", "event_name", "default_aggregation")
        problem = problem or _no_text(form, "display_name", "event_name", "event_time_window")
        if problem is None and aggregation.get("formula") not in ("sum", "count", "last"):
            name = "default_aggregation[formula]"
            problem = (None, f"Invalid {name}: must be one of count, last, or sum", name)
        if problem is None and form.get("event_time_window") not in (None, "day", "hour"):
            problem = (None, "Invalid event_time_window: must be one of day or hour", "event_time_window")
        if problem is None and form["event_name"] in meters:
            problem = (None, f"An active meter with event name {form['event_name']} exists already.", "event_name")
        if problem is not None:
            return _error(400, problem, Unit(None, form, Verdict.REFUSED))
        meter = {
            "id": f"mtr_receiver_{len(meters) + 1}",
            "object": "billing.meter",
            "created": int(call.at_s),
            "customer_mapping": {"event_payload_key": "stripe_customer_id", "type": "by_id"} | customer,
            "default_aggregation": aggregation,
            "display_name": form["display_name"],
            "event_name": form["event_name"],
            "event_time_window": form.get("event_time_window"),
            "livemode": False,
            "status": "active",
            "status_transitions": {"deactivated_at": None},
            "updated": int(call.at_s),
            "value_settings": {"event_payload_key": "value"} | value,
        }
        self._book.define(meter, call.at_s)
        return Answer.json(200, meter, Unit(meter["id"], form, Verdict.DELIVERED))

    def _meters(self, call: Call) -> Answer:
        if not self._terms.admits(credential := secret_key(call)):
            return _unauthorized(credential)
        rows = list(self._book.meters(call.at_s).values())
        return Answer.json(200, {"object": "list", "data": rows, "has_more": False, "url": "/v1/billing/meters"})

    def _meter(self, call: Call) -> Answer:
        if not self._terms.admits(credential := secret_key(call)):
            return _unauthorized(credential)
        for meter in self._book.meters(call.at_s).values():
            if meter["id"] == call.query["id"]:
                return Answer.json(200, meter)
        return _error(404, ("resource_missing", f"No such billing meter: '{call.query['id']}'", "id"))


def form_text(form: Form, name: str) -> str | None:
    value = form.get(name)
    return value if isinstance(value, str) else None


def _part(form: Form, name: str) -> Form:
    """A nested part, or an empty one."""
    value = form.get(name)
    return value if isinstance(value, dict) else {}


def _form(body: bytes) -> Form | None:
    """`a=1&b[c]=2` as `{"a": "1", "b": {"c": "2"}}`; None when it is no form."""
    form: Form = {}
    try:
        pairs = parse_qsl(body.decode("ascii"), keep_blank_values=True, strict_parsing=bool(body), errors="strict")
    except ValueError:
        return None
    for name, value in pairs:
        match = _PART.fullmatch(name)
        if match is None:
            return None
        path = [match[1], *re.findall(r"\[([^\[\]]*)\]", match[2])]
        place = form
        for part in path[:-1]:
            place = place.setdefault(part, {})
            if not isinstance(place, dict):
                return None
        place[path[-1]] = value
    return form


def _event_problem(form: Form) -> Problem | None:
    problem = _missing(form, "event_name", "payload")
    problem = problem or _unknown(form, "event_name", "payload", "identifier", "timestamp", "expand")
    problem = problem or _no_text(form, "event_name", "identifier", "timestamp")
    if problem is not None:
        return problem
    for name, most in (
        ("event_name", stripe_events.NAME_CHARS_MAX),
        ("identifier", stripe_events.IDENTIFIER_CHARS_MAX),
    ):
        if len(form.get(name, "")) > most:
            return None, f"Invalid string: {name} must be at most {most} characters", name
    if not isinstance(form["payload"], dict) or not all(isinstance(v, str) for v in form["payload"].values()):
        return "parameter_invalid", "Invalid hash: payload must map text to text", "payload"
    timestamp = form.get("timestamp", "0")
    if not re.fullmatch(r"-?\d{1,12}", timestamp):
        return "parameter_invalid_integer", f"Invalid integer: {timestamp}", "timestamp"
    return None


def _missing(form: Form, *names: str) -> Problem | None:
    for name in names:
        if not form.get(name):
            return "parameter_missing", f"Missing required param: {name}.", name
    return None


def _no_text(form: Form, *names: str) -> Problem | None:
    for name in names:
        if not isinstance(form.get(name, ""), str):
            return "parameter_invalid_string", f"Invalid string: {name}", name
    return None


def _unknown(form: Form, *names: str) -> Problem | None:
    for name in form:
        if name not in names:
            return "parameter_unknown", f"Received unknown parameter: {name}", name
    return None


def _customer_and_meter(call: Call) -> str | None:
    form = _form(call.body)
    payload = form.get("payload") if form else None
    if not form or not isinstance(payload, Mapping):
        return None
    return f"{payload.get('stripe_customer_id')}\0{form.get('event_name')}"


def _busy(call: Call) -> Answer:
    message = "This object cannot be accessed right now because another request is processing it."
    form = _form(call.body) or {}
    unit = Unit(form_text(form, "identifier"), form, Verdict.RETRY)
    return _error(429, ("lock_timeout", message, None), unit)


def _unauthorized(credential: str) -> Answer:
    message = "Invalid API Key provided." if credential else "You did not provide an API key."
    return _error(401, (None, message, None))


def _error(status: int, problem: Problem, *units: Unit, kind: str = "invalid_request_error") -> Answer:
    code, message, param = problem
    reply = {"type": kind, "message": message, "code": code, "param": param}
    body = {"error": {name: value for name, value in reply.items() if value is not None}}
    return Answer(status, orjson.dumps(body), units=units)
