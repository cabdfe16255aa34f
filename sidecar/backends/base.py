"""What every backend file builds on: its surroundings, which calls it is owed, and the shape of its requests.

A backend file knows one wire contract. Which calls may be billed at all, how events are cut into
requests, and how a key is made from its members are the same for all of them and stand here. All of it is
pure: the same records give the same bytes and keys, whoever asks and whenever.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any, Final, Protocol, runtime_checkable

import orjson

from sidecar.exchange import Outcome
from sidecar.meters.definition import Kind, Meter, read_meters
from sidecar.meters.hourly import write_amount
from sidecar.record import Record
from sidecar.settings import Secret, Setting, kinds
from sidecar.verdict import Encoded, Event, Sealed, Verdict

KEY_CHARS_MAX: Final = 90  # of the 100 that every backend takes: the rest is for `.0` of a split, `~n` of a redrive
TEXT_CHARS_MAX: Final = 255  # what vendors store of a text; Revenium's own package cuts here as well
DAY_S: Final = 86_400.0

_PLAIN_KEY: Final = re.compile(rf"[!-~]{{1,{KEY_CHARS_MAX}}}")
_HASHED: Final = re.compile(r"key_[0-9a-f]{32}")  # how `attribution` writes the keyed hash of a credential


class LedgerApply(Protocol):
    """The embedded store, as much as its backend needs. All calls block."""

    def apply(self, key: str, body: bytes) -> Verdict:
        """Add the effects of one sealed delivery, once; its own faults come back as a verdict."""
        ...

    def undo(self, key: str, body: bytes) -> tuple[Verdict, tuple[str, ...]]:
        """Add effects that take others back, once; and the meters that could not be taken back."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """What a backend is given besides its own settings."""

    data_dir: Path
    subscribers: Mapping[str, Mapping[str, str]] = field(default_factory=dict)  # our id -> backend -> id there
    meters: Sequence[Mapping[str, Any]] = ()  # as configured; none gives the three defaults
    open_ledger: Callable[[], LedgerApply] | None = None

    def customers(self, backend: str) -> dict[str, str]:
        """Our subscriber id -> the backend's customer id, where one is mapped."""
        return {ours: theirs[backend] for ours, theirs in self.subscribers.items() if backend in theirs}

    def definitions(self) -> tuple[Meter, ...]:
        """The meters. Raises `MetersError` with every fault."""
        return read_meters(self.meters)


SEND: Final = "send"
SKIP: Final = "skip"
PARK: Final = "park"


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """Which calls a backend is given: one of `send`, `skip`, `park` for each kind that is not plainly billable."""

    denied: str = SKIP  # turned away by the gate
    refused: str = SKIP  # turned away by us: a bad request
    unsettled: str = PARK  # found open after a crash: nobody knows what was consumed
    partial: str = SEND  # usage is a lower bound, because the end of the answer was not seen

    def place(self, record: Record, encoded: Encoded) -> bool:
        """True: the record is to be sent. Otherwise it has been put where it belongs."""
        kind = _kind(record)
        do = SEND if kind is None else getattr(self, kind)
        if do == SKIP:
            encoded.skipped[record.id] = str(kind)
        elif do == PARK:
            encoded.parked[record.id] = str(kind)
        return bool(do == SEND)


BILLING: Final = Policy()
EVERYTHING: Final = Policy(denied=SEND, refused=SEND, unsettled=SEND)


def policy_settings(policy: Policy) -> tuple[Setting, ...]:
    """The switches of one backend: which calls it is given beside the plainly billable ones."""
    do = kinds.word_of(SEND, SKIP, PARK)
    return (
        Setting("denied", do, policy.denied, "calls that the gate turned away: `send`, `skip` or `park`"),
        Setting("refused", do, policy.refused, "calls that were refused as bad requests"),
        Setting("unsettled", do, policy.unsettled, "calls found open after a crash"),
        Setting("partial", do, policy.partial, "calls whose usage is only a lower bound"),
    )


def policy_of(values: Mapping[str, Any]) -> Policy:
    return Policy(**{name: values[name] for name in ("denied", "refused", "unsettled", "partial")})


def revealed(secret: Secret | None) -> str | None:
    """What a secret setting holds, for the one place that puts it into a header."""
    return None if secret is None else secret.reveal()


@runtime_checkable
class Examined(Protocol):
    """A backend that can be asked whether it is set up as we are: what `check --connect` calls."""

    async def examine(self) -> list[str]:
        """What is wrong, each with what to do; nothing when all is well. Bills nothing."""
        ...


@dataclass(frozen=True, slots=True)
class Provision:
    """What became of one meter at a backend. `fits`: it is there now, as we define it."""

    fits: bool
    text: str


@runtime_checkable
class Provisioned(Protocol):
    """A backend at which meters can be created: what `meters provision` calls."""

    async def provision(self, meter: Meter) -> Provision:
        """Create the meter where it is missing, compare where it is there, change nothing; says what was done."""
        ...


def chosen_meters(
    backend: str, definitions: Sequence[Meter], names: Sequence[str], takes: frozenset[Kind]
) -> tuple[Meter, ...]:
    """The meters that a backend is sent: those named, else all. Raises `ValueError` for what it cannot take."""
    known = {meter.name: meter for meter in definitions}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"{backend}: {', '.join(unknown)} is no meter; there are {', '.join(known)}")
    chosen = tuple(known[name] for name in names) if names else tuple(definitions)
    for meter in chosen:
        if meter.kind not in takes:
            raise ValueError(
                f"{backend}: the meter {meter.name} is a {meter.kind}, and {backend} takes one number an event "
                f"({', '.join(sorted(takes))}): name the meters to send in SIDECAR_{backend.upper()}_METERS"
            )
    return chosen


def quantities(record: Record, meters: Sequence[Meter]) -> list[tuple[Meter, int | Decimal]]:
    """The meters that this record adds to, with what it adds; none where it has no value for any."""
    measured = ((meter, meter.quantity(record)) for meter in meters)
    return [(meter, quantity) for meter, quantity in measured if quantity is not None]


def json_number(quantity: int | Decimal) -> orjson.Fragment:
    """A number with all its digits: a float would lose some."""
    return orjson.Fragment(plain_number(quantity).encode())


def plain_number(quantity: int | Decimal) -> str:
    return str(quantity) if isinstance(quantity, int) else write_amount(quantity)


def rfc3339(moment: datetime) -> str:
    """UTC with microseconds and Z: the same text for the same moment, always."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _kind(record: Record) -> str | None:
    if record.outcome is Outcome.DENIED:
        return "denied"
    if record.outcome is Outcome.REFUSED:
        return "refused"
    if record.outcome is Outcome.UNKNOWN:
        return "unsettled"
    if record.usage is not None and record.usage.usage_state == "partial":
        return "partial"
    return None


def subscriber_id(record: Record) -> str | None:
    return None if record.subscriber is None else record.subscriber.id


def customer_id(record: Record, customers: Mapping[str, str]) -> str | None:
    """Who pays, in the backend's own ids: as mapped, else the subscriber's id unless that is a hash.

    A hashed key is nobody's customer id: a vendor would take it and drop the event later.
    """
    own = subscriber_id(record)
    if not own:
        return None
    if own in customers:
        return customers[own]
    return None if _HASHED.fullmatch(own) else own


def label_id(record: Record, customers: Mapping[str, str]) -> str | None:
    """Who pays, for a field that takes any text: as mapped, else our own id, hashed or not."""
    own = subscriber_id(record)
    return None if own is None else customers.get(own, own)


def clip(text: str, chars: int = TEXT_CHARS_MAX) -> str:
    """Cut as the vendors' own packages do, on a character border."""
    return text if len(text) <= chars else text[:chars]


def event_key(event_id: str) -> str:
    """A request key from one event's id. Ids are ours and plain; anything else is replaced by its digest."""
    return event_id if _PLAIN_KEY.fullmatch(event_id) else f"h-{_digest((event_id,), 32)}"


def batch_key(events: Sequence[Event]) -> str:
    """A request key from all its members: first id, their number, and a digest of every id in order."""
    first = events[0].event_id
    head = first if re.fullmatch(r"[!-~]{1,40}", first) else _digest((first,), 16)
    return f"{head}-{len(events)}-{_digest((e.event_id for e in events), 16)}"


def _digest(ids: Iterable[str], chars: int) -> str:
    whole = hashlib.sha256()
    for one in ids:
        data = one.encode("utf-8", "replace")
        whole.update(len(data).to_bytes(4, "big") + data)
    return whole.hexdigest()[:chars]


@dataclass(frozen=True, slots=True)
class Piece:
    """One event and its bytes, before requests are cut."""

    event: Event
    data: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """How pieces become a body: what stands before, between and behind them."""

    opening: bytes = b""
    between: bytes = b""
    closing: bytes = b""

    def body(self, pieces: Sequence[Piece]) -> bytes:
        return self.opening + self.between.join(piece.data for piece in pieces) + self.closing

    def size(self, data_bytes: int, count: int) -> int:
        return len(self.opening) + data_bytes + len(self.between) * max(count - 1, 0) + len(self.closing)


JSON_ARRAY: Final = Frame(opening=b"[", between=b",", closing=b"]")
JSON_EVENTS: Final = Frame(opening=b'{"events":[', between=b",", closing=b"]}")
LINES: Final = Frame(between=b"\n", closing=b"\n")


def seal_batches(
    pieces: Iterable[Piece],
    encoded: Encoded,
    *,
    frame: Frame,
    events_max: int,
    bytes_max: int | None,
    path: str = "",
    content_type: str = "application/json",
    headers: tuple[tuple[str, str], ...] = (),
) -> Encoded:
    """Cut pieces into requests within both limits, in order. A piece too large by itself parks its record."""
    for batch in _cut(_fitting(pieces, encoded, frame, bytes_max), frame, events_max, bytes_max):
        events = tuple(piece.event for piece in batch)
        encoded.sealed.append(
            Sealed(
                key=batch_key(events),
                events=events,
                body=frame.body(batch),
                path=path,
                content_type=content_type,
                headers=headers,
            )
        )
    return encoded


def _fitting(pieces: Iterable[Piece], encoded: Encoded, frame: Frame, bytes_max: int | None) -> Iterator[Piece]:
    for piece in pieces:
        if bytes_max is not None and frame.size(len(piece.data), 1) > bytes_max:
            encoded.parked[piece.event.record_id] = "too_large"
        else:
            yield piece


def _cut(pieces: Iterable[Piece], frame: Frame, events_max: int, bytes_max: int | None) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    size = 0
    for piece in pieces:
        over = bytes_max is not None and frame.size(size + len(piece.data), len(batch) + 1) > bytes_max
        if batch and (len(batch) >= events_max or over):
            yield batch
            batch, size = [], 0
        batch.append(piece)
        size += len(piece.data)
    if batch:
        yield batch
