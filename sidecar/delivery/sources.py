"""The spools as one backend reads them: a little ahead of its cursors, instance by instance in turn.

Holds at most one read of each instance in memory. Where a cursor is and what becomes of the records is the
lane's; this file only knows what comes next.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Final

from sidecar.delivery.encoding import Item
from sidecar.delivery.ports import SpoolReader
from sidecar.delivery.state.rows import Cursor, Hole

RELIST_S: Final = 1.0  # how often a wake may look for spools of new instances


@dataclass(slots=True)
class Source:
    """One instance's spool. `seq`: what is sealed, skipped or parked; `read_seq`: what is in memory."""

    cursor: int
    instance: str
    seq: int
    again_upto: int
    read_seq: int
    items: deque[Item] = field(default_factory=deque)
    dry: bool = False  # the last look found nothing more
    next_read_s: float = 0.0  # monotonic: not looked at before

    def move(self, taken: int, upto_seq: int) -> None:
        for _ in range(taken):
            self.items.popleft()
        self.seq = upto_seq


class Sources:
    """All spools of one backend. `start` makes the cursor for an instance that is new."""

    def __init__(
        self, reader: SpoolReader, start: Callable[[str], Awaitable[Cursor]], *, read_bytes: int, gap_s: float
    ) -> None:
        self._reader, self._start, self._read_bytes, self._gap_s = reader, start, read_bytes, gap_s
        self._all: dict[str, Source] = {}
        self._rotation: deque[Source] = deque()
        self._listed = False
        self._next_listing_s = 0.0  # monotonic

    def add(self, cursor: Cursor) -> None:
        source = Source(cursor.id, cursor.instance, cursor.seq, cursor.again_upto, read_seq=cursor.seq)
        self._all[cursor.instance] = source
        self._rotation.append(source)

    def wake(self) -> None:
        """Something was committed somewhere, perhaps by an instance that is new."""
        for source in self._rotation:
            source.dry = False
        self._listed = False

    @property
    def next_look_s(self) -> float | None:
        """When there may be something to read, if something may be there."""
        times = [source.next_read_s for source in self._rotation if not source.dry]
        if not self._listed:
            times.append(self._next_listing_s)
        return min(times, default=None)

    @property
    def unread(self) -> bool:
        """Whether there is, or may be, something that is not sealed yet."""
        return not self._listed or any(source.items or not source.dry for source in self._rotation)

    async def next(self, count: int, now_s: float, *, hurry: bool = False) -> Source | None:
        """The next spool with records, in turn, with so many of them read where there are so many.

        A spool that was read to its end is left alone for a moment, unless in a hurry: what is committed
        meanwhile comes together, as one read and as fuller batches.
        """
        if not self._listed and (hurry or now_s >= self._next_listing_s):
            await self._list(now_s)
        for _ in range(len(self._rotation)):
            source = self._rotation[0]
            self._rotation.rotate(-1)
            if len(source.items) < count and not source.dry and (hurry or now_s >= source.next_read_s):
                await self._read(source, now_s)
            if source.items:
                return source
        return None

    async def _list(self, now_s: float) -> None:
        self._listed = True
        self._next_listing_s = now_s + RELIST_S
        for instance in await asyncio.to_thread(self._reader.instances):
            if instance not in self._all:
                self.add(await self._start(instance))

    async def _read(self, source: Source, now_s: float) -> None:
        source.dry = True  # unless a wake says otherwise while this look is under way
        reader, after, limit = self._reader, source.read_seq, self._read_bytes
        groups = await asyncio.to_thread(lambda: reader.read(source.instance, after, bytes_max=limit))
        for group in groups:
            for seq, line in enumerate(group.lines, group.first_seq):
                if seq > source.read_seq:
                    source.items.append(Item(seq, line))
            if group.last_seq <= source.read_seq:
                continue
            if group.missing:
                source.items.append(Item(group.last_seq, b"", Hole(group.first_seq, group.last_seq, group.missing)))
            source.read_seq = group.last_seq
        # Less than was asked for is all there was; a wake meanwhile says that there is more.
        if sum(len(line) for group in groups for line in group.lines) >= limit:
            source.dry = False
        else:
            source.next_read_s = now_s + self._gap_s
