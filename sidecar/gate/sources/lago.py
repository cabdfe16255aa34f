"""`lago`: what is left in a customer's wallets at Lago, usage of the running period taken off there.

The ongoing balance is made by a job of the vendor's, every five minutes by default, and its answer does not always
say when: then the usage of the last five minutes is taken off here (`LAG_S`), which may deny a call too early, never
too late. It may be switched off there, and is no better than the balance after the last invoice then. It may be
negative.

Our events name a subscription, a wallet belongs to a customer: the mapped id is looked up as the setting
`SIDECAR_GATE_LAGO_ID` says, and what customer a subscription is of is remembered. Not verified at the vendor:
`last_ongoing_balance_sync_at` in the answer (it is in the vendor's database; `last_balance_sync_at` is that of
invoices).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from decimal import Decimal
from time import time
from typing import Any, Final
from urllib.parse import quote

from sidecar.gate.sources.base import (
    COST_USD,
    MISSING,
    UNEXPECTED,
    Answer,
    Caller,
    NoAnswer,
    OfEach,
    Vendor,
    amount,
    customer,
    moment,
    rows_of,
    whole_units,
)

HOST: Final = "https://api.getlago.com"
WALLETS: Final = "/api/v1/wallets?external_customer_id={customer}&per_page=100"
SUBSCRIPTION: Final = "/api/v1/subscriptions/{subscription}"
LAG_S: Final = 300.0
REMEMBERED_MAX: Final = 10_000  # customers of subscriptions

BALANCE: Final = "ongoing_balance_cents"
CURRENCY: Final = "currency"
STATUS: Final = "status"
ACTIVE: Final = "active"
SYNCED: Final = "last_ongoing_balance_sync_at"
EXPIRES: Final = "expiration_at"
OWNER: Final = "external_customer_id"
# Smallest units in one of a currency where it is not a hundred (ISO 4217).
MINOR: Final = {"jpy": 1, "krw": 1, "vnd": 1, "clp": 1, "isk": 1, "kwd": 1000, "bhd": 1000, "tnd": 1000, "jod": 1000}


class LagoWallets(OfEach):
    """Asked of each customer."""

    name = "lago"
    by_model = False
    unit: str | None = COST_USD
    lag_s = LAG_S
    polled_s = None

    def __init__(
        self,
        *,
        api_key: str,
        url: str = HOST,
        by_subscription: bool = True,
        customers: Mapping[str, str] | None = None,
        timeout_s: float = 2.0,
        clock: Callable[[], float] = time,
    ) -> None:
        self._by_subscription = by_subscription
        self._customers = customers or {}
        self._owners: dict[str, str] = {}
        headers = {"authorization": f"Bearer {api_key}"}
        self._vendor = Vendor(url.removesuffix("/api/v1"), headers, timeout_s=timeout_s, clock=clock)

    def subject(self, caller: Caller) -> str | None:
        return customer(caller.subscriber, self._customers)

    async def ask(self, subject: str) -> Answer | NoAnswer:
        owner = await self._owner(subject) if self._by_subscription else subject
        if not isinstance(owner, str):
            return owner
        said = await self._vendor.json(WALLETS.format(customer=quote(owner, safe="")))
        if isinstance(said, NoAnswer):
            return said
        if said is MISSING:
            return Answer(allowed=False, reason="no_customer")
        wallets = rows_of(said, "wallets")
        return UNEXPECTED if wallets is None else judged(wallets, self._vendor.clock())

    async def _owner(self, subscription: str) -> str | Answer | NoAnswer:
        if subscription in self._owners:
            return self._owners[subscription]
        said = await self._vendor.json(SUBSCRIPTION.format(subscription=quote(subscription, safe="")))
        if isinstance(said, NoAnswer):
            return said
        if said is MISSING:
            return Answer(allowed=False, reason="no_subscription")
        inner = said.get("subscription") if isinstance(said, dict) else None
        owner = inner.get(OWNER) if isinstance(inner, dict) else None
        if not isinstance(owner, str) or not owner:
            return UNEXPECTED
        if len(self._owners) >= REMEMBERED_MAX:
            self._owners.clear()
        self._owners[subscription] = owner
        return owner

    async def aclose(self) -> None:
        await self._vendor.aclose()


def judged(wallets: list[dict[str, Any]], now_s: float) -> Answer | NoAnswer:
    """What a customer's wallets say together. `now_s`: Unix seconds."""
    active = []
    for wallet in wallets:
        expires_s = moment(wallet.get(EXPIRES))
        if str(wallet.get(STATUS, ACTIVE)).lower() == ACTIVE and (expires_s is None or expires_s > now_s):
            active.append(wallet)
    if not active:
        return Answer(allowed=False, reason="no_wallet")
    total: Decimal = Decimal()
    currencies: set[str] = set()
    for wallet in active:
        cents, currency = amount(wallet.get(BALANCE)), str(wallet.get(CURRENCY, "")).lower()
        if cents is None:
            return NoAnswer("numbers")
        total += cents / MINOR.get(currency, 100)
        currencies.add(currency)
    synced = [moment(wallet.get(SYNCED)) for wallet in active]
    at_s = None if None in synced else min(at for at in synced if at is not None)
    until_s = min((end for wallet in active if (end := moment(wallet.get(EXPIRES))) is not None), default=None)
    left = whole_units(total, COST_USD)
    is_usd = currencies == {"usd"}  # a customer has one currency there
    return Answer(
        allowed=left > 0,
        reason="" if left > 0 else "balance_used_up",
        remaining=left if is_usd else None,
        unit=COST_USD if is_usd else None,
        at_s=at_s,
        until_s=until_s,
    )
