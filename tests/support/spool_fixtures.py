"""What the spool's and the recorder's tests share: small limits, exchanges, segments that fail on order."""

from __future__ import annotations

import asyncio
import errno
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import orjson
from support.spool_recorder import SpoolRecorder

from sidecar.model.call_group import Gathering
from sidecar.model.exchange import Exchange, Outcome, Subscriber
from sidecar.spool import Limits, Spool, SpoolReader
from sidecar.spool.segment import Group, Segment, write_error

# Segments change every dozen records, commits are a handful of lines, nothing waits long.
SMALL = Limits(
    segment_bytes=12 << 10,
    allocate_bytes=4 << 10,
    transaction_bytes=16 << 10,
    reserve_bytes=64 << 10,
    recover_margin_bytes=64 << 10,
    retry_s_min=0.005,
    retry_s_max=0.02,
    stop_s=5.0,
)


class Told:
    """Metrics that only remember."""

    def __init__(self) -> None:
        self.ended: list[Exchange] = []
        self.lost_by: Counter[str] = Counter()
        self.uncommitted = 0
        self.commits: list[tuple[int, int, float]] = []

    def calls_ended(self, gathered: Gathering) -> None:
        """Plain calls have no reader here."""

    def call_ended(self, exchange: Exchange) -> None:
        self.ended.append(exchange)

    def lost(self, reason: str, count: int) -> None:
        self.lost_by[reason] += count

    def released_uncommitted(self, count: int) -> None:
        self.uncommitted += count

    def add(self, counts: Iterable[tuple[str, str, float]]) -> None:
        assert not list(counts)

    def committed(self, records: int, size_bytes: int, seconds: float) -> None:
        self.commits.append((records, size_bytes, seconds))


def call(**changes: Any) -> Exchange:
    given: dict[str, Any] = {
        "method": "POST",
        "url": "https://api.example.com/v1/chat/completions",
        "route": "/v1/chat/completions",
        "request_headers": ["Host", "Content-Type"],
        "client_ip": "10.0.0.7",
        "subscriber": Subscriber("acme", "header:x-tenant"),
        "dimensions": {"feature": "search"},
        "status": 200,
        "outcome": Outcome.COMPLETE,
    }
    return Exchange(**(given | changes))


async def until(condition: Callable[[], Any], *, limit_s: float = 20.0) -> None:
    """Wait for something to become true."""
    async with asyncio.timeout(limit_s):
        while not condition():
            await asyncio.sleep(0.002)


async def recorded(recorder: SpoolRecorder, exchange: Exchange) -> None:
    """One call from admission until its record is on disk."""
    assert recorder.admit(exchange)
    await ended(recorder, exchange)


async def ended(recorder: SpoolRecorder, exchange: Exchange) -> None:
    released = asyncio.get_running_loop().create_future()
    if not recorder.complete(exchange, released.set_result):
        assert await asyncio.wait_for(released, 20) is True


def rows(root: Path, instance: str) -> list[dict[str, Any]]:
    """All records of a slot, as read through the reader."""
    with SpoolReader(root) as reader:
        return [orjson.loads(line) for group in reader.groups(instance) for line in group.lines]


def only_instance(root: Path) -> str:
    with SpoolReader(root) as reader:
        (instance,) = reader.instances()
        return instance


def crashed_copy(root: Path, target: Path) -> Path:
    """What a crash at this moment would leave: all files."""
    shutil.copytree(root, target)
    return target


class StallingSegment(Segment):
    """Waits before each commit while `gate` is closed."""

    gate: threading.Event

    def append(self, group: Group, *, sync: bool = True) -> None:
        self.gate.wait(30)
        super().append(group, sync=sync)


def stalling() -> tuple[type[StallingSegment], threading.Event]:
    gate = threading.Event()
    gate.set()
    return type("Stalling", (StallingSegment,), {"gate": gate}), gate


class FailingSegment(Segment):
    """Fails the commits whose turn is in `turns`; "after" means that the frame was written all the same."""

    turns: dict[int, str]
    turn: list[int]

    def append(self, group: Group, *, sync: bool = True) -> None:
        self.turn[0] += 1
        how = self.turns.get(self.turn[0])
        if how is None:
            super().append(group, sync=sync)
            return
        if how == "after":
            before = self._closing
            super().append(group, sync=sync)
            self._closing = before
        self.broken = True
        raise write_error(OSError(errno.EIO, "Input/output error"), self.path)


def failing(turns: dict[int, str]) -> type[FailingSegment]:
    return type("Failing", (FailingSegment,), {"turns": turns, "turn": [0]})


def flip(path: Path, offset: int, mask: int = 0x10) -> None:
    """One bit, as a bad disk would."""
    with path.open("r+b") as file:
        file.seek(offset)
        (byte,) = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ mask]))


def open_small(root: Path, **given: Any) -> Spool:
    return Spool.open(root, **({"limits": SMALL} | given))
