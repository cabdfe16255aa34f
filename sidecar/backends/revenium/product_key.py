"""Revenium's product-key check: may this subscriber call, and how much of the quota is left?

A look-up, not a delivery: 200 brings a claim, 404 says that there is no such subscription, and everything
else says nothing about the subscriber. The claim is a token that came straight from the service over TLS, so
it is read without checking its signature. Deciding, caching and reserving belong to the gate.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final
from urllib.parse import quote

import orjson

from sidecar.backends.http import HEADER_TEXT, Answer, HttpClient, verdict_of
from sidecar.backends.revenium.backend import HOST_V1, base_address
from sidecar.model.delivery import Blocked, Dedup, Retry

PATH: Final = "/meter/v1/api/meter/product-key"
FIELDS: Final = ("application", "productKey")


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """What the service says of a subscription. A quota of 0 means that there is none."""

    consumer: str | None
    product: str | None
    total_quota: int
    consumed_quota: int
    expires_at: datetime | None
    period_end: datetime | None

    @property
    def quota_left(self) -> int | None:
        """None: unlimited."""
        return None if self.total_quota <= 0 else max(self.total_quota - self.consumed_quota, 0)


@dataclass(frozen=True, slots=True)
class NoSubscription:
    """The service knows no such subscriber."""


class ProductKeys:
    """Asks the service. Open for as long as the process; close with `aclose`."""

    def __init__(self, *, api_key: str, url: str = HOST_V1, timeout_s: float = 2.0) -> None:
        """A caller waits for the answer, so the limit is short."""
        self._url = base_address(url) + PATH
        self._headers = {"x-api-key": HEADER_TEXT.parse(api_key)}
        # A read may be repeated, so nothing of it can be "unknown".
        self._client = HttpClient(dedup=Dedup.EVENT_ID, timeout_s=timeout_s, connect_timeout_s=timeout_s)

    async def look_up(self, subscriber: str, *, field: str = "application") -> Claim | NoSubscription | Retry | Blocked:
        """`field`: `application` for a subscriber credential, `productKey` for a subscription key."""
        if field not in FIELDS:
            raise ValueError(f"expected one of {', '.join(FIELDS)}")
        answer = await self._client.request(
            "GET", f"{self._url}?{field}={quote(subscriber, safe='')}", None, self._headers
        )
        if not isinstance(answer, Answer):
            return answer if isinstance(answer, Blocked) else Retry(answer.reason)
        if answer.status == 404:
            return NoSubscription()
        if answer.ok:
            return read_claim(answer) or Retry("no_claim")
        verdict = verdict_of(answer, dedup=Dedup.EVENT_ID, now_s=self._client.clock())
        return verdict if isinstance(verdict, (Retry, Blocked)) else Blocked(f"http_{answer.status}")

    async def aclose(self) -> None:
        await self._client.aclose()


def read_claim(answer: Answer) -> Claim | None:
    """The claims of `{"claim": "<token>"}`; None where there are none to read."""
    said = answer.json()
    token = said.get("claim") if isinstance(said, dict) else None
    parts = token.split(".") if isinstance(token, str) else []
    if len(parts) != 3:
        return None
    try:
        claims = orjson.loads(base64.urlsafe_b64decode(parts[1] + "=" * (-len(parts[1]) % 4)))
    except (binascii.Error, ValueError):
        return None
    if not isinstance(claims, dict):
        return None
    consumed = max(_whole(claims, "consumedQuota"), _whole(claims, "consumedSubscriptionQuota"))
    return Claim(
        consumer=_text(claims, "consumer"),
        product=_text(claims, "product"),
        total_quota=_whole(claims, "totalQuota"),
        consumed_quota=consumed,
        expires_at=_moment(claims, "expiration"),
        period_end=_moment(claims, "subscriptionPeriodEnd"),
    )


def _whole(claims: Mapping[str, Any], name: str) -> int:
    value = claims.get(name)
    return value if type(value) is int else 0


def _text(claims: Mapping[str, Any], name: str) -> str | None:
    value = claims.get(name)
    return value if isinstance(value, str) else None


def _moment(claims: Mapping[str, Any], name: str) -> datetime | None:
    millis = claims.get(name)
    if type(millis) is not int or not 0 < millis < 253_402_300_800_000:  # the year 10000
        return None
    return datetime.fromtimestamp(millis / 1000, UTC)
