"""What a fleet needs, worked out from few figures: the table of docs/fleet.md.

`python tests/fleet_sizing.py` writes it. Each figure below is measured, with what it was measured on, or assumed, and
says so; the page repeats them. tests/test_fleet_docs.py checks that the page has what comes of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Final

from readme_tables import written

from sidecar.ledger.lanes import LANES

PAGE: Final = Path(__file__).parent.parent / "docs" / "fleet.md"
DAY_S: Final = 86_400

# Assumed.
PEAK: Final = 3  # the busiest minute to the mean of the day
RETENTION_DAYS: Final = 7  # of records, in the database and in a stream, as in the spool
REPLICAS: Final = 3
COMMIT_MS: Final = 5  # of a ledger's transaction on a disk that syncs in 1 to 2 ms
VENDOR_MS: Final = 100  # until a vendor has answered a request
CONNECTIONS: Final = 2  # of a sidecar: one that writes the ledger, one for who asks it
SUMS_A_S: Final = 2  # ledger transactions of a sidecar with records all the time (`sums_linger_s` of delivery)
SERIES: Final = 20  # of subscriber, model, route and status that a sidecar sees in an hour

# Measured on two shared cores, loopback.
LINE_BYTES: Final = 1_200  # the record that docs/record.md shows: 1,201
ROW_BYTES: Final = 1_550  # of such a record in the ledger, with its indexes: 1,530 in batches of 500
WAL_BYTES: Final = 2_200  # that is written for it: 1,777 in batches of 500, 2,169 in batches of 20
MERGED_A_S: Final = 40_000  # records a second into one database, in batches of thousands
LEDGER_TX_A_S: Final = 2_000  # transactions a second that change one row after the other: 1,936 to 2,110
COLLECTED_A_S: Final = 12_500  # records a second that one `collect` pulls and acknowledges
LEASE_TX_A_S: Final = 1  # of each that is elected: three in a round of 3 s
MESSAGE_BYTES: Final = 100  # of a stream's file beside the record
DEDUP_BYTES: Final = 200  # of memory for each id in a stream's window (nats-server 2.14: 160 to 205)


@dataclass(frozen=True, slots=True)
class Scale:
    sidecars: int
    records_a_day: int

    @property
    def mean_a_s(self) -> float:
        return self.records_a_day / DAY_S

    @property
    def peak_a_s(self) -> float:
        return PEAK * self.mean_a_s

    @property
    def each_a_s(self) -> float:
        """Of one sidecar, at the peak."""
        return self.peak_a_s / self.sidecars

    def transactions_a_s(self) -> float:
        """Of all sidecars, where each writes what it has; never more than it has records."""
        return self.sidecars * min(SUMS_A_S, self.each_a_s)

    def batch(self) -> int:
        """Records that a transaction has to hold at the peak, so that one row keeps up."""
        return max(1, ceil(self.peak_a_s / LEDGER_TX_A_S))

    @property
    def lane_a_s(self) -> float:
        return self.peak_a_s / LANES

    def in_flight(self, events: int) -> int:
        """Requests of one lane that are under way at once, with so many events in each (Little's law)."""
        return ceil(self.lane_a_s / events * VENDOR_MS / 1000)

    def working(self) -> int:
        """Connections that are inside a transaction at once (Little's law)."""
        return ceil(min(self.peak_a_s, LEDGER_TX_A_S) * COMMIT_MS / 1000)

    def stream_bytes(self, days: int = 1) -> float:
        """On the disk of each replica."""
        return days * self.records_a_day * (LINE_BYTES + MESSAGE_BYTES)

    def ids(self, window_s: int) -> float:
        """In the window of a stream, at the peak."""
        return self.peak_a_s * window_s


SCALES: Final = (Scale(40, 10**7), Scale(1_000, 10**8), Scale(10_000, 10**9))
Row = tuple[str, Callable[[Scale], str]]


def _count(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}".removesuffix(".0")


def _bytes(value: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if value >= size:
            return f"{_count(value / size)} {unit}"
    return f"{_count(value / 1e3)} kB"


ROWS: Final[tuple[Row, ...]] = (
    ("records a second, mean", lambda at: _count(at.mean_a_s)),
    (f"the same at the peak (×{PEAK})", lambda at: _count(at.peak_a_s)),
    ("of one sidecar at the peak", lambda at: _count(at.each_a_s)),
    ("**PostgreSQL**: a day's partition", lambda at: _bytes(at.records_a_day * ROW_BYTES)),
    (f"all partitions, {RETENTION_DAYS} days", lambda at: _bytes(RETENTION_DAYS * at.records_a_day * ROW_BYTES)),
    ("write-ahead log a day", lambda at: _bytes(at.records_a_day * WAL_BYTES)),
    ("the same a second at the peak", lambda at: _bytes(at.peak_a_s * WAL_BYTES)),
    (f"databases at {_count(MERGED_A_S)} records/s", lambda at: _count(ceil(at.peak_a_s / MERGED_A_S))),
    ("transactions a second, each sidecar for itself", lambda at: _count(at.transactions_a_s())),
    (f"records in one, for {_count(LEDGER_TX_A_S)} a second", lambda at: _count(at.batch())),
    ("rows of sums an hour", lambda at: _count(at.sidecars * SERIES)),
    ("connections of clients", lambda at: _count(at.sidecars * CONNECTIONS)),
    (f"connections that work ({COMMIT_MS} ms a transaction)", lambda at: _count(at.working())),
    (f"**Lanes** ({LANES}): records a second in each, at the peak", lambda at: _count(at.lane_a_s)),
    ("requests a second in each, 100 events in one", lambda at: _count(at.lane_a_s / 100)),
    (f"under way at once in each, at {VENDOR_MS} ms", lambda at: _count(at.in_flight(100))),
    ("the same where one event is a request", lambda at: _count(at.in_flight(1))),
    ("transactions a second for leases", lambda at: _count(at.sidecars * LEASE_TX_A_S)),
    ("**JetStream**: a second at the peak", lambda at: _bytes(at.peak_a_s * (LINE_BYTES + MESSAGE_BYTES))),
    (f"a stream of a day, each of {REPLICAS} replicas", lambda at: _bytes(at.stream_bytes())),
    (f"of {RETENTION_DAYS} days", lambda at: _bytes(at.stream_bytes(RETENTION_DAYS))),
    ("memory of each for the ids of an hour, at the peak", lambda at: _bytes(at.ids(3600) * DEDUP_BYTES)),
    (f"`collect` processes at {_count(COLLECTED_A_S)} records/s", lambda at: _count(ceil(at.peak_a_s / COLLECTED_A_S))),
)  # fmt: skip


def table() -> str:
    heads = [f"{at.sidecars:,} sidecars, {_power(at.records_a_day)} records a day" for at in SCALES]
    rows = [f"| | {' | '.join(heads)} |", f"|---|{'---|' * len(SCALES)}"]
    rows += [f"| {name} | {' | '.join(figure(at) for at in SCALES)} |" for name, figure in ROWS]
    return "\n".join(rows)


def _power(value: int) -> str:
    return f"10{''.join('⁰¹²³⁴⁵⁶⁷⁸⁹'[int(digit)] for digit in str(len(str(value)) - 1))}"


TABLES: Final[dict[str, Callable[[], str]]] = {"sizing": table}

if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(), TABLES))
