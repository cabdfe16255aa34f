"""Which period a moment belongs to, and what of a sliding window counts."""

from __future__ import annotations

from datetime import UTC, datetime
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.gate.windows import FOREVER_NS, PARTS, SECOND_NS, Calendar, Sliding


def ns(text: str) -> int:
    at = datetime.fromisoformat(text)
    return round((at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp()) * SECOND_NS


@pytest.mark.parametrize(
    ("unit", "zone", "anchor", "at", "name", "start", "end"),
    [
        ("minute", "UTC", 1, "2026-11-28T22:41:59", "2026-11-28T22:41+0000", "2026-11-28T22:41", "2026-11-28T22:42"),
        ("hour", "UTC", 1, "2026-11-28T22:41:59", "2026-11-28T22+0000", "2026-11-28T22:00", "2026-11-28T23:00"),
        # half an hour off, as India is
        ("hour", "Asia/Kolkata", 1, "2026-11-28T22:41", "2026-11-29T04+0530", "2026-11-28T22:30", "2026-11-28T23:30"),
        ("day", "UTC", 1, "2026-11-28T22:41", "2026-11-28", "2026-11-28", "2026-11-29"),
        ("day", "Asia/Tokyo", 1, "2026-11-28T22:41", "2026-11-29", "2026-11-28T15:00", "2026-11-29T15:00"),
        # the days on which the clock is set: 23 and 25 hours
        ("day", "Europe/Berlin", 1, "2026-03-29T12:00", "2026-03-29", "2026-03-28T23:00", "2026-03-29T22:00"),
        ("day", "Europe/Berlin", 1, "2026-10-25T12:00", "2026-10-25", "2026-10-24T22:00", "2026-10-25T23:00"),
        # the hour that comes twice is two hours
        ("hour", "Europe/Berlin", 1, "2026-10-25T00:30", "2026-10-25T02+0200", "2026-10-25T00:00", "2026-10-25T01:00"),
        ("hour", "Europe/Berlin", 1, "2026-10-25T01:30", "2026-10-25T02+0100", "2026-10-25T01:00", "2026-10-25T02:00"),
        ("week", "UTC", 1, "2026-11-29T23:59", "2026-W48", "2026-11-23", "2026-11-30"),
        ("week", "UTC", 1, "2027-01-01", "2026-W53", "2026-12-28", "2027-01-04"),
        ("month", "UTC", 1, "2026-12-31T23:59:59", "2026-12", "2026-12-01", "2027-01-01"),
        ("month", "UTC", 15, "2026-01-14T10:00", "2025-12-15", "2025-12-15", "2026-01-15"),
        ("month", "UTC", 15, "2026-01-15", "2026-01-15", "2026-01-15", "2026-02-15"),
        # the 31st, where a month has fewer days
        ("month", "UTC", 31, "2026-02-27", "2026-01-31", "2026-01-31", "2026-02-28"),
        ("month", "UTC", 31, "2026-02-28", "2026-02-28", "2026-02-28", "2026-03-31"),
        ("month", "UTC", 30, "2028-02-29", "2028-02-29", "2028-02-29", "2028-03-30"),
        ("year", "UTC", 1, "2026-11-28", "2026", "2026-01-01", "2027-01-01"),
    ],
)
def test_periods_of_the_calendar(unit: str, zone: str, anchor: int, at: str, name: str, start: str, end: str) -> None:
    window = Calendar(unit, ZoneInfo(zone), anchor)
    period = window.period(ns(at))
    assert (period.id, period.start_ns, period.end_ns) == (name, ns(start), ns(end))


def test_a_total_has_one_period() -> None:
    assert Calendar("total", UTC).period(ns("2026-11-28")) == ("total", 0, FOREVER_NS)


@given(
    at_s=st.integers(0, 4_000_000_000),
    unit=st.sampled_from(["minute", "hour", "day", "week", "month", "year"]),
    zone=st.sampled_from(["UTC", "Europe/Berlin", "Asia/Kolkata", "America/New_York", "Australia/Lord_Howe"]),
    anchor=st.integers(1, 31),
)
def test_periods_follow_each_other_without_a_gap_and_have_names_of_their_own(
    at_s: int, unit: str, zone: str, anchor: int
) -> None:
    window = Calendar(unit, ZoneInfo(zone), anchor if unit == "month" else 1)
    at_ns = at_s * SECOND_NS
    period = window.period(at_ns)
    assert period.start_ns <= at_ns < period.end_ns
    following = window.period(period.end_ns)
    assert following.id != period.id
    # Lord Howe sets its clock by half an hour: an hour there may be cut, and never counted twice.
    assert following.start_ns <= period.end_ns
    assert window.period(period.start_ns).id == period.id
    # By its name it is found from wherever one looks: but for the hour that is cut, which is looked for near by.
    if zone != "Australia/Lord_Howe":
        far_ns = (at_ns + 2_000_000_000 * SECOND_NS) % (4_000_000_000 * SECOND_NS)
        named = Calendar(unit, ZoneInfo(zone), window.anchor_day).named(period.id, far_ns)
        assert named == period


@pytest.mark.parametrize(
    ("unit", "anchor", "name"),
    [
        ("day", 1, "2026-11"),
        ("day", 1, ""),
        ("day", 1, "2026-11-31"),
        ("day", 1, "20261118"),
        ("month", 15, "2026-11"),
        ("month", 15, "2026-11-18"),
        ("month", 1, "2026-11-18"),
        ("week", 1, "2026-W54"),
        ("week", 1, "2026-11-18"),
        ("hour", 1, "2026-11-18T09:30+0000"),
        ("hour", 1, "2026-11-18T09+0100"),
        ("minute", 1, "2026-11-18T09+0000"),
        ("year", 1, "0000"),
        ("year", 1, "total"),
        ("total", 1, "2026"),
    ],
)
def test_what_is_no_period_of_a_calendar_is_none(unit: str, anchor: int, name: str) -> None:
    assert Calendar(unit, ZoneInfo("UTC"), anchor).named(name, ns("2026-11-18")) is None


@given(
    seconds=st.integers(1, 100_000),
    events=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 1000)), max_size=30),
    later=st.integers(0, 10**5),
)
def test_a_sliding_window_never_counts_too_little_nor_more_than_one_part_too_much(
    seconds: int, events: list[tuple[int, int]], later: int
) -> None:
    window, parts = Sliding(seconds), dict[int, int]()
    for at_ms, amount in events:
        part = window.part(at_ms * 1_000_000)
        parts[part] = parts.get(part, 0) + amount
    now_ns = (max((at for at, _ in events), default=0) + later) * 1_000_000
    length_ns = seconds * SECOND_NS
    exact = sum(amount for at, amount in events if at * 1_000_000 > now_ns - length_ns)
    loose = sum(amount for at, amount in events if at * 1_000_000 > now_ns - length_ns - length_ns // PARTS - 1)
    assert exact <= window.total(parts, now_ns) <= loose


@given(
    seconds=st.integers(1, 100_000),
    events=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 1000)), max_size=30),
    now_s=st.integers(0, 10**6),
)
def test_what_lies_ahead_of_a_clock_that_was_set_back_is_gone_in_one_window(
    seconds: int, events: list[tuple[int, int]], now_s: int
) -> None:
    window, parts, now_ns = Sliding(seconds), dict[int, int](), now_s * SECOND_NS
    for at_s, amount in events:
        part = window.part(at_s * SECOND_NS)
        parts[part] = parts.get(part, 0) + amount
    before = window.total(parts, now_ns)
    changes = any(part > window.part(now_ns) for part in parts)
    assert window.set_back(parts, now_ns) == changes
    assert window.total(parts, now_ns) == before, "nothing is given away"
    assert window.total(parts, now_ns + (seconds * SECOND_NS * (PARTS + 2)) // PARTS) == 0
    assert not window.set_back(parts, now_ns)


def test_when_a_sliding_window_has_room_again() -> None:
    window = Sliding(60)
    parts = {window.part(100 * SECOND_NS): 5}
    free_ns = window.less_at_ns(parts, 130 * SECOND_NS)
    assert window.total(parts, free_ns) == 0
    assert window.total(parts, free_ns - 1) == 5
    assert window.less_at_ns({}, 7) == 7
