"""The intake: gives each call its id, its number and its record, and holds the last byte until that is on disk.

Everything here runs on the event loop and is synchronous, so an exchange can be ended while its task is being
cancelled. What must always hold
- An admitted exchange ends in exactly one place: recorded, or counted lost with a reason.
- Every `release` is called exactly once, on the loop.
- Memory is bounded by `memory_bytes`; beyond it the policy decides, and what is lost is counted.
- The balance's `admitted`, `open` and `lost` are counted here; `recorded` is the writer's.

A call open for more than `INTENT_AGE_S` has its intent on disk; a shorter one never writes one. How records
reach the disk is the spool's.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Final, Protocol

from sidecar.model.exchange import Exchange, Release
from sidecar.model.record import encode
from sidecar.model.record_id import CHANCE_BYTES, Ids
from sidecar.settings import Durability, OnSpoolFull
from sidecar.spool.types import Batch, Health, State, Tally, encode_intent

log = logging.getLogger("sidecar.recorder")

# design.md section 6. Fresh calls are looked at twice in this time: at the first look a call is young, at the second
# it is old and its intent goes to the disk, 10 to 20 ms after admission.
INTENT_AGE_S: Final = 0.020
# durability.md section 1: a record older than this and not on disk makes `buffered` wait like `committed`.
BUFFERED_AGE_S: Final = 0.020
# In `buffered` records gather before they go to the writer: a commit costs 100 µs of CPU whatever is in it, and the
# hand-over between two threads as much again. How long depends on what the disk needs of the 20 ms.
GATHER_S_MAX: Final = 0.015
GATHER_S_MIN: Final = 0.002
COMMITS_REMEMBERED: Final = 5  # about so many of the last make up the usual time
# What a waiting line costs beside its bytes (object header, list slots, its share of the batch).
_LINE_OVERHEAD_BYTES: Final = 128


class Gathering:
    """How long records may wait for company, so that a commit of twice the usual time still fits into the bound."""

    def __init__(self) -> None:
        self._commit_s = 0.0
        self.seconds = GATHER_S_MAX

    def committed(self, took_s: float) -> None:
        self._commit_s += (took_s - self._commit_s) / COMMITS_REMEMBERED
        self.seconds = min(max(BUFFERED_AGE_S - 2 * self._commit_s, GATHER_S_MIN), GATHER_S_MAX)


class RecorderMetrics(Protocol):
    def call_ended(self, exchange: Exchange) -> None: ...
    def lost(self, reason: str, count: int) -> None: ...
    def released_uncommitted(self, count: int) -> None: ...


class IntakeSpool(Protocol):
    """A spool as far as it is needed here."""

    tally: Tally

    @property
    def instance(self) -> str: ...
    @property
    def next_seq(self) -> int: ...
    def submit(self, batch: Batch) -> None: ...
    def health(self) -> Health: ...


class SpoolRecorder:
    """`exchange.Recorder`, over a spool."""

    def __init__(
        self,
        spool: IntakeSpool,
        metrics: RecorderMetrics,
        *,
        durability: Durability | str = Durability.COMMITTED,
        on_full: OnSpoolFull | str = OnSpoolFull.PASS,
        commit_wait_s: float = 1.0,
        memory_bytes: int = 64 << 20,
        clock_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self._spool = spool
        self._metrics = metrics
        self._buffered = Durability(durability) is Durability.BUFFERED
        self._refuse = OnSpoolFull(on_full) is OnSpoolFull.REFUSE
        self._commit_wait_s = commit_wait_s
        self._memory_bytes = memory_bytes
        self._clock_ns = clock_ns
        self._ids = Ids(os.urandom(CHANCE_BYTES))
        self._tally = spool.tally
        self._instance = spool.instance
        self._seq = spool.next_seq - 1
        # Where an open call is: young, old (next look writes its intent), or with its intent handed over.
        self._young: dict[str, Exchange] = {}
        self._old: dict[str, Exchange] = {}
        self._intended: dict[str, Exchange] = {}
        self._look: asyncio.TimerHandle | None = None
        self._filling: Batch | None = None  # this loop turn's
        self._in_flight: deque[Batch] = deque()  # handed over and not yet on disk, oldest first
        self._gathering = Gathering()
        self._waiting_bytes = 0
        self._overdue: asyncio.TimerHandle | None = None
        self._lost_told = spool.tally.lost  # as of the last batch
        self._degraded: str | None = None  # since a wait ran out, until a commit succeeds
        self._loop: asyncio.AbstractEventLoop = asyncio.get_running_loop()
        self._idle = asyncio.Event()
        self._idle.set()

    # The contract of the proxy

    def admit(self, exchange: Exchange) -> bool:
        if self._refuse and self._cannot_promise():
            return False
        now_ns = self._clock_ns()
        exchange.id = id_ = self._ids.next(now_ns)
        exchange.started_ns = now_ns
        exchange.started_mono_ns = time.monotonic_ns()
        tally = self._tally
        tally.admitted += 1
        tally.open += 1
        tally.unseen += 1
        self._young[id_] = exchange
        if self._look is None:
            self._look = self._loop.call_later(INTENT_AGE_S / 2, self._look_at_open)
        return True

    def complete(self, exchange: Exchange, release: Release | None) -> bool:
        id_ = exchange.id
        intended = False
        if self._young.pop(id_, None) is None and self._old.pop(id_, None) is None:
            if self._intended.pop(id_, None) is None:
                return True  # ended before, or never admitted
            intended = True
        if exchange.duration_ms is None:
            exchange.duration_ms = (time.monotonic_ns() - exchange.started_mono_ns) / 1e6
        self._metrics.call_ended(exchange)
        self._seq += 1
        # With `refuse` nothing more is let in by now, and what was let in is taken: it is bounded by the calls open.
        if self._waiting_bytes >= self._memory_bytes and not self._refuse:
            self._lose(id_, intended)
            return True
        line = encode(exchange, seq=self._seq, instance=self._instance)
        batch = self._batch_for(self._seq)
        batch.lines.append(line)
        size = len(line) + _LINE_OVERHEAD_BYTES
        batch.size_bytes += size
        self._waiting_bytes += size
        if intended:
            batch.closes.append(id_)
        else:
            self._tally.unseen -= 1
        if release is None:
            return True
        return not self._hold(batch, release)

    # What others ask

    def health(self) -> Health:
        """For `/readyz`: the recorder's own promise first, then how writing goes."""
        spool = self._spool.health()
        if spool.state is not State.OK:
            return spool
        if self._memory_full():
            return Health(State.FULL, "the memory behind the disk is full")
        return Health(State.DEGRADED, self._degraded) if self._degraded is not None else spool

    def suspend(self, reason: str) -> None:
        """No commit is to be waited for until there was one."""
        self._degraded = reason

    @property
    def refusing(self) -> bool:
        """Whether calls are turned away at admission just now: `/readyz` then answers 503."""
        return self._refuse and self._cannot_promise()

    @property
    def open_calls(self) -> int:
        return len(self._young) + len(self._old) + len(self._intended)

    async def __aenter__(self) -> SpoolRecorder:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Write intents of what is still open and wait for the commits, as long as the disk takes any."""
        if self._look is not None:
            self._look.cancel()
            self._look = None
        self._old.update(self._young)
        self._young.clear()
        self._write_intents()
        self._open_batch()  # also when nothing is waiting: the totals are true to the last call
        self._hand_over()
        try:
            async with asyncio.timeout(self._commit_wait_s + 1.0):
                await self._idle.wait()
        except TimeoutError:
            calls = sum(len(batch.lines) for batch in self._in_flight)
            log.error("stopping with %d records that are not on disk yet", calls)
        if self._overdue is not None:
            self._overdue.cancel()
            self._overdue = None

    def __repr__(self) -> str:
        return f"<SpoolRecorder: {self.open_calls} open, {len(self._in_flight)} batches waiting>"

    # Holding answers

    def _hold(self, batch: Batch, release: Release) -> bool:
        """Whether the answer waits; then `release` is kept with the batch."""
        if self._degraded is not None and not self._refuse:
            self._metrics.released_uncommitted(1)
            return False
        if self._buffered and not self._refuse_now() and not self._is_late():
            return False
        if self._buffered and not batch.releases:
            self._loop.call_soon(self._flush, batch)  # somebody waits: no more gathering
        batch.releases.append(release)
        return True

    def _refuse_now(self) -> bool:
        return self._refuse and self._degraded is not None

    def _is_late(self) -> bool:
        """Whether the oldest record that is not on disk is older than `buffered` allows."""
        return bool(self._in_flight) and self._loop.time() - self._in_flight[0].since_s > BUFFERED_AGE_S

    def _wait_ran_out(self) -> None:
        """A timer's call: the oldest held answer has waited `commit_wait_s`, or it is time to look again."""
        self._overdue = None
        now_s = self._loop.time()
        oldest = next((batch for batch in self._in_flight if batch.releases), None)
        if oldest is None:
            return
        if now_s < oldest.since_s + self._commit_wait_s:
            self._overdue = self._loop.call_at(oldest.since_s + self._commit_wait_s, self._wait_ran_out)
            return
        if self._degraded is None:
            self._degraded = f"no commit within {self._commit_wait_s:g} s"
            log.error("the disk is slow or stuck: %s", self._degraded)
        if self._refuse:
            self._release_all(False, upto_s=now_s - self._commit_wait_s)
            self._arm()
        else:
            self._metrics.released_uncommitted(self._release_all(True, upto_s=now_s))

    def _release_all(self, granted: bool, *, upto_s: float) -> int:
        released = 0
        for batch in list(self._in_flight):
            if batch.since_s <= upto_s and batch.releases:
                released += self._release(batch, granted)
        return released

    def _release(self, batch: Batch, granted: bool) -> int:
        releases, batch.releases = batch.releases, []
        for release in releases:
            try:
                release(granted)
            except Exception as error:  # noqa: BLE001 - one connection's trouble is not its neighbour's
                self._loop.call_exception_handler({"message": "releasing an answer failed", "exception": error})
        return len(releases)

    def _arm(self) -> None:
        if self._overdue is None:
            oldest = next((batch for batch in self._in_flight if batch.releases), None)
            if oldest is not None:
                self._overdue = self._loop.call_at(oldest.since_s + self._commit_wait_s, self._wait_ran_out)

    # Batches

    def _batch_for(self, seq: int) -> Batch:
        """The batch of this loop turn; a gap in the numbers begins another."""
        batch = self._filling
        if batch is not None and batch.lines and batch.first_seq + len(batch.lines) != seq:
            self._hand_over()
            batch = None
        if batch is None:
            batch = self._begin_batch()
        if not batch.lines:
            batch.first_seq = seq
        return batch

    def _begin_batch(self) -> Batch:
        batch = self._filling = Batch(done=self._committed, since_s=self._loop.time())
        if self._buffered:
            self._loop.call_later(self._gathering.seconds, self._flush, batch)
        else:
            self._loop.call_soon(self._flush, batch)
        return batch

    def _flush(self, batch: Batch) -> None:
        """Once a loop turn, or when they have gathered for long enough: they go to the writer."""
        if self._filling is batch:
            self._hand_over()

    def _hand_over(self) -> None:
        batch, self._filling = self._filling, None
        if batch is None:
            return
        tally = self._tally
        batch.admitted = tally.admitted - tally.unseen
        batch.lost = self._lost_told = tally.lost
        batch.handed_s = self._loop.time()
        self._in_flight.append(batch)
        self._idle.clear()
        self._spool.submit(batch)
        if batch.releases and self._overdue is None:
            self._overdue = self._loop.call_at(batch.since_s + self._commit_wait_s, self._wait_ran_out)

    def _committed(self, batch: Batch) -> None:
        """On the loop, in order: it is on disk."""
        assert self._in_flight[0] is batch
        self._in_flight.popleft()
        self._gathering.committed(self._loop.time() - batch.handed_s)
        self._waiting_bytes -= batch.size_bytes
        self._tally.open -= len(batch.lines)
        if self._degraded is not None:
            log.warning("the disk takes records again")
            self._degraded = None
        self._release(batch, True)
        if self._in_flight or self._filling is not None:
            return
        if self._tally.lost is not self._lost_told:  # what was lost while the disk stood still goes on record
            self._open_batch()
        else:
            self._idle.set()

    # Limits

    def _memory_full(self) -> bool:
        return self._waiting_bytes >= self._memory_bytes

    def _cannot_promise(self) -> bool:
        return self._degraded is not None or self._memory_full() or self._spool.health().state is not State.OK

    def _lose(self, id_: str, intended: bool) -> None:
        """No room for this record: count it. Its number stays unused, which is its trace."""
        tally = self._tally
        tally.open -= 1
        tally.lost = {**tally.lost, "spool_full": tally.lost.get("spool_full", 0) + 1}
        self._metrics.lost("spool_full", 1)
        if intended:
            self._open_batch().closes.append(id_)
        else:
            tally.unseen -= 1

    def _open_batch(self) -> Batch:
        return self._filling if self._filling is not None else self._begin_batch()

    # Open calls

    def _look_at_open(self) -> None:
        """Every 10 ms while there are fresh calls."""
        self._look = None
        if self._old:
            self._write_intents()
        self._old.update(self._young)
        self._young.clear()
        if self._old:
            self._look = self._loop.call_later(INTENT_AGE_S / 2, self._look_at_open)

    def _write_intents(self) -> None:
        """The old ones have been open long enough. With full memory they wait: a later look tries again."""
        if not self._old or self._memory_full():
            return
        batch = self._open_batch()
        for id_, exchange in self._old.items():
            line = encode_intent(exchange, instance=self._instance)
            batch.opens.append((id_, line))
            batch.size_bytes += len(line) + _LINE_OVERHEAD_BYTES
            self._waiting_bytes += len(line) + _LINE_OVERHEAD_BYTES
        self._tally.unseen -= len(self._old)
        self._intended.update(self._old)
        self._old.clear()
