"""The one thread that writes: batches in, durable transactions out, in the order of arrival.

Group commit: while one transaction runs, the next batches gather in the queue. What must always hold
- A batch is handed back exactly once, after it is on disk; none is dropped, however long the disk takes nothing.
- Batches are committed in order, so what a batch says of the intake's count is true of the disk once it is there.
- A file that failed is not written again: what was unconfirmed goes to a new one (`Chunk` has the one exception).
- `recorded` is counted here, from the lines that were written, and nowhere else.

Putting full chunks away and replacing broken ones is `house`'s; what goes into a transaction is worked out in `plan`.
What may be let in, and how long an answer waits, is the recorder's.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from sidecar.spool import files
from sidecar.spool.chunk import PAGE_BYTES, Chunk
from sidecar.spool.groups import IntentGroup, Opening
from sidecar.spool.house import CreateChunk, House
from sidecar.spool.plan import Plan, Position, make_plan
from sidecar.spool.words import REMOVED, Batch, Health, Limits, SpoolError, SpoolFailed, SpoolFull, State

log = logging.getLogger("sidecar.spool")

_LOG_FACTOR: Final = 2  # the log may be this many times `chunk_bytes` before the chunk is changed
# How often to look whether the reserve and the chunk are still there: a commit takes 0.1 ms, so not before each.
_LOOK_S: Final = 0.1
_START_BYTES: Final = 4 << 20  # left alone for the next start
_LAST_TRY_S: Final = 2.0  # at the end: what may fit into the reserve's room is 64 MiB at most


@dataclass(slots=True, frozen=True)
class Committed:
    """What one transaction stored, for the loop."""

    batches: tuple[Batch, ...]
    records: int
    size_bytes: int
    seconds: float
    recorded: int  # cumulative
    last_seq: int


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
        self._at = position
        self._open: dict[str, bytes] = dict(position.open_intents or {})
        self._limits = limits
        self._root = root
        self._reserve = files.Reserve(root, limits.reserve_bytes, limits.recover_margin_bytes)
        self._looked_s = 0.0
        self._queue: queue.SimpleQueue[Batch | None] = queue.SimpleQueue()
        self._chunk: Chunk | None = None
        self._chunk_log_bytes = 0
        self._chunk_data_bytes = 0
        self._chunk_since_s = 0.0
        self._thread = threading.Thread(target=self._run, name="spool-writer", daemon=True)
        self._stopping = threading.Event()
        self._gave_up = False
        self._last_try = False
        self._report: Callable[[Committed], None] = lambda committed: None
        self.house = House(root, position.instance, create, lambda: self.health.state is State.FULL)
        self.health = Health()  # replaced as a whole, so any thread may read it

    @property
    def position(self) -> Position:
        return self._at

    @property
    def open_intents(self) -> dict[str, bytes]:
        """What the disk knows to be open: it is settled by the next start, and so not lost."""
        return self._open

    @property
    def submit(self) -> Callable[[Batch], None]:
        """Hand a batch over. Never waits."""
        return self._queue.put

    def start(self, report: Callable[[Committed], None]) -> None:
        """From now on batches are committed on the thread; `report` is called there after each transaction."""
        self._report = report
        self._thread.start()

    def stop(self) -> bool:
        """Commit what was handed over, put the chunk away, end the threads. False: something could not be written."""
        deadline_s = time.monotonic() + self._limits.stop_s
        if self._thread.ident is not None:
            self._queue.put(None)
            self._thread.join(self._limits.stop_s)
            self._stopping.set()
            self._thread.join(max(self._limits.retry_s_max, _LAST_TRY_S))
        self._stopping.set()
        if self._thread.is_alive():  # a sync that does not come back
            self.house.leave()
            return False
        if self._chunk is not None:
            self.house.put_away(self._chunk)
        self.house.stop(deadline_s)
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

    def _store_until_done(self, batches: list[Batch]) -> Plan | None:
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
            if self._last_try:
                self._gave_up = True
                return None
            if self._stopping.wait(wait_s):
                self._last_try = True
                self._reserve.give_up()
            wait_s = min(wait_s * 2, self._limits.retry_s_max)

    def note(self, error: SpoolError) -> None:
        """Keep the first reason: what fails after it mostly follows from it."""
        health = Health(State.FULL if isinstance(error, SpoolFull) else State.DEGRADED, str(error))
        if self.health.state is not health.state:
            log.error("records wait in memory: %s", error)
            self.health = health

    def store(self, batches: list[Batch]) -> Plan:
        """One try at one transaction. Raises `SpoolFull` or `SpoolFailed`; then nothing of it counts."""
        self._look()
        plan = make_plan(self._at, batches, self._limits.group_bytes, time.time_ns())
        chunk = self._chunk or self._take_chunk()
        opening = None
        if chunk.opening is None:
            opening = Opening(plan.first_seq, self._at.recorded)
        intents = plan.intents(self._open, restate=opening is not None)
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
            self.house.retry()
        return plan

    def _confirm(self, plan: Plan, intents: IntentGroup | None) -> None:
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
            full, self._chunk = self._chunk, None
            if full is not None:
                self.house.put_away(full)
        elif not self.house.has_ahead and self._chunk_log_bytes >= limits.chunk_bytes // 2:
            self.house.order(self._next_number())

    def _take_chunk(self) -> Chunk:
        """The chunk that was made ahead, or one made now."""
        try:
            chunk = self.house.take() or self.house.make(self._next_number())
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

    def _look(self) -> None:
        """Records may not use the reserve's room: where it was given up it has to be made again first.

        Another writer of this directory may have given it up, and somebody may have removed our file.
        """
        now_s = time.monotonic()
        if self.health.state is State.OK and now_s - self._looked_s < _LOOK_S:
            return
        self._looked_s = now_s
        if not self._root.is_dir():
            # Before anything else: whatever fails next in a directory that is not there says nothing of the reason.
            self._let_go()
            raise SpoolFailed(f"{self._root} is not there: {REMOVED}")
        if self._chunk is not None and not self._chunk.path.exists():
            path = self._chunk.path
            self._let_go()
            raise SpoolFailed(f"{path} is not there: {REMOVED}")
        if self._last_try:
            # What is not written now is lost, so records may use the reserve's room after all, but for what the next
            # start needs to open its files.
            if self._reserve.room() < min(self._limits.reserve_bytes // 8, _START_BYTES):
                raise SpoolFull(self.health.reason or "no room on the disk")
            return
        if self.health.state is State.FULL:
            if not self._reserve.restore():
                missing = self._reserve.missing()
                raise SpoolFull(self.health.reason or str(missing)) if isinstance(missing, SpoolFull) else missing
        elif not self._reserve.present and not self._reserve.restore():
            raise self._reserve.missing()

    def _let_go(self) -> None:
        """Our files are gone: SQLite would go on writing into what nobody can open any more, also into the chunk that
        was made ahead. Closed now, while no other file stands in their place: it takes a log away by its name."""
        gone, self._chunk = self._chunk, None
        if gone is not None:
            gone.close()
        self.house.let_go()

    def _abandon(self, chunk: Chunk) -> None:
        """A file that failed: leave it; what it confirmed is copied out of it, off this thread."""
        self._chunk = None
        log.error("a chunk failed and is not written again", extra={"facts": {"chunk": str(chunk.path)}})
        self.house.replace(chunk, self._at.last_seq)


def _log_bytes(size_bytes: int, rows: int) -> int:
    """About how much a transaction adds to the log: its full pages, one begun page and one parent a row."""
    return (size_bytes // PAGE_BYTES + 2 * rows) * PAGE_BYTES
