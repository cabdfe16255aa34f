"""Ids: 36 characters, never twice, never backwards, whatever the clock does."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.model import record_id
from sidecar.model.record_id import CHANCE_BYTES, ID_LENGTH, Ids

CHANCE = bytes(range(CHANCE_BYTES))
UUID_7 = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")
NOW_NS = 1_800_000_000_123_456_789


def test_the_form_is_a_uuid_of_version_7() -> None:
    made = Ids(CHANCE).next(NOW_NS)
    assert len(made) == ID_LENGTH
    assert UUID_7.fullmatch(made)
    assert int(made[:13].replace("-", ""), 16) == NOW_NS // 1_000_000


@given(st.lists(st.integers(0, 2**63), min_size=2, max_size=200))
def test_never_twice_and_never_backwards_under_any_clock(clock: list[int]) -> None:
    maker = Ids(CHANCE)
    made = [maker.next(now) for now in clock]
    assert len(set(made)) == len(made)
    assert made == sorted(made)


def test_the_counter_wraps_without_repeating_while_the_clock_stands_still(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record_id, "_LOW_END", record_id._LOW_FIRST + 4)
    monkeypatch.setattr(record_id, "_TURNS_MAX", 2)
    maker = Ids(CHANCE)
    made = [maker.next(NOW_NS) for _ in range(50)]
    assert len(set(made)) == 50
    assert made == sorted(made)
    assert all(UUID_7.fullmatch(one) for one in made)
    moments = [int(one[:13].replace("-", ""), 16) for one in made]
    assert moments == [NOW_NS // 1_000_000 + number // 8 for number in range(50)]


def test_the_counter_goes_on_in_its_upper_part() -> None:
    maker = Ids(CHANCE)
    made = [maker.next(NOW_NS) for _ in range((1 << 14) + 2)]
    assert [one[14:23] for one in (made[0], made[-3], made[-2], made[-1])] == [
        "7000-8000",
        "7000-bfff",
        "7001-8000",
        "7001-8001",
    ]
    assert made == sorted(made)


def test_two_processes_at_the_same_moment_differ() -> None:
    assert Ids(CHANCE).next(NOW_NS) != Ids(bytes(CHANCE_BYTES)).next(NOW_NS)


def test_too_little_chance_is_refused() -> None:
    with pytest.raises(ValueError, match="6 bytes of chance"):
        Ids(b"abc")
