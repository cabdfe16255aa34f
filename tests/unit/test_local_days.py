"""Days and months of a time zone: made of UTC's days and of a few hours, they are what the hours amount to."""

from __future__ import annotations

import random
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest

from sidecar.ledger import LedgerReader, LedgerStore, TooLongError, local_days, queries
from sidecar.meters.hourly import TOKENS, Delta, Series, body_of
from sidecar.model.delivery import Delivered

HOUR_S, DAY_S = 3600, 86_400
# Whole hours, halves and quarters, ahead by more than half a day, a summer time of half an hour, none at all.
ZONES = (
    "Europe/Berlin", "America/New_York", "America/Los_Angeles", "Asia/Kolkata", "Asia/Kathmandu", "Asia/Tokyo",
    "Australia/Lord_Howe", "Pacific/Auckland", "Pacific/Kiritimati", "Pacific/Pago_Pago", "America/St_Johns",
    "Africa/Abidjan", "Africa/Casablanca",
)  # fmt: skip
CHANGES = (datetime(2026, 3, 26, tzinfo=UTC), datetime(2026, 10, 23, tzinfo=UTC), datetime(2026, 10, 30, tzinfo=UTC))
BY = (
    ["day"], ["month"], ["day", "model"], ["model", "day"], ["subscriber", "day", "feature"], ["month", "subscriber"],
    ["status", "month"], ["day", "month"], ["day", "instance"], ["subscriber", "model", "feature", "day"],
)  # fmt: skip
WHERE: tuple[dict[str, Any], ...] = (
    {}, {"subscriber": ("a", None)}, {"dimensions.feature": ("x", None)}, {"model": ("m1",), "subscriber": ("b",)},
)  # fmt: skip


def filled(path: Path, chance: random.Random, *, hours: int, often: float, odd: bool = False) -> datetime:
    """Some hours of some series, in which zero, nothing and what was taken back occur; where they begin."""
    begin = chance.choice(CHANGES) + timedelta(hours=chance.randrange(24))
    first, store, effects = int(begin.timestamp()), LedgerStore(path), list[Delta]()
    many = [
        Series(subscriber, model, "p", None, "2xx", dimensions)
        for subscriber in ("a", "b", None)
        for model in ("m1", None)
        for dimensions in ((), (("feature", "x"),))
    ]
    for hour in range(hours):
        for series in many:
            if chance.random() >= often:
                continue
            delta = Delta(first + hour * HOUR_S, series)
            delta.counts.update(records=1, calls=chance.randrange(2), request_bytes=chance.randrange(1000))
            tokens = {name: chance.choice((0, 0, 5, 2**62 if odd else 7)) for name in TOKENS if chance.random() < 0.4}
            delta.tokens.update(tokens)
            if chance.random() < 0.5:
                delta.cost_usd = Decimal(chance.choice(("0", "0.1", "1e-15" if odd else "0.000001")))
            effects.append(delta)
            if chance.random() < 0.1:  # taken back: there is a row still, of nothing
                back = Delta(delta.hour, series, tokens={name: -value for name, value in tokens.items()})
                back.counts = {name: -value for name, value in delta.counts.items()}
                back.cost_usd = None if delta.cost_usd is None else -delta.cost_usd
                effects.append(back)
    assert store.apply("k", body_of(effects)) == Delivered()
    store.close()
    return begin


def hour_by_hour(monkeypatch: pytest.MonkeyPatch, *asked: Any, **more: Any) -> Any:
    with monkeypatch.context() as patch:
        patch.setattr(queries, "parts_of", lambda *_: None)
        return LedgerReader(*asked[:2]).usage(*asked[2:], **more)


@pytest.mark.parametrize("seed", range(8))
def test_days_of_a_zone_are_what_their_hours_amount_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    chance = random.Random(seed)
    path = tmp_path / "ledger.db"
    often = (0.02, 0.2, 0.9)[seed % 3]
    begin = filled(path, chance, hours=chance.choice((20, 24 * 9)), often=often, odd=seed % 4 == 3)
    for zone in map(ZoneInfo, chance.sample(ZONES, 5)):
        for by in chance.sample(BY, 4):
            where = chance.choice(WHERE)
            since, until = (
                chance.choice((None, begin + timedelta(hours=chance.randrange(-30, 24 * 9)))) for _ in range(2)
            )
            if since is not None and until is not None and until <= since:
                since, until = until, since
            expected = hour_by_hour(monkeypatch, path, "one", by, since, until, where, zone=zone)
            found = LedgerReader(path, "one").usage(by, since, until, where, zone=zone)
            assert found == expected, (str(zone), by, since, until, where)


def test_a_day_of_which_only_strays_are_left_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Berlin is an hour ahead: what came from 23:00 UTC on is of the next day, and nothing is left of its own."""
    path, late = tmp_path / "ledger.db", int(datetime(2026, 11, 20, 23, tzinfo=UTC).timestamp())
    store = LedgerStore(path)
    effects = [Delta(late - hours * HOUR_S, Series("a", "m", None, None, "2xx")) for hours in (0, 30)]
    for delta in effects:
        delta.counts["records"] = 1
    effects[0].tokens["input_tokens"] = 0
    store.apply("k", body_of(effects))
    store.close()
    berlin = ZoneInfo("Europe/Berlin")
    rows = LedgerReader(path).usage(["day", "model"], zone=berlin)
    assert [(row.group[0], row.records, row.input_tokens) for row in rows] == [
        ("2026-11-19", 1, None),
        ("2026-11-21", 1, 0),
    ]
    # Where so many are in doubt that asking for each costs more than the hours, the answer is the same.
    monkeypatch.setattr(queries, "UNSURE_MAX", 0)
    assert LedgerReader(path).usage(["day", "model"], zone=berlin) == rows


def test_few_hours_are_read_for_the_days_of_a_zone() -> None:
    begin = int(datetime(2026, 11, 1, tzinfo=UTC).timestamp())
    for zone, most in (("Europe/Berlin", 1), ("America/New_York", 5), ("Asia/Kolkata", 5), ("Pacific/Kiritimati", 10)):
        found = local_days.split(ZoneInfo(zone), begin, begin + 30 * DAY_S, months=False)
        assert found is not None
        assert len(found.days) == 30
        assert len(found.hours) <= 30 * most
        months = local_days.split(ZoneInfo(zone), begin, begin + 30 * DAY_S, months=True)
        assert months is not None
        assert len(months.hours) <= most
    assert local_days.split(ZoneInfo("Asia/Tokyo"), 0, 20 * 365 * DAY_S, months=False) is None, "too long for it"


def test_a_question_for_days_of_a_zone_is_given_up_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "ledger.db"
    filled(path, random.Random(1), hours=200, often=0.9)
    monkeypatch.setattr(queries, "STEPS_BETWEEN_LOOKS", 100)
    with pytest.raises(TooLongError):
        LedgerReader(path).usage(["day", "subscriber"], zone=ZoneInfo("Europe/Berlin"), limit_s=0)
