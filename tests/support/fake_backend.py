"""A billing backend that keeps the contract and can be told to misbehave, by script or by seed.

It takes events into `taken`, de-duplicates as its abilities say, and remembers every offer with its bytes. What
`Behaviour` asks for happens at the moment of an offer; `lose_after` takes the events and loses the answer.
With a path, what was taken and offered also goes to a file that outlives the process.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from sidecar.model.delivery import (
    Abilities,
    Atomicity,
    Blocked,
    Dedup,
    Delivered,
    Duplicate,
    Encoded,
    Event,
    Refused,
    Retry,
    Sealed,
    Unknown,
    Verdict,
    Withheld,
)
from sidecar.model.exchange import Outcome
from sidecar.model.record import Record

Behaviour = Callable[[Sealed], "list[Verdict] | str | None"]
"""None or "ok": take it; a list: exactly these verdicts; or one of the words of `FakeBackend._misbehave`."""


@dataclass(slots=True)
class Offer:
    key: str
    body: bytes
    events: tuple[Event, ...]
    attempt: int


@dataclass(slots=True)
class FakeBackend:
    """`events_of` gives the names of a record's events (one each by default)."""

    abilities: Abilities = field(default_factory=Abilities)
    name: str = "fake"
    script: list[list[Verdict] | str | None] = field(default_factory=list)  # used up first
    behaviour: Behaviour | None = None  # then asked
    poison: set[str] = field(default_factory=set)  # record ids that are refused, wherever they are
    events_of: Callable[[Record], Sequence[str]] = lambda record: ("",)
    subject_of: Callable[[Record], str] = lambda record: ""
    skip: Callable[[Record], str | None] = lambda record: None
    park: Callable[[Record], str | None] = lambda record: None
    withhold: Callable[[Record, str], str | None] = lambda record, name: None  # of one event
    path: Path | None = None
    on_send: Callable[[str], None] = lambda moment: None  # crash tests die here
    latency_s: float = 0.0
    flavour: str = ""  # another version of the encoder writes other bytes
    taken: Counter[str] = field(default_factory=Counter)  # event id -> how often it was billed
    offers: list[Offer] = field(default_factory=list)
    keys: dict[str, tuple[bytes, list[Verdict]]] = field(default_factory=dict)
    released: asyncio.Event = field(default_factory=asyncio.Event)  # what `stall` waits for
    busy: int = 0
    busy_most: int = 0
    subjects_busy: Counter[str] = field(default_factory=Counter)
    subject_most: int = 0
    encoded: int = 0

    def __post_init__(self) -> None:
        if self.path is not None and self.path.exists():
            for row in map(orjson.loads, self.path.read_bytes().splitlines()):
                if "refused" in row:
                    self._remember(row)
                else:
                    events = tuple(Event(*pair) for pair in row["events"])
                    self.offers.append(Offer(row["key"], row["body"].encode(), events, row["attempt"]))

    def _remember(self, row: dict[str, Any]) -> None:
        self.taken.update(row["taken"])
        verdicts: list[Verdict] = [Refused(why) if why else Delivered() for why in row["refused"]]
        self.keys[row["key"]] = (row["body"].encode(), verdicts)

    def encode(self, records: Sequence[Record]) -> Encoded:
        self.encoded += 1
        encoded = Encoded()
        pieces: list[tuple[Event, Record]] = []
        for record in records:
            if self.abilities.bills and record.outcome in (Outcome.DENIED, Outcome.REFUSED):
                encoded.skipped[record.id] = str(record.outcome)
            elif self.abilities.bills and record.outcome is Outcome.UNKNOWN:
                encoded.parked[record.id] = "unsettled"
            elif (reason := self.skip(record)) is not None:
                encoded.skipped[record.id] = reason
            elif (reason := self.park(record)) is not None:
                encoded.parked[record.id] = reason
            else:
                for name in self.events_of(record):
                    event = Event(record.id, _event_id(record, name))
                    if (reason := self.withhold(record, name)) is not None:
                        encoded.withheld[event] = Withheld(reason, f"meter {name}")
                    else:
                        pieces.append((event, record))
        for start in range(0, len(pieces), self.abilities.events_max):
            encoded.sealed.append(self._seal(pieces[start : start + self.abilities.events_max]))
        return encoded

    def _seal(self, pieces: Sequence[tuple[Event, Record]]) -> Sealed:
        events = tuple(event for event, _ in pieces)
        body = orjson.dumps([[e.event_id, r.started_at, r.route, self.flavour] for e, r in pieces])
        key = events[0].event_id
        if self.abilities.events_max > 1:
            key = (
                f"{key}-{len(events)}-{hashlib.sha256(b'|'.join(e.event_id.encode() for e in events)).hexdigest()[:8]}"
            )
        return Sealed(key=key, events=events, body=body, subject=self.subject_of(pieces[0][1]), path="/events")

    async def send(self, sealed: Sealed) -> list[Verdict]:
        self.on_send("before")
        self.offers.append(Offer(sealed.key, sealed.body, sealed.events, sealed.attempt))
        events = [[event.record_id, event.event_id] for event in sealed.events]
        self._write({"key": sealed.key, "body": sealed.body.decode(), "events": events, "attempt": sealed.attempt})
        self.busy += 1
        self.busy_most = max(self.busy_most, self.busy)
        self.subjects_busy[sealed.subject] += 1
        self.subject_most = max(self.subject_most, self.subjects_busy[sealed.subject])
        try:
            await asyncio.sleep(self.latency_s)
            what = self.script.pop(0) if self.script else self.behaviour(sealed) if self.behaviour else None
            verdicts = what if isinstance(what, list) else await self._misbehave(what or "ok", sealed)
            self.on_send("after")
            return verdicts
        finally:
            self.busy -= 1
            self.subjects_busy[sealed.subject] -= 1

    async def aclose(self) -> None:
        pass

    async def _misbehave(self, word: str, sealed: Sealed) -> list[Verdict]:
        count = len(sealed.events)
        match word.split(":"):
            case ["ok"]:
                return self._take(sealed)
            case ["stall", *then]:  # and then do as another word says
                await self.released.wait()
                return await self._misbehave(":".join(then) or "ok", sealed)
            case ["hang"]:
                await asyncio.Event().wait()
                raise AssertionError("never")
            case ["lose_before"]:
                return [Unknown("connection_lost")] * count
            case ["lose_after"]:
                self._take(sealed)
                return [Unknown("connection_lost")] * count
            case ["refuse", reason]:
                return [Refused(reason)] * count
            case ["block", reason]:
                return [Blocked(reason)] * count
            case ["retry", reason]:
                return [Retry(reason)] * count
            case ["retry", reason, after]:
                return [Retry(reason, float(after))] * count
            case ["raise"]:
                raise RuntimeError("a bug in a backend")
            case ["short"]:
                return []
        raise AssertionError(f"no such behaviour: {word}")

    def _take(self, sealed: Sealed) -> list[Verdict]:
        abilities = self.abilities
        if abilities.dedup is Dedup.REQUEST_KEY and sealed.key in self.keys:
            body, verdicts = self.keys[sealed.key]
            return verdicts if body == sealed.body else [Refused("idempotency_mismatch")] * len(sealed.events)
        before = self.taken.copy()
        bad = [event for event in sealed.events if event.record_id in self.poison]
        if bad and abilities.atomicity is not Atomicity.PER_ITEM:
            verdicts = [Refused("http_400")] * len(sealed.events)
            if abilities.atomicity is Atomicity.PREFIX:
                for event in sealed.events[: sealed.events.index(bad[0])]:
                    self._take_one(event)
        else:
            verdicts = [Refused("bad_event") if event in bad else self._take_one(event) for event in sealed.events]
        self.keys[sealed.key] = (sealed.body, verdicts)
        refused = [verdict.reason if isinstance(verdict, Refused) else None for verdict in verdicts]
        taken = list((self.taken - before).elements())
        self._write({"key": sealed.key, "body": sealed.body.decode(), "refused": refused, "taken": taken})
        return verdicts

    def _take_one(self, event: Event) -> Verdict:
        if self.abilities.dedup is Dedup.EVENT_ID and self.taken[event.event_id]:
            return Duplicate() if self.abilities.knows_duplicates else Delivered()
        self.taken[event.event_id] += 1
        return Delivered()

    def _write(self, row: dict[str, Any]) -> None:
        """One line at once, so that a kill tears none."""
        if self.path is None:
            return
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            os.write(descriptor, orjson.dumps(row) + b"\n")
        finally:
            os.close(descriptor)


def _event_id(record: Record, name: str) -> str:
    return f"{record.id}:{name}" if name else record.id


def faults(seed: int, share: float, words: Sequence[str]) -> Behaviour:
    """Misbehave in a share of offers, in an order that a seed fixes."""
    chance = random.Random(seed)
    return lambda sealed: chance.choice(words) if chance.random() < share else None
