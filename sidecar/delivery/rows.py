"""What travels between a worker and `delivery.db`: requests to be sealed, requests that are open, their settling.

Plain data. A `Request` is the one mutable thing: it belongs to its worker, which follows with it what was stored.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from sidecar.delivery.retry_policy import Decision
from sidecar.delivery.types import Parking, Tries
from sidecar.model.delivery import Sealed
from sidecar.storage.files import StorageError


class StateError(StorageError):
    """`delivery.db` cannot do what was asked. The text says what to do about it."""


class StateFull(StateError):
    """There is no room on the disk: nothing was written, the same step may be tried again."""


class StateBusy(StateError):
    """What is on disk is not what the caller believes (a step that was stored after all): load again."""


@dataclass(frozen=True, slots=True)
class Member:
    """One wire event and the record that it came from."""

    seq: int
    record_id: str
    event_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class NewRequest:
    """A request to be stored before its first attempt, with the records that it was made of.

    The records are kept beside the bytes so that a split, a parking and a redrive need no spool:
    its chunk may be gone by then.
    """

    sealed: Sealed
    members: tuple[Member, ...]
    lines: tuple[bytes, ...]  # one a record, in the order in which the members first name them
    oldest_s: float  # event time of the oldest record
    due_s: float = 0.0  # wall clock: not before
    tries: Tries = field(default_factory=Tries)
    generation: int = 0  # how often its records were redriven
    history: tuple[str, ...] = ()

    @property
    def size_bytes(self) -> int:
        return len(self.sealed.body) + sum(map(len, self.lines))


@dataclass(slots=True, kw_only=True)
class Request:
    """An open sealed request. `sealed` is None while it waits long: its bytes are read when it is due."""

    id: int
    cursor: int
    key: str
    subject: str
    members: tuple[Member, ...]
    records: int
    size_bytes: int
    oldest_s: float
    tries: Tries
    due_s: float
    under_way: bool
    started_s: float  # wall clock: start of the latest attempt
    generation: int
    history: tuple[str, ...]
    sealed: Sealed | None = None
    warned: bool = False  # that its window is about to end
    stepped: bool = False  # the wall clock was set during this attempt
    held: bool = False  # waits for as long as the backend said, not for our own backoff

    @classmethod
    def opened(cls, id_: int, cursor: int, new: NewRequest) -> Request:
        """A request as it stands in the file right after it was stored."""
        return cls(
            id=id_,
            cursor=cursor,
            key=new.sealed.key,
            subject=new.sealed.subject,
            members=new.members,
            records=len(new.lines),
            size_bytes=new.size_bytes,
            oldest_s=new.oldest_s,
            tries=new.tries,
            due_s=new.due_s,
            under_way=False,
            started_s=0.0,
            generation=new.generation,
            history=new.history,
            sealed=new.sealed,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class NewParked:
    """A record that could not become a request; or one event of it, where `event_id` names it."""

    seq: int
    record_id: str
    event_id: str = ""
    reason: str
    line: bytes
    maybe_taken: bool = False
    generation: int = 0
    history: tuple[str, ...] = ()
    detail: str = ""  # more about the reason; not stored


@dataclass(frozen=True, slots=True)
class Hole:
    """Numbers whose records cannot be read any more; `records` of them were recorded once."""

    first_seq: int
    last_seq: int
    records: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Sealing:
    """One step of a cursor: what became of the records between two places in the spool."""

    cursor: int
    from_seq: int  # where the cursor must be
    to_seq: int
    requests: Sequence[NewRequest] = ()
    at_once: Collection[int] = ()  # which of them are offered at once: a crash leaves their outcome unknown
    skipped: Mapping[str, Sequence[int]] = field(default_factory=dict)  # reason -> seqs
    parked: Sequence[NewParked] = ()
    holes: Sequence[Hole] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Settlement:
    """What is to be stored of one attempt."""

    request: Request
    decision: Decision
    history: tuple[str, ...]
    due_s: float = 0.0
    children: Sequence[NewRequest] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """What one turn of a worker stores: one transaction."""

    now_s: float  # wall clock
    settled: Sequence[Settlement] = ()
    begin: Sequence[int] = ()  # requests of which another attempt starts
    load: Sequence[int] = ()  # those of them whose bytes are not in memory
    sealing: Sealing | None = None


@dataclass(frozen=True, slots=True)
class Committed:
    """What a turn has stored: ids of children by settlement and of new requests; the bytes that were asked for."""

    children: Sequence[Sequence[int]]
    sealed: Sequence[int]
    loaded: Mapping[int, Sealed]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cursor:
    """How far one backend is in one instance's spool."""

    id: int
    backend: str
    instance: str
    seq: int
    again_upto: int  # up to here nothing is known of earlier deliveries: the rule for salvaged records


@dataclass(frozen=True, slots=True, kw_only=True)
class Parked:
    """One parked event, as listed."""

    id: int
    cursor: int
    backend: str
    instance: str
    seq: int
    record_id: str
    event_id: str
    reason: str
    maybe_taken: bool
    at_s: float
    key: str
    generation: int
    request: int | None
    line: bytes
    body: bytes | None  # what was sent, as far as it was ever encoded
    history: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Redrive:
    """Parked events of one cursor to be let go in one step, and the requests that carry them on."""

    cursor: int
    parked: Sequence[Parked]
    requests: Sequence[NewRequest]
    skipped: Mapping[int, str] = field(default_factory=dict)  # seq -> reason: encodes to nothing now
    again: Sequence[NewParked] = ()  # in the place of some of them: what cannot go for another reason than before


@dataclass(frozen=True, slots=True, kw_only=True)
class Amendment:
    """A delivered event that is delivered no more: parked with a reason, or taken back and passed over."""

    request: int
    member: Member
    parking: Parking | None = None
    line: bytes = b""  # the record, where it is parked
    skip: str = ""  # why it is passed over, where it is not
    note: str = ""  # for its history


@dataclass(frozen=True, slots=True)
class Range:
    """Records that were skipped without being looked at; `records` of these numbers are still skipped."""

    id: int
    cursor: int
    instance: str
    first_seq: int
    last_seq: int
    records: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Unskip:
    """Records that leave such a range, and what becomes of them."""

    cursor: int
    range: int
    reason: str  # that of the range
    requests: Sequence[NewRequest] = ()
    skipped: Mapping[str, Sequence[int]] = field(default_factory=dict)
    parked: Sequence[NewParked] = ()

    @property
    def records(self) -> int:
        placed = {member.seq for new in self.requests for member in new.members}
        placed.update(parked.seq for parked in self.parked)
        return len(placed) + sum(map(len, self.skipped.values()))


@dataclass(frozen=True, slots=True)
class Place:
    """Where a spool ends, and how many records were ever put in it."""

    instance: str
    last_seq: int
    recorded: int
