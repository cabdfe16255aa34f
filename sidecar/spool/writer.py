"""The one thread that writes: batches in, durable transactions out, in the order of arrival.

Group commit: while one transaction runs, the next batches gather in the queue. What must always hold
- A batch is handed back exactly once, after it is on disk; none is dropped, however long the disk takes nothing.
- Batches are committed in order, so what a batch says of the intake's count is true of the disk once it is there.
- A file that failed is not written again: what was unconfirmed goes to a new one (`Chunk` has the one exception).
- `recorded` is counted here, from the lines that were written, and nowhere else.

Housekeeping (making the next chunk ahead, putting full ones away, replacing broken ones) runs on a second thread.
What may be let in, and how long an answer waits, is the recorder's.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Protocol

from sidecar.spool import files
from sidecar.spool.chunk import PAGE_BYTES, Chunk, IntentGroup, Opening, RecordGroup, Totals, lost_json
from sidecar.spool.salvage import replace_chunk
from sidecar.spool.words import Batch, Health, Limits, SpoolError, SpoolFailed, SpoolFull, State

log = logging.getLogger("sidecar.spool")

_LOG_FACTOR: Final = 2  # the log may be this many times `chunk_bytes` before the chunk is changed
# How often to look whether the reserve and the chunk are still there: a look costs what a small commit may not.
_LOOK_S: Final = 0.1


class CreateChunk(Protocol):
    def __call__(self, path: Path, number: int, instance: str) -> Chunk: ...


@dataclass(slots=True, frozen=True)
class Committed:
    """What one transaction stored, for the loop."""

    batches: tuple[Batch, ...]
    records: int
    size_bytes: int
    seconds: float
    recorded: int  # cumulative
    last_seq: int


@dataclass(slots=True, frozen=True)
class _Plan:
    """One transaction, worked out before the disk is asked."""

    groups: tuple[RecordGroup, ...]
    opened: Mapping[str, bytes]
    closed: frozenset[str]
    totals: Totals
    records: int
    size_bytes: int
    first_seq: int
    last_seq: int


@dataclass(slots=True)
class Position:
    """Where the writer stands: what is on disk, cumulative."""

    instance: str
    chunk_number: int = 0  # the highest in use
    commit_number: int = 0
    last_seq: int = 0
    admitted: int = 0
    recorded: int = 0
    lost: str = "{}"
    open_intents: dict[str, bytes] | None = None


class Writer:
    """Owns the chunk being written. `store` may be called directly before `start`, never after."""

    def __init__(
        self,
        root: Path,
        position: Position,
        limits: Limits,
        *,
        create: CreateChunk = Chunk.create,
    ) -> None:
        self._root = root
        self._slot = files.slot_dir(root, position.instance)
        self._at = position
        self._open: dict[str, bytes] = dict(position.open_intents or {})
        self._limits = limits
        self._create = create
        self._reserve = files.Reserve(root, limits.reserve_bytes, limits.recover_margin_bytes)
        self._looked_s = 0.0
        self._queue: queue.SimpleQueue[Batch | None] = queue.SimpleQueue()
        self._chunk: Chunk | None = None
        self._chunk_log_bytes = 0
        self._chunk_data_bytes = 0
        self._chunk_since_s = 0.0
        self._ahead: Future[Chunk] | None = None
        self._house = ThreadPoolExecutor(1, thread_name_prefix="spool-house")
        self._unsealed: list[Chunk] = []  # only the housekeeping thread touches it
        self._thread = threading.Thread(target=self._run, name="spool-writer", daemon=True)
        self._stopping = threading.Event()
        self._gave_up = False
        self._report: Callable[[Committed], None] = lambda committed: None
        self.health = Health()  # replaced as a whole, so any thread may read it

    @property
    def position(self) -> Position:
        return self._at

    @property
    def submit(self) -> Callable[[Batch], None]:
        """Hand a batch over. Never waits."""
        return self._queue.put

    def start(self, report: Callable[[Committed], None]) -> None:
        """From now on batches are committed on the thread; `report` is called there after each transaction."""
        self._report = report
        self._thread.start()

    def put_away(self, chunks: Iterable[Chunk]) -> None:
        """Seal chunks left by an earlier run, off this thread."""
        for chunk in chunks:
            self._house.submit(self._seal, chunk)

    def stop(self) -> bool:
        """Commit what was handed over, put the chunk away, end the threads. False: something could not be written."""
        deadline_s = time.monotonic() + self._limits.stop_s
        if self._thread.ident is not None:
            self._queue.put(None)
            self._thread.join(self._limits.stop_s)
            self._stopping.set()
            self._thread.join(self._limits.retry_s_max)
        self._stopping.set()
        if self._thread.is_alive():  # a sync that does not come back: the file cannot be touched either
            self._house.shutdown(wait=False)
            return False
        if self._chunk is not None and not self._chunk.broken:
            self._house.submit(self._seal, self._chunk)
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            self._house.submit(_discard, ahead)
        self._house.submit(self._seal_rest, deadline_s)
        self._house.shutdown(wait=True)
        return not self._gave_up

    # The thread

    def _run(self) -> None:
        ending = False
        while not ending:
            first = self._queue.get()
            if first is None:
                break
            batches, ending = self._gather(first)
            started_s = time.perf_counter()
            plan = self._store_until_done(batches)
            if plan is None:
                return
            took_s = time.perf_counter() - started_s
            self._report(
                Committed(tuple(batches), plan.records, plan.size_bytes, took_s, self._at.recorded, self._at.last_seq)
            )

    def _gather(self, first: Batch) -> tuple[list[Batch], bool]:
        """All that is waiting, up to one transaction's size; and whether the end was met."""
        batches, size = [first], first.size_bytes
        while size < self._limits.transaction_bytes:
            try:
                batch = self._queue.get_nowait()
            except queue.Empty:
                return batches, False
            if batch is None:
                return batches, True
            batches.append(batch)
            size += batch.size_bytes
        return batches, False

    def _store_until_done(self, batches: list[Batch]) -> _Plan | None:
        """Try for as long as it takes; None when we are stopping and it did not work."""
        wait_s = self._limits.retry_s_min
        while True:
            try:
                return self.store(batches)
            except SpoolError as error:
                self.note(error)
            except Exception as error:  # a fault of ours must not end the only thread that writes
                log.exception("a group could not be written")
                self.note(SpoolFailed(f"a fault in the writer: {type(error).__name__}"))
            if self._stopping.wait(wait_s):
                self._gave_up = True
                log.error("the spool stops with records that the disk did not take", extra={"batches": len(batches)})
                return None
            wait_s = min(wait_s * 2, self._limits.retry_s_max)

    def note(self, error: SpoolError) -> None:
        health = Health(State.FULL if isinstance(error, SpoolFull) else State.DEGRADED, str(error))
        if self.health.state is not health.state:
            log.error("records wait in memory: %s", error)
        self.health = health

    def store(self, batches: list[Batch]) -> _Plan:
        """One try at one transaction. Raises `SpoolFull` or `SpoolFailed`; then nothing of it counts."""
        self._look()
        plan = self._plan(batches)
        chunk = self._chunk or self._take_chunk()
        opening = None
        if chunk.opening is None:
            opening = Opening(plan.first_seq, self._at.recorded)
        intents = self._intent_group(plan, restate=opening is not None)
        try:
            chunk.write(plan.groups, intents, opening)
        except SpoolFull:
            self._reserve.give_up()
            raise
        except SpoolError:
            self._abandon(chunk)
            raise
        self._confirm(plan, intents)
        if self.health.state is not State.OK:
            log.warning("the spool writes again")
            self.health = Health()
            self._house.submit(self._seal_all)
        return plan

    def _intent_group(self, plan: _Plan, *, restate: bool) -> IntentGroup | None:
        if restate:  # a chunk begins with all that is open, so that recovery needs no other
            still_open = {**self._open, **plan.opened}
            return IntentGroup(tuple(line for id_, line in still_open.items() if id_ not in plan.closed), plan.totals)
        if plan.opened or not plan.groups:
            return IntentGroup(tuple(plan.opened.values()), plan.totals)
        return None

    def _plan(self, batches: list[Batch]) -> _Plan:
        at, limit = self._at, self._limits.group_bytes
        last = batches[-1]
        opened = {id_: line for batch in batches for id_, line in batch.opens}
        closed = frozenset(id_ for batch in batches for id_ in batch.closes)
        if opened and closed:  # opened and closed inside one transaction: nobody need ever know
            both = closed & opened.keys()
            opened = {id_: line for id_, line in opened.items() if id_ not in both}
            closed = closed - both
        totals = Totals(
            commit_number=at.commit_number + 1,
            committed_ns=time.time_ns(),
            admitted=last.admitted,
            recorded=at.recorded,
            lost=lost_json(last.lost),
            closes="\n".join(closed),
        )
        groups: list[RecordGroup] = []
        recorded = at.recorded
        size = 0
        for first_seq, lines in _runs(batches, limit):
            recorded += len(lines)
            body = b"\n".join(lines)
            size += len(body)
            groups.append(RecordGroup(first_seq, len(lines), body, replace(totals, recorded=recorded)))
        if len(groups) > 1:  # what is closed stands once, with the last
            groups[:-1] = [replace(g, totals=replace(g.totals, closes="")) for g in groups[:-1]]
        totals = replace(totals, recorded=recorded, closes="" if groups else totals.closes)
        return _Plan(
            groups=tuple(groups),
            opened=opened,
            closed=closed,
            totals=totals,
            records=recorded - at.recorded,
            size_bytes=size,
            first_seq=groups[0].first_seq if groups else at.last_seq + 1,
            last_seq=groups[-1].last_seq if groups else at.last_seq,
        )

    def _confirm(self, plan: _Plan, intents: IntentGroup | None) -> None:
        """It is on disk: move on, and change the chunk when it is full or old."""
        at, totals = self._at, plan.totals
        at.commit_number, at.last_seq = totals.commit_number, plan.last_seq
        at.admitted, at.recorded, at.lost = totals.admitted, totals.recorded, totals.lost
        self._open.update(plan.opened)
        for id_ in plan.closed:
            self._open.pop(id_, None)
        size = plan.size_bytes + (sum(map(len, intents.lines)) if intents is not None else 0)
        self._chunk_data_bytes += size
        self._chunk_log_bytes += _log_bytes(size, len(plan.groups) + (intents is not None))
        limits = self._limits
        if (
            self._chunk_data_bytes >= limits.chunk_bytes
            or self._chunk_log_bytes >= limits.chunk_bytes * _LOG_FACTOR
            or time.monotonic() - self._chunk_since_s >= limits.chunk_age_s
        ):
            self._change_chunk()
        elif self._ahead is None and self._chunk_log_bytes >= limits.chunk_bytes // 2:
            self._ahead = self._house.submit(self._make, self._next_number())

    def _change_chunk(self) -> None:
        full, self._chunk = self._chunk, None
        if full is not None:
            self._house.submit(self._seal, full)

    def _take_chunk(self) -> Chunk:
        """The chunk that was made ahead, or one made now; and the next one is ordered."""
        ahead, self._ahead = self._ahead, None
        chunk: Chunk | None = None
        if ahead is not None:
            try:
                chunk = ahead.result()
            except SpoolError as error:
                log.warning("the next chunk could not be made ahead: %s", error)
        if chunk is None:
            try:
                chunk = self._make(self._next_number())
            except SpoolFull:
                self._reserve.give_up()
                raise
        self._chunk = chunk
        self._chunk_data_bytes = self._chunk_log_bytes = 0
        self._chunk_since_s = time.monotonic()
        return chunk

    def _next_number(self) -> int:
        self._at.chunk_number += 1
        return self._at.chunk_number

    def _make(self, number: int) -> Chunk:
        return self._create(files.chunk_path(self._slot, number), number, self._at.instance)

    def _look(self) -> None:
        """Records may not use the reserve's room: where it was given up it has to be made again first.

        Another writer of this directory may have given it up, and somebody may have removed our file.
        """
        now_s = time.monotonic()
        if self.health.state is not State.FULL and now_s - self._looked_s < _LOOK_S:
            return
        self._looked_s = now_s
        if self._chunk is not None and not self._chunk.path.exists():
            # SQLite would go on writing into a file that nobody can open any more.
            path = self._chunk.path
            self._chunk = None
            raise SpoolFailed(f"{path} was removed while it was written: restore the data directory and restart")
        if self.health.state is State.FULL:
            if not self._reserve.restore():
                raise SpoolFull(self.health.reason or "no room on the disk")
        elif not self._reserve.present and not self._reserve.restore():
            raise SpoolFull(
                f"{self._reserve.path} cannot be made: free at least"
                f" {(self._limits.reserve_bytes + self._limits.recover_margin_bytes) >> 20} MiB on its disk"
            )

    def _abandon(self, chunk: Chunk) -> None:
        """A file that failed: leave it; what it confirmed is copied out of it, off this thread."""
        self._chunk = None
        log.error("a chunk failed and is not written again", extra={"chunk": str(chunk.path)})
        if chunk.opening is None:  # it failed at its first commit, so nothing in it was ever confirmed
            self._house.submit(self._drop, chunk)
        else:
            self._house.submit(self._replace, chunk, self._at.last_seq)

    # The housekeeping thread

    def _seal(self, chunk: Chunk) -> None:
        self._unsealed.append(chunk)
        self._seal_all()

    def _seal_all(self) -> None:
        if self.health.state is State.FULL:
            return  # the room that is left is delivery's; a chunk's log holds everything until then
        waiting, self._unsealed = self._unsealed, []
        for chunk in waiting:
            try:
                chunk.seal()
            except SpoolFull:
                self._unsealed.append(chunk)  # tried again with the next one, or when there is room
            except SpoolError as error:
                log.error("a full chunk could not be put away: %s", error)
                self._replace(chunk, None)

    def _seal_rest(self, deadline_s: float) -> None:
        """At the end: what still cannot be put away keeps its log, and the next start deals with it."""
        self._seal_all()
        while self._unsealed and time.monotonic() < deadline_s:
            time.sleep(self._limits.retry_s_min)
            self._seal_all()
        for chunk in self._unsealed:
            chunk.close()

    def _replace(self, chunk: Chunk, upto_seq: int | None) -> None:
        try:
            chunk.close()
            replace_chunk(self._root, self._at.instance, chunk.path, chunk.number, upto_seq=upto_seq)
        except (SpoolError, OSError) as error:
            # Readers go on reading it where it is; the next start tries again.
            log.error("what a failed chunk holds could not be copied out yet: %s", error)

    def _drop(self, chunk: Chunk) -> None:
        try:
            chunk.close()
            files.remove_chunk(chunk.path)
        except OSError as error:
            log.warning("an unused chunk could not be removed: %s", error)


def _discard(ahead: Future[Chunk]) -> None:
    """Remove a chunk that was made ahead and never begun."""
    try:
        chunk = ahead.result()
    except SpoolError:
        return
    chunk.close()
    files.remove_chunk(chunk.path)


def _runs(batches: list[Batch], limit_bytes: int) -> Iterable[tuple[int, list[bytes]]]:
    """Lines with consecutive numbers, cut at `limit_bytes`: each becomes one row."""
    lines: list[bytes] = []
    first_seq = size = 0
    for batch in batches:
        if not batch.lines:
            continue
        if lines and (first_seq + len(lines) != batch.first_seq or size >= limit_bytes):
            yield first_seq, lines
            lines, size = [], 0
        if not lines:
            first_seq = batch.first_seq
        if batch.size_bytes <= limit_bytes:
            lines.extend(batch.lines)
            size += batch.size_bytes
            continue
        for line in batch.lines:  # more in one loop turn than a row should hold
            if lines and size + len(line) > limit_bytes:
                yield first_seq, lines
                first_seq, lines, size = first_seq + len(lines), [], 0
            lines.append(line)
            size += len(line)
    if lines:
        yield first_seq, lines


def _log_bytes(size_bytes: int, rows: int) -> int:
    """About how much a transaction adds to the log: its full pages, one begun page and one parent a row."""
    return (size_bytes // PAGE_BYTES + 2 * rows) * PAGE_BYTES
