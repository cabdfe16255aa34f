"""The end of the spools, read and parsed once for all backends, and each backend's place in them.

`Tail` keeps the last pieces that were read, or that the writer's own process handed over right after it committed them
(`offer`); whoever asks for records that one of them holds gets that piece, its records parsed by whoever needs them
first. A backend that is far behind reads for itself through the same code, and shares again when it has caught up: no
backend waits for another one. What is kept is a copy and bounded; what is not there is read from the spool.

`Feed` is one backend's place. What must always hold there: records are taken from a spool only when what became of them
is stored; until then the same ones come again.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from sidecar.delivery.limits import Limits
from sidecar.delivery.rows import Cursor, Hole
from sidecar.delivery.types import SpoolReader, StoredGroup
from sidecar.model.record import Record

RELIST_S: Final = 1.0  # how often a wake may look for spools of new instances
OFFERED_LOOK_S: Final = 1.0  # how often the disk is looked at although all that is committed is being offered
_NOT_PARSED: Final = object()


class Item:
    """A stored line and its number, or a hole that ends at this number. Parsed once, whoever asks."""

    __slots__ = ("_record", "hole", "line", "seq")

    def __init__(self, seq: int, line: bytes, hole: Hole | None = None, record: Record | None = None) -> None:
        self.seq, self.line, self.hole = seq, line, hole
        self._record: object = _NOT_PARSED if record is None else record

    @property
    def record(self) -> Record | None:
        """None: the line is no record."""
        found = self._record
        if found is _NOT_PARSED:
            try:
                found = Record.from_json(self.line)
            except ValueError:
                found = None
            self._record = found
        return found  # type: ignore[return-value]

    @property
    def known(self) -> Record:
        """The record of an item that was found to hold one."""
        found = self._record
        return found if found is not _NOT_PARSED else self.record  # type: ignore[return-value]

    def __repr__(self) -> str:
        return f"<Item {self.seq}{f', a hole of {self.hole.records}' if self.hole else ''}>"


@dataclass(slots=True, eq=False)
class Piece:
    """Records that follow each other, as they were read in one go or committed together."""

    first_seq: int
    last_seq: int
    size_bytes: int
    read: Sequence[Item] | None = None
    # Or, as it was handed over: nothing is made of it before somebody asks.
    lines: Sequence[bytes] = ()
    records: Sequence[Record] = ()  # some of them

    @property
    def items(self) -> Sequence[Item]:
        if self.read is None:
            known = {record.seq: record for record in self.records}
            self.read = [Item(seq, line, record=known.get(seq)) for seq, line in enumerate(self.lines, self.first_seq)]
            self.lines = self.records = ()
        return self.read

    def after(self, seq: int) -> Sequence[Item]:
        """Those with a greater number."""
        items = self.items
        if seq < self.first_seq:
            return items
        if len(items) == self.last_seq - self.first_seq + 1:  # no hole: the place follows from the number
            return items[seq - self.first_seq + 1 :]
        return [item for item in items if item.seq > seq]


def items_of(groups: Sequence[StoredGroup], after_seq: int) -> list[Item]:
    """What was read, in order and beyond a number: lines, and what is missing between them."""
    items: list[Item] = []
    for group in groups:
        items.extend(Item(seq, line) for seq, line in enumerate(group.lines, group.first_seq) if seq > after_seq)
        if group.missing and group.last_seq > after_seq:
            items.append(Item(group.last_seq, b"", Hole(group.first_seq, group.last_seq, group.missing)))
    return items


@dataclass(frozen=True, slots=True)
class Read:
    """What a look found. `more`: there may be more behind it, to be looked for at once, or at `look_s` (monotonic)."""

    piece: Piece | None
    more: bool = False
    look_s: float = 0.0


class Tail:
    """The spools of all instances as all backends read them. Belongs to one event loop."""

    def __init__(self, reader: SpoolReader, limits: Limits) -> None:
        self._reader, self._limits = reader, limits
        self._pieces: dict[str, deque[Piece]] = {}  # oldest use first
        self._size_bytes = 0
        self._reading: dict[tuple[str, int], asyncio.Future[None]] = {}  # looks at the disk that are under way
        self._wakes = 0
        self._ends: dict[str, tuple[int, int]] = {}  # the last number there was, and in which wake
        self._offered: dict[str, int] = {}  # the last number that was handed over
        self._looked_s: dict[str, float] = {}  # monotonic: when the disk was last looked at
        self.reads = 0  # of the spool, for tests and for whoever wonders

    def __repr__(self) -> str:
        count = sum(map(len, self._pieces.values()))
        return f"<Tail: {count} pieces, {self._size_bytes} bytes, {self.reads} reads>"

    def instances(self) -> list[str]:
        """Blocks."""
        return self._reader.instances()

    def offer(self, instance: str, group: StoredGroup, records: Sequence[Record] = ()) -> None:
        """Records that were committed just now, in the order of their numbers; `records`: of those that are at hand.

        Call it before delivery is woken. What is not offered, or let go before somebody took it, is read from the
        spool; so a writer that stops offering costs time and nothing else.
        """
        self._offered[instance] = group.last_seq
        if len(group.lines) != group.last_seq - group.first_seq + 1 or group.missing:
            return  # not whole: the spool tells what is missing
        size = sum(map(len, group.lines))
        self._keep(instance, Piece(group.first_seq, group.last_seq, size, lines=group.lines, records=records))

    def note(self, instance: str, last_seq: int) -> None:
        """Records up to this number are on disk, and this process will say when there are more."""
        self._offered[instance] = last_seq

    def wake(self) -> None:
        """Something was committed: what was found to be the end is so no more."""
        self._wakes += 1

    async def read(self, instance: str, after_seq: int, now_s: float, *, sure: bool = False) -> Read:
        """What follows a number, from memory or from the spool.

        `now_s`: monotonic. `sure`: look at the disk also where all that is committed is being offered.
        """
        while True:
            found = self._find(instance, after_seq)
            if found is not None:
                return Read(found, more=True)
            if self._ends.get(instance) == (after_seq, self._wakes):
                return Read(None)
            look_s = self._looked_s.get(instance, 0.0) + OFFERED_LOOK_S
            if not sure and self._offered.get(instance) == after_seq and now_s < look_s:
                return Read(None, more=True, look_s=look_s)
            under_way = self._reading.get((instance, after_seq))
            if under_way is None:
                break
            # What it finds may be older than the commit that this look is for, so that is asked for again.
            await asyncio.wait([under_way])
        return await self._look(instance, after_seq, now_s)

    async def _look(self, instance: str, after_seq: int, now_s: float) -> Read:
        asked, wakes = (instance, after_seq), self._wakes
        done = self._reading[asked] = asyncio.get_running_loop().create_future()
        try:
            piece, more = await self._read(instance, after_seq)
        finally:
            del self._reading[asked]
            done.set_result(None)
        self._looked_s[instance] = now_s
        offered = self._find(instance, after_seq)
        if offered is not None:  # meanwhile, and perhaps parsed already
            return Read(offered, more=True)
        if piece is not None:
            self._keep(instance, piece)
        if not more:
            self._ends[instance] = (after_seq if piece is None else piece.last_seq, wakes)
        return Read(piece, more=more)

    async def _read(self, instance: str, after_seq: int) -> tuple[Piece | None, bool]:
        """From the spool; and whether so much was there that there is likely to be more."""
        limit = self._limits.read_bytes
        self.reads += 1
        groups = await asyncio.to_thread(lambda: self._reader.read(instance, after_seq, bytes_max=limit))
        last = groups[-1].last_seq if groups else after_seq
        if last <= after_seq:
            return None, False
        size = sum(len(line) for group in groups for line in group.lines)
        return Piece(after_seq + 1, last, size, items_of(groups, after_seq)), size >= limit

    def _find(self, instance: str, after_seq: int) -> Piece | None:
        pieces = self._pieces.get(instance)
        for piece in pieces or ():
            if piece.first_seq <= after_seq + 1 <= piece.last_seq:
                if pieces and pieces[-1] is not piece:
                    pieces.remove(piece)
                    pieces.append(piece)
                return piece
        return None

    def _keep(self, instance: str, piece: Piece) -> None:
        """Keep it for the others; what was used least lately goes where there is no room."""
        pieces = self._pieces.setdefault(instance, deque())
        pieces.append(piece)
        self._size_bytes += piece.size_bytes
        while len(pieces) > self._limits.tail_pieces:
            self._size_bytes -= pieces.popleft().size_bytes
        while self._size_bytes > self._limits.tail_bytes:
            fullest = max(self._pieces.values(), key=len)
            if len(fullest) <= 1:
                fullest = next(other for other in self._pieces.values() if other)
            self._size_bytes -= fullest.popleft().size_bytes


@dataclass(slots=True)
class Source:
    """One instance's spool, as one backend stands in it. `seq`: what is stored of it; `read_seq`: what is in memory."""

    cursor: int
    instance: str
    seq: int
    again_upto: int
    read_seq: int
    items: deque[Item] = field(default_factory=deque)
    dry: bool = False  # the last look found nothing more
    next_read_s: float = 0.0  # monotonic: not looked at before
    soon_s: float = 0.0  # and before that, when there was a wake since the last look

    def move(self, upto_seq: int) -> None:
        """What became of the records up to this number is stored."""
        while self.items and self.items[0].seq <= upto_seq:
            self.items.popleft()
        self.seq = upto_seq
        self.read_seq = max(self.read_seq, upto_seq)


class Feed:
    """All spools of one backend, in turn. `start` makes the cursor for an instance that is new."""

    def __init__(self, tail: Tail, start: Callable[[str], Awaitable[Cursor]], *, gap_s: float) -> None:
        self._tail, self._start, self._gap_s = tail, start, gap_s
        self._all: dict[str, Source] = {}
        self._rotation: deque[Source] = deque()
        self._listed = False
        self._next_listing_s = 0.0  # monotonic

    def begin(self, cursors: Sequence[Cursor]) -> None:
        """Start at these places; what was read before is read again."""
        self._all.clear()
        self._rotation.clear()
        self._listed, self._next_listing_s = False, 0.0
        for cursor in cursors:
            self._add(cursor)

    def _add(self, cursor: Cursor) -> None:
        source = Source(cursor.id, cursor.instance, cursor.seq, cursor.again_upto, read_seq=cursor.seq)
        self._all[cursor.instance] = source
        self._rotation.append(source)

    def wake(self) -> None:
        """Something was committed somewhere, perhaps by an instance that is new."""
        for source in self._rotation:
            source.dry = False
            source.next_read_s = min(source.next_read_s, source.soon_s)
        self._listed = False

    @property
    def sources(self) -> Sequence[Source]:
        return self._rotation

    def source(self, instance: str) -> Source | None:
        return self._all.get(instance)

    @property
    def waiting(self) -> bool:
        """Whether records were read that have no place yet."""
        return any(source.items for source in self._rotation)

    @property
    def next_look_s(self) -> float | None:
        """When there may be something to read, if something may be there."""
        times = [source.next_read_s for source in self._rotation if not source.dry]
        if not self._listed:
            times.append(self._next_listing_s)
        return min(times, default=None)

    @property
    def unread(self) -> bool:
        """Whether there is, or may be, something that is not stored yet."""
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
            while len(source.items) < count and not source.dry and (hurry or now_s >= source.next_read_s):
                await self._read(source, now_s, hurry=hurry)
            if source.items:
                return source
        return None

    async def _list(self, now_s: float) -> None:
        self._listed = True
        self._next_listing_s = now_s + RELIST_S
        for instance in await asyncio.to_thread(self._tail.instances):
            if instance not in self._all:
                self._add(await self._start(instance))

    async def _read(self, source: Source, now_s: float, *, hurry: bool) -> None:
        source.dry = True  # unless a wake says otherwise while this look is under way
        found = await self._tail.read(source.instance, source.read_seq, now_s, sure=hurry)
        if found.piece is not None:
            source.items.extend(found.piece.after(source.read_seq))
            source.read_seq = found.piece.last_seq
        source.soon_s = now_s + self._gap_s
        # Less than was asked for is all there was; a wake meanwhile says that there is more.
        if found.more:
            source.dry = False
        source.next_read_s = found.look_s if found.more else source.soon_s
