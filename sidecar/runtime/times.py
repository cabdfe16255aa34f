"""How long calls took, day by day: for who looks at the page, and for nothing else.

The ledger keeps what is billed, and times are not; `/metrics` has no days. So each day of UTC has its two histograms,
counted beside the metrics (`Metrics.days`), and a small file that keeps them over restarts. A kill loses the counts of
its last minute: they bill nothing, and no balance knows them.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from sidecar.runtime.metrics import DAY_S, SECONDS, DayTimes, Histogram, Metrics
from sidecar.storage.files import write_file

log = logging.getLogger("sidecar.times")

NAME: Final = "times.json"
STORE_EVERY_S: Final = 60.0
FILE_BYTES_MAX: Final = 1 << 20  # a month has some 10 KB: what is larger is none of ours
PARTS: Final = {"p50": 0.5, "p95": 0.95, "p99": 0.99}


def report(days: Mapping[int, DayTimes]) -> list[dict[str, Any]]:
    """One row a day, the oldest first. Times are seconds; None: nothing was counted."""
    return [
        {
            "day": datetime.fromtimestamp(day * DAY_S, UTC).strftime("%Y-%m-%d"),
            "calls": sum(found.whole.counts),
            "duration_s": {name: quantile(found.whole, part) for name, part in PARTS.items()},
            "first_byte_s": {name: quantile(found.first_byte, part) for name, part in PARTS.items()},
        }
        for day, found in sorted(days.items())
    ]


def quantile(histogram: Histogram, part: float) -> float | None:
    """Where this part of all lies below: between the borders of its bucket, as Prometheus reckons. What is above the
    last border is said to be at it."""
    wanted = part * sum(histogram.counts)
    below, border = 0, 0.0
    for upto, count in zip(SECONDS, histogram.counts, strict=False):
        if count and below + count >= wanted:
            return round(border + (wanted - below) / count * (upto - border), 6)
        below, border = below + count, upto
    return SECONDS[-1] if sum(histogram.counts) else None


def load(path: Path) -> Iterator[tuple[int, DayTimes]]:
    """What was kept. Of a file that is none of ours, or is damaged, nothing is believed."""
    try:
        if path.stat().st_size > FILE_BYTES_MAX:
            return
        rows = json.loads(path.read_bytes())
        found = [
            (int(row["day"]), DayTimes(_histogram(row["whole"]), _histogram(row["first_byte"]))) for row in rows["days"]
        ]
    except FileNotFoundError:
        return
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("the times of earlier days cannot be read, so they begin anew: %s", error)
        return
    yield from found


def _histogram(row: Mapping[str, Any]) -> Histogram:
    """Raises `ValueError` where the buckets are others than ours."""
    histogram = Histogram()
    counts = row["counts"]
    if len(counts) != len(histogram.counts) or not all(type(count) is int and count >= 0 for count in counts):
        raise ValueError("these are no counts")
    histogram.counts, histogram.total = list(counts), float(row["total"])
    return histogram


def store(path: Path, days: Mapping[int, DayTimes]) -> None:
    """Raises `OSError`."""
    rows = [
        {
            "day": day,
            "whole": {"counts": found.whole.counts, "total": found.whole.total},
            "first_byte": {"counts": found.first_byte.counts, "total": found.first_byte.total},
        }
        for day, found in sorted(days.items())
    ]
    write_file(path, json.dumps({"days": rows}).encode("ascii"))


async def keep(metrics: Metrics, data_dir: Path) -> None:
    """Take in what was kept, and keep what is counted, until cancelled; then once more."""
    path = data_dir / NAME
    for day, found in await asyncio.to_thread(lambda: list(load(path))):
        metrics.add_day(day, found)
    try:
        while True:
            await asyncio.sleep(STORE_EVERY_S)
            _store(path, metrics)
    finally:
        _store(path, metrics)


def _store(path: Path, metrics: Metrics) -> None:
    """At once and not in a thread: some 10 KB a minute, and the loop may be about to end."""
    try:
        store(path, metrics.days)
    except OSError as error:
        log.warning("the times of the days could not be kept: %s", error)
    except Exception:
        log.exception("the times of the days could not be kept")
