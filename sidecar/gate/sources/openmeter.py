"""`openmeter`: whether OpenMeter gives a customer access to a feature, and what is left of its entitlement.

One question brings all features of a customer (`GET /api/v1/customers/{id or key}/access`); the one that
`SIDECAR_GATE_OPENMETER_FEATURE` names decides. The vendor computes it on each question from what it has stored, to
the minute, and its sink takes a while: usage of the last minute is taken off here (`LAG_S`).

An entitlement with a soft limit keeps giving access with nothing left, and an answer does not say which kind it is.
So what is left is counted down only where `SIDECAR_GATE_OPENMETER_UNIT` says what the feature's meter counts; set it
for features with a hard limit. Not verified at the vendor: the delay of the sink of a deployment.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from time import time
from typing import Any, Final
from urllib.parse import quote

from sidecar.gate.sources.base import (
    MISSING,
    UNEXPECTED,
    Answer,
    Caller,
    NoAnswer,
    OfEach,
    Vendor,
    amount,
    customer,
    whole_units,
)

HOST: Final = "https://openmeter.cloud"
PATH: Final = "/api/v1/customers/{customer}/access"
LAG_S: Final = 60.0

ENTITLEMENTS: Final = "entitlements"
ACCESS: Final = "hasAccess"
BALANCE: Final = "balance"


class OpenmeterAccess(OfEach):
    """Asked of each customer."""

    name = "openmeter"
    by_model = False
    lag_s = LAG_S
    polled_s = None

    def __init__(
        self,
        *,
        feature: str,
        api_key: str | None = None,
        url: str = HOST,
        unit: str | None = None,
        customers: Mapping[str, str] | None = None,
        timeout_s: float = 2.0,
        clock: Callable[[], float] = time,
    ) -> None:
        self.unit = unit
        self._feature = feature
        self._customers = customers or {}
        headers = {} if api_key is None else {"authorization": f"Bearer {api_key}"}
        self._vendor = Vendor(url.removesuffix("/api/v1"), headers, timeout_s=timeout_s, clock=clock)

    def subject(self, caller: Caller) -> str | None:
        return customer(caller.subscriber, self._customers)

    async def ask(self, subject: str) -> Answer | NoAnswer:
        said = await self._vendor.json(PATH.format(customer=quote(subject, safe="")))
        if isinstance(said, NoAnswer):
            return said
        if said is MISSING:
            return Answer(allowed=False, reason="no_customer")
        features = said.get(ENTITLEMENTS) if isinstance(said, dict) else None
        if not isinstance(features, dict):
            return UNEXPECTED
        value = features.get(self._feature)
        if value is None:
            return Answer(allowed=False, reason="no_entitlement", limit=self._feature)
        return judged(value, self._feature, self.unit)

    async def aclose(self) -> None:
        await self._vendor.aclose()


def judged(value: Any, feature: str, unit: str | None) -> Answer | NoAnswer:
    """What the value of one entitlement says."""
    access = value.get(ACCESS) if isinstance(value, dict) else None
    if not isinstance(access, bool):
        return UNEXPECTED
    left: int | None = None
    if value.get(BALANCE) is not None:
        balance = amount(value[BALANCE])
        if balance is None or balance < 0:
            return NoAnswer("numbers")  # it never turns negative, says the contract
        left = whole_units(balance, unit)
    if not access:
        return Answer(allowed=False, reason="no_access", remaining=left, unit=unit, limit=feature)
    if unit is None or not left:
        return Answer(allowed=True, limit=feature)  # with access and nothing left the limit is a soft one
    return Answer(allowed=True, remaining=left, unit=unit, limit=feature)
