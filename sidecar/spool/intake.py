"""The intake: frames of calls in, groups of the spool out, acknowledgements back.

One process does this for all that serve. Everything that a record costs is done here, over all frames that have
come: their calls become lines and sums (`Ended`), and one batch is handed over. What must always hold
- A frame is counted once: one that was seen, in this life or before (`IntakeSpool.origins`), is passed over.
- It is acknowledged when the batch that holds it is on disk, in order.
- What cannot be read is given up at once, a call or a frame, counted and said: it would be sent again for ever.
- A call whose intent is on disk ends in one record: its own, or `unknown` once its process is known to be gone.
- Of the balance, `admitted`, `open` and `lost` are counted here; `recorded` is the writer's.

Runs on one thread, the event loop's, and never waits. Before there is a spool (`begin`) frames are counted and kept.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final, Protocol, TypeVar

from sidecar.model.call_group import CallGroup, Gathering, groups_of
from sidecar.model.exchange import Exchange, PlainExchange, RequestShape, ResponseShape, unread_usage
from sidecar.model.record import LineTemplate, Record, encode_exactly, record_of
from sidecar.model.record_id import CHANCE_BYTES
from sidecar.spool.frames import (
    GATED,
    PLAIN,
    UNREADABLE,
    FrameError,
    Told,
    decode_frame,
    exchange_of,
    gate_of,
    given_up,
    head_of,
    open_of,
    plain_of,
    request_shape_of,
    response_shape_of,
)
from sidecar.spool.types import Batch, Tally, encode_intent, settle

log = logging.getLogger("sidecar.intake")

_Ended = TypeVar("_Ended")  # one call, or some that were gathered

SHAPES_MAX: Final = 4_096  # remembered of each source; a frame brings all that it needs
_TAIL: Final = -2 * CHANCE_BYTES  # where an id says who gave it


class IntakeMetrics(Protocol):
    def call_ended(self, exchange: Exchange) -> None: ...
    def calls_ended(self, gathered: Gathering) -> None: ...
    def add(self, counts: Sequence[tuple[str, str, float]]) -> None: ...


class Reading(Protocol):
    """Makes records of the plain calls of one source (`usage.plain_calls`)."""

    def lines(
        self,
        entries: Sequence[Sequence[Any]],
        start: int,
        requests: Mapping[int, RequestShape],
        responses: Mapping[int, ResponseShape],
        *,
        seq: int,
        lines: list[bytes],
    ) -> None: ...
    def take_gathered(self) -> Sequence[Gathering]: ...
    def exchange(self, plain: PlainExchange) -> Exchange: ...


@dataclass(slots=True, eq=False)
class Ended:
    """What a batch of records holds, as far as it need not be read back from their lines.

    `exchanges`: number, line and, where the line says exactly what it does, the exchange. `gathered`: all others.
    """

    exchanges: list[tuple[int, bytes, Exchange | None]] = field(default_factory=list)
    gathered: list[Gathering] = field(default_factory=list)
    _records: list[Record] | None = None

    @property
    def calls(self) -> int:
        return len(self.exchanges) + sum(len(one.lines) for one in self.gathered)

    def join(self, other: Ended) -> None:
        """Take in what follows. Takes `other` over."""
        self.exchanges += other.exchanges
        self.gathered += other.gathered
        self._records = None

    def groups(self) -> list[CallGroup]:
        """Those that are no records."""
        return groups_of(self.gathered)

    def records(self, instance: str) -> list[Record]:
        """Those that were not gathered. Raises `ValueError` for a line that is no record."""
        if self._records is None:  # whoever delivers and whoever adds up ask for the same
            self._records = [
                Record.from_json(line)
                if exchange is None
                else record_of(exchange, seq=seq, instance=instance, line=line)
                for seq, line, exchange in self.exchanges
            ]
        return self._records


class IntakeSpool(Protocol):
    """A spool as far as it is needed here."""

    tally: Tally

    @property
    def instance(self) -> str: ...
    @property
    def next_seq(self) -> int: ...
    @property
    def open_intents(self) -> Mapping[str, bytes]: ...
    def origins(self) -> Mapping[bytes, int]: ...
    def submit(self, batch: Batch) -> None: ...


@dataclass(slots=True, eq=False)
class Source:
    """A process that serves, for as long as it lives: its connections may come and go."""

    id: bytes
    acknowledge: Callable[[int], None]  # told the number up to which all its frames are on disk
    taken: int = 0  # the last frame that was counted
    stored: int = 0  # the last one that is on disk
    gone: bool = False
    # Frames that need no disk are acknowledged with the one before them that does.
    waiting: int = 0  # batches handed over and not yet on disk
    open: dict[str, bytes] = field(default_factory=dict)  # calls whose intent is on disk, or on its way
    # What plain calls have in common, by the numbers that it gave.
    requests: dict[int, RequestShape] = field(default_factory=dict)
    responses: dict[int, ResponseShape] = field(default_factory=dict)
    reading: Reading | None = None
    intents: dict[int, LineTemplate] = field(default_factory=dict)  # of calls that are open, by the request's number

    @property
    def tail(self) -> str:
        """What the ids of its calls end with."""
        return self.id[:CHANCE_BYTES].hex()


class Intake:
    """Counts and stores what sources tell."""

    def __init__(
        self,
        metrics: IntakeMetrics,
        reading: Callable[[str], Reading] | None = None,
        price: Callable[[Exchange], None] | None = None,
    ) -> None:
        """`reading`: makes what reads the plain calls of one source, given our instance; None: there are none. `price`:
        fills in what a call cost."""
        self._price = price
        self._metrics = metrics
        self._make_reading = reading
        # Told of every batch with records that is on disk, before delivery is woken.
        self.handed: Callable[[str, Batch, Ended], None] | None = None
        # Told of every commit: its last number, and which frames of which sources it brought. And at the beginning, of
        # what a life before this one had stored of a source.
        self.stored: Callable[[int, Sequence[tuple[bytes, int]]], None] | None = None
        self.stored_before: Callable[[Sequence[tuple[bytes, int]]], None] | None = None
        self._spool: IntakeSpool | None = None
        self._early = Tally()
        self._seq = 0
        self._instance = ""
        self._sources: dict[bytes, Source] = {}
        self._settled: set[bytes] = set()
        self._arrived: list[tuple[Source, Told]] = []

    def begin(self, spool: IntakeSpool) -> None:
        """There is a spool now: what was counted before goes into it first, at the next `store`."""
        self._spool, self._instance, self._seq = spool, spool.instance, spool.next_seq - 1
        stored = spool.origins()
        for source in self._sources.values():
            self._remember(source, stored)
        # Of a life before this one some may be there already: its acknowledgement came to nobody.
        self._arrived = [(source, told) for source, told in self._arrived if told.number > source.stored]
        for _, told in self._arrived:
            _count(spool.tally, told)

    @property
    def tally(self) -> Tally:
        """Of this moment; before there is a spool, what was counted without one."""
        return self._early if self._spool is None else self._spool.tally

    @property
    def recording(self) -> bool:
        return self._spool is not None

    @property
    def waiting(self) -> bool:
        """Whether something has come that `store` has not seen."""
        return bool(self._arrived)

    # Sources

    def came(self, source: Source) -> None:
        """One that serves has connected for the first time in this life."""
        self._sources[source.id] = source
        if self._spool is not None:
            self._remember(source, self._spool.origins())

    def knows(self, source: bytes) -> Source | None:
        return self._sources.get(source)

    def _remember(self, source: Source, stored: Mapping[bytes, int]) -> None:
        assert self._spool is not None
        source.stored = stored.get(source.id, 0)
        source.taken = max(source.taken, source.stored)
        if source.stored and self.stored_before is not None:
            self.stored_before([(source.id, source.stored)])
        tail = source.tail
        source.open.update({id_: line for id_, line in self._spool.open_intents.items() if id_[_TAIL:] == tail})

    def settle(self, source: bytes) -> int:
        """A process is gone for good, and everything that came from it was taken: what it had open becomes records with
        outcome `unknown`. How many."""
        if source in self._settled or self._spool is None:
            return 0
        self.store()
        known = self._sources.pop(source, None)
        if known is None:
            known = Source(source, lambda number: None)
            self._remember(known, self._spool.origins())
        self._settled.add(source)
        known.gone = True
        if not known.open:
            return 0
        batch = self._batch()
        for id_, line in known.open.items():
            self._append(batch, settle(line, seq=self._seq + 1, instance=self._instance))
            batch.closes.append(id_)
        self._submit(batch)
        return len(batch.lines)

    # Frames

    def take(self, source: Source, data: bytes, *, give_up: str = "") -> int:
        """One frame as it came; how many calls it is the first to tell of. One that was seen before is passed over.

        `give_up`: why it is not to be read. Raises `FrameError` where not even its head can be: it has no number."""
        head = head_of(data)
        if head.number <= source.taken or source.gone:
            if head.number <= source.stored:
                source.acknowledge(source.stored)
            return 0
        source.taken = head.number
        told = None
        if not give_up:
            try:
                told = decode_frame(data, head)
            except FrameError:
                give_up = "unreadable"
        if told is None:
            log.error(
                "what a serving process told of its calls cannot be read and is given up",
                extra={"facts": {"why": give_up, "frame": head.number, "bytes": len(data), "calls_lost": head.ends}},
            )
            told = given_up(head, give_up)
        _count(self.tally, told)
        if told.counts:
            self.count(told.counts)
        self._arrived.append((source, told))
        return told.admitted

    def count(self, counts: Sequence[tuple[str, str, float]]) -> None:
        try:
            self._metrics.add(counts)
        except Exception as error:  # a figure that does not fit takes no call with it
            log.error("what a serving process counted cannot be added: %s", type(error).__name__, exc_info=error)

    def store(self) -> None:
        """Everything that has come, as one batch."""
        if self._spool is None or not self._arrived:
            return
        arrived, self._arrived = self._arrived, []
        batch = self._batch()
        ended = self._read_ended(batch, arrived)
        sources: dict[bytes, tuple[Source, int]] = {}
        for source, told in arrived:
            for id_, line in self._read_intents(source, told):
                batch.opens.append((id_, line))
                batch.size_bytes += len(line)
                source.open[id_] = line
            for id_ in told.closes:
                source.open.pop(id_, None)
            batch.closes.extend(told.closes)
            if told.is_for_disk:
                sources[source.id] = (source, told.number)
            elif not source.waiting and source.id not in sources:
                source.stored = told.number
                source.acknowledge(told.number)
        if not sources:
            return
        # The last of each: the numbers before it are in here or in what was handed over before.
        batch.origins = [(source.id, number) for source, number in sources.values()]
        told_to = [(source, source.taken) for source, _ in sources.values()]
        for source, _ in told_to:
            source.waiting += 1
        batch.done = lambda done: self._stored(done, told_to, ended)
        self._submit(batch)
        for gathered in ended.gathered:
            self._count(self._metrics.calls_ended, gathered)

    def _read_ended(self, batch: Batch, arrived: Sequence[tuple[Source, Told]]) -> Ended:
        ended = Ended()
        for source, told in arrived:
            if told.requests:
                self._learn(source, told)
            self._add_ended(batch, ended, source, told.ended)
        batch.size_bytes += sum(map(len, batch.lines))
        for source, _ in arrived:
            if source.reading is not None:
                ended.gathered.extend(source.reading.take_gathered())
        return ended

    def _add_ended(self, batch: Batch, ended: Ended, source: Source, entries: Sequence[Sequence[Any]]) -> None:
        """One that cannot be read is a fault of ours, and takes no other with it: it is recorded without its usage, or
        counted lost where that cannot be either."""
        lines, at, end = batch.lines, 0, len(entries)
        while at < end:
            before = len(lines)
            try:
                if entries[at][0] == PLAIN:
                    reading = source.reading or self._reading_of(source)
                    reading.lines(entries, at, source.requests, source.responses, seq=self._seq + 1, lines=lines)
            except Exception as error:  # the next one is read by itself
                log.error("calls cannot be read together: %s", type(error).__name__, exc_info=error)
            at += len(lines) - before
            self._seq += len(lines) - before
            if at < end:
                self._add_exchange(lines, ended, source, entries[at])
                at += 1

    def _add_exchange(self, lines: list[bytes], ended: Ended, source: Source, entry: Sequence[Any]) -> None:
        """A call that is looked at by itself."""
        for read in (self._exchange_of, self._bare_of):
            try:
                lines.append(self._line_of(ended, read(source, entry)))
            except Exception as error:
                log.error("a call cannot be recorded as it was told: %s", type(error).__name__, exc_info=error)
            else:
                self._seq += 1
                return
        self._lose()

    def _exchange_of(self, source: Source, entry: Sequence[Any]) -> Exchange:
        """Raises where it cannot be read."""
        if entry[0] == PLAIN:
            plain = plain_of(entry, source.requests[entry[1]], source.responses[entry[2]])
            exchange = self._reading_of(source).exchange(plain)
        elif entry[0] == GATED:  # settled one by one, so it needs to be an exchange
            _, packed, gate = entry
            plain = plain_of(packed, source.requests[packed[1]], source.responses[packed[2]])
            exchange = self._reading_of(source).exchange(plain)
            exchange.gate = gate_of(gate)
        else:
            exchange = exchange_of(entry)
        if self._price is not None:
            self._set_price(exchange)
        return exchange

    def _bare_of(self, source: Source, entry: Sequence[Any]) -> Exchange:
        """One of which no more can be told than that it was made. Raises where not even that can."""
        packed = entry[1] if entry[0] == GATED else entry
        if packed[0] == PLAIN:
            plain = plain_of(packed, source.requests[packed[1]], source.responses[packed[2]])
            exchange, reads = plain.exchange(), plain.shape.read
        else:
            exchange = exchange_of(packed)
            reads = exchange.usage is not None
        exchange.usage = unread_usage() if reads else None
        return exchange

    def _line_of(self, ended: Ended, exchange: Exchange) -> bytes:
        if not (type(exchange.request_bytes) is type(exchange.response_bytes) is int):
            raise FrameError("not a frame: a size is no number")  # and would be added up
        seq = self._seq + 1
        line, exact = encode_exactly(exchange, seq=seq, instance=self._instance)
        ended.exchanges.append((seq, line, exchange if exact else None))
        self._count(self._metrics.call_ended, exchange)
        return line

    def _set_price(self, exchange: Exchange) -> None:
        assert self._price is not None
        try:
            self._price(exchange)
        except Exception:
            log.exception("a call could not be priced; it is recorded all the same")

    def _read_intents(self, source: Source, told: Told) -> list[tuple[str, bytes]]:
        found = []
        for entry in told.opens:
            try:
                if entry[0] == PLAIN:
                    found.append((entry[2], self._plain_intent(source, told, entry)))
                else:
                    exchange = exchange_of(entry)
                    found.append((exchange.id, encode_intent(exchange, instance=self._instance)))
            except Exception as error:  # likewise; its end is still to come
                what = "a call that is open cannot be kept for the case of a death: %s"
                log.error(what, type(error).__name__, exc_info=error)
        return found

    def _plain_intent(self, source: Source, told: Told, entry: Sequence[Any]) -> bytes:
        """Raises where it cannot be read."""
        number = entry[1]
        template = source.intents.get(number)
        if template is None:
            shape = request_shape_of(number, told.requests[number])
            try:
                template = LineTemplate(shape, None, self._instance)
            except ValueError:  # a text that cannot be stored as it is
                return encode_intent(open_of(entry, shape).exchange(), instance=self._instance)
            if len(source.intents) >= SHAPES_MAX:
                source.intents.clear()
            source.intents[number] = template
        return template.open_line(*entry[2:])

    def _lose(self) -> None:
        tally = self.tally
        tally.open -= 1
        tally.lost = _sum(tally.lost, {UNREADABLE: 1})
        self.count([("sidecar_lost", UNREADABLE, 1)])

    def _reading_of(self, source: Source) -> Reading:
        if source.reading is None:
            if self._make_reading is None:
                raise FrameError("not a frame: a plain call, and nobody reads such")
            source.reading = self._make_reading(self._instance)
        return source.reading

    def _count(self, count: Callable[[_Ended], None], ended: _Ended) -> None:
        try:
            count(ended)
        except Exception:
            log.exception("a call could not be counted; it is recorded all the same")

    def _learn(self, source: Source, told: Told) -> None:
        """The shapes of a frame that are not known yet. As many are kept as the serving process keeps."""
        for number, packed in told.requests.items():
            if number not in source.requests:
                if len(source.requests) >= SHAPES_MAX:
                    source.requests = {kept: source.requests[kept] for kept in told.requests if kept in source.requests}
                with suppress(FrameError):  # the calls that refer to it are lost, each by itself
                    source.requests[number] = request_shape_of(number, packed)
        for number, packed in told.responses.items():
            if number not in source.responses:
                if len(source.responses) >= SHAPES_MAX:
                    source.responses = {
                        kept: source.responses[kept] for kept in told.responses if kept in source.responses
                    }
                with suppress(FrameError):
                    source.responses[number] = response_shape_of(number, packed)

    def _batch(self) -> Batch:
        return Batch(first_seq=self._seq + 1, done=lambda done: self._stored(done, [], Ended()))

    def _append(self, batch: Batch, line: bytes) -> None:
        self._seq += 1
        batch.lines.append(line)
        batch.size_bytes += len(line)

    def _submit(self, batch: Batch) -> None:
        assert self._spool is not None
        tally = self._spool.tally
        batch.admitted = tally.admitted
        batch.lost = tally.lost
        self._spool.submit(batch)

    def _stored(self, batch: Batch, sources: Sequence[tuple[Source, int]], ended: Ended) -> None:
        """On the loop, in order: it is on disk."""
        self.tally.open -= len(batch.lines)
        for source, number in sources:
            source.waiting -= 1
            source.stored = number
            source.acknowledge(number)
        # Behind that, for nobody waits for these, and what they miss is read from the disk.
        if self.stored is not None:
            self.stored(batch.last_seq, [(source.id, number) for source, number in sources])
        if batch.lines and self.handed is not None:
            self.handed(self._instance, batch, ended)


def _count(tally: Tally, told: Told) -> None:
    tally.admitted += told.admitted
    tally.open += told.admitted
    if told.lost:
        tally.open -= sum(told.lost.values())
        tally.lost = _sum(tally.lost, told.lost)


def _sum(one: Mapping[str, int], other: Mapping[str, int]) -> Mapping[str, int]:
    return dict(Counter(one) + Counter(other)) if other else one
