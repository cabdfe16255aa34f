"""The spool as its one writer holds it: open, hand over, be told, retire, close.

A slot (`spool/<instance>/`) is locked for as long as this process has it. Opening recovers what a crash left, settles
calls that were found open, and begins a new segment, so numbers and totals go on where they stopped. The event
loop only ever hands over (`submit`) and is told (`Batch.done`, `on_committed`); waiting for the disk is the writer's.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Final, Protocol

from sidecar.spool import files, last_words
from sidecar.spool.recovery import Recovered, recover
from sidecar.spool.retention import retire_segments
from sidecar.spool.segment import Segment
from sidecar.spool.types import (
    Batch,
    Health,
    Limits,
    Snapshot,
    SpoolFailed,
    SpoolFull,
    SpoolLocked,
    SpoolTotals,
    State,
    Tally,
    settle,
)
from sidecar.spool.writer import Committed, CreateSegment, Writer

log = logging.getLogger("sidecar.spool")

LAST_WORDS_S: Final = 2.0  # how long the end of a life waits for a disk to take the count of what it did not take
_BEGIN_TRIES: Final = 3  # at opening: a sync that fails once must not keep the service from starting


class SpoolMetrics(Protocol):
    def committed(self, records: int, size_bytes: int, seconds: float) -> None: ...


class Spool:
    """One slot, open for writing."""

    def __init__(
        self,
        root: Path,
        instance: str,
        lock: files.FileLock,
        writer: Writer,
        recovered: Recovered,
        settled: int,
        metrics: SpoolMetrics | None,
    ) -> None:
        self.root = root
        self.instance = instance
        self.settled = settled  # calls found open after a crash, now records with outcome `unknown`
        self.set_aside = tuple(recovered.set_aside)  # damaged files met at opening
        self.stopped = recovered.stopped  # calls that the last life lost at its end
        self.unwritten = 0  # calls that the disk did not take until the end: known after `close`
        self._lock = lock
        self._writer = writer
        self._metrics = metrics
        self._loop: asyncio.AbstractEventLoop | None = None
        self._callbacks: list[Callable[[], None]] = []
        at = writer.position
        self._origins = dict(at.origins)
        self._open_intents: Mapping[str, bytes] = {}
        self.tally = Tally(admitted=at.admitted, lost=dict(at.lost))
        self.tally.open = len(at.open_intents) - settled  # those that may go on
        self._recorded = at.recorded
        self._last_seq = at.last_seq
        self._next_seq = at.last_seq + settled + 1

    @classmethod
    def open(
        cls,
        root: Path,
        *,
        instance: str | None = None,
        metrics: SpoolMetrics | None = None,
        limits: Limits | None = None,
        remembered_seq: Callable[[str], int] = lambda instance: 0,
        create: CreateSegment = Segment.create,
        goes_on: Callable[[str], bool] = lambda id_: False,
    ) -> Spool:
        """Take a slot (by name, else the first that nobody holds, else a new one), recover it, begin a new segment.

        `remembered_seq` says the greatest number that delivery knows of a slot: where that is more than the files
        hold, the difference is reported as loss and no number is given twice. `goes_on` says of the id of a call that
        was found open whether it still is: then it is not settled (`open_intents`). Raises `SpoolLocked` or another
        `SpoolError`.
        """
        files.make_directory(files.spool_dir(root))
        instance, lock = _take_slot(root, instance)
        try:
            return cls._open_locked(
                root, instance, lock, metrics, limits or Limits(), remembered_seq(instance), create, goes_on
            )
        except BaseException as error:
            lock.release()
            if isinstance(error, OSError):
                raise files.translate(error, f"cannot open the spool {instance}") from error
            raise

    @classmethod
    def _open_locked(
        cls,
        root: Path,
        instance: str,
        lock: files.FileLock,
        metrics: SpoolMetrics | None,
        limits: Limits,
        remembered_seq: int,
        create: CreateSegment,
        goes_on: Callable[[str], bool],
    ) -> Spool:
        files.Reserve(root, limits.reserve_bytes, limits.recover_margin_bytes).restore()
        recovered = recover(root, instance, remembered_seq=remembered_seq)
        opening = _settling_batch(recovered, goes_on)
        goes_on_now = {id_: line for id_, line in recovered.position.open_intents.items() if goes_on(id_)}
        writer = Writer(root, recovered.position, limits, create=create)
        spool = cls(root, instance, lock, writer, recovered, len(opening.lines), metrics)
        spool._open_intents = goes_on_now
        try:
            if _begin(writer, opening):
                last_words.keep_room(files.slot_dir(root, instance))
            else:
                spool._wait_with(opening)
        except BaseException:
            writer.stop()
            raise
        _tell_stopped(recovered.stopped, instance)
        spool._recorded, spool._last_seq = writer.position.recorded, writer.position.last_seq
        for segment in recovered.to_seal:
            writer.maintenance.put_away(segment)
        if writer.health.state is State.OK:  # what they restate stands in the new segment now
            for path in recovered.empty:
                path.unlink(missing_ok=True)
        return spool

    def _wait_with(self, opening: Batch) -> None:
        """The disk is full: start all the same, and let the settled calls wait with the others."""
        self.tally.open += len(opening.lines)
        opening.done = self._settled_late
        self._writer.submit(opening)

    def _settled_late(self, batch: Batch) -> None:
        self.tally.open -= len(batch.lines)

    @property
    def next_seq(self) -> int:
        """The number after the last one given at opening; from then on the recorder counts."""
        return self._next_seq

    def submit(self, batch: Batch) -> None:
        """Hand a batch to the writer, in order, from the event loop. Never waits."""
        self._writer.submit(batch)

    def on_committed(self, callback: Callable[[], None]) -> None:
        """Have `callback` called on the loop after each commit that brought records."""
        self._callbacks.append(callback)

    def snapshot(self) -> Snapshot:
        """Totals and last number of one moment, as the loop knows them. Its terms are counted apart."""
        tally = self.tally
        totals = SpoolTotals(admitted=tally.admitted, recorded=self._recorded, open=tally.open, lost=dict(tally.lost))
        return Snapshot(totals, self._last_seq)

    @property
    def open_intents(self) -> Mapping[str, bytes]:
        """Calls that were open at opening and go on, by id: their lines."""
        return self._open_intents

    def origins(self) -> Mapping[bytes, int]:
        """The greatest frame number that was on disk at opening, by source: sent again, those up to it are recorded.

        Of the last `ORIGINS_KEPT` sources that were heard of. What is committed from then on, `Batch.done` tells.
        """
        return self._origins

    def health(self) -> Health:
        return self._writer.health

    def retire(self, before: int, *, retention_s: float, retention_bytes: int) -> int:
        """Remove whole segments of records below `before` (all delivered), too old or too many. Answers how many.

        Touches the disk: call it from a thread.
        """
        return retire_segments(self.root, self.instance, before, retention_s, retention_bytes)

    async def __aenter__(self) -> Spool:
        self._loop = asyncio.get_running_loop()
        self._writer.start(self._committed)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Commit what was handed over, seal the segment, let go of the slot. Safe to call twice."""
        # Shielded: being cancelled here must not leave a thread writing into a slot that is free for others.
        await asyncio.shield(asyncio.to_thread(self.close))
        await asyncio.sleep(0)  # let the loop hear of the last commits

    def close(self) -> None:
        """The same without a loop."""
        if not self._writer.stop() and self._lock.held:
            self._leave_word()
        self._lock.release()

    def _leave_word(self) -> None:
        """The disk took nothing until the end of the wait: say what is lost, there and in the log."""
        at, tally = self._writer.position, self.tally
        lost = {**at.lost, **tally.lost}
        kept = at.recorded + len(at.open_intents) + sum(lost.values())
        self.unwritten = max(tally.admitted - kept, 0)
        reason = self._writer.health.reason or "the disk took nothing"
        wrote = self._write_note(last_words.Note(tally.admitted, dict(lost)))
        if self.unwritten:
            log.error(
                "%d calls were served and their records are lost: %s; %s",
                self.unwritten,
                reason,
                "the balance says so after the next start (lost: stopped)"
                if wrote is None
                else f"not even their number could be kept ({wrote}): no balance will say so",
                extra={"facts": {"calls": self.unwritten, "kept_in_balance": wrote is None}},
            )

    def _write_note(self, note: last_words.Note) -> str | None:
        """Why it could not be written; None where it was. On a thread of its own: a stuck disk may not let go."""
        said: list[str | None] = []

        def write() -> None:
            try:
                last_words.write(files.slot_dir(self.root, self.instance), note)
                said.append(None)
            except OSError as error:
                said.append(error.strerror or str(error))

        thread = threading.Thread(target=write, name="spool-last-words", daemon=True)
        thread.start()
        thread.join(LAST_WORDS_S)
        return said[0] if said else "the disk does not answer"

    def __repr__(self) -> str:
        totals = self.snapshot().totals
        return f"<Spool {self.instance}: {totals.recorded} recorded, {totals.open} open>"

    def _committed(self, committed: Committed) -> None:
        """On the writer thread."""
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):  # the loop is gone: nobody waits for an answer any more
            self._loop.call_soon_threadsafe(self._told, committed)

    def _told(self, committed: Committed) -> None:
        """On the loop: first the numbers, then who waits for them."""
        self._recorded = committed.recorded
        self._last_seq = committed.last_seq
        for batch in committed.batches:
            if batch.done is not None:
                _tell(batch.done, batch)
        if committed.records:
            if self._metrics is not None:
                _tell(self._metrics.committed, committed.records, committed.size_bytes, committed.seconds)
            for callback in self._callbacks:
                _tell(callback)


def _tell(told: Callable[..., None], *args: object) -> None:
    """One that is told of a commit and fails is no reason for the others not to hear of it: calls wait for it."""
    try:
        told(*args)
    except Exception:
        log.exception("a commit could not be told to everybody")


def adopt_orphans(
    root: Path, *, limits: Limits | None = None, stopped: Callable[[int], None] = lambda calls: None
) -> list[str]:
    """Settle the slots that nobody holds; what is in order already stays untouched. Answers those looked after.

    `stopped` hears of calls that the last life of a slot lost at its end.
    """
    adopted: list[str] = []
    for instance in files.instances(root):
        if files.is_frozen(root, instance):
            continue  # its open calls may go on elsewhere, and so may its numbers
        try:
            lock = files.FileLock(files.slot_dir(root, instance) / "lock")
        except SpoolLocked:
            continue
        try:
            if (lost := _adopt(root, instance, limits or Limits())) is not None:
                adopted.append(instance)
                if lost:
                    stopped(lost)
        except (SpoolFull, SpoolFailed, OSError) as error:
            log.error("the spool %s was left as it is: %s", instance, error)  # the next start tries again
        finally:
            lock.release()
    return adopted


def _adopt(root: Path, instance: str, limits: Limits) -> int | None:
    """Settle one slot whose lock is held. How many calls its last life had lost; None: it was in order."""
    recovered = recover(root, instance)
    if recovered.clean:
        return None
    writer = Writer(root, recovered.position, limits)
    for segment in recovered.to_seal:
        writer.maintenance.put_away(segment)
    try:
        writer.store([_settling_batch(recovered)])
        last_words.forget(files.slot_dir(root, instance))
    finally:
        writer.stop()
    _tell_stopped(recovered.stopped, instance)
    return recovered.stopped


def _tell_stopped(calls: int, instance: str) -> None:
    if calls:
        log.error(
            "calls of the last run are lost: its records waited in memory when it was stopped",
            extra={"facts": {"calls": calls, "instance": instance}},
        )


def _take_slot(root: Path, instance: str | None) -> tuple[str, files.FileLock]:
    if instance is not None:
        return instance, _lock_slot(root, files.check_instance(instance))
    for name in files.instances(root):
        if not files.is_frozen(root, name):
            with contextlib.suppress(SpoolLocked):
                return name, _lock_slot(root, name)
    while True:
        name = files.new_instance()
        with contextlib.suppress(SpoolLocked):  # another worker that starts now found our new slot before we locked it
            return name, _lock_slot(root, name)


def _lock_slot(root: Path, name: str) -> files.FileLock:
    slot = files.slot_dir(root, name)
    files.make_directory(slot)
    return files.FileLock(slot / "lock")


def _settling_batch(recovered: Recovered, goes_on: Callable[[str], bool] = lambda id_: False) -> Batch:
    """Records of the calls that were found open; they close their intents in the same transaction."""
    at = recovered.position
    batch = Batch(first_seq=at.last_seq + 1, admitted=at.admitted, lost=dict(at.lost))
    left = [(id_, intent) for id_, intent in at.open_intents.items() if not goes_on(id_)]
    for seq, (id_, intent) in enumerate(left, at.last_seq + 1):
        line = settle(intent, seq=seq, instance=at.instance)
        batch.lines.append(line)
        batch.closes.append(id_)
        batch.size_bytes += len(line)
    return batch


def _begin(writer: Writer, opening: Batch) -> bool:
    """Begin the new segment. False: the disk is full, it will be begun when there is room."""
    tries = 0
    while True:
        tries += 1
        try:
            writer.store([opening])
            return True
        except SpoolFull as error:
            writer.note(error)
            return False
        except SpoolFailed as error:
            if tries == _BEGIN_TRIES:
                raise
            log.warning("a new segment failed, another is tried: %s", error)
