"""`revenium`: Revenium's product-key check (v1), as its gateways ask it before a call.

200 brings a claim, 404 says that there is no such subscription, and everything else says nothing about the
subscriber. The vendor's printed example has no `exp` and no `kid`, and no address of a key is published: the
signature is checked where the operator has a key (`SIDECAR_GATE_REVENIUM_PUBLIC_KEY_FILE`), else TLS is trusted.

Not verified at the vendor, so each stands in one place: that a `totalQuota` of 0 means none (the example has it on a
live subscription), which of the two counters it bounds (the larger is taken), in which unit
(`SIDECAR_GATE_REVENIUM_UNIT`), and how old the counters are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal
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
    customer,
    moment,
    whole_units,
)
from sidecar.gate.sources.signed_claim import PublicKey, read_claim

HOST: Final = "https://api.revenium.io"
PATH: Final = "/meter/v1/api/meter/product-key"
FIELDS: Final = ("application", "productKey")
CLAIM_AGE_S_MAX: Final = 3600.0  # an older one is a copy of what was once true
AHEAD_S_MAX: Final = 300.0  # of a clock of the vendor's

TIMES: Final = ("expiration", "subscriptionPeriodEnd")
TOTAL: Final = "totalQuota"
CONSUMED: Final = ("consumedQuota", "consumedSubscriptionQuota")
MADE: Final = "timestamp"

_TAILS: Final = ("/meter/v1/api", "/meter/v2", "/meter")


class ReveniumProductKey(OfEach):
    """Asked of each subscriber."""

    name = "revenium"
    by_model = False
    lag_s = 0.0  # a claim says when it was made
    polled_s = None

    def __init__(
        self,
        *,
        api_key: str,
        url: str = HOST,
        field: str = FIELDS[0],
        unit: str | None = "calls",
        customers: Mapping[str, str] | None = None,
        public_key: PublicKey | None = None,
        timeout_s: float = 2.0,
        clock: Callable[[], float] = time,
    ) -> None:
        """`field`: `application` for a subscriber credential, `productKey` for a subscription key."""
        if field not in FIELDS:
            raise ValueError(f"expected one of {', '.join(FIELDS)}")
        self.unit = unit
        self._field = field
        self._customers = customers or {}
        self._public_key = public_key
        self._vendor = Vendor(base_address(url), {"x-api-key": api_key}, timeout_s=timeout_s, clock=clock)

    def subject(self, caller: Caller) -> str | None:
        return customer(caller.subscriber, self._customers)

    async def ask(self, subject: str) -> Answer | NoAnswer:
        said = await self._vendor.json(f"{PATH}?{self._field}={quote(subject, safe='')}")
        if isinstance(said, NoAnswer):
            return said
        if said is MISSING:
            return Answer(allowed=False, reason="no_subscription")
        if not isinstance(said, dict):
            return UNEXPECTED
        claims = read_claim(said.get("claim"), self._public_key)
        return claims if isinstance(claims, NoAnswer) else judged(claims, self.unit, self._vendor.clock())

    async def aclose(self) -> None:
        await self._vendor.aclose()


@dataclass(frozen=True, slots=True)
class _Quota:
    total: int
    consumed: int


def judged(claims: Mapping[str, Any], unit: str | None, now_s: float) -> Answer | NoAnswer:
    """What a claim says. `now_s`: Unix seconds."""
    made_s = moment(claims.get(MADE))
    if made_s is None:
        return NoAnswer("claim_without_time")
    expires = claims.get("exp")  # RFC 7519: in seconds; the vendor's example has none
    if made_s - now_s > AHEAD_S_MAX or now_s - made_s > CLAIM_AGE_S_MAX:
        return NoAnswer("claim_expired")
    if expires is not None and not (type(expires) is int and expires > now_s):
        return NoAnswer("claim_expired")
    quota = _quota(claims)
    ends = [_end(claims.get(name)) for name in TIMES]
    if quota is None or any(isinstance(end, NoAnswer) for end in ends):
        return NoAnswer("claim_numbers")
    until_s = min((end for end in ends if isinstance(end, float)), default=None)
    # What ended before the claim was made has ended; what ended since asks for a new claim.
    if until_s is not None and until_s < min(made_s, now_s):
        return Answer(allowed=False, reason="subscription_ended")
    if quota.total == 0:
        return Answer(allowed=True, at_s=made_s, until_s=until_s)
    left = max(quota.total - quota.consumed, 0)
    return Answer(
        allowed=left > 0,
        reason="" if left > 0 else "quota_used_up",
        remaining=whole_units(Decimal(left), unit),
        unit=unit,
        at_s=made_s,
        until_s=until_s,
    )


def base_address(url: str) -> str:
    """The host, however much of the vendor's path was given with it: its own packages take all of these."""
    base = url.rstrip("/")
    return next((base.removesuffix(tail) for tail in _TAILS if base.endswith(tail)), base)


def _quota(claims: Mapping[str, Any]) -> _Quota | None:
    numbers = [claims.get(name, 0) for name in (TOTAL, *CONSUMED)]
    if any(type(number) is not int or number < 0 for number in numbers):
        return None
    return _Quota(numbers[0], max(numbers[1:]))


def _end(value: object) -> float | NoAnswer | None:
    if value is None:
        return None
    found = moment(value)
    return NoAnswer("claim_numbers") if found is None else found
