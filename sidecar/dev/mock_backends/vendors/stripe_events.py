"""What Stripe's two interfaces share: one meter event, its limits, its identifier's day, and what is billed of it.

A refusal that comes at once is a problem; what Stripe only reports hours later (no such meter, no customer, no
number) is taken with a 200 and listed as `dropped`. Without any meter defined at the receiver every event name counts
as one with the default keys.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any, Final

from sidecar.dev.mock_backends.contract import Call, Memory, Verdict, bearer
from sidecar.dev.mock_backends.replay import DAY_S

NAME_CHARS_MAX: Final = 100
IDENTIFIER_CHARS_MAX: Final = 100
PAST_S_MAX: Final = 35 * DAY_S
FUTURE_S_MAX: Final = 300.0
DIGITS_MAX: Final = 15  # of a value; the vendor's own number is not documented
METERS: Final = "meters"  # the memory's name for what was defined


@dataclass(frozen=True, slots=True, kw_only=True)
class MeterEvent:
    """One event, from either interface."""

    event_name: str
    payload: Mapping[str, str]
    identifier: str
    at_s: float

    def window_problem(self, now_s: float) -> tuple[str, str] | None:
        """Code and message where the time is out of the window."""
        if self.at_s < now_s - PAST_S_MAX:
            return "timestamp_too_far_in_past", "The timestamp must be within the past 35 calendar days."
        if self.at_s > now_s + FUTURE_S_MAX:
            return "timestamp_in_future", "The timestamp must be at most 5 minutes in the future."
        return None


class Book:
    """Which identifiers were seen, and which meters there are."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory

    def meters(self, now_s: float) -> dict[str, dict[str, Any]]:
        """Meter objects by event name."""
        found: dict[str, dict[str, Any]] = self._memory.recall(METERS, now_s) or {}
        return dict(found)

    def define(self, meter: dict[str, Any], now_s: float) -> None:
        self._memory.keep(METERS, self.meters(now_s) | {meter["event_name"]: meter}, now_s)

    def has(self, identifier: str, now_s: float) -> bool:
        return self._memory.recall(f"identifier:{identifier}", now_s, DAY_S) is not None

    def enter(self, event: MeterEvent, now_s: float) -> Verdict:
        """Take a new event; whether it would be billed."""
        self._memory.keep(f"identifier:{event.identifier}", event.event_name, now_s)
        return Verdict.DELIVERED if self._is_billed(event, now_s) else Verdict.DROPPED

    def cancels(self, identifier: str, event_name: str, now_s: float) -> bool:
        """Whether there is such an event young enough to be cancelled."""
        found: str | None = self._memory.recall(f"identifier:{identifier}", now_s, DAY_S)
        return found == event_name

    def _is_billed(self, event: MeterEvent, now_s: float) -> bool:
        meters = self.meters(now_s)
        meter = meters.get(event.event_name, {})
        if meters and not meter:
            return False
        customer_key = meter.get("customer_mapping", {}).get("event_payload_key", "stripe_customer_id")
        if not event.payload.get(customer_key):
            return False
        if meter.get("default_aggregation", {}).get("formula") == "count":
            return True
        value_key = meter.get("value_settings", {}).get("event_payload_key", "value")
        text = event.payload.get(value_key, "")
        try:
            # More digits are reported as `meter_event_value_too_many_digits`, hours later.
            return Decimal(text).is_finite() and sum(map(str.isdigit, text)) <= DIGITS_MAX
        except InvalidOperation:
            return False


def secret_key(call: Call) -> str:
    """The account's key: the user of a basic authorization, or a bearer token; nothing where there is none."""
    scheme, _, rest = call.header("Authorization").partition(" ")
    if scheme.lower() != "basic":
        return bearer(call)
    try:
        return base64.b64decode(rest.strip(), validate=True).decode().partition(":")[0]
    except (binascii.Error, UnicodeDecodeError):
        return ""


def identifier_for(call: Call, given: str | None) -> str:
    """The event's own, or one made up: new for each call, as the vendor's."""
    return given or f"receiver_{call.fingerprint()[:20]}_{call.at_s:.6f}"
