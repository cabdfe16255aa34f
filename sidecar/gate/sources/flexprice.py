"""`flexprice`: what is left in a customer's wallets at Flexprice.

One question by our id of the customer (`lookup_key`) brings all its wallets with their balances in real time; the
active ones of one currency are added up, and a call is let through while something is left. In dollars what was
consumed since is taken off, in the ledger's prices; in any other currency only the vendor's sign decides.

A balance may come from a cache there (`is_cached_fallback`; a missing one counts as true, says the vendor's code),
which lives up to half an hour. `x-max-live` asks for one that is no older than our own answers may be. Not verified
at the vendor: that this header is heeded at this address; the words of `wallet_status`.
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

HOST: Final = "https://us.api.flexprice.io"
PATH: Final = "/v1/customers/wallets?lookup_key={customer}&include_real_time_balance=true"
MAX_LIVE_S: Final = 60
LIVE_LAG_S: Final = 10.0  # events go through a queue before a live balance has them

BALANCE: Final = "real_time_balance"
CURRENCY: Final = "currency"
STATUS: Final = "wallet_status"
ACTIVE: Final = "active"
CACHED: Final = "is_cached_fallback"
UPDATED: Final = "balance_updated_at"


class FlexpriceWallets(OfEach):
    """Asked of each customer."""

    name = "flexprice"
    by_model = False
    unit: str | None = COST_USD
    lag_s = float(MAX_LIVE_S)  # of a balance from the cache whose time is not told
    polled_s = None

    def __init__(
        self,
        *,
        api_key: str,
        url: str = HOST,
        environment_id: str | None = None,
        customers: Mapping[str, str] | None = None,
        timeout_s: float = 2.0,
        clock: Callable[[], float] = time,
    ) -> None:
        self._customers = customers or {}
        headers = {"x-api-key": api_key, "x-max-live": str(MAX_LIVE_S)}
        if environment_id is not None:
            headers["x-environment-id"] = environment_id
        self._vendor = Vendor(url.removesuffix("/v1"), headers, timeout_s=timeout_s, clock=clock)

    def subject(self, caller: Caller) -> str | None:
        return customer(caller.subscriber, self._customers)

    async def ask(self, subject: str) -> Answer | NoAnswer:
        said = await self._vendor.json(PATH.format(customer=quote(subject, safe="")))
        if isinstance(said, NoAnswer):
            return said
        if said is MISSING:
            return Answer(allowed=False, reason="no_customer")
        wallets = rows_of(said, "items", "wallets")
        return UNEXPECTED if wallets is None else judged(wallets, self._vendor.clock())

    async def aclose(self) -> None:
        await self._vendor.aclose()


def judged(wallets: list[dict[str, Any]], now_s: float) -> Answer | NoAnswer:
    """What a customer's wallets say together. `now_s`: Unix seconds."""
    active = [wallet for wallet in wallets if str(wallet.get(STATUS, ACTIVE)).lower() == ACTIVE]
    if not active:
        return Answer(allowed=False, reason="no_wallet")
    balances = [amount(wallet.get(BALANCE)) for wallet in active]
    currencies = {str(wallet.get(CURRENCY, "")).lower() for wallet in active}
    if any(balance is None for balance in balances):
        return NoAnswer("numbers")
    times = [
        now_s - LIVE_LAG_S if wallet.get(CACHED, True) is False else moment(wallet.get(UPDATED)) for wallet in active
    ]
    at_s = None if None in times else min(at for at in times if at is not None)
    return left_in([balance for balance in balances if balance is not None], currencies, at_s)


def left_in(balances: list[Decimal], currencies: set[str], at_s: float | None) -> Answer:
    """What balances leave: together where they are of one currency, else whether any of them leaves something."""
    if currencies == {"usd"}:
        left = whole_units(sum(balances, Decimal()), COST_USD)
        return Answer(
            allowed=left > 0, reason="" if left > 0 else "balance_used_up", remaining=left, unit=COST_USD, at_s=at_s
        )
    allowed = sum(balances, Decimal()) > 0 if len(currencies) == 1 else any(balance > 0 for balance in balances)
    return Answer(allowed=allowed, reason="" if allowed else "balance_used_up", at_s=at_s)
