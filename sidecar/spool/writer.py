"""The one thread that writes: batches in, durable commits out, in the order of arrival.

Group commit: while one commit runs, the next batches gather in the queue. What must always hold
- A batch is handed back exactly once, after it is on disk; none is dropped, however long the disk takes nothing.
- Batches are committed in order, so what a batch says of the intake's count is true of the disk once it is there.
- A segment that failed is not written again: what was unconfirmed goes to a new one.
- `recorded` is counted here, from the lines that were written, and nowhere else.

Whatever a commit should not wait for is done by `Maintenance` on a thread of its own: the next segment is made ahead,
full ones are sealed, failed ones replaced by what they confirmed. What may be let in, and how long a response waits,
is the recorder's.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol, TypeVar

from sidecar.spool import files
from sidecar.spool.recovery import Position
from sidecar.spool.repair import repair
from sidecar.spool.segment import BEGINS, CommitMark, Confirmed, Group, Segment
from sidecar.spool.types import REMOVED, Batch, Health, Limits, SpoolError, SpoolFailed, SpoolFull, State

log = logging.getLogger("sidecar.spool")

_T = TypeVar("_T")

# How often to look whether the reserve and the segment are still there: a commit takes 0.1 ms, so not before each.
_LOOK_S: Final = 0.1
_START_BYTES: Final = 4 << 20  # left alone for the next start
_LAST_TRY_S: Final = 2.0  # at the end: what may fit into the reserve's room is 64 MiB at most
_RETRY_S: Final = 0.02  # between tries to seal segments while closing


class CreateSegment(Protocol):
    def __call__(self, path: Path, number: int, instance: str, *, allocate_bytes: int) -> Segment: ...


class Committed(NamedTuple):
    """What one commit stored, for the loop."""

    batches: tuple[Batch, ...]
    records: int
    size_bytes: int
    seconds: float
    recorded: int  # cumulative
    last_seq: int


class Plan(NamedTuple):
    """One commit, and what it changes in the calls that are open."""

    group: Group
    opened: dict[str, bytes]
    closed: list[str]


def make_plan(at: Position, batches: list[Batch], now_ns: int, *, begins: bool) -> Plan:
    """One commit, worked out before the disk is asked. Changes nothing.

    The lines of `batches` have consecutive numbers. `begins`: the segment's first, which restates what is open.
    """
    lines = [line for batch in batches for line in batch.lines]
    opened = {id_: line for batch in batches for id_, line in batch.opens}
    closed = [id_ for batch in batches for id_ in batch.closes]
    if opened and closed:  # opened and closed inside one commit: nobody need ever know
        both = opened.keys() & set(closed)
        opened = {id_: line for id_, line in opened.items() if id_ not in both}
        closed = [id_ for id_ in closed if id_ not in both]
    origins = [origin for batch in batches for origin in batch.origins]
    intents, closes = opened, closed
    if begins:
        gone = set(closed)
        intents = {id_: line for id_, line in (at.open_intents | opened).items() if id_ not in gone}
        closes, origins = [], [*at.origins.items(), *origins]
    last = batches[-1]
    group = Group(
        commit_number=at.commit_number + 1,
        first_seq=next((batch.first_seq for batch in batches if batch.lines), at.last_seq + 1),
        committed_ns=now_ns,
        admitted=last.admitted,
        recorded=at.recorded + len(lines),
        lines=lines,
        intents=list(intents.values()),
        lost=last.lost,
        closes=closes,
        origins=origins,
        flags=BEGINS if begins else 0,
    )
    return Plan(group, opened, closed)


class Writer:
    """Owns the segment being written. `store` may be called directly before `start`, never after."""

    def __init__(
        self, root: Path, position: Position, limits: Limits, *, create: CreateSegment = Segment.create
    ) -> None:
        self._at = position
        self._limits = limits
        self._root = root
        self._reserve = files.Reserve(root, limits.reserve_bytes, limits.recover_margin_bytes)
        self._mark = CommitMark(files.slot_dir(root, position.instance))
        self._looked_s = 0.0
        self._queue: queue.SimpleQueue[Batch | None] = queue.SimpleQueue()
        self._next: Batch | None = None  # taken from the queue, and not fit for the commit before
        self._segment: Segment | None = None
        self._segment_since_s = 0.0
        self._thread = threading.Thread(target=self._run, name="spool-writer", daemon=True)
        self._stopping = threading.Event()
        self._gave_up = False
        self._last_try = False
        self._report: Callable[[Committed], None] = lambda committed: None
        self.maintenance = Maintenance(
            root, position.instance, limits, create, disk_is_full=lambda: self.health.state is State.FULL
        )
        self.health = Health()  # replaced as a whole, so any thread may read it

    @property
    def position(self) -> Position:
        return self._at

    @property
    def submit(self) -> Callable[[Batch], None]:
        """Hand a batch over. Never waits."""
        return self._queue.put

    def start(self, report: Callable[[Committed], None]) -> None:
        """From now on batches are committed on the thread; `report` is called there after each commit."""
        self._report = report
        self._thread.start()

    def stop(self) -> bool:
        """Commit what was handed over, seal the segment, end the threads. False: something could not be written."""
        deadline_s = time.monotonic() + self._limits.stop_s
        if self._thread.ident is not None:
            self._queue.put(None)
            self._thread.join(self._limits.stop_s)
            self._stopping.set()
            self._thread.join(max(self._limits.retry_s_max, _LAST_TRY_S))
        self._stopping.set()
        if self._thread.is_alive():  # a sync that does not come back
            self.maintenance.leave()
            return False
        if self._segment is not None:
            self.maintenance.put_away(self._segment)
        self.maintenance.stop(deadline_s)
        self._mark.close()
        return not self._gave_up

    # The thread. A mistake of ours ends it, and the process with it (`threading.excepthook`): a group may be on disk
    # that `_at` does not know of, and would be written again. The next process reads what is there.

    def _run(self) -> None:
        ending = False
        while not ending or self._next is not None:
            first = self._next or self._queue.get()
            self._next = None
            if first is None:
                break
            batches, ending = self._gather(first, ending)
            started_s = time.perf_counter()
            group = self._store_until_done(batches)
            if group is None:
                return
            took_s = time.perf_counter() - started_s
            size = sum(map(len, group.lines))
            self._report(
                Committed(tuple(batches), len(group.lines), size, took_s, self._at.recorded, self._at.last_seq)
            )

    def _gather(self, first: Batch, ending: bool) -> tuple[list[Batch], bool]:
        """What is waiting, up to one commit's size and as long as its numbers have no gap; whether the end was met."""
        batches, size = [first], first.size_bytes
        next_seq = first.first_seq + len(first.lines) if first.lines else None
        while size < self._limits.transaction_bytes and not ending:
            try:
                batch = self._queue.get_nowait()
            except queue.Empty:
                break
            if batch is None:
                return batches, True
            if batch.lines:
                if next_seq is not None and batch.first_seq != next_seq:
                    self._next = batch
                    break
                next_seq = batch.first_seq + len(batch.lines)
            batches.append(batch)
            size += batch.size_bytes
        return batches, ending

    def _store_until_done(self, batches: list[Batch]) -> Group | None:
        """Try for as long as it takes; None when we are stopping and it did not work."""
        wait_s = self._limits.retry_s_min
        while True:
            try:
                return self.store(batches)
            except SpoolError as error:
                self.note(error)
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

    def store(self, batches: list[Batch]) -> Group:
        """One try at one commit. Raises `SpoolFull` or `SpoolFailed`; then nothing of it counts."""
        self._look()
        self._look_for_room()
        segment = self._segment or self._take_segment()
        plan = make_plan(self._at, batches, time.time_ns(), begins=not segment.begun)
        try:
            segment.append(plan.group)
        except SpoolFull:
            self._reserve.give_up()
            if segment.broken:
                self._abandon(segment)
            raise
        except SpoolError:
            self._abandon(segment)
            raise
        self._confirm(segment, plan)
        if self.health.state is not State.OK:
            log.warning("the spool writes again")
            self.health = Health()
            self.maintenance.retry()
        return plan.group

    def _confirm(self, segment: Segment, plan: Plan) -> None:
        """It is on disk: say so, move on, and change the segment when it is full or old."""
        group = plan.group
        self._mark.write(Confirmed(segment.number, group.commit_number, group.last_seq, group.recorded))
        at = self._at
        at.commit_number, at.last_seq = group.commit_number, group.last_seq
        at.admitted, at.recorded, at.lost = group.admitted, group.recorded, dict(group.lost)
        at.open_intents.update(plan.opened)
        for id_ in plan.closed:
            at.open_intents.pop(id_, None)
        at.note_origins(group.origins)
        limits = self._limits
        if segment.end >= limits.segment_bytes or time.monotonic() - self._segment_since_s >= limits.segment_age_s:
            self._segment = None
            self.maintenance.put_away(segment)
        elif not self.maintenance.has_ahead and segment.end >= limits.segment_bytes // 2:
            self.maintenance.order(self._next_number())

    def _take_segment(self) -> Segment:
        """The segment that was made ahead, or one made now."""
        try:
            segment = self.maintenance.take() or self.maintenance.make(self._next_number())
        except SpoolFull:
            self._reserve.give_up()
            raise
        self._segment = segment
        self._segment_since_s = time.monotonic()
        return segment

    def _next_number(self) -> int:
        self._at.segment_number += 1
        return self._at.segment_number

    def _look(self) -> None:
        """Records may not use the reserve's room: where it was given up it has to be made again first.

        Another writer of this directory may have given it up, and somebody may have removed our file.
        """
        now_s = time.monotonic()
        if self.health.state is State.OK and now_s - self._looked_s < _LOOK_S:
            return
        self._looked_s = now_s
        self._look_for_root()
        if self._segment is not None and not self._segment.path.exists():
            path = self._segment.path
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

    def _look_for_root(self) -> None:
        """Before anything else: whatever fails next in a directory that is not there says nothing of the reason."""
        if not self._root.is_dir():
            self._let_go()
            raise SpoolFailed(f"{self._root} is not there: {REMOVED}")

    def _look_for_room(self) -> None:
        """Before each commit. The segment may have room that was taken ahead, but delivery has none then: it waits for
        the reserve to be given up, and nobody else notices that the disk is full."""
        limits = self._limits
        if self._last_try or not limits.reserve_bytes or self._reserve.room() >= limits.allocate_bytes:
            return
        self._look_for_root()
        self._reserve.give_up()
        raise SpoolFull(
            f"no room is left on the disk of {self._root}: free some; records wait in memory until there is"
        )

    def _let_go(self) -> None:
        """Our files are gone: what is written to them from now on can be opened by nobody, also in the segment that
        was made ahead."""
        gone, self._segment = self._segment, None
        if gone is not None:
            gone.close()
        self._mark.close()
        self.maintenance.let_go()

    def _abandon(self, segment: Segment) -> None:
        """A segment that failed: leave it; what it confirmed is copied out of it, off this thread."""
        self._segment = None
        log.error("a segment failed and is not written again", extra={"facts": {"segment": str(segment.path)}})
        self.maintenance.replace(segment, self._at.commit_number)


class Maintenance:
    """The segments of one slot that nobody writes, on a thread of their own.

    A segment belongs to the writer until it is handed in here, and to this thread from then on.
    """

    def __init__(
        self, root: Path, instance: str, limits: Limits, create: CreateSegment, *, disk_is_full: Callable[[], bool]
    ) -> None:
        self._disk_is_full = disk_is_full
        self._root = root
        self._instance = instance
        self._limits = limits
        self._create = create
        self._ahead: Future[Segment] | None = None
        self._unsealed: list[Segment] = []  # only the thread touches it
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="spool-maintenance")

    # For the writer

    @property
    def has_ahead(self) -> bool:
        return self._ahead is not None

    def order(self, number: int) -> None:
        """Have the next segment made."""
        self._ahead = self._order(self.make, number)

    def take(self) -> Segment | None:
        """The segment that was ordered, if it was and could be made."""
        ahead, self._ahead = self._ahead, None
        try:
            return None if ahead is None else ahead.result()
        except SpoolError as error:
            log.warning("the next segment could not be made ahead: %s", error)
            return None

    def let_go(self) -> None:
        """Forget the segment that was ordered: its file is gone, or will be."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            self._order(self._discard, ahead)

    def make(self, number: int) -> Segment:
        """A new segment, at once. Raises `SpoolError`."""
        path = files.segment_path(files.slot_dir(self._root, self._instance), number)
        step = min(self._limits.allocate_bytes, self._limits.segment_bytes)
        return self._create(path, number, self._instance, allocate_bytes=step)

    def put_away(self, segment: Segment) -> None:
        """Nothing more will be written to it: seal it; one that was never begun is removed."""
        self._order(self._seal if segment.begun else self._drop, segment)

    def replace(self, segment: Segment, upto_commit: int) -> None:
        """It failed: copy out what was confirmed, which is nothing where it failed at its first commit."""
        if segment.begun:
            self._order(self._replace, segment, upto_commit)
        else:
            self._order(self._drop, segment)

    def retry(self) -> None:
        """There is room again: seal what had to wait."""
        self._order(self._seal_all)

    def stop(self, deadline_s: float) -> None:
        """Finish what was ordered, as far as the disk lets us until then (monotonic time)."""
        self.let_go()
        self._order(self._seal_rest, deadline_s)
        self._thread.shutdown(wait=True)

    def leave(self) -> None:
        """Do not wait: a file that is still being written cannot be touched."""
        self._thread.shutdown(wait=False)

    def quiet(self) -> None:
        """Wait until all that was ordered so far is done."""
        self._thread.submit(int).result()

    def _order(self, work: Callable[..., _T], *args: Any) -> Future[_T]:
        ordered = self._thread.submit(work, *args)
        ordered.add_done_callback(_tell_mistake)
        return ordered

    # On the thread

    def _seal(self, segment: Segment) -> None:
        self._unsealed.append(segment)
        self._seal_all()

    def _seal_all(self) -> None:
        if self._disk_is_full():
            return  # the room that is left is delivery's; a segment that is not sealed holds everything as well
        waiting, self._unsealed = self._unsealed, []
        for segment in waiting:
            upto = segment.commit_number
            try:
                segment.seal()
            except SpoolError as error:
                if isinstance(error, SpoolFull) and not segment.broken:
                    self._unsealed.append(segment)  # tried again with the next one, or when there is room
                    continue
                log.error("a full segment could not be sealed: %s", error)
                self._replace(segment, upto)

    def _seal_rest(self, deadline_s: float) -> None:
        """At the end: what still cannot be sealed is dealt with by the next start."""
        self._seal_all()
        while self._unsealed and time.monotonic() < deadline_s:
            time.sleep(_RETRY_S)
            self._seal_all()
        for segment in self._unsealed:
            segment.close()

    def _replace(self, segment: Segment, upto_commit: int) -> None:
        try:
            segment.close()
            done = repair(self._root, self._instance, segment.path, segment.number, upto=upto_commit)
            facts = {"set_aside": str(done.set_aside), "records_salvaged": done.records}
            log.error("a segment that failed was set aside", extra={"facts": facts})
        except (SpoolError, OSError) as error:
            # Readers go on reading it where it is; the next start tries again.
            log.error("what a failed segment holds could not be copied out yet: %s", error)

    def _drop(self, segment: Segment) -> None:
        try:
            segment.close()
            segment.path.unlink(missing_ok=True)
        except OSError as error:
            log.warning("an unused segment could not be removed: %s", error)

    def _discard(self, ahead: Future[Segment]) -> None:
        try:
            self._drop(ahead.result())
        except SpoolError:
            return


def _tell_mistake(ordered: Future[Any]) -> None:
    """What cannot be done is told where it is done; a mistake of ours would be told by nobody."""
    error = None if ordered.cancelled() else ordered.exception()
    if error is not None and not isinstance(error, SpoolError):
        log.error("a segment is left as it is; the next start looks after it", exc_info=error)
