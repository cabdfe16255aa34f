"""The recorder: gives each call its id, its place and its record, and holds the last byte until that is on disk.

Here is the half that serves: what it learns of calls goes, as numbered frames (`frames`), over a link to whoever writes
them (`intake`, mostly in another process), and comes back as the number up to which everything is on disk. Everything
runs on the event loop and is synchronous, so an exchange can be ended while its task is being cancelled. What must
always hold
- An admitted exchange ends in exactly one place: recorded, or counted lost with a reason.
- Every `release` is called exactly once, on the loop.
- A frame is kept until it is acknowledged, and offered again to whoever takes the place of one that died.
- Memory is bounded by `spool_memory_bytes`; beyond it the policy decides, and what is lost is counted.

A call open for more than `INTENT_AGE_S` has its intent on disk; a shorter one never writes one.

`committed`: one frame is under way at a time; what ends meanwhile gathers and goes when that one is on disk and the
loop has turned a few times more, so that a commit is shared by all who wait. `shipped`: the same, and when it is on
disk a frame's memory is let go of, while its responses wait on until the centre has its records (`Recorder.shipped`).
`buffered`: what ends gathers for a few milliseconds, and nobody waits while the disk keeps up.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Final, Protocol, Self

from sidecar.model.exchange import Exchange, PlainExchange, Release
from sidecar.model.record_id import CHANCE_BYTES, Ids
from sidecar.settings import Durability, OnSpoolFull, SpoolSettings
from sidecar.spool.frames import FRAME_BYTES_MAX, SOURCE_BYTES, UNREADABLE, encode_frame
from sidecar.spool.types import Health, State

log = logging.getLogger("sidecar.recorder")

# Fresh calls are looked at twice in this time: at the first look a call is young, at the second it is old and its
# intent goes to the disk, 10 to 20 ms after admission.
INTENT_AGE_S: Final = 0.020
# A record older than this and not on disk makes `buffered` wait like `committed` (docs/guarantees.md).
BUFFERED_AGE_S: Final = 0.020
# In `buffered` records gather before they go: a frame and a commit cost the same whatever is in them. How long depends
# on what the disk needs of the 20 ms.
GATHER_S_MAX: Final = 0.015
GATHER_S_MIN: Final = 0.002
COMMITS_REMEMBERED: Final = 5  # about so many of the last make up the usual time
# In `committed` what has gathered goes so many turns of the loop after the commit that it waited for. A turn takes what
# is ready and no longer: microseconds where nothing is, but under load the next calls end in them, and a commit that is
# shared by half as many again costs each of them a third less.
GATHER_TURNS: Final = 4
# Entries of one frame: more are not kept back, so that a frame stays far below what may be sent at once.
ENTRIES_MAX: Final = 512
FRAME_BYTES_ENOUGH: Final = 4 << 20  # likewise, of bodies that are still to be read
# What a call costs in memory until its frame is made, and beside its bytes afterwards (object headers, its share of the
# frame). The record of a chat call is about 900 bytes.
_GUESS_BYTES: Final = 1024
_OVERHEAD_BYTES: Final = 128


class Gathering:
    """How long records may wait for company, so that a commit of twice the usual time still fits into the bound."""

    def __init__(self) -> None:
        self._commit_s = 0.0
        self.seconds = GATHER_S_MAX

    def committed(self, took_s: float) -> None:
        self._commit_s += (took_s - self._commit_s) / COMMITS_REMEMBERED
        self.seconds = min(max(BUFFERED_AGE_S - 2 * self._commit_s, GATHER_S_MIN), GATHER_S_MAX)


class HopCounts(Protocol):
    """What the hop counts, as far as it is needed here. `take`: what was counted since the last time."""

    def lost(self, reason: str, count: int) -> None: ...
    def released_uncommitted(self, count: int) -> None: ...
    def take(self) -> Sequence[tuple[str, str, float]]: ...


class Link(Protocol):
    """The way to whoever writes. Frames are handed over in order; `Recorder.acknowledged` is called in return."""

    def send(self, number: int, data: bytes) -> None:
        """Never waits. What cannot be sent is asked for again (`Recorder.unacknowledged`)."""
        ...

    def begin_anew(self) -> None:
        """One was not sent, and others will be: all that is not on disk is to be asked for again, in order."""
        ...

    def health(self) -> Health:
        """How writing goes, as far as is known here."""
        ...


@dataclass(slots=True)
class Frame:
    """What gathers until it is sent, and then waits to be acknowledged."""

    number: int
    since_s: float  # loop time of the oldest entry
    sent_s: float = 0.0
    data: bytes = b""
    opens: list[Exchange | PlainExchange] = field(default_factory=list)
    ended: list[Exchange | PlainExchange] = field(default_factory=list)
    closes: list[str] = field(default_factory=list)  # ids that an earlier frame opened
    lost: dict[str, int] = field(default_factory=dict)
    releases: list[Release] = field(default_factory=list)
    records: int = 0
    size_bytes: int = 0

    @property
    def entries(self) -> int:
        return len(self.opens) + len(self.ended)


class Recorder:
    """`exchange.Recorder`, over a link."""

    def __init__(
        self,
        link: Link,
        metrics: HopCounts,
        settings: SpoolSettings,
        *,
        source: bytes | None = None,
        clock_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        """`source`: 16 bytes of chance that name this recorder; its calls' ids end with the first six of them."""
        self._link = link
        self._metrics = metrics
        self.source = os.urandom(SOURCE_BYTES) if source is None else source
        self._buffered = Durability(settings.durability) is Durability.BUFFERED
        self._ships = Durability(settings.durability) is Durability.SHIPPED
        self._shipped = 0  # the last frame that is at the centre
        self._shipping: deque[Frame] = deque()  # on disk, and responses wait for the centre; oldest first
        self._refuse = OnSpoolFull(settings.on_spool_full) is OnSpoolFull.REFUSE
        self._commit_wait_s = settings.commit_wait_s
        self._memory_bytes = settings.spool_memory_bytes
        self._clock_ns = clock_ns
        self._ids = Ids(self.source[:CHANCE_BYTES])
        # Where an open call is: young, old (next look writes its intent), or with its intent handed over.
        self._young: dict[str, Exchange | PlainExchange] = {}
        self._old: dict[str, Exchange | PlainExchange] = {}
        self._intended: dict[str, Exchange | PlainExchange] = {}
        self._look: asyncio.TimerHandle | None = None
        self._number = 0  # of the last frame
        self._filling: Frame | None = None
        self._in_flight: deque[Frame] = deque()  # handed over and not yet on disk, oldest first
        self._gathering = Gathering()
        self._waiting_bytes = 0
        self._overdue: asyncio.TimerHandle | None = None
        self._degraded: str | None = None  # since a wait ran out, until a commit succeeds
        self._loop: asyncio.AbstractEventLoop = asyncio.get_running_loop()
        self._idle = asyncio.Event()
        self._idle.set()

    # The contract of the proxy

    def admit(self, exchange: Exchange | PlainExchange) -> bool:
        if self._refuse and self._cannot_promise():
            return False
        now_ns = self._clock_ns()
        exchange.id = id_ = self._ids.next(now_ns)
        exchange.started_ns = now_ns
        exchange.started_mono_ns = time.monotonic_ns()
        self._young[id_] = exchange
        if self._look is None:
            self._look = self._loop.call_later(INTENT_AGE_S / 2, self._look_at_open)
        return True

    def complete(self, exchange: Exchange | PlainExchange, release: Release | None) -> bool:
        id_ = exchange.id
        intended = False
        if self._young.pop(id_, None) is None and self._old.pop(id_, None) is None:
            intended = self._intended.pop(id_, None) is not None
            if not intended:
                return True  # ended before, or never admitted
        if exchange.duration_ms is None:
            exchange.duration_ms = (time.monotonic_ns() - exchange.started_mono_ns) / 1e6
        # With `refuse` nothing more is let in by now, and what was let in is taken: it is bounded by the calls open.
        if self._waiting_bytes >= self._memory_bytes and not self._refuse:
            self._lose(id_, intended)
            return True
        frame = self._filling
        if frame is None:
            frame = self._begin()
        ended = frame.ended
        ended.append(exchange)
        size = _GUESS_BYTES
        if isinstance(exchange, PlainExchange):
            size += len(exchange.request_body) + len(exchange.response_body)
        frame.size_bytes += size
        self._waiting_bytes += size
        if intended:
            frame.closes.append(id_)
        # In `buffered` nobody waits while the oldest record that is not on disk is younger than it allows.
        waiting = self._in_flight
        goes = (
            self._buffered
            and self._degraded is None
            and (not waiting or self._loop.time() - waiting[0].since_s <= BUFFERED_AGE_S)
        )
        held = not goes and release is not None and self._hold(frame, release)
        if len(ended) >= ENTRIES_MAX or frame.size_bytes >= FRAME_BYTES_ENOUGH:
            self._send(frame)
        return not held

    # The contract of the link

    def acknowledged(self, number: int) -> None:
        """Everything up to this frame is on disk. Called on the loop."""
        waiting = self._in_flight
        done: list[Frame] = []
        while waiting and waiting[0].number <= number:
            done.append(waiting.popleft())
        if not done:
            return
        now_s = self._loop.time()
        for frame in done:
            self._gathering.committed(now_s - frame.sent_s)
            self._waiting_bytes -= frame.size_bytes
        if self._degraded is not None and not self._ships:
            log.warning("the disk takes records again")
            self._degraded = None
        for frame in done:
            if self._ships and frame.releases and frame.number > self._shipped:
                frame.data = b""
                self._shipping.append(frame)
            else:
                self._release(frame, True)
        filling = self._filling
        if filling is not None:
            if not waiting and not self._buffered:
                self._flush_after(filling, GATHER_TURNS)
        elif not waiting:
            self._idle.set()

    def shipped(self, number: int) -> None:
        """Everything up to this frame is at the centre. Called on the loop, after it was acknowledged."""
        self._shipped = max(number, self._shipped)
        if self._degraded is not None:
            log.warning("the centre takes records again")
            self._degraded = None
        while self._shipping and self._shipping[0].number <= number:
            self._release(self._shipping.popleft(), True)

    def unacknowledged(self, after: int = 0) -> Iterator[tuple[int, bytes]]:
        """What has to be sent (again) to one that has everything up to frame `after` on disk."""
        return ((frame.number, frame.data) for frame in list(self._in_flight) if frame.number > after)

    def suspend(self, reason: str) -> None:
        """No commit is to be waited for until there was one."""
        self._degraded = reason

    def resume(self) -> None:
        """Commits may be waited for again. Where something waits, the commit of that will tell."""
        if not self._in_flight and self._filling is None:
            self._degraded = None

    def flush(self) -> None:
        """Hand over what has gathered, and what was counted: somebody asks for the figures of this moment."""
        if self._filling is not None:
            self._send(self._filling)
        elif counts := self._metrics.take():
            self._send(self._begin(), counts)

    # What others ask

    def health(self) -> Health:
        """For `/readyz`: the recorder's own promise first, then how writing goes."""
        spool = self._link.health()
        if spool.state is not State.OK:
            return spool
        if self._memory_full():
            return Health(State.FULL, "the memory behind the disk is full")
        return Health(State.DEGRADED, self._degraded) if self._degraded is not None else spool

    @property
    def refusing(self) -> bool:
        """Whether calls are turned away at admission just now: `/readyz` then answers 503."""
        return self._refuse and self._cannot_promise()

    @property
    def open_calls(self) -> int:
        return len(self._young) + len(self._old) + len(self._intended)

    @property
    def unseen(self) -> int:
        """Open calls that no frame has told of: a crash takes them without a trace."""
        return len(self._young) + len(self._old)

    @property
    def next_number(self) -> int:
        """Of the next frame: those before it were sent, or wait."""
        return self._number + 1

    @property
    def gathers(self) -> bool:
        """Whether there is something that `flush` would send beside counts."""
        return self._filling is not None

    @property
    def waiting_records(self) -> int:
        """Calls that ended and are not known to be on disk."""
        filling = 0 if self._filling is None else len(self._filling.ended)
        return sum(frame.records for frame in self._in_flight) + filling

    async def __aenter__(self) -> Self:
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
        self.flush()
        try:
            async with asyncio.timeout(self._commit_wait_s + 1.0):
                await self._idle.wait()
        except TimeoutError:
            log.error("stopping with %d records that are not on disk yet", self.waiting_records)
        if self._overdue is not None:
            self._overdue.cancel()
            self._overdue = None

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self.open_calls} open, {len(self._in_flight)} frames waiting>"

    # Holding responses

    def _hold(self, frame: Frame, release: Release) -> bool:
        """Whether the response waits, which nothing but a wait that ran out prevents; `release` is kept with the frame
        then."""
        if self._degraded is not None and not self._refuse:
            self._metrics.released_uncommitted(1)
            return False
        if self._buffered and not frame.releases:
            self._loop.call_soon(self._flush, frame)  # somebody waits: no more gathering
        frame.releases.append(release)
        if self._overdue is None:
            self._overdue = self._loop.call_at(frame.since_s + self._commit_wait_s, self._wait_ran_out)
        return True

    def _holding(self) -> Iterator[Frame]:
        """The frames that somebody waits for, oldest first."""
        yield from (frame for frame in self._shipping if frame.releases)
        yield from (frame for frame in self._in_flight if frame.releases)
        if self._filling is not None and self._filling.releases:
            yield self._filling

    def _wait_ran_out(self) -> None:
        """A timer's call: the oldest held response has waited `commit_wait_s`, or it is time to look again."""
        self._overdue = None
        now_s = self._loop.time()
        oldest = next(self._holding(), None)
        if oldest is None:
            return
        if now_s < oldest.since_s + self._commit_wait_s:
            self._overdue = self._loop.call_at(oldest.since_s + self._commit_wait_s, self._wait_ran_out)
            return
        if self._degraded is None:
            if self._shipping:
                self._degraded = f"the centre has taken no record within {self._commit_wait_s:g} s"
                log.error("the centre is slow or away, and records are on this disk alone: %s", self._degraded)
            else:
                self._degraded = f"no commit within {self._commit_wait_s:g} s"
                log.error("the disk is slow or stuck: %s", self._degraded)
        if self._refuse:
            self._release_all(False, upto_s=now_s - self._commit_wait_s)
            oldest = next(self._holding(), None)
            if oldest is not None:
                self._overdue = self._loop.call_at(oldest.since_s + self._commit_wait_s, self._wait_ran_out)
        else:
            self._metrics.released_uncommitted(self._release_all(True, upto_s=now_s))

    def _release_all(self, granted: bool, *, upto_s: float) -> int:
        count = sum(self._release(frame, granted) for frame in list(self._holding()) if frame.since_s <= upto_s)
        self._shipping = deque(frame for frame in self._shipping if frame.releases)
        return count

    def _release(self, frame: Frame, granted: bool) -> int:
        releases, frame.releases = frame.releases, []
        for release in releases:
            try:
                release(granted)
            except Exception as error:  # noqa: BLE001 - one connection's trouble is not its neighbour's
                self._loop.call_exception_handler({"message": "releasing a response failed", "exception": error})
                with suppress(Exception):  # the client would wait for ever
                    release(False)
        return len(releases)

    # Frames

    def _begin(self) -> Frame:
        self._number += 1
        self._idle.clear()
        frame = self._filling = Frame(self._number, self._loop.time())
        if self._buffered:
            self._loop.call_later(self._gathering.seconds, self._flush, frame)
        elif not self._in_flight:
            self._loop.call_soon(self._flush, frame)
        # Else the acknowledgement of the one that is under way sends it.
        return frame

    def _flush(self, frame: Frame) -> None:
        """Once a loop turn, or when they have gathered for long enough: they go."""
        if self._filling is frame:
            self._send(frame)

    def _flush_after(self, frame: Frame, turns: int) -> None:
        if turns and self._filling is frame:
            self._loop.call_soon(self._flush_after, frame, turns - 1)
        else:
            self._flush(frame)

    def _send(self, frame: Frame, counts: Sequence[tuple[str, str, float]] | None = None) -> None:
        self._filling = None
        frame.sent_s = self._loop.time()
        try:
            counts = self._metrics.take() if counts is None else counts
            frame.data = self._encoded(frame, counts)
        except Exception:
            log.exception("calls cannot be told together to the metering process; they are told one by one")
            self._drop_unsendable(frame)
            frame.data = self._encoded(frame, counts or ())
        frame.records = len(frame.ended)
        size = len(frame.data) + _OVERHEAD_BYTES * frame.entries
        self._waiting_bytes += size - frame.size_bytes
        frame.size_bytes = size
        # From here on the bytes are all that is kept of them.
        frame.opens, frame.ended, frame.closes = [], [], []
        self._in_flight.append(frame)
        try:
            self._link.send(frame.number, frame.data)
        except Exception:  # the acknowledgement of the next one would cover it
            log.exception("calls could not be told to the metering process; they are told again")
            self._link.begin_anew()

    def _drop_unsendable(self, frame: Frame) -> None:
        """A call that cannot be told of is a fault of ours: it is counted lost, and takes no other with it."""
        opens, ended = frame.opens, frame.ended
        frame.opens = []
        frame.ended = [one for one in ended if _is_sendable(one)]
        lost = len(ended) - len(frame.ended)
        for one in opens:
            if _is_sendable(one):
                frame.opens.append(one)
            elif one.id in frame.closes:  # it has ended meanwhile, and that end is what counts
                frame.closes.remove(one.id)
            else:
                self._intended.pop(one.id, None)
                lost += 1
        if lost:
            frame.lost[UNREADABLE] = frame.lost.get(UNREADABLE, 0) + lost
            self._metrics.lost(UNREADABLE, lost)

    def _encoded(self, frame: Frame, counts: Sequence[tuple[str, str, float]]) -> bytes:
        admitted = frame.entries + sum(frame.lost.values()) - len(frame.closes)
        given: dict[str, Any] = {
            "admitted": admitted,
            "lost": frame.lost or None,
            "opens": frame.opens,
            "closes": frame.closes,
            "counts": counts,
        }
        data = encode_frame(frame.number, ended=frame.ended, **given)
        if len(data) > FRAME_BYTES_MAX:  # all that can be so long is what providers say beside their figures
            for exchange in frame.ended:
                if isinstance(exchange, Exchange) and exchange.usage is not None:
                    exchange.usage.raw_usage = None
            data = encode_frame(frame.number, ended=frame.ended, **given)
        return data

    # Limits

    def _memory_full(self) -> bool:
        return self._waiting_bytes >= self._memory_bytes

    def _cannot_promise(self) -> bool:
        return self._degraded is not None or self._memory_full() or self._link.health().state is not State.OK

    def _lose(self, id_: str, intended: bool) -> None:
        """No room for this record: count it."""
        frame = self._filling if self._filling is not None else self._begin()
        frame.lost["spool_full"] = frame.lost.get("spool_full", 0) + 1
        self._metrics.lost("spool_full", 1)
        if intended:
            frame.closes.append(id_)

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
        frame = self._filling if self._filling is not None else self._begin()
        frame.opens.extend(self._old.values())
        guess = _GUESS_BYTES * len(self._old)
        frame.size_bytes += guess
        self._waiting_bytes += guess
        self._intended.update(self._old)
        self._old.clear()
        if len(frame.opens) >= ENTRIES_MAX:
            self._send(frame)


def _is_sendable(one: Exchange | PlainExchange) -> bool:
    try:
        encode_frame(0, opens=[one])
        encode_frame(0, ended=[one])
    except Exception as error:
        log.error("a call cannot be told of, and is counted lost: %s", type(error).__name__, exc_info=error)
        return False
    return True
