"""How soon a month is read: `python tests/bench/ledger.py [FILE]`. 500 subscribers with 10 models each, every hour of
30 days: 3.6 million hourly rows. FILE is made, or used as it is.

CPU and wall time of the quickest of three, from the file to the JSON. Nothing here is a test: no figure is asserted.
"""

from __future__ import annotations

import random
import sqlite3
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

from sidecar.ledger import LedgerReader, LedgerStore
from sidecar.ledger.schema import SUMS
from sidecar.runtime.reports.formats import Format, Names, written
from sidecar.runtime.reports.parameters import UsageQuery, usage_query
from sidecar.runtime.reports.usage import usage

SUBSCRIBERS, MODELS, DAYS = 500, 10, 30
BEGIN = datetime(2026, 11, 1, tzinfo=UTC)
NOW = BEGIN + timedelta(days=DAYS)
ASKED: tuple[dict[str, str], ...] = (
    {"by": "subscriber,model", "since": "30d"},
    {"by": "subscriber", "since": "30d"},
    {"by": "model", "since": "30d"},
    {"by": "feature", "since": "30d"},
    {"by": "day", "since": "30d"},
    {"by": "day,model", "since": "30d"},
    {"by": "day,subscriber", "since": "30d", "top": "10"},
    {"by": "subscriber,model", "since": "2026-11-01T13:00", "until": "2026-11-30T11:00"},
    {"by": "hour", "since": "48h"},
    {"by": "hour,model", "since": "24h"},
    {"by": "subscriber", "since": "24h"},
    {"by": "day", "since": "30d", "timezone": "Europe/Berlin"},
    {"by": "day", "since": "30d", "timezone": "Asia/Kolkata"},
    {"by": "day,model", "since": "30d", "timezone": "Europe/Berlin"},
    {"by": "day,model", "since": "30d", "timezone": "Asia/Kolkata"},
    {"by": "hour,model", "since": "30d"},
    {"by": "day,subscriber", "since": "7d", "timezone": "Europe/Berlin"},
    {"by": "day,subscriber", "since": "30d", "top": "10", "timezone": "Asia/Kolkata"},
)


def fill(path: Path) -> None:
    LedgerStore(path).close()
    chance, begin = random.Random(1), int(BEGIN.timestamp())
    series = [(number, s, m) for number, (s, m) in enumerate((s, m) for s in range(SUBSCRIBERS) for m in range(MODELS))]
    columns = f"{', '.join(SUMS)}, cost_usd"

    def hourly() -> object:
        for hour in range(DAYS * 24):
            for number, _, _ in series:
                tokens = chance.randrange(5000), chance.randrange(1000)
                sums = [3, 3, 0, 3, 0, 0, 0, 1236, 4000, *tokens, sum(tokens), None, None, None]
                yield (begin + hour * 3600, number, *sums, chance.randrange(10**10))

    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("PRAGMA synchronous = OFF")
        db.execute("BEGIN")
        rows = [(n, str(n), f"customer-{s:04}", f"model-{m}", "openai", "/v1/chat", "2xx") for n, s, m in series]
        db.executemany("INSERT INTO series VALUES (?, ?, ?, ?, ?, ?, ?)", rows)
        features = [(n, "feature", f"feature-{s % 7}") for n, s, _ in series]
        db.executemany("INSERT INTO series_dimensions VALUES (?, ?, ?)", features)
        db.executemany(f"INSERT INTO hourly VALUES ({', '.join('?' * (len(SUMS) + 3))})", hourly())  # type: ignore[arg-type]
        sums = ", ".join(f"sum({name})" for name in (*SUMS, "cost_usd"))
        days = f"SELECT hour / 86400 * 86400, series, {sums} FROM hourly GROUP BY 1, 2"
        db.execute(f"INSERT INTO daily (day, series, {columns}) {days}")
        db.execute("COMMIT")
    began, began_cpu = time.perf_counter(), time.process_time()
    store = LedgerStore(path)  # makes the sums over all subscribers, as of a ledger of before they were kept
    if store._catching_up is not None:
        store._catching_up.join()
    store.close()
    print(f"caught up in {time.perf_counter() - began:.1f} s, {time.process_time() - began_cpu:.1f} s CPU")


def quickest(run: Callable[[], int]) -> tuple[float, float, int]:
    """CPU and wall seconds, and the rows of the answer."""
    best, rows = (float("inf"), float("inf")), 0
    for _ in range(3):
        began, began_cpu = time.perf_counter(), time.process_time()
        rows = run()
        best = min(best, (time.process_time() - began_cpu, time.perf_counter() - began))
    return *best, rows


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(sys.argv[1] if len(sys.argv) > 1 else f"{folder}/ledger.db")
        if not path.exists():
            began = time.perf_counter()
            fill(path)
            print(f"{'made in':<90}{time.perf_counter() - began:8.1f} s  {path.stat().st_size / 1e6:.0f} MB")
        for asked in ASKED:
            query = usage_query(now=NOW, dimensions=("feature",), **asked)

            def run(query: UsageQuery = query) -> int:
                found = usage(LedgerReader(path), query, Names({}))
                sum(map(len, written(found.flat(Names({})), found.columns(), Format.JSON)))
                return len(found.rows)

            cpu_s, wall_s, rows = quickest(run)
            name = "&".join(f"{name}={value}" for name, value in asked.items())
            print(f"{name:<75}{cpu_s:8.3f} s CPU{wall_s:8.3f} s{rows:8,} rows", flush=True)


if __name__ == "__main__":
    main()
