"""Which frames the centre has: never before their records are settled there, and in the order of their source."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sidecar.runtime.shipping import Shipping

A, B = b"a" * 16, b"b" * 16


class Said:
    def __init__(self, **options: bool) -> None:
        self.numbers: list[tuple[bytes, int]] = []
        self.shipping = Shipping(lambda source, number: self.numbers.append((source, number)), **options)
        self.shipping.begin("i", 0)


def test_a_frame_is_there_when_none_of_its_records_is_pending() -> None:
    said = Said()
    said.shipping.stored(2, [(A, 1)])
    said.shipping.stored(3, [(A, 2), (B, 7)])
    said.shipping.settled("other", 9, ())
    assert said.numbers == []
    said.shipping.settled("i", 2, {2})
    assert said.numbers == []
    said.shipping.settled("i", 3, {3})
    assert said.numbers == [(A, 1)]
    said.shipping.settled("i", 3, ())
    assert said.numbers == [(A, 1), (A, 2), (B, 7)]


def test_what_was_settled_before_it_was_told_as_stored_is_there_at_once() -> None:
    said = Said()
    said.shipping.settled("i", 5, {9})
    said.shipping.stored(4, [(A, 1)])
    assert said.numbers == [(A, 1)]
    said.shipping.stored(4, [(A, 2)])  # brought no record
    assert said.numbers == [(A, 1), (A, 2)]


def test_what_a_life_before_had_stored_waits_for_its_last_records() -> None:
    said = Said()
    said.shipping.begin("i", 20_000)
    said.shipping.stored_before([(A, 5)])
    said.shipping.settled("i", 19_999, ())
    assert said.numbers == []
    said.shipping.settled("i", 20_000, {15_000})
    assert said.numbers == []
    said.shipping.settled("i", 20_000, {3})  # has waited for days, and is none of its
    assert said.numbers == [(A, 5)]


def test_an_old_record_that_goes_again_holds_nobody_up() -> None:
    said = Said()
    said.shipping.stored(5, [(A, 1)])
    said.shipping.settled("i", 5, ())
    said.shipping.stored(6, [(A, 2)])
    said.shipping.settled("i", 6, {2})
    assert said.numbers == [(A, 1), (A, 2)]


def test_without_a_centre_nobody_waits() -> None:
    said = Said(waits=False)
    said.shipping.stored(5, [(A, 1)])
    assert said.numbers == [(A, 1)]


@given(st.lists(st.integers(0, 3), min_size=1, max_size=12), st.data())
def test_in_any_order_of_events_none_is_told_early_and_all_are_told(sizes: list[int], data: st.DataObject) -> None:
    said = Said()
    last, ends = 0, []
    upto, pending = 0, set[int]()
    for number, size in enumerate(sizes, 1):
        last += size
        ends.append(last)
        said.shipping.stored(last, [(A, number)])
        if data.draw(st.booleans()):
            new = data.draw(st.integers(upto, last))
            pending = {seq for seq in pending | set(range(upto + 1, new + 1)) if data.draw(st.booleans())}
            upto = new
            said.shipping.settled("i", upto, pending)
        told = [n for _, n in said.numbers]
        assert told == list(range(1, len(told) + 1))
        for frame in told:
            first = 1 + (ends[frame - 2] if frame > 1 else 0)
            assert ends[frame - 1] <= upto
            assert not pending & set(range(first, ends[frame - 1] + 1))
    said.shipping.settled("i", last, ())
    assert [n for _, n in said.numbers] == list(range(1, len(sizes) + 1))
