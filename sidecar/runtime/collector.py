"""From the stream to who keeps records: batch by batch, stored once, and acknowledged after that.

A durable pull consumer remembers in the stream what was acknowledged; whatever was not comes again. What must always
hold: a message is acknowledged only after its record is durable in the sink, or lies aside; the sink stores a record
once, whatever comes twice. So a death at any step costs a repeat. Order does not matter, and nothing stops for a
message: one that is no record, is too large, or of which nobody can tell whether it was there, is kept aside.

Reading ends with a fault (`NatsFault`) and begins anew after a pause; the one who runs it says where it stands.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Protocol

from sidecar.model.delivery import AddsUp, Applied, Delivered, Duplicate, Refused, Verdict
from sidecar.model.record import Record
from sidecar.model.record_check import NotARecord, read_foreign
from sidecar.spool import Spool, SpoolReader
from sidecar.spool.known_ids import TOO_OLD, Aside, KnownIds
from sidecar.spool.types import Batch
from sidecar.storage.files import StorageError
from sidecar.storage.nats import LOOK_AGAIN_S, Connected, NatsConnection, NatsFault, api_fault, connection_lost

if TYPE_CHECKING:
    from nats.aio.msg import Msg
    from nats.aio.subscription import Subscription
    from nats.js.api import ConsumerConfig

log = logging.getLogger("sidecar.collect")

BATCH: Final = 500
BATCH_BYTES: Final = 8 << 20  # of messages in one answer; one record has 32 KiB at most
ASK_S: Final = 2.0  # an idle look lasts so long, which is how late a stop is noticed
ANSWER_S: Final = 5.0  # beyond it, for an answer that does not come at all
ACK_WAIT_S: Final = 60.0  # what was not acknowledged comes again; a disk that takes nothing for longer costs repeats
ACKS_AT_ONCE: Final = 100
AGAIN_S: Final = 1.0  # what could not be stored is read again
PAUSE_S_MIN: Final = 0.2  # after a fault; doubles
PAUSE_S_MAX: Final = 10.0
SLICE: Final = 40  # records checked before others have their turn: some 3 ms
FORGET_EVERY_S: Final = 60.0
OTHER_ID: Final = "other_id"

_ENDS: Final = frozenset({"404", "408"})  # of a request: no (more) messages
_GOES_ON: Final = ("batch completed", "message size exceeds", "exceeded maxwaiting", "server shutdown")


@dataclass(frozen=True, slots=True)
class Got:
    """One message. `source`: where it lies in the stream; `msg_id`: its header, where it has one."""

    source: str
    msg_id: str | None
    body: bytes


@dataclass(frozen=True, slots=True)
class Taken:
    """What became of a batch, all of it durable."""

    stored: int = 0
    duplicates: int = 0
    aside: int = 0


class Sink(Protocol):
    """Where records go. What must always hold: what it has taken is durable, and each record is there once."""

    async def take(self, got: Sequence[Got], passed: tuple[str, int]) -> Taken:
        """`passed`: the stream, and the greatest number that was read there with these."""
        ...

    async def passed(self, stream: str) -> int:
        """The greatest number that was read there before; 0 where that is not known."""
        ...


class Counts(Protocol):
    def count(self, name: str, text: str, count: float = 1) -> None: ...


# --- the sink beside us ------------------------------------------------------------------------------------


class SpoolSink:
    """A spool and the index of what is in it: ordinary delivery goes on from there."""

    def __init__(
        self, spool: Spool, reader: SpoolReader, ids: KnownIds, *, clock: Callable[[], float] = time.time
    ) -> None:
        self._spool, self._reader, self._ids, self._clock = spool, reader, ids, clock
        self._seq = spool.next_seq - 1
        self._behind = False  # something is in the spool, or on its way, that the index does not have

    async def passed(self, stream: str) -> int:
        return await asyncio.to_thread(self._ids.passed, stream)

    async def take(self, got: Sequence[Got], passed: tuple[str, int]) -> Taken:
        """Raises `StorageError` where the index cannot be used."""
        if self._behind:
            await asyncio.to_thread(self._ids.catch_up, self._reader)
            self._behind = False
        records, aside = await checked(got, self._clock())
        known = await asyncio.to_thread(self._ids.known, list(records))
        new: dict[str, Record] = {}
        for record_id, (record, one) in records.items():
            if record_id in known:
                continue
            if self._ids.too_old(record_id):
                text = "ids of its time are forgotten, so nobody can tell whether it was stored"
                aside.append(Aside(one.source, TOO_OLD, text, self._clock(), one.body))
            else:
                new[record_id] = record
        if new:
            await self._store([record.json for record in new.values()])
        instance, seq = self._spool.instance, self._seq
        await asyncio.to_thread(self._ids.remember, instance, seq, list(new), aside, passed)
        self._behind = False
        return Taken(len(new), len(got) - len(new) - len(aside), len(aside))

    async def take_back(self) -> int:
        """Look again at what lies aside: a newer program may know it. How many records it was."""
        taken: list[int] = []
        for number, one in await asyncio.to_thread(self._ids.asides):
            if not one.whole or one.reason == TOO_OLD:
                continue
            try:
                record = read_foreign(one.body)
            except NotARecord:
                continue
            if not self._ids.too_old(record.id):
                if record.id not in await asyncio.to_thread(self._ids.known, [record.id]):
                    await self._store([record.json])
                    await asyncio.to_thread(self._ids.remember, self._spool.instance, self._seq, [record.id])
                    self._behind = False
                taken.append(number)
        if taken:
            await asyncio.to_thread(self._ids.taken_back, taken)
        return len(taken)

    async def _store(self, lines: list[bytes]) -> None:
        """Until it is on disk, however long that takes."""
        tally, done = self._spool.tally, asyncio.get_running_loop().create_future()

        def stored(batch: Batch) -> None:
            tally.open -= len(batch.lines)
            if not done.done():
                done.set_result(None)

        self._behind = True
        tally.admitted += len(lines)
        tally.open += len(lines)
        first = self._seq + 1
        self._seq += len(lines)
        self._spool.submit(
            Batch(
                first_seq=first,
                lines=lines,
                size_bytes=sum(map(len, lines)),
                admitted=tally.admitted,
                lost=tally.lost,
                done=stored,
            )
        )
        await done


# --- the sink that many share -------------------------------------------------------------------------------


class LedgerSink:
    """The ledger that many sidecars share, each batch in one transaction: it knows each record by its id, so several
    may read one stream by one consumer. What lies aside does so beside us."""

    def __init__(self, ledger: AddsUp, ids: KnownIds, *, clock: Callable[[], float] = time.time) -> None:
        """`ledger`: one that keeps lines."""
        self._ledger, self._ids, self._clock = ledger, ids, clock

    async def passed(self, stream: str) -> int:
        return await asyncio.to_thread(self._ids.passed, stream)

    async def take(self, got: Sequence[Got], passed: tuple[str, int]) -> Taken:
        """Raises `SinkError` where the ledger takes nothing just now, `StorageError` where nothing can lie aside."""
        records, aside = await checked(got, self._clock())
        stored = await self._write(list(records.values()), aside)
        if aside:
            await asyncio.to_thread(self._ids.remember, "", 0, (), aside, passed)
        return Taken(stored, len(got) - stored - len(aside), len(aside))

    async def _write(self, records: Sequence[tuple[Record, Got]], aside: list[Aside]) -> int:
        """How many were in a batch of which something was new. One that cannot be added is looked for by halves."""
        if not records:
            return 0
        verdict = await self._verdict([record for record, _ in records])
        if isinstance(verdict, Delivered):
            return len(records)
        if isinstance(verdict, Duplicate):
            return 0
        if not isinstance(verdict, Refused):
            raise SinkError(f"the ledger takes nothing just now ({verdict.reason}); the log says more")
        if len(records) == 1:
            text = "the ledger cannot keep it"
            aside.append(Aside(records[0][1].source, verdict.reason, text, self._clock(), records[0][1].body))
            return 0
        half = len(records) // 2
        return await self._write(records[:half], aside) + await self._write(records[half:], aside)

    async def _verdict(self, records: Sequence[Record]) -> Verdict:
        try:
            sums, left = self._ledger.add_up(records)
        except ArithmeticError:
            return Refused("sum_not_exact")
        lines = [(number, record.json) for number, record in enumerate(records, 1)]
        out = left.skipped.keys() | left.parked.keys()
        batch = Applied(1, len(lines), frozenset(n for n, record in enumerate(records, 1) if record.id in out))
        return await asyncio.to_thread(self._ledger.apply_sums, "", batch, [sums], lines)


class SinkError(StorageError):
    """Nothing is taken just now: it comes again."""


async def checked(got: Sequence[Got], now_s: float) -> tuple[dict[str, tuple[Record, Got]], list[Aside]]:
    """Which of these are records, each once; and what is to be kept aside."""
    records: dict[str, tuple[Record, Got]] = {}
    aside: list[Aside] = []
    for count, one in enumerate(got, 1):
        if count % SLICE == 0:
            await asyncio.sleep(0)
        try:
            record = read_foreign(one.body)
        except NotARecord as error:
            aside.append(Aside(one.source, error.reason, str(error), now_s, one.body))
            continue
        if one.msg_id is not None and one.msg_id != record.id:
            # A stream told repeats apart by another id than ours: what it dropped as one may have been another record.
            aside.append(Aside(one.source, OTHER_ID, "Nats-Msg-Id is not the record's id", now_s, one.body))
        else:
            records.setdefault(record.id, (record, one))
    return records, aside


# --- the stream --------------------------------------------------------------------------------------------


@dataclass(slots=True, kw_only=True)
class StreamReader:
    """Reads one stream by one consumer into a sink, until it is told to stop."""

    connection: NatsConnection
    consumer: str
    owner: str  # who this is; "" where several may read by one consumer
    sink: Sink
    counts: Counts
    pending: int = 0  # messages that were not read yet, as far as known
    fault: str = "not connected yet"  # why nothing is read; "": it is
    _seen: int = field(default=0, init=False)  # the greatest number that was read in this stream
    _alone: bool = field(default=False, init=False)  # every number of this stream is a record that is read here
    _stream: str = field(default="", init=False)  # its name, and when it was made
    _asked: int = field(default=0, init=False)

    async def run(self, stop: asyncio.Event) -> None:
        """Never raises for what passes by itself."""
        pause_s = PAUSE_S_MIN
        while not stop.is_set():
            try:
                await self._read(stop)
                return
            except NatsFault as fault:
                if str(fault) not in (self.fault, self.connection.said):
                    log.log(logging.ERROR if fault.operator else logging.WARNING, "the stream is not read: %s", fault)
                reading, self.fault = not self.fault, str(fault)
            except StorageError as error:
                reading, self.fault = not self.fault, str(error)
                log.error("what was read cannot be stored, and is read again: %s", error)
            pause_s = PAUSE_S_MIN if reading else min(pause_s * 2, PAUSE_S_MAX)
            with suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await stop.wait()

    async def _read(self, stop: asyncio.Event) -> None:
        there = await self.connection.get()
        await self._find_consumer(there)
        looked_s = time.monotonic()
        inbox = there.client.new_inbox()
        subscription = await self._guarded(there, there.client.subscribe(f"{inbox}.*"))
        log.info("reading the stream", extra={"facts": {"stream": self.connection.wanted.stream}})
        self.fault = ""
        while not stop.is_set():
            if await self.connection.get() is not there:
                raise connection_lost()
            messages = await self._guarded(there, self._fetch(there, subscription, inbox))
            if messages:
                await self._take(there, messages)
            if time.monotonic() - looked_s > LOOK_AGAIN_S:
                await self._find_consumer(there)  # one that is paused, or was edited, gives nothing and says nothing
                looked_s = time.monotonic()
        await self._guarded(there, subscription.unsubscribe())

    async def _take(self, there: Connected, messages: Sequence[Msg]) -> None:
        self._look_for_gaps(messages)
        try:
            taken = await self.sink.take([_got(message) for message in messages], (self._stream, self._seen))
        except StorageError:
            # They come again soon, here or elsewhere, and not only when their time is over.
            await self._guarded(there, _all([message.nak(delay=AGAIN_S) for message in messages]))
            raise
        for word, count in (("stored", taken.stored), ("duplicate", taken.duplicates), ("aside", taken.aside)):
            if count:
                self.counts.count("sidecar_collected", word, count)
        if taken.aside:
            log.error(
                "messages are no records, and are kept aside: `metering-sidecar collect --aside` shows them",
                extra={"facts": {"messages": taken.aside}},
            )
        await self._acknowledge(there, messages)
        self.acknowledged(messages)

    def acknowledged(self, messages: Sequence[Msg]) -> None:
        """All of them are stored, and the stream was told."""
        self.pending = messages[-1].metadata.num_pending

    async def _acknowledge(self, there: Connected, messages: Sequence[Msg]) -> None:
        """Wait for the server's word on each: one that is lost costs a repeat, which is known then."""
        for start in range(0, len(messages), ACKS_AT_ONCE):
            acks = [message.ack_sync(self.connection.timeout_s) for message in messages[start : start + ACKS_AT_ONCE]]
            found = await self._guarded(there, _all(acks))
            if lost := sum(isinstance(one, BaseException) for one in found):
                log.warning(
                    "acknowledgements got no answer: those records come again, and are known",
                    extra={"facts": {"messages": lost}},
                )

    def _look_for_gaps(self, messages: Sequence[Msg]) -> None:
        """Numbers that nobody will see: the stream was purged, or dropped what was too old, before it was read."""
        for message in messages:
            seq = message.metadata.sequence.stream
            if message.metadata.num_delivered == 1 and seq > self._seen:
                if seq > self._seen + 1 and self._alone:
                    self._tell_gap(seq - self._seen - 1)
                self._seen = seq

    def _tell_gap(self, count: int) -> None:
        self.counts.count("sidecar_collect_missed", self.consumer, count)
        log.error(
            "messages of the stream are gone that were not read: it was purged, or they were too old; the spools of "
            "the sidecars have them for SIDECAR_RETENTION, and `spool export | collect --feed -` sends them again",
            extra={"facts": {"messages": count}},
        )

    # The consumer

    async def _find_consumer(self, there: Connected) -> None:
        """The one that is there, if it is ours and as it should be, else a new one. Raises `NatsFault`."""
        from nats.js.errors import NotFoundError

        wanted, context = self.connection.wanted, there.stream
        try:
            info = await there.unless_ended(context.consumer_info(wanted.stream, self.consumer))
        except NotFoundError:
            info = None
        except Exception as error:  # noqa: BLE001 - the client raises its own, asyncio's and the system's
            raise api_fault(error, wanted) from None
        if info is None:
            if self.connection.weak:
                raise NatsFault("weak_stream", self.connection.weak, operator=True)
            log.warning(
                "the stream has no such consumer yet: all of it is read, and what is known already is not stored again",
                extra={"facts": {"stream": wanted.stream, "consumer": self.consumer}},
            )
            info = await self._guarded(there, context.add_consumer(wanted.stream, self._config()))
        wrong = consumer_weakness(info.config, wanted.subject, self.consumer, wanted.stream, self._mark)
        if wrong is not None:
            raise NatsFault("consumer", wrong, operator=True)
        if info.paused:
            again = f"`nats consumer resume {wanted.stream} {self.consumer}` lets it go on"
            text = f"the consumer {self.consumer} of stream {wanted.stream} is paused: {again}"
            raise NatsFault("consumer", text, operator=True)
        stream = await self._guarded(there, context.stream_info(wanted.stream))
        self._alone = bool(self.owner) and list(stream.config.subjects or ()) == [wanted.subject]
        made = "" if stream.created is None else stream.created.isoformat()
        self._stream = f"{wanted.stream} {made}"
        # Of a stream that was never read here, what went before is nobody's loss.
        # Its first number is 0 while a stream had no message at all.
        self._seen = await self.sink.passed(self._stream) or max(stream.state.first_seq - 1, 0)
        self.pending = info.num_pending or 0

    @property
    def _mark(self) -> str:
        return f"metering-sidecar collect {self.owner}".strip()

    def _config(self) -> ConsumerConfig:
        from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy

        return ConsumerConfig(
            durable_name=self.consumer,
            description=self._mark,
            deliver_policy=DeliverPolicy.ALL,
            ack_policy=AckPolicy.EXPLICIT,
            ack_wait=ACK_WAIT_S,
            max_deliver=-1,
            max_ack_pending=8 * BATCH,
            filter_subject=self.connection.wanted.subject,
        )

    async def _fetch(self, there: Connected, subscription: Subscription, inbox: str) -> list[Msg]:
        """What is there, up to a batch; where there is nothing, the first that comes within `ASK_S`."""
        most = max(BATCH_BYTES, there.client.max_payload + 65_536)
        found = await self._ask(there, subscription, inbox, {"batch": BATCH, "no_wait": True, "max_bytes": most})
        if not found:
            asked = {"batch": 1, "expires": int(ASK_S * 1e9), "max_bytes": most}
            found = await self._ask(there, subscription, inbox, asked)
        return found

    async def _ask(self, there: Connected, subscription: Subscription, inbox: str, asked: dict[str, Any]) -> list[Msg]:
        self._asked += 1
        reply, wanted = f"{inbox}.{self._asked}", self.connection.wanted
        subject = f"$JS.API.CONSUMER.MSG.NEXT.{wanted.stream}.{self.consumer}"
        await there.client.publish(subject, json.dumps(asked).encode(), reply=reply)
        found: list[Msg] = []
        end_s = time.monotonic() + asked.get("expires", 0) / 1e9 + ANSWER_S
        while len(found) < asked["batch"]:
            left_s = end_s - time.monotonic()
            if left_s <= 0:
                break
            try:
                message = await subscription.next_msg(left_s)
            except TimeoutError:
                break
            if message.reply and message.reply.startswith("$JS.ACK."):
                found.append(message)
                continue
            # A word of the server about a request; of an earlier one it is of no interest any more.
            status = (message.headers or {}).get("Status", "")
            if message.subject == reply and status != "100":
                text = (message.headers or {}).get("Description", "").lower()
                if status in _ENDS or any(word in text for word in _GOES_ON):
                    return found
                raise NatsFault("consumer", f"the consumer {self.consumer} gives nothing: {status} {text}".strip())
        else:
            return found
        if not found:
            raise NatsFault("timeout", f"no answer for the stream {wanted.stream} in time")
        return found

    async def _guarded(self, there: Connected, waiting: Any) -> Any:
        try:
            return await there.unless_ended(waiting)
        except NatsFault:
            raise
        except Exception as error:  # noqa: BLE001 - likewise
            raise api_fault(error, self.connection.wanted) from None


async def _all(waiting: Sequence[Any]) -> list[Any]:
    return await asyncio.gather(*waiting, return_exceptions=True)


def _got(message: Msg) -> Got:
    metadata = message.metadata
    source = f"{metadata.stream} {metadata.sequence.stream} {metadata.timestamp.isoformat()}"
    return Got(source, (message.headers or {}).get("Nats-Msg-Id"), message.data)


def consumer_weakness(config: ConsumerConfig, subject: str, consumer: str, stream: str, mark: str) -> str | None:
    """Why records may not be read by this consumer, with what to do. Pure."""
    name = f"consumer {consumer} of stream {stream}"
    again = f"`nats consumer rm {stream} {consumer}` lets it be made anew, which reads the stream from its beginning"
    if (config.description or "") != mark:
        theirs = (config.description or "").removeprefix("metering-sidecar collect").strip() or "somebody else"
        return (
            f"{name} belongs to {theirs}: two that keep records beside themselves would each have a part; stop this "
            "one, give it the other's data directory, or another SIDECAR_COLLECT_CONSUMER; where the other is gone for "
            f"good, {again}"
        )
    policy = getattr(config.ack_policy, "value", config.ack_policy)
    if policy != "explicit" or config.deliver_subject:
        return f"{name} is not one that is asked and told of each message: {again}"
    if (config.max_deliver or -1) > 0:
        return f"{name} gives up on a message after {config.max_deliver} times: {again}"
    if config.filter_subject not in (None, "", subject) or config.filter_subjects:
        return f"{name} reads another subject than {subject}: {again}"
    return None
