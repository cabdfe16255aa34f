"""Stripe's billing meters, seen from ours: compared before anything is sent, and created on request.

A meter there is for ever but for its name, so one that differs is reported and never touched. One with an
`event_time_window` keeps only the newest event of each window: increments would overwrite each other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlencode

from sidecar.backends.base import Provision
from sidecar.backends.http import Answer, HttpClient
from sidecar.meters.definition import Kind, Meter

METERS: Final = "/v1/billing/meters"
FORM: Final = "application/x-www-form-urlencoded"
FORMULAS: Final = {Kind.COUNT: "count", Kind.SUM: "sum", Kind.LATEST: "last"}


@dataclass(frozen=True, slots=True)
class Payload:
    """How the events' payload is written: the meters at Stripe must agree."""

    customer_key: str
    value_key: str
    decimals: bool  # also values that are no whole numbers


class StripeMeters:
    """Lists, compares and creates."""

    def __init__(self, client: HttpClient, address: str, auth: Mapping[str, str], payload: Payload) -> None:
        self._client = client
        self._url = address + METERS
        self._auth = dict(auth)
        self._payload = payload

    async def compare(self, meters: Sequence[Meter]) -> list[str]:
        """What is wrong with the meters at Stripe, each with what to do."""
        there = await self._there()
        if isinstance(there, str):
            return [there]
        return [problem for meter in meters for problem in self._differences(meter, there)]

    async def provide(self, meter: Meter) -> Provision:
        """Create the meter, unless one has its event name; says what was done."""
        if meter.kind not in FORMULAS:
            has = ", ".join(FORMULAS)
            return Provision(False, f"stripe has no {meter.kind}: {meter.name} is left out; it has {has}")
        there = await self._there()
        if isinstance(there, str):
            return Provision(False, there)
        name = meter.event_name or meter.name
        if name in there:
            different = self._differences(meter, there)
            if different:
                return Provision(False, "; ".join([*different, "it is left as it is"]))
            return Provision(True, f"stripe has the meter {name}, and it fits")
        fields = {
            "display_name": meter.name,
            "event_name": name,
            "default_aggregation[formula]": FORMULAS[meter.kind],
            "customer_mapping[type]": "by_id",
            "customer_mapping[event_payload_key]": self._payload.customer_key,
            "value_settings[event_payload_key]": self._payload.value_key,
        }
        headers = {**self._auth, "content-type": FORM}
        answer = await self._client.request("POST", self._url, urlencode(fields).encode(), headers)
        said = answer.json() if isinstance(answer, Answer) and answer.ok else None
        if isinstance(said, dict) and said.get("event_name") == name:
            return Provision(True, f"stripe: created the meter {name}")
        why = (answer.code("error", "code") or f"http_{answer.status}") if isinstance(answer, Answer) else answer.reason
        return Provision(False, f"stripe did not create the meter {name} ({why})")

    async def _there(self) -> dict[str, Mapping[str, Any]] | str:
        """Active meters by event name, or what is wrong."""
        found: dict[str, Mapping[str, Any]] = {}
        after = ""
        while True:
            answer = await self._client.request("GET", f"{self._url}?limit=100&status=active{after}", None, self._auth)
            if not isinstance(answer, Answer):
                return f"stripe does not answer ({answer.reason})"
            said = answer.json()
            if not answer.ok or not isinstance(said, dict) or not isinstance(said.get("data"), list):
                return f"stripe does not list its meters (http_{answer.status}): check the key and what it may do"
            rows = [row for row in said["data"] if isinstance(row, dict)]
            new = {str(row.get("event_name")): row for row in rows}
            if not said.get("has_more") or not new.keys() - found.keys():
                return found | new
            found |= new
            after = f"&starting_after={rows[-1].get('id')}"

    def _differences(self, meter: Meter, there: Mapping[str, Mapping[str, Any]]) -> list[str]:
        name = meter.event_name or meter.name
        row = there.get(name)
        if row is None:
            mend = "run `metering-sidecar meters provision --backend stripe`"
            return [f"stripe has no active meter for the event name {name}: {mend}"]
        problems = []
        window = row.get("event_time_window")
        if window:
            problems.append(
                f"stripe's meter {name} keeps only the last event of each {window}, so counts would overwrite each "
                "other: make one without event_time_window"
            )
        formula = _inside(row, "default_aggregation", "formula")
        if formula not in {FORMULAS.get(meter.kind)} | ({"sum"} if meter.kind is Kind.COUNT else set()):
            problems.append(f"stripe's meter {name} works with {formula}, and ours is a {meter.kind}")
        customer_key = _inside(row, "customer_mapping", "event_payload_key")
        if customer_key != self._payload.customer_key:
            problems.append(
                f"stripe's meter {name} has the customer in {customer_key}: set SIDECAR_STRIPE_CUSTOMER_KEY"
            )
        value_key = _inside(row, "value_settings", "event_payload_key")
        if formula != "count" and value_key != self._payload.value_key:
            problems.append(f"stripe's meter {name} has the value in {value_key}: set SIDECAR_STRIPE_VALUE_KEY")
        return problems


def _inside(row: Mapping[str, Any], name: str, key: str) -> Any:
    part = row.get(name)
    return part.get(key) if isinstance(part, dict) else None
