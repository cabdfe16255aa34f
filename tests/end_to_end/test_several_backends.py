"""Several backends at once: each has its own pace and its own faults, and none holds another up."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
from support.tiny import tiny_upstream
from support.whole import Whole, running_receiver

from sidecar.dev.mock_backends import Do, Fault, Receiver

CHAT = {"model": "gpt-5-mini", "messages": []}
CALLS = 12  # fewer than the 20 refusals in a row at which delivery suspects the address
EVERYONE = ("ledger", "revenium", "stripe", "flexprice", "lago", "webhook")


def settings(url: str) -> dict[str, str]:
    return {
        "SIDECAR_BACKENDS": ",".join(EVERYONE),
        "SIDECAR_SUBSCRIBER": "header:x-tenant",
        "SIDECAR_REVENIUM_URL": url,
        "SIDECAR_REVENIUM_API_KEY": "k",
        "SIDECAR_STRIPE_URL": url,
        "SIDECAR_STRIPE_API_KEY": "k",
        "SIDECAR_FLEXPRICE_URL": url,
        "SIDECAR_FLEXPRICE_API_KEY": "k",
        "SIDECAR_LAGO_URL": url,
        "SIDECAR_LAGO_API_KEY": "k",
        "SIDECAR_WEBHOOK_URL": f"{url}/webhook",
        "SIDECAR_WEBHOOK_SECRET": "a-secret-of-the-test",
    }


async def call(whole: Whole, calls: int = CALLS) -> None:
    async with aiohttp.ClientSession(headers={"x-tenant": "cus_1"}) as session:
        for _ in range(calls):
            async with session.post(whole.proxy_url + "/v1/chat/completions", json=CHAT) as answer:
                assert answer.status == 200
                await answer.read()


async def balance_when(whole: Whole, holds: Callable[[dict[str, Any]], bool], *, limit_s: float = 30.0) -> Any:
    """The backends' side of the balance, once it is as expected."""
    balance: dict[str, Any] = {}
    try:
        async with asyncio.timeout(limit_s):
            while True:
                balance = await whole.get("/balance")
                assert balance["holds"], balance
                if holds(balance["backends"]):
                    return balance["backends"]
                await asyncio.sleep(0.05)
    except TimeoutError:
        raise AssertionError(f"it did not come to that: {balance}") from None


def billed_once(receiver: Receiver, backend: str, id_of: Callable[[Any], str], ids: set[str]) -> None:
    """Every id is billed, and none twice."""
    counts = Counter(id_of(event) for event in receiver.billed(backend))
    assert set(counts) == ids, backend
    assert set(counts.values()) == {1}, backend


async def test_one_refuses_one_is_blocked_one_is_slow_one_loses_answers_and_the_rest_is_fine(tmp_path: Path) -> None:
    async with tiny_upstream() as upstream, running_receiver() as (receiver, url):
        receiver.faults.set(
            Fault(do=Do.STATUS, status=400, backend="revenium"),
            Fault(do=Do.STATUS, status=401, backend="stripe"),
            Fault(do=Do.DELAY, delay_s=1.0, backend="flexprice"),
            Fault(do=Do.CUT_AFTER, times=2, backend="webhook"),
        )
        whole = Whole(tmp_path / "data", upstream, **settings(url))
        async with whole:
            await call(whole)
            fine = await balance_when(whole, lambda b: b["ledger"]["delivered"] == b["lago"]["delivered"] == CALLS)
            assert fine["stripe"]["pending"] == CALLS, "who is blocked keeps everything, and parks nothing"
            assert not fine["stripe"]["parked"]
            after = await balance_when(
                whole,
                lambda b: (
                    sum(b["revenium"]["parked"].values()) == CALLS
                    and all(not b[name]["pending"] for name in EVERYONE if name != "stripe")
                ),
            )
            assert after["revenium"]["parked"] == {"http_400": CALLS}
            assert after["stripe"]["pending"] == CALLS
            for name in ("flexprice", "webhook"):
                assert after[name]["delivered"] + after[name]["duplicate"] == CALLS, name
            ready = await whole.get("/readyz")
            assert ready["status"] == "ok", "a backend's trouble turns no traffic away"
            assert ready["notes"] == ["stripe is blocked: unauthorized"]

            receiver.faults.set()
            code, out, err = await whole.command("spool", "redrive", "--backend", "revenium")
            assert (code, out) == (0, f"{CALLS} events offered again\n"), err
            await balance_when(whole, lambda b: b["revenium"]["delivered"] == CALLS)
            # A start asks a blocked backend at once; by itself it would be asked within the minute.
            assert await whole.stop() == 0
            await whole.start()
            await call(whole, 1)
            balance = await whole.settled()
            assert balance["holds"]
            for name in EVERYONE:
                terms = balance["backends"][name]
                assert terms["delivered"] + terms["duplicate"] == CALLS + 1, (name, terms)
            ids = {row["id"] for row in await whole.records()}
            assert await whole.stop() == 0
        events = {f"{one}:{meter}" for one in ids for meter in ("api_calls", "input_tokens", "output_tokens")}
        billed_once(receiver, "revenium", lambda body: str(body["correlationId"]), ids)
        billed_once(receiver, "stripe", lambda body: str(body["identifier"]), events)
        billed_once(receiver, "flexprice", lambda body: str(body["event_id"]), ids)
        billed_once(receiver, "lago", lambda body: str(body["transaction_id"]), events)
        billed_once(receiver, "webhook", lambda body: str(body["id"]), ids)
