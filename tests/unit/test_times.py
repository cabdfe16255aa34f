"""How long calls took by day: counted by the day they began, bounded, kept over restarts, and never in the way."""

from __future__ import annotations

import asyncio
import json
import shutil
from contextlib import suppress
from pathlib import Path

import pytest

from sidecar.model.exchange import Exchange, Outcome
from sidecar.runtime import times
from sidecar.runtime.metrics import DAY_S, DAYS_MAX, DayTimes, Histogram, Metrics

DAY = 20_000  # 2024-10-04


def call(day: int, *, whole_ms: float | None = 80.0, first_ms: float | None = 8.0) -> Exchange:
    return Exchange(
        method="GET",
        url="http://u",
        status=200,
        outcome=Outcome.COMPLETE,
        started_ns=(day * DAY_S + 60) * 10**9,
        duration_ms=whole_ms,
        first_byte_ms=first_ms,
    )


def test_a_call_counts_on_the_day_it_began() -> None:
    metrics = Metrics()
    for _ in range(3):
        metrics.call_ended(call(DAY))
    metrics.call_ended(call(DAY + 1, first_ms=None))
    first, second = times.report(metrics.days)
    assert (first["day"], first["calls"], second["day"], second["calls"]) == ("2024-10-04", 3, "2024-10-05", 1)
    assert 0.05 < first["duration_s"]["p50"] < first["duration_s"]["p99"] <= 0.1
    assert 0.005 < first["first_byte_s"]["p50"] <= 0.01
    assert second["first_byte_s"] == {"p50": None, "p95": None, "p99": None}, "not known is not nothing"


def test_only_so_many_days_are_kept() -> None:
    metrics = Metrics()
    for day in range(DAYS_MAX + 10):
        metrics.call_ended(call(day))
    metrics.call_ended(call(3))  # older than all of them: counted nowhere, and nothing else goes for it
    assert sorted(metrics.days) == list(range(10, DAYS_MAX + 10))


@pytest.mark.parametrize(("part", "expected"), [(0.5, 0.001), (0.25, 0.00075), (1.0, 600.0)])
def test_a_quantile_is_where_prometheus_has_it(part: float, expected: float) -> None:
    histogram = Histogram()
    histogram.observe(0.0007)
    histogram.observe(0.0008)
    histogram.observe(700.0)  # above the last border
    histogram.observe(700.0)
    assert times.quantile(histogram, part) == pytest.approx(expected)


def test_what_is_kept_is_read_again(tmp_path: Path) -> None:
    metrics = Metrics()
    metrics.call_ended(call(DAY))
    path = tmp_path / times.NAME
    times.store(path, metrics.days)
    ((day, found),) = times.load(path)
    assert (day, found.whole.counts, found.first_byte.counts) == (
        DAY,
        metrics.days[DAY].whole.counts,
        metrics.days[DAY].first_byte.counts,
    )
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"[]", b"null", b'{"days": 3}', b'{"days": [{"day": 1}]}', b"\xff\xfe",
        json.dumps({"days": [{"day": 1, "whole": {"counts": [1], "total": 1}, "first_byte": {}}]}).encode(),
        b'{"days": []}' + b" " * times.FILE_BYTES_MAX,
    ],
)  # fmt: skip
def test_a_damaged_file_is_not_believed_and_stops_nothing(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / times.NAME
    path.write_bytes(content)
    assert list(times.load(path)) == []
    assert list(times.load(tmp_path / "nothing" / times.NAME)) == []


async def test_days_are_taken_in_at_the_start_and_kept_at_the_end(tmp_path: Path) -> None:
    old = Histogram()
    old.observe(1.0)
    times.store(tmp_path / times.NAME, {DAY: DayTimes(old, old)})
    metrics = Metrics()
    metrics.call_ended(call(DAY))
    keeping = asyncio.create_task(times.keep(metrics, tmp_path))
    async with asyncio.timeout(10):
        while sum(metrics.days[DAY].whole.counts) < 2:
            await asyncio.sleep(0.01)
    metrics.call_ended(call(DAY + 1))
    keeping.cancel()
    with suppress(asyncio.CancelledError):
        await keeping
    kept = {day: sum(found.whole.counts) for day, found in times.load(tmp_path / times.NAME)}
    assert kept == {DAY: 2, DAY + 1: 1}


async def test_a_directory_that_takes_nothing_is_said_and_stops_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    times.store(folder / times.NAME, {DAY: DayTimes()})
    metrics = Metrics()
    keeping = asyncio.create_task(times.keep(metrics, folder))
    async with asyncio.timeout(10):
        while not metrics.days:
            await asyncio.sleep(0.01)
    shutil.rmtree(folder)
    keeping.cancel()
    with suppress(asyncio.CancelledError):
        await keeping
    assert "could not be kept" in caplog.text
