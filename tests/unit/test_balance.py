"""The equation holds, and fails when any single term is off by one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from sidecar.model.balance import BackendTotals, Balance, add_counts

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
