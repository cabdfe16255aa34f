"""What the spool takes: `PYTHONPATH=.:tests python tests/bench/spool.py [records]`. Bounded; asserts nothing.

Records a second appended in groups with fsync, time to be ready with all of them pending, the event loop's share of a
call in both modes, and the latency of a commit over changes of segment.
"""

from __future__ import annotations

import asyncio
import os
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from support.spool_fixtures import Told, call
from support.spool_recorder import SpoolRecorder

from sidecar.model.record import encode
from sidecar.spool import Batch, Limits, Spool, SpoolReader

LINES_A_BATCH = 1000
BATCHES_WAITING_MAX = 8


def quantiles(seconds: Sequence[float]) -> str:
    found = sorted(seconds)
    at = {f"p{q:g}": found[min(int(len(found) * q / 100), len(found) - 1)] for q in (50, 99, 99.9)}
    return ", ".join(f"{name} {value * 1e3:.2f} ms" for name, value in at.items()) + f", most {found[-1] * 1e3:.2f} ms"


async def append(root: Path, records: int) -> None:
    line = encode(call(id="0" * 36, started_ns=time.time_ns()), seq=1, instance="a")
    waiting = asyncio.Semaphore(BATCHES_WAITING_MAX)
    told = Told()
    async with Spool.open(root, instance="a", metrics=told) as spool:
        started_s = time.perf_counter()
        for first_seq in range(1, records, LINES_A_BATCH):
            await waiting.acquire()
            spool.submit(
                Batch(
                    first_seq=first_seq,
                    lines=[line] * LINES_A_BATCH,
                    size_bytes=len(line) * LINES_A_BATCH,
                    admitted=first_seq + LINES_A_BATCH - 1,
                    done=lambda batch: waiting.release(),
                )
            )
        for _ in range(BATCHES_WAITING_MAX):
            await waiting.acquire()
        took_s = time.perf_counter() - started_s
    commits = quantiles([seconds for _, _, seconds in told.commits])
    print(f"appended {records / took_s:,.0f} records/s of {len(line)} bytes; commits {commits}")


def ready(root: Path) -> None:
    started_s = time.perf_counter()
    spool = Spool.open(root, instance="a")
    with SpoolReader(root) as reader:
        reader.read("a", 0)
        took_s = time.perf_counter() - started_s
        pending = reader.count("a", 0, 1 << 62)
    spool.close()
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    print(f"ready in {took_s * 1e3:.0f} ms with {pending:,} pending; at most {rss} MiB resident")


async def loop_share(root: Path, mode: str, calls: int = 40_000, a_turn: int = 32) -> None:
    exchanges = [call() for _ in range(calls)]
    async with (
        Spool.open(root) as spool,
        SpoolRecorder(spool, Told(), durability=mode, spool_memory_bytes=1 << 30) as recorder,
    ):
        started_s = time.thread_time()
        for turn in range(0, calls, a_turn):
            for exchange in exchanges[turn : turn + a_turn]:
                recorder.admit(exchange)
                recorder.complete(exchange, lambda granted: None)
            await asyncio.sleep(0)
        while recorder._in_flight:
            await asyncio.sleep(0.001)
        took_s = time.thread_time() - started_s
    started_s = time.thread_time()
    for exchange in exchanges:
        encode(exchange, seq=1, instance="a")
    encoding_s = time.thread_time() - started_s
    print(f"{mode}: {took_s / calls * 1e6:.1f} µs of the loop a call, {encoding_s / calls * 1e6:.1f} of them encoding")


async def latency(root: Path, segment_bytes: int, calls: int = 10_000) -> None:
    took: list[float] = []
    told = Told()
    async with (
        Spool.open(root, limits=Limits(segment_bytes=segment_bytes), metrics=told) as spool,
        SpoolRecorder(spool, Told()) as recorder,
    ):
        for _ in range(calls):
            released = asyncio.get_running_loop().create_future()
            recorder.admit(exchange := call())
            started_s = time.perf_counter()
            recorder.complete(exchange, released.set_result)
            await released
            took.append(time.perf_counter() - started_s)
        await asyncio.to_thread(spool._writer.maintenance.quiet)
        segments = spool._writer.position.segment_number
    print(f"one call at a time over {segments} segments: {quantiles(took)}")
    print(f"  its commits alone: {quantiles([seconds for _, _, seconds in told.commits])}")


def appended_and_synced(path: Path, size_bytes: int = 4096, times: int = 10_000) -> None:
    """The peer: what a plain file takes to append and sync the same on this disk."""
    took: list[float] = []
    with path.open("wb", buffering=0) as file:
        for _ in range(times):
            started_s = time.perf_counter()
            file.write(b"x" * size_bytes)
            os.fdatasync(file.fileno())
            took.append(time.perf_counter() - started_s)
    print(f"a plain file, {size_bytes} bytes appended and synced: {quantiles(took)}")


def main(records: int) -> None:
    with tempfile.TemporaryDirectory(prefix="spool-bench-", dir=".") as base:
        asyncio.run(append(Path(base, "append"), records))
        ready(Path(base, "append"))
        for mode in ("buffered", "committed"):
            asyncio.run(loop_share(Path(base, mode), mode))
        for segment_mib in (64, 8):
            asyncio.run(latency(Path(base, f"latency-{segment_mib}"), segment_mib << 20))
        appended_and_synced(Path(base, "plain"))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000)
