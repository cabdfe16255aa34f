"""The equation holds, and fails when any single term is off by one."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from sidecar.ledger.postgres_queries import InstanceRow
from sidecar.ledger.postgres_schema import Reported
from sidecar.model.balance import BackendTotals, Balance, add_counts
from sidecar.model.delivery import Delivered
from sidecar.runtime.fleet import Fleet
from sidecar.spool import SpoolError

GOOD = Balance(
    admitted=10,
    recorded=7,
    open=2,
    lost={"spool_full": 1},
    backends={"ledger": BackendTotals(delivered=3, duplicate=1, pending=1, parked={"no": 1}, skipped={"before": 1})},
)


def test_it_holds_and_says_so() -> None:
    assert GOOD.holds
    assert GOOD.to_dict()["holds"] is True
    assert GOOD.to_dict()["backends"]["ledger"] == {
        "delivered": 3,
        "duplicate": 1,
        "parked": {"no": 1},
        "pending": 1,
        "skipped": {"before": 1},
    }


@pytest.mark.parametrize("term", ["admitted", "recorded", "open"])
@pytest.mark.parametrize("off", [-1, 1])
def test_one_call_too_few_or_too_many_is_seen(term: str, off: int) -> None:
    assert not replace(GOOD, **{term: getattr(GOOD, term) + off}).holds


@pytest.mark.parametrize("off", [{"delivered": 4}, {"duplicate": 0}, {"pending": 2}, {"parked": {}}, {"skipped": {}}])
def test_one_record_too_few_or_too_many_at_a_backend_is_seen(off: dict[str, Any]) -> None:
    bad = replace(GOOD, backends={"ledger": replace(GOOD.backends["ledger"], **off)})
    assert not bad.holds
    assert bad.problems[0].startswith("ledger: recorded 7 is not")


def test_counts_by_reason_add_up() -> None:
    assert add_counts([{"a": 1}, {"a": 2, "b": 3}, {}]) == {"a": 3, "b": 3}


@pytest.mark.parametrize("error", [SpoolError("it cannot be read"), KeyError("admitted"), OSError("no file")])
async def test_a_sidecar_of_a_fleet_tells_how_it_stands_again_after_a_fault(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sidecar.runtime.fleet.TELL_EVERY_S", 0.0)
    told, errors = asyncio.Event(), [error, error]

    async def balance() -> Balance:
        if errors:
            raise errors.pop()
        return Balance(admitted=1, recorded=1)

    class Ledger:
        name = "ledger"

        async def report(self, told_of: Reported) -> Delivered:
            assert told_of.balance is not None
            told.set()
            return Delivered()

        def instances(self) -> list[InstanceRow]:
            return []

    ledger: Any = Ledger()
    telling = asyncio.create_task(Fleet(ledger, ledger).keep(balance, lambda: None))
    async with asyncio.timeout(10):
        await told.wait()
    telling.cancel()
