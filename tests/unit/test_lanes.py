"""Which lane a customer is in: the same for ever, on every machine, and even."""

from __future__ import annotations

from collections import Counter

from sidecar.ledger.lanes import LANES, lane_of


def test_a_lane_never_changes() -> None:
    # Written down once: records that were numbered in a lane are found in no other.
    assert LANES == 16
    assert lane_of("123456789") == 0xCBF43926 % 16  # the check value that CRC-32 is published with
    assert [lane_of(key) for key in ("", "acme", "Ünïcode", "\ud800", "key:0123456789abcdef")] == [0, 14, 12, 8, 3]


def test_customers_spread_evenly() -> None:
    found = Counter(lane_of(f"customer-{number}") for number in range(16_000))
    assert set(found) == set(range(LANES))
    assert max(found.values()) < 1.2 * 1000
