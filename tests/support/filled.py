"""A spool with as many records as a test wants, written through the spool's own front door."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

from sidecar.model.exchange import Exchange, Outcome, Subscriber, Usage, UsageState
from sidecar.model.record import encode
from sidecar.model.record_id import CHANCE_BYTES, Ids
from sidecar.spool import Batch, Limits, Spool

BATCH_LINES = 2_000
AHEAD_MAX = 4  # batches handed over and not committed yet: bounds memory


async def fill(data_dir: Path, count: int, limits: Limits | None = None) -> list[str]:
    """Add finished calls of one tenant to the slot that nobody holds; their ids."""
    async with Spool.open(data_dir, limits=limits) as spool:
        template = encode(exchange(id_="I" * 36), seq=1 << 60, instance=spool.instance)
        before, middle, after = split(template)
        new_ids, now_ns = Ids(os.urandom(CHANCE_BYTES)), time.time_ns()
        ids = [new_ids.next(now_ns) for _ in range(count)]
        first = spool.next_seq
        room = asyncio.Semaphore(AHEAD_MAX)
        for start in range(0, count, BATCH_LINES):
            await room.acquire()
            part = ids[start : start + BATCH_LINES]
            numbered = enumerate(part, first + start)
            lines = [before + id_.encode() + middle + b"%d" % seq + after for seq, id_ in numbered]
            spool.tally.admitted += len(lines)
            batch = Batch(
                first_seq=first + start,
                lines=lines,
                size_bytes=sum(map(len, lines)),
                admitted=spool.tally.admitted,
                done=lambda _: room.release(),
            )
            spool.submit(batch)
        for _ in range(AHEAD_MAX):
            await room.acquire()
    return ids


def exchange(*, id_: str) -> Exchange:
    return Exchange(
        id=id_,
        method="POST",
        url="https://api.example.com/v1/chat/completions",
        route="/v1/chat/completions",
        started_ns=time.time_ns(),
        status=200,
        outcome=Outcome.COMPLETE,
        first_byte_ms=12.0,
        duration_ms=850.0,
        request_bytes=400,
        response_bytes=900,
        request_headers=["Host", "Authorization", "Content-Type", "User-Agent"],
        response_headers=["Content-Type", "Date"],
        subscriber=Subscriber("cus_one", "header:x-tenant"),
        usage=Usage(
            provider="openai",
            model="gpt-5-mini",
            input_tokens=43,
            output_tokens=97,
            total_tokens=140,
            usage_state=UsageState.FINAL,
        ),
    )


def split(line: bytes) -> tuple[bytes, bytes, bytes]:
    """The line around its id and its number."""
    before, rest = line.split(b"I" * 36)
    middle, after = rest.split(b"%d" % (1 << 60))
    return before, middle, after
